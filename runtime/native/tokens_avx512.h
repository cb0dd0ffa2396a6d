// Reading tokens with AVX-512: what tokens.h computes, to the last bit, 64 columns at a time. In rows as there, or in
// tiles of 16 tokens by 64 bytes for AMX: [token tiles][steps][parts][16][64].

#ifndef PREQUANT_TOKENS_AVX512_H
#define PREQUANT_TOKENS_AVX512_H

#include <immintrin.h>

#include <type_traits>

#include "avx512.h"
#include "tokens.h"

namespace {

constexpr int kChunk = 64;  // columns

struct FloatRow {
    const float *row;
    __m512 load(int64_t k, __mmask16 mask) const { return _mm512_maskz_loadu_ps(mask, row + k); }
};

struct HalfRow {
    const uint16_t *row;
    __m512 load(int64_t k, __mmask16 mask) const {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + k)), 16));
    }
};

template <class Row> uint32_t largest_magnitude(const Row &row, int64_t columns) {
    const __m512i magnitude = _mm512_set1_epi32(kMagnitude);
    __m512i largest[4] = {};
    for (int64_t k = 0; k < columns; k += kChunk) {
        for (int i = 0; i < 4; ++i) {
            const __m512i bits = _mm512_castps_si512(row.load(k + 16 * i, mask_of(k + 16 * i, columns)));
            largest[i] = _mm512_max_epu32(largest[i], _mm512_and_si512(bits, magnitude));
        }
    }
    return _mm512_reduce_max_epu32(_mm512_max_epu32(_mm512_max_epu32(largest[0], largest[1]),
                                                    _mm512_max_epu32(largest[2], largest[3])));
}

// x / scale as the processor's division rounds it, by multiplications. `inverse` + `rest` is 1 / scale to 46 bits, so
// the first quotient is one of the two floats around the true one, its remainder is exact, and one correction by the
// correctly rounded inverse gives the correctly rounded quotient (Markstein). Holds where nothing under- or overflows:
// scales are bounded for it, and quotients below 2^-20 don't matter beside the zero that is added.
struct Quotient {
    static constexpr float kSmallest = 0x1p-60f, kLargest = 0x1p60f, kZeros = 2048.0f;

    __m512 scale, inverse, rest;

    static bool holds(float scale, float zero) {
        return scale >= kSmallest && scale <= kLargest && zero >= -kZeros && zero <= kZeros;
    }

    explicit Quotient(float s) : scale(_mm512_set1_ps(s)), inverse(_mm512_set1_ps(1.0f / s)) {
        rest = _mm512_mul_ps(_mm512_fnmadd_ps(scale, inverse, _mm512_set1_ps(1.0f)), inverse);
    }

    __m512 operator()(__m512 x) const {
        const __m512 near = _mm512_fmadd_ps(x, inverse, _mm512_mul_ps(x, rest));
        return _mm512_fmadd_ps(_mm512_fnmadd_ps(near, scale, x), inverse, near);
    }
};

// The same where x may be so large that it, or its level, has to be cut off.
struct BoundedQuotient : Quotient {
    __m512 limit;

    explicit BoundedQuotient(float s) : Quotient(s), limit(_mm512_set1_ps(2.0f * kZeros * s)) {}

    __m512 operator()(__m512 x) const {
        x = _mm512_max_ps(x, _mm512_sub_ps(_mm512_setzero_ps(), limit));
        return Quotient::operator()(_mm512_min_ps(x, limit));
    }
};

struct Division {
    __m512 scale;
    explicit Division(float s) : scale(_mm512_set1_ps(s)) {}
    __m512 operator()(__m512 x) const { return _mm512_div_ps(x, scale); }
};

// Where 64 columns of a token go: `apart` bytes lie between them and the next 64.
struct Chunks {
    int8_t *first;
    int64_t apart;
};

inline Chunks in_rows(const Job &job, int64_t token) { return {job.codes + token * job.stride, kChunk}; }

inline Chunks in_tiles(const Job &job, int64_t token) {
    constexpr int64_t kTokens = 16;
    const int64_t width = job.panels.header->blocks * kBlockColumns;
    return {job.codes + token / kTokens * kTokens * width + token % kTokens * kChunk, kTokens * kChunk};
}

struct TokensAvx512 {
    const Job &job;
    const prequant_linear &linear;
    const PanelsHeader &h;

    explicit TokensAvx512(const Job &j) : job(j), linear(*j.linear), h(*j.panels.header) {}

    void quantize(int64_t token, const Chunks &chunks) const {
        if (linear.type == PREQUANT_FLOAT32) {
            quantize(token, chunks, FloatRow{static_cast<const float *>(job.input) + token * h.columns});
        } else {
            quantize(token, chunks, HalfRow{static_cast<const uint16_t *>(job.input) + token * h.columns});
        }
    }

