#pragma once

#include <cstdint>

namespace mosaic {

// Replaces each lower triangle of a batch of diagonal blocks (width x width, row stride ld,
// batch_stride elements apart) by L^-1, where block = L L^T, and zeroes the upper triangle.
// failed[i] is set to 1 where L does not exist; that block becomes the identity.
template <class T>
void invert_factor(T* blocks, std::int64_t batch, std::int64_t width, std::int64_t batch_stride,
                   std::int64_t ld, std::uint8_t* failed, int threads);

// Replaces each of a batch of symmetric positive definite matrices (n x n, contiguous), of which
// the lower triangle is read, by its inverse, both triangles. Where there is no Cholesky factor,
// failed[i] is set to 1 and the matrix is left half done.
template <class T>
void invert_matrices(T* matrices, std::int64_t batch, std::int64_t n, std::uint8_t* failed,
                     int threads);

}  // namespace mosaic
