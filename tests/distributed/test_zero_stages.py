"""Teacher and logit-scale clamp under every ZeRO stage, on two ranks."""

import math

import pytest
import tiny_run
import torch

pytestmark = pytest.mark.distributed

LOGIT_SCALE = tiny_run.LOGIT_SCALE

CEILING = math.log(100)
SETTINGS = [("fp32", stage) for stage in (0, 1, 2, 3)]
SETTINGS += [("bf16", stage) for stage in (1, 2, 3)]
IDS = [f"{dtype}, ZeRO-{stage}" for dtype, stage in SETTINGS]

MOMENTUM = 0.996
NUM_STEPS = {"fp32": 6, "bf16": 16}
# Matrices whose fp32 masters are followed too; reading all of them would take long.
FOLLOWED = ("image.vit.blocks.0.attn.qkv.weight", "image_projection.weight")
NOT_IN_TEACHER = ("simclr_head.", "byol_predictor.", "logit_scale.")


def follow_teacher(folder, stage, dtype):
    """Trains with a small learning rate and averages what the student was, in float64."""
    run = tiny_run.TinyRun(folder, stage, dtype, ["optimizer.lr=1.0e-4"])
    trainable = [n for n, p in run.engine.module.named_parameters() if p.requires_grad]
    average = {name: weight.double() for name, weight in run.initial.items()}
    of_masters = {name: average[name].clone() for name in FOLLOWED}
    in_bf16 = {name: weight.bfloat16() for name, weight in run.initial.items()}
    for step in range(NUM_STEPS[dtype]):
        run.step(step)
        run.teacher.update(run.engine.module, MOMENTUM)
        weights = run.weights()
        for name in trainable:
            average[name] = MOMENTUM * average[name] + (1 - MOMENTUM) * weights[name].double()
            stored = MOMENTUM * in_bf16[name].float() + (1 - MOMENTUM) * weights[name].float()
            in_bf16[name] = stored.bfloat16()
        for name in FOLLOWED:
            master = run.master(name).double()
            of_masters[name] = MOMENTUM * of_masters[name] + (1 - MOMENTUM) * master
    return {
        "trainable": trainable,
        "initial": run.initial,
        "average": average,
        "of_masters": of_masters,
        "in_bf16": in_bf16,
        "teacher": dict(run.teacher.state_dict()),
        "computes_with": {n: p.detach() for n, p in run.teacher.model.named_parameters()},
    }


def missed_share(moved, expected_movement):
    """How much of a movement is missing or wrong, over all parameters."""
    missed = sum((moved[n] - expected_movement[n]).square().sum() for n in expected_movement)
    return (missed / sum(m.square().sum() for m in expected_movement.values())).sqrt().item()


@pytest.mark.parametrize("dtype, stage", SETTINGS, ids=IDS)
def test_teacher_is_the_fp32_average_of_the_student(dtype, stage, run_distributed, tmp_path):
    first, second = run_distributed(follow_teacher, 2, tmp_path, stage, dtype)
    teacher, average, initial = first["teacher"], first["average"], first["initial"]
    assert teacher.keys() == {n for n in initial if not n.startswith(NOT_IN_TEACHER)}
    for name, value in teacher.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, second["teacher"][name]), f"{name} differs between the ranks"
        assert torch.equal(first["computes_with"][name], value.to(first["computes_with"][name]))
        if name in first["trainable"]:
            assert (value - average[name]).abs().max() <= 1e-5, name
        else:
            assert torch.equal(value, initial[name]), f"{name} is frozen"

    # The average's weight on the steps, in which the student may be off by a rounding to bf16.
    share = 1 - MOMENTUM ** NUM_STEPS[dtype]
    rounding = 2**-8 * share if dtype == "bf16" else 0
    for name, expected in first["of_masters"].items():
        bound = rounding * expected.abs().max() + 1e-6
        assert (teacher[name] - expected).abs().max() <= bound, name

    # These steps are small enough to tell: an average stored in bf16 stays where it began.
    averaged = [name for name in teacher if name in first["trainable"]]
    movement = {n: average[n] - initial[n].double() for n in averaged}
    of_teacher = {n: teacher[n].double() - initial[n].double() for n in averaged}
    in_bf16 = first["in_bf16"]
    of_bf16 = {n: in_bf16[n].double() - initial[n].bfloat16().double() for n in averaged}
    assert missed_share(of_teacher, movement) < 0.02
    assert missed_share(of_bf16, movement) > 0.5
    assert max((in_bf16[n].double() - average[n]).abs().max() for n in averaged) > 1e-3


def push_logit_scale(folder, stage, dtype, persistent):
    """Steps that push the scale up by their whole learning rate, from above the ceiling."""
    run = tiny_run.TinyRun(
        folder, stage, dtype, ["optimizer.lr=0.05"], logit_scale=4.75, persistent=persistent
    )
    rows = []
    for step in range(4):
        run.step(step, scale_pull=10.0)
        pushed = run.master(LOGIT_SCALE).item()
        returned = run.state.clamp_max(LOGIT_SCALE, CEILING)
        run.engine.module.logit_scale.exact = returned
        weight = run.weights()[LOGIT_SCALE].item()
        used = run.engine("project", features_of(run))["logit_scale"].item()
        rows.append((pushed, run.master(LOGIT_SCALE).item(), returned.item(), weight, used))
    untouched = run.state.clamp_max(LOGIT_SCALE, 10.0).item()
    return rows, untouched, run.master(LOGIT_SCALE).item()


def features_of(run):
    dtype = run.ds_config.dtype
    return {
        "image": torch.ones(2, 2, 24, dtype=dtype),
        "text": torch.ones(2, 8, dtype=dtype),
    }


@pytest.mark.parametrize(
    "dtype, stage, persistent",
    [
        *(
            pytest.param(*setting, 100, id=name)
            for setting, name in zip(SETTINGS, IDS, strict=True)
        ),
        pytest.param("bf16", 3, 0, id="bf16, ZeRO-3, the scale itself partitioned"),
    ],
)
def test_clamped_logit_scale_reaches_the_fp32_master(
    dtype, stage, persistent, run_distributed, tmp_path
):
    arguments = (tmp_path, stage, dtype, persistent)
    for rows, untouched, last in run_distributed(push_logit_scale, 2, *arguments):
        assert rows[0][0] == pytest.approx(4.8, abs=1e-3)  # 4.75 and the first step of Adam
        for pushed, master, returned, weight, used in rows:
            assert pushed > CEILING + 0.03
            assert master == returned == pytest.approx(CEILING, rel=1e-7)
            assert weight == pytest.approx(CEILING, rel=2**-8 if dtype == "bf16" else 1e-7)
            assert used == pytest.approx(100, rel=1e-5)
        # Each step starts at the ceiling: a master that ran on would be 0.05 higher every time.
        assert max(row[0] for row in rows[1:]) < CEILING + 0.06
        assert untouched == last == rows[-1][1]
