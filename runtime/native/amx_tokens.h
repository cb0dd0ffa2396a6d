// Reading tokens into tiles: 8-bit codes by tokens_avx512.h, or bfloat16 that stands for the floats exactly.

#ifndef PREQUANT_AMX_TOKENS_H
#define PREQUANT_AMX_TOKENS_H

#include "amx_tiles.h"
#include "tokens_avx512.h"

namespace {

// A float32 as the sum of three bfloat16: of its 24 bits, cut off, each holds 8. Tiles take numbers below 2^-126 for 0
// and know nothing beyond 2^128, so a token that comes near either is scaled by a power of two, and so are its results.
template <class E> struct TokensOfHalves {
    static constexpr float kFar = 0x1p60f;

    const Job &job;
    const PanelsHeader &h;

    explicit TokensOfHalves(const Job &j) : job(j), h(*j.panels.header) {}

    uint8_t *place(int64_t token) const {
        const int64_t tile_bytes = h.blocks * E::kParts * kTileBytes;
        return reinterpret_cast<uint8_t *>(job.floats) + token / kTile * tile_bytes + token % kTile * kVector;
    }

    void read(int64_t token) const {
        if constexpr (E::kParts == 1) {
            read(token, HalfRow{static_cast<const uint16_t *>(job.input) + token * h.columns});
        } else {
            read(token, FloatRow{static_cast<const float *>(job.input) + token * h.columns});
        }
    }

    template <class Row> void read(int64_t token, const Row &row) const {
        const uint32_t largest = largest_magnitude(row, h.columns);
        const float size = float_of(largest);
        float factor = 1.0f;
        if (size > kFar && largest < kInfinity) factor = 1.0f / kFar;
        if (size < 1.0f / kFar) factor = kFar;
        job.scales[token] = 1.0f / factor;
        const __m512 factors = _mm512_set1_ps(factor);
        // Columns 0, 2, 1, 3 of each quad, as unpack_halves has them: the upper halves of floats.
        alignas(64) uint16_t places[32];
        for (int i = 0; i < 32; ++i) {
            static constexpr int kInQuad[4] = {0, 2, 1, 3};
            places[i] = static_cast<uint16_t>(2 * (i / 4 * 4 + kInQuad[i % 4]) + 1);
        }
        const __m512i upper = _mm512_load_si512(places);
        const bool finite = largest < kInfinity;
        float *sums = job.panels.zeros ? job.float_sums + token * h.groups : nullptr;
        __m512 sum = _mm512_setzero_ps();
        uint8_t *out = place(token);
        for (int64_t block = 0; block < h.blocks; ++block, out += E::kParts * kTileBytes) {
            const int64_t k = block * kBlockColumns;
            __m512 a = _mm512_mul_ps(row.load(k, mask_of(k, h.columns)), factors);
            __m512 b = _mm512_mul_ps(row.load(k + 16, mask_of(k + 16, h.columns)), factors);
            if (job.float_columns) write_columns(token, k, a, b);
            if (sums) {
                sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
                if ((block + 1) % h.group_blocks == 0 || block + 1 == h.blocks) {
                    if (block / h.group_blocks < h.groups) sums[block / h.group_blocks] = _mm512_reduce_add_ps(sum);
                    sum = _mm512_setzero_ps();
                }
            }
            for (int part = 0; part < E::kParts; ++part) {
                const __m512i halves = _mm512_permutex2var_epi16(_mm512_castps_si512(a), upper, _mm512_castps_si512(b));
                _mm512_storeu_si512(out + part * kTileBytes, halves);
                if (part + 1 == E::kParts) break;
                a = rest_of(a, finite);
                b = rest_of(b, finite);
            }
        }
    }

    // What is left for the next parts: of infinity and NaN nothing.
    static PREQUANT_INLINE __m512 rest_of(__m512 x, bool finite) {
        const __m512 left = without_upper_half(x);
        if (finite) return left;
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(left, left, _CMP_ORD_Q), left);
    }

    void write_columns(int64_t token, int64_t k, __m512 a, __m512 b) const {
        alignas(64) float values[kBlockColumns];
        _mm512_store_ps(values, a);
        _mm512_store_ps(values + 16, b);
        float *columns = job.float_columns + token / kTokenBlock * kTokenBlock * job.stride + token % kTokenBlock;
        for (int64_t i = 0; i < kBlockColumns && k + i < h.columns; ++i) columns[(k + i) * kTokenBlock] = values[i];
    }
};

template <class E> void read_into_tiles(const Job &job, int64_t first, int64_t last) {
    if constexpr (E::kHalves) {
        const TokensOfHalves<E> tokens(job);
        for (int64_t token = first; token < last; ++token) tokens.read(token);
    } else {
        const TokensAvx512 tokens(job);
        for (int64_t token = first; token < last; ++token) tokens.quantize(token, in_tiles(job, token));
    }
}

}  // namespace

#endif
