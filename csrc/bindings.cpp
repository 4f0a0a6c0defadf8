// What Python calls directly in eager mode, which saves the argument parser of torch.ops; and build_info().
#include <pytorch.h>

#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/tensor.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <cmath>

#include "autograd/node.h"
#include "cpu/heads_limits.h"
#include "cpu/kernels.h"
#include "cuda/heads_plan.h"
#include "ops.h"

namespace py = pybind11;

namespace grl_ext {
namespace {

// All functions return None where they do not take their arguments. Python then takes its other path, whose checks
// raise the errors.

// A plain tensor. Subclasses other than Parameter may know PyTorch's operators only, and not the ones here.
bool is_exact(py::handle value) {
  return THPVariable_Check(value.ptr()) && THPVariable_CheckTypeExact(Py_TYPE(value.ptr()));
}

const at::Tensor& unpack(py::handle value) {
  return THPVariable_Unpack(value.ptr());
}

bool is_exact_or_none(py::handle value) {
  return value.is_none() || is_exact(value);
}

std::optional<at::Tensor> unpack_optional(py::handle value) {
  return value.is_none() ? std::nullopt : std::optional(unpack(value));
}

// Python's float from any real number; raises Python's errors.
double to_number(const char* name, py::handle value) {
  if (PyFloat_CheckExact(value.ptr()) && std::isfinite(PyFloat_AS_DOUBLE(value.ptr()))) {
    return PyFloat_AS_DOUBLE(value.ptr());
  }
  return py::module_::import("grl_ext._checks").attr("check_number")(name, value).cast<double>();
}

py::object wrap(const std::optional<at::Tensor>& tensor) {
  return tensor ? py::reinterpret_steal<py::object>(THPVariable_Wrap(*tensor)) : py::none();
}

py::list wrap(const std::vector<at::Tensor>& tensors) {
  py::list list(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    list[i] = py::reinterpret_steal<py::object>(THPVariable_Wrap(tensors[i]));
  }
  return list;
}

py::object gradient_reversal_eager(py::handle x, py::handle lambda) {
  if (!is_exact(x)) {
    return py::none();
  }
  if (THPVariable_Check(lambda.ptr())) {
    return wrap(gradient_reversal(unpack(x), unpack(lambda)));
  }
  return wrap(gradient_reversal_by_value(unpack(x), to_number("lambda_", lambda)));
}

py::object grl_linear_eager(py::handle x, py::handle weight, py::handle bias, py::handle lambda) {
  if (!is_exact(x) || !is_exact(weight) || !is_exact_or_none(bias) || !on_kernels_device(unpack(x))) {
    return py::none();
  }
  const auto lambda_tensor = THPVariable_Check(lambda.ptr())
      ? unpack(lambda)
      : at::scalar_tensor(to_number("lambda_", lambda), at::kDouble);
  std::optional<at::Tensor> y;
  {
    const py::gil_scoped_release no_gil;
    y = grl_linear(unpack(x), unpack(weight), unpack_optional(bias), lambda_tensor);
  }
  return wrap(y);
}

// The heads' arguments come as sequences with an entry for each head.

// Without the time of an iterator, where it is a list or a tuple.
class Items {
 public:
  explicit Items(py::handle sequence)
      : held_(py::reinterpret_steal<py::object>(PySequence_Fast(sequence.ptr(), "a sequence is wanted"))) {
    if (!held_) {
      throw py::error_already_set();
    }
  }

  size_t size() const { return static_cast<size_t>(PySequence_Fast_GET_SIZE(held_.ptr())); }

  py::handle operator[](size_t i) const { return PySequence_Fast_GET_ITEM(held_.ptr(), static_cast<Py_ssize_t>(i)); }

