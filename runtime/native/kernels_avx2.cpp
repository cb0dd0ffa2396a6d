// The kernels for AVX2 and FMA: a vector holds four columns of half a panel's rows.

#include <immintrin.h>

#include "panel_kernels.h"

namespace {

struct Avx2 {
    static constexpr int kRows = 8, kPanels = 1, kTokens = 4, kFloatTokens = 4;
    template <int B, int M> static constexpr int kStrips = M > 1 ? 1 : 2;  // 16 registers hold no more
    template <int B, int M> static constexpr int kChains = 1;
    template <int W> static constexpr int kPlaces = 1;  // codes at their bits would saturate vpmaddubsw's 16-bit sums

    using Codes = __m256i;
    using Ints = __m256i;
    using Floats = __m256;
    template <int W> struct Levels { __m256 step, subtrahend; };
    // Products of a block, two columns each: 8 quads of 2 * 15 * 128 are less than 2^15. 8-bit codes take two halves.
    template <int W> struct Products { __m256i lower, upper; };

    static PREQUANT_INLINE Codes load(const uint8_t *from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
    }
    static PREQUANT_INLINE Floats load_floats(const float *from) { return _mm256_loadu_ps(from); }
    static PREQUANT_INLINE void store(float *to, Floats floats) { _mm256_storeu_ps(to, floats); }
    static PREQUANT_INLINE Ints zero() { return _mm256_setzero_si256(); }
    static PREQUANT_INLINE Floats float_zero() { return _mm256_setzero_ps(); }
    static PREQUANT_INLINE Floats spread(float value) { return _mm256_set1_ps(value); }
    static PREQUANT_INLINE Ints spread(int32_t value) { return _mm256_set1_epi32(value); }

    template <int W> static PREQUANT_INLINE Codes codes(Codes bytes, int down, int) {
        if (W == 8) return bytes;
        if (down) bytes = _mm256_srli_epi16(bytes, down * W);
        return _mm256_and_si256(bytes, _mm256_set1_epi8(static_cast<char>((1 << W) - 1)));
    }
    // Four columns of a token, for every row.
    static PREQUANT_INLINE Codes four(const int8_t *inputs) {
        int32_t columns;
        std::memcpy(&columns, inputs, sizeof columns);
        return _mm256_set1_epi32(columns);
    }
    template <int W> static PREQUANT_INLINE void dot(Products<W> &products, Ints &, Codes bytes, Codes four) {
        const Codes lower = W == 8 ? codes<4>(bytes, 0, 0) : bytes;
        products.lower = _mm256_add_epi16(products.lower, _mm256_maddubs_epi16(lower, four));
        if (W < 8) return;
        products.upper = _mm256_add_epi16(products.upper, _mm256_maddubs_epi16(codes<4>(bytes, 1, 0), four));
    }
    template <int W> static PREQUANT_INLINE void settle(Products<W> products, Ints &sum) {
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(products.lower, _mm256_set1_epi16(1)));
        if (W == 8) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(products.upper, _mm256_set1_epi16(16)));
    }

    static PREQUANT_INLINE Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
    static PREQUANT_INLINE Ints left(Ints a, int by) { return _mm256_slli_epi32(a, by); }
    static PREQUANT_INLINE Ints right(Ints a, int by) { return _mm256_srai_epi32(a, by); }
    static PREQUANT_INLINE Floats to_float(Ints a) { return _mm256_cvtepi32_ps(a); }
    static PREQUANT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static PREQUANT_INLINE Floats negative_multiply_add(Floats a, Floats b, Floats c) {
        return _mm256_fnmadd_ps(a, b, c);
    }

    template <int W> static PREQUANT_INLINE Levels<W> levels(int step, int subtrahend) {
        return {_mm256_set1_ps(static_cast<float>(step)), _mm256_set1_ps(static_cast<float>(subtrahend))};
    }
    template <int W> static PREQUANT_INLINE Floats value(Codes codes, int bit, const Levels<W> &levels) {
        const __m256i code = _mm256_and_si256(_mm256_srli_epi32(codes, bit), _mm256_set1_epi32((1 << W) - 1));
        return _mm256_fmsub_ps(_mm256_cvtepi32_ps(code), levels.step, levels.subtrahend);
    }
};

}  // namespace

namespace prequant {

extern const Kernels avx2_kernels = {"avx2", read_all_tokens, linear_by_panels<Avx2>, dequantize_rows,
                                     round_rows, round_gradients, no_own_bytes};

}  // namespace prequant
