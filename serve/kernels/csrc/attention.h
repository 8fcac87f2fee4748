// Attention over a paged KV cache with tile products and an online softmax (arXiv 1805.02867, 2205.14135).
//
// A task takes one key/value head and up to 16 query rows of one sequence: the query heads that share the head, for as
// many tokens as fit. It walks the keys 32 at a time from position 0, so the order of every sum depends on the position
// of a token and on nothing else in the batch, however its prompt was chunked.
//
// Scores are computed transposed, S^T = K Q^T: keys lie in the cache just as the first operand wants them, and a query
// is one lane of a vector, so that maximum, exponential and sum need no shuffles.
#pragma once
#include <algorithm>

#include "tiles.h"
#include "vectors.h"

namespace halftone {

constexpr int kKeyStep = 32;

// One layer's cache: [kv_heads][blocks][block_size][head_dim] in bf16, block_size a multiple of 16.
struct Cache {
  bf16* keys;
  bf16* values;
  int64_t head_stride, block_size, head_dim;

  int64_t at(int64_t head, const int64_t* blocks, int64_t position) const {
    return head * head_stride + (blocks[position / block_size] * block_size + position % block_size) * head_dim;
  }
};

struct AttentionRoom {
  alignas(64) bf16 query[8][16 * 32];      // [head_dim / 32] tiles of 16 pairs x 16 queries
  alignas(64) bf16 weights[16 * 32];       // softmax weights, [16 queries][32 keys]
  alignas(64) bf16 value[16 * 32];         // [16 key pairs][16 dimensions][2]
  alignas(64) float scores[kKeyStep * 16];
  alignas(64) float tile[16 * 16];
  alignas(64) float out[16 * 256];         // [16 queries][head_dim]
  alignas(64) float shrink[16];
};

inline void configure_attention() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = 16;
  settle(&config);
  _tile_loadconfig(&config);
}

// Rows of a tile: query r belongs to token r / group at `first_position + r / group`.
struct QueryRows {
  const bf16* rows[16];
  float* out[16];
  int64_t positions[16];
  int count;
};

inline void load_queries(AttentionRoom& room, const QueryRows& q, int64_t head_dim) {
  for (int64_t step = 0; step < head_dim / 32; ++step) {
    __m512i words[16];
    for (int r = 0; r < 16; ++r) words[r] = r < q.count ? _mm512_loadu_si512(q.rows[r] + step * 32) : _mm512_setzero_si512();
    transpose(words);
    for (int pair = 0; pair < 16; ++pair) _mm512_store_si512(room.query[step] + pair * 32, words[pair]);
  }
  settle(room.query);
}

// Two rows of values become pairs by dimension, for 16 dimensions.
inline void pair_values(AttentionRoom& room, const bf16* const rows[kKeyStep], int64_t dimension) {
  for (int pair = 0; pair < 16; ++pair) {
    const auto* even = reinterpret_cast<const __m256i*>(rows[2 * pair] + dimension);
    const auto* odd = reinterpret_cast<const __m256i*>(rows[2 * pair + 1] + dimension);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(even));
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(odd)), 16);
    _mm512_store_si512(room.value + pair * 32, _mm512_or_si512(low, high));
  }
  settle(room.value);
}

