"""cut_views against Image.resize(box=...) of Pillow, and against its reference."""

import numpy as np
import pytest
import torch
from PIL import Image

from aclip.kernels.common import INTERPRET
from aclip.kernels.cut_views import cut_views, cut_views_reference

ALL = (0, 0, 1000, 1000)
"""Stands for a box around the whole image."""
CASES = [  # sizes (height, width, factor) in pixels, boxes of each image, side
    pytest.param([(40, 53, 1)], [ALL, (3, 5, 36, 41)], 29, id="a little smaller, odd sizes"),
    pytest.param([(61, 20, 1)], [ALL, (20, 0, 40, 20)], 7, id="much smaller"),
    pytest.param([(19, 23, 1)], [(2, 3, 6, 5), (12, 14, 7, 9)], 37, id="larger, over one tile"),
    pytest.param([(9, 70, 1)], [(0, 4, 9, 66), (5, 60, 4, 10)], 20, id="one axis smaller"),
    pytest.param([(8, 8, 1)], [(3, 3, 1, 1), (7, 7, 1, 1), (0, 0, 1, 8)], 5, id="1-pixel boxes"),
    pytest.param([(1, 1, 1), (5, 4, 1)], [(0, 0, 1, 1)], 3, id="1-pixel image"),
    pytest.param([(16, 16, 1)], [ALL, (4, 8, 8, 8)], 16, id="equal size, and twice as large"),
    pytest.param([(21, 15, 3)], [ALL, (1, 2, 47, 40)], 12, id="image reduced three times"),
    pytest.param([(30, 20, 1), (17, 44, 2), (25, 25, 1)], [ALL, (1, 3, 16, 14)], 18, id="several"),
    pytest.param([(6, 5, 1)], [ALL], 1, id="one pixel a side"),
]


