// Attention for AMX; other float kernels are AVX-512's.

#include "amx_attention.h"

namespace prequant {

namespace {

constexpr int64_t kFewestQueries = 12;  // below, tiles would be mostly empty

bool by_tiles(const Attention &a) { return a.queries >= kFewestQueries && a.keys > 0 && !a.of_codes; }

}  // namespace

void attention_by_tiles(const Attention &a, int64_t first, int64_t last, char *own) {
    if (!by_tiles(a)) return avx512_floats.attention(a, first, last, own);
    const TileConfiguration configuration(kTile, kVector);
    _tile_loadconfig(&configuration);
    run_blocks(a, first, last, TileAttention(a, reinterpret_cast<uintptr_t>(own)));
    _tile_release();
}

int64_t bytes_of_attention_by_tiles(const Attention &a) {
    if (!by_tiles(a)) return avx512_floats.attention_bytes(a);
    return static_cast<int64_t>(TileAttention(a, 0).end());
}

}  // namespace prequant
