// Both operands are packed, 256 rows of depth at a time, into panels as wide as the tile that the
// innermost kernel keeps in registers; then tiles of C are shared out among the threads.
#include "product.h"

#include <algorithm>
#include <cstring>
#include <memory>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "product_kernel.h"

// The widest vectors to use, in bits; the tests build the narrower paths with it.
#ifndef MOSAIC_VECTOR_BITS
#define MOSAIC_VECTOR_BITS 512
#endif

namespace mosaic {
namespace {

constexpr std::int64_t kDepth = 256;    // a panel of Q is then 32 KiB of floats
constexpr std::int64_t kRows = 192;     // rows and
constexpr std::int64_t kColumns = 512;  // columns of a thread's task: Q's part stays in L2
constexpr std::int64_t kAlignment = 64;
constexpr double kSharedWork = 3e7;  // multiply-adds of 0.3 ms: less is not worth a barrier

struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(kAlignment)); }
};

// Memory of the calling thread that is kept from one product to the next: fresh pages, which the
// system clears one by one, cost as much as a product of 128 x 768 x 768.
void* scratch(std::size_t bytes) {
  thread_local std::unique_ptr<void, Free> memory;
  thread_local std::size_t capacity = 0;
  if (bytes > capacity) {
    memory.reset();
    memory.reset(::operator new(bytes, std::align_val_t(kAlignment)));
    capacity = bytes;
  }
  return memory.get();
}

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// What a processor's instruction set gives.
template <class T>
struct Engine {
  std::int64_t tile_rows, tile_columns;
  void (*pack)(const Operand&, std::int64_t k0, std::int64_t depth, std::int64_t i0,
               std::int64_t valid, std::int64_t width, T* out);
  void (*block)(const Block<T>&);
};

#if MOSAIC_X86_KERNELS
#define MOSAIC_ENGINE(NAME, TARGET, T, BYTES, ROWS)                                            \
  __attribute__((target(TARGET))) void pack_##NAME(const Operand& from, std::int64_t k0,       \
                                                   std::int64_t depth, std::int64_t i0,        \
                                                   std::int64_t valid, std::int64_t width,     \
                                                   T* out) {                                   \
    pack_panel(from, k0, depth, i0, valid, width, out);                                        \
  }                                                                                            \
  __attribute__((target(TARGET))) void block_##NAME(const Block<T>& block) {                   \
    run_block<T, BYTES, ROWS>(block);                                                          \
  }
#define MOSAIC_AVX512 "avx512f,avx512vl,avx512bw,avx512dq,fma,f16c,prefer-vector-width=512"
MOSAIC_ENGINE(avx512_f32, MOSAIC_AVX512, float, 64, 12)
MOSAIC_ENGINE(avx512_f64, MOSAIC_AVX512, double, 64, 12)
MOSAIC_ENGINE(avx2_f32, "avx2,fma,f16c", float, 32, 6)
MOSAIC_ENGINE(avx2_f64, "avx2,fma,f16c", double, 32, 6)
#undef MOSAIC_ENGINE
#endif

template <class T>
void pack_generic(const Operand& from, std::int64_t k0, std::int64_t depth, std::int64_t i0,
                  std::int64_t valid, std::int64_t width, T* out) {
  pack_panel(from, k0, depth, i0, valid, width, out);
}

template <class T>
void block_generic(const Block<T>& block) {
  run_block<T, 16, 4>(block);
}

template <class T>
constexpr std::int64_t tile_columns(std::int64_t bytes) {
  return 2 * bytes / static_cast<std::int64_t>(sizeof(T));
}

#if MOSAIC_X86_KERNELS
int vector_bits() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    return std::min(512, MOSAIC_VECTOR_BITS);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return std::min(256, MOSAIC_VECTOR_BITS);
  return 128;
}
#endif

template <class T>
Engine<T> choose_engine();

template <>
Engine<float> choose_engine<float>() {
#if MOSAIC_X86_KERNELS
  if (vector_bits() == 512) return {12, tile_columns<float>(64), pack_avx512_f32, block_avx512_f32};
  if (vector_bits() == 256) return {6, tile_columns<float>(32), pack_avx2_f32, block_avx2_f32};
#endif
  return {4, tile_columns<float>(16), pack_generic<float>, block_generic<float>};
}

