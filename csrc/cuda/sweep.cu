// The walk through a block of columns; see cpu/sweep.cpp for the formulas. One thread owns a row:
// it keeps a few columns in registers, which take in all errors to their left (16 multiply-adds
// for each error that is loaded, U from shared memory) and are then walked. Rows need nothing of
// each other, so there are barriers for the pieces of U alone, and blocks of any width are served.
// A layer gives m threads, which fills a GPU only in a batch; but the walk is width / n of the
// products around it, and those are what a sweep costs.
#ifdef MOSAIC_HOST
#include "host/cuda_host.h"
#else
#include <cuda_runtime.h>

#include "cuda/launch.h"
#endif

#include "cuda/sweep.h"

namespace mosaic {
namespace {

#ifdef MOSAIC_HOST
constexpr int kThreads = 8;  // real threads on the host: enough for every path
#else
constexpr int kThreads = 64;
#endif
constexpr int kPieceRows = 64;  // rows of U in shared memory: 4 KiB
template <class T>
constexpr int kColumns = 64 / sizeof(T);  // columns of a row in registers; 16 doubles spill

// A piece of U, shared by the threads: rows of the block by kColumns of its columns.
template <class T>
using Piece = T[kPieceRows][kColumns<T>];

// The columns of one thread's row. Rows beyond m take part in the barriers alone.
template <class T>
struct Row {
  T columns[kColumns<T>];
  T* errors;  // (width, m) from this row's first entry on
  std::int64_t stride;
  bool active;
};

// Fills `count` rows of the piece from row `from` and column `first` of the block on.
template <class T>
__device__ void load_piece(const SweepBlock<T>& block, Piece<T>& piece, std::int64_t from,
                           std::int64_t count, std::int64_t first) {
  __syncthreads();  // a slower thread may still be reading the piece before
  for (std::int64_t i = threadIdx.x; i < count * kColumns<T>; i += kThreads) {
    const std::int64_t r = i / kColumns<T>, c = i % kColumns<T>;
    const std::int64_t row = block.begin + from + r, column = block.begin + first + c;
    piece[r][c] = first + c < block.width ? block.factor[row * block.n + column] : T(0);
  }
  __syncthreads();
}

// Columns from `first` to at most `end` into registers, less the errors of [from, to). `source`
// holds the columns, `stride` apart.
template <class T>
__device__ void catch_up(const SweepBlock<T>& block, Piece<T>& piece, Row<T>& row, const T* source,
                         std::int64_t stride, std::int64_t from, std::int64_t to,
                         std::int64_t first, std::int64_t end) {
#pragma unroll
  for (int i = 0; i < kColumns<T>; ++i) {
    row.columns[i] = row.active && first + i < end ? source[(first + i) * stride] : T(0);
  }
  for (std::int64_t begin = from; begin < to; begin += kPieceRows) {
    const std::int64_t count = to - begin < kPieceRows ? to - begin : kPieceRows;
    load_piece(block, piece, begin, count, first);
    if (!row.active) continue;
#pragma unroll 4
    for (std::int64_t r = 0; r < count; ++r) {
      const T error = row.errors[(begin + r) * row.stride];
#pragma unroll
      for (int i = 0; i < kColumns<T>; ++i) row.columns[i] -= error * piece[r][i];
    }
  }
}

// Puts the columns [begin, end), less the errors of [from, to), where their errors will be.
template <class T>
__device__ void advance(const SweepBlock<T>& block, Piece<T>& piece, Row<T>& row, const T* source,
                        std::int64_t stride, std::int64_t from, std::int64_t to,
                        std::int64_t begin, std::int64_t end) {
  for (std::int64_t first = begin; first < end; first += kColumns<T>) {
    catch_up(block, piece, row, source, stride, from, to, first, end);
#pragma unroll
    for (int i = 0; i < kColumns<T>; ++i) {
      if (row.active && first + i < end) row.errors[(first + i) * row.stride] = row.columns[i];
    }
  }
}

template <class T>
__device__ T magnitude(T value) {
  return value < T(0) ? -value : value;
}

// The mask of one N:M group. The errors of its columns still hold the current weights.
template <class T>
__device__ void choose_group(const SweepBlock<T>& block, const Row<T>& row, std::uint8_t* mask,
                             std::int64_t first) {
  const T* diagonal = block.factor + (block.begin + first) * (block.n + 1);
  const T* weight = row.errors + first * row.stride;
  for (std::int64_t c = 0; c < block.of; ++c) {
    const T score = magnitude(weight[c * row.stride]) / diagonal[c * (block.n + 1)];
    std::int64_t before = 0;  // how many go before this one
    for (std::int64_t d = 0; d < block.of; ++d) {
      const T other = magnitude(weight[d * row.stride]) / diagonal[d * (block.n + 1)];
      before += other < score || (other == score && d < c);
    }
    mask[first + c] = before >= block.of - block.keep;
  }
}

// Walks up to kColumns columns that have taken in everything to their left; returns their loss.
template <class T>
__device__ T walk_columns(Row<T>& row, const Piece<T>& piece, T* weight, const std::uint8_t* mask,
                          std::int64_t first, std::int64_t count) {
  T loss = 0;
#pragma unroll
  for (int i = 0; i < kColumns<T>; ++i) {
    if (i < count) {
      const bool kept = mask[first + i] != 0;
      const T error = kept ? T(0) : row.columns[i] / piece[i][i];
      weight[first + i] = kept ? row.columns[i] : T(0);
      row.errors[(first + i) * row.stride] = error;
      loss += error * error;
#pragma unroll
      for (int k = i + 1; k < kColumns<T>; ++k) row.columns[k] -= error * piece[i][k];
    }
  }
  return loss;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) sweep_block_kernel(SweepBlock<T> block) {
  alignas(16) __shared__ T piece[kPieceRows][kColumns<T>];
  const std::int64_t tiles = (block.m + kThreads - 1) / kThreads;
  const std::int64_t b = blockIdx.x / tiles, n = block.n, width = block.width;
  const std::int64_t index = blockIdx.x % tiles * kThreads + threadIdx.x;
  block.factor += b * n * n;
  T* weight = block.weight + (b * block.m + index) * n + block.begin;
  std::uint8_t* mask = block.mask + (b * block.m + index) * n + block.begin;
  Row<T> row;
  row.errors = block.errors + (b * n + block.begin) * block.m + index;
  row.stride = block.m;
  row.active = index < block.m;
  T loss = 0;
  // What lies to the left of a span is taken in at once for all groups that fit in kColumns.
  const std::int64_t group = block.of == 0 ? kColumns<T> : block.of;
  const std::int64_t span = group < kColumns<T> ? kColumns<T> / group * group : group;
  for (std::int64_t begin = 0; begin < width; begin += span) {
    const std::int64_t end = begin + span < width ? begin + span : width;
    advance(block, piece, row, weight, 1, 0, begin, begin, end);
    for (std::int64_t left = begin; left < end; left += group) {
      const std::int64_t right = left + group < end ? left + group : end;
      if (left > begin) {
        advance(block, piece, row, row.errors, row.stride, begin, left, left, right);
      }
      if (row.active && block.of > 0) choose_group(block, row, mask, left);
      for (std::int64_t first = left; first < right; first += kColumns<T>) {
        const std::int64_t count = right - first < kColumns<T> ? right - first : kColumns<T>;
        catch_up(block, piece, row, row.errors, row.stride, left, first, first, right);
        load_piece(block, piece, first, count, first);
        if (row.active) loss += walk_columns(row, piece, weight, mask, first, count);
      }
    }
  }
  if (row.active) block.losses[b * block.m + index] += static_cast<double>(loss);
}

}  // namespace

template <class T>
void sweep_block_cuda(const SweepBlock<T>& first, std::int64_t batch, int device, void* stream) {
  const std::int64_t tiles = (first.m + kThreads - 1) / kThreads;
  launch("sweep_block", sweep_block_kernel<T>, static_cast<unsigned>(batch * tiles), kThreads,
         device, stream, first);
}

template void sweep_block_cuda<float>(const SweepBlock<float>&, std::int64_t, int, void*);
template void sweep_block_cuda<double>(const SweepBlock<double>&, std::int64_t, int, void*);

}  // namespace mosaic
