"""cls_attention_scores of one layer, bf16, q and k as strided views of the fused projection."""

import pytest
import torch

from aclip.kernels.cls_attention_scores import (
    cls_attention_scores,
    cls_attention_scores_reference,
)

SHAPES = [
    pytest.param(197, 12, id="ViT-B/16"),
    pytest.param(197, 16, id="ViT-L/16"),
    pytest.param(257, 16, id="ViT-L/14"),
]
BATCH = 256 if torch.cuda.is_available() else 16
HEAD_DIM = 64


@pytest.mark.parametrize("num_tokens, heads", SHAPES)
def bench_forward(num_tokens, heads, backend, measure, device):
    qkv = torch.randn(BATCH, num_tokens, 3, heads, HEAD_DIM, device=device).bfloat16()
    q, k = qkv[:, 0, 0], qkv[:, :, 1]
    scores = torch.zeros(BATCH, num_tokens - 1, device=device)
    function = {
        "reference": cls_attention_scores_reference,
        "compiled": torch.compile(cls_attention_scores_reference),
        "triton": cls_attention_scores,
    }[backend]
    num_bytes = 2 * k.numel() + 2 * q.numel() + 8 * scores.numel()
    measure(lambda: function(q, k, scores, 1 / 12), num_bytes, flops=2 * k.numel())
