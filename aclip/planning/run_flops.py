"""The FLOPs of a run that has been trained, for its model card."""

from aclip.config.recipe import Recipe
from aclip.data.synthetic import MEAN_LENGTH, batch_of_mean_captions, mean_in_training
from aclip.planning.measure_step import measure_run


def sample_flops(recipe: Recipe, num_samples: float) -> float:
    """The FLOPs of a sample's matrix products in training, each needed once: the average over a
    run with the recipe, without stages, for captions of YFCC-15M's mean length. It takes less than
    a second, whatever the towers' size.

    Args:
        num_samples: samples of an epoch.
    """
    length = mean_in_training(recipe, MEAN_LENGTH)
    batch = batch_of_mean_captions(recipe, length, recipe.caption_tokens)
    return measure_run(recipe, batch, num_samples, modes=("none",)).total_flops
