"""cut_views on photographs of 500 x 375 pixels with the boxes that A-CLIP's recipe draws."""

import numpy as np
import torch

from aclip.data.images.views import draw_boxes
from aclip.kernels.cut_views import cut_views, cut_views_reference

COUNT = 512 if torch.cuda.is_available() else 8
HEIGHT, WIDTH, SIDE = 375, 500, 224
FLOPS_PER_TAP = 6
"""Of one source pixel under one view's pixel: three channels times a weight, summed."""


def bench_student_views(backend, measure, device):
    rng = np.random.default_rng(0)
    drawn = [draw_boxes(rng, HEIGHT, WIDTH, 2, (0.6, 1.0))[0] for _ in range(COUNT)]
    boxes = torch.tensor(drawn, dtype=torch.int32, device=device)
    pixels = torch.randint(0, 256, (COUNT * HEIGHT * WIDTH, 3), dtype=torch.uint8, device=device)
    first = HEIGHT * WIDTH * torch.arange(COUNT, device=device)
    columns = [torch.full_like(first, value) for value in (HEIGHT, WIDTH, 1)]
    places = torch.stack([*columns, first], 1)
    function = {
        "reference": cut_views_reference,
        "compiled": torch.compile(cut_views_reference),
        "triton": cut_views,
    }[backend]
    # Each box is read once at best, and each view written once.
    num_bytes = 3 * int(boxes[..., 2:].long().prod(-1).sum()) + 3 * 2 * COUNT * SIDE**2
    support = (boxes[..., 2:].double() / SIDE).clamp_min(1)
    taps = int((2 * support).ceil().prod(-1).sum()) * SIDE**2
    measure(
        lambda: function(pixels, places, boxes, None, SIDE), num_bytes, flops=FLOPS_PER_TAP * taps
    )
