"""`gradient_reversal` in eager mode: values, gradients, and what becomes of lambda."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import DTYPES, LAMBDAS, LAYOUTS, SHAPE, Emit, assert_same, case, deliver, expected_gradient, sample_inputs

from grl_ext import gradient_reversal, grl_linear

pytestmark = [pytest.mark.core, pytest.mark.sanitized, pytest.mark.usefixtures("path")]


def gradient(x, lambda_, grad, unshared=True):
    """x's gradient when `grad` arrives at the layer: as a fresh buffer, which the layer may overwrite, or as the
    caller's own."""
    y = gradient_reversal(x, lambda_)
    if unshared:
        return torch.autograd.grad(deliver(y, grad), x)[0]
    kept = grad.clone()
    result = torch.autograd.grad(y, x, grad)[0]
    assert_same(grad, kept)
    return result


@pytest.mark.parametrize("unshared", [True, False], ids=["fresh gradient", "caller's gradient"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_minus_lambda_times_the_incoming_one(device, dtype, unshared):
    for name, x, lambda_ in sample_inputs(device, dtype):
        grad = torch.randn_like(x)
        with case(name):
            assert_same(gradient(x, lambda_, grad, unshared), expected_gradient(grad, lambda_))


@pytest.mark.parametrize("unshared", [True, False], ids=["fresh gradient", "caller's gradient"])
@pytest.mark.parametrize("lambda_form", ["float", "0-d float32", "per sample", "per channel", "full shape"])
def test_x_and_gradient_may_lie_in_memory_in_any_way(device, lambda_form, unshared):
    lambda_ = LAMBDAS[lambda_form](device)
    for (x_name, x_layout), (grad_name, grad_layout) in product(LAYOUTS.items(), LAYOUTS.items()):
        x = x_layout(torch.randn(SHAPE, device=device)).detach().requires_grad_()
        grad = grad_layout(torch.randn(SHAPE, device=device))
        with case(f"{x_name} x", f"{grad_name} gradient"):
            assert_same(gradient(x, lambda_, grad, unshared), expected_gradient(grad, lambda_))


@pytest.mark.parametrize("path", ["compiled"], indirect=True)
def test_the_kernel_multiplies_by_the_factor_and_the_tensor(device, path):
    grad = torch.randn(3, 7, device=device)
    for tensor in (None, torch.tensor(0.3), torch.randn(3, 1), torch.randn(7), torch.randn(3, 7)):
        for factor in (1.0, -1.0, 0.7, 0.0):
            tensor = None if tensor is None else tensor.to(device)
            product = factor if tensor is None else factor * tensor
            torch.testing.assert_close(torch.ops.grl_ext._scale(grad, factor, tensor), grad * product)


@pytest.mark.parametrize("path", ["compiled"], indirect=True)
def test_the_kernel_gives_zeros_where_the_product_of_factor_and_tensor_is_zero(device, path):
    grad = torch.full((2, 3), float("inf"), device=device)
    each = torch.tensor([0.0, -0.0, 2.0], device=device)
    for factor, tensor in ((0.0, None), (-0.0, None), (0.0, torch.tensor(2.0, device=device)), (0.0, each)):
        scaled = torch.ops.grl_ext._scale(grad, factor, tensor)
        assert not scaled.any() and not scaled.signbit().any()
    scaled = torch.ops.grl_ext._scale(grad, -1.0, each)
    assert not scaled[:, :2].any() and not scaled[:, :2].signbit().any()
    assert scaled[:, 2].isneginf().all()


NOT_DENSE = {
    "every second row": lambda x: x[::2],
    "some columns": lambda x: x[:, 1:],
    "expanded": lambda x: x[:1].expand(4, 3),
}


@pytest.mark.parametrize("path", ["compiled"], indirect=True)
@pytest.mark.parametrize("layout", NOT_DENSE)
@pytest.mark.parametrize("tensor", [None, torch.tensor(0.3), torch.randn(3)], ids=["number", "0-d", "each"])
def test_the_kernel_refuses_a_gradient_that_is_not_dense(device, path, layout, tensor):
    """Its loops run over the memory from the first element on."""
    grad = NOT_DENSE[layout](torch.randn(4, 3, device=device))
    tensor = None if tensor is None else tensor.to(device)
    for call in (
        lambda: torch.ops.grl_ext._scale(grad, -0.3, tensor),
        lambda: torch.ops.grl_ext._scale_(grad, -0.3, tensor),
        lambda: torch.ops.grl_ext._scale_list_([grad], -0.3, tensor),
    ):
        with pytest.raises(ValueError, match="grad must be dense and not overlap"):
            call()


@pytest.mark.parametrize("path", ["compiled"], indirect=True)
@pytest.mark.parametrize("shape", [(2,), (4, 2), (2, 3), (2, 4, 3), (4, 1, 3)], ids=str)
def test_the_kernel_refuses_a_tensor_that_does_not_broadcast_to_the_gradient(device, path, shape):
    grad = torch.randn(4, 3, device=device)
    with pytest.raises(ValueError, match="^_scale: "):
        torch.ops.grl_ext._scale(grad, -1.0, torch.randn(shape, device=device))


@pytest.mark.parametrize("lambda_shape", [None, (), (3, 1, 1), (1, 7, 1), (5003,), (3, 7, 5003), (3, 1, 5003)], ids=str)
def test_gradient_of_a_tensor_large_enough_for_several_threads(device, threads, lambda_shape):
    # 105063 elements: three of PyTorch's grains of 32768, whose borders fall inside rows.
    threads(3)
    lambda_ = 0.3 if lambda_shape is None else torch.randn(lambda_shape, device=device)
    for dtype in DTYPES:
        x = torch.randn(3, 7, 5003, dtype=dtype, device=device, requires_grad=True)
        grad = torch.randn_like(x)
        with case(dtype):
            assert_same(gradient(x, lambda_, grad), expected_gradient(grad, lambda_))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lambda_form", ["by value", "0-d", "full shape"])
def test_half_types_are_rounded_once(device, dtype, lambda_form):
    # Every pattern of 16 bits. Lambda has 12 significant bits and the gradient at most 11, so float32 holds the product
    # exactly (bfloat16 near float32's own underflow excepted, hence not below 2^-100); what remains is one rounding to
    # nearest even.
    grad = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    grad = grad[~((grad.float().abs() < 2.0**-100) & (grad != 0))]
    x = torch.zeros_like(grad).requires_grad_()
    value = 2731 / 4096
    lambda_ = {
        "by value": value,
        "0-d": torch.tensor(value, device=device),
        "full shape": torch.full(grad.shape, value, device=device),
    }
    result = gradient(x, lambda_[lambda_form], grad)
    exact = grad.double() * -value
    nearest = torch.from_numpy(_round_half_even(exact.cpu().numpy(), dtype)).to(device)
    assert_same(result.double(), nearest)


def _round_half_even(exact, dtype):
    """float64 to the nearest half-precision number, by integer scaling alone: independent of every conversion in
    PyTorch."""
    mantissa, smallest, largest = (
        (11, -24, 65504.0) if dtype == torch.float16 else (8, -133, torch.finfo(torch.bfloat16).max)
    )
    finite = np.where(np.isfinite(exact), exact, 0.0)
    _, exponent = np.frexp(finite)
    spacing = np.ldexp(1.0, np.maximum(exponent - mantissa, smallest))
    rounded = np.rint(finite / spacing) * spacing
    rounded = np.where(np.abs(rounded) > largest, np.copysign(np.inf, rounded), rounded)
    return np.where(np.isfinite(exact), rounded, exact)


# --- lambda = 0
# ------------------------------------------------------------------------------------------------------------

ZEROS = {
    "float": lambda device: 0.0,
    "negative zero": lambda device: -0.0,
    "int": lambda device: 0,
    "0-d on the CPU": lambda device: torch.tensor(0.0),
    "0-d float64 on the CPU": lambda device: torch.tensor(0.0, dtype=torch.float64),
    "0-d": lambda device: torch.tensor(0.0, device=device),
    "0-d int64": lambda device: torch.tensor(0, device=device),
    "per sample": lambda device: torch.zeros(2, 1, 1, 1, device=device),
    "per channel": lambda device: torch.zeros(1, 3, 1, 1, device=device),
    "full shape": lambda device: torch.zeros(SHAPE, device=device),
    "not neighbours": lambda device: torch.zeros(2, 1, 4, 1, device=device),
}


@pytest.mark.parametrize("form", ZEROS)
def test_lambda_zero_gives_zeros_whatever_the_gradient_holds(device, form):
    for dtype, layout in product(DTYPES, ["contiguous", "channels last", "sliced"]):
        x = torch.randn(SHAPE, dtype=dtype, device=device, requires_grad=True)
        grad = torch.randn_like(x)
        grad[0, 0, 0], grad[0, 1], grad[1] = math.inf, -math.inf, math.nan
        with case(dtype, layout):
            assert_same(gradient(x, ZEROS[form](device), LAYOUTS[layout](grad)), torch.zeros_like(x))


def test_only_the_samples_whose_lambda_is_zero_are_silenced(device):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    grad = torch.full((3, 4), math.inf, device=device)
    result = gradient(x, torch.tensor([[0.0], [0.5], [-0.5]], device=device), grad)
    assert_same(result, torch.tensor([[0.0], [-math.inf], [math.inf]], device=device).expand(3, 4))


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("lambda_form", ["float", "0-d float32", "per sample", "full shape"])
def test_infinite_gradients_stay_infinite_where_lambda_is_not_zero(device, lambda_form, layout):
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    grad = LAYOUTS[layout](torch.full_like(x, math.inf))
    lambda_ = LAMBDAS[lambda_form](device)
    assert_same(gradient(x, lambda_, grad), (grad * -lambda_).expand(SHAPE))


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("lambda_form", ["float", "0-d float32", "per sample", "full shape"])
def test_a_real_lambda_scales_the_parts_of_a_complex_gradient_one_by_one(device, lambda_form, layout):
    # As a complex product it would make NaN of an infinite part's partner: inf * 0.
    x = torch.randn(SHAPE, dtype=torch.complex64, device=device, requires_grad=True)
    grad = LAYOUTS[layout](torch.full_like(x, complex(math.inf, 1)))
    lambda_ = LAMBDAS[lambda_form](device)
    assert_same(
        gradient(x, lambda_, grad),
        torch.complex((grad.real * -lambda_).expand(SHAPE), (grad.imag * -lambda_).expand(SHAPE)),
    )


# --- the forward
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool, torch.uint8], ids=str)
def test_forward_is_a_view_of_x(device, dtype):
    for name, layout in LAYOUTS.items():
        x = layout(torch.randn(SHAPE, device=device).to(dtype)).detach().requires_grad_(dtype in DTYPES)
        y = gradient_reversal(x, 0.3)
        with case(name):
            assert y is not x and y._base is (x if x._base is None else x._base)
            assert (y.data_ptr(), y.stride(), y.storage_offset()) == (x.data_ptr(), x.stride(), x.storage_offset())
            assert y.requires_grad == x.requires_grad
            assert_same(y, x)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed"])
