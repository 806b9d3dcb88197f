// The Python module mosaic_kernels._C.
#include "bindings/common.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ pieces of mosaic_kernels; call the functions of mosaic_kernels instead.";
  module.attr("compiler") = MOSAIC_COMPILER;
  module.attr("cuda_architectures") = MOSAIC_CUDA_ARCHITECTURES;
#ifdef _OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
  bind_matrices(module);
  bind_prune(module);
  bind_sweep(module);
}
