"""cluster_counts of bf16 views of 224 px, 3 % of the patches as anchors."""

import pytest
import torch

from aclip.kernels.cluster_counts import cluster_counts, cluster_counts_reference

VIEWS = 512 if torch.cuda.is_available() else 8
SIDE = 224


@pytest.mark.parametrize("patch_size", [16, 14])
def bench_forward(patch_size, backend, measure, device):
    num_patches = (SIDE // patch_size) ** 2
    num_anchors = -(-3 * num_patches // 100)
    views = torch.randn(VIEWS, 3, SIDE, SIDE, device=device).bfloat16()
    anchors = torch.rand(VIEWS, num_patches, device=device).argsort(1)[:, :num_anchors].contiguous()
    function = {
        "reference": cluster_counts_reference,
        "compiled": torch.compile(cluster_counts_reference),
        "triton": cluster_counts,
    }[backend]
    num_bytes = views.nbytes + anchors.nbytes + 4 * VIEWS * num_patches
    flops = 2 * views.numel() * num_anchors
    measure(lambda: function(views, anchors, patch_size, 0.65), num_bytes, flops=flops)
