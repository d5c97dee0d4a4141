"""What a run writes: metrics.jsonl without duplicates, TensorBoard, progress lines, throughput."""

import json
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aclip import distributed
from aclip.reports.report import LOGGED
from aclip.run_folder.metrics_file import EvaluationLine, StepLine, read_metrics
from aclip.training.metrics.metrics_logger import MetricsLogger
from aclip.training.metrics.step_timer import StepTimer


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
        logger.log(StepLine(step * 100, step, {"loss": 10.0 - step}))


def evaluation(samples, name, **metrics):
    return EvaluationLine(samples, name, metrics)


def test_a_log_step_is_one_json_line_of_plain_numbers(tmp_path):
    logger = MetricsLogger(tmp_path, 1000, 50)
    terms = {"loss": torch.tensor(1.5), "simclr": np.float32(0.25)}
    logger.log(StepLine(200, 2, terms, memory_gib=3.5, skipped={"no_image": 4}, repeated=3))
    logger.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"samples": 200, "step": 2, "terms": {"loss": 1.5, "simclr": 0.25}, "memory_gib": 3.5, '
        '"learning_rate": null, "momentum": null, "logit_scale": null, "gradient_norm": null, '
        '"skipped": {"no_image": 4}, "repeated": 3, "images_per_second": null, '
        '"data_wait_percent": null}\n'
    )


def test_what_was_logged_is_read_back(tmp_path):
    step = StepLine(200, 2, {"loss": 1.5}, learning_rate=0.5, skipped={"no_image": 4})
    logger = MetricsLogger(tmp_path, 1000, 50)
    logger.log(step)
    logger.log_evaluation(evaluation(200, "mask", object_patches_kept=0.5))
    for path in (tmp_path, tmp_path / "metrics.jsonl"):
        metrics = read_metrics(path)
        assert metrics.steps == [step]
        assert metrics.evaluations == [EvaluationLine(200, "mask", {"object_patches_kept": 0.5})]


def test_lines_of_other_versions_are_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"samples": 100, "step": 1, "terms": {"loss": 1.0}}\n'
        '{"samples": 200, "step": 2, "terms": {}, "momentum": 0.5, "of_tomorrow": 3}\n'
        '{"samples": 200, "something": "else"}\n'
        '{"samples": 300, "step": 3, "ter'
    )
    metrics = read_metrics(tmp_path)
    assert metrics.steps == [StepLine(100, 1, {"loss": 1.0}), StepLine(200, 2, {}, momentum=0.5)]
    assert metrics.evaluations == []


def test_a_report_shows_numbers_that_a_log_step_has():
    assert LOGGED.keys() <= {each.name for each in fields(StepLine)}


def test_tensorboard_gets_every_number_at_its_samples(tmp_path):
    logger = MetricsLogger(tmp_path, 1000, 50)
    logger.log(StepLine(200, 2, {"loss": 1.5}, learning_rate=0.5, skipped={"no_image": 4}))
    logger.log_evaluation(evaluation(200, "teacher", zero_shot_top1=0.25))
    logger.log_kept_patches(np.zeros((4, 6, 3), dtype=np.uint8), 200)
    logger.close()
    assert read_scalars(tmp_path, "terms/loss") == [(200, 1.5)]
    assert read_scalars(tmp_path, "train/learning_rate") == [(200, 0.5)]
    assert read_scalars(tmp_path, "train/skipped/no_image") == [(200, 4.0)]
    assert read_scalars(tmp_path, "teacher/zero_shot_top1") == [(200, 0.25)]
    images = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("kept_patches")
    assert [(image.step, image.height, image.width) for image in images] == [(200, 4, 6)]


def test_the_picture_of_kept_patches_is_written_if_it_can_be(tmp_path, capsys):
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    logger = MetricsLogger(tmp_path, 1000, 50)
    logger.log_kept_patches(picture, 200)
    path = tmp_path / "pictures" / "kept-patches-000000000200.png"
    with Image.open(path) as written:
        np.testing.assert_array_equal(np.asarray(written), picture)
    path.with_name("kept-patches-000000000300.png").mkdir()
    logger.log_kept_patches(picture, 300)
    logger.close()
    said = "kept-patches-000000000300.png can't be written (Is a directory)"
    assert capsys.readouterr().out.count(said) == 1
    images = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("kept_patches")
    assert [image.step for image in images] == [200, 300]


