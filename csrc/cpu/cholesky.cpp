// The diagonal block of the blocked Cholesky inverse; the products around it are torch's.
#include "cholesky.h"

#include <vector>

#include "small_cholesky.h"

namespace mosaic {
namespace {

template <class T>
MOSAIC_INLINE void invert_factor_block_impl(T* block, std::int64_t width, std::int64_t ld,
                                            std::uint8_t* failed, T* scratch) {
  const bool exists = cholesky_lower(block, width, ld);
  if (exists) invert_lower(block, width, ld, scratch);
  for (std::int64_t i = 0; i < width; ++i) {
    // A matrix that has failed is tried again with more damping: what matters is that no
    // not-a-number spreads from it while its neighbours in the batch are finished.
    const std::int64_t first = exists ? i + 1 : 0;
    for (std::int64_t j = first; j < width; ++j) block[i * ld + j] = T(!exists && i == j);
  }
  if (!exists) *failed = 1;
}

MOSAIC_CLONES void invert_factor_block(float* block, std::int64_t width, std::int64_t ld,
                                       std::uint8_t* failed, float* scratch) {
  invert_factor_block_impl(block, width, ld, failed, scratch);
}

MOSAIC_CLONES void invert_factor_block(double* block, std::int64_t width, std::int64_t ld,
                                       std::uint8_t* failed, double* scratch) {
  invert_factor_block_impl(block, width, ld, failed, scratch);
}

}  // namespace

template <class T>
void invert_factor(T* blocks, std::int64_t batch, std::int64_t width, std::int64_t batch_stride,
                   std::int64_t ld, std::uint8_t* failed, int threads) {
  std::vector<T> scratch(static_cast<std::size_t>(batch * width));
#pragma omp parallel for num_threads(threads) if (batch > 1)
  for (std::int64_t b = 0; b < batch; ++b) {
    invert_factor_block(blocks + b * batch_stride, width, ld, failed + b,
                        scratch.data() + b * width);
  }
  (void)threads;
}

template void invert_factor<float>(float*, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                                   std::uint8_t*, int);
template void invert_factor<double>(double*, std::int64_t, std::int64_t, std::int64_t,
                                    std::int64_t, std::uint8_t*, int);

}  // namespace mosaic
