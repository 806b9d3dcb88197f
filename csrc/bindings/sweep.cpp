// Bindings of the sweep over columns.
#include "bindings/common.h"

#include <array>

#include "cpu/sweep.h"
#ifdef MOSAIC_WITH_CUDA
#include "cuda/sweep.h"
#endif

using mosaic::Address;
using mosaic::check_common;
using mosaic::pointer;
using mosaic::require;
namespace py = pybind11;

namespace {

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

void bind_sweep(py::module_& module) {
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