def test_tensorboard_ends_at_its_first_error_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    calls = []

    def full(*_):
        calls.append("add_scalar")
        raise OSError("No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    logger = MetricsLogger(tmp_path, 1000, 50)
    log_steps(logger, [1, 2])
    logger.log_kept_patches(np.zeros((4, 6, 3), dtype=np.uint8), 200)
    logger.close()
    assert calls == ["add_scalar"]
    said = "TensorBoard's file ends here (No space left on device); the run goes on"
    assert capsys.readouterr().out.count(said) == 1
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2]


def test_not_finite_numbers_stay_valid_json(tmp_path, capsys):
    line = StepLine(100, 1, {"loss": float("nan")}, gradient_norm=float("inf"))
    MetricsLogger(tmp_path, 1000, 50).log(line)
    (line,) = read_lines(tmp_path)
    assert line["terms"] == {"loss": None}
    assert line["gradient_norm"] is None
    assert "loss not finite" in capsys.readouterr().out


def test_a_resumed_run_leaves_no_line_or_point_twice(tmp_path):
    first = MetricsLogger(tmp_path, 1000, 50)
    first.log_evaluation(evaluation(0, "student", zero_shot_top1=0.1))
    log_steps(first, [1, 2, 3])
    first.log_evaluation(evaluation(300, "student", zero_shot_top1=0.3))
    first.log_evaluation(evaluation(400, "student", zero_shot_top1=0.4))
    log_steps(first, [4, 5])
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"samples": 300, "ste')  # killed while it wrote

    second = MetricsLogger(tmp_path, 1000, 50, resumed_samples=300)
    assert [line["samples"] for line in read_lines(tmp_path)] == [0, 100, 200, 300, 300]
    log_steps(second, [4, 5, 6])
    second.close()
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3, 4, 5, 6]
    assert [s for s, _ in read_scalars(tmp_path, "terms/loss")] == [100, 200, 300, 400, 500, 600]
    assert [s for s, _ in read_scalars(tmp_path, "student/zero_shot_top1")] == [0, 300]
    assert [path.name for path in tmp_path.glob("*.tmp")] == []


def test_a_run_that_starts_new_drops_what_an_earlier_one_wrote(tmp_path):
    first = MetricsLogger(tmp_path, 1000, 50)
    first.log_evaluation(evaluation(0, "student", zero_shot_top1=0.1))
    log_steps(first, [1, 2])
    first.close()
    second = MetricsLogger(tmp_path, 1000, 50)
    log_steps(second, [1])
    second.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [1]
    assert read_scalars(tmp_path, "terms/loss") == [(100, 9.0)]


def test_an_evaluation_made_again_replaces_the_first(tmp_path):
    logger = MetricsLogger(tmp_path, 1000, 50)
    for name, value in (("student", 0.1), ("teacher", 0.2), ("student", 0.3)):
        logger.log_evaluation(evaluation(500, name, zero_shot_top1=value))
    assert read_lines(tmp_path) == [
        {"samples": 500, "evaluation": "teacher", "metrics": {"zero_shot_top1": 0.2}},
        {"samples": 500, "evaluation": "student", "metrics": {"zero_shot_top1": 0.3}},
    ]


def test_other_ranks_write_and_print_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    logger = MetricsLogger(tmp_path, 1000, 50)
    log_steps(logger, [1])
    logger.log_evaluation(evaluation(100, "student", zero_shot_top1=0.1))
    logger.log_kept_patches(np.zeros((4, 6, 3), dtype=np.uint8), 100)
    logger.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_the_progress_line_tells_place_terms_speed_and_remaining_time(tmp_path, capsys):
    clock = Clock()
    logger = MetricsLogger(tmp_path, 100_000, 1000, clock=clock)
    values = {"learning_rate": 5e-4, "data_wait_percent": 12.4, "memory_gib": 3.21}
    logger.log(StepLine(1000, 10, {"loss": 5.0}, images_per_second=9.0, **values))
    clock.now = 10.0
    terms = {"loss": 4.56789, "byol": 1.0}
    logger.log(StepLine(2000, 20, terms, images_per_second=1234.5, **values))
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("ETA 3 h 03 min")  # 99,000 samples at 9 a second, 11,000 s
    assert second == (
        "step 20/1,000  2,000 samples (2.0 %)  loss 4.568  byol 1  1,234 img/s  data wait 12 %  "
        "lr 5.00e-04  3.2 GiB  ETA 16 min 20 s"  # 98,000 samples at 1,000 in 10 s
    )


