// Fibers: stacks that a scheduler switches between, on one thread of the operating system.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

// The portable fibers can be asked for, so that they can be tested.
#if defined(__x86_64__) && !defined(PTQ4ADM_PORTABLE_FIBERS)
#define PTQ4ADM_FIBERS_BY_HAND
#else
#include <ucontext.h>
#endif

namespace ptq4adm {
namespace emulator {

#ifdef PTQ4ADM_FIBERS_BY_HAND

// Saves the registers that a callee must keep and the stack pointer, and takes another's. By hand,
// because swapcontext also asks the kernel for the signal mask: a hundred times slower.
extern "C" void ptq4adm_switch_fiber(void** saved, void* next);
__asm__(
    ".text\n"
    ".local ptq4adm_switch_fiber\n"
    ".type ptq4adm_switch_fiber, @function\n"
    "ptq4adm_switch_fiber:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size ptq4adm_switch_fiber, .-ptq4adm_switch_fiber\n");

class Fiber {
 public:
  void start(char* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes);  // a page's end: 16-byte aligned
    top[-2] = reinterpret_cast<void*>(entry);              // entered as by a call
    top[-1] = nullptr;                                     // nowhere to return to
    pointer_ = top - 8;                                    // six registers below the entry
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  }
  void enter() { ptq4adm_switch_fiber(&scheduler_, pointer_); }
  void leave() { ptq4adm_switch_fiber(&pointer_, scheduler_); }

 private:
  void* pointer_ = nullptr;
  void* scheduler_ = nullptr;
};

#else

class Fiber {
 public:
  void start(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void enter() { swapcontext(&scheduler_, &context_); }
  void leave() { swapcontext(&context_, &scheduler_); }

 private:
  ucontext_t context_;
  ucontext_t scheduler_;
};

#endif

// Stacks side by side, an unreadable page below each: too deep a body stops, and spoils nothing.
class Stacks {
 public:
  static constexpr size_t kGuard = 1 << 16;  // at least a page of any machine
  static constexpr size_t kBytes = 1 << 18;

  explicit Stacks(int count) : bytes_(count * (kGuard + kBytes)) {
    void* memory =
        mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    for (int i = 0; i < count; ++i) {
      if (mprotect(at(i), kBytes, PROT_READ | PROT_WRITE) != 0) {
        munmap(memory_, bytes_);
        throw std::bad_alloc();
      }
    }
  }
  ~Stacks() { munmap(memory_, bytes_); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  char* at(int i) const { return memory_ + i * (kGuard + kBytes) + kGuard; }

 private:
  size_t bytes_;
  char* memory_ = nullptr;
};

}  // namespace emulator
}  // namespace ptq4adm
