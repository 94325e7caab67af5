// What the lanes of a warp do together: shuffles, votes, __syncwarp, the tensor core's product.
#pragma once
#include <type_traits>

#include "block.hpp"
#include "numbers.hpp"

namespace emulator {

struct Lane {
    unsigned mask;      // of the collective that it waits in
    unsigned meetings;  // collectives whose mask's lowest lane it was
    unsigned brought[6], shown[6];
};
inline Lane lanes[MAX_THREADS];

UNWATCHED inline void copy(void* to, const void* from, size_t size) {
    for (size_t i = 0; i < size; i++)
        static_cast<unsigned char*>(to)[i] = static_cast<const unsigned char*>(from)[i];
}

UNWATCHED inline unsigned lane() { return current->number % 32; }

// Fails unless lane `other` can still come to the collective that the current lane has come to.
UNWATCHED inline void check_lane(const Thread* warp, unsigned other, unsigned mask) {
    const Thread& thread = warp[other];
    if (&thread >= threads + thread_count || thread.state == State::left)
        fail(*current, "mask 0x%08x names lane %u, which has returned or never was", mask, other);
    else if (thread.state == State::in_warp &&
             (lanes[thread.number].mask != mask || !same_place(thread.where, current->where)))
        fail(*current, "mask 0x%08x names lane %u, which waits with mask 0x%08x at %s:%u", mask,
             other, lanes[thread.number].mask, thread.where.file_name(),
             unsigned(thread.where.line()));
}

// Every lane of `mask` brings some bytes, and none goes on before all have come. Returns the lanes
// of the warp; `shown` is what each brought. Orders memory only if `fence` is set.
UNWATCHED inline const Lane* meet(unsigned mask, const void* value, size_t size, Where where,
                                  bool fence = false) {
    unsigned me = lane(), first = current->number - me;
    Thread* warp = threads + first;
    Lane* all = lanes + first;
    current->where = where;
    if (!(mask >> me & 1)) fail(*current, "mask 0x%08x leaves out lane %u, which calls", mask, me);
    bool complete = true;
    for (unsigned i = 0; i < 32; i++) {
        if (i == me || !(mask >> i & 1)) continue;
        check_lane(warp, i, mask);
        complete = complete && warp[i].state == State::in_warp;
    }
    if (failed) wait(State::left);

    Lane& leader = all[__builtin_ctz(mask)];
    long* place = nullptr;
    if (TSAN && fence) place = &sanitizer::places->warp[&leader - lanes][leader.meetings % 2];
    if (place) sanitizer::release(place);
    all[me].mask = mask;
    copy(all[me].brought, value, size);
    if (complete) {
        leader.meetings++;
        for (unsigned i = 0; i < 32; i++) {
            if (!(mask >> i & 1)) continue;
            copy(all[i].shown, all[i].brought, size);
            warp[i].state = State::ready;
        }
    } else {
        wait(State::in_warp);
    }
    if (place) sanitizer::acquire(place);
    return all;
}

// What lane `source` brought.
template <class T> UNWATCHED T shuffle(unsigned mask, T value, unsigned source, Where where) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    const Lane* all = meet(mask, &value, sizeof value, where);
    if (!(mask >> source & 1)) {
        fail(*current, "reads lane %u, which mask 0x%08x leaves out", source, mask);
        wait(State::left);
    }
    copy(&value, all[source].shown, sizeof value);
    return value;
}

