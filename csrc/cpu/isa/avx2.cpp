// The kernels for x86-64-v3.
#if defined(__x86_64__)
#pragma GCC target("arch=x86-64-v3")
#define GRL_EXT_ISA Avx2
#define GRL_EXT_ISA_NAME "avx2"
#define GRL_EXT_VECTOR_BYTES 32
#include "../kernels/table.h"
#endif
