// What the panels for single columns and for wider groups share: the choice of the group of least
// loss, and the way out of a breakdown.
#pragma once

#include <cstdint>

#include "panel.h"

namespace mosaic {

template <class T>
struct Best {
  T loss;
  std::int64_t group;  // -1: none
};

// Less loss, then the lower index; the order of the comparisons does not matter.
template <class T>
__device__ bool better(const Best<T>& a, const Best<T>& b) {
  if (a.group < 0 || b.group < 0) return a.group >= 0;
  return a.loss < b.loss || (a.loss == b.loss && a.group < b.group);
}

// The loss of a group, at least 0; -1, less than any other, where A_SS has no factor or the loss
// is not finite: a broken group wins every comparison, and so is seen by all threads.
template <class T>
__device__ T loss_or_broken(T loss, bool factor_exists) {
  if (!factor_exists || !(loss - loss == T(0))) return T(-1);
  return loss > T(0) ? loss : T(0);
}

// The arrays of layer b of the batch.
template <class T>
__device__ Panel<T> panel_of_layer(Panel<T> panel, std::int64_t b) {
  const std::int64_t n = panel.n, g = panel.group_size, rows = panel.pivots * g;
  panel.inverse += b * n * n;
  panel.gram += b * n * n;
  panel.inverse_blocks += b * n * g;
  panel.gram_blocks += b * n * g;
  panel.alive += b * (n / g);
  panel.u += b * rows * n;
  panel.v += b * rows * n;
  panel.picked += b * panel.pivots;
  panel.losses += b * panel.pivots;
  return panel;
}

// After a breakdown: valid indices, not-a-number losses and empty rows for the rest. Called by
// all `threads` threads of a block.
template <class T>
__device__ void give_up(const Panel<T>& panel, std::int64_t first, int threads) {
  const std::int64_t row = panel.group_size * panel.n;
  const std::int64_t begin = first * row, end = panel.pivots * row;
  for (std::int64_t i = begin + threadIdx.x; i < end; i += threads) panel.u[i] = panel.v[i] = T(0);
  if (threadIdx.x != 0) return;
  std::int64_t group = 0;
  for (std::int64_t k = first; k < panel.pivots; ++k) {
    while (!panel.alive[group]) ++group;
    panel.alive[group] = 0;
    panel.picked[k] = group;
    panel.losses[k] = T(0) / T(0);
  }
}

}  // namespace mosaic
