// Activations on a few floats at a time, in code that compilers turn into vectors: no branches, no calls.

#ifndef PREQUANT_ACTIVATIONS_H
#define PREQUANT_ACTIVATIONS_H

#include <cstdint>
#include <cstring>

namespace {

constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: leaves no bits for a fraction, so a sum is rounded, ties to even

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// e^x for x <= 0, to 2 units in the last place; below -87 the smallest normal numbers.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float shifted = x * 1.44269504f + kRounding;
    const float n = shifted - kRounding;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: the first product is exact
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return float_of(bits_of(p) + (bits_of(shifted) << 23));  // times 2^n: n stands in the sum's low bits
}

inline float relu(float x) { return x < 0.0f ? 0.0f : x; }

// x times the normal distribution's P(X <= x): 0.5 erfc(z) with z = |x| / sqrt(2), by the Chebyshev fit of Numerical
// Recipes (erfcc), whose relative error is 1.2e-7 everywhere.
inline float gelu(float x) {
    const float z = float_of(bits_of(x) & 0x7fffffff) * 0.707106781f;
    const float t = 1.0f / (1.0f + 0.5f * z);
    float p = 0.17087277f;
    p = p * t - 0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t - 1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    const float square = z * z;
    // NaN compares false and comes through x itself; from 1e18 on the square would be infinite, and the tail is 0.
    const float tail = 0.5f * t * exponential((square < 1e30f ? -square : -1e30f) - 1.26551223f + p * t);
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

// x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3): the published 0.5 x (1 + tanh u) without its cancellation.
inline float gelu_tanh(float x) {
    const float u = 1.59576912f * x * (1.0f + 0.044715f * x * x);
    const float magnitude = float_of(bits_of(u) & 0x7fffffff);
    const float e = exponential(magnitude < 1e30f ? -magnitude : -1e30f);
    return x * ((u < 0.0f ? e : 1.0f) / (1.0f + e));
}

}  // namespace

#endif