@pytest.mark.parametrize("unshared", [True, False], ids=["fresh gradient", "caller's gradient"])
@pytest.mark.parametrize("lambda_form", ["float", "0-d float32"])
def test_the_gradient_keeps_its_memory_format(device, layout, unshared, lambda_form):
    x = LAYOUTS[layout](torch.randn(SHAPE, device=device)).detach().requires_grad_()
    grad = torch.randn_like(x)
    assert gradient(x, LAMBDAS[lambda_form](device), grad, unshared).stride() == x.stride()


def test_no_graph_is_built_where_x_needs_no_gradient(device):
    x = torch.randn(3, device=device)
    assert gradient_reversal(x).grad_fn is None
    with torch.no_grad():
        assert gradient_reversal(x.requires_grad_()).grad_fn is None
    with torch.inference_mode():
        assert gradient_reversal(x).grad_fn is None
        assert gradient_reversal(torch.randn(3, device=device)).is_inference()


@pytest.mark.parametrize("lambda_", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
@pytest.mark.parametrize("recorded", [True, False], ids=["grad mode", "no_grad"])
@pytest.mark.parametrize("changed", ["x", "the output"])
def test_what_comes_to_require_a_gradient_later_cannot_by_pass_the_reversal(device, lambda_, recorded, changed):
    x, w = torch.ones(3, device=device), torch.ones(3, device=device, requires_grad=True)
    with torch.set_grad_enabled(recorded):
        y = gradient_reversal(x, lambda_)
    with pytest.raises(RuntimeError, match="is being modified inplace|has been modified inplace"):
        (x if changed == "x" else y).add_(w)
        y.sum().backward()
    assert w.grad is None


def test_where_no_gradient_is_asked_the_output_may_be_modified(device):
    x = torch.ones(3, device=device)
    gradient_reversal(x, 0.5).add_(1)
    assert_same(x, torch.full_like(x, 2.0))


def test_a_lambda_that_requires_grad_does_not_make_the_output_require_it(device):
    lambda_ = torch.ones(3, device=device, requires_grad=True)
    assert not gradient_reversal(torch.randn(3, device=device), lambda_).requires_grad


def test_x_may_be_a_view_of_several(device):
    features = torch.randn(4, 6, device=device, requires_grad=True)
    left, right = features.chunk(2, dim=1)
    (gradient_reversal(left, 0.5) * 2 + right * 3).sum().backward()
    assert_same(features.grad, torch.tensor([-1.0, 3.0], device=device).repeat_interleave(3).expand(4, 6))


def test_no_gradient_where_the_consumer_gives_none(device):
    x = torch.randn(3, device=device, requires_grad=True)
    Emit.apply(gradient_reversal(x, 0.5), lambda: None).backward()
    assert x.grad is None or not x.grad.any()


@pytest.mark.parametrize("value", [0.5, 0.0, -2.0])
@pytest.mark.parametrize("form", ["float", "0-d on the CPU", "0-d", "requires grad", "one element", "per row"])
def test_sparse_gradients_are_scaled(device, form, value):
    weight = torch.randn(5, 3, device=device, requires_grad=True)
    rows = torch.tensor([1, 3, 1], device=device)
    lambda_ = {
        "float": value,
        "0-d on the CPU": torch.tensor(value),
        "0-d": torch.tensor(value, device=device),
        "requires grad": torch.tensor(value, device=device, requires_grad=True),
        "one element": torch.tensor([value], device=device),
        "per row": torch.full((5, 1), value, device=device),
    }[form]
    torch.nn.functional.embedding(rows, gradient_reversal(weight, lambda_), sparse=True).sum().backward()
    assert weight.grad.is_sparse == (form != "per row")  # a lambda for each element has no sparse form
    expected = torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0], device=device)[:, None] * -value
    assert_same(weight.grad.to_dense() + 0.0, expected.expand(5, 3) + 0.0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_jagged_tensors_go_through(device):
    parts = [torch.ones(rows, 3, device=device, requires_grad=True) for rows in (2, 4)]
    weight = torch.ones(2, 3, device=device)
    for reverse in (gradient_reversal, lambda x, lambda_: grl_linear(x, weight, None, lambda_) / 2):
        for lambda_ in (0.5, torch.tensor(0.5), 0.0):
            x = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
            for gradient in torch.autograd.grad((reverse(x, lambda_) * 2).values().sum(), parts):
                assert_same(gradient, torch.full_like(gradient, -2.0 * float(lambda_)) + 0.0)


@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of MaskedTensors", "ignore:It is not recommended to create a MaskedTensor"
)
@pytest.mark.parametrize("value", [0.5, 0.0, -2.0])
@pytest.mark.parametrize("form", ["float", "0-d float32", "per sample", "full shape"])
def test_masked_tensors_go_through(device, form, value):
    mask = torch.rand(SHAPE, device=device) > 0.5
    x = torch.masked.masked_tensor(torch.ones(SHAPE, device=device), mask, requires_grad=True)
    lambda_ = value if form == "float" else torch.full_like(LAMBDAS[form](device), value)
    (gradient_reversal(x, lambda_) * 2 + x).sum().backward()  # two gradients are added only if their masks are the same
    assert_same(x.grad.get_mask(), mask)
    assert_same(x.grad.to_tensor(0), mask * (1 - 2 * value) + 0.0)


