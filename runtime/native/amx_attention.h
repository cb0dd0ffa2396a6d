// Attention on the tiles of AMX, which multiply bfloat16: each float32 is the sum of three, cut off, that hold 8 of its 24
// bits each. Of the nine products of two numbers' parts the six count that reach into 24 bits.
//
// Rows (queries, and their weights) lie as [2 tiles][steps][parts][16][32 columns], what they are multiplied with (keys,
// and values) as [tiles][steps][parts][16 pairs][16 columns][2]: a step is 32 of what is summed up.

#ifndef PREQUANT_AMX_ATTENTION_H
#define PREQUANT_AMX_ATTENTION_H

#include "amx_kinds.h"
#include "float_attention.h"

namespace {

constexpr int kParts = 3;
constexpr int64_t kStepBytes = kParts * kTileBytes;
constexpr int64_t kStep = 32;
static_assert(kQueryBlock == 2 * kTile, "a block of queries is two tiles");

constexpr int64_t steps_of(int64_t count) { return (count + kStep - 1) / kStep; }

// 32 numbers of a row.
inline void write_row(uint8_t *to, __m512 a, __m512 b) {
    alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                        33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i upper = _mm512_load_si512(kUpper);
    for (int part = 0; part < kParts; ++part, to += kTileBytes) {
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(_mm512_castps_si512(a), upper, _mm512_castps_si512(b)));
        a = without_upper_half(a);
        b = without_upper_half(b);
    }
}

// 16 columns of two rows that are summed up one after the other.
inline void write_pair(uint8_t *to, __m512 a, __m512 b) {
    for (int part = 0; part < kParts; ++part, to += kTileBytes) {
        const __m512i down = _mm512_srli_epi32(_mm512_castps_si512(a), 16);
        _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaa, down, _mm512_castps_si512(b)));
        a = without_upper_half(a);
        b = without_upper_half(b);
    }
}

// 16 numbers of those that are left; 0 for the others.
inline __m512 load_left(const float *from, int64_t left) { return _mm512_maskz_loadu_ps(mask_of(0, left), from); }

// The magnitudes that were seen. Tiles take numbers below 2^-126 for 0, and sums of products have to stay below 2^128.
class Magnitudes {
public:
    __m512 seen(__m512 x) {
        const __m512i size = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
        largest_ = _mm512_max_epu32(largest_, size);
        return x;
    }
    bool ordinary() const {
        const uint32_t largest = _mm512_reduce_max_epu32(largest_);
        return largest == 0 || (largest > kSmall && largest < kFar);
    }

private:
    static constexpr uint32_t kFar = (127 + 50) << 23, kSmall = (127 - 50) << 23;  // of 2^50 and 2^-50

    __m512i largest_ = _mm512_setzero_si512();
};

struct TileAttention {
    const Attention &a;
    int64_t depth_steps, key_steps, value_tiles;
    Sections scratch;
    uint8_t *queries, *weights, *keys, *values;
    float *scores, *sums;  // [32][padded keys], [32][32]
    VectorAttention vectors;
    bool by_vectors = false;

    // `own`: where its scratch is, or 0 to learn from `end` how many bytes that takes.
    TileAttention(const Attention &attention, uintptr_t own)
        : a(attention), depth_steps(steps_of(a.depth)), key_steps(steps_of(a.keys)),
          value_tiles(2 * steps_of(a.value_depth)), scratch{own},
          queries(scratch.take<uint8_t>(2 * depth_steps * kStepBytes)),
          weights(scratch.take<uint8_t>(2 * key_steps * kStepBytes)),
          keys(scratch.take<uint8_t>(2 * key_steps * depth_steps * kStepBytes)),
          values(scratch.take<uint8_t>(value_tiles * key_steps * kStepBytes)),
          scores(scratch.take<float>(kQueryBlock * key_steps * kStep * 4)),
          sums(scratch.take<float>(kQueryBlock * kStep * 4)), vectors(a, scratch) {}

    uintptr_t end() const { return scratch.next; }

    void begin(const Head &head) {
        by_vectors = !(read_keys(head) && read_values(head));
        if (by_vectors) vectors.begin(head);
    }

