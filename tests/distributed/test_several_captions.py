"""Several captions of an image as positives, in whole steps on any number of ranks."""

import pytest
import torch
import torch.nn.functional as F
from small_recipe import SMALL_RECIPE
from whole_steps import (
    BATCH,
    SPLITS,
    TINY,
    TOWER,
    assert_equal_steps,
    plain_pixels,
    run_steps,
)

from aclip.config.recipe_file import load_recipe
from aclip.data.synthetic import synthetic_batch
from aclip.method.tokens import END_ID, START_ID, Tokens
from aclip.models.student import build_student

pytestmark = pytest.mark.distributed

PLACES, NUM_STEPS, NUM_WORDS = 3, 2, 9
SEVERAL = [f"data.captions_per_image={PLACES}"]
LOSSES = {
    "contrastive": [*SEVERAL, "loss.words=0.5"],
    "sigmoid": [*SEVERAL, "loss.contrastive=0", "loss.sigmoid=1", "loss.initial_logit_bias=-2"],
}
FOLLOWED = (TOWER, "text.transformer.encoder.layers.0.mlp.fc1.weight", "text_projection.weight")


def captions_of(step):
    """Each image's captions, of different lengths; most images have fewer than three."""
    generator = torch.Generator().manual_seed(step)
    counts = [2, 3, 1, 1, 3, 2, 1, 2 + step]
    return [
        [
            torch.randint(0, NUM_WORDS, (1 + (5 * i + 3 * j) % 9,), generator=generator).tolist()
            for j in range(count)
        ]
        for i, count in enumerate(counts)
    ]


def batches_of(recipe):
    batches = []
    for step in range(NUM_STEPS):
        ids = torch.zeros(BATCH, PLACES, 16, dtype=torch.int64)
        ids[..., 0], ids[..., 1] = START_ID, END_ID
        lengths = torch.full((BATCH, PLACES), 2)
        images = captions_of(step)
        for i, captions in enumerate(images):
            for j, caption in enumerate(captions):
                ids[i, j, : len(caption) + 2] = torch.tensor([START_ID, *caption, END_ID])
                lengths[i, j] = len(caption) + 2
        counts = torch.tensor([len(captions) for captions in images])
        tokens = Tokens(ids.flatten(0, 1), lengths.flatten(), num_captions=counts)
        batches.append(synthetic_batch(recipe, BATCH, tokens))
    return batches


def run_splits(folder, splits, overrides):
    return [run_steps(folder, *split, overrides, batches_of, FOLLOWED)[0] for split in splits]


def plain_steps(name):
    """The losses as the manual defines them: one matrix of logits, without the absent captions."""
    recipe = load_recipe(SMALL_RECIPE, [*TINY, *LOSSES[name]])
    student = build_student(recipe).double()
    named = dict(student.named_parameters())
    shares, steps = torch.zeros(NUM_WORDS, dtype=torch.float64), []
    for step, batch in enumerate(batches_of(recipe)):
        images = captions_of(step)
        captions = [caption for own in images for caption in own]
        image_of = torch.tensor([i for i, own in enumerate(images) for _ in own])
        places = [i * PLACES + j for i, own in enumerate(images) for j in range(len(own))]
        present = Tokens(batch.tokens.ids[places], batch.tokens.lengths[places])
        texts = F.normalize(student.encode_text(present), dim=1)
        is_own = (image_of == torch.arange(BATCH).unsqueeze(1)).double()
        pairs = is_own / is_own.sum(1, keepdim=True)
        holds = torch.zeros(len(captions), NUM_WORDS, dtype=torch.float64)
        for row, caption in enumerate(captions):
            holds[row, caption] = 1
        shares += holds.mean(0)
        smooth = 1 / len(captions)
        weights = holds * torch.log((step + 1 + smooth) / (shares + smooth))
        targets = pairs @ F.normalize(weights, p=1, dim=1)
        values = {name: 0} | ({"words": 0} if name == "contrastive" else {})
        for view in plain_pixels(recipe, batch).unbind(1):
            features = student.image(view)
            units = F.normalize(student.image_projection(features), dim=1)
            logits = student.logit_scale.log_logit_scale.exp() * units @ texts.T
            if name == "sigmoid":
                logits = logits + student.logit_bias.logit_bias
                each = -F.logsigmoid((2 * is_own - 1) * logits).sum() / BATCH
            else:
                both = logits.log_softmax(1) + logits.log_softmax(0)
                each = -(pairs * both).sum() / (2 * BATCH)
                words = features @ student.words_head.weight.T + student.words_head.bias
                of_words = (targets * words.log_softmax(1)[:, :NUM_WORDS]).sum(1).mean()
                values["words"] = values["words"] - of_words / 2
            values[name] = values[name] + each / 2
        loss = values[name] + 0.5 * values.get("words", 0)
        gradients = torch.autograd.grad(loss, [named[weight] for weight in FOLLOWED])
        values = {key: value.detach() for key, value in values.items()} | {"loss": loss.detach()}
        steps.append(values | dict(zip(FOLLOWED, gradients, strict=True)))
    return steps


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_equal_the_plain_formula(name, ranks, run_distributed, tmp_path):
    expected = plain_steps(name)
    arguments = (tmp_path, SPLITS[ranks], LOSSES[name])
    for results in run_distributed(run_splits, ranks, *arguments):
        assert len(results) == len(SPLITS[ranks])
        for steps in results:
            assert_equal_steps(steps, expected)
