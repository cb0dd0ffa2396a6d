// The tiles of AMX: how they are configured, and the kinds of numbers that they multiply.

#ifndef PREQUANT_AMX_KINDS_H
#define PREQUANT_AMX_KINDS_H

#include "avx512.h"

namespace {

constexpr int kTile = 16;  // rows of a tile
constexpr int64_t kTileBytes = kTile * kVector;

// What is left of floats when their upper halves are taken as bfloat16.
PREQUANT_INLINE __m512 without_upper_half(__m512 x) {
    const __m512i upper = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    return _mm512_sub_ps(x, _mm512_castsi512_ps(upper));
}

// Tiles 0 to 3: sums [token tile][panel]; 4, 5: inputs; 6, 7: codes.
struct alignas(64) TileConfiguration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    // `bytes` of each token in a tile of inputs, 4 for each row of a tile of codes.
    TileConfiguration(int tokens, int bytes) {
        for (int tile = 0; tile < 8; ++tile) {
            const bool inputs = tile == 4 || tile == 5, codes = tile >= 6;
            row_bytes[tile] = static_cast<uint16_t>(inputs ? bytes : kVector);
            rows[tile] = static_cast<uint8_t>(codes ? bytes / 4 : tokens);
        }
    }
};

// Signed bytes, summed as integers.
struct TilesOfBytes {
    static constexpr bool kHalves = false;
    static constexpr int kColumns = 64;  // of a tile
    static constexpr int kParts = 1;     // tiles that make up an input

    static PREQUANT_INLINE void multiply00() { _tile_dpbssd(0, 4, 6); }
    static PREQUANT_INLINE void multiply01() { _tile_dpbssd(1, 4, 7); }
    static PREQUANT_INLINE void multiply10() { _tile_dpbssd(2, 5, 6); }
    static PREQUANT_INLINE void multiply11() { _tile_dpbssd(3, 5, 7); }
    static PREQUANT_INLINE __m512 to_floats(const int32_t *sums) {
        return _mm512_cvtepi32_ps(_mm512_load_si512(sums));
    }
};

// bfloat16, summed as floats. Three parts make up a float32: each holds 8 of its 24 bits, so nothing is lost.
template <int Parts> struct TilesOfHalves {
    static constexpr bool kHalves = true;
    static constexpr int kColumns = 32;
    static constexpr int kParts = Parts;

    static PREQUANT_INLINE void multiply00() { _tile_dpbf16ps(0, 4, 6); }
    static PREQUANT_INLINE void multiply01() { _tile_dpbf16ps(1, 4, 7); }
    static PREQUANT_INLINE void multiply10() { _tile_dpbf16ps(2, 5, 6); }
    static PREQUANT_INLINE void multiply11() { _tile_dpbf16ps(3, 5, 7); }
    static PREQUANT_INLINE __m512 to_floats(const int32_t *sums) {
        return _mm512_castsi512_ps(_mm512_load_si512(sums));
    }
};

}  // namespace

#endif
