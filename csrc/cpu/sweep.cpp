// The walk through a block of columns. Column j of a row, where it is pruned, has the error
//
//     e = w_j / U_jj        w_j <- 0        w_k <- w_k - e U_jk for k > j
//
// Rows are independent: a vector holds as many rows as fit in 64 bytes, and a tile of rows stays
// in the L1 cache for the whole block. A few columns at a time take in all errors to their left
// in registers (9 loads for 8 multiply-adds of a vector) and are then walked.
//
// Floor: m * width^2 / 2 multiply-adds a block; at n = 4608, m = 1152 and 36 blocks of 128 that is
// 0.34e9, 7 ms at the 50e9 a second that a product of floats reaches on one core (AVX-512).
// Measured there: 13 ms, with groups of 2:4 16 ms, and 12 to 15 ms for the masks of 50%. The
// products between the blocks take 240 ms.
#include "sweep.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "simd.h"

namespace mosaic {
namespace {

constexpr std::int64_t kColumns = 8;  // columns in registers: 8 chains hide a multiply-add

// The same column of several rows.
template <class T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(64)));
  static constexpr std::int64_t kRows = 64 / sizeof(T);
  alignas(64) Vector v;  // which the type alone says only where the baseline has AVX-512
};

template <class T>
using Vector = typename Lanes<T>::Vector;
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
template <class T>
using Integer = std::make_signed_t<Bits<T>>;

// A tile of rows of the block, transposed; the arrays hold width + kColumns columns.
template <class T>
struct Tile {
  Lanes<T>* current;  // weights until a column is walked, its errors from then on
  Lanes<T>* kept;     // 1 where a weight is kept, else 0
  Lanes<T>* result;   // the weights that are left
  const T* factor;    // U of the block, rows `ld` apart, followed by zeros
  const T* reciprocal;  // 1 / U_jj
  std::int64_t ld;
};

// Takes the errors of the columns [from, to) out of kColumns columns from `first` on.
template <class T>
MOSAIC_INLINE void catch_up(const Tile<T>& tile, std::int64_t from, std::int64_t to,
                            std::int64_t first, Vector<T> (&columns)[kColumns]) {
  for (std::int64_t i = 0; i < kColumns; ++i) columns[i] = tile.current[first + i].v;
  for (std::int64_t j = from; j < to; ++j) {
    const Vector<T> error = tile.current[j].v;
    const T* u = tile.factor + j * tile.ld + first;
    for (std::int64_t i = 0; i < kColumns; ++i) columns[i] -= error * u[i];
  }
}

// The mask of one N:M group, from the current weights of its columns [first, first + of).
template <class T>
MOSAIC_INLINE void choose_group(const Tile<T>& tile, std::int64_t first, std::int64_t keep,
                                std::int64_t of) {
  const auto drop = static_cast<Integer<T>>(of - keep);
  Lanes<T>* scores = tile.result + first;  // free until the group is walked
  for (std::int64_t c = 0; c < of; ++c) {
    const Vector<T> w = tile.current[first + c].v;
    scores[c].v = (w < T(0) ? -w : w) * tile.reciprocal[first + c];
  }
  for (std::int64_t c = 0; c < of; ++c) {
    const Vector<T> score = scores[c].v;
    auto rank = score != score;  // how many go before: all zero, scores are numbers
    for (std::int64_t d = 0; d < c; ++d) rank -= scores[d].v <= score;
    for (std::int64_t d = c + 1; d < of; ++d) rank -= scores[d].v < score;
    const Vector<T> zero = {};
    tile.kept[first + c].v = rank >= drop ? zero + T(1) : zero;
  }
}

// Walks up to kColumns columns that have taken in everything to their left.
template <class T>
MOSAIC_INLINE void walk_columns(const Tile<T>& tile, std::int64_t first, std::int64_t count,
                                Vector<T> (&columns)[kColumns], Lanes<T>& loss) {
  const Vector<T> zero = {};
#pragma GCC unroll 8
  for (std::int64_t i = 0; i < kColumns; ++i) {
    if (i < count) {
      const auto kept = tile.kept[first + i].v != zero;
      const Vector<T> error = kept ? zero : columns[i] * tile.reciprocal[first + i];
      tile.result[first + i].v = kept ? columns[i] : zero;
      tile.current[first + i].v = error;
      loss.v += error * error;
      const T* u = tile.factor + (first + i) * tile.ld + first;
#pragma GCC unroll 8
      for (std::int64_t k = i + 1; k < kColumns; ++k) columns[k] -= error * u[k];
    }
  }
}

// Takes the errors of the columns [from, to) out of the columns [begin, end).
template <class T>
MOSAIC_INLINE void advance(const Tile<T>& tile, std::int64_t from, std::int64_t to,
                           std::int64_t begin, std::int64_t end) {
  Vector<T> columns[kColumns];
  for (std::int64_t first = begin; first < end; first += kColumns) {
    catch_up(tile, from, to, first, columns);
    for (std::int64_t i = 0; i < kColumns; ++i) {
      if (first + i < end) tile.current[first + i].v = columns[i];
    }
  }
}

