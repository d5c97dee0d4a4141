"""A byte a patch: the teacher's scores come back as precisely as a mask needs them."""

import math
from dataclasses import replace

import pytest
import torch
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.data.synthetic import synthetic_batch
from aclip.method.masks.policy import kept_patches
from aclip.method.score_codes import decode_scores, encode_scores
from aclip.models.student import build_student
from aclip.training.step_inputs import StepInputs
from aclip.training.teacher import Teacher


def codes_of(*scores):
    return encode_scores(torch.tensor(scores).view(1, 1, -1)).flatten().tolist()


def test_code_counts_24_steps_for_each_factor_of_e_below_the_highest():
    e = math.e
    assert codes_of(3.0, 3 / e, 3 / e**2, 3 / e**10) == [255, 231, 207, 15]
    # 24 ln 2 is 16.6, and so many steps below the highest: the nearest whole one.
    assert codes_of(0.02, 0.01) == [255, 238]


def test_lowest_code_takes_what_is_smaller_and_never_is_no_score():
    smallest = math.exp(-254 / 24)  # 2.5e-5 of the highest
    assert codes_of(1.0, smallest, smallest / 2, 1e-30, 0.0, math.nan) == [255, 1, 1, 1, 1, 1]
    assert codes_of(0.0, 0.0) == codes_of(math.nan, 0.0) == [1, 1]
    assert decode_scores(torch.tensor([[[1]]])).item() == pytest.approx(2.53e-5, rel=2e-3)


def test_scores_come_back_within_half_a_step():
    """Half a step is the factor exp(1/48), 2.11 %, and two scores that are a whole step apart,
    4.3 %, keep their order."""
    shares = torch.exp(torch.linspace(-10.5, 0, 100 * 256)).view(1, 256, 100)
    back = decode_scores(encode_scores(0.003 * shares))
    ratio = (back / shares).log()
    assert 0.98 / 48 < ratio.abs().max() <= 1.001 / 48
    close = torch.tensor([0.5 * math.exp(-1 / 24), 0.5, 1.0]).view(1, 1, 3)
    assert decode_scores(encode_scores(close)).flatten().diff().min() > 0


def test_each_image_has_its_own_highest_score():
    scores = torch.tensor([0.5, 0.25, 0.02, 0.01]).view(2, 1, 2)
    assert encode_scores(scores).flatten().tolist() == [255, 238, 255, 238]


def test_fresh_and_stored_scores_keep_the_same_patches(monkeypatch):
    overrides = ["model.image.kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}"]
    overrides += ["model.text={width: 8, heads: 2, layers: 1, context_length: 16}"]
    recipe = load_recipe(SMALL_RECIPE, [*overrides, "teacher.reuse=2"])
    torch.manual_seed(0)
    student = build_student(recipe)
    device = torch.device("cpu")
    teacher = Teacher(student, torch.float32, device)
    inputs = StepInputs(
        recipe, student.terms, teacher, student.image, device=device, dtype=torch.float32
    )
    batch = synthetic_batch(recipe, 6)
    views = batch.student_views.float()

    def kept(batch):
        selection = inputs.select(batch, views, inputs.teach(batch).scores, 1.0)
        return kept_patches(selection, 8)

    fresh = inputs.teach(batch)
    stored = replace(batch, teacher_view=None, to_teach=[""] * 6, stored_scores=fresh.codes)
    assert inputs.teach(stored).codes is None
    assert torch.equal(inputs.teach(stored).scores, fresh.scores)
    assert torch.equal(kept(stored), kept(batch)) and len(kept(batch).unique(dim=0)) > 1
    # Two samples lack theirs: these get fresh ones, the others keep what is stored.
    codes = torch.randint(1, 256, fresh.codes.shape, dtype=torch.uint8)
    codes[[1, 4]] = 0
    seen, forward = [], teacher.forward
    monkeypatch.setattr(
        teacher, "forward", lambda pixels, *rest: seen.append(len(pixels)) or forward(pixels, *rest)
    )
    to_teach = ["", "missing", "", "", "missing", ""]
    mixed = inputs.teach(replace(batch, to_teach=to_teach, stored_scores=codes))
    assert seen == [2], "the teacher runs on no others"
    assert torch.equal(mixed.scores[[1, 4]], fresh.scores[[1, 4]])
    assert torch.equal(mixed.scores[[0, 2, 3, 5]], decode_scores(codes[[0, 2, 3, 5]]))
    assert torch.equal(mixed.codes[[1, 4]], fresh.codes[[1, 4]])
