// Global memory: which bytes a launch may touch, and whether what two threads do to one byte is
// ordered. Blocks run one after another here and side by side on a GPU, so between two blocks only
// a chain of arrivals at a counter orders anything.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "emulator_clocks.h"
#include "emulator_errors.h"

namespace ptq4adm {
namespace emulator {

class GlobalMemory {
 public:
  explicit GlobalMemory(const Clocks& clocks) : clocks_(clocks) {}

  void add(const void* start, size_t bytes, Access access, const std::string& name) {
    ranges_.push_back({static_cast<const char*>(start), bytes, access, name, {}});
  }
  void forget() { ranges_.clear(); }

  bool holds(const void* address, int bytes) const {
    const char* first = static_cast<const char*>(address);
    return std::any_of(ranges_.begin(), ranges_.end(), [&](const Range& range) {
      return first >= range.start && first + bytes <= range.start + range.bytes;
    });
  }

  void start_launch() {
    counters_.clear();
    for (Range& range : ranges_) {
      range.states.assign(range.access == Access::kRead ? 0 : range.bytes, State());
    }
  }
  void start_block() { known_.clear(); }

  void check_read(const void* address, int bytes, bool is_constant, const Point& who,
                  const char* instruction) {
    Range& range = find(address, bytes, instruction);
    if (range.states.empty()) return;  // read-only: no one can race
    const size_t first = static_cast<const char*>(address) - range.start;
    for (size_t i = first; i < first + bytes; ++i) {
      State& state = range.states[i];
      check_initialized(range, i, instruction);
      if (is_constant && state.writer.block != kNobody) {
        refuse(instruction, "reads as constant " + place(range, i) + ", which this launch writes");
      }
      check_order("reads", "wrote", state.writer, who, range, i, instruction);
      state.is_constant |= is_constant;
      state.reader = both(state.reader, who);
    }
    const auto [begin, end] = counters_at(address, bytes);
    check_arrivals("reads", begin, end, who, range, first, instruction);
  }

  void check_write(const void* address, int bytes, const Point& who, const char* instruction) {
    Range& range = find(address, bytes, instruction);
    if (range.access == Access::kRead) {
      refuse(instruction, "writes " + range.name + ", which is registered to be read only");
    }
    const size_t first = static_cast<const char*>(address) - range.start;
    for (size_t i = first; i < first + bytes; ++i) {
      State& state = range.states[i];
      if (state.is_constant) {
        refuse(instruction, "writes " + place(range, i) + ", which was read as constant");
      }
      check_order("writes", "wrote", state.writer, who, range, i, instruction);
      check_order("writes", "read", state.reader, who, range, i, instruction);
      state.writer = who;
    }
    const auto [begin, end] = counters_at(address, bytes);
    check_arrivals("writes", begin, end, who, range, first, instruction);
  }

  // The thread gets to know what all who came before knew, and leaves what it knows.
  void arrive(const int* counter, const Point& who, const char* instruction) {
    Range& range = find(counter, sizeof(int), instruction);
    if (range.access == Access::kRead) {
      refuse(instruction, "counts in " + range.name + ", which is registered to be read only");
    }
    std::map<int, Moment>& released = counters_[reinterpret_cast<const char*>(counter)];
    for (const auto& [block, until] : released) {
      if (block == who.block) continue;
      known_[block].push_back({until, who});
    }
    const size_t first = reinterpret_cast<const char*>(counter) - range.start;
    for (size_t i = first; i < first + sizeof(int); ++i) {
      check_initialized(range, i, instruction);
      check_order("counts at", "wrote", range.states[i].writer, who, range, i, instruction);
      check_order("counts at", "read", range.states[i].reader, who, range, i, instruction);
    }
    for (const auto& [block, news] : known_) {
      for (const News& each : news) {
        if (!is_known_here(each.since, who)) continue;
        Moment& until = released.try_emplace(block, each.until).first->second;
        if (until.point.epoch < each.until.point.epoch) until = each.until;
      }
    }
    released[who.block] = {who, std::make_shared<Clock>(clocks_.snapshot(who.thread))};
  }

 private:
  struct State {
    Point writer;
    Point reader;
    bool is_constant = false;  // was read as such
  };
  struct Range {
    const char* start;
    size_t bytes;
    Access access;
    std::string name;
    std::vector<State> states;
  };
  // An arrival, and what its thread knew of its block.
  struct Moment {
    Point point;
    std::shared_ptr<const Clock> known;
  };
  // What a block knows of another: all that was known at `until`, from `since` on.
  struct News {
    Moment until;
    Point since;
  };

