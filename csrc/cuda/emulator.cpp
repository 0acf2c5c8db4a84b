#include "emulator.h"

#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "emulator_errors.h"
#include "emulator_launch.h"

namespace ptq4adm {
namespace emulator {

Launch* launch = nullptr;
Clocks clocks;
SharedMemory shared(clocks);
GlobalMemory global_memory(clocks);

void suspend(State state) {
  Thread& thread = launch->thread();
  thread.state = state;
  thread.fiber.leave();
}

void check_aligned(const void* address, int bytes, const char* instruction) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    refuse(instruction, text("misaligned: %p is no multiple of %d", address, bytes));
  }
}

bool meet(const char* instruction, const Operands& operands, int count) {
  Warp& warp = launch->warp();
  if (warp.instruction != nullptr && warp.instruction != instruction) {
    refuse(instruction,
           text("diverged: %d lanes of the warp wait at %s", warp.arrived, warp.instruction));
  }
  if (warp.at_barrier > 0) {
    refuse(instruction,
           text("diverged: %d lanes of the warp wait at block_barrier", warp.at_barrier));
  }
  if (warp.exited > 0) {
    refuse(instruction, text("diverged: %d lanes of the warp have exited", warp.exited));
  }
  const int first = launch->current / count * count;
  if (first + count > launch->thread_count) {
    refuse(instruction,
           text("threads %d to %d are no whole warpgroup", first, launch->thread_count - 1));
  }
  warp.instruction = instruction;
  warp.operands[launch->current % kWarp] = operands;
  ++warp.arrived;
  bool is_last = true;
  for (int i = first / kWarp; i < (first + count) / kWarp; ++i) {
    const Warp& other = launch->warps[i];
    is_last &= other.arrived == kWarp && other.instruction == instruction;
    if (other.arrived == kWarp && other.instruction != instruction && warp.arrived == kWarp) {
      refuse(instruction, text("diverged: warp %d waits at %s", i, other.instruction));
    }
    if (other.exited > 0) refuse(instruction, text("diverged: lanes of warp %d have exited", i));
  }
  if (!is_last) suspend(State::kAtWarp);
  return is_last;
}

void set_free(int count) {
  const int first = launch->current / count * count;
  for (int i = first / kWarp; i < (first + count) / kWarp; ++i) {
    launch->warps[i].instruction = nullptr;
    launch->warps[i].arrived = 0;
  }
  for (int i = first; i < first + count; ++i) launch->threads[i].state = State::kReady;
}

namespace {

// The instructions of a warp, told apart by their names' addresses.
constexpr char kLoadMatrix[] = "load_matrix_x4";
constexpr char kMultiply[] = "multiply_s8_16x8x32";

// Whether an instruction that takes any memory means the shared one.
bool is_shared(const void* address, int bytes, const char* instruction) {
  if (shared.holds(address)) return true;
  if (shared.is_near(address) && !global_memory.holds(address, bytes)) {
    refuse(instruction, "out of bounds: " + shared.place(address));
  }
  return false;
}

void leave_kernel() {
  Thread& thread = launch->thread();
  const Warp& warp = launch->warp();
  size_t copies = thread.open.size();
  for (const CopyGroup& group : thread.groups) copies += group.size();
  if (copies > 0) refuse("exit", text("has not waited for %zu of its cp.async", copies));
  if (warp.arrived > 0) {
    refuse("exit",
           text("diverged: %d lanes of the warp wait at %s", warp.arrived, warp.instruction));
  }
  if (launch->at_barrier > 0) {
    refuse("exit",
           text("diverged: %d threads of the block wait at block_barrier", launch->at_barrier));
  }
  check_products_at_exit();
}

void run_thread() {
  try {
    (*launch->body)();
    leave_kernel();
  } catch (...) {
    launch->error = std::current_exception();
  }
  ++launch->warp().exited;
  ++launch->exited;
  suspend(State::kDone);
}

// Where a thread waits, for a text.
std::string place_of(const Thread& thread, const Warp& warp) {
  if (thread.state == State::kAtPhase) return phase_text(thread);
  if (thread.state == State::kAtNamed) return text("warpgroup_barrier %zu", thread.barrier);
  return thread.state == State::kAtBarrier ? "block_barrier" : warp.instruction;
}

[[noreturn]] void refuse_deadlock() {
  std::string what = "every thread of the block waits for another";
  std::string before;
  int first = 0;
  for (int i = 0; i <= launch->thread_count; ++i) {
    std::string place;
    if (i < launch->thread_count && launch->threads[i].state != State::kDone) {
      place = place_of(launch->threads[i], launch->warps[i / kWarp]);
    }
    if (i > 0 && place == before && i < launch->thread_count) continue;
    if (!before.empty()) what += text("; threads %d to %d at ", first, i - 1) + before;
    before = place;
    first = i;
  }
  throw KernelError(
      text("block (%d, %d, %d): ", launch->block[0], launch->block[1], launch->block[2]) + what);
}

void run_block(const Stacks& stacks, size_t shared_bytes) {
  clocks.reset(launch->thread_count);
  shared.reset(shared_bytes, launch->thread_count);
  global_memory.start_block();
  launch->threads = std::vector<Thread>(launch->thread_count);
  launch->warps.assign(launch->thread_count / kWarp, Warp());
  launch->epoch = launch->at_barrier = launch->exited = 0;
  start_barriers();
  start_boxes();
  start_products();
  for (int i = 0; i < launch->thread_count; ++i) {
    launch->threads[i].fiber.start(stacks.at(i), Stacks::kBytes, run_thread);
  }
  while (launch->exited < launch->thread_count) {
    bool has_run = false;
    for (int turn = 0; turn < launch->thread_count; ++turn) {
      const int i = launch->order == Order::kForward ? turn : launch->thread_count - 1 - turn;
      if (launch->threads[i].state != State::kReady) continue;
      launch->current = i;
      has_run = true;
      launch->threads[i].fiber.enter();
      if (launch->error) std::rethrow_exception(launch->error);
    }
    if (!has_run && !land_box()) refuse_deadlock();
  }
  check_barriers_at_exit();
  shared.check_untouched("exit");
}

// --- the work of a warp --------------------------------------------------------------------------

// Lane l gives the address of row l % 8 of matrix l / 8, and gets of each matrix the 32 bits at
// column 4 (l % 4) of row l / 4.
void load_matrices(const Operands* lanes) {
  for (int lane = 0; lane < kWarp; ++lane) {
    shared.check_read_by_warp(lanes[lane].first, 16, launch->current, kLoadMatrix);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const char* row = static_cast<const char*>(lanes[8 * matrix + lane / 4].first);
      std::memcpy(static_cast<char*>(lanes[lane].target) + 4 * matrix, row + 4 * (lane % 4), 4);
    }
  }
}

