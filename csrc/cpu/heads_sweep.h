// One sweep over blocks of rows: for each block the logits, the losses and the gradients, or those of them that an
// operator needs, while the block's features are in the cache.
#pragma once

#include <ATen/Parallel.h>

#include <functional>
#include <optional>

#include "heads_parameters.h"
#include "heads_rows.h"

namespace grl_ext::cpu {

// Multiply-adds below which another thread costs more than it saves.
constexpr int64_t kWorkPerThread = 1 << 20;

// Fewer features than these take as long: their sums over a vector's lanes, and the losses, cost more than the products.
// `python bench/sweep.py` found it.
constexpr int64_t kLeastFeatures = 64;

// `passes`: how often the features are multiplied.
inline int64_t thread_count(int64_t rows, int64_t features, int64_t columns, int64_t passes) {
  const int64_t useful = rows * std::max(features, kLeastFeatures) * columns * passes / kWorkPerThread;
  return std::max<int64_t>(1, std::min({static_cast<int64_t>(at::get_num_threads()), useful, (rows + 3) / 4}));
}

inline int64_t block_rows(int64_t features) {
  return std::clamp<int64_t>(kernels().block_elements / std::max<int64_t>(1, features) / 4 * 4, 8, kMaxBlockRows);
}

// From this size on the features' gradient is stored past the caches, by the kernels that can. Features and gradient
// together would exceed the part of the last cache that a few cores share, 16 MB or 32 MB. (What the system says is its
// size may be that of all its parts.)
constexpr size_t kStreamedBytes = 8 << 20;

// What a sweep does, in this order. A list of matrices has one for each of the operator's heads, or is empty.
template <class T>
struct Sweep {
  // A head's losses in a block: sets grad_logits from logits, and `scaled` to the same times the head's factor. All
  // three have their columns kMaxBlockRows apart.
  using Loss = std::function<void(
      int64_t thread, int64_t head, int64_t row, int64_t rows, const T* logits, T* grad_logits, T* scaled)>;

  const HeadColumns& columns;
  const int64_t rows, features, threads;
  const Tensor& x;  // (rows, features), if logits or a weight's gradient are computed
  const Parameters<T>* parameters = nullptr;  // if logits or the features' gradient are computed
  at::TensorList logits = {};  // computed, if there are parameters; else read
  Loss loss = nullptr;
  at::TensorList grad_logits = {};  // written, if there is a loss; else read
  Gradients* gradients = nullptr;

  void run() const;
};

template <class T>
void Sweep<T>::run() const {
  const int64_t k = columns.total(), step = block_rows(features);
  const auto& kernels = heads_kernels<T>();
  const bool computes_logits = parameters && !logits.empty();
  const bool of_x = gradients && gradients->needs.x(), of_weight = gradients && gradients->needs.any_weight();
  std::vector<Columns> x_columns;
  std::optional<ParameterGradients<T>> sums;
  if (gradients) {
    x_columns = columns.runs([&](int64_t head) { return gradients->factors[head] != 0; });
    sums.emplace(*gradients, columns, threads, features);
    if (of_x) {
      gradients->x = empty({rows, features}, gradients->dtype);  // after all others: see empty()
      gradients->x_has_values = true;
    }
  }
  const auto sweep_rows = [&](int64_t thread, int64_t begin, int64_t end) {
    auto x_rows = computes_logits || of_weight ? std::optional<Rows<T>>(std::in_place, x, features) : std::nullopt;
    auto dx_rows = of_x ? std::optional<Rows<T>>(std::in_place, gradients->x, features) : std::nullopt;
    const bool streams = of_x && !dx_rows->converts() && gradients->x.nbytes() >= kStreamedBytes;
    HeadRows<T> z_rows(columns, logits), g_rows(columns, grad_logits);
    std::vector<T> z(k * kMaxBlockRows), g(k * kMaxBlockRows), scaled(k * kMaxBlockRows);
    for (int64_t r = begin; r < end; r += step) {
      const int64_t height = std::min(step, end - r);
      const T* block = x_rows ? x_rows->read(r, height) : nullptr;
      if (computes_logits) {
        const T* next = x_rows->ahead(std::min(r + height, end - 1));
        kernels.logits(z.data(), block, next, parameters->weight(), parameters->bias(), height, features, k);
        z_rows.write(z.data(), r, height);
      } else {
        z_rows.read(z.data(), r, height);
      }
      if (loss) {
        for (int64_t i = 0; i < columns.count(); ++i) {
          const int64_t at = columns.begin(i) * kMaxBlockRows;
          loss(thread, columns.head(i), r, height, z.data() + at, g.data() + at, scaled.data() + at);
        }
        g_rows.write(g.data(), r, height);
      } else {
        g_rows.read(g.data(), r, height);
        for (int64_t i = 0; of_x && i < columns.count(); ++i) {
          const T factor = static_cast<T>(gradients->factors[columns.head(i)]);
          for (int64_t j = columns.begin(i) * kMaxBlockRows; j < columns.begin(i + 1) * kMaxBlockRows; ++j) {
            scaled[j] = g[j] * factor;
          }
        }
      }
      if (of_x || of_weight) {
        kernels.gradients(
            {.dx = of_x ? dx_rows->write(r) : nullptr,
             .dw = sums->weight(thread),
             .grad_logits = g.data(),
             .scaled = scaled.data(),
             .x = block,
             .weight = parameters ? parameters->weight() : nullptr,
             .rows = height,
             .features = features,
             .columns = k,
             .dx_columns = x_columns.data(),
             .dx_runs = static_cast<long>(x_columns.size()),
             .dw_columns = sums->weight_columns().data(),
             .dw_runs = static_cast<long>(sums->weight_columns().size()),
             .dx_streams = streams});
      }
      if (of_x) {
        dx_rows->written(r, height);
      }
      if (sums) {
        sums->end_block(thread, g.data(), height);
      }
    }
  };
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      sweep_rows(t, rows * t / threads, rows * (t + 1) / threads);
    }
  });
  if (sums) {
    sums->total();
  }
}

}  // namespace grl_ext::cpu
