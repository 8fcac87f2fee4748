// y = x W^T, a panel of 32 output columns at a time, for every format in layout.h.
#pragma once
#include "activations.h"
#include "product.h"

namespace halftone {

// One thread's room for the results of a panel.
struct PanelRoom {
  static constexpr int64_t kSteps = 16;  // of weights that are unpacked at a time: they stay in the first cache

  alignas(64) uint8_t unpacked[kSteps * kPanelStep];
  std::vector<float> raw;   // [rows][32], before scales
  std::vector<float> sums;  // [rows][32]
  Product& product;

  explicit PanelRoom(Product& thread_product) : product(thread_product) {}

  void reserve(int64_t rows) {
    grow(raw, rows * kPanel);
    grow(sums, rows * kPanel);
  }
};

// The raw sums of one panel, [rows][32]. Where several blocks of rows read it and the product says so, a part of it at a
// time, from the first cache; meanwhile the blocks share the next part among them.
template <bool kInteger>
inline void multiply_panel(Product& product, const Linear& w, const void* x, const Tiling& tiling, int64_t rows,
                           int64_t panel, float* sums) {
  const uint8_t* b = w.weight + panel * w.panel_bytes();
  const int64_t steps = w.steps();
  if (rows <= Product::kRows || Product::kChunkSteps == 0)
    return by_row_blocks(rows, [&](int64_t row, int count) {
      product.multiply<kInteger>(tiling.block(x, row, 0), b, steps, count, sums + row * kPanel, false,
                                 ahead_of(b, steps, rows, row));
    });
  for (int64_t s = 0, end; s < steps; s = end) {
    end = std::min(s + Product::kChunkSteps, steps);
    by_row_blocks(rows, [&](int64_t row, int count) {
      const uint8_t* part = b + s * kPanelStep;
      product.multiply<kInteger, false>(tiling.block(x, row, s), part, end - s, count, sums + row * kPanel, s > 0,
                                        ahead_of(part, end - s, rows, row));
    });
  }
}

// The sums of one panel, scaled, biased: room.sums [rows][32] in fp32.
inline void panel_dense(PanelRoom& room, const Linear& w, const Activations& a, int64_t rows, int64_t panel) {
  multiply_panel<false>(room.product, w, a.wide.data(), wide_tiling(w.inputs, rows), rows, panel, room.sums.data());
}

inline void panel_int8(PanelRoom& room, const Linear& w, const Activations& a, int64_t rows, int64_t panel) {
  multiply_panel<true>(room.product, w, a.narrow.data(), narrow_tiling(w.inputs, rows), rows, panel, room.raw.data());
  const int64_t column = panel * kPanel;
  for (int half = 0; half < 2; ++half) {
    const __mmask16 mask = first(std::max<int64_t>(0, w.outputs - column - half * 16));
    const __m512 scale = _mm512_maskz_loadu_ps(mask, static_cast<const float*>(w.scale) + column + half * 16);
    const __m512i offset = _mm512_maskz_loadu_epi32(mask, static_cast<const int32_t*>(w.offset) + column + half * 16);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * kPanel + half * 16;
      const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(room.raw.data() + at), offset));
      _mm512_storeu_ps(room.sums.data() + at, _mm512_mul_ps(_mm512_mul_ps(exact, scale), _mm512_set1_ps(a.scales[r])));
    }
  }
}

// 16 codes of 4 bits in 16-bit words become 4 lines; the table holds its values twice, so bit 4 may be anything.
inline void unpack_step(const uint8_t* codes, __m512i table, uint8_t* out) {
  for (int half = 0; half < 2; ++half)
    for (int quad = 0; quad < 4; ++quad) {
      const __m512i words = _mm512_loadu_si512(codes + (half * 4 + quad) * 64);
      uint8_t* lines = out + quad * 4 * 128 + half * 64;
      _mm512_store_si512(lines, _mm512_permutexvar_epi16(words, table));
      _mm512_store_si512(lines + 128, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table));
      _mm512_store_si512(lines + 256, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table));
      _mm512_store_si512(lines + 384, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table));
    }
}

// One panel of 4-bit codes: where it lies, and how a group's raw sums become a part of the result.
struct CodePanel {
  const Linear& w;
  const Activations& a;
  int64_t panel, rows;
  const uint8_t* codes = w.weight + panel * w.panel_bytes();
  Tiling tiling = wide_tiling(w.inputs, rows);
  int64_t group_steps = w.group / 32, groups = w.groups();
  __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.table)));

  int64_t first_step(int64_t g) const { return std::min(g * group_steps, w.steps()); }
  const uint8_t* step(int64_t s) const { return codes + s * (kPanelStep / 4); }
  Rows block(int64_t row, int64_t s) const { return tiling.block(a.wide.data(), row, s); }

  void add(int64_t g, int64_t row, int count, const float* raw, float* sums) const {
    const int64_t at = (panel * groups + g) * kPanel;
    for (int half = 0; half < 2; ++half) {
      const __m512 scale = w.grid(w.scale, at + half * 16);
      const __m512 zero = w.offset ? w.grid(w.offset, at + half * 16) : _mm512_setzero_ps();
      for (int r = 0; r < count; ++r) {
        const int64_t i = r * kPanel + half * 16;
        __m512 y = _mm512_loadu_ps(raw + i);
        if (w.offset) y = _mm512_fnmadd_ps(zero, _mm512_set1_ps(a.sums[(row + r) * groups + g]), y);
        _mm512_storeu_ps(sums + i, _mm512_fmadd_ps(y, scale, _mm512_loadu_ps(sums + i)));
      }
    }
  }
};

