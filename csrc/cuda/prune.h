#pragma once

#include <cstdint>

#include "panel.h"

namespace mosaic {

constexpr std::int64_t kMaxCudaPivots = 128;  // removals in one call of prune_panel_cuda

// Removes `pivots` single columns (group_size 1) from every matrix of the batch, one thread block
// a matrix, on the given device and stream. Raises std::runtime_error where the launch fails.
template <class T>
void prune_panel_cuda(const Panel<T>& first, std::int64_t batch, int device, void* stream);

}  // namespace mosaic
