"""The ds_config: read and checked, without importing DeepSpeed, so that a mistake ends at once.

The ds_config owns micro-batch, precision, ZeRO, clipping, communication and offload; the recipe
owns the global batch, the optimizer and its schedule. A contradiction is refused here.
"""

import copy
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aclip.errors import ConfigError

# DeepSpeed ignores a misspelt top-level key silently, so the known ones are listed here (0.19.8).
KNOWN_KEYS = frozenset(
    (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "fp16",
        "bf16",
        "gradient_clipping",
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "communication_data_type",
        "seq_parallel_communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "gradient_allreduce_op",
        "sparse_gradients",
        "disable_allgather",
        "data_types",
        "dump_state",
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "log_level",
        "comms_logger",
        "flops_profiler",
        "aio",
        "compile",
        "tensorboard",
        "wandb",
        "csv_monitor",
        "comet",
        "checkpoint",
        "nebula",
        "elasticity",
        "autotuning",
        "monitor_config",
        "disable_python_gc",
        "tensor_parallel",
        "hybrid_engine",
        "sparse_attention",
        "pipeline",
        "use_node_local_storage",
        "graph_harvesting",
        "timers",
        "dataloader_drop_last",
        "managed_gradient_accumulation",
        "amp",
        "torch_autocast",
    )
)
NO_EFFECT = {
    "activation_checkpointing": "the towers compute activations anew by model.image.recompute",
    "compression_training": "aclip compresses no model",
    "curriculum_learning": "aclip reads the data by itself",
    "data_efficiency": "aclip reads the data by itself",
}
"""Keys that DeepSpeed reads, but which would change nothing here, and why."""
RECIPE_KEYS = {
    "optimizer": "optimizer",
    "scheduler": "optimizer (lr, warmup_start_lr, final_lr) and train.warmup_epochs",
}


@dataclass(frozen=True)
class DsConfig:
    """A checked ds_config.

    Attributes:
        path: the file it came from.
        values: the file's content with train_batch_size and accumulation written out.
        micro_batch_size: images per rank and micro_step.
        num_micro_steps: micro_steps of one optimizer step.
        stage: the ZeRO stage.
        dtype: compute dtype, torch.float32 or torch.bfloat16.
    """

    path: str
    values: dict[str, Any]
    micro_batch_size: int
    num_micro_steps: int
    stage: int
    dtype: torch.dtype

    @property
    def offloads_optimizer(self) -> bool:
        offload = self.values.get("zero_optimization", {}).get("offload_optimizer", {})
        return offload.get("device", "none") != "none"

    @property
    def adds_up_in_fp32(self) -> bool:
        """Whether gradients add up in fp32. With ZeRO-2 and one micro_step there is nothing to add
        up, and DeepSpeed would run two more operations for each parameter to the same result."""
        asked = self.values.get("data_types", {}).get("grad_accum_dtype") == "fp32"
        return asked and not (self.stage == 2 and self.num_micro_steps == 1)

    def engine_values(self) -> dict[str, Any]:
        """What DeepSpeed gets. aclip counts micro_steps itself, since a step of several runs one
        backward pass more than it has micro_steps (aclip/training/stepper.py), and it looks for
        gradients that are not finite itself (aclip/engine/gradient_norm.py)."""
        values = copy.deepcopy(self.values)
        if not self.adds_up_in_fp32:
            values.get("data_types", {}).pop("grad_accum_dtype", None)
        if self.dtype == torch.bfloat16:
            values["bf16"].setdefault("check_grad_overflow", False)
        if self.stage in (1, 2) and not (values["gradient_clipping"] or self.offloads_optimizer):
            values["zero_optimization"].setdefault("compute_grad_norm", False)
        values.pop("train_batch_size")
        values["train_micro_batch_size_per_gpu"] = self.micro_batch_size
        values["gradient_accumulation_steps"] = 1
        values.setdefault("steps_per_print", 2**31)
        # DeepSpeed's own timer waits for the device in every forward pass and step (0.19.8).
        values.setdefault("timers", {"throughput": {"enabled": False}})
        values["zero_force_ds_cpu_optimizer"] = False
        return values


def read_ds_config(path: str, global_batch_size: int, world_size: int) -> DsConfig:
    """Reads and checks a ds_config file.

    Raises:
        ConfigError: the file is missing or not JSON, it has an unknown top-level key, 'auto' where
            DeepSpeed would take a default, or fp16, or a batch size contradicts the recipe or the
            number of ranks.
    """
    values = _read_json(path)
    _refuse_unknown_keys(values, path)
    _refuse_auto(values, path, "")
    _refuse_malformed_sections(values, path)
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ConfigError(f"zero_optimization.stage is {stage!r} in {path}; choose 0, 1, 2 or 3")
    micro, num_micro_steps = _batch_sizes(values, path, global_batch_size, world_size)
    values["train_batch_size"] = global_batch_size
    values["train_micro_batch_size_per_gpu"] = micro
    values["gradient_accumulation_steps"] = num_micro_steps
    offload = values.get("zero_optimization", {}).get("offload_optimizer", {})
    if stage in (1, 2) and num_micro_steps > 1 and offload.get("device", "none") != "none":
        raise ConfigError(
            f"zero_optimization.offload_optimizer is set with stage {stage} in {path} and "
            f"{num_micro_steps} micro_steps, whose gradients DeepSpeed would not add up; use stage "
            "3 or a larger train_micro_batch_size_per_gpu"
        )
    if offload.get("device") == "nvme":
        raise ConfigError(
            f"zero_optimization.offload_optimizer.device is 'nvme' in {path}, but checkpoints are "
            "made of a state that lies in memory; use cpu"
        )
    # Unset means 1.0 to DeepSpeed, which clips silently.
    values.setdefault("gradient_clipping", 0.0)
    if stage == 3:
        # Unset means true, which patches torch's linear for the whole process and changes bf16.
        values["zero_optimization"].setdefault("memory_efficient_linear", False)
    return DsConfig(path, values, micro, num_micro_steps, stage, _dtype(values, stage, path))


