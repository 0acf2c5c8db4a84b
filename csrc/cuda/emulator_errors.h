// How the parts of the emulator refuse, and who it is that they refuse.
#pragma once

#include <cstdio>
#include <string>

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
constexpr int kSeveral = -2;

// A point of a launch: thread `thread` of block number `block`, after `epoch` barriers of the
// block, at a time of its own (emulator_clocks.h).
struct Point {
  int block = kNobody;
  int thread = kNobody;
  int epoch = 0;
  int time = 0;
};

}  // namespace emulator
}  // namespace ptq4adm
