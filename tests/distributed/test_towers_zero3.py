"""Every way through the towers on partitioned weights: ZeRO-3 on two ranks equals one process."""

import pytest
import tiny_run
import torch

from aclip.method.masks.policy import Selection
from aclip.method.tokens import Tokens, clip_tokens
from aclip.models.student import Student, StudentInput

pytestmark = pytest.mark.distributed


OVERRIDES = [
    "model.text={width: 8, heads: 2, layers: 3, context_length: 16}",
    "model.image.freeze_patch_embed=false",
    "optimizer.lr=0.01",
    # Not all weights are read, and DeepSpeed decays those without gradient on several ranks alone.
    "optimizer.weight_decay=0",
]


def _all_ways(self, pixels, tokens):
    """One number that reads features of CLS and end tokens and of all tokens, packed and not."""
    views = pixels.flatten(0, 1)
    # Not cut, so that the means below span equally many columns on every rank.
    tokens = Tokens(tokens, clip_tokens(tokens).lengths).located()
    masked = torch.zeros_like(tokens.ids, dtype=torch.bool)
    masked[:, 1::2] = True
    scores = views[:, 0, ::8, ::8].unflatten(0, pixels.shape[:2])
    selection = Selection(scores, None, None, 8, 1)
    inputs = StudentInput(pixels, selection, tokens)
    features = [
        *self.encode(inputs).values(),
        self.text.forward_tokens(tokens),
        self.text.forward_tokens(tokens, masked, views.new_ones(8)),
        self.image.forward_patches(views)[0],
        self.image.forward_patches(views, selection)[0],
    ]
    return sum(part.float().sin().mean() for part in features)


def train_all_ways(folder, stage, overrides=()):
    """Losses of three steps and the weights after them."""
    Student.all_ways = _all_ways
    run = tiny_run.TinyRun(folder, stage, "fp32", [*OVERRIDES, *overrides], persistent=0)
    losses = []
    for step in range(3):
        pixels, tokens = tiny_run.make_batch(step)
        # Captions of two, three, ... tokens; what stands behind the end is padding.
        for row in range(len(tokens)):
            tokens[row, 1 + row % 7] = tiny_run.END_ID
        size, rank = len(tokens) // tiny_run.world_size(), tiny_run.rank()
        own = slice(rank * size, (rank + 1) * size)
        loss = run.engine("all_ways", pixels[own], tokens[own])
        run.engine.set_gradient_accumulation_boundary(True)
        run.engine.backward(loss, scale_wrt_gas=False)
        run.engine.step()
        losses.append(loss.item())
    return losses, run.weights()


SIZES = "patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2"
OTHER_TOWERS = [
    pytest.param(
        "vit_small_patch16_rope_mixed_224",
        "num_reg_tokens: 1, global_pool: map, init_values: 0.5",
        id="rotary, registers, attention pool",
    ),
    pytest.param("eva02_tiny_patch14_224", "global_pool: token", id="EVA-02, CLS token"),
]


@pytest.mark.parametrize("name, kwargs", OTHER_TOWERS)
def test_other_image_towers_on_two_ranks_equal_one_process(run_distributed, tmp_path, name, kwargs):
    overrides = [
        f"model.image.name={name}",
        f"model.image.kwargs={{{SIZES}, {kwargs}}}",
    ]
    ((expected_losses, expected),) = run_distributed(train_all_ways, 1, tmp_path, 0, overrides)
    ranks = run_distributed(train_all_ways, 2, tmp_path, 3, overrides)
    mean = torch.tensor([losses for losses, _ in ranks]).mean(0)
    torch.testing.assert_close(mean, torch.tensor(expected_losses), rtol=1e-5, atol=1e-6)
    for name, weight in expected.items():
        if not name.endswith(("k_proj.bias", "qkv.bias", "kv.bias")):
            assert (ranks[0][1][name] - weight).abs().max() <= 1e-3, name


def test_zero3_on_two_ranks_equals_one_process(run_distributed, tmp_path):
    ((expected_losses, expected),) = run_distributed(train_all_ways, 1, tmp_path, 0)
    for recompute in ("none", "elementwise", "blocks"):
        overrides = [f"model.{tower}.recompute={recompute}" for tower in ("image", "text")]
        ranks = run_distributed(train_all_ways, 2, tmp_path, 3, overrides)
        mean = torch.tensor([losses for losses, _ in ranks]).mean(0)
        torch.testing.assert_close(mean, torch.tensor(expected_losses), rtol=1e-5, atol=1e-6)
        for name, weight in expected.items():
            # A key's bias has no gradient but rounding noise, which Adam blows up.
            if not name.endswith(("k_proj.bias", "qkv.bias")):
                assert (ranks[0][1][name] - weight).abs().max() <= 1e-3, (recompute, name)
