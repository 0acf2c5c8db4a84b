// Linux on x86-64: SIGPROF and the saved instruction pointer.

#include "sampler.h"

#include <stdexcept>
#include <string>

#if defined(__linux__) && defined(__x86_64__)

#include <signal.h>
#include <sys/time.h>
#include <ucontext.h>

#include <atomic>

namespace ptq4adm {
namespace {

constexpr int kPeriodMicroseconds = 1000;

std::atomic<int64_t> total, sse, bits128, bits256, bits512, evex, dpbusd;
bool is_running = false;
struct sigaction previous_action;

void count_length(int length) {
  std::atomic<int64_t>* const counters[] = {&bits128, &bits256, &bits512};
  if (length < 3) counters[length]->fetch_add(1, std::memory_order_relaxed);
}

// Byte positions: Intel's manual, volume 2, "VEX prefix" and "EVEX encoding". Only bytes that
// belong to the instruction are read, so the next page is never touched.
void decode(const uint8_t* code) {
  constexpr uint8_t kMap0F38 = 2, kDpbusd = 0x50, kDpbusds = 0x51;
  const auto is_dot = [](uint8_t opcode) { return opcode == kDpbusd || opcode == kDpbusds; };
  if (code[0] == 0xC5) {
    count_length((code[1] >> 2) & 1);
  } else if (code[0] == 0xC4) {
    count_length((code[2] >> 2) & 1);
    if ((code[1] & 0x1F) == kMap0F38 && is_dot(code[3])) dpbusd.fetch_add(1);
  } else if (code[0] == 0x62) {
    evex.fetch_add(1);
    // with embedded rounding the length bits hold the rounding mode: rare, and 512 bits anyway
    count_length((code[3] >> 5) & 3);
    if ((code[1] & 7) == kMap0F38 && is_dot(code[4])) dpbusd.fetch_add(1);
  } else if (code[0] == 0x66 || code[0] == 0xF3) {  // paddd and its like; movdqu
    const bool has_rex = (code[1] & 0xF0) == 0x40;
    if (code[has_rex ? 2 : 1] == 0x0F) sse.fetch_add(1);
  }
}

void on_signal(int, siginfo_t*, void* context) {
  const auto* saved = static_cast<const ucontext_t*>(context);
  total.fetch_add(1);
  decode(reinterpret_cast<const uint8_t*>(saved->uc_mcontext.gregs[REG_RIP]));
}

}  // namespace

const char* sampler_missing() { return nullptr; }

void sampler_start() {
  if (is_running) throw std::runtime_error("the instruction sampler runs already; stop it first");
  for (auto* counter : {&total, &sse, &bits128, &bits256, &bits512, &evex, &dpbusd})
    counter->store(0);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_RESTART;
  sigemptyset(&action.sa_mask);
  if (sigaction(SIGPROF, &action, &previous_action) != 0) {
    throw std::runtime_error("the instruction sampler cannot install its signal handler");
  }
  const itimerval period{{0, kPeriodMicroseconds}, {0, kPeriodMicroseconds}};
  if (setitimer(ITIMER_PROF, &period, nullptr) != 0) {
    sigaction(SIGPROF, &previous_action, nullptr);
    throw std::runtime_error("the instruction sampler cannot start its timer");
  }
  is_running = true;
}

InstructionCounts sampler_stop() {
  if (!is_running) throw std::runtime_error("the instruction sampler does not run; start it first");
  const itimerval off{};
  setitimer(ITIMER_PROF, &off, nullptr);
  // the default action would end the process on a signal already on its way: ignoring it discards
  // it
  signal(SIGPROF, SIG_IGN);
  sigaction(SIGPROF, &previous_action, nullptr);
  is_running = false;
  return {total, sse, bits128, bits256, bits512, evex, dpbusd};
}

}  // namespace ptq4adm

#else

namespace ptq4adm {

const char* sampler_missing() { return "needs Linux on x86-64"; }

void sampler_start() {
  throw std::runtime_error(std::string("instructions cannot be sampled here: ") +
                           sampler_missing());
}

InstructionCounts sampler_stop() {
  throw std::runtime_error("the instruction sampler does not run; start it first");
}

}  // namespace ptq4adm

#endif
