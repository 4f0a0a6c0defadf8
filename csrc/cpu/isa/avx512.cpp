// The kernels for x86-64-v4.
#if defined(__x86_64__)
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define GRL_EXT_ISA Avx512
#define GRL_EXT_ISA_NAME "avx512"
#define GRL_EXT_VECTOR_BYTES 64
#include "../kernels/table.h"
#endif
