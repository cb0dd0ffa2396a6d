// Products of many tokens with pairs of panels, in tiles.
//
// A tile of inputs is 16 tokens by 64 bytes, and lies in memory as such: [token tiles][steps][parts][16][64]. A tile of
// codes is 16 times 64 bytes: the four columns (bfloat16: two) of each of a panel's 16 rows that 32 bits hold. A block,
// 2 x 2 tiles of products, uses each tile that it loads twice. The sums of a group of columns leave the tiles through
// memory, to be scaled and added up as floats.
//
// What it costs (Sapphire Rapids): a product of two tiles takes 16 cycles, to store a tile as many, to convert and add
// it 32, for vectors multiply at half their rate beside tiles. All this overlaps, unless one waits for another. So a
// tile is stored when the next group is about to take it, and the vectors stay behind: by one group, or by four, which
// they then add up at once. They stay behind across blocks and panels, too: nothing waits until all is done.

#ifndef PREQUANT_AMX_TILES_H
#define PREQUANT_AMX_TILES_H

#include "amx_unpack.h"
#include "avx512.h"

namespace {

constexpr int kTogether = 4;  // groups added at once

// What happens to the sums in the tiles before a step: nothing, they begin, or they leave and begin again.
enum class Sums { kKept, kBegun, kStored };

template <class E> class Tiles {
public:
    // `inputs` of all tokens; `input_sums`, for zero points, [tokens, filled up][terms][groups]; `columns` of a step: those
    // of a tile, or half as many.
    Tiles(const Job &j, const uint8_t *inputs, const float *input_sums, int columns, Unpacker &unpacker)
        : job_(j), h_(*j.panels.header), inputs_(inputs), input_sums_(input_sums), columns_(columns),
          groups_(h_.terms * h_.groups), unpacker_(unpacker) {}

    static int64_t bytes_of_token_tile(const PanelsHeader &h) {
        return h.blocks * kBlockColumns / E::kColumns * E::kParts * kTileBytes;
    }

    // Outputs of tokens [first, last) for `count` panels, which are unpacked as the first tokens pass.
    void run(int64_t panel, int count, int64_t first, int64_t last) {
        unpacker_.begin(panel, count);
        for (int64_t token = first; token < last; token += 2 * kTile) {
            const int64_t left = last - token;
            const Block block{panel, token, static_cast<int>(left < 2 * kTile ? left : 2 * kTile),
                              left > kTile ? 2 : 1, count};
            if (behind_ && (block.tiles != last_.tiles || block.panels != last_.panels)) flush();
            fetch_outputs(block);
            if (block.tiles == 2 && block.panels == 2) run<2, 2>(block);
            if (block.tiles == 2 && block.panels == 1) run<2, 1>(block);
            if (block.tiles == 1 && block.panels == 2) run<1, 2>(block);
            if (block.tiles == 1 && block.panels == 1) run<1, 1>(block);
        }
    }

    // What the vectors are behind with.
    void flush() {
        if (!behind_) return;
        int32_t (*const store)[kTile][kPanelRows] = products_ + (by_fours() ? 3 * of_group_ : 0);
        const int apart = by_fours() ? of_tile_ : 1;
        _tile_stored(0, store[0], kVector);
        if (last_.panels == 2) _tile_stored(1, store[apart], kVector);
        if (last_.tiles == 2) _tile_stored(2, store[2 * apart], kVector);
        if (last_.tiles == 2 && last_.panels == 2) _tile_stored(3, store[3 * apart], kVector);
        for (int tile = 0; tile < 4; ++tile) {
            if (!last_.has(tile)) continue;
            if (by_fours()) {
                add<kTogether>(products_ + tile * of_tile_, of_group_, tile);
            } else {
                add<1>(products_ + tile, 0, tile);
            }
        }
        finish_if_complete();
        behind_ = false;
    }

private:
    using Product = int32_t[kTile][kPanelRows];

    struct Block {
        int64_t panel, token;
        int count;          // of tokens
        int tiles, panels;  // 1 or 2

        bool has(int tile) const { return tile / 2 < tiles && tile % 2 < panels; }
    };

    bool by_fours() const { return groups_ % kTogether == 0; }

    // The outputs' lines, so that they are there when results are written.
    void fetch_outputs(const Block &block) const {
        const int64_t size = job_.linear->type == PREQUANT_FLOAT32 ? 4 : 2;
        const auto *out = static_cast<const char *>(job_.output) + (block.token * h_.rows + block.panel * kPanelRows) * size;
        for (int m = 0; m < block.count; ++m, out += h_.rows * size) {
            _mm_prefetch(out, _MM_HINT_T1);
            if (block.panels == 2) _mm_prefetch(out + kPanelRows * size, _MM_HINT_T1);
        }
    }

    template <int T, int N> void run(const Block &block) {
        if (by_fours()) {
            run_by_fours<T, N>(block);
        } else {
            run_singly<T, N>(block);
        }
    }

    template <int T, int N> void run_singly(const Block &block) {
        for (int64_t group = 0; group < groups_; ++group) {
            if (behind_) {
                multiply<T, N, Sums::kStored>(block, group, products_, 1);
                for (int tile = 0; tile < 4; ++tile) {
                    if (block.has(tile)) add<1>(products_ + tile, 0, tile);
                }
                finish_if_complete();
            } else {
                multiply<T, N, Sums::kBegun>(block, group, nullptr, 0);
            }
            stay_behind(block, group);
        }
    }

    // Group i of four and tile t stand at products [4 i + t] and, in the next four groups, at [i + 4 t]: when the vectors
    // are done with a tile, the places of its four groups take the four tiles of the group that comes next.
    template <int T, int N> void run_by_fours(const Block &block) {
        for (int64_t group = 0; group < groups_; group += kTogether) {
            if (behind_) {
                multiply<T, N, Sums::kStored>(block, group, products_ + 3 * of_group_, of_tile_);
            } else {
                multiply<T, N, Sums::kBegun>(block, group, nullptr, 0);
            }
            const int swapped = of_group_;
            of_group_ = of_tile_;
            of_tile_ = swapped;
            PREQUANT_UNROLL
            for (int i = 0; i < kTogether; ++i) {
                if (i > 0) {
                    multiply<T, N, Sums::kStored>(block, group + i, products_ + (i - 1) * of_group_, of_tile_);
                }
                if (behind_ && block.has(i)) add<kTogether>(products_ + i * of_group_, of_tile_, i);
            }
            if (behind_) finish_if_complete();
            stay_behind(block, group);
        }
    }

    void stay_behind(const Block &block, int64_t group) {
        last_ = block;
        last_group_ = group;
        behind_ = true;
    }

    template <int T, int N, Sums S>
    PREQUANT_INLINE void step(const uint8_t *tokens, const uint8_t *codes, Product *store, int apart) const {
        PREQUANT_UNROLL
        for (int part = 0; part < E::kParts; ++part) {
            const bool first = part == 0;
            if (first) _tile_loadd(6, codes, kVector);
            _tile_loadd(4, tokens + part * kTileBytes, kVector);
            if (first && S == Sums::kStored) _tile_stored(0, store[0], kVector);
            if (first && S != Sums::kKept) _tile_zero(0);
            E::multiply00();
            if (N == 2) {
                if (first) _tile_loadd(7, codes + kTileBytes, kVector);
                if (first && S == Sums::kStored) _tile_stored(1, store[apart], kVector);
                if (first && S != Sums::kKept) _tile_zero(1);
                E::multiply01();
            }
            if (T == 2) {
                _tile_loadd(5, tokens + bytes_of_token_tile(h_) + part * kTileBytes, kVector);
                if (first && S == Sums::kStored) _tile_stored(2, store[2 * apart], kVector);
                if (first && S != Sums::kKept) _tile_zero(2);
                E::multiply10();
            }
            if (T == 2 && N == 2) {
                if (first && S == Sums::kStored) _tile_stored(3, store[3 * apart], kVector);
                if (first && S != Sums::kKept) _tile_zero(3);
                E::multiply11();
            }
        }
    }

    // One group; what it sums up stays in the tiles, and what was in them goes to `store`.
    template <int T, int N, Sums S>
    PREQUANT_INLINE void multiply(const Block &block, int64_t group, Product *store, int apart) {
        const int64_t all = h_.blocks * kBlockColumns, before = group / h_.groups * all;  // in other terms
        const int64_t width = static_cast<int64_t>(h_.group_blocks) * kBlockColumns;
        int64_t k = group % h_.groups * width;
        const int64_t end = k + width < all ? k + width : all;
        const uint8_t *tokens = inputs_ + block.token / kTile * bytes_of_token_tile(h_);
        const auto of_input = [](int64_t column) {  // the second half of a tile lies beside the first
            return column / E::kColumns * E::kParts * kTileBytes + column % E::kColumns * kVector / E::kColumns;
        };
        unpacker_.reach(before + k);
        step<T, N, S>(tokens + of_input(k), unpacker_.tile(before + k, 0), store, apart);
        for (k += columns_; k < end; k += columns_) {
            unpacker_.reach(before + k);
            step<T, N, Sums::kKept>(tokens + of_input(k), unpacker_.tile(before + k, 0), nullptr, 0);
        }
    }

    // Adds the products of a tile, `Count` groups from last_group_, `apart` from each other.
    template <int Count> PREQUANT_INLINE void add(const Product *products, int apart, int tile) {
        if (last_group_ == 0) {
            job_.panels.zeros ? add<Count, true, true>(products, apart, tile) : add<Count, false, true>(products, apart, tile);
        } else {
            job_.panels.zeros ? add<Count, true, false>(products, apart, tile) : add<Count, false, false>(products, apart, tile);
        }
    }

    template <int Count, bool Zeros, bool First> void add(const Product *products, int apart, int tile) {
        const int n = tile % 2, t = tile / 2;
        const int64_t place = ((last_.panel + n) * groups_ + last_group_) * kPanelRows;
        const float *of_inputs = Zeros ? input_sums_ + (last_.token + t * kTile) * groups_ + last_group_ : nullptr;
        float (*sums)[kPanelRows] = sums_[n] + t * kTile;
        __m512 total[kTile];
        PREQUANT_UNROLL
        for (int m = 0; m < kTile; ++m) total[m] = First ? _mm512_setzero_ps() : _mm512_load_ps(sums[m]);
        for (int i = 0; i < Count; ++i) {
            const __m512 scales = _mm512_load_ps(job_.panels.scales + place + i * kPanelRows);
            const __m512 zeros = Zeros ? _mm512_load_ps(job_.panels.zeros + place + i * kPanelRows) : scales;
            PREQUANT_UNROLL
            for (int m = 0; m < kTile; ++m) {
                __m512 value = E::to_floats(products[i * apart][m]);
                if (Zeros) value = _mm512_fnmadd_ps(zeros, _mm512_set1_ps(of_inputs[m * groups_ + i]), value);
                total[m] = _mm512_fmadd_ps(value, scales, total[m]);
            }
        }
        PREQUANT_UNROLL
        for (int m = 0; m < kTile; ++m) _mm512_store_ps(sums[m], total[m]);
    }

    void finish_if_complete() {
        if (last_group_ + (by_fours() ? kTogether : 1) < groups_) return;
        for (int n = 0; n < last_.panels; ++n) finish(job_, last_.panel + n, last_.token, last_.count, sums_[n]);
    }

    const Job &job_;
    const PanelsHeader &h_;
    const uint8_t *inputs_;
    const float *input_sums_;
    const int columns_;
    const int64_t groups_;  // of all terms
    Unpacker &unpacker_;

    // What is not added yet: the last group, which is in the tiles, or the last four, of which one is.
    Block last_{};
    int64_t last_group_ = 0;
    bool behind_ = false;
    int of_group_ = 1, of_tile_ = 4;
    // Rows of tokens that there are not stay 0: what memory happens to hold may be numbers that are slow to add.
    alignas(64) Product products_[kTogether * 4] = {};
    alignas(64) float sums_[2][2 * kTile][kPanelRows];  // [panel][token][row], as `finish` takes them
};

}  // namespace

#endif
