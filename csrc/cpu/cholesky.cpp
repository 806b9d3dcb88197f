// Inverses of symmetric positive definite matrices: of the factor of a diagonal block, and of
// whole matrices in place.
#include "cholesky.h"

#include <algorithm>
#include <vector>

#include "hessian.h"
#include "product.h"
#include "small_cholesky.h"

namespace mosaic {
namespace {

template <class T>
MOSAIC_INLINE void invert_factor_block_impl(T* block, std::int64_t width, std::int64_t ld,
                                            std::uint8_t* failed, T* scratch) {
  const bool exists = cholesky_lower(block, width, ld);
  if (exists) invert_lower(block, width, ld, scratch);
  for (std::int64_t i = 0; i < width; ++i) {
    // A matrix that has failed is tried again with more damping: what matters is that no
    // not-a-number spreads from it while its neighbours in the batch are finished.
    const std::int64_t first = exists ? i + 1 : 0;
    for (std::int64_t j = first; j < width; ++j) block[i * ld + j] = T(!exists && i == j);
  }
  if (!exists) *failed = 1;
}

MOSAIC_CLONES void invert_factor_block(float* block, std::int64_t width, std::int64_t ld,
                                       std::uint8_t* failed, float* scratch) {
  invert_factor_block_impl(block, width, ld, failed, scratch);
}

MOSAIC_CLONES void invert_factor_block(double* block, std::int64_t width, std::int64_t ld,
                                       std::uint8_t* failed, double* scratch) {
  invert_factor_block_impl(block, width, ld, failed, scratch);
}

// The block sweep (Gauss-Jordan elimination of a symmetric matrix). With J the block's columns,
// A_JJ = L L^T, Y = L^-1 A_J: and E = L^-T Y, one step is
//
//     A -= Y^T Y outside J        A_J: = E        A_JJ = -L^-T L^-1
//
// and after all steps the matrix is -A^-1. n^3 operations, as Cholesky's factor, its inverse and
// their product take together, but nearly all of them in one shape of product, on the lower
// triangle of the whole matrix. The error was level with LAPACK's potrf + potri at condition
// numbers 1e4 and 1e6 (0.6 and 0.7 of it in float32).
constexpr std::int64_t kSweepColumns = 128;

template <class T>
struct Sweep {
  T* a;
  std::int64_t n, ld;  // ld: an odd number of cache lines, so that a column uses every cache set
  int threads;
  std::vector<T> diagonal, scratch, rows, y;

  Sweep(T* matrix, std::int64_t size, int team)
      : a(matrix), n(size), ld(((size + 15) / 16 | 1) * 16), threads(team),
        diagonal(kSweepColumns * kSweepColumns), scratch(kSweepColumns),
        rows(kSweepColumns * ld), y(kSweepColumns * ld) {}

  // rows = A_J:, from the lower triangle, with zeros in the columns of J.
  void load(std::int64_t begin, std::int64_t width) {
    const std::int64_t end = begin + width;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (std::int64_t c0 = 0; c0 < n; c0 += kTile) {
      const std::int64_t c1 = std::min(c0 + kTile, n);
      for (std::int64_t r = 0; r < width; ++r) {
        T* out = rows.data() + r * ld;
        const T* row = a + (begin + r) * n;
        for (std::int64_t c = c0; c < c1; ++c)
          out[c] = c < begin ? row[c] : (c < end ? T(0) : a[c * n + begin + r]);
      }
    }
  }

  // A_J: = rows, A_JJ = -L^-T L^-1 with L^-1 in `diagonal`.
  void store(std::int64_t begin, std::int64_t width) {
    const std::int64_t end = begin + width;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (std::int64_t c0 = 0; c0 < n; c0 += kTile) {
      const std::int64_t c1 = std::min(c0 + kTile, n);
      const std::int64_t left_end = std::min(c1, begin);
      for (std::int64_t r = 0; r < width; ++r)
        for (std::int64_t c = c0; c < left_end; ++c) a[(begin + r) * n + c] = rows[r * ld + c];
      for (std::int64_t c = std::max(c0, end); c < c1; ++c)
        for (std::int64_t r = 0; r < width; ++r) a[c * n + begin + r] = rows[r * ld + c];
    }
    for (std::int64_t r = 0; r < width; ++r) std::fill_n(a + (begin + r) * n + begin, r + 1, T(0));
    const Operand factor = operand(diagonal.data(), width, 1);
    const Term term{factor, factor, width};
    add_product(Product<T>{a + begin * n + begin, n, &term, 1, width, width, T(-1), true}, 1);
  }

