// The packing and the innermost kernel of add_product, as templates that are inlined into a
// function for each instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "product.h"
#include "simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define MOSAIC_X86_KERNELS 1
#else
#define MOSAIC_X86_KERNELS 0
#endif

namespace mosaic {

// Rows [row, row_end) x columns [column, column_end) of C, from packed panels of `depth` rows
// that are panel_depth rows apart.
template <class T>
struct Block {
  T* c;
  std::int64_t c_stride;
  const T* p;  // the panels of this block's rows
  const T* q;  // the panels of this block's columns
  std::int64_t depth, row, row_end, column, column_end, panel_depth;
  T alpha;
  bool lower;
};

MOSAIC_INLINE float widen(float value) { return value; }
MOSAIC_INLINE double widen(double value) { return value; }

struct BFloat16 {
  std::uint16_t bits;
};

MOSAIC_INLINE float widen(BFloat16 value) {
  const std::uint32_t bits = std::uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

struct Float16 {
  std::uint16_t bits;
};

// Exponent and mantissa move to their place in a float, where subnormals of half precision are
// 2^-112 times too small before the product; infinity and not-a-number are put right.
MOSAIC_INLINE float widen(Float16 value) {
  const std::uint32_t magnitude = std::uint32_t(value.bits & 0x7fffu) << 13;
  const std::uint32_t sign = std::uint32_t(value.bits & 0x8000u) << 16;
  float result;
  std::memcpy(&result, &magnitude, sizeof(result));
  result *= 0x1p112f;
  std::uint32_t bits;
  std::memcpy(&bits, &result, sizeof(bits));
  bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  bits |= sign;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// Packs columns [i0, i0 + valid) of rows [k0, k0 + depth) into out[k * width + i], zero-padded.
template <class S, class T>
MOSAIC_INLINE void pack_from(const S* from, std::int64_t k_stride, std::int64_t i_stride,
                             std::int64_t depth, std::int64_t valid, std::int64_t width, T* out) {
  if (i_stride == 1) {
    for (std::int64_t k = 0; k < depth; ++k) {
      const S* source = from + k * k_stride;
      T* target = out + k * width;
      for (std::int64_t i = 0; i < valid; ++i) target[i] = static_cast<T>(widen(source[i]));
      for (std::int64_t i = valid; i < width; ++i) target[i] = T(0);
    }
    return;
  }
  for (std::int64_t i = 0; i < width; ++i) {
    const S* source = from + i * i_stride;
    for (std::int64_t k = 0; k < depth; ++k)
      out[k * width + i] = i < valid ? static_cast<T>(widen(source[k * k_stride])) : T(0);
  }
}

template <class T>
MOSAIC_INLINE void pack_panel(const Operand& from, std::int64_t k0, std::int64_t depth,
                              std::int64_t i0, std::int64_t valid, std::int64_t width, T* out) {
  const std::int64_t first = k0 * from.k_stride + i0 * from.i_stride;
  const std::int64_t ks = from.k_stride, is = from.i_stride;
  if (sizeof(T) == sizeof(double)) {
    pack_from(static_cast<const double*>(from.data) + first, ks, is, depth, valid, width, out);
  } else if (from.type == Element::f32) {
    pack_from(static_cast<const float*>(from.data) + first, ks, is, depth, valid, width, out);
  } else if (from.type == Element::bf16) {
    pack_from(static_cast<const BFloat16*>(from.data) + first, ks, is, depth, valid, width, out);
  } else {
    pack_from(static_cast<const Float16*>(from.data) + first, ks, is, depth, valid, width, out);
  }
}

// A tile of ROWS x 2 vectors: alpha * sum over k of p[k][i] q[k][j], added to C, or written to
// `part` where only some of it belongs to C. Without a prefetch of C, which cost a third of the
// speed: the processor's own does better.
template <class T, int BYTES, int ROWS>
MOSAIC_INLINE void run_tile(const T* p, const T* q, std::int64_t depth, T alpha, T* c,
                            std::int64_t c_stride, bool add) {
  constexpr int kLanes = BYTES / int(sizeof(T));
  typedef T Vector __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
  Vector sums[ROWS][2];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    sums[i][0] = Vector{};
    sums[i][1] = Vector{};
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    const Vector q0 = *reinterpret_cast<const Vector*>(q);
    const Vector q1 = *reinterpret_cast<const Vector*>(q + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      sums[i][0] += p[i] * q0;
      sums[i][1] += p[i] * q1;
    }
    p += ROWS;
    q += 2 * kLanes;
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    Vector* row = reinterpret_cast<Vector*>(c + i * c_stride);
    row[0] = add ? row[0] + alpha * sums[i][0] : alpha * sums[i][0];
    row[1] = add ? row[1] + alpha * sums[i][1] : alpha * sums[i][1];
  }
}

template <class T, int BYTES, int ROWS>
MOSAIC_INLINE void run_block(const Block<T>& block) {
  constexpr std::int64_t kWidth = 2 * BYTES / std::int64_t(sizeof(T));
  alignas(64) T part[ROWS * kWidth];
  const T* p = block.p;
  for (std::int64_t i = block.row; i < block.row_end; i += ROWS, p += ROWS * block.panel_depth) {
    const std::int64_t rows = std::min<std::int64_t>(ROWS, block.row_end - i);
    const T* q = block.q;
    for (std::int64_t j = block.column; j < block.column_end;
         j += kWidth, q += kWidth * block.panel_depth) {
      if (block.lower && j > i + rows - 1) break;
      const std::int64_t columns = std::min(kWidth, block.column_end - j);
      T* c = block.c + i * block.c_stride + j;
      const bool whole = rows == ROWS && columns == kWidth;
      if (whole && !(block.lower && j + kWidth - 1 > i)) {
        run_tile<T, BYTES, ROWS>(p, q, block.depth, block.alpha, c, block.c_stride, true);
        continue;
      }
      run_tile<T, BYTES, ROWS>(p, q, block.depth, block.alpha, part, kWidth, false);
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t end = block.lower ? std::min(columns, i + r - j + 1) : columns;
        for (std::int64_t s = 0; s < end; ++s) c[r * block.c_stride + s] += part[r * kWidth + s];
      }
    }
  }
}

}  // namespace mosaic
