// Codes of panels unpacked for tiles: as signed bytes, or as bfloat16, which holds integers up to 256 exactly.

#ifndef PREQUANT_AMX_UNPACK_H
#define PREQUANT_AMX_UNPACK_H

#include "amx_kinds.h"
#include "avx512.h"

namespace {

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

// Unpacks a pair of panels into tiles, a step at a time: [terms][steps][panels][16][64]. A code becomes the number
// multiple * u - subtrahend: a byte, or bfloat16, where a quad's columns 0 and 2 lie side by side in the lane of their
// row, then 1 and 3. Where no step is read twice, tiles go round in a ring that stays in L1.
class Unpacker {
public:
    static constexpr int kAhead = 2;  // steps that are unpacked before they are used
    static constexpr int64_t kRing = 1 << 13;  // bytes: four steps

    template <class E> Unpacker(const Job &job, E, int columns, bool ring, uint8_t *tiles)
        : job_(job), h_(*job.panels.header), tiles_(tiles), within_(ring ? kRing - 1 : -1),
          blocks_of_step_(columns / kBlockColumns), blocks_(h_.terms * h_.blocks), halves_(E::kHalves) {
        switch (h_.bits) {
            case 1: prepare<1>(); break;
            case 2: prepare<2>(); break;
            case 3: prepare<3>(); break;
            case 4: prepare<4>(); break;
            case 5: prepare<5>(); break;
            case 6: prepare<6>(); break;
            case 7: prepare<7>(); break;
            case 8: prepare<8>(); break;
        }
    }

    template <class E> static int64_t bytes(const PanelsHeader &h, bool ring) {
        return ring ? kRing : 2 * h.terms * h.blocks * kBlockColumns / E::kColumns * kTileBytes;
    }

    void begin(int64_t panel, int panels) {
        codes_ = job_.panels.codes + panel * h_.terms * h_.blocks * h_.bits * kVector;
        panels_ = panels;
        block_ = 0;
    }

    // Sees to it that the step that begins with this column, counted through all terms, is there, and the next ones.
    PREQUANT_INLINE void reach(int64_t column) {
        const int64_t end = column / kBlockColumns + (1 + kAhead) * blocks_of_step_;
        while (block_ < end && block_ < blocks_) unpack_one();
    }

    // The tile of that step.
    const uint8_t *tile(int64_t column, int panel) const { return tiles_ + place(column, panel); }

private:
    void unpack_one() {
        const int64_t bytes = h_.bits * kVector;
        for (int n = 0; n < panels_; ++n) {
            unpack_block_(*this, codes_ + (n * blocks_ + block_) * bytes, tiles_ + place(block_ * kBlockColumns, n));
        }
        ++block_;
    }

    PREQUANT_INLINE int64_t place(int64_t column, int panel) const {
        const int64_t place = halves_ ? column * (2 * kTileBytes / 32)
                                      : column / 64 * 2 * kTileBytes + column % 64 * (kTileBytes / 64);
        return (place & within_) + panel * kTileBytes;
    }

    static constexpr int64_t kFetched = 4096;  // bytes of codes that are on their way from memory

    template <int B> void prepare() {
        unpack_block_ = halves_ ? unpack_halves<B> : unpack_bytes<B>;
        // What each code of up to 5 bits stands for, repeated as often as it fits.
        alignas(64) uint16_t levels[32];
        for (int i = 0; i < 32; ++i) {
            levels[i] = to_bfloat16(static_cast<float>((i & ((1 << (B < 5 ? B : 5)) - 1)) * h_.multiple - h_.subtrahend));
        }
        levels_ = _mm512_load_si512(levels);
    }

    static PREQUANT_INLINE void fetch_ahead(const uint8_t *codes, int vectors) {
        for (int v = 0; v < vectors; ++v) {
            _mm_prefetch(reinterpret_cast<const char *>(codes + kFetched + v * kVector), _MM_HINT_T0);
        }
    }

    template <int B> static void unpack_bytes(const Unpacker &self, const uint8_t *codes, uint8_t *out) {
        const __m512i offset = _mm512_set1_epi8(static_cast<char>(self.h_.subtrahend));
        const __m512i again = _mm512_set1_epi8(static_cast<char>(self.h_.multiple == 2 ? 0xff : 0));
        fetch_ahead(codes, B);
        PREQUANT_UNROLL
        for (int quad = 0; quad < kQuads; ++quad) {
            const __m512i u = quad_of<B, 0, 0>(codes, quad);
            const __m512i scaled = B == 1 ? _mm512_add_epi8(u, _mm512_and_si512(u, again)) : u;
            _mm512_store_si512(out + quad * kVector, _mm512_sub_epi8(scaled, offset));
        }
    }

    template <int B> static void unpack_halves(const Unpacker &self, const uint8_t *codes, uint8_t *out) {
        fetch_ahead(codes, B);
        PREQUANT_UNROLL
        for (int quad = 0; quad < kQuads; ++quad) {
            const __m512i u = quad_of<B, 0, 0>(codes, quad);
            _mm512_store_si512(out + 2 * quad * kVector, self.halves<B>(u, 0));
            _mm512_store_si512(out + (2 * quad + 1) * kVector, self.halves<B>(u, 1));
        }
    }

    // Bytes 0 and 2 of each lane, or 1 and 3, as bfloat16: from the table, or converted if they have more than 5 bits.
    template <int B> PREQUANT_INLINE __m512i halves(__m512i codes, int odd) const {
        if constexpr (B <= 5) {
            return _mm512_permutexvar_epi16(odd ? _mm512_srli_epi16(codes, 8) : codes, levels_);
        } else {
            const __m512i offset = _mm512_set1_epi32(h_.subtrahend), byte = _mm512_set1_epi32(0xff);
            const auto float_bits = [&](__m512i shifted) {
                const __m512i level = _mm512_sub_epi32(_mm512_and_si512(shifted, byte), offset);
                return _mm512_castps_si512(_mm512_cvtepi32_ps(level));
            };
            const __m512i first = float_bits(odd ? _mm512_srli_epi32(codes, 8) : codes);
            const __m512i second = float_bits(_mm512_srli_epi32(codes, odd ? 24 : 16));
            return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(first, 16), second);
        }
    }

    const Job &job_;
    const PanelsHeader &h_;
    uint8_t *tiles_;
    const int64_t within_;  // the ring, or all
    const int blocks_of_step_;
    const int64_t blocks_;  // of a panel, in all terms
    const bool halves_;
    __m512i levels_;
    void (*unpack_block_)(const Unpacker &, const uint8_t *, uint8_t *) = nullptr;

    const uint8_t *codes_ = nullptr;
    int panels_ = 0;
    int64_t block_ = 0;  // the next one of each panel
};

}  // namespace

#endif
