"""Plans: states and communication by hand, times, limits, errors, the report."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.data.synthetic import synthetic_batch
from aclip.errors import ConfigError
from aclip.planning import plan as plan_module
from aclip.planning.gpu_memory import Memory, largest_divisor
from aclip.planning.gpus import GPUS, find_gpu
from aclip.planning.measure_step import MODES
from aclip.planning.plan_input import read_input
from aclip.planning.plan_report import report
from aclip.planning.run_memory import batch_bytes, checkpoint_copies
from aclip.planning.workload import describe_workload
from aclip.planning.zero_memory import States, ZeroSettings, sent_bytes, zero_states

GROUPS, FROZEN = [[30, 7], [5]], [11]  # elements


def settings(stage, **changes):
    values = {"dtype_bytes": 2, "accumulation_bytes": 4, "bucket_size": 100}
    return ZeroSettings(stage, **{"num_ranks": 2, **values, **changes})


def test_states_without_zero():
    states = zero_states(GROUPS, FROZEN, settings(0, dtype_bytes=4))
    assert (states.parameters, states.gradients, states.optimizer) == (53 * 4, 42 * 4, 42 * 8)


def test_states_under_zero_2():
    # Groups of 37 and 5 elements are padded to multiples of 2 a rank: 40 and 8, 24 of them a rank.
    states = zero_states(GROUPS, FROZEN, settings(2, overlap=True))
    assert states.parameters == (48 + 11) * 2
    assert states.gradients == 24 * 4
    assert states.optimizer == 24 * 12
    assert states.buffers == 2 * 100 * 2
    # The largest parameter's; rank 0's share of 42 elements is less than that in fp64.
    assert (states.arriving, states.largest, states.in_step) == (30 * 2, 30 * 2, 21 * 8)


def test_states_under_zero_1_hold_whole_gradients():
    # Rank 0 owns a part of the first parameter and of the third, rank 1 of all three.
    states = zero_states(GROUPS, FROZEN, settings(1, accumulation_bytes=2))
    assert states.gradients == (30 + 7 + 5) * 2
    assert (states.buffers, states.arriving, states.largest) == (100 * 2, 42 * 2, 30 * 2)


def test_states_under_zero_3():
    # Parts of 15, 4, 3 and the frozen 6 elements; 7 and 5 are kept whole too, 30 + 11 gathered.
    states = zero_states(GROUPS, FROZEN, settings(3, persistence_threshold=7))
    assert states.parameters == (15 + 4 + 3 + 6 + 7 + 5) * 2
    assert states.gradients == (15 + 4 + 3) * 4
    assert states.optimizer == (15 + 4 + 3) * 12
    # All 42 elements fit into a bucket and are joined in a copy of it.
    assert states.buffers == (100 + 42 + 30 + 11) * 2
    on_host = settings(3, persistence_threshold=7, bucket_size=25, on_host=True)
    # A bucket is full at 25; gloo copies the 30 that are reduced alone.
    assert zero_states(GROUPS, FROZEN, on_host).buffers == (25 + 25 + 30 + 30 + 11) * 2


def test_offloaded_states_are_on_the_host():
    states = zero_states(GROUPS, FROZEN, settings(3, persistence_threshold=7, offload=True))
    assert (states.gradients, states.optimizer) == (0, 0)
    assert states.host == 22 * (12 + 4 + 4)  # masters and moments, their gradient, accumulation


def test_bytes_that_a_rank_sends():
    def sent(settings):
        return sent_bytes(GROUPS, FROZEN, settings, num_micro_steps=2, updates_teacher=True)

    # All-reduce is twice a gather, of which each of 4 ranks sends 3 / 4.
    assert sent(settings(0, num_ranks=4, dtype_bytes=4)) == 3 / 4 * 2 * 42 * 4
    # ZeRO-1 reduces once and gathers the weights; ZeRO-2 reduces in both micro_steps.
    assert sent(settings(1, num_ranks=4)) == 3 / 4 * 3 * 42 * 2
    assert sent(settings(2, num_ranks=4)) == 3 / 4 * 5 * 42 * 2
    # ZeRO-3: 3 forward and 2 backward passes and the teacher's update gather what is cut, 30 + 11;
    # both backward passes scatter gradients.
    cut = settings(3, num_ranks=4, persistence_threshold=7)
    assert sent(cut) == 3 / 4 * (2 * 42 * 2 + 6 * 41 * 2)


@pytest.mark.parametrize("limit, expected", [(100, 12), (7, 6), (4.9, 4), (0.5, 0), (-3, 0)])
def test_micro_batch_divides_the_local_batch(limit, expected):
    assert largest_divisor(12, lambda micro: micro <= limit) == expected


def test_peak_of_a_step():
    states = States(100, 20, 300, buffers=7, arriving=42, largest=30, in_step=60)
    # In the step: the norm. In the backward pass: activations with the largest gradient, or all
    # gradients when the activations are gone; both at once from the second micro_step on.
    assert states.peak(5, num_micro_steps=1) == 420 + 60
    assert states.peak(25, num_micro_steps=1) == 420 + 7 + 25 + 30
    assert replace(states, in_step=0).peak(5, num_micro_steps=1) == 420 + 7 + 42
    assert states.peak(25, num_micro_steps=2) == 420 + 7 + 25 + 42


def test_peak_of_a_micro_batch():
    states = States(100, 20, 300, buffers=7, arriving=42, largest=30)
    memory = Memory(states, teacher=11, heads=5, losses=3, batches=9, local_batch_size=12)
    # Two micro_steps: heads and losses of all 12 images, activations of 6.
    assert memory.peak(6, kept=10) == 11 + 9 + 420 + 7 + (60 + 5 + 3) + 42
    assert memory.largest_fitting(10, limit=memory.peak(6, 10)) == 6
    assert memory.largest_fitting(10, limit=400) == 0


@pytest.mark.parametrize(
    "name, override, expected",
    [
        # Three batches of two views and the teacher's, 224 px: 451,584 bytes an image.
        ("aclip_vitb16", "data.crops=worker", 3 * 451_584),
        # Three of images of 500 x 400, and one of the views that are cut of them.
        ("aclip_vitb16", "data.crops=device", 3 * 3 * 500 * 400 + 451_584),
        # The default is that of a GPU; a single view; images are reduced to 64 x 64.
        ("clip_vits16", "data.max_image_side=64", 3 * 3 * 64**2 + 3 * 224**2),
    ],
)
def test_batches_ahead_are_views_or_whole_images(name, override, expected):
    recipe = load_recipe(name, [override])
    assert batch_bytes(recipe, synthetic_batch(recipe, 2), image_pixels=500 * 400) == expected


def test_batches_ahead_take_memory_of_the_gpu(plan):
    planned = plan(overrides=["data.crops=worker"])
    memory, expected = planned.own.memory, 512 * 3 * 3 * 224**2  # three batches of one view
    assert memory.batches == expected
    assert memory.peak(512, 1.0) == replace(memory, batches=0).peak(512, 1.0) + expected
    lines = report([planned]).splitlines()
    header = next(line for line in lines if line.startswith("ZeRO ")).split()
    own = next(line for line in lines if line.startswith("2 <-")).replace("<-", "").split()
    assert own[header.index("batches")] == f"{expected / 2**30:.2f}"


def test_copies_for_a_checkpoint_are_counted_in_pinned_blocks():
    student = torch.nn.Sequential(
        torch.nn.Linear(4096, 4096, bias=False), torch.nn.Linear(10, 5, bias=False)
    )
    student[1].requires_grad_(False)
    # Two of the three tensors of 2**24 elements lie together, as many as are copied at once. 200
    # bytes of the frozen one take 256, and 12 of the teacher take 16.
    copies = checkpoint_copies(student, [torch.zeros(3)])
    assert copies.size == 3 * 2**26 + 200 + 12
    assert copies.pinned == 2**27 + 2**26 + 256 + 16


def test_unknown_gpu_names_the_known_ones():
    with pytest.raises(ConfigError) as caught:
        find_gpu("h10")
    assert "h10" in str(caught.value)
    assert all(name in str(caught.value) for name in GPUS)


@pytest.fixture(scope="module")
def workloads():
    """Workloads by what they were measured for: most plans here are of the same one."""
    return {}


@pytest.fixture
def plan(tmp_path, monkeypatch, workloads):
    """plan(ds_values=None, overrides=(), **arguments): a plan of CLIP with ViT-S on 2 x 4 GPUs."""

    def describe_once(recipe, batch, num_ranks, dtypes, num_samples):
        length = batch.tokens.lengths.sum().item()
        key = recipe.model_dump_json(), length, num_ranks, str(dtypes), num_samples
        if key not in workloads:
            workloads[key] = describe_workload(
                recipe, batch, num_ranks, dtypes, num_samples=num_samples
            )
        return workloads[key]

    monkeypatch.setattr(plan_module, "describe_workload", describe_once)

    def make(ds_values=None, overrides=(), **changes):
        path = tmp_path / "ds.json"
        values = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
        path.write_text(json.dumps(ds_values or values))
        plain = {"recipe": "clip_vits16", "ds_config": str(path), "gpu": "a100-80", "nodes": 2}
        plain |= {"gpus_per_node": 4, "mfu": 0.5, "bandwidth": None, "samples": 4096 * 100}
        plain |= {"caption_tokens": 22, "image_pixels": 1000, "overrides": list(overrides)}
        return plan_module.plan(*read_input(argparse.Namespace(**plain | changes)))

    return make


def test_time_of_a_plan(plan):
    planned = plan()
    flops = sum(part.total for part in planned.measured.flops.values())
    # 512 samples a GPU, half of 312 TFLOP/s; 25 epochs of 100 steps on 8 GPUs
    assert planned.compute_seconds == pytest.approx(512 * flops / 156e12)
    assert planned.communication_seconds == pytest.approx(planned.sent_bytes / 25e9)
    # ZeRO-2's three gathers of bf16 weights and gradients, and the losses': embeddings of a view
    # and a text and twice their gradients, fp32; of each a rank sends 7 / 8.
    trained = sum(map(sum, planned.workload.groups))
    of_losses = 3 * 4 * 4096 * 2 * 512
    assert planned.sent_bytes == pytest.approx(7 / 8 * (3 * 2 * trained + of_losses))
    assert planned.num_steps == 2500
    longer = max(planned.compute_seconds, planned.communication_seconds)
    assert planned.gpu_hours == pytest.approx(2500 * longer * 8 / 3600)


def test_time_of_a_plan_without_a_stated_mfu_is_predicted(plan):
    planned = plan(mfu=None, nodes=1, gpus_per_node=8)
    assert planned.compute_seconds == planned.time.seconds == planned.time.whole.device_seconds
    flops = sum(part.total for part in planned.measured.flops.values())
    assert planned.time.whole.flops == pytest.approx(512 * flops)
    assert planned.mfu == pytest.approx(512 * flops / 312e12 / planned.step_seconds)
    assert 0.1 < planned.mfu < 0.6
    assert "Host-bound" not in report([planned])


def test_a_plan_averages_over_the_run_and_says_so(plan):
    demo = {
        "recipe": SMALL_RECIPE,
        "mfu": None,
        "samples": 32 * 100,
        "gpus_per_node": 1,
        "nodes": 1,
    }
    overrides = ["train.epochs=4", "teacher.resolution=128"]
    every_step = plan(**demo, overrides=overrides)
    of_run = plan(**demo, overrides=[*overrides, "mask.warmup=0.25"])
    assert (every_step.teaching_share, of_run.teaching_share) == (1, 0.75)
    taught = every_step.measured.flops["teacher"].total
    saved = every_step.measured.total_flops - of_run.measured.total_flops
    assert saved == pytest.approx(0.25 * taught)
    assert of_run.gpu_hours < every_step.gpu_hours
    sentence = "the teacher scores its view in 75% of the steps"
    assert sentence in report([of_run]) and sentence not in report([every_step])
    assert "Averages" not in report([every_step])
    growing = "a view keeps 25% of its blocks at first and 100% at the end"
    assert f"Averages over the run: {growing}. So are" in report(
        [replace(every_step, keep_ratio=growing)]
    )
    assert f"{growing}, and {sentence}. So are" in report([replace(of_run, keep_ratio=growing)])


def test_a_plan_says_what_kept_scores_take_on_the_disk(plan):
    demo = {"recipe": SMALL_RECIPE, "samples": 3200, "gpus_per_node": 1, "nodes": 1}
    kept = plan(**demo, overrides=["teacher.reuse=4"])
    # Two files, each a page and, for every sample, 8 x 8 patches, epoch and checksum.
    assert kept.kept_scores_bytes == 2 * (4096 + 3200 * (64 + 4 + 4))
    none = plan(**demo)
    assert none.kept_scores_bytes == 0 and "Scores:" not in report([none])
    large = replace(kept, kept_scores_bytes=1_710_008_192)
    assert report([large]).endswith(
        "Scores: up to 1.71 GB in the run folder, those of two epochs (teacher.reuse)"
    )


def test_a_plan_says_when_the_gpu_waits_for_the_host(plan):
    planned = plan(mfu=None, nodes=8, gpus_per_node=8, overrides=["train.global_batch_size=512"])
    assert planned.compute_seconds == planned.time.whole.host_seconds
    (line,) = [line for line in report([planned]).splitlines() if "Host-bound" in line]
    assert "with 8 images at a time" in line and "model.compile=true" in line


def test_recomputation_takes_time_and_saves_memory(plan):
    planned = plan()
    again = plan(overrides=["model.image.recompute=blocks"])
    # Of a block's forward pass two thirds run again: the MLP's last product is not needed.
    assert 1.15 < again.compute_seconds / planned.compute_seconds < 1.25
    kept = planned.own.kept
    assert kept["blocks"] < kept["none"] / 4
    assert kept["blocks"] < again.own.kept[None] < kept["none"] / 3  # the text tower keeps all
    assert again.own.largest[None] >= planned.own.largest[None]


def test_links_by_number_of_nodes(plan):
    assert plan(nodes=1, gpus_per_node=8).link_bytes == 300e9  # NVLink
    assert plan().link_bytes == 25e9
    assert plan(bandwidth=7.0).link_bytes == 7e9


def test_largest_micro_batch_is_at_the_limit(plan):
    planned = plan(gpu="a10", gpus_per_node=1)
    for row in planned.rows:
        for mode in MODES:
            micro = row.largest[mode]
            assert 2048 % micro == 0
            assert row.peak(micro, mode) <= 0.9 * 24e9
            assert micro == 2048 or row.peak(2 * micro, mode) > 0.9 * 24e9


def test_times_are_for_a_micro_batch_that_fits(plan):
    planned = plan(gpu="a10", gpus_per_node=1, recipe="clip_vitl16")
    assert planned.micro_batch_size < 2048
    assert planned.num_micro_steps == 2048 // planned.micro_batch_size
    assert "Micro-batch 2048 does not fit" in report([planned])


def test_report_marks_the_stage_of_the_ds_config(plan):
    text = report([plan()])
    assert [line.split()[0] for line in text.splitlines() if "<-" in line] == ["2", "2"]
    for name in ("image tower", "text tower", "0 (fp32)", "3_offload", "GPU-hours"):
        assert name in text


def test_report_says_what_an_epoch_leaves_to_the_next(plan):
    lines = report([plan(samples=15e6)]).splitlines()
    assert lines[-1] == (
        "Data: an epoch of 15,000,000 samples is 3,662 batches of 4,096; the 448 left over begin "
        "the next epoch"
    )
    assert report([plan()]).endswith("Data: an epoch of 409,600 samples is 100 batches of 4,096")


def test_ds_config_with_another_offload_has_its_own_row(plan):
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    planned = plan({"bf16": {"enabled": True}, "zero_optimization": zero})
    assert planned.own.title == "2_offload"
    assert planned.own in planned.rows


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"mfu": 1.5}, "--mfu is 1.5"),
        ({"nodes": 0}, "--nodes is 0"),
        ({"bandwidth": -1.0}, "--bandwidth is -1"),
        ({"image_pixels": 0}, "--image_pixels is 0"),
        ({"samples": 0}, "--samples is 0"),
        ({"gpu": "v100"}, "--gpu is v100"),
        ({"gpus_per_node": 3}, "which 6 ranks do not divide"),
    ],
)
def test_bad_argument_is_one_sentence(plan, changes, named):
    with pytest.raises(ConfigError, match=named):
        plan(**changes)


def test_offloaded_parameters_are_refused(plan):
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    with pytest.raises(ConfigError, match="offload_param"):
        plan({"bf16": {"enabled": True}, "zero_optimization": zero})


def test_planning_needs_no_deepspeed():
    code = "import sys, aclip.planning.plan_report; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
