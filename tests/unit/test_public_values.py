"""What of a recipe and of messages is shown to everybody: names, never places."""

import json

import pytest

from aclip.config.public_values import public_name, public_names, public_text, public_values
from aclip.config.recipe_file import load_recipe, recipe_of_values

NAMES = {
    "demo": "demo",
    "/data/yfcc15m": "yfcc15m",
    "/data/yfcc15m/": "yfcc15m",
    "/data/yfcc15m/*.tar": "yfcc15m/*.tar",
    "/data/yfcc15m/{00000..01482}.tar": "yfcc15m/{00000..01482}.tar",
    "/data/x/cc12m-train-{0000..2175}.tar": "cc12m-train-{0000..2175}.tar",
    "/home/alice/*.tar": "*.tar",
    "/Users/alice/0.tar": "0.tar",
    "~/0.tar": "0.tar",
    "/*.tar": "*.tar",
    "s3://secret-bucket/{000..100}.tar": "{000..100}.tar",
    "s3://secret-bucket/laion/{000..100}.tar": "laion/{000..100}.tar",
    "https://alice:word@example.org/sets/cc3m.tar?token=abc": "cc3m.tar",
    "pipe:aws s3 cp s3://secret-bucket/{000..100}.tar -": "a command",
    "timm:vit_base_patch16_224.augreg_in21k": "timm:vit_base_patch16_224.augreg_in21k",
    "timm:/home/alice/vit.pth": "timm:vit.pth",
    "local-dir:/home/alice/exported": "local-dir:exported",
    "hf-hub:owner/name@main": "hf-hub:owner/name@main",
    "runs/secret/checkpoints/samples-000000012288": "samples-000000012288",
}


@pytest.mark.parametrize("place", NAMES)
def test_a_place_becomes_its_name(place):
    assert public_name(place) == NAMES[place]


def test_names_come_once_in_their_order():
    assert public_names(["/a/x/0.tar", "/b/x/0.tar", "/a/y.tar", ""]) == ["x/0.tar", "y.tar"]
    assert public_names([]) == []


@pytest.mark.parametrize(
    "text, shown",
    [
        ("A-CLIP ViT-B/16, YFCC-15M, and/or more", None),
        ("see https://arxiv.org/abs/2212.08653", None),
        ("1/2 of 3 / 4, /", None),
        ("SLIP (/home/alice/SLIP)", "SLIP (SLIP)"),
        ("set in '/data/my/set': 3 images", "set in 'set': 3 images"),
        ("trained at ~/runs/first, ./x/y and ../z", "trained at first, y and z"),
        ("from s3://secret/run/a.pt today", "from a.pt today"),
        ("user's ~alice/secret/file.txt", "user's file.txt"),
    ],
)
def test_a_text_keeps_all_but_its_paths(text, shown):
    assert public_text(text) == (text if shown is None else shown)


def test_a_recipe_keeps_its_values_and_loses_its_places():
    recipe = load_recipe(
        "flip_vitb16",
        [
            "description=mine at /secret/one",
            'data.sources=[{shards: "/secret/cc3m/*.tar", weight: 3}, '
            '{shards: ["s3://secret/yfcc.tar"], weight: 1}]',
            "data.val=/secret/val.tar",
            "data.cache=/secret/cache",
            "model.init=/secret/first.pt",
            "text={tokens: 8, reduce: frequency, word_counts: /secret/counts.json}",
            "train.upload_to=s3://secret/run",
            "train.wandb=secret",
            "stages.0.data={val: /secret/other.tar}",
        ],
    )
    values = public_values(recipe)
    assert "secret" not in json.dumps(values)
    assert values["data"]["sources"][0]["shards"] == "cc3m/*.tar"
    assert values["data"]["sources"][1]["shards"] == ["yfcc.tar"]
    assert values["stages"][0]["data"] == {"val": "other.tar"}
    assert values["description"] == "mine at one"
    # All else is the recipe, which can be read again.
    again = recipe_of_values(values, "the card")
    assert again.mask == recipe.mask and again.optimizer == recipe.optimizer
    assert again.model.image == recipe.model.image and again.loss == recipe.loss
