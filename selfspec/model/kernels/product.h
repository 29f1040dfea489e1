// x W' of few rows: reading the weights is what takes the time.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace selfspec {

using at::Tensor;
using std::optional;

// x W' + bias + residual, rounded once: [N, in] -> [N, out]. weight: [out, in]; or laid out for oneDNN; or, where the
// CPU multiplies them, in tiles: bf16 [out / 16, in / 2, 16, 2], int8 [out / 16, in / 4 + 1, 64], or packed
// (`blocks.py`) [out / 16, in / 32, bytes], [out / 16, in / 32, 2, bytes]: their sums are those of bf16, bit by bit.
Tensor product(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, const optional<Tensor>& residual);

}  // namespace selfspec
