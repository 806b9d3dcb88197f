// C += alpha (P^T Q + ...), the one product that the Hessian, the inverse and the elimination consist of.
//
// torch's BLAS has no product that leaves out half of a symmetric result, none that reads bf16
// and sums in fp32, and on processors that are not its maker's it uses half of the vector width:
// 106 GFLOP/s on a core of an AMD EPYC (Zen 5) where 215 are to be had.
#pragma once

#include <cstdint>

namespace mosaic {

enum class Element : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// A depth x width matrix: element (k, i) is data[k * k_stride + i * i_stride]. f64 goes with
// results in double, the others with results in float, to which they are widened exactly.
struct Operand {
  const void* data;
  Element type;
  std::int64_t k_stride, i_stride;
};

// An operand of float or double.
template <class T>
Operand operand(const T* data, std::int64_t k_stride, std::int64_t i_stride) {
  return {data, sizeof(T) == sizeof(float) ? Element::f32 : Element::f64, k_stride, i_stride};
}

// P^T Q, with P of depth x rows and Q of depth x columns.
struct Term {
  Operand p, q;
  std::int64_t depth;
};

template <class T>
struct Product {
  T* c;  // element (i, j) is c[i * c_stride + j]
  std::int64_t c_stride;
  const Term* terms;
  int count;
  std::int64_t rows, columns;
  T alpha;
  bool lower;  // only elements with j <= i are computed, and only they are touched
};

// Each element of C is summed by one thread in a fixed order: the bits do not depend on the
// number of threads.
template <class T>
void add_product(const Product<T>& product, int threads);

}  // namespace mosaic