template <>
Engine<double> choose_engine<double>() {
#if MOSAIC_X86_KERNELS
  if (vector_bits() == 512)
    return {12, tile_columns<double>(64), pack_avx512_f64, block_avx512_f64};
  if (vector_bits() == 256) return {6, tile_columns<double>(32), pack_avx2_f64, block_avx2_f64};
#endif
  return {4, tile_columns<double>(16), pack_generic<double>, block_generic<double>};
}

template <class T>
struct Work {
  const Product<T>& product;
  Engine<T> engine;
  T* packed_p;
  T* packed_q;
  std::int64_t p_panels, row_tasks, column_tasks, panel_depth;

  // Rows [k0, k0 + depth) of the terms, one below the other.
  void pack(std::int64_t panel, std::int64_t k0, std::int64_t depth) const {
    const bool is_p = panel < p_panels;
    const std::int64_t width = is_p ? engine.tile_rows : engine.tile_columns;
    const std::int64_t index = is_p ? panel : panel - p_panels;
    const std::int64_t end = is_p ? product.rows : product.columns;
    T* out = (is_p ? packed_p : packed_q) + index * width * panel_depth;
    std::int64_t first = 0;  // row of the stack where the term begins
    for (int t = 0; t < product.count; ++t) {
      const Term& term = product.terms[t];
      const std::int64_t from = std::max(k0, first);
      const std::int64_t to = std::min(k0 + depth, first + term.depth);
      if (from < to) {
        engine.pack(is_p ? term.p : term.q, from - first, to - from, index * width,
                    std::min(width, end - index * width), width, out + (from - k0) * width);
      }
      first += term.depth;
    }
  }

  void run(std::int64_t task, std::int64_t depth, std::int64_t task_rows,
           std::int64_t task_columns) const {
    const std::int64_t row = task / column_tasks * task_rows;
    const std::int64_t column = task % column_tasks * task_columns;
    const std::int64_t row_end = std::min(row + task_rows, product.rows);
    if (product.lower && column > row_end - 1) return;
    engine.block({product.c, product.c_stride, packed_p + row * panel_depth,
                  packed_q + column * panel_depth,
                  depth, row, row_end, column, std::min(column + task_columns, product.columns),
                  panel_depth, product.alpha, product.lower});
  }
};

}  // namespace

template <class T>
void add_product(const Product<T>& product, int threads) {
  static const Engine<T> engine = choose_engine<T>();
  std::int64_t total = 0;
  for (int t = 0; t < product.count; ++t) total += product.terms[t].depth;
  if (product.rows == 0 || product.columns == 0 || total == 0) return;
  if (double(product.rows) * double(product.columns) * double(total) < kSharedWork) threads = 1;
  const std::int64_t tr = engine.tile_rows, tc = engine.tile_columns;
  const std::int64_t p_panels = divide_up(product.rows, tr);
  const std::int64_t q_panels = divide_up(product.columns, tc);
  const std::int64_t task_rows = kRows / tr * tr, task_columns = kColumns / tc * tc;
  const std::int64_t panel_depth = std::min(kDepth, total);
  const std::int64_t p_size = divide_up(p_panels * tr * panel_depth, kAlignment) * kAlignment;
  const std::int64_t q_size = q_panels * tc * panel_depth;
  T* packed = static_cast<T*>(scratch(static_cast<std::size_t>(p_size + q_size) * sizeof(T)));
  const Work<T> work{product,
                     engine,
                     packed,
                     packed + p_size,
                     p_panels,
                     divide_up(product.rows, task_rows),
                     divide_up(product.columns, task_columns),
                     panel_depth};
  const std::int64_t panels = p_panels + q_panels, tasks = work.row_tasks * work.column_tasks;
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (std::int64_t k = 0; k < total; k += kDepth) {
    const std::int64_t depth = std::min(kDepth, total - k);
#pragma omp for schedule(static)
    for (std::int64_t panel = 0; panel < panels; ++panel) work.pack(panel, k, depth);
    // The last rows of a triangle are the longest: they go first.
#pragma omp for schedule(dynamic)
    for (std::int64_t task = 0; task < tasks; ++task)
      work.run(tasks - 1 - task, depth, task_rows, task_columns);
  }
  (void)threads;
}

template void add_product<float>(const Product<float>&, int);
template void add_product<double>(const Product<double>&, int);

}  // namespace mosaic
