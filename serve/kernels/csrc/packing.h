// From a weight as it is stored to a panel as layout.h has it: what a load does to every weight once.
#pragma once
#include "layout.h"

namespace halftone {

// How codes of 4 bits come: one a byte, [N][K]; two a byte, [N][K / 2], the first in the high half (bitsandbytes); or
// blocks of 64 rows, [N / 64][K][32], a byte for rows d and d + 32 (serve/compression/formats/packing.py).
enum class Order : int32_t { kBytes = 0, kPairs = 1, kBlocks = 2 };

// A column's 4-byte words (2 bf16, 4 int8) go to [word][32 columns]; what is past the matrix is zero.
inline void pack_words(const Linear& w, const uint8_t* weight, int64_t panel, uint8_t* out) {
  const int64_t row_bytes = w.format == Format::kInt8 ? w.inputs : w.inputs * 2;
  for (int64_t step = 0; step < w.steps(); ++step)
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t column = panel * kPanel + half * 16, left = row_bytes - step * kStepBytes;
      const __mmask64 mask = left >= kStepBytes ? ~0ull : (1ull << left) - 1;
      __m512i words[16];
      for (int64_t i = 0; i < 16; ++i) {
        const uint8_t* row = weight + (column + i) * row_bytes + step * kStepBytes;
        words[i] = column + i < w.outputs ? _mm512_maskz_loadu_epi8(mask, row) : _mm512_setzero_si512();
      }
      transpose(words);
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(out + step * kPanelStep + i * 128 + half * 64, words[i]);
    }
}

// 8 neighbouring codes of one row, a nibble each in the order of layout.h: those of even inputs, then the odd ones.
inline uint32_t code_words(const Linear& w, const uint8_t* codes, Order order, int fill, int64_t row, int64_t input) {
  uint8_t eight[8];
  for (int64_t i = 0; i < 8; ++i) {
    const int64_t k = input + i;
    if (row >= w.outputs || k >= w.inputs) eight[i] = static_cast<uint8_t>(fill);
    else if (order == Order::kBytes) eight[i] = codes[row * w.inputs + k];
    else eight[i] = static_cast<uint8_t>(codes[(row * w.inputs + k) / 2] >> ((row * w.inputs + k) % 2 ? 0 : 4));
  }
  uint32_t words = 0;
  for (int i = 0; i < 8; ++i) words |= static_cast<uint32_t>(eight[i] & 15) << (i % 2 * 16 + i / 2 * 4);
  return words;
}

inline void pack_rows(const Linear& w, const uint8_t* codes, Order order, int fill, int64_t panel, uint8_t* out) {
  for (int64_t step = 0; step < w.steps(); ++step)
    for (int64_t quad = 0; quad < 4; ++quad) {
      const int64_t input = step * 32 + quad * 8;
      const bool whole = order == Order::kPairs && input + 8 <= w.inputs && w.inputs % 2 == 0;
      for (int64_t column = 0; column < kPanel; ++column) {
        const int64_t row = panel * kPanel + column;
        uint32_t words;
        if (whole && row < w.outputs) {
          uint32_t pairs;
          std::memcpy(&pairs, codes + (row * w.inputs + input) / 2, 4);
          words = _pext_u32(pairs, 0xF0F0F0F0u) | _pext_u32(pairs, 0x0F0F0F0Fu) << 16;
        } else {
          words = code_words(w, codes, order, fill, row, input);
        }
        std::memcpy(out + (step * 8 + column / 16 * 4 + quad) * 64 + column % 16 * 4, &words, 4);
      }
    }
}

// Blocks hold a panel's 32 codes of one input side by side, so that whole lines are made at once.
inline void pack_block(const Linear& w, const uint8_t* codes, int fill, int64_t panel, uint8_t* out) {
  const uint8_t* block = codes + panel / 2 * w.inputs * kPanel;
  const __m256i fills = _mm256_set1_epi8(static_cast<char>(fill));
  const int shift = panel % 2 * 4;
  const auto input = [&](int64_t k) {  // its 32 codes
    if (k >= w.inputs) return fills;
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + k * kPanel));
    return _mm256_and_si256(_mm256_srli_epi16(bytes, shift), _mm256_set1_epi8(15));
  };
  for (int64_t step = 0; step < w.steps(); ++step)
    for (int64_t quad = 0; quad < 4; ++quad) {
      __m512i lines[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      for (int64_t pair = 0; pair < 4; ++pair) {
        const __m256i even = input(step * 32 + quad * 8 + pair * 2), odd = input(step * 32 + quad * 8 + pair * 2 + 1);
        for (int half = 0; half < 2; ++half) {
          const __m128i e = half ? _mm256_extracti128_si256(even, 1) : _mm256_castsi256_si128(even);
          const __m128i o = half ? _mm256_extracti128_si256(odd, 1) : _mm256_castsi256_si128(odd);
          const __m256i both = _mm256_set_m128i(_mm_unpackhi_epi8(e, o), _mm_unpacklo_epi8(e, o));
          lines[half] = _mm512_or_si512(lines[half], _mm512_slli_epi16(_mm512_cvtepu8_epi16(both), pair * 4));
        }
      }
      for (int half = 0; half < 2; ++half) _mm512_storeu_si512(out + (step * 8 + half * 4 + quad) * 64, lines[half]);
    }
}

inline void pack_codes(const Linear& w, const uint8_t* codes, Order order, int fill, int64_t panel, uint8_t* out) {
  if (order == Order::kBlocks) pack_block(w, codes, fill, panel, out);
  else pack_rows(w, codes, order, fill, panel, out);
}

}  // namespace halftone
