#pragma once

#include <cstdint>

#include "sweep_block.h"

namespace mosaic {

// The mask of an unstructured block. Arrays are contiguous, the batch is the leading dimension.
template <class T>
struct SweepChoice {
  const T* factor;            // (n, n) U, upper
  const T* weight;            // (m, n) current weights, finite
  const std::uint8_t* dead;   // (n,) 1 where a column goes before any other
  const std::int64_t* count;  // (1,) how many of the block's weights go
  std::uint8_t* mask;         // (m, n) out: the block's columns, 1 where kept
  std::int64_t m;
  std::int64_t n;
  std::int64_t begin;
  std::int64_t width;
};

// Drops the `count` weights of least |W_ij| / U_jj of each layer's block; ties go to the lowest
// row, then column. Layers are shared by the threads.
template <class T>
void choose_weights(const SweepChoice<T>& first, std::int64_t batch, int threads);

// Walks the block from left to right in every layer of the batch; rows are shared by the threads.
template <class T>
void sweep_block(const SweepBlock<T>& first, std::int64_t batch, int threads);

}  // namespace mosaic
