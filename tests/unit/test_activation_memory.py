"""What a step of A-CLIP keeps for its backward pass, against open_clip's CLIP at the same batch."""

import open_clip
import torch
from saved_activations import saved_activation_bytes

from aclip.config.geometry import kept_blocks
from aclip.config.recipe_file import load_recipe
from aclip.method.masks.policy import ViewsToMask
from aclip.method.masks.random import select_random
from aclip.method.tokens import END_ID, START_ID, clip_tokens
from aclip.models.student import StudentInput, build_student

LENGTHS = (12, 9, 16, 39)  # mean 19, as captions of YFCC have it


def test_two_masked_views_keep_less_than_one_full_view_of_open_clip():
    torch.manual_seed(0)
    tokens = torch.zeros(len(LENGTHS), 77, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = torch.randint(1, 40000, (length,))
        tokens[row, 0], tokens[row, length - 1] = START_ID, END_ID
    clip = open_clip.create_model("ViT-B-16", pretrained=None).train()
    pixels = torch.randn(len(LENGTHS), 3, 224, 224)
    of_open_clip = saved_activation_bytes(lambda: clip(pixels, tokens), [clip])

    recipe = load_recipe("aclip_vitb16")
    student = build_student(recipe)
    kept_in_view = kept_blocks(recipe.mask, student.image.grid, 1.0)
    to_mask = ViewsToMask(
        14, kept_in_view, recipe.mask.block_size, noise=torch.rand(len(LENGTHS), 2, 7, 7)
    )
    selection = select_random(to_mask)
    views = torch.randn(len(LENGTHS), 2, 3, 224, 224)
    cut = clip_tokens(tokens).located()

    def forward():
        inputs = StudentInput(views, selection, cut)
        return student("project", student("encode", inputs))

    kept = {}
    for mode in ("none", "elementwise"):
        student.image.recompute = student.text.recompute = mode
        kept[mode] = saved_activation_bytes(forward, [student])
    assert kept["none"] <= 0.85 * of_open_clip
    assert kept["elementwise"] <= 0.65 * of_open_clip
