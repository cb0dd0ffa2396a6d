// The kernels for any processor: vectors are arrays, and the compiler does with them what it can.

#define PREQUANT_INLINE inline
#define PREQUANT_UNROLL

#include "panel_kernels.h"

namespace {

struct Scalar {
    static constexpr int kRows = 16, kPanels = 1, kTokens = 4, kFloatTokens = 4;
    template <int B, int M> static constexpr int kStrips = 1;
    template <int B, int M> static constexpr int kChains = 1;
    template <int W> static constexpr int kPlaces = 1;

    struct Codes { uint8_t bytes[kVector]; };
    struct Ints { int32_t lanes[kRows]; };
    struct Floats { float lanes[kRows]; };
    template <int W> struct Levels { int step, subtrahend; };
    template <int W> struct Products {};  // they are summed at once

    static Codes load(const uint8_t *from) {
        Codes codes;
        std::memcpy(codes.bytes, from, kVector);
        return codes;
    }
    static Floats load_floats(const float *from) {
        Floats floats;
        std::memcpy(floats.lanes, from, sizeof floats);
        return floats;
    }
    static void store(float *to, Floats floats) { std::memcpy(to, floats.lanes, sizeof floats); }
    static Ints zero() { return {}; }
    static Floats float_zero() { return {}; }
    static Floats spread(float value) {
        Floats floats;
        for (float &lane : floats.lanes) lane = value;
        return floats;
    }

    static Ints spread(int32_t value) {
        Ints ints;
        for (int32_t &lane : ints.lanes) lane = value;
        return ints;
    }

    template <int W> static Codes codes(const Codes &bytes, int down, int) {
        Codes out;
        for (int i = 0; i < kVector; ++i) out.bytes[i] = bytes.bytes[i] >> (down * W) & ((1 << W) - 1);
        return out;
    }
    static const int8_t *four(const int8_t *inputs) { return inputs; }
    template <int W> static void dot(Products<W>, Ints &sum, const Codes &codes, const int8_t *four) {
        for (int r = 0; r < kRows; ++r) {
            for (int j = 0; j < 4; ++j) sum.lanes[r] += codes.bytes[4 * r + j] * four[j];
        }
    }
    template <int W> static void settle(Products<W>, Ints &) {}

    static Ints add(Ints a, const Ints &b) {
        for (int r = 0; r < kRows; ++r) a.lanes[r] += b.lanes[r];
        return a;
    }
    static Ints left(Ints a, int by) {
        for (int r = 0; r < kRows; ++r) a.lanes[r] *= 1 << by;
        return a;
    }
    static Ints right(Ints a, int by) {
        for (int r = 0; r < kRows; ++r) a.lanes[r] /= 1 << by;
        return a;
    }
    static Floats to_float(const Ints &a) {
        Floats floats;
        for (int r = 0; r < kRows; ++r) floats.lanes[r] = static_cast<float>(a.lanes[r]);
        return floats;
    }
    static Floats multiply_add(const Floats &a, const Floats &b, Floats c) {
        for (int r = 0; r < kRows; ++r) c.lanes[r] += a.lanes[r] * b.lanes[r];
        return c;
    }
    static Floats negative_multiply_add(const Floats &a, const Floats &b, Floats c) {
        for (int r = 0; r < kRows; ++r) c.lanes[r] -= a.lanes[r] * b.lanes[r];
        return c;
    }

    template <int W> static Levels<W> levels(int step, int subtrahend) { return {step, subtrahend}; }
    template <int W> static Floats value(const Codes &codes, int bit, const Levels<W> &levels) {
        Floats floats;
        for (int r = 0; r < kRows; ++r) {
            const int code = codes.bytes[4 * r + bit / 8] >> (bit % 8) & ((1 << W) - 1);
            floats.lanes[r] = static_cast<float>(code * levels.step - levels.subtrahend);
        }
        return floats;
    }
};

}  // namespace

namespace prequant {

extern const Kernels scalar_kernels = {"scalar", read_all_tokens, linear_by_panels<Scalar>, dequantize_rows,
                                       round_rows, round_gradients, no_own_bytes};

}  // namespace prequant
