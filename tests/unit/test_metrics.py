"""What a run writes: metrics.jsonl without duplicates, TensorBoard, progress lines, throughput."""

import json

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aclip import distributed
from aclip.cli import show_duration
from aclip.training.metrics_logger import MetricsLogger
from aclip.training.step_timer import StepTimer


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def read_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_scalars(folder, tag):
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def log_steps(logger, steps):
    for step in steps:
        logger.log(step, step * 100, {"loss": 10.0 - step})


def test_a_log_step_is_one_json_line_of_plain_numbers(tmp_path):
    logger = MetricsLogger(tmp_path, 1000)
    terms = {"loss": torch.tensor(1.5), "simclr": np.float32(0.25)}
    logger.log(2, 200, terms, memory_gib=3.5, gradient_norm=None, skipped={"no_image": 4})
    logger.close()
    assert read_lines(tmp_path) == [
        {
            "samples": 200,
            "step": 2,
            "terms": {"loss": 1.5, "simclr": 0.25},
            "memory_gib": 3.5,
            "gradient_norm": None,
            "skipped": {"no_image": 4},
        }
    ]


def test_tensorboard_gets_every_number_at_its_samples(tmp_path):
    logger = MetricsLogger(tmp_path, 1000)
    logger.log(2, 200, {"loss": 1.5}, learning_rate=0.5, skipped={"no_image": 4}, momentum=None)
    logger.log_evaluation(200, "teacher", {"zero_shot_top1": 0.25})
    logger.log_image("kept_patches", np.zeros((4, 6, 3), dtype=np.uint8), 200)
    logger.close()
    assert read_scalars(tmp_path, "terms/loss") == [(200, 1.5)]
    assert read_scalars(tmp_path, "train/learning_rate") == [(200, 0.5)]
    assert read_scalars(tmp_path, "train/skipped/no_image") == [(200, 4.0)]
    assert read_scalars(tmp_path, "teacher/zero_shot_top1") == [(200, 0.25)]
    images = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("kept_patches")
    assert [(image.step, image.height, image.width) for image in images] == [(200, 4, 6)]


def test_not_finite_numbers_stay_valid_json(tmp_path, capsys):
    MetricsLogger(tmp_path, 1000).log(1, 100, {"loss": float("nan")}, gradient_norm=float("inf"))
    (line,) = read_lines(tmp_path)
    assert line["terms"] == {"loss": None}
    assert line["gradient_norm"] is None
    assert "loss not finite" in capsys.readouterr().out


def test_a_resumed_run_leaves_no_line_or_point_twice(tmp_path):
    first = MetricsLogger(tmp_path, 1000)
    first.log_evaluation(0, "student", {"zero_shot_top1": 0.1})
    log_steps(first, [1, 2, 3])
    first.log_evaluation(300, "student", {"zero_shot_top1": 0.3})
    first.log_evaluation(400, "student", {"zero_shot_top1": 0.4})
    log_steps(first, [4, 5])
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"samples": 300, "ste')  # killed while it wrote

    second = MetricsLogger(tmp_path, 1000, resumed_samples=300)
    assert [line["samples"] for line in read_lines(tmp_path)] == [0, 100, 200, 300, 300]
    log_steps(second, [4, 5, 6])
    second.close()
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3, 4, 5, 6]
    assert [s for s, _ in read_scalars(tmp_path, "terms/loss")] == [100, 200, 300, 400, 500, 600]
    assert [s for s, _ in read_scalars(tmp_path, "student/zero_shot_top1")] == [0, 300]
    assert [path.name for path in tmp_path.glob("*.tmp")] == []


def test_a_run_that_starts_new_drops_what_an_earlier_one_wrote(tmp_path):
    first = MetricsLogger(tmp_path, 1000)
    first.log_evaluation(0, "student", {"zero_shot_top1": 0.1})
    log_steps(first, [1, 2])
    first.close()
    second = MetricsLogger(tmp_path, 1000)
    log_steps(second, [1])
    second.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [1]
    assert read_scalars(tmp_path, "terms/loss") == [(100, 9.0)]


