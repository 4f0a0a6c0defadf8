// The kernels for x86-64-v4.
#if defined(__x86_64__)
#if defined(__clang__)  // ignores GCC's pragma
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#endif
#define GRL_EXT_ISA Avx512
#define GRL_EXT_ISA_NAME "avx512"
#define GRL_EXT_VECTOR_BYTES 64
#include "../kernels/table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
