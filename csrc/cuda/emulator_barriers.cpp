// Barriers in shared memory (mbarrier) and named barriers: who waits, and who learns what of whom.

#include <map>
#include <string>

#include "emulator_launch.h"
#include "emulator_phases.h"

namespace ptq4adm {
namespace emulator {
namespace {

constexpr char kNamedBarrier[] = "warpgroup_barrier";
constexpr int kMostArrivals = (1 << 20) - 1;  // and bytes

struct NamedBarrier {
  int threads = 0;  // that it needs; 0 if nobody waits
  int arrived = 0;
  Clock known;
};

std::map<size_t, PhaseBarrier> barriers;  // by shared byte
NamedBarrier named[16];

void arrive(PhaseBarrier& barrier, const char* instruction) {
  if (barrier.pending == 0) {
    refuse(instruction, text("an arrival too many in phase %d of the barrier at shared byte %zu, "
                             "which counts %d",
                             barrier.phase, barrier.place, barrier.count));
  }
  --barrier.pending;
  clocks.release(launch->current, barrier.arrived);
  settle(barrier, instruction);
}

}  // namespace

void start_barriers() {
  barriers.clear();
  for (NamedBarrier& each : named) each = NamedBarrier();
}

void check_barriers_at_exit() {
  for (const auto& [place, barrier] : barriers) {
    if (barrier.box_phase <= barrier.acquired) continue;
    refuse("exit", text("nobody has waited for the boxes of phase %d of the barrier at shared byte "
                        "%zu",
                        barrier.box_phase, place));
  }
}

PhaseBarrier& barrier_at(const uint64_t* address, const char* instruction) {
  check_aligned(address, sizeof *address, instruction);
  const size_t place = shared.offset(address, sizeof *address, instruction);
  const auto found = barriers.find(place);
  if (found == barriers.end()) {
    refuse(instruction,
           text("there is no barrier at shared byte %zu: barrier_init has not run", place));
  }
  PhaseBarrier& barrier = found->second;
  if (!clocks.is_known(barrier.initializer, barrier.init_time, launch->current)) {
    refuse(instruction, text("race: the barrier at shared byte %zu was initialized by thread %d, "
                             "and no barrier orders the two",
                             place, barrier.initializer));
  }
  return barrier;
}

void settle(PhaseBarrier& barrier, const char* instruction) {
  if (barrier.pending > 0) return;
  if (barrier.issued > barrier.expected) {
    refuse(instruction,
           text("boxes bring %lld bytes in phase %d of the barrier at shared byte %zu, "
                "where %lld are expected",
                static_cast<long long>(barrier.issued), barrier.phase, barrier.place,
                static_cast<long long>(barrier.expected)));
  }
  if (barrier.landed < barrier.expected) return;
  if (barrier.woken > 0) {
    refuse(instruction,
           text("phase %d of the barrier at shared byte %zu completes while %d threads "
                "still wait for phase %d: a poll of its parity may miss it",
                barrier.phase, barrier.place, barrier.woken, barrier.phase - 1));
  }
  // what the copies did is known with the phase, as what those did who arrived
  barrier.completed = barrier.arrived;
  barrier.completed[barrier.agent] = ++barrier.phase;
  barrier.pending = barrier.count;
  barrier.expected = barrier.issued = barrier.landed = 0;
  for (Thread& thread : launch->threads) {
    if (thread.state != State::kAtPhase || thread.barrier != barrier.place) continue;
    if (thread.parity == barrier.phase % 2) continue;
    thread.state = State::kReady;
    ++barrier.woken;
  }
}

std::string phase_text(const Thread& thread) {
  const PhaseBarrier& barrier = barriers.at(thread.barrier);
  return text(
      "barrier_wait (shared byte %zu, parity %d: its phase %d lacks %d arrivals and %lld "
      "bytes)",
      barrier.place, thread.parity, barrier.phase, barrier.pending,
      static_cast<long long>(barrier.expected - barrier.landed));
}

void barrier_init(uint64_t* address, int arrivals) {
  const char* const name = "barrier_init";
  check_aligned(address, sizeof *address, name);
  if (arrivals < 1 || arrivals > kMostArrivals) {
    refuse(name, text("%d arrivals; needed: 1 to %d", arrivals, kMostArrivals));
  }
  const size_t place = shared.offset(address, sizeof *address, name);
  if (barriers.count(place) > 0) {
    refuse(name, text("there is a barrier at shared byte %zu already", place));
  }
  if (barriers.size() == Clocks::kBarriers) {
    refuse(name, text("more than %d barriers in a block", Clocks::kBarriers));
  }
  shared.make_barrier(place, sizeof *address, launch->current, name);
  PhaseBarrier barrier;
  barrier.place = place;
  barrier.agent = clocks.barrier_agent(static_cast<int>(barriers.size()));
  barrier.count = barrier.pending = arrivals;
  barrier.initializer = launch->current;
  barrier.init_time = clocks.time(launch->current);
  barriers[place] = barrier;
}

void barrier_init_fence() { clocks.init_fence(launch->current); }

void barrier_arrive(uint64_t* address) {
  const char* const name = "barrier_arrive";
  arrive(barrier_at(address, name), name);
}

void barrier_arrive_expect(uint64_t* address, int bytes) {
  const char* const name = "barrier_arrive_expect";
  PhaseBarrier& barrier = barrier_at(address, name);
  if (bytes < 0 || barrier.expected + bytes > kMostArrivals) {
    refuse(name, text("%d bytes; needed: 0 to %d in a phase", bytes, kMostArrivals));
  }
  // before the arrival, so that a phase cannot complete between the two
  if (barrier.pending > 0) barrier.expected += bytes;
  arrive(barrier, name);
}

void barrier_wait(uint64_t* address, int parity) {
  const char* const name = "barrier_wait";
  PhaseBarrier& barrier = barrier_at(address, name);
  if (parity != 0 && parity != 1) refuse(name, text("parity %d; needed: 0 or 1", parity));
  if (barrier.phase % 2 == parity) {
    launch->thread().barrier = barrier.place;
    launch->thread().parity = parity;
    suspend(State::kAtPhase);
    --barrier.woken;
  }
  barrier.acquired = barrier.phase - 1;
  clocks.acquire(launch->current, barrier.completed);
}

void named_barrier(int id, int threads) {
  if (id < 1 || id > 15) {
    refuse(kNamedBarrier, text("barrier %d; needed: 1 to 15, 0 is block_barrier's", id));
  }
  if (threads < kWarp || threads % kWarp != 0 || threads > launch->thread_count) {
    refuse(kNamedBarrier, text("%d threads; needed: a multiple of 32, up to the block's %d",
                               threads, launch->thread_count));
  }
  const uint64_t number = static_cast<uint64_t>(threads) << 4 | static_cast<uint64_t>(id);
  if (!meet(kNamedBarrier, {nullptr, nullptr, nullptr, number}, kWarp)) return;
  for (const Operands& lane : launch->warp().operands) {
    if (lane.number != number) refuse(kNamedBarrier, "lanes of the warp name different barriers");
  }
  NamedBarrier& barrier = named[id];
  if (barrier.threads > 0 && barrier.threads != threads) {
    refuse(kNamedBarrier, text("barrier %d: %d threads, but others wait there for %d", id, threads,
                               barrier.threads));
  }
  barrier.threads = threads;
  barrier.arrived += kWarp;
  set_free(kWarp);
  const int first = launch->current / kWarp * kWarp;
  for (int thread = first; thread < first + kWarp; ++thread) {
    clocks.release(thread, barrier.known);
    launch->threads[thread].state = State::kAtNamed;
    launch->threads[thread].barrier = static_cast<size_t>(id);
  }
  if (barrier.arrived < threads) {
    suspend(State::kAtNamed);
    return;
  }
  for (int thread = 0; thread < launch->thread_count; ++thread) {
    Thread& each = launch->threads[thread];
    if (each.state != State::kAtNamed || each.barrier != static_cast<size_t>(id)) continue;
    each.state = State::kReady;
    clocks.acquire(thread, barrier.known);
  }
  barrier = NamedBarrier();
}

}  // namespace emulator
}  // namespace ptq4adm
