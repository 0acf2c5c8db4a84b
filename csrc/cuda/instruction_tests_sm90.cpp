// Runs the instructions of sm_90a on the emulator, for tests/cuda: each by itself over arrays, and
// programs that Python writes down step by step.
#include "instruction_tests.h"
#include "instructions_sm90.h"

namespace ptq4adm {
namespace {

constexpr int kGroup = 128;

// --- products ------------------------------------------------------------------------------------

// acc [128, N / 2] and a [128, 4]: registers by thread; b: bytes of shared memory; the tile begins
// at `start`. Returns acc after the product.
template <int kN>
Array<int32_t> run_product_of(Array<int32_t> acc, Array<uint32_t> a, Array<uint8_t> b, int start) {
  constexpr int kSums = kN / 2;
  checked(acc, size_t{kGroup} * kSums, "acc");
  checked(a, size_t{kGroup} * 4, "a");
  Array<int32_t> result({kGroup, kSums});
  int32_t* out = result.mutable_data();
  emulator::run_grid({1, 1, 1}, kGroup, b.size(), [&] {
    const int thread = thread_index();
    for (py::ssize_t i = thread; i < b.size(); i += kGroup) {
      store(shared_memory() + i, static_cast<char>(b.data()[i]));
    }
    async_proxy_fence();
    block_barrier();
    int32_t sums[kSums];
    uint32_t fragment[4];
    for (int r = 0; r < kSums; ++r) sums[r] = acc.data()[kSums * thread + r];
    for (int r = 0; r < 4; ++r) fragment[r] = a.data()[4 * thread + r];
    wgmma_fence();
    wgmma_s8_64xNx32<kN>(sums, fragment, matrix_descriptor(shared_memory() + start));
    wgmma_commit();
    wgmma_wait<0>();
    for (int r = 0; r < kSums; ++r) out[kSums * thread + r] = sums[r];
  });
  return result;
}

Array<int32_t> run_product(int columns, Array<int32_t> acc, Array<uint32_t> a, Array<uint8_t> b,
                           int start) {
  using Run = Array<int32_t> (*)(Array<int32_t>, Array<uint32_t>, Array<uint8_t>, int);
  const std::map<int, Run> runs = {{32, run_product_of<32>},   {64, run_product_of<64>},
                                   {96, run_product_of<96>},   {128, run_product_of<128>},
                                   {192, run_product_of<192>}, {256, run_product_of<256>}};
  return runs.at(columns)(acc, a, b, start);
}

uint64_t descriptor_of(int place) {
  uint64_t descriptor = 0;
  emulator::run_grid({1, 1, 1}, 32, 1 << 17,
                     [&] { descriptor = matrix_descriptor(shared_memory() + place); });
  return descriptor;
}

// --- boxes ---------------------------------------------------------------------------------------

TensorMapDescription description_of(uintptr_t base, const std::vector<int64_t>& sizes,
                                    const std::vector<int64_t>& strides,
                                    const std::vector<int>& box) {
  TensorMapDescription description;
  description.base = base;
  description.rank = static_cast<int>(sizes.size());
  for (size_t i = 0; i < std::min(sizes.size(), size_t{TensorMapDescription::kMaxRank}); ++i) {
    description.sizes[i] = sizes[i];
    description.strides[i] = i == 0 ? 1 : strides.at(i - 1);
    description.box[i] = box.at(i);
  }
  return description;
}

// Why no map can be made; empty if one can.
std::string refuse_tensor_map(uintptr_t base, const std::vector<int64_t>& sizes,
                              const std::vector<int64_t>& strides, const std::vector<int>& box) {
  TensorMap map;
  const char* reason = make_tensor_map(&map, description_of(base, sizes, strides, box));
  return reason == nullptr ? "" : reason;
}

// The bytes of a box that starts at `start`, as they lie in shared memory from `place` on.
Array<uint8_t> run_box(Array<uint8_t> tensor, const std::vector<int64_t>& sizes,
                       const std::vector<int64_t>& strides, const std::vector<int>& box,
                       const std::vector<int>& start, int place, bool is_backward) {
  const uintptr_t base = reinterpret_cast<uintptr_t>(tensor.data());
  const TensorMapDescription description = description_of(base, sizes, strides, box);
  TensorMap map;
  const char* reason = make_tensor_map(&map, description);
  if (reason != nullptr) throw std::invalid_argument(reason);
  const int bytes = static_cast<int>(description.box_bytes());
  Array<uint8_t> result(bytes);
  uint8_t* out = result.mutable_data();
  emulator::forget_memory();
  emulator::register_memory(tensor.data(), tensor.size(), Access::kRead, "tensor");
  const auto body = [&] {
    char* target = shared_memory() + place;
    Barrier* barrier = reinterpret_cast<Barrier*>(shared_memory() + place + bytes);
    if (thread_index() == 0) {
      prefetch_tensor_map(&map);
      barrier_init(barrier, 1);
      barrier_init_fence();
      barrier_arrive_expect(barrier, bytes);
      if (start.size() == 2) {
        copy_box_2d(target, &map, start[0], start[1], barrier);
      } else {
        copy_box_4d(target, &map, start[0], start[1], start[2], start[3], barrier);
      }
    }
    block_barrier();
    barrier_wait(barrier, 0);
    for (int i = thread_index(); i < bytes; i += 32) {
      out[i] = static_cast<uint8_t>(load(target + i));
    }
  };
  emulator::run_grid({1, 1, 1}, 32, static_cast<size_t>(place) + bytes + sizeof(Barrier), body,
                     order_of(is_backward));
  return result;
}

// --- programs ------------------------------------------------------------------------------------

constexpr int kColumns = 128, kRows = 16, kBoxRows = 8;
constexpr int kSums = 16;  // of a thread, N = 32

struct alignas(64) Global {
  char gap[64];
  char tensor[kRows * kColumns];  // read only
  char gap_after_tensor[64];
  int words[64];  // read and write
  char gap_after_words[64];
};
Global global;

struct Step {
  std::string instruction;
  int offset;                   // shared byte, or a byte of the words of global memory
  int stride;                   // bytes a thread
  int barrier;                  // shared byte
  int number;                   // parity, bytes, arrivals, coordinate, ...
  int second;                   // what else there is
  std::pair<int, int> threads;  // first and last that take the step
};

struct Values {
  int64_t loaded = -1;
  int32_t acc[2][kSums] = {};
  int32_t wide[32] = {};
  uint32_t a[2][4] = {};
};

struct Operands {
  char* address;
  Barrier* barrier;
  int number;
  int second;
  const TensorMap* map;