  static Operand operand(const T* data, std::int64_t k_stride, std::int64_t i_stride) {
    return {data, sizeof(T) == 4 ? Element::f32 : Element::f64, k_stride, i_stride};
  }

  // out (width x n) = P^T Q for a width x width P and Q (width x n).
  void multiply(Operand p, const std::vector<T>& q, std::int64_t width, std::vector<T>& out) {
    std::fill_n(out.data(), width * ld, T(0));
    const Term term{p, operand(q.data(), ld, 1), width};
    add_product(Product<T>{out.data(), ld, &term, 1, width, n, T(1), false}, threads);
  }

  bool run() {
    for (std::int64_t begin = 0; begin < n; begin += kSweepColumns) {
      const std::int64_t width = std::min(kSweepColumns, n - begin);
      for (std::int64_t r = 0; r < width; ++r)
        std::copy_n(a + (begin + r) * n + begin, r + 1, diagonal.data() + r * width);
      std::uint8_t failed = 0;
      invert_factor_block(diagonal.data(), width, width, &failed, scratch.data());
      if (failed) return false;
      load(begin, width);
      multiply(operand(diagonal.data(), 1, width), rows, width, y);
      const Operand all = operand(y.data(), ld, 1);
      const Term term{all, all, width};
      add_product(Product<T>{a, n, &term, 1, n, n, T(-1), true}, threads);
      multiply(operand(diagonal.data(), width, 1), y, width, rows);
      store(begin, width);
    }
    mirror_lower(a, static_cast<const T*>(nullptr), n, -1.0, threads);
    return true;
  }

  static constexpr std::int64_t kTile = 16;
};

// Smaller matrices are inverted by one thread each: n = 1152 takes 13 ms so, and the barriers of
// two threads have cost more than they gained wherever the cores had anything else to do.
constexpr std::int64_t kSharedColumns = 2048;

}  // namespace

template <class T>
void invert_matrices(T* matrices, std::int64_t batch, std::int64_t n, std::uint8_t* failed,
                     int threads) {
  const bool whole = n < kSharedColumns;
  const int outer = whole ? static_cast<int>(std::min<std::int64_t>(threads, batch)) : 1;
#pragma omp parallel for schedule(dynamic) num_threads(outer) if (outer > 1)
  for (std::int64_t b = 0; b < batch; ++b) {
    Sweep<T> sweep(matrices + b * n * n, n, whole ? 1 : threads);
    if (!sweep.run()) failed[b] = 1;
  }
  (void)outer;
}

template void invert_matrices<float>(float*, std::int64_t, std::int64_t, std::uint8_t*, int);
template void invert_matrices<double>(double*, std::int64_t, std::int64_t, std::uint8_t*, int);

template <class T>
void invert_factor(T* blocks, std::int64_t batch, std::int64_t width, std::int64_t batch_stride,
                   std::int64_t ld, std::uint8_t* failed, int threads) {
  std::vector<T> scratch(static_cast<std::size_t>(batch * width));
#pragma omp parallel for num_threads(threads) if (batch > 1)
  for (std::int64_t b = 0; b < batch; ++b) {
    invert_factor_block(blocks + b * batch_stride, width, ld, failed + b,
                        scratch.data() + b * width);
  }
  (void)threads;
}

template void invert_factor<float>(float*, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                                   std::uint8_t*, int);
template void invert_factor<double>(double*, std::int64_t, std::int64_t, std::int64_t,
                                    std::int64_t, std::uint8_t*, int);

}  // namespace mosaic
