// The mirror of hessian_finalize_: one pass over the matrix, in place, tile by tile, so that
// neither the reads nor the transposed writes leave the cache.
#include "hessian.h"

#include <algorithm>

namespace mosaic {
namespace {

constexpr std::int64_t kTile = 64;  // two tiles of doubles are 64 KiB: they fit in L2

template <class T>
void mirror_tile(T* h, std::int64_t n, T divisor, std::int64_t row0, std::int64_t col0) {
  const std::int64_t row1 = std::min(row0 + kTile, n);
  const std::int64_t col1 = std::min(col0 + kTile, n);
  for (std::int64_t i = row0; i < row1; ++i) {
    const std::int64_t end = std::min(col1, i + 1);
    for (std::int64_t j = col0; j < end; ++j) h[i * n + j] /= divisor;
  }
  for (std::int64_t j = col0; j < col1; ++j) {
    for (std::int64_t i = std::max(row0, j + 1); i < row1; ++i) h[j * n + i] = h[i * n + j];
  }
}

}  // namespace

template <class T>
void mirror_lower(T* h, std::int64_t n, double divisor, int threads) {
  const std::int64_t tiles = (n + kTile - 1) / kTile;
  const T value = static_cast<T>(divisor);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (std::int64_t i = 0; i < tiles; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) mirror_tile(h, n, value, i * kTile, j * kTile);
  }
  (void)threads;
}

template void mirror_lower<float>(float*, std::int64_t, double, int);
template void mirror_lower<double>(double*, std::int64_t, double, int);

}  // namespace mosaic