  int* word() const { return reinterpret_cast<int*>(address); }
  int* global_word() const { return global.words + (address - shared_memory()) / 4; }
};

using Action = void (*)(const Operands&, Values&);
const std::map<std::string, Action> kActions = {
    {"load", [](const Operands& o, Values& v) { v.loaded = load(o.word()); }},
    {"store", [](const Operands& o, Values&) { store(o.word(), thread_index()); }},
    {"load_global", [](const Operands& o, Values& v) { v.loaded = load(o.global_word()); }},
    {"store_global", [](const Operands& o, Values&) { store(o.global_word(), thread_index()); }},
    {"store_tensor",
     [](const Operands& o, Values&) { store(global.tensor + o.number, static_cast<char>(1)); }},
    {"count_arrival",
     [](const Operands& o, Values& v) { v.loaded = count_arrival(o.global_word()); }},
    {"store_16", [](const Operands& o, Values&) { store_16(o.address, {{1, 2, 3, 4}}); }},
    {"load_matrix_x4",
     [](const Operands& o, Values&) {
       uint32_t fragment[4];
       load_matrix_x4(fragment, o.address);
     }},
    {"plain_store",
     [](const Operands& o, Values&) { *static_cast<volatile char*>(o.address) = 1; }},
    {"block_barrier", [](const Operands&, Values&) { block_barrier(); }},
    {"barrier_init", [](const Operands& o, Values&) { barrier_init(o.barrier, o.number); }},
    {"barrier_init_fence", [](const Operands&, Values&) { barrier_init_fence(); }},
    {"barrier_arrive", [](const Operands& o, Values&) { barrier_arrive(o.barrier); }},
    {"barrier_arrive_expect",
     [](const Operands& o, Values&) { barrier_arrive_expect(o.barrier, o.number); }},
    {"barrier_wait", [](const Operands& o, Values&) { barrier_wait(o.barrier, o.number); }},
    {"warpgroup_barrier",
     [](const Operands& o, Values&) { warpgroup_barrier(o.number, o.second); }},
    {"async_proxy_fence", [](const Operands&, Values&) { async_proxy_fence(); }},
    {"prefetch_tensor_map", [](const Operands& o, Values&) { prefetch_tensor_map(o.map); }},
    {"prefetch_nothing",
     [](const Operands&, Values&) {
       static const TensorMap nothing = {};
       prefetch_tensor_map(&nothing);
     }},
    {"copy_box_2d", [](const Operands& o,
                       Values&) { copy_box_2d(o.address, o.map, o.number, o.second, o.barrier); }},
    {"copy_box_4d",
     [](const Operands& o, Values&) { copy_box_4d(o.address, o.map, 0, 0, 0, 0, o.barrier); }},
    {"wgmma",
     [](const Operands& o, Values& v) {
       wgmma_s8_64xNx32<32>(v.acc[o.number], v.a[o.second], matrix_descriptor(o.address));
     }},
    {"wgmma_wide",
     [](const Operands& o, Values& v) {
       wgmma_s8_64xNx32<64>(v.wide, v.a[o.second], matrix_descriptor(o.address));
     }},
    {"wgmma_part",  // acc that another product has as a part of its own
     [](const Operands& o, Values& v) {
       wgmma_s8_64xNx32<32>(reinterpret_cast<int32_t (&)[kSums]>(v.wide[8]), v.a[o.second],
                            matrix_descriptor(o.address));
     }},
    {"wgmma_bits",  // a descriptor with other bits set, or the swizzle's changed
     [](const Operands& o, Values& v) {
       wgmma_s8_64xNx32<32>(v.acc[0], v.a[0],
                            matrix_descriptor(o.address) ^ uint64_t{1} << o.number);
     }},
    {"wgmma_fence", [](const Operands&, Values&) { wgmma_fence(); }},
    {"wgmma_commit", [](const Operands&, Values&) { wgmma_commit(); }},
    {"wgmma_wait<0>", [](const Operands&, Values&) { wgmma_wait<0>(); }},
    {"wgmma_wait<1>", [](const Operands&, Values&) { wgmma_wait<1>(); }},
    {"write_a", [](const Operands& o, Values& v) { v.a[o.number][o.second] ^= 0x01010101u; }},
    {"write_acc", [](const Operands& o, Values& v) { v.acc[o.number][o.second] += 1; }},
    {"read_acc", [](const Operands& o, Values& v) { v.loaded = v.acc[o.number][o.second]; }},
    {"registers_decrease<40>", [](const Operands&, Values&) { registers_decrease<40>(); }},
    {"registers_decrease<96>", [](const Operands&, Values&) { registers_decrease<96>(); }},
    {"registers_increase<80>", [](const Operands&, Values&) { registers_increase<80>(); }},
    {"registers_increase<232>", [](const Operands&, Values&) { registers_increase<232>(); }},
    {"registers_increase<256>", [](const Operands&, Values&) { registers_increase<256>(); }},
};

// Runs the steps in every thread of a block; returns what each loaded last. The tensor holds the
// bytes 0, 1, 2, ...; a box of it is 64 columns by 8 rows.
std::vector<int64_t> run_program(const std::vector<Step>& steps, int blocks, int threads,
                                 int shared_bytes, bool is_tensor_written, bool is_backward) {
  for (int i = 0; i < kRows * kColumns; ++i) global.tensor[i] = static_cast<char>(i);
  std::fill_n(global.words, 64, 0);
  TensorMap map;
  const char* reason = make_tensor_map_2d(&map, global.tensor, {kColumns, kRows}, {kColumns},
                                          {TensorMapDescription::kSwizzleBytes, kBoxRows});
  if (reason != nullptr) throw std::invalid_argument(reason);
  emulator::forget_memory();
  emulator::register_memory(global.tensor, sizeof global.tensor,
                            is_tensor_written ? Access::kReadWrite : Access::kRead, "tensor");
  emulator::register_memory(global.words, sizeof global.words, Access::kReadWrite, "words");
  std::vector<int64_t> loaded(static_cast<size_t>(blocks) * threads, -1);
  const auto body = [&] {
    const int thread = thread_index();
    Values values;
    for (const Step& step : steps) {
      if (thread < step.threads.first || thread > step.threads.second) continue;
      if (step.instruction == "exit") return;
      const Operands operands = {shared_memory() + step.offset + step.stride * thread,
                                 reinterpret_cast<Barrier*>(shared_memory() + step.barrier),
                                 step.number, step.second, &map};
      kActions.at(step.instruction)(operands, values);
      loaded[static_cast<size_t>(block_index(0)) * threads + thread] = values.loaded;
    }
  };
  emulator::run_grid({blocks, 1, 1}, threads, shared_bytes, body, order_of(is_backward));
  return loaded;
}

}  // namespace
}  // namespace ptq4adm

PYBIND11_MODULE(instruction_tests_sm90, module) {
  using namespace ptq4adm;
  module.def("wgmma", run_product);
  module.def("matrix_descriptor", descriptor_of);
  module.def("copy_box", run_box);
  module.def("refuse_tensor_map", refuse_tensor_map);
  py::class_<Step>(module, "Step")
      .def(py::init([](std::string instruction, int offset, int stride, int barrier, int number,
                       int second, std::pair<int, int> threads) {
        return Step{instruction, offset, stride, barrier, number, second, threads};
      }));
  module.def("run_program", run_program);
}
