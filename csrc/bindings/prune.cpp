// Bindings of the panels of the elimination.
#include "bindings/common.h"

#include <array>

#include "cpu/prune.h"
#ifdef MOSAIC_WITH_CUDA
#include "cuda/prune.h"
#include "cuda/prune_groups.h"
#endif

using mosaic::Address;
using mosaic::check_common;
using mosaic::pointer;
using mosaic::require;
namespace py = pybind11;

namespace {

// The nine arrays of a panel, in the order of mosaic::Panel.
using PanelArrays = std::array<Address, 9>;

template <class T>
mosaic::Panel<T> make_panel(const char* name, const PanelArrays& arrays, std::int64_t n,
                            std::int64_t group_size, std::int64_t pivots) {
  return {pointer<const T>(arrays[0], name, "inverse"),
          pointer<const T>(arrays[1], name, "gram"),
          pointer<T>(arrays[2], name, "inverse_blocks"),
          pointer<T>(arrays[3], name, "gram_blocks"),
          pointer<std::uint8_t>(arrays[4], name, "alive"),
          pointer<T>(arrays[5], name, "u"),
          pointer<T>(arrays[6], name, "v"),
          pointer<std::int64_t>(arrays[7], name, "picked"),
          pointer<T>(arrays[8], name, "losses"),
          n,
          group_size,
          pivots};
}

void check_panel(const char* name, std::int64_t batch, std::int64_t n, std::int64_t group_size,
                 std::int64_t pivots) {
  require(batch >= 1, name, "batch", "at least 1", batch);
  require(group_size >= 1 && n % group_size == 0, name, "group_size", "a divisor of n",
          group_size);
  require(pivots >= 1 && pivots * group_size <= n, name, "pivots",
          "between 1 and n / group_size", pivots);
}

template <class T>
void prune_panel(const PanelArrays& arrays, std::int64_t batch, std::int64_t n,
                 std::int64_t group_size, std::int64_t pivots, int threads) {
  const auto panel = make_panel<T>("prune_panel", arrays, n, group_size, pivots);
  py::gil_scoped_release release;
  mosaic::prune_panel(panel, batch, threads);
}

#ifdef MOSAIC_WITH_CUDA
template <class T>
void prune_panel_cuda(const PanelArrays& arrays, Address workspace, std::int64_t batch,
                      std::int64_t n, std::int64_t group_size, std::int64_t pivots, int device,
                      Address stream) {
  const auto panel = make_panel<T>("prune_panel_cuda", arrays, n, group_size, pivots);
  auto* scratch = workspace == 0 ? nullptr : pointer<T>(workspace, "prune_panel_cuda", "workspace");
  py::gil_scoped_release release;
  if (group_size == 1) {
    mosaic::prune_panel_cuda(panel, batch, device, reinterpret_cast<void*>(stream));
  } else {
    mosaic::prune_groups_cuda(panel, scratch, batch, device, reinterpret_cast<void*>(stream));
  }
}
#endif

}  // namespace

void bind_prune(py::module_& module) {
  module.def(
      "prune_panel",
      [](const PanelArrays& arrays, std::int64_t batch, std::int64_t n, std::int64_t group_size,
         std::int64_t pivots, int element_bytes, int threads) {
        check_common("prune_panel", element_bytes, n, threads);
        check_panel("prune_panel", batch, n, group_size, pivots);
        (element_bytes == 4 ? prune_panel<float> : prune_panel<double>)(
            arrays, batch, n, group_size, pivots, threads);
      },
      py::arg("arrays"), py::arg("batch"), py::arg("n"), py::arg("group_size"),
      py::arg("pivots"), py::arg("element_bytes"), py::arg("threads"));

#ifdef MOSAIC_WITH_CUDA
  module.def(
      "prune_workspace_cuda",
      [](std::int64_t n, std::int64_t group_size, int element_bytes, int device) {
        check_common("prune_workspace_cuda", element_bytes, n, 1);
        check_panel("prune_workspace_cuda", 1, n, group_size, 1);
        require(group_size <= mosaic::kMaxCudaGroup, "prune_workspace_cuda", "group_size",
                "at most 32768", group_size);
        if (group_size == 1) return std::int64_t{0};
        return mosaic::plan_groups(n / group_size, group_size, element_bytes, device).workspace;
      },
      py::arg("n"), py::arg("group_size"), py::arg("element_bytes"), py::arg("device"));

  module.def(
      "prune_panel_cuda",
      [](const PanelArrays& arrays, Address workspace, std::int64_t batch, std::int64_t n,
         std::int64_t group_size, std::int64_t pivots, int element_bytes, int device,
         Address stream) {
        check_common("prune_panel_cuda", element_bytes, n, 1);
        check_panel("prune_panel_cuda", batch, n, group_size, pivots);
        require(pivots <= mosaic::kMaxCudaPivots, "prune_panel_cuda", "pivots", "at most 128",
                pivots);
        (element_bytes == 4 ? prune_panel_cuda<float> : prune_panel_cuda<double>)(
            arrays, workspace, batch, n, group_size, pivots, device, stream);
      },
      py::arg("arrays"), py::arg("workspace"), py::arg("batch"), py::arg("n"),
      py::arg("group_size"), py::arg("pivots"), py::arg("element_bytes"), py::arg("device"),
      py::arg("stream"));
#endif
}
