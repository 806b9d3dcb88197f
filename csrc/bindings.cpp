// The Python module mosaic_kernels._C: addresses, sizes and strides in, nothing else. Tensors,
// shapes and types are checked by the Python functions that call it.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "checks.h"
#include "cpu/cholesky.h"
#include "cpu/hessian.h"
#include "cpu/prune.h"

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

template <class T>
void prune_panel(Address inverse, Address gram, Address inverse_blocks, Address gram_blocks,
                 Address alive, Address u, Address v, Address picked, Address losses,
                 std::int64_t batch, std::int64_t n, std::int64_t group_size,
                 std::int64_t pivots, int threads) {
  const char* name = "prune_panel";
  const mosaic::Panel<T> panel{pointer<const T>(inverse, name, "inverse"),
                               pointer<const T>(gram, name, "gram"),
                               pointer<T>(inverse_blocks, name, "inverse_blocks"),
                               pointer<T>(gram_blocks, name, "gram_blocks"),
                               pointer<std::uint8_t>(alive, name, "alive"),
                               pointer<T>(u, name, "u"),
                               pointer<T>(v, name, "v"),
                               pointer<std::int64_t>(picked, name, "picked"),
                               pointer<T>(losses, name, "losses"),
                               n,
                               group_size,
                               pivots};
  py::gil_scoped_release release;
  mosaic::prune_panel(panel, batch, threads);
}

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
      [](Address inverse, Address gram, Address inverse_blocks, Address gram_blocks,
         Address alive, Address u, Address v, Address picked, Address losses, std::int64_t batch,
         std::int64_t n, std::int64_t group_size, std::int64_t pivots, int element_bytes,
         int threads) {
        check_common("prune_panel", element_bytes, n, threads);
        require(batch >= 1, "prune_panel", "batch", "at least 1", batch);
        require(group_size >= 1 && n % group_size == 0, "prune_panel", "group_size",
                "a divisor of n", group_size);
        require(pivots >= 1 && pivots * group_size <= n, "prune_panel", "pivots",
                "between 1 and n / group_size", pivots);
        (element_bytes == 4 ? prune_panel<float> : prune_panel<double>)(
            inverse, gram, inverse_blocks, gram_blocks, alive, u, v, picked, losses, batch, n,
            group_size, pivots, threads);
      },
      py::arg("inverse"), py::arg("gram"), py::arg("inverse_blocks"), py::arg("gram_blocks"),
      py::arg("alive"), py::arg("u"), py::arg("v"), py::arg("picked"), py::arg("losses"),
      py::arg("batch"), py::arg("n"), py::arg("group_size"), py::arg("pivots"),
      py::arg("element_bytes"), py::arg("threads"));
}
