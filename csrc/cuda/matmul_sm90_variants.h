// The variants of matmul_sm90.h that are compiled, as a list for the GPU and for the emulator.

#pragma once

#include "matmul.h"
#include "matmul_sm90.h"

namespace ptq4adm {

// rows, 64s of channels a warpgroup, warpgroups, stages, blocks on a multiprocessor.
// docs/kernels-cuda.md says how they were chosen.
using Tile128x256 = WarpgroupTile<128, 2, 2, 8, 1>;
using Tile256x128 = WarpgroupTile<256, 1, 2, 6, 1>;
using Tile128x128 = WarpgroupTile<128, 2, 1, 6, 2>;
using Tile128x64 = WarpgroupTile<128, 1, 1, 6, 3>;
using Tile64x64 = WarpgroupTile<64, 1, 1, 8, 4>;
}  // namespace ptq4adm
