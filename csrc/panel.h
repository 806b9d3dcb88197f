// The arrays of one panel of the greedy elimination, shared by the CPU and the CUDA code.
#pragma once

#include <cstdint>

namespace mosaic {

// Arrays are contiguous, with the batch as leading dimension; groups = n / group_size.
template <class T>
struct Panel {
  const T* inverse;      // (n, n) A, lower triangle, before this panel
  const T* gram;         // (n, n) G, lower triangle, before this panel
  T* inverse_blocks;     // (groups, group_size, group_size) current diagonal blocks of A
  T* gram_blocks;        // (groups, group_size, group_size) current diagonal blocks of G
  std::uint8_t* alive;   // (groups,) 1 where the group has not been removed
  T* u;                  // (pivots * group_size, n) out
  T* v;                  // (pivots * group_size, n) out
  std::int64_t* picked;  // (pivots,) out, group indices in order of removal
  T* losses;             // (pivots,) out; not a number from a breakdown on
  std::int64_t n;
  std::int64_t group_size;
  std::int64_t pivots;
};

}  // namespace mosaic
