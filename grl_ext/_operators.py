"""What PyTorch's tools ask of the operators: decompositions into its own, counts of floating-point operations, and the
layer's operators where nothing is compiled."""

import torch
from torch._guards import detect_fake_mode
from torch.utils.flop_counter import register_flop_formula

from grl_ext import _plain, _reversal
from grl_ext._options import HeadsOptions

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_library = torch.library.Library("grl_ext", "FRAGMENT")  # what it registers lives as long as it does


def register() -> None:
    if not hasattr(torch.ops.grl_ext, "gradient_reversal"):
        _register_layer()
        return
    _decompose(torch.ops.grl_ext.grl_linear.default, _plain.grl_linear)
    _decompose(torch.ops.grl_ext.linear_heads.default, _plain.linear_heads)
    _decompose(torch.ops.grl_ext.heads_loss.default, _heads_loss)
    register_flop_formula(torch.ops.grl_ext._heads_logits)(_flops_of_logits)
    register_flop_formula(torch.ops.grl_ext._heads_gradients)(_flops_of_gradients)
    register_flop_formula(torch.ops.grl_ext._heads_loss)(_flops_of_loss)


def _register_layer() -> None:
    """What a graph holds where no extension has registered it, so that its gradient is reversed too."""
    for name, function, schema in (
        ("gradient_reversal", _reversal.gradient_reversal, "(Tensor(a) x, Tensor lambda_) -> Tensor(a)"),
        ("grl_linear", _plain.grl_linear, "(Tensor x, Tensor weight, Tensor? bias, Tensor lambda_) -> Tensor"),
    ):
        _library.define(name + schema)
        _library.impl(name, function, "CompositeImplicitAutograd")


def _decompose(operator, decomposition) -> None:
    """What `ExportedProgram.run_decompositions()`, and so ONNX and AOTInductor, put in the place of the operator.

    `torch.compile` goes on to the kernels. The two differ in how they fake tensors: the first for an export.
    """

    @operator.py_impl(_COMPOSITE)
    def either(*args):
        mode = detect_fake_mode(args)
        in_export = mode is not None and mode.fake_tensor_converter.export
        return decomposition(*args) if in_export else operator._op_dk(_COMPOSITE, *args)


def _heads_loss(x, weight, bias, targets, lambda_, *options):
    return _plain.heads_loss(x, weight, bias, targets, lambda_, HeadsOptions(*options))


# Shapes in place of tensors, as FlopCounterMode gives them. Products only, as PyTorch counts them: a multiplication and
# an addition.


def _flops_of_logits(x, weight, bias, out_shape=None, **_) -> int:
    return sum(2 * x[0] * columns * features for columns, features in weight)


def _flops_of_gradients(grad_logits, x, weight, factor, lambda_, needs, out_shape=None, **_) -> int:
    """Of x for all heads together; of those weights whose gradient is needed."""
    rows, counts = grad_logits[0][0], [needs[0] + needs[1 + h] for h in range(len(weight))]
    return sum(2 * rows * columns * features * count for (columns, features), count in zip(weight, counts, strict=True))


def _flops_of_loss(x, weight, bias, *others, out_shape=None, **_) -> int:
    needs = others[-1]
    return sum(
        2 * x[0] * columns * features * (1 + needs[0] + needs[1 + h]) for h, (columns, features) in enumerate(weight)
    )
