// The layers of a Llama over a few new tokens, in one call.
//
// Between the matrix products, which are `product`'s, a decoding step is hundreds of tiny operations. Here each is a
// loop over memory that is in the cache already, so that what is left is reading the weights. Attention reads every
// key and value once a head and serves all new tokens of a row with it, whichever of them it may see.
//
// N new tokens, H query heads, G key-value heads, d head size, R rows, S slots. Sums are float32 and rounded once.

#include "layers.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "product.h"
#include "vectors.h"

namespace selfspec {
namespace {

template <class Format>
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  using T = typename Format::T;
  Tensor normed = at::empty_like(x);
  const int64_t rows = x.size(0), width = x.size(1);
  const T *in = static_cast<const T*>(x.const_data_ptr()), *w = static_cast<const T*>(weight.const_data_ptr());
  T* out = static_cast<T*>(normed.data_ptr());
  for (int64_t n = 0; n < rows; n++, in += width, out += width) {
    floats squares{};
    for (int64_t i = 0; i < width; i += LANES) {
      const floats v = Format::load(in + i);
      squares += v * v;
    }
    const float scale = 1 / std::sqrt(sum(squares) / width + static_cast<float>(eps));
    for (int64_t i = 0; i < width; i += LANES) Format::store(out + i, Format::load(in + i) * scale * Format::load(w + i));
  }
  return normed;
}

// silu(gate) * up of [N, 2 M] -> [N, M]
template <class Format>
Tensor swiglu(const Tensor& gate_up) {
  using T = typename Format::T;
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  Tensor mixed = at::empty({rows, width}, gate_up.options());
  const T* in = static_cast<const T*>(gate_up.const_data_ptr());
  T* out = static_cast<T*>(mixed.data_ptr());
  at::parallel_for(0, rows, 4, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; n++) {
      const T *gates = in + n * 2 * width, *ups = gates + width;
      for (int64_t i = 0; i < width; i += LANES) {
        const floats gate = Format::load(gates + i);
        Format::store(out + n * width + i, gate / (1.0f + exp(at_most(-gate, 87.0f))) * Format::load(ups + i));
      }
    }
  });
  return mixed;
}

// x cos + roll(x) sin over one head, in place; the sine carries the sign of the half that moves.
template <class Format>
void rotate(typename Format::T* x, const typename Format::T* cos, const typename Format::T* sin, int64_t d) {
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; i += LANES) {
    const floats low = Format::load(x + i), high = Format::load(x + half + i);
    Format::store(x + i, low * Format::load(cos + i) + high * Format::load(sin + i));
    Format::store(x + half + i, high * Format::load(cos + half + i) + low * Format::load(sin + half + i));
  }
}

// Where one head's new tokens of one row look, and how their vectors lie: `step` values from token to token.
template <class Format>
struct Head {
  const typename Format::T *queries, *keys, *values;  // keys and values: [stop, D]
  const float* bias;                                  // [tokens, width]: 0, or -inf where a token may not look
  int64_t stop, width, query_step, out_step;
  typename Format::T* out;
};