template <class T>
MOSAIC_INLINE void walk_tile_impl(const Tile<T>& tile, std::int64_t width, std::int64_t keep,
                                  std::int64_t of, Lanes<T>& loss) {
  Vector<T> columns[kColumns];
  // What lies to the left of a span is taken in at once for all groups that fit in kColumns.
  const std::int64_t group = of == 0 ? kColumns : of;
  const std::int64_t span = group * std::max<std::int64_t>(1, kColumns / group);
  for (std::int64_t begin = 0; begin < width; begin += span) {
    const std::int64_t end = std::min(width, begin + span);
    advance(tile, 0, begin, begin, end);
    for (std::int64_t left = begin; left < end; left += group) {
      const std::int64_t right = std::min(end, left + group);
      if (left > begin) advance(tile, begin, left, left, right);
      if (of > 0) choose_group(tile, left, keep, of);
      for (std::int64_t first = left; first < right; first += kColumns) {
        catch_up(tile, left, first, first, columns);
        walk_columns(tile, first, std::min(kColumns, right - first), columns, loss);
      }
    }
  }
}

// Rows [row, row + rows) of the block into the tile; what is beyond them is zero and kept.
template <class T>
MOSAIC_INLINE void load_tile(const SweepBlock<T>& block, const Tile<T>& tile, std::int64_t row,
                             std::int64_t rows) {
  const Lanes<T> zero = {};
  const Vector<T> one = zero.v + T(1);
  for (std::int64_t c = 0; c < block.width + kColumns; ++c) {
    tile.current[c] = zero;
    tile.kept[c].v = one;
  }
  for (std::int64_t l = 0; l < rows; ++l) {
    const T* weight = block.weight + (row + l) * block.n + block.begin;
    for (std::int64_t c = 0; c < block.width; ++c) tile.current[c].v[l] = weight[c];
    if (block.of > 0) continue;
    const std::uint8_t* mask = block.mask + (row + l) * block.n + block.begin;
    for (std::int64_t c = 0; c < block.width; ++c) tile.kept[c].v[l] = static_cast<T>(mask[c]);
  }
}

template <class T>
MOSAIC_INLINE void store_tile(const SweepBlock<T>& block, const Tile<T>& tile, std::int64_t row,
                              std::int64_t rows, const Lanes<T>& loss) {
  for (std::int64_t l = 0; l < rows; ++l) {
    T* weight = block.weight + (row + l) * block.n + block.begin;
    for (std::int64_t c = 0; c < block.width; ++c) weight[c] = tile.result[c].v[l];
    block.losses[row + l] += static_cast<double>(loss.v[l]);
    if (block.of == 0) continue;
    std::uint8_t* mask = block.mask + (row + l) * block.n + block.begin;
    for (std::int64_t c = 0; c < block.width; ++c) mask[c] = tile.kept[c].v[l] != T(0);
  }
  for (std::int64_t c = 0; c < block.width; ++c) {
    T* errors = block.errors + (block.begin + c) * block.m + row;
    std::memcpy(errors, &tile.current[c], sizeof(T) * rows);
  }
}

template <class T>
MOSAIC_INLINE void sweep_tile_impl(const SweepBlock<T>& block, const Tile<T>& tile,
                                   std::int64_t row) {
  const std::int64_t rows = std::min(Lanes<T>::kRows, block.m - row);
  Lanes<T> loss = {};
  load_tile(block, tile, row, rows);
  walk_tile_impl(tile, block.width, block.keep, block.of, loss);
  store_tile(block, tile, row, rows, loss);
}

// Scores as integers of the same order: the bits of a number that is not negative. The order of
// |W_ij| / U_jj is that of its square, which could overflow. A dead column scores 0.
template <class T>
MOSAIC_INLINE void score_impl(const SweepChoice<T>& choice, Bits<T>* scores) {
  std::vector<T> reciprocal(static_cast<std::size_t>(choice.width));
  for (std::int64_t c = 0; c < choice.width; ++c) {
    reciprocal[c] = T(1) / choice.factor[(choice.begin + c) * (choice.n + 1)];
  }
  const std::uint8_t* dead = choice.dead + choice.begin;
  for (std::int64_t i = 0; i < choice.m; ++i) {
    const T* weight = choice.weight + i * choice.n + choice.begin;
    Bits<T>* row = scores + i * choice.width;
#pragma omp simd
    for (std::int64_t c = 0; c < choice.width; ++c) {
      const T score = weight[c] * reciprocal[c];
      Bits<T> bits;
      std::memcpy(&bits, &score, sizeof(T));
      bits = (bits & ~(Bits<T>(1) << (8 * sizeof(T) - 1))) + 1;
      row[c] = dead[c] ? 0 : bits;
    }
  }
}

