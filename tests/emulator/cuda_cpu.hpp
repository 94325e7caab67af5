// Runs CUDA C on the CPU: g++ includes this file before a kernel's source. A keyword becomes a
// macro, a thread a fiber (fibers.hpp); the threads of a block take turns on one OS thread
// (block.hpp), and blocks run one after another.
#pragma once
#define MLM_EMULATED

#include <utility>
#include <vector>

#include "numbers.hpp"
#include "warp.hpp"

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __constant__ static __attribute__((unused))
#define __restrict__ __restrict
#define __launch_bounds__(...)
// Shared memory whose size the launch gives; for CUDA a macro around extern __shared__.
#define DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(emulator::dynamic_shared)

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

inline void __syncthreads(emulator::Where where = emulator::Where::current()) {
    emulator::block_barrier(where);
}

namespace emulator {

// CuPy compiles with -ftz=true: float32 denormals count as zero. So does the CPU, for a while.
class FlushDenormals {
#if defined(__x86_64__)
    static constexpr unsigned FTZ_DAZ = 0x8040;
    unsigned saved = __builtin_ia32_stmxcsr();

  public:
    FlushDenormals() { __builtin_ia32_ldmxcsr(saved | FTZ_DAZ); }
    ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved); }
#elif defined(__aarch64__)
    static constexpr unsigned FZ = 1u << 24;
    unsigned saved = __builtin_aarch64_get_fpcr();

  public:
    FlushDenormals() { __builtin_aarch64_set_fpcr(saved | FZ); }
    ~FlushDenormals() { __builtin_aarch64_set_fpcr(saved); }
#endif
};

// Runs every block; an order other than 0 seeds a random order of blocks and threads.
UNWATCHED inline void run_grid(unsigned long order) {
    std::vector<unsigned> blocks(size_t(grid_size.x) * grid_size.y * grid_size.z);
    std::iota(blocks.begin(), blocks.end(), 0);
    std::minstd_rand random(order);
    if (order) std::shuffle(blocks.begin(), blocks.end(), random);
    for (unsigned block : blocks) {
        block_index = {block % grid_size.x, block / grid_size.x % grid_size.y,
                       block / grid_size.x / grid_size.y};
        run_block(order ? &random : nullptr);
        if (failed) break;
    }
}

// Runs `body` on a grid; returns what went wrong, or null.
UNWATCHED inline const char* launch(const unsigned* shape, size_t shared, unsigned long order) {
    [[maybe_unused]] FlushDenormals flush;
    grid_size = {shape[0], shape[1], shape[2]};
    block_size = {shape[3], shape[4], shape[5]};
    thread_count = block_size.x * block_size.y * block_size.z;
    dynamic_size = shared;
    blocks_begun = 0;
    failed = false;
    for (Copies& thread : copies) thread = {};
    sanitizer::begin_launch(scheduler);
    sanitizer::forbid(dynamic_shared + shared, sizeof dynamic_shared - shared);
    run_grid(order);
    sanitizer::allow(dynamic_shared, sizeof dynamic_shared);
    sanitizer::end_launch();
    return failed ? message : nullptr;
}

inline void** arguments;  // where each lies

template <class... A, size_t... i> void call(void (*kernel)(A...), std::index_sequence<i...>) {
    kernel(*static_cast<A*>(arguments[i])...);
}

template <class... A> std::index_sequence_for<A...> numbered(void (*)(A...)) { return {}; }

// The size of each parameter in bytes, negative for a pointer; returns their number.
template <class... A> int parameters(void (*)(A...), int* sizes) {
    ((*sizes++ = std::is_pointer_v<A> ? -int(sizeof(A)) : int(sizeof(A))), ...);
    return sizeof...(A);
}

}  // namespace emulator

#define EXPORT_KERNEL(name)                                                               \
    extern "C" __attribute__((visibility("default"))) const char* launch_##name(          \
        const unsigned* shape, size_t shared, unsigned long order, void** arguments) {    \
        emulator::arguments = arguments;                                                  \
        emulator::body = [] { emulator::call(name, emulator::numbered(name)); };          \
        return emulator::launch(shape, shared, order);                                    \
    }                                                                                     \
    extern "C" __attribute__((visibility("default"))) int parameters_##name(int* sizes) { \
        return emulator::parameters(name, sizes);                                         \
    }
