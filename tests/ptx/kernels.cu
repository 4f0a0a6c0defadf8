// Every kernel of csrc/cuda for the element type ELEMENT, without ATen, so that nvcc takes seconds: for its PTX. What
// the operators call is called here with nothing, so that no kernel is named and every variant is there.
#include "heads_products_launches.cuh"
#include "heads_sweep_launches.cuh"
#include "scale.cuh"

#include <vector>

namespace grl_ext {
namespace {

struct NoMemory {
  void* operator()(int64_t) const { return nullptr; }
};

template <typename T>
void start_everything(Stream& stream) {
  using A = typename Arithmetic<T>::type;
  const HeadsCall<T> call{};
  const LossOutputs<A> outputs{};
  heads_logits(call, stream, NoMemory());
  heads_gradients(call, stream, NoMemory());
  heads_loss(call, HeadsPlan{}, true, outputs, stream, NoMemory());

  Products<T> products{};
  const std::vector<Heads<T>> heads(1);
  gather_weights(products, heads, stream);
  zero_weights(products, heads, stream);
  split_logits(products, heads, stream);
  gather_gradients(products, heads, stream);
  heads_loss_between_products(products, heads, 1, true, outputs, stream, NoMemory());

  const auto scale_by = [](auto factor) { scale<T>(nullptr, nullptr, 0, factor, 0, nullptr); };
  const auto scale_all_by = [&](auto factor) {
    scale_by(factor);
    scale_list<T>(nullptr, nullptr, 0, factor, 0, nullptr);
  };
  scale_all_by(HostFactor<A>{});
  scale_all_by(DeviceFactor<A, float>{});
  scale_all_by(DeviceFactor<A, double>{});
  scale_by(BroadcastFactor<A, uint32_t>{});
  scale_by(BroadcastFactor<A, uint64_t>{});
}

}  // namespace

void start_everything_for_the_element_type(Stream& stream) {
  start_everything<ELEMENT>(stream);
}

}  // namespace grl_ext
