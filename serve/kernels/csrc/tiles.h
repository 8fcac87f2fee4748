// The product in tiles: eight registers of up to 16 rows x 64 bytes that multiply in one instruction (Intel AMX).
#pragma once
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "layout.h"

namespace halftone {

// The kernel must grant the tile registers to the process once.
inline bool supported() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
         __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct __attribute__((packed)) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Accumulators are in 0-3 (two row blocks x two column tiles), A in 4 and 5, B in 6 and 7.
class Product {
 public:
  static constexpr int kTileRows = 16;
  static constexpr int kGrain = kTileRows, kRows = 2 * kTileRows;
  static constexpr int kFewRows = kRows;        // up to here a block is as fast as memory
  static constexpr int64_t kChunkSteps = 8;     // of a panel, for many blocks: 16 KiB stay in the first cache
  static constexpr bool kReadsCodes = false;    // they are unpacked to memory first

  // b: a panel, in memory if `kFetches`, else in a cache; sums: [rows][32] words, added to if `resume`.
  template <bool kInteger, bool kFetches = true>
  void multiply(const Rows& a, const uint8_t* b, int64_t steps, int rows, float* sums, bool resume, Ahead ahead = {}) {
    const int upper = std::min(rows, kTileRows), lower = rows - upper;
    configure(upper, lower);
    float* below = sums + kTileRows * kPanel;
    settle(sums);
    if (resume) {
      _tile_loadd(0, sums, kPanel * 4);
      _tile_loadd(1, sums + 16, kPanel * 4);
      if (lower) _tile_loadd(2, below, kPanel * 4);
      if (lower) _tile_loadd(3, below + 16, kPanel * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const uint8_t* x = a.data;
    for (int64_t s = 0; s < steps; ++s, x += a.step, b += kPanelStep) {
      for (int line = 0; line < ahead.lines; ++line, ahead.from += 64) _mm_prefetch(ahead.from, _MM_HINT_T0);
      if constexpr (kFetches && kInteger)
        for (int line = 0; line < kPanelStep; line += 64) _mm_prefetch(b + kIntegerAhead + line, _MM_HINT_T0);
      _tile_loadd(6, b, 128);
      if constexpr (kFetches && !kInteger) fetch_half(b + kFloatAhead);
      _tile_loadd(7, b + 64, 128);
      if constexpr (kFetches && !kInteger) fetch_half(b + kFloatAhead + 64);
      _tile_loadd(4, x, a.stride);
      if constexpr (kInteger) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
      } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (!lower) continue;
      _tile_loadd(5, x + a.tile, a.stride);
      if constexpr (kInteger) {
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
      } else {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums, kPanel * 4);
    _tile_stored(1, sums + 16, kPanel * 4);
    if (lower) _tile_stored(2, below, kPanel * 4);
    if (lower) _tile_stored(3, below + 16, kPanel * 4);
    settle(sums);
  }

  // Gives the registers back: other libraries on this thread configure their own, and an empty state switches faster.
  void release() {
    upper_ = -1;
    _tile_release();
  }

 private:
  // Measured: what is asked for near by, between the loads, the processor's own prefetcher takes for a stream.
  static constexpr int64_t kIntegerAhead = 3 * kPanelStep, kFloatAhead = kPanelStep * 3 / 2;

  static void fetch_half(const uint8_t* b) {
    for (int line = 0; line < kPanelStep; line += 128) _mm_prefetch(b + line, _MM_HINT_T1);
  }

  // The compiler does not know that tile instructions read memory: what they are to read must be written by now.
  static void settle(const void* written) { asm volatile("" : : "r"(written) : "memory"); }

  void configure(int upper, int lower) {
    if (upper == upper_ && lower == lower_) return;
    upper_ = upper, lower_ = lower;
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64;
    const int lower_rows = lower ? lower : 1;
    config.rows[0] = config.rows[1] = config.rows[4] = static_cast<uint8_t>(upper);
    config.rows[2] = config.rows[3] = config.rows[5] = static_cast<uint8_t>(lower_rows);
    config.rows[6] = config.rows[7] = kTileRows;
    settle(&config);
    _tile_loadconfig(&config);
  }

  int upper_ = -1, lower_ = -1;
};

}  // namespace halftone