def make_images(sizes):
    """Noise with a ramp, behind each other: (P, 3) uint8, and their places."""
    pixels, places, first = [], [], 0
    for height, width, factor in sizes:
        image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
        image[: height // 2] = torch.linspace(0, 255, width).byte()[None, :, None]
        image[:1, :1] = torch.tensor([0, 128, 255], dtype=torch.uint8)
        pixels.append(image.view(-1, 3))
        places.append((height, width, factor, first))
        first += height * width
    return torch.cat(pixels), torch.tensor(places)


def make_boxes(sizes, boxes):
    def own(box, height, width, factor):
        # The last square of a reduced image may have been smaller.
        return (0, 0, height * factor - factor // 2, width * factor) if box is ALL else box

    return torch.tensor([[own(box, *size) for box in boxes] for size in sizes], dtype=torch.int32)


def pillow_view(pixels, place, box, side):
    """One view by Pillow, (3, side, side)."""
    height, width, factor, first = place.tolist()
    image = pixels[first : first + height * width].view(height, width, 3).numpy()
    top, left, box_height, box_width = (edge / factor for edge in box.tolist())
    region = (left, top, left + box_width, top + box_height)
    view = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR, box=region)
    return torch.from_numpy(np.array(view)).permute(2, 0, 1)


def exact_view(pixels, place, box, side):
    """One view in fp64 before it is rounded, (3, side, side): triangles as Pillow's."""
    height, width, factor, first = place.tolist()
    image = pixels[first : first + height * width].view(height, width, 3).double()
    top, left, box_height, box_width = (edge / factor for edge in box.tolist())

    def weights(start, length, size):
        scale = length / side
        centers = start + (torch.arange(side).double()[:, None] + 0.5) * scale
        distance = (torch.arange(size) + 0.5 - centers).abs() / max(scale, 1)
        weights = (1 - distance).clamp_min(0)
        return weights / weights.sum(1, keepdim=True)

    rows, columns = weights(top, box_height, height), weights(left, box_width, width)
    return torch.einsum("yh,hwc,xw->cyx", rows, image, columns)


def run(pixels, places, boxes, flips, side, device):
    flips = None if flips is None else flips.to(device)
    return cut_views(pixels.to(device), places.to(device), boxes.to(device), flips, side).cpu()


def levels_apart(first, second) -> int:
    return int((first.int() - second.int()).abs().max())


@pytest.mark.parametrize("sizes, boxes, side", CASES)
def test_equals_pillow_within_one_level_and_is_rounded_once(
    sizes, boxes, side, device, poisoned_empty
):
    (pixels, places), boxes = make_images(sizes), make_boxes(sizes, boxes)
    actual = run(pixels, places, boxes, None, side, device)
    assert actual.shape == (*boxes.shape[:2], 3, side, side) and actual.dtype == torch.uint8
    for place, row, views in zip(places, boxes, actual, strict=True):
        for box, view in zip(row, views, strict=True):
            assert levels_apart(view, pillow_view(pixels, place, box, side)) <= 1
            exact = exact_view(pixels, place, box, side)
            assert (view - exact).abs().max() <= 0.5 + 1e-3  # sums in fp32
    reference = cut_views_reference(pixels, places, boxes, None, side)
    assert levels_apart(actual, reference) <= 1


def test_a_box_as_large_as_the_view_is_copied_exactly(device):
    pixels, places = make_images([(20, 31, 1), (15, 18, 1)])
    boxes = torch.tensor([[[2, 7, 13, 13]], [[2, 5, 13, 13]]], dtype=torch.int32)
    actual = run(pixels, places, boxes, None, 13, device)
    for index, (_, width, _, first) in enumerate(places.tolist()):
        image = pixels[first:].view(-1)[: len(pixels) * 3 - first * 3]
        top, left = boxes[index, 0, :2].tolist()
        rows = [image[3 * ((top + y) * width + left) :][: 3 * 13].view(13, 3) for y in range(13)]
        assert torch.equal(actual[index, 0], torch.stack(rows).permute(2, 0, 1))


def test_halves_are_rounded_to_even(device):
    pixels = torch.tensor([[0, 1, 2], [1, 2, 3]], dtype=torch.uint8)  # one row of two pixels
    places, boxes = torch.tensor([[1, 2, 1, 0]]), torch.tensor([[[0, 0, 1, 2]]])
    view = run(pixels, places, boxes, None, 1, device)  # means of the two: 0.5, 1.5, 2.5
    assert view.flatten().tolist() == [0, 2, 2]


def test_flipped_views_are_mirrored_and_others_are_not(device):
    sizes = [(20, 30, 1), (25, 17, 1)]
    (pixels, places), boxes = make_images(sizes), make_boxes(sizes, [ALL, (3, 2, 15, 14)])
    flips = torch.tensor([[True, False], [False, True]])
    plain = run(pixels, places, boxes, None, 19, device)
    flipped = run(pixels, places, boxes, flips, 19, device)
    assert levels_apart(flipped[0, 0], plain[0, 0].flip(-1)) <= 1
    assert levels_apart(flipped[1, 1], plain[1, 1].flip(-1)) <= 1
    assert torch.equal(flipped[0, 1], plain[0, 1]) and torch.equal(flipped[1, 0], plain[1, 0])
    assert levels_apart(flipped, plain) > 50


def test_boxes_may_be_a_strided_part_of_others(device):
    sizes = [(20, 30, 1), (25, 17, 1)]
    (pixels, places), boxes = make_images(sizes), make_boxes(sizes, [ALL, (3, 2, 15, 14)])
    actual = run(pixels, places, boxes[:, 1:], None, 9, device)
    assert torch.equal(actual, run(pixels, places, boxes, None, 9, device)[:, 1:])


@pytest.mark.parametrize("num_images, num_views", [(0, 2), (2, 0)])
def test_no_views_give_an_empty_result(num_images, num_views, device):
    pixels, places = make_images([(4, 4, 1)] * 2)
    boxes = torch.zeros(num_images, num_views, 4, dtype=torch.int32)
    actual = run(pixels, places[:num_images], boxes, None, 6, device)
    assert actual.shape == (num_images, num_views, 3, 6, 6) and actual.dtype == torch.uint8


@pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()), reason="on CPU the reference checks nothing"
)
def test_a_box_beyond_its_image_reads_no_other_memory(device):
    pixels, places = make_images([(6, 6, 1), (6, 6, 1)])
    boxes = torch.tensor([[[3, 3, 40, 40]], [[50, 50, 9, 9]]], dtype=torch.int32)
    actual = run(pixels, places, boxes, None, 8, device)
    assert (actual[1] == 0).all() and (actual[0, :, :, 4:] == 0).all()


def test_opcheck(device):
    sizes = [(9, 7, 1), (5, 8, 2)]
    (pixels, places), boxes = make_images(sizes), make_boxes(sizes, [ALL, (1, 1, 4, 5)])
    tensors = [tensor.to(device) for tensor in (pixels, places, boxes)]
    flips = torch.tensor([[True, False], [False, True]], device=device)
    for each in (flips, None):
        torch.library.opcheck(torch.ops.aclip.cut_views.default, (*tensors, each, 6))


@pytest.mark.parametrize(
    "name, index, value",
    [
        ("pixels", 0, torch.zeros(48, dtype=torch.uint8)),
        ("pixels", 0, torch.zeros(16, 3)),
        ("places", 1, torch.zeros(2, 3, dtype=torch.int64)),
        ("places", 1, torch.zeros(2, 4, dtype=torch.int32)),
        ("boxes", 2, torch.zeros(3, 1, 4, dtype=torch.int32)),
        ("boxes", 2, torch.zeros(2, 1, 4)),
        ("boxes", 2, torch.zeros(2, 1, 4, dtype=torch.int32, device="meta")),
        ("flips", 3, torch.zeros(2, 2, dtype=torch.bool)),
        ("flips", 3, torch.zeros(2, 1)),
        ("side", 4, 0),
    ],
)
def test_wrong_arguments_are_named(name, index, value):
    pixels, places = make_images([(2, 4, 1)] * 2)
    arguments = [pixels, places, torch.tensor([[[0, 0, 2, 2]]] * 2), None, 4]
    arguments[index] = value
    with pytest.raises(ValueError, match=f"^{name} "):
        cut_views(*arguments)