#define MOSAIC_SWEEP_STEPS(T)                                                                \
  MOSAIC_CLONES void sweep_tile(const SweepBlock<T>& block, const Tile<T>& tile,             \
                                std::int64_t row) {                                          \
    sweep_tile_impl(block, tile, row);                                                       \
  }                                                                                          \
  MOSAIC_CLONES void score(const SweepChoice<T>& choice, Bits<T>* scores) {                  \
    score_impl(choice, scores);                                                              \
  }

MOSAIC_SWEEP_STEPS(float)
MOSAIC_SWEEP_STEPS(double)

// The leading 15 bits of the scores find the bucket that the count falls in; only what is in it
// has to be put in order.
template <class T>
void choose_layer(const SweepChoice<T>& choice) {
  constexpr int kShift = 8 * sizeof(T) - 16;
  const std::int64_t total = choice.m * choice.width, count = *choice.count;
  std::vector<Bits<T>> scores(static_cast<std::size_t>(total));
  score(choice, scores.data());
  std::vector<std::int64_t> sizes(std::size_t(1) << 15);
  for (const Bits<T> score : scores) ++sizes[score >> kShift];
  std::int64_t below = 0;
  Bits<T> bucket = 0;
  while (below + sizes[bucket] < count) below += sizes[bucket++];

  std::vector<std::pair<Bits<T>, std::int64_t>> undecided;
  undecided.reserve(static_cast<std::size_t>(sizes[bucket]));
  for (std::int64_t i = 0; i < choice.m; ++i) {
    const Bits<T>* row = scores.data() + i * choice.width;
    std::uint8_t* mask = choice.mask + i * choice.n + choice.begin;
    for (std::int64_t c = 0; c < choice.width; ++c) {
      const Bits<T> here = row[c] >> kShift;
      mask[c] = here >= bucket;
      if (here == bucket) undecided.emplace_back(row[c], i * choice.width + c);
    }
  }
  const auto last = undecided.begin() + (count - below);
  std::nth_element(undecided.begin(), last, undecided.end());
  for (auto entry = undecided.begin(); entry != last; ++entry) {
    const std::int64_t i = entry->second / choice.width, c = entry->second % choice.width;
    choice.mask[i * choice.n + choice.begin + c] = 0;
  }
}

}  // namespace

template <class T>
void choose_weights(const SweepChoice<T>& first, std::int64_t batch, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (batch > 1)
  for (std::int64_t b = 0; b < batch; ++b) {
    SweepChoice<T> choice = first;
    choice.factor += b * first.n * first.n;
    choice.weight += b * first.m * first.n;
    choice.dead += b * first.n;
    choice.count += b;
    choice.mask += b * first.m * first.n;
    choose_layer(choice);
  }
  (void)threads;
}

template <class T>
void sweep_block(const SweepBlock<T>& first, std::int64_t batch, int threads) {
  const std::int64_t n = first.n, m = first.m, width = first.width, ld = width + kColumns;
  const std::int64_t tiles = (m + Lanes<T>::kRows - 1) / Lanes<T>::kRows;
  // U is packed: rows of the whole matrix may be a multiple of 4096 bytes apart, where only a
  // few of them fit in a cache at a time.
  std::vector<T> factors(static_cast<std::size_t>(batch * width * ld));
  std::vector<T> reciprocals(static_cast<std::size_t>(batch * width));
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t j = 0; j < width; ++j) {
      const T* row = first.factor + b * n * n + (first.begin + j) * n + first.begin;
      std::copy(row, row + width, factors.data() + (b * width + j) * ld);
      reciprocals[b * width + j] = T(1) / row[j];
    }
  }
#pragma omp parallel num_threads(threads)
  {
    std::vector<Lanes<T>> columns(static_cast<std::size_t>(3 * ld));
#pragma omp for schedule(static)
    for (std::int64_t index = 0; index < batch * tiles; ++index) {
      const std::int64_t b = index / tiles;
      SweepBlock<T> block = first;
      block.weight += b * m * n;
      block.mask += b * m * n;
      block.errors += b * n * m;
      block.losses += b * m;
      const Tile<T> tile{columns.data(),
                         columns.data() + ld,
                         columns.data() + 2 * ld,
                         factors.data() + b * width * ld,
                         reciprocals.data() + b * width,
                         ld};
      sweep_tile(block, tile, index % tiles * Lanes<T>::kRows);
    }
  }
  (void)threads;
}

template void choose_weights<float>(const SweepChoice<float>&, std::int64_t, int);
template void choose_weights<double>(const SweepChoice<double>&, std::int64_t, int);
template void sweep_block<float>(const SweepBlock<float>&, std::int64_t, int);
template void sweep_block<double>(const SweepBlock<double>&, std::int64_t, int);

}  // namespace mosaic
