// Copies from global to shared memory that a thread starts and later waits for (cp.async). On a GPU
// they land at any time in between. Here the destination is NaN from the start of a copy and gets
// its value as late as it may, at the wait, both written by the thread: who reads too early gets
// NaN, and a race with another thread is one that ThreadSanitizer sees.
#pragma once
#include <vector>

#include "block.hpp"
#include "numbers.hpp"

namespace emulator {

struct Copy {
    void* to;
    const void* from;  // null: zeros
    int bytes;
};
inline std::vector<Copy> under_way[MAX_THREADS];  // of each thread

// As its kind of number, so that an address which does not fit it is seen.
template <class Number> void write(void* to, const void* from, Number otherwise) {
    *static_cast<Number*>(to) = from ? *static_cast<const Number*>(from) : otherwise;
}

template <int BYTES> void write_bytes(void* to, const void* from, unsigned otherwise) {
    static_assert(BYTES == 4 || BYTES == 16);
    unsigned u = otherwise;
    if constexpr (BYTES == 4) write<unsigned>(to, from, u);
    else write<uint4>(to, from, {u, u, u, u});
}

}  // namespace emulator

template <int BYTES> void load_async(void* to, const void* from, bool exists) {
    emulator::write_bytes<BYTES>(to, nullptr, ~0u);
    emulator::under_way[emulator::current->number].push_back(
        {to, exists ? from : nullptr, BYTES});
}

inline void wait_async() {
    auto& copies = emulator::under_way[emulator::current->number];
    for (const emulator::Copy& copy : copies)
        if (copy.bytes == 4) emulator::write_bytes<4>(copy.to, copy.from, 0);
        else emulator::write_bytes<16>(copy.to, copy.from, 0);
    copies.clear();
}
