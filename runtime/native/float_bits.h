// Floats as the integers that their bits are: magnitudes compare as these do, with infinity and NaN on top.

#ifndef PREQUANT_FLOAT_BITS_H
#define PREQUANT_FLOAT_BITS_H

#include <cstdint>
#include <cstring>

namespace {

constexpr uint32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000, kNotANumber = 0x7fc00000;
constexpr float kSmallestNormal = 1.17549435e-38f;

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

}  // namespace

#endif
