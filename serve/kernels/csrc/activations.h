// Activations as the products want them: in bf16, or in 8 bits with a scale per row.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "product.h"

namespace halftone {

// How rows lie: so many together as the product loads at once, 64 bytes of each side by side, then the next 64 of each.
struct Tiling {
  int64_t bytes, rows;  // of a row; in a tile

  Tiling(int64_t row_bytes, int64_t num_rows) : bytes(row_bytes), rows(std::min<int64_t>(num_rows, Product::kTileRows)) {}

  // Where byte `step * 64` of a row is.
  int64_t at(int64_t row, int64_t step) const {
    return row / rows * rows * bytes + (step * rows + row % rows) * kStepBytes;
  }
  Rows block(const void* data, int64_t row, int64_t step) const {
    return {static_cast<const uint8_t*>(data) + at(row, step), rows == 1 ? bytes : kStepBytes, rows * kStepBytes, rows * bytes};
  }
};

// Rows of activations as a product wants them, padded to whole steps. Sized once by whoever owns them.
struct Activations {
  std::vector<bf16> wide;       // [rows][padded inputs], in tiles
  std::vector<uint8_t> narrow;  // [rows][padded inputs], in tiles, zero point 128
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
  const int64_t whole = (rows + Product::kTileRows - 1) / Product::kTileRows * Product::kTileRows;
  grow(wide, whole * padded(inputs));
  grow(narrow, whole * padded(inputs));
  grow(scales, rows);
  grow(sums, rows * groups);
}

inline Tiling wide_tiling(int64_t inputs, int64_t rows) { return {padded(inputs) * 2, rows}; }
inline Tiling narrow_tiling(int64_t inputs, int64_t rows) { return {padded(inputs), rows}; }

inline void widen_row(Activations& a, int64_t row, int64_t rows, const float* x, int64_t inputs) {
  const Tiling tiling = wide_tiling(inputs, rows);
  for (int64_t i = 0; i < padded(inputs); i += 32) {
    bf16* out = a.wide.data() + tiling.at(row, i / 32) / 2;
    store_bf16(out, _mm512_maskz_loadu_ps(first(std::max<int64_t>(0, inputs - i)), x + i));
    store_bf16(out + 16, _mm512_maskz_loadu_ps(first(std::max<int64_t>(0, inputs - i - 16)), x + i + 16));
  }
}

// Symmetric, 8 bits, one scale per row, stored unsigned around 128.
inline void narrow_row(Activations& a, int64_t row, int64_t rows, const float* x, int64_t inputs) {
  __m512 most = _mm512_setzero_ps(), taint = _mm512_setzero_ps();
  for (int64_t i = 0; i < inputs; i += 16) {
    const __m512 v = _mm512_maskz_loadu_ps(first(inputs - i), x + i);
    most = _mm512_max_ps(most, _mm512_abs_ps(v));
    taint = _mm512_fmadd_ps(v, _mm512_setzero_ps(), taint);  // 0, or NaN where anything was not finite
  }
  const float scale = std::max(_mm512_reduce_max_ps(most) / 127.0f, std::numeric_limits<float>::min());
  a.scales[row] = scale + _mm512_reduce_add_ps(taint);  // so that the whole output says so
  const __m512 divisor = _mm512_set1_ps(scale);
  const Tiling tiling = narrow_tiling(inputs, rows);
  for (int64_t i = 0; i < padded(inputs); i += 16) {
    const __mmask16 mask = i < inputs ? first(inputs - i) : 0;
    const __m512i q = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_maskz_loadu_ps(mask, x + i), divisor));
    const __m512i shifted = _mm512_add_epi32(q, _mm512_set1_epi32(128));
    uint8_t* out = a.narrow.data() + tiling.at(row, i / kStepBytes) + i % kStepBytes;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtusepi32_epi8(shifted));
  }
}

// Per group the sum of the widened row: what an asymmetric zero point is multiplied with.
inline void sum_row(Activations& a, int64_t row, int64_t rows, int64_t inputs, int64_t group) {
  const int64_t groups = (inputs + group - 1) / group;
  const Tiling tiling = wide_tiling(inputs, rows);
  for (int64_t g = 0; g < groups; ++g) {
    __m512 sum = _mm512_setzero_ps();
    const int64_t end = std::min((g + 1) * group, inputs);
    for (int64_t i = g * group; i < end; i += 16) {
      const bf16* x = a.wide.data() + tiling.at(row, i / 32) / 2 + i % 32;
      sum = _mm512_add_ps(sum, load_bf16(x, first(end - i)));
    }
    a.sums[row * groups + g] = _mm512_reduce_add_ps(sum);
  }
}

// Row `row` of `rows`.
inline void prepare_row(Activations& a, int64_t row, int64_t rows, const float* x, const Linear& linear) {
  if (linear.format == Format::kInt8) return narrow_row(a, row, rows, x, linear.inputs);
  widen_row(a, row, rows, x, linear.inputs);
  if (linear.format == Format::kCode4 && linear.offset) sum_row(a, row, rows, linear.inputs, linear.group);
}

}  // namespace halftone
