// The panel of the greedy elimination for groups of one column; see cpu/prune.cpp for the
// formulas, and prune_groups.cu for wider groups. One thread block owns a layer for the whole
// panel: a removal is a minimum over the columns, a tree of barriers and one pass over U and V.
//
// Why one block a layer, and no cluster: a removal late in a panel of 64 reads 2 * 64 * n floats,
// on average half of that. By the data sheet (not measured): at n = 4608 that is 1.2 MB, which one
// multiprocessor draws from L2 in about 11 us (64 bytes a clock, 1.7 GHz); 84 layers on 132
// multiprocessors keep 200 MB of U and V, four times the L2, so that they are bound by memory
// instead, 100 MB a removal, about 22 us. 30% of 4608 columns are 1382 removals: 15 to 30 ms for
// all layers together, beside several hundred ms of matrix products. For a batch of 1 to 4 layers
// a cluster of 4 blocks would bring a removal to about 4 us (a quarter of the columns each, plus a
// cluster barrier), 10 ms saved of some 40 a layer: not worth a second path that only a GPU can
// test.
#ifdef MOSAIC_HOST
#include "host/cuda_host.h"
#else
#include <cuda_runtime.h>

#include "cuda/launch.h"
#endif

#include "cuda/prune.h"

#include "cuda/choice.h"

namespace mosaic {
namespace {

#ifdef MOSAIC_HOST
constexpr int kThreads = 32;  // real threads on the host: enough for every path
#else
constexpr int kThreads = 512;
#endif

template <class T>
__device__ Best<T> best_of_thread(const Panel<T>& panel) {
  Best<T> best{T(0), -1};
  for (std::int64_t c = threadIdx.x; c < panel.n; c += kThreads) {
    if (!panel.alive[c]) continue;
    const T pivot = panel.inverse_blocks[c], energy = panel.gram_blocks[c];
    const Best<T> candidate{loss_or_broken(energy / pivot, pivot > T(0)), c};
    if (better(candidate, best)) best = candidate;
  }
  return best;
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
__global__ void __launch_bounds__(kThreads, 1) prune_panel_kernel(Panel<T> first) {
  __shared__ T losses[kThreads];
  __shared__ std::int64_t columns[kThreads];
  __shared__ T u_s[kMaxCudaPivots], v_s[kMaxCudaPivots];
  const Panel<T> panel = panel_of_layer(first, blockIdx.x);
  const std::int64_t n = panel.n, tid = threadIdx.x;

  for (std::int64_t k = 0; k < panel.pivots; ++k) {
    const Best<T> mine = best_of_thread(panel);
    losses[tid] = mine.loss;
    columns[tid] = mine.group;
    __syncthreads();
    for (int width = kThreads / 2; width > 0; width /= 2) {
      if (tid < width) {
        const Best<T> here{losses[tid], columns[tid]};
        const Best<T> there{losses[tid + width], columns[tid + width]};
        if (better(there, here)) {
          losses[tid] = there.loss;
          columns[tid] = there.group;
        }
      }
      __syncthreads();
    }
    if (losses[0] < T(0)) {
      give_up(panel, k, kThreads);
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
