// The asynchronous products of a warpgroup: what is on its way, and which registers nobody may
// touch until it is waited for.

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "emulator_launch.h"

namespace ptq4adm {
namespace emulator {
namespace {

constexpr char kFence[] = "wgmma_fence";
constexpr char kCommit[] = "wgmma_commit";
constexpr char kWait[] = "wgmma_wait";
constexpr char kProduct[] = "wgmma_s8_64xNx32";
constexpr char kIncrease[] = "registers_increase";
constexpr char kDecrease[] = "registers_decrease";

constexpr uint32_t kPoison = 0xa5a5a5a5;
constexpr int kWordsA = 4;
constexpr int kDepth = 32;        // bytes of k
constexpr int kRowBytes = 64;     // of B in shared memory
constexpr size_t kPattern = 512;  // bytes after which the swizzle repeats
constexpr int kFileRegisters = 65536;

// An array of the registers of all lanes, wherever the compiler keeps it, and what it held.
struct Registers {
  int words = 0;
  char* of[kGroup] = {};
  std::vector<uint32_t> values;  // [lane][word]

  void read() {
    values.resize(static_cast<size_t>(kGroup) * words);
    for (int lane = 0; lane < kGroup; ++lane) {
      std::memcpy(&values[static_cast<size_t>(lane) * words], of[lane], 4 * words);
    }
  }
  void write() const {
    for (int lane = 0; lane < kGroup; ++lane) {
      std::memcpy(of[lane], &values[static_cast<size_t>(lane) * words], 4 * words);
    }
  }
  // The first lane whose registers are no longer what they were, or -1.
  int changed() const {
    for (int lane = 0; lane < kGroup; ++lane) {
      if (std::memcmp(&values[static_cast<size_t>(lane) * words], of[lane], 4 * words)) return lane;
    }
    return -1;
  }
  bool is_at(const Registers& other) const { return std::equal(of, of + kGroup, other.of); }
  bool overlaps(const Registers& other) const {
    for (int lane = 0; lane < kGroup; ++lane) {
      if (of[lane] < other.of[lane] + 4 * other.words && other.of[lane] < of[lane] + 4 * words) {
        return true;
      }
    }
    return false;
  }
};

// Rows of B, each of 32 bytes in two chunks of 16.
struct MatrixB {
  size_t start;
  size_t stride;  // from eight rows to the next
  int rows;

