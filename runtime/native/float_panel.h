// Sums of codes times inputs that stay float, for one panel and a few tokens. See panel_kernels.h for the vectors V.

#ifndef PREQUANT_FLOAT_PANEL_H
#define PREQUANT_FLOAT_PANEL_H

#include "kernels.h"
#include "unroll.h"

namespace {

using namespace prequant;

// Codes become floats by `levels`, what each code of the plane stands for.
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

}  // namespace

#endif
