// Tiles: eight registers of up to 16 rows x 64 bytes that multiply in one instruction (Intel AMX).
//
// Both products that we need have one geometry. A row of A holds 64 bytes of activations, 32 bf16 or 64 uint8 numbers;
// B holds the weights of 16 output columns in 16 rows of 64 bytes, column by column in pairs of bf16 or quads of int8.
// The sum over a row runs in one fixed order whatever other rows stand beside it: batch invariance costs nothing.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace halftone {

constexpr int kTileRows = 16;
constexpr int kPanel = 32;          // output columns that are packed and computed together: two tiles
constexpr int kStepBytes = 64;      // bytes of one activation row that one tile product consumes
constexpr int kPanelStep = 2048;    // bytes of packed weights that it consumes, for a whole panel

// The kernel must grant the tile registers to the process once.
inline bool tiles_granted() {
#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
         __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The compiler does not know that tile instructions read memory: what they are to read must be written by now.
inline void settle(const void* written) { asm volatile("" : : "r"(written) : "memory"); }

struct __attribute__((packed)) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// What the tile registers of the running thread are configured for: accumulators 0-3 (two row blocks x two column
// tiles), A in 4 and 5, B in 6 and 7.
class TileShape {
 public:
  void use(int upper, int lower) {
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

  // Somebody else configured the registers.
  void forget() { upper_ = -1; }

  // Gives the registers back: other libraries on this thread configure their own, and an empty state switches faster.
  void release() {
    forget();
    _tile_release();
  }

 private:
  int upper_ = -1, lower_ = -1;
};

}  // namespace halftone