// acc[16, 8] += a[16, 32] b[32, 8]. Of lane l, with g = l / 4 and t = l % 4:
//   a  register r: row g + 8 (r % 2), columns 4 t + 16 (r / 2) and the three after
//   b  register r: column g, rows 4 t + 16 r and the three after
//   c  register r: row g + 8 (r / 2), column 2 t + r % 2
void multiply(const Operands* lanes) {
  int8_t a[16][32];
  int8_t b[8][32];  // transposed
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const char* a_words = static_cast<const char*>(lanes[lane].first);
    const char* b_words = static_cast<const char*>(lanes[lane].second);
    for (int r = 0; r < 4; ++r) {
      std::memcpy(&a[g + 8 * (r % 2)][4 * t + 16 * (r / 2)], a_words + 4 * r, 4);
    }
    for (int r = 0; r < 2; ++r) std::memcpy(&b[g][4 * t + 16 * r], b_words + 4 * r, 4);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    int32_t* acc = static_cast<int32_t*>(lanes[lane].target);
    for (int r = 0; r < 4; ++r) {
      const int8_t* row = a[lane / 4 + 8 * (r / 2)];
      const int8_t* column = b[2 * (lane % 4) + r % 2];
      int32_t sum = 0;
      for (int k = 0; k < 32; ++k) sum += row[k] * column[k];
      acc[r] = static_cast<int32_t>(static_cast<uint32_t>(acc[r]) + static_cast<uint32_t>(sum));
    }
  }
}

}  // namespace

void refuse(const char* instruction, const std::string& what) {
  const int thread = launch->current;
  throw KernelError(text("block (%d, %d, %d), warp %d, lane %d: %s: ", launch->block[0],
                         launch->block[1], launch->block[2], thread / kWarp, thread % kWarp,
                         instruction) +
                    what);
}

void register_memory(const void* start, size_t bytes, Access access, const std::string& name) {
  global_memory.add(start, bytes, access, name);
}
void forget_memory() { global_memory.forget(); }

