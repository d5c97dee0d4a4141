"""The stages of a run and the share of its samples that each has: what a sample of the run costs is
their average."""

from aclip.config.recipe import Recipe
from aclip.config.recipe_file import stages_of
from aclip.planning.step_kinds import EPOCH_SAMPLES


def stage_shares(
    recipe: Recipe, batch_size: int | None = None, num_samples: float = EPOCH_SAMPLES
) -> list[tuple[Recipe, float]]:
    """The stages' recipes with their shares of the run's samples.

    Args:
        batch_size: the global batch size that all stages get; None for their own.
        num_samples: samples of an epoch.
    """
    stages = stages_of(recipe)
    lengths = [each.num_steps(num_samples) * each.train.global_batch_size for each in stages]
    if batch_size is not None:
        sized = {"global_batch_size": batch_size}
        stages = [
            each.model_copy(update={"train": each.train.model_copy(update=sized)})
            for each in stages
        ]
    return [(each, n / sum(lengths)) for each, n in zip(stages, lengths, strict=True)]


def stage_title(name: str, number: int, num_stages: int) -> str:
    """What a table calls a stage of a system; number counts from 1."""
    return name if num_stages == 1 else f"{name}, stage {number}"
