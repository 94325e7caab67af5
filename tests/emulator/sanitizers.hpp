// What the sanitizers have to be told: which fiber runs, and which memory starts a new life.
// Built without a sanitizer, every function here is empty.
#pragma once
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>

// Code of the emulator itself: what it reads and writes is no access of a kernel.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define UNWATCHED __attribute__((noinline, no_sanitize("address", "undefined", "thread")))
#else
#define UNWATCHED
#endif

// An inline variable that exists once in a process, however many kernels are loaded.
#define PROCESS_WIDE __attribute__((visibility("default"))) inline

extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* stack, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_stack, size_t* old_size);
void __asan_poison_memory_region(const volatile void* begin, size_t size);
void __asan_unpoison_memory_region(const volatile void* begin, size_t size);
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* place);
void __tsan_release(void* place);
}

namespace emulator {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool ASAN = true, TSAN = false;
#elif defined(__SANITIZE_THREAD__)
constexpr bool ASAN = false, TSAN = true;
#else
constexpr bool ASAN = false, TSAN = false;
#endif
constexpr size_t PAGE = 4096;

struct Sanitized {  // what a fiber carries for the sanitizers
    const void* stack = nullptr;
    size_t stack_size = 0;
    void* asan = nullptr;
    void* tsan = nullptr;
};

namespace sanitizer {

// A switch between fibers orders nothing for TSan: only barriers do.
UNWATCHED inline void switch_tsan(const Sanitized& to) {
    constexpr unsigned unordered = 1;
    if (TSAN) __tsan_switch_to_fiber(to.tsan, unordered);
}

UNWATCHED inline void before_switch(Sanitized& from, const Sanitized& to, bool for_good) {
    if (ASAN)
        __sanitizer_start_switch_fiber(for_good ? nullptr : &from.asan, to.stack, to.stack_size);
    switch_tsan(to);
}

UNWATCHED inline void after_switch(Sanitized& from, Sanitized& to) {
    if (ASAN) __sanitizer_finish_switch_fiber(to.asan, &from.stack, &from.stack_size);
}

UNWATCHED inline void allow(const void* begin, size_t size) {
    if (ASAN) __asan_unpoison_memory_region(begin, size);
}

UNWATCHED inline void forbid(const void* begin, size_t size) {
    if (ASAN) __asan_poison_memory_region(begin, size);
}

// Happens-before: a thread that acquires a place sees all that others did before they released it.
UNWATCHED inline void release(void* place) {
    if (TSAN) __tsan_release(place);
}

UNWATCHED inline void acquire(void* place) {
    if (TSAN) __tsan_acquire(place);
}

// A place for every barrier of a block and of its warps. Each barrier has two, used in turn: a
// thread that leaves late must not see what others do on their way to the next barrier. The places
// are new for every block, because blocks that shared them would count as ordered.
struct Places {
    long block[2], warp[1024][2];
};
inline Places* places;

// Makes TSan forget who touched this memory, as it does when new pages are mapped.
UNWATCHED inline void forget(unsigned char* first_page, size_t size) {
    if (!TSAN || !size) return;
    unsigned char others[PAGE];  // what else lies on the last page
    size_t rest = (PAGE - size % PAGE) % PAGE;
    for (size_t i = 0; i < rest; i++) others[i] = first_page[size + i];
    if (mmap(first_page, size + rest, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED) {
        perror("emulator: mmap");
        abort();
    }
    for (size_t i = 0; i < rest; i++) first_page[size + i] = others[i];
}

// TSan's fibers are kept, since a new one takes a millisecond, and blocks take turns with them.
// Only blocks that use the same fibers count as ordered. They are 1024 threads apart, and at least
// two blocks.
PROCESS_WIDE void* tsan_fibers[2048];
inline char begun, finished;

UNWATCHED inline void begin_launch(Sanitized& scheduler) {
    if (TSAN) scheduler.tsan = __tsan_get_current_fiber();
}

UNWATCHED inline void begin_block() {
    if (TSAN) places = new Places;
    release(&begun);
}

UNWATCHED inline void begin_thread(Sanitized& thread, const Sanitized& scheduler, unsigned fiber,
                                   const char* name) {
    if (!TSAN) return;
    if (!tsan_fibers[fiber]) tsan_fibers[fiber] = __tsan_create_fiber(0);
    thread.tsan = tsan_fibers[fiber];
    __tsan_set_fiber_name(thread.tsan, name);
    switch_tsan(thread);
    acquire(&begun);
    switch_tsan(scheduler);
}

UNWATCHED inline void end_thread(const Sanitized& thread, const Sanitized& scheduler) {
    if (!TSAN) return;
    switch_tsan(thread);
    release(&finished);
    switch_tsan(scheduler);
}

UNWATCHED inline void end_block() {
    if (TSAN) delete places;
}

UNWATCHED inline void end_launch() { acquire(&finished); }

}  // namespace sanitizer
}  // namespace emulator
