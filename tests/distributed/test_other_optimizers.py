"""The state of any optimizer survives save and resume; what a checkpoint can't hold is refused."""

import pytest
import tiny_run
import torch
from safetensors.torch import load_file, save_file

from aclip.engine import build
from aclip.engine.optimizer import parameter_groups
from aclip.errors import ConfigError
from aclip.run_folder import checkpoint_folder
from aclip.training import checkpoint

pytestmark = pytest.mark.distributed

LEARNING_RATE = 0.01


def use(make_optimizer):
    """Lets engines of this process be built around make_optimizer(parameter groups)."""
    build.build_optimizer = lambda student, config, ds_config: make_optimizer(
        parameter_groups(student, config.weight_decay)
    )


def sgd(groups):
    # With dampening, momentum that begins as zeros is not momentum that begins anew.
    return torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=0.9, dampening=0.5)


def save(root, run, step):
    return run.save(root, {"samples": 8 * step, "step": step}, keep=9)


def load(folder, run):
    checkpoint.load(folder, run.engine, run.teacher, checkpoint.read_state(folder)["step"])


def train_on(folder, stage, step, make_optimizer=None):
    """Continues at `step` from the checkpoint there is, and saves one step later.

    Returns:
        The whole state on rank 0 one more step later, which the resumed run makes too.
    """
    if make_optimizer is not None:
        use(make_optimizer)
    root = folder / "checkpoints"
    run = tiny_run.TinyRun(folder, stage, overrides=[f"train.seed={step}"])
    found = checkpoint_folder.find(root, "auto")
    if found is not None:
        load(found, run)
    run.step(step)
    reached = run.gathered()
    save(root, run, step + 1)
    run.step(step + 1)
    return reached, run.gathered()


# ZeRO stages and ranks, each continuing from the one before; some twice, for bit-equal results.
CHAIN = [(0, 1), (0, 1), (1, 2), (1, 2), (0, 2), (3, 2), (3, 2), (2, 1), (2, 2), (3, 1), (1, 1)]


def test_momentum_of_sgd_continues_through_every_stage_and_number_of_ranks(
    run_distributed, tmp_path
):
    expected, last = None, None
    for step, (stage, ranks) in enumerate(CHAIN):
        results = run_distributed(train_on, ranks, tmp_path, stage, step, sgd)
        reached, following = results[0]
        kinds = {kind for _, kind in reached}
        assert kinds == {"master", "momentum_buffer"}
        for key, value in (expected or {}).items():
            name = f"{key} after {last} on {(stage, ranks)}"
            # As if it had not been interrupted, up to the order in which ranks sum.
            tolerance = 0 if last == (stage, ranks) else 1e-5 * value.abs().max() + 1e-7
            assert (reached[key] - value).abs().max() <= tolerance, name
        expected, last = following, (stage, ranks)


def test_momentum_counts_in_that_comparison(run_distributed, tmp_path):
    """Without it the step that follows is another by far more than the tolerance there."""
    _, whole = run_distributed(train_on, 1, tmp_path, 0, 0, sgd)[0]
    folder = checkpoint_folder.find(tmp_path / "checkpoints", "auto")
    file = folder / checkpoint_folder.OPTIMIZER
    assert load_file(file).keys() == {"/".join(key) for key in whole if key[1] == "momentum_buffer"}
    described = {"family": "SGD", "numbers": "{}"}
    save_file({}, file, described)

    def resume():
        use(sgd)
        run = tiny_run.TinyRun(tmp_path, 0)
        checkpoint.load(folder, run.engine, run.teacher, 1)
        assert not run.engine.optimizer.state, "it begins anew"
        run.step(1)
        return run.gathered()

    anew = run_distributed(resume, 1)[0]
    name = ("image_projection.weight", "master")
    assert (anew[name] - whole[name]).abs().max() > 1e-3 * whole[name].abs().max()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_optimizer_without_a_state_yet_saves_none_and_begins_anew(stage, run_distributed, tmp_path):
    def save_before_the_first_step():
        use(sgd)
        run = tiny_run.TinyRun(tmp_path, stage)
        save(tmp_path / "checkpoints", run, 0)
        run.step(0)
        return run.gathered()

    whole = run_distributed(save_before_the_first_step, 2)[0]
    folder = checkpoint_folder.find(tmp_path / "checkpoints", "auto")
    assert load_file(folder / checkpoint_folder.OPTIMIZER) == {}
    reached, _ = run_distributed(train_on, 2, tmp_path, stage, 0, sgd)[0]
    assert all(torch.equal(reached[key], value) for key, value in whole.items())


def test_step_of_adam_is_saved_as_it_is_kept(run_distributed, tmp_path):
    run_distributed(train_on, 2, tmp_path, 2, 0)
    folder = checkpoint_folder.find(tmp_path / "checkpoints", "auto")
    step = load_file(folder / checkpoint_folder.OPTIMIZER)["step"]
    assert torch.equal(step, torch.tensor(1.0))


def test_checkpoint_of_earlier_versions_loads_with_equal_results(run_distributed, tmp_path):
    """Its optimizer's file holds Adam's moments alone; steps are counted in state.json."""
    for step, (stage, ranks) in enumerate([(1, 2), (0, 1), (3, 2)]):
        _, whole = run_distributed(train_on, ranks, tmp_path, stage, step)[0]
    folder = checkpoint_folder.find(tmp_path / "checkpoints", "auto")
    file = folder / checkpoint_folder.OPTIMIZER
    tensors = load_file(file)
    moments = {key: value for key, value in tensors.items() if "/" in key}
    assert {key.rpartition("/")[2] for key in moments} == {"exp_avg", "exp_avg_sq"}
    assert tensors.keys() - moments.keys() == {"step"}
    save_file(moments, file)

    def resume():
        run = tiny_run.TinyRun(tmp_path, 3, overrides=["train.seed=5"])
        checkpoint.load(folder, run.engine, run.teacher, step=3)
        run.step(3)
        return run.gathered()

    resumed = run_distributed(resume, 2)[0]
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_state_of_another_shape_is_refused_and_nothing_is_written(run_distributed, tmp_path):
    def save_factored_moments():
        use(lambda groups: torch.optim.Adafactor(groups, lr=LEARNING_RATE))
        run = tiny_run.TinyRun(tmp_path, 0)
        run.step(0)
        with pytest.raises(ConfigError) as caught:
            save(tmp_path / "checkpoints", run, 1)
        return str(caught.value)

    for message in run_distributed(save_factored_moments, 2):
        assert message.startswith("Adafactor keeps row_var, a Tensor of shape [")
        assert "for image.vit.pos_embed, of which it sees a tensor of shape [1, 17, 24]" in message
    assert not (tmp_path / "checkpoints").exists()


def test_checkpoint_of_another_optimizer_is_refused(run_distributed, tmp_path):
    run_distributed(train_on, 1, tmp_path, 0, 0, sgd)
    folder = checkpoint_folder.find(tmp_path / "checkpoints", "auto")

    def resume():
        run = tiny_run.TinyRun(tmp_path, 0)
        with pytest.raises(ConfigError) as caught:
            load(folder, run)
        return str(caught.value)

    message = run_distributed(resume, 1)[0]
    assert message.startswith(
        f"--resume loads {folder}, which was trained with SGD, but this run's optimizer is Adam"
    )
