"""A step's predicted time: adding up by hand, a step's FLOPs and launches, and the command."""

import argparse
from pathlib import Path

import pytest
import torch
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.data.synthetic import batch_of_mean_captions
from aclip.errors import ConfigError
from aclip.planning import predictions
from aclip.planning.engine_operations import engine_operations, fused_adamw
from aclip.planning.gpus import HOST_LINK_SHARE, MATRIX_SHARE, MEMORY_SHARE, Gpu
from aclip.planning.measure_step import measure_step
from aclip.planning.operations import Operation
from aclip.planning.predictions import Prediction, predict_open_clip, report
from aclip.planning.roofline import roofline
from aclip.planning.step_kinds import teaching_share
from aclip.planning.step_time import (
    BACKWARD_OPERATION,
    ENGINE_BACKWARD,
    ENGINE_UPDATE,
    FORWARD_OPERATION,
    PLAIN_UPDATE,
    average_time,
    recipe_step_times,
    step_time,
)
from aclip.planning.trace_step import (
    BACKWARD,
    EMA,
    LOSSES,
    PARTS,
    STUDENT,
    TEACHER,
    UPDATE,
    VIEWS,
    trace_open_clip,
    trace_step,
)
from aclip.planning.zero_memory import ZeroSettings

ROOT = Path(__file__).parents[2]
# 100 bf16 FLOPs, 10 fp32 FLOPs and 8 bytes a second, 4 bytes from the host.
TOY = Gpu("toy", 100, 10, 1, 1, memory_speed=8, host_link_bytes=4)


def test_an_operation_takes_as_long_as_its_bytes_or_its_products():
    operations = [
        Operation("mm", STUDENT, flops=300, in_bf16=True, moved=8, times=2),  # 3 s at the peak
        Operation("mm", STUDENT, flops=300, moved=8),  # 30 s
        Operation("add", BACKWARD, moved=40),  # 5 s
        Operation("to_gpu", VIEWS, from_host=40),  # 10 s
    ]
    parts = step_time(operations, TOY, num_parameters=0, stage=None).parts
    assert list(parts) == list(PARTS)
    student, backward = parts[STUDENT], parts[BACKWARD]
    assert student.device_seconds == pytest.approx((2 * 3 + 30) / MATRIX_SHARE)
    assert backward.device_seconds == pytest.approx(5 / MEMORY_SHARE)
    assert parts[VIEWS].device_seconds == pytest.approx(10 / HOST_LINK_SHARE)
    assert (student.launches, student.flops, student.moved) == (3, 900, 24)
    assert student.host_seconds == pytest.approx(3 * FORWARD_OPERATION)
    assert backward.host_seconds == pytest.approx(BACKWARD_OPERATION)


def test_the_longer_of_host_and_device_is_the_steps_time():
    few = [Operation("add", STUDENT, moved=80)]
    many = [Operation("add", STUDENT, times=10**6)]
    on_device = step_time(few, TOY, num_parameters=10, stage=2)
    assert not on_device.is_host_bound
    assert on_device.seconds == pytest.approx(10 / MEMORY_SHARE)
    on_host = step_time(many, TOY, num_parameters=10, stage=2, num_micro_steps=3)
    assert on_host.is_host_bound
    hooks = 10 * (3 * ENGINE_BACKWARD[2] + ENGINE_UPDATE[2])
    assert on_host.seconds == pytest.approx(10**6 * FORWARD_OPERATION + hooks)
    compiled = step_time(many, TOY, 10, stage=None, compiled=True)
    assert compiled.seconds == pytest.approx(10**6 * BACKWARD_OPERATION + 10 * PLAIN_UPDATE)


def test_the_average_weighs_each_kind_of_step_with_what_bounds_it():
    on_device = step_time([Operation("add", STUDENT, moved=80)], TOY, 0, stage=None)
    on_host = step_time([Operation("add", STUDENT, times=10**6)], TOY, 0, stage=None)
    average = average_time([(0.25, on_device), (0.75, on_host)])
    assert average.seconds == pytest.approx(
        0.25 * 10 / MEMORY_SHARE + 0.75 * 10**6 * FORWARD_OPERATION
    )
    assert average.parts[STUDENT].launches == 0.25 + 0.75 * 10**6
    assert (average.whole.moved, average.whole.host_seconds) == (20, pytest.approx(0.75 * 19))


def test_images_a_second_and_mfu_follow():
    time = step_time([Operation("add", STUDENT, moved=8)], TOY, 0, None)
    seconds = 1 / MEMORY_SHARE
    prediction = Prediction("own", False, 32, time, flops=50, gpu=TOY)
    assert prediction.images_per_second == pytest.approx(32 / seconds)
    assert prediction.mfu == pytest.approx(0.5 / seconds)
    in_fp32 = Prediction("own", False, 32, time, flops=5, gpu=TOY, in_bf16=False)
    assert in_fp32.mfu == pytest.approx(0.5 / seconds)


def settings(stage, **changes):
    values = {"num_ranks": 1, "dtype_bytes": 2, "accumulation_bytes": 2, "bucket_size": 25}
    return ZeroSettings(stage, **values | changes)


