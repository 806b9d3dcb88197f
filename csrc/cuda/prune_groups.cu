// The panel of the greedy elimination for groups of several columns, such as attention heads.
//
// A group is removed column by column, which is the same removal: with u = A_p: / sqrt(A_pp) and
// v = G_p: / sqrt(A_pp) - G_pp / (2 A_pp) u for each column p in turn, A -= u^T u and
// G -= u^T v + v^T u end where the formulas of cpu/prune.cpp end, and the ratios G_pp / A_pp met
// on the way add up to trace(A_SS^-1 G_SS). So one routine, run inside the blocks A_SS and G_SS of
// every group that is left, gives the losses; run once more for the chosen group it leaves the
// entries of u and v at the group's own columns, which is all that the rows of U and V need.
//
// One thread block owns a layer. Its threads are split into teams that look at groups side by
// side: as many as there are groups, at most one a warp, and as many as their scratch (both
// blocks, 21 KB for a head of 72 in float32) fits into shared memory: 8 teams of 64 threads on
// sm_90, 4 of 128 on a chip with 99 KiB. Small groups are thus served by a warp each, whose
// barriers are nearly free; one group at a time by the whole block would leave most threads idle.
// A group too large for shared memory is worked on by the whole block in global memory.
//
// By counting, not measured: a head of 72 of 1152 columns takes some 0.4 ms to remove (losses of
// 16 heads 0.05, rows of U and V 0.1, blocks 0.2), whatever the number of layers up to one for each
// multiprocessor; torch's operators would take 30 launches and a batched factorisation. With 5
// heads removed of each layer a cluster of blocks could save 1 to 2 ms in all, and is left out.
#ifdef MOSAIC_HOST
#include "host/cuda_host.h"
#else
#include <cuda_runtime.h>

#include "cuda/launch.h"
#endif

#include "cuda/choice.h"
#include "cuda/prune_groups.h"

namespace mosaic {
namespace {

#ifdef MOSAIC_HOST  // real threads on the host: enough for several teams of several threads
constexpr int kThreads = 16, kLanes = 2, kMaxTeams = 4;
constexpr std::size_t kStaticShared = 0;
#else
constexpr int kThreads = 512, kLanes = 8, kMaxTeams = 16;
constexpr std::size_t kStaticShared = 1024;  // room for what the kernel declares itself
#endif
constexpr int kRows = 4;  // rows of U and V that a thread holds in registers

template <class T>
struct Groups {
  Panel<T> panel;
  T* workspace;
  GroupsPlan plan;
};

struct Team {
  int index, rank, size;

  __device__ void sync() const { team_sync(index, size); }
};

// The lower triangles of a group's A_SS and G_SS, the one below and the other above the diagonal
// of one square. The leading dimension is odd: a column meets every bank of shared memory.
template <class T>
struct Square {
  T* data;
  int width, ld;

