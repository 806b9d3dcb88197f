#pragma once

#include <cstdint>

namespace mosaic {

// Writes L^-1, with zeros above its diagonal, to `out` (width x width, contiguous), where A = L L^T
// is a small block (row stride ld) of which the lower triangle is read. Returns false, with `out`
// half done, where L does not exist.
template <class T>
bool invert_factor(const T* a, std::int64_t ld, std::int64_t width, T* out);

// Replaces each of a batch of symmetric positive definite matrices (n x n, contiguous), of which
// the lower triangle is read, by its inverse, both triangles. Where there is no Cholesky factor,
// failed[i] is set to 1 and the matrix is left half done.
template <class T>
void invert_matrices(T* matrices, std::int64_t batch, std::int64_t n, std::uint8_t* failed,
                     int threads);

}  // namespace mosaic
