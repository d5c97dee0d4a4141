"""The cluster policy against the released rule and a slow one with a fixed number of patches."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from recipe_refusal import refusal
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.data.synthetic import synthetic_batch
from aclip.method.masks.cluster import ClusterKeys, anchor_patches
from aclip.method.masks.policies import POLICIES
from aclip.method.masks.policy import ViewsToMask, kept_patches, select_patches
from aclip.models.student import build_student
from aclip.training import step_inputs
from aclip.training.step_inputs import StepInputs

CLUSTER = POLICIES["cluster"]


def draw_views(grid, patch_size, num_views=1, batch=2, seed=0):
    """(B, V, 3, R, R): areas of a few patterns, as a picture of sky, grass and wall."""
    rng = np.random.default_rng(seed)
    patterns = rng.standard_normal((3, 3, patch_size, patch_size))
    side = grid * patch_size
    views = np.zeros((batch, num_views, 3, side, side), dtype=np.float32)
    for view in views.reshape(-1, 3, side, side):
        across, down = rng.integers(0, grid + 1, 2)
        for row in range(grid):
            for column in range(grid):
                place = np.s_[:, row * patch_size :, column * patch_size :]
                pattern = patterns[2 * (row >= down) if column < across else 1]
                patch = 1 + pattern + rng.uniform(0.3, 1.5) * rng.standard_normal(pattern.shape)
                view[place][:, :patch_size, :patch_size] = patch
    return torch.from_numpy(views)


def draw_noise(side, num_views=1, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, num_views, side, side, generator=generator)


def views_to_mask(pixels, noise, num_kept_blocks, block_size=1, threshold=0.4, anchor_ratio=0.03):
    return ViewsToMask(
        noise.shape[-1] * block_size,
        num_kept_blocks,
        block_size,
        pixels=pixels,
        noise=noise,
        keys=ClusterKeys(anchor_ratio=anchor_ratio, cluster_threshold=threshold),
    )


def kept_by_policy(views):
    selection = select_patches(CLUSTER, views)
    return kept_patches(selection, views.grid).flatten(0, 1).tolist()


def slow_anchors(noise, block_size, anchor_ratio):
    """The patches of the blocks of the least noise, of one view."""
    side = len(noise)
    number = math.ceil(round(anchor_ratio * side * side, 6))
    blocks = sorted(range(side * side), key=lambda block: noise.flat[block])[:number]
    grid = side * block_size
    return [
        (block // side * block_size + row) * grid + block % side * block_size + column
        for block in blocks
        for row in range(block_size)
        for column in range(block_size)
    ]


def slow_clusters(view, anchors, grid, threshold, embeddings=None, share=0):
    """The patches of each anchor's cluster, of one view; every similarity is one sum."""
    size = view.shape[-1] // grid
    patches = []
    for row in range(grid):
        for column in range(grid):
            values = view[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
            values = values.astype(np.float64).ravel()
            values = values - values.mean()
            patches.append(values / values.std() if values.std() > 1e-9 else 0 * values)
    clusters = []
    for anchor in anchors:
        held = set()
        for patch, values in enumerate(patches):
            similarity = (1 - share) * cosine(values, patches[anchor])
            if share:
                similarity += share * cosine(embeddings[patch], embeddings[anchor])
            if similarity > threshold:
                held.add(patch)
        clusters.append(held)
    return clusters


def cosine(first, second):
    lengths = np.linalg.norm(first) * np.linalg.norm(second)
    return first @ second / lengths if lengths else 0


def slow_kept(view, noise, num_kept_blocks, block_size, threshold, anchor_ratio, *mix):
    """The patches that a view keeps with a fixed number: block means of u - n, highest first."""
    side = len(noise)
    grid = side * block_size
    anchors = slow_anchors(noise, block_size, anchor_ratio)
    clusters = slow_clusters(view, anchors, grid, threshold, *mix)
    patches_of = {block: [] for block in range(side * side)}
    for patch in range(grid * grid):
        patches_of[patch // grid // block_size * side + patch % grid // block_size].append(patch)
    score = {
        block: noise.flat[block] - np.mean([sum(p in held for held in clusters) for p in patches])
        for block, patches in patches_of.items()
    }
    best = sorted(score, key=lambda block: -score[block])[:num_kept_blocks]
    return sorted(patch for block in best for patch in patches_of[block])


@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize(
    "side, block_size, patch_size, num_kept, anchor_ratio",
    [(14, 1, 4, 98, 0.03), (7, 2, 4, 25, 0.03), (7, 1, 5, 24, 0.2), (3, 3, 2, 1, 0.3)],
)
def test_the_policy_keeps_what_the_slow_rule_keeps(
    side, block_size, patch_size, num_kept, anchor_ratio, num_views
):
    pixels = draw_views(side * block_size, patch_size, num_views)
    noise = draw_noise(side, num_views)
    views = views_to_mask(pixels, noise, num_kept, block_size, anchor_ratio=anchor_ratio)
    rows = zip(pixels.flatten(0, 1).numpy(), noise.flatten(0, 1).numpy(), strict=True)
    expected = [slow_kept(*row, num_kept, block_size, 0.4, anchor_ratio) for row in rows]
    assert kept_by_policy(views) == expected
    assert {len(kept) for kept in expected} == {num_kept * block_size**2}


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("block_size, num_views", [(1, 2), (2, 1)])
def test_embeddings_take_part_as_in_the_slow_rule(share, block_size, num_views):
    pixels = draw_views(6, 4, num_views)
    noise = draw_noise(6 // block_size, num_views)
    generator = torch.Generator().manual_seed(2)
    embeddings = torch.randn(2, num_views, 36, 3, generator=generator)
    plain = views_to_mask(pixels, noise, 18 // block_size**2, block_size, anchor_ratio=0.1)
    # At half of the run their weight is half of the key's; at its start it is 0.
    keys = plain.keys.model_copy(update={"cluster_embeddings": min(2 * share, 1.0)})
    progress = share / keys.cluster_embeddings
    views = replace(plain, embeddings=embeddings, keys=keys, progress=progress)
    rows = (tensor.flatten(0, 1).numpy() for tensor in (pixels, noise, embeddings))
    expected = [
        slow_kept(view, of_view, views.num_kept_blocks, block_size, 0.4, 0.1, embedded, share)
        for view, of_view, embedded in zip(*rows, strict=True)
    ]
    assert kept_by_policy(views) == expected
    assert kept_by_policy(views) != kept_by_policy(plain)
    assert kept_by_policy(replace(views, progress=0.0)) == kept_by_policy(plain)


def test_the_student_s_embeddings_count_more_as_the_run_goes_on(monkeypatch):
    overrides = [
        "teacher=null",
        "loss.simclr=0",
        "loss.byol=0",
        "mask.policy=cluster",
        "mask.block_size=1",
        "mask.cluster_embeddings=0.8",
        "views.student=1",
    ]
    recipe = load_recipe(SMALL_RECIPE, overrides)
    image = build_student(recipe).image
    cpu = torch.device("cpu")
    inputs = StepInputs(recipe, (), None, image, cpu, torch.float32)
    read = []
    monkeypatch.setattr(
        step_inputs, "select_patches", lambda policy, views: read.append(views) or None
    )
    batch = synthetic_batch(recipe, 2)
    pixels = torch.randn(2, 1, 3, 64, 64)
    for progress in (0.0, 0.5, 1.0):
        inputs.select(batch, pixels, None, progress)
    assert [views.progress for views in read] == [0, 0.5, 1]
    assert read[2].keys.cluster_embeddings == 0.8
    with torch.no_grad():
        expected = image.vit.patch_embed(pixels[:, 0])  # timm's convolution
    torch.testing.assert_close(read[2].embeddings[:, 0], expected)
    assert not read[2].embeddings.requires_grad


@pytest.mark.parametrize("block_size", [1, 2])
def test_anchors_are_patches_of_the_least_noise(block_size):
    noise = draw_noise(7, num_views=2)
    views = views_to_mask(draw_views(7 * block_size, 2, 2), noise, 5, block_size, anchor_ratio=0.06)
    chosen = anchor_patches(views).flatten(0, 1)
    assert chosen.shape == (4, 3 * block_size**2)  # 2.94 of 49, rounded up
    for ids, of_view in zip(chosen.tolist(), noise.flatten(0, 1).numpy(), strict=True):
        assert ids == slow_anchors(of_view, block_size, 0.06)


def test_rows_of_which_the_released_rule_keeps_exactly_so_many_keep_the_same_patches():
    """The released rule drops each cluster whole, with the threshold that drops half on average."""
    grid, batch, num_kept = 6, 90, 18
    pixels, noise = draw_views(grid, 4, batch=batch), draw_noise(grid, batch=batch)
    pairs = list(zip(pixels[:, 0].numpy(), noise[:, 0].numpy(), strict=True))
    anchors = [slow_anchors(of_view, 1, 0.03) for _, of_view in pairs]

    def released(threshold):
        for (view, _), ids in zip(pairs, anchors, strict=True):
            yield set(range(grid * grid)) - set().union(*slow_clusters(view, ids, grid, threshold))

    low, high = -1.0, 1.0
    for _ in range(9):
        threshold = (low + high) / 2
        mean = np.mean([len(kept) for kept in released(threshold)])
        low, high = (threshold, high) if mean < num_kept else (low, threshold)
    kept = list(released(threshold))
    assert np.mean([len(each) for each in kept]) == pytest.approx(num_kept, abs=0.5)
    ours = kept_by_policy(views_to_mask(pixels, noise, num_kept, threshold=threshold))
    exact = [row for row in range(batch) if len(kept[row]) == num_kept]
    assert len(exact) >= 5
    for row in range(batch):
        # Where it keeps more or fewer, ours are among them, or they among ours.
        common = len(kept[row] & set(ours[row]))
        assert common == min(len(kept[row]), num_kept)
        assert row not in exact or set(ours[row]) == kept[row]


def test_patches_of_fewer_clusters_and_then_of_more_noise_are_kept_first():
    # Four patterns on a 3 x 3 grid; S of two patches is 1 for the same pattern, and else below 0.5.
    kinds = [0, 0, 1, 0, 2, 2, 1, 1, 3]
    patterns = torch.tensor(
        [[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1], [-1, 1, 1, 1]], dtype=torch.float32
    )
    patches = patterns[kinds].view(9, 1, 2, 2).expand(9, 3, 2, 2)
    pixels = patches.view(3, 3, 3, 2, 2).permute(2, 0, 3, 1, 4).reshape(1, 1, 3, 6, 6)
    # Three anchors: two of kind 0 (patches 0 and 1) and one of kind 1 (patch 2).
    noise = torch.tensor([0.01, 0.02, 0.03, 0.9, 0.5, 0.6, 0.2, 0.8, 0.4]).view(1, 1, 3, 3)
    order = [5, 4, 8, 7, 6, 2, 3, 1, 0]  # no cluster, one cluster, two clusters; noise in each
    for num_kept in range(1, 10):
        views = views_to_mask(pixels, noise, num_kept, threshold=0.9, anchor_ratio=0.3)
        assert kept_by_policy(views) == [sorted(order[:num_kept])]


def test_ties_of_score_go_to_the_lower_index():
    pixels = torch.zeros(1, 1, 3, 8, 8)  # no patch has variance, so none is in a cluster
    views = views_to_mask(pixels, torch.full((1, 1, 4, 4), 0.25), 5)
    assert kept_by_policy(views) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("value", [0.0, 0.1, -2.1179])
def test_patches_that_are_all_equal_are_dropped_at_random(value):
    noise = draw_noise(5, batch=1)
    views = views_to_mask(torch.full((1, 1, 3, 15, 15), value), noise, 12)
    assert kept_by_policy(views) == [sorted(noise.flatten().argsort()[-12:].tolist())]


def test_a_view_of_one_patch_keeps_it():
    assert kept_by_policy(views_to_mask(torch.rand(2, 1, 3, 4, 4), draw_noise(1), 1)) == [[0], [0]]


def test_a_threshold_that_does_not_fit_is_said_with_one_that_does():
    pixels, noise = draw_views(8, 4, batch=60), draw_noise(8, batch=60)
    metrics, warning = CLUSTER.inspect(views_to_mask(pixels, noise, 32, threshold=0.99))
    # Each view has two anchors, which are in their own clusters and in no other.
    assert metrics == {"clustered": pytest.approx(2 / 64)}
    assert warning.startswith("clusters hold 3 % of the patches, where the mask drops 50 %")
    fitting = float(warning.partition("cluster_threshold=")[2].split()[0])
    metrics, warning = CLUSTER.inspect(views_to_mask(pixels, noise, 32, threshold=fitting))
    assert metrics["clustered"] == pytest.approx(0.5, abs=0.03)
    assert warning == ""
    assert CLUSTER.inspect(views_to_mask(pixels, noise, 64, threshold=0.99))[1] == ""


def test_keys_of_the_cluster_mask_need_the_cluster_mask():
    for key, value in (
        ("anchor_ratio", 0.05),
        ("cluster_threshold", 0.5),
        ("cluster_embeddings", 0.5),
    ):
        assert refusal(f"mask.{key}={value}", recipe="random_1x50_vitb16") == (
            f"mask.{key} is {value}, but mask.policy random does not read it; leave it out, or set "
            "mask.policy to cluster"
        )
    for wrong in ("mask.anchor_ratio=0", "mask.cluster_threshold=1"):
        assert wrong.partition("=")[0] in refusal(wrong, "mask.policy=cluster")
