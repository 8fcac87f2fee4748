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

// Rows in blocks of like size, none larger than the product takes: body(first row, rows).
template <typename Body>
inline void by_row_blocks(int64_t rows, Body&& body) {
  const int64_t blocks = (rows + Product::kRows - 1) / Product::kRows;
  const int64_t grains = (rows + Product::kGrain - 1) / Product::kGrain;
  const int64_t count = (grains + blocks - 1) / blocks * Product::kGrain;
  for (int64_t row = 0; row < rows; row += count) body(row, static_cast<int>(std::min(count, rows - row)));
}

}  // namespace halftone
