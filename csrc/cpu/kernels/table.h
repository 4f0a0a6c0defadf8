// One instruction set's table. Only the files of csrc/cpu/isa/ include this; each sets its target first.
#include "../kernels.h"

// Everything that follows is private to the including file: two instruction sets must not share one symbol.
namespace grl_ext::cpu {
namespace {
#include "convert.h"
#include "scale.h"
#include "vector.h"
// Comments keep clang-format from sorting the includes. heads_tiles.h needs vector.h, and
#include "heads_tiles.h"
#include "tuning.h"
// these need both of them.
#if GRL_EXT_VECTOR_BYTES == 64
#include "heads_gradients.h"
#else
#include "heads_gradients_narrow.h"
#endif
#include "heads_logits.h"
#include "heads_loss.h"
}  // namespace

#define GRL_EXT_JOIN(a, b) a##b
#define GRL_EXT_TABLE(isa) GRL_EXT_JOIN(kKernels, isa)

extern const Kernels GRL_EXT_TABLE(GRL_EXT_ISA);
const Kernels GRL_EXT_TABLE(GRL_EXT_ISA) = {
    GRL_EXT_ISA_NAME,
    kBlockElements,
    {scale<Half, float>, scale_each<Half, float>},
    {scale<BFloat16, float>, scale_each<BFloat16, float>},
    {scale<float, float>, scale_each<float, float>},
    {scale<double, double>, scale_each<double, double>},
    {logits<float>, cross_entropy<float>, squared_error<float>, binary_cross_entropy<float>, gradients<float>},
    {logits<double>, cross_entropy<double>, squared_error<double>, binary_cross_entropy<double>, gradients<double>},
    {widen_rows<Half>, narrow_rows<Half>},
    {widen_rows<BFloat16>, narrow_rows<BFloat16>},
};

}  // namespace grl_ext::cpu