// The lanes that exchange values with the current one: `width` neighbours.
struct Segment {
    unsigned first, last;
};
UNWATCHED inline Segment segment(unsigned width) {
    unsigned first = lane() / width * width;
    return {first, first + width - 1};
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              emulator::Where where = emulator::Where::current()) {
    return emulator::shuffle(mask, value, emulator::segment(width).first + unsigned(source) % width,
                             where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  emulator::Where where = emulator::Where::current()) {
    unsigned me = emulator::lane(), source = me ^ bits;
    if (source > emulator::segment(width).last) source = me;
    return emulator::shuffle(mask, value, source, where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32,
                   emulator::Where where = emulator::Where::current()) {
    unsigned me = emulator::lane(), source = me + distance;
    if (source > emulator::segment(width).last) source = me;
    return emulator::shuffle(mask, value, source, where);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32,
                 emulator::Where where = emulator::Where::current()) {
    unsigned me = emulator::lane();
    bool inside = me >= emulator::segment(width).first + distance;
    return emulator::shuffle(mask, value, inside ? me - distance : me, where);
}

inline void __syncwarp(unsigned mask = ~0u, emulator::Where where = emulator::Where::current()) {
    emulator::meet(mask, nullptr, 0, where, true);
}

UNWATCHED inline unsigned __ballot_sync(unsigned mask, int predicate,
                                        emulator::Where where = emulator::Where::current()) {
    unsigned vote = predicate != 0;
    const emulator::Lane* all = emulator::meet(mask, &vote, sizeof vote, where);
    unsigned votes = 0;
    for (unsigned i = 0; i < 32; i++)
        if (mask >> i & 1) votes |= all[i].shown[0] << i;
    return votes;
}

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32: d[16,8] += a[16,16] b[16,8].
// With group = lane / 4 and pair = lane % 4, two neighbouring bf16 in each 32-bit register:
//   a[i]: row group + 8 (i % 2), columns 2 pair + 8 (i / 2) and the next
//   b[i]: rows 2 pair + 8 i and the next, column group
//   d[i]: row group + 8 (i / 2), column 2 pair + i % 2
UNWATCHED inline void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4],
                                        const unsigned (&b)[2],
                                        emulator::Where where = emulator::Where::current()) {
    unsigned registers[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const emulator::Lane* all = emulator::meet(~0u, registers, sizeof registers, where);
    auto element = [all](unsigned lane, unsigned number, unsigned odd) {
        unsigned pair = all[lane].shown[number];
        return __uint_as_float(odd ? pair & 0xFFFF0000 : pair << 16);
    };
    unsigned group = emulator::lane() / 4, pair = emulator::lane() % 4;
    float left[2][16], right[2][16];  // two rows of a, two columns of b
    for (unsigned i = 0; i < 2; i++)
        for (unsigned k = 0; k < 16; k++) {
            left[i][k] = element(4 * group + k % 8 / 2, i + 2 * (k / 8), k % 2);
            right[i][k] = element(4 * (2 * pair + i) + k % 8 / 2, 4 + k / 8, k % 2);
        }
    for (unsigned i = 0; i < 4; i++)
        for (unsigned k = 0; k < 16; k++) d[i] += left[i / 2][k] * right[i % 2][k];
}

// ldmatrix.sync.aligned.m8n8.x4: lane l has the address of row l % 8 of matrix l / 8; r[i] is of
// matrix i, row lane / 4, columns 2 (lane % 4) and the next.
inline void ldmatrix_x4(unsigned (&r)[4], const void* row,
                        emulator::Where where = emulator::Where::current()) {
    uint4 own = *static_cast<const uint4*>(row);  // 8 numbers, read by the kernel's thread
    const emulator::Lane* all = emulator::meet(~0u, &own, sizeof own, where);
    for (unsigned i = 0; i < 4; i++)
        r[i] = all[8 * i + emulator::lane() / 4].shown[emulator::lane() % 4];
}

// The same with .trans: rows 2 (lane % 4) and the next, column lane / 4.
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row,
                              emulator::Where where = emulator::Where::current()) {
    uint4 own = *static_cast<const uint4*>(row);
    const emulator::Lane* all = emulator::meet(~0u, &own, sizeof own, where);
    unsigned column = emulator::lane() / 4, pair = emulator::lane() % 4;
    for (unsigned i = 0; i < 4; i++) {
        auto number = [&](unsigned row) {
            return all[8 * i + row].shown[column / 2] >> 16 * (column % 2) & 0xFFFF;
        };
        r[i] = number(2 * pair) | number(2 * pair + 1) << 16;
    }
}
