"""attentive_pack against a per-sample formula made of F.interpolate, slicing and sorted()."""

import math

import pytest
import torch
import torch.nn.functional as F

from aclip.kernels.attentive_pack import attentive_pack, attentive_pack_reference
from aclip.kernels.common import INTERPRET

GAP = 1e-5
"""Relative gap between the last kept and the first dropped block below which fp32 may swap them."""

CASES = [  # B, V, G, block_size, num_kept_blocks, C, dtype
    pytest.param(2, 2, 14, 2, 25, 96, torch.bfloat16, id="B2-V2-G14-block2-K100-C96-bf16"),
    pytest.param(1, 1, 7, 1, 24, 33, torch.float32, id="B1-V1-G7-block1-K24-C33-fp32"),
    pytest.param(3, 2, 8, 2, 1, 20, torch.float16, id="B3-V2-G8-block2-K4-C20-fp16"),
    pytest.param(1, 2, 16, 2, 33, 130, torch.float32, id="B1-V2-G16-block2-K132-C130-fp32"),
    pytest.param(2, 1, 16, 1, 129, 24, torch.bfloat16, id="B2-V1-G16-block1-K129-C24-bf16"),
    pytest.param(1, 1, 14, 1, 196, 64, torch.float16, id="B1-V1-G14-block1-all-kept-C64-fp16"),
    pytest.param(2, 1, 7, 1, 1, 1, torch.float32, id="B2-V1-G7-block1-one-kept-C1-fp32"),
]
GRIDS = [(7, 1), (8, 1), (8, 2), (14, 1), (14, 2), (16, 1), (16, 2)]
TRIPLES_PER_GRID = 24 if INTERPRET else 144
"""1,008 triples of (teacher, view, view) in all; interpreted, which is slow, 168."""


