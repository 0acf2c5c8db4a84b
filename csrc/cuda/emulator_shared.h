// The shared memory of one block: who wrote and who read every byte, and which are on their way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "emulator_clocks.h"
#include "emulator_errors.h"
#include "emulator_readers.h"

namespace ptq4adm {
namespace emulator {

class SharedMemory {
 public:
  explicit SharedMemory(const Clocks& clocks) : clocks_(clocks), readers_(clocks) {}

  // For a new block: every byte is poisoned.
  void reset(size_t bytes, int threads) {
    storage_.assign(bytes + kAlignment, kPoison);
    const size_t misfit = reinterpret_cast<uintptr_t>(storage_.data()) % kAlignment;
    start_ = storage_.data() + (misfit ? kAlignment - misfit : 0);
    expected_.assign(bytes, kPoison);
    states_.assign(bytes, State());
    readers_.reset(threads);
  }
  char* start() const { return start_; }
  size_t size() const { return states_.size(); }

  bool holds(const void* address) const {
    const char* byte = static_cast<const char*>(address);
    return byte >= start_ && byte < start_ + size();
  }
  // The byte's number; the bytes must lie in shared memory.
  size_t offset(const void* address, int bytes, const char* instruction) const {
    if (!holds(address)) refuse(instruction, "out of bounds: " + place(address));
    const size_t first = static_cast<const char*>(address) - start_;
    if (first + bytes > size()) {
      refuse(instruction, text("out of bounds: shared bytes %zu to %zu of %zu", first,
                               first + bytes - 1, size()));
    }
    return first;
  }

  // For a text: where an address lies that is not held.
  std::string place(const void* address) const {
    const ptrdiff_t i = static_cast<const char*>(address) - start_;
    if (!is_near(address)) return text("%p is not in shared memory", address);
    return text("byte %td of shared memory, which has %zu", i, size());
  }
  bool is_near(const void* address) const {
    const ptrdiff_t i = static_cast<const char*>(address) - start_;
    return i > -kNear && i < static_cast<ptrdiff_t>(size()) + kNear;
  }

  // --- by a thread, or by a warp whose lanes get each other's bytes
  // --------------------------------

  void check_read(const void* address, int bytes, int thread, const char* instruction) {
    const int event = readers_.of_thread(thread);
    for_each(offset(address, bytes, instruction), bytes, [&](State& state, size_t i) {
      check_readable(state, i, instruction);
      if (!clocks_.is_known(state.writer, state.time, thread)) refuse_read(state, i, instruction);
      state.readers = readers_.add(state.readers, event, thread);
    });
  }
  void check_read_by_warp(const void* address, int bytes, int thread, const char* instruction) {
    const int event = readers_.of_warp(thread / 32);
    for_each(offset(address, bytes, instruction), bytes, [&](State& state, size_t i) {
      check_readable(state, i, instruction);
      if (!clocks_.is_known_to_all(state.writer, state.time, thread / 32 * 32, 32)) {
        refuse_read(state, i, instruction);
      }
      state.readers = readers_.add(state.readers, event, thread);
    });
  }
  void write(void* address, const void* value, int bytes, int thread, const char* instruction) {
    const size_t first = offset(address, bytes, instruction);
    check_write(first, bytes, thread, false, instruction);
    put(first, value, bytes);
    set_writer(first, bytes, thread, clocks_.time(thread), Kind::kPlain);
  }

  // Between these two the bytes are poisoned, and nobody's.
  void start_copy(void* address, int bytes, int thread, const char* instruction) {
    const size_t first = offset(address, bytes, instruction);
    check_write(first, bytes, thread, false, instruction);
    poison(first, bytes);
    set_writer(first, bytes, thread, clocks_.time(thread), Kind::kCopy);
  }
  void finish_copy(void* address, const void* value, int bytes, int thread) {
    const size_t first = static_cast<char*>(address) - start_;
    put(first, value, bytes);
    set_writer(first, bytes, thread, clocks_.time(thread), Kind::kPlain);
  }

  // --- by the async proxy
  // --------------------------------------------------------------------------

  // A box that `thread` issues: from here on the bytes belong to the copies of a barrier's phase.
  void start_box(size_t first, int bytes, int thread, int barrier_agent, int phase,
                 const char* instruction) {
    check_write(first, bytes, thread, true, instruction);
    poison(first, bytes);
    set_writer(first, bytes, barrier_agent, phase, Kind::kPlain);
  }
  void land_box(size_t first, const void* value, int bytes) { put(first, value, bytes); }

  // Bytes that products of a warpgroup read from here until they are waited for.
  void start_product(size_t first, int bytes, int group_thread, const char* instruction) {
    for_each(first, bytes, [&](State& state, size_t i) {
      check_readable(state, i, instruction);
      if (!clocks_.is_known_to_all(state.writer, state.time, group_thread, 128)) {
        refuse_read(state, i, instruction);
      }
      for (int lane = 0; lane < 128; ++lane) {
        if (clocks_.is_fenced(state.writer, state.time, group_thread + lane)) continue;
        refuse(instruction, text("reads shared byte %zu, which thread %d wrote without an "
                                 "async_proxy_fence after it",
                                 i, state.writer));
      }
      ++state.products;
    });
  }
  void finish_product(size_t first, int bytes, int event, int thread) {
    for_each(first, bytes, [&](State& state, size_t) {
      --state.products;
      state.readers = readers_.add(state.readers, event, thread);
    });
  }
  ReaderSets& readers() { return readers_; }

  // --- barriers
  // ------------------------------------------------------------------------------------

