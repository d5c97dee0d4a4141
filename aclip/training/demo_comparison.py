"""What other masks reached in the demo's place: the last line of `make demo`."""

import json
from pathlib import Path
from statistics import fmean

from aclip.config.arguments import DEMO
from aclip.config.recipe import Recipe
from aclip.config.recipe_file import load_recipe

KEPT = Path(__file__).parents[2] / "launch/results/ablation-demo.json"
"""Results of an ablation of the demo's recipe, whose command stands in aclip/ablation/README.md."""


def compare_with_kept_results(recipe: Recipe) -> str:
    """The accuracy of the same recipe without a mask and with other masks, after as many samples.

    Returns:
        A line; empty if the recipe is not the demo's, unchanged, or an installation has no KEPT.
    """
    if recipe != load_recipe(DEMO) or not KEPT.is_file():
        return ""
    outcomes = {row["row"]: row["outcomes"] for row in json.loads(KEPT.read_text())["rows"]}
    ends = {
        row: 100 * fmean(outcome["points"][-1] for outcome in of_row.values())
        for row, of_row in outcomes.items()
    }
    return (
        f"in earlier runs of this recipe (means of {len(outcomes['attentive'])} seeds) the student "
        f"reached {ends['attentive']:.1f}%; after as many samples with a random mask of as many "
        f"patches {ends['random']:.1f}%, and without a mask {ends['none']:.1f}% "
        "(aclip/ablation/README.md)"
    )
