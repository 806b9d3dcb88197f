// The CUDA walk on the CPU: a C function for the tests, and, with MOSAIC_HOST_MAIN, a program for
// the sanitizers that compares it with the CPU walk on small layers.
#define MOSAIC_HOST
#include "cuda/sweep.cu"

extern "C" void sweep_block_host_f32(const mosaic::SweepBlock<float>* first, std::int64_t batch) {
  mosaic::sweep_block_cuda(*first, batch, 0, nullptr);
}

extern "C" void sweep_block_host_f64(const mosaic::SweepBlock<double>* first,
                                     std::int64_t batch) {
  mosaic::sweep_block_cuda(*first, batch, 0, nullptr);
}

#ifdef MOSAIC_HOST_MAIN
#include <cstdio>

#include "cpu/sweep.h"

namespace {

struct Layers {
  std::vector<double> factor, weight, errors, losses;
  std::vector<std::uint8_t> mask, dead;
  std::vector<std::int64_t> count;
};

Layers make_layers(std::int64_t batch, std::int64_t m, std::int64_t n, std::int64_t count) {
  Layers layers;
  for (std::int64_t i = 0; i < batch * n; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      const std::int64_t row = i % n;
      layers.factor.push_back(j < row ? 0.0 : 1.0 / (1.0 + j - row) + 0.01 * ((row * 7) % 5));
    }
  }
  for (std::int64_t i = 0; i < batch * m * n; ++i) {
    layers.weight.push_back(((i * 37) % 101 - 50) / 25.0);
  }
  layers.errors.assign(batch * n * m, 0);
  layers.losses.assign(batch * m, 0);
  layers.mask.assign(batch * m * n, 1);
  layers.dead.assign(batch * n, 0);
  layers.dead[3] = 1;
  layers.count.assign(batch, count);
  return layers;
}

bool differ(const std::vector<double>& a, const std::vector<double>& b) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!(std::abs(a[i] - b[i]) <= 1e-9 * (1 + std::abs(a[i])))) return true;
  }
  return false;
}

// Two layers of 11 rows, a block from column 5 on.
bool case_differs(std::int64_t width, std::int64_t keep, std::int64_t of) {
  const std::int64_t batch = 2, m = 11, n = width + 8, begin = 5;
  Layers cuda = make_layers(batch, m, n, m * width / 2), cpu = cuda;
  for (Layers* layers : {&cuda, &cpu}) {
    if (of == 0) {
      mosaic::choose_weights<double>({layers->factor.data(), layers->weight.data(),
                                      layers->dead.data(), layers->count.data(),
                                      layers->mask.data(), m, n, begin, width},
                                     batch, 1);
    }
    const mosaic::SweepBlock<double> block{
        layers->factor.data(), layers->weight.data(), layers->mask.data(), layers->errors.data(),
        layers->losses.data(), m,  n,  begin, width, keep, of};
    if (layers == &cuda) {
      mosaic::sweep_block_cuda(block, batch, 0, nullptr);
    } else {
      mosaic::sweep_block(block, batch, 1);
    }
  }
  std::int64_t dropped = 0;
  for (const std::uint8_t kept : cpu.mask) dropped += !kept;
  const std::int64_t wanted = of == 0 ? m * width / 2 : m * width / of * (of - keep);
  const bool wrong = cuda.mask != cpu.mask || dropped != batch * wanted ||
                     differ(cuda.weight, cpu.weight) || differ(cuda.errors, cpu.errors) ||
                     differ(cuda.losses, cpu.losses);
  if (wrong) std::printf("width %ld, %ld of %ld differs\n", long(width), long(keep), long(of));
  return wrong;
}

}  // namespace

int main() {
  return case_differs(75, 0, 0) + case_differs(76, 2, 4) + case_differs(75, 1, 3) +
         case_differs(160, 7, 40);
}
#endif
