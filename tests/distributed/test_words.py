"""Caption-word classification in whole steps: any ZeRO stage, number of ranks and micro-batch."""

import json

import deepspeed
import pytest
import torch
import torch.nn.functional as F

from aclip.config.ds_config import read_ds_config
from aclip.config.recipe_file import load_recipe
from aclip.config.sections import TrainConfig
from aclip.data.batch import Batch
from aclip.data.synthetic import synthetic_batch
from aclip.distributed import rank, world_size
from aclip.engine.process_group import init_distributed
from aclip.errors import ConfigError
from aclip.method.tokens import END_ID, START_ID, Tokens
from aclip.models.student import build_student
from aclip.run_folder.checkpoint_folder import TERMS
from aclip.training.saver import Saver
from aclip.training.stepper import Stepper

pytestmark = pytest.mark.distributed

BATCH, NUM_STEPS, NUM_WORDS = 8, 3, 9
OVERRIDES = [
    f"train.global_batch_size={BATCH}",
    "model.image.resolution=32",
    "model.image.kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
    "model.text={width: 8, heads: 2, layers: 1, context_length: 16}",
    "model.embed_dim=11",
    "mask.policy=none",
    "teacher=null",
    "augment={jitter_prob: 0, grayscale_prob: 0, blur_prob: 0, solarize_prob: 0}",
    "loss.words=0.5",
    "loss.contrastive=1",
]
HEAD, TOWER = "words_head.weight", "image.vit.blocks.0.attn.qkv.weight"
FOLLOWED = (HEAD, "words_head.bias", TOWER)
SPLITS = {1: [("0", 8), ("0", 2)], 2: [("1", 2), ("2", 4), ("3", 2)]}
"""ZeRO stages and micro-batches by the number of ranks."""


def captions_of(step):
    """Few words, so that most are held by several captions; two captions are empty."""
    generator = torch.Generator().manual_seed(step)
    lengths = [5, 0, 3, 9, 1, 0, 12, 4]
    return [torch.randint(0, NUM_WORDS, (n,), generator=generator).tolist() for n in lengths]


def batch_of(recipe, step) -> Batch:
    ids = torch.zeros(BATCH, 16, dtype=torch.int64)
    captions = captions_of(step)
    for row, caption in enumerate(captions):
        ids[row, : len(caption) + 2] = torch.tensor([START_ID, *caption, END_ID])
    lengths = torch.tensor([len(caption) + 2 for caption in captions])
    return synthetic_batch(recipe, BATCH, Tokens(ids, lengths))


def make_stepper(folder, stage, micro_batch):
    device = init_distributed()
    zero = {"stage": int(stage), "stage3_param_persistence_threshold": 100}
    values = {
        "zero_optimization": zero,
        "gradient_clipping": 0.0,
        "train_micro_batch_size_per_gpu": micro_batch,
    }
    path = folder / f"ds-{stage}-{micro_batch}-{rank()}.json"
    path.write_text(json.dumps(values))
    recipe = load_recipe("demo", OVERRIDES)
    return recipe, Stepper(recipe, read_ds_config(str(path), BATCH, world_size()), device)


def run_steps(folder, splits):
    """The term and the gradients of each step, with weights that stay as they are."""
    results = []
    for stage, micro_batch in splits:
        recipe, stepper = make_stepper(folder, stage, micro_batch)
        named = dict(stepper.engine.module.named_parameters())
        gradient = deepspeed.utils.safe_get_full_grad if int(stage) else lambda p: p.grad
        update, steps = stepper.engine.step, []

        def step_engine(named=named, gradient=gradient, update=update, steps=steps):
            steps.append({name: gradient(named[name]).float().clone() for name in FOLLOWED})
            update()

        stepper.engine.step = step_engine
        for step in range(NUM_STEPS):
            own = batch_of(recipe, step).split(BATCH // world_size())[rank()]
            value = stepper.step(own, 0.0, None)["words"]
            if world_size() > 1:
                torch.distributed.all_reduce(value)
            steps[-1]["value"] = value / world_size()
        results.append((steps, words_of(stepper).state_dict()))
    return results


def words_of(stepper):
    return next(term for term in stepper.terms if term.name == "words")


def plain_contrastive(images, texts, scale):
    labels = torch.arange(BATCH)
    logits = scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def plain_steps():
    """The same from the rule's formula, with the whole batch's logits in float64."""
    recipe = load_recipe("demo", OVERRIDES)
    student = build_student(recipe).double()
    named = dict(student.named_parameters())
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
        for values in (recipe.augment.mean, recipe.augment.std)
    )
    counts, steps = torch.zeros(NUM_WORDS, dtype=torch.float64), []
    for step in range(NUM_STEPS):
        holds = torch.zeros(BATCH, NUM_WORDS, dtype=torch.float64)
        for row, caption in enumerate(captions_of(step)):
            holds[row, caption] = 1
        counts += holds.mean(0)
        weights = holds * torch.log((step + 1 + 1 / BATCH) / (counts + 1 / BATCH))
        targets = F.normalize(weights, p=1, dim=1)
        batch = batch_of(recipe, step)
        texts = student.encode_text(batch.tokens)
        value, contrastive = 0, 0
        for view in batch.student_views.unbind(1):
            features = student.image((view.double() / 255 - mean) / std)
            logits = features @ student.words_head.weight.T + student.words_head.bias
            value = value - (targets * logits.log_softmax(1)[:, :NUM_WORDS]).sum(1).mean() / 2
            images = student.image_projection(features)
            scale = student.logit_scale.log_logit_scale.exp()
            contrastive = contrastive + plain_contrastive(images, texts, scale) / 2
        loss = contrastive + 0.5 * value
        gradients = torch.autograd.grad(loss, [named[name] for name in FOLLOWED])
        steps.append({"value": value.detach(), **dict(zip(FOLLOWED, gradients, strict=True))})
    return steps, counts


@pytest.mark.parametrize("ranks", [1, 2])
def test_value_gradients_and_counts_equal_the_plain_formula(ranks, run_distributed, tmp_path):
    expected, counts = plain_steps()
    for results in run_distributed(run_steps, ranks, tmp_path, SPLITS[ranks]):
        assert len(results) == len(SPLITS[ranks])
        for steps, state in results:
            for actual, plain in zip(steps, expected, strict=True):
                for name, value in plain.items():
                    error = (actual[name].double() - value).abs().max()
                    assert error <= 1e-5 * value.abs().max(), name
                    assert value.abs().max() > 1e-3
            assert state["num_steps"].item() == NUM_STEPS
            torch.testing.assert_close(state["shares"][:NUM_WORDS], counts, rtol=1e-12, atol=0)
            assert not state["shares"][NUM_WORDS:].any()


def test_a_checkpoint_holds_the_counts_and_without_them_none_is_loaded(run_distributed, tmp_path):
    root = tmp_path / "checkpoints"

    def save():
        recipe, stepper = make_stepper(tmp_path, "2", 2)
        for step in range(2):
            stepper.step(batch_of(recipe, step).split(BATCH // 2)[rank()], 0.0, None)
        saver = Saver(root, stepper.engine, None, TrainConfig())
        saver.save({"samples": 16}, (16, []), required=True)
        saver.close()
        return words_of(stepper).state_dict()

    def load():
        folder = root / "samples-000000000016"
        _, stepper = make_stepper(tmp_path, "1", 4)
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
