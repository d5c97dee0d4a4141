"""What a run holds besides states and activations: batches on the GPU, and on rank 0's host the
copies for a checkpoint."""

from dataclasses import dataclass

from torch import Tensor, nn

from aclip.config.recipe import Recipe
from aclip.data.batch import PIXELS, Batch
from aclip.engine.host_copy import bounded
from aclip.planning.zero_memory import FP32, NUM_MOMENTS

NUM_BATCHES = 3
"""The next one is copied to the GPU as soon as the host has one to launch; the GPU may still work
on the one before."""
WHOLE_IMAGE_BYTES = 3


def batch_bytes(recipe: Recipe, batch: Batch, image_pixels: float) -> float:
    """Bytes of pixels that a GPU holds for each image of its local batch.

    With data.crops=device, the default on a GPU, whole images lie ahead, and the views that are cut
    of them stay as long as the step; else all batches are views.

    Args:
        batch: any number of samples, with their views.
        image_pixels: the mean number of an image.
    """
    views = [getattr(batch, name) for name in PIXELS]
    of_views = sum(pixels.nbytes for pixels in views if pixels is not None) / len(batch)
    if recipe.data.crops == "worker":
        return NUM_BATCHES * of_views
    kept = min(image_pixels, recipe.data.max_image_side**2)
    return NUM_BATCHES * WHOLE_IMAGE_BYTES * kept + of_views


@dataclass(frozen=True)
class CheckpointCopies:
    """What rank 0's host keeps for checkpoints from the first step on.

    Attributes:
        size: bytes of masters, moments, frozen weights and the teacher's average.
        pinned: bytes of the pinned blocks that they lie in, each of which is a power of two.
    """

    size: int
    pinned: int


def checkpoint_copies(
    student: nn.Module,
    averages: list[Tensor],
    num_moments: dict[nn.Parameter, int] | None = None,
) -> CheckpointCopies:
    """Counts them as they are copied; see aclip/engine/snapshot.py.

    Args:
        averages: the teacher's; empty without one.
        num_moments: tensors that the optimizer keeps for each trained parameter; None for Adam's.
    """
    parameters = list(student.parameters())
    kept = num_moments or dict.fromkeys(parameters, NUM_MOMENTS)
    lists = (
        [p.numel() for p in parameters if p.requires_grad for _ in range(1 + kept[p])],
        [p.numel() for p in parameters if not p.requires_grad],
        [average.numel() for average in averages],
    )
    blocks = [FP32 * sum(some) for numels in lists for some in bounded(numels, lambda numel: numel)]
    return CheckpointCopies(sum(blocks), sum(1 << (block - 1).bit_length() for block in blocks))
