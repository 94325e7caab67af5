// One block of CUDA threads: its shared memory, its barrier, and the order its threads run in.
// Every thread is a fiber. It runs until it has to wait; then the scheduler picks the next.
// What a GPU would leave undefined, or hang on, is a fault: it ends the launch with a message.
#pragma once
#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <source_location>

#include "fibers.hpp"

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

// Static shared memory lies in a section of its own, so that each block finds it unwritten.
#define __shared__ static __attribute__((section("cuda_shared")))
extern "C" unsigned char __start_cuda_shared[] __attribute__((visibility("hidden")));
extern "C" unsigned char __stop_cuda_shared[] __attribute__((visibility("hidden")));

namespace emulator {

using Where = std::source_location;
enum class State { ready, at_barrier, in_warp, left };

constexpr unsigned MAX_THREADS = MAX_FIBERS, MAX_COPIES = 64;
constexpr size_t MAX_SHARED = 227 << 10;

struct Copy {  // to shared memory, started and not yet waited for: copies.hpp
    void* to;
    const void* from;  // null: zeros
    int bytes;
};

struct Thread : Fiber {
    uint3 index;
    unsigned number;  // x runs fastest; 32 neighbours are a warp
    State state;
    Where where;  // the barrier or collective that it is in or was in last
    Copy copies[MAX_COPIES];
    unsigned copying;
};

inline dim3 grid_size, block_size;
inline uint3 block_index;
inline Thread threads[MAX_THREADS];
inline Thread* current;
inline Fiber scheduler;
inline unsigned thread_count, waiting, left;  // waiting: at the barrier
inline unsigned barriers_opened, blocks_begun;
inline void (*body)();  // calls the kernel
inline bool failed;
inline char message[1024];

alignas(PAGE) inline unsigned char dynamic_shared[(MAX_SHARED + PAGE - 1) / PAGE * PAGE];
inline size_t dynamic_size;
alignas(PAGE) __shared__ __attribute__((used)) unsigned char first_of_section;

// Ends the launch with what `thread` did wrong at the place it is in.
UNWATCHED [[gnu::format(printf, 2, 3)]] inline void fail(const Thread& thread, const char* format,
                                                         ...) {
    if (failed) return;
    failed = true;
    uint3 t = thread.index, b = block_index;
    int used = snprintf(message, sizeof message,
                        "%s:%u: thread (%u,%u,%u) of block (%u,%u,%u): ", thread.where.file_name(),
                        unsigned(thread.where.line()), t.x, t.y, t.z, b.x, b.y, b.z);
    va_list values;
    va_start(values, format);
    if (used < int(sizeof message))
        vsnprintf(message + used, sizeof message - used, format, values);
    va_end(values);
}

// Leaves the running thread until its state is `ready` again.
UNWATCHED inline void wait(State state) {
    current->state = state;
    switch_fiber(*current, scheduler, state == State::left);
}

UNWATCHED inline bool same_place(const Where& a, const Where& b) {
    return a.line() == b.line() && a.column() == b.column() &&
           (a.file_name() == b.file_name() || !strcmp(a.file_name(), b.file_name()));
}

UNWATCHED inline void block_barrier(Where where) {
    long* place = TSAN ? &sanitizer::places->block[barriers_opened % 2] : nullptr;
    current->where = where;
    sanitizer::release(place);
    waiting++;
    wait(State::at_barrier);
    sanitizer::acquire(place);
}

// All threads that have not left wait at the barrier: lets them go on.
UNWATCHED inline void open_barrier() {
    const Thread* first = nullptr;
    for (unsigned i = 0; i < thread_count; i++) {
        Thread& thread = threads[i];
        if (thread.state != State::at_barrier) continue;
        if (!first) first = &thread;
        if (!same_place(thread.where, first->where))
            fail(thread, "waits at this __syncthreads(), thread (%u,%u,%u) at that of %s:%u",
                 first->index.x, first->index.y, first->index.z, first->where.file_name(),
                 unsigned(first->where.line()));
        thread.state = State::ready;
    }
    if (left)
        fail(*first, "__syncthreads() in a block of which %u of %u threads have already returned",
             left, thread_count);
    waiting = 0;
    barriers_opened++;
}

UNWATCHED inline void fail_deadlock() {
    const Thread* thread = std::find_if(threads, threads + thread_count,
                                        [](auto& t) { return t.state == State::in_warp; });
    fail(*thread,
         "deadlock: waits for its warp, while %u of %u threads wait at __syncthreads() and "
         "%u have returned",
         waiting, thread_count, left);
}

UNWATCHED inline void thread_entry() {
    sanitizer::after_switch(scheduler, *current);
    body();
    left++;
    wait(State::left);
    __builtin_trap();
}

UNWATCHED inline void begin_thread(Thread& thread) {
    uint3 b = block_index, size = {block_size.x, block_size.y, block_size.z};
    unsigned n = thread.number;
    thread.index = {n % size.x, n / size.x % size.y, n / size.x / size.y};
    thread.state = State::ready;
    thread.copying = 0;
    start_fiber(thread, n, thread_entry);

    unsigned blocks_apart = std::max(2u, MAX_THREADS / thread_count);
    char name[64] = "";
    if (TSAN)
        snprintf(name, sizeof name, "(%u,%u,%u) of block (%u,%u,%u)", thread.index.x,
                 thread.index.y, thread.index.z, b.x, b.y, b.z);
    sanitizer::begin_thread(thread, scheduler, blocks_begun % blocks_apart * thread_count + n,
                            name);
}

// Unwritten shared memory: all bits set, which is NaN in every floating-point type.
UNWATCHED inline void clear_shared() {
    sanitizer::forget(__start_cuda_shared, __stop_cuda_shared - __start_cuda_shared);
    sanitizer::forget(dynamic_shared, dynamic_size);
    for (unsigned char* p = __start_cuda_shared; p < __stop_cuda_shared; p++) *p = 0xFF;
    for (size_t i = 0; i < dynamic_size; i++) dynamic_shared[i] = 0xFF;
}

// Runs the block. With a generator of random numbers, its threads take turns in random order.
UNWATCHED inline void run_block(std::minstd_rand* random) {
    clear_shared();
    sanitizer::begin_block();
    unsigned order[MAX_THREADS];
    for (unsigned i = 0; i < thread_count; i++) {
        order[i] = threads[i].number = i;
        begin_thread(threads[i]);
    }
    left = waiting = 0;
    while (left < thread_count && !failed) {
        bool progress = false;
        if (random) std::shuffle(order, order + thread_count, *random);
        for (unsigned i = 0; i < thread_count && !failed; i++) {
            current = &threads[order[i]];
            if (current->state != State::ready) continue;
            progress = true;
            switch_fiber(scheduler, *current);
        }
        if (failed) break;
        if (waiting && waiting + left == thread_count)
            open_barrier();
        else if (!progress)
            fail_deadlock();
    }
    for (unsigned i = 0; i < thread_count; i++) sanitizer::end_thread(threads[i], scheduler);
    sanitizer::end_block();
    blocks_begun++;
}

}  // namespace emulator
