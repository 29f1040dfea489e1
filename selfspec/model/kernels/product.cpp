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

// Weights lie in tiles of 16 outputs. A line has 4 bytes of each, what 4 bytes of inputs are multiplied with. It lies in
// memory, or is made in a register of a block that is packed; either way it is had once, in the order of inputs, and
// multiplied with all rows. So equal weights come to equal sums, however they lie.

struct Job {
  const uint32_t* x;  // [lines, rows]
  const char* tile;
  int64_t lines, step, width;  // step: bytes from tile to tile; width: outputs
  int64_t ahead;               // bytes
  const float* scale;          // [groups, rows], where inputs are rounded to int8; and
  const int32_t* start;        // where their sums begin
  const void *bias, *residual;  // or none
  void* out;
};

template <int N>
struct Lines {
  static constexpr int LINES = N, BYTES = N * 64;
  static constexpr bool LIE = true;
  const char* at;

  void open(const char* block) { at = block; }
  template <int J>
  __m512i get() const { return _mm512_loadu_si512(at + J * 64); }
};

// A block as GGUF files pack it (`blocks.py` lays it out). A weight is d q + m in float32, rounded to bf16: the very
// number that unpacking the file gives. `Quants` gives q of outputs 0 to 7, or of 8 to 15, in the lanes of a line.
template <class Quants>
struct Packed {
  static constexpr int LINES = Quants::LINES, BYTES = Quants::BYTES;
  static constexpr bool LIE = false;
  Quants quants;
  __m512 d[2], m[2];

  void open(const char* at) {
    quants.at = at;
    const __m512i low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i lanes[] = {low, _mm512_add_epi32(low, _mm512_set1_epi32(8))};
    for (int half = 0; half < 2; half++) {
      d[half] = _mm512_permutexvar_ps(lanes[half], quants.d());
      m[half] = _mm512_permutexvar_ps(lanes[half], quants.m());
    }
  }
  template <int J>
  __m512i get() const {
    const __m512 low = _mm512_fmadd_ps(quants.template get<J>(0), d[0], m[0]);
    const __m512 high = _mm512_fmadd_ps(quants.template get<J>(1), d[1], m[1]);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }
};

// Sixteen scales, in float16 or in float32.
struct Half {
  static constexpr int BYTES = 32;
  static __m512 load(const char* at) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))); }
};

struct Whole {
  static constexpr int BYTES = 64;
  static __m512 load(const char* at) { return _mm512_loadu_ps(at); }
};

// d and m of 16 outputs; then of every eight lines two vectors of low and high outputs, 4 bits a line.
template <class Scale>
struct Nibbles {
  static constexpr int LINES = 16, BYTES = 2 * Scale::BYTES + LINES / 8 * 128;
  const char* at;

  __m512 d() const { return Scale::load(at); }
  __m512 m() const { return Scale::load(at + Scale::BYTES); }
  template <int J>
  __m512 get(int half) const {
    const __m512i lanes = _mm512_loadu_si512(at + 2 * Scale::BYTES + (J / 8 * 2 + half) * 64);
    // A permutation looks at the lowest four bits of an index.
    const __m512 whole = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(lanes, J % 8 * 4), whole);
  }
};

// d of 16 outputs; then of every four lines two vectors of low and high outputs, q + 128 in 8 bits a line.
template <class Scale, int LINES_>
struct Bytes {
  static constexpr int LINES = LINES_, BYTES = Scale::BYTES + LINES / 4 * 128;
  const char* at;

  // `get` gives 1 + (q + 128) / 256. 256 d times that, less 384 d: float32 has all of these numbers.
  __m512 d() const { return _mm512_mul_ps(Scale::load(at), _mm512_set1_ps(256)); }
  __m512 m() const { return _mm512_mul_ps(Scale::load(at), _mm512_set1_ps(-384)); }
  template <int J>
  __m512 get(int half) const {
    __m512i lanes = _mm512_loadu_si512(at + Scale::BYTES + (J / 4 * 2 + half) * 64);
    if constexpr (J % 4 < 2) lanes = _mm512_slli_epi32(lanes, 15 - J % 4 * 8);
    if constexpr (J % 4 > 1) lanes = _mm512_srli_epi32(lanes, J % 4 * 8 - 15);
    // (lanes & the mantissa's upper eight bits) | 1
    return (__m512)_mm512_ternarylogic_epi32(lanes, _mm512_set1_epi32(0xff << 15), (__m512i)_mm512_set1_ps(1), 0xEA);
  }
};

