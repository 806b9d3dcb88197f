#pragma once

#include <cstdint>

#include "panel.h"

namespace mosaic {

constexpr std::int64_t kMaxCudaGroup = 32768;  // columns of a group; its square is indexed by int

// How the panel for wide groups uses a device.
struct GroupsPlan {
  int teams;                // groups that a thread block looks at side by side
  std::int64_t square;      // elements of a team's scratch
  std::int64_t workspace;   // elements of global memory for each layer; 0: shared memory does
};

GroupsPlan plan_groups(std::int64_t groups, std::int64_t group_size, std::int64_t element_bytes,
                       int device);

// Removes `pivots` groups of group_size columns from every matrix of the batch, one thread block
// a matrix. `workspace` holds batch * plan_groups(...).workspace elements, or is null where that
// is 0. Raises std::runtime_error where the launch fails.
template <class T>
void prune_groups_cuda(const Panel<T>& first, T* workspace, std::int64_t batch, int device,
                       void* stream);

}  // namespace mosaic