def test_an_evaluation_made_again_replaces_the_first(tmp_path):
    logger = MetricsLogger(tmp_path, 1000)
    for name, value in (("student", 0.1), ("teacher", 0.2), ("student", 0.3)):
        logger.log_evaluation(500, name, {"zero_shot_top1": value})
    assert read_lines(tmp_path) == [
        {"samples": 500, "evaluation": "teacher", "metrics": {"zero_shot_top1": 0.2}},
        {"samples": 500, "evaluation": "student", "metrics": {"zero_shot_top1": 0.3}},
    ]


def test_other_ranks_write_and_print_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    logger = MetricsLogger(tmp_path, 1000)
    log_steps(logger, [1])
    logger.log_evaluation(100, "student", {"zero_shot_top1": 0.1})
    logger.log_image("kept_patches", np.zeros((4, 6, 3), dtype=np.uint8), 100)
    logger.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_the_progress_line_tells_place_terms_speed_and_remaining_time(tmp_path, capsys):
    clock = Clock()
    logger = MetricsLogger(tmp_path, 100_000, clock=clock)
    values = {"learning_rate": 5e-4, "data_wait_percent": 12.4, "memory_gib": 3.21}
    logger.log(10, 1000, {"loss": 5.0}, images_per_second=9.0, **values)
    clock.now = 10.0
    logger.log(20, 2000, {"loss": 4.56789, "byol": 1.0}, images_per_second=1234.5, **values)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("ETA 3 h 03 min")  # 99,000 samples at 9 a second, 11,000 s
    assert second == (
        "step 20/1,000  2,000 samples (2.0 %)  loss 4.568  byol 1  1,234 img/s  data wait 12 %  "
        "lr 5.00e-04  3.2 GiB  ETA 16 min 20 s"  # 98,000 samples at 1,000 in 10 s
    )


def test_skipped_samples_appear_on_the_progress_line_once_there_are_some(tmp_path, capsys):
    logger = MetricsLogger(tmp_path, 1000)
    logger.log(1, 100, {"loss": 1.0}, skipped={})
    logger.log(2, 200, {"loss": 1.0}, skipped={"no_image": 1, "empty_caption": 2})
    first, second = capsys.readouterr().out.splitlines()
    assert "skipped" not in first
    assert "skipped 3" in second


def test_the_evaluation_line_shows_shares_as_percent_and_counts_as_they_are(tmp_path, capsys):
    metrics = {"num_images": 1675.0, "image_to_text_r1": 0.12345}
    MetricsLogger(tmp_path, 1000).log_evaluation(100, "student", metrics)
    assert capsys.readouterr().out == (
        "evaluation of student at 100 samples  num_images 1,675  image_to_text_r1 12.35 %\n"
    )


def test_the_remaining_time_follows_the_last_lines_only(tmp_path, capsys):
    clock = Clock()
    logger = MetricsLogger(tmp_path, 10_000, clock=clock)
    for step in range(1, 61):
        clock.now += 100.0 if step <= 30 else 1.0  # it became faster
        logger.log(step, step * 100, {"loss": 1.0})
    assert capsys.readouterr().out.splitlines()[-1].endswith("ETA 40 s")  # 4,000 at 100 a second


def test_throughput_and_data_wait_are_of_the_window(tmp_path):
    clock = Clock()
    timer = StepTimer(window=2, clock=clock)
    assert timer.summary() == {"images_per_second": None, "data_wait_percent": None}
    for wait, work, images in ((9.0, 9.0, 1), (1.0, 3.0, 40), (2.0, 2.0, 40)):
        with timer.waiting():
            clock.now += wait
        clock.now += work
        timer.step(images)
    # The first step has left the window: 80 images in 8 s, 3 s of it waiting.
    assert timer.summary() == {"images_per_second": 10.0, "data_wait_percent": 37.5}


def test_time_before_a_reset_counts_for_no_step():
    clock = Clock()
    timer = StepTimer(clock=clock)
    clock.now += 1.0
    timer.step(10)
    clock.now += 1000.0
    timer.reset()
    clock.now += 1.0
    timer.step(10)
    assert timer.summary()["images_per_second"] == 10.0


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.4, "0 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
        (273600, "3 d 04 h"),
    ],
)
def test_durations_are_shown_in_two_units(seconds, text):
    assert show_duration(seconds) == text
