#pragma once

#include <cstdint>

#include "sweep_block.h"

namespace mosaic {

// Walks the block from left to right in every layer of the batch, one thread a row, on the given
// device and stream. Raises std::runtime_error where the launch fails.
template <class T>
void sweep_block_cuda(const SweepBlock<T>& first, std::int64_t batch, int device, void* stream);

}  // namespace mosaic