// Two inputs in bf16, and their weights.
template <class Block_>
struct Pairs {
  using Block = Block_;
  static __m512 begin(__m512 sums, const Job&, int64_t) { return sums; }
  static __m512 add(__m512 sums, __m512i line, __m512i inputs) {
    return _mm512_dpbf16_ps(sums, (__m512bh)line, (__m512bh)inputs);
  }
  static __m512 end(__m512, __m512 sums, const Job&, int64_t) { return sums; }
  static floats finish(__m512 sums, const Job&, const char*) { return (floats)sums; }
};

// Four inputs in 8 bits, and their weights in 8 bits, moved up by 128. Groups of inputs have a scale each; what the 128
// add to a group's sums is taken off where those begin. After a tile's lines comes one more: what every output is scaled
// by.
struct Fours {
  static constexpr int GROUP = 32;  // inputs
  using Block = Lines<GROUP / 4>;
  static __m512i begin(__m512, const Job& job, int64_t at) { return _mm512_set1_epi32(job.start[at]); }
  static __m512i add(__m512i sums, __m512i line, __m512i inputs) { return _mm512_dpbusd_epi32(sums, line, inputs); }
  static __m512 end(__m512 sums, __m512i group, const Job& job, int64_t at) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(group), _mm512_set1_ps(job.scale[at]), sums);
  }
  static floats finish(__m512 sums, const Job& job, const char* tile) {
    return (floats)sums * *reinterpret_cast<const floats*>(tile + job.lines * 64);
  }
};

template <class Do, int... J>
void unrolled(std::integer_sequence<int, J...>, const Do& each) {
  (each(std::integral_constant<int, J>()), ...);
}

// ROWS rows times TILES x 16 outputs.
template <class Kind, class Format, int ROWS, int TILES>
void multiply(const Job& job) {
  using T = typename Format::T;
  using Block = typename Kind::Block;
  constexpr std::make_integer_sequence<int, Block::LINES> lines;
  __m512 sums[TILES][ROWS];
  for (int t = 0; t < TILES; t++) {
    for (int r = 0; r < ROWS; r++) sums[t][r] = _mm512_setzero_ps();
  }
  Block blocks[TILES];
  for (int64_t k = 0; k < job.lines; k += Block::LINES) {
    const int64_t group = k / Block::LINES * ROWS;
    decltype(Kind::begin(sums[0][0], job, 0)) parts[TILES][ROWS];
    for (int t = 0; t < TILES; t++) {
      for (int r = 0; r < ROWS; r++) parts[t][r] = Kind::begin(sums[t][r], job, group + r);
    }
    for (int t = 0; t < TILES; t++) {
      const char* at = job.tile + t * job.step + k / Block::LINES * Block::BYTES;
      // May run past the weight's end, which a prefetch is allowed to: it never faults.
      for (int b = 0; b < Block::BYTES; b += 64) _mm_prefetch(at + job.ahead + b, _MM_HINT_T0);
      blocks[t].open(at);
    }
    unrolled(lines, [&](auto line) {
      for (int t = 0; t < TILES; t++) {
        const __m512i weights = blocks[t].template get<line>();
        const uint32_t* x = job.x + (k + line) * ROWS;
        for (int r = 0; r < ROWS; r++) {
          parts[t][r] = Kind::add(parts[t][r], weights, _mm512_set1_epi32(static_cast<int>(x[r])));
        }
      }
    });
    for (int t = 0; t < TILES; t++) {
      for (int r = 0; r < ROWS; r++) sums[t][r] = Kind::end(sums[t][r], parts[t][r], job, group + r);
    }
  }
  for (int t = 0; t < TILES; t++) {
    for (int r = 0; r < ROWS; r++) {
      const int64_t at = r * job.width + t * LANES;
      floats total = Kind::finish(sums[t][r], job, job.tile + t * job.step);
      if (job.bias) total += Format::load(static_cast<const T*>(job.bias) + t * LANES);
      if (job.residual) total += Format::load(static_cast<const T*>(job.residual) + at);
      Format::store(static_cast<T*>(job.out) + at, total);
    }
  }
}

