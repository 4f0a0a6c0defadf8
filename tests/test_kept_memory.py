"""The memory of a large feature gradient waits for the next one (csrc/cpu/kept_memory.h), and nobody notices but the clock."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from samples import assert_same

import grl_ext

pytestmark = pytest.mark.usefixtures("compiled")

ROWS, FEATURES = 4200, 2048  # 34 MB, above what malloc reuses
LAMBDA = [None, 0.5]


@pytest.fixture(scope="module")
def sample():
    torch.manual_seed(0)
    x = torch.randn(ROWS, FEATURES, requires_grad=True)
    weight = [torch.randn(size, FEATURES) / FEATURES**0.5 for size in (3, 2)]
    targets = [torch.randint(size, (ROWS,)) for size in (3, 2)]
    return x, weight, targets


def by_loss(x, weight, targets):
    return torch.autograd.grad(grl_ext.heads_loss(x, weight, None, targets, lambda_=LAMBDA).loss, x)[0]


def by_head_losses(x, weight, targets):
    return torch.autograd.grad(sum(grl_ext.heads_loss(x, weight, None, targets, lambda_=LAMBDA).head_losses), x)[0]


def by_logits(x, weight, targets):
    logits = grl_ext.linear_heads(x, weight, lambda_=LAMBDA)
    return torch.autograd.grad(logits, x, [torch.linspace(-1, 1, z.numel()).view_as(z) for z in logits])[0]


@pytest.mark.parametrize("gradient", [by_loss, by_head_losses, by_logits])
def test_the_next_gradient_lies_where_the_last_one_lay(sample, gradient):
    first = gradient(*sample)
    expected, place = first.clone(), first.data_ptr()
    del first
    other = torch.empty_like(expected)  # would lie there, had the memory returned to the system
    again = gradient(*sample)
    assert again.data_ptr() == place != other.data_ptr()
    assert_same(again, expected)


def test_a_gradient_that_lives_is_left_alone(sample):
    first = by_loss(*sample)
    expected, part = first.clone(), first[7]
    second = by_loss(*sample)
    assert second.data_ptr() != first.data_ptr()
    place = first.data_ptr()
    del first  # a view of it lives
    third = by_loss(*sample)
    assert third.data_ptr() != place
    assert_same(part, expected[7])


def test_the_gradient_is_a_tensor_like_any_other(sample):
    x, weight, targets = sample
    gradient = by_loss(*sample)
    stock = torch.empty(0)
    assert gradient._version == stock._version and gradient.layout == stock.layout and not gradient.requires_grad
    expected = gradient.clone()
    lazy = torch._lazy_clone(gradient)
    gradient.neg_()
    assert_same(lazy, expected)
    gradient = by_loss(*sample)
    gradient.untyped_storage().resize_(2 * x.nbytes)
    assert_same(gradient, expected)
    gradient.resize_(3, 4).fill_(1)
    assert gradient.sum() == 12
    with torch.inference_mode():
        logits = torch.ops.grl_ext._heads_logits(x, weight, [None, None])
        dx, *_ = torch.ops.grl_ext._heads_gradients(logits, x, weight, torch.tensor([0.5]), [-1, 0], [True] * 5)
    assert dx.is_inference()


def test_a_scaled_loss_scales_the_gradient_in_its_place(sample):
    x, weight, targets = sample
    expected = by_loss(*sample) * 4
    loss = grl_ext.heads_loss(x, weight, None, targets, lambda_=LAMBDA).loss
    assert_same(torch.autograd.grad(4 * loss, x)[0], expected)


def test_threads_do_not_share_a_block(sample):
    expected = by_logits(*sample)  # whose memory is taken and given in the backward, without Python's lock
    wrong = []

    def work():
        for _ in range(5):
            gradient = by_logits(*sample)
            if not torch.equal(gradient, expected):
                wrong.append(gradient)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_profiler_sees_it_come_and_go(sample):
    by_loss(*sample)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        by_loss(*sample)
    changes = [event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    size = sample[0].nbytes
    assert changes.count(size) == changes.count(-size) == 1 and sum(changes) == 0


def run(code: str, megabytes: str | None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if megabytes is not None:
        environment["GRL_EXT_KEEP_MB"] = megabytes
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


STEP = """
import torch, grl_ext
def step(rows):
    x = torch.ones(rows, 2048).requires_grad_()
    target = torch.zeros(rows, dtype=torch.int64)
    grl_ext.heads_loss(x, [torch.ones(2, 2048)], None, [target], lambda_=[None]).loss.backward()
"""

# How much larger the process is after gradients of some sizes came and went, in units of 4200 rows; all else leaves nothing.
HELD = """
import os
def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
step(64)
before = resident()
for rows in {rows}:
    step(rows)
print(round((resident() - before) / (4200 * 2048 * 4)))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the process's size from /proc/self/statm, which is not here")
@pytest.mark.parametrize(
    "megabytes, rows, held",
    [
        (None, [4200, 4201, 4202], 3),
        (None, range(4200, 4212), 7),
        ("0", [4200, 4201, 4202], 0),
        ("70", [4200, 4201, 4202], 2),
        ("70", [4200, 12600], 1),  # what is larger than all that may wait does not drive out the others
    ],
    ids=str,
)
def test_no_more_waits_than_asked_for(megabytes, rows, held):
    result = run(STEP + HELD.format(rows=rows), megabytes)
    assert (result.stdout, result.stderr) == (f"{held}\n", "")


@pytest.mark.parametrize("megabytes", ["", "much", "-1", "1.5", "10 MB"])
def test_a_limit_that_is_none_is_refused(megabytes):
    result = run(STEP + "try: step(4200)\nexcept ValueError as error: print(error)", megabytes)
    assert result.stdout == f"GRL_EXT_KEEP_MB must be a whole number of megabytes, got '{megabytes}'\n"
