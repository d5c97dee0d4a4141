"""augment_views on 224-pixel views with the parameters that A-CLIP's recipe draws."""

import torch

from aclip.kernels.augment_views import (
    AUGMENT_PARAMS,
    augment_views,
    augment_views_reference,
)

COUNT = 512 if torch.cuda.is_available() else 16
FLOPS_PER_PIXEL = 120
"""Of one jittered pixel: three blends, one hue shift, normalisation; a count by hand."""


def bench_forward(backend, measure, device):
    views = torch.randint(0, 256, (COUNT, 3, 224, 224), dtype=torch.uint8, device=device)
    draw, chance = torch.rand(2, COUNT, len(AUGMENT_PARAMS), device=device).unbind()
    columns = {
        "jitter": chance[:, 0] < 0.8,
        "brightness": 0.6 + 0.8 * draw[:, 1],
        "contrast": 0.6 + 0.8 * draw[:, 2],
        "saturation": 0.8 + 0.4 * draw[:, 3],
        "hue": 0.2 * draw[:, 4] - 0.1,
        "order": (24 * draw[:, 5]).floor(),
        "grayscale": chance[:, 6] < 0.2,
        "blur_sigma": (0.1 + 1.9 * draw[:, 7]) * (chance[:, 7] < 0.1),
        "solarize": chance[:, 8] < 0.2,
    }
    params = torch.stack([columns[name].float() for name in AUGMENT_PARAMS], 1)
    mean, std = torch.full((2, 3), 0.5, device=device).unbind()
    function = {
        "reference": augment_views_reference,
        "compiled": torch.compile(augment_views_reference),
        "triton": augment_views,
    }[backend]
    # Contrast needs the mean of what comes before it, so the bytes are read twice.
    num_bytes = 2 * views.numel() + 2 * views.numel()
    measure(
        lambda: function(views, params, mean, std, torch.bfloat16),
        num_bytes,
        flops=FLOPS_PER_PIXEL * views.numel() // 3,
    )
