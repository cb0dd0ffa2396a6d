// Codes of panels unpacked for tiles: as signed bytes, or as bfloat16, which holds integers up to 256 exactly.

#ifndef PREQUANT_AMX_UNPACK_H
#define PREQUANT_AMX_UNPACK_H

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

// The codes of one term of a panel as bytes multiple * u - subtrahend, [blocks][quads][64].
template <int B> void unpack_bytes(const uint8_t *codes, int64_t blocks, int multiple, int subtrahend, uint8_t *out) {
    const __m512i offset = _mm512_set1_epi8(static_cast<char>(subtrahend));
    const __m512i again = _mm512_set1_epi8(static_cast<char>(multiple == 2 ? 0xff : 0));
    for (int64_t block = 0; block < blocks; ++block, codes += B * kVector, out += kQuads * kVector) {
        PREQUANT_UNROLL
        for (int quad = 0; quad < kQuads; ++quad) {
            const __m512i u = quad_of<B, 0, 0>(codes, quad);
            const __m512i scaled = _mm512_add_epi8(u, _mm512_and_si512(u, again));
            _mm512_store_si512(out + quad * kVector, _mm512_sub_epi8(scaled, offset));
        }
    }
}

// Bytes 0 and 2 of each lane's four codes, and 1 and 3, as bfloat16: levels of up to 5 bits come from a table, wider
// codes are converted.
template <int B> struct HalvesOf {
    __m512i table;
    int multiple, subtrahend;

    HalvesOf(int m, int s) : multiple(m), subtrahend(s) {
        alignas(64) uint16_t levels[32];
        for (int i = 0; i < 32; ++i) {
            levels[i] = to_bfloat16(static_cast<float>((i & ((1 << (B < 5 ? B : 5)) - 1)) * m - s));
        }
        table = _mm512_load_si512(levels);
    }

    PREQUANT_INLINE __m512i operator()(__m512i codes, int odd) const {
        if constexpr (B <= 5) {
            return _mm512_permutexvar_epi16(odd ? _mm512_srli_epi16(codes, 8) : codes, table);
        } else {
            const __m512i offset = _mm512_set1_epi32(subtrahend), byte = _mm512_set1_epi32(0xff);
            const auto bits = [&](__m512i shifted) {
                const __m512i level = _mm512_sub_epi32(_mm512_and_si512(shifted, byte), offset);
                return _mm512_castps_si512(_mm512_cvtepi32_ps(level));
            };
            const __m512i first = bits(odd ? _mm512_srli_epi32(codes, 8) : codes);
            const __m512i second = bits(_mm512_srli_epi32(codes, odd ? 24 : 16));
            return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(first, 16), second);
        }
    }
};

// The same as bfloat16, [blocks][16][64]: a quad's columns 0 and 2 side by side in the lane of their row, then 1 and 3.
template <int B> void unpack_halves(const uint8_t *codes, int64_t blocks, int multiple, int subtrahend, uint8_t *out) {
    const HalvesOf<B> halves(multiple, subtrahend);
    for (int64_t block = 0; block < blocks; ++block, codes += B * kVector, out += 2 * kQuads * kVector) {
        PREQUANT_UNROLL
        for (int quad = 0; quad < kQuads; ++quad) {
            const __m512i u = quad_of<B, 0, 0>(codes, quad);
            _mm512_store_si512(out + 2 * quad * kVector, halves(u, 0));
            _mm512_store_si512(out + (2 * quad + 1) * kVector, halves(u, 1));
        }
    }
}

template <int B, bool Halves> void unpack_bits(const PanelsHeader &h, const uint8_t *codes, uint8_t *out) {
    if (Halves) {
        unpack_halves<B>(codes, h.blocks, h.multiple, h.subtrahend, out);
    } else {
        unpack_bytes<B>(codes, h.blocks, h.multiple, h.subtrahend, out);
    }
}

template <bool Halves> void unpack(const PanelsHeader &h, const uint8_t *codes, uint8_t *out) {
    switch (h.bits) {
        case 1: return unpack_bits<1, Halves>(h, codes, out);
        case 2: return unpack_bits<2, Halves>(h, codes, out);
        case 3: return unpack_bits<3, Halves>(h, codes, out);
        case 4: return unpack_bits<4, Halves>(h, codes, out);
        case 5: return unpack_bits<5, Halves>(h, codes, out);
        case 6: return unpack_bits<6, Halves>(h, codes, out);
        case 7: return unpack_bits<7, Halves>(h, codes, out);
        case 8: return unpack_bits<8, Halves>(h, codes, out);
    }
}

}  // namespace

#endif
