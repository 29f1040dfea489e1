// What an early exit drafts with: its layers, the map of their state and the readout in one call; and what is asked of
// the logits then.
//
// N tokens, D hidden size, V tokens of the draft's vocabulary. Sums are float32 and rounded once.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "layers.h"
#include "product.h"
#include "vectors.h"

namespace selfspec {
namespace {

// Rows of x [N, D] scaled to unit root-mean-square, into columns of another tensor from `out` on, `step` apart.
template <class Format>
void unit_rms(const Tensor& x, typename Format::T* out, int64_t step) {
  constexpr float eps = std::numeric_limits<float>::epsilon();  // of torch's norm where none is given, in bf16 too
  const int64_t rows = x.size(0), width = x.size(1);
  const auto* in = static_cast<const typename Format::T*>(x.const_data_ptr());
  for (int64_t n = 0; n < rows; n++, in += width, out += step) {
    floats squares{};
    for (int64_t i = 0; i < width; i += LANES) {
      const floats v = Format::load(in + i);
      squares += v * v;
    }
    const float scale = 1 / std::sqrt(sum(squares) / width + eps);
    for (int64_t i = 0; i < width; i += LANES) Format::store(out + i, Format::load(in + i) * scale);
  }
}

// What a fitted map reads: the states, and beside them those of the positions before, if it is given any.
Tensor features(const Tensor& hidden, const optional<Tensor>& previous) {
  const int64_t width = hidden.size(1);
  Tensor x = at::empty({hidden.size(0), previous ? 2 * width : width}, hidden.options());
  const auto fill = [&](auto format) {
    using Format = decltype(format);
    auto* out = static_cast<typename Format::T*>(x.data_ptr());
    unit_rms<Format>(hidden, out, x.size(1));
    if (previous) unit_rms<Format>(previous->contiguous(), out + width, x.size(1));
  };
  hidden.scalar_type() == at::kFloat ? fill(F32()) : fill(BF16());
  return x;
}

// The estimate of the normed final state [N, D], by the weights of a head: the final norm of the model; or a fitted map,
// of weight and bias; or one of low rank, of scale, down, up and bias.
Tensor estimate(const Tensor& hidden, const optional<Tensor>& previous, at::TensorList head, double eps) {
  if (head.size() == 1) return norm(hidden, head[0], eps);
  const Tensor x = features(hidden, previous);
  if (head.size() == 2) return product(x, head[0], head[1], {});
  const Tensor scaled = at::addcmul(head[3], x.narrow(1, 0, hidden.size(1)), head[0]);
  return product(product(x, head[1], {}, {}), head[2], {}, scaled);
}

// Of one row of logits: the largest, and with d = (x - largest) / temperature, sums of e^d, d e^d, d^2 e^d.
struct Sums {
  float largest, weight, first, second;
};

template <class Format>
Sums summed(const typename Format::T* row, int64_t width, float temperature = 1) {
  floats most = floats{} - INFINITY, weight{}, first{}, second{};
  for (int64_t i = 0; i < width; i += LANES) {
    const floats here = Format::load(row + i);
    most = here > most ? here : most;
  }
  const float largest = highest(most);
  for (int64_t i = 0; i < width; i += LANES) {
    const floats d = (Format::load(row + i) - largest) / temperature, p = exp(d), pd = p * d;
    weight += p;
    first += pd;
    second += pd * d;
  }
  return {largest, sum(weight), sum(first), sum(second)};
}

template <class Format>
void likeliest(const Tensor& logits, float temperature, Tensor& places, Tensor& log_p) {
  using T = typename Format::T;
  const int64_t width = logits.size(1), wanted = places.size(1);
  const auto* all = static_cast<const T*>(logits.const_data_ptr());
  int64_t* found = places.data_ptr<int64_t>();
  float* scores = log_p.data_ptr<float>();
  at::parallel_for(0, logits.size(0), 1, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; n++) {
      const T* row = all + n * width;
      int64_t* best = found + n * wanted;
      float* values = scores + n * wanted;
      std::fill_n(values, wanted, -INFINITY);
      std::fill_n(best, wanted, 0);
      for (int64_t i = 0; i < width; i += LANES) {
        if (!(highest(Format::load(row + i)) > values[wanted - 1])) continue;
        for (int64_t j = i; j < i + LANES; j++) {
          const float value = Format::load_one(row + j);
          // Larger, not as large: the first of equals stays.
          if (!(value > values[wanted - 1])) continue;
          int64_t at = wanted - 1;
          for (; at > 0 && value > values[at - 1]; at--) values[at] = values[at - 1], best[at] = best[at - 1];
          values[at] = value, best[at] = j;
        }
      }
      const Sums sums = summed<Format>(row, width, temperature);
      const float total = std::log(sums.weight);
      for (int64_t i = 0; i < wanted; i++) values[i] = (values[i] - sums.largest) / temperature - total;
    }
  });
}

void check(const Tensor& logits) {
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) % LANES == 0 && logits.is_contiguous(), "whole lanes only");
  TORCH_CHECK(logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kBFloat16, "float32 or bfloat16 only");
}

