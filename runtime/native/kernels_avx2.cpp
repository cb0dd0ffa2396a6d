// The kernels for AVX2 and FMA: a vector holds four columns of half a panel's rows.

#include <immintrin.h>

#include "panel_kernels.h"

namespace {

struct Avx2 {
    static constexpr int kRows = 8, kChains = 4, kTokens = 4;
    static constexpr bool kInPlace = false;  // codes at their bits would saturate vpmaddubsw's 16-bit sums

    using Codes = __m256i;
    using Ints = __m256i;
    using Floats = __m256;
    template <int W> struct Levels { __m256 step, subtrahend; };

    static PREQUANT_INLINE Codes load(const uint8_t *from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
    }
    static PREQUANT_INLINE Floats load_floats(const float *from) { return _mm256_loadu_ps(from); }
    static PREQUANT_INLINE void store(float *to, Floats floats) { _mm256_storeu_ps(to, floats); }
    static PREQUANT_INLINE Ints zero() { return _mm256_setzero_si256(); }
    static PREQUANT_INLINE Floats float_zero() { return _mm256_setzero_ps(); }
    static PREQUANT_INLINE Floats spread(float value) { return _mm256_set1_ps(value); }

    template <int W> static PREQUANT_INLINE Codes low(Codes codes, int p) {
        if (W == 8) return codes;
        const __m256i shifted = p ? _mm256_srli_epi16(codes, p * W) : codes;
        return _mm256_and_si256(shifted, _mm256_set1_epi8(static_cast<char>((1 << W) - 1)));
    }
    template <int W> static PREQUANT_INLINE Codes masked(Codes codes, int p) { return low<W>(codes, p); }

    template <int W> static PREQUANT_INLINE Ints dot(Ints sum, Codes codes, const int8_t *inputs) {
        int32_t four;
        std::memcpy(&four, inputs, sizeof four);
        const __m256i spread = _mm256_set1_epi32(four);
        if (W < 8) return _mm256_add_epi32(sum, quads(codes, spread));
        // 8-bit codes in two halves: a pair of products must not leave 16 bits.
        sum = _mm256_add_epi32(sum, quads(low<4>(codes, 0), spread));
        return _mm256_add_epi32(sum, _mm256_slli_epi32(quads(low<4>(codes, 1), spread), 4));
    }
    static PREQUANT_INLINE Ints quads(Codes codes, Codes inputs) {
        return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, inputs), _mm256_set1_epi16(1));
    }

    static PREQUANT_INLINE Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
    static PREQUANT_INLINE Ints subtract(Ints a, int32_t b) { return _mm256_sub_epi32(a, _mm256_set1_epi32(b)); }
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

extern const Kernels avx2_kernels = {"avx2", read_all_tokens, linear_by_panels<Avx2>, dequantize_rows, no_own_bytes};

}  // namespace prequant
