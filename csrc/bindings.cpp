// The Python module mosaic_kernels._C: addresses, sizes and strides in, nothing else. Tensors,
// shapes and types are checked by the Python functions that call it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "checks.h"
#include "cpu/cholesky.h"
#include "cpu/hessian.h"
#include "cpu/prune.h"
#ifdef MOSAIC_WITH_CUDA
#include "cuda/cholesky.h"
#include "cuda/prune.h"
#include "cuda/prune_groups.h"
#endif

namespace py = pybind11;
using mosaic::pointer;
using mosaic::require;
using Address = std::uintptr_t;

namespace {

void check_common(const char* function, std::int64_t element_bytes, std::int64_t n, int threads) {
  require(element_bytes == 4 || element_bytes == 8, function, "element_bytes", "4 or 8",
          element_bytes);
  require(n >= 1, function, "n", "at least 1", n);
  require(threads >= 1, function, "threads", "at least 1", threads);
}

template <class T>
void mirror_lower(Address h, std::int64_t n, double divisor, int threads) {
  T* matrix = pointer<T>(h, "mirror_lower", "h");
  py::gil_scoped_release release;
  mosaic::mirror_lower(matrix, n, divisor, threads);
}

template <class T>
void invert_factor(Address blocks, std::int64_t batch, std::int64_t width,
                   std::int64_t batch_stride, std::int64_t ld, Address failed, int threads) {
  T* first = pointer<T>(blocks, "invert_factor", "blocks");
  auto* flags = pointer<std::uint8_t>(failed, "invert_factor", "failed");
  py::gil_scoped_release release;
  mosaic::invert_factor(first, batch, width, batch_stride, ld, flags, threads);
}

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

template <class T>
void invert_factor_cuda(Address blocks, std::int64_t batch, std::int64_t width,
                        std::int64_t batch_stride, std::int64_t ld, Address failed, int device,
                        Address stream) {
  T* first = pointer<T>(blocks, "invert_factor_cuda", "blocks");
  auto* flags = pointer<std::uint8_t>(failed, "invert_factor_cuda", "failed");
  py::gil_scoped_release release;
  mosaic::invert_factor_cuda(first, batch, width, batch_stride, ld, flags, device,
                             reinterpret_cast<void*>(stream));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ pieces of mosaic_kernels; call the functions of mosaic_kernels instead.";
  module.attr("compiler") = MOSAIC_COMPILER;
  module.attr("cuda_architectures") = MOSAIC_CUDA_ARCHITECTURES;
#ifdef _OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif

  module.def(
      "mirror_lower",
      [](Address h, std::int64_t n, double divisor, int element_bytes, int threads) {
        check_common("mirror_lower", element_bytes, n, threads);
        (element_bytes == 4 ? mirror_lower<float> : mirror_lower<double>)(h, n, divisor, threads);
      },
      py::arg("h"), py::arg("n"), py::arg("divisor"), py::arg("element_bytes"),
      py::arg("threads"));

  module.def(
      "invert_factor",
      [](Address blocks, std::int64_t batch, std::int64_t width, std::int64_t batch_stride,
         std::int64_t ld, Address failed, int element_bytes, int threads) {
        check_common("invert_factor", element_bytes, width, threads);
        require(batch >= 1, "invert_factor", "batch", "at least 1", batch);
        require(ld >= width, "invert_factor", "ld", "at least width", ld);
        (element_bytes == 4 ? invert_factor<float> : invert_factor<double>)(
            blocks, batch, width, batch_stride, ld, failed, threads);
      },
      py::arg("blocks"), py::arg("batch"), py::arg("width"), py::arg("batch_stride"),
      py::arg("ld"), py::arg("failed"), py::arg("element_bytes"), py::arg("threads"));

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

  module.def(
      "factor_width_cuda",
      [](int element_bytes, int device) {
        check_common("factor_width_cuda", element_bytes, 1, 1);
        return mosaic::factor_width_cuda(element_bytes, device);
      },
      py::arg("element_bytes"), py::arg("device"));

  module.def(
      "invert_factor_cuda",
      [](Address blocks, std::int64_t batch, std::int64_t width, std::int64_t batch_stride,
         std::int64_t ld, Address failed, int element_bytes, int device, Address stream) {
        check_common("invert_factor_cuda", element_bytes, width, 1);
        require(batch >= 1, "invert_factor_cuda", "batch", "at least 1", batch);
        require(ld >= width, "invert_factor_cuda", "ld", "at least width", ld);
        require(width <= 128, "invert_factor_cuda", "width", "at most 128", width);
        (element_bytes == 4 ? invert_factor_cuda<float> : invert_factor_cuda<double>)(
            blocks, batch, width, batch_stride, ld, failed, device, stream);
      },
      py::arg("blocks"), py::arg("batch"), py::arg("width"), py::arg("batch_stride"),
      py::arg("ld"), py::arg("failed"), py::arg("element_bytes"), py::arg("device"),
      py::arg("stream"));
#endif
}
