// The chains are inline assembly: what is measured does not depend on the compiler or its flags.

#include "roofline.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "cpu_features.h"

namespace ptq4adm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kUnroll = 12;                  // accumulators: more than latency times ports
constexpr int64_t kRounds = 20000;               // of a chain between two looks at the clock
constexpr size_t kCopyBytes = size_t{96} << 20;  // a buffer of one thread: beyond any L3 share

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

#if defined(__x86_64__)

// Registers 0 to 11 accumulate, 12 to 14 are operands and scratch. Zeroed first: a denormal or a
// NaN left over from elsewhere would change the speed.
#define PTQ4ADM_CLEAR(i) "vpxor %%xmm" #i ", %%xmm" #i ", %%xmm" #i "\n\t"
#define PTQ4ADM_TWELVE(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define PTQ4ADM_CHAIN(name, body)                                                                  \
  void name(int64_t rounds) {                                                                      \
    asm volatile(PTQ4ADM_TWELVE(PTQ4ADM_CLEAR) PTQ4ADM_CLEAR(12) PTQ4ADM_CLEAR(13)               \
                 PTQ4ADM_CLEAR(14) "1:\n\t" PTQ4ADM_TWELVE(body) "dec %0\n\tjnz 1b\n\t"          \
                 "vzeroupper\n\t"                                                                \
                 : "+r"(rounds)                                                                  \
                 :                                                                               \
                 : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", \
                   "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14"); \
  }

#define PTQ4ADM_FMA_256(i) "vfmadd231ps %%ymm12, %%ymm13, %%ymm" #i "\n\t"
#define PTQ4ADM_FMA_512(i) "vfmadd231ps %%zmm12, %%zmm13, %%zmm" #i "\n\t"
#define PTQ4ADM_MADDUBS_256(i)               \
  "vpmaddubsw %%ymm12, %%ymm13, %%ymm14\n\t" \
  "vpaddw %%ymm14, %%ymm" #i ", %%ymm" #i "\n\t"
#define PTQ4ADM_MADDUBS_512(i)               \
  "vpmaddubsw %%zmm12, %%zmm13, %%zmm14\n\t" \
  "vpaddw %%zmm14, %%zmm" #i ", %%zmm" #i "\n\t"
#define PTQ4ADM_DPBUSD_256(i) "vpdpbusd %%ymm12, %%ymm13, %%ymm" #i "\n\t"
#define PTQ4ADM_DPBUSD_512(i) "vpdpbusd %%zmm12, %%zmm13, %%zmm" #i "\n\t"

PTQ4ADM_CHAIN(fma_avx2, PTQ4ADM_FMA_256)
PTQ4ADM_CHAIN(fma_avx512, PTQ4ADM_FMA_512)
PTQ4ADM_CHAIN(maddubs_avx2, PTQ4ADM_MADDUBS_256)
PTQ4ADM_CHAIN(maddubs_avx512, PTQ4ADM_MADDUBS_512)
PTQ4ADM_CHAIN(dpbusd_256, PTQ4ADM_DPBUSD_256)
PTQ4ADM_CHAIN(dpbusd_512, PTQ4ADM_DPBUSD_512)

struct Chain {
  const char* name;
  void (*run)(int64_t rounds);
  int64_t operations;  // of one accumulator and round
  bool (*is_available)();
  const char* needs;
};

const std::vector<Chain>& chains() {
  static const std::vector<Chain> all{
      {"fma_avx2", fma_avx2, 2 * 8, has_avx2, "AVX2 and FMA"},
      {"fma_avx512", fma_avx512, 2 * 16, has_avx512, "AVX-512 F, BW, DQ and VL"},
      {"maddubs_avx2", maddubs_avx2, 2 * 32, has_avx2, "AVX2 and FMA"},
      {"maddubs_avx512", maddubs_avx512, 2 * 64, has_avx512, "AVX-512 F, BW, DQ and VL"},
      {"dpbusd_256", dpbusd_256, 2 * 32, has_avx512_vnni, "AVX-512 VNNI"},
      {"dpbusd_512", dpbusd_512, 2 * 64, has_avx512_vnni, "AVX-512 VNNI"},
  };
  return all;
}

#else

struct Chain {
  const char* name;
  void (*run)(int64_t rounds);
  int64_t operations;
  bool (*is_available)();
  const char* needs;
};

const std::vector<Chain>& chains() {
  static const std::vector<Chain> none;
  return none;
}

#endif

const Chain* find_chain(const std::string& kind) {
  for (const Chain& chain : chains()) {
    if (kind == chain.name) return &chain;
  }
  return nullptr;
}

// Bytes read and written a second, or operations a second, of one thread.
double chain_rate(const Chain& chain, double seconds) {
  chain.run(kRounds);  // the clock frequency settles, wide units power up
  const Clock::time_point start = Clock::now();
  int64_t rounds = 0;
  double elapsed = 0.0;
  do {
    chain.run(kRounds);
    rounds += kRounds;
    elapsed = seconds_since(start);
  } while (elapsed < seconds);
  return static_cast<double>(rounds * kUnroll * chain.operations) / elapsed;
}

double copy_rate(std::vector<char>& from, std::vector<char>& to, double seconds) {
  const Clock::time_point start = Clock::now();
  int64_t copies = 0;
  double elapsed = 0.0;
  do {
    std::memcpy(to.data(), from.data(), from.size());
    from[static_cast<size_t>(copies)] = static_cast<char>(copies);  // no copy may be dropped
    ++copies;
    elapsed = seconds_since(start);
  } while (elapsed < seconds);
  return 2.0 * static_cast<double>(copies) * static_cast<double>(from.size()) / elapsed;
}

// Sum of rate(thread's own) over threads that start together.
template <typename Prepare>
double run_together(int64_t threads, const Prepare& work) {
  std::atomic<int64_t> ready{0};
  std::vector<double> rates(static_cast<size_t>(threads));
  std::vector<std::thread> pool;
  for (int64_t thread = 0; thread < threads; ++thread) {
    pool.emplace_back([&, thread] {
      rates[static_cast<size_t>(thread)] = work([&] {
        ready.fetch_add(1);
        while (ready.load() < threads) std::this_thread::yield();
      });
    });
  }
  double sum = 0.0;
  for (int64_t thread = 0; thread < threads; ++thread) {
    pool[static_cast<size_t>(thread)].join();
    sum += rates[static_cast<size_t>(thread)];
  }
  return sum;
}

}  // namespace

std::vector<std::string> peak_kinds() {
  return {"fma_avx2",   "fma_avx512", "maddubs_avx2", "maddubs_avx512",
          "dpbusd_256", "dpbusd_512", "copy"};
}

std::string peak_missing(const std::string& kind) {
  bool is_known = false;
  std::string names;
  for (const std::string& name : peak_kinds()) {
    is_known = is_known || name == kind;
    names += (names.empty() ? "" : ", ") + name;
  }
  if (!is_known) throw std::invalid_argument("peak '" + kind + "' is unknown; use " + names);
  if (kind == "copy") return "";
  const Chain* chain = find_chain(kind);
  if (chain == nullptr) return "needs an x86-64 processor";
  return chain->is_available() ? "" : std::string("needs ") + chain->needs;
}

double measure_peak(const std::string& kind, double milliseconds, int64_t threads) {
  const std::string missing = peak_missing(kind);
  if (!missing.empty()) {
    throw std::runtime_error("peak '" + kind +
                             "' cannot be measured on this processor: " + missing);
  }
  if (threads < 1 || !(milliseconds > 0)) {
    throw std::invalid_argument("threads and milliseconds must be positive");
  }
  const double seconds = milliseconds / 1e3;
  if (kind == "copy") {
    return 1e-9 * run_together(threads, [&](const auto& wait) {
             std::vector<char> from(kCopyBytes, 1), to(kCopyBytes, 2);  // touched: mapped
             wait();
             return copy_rate(from, to, seconds);
           });
  }
  const Chain& chain = *find_chain(kind);
  return 1e-9 * run_together(threads, [&](const auto& wait) {
           wait();
           return chain_rate(chain, seconds);
         });
}

}  // namespace ptq4adm
