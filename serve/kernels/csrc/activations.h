// Activations as the products want them: in bf16, or in 8 bits with a scale per row.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "layout.h"

namespace halftone {

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

}  // namespace halftone