// Q tokens at once: a key or value is read and widened once for all of them.
template <class Format, int D, int Q>
void attend(const Head<Format>& head, float* scores) {
  constexpr int PARTS = D / LANES;
  const float scale = 1 / std::sqrt(static_cast<float>(D));
  const int64_t padded = up_to_lanes(head.stop);
  Vector<Format, D> query[Q];
  for (int i = 0; i < Q; i++) query[i].load(head.queries + i * head.query_step);
  for (int64_t s = 0; s < head.stop; s++) {
    Vector<Format, D> key;
    key.load(head.keys + s * D);
    // Always four: `sums` adds four vectors up together. The unused ones are zeros, and nobody reads their totals.
    floats dots[4] = {};
    for (int i = 0; i < Q; i++) dots[i] = dot(query[i], key);
    const floats totals = sums(dots[0], dots[1], dots[2], dots[3]);
    for (int i = 0; i < Q; i++) scores[i * padded + s] = totals[i];
  }
  for (int i = 0; i < Q; i++) {  // softmax
    float* score = scores + i * padded;
    const float* bias = head.bias + i * head.width;
    for (int64_t s = head.stop; s < padded; s++) score[s] = 0;
    // A token sees itself at least, so `most` ends above -inf, and `exp` gives what it may not see a weight of 0.
    floats most = floats{} - INFINITY, total{};
    for (int64_t s = 0; s < padded; s += LANES) {
      const floats here = F32::load(score + s) * scale + F32::load(bias + s);
      F32::store(score + s, here);
      most = here > most ? here : most;
    }
    const float top = highest(most);
    for (int64_t s = 0; s < padded; s += LANES) {
      const floats weight = exp(F32::load(score + s) - top);
      F32::store(score + s, weight);
      total += weight;
    }
    const float share = 1 / sum(total);
    for (int64_t s = 0; s < padded; s += LANES) F32::store(score + s, F32::load(score + s) * share);
  }
  floats mixed[Q][PARTS] = {};
  for (int64_t s = 0; s < head.stop; s++) {
    for (int p = 0; p < PARTS; p++) {
      const floats value = Format::load(head.values + s * D + p * LANES);
      for (int i = 0; i < Q; i++) mixed[i][p] += scores[i * padded + s] * value;
    }
  }
  for (int i = 0; i < Q; i++) {
    for (int p = 0; p < PARTS; p++) Format::store(head.out + i * head.out_step + p * LANES, mixed[i][p]);
  }
}

// New tokens of one row: they stand together, from `begin` on, and look at slots below `stop`.
struct Row {
  int64_t row, begin, end, stop;
};

// Where every new token goes, and what it may look at: from how many tokens each row has verified (bases), how many nodes
// its tree has (sizes), every node's parent there, and the first of its nodes that is new.
struct Places {
  std::vector<Row> rows;
  std::vector<int64_t> positions, slots;
  std::vector<float> bias;  // [N, width]: 0, or -inf where a token may not look
};

Places places(at::IntArrayRef bases, at::IntArrayRef sizes, at::IntArrayRef parents, int64_t first, int64_t first_row,
              int64_t last_position) {
  Places found;
  int64_t stop = 0;
  for (size_t r = 0; r < bases.size(); r++) stop = std::max(stop, bases[r] + sizes[r]);
  const int64_t width = up_to_lanes(stop);
  const int64_t* parent = parents.data();
  for (size_t r = 0; r < bases.size(); parent += sizes[r++]) {
    const int64_t begin = found.slots.size();
    std::vector<int64_t> depths(sizes[r]);
    for (int64_t node = 0; node < sizes[r]; node++) {
      depths[node] = parent[node] < 0 ? 0 : depths[parent[node]] + 1;
      if (node < first) continue;
      // A row that rides along while others draft on may go past the last position; what it says is dropped.
      found.positions.push_back(std::min(bases[r] + depths[node], last_position));
      found.slots.push_back(bases[r] + node);
      found.bias.resize(found.bias.size() + width, -INFINITY);
      float* seen = &found.bias.end()[-width];
      std::fill_n(seen, bases[r], 0.0f);
      for (int64_t above = node; above >= 0; above = parent[above]) seen[bases[r] + above] = 0;
    }
    const int64_t end = found.slots.size();
    // A row is read only as far as it goes itself, not as far as the longest of the batch.
    if (end > begin) found.rows.push_back({first_row + static_cast<int64_t>(r), begin, end, bases[r] + sizes[r]});
  }
  return found;
}

