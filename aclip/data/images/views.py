"""Views of an image: draw boxes, crop. A box is (top, left, height, width) in pixels."""

import math

import numpy as np
from PIL import Image

RATIO = (3 / 4, 4 / 3)
TRIES = 10

Box = tuple[int, int, int, int]


def draw_boxes(
    rng: np.random.Generator, height: int, width: int, num_student: int, scale: tuple[float, float]
) -> tuple[list[Box], Box]:
    """Draws the student boxes and the teacher box that contains them.

    The teacher box is drawn whether it is used or not, so that later draws are the same in both
    cases.
    """
    boxes = [random_box(rng, height, width, scale) for _ in range(num_student)]
    return boxes, teacher_box(rng, boxes, height, width)


def draw_ssl_boxes(
    rng: np.random.Generator,
    height: int,
    width: int,
    num_views: int,
    scale: tuple[float, float],
    flip_prob: float,
) -> tuple[list[Box], list[bool]]:
    """Draws the boxes of the views for SimCLR alone, and which of these views are mirrored.

    Source: SLIP, arXiv:2112.12750.
    """
    boxes, flips = [], []
    for _ in range(num_views):
        boxes.append(random_box(rng, height, width, scale))
        flips.append(bool(rng.random() < flip_prob))
    return boxes, flips


def cut_ssl_views(
    image: Image.Image, boxes: list[Box], flips: list[bool], resolution: int
) -> np.ndarray:
    """Cuts the S views for SimCLR alone: (S, 3, R, R) uint8."""
    views = [crop(image, box, resolution) for box in boxes]
    return np.stack(
        [view[:, :, ::-1] if flip else view for view, flip in zip(views, flips, strict=True)]
    )


def random_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float]
) -> Box:
    """Draws a box by the rule of torchvision's RandomResizedCrop.

    Its area is a uniform share in `scale` of the image, its ratio log-uniform in 3/4 to 4/3. After
    10 draws that do not fit: the largest centred box whose ratio is in range.
    """
    for _ in range(TRIES):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return top, left, box_height, box_width
    box_height = min(height, round(width / RATIO[0]))
    box_width = min(width, round(height * RATIO[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def teacher_box(rng: np.random.Generator, boxes: list[Box], height: int, width: int) -> Box:
    """Draws a box around all student boxes.

    Their union, grown on each side by a uniform share of the room between it and the image's edge.

    Source: A-CLIP, arXiv:2212.08653, section 3.2; microsoft/A-CLIP's datasets.py takes one view's
    height for its left here, so that its student boxes may leave the teacher's.
    """
    top = min(box[0] for box in boxes)
    left = min(box[1] for box in boxes)
    bottom = max(box[0] + box[2] for box in boxes)
    right = max(box[1] + box[3] for box in boxes)
    top -= int(rng.integers(top + 1))
    left -= int(rng.integers(left + 1))
    bottom += int(rng.integers(height - bottom + 1))
    right += int(rng.integers(width - right + 1))
    return top, left, bottom - top, right - left


def crop(image: Image.Image, box: Box, resolution: int) -> np.ndarray:
    """Resamples a box to (3, resolution, resolution) uint8: bilinear, antialiased."""
    top, left, height, width = box
    region = (left, top, left + width, top + height)
    resized = image.resize((resolution, resolution), Image.Resampling.BILINEAR, box=region)
    return _channels_first(resized)


def center_crop(
    image: Image.Image,
    resolution: int,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> np.ndarray:
    """Brings the shorter side to `resolution` and cuts the centre, for evaluation.

    Returns:
        (3, resolution, resolution) uint8; antialiased, sizes as in torchvision's Resize and
        CenterCrop.
    """
    width, height = image.size
    short = min(width, height)
    size = (resolution * width // short, resolution * height // short)
    resized = image.resize(size, resample)
    left, top = (round((side - resolution) / 2) for side in size)
    region = (left, top, left + resolution, top + resolution)
    return _channels_first(resized.crop(region))


def _channels_first(image: Image.Image) -> np.ndarray:
    # A copy, because numpy's view of an image is read-only, and torch warns of that.
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
