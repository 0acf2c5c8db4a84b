// The launch that runs, for the parts of the emulator: its threads and where each of them waits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "emulator_clocks.h"
#include "emulator_errors.h"
#include "emulator_fibers.h"
#include "emulator_global.h"
#include "emulator_shared.h"

namespace ptq4adm {
namespace emulator {

constexpr int kWarp = 32;
constexpr int kGroup = 128;  // a warpgroup

enum class State { kReady, kAtWarp, kAtBarrier, kAtNamed, kAtPhase, kDone };

struct Copy {
  char* target;
  char bytes[16];
};
using CopyGroup = std::vector<Copy>;

struct Thread {
  Fiber fiber;
  State state = State::kReady;
  CopyGroup open;                // issued, not committed
  std::deque<CopyGroup> groups;  // committed, not waited for, oldest first
  size_t barrier = 0;            // at which it waits: shared byte, or number of a named one
  int parity = 0;                // for which
};

// What a lane brought to an instruction of its warp.
struct Operands {
  void* target;
  const void* first;
  const void* second;
  uint64_t number;
};

struct Warp {
  const char* instruction = nullptr;  // the one at which lanes wait
  int arrived = 0;
  int at_barrier = 0;
  int exited = 0;
  Operands operands[kWarp];
};

struct Launch {
  Grid grid;
  int block[3] = {0, 0, 0};
  const std::function<void()>* body = nullptr;
  int thread_count = 0;
  int epoch = 0;
  int at_barrier = 0;
  int exited = 0;
  int current = 0;  // the thread that runs
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::exception_ptr error;
  Order order = Order::kForward;

  Thread& thread() { return threads[current]; }
  Warp& warp() { return warps[current / kWarp]; }
  Point point() const;
};

extern Launch* launch;  // the one that runs
extern Clocks clocks;
extern SharedMemory shared;
extern GlobalMemory global_memory;

inline Point Launch::point() const {
  return {block[0] + grid.x * (block[1] + grid.y * block[2]), current, epoch, clocks.time(current)};
}

// The thread that runs waits, until someone sets its state to kReady.
void suspend(State state);
void check_aligned(const void* address, int bytes, const char* instruction);

// A lane comes to an instruction of its warp. Whether it is the last; the others have waited.
// `count` is 32, or 128 for an instruction of a warpgroup; operands then lie in its four warps.
bool meet(const char* instruction, const Operands& operands, int count);
// The last one sets those of the thread's warp or warpgroup free.
void set_free(int count);

// --- of sm_90 ------------------------------------------------------------------------------------

void start_barriers();  // for a new block, as the next two
void start_boxes();
void check_barriers_at_exit();                 // at its end
bool land_box();                               // one that is on its way, if there is one
std::string phase_text(const Thread& thread);  // what a thread waits for, in kAtPhase
void start_products();
void check_products_at_exit();  // by the thread that leaves

}  // namespace emulator
}  // namespace ptq4adm
