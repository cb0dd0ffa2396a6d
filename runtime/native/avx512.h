// Vectors of AVX-512 for panel_kernels.h: one holds four columns of all 16 rows. Shared by the units for VNNI and AMX.

#ifndef PREQUANT_AVX512_H
#define PREQUANT_AVX512_H

#include <immintrin.h>

#include "panel_kernels.h"

namespace {

// Those of 16 columns from k that there are.
inline __mmask16 mask_of(int64_t k, int64_t columns) {
    const int64_t left = columns - k;
    return static_cast<__mmask16>(left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1);
}

struct Avx512 {
    static constexpr int kRows = 16, kPanels = 2, kTokens = 4, kFloatTokens = 8;
    // A product takes five cycles, and one or two of them begin in each. 16 sums in all leave registers for the codes.
    template <int B, int M> static constexpr int kStrips = 2;
    template <int B, int M> static constexpr int kChains = between(1, 8 / (count_of(B) * M), 4);
    template <int W> static constexpr int kPlaces = 8 / W;

    using Codes = __m512i;
    using Ints = __m512i;
    using Floats = __m512;
    // Up to 4 bits: what each code stands for, repeated as often as it fits, so that bits above the code don't matter.
    template <int W> struct Levels { __m512 table; };
    template <int W> struct Products {};  // they are summed at once

    static PREQUANT_INLINE Codes load(const uint8_t *from) {
        Codes codes = _mm512_loadu_si512(from);
        asm("" : "+v"(codes));  // or GCC loads it anew for every AND
        return codes;
    }
    static PREQUANT_INLINE Floats load_floats(const float *from) { return _mm512_loadu_ps(from); }
    static PREQUANT_INLINE void store(float *to, Floats floats) { _mm512_storeu_ps(to, floats); }
    static PREQUANT_INLINE Ints zero() { return _mm512_setzero_si512(); }
    static PREQUANT_INLINE Floats float_zero() { return _mm512_setzero_ps(); }
    static PREQUANT_INLINE Floats spread(float value) { return _mm512_set1_ps(value); }
    static PREQUANT_INLINE Ints spread(int32_t value) { return _mm512_set1_epi32(value); }

    // The codes at a position: `down` positions are shifted away, the code stays at the `place` that is left.
    template <int W> static PREQUANT_INLINE Codes codes(Codes bytes, int down, int place) {
        if (W == 8) return bytes;
        if (down) bytes = _mm512_srli_epi16(bytes, static_cast<unsigned>(down * W));
        return _mm512_and_si512(bytes, _mm512_set1_epi8(static_cast<char>(((1 << W) - 1) << (place * W))));
    }
    // Four columns of a token, for every row.
    static PREQUANT_INLINE Codes four(const int8_t *inputs) {
        int32_t columns;
        std::memcpy(&columns, inputs, sizeof columns);
        return _mm512_set1_epi32(columns);
    }
    template <int W> static PREQUANT_INLINE void dot(Products<W>, Ints &sum, Codes codes, Codes four) {
        sum = _mm512_dpbusd_epi32(sum, codes, four);
        asm("" : "+v"(sum));  // or GCC 12 copies the sum before and after its product
    }
    template <int W> static PREQUANT_INLINE void settle(Products<W>, Ints &) {}

    static PREQUANT_INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
    static PREQUANT_INLINE Ints left(Ints a, int by) { return _mm512_slli_epi32(a, static_cast<unsigned>(by)); }
    static PREQUANT_INLINE Ints right(Ints a, int by) { return _mm512_srai_epi32(a, static_cast<unsigned>(by)); }
    static PREQUANT_INLINE Floats to_float(Ints a) { return _mm512_cvtepi32_ps(a); }
    static PREQUANT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static PREQUANT_INLINE Floats negative_multiply_add(Floats a, Floats b, Floats c) {
        return _mm512_fnmadd_ps(a, b, c);
    }

    template <int W> static PREQUANT_INLINE Levels<W> levels(int step, int subtrahend) {
        float table[16];
        for (int i = 0; i < 16; ++i) table[i] = static_cast<float>((i & ((1 << W) - 1)) * step - subtrahend);
        return {W == 8 ? _mm512_set1_ps(static_cast<float>(subtrahend)) : _mm512_loadu_ps(table)};
    }
    template <int W> static PREQUANT_INLINE Floats value(Codes codes, int bit, const Levels<W> &levels) {
        const __m512i shifted = _mm512_srli_epi32(codes, static_cast<unsigned>(bit));
        if (W < 8) return _mm512_permutexvar_ps(shifted, levels.table);
        const __m512i code = _mm512_and_si512(shifted, _mm512_set1_epi32(0xff));
        return _mm512_sub_ps(_mm512_cvtepi32_ps(code), levels.table);
    }
};

}  // namespace

#endif