def totals(operations, part):
    chosen = [each for each in operations if each.part == part]
    return sum(each.times for each in chosen), sum(each.times * each.moved for each in chosen)


TRAINED = [30, 10]  # elements


def test_what_the_engine_moves_by_hand():
    # Each gradient into a bucket, two buckets, each gradient out of it: three copies in bf16.
    zero_2 = engine_operations(TRAINED, settings(2))
    assert totals(zero_2, BACKWARD) == (2 + 2 + 2, 3 * 40 * (2 + 2))
    # For each element: the norm reads 2; joined 2 + 2, cast 2 + 4, AdamW 7 x 4, weights 4 + 2. Both
    # groups: join, cast, count, AdamW, copy; and five for the norm.
    assert totals(zero_2, UPDATE) == (5 + 2 * 5, 40 * (2 + 4 + 6 + 28 + 6))
    # Without ZeRO on one rank DeepSpeed copies nothing: the norm and AdamW in fp32.
    plain = engine_operations(TRAINED, settings(0, dtype_bytes=4))
    assert totals(plain, BACKWARD) == (0, 0)
    assert totals(plain, UPDATE) == (5 + 4, 40 * (4 + 28))
    assert totals(fused_adamw(TRAINED), UPDATE) == (4, 40 * 28)


def test_the_engine_reduces_in_each_backward_pass_from_stage_2_on():
    def copies(stage, **changes):
        return totals(engine_operations(TRAINED, settings(stage, **changes), 3), BACKWARD)[0]

    assert copies(1) == 6
    assert copies(2) == 3 * 6
    assert copies(2, accumulation_bytes=4) == 3 * (6 + 2 + 2)  # added up in fp32


def demo(overrides=(), size=32):
    recipe = load_recipe(SMALL_RECIPE, [f"train.global_batch_size={size}", *overrides])
    context = recipe.model.text.context_length
    return recipe, batch_of_mean_captions(recipe, 12, context, size)


SIMCLR = ["loss.simclr=1", "loss.byol=2"]


def flops(trace):
    return sum(each.times * each.flops for each in trace.operations)


@pytest.mark.parametrize("overrides", [SIMCLR, ["model.image.recompute=blocks"]])
def test_flops_are_those_of_the_measured_step(overrides):
    recipe, batch = demo(overrides)
    measured = measure_step(recipe, batch)
    trace = trace_step(recipe, batch, dtype=torch.float32)
    per_sample = measured.total_flops + measured.repeated_flops(1)
    assert flops(trace) == pytest.approx(32 * per_sample)
    assert {each.part for each in trace.operations} == set(PARTS) - {UPDATE}
    losses = [each for each in trace.operations if each.name == "contrastive_loss"]
    assert losses and all(each.part == LOSSES for each in losses)


def test_micro_steps_run_the_towers_again_and_heads_and_losses_once():
    recipe, batch = demo(SIMCLR)
    micro = batch.split(8)[0]
    whole, parts = trace_step(recipe, batch), trace_step(recipe, micro, num_micro_steps=4)

    def of(trace, part):
        return sum(each.times * each.flops for each in trace.operations if each.part == part)

    assert of(parts, TEACHER) == of(whole, TEACHER)
    assert of(parts, STUDENT) == pytest.approx(7 / 4 * of(whole, STUDENT))
    assert of(parts, LOSSES) == of(whole, LOSSES)
    assert of(parts, BACKWARD) == of(whole, BACKWARD)
    for name, times in (("contrastive_loss", 1), ("_foreach_lerp_", 1), ("augment_views", 4)):
        assert next(each.times for each in parts.operations if each.name == name) == times


@pytest.mark.parametrize("which", [0, 1], ids=["eager", "compiled"])
def test_the_time_of_a_run_has_the_teacher_by_its_share_of_the_steps(which):
    def times(*overrides):
        recipe, _ = demo(["train.epochs=4", *overrides])
        dtype = torch.bfloat16
        return recipe_step_times(recipe, dtype, settings(2), TOY, 32, 12, 3200)[which]

    every_step, of_run = times(), times("mask.warmup=0.25")
    taught = every_step.parts[TEACHER]
    assert taught.flops > 0
    assert of_run.parts[TEACHER] == taught * 0.75
    assert of_run.parts[BACKWARD] == every_step.parts[BACKWARD]
    assert of_run.seconds < every_step.seconds


def test_a_large_batch_has_the_shapes_of_a_real_one():
    recipe, few = demo(SIMCLR)
    _, many = demo(SIMCLR, size=96)
    assert (len(many), many.student_views.shape[0], len(many.tokens)) == (96, 96, 96)
    assert many.tokens.lengths.sum() == 96 * 12
    one, three = trace_step(recipe, few), trace_step(recipe, many)
    assert len(one.operations) == len(three.operations)
    views = [each for each in three.operations if each.part == VIEWS]
    assert sum(each.moved for each in views) > many.student_views.numel()
    # Pixels are copied to the device beside the step before.
    assert not any(each.from_host for each in three.operations)


