// The CUDA inverse of diagonal blocks on the CPU: C functions for the tests, and, with
// MOSAIC_HOST_MAIN, a program for the sanitizers that compares it with the CPU one.
#define MOSAIC_HOST
#include "cuda/cholesky.cu"

extern "C" std::int64_t factor_width_host(std::int64_t element_bytes, std::int64_t limit) {
  mosaic::host_shared_limit = limit;
  return mosaic::factor_width_cuda(element_bytes, 0);
}

extern "C" void invert_factor_host_f32(float* blocks, std::int64_t batch, std::int64_t width,
                                       std::int64_t batch_stride, std::int64_t ld,
                                       std::uint8_t* failed) {
  mosaic::invert_factor_cuda(blocks, batch, width, batch_stride, ld, failed, 0, nullptr);
}

extern "C" void invert_factor_host_f64(double* blocks, std::int64_t batch, std::int64_t width,
                                       std::int64_t batch_stride, std::int64_t ld,
                                       std::uint8_t* failed) {
  mosaic::invert_factor_cuda(blocks, batch, width, batch_stride, ld, failed, 0, nullptr);
}

#ifdef MOSAIC_HOST_MAIN
#include <cstdio>

int main() {
  // The second of three matrices has no factor. Between rows and between matrices there is room
  // that has to stay as it is.
  const std::int64_t batch = 3, width = 21, ld = 24, stride = width * ld + 5;
  std::vector<double> blocks(batch * stride, -7.0);
  std::vector<std::uint8_t> failed(batch, 0);
  const auto original = [](std::int64_t i, std::int64_t j) {
    return i == j ? 3.0 + 0.1 * i : 1.0 / (2.0 + i + j);
  };
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t i = 0; i < width; ++i) {
      for (std::int64_t j = 0; j <= i; ++j) blocks[b * stride + i * ld + j] = original(i, j);
    }
  }
  blocks[stride + 9 * ld + 9] = -1.0;
  mosaic::invert_factor_cuda(blocks.data(), batch, width, stride, ld, failed.data(), 0, nullptr);
  for (std::int64_t b = 0; b < batch; ++b) {
    const double* x = blocks.data() + b * stride;  // x original x^T is the identity
    if (failed[b] != (b == 1)) return 1;
    for (std::int64_t i = 0; i < width; ++i) {
      for (std::int64_t j = 0; j < width; ++j) {
        double product = x[i * ld + j];
        if (b != 1) {
          product = 0;
          for (std::int64_t k = 0; k <= i; ++k) {
            for (std::int64_t l = 0; l <= j; ++l) {
              product += x[i * ld + k] * original(k > l ? k : l, k > l ? l : k) * x[j * ld + l];
            }
          }
        }
        if (!(std::abs(product - (i == j)) < 1e-12)) {
          std::printf("matrix %ld differs at %ld, %ld\n", static_cast<long>(b),
                      static_cast<long>(i), static_cast<long>(j));
          return 1;
        }
      }
      for (std::int64_t j = width; j < ld; ++j) {
        if (x[i * ld + j] != -7.0) return 1;
      }
    }
  }
  return 0;
}
#endif
