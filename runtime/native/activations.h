// Activations, on a vector of floats at once: in the vectors that GCC and clang know for every processor, because loops
// over single numbers that choose between values are not always made into vectors.

#ifndef PREQUANT_ACTIVATIONS_H
#define PREQUANT_ACTIVATIONS_H

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

#include "activation_tables.h"

namespace {

using namespace prequant;

// As wide as the processor's own: GCC computes on wider ones through memory.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using FloatWords = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));
using FloatBits = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));
using FloatHalves = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));

// Anywhere in memory. GCC copies what memcpy is to copy in pieces of 16 bytes, by way of the stack.
inline Floats load(const float *from) {
    using Anywhere = float __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
    return *reinterpret_cast<const Anywhere *>(from);
}
inline void store(float *to, Floats floats) {
    using Anywhere = float __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
    *reinterpret_cast<Anywhere *>(to) = floats;
}

// The first `count` lanes, the others as in `rest`.
inline Floats load_some(const float *from, int64_t count, Floats rest = Floats{}) {
    std::memcpy(&rest, from, static_cast<size_t>(count) * sizeof(float));
    return rest;
}
inline void store_some(float *to, Floats floats, int64_t count) {
    std::memcpy(to, &floats, static_cast<size_t>(count) * sizeof(float));
}

constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: leaves no bits for a fraction, so a sum is rounded, ties to even

inline Floats all_of(float value) { return value - Floats{}; }  // nothing to compute, where a sum with 0 turns -0
inline Floats magnitude(Floats x) { return reinterpret_cast<Floats>(reinterpret_cast<FloatBits>(x) & 0x7fffffff); }

// a b + c, rounded once where the processor can: half the work of a polynomial.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b),
                                                      reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
    return reinterpret_cast<Floats>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b),
                                                      reinterpret_cast<__m256>(c)));
#else
    return a * b + c;
#endif
}

// A polynomial in x, its coefficients from the highest.
template <class... Rest> inline Floats polynomial(Floats x, float highest, Rest... rest) {
    Floats sum = all_of(highest);
    ((sum = fused(sum, x, all_of(rest))), ...);
    return sum;
}

// e^x = 2^n e^r for x <= 0; 0 where it would be no normal number, or close to that.
inline Floats exponential(Floats x) {
    constexpr float kLeast = -87.0f;
    const Floats bounded = x < kLeast ? all_of(kLeast) : x;  // NaN stays
    const Floats shifted = fused(bounded, all_of(1.44269504f), all_of(kRounding));
    const Floats n = shifted - kRounding;
    // ln 2 in two parts: the first product is exact.
    const Floats r = fused(n, all_of(2.12194440e-4f), fused(n, all_of(-0.693359375f), bounded));
    const Floats p = polynomial(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                1.6666665459e-1f, 5.0000001201e-1f);
    const Floats power = fused(p, r * r, r) + 1.0f;
    // Times 2^n, which stands in the low bits of the sum.
    const auto bits = reinterpret_cast<FloatBits>(power) + (reinterpret_cast<FloatBits>(shifted) << 23);
    return x < kLeast ? Floats{} : reinterpret_cast<Floats>(bits);
}

inline Floats relu(Floats x) { return x < 0.0f ? Floats{} : x; }

#ifdef __AVX512F__

// x times 1 - S(|x|) or, below 0, S(|x|): S from a table, in place of an exponential and a quotient.
inline Floats by_table(Floats x, const ActivationTable &table) {
    using Table = ActivationTable;
    const auto v = reinterpret_cast<__m512>(x);
    // The bound comes first: that way NaN comes through. Where to look for it doesn't matter.
    const __m512 size = _mm512_min_ps(_mm512_set1_ps(Table::kWidth * (Table::kIntervals - 1)), _mm512_abs_ps(v));
    const __m512 shifted = _mm512_fmadd_ps(size, _mm512_set1_ps(1.0f / Table::kWidth), _mm512_set1_ps(kRounding));
    const __m512i interval = _mm512_castps_si512(shifted);  // in the low bits, the only ones that are looked at
    const __m512 center = _mm512_sub_ps(shifted, _mm512_set1_ps(kRounding));
    const __m512 from_center = _mm512_fnmadd_ps(center, _mm512_set1_ps(Table::kWidth), size);
    const auto coefficient = [&](int degree) {
        const float *of = table.coefficients[degree];
        return _mm512_permutex2var_ps(_mm512_load_ps(of), interval, _mm512_load_ps(of + 16));
    };
    __m512 share = coefficient(Table::kDegree);
    for (int degree = Table::kDegree - 1; degree >= 0; --degree) {
        share = _mm512_fmadd_ps(share, from_center, coefficient(degree));
    }
    const __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GE_OQ);
    share = _mm512_mask_sub_ps(share, above, _mm512_set1_ps(1.0f), share);
    return x * reinterpret_cast<Floats>(share);
}

inline Floats gelu(Floats x) { return by_table(x, gelu_table); }
inline Floats gelu_tanh(Floats x) { return by_table(x, gelu_tanh_table); }

#else

// x times the normal distribution's P(X <= x): 0.5 erfc(z) with z = |x| / sqrt(2), by the Chebyshev fit of Numerical
// Recipes (erfcc), whose relative error is 1.2e-7 everywhere.
inline Floats gelu(Floats x) {
    const Floats z = magnitude(x) * 0.707106781f;
    const Floats t = 1.0f / (1.0f + 0.5f * z);
    const Floats p = polynomial(t, 0.17087277f, -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f,
                                  0.09678418f, 0.37409196f, 1.00002368f);
    const Floats tail = 0.5f * t * exponential(fused(p, t, -z * z - 1.26551223f));  // NaN comes through x itself
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

// x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3): the published 0.5 x (1 + tanh u) without its cancellation.
inline Floats gelu_tanh(Floats x) {
    const Floats u = 1.59576912f * x * (1.0f + 0.044715f * x * x);
    const Floats e = exponential(-magnitude(u));
    return x * ((u < 0.0f ? e : all_of(1.0f)) / (1.0f + e));
}

#endif

}  // namespace

#endif
