// y = x W^T for weights stored in bf16, int8, 4-bit codes with a scale per group, or bf16 with the zeros left out: one
// packed layout, one loop.
//
// Packed, a panel of 32 output columns lies contiguous over all of K, so that one token reads memory in one stream:
//   bf16   [panels][K/2][32][2]      pairs of inputs
//   int8   [panels][K/4][32][4]      quads of inputs
//   code4  [panels][K/32][2][4][32]  16-bit words; nibble r of word (q, column, parity) is the code of row pair 4 q + r
//   sparse [panels][lines' numbers]   bf16's layout cut into lines of 64 bytes, of each line the numbers that its mask keeps
// K is padded with zeros to a whole step (32 inputs; 64 for int8), N to a whole panel.
//
// code4 keeps scales [panels][groups][32] and, if asymmetric, zeros of the same shape, in fp32 or bf16. A code becomes
// its value in bf16 through a table of 16 (integers and NF4 levels alike); a group's product is summed in fp32 and then
// scaled: sum over groups of scale * (codes . x - zero * sum of x).
//
// sparse keeps a mask of 32 bits per line, [panels][K/2][2], in `scale`, and in `offset` where each panel's numbers begin.
// Lines are read in whole, so 64 bytes more than the last number must be there.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "threads.h"
#include "tiles.h"
#include "vectors.h"

namespace halftone {

enum class Format : int32_t { kBf16 = 0, kInt8 = 1, kCode4 = 2, kSparse = 3 };

// Mirrors serve/kernels/library.py.
struct Linear {
  Format format;
  int32_t outputs, inputs, group;  // group: inputs that share a scale (code4), a multiple of 32
  int32_t half_scales;             // code4: scale and offset are bf16, else fp32
  const uint8_t* weight;
  const void* scale;   // int8: fp32 [N]; code4: [panels][groups][32]; sparse: uint32 masks [panels][K/2][2]
  const void* offset;  // int8: 128 times the column sums, int32 [N]; code4: zeros like scale, or null; sparse: int64 [panels]
  const float* bias;    // [N] or null
  const bf16* table;    // code4: 16 values

  int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  int64_t steps() const { return (inputs + step_inputs() - 1) / step_inputs(); }
  int64_t step_inputs() const { return format == Format::kInt8 ? 64 : 32; }
  int64_t groups() const { return (inputs + group - 1) / group; }
  __m512 grid(const void* values, int64_t at) const {
    return half_scales ? load_bf16(static_cast<const bf16*>(values) + at)
                       : _mm512_loadu_ps(static_cast<const float*>(values) + at);
  }
  int64_t panel_bytes() const { return steps() * (format == Format::kCode4 ? kPanelStep / 4 : kPanelStep); }
};

// Rows of activations as a product wants them, padded to whole steps. Sized once by whoever owns them.
struct Activations {
  std::vector<bf16> wide;       // [rows][padded inputs]
  std::vector<uint8_t> narrow;  // [rows][padded inputs], zero point 128
  std::vector<float> scales;    // [rows], of narrow
  std::vector<float> sums;      // [rows][groups], of wide

