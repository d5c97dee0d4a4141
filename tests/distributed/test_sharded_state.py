"""Whole fp32 masters and moments move between all ZeRO stages and one and two ranks, bit by bit."""

import pytest
import tiny_run
import torch

pytestmark = pytest.mark.distributed


# (dtype, stage, ranks)
FP32 = [("fp32", stage, 1) for stage in (0, 2, 3)]  # on one rank ZeRO-1 is ZeRO-2
FP32 += [("fp32", stage, 2) for stage in (0, 1, 2, 3)]
BF16 = [("bf16", stage, 2) for stage in (1, 2, 3)]
STEPS_BEFORE = 3
LEARNING_RATE = 0.01
MOMENTS = ("exp_avg", "exp_avg_sq")
# Softmax does not see a key's bias: its gradient is rounding noise, which Adam makes full steps of.
NOISE = ("k_proj.bias", "attn.qkv.bias")


def readable(engine):
    return "{}, ZeRO-{}, {} ranks".format(*engine)


def train(folder, stage, dtype):
    """State after three steps and after a fourth, the losses, and Adam's own moments."""
    run = tiny_run.TinyRun(folder, stage, dtype, [f"optimizer.lr={LEARNING_RATE}"])
    named = dict(run.engine.module.named_parameters())
    trainable = {name for name, p in named.items() if p.requires_grad}
    losses = [run.step(step) for step in range(STEPS_BEFORE)]
    before = run.gathered()
    own_masters = {name: run.master(name) for name in trainable}
    own_moments = {}
    if stage == 0:
        states = run.engine.optimizer.state
        own_moments = {(n, k): states[named[n]][k].clone() for n in trainable for k in MOMENTS}
    losses.append(run.step(STEPS_BEFORE))
    return {
        "initial": run.initial,
        "teacher": dict(run.teacher.state_dict()),
        "trainable": trainable,
        "before": before,
        "after": run.gathered(),
        "losses": losses,
        "own_masters": own_masters,
        "own_moments": own_moments,
    }


def load_each(folder, stage, dtype, sources, teacher):
    """Loads every state into one engine that began elsewhere, then trains on from the last."""
    overrides = [f"optimizer.lr={LEARNING_RATE}", "train.seed=1"]
    run = tiny_run.TinyRun(folder, stage, dtype, overrides)
    wrong = []
    for source, state in sources.items():
        for (name, kind), whole in state.items():
            run.state.load(name, kind, whole)
        run.state.load_scalars({"step": STEPS_BEFORE})
        assert run.state.scalars() == {"step": STEPS_BEFORE}
        gathered = run.gathered()
        assert not gathered or gathered.keys() == state.keys()
        for key, whole in gathered.items():
            # A frozen parameter has no master but itself, in the compute dtype.
            frozen = (key[0], "exp_avg") not in state
            expected = state[key].to(run.ds_config.dtype).float() if frozen else state[key]
            if not torch.equal(whole, expected):
                wrong.append((readable(source), *key))
        for name, weight in run.weights().items():
            if not torch.equal(weight, state[name, "master"].to(weight.dtype)):
                wrong.append((readable(source), name, "weight"))
    run.teacher.load_state_dict(teacher)
    return wrong, run.step(STEPS_BEFORE), run.gathered()


@pytest.fixture(scope="module")
def trained_engines():
    return {}


@pytest.fixture
def trained(trained_engines, run_distributed, tmp_path):
    """`trained(engine)`: what `train` returns on rank 0; each engine is trained once."""

    def get(engine):
        if engine not in trained_engines:
            dtype, stage, ranks = engine
            results = run_distributed(train, ranks, tmp_path, stage, dtype)
            assert all(not result["before"] for result in results[1:])  # rank 0 alone gets tensors
            trained_engines[engine] = results[0]
        return trained_engines[engine]

    return get


def assert_close(actual, expected, tolerance):
    for key, value in expected.items():
        if not key[0].endswith(NOISE):
            error = (actual[key] - value).abs().max().item()
            assert error <= tolerance(value), f"{key}: {error}"


@pytest.mark.parametrize("engine", FP32 + BF16, ids=readable)
def test_gathered_state_is_deepspeeds_masters_and_adams_moments(engine, trained):
    result = trained(engine)
    state, trainable = result["before"], result["trainable"]
    masters = {(name, "master") for name in result["initial"]}
    assert state.keys() == masters | {(name, kind) for name in trainable for kind in MOMENTS}
    for (name, kind), whole in state.items():
        assert whole.dtype == torch.float32
        assert whole.shape == result["initial"][name].shape
        if kind == "master" and name in trainable:
            assert torch.equal(whole, result["own_masters"][name]), name
    for key, moment in result["own_moments"].items():
        assert torch.equal(state[key], moment), key
    if engine[0] == "fp32":
        # DeepSpeed's accessor of moments does not work everywhere: compare with torch's Adam.
        expected = trained(("fp32", 0, 1))
        assert_close(state, expected["own_moments"], lambda value: 1e-4 * value.abs().max() + 1e-9)
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)


@pytest.mark.parametrize("engine", FP32 + BF16, ids=readable)
def test_state_of_every_stage_and_number_of_ranks_loads(engine, trained, run_distributed, tmp_path):
    dtype, stage, ranks = engine
    sources = FP32 if dtype == "fp32" else [("fp32", 0, 1), *BF16]
    states = {source: trained(source)["before"] for source in sources}
    last = trained(sources[-1])
    results = run_distributed(load_each, ranks, tmp_path, stage, dtype, states, last["teacher"])
    for wrong, loss, _ in results:
        assert not wrong
        assert loss == pytest.approx(last["losses"][-1], rel=1e-5 if dtype == "fp32" else 1e-2)
    # One more step is the step that the uninterrupted run made, Adam's bias correction included.
    share = 0.02 if dtype == "fp32" else 0.5
    after = {key: value for key, value in last["after"].items() if key[1] == "master"}
    assert_close(results[0][2], after, lambda _: share * LEARNING_RATE)
