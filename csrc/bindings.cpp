// The eager entry points, past torch.ops' argument parser, and what this build is.
#include <ATen/ops/tensor.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <cmath>

#include "cpu/heads_limits.h"
#include "cpu/kernels.h"
#include "cuda/heads_plan.h"
#include "ops.h"

namespace py = pybind11;

namespace grl_ext {
namespace {

// What is judged in Python stays in Python: one text for each error.
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

// One number per head: a tensor as it is, or a sequence of numbers.
at::Tensor to_per_head(const char* name, py::handle values) {
  if (THPVariable_Check(values.ptr())) {
    return THPVariable_Unpack(values.ptr());
  }
  const auto numbers = reference("check_numbers")(name, values).cast<std::vector<double>>();
  return at::tensor(numbers, at::kDouble);
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

at::Tensor linear_heads_eager(
    py::handle x, py::handle weight, py::handle bias, const std::vector<int64_t>& head_sizes, py::handle grad_scale) {
  return linear_heads(
      to_tensor("x", x), to_tensor("weight", weight), to_optional_tensor("bias", bias), head_sizes,
      to_per_head("grad_scale", grad_scale));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> heads_cross_entropy_eager(
    py::handle x, py::handle weight, py::handle bias, py::handle targets, const std::vector<int64_t>& head_sizes,
    py::handle grad_scale, py::handle loss_weight, int64_t ignore_index, double label_smoothing) {
  return heads_cross_entropy(
      to_tensor("x", x), to_tensor("weight", weight), to_optional_tensor("bias", bias), to_tensor("targets", targets), head_sizes,
      to_per_head("grad_scale", grad_scale),
      loss_weight.is_none() ? std::nullopt : std::optional(to_per_head("loss_weight", loss_weight)), ignore_index,
      label_smoothing);
}

at::Tensor adversarial_heads_logits_eager(
    py::handle x, py::handle weight, py::handle bias, const std::vector<int64_t>& head_sizes, int64_t predictors,
    const at::Tensor& lambda) {
  return adversarial_heads_logits(
      to_tensor("x", x), to_tensor("weight", weight), to_optional_tensor("bias", bias), head_sizes, predictors, lambda);
}

auto adversarial_heads_loss_eager(
    py::handle x, py::handle weight, py::handle bias, const std::vector<at::Tensor>& targets, const std::vector<int64_t>& head_sizes,
    int64_t predictors, const at::Tensor& lambda, py::handle loss_weight, int64_t ignore_index, double label_smoothing) {
  return adversarial_heads_loss(
      to_tensor("x", x), to_tensor("weight", weight), to_optional_tensor("bias", bias), targets, head_sizes, predictors, lambda,
      loss_weight.is_none() ? std::nullopt : std::optional(to_per_head("loss_weight", loss_weight)), ignore_index,
      label_smoothing);
}

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cuda_archs"] = GRL_EXT_CUDA_ARCHS;
  info["cpu_isa"] = cpu::kernels().isa;
  info["max_columns_cpu"] = kMaxSkinnyColumns;
  info["max_columns_cuda"] = kMaxSweepColumns;
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("gradient_reversal", torch::wrap_pybind_function(gradient_reversal_eager));
  m.def("grl_linear", torch::wrap_pybind_function(grl_linear_eager));
  m.def("linear_heads", torch::wrap_pybind_function(linear_heads_eager));
  m.def("heads_cross_entropy", torch::wrap_pybind_function(heads_cross_entropy_eager));
  m.def("adversarial_heads_logits", torch::wrap_pybind_function(adversarial_heads_logits_eager));
  m.def("adversarial_heads_loss", torch::wrap_pybind_function(adversarial_heads_loss_eager));
  m.def("build_info", build_info);
}

}  // namespace grl_ext
