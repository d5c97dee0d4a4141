"""ds_configs: what ships is accepted, what DeepSpeed would misread in silence is refused."""

import json
from pathlib import Path

import pytest
import torch

from aclip.config.ds_config import read_ds_config
from aclip.errors import ConfigError

SHIPPED = Path(__file__).parents[2] / "ds_configs"
STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def refusal(path, global_batch_size=32, world_size=2):
    with pytest.raises(ConfigError) as caught:
        read_ds_config(path, global_batch_size, world_size)
    message = str(caught.value)
    assert "\n" not in message
    assert path in message or "train.global_batch_size" in message
    return message


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("name", STAGES)
def test_shipped_file_is_accepted(name, world_size):
    config = read_ds_config(str(SHIPPED / f"{name}.json"), 4096, world_size)
    assert config.stage == STAGES[name]
    assert config.dtype == (torch.float32 if name == "zero0" else torch.bfloat16)
    assert config.offloads_optimizer == (name == "zero3_offload")
    assert config.micro_batch_size * config.num_micro_steps * world_size == 4096
    assert "gradient_clipping" in json.loads((SHIPPED / f"{name}.json").read_text())


def test_every_shipped_file_is_listed_here():
    assert {path.stem for path in SHIPPED.glob("*.json")} == set(STAGES)


@pytest.mark.parametrize(
    "sizes, world_size, micro, num_micro_steps",
    [
        ({}, 1, 96, 1),
        ({}, 2, 48, 1),
        ({"train_micro_batch_size_per_gpu": 12}, 2, 12, 4),
        ({"train_micro_batch_size_per_gpu": 48}, 2, 48, 1),
        ({"gradient_accumulation_steps": 3}, 2, 16, 3),
        ({"gradient_accumulation_steps": 3, "train_micro_batch_size_per_gpu": 4}, 8, 4, 3),
        ({"train_batch_size": 96}, 4, 24, 1),
    ],
)
def test_open_batch_sizes_follow_from_the_global_batch(
    write, sizes, world_size, micro, num_micro_steps
):
    config = read_ds_config(write(sizes), 96, world_size)
    assert (config.micro_batch_size, config.num_micro_steps) == (micro, num_micro_steps)
    assert config.values["train_batch_size"] == 96
    assert config.values["train_micro_batch_size_per_gpu"] == micro
    assert config.values["gradient_accumulation_steps"] == num_micro_steps


def test_clipping_is_written_out_as_off_and_a_given_value_stays(write):
    assert read_ds_config(write({}), 8, 1).values["gradient_clipping"] == 0.0
    assert (
        read_ds_config(write({"gradient_clipping": 3.0}), 8, 1).values["gradient_clipping"] == 3.0
    )


def test_deepspeed_gets_no_accumulation_and_no_contradiction(write):
    config = read_ds_config(write({"train_micro_batch_size_per_gpu": 4}), 32, 2)
    values = config.engine_values()
    # aclip counts the micro_steps itself.
    assert values["gradient_accumulation_steps"] == 1
    assert values["train_micro_batch_size_per_gpu"] == 4
    assert "train_batch_size" not in values
    assert config.values["gradient_accumulation_steps"] == 4


def test_missing_file_is_refused(tmp_path):
    assert "there is no such file" in refusal(str(tmp_path / "absent.json"))


@pytest.mark.parametrize("text", ["{", "gradient_clipping: 0", "", "{'a': 1}"])
def test_file_that_is_not_json_is_refused(write, text):
    assert "is not JSON" in refusal(write(text))


def test_binary_file_is_refused(tmp_path):
    path = tmp_path / "ds.json"
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert "is not JSON" in refusal(str(path))


def test_json_that_is_no_object_is_refused(write):
    assert "JSON object" in refusal(write([1, 2]))


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("zero_optimisation", "zero_optimization"),
        ("gradient_cliping", "gradient_clipping"),
        ("train_micro_batch_size_per_gpus", "train_micro_batch_size_per_gpu"),
        ("bf_16", "bf16"),
    ],
)
def test_unknown_key_names_the_nearest(write, key, nearest):
    message = refusal(write({key: 1}))
    assert key in message
    assert f"did you mean {nearest}?" in message


