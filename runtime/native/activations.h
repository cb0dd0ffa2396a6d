// Activations, on the 16 rows of a panel at once (or on PREQUANT_LANES floats, where a unit says so): in the vectors that
// GCC and clang know for every processor, because loops over single numbers that choose between values are not always
// made into vectors.

#ifndef PREQUANT_ACTIVATIONS_H
#define PREQUANT_ACTIVATIONS_H

#include <cstdint>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

#include "panels.h"

#ifndef PREQUANT_LANES
#define PREQUANT_LANES 16  // kPanelRows, as a number that the preprocessor knows
#endif

namespace {

using PanelRow = float __attribute__((vector_size(PREQUANT_LANES * sizeof(float)), aligned(4)));
using PanelRowWords = uint32_t __attribute__((vector_size(PREQUANT_LANES * sizeof(uint32_t)), aligned(4)));
using PanelRowHalves = uint16_t __attribute__((vector_size(PREQUANT_LANES * sizeof(uint16_t)), aligned(2)));
using PanelRowBits = int32_t __attribute__((vector_size(PREQUANT_LANES * sizeof(int32_t)), aligned(4)));

constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: leaves no bits for a fraction, so a sum is rounded, ties to even

inline PanelRow all_of(float value) { return value - PanelRow{}; }  // nothing to compute, where a sum with 0 turns -0
inline PanelRow magnitude(PanelRow x) { return reinterpret_cast<PanelRow>(reinterpret_cast<PanelRowBits>(x) & 0x7fffffff); }

// a b + c, rounded once where the processor can: half the work of a polynomial.
inline PanelRow fused(PanelRow a, PanelRow b, PanelRow c) {
#if PREQUANT_LANES == 16 && defined(__AVX512F__)
    return reinterpret_cast<PanelRow>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b),
                                                      reinterpret_cast<__m512>(c)));
#elif PREQUANT_LANES == 8 && defined(__FMA__)
    return reinterpret_cast<PanelRow>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b),
                                                      reinterpret_cast<__m256>(c)));
#else
    return a * b + c;
#endif
}

// A polynomial in x, its coefficients from the highest.
template <class... Rest> inline PanelRow polynomial(PanelRow x, float highest, Rest... rest) {
    PanelRow sum = all_of(highest);
    ((sum = fused(sum, x, all_of(rest))), ...);
    return sum;
}

// e^x for x <= 0; below -87 the smallest normal numbers.
inline PanelRow exponential(PanelRow x) {
    x = x < -87.0f ? all_of(-87.0f) : x;
    const PanelRow shifted = x * 1.44269504f + kRounding;
    const PanelRow n = shifted - kRounding;
    const PanelRow r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: the first product is exact
    const PanelRow p = polynomial(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                  1.6666665459e-1f, 5.0000001201e-1f);
    const PanelRow power = fused(p, r * r, r) + 1.0f;
    // Times 2^n, which stands in the low bits of the sum.
    return reinterpret_cast<PanelRow>(reinterpret_cast<PanelRowBits>(power) + (reinterpret_cast<PanelRowBits>(shifted) << 23));
}

inline PanelRow relu(PanelRow x) { return x < 0.0f ? PanelRow{} : x; }

// x times the normal distribution's P(X <= x): 0.5 erfc(z) with z = |x| / sqrt(2), by the Chebyshev fit of Numerical
// Recipes (erfcc), whose relative error is 1.2e-7 everywhere.
inline PanelRow gelu(PanelRow x) {
    const PanelRow z = magnitude(x) * 0.707106781f;
    const PanelRow t = 1.0f / (1.0f + 0.5f * z);
    const PanelRow p = polynomial(t, 0.17087277f, -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f,
                                  0.09678418f, 0.37409196f, 1.00002368f);
    const PanelRow square = z * z;
    // Far out the tail is 0, and said to be: subnormal numbers are slow. NaN comes through x itself.
    const PanelRow exponent = square < 80.0f ? -square : all_of(-80.0f);
    const PanelRow near = square < 80.0f ? 0.5f * t : PanelRow{};
    const PanelRow tail = near * exponential(fused(p, t, exponent - 1.26551223f));
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

// x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3): the published 0.5 x (1 + tanh u) without its cancellation.
inline PanelRow gelu_tanh(PanelRow x) {
    const PanelRow u = 1.59576912f * x * (1.0f + 0.044715f * x * x);
    const PanelRow size = magnitude(u);
    const PanelRow e = size < 80.0f ? exponential(-size) : PanelRow{};
    return x * ((u < 0.0f ? e : all_of(1.0f)) / (1.0f + e));
}

}  // namespace

#endif
