"""What depends on a GPU in building the engine, seen without one."""

from types import SimpleNamespace

import torch
from torch import nn

from aclip.engine import process_group
from aclip.engine.sharded_state import MOMENTS, ShardedState


class TwoGpus:
    """DeepSpeed's accelerator on the second rank of a node with GPUs."""

    def __init__(self):
        self.current = 0

    def device_name(self):
        return "cuda"

    def communication_backend_name(self):
        return "nccl"

    def set_device(self, index):
        self.current = index

    def current_device_name(self):
        return f"cuda:{self.current}"


def test_each_rank_takes_its_own_device_before_anything_is_made(monkeypatch):
    accelerator, at_start = TwoGpus(), []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(process_group, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(
        process_group.deepspeed,
        "init_distributed",
        lambda *args, **kwargs: at_start.append(accelerator.current),
    )
    assert process_group.init_distributed() == torch.device("cuda:1")
    assert at_start == [1]


def test_state_that_is_loaded_lies_on_the_device_of_its_parameter():
    model = nn.Linear(3, 2, device="meta")
    fused = torch.optim.AdamW(model.parameters(), lr=0.1)
    state = ShardedState(
        SimpleNamespace(module=model, optimizer=fused, zero_optimization_stage=lambda: 0)
    )
    for kind in MOMENTS:
        state.load("weight", kind, torch.ones(2, 3))
    state.set_step(5)
    loaded = fused.state[model.weight]
    # torch's fused AdamW refuses a step count that lies elsewhere.
    assert {name: value.device.type for name, value in loaded.items()} == {
        name: "meta" for name in ("step", *MOMENTS)
    }
