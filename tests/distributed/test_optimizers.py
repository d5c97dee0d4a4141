"""Every optimizer under every ZeRO stage that it may run under, against plain formulas."""

import math
import re

import pytest
import tiny_run
import torch

from aclip.engine import muon
from aclip.run_folder import checkpoint_folder
from aclip.training import checkpoint

pytestmark = pytest.mark.distributed

LR, DECAY, STEPS = 0.01, 0.3, 3
RATES = ["optimizer.image={layer_decay: 0.5}", "optimizer.text={lr_scale: 0.25}"]
SETTINGS = [f"optimizer.lr={LR}", f"optimizer.weight_decay={DECAY}", *RATES]
STAGES = {"adamw": (0, 1, 2, 3), "lion": (0, 1, 2, 3), "muon": (0, 1, 2, 3), "lamb": (0,)}
BLOCK = re.compile(r"^(image\.vit\.blocks|text\.transformer\.encoder\.layers)\.(\d+)\.")
# Softmax does not see a key's bias: its gradient is rounding noise.
NOISE = ("k_proj.bias", "attn.qkv.bias")


def scale_of(name: str) -> float:
    """RATES by hand: the image tower has two blocks."""
    if name.startswith("image.vit."):
        block = BLOCK.match(name)
        if block:
            return {"0": 0.25, "1": 0.5}[block[2]]
        return 1.0 if name.startswith("image.vit.norm.") else 0.125
    return 0.25 if name.startswith("text.") else 1.0


def orthogonal(matrix):
    """Five iterations of X <- a X + (b A + c A A) X with A = X X', in fp64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / matrix.norm()
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Reference:
    """The update rules as their papers write them, tensor by tensor, in fp64."""

    def __init__(self, name):
        self.name, self.state, self.step = name, {}, 0

    def update(self, gradients, weights):
        self.step += 1
        for name, gradient in gradients.items():
            weight, g = weights[name], gradient.double()
            w = weight.detach().double()
            decay = DECAY if weight.ndim > 1 else 0.0
            is_matrix = bool(BLOCK.match(name)) and weight.ndim == 2
            rule = getattr(self, self.name) if self.name != "muon" or is_matrix else self.adamw
            m, v = self.state.setdefault(name, (torch.zeros_like(w), torch.zeros_like(w)))
            w, *self.state[name] = rule(w, g, m, v, LR * scale_of(name), decay)
            weight.data.copy_(w)

    def _adam(self, g, m, v, beta1, beta2, eps):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1**self.step), v / (1 - beta2**self.step)
        return m_hat / (v_hat.sqrt() + eps), m, v

    def adamw(self, w, g, m, v, lr, decay):
        update, m, v = self._adam(g, m, v, 0.9, 0.98, 1e-8)
        return w - lr * (update + decay * w), m, v

    def lion(self, w, g, m, v, lr, decay):
        direction = (0.9 * m + 0.1 * g).sign()
        return w - lr * (direction + decay * w), 0.99 * m + 0.01 * g, v

    def lamb(self, w, g, m, v, lr, decay):
        update, m, v = self._adam(g, m, v, 0.9, 0.999, 1e-6)
        update = update + decay * w
        # Without weight decay there is no trust ratio (biases and norms).
        trust = w.norm() / update.norm() if decay and w.norm() > 0 and update.norm() > 0 else 1.0
        return w - lr * trust * update, m, v

    def muon(self, w, g, m, v, lr, decay):
        m = 0.95 * m + 0.05 * g
        size = 0.2 * math.sqrt(max(w.shape))
        return w - lr * (size * orthogonal(0.05 * g + 0.95 * m) + decay * w), m, v


def train(folder, name, stage, steps=STEPS, seed=0):
    """A run of this rank after so many steps, with the optimizer's own loop over its groups."""
    overrides = [f"optimizer.name={name}", *SETTINGS, f"train.seed={seed}"]
    run = tiny_run.TinyRun(folder, stage, overrides=overrides)
    for group in run.engine.optimizer.param_groups:
        group["lr"] = LR * group["lr_scale"]
    for step in range(steps):
        run.step(step)
    return run


def expected_weights(folder, name):
    """The weights after STEPS of the plain rule, on one rank without DeepSpeed's optimizer."""
    run = tiny_run.TinyRun(folder, 0, overrides=[f"optimizer.name={name}", *SETTINGS])
    weights = {n: p for n, p in run.engine.module.named_parameters() if p.requires_grad}
    reference = Reference(name)

    def update():
        reference.update({n: p.grad for n, p in weights.items()}, weights)
        run.engine.zero_grad()

    run.engine.step = update
    for step in range(STEPS):
        run.step(step)
    return {n: p.detach().clone() for n, p in weights.items()}