  __device__ T& inverse(int i, int j) const { return data[(i + 1) * ld + j]; }  // j <= i
  __device__ T& gram(int i, int j) const { return data[j * ld + i]; }           // j <= i
};

// Removes the columns of a group from its own blocks, in order. Returns the sum of the losses,
// not a number where a column of A_SS is not positive; afterwards (i, k) with k < i holds u and v
// of column k at column i, and (k, k) the ones of A and G that column k was removed with.
template <class T>
__device__ T eliminate_group(const Panel<T>& panel, std::int64_t group, const Square<T>& square,
                             const Team& team) {
  const int g = square.width;
  const T* inverse_block = panel.inverse_blocks + group * g * g;
  const T* gram_block = panel.gram_blocks + group * g * g;
  for (int e = team.rank; e < g * g; e += team.size) {
    const int i = e / g, j = e % g;
    if (j > i) continue;
    square.inverse(i, j) = inverse_block[e];
    square.gram(i, j) = gram_block[e];
  }
  team.sync();
  const int lane = team.rank % kLanes, first = team.rank / kLanes, step = team.size / kLanes;
  T total = 0;
  for (int k = 0; k < g; ++k) {
    const T pivot = square.inverse(k, k), energy = square.gram(k, k);
    if (!(pivot > T(0)) || !(pivot - pivot == T(0))) {  // all of the team have read the same pivot
      team.sync();  // they have indeed: the square may be filled again
      return T(0) / T(0);
    }
    total += energy / pivot;
    const T scale = T(1) / sqrt(pivot), half_curvature = energy / (T(2) * pivot);
    for (int i = k + 1 + team.rank; i < g; i += team.size) {
      const T u = square.inverse(i, k) * scale;
      square.inverse(i, k) = u;
      square.gram(i, k) = square.gram(i, k) * scale - half_curvature * u;
    }
    team.sync();
    for (int i = k + 1 + first; i < g; i += step) {
      const T u = square.inverse(i, k), v = square.gram(i, k);
      for (int j = k + 1 + lane; j <= i; j += kLanes) {
        const T u_j = square.inverse(j, k), v_j = square.gram(j, k);
        square.inverse(i, j) -= u * u_j;
        square.gram(i, j) -= u * v_j + v * u_j;
      }
    }
    team.sync();
  }
  return total;
}

template <class T>
__device__ Best<T> best_of_team(const Panel<T>& panel, const Square<T>& square, const Team& team,
                                int teams) {
  Best<T> best{T(0), -1};
  const std::int64_t groups = panel.n / panel.group_size;
  for (std::int64_t group = team.index; group < groups; group += teams) {
    if (!panel.alive[group]) continue;
    const T loss = eliminate_group(panel, group, square, team);
    const Best<T> candidate{loss_or_broken(loss, true), group};
    if (better(candidate, best)) best = candidate;
  }
  return best;
}

// Column c of rows [first, first + kRows) of the chosen group's U and V.
template <class T>
__device__ void column_of_rows(const Panel<T>& panel, const Square<T>& square, std::int64_t done,
                               std::int64_t s, int first, std::int64_t c) {
  const std::int64_t n = panel.n;
  const int g = square.width;
  int row[kRows];  // past the end: the last row once more, which is not written
  T u[kRows], v[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    row[i] = first + i < g ? first + i : g - 1;
    const std::int64_t r = s + row[i], stored = c < s ? r * n + c : c * n + r;
    u[i] = panel.inverse[stored];
    v[i] = panel.gram[stored];
  }
#pragma unroll 1  // the registers are full
  for (std::int64_t q = 0; q < done; ++q) {  // groups removed earlier in this panel
    const T* u_row = panel.u + q * n;
    const T* v_row = panel.v + q * n;
    const T u_old = u_row[c], v_old = v_row[c];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const T u_s = u_row[s + row[i]], v_s = v_row[s + row[i]];
      u[i] -= u_s * u_old;
      v[i] -= u_s * v_old + v_s * u_old;
    }
  }
#pragma unroll 1
  for (int q = 0; q < first; ++q) {  // earlier columns of this group
    const T u_old = panel.u[(done + q) * n + c], v_old = panel.v[(done + q) * n + c];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const T u_s = square.inverse(row[i], q), v_s = square.gram(row[i], q);
      u[i] -= u_s * u_old;
      v[i] -= u_s * v_old + v_s * u_old;
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const T pivot = square.inverse(row[i], row[i]), energy = square.gram(row[i], row[i]);
    u[i] *= T(1) / sqrt(pivot);
    v[i] = v[i] * (T(1) / sqrt(pivot)) - energy / (T(2) * pivot) * u[i];
#pragma unroll
    for (int l = i + 1; l < kRows; ++l) {
      const T u_s = square.inverse(row[l], row[i]), v_s = square.gram(row[l], row[i]);
      u[l] -= u_s * u[i];
      v[l] -= u_s * v[i] + v_s * u[i];
    }
    if (first + i < g) {
      panel.u[(done + row[i]) * n + c] = u[i];
      panel.v[(done + row[i]) * n + c] = v[i];
    }
  }
}

// The new rows of U and V: each thread its columns, so that no barrier is needed. Columns of
// removed groups are zero.
template <class T>
__device__ void new_rows(const Panel<T>& panel, const Square<T>& square, std::int64_t done,
                         std::int64_t chosen) {
  const int g = square.width;
  for (std::int64_t c = threadIdx.x; c < panel.n; c += kThreads) {
    if (!panel.alive[c / g]) {
      for (std::int64_t r = done; r < done + g; ++r) {
        panel.u[r * panel.n + c] = panel.v[r * panel.n + c] = T(0);
      }
      continue;
    }
    for (int first = 0; first < g; first += kRows) {
      column_of_rows(panel, square, done, chosen * g, first, c);
    }
  }
}

// Takes the new rows out of the diagonal blocks of the groups that are left: a thread computes
// kRows entries of a column of the lower triangle, and writes the mirrored ones too.
template <class T>
__device__ void update_blocks(const Panel<T>& panel, std::int64_t done) {
  const std::int64_t n = panel.n, g = panel.group_size, chunks = (g + kRows - 1) / kRows;
  for (std::int64_t e = threadIdx.x; e < n * chunks; e += kThreads) {
    const std::int64_t group = e / (g * chunks), j = e % g, first = e / g % chunks * kRows;
    if (!panel.alive[group] || j >= first + kRows) continue;
    T inverse[kRows], gram[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) inverse[i] = gram[i] = T(0);
    const std::int64_t last = g - 1 - first;  // the last row of the chunk that there is
#pragma unroll 1  // the registers are full
    for (std::int64_t r = done; r < done + g; ++r) {
      const T* u_row = panel.u + r * n + group * g;
      const T* v_row = panel.v + r * n + group * g;
      const T u_j = u_row[j], v_j = v_row[j];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const std::int64_t row = first + (i < last ? i : last);
        inverse[i] += u_row[row] * u_j;
        gram[i] += u_row[row] * v_j + v_row[row] * u_j;
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t row = first + i;
      if (row >= g || row < j) continue;
      const std::int64_t here = (group * g + row) * g + j, there = (group * g + j) * g + row;
      panel.inverse_blocks[there] = panel.inverse_blocks[here] -= inverse[i];
      panel.gram_blocks[there] = panel.gram_blocks[here] -= gram[i];
    }
  }
}

template <class T, bool kShared>
__global__ void __launch_bounds__(kThreads, 1) prune_groups_kernel(Groups<T> groups) {
  __shared__ T losses[kMaxTeams];
  __shared__ std::int64_t candidates[kMaxTeams];
  const Panel<T> panel = panel_of_layer(groups.panel, blockIdx.x);
  const int g = static_cast<int>(panel.group_size), tid = static_cast<int>(threadIdx.x);
  const int teams = groups.plan.teams, size = kThreads / teams;
  const Team team{tid / size, tid % size, size}, all{0, tid, kThreads};
  T* scratch;
  if (kShared) {
    scratch = dynamic_shared<T>();
  } else {
    scratch = groups.workspace + blockIdx.x * groups.plan.workspace;
  }
  const Square<T> whole{scratch, g, g | 1};
  const Square<T> mine{scratch + team.index * groups.plan.square, g, g | 1};

  for (std::int64_t k = 0; k < panel.pivots; ++k) {
    const Best<T> candidate = best_of_team(panel, mine, team, teams);
    if (team.rank == 0) {
      losses[team.index] = candidate.loss;
      candidates[team.index] = candidate.group;
    }
    __syncthreads();
    Best<T> best{T(0), -1};
    for (int i = 0; i < teams; ++i) {
      const Best<T> other{losses[i], candidates[i]};
      if (better(other, best)) best = other;
    }
    if (best.loss < T(0)) {
      give_up(panel, k, kThreads);
      return;
    }
    if (tid == 0) {  // the barriers of eliminate_group show it to the others
      panel.alive[best.group] = 0;
      panel.picked[k] = best.group;
      panel.losses[k] = best.loss;
    }
    eliminate_group(panel, best.group, whole, all);
    new_rows(panel, whole, k * g, best.group);
    __syncthreads();
    update_blocks(panel, k * g);
    __syncthreads();
  }
}

}  // namespace

