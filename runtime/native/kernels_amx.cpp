// The kernels for AMX. Many tokens go through tiles (amx_tiles.h); a few are AVX-512's.
//
// A pair of panels is unpacked as the first tokens meet it, and stays in L2 while others pass: as many as fit beside it.

#include "amx_tiles.h"
#include "amx_tokens.h"
#include "avx512.h"

namespace {

constexpr int64_t kFewestTokens = 8;  // below, tiles would be mostly empty
constexpr int64_t kTokenBytes = 3 << 18;  // of inputs that pass while a pair of panels stays: they share L2

bool by_tiles(const prequant_linear &, int64_t tokens) { return tokens >= kFewestTokens; }

// Calls `call` with the kind of tiles that a linear takes.
template <class Call> auto with_tiles(const prequant_linear &linear, Call call) {
    if (linear.input != PREQUANT_INPUT_FLOAT) return call(TilesOfBytes{});
    if (linear.type == PREQUANT_BFLOAT16) return call(TilesOfHalves<1>{});
    return call(TilesOfHalves<3>{});
}

// What a thread has of its own: unpacked tiles, then input sums [tokens][terms][groups].
template <class E> struct Own {
    int64_t together, tiles, sums;
    bool ring;

    Own(const PanelsHeader &h, bool zeros, int64_t tokens) {
        const int64_t fitting = kTokenBytes / Tiles<E>::bytes_of_token_tile(h) / 2 * 2 * kTile;
        together = fitting < 2 * kTile ? 2 * kTile : fitting;
        ring = (tokens < together ? tokens : together) <= 2 * kTile;
        tiles = Unpacker::bytes<E>(h, ring);
        sums = zeros ? round_up(tokens, 2 * kTile) * h.terms * h.groups * 4 : 0;
    }
};

// As floats, and once for each term.
template <class E> void copy_input_sums(const Job &job, float *out) {
    const PanelsHeader &h = *job.panels.header;
    for (int64_t token = 0; token < job.tokens; ++token) {
        for (int64_t term = 0; term < h.terms; ++term) {
            for (int64_t g = 0; g < h.groups; ++g) {
                const int64_t i = token * h.groups + g;
                *out++ = E::kHalves ? job.float_sums[i] : static_cast<float>(job.sums[i]);
            }
        }
    }
}

template <class E> void panels_by_tiles(const Job &job, int64_t first, int64_t last, uint8_t *own) {
    const PanelsHeader &h = *job.panels.header;
    const Own<E> places(h, job.panels.zeros, job.tokens);
    auto *sums = reinterpret_cast<float *>(own + places.tiles);
    if (job.panels.zeros) copy_input_sums<E>(job, sums);
    // A group of an odd number of blocks takes half tiles.
    const bool whole = E::kColumns == kBlockColumns || h.group_blocks % 2 == 0;
    const TileConfiguration configuration(job.tokens < kTile ? static_cast<int>(job.tokens) : kTile,
                                          whole ? kVector : kVector / 2);
    _tile_loadconfig(&configuration);
    const auto *inputs = E::kHalves ? reinterpret_cast<const uint8_t *>(job.floats)
                                    : reinterpret_cast<const uint8_t *>(job.codes);
    const int columns = whole ? E::kColumns : E::kColumns / 2;
    Unpacker unpacker(job, E{}, columns, places.ring, own);
    Tiles<E> tiles(job, inputs, sums, columns, unpacker);
    for (int64_t token = 0; token < job.tokens; token += places.together) {
        const int64_t end = token + places.together < job.tokens ? token + places.together : job.tokens;
        for (int64_t panel = first; panel < last; panel += 2) {
            tiles.run(panel, panel + 1 < last ? 2 : 1, token, end);
        }
    }
    tiles.flush();
    _tile_release();
}

void linear_by_tiles(const Job &job, int64_t first, int64_t last, uint8_t *own) {
    if (!by_tiles(*job.linear, job.tokens)) return avx512vnni_kernels.linear(job, first, last, own);
    with_tiles(*job.linear, [&](auto kind) { panels_by_tiles<decltype(kind)>(job, first, last, own); });
}

void read_tokens_for_tiles(const Job &job, int64_t first, int64_t last) {
    if (!by_tiles(*job.linear, job.tokens)) return read_tokens_avx512(job, first, last);
    with_tiles(*job.linear, [&](auto kind) { read_into_tiles<decltype(kind)>(job, first, last); });
}

int64_t own_bytes_for_tiles(const Panels &panels, const prequant_linear &linear, int64_t tokens) {
    if (!by_tiles(linear, tokens)) return 0;
    return with_tiles(linear, [&](auto kind) {
        const Own<decltype(kind)> own(*panels.header, panels.zeros, tokens);
        return own.tiles + own.sums;
    });
}

}  // namespace

namespace prequant {

extern const Kernels amx_kernels = {"amx", read_tokens_for_tiles, linear_by_tiles, dequantize_rows,
                                    round_rows, round_gradients, own_bytes_for_tiles};

}  // namespace prequant
