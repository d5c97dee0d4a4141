"""Views cut on the device: the worker's boxes, and Pillow's pixels within one level."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from aclip.config.recipe import Recipe
from aclip.data.batch import Batch, join
from aclip.data.images.device_views import cut_views_on_device
from aclip.data.images.views import crop, random_box
from aclip.data.images.whole_images import PixelBuffer, WholeImages, read_whole_image, stack_images
from aclip.data.loader import build_train_loader
from aclip.data.shards.listing import Shard, Skip
from aclip.kernels.cut_views import reference
from aclip.training.step_inputs import StepInputs

SIZES = [(64, 64), (91, 47), (47, 91), (200, 33), (33, 200), (120, 160)]
NOT_VIEWS = ["student_boxes", "teacher_box", "augment_params", "ssl_params", "cursors"]
VIEWS = ["student_views", "teacher_view", "ssl_views"]


def encode(height: int, width: int, seed: int = 0, image_format: str = "JPEG") -> bytes:
    """Noise and broad shapes together, so that both fine and smooth parts are resampled."""
    rng = np.random.default_rng(seed)
    fine = rng.integers(0, 256, (height, width, 3))
    broad = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
    buffer = io.BytesIO()
    mixed = (0.3 * fine + 0.7 * np.asarray(broad)).astype(np.uint8)
    Image.fromarray(mixed).save(buffer, image_format, quality=95)
    return buffer.getvalue()


def levels_apart(first, second) -> int:
    return int((torch.as_tensor(first).int() - torch.as_tensor(second).int()).abs().max())


@pytest.mark.parametrize("side", [16, 56, 224])
def test_views_are_within_one_level_of_pillows(side):
    rng = np.random.default_rng(side)
    whole_images = [
        read_whole_image(encode(*size, seed), 1, 1024) for seed, size in enumerate(SIZES)
    ]
    boxes = [[random_box(rng, *size, (0.05, 1.0)) for _ in range(3)] for size in SIZES]
    for row, (height, width) in zip(boxes, SIZES, strict=True):
        row += [(0, 0, height, width), (height - 7, width - 9, 7, 9)]  # all of it, and a corner
    found = cut_views_on_device(stack_images(whole_images), torch.tensor(boxes), None, side, None)
    views = found["student_views"]
    for image, row, found in zip(whole_images, boxes, views, strict=True):
        image = Image.fromarray(image.pixels)
        expected = np.stack([crop(image, box, side) for box in row])
        assert levels_apart(found, expected) <= 1


def test_weights_sum_to_one_inside_the_image_and_are_zero_beyond():
    start, length = torch.tensor([[0.0, 3.5]]), torch.tensor([[20.0, 16.5]])
    weights = reference.resampling_weights(start, length, torch.tensor([[20]]), 26, 7)
    assert weights.shape == (1, 2, 7, 26)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 7))
    assert (weights[..., 20:] == 0).all()


def test_padding_and_batching_change_no_view(monkeypatch):
    whole_images = [
        read_whole_image(encode(*size, seed), 1, 1024) for seed, size in enumerate(SIZES)
    ]
    boxes = torch.tensor([[(3, 5, 20, 25)]] * len(SIZES), dtype=torch.int32)
    together = cut_views_on_device(stack_images(whole_images), boxes, boxes[:, 0], 32, 16)
    monkeypatch.setattr(reference, "IMAGES_AT_ONCE", 4)
    in_parts = cut_views_on_device(stack_images(whole_images), boxes, boxes[:, 0], 32, 16)
    for name in ("student_views", "teacher_view"):
        assert levels_apart(together[name], in_parts[name]) <= 1  # sums in another order
    assert together["teacher_view"].shape == (6, 3, 16, 16) and together["ssl_views"] is None
    for index, image in enumerate(whole_images):
        alone = cut_views_on_device(stack_images([image]), boxes[index : index + 1], None, 32, None)
        assert levels_apart(alone["student_views"][0], together["student_views"][index]) <= 1


@pytest.mark.parametrize(
    ("size", "max_side", "factor"),
    [((100, 80), 100, 1), ((101, 80), 100, 2), ((75, 300), 100, 3), ((64, 1000), 100, 10)],
)
def test_a_large_image_is_reduced_by_the_smallest_whole_factor_to_means_of_squares(
    size, max_side, factor
):
    content = encode(*size, image_format="PNG")
    image = read_whole_image(content, 1, max_side)
    assert (image.factor, image.height, image.width) == (factor, *size)
    pixels = np.asarray(Image.open(io.BytesIO(content))).astype(float)
    assert image.pixels.shape == (-(-size[0] // factor), -(-size[1] // factor), 3)
    first = pixels[:factor, :factor].mean((0, 1))
    assert np.abs(image.pixels[0, 0] - first).max() <= 0.5 + 1e-6
    box = (20, 30, 40, 45)
    found = cut_views_on_device(stack_images([image]), torch.tensor([[box]]), None, 24, None)[
        "student_views"
    ]
    region = tuple(edge / factor for edge in (30, 20, 75, 60))
    expected = Image.fromarray(image.pixels).resize((24, 24), Image.Resampling.BILINEAR, box=region)
    assert levels_apart(found[0, 0].permute(1, 2, 0), np.array(expected)) <= 1


@pytest.mark.parametrize("num_ssl", [0, 2])
def test_each_kind_of_view_takes_one_launch_and_no_value_is_read_on_the_host(num_ssl):
    def make(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")  # has no values

    launches = []

    class Launches(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if result.is_meta and "squeeze" not in str(function):  # else it is a view
                launches.append(str(function))
            return result

    boxes = make(3, num_ssl, 4, dtype=torch.int32) if num_ssl else None
    flips = make(3, num_ssl, dtype=torch.bool) if num_ssl else None
    sizes = torch.tensor([[4, 5, 1], [6, 2, 1], [3, 3, 2]], dtype=torch.int32)
    whole = WholeImages(make(41, 3, dtype=torch.uint8), sizes, boxes, flips)
    student, teacher = make(3, 2, 4, dtype=torch.int32), make(3, 4, dtype=torch.int32)
    with Launches():
        views = cut_views_on_device(whole, student, teacher, 8, 4)
    copy_of_places = "aten._to_copy.default"
    assert launches == [copy_of_places] + ["aclip.cut_views.default"] * (3 if num_ssl else 2)
    assert views["student_views"].shape == (3, 2, 3, 8, 8)
    assert views["teacher_view"].shape == (3, 3, 4, 4)


def test_images_in_a_buffer_are_handed_over_without_a_copy():
    contents = [encode(*size, seed) for seed, size in enumerate(SIZES)]
    contents[2] = encode(*SIZES[2], 2, "PNG")  # decoded elsewhere, by Pillow
    damaged = contents[1][:300]
    expected = stack_images([read_whole_image(content, 1, 1024) for content in contents]).pixels
    buffer = PixelBuffer()
    places = []
    for some in (contents, contents[:2] + contents[3:], [damaged, *contents[3:]], contents):
        whole_images = [read_whole_image(content, 1, 1024, buffer) for content in some]
        whole_images = [image for image in whole_images if not isinstance(image, Skip)]
        whole = torch.from_numpy(
            np.concatenate([image.pixels.reshape(-1) for image in whole_images])
        )
        found = stack_images(whole_images, buffer).pixels
        assert torch.equal(found.flatten(), whole)
        places.append(found.data_ptr() == whole_images[0].pixels.ctypes.data)
    assert places == [False, True, True, True]
    assert torch.equal(found, expected)


def test_what_can_not_be_decoded_is_skipped_alike():
    assert read_whole_image(encode(40, 40)[:300], 1, 100) == Skip("unreadable_image")
    assert read_whole_image(encode(40, 10), 16, 100) == Skip("image_too_small")


@pytest.fixture
def shards(write_tar):
    paths = []
    for shard in range(4):
        members = []
        for index in range(6):
            height, width = SIZES[(shard + index) % len(SIZES)]
            suffix, image_format = (("jpg", "JPEG"), ("png", "PNG"))[index == 3]
            content = encode(height, width, 6 * shard + index, image_format)
            members.append((f"{shard}-{index}.{suffix}", content[:200] if index == 5 else content))
            members.append((f"{shard}-{index}.txt", b"words " * (index + 1)))
        paths.append(write_tar(f"{shard}.tar", members))
    return [Shard(path, 6) for path in paths]


def make_recipe(crops: str, workers: int = 0) -> Recipe:
    return Recipe(
        model={"image": {"resolution": 32, "kwargs": {"patch_size": 8}}},
        teacher={"resolution": 16},
        views={"student": 2, "ssl": 2},
        data={"workers": workers, "lanes": 4, "shuffle_block": 5, "crops": crops},
        train={"global_batch_size": 8},
    )


def take(recipe: Recipe, shards, ranks: int, count: int) -> list[Batch]:
    loaders = [iter(build_train_loader(recipe, shards, rank, ranks)) for rank in range(ranks)]
    batches = [join([next(loader) for loader in loaders]) for _ in range(count)]
    for loader in loaders:
        loader.close()
    return batches


def on_device(batch: Batch, recipe: Recipe) -> Batch:
    tower = SimpleNamespace(grid=4, patch_size=8)
    inputs = StepInputs(recipe, (), None, tower, torch.device("cpu"), torch.float32)
    return inputs.with_views(batch)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 1)])
def test_both_ways_give_the_same_batches_with_pixels_within_one_level(shards, ranks, workers):
    expected = take(make_recipe("worker"), shards, 1, 5)
    recipe = make_recipe("device", workers)
    for exact, batch in zip(expected, take(recipe, shards, ranks, 5), strict=True):
        assert batch.keys == exact.keys and batch.captions == exact.captions
        assert batch.skipped == exact.skipped
        for name in NOT_VIEWS:
            assert torch.equal(getattr(batch, name), getattr(exact, name)), name
        assert torch.equal(batch.tokens.ids, exact.tokens.ids)
        assert all(getattr(batch, name) is None for name in VIEWS)
        cut = on_device(batch, recipe)
        assert cut.whole_images is None
        for name in VIEWS:
            found, wanted = getattr(cut, name), getattr(exact, name)
            assert found.shape == wanted.shape and found.dtype == torch.uint8
            assert levels_apart(found, wanted) <= 1, name


def test_micro_batches_hold_their_own_images(shards):
    recipe = make_recipe("device")
    (batch,) = take(recipe, shards, 1, 1)
    whole = on_device(batch, recipe)
    micros = [on_device(micro, recipe) for micro in batch.split(3)]
    assert [len(micro) for micro in micros] == [3, 3, 2]
    for name in VIEWS:
        joined = torch.cat([getattr(micro, name) for micro in micros])
        assert levels_apart(joined, getattr(whole, name)) <= 1


def test_batches_with_views_pass_through_unchanged(shards):
    (batch,) = take(make_recipe("worker"), shards, 1, 1)
    assert on_device(batch, make_recipe("worker")) is batch