@pytest.fixture(scope="module", autouse=True)
def in_fp32():
    """Muon orthogonalises in fp32 here, so that it can be compared with the formula."""
    before, muon.PRECISION = muon.PRECISION, torch.float32
    yield
    muon.PRECISION = before


def test_two_ranks_of_every_stage_update_as_the_plain_rule_on_one(run_distributed, tmp_path):
    expected = run_distributed(
        lambda: {name: expected_weights(tmp_path, name) for name in STAGES}, 1
    )[0]

    def everything():
        return {
            (name, stage): train(tmp_path, name, stage).gathered()
            for name, stages in STAGES.items()
            for stage in stages
        }

    found, _ = run_distributed(everything, 2)
    for (name, stage), state in found.items():
        num_apart = num_elements = 0
        for key, weight in expected[name].items():
            if key.endswith(NOISE):
                continue
            # Of one step; the rest is the order in which the ranks add up.
            apart = (state[key, "master"] - weight).abs() > 1e-3 * LR * scale_of(key)
            assert name == "lion" or not apart.any(), f"{key} of {name} under ZeRO-{stage}"
            if not key.endswith("token_embedding.weight"):  # most rows get no gradient
                num_apart, num_elements = num_apart + apart.sum(), num_elements + apart.numel()
        # Lion takes the sign, also of what is nothing but a rounding.
        assert num_apart < 2e-3 * num_elements, (name, stage, num_apart, num_elements)


# The stages that go on from each other's checkpoints on two ranks; one rank comes last.
CHAIN = (0, 1, 3, 2)


@pytest.mark.parametrize("name", ["lion", "lamb", "muon"])
def test_state_goes_on_from_stage_to_stage_and_to_another_number_of_ranks(
    run_distributed, tmp_path, name
):
    root = tmp_path / "checkpoints"
    chain = [stage for stage in CHAIN if stage in STAGES[name]] * (2 if name == "lamb" else 1)

    def save(run, step):
        run.save(root, {"samples": 8 * step, "step": step}, keep=9)
        run.step(step)
        return run.gathered()

    def resume(stage, step):
        """The state where the checkpoint's run is one step later."""
        run = train(tmp_path, name, stage, steps=0, seed=step)
        folder = checkpoint_folder.find(root, "auto")
        checkpoint.load(folder, run.engine, run.teacher, step)
        run.step(step)
        return run, run.gathered()

    def go_through_the_chain():
        run = train(tmp_path, name, chain[0], steps=2)
        states = [save(run, 2)]
        for step, stage in enumerate(chain, 2):
            run, reached = resume(stage, step)
            states += [reached, save(run, step + 1)]
        return states

    states = run_distributed(go_through_the_chain, 2)[0]
    last = len(chain) + 2
    states.append(run_distributed(lambda: resume(chain[0], last)[1], 1)[0])
    kinds = {kind for _, kind in states[0]}
    moments = {"lion": {"exp_avg"}, "lamb": {"exp_avg", "exp_avg_sq"}}
    assert kinds == {"master"} | moments.get(name, {"exp_avg", "exp_avg_sq", "momentum_buffer"})
    for index in range(0, len(states), 2):
        uninterrupted, resumed = states[index : index + 2]
        assert uninterrupted.keys() == resumed.keys()
        apart = total = 0
        for key, value in uninterrupted.items():
            if not key[0].endswith((*NOISE, "token_embedding.weight")):
                tolerance = 1e-5 * value.abs().max() + 1e-6
                apart += ((resumed[key] - value).abs() > tolerance).sum()
                total += value.numel()
        assert apart <= (2e-3 * total if name == "lion" else 0), (index, apart, total)


def test_muon_keeps_momentum_of_its_matrices_alone(run_distributed, tmp_path):
    def kinds():
        kinds = {}
        for name, kind in train(tmp_path, "muon", 3, steps=1).gathered():
            kinds.setdefault(name, set()).add(kind)
        return kinds

    for name, found in run_distributed(kinds, 2)[0].items():
        is_matrix = BLOCK.match(name) and name.endswith(".weight") and "norm" not in name
        own = {"momentum_buffer"} if is_matrix else {"exp_avg", "exp_avg_sq"}
        assert found == {"master"} | own, name
