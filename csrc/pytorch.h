// What most sources need of PyTorch. Parsing it is most of a file's compile time, so setup.py precompiles it where the
// compiler is GCC. GCC takes it precompiled only as the first include of a source.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>
