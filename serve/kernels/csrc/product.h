// The one product that everything here is made of, for the instructions that this build may use.
//
// `Product::multiply` gives the raw sums of some rows of activations with a panel of 32 columns. A row of A holds
// 64 bytes a step, 32 bf16 or 64 uint8 numbers; B holds the step's 16 words for each column: pairs of bf16 or quads of
// int8. The sum over a row runs in one fixed order whatever other rows stand beside it: batch invariance costs nothing.
#pragma once

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#include "tiles.h"
#else
#include "dots.h"
#endif

namespace halftone {

// Of blocks of like size, none larger than the product takes.
inline int64_t block_height(int64_t rows) {
  const int64_t blocks = (rows + Product::kRows - 1) / Product::kRows;
  const int64_t grains = (rows + Product::kGrain - 1) / Product::kGrain;
  return (grains + blocks - 1) / blocks * Product::kGrain;
}

// Rows in such blocks: body(first row, rows).
template <typename Body>
inline void by_row_blocks(int64_t rows, Body&& body) {
  const int64_t count = block_height(rows);
  for (int64_t row = 0; row < rows; row += count) body(row, static_cast<int>(std::min(count, rows - row)));
}

// What to fetch while the block of rows that begins at `row` is multiplied with a panel, or a part of one, at b. Memory
// never rests: the blocks share what follows among them, and a single one that is slower than memory fetches some steps ahead.
inline Ahead ahead_of(const uint8_t* b, int64_t steps, int64_t rows, int64_t row) {
  constexpr int64_t kNear = 8192;
  constexpr int kLines = kPanelStep / 64;
  const int64_t height = block_height(rows), blocks = (rows + height - 1) / height;
  if (blocks == 1) return rows > Product::kFewRows ? Ahead{b + kNear, kLines} : Ahead{};
  const int64_t lines = (kLines + blocks - 1) / blocks;
  return {b + steps * (kPanelStep + row / height * lines * 64), static_cast<int>(lines)};
}

}  // namespace halftone
