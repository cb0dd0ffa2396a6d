// The kernels for AMX. Many tokens of 8-bit inputs go through tiles; everything else is AVX-512's.
//
// A pair of panels is unpacked once, into signed bytes that stay in L2 while all tokens pass: 16 quads are a tile of 64
// columns of 16 rows. Products of 32 tokens and 32 rows take 2 x 2 tiles of sums, so that each tile loaded is used twice.

#include "avx512.h"

namespace {

constexpr int kTile = 16;              // rows of a tile: tokens, or quads of four columns
constexpr int64_t kFewestTokens = 8;   // below, tiles would be mostly empty

// Tiles 0 to 3: sums [token tile][panel]; 4, 5: inputs; 6, 7: codes.
struct alignas(64) TileConfiguration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    explicit TileConfiguration(int columns) {
        for (int tile = 0; tile < 8; ++tile) {
            const bool inputs = tile == 4 || tile == 5, codes = tile >= 6;
            row_bytes[tile] = static_cast<uint16_t>(inputs ? columns : 64);
            rows[tile] = static_cast<uint8_t>(codes ? columns / 4 : kTile);
        }
    }
};

// One quad of a block as bytes: its bits of plane N, which stand `Low` bits up in the code, and of the planes after it.
template <int B, int N, int Low> PREQUANT_INLINE __m512i quad_of(const uint8_t *plane, int quad) {
    constexpr int kWidth = planes_of(B).width[N];
    if constexpr (kWidth == 0) {
        return _mm512_setzero_si512();
    } else {
        constexpr int kPerByte = 8 / kWidth;
        const int shift = quad % kPerByte * kWidth - Low;
        __m512i bits = Avx512::load(plane + quad / kPerByte * kVector);
        // What comes over from the neighbouring byte is masked out.
        if (shift > 0) bits = _mm512_srli_epi16(bits, static_cast<unsigned>(shift));
        if (shift < 0) bits = _mm512_slli_epi16(bits, static_cast<unsigned>(-shift));
        if (kWidth < 8) bits = _mm512_and_si512(bits, _mm512_set1_epi8(static_cast<char>(((1 << kWidth) - 1) << Low)));
        return _mm512_or_si512(bits, quad_of<B, N + 1, Low + kWidth>(plane + kWidth * kVector, quad));
    }
}

// The codes of one term of a panel as bytes multiple * u - subtrahend, [blocks][quads][64].
template <int B> void unpack(const uint8_t *codes, int64_t blocks, int multiple, int subtrahend, int8_t *out) {
    const __m512i offset = _mm512_set1_epi8(static_cast<char>(subtrahend));
    const __m512i again = _mm512_set1_epi8(static_cast<char>(multiple == 2 ? 0xff : 0));
    for (int64_t block = 0; block < blocks; ++block, codes += B * kVector, out += kQuads * kVector) {
        PREQUANT_UNROLL
        for (int quad = 0; quad < kQuads; ++quad) {
            const __m512i u = quad_of<B, 0, 0>(codes, quad);
            const __m512i scaled = _mm512_add_epi8(u, _mm512_and_si512(u, again));
            _mm512_storeu_si512(out + quad * kVector, _mm512_sub_epi8(scaled, offset));
        }
    }
}

void unpack(const PanelsHeader &h, const uint8_t *codes, int8_t *out) {
    const auto with = [&](auto unpack_bits) { unpack_bits(codes, h.blocks, h.multiple, h.subtrahend, out); };
    switch (h.bits) {
        case 1: return with(unpack<1>);
        case 2: return with(unpack<2>);
        case 3: return with(unpack<3>);
        case 4: return with(unpack<4>);
        case 5: return with(unpack<5>);
        case 6: return with(unpack<6>);
        case 7: return with(unpack<7>);
        case 8: return with(unpack<8>);
    }
}

// Sums of one panel: [tokens][16], as `finish` takes them.
using PanelSums = float[2 * kTile][kPanelRows];

struct Tiles {
    const Job &job;
    const PanelsHeader &h;
    int64_t panel;
    const int8_t *unpacked;  // [terms][2 panels][blocks][512]
    int columns;             // of a step

    int64_t panel_bytes() const { return h.blocks * kQuads * kVector; }

    // T tiles of tokens, N panels.
    template <int T, int N> void run(int64_t token, PanelSums *sums) const {
        alignas(64) int32_t products[2][2][kTile][kPanelRows];
        for (int64_t term = 0; term < h.terms; ++term) {
            const int8_t *codes = unpacked + term * 2 * panel_bytes();
            for (int64_t g = 0; g < h.groups; ++g) {
                const int64_t first = g * h.group_blocks * kBlockColumns;
                const int64_t end = first + static_cast<int64_t>(h.group_blocks) * kBlockColumns;
                const int64_t columns_of_all = h.blocks * kBlockColumns;
                multiply<T, N>(token, codes, first, end < columns_of_all ? end : columns_of_all);
                _tile_stored(0, products[0][0], 64);
                if (N == 2) _tile_stored(1, products[0][1], 64);
                if (T == 2) _tile_stored(2, products[1][0], 64);
                if (T == 2 && N == 2) _tile_stored(3, products[1][1], 64);
                for (int n = 0; n < N; ++n) {
                    for (int t = 0; t < T; ++t) {
                        const Part part{token + t * kTile, term, g, n, products[t][n], sums[n] + t * kTile};
                        if (term + g == 0) {
                            scale<true>(part);
                        } else {
                            scale<false>(part);
                        }
                    }
                }
            }
        }
    }

