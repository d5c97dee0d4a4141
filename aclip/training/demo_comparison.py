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
    rows = {row["row"]: row for row in json.loads(KEPT.read_text())["rows"]}

    def end(name: str) -> str:
        return f"{fmean(100 * each['points'][-1] for each in rows[name]['outcomes'].values()):.1f}%"

    ratio = rows["none"]["flops"][-1] / rows["attentive"]["flops"][-1]
    return (
        f"kept results of this recipe after as many samples: {end('attentive')} as it is, "
        f"{end('random')} with a random mask of as many patches, and {end('none')} without a mask, "
        f"for {ratio:.2f} times the FLOPs (aclip/ablation/README.md)"
    )
