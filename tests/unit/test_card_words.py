"""A recipe in plain words, and the papers that a card cites."""

from pathlib import Path
from typing import get_args

import pytest
import torch

from aclip.config.recipe_file import load_recipe, recipe_names
from aclip.config.sections import TextConfig
from aclip.method.losses.terms import TERMS
from aclip.method.masks.policies import POLICIES
from aclip.weights.card.words import LOSSES, MASKS, REDUCTIONS, describe, papers_of

ROOT = Path(__file__).parents[2]


class Towers:
    """In place of a student: only the sizes of the towers are read of it."""

    image = text = torch.nn.Linear(1000, 1000, device="meta")


def test_every_part_of_a_recipe_has_words():
    reductions = TextConfig.model_fields["reduce"].annotation
    assert REDUCTIONS.keys() == set(get_args(reductions))
    assert MASKS.keys() == POLICIES.keys() - {"none"}
    assert LOSSES.keys() == {term.name for term in TERMS}
    for name in recipe_names():
        assert {"Image tower", "Mask", "Losses"} <= describe(load_recipe(name), Towers).keys()


def test_a_recipe_in_words():
    lines = describe(load_recipe("aclip_fast_vitb16", ["model.init=/x/y.pt"]), Towers)
    assert lines == {
        "Image tower": "`vit_base_patch16_224` of timm, 224 px, 14 x 14 patches, 1.0 M parameters",
        "Text tower": "CLIP's transformer, 12 layers of width 512, 8 heads, up to 77 tokens, 1.0 M "
        "parameters",
        "Joint embedding": "512 numbers",
        "Start": "from the weights y.pt",
        "Mask": "`attentive`: of each view 50 % of its blocks of 2 x 2 patches are kept, those "
        "that the teacher attends to most; at random in the first 10 % of the steps",
        "Views": "2 views of an image beside its caption, 50 to 100 % of its area; the teacher "
        "reads the image at 112 px in one epoch of 4",
        "Captions": "up to 77 tokens",
        "Losses": "1 x CLIP's contrastive loss (`loss.contrastive`), 1 x SimCLR between two views "
        "(`loss.simclr`)",
        "Average": "the teacher, an average of the weights with momentum 0.996, rising to 1",
        "Optimizer": "adamw, 4,096 images a step, learning rate 0.0005 (cosine), weight decay 0.5",
    }
    lines = describe(load_recipe("clipf_vitb16"), Towers)
    assert lines["Captions"] == (
        "up to 8 tokens, of a longer one random words, of which common ones go first"
    )
    assert "Average" not in lines and "Start" not in lines


SOURCES = {
    "flip_vitb16": "2212.00794", "glip_vitb16": "2403.15837", "cluster_vitb16": "2405.08815",
    "clipa_vitb16": "2305.07017", "clipf_vitb16": "2412.16148", "siglip_vitb16": "2303.15343",
    "superclip_vitb16": "2512.14480", "lit_vitb16": "2111.07991", "slip_vitb16": "2112.12750",
    "maskclip_vitb16": "2208.12262", "aclip_clipf_vitb16": "2412.16148",
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_the_paper_that_a_recipe_names_is_cited(name):
    assert f"arXiv:{SOURCES[name]}" in (ROOT / f"aclip/recipes/{name}.yaml").read_text()
    assert SOURCES[name] in papers_of(load_recipe(name)).values()
    assert SOURCES[name] not in papers_of(load_recipe("clip_vitb16")).values()