// Codes become values in registers, for each block of rows again.
template <typename AnyProduct>
  requires AnyProduct::kReadsCodes
inline void multiply_codes(AnyProduct& product, PanelRoom& room, const CodePanel& p, int64_t rows) {
  by_row_blocks(rows, [&](int64_t row, int count) {
    for (int64_t g = 0; g < p.groups; ++g) {
      const int64_t begin = p.first_step(g), steps = p.first_step(g + 1) - begin;
      product.multiply_codes(p.block(row, begin), p.step(begin), p.table, steps, count, room.raw.data());
      p.add(g, row, count, room.raw.data(), room.sums.data() + row * kPanel);
    }
  });
}

// Codes are unpacked to memory, once for all rows.
template <typename AnyProduct>
inline void multiply_codes(AnyProduct& product, PanelRoom& room, const CodePanel& p, int64_t rows) {
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t begin = p.first_step(g), end = p.first_step(g + 1);
    for (int64_t s = begin; s < end; s += PanelRoom::kSteps) {
      const int64_t steps = std::min(PanelRoom::kSteps, end - s);
      for (int64_t i = 0; i < steps; ++i) {
        const uint8_t* step = p.step(s + i);
        for (int line = 0; line < kPanelStep / 4; line += 64) _mm_prefetch(step + kPanelStep * 2 + line, _MM_HINT_T0);
        unpack_step(step, p.table, room.unpacked + i * kPanelStep);
      }
      by_row_blocks(rows, [&](int64_t row, int count) {
        float* raw = room.raw.data() + row * kPanel;
        product.template multiply<false, false>(p.block(row, s), room.unpacked, steps, count, raw, s > begin);
        if (s + steps == end) p.add(g, row, count, raw, room.sums.data() + row * kPanel);
      });
    }
  }
}

inline void panel_code4(PanelRoom& room, const Linear& w, const Activations& a, int64_t rows, int64_t panel) {
  const CodePanel p{w, a, panel, rows};
  std::fill_n(room.sums.data(), rows * kPanel, 0.0f);
  multiply_codes(room.product, room, p, rows);
}

// A panel's numbers go back between the zeros, some steps at a time, and are multiplied as bf16.
inline void panel_sparse(PanelRoom& room, const Linear& w, const Activations& a, int64_t rows, int64_t panel) {
  constexpr int64_t kLines = kPanelStep / 64;
  const Tiling tiling = wide_tiling(w.inputs, rows);
  const bf16* values = reinterpret_cast<const bf16*>(w.weight) + static_cast<const int64_t*>(w.offset)[panel];
  const uint32_t* masks = static_cast<const uint32_t*>(w.scale) + panel * w.steps() * kLines;
  for (int64_t s = 0; s < w.steps(); s += PanelRoom::kSteps) {
    const int64_t steps = std::min(PanelRoom::kSteps, w.steps() - s);
    for (int64_t line = 0; line < steps * kLines; ++line) {
      const uint32_t mask = *masks++;
      if (line % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(values) + 2048, _MM_HINT_T0);
      _mm512_store_si512(room.unpacked + line * 64, _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values)));
      values += __builtin_popcount(mask);
    }
    by_row_blocks(rows, [&](int64_t row, int count) {
      room.product.multiply<false, false>(tiling.block(a.wide.data(), row, s), room.unpacked, steps, count,
                                          room.sums.data() + row * kPanel, s > 0);
    });
  }
}

inline void compute_panel(PanelRoom& room, const Linear& w, const Activations& a, int64_t rows, int64_t panel) {
  room.reserve(rows);
  if (w.format == Format::kInt8) panel_int8(room, w, a, rows, panel);
  else if (w.format == Format::kBf16) panel_dense(room, w, a, rows, panel);
  else if (w.format == Format::kCode4) panel_code4(room, w, a, rows, panel);
  else panel_sparse(room, w, a, rows, panel);
  if (!w.bias) return;
  for (int64_t r = 0; r < rows; ++r)
    for (int half = 0; half < 2; ++half) {
      float* y = room.sums.data() + r * kPanel + half * 16;
      const int64_t column = panel * kPanel + half * 16;
      const __m512 bias = _mm512_maskz_loadu_ps(first(std::max<int64_t>(0, w.outputs - column)), w.bias + column);
      _mm512_storeu_ps(y, _mm512_add_ps(_mm512_loadu_ps(y), bias));
    }
}

// How many panels to take at once: some microseconds of work, 128 KiB of weights for a few rows.
inline int64_t panel_chunk(const Linear& w, int64_t rows) {
  const int64_t blocks = (rows + Product::kRows - 1) / Product::kRows;
  return std::max<int64_t>(1, (128 << 10) / std::max<int64_t>(1, w.panel_bytes() * blocks));
}

}  // namespace halftone
