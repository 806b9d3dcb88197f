// The panel of the greedy elimination for groups of one column; see cpu/prune.cpp for the
// formulas. One thread block owns a layer for the whole panel: a removal is a minimum over the
// columns, two barriers and one pass over U and V, which stay in the L2 cache. Wider groups are
// few, and torch's batched operators serve them.
#ifdef MOSAIC_HOST
#include "host/cuda_host.h"
#else
#include <cuda_runtime.h>

#include "cuda/launch.h"
#endif

#include "cuda/prune.h"

namespace mosaic {
namespace {

#ifdef MOSAIC_HOST
constexpr int kThreads = 32;  // real threads on the host: enough for every path
#else
constexpr int kThreads = 512;
#endif

template <class T>
struct Best {
  T loss;
  std::int64_t column;  // -1: none
};

// Less loss, then the lower index; the order of the comparisons does not matter.
template <class T>
__device__ bool better(const Best<T>& a, const Best<T>& b) {
  if (a.column < 0 || b.column < 0) return a.column >= 0;
  return a.loss < b.loss || (a.loss == b.loss && a.column < b.column);
}

// trace(A_SS^-1 G_SS) of one column, at least 0; `broken` is raised where A_SS is not positive.
template <class T>
__device__ T column_loss(T pivot, T energy, bool& broken) {
  const T loss = (energy > T(0) ? energy : T(0)) / pivot;
  if (!(pivot > T(0)) || !(loss - loss == T(0))) broken = true;
  return loss;
}

template <class T>
__device__ Best<T> best_of_thread(const Panel<T>& panel, bool& broken) {
  Best<T> best{T(0), -1};
  for (std::int64_t c = threadIdx.x; c < panel.n; c += kThreads) {
    if (!panel.alive[c]) continue;
    const Best<T> candidate{column_loss(panel.inverse_blocks[c], panel.gram_blocks[c], broken), c};
    if (better(candidate, best)) best = candidate;
  }
  return best;
}

// After a breakdown: valid indices, not-a-number losses and empty rows for the rest.
template <class T>
__device__ void give_up(const Panel<T>& panel, std::int64_t first) {
  const std::int64_t begin = first * panel.n, end = panel.pivots * panel.n;
  for (std::int64_t i = begin + threadIdx.x; i < end; i += kThreads) panel.u[i] = panel.v[i] = T(0);
  if (threadIdx.x != 0) return;
  std::int64_t column = 0;
  for (std::int64_t k = first; k < panel.pivots; ++k) {
    while (!panel.alive[column]) ++column;
    panel.alive[column] = 0;
    panel.picked[k] = column;
    panel.losses[k] = T(0) / T(0);
  }
}

// The new rows k of U and V, and the diagonals they change, for the columns of this thread.
template <class T>
__device__ void eliminate(const Panel<T>& panel, std::int64_t k, std::int64_t s, T pivot, T energy,
                          const T* u_s, const T* v_s) {
  const std::int64_t n = panel.n;
  const T scale = T(1) / sqrt(pivot), half_curvature = energy / (T(2) * pivot);
  for (std::int64_t c = threadIdx.x; c < n; c += kThreads) {
    T u = 0, v = 0;
    if (panel.alive[c] && c != s) {
      const std::int64_t stored = c < s ? s * n + c : c * n + s;
      u = panel.inverse[stored];
      v = panel.gram[stored];
#pragma unroll 4
      for (std::int64_t q = 0; q < k; ++q) {
        const T u_old = panel.u[q * n + c], v_old = panel.v[q * n + c];
        u -= u_s[q] * u_old;
        v -= u_s[q] * v_old + v_s[q] * u_old;
      }
      u *= scale;
      v = v * scale - half_curvature * u;
      panel.inverse_blocks[c] -= u * u;
      panel.gram_blocks[c] -= T(2) * u * v;
    }
    panel.u[k * n + c] = u;
    panel.v[k * n + c] = v;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) prune_panel_kernel(Panel<T> panel) {
  __shared__ T losses[kThreads];
  __shared__ std::int64_t columns[kThreads];
  __shared__ int any_broken;
  __shared__ T u_s[kMaxCudaPivots], v_s[kMaxCudaPivots];
  const std::int64_t n = panel.n, b = blockIdx.x, tid = threadIdx.x;
  panel.inverse += b * n * n;
  panel.gram += b * n * n;
  panel.inverse_blocks += b * n;
  panel.gram_blocks += b * n;
  panel.alive += b * n;
  panel.u += b * panel.pivots * n;
  panel.v += b * panel.pivots * n;
  panel.picked += b * panel.pivots;
  panel.losses += b * panel.pivots;

  for (std::int64_t k = 0; k < panel.pivots; ++k) {
    bool broken = false;
    const Best<T> mine = best_of_thread(panel, broken);
    if (tid == 0) any_broken = 0;
    losses[tid] = mine.loss;
    columns[tid] = mine.column;
    __syncthreads();
    if (broken) any_broken = 1;
    for (int width = kThreads / 2; width > 0; width /= 2) {
      if (tid < width) {
        const Best<T> here{losses[tid], columns[tid]};
        const Best<T> there{losses[tid + width], columns[tid + width]};
        if (better(there, here)) {
          losses[tid] = there.loss;
          columns[tid] = there.column;
        }
      }
      __syncthreads();
    }
    if (any_broken) {
      give_up(panel, k);
      return;
    }
    const std::int64_t s = columns[0];
    const T pivot = panel.inverse_blocks[s], energy = panel.gram_blocks[s];
    for (std::int64_t q = tid; q < k; q += kThreads) {
      u_s[q] = panel.u[q * n + s];
      v_s[q] = panel.v[q * n + s];
    }
    __syncthreads();
    if (tid == 0) {
      panel.picked[k] = s;
      panel.losses[k] = losses[0];
    }
    eliminate(panel, k, s, pivot, energy, u_s, v_s);
    // alive[s] is read by the owner of column s alone, and by give_up behind a barrier.
    if (tid == s % kThreads) panel.alive[s] = 0;
    __syncthreads();
  }
}

}  // namespace

template <class T>
void prune_panel_cuda(const Panel<T>& first, std::int64_t batch, int device, void* stream) {
  launch("prune_panel", prune_panel_kernel<T>, static_cast<unsigned>(batch), kThreads, device,
         stream, first);
}

template void prune_panel_cuda<float>(const Panel<float>&, std::int64_t, int, void*);
template void prune_panel_cuda<double>(const Panel<double>&, std::int64_t, int, void*);

}  // namespace mosaic
