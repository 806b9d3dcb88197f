// The CUDA panel for wide groups on the CPU: C functions for the tests, and, with
// MOSAIC_HOST_MAIN, a program for the sanitizers that compares it with the CPU panel.
#define MOSAIC_HOST
#include "cuda/prune_groups.cu"

// The tests lower the limit so that small groups take the path of large ones.
extern "C" void set_shared_limit_host(std::int64_t bytes) { mosaic::host_shared_limit = bytes; }

extern "C" std::int64_t prune_groups_workspace_host(std::int64_t groups, std::int64_t group_size,
                                                    std::int64_t element_bytes) {
  return mosaic::plan_groups(groups, group_size, element_bytes, 0).workspace;
}

extern "C" void prune_groups_host_f32(const mosaic::Panel<float>* first, float* workspace,
                                      std::int64_t batch) {
  mosaic::prune_groups_cuda(*first, workspace, batch, 0, nullptr);
}

extern "C" void prune_groups_host_f64(const mosaic::Panel<double>* first, double* workspace,
                                      std::int64_t batch) {
  mosaic::prune_groups_cuda(*first, workspace, batch, 0, nullptr);
}

#ifdef MOSAIC_HOST_MAIN
#include <cstdio>

#include "cpu/prune.h"

namespace {

struct Layers {
  std::int64_t batch, n, g, pivots;
  std::vector<double> inverse, gram, inverse_blocks, gram_blocks, u, v, losses;
  std::vector<std::uint8_t> alive;
  std::vector<std::int64_t> picked;

  mosaic::Panel<double> panel() {
    return {inverse.data(), gram.data(), inverse_blocks.data(), gram_blocks.data(),
            alive.data(),   u.data(),    v.data(),              picked.data(),
            losses.data(),  n,           g,                     pivots};
  }
};

Layers make_layers(std::int64_t batch, std::int64_t n, std::int64_t g, std::int64_t pivots) {
  Layers layers{batch, n, g, pivots, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j < n; ++j) {
        const double near = 1.0 / (1.0 + (i > j ? i - j : j - i));
        layers.inverse.push_back(i == j ? 6.0 + 0.01 * ((i * 7 + b) % n) : near);
        layers.gram.push_back(i == j ? 9.0 + 0.03 * ((i * 5 + b) % n) : 0.5 * near);
      }
    }
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = i / g * g; j < i / g * g + g; ++j) {
        layers.inverse_blocks.push_back(layers.inverse[(b * n + i) * n + j]);
        layers.gram_blocks.push_back(layers.gram[(b * n + i) * n + j]);
      }
    }
  }
  layers.alive.assign(batch * n / g, 1);
  layers.u.assign(batch * pivots * g * n, 0);
  layers.v.assign(batch * pivots * g * n, 0);
  layers.picked.assign(batch * pivots, -1);
  layers.losses.assign(batch * pivots, -1);
  return layers;
}

void run_cuda(Layers& layers) {
  std::vector<double> workspace(
      layers.batch *
      mosaic::plan_groups(layers.n / layers.g, layers.g, sizeof(double), 0).workspace);
  mosaic::prune_groups_cuda(layers.panel(), workspace.empty() ? nullptr : workspace.data(),
                            layers.batch, 0, nullptr);
}

bool agree(std::int64_t batch, std::int64_t n, std::int64_t g, std::int64_t pivots) {
  Layers cuda = make_layers(batch, n, g, pivots), cpu = make_layers(batch, n, g, pivots);
  run_cuda(cuda);
  mosaic::prune_panel(cpu.panel(), batch, 1);
  for (std::size_t k = 0; k < cuda.picked.size(); ++k) {
    if (cuda.picked[k] != cpu.picked[k] || !(std::abs(cuda.losses[k] - cpu.losses[k]) < 1e-9)) {
      std::printf("group size %ld: removal %ld differs\n", static_cast<long>(g),
                  static_cast<long>(k));
      return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  if (!agree(2, 33, 3, 6) || !agree(1, 40, 8, 3) || !agree(1, 34, 17, 2)) return 1;
  mosaic::host_shared_limit = 1000;  // a group of 17 is then worked on in the workspace
  if (!agree(2, 34, 17, 1)) return 1;
  Layers broken = make_layers(1, 33, 3, 4);
  for (const int column : {4, 8}) broken.inverse_blocks[column * 3 + column % 3] = -1;
  run_cuda(broken);
  return broken.losses[0] == broken.losses[0];  // not a number is what is wanted
}
#endif