inline void attend(AttentionRoom& room, const Cache& cache, const int64_t* blocks, int64_t num_blocks, int64_t head,
                   const QueryRows& q, float scaling, int64_t window) {
  const int64_t dim = cache.head_dim, last = q.positions[q.count - 1];
  load_queries(room, q, dim);
  std::fill_n(room.out, 16 * dim, 0.0f);
  alignas(64) int32_t lanes[16] = {};
  for (int r = 0; r < q.count; ++r) lanes[r] = static_cast<int32_t>(q.positions[r]);
  const __m512i positions = _mm512_load_si512(lanes);
  const __m512 never = _mm512_set1_ps(-1e30f);
  __m512 highest = never, total = _mm512_setzero_ps();
  const int64_t begin = window > 0 ? std::max<int64_t>(0, q.positions[0] - window + 1) / kKeyStep * kKeyStep : 0;

  for (int64_t base = begin; base <= last; base += kKeyStep) {
    const bf16* value_rows[kKeyStep];
    for (int half = 0; half < 2; ++half) {
      const int64_t key = base + half * 16;
      const bool held = key / cache.block_size < num_blocks;  // past the table the null block stands in, all zeros
      const int64_t at = held ? cache.at(head, blocks, key) : head * cache.head_stride;
      for (int i = 0; i < 16; ++i) value_rows[half * 16 + i] = cache.values + at + (held ? i * dim : 0);
      _tile_zero(0);
      for (int64_t step = 0; step < dim / 32; ++step) {
        _tile_loadd(2, cache.keys + at + step * 32, dim * 2);
        _tile_loadd(3, room.query[step], 64);
        _tile_dpbf16ps(0, 2, 3);
      }
      if (half == 0) _tile_stored(0, room.scores, 64);
      else _tile_stored(0, room.scores + 256, 64);
    }
    __m512 most = highest;
    for (int k = 0; k < kKeyStep; ++k) {
      const __m512i key = _mm512_set1_epi32(static_cast<int32_t>(base + k));
      __mmask16 seen = _mm512_cmple_epi32_mask(key, positions);
      if (window > 0)
        seen &= _mm512_cmpgt_epi32_mask(key, _mm512_sub_epi32(positions, _mm512_set1_epi32(static_cast<int32_t>(window))));
      const __m512 s = _mm512_mul_ps(_mm512_load_ps(room.scores + k * 16), _mm512_set1_ps(scaling));
      const __m512 visible = _mm512_mask_blend_ps(seen, never, s);
      _mm512_store_ps(room.scores + k * 16, visible);
      most = _mm512_max_ps(most, visible);
    }
    const __m512 shrink = exp(_mm512_sub_ps(highest, most));
    highest = most;
    total = _mm512_mul_ps(total, shrink);
    _mm512_store_ps(room.shrink, shrink);
    __m512i pairs[16];
    for (int pair = 0; pair < 16; ++pair) {
      const __m512 even = exp(_mm512_sub_ps(_mm512_load_ps(room.scores + pair * 32), most));
      const __m512 odd = exp(_mm512_sub_ps(_mm512_load_ps(room.scores + pair * 32 + 16), most));
      total = _mm512_add_ps(_mm512_add_ps(total, even), odd);
      pairs[pair] = _mm512_or_si512(_mm512_cvtepu16_epi32(to_bf16(even)),
                                    _mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(odd)), 16));
    }
    transpose(pairs);
    for (int r = 0; r < 16; ++r) _mm512_store_si512(room.weights + r * 32, pairs[r]);
    settle(room.weights);
    _tile_loadd(4, room.weights, 64);
    for (int64_t d = 0; d < dim; d += 16) {
      pair_values(room, value_rows, d);
      _tile_loadd(5, room.value, 64);
      _tile_zero(6);
      _tile_dpbf16ps(6, 4, 5);
      _tile_stored(6, room.tile, 64);
      for (int r = 0; r < q.count; ++r) {
        float* out = room.out + r * dim + d;
        const __m512 kept = _mm512_mul_ps(_mm512_load_ps(out), _mm512_set1_ps(room.shrink[r]));
        _mm512_store_ps(out, _mm512_add_ps(kept, _mm512_load_ps(room.tile + r * 16)));
      }
    }
  }
  alignas(64) float inverse[16];
  _mm512_store_ps(inverse, _mm512_div_ps(_mm512_set1_ps(1.0f), total));
  for (int r = 0; r < q.count; ++r)
    for (int64_t d = 0; d < dim; d += 16)
      _mm512_storeu_ps(q.out[r] + d, _mm512_mul_ps(_mm512_load_ps(room.out + r * dim + d), _mm512_set1_ps(inverse[r])));
}

}  // namespace halftone
