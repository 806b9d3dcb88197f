#pragma once

#include <cstdint>

#include "panel.h"

namespace mosaic {

// Removes `pivots` groups from every matrix of the batch. A batch is shared by layers, a single
// layer by columns, with a barrier for each removal.
template <class T>
void prune_panel(const Panel<T>& first, std::int64_t batch, int threads);

}  // namespace mosaic