// All lines of a tile.
template <class Block>
void unpack(const char* tile, int64_t lines, int64_t ahead, char* to) {
  Block block;
  for (int64_t k = 0; k < lines; k += Block::LINES, tile += Block::BYTES) {
    for (int b = 0; b < Block::BYTES; b += 64) _mm_prefetch(tile + ahead + b, _MM_HINT_T0);
    block.open(tile);
    unrolled(std::make_integer_sequence<int, Block::LINES>(), [&](auto line) {
      _mm512_storeu_si512(to + (k + line) * 64, block.template get<line>());
    });
  }
}

using Multiply = void (*)(const Job&);

template <class Kind, class Format, int TILES, int... N>
constexpr std::array<Multiply, sizeof...(N)> rows_of(std::integer_sequence<int, N...>) {
  return {multiply<Kind, Format, N + 1, TILES>...};
}

template <class Kind, class Format, int TILES, int MOST>
constexpr auto up_to = rows_of<Kind, Format, TILES>(std::make_integer_sequence<int, MOST>());

// Fetched ahead: what memory takes to answer. Of packed tiles, which are soon gone through, the same place of the next
// two, or their beginnings would be waited for; unless that is far.
constexpr int64_t NEAR = 32 * 64, FAR = 32 * 1024;
constexpr int PAIRED = 12, SINGLE = 16;  // rows whose sums fit into 32 registers, by two tiles and by one

// What every row has so many of, side by side for the rows of a part: [rows, count] -> [part, count, rows of the part].
template <class T>
std::vector<T> turned(const T* from, int64_t rows, int64_t most, int64_t count) {
  std::vector<T> all(rows * count);
  for (int64_t begin = 0; begin < rows; begin += most) {
    const int64_t take = std::min(most, rows - begin);
    const T* given = from + begin * count;
    T* to = all.data() + begin * count;
    for (int64_t k = 0; k < count; k += LANES) {  // a few lines of the cache at a time, read and written whole
      const int64_t stop = std::min<int64_t>(k + LANES, count);
      for (int64_t r = 0; r < take; r++) {
        for (int64_t i = k; i < stop; i++) to[i * take + r] = given[r * count + i];
      }
    }
  }
  return all;
}

// Inputs of a product: [rows, lines] of 4 bytes; rounded to int8, with scales and starts [rows, groups].
struct Inputs {
  const uint32_t* x;
  int64_t lines, groups = 0;
  const float* scale = nullptr;
  const int32_t* start = nullptr;
};

// Inputs times tiles [tiles, lines (and more), ...].
template <class Kind, class Format>
Tensor tiled(const Tensor& x, const Inputs& given, const Tensor& weight, const optional<Tensor>& bias,
             const optional<Tensor>& residual) {
  using T = typename Format::T;
  using Lying = std::conditional_t<Kind::Block::LIE, Kind, Pairs<Lines<1>>>;
  const int64_t lines = given.lines, groups = given.groups;
  const int64_t rows = x.size(0), tiles = weight.size(0), width = tiles * LANES;
  const int64_t step = weight.stride(0) * weight.element_size();
  // Up to SINGLE rows, weights are read once. Beyond, parts of even size: a last part of a row or two would cost as
  // much as any, for it reads as many weights.
  const int64_t parts = rows <= SINGLE ? 1 : (rows + PAIRED - 1) / PAIRED, most = (rows + parts - 1) / parts;
  const auto from = turned(given.x, rows, most, lines);
  const auto scale = turned(given.scale, rows, most, groups);
  const auto start = turned(given.start, rows, most, groups);
  const Tensor out = at::empty({rows, width}, x.options()), added = residual ? residual->contiguous() : Tensor();
  const auto* add = residual ? static_cast<const T*>(added.const_data_ptr()) : nullptr;
  const auto* base = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
  const auto* all = static_cast<const char*>(weight.const_data_ptr());
  auto* results = static_cast<T*>(out.data_ptr());
  // Where a tile is gone through more than once, its lines are had once.
  const bool unpacks = !Kind::Block::LIE && rows > PAIRED;
  const int64_t unpacked = lines * 64, ahead = Kind::Block::LIE ? NEAR : std::min(2 * step, FAR);
  at::parallel_for(0, tiles / 2, 1, [&](int64_t first, int64_t last) {
    const Tensor room = unpacks ? at::empty({2 * unpacked}, at::kByte) : Tensor();
    auto* laid_out = unpacks ? static_cast<char*>(room.data_ptr()) : nullptr;
    // Tiles outside, parts of rows inside: the second part finds the two tiles in the cache.
    for (int64_t tile = 2 * first; tile < 2 * last; tile += 2) {
      for (int t = 0; t < 2 && unpacks; t++) {
        unpack<typename Kind::Block>(all + (tile + t) * step, lines, ahead, laid_out + t * unpacked);
      }
      for (int64_t begin = 0; begin < rows; begin += most) {
        const int64_t take = std::min(most, rows - begin);
        const auto job = [&](int t) {
          const int64_t at = begin * width + (tile + t) * LANES;
          return Job{from.data() + begin * lines,
                     unpacks ? laid_out + t * unpacked : all + (tile + t) * step,
                     lines,
                     unpacks ? unpacked : step,
                     width,
                     unpacks ? 0 : ahead,
                     scale.data() + begin * groups,
                     start.data() + begin * groups,
                     base ? base + (tile + t) * LANES : nullptr,
                     add ? add + at : nullptr,
                     results + at};
        };
        if (take > PAIRED) {
          up_to<Lying, Format, 1, SINGLE>[take - 1](job(0));
          up_to<Lying, Format, 1, SINGLE>[take - 1](job(1));
        } else if (unpacks) {
          up_to<Lying, Format, 2, PAIRED>[take - 1](job(0));
        } else {
          up_to<Kind, Format, 2, PAIRED>[take - 1](job(0));
        }
      }
    }
  });
  return out;
}

