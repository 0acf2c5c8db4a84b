// TMA copies of boxes: tensor maps as descriptions, and data that lands when nobody looks.

#include <cstring>
#include <string>
#include <vector>

#include "emulator_launch.h"
#include "emulator_phases.h"
#include "tensor_map.h"
#include "tensor_map_rules.h"

namespace ptq4adm {
namespace emulator {
namespace {

constexpr uint64_t kMark = 0x656d756c61746564;  // the last word of a map that this file has made
constexpr size_t kPattern = 512;                // bytes after which the swizzle repeats

struct Box {
  PhaseBarrier* barrier;
  size_t place;
  std::vector<char> bytes;
};
std::vector<Box> on_their_way;

TensorMapDescription description_of(const TensorMap* map, const char* instruction) {
  check_aligned(map, 64, instruction);
  if (map->word[15] != kMark) refuse(instruction, text("%p is no tensor map", map));
  TensorMapDescription description;
  std::memcpy(&description, map->word, sizeof description);
  return description;
}

// Puts the row of a box whose first element is at `at`: what lies outside of the tensor is zero.
void fill_row(const TensorMapDescription& map, const int64_t* at, char* row,
              const char* instruction) {
  int64_t source = static_cast<int64_t>(map.base);
  for (int i = 1; i < map.rank; ++i) {
    if (at[i] < 0 || at[i] >= map.sizes[i]) return;
    source += at[i] * map.strides[i];
  }
  const int64_t first = at[0] < 0 ? -at[0] : 0;
  const int64_t last = at[0] + map.box[0] > map.sizes[0] ? map.sizes[0] - at[0] : map.box[0];
  if (first >= last) return;
  const void* bytes = reinterpret_cast<const void*>(source + at[0] + first);
  // the async proxy reads it at any time, so nobody may write it in this launch
  global_memory.check_read(bytes, static_cast<int>(last - first), true, launch->point(),
                           instruction);
  std::memcpy(row + first, bytes, static_cast<size_t>(last - first));
}

// The bytes of a box in the order of shared memory, whose swizzle exchanges bits 4 and 5 of an
// address by bits 7 and 8; it lands at a multiple of the pattern, so its own offset will do.
std::vector<char> fill_box(const TensorMapDescription& map, const int* start,
                           const char* instruction) {
  std::vector<char> bytes(static_cast<size_t>(map.box_bytes()));
  for (size_t row = 0; row < bytes.size() / map.box[0]; ++row) {
    int64_t at[TensorMapDescription::kMaxRank] = {start[0]};
    size_t rest = row;
    for (int i = 1; i < map.rank; ++i) {
      at[i] = start[i] + static_cast<int64_t>(rest % map.box[i]);
      rest /= map.box[i];
    }
    char line[TensorMapDescription::kSwizzleBytes] = {};
    fill_row(map, at, line, instruction);
    for (size_t chunk = 0; chunk < sizeof line; chunk += 16) {
      const size_t plain = row * sizeof line + chunk;
      std::memcpy(&bytes[plain ^ (plain >> 7 & 3) << 4], line + chunk, 16);
    }
  }
  return bytes;
}

void land(const Box& box) {
  shared.land_box(box.place, box.bytes.data(), static_cast<int>(box.bytes.size()));
  box.barrier->landed += static_cast<int64_t>(box.bytes.size());
  settle(*box.barrier, "landing of a box");
}

}  // namespace

void start_boxes() { on_their_way.clear(); }

// The newest first: the hardware keeps no order either.
bool land_box() {
  if (on_their_way.empty()) return false;
  const Box box = on_their_way.back();
  on_their_way.pop_back();
  land(box);
  return true;
}

void prefetch_tensor_map(const TensorMap* map) { description_of(map, "prefetch_tensor_map"); }

void async_proxy_fence() { clocks.fence(launch->current); }

void copy_box(void* target, const TensorMap* map, int rank, const int* start, uint64_t* address) {
  const char* const name = rank == 2 ? "copy_box_2d" : "copy_box_4d";
  const TensorMapDescription description = description_of(map, name);
  if (description.rank != rank) {
    refuse(name, text("the tensor map has %d dimensions", description.rank));
  }
  PhaseBarrier& barrier = barrier_at(address, name);
  if (!clocks.is_init_fenced(barrier.initializer, barrier.init_time, launch->current)) {
    refuse(name, text("the barrier at shared byte %zu was initialized by thread %d without a "
                      "barrier_init_fence after it",
                      barrier.place, barrier.initializer));
  }
  const int bytes = static_cast<int>(description.box_bytes());
  const size_t place = shared.offset(target, bytes, name);
  if (place % kPattern != 0) {
    refuse(name, text("misaligned: shared byte %zu is no multiple of %zu, after which the swizzle "
                      "repeats",
                      place, kPattern));
  }
  const Box box = {&barrier, place, fill_box(description, start, name)};
  shared.start_box(place, bytes, launch->current, barrier.agent, barrier.phase, name);
  barrier.issued += bytes;
  barrier.box_phase = barrier.phase;
  if (launch->order == Order::kForward) {
    land(box);
  } else {
    on_their_way.push_back(box);
  }
}

}  // namespace emulator

const char* make_tensor_map(TensorMap* map, const TensorMapDescription& description) {
  thread_local std::string reason;
  reason = tensor_map_offence(description);
  if (!reason.empty()) {
    reason = "tensor map: " + reason;
    return reason.c_str();
  }
  static_assert(sizeof description <= 15 * sizeof(uint64_t), "one word is left for the mark");
  *map = TensorMap();
  std::memcpy(map->word, &description, sizeof description);
  map->word[15] = emulator::kMark;
  return nullptr;
}

}  // namespace ptq4adm
