"""Caption-word classification against the rule of SuperClass, written out caption by caption."""

import argparse
import math

import pytest
import torch
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.data.synthetic import batch_of_mean_captions, synthetic_batch
from aclip.errors import ConfigError
from aclip.evaluation.load_model import load_model
from aclip.method.losses import words
from aclip.method.losses.words import WordsHead
from aclip.method.tokens import END_ID, START_ID, VOCAB_SIZE, Tokens
from aclip.models.student import build_student
from aclip.planning.measure_step import measure_step
from aclip.training.step_inputs import StepInputs
from aclip.weights.export import export

CPU = torch.device("cpu")
WORDS = ["mask.policy=none", "teacher=null", "loss.words=1"]
# Repeated tokens, an empty caption, the lowest and the highest id, a caption that fills its row.
STEPS = [
    [[5, 5, 7], [], [0, 7], [49405, 5, 5, 5, 9, 7]],
    [[7], [7, 7], [7, 0], [7, 1]],
    [[11, 12], [12], [], [11, 12, 13, 14, 15, 16]],
]


def tokens_of(captions, columns=8):
    """Captions as ids, with padding behind their end."""
    ids = torch.zeros(len(captions), columns, dtype=torch.int64)
    for row, caption in enumerate(captions):
        ids[row, : len(caption) + 2] = torch.tensor([START_ID, *caption, END_ID])
    return Tokens(ids, torch.tensor([len(caption) + 2 for caption in captions]))


class Rule:
    """log((n + 1/N) / (c_w + 1/N)) of each distinct token, normalised; c_w and n with this step."""

    def __init__(self):
        self.shares, self.num_steps = {}, 0

    def targets(self, captions):
        """{token: its share of the target} for each caption."""
        size = len(captions)
        self.num_steps += 1
        for caption in captions:
            for token in set(caption):
                self.shares[token] = self.shares.get(token, 0) + 1 / size
        targets = []
        for caption in captions:
            weights = {
                token: math.log((self.num_steps + 1 / size) / (self.shares[token] + 1 / size))
                for token in set(caption)
            }
            total = sum(weights.values())
            targets.append({t: w / total for t, w in weights.items()} if total > 0 else {})
        return targets


def term_of(recipe):
    return next(term for term in recipe.terms if term.name == "words")


def targets_of(step_input):
    """What the term made for each caption, as the rule gives it."""
    return [
        {token: weight for token, weight in zip(*row, strict=True) if weight}
        for row in zip(step_input.ids.tolist(), step_input.weights.tolist(), strict=True)
    ]


@pytest.mark.parametrize("micro_batch", [4, 2, 1])
def test_targets_of_three_steps_are_the_rules(micro_batch):
    recipe = load_recipe(SMALL_RECIPE, WORDS)
    student, rule = build_student(recipe), Rule()
    inputs = StepInputs(recipe, student.terms, None, student.image, CPU, torch.float32)
    for captions in STEPS:
        batch = synthetic_batch(recipe, 4, tokens_of(captions))
        micros = batch.split(micro_batch)
        taught = [inputs.teach(micro) for micro in micros]
        statistics = inputs.statistics(micros, taught)
        made = []
        for micro, of_teacher in zip(micros, taught, strict=True):
            student_input = inputs.student(micro, of_teacher, statistics)
            made += targets_of(student_input.of_terms["words"])
        for ours, expected in zip(made, rule.targets(captions), strict=True):
            assert ours == pytest.approx(expected, rel=1e-5)
    state = next(term for term in student.terms if term.name == "words").state_dict()
    assert state["num_steps"].item() == 3
    shares = {token: share for token, share in enumerate(state["shares"].tolist()) if share}
    assert shares == pytest.approx(rule.shares, rel=1e-12)


def test_targets_of_the_first_step_by_hand():
    term = term_of(load_recipe(SMALL_RECIPE, WORDS))
    weights = term.statistic([], [tokens_of([[3, 4], [3, 5], [3], [3, 4]])], lambda x: x)
    # n = 1 and N = 4: held by all, by two, by one and by none.
    assert weights[[3, 4, 5, 6]].tolist() == pytest.approx(
        [0, math.log(1.25 / 0.75), math.log(1.25 / 0.5), math.log(1.25 / 0.25)]
    )
    assert weights[[START_ID, END_ID]].tolist() == pytest.approx([math.log(5)] * 2)


def slow_loss(features, weight, bias, targets):
    """One view and one token at a time; the mean over the captions counts the empty ones."""
    total = 0
    for views, target in zip(features, targets, strict=True):
        for view in views:
            logits = weight @ view + bias
            logits = logits - logits.exp().sum().log()
            total = total - sum(share * logits[token] for token, share in target.items())
    return total / features.shape[0] / features.shape[1]


