// What the kernels need of CUDA: launches on a device and stream handed over by torch, dynamic
// shared memory, and barriers of a part of a block. host/cuda_host.h has the same on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

namespace mosaic {

inline void check_cuda(const char* function, cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(function) + ": CUDA says: " + cudaGetErrorString(status) +
                           ". Rebuild with TORCH_CUDA_ARCH_LIST set to this GPU's architecture "
                           "and with a CUDA toolkit that is no newer than the driver.");
}

// Bytes of shared memory that a block may have, static ones included: 99 KiB on the smaller
// chips, 163 KiB on sm_80, 227 KiB on sm_90 and sm_100.
inline std::size_t shared_limit(const char* function, int device) {
  int bytes = 0;
  check_cuda(function,
             cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return static_cast<std::size_t>(bytes);
}

// The block's dynamic shared memory.
template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char mosaic_shared[];
  return reinterpret_cast<T*>(mosaic_shared);
}

// Waits for the `size` threads of a team: consecutive ones, a multiple of a warp's 32. There are
// 16 barriers, number 0 is the block's: `team` is below 15 where a team is more than one warp.
__device__ inline void team_sync(int team, int size) {
  if (size == 32) {
    __syncwarp();
  } else {
    asm volatile("barrier.sync %0, %1;" : : "r"(team + 1), "r"(size) : "memory");
  }
}

template <class Kernel, class Argument>
void launch(const char* function, Kernel kernel, unsigned blocks, int threads, int device,
            void* stream, const Argument& argument, std::size_t shared_bytes = 0) {
  // The extension carries its own CUDA runtime, which has its own idea of the current device.
  check_cuda(function, cudaSetDevice(device));
  if (shared_bytes > 0) {  // more than 48 KiB has to be asked for
    check_cuda(function, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              static_cast<int>(shared_bytes)));
  }
  kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(argument);
  check_cuda(function, cudaGetLastError());
}

}  // namespace mosaic
