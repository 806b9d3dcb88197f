// One block of columns of the pruning sweep, shared by the CPU and the CUDA code.
#pragma once

#include <cstdint>

namespace mosaic {

// Arrays are contiguous, with the batch as leading dimension.
template <class T>
struct SweepBlock {
  const T* factor;     // (n, n) U, upper, H^-1 = U^T U
  T* weight;           // (m, n) current weights; columns of the block are left compensated
  std::uint8_t* mask;  // (m, n) 1 where a weight is kept: read where of is 0, else written
  T* errors;           // (n, m) out: rows of the block, what each removal pushes to the right
  double* losses;      // (m,) the squared errors of the block are added
  std::int64_t m;
  std::int64_t n;
  std::int64_t begin;  // first column of the block
  std::int64_t width;  // columns of the block
  std::int64_t keep;   // weights that are kept of every `of` along a row; 0 where of is
  std::int64_t of;     // 0: the mask is given
};

}  // namespace mosaic
