"""What PyTorch's tools ask of the compiled heads: decompositions into its own operators, and counts of floating-point
operations."""

import torch
from torch._guards import detect_fake_mode
from torch.utils.flop_counter import register_flop_formula

from grl_ext import _reference_heads

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def register() -> None:
    _decompose(torch.ops.grl_ext.linear_heads.default, _reference_heads.linear_heads)
    _decompose(torch.ops.grl_ext.heads_loss.default, _heads_loss)
    register_flop_formula(torch.ops.grl_ext._heads_logits)(_flops_of_logits)
    register_flop_formula(torch.ops.grl_ext._heads_gradients)(_flops_of_gradients)
    register_flop_formula(torch.ops.grl_ext._heads_loss)(_flops_of_loss)


def _decompose(operator, decomposition) -> None:
    """What `ExportedProgram.run_decompositions()`, and so ONNX and AOTInductor, put in the place of the operator.

    `torch.compile` goes on to the kernels. The two differ in how they fake tensors: the first for an export.
    """

    @operator.py_impl(_COMPOSITE)
    def either(*args):
        mode = detect_fake_mode(args)
        return (
            decomposition(*args)
            if mode is not None and mode.fake_tensor_converter.export
            else operator._op_dk(_COMPOSITE, *args)
        )


def _heads_loss(
    x, weight, bias, depth, targets, sample_weight, class_weight, lambda_, lambda_index, loss_weight, *others
):
    options = _reference_heads.HeadsOptions(sample_weight, class_weight, loss_weight, *others)
    return _reference_heads.heads_loss(x, weight, bias, depth, targets, lambda_, lambda_index, options)


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
