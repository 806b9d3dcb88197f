// Bindings of the Hessian, the product, the inverse and the solve.
#include "bindings/common.h"

#include <tuple>
#include <vector>

#include "cpu/cholesky.h"
#include "cpu/factor.h"
#include "cpu/hessian.h"
#include "cpu/product.h"
#include "cpu/prune.h"
#include "cpu/solve.h"
#ifdef MOSAIC_WITH_CUDA
#include "cuda/cholesky.h"
#endif

using mosaic::Address;
using mosaic::check_common;
using mosaic::pointer;
using mosaic::require;
namespace py = pybind11;

namespace {

template <class T>
void add_compensated_lower(Address h, Address part, Address residual, std::int64_t n,
                           int threads) {
  const char* name = "add_compensated_lower";
  T* matrix = pointer<T>(h, name, "h");
  const T* added = pointer<const T>(part, name, "part");
  T* errors = pointer<T>(residual, name, "residual");
  py::gil_scoped_release release;
  mosaic::add_compensated_lower(matrix, added, errors, n, threads);
}

template <class T>
void mirror_lower(Address h, std::int64_t n, double divisor, int threads, Address residual) {
  T* matrix = pointer<T>(h, "mirror_lower", "h");
  const T* errors = residual ? pointer<const T>(residual, "mirror_lower", "residual") : nullptr;
  py::gil_scoped_release release;
  mosaic::mirror_lower(matrix, errors, n, divisor, threads);
}

template <class T>
void invert_factors(Address matrices, Address out, std::int64_t batch, std::int64_t n,
                    Address failed, int threads) {
  T* first = pointer<T>(matrices, "invert_factors", "matrices");
  T* result = pointer<T>(out, "invert_factors", "out");
  auto* flags = pointer<std::uint8_t>(failed, "invert_factors", "failed");
  py::gil_scoped_release release;
  mosaic::invert_factors(first, result, batch, n, flags, threads);
}

template <class T>
void invert_matrices(Address matrices, std::int64_t batch, std::int64_t n, Address failed,
                     int threads) {
  T* first = pointer<T>(matrices, "invert_matrices", "matrices");
  auto* flags = pointer<std::uint8_t>(failed, "invert_matrices", "failed");
  py::gil_scoped_release release;
  mosaic::invert_matrices(first, batch, n, flags, threads);
}

// An operand of add_product: address, mosaic::Element, strides along depth and width. A term: two
// operands and their depth.
using OperandTuple = std::tuple<Address, int, std::int64_t, std::int64_t>;
using TermTuple = std::tuple<OperandTuple, OperandTuple, std::int64_t>;

mosaic::Operand make_operand(const OperandTuple& from, std::size_t element_bytes) {
  const auto [address, type, k_stride, i_stride] = from;
  require(element_bytes == 8 ? type == 1 : type == 0 || type == 2 || type == 3, "add_product",
          "operand", "f64 for a result in double, or f32, bf16 or f16 for one in float", type);
  return {pointer<const std::uint16_t>(address, "add_product", "operand"),
          static_cast<mosaic::Element>(type), k_stride, i_stride};
}

template <class T>
void add_product(Address c, std::int64_t c_stride, const std::vector<TermTuple>& from,
                 std::int64_t rows, std::int64_t columns, double alpha, bool lower, int threads) {
  std::vector<mosaic::Term> terms;
  for (const auto& [p, q, depth] : from) {
    require(depth >= 0, "add_product", "depth", "at least 0", depth);
    terms.push_back({make_operand(p, sizeof(T)), make_operand(q, sizeof(T)), depth});
  }
  const mosaic::Product<T> product{pointer<T>(c, "add_product", "c"),
                                   c_stride,
                                   terms.data(),
                                   static_cast<int>(terms.size()),
                                   rows,
                                   columns,
                                   static_cast<T>(alpha),
                                   lower};
  py::gil_scoped_release release;
  mosaic::add_product(product, threads);
}

template <class T>
void pack_lower(Address from, Address to, std::int64_t batch, std::int64_t n, Address kept,
                std::int64_t count) {
  const T* source = pointer<const T>(from, "pack_lower", "from");
  T* target = pointer<T>(to, "pack_lower", "to");
  const auto* indices = pointer<const std::int64_t>(kept, "pack_lower", "kept");
  py::gil_scoped_release release;
  mosaic::pack_lower(source, target, batch, n, indices, count);
}

template <class T>
bool solve_right(Address a, Address b, std::int64_t n, std::int64_t rows, int threads) {
  T* matrix = pointer<T>(a, "solve_right", "a");
  T* right = pointer<T>(b, "solve_right", "b");
  py::gil_scoped_release release;
  return mosaic::solve_right(matrix, right, n, rows, threads);
}

#ifdef MOSAIC_WITH_CUDA
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

void bind_matrices(py::module_& module) {
  module.def(
      "add_compensated_lower",
      [](Address h, Address part, Address residual, std::int64_t n, int element_bytes,
         int threads) {
        check_common("add_compensated_lower", element_bytes, n, threads);
        (element_bytes == 4 ? add_compensated_lower<float> : add_compensated_lower<double>)(
            h, part, residual, n, threads);
      },
      py::arg("h"), py::arg("part"), py::arg("residual"), py::arg("n"), py::arg("element_bytes"),
      py::arg("threads"));

  module.def(
      "mirror_lower",
      [](Address h, std::int64_t n, double divisor, int element_bytes, int threads,
         Address residual) {
        check_common("mirror_lower", element_bytes, n, threads);
        (element_bytes == 4 ? mirror_lower<float> : mirror_lower<double>)(h, n, divisor, threads,
                                                                          residual);
      },
      py::arg("h"), py::arg("n"), py::arg("divisor"), py::arg("element_bytes"),
      py::arg("threads"), py::arg("residual") = 0);

  module.def(
      "invert_factors",
      [](Address matrices, Address out, std::int64_t batch, std::int64_t n, Address failed,
         int element_bytes, int threads) {
        check_common("invert_factors", element_bytes, n, threads);
        require(batch >= 1, "invert_factors", "batch", "at least 1", batch);
        (element_bytes == 4 ? invert_factors<float> : invert_factors<double>)(
            matrices, out, batch, n, failed, threads);
      },
      py::arg("matrices"), py::arg("out"), py::arg("batch"), py::arg("n"), py::arg("failed"),
      py::arg("element_bytes"), py::arg("threads"));

  module.def(
      "invert_matrices",
      [](Address matrices, std::int64_t batch, std::int64_t n, Address failed, int element_bytes,
         int threads) {
        check_common("invert_matrices", element_bytes, n, threads);
        require(batch >= 1, "invert_matrices", "batch", "at least 1", batch);
        (element_bytes == 4 ? invert_matrices<float> : invert_matrices<double>)(
            matrices, batch, n, failed, threads);
      },
      py::arg("matrices"), py::arg("batch"), py::arg("n"), py::arg("failed"),
      py::arg("element_bytes"), py::arg("threads"));

  module.def(
      "add_product",
      [](Address c, std::int64_t c_stride, const std::vector<TermTuple>& terms, std::int64_t rows,
         std::int64_t columns, double alpha, bool lower, int element_bytes, int threads) {
        check_common("add_product", element_bytes, rows, threads);
        require(columns >= 1 && columns <= c_stride, "add_product", "columns",
                "between 1 and c_stride", columns);
        (element_bytes == 4 ? add_product<float> : add_product<double>)(
            c, c_stride, terms, rows, columns, alpha, lower, threads);
      },
      py::arg("c"), py::arg("c_stride"), py::arg("terms"), py::arg("rows"), py::arg("columns"),
      py::arg("alpha"), py::arg("lower"), py::arg("element_bytes"), py::arg("threads"));

  module.def(
      "pack_lower",
      [](Address from, Address to, std::int64_t batch, std::int64_t n, Address kept,
         std::int64_t count, int element_bytes) {
        check_common("pack_lower", element_bytes, n, 1);
        require(batch >= 1, "pack_lower", "batch", "at least 1", batch);
        require(count >= 1 && count <= n, "pack_lower", "count", "between 1 and n", count);
        (element_bytes == 4 ? pack_lower<float> : pack_lower<double>)(from, to, batch, n, kept,
                                                                      count);
      },
      py::arg("source"), py::arg("target"), py::arg("batch"), py::arg("n"), py::arg("kept"),
      py::arg("count"), py::arg("element_bytes"));

  module.def(
      "solve_right",
      [](Address a, Address b, std::int64_t n, std::int64_t rows, int element_bytes, int threads) {
        check_common("solve_right", element_bytes, n, threads);
        require(rows >= 1, "solve_right", "rows", "at least 1", rows);
        return (element_bytes == 4 ? solve_right<float> : solve_right<double>)(a, b, n, rows,
                                                                               threads);
      },
      py::arg("a"), py::arg("b"), py::arg("n"), py::arg("rows"), py::arg("element_bytes"),
      py::arg("threads"));

#ifdef MOSAIC_WITH_CUDA
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
