#pragma once

#include <cstdint>

#include "panel.h"

namespace mosaic {

// Removes `pivots` groups from every matrix of the batch. A batch is shared by layers, a single
// layer by columns, with a barrier for each removal.
template <class T>
void prune_panel(const Panel<T>& first, std::int64_t batch, int threads);

// Packs the lower triangles of a batch of n x n matrices into those of a batch of count x count
// matrices, elsewhere or at the same address. kept: (batch, count) ascending rows and columns.
template <class T>
void pack_lower(const T* from, T* to, std::int64_t batch, std::int64_t n, const std::int64_t* kept,
                std::int64_t count);

}  // namespace mosaic
