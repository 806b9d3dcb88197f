// What the parts of the Python module share. They take addresses, sizes and strides; tensors,
// shapes and types are checked by the Python functions that call them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "checks.h"

namespace mosaic {

namespace py = pybind11;
using Address = std::uintptr_t;

inline void check_common(const char* function, std::int64_t element_bytes, std::int64_t n, int threads) {
  require(element_bytes == 4 || element_bytes == 8, function, "element_bytes", "4 or 8",
          element_bytes);
  require(n >= 1, function, "n", "at least 1", n);
  require(threads >= 1, function, "threads", "at least 1", threads);
}

}  // namespace mosaic

void bind_matrices(pybind11::module_& module);
void bind_prune(pybind11::module_& module);
void bind_sweep(pybind11::module_& module);
