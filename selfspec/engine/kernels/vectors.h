// Sixteen floats at a time, in the compilers' own vectors, and the number formats they are read from.
#pragma once

#include <algorithm>
#include <cstdint>

namespace selfspec {

constexpr int LANES = 16;
typedef float floats __attribute__((vector_size(LANES * sizeof(float)), aligned(alignof(float)), may_alias));
typedef int32_t ints __attribute__((vector_size(LANES * sizeof(int32_t)), aligned(alignof(float)), may_alias));
typedef uint32_t bits __attribute__((vector_size(LANES * sizeof(uint32_t)), aligned(alignof(float)), may_alias));
typedef uint16_t halves __attribute__((vector_size(LANES * sizeof(uint16_t)), aligned(alignof(uint16_t)), may_alias));

// A number format's 16 values as floats, and back, rounded to the nearest even.
struct F32 {
  using T = float;
  static floats load(const T* at) { return *reinterpret_cast<const floats*>(at); }
  static void store(T* at, floats x) { *reinterpret_cast<floats*>(at) = x; }
};

struct BF16 {
  using T = uint16_t;
  static floats load(const T* at) {
    return (floats)(__builtin_convertvector(*reinterpret_cast<const halves*>(at), bits) << 16);
  }
  static void store(T* at, floats x) {
    bits b = (bits)x;
    b = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    *reinterpret_cast<halves*>(at) = __builtin_convertvector(b, halves);
  }
};

inline float sum(floats x) {
  x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return x[0] + x[1];
}

inline float highest(floats x) {
  float top = x[0];
  for (int i = 1; i < LANES; i++) top = std::max(top, x[i]);
  return top;
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
  p = (floats)((ints)p + (__builtin_convertvector(n, ints) << 23));
  return tiny ? floats{} : p;
}

}  // namespace selfspec
