// The kernels on panels (panels.h), written once over the vectors V of an instruction set. Each unit that includes this
// gets a copy of its own, compiled with its own flags: hence the unnamed namespace.
//
// V::kRows         rows of a panel that a vector holds: 16, or 8 for half a panel at a time
// V::kFloatTokens  tokens of floats that pass at once: each code is taken out of its byte once for all of them
//
// and where inputs are integers, for M tokens and codes of B bits in planes of W:
//
// V::kTokens, V::kPanels  tokens and panels that pass at once
// V::kStrips<B, M>        vectors of the panels' rows that pass at once
// V::kChains<B, M>        sums that a token's products with a plane are spread over
// V::kPlaces<W>           positions in a byte whose codes need not be shifted down before a product

#ifndef PREQUANT_PANEL_KERNELS_H
#define PREQUANT_PANEL_KERNELS_H

#include "float_panel.h"
#include "integer_panel.h"
#include "neutral_rows.h"
#include "results.h"
#include "rounding_rows.h"
#include "tokens.h"

namespace {

using namespace prequant;

// Multiplies the first `count` of these panels with as many tokens as M goes into. The others are computed in vain.
template <class V, int B, int M>
int64_t integer_tokens(const Job &job, const int64_t (&panels)[V::kPanels], int count, int64_t token) {
    float sums[V::kPanels * M][kPanelRows];
    for (; token + M <= job.tokens; token += M) {
        for (int strip = 0; strip < V::kPanels * kPanelRows / V::kRows; strip += V::template kStrips<B, M>) {
            integer_strips<V, B, M>(job, panels, strip, token, sums);
        }
        for (int p = 0; p < count; ++p) finish(job, panels[p], token, M, sums + p * M);
    }
    return token;
}

template <class V, int B, int M> int64_t float_tokens(const Job &job, int64_t panel, int64_t token) {
    float sums[M][kPanelRows];
    for (; token + M <= job.tokens; token += M) {
        float_panel<V, B, M>(job, panel, token, sums);
        finish(job, panel, token, M, sums);
    }
    return token;
}

template <class V, int B> void panels_of_bits(const Job &job, int64_t first, int64_t last) {
    if (job.linear->input == PREQUANT_INPUT_FLOAT) {
        for (int64_t panel = first; panel < last; ++panel) {
            int64_t token = float_tokens<V, B, V::kFloatTokens>(job, panel, 0);
            token = float_tokens<V, B, 4>(job, panel, token);
            token = float_tokens<V, B, 2>(job, panel, token);
            float_tokens<V, B, 1>(job, panel, token);
        }
        return;
    }
    // As many streams of memory as panels, each without a gap: what is asked for ahead is what comes next.
    const int64_t length = (last - first + V::kPanels - 1) / V::kPanels;
    for (int64_t i = first; i < first + length; ++i) {
        int64_t panels[V::kPanels];
        int count = 0;
        for (int p = 0; p < V::kPanels; ++p) {
            panels[p] = i + p * length < last ? i + p * length : last - 1;
            count += i + p * length < last;
        }
        int64_t token = integer_tokens<V, B, V::kTokens>(job, panels, count, 0);
        token = integer_tokens<V, B, 2>(job, panels, count, token);
        integer_tokens<V, B, 1>(job, panels, count, token);
    }
}

template <class V> void linear_by_panels(const Job &job, int64_t first, int64_t last, uint8_t *) {
    switch (job.panels.header->bits) {
        case 1: return panels_of_bits<V, 1>(job, first, last);
        case 2: return panels_of_bits<V, 2>(job, first, last);
        case 3: return panels_of_bits<V, 3>(job, first, last);
        case 4: return panels_of_bits<V, 4>(job, first, last);
        case 5: return panels_of_bits<V, 5>(job, first, last);
        case 6: return panels_of_bits<V, 6>(job, first, last);
        case 7: return panels_of_bits<V, 7>(job, first, last);
        case 8: return panels_of_bits<V, 8>(job, first, last);
    }
}

inline int64_t no_own_bytes(const Panels &, const prequant_linear &, int64_t) { return 0; }

}  // namespace

#endif