template <class Format, int D>
void mix(Tensor& qkv, Tensor& kv, const Tensor& cos, const Tensor& sin, const Places& at, int64_t heads, Tensor& mixed) {
  using T = typename Format::T;
  const int64_t groups = kv.size(2), capacity = kv.size(3), count = qkv.size(0), width = qkv.size(1);
  T *all = static_cast<T*>(qkv.data_ptr()), *out = static_cast<T*>(mixed.data_ptr());
  const T *c = static_cast<const T*>(cos.const_data_ptr()), *s = static_cast<const T*>(sin.const_data_ptr());
  T *keys = static_cast<T*>(kv.data_ptr()), *values = keys + kv.stride(0);
  const int64_t row_step = kv.stride(1);
  for (const Row& r : at.rows) {
    for (int64_t n = r.begin; n < r.end; n++) {
      T* token = all + n * width;
      const int64_t angle = at.positions[n] * D;
      for (int64_t h = 0; h < heads + groups; h++) rotate<Format>(token + h * D, c + angle, s + angle, D);
      for (int64_t g = 0; g < groups; g++) {
        const int64_t to = r.row * row_step + (g * capacity + at.slots[n]) * D;
        std::copy_n(token + (heads + g) * D, D, keys + to);
        std::copy_n(token + (heads + groups + g) * D, D, values + to);
      }
    }
  }
  // Only now that all keys and values of the pass are written: a token looks at others of the same pass.
  std::vector<std::pair<const Row*, int64_t>> blocks;  // of up to four tokens
  for (const Row& r : at.rows) {
    for (int64_t n = r.begin; n < r.end; n += 4) blocks.push_back({&r, n});
  }
  const int64_t padded = at.bias.size() / count, units = static_cast<int64_t>(blocks.size()) * heads;
  // Little work stays with one thread (a grain of all units): it is not worth waking others for.
  at::parallel_for(0, units, count * padded * D < 4096 ? units : 1, [&](int64_t from, int64_t to) {
    std::vector<float> scores(4 * padded);
    for (int64_t unit = from; unit < to; unit++) {
      const auto [r, n] = blocks[unit / heads];
      const int64_t h = unit % heads, g = h / (heads / groups), begins = r->row * row_step + g * capacity * D;
      const Head<Format> head{all + n * width + h * D, keys + begins, values + begins, at.bias.data() + n * padded,
                              r->stop, padded, width, heads * D, out + (n * heads + h) * D};
      switch (r->end - n) {
        case 1: attend<Format, D, 1>(head, scores.data()); break;
        case 2: attend<Format, D, 2>(head, scores.data()); break;
        case 3: attend<Format, D, 3>(head, scores.data()); break;
        default: attend<Format, D, 4>(head, scores.data());
      }
    }
  });
}

template <class Format>
Tensor run(Tensor hidden, Tensor& cache, const Tensor& cos, const Tensor& sin, const Places& at, int64_t heads,
           double eps, int64_t first,
           at::TensorList attention_norm, at::TensorList qkv_weight, const c10::List<optional<Tensor>>& qkv_bias,
           at::TensorList out, at::TensorList mlp_norm, at::TensorList gate_up, at::TensorList down) {
  const int64_t d = cache.size(5);
  for (size_t i = 0; i < qkv_weight.size(); i++) {
    Tensor qkv = product(rms_norm<Format>(hidden, attention_norm[i], eps), qkv_weight[i], qkv_bias.get(i), {});
    Tensor mixed = at::empty({hidden.size(0), heads * d}, hidden.options());
    Tensor kv = cache.select(0, first + static_cast<int64_t>(i));
    // The head size is a template's argument, so that the vectors of a head are unrolled and stay in registers.
    const auto with = [&](auto size) { mix<Format, size.value>(qkv, kv, cos, sin, at, heads, mixed); };
    switch (d) {
      case 32: with(std::integral_constant<int, 32>()); break;
      case 64: with(std::integral_constant<int, 64>()); break;
      case 128: with(std::integral_constant<int, 128>()); break;
      default: TORCH_CHECK(false, "a head of ", d, " is not one of 32, 64, 128");
    }
    hidden = product(mixed, out[i], {}, hidden);
    Tensor x = product(rms_norm<Format>(hidden, mlp_norm[i], eps), gate_up[i], {}, {});
    hidden = product(swiglu<Format>(x), down[i], {}, hidden);
  }
  return hidden;
}

