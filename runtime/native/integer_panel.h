// Sums of codes times 8-bit inputs, for a few panels and tokens: exact integers, scaled once a group. panel_kernels.h
// tells of the vectors V.
//
// A code vector holds 8 / W quads of columns, one at each position of its bytes. A product takes its codes by one AND:
// they stay at their bits, where they count 2^(their lowest bit) times, and each of V::kPlaces positions has a sum of
// its own, shifted back once a group. Only what lies beyond those positions is shifted down first. No sum leaves 32
// bits, as codes at their bits are no larger than a byte (panels.h).
//
// V::kRows rows of a panel are a strip. Several strips pass at once: each input is loaded once for all of them. Where
// they are of two panels, memory is also read faster in two streams than in one.

#ifndef PREQUANT_INTEGER_PANEL_H
#define PREQUANT_INTEGER_PANEL_H

#include "kernels.h"
#include "unroll.h"

namespace {

using namespace prequant;

// Codes are asked for so many bytes before their turn. Left to itself, the processor looks ahead no further than the
// page, and waits for memory longer than it computes.
constexpr int64_t kAhead = 2048;

// The sums of a plane of W bits, for N strips and M tokens: kChains of each, so that no product waits for the last one.
template <class V, int W, int N, int M, int kChains> struct IntegerPlane {
    static constexpr int kCodes = 8 / W;  // in a byte
    static constexpr int kPlaces = smallest(kChains, V::template kPlaces<W>);

    typename V::Ints sums[N][M][kChains];

    PREQUANT_INLINE void clear() {
        PREQUANT_UNROLL
        for (int n = 0; n < N; ++n) {
            for (int m = 0; m < M; ++m) {
                for (int c = 0; c < kChains; ++c) sums[n][m][c] = V::zero();
            }
        }
    }

    // The products of one block; its plane begins `offset` bytes after `blocks`.
    PREQUANT_INLINE void add(const uint8_t *const (&blocks)[N], int offset, const int8_t *inputs, int64_t stride) {
        typename V::template Products<W> products[N][M] = {};
        PREQUANT_UNROLL
        for (int v = 0; v < W; ++v) {
            typename V::Codes bytes[N];
            PREQUANT_UNROLL
            for (int n = 0; n < N; ++n) bytes[n] = V::load(blocks[n] + offset + v * kVector);
            PREQUANT_UNROLL
            for (int p = 0; p < kCodes; ++p) {
                const int quad = v * kCodes + p, place = p % kPlaces;
                typename V::Codes codes[N];
                PREQUANT_UNROLL
                for (int n = 0; n < N; ++n) codes[n] = V::template codes<W>(bytes[n], p - place, place);
                PREQUANT_UNROLL
                for (int m = 0; m < M; ++m) {
                    const auto four = V::four(inputs + m * stride + 4 * quad);
                    PREQUANT_UNROLL
                    for (int n = 0; n < N; ++n) V::dot(products[n][m], sums[n][m][quad % kChains], codes[n], four);
                }
            }
        }
        PREQUANT_UNROLL
        for (int n = 0; n < N; ++n) {
            for (int m = 0; m < M; ++m) V::settle(products[n][m], sums[n][m][0]);
        }
    }

    // The sum over all positions, 2^Low times.
    template <int Low> PREQUANT_INLINE typename V::Ints total(int n, int m) const {
        typename V::Ints total = V::zero();
        PREQUANT_UNROLL
        for (int place = 0; place < kPlaces; ++place) {
            typename V::Ints sum = sums[n][m][place];
            for (int c = place + kPlaces; c < kChains; c += kPlaces) sum = V::add(sum, sums[n][m][c]);
            const int shift = place * W - Low;
            total = V::add(total, shift > 0 ? V::right(sum, shift) : V::left(sum, -shift));
        }
        return total;
    }
};

// Nothing: what a list of planes ends with.
template <class V, int N, int M, int kChains> struct IntegerPlane<V, 0, N, M, kChains> {
    PREQUANT_INLINE void clear() {}
    PREQUANT_INLINE void add(const uint8_t *const (&)[N], int, const int8_t *, int64_t) {}
    template <int> PREQUANT_INLINE typename V::Ints total(int, int) const { return V::zero(); }
};

template <class V, int B, int N, int M> struct IntegerPlanes {
    static constexpr Planes P = planes_of(B);
    static constexpr int kSecond = P.width[0], kThird = P.width[0] + P.width[1], kChains = V::template kChains<B, M>;

    IntegerPlane<V, P.width[0], N, M, kChains> lowest;
    IntegerPlane<V, P.width[1], N, M, kChains> middle;
    IntegerPlane<V, P.width[2], N, M, kChains> highest;

    PREQUANT_INLINE void clear() {
        lowest.clear();
        middle.clear();
        highest.clear();
    }

    PREQUANT_INLINE void add(const uint8_t *const (&blocks)[N], const int8_t *inputs, int64_t stride) {
        lowest.add(blocks, 0, inputs, stride);
        middle.add(blocks, kSecond * kVector, inputs, stride);
        highest.add(blocks, kThird * kVector, inputs, stride);
    }

    template <int Low> PREQUANT_INLINE typename V::Ints total(int n, int m) const {
        const auto lower = V::add(lowest.template total<Low>(n, m), middle.template total<Low + kSecond>(n, m));
        return V::add(lower, highest.template total<Low + kThird>(n, m));
    }
};

// Products of V::kStrips strips, from the `strip`th of these panels on, with M tokens: into `out` [panels][M][16].
template <class V, int B, int M>
void integer_strips(const Job &job, const int64_t (&panels)[V::kPanels], int strip, int64_t token,
                    float (*out)[kPanelRows]) {
    constexpr int N = V::template kStrips<B, M>, kOfPanel = kPanelRows / V::kRows;
    const PanelsHeader &h = *job.panels.header;
    const int64_t stride = job.stride;
    const int64_t to_zeros = job.panels.zeros ? job.panels.zeros - job.panels.scales : 0;
    const int64_t to_sums = job.sums - job.offsets;
    const int64_t in_groups = h.groups * h.group_blocks;  // blocks: the padding has no scales, and needs none
    const bool doubled = h.multiple == 2;
    typename V::Floats sums[N][M];
    for (int n = 0; n < N; ++n) {
        for (int m = 0; m < M; ++m) sums[n][m] = V::float_zero();
    }
    for (int64_t term = 0; term < h.terms; ++term) {
        // Few pointers: what the loop over groups keeps has to fit the processor's registers.
        const uint8_t *blocks[N];
        const float *scales[N];
        for (int n = 0; n < N; ++n) {
            const int64_t place = panels[(strip + n) / kOfPanel] * h.terms + term;
            const int64_t row = (strip + n) % kOfPanel * V::kRows;
            blocks[n] = job.panels.codes + place * h.blocks * B * kVector + row * 4;
            scales[n] = job.panels.scales + place * h.groups * kPanelRows + row;
        }
        const int8_t *inputs = job.codes + token * stride;
        const int32_t *offsets = job.offsets + token * h.groups;
        for (int64_t left = in_groups < h.blocks ? in_groups : h.blocks; left > 0; left -= h.group_blocks, ++offsets) {
            IntegerPlanes<V, B, N, M> planes;
            planes.clear();
            for (int64_t block = left < h.group_blocks ? left : h.group_blocks; block > 0; --block) {
                planes.add(blocks, inputs, stride);
                inputs += kBlockColumns;
                for (int n = 0; n < N; ++n) {
                    for (int line = 0; line < B && n % kOfPanel == 0; ++line) {
                        __builtin_prefetch(blocks[n] + kAhead + line * kVector);
                    }
                    blocks[n] += B * kVector;
                }
            }
            for (int m = 0; m < M; ++m) {
                const auto offset = V::spread(offsets[m * h.groups]);
                for (int n = 0; n < N; ++n) {
                    const auto products = doubled ? planes.template total<1>(n, m) : planes.template total<0>(n, m);
                    auto value = V::to_float(V::add(products, offset));
                    if (to_zeros) {
                        const auto input_sum = V::spread(static_cast<float>(offsets[to_sums + m * h.groups]));
                        value = V::negative_multiply_add(V::load_floats(scales[n] + to_zeros), input_sum, value);
                    }
                    sums[n][m] = V::multiply_add(value, V::load_floats(scales[n]), sums[n][m]);
                }
            }
            for (int n = 0; n < N; ++n) scales[n] += kPanelRows;
        }
    }
    for (int n = 0; n < N; ++n) {
        const int place = strip + n;
        for (int m = 0; m < M; ++m) V::store(out[place / kOfPanel * M + m] + place % kOfPanel * V::kRows, sums[n][m]);
    }
}

}  // namespace

#endif
