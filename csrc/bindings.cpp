// What Python calls directly in eager mode, which saves the argument parser of torch.ops; and build_info().
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

// A Python function that checks a value and raises the error. Called from here, so that each error has one text.
py::object reference(const char* name) {
  return py::module_::import("grl_ext._reference").attr(name);
}

const at::Tensor& to_tensor(const char* name, py::handle value) {
  if (!THPVariable_Check(value.ptr())) {
    reference("check_tensor")(name, value);
  }
  return THPVariable_Unpack(value.ptr());
}

double to_number(const char* name, py::handle value) {
  if (PyFloat_CheckExact(value.ptr()) && std::isfinite(PyFloat_AS_DOUBLE(value.ptr()))) {
    return PyFloat_AS_DOUBLE(value.ptr());
  }
  return reference("check_number")(name, value).cast<double>();
}

at::Tensor gradient_reversal_eager(py::handle x, py::handle lambda) {
  const auto& features = to_tensor("x", x);
  if (THPVariable_Check(lambda.ptr())) {
    return gradient_reversal(features, THPVariable_Unpack(lambda.ptr()));
  }
  return gradient_reversal_by_value(features, to_number("lambda_", lambda));
}

std::optional<at::Tensor> to_optional_tensor(const char* name, py::handle value) {
  return value.is_none() ? std::nullopt : std::optional(to_tensor(name, value));
}

at::Tensor grl_linear_eager(py::handle x, py::handle weight, py::handle bias, py::handle lambda) {
  const auto& features = to_tensor("x", x);
  const auto& matrix = to_tensor("weight", weight);
  const auto vector = to_optional_tensor("bias", bias);
  if (THPVariable_Check(lambda.ptr())) {
    const auto& tensor = THPVariable_Unpack(lambda.ptr());
    const py::gil_scoped_release no_gil;
    return grl_linear(features, matrix, vector, tensor);
  }
  const auto number = to_number("lambda_", lambda);
  const py::gil_scoped_release no_gil;
  return grl_linear_by_value(features, matrix, vector, number);
}

// The heads' arguments come as sequences with an entry for each head. None instead of a sequence means the option's
// default.
std::vector<at::Tensor> to_tensors(const char* name, py::handle sequence) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(py::len_hint(sequence));
  for (const auto item : sequence) {
    if (!THPVariable_Check(item.ptr())) {
      reference("check_tensor")(std::string(name) + "[" + std::to_string(tensors.size()) + "]", item);
    }
    tensors.push_back(THPVariable_Unpack(item.ptr()));
  }
  return tensors;
}

OptionalTensors to_optional_tensors(const char* name, py::handle sequence, size_t heads) {
  OptionalTensors tensors;
  if (sequence.is_none()) {
    tensors.resize(heads, std::nullopt);
    return tensors;
  }
  tensors.reserve(heads);
  for (const auto item : sequence) {
    if (!item.is_none() && !THPVariable_Check(item.ptr())) {
      reference("check_tensor")(std::string(name) + "[" + std::to_string(tensors.size()) + "]", item);
    }
    tensors.push_back(item.is_none() ? std::nullopt : std::optional(THPVariable_Unpack(item.ptr())));
  }
  return tensors;
}

template <class T>
std::vector<T> to_numbers(py::handle sequence, size_t heads, T otherwise) {
  return sequence.is_none() ? std::vector<T>(heads, otherwise) : sequence.cast<std::vector<T>>();
}

py::list to_list(const std::vector<at::Tensor>& tensors) {
  py::list list(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    list[i] = py::reinterpret_steal<py::object>(THPVariable_Wrap(tensors[i]));
  }
  return list;
}

// False for tensor subclasses other than Parameter: they may know PyTorch's operators only, and not the ones here.
bool is_exact(py::handle value) {
  return !THPVariable_Check(value.ptr()) || THPVariable_CheckTypeExact(Py_TYPE(value.ptr()));
}

bool are_exact(py::handle sequence) {
  if (sequence.is_none()) {
    return true;
  }
  for (const auto item : sequence) {
    if (!is_exact(item)) {
      return false;
    }
  }
  return true;
}

// Returns None where the kernels do not take these tensors; Python then takes its other path.
py::object linear_heads_eager(
    py::handle x, py::handle weight, py::handle bias, const at::Tensor& lambda,
    const std::vector<int64_t>& lambda_index) {
  if (!is_exact(x) || !are_exact(weight) || !are_exact(bias)) {
    return py::none();
  }
  const auto& features = to_tensor("x", x);
  if (!on_kernels_device(features)) {
    return py::none();
  }
  const auto matrices = to_tensors("weight", weight);
  const auto vectors = to_optional_tensors("bias", bias, matrices.size());
  std::vector<at::Tensor> logits;
  {
    const py::gil_scoped_release no_gil;
    logits = linear_heads(features, matrices, vectors, lambda, lambda_index);
  }
  return to_list(logits);
}

py::object heads_loss_eager(
    py::handle x, py::handle weight, py::handle bias, py::handle depth, py::handle targets, const at::Tensor& lambda,
    const std::vector<int64_t>& lambda_index, py::handle sample_weight, py::handle class_weight, py::handle loss_weight,
    py::handle kind, py::handle label_smoothing, py::handle ignore_index, bool mean) {
  if (!is_exact(x) || !are_exact(weight) || !are_exact(bias) || !are_exact(targets) || !are_exact(sample_weight) ||
      !are_exact(class_weight)) {
    return py::none();
  }
  const auto& features = to_tensor("x", x);
  if (!on_kernels_device(features)) {
    return py::none();
  }
  const auto matrices = to_tensors("weight", weight);
  const auto vectors = to_optional_tensors("bias", bias, matrices.size());
  const auto heads = py::len(targets);
  const auto layers = to_numbers<int64_t>(depth, heads, 1);
  HeadsOptions options{
      .targets = to_tensors("targets", targets),
      .sample_weight = to_optional_tensors("sample_weight", sample_weight, heads),
      .class_weight = to_optional_tensors("class_weight", class_weight, heads),
      .lambda = lambda,
      .lambda_index = lambda_index,
      .loss_weight = to_optional_tensor("loss_weight", loss_weight),
      .kind = to_numbers<int64_t>(kind, heads, kCrossEntropy),
      .label_smoothing = to_numbers(label_smoothing, heads, 0.0),
      .ignore_index = to_numbers<int64_t>(ignore_index, heads, -100),
      .mean = mean};
  LossAndLogits result;
  {
    const py::gil_scoped_release no_gil;
    result = heads_loss(features, matrices, vectors, layers, std::move(options));
  }
  const auto& [loss, head_losses, logits] = result;
  return py::make_tuple(loss, to_list(head_losses), to_list(logits));
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
  m.def("heads_loss", torch::wrap_pybind_function(heads_loss_eager));
  m.def("build_info", build_info);
}

}  // namespace grl_ext