@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of MaskedTensors", "ignore:It is not recommended to create a MaskedTensor"
)
@pytest.mark.parametrize("value", [0.5, 0.0, -2.0])
def test_a_masked_gradient_of_features_that_are_not_is_scaled(device, value):
    mask = torch.rand(SHAPE, device=device) > 0.5
    x = torch.ones(SHAPE, device=device, requires_grad=True)
    (torch.masked.as_masked_tensor(gradient_reversal(x, value), mask) * 2).sum().backward()
    assert_same(x.grad.get_mask(), mask)
    assert_same(x.grad.to_tensor(0) + 0.0, mask * (-2 * value) + 0.0)


@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of MaskedTensors", "ignore:It is not recommended to create a MaskedTensor"
)
def test_lambda_zero_gives_zeros_of_an_infinite_masked_gradient(device):
    mask = torch.tensor([True, True, False], device=device)
    x = torch.masked.masked_tensor(torch.ones(3, device=device), mask, requires_grad=True)
    gradient_reversal(x, 0.0).backward(
        torch.masked.masked_tensor(torch.tensor([math.inf, math.nan, 1.0], device=device), mask)
    )
    assert_same(x.grad.to_tensor(7), torch.tensor([0.0, 0.0, 7.0], device=device))


def test_lambda_zero_gives_zeros_of_an_infinite_sparse_gradient(device):
    for zero in (0.0, torch.tensor(0.0, device=device, requires_grad=True)):
        weight = torch.randn(5, 3, device=device, requires_grad=True)
        y = torch.nn.functional.embedding(
            torch.tensor([1, 3], device=device), gradient_reversal(weight, zero), sparse=True
        )
        (y * math.inf).sum().backward()
        assert_same(weight.grad.to_dense(), torch.zeros_like(weight))


