// Which bytes of the activations a thread copies: rows of a matrix, or pixels under a kernel's
// taps.
//
// Both loaders have the same face. Each thread serves one chunk of 16 k of kRows rows of the tile,
// a stride apart. A loader begins at a step of a segment; `copy` copies that step's chunks,
// `advance` goes to the next step. The main loop has few registers to spare, so what is wanted
// seldom (where the first tap of each pixel lies) is kept in shared memory, `places`, written by
// the block before a barrier that the constructor holds.

#pragma once

#include "fragments.h"
#include "params.h"

namespace ptq4adm {

// Number of a pixel in memory, or -1 outside the image, where activations are zero.
//
// (row, column) are of the enlarged image. `image` is the number of the image.
PTQ4ADM_BOTH int pixel_index(const Window& window, int image, int row, int column) {
  const bool is_inside = row >= 0 && row < window.rows && column >= 0 && column < window.columns;
  if (!is_inside) return -1;
  if (window.enlargement == Enlargement::kDouble) {
    row >>= 1;
    column >>= 1;
  } else if (window.enlargement == Enlargement::kAny) {
    row = row * window.height / window.rows;
    column = column * window.width / window.columns;
  }
  return (image * window.height + row) * window.width + column;
}

constexpr int kPixelPlaceBytes = 16;

// Image, row and column of the first tap of a row of the product, padding included.
PTQ4ADM_BOTH Bytes16 pixel_place(const Window& window, int m, int M) {
  const int line = m / window.out_width;
  const int image = line / window.out_height;
  const int row = (line - image * window.out_height) * window.stride[0] - window.padding[0];
  const int column = (m - line * window.out_width) * window.stride[1] - window.padding[1];
  constexpr int kNowhere = -(1 << 30);  // a row below every image: no tap reaches it
  return {{static_cast<uint32_t>(image), static_cast<uint32_t>(m < M ? row : kNowhere),
           static_cast<uint32_t>(column), 0}};
}

// Copy one chunk, of which `valid` bytes (not above 0: none) are there; the rest becomes zero.
PTQ4ADM_DEVICE void copy_chunk(char* shared, const int8_t* global, int valid, bool is_aligned) {
  if (is_aligned) {
    // a row is whole chunks
    copy_async_16(shared, global, valid > 0);
    return;
  }
  // odd rows: byte by byte, without a copy in the background
  PTQ4ADM_ROLLED
  for (int first = 0; first < kChunkBytes; first += 4) {
    uint32_t word = 0;
    PTQ4ADM_UNROLL
    for (int byte = 0; byte < 4; ++byte) {
      if (first + byte < valid) {
        word |= static_cast<uint32_t>(static_cast<uint8_t>(load(global + first + byte)))
                << (8 * byte);
      }
    }
    store(reinterpret_cast<uint32_t*>(shared + first), word);
  }
}

// The rows of a matrix. Below the last row the last is read again: what comes of it is not stored.
template <int kThreads, int kRows>
struct RowLoader {
  static constexpr int kStride = kThreads / kRowChunks;
  static_assert(kStride % 8 == 0, "tile_offset exchanges chunks alike in every eighth row");

  const int8_t* x;
  int place;          // of the first row's chunk in the tile
  int offset[kRows];  // element of the chunk
  int left;           // channels from the chunk's first on

  PTQ4ADM_DEVICE RowLoader(const Params& params, char*, int thread, int first_row, int segment,
                           int step) {
    const int channels = params.channels[segment];
    const int k = step * kBlockK + thread % kRowChunks * kChunkBytes;
    place = tile_offset(thread / kRowChunks, thread % kRowChunks);
    x = params.x[segment];
    left = channels - k;
    PTQ4ADM_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int row = first_row + thread / kRowChunks + i * kStride;
      offset[i] = (row < params.M ? row : params.M - 1) * channels + k;
    }
  }

  PTQ4ADM_DEVICE void copy(const Params& params, char* tile) const {
    PTQ4ADM_UNROLL
    for (int i = 0; i < kRows; ++i) {
      copy_chunk(tile + (place + i * kStride * kRowBytes), x + offset[i], left,
                 params.is_x_aligned);
    }
  }

  PTQ4ADM_DEVICE void advance(const Params&) {
    left -= kBlockK;
    PTQ4ADM_UNROLL
    for (int i = 0; i < kRows; ++i) offset[i] += kBlockK;
  }
};

// The pixels of an NHWC image under the taps of a kernel; a step is 64 channels of one tap.
template <int kThreads, int kRows>
struct PixelLoader {
  static constexpr int kStride = kThreads / kRowChunks;

  const int8_t* x;
  const char* places;
  int place;          // of the first row's chunk in the tile
  int offset[kRows];  // element of the chunk's first channel in the tap's pixel, or -1
  int channels, first_channel;
  int channel;  // of the step
  int tap_row, tap_column;

  PTQ4ADM_DEVICE PixelLoader(const Params& params, char* all_places, int thread, int first_row,
                             int segment, int step) {
    const Window& window = params.window;
    PTQ4ADM_ROLLED
    for (int row = thread; row < kRows * kStride; row += kThreads) {
      store_16(all_places + row * kPixelPlaceBytes, pixel_place(window, first_row + row, params.M));
    }
    block_barrier();
    places = all_places + thread / kRowChunks * kPixelPlaceBytes;
    place = tile_offset(thread / kRowChunks, thread % kRowChunks);
    x = params.x[segment];
    channels = params.channels[segment];
    const int steps = (channels + kBlockK - 1) / kBlockK;  // a tap
    const int tap = step / steps;
    channel = (step - tap * steps) * kBlockK;
    first_channel = thread % kRowChunks * kChunkBytes;
    tap_row = tap / window.kernel_width;
    tap_column = tap - tap_row * window.kernel_width;
    find_pixels(window);
  }

  PTQ4ADM_DEVICE void copy(const Params& params, char* tile) const {
    PTQ4ADM_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int valid = offset[i] < 0 ? 0 : channels - first_channel - channel;
      copy_chunk(tile + (place + i * kStride * kRowBytes),
                 valid > 0 ? x + (offset[i] + channel) : x, valid, params.is_x_aligned);
    }
  }

  PTQ4ADM_DEVICE void advance(const Params& params) {
    channel += kBlockK;
    if (channel < channels) return;
    channel = 0;
    if (++tap_column == params.window.kernel_width) {
      tap_column = 0;
      ++tap_row;
    }
    find_pixels(params.window);
  }

 private:
  PTQ4ADM_DEVICE void find_pixels(const Window& window) {
    PTQ4ADM_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const Bytes16 first = load_16(places + i * kStride * kPixelPlaceBytes);
      const int pixel =
          pixel_index(window, static_cast<int>(first.word[0]),
                      static_cast<int>(first.word[1]) + tap_row * window.dilation[0],
                      static_cast<int>(first.word[2]) + tap_column * window.dilation[1]);
      offset[i] = pixel < 0 ? -1 : pixel * channels + first_channel;
    }
  }
};

}  // namespace ptq4adm
