// The kernels on panels (panels.h), written once over the vectors V of an instruction set. Each unit that includes this
// gets a copy of its own, compiled with its own flags: hence the unnamed namespace.
//
// V::kRows   rows of a panel that a vector holds: 16, or 8 for half a panel at a time
// V::kChains accumulators that an integer product of one token is spread over, so that none waits for the last
// V::kTokens tokens that are multiplied with codes unpacked once

#ifndef PREQUANT_PANEL_KERNELS_H
#define PREQUANT_PANEL_KERNELS_H

#include <cstring>

#include "kernels.h"
#include "neutral_rows.h"
#include "results.h"
#include "tokens.h"

namespace {

using namespace prequant;

// A unit that is to be small rather than fast defines these as less.
#ifndef PREQUANT_INLINE
#define PREQUANT_INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define PREQUANT_UNROLL _Pragma("unroll")
#else
#define PREQUANT_UNROLL _Pragma("GCC unroll 16")
#endif
#endif

// ---- products -------------------------------------------------------------------------------------------------------

// Sums of codes times 8-bit inputs over the blocks of a group: the part of one plane of W bits, for M tokens.
template <class V, int W, int M> struct IntegerPlane {
    static constexpr int kChains = V::kChains / M > 0 ? V::kChains / M : 1;
    static constexpr int kCodes = 8 / W;  // in a byte
    // With a chain for each position in the byte, codes may stay at their bits: the sum is shifted once, at the end.
    static constexpr bool kInPlace = V::kInPlace && kChains % kCodes == 0;

    typename V::Ints sums[M][kChains];

    PREQUANT_INLINE void clear() {
        for (int m = 0; m < M; ++m) {
            for (int c = 0; c < kChains; ++c) sums[m][c] = V::zero();
        }
    }

    PREQUANT_INLINE void add(const uint8_t *plane, const int8_t *inputs, int64_t stride) {
        PREQUANT_UNROLL
        for (int v = 0; v < W; ++v) {
            const typename V::Codes bytes = V::load(plane + v * kVector);
            PREQUANT_UNROLL
            for (int p = 0; p < kCodes; ++p) {
                const int quad = v * kCodes + p;
                const auto codes = kInPlace ? V::template masked<W>(bytes, p) : V::template low<W>(bytes, p);
                PREQUANT_UNROLL
                for (int m = 0; m < M; ++m) {
                    auto &sum = sums[m][quad % kChains];
                    sum = V::template dot<kInPlace ? 8 : W>(sum, codes, inputs + m * stride + 4 * quad);
                }
            }
        }
    }

    PREQUANT_INLINE typename V::Ints total(int m) const {
        typename V::Ints sum = V::zero();
        for (int c = 0; c < kChains; ++c) sum = V::add(sum, kInPlace ? V::right(sums[m][c], c % kCodes * W) : sums[m][c]);
        return sum;
    }
};

// Nothing: what a list of planes ends with.
template <class V, int M> struct IntegerPlane<V, 0, M> {
    PREQUANT_INLINE void clear() {}
    PREQUANT_INLINE void add(const uint8_t *, const int8_t *, int64_t) {}
    PREQUANT_INLINE typename V::Ints total(int) const { return V::zero(); }
};

template <class V, int B, int M>
void integer_panel(const Job &job, int64_t panel, int64_t token, float (*out)[kPanelRows]) {
    constexpr Planes P = planes_of(B);
    const PanelsHeader &h = *job.panels.header;
    const int8_t *inputs = job.codes + token * job.stride;
    for (int half = 0; half < kPanelRows / V::kRows; ++half) {
        typename V::Floats sums[M];
        for (int m = 0; m < M; ++m) sums[m] = V::float_zero();
        for (int64_t term = 0; term < h.terms; ++term) {
            const int64_t place = panel * h.terms + term;
            const uint8_t *codes = job.panels.codes + place * h.blocks * B * kVector + half * 4 * V::kRows;
            for (int64_t g = 0; g < h.groups; ++g) {
                const int64_t first = g * h.group_blocks, end = first + h.group_blocks;
                IntegerPlane<V, P.width[0], M> lowest;
                IntegerPlane<V, P.width[1], M> middle;
                IntegerPlane<V, P.width[2], M> highest;
                lowest.clear();
                middle.clear();
                highest.clear();
                for (int64_t block = first; block < (end < h.blocks ? end : h.blocks); ++block) {
                    const uint8_t *planes = codes + block * B * kVector;
                    const int8_t *of_block = inputs + block * kBlockColumns;
                    lowest.add(planes, of_block, job.stride);
                    middle.add(planes + P.width[0] * kVector, of_block, job.stride);
                    highest.add(planes + (P.width[0] + P.width[1]) * kVector, of_block, job.stride);
                }
                const int64_t of_group = (place * h.groups + g) * kPanelRows + half * V::kRows;
                for (int m = 0; m < M; ++m) {
                    const int32_t input_sum = job.sums[(token + m) * h.groups + g];
                    auto total = V::add(lowest.total(m), V::left(middle.total(m), P.width[0]));
                    total = V::add(total, V::left(highest.total(m), P.width[0] + P.width[1]));
                    total = V::subtract(h.multiple == 2 ? V::add(total, total) : total, h.subtrahend * input_sum);
                    auto value = V::to_float(total);
                    if (job.panels.zeros) {
                        value = V::negative_multiply_add(V::load_floats(job.panels.zeros + of_group),
                                                         V::spread(static_cast<float>(input_sum)), value);
                    }
                    sums[m] = V::multiply_add(value, V::load_floats(job.panels.scales + of_group), sums[m]);
                }
            }
        }
        for (int m = 0; m < M; ++m) V::store(out[m] + half * V::kRows, sums[m]);
    }
}

// The same for inputs that stay float: codes become floats by `levels`, what each code of the plane stands for.
template <class V, int W, int M> struct FloatPlane {
    static constexpr int kCodes = 8 / W;

    typename V::template Levels<W> levels;

    PREQUANT_INLINE void prepare(int low, int multiple, int subtrahend) {
        levels = V::template levels<W>(multiple << low, low ? 0 : subtrahend);
    }

    PREQUANT_INLINE void add(typename V::Floats (&sums)[M], const uint8_t *plane, const float *inputs, int64_t stride) {
        for (int v = 0; v < W; ++v) {
            const typename V::Codes bytes = V::load(plane + v * kVector);
            PREQUANT_UNROLL
            for (int p = 0; p < kCodes; ++p) {
                PREQUANT_UNROLL
                for (int j = 0; j < 4; ++j) {
                    const auto codes = V::template value<W>(bytes, 8 * j + p * W, levels);
                    const float *column = inputs + 4 * (v * kCodes + p) + j;
                    PREQUANT_UNROLL
                    for (int m = 0; m < M; ++m) {
                        sums[m] = V::multiply_add(codes, V::spread(column[m * stride]), sums[m]);
                    }
                }
            }
        }
    }
};

template <class V, int M> struct FloatPlane<V, 0, M> {
    PREQUANT_INLINE void prepare(int, int, int) {}
    PREQUANT_INLINE void add(typename V::Floats (&)[M], const uint8_t *, const float *, int64_t) {}
};

template <class V, int B, int M>
void float_panel(const Job &job, int64_t panel, int64_t token, float (*out)[kPanelRows]) {
    constexpr Planes P = planes_of(B);
    const PanelsHeader &h = *job.panels.header;
    const float *inputs = job.floats + token * job.stride;
    FloatPlane<V, P.width[0], M> lowest;
    FloatPlane<V, P.width[1], M> middle;
    FloatPlane<V, P.width[2], M> highest;
    lowest.prepare(0, h.multiple, h.subtrahend);
    middle.prepare(P.width[0], h.multiple, h.subtrahend);
    highest.prepare(P.width[0] + P.width[1], h.multiple, h.subtrahend);
    for (int half = 0; half < kPanelRows / V::kRows; ++half) {
        typename V::Floats sums[M];
        for (int m = 0; m < M; ++m) sums[m] = V::float_zero();
        for (int64_t term = 0; term < h.terms; ++term) {
            const int64_t place = panel * h.terms + term;
            const uint8_t *codes = job.panels.codes + place * h.blocks * B * kVector + half * 4 * V::kRows;
            for (int64_t g = 0; g < h.groups; ++g) {
                const int64_t first = g * h.group_blocks, end = first + h.group_blocks;
                typename V::Floats group[M];
                for (int m = 0; m < M; ++m) group[m] = V::float_zero();
                for (int64_t block = first; block < (end < h.blocks ? end : h.blocks); ++block) {
                    const uint8_t *planes = codes + block * B * kVector;
                    const float *of_block = inputs + block * kBlockColumns;
                    lowest.add(group, planes, of_block, job.stride);
                    middle.add(group, planes + P.width[0] * kVector, of_block, job.stride);
                    highest.add(group, planes + (P.width[0] + P.width[1]) * kVector, of_block, job.stride);
                }
                const int64_t of_group = (place * h.groups + g) * kPanelRows + half * V::kRows;
                const auto scales = V::load_floats(job.panels.scales + of_group);
                for (int m = 0; m < M; ++m) {
                    if (job.panels.zeros) {
                        const float input_sum = job.float_sums[(token + m) * h.groups + g];
                        group[m] = V::negative_multiply_add(V::load_floats(job.panels.zeros + of_group),
                                                            V::spread(input_sum), group[m]);
                    }
                    sums[m] = V::multiply_add(group[m], scales, sums[m]);
                }
            }
        }
        for (int m = 0; m < M; ++m) V::store(out[m] + half * V::kRows, sums[m]);
    }
}

// ---- all tokens -----------------------------------------------------------------------------------------------------

template <class V, int B, int M>
int64_t tokens_of(const Job &job, int64_t panel, int64_t token) {
    float sums[M][kPanelRows];
    for (; token + M <= job.tokens; token += M) {
        if (job.linear->input == PREQUANT_INPUT_FLOAT) {
            float_panel<V, B, M>(job, panel, token, sums);
        } else {
            integer_panel<V, B, M>(job, panel, token, sums);
        }
        finish(job, panel, token, M, sums);
    }
    return token;
}

template <class V, int B> void panels_of_bits(const Job &job, int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
        int64_t token = tokens_of<V, B, V::kTokens>(job, panel, 0);
        token = tokens_of<V, B, 4>(job, panel, token);
        token = tokens_of<V, B, 2>(job, panel, token);
        tokens_of<V, B, 1>(job, panel, token);
    }
}

template <class V> void linear_by_panels(const Job &job, int64_t first, int64_t last, uint8_t *) {
    switch (job.panels.header->bits) {
        case 1: return panels_of_bits<V, 1>(job, first, last);
        case 2: return panels_of_bits<V, 2>(job, first, last);
        case 3: return panels_of_bits<V, 3>(job, first, last);
        case 4: return panels_of_bits<V, 4>(job, first, last);
        case 5: return panels_of_bits<V, 5>(job, first, last);
        case 6: return panels_of_bits<V, 6>(job, first, last);
        case 7: return panels_of_bits<V, 7>(job, first, last);
        case 8: return panels_of_bits<V, 8>(job, first, last);
    }
}

inline int64_t no_own_bytes(const Panels &, const prequant_linear &, int64_t) { return 0; }

}  // namespace

#endif
