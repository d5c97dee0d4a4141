"""Caption-word classification in whole steps: any ZeRO stage, number of ranks and micro-batch."""

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
    make_stepper,
    plain_contrastive,
    plain_pixels,
    run_steps,
)

from aclip.config.recipe_file import load_recipe
from aclip.config.sections import TrainConfig
from aclip.data.synthetic import synthetic_batch
from aclip.distributed import rank
from aclip.errors import ConfigError
from aclip.method.tokens import END_ID, START_ID, Tokens
from aclip.models.student import build_student
from aclip.run_folder.checkpoint_folder import TERMS
from aclip.training.saver import Saver

pytestmark = pytest.mark.distributed

WORDS = ["loss.words=0.5"]
NUM_STEPS, NUM_WORDS = 3, 9
FOLLOWED = ("words_head.weight", "words_head.bias", TOWER)


def captions_of(step):
    """Few words, so that most are held by several captions; two captions are empty."""
    generator = torch.Generator().manual_seed(step)
    lengths = [5, 0, 3, 9, 1, 0, 12, 4]
    return [torch.randint(0, NUM_WORDS, (n,), generator=generator).tolist() for n in lengths]


def batch_of(recipe, step):
    ids = torch.zeros(BATCH, 16, dtype=torch.int64)
    captions = captions_of(step)
    for row, caption in enumerate(captions):
        ids[row, : len(caption) + 2] = torch.tensor([START_ID, *caption, END_ID])
    lengths = torch.tensor([len(caption) + 2 for caption in captions])
    return synthetic_batch(recipe, BATCH, Tokens(ids, lengths))


def batches_of(recipe):
    return [batch_of(recipe, step) for step in range(NUM_STEPS)]


def words_of(stepper):
    return next(term for term in stepper.terms if term.name == "words")


def run_splits(folder, splits):
    results = []
    for split in splits:
        steps, stepper = run_steps(folder, *split, WORDS, batches_of, FOLLOWED)
        results.append((steps, words_of(stepper).state_dict()))
    return results


def plain_steps():
    """The same from the rule's formula, with the whole batch's logits in float64."""
    recipe = load_recipe(SMALL_RECIPE, [*TINY, *WORDS])
    student = build_student(recipe).double()
    named = dict(student.named_parameters())
    counts, steps = torch.zeros(NUM_WORDS, dtype=torch.float64), []
    for step, batch in enumerate(batches_of(recipe)):
        holds = torch.zeros(BATCH, NUM_WORDS, dtype=torch.float64)
        for row, caption in enumerate(captions_of(step)):
            holds[row, caption] = 1
        counts += holds.mean(0)
        weights = holds * torch.log((step + 1 + 1 / BATCH) / (counts + 1 / BATCH))
        targets = F.normalize(weights, p=1, dim=1)
        texts = student.encode_text(batch.tokens)
        scale = student.logit_scale.log_logit_scale.exp()
        value, contrastive = 0, 0
        for view in plain_pixels(recipe, batch).unbind(1):
            features = student.image(view)
            logits = features @ student.words_head.weight.T + student.words_head.bias
            value = value - (targets * logits.log_softmax(1)[:, :NUM_WORDS]).sum(1).mean() / 2
            images = student.image_projection(features)
            contrastive = contrastive + plain_contrastive(images, texts, scale) / 2
        loss = contrastive + 0.5 * value
        gradients = torch.autograd.grad(loss, [named[name] for name in FOLLOWED])
        values = {"words": value.detach(), "loss": loss.detach()}
        steps.append(values | dict(zip(FOLLOWED, gradients, strict=True)))
    return steps, counts


@pytest.mark.parametrize("ranks", [1, 2])
def test_value_gradients_and_counts_equal_the_plain_formula(ranks, run_distributed, tmp_path):
    expected, counts = plain_steps()
    for results in run_distributed(run_splits, ranks, tmp_path, SPLITS[ranks]):
        assert len(results) == len(SPLITS[ranks])
        for steps, state in results:
            assert_equal_steps(steps, expected)
            assert state["num_steps"].item() == NUM_STEPS
            torch.testing.assert_close(state["shares"][:NUM_WORDS], counts, rtol=1e-12, atol=0)
            assert not state["shares"][NUM_WORDS:].any()


def test_a_checkpoint_holds_the_counts_and_without_them_none_is_loaded(run_distributed, tmp_path):
    root = tmp_path / "checkpoints"

    def save():
        recipe, stepper = make_stepper(tmp_path, "2", 2, WORDS)
        for step in range(2):
            stepper.step(batch_of(recipe, step).split(BATCH // 2)[rank()], 0.0, None)
        saver = Saver(root, stepper.engine, None, TrainConfig())
        saver.save({"samples": 16}, (16, []), required=True)
        saver.close()
        return words_of(stepper).state_dict()

    def load():
        folder = root / "samples-000000000016"
        _, stepper = make_stepper(tmp_path, "1", 4, WORDS)
        stepper.load(folder, 2)
        loaded = words_of(stepper).state_dict()
        (folder / TERMS).unlink()
        with pytest.raises(ConfigError, match="does not hold words/num_steps of the loss's terms"):
            stepper.load(folder, 2)
        return loaded

    saved = run_distributed(save, 2)
    (loaded,) = run_distributed(load, 1)
    for state in (*saved, loaded):
        assert state["num_steps"].item() == 2
        assert torch.equal(state["shares"], saved[0]["shares"])
    assert saved[0]["shares"].sum() > 1