def test_skipped_samples_appear_on_the_progress_line_once_there_are_some(tmp_path, capsys):
    logger = MetricsLogger(tmp_path, 1000, 50)
    logger.log(StepLine(100, 1, {"loss": 1.0}, skipped={}))
    logger.log(
        StepLine(200, 2, {"loss": 1.0}, skipped={"no_image": 1, "empty_caption": 2}, repeated=2)
    )
    first, second = capsys.readouterr().out.splitlines()
    assert "skipped" not in first and "repeated" not in first
    assert "skipped 3 (no_image 1, empty_caption 2)  repeated 2" in second


@pytest.mark.parametrize("skipped, shown", [(0, ""), (12.0, "  12 images can't be used")])
def test_the_evaluation_line_is_short_and_says_what_could_not_be_used(
    tmp_path, capsys, skipped, shown
):
    shares = {"image_to_text_r1": 0.12345, "image_to_text_r5": 0.5, "zero_shot_mean_per_class": 0.1}
    line = evaluation(100, "student", num_images=1675.0, num_skipped=skipped, **shares)
    MetricsLogger(tmp_path, 1000, 50).log_evaluation(line)
    assert capsys.readouterr().out == (
        f"evaluation of student at 100 samples  image_to_text_r1 12.35 %{shown}\n"
    )


def test_the_remaining_time_follows_the_last_lines_only(tmp_path, capsys):
    clock = Clock()
    logger = MetricsLogger(tmp_path, 10_000, 100, clock=clock)
    for step in range(1, 61):
        clock.now += 100.0 if step <= 30 else 1.0  # it became faster
        logger.log(StepLine(step * 100, step, {"loss": 1.0}))
    assert capsys.readouterr().out.splitlines()[-1].endswith("ETA 40 s")  # 4,000 at 100 a second


def test_throughput_and_data_wait_are_of_the_window(tmp_path):
    clock = Clock()
    timer = StepTimer(window=2, clock=clock)
    assert timer.images_per_second is None and timer.data_wait_percent is None
    for wait, work, images in ((9.0, 9.0, 1), (1.0, 3.0, 40), (2.0, 2.0, 40)):
        with timer.waiting():
            clock.now += wait
        clock.now += work
        timer.step(images)
    # The first step has left the window: 80 images in 8 s, 3 s of it waiting.
    assert timer.images_per_second == 10.0 and timer.data_wait_percent == 37.5


def test_time_before_a_reset_counts_for_no_step():
    clock = Clock()
    timer = StepTimer(clock=clock)
    clock.now += 1.0
    timer.step(10)
    clock.now += 1000.0
    timer.reset()
    clock.now += 1.0
    timer.step(10)
    assert timer.images_per_second == 10.0


def test_tensorboard_that_cannot_begin_is_said_once_and_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("in the way")
    logger = MetricsLogger(tmp_path, 1000, 50)
    log_steps(logger, [1, 2])
    logger.close()
    assert capsys.readouterr().out.count("TensorBoard's file ends here") == 1
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2]


def test_line_that_cannot_be_replaced_stays_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    logger = MetricsLogger(tmp_path, 1000, 50)
    logger.log_evaluation(EvaluationLine(100, "student", {"num_x": 1}))
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    logger.log_evaluation(EvaluationLine(100, "student", {"num_x": 2}))
    monkeypatch.undo()
    logger.close()
    assert "metrics.jsonl can't be written (No space)" in capsys.readouterr().out
    assert [line["metrics"]["num_x"] for line in read_lines(tmp_path)] == [1, 2]


def test_a_warning_is_printed_and_logged_with_its_evaluation(tmp_path, capsys):
    blind = EvaluationLine(200, "mask", {"attention_kept": 0.5, "loss_kept": 2.5}, "it is blind")
    logger = MetricsLogger(tmp_path, 1000, 50)
    logger.log_evaluation(blind)
    logger.log_evaluation(evaluation(400, "mask", attention_kept=0.75))
    first, warning, last = capsys.readouterr().out.splitlines()
    assert first.endswith("evaluation of mask at 200 samples  attention_kept 50.00 %")
    assert warning.endswith("warning: it is blind")
    assert last.endswith("evaluation of mask at 400 samples  attention_kept 75.00 %")
    assert read_metrics(tmp_path).evaluations[0] == blind
    assert "warning" not in (tmp_path / "metrics.jsonl").read_text().splitlines()[1]