  void reserve(int64_t rows, int64_t inputs, int64_t groups);
};

template <typename T>
inline void grow(std::vector<T>& v, int64_t size) {
  if (v.size() < static_cast<size_t>(size)) v.resize(size);
}

inline int64_t padded(int64_t inputs) { return (inputs + 63) / 64 * 64; }

inline void Activations::reserve(int64_t rows, int64_t inputs, int64_t groups) {
  grow(wide, rows * padded(inputs));
  grow(narrow, rows * padded(inputs));
  grow(scales, rows);
  grow(sums, rows * groups);
}

inline void widen_row(Activations& a, int64_t row, const float* x, int64_t inputs) {
  bf16* out = a.wide.data() + row * padded(inputs);
  for (int64_t i = 0; i < padded(inputs); i += 16) {
    const __mmask16 mask = i < inputs ? first(inputs - i) : 0;
    store_bf16(out + i, _mm512_maskz_loadu_ps(mask, x + i));
  }
}

// Symmetric, 8 bits, one scale per row, stored unsigned around 128.
inline void narrow_row(Activations& a, int64_t row, const float* x, int64_t inputs) {
  __m512 most = _mm512_setzero_ps(), taint = _mm512_setzero_ps();
  for (int64_t i = 0; i < inputs; i += 16) {
    const __m512 v = _mm512_maskz_loadu_ps(first(inputs - i), x + i);
    most = _mm512_max_ps(most, _mm512_abs_ps(v));
    taint = _mm512_fmadd_ps(v, _mm512_setzero_ps(), taint);  // 0, or NaN where anything was not finite
  }
  const float scale = std::max(_mm512_reduce_max_ps(most) / 127.0f, std::numeric_limits<float>::min());
  a.scales[row] = scale + _mm512_reduce_add_ps(taint);  // so that the whole output says so
  const __m512 divisor = _mm512_set1_ps(scale);
  uint8_t* out = a.narrow.data() + row * padded(inputs);
  for (int64_t i = 0; i < padded(inputs); i += 16) {
    const __mmask16 mask = i < inputs ? first(inputs - i) : 0;
    const __m512i q = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_maskz_loadu_ps(mask, x + i), divisor));
    const __m512i shifted = _mm512_add_epi32(q, _mm512_set1_epi32(128));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtusepi32_epi8(shifted));
  }
}

// Per group the sum of the widened row: what an asymmetric zero point is multiplied with.
inline void sum_row(Activations& a, int64_t row, int64_t inputs, int64_t group) {
  const int64_t groups = (inputs + group - 1) / group;
  const bf16* x = a.wide.data() + row * padded(inputs);
  for (int64_t g = 0; g < groups; ++g) {
    __m512 sum = _mm512_setzero_ps();
    const int64_t end = std::min((g + 1) * group, inputs);
    for (int64_t i = g * group; i < end; i += 16) sum = _mm512_add_ps(sum, load_bf16(x + i, first(end - i)));
    a.sums[row * groups + g] = _mm512_reduce_add_ps(sum);
  }
}

inline void prepare_row(Activations& a, int64_t row, const float* x, const Linear& linear) {
  if (linear.format == Format::kInt8) return narrow_row(a, row, x, linear.inputs);
  widen_row(a, row, x, linear.inputs);
  if (linear.format == Format::kCode4 && linear.offset) sum_row(a, row, linear.inputs, linear.group);
}

// Row `output` of a bf16 weight, out of its packed layout: how a tied embedding is read.
inline void unpack_row(const Linear& w, int64_t output, float* out) {
  const uint8_t* column = w.weight + output / kPanel * w.panel_bytes() + output % kPanel * 4;
  for (int64_t i = 0; i < w.inputs; ++i) {
    bf16 value;
    std::memcpy(&value, column + i / 2 * kPanel * 4 + i % 2 * 2, 2);
    out[i] = from_bf16(value);
  }
}

// One thread's room for the results of a panel.
struct PanelRoom {
  alignas(64) float tile[kTileRows * 16];
  alignas(64) bf16 unpacked[2 * kPanelStep / 2 * 64];  // the steps of one group of up to 4096 inputs
  std::vector<float> sums;                               // [rows][32]
  TileShape& shape;

  explicit PanelRoom(TileShape& thread_shape) : shape(thread_shape) {}
};

// 16 codes of 4 bits in 16-bit words become 4 tile rows; the table holds its values twice, so bit 4 may be anything.
inline void unpack_step(const uint8_t* codes, __m512i table, uint8_t* out) {
  for (int tile = 0; tile < 2; ++tile)
    for (int quad = 0; quad < 4; ++quad) {
      const __m512i words = _mm512_loadu_si512(codes + (tile * 4 + quad) * 64);
      uint8_t* rows = out + quad * 4 * 128 + tile * 64;
      _mm512_store_si512(rows, _mm512_permutexvar_epi16(words, table));
      _mm512_store_si512(rows + 128, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table));
      _mm512_store_si512(rows + 256, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table));
      _mm512_store_si512(rows + 384, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table));
    }
}