void run_grid(const Grid& grid, int threads, size_t shared_bytes, const std::function<void()>& body,
              Order order) {
  if (launch != nullptr) throw KernelError("run_grid: another launch runs");
  if (threads < kWarp || threads > 1024 || threads % kWarp != 0) {
    throw KernelError(text("run_grid: %d threads; needed: a multiple of 32, up to 1024", threads));
  }
  if (grid.x < 1 || grid.y < 1 || grid.z < 1) {
    throw KernelError(text("run_grid: a grid of %d x %d x %d blocks", grid.x, grid.y, grid.z));
  }
  const Stacks stacks(threads);
  Launch current;
  current.grid = grid;
  current.body = &body;
  current.thread_count = threads;
  current.order = order;
  launch = &current;
  const auto end = [](Launch*) { launch = nullptr; };
  const std::unique_ptr<Launch, decltype(end)> guard(&current, end);
  global_memory.start_launch();
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  for (int64_t turn = 0; turn < blocks; ++turn) {
    const int64_t i = order == Order::kForward ? turn : blocks - 1 - turn;
    current.block[0] = static_cast<int>(i % grid.x);
    current.block[1] = static_cast<int>(i / grid.x % grid.y);
    current.block[2] = static_cast<int>(i / grid.x / grid.y);
    run_block(stacks, shared_bytes);
  }
}

int thread_index() {
  if (launch == nullptr) throw KernelError("an instruction outside run_grid");
  return launch->current;
}
int block_index(int axis) { return launch->block[axis]; }
int grid_size(int axis) {
  const Grid& grid = launch->grid;
  return axis == 0 ? grid.x : axis == 1 ? grid.y : grid.z;
}
char* shared_memory() { return shared.start(); }
uint32_t shared_address(const void* address) {
  return static_cast<uint32_t>(shared.offset(address, 1, "shared_address"));
}

void block_barrier() {
  Warp& warp = launch->warp();
  if (warp.arrived > 0) {
    refuse("block_barrier",
           text("diverged: %d lanes of the warp wait at %s", warp.arrived, warp.instruction));
  }
  if (launch->exited > 0) {
    refuse("block_barrier", text("diverged: %d threads of the block have exited", launch->exited));
  }
  ++warp.at_barrier;
  if (++launch->at_barrier < launch->thread_count) {
    suspend(State::kAtBarrier);
    return;
  }
  shared.check_untouched("block_barrier");
  clocks.block_barrier();
  launch->at_barrier = 0;
  ++launch->epoch;
  for (Warp& each : launch->warps) each.at_barrier = 0;
  for (Thread& thread : launch->threads) thread.state = State::kReady;
}

void copy_async_16(void* target, const void* source, bool is_valid) {
  const char* const name = "copy_async_16";
  check_aligned(target, 16, name);
  check_aligned(source, 16, name);
  if (!shared.holds(target))
    refuse(name, text("out of bounds: %p is not in shared memory", target));
  Copy copy{static_cast<char*>(target), {}};
  if (is_valid) {
    global_memory.check_read(source, 16, false, launch->point(), name);
    std::memcpy(copy.bytes, source, 16);
  }
  shared.start_copy(target, 16, launch->current, name);
  launch->thread().open.push_back(copy);
}

void copy_async_commit() {
  Thread& thread = launch->thread();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

void copy_async_wait(int pending) {
  std::deque<CopyGroup>& groups = launch->thread().groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) {
      shared.finish_copy(copy.target, copy.bytes, 16, launch->current);
    }
    groups.pop_front();
  }
}

void load_matrix_x4(uint32_t* fragment, const void* row) {
  check_aligned(row, 16, kLoadMatrix);
  if (!shared.holds(row)) refuse(kLoadMatrix, "out of bounds: " + shared.place(row));
  if (!meet(kLoadMatrix, {fragment, row, nullptr, 0}, kWarp)) return;
  load_matrices(launch->warp().operands);
  set_free(kWarp);
}

void multiply_s8_16x8x32(int32_t* acc, const uint32_t* a, const uint32_t* b) {
  if (!meet(kMultiply, {acc, a, b, 0}, kWarp)) return;
  multiply(launch->warp().operands);
  set_free(kWarp);
}

void read(void* value, const void* address, int bytes, Memory memory, const char* instruction) {
  check_aligned(address, bytes, instruction);
  if (memory == Memory::kAny && is_shared(address, bytes, instruction)) {
    shared.check_read(address, bytes, launch->current, instruction);
  } else {
    global_memory.check_read(address, bytes, memory == Memory::kConstant, launch->point(),
                             instruction);
  }
  std::memcpy(value, address, bytes);
}

void write(void* address, const void* value, int bytes, Memory memory, const char* instruction) {
  check_aligned(address, bytes, instruction);
  if (memory == Memory::kAny && is_shared(address, bytes, instruction)) {
    shared.write(address, value, bytes, launch->current, instruction);
  } else {
    global_memory.check_write(address, bytes, launch->point(), instruction);
    std::memcpy(address, value, bytes);
  }
}

int count_arrival(int* counter) {
  const char* const name = "count_arrival";
  check_aligned(counter, sizeof(int), name);
  global_memory.arrive(counter, launch->point(), name);
  return (*counter)++;
}

}  // namespace emulator
}  // namespace ptq4adm
