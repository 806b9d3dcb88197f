#pragma once

#include <cstdint>

namespace mosaic {

// Writes L^-1, lower, of each of a batch of symmetric positive definite matrices A = L L^T (n x n,
// contiguous), of which the lower triangle is read, to `out`, which holds zeros. The matrices are
// used up. Where L does not exist, failed[i] is set to 1 and that entry of `out` is half done.
template <class T>
void invert_factors(T* matrices, T* out, std::int64_t batch, std::int64_t n, std::uint8_t* failed,
                    int threads);

}  // namespace mosaic
