// How weights lie in memory: one packed layout for weights stored in bf16, int8, 4-bit codes with a scale per group, or
// bf16 with the zeros left out.
//
// Packed, a panel of 32 output columns lies contiguous over all of K, so that one token reads memory in one stream:
//   bf16   [panels][K/2][32][2]      pairs of inputs
//   int8   [panels][K/4][32][4]      quads of inputs
//   code4  [panels][K/32][2][4][32]  16-bit words; nibble r of word (q, column, parity) is the code of row pair 4 q + r
//   sparse [panels][lines' numbers]   bf16's layout cut into lines of 64 bytes, of each line the numbers that its mask keeps
// K is padded with zeros to a whole step (32 inputs; 64 for int8), N to a whole panel.
//
// code4 keeps scales [panels][groups][32] and, if asymmetric, zeros of the same shape, in fp32 or bf16. A code becomes
// its value in bf16 through a table of 16 (integers and NF4 levels alike); a group's product is summed in fp32 and then
// scaled: sum over groups of scale * (codes . x - zero * sum of x).
//
// sparse keeps a mask of 32 bits per line, [panels][K/2][2], in `scale`, and in `offset` where each panel's numbers begin.
// Lines are read in whole, so 64 bytes more than the last number must be there.
#pragma once
#include "vectors.h"

namespace halftone {

constexpr int kPanel = 32;          // output columns that are packed and computed together: two lines of 64 bytes
constexpr int kStepBytes = 64;      // bytes of one activation row that one step consumes: 16 words of 32 bits
constexpr int kPanelStep = 2048;    // bytes of packed weights that it consumes, for a whole panel

enum class Format : int32_t { kBf16 = 0, kInt8 = 1, kCode4 = 2, kSparse = 3 };

// Mirrors serve/kernels/library.py.
struct Linear {
  Format format;
  int32_t outputs, inputs, group;  // group: inputs that share a scale (code4), a multiple of 32
  int32_t half_scales;             // code4: scale and offset are bf16, else fp32
  const uint8_t* weight;
  const void* scale;   // int8: fp32 [N]; code4: [panels][groups][32]; sparse: uint32 masks [panels][K/2][2]
  const void* offset;  // int8: 128 times the column sums, int32 [N]; code4: zeros like scale, or null; sparse: int64 [panels]
  const float* bias;    // [N] or null
  const bf16* table;    // code4: 16 values

  int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  int64_t steps() const { return (inputs + step_inputs() - 1) / step_inputs(); }
  int64_t step_inputs() const { return format == Format::kInt8 ? 64 : 32; }
  int64_t groups() const { return (inputs + group - 1) / group; }
  __m512 grid(const void* values, int64_t at) const {
    return half_scales ? load_bf16(static_cast<const bf16*>(values) + at)
                       : _mm512_loadu_ps(static_cast<const float*>(values) + at);
  }
  int64_t panel_bytes() const { return steps() * (format == Format::kCode4 ? kPanelStep / 4 : kPanelStep); }
};

// A block of rows of activations: where it begins, and how far it is to the next row, to a row's next step, and from 16
// rows to the next 16.
struct Rows {
  const uint8_t* data;
  int64_t stride, step, tile;
};

// Weights to bring into a cache while others are multiplied: so many lines with every step.
struct Ahead {
  const uint8_t* from = nullptr;
  int lines = 0;
};

// Row `output` of a bf16 weight, out of its packed layout: how a tied embedding is read.
inline void unpack_row(const Linear& w, int64_t output, float* out) {
  const uint8_t* column = w.weight + output / kPanel * w.panel_bytes() + output % kPanel * 4;
  for (int64_t i = 0; i < w.inputs; ++i) {
    bf16 value;
    std::memcpy(&value, column + i / 2 * kPanel * 4 + i % 2 * 2, 2);
    out[i] = from_bf16(value);
  }
}

}  // namespace halftone