template <bool kInteger>
inline void multiply_tiles(const uint8_t* a, int64_t a_stride, const uint8_t* b, int64_t steps, bool lower) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s, a += kStepBytes, b += kPanelStep) {
    for (int line = 0; line < kPanelStep; line += 64) _mm_prefetch(b + 3 * kPanelStep + line, _MM_HINT_T0);
    _tile_loadd(6, b, 128);
    _tile_loadd(7, b + 64, 128);
    _tile_loadd(4, a, a_stride);
    if constexpr (kInteger) {
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (!lower) continue;
    _tile_loadd(5, a + kTileRows * a_stride, a_stride);
    if constexpr (kInteger) {
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    } else {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

// Calls fold(row, half, vector of 16 raw sums) for every row of the block and both halves of the panel.
template <typename Fold>
inline void fold_tiles(PanelRoom& room, int64_t row, int upper, int lower, Fold&& fold) {
  const auto drain = [&](int64_t begin, int rows, int half) {
    for (int r = 0; r < rows; ++r) fold(begin + r, half, _mm512_load_si512(room.tile + r * 16));
  };
  _tile_stored(0, room.tile, 64);
  drain(row, upper, 0);
  _tile_stored(1, room.tile, 64);
  drain(row, upper, 1);
  if (!lower) return;
  _tile_stored(2, room.tile, 64);
  drain(row + kTileRows, lower, 0);
  _tile_stored(3, room.tile, 64);
  drain(row + kTileRows, lower, 1);
}

template <typename Body>
inline void by_row_blocks(int64_t rows, Body&& body) {
  for (int64_t row = 0; row < rows; row += 2 * kTileRows) {
    const int upper = static_cast<int>(std::min<int64_t>(kTileRows, rows - row));
    const int lower = static_cast<int>(std::min<int64_t>(kTileRows, std::max<int64_t>(0, rows - row - kTileRows)));
    body(row, upper, lower);
  }
}

// The sums of one panel, scaled, biased: room.sums [rows][32] in fp32.
inline void panel_dense(PanelRoom& room, const Linear& w, const Activations& a, int64_t rows, int64_t panel) {
  const uint8_t* b = w.weight + panel * w.panel_bytes();
  const int64_t stride = padded(w.inputs) * 2;
  by_row_blocks(rows, [&](int64_t row, int upper, int lower) {
    room.shape.use(upper, lower);
    multiply_tiles<false>(reinterpret_cast<const uint8_t*>(a.wide.data()) + row * stride, stride, b, w.steps(), lower);
    fold_tiles(room, row, upper, lower, [&](int64_t r, int half, __m512i sums) {
      _mm512_storeu_ps(room.sums.data() + r * kPanel + half * 16, _mm512_castsi512_ps(sums));
    });
  });
}

inline void panel_int8(PanelRoom& room, const Linear& w, const Activations& a, int64_t rows, int64_t panel) {
  const uint8_t* b = w.weight + panel * w.panel_bytes();
  const int64_t stride = padded(w.inputs), column = panel * kPanel;
  by_row_blocks(rows, [&](int64_t row, int upper, int lower) {
    room.shape.use(upper, lower);
    multiply_tiles<true>(a.narrow.data() + row * stride, stride, b, w.steps(), lower);
    fold_tiles(room, row, upper, lower, [&](int64_t r, int half, __m512i sums) {
      const __mmask16 mask = first(w.outputs - column - half * 16);
      const __m512 scale = _mm512_maskz_loadu_ps(mask, static_cast<const float*>(w.scale) + column + half * 16);
      const __m512i offset = _mm512_maskz_loadu_epi32(mask, static_cast<const int32_t*>(w.offset) + column + half * 16);
      const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, offset));
      const __m512 y = _mm512_mul_ps(_mm512_mul_ps(exact, scale), _mm512_set1_ps(a.scales[r]));
      _mm512_storeu_ps(room.sums.data() + r * kPanel + half * 16, y);
    });
  });
}

inline void panel_code4(PanelRoom& room, const Linear& w, const Activations& a, int64_t rows, int64_t panel) {
  const int64_t stride = padded(w.inputs) * 2, group_steps = (w.group + 31) / 32, groups = w.groups();
  const __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.table)));
  const uint8_t* codes = w.weight + panel * w.panel_bytes();
  auto* unpacked = reinterpret_cast<uint8_t*>(room.unpacked);
  std::fill_n(room.sums.data(), rows * kPanel, 0.0f);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first_step = g * group_steps, steps = std::min(group_steps, w.steps() - first_step);
    for (int64_t s = 0; s < steps; ++s) {
      const uint8_t* next = codes + (first_step + s) * (kPanelStep / 4);
      for (int line = 0; line < kPanelStep / 4; line += 64) _mm_prefetch(next + kPanelStep * 2 + line, _MM_HINT_T0);
      unpack_step(next, table, unpacked + s * kPanelStep);
    }
    settle(unpacked);
    const int64_t at = (panel * groups + g) * kPanel;
    const __m512 scales[2] = {w.grid(w.scale, at), w.grid(w.scale, at + 16)};
    const __m512 none = _mm512_setzero_ps();
    const __m512 zeros[2] = {w.offset ? w.grid(w.offset, at) : none, w.offset ? w.grid(w.offset, at + 16) : none};
    by_row_blocks(rows, [&](int64_t row, int upper, int lower) {
      room.shape.use(upper, lower);
      const auto* x = reinterpret_cast<const uint8_t*>(a.wide.data()) + row * stride + first_step * kStepBytes;
      multiply_tiles<false>(x, stride, unpacked, steps, lower);
      fold_tiles(room, row, upper, lower, [&](int64_t r, int half, __m512i sums) {
        __m512 y = _mm512_castsi512_ps(sums);
        if (w.offset) y = _mm512_fnmadd_ps(zeros[half], _mm512_set1_ps(a.sums[r * groups + g]), y);
        float* total = room.sums.data() + r * kPanel + half * 16;
        _mm512_storeu_ps(total, _mm512_fmadd_ps(y, scales[half], _mm512_loadu_ps(total)));
      });
    });
  }
}

