"""What the teacher does in each step, on numbers that can be followed by hand."""

import pytest
from recipe_refusal import refusal
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.method.teaching import Teaching

MASK_ALONE = ["loss.byol=0", "loss.simclr=0", "train.global_batch_size=16", "train.epochs=10"]


def work(teaching, steps):
    """A letter a step: `t` where the teacher scores every sample, `r` where kept scores are read,
    `-` where it does not run."""

    def letter(step):
        if teaching.reads_scores(step):
            assert not teaching.scores_all(step)
            return "r"
        return "t" if teaching.scores_all(step) else "-"

    return "".join(map(letter, steps))


def test_the_teacher_scores_one_epoch_of_so_many():
    teaching = Teaching(num_samples=32, batch_size=16, num_steps=14, reuse=3)
    assert work(teaching, range(1, 15)) == "tt" "rrrr" "tt" "rrrr" "tt"  # fmt: skip
    assert [teaching.generation(epoch) for epoch in range(7)] == [0, 0, 0, 3, 3, 3, 6]
    assert teaching.average_share == 6 / 14


def test_without_reuse_and_warm_up_it_scores_every_step():
    teaching = Teaching(num_samples=32, batch_size=16, num_steps=14)
    assert work(teaching, range(1, 15)) == "t" * 14 and teaching.average_share == 1
    assert teaching.generation(3) is None


def test_scores_are_kept_from_the_first_epoch_behind_the_warm_up():
    numbers = {"num_samples": 64, "batch_size": 16, "num_steps": 20, "warmup": 0.3}
    # Six steps of warm-up end in the second epoch, so the third one is kept.
    blind = Teaching(**numbers, reuse=2, is_blind=True)
    assert blind.warmup_steps == 6 and blind.first_epoch == 2
    assert work(blind, range(1, 21)) == "----" "--tt" "tttt" "rrrr" "tttt"  # fmt: skip
    assert blind.average_share == 10 / 20
    # A warm-up that mixes scores in, or a loss that reads the teacher, lets it run from the start.
    seeing = Teaching(**numbers, reuse=2)
    assert work(seeing, range(1, 21)) == "tttt" "tttt" "tttt" "rrrr" "tttt"  # fmt: skip
    # An epoch that begins in the step in which the warm-up has ended is kept.
    assert Teaching(**{**numbers, "warmup": 0.2}, reuse=2).first_epoch == 1
    assert work(Teaching(**numbers, is_blind=True), range(1, 21)) == "-" * 6 + "t" * 14


def test_an_epoch_begins_where_the_order_of_samples_begins_it():
    """20 samples in batches of 16: the epochs are 1, 1, 1 and 2 batches, again and again."""
    teaching = Teaching(num_samples=20, batch_size=16, num_steps=10, reuse=2)
    assert [teaching.epoch(step) for step in range(1, 11)] == [0, 1, 2, 3, 3, 4, 5, 6, 7, 7]
    assert [teaching.first_step(epoch) for epoch in range(8)] == [1, 2, 3, 4, 6, 7, 8, 9]
    # What the epochs leave over: 4, 8, 12 and no sample; each may come twice in the next epoch.
    assert [teaching.left_over(epoch) for epoch in (1, 3)] == [8, 24]
    longer = Teaching(num_samples=20, batch_size=16, num_steps=10, reuse=4)
    assert [longer.left_over(epoch) for epoch in (1, 2, 3)] == [8, 8, 8]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], (1, 0.0, True)),
        (["mask.warmup=0.25"], (1, 0.25, True)),
        (["mask.warmup=0.25", "mask.warmup_change=gradual"], (1, 0.25, False)),
        (["mask.warmup=0.25", "loss.byol=2"], (1, 0.25, False)),
        (["teacher.reuse=4"], (4, 0.0, True)),
    ],
)
def test_a_recipe_says_when_the_teacher_runs(overrides, expected):
    teaching = load_recipe(SMALL_RECIPE, [*MASK_ALONE, *overrides]).teaching(num_samples=80)
    assert (teaching.reuse, teaching.warmup, teaching.is_blind) == expected
    assert (teaching.num_samples, teaching.batch_size, teaching.num_steps) == (80, 16, 50)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "mask.policy=random",
            "teacher.reuse is 4, but mask.policy random reads no scores of the teacher that could "
            "be kept; set teacher.reuse to 1, or mask.policy to attentive or inverse",
        ),
        (
            "loss.distill=0.5",
            "teacher.reuse is 4, but loss.distill 0.5 needs the teacher in every step; set "
            "teacher.reuse to 1, or loss.distill to 0",
        ),
        (
            "data.sources=[{shards: a.tar, weight: 1}, {shards: b.tar, weight: 2}]",
            "teacher.reuse is 4, but data.sources holds 2 sources, whose samples do not come once "
            "an epoch each; set teacher.reuse to 1, or give one data set as data.train",
        ),
    ],
)
def test_reuse_that_can_not_be_is_refused_by_name(override, expected):
    needed = ["loss.byol=1"] if override == "mask.policy=random" else []
    assert refusal(*MASK_ALONE, "teacher.reuse=4", "data.train=[]", override, *needed).endswith(
        expected
    )
    assert "teacher.reuse" in refusal("teacher.reuse=0")
