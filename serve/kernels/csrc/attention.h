// Attention over a paged KV cache with an online softmax (arXiv 1805.02867, 2205.14135).
//
// A block of the cache is laid out as packed weights are, 32 keys a panel, so that scores and weighted sums are the same
// product as every linear: keys are the columns of q K^T, and 32 dimensions of the values the columns of p V.
//   keys    [head_dim / 2][32 keys][2]
//   values  [head_dim / 32][32 keys / 2][32 dimensions][2]
//
// A task takes one key/value head and up to 16 query rows of one sequence: the query heads that share the head, for as
// many tokens as fit. It walks the keys 32 at a time from position 0, so the order of every sum depends on the position
// of a token and on nothing else in the batch, however its prompt was chunked.
#pragma once
#include "product.h"

namespace halftone {

constexpr int kKeys = 32, kQueryRows = 16, kLargestHead = 256;

// One layer's cache: [kv_heads][blocks][block_size / 32] panels of keys and of values, 32 x width numbers each.
struct Cache {
  bf16* keys;
  bf16* values;
  int64_t head_stride, block_size, width;  // width: head_dim, padded with zeros to a multiple of 32

  int64_t panel(int64_t head, const int64_t* blocks, int64_t position) const {
    return head * head_stride + (blocks[position / block_size] * block_size + position % block_size / kKeys * kKeys) * width;
  }

  void store(int64_t head, const int64_t* blocks, int64_t position, const bf16* key, const bf16* value) const {
    const int64_t at = panel(head, blocks, position), slot = position % kKeys;
    for (int64_t i = 0; i < width; i += 2) std::memcpy(keys + at + i * kKeys + slot * 2, key + i, 4);
    for (int64_t i = 0; i < width; ++i)
      values[at + i / 32 * 32 * kKeys + slot / 2 * 64 + i % 32 * 2 + slot % 2] = value[i];
  }
};

struct AttentionRoom {
  alignas(64) float scores[kQueryRows][kKeys];
  alignas(64) bf16 weights[kQueryRows][kKeys];
  alignas(64) float out[kLargestHead / 32][kQueryRows][32];
  float highest[kQueryRows], total[kQueryRows];
};

// Query row r, `width` numbers at `queries + r * width`, belongs to the token at positions[r].
struct QueryRows {
  const bf16* queries;
  float* out[kQueryRows];
  int64_t positions[kQueryRows];
  int count;
};

// Scores become softmax weights under the highest score so far; what was summed before shrinks accordingly.
inline void weigh(AttentionRoom& room, const QueryRows& q, int r, int64_t base, float scaling, int64_t window, int64_t width) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512 scores[2];
  __mmask16 seen[2];
  for (int half = 0; half < 2; ++half) {
    const int64_t key = base + half * 16;
    const auto bound = [&](int64_t position) { return _mm512_set1_epi32(static_cast<int32_t>(position - key)); };
    seen[half] = _mm512_cmple_epi32_mask(lanes, bound(q.positions[r]));
    if (window > 0) seen[half] &= _mm512_cmpgt_epi32_mask(lanes, bound(q.positions[r] - window));
    const __m512 score = _mm512_mul_ps(_mm512_load_ps(room.scores[r] + half * 16), _mm512_set1_ps(scaling));
    scores[half] = _mm512_mask_blend_ps(seen[half], _mm512_set1_ps(-1e30f), score);
  }
  const float most = std::max(room.highest[r], _mm512_reduce_max_ps(_mm512_max_ps(scores[0], scores[1])));
  if (most > room.highest[r]) {
    const __m512 shrink = exp(_mm512_set1_ps(room.highest[r] - most));
    for (int64_t d = 0; d < width; d += 16) {
      float* out = room.out[d / 32][r] + d % 32;
      _mm512_store_ps(out, _mm512_mul_ps(_mm512_load_ps(out), shrink));
    }
    room.total[r] *= _mm512_cvtss_f32(shrink);
    room.highest[r] = most;
  }
  const __m512 low = _mm512_maskz_mov_ps(seen[0], exp(_mm512_sub_ps(scores[0], _mm512_set1_ps(most))));
  const __m512 high = _mm512_maskz_mov_ps(seen[1], exp(_mm512_sub_ps(scores[1], _mm512_set1_ps(most))));
  room.total[r] += _mm512_reduce_add_ps(_mm512_add_ps(low, high));
  store_bf16(room.weights[r], low);
  store_bf16(room.weights[r] + 16, high);
}

inline void attend(Product& product, AttentionRoom& room, const Cache& cache, const int64_t* blocks, int64_t head,
                   const QueryRows& q, int64_t head_dim, float scaling, int64_t window) {
  const int64_t width = cache.width, last = q.positions[q.count - 1];
  const auto multiply = [&](const void* a, int64_t stride, const bf16* panel, int64_t steps, float (*sums)[32], bool resume,
                            const bf16* next) {
    by_row_blocks(q.count, [&](int64_t row, int count) {
      const Ahead ahead{reinterpret_cast<const uint8_t*>(next), row == 0 && next ? kPanelStep / 64 : 0};
      const Rows block{static_cast<const uint8_t*>(a) + row * stride, stride, kStepBytes, 16 * stride};
      product.multiply<false>(block, reinterpret_cast<const uint8_t*>(panel), steps, count, sums[row], resume, ahead);
    });
  };
  std::fill_n(room.highest, q.count, -1e30f);
  std::fill_n(room.total, q.count, 0.0f);
  std::fill_n(room.out[0][0], width * kQueryRows, 0.0f);
  const int64_t begin = window > 0 ? std::max<int64_t>(0, q.positions[0] - window + 1) / kKeys * kKeys : 0;
  for (int64_t base = begin; base <= last; base += kKeys) {
    const int64_t at = cache.panel(head, blocks, base);
    // Blocks lie anywhere, so the processor cannot guess the next ones.
    const bool more = base + kKeys <= last;
    const int64_t next = more ? cache.panel(head, blocks, base + kKeys) : 0;
    multiply(q.queries, width * 2, cache.keys + at, width / 32, room.scores, false, more ? cache.keys + next : nullptr);
    for (int r = 0; r < q.count; ++r) weigh(room, q, r, base, scaling, window, width);
    for (int64_t d = 0; d < width / 32; ++d) {
      const int64_t part = d * 32 * kKeys;
      multiply(room.weights, kKeys * 2, cache.values + at + part, 1, room.out[d], true,
               more ? cache.values + next + part : nullptr);
    }
  }
  for (int r = 0; r < q.count; ++r) {
    const __m512 inverse = _mm512_set1_ps(1.0f / room.total[r]);
    for (int64_t d = 0; d < head_dim; d += 16)
      _mm512_mask_storeu_ps(q.out[r] + d, first(head_dim - d),
                            _mm512_mul_ps(_mm512_load_ps(room.out[d / 32][r] + d % 32), inverse));
  }
}

}  // namespace halftone
