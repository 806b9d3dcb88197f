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

MOSAIC_CLONES bool invert_in_place(float* block, std::int64_t width, float* scratch) {
  if (!cholesky_lower(block, width, width)) return false;
  invert_lower(block, width, width, scratch);
  return true;
}

MOSAIC_CLONES bool invert_in_place(double* block, std::int64_t width, double* scratch) {
  if (!cholesky_lower(block, width, width)) return false;
  invert_lower(block, width, width, scratch);
  return true;
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
  std::vector<T> diagonal, rows, y;

  Sweep(T* matrix, std::int64_t size, int team)
      : a(matrix), n(size), ld(((size + 15) / 16 | 1) * 16), threads(team),
        diagonal(kSweepColumns * kSweepColumns),
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

  // out (width x n) = P^T Q for a width x width P and Q (width x n).
  void multiply(Operand p, const std::vector<T>& q, std::int64_t width, std::vector<T>& out) {
    std::fill_n(out.data(), width * ld, T(0));
    const Term term{p, operand(q.data(), ld, 1), width};
    add_product(Product<T>{out.data(), ld, &term, 1, width, n, T(1), false}, threads);
  }

  bool run() {
    for (std::int64_t begin = 0; begin < n; begin += kSweepColumns) {
      const std::int64_t width = std::min(kSweepColumns, n - begin);
      if (!invert_factor(a + begin * n + begin, n, width, diagonal.data())) return false;
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
bool invert_factor(const T* a, std::int64_t ld, std::int64_t width, T* out) {
  for (std::int64_t r = 0; r < width; ++r) {
    std::copy_n(a + r * ld, r + 1, out + r * width);
    std::fill_n(out + r * width + r + 1, width - r - 1, T(0));
  }
  std::vector<T> scratch(width);
  return invert_in_place(out, width, scratch.data());
}

template bool invert_factor<float>(const float*, std::int64_t, std::int64_t, float*);
template bool invert_factor<double>(const double*, std::int64_t, std::int64_t, double*);

}  // namespace mosaic
