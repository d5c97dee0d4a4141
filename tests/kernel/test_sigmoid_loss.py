"""sigmoid_loss against F.logsigmoid on the whole matrix of logits in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aclip.kernels.sigmoid_loss import sigmoid_loss, sigmoid_loss_reference

TOLERANCE = 1e-5
"""Of the largest element: small elements of a gradient are differences of large ones."""
CASES = [  # n, N, E, offset, chunk_size, scale, bias
    pytest.param(12, 12, 16, 0, 5, 10.0, -10.0, id="uneven-last-chunk"),
    pytest.param(7, 21, 33, 14, 3, 100.0, -3.0, id="third-rank-of-three"),
    pytest.param(1, 1, 3, 0, 8, 1.0, 0.5, id="one-pair"),
    pytest.param(5, 2100, 8, 1300, 2, 60.0, -20.0, id="columns-over-several-tiles"),
    pytest.param(6, 9, 4, 2, 6, 0.0, 0.0, id="scale-zero"),
    pytest.param(4, 600, 8, 0, 4, 1.0, -16.0, id="all-negatives-far-below-one-ulp"),
]


def make_inputs(n, N, E, scale, bias, device):
    rows, columns = F.normalize(torch.randn(n, E), dim=1), F.normalize(torch.randn(N, E), dim=1)
    inputs = rows, columns, torch.tensor([scale]), torch.tensor([bias])
    return [tensor.to(device).requires_grad_() for tensor in inputs]


def plain_loss(rows, columns, logit_scale, logit_bias, offset):
    """As algorithm 1 of the paper writes it, with labels of 1 and -1."""
    labels = -torch.ones(len(rows), len(columns), dtype=rows.dtype, device=rows.device)
    labels[range(len(rows)), range(offset, offset + len(rows))] = 1
    logits = logit_scale * rows @ columns.T + logit_bias
    return -F.logsigmoid(labels * logits).sum() / len(rows)


@pytest.mark.parametrize("n, N, E, offset, chunk_size, scale, bias", CASES)
def test_value_and_gradients_equal_the_plain_formula(
    n, N, E, offset, chunk_size, scale, bias, device, poisoned_empty
):
    inputs = make_inputs(n, N, E, scale, bias, device)
    loss = sigmoid_loss(*inputs, offset, chunk_size)
    actual = loss, *torch.autograd.grad(3 * loss, inputs)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    plain = plain_loss(*exact, offset)
    expected = plain, *torch.autograd.grad(3 * plain, exact)
    for ours, theirs in zip(actual, expected, strict=True):
        size = theirs.abs().max().clamp_min(1e-6)
        torch.testing.assert_close(ours.double() / size, theirs / size, rtol=0, atol=TOLERANCE)


def test_mean_over_two_ranks_equals_one_process(device):
    rows, columns, scale, bias = make_inputs(10, 10, 6, 20.0, -5.0, device)
    ranks = [sigmoid_loss(rows[i : i + 5], columns, scale, bias, i, 2) for i in (0, 5)]
    joined = sigmoid_loss(rows, columns, scale, bias, 0, 10)
    split = sum(ranks) / 2
    torch.testing.assert_close(split, joined)
    for ours, theirs in zip(
        torch.autograd.grad(split, (rows, columns, scale, bias)),
        torch.autograd.grad(joined, (rows, columns, scale, bias)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("needed", [(), (0,), (1,), (2,), (3,)])
def test_only_inputs_that_need_a_gradient_get_one(needed, device):
    inputs = make_inputs(4, 6, 5, 10.0, -2.0, device)
    expected = torch.autograd.grad(plain_loss(*inputs, 1), inputs)
    inputs = [tensor.detach().requires_grad_(i in needed) for i, tensor in enumerate(inputs)]
    loss = sigmoid_loss(*inputs, 1, 3)
    assert loss.requires_grad == bool(needed)
    if needed:
        loss.backward()
    for index, tensor in enumerate(inputs):
        assert (tensor.grad is not None) == (index in needed)
        if index in needed:
            torch.testing.assert_close(tensor.grad, expected[index], rtol=1e-4, atol=TOLERANCE)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_no_tensor_is_larger_than_one_chunk_of_logits():
    inputs = [tensor.detach() for tensor in make_inputs(256, 256, 4, 10.0, -10.0, "cpu")]
    with LargestTensor() as largest:
        sigmoid_loss_reference(*inputs, 0, 16, True, True)
    assert largest.elements == 16 * 256


def test_large_logits_stay_finite(device):
    rows, columns, _, bias = make_inputs(3, 3, 4, 1.0, -10.0, device)
    loss = sigmoid_loss(rows, columns, torch.tensor([1e4], device=device), bias, 0, 2)
    assert torch.isfinite(loss)


def test_two_pairs_by_hand(device):
    """Orthogonal pairs at scale 2 and bias -1: logits 1 on the pairs and -1 elsewhere."""
    eye = torch.eye(2, device=device)
    two, minus_one = torch.tensor([2.0], device=device), torch.tensor([-1.0], device=device)
    loss = sigmoid_loss(eye, eye, two, minus_one, 0, 2)
    assert loss.item() == pytest.approx(2 * math.log(1 + math.exp(-1)), rel=1e-6)


@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, False)])
def test_opcheck(flags, device):
    arguments = (*make_inputs(5, 7, 4, 10.0, -2.0, device), 2, 3, *flags)
    # The op computes the gradients that its flags ask for, so inputs need them exactly then.
    needs = (flags[0], flags[1], flags[0], flags[0])
    inputs = [x.detach().requires_grad_(need) for x, need in zip(arguments, needs, strict=False)]
    op = torch.ops.aclip.sigmoid_loss.default
    torch.library.opcheck(op, (*inputs, *arguments[4:]))


def test_compiles_as_one_graph_with_equal_loss_and_gradients(device):
    inputs = make_inputs(5, 7, 4, 10.0, -2.0, device)

    def run(function):
        loss = function(*inputs, 2, 3)
        return loss, *torch.autograd.grad(loss, inputs)

    compiled = run(torch.compile(sigmoid_loss, fullgraph=True, backend="aot_eager"))
    for actual, expected in zip(compiled, run(sigmoid_loss), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "name, index, value",
    [
        ("rows", 0, torch.rand(5)),
        ("rows", 0, torch.rand(5, 4).half()),
        ("rows", 0, torch.rand(0, 4)),
        ("columns", 1, torch.rand(7, 3)),
        ("columns", 1, torch.rand(7, 4, device="meta")),
        ("logit_scale", 2, torch.tensor(3.0)),
        ("logit_bias", 3, torch.ones(2)),
        ("labels_offset", 4, 3),
        ("labels_offset", 4, -1),
        ("chunk_size", 5, 0),
    ],
)
def test_wrong_arguments_are_named(name, index, value):
    arguments = [torch.rand(5, 4), torch.rand(7, 4), torch.ones(1), torch.ones(1), 0, 2]
    arguments[index] = value
    with pytest.raises(ValueError, match=f"^{name} "):
        sigmoid_loss(*arguments)