GroupsPlan plan_groups(std::int64_t groups, std::int64_t group_size, std::int64_t element_bytes,
                       int device) {
  const std::int64_t square = (group_size + 1) * (group_size | 1);
  const auto limit =
      static_cast<std::int64_t>(shared_limit("prune_groups", device) - kStaticShared);
  GroupsPlan plan{1, square, 0};
  if (square * element_bytes > limit) {
    plan.workspace = square;
    return plan;
  }
  while (plan.teams < kMaxTeams && plan.teams < groups &&
         2 * plan.teams * square * element_bytes <= limit) {
    plan.teams *= 2;
  }
  return plan;
}

template <class T>
void prune_groups_cuda(const Panel<T>& first, T* workspace, std::int64_t batch, int device,
                       void* stream) {
  const Groups<T> groups{first, workspace,
                         plan_groups(first.n / first.group_size, first.group_size, sizeof(T),
                                     device)};
  const auto blocks = static_cast<unsigned>(batch);
  if (groups.plan.workspace > 0) {
    launch("prune_groups", prune_groups_kernel<T, false>, blocks, kThreads, device, stream, groups);
  } else {
    launch("prune_groups", prune_groups_kernel<T, true>, blocks, kThreads, device, stream, groups,
           groups.plan.teams * groups.plan.square * sizeof(T));
  }
}

template void prune_groups_cuda<float>(const Panel<float>&, float*, std::int64_t, int, void*);
template void prune_groups_cuda<double>(const Panel<double>&, double*, std::int64_t, int, void*);

}  // namespace mosaic
