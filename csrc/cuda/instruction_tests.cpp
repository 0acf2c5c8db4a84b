// Runs the instructions on the emulator, for tests/cuda: each by itself over arrays, and small
// programs that Python writes down step by step.
#include "instruction_tests.h"

#include "instructions.h"

namespace ptq4adm {
namespace {

constexpr int kWarp = 32;

// --- instructions of a warp ----------------------------------------------------------------------

// Registers [32, 4] of a warp: memory holds bytes of shared memory, rows [32] the lanes' offsets.
Array<uint32_t> run_load_matrix_x4(Array<uint8_t> memory, Array<int32_t> rows) {
  checked(rows, kWarp, "rows");
  Array<uint32_t> registers({kWarp, 4});
  uint32_t* out = registers.mutable_data();
  emulator::run_grid({1, 1, 1}, kWarp, memory.size(), [&] {
    const int lane = lane_index();
    for (py::ssize_t i = lane; i < memory.size(); i += kWarp) {
      store(shared_memory() + i, static_cast<char>(memory.data()[i]));
    }
    block_barrier();
    uint32_t fragment[4];
    load_matrix_x4(fragment, shared_memory() + rows.data()[lane]);
    for (int r = 0; r < 4; ++r) out[4 * lane + r] = fragment[r];
  });
  return registers;
}

// acc [32, 4], a [32, 4], b [32, 2]: registers by lane. Returns acc after the product.
Array<int32_t> run_multiply(Array<int32_t> acc, Array<uint32_t> a, Array<uint32_t> b) {
  checked(acc, 4 * kWarp, "acc");
  checked(a, 4 * kWarp, "a");
  checked(b, 2 * kWarp, "b");
  Array<int32_t> result({kWarp, 4});
  int32_t* out = result.mutable_data();
  emulator::run_grid({1, 1, 1}, kWarp, 0, [&] {
    const int lane = lane_index();
    int32_t c[4];
    uint32_t x[4], y[2];
    for (int r = 0; r < 4; ++r) c[r] = acc.data()[4 * lane + r];
    for (int r = 0; r < 4; ++r) x[r] = a.data()[4 * lane + r];
    for (int r = 0; r < 2; ++r) y[r] = b.data()[2 * lane + r];
    multiply_s8_16x8x32(c, x, y);
    for (int r = 0; r < 4; ++r) out[4 * lane + r] = c[r];
  });
  return result;
}

// Rows of what every thread sees, in the order in which they ran: thread, lane, warp, block x y z,
// grid x y z.
std::vector<std::vector<int>> run_identity(int x, int y, int z, int threads, bool is_backward) {
  std::vector<std::vector<int>> seen;
  const auto body = [&] {
    std::vector<int> row = {thread_index(), lane_index(), warp_index()};
    for (int axis = 0; axis < 3; ++axis) row.push_back(block_index(axis));
    for (int axis = 0; axis < 3; ++axis) row.push_back(grid_size(axis));
    seen.push_back(row);
  };
  emulator::run_grid({x, y, z}, threads, 0, body, order_of(is_backward));
  return seen;
}

// --- numbers -------------------------------------------------------------------------------------

template <class Out, class In, Out (*kFunction)(In)>
Array<Out> map_one(Array<In> x) {
  Array<Out> y(x.size());
  for (py::ssize_t i = 0; i < x.size(); ++i) y.mutable_data()[i] = kFunction(x.data()[i]);
  return y;
}
template <float (*kFunction)(float, float)>
Array<float> map_two(Array<float> x, Array<float> y) {
  checked(y, x.size(), "y");
  Array<float> z(x.size());
  for (py::ssize_t i = 0; i < x.size(); ++i) {
    z.mutable_data()[i] = kFunction(x.data()[i], y.data()[i]);
  }
  return z;
}
// x * y + z with both roundings: what a fused multiply-add would get wrong.
Array<float> multiply_then_add(Array<float> x, Array<float> y, Array<float> z) {
  Array<float> sum(checked(z, x.size(), "z").size());
  for (py::ssize_t i = 0; i < checked(y, x.size(), "y").size(); ++i) {
    sum.mutable_data()[i] = add_rn(multiply_rn(x.data()[i], y.data()[i]), z.data()[i]);
  }
  return sum;
}

// --- programs ------------------------------------------------------------------------------------

constexpr int kBytes = 256;

// Global memory, with room between, so that a step past an end finds nobody.
struct alignas(64) Global {
  char gap[64];
  char buffer[kBytes];  // read and write
  char gap_after_buffer[64];
  char weights[kBytes];  // read only
  char gap_after_weights[64];
  char workspace[kBytes];  // uninitialized
  char gap_after_workspace[64];
  char nowhere[kBytes];  // not registered
};
Global global;

struct Step {
  std::string instruction;
  std::string space;  // of the address: shared, buffer, weights, workspace, nowhere
  int offset;         // bytes
  int stride;         // bytes a thread
  std::string source_space;
  int source_offset;
  std::pair<int, int> threads;  // first and last that take the step
  std::pair<int, int> blocks;
  int when;  // only by threads whose last loaded word it is; -1: by all
};

char* address_of(const std::string& space, int64_t offset) {
  const std::map<std::string, char*> starts = {{"shared", shared_memory()},
                                               {"buffer", global.buffer},
                                               {"weights", global.weights},
                                               {"workspace", global.workspace},
                                               {"nowhere", global.nowhere}};
  return starts.at(space) + offset;
}

// What a thread of a program keeps.
struct Values {
  int64_t loaded = -1;  // the last word
  int32_t acc[4] = {};
  uint32_t a[4] = {};
  uint32_t b[2] = {};
};

struct Operands {
  char* address;
  const char* source;
  uint32_t id;  // 1000 block + thread: what the thread stores

