// Passes over a symmetric sum in place, tile by tile: a tile of the lower triangle and its mirror
// image are worked on together, so that neither the reads nor the transposed writes leave the
// cache.
#include "hessian.h"

#include <algorithm>

#include "simd.h"

namespace mosaic {
namespace {

constexpr std::int64_t kTile = 64;  // two tiles of doubles are 64 KiB: they fit in L2

template <class T>
void mirror_tile(T* h, const T* diagonal_errors, std::int64_t n, T divisor, std::int64_t row0,
                 std::int64_t col0) {
  const std::int64_t row1 = std::min(row0 + kTile, n);
  const std::int64_t col1 = std::min(col0 + kTile, n);
  if (diagonal_errors != nullptr) {
    for (std::int64_t j = col0; j < col1; ++j) {
      if (j >= row0 && j < row1) h[j * n + j] += diagonal_errors[j];
      for (std::int64_t i = std::max(row0, j + 1); i < row1; ++i) h[i * n + j] += h[j * n + i];
    }
  }
  for (std::int64_t i = row0; i < row1; ++i) {
    const std::int64_t end = std::min(col1, i + 1);
    for (std::int64_t j = col0; j < end; ++j) h[i * n + j] /= divisor;
  }
  for (std::int64_t j = col0; j < col1; ++j) {
    for (std::int64_t i = std::max(row0, j + 1); i < row1; ++i) h[j * n + i] = h[i * n + j];
  }
}

// Adds one row of a tile and leaves what rounding took from it in lost. Sums and differences
// only, in this order (Knuth's two-sum): there is no product that a compiler could fuse.
template <class T>
MOSAIC_INLINE void add_row(T* sum, const T* part, T* lost, std::int64_t count) {
  for (std::int64_t j = 0; j < count; ++j) {
    const T before = sum[j];
    const T added = part[j];
    const T total = before + added;
    const T grown = total - before;
    lost[j] = (before - (total - grown)) + (added - grown);
    sum[j] = total;
  }
}

// The errors of a tile are collected row by row and handed on column by column: in the upper
// triangle a column of the tile is contiguous.
template <class T>
MOSAIC_INLINE void add_tile(T* h, const T* part, T* diagonal_errors, std::int64_t n,
                            std::int64_t row0, std::int64_t col0) {
  T lost[kTile][kTile + 1];  // a column of it does not fall into one set of the cache
  const std::int64_t row1 = std::min(row0 + kTile, n);
  const std::int64_t col1 = std::min(col0 + kTile, n);
  for (std::int64_t i = row0; i < row1; ++i) {
    const std::int64_t count = std::min(col1, i + 1) - col0;
    add_row(h + i * n + col0, part + i * n + col0, lost[i - row0], count);
  }
  for (std::int64_t j = col0; j < col1; ++j) {
    if (j >= row0 && j < row1) diagonal_errors[j] += lost[j - row0][j - col0];
    for (std::int64_t i = std::max(row0, j + 1); i < row1; ++i) {
      h[j * n + i] += lost[i - row0][j - col0];
    }
  }
}

MOSAIC_CLONES
void add_tile_of(float* h, const float* part, float* diagonal_errors, std::int64_t n,
                 std::int64_t row0, std::int64_t col0) {
  add_tile(h, part, diagonal_errors, n, row0, col0);
}

MOSAIC_CLONES
void add_tile_of(double* h, const double* part, double* diagonal_errors, std::int64_t n,
                 std::int64_t row0, std::int64_t col0) {
  add_tile(h, part, diagonal_errors, n, row0, col0);
}

}  // namespace

template <class T>
void add_compensated_lower(T* h, const T* part, T* diagonal_errors, std::int64_t n, int threads) {
  const std::int64_t tiles = (n + kTile - 1) / kTile;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (std::int64_t i = 0; i < tiles; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      add_tile_of(h, part, diagonal_errors, n, i * kTile, j * kTile);
    }
  }
  (void)threads;
}

template <class T>
void mirror_lower(T* h, const T* diagonal_errors, std::int64_t n, double divisor, int threads) {
  const std::int64_t tiles = (n + kTile - 1) / kTile;
  const T value = static_cast<T>(divisor);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (std::int64_t i = 0; i < tiles; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      mirror_tile(h, diagonal_errors, n, value, i * kTile, j * kTile);
    }
  }
  (void)threads;
}

template void add_compensated_lower<float>(float*, const float*, float*, std::int64_t, int);
template void add_compensated_lower<double>(double*, const double*, double*, std::int64_t, int);
template void mirror_lower<float>(float*, const float*, std::int64_t, double, int);
template void mirror_lower<double>(double*, const double*, std::int64_t, double, int);

}  // namespace mosaic