def test_the_ema_moves_every_average_once():
    recipe, batch = demo()
    trace = trace_step(recipe, batch)
    averaged = sum(trace.trained) - 1  # all but the logit scale
    moved = sum(each.moved for each in trace.operations if each.part == EMA)
    # The weights cast (2 + 4), the average moved (4 + 4 + 4), its bf16 copy (4 + 2).
    assert moved == 24 * averaged


def test_open_clips_step_is_as_large_as_it_says():
    """123.0 GFLOP a pair with ViT-B/16 by the cost table; each block's norms run in fp32."""
    recipe = load_recipe("clip_vitb16", ["train.global_batch_size=8"])
    trace = trace_open_clip(recipe, 8)
    assert flops(trace) / 8 == pytest.approx(123.0e9, rel=1e-3)
    products = [each for each in trace.operations if each.flops]
    assert all(each.in_bf16 for each in products)
    norms = [each for each in trace.operations if each.name == "native_layer_norm"]
    assert len(norms) == 2 * 24 + 3 and not any(each.in_bf16 for each in norms)
    pixels = 8 * 3 * 224 * 224
    views = [each for each in trace.operations if each.part == VIEWS]
    assert [each.from_host for each in views] == [pixels + 8 * 77 * 8, 0]
    assert [each.moved for each in views] == [0, pixels * (1 + 4)]


def test_a_prediction_says_that_it_is_an_average_over_a_run():
    time = step_time([Operation("add", STUDENT, moved=8)], TOY, 0, None)
    every_step = Prediction("plain", False, 32, time, flops=50, gpu=TOY)
    of_run = Prediction("own", False, 32, time, flops=50, gpu=TOY, teaching_share=0.26)
    *_, last = report([every_step, of_run]).splitlines()
    assert last == "own: the average over a run, in 26% of whose steps the teacher runs."
    assert "average" not in report([every_step])
    growing = Prediction("growing", False, 32, time, flops=50, gpu=TOY, keep_ratio="a view grows")
    *_, last = report([every_step, growing]).splitlines()
    assert last == "growing: the average over a run, in which a view grows."


def test_of_a_run_with_stages_only_those_with_a_teacher_count_as_taught(monkeypatch):
    time = step_time([Operation("add", STUDENT, moved=8)], TOY, 0, None)

    def predict(name, recipe, *_):
        share = teaching_share(recipe)
        return [Prediction(name, False, 32, time, flops=50, gpu=TOY, teaching_share=share)]

    monkeypatch.setattr(predictions, "predict", predict)
    unmasked = "stages=[{mask: {policy: none, warmup: 0}, teacher: null, train: {epochs: 1}}]"
    taught = load_recipe(SMALL_RECIPE, ["train.epochs=3", "mask.warmup=0.5", unmasked])
    assert predictions.predict_run("own", taught, None, TOY, 17)[-1].teaching_share == (
        pytest.approx(0.75 * 0.5, abs=1e-4)
    )
    untaught = load_recipe(SMALL_RECIPE, ["train.epochs=3", "mask.policy=random", "teacher=null"])
    untaught = untaught.model_copy(update={"stages": taught.stages})
    *_, of_run = predictions.predict_run("own", untaught, None, TOY, 17)
    assert of_run.teaching_share == 1, "all its steps are alike"


def test_a_compiled_step_has_the_same_flops_and_fewer_launches_and_bytes():
    recipe = load_recipe("clip_vits16", ["train.global_batch_size=4"])
    eager, compiled = predict_open_clip(recipe, TOY)
    assert compiled.time.whole.flops == eager.time.whole.flops
    assert compiled.time.whole.launches < eager.time.whole.launches / 2
    assert compiled.time.whole.moved < eager.time.whole.moved
    lines = report([eager, compiled]).splitlines()
    first, second = (line for line in lines if line.lstrip().startswith("4  open_clip"))
    assert first.split()[-2] == "1.00" and second.split()[-1] == "1.00"
    assert "not measured" in report([eager, compiled])


def arguments(**changes):
    values = {"gpu": "h100", "recipes": ["demo"], "batch_sizes": [8], "against": None}
    values |= {"ds_config": str(ROOT / "ds_configs" / "zero2.json"), "caption_tokens": 22}
    return argparse.Namespace(**values | {"set": []} | changes)


def test_the_command_prints_every_part_and_what_bounds_the_step(capsys):
    assert roofline(arguments()) == 0
    text = capsys.readouterr().out
    assert all(f"\n{part}" in text for part in PARTS)
    row = next(line.split() for line in text.splitlines() if line.split()[:2] == ["8", "demo"])
    assert row[5] == "host"


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"gpu": "h10"}, "--gpu is h10"),
        ({"batch_sizes": [64, 1]}, "--batch_sizes has 1"),
        ({"caption_tokens": float("nan")}, "--caption_tokens is nan"),
        ({"recipes": ["aclip_vitb61"]}, "aclip_vitb61"),
        ({"ds_config": "none.json"}, "none.json"),
    ],
)
def test_bad_argument_is_one_sentence(changes, named):
    with pytest.raises(ConfigError, match=named):
        roofline(arguments(**changes))
