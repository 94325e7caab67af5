// Copies from global to shared memory that a thread starts and later waits for (cp.async). On a GPU
// they land at any time in between. Here the destination is NaN from the start of a copy and gets
// its value as late as possible, at the wait. So who reads too early gets NaN. The thread itself
// writes both, so ThreadSanitizer sees a race with another thread.
#pragma once
#include "block.hpp"
#include "numbers.hpp"

namespace emulator {

// Notes a copy that the current thread starts.
UNWATCHED inline void note_copy(const Copy& copy, Where where) {
    current->where = where;
    if (current->copying == MAX_COPIES) {
        fail(*current, "more than %u copies under way", MAX_COPIES);
        wait(State::left);
    }
    current->copies[current->copying++] = copy;
}

// A copy under way, by its number. After the last comes one of no bytes; then none is under way.
UNWATCHED inline Copy take_copy(unsigned number) {
    if (number < current->copying) return current->copies[number];
    current->copying = 0;
    return {};
}

// Writes numbers of that size, so that a sanitizer sees an address that does not fit.
template <class Number> void write(void* to, const void* from, Number otherwise) {
    *static_cast<Number*>(to) = from ? *static_cast<const Number*>(from) : otherwise;
}

inline void write(const Copy& copy, unsigned otherwise) {
    uint4 four = {otherwise, otherwise, otherwise, otherwise};
    if (copy.bytes == 4) write(copy.to, copy.from, otherwise);
    else write(copy.to, copy.from, four);
}

}  // namespace emulator

template <int BYTES>
void load_async(void* to, const void* from, bool exists,
                emulator::Where where = emulator::Where::current()) {
    static_assert(BYTES == 4 || BYTES == 16);
    emulator::write({to, nullptr, BYTES}, ~0u);
    emulator::note_copy({to, exists ? from : nullptr, BYTES}, where);
}

inline void wait_async() {
    for (unsigned i = 0;; i++) {
        emulator::Copy copy = emulator::take_copy(i);
        if (!copy.bytes) break;
        emulator::write(copy, 0);
    }
}