@pytest.mark.parametrize(
    "values, named",
    [
        ({"gradient_clipping": "auto"}, "gradient_clipping"),
        ({"bf16": {"enabled": "auto"}}, "bf16.enabled"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "auto"}}},
            "zero_optimization.offload_optimizer.device",
        ),
        ({"train_micro_batch_size_per_gpu": "auto"}, "train_micro_batch_size_per_gpu"),
    ],
)
def test_auto_is_refused_with_its_whole_key(write, values, named):
    message = refusal(write(values))
    assert message.startswith(f"{named} is 'auto'")


def test_fp16_is_refused(write):
    assert refusal(write({"fp16": {"enabled": True}})).startswith("fp16.enabled")


def test_fp16_that_is_off_is_accepted(write):
    assert read_ds_config(write({"fp16": {"enabled": False}}), 8, 1).dtype == torch.float32


@pytest.mark.parametrize("zero", [{}, {"zero_optimization": {"stage": 0}}])
def test_bf16_without_zero_is_refused(write, zero):
    message = refusal(write({"bf16": {"enabled": True}} | zero))
    assert "bf16.enabled" in message
    assert "stage 0" in message
    assert "stage 1" in message


@pytest.mark.parametrize("stage", [4, -1, "2", None])
def test_unknown_stage_is_refused(write, stage):
    message = refusal(write({"zero_optimization": {"stage": stage}}))
    assert message.startswith(f"zero_optimization.stage is {stage!r}")


def test_train_batch_size_that_contradicts_the_recipe_is_refused(write):
    message = refusal(write({"train_batch_size": 64}))
    assert "train_batch_size is 64" in message
    assert "train.global_batch_size is 32" in message


def test_ranks_that_do_not_divide_the_global_batch_are_refused(write):
    message = refusal(write({}), world_size=3)
    assert "32" in message
    assert "3 ranks" in message


@pytest.mark.parametrize(
    "sizes",
    [
        {"train_micro_batch_size_per_gpu": 5},
        {"train_micro_batch_size_per_gpu": 32},
        {"gradient_accumulation_steps": 3},
        {"gradient_accumulation_steps": 64},
        {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
    ],
)
def test_micro_batches_that_do_not_make_the_global_batch_are_refused(write, sizes):
    message = refusal(write(sizes))
    assert "train.global_batch_size is 32" in message
    assert "2 ranks" in message
    for key, value in sizes.items():
        assert f"{key} {value}" in message


@pytest.mark.parametrize("key", ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps"])
@pytest.mark.parametrize("value", [0, -4, 2.5, "4", True, None])
def test_batch_size_that_is_no_whole_number_is_refused(write, key, value):
    assert refusal(write({key: value})).startswith(f"{key} is {value!r}")


@pytest.mark.parametrize("key", ["optimizer", "scheduler"])
def test_what_the_recipe_owns_is_refused(write, key):
    message = refusal(write({key: {"type": "AdamW", "params": {"lr": 1}}}))
    assert message.startswith(f"{key} is set in")
    assert "recipe" in message


@pytest.mark.parametrize(
    "values, word",
    [
        ({"bf16": True}, "bf16"),
        ({"fp16": None}, "fp16"),
        ({"zero_optimization": 2}, "zero_optimization"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": None}}, "offload_optimizer"),
        ({"activation_checkpointing": {}}, "no effect: .*model.image.recompute; remove it"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning is set"),
        ({"data_types": None}, "data_types is null"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "offload_optimizer.device is 'nvme'",
        ),
        ({"amp": {"enabled": True}}, "amp"),
        ({"gradient_clipping": None}, "gradient_clipping"),
        (
            {
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": 1},
                "data_types": {"grad_accum_dtype": "fp32"},
            },
            "grad_accum_dtype",
        ),
    ],
)
def test_section_that_deepspeed_would_misread_is_refused(values, word, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=word):
        read_ds_config(str(path), 8, 1)


def test_offload_below_stage_3_is_refused_with_accumulation_alone(tmp_path):
    path = tmp_path / "ds.json"
    values = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    path.write_text(json.dumps(values))
    assert read_ds_config(str(path), 8, 1).offloads_optimizer
    path.write_text(json.dumps({**values, "train_micro_batch_size_per_gpu": 4}))
    with pytest.raises(ConfigError, match="offload_optimizer"):
        read_ds_config(str(path), 8, 1)
