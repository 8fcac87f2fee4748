// Tile registers in plain C++, so that the tile product can be tested on a CPU that has none. Included before all else.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace emulated {

struct Tile {
  uint8_t bytes[16][64];
};
inline thread_local Tile tiles[8];
inline thread_local int rows[8], widths[8];

inline void load_config(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  for (int t = 0; t < 8; ++t) {
    uint16_t width;
    std::memcpy(&width, bytes + 16 + 2 * t, 2);
    widths[t] = width, rows[t] = bytes[48 + t];
  }
}
inline void zero(int t) { std::memset(&tiles[t], 0, sizeof(Tile)); }
inline void load(int t, const void* from, int64_t stride) {
  zero(t);
  for (int r = 0; r < rows[t]; ++r) std::memcpy(tiles[t].bytes[r], static_cast<const uint8_t*>(from) + r * stride, widths[t]);
}
inline void store(int t, void* to, int64_t stride) {
  for (int r = 0; r < rows[t]; ++r) std::memcpy(static_cast<uint8_t*>(to) + r * stride, tiles[t].bytes[r], widths[t]);
}

// c[row][column] += the product of word k of a's row with word k of b's column, for all k.
template <typename Sum, typename Product>
inline void multiply(int c, int a, int b, Product&& product) {
  for (int row = 0; row < rows[c]; ++row)
    for (int k = 0; k < widths[a] / 4; ++k)
      for (int column = 0; column < 16; ++column) {
        Sum sum;
        std::memcpy(&sum, tiles[c].bytes[row] + column * 4, 4);
        sum += product(tiles[a].bytes[row] + k * 4, tiles[b].bytes[k] + column * 4);
        std::memcpy(tiles[c].bytes[row] + column * 4, &sum, 4);
      }
}
inline float wide(const uint8_t* p) {
  const uint32_t bits = static_cast<uint32_t>(p[0] | p[1] << 8) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void multiply_bf16(int c, int a, int b) {
  multiply<float>(c, a, b, [](const uint8_t* x, const uint8_t* w) { return wide(x) * wide(w) + wide(x + 2) * wide(w + 2); });
}
inline void multiply_int8(int c, int a, int b) {
  multiply<int32_t>(c, a, b, [](const uint8_t* x, const uint8_t* w) {
    int32_t sum = 0;
    for (int i = 0; i < 4; ++i) sum += x[i] * static_cast<int8_t>(w[i]);
    return sum;
  });
}
inline void release() {}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_zero emulated::zero
#define _tile_dpbf16ps emulated::multiply_bf16
#define _tile_dpbusd emulated::multiply_int8
#define _tile_loadconfig emulated::load_config
#define _tile_release emulated::release