// A panel's numbers go back between the zeros, some steps at a time, and are multiplied as bf16.
inline void panel_sparse(PanelRoom& room, const Linear& w, const Activations& a, int64_t rows, int64_t panel) {
  constexpr int64_t kSteps = 16, kLines = kPanelStep / 64;
  const int64_t stride = padded(w.inputs) * 2;
  const bf16* values = reinterpret_cast<const bf16*>(w.weight) + static_cast<const int64_t*>(w.offset)[panel];
  const uint32_t* masks = static_cast<const uint32_t*>(w.scale) + panel * w.steps() * kLines;
  auto* unpacked = reinterpret_cast<uint8_t*>(room.unpacked);
  std::fill_n(room.sums.data(), rows * kPanel, 0.0f);
  for (int64_t first_step = 0; first_step < w.steps(); first_step += kSteps) {
    const int64_t steps = std::min(kSteps, w.steps() - first_step);
    for (int64_t line = 0; line < steps * kLines; ++line) {
      const uint32_t mask = *masks++;
      if (line % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(values) + 2048, _MM_HINT_T0);
      _mm512_store_si512(unpacked + line * 64, _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values)));
      values += __builtin_popcount(mask);
    }
    settle(unpacked);
    by_row_blocks(rows, [&](int64_t row, int upper, int lower) {
      room.shape.use(upper, lower);
      const auto* x = reinterpret_cast<const uint8_t*>(a.wide.data()) + row * stride + first_step * kStepBytes;
      multiply_tiles<false>(x, stride, unpacked, steps, lower);
      fold_tiles(room, row, upper, lower, [&](int64_t r, int half, __m512i sums) {
        float* total = room.sums.data() + r * kPanel + half * 16;
        _mm512_storeu_ps(total, _mm512_add_ps(_mm512_castsi512_ps(sums), _mm512_loadu_ps(total)));
      });
    });
  }
}

inline void compute_panel(PanelRoom& room, const Linear& w, const Activations& a, int64_t rows, int64_t panel) {
  grow(room.sums, rows * kPanel);
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

// How many panels to take at once: about 128 KiB of weights.
inline int64_t panel_chunk(const Linear& w) { return std::max<int64_t>(1, (128 << 10) / std::max<int64_t>(1, w.panel_bytes())); }

}  // namespace halftone
