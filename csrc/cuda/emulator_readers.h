// Sets of those who have read a byte since it was written, each set stored once and named by a
// number: the bytes of a tile share theirs. 0 is the empty set.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

#include "emulator_clocks.h"

namespace ptq4adm {
namespace emulator {

class ReaderSets {
 public:
  struct Member {
    int agent;
    int time;
  };

  explicit ReaderSets(const Clocks& clocks) : clocks_(clocks) {}

  // For a new block.
  void reset(int threads) {
    sets_.assign(1, {});
    sums_.clear();
    threads_.assign(threads, {});
    warps_.assign(threads / 32, {});
  }

  const std::vector<Member>& members(int set) const { return sets_[set]; }

  // What a thread, or all lanes of a warp, read now.
  int of_thread(int thread) {
    const int64_t time = clocks_.time(thread);
    return current(threads_[thread], time, [&] { add_thread(thread); });
  }
  int of_warp(int warp) {
    int64_t times = 0;  // each only grows, so the sum tells whether any has
    for (int lane = 0; lane < 32; ++lane) times += clocks_.time(32 * warp + lane);
    return current(warps_[warp], times, [&] {
      for (int lane = 0; lane < 32; ++lane) add_thread(32 * warp + lane);
    });
  }
  int of(std::vector<Member> members) {
    sets_.push_back(std::move(members));
    return static_cast<int>(sets_.size()) - 1;
  }

  // The set with another's members added. Of the old ones, those that `thread`, which is among the
  // new or speaks for them, knows of may go: who comes after the new comes after them. Not before
  // their fence, which the async proxy asks for.
  int add(int set, int others, int thread) {
    if (set == 0 || set == others) return others;
    const uint64_t key = static_cast<uint64_t>(set) << 32 | static_cast<uint32_t>(others);
    const auto [sum, is_new] = sums_.try_emplace(key, others);
    if (!is_new) return sum->second;
    std::vector<Member> kept;
    for (const Member& member : sets_[set]) {
      if (!clocks_.is_known(member.agent, member.time, thread) ||
          (clocks_.is_on() && !clocks_.is_fenced(member.agent, member.time, thread))) {
        kept.push_back(member);
      }
    }
    if (kept.empty()) return others;
    kept.insert(kept.end(), sets_[others].begin(), sets_[others].end());
    return sum->second = of(std::move(kept));
  }

 private:
  struct Current {
    int64_t time = -1;
    int set = 0;
  };

  void add_thread(int thread) { sets_.back().push_back({thread, clocks_.time(thread)}); }
  template <class Fill>
  int current(Current& known, int64_t time, Fill fill) {
    if (known.time != time) {
      known = {time, of({})};
      fill();
    }
    return known.set;
  }

  const Clocks& clocks_;
  std::vector<std::vector<Member>> sets_;
  std::unordered_map<uint64_t, int> sums_;  // by the two sets added
  std::vector<Current> threads_, warps_;
};

}  // namespace emulator
}  // namespace ptq4adm
