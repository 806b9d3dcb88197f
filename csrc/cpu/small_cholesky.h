// Cholesky factor and its inverse for one small row-major block that sits in the L1/L2 cache.
#pragma once

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace mosaic {

// Replaces the lower triangle of a (n x n, row stride ld) by its Cholesky factor L, a = L L^T.
// Returns false, with a left half done, where a pivot is not positive (or not a number).
template <class T>
MOSAIC_INLINE bool cholesky_lower(T* a, std::int64_t n, std::int64_t ld) {
  for (std::int64_t i = 0; i < n; ++i) {
    T* row = a + i * ld;
    for (std::int64_t j = 0; j <= i; ++j) {
      const T* other = a + j * ld;
      T dot = 0;
#pragma omp simd reduction(+ : dot)
      for (std::int64_t k = 0; k < j; ++k) dot += row[k] * other[k];
      const T rest = row[j] - dot;
      if (j < i) {
        row[j] = rest / other[j];
      } else {
        if (!(rest > T(0)) || !std::isfinite(rest)) return false;
        row[j] = std::sqrt(rest);
      }
    }
  }
  return true;
}

// Replaces the lower triangle L of a by L^-1. scratch holds n elements.
template <class T>
MOSAIC_INLINE void invert_lower(T* a, std::int64_t n, std::int64_t ld, T* scratch) {
  for (std::int64_t i = 0; i < n; ++i) {
    T* row = a + i * ld;
    for (std::int64_t j = 0; j < i; ++j) scratch[j] = 0;
    for (std::int64_t k = 0; k < i; ++k) {
      const T factor = row[k];
      const T* above = a + k * ld;
#pragma omp simd
      for (std::int64_t j = 0; j <= k; ++j) scratch[j] += factor * above[j];
    }
    const T reciprocal = T(1) / row[i];
    for (std::int64_t j = 0; j < i; ++j) row[j] = -reciprocal * scratch[j];
    row[i] = reciprocal;
  }
}

}  // namespace mosaic
