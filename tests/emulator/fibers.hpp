// Fibers: stacks of their own that one OS thread switches between.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>
#include <ucontext.h>

#include "sanitizers.hpp"

namespace emulator {

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)

// Saves what a called function has to preserve, changes stacks, restores. swapcontext would ask
// the operating system about signals each time.
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** from, void* to);
asm(R"(
.text
.local emulator_switch
.type emulator_switch, @function
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

struct Context {
    void* top;  // of the stack, where emulator_switch left the registers

    void start(void* stack, size_t size, void (*entry)()) {
        void** place = reinterpret_cast<void**>(static_cast<char*>(stack) + size);
        *--place = nullptr;  // entry never returns; this is the alignment a call would leave
        *--place = reinterpret_cast<void*>(entry);
        for (int registers = 0; registers < 6; registers++) *--place = nullptr;
        top = place;
    }
    void leave_for(Context& next) { emulator_switch(&top, next.top); }
};

#else

struct Context {
    ucontext_t state;

    UNWATCHED void start(void* stack, size_t size, void (*entry)()) {
        getcontext(&state);
        state.uc_stack.ss_sp = stack;
        state.uc_stack.ss_size = size;
        state.uc_link = nullptr;
        makecontext(&state, entry, 0);
    }
    UNWATCHED void leave_for(Context& next) { swapcontext(&state, &next.state); }
};

#endif

struct Fiber : Sanitized {
    Context context;
};

constexpr size_t STACK = (ASAN || TSAN ? 256 : 64) << 10;
constexpr unsigned MAX_FIBERS = 1024;
PROCESS_WIDE unsigned char* stacks;

// Below each stack lies a page that nobody may touch.
UNWATCHED inline unsigned char* map_stacks() {
    void* memory = mmap(nullptr, MAX_FIBERS * STACK, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        perror("emulator: mmap");
        abort();
    }
    auto first = static_cast<unsigned char*>(memory);
    for (unsigned i = 0; i < MAX_FIBERS; i++) mprotect(first + i * STACK, PAGE, PROT_NONE);
    return first;
}

// The first switch to the fiber calls `entry`, which has to call `after_switch` and must not
// return.
UNWATCHED inline void start_fiber(Fiber& fiber, unsigned number, void (*entry)()) {
    if (!stacks) stacks = map_stacks();
    unsigned char* stack = stacks + number * STACK + PAGE;
    fiber.stack = stack;
    fiber.stack_size = STACK - PAGE;
    fiber.asan = nullptr;
    sanitizer::allow(stack, fiber.stack_size);
    sanitizer::forget(stack, fiber.stack_size);
    fiber.context.start(stack, fiber.stack_size, entry);
}

UNWATCHED inline void switch_fiber(Fiber& from, Fiber& to, bool for_good = false) {
    sanitizer::before_switch(from, to, for_good);
    from.context.leave_for(to.context);
    sanitizer::after_switch(to, from);  // back again: `to` is the one that was left
}

}  // namespace emulator
