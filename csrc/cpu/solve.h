#pragma once

#include <cstdint>

namespace mosaic {

// Replaces b (rows x n, contiguous) by b A^-1, for a symmetric positive definite A (n x n,
// contiguous) of which the lower triangle is read; A is of no use afterwards. Returns false, with
// b half done, where A has no Cholesky factor.
template <class T>
bool solve_right(T* a, T* b, std::int64_t n, std::int64_t rows, int threads);

}  // namespace mosaic
