// What the emulator knows of every byte: of the block's shared memory who wrote and read it since
// the last barrier, of global memory which bytes a launch may touch and which it has written.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "emulator.h"

namespace ptq4adm {
namespace emulator {

// Throws KernelError with the place: block, warp, lane, instruction.
[[noreturn]] void refuse(const char* instruction, const std::string& what);

template <class... Values>
std::string text(const char* format, Values... values) {
  char line[320];
  std::snprintf(line, sizeof line, format, values...);
  return line;
}

constexpr int kNobody = -1;
constexpr int kSeveral = -2;  // readers; also a whole warp, whose lanes get each other's bytes
constexpr unsigned char kPoison = 0xa5;

// The shared memory of one block. An epoch is the time between two barriers of the block.
class SharedMemory {
 public:
  void reset(size_t bytes) {
    storage_.assign(bytes + kAlignment, static_cast<char>(kPoison));
    const size_t misfit = reinterpret_cast<uintptr_t>(storage_.data()) % kAlignment;
    start_ = storage_.data() + (misfit ? kAlignment - misfit : 0);
    states_.assign(bytes, State());
  }
  char* start() const { return start_; }
  size_t size() const { return states_.size(); }

  bool holds(const void* address) const {
    const char* byte = static_cast<const char*>(address);
    return byte >= start_ && byte < start_ + size();
  }

  void check_read(const void* address, int bytes, int thread, int epoch, const char* instruction) {
    const size_t first = offset(address, bytes, instruction);
    for (size_t i = first; i < first + bytes; ++i) {
      State& state = states_[i];
      if (state.in_flight) refuse(instruction, in_flight_text("reads", i));
      if (state.writer == kNobody) {
        refuse(instruction, text("reads shared byte %zu, which nothing has written", i));
      }
      if (state.write_epoch == epoch && state.writer != thread) {
        refuse(instruction,
               text("race: reads shared byte %zu, which thread %d wrote since the last barrier", i,
                    state.writer));
      }
      const bool is_first = state.read_epoch != epoch;
      state.reader = is_first || state.reader == thread ? thread : kSeveral;
      state.read_epoch = epoch;
    }
  }

  void check_write(const void* address, int bytes, int thread, int epoch, const char* instruction) {
    const size_t first = offset(address, bytes, instruction);
    for (size_t i = first; i < first + bytes; ++i) {
      const State& state = states_[i];
      if (state.in_flight) refuse(instruction, in_flight_text("writes", i));
      if (state.write_epoch == epoch && state.writer != thread) {
        refuse(instruction,
               text("race: writes shared byte %zu, which thread %d wrote since the last barrier", i,
                    state.writer));
      }
      if (state.read_epoch == epoch && state.reader != thread) {
        const std::string reader =
            state.reader == kSeveral ? "other threads" : text("thread %d", state.reader);
        refuse(instruction,
               text("race: writes shared byte %zu, which %s read since the last barrier", i,
                    reader.c_str()));
      }
    }
  }

  void mark_written(const void* address, int bytes, int thread, int epoch) {
    mark(address, bytes, thread, epoch, false);
  }
  // The bytes are poisoned until they land.
  void mark_in_flight(void* address, int bytes, int thread, int epoch) {
    std::memset(address, kPoison, bytes);
    mark(address, bytes, thread, epoch, true);
  }

 private:
  static constexpr size_t kAlignment = 128;
  struct State {
    int write_epoch = -1;
    int read_epoch = -1;
    int16_t writer = kNobody;
    int16_t reader = kNobody;
    bool in_flight = false;
  };

  size_t offset(const void* address, int bytes, const char* instruction) const {
    const size_t first = static_cast<const char*>(address) - start_;
    if (first + bytes > size()) {
      refuse(instruction, text("out of bounds: shared bytes %zu to %zu of %zu", first,
                               first + bytes - 1, size()));
    }
    return first;
  }
  std::string in_flight_text(const char* verb, size_t i) const {
    return text("%s shared byte %zu, for which thread %d has not waited since its cp.async", verb,
                i, states_[i].writer);
  }
  void mark(const void* address, int bytes, int thread, int epoch, bool in_flight) {
    const size_t first = static_cast<const char*>(address) - start_;
    for (size_t i = first; i < first + bytes; ++i) {
      states_[i].write_epoch = epoch;
      states_[i].writer = static_cast<int16_t>(thread);
      states_[i].in_flight = in_flight;
    }
  }

  std::vector<char> storage_;
  std::vector<State> states_;
  char* start_ = nullptr;
};

// The ranges of global memory that a launch may touch.
class GlobalMemory {
 public:
  void add(const void* start, size_t bytes, Access access, const std::string& name) {
    ranges_.push_back({static_cast<const char*>(start), bytes, access, name, {}});
  }
  void forget() { ranges_.clear(); }
  void start_launch() {
    for (Range& range : ranges_) {
      range.is_written.assign(range.access == Access::kReadWrite ? range.bytes : 0, false);
    }
  }

  void check_read(const void* address, int bytes, bool is_constant, const char* instruction) {
    const Range& range = find(address, bytes, instruction);
    if (!is_constant || range.is_written.empty()) return;
    const size_t first = static_cast<const char*>(address) - range.start;
    for (size_t i = first; i < first + bytes; ++i) {
      if (range.is_written[i]) {
        refuse(instruction, text("reads byte %zu of %s, which this launch has written, as constant",
                                 i, range.name.c_str()));
      }
    }
  }
  void check_write(const void* address, int bytes, const char* instruction) {
    Range& range = find(address, bytes, instruction);
    if (range.access == Access::kRead) {
      refuse(instruction, text("writes %s, which is registered to be read", range.name.c_str()));
    }
    const size_t first = static_cast<const char*>(address) - range.start;
    std::fill_n(range.is_written.begin() + first, bytes, true);
  }

 private:
  struct Range {
    const char* start;
    size_t bytes;
    Access access;
    std::string name;
    std::vector<bool> is_written;  // by this launch
  };

  Range& find(const void* address, int bytes, const char* instruction) {
    const char* first = static_cast<const char*>(address);
    const Range* nearest = nullptr;
    for (Range& range : ranges_) {
      if (first >= range.start && first + bytes <= range.start + range.bytes) return range;
      const bool is_below = first + bytes > range.start;
      if (is_below && (nearest == nullptr || range.start > nearest->start)) nearest = &range;
    }
    if (nearest == nullptr) {
      refuse(instruction,
             text("out of bounds: %d bytes at %p, in no registered memory", bytes, address));
    }
    refuse(instruction, text("out of bounds: %d bytes at offset %td of %s, which has %zu", bytes,
                             first - nearest->start, nearest->name.c_str(), nearest->bytes));
  }

  std::vector<Range> ranges_;
};

}  // namespace emulator
}  // namespace ptq4adm
