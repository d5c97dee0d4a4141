"""Bytes, FLOPs and launches of single operations and chains, by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aclip.kernels.attentive_pack import attentive_pack
from aclip.kernels.augment_views import augment_views
from aclip.kernels.contrastive_loss import contrastive_loss
from aclip.planning.operations import Operation, OperationLog, fuse, touched

ROWS, IN, OUT = 6, 4, 10


def meta(*shape, dtype=torch.float32, **options):
    return torch.empty(*shape, dtype=dtype, device="meta", **options)


def logged(run) -> list[Operation]:
    with OperationLog() as log:
        run()
    return log.operations


def test_a_linear_is_one_operation_forward_and_three_backward():
    linear = nn.Linear(IN, OUT, device="meta", dtype=torch.bfloat16)
    x = meta(ROWS, IN, dtype=torch.bfloat16, requires_grad=True)
    gradient = meta(ROWS, OUT, dtype=torch.bfloat16)
    with OperationLog() as log:
        y = linear(x)
        num_forward = len(log.operations)
        y.backward(gradient)
    forward, *backward = log.operations
    assert num_forward == 1
    product = 2 * ROWS * IN * OUT
    assert (forward.name, forward.flops, forward.in_bf16) == ("addmm", product, True)
    of_x, of_weight, of_y = 2 * ROWS * IN, 2 * IN * OUT, 2 * ROWS * OUT
    assert forward.moved == of_x + of_weight + 2 * OUT + of_y
    assert sorted((each.name, each.flops, each.moved) for each in backward) == [
        ("mm", product, of_y + of_weight + of_x),
        ("mm", product, of_y + of_weight + of_x),
        ("sum", 0, of_y + 2 * OUT),
    ]


def test_a_layer_norm_reads_and_writes_each_row_once():
    weight, x = meta(IN), meta(ROWS, IN)
    (norm,) = logged(lambda: F.layer_norm(x, (IN,), weight, weight))
    # x, the weight (given twice, one tensor), the result, and mean and deviation of each row
    assert norm.moved == 4 * (ROWS * IN + IN + ROWS * IN + 2 * ROWS)
    assert norm.flops == 0


def test_attention_moves_no_matrix_of_scores():
    from aclip.planning.meter import fused_attention

    # Strided parts of one tensor, as the towers have them.
    q, k, v = meta(2, 50, 3, 4, 16, dtype=torch.bfloat16).unbind(2)
    with fused_attention():
        (attention,) = logged(
            lambda: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        )
    row = 2 * 50 * 4  # samples, tokens, heads
    statistics = attention.moved - 4 * row * 16 * 2
    assert statistics == row * 4  # the fp32 sum of each row's exponentials
    assert attention.flops == 2 * 2 * row * 50 * 16


@pytest.mark.parametrize(
    "run, moved",
    [
        (lambda x, y: x.add_(y), 3 * 24),
        (lambda x, y: x.copy_(y), 2 * 24),
        (lambda x, y: x.zero_(), 24),
        (lambda x, y: torch.zeros_like(x), 24),
        (lambda x, y: x + x, 2 * 24),
        (lambda x, y: x + y[:1], 24 + 4 + 24),
        (lambda x, y: x + y[:1].expand(6), 24 + 4 + 24),
        (lambda x, y: torch._foreach_add_([x, y], [y, x]), 48 + 48),
        (lambda x, y: torch._foreach_copy_([x], [y]), 2 * 24),
    ],
)
def test_bytes_of_an_operation(run, moved):
    x, y = meta(6), meta(6)
    (operation,) = logged(lambda: run(x, y))
    assert operation.moved == moved


def test_views_and_empty_tensors_are_no_operations():
    x = meta(ROWS, IN)
    assert not logged(lambda: (x.t(), x[1:], x.view(-1), x.detach(), torch.empty_like(x)))


def test_a_lookup_moves_its_rows_and_not_the_table():
    table, ids = meta(1000, IN), meta(ROWS, dtype=torch.int64)
    (found,) = logged(lambda: table.index_select(0, ids))
    assert found.moved == 2 * 4 * ROWS * IN + 8 * ROWS
    (placed,) = logged(lambda: table.index_put_((ids,), meta(ROWS, IN)))
    assert placed.moved == 2 * 4 * ROWS * IN + 8 * ROWS
    # The gradient has the whole table's size.
    (gradient,) = logged(
        lambda: torch.ops.aten.embedding_dense_backward(meta(ROWS, IN), ids, 1000, -1, False)
    )
    assert gradient.moved == 4 * ROWS * IN + 8 * ROWS + 4 * 1000 * IN


def test_a_copy_from_the_host_moves_over_the_link():
    (copy,) = logged(lambda: torch.empty(5, 2, dtype=torch.uint8).expand(5, 2).to("meta"))
    assert (copy.from_host, copy.moved) == (10, 0)


def test_kernels_say_what_they_move():
    views, mean = meta(2, 3, 32, 32, dtype=torch.uint8), meta(3)
    (plain,) = logged(lambda: augment_views(views, None, mean, mean, torch.bfloat16))
    pixels = 2 * 3 * 32 * 32
    assert plain.moved == pixels * (1 + 2)
    params = meta(2, 9)
    (coloured,) = logged(lambda: augment_views(views, params, mean, mean, torch.bfloat16))
    assert coloured.moved == pixels * (2 + 2)

    tokens, scores = meta(4, 16, IN, dtype=torch.bfloat16), meta(2, 2, 4, 4)
    cls_token, positions = tokens[0, 0], meta(17, IN, dtype=torch.bfloat16)
    (pack,) = logged(lambda: attentive_pack(tokens, cls_token, positions, scores, None, None, 2, 2))
    kept = 2 * 4 * (1 + 8) * IN  # bytes of four views' class token and two blocks of four patches
    ids = 4 * (8 * 8 + 16 * 4)
    assert pack.moved == 2 * kept + 2 * 17 * IN + 4 * scores.numel() + ids

    rows, columns = meta(8, IN, requires_grad=True), meta(12, IN)
    loss = logged(lambda: contrastive_loss(rows, columns, meta(1), 0, 1024))
    (loss,) = [each for each in loss if each.name == "contrastive_loss"]
    logits = 4 * 8 * 12
    # The logits' product and the rows' gradient; three passes over the logits between them.
    assert loss.moved == 2 * (logits + 4 * 8 * IN + 4 * 12 * IN) + 3 * logits


def test_what_a_tensor_repeats_counts_once():
    assert touched(meta(5, 1).expand(5, 7)) == 20
    assert touched(meta(0, 3)) == 0


def chain():
    """x and z are given: y = gelu(x) * 2 + z, then a product that reads y and x."""
    log = OperationLog()
    x, z, weight = meta(ROWS, IN), meta(ROWS, IN), meta(IN, OUT)
    with log:
        log.begin("forward")
        y = F.gelu(x) * 2 + z
        (y @ weight).sum()
    return log


def test_a_compiled_chain_reads_and_writes_once():
    log = chain()
    size = 4 * ROWS * IN
    assert [each.moved for each in log.operations[:3]] == [2 * size, 2 * size, 3 * size]
    first, product, total = fuse(log.operations, log.sizes, {"forward"})
    assert (first.name, first.moved) == ("fused", 3 * size)  # x and z, and y, which mm reads
    assert product == log.operations[3]
    assert total.moved == 4 * ROWS * OUT + 4


def test_what_is_not_compiled_stays():
    log = chain()
    assert fuse(log.operations, log.sizes, {"backward"}) == log.operations


def test_what_is_read_later_is_written_by_a_chain():
    log = OperationLog()
    x, weight = meta(ROWS, IN, requires_grad=True), meta(IN, OUT)
    with log:
        y = (F.gelu(x) * 2).exp() @ weight
        y.sum().backward()
    size = 4 * ROWS * IN
    first, *_ = fuse(log.operations, log.sizes, {""})
    # Reads x; exp keeps its result for the backward pass, gelu its argument, and mul nothing.
    assert first.moved == 2 * size
