// Attention of float_kernels.h over the processor's vectors.
//
// A block is up to kQueryBlock queries of one head. Keys are laid out once for all blocks of a head, transposed in
// panels of kVectors vectors of keys, [panel][depth][keys], so that scores are sums of vectors; values are read as they
// lie. A single query takes products with the keys as they lie: laying them out would cost more. So does any number of
// queries where keys and values are codes, which are read as often as there are queries.

#ifndef PREQUANT_FLOAT_ATTENTION_H
#define PREQUANT_FLOAT_ATTENTION_H

#include "attention_head.h"
#include "codes.h"
#include "sections.h"

namespace {

constexpr int kRowsAtOnce = 4;
constexpr int kVectors = kLanes == 16 ? 4 : 2;
constexpr int64_t kPanelKeys = kVectors * kLanes;
constexpr int64_t kFewestTransposed = 4;  // queries

// out [Rows][N vectors] = a [Rows][count] b [count][N vectors]; rows of a, b and out lie so far apart. Of the last vector
// there are `lanes`: all of them if Whole.
template <int Rows, int N, bool Whole>
inline void multiply(const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t count, float *out,
                     int64_t out_row, int64_t lanes) {
    Floats sums[Rows][N] = {};
    for (int64_t k = 0; k < count; ++k) {
        Floats of_b[N];
        for (int n = 0; n < N; ++n) {
            const float *from = b + k * b_row + n * kLanes;
            of_b[n] = Whole || n + 1 < N ? load(from) : load_some(from, lanes);
        }
        for (int r = 0; r < Rows; ++r) {
            const Floats of_a = all_of(a[r * a_row + k]);
            for (int n = 0; n < N; ++n) sums[r][n] += of_a * of_b[n];
        }
    }
    for (int r = 0; r < Rows; ++r) {
        for (int n = 0; n < N; ++n) {
            float *to = out + r * out_row + n * kLanes;
            if (Whole || n + 1 < N) {
                store(to, sums[r][n]);
            } else {
                store_some(to, sums[r][n], lanes);
            }
        }
    }
}

template <int Rows>
inline void multiply_columns(const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t count, float *out,
                             int64_t out_row, int64_t columns) {
    int64_t c = 0;
    for (; c + kPanelKeys <= columns; c += kPanelKeys) {
        multiply<Rows, kVectors, true>(a, a_row, b + c, b_row, count, out + c, out_row, kLanes);
    }
    for (; c + kLanes <= columns; c += kLanes) {
        multiply<Rows, 1, true>(a, a_row, b + c, b_row, count, out + c, out_row, kLanes);
    }
    if (c < columns) multiply<Rows, 1, false>(a, a_row, b + c, b_row, count, out + c, out_row, columns - c);
}

// out [rows][columns] = a [rows][count] b [count][columns]
inline void multiply_rows(const float *a, int64_t a_row, int64_t rows, const float *b, int64_t b_row, int64_t count,
                          float *out, int64_t out_row, int64_t columns) {
    int64_t r = 0;
    for (; r + kRowsAtOnce <= rows; r += kRowsAtOnce) {
        multiply_columns<kRowsAtOnce>(a + r * a_row, a_row, b, b_row, count, out + r * out_row, out_row, columns);
    }
    for (; r < rows; ++r) {
        multiply_columns<1>(a + r * a_row, a_row, b, b_row, count, out + r * out_row, out_row, columns);
    }
}

struct VectorAttention {
    const Attention &a;
    float *keys_by_depth;  // [panels][depth][kPanelKeys]
    float *scores;         // [kQueryBlock][padded keys]

    VectorAttention(const Attention &attention, Sections &scratch)
        : a(attention), keys_by_depth(scratch.take<float>(padded_keys() * a.depth * 4)),
          scores(scratch.take<float>(kQueryBlock * padded_keys() * 4)) {}

    int64_t padded_keys() const { return (a.keys + kPanelKeys - 1) / kPanelKeys * kPanelKeys; }

    // Before a head's first block.
    void begin(const Head &head) const {
        if (a.queries < kFewestTransposed || a.of_codes) return;
        for (int64_t first = 0; first < a.keys; first += kPanelKeys) {
            float *panel = keys_by_depth + first * a.depth;
            const int64_t count = a.keys - first < kPanelKeys ? a.keys - first : kPanelKeys;
            for (int64_t j = 0; j < count; ++j) {
                const float *key = head.key(first + j);
                for (int64_t d = 0; d < a.depth; ++d) panel[d * kPanelKeys + j] = key[d];
            }
            for (int64_t j = count; j < kPanelKeys; ++j) {
                for (int64_t d = 0; d < a.depth; ++d) panel[d * kPanelKeys + j] = 0.0f;
            }
        }
    }

