// Every decision about how the heads' kernels are launched, from sizes alone; heads_*_launches.cuh act on it. Plain
// C++: no CUDA, no ATen.
//
// A block of threads sweeps over its own rows, a tile of them in shared memory at a time. During the whole sweep it
// keeps the weight in shared memory and its part of the weight's gradient in registers. Features too wide for either
// are swept in slices.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

namespace grl_ext {

// The sweep gives every column of a row its own lane of a warp. More columns than lanes go to matrix products.
constexpr int kMaxSweepColumns = 32;

// The register tile: a thread holds kPiece neighbouring features, kColumnGroup columns and, backward, kRowGroup rows.
// The tile of the logits is as many numbers as a warp has lanes.
constexpr int kPiece = 4;
constexpr int kColumnGroup = 4;
constexpr int kRowGroup = 8;

// Tiles of kPiece x kColumnGroup of the weight's gradient that a thread owns: D * K up to 16384 in one slice with 512
// threads. They take 32 registers in f32, beside which the rest just fits into the 128 that 512 threads may have; with
// three tiles ptxas spills.
constexpr int kTilesPerThread = 2;

// The tile of the matrix units: their products take matrices of kMatrixSide x kMatrixSide, in columns
// kMatrixSide x kMatrixColumns. A warp holds the weight's gradient of up to kMatrixBlocks such blocks of features and
// columns, in 64 of its lanes' registers. Rows in shared memory are kMatrixPadding elements longer than they are wide,
// an odd multiple of 16 bytes then: the eight rows of a matrix lie in different banks.
constexpr int kMatrixSide = 16;
constexpr int kMatrixColumns = 8;
constexpr int kMatrixBlocks = 16;
constexpr int kMatrixPadding = 8;

// Features too wide for one block's memory are swept in slices, the blocks of a slice along the grid's second
// dimension. A slice is a multiple of 32 features: whole sectors of 32 bytes for every type. The narrowest fits any
// GPU, and more of them than the grid may have there cannot be launched.
constexpr int kSliceMultiple = 32;
constexpr int kMaxGridY = 65535;
constexpr int kMaxFeatures = kMaxGridY * kSliceMultiple;

// The columns of a product are padded to a multiple of this, so that rows of halves begin at multiples of 16 bytes,
// which the fast products ask for.
constexpr int kProductColumns = 8;

// Up to this many targets, rows times heads, every block adds the rows' weights up itself. A thread has eight in flight
// (heads_norm.cuh), so that 8192 are four waits for the L2 cache, some 2 us; and the 264 blocks of an H100 read 17 MB
// from it, some 3 us. The launch of a kernel that does it once takes as long. Counted, not measured.
constexpr int64_t kMaxRowsCountedInPlace = 8192;

constexpr int kNormThreads = 256;
constexpr int kMaxNormBlocks = 128;
constexpr int kProductThreads = 256;
constexpr int kTotalThreads = 256;
constexpr int kSmallBlocksPerSm = 8;  // of 256 threads (the three constants above): a multiprocessor's 2048

// The most static shared memory of the sweep, which describes columns and heads. A block's memory is this and the
// dynamic part.
constexpr int kStaticBytes = 4096;

// What the heads' products run on: the lanes of a sweep, the matrix units of a sweep, or matrix products of their own.
enum class HeadsUnits { kBest, kLanes, kMatrix, kProducts };

struct HeadsDevice {
  int sm_count;
  int shared_bytes;  // that a block may ask for
  int capability = 0;  // 80 for 8.0
  HeadsUnits asked = HeadsUnits::kBest;  // where there is a choice
};

struct HeadsProblem {
  int64_t rows;
  int features;
  int columns;
  int target_bytes;  // of all heads' targets and sample weights in a row; 0: there is no loss
  int64_t rows_to_count;  // heads times rows, to be read for the norms; 0: there are none
  int element_bytes;  // of the tensors
  int arithmetic_bytes;  // of what they are computed in
  bool weight_gradient;
  bool logits_only;
  bool any_range = false;  // the logits' gradients may be of any size: too small or large for the matrix units' f16
};

struct Sweep {
  int threads;
  int tile_rows;  // a multiple of kRowGroup
  int stages;  // tiles in shared memory: with two, one is copied while the other is computed with
  int slice_features;  // a multiple of kPiece
  int slices;
  int blocks;
  int64_t rows_per_block;
  int row_lanes;  // lanes of a warp that a row of the logits gets
  int pitch;  // elements from one row of x or of the weight in shared memory to the next
  int matrix_groups;  // of kMatrixColumns columns, on the matrix units: 1, 2 or 4; 0: on lanes
  int rows_at_once;  // that a warp takes: 32 / row_lanes