// Every group of a row in 8 bits by the largest of its own.
template <class Format>
Tensor by_fours(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, const optional<Tensor>& residual) {
  const int64_t rows = x.size(0), width = x.size(1), groups = width / Fours::GROUP;
  std::vector<uint32_t> bytes(rows * width / 4);
  std::vector<float> scale(rows * groups);
  std::vector<int32_t> start(rows * groups);
  const auto* from = static_cast<const typename Format::T*>(x.const_data_ptr());
  auto* to = reinterpret_cast<octets*>(bytes.data());
  for (int64_t g = 0; g < rows * groups; g++, from += Fours::GROUP) {
    const floats x[] = {Format::load(from), Format::load(from + LANES)};
    floats most{};
    for (const floats& each : x) {
      const floats size = each < 0 ? -each : each;
      most = size > most ? size : most;
    }
    scale[g] = std::max(highest(most), 1e-9f) / 127;
    floats total{};
    for (const floats& each : x) {
      // 1.5 * 2^23, as in `exp`: rounds to the nearest even, like torch's `round` in `linear.py`.
      const floats shifter = floats{} + 12582912.0f, whole = (each / scale[g] + shifter) - shifter;
      total += whole;
      *to++ = __builtin_convertvector(__builtin_convertvector(whole, ints), octets);
    }
    start[g] = -128 * static_cast<int32_t>(sum(total));
  }
  return tiled<Fours, Format>(x, {bytes.data(), width / 4, groups, scale.data(), start.data()}, weight, bias, residual);
}

Tensor by_tiles(const Tensor& given, const Tensor& weight, const optional<Tensor>& bias, const optional<Tensor>& residual) {
  const Tensor x = given.contiguous();
  if (weight.scalar_type() == at::kChar) {  // [tiles, in / 4 + 1, 64]
    TORCH_CHECK(x.size(1) == 4 * (weight.size(1) - 1), "product: inputs do not fit the weight");
    return (x.scalar_type() == at::kFloat ? by_fours<F32> : by_fours<BF16>)(x, weight, bias, residual);
  }
  const bool packed = weight.scalar_type() == at::kByte;
  const int64_t inputs = x.size(1);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && inputs == (packed ? 32 : 2) * weight.size(1),
              "product: inputs do not fit the weight");
  const auto by = [&](auto block) {
    const auto* pairs = static_cast<const uint32_t*>(x.const_data_ptr());
    return tiled<Pairs<decltype(block)>, BF16>(x, {pairs, inputs / 2}, weight, bias, residual);
  };
  if (!packed) return by(Lines<1>());
  if (weight.dim() == 4) return by(Packed<Bytes<Whole, 8>>());
  switch (weight.size(2)) {
    case Nibbles<Half>::BYTES: return by(Packed<Nibbles<Half>>());
    case Nibbles<Whole>::BYTES: return by(Packed<Nibbles<Whole>>());
    case Bytes<Half, 16>::BYTES: return by(Packed<Bytes<Half, 16>>());
    default: TORCH_CHECK(false, "product: no blocks have ", weight.size(2), " bytes");
  }
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
