// Who knows what of whom, within one block.
//
// A thread's time grows whenever what it knows, or what others may know of it, changes: at
// barriers, arrivals, waits and fences. A deed is known to a thread if a chain of those leads from
// the one to the other: only then may the two touch one byte. What a block barrier tells everyone
// is kept once; a clock for each thread, with a time of everybody else, only from the first barrier
// of sm_90 on.
//
// Besides the threads there are agents that know nothing and are known: the copies that a barrier
// counts, whose time is the barrier's phase, and the products that a warp has waited for.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace ptq4adm {
namespace emulator {

using Clock = std::vector<int>;  // by agent: all that it did before this time is known

class Clocks {
 public:
  static constexpr int kBarriers = 64;  // in shared memory, of one block

  // For a new block.
  void reset(int threads) {
    threads_ = threads;
    times_.assign(threads, 0);
    everyone_.assign(threads + kBarriers + threads / 32, 0);
    of_.clear();
    fences_.assign(threads, {});
    init_fences_.assign(threads, {});
  }
  // From here on threads may learn of each other one by one.
  void turn_on() {
    if (of_.empty()) of_.assign(threads_, Clock(everyone_.size(), 0));
  }

  bool is_on() const { return !of_.empty(); }

  bool is_thread(int agent) const { return agent < threads_; }
  int barrier_agent(int index) const { return threads_ + index; }
  int products_agent(int warp) const { return threads_ + kBarriers + warp; }
  int time(int thread) const { return times_[thread]; }

  bool is_known(int agent, int time, int thread) const {
    return agent == thread || time < everyone_[agent] ||
           (!of_.empty() && time < of_[thread][agent]);
  }
  // Known to each of `count` threads, and to the agent's fellows as well as to itself.
  bool is_known_to_all(int agent, int time, int first, int count) const {
    if (time < everyone_[agent]) return true;
    if (of_.empty()) return false;
    for (int thread = first; thread < first + count; ++thread) {
      if (!is_known(agent, time, thread)) return false;
    }
    return true;
  }

  // Everybody knows everything.
  void block_barrier() {
    for (const Clock& clock : of_) {
      for (size_t agent = threads_; agent < clock.size(); ++agent) {
        everyone_[agent] = std::max(everyone_[agent], clock[agent]);
      }
    }
    for (int thread = 0; thread < threads_; ++thread) everyone_[thread] = ++times_[thread];
  }

  // What a thread knows, itself included, goes into the clock.
  void release(int thread, Clock& into) {
    turn_on();
    into.resize(everyone_.size(), 0);
    join(into, of_[thread]);
    join(into, everyone_);
    into[thread] = ++times_[thread];
  }
  void acquire(int thread, const Clock& from) {
    turn_on();
    ++times_[thread];
    if (!from.empty()) join(of_[thread], from);
  }
  // The thread learns of an agent up to a time.
  void learn(int thread, int agent, int until) {
    turn_on();
    ++times_[thread];
    of_[thread][agent] = std::max(of_[thread][agent], until);
  }
  // All that a thread knows, as a value.
  Clock snapshot(int thread) const {
    Clock clock = everyone_;
    if (!of_.empty()) join(clock, of_[thread]);
    return clock;
  }

  // --- fences between the generic and the async proxy, each for the deeds of its own thread ------

  void fence(int thread) { fences_[thread].push_back(times_[thread]++); }
  void init_fence(int thread) {
    init_fences_[thread].push_back(times_[thread]);
    fence(thread);
  }
  // Whether the agent made a fence after that time, and the thread knows.
  bool is_fenced(int agent, int time, int thread) const {
    return !is_thread(agent) || has_fence(fences_[agent], agent, time, thread);
  }
  bool is_init_fenced(int agent, int time, int thread) const {
    return has_fence(init_fences_[agent], agent, time, thread);
  }

 private:
  static void join(Clock& into, const Clock& from) {
    for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
  }
  bool has_fence(const std::vector<int>& fences, int agent, int time, int thread) const {
    const auto next = std::lower_bound(fences.begin(), fences.end(), time);
    return next != fences.end() && is_known(agent, *next, thread);
  }

  int threads_ = 0;
  std::vector<int> times_;  // by thread
  Clock everyone_;          // what all threads know, since the last block barrier
  std::vector<Clock> of_;   // by thread, empty until turned on
  std::vector<std::vector<int>> fences_, init_fences_;  // by thread, times that grow
};

}  // namespace emulator
}  // namespace ptq4adm
