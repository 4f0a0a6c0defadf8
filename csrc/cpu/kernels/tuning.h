// The constants that depend on the instruction set: the shapes of the register tiles, and the sizes of what stays in a
// cache. A tile's sums stay in registers, of which AVX-512 and AArch64 have 32, the others 16.
//
// Those of 64-byte vectors were chosen by `python bench/compare.py --cases heads` on a processor with AVX-512. Those of
// narrower ones were chosen by bench/cpu_kernels.cpp on an AMD EPYC with AVX2 (Zen 2, 32 KB of L1 and 512 KB of L2 a
// core), with 2, 12 and 33 columns of 1024 and 1764 features. Those of AArch64 follow from its registers and were not
// timed.

constexpr int kTileRows = 4;
constexpr int kWeightColumns = 6;

#if GRL_EXT_VECTOR_BYTES == 64

// kTileRows x kForwardColumns for the logits, kTileRows x kStripVectors for the features' gradient, kWeightColumns x
// kStripVectors for the weight's.
constexpr int kForwardColumns = 6;
constexpr int kStripVectors = 4;

// Up to this many columns the memory is slower than the arithmetic of the gradients: dw is computed first, and
// prefetches dx's memory. With more columns dx is computed first, and is written to memory while dw is computed.
constexpr long kFewColumns = 6;

// A step of the logits' tile loads its rows and then column by column, not the other way round.
constexpr bool kHoldsRows = true;
// Each pass of the logits over a block prefetches the next block, not just the first pass.
constexpr bool kPrefetchesAgain = true;

// Elements of a block of features. Such a block and one of their gradient fit into the L2 cache with room to spare.
constexpr long kBlockElements = 1 << 15;

#else

// kTileRows x kForwardColumns for the logits, kTileRows x kFeatureVectors for the features' gradient, and kWeightSums
// for the weight's, of kWeightColumns columns or fewer.
#if defined(__aarch64__)
constexpr int kForwardColumns = 5;
constexpr int kFeatureVectors = 4;
constexpr int kWeightSums = 24;
#else
constexpr int kForwardColumns = 3;
constexpr int kFeatureVectors = 3;
constexpr int kWeightSums = 12;
#endif

constexpr bool kHoldsRows = false;
constexpr bool kPrefetchesAgain = false;

constexpr long kBlockElements = 3 << 14;

// Bytes of the weight that the features' gradient takes at a time. With the rows' own lines they fit into the L1 cache.
constexpr long kPanelBytes = 28 << 10;
// Of more columns than this the panel is copied to where its lines lie side by side. If the weight's rows are a power
// of two apart, they would fall into one set of the cache.
constexpr long kPanelColumnsInPlace = 6;
// The same for the strip of features that the weight's gradient reads once for each kWeightColumns columns.
constexpr long kStripColumnsInPlace = 18;

#endif