@pytest.mark.parametrize("lambda_form", ["float", "0-d that requires grad", "full shape"])
def test_empty_complex_views_have_empty_gradients(device, lambda_form):
    base = torch.randn(4, 4, 4, dtype=torch.complex64, device=device)
    for x in (base[:0], base[:, 1:1], base[1:, 1:1, 1:].transpose(0, 2), base[:0].expand(0, 4, 4)):
        x = x.detach().requires_grad_()
        lambda_ = torch.ones(x.shape, device=device) if lambda_form == "full shape" else LAMBDAS[lambda_form](device)
        for create_graph, part in product((False, True), (torch.real, torch.imag, torch.conj)):
            gradient = torch.autograd.grad(
                part(gradient_reversal(x, lambda_)).sum().abs(), x, create_graph=create_graph
            )[0]
            assert_same(gradient, torch.zeros_like(x))


# --- lambda
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (3, 4)], ids=str)
def test_no_gradient_reaches_lambda(device, shape):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    lambda_ = torch.ones(shape, device=device, requires_grad=True)
    gradient_reversal(x, lambda_).square().sum().backward()
    assert lambda_.grad is None
    assert_same(x.grad, -2 * x.detach())


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool],
    ids=str,
)
def test_a_zero_dimensional_cpu_lambda_is_read_by_the_forward(device, dtype):
    x = torch.randn(3, device=device, requires_grad=True)
    lambda_ = torch.tensor(1, dtype=dtype)
    y = gradient_reversal(x, lambda_)
    lambda_.zero_()
    y.sum().backward()
    assert_same(x.grad, torch.full_like(x, -1.0))


