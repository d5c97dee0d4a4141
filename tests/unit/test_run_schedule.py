"""What a run does at each of its steps."""

import pytest
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.training.run_schedule import RunSchedule

VALUES = ["train.global_batch_size=10", "train.epochs=2", "train.warmup_epochs=0.5"]
VALUES += ["optimizer.warmup_start_lr=0", "optimizer.lr=1", "optimizer.final_lr=0"]
DATASET_SIZE = 80


def test_a_step_is_taken_with_the_values_where_it_begins():
    schedule = RunSchedule(
        load_recipe(SMALL_RECIPE, [*VALUES, "teacher.momentum=0.5"]), DATASET_SIZE
    )
    assert (schedule.num_steps, schedule.total_samples) == (16, 160)
    # Forty samples of warm-up, in four steps.
    assert [schedule.learning_rate(step) for step in range(1, 6)] == [0, 0.25, 0.5, 0.75, 1]
    assert schedule.learning_rate(11) == pytest.approx(0.5)  # half of the cosine's 120 samples
    assert schedule.momentum(1) == 0.5
    assert schedule.momentum(9) == pytest.approx(0.75)  # half of the run's 160


def test_the_recipe_says_how_the_learning_rate_falls():
    overrides = ["optimizer.schedule=constant", "optimizer.cooldown=0.5"]
    schedule = RunSchedule(load_recipe(SMALL_RECIPE, [*VALUES, *overrides]), DATASET_SIZE)
    # Of 160 samples forty are warm-up, and the last eighty the cool-down.
    rates = [schedule.learning_rate(step) for step in (5, 8, 9, 13, 17)]
    assert rates == [1, 1, 1, 0.5, 0]
    overrides = ["optimizer.cooldown_shape=1-sqrt", *overrides]
    schedule = RunSchedule(load_recipe(SMALL_RECIPE, [*VALUES, *overrides]), DATASET_SIZE)
    assert schedule.learning_rate(11) == pytest.approx(0.5)  # a quarter of the cool-down


def test_an_average_without_a_teacher_has_its_momentum():
    overrides = [*VALUES, "mask.policy=random", "teacher=null", "loss.byol=0", "train.average=0.5"]
    schedule = RunSchedule(load_recipe(SMALL_RECIPE, overrides), DATASET_SIZE)
    assert (schedule.momentum(1), schedule.momentum(9)) == (0.5, pytest.approx(0.75))


def test_without_a_teacher_there_is_no_momentum():
    overrides = [*VALUES, "mask.policy=random", "teacher=null", "loss.byol=0"]
    assert RunSchedule(load_recipe(SMALL_RECIPE, overrides), DATASET_SIZE).momentum(1) is None


def test_what_comes_every_so_many_samples_is_due_after_the_step_that_holds_them():
    schedule = RunSchedule(load_recipe(SMALL_RECIPE, VALUES), DATASET_SIZE)

    def due(every):
        return [step for step in range(1, 9) if schedule.is_due(every, step)]

    assert due(25) == [3, 5, 8]
    assert due(10) == due(1) == list(range(1, 9))
    assert due(0) == []


def test_evaluations_are_placed_by_samples_of_the_whole_run():
    recipe = load_recipe(
        SMALL_RECIPE, [*VALUES, "train.evaluate_every=0", "train.evaluate_at=[25, 120]"]
    )
    schedule = RunSchedule(recipe, DATASET_SIZE)

    def due(begun):
        return [step for step in range(1, 17) if schedule.is_evaluated(step, begun)]

    assert due(0) == [3, 12]
    assert due(100) == [2]  # of a stage that begins at 100; those at 25 lie before it


@pytest.mark.parametrize(
    "log_every, epochs, logged",
    [
        (5, 12.5, [1, 5, 10, 15]),  # 100 steps
        (60, 5, [1, 4, 8, 12, 16]),  # a tenth of 40 steps
        (60, 1, list(range(1, 9))),  # 8 steps
    ],
)
def test_a_short_run_shows_more_than_one_progress_line(log_every, epochs, logged):
    overrides = [*VALUES, f"train.epochs={epochs}", f"train.log_every={log_every}"]
    schedule = RunSchedule(load_recipe(SMALL_RECIPE, overrides), DATASET_SIZE)
    last = min(16, schedule.num_steps)
    assert [step for step in range(1, last + 1) if schedule.is_logged(step)] == logged
