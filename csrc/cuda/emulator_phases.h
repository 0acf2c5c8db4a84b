// The barriers of shared memory, for the files that arrive at them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulator_clocks.h"

namespace ptq4adm {
namespace emulator {

struct PhaseBarrier {
  size_t place = 0;  // shared byte
  int agent = 0;     // of the copies that it counts
  int count = 0;     // arrivals of a phase
  int initializer = 0, init_time = 0;

  int phase = 0;         // the one that goes on
  int pending = 0;       // arrivals that it lacks
  int64_t expected = 0;  // bytes
  int64_t issued = 0;    // bytes of its boxes, landed or not
  int64_t landed = 0;
  Clock arrived;  // what those who arrived in this phase knew

  Clock completed;     // what those knew who arrived in earlier ones
  int woken = 0;       // threads that were told of the last phase and have not run since
  int acquired = -1;   // the last phase that somebody has waited for
  int box_phase = -1;  // the last one with a box
};

// The barrier at an address; its initialization must be known to the thread that runs.
PhaseBarrier& barrier_at(const uint64_t* barrier, const char* instruction);
// Completes the phase if nothing is missing.
void settle(PhaseBarrier& barrier, const char* instruction);

}  // namespace emulator
}  // namespace ptq4adm
