"""Bytes that a sample keeps on the GPU from its forward to its backward pass, and the logits.

What autograd saves without torch.compile, which keeps less: each tensor that a backward formula
reads, once. tests/unit/test_planner.py compares it with autograd's own.
"""

from aclip.planning.step_shape import HeadShape, StepShape, TowerPass

FP32 = 4
STATISTICS = 2 * FP32  # a norm's mean and deviation of one row


def tower_activations(tower: TowerPass, dtype_bytes: int) -> float:
    """What a sample's pass keeps for its backward pass, bytes; 0 for a pass without one.

    With `recompute: blocks` that is each block's input, and all of one block while its backward
    pass runs. dtype_bytes is of the towers' compute dtype.
    """
    if not tower.trained:
        return 0.0
    rows = tower.num_tokens * tower.block.width * dtype_bytes
    whole = _block_activations(tower, dtype_bytes)
    last = _one_query_activations(tower, dtype_bytes) if tower.one_query_at_end else whole
    if tower.recompute == "blocks":
        blocks = tower.num_blocks * rows + (whole if tower.num_blocks > 1 else last)
    else:
        blocks = (tower.num_blocks - 1) * whole + last
    if not tower.one_query_at_end:
        blocks += rows  # the norm behind the last block
    if tower.embed is not None and tower.embed.trained:
        blocks += tower.embed.num_patches * tower.embed.num_inputs * dtype_bytes
    return tower.num_runs * blocks


def _block_activations(tower: TowerPass, dtype_bytes: int) -> float:
    block, tokens = tower.block, tower.num_tokens
    # Input, norm, query, key, value, attention's output, second input, second norm; the MLP before
    # and behind its activation.
    rows = tokens * (8 * block.width + 2 * block.mlp_width)
    if tower.recompute == "elementwise":
        rows -= tokens * (2 * block.width + block.mlp_width)  # norms, the MLP behind its activation
    if tower.padded_tokens is not None:
        # Query, key and value are kept padded, attention's output so and packed.
        rows += (4 * tower.padded_tokens - 3 * tokens) * block.width
    log_sums = block.num_heads * tower.attended_tokens * FP32
    return rows * dtype_bytes + log_sums + 2 * tokens * STATISTICS


def _one_query_activations(tower: TowerPass, dtype_bytes: int) -> float:
    block, tokens = tower.block, tower.num_tokens
    # The input, its norm, or what attention reads of that: padded, in fp32.
    padded = tower.padded_tokens is not None
    norm_is_kept = not padded and tower.recompute != "elementwise"
    rows = (1 + norm_is_kept) * tokens * block.width * dtype_bytes
    if padded or dtype_bytes < FP32:
        rows += tower.attended_tokens * block.width * FP32
    attention = block.num_heads * (tower.attended_tokens + 2 * block.width) * FP32
    one_row = (6 * block.width + 2 * block.mlp_width) * dtype_bytes
    return rows + attention + one_row + tokens * STATISTICS


def head_activations(head: HeadShape, dtype_bytes: int) -> float:
    """What a sample's rows in a head keep for the backward pass, bytes."""
    if not head.trained:
        return 0.0
    *hidden, output = head.widths[1:]
    # BatchNorm keeps its centred and its normalised input in fp32, ReLU its output.
    kept = head.widths[0] * dtype_bytes + sum(hidden) * (2 * FP32 + dtype_bytes)
    return head.num_rows * (kept + output * head.logit_bytes)


def activations(step: StepShape, dtype_bytes: int) -> float:
    """What a sample of a micro-batch keeps: towers, and the heads that run with them."""
    towers = sum(tower_activations(tower, dtype_bytes) for tower in step.towers)
    heads = (head_activations(head, dtype_bytes) for head in step.heads if head.with_towers)
    return towers + sum(heads)


def local_activations(step: StepShape, dtype_bytes: int) -> float:
    """What a sample of the local batch keeps: the heads that run on all of it at once."""
    return sum(head_activations(head, dtype_bytes) for head in step.heads if not head.with_towers)


def logits(step: StepShape, local_batch_size: int, chunk_rows: int) -> float:
    """Bytes of the losses that compare a rank's samples with the global batch, fp32.

    Args:
        chunk_rows: rows of the contrastive loss whose logits exist at once.
    """
    columns, views = step.global_batch_size, step.num_views
    # Embeddings before and behind normalisation, and gathered; both gradients of each direction of
    # each view; one chunk's logits.
    values = (views + 1) * (2 * local_batch_size + columns) * step.embed_dim
    values += 2 * views * (local_batch_size + columns) * step.embed_dim
    values += min(chunk_rows, local_batch_size) * columns
    if step.simclr_dim is not None:
        # Embeddings likewise; both sides' log-softmax against both views, and one side's logits
        # and their parts while it is made.
        values += 2 * (2 * local_batch_size + columns) * step.simclr_dim
        values += 4 * (2 * local_batch_size * columns)
    return values * FP32