def _read_json(path: str) -> dict:
    if not Path(path).is_file():
        raise ConfigError(
            f"--ds_config is {path}, but there is no such file; take one from ds_configs/"
        )
    try:
        values = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--ds_config is {path}, but it is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--ds_config is {path}, but it does not hold a JSON object")
    return values


def _refuse_unknown_keys(values: dict, path: str) -> None:
    for key in values:
        if key in RECIPE_KEYS:
            raise ConfigError(
                f"{key} is set in {path}, but the recipe owns it; remove it there and set the "
                f"recipe's {RECIPE_KEYS[key]}"
            )
        if key in NO_EFFECT:
            raise ConfigError(
                f"{key} is set in {path}, but would have no effect: {NO_EFFECT[key]}; remove it"
            )
        if key not in KNOWN_KEYS:
            nearest = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
            hint = f" (did you mean {nearest[0]}?)" if nearest else ""
            raise ConfigError(
                f"{key} in {path} is not a key that DeepSpeed reads{hint}; remove or rename it"
            )


def _refuse_malformed_sections(values: dict, path: str) -> None:
    zero = values.get("zero_optimization", {})
    names = ("zero_optimization", "bf16", "fp16", "data_types")
    sections = {name: values.get(name, {}) for name in names}
    if isinstance(zero, dict):
        sections["zero_optimization.offload_optimizer"] = zero.get("offload_optimizer", {})
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ConfigError(
                f"{name} is {json.dumps(section)} in {path}, but DeepSpeed reads an object there; "
                "write {...} or remove the key"
            )
    for name in ("amp", "torch_autocast"):
        if name in values:
            raise ConfigError(
                f"{name} is set in {path}, but aclip trains in bf16 or fp32; use bf16.enabled"
            )
    clipping = values.get("gradient_clipping", 0.0)
    if type(clipping) not in (int, float) or clipping < 0:
        raise ConfigError(f"gradient_clipping is {clipping!r} in {path}; give a number from 0")


def _refuse_auto(values: dict, path: str, prefix: str) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _refuse_auto(value, path, f"{prefix}{key}.")
        elif value == "auto":
            raise ConfigError(
                f"{prefix}{key} is 'auto' in {path}, which DeepSpeed would silently take for its "
                "default; write the value or remove the key"
            )


def _batch_sizes(
    values: dict, path: str, global_batch_size: int, world_size: int
) -> tuple[int, int]:
    """Micro-batch and micro_steps; what the file leaves open follows from the global batch."""
    micro = values.get("train_micro_batch_size_per_gpu")
    num_micro_steps = values.get("gradient_accumulation_steps")
    for key, value in values.items():
        if key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps") and (
            not isinstance(value, int) or isinstance(value, bool) or value < 1
        ):
            raise ConfigError(f"{key} is {value!r} in {path}; give a whole number from 1")
    train_batch_size = values.get("train_batch_size", global_batch_size)
    if train_batch_size != global_batch_size:
        raise ConfigError(
            f"train_batch_size is {train_batch_size} in {path}, but the recipe's "
            f"train.global_batch_size is {global_batch_size}; make them equal or remove the former"
        )
    if global_batch_size % world_size:
        raise ConfigError(
            f"train.global_batch_size is {global_batch_size}, which {world_size} ranks do not "
            "divide; change it or the number of ranks"
        )
    local = global_batch_size // world_size
    if micro is None:
        micro = local // (num_micro_steps or 1)
    if num_micro_steps is None:
        num_micro_steps = max(1, local // micro)
    if micro * num_micro_steps != local:
        raise ConfigError(
            f"train.global_batch_size is {global_batch_size}, but {world_size} ranks x "
            f"train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps "
            f"{num_micro_steps} make {world_size * micro * num_micro_steps}; change one of them in "
            f"{path} or the recipe"
        )
    return micro, num_micro_steps


def _dtype(values: dict, stage: int, path: str) -> torch.dtype:
    if values.get("fp16", {}).get("enabled"):
        raise ConfigError(
            f"fp16.enabled is true in {path}, but aclip trains in bf16 or fp32; use bf16.enabled"
        )
    if not values.get("bf16", {}).get("enabled"):
        return torch.float32
    if stage == 1 and values.get("data_types", {}).get("grad_accum_dtype") == "fp32":
        raise ConfigError(
            f"data_types.grad_accum_dtype is fp32 with bf16 and ZeRO stage 1 in {path}, "
            "for which DeepSpeed takes an optimizer without readable fp32 state; use stage 2"
        )
    if stage == 0:
        raise ConfigError(
            f"bf16.enabled is true with zero_optimization.stage 0 in {path}, where DeepSpeed has "
            "no fp32 masters to read; use stage 1, which is the same without sharding on one GPU"
        )
    return torch.bfloat16
