// Attention of float_kernels.h over vectors of PREQUANT_LANES floats.
//
// A block is up to kQueryBlock queries of one head. Keys are laid out once for all blocks of a head, transposed in
// panels of kVectors vectors of keys, [panel][depth][keys], so that scores are sums of vectors; values are read as they
// lie. A single query takes products with the keys as they lie: laying them out would cost more.

#ifndef PREQUANT_FLOAT_ATTENTION_H
#define PREQUANT_FLOAT_ATTENTION_H

#include "float_vectors.h"

namespace {

constexpr int kRowsAtOnce = 4;
constexpr int kVectors = PREQUANT_LANES == 16 ? 4 : 2;
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

struct Head {
    const Attention &a;
    int64_t batch, head;
    float *keys_by_depth;  // [panels][depth][kPanelKeys]
    float *scores;         // [kQueryBlock][padded keys]

    int64_t padded_keys() const { return (a.keys + kPanelKeys - 1) / kPanelKeys * kPanelKeys; }

    const float *at(const Strided &tensor, int64_t of_head, int64_t token) const {
        return tensor.floats() + batch * tensor.strides[0] + of_head * tensor.strides[1] + token * tensor.strides[2];
    }
    int64_t key_head() const { return head / a.heads_per_key; }

    void transpose_keys() const {
        for (int64_t first = 0; first < a.keys; first += kPanelKeys) {
            float *panel = keys_by_depth + first * a.depth;
            const int64_t count = a.keys - first < kPanelKeys ? a.keys - first : kPanelKeys;
            for (int64_t j = 0; j < count; ++j) {
                const float *key = at(a.key, key_head(), first + j);
                for (int64_t d = 0; d < a.depth; ++d) panel[d * kPanelKeys + j] = key[d];
            }
            for (int64_t j = count; j < kPanelKeys; ++j) {
                for (int64_t d = 0; d < a.depth; ++d) panel[d * kPanelKeys + j] = 0.0f;
            }
        }
    }

    void run(int64_t first_query, int64_t count) const {
        const float *queries = at(a.query, head, first_query);
        const int64_t query_row = a.query.strides[2], score_row = padded_keys();
        if (a.queries < kFewestTransposed) {
            for (int64_t q = 0; q < count; ++q) score_directly(queries + q * query_row, scores + q * score_row);
        } else {
            for (int64_t first = 0; first < a.keys; first += kPanelKeys) {
                multiply_rows(queries, query_row, count, keys_by_depth + first * a.depth, kPanelKeys, a.depth,
                              scores + first, score_row, kPanelKeys);
            }
        }
        float factors[kQueryBlock];
        for (int64_t q = 0; q < count; ++q) factors[q] = softmax(scores + q * score_row, first_query + q);
        float *out = const_cast<float *>(at(a.out, head, first_query));
        multiply_rows(scores, score_row, count, at(a.value, key_head(), 0), a.value.strides[2], a.keys, out,
                      a.out.strides[2], a.value_depth);
        for (int64_t q = 0; q < count; ++q) {
            float *row = out + q * a.out.strides[2];
            for (int64_t d = 0; d < a.value_depth; ++d) row[d] *= factors[q];
        }
    }

    void score_directly(const float *query, float *row) const {
        for (int64_t j = 0; j < a.keys; ++j) {
            const float *key = at(a.key, key_head(), j);
            Floats sum{};
            int64_t d = 0;
            for (; d + kLanes <= a.depth; d += kLanes) sum += load(query + d) * load(key + d);
            if (d < a.depth) sum += load_some(query + d, a.depth - d) * load_some(key + d, a.depth - d);
            row[j] = sum_of(sum);
        }
    }

    // e^(score - largest) in the row's place; returns what the sum of their products has to be multiplied with.
    float softmax(float *row, int64_t query) const {
        const int64_t mask_row = a.mask.data ? batch * a.mask.strides[0] + head * a.mask.strides[1] + query * a.mask.strides[2] : 0;
        const int64_t step = a.mask.data ? a.mask.strides[3] : 0;
        if (a.mask_kind == PREQUANT_MASK_BOOL) {
            const char *seen = a.mask.data + mask_row;
            for (int64_t j = 0; j < a.keys; ++j) row[j] = seen[j * step] ? row[j] * a.scale : -INFINITY;
        } else if (a.mask_kind == PREQUANT_MASK_FLOAT) {
            const float *added = a.mask.floats() + mask_row;
            for (int64_t j = 0; j < a.keys; ++j) row[j] = row[j] * a.scale + added[j * step];
        } else {
            for (int64_t j = 0; j < a.keys; ++j) row[j] *= a.scale;
        }
        Floats most = all_of(-INFINITY);
        int64_t j = 0;
        for (; j + kLanes <= a.keys; j += kLanes) {
            const Floats x = load(row + j);
            most = x > most || x != x ? x : most;
        }
        if (j < a.keys) {
            const Floats x = load_some(row + j, a.keys - j, most);
            most = x > most || x != x ? x : most;
        }
        const float largest = largest_of(most);
        if (largest == -INFINITY) {
            std::memset(row, 0, static_cast<size_t>(a.keys) * sizeof(float));
            return 0.0f;
        }
        Floats sums{};
        const auto power = [largest](Floats x) {
            const Floats below = x - largest;
            const Floats e = exponential(below);
            return below < -87.0f ? Floats{} : below == below ? e : below;
        };
        for (j = 0; j + kLanes <= a.keys; j += kLanes) {
            const Floats e = power(load(row + j));
            sums += e;
            store(row + j, e);
        }
        if (j < a.keys) {
            const Floats e = power(load_some(row + j, a.keys - j, all_of(-INFINITY)));
            sums += e;
            store_some(row + j, e, a.keys - j);
        }
        return 1.0f / sum_of(sums);
    }
};

inline void attention(const Attention &a, int64_t first, int64_t last, char *own) {
    const int64_t of_head = (a.queries + kQueryBlock - 1) / kQueryBlock;
    Head head{a, -1, -1, reinterpret_cast<float *>(own), nullptr};
    head.scores = head.keys_by_depth + head.padded_keys() * a.depth;
    for (int64_t block = first; block < last; ++block) {
        const int64_t batch = block / of_head / a.heads, number = block / of_head % a.heads;
        if (batch != head.batch || number != head.head) {
            head.batch = batch;
            head.head = number;
            if (a.queries >= kFewestTransposed) head.transpose_keys();
        }
        const int64_t query = block % of_head * kQueryBlock;
        head.run(query, a.queries - query < kQueryBlock ? a.queries - query : kQueryBlock);
    }
}

}  // namespace

#endif