def test_a_zero_dimensional_device_lambda_is_read_by_the_backward(device):
    if device.type == "cpu":
        pytest.skip("needs a device other than the CPU")
    x = torch.randn(3, device=device, requires_grad=True)
    lambda_ = torch.tensor(0.5, device=device)
    y = gradient_reversal(x, lambda_)
    lambda_.fill_(7.0)
    y.sum().backward()
    assert_same(x.grad, torch.full_like(x, -7.0))


@pytest.mark.parametrize("shape", [(1,), (3, 1), (3, 4)], ids=str)
def test_a_larger_lambda_must_not_change_before_the_backward(device, shape):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    lambda_ = torch.ones(shape, device=device)
    y = gradient_reversal(x, lambda_)
    lambda_.add_(1)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        y.sum().backward()


def test_a_larger_lambda_is_released_with_the_graph(device):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    loss = gradient_reversal(x, torch.ones(3, 1, device=device)).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


# --- properties
# ------------------------------------------------------------------------------------------------------------

sizes = st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 17]), max_size=4)


@st.composite
def broadcasting_shapes(draw):
    """(shape of x, shape of lambda), the second broadcasting to the first."""
    shape = draw(sizes)
    kept = shape[draw(st.integers(0, len(shape))) :]
    return shape, [draw(st.sampled_from([1, size])) for size in kept]


@settings(max_examples=100)
@given(
    shapes=broadcasting_shapes(),
    dtype=st.sampled_from(DTYPES),
    lambda_dtype=st.sampled_from([torch.float16, torch.float32, torch.float64, torch.int64]),
    order=st.randoms(use_true_random=False),
    unshared=st.booleans(),
)
def test_any_lambda_that_broadcasts_scales_any_gradient(device, shapes, dtype, lambda_dtype, order, unshared):
    shape, lambda_shape = shapes
    axes = order.sample(range(len(shape)), len(shape))
    x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    grad = torch.randn([shape[a] for a in axes], dtype=dtype, device=device).permute(
        [axes.index(d) for d in range(len(shape))]
    )
    lambda_ = (torch.randn(lambda_shape, device=device) * 3).to(lambda_dtype)
    assert_same(gradient(x, lambda_, grad, unshared), expected_gradient(grad, lambda_))


@settings(max_examples=100)
@given(
    lambda_=st.floats(-1e4, 1e4, allow_subnormal=False).filter(lambda v: v == 0 or abs(v) > 1e-4),
    dtype=st.sampled_from(DTYPES),
    as_tensor=st.booleans(),
)
def test_any_finite_lambda_scales_the_gradient(device, lambda_, dtype, as_tensor):
    x = torch.randn(37, dtype=dtype, device=device, requires_grad=True)
    grad = torch.randn_like(x)
    given_lambda = torch.tensor(lambda_, dtype=torch.float64, device=device) if as_tensor else lambda_
    assert_same(gradient(x, given_lambda, grad), expected_gradient(grad, lambda_))
