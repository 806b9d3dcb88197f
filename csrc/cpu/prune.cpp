// The sequential panel of the greedy elimination. One removal of the group S, with
// L = chol(A_SS):
//
//     U = L^-1 A_S:      V = L^-1 G_S: - 1/2 (L^-1 G_SS L^-T) U
//     A -= U^T U         G -= U^T V + V^T U         loss(S) = trace(A_SS^-1 G_SS)
//
// A and G stay as they were when the panel began: row S of the current matrices is the stored
// row minus the contribution of the panel so far. Only the diagonal blocks, which the losses
// need, are kept current. The caller applies the whole panel with two matrix products.
#include "prune.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "small_cholesky.h"

namespace mosaic {
namespace {

constexpr std::int64_t kTileColumns = 256;  // a tile of U and V of 64 rows is 128 KiB of floats

// The best group of one thread's columns, with copies of its diagonal blocks: others read the
// copies while the owner goes on.
template <class T>
struct Candidate {
  T loss = std::numeric_limits<T>::infinity();
  std::int64_t group = -1;
  bool broken = false;
  std::vector<T> inverse_block, gram_block;
};

// The removal in progress, private to a thread.
template <class T>
struct Pivot {
  std::int64_t group = 0;
  std::int64_t done = 0;               // rows of U and V that are already there
  std::vector<T> factor;               // L, lower
  std::vector<T> half_curvature;       // 1/2 L^-1 G_SS L^-T
  std::vector<T> u_factors, v_factors;  // (done, group_size): columns S of U and V
  std::vector<T> scratch;              // 3 * group_size^2
};

// trace(A_SS^-1 G_SS) = sum over the rows x of L^-1 of x G_SS x^T. Not a number where L does
// not exist. scratch holds group_size^2 + group_size elements.
template <class T>
MOSAIC_INLINE T group_loss(const T* inverse_block, const T* gram_block, std::int64_t width,
                           T* scratch) {
  if (width == 1) {
    const T pivot = inverse_block[0];
    if (!(pivot > T(0)) || !std::isfinite(pivot)) return std::numeric_limits<T>::quiet_NaN();
    return std::max(gram_block[0], T(0)) / pivot;
  }
  T* factor = scratch;
  std::memcpy(factor, inverse_block, sizeof(T) * width * width);
  if (!cholesky_lower(factor, width, width)) return std::numeric_limits<T>::quiet_NaN();
  invert_lower(factor, width, width, scratch + width * width);
  T total = 0;
  for (std::int64_t r = 0; r < width; ++r) {
    const T* x = factor + r * width;
    for (std::int64_t i = 0; i <= r; ++i) {
      const T* row = gram_block + i * width;
      T dot = 0;
#pragma omp simd reduction(+ : dot)
      for (std::int64_t j = 0; j <= r; ++j) dot += row[j] * x[j];
      total += x[i] * dot;
    }
  }
  return std::max(total, T(0));
}

template <class T>
MOSAIC_INLINE void choose_impl(const Panel<T>& panel, std::int64_t begin, std::int64_t end,
                               Candidate<T>& best, T* scratch) {
  const std::int64_t area = panel.group_size * panel.group_size;
  best.loss = std::numeric_limits<T>::infinity();
  best.group = -1;
  for (std::int64_t j = begin; j < end; ++j) {
    if (!panel.alive[j]) continue;
    const T loss = group_loss(panel.inverse_blocks + j * area, panel.gram_blocks + j * area,
                              panel.group_size, scratch);
    if (!(loss <= std::numeric_limits<T>::max())) best.broken = true;
    if (best.group < 0 || loss < best.loss) {
      best.loss = loss;
      best.group = j;
    }
  }
  if (best.group < 0) return;
  const T* inverse_block = panel.inverse_blocks + best.group * area;
  const T* gram_block = panel.gram_blocks + best.group * area;
  std::copy(inverse_block, inverse_block + area, best.inverse_block.begin());
  std::copy(gram_block, gram_block + area, best.gram_block.begin());
}

// Fills the pivot from the chosen group: L, half the curvature and columns S of the panel.
template <class T>
MOSAIC_INLINE void prepare_impl(const Panel<T>& panel, const Candidate<T>& chosen,
                                Pivot<T>& pivot) {
  const std::int64_t g = panel.group_size;
  pivot.group = chosen.group;
  T* inverse_factor = pivot.scratch.data();
  T* product = inverse_factor + g * g;
  std::copy(chosen.inverse_block.begin(), chosen.inverse_block.end(), pivot.factor.begin());
  cholesky_lower(pivot.factor.data(), g, g);  // it exists: the loss of the group was finite
  std::copy(pivot.factor.begin(), pivot.factor.end(), inverse_factor);
  invert_lower(inverse_factor, g, g, product);
  for (std::int64_t i = 0; i < g; ++i) {  // product = L^-1 G_SS
    for (std::int64_t j = 0; j < g; ++j) product[i * g + j] = 0;
    for (std::int64_t k = 0; k <= i; ++k) {
      const T x = inverse_factor[i * g + k];
      const T* row = chosen.gram_block.data() + k * g;
      for (std::int64_t j = 0; j < g; ++j) product[i * g + j] += x * row[j];
    }
  }
  for (std::int64_t i = 0; i < g; ++i) {
    for (std::int64_t j = 0; j < g; ++j) {
      T dot = 0;
      for (std::int64_t k = 0; k <= j; ++k) dot += product[i * g + k] * inverse_factor[j * g + k];
      pivot.half_curvature[i * g + j] = dot / T(2);
    }
  }
  const std::int64_t column = pivot.group * g;
  for (std::int64_t q = 0; q < pivot.done; ++q) {
    for (std::int64_t r = 0; r < g; ++r) {
      pivot.u_factors[q * g + r] = panel.u[q * panel.n + column + r];
      pivot.v_factors[q * g + r] = panel.v[q * panel.n + column + r];
    }
  }
}

// Columns [begin, end) of rows S of the stored A and G, read from their lower triangles.
template <class T>
MOSAIC_INLINE void load_rows(const Panel<T>& panel, const T* matrix, std::int64_t row,
                             std::int64_t begin, std::int64_t end, T* out) {
  const std::int64_t g = panel.group_size, n = panel.n;
  const std::int64_t left_end = std::min(end, row);
  for (std::int64_t r = 0; r < g; ++r) {
    for (std::int64_t c = begin; c < left_end; ++c) out[r * n + c] = matrix[(row + r) * n + c];
  }
  for (std::int64_t c = std::max(begin, row); c < end; ++c) {
    for (std::int64_t r = 0; r < g; ++r) out[r * n + c] = matrix[c * n + row + r];
  }
}

// Columns [begin, end) of the new rows of U and V, and the diagonal blocks they touch.
template <class T>
MOSAIC_INLINE void eliminate_tile(const Panel<T>& panel, const Pivot<T>& pivot,
                                  std::int64_t begin, std::int64_t end) {
  const std::int64_t g = panel.group_size, n = panel.n, done = pivot.done;
  T* u = panel.u + done * n;
  T* v = panel.v + done * n;
  load_rows(panel, panel.inverse, pivot.group * g, begin, end, u);
  load_rows(panel, panel.gram, pivot.group * g, begin, end, v);
  for (std::int64_t r = 0; r < g; ++r) {
    T* u_row = u + r * n;
    T* v_row = v + r * n;
    for (std::int64_t q = 0; q < done; ++q) {
      const T uf = pivot.u_factors[q * g + r], vf = pivot.v_factors[q * g + r];
      const T* u_old = panel.u + q * n;
      const T* v_old = panel.v + q * n;
#pragma omp simd
      for (std::int64_t c = begin; c < end; ++c) {
        u_row[c] -= uf * u_old[c];
        v_row[c] -= uf * v_old[c] + vf * u_old[c];
      }
    }
  }
  for (std::int64_t r = 0; r < g; ++r) {  // U = L^-1 rows of A, V = L^-1 rows of G
    T* u_row = u + r * n;
    T* v_row = v + r * n;
    for (std::int64_t s = 0; s < r; ++s) {
      const T x = pivot.factor[r * g + s];
#pragma omp simd
      for (std::int64_t c = begin; c < end; ++c) {
        u_row[c] -= x * u[s * n + c];
        v_row[c] -= x * v[s * n + c];
      }
    }
    const T reciprocal = T(1) / pivot.factor[r * g + r];
#pragma omp simd
    for (std::int64_t c = begin; c < end; ++c) {
      u_row[c] *= reciprocal;
      v_row[c] *= reciprocal;
    }
  }
  for (std::int64_t r = 0; r < g; ++r) {
    for (std::int64_t s = 0; s < g; ++s) {
      const T x = pivot.half_curvature[r * g + s];
#pragma omp simd
      for (std::int64_t c = begin; c < end; ++c) v[r * n + c] -= x * u[s * n + c];
    }
  }
}

// Takes the new rows of U and V out of the diagonal blocks of the columns [begin, end). The
// columns of removed groups are set to zero, so that they take no part in the panel's product.
template <class T>
MOSAIC_INLINE void update_blocks(const Panel<T>& panel, const Pivot<T>& pivot,
                                 std::int64_t begin, std::int64_t end) {
  const std::int64_t g = panel.group_size, n = panel.n;
  T* u = panel.u + pivot.done * n;
  T* v = panel.v + pivot.done * n;
  for (std::int64_t j = begin / g; j < end / g; ++j) {
    if (!panel.alive[j] || j == pivot.group) {
      for (std::int64_t r = 0; r < g; ++r) {
        std::fill(u + r * n + j * g, u + r * n + (j + 1) * g, T(0));
        std::fill(v + r * n + j * g, v + r * n + (j + 1) * g, T(0));
      }
      continue;
    }
    T* inverse_block = panel.inverse_blocks + j * g * g;
    T* gram_block = panel.gram_blocks + j * g * g;
    for (std::int64_t r = 0; r < g; ++r) {
      const T* u_row = u + r * n + j * g;
      const T* v_row = v + r * n + j * g;
      for (std::int64_t i = 0; i < g; ++i) {
        const T ui = u_row[i], vi = v_row[i];
        for (std::int64_t k = 0; k < g; ++k) {
          inverse_block[i * g + k] -= ui * u_row[k];
          gram_block[i * g + k] -= ui * v_row[k] + vi * u_row[k];
        }
      }
    }
  }
}

template <class T>
MOSAIC_INLINE void eliminate_impl(const Panel<T>& panel, const Pivot<T>& pivot,
                                  std::int64_t begin, std::int64_t end) {
  const std::int64_t g = panel.group_size;
  const std::int64_t tile = std::max<std::int64_t>(1, kTileColumns / g) * g;
  for (std::int64_t c = begin; c < end; c += tile) {
    eliminate_tile(panel, pivot, c, std::min(end, c + tile));
    update_blocks(panel, pivot, c, std::min(end, c + tile));
  }
}

#define MOSAIC_PANEL_STEPS(T)                                                                   \
  MOSAIC_CLONES void choose(const Panel<T>& panel, std::int64_t begin, std::int64_t end,        \
                            Candidate<T>& best, T* scratch) {                                   \
    choose_impl(panel, begin, end, best, scratch);                                              \
  }                                                                                             \
  MOSAIC_CLONES void prepare(const Panel<T>& panel, const Candidate<T>& chosen,                 \
                             Pivot<T>& pivot) {                                                 \
    prepare_impl(panel, chosen, pivot);                                                         \
  }                                                                                             \
  MOSAIC_CLONES void eliminate(const Panel<T>& panel, const Pivot<T>& pivot,                    \
                               std::int64_t begin, std::int64_t end) {                          \
    eliminate_impl(panel, pivot, begin, end);                                                   \
  }

MOSAIC_PANEL_STEPS(float)
MOSAIC_PANEL_STEPS(double)

// After a breakdown the rest of the panel is filled with valid indices and not-a-number
// losses: the caller goes on with the other matrices of the batch and then reports this one.
template <class T>
void give_up(const Panel<T>& panel, std::int64_t first) {
  std::int64_t group = 0;
  for (std::int64_t k = first; k < panel.pivots; ++k) {
    while (!panel.alive[group]) ++group;
    panel.alive[group] = 0;
    panel.picked[k] = group;
    panel.losses[k] = std::numeric_limits<T>::quiet_NaN();
  }
  const std::int64_t from = first * panel.group_size * panel.n;
  const std::int64_t to = panel.pivots * panel.group_size * panel.n;
  std::fill(panel.u + from, panel.u + to, T(0));
  std::fill(panel.v + from, panel.v + to, T(0));
}

// Two sets of candidates, used in turn: one barrier a removal is then enough, since nobody can
// be two removals ahead.
template <class T>
using Candidates = std::vector<Candidate<T>>;

template <class T>
void run_thread(const Panel<T>& panel, Candidates<T>* sets, Pivot<T>& pivot, int thread,
                int team) {
  const std::int64_t g = panel.group_size, groups = panel.n / g;
  const std::int64_t begin = groups * thread / team, end = groups * (thread + 1) / team;
  for (std::int64_t k = 0; k < panel.pivots; ++k) {
    Candidates<T>& set = sets[k % 2];
    choose(panel, begin, end, set[thread], pivot.scratch.data());
#pragma omp barrier
    const Candidate<T>* best = nullptr;
    bool broken = false;
    for (const Candidate<T>& candidate : set) {
      broken = broken || candidate.broken;
      if (candidate.group < 0) continue;
      if (best == nullptr || candidate.loss < best->loss) best = &candidate;
    }
    if (broken) {
#pragma omp barrier
      if (thread == 0) give_up(panel, k);
      return;
    }
    pivot.done = k * g;
    prepare(panel, *best, pivot);
    eliminate(panel, pivot, begin * g, end * g);
    if (begin <= best->group && best->group < end) {
      panel.alive[best->group] = 0;
      panel.picked[k] = best->group;
      panel.losses[k] = best->loss;
    }
  }
}

template <class T>
void run_matrix(const Panel<T>& panel, int team) {
  const std::int64_t g = panel.group_size;
  Candidate<T> candidate;
  candidate.inverse_block.resize(g * g);
  candidate.gram_block.resize(g * g);
  Candidates<T> sets[2] = {Candidates<T>(team, candidate), Candidates<T>(team, candidate)};
  Pivot<T> pivot;
  pivot.factor.resize(g * g);
  pivot.half_curvature.resize(g * g);
  pivot.u_factors.resize(panel.pivots * g * g);
  pivot.v_factors.resize(panel.pivots * g * g);
  pivot.scratch.resize(2 * g * g + g);
  std::vector<Pivot<T>> pivots(team, pivot);
#ifdef _OPENMP
#pragma omp parallel num_threads(team)
  run_thread(panel, sets, pivots[omp_get_thread_num()], omp_get_thread_num(),
             omp_get_num_threads());
#else
  run_thread(panel, sets, pivots[0], 0, 1);
#endif
}

}  // namespace

template <class T>
void prune_panel(const Panel<T>& first, std::int64_t batch, int threads) {
  const std::int64_t n = first.n, g = first.group_size, groups = n / g, rows = first.pivots * g;
  const auto entry = [&](std::int64_t b) {
    return Panel<T>{first.inverse + b * n * n,          first.gram + b * n * n,
                    first.inverse_blocks + b * n * g,   first.gram_blocks + b * n * g,
                    first.alive + b * groups,           first.u + b * rows * n,
                    first.v + b * rows * n,             first.picked + b * first.pivots,
                    first.losses + b * first.pivots,    n,
                    g,                                  first.pivots};
  };
  if (batch > 1) {  // a matrix per thread: no barriers
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (std::int64_t b = 0; b < batch; ++b) run_matrix(entry(b), 1);
    return;
  }
  run_matrix(entry(0), static_cast<int>(std::min<std::int64_t>(threads, groups)));
}

template <class T>
void pack_lower(const T* from, T* to, std::int64_t batch, std::int64_t n, const std::int64_t* kept,
                std::int64_t count) {
  // In order: at the same address no element moves to a place that has yet to be read.
  for (std::int64_t b = 0; b < batch; ++b, kept += count) {
    for (std::int64_t i = 0; i < count; ++i) {
      const T* row = from + (b * n + kept[i]) * n;
      T* out = to + (b * count + i) * count;
      for (std::int64_t j = 0; j <= i; ++j) out[j] = row[kept[j]];
    }
  }
}

template void pack_lower<float>(const float*, float*, std::int64_t, std::int64_t,
                                const std::int64_t*, std::int64_t);
template void pack_lower<double>(const double*, double*, std::int64_t, std::int64_t,
                                 const std::int64_t*, std::int64_t);
template void prune_panel<float>(const Panel<float>&, std::int64_t, int);
template void prune_panel<double>(const Panel<double>&, std::int64_t, int);

}  // namespace mosaic