  int* word() const { return reinterpret_cast<int*>(address); }
  Bytes16 ids() const { return {{id, id, id, id}}; }
};

using Action = void (*)(const Operands&, Values&);
const std::map<std::string, Action> kActions = {
    {"load", [](const Operands& o, Values& v) { v.loaded = load(o.word()); }},
    {"store", [](const Operands& o, Values&) { store(o.word(), static_cast<int>(o.id)); }},
    {"store_loaded",
     [](const Operands& o, Values& v) { store(o.word(), static_cast<int>(v.loaded)); }},
    {"load_16", [](const Operands& o, Values& v) { v.loaded = load_16(o.address).word[0]; }},
    {"store_16", [](const Operands& o, Values&) { store_16(o.address, o.ids()); }},
    {"load_stream_16",
     [](const Operands& o, Values& v) { v.loaded = load_stream_16(o.address).word[0]; }},
    {"load_l2_16", [](const Operands& o, Values& v) { v.loaded = load_l2_16(o.address).word[0]; }},
    {"store_l2_16", [](const Operands& o, Values&) { store_l2_16(o.address, o.ids()); }},
    {"copy_async_16", [](const Operands& o, Values&) { copy_async_16(o.address, o.source, true); }},
    {"copy_async_16_invalid",
     [](const Operands& o, Values&) { copy_async_16(o.address, o.source, false); }},
    {"copy_async_commit", [](const Operands&, Values&) { copy_async_commit(); }},
    {"copy_async_wait<0>", [](const Operands&, Values&) { copy_async_wait<0>(); }},
    {"copy_async_wait<1>", [](const Operands&, Values&) { copy_async_wait<1>(); }},
    {"block_barrier", [](const Operands&, Values&) { block_barrier(); }},
    {"load_matrix_x4", [](const Operands& o, Values& v) { load_matrix_x4(v.a, o.address); }},
    {"multiply_s8_16x8x32",
     [](const Operands&, Values& v) { multiply_s8_16x8x32(v.acc, v.a, v.b); }},
    {"count_arrival", [](const Operands& o, Values& v) { v.loaded = count_arrival(o.word()); }},
    // past the instructions
    {"plain_store",
     [](const Operands& o, Values&) {
       *static_cast<volatile uint32_t*>(static_cast<void*>(o.address)) = o.id;
     }},
};

void take(const Step& step, Values& values) {
  const Operands operands = {
      address_of(step.space, step.offset + int64_t{step.stride} * thread_index()),
      address_of(step.source_space, step.source_offset),
      static_cast<uint32_t>(1000 * block_index(0) + thread_index())};
  kActions.at(step.instruction)(operands, values);
}

// Runs the steps in every thread. Returns what every thread loaded last, [blocks * threads], -1
// where it loaded nothing.
std::vector<int64_t> run_program(const std::vector<Step>& steps, int blocks, int threads,
                                 int shared_bytes, bool is_backward) {
  std::fill_n(global.buffer, kBytes, 0);
  for (int i = 0; i < kBytes; ++i) global.weights[i] = static_cast<char>(i);
  emulator::forget_memory();
  emulator::register_memory(global.buffer, kBytes, Access::kReadWrite, "buffer");
  emulator::register_memory(global.weights, kBytes, Access::kRead, "weights");
  emulator::register_memory(global.workspace, kBytes, Access::kUninitialized, "workspace");
  std::vector<int64_t> loaded(static_cast<size_t>(blocks) * threads, -1);
  const auto body = [&] {
    const int thread = thread_index(), block = block_index(0);
    Values values;
    for (const Step& step : steps) {
      const bool is_taken = thread >= step.threads.first && thread <= step.threads.second &&
                            block >= step.blocks.first && block <= step.blocks.second &&
                            (step.when < 0 || step.when == values.loaded);
      if (is_taken && step.instruction == "exit") return;
      if (is_taken) take(step, values);
      loaded[static_cast<size_t>(block) * threads + thread] = values.loaded;
    }
  };
  emulator::run_grid({blocks, 1, 1}, threads, shared_bytes, body, order_of(is_backward));
  return loaded;
}

}  // namespace
}  // namespace ptq4adm

PYBIND11_MODULE(instruction_tests, module) {
  using namespace ptq4adm;
  module.def("load_matrix_x4", run_load_matrix_x4);
  module.def("multiply_s8_16x8x32", run_multiply);
  module.def("thread_index", thread_index);
  module.def("identity", run_identity);
  module.def("round_half_even", map_one<int, float, round_half_even>);
  module.def("erf_f32", map_one<float, float, erf_f32>);
  module.def("half_from_float", map_one<uint16_t, float, half_from_float>);
  module.def("float_from_half", map_one<float, uint16_t, float_from_half>);
  module.def("bfloat16_from_float", map_one<uint16_t, float, bfloat16_from_float>);
  module.def("float_from_bfloat16", map_one<float, uint16_t, float_from_bfloat16>);
  module.def("add_rn", map_two<add_rn>);
  module.def("multiply_rn", map_two<multiply_rn>);
  module.def("divide_rn", map_two<divide_rn>);
  module.def("multiply_then_add", multiply_then_add);
  module.def("nan_f32", nan_f32);
  py::class_<Step>(module, "Step")
      .def(py::init([](std::string instruction, std::string space, int offset, int stride,
                       std::string source_space, int source_offset, std::pair<int, int> threads,
                       std::pair<int, int> blocks, int when) {
        return Step{instruction,   space,   offset, stride, source_space,
                    source_offset, threads, blocks, when};
      }));
  module.def("run_program", run_program);
}
