"""attentive_pack at the shapes of three towers: bf16, two views, half of the blocks kept."""

import pytest
import torch

from aclip.kernels.attentive_pack import attentive_pack, attentive_pack_reference

SHAPES = [
    pytest.param(14, 768, id="ViT-B/16"),
    pytest.param(14, 1024, id="ViT-L/16"),
    pytest.param(16, 1024, id="ViT-L/14"),
]
BATCH = 256 if torch.cuda.is_available() else 16
VIEWS, BLOCK_SIZE, ELEMENT = 2, 2, 2


def make_arguments(grid, width, device, trained_patches):
    def draw(*shape):
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    patches = draw(BATCH * VIEWS, grid * grid, width).requires_grad_(trained_patches)
    cls_token, pos_embed = draw(width).requires_grad_(), draw(1 + grid * grid, width)
    teacher_box = torch.tensor([[10, 20, 400, 380]], dtype=torch.int32, device=device)
    view_boxes = torch.tensor(
        [[[30, 40, 300, 280], [60, 50, 320, 340]]], dtype=torch.int32, device=device
    )
    return (
        patches,
        cls_token,
        pos_embed.requires_grad_(),
        torch.rand(BATCH, 1, grid, grid, device=device),
        teacher_box.repeat(BATCH, 1),
        view_boxes.repeat(BATCH, 1, 1),
        num_blocks(grid),
        BLOCK_SIZE,
    )


def num_blocks(grid):
    return (grid // BLOCK_SIZE) ** 2 // 2 + 1


def packed_bytes(grid, width):
    """(read, written) by the forward: the kept patches, then those and the CLS row."""
    rows, kept = BATCH * VIEWS, num_blocks(grid) * BLOCK_SIZE**2
    return rows * kept * width * ELEMENT, rows * (1 + kept) * width * ELEMENT


def function_of(backend):
    compiled = torch.compile(attentive_pack_reference)
    return {
        "reference": attentive_pack_reference,
        "compiled": compiled,
        "triton": attentive_pack,
    }[backend]


@pytest.mark.parametrize("grid, width", SHAPES)
def bench_forward(grid, width, backend, measure, device):
    arguments, function = make_arguments(grid, width, device, False), function_of(backend)
    read, written = packed_bytes(grid, width)

    def forward():
        with torch.no_grad():
            function(*arguments)

    measure(forward, read + written, flops=read // ELEMENT)


@pytest.mark.parametrize("trained_patches", [False, True], ids=["frozen-patches", "trained"])
@pytest.mark.parametrize("grid, width", SHAPES)
def bench_forward_and_backward(grid, width, trained_patches, backend, measure, device):
    arguments = make_arguments(grid, width, device, trained_patches)
    function = function_of(backend)
    read, written = packed_bytes(grid, width)
    grad = torch.randn(written // (2 * width), width, device=device).bfloat16()
    grad = grad.view(BATCH * VIEWS, -1, width)
    needed = arguments[:3] if trained_patches else arguments[1:3]

    def forward_and_backward():
        torch.autograd.grad(function(*arguments)[0], needed, grad)

    d_patches = arguments[0].numel() * ELEMENT if trained_patches else 0
    measure(forward_and_backward, read + 2 * written + d_patches, flops=2 * read // ELEMENT)