def random_boxes(count, views=2):
    """Teacher boxes at the image's edges or inside it, and views that mostly lie inside them."""
    teacher, view = [], []

    def span(low, high, least):
        length = int(torch.randint(least, high - low + 1, ()))
        return low + int(torch.randint(0, high - low - length + 1, ())), length

    for index in range(count):
        height, width = (int(side) for side in torch.randint(40, 320, (2,)))
        (top, tall), (left, wide) = span(0, height, height // 2), span(0, width, width // 2)
        teacher.append((top, left, tall, wide))
        inside = ((top, top + tall), (left, left + wide))
        if index % 8 == 0:  # reaches over the teacher crop: that part has score zero
            inside = ((0, height), (0, width))
        for _ in range(views):
            (y, h), (x, w) = (span(low, high, (high - low) // 3) for low, high in inside)
            view.append((y, x, h, w))
    boxes = torch.tensor(teacher, dtype=torch.int32)
    return boxes, torch.tensor(view, dtype=torch.int32).view(count, views, 4)


def slow_block_scores(scores, teacher_box, view_box, grid, block_size):
    """One view's block scores: up to the teacher crop's pixels, crop, down, mean of each block."""
    top, left, height, width = teacher_box.tolist()
    y, x, h, w = view_box.tolist()
    up = F.interpolate(scores[None, None].float(), (height, width), mode="bilinear")
    canvas = torch.zeros(1, 1, max(y + h, top + height), max(x + w, left + width))
    canvas[..., top : top + height, left : left + width] = up
    view = F.interpolate(canvas[..., y : y + h, x : x + w], (grid, grid), mode="bilinear")
    return F.avg_pool2d(view, block_size).flatten().tolist()


def slow_selection(block_scores, num_kept, grid, block_size):
    """(ascending patch ids, relative gap between the last kept and the first dropped block)."""
    order = sorted(range(len(block_scores)), key=lambda i: (-block_scores[i], i))
    side = grid // block_size
    ids = []
    for block in order[:num_kept]:
        for dy in range(block_size):
            for dx in range(block_size):
                y, x = block // side * block_size + dy, block % side * block_size + dx
                ids.append(y * grid + x)
    if num_kept == len(order):
        return sorted(ids), math.inf
    last, following = block_scores[order[num_kept - 1]], block_scores[order[num_kept]]
    return sorted(ids), (last - following) / max(abs(last), abs(following), 1e-30)


def slow_pack(patches, cls_token, pos_embed, keep_ids):
    """Differentiable packing, one row of the result at a time."""
    packed = []
    for image, ids in zip(patches, keep_ids.flatten(0, 1).tolist(), strict=True):
        rows = [cls_token + pos_embed[0]] + [image[i] + pos_embed[1 + i] for i in ids]
        packed.append(torch.stack(rows))
    return torch.stack(packed)


def make_inputs(B, V, G, C, dtype, device):
    make = [torch.randn(B * V, G * G, C), torch.randn(C), torch.randn(1 + G * G, C)]
    return [tensor.to(device, dtype).requires_grad_() for tensor in make]


@pytest.mark.parametrize("grid, block_size", GRIDS)
def test_kept_ids_equal_the_slow_formula_for_random_boxes(grid, block_size, device):
    count, size = TRIPLES_PER_GRID, 7 if grid == 14 and block_size == 1 else grid
    num_blocks = (grid // block_size) ** 2
    kept = num_blocks // 2 + 1
    teacher_box, view_boxes = random_boxes(count)
    scores = torch.rand(count, 1, size, size) ** 3
    scores[3, 0, 1, 2] = float("nan")
    scores[5, 0, 0, 0] = float("inf")
    inputs = make_inputs(count, 2, grid, 1, torch.float32, device)
    on_device = [tensor.to(device) for tensor in (scores, teacher_box, view_boxes)]
    _, keep_ids = attentive_pack(*inputs, *on_device, kept, block_size)

    clean = torch.nan_to_num(scores, nan=0.0, posinf=1e30)
    compared = 0
    for b in range(count):
        for v in range(2):
            blocks = slow_block_scores(
                clean[b, 0], teacher_box[b], view_boxes[b, v], grid, block_size
            )
            expected, gap = slow_selection(blocks, kept, grid, block_size)
            if gap > GAP:
                compared += 1
                assert keep_ids[b, v].tolist() == expected, f"sample {b}, view {v}"
    assert compared > 0.9 * 2 * count  # finer grids have closer scores


@pytest.mark.parametrize("B, V, G, block_size, num_kept, C, dtype", CASES)
def test_packed_rows_and_gradients_equal_the_slow_formula(
    B, V, G, block_size, num_kept, C, dtype, device, poisoned_empty
):
    inputs = make_inputs(B, V, G, C, dtype, device)
    teacher_box, view_boxes = (boxes.to(device) for boxes in random_boxes(B, V))
    scores = torch.rand(B, 1, G, G, device=device)
    packed, keep_ids = attentive_pack(
        *inputs, scores, teacher_box, view_boxes, num_kept, block_size
    )
    grad = torch.randn(packed.shape).to(packed)
    actual = torch.autograd.grad(packed, inputs, grad)

    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    slow = slow_pack(*exact, keep_ids)
    expected = torch.autograd.grad(slow, exact, grad.double())
    # Sums of two 16-bit numbers are exact in fp32, so one rounding of the exact sum is the answer;
    # under the interpreter that rounding is a truncation for bf16, one unit in the last place.
    bits = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}[dtype]
    torch.testing.assert_close(packed, slow.to(dtype), rtol=2.0**-bits, atol=0)
    torch.testing.assert_close(actual[0], expected[0].to(dtype), rtol=0, atol=0)  # a copy: exact
    tolerance = max(2.0**-bits, 1e-6)
    for index in (1, 2):  # a sum over samples in fp32, then one rounding
        torch.testing.assert_close(
            actual[index], expected[index].to(dtype), rtol=tolerance, atol=1e-5
        )


@pytest.mark.parametrize("B, V, G, block_size, num_kept, C, dtype", CASES)
def test_op_equals_its_reference(B, V, G, block_size, num_kept, C, dtype, device, poisoned_empty):
    inputs = make_inputs(B, V, G, C, dtype, device)
    boxes = [box.to(device) for box in random_boxes(B, V)]
    arguments = (torch.rand(B, 1, 7, 7, device=device), *boxes, num_kept, block_size)
    packed, keep_ids = attentive_pack(*inputs, *arguments)
    expected, expected_ids = attentive_pack_reference(*inputs, *arguments)
    assert torch.equal(keep_ids, expected_ids)
    torch.testing.assert_close(packed, expected)


def test_scores_on_the_views_own_grid_need_no_boxes(device):
    inputs = make_inputs(2, 2, 8, 3, torch.float32, device)
    scores = torch.rand(2, 2, 8, 8)
    _, keep_ids = attentive_pack(*inputs, scores.to(device), None, None, 5, 2)
    for b in range(2):
        for v in range(2):
            blocks = F.avg_pool2d(scores[b, v][None], 2).flatten().tolist()
            assert keep_ids[b, v].tolist() == slow_selection(blocks, 5, 8, 2)[0]


def test_equal_scores_keep_the_first_blocks(device):
    inputs = make_inputs(1, 1, 4, 2, torch.float32, device)
    _, keep_ids = attentive_pack(*inputs, torch.ones(1, 1, 4, 4, device=device), None, None, 3, 2)
    assert keep_ids.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13]


def test_ties_in_the_middle_go_to_the_lower_index(device):
    inputs = make_inputs(1, 1, 3, 2, torch.float32, device)
    scores = torch.tensor([[5, 2, 7], [2, 2, 9], [2, 2, 0]], device=device).float()
    _, keep_ids = attentive_pack(*inputs, scores[None, None], None, None, 5, 1)
    assert keep_ids.flatten().tolist() == [0, 1, 2, 3, 5]


def test_nan_counts_as_zero_and_infinities_as_large_numbers(device):
    nan, inf = math.nan, math.inf
    inputs = make_inputs(1, 1, 3, 2, torch.float32, device)
    scores = torch.tensor([[nan, -1, inf], [0.5, -inf, 0], [-2, nan, -3]], device=device)
    kept = [
        attentive_pack(*inputs, scores[None, None], None, None, count, 1)[1].flatten().tolist()
        for count in (1, 2, 3, 5, 8)
    ]
    assert kept == [[2], [2, 3], [0, 2, 3], [0, 2, 3, 5, 7], [0, 1, 2, 3, 5, 6, 7, 8]]


def test_patches_may_be_a_transposed_view(device):
    patches = torch.randn(2, 5, 16, device=device).transpose(1, 2).requires_grad_()
    _, cls_token, pos_embed = make_inputs(2, 1, 4, 5, torch.float32, device)
    scores = torch.rand(2, 1, 4, 4, device=device)
    packed, keep_ids = attentive_pack(patches, cls_token, pos_embed, scores, None, None, 6, 1)
    torch.testing.assert_close(packed, slow_pack(patches, cls_token, pos_embed, keep_ids))
    grad = torch.randn(packed.shape[::-1], device=device).permute(2, 1, 0)
    (actual,) = torch.autograd.grad(packed, patches, grad)
    expected = torch.zeros_like(actual)
    for row in range(2):
        expected[row, keep_ids[row, 0]] = grad[row, 1:]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_only_inputs_that_need_a_gradient_get_one(needed, device):
    inputs = [tensor.detach() for tensor in make_inputs(2, 1, 4, 3, torch.float32, device)]
    for index in needed:
        inputs[index].requires_grad_()
    scores = torch.rand(2, 1, 4, 4, device=device)
    packed, keep_ids = attentive_pack(*inputs, scores, None, None, 5, 1)
    slow = slow_pack(*inputs, keep_ids)
    wanted = [inputs[index] for index in needed]
    expected = torch.autograd.grad(slow.square().sum(), wanted)
    packed.square().sum().backward()
    assert [index for index in range(3) if inputs[index].grad is not None] == list(needed)
    for tensor, grad in zip(wanted, expected, strict=True):
        torch.testing.assert_close(tensor.grad, grad)


def test_a_batch_of_no_samples_gives_no_rows(device):
    inputs = make_inputs(0, 2, 4, 3, torch.float32, device)
    packed, keep_ids = attentive_pack(*inputs, torch.rand(0, 2, 4, 4).to(device), None, None, 2, 2)
    packed.sum().backward()
    assert packed.shape == (0, 9, 3)
    assert keep_ids.shape == (0, 2, 8)
    assert torch.equal(inputs[2].grad, torch.zeros(17, 3, device=device))


def op_arguments(device):
    boxes = [box.to(device) for box in random_boxes(2)]
    return (
        *make_inputs(2, 2, 4, 6, torch.float32, device),
        torch.rand(2, 1, 5, 5).to(device),
        *boxes,
    )


def test_opcheck(device):
    torch.library.opcheck(torch.ops.aclip.attentive_pack.default, (*op_arguments(device), 2, 2))
    backward = torch.ops.aclip.attentive_pack_backward.default
    grad, inverse = torch.rand(2, 3, 4, device=device), torch.tensor([[[1, -1, 0, -1]]] * 2)
    arguments = (grad, inverse.int().to(device), True, False, True, torch.float32, torch.float32)
    torch.library.opcheck(backward, arguments)


def test_compiles_as_one_graph_with_equal_outputs_and_gradients(device):
    arguments = op_arguments(device)

    def run(function):
        packed, keep_ids = function(*arguments, 2, 2)
        return packed, keep_ids, *torch.autograd.grad(packed.square().sum(), arguments[:3])

    for actual, expected in zip(
        run(torch.compile(attentive_pack, fullgraph=True, backend="aot_eager")),
        run(attentive_pack),
        strict=True,
    ):
        assert torch.equal(actual, expected)


def wrong(name, index, value, message=""):
    return pytest.param(name, index, value, message, id=f"{name}{message and '-'}{message}")


@pytest.mark.parametrize(
    "name, index, value, message",
    [
        wrong("patches", 0, torch.rand(4, 16), "shape"),
        wrong("patches", 0, torch.rand(4, 15, 6), "grid"),
        wrong("patches", 0, torch.rand(4, 16, 6).double(), "dtype"),
        wrong("patches", 0, torch.rand(3, 16, 6), "rows"),
        wrong("cls_token", 1, torch.rand(1, 1, 6), "shape"),
        wrong("pos_embed", 2, torch.rand(16, 6), "shape"),
        wrong("scores", 3, torch.rand(2, 5, 5), "shape"),
        wrong("scores", 3, torch.rand(2, 2, 5, 5), "shape"),
        wrong("scores", 3, torch.ones(2, 1, 5, 5).int(), "dtype"),
        wrong("scores", 3, torch.rand(2, 1, 5, 5, device="meta"), "must be on"),
        wrong("teacher_box", 4, None, "both"),
        wrong("teacher_box", 4, torch.ones(2, 4), "dtype"),
        wrong("teacher_box", 4, torch.ones(3, 4).int(), "shape"),
        wrong("view_boxes", 5, torch.ones(2, 2, 3).int(), "shape"),
        wrong("num_kept_blocks", 6, 5, "must be 1 to 4"),
        wrong("num_kept_blocks", 6, 0, "must be 1 to 4"),
        wrong("block_size", 7, 3, "divide"),
    ],
)
def test_wrong_arguments_are_named(name, index, value, message, device):
    arguments = [*op_arguments(device), 2, 2]
    keep_place = isinstance(value, torch.Tensor) and value.device.type != "meta"
    arguments[index] = value.to(device) if keep_place else value
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        attentive_pack(*arguments)


@pytest.mark.parametrize("name, index", [("teacher_box", 4), ("view_boxes", 5)])
def test_boxes_of_zero_size_are_refused_on_cpu(name, index):
    arguments = [*op_arguments("cpu"), 2, 2]
    arguments[index][0, ..., 2] = 0
    with pytest.raises(ValueError, match=f"{name} has a box of zero size"):
        attentive_pack(*arguments)
