// The CPU's products, inverse and solve as a program for the sanitizers: buffers of exact size, odd
// shapes, every edge of a tile, against sums written out.
#ifdef MOSAIC_HOST_MAIN
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/cholesky.h"
#include "cpu/factor.h"
#include "cpu/product.h"
#include "cpu/solve.h"

namespace {

using mosaic::Element;
using mosaic::Operand;
using mosaic::Product;
using mosaic::Term;

double value(std::int64_t i) { return static_cast<double>((i * 7919) % 101) / 101 - 0.5; }

template <class T>
std::vector<T> numbers(std::int64_t count) {
  std::vector<T> result(count);
  for (std::int64_t i = 0; i < count; ++i) result[i] = static_cast<T>(value(i));
  return result;
}

bool near(double a, double b, double tolerance) { return std::abs(a - b) <= tolerance; }

// One product with a second term that is stored transposed.
template <class T>
bool check_product(std::int64_t depth, std::int64_t rows, std::int64_t columns, bool lower) {
  constexpr Element kType = sizeof(T) == 4 ? Element::f32 : Element::f64;
  const auto p = numbers<T>(depth * rows), q = numbers<T>(depth * columns);
  auto c = numbers<T>(rows * columns);
  const auto before = c;
  const Term terms[] = {{{p.data(), kType, rows, 1}, {q.data(), kType, columns, 1}, depth},
                        {{p.data(), kType, 1, depth}, {q.data(), kType, 1, depth}, depth}};
  mosaic::add_product(Product<T>{c.data(), columns, terms, 2, rows, columns, T(2), lower}, 1);
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      double expected = before[i * columns + j];
      for (std::int64_t k = 0; k < depth && !(lower && j > i); ++k) {
        expected += 2.0 * p[k * rows + i] * q[k * columns + j];
        expected += 2.0 * p[i * depth + k] * q[j * depth + k];
      }
      if (!near(c[i * columns + j], expected, sizeof(T) == 4 ? 1e-3 : 1e-10)) return false;
    }
  }
  return true;
}

bool check_narrow() {
  const std::int64_t depth = 5, n = 37;
  std::vector<std::uint16_t> bits(depth * n);
  for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = 0x3f80;  // 1 in bf16
  std::vector<float> c(n * n, 0.0f);
  const Operand x{bits.data(), Element::bf16, n, 1};
  const Term term{x, x, depth};
  mosaic::add_product(Product<float>{c.data(), n, &term, 1, n, n, 1.0f, true}, 1);
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t j = 0; j < n; ++j)
      if (c[i * n + j] != (j <= i ? 5.0f : 0.0f)) return false;
  return true;
}

template <class T>
std::vector<T> definite(std::int64_t n) {
  auto a = numbers<T>(n * n);
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < i; ++j) a[j * n + i] = a[i * n + j];
    a[i * n + i] = T(n);
  }
  return a;
}

// L^-1 A L^-T is the identity.
template <class T>
bool check_factor(std::int64_t n) {
  const auto a = definite<T>(n);
  auto used = a;
  std::vector<T> factor(n * n, T(0));
  std::uint8_t failed = 0;
  mosaic::invert_factors(used.data(), factor.data(), 1, n, &failed, 1);
  if (failed) return false;
  std::vector<double> half(n * n, 0.0);
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t k = 0; k <= i; ++k)
      for (std::int64_t j = 0; j < n; ++j) half[i * n + j] += double(factor[i * n + k]) * a[k * n + j];
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (std::int64_t k = 0; k <= j; ++k) sum += half[i * n + k] * double(factor[j * n + k]);
      if (!near(sum, i == j, sizeof(T) == 4 ? 1e-3 : 1e-9)) return false;
    }
  }
  return true;
}

// A A^-1 is the identity, and X A is B.
template <class T>
bool check_inverse_and_solve(std::int64_t n, std::int64_t rows) {
  const double tolerance = sizeof(T) == 4 ? 1e-3 : 1e-9;
  const auto a = definite<T>(n);
  auto inverse = a;
  std::uint8_t failed = 0;
  mosaic::invert_matrices(inverse.data(), 1, n, &failed, 1);
  if (failed) return false;
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (std::int64_t k = 0; k < n; ++k) sum += double(a[i * n + k]) * inverse[k * n + j];
      if (!near(sum, i == j, tolerance)) return false;
    }
  }
  const auto b = numbers<T>(rows * n);
  auto x = b, used = a;
  if (!mosaic::solve_right(used.data(), x.data(), n, rows, 1)) return false;
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (std::int64_t k = 0; k < n; ++k) sum += double(x[i * n + k]) * a[k * n + j];
      if (!near(sum, b[i * n + j], tolerance)) return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  bool good = check_narrow();
  for (const bool lower : {false, true}) {
    for (const std::int64_t n : {1, 13, 33, 97}) {
      good = good && check_product<float>(3, n, n, lower);
      good = good && check_product<double>(130, n, n, lower);
    }
  }
  good = good && check_product<float>(300, 11, 70, false);
  for (const std::int64_t n : {1, 40, 129, 260}) {
    good = good && check_inverse_and_solve<float>(n, 3);
    good = good && check_inverse_and_solve<double>(n, 17);
    good = good && check_factor<float>(n) && check_factor<double>(n);
  }
  if (!good) std::printf("a product, an inverse or a solve differs\n");
  return good ? 0 : 1;
}
#endif