@pytest.mark.parametrize("num_views, chunk", [(1, 512), (2, 512), (2, 3)])
def test_loss_and_gradients_equal_float64_loops(num_views, chunk, monkeypatch):
    monkeypatch.setattr(words, "CHUNK_ROWS", chunk)
    torch.manual_seed(0)
    targets = [{5: 0.25, 7: 0.75}, {}, {0: 1.0}, {1: 0.5, 19: 0.5}, {2: 0.1, 3: 0.2, 4: 0.7}]
    ids = torch.zeros(5, 4, dtype=torch.int64)
    shares = torch.zeros(5, 4)
    for row, target in enumerate(targets):
        ids[row, : len(target)] = torch.tensor([*target], dtype=torch.int64)
        shares[row, : len(target)] = torch.tensor([*target.values()])
    features = torch.randn(5, num_views, 6)
    head = WordsHead(6, 20)
    torch.nn.init.normal_(head.bias)
    exact = [t.detach().double().requires_grad_() for t in (features, head.weight, head.bias)]
    expected = slow_loss(*exact, targets)
    features.requires_grad_()
    each = head(features, ids, shares)
    assert each.dtype == torch.float32 and each.shape == (5,) and each[1] == 0
    torch.testing.assert_close(each.mean().double(), expected, rtol=1e-6, atol=0)
    ours = torch.autograd.grad(each.mean(), (features, head.weight, head.bias))
    for actual, theirs in zip(ours, torch.autograd.grad(expected, exact), strict=True):
        assert (actual.double() - theirs).abs().max() <= 1e-5 * theirs.abs().max() > 0
    assert (ours[0][1] == 0).all()


@pytest.mark.parametrize("captions", [[[], []], [[3], [3, 3]]], ids=["empty", "held by all"])
def test_a_batch_without_targets_has_a_loss_of_zero(captions):
    recipe = load_recipe(SMALL_RECIPE, WORDS)
    student = build_student(recipe)
    inputs = StepInputs(recipe, student.terms, None, student.image, CPU, torch.float32)
    batch = synthetic_batch(recipe, 2, tokens_of(captions))
    taught = inputs.teach(batch)
    student_input = inputs.student(batch, taught, inputs.statistics([batch], [taught]))
    each = student.encode(student_input)["words"]
    each.sum().backward()
    assert each.tolist() == [0, 0]
    assert (student.words_head.weight.grad == 0).all()


def test_counts_go_on_from_a_saved_state():
    recipe = load_recipe(SMALL_RECIPE, WORDS)
    whole, first, second = term_of(recipe), term_of(recipe), term_of(recipe)
    captions = [tokens_of(step) for step in STEPS]
    for tokens in captions[:2]:
        whole.statistic([], [tokens], lambda x: x)
        first.statistic([], [tokens], lambda x: x)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    expected = whole.statistic([], [captions[2]], lambda x: x)
    assert torch.equal(second.statistic([], [captions[2]], lambda x: x), expected)
    assert not torch.equal(term_of(recipe).statistic([], [captions[2]], lambda x: x), expected)


def test_the_head_exists_in_training_alone():
    recipe = load_recipe(SMALL_RECIPE, WORDS)
    student = build_student(recipe)
    assert student.words_head.weight.shape == (VOCAB_SIZE, student.image.width)
    assert not any("words" in name for name in student.model_parameters())
    assert not hasattr(build_student(recipe, for_training=False), "words_head")
    assert not hasattr(build_student(load_recipe(SMALL_RECIPE, WORDS[:2])), "words_head")
    plain = build_student(load_recipe(SMALL_RECIPE, WORDS[:2])).state_dict()
    assert all(torch.equal(student.state_dict()[name], value) for name, value in plain.items())


def test_export_leaves_the_head_out(write_run, tmp_path):
    run, student, _ = write_run(load_recipe(SMALL_RECIPE, WORDS))
    assert hasattr(student, "words_head")
    arguments = {"checkpoint": str(run), "out": str(tmp_path / "out"), "model": "student"}
    export(argparse.Namespace(**arguments, format="safetensors"))
    model = load_model(str(tmp_path / "out")).student
    assert not any("words" in name for name in model.state_dict())
    assert torch.equal(model.image_projection.weight, student.image_projection.weight)


def test_words_alone_bring_no_images_and_captions_together():
    with pytest.raises(ConfigError, match="nothing brings images and captions together"):
        load_recipe(SMALL_RECIPE, [*WORDS, "loss.contrastive=0"])


def test_planner_counts_the_head_and_one_chunk_of_its_logits(monkeypatch):
    recipe = load_recipe(SMALL_RECIPE, WORDS)
    batch = batch_of_mean_captions(recipe, 12, 32)
    step = measure_step(recipe, batch, modes=("none",))
    product = 2 * 2 * 96 * VOCAB_SIZE  # two views of the small recipe's width
    flops = step.flops["words_head"]
    assert flops.forward == pytest.approx(product)
    assert flops.backward == pytest.approx(3 * product)  # two gradients, and the logits again
    rows = 2 * len(batch) * VOCAB_SIZE * 4
    plain = measure_step(load_recipe(SMALL_RECIPE, WORDS[:2]), batch, modes=("none",))

    def more(measured):
        return len(batch) * (measured.encoding["none"].kept - plain.encoding["none"].kept)

    assert more(step) == pytest.approx(rows, rel=0.01)
    monkeypatch.setattr(words, "CHUNK_ROWS", 16)
    in_chunks = measure_step(recipe, batch, modes=("none",))
    assert more(in_chunks) == pytest.approx(rows / 4, rel=0.01)