template <class Format>
void likeliest(const Tensor& logits, int64_t* best) {
  const int64_t width = logits.size(1);
  const auto* all = static_cast<const typename Format::T*>(logits.const_data_ptr());
  at::parallel_for(0, logits.size(0), 1, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; n++) {
      const auto* row = all + n * width;
      floats tops = floats{} - INFINITY, sums = floats{};
      for (int64_t i = 0; i < width; i += LANES) {
        const floats here = Format::load(row + i);
        tops = here > tops ? here : tops;
        sums += here;  // NaN is larger than nothing, and would be stepped over; a sum with one stays NaN
      }
      float sum = 0;
      for (int64_t lane = 0; lane < LANES; lane++) sum += sums[lane];
      if (std::isnan(sum)) {
        best[n] = -1;
        continue;
      }
      const float top = highest(tops);
      int64_t i = 0;
      // Found again rather than tracked: the first of equals, as torch's argmax, and lanes carry no indices.
      for (; i < width - LANES && highest(Format::load(row + i)) < top; i += LANES) {
      }
      while (i < width - 1 && Format::load_one(row + i) < top) i++;
      best[n] = i;
    }
  });
}

Tensor argmax(const Tensor& logits) {
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) % LANES == 0 && logits.is_contiguous(), "argmax: whole lanes only");
  TORCH_CHECK(logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kBFloat16, "float32 or bfloat16 only");
  Tensor best = at::empty({logits.size(0)}, at::kLong);
  const auto chosen = logits.scalar_type() == at::kFloat ? likeliest<F32> : likeliest<BF16>;
  chosen(logits, best.data_ptr<int64_t>());
  return best;
}

}  // namespace

Tensor norm(const Tensor& given, const Tensor& weight, double eps) {
  const Tensor x = given.contiguous();
  return (x.scalar_type() == at::kFloat ? rms_norm<F32> : rms_norm<BF16>)(x, weight, eps);
}

Tensor layers(const Tensor& hidden, Tensor& cache, const Tensor& cos, const Tensor& sin, at::IntArrayRef bases,
              at::IntArrayRef sizes, at::IntArrayRef parents, int64_t first, int64_t first_row, int64_t heads,
              double eps, int64_t first_layer, at::TensorList attention_norm, at::TensorList qkv,
              const c10::List<optional<Tensor>>& qkv_bias, at::TensorList out, at::TensorList mlp_norm,
              at::TensorList gate_up, at::TensorList down) {
  for (const Tensor& each : {hidden, cache, cos, sin}) TORCH_CHECK(each.is_contiguous(), "not contiguous");
  TORCH_CHECK(hidden.scalar_type() == at::kFloat || hidden.scalar_type() == at::kBFloat16, "float32 or bfloat16 only");
  const Places at = places(bases, sizes, parents, first, first_row, cos.size(0) - 1);
  const auto chosen = hidden.scalar_type() == at::kFloat ? run<F32> : run<BF16>;
  return chosen(hidden, cache, cos, sin, at, heads, eps, first_layer, attention_norm, qkv, qkv_bias, out, mlp_norm,
                gate_up, down);
}

TORCH_LIBRARY(selfspec, library) {
  library.def("product(Tensor x, Tensor weight, Tensor? bias, Tensor? residual) -> Tensor");
  library.impl("product", torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(product)));
  library.def("norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.impl("norm", torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(norm)));
  library.def("argmax(Tensor logits) -> Tensor");
  library.impl("argmax", torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(argmax)));
  library.def(
      "layers(Tensor hidden, Tensor(a!) cache, Tensor cos, Tensor sin, int[] bases, int[] sizes, int[] parents, "
      "int first, int first_row, int heads, float eps, int first_layer, Tensor[] attention_norm, Tensor[] qkv, "
      "Tensor?[] qkv_bias, Tensor[] out, Tensor[] mlp_norm, Tensor[] gate_up, Tensor[] down) -> Tensor");
  library.impl("layers", torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(layers)));
}

}  // namespace selfspec
