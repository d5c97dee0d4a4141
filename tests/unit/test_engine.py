"""What depends on a GPU in building the engine, seen without one."""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from torch import nn

from aclip.engine import process_group
from aclip.engine.gradient_norm import found_by_engine, gradient_norm
from aclip.engine.optimizer import MOMENTS, optimizer_bytes
from aclip.engine.sharded_state import ShardedState
from aclip.errors import ConfigError


class TwoGpus:
    """DeepSpeed's accelerator on the second rank of a node with GPUs."""

    def __init__(self):
        self.current = 0

    def device_name(self):
        return "cuda"

    def communication_backend_name(self):
        return "nccl"

    def device_count(self):
        return 2

    def set_device(self, index):
        self.current = index

    def current_device_name(self):
        return f"cuda:{self.current}"


def test_each_rank_takes_its_own_device_before_anything_is_made(monkeypatch):
    accelerator, at_start = TwoGpus(), []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # set here, so that it is taken back
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setattr(process_group, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(
        process_group.deepspeed,
        "init_distributed",
        lambda *args, **kwargs: at_start.append(accelerator.current),
    )
    assert process_group.init_distributed() == torch.device("cuda:1")
    assert at_start == [1]
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_a_port_in_use_is_named_and_a_start_may_be_tried_again(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**place, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        code = (
            "from aclip.cli import run_reporting_errors\n"
            "from aclip.engine.process_group import init_distributed\n"
            "run_reporting_errors(init_distributed)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"[rank 0] error: MASTER_PORT is {port}, which another process" in done.stderr


def sharded_state(model, optimizer):
    return ShardedState(
        SimpleNamespace(
            module=model,
            device=torch.device("cpu"),
            optimizer=optimizer,
            zero_optimization_stage=lambda: 0,
        )
    )


def test_state_that_is_loaded_lies_on_the_device_of_its_parameter():
    model = nn.Linear(3, 2, device="meta")
    fused = torch.optim.AdamW(model.parameters(), lr=0.1)
    fused.param_groups[0]["fused"] = True  # which the constructor refuses on this device
    state = sharded_state(model, fused)
    for kind in MOMENTS:
        state.load("weight", kind, torch.ones(2, 3))
    state.load_scalars({"step": torch.tensor(5.0)})
    loaded = fused.state[model.weight]
    # torch's fused AdamW refuses a step count that lies elsewhere.
    assert {name: value.device.type for name, value in loaded.items()} == {
        name: "meta" for name in ("step", *MOMENTS)
    }


class CpuAdam(torch.optim.Optimizer):
    """DeepSpeed's Adam for the CPU without its kernel, which needs a compiler."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})


def test_step_count_is_in_the_type_that_each_adam_counts_in(monkeypatch):
    monkeypatch.setattr(deepspeed.ops.adam, "DeepSpeedCPUAdam", CpuAdam)
    model = nn.Linear(3, 2)
    of_torch = torch.optim.AdamW(model.parameters(), lr=0.1)
    of_cpu = CpuAdam(model.parameters())
    for optimizer, saved in ((of_torch, 7), (of_cpu, torch.tensor(7.0))):
        state = sharded_state(model, optimizer)
        assert state.family == "Adam"
        state.load_scalars({"step": saved})
        assert state.scalars() == {"step": 7}
    steps = [of_torch.state[parameter]["step"] for parameter in model.parameters()]
    assert all(step.dtype == torch.float32 and step.shape == () for step in steps)
    assert steps[0] is not steps[1], "torch adds 1 to each"
    assert type(of_cpu.state[model.weight]["step"]) is int


def test_scalars_come_back_as_they_were():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.NAdam(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.state[model.weight]["count"] = optimizer.state[model.bias]["count"] = 3
    scalars = sharded_state(model, optimizer).scalars()
    assert scalars.keys() == {"step", "mu_product", "count"} and scalars["count"] == 3
    other = torch.optim.NAdam(model.parameters(), lr=0.1)
    sharded_state(model, other).load_scalars(scalars)
    for kind, value in other.state[model.bias].items():
        expected = optimizer.state[model.bias][kind]
        assert type(value) is type(expected) and value == expected


def test_scalar_that_differs_between_parameters_is_refused():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step, parameter in enumerate(model.parameters()):
        optimizer.state[parameter]["step"] = torch.tensor(float(step))
    with pytest.raises(ConfigError, match="AdamW keeps step 1.0 for bias and 0.0 for another"):
        sharded_state(model, optimizer).scalars()


def test_optimizer_bytes_are_two_moments_and_a_master_of_bf16_weights():
    assert optimizer_bytes(10, torch.float32) == 80
    assert optimizer_bytes(10, torch.bfloat16) == 120


def test_norm_of_the_gradient_is_that_of_all_parameters_together():
    model = nn.Linear(2, 2)
    model.weight.grad, model.bias.grad = torch.tensor([[1.0, -2.0], [4.0, 0.0]]), None
    engine = SimpleNamespace(
        module=model, device=torch.device("cpu"), zero_optimization_stage=lambda: 0
    )
    assert gradient_norm(engine).item() == pytest.approx(21**0.5)
    model.bias.grad = torch.tensor([2.0, 0.0], dtype=torch.float32)
    assert gradient_norm(engine).item() == pytest.approx(5)
    model.bias.grad[1] = float("inf")
    assert gradient_norm(engine).item() == float("inf")
    model.bias.grad[1] = float("nan")
    assert gradient_norm(engine).isnan()
    assert found_by_engine(engine) is None
