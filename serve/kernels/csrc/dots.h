// The product in vector registers (AVX-512 with VNNI and BF16): one instruction multiplies a line of 64 bytes of weights,
// 16 columns by one word, with that word of an activation row, and adds to 16 sums.
//
// A block of rows keeps all its sums in registers, so that each line is loaded once for all of them. A row's sum is a
// chain of such instructions in the order of its words, in a block of any height.
#pragma once
#include <array>
#include <cstring>
#include <utility>

#include "layout.h"

namespace halftone {

inline bool supported() { return true; }

class Product {
 public:
  static constexpr int kTileRows = 1;             // every row lies for itself
  static constexpr int kGrain = 1, kRows = 12;    // 24 sums, two lines and a word of activations fit 32 registers
  static constexpr int kFewRows = 4;              // up to here a block is as fast as memory
  static constexpr int64_t kChunkSteps = 0;       // a panel is not cut
  static constexpr bool kReadsCodes = true;       // codes become values in registers

  // b: a panel, in memory if `kFetches`, else in a cache; sums: [rows][32] words, added to if `resume`.
  template <bool kInteger, bool kFetches = true>
  void multiply(const Rows& a, const uint8_t* b, int64_t steps, int rows, float* sums, bool resume, Ahead ahead = {}) {
    static constexpr auto kernels = []<int... kCount>(std::integer_sequence<int, kCount...>) {
      return std::array{&block<kInteger, kFetches, kCount + 1>...};
    }(std::make_integer_sequence<int, kRows>());
    kernels[rows - 1](a.data, a.stride, b, steps, sums, resume, ahead);
  }

  // The same with 4-bit codes.
  void multiply_codes(const Rows& a, const uint8_t* codes, __m512i table, int64_t steps, int rows, float* sums) {
    static constexpr auto kernels = []<int... kCount>(std::integer_sequence<int, kCount...>) {
      return std::array{&code_block<kCount + 1>...};
    }(std::make_integer_sequence<int, kRows>());
    kernels[rows - 1](a.data, a.stride, codes, table, steps, sums);
  }

  void release() {}

 private:
  // Bytes of weights to prefetch into the first cache. A few rows outrun memory and are fed from there alone; more rows
  // leave it time, and find in the second cache what `Ahead` brought.
  static constexpr int64_t kFewRowsAhead = 4096, kManyRowsAhead = 2048, kCodesAhead = 8192;

  template <bool kInteger>
  static __m512i dot(__m512i sum, __m512i x, __m512i line) {
    if constexpr (kInteger) return _mm512_dpbusd_epi32(sum, x, line);
    else return (__m512i)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)line);
  }

  static __m512i word(const uint8_t* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
  }

  // Three rows share a pointer: that many addresses fit the registers.
  template <int kCount>
  struct Pointers {
    const uint8_t* base[(kCount + 2) / 3];
    int64_t stride;

    Pointers(const uint8_t* a, int64_t row_stride) : stride(row_stride) {
      for (int i = 0; i < (kCount + 2) / 3; ++i) base[i] = a + 3 * i * stride;
    }
    const uint8_t* row(int r) const { return base[r / 3] + r % 3 * stride; }
    void advance(int64_t bytes) {
      for (auto& pointer : base) pointer += bytes;
    }
  };

  template <bool kInteger, bool kFetches, int kCount>
  static void block(const uint8_t* a, int64_t stride, const uint8_t* b, int64_t steps, float* sums, bool resume,
                    Ahead ahead) {
    constexpr int64_t kAhead = kCount <= kFewRows ? kFewRowsAhead : kManyRowsAhead;
    __m512i sum[kCount][2];
#pragma GCC unroll 16
    for (int r = 0; r < kCount; ++r)
      for (int half = 0; half < 2; ++half)
        sum[r][half] = resume ? _mm512_loadu_si512(sums + r * kPanel + half * 16) : _mm512_setzero_si512();
    Pointers<kCount> rows(a, stride);
    for (int64_t s = 0; s < steps; ++s, b += kPanelStep, rows.advance(kStepBytes)) {
      for (int line = 0; line < ahead.lines; ++line, ahead.from += 64) _mm_prefetch(ahead.from, _MM_HINT_T1);
#pragma GCC unroll 16
      for (int w = 0; w < 16; ++w) {
        const __m512i left = _mm512_loadu_si512(b + w * 128), right = _mm512_loadu_si512(b + w * 128 + 64);
        if constexpr (kFetches) {
          _mm_prefetch(b + w * 128 + kAhead, _MM_HINT_T0);
          _mm_prefetch(b + w * 128 + 64 + kAhead, _MM_HINT_T0);
        }
#pragma GCC unroll 16
        for (int r = 0; r < kCount; ++r) {
          const __m512i x = word(rows.row(r) + w * 4);
          sum[r][0] = dot<kInteger>(sum[r][0], x, left);
          sum[r][1] = dot<kInteger>(sum[r][1], x, right);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kCount; ++r)
      for (int half = 0; half < 2; ++half) _mm512_storeu_si512(sums + r * kPanel + half * 16, sum[r][half]);
  }

  // Short chains overlap in the processor, so that one row keeps up with memory; the stream needs its prefetch for that.
  template <int kCount>
  static void code_block(const uint8_t* a, int64_t stride, const uint8_t* codes, __m512i table, int64_t steps, float* sums) {
    __m512i sum[kCount][2] = {};
    Pointers<kCount> rows(a, stride);
    for (int64_t s = 0; s < steps; ++s, codes += kPanelStep / 4, rows.advance(kStepBytes)) {
#pragma GCC unroll 4
      for (int quad = 0; quad < 4; ++quad) {
        __m512i left = _mm512_loadu_si512(codes + quad * 64), right = _mm512_loadu_si512(codes + quad * 64 + 256);
        _mm_prefetch(codes + quad * 128 + kCodesAhead, _MM_HINT_T0);
        _mm_prefetch(codes + quad * 128 + 64 + kCodesAhead, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int nibble = 0; nibble < 4; ++nibble) {
          const __m512i low = _mm512_permutexvar_epi16(left, table), high = _mm512_permutexvar_epi16(right, table);
#pragma GCC unroll 16
          for (int r = 0; r < kCount; ++r) {
            const __m512i x = word(rows.row(r) + (quad * 4 + nibble) * 4);
            sum[r][0] = dot<false>(sum[r][0], x, low);
            sum[r][1] = dot<false>(sum[r][1], x, high);
          }
          left = _mm512_srli_epi16(left, 4), right = _mm512_srli_epi16(right, 4);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kCount; ++r)
      for (int half = 0; half < 2; ++half) _mm512_storeu_si512(sums + r * kPanel + half * 16, sum[r][half]);
  }
};

}  // namespace halftone