    template <int T, int N> void multiply(int64_t token, const int8_t *codes, int64_t first, int64_t end) const {
        const int8_t *inputs = job.codes + token * job.stride;
        _tile_zero(0);
        if (N == 2) _tile_zero(1);
        if (T == 2) _tile_zero(2);
        if (T == 2 && N == 2) _tile_zero(3);
        for (int64_t k = first; k < end; k += columns) {
            _tile_loadd(6, codes + k * kPanelRows, kVector);
            _tile_loadd(4, inputs + k, job.stride);
            _tile_dpbssd(0, 4, 6);
            if (N == 2) {
                _tile_loadd(7, codes + panel_bytes() + k * kPanelRows, kVector);
                _tile_dpbssd(1, 4, 7);
            }
            if (T == 2) {
                _tile_loadd(5, inputs + kTile * job.stride + k, job.stride);
                _tile_dpbssd(2, 5, 6);
                if (N == 2) _tile_dpbssd(3, 5, 7);
            }
        }
    }

    // Where the products of a tile with one group of codes go.
    struct Part {
        int64_t token, term, group;
        int panel;
        const int32_t (*products)[kPanelRows];
        float (*sums)[kPanelRows];
    };

    // Adds the products, scaled, to the sums, or begins them.
    template <bool First> void scale(const Part &part) const {
        const int64_t place = (((panel + part.panel) * h.terms + part.term) * h.groups + part.group) * kPanelRows;
        const __m512 scales = _mm512_loadu_ps(job.panels.scales + place);
        if (job.panels.zeros) {
            const __m512 zeros = _mm512_loadu_ps(job.panels.zeros + place);
            for (int m = 0; m < kTile; ++m) {
                const int64_t token = part.token + m;
                const int32_t input_sum = token < job.tokens ? job.sums[token * h.groups + part.group] : 0;
                const __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(part.products[m]));
                add<First>(part.sums[m], scales,
                           _mm512_fnmadd_ps(zeros, _mm512_set1_ps(static_cast<float>(input_sum)), value));
            }
            return;
        }
        for (int m = 0; m < kTile; ++m) {
            add<First>(part.sums[m], scales, _mm512_cvtepi32_ps(_mm512_load_si512(part.products[m])));
        }
    }

    template <bool First> static void add(float *sums, __m512 scales, __m512 value) {
        const __m512 before = First ? _mm512_setzero_ps() : _mm512_loadu_ps(sums);
        _mm512_storeu_ps(sums, _mm512_fmadd_ps(value, scales, before));
    }

    template <int N> void all_tokens() const {
        PanelSums sums[2];
        for (int64_t token = 0; token < job.tokens; token += 2 * kTile) {
            const int64_t left = job.tokens - token;
            if (left > kTile) {
                run<2, N>(token, sums);
            } else {
                run<1, N>(token, sums);
            }
            const int count = static_cast<int>(left < 2 * kTile ? left : 2 * kTile);
            for (int n = 0; n < N; ++n) finish(job, panel + n, token, count, sums[n]);
        }
    }
};

bool by_tiles(const prequant_linear &linear, int64_t tokens) {
    return linear.input != PREQUANT_INPUT_FLOAT && tokens >= kFewestTokens;
}

void linear_by_tiles(const Job &job, int64_t first, int64_t last, uint8_t *own) {
    if (!by_tiles(*job.linear, job.tokens)) return linear_by_panels<Avx512>(job, first, last, own);
    const PanelsHeader &h = *job.panels.header;
    auto *unpacked = reinterpret_cast<int8_t *>(own);
    // A group of an odd number of blocks takes half tiles.
    const int columns = h.group_blocks % 2 ? kBlockColumns : 2 * kBlockColumns;
    const TileConfiguration configuration(columns);
    _tile_loadconfig(&configuration);
    for (int64_t panel = first; panel < last; panel += 2) {
        const Tiles tiles{job, h, panel, unpacked, columns};
        const int count = panel + 1 < last ? 2 : 1;
        for (int64_t term = 0; term < h.terms; ++term) {
            for (int n = 0; n < count; ++n) {
                const int64_t place = (panel + n) * h.terms + term;
                unpack(h, job.panels.codes + place * h.blocks * h.bits * kVector,
                       unpacked + (term * 2 + n) * tiles.panel_bytes());
            }
        }
        if (count == 2) {
            tiles.all_tokens<2>();
        } else {
            tiles.all_tokens<1>();
        }
    }
    _tile_release();
}

int64_t unpacked_bytes(const Panels &panels, const prequant_linear &linear, int64_t tokens) {
    const PanelsHeader &h = *panels.header;
    return by_tiles(linear, tokens) ? h.terms * 2 * h.blocks * kQuads * kVector : 0;
}

}  // namespace

namespace prequant {

extern const Kernels amx_kernels = {"amx", read_all_tokens, linear_by_tiles, dequantize_rows, unpacked_bytes};

}  // namespace prequant