  // The bytes become a barrier's; its words are kept elsewhere.
  void make_barrier(size_t first, int bytes, int thread, const char* instruction) {
    check_write(first, bytes, thread, false, instruction);
    poison(first, bytes);
    set_writer(first, bytes, thread, clocks_.time(thread), Kind::kBarrier);
  }

  // Stores through plain pointers would escape every check: they show when the bytes are compared.
  void check_untouched(const char* instruction) const {
    if (size() == 0 || std::memcmp(start_, expected_.data(), size()) == 0) return;
    size_t i = 0;
    while (start_[i] == expected_[i]) ++i;
    refuse(instruction, text("shared byte %zu was changed, and by none of the instructions", i));
  }

 private:
  static constexpr size_t kAlignment = 1024;
  static constexpr ptrdiff_t kNear = 1 << 16;
  static constexpr char kPoison = static_cast<char>(0xa5);

  enum class Kind : uint8_t {
    kPlain,
    kCopy,     // a cp.async on its way
    kBarrier,  // a part of one
  };
  // Without gaps, so that states can be compared as bytes.
  struct State {
    int time = 0;     // of the writer
    int readers = 0;  // a set
    int16_t writer = kNobody;
    uint8_t products = 0;  // on their way, that read it
    Kind kind = Kind::kPlain;

    bool operator==(const State& other) const {
      return std::memcmp(this, &other, sizeof other) == 0;
    }
  };
  static_assert(sizeof(State) == 12, "a gap would be compared");

  // Neighbours mostly have one state: `work` changes the first of equal ones, the others follow.
  template <class Work>
  void for_each(size_t first, int bytes, Work work) {
    State before, after;
    for (size_t i = first; i < first + bytes; ++i) {
      if (i == first || !(states_[i] == before)) {
        before = states_[i];
        work(states_[i], i);
        after = states_[i];
      } else {
        states_[i] = after;
      }
    }
  }

  void check_readable(const State& state, size_t i, const char* instruction) const {
    check_kind("reads", state, i, instruction);
    if (state.writer == kNobody) {
      refuse(instruction, text("reads shared byte %zu, which nothing has written", i));
    }
  }
  void check_kind(const char* verb, const State& state, size_t i, const char* instruction) const {
    if (state.kind == Kind::kCopy) {
      refuse(instruction, text("%s shared byte %zu, whose cp.async thread %d has not waited for",
                               verb, i, state.writer));
    }
    if (state.kind == Kind::kBarrier) {
      refuse(instruction, text("%s shared byte %zu, which is a part of a barrier", verb, i));
    }
  }

  [[noreturn]] void refuse_read(const State& state, size_t i, const char* instruction) const {
    refuse(instruction, text("race: reads shared byte %zu, ", i) + deed_of_writer(state));
  }
  std::string deed_of_writer(const State& state) const {
    if (clocks_.is_thread(state.writer)) {
      return text("which thread %d wrote since the last barrier", state.writer);
    }
    return text("which a box brings in phase %d of its barrier, and that was not waited for",
                state.time);
  }
  std::string deed_of_reader(const State& state, int agent) const {
    if (!clocks_.is_thread(agent)) return "which a wgmma read, and nothing orders the two";
    if (readers_.members(state.readers).size() > 1) {
      return "which several threads read since the last barrier";
    }
    return text("which thread %d read since the last barrier", agent);
  }

  void check_write(size_t first, int bytes, int thread, bool is_async, const char* instruction) {
    for_each(first, bytes, [&](State& state, size_t i) {
      check_kind("writes", state, i, instruction);
      if (state.products > 0) {
        refuse(instruction, text("race: writes shared byte %zu, which a wgmma reads that its "
                                 "warpgroup has not waited for",
                                 i));
      }
      const auto check = [&](const char* verb, int agent, int time) {
        if (!is_async || clocks_.is_fenced(agent, time, thread)) return;
        refuse(instruction, text("writes shared byte %zu, which thread %d %s without an "
                                 "async_proxy_fence after it",
                                 i, agent, verb));
      };
      if (state.writer != kNobody) {
        if (!clocks_.is_known(state.writer, state.time, thread)) {
          refuse(instruction, text("race: writes shared byte %zu, ", i) + deed_of_writer(state));
        }
        check("wrote", state.writer, state.time);
      }
      for (const ReaderSets::Member& reader : readers_.members(state.readers)) {
        if (!clocks_.is_known(reader.agent, reader.time, thread)) {
          refuse(instruction,
                 text("race: writes shared byte %zu, ", i) + deed_of_reader(state, reader.agent));
        }
        check("read", reader.agent, reader.time);
      }
    });
  }

  void put(size_t first, const void* value, int bytes) {
    std::memcpy(start_ + first, value, bytes);
    std::memcpy(&expected_[first], value, bytes);
  }
  void poison(size_t first, int bytes) {
    std::memset(start_ + first, kPoison, bytes);
    std::memset(&expected_[first], kPoison, bytes);
  }
  void set_writer(size_t first, int bytes, int writer, int time, Kind kind) {
    State state;
    state.time = time;
    state.writer = static_cast<int16_t>(writer);
    state.kind = kind;
    for (size_t i = first; i < first + bytes; ++i) states_[i] = state;
  }

  const Clocks& clocks_;
  ReaderSets readers_;
  std::vector<char> storage_;
  std::vector<char> expected_;  // what the instructions have put there
  std::vector<State> states_;
  char* start_ = nullptr;
};

}  // namespace emulator
}  // namespace ptq4adm