 private:
  py::object held_;
};

std::optional<std::vector<at::Tensor>> to_tensors(py::handle sequence) {
  const Items items(sequence);
  std::vector<at::Tensor> tensors;
  tensors.reserve(items.size());
  for (size_t i = 0; i < items.size(); ++i) {
    if (!is_exact(items[i])) {
      return std::nullopt;
    }
    tensors.push_back(unpack(items[i]));
  }
  return tensors;
}

// `sequence` may be None: none at all.
std::optional<OptionalTensors> to_optional_tensors(py::handle sequence, size_t heads) {
  OptionalTensors tensors;
  tensors.reserve(heads);
  if (sequence.is_none()) {
    tensors.resize(heads, std::nullopt);
    return tensors;
  }
  const Items items(sequence);
  for (size_t i = 0; i < items.size(); ++i) {
    if (!is_exact_or_none(items[i])) {
      return std::nullopt;
    }
    tensors.push_back(unpack_optional(items[i]));
  }
  return tensors;
}

// From the heads' lambdas: None for a predictor, a float or a 0-d tensor for an adversary.
std::optional<std::vector<Factor>> to_factors(const at::Tensor& x, py::handle sequence) {
  const Items items(sequence);
  std::vector<Factor> factors;
  factors.reserve(items.size());
  for (size_t i = 0; i < items.size(); ++i) {
    const auto item = items[i];
    const bool is_float = PyFloat_CheckExact(item.ptr());
    if (!is_float && !is_exact_or_none(item)) {
      return std::nullopt;
    }
    const auto factor = is_float ? std::optional(Factor{-PyFloat_AS_DOUBLE(item.ptr()), std::nullopt})
                                 : factor_of(x, unpack_optional(item));
    if (!factor || !std::isfinite(factor->value)) {
      return std::nullopt;
    }
    factors.push_back(*factor);
  }
  return factors;
}

template <class T>
std::vector<T> to_numbers(py::handle sequence, size_t heads, T otherwise) {
  return sequence.is_none() ? std::vector<T>(heads, otherwise) : sequence.cast<std::vector<T>>();
}

// A tensor, or a sequence of floats.
std::optional<at::Tensor> to_tensor(py::handle values) {
  if (THPVariable_Check(values.ptr())) {
    return is_exact(values) ? std::optional(unpack(values)) : std::nullopt;
  }
  std::vector<double> numbers;
  for (const auto item : values) {
    if (!PyFloat_Check(item.ptr()) && !PyLong_Check(item.ptr())) {
      return std::nullopt;
    }
    numbers.push_back(PyFloat_AsDouble(item.ptr()));
  }
  return at::tensor(numbers, at::kDouble);
}

// HeadsOptions from Python's, or the defaults from None.
std::optional<HeadsOptions> to_options(py::handle given, py::handle targets, size_t heads) {
  const auto option = [&](const char* name) {
    return given.is_none() ? py::object(py::none()) : py::object(given.attr(name));
  };
  auto tensors = to_tensors(targets);
  auto sample_weight = to_optional_tensors(option("sample_weight"), heads);
  auto class_weight = to_optional_tensors(option("class_weight"), heads);
  const auto weights = option("loss_weight");
  const auto loss_weight = weights.is_none() ? std::nullopt : to_tensor(weights);
  if (!tensors || !sample_weight || !class_weight || (!weights.is_none() && !loss_weight)) {
    return std::nullopt;
  }
  return HeadsOptions{
      .targets = std::move(*tensors),
      .sample_weight = std::move(*sample_weight),
      .class_weight = std::move(*class_weight),
      .loss_weight = loss_weight,
      .kind = to_numbers<int64_t>(option("kind"), heads, kCrossEntropy),
      .label_smoothing = to_numbers(option("label_smoothing"), heads, 0.0),
      .ignore_index = to_numbers<int64_t>(option("ignore_index"), heads, -100),
      .mean = given.is_none() || given.attr("reduction").cast<std::string>() == "mean"};
}

py::object linear_heads_eager(py::handle x, py::handle weight, py::handle bias, py::handle lambda) {
  if (!is_exact(x) || !on_kernels_device(unpack(x))) {
    return py::none();
  }
  const auto matrices = to_tensors(weight);
  const auto vectors = matrices ? to_optional_tensors(bias, matrices->size()) : std::nullopt;
  auto factors = to_factors(unpack(x), lambda);
  if (!vectors || !factors) {
    return py::none();
  }
  std::optional<std::vector<at::Tensor>> logits;
  {
    const py::gil_scoped_release no_gil;
    logits = linear_heads(unpack(x), *matrices, *vectors, std::move(*factors));
  }
  return logits ? py::object(wrap(*logits)) : py::none();
}

py::object hidden_layers_eager(py::handle z, py::handle weight, py::handle bias) {
  const auto matrices = is_exact(z) ? to_tensors(weight) : std::nullopt;
  const auto vectors = matrices ? to_optional_tensors(bias, matrices->size()) : std::nullopt;
  if (!vectors) {
    return py::none();
  }
  std::optional<at::Tensor> hidden;
  {
    const py::gil_scoped_release no_gil;
    hidden = hidden_layers(unpack(z), *matrices, *vectors);
  }
  return wrap(hidden);
}

// Each element of weight and bias is a sequence with an entry for each of the head's layers.
std::optional<std::vector<Layers>> to_layers(py::handle weight, py::handle bias) {
  const Items matrices(weight), vectors(bias);
  if (matrices.size() != vectors.size()) {
    return std::nullopt;
  }
  std::vector<Layers> heads(matrices.size());
  for (size_t h = 0; h < heads.size(); ++h) {
    auto weights = to_tensors(matrices[h]);
    const Items biases(vectors[h]);
    if (!weights) {
      return std::nullopt;
    }
    heads[h].weight = std::move(*weights);
    for (size_t l = 0; l < biases.size(); ++l) {
      if (!is_exact_or_none(biases[l])) {
        return std::nullopt;
      }
      heads[h].bias.push_back(unpack_optional(biases[l]));
    }
  }
  return heads;
}

py::object heads_loss_eager(
    py::handle x, py::handle weight, py::handle bias, py::handle targets, py::handle lambda, py::handle given) {
  if (!is_exact(x) || !on_kernels_device(unpack(x))) {
    return py::none();
  }
  const auto heads = to_layers(weight, bias);
  auto factors = to_factors(unpack(x), lambda);
  auto options = heads ? to_options(given, targets, heads->size()) : std::nullopt;
  if (!factors || !options) {
    return py::none();
  }
  std::optional<LossAndLogits> result;
  try {
    const py::gil_scoped_release no_gil;
    result = layered_heads_loss(unpack(x), *heads, std::move(*factors), std::move(*options));
  } catch (const c10::IndexError&) {  // a class that is out of range
    return py::none();
  } catch (const c10::ValueError&) {  // a sample weight or a target that is out of range
    return py::none();
  }
  if (!result) {
    return py::none();
  }
  const auto& [loss, head_losses, logits] = *result;
  return py::make_tuple(loss, wrap(head_losses), wrap(logits));
}

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cuda_archs"] = GRL_EXT_CUDA_ARCHS;
  info["cpu_isa"] = cpu::kernels().isa;
  info["max_columns_cpu"] = kMaxFusedColumns;
  info["max_columns_cuda"] = kMaxSweepColumns;
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("gradient_reversal", torch::wrap_pybind_function(gradient_reversal_eager));
  m.def("grl_linear", torch::wrap_pybind_function(grl_linear_eager));
  m.def("linear_heads", torch::wrap_pybind_function(linear_heads_eager));
  m.def("hidden_layers", torch::wrap_pybind_function(hidden_layers_eager));
  m.def("heads_loss", torch::wrap_pybind_function(heads_loss_eager));
  m.def("build_info", build_info);
  m.def("serves_gpu", serves_gpu);
}

}  // namespace grl_ext
