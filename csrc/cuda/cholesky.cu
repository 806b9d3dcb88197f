// The diagonal block of the blocked Cholesky inverse, in shared memory: L^-1 of a batch of small
// matrices. The products around it are torch's.
//
// Factor and inverse are made in one sweep, so that there is one loop with two barriers a column
// and all threads are busy: eliminating column k from the matrix and from the identity beside it,
// with y_j = L_jk below the diagonal and y_j = (L^-1)_kj up to it, is
//
//     M_ij -= y_i y_j        for all rows i > k and all j <= i
//
// where M holds the rest of the matrix to the right of column k and the rows of L^-1 that are
// under way to its left. A block of 128 takes some 20 us by counting (not measured), one after the
// other 36 times in a matrix of 4608: 0.7 ms for a batch of up to one matrix a multiprocessor.
#ifdef MOSAIC_HOST
#include "host/cuda_host.h"
#else
#include <cuda_runtime.h>

#include "cuda/launch.h"
#endif

#include "cuda/cholesky.h"

namespace mosaic {
namespace {

#ifdef MOSAIC_HOST
constexpr int kThreads = 8, kLanes = 4;  // real threads on the host: enough for every path
#else
constexpr int kThreads = 512, kLanes = 32;
#endif

template <class T>
struct Blocks {
  T* first;
  std::int64_t batch_stride, ld;
  std::uint8_t* failed;
  int width;
};

// The square, with an odd leading dimension so that a column meets every bank, and y.
std::size_t shared_bytes(std::int64_t width, std::int64_t element_bytes) {
  return static_cast<std::size_t>((width * (width | 1) + width) * element_bytes);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) invert_factor_kernel(Blocks<T> blocks) {
  const int width = blocks.width, ld = width | 1, tid = static_cast<int>(threadIdx.x);
  const int lane = tid % kLanes, first = tid / kLanes, step = kThreads / kLanes;
  T* m = dynamic_shared<T>();
  T* y = m + width * ld;
  T* block = blocks.first + blockIdx.x * blocks.batch_stride;
  for (int i = first; i < width; i += step) {
    for (int j = lane; j <= i; j += kLanes) m[i * ld + j] = block[i * blocks.ld + j];
  }
  __syncthreads();
  bool exists = true;
  for (int k = 0; k < width; ++k) {
    const T pivot = m[k * ld + k];
    if (!(pivot > T(0)) || !(pivot - pivot == T(0))) {
      exists = false;
      break;  // all of the block: they have read the same pivot
    }
    const T scale = T(1) / sqrt(pivot);
    for (int j = tid; j < width; j += kThreads) {
      y[j] = scale * (j < k ? m[k * ld + j] : j == k ? T(1) : m[j * ld + k]);
    }
    __syncthreads();
    for (int i = k + first; i < width; i += step) {
      const T y_i = y[i];
      for (int j = lane; j <= i; j += kLanes) {
        if (i == k) {
          m[i * ld + j] = y[j];
        } else {
          m[i * ld + j] = (j == k ? T(0) : m[i * ld + j]) - y_i * y[j];
        }
      }
    }
    __syncthreads();
  }
  for (int i = first; i < width; i += step) {
    for (int j = lane; j < width; j += kLanes) {
      // A matrix that has failed is tried again with more damping: what matters is that no
      // not-a-number spreads from it while its neighbours in the batch are finished.
      block[i * blocks.ld + j] = exists ? (j <= i ? m[i * ld + j] : T(0)) : T(i == j);
    }
  }
  if (!exists && tid == 0) blocks.failed[blockIdx.x] = 1;
}

}  // namespace

std::int64_t factor_width_cuda(std::int64_t element_bytes, int device) {
  return shared_bytes(128, element_bytes) <= shared_limit("invert_factor", device) ? 128 : 64;
}

template <class T>
void invert_factor_cuda(T* blocks, std::int64_t batch, std::int64_t width,
                        std::int64_t batch_stride, std::int64_t ld, std::uint8_t* failed,
                        int device, void* stream) {
  const Blocks<T> all{blocks, batch_stride, ld, failed, static_cast<int>(width)};
  launch("invert_factor", invert_factor_kernel<T>, static_cast<unsigned>(batch), kThreads, device,
         stream, all, shared_bytes(width, sizeof(T)));
}

template void invert_factor_cuda<float>(float*, std::int64_t, std::int64_t, std::int64_t,
                                        std::int64_t, std::uint8_t*, int, void*);
template void invert_factor_cuda<double>(double*, std::int64_t, std::int64_t, std::int64_t,
                                         std::int64_t, std::uint8_t*, int, void*);

}  // namespace mosaic