// The places of the `width` largest of every row, the first of equals first, and their log-probabilities at a temperature.
std::tuple<Tensor, Tensor> candidates(const Tensor& logits, int64_t width, double temperature) {
  check(logits);
  const int64_t rows = logits.size(0), wanted = std::min(width, logits.size(1));
  Tensor places = at::empty({rows, wanted}, at::kLong), log_p = at::empty({rows, wanted}, at::kFloat);
  (logits.scalar_type() == at::kFloat ? likeliest<F32> : likeliest<BF16>)(logits, temperature, places, log_p);
  return {places, log_p};
}

template <class Format>
void measure(const Tensor& logits, float* out) {
  const int64_t rows = logits.size(0), width = logits.size(1);
  const auto* all = static_cast<const typename Format::T*>(logits.const_data_ptr());
  at::parallel_for(0, rows, 1, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; n++) {
      const Sums s = summed<Format>(all + n * width, width);
      // Surprisal is ln(weight) - d: its mean is the entropy, its variance that of d.
      const double mean = static_cast<double>(s.first) / s.weight;
      out[n] = 1 / s.weight;
      out[rows + n] = static_cast<float>(std::log(static_cast<double>(s.weight)) - mean);
      out[2 * rows + n] = static_cast<float>(std::max(static_cast<double>(s.second) / s.weight - mean * mean, 0.0));
    }
  });
}

// Of the distribution in every row: its largest probability, its entropy and its var-entropy. [3, N]
Tensor statistics(const Tensor& logits) {
  check(logits);
  Tensor found = at::empty({3, logits.size(0)}, at::kFloat);
  (logits.scalar_type() == at::kFloat ? measure<F32> : measure<BF16>)(logits, found.data_ptr<float>());
  return found;
}

template <class Number>
std::vector<Number> numbers(const Tensor& t) {
  const auto copy = [&](const auto* from) { return std::vector<Number>(from, from + t.numel()); };
  return t.scalar_type() == at::kLong ? copy(t.const_data_ptr<int64_t>()) : copy(t.const_data_ptr<float>());
}

// All that a step of an early exit's draft is: embedded, run through the first layers, estimated, read out, and looked
// through. The residual stream, estimates and logits of all tokens; then, as plain numbers, the candidates of each with
// their log-probabilities, and the statistics.
using Numbers = std::vector<double>;
std::tuple<Tensor, Tensor, Tensor, std::vector<int64_t>, Numbers, Numbers, Numbers, Numbers> exit(
    const Tensor& embedding, at::IntArrayRef tokens, Tensor& cache, const Tensor& cos, const Tensor& sin,
    at::IntArrayRef bases, at::IntArrayRef sizes, at::IntArrayRef parents, int64_t first, int64_t first_row,
    int64_t heads, double eps, int64_t first_layer, at::TensorList attention_norm, at::TensorList qkv,
    const c10::List<optional<Tensor>>& qkv_bias, at::TensorList out, at::TensorList mlp_norm, at::TensorList gate_up,
    at::TensorList down, const optional<Tensor>& previous, at::TensorList head, const Tensor& readout,
    const optional<Tensor>& ids, int64_t width, double temperature) {
  const Tensor embedded = at::embedding(embedding, at::tensor(tokens, at::kLong));
  Tensor hidden = layers(embedded, cache, cos, sin, bases, sizes, parents, first, first_row, heads, eps, first_layer,
                         attention_norm, qkv, qkv_bias, out, mlp_norm, gate_up, down);
  Tensor state = estimate(hidden, previous, head, eps);
  Tensor logits = product(state, readout, {}, {});
  const auto [places, log_p] = candidates(logits, width, temperature);
  std::vector<int64_t> best = numbers<int64_t>(places);
  if (ids) {
    for (int64_t& each : best) each = ids->const_data_ptr<int64_t>()[each];
  }
  const auto of = statistics(logits).unbind();
  return {hidden, state, logits, best, numbers<double>(log_p), numbers<double>(of[0]), numbers<double>(of[1]),
          numbers<double>(of[2])};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(selfspec, library) {
  const auto add = [&](const char* schema, auto&& function) {
    library.def(schema, torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, function));
  };
  add("exit(Tensor embedding, int[] tokens, Tensor(a!) cache, Tensor cos, Tensor sin, int[] bases, int[] sizes, "
      "int[] parents, int first, int first_row, int heads, float eps, int first_layer, Tensor[] attention_norm, "
      "Tensor[] qkv, Tensor?[] qkv_bias, Tensor[] out, Tensor[] mlp_norm, Tensor[] gate_up, Tensor[] down, "
      "Tensor? previous, Tensor[] head, Tensor readout, Tensor? ids, int width, float temperature) "
      "-> (Tensor, Tensor, Tensor, int[], float[], float[], float[], float[])",
      TORCH_FN(exit));
  add("candidates(Tensor logits, int width, float temperature) -> (Tensor, Tensor)", TORCH_FN(candidates));
  add("statistics(Tensor logits) -> Tensor", TORCH_FN(statistics));
}

}  // namespace selfspec
