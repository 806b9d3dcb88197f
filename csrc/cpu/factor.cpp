// The inverse of the Cholesky factor of whole matrices, row of blocks by row of blocks. With J a
// block of 128 rows, and Y the rows of L^T that are there already,
//
//     M_JJ = L_JJ^-1      M_J,left = -M_JJ (Y_left,J)^T M_left      Y_J,rest = M_JJ A_J,rest
//     A_rest -= Y_J,rest^T Y_J,rest
//
// and M is L^-1. 2/3 n^3 operations, nearly all in add_product.
#include "factor.h"

#include <algorithm>
#include <vector>

#include "cholesky.h"
#include "product.h"

namespace mosaic {
namespace {

constexpr std::int64_t kBlock = 128;
constexpr std::int64_t kColumns = 512;  // of M_left at once: what lies above them is zero

template <class T>
struct Factor {
  T* a;    // Y goes to its upper triangle, which nothing else uses
  T* out;  // M
  std::int64_t n;
  int threads;
  std::vector<T> diagonal, side;

  void add(T* c, Operand p, Operand q, std::int64_t rows, std::int64_t columns,
           std::int64_t depth, T alpha, bool lower = false) {
    const Term term{p, q, depth};
    add_product(Product<T>{c, n, &term, 1, rows, columns, alpha, lower}, threads);
  }

  bool block(std::int64_t begin, std::int64_t width) {
    const std::int64_t end = begin + width, rest = n - end;
    if (!invert_factor(a + begin * n + begin, n, width, diagonal.data())) return false;
    for (std::int64_t r = 0; r < width; ++r)
      std::copy_n(diagonal.data() + r * width, r + 1, out + (begin + r) * n + begin);
    const Operand inverse = operand(diagonal.data(), 1, width);  // P^T = M_JJ
    if (begin > 0) {
      std::fill_n(side.data(), width * n, T(0));
      for (std::int64_t c = 0; c < begin; c += kColumns) {
        add(side.data() + c, operand(a + c * n + begin, n, 1), operand(out + c * n + c, n, 1),
            width, std::min(kColumns, begin - c), begin - c, T(1));
      }
      add(out + begin * n, inverse, operand(side.data(), n, 1), width, begin, width, T(-1));
    }
    if (rest == 0) return true;
    T* y = a + begin * n + end;
    for (std::int64_t r = 0; r < width; ++r) std::fill_n(y + r * n, rest, T(0));
    add(y, inverse, operand(a + end * n + begin, 1, n), width, rest, width, T(1));
    add(a + end * n + end, operand(y, n, 1), operand(y, n, 1), rest, rest, width, T(-1), true);
    return true;
  }

  bool run() {
    for (std::int64_t begin = 0; begin < n; begin += kBlock)
      if (!block(begin, std::min(kBlock, n - begin))) return false;
    return true;
  }
};

}  // namespace

template <class T>
void invert_factors(T* matrices, T* out, std::int64_t batch, std::int64_t n, std::uint8_t* failed,
                    int threads) {
  for (std::int64_t b = 0; b < batch; ++b) {
    Factor<T> factor{matrices + b * n * n, out + b * n * n, n, threads,
                     std::vector<T>(kBlock * kBlock), std::vector<T>(kBlock * n)};
    if (!factor.run()) failed[b] = 1;
  }
}

template void invert_factors<float>(float*, float*, std::int64_t, std::int64_t, std::uint8_t*, int);
template void invert_factors<double>(double*, double*, std::int64_t, std::int64_t, std::uint8_t*,
                                     int);

}  // namespace mosaic
