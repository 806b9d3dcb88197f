#pragma once

#include <cstdint>

namespace mosaic {

// The widest block that invert_factor_cuda takes on a device: 128 columns where its shared memory
// holds them, 64 otherwise (33 KiB of float64, which every chip has).
std::int64_t factor_width_cuda(std::int64_t element_bytes, int device);

// Replaces each block (width x width, row stride ld, lower triangle) of a batch by L^-1, where
// block = L L^T; the upper triangle becomes zero. Where L does not exist failed[b] is set to 1
// and the block becomes the identity. One thread block a matrix; nothing waits for the device.
template <class T>
void invert_factor_cuda(T* blocks, std::int64_t batch, std::int64_t width,
                        std::int64_t batch_stride, std::int64_t ld, std::uint8_t* failed,
                        int device, void* stream);

}  // namespace mosaic
