// Rows of floats as codes of 8 bits with a scale each, as caches of keys and values hold them (prequant_plan.h).

#ifndef PREQUANT_CODES_H
#define PREQUANT_CODES_H

#include "float_bits.h"
#include "float_vectors.h"

namespace {

constexpr float kMostLevels = 127.0f;

// What codes stand for in units of their scale.
inline Floats levels_of(const uint8_t *codes) {
    using Bytes = int8_t __attribute__((vector_size(kLanes)));
    Bytes bytes;
    std::memcpy(&bytes, codes, sizeof(bytes));
    bytes ^= static_cast<int8_t>(-PREQUANT_CODE_ZERO);  // the same as to take it away, in signed bytes
    return __builtin_convertvector(__builtin_convertvector(bytes, FloatBits), Floats);
}

// The first `count`; 0 in the other lanes.
inline Floats levels_of_some(const uint8_t *codes, int64_t count) {
    uint8_t some[kLanes];
    std::memset(some, PREQUANT_CODE_ZERO, sizeof(some));
    std::memcpy(some, codes, static_cast<size_t>(count));
    return levels_of(some);
}

template <class Read> inline void quantize_row(Read read, uint8_t *codes, float *scale, int64_t count) {
    uint32_t largest = 0;
    for (int64_t k = 0; k < count; ++k) {
        const uint32_t magnitude = bits_of(read(k)) & kMagnitude;
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest >= kInfinity) {
        std::memset(codes, PREQUANT_CODE_ZERO, static_cast<size_t>(count));
        *scale = NAN;
        return;
    }
    float unit = float_of(largest) / kMostLevels;
    if (unit < kSmallestNormal) unit = 1.0f;
    *scale = unit;
    constexpr float zero = PREQUANT_CODE_ZERO;
    for (int64_t k = 0; k < count; ++k) {
        codes[k] = static_cast<uint8_t>(bits_of(read(k) / unit + zero + kRounding) - bits_of(kRounding));
    }
}

inline void quantize(const float *in, int64_t step, uint8_t *codes, float *scale, int64_t count) {
    if (step == 1) {  // which the compiler makes vectors of
        quantize_row([in](int64_t k) { return in[k]; }, codes, scale, count);
    } else {
        quantize_row([in, step](int64_t k) { return in[k * step]; }, codes, scale, count);
    }
}

inline void dequantize(const uint8_t *codes, float scale, float *out, int64_t step, int64_t count) {
    int64_t k = 0;
    if (step == 1) {
        for (; k + kLanes <= count; k += kLanes) store(out + k, levels_of(codes + k) * scale);
    }
    for (; k < count; ++k) out[k * step] = static_cast<float>(codes[k] - PREQUANT_CODE_ZERO) * scale;
}

}  // namespace

#endif
