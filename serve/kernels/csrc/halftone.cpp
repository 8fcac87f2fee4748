// The C surface that serve/kernels/library.py loads. Plain pointers, no Python, no torch: it builds in seconds.
#include "decoder.h"
#include "packing.h"

using namespace halftone;

namespace {

template <typename Body>
void by_panel(void* team_pointer, const Linear& w, Body&& body) {
  Team& team = *static_cast<Team*>(team_pointer);
  team.run([&](int thread) {
    team.deal(thread, 0, w.panels(), 4, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) body(panel);
    });
  });
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int ht_supported() { return supported() ? 1 : 0; }

void* ht_team(int threads) { return new Team(threads); }
void ht_team_free(void* team) { delete static_cast<Team*>(team); }

int64_t ht_packed_bytes(const Linear* w) { return w->panels() * w->panel_bytes(); }

// weight: [N, K] of bf16 or int8; out: ht_packed_bytes zeroed bytes.
void ht_pack(void* team, const Linear* w, const uint8_t* weight, uint8_t* out) {
  by_panel(team, *w, [&](int64_t panel) { pack_words(*w, weight, panel, out + panel * w->panel_bytes()); });
}

// The inverse of ht_pack, into [N, K].
void ht_unpack(const Linear* w, uint8_t* weight) {
  const int64_t row_bytes = w->format == Format::kInt8 ? w->inputs : w->inputs * 2;
  for (int64_t column = 0; column < w->outputs; ++column) {
    const uint8_t* panel = w->weight + column / kPanel * w->panel_bytes() + column % kPanel * 4;
    for (int64_t at = 0; at < row_bytes; ++at) weight[column * row_bytes + at] = panel[at / 4 * kPanel * 4 + at % 4];
  }
}

// 4-bit codes in one of the orders of packing.h; `fill` is the code whose value pads K.
void ht_pack_codes(void* team, const Linear* w, const uint8_t* codes, int order, int fill, uint8_t* out) {
  by_panel(team, *w, [&](int64_t panel) {
    pack_codes(*w, codes, static_cast<Order>(order), fill, panel, out + panel * w->panel_bytes());
  });
}

// x: [rows, K] bf16; y: [rows, N] bf16.
void ht_linear(void* team_pointer, const Linear* w, const bf16* x, int64_t rows, bf16* y) {
  Team& team = *static_cast<Team*>(team_pointer);
  static thread_local Activations activations;
  Activations& a = activations;
  a.reserve(rows, w->inputs, w->format == Format::kCode4 ? w->groups() : 0);
  team.run([&](int thread) {
    team.deal(thread, 0, rows, 8, [&](int64_t begin, int64_t end) {
      std::vector<float> row(w->inputs);
      for (int64_t r = begin; r < end; ++r) {
        for (int64_t i = 0; i < w->inputs; i += 16) {
          const __mmask16 mask = first(w->inputs - i);
          _mm512_mask_storeu_ps(row.data() + i, mask, load_bf16(x + r * w->inputs + i, mask));
        }
        prepare_row(a, r, rows, row.data(), *w);
      }
    });
    team.barrier();
    Product product;
    PanelRoom room(product);
    team.deal(thread, 1, w->panels(), panel_chunk(*w, rows), [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        compute_panel(room, *w, a, rows, panel);
        for (int64_t r = 0; r < rows; ++r)
          for (int half = 0; half < 2; ++half) {
            const int64_t column = panel * kPanel + half * 16;
            if (column < w->outputs)
              store_bf16(y + r * w->outputs + column, _mm512_loadu_ps(room.sums.data() + r * kPanel + half * 16),
                         first(w->outputs - column));
          }
      }
    });
    product.release();
  });
}

// `model` and everything that it points to must outlive the decoder.
void* ht_decoder(void* team, const Model* model) { return new Decoder(*static_cast<Team*>(team), *model); }
void ht_decoder_free(void* decoder) { delete static_cast<Decoder*>(decoder); }
void ht_decode(void* decoder, const Step* step) { static_cast<Decoder*>(decoder)->run(*step); }
void ht_project(void* decoder, const float* hidden, int64_t rows, float* logits) {
  static_cast<Decoder*>(decoder)->project(hidden, rows, logits);
}

}  // extern "C"
#pragma GCC visibility pop
