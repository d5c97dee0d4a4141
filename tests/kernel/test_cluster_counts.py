"""cluster_counts against the whole map of similarities, made pixel by pixel in fp64."""

import numpy as np
import pytest
import torch

from aclip.kernels.cluster_counts import (
    anchor_similarity,
    cluster_counts,
    cluster_counts_reference,
)

CASES = [  # M, G, p, A, dtype
    pytest.param(1, 14, 2, 6, torch.bfloat16, id="M1-G14-p2-A6-bf16"),
    pytest.param(2, 3, 7, 2, torch.float32, id="M2-G3-p7-A2-fp32"),
    pytest.param(1, 5, 3, 20, torch.float16, id="M1-G5-p3-A20-fp16"),  # two tiles of anchors
    pytest.param(1, 17, 2, 9, torch.float32, id="M1-G17-p2-A9-fp32"),
    pytest.param(3, 1, 4, 1, torch.float32, id="M3-G1-p4-A1-fp32"),
]
THRESHOLD = 0.2


def make_views(M, G, p, A, dtype, device):
    """Views whose patches are one of six patterns in all strengths, with noise; and anchors."""
    chosen = torch.randn(6, 3, p, p)[torch.randint(6, (M, G, G))]
    chosen = chosen * (0.2 + torch.rand(M, G, G, 1, 1, 1))
    views = chosen.permute(0, 3, 1, 4, 2, 5).reshape(M, 3, G * p, G * p)
    views = views + 0.1 * torch.randn_like(views) + 2
    anchors = torch.stack([torch.randperm(G * G)[:A] for _ in range(M)])
    return views.to(device, dtype), anchors.to(device)


def slow_similarity(views, patch_size):
    """(M, P, P) fp64: every patch with every other, one pair after the other."""
    views = views.double().cpu().numpy()
    grid = views.shape[-1] // patch_size
    maps = np.zeros((len(views), grid**2, grid**2))
    for m, view in enumerate(views):
        patches = []
        for row in range(grid):
            for column in range(grid):
                top, left = row * patch_size, column * patch_size
                patch = view[:, top : top + patch_size, left : left + patch_size].ravel()
                std = patch.std()
                patches.append((patch - patch.mean()) / std if std else np.zeros_like(patch))
        for i, one in enumerate(patches):
            for j, other in enumerate(patches):
                lengths = np.sqrt((one @ one) * (other @ other))
                maps[m, i, j] = one @ other / lengths if lengths else 0.0
    return maps


@pytest.mark.parametrize("M, G, p, A, dtype", CASES)
def test_counts_the_anchors_whose_similarity_is_above_the_threshold(
    M, G, p, A, dtype, device, poisoned_empty
):
    views, anchors = make_views(M, G, p, A, dtype, device)
    maps = slow_similarity(views, p)
    counts = cluster_counts(views, anchors, p, THRESHOLD)
    assert counts.dtype == torch.int32
    assert counts.shape == (M, G * G)
    similarity = anchor_similarity(views, anchors, p).cpu().numpy()
    for m, ids in enumerate(anchors.cpu().numpy()):
        assert np.abs(maps[m][ids] - THRESHOLD).min() > 1e-6  # rounding decides nothing
        expected = (maps[m][ids] > THRESHOLD).sum(0)
        assert counts[m].tolist() == expected.tolist()
        assert G == 1 or expected.min() < expected.max()  # there is something to see
        np.testing.assert_allclose(similarity[m], maps[m][ids], atol=1e-5)


@pytest.mark.parametrize("value", [0.1, 2.2489083])
def test_patches_without_variance_are_in_no_cluster(value, device):
    views = torch.full((1, 3, 9, 9), value, device=device)
    views[0, 1, :3, 3:6] += torch.linspace(0, 1, 9, device=device).view(3, 3)  # the second patch
    views[0, :, 6:, 6:] = views[0, :, :3, 3:6]  # the last one is like it
    anchors = torch.arange(9, device=device).unsqueeze(0)
    # Below 0 too, where rounding noise in place of the zeros would be seen.
    assert cluster_counts(views, anchors, 3, 0.0).tolist() == [[0, 2, 0, 0, 0, 0, 0, 0, 2]]
    assert cluster_counts(views, anchors, 3, -0.5).tolist() == [[9] * 9]
    assert not cluster_counts(views, anchors[:, :1], 3, 0.0).any()


def test_brightness_and_contrast_do_not_count_but_what_is_inverted_does(device):
    pattern = torch.randn(3, 4, 4, device=device)
    views = torch.stack([pattern, 5 + 0.01 * pattern, 3 - pattern, pattern.roll(1, 2)])
    views = views.view(2, 2, 3, 4, 4).permute(2, 0, 3, 1, 4).reshape(1, 3, 8, 8)
    first = torch.tensor([[0]], device=device)
    similarity = anchor_similarity(views, first, 4)[0, 0]
    torch.testing.assert_close(
        similarity[:3].cpu(), torch.tensor([1.0, 1.0, -1.0]), atol=2e-4, rtol=0
    )
    assert abs(similarity[3].item()) < 0.9
    assert cluster_counts(views, first, 4, 0.9).tolist() == [[1, 1, 0, 0]]


def test_empty_batch(device):
    views = torch.zeros(0, 3, 8, 8, device=device)
    anchors = torch.zeros(0, 2, dtype=torch.int64, device=device)
    assert cluster_counts(views, anchors, 4, 0.5).shape == (0, 4)


def test_strided_views_and_no_gradient(device):
    views, anchors = make_views(2, 4, 4, 3, torch.float32, device)
    expected = cluster_counts_reference(views, anchors, 4, THRESHOLD)
    wide = torch.zeros(2, 3, 16, 20, device=device)
    wide[..., :16] = views
    counts = cluster_counts(wide[..., :16].requires_grad_(), anchors, 4, THRESHOLD)
    assert torch.equal(counts, expected)
    assert not counts.requires_grad


def test_opcheck(device):
    views, anchors = make_views(2, 3, 4, 2, torch.float32, device)
    torch.library.opcheck(torch.ops.aclip.cluster_counts.default, (views, anchors, 4, 0.5))


def test_compiles_as_one_graph_with_equal_counts(device):
    views, anchors = make_views(2, 3, 4, 2, torch.float32, device)
    compiled = torch.compile(cluster_counts, fullgraph=True)
    counts = compiled(views, anchors, 4, THRESHOLD)
    assert torch.equal(counts, cluster_counts(views, anchors, 4, THRESHOLD))


@pytest.mark.parametrize(
    "name, index, value",
    [
        ("views", 0, torch.rand(2, 1, 8, 8)),
        ("views", 0, torch.rand(2, 3, 8, 8).double()),
        ("views", 0, torch.rand(2, 3, 8, 12)),
        ("views", 2, 3),
        ("views", 2, 0),
        ("anchors", 1, torch.zeros(1, 2, dtype=torch.int64)),
        ("anchors", 1, torch.zeros(2, 2)),
        ("anchors", 1, torch.zeros(2, 2, dtype=torch.int64, device="meta")),
    ],
)
def test_wrong_arguments_are_named(name, index, value):
    arguments = [torch.rand(2, 3, 8, 8), torch.zeros(2, 2, dtype=torch.int64), 4, 0.5]
    arguments[index] = value
    with pytest.raises(ValueError, match=f"^{name} "):
        cluster_counts(*arguments)