  size_t chunk(int row, int half) const {
    const size_t plain = start + row / 8 * stride + row % 8 * kRowBytes + 16 * half;
    return plain ^ (plain >> 7 & 3) << 4;
  }
};

struct Product {
  int number;
  MatrixB b;
  Registers a;
};

// Accumulators with products on their way: poisoned, and here what they will hold.
struct Sums {
  Registers registers;  // values: the sums
  int last;             // number of the last product
};

struct Group {
  bool is_fenced = false;  // since the last commit
  int products = 0;
  int waits = 0;
  int registers = 0;  // of a thread, once they were set
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;  // committed, oldest first
  std::vector<Sums> sums;
  std::map<std::pair<char*, int>, Registers> seen;  // as they were at the last fence
};
std::vector<Group> groups;

Group& group() { return groups[launch->current / kGroup]; }
const Operands& operands(int lane) {
  return launch->warps[launch->current / kGroup * (kGroup / kWarp) + lane / kWarp]
      .operands[lane % kWarp];
}

// What a lane brought must be what all did.
void check_same_number(const char* instruction, const char* what) {
  for (int lane = 1; lane < kGroup; ++lane) {
    if (operands(lane).number == operands(0).number) continue;
    refuse(instruction, text("lanes of the warpgroup give different %s", what));
  }
}

MatrixB decode(uint64_t descriptor, int rows) {
  const auto field = [&](int first, int bits) {
    return static_cast<size_t>(descriptor >> first & ((uint64_t{1} << bits) - 1));
  };
  if (field(62, 2) != 2) {
    refuse(kProduct, text("descriptor: swizzle mode %zu; emulated: 2, 64 bytes", field(62, 2)));
  }
  if (field(49, 3) != 0) refuse(kProduct, "descriptor: a base offset; emulated: 0");
  if (field(14, 2) + field(30, 2) + field(46, 3) + field(52, 10) != 0) {
    refuse(kProduct, "descriptor: bits that belong to no field are set");
  }
  const MatrixB b = {field(0, 14) << 4, field(32, 14) << 4, rows};
  if (b.start % kPattern + kDepth > kRowBytes) {
    refuse(kProduct, text("descriptor: start at shared byte %zu; needed: a multiple of %zu, or 16 "
                          "or 32 more",
                          b.start, kPattern));
  }
  if (b.stride % kPattern != 0) {
    refuse(kProduct, text("descriptor: a stride of %zu bytes; needed: a multiple of %zu", b.stride,
                          kPattern));
  }
  return b;
}

// Adds A B to the sums. Of warp w and its lane l, with g = l / 4 and t = l % 4:
//   a    register r: row 16 w + g + 8 (r % 2), columns 4 t + 16 (r / 2) and the three after
//   sum  register r: row 16 w + g + 8 (r / 2 % 2), column 8 (r / 4) + 2 t + r % 2
void add_product(const Registers& a, const MatrixB& b, Registers& sums) {
  std::vector<int8_t> matrix_a(64 * kDepth), matrix_b(static_cast<size_t>(b.rows) * kDepth);
  for (int lane = 0; lane < kGroup; ++lane) {
    const int row = lane / kWarp * 16 + lane % kWarp / 4;
    for (int r = 0; r < kWordsA; ++r) {
      std::memcpy(&matrix_a[(row + 8 * (r % 2)) * kDepth + lane % 4 * 4 + 16 * (r / 2)],
                  &a.values[lane * kWordsA + r], 4);
    }
  }
  for (int row = 0; row < b.rows; ++row) {
    for (int half = 0; half < 2; ++half) {
      std::memcpy(&matrix_b[row * kDepth + 16 * half], shared.start() + b.chunk(row, half), 16);
    }
  }
  for (int lane = 0; lane < kGroup; ++lane) {
    for (int r = 0; r < sums.words; ++r) {
      const int8_t* x = &matrix_a[(lane / kWarp * 16 + lane % kWarp / 4 + r / 2 % 2 * 8) * kDepth];
      const int8_t* y = &matrix_b[(r / 4 * 8 + lane % 4 * 2 + r % 2) * kDepth];
      int32_t sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += x[k] * y[k];
      sums.values[static_cast<size_t>(lane) * sums.words + r] += static_cast<uint32_t>(sum);
    }
  }
}

// Refuses registers that were written since the fence, as far as that can be seen: those that an
// earlier product had at the same place.
void check_fenced(const Registers& registers, const char* what) {
  const auto seen = group().seen.find({registers.of[0], registers.words});
  if (seen == group().seen.end() || !seen->second.is_at(registers)) return;
  const int lane = seen->second.values.empty() ? -1 : seen->second.changed();
  if (lane < 0) return;
  refuse(kProduct,
         text("%s of thread %d of the warpgroup was written since wgmma_fence", what, lane));
}

// Refuses accumulators that were written while their products were on their way.
void check_poison(const Registers& registers, const char* instruction) {
  Registers poisoned = registers;
  poisoned.values.assign(static_cast<size_t>(kGroup) * registers.words, kPoison);
  const int lane = poisoned.changed();
  if (lane < 0) return;
  refuse(
      instruction,
      text("acc of thread %d of the warpgroup was written while its wgmma was on its way", lane));
}

void start_product(int columns) {
  Group& own = group();
  check_same_number(kProduct, "descriptors");
  for (int lane = 1; lane < kGroup; ++lane) {
    if (operands(lane).second == operands(0).second) continue;
    refuse(kProduct, "lanes of the warpgroup give different sizes");
  }
  const MatrixB b = decode(operands(0).number, columns);
  if (!own.is_fenced) {
    refuse(kProduct, "no wgmma_fence since the last wgmma_commit, or at all");
  }
  Product product = {++own.products, b, {}};
  Registers sums;
  product.a.words = kWordsA;
  sums.words = columns / 2;
  for (int lane = 0; lane < kGroup; ++lane) {
    sums.of[lane] = static_cast<char*>(operands(lane).target);
    product.a.of[lane] = static_cast<char*>(const_cast<void*>(operands(lane).first));
  }
  product.a.read();
  check_fenced(product.a, "a");
  auto pending = own.sums.begin();
  for (; pending != own.sums.end(); ++pending) {
    if (pending->registers.words == sums.words && pending->registers.is_at(sums)) break;
    if (!pending->registers.overlaps(sums)) continue;
    refuse(kProduct, "acc overlaps accumulators of another size, whose products are on their way");
  }
  const int first = launch->current / kGroup * kGroup;
  for (int row = 0; row < b.rows; ++row) {
    for (int half = 0; half < 2; ++half) {
      const size_t chunk = b.chunk(row, half);
      if (chunk + 16 > shared.size()) {
        refuse(kProduct, text("out of bounds: shared bytes %zu to %zu of %zu", chunk, chunk + 15,
                              shared.size()));
      }
      shared.start_product(chunk, 16, first, kProduct);
    }
  }
  if (pending != own.sums.end()) {
    check_poison(sums, kProduct);
  } else {
    sums.read();
    check_fenced(sums, "acc");
    own.sums.push_back({sums, 0});
    pending = own.sums.end() - 1;
  }
  add_product(product.a, b, pending->registers);
  pending->last = product.number;
  Registers poisoned = sums;
  poisoned.values.assign(static_cast<size_t>(kGroup) * sums.words, kPoison);
  poisoned.write();
  own.seen[{product.a.of[0], product.a.words}] = product.a;
  own.seen[{sums.of[0], sums.words}] = poisoned;
  own.open.push_back(std::move(product));
}

void finish_product(const Product& product, int event) {
  for (int row = 0; row < product.b.rows; ++row) {
    for (int half = 0; half < 2; ++half) {
      shared.finish_product(product.b.chunk(row, half), 16, event, launch->current);
    }
  }
  const int lane = product.a.changed();
  if (lane < 0) return;
  refuse(kWait,
         text("a of thread %d of the warpgroup has changed while its wgmma was on its way", lane));
}

void land(Sums& sums) {
  check_poison(sums.registers, kWait);
  sums.registers.write();
  // written by a wgmma, and so not since the fence
  group().seen[{sums.registers.of[0], sums.registers.words}] = sums.registers;
}

void wait_for(size_t pending) {
  Group& own = group();
  // known to every lane, warp by warp: who has it from one lane of each has it from all
  const int first_warp = launch->current / kGroup * (kGroup / kWarp);
  std::vector<ReaderSets::Member> readers;
  for (int warp = first_warp; warp < first_warp + kGroup / kWarp; ++warp) {
    readers.push_back({clocks.products_agent(warp), own.waits});
    for (int lane = 0; lane < kWarp; ++lane) {
      clocks.learn(warp * kWarp + lane, clocks.products_agent(warp), own.waits + 1);
    }
  }
  ++own.waits;
  if (own.groups.size() <= pending) return;
  const int event = shared.readers().of(readers);
  int last = 0;
  for (; own.groups.size() > pending; own.groups.pop_front()) {
    for (const Product& product : own.groups.front()) {
      finish_product(product, event);
      last = product.number;
    }
  }
  for (size_t i = own.sums.size(); i-- > 0;) {
    if (own.sums[i].last > last) continue;
    land(own.sums[i]);
    own.sums.erase(own.sums.begin() + static_cast<ptrdiff_t>(i));
  }
}

template <class Work>
void by_warpgroup(const char* instruction, const Operands& operands, Work work) {
  if (!meet(instruction, operands, kGroup)) return;
  work();
  set_free(kGroup);
}

}  // namespace

void start_products() { groups.assign((launch->thread_count + kGroup - 1) / kGroup, Group()); }

void check_products_at_exit() {
  const Group& own = group();
  size_t left = own.open.size();
  for (const std::vector<Product>& each : own.groups) left += each.size();
  if (left > 0) refuse("exit", text("has not waited for %zu of its wgmma", left));
}

void wgmma_fence() {
  by_warpgroup(kFence, {}, [] {
    group().is_fenced = true;
    for (auto& [place, registers] : group().seen) registers.read();
  });
}

void wgmma_commit() {
  by_warpgroup(kCommit, {}, [] {
    group().groups.push_back(std::move(group().open));
    group().open.clear();
    group().is_fenced = false;
  });
}

void wgmma_wait(int pending) {
  by_warpgroup(kWait, {nullptr, nullptr, nullptr, static_cast<uint64_t>(pending)}, [=] {
    check_same_number(kWait, "numbers of groups");
    wait_for(static_cast<size_t>(pending));
  });
}

void wgmma(int32_t* acc, const uint32_t* a, uint64_t descriptor, int columns) {
  const auto size = reinterpret_cast<const void*>(static_cast<intptr_t>(columns));
  by_warpgroup(kProduct, {acc, a, size, descriptor}, [=] { start_product(columns); });
}

void set_registers(int count, bool is_increase) {
  const char* const name = is_increase ? kIncrease : kDecrease;
  by_warpgroup(name, {nullptr, nullptr, nullptr, static_cast<uint64_t>(count)}, [=] {
    check_same_number(name, "numbers of registers");
    const int before = group().registers;
    if (before > 0 && (is_increase ? count < before : count > before)) {
      refuse(name, text("%d registers, of %d", count, before));
    }
    group().registers = count;
    int sum = 0;
    for (const Group& each : groups) sum += each.registers * kGroup;
    if (sum > kFileRegisters) {
      refuse(name, text("the block's warpgroups have %d registers; a multiprocessor has %d", sum,
                        kFileRegisters));
    }
  });
}

}  // namespace emulator
}  // namespace ptq4adm
