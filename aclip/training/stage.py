"""A stage of a run: its recipe, its data and its place in the run."""

from dataclasses import dataclass

from aclip.config.ds_config import DsConfig
from aclip.config.recipe import Recipe
from aclip.data.shards.listing import Shard


@dataclass(frozen=True)
class StagePlace:
    """Where a stage lies in its run.

    Attributes:
        number: 1 for the first stage.
        samples, steps: that the run has seen and done when the stage begins.
        rest_samples, rest_steps: of the stages that follow it.
    """

    number: int = 1
    samples: int = 0
    steps: int = 0
    rest_samples: int = 0
    rest_steps: int = 0

    @property
    def begun(self) -> dict[str, int]:
        """What state.json says of it."""
        return {"number": self.number, "samples": self.samples, "steps": self.steps}

    @property
    def is_last(self) -> bool:
        return self.rest_steps == 0

    def run_length(self, samples: int, steps: int) -> tuple[int, int]:
        """Samples and steps of the whole run.

        Args:
            samples, steps: of this stage.
        """
        return self.samples + samples + self.rest_samples, self.steps + steps + self.rest_steps


FIRST_STAGE = StagePlace()
"""That of a run without further stages."""


@dataclass(frozen=True)
class Stage:
    """A stage, checked.

    Attributes:
        recipe: what to train.
        ds_config: how the ranks share it.
        shards, val_shards: training and validation data; the latter may be empty.
        place: where it lies in its run.
    """

    recipe: Recipe
    ds_config: DsConfig
    shards: list[Shard]
    val_shards: list[Shard]
    place: StagePlace = FIRST_STAGE


def stage_number(progress: dict) -> int:
    """The number of the stage that a checkpoint is of.

    Args:
        progress: what its state.json holds.
    """
    return progress.get("stage", {}).get("number", 1)


def is_stage_done(recipe: Recipe, progress: dict) -> bool:
    """Whether a checkpoint is the end of its stage, by that stage's recipe."""
    return progress["step"] >= recipe.num_steps(progress["data"]["samples"])


def evaluation_at(samples: int) -> str:
    """What an evaluation is called that is neither before nor at the end of a run."""
    return f"{samples} samples"


def stage_to_begin(
    progress: dict, is_done: bool, num_stages: int, is_evaluated: bool = True
) -> dict:
    """What a start from a checkpoint does, as the Beginning's attributes.

    Args:
        is_done: whether the checkpoint is the end of its stage.
        is_evaluated: whether nothing else is left to do in that stage.
    """
    number = stage_number(progress)
    begun = progress.get("stage", {"samples": 0, "steps": 0})
    if is_done and number < num_stages and is_evaluated:
        steps = begun["steps"] + progress["step"]
        begun = {"samples": progress["samples"], "steps": steps}
        return {"stage": number + 1, "begun": begun, "begins_stage": True}
    is_complete = is_done and number == num_stages
    return {"stage": number, "begun": begun, "is_complete": is_complete}


def stage_places(
    recipes: list[Recipe], sizes: list[int], number: int, begun: dict[str, int]
) -> list[StagePlace]:
    """The places of the stages from one on.

    Args:
        recipes: those stages' recipes.
        sizes: samples of an epoch of each.
        number: the first one's number.
        begun: samples and steps of the run when it begins.
    """
    lengths = [recipe.num_steps(size) for recipe, size in zip(recipes, sizes, strict=True)]
    samples = [
        steps * recipe.train.global_batch_size
        for recipe, steps in zip(recipes, lengths, strict=True)
    ]
    return [
        StagePlace(
            number + index,
            samples=begun["samples"] + sum(samples[:index]),
            steps=begun["steps"] + sum(lengths[:index]),
            rest_samples=sum(samples[index + 1 :]),
            rest_steps=sum(lengths[index + 1 :]),
        )
        for index in range(len(recipes))
    ]