  using Counters = std::map<const char*, std::map<int, Moment>>;

  static std::string place(const Range& range, size_t i) {
    return text("byte %zu of %s", i, range.name.c_str());
  }

  // An earlier reader and this one as one: whoever writes must come after both.
  Point both(const Point& earlier, const Point& who) const {
    if (earlier.block == kNobody || is_known(earlier, who)) return who;
    if (earlier.block == who.block) return {who.block, kSeveral, who.epoch, 0};
    return {kSeveral, kSeveral, 0, 0};
  }

  void check_initialized(const Range& range, size_t i, const char* instruction) const {
    if (range.access != Access::kUninitialized || range.states[i].writer.block != kNobody) return;
    refuse(instruction, "reads " + place(range, i) + ", which this launch has not written");
  }

  // Of several threads' deeds no more is kept than after how many block barriers they were.
  bool is_known_here(const Point& earlier, const Point& who) const {
    return earlier.epoch < who.epoch ||
           (earlier.thread != kSeveral &&
            clocks_.is_known(earlier.thread, earlier.time, who.thread));
  }
  bool is_known_at(const Point& earlier, const Moment& moment) const {
    return earlier.epoch < moment.point.epoch || earlier.thread == moment.point.thread ||
           (earlier.thread != kSeveral && earlier.time < (*moment.known)[earlier.thread]);
  }
  bool is_known(const Point& earlier, const Point& who) const {
    if (earlier.block == who.block) return is_known_here(earlier, who);
    const auto news = known_.find(earlier.block);
    if (news == known_.end()) return false;
    return std::any_of(news->second.begin(), news->second.end(), [&](const News& each) {
      return is_known_at(earlier, each.until) && is_known_here(each.since, who);
    });
  }

  void check_order(const char* verb, const char* deed, const Point& earlier, const Point& who,
                   const Range& range, size_t i, const char* instruction) const {
    if (earlier.block == kNobody || is_known(earlier, who)) return;
    const std::string other = earlier.block == kSeveral    ? "several blocks"
                              : earlier.block == who.block ? text("thread %d", earlier.thread)
                                                           : text("block number %d", earlier.block);
    const char* missing = earlier.block == who.block ? "no barrier" : "no counter";
    refuse(instruction, text("race: %s %s, which %s %s, and %s orders the two", verb,
                             place(range, i).c_str(), other.c_str(), deed, missing));
  }

  // The counters that the bytes hold a part of.
  std::pair<Counters::iterator, Counters::iterator> counters_at(const void* address, int bytes) {
    const char* first = static_cast<const char*>(address);
    return {counters_.upper_bound(first - sizeof(int)), counters_.lower_bound(first + bytes)};
  }

  // All who have arrived must be known.
  void check_arrivals(const char* verb, Counters::iterator begin, Counters::iterator end,
                      const Point& who, const Range& range, size_t i,
                      const char* instruction) const {
    for (auto counter = begin; counter != end; ++counter) {
      for (const auto& arrival : counter->second) {
        check_order(verb, "counted at", arrival.second.point, who, range, i, instruction);
      }
    }
  }

  Range& find(const void* address, int bytes, const char* instruction) {
    const char* first = static_cast<const char*>(address);
    const Range* nearest = nullptr;
    ptrdiff_t least = 1 << 20;  // an address further away was not meant for a range
    for (Range& range : ranges_) {
      const ptrdiff_t below = range.start - first;
      const ptrdiff_t above = first + bytes - (range.start + range.bytes);
      const ptrdiff_t distance = std::max(below, above);
      if (distance <= 0) return range;
      if (distance < least) nearest = &range;
      least = std::min(least, distance);
    }
    if (nearest == nullptr) {
      refuse(instruction,
             text("out of bounds: %d bytes at %p, in no registered memory", bytes, address));
    }
    refuse(instruction, text("out of bounds: %d bytes at offset %td of %s, which has %zu", bytes,
                             first - nearest->start, nearest->name.c_str(), nearest->bytes));
  }

  const Clocks& clocks_;
  std::vector<Range> ranges_;
  Counters counters_;                       // by counter and block: the last arrival
  std::map<int, std::vector<News>> known_;  // of other blocks, by the one that runs
};

}  // namespace emulator
}  // namespace ptq4adm
