#include "product.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <utility>

#include "vectors.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace selfspec {
namespace {

Tensor by_onednn(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, const optional<Tensor>& residual) {
  static const auto plain = c10::Dispatcher::singleton()
      .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
      .typed<Tensor(const Tensor&, const Tensor&, const optional<Tensor>&, std::string_view,
                    c10::List<optional<at::Scalar>>, optional<std::string_view>)>();
  static const auto adding = c10::Dispatcher::singleton()
      .findSchemaOrThrow("mkldnn::_linear_pointwise", "binary")
      .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&, std::string_view)>();
  if (residual) return adding.call(x, *residual, weight, bias, "add");
  return plain.call(x, weight, bias, "none", c10::List<optional<at::Scalar>>(), "");
}

#ifdef __AVX512BF16__

// A tile of weights is a line of the cache: 16 outputs, two inputs of each. Every line is read once, in the order it
// lies in, and multiplied with all rows while it is in a register.

struct Job {
  const uint32_t* x;  // [in / 2, rows], two inputs together
  const char* weight;
  int64_t pairs, width;
  const uint16_t *bias, *residual;  // or none
  uint16_t* out;
};

constexpr int AHEAD = 8;  // lines fetched ahead; the hardware's own prefetch stops where a page ends

// ROWS rows times TILES x 16 outputs.
template <int ROWS, int TILES>
void multiply(const Job& job) {
  __m512 sums[TILES][ROWS];
  for (int t = 0; t < TILES; t++) {
    for (int r = 0; r < ROWS; r++) sums[t][r] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < job.pairs; k++) {
    for (int t = 0; t < TILES; t++) {
      const char* line = job.weight + (t * job.pairs + k) * 64;
      _mm_prefetch(line + AHEAD * 64, _MM_HINT_T0);
      const __m512bh weights = (__m512bh)_mm512_loadu_si512(line);
      for (int r = 0; r < ROWS; r++) {
        const __m512bh inputs = (__m512bh)_mm512_set1_epi32(static_cast<int>(job.x[k * ROWS + r]));
        sums[t][r] = _mm512_dpbf16_ps(sums[t][r], weights, inputs);
      }
    }
  }
  for (int t = 0; t < TILES; t++) {
    for (int r = 0; r < ROWS; r++) {
      const int64_t at = r * job.width + t * LANES;
      floats total = (floats)sums[t][r];
      if (job.bias) total += BF16::load(job.bias + t * LANES);
      if (job.residual) total += BF16::load(job.residual + at);
      BF16::store(job.out + at, total);
    }
  }
}

using Multiply = void (*)(const Job&);

template <int TILES, int... N>
constexpr std::array<Multiply, sizeof...(N)> up_to(std::integer_sequence<int, N...>) {
  return {multiply<N + 1, TILES>...};
}

constexpr int PAIRED = 12, SINGLE = 16;  // rows whose sums fit into 32 registers, by two tiles and by one
constexpr auto BY_TWO = up_to<2>(std::make_integer_sequence<int, PAIRED>());
constexpr auto BY_ONE = up_to<1>(std::make_integer_sequence<int, SINGLE>());

Tensor tiled(const Tensor& given, const Tensor& weight, const optional<Tensor>& bias, const optional<Tensor>& residual) {
  const Tensor x = given.contiguous();
  const int64_t rows = x.size(0), pairs = weight.size(1), tiles = weight.size(0), width = tiles * LANES;
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.size(1) == 2 * pairs, "product: inputs do not fit the weight");
  const int64_t parts = rows <= SINGLE ? 1 : (rows + PAIRED - 1) / PAIRED, most = (rows + parts - 1) / std::max<int64_t>(parts, 1);
  Tensor out = at::empty({rows, width}, x.options()), turned = rows == 1 ? x : at::empty_like(x);
  if (rows > 1) {  // a step's inputs of all rows side by side
    const auto* from = static_cast<const uint32_t*>(x.const_data_ptr());
    auto* to = static_cast<uint32_t*>(turned.data_ptr());
    for (int64_t begin = 0; begin < rows; begin += most) {
      const int64_t take = std::min(most, rows - begin);
      for (int64_t r = 0; r < take; r++) {
        for (int64_t k = 0; k < pairs; k++) to[begin * pairs + k * take + r] = from[(begin + r) * pairs + k];
      }
    }
  }
  const auto* inputs = static_cast<const uint32_t*>(turned.const_data_ptr());
  const auto* weights = static_cast<const char*>(weight.const_data_ptr());
  const Tensor added = residual ? residual->contiguous() : Tensor();
  const auto* add = residual ? static_cast<const uint16_t*>(added.const_data_ptr()) : nullptr;
  const auto* base = bias ? static_cast<const uint16_t*>(bias->const_data_ptr()) : nullptr;
  auto* results = static_cast<uint16_t*>(out.data_ptr());
  at::parallel_for(0, tiles / 2, 1, [&](int64_t from, int64_t to) {
    for (int64_t tile = 2 * from; tile < 2 * to; tile += 2) {
      for (int64_t begin = 0; begin < rows; begin += most) {
        const int64_t take = std::min(most, rows - begin), at = begin * width + tile * LANES;
        Job job{inputs + begin * pairs, weights + tile * pairs * 64, pairs, width, base ? base + tile * LANES : nullptr,
                add ? add + at : nullptr, results + at};
        if (take <= PAIRED) {
          BY_TWO[take - 1](job);
          continue;
        }
        BY_ONE[take - 1](job);
        job.weight += pairs * 64, job.out += LANES;
        if (base) job.bias += LANES;
        if (add) job.residual += LANES;
        BY_ONE[take - 1](job);
      }
    }
  });
  return out;
}

#endif

}  // namespace

Tensor product(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, const optional<Tensor>& residual) {
#ifdef __AVX512BF16__
  if (weight.dim() == 4) return tiled(x, weight, bias, residual);
#endif
  if (weight.is_mkldnn()) return by_onednn(x, weight, bias, residual);
  const Tensor total = at::linear(x, weight, bias);
  return residual ? total + *residual : total;
}

}  // namespace selfspec
