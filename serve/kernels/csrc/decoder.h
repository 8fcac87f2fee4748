// One step of a Llama-shaped decoder over a ragged batch: every thread runs `Decoder::run`, barrier by barrier.
//
// x += o(attention(norm(x)));  x += down(silu(gate(norm(x))) * up(norm(x)));  the residual x stays in fp32.
// Rows are the step's tokens, of all sequences, one behind another; a span is the tokens of one sequence.
#pragma once
#include <cmath>
#include <memory>

#include "attention.h"
#include "linear.h"
#include "threads.h"

namespace halftone {

// These mirror serve/kernels/library.py.
struct Layer {
  Linear query, key, value, output, gate, up, down;
  const float *input_norm, *post_norm;
  const float *query_norm, *key_norm;  // per head (Qwen3) or null
  bf16 *keys, *values;
  int64_t window;  // 0: sees all
};

struct Model {
  int64_t num_layers, hidden, heads, kv_heads, head_dim, intermediate, block_size, head_stride;
  float epsilon, scaling;
  const Layer* layers;
  const bf16* embedding;  // [vocabulary][hidden], or null: tied, read from the head's packed bf16
  const float* final_norm;
  Linear head;
  const float *cosines, *sines;  // [positions][head_dim / 2]
};

struct Span {
  int64_t first_row, num_rows, first_position, num_blocks;
  const int64_t* blocks;
};

struct Step {
  int64_t num_rows, num_spans, num_logits;
  const int64_t *token_ids, *positions, *logit_rows;
  const Span* spans;
  float* logits;  // [num_logits][vocabulary]
  int64_t* best;  // [num_logits], the first of each row's highest logits; -1 where that is not finite
  int64_t num_hidden;
  const int64_t* hidden_rows;
  float* hidden;  // [num_hidden][hidden], after the final norm
};

class Decoder {
 public:
  Decoder(Team& team, const Model& model) : team_(team), m_(model), threads_(team.size()) {
    for (int i = 0; i < team.size(); ++i) (threads_[i] = std::make_unique<Thread>())->index = i;
  }

  void run(const Step& step) {
    reserve(step.num_rows, step.num_logits);
    grow(row_spans_, step.num_rows);
    for (int64_t s = 0; s < step.num_spans; ++s)
      std::fill_n(row_spans_.begin() + step.spans[s].first_row, step.spans[s].num_rows, step.spans + s);
    team_.run([&](int thread) { decode(*threads_[thread], step); });
  }

  // Logits of rows that are normalized already, wherever they come from.
  void project(const float* hidden, int64_t rows, float* logits) {
    reserve(0, rows);
    team_.run([&](int thread) {
      threads_[thread]->turn = 0;
      head(*threads_[thread], hidden, rows, nullptr, logits);
    });
  }

 private:
  static constexpr int64_t kPrivateRows = 2;  // so few rows every thread prepares for itself instead of waiting

  struct Thread {
    Product product;
    PanelRoom panel{product}, other{product};
    AttentionRoom attention;
    Activations activations;
    std::vector<float> row;
    int index = 0, turn = 0;
  };

  struct Target {
    const Linear* linear;
    float* out;
    int64_t stride;
    bool add;
  };

  void reserve(int64_t rows, int64_t logits) {
    const int64_t widest = std::max({m_.hidden, m_.intermediate, m_.heads * m_.head_dim});
    const int64_t groups = (widest + 31) / 32;
    shared_.reserve(std::max(rows, logits), widest, groups);
    for (auto& thread : threads_) thread->activations.reserve(kPrivateRows, widest, groups);
    grow(x_, rows * m_.hidden);
    grow(qkv_, rows * qkv_width());
    grow(mixed_, rows * m_.heads * m_.head_dim);
    roped_rows_ = rows;
    grow(roped_, rows * m_.heads * head_width());
    grow(inner_, rows * m_.intermediate);
    grow(last_, logits * m_.hidden);
  }

  int64_t head_width() const { return (m_.head_dim + 31) / 32 * 32; }
  int64_t qkv_width() const { return (m_.heads + 2 * m_.kv_heads) * m_.head_dim; }

