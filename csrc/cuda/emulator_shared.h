// The shared memory of one block: who wrote and who read every byte, and which are on their way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "emulator_errors.h"

namespace ptq4adm {
namespace emulator {

class SharedMemory {
 public:
  // For a new block: every byte is poisoned.
  void reset(size_t bytes) {
    storage_.assign(bytes + kAlignment, kPoison);
    const size_t misfit = reinterpret_cast<uintptr_t>(storage_.data()) % kAlignment;
    start_ = storage_.data() + (misfit ? kAlignment - misfit : 0);
    expected_.assign(bytes, kPoison);
    states_.assign(bytes, State());
  }
  char* start() const { return start_; }
  size_t size() const { return states_.size(); }

  bool holds(const void* address) const {
    const char* byte = static_cast<const char*>(address);
    return byte >= start_ && byte < start_ + size();
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

  void check_read(const void* address, int bytes, const Point& who, const char* instruction) {
    const size_t first = offset(address, bytes, instruction);
    for (size_t i = first; i < first + bytes; ++i) {
      State& state = states_[i];
      if (state.in_flight) refuse(instruction, in_flight_text("reads", i));
      if (state.writer == kNobody) {
        refuse(instruction, text("reads shared byte %zu, which nothing has written", i));
      }
      if (!is_ordered(state.writer, state.write_epoch, who)) {
        refuse(instruction,
               text("race: reads shared byte %zu, which thread %d wrote since the last barrier", i,
                    state.writer));
      }
      const bool is_alone = state.read_epoch != who.epoch || state.reader == who.thread;
      state.reader = static_cast<int16_t>(is_alone ? who.thread : kSeveral);
      state.read_epoch = who.epoch;
    }
  }

  void write(void* address, const void* value, int bytes, const Point& who,
             const char* instruction) {
    check_write(address, bytes, who, instruction);
    put(address, value, bytes, who);
  }

  // Between these two the bytes are poisoned, and nobody's.
  void start_copy(void* address, int bytes, const Point& who, const char* instruction) {
    check_write(address, bytes, who, instruction);
    for (char* byte = static_cast<char*>(address); bytes > 0; --bytes, ++byte) {
      put(byte, &kPoison, 1, who);
      state_of(byte)->in_flight = true;
    }
  }
  void finish_copy(void* address, const void* value, int bytes, const Point& who) {
    put(address, value, bytes, who);
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

  struct State {
    int write_epoch = -1;
    int read_epoch = -1;
    int16_t writer = kNobody;
    int16_t reader = kNobody;
    bool in_flight = false;
  };

  State* state_of(const void* address) {
    return &states_[static_cast<const char*>(address) - start_];
  }
  size_t offset(const void* address, int bytes, const char* instruction) const {
    const size_t first = static_cast<const char*>(address) - start_;
    if (first + bytes > size()) {
      refuse(instruction, text("out of bounds: shared bytes %zu to %zu of %zu", first,
                               first + bytes - 1, size()));
    }
    return first;
  }
  std::string in_flight_text(const char* verb, size_t i) const {
    return text("%s shared byte %zu, whose cp.async thread %d has not waited for", verb, i,
                states_[i].writer);
  }

  void check_write(const void* address, int bytes, const Point& who, const char* instruction) {
    const size_t first = offset(address, bytes, instruction);
    for (size_t i = first; i < first + bytes; ++i) {
      const State& state = states_[i];
      if (state.in_flight) refuse(instruction, in_flight_text("writes", i));
      if (state.writer != kNobody && !is_ordered(state.writer, state.write_epoch, who)) {
        refuse(instruction,
               text("race: writes shared byte %zu, which thread %d wrote since the last barrier", i,
                    state.writer));
      }
      if (state.reader != kNobody && !is_ordered(state.reader, state.read_epoch, who)) {
        const std::string reader =
            state.reader == kSeveral ? "several threads" : text("thread %d", state.reader);
        refuse(instruction, text("race: writes shared byte %zu, which %s read since the last "
                                 "barrier",
                                 i, reader.c_str()));
      }
    }
  }

  void put(void* address, const void* value, int bytes, const Point& who) {
    std::memcpy(address, value, bytes);
    std::memcpy(&expected_[static_cast<char*>(address) - start_], value, bytes);
    for (State* state = state_of(address); bytes > 0; --bytes, ++state) {
      state->write_epoch = who.epoch;
      state->writer = static_cast<int16_t>(who.thread);
      state->in_flight = false;
    }
  }

  std::vector<char> storage_;
  std::vector<char> expected_;  // what the instructions have put there
  std::vector<State> states_;
  char* start_ = nullptr;
};

}  // namespace emulator
}  // namespace ptq4adm
