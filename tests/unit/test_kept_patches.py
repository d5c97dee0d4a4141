"""What masks keep of an object, by hand on tiny masks, and which samples are pictured."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.data.shards.listing import Skip
from aclip.data.shards.tar import TarShard
from aclip.reports.kept_patches import (
    kept_object_patches,
    kept_object_share,
    loose_sample,
    object_coverage,
    read_picture_set,
)

TINY = ["model.image.resolution=32", "mask.block_size=1", "teacher.resolution=32"]


def mask_of(rows) -> Image.Image:
    return Image.fromarray(np.array(rows, dtype=np.uint8) * 255).convert("1")


def png(array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_coverage_is_the_share_of_a_patch_in_the_view():
    pixels = np.zeros((8, 8))
    pixels[:2, :2] = 1  # a quarter of the first 4 x 4 patch
    pixels[4:, 4:6] = 1  # half of the last
    whole, right_half = object_coverage(mask_of(pixels), np.array([[0, 0, 8, 8], [0, 4, 8, 4]]), 2)
    assert whole.tolist() == [[0.25, 0], [0, 0.5]]
    assert right_half.tolist() == [[0, 0], [1, 0]]  # its patches are 4 high and 2 wide


def test_a_patch_is_the_objects_from_a_quarter_and_unknown_objects_count_nothing():
    coverage = torch.tensor(
        [[[[0.25, 0.2499], [1.0, 0.6]], [[0.3, 0.0], [0.0, 0.0]]], [[[torch.nan] * 2] * 2] * 2]
    )
    keep_ids = torch.tensor([[[0, 1], [1, 3]], [[0, 1], [0, 1]]])
    kept, total = kept_object_patches(keep_ids, coverage)
    assert total.tolist() == [[3, 1], [0, 0]]
    assert kept.tolist() == [[1, 0], [0, 0]]
    # One view keeps 1 of 3, the other 0 of 1; the second sample has no object.
    assert kept_object_share(kept, total) == pytest.approx((1 / 3 + 0) / 2)


@pytest.fixture
def scenes(write_tar):
    """Twelve scenes in a shard, the object at the top left; one image is broken."""
    object_pixels = np.zeros((64, 64))
    object_pixels[:32, :32] = 255
    members = []
    for number in range(12):
        image = png(np.full((64, 64, 3), number)) if number != 3 else b"broken"
        members += [(f"{number:02d}.png", image), (f"{number:02d}.mask.png", png(object_pixels))]
        members.append((f"{number:02d}.json", json.dumps({"caption": f"scene {number}"}).encode()))
    return write_tar("scenes.tar", members)


def whole_views(num_views=2):
    return [*TINY, "views.scale=[1, 1]", f"views.student={num_views}"]


def test_policies_keep_the_object_as_the_attention_on_it_says(scenes):
    recipe = load_recipe(SMALL_RECIPE, whole_views())
    pictured = read_picture_set(recipe, TarShard(scenes).walk(), num_measured=10)
    assert pictured.captions == [f"scene {n}" for n in range(11) if n != 3]
    assert pictured.skipped == {"unreadable_image": 1}
    # 4 x 4 patches, of which 8 are kept; the object has the 4 at the top left.
    scores = torch.zeros(10, 4, 4)
    scores[:, :2, :2] = 1
    for policy, expected in (("attentive", 1.0), ("inverse", 0.0)):
        kept, total = kept_object_patches(pictured.keep_ids(policy, scores), pictured.coverage)
        ratio = pictured.view_boxes[..., 2:].float() / 64
        whole = (ratio > 0.9).all(-1)
        assert whole.any() and (total[whole] == 4).all()
        assert kept_object_share(kept[whole], total[whole]) == expected
    random = pictured.keep_ids("random")
    assert random.shape == (10, 2, 8)
    assert len({tuple(ids) for ids in random.flatten(0, 1).tolist()}) > 10


@pytest.mark.parametrize(
    "change, progress, words, is_random",
    [
        ("at_once", 0.0, "8 of 16 kept at random", True),
        ("at_once", 0.5, "8 of 16 patches kept", False),
        ("gradual", 0.0, "8 of 16 kept at random", True),
        ("gradual", 0.125, "8 of 16 kept, 75 % noise", None),
        ("gradual", 0.5, "8 of 16 patches kept", False),
    ],
)
def test_pictures_show_and_say_what_the_mask_does_while_it_warms_up(
    scenes, change, progress, words, is_random
):
    warming = ["mask.warmup=0.5", f"mask.warmup_change={change}"]
    pictured = read_picture_set(
        load_recipe(SMALL_RECIPE, [*whole_views(), *warming]), TarShard(scenes).walk()
    )
    scores = torch.rand(8, 4, 4, generator=torch.Generator().manual_seed(0))
    kept = pictured.keep_ids("attentive", scores, progress)
    if is_random is not None:
        same = pictured.keep_ids("random") if is_random else pictured.keep_ids("attentive", scores)
        assert torch.equal(kept, same)
    columns = pictured.columns("attentive", scores, progress=progress)
    assert [column.subtitle for column in columns[2:]] == [words, words, "8 of 16 patches kept"]
    # The other policies know no warm-up.
    gaussian = pictured.keep_ids("gaussian", None, progress)
    assert torch.equal(gaussian, pictured.keep_ids("gaussian"))


@pytest.mark.parametrize("policy", ["attentive", "cluster", "random"])
def test_pictures_keep_as_many_as_the_run_does_at_that_moment(scenes, policy):
    growing = ["mask.keep_ratio=0.25", "mask.keep_ratio_end=1", "mask.keep_ratio_shape=cosine"]
    pictured = read_picture_set(
        load_recipe(SMALL_RECIPE, [*whole_views(), *growing]), TarShard(scenes).walk()
    )
    scores = torch.rand(8, 4, 4, generator=torch.Generator().manual_seed(0))
    for progress, number in ((0.0, 4), (0.5, 10), (1.0, 16)):
        assert pictured.keep_ids(policy, scores, progress).shape == (8, 2, number)
        columns = pictured.columns(policy, scores, progress=progress)
        assert columns[2].subtitle == f"{number} of 16 patches kept"


def test_mask_of_another_size_than_the_image_is_counted(write_tar):
    members = []
    for number, side in enumerate((64, 32, 128)):
        members.append((f"{number}.png", png(np.zeros((64, 64, 3)))))
        members.append((f"{number}.mask.png", png(np.full((side, side), 255))))
        members.append((f"{number}.txt", str(number).encode()))
    samples = TarShard(write_tar("masks.tar", members)).walk()
    pictured = read_picture_set(load_recipe(SMALL_RECIPE, TINY), samples, num_measured=10)
    assert pictured.captions == ["0"]
    assert pictured.skipped == {"object_mask_of_another_size": 2}


def test_eight_are_read_where_no_object_is_known(write_tar):
    members = [(f"{n:02d}.png", png(np.zeros((32, 32, 3)))) for n in range(12)]
    recipe = load_recipe(SMALL_RECIPE, TINY)
    samples = TarShard(write_tar("plain.tar", members)).walk()
    pictured = read_picture_set(recipe, samples, num_measured=100)
    assert pictured.captions == [f"{n:02d}" for n in range(8)]  # no captions: named by their keys
    assert kept_object_patches(pictured.keep_ids("random"), pictured.coverage)[1].sum() == 0
    assert not pictured.is_captioned.any()
    members += [(f"{n:02d}.txt", b"a caption") for n in range(1, 12, 2)]
    samples = TarShard(write_tar("half.tar", sorted(members))).walk()
    pictured = read_picture_set(recipe, samples, num_measured=100, needs_objects=False)
    assert pictured.is_captioned.tolist() == [False, True] * 6


def test_nothing_usable_gives_no_pictures():
    samples = [Skip("truncated_shard"), loose_sample("x.jpg", b"broken", "x")]
    assert read_picture_set(load_recipe(SMALL_RECIPE, TINY), samples) is None


@pytest.mark.parametrize(
    "overrides, kept",
    [
        pytest.param(["mask.policy=random", "mask.keep_ratio=0.25", "teacher=null"], 4, id="FLIP"),
        pytest.param(["mask.policy=none", "mask.keep_ratio=1", "teacher=null"], 8, id="CLIP"),
        pytest.param(
            ["mask.policy=none", "mask.block_size=3", "teacher=null"], 8, id="blocks that don't fit"
        ),
    ],
)
def test_a_recipe_without_attentive_mask_is_pictured_with_one(scenes, overrides, kept):
    recipe = load_recipe(SMALL_RECIPE, [*whole_views(1), *overrides])
    pictured = read_picture_set(recipe, TarShard(scenes).walk())
    assert pictured.images.shape == (8, 3, 32, 32)
    assert pictured.keep_ids("attentive", torch.rand(8, 4, 4)).shape == (8, 1, kept)
