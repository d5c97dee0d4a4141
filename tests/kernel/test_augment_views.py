"""augment_views against torchvision.transforms.v2.functional, one float image at a time."""

import itertools

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from aclip.kernels.augment_views import (
    AUGMENT_PARAMS,
    augment_views,
    augment_views_reference,
)
from aclip.kernels.common import INTERPRET

MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])
PIXEL_STEP = 1 / 255
ORDERS = list(itertools.permutations(range(4)))


def make_views(count, size):
    """Noise, smooth colour ramps, and a uniform gray, pure black and pure white image."""
    noise = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    ramp = torch.linspace(0, 255, size)
    noise[1::2] = torch.stack(
        [ramp.expand(size, size), ramp.flip(0).expand(size, size), ramp.expand(size, size).T]
    ).byte()
    for index, level in enumerate((127, 0, 255)[: max(0, count - 3)]):
        noise[index] = level
    return noise


def make_params(count):
    """Every order from 24 views on, every switch on and off, factors of a strong ColorJitter."""
    draw = torch.rand(count, len(AUGMENT_PARAMS))
    index = torch.arange(count)
    columns = {
        "jitter": (index < 24) | (index % 2 == 0),
        "brightness": 0.4 + 1.2 * draw[:, 1],
        "contrast": 0.4 + 1.2 * draw[:, 2],
        "saturation": 2 * draw[:, 3],
        "hue": draw[:, 4] - 0.5,
        "order": index % 24,
        "grayscale": index % 4 == 1,
        "blur_sigma": torch.where(index % 3 == 1, 0.1 + 1.9 * draw[:, 7], 0.0),
        "solarize": index % 7 == 2,
    }
    return torch.stack([columns[name].float() for name in AUGMENT_PARAMS], 1)


def torchvision_augment(view, params):
    """The same augmentation of one uint8 (3, R, R) view, on [0, 1], not normalised."""
    p = dict(zip(AUGMENT_PARAMS, params.tolist(), strict=True))
    image = TF.to_dtype(view, torch.float32, scale=True)
    steps = (
        lambda x: TF.adjust_brightness(x, p["brightness"]),
        lambda x: TF.adjust_contrast(x, p["contrast"]),
        lambda x: TF.adjust_saturation(x, p["saturation"]),
        lambda x: TF.adjust_hue(x, p["hue"]),
    )
    if p["jitter"]:
        for step in ORDERS[int(p["order"])]:
            image = steps[step](image)
    if p["grayscale"]:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    if p["blur_sigma"] > 0:
        image = TF.gaussian_blur(image, [13, 13], [p["blur_sigma"]] * 2)
    return TF.solarize(image, 0.5) if p["solarize"] else image


def run(views, params, device, dtype=torch.float32):
    params = None if params is None else params.to(device)
    return augment_views(views.to(device), params, MEAN.to(device), STD.to(device), dtype)


@pytest.mark.parametrize("count, size", [(8, 7), (11, 33), (28, 64)])
def test_equals_torchvision_within_one_pixel_step(count, size, device, poisoned_empty):
    views, params = make_views(count, size), make_params(count)
    actual = run(views, params, device).cpu()
    images = [torchvision_augment(view, row) for view, row in zip(views, params, strict=True)]
    expected = (torch.stack(images) - MEAN[:, None, None]) / STD[:, None, None]
    assert ((actual - expected).abs() * STD[:, None, None]).max() < PIXEL_STEP


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_op_equals_its_reference(dtype, device, poisoned_empty):
    views, params = make_views(13, 19), make_params(13)
    actual = run(views, params, device, dtype).cpu()
    expected = augment_views_reference(views, params, MEAN, STD, dtype)
    # On a GPU a division in fp32 is off by up to two units of the last place, which comes to
    # 6.3e-6 here when the reference's own divisions are off by as much.
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_reference_without_branches_equals_the_one_that_skips_unneeded_work():
    views, params = make_views(24, 16), make_params(24)
    skipping = augment_views_reference(views, params, MEAN, STD, torch.float32)
    traced = torch.compile(augment_views_reference, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(views, params, MEAN, STD, torch.float32), skipping)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_params_means_normalisation_only(dtype, device):
    views = make_views(4, 9)
    expected = (views / 255.0 - MEAN[:, None, None]) / STD[:, None, None]
    actual = run(views, None, device, dtype).cpu()
    tolerance = 1e-6 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=tolerance)


def test_neutral_params_change_nothing_but_the_scale(device):
    views, params = make_views(6, 8), torch.zeros(6, 9)
    assert torch.equal(run(views, params, device), run(views, None, device))


def test_uint8_input_is_left_as_it_was(device):
    views, params = make_views(6, 8).to(device), make_params(6)
    before = views.clone()
    run(views, params, device)
    assert torch.equal(views, before)


def test_views_may_be_channels_last(device):
    views, params = make_views(6, 8), make_params(6)
    strided = views.to(memory_format=torch.channels_last)
    actual = run(strided, params, device)
    assert actual.is_contiguous()
    assert torch.equal(actual, run(views, params, device))


@pytest.mark.parametrize("params", [None, torch.zeros(0, 9)])
def test_no_views_give_an_empty_result(params, device):
    actual = run(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), params, device, torch.bfloat16)
    assert actual.shape == (0, 3, 8, 8)
    assert actual.dtype == torch.bfloat16


@pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()), reason="the reference has no buffers"
)
def test_a_batch_done_in_parts_equals_one_done_at_once(monkeypatch, device):
    from aclip.kernels.augment_views import kernel

    views, params = make_views(7, 8), make_params(7)
    at_once = run(views, params, device)
    monkeypatch.setattr(kernel, "BUFFER_BYTES", 3 * 2 * 3 * 8 * 8 * 4)  # three views
    assert torch.equal(run(views, params, device), at_once)


def test_opcheck(device):
    op = torch.ops.aclip.augment_views.default
    tensors = (make_views(3, 8), make_params(3), MEAN, STD)
    torch.library.opcheck(op, (*(tensor.to(device) for tensor in tensors), torch.bfloat16))


def test_compiles_as_one_graph_with_equal_images(device):
    views, params = make_views(6, 8), make_params(6)
    expected = run(views, params, device)
    tensors = [tensor.to(device) for tensor in (views, params, MEAN, STD)]
    compiled = torch.compile(augment_views, fullgraph=True)
    assert torch.equal(compiled(*tensors, torch.float32), expected)


@pytest.mark.parametrize(
    "name, index, value",
    [
        ("views", 0, torch.zeros(2, 1, 8, 8, dtype=torch.uint8)),
        ("views", 0, torch.zeros(2, 3, 8, 8)),
        ("views", 0, torch.zeros(2, 3, 6, 6, dtype=torch.uint8)),
        ("params", 1, torch.zeros(2, 8)),
        ("params", 1, torch.zeros(2, 9).double()),
        ("params", 1, torch.zeros(2, 9, device="meta")),
        ("mean", 2, torch.zeros(1)),
        ("std", 3, torch.ones(3).half()),
        ("dtype", 4, torch.float64),
    ],
)
def test_wrong_arguments_are_named(name, index, value):
    views = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    arguments = [views, torch.zeros(2, 9), MEAN, STD, torch.float32]
    arguments[index] = value
    with pytest.raises(ValueError, match=f"^{name} "):
        augment_views(*arguments)
