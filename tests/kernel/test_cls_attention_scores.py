"""cls_attention_scores against the full N x N attention that it avoids."""

import pytest
import torch

from aclip.kernels.cls_attention_scores import (
    cls_attention_scores,
    cls_attention_scores_reference,
)

CASES = [  # B, N, H, d, dtype
    pytest.param(2, 197, 3, 64, torch.bfloat16, id="B2-N197-H3-d64-bf16"),
    pytest.param(3, 50, 1, 32, torch.float32, id="B3-N50-H1-d32-fp32"),
    pytest.param(1, 257, 2, 80, torch.float16, id="B1-N257-H2-d80-fp16"),
    pytest.param(1, 2, 5, 7, torch.float32, id="B1-N2-H5-d7-fp32"),
]


def make_qkv(B, N, H, d, dtype, device):
    """q and k as strided views of one (B, N, 3, H, d) projection, as a ViT block has them."""
    qkv = (2 * torch.randn(B, N, 3, H, d)).to(device, dtype)
    return qkv[:, 0, 0], qkv[:, :, 1]


def full_attention_row(q, k):
    """Head mean of row 0 of softmax(Q K^T / sqrt(d)) in fp64, with all rows of Q equal to q."""
    q, k = q.double(), k.double().transpose(1, 2)  # (B, H, N, d)
    query = q[:, :, None].expand_as(k)
    attention = (query @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
    return attention.mean(1)[:, 0, 1:]


@pytest.mark.parametrize("B, N, H, d, dtype", CASES)
def test_adds_the_weighted_head_mean_of_the_cls_row(B, N, H, d, dtype, device):
    layers = [make_qkv(B, N, H, d, dtype, device) for _ in range(2)]
    scores = torch.rand(B, N - 1, device=device)
    expected = scores.double() + 0.25 * sum(full_attention_row(q, k) for q, k in layers)
    for q, k in layers:
        assert cls_attention_scores(q, k, scores, 0.25) is None
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("B, N, H, d, dtype", CASES)
def test_op_equals_its_reference(B, N, H, d, dtype, device):
    q, k = make_qkv(B, N, H, d, dtype, device)
    actual, expected = torch.zeros(2, B, N - 1, device=device).unbind()
    cls_attention_scores(q, k, actual, 0.5)
    cls_attention_scores_reference(q, k, expected, 0.5)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_large_logits_stay_finite(device):
    q, k = make_qkv(1, 9, 1, 4, torch.float32, device)
    scores = torch.zeros(1, 8, device=device)
    cls_attention_scores(q * 1e4, k, scores, 1.0)
    assert torch.isfinite(scores).all()


def test_no_gradient_flows(device):
    q, k = make_qkv(1, 5, 2, 4, torch.float32, device)
    scores = torch.zeros(1, 4, device=device)
    cls_attention_scores(q.requires_grad_(), k, scores, 1.0)
    assert not scores.requires_grad


def test_opcheck(device):
    q, k = make_qkv(2, 9, 2, 8, torch.float32, device)
    op = torch.ops.aclip.cls_attention_scores.default
    torch.library.opcheck(op, (q, k, torch.zeros(2, 8, device=device), 0.5))


def test_compiles_as_one_graph_with_equal_scores(device):
    q, k = make_qkv(2, 9, 2, 8, torch.float32, device)
    actual, expected = torch.zeros(2, 2, 8, device=device).unbind()
    actual, expected = actual.clone(), expected.clone()
    torch.compile(cls_attention_scores, fullgraph=True)(q, k, actual, 0.5)
    cls_attention_scores(q, k, expected, 0.5)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "name, index, value",
    [
        ("q", 0, torch.rand(2, 8)),
        ("q", 0, torch.rand(2, 2, 8).double()),
        ("k", 1, torch.rand(2, 9, 2, 7)),
        ("k", 1, torch.rand(2, 9, 2, 8).half()),
        ("k", 1, torch.rand(2, 9, 2, 8, device="meta")),
        ("scores", 2, torch.rand(2, 9)),
        ("scores", 2, torch.rand(2, 8).half()),
        ("scores", 2, torch.rand(8, 2).t()),
    ],
)
def test_wrong_arguments_are_named(name, index, value):
    arguments = [torch.rand(2, 2, 8), torch.rand(2, 9, 2, 8), torch.zeros(2, 8), 0.5]
    arguments[index] = value
    with pytest.raises(ValueError, match=f"^{name} "):
        cls_attention_scores(*arguments)
