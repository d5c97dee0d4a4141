"""Compiled blocks compute what eager ones do, from few graphs without breaks."""

import functools

import pytest
import torch
from small_recipe import SMALL_RECIPE
from torch._dynamo.utils import counters

from aclip.config.ds_config import DsConfig
from aclip.config.optimizer import OptimizerConfig
from aclip.config.recipe_file import load_recipe
from aclip.engine.build import build_engine
from aclip.errors import ConfigError
from aclip.method.masks.policy import Selection
from aclip.method.tokens import END_ID, START_ID, clip_tokens
from aclip.models.student import build_student
from aclip.models.text import TextTower
from aclip.models.vit import ImageTower


@pytest.fixture
def quick_compile(monkeypatch):
    """Everything of torch.compile but the minutes that its code generation takes."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def _images(recompute, compile):
    torch.manual_seed(0)
    tower = ImageTower("vit_tiny_patch16_224", 64, {"depth": 4}, False, recompute, compile)
    pixels = torch.randn(4, 3, 64, 64)
    selection = Selection(torch.rand(2, 2, 4, 4), None, None, 3, 2)
    return tower, lambda: torch.cat([tower(pixels, selection), tower(pixels, selection)])


def _captions(recompute, compile):
    torch.manual_seed(0)
    tower = TextTower(64, 4, 4, 32, recompute, compile)
    batches = []
    for lengths in ((7, 2, 13), (5, 5, 6, 7), (9, 20)):
        tokens = torch.randint(1, 1000, (len(lengths), max(lengths)))
        for row, length in enumerate(lengths):
            tokens[row, 0], tokens[row, length - 1], tokens[row, length:] = (
                START_ID,
                END_ID,
                0,
            )
        batches.append(clip_tokens(tokens).located())
    return tower, lambda: torch.cat([tower(batch) for batch in batches])


def _compare(build, recompute):
    results = []
    for compile in (False, True):
        tower, forward = build(recompute, compile)
        out = forward()
        out.sin().sum().backward()
        results.append((out, [parameter.grad for parameter in tower.parameters()]))
    (expected, expected_grads), (actual, actual_grads) = results
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for want, have in zip(expected_grads, actual_grads, strict=True):
        assert (have - want).abs().max() <= 1e-4 * want.abs().max() + 1e-5


@pytest.mark.parametrize("recompute", ["none", "elementwise", "blocks"])
@pytest.mark.parametrize("build", [_images, _captions])
def test_compiled_towers_equal_eager_ones(quick_compile, build, recompute):
    _compare(build, recompute)
    assert not counters["graph_break"]
    # One graph for all blocks and one for the last, whatever the captions' lengths.
    assert counters["stats"]["unique_graphs"] == 2


def test_generated_code_equals_eager():
    torch._dynamo.reset()
    _compare(_captions, "elementwise")


def test_scores_of_compiled_blocks_equal_eager_ones(quick_compile):
    eager, compiled = (_images("none", compile)[0] for compile in (False, True))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, actual = eager.forward_with_scores(pixels), compiled.forward_with_scores(pixels)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert not counters["graph_break"]


def test_compiled_blocks_are_refused_with_zero3(quick_compile):
    student = build_student(load_recipe(SMALL_RECIPE, ["model.compile=true"]))
    ds_config = DsConfig("some.json", {}, 1, 1, 3, torch.float32)
    with pytest.raises(ConfigError, match="model.compile is true with .*stage 3 in some.json"):
        build_engine(student, OptimizerConfig(), ds_config)