    void run(const Head &head, int64_t first_query, int64_t count) const {
        const float *queries = head.query(first_query);
        const int64_t query_row = a.query.strides[2], score_row = padded_keys();
        if (a.of_codes) {
            for (int64_t q = 0; q < count; ++q) score_codes(head, queries + q * query_row, scores + q * score_row);
        } else if (a.queries < kFewestTransposed) {
            for (int64_t q = 0; q < count; ++q) score_directly(head, queries + q * query_row, scores + q * score_row);
        } else {
            for (int64_t first = 0; first < a.keys; first += kPanelKeys) {
                multiply_rows(queries, query_row, count, keys_by_depth + first * a.depth, kPanelKeys, a.depth,
                              scores + first, score_row, kPanelKeys);
            }
        }
        float factors[kQueryBlock];
        for (int64_t q = 0; q < count; ++q) factors[q] = head.softmax(scores + q * score_row, first_query + q);
        float *out = head.out(first_query);
        if (a.of_codes) {
            for (int64_t q = 0; q < count; ++q) add_codes(head, scores + q * score_row, out + q * a.out.strides[2]);
        } else {
            multiply_rows(scores, score_row, count, head.value(0), a.value.strides[2], a.keys, out, a.out.strides[2],
                          a.value_depth);
        }
        for (int64_t q = 0; q < count; ++q) {
            float *row = out + q * a.out.strides[2];
            for (int64_t d = 0; d < a.value_depth; ++d) row[d] *= factors[q];
        }
    }

    void score_directly(const Head &head, const float *query, float *row) const {
        for (int64_t j = 0; j < a.keys; ++j) {
            const float *key = head.key(j);
            Floats sum{};
            int64_t d = 0;
            for (; d + kLanes <= a.depth; d += kLanes) sum += load(query + d) * load(key + d);
            if (d < a.depth) sum += load_some(query + d, a.depth - d) * load_some(key + d, a.depth - d);
            row[j] = sum_of(sum);
        }
    }

    void score_codes(const Head &head, const float *query, float *row) const {
        const int64_t whole = a.depth / kLanes * kLanes, left = a.depth - whole;
        const Floats rest = left ? load_some(query + whole, left) : Floats{};
        for (int64_t j = 0; j < a.keys; ++j) {
            const uint8_t *codes = head.key_codes(j);
            Floats sum{};
            for (int64_t d = 0; d < whole; d += kLanes) sum += load(query + d) * levels_of(codes + d);
            if (left) sum += rest * levels_of_some(codes + whole, left);
            row[j] = sum_of(sum) * head.key_scale(j);
        }
    }

    // out [depth] = row [keys] values; the row is changed.
    void add_codes(const Head &head, float *row, float *out) const {
        for (int64_t j = 0; j < a.keys; ++j) row[j] *= head.value_scale(j);
        int64_t d = 0;
        for (; d + kVectors * kLanes <= a.value_depth; d += kVectors * kLanes) {
            Floats sums[kVectors] = {};
            for (int64_t j = 0; j < a.keys; ++j) {
                const uint8_t *codes = head.value_codes(j) + d;
                for (int n = 0; n < kVectors; ++n) sums[n] += row[j] * levels_of(codes + n * kLanes);
            }
            for (int n = 0; n < kVectors; ++n) store(out + d + n * kLanes, sums[n]);
        }
        for (; d < a.value_depth; d += kLanes) {
            const int64_t lanes = a.value_depth - d < kLanes ? a.value_depth - d : kLanes;
            Floats sum{};
            for (int64_t j = 0; j < a.keys; ++j) sum += row[j] * levels_of_some(head.value_codes(j) + d, lanes);
            store_some(out + d, sum, lanes);
        }
    }
};

inline void attention(const Attention &a, int64_t first, int64_t last, char *own) {
    Sections scratch{reinterpret_cast<uintptr_t>(own)};
    run_blocks(a, first, last, VectorAttention(a, scratch));
}

inline int64_t attention_bytes(const Attention &a) {
    Sections scratch{0};
    VectorAttention(a, scratch);
    return static_cast<int64_t>(scratch.next);
}

}  // namespace

#endif
