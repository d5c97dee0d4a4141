"""FLOPs of a training step per sample: matrix products alone, two operations a multiply-add.

Left out, together well under 1 %: elementwise work, softmax, norms, and the two ops whose products
are elementwise (the remap of attentive_pack, the teacher's CLS scores). A product's backward pass
is two more of its size, one for each operand that needs a gradient.
"""

from dataclasses import dataclass

from aclip.planning.step_shape import LOGITS, BlockShape, HeadShape, StepShape, TowerPass


@dataclass(frozen=True)
class Flops:
    """Of the forward and the backward pass."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> "Flops":
        return Flops(self.forward * factor, self.backward * factor)


def product(rows: float, inner: float, columns: float, num_gradients: int = 2) -> Flops:
    """(rows, inner) @ (inner, columns), where num_gradients of the two operands need one."""
    forward = 2 * rows * inner * columns
    return Flops(forward, num_gradients * forward)


def transformer_block(num_tokens: float, attended_tokens: float, block: BlockShape) -> Flops:
    """A block over all tokens.

    Args:
        attended_tokens: rows and columns of attention, padding included; a causal mask halves
            nothing here.
    """
    width = block.width
    scores = product(attended_tokens, width, attended_tokens)
    return (
        product(num_tokens, width, 3 * width)
        + scores * 2  # and the weighted sum
        + _rows_behind_attention(num_tokens, block)
    )


def one_query_block(attended_tokens: float, block: BlockShape) -> Flops:
    """A block that computes one row, with the products of keys and values on the query's side."""
    width = block.width
    scores = product(block.num_heads, width, attended_tokens)
    return (
        product(3, width, width)  # the query, the query times W_k, W_v times the weighted sum
        + scores * 2
        + _rows_behind_attention(1, block)
    )


def tower_blocks(tower: TowerPass) -> Flops:
    """The blocks of all runs of a pass, as if trained."""
    whole = transformer_block(tower.num_tokens, tower.attended_tokens, tower.block)
    last = one_query_block(tower.attended_tokens, tower.block) if tower.one_query_at_end else whole
    return (whole * (tower.num_blocks - 1) + last) * tower.num_runs


def patch_embedding(tower: TowerPass) -> Flops:
    """Of all runs; the pixels need no gradient, nor does a frozen weight."""
    if tower.embed is None:
        return Flops()
    num_gradients = 1 if tower.embed.trained else 0
    one = product(tower.embed.num_patches, tower.embed.num_inputs, tower.block.width, num_gradients)
    return one * tower.num_runs


def head(shape: HeadShape) -> Flops:
    """The linear layers of a head."""
    pairs = zip(shape.widths[:-1], shape.widths[1:], strict=True)
    flops = sum((product(shape.num_rows, *pair) for pair in pairs), Flops())
    return flops if shape.trained else Flops(flops.forward)


def contrastive_logits(global_batch_size: int, embed_dim: int, num_views: int) -> Flops:
    """Both directions of each view; the op computes both gradients with the loss."""
    one = product(1, embed_dim, global_batch_size)
    return Flops(2 * num_views * one.total)


def simclr_logits(global_batch_size: int, dim: int) -> Flops:
    """Each of two views against both views of the global batch."""
    return product(1, dim, global_batch_size) * 4


def step_flops(step: StepShape) -> dict[str, Flops]:
    """A sample's FLOPs by component; the sum is what one step needs, with nothing run twice."""
    parts: dict[str, Flops] = {}

    def add(name: str, flops: Flops) -> None:
        parts[name] = parts.get(name, Flops()) + flops

    for tower in step.towers:
        flops = patch_embedding(tower) + tower_blocks(tower)
        add(tower.name, flops if tower.trained else Flops(flops.forward))
    for shape in step.heads:
        add(shape.name, head(shape))
    logits = contrastive_logits(step.global_batch_size, step.embed_dim, step.num_views)
    if step.simclr_dim is not None:
        logits += simclr_logits(step.global_batch_size, step.simclr_dim)
    add(LOGITS, logits)
    return parts


def repeated_flops(step: StepShape, num_micro_steps: int) -> float:
    """A sample's FLOPs on top of step_flops because something runs twice: blocks that the backward
    pass recomputes, and the towers of all micro_steps but the last (Stepper.step)."""
    share_again = (num_micro_steps - 1) / num_micro_steps
    repeated = 0.0
    for tower in step.towers:
        if tower.trained:
            blocks = tower_blocks(tower).forward
            repeated += blocks if tower.recompute == "blocks" else 0.0
            repeated += (blocks + patch_embedding(tower).forward) * share_again
    for shape in step.heads:
        if shape.trained and shape.with_towers:
            repeated += head(shape).forward * share_again
    return repeated


def _rows_behind_attention(num_rows: float, block: BlockShape) -> Flops:
    """Projection and MLP."""
    width = block.width
    mlp = product(num_rows, width, block.mlp_width) + product(num_rows, block.mlp_width, width)
    return product(num_rows, width, width) + mlp
