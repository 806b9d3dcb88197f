// The CUDA panel on the CPU: a C function for the tests, and, with MOSAIC_HOST_MAIN, a program
// for the sanitizers that compares it with the CPU panel on a small layer.
#define MOSAIC_HOST
#include "cuda/prune.cu"

extern "C" void prune_panel_host_f32(const mosaic::Panel<float>* first, std::int64_t batch) {
  mosaic::prune_panel_cuda(*first, batch, 0, nullptr);
}

extern "C" void prune_panel_host_f64(const mosaic::Panel<double>* first, std::int64_t batch) {
  mosaic::prune_panel_cuda(*first, batch, 0, nullptr);
}

#ifdef MOSAIC_HOST_MAIN
#include <cstdio>

#include "cpu/prune.h"

namespace {

struct Layer {
  std::vector<double> inverse, gram, inverse_diagonal, gram_diagonal, u, v, losses;
  std::vector<std::uint8_t> alive;
  std::vector<std::int64_t> picked;

  mosaic::Panel<double> panel(std::int64_t n, std::int64_t pivots) {
    return {inverse.data(), gram.data(), inverse_diagonal.data(), gram_diagonal.data(),
            alive.data(),   u.data(),    v.data(),                picked.data(),
            losses.data(),  n,           1,                       pivots};
  }
};

Layer make_layer(std::int64_t n, std::int64_t pivots) {
  Layer layer;
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      const double near = 1.0 / (1.0 + (i > j ? i - j : j - i));
      layer.inverse.push_back(i == j ? 6.0 + 0.01 * ((i * 7) % n) : near);
      layer.gram.push_back(i == j ? 9.0 + 0.03 * ((i * 5) % n) : 0.5 * near);
    }
    layer.inverse_diagonal.push_back(layer.inverse[i * n + i]);
    layer.gram_diagonal.push_back(layer.gram[i * n + i]);
  }
  layer.alive.assign(n, 1);
  layer.u.assign(pivots * n, 0);
  layer.v.assign(pivots * n, 0);
  layer.picked.assign(pivots, -1);
  layer.losses.assign(pivots, -1);
  return layer;
}

}  // namespace

int main() {
  const std::int64_t n = 75, pivots = 40;
  Layer cuda = make_layer(n, pivots), cpu = make_layer(n, pivots);
  mosaic::prune_panel_cuda(cuda.panel(n, pivots), 1, 0, nullptr);
  mosaic::prune_panel(cpu.panel(n, pivots), 1, 1);
  for (std::int64_t k = 0; k < pivots; ++k) {
    if (cuda.picked[k] != cpu.picked[k] || std::abs(cuda.losses[k] - cpu.losses[k]) > 1e-9) {
      std::printf("removal %ld differs\n", static_cast<long>(k));
      return 1;
    }
  }
  Layer broken = make_layer(n, pivots);
  broken.inverse_diagonal[3] = -1;
  mosaic::prune_panel_cuda(broken.panel(n, pivots), 1, 0, nullptr);
  return broken.losses[0] == broken.losses[0];  // not a number is what is wanted
}
#endif