    void run(const Head &head, int64_t first, int64_t count) {
        if (by_vectors) return vectors.run(head, first, count);
        if (!read_queries(head, first, count)) {
            vectors.begin(head);
            return vectors.run(head, first, count);
        }
        const int64_t row = key_steps * kStep;
        for (int64_t step = 0; step < key_steps; ++step) {
            multiply(queries, keys + 2 * step * depth_steps * kStepBytes, depth_steps, scores + step * kStep, row);
        }
        float factors[kQueryBlock];
        for (int64_t q = 0; q < count; ++q) {
            float *of_query = scores + q * row;
            factors[q] = head.softmax(of_query, first + q);
            for (int64_t j = a.keys; j < row; ++j) of_query[j] = 0.0f;
            uint8_t *to = weights + q / kTile * key_steps * kStepBytes + q % kTile * kVector;
            for (int64_t step = 0; step < key_steps; ++step, of_query += kStep) {
                write_row(to + step * kStepBytes, _mm512_loadu_ps(of_query), _mm512_loadu_ps(of_query + 16));
            }
        }
        for (int64_t tile = 0; tile < value_tiles; tile += 2) {
            multiply(weights, values + tile * key_steps * kStepBytes, key_steps, sums, kStep);
            for (int64_t q = 0; q < count; ++q) write_out(head.out(first + q), factors[q], q, tile * 16);
        }
    }

private:
    // 32 rows times 32 columns.
    static void multiply(const uint8_t *left, const uint8_t *right, int64_t steps, float *out, int64_t out_row) {
        const int64_t apart = steps * kStepBytes;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t step = 0; step < steps; ++step, left += kStepBytes, right += kStepBytes) {
            PREQUANT_UNROLL
            for (int i = 0; i < kParts; ++i) {
                _tile_loadd(4, left + i * kTileBytes, kVector);
                _tile_loadd(5, left + i * kTileBytes + apart, kVector);
                PREQUANT_UNROLL
                for (int j = 0; i + j < kParts; ++j) {
                    _tile_loadd(6, right + j * kTileBytes, kVector);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_loadd(7, right + j * kTileBytes + apart, kVector);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
        }
        const int64_t row = out_row * static_cast<int64_t>(sizeof(float));
        _tile_stored(0, out, row);
        _tile_stored(1, out + kTile, row);
        _tile_stored(2, out + kTile * out_row, row);
        _tile_stored(3, out + kTile * out_row + kTile, row);
    }

    // These say whether tiles can take what they have read.
    bool read_queries(const Head &head, int64_t first, int64_t count) const {
        Magnitudes magnitudes;
        for (int64_t q = 0; q < count; ++q) {
            const float *query = head.query(first + q);
            uint8_t *to = queries + q / kTile * depth_steps * kStepBytes + q % kTile * kVector;
            for (int64_t d = 0; d < a.depth; d += kStep, to += kStepBytes) {
                write_row(to, magnitudes.seen(load_left(query + d, a.depth - d)),
                          magnitudes.seen(load_left(query + d + 16, a.depth - d - 16)));
            }
        }
        return magnitudes.ordinary();
    }

    bool read_keys(const Head &head) const {
        Magnitudes magnitudes;
        uint8_t *to = keys;
        for (int64_t first = 0; first < key_steps * kStep; first += kTile) {
            const float *tokens[kTile];
            for (int j = 0; j < kTile; ++j) tokens[j] = head.key(first + j < a.keys ? first + j : 0);
            for (int64_t d = 0; d < depth_steps * kStep; d += 4) {
                __m512 by_depth[4];
                four_columns(tokens, a.keys - first, d, by_depth);
                for (__m512 &column : by_depth) magnitudes.seen(column);
                write_pair(to + d % kStep / 2 * kVector, by_depth[0], by_depth[1]);
                write_pair(to + (d % kStep / 2 + 1) * kVector, by_depth[2], by_depth[3]);
                if (d % kStep + 4 == kStep) to += kStepBytes;
            }
        }
        return magnitudes.ordinary();
    }

    // out [i] [j] = tokens [j] [d + i]; 0 where there is no token j, or no d + i.
    void four_columns(const float *const *tokens, int64_t count, int64_t d, __m512 *out) const {
        const int64_t left = a.depth - d;
        const auto there = static_cast<__mmask8>(left >= 4 ? 15 : left <= 0 ? 0 : (1 << left) - 1);
        __m512 rows[4];  // the four lanes of rows[i] are of tokens i, 4 + i, 8 + i and 12 + i
        for (int i = 0; i < 4; ++i) {
            const auto quad = [&](int j) { return _mm_maskz_loadu_ps(j < count ? there : 0, tokens[j] + d); };
            rows[i] = _mm512_castps128_ps512(quad(i));
            rows[i] = _mm512_insertf32x4(rows[i], quad(4 + i), 1);
            rows[i] = _mm512_insertf32x4(rows[i], quad(8 + i), 2);
            rows[i] = _mm512_insertf32x4(rows[i], quad(12 + i), 3);
        }
        const auto pairs = [](__m512 x) { return _mm512_castps_pd(x); };
        const __m512 a01 = _mm512_unpacklo_ps(rows[0], rows[1]), b01 = _mm512_unpackhi_ps(rows[0], rows[1]);
        const __m512 a23 = _mm512_unpacklo_ps(rows[2], rows[3]), b23 = _mm512_unpackhi_ps(rows[2], rows[3]);
        out[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs(a01), pairs(a23)));
        out[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs(a01), pairs(a23)));
        out[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs(b01), pairs(b23)));
        out[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs(b01), pairs(b23)));
    }

    bool read_values(const Head &head) const {
        Magnitudes magnitudes;
        for (int64_t j = 0; j < key_steps * kStep; j += 2) {
            const float *token = head.value(j < a.keys ? j : 0), *next = head.value(j + 1 < a.keys ? j + 1 : 0);
            uint8_t *to = values + j / kStep * kStepBytes + j % kStep / 2 * kVector;
            for (int64_t tile = 0; tile < value_tiles; ++tile, to += key_steps * kStepBytes) {
                const int64_t left = a.value_depth - tile * 16;
                const __m512 one = magnitudes.seen(load_left(token + tile * 16, j < a.keys ? left : 0));
                write_pair(to, one, magnitudes.seen(load_left(next + tile * 16, j + 1 < a.keys ? left : 0)));
            }
        }
        return magnitudes.ordinary();
    }

    void write_out(float *row, float factor, int64_t q, int64_t column) const {
        for (int64_t i = 0; i < kStep && column + i < a.value_depth; i += 16) {
            const __m512 out = _mm512_mul_ps(_mm512_loadu_ps(sums + q * kStep + i), _mm512_set1_ps(factor));
            _mm512_mask_storeu_ps(row + column + i, mask_of(column + i, a.value_depth), out);
        }
    }
};

}  // namespace

#endif
