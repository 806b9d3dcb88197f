#pragma once

#include <cstdint>

namespace mosaic {

// Sums of symmetric matrices (n x n, contiguous) of which the lower triangle is formed: the upper
// one may hold rounding errors, that of h(i, j), i > j, at h(j, i); those of the diagonal are in a
// vector of n.

// Adds the lower triangle of part to that of h, and what rounding takes from it to the errors.
template <class T>
void add_compensated_lower(T* h, const T* part, T* diagonal_errors, std::int64_t n, int threads);

// Adds the errors where there are any (diagonal_errors is not null), divides the lower triangle
// by divisor and mirrors it into the upper.
template <class T>
void mirror_lower(T* h, const T* diagonal_errors, std::int64_t n, double divisor, int threads);

}  // namespace mosaic
