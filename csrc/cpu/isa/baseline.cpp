// The kernels for the compiler's own default: SSE2 on x86-64, NEON on aarch64.
#define GRL_EXT_ISA Baseline
#define GRL_EXT_ISA_NAME "baseline"
#define GRL_EXT_VECTOR_BYTES 16
#include "../kernels/table.h"
