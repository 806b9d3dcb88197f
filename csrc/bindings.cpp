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
#include "cpu/sweep.h"
#ifdef MOSAIC_WITH_CUDA
#include "cuda/prune.h"
#include "cuda/sweep.h"
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
void prune_panel_cuda(const PanelArrays& arrays, std::int64_t batch, std::int64_t n,
                      std::int64_t pivots, int device, Address stream) {
  const auto panel = make_panel<T>("prune_panel_cuda", arrays, n, 1, pivots);
  py::gil_scoped_release release;
  mosaic::prune_panel_cuda(panel, batch, device, reinterpret_cast<void*>(stream));
}
#endif

// Rows m, columns n and the block's columns: first, width.
using BlockSizes = std::array<std::int64_t, 4>;

void check_block(const char* name, std::int64_t batch, const BlockSizes& sizes) {
  const auto [m, n, begin, width] = sizes;
  require(batch >= 1, name, "batch", "at least 1", batch);
  require(m >= 1, name, "m", "at least 1", m);
  require(begin >= 0 && begin < n, name, "begin", "a column", begin);
  require(width >= 1 && begin + width <= n, name, "width", "between 1 and n - begin", width);
}

void check_pattern(const char* name, const BlockSizes& sizes, std::int64_t keep, std::int64_t of) {
  require(of >= 0 && (of == 0 || sizes[3] % of == 0), name, "of", "0 or a divisor of width", of);
  require(of == 0 ? keep == 0 : keep >= 1 && keep < of, name, "keep",
          "between 1 and of - 1, or 0 where of is", keep);
}

// Addresses of weight, factor, dead, count and mask.
template <class T>
void choose_weights(const std::array<Address, 5>& arrays, std::int64_t batch,
                    const BlockSizes& sizes, int threads) {
  const char* name = "choose_weights";
  const mosaic::SweepChoice<T> choice{pointer<const T>(arrays[1], name, "factor"),
                                      pointer<const T>(arrays[0], name, "weight"),
                                      pointer<const std::uint8_t>(arrays[2], name, "dead"),
                                      pointer<const std::int64_t>(arrays[3], name, "count"),
                                      pointer<std::uint8_t>(arrays[4], name, "mask"),
                                      sizes[0],
                                      sizes[1],
                                      sizes[2],
                                      sizes[3]};
  py::gil_scoped_release release;
  mosaic::choose_weights(choice, batch, threads);
}

// Addresses of weight, factor, mask, errors and losses.
using SweepArrays = std::array<Address, 5>;

template <class T>
mosaic::SweepBlock<T> make_block(const char* name, const SweepArrays& arrays,
                                 const BlockSizes& sizes, std::int64_t keep, std::int64_t of) {
  return {pointer<const T>(arrays[1], name, "factor"),
          pointer<T>(arrays[0], name, "weight"),
          pointer<std::uint8_t>(arrays[2], name, "mask"),
          pointer<T>(arrays[3], name, "errors"),
          pointer<double>(arrays[4], name, "losses"),
          sizes[0],
          sizes[1],
          sizes[2],
          sizes[3],
          keep,
          of};
}

template <class T>
void sweep_block(const SweepArrays& arrays, std::int64_t batch, const BlockSizes& sizes,
                 std::int64_t keep, std::int64_t of, int threads) {
  const auto block = make_block<T>("sweep_block", arrays, sizes, keep, of);
  py::gil_scoped_release release;
  mosaic::sweep_block(block, batch, threads);
}

#ifdef MOSAIC_WITH_CUDA
template <class T>
void sweep_block_cuda(const SweepArrays& arrays, std::int64_t batch, const BlockSizes& sizes,
                      std::int64_t keep, std::int64_t of, int device, Address stream) {
  const auto block = make_block<T>("sweep_block_cuda", arrays, sizes, keep, of);
  py::gil_scoped_release release;
  mosaic::sweep_block_cuda(block, batch, device, reinterpret_cast<void*>(stream));
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
      "prune_panel_cuda",
      [](const PanelArrays& arrays, std::int64_t batch, std::int64_t n, std::int64_t pivots,
         int element_bytes, int device, Address stream) {
        check_common("prune_panel_cuda", element_bytes, n, 1);
        check_panel("prune_panel_cuda", batch, n, 1, pivots);
        require(pivots <= mosaic::kMaxCudaPivots, "prune_panel_cuda", "pivots", "at most 128",
                pivots);
        (element_bytes == 4 ? prune_panel_cuda<float> : prune_panel_cuda<double>)(
            arrays, batch, n, pivots, device, stream);
      },
      py::arg("arrays"), py::arg("batch"), py::arg("n"), py::arg("pivots"),
      py::arg("element_bytes"), py::arg("device"), py::arg("stream"));
#endif

  module.def(
      "choose_weights",
      [](const std::array<Address, 5>& arrays, std::int64_t batch, const BlockSizes& sizes,
         int element_bytes, int threads) {
        check_common("choose_weights", element_bytes, sizes[1], threads);
        check_block("choose_weights", batch, sizes);
        (element_bytes == 4 ? choose_weights<float> : choose_weights<double>)(arrays, batch, sizes,
                                                                              threads);
      },
      py::arg("arrays"), py::arg("batch"), py::arg("sizes"), py::arg("element_bytes"),
      py::arg("threads"));

  module.def(
      "sweep_block",
      [](const SweepArrays& arrays, std::int64_t batch, const BlockSizes& sizes,
         std::int64_t keep, std::int64_t of, int element_bytes, int threads) {
        check_common("sweep_block", element_bytes, sizes[1], threads);
        check_block("sweep_block", batch, sizes);
        check_pattern("sweep_block", sizes, keep, of);
        (element_bytes == 4 ? sweep_block<float> : sweep_block<double>)(arrays, batch, sizes, keep,
                                                                        of, threads);
      },
      py::arg("arrays"), py::arg("batch"), py::arg("sizes"), py::arg("keep"), py::arg("of"),
      py::arg("element_bytes"), py::arg("threads"));

#ifdef MOSAIC_WITH_CUDA
  module.def(
      "sweep_block_cuda",
      [](const SweepArrays& arrays, std::int64_t batch, const BlockSizes& sizes,
         std::int64_t keep, std::int64_t of, int element_bytes, int device, Address stream) {
        check_common("sweep_block_cuda", element_bytes, sizes[1], 1);
        check_block("sweep_block_cuda", batch, sizes);
        check_pattern("sweep_block_cuda", sizes, keep, of);
        (element_bytes == 4 ? sweep_block_cuda<float> : sweep_block_cuda<double>)(
            arrays, batch, sizes, keep, of, device, stream);
      },
      py::arg("arrays"), py::arg("batch"), py::arg("sizes"), py::arg("keep"), py::arg("of"),
      py::arg("element_bytes"), py::arg("device"), py::arg("stream"));
#endif
}
