// What all ways to compute attention share: where a head's tokens lie, and the softmax of their scores.

#ifndef PREQUANT_ATTENTION_HEAD_H
#define PREQUANT_ATTENTION_HEAD_H

#include "float_vectors.h"

namespace {

struct Head {
    const Attention &a;
    int64_t batch, number;

    // Numbers of a token; heads share keys and values.
    const float *query(int64_t token) const { return at(a.query, number, token); }
    const float *key(int64_t token) const { return at(a.key, number / a.heads_per_key, token); }
    const float *value(int64_t token) const { return at(a.value, number / a.heads_per_key, token); }
    float *out(int64_t token) const { return at(a.out, number, token); }
    const uint8_t *key_codes(int64_t token) const { return a.key.bytes() + offset(a.key, number / a.heads_per_key, token); }
    const uint8_t *value_codes(int64_t token) const {
        return a.value.bytes() + offset(a.value, number / a.heads_per_key, token);
    }
    float key_scale(int64_t token) const { return *at(a.key_scale, number / a.heads_per_key, token); }
    float value_scale(int64_t token) const { return *at(a.value_scale, number / a.heads_per_key, token); }

    // Scores become e^(score - largest); returns what the sum of their products has to be multiplied with.
    float softmax(float *row, int64_t of_query) const {
        const bool as_they_are = a.mask_kind == PREQUANT_MASK_NONE && a.scale > 0.0f;
        if (!as_they_are) scale_and_mask(row, of_query);
        const float scale = as_they_are ? a.scale : 1.0f;
        const int64_t vectors = a.keys / kLanes * kLanes, left = a.keys - vectors;
        Floats most = all_of(-INFINITY);
        const auto see = [&most](Floats x) { most = x > most || x != x ? x : most; };
        for (int64_t j = 0; j < vectors; j += kLanes) see(load(row + j));
        if (left) see(load_some(row + vectors, left, all_of(row[0])));
        const float largest = largest_of(most);
        if (largest == -INFINITY || largest != largest) {
            for (int64_t j = 0; j < a.keys; ++j) row[j] = largest == largest ? 0.0f : largest;
            return largest == largest ? 0.0f : largest;
        }
        Floats sums{};
        const auto power = [&](Floats x) { return exponential((x - largest) * scale); };
        for (int64_t j = 0; j < vectors; j += kLanes) {
            const Floats e = power(load(row + j));
            sums += e;
            store(row + j, e);
        }
        if (left) {
            store_some(row + vectors, power(load_some(row + vectors, left, all_of(largest))), left);
            sums += load_some(row + vectors, left);
        }
        return 1.0f / sum_of(sums);
    }

private:
    int64_t offset(const Strided &tensor, int64_t of_head, int64_t token) const {
        return batch * tensor.strides[0] + of_head * tensor.strides[1] + token * tensor.strides[2];
    }

    float *at(const Strided &tensor, int64_t of_head, int64_t token) const {
        return tensor.floats() + offset(tensor, of_head, token);
    }

    void scale_and_mask(float *row, int64_t of_query) const {
        const float scale = a.scale;
        if (a.mask_kind == PREQUANT_MASK_NONE) {
            for (int64_t j = 0; j < a.keys; ++j) row[j] *= scale;
            return;
        }
        const int64_t *strides = a.mask.strides;
        const int64_t first = batch * strides[0] + number * strides[1] + of_query * strides[2];
        if (a.mask_kind == PREQUANT_MASK_BOOL) {
            const char *seen = a.mask.data + first;
            each_key([=](int64_t j, int64_t at) { row[j] = seen[at] ? row[j] * scale : -INFINITY; });
        } else {
            const float *added = a.mask.floats() + first;
            each_key([=](int64_t j, int64_t at) { row[j] = row[j] * scale + added[at]; });
        }
    }

    // Calls `each` with a key's number and where it is in a row of the mask.
    template <class Each> void each_key(Each each) const {
        const int64_t step = a.mask.strides[3];
        if (step == 1) {  // which the compiler makes vectors of
            for (int64_t j = 0; j < a.keys; ++j) each(j, j);
        } else {
            for (int64_t j = 0; j < a.keys; ++j) each(j, j * step);
        }
    }
};

// Has `way` run blocks [first, last) of queries: `begin` for a head's first one, `run` for each.
template <class Way> void run_blocks(const Attention &a, int64_t first, int64_t last, Way way) {
    const int64_t of_head = (a.queries + kQueryBlock - 1) / kQueryBlock;
    for (int64_t block = first; block < last; ++block) {
        const int64_t number = block / of_head, query = block % of_head * kQueryBlock;
        const Head head{a, number / a.heads, number % a.heads};
        if (block == first || query == 0) way.begin(head);
        way.run(head, query, a.queries - query < kQueryBlock ? a.queries - query : kQueryBlock);
    }
}

}  // namespace

#endif