  // Where things lie in shared memory, in bytes; the tiles of x come first.
  int weight_at;
  int targets_at;
  int target_bytes;  // of a row
  int sums_at;
  int g_at;
  int scaled_at;
  int scaled_pitch;
  int row_units_at;
  int column_units_at;
  int zeros_at;
  int shared_bytes;
};

constexpr int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

constexpr int64_t round_up(int64_t a, int64_t multiple) {
  return divide_up(a, multiple) * multiple;
}

// A column has a lane, and a warp takes as many rows as that leaves room for: a row costs the same instructions whether
// all lanes have a column or two. A power of two, and a whole kColumnGroup, which the gradients read.
inline int lanes_of_row(int columns) {
  int lanes = kColumnGroup;
  while (lanes < columns && lanes < kMaxSweepColumns) {
    lanes *= 2;
  }
  return lanes;
}

// Regions of shared memory, one after the other, each at a multiple of 16 bytes.
class Regions {
 public:
  // Where one of so many bytes begins.
  int place(int64_t bytes) {
    const auto at = static_cast<int>(end_);
    end_ = std::min<int64_t>(round_up(end_ + bytes, 16), INT32_MAX);
    return at;
  }

  int end() const { return static_cast<int>(end_); }

 private:
  int64_t end_ = 0;
};

// The dynamic shared memory of a block that has a multiprocessor to itself, or half of one.
inline int whole_shared_bytes(const HeadsDevice& device) {
  return device.shared_bytes - kStaticBytes;
}

inline int half_shared_bytes(const HeadsDevice& device) {
  constexpr int kReservedBytes = 1024;  // by the system, for each block
  return (device.shared_bytes + kReservedBytes) / 2 - kReservedBytes - kStaticBytes;
}

inline void lay_out_shared_memory(Sweep& sweep, const HeadsProblem& problem) {
  const int64_t row_bytes = int64_t{sweep.slice_features} * problem.element_bytes;
  const int64_t logits_tiles = sweep.tile_rows / kRowGroup * divide_up(problem.columns, kColumnGroup);
  Regions regions;
  regions.place(sweep.stages * sweep.tile_rows * row_bytes);
  sweep.weight_at = regions.place(problem.columns * row_bytes);
  sweep.target_bytes = problem.target_bytes;
  sweep.targets_at = regions.place(int64_t{problem.target_bytes} * sweep.stages * sweep.tile_rows);
  sweep.sums_at = regions.place(8 * 32 * std::max<int64_t>(logits_tiles, sweep.threads / 32));
  sweep.g_at = regions.place(int64_t{problem.arithmetic_bytes} * sweep.tile_rows * sweep.row_lanes);
  sweep.scaled_pitch = sweep.tile_rows + kPiece;  // kPiece: fewer bank conflicts of the lanes that write a row
  sweep.scaled_at = regions.place(int64_t{problem.arithmetic_bytes} * sweep.scaled_pitch * sweep.row_lanes);
  sweep.shared_bytes = regions.end();
}

// Divides the rows among as many blocks as run at a time (`resident`), if there is a row group for each. But every
// block writes its partial sums of the weight's gradient, which are read once more. This traffic may be a quarter of
// that of the features, which are read and written once; one block a multiprocessor is always allowed. A block takes
// one slice of the features. For logits only it takes all slices, because the sums run through them.
inline void divide_rows(Sweep& sweep, const HeadsProblem& problem, int64_t resident, int sm_count) {
  const int64_t across = problem.logits_only ? resident : std::max<int64_t>(1, resident / sweep.slices);
  const int group = sweep.matrix_groups > 0 ? kMatrixSide : kRowGroup;
  int64_t blocks = std::min(divide_up(problem.rows, group), across);
  if (problem.weight_gradient) {
    const int64_t cheap = problem.rows * problem.element_bytes /
        (4 * int64_t{problem.columns} * problem.arithmetic_bytes);
    blocks = std::min(blocks, std::max<int64_t>(sm_count, cheap));
  }
  sweep.rows_per_block = divide_up(problem.rows, std::max<int64_t>(1, blocks));
  sweep.blocks = problem.rows == 0 ? 0 : static_cast<int>(divide_up(problem.rows, sweep.rows_per_block));
}

// Large tiles divide the cost of reading W, and that of the phase row by row, among more rows. Two stages keep the
// memory busy during the arithmetic. Where two blocks of 256 threads fit on a multiprocessor, one works while the other
// waits at a barrier. Else there is one block of 512 threads, or of 256 in f64, whose numbers take two registers. To be
// tuned with bench/compare.py --device cuda.
inline Sweep plan_sweep(const HeadsProblem& problem, const HeadsDevice& device) {
  const int whole = whole_shared_bytes(device), half = half_shared_bytes(device);
  const int large = problem.arithmetic_bytes == 8 ? 256 : 512;
  struct Shape {
    int threads, shared_bytes, tile_rows, stages;
  };
  const Shape shapes[] = {
      {256, half, 32, 2},   {256, half, 16, 2},    {256, half, 8, 2},    {large, whole, 16, 2},
      {large, whole, 8, 2}, {large, whole, 16, 1}, {large, whole, 8, 1},
  };

  Sweep sweep{};
  sweep.row_lanes = lanes_of_row(problem.columns);
  sweep.rows_at_once = kMaxSweepColumns / sweep.row_lanes;
  const int64_t column_groups = divide_up(problem.columns, kColumnGroup);
  const auto fits = [&](const Shape& shape, int64_t slice_features) {
    sweep.threads = shape.threads;
    sweep.tile_rows = shape.tile_rows;
    sweep.stages = shape.stages;
    sweep.slice_features = sweep.pitch = static_cast<int>(slice_features);
    lay_out_shared_memory(sweep, problem);
    const int64_t tiles = slice_features / kPiece * column_groups;
    return sweep.shared_bytes <= shape.shared_bytes &&
        (!problem.weight_gradient || tiles <= int64_t{kTilesPerThread} * shape.threads);
  };
  sweep.slices = 1;
  bool found = false;
  for (const Shape& shape : shapes) {
    found = found || fits(shape, round_up(problem.features, kPiece));
  }
  while (!found) {
    ++sweep.slices;
    const int64_t slice_features = round_up(divide_up(problem.features, sweep.slices), kSliceMultiple);
    found = fits({large, whole, 8, 2}, slice_features) || slice_features == kSliceMultiple;
  }
  sweep.slices = static_cast<int>(std::max<int64_t>(1, divide_up(problem.features, std::max(1, sweep.slice_features))));

  divide_rows(
      sweep, problem, int64_t{device.sm_count} * (large == 512 && sweep.threads == 256 ? 2 : 1), device.sm_count);
  return sweep;
}

// ---------------------------------------------------------------------------------------------------------------------
// On the matrix units
// ---------------------------------------------------------------------------------------------------------------------

// In f32: an odd multiple of 8, so that the lanes of half a warp, four rows of four pairs, write to different banks.
constexpr int matrix_sums_pitch(int groups) {
  return (groups | 1) * kMatrixColumns;
}

// Both parts of each column's number, and the padding.
constexpr int matrix_gradients_pitch(int groups) {
  return 2 * groups * kMatrixColumns + kMatrixPadding;
}

inline void lay_out_matrix_tile(Sweep& sweep, const HeadsProblem& problem) {
  Regions regions;
  const int groups = sweep.matrix_groups;
  const int64_t row_bytes = int64_t{sweep.pitch} * problem.element_bytes;
  const int64_t gradients = int64_t{kMatrixSide} * matrix_gradients_pitch(groups) * problem.element_bytes;
  regions.place(sweep.stages * sweep.tile_rows * row_bytes);
  sweep.weight_at = regions.place(problem.columns * row_bytes);
  sweep.target_bytes = problem.target_bytes;
  sweep.targets_at = regions.place(int64_t{problem.target_bytes} * sweep.stages * sweep.tile_rows);
  sweep.sums_at = regions.place(int64_t{sweep.threads} / 32 * kMatrixSide * matrix_sums_pitch(groups) * 4);
  sweep.g_at = regions.place(gradients);
  sweep.scaled_at = regions.place(gradients);
  sweep.row_units_at = regions.place(kMatrixSide * 4);
  sweep.column_units_at = regions.place(kMaxSweepColumns * 4);
  sweep.zeros_at = regions.place(16);
  sweep.shared_bytes = regions.end();
}

// The shapes are those of plan_sweep, with tiles of kMatrixSide rows. No blocks of threads: the device's shared memory
// does not hold the narrowest slice.
inline Sweep plan_matrix_sweep(const HeadsProblem& problem, const HeadsDevice& device) {
  const int whole = whole_shared_bytes(device), half = half_shared_bytes(device);
  struct Shape {
    int threads, shared_bytes, stages;
  };
  const Shape shapes[] = {{256, half, 2}, {512, whole, 2}, {512, whole, 1}, {256, whole, 1}};

  Sweep sweep{};
  sweep.tile_rows = kMatrixSide;
  sweep.matrix_groups = problem.columns <= 8 ? 1 : problem.columns <= 16 ? 2 : 4;
  sweep.row_lanes = sweep.matrix_groups * kMatrixColumns;
  sweep.rows_at_once = kMaxSweepColumns / sweep.row_lanes;
  int resident = 1;
  const auto fits = [&](int64_t slice_features) {
    return std::any_of(std::begin(shapes), std::end(shapes), [&](const Shape& shape) {
      sweep.threads = shape.threads;
      sweep.stages = shape.stages;
      sweep.slice_features = static_cast<int>(slice_features);
      sweep.pitch = sweep.slice_features + kMatrixPadding;
      lay_out_matrix_tile(sweep, problem);
      resident = shape.shared_bytes == half ? 2 : 1;
      const int64_t each = divide_up(slice_features / kMatrixSide, shape.threads / 32);  // blocks of a warp
      return sweep.shared_bytes <= shape.shared_bytes &&
          (!problem.weight_gradient || each * sweep.matrix_groups <= kMatrixBlocks);
    });
  };
  sweep.slices = 1;
  for (int64_t slice_features = round_up(problem.features, kMatrixSide); !fits(slice_features);) {
    if (slice_features <= kSliceMultiple) {
      return Sweep{};
    }
    ++sweep.slices;
    slice_features = round_up(divide_up(problem.features, sweep.slices), kSliceMultiple);
  }
  sweep.slices = static_cast<int>(std::max<int64_t>(1, divide_up(problem.features, std::max(1, sweep.slice_features))));
  divide_rows(sweep, problem, int64_t{device.sm_count} * resident, device.sm_count);
  return sweep;
}

// The same problem, for a pass that computes logits only.
inline HeadsProblem logits_problem(HeadsProblem problem) {
  problem.target_bytes = 0;
  problem.weight_gradient = false;
  problem.logits_only = true;
  return problem;
}

// Compute capability 8.0 has the instructions that the matrix units' sweep is written in.
constexpr int kMatrixCapability = 80;

// From so many columns of half types on, over features of so many bytes, lanes take longer than three passes.
constexpr int kColumnsForProducts = 8;
constexpr int64_t kBytesForProducts = int64_t{32} << 20;

// What computes the heads' products. No GPU has been asked yet; docs/design.md has the counts that this follows. f32
// and f64 stay on lanes. The matrix units take half types, but no loss of features that one slice does not hold: that
// would read them twice.
inline HeadsUnits choose_units(const HeadsProblem& problem, const HeadsDevice& device) {
  if (problem.columns > kMaxSweepColumns || device.asked == HeadsUnits::kProducts) {
    return HeadsUnits::kProducts;
  }
  if (problem.element_bytes > 2) {
    return HeadsUnits::kLanes;
  }
  if (device.capability >= kMatrixCapability && device.asked != HeadsUnits::kLanes && !problem.any_range) {
    const Sweep sweep = plan_matrix_sweep(problem, device);
    if (sweep.threads > 0 && (sweep.slices == 1 || problem.target_bytes == 0)) {
      return HeadsUnits::kMatrix;
    }
  }
  const bool large = problem.rows * problem.features * problem.element_bytes > kBytesForProducts;
  return large && problem.columns >= kColumnsForProducts && device.asked == HeadsUnits::kBest ? HeadsUnits::kProducts
                                                                                              : HeadsUnits::kLanes;
}

// A sweep for up to kMaxSweepColumns columns, also where products would be chosen.
inline Sweep plan_any_sweep(const HeadsProblem& problem, const HeadsDevice& device) {
  return choose_units(problem, device) == HeadsUnits::kMatrix ? plan_matrix_sweep(problem, device)
                                                              : plan_sweep(problem, device);
}

// The form of heads_loss.
enum class HeadsForm {
  kOnePass,  // logits, loss and gradients while a tile of the features is in shared memory: 2 N D elements of traffic
  kTwoPasses,  // the logits of all features first, then loss and gradients slice by slice: 3 N D
  kProducts,  // matrix products, and a kernel for the loss between them: 3 N D and some N K
};

struct HeadsPlan {
  HeadsForm form;
  Sweep logits;  // of two passes, the first
  Sweep gradients;  // the only pass, or the second
  int norm_blocks;  // of the kernel that adds the rows' weights; 0: every block of the sweep does it for itself
};

// At least 16 rows a thread.
inline int norm_blocks_for(int64_t rows_to_count) {
  return static_cast<int>(std::min<int64_t>(kMaxNormBlocks, divide_up(rows_to_count, 16 * kNormThreads)));
}

// Where one pass is not possible, half types go to products and the others to two passes. The reason, in cycles of an
// H100's multiprocessor for 16 rows of 1024 features and 12 columns, counted in the compiled code: two passes of f32
// need 15200 for the memory and 9730 to issue the instructions, so that the memory is the limit. Those of bf16 need
// 7600 and 11390, so that the arithmetic is the limit; for the matrix units of a product it is little work. In f32 a
// product has no matrix units (unless the user allows TF32), and it pads narrow heads to its own tiles.
inline HeadsPlan plan_heads(const HeadsProblem& problem, const HeadsDevice& device) {
  HeadsPlan plan{};
  plan.norm_blocks = problem.rows_to_count <= kMaxRowsCountedInPlace ? 0 : norm_blocks_for(problem.rows_to_count);
  plan.form = HeadsForm::kProducts;
  if (choose_units(problem, device) == HeadsUnits::kProducts) {
    return plan;
  }
  plan.gradients = plan_any_sweep(problem, device);
  if (plan.gradients.slices == 1) {
    plan.form = HeadsForm::kOnePass;
  } else if (problem.element_bytes > 2) {
    plan.form = HeadsForm::kTwoPasses;
    plan.logits = plan_sweep(logits_problem(problem), device);
  }
  return plan;
}

}  // namespace grl_ext
