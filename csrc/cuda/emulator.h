// Runs a kernel body on the host, block after block, and refuses what a GPU would leave undefined.
//
// Each thread of a block is a fiber. Lanes of a warp meet at the instructions that a warp executes
// together; the last to arrive does the work of all. See docs/emulation.md for what is checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace ptq4adm {

struct TensorMap;

namespace emulator {

// What a kernel did that it must not; the text names block, warp, lane and instruction.
class KernelError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Grid {
  int x = 1;
  int y = 1;
  int z = 1;
};

enum class Access {
  kRead,
  kReadWrite,
  kUninitialized,  // read and write; a launch may read only what it has written itself
};

// In which order blocks, and the threads of each, get to run. Results must not depend on it.
enum class Order { kForward, kBackward };

// The launch that follows may touch these bytes of global memory and no others.
void register_memory(const void* start, size_t bytes, Access access = Access::kReadWrite,
                     const std::string& name = "memory");
void forget_memory();

// Runs `body` once for every thread of every block. `threads` of a block: a multiple of 32.
// Throws KernelError at the first offence; what the body kept on its stacks is then dropped without
// destructors, so that a body may hold plain data only. One launch at a time in a process.
void run_grid(const Grid& grid, int threads, size_t shared_bytes, const std::function<void()>& body,
              Order order = Order::kForward);

// --- what instructions_emulated.h is made of -----------------------------------------------------

int thread_index();
int block_index(int axis);
int grid_size(int axis);
char* shared_memory();

void block_barrier();
void copy_async_16(void* shared, const void* global, bool is_valid);
void copy_async_commit();
void copy_async_wait(int pending);
void load_matrix_x4(uint32_t* fragment, const void* shared_row);
void multiply_s8_16x8x32(int32_t* acc, const uint32_t* a, const uint32_t* b);

enum class Memory {
  kAny,       // shared or global
  kGlobal,    // global only
  kConstant,  // global, and written by no thread of this launch
};
void read(void* value, const void* address, int bytes, Memory memory, const char* instruction);
void write(void* address, const void* value, int bytes, Memory memory, const char* instruction);
int count_arrival(int* counter);

// --- what instructions_sm90_emulated.h is made of ------------------------------------------------

uint32_t shared_address(const void* shared);

void barrier_init(uint64_t* barrier, int arrivals);
void barrier_init_fence();
void barrier_arrive(uint64_t* barrier);
void barrier_arrive_expect(uint64_t* barrier, int bytes);
void barrier_wait(uint64_t* barrier, int parity);
void named_barrier(int id, int threads);

void async_proxy_fence();
void prefetch_tensor_map(const TensorMap* map);
void copy_box(void* shared, const TensorMap* map, int rank, const int* start, uint64_t* barrier);

void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
void wgmma(int32_t* acc, const uint32_t* a, uint64_t descriptor, int columns);
void set_registers(int count, bool is_increase);

}  // namespace emulator
}  // namespace ptq4adm
