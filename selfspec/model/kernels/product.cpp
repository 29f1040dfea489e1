#include "product.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <utility>
#include <vector>

#include "vectors.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace selfspec {
namespace {

Tensor by_onednn(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, const optional<Tensor>& residual) {
  // Looked up once: torch exports these operators by name only.
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

#ifdef __AVX512BF16__  // and with it VNNI

// Weights lie in tiles of 16 outputs. A line of the cache has 4 bytes of each, what 4 bytes of inputs are multiplied
// with; every line is read once, in the order it lies in, and multiplied with all rows while it is in a register.

struct Job {
  const uint32_t* x;  // [lines, rows]
  const char* tile;
  int64_t lines, step, width;  // step: bytes from tile to tile; width: outputs
  const float* scale;          // of every row, where inputs are rounded to int8
  const void *bias, *residual;  // or none
  void* out;
};

// Two inputs in bf16, and their weights.
struct Pairs {
  using Sums = __m512;
  static Sums add(Sums sums, __m512i line, __m512i inputs) {
    return _mm512_dpbf16_ps(sums, (__m512bh)line, (__m512bh)inputs);
  }
  static floats finish(Sums sums, const Job&, const char*, int) { return (floats)sums; }
};

// Four inputs in 8 bits, moved up by 128, and their weights in 8 bits. After a tile's lines come two more: what every
// output is scaled by, and what the 128 have added to it.
struct Fours {
  using Sums = __m512i;
  static Sums add(Sums sums, __m512i line, __m512i inputs) { return _mm512_dpbusd_epi32(sums, inputs, line); }
  static floats finish(Sums sums, const Job& job, const char* tile, int row) {
    const char* end = tile + job.lines * 64;
    const ints whole = (ints)sums - *reinterpret_cast<const ints*>(end + 64);
    return __builtin_convertvector(whole, floats) * (*reinterpret_cast<const floats*>(end) * job.scale[row]);
  }
};

constexpr int AHEAD = 32;  // lines fetched ahead: what memory takes to answer, where many rows make a line take long

// ROWS rows times TILES x 16 outputs.
template <class Kind, class Format, int ROWS, int TILES>
void multiply(const Job& job) {
  using T = typename Format::T;
  typename Kind::Sums sums[TILES][ROWS];
  for (int t = 0; t < TILES; t++) {
    for (int r = 0; r < ROWS; r++) sums[t][r] = typename Kind::Sums{};
  }
  for (int64_t k = 0; k < job.lines; k++) {
    for (int t = 0; t < TILES; t++) {
      const char* at = job.tile + t * job.step + k * 64;
      // May run past the weight's end, which a prefetch is allowed to: it never faults.
      _mm_prefetch(at + AHEAD * 64, _MM_HINT_T0);
      const __m512i line = _mm512_loadu_si512(at);
      for (int r = 0; r < ROWS; r++) {
        sums[t][r] = Kind::add(sums[t][r], line, _mm512_set1_epi32(static_cast<int>(job.x[k * ROWS + r])));
      }
    }
  }
  for (int t = 0; t < TILES; t++) {
    for (int r = 0; r < ROWS; r++) {
      const int64_t at = r * job.width + t * LANES;
      floats total = Kind::finish(sums[t][r], job, job.tile + t * job.step, r);
      if (job.bias) total += Format::load(static_cast<const T*>(job.bias) + t * LANES);
      if (job.residual) total += Format::load(static_cast<const T*>(job.residual) + at);
      Format::store(static_cast<T*>(job.out) + at, total);
    }
  }
}

using Multiply = void (*)(const Job&);

template <class Kind, class Format, int TILES, int... N>
constexpr std::array<Multiply, sizeof...(N)> up_to(std::integer_sequence<int, N...>) {
  return {multiply<Kind, Format, N + 1, TILES>...};
}

constexpr int PAIRED = 12, SINGLE = 16;  // rows whose sums fit into 32 registers, by two tiles and by one

// Inputs [rows, lines] of 4 bytes times tiles [tiles, lines (and more), ...].
template <class Kind, class Format>
Tensor tiled(const Tensor& x, const uint32_t* from, const float* scale, const Tensor& weight, int64_t lines,
             const optional<Tensor>& bias, const optional<Tensor>& residual) {
  using T = typename Format::T;
  static constexpr auto by_two = up_to<Kind, Format, 2>(std::make_integer_sequence<int, PAIRED>());
  static constexpr auto by_one = up_to<Kind, Format, 1>(std::make_integer_sequence<int, SINGLE>());
  const int64_t rows = x.size(0), tiles = weight.size(0), width = tiles * LANES;
  const int64_t step = weight.stride(0) * weight.element_size();
  // Up to SINGLE rows, weights are read once. Beyond, parts of even size: a last part of a row or two would cost as
  // much as any, for it reads as many weights.
  const int64_t parts = rows <= SINGLE ? 1 : (rows + PAIRED - 1) / PAIRED, most = (rows + parts - 1) / parts;
  std::vector<uint32_t> turned(rows > 1 ? rows * lines : 0);  // a line's inputs of all rows side by side
  if (rows > 1) {
    for (int64_t begin = 0; begin < rows; begin += most) {
      const int64_t take = std::min(most, rows - begin);
      const uint32_t* given = from + begin * lines;
      uint32_t* to = turned.data() + begin * lines;
      for (int64_t k = 0; k < lines; k += LANES) {  // a few lines of the cache at a time, read and written whole
        const int64_t stop = std::min<int64_t>(k + LANES, lines);
        for (int64_t r = 0; r < take; r++) {
          for (int64_t i = k; i < stop; i++) to[i * take + r] = given[r * lines + i];
        }
      }
    }
    from = turned.data();
  }
  const Tensor out = at::empty({rows, width}, x.options()), added = residual ? residual->contiguous() : Tensor();
  const auto* add = residual ? static_cast<const T*>(added.const_data_ptr()) : nullptr;
  const auto* base = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
  const auto* all = static_cast<const char*>(weight.const_data_ptr());
  auto* results = static_cast<T*>(out.data_ptr());
  at::parallel_for(0, tiles / 2, 1, [&](int64_t first, int64_t last) {
    // Tiles outside, parts of rows inside: the second part finds the two tiles in the cache.
    for (int64_t tile = 2 * first; tile < 2 * last; tile += 2) {
      for (int64_t begin = 0; begin < rows; begin += most) {
        const int64_t take = std::min(most, rows - begin);
        const auto job = [&](int64_t which) {
          const int64_t at = begin * width + which * LANES;
          return Job{from + begin * lines, all + which * step, lines, step, width, scale ? scale + begin : nullptr,
                     base ? base + which * LANES : nullptr, add ? add + at : nullptr, results + at};
        };
        if (take <= PAIRED) {
          by_two[take - 1](job(tile));
        } else {
          by_one[take - 1](job(tile));
          by_one[take - 1](job(tile + 1));
        }
      }
    }
  });
  return out;
}

// Every row in 8 bits by the largest of its own, moved up by 128.
template <class Format>
void round_rows(const Tensor& x, std::vector<uint8_t>& bytes, std::vector<float>& scale) {
  const int64_t rows = x.size(0), width = x.size(1);
  const auto* from = static_cast<const typename Format::T*>(x.const_data_ptr());
  for (int64_t r = 0; r < rows; r++, from += width) {
    floats most{};
    for (int64_t i = 0; i < width; i += LANES) {
      const floats here = Format::load(from + i), size = here < 0 ? -here : here;
      most = size > most ? size : most;
    }
    scale[r] = std::max(highest(most), 1e-9f) / 127;
    for (int64_t i = 0; i < width; i += LANES) {
      // 1.5 * 2^23, as in `exp`: rounds to the nearest even, like torch's `round` in `linear.py`.
      const floats shifter = floats{} + 12582912.0f, whole = (Format::load(from + i) / scale[r] + shifter) - shifter;
      const auto moved = __builtin_convertvector(__builtin_convertvector(whole, ints) + 128, octets);
      *reinterpret_cast<octets*>(bytes.data() + r * width + i) = moved;
    }
  }
}

template <class Format>
Tensor by_fours(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, const optional<Tensor>& residual) {
  std::vector<uint8_t> bytes(x.numel());
  std::vector<float> scale(x.size(0));
  round_rows<Format>(x, bytes, scale);
  const auto* inputs = reinterpret_cast<const uint32_t*>(bytes.data());
  return tiled<Fours, Format>(x, inputs, scale.data(), weight, x.size(1) / 4, bias, residual);
}

Tensor by_tiles(const Tensor& given, const Tensor& weight, const optional<Tensor>& bias, const optional<Tensor>& residual) {
  const Tensor x = given.contiguous();
  if (weight.scalar_type() == at::kChar) {  // [tiles, in / 4 + 2, 64]
    TORCH_CHECK(x.size(1) == 4 * (weight.size(1) - 2), "product: inputs do not fit the weight");
    return (x.scalar_type() == at::kFloat ? by_fours<F32> : by_fours<BF16>)(x, weight, bias, residual);
  }
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.size(1) == 2 * weight.size(1), "product: inputs do not fit the weight");
  const auto* inputs = static_cast<const uint32_t*>(x.const_data_ptr());
  return tiled<Pairs, BF16>(x, inputs, nullptr, weight, weight.size(1), bias, residual);
}

#endif

}  // namespace

Tensor product(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, const optional<Tensor>& residual) {
#ifdef __AVX512BF16__
  if (weight.dim() > 2) return by_tiles(x, weight, bias, residual);
#endif
  if (weight.is_mkldnn()) return by_onednn(x, weight, bias, residual);
  const Tensor total = at::linear(x, weight, bias);
  return residual ? total + *residual : total;
}

}  // namespace selfspec
