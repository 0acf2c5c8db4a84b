// How the rows of a product are cut into the boxes that the Tensor Memory Accelerator copies.
//
// A box is `columns` x `rows` x `images` pixels of the output, columns fastest; it fills a tile's
// rows from the first on, and what is left of the tile holds zeros. For each tap of the kernel, the
// pixels that a box reads are a box of the same size, moved. A product of rows is one image of one
// row of M pixels.
//
//   box 4 x 2 x 1 in a tile of 8     pixel  0 1 2 3   of rows  r, columns c .. c + 3
//                                           4 5 6 7            r + 1
//
// Pixels of a box beyond the output are multiplied and not stored: box_row says so.

#pragma once

#include "fragments.h"
#include "params.h"

namespace ptq4adm {

struct Boxes {
  int32_t columns, rows, images;  // of a box
  int32_t width, height, count;   // of the output: pixels, rows, images
  bool is_image;                  // the tensor maps are of [B, H, W, C]; otherwise of [M, C]
};

PTQ4ADM_BOTH int boxes_along(const Boxes& boxes, int axis) {
  if (axis == 0) return (boxes.width + boxes.columns - 1) / boxes.columns;
  if (axis == 1) return (boxes.height + boxes.rows - 1) / boxes.rows;
  return (boxes.count + boxes.images - 1) / boxes.images;
}

PTQ4ADM_BOTH int box_count(const Boxes& boxes) {
  return boxes_along(boxes, 0) * boxes_along(boxes, 1) * boxes_along(boxes, 2);
}

PTQ4ADM_BOTH int box_pixels(const Boxes& boxes) {
  return boxes.columns * boxes.rows * boxes.images;
}

// First pixel of a box.
struct BoxPlace {
  int column, row, image;
};

PTQ4ADM_BOTH BoxPlace box_place(const Boxes& boxes, int box) {
  const int across = boxes_along(boxes, 0);
  const int down = boxes_along(boxes, 1);
  const int line = box / across;
  const int image = line / down;
  return {(box - line * across) * boxes.columns, (line - image * down) * boxes.rows,
          image * boxes.images};
}

// Row of the product that row `pixel` of a tile holds, or -1 for none.
PTQ4ADM_BOTH int box_row(const Boxes& boxes, const BoxPlace& place, int pixel) {
  const int line = pixel / boxes.columns;
  const int layer = line / boxes.rows;
  const int column = place.column + pixel - line * boxes.columns;
  const int row = place.row + line - layer * boxes.rows;
  const int image = place.image + layer;
  const bool is_inside =
      layer < boxes.images && column < boxes.width && row < boxes.height && image < boxes.count;
  return is_inside ? (image * boxes.height + row) * boxes.width + column : -1;
}

}  // namespace ptq4adm
