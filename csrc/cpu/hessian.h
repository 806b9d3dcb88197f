#pragma once

#include <cstdint>

namespace mosaic {

// Divides the lower triangle of h (n x n, contiguous) by divisor and mirrors it into the upper.
template <class T>
void mirror_lower(T* h, std::int64_t n, double divisor, int threads);

}  // namespace mosaic
