// Sixteen floats at a time, in the compilers' own vectors, and the number formats they are read from.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace selfspec {

constexpr int LANES = 16;
// Aligned as their elements, not as vectors: a load may begin anywhere; may_alias: in memory of any type.
typedef float floats __attribute__((vector_size(LANES * sizeof(float)), aligned(alignof(float)), may_alias));
typedef int32_t ints __attribute__((vector_size(LANES * sizeof(int32_t)), aligned(alignof(float)), may_alias));
typedef uint32_t bits __attribute__((vector_size(LANES * sizeof(uint32_t)), aligned(alignof(float)), may_alias));
typedef uint8_t octets __attribute__((vector_size(LANES * sizeof(uint8_t)), aligned(alignof(uint8_t)), may_alias));
typedef uint16_t halves __attribute__((vector_size(LANES * sizeof(uint16_t)), aligned(alignof(uint16_t)), may_alias));

// A number format's 16 values as floats, and back, rounded to the nearest even.
struct F32 {
  using T = float;
  static floats load(const T* at) { return *reinterpret_cast<const floats*>(at); }
  static float load_one(const T* at) { return *at; }
  static void store(T* at, floats x) { *reinterpret_cast<floats*>(at) = x; }
};

struct BF16 {
  using T = uint16_t;
  static floats load(const T* at) {
    return (floats)(__builtin_convertvector(*reinterpret_cast<const halves*>(at), bits) << 16);
  }
  static float load_one(const T* at) { return std::bit_cast<float>(static_cast<uint32_t>(*at) << 16); }
  static void store(T* at, floats x) {
    bits b = (bits)x;
    // Just below half of what is cut off, plus the bit that stays last: ties go to even, as torch rounds.
    b = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    *reinterpret_cast<halves*>(at) = __builtin_convertvector(b, halves);
  }
};

inline int64_t up_to_lanes(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

inline float sum(floats x) {
  x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return x[0] + x[1];
}

// The sums of four, in the first four places.
inline floats sums(floats a, floats b, floats c, floats d) {
  const auto folded = [](floats x, floats y) {
    return __builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  };
  const floats ab = folded(a, b), cd = folded(c, d);
  floats x = __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
             __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  return x + __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
}

inline float highest(floats x) {
  const auto larger = [](floats a, floats b) { return a > b ? a : b; };
  x = larger(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = larger(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  x = larger(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  return std::max(x[0], x[1]);
}

inline floats at_most(floats x, float most) { return x < most ? x : floats{} + most; }

// e^x for x up to 88: 2^n times a polynomial in the rest (Cephes' expf, relative error 2e-7); 0 below -87.
inline floats exp(floats x) {
  const auto tiny = x < -87.0f;
  x = tiny ? floats{} : x;
  const floats shifter = floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
  const floats n = (x * 1.44269504f + shifter) - shifter;
  const floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // Times 2^n, by adding n to the exponent; below -87 that would run into the sign, hence `tiny`.
  p = (floats)((ints)p + (__builtin_convertvector(n, ints) << 23));
  return tiny ? floats{} : p;
}

// D values, to be multiplied with others: widened; or as they are, where the CPU multiplies bf16.
template <class Format, int D>
struct Vector {
  floats parts[D / LANES];
  void load(const typename Format::T* at) {
    for (int p = 0; p < D / LANES; p++) parts[p] = Format::load(at + p * LANES);
  }
};

// Sixteen sums that together are a dot product.
template <class Format, int D>
floats dot(const Vector<Format, D>& a, const Vector<Format, D>& b) {
  floats total = a.parts[0] * b.parts[0];
  for (int p = 1; p < D / LANES; p++) total += a.parts[p] * b.parts[p];
  return total;
}

#ifdef __AVX512BF16__
template <int D>
struct Vector<BF16, D> {
  __m512bh parts[D / (2 * LANES)];
  void load(const uint16_t* at) {
    for (int p = 0; p < D / (2 * LANES); p++) parts[p] = (__m512bh)_mm512_loadu_si512(at + 2 * p * LANES);
  }
};

template <int D>
floats dot(const Vector<BF16, D>& a, const Vector<BF16, D>& b) {
  __m512 total = _mm512_setzero_ps();
  for (int p = 0; p < D / (2 * LANES); p++) total = _mm512_dpbf16_ps(total, a.parts[p], b.parts[p]);
  return (floats)total;
}
#endif

}  // namespace selfspec