  void decode(Thread& t, const Step& step) {
    t.turn = 0;
    team_.deal(t.index, t.turn++, step.num_rows, 4, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) embed(r, step.token_ids[r]);
    });
    team_.barrier();
    for (int64_t i = 0; i < m_.num_layers; ++i) layer(t, m_.layers[i], step);
    team_.deal(t.index, t.turn++, step.num_logits + step.num_hidden, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t kept = r - step.num_logits;
        if (kept < 0)
          std::copy_n(&x_[step.logit_rows[r] * m_.hidden], m_.hidden, &last_[r * m_.hidden]);
        else
          normalize(&x_[step.hidden_rows[kept] * m_.hidden], m_.final_norm, m_.hidden, m_.epsilon,
                    step.hidden + kept * m_.hidden);
      }
    });
    team_.barrier();
    if (step.num_logits == 0) return t.product.release();
    head(t, last_.data(), step.num_logits, m_.final_norm, step.logits);
    team_.deal(t.index, t.turn++, step.num_logits, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) step.best[r] = highest(step.logits + r * m_.head.outputs, m_.head.outputs);
    });
  }

  void head(Thread& t, const float* x, int64_t rows, const float* norm, float* logits) {
    Activations& a = prepare(t, x, rows, m_.hidden, norm, {&m_.head});
    multiply(t, a, rows, {{&m_.head, logits, m_.head.outputs, false}});
    t.product.release();
  }

  void layer(Thread& t, const Layer& l, const Step& step) {
    const int64_t rows = step.num_rows, width = qkv_width(), heads = m_.heads * m_.head_dim;
    const int64_t kv = m_.kv_heads * m_.head_dim;
    multiply(t, prepare(t, x_.data(), rows, m_.hidden, l.input_norm, {&l.query, &l.key, &l.value}), rows,
             {{&l.query, qkv_.data(), width, false},
              {&l.key, qkv_.data() + heads, width, false},
              {&l.value, qkv_.data() + heads + kv, width, false}});
    rotate(t, l, step);
    attention(t, l, step);
    multiply(t, prepare(t, mixed_.data(), rows, heads, nullptr, {&l.output}), rows,
             {{&l.output, x_.data(), m_.hidden, true}});
    feed(t, l, prepare(t, x_.data(), rows, m_.hidden, l.post_norm, {&l.gate, &l.up}), rows);
    multiply(t, prepare(t, inner_.data(), rows, m_.intermediate, nullptr, {&l.down}), rows,
             {{&l.down, x_.data(), m_.hidden, true}});
  }

  void embed(int64_t row, int64_t token) {
    if (!m_.embedding) return unpack_row(m_.head, token, &x_[row * m_.hidden]);
    for (int64_t i = 0; i < m_.hidden; i += 16) {
      const __mmask16 mask = first(m_.hidden - i);
      _mm512_mask_storeu_ps(&x_[row * m_.hidden + i], mask, load_bf16(m_.embedding + token * m_.hidden + i, mask));
    }
  }

  // Normalizes (if a weight is given) and converts rows into what the linears that read them want.
  Activations& prepare(Thread& t, const float* x, int64_t rows, int64_t width, const float* norm,
                       std::initializer_list<const Linear*> readers) {
    const bool alone = rows <= kPrivateRows;
    Activations& a = alone ? t.activations : shared_;
    const auto body = [&](int64_t begin, int64_t end) {
      grow(t.row, width);
      for (int64_t r = begin; r < end; ++r) {
        const float* row = x + r * width;
        if (norm) {
          normalize(row, norm, width, m_.epsilon, t.row.data());
          row = t.row.data();
        }
        bool narrow = false, wide = false;
        for (const Linear* reader : readers) {
          const bool integer = reader->format == Format::kInt8;
          if (integer ? narrow : wide && !reader->offset) continue;
          prepare_row(a, r, rows, row, *reader);
          (integer ? narrow : wide) = true;
        }
      }
    };
    if (alone) {
      body(0, rows);
    } else {
      team_.deal(t.index, t.turn++, rows, std::max<int64_t>(1, rows / (4 * team_.size())), body);
      team_.barrier();
    }
    return a;
  }

  static void normalize(const float* x, const float* weight, int64_t width, float epsilon, float* out) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
      const __m512 v = _mm512_maskz_loadu_ps(first(width - i), x + i);
      squares = _mm512_fmadd_ps(v, v, squares);
    }
    const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / width + epsilon));
    for (int64_t i = 0; i < width; i += 16) {
      const __mmask16 mask = first(width - i);
      const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), inverse);
      _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, weight + i)));
    }
  }

  // All panels of all targets, dealt out together; ends with a barrier.
  void multiply(Thread& t, const Activations& a, int64_t rows, std::initializer_list<Target> targets) {
    int64_t panels = 0;
    for (const Target& target : targets) panels += target.linear->panels();
    team_.deal(t.index, t.turn++, panels, panel_chunk(*targets.begin()->linear, rows), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        int64_t panel = p;
        for (const Target& target : targets) {
          if (panel >= target.linear->panels()) {
            panel -= target.linear->panels();
            continue;
          }
          compute_panel(t.panel, *target.linear, a, rows, panel);
          store_panel(t.panel, target, rows, panel);
          break;
        }
      }
    });
    team_.barrier();
  }

  static void store_panel(const PanelRoom& room, const Target& target, int64_t rows, int64_t panel) {
    for (int half = 0; half < 2; ++half) {
      const int64_t column = panel * kPanel + half * 16;
      if (column >= target.linear->outputs) return;
      const __mmask16 mask = first(target.linear->outputs - column);
      for (int64_t r = 0; r < rows; ++r) {
        float* out = target.out + r * target.stride + column;
        __m512 y = _mm512_loadu_ps(room.sums.data() + r * kPanel + half * 16);
        if (target.add) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, out));
        _mm512_mask_storeu_ps(out, mask, y);
      }
    }
  }

  // inner = silu(gate x) * (up x), a panel of each at a time.
  void feed(Thread& t, const Layer& l, const Activations& a, int64_t rows) {
    team_.deal(t.index, t.turn++, l.gate.panels(), std::max<int64_t>(1, panel_chunk(l.gate, rows) / 2), [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        compute_panel(t.panel, l.gate, a, rows, panel);
        compute_panel(t.other, l.up, a, rows, panel);
        for (int64_t r = 0; r < rows; ++r)
          for (int half = 0; half < 2; ++half) {
            float* gate = t.panel.sums.data() + r * kPanel + half * 16;
            const __m512 up = _mm512_loadu_ps(t.other.sums.data() + r * kPanel + half * 16);
            _mm512_storeu_ps(gate, _mm512_mul_ps(silu(_mm512_loadu_ps(gate)), up));
          }
        store_panel(t.panel, {&l.gate, inner_.data(), m_.intermediate, false}, rows, panel);
      }
    });
    team_.barrier();
  }

  // Rotary positions on queries and keys, in halves (x_i, x_{i + d/2}); new keys and values go into the cache.
  void rotate(Thread& t, const Layer& l, const Step& step) {
    team_.deal(t.index, t.turn++, step.num_rows, std::max<int64_t>(1, step.num_rows / 16), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) rotate_row(l, step, r);
    });
    team_.barrier();
  }

  // Queries that share a key/value head lie together, all rows' of one head behind one another.
  bf16* roped(int64_t kv_head, int64_t row) {
    const int64_t group = m_.heads / m_.kv_heads;
    return roped_.data() + (kv_head * roped_rows_ + row) * group * head_width();
  }

  void rotate_row(const Layer& l, const Step& step, int64_t r) {
    const int64_t group = m_.heads / m_.kv_heads, dim = m_.head_dim;
    float* row = qkv_.data() + r * qkv_width();
    const Span& span = *row_spans_[r];
    const Cache cache = cache_of(l);
    alignas(64) bf16 key[kLargestHead] = {}, value[kLargestHead] = {};
    for (int64_t h = 0; h < m_.kv_heads; ++h) {
      for (int64_t i = 0; i < group; ++i)
        rotate_head(row + (h * group + i) * dim, l.query_norm, step.positions[r], roped(h, r) + i * head_width());
      rotate_head(row + (m_.heads + h) * dim, l.key_norm, step.positions[r], key);
      const float* values = row + (m_.heads + m_.kv_heads + h) * dim;
      for (int64_t i = 0; i < dim; i += 16) {
        const __mmask16 mask = first(dim - i);
        store_bf16(value + i, _mm512_maskz_loadu_ps(mask, values + i), mask);
      }
      cache.store(h, span.blocks, step.positions[r], key, value);
    }
  }

  void rotate_head(float* head, const float* norm, int64_t position, bf16* out) {
    const int64_t half = m_.head_dim / 2;
    if (norm) normalize(head, norm, m_.head_dim, m_.epsilon, head);
    for (int64_t i = 0; i < half; i += 16) {
      const __mmask16 mask = first(half - i);
      const __m512 cosine = _mm512_maskz_loadu_ps(mask, m_.cosines + position * half + i);
      const __m512 sine = _mm512_maskz_loadu_ps(mask, m_.sines + position * half + i);
      const __m512 low = _mm512_maskz_loadu_ps(mask, head + i), high = _mm512_maskz_loadu_ps(mask, head + half + i);
      store_bf16(out + i, _mm512_fmsub_ps(low, cosine, _mm512_mul_ps(high, sine)), mask);
      store_bf16(out + half + i, _mm512_fmadd_ps(high, cosine, _mm512_mul_ps(low, sine)), mask);
    }
  }

  Cache cache_of(const Layer& l) const { return {l.keys, l.values, m_.head_stride, m_.block_size, head_width()}; }

  // Tasks: for each key/value head and span, as many tokens as fill 16 query rows.
  void attention(Thread& t, const Layer& l, const Step& step) {
    const int64_t group = m_.heads / m_.kv_heads, tokens = std::max<int64_t>(1, kQueryRows / group);
    int64_t tiles = 0;
    for (int64_t s = 0; s < step.num_spans; ++s) tiles += (step.spans[s].num_rows + tokens - 1) / tokens;
    const Cache cache = cache_of(l);
    team_.deal(t.index, t.turn++, tiles * m_.kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        int64_t tile = task / m_.kv_heads, s = 0;
        for (; tile >= (step.spans[s].num_rows + tokens - 1) / tokens; ++s) tile -= (step.spans[s].num_rows + tokens - 1) / tokens;
        const Span& span = step.spans[s];
        const int64_t token = tile * tokens, count = std::min(tokens, span.num_rows - token);
        attend_rows(t, l, cache, span, token, count, task % m_.kv_heads, group);
      }
    });
    team_.barrier();
  }

  void attend_rows(Thread& t, const Layer& l, const Cache& cache, const Span& span, int64_t token, int64_t count,
                   int64_t head, int64_t group) {
    for (int64_t g = 0; g < group; g += kQueryRows) {
      QueryRows q;
      q.queries = roped(head, span.first_row + token) + g * cache.width;
      q.count = 0;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = g; j < std::min(group, g + kQueryRows); ++j) {
          const int64_t row = span.first_row + token + i;
          q.out[q.count] = &mixed_[(row * m_.heads + head * group + j) * m_.head_dim];
          q.positions[q.count++] = span.first_position + token + i;
        }
      attend(t.product, t.attention, cache, span.blocks, head, q, m_.head_dim, m_.scaling, l.window);
    }
  }

  Team& team_;
  const Model& m_;
  std::vector<std::unique_ptr<Thread>> threads_;
  Activations shared_;
  std::vector<float> x_, qkv_, mixed_, inner_, last_;
  std::vector<const Span*> row_spans_;  // [rows], the span that a row belongs to
  std::vector<bf16> roped_;  // [kv_heads][rows][heads of a group][padded head_dim], zeros past head_dim
  int64_t roped_rows_ = 0;
};

}  // namespace halftone