    template <class Row> void quantize(int64_t token, const Chunks &chunks, const Row &row) const {
        const Grid grid = grid_of(linear, largest_magnitude(row, h.columns));
        job.scales[token] = grid.finite ? grid.scale : float_of(kNotANumber);
        if (!grid.finite) {
            write(token, chunks, [](int64_t) { return _mm512_setzero_si512(); });
        } else if (!Quotient::holds(grid.scale, grid.zero)) {
            write(token, chunks, Codes<Row, Division>{row, h.columns, grid, Division(grid.scale)});
        } else if (linear.input == PREQUANT_INPUT_DYNAMIC) {
            write(token, chunks, Codes<Row, Quotient>{row, h.columns, grid, Quotient(grid.scale)});
        } else {
            write(token, chunks, Codes<Row, BoundedQuotient>{row, h.columns, grid, BoundedQuotient(grid.scale)});
        }
    }

    // The codes of 64 columns.
    template <class Row, class Divided> struct Codes {
        const Row row;
        const int64_t columns;
        const Grid grid;
        const Divided divided;

        __m512i level(int64_t k, __mmask16 mask) const {
            __m512 level = _mm512_add_ps(divided(row.load(k, mask)), _mm512_set1_ps(grid.zero));
            if (!std::is_same_v<Divided, Quotient>) {  // its levels are between the bounds by the choice of the scale
                level = _mm512_min_ps(_mm512_max_ps(level, _mm512_setzero_ps()), _mm512_set1_ps(grid.top));
            }
            return _mm512_cvtps_epi32(level);
        }

        __m512i operator()(int64_t k) const {
            const int64_t left = columns - k;
            if (left >= kChunk) return codes(k, 0xffff, 0xffff, 0xffff, 0xffff);
            const __mmask64 inside = left <= 0 ? 0 : (uint64_t{1} << left) - 1;
            return _mm512_maskz_mov_epi8(inside, codes(k, mask_of(k, columns), mask_of(k + 16, columns),
                                                       mask_of(k + 32, columns), mask_of(k + 48, columns)));
        }

        __m512i codes(int64_t k, __mmask16 a, __mmask16 b, __mmask16 c, __mmask16 d) const {
            const __m512i low = _mm512_packus_epi32(level(k, a), level(k + 16, b));
            const __m512i high = _mm512_packus_epi32(level(k + 32, c), level(k + 48, d));
            // Packed within 128 bits, four bytes of each vector came to lie side by side.
            const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            const __m512i levels = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
            return _mm512_sub_epi8(levels, _mm512_set1_epi8(static_cast<char>(grid.shift)));
        }
    };

    // Writes a token's codes, and the sums of its groups.
    template <class Source> void write(int64_t token, const Chunks &chunks, const Source &codes_of) const {
        const __m512i ones = _mm512_set1_epi8(1);
        const int64_t width = h.blocks * kBlockColumns, group = static_cast<int64_t>(h.group_blocks) * kBlockColumns;
        int32_t *sums = job.sums + token * h.groups, *const end = sums + h.groups;
        __m512i sum = _mm512_setzero_si512();
        const __mmask16 halves[2] = {0x00ff, 0xff00};
        int64_t in_group = 0;
        for (int64_t k = 0; k < width; k += kChunk) {
            const __m512i codes = codes_of(k);
            _mm512_storeu_si512(chunks.first + k / kChunk * chunks.apart, codes);
            if (group % kChunk == 0) {
                sum = _mm512_dpbusd_epi32(sum, ones, codes);
                in_group += kChunk;
                if (in_group < group && k + kChunk < width) continue;
                if (sums < end) *sums++ = _mm512_reduce_add_epi32(sum);
                sum = _mm512_setzero_si512();
                in_group = 0;
                continue;
            }
            const __m512i products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, codes);
            for (int i = 0; i < 2; ++i) {
                sum = _mm512_add_epi32(sum, _mm512_maskz_mov_epi32(halves[i], products));
                in_group += kBlockColumns;
                if (in_group < group && k + (i + 1) * kBlockColumns < width) continue;
                if (sums < end) *sums++ = _mm512_reduce_add_epi32(sum);
                sum = _mm512_setzero_si512();
                in_group = 0;
            }
        }
        const int32_t *all = job.sums + token * h.groups;
        for (int64_t g = 0; g < h.groups; ++g) job.offsets[token * h.groups + g] = -h.subtrahend * all[g];
        if (job.code_columns) write_columns(token, chunks);
    }

    void write_columns(int64_t token, const Chunks &chunks) const {
        int8_t *columns = job.code_columns + token / kTokenBlock * kTokenBlock * job.stride + token % kTokenBlock;
        for (int64_t k = 0; k < h.columns; ++k) {
            columns[k * kTokenBlock] = chunks.first[k / kChunk * chunks.apart + k % kChunk];
        }
    }
};

inline void read_tokens_avx512(const Job &job, int64_t first, int64_t last) {
    if (job.linear->input == PREQUANT_INPUT_FLOAT) return read_all_tokens(job, first, last);
    const TokensAvx512 tokens(job);
    for (int64_t token = first; token < last; ++token) tokens.quantize(token, in_rows(job, token));
}

}  // namespace

#endif
