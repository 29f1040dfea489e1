// The layers of a Llama over a few new tokens, in one call.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/List.h>

#include <optional>

namespace selfspec {

using at::Tensor;
using std::optional;

// Rows of [N, D] scaled to unit root-mean-square, and by a weight [D].
Tensor norm(const Tensor& x, const Tensor& weight, double eps);

// Runs layers on the residual stream [N, D] and writes their keys and values. Of a list of weights, each is a layer's.
//
// cache: [layers, 2, R, G, S, d]. cos, sin: [positions, d]. Of every row from `first_row` on: bases, its verified tokens;
// sizes, its tree's nodes, whose parents stand row after row. Of each tree the nodes from number `first` on are new.
Tensor layers(const Tensor& hidden, Tensor& cache, const Tensor& cos, const Tensor& sin, at::IntArrayRef bases,
              at::IntArrayRef sizes, at::IntArrayRef parents, int64_t first, int64_t first_row, int64_t heads,
              double eps, int64_t first_layer, at::TensorList attention_norm, at::TensorList qkv,
              const c10::List<optional<Tensor>>& qkv_bias, at::TensorList out, at::TensorList mlp_norm,
              at::TensorList gate_up, at::TensorList down);

}  // namespace selfspec
