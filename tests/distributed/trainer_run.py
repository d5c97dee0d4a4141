"""Runs of the trainer on tiny towers and data, with a record of what every step saw."""

import io
import json
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from small_recipe import SMALL_RECIPE

from aclip.config.ds_config import read_ds_config
from aclip.config.recipe_file import load_recipe
from aclip.data.shards.listing import Shard, index_shards
from aclip.engine.process_group import init_distributed
from aclip.run_folder import checkpoint_folder
from aclip.training.stage import FIRST_STAGE, Stage
from aclip.training.trainer import Trainer

NUM_SHARDS, SHARD_SIZE, BATCH = 4, 20, 16
STEPS = 20  # five epochs of eighty samples
RECIPE = [
    f"train.global_batch_size={BATCH}",
    f"train.epochs={STEPS * BATCH / (NUM_SHARDS * SHARD_SIZE)}",
    "train.warmup_epochs=1",
    "optimizer.lr=1e-3",
    "train.log_every=1",
    "train.checkpoint_every=1000000",
    "train.evaluate_every=0",
    "model.image.resolution=32",
    "model.image.kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
    "model.text={width: 16, heads: 2, layers: 1, context_length: 16}",
    "model.embed_dim=12",
    "loss.simclr=1",
    "loss.byol=2",
    "loss.simclr_widths=[24, 24, 8]",
    "loss.byol_widths=[24, 8]",
    "teacher.resolution=32",
    "mask.block_size=1",
    "data.workers=0",
]


def write_shards(folder: Path) -> list[Shard]:
    """Four shards of twenty pictures of noise, indexed."""
    rng = np.random.default_rng(0)
    for shard in range(NUM_SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for index in range(SHARD_SIZE):
                pixels = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).resize((48, 40)).save(buffer, "JPEG")
                caption = f"a photo of {'thing ' * int(rng.integers(1, 6))}{shard} {index}"
                for suffix, content in (("jpg", buffer.getvalue()), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{index:03d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return index_shards([str(folder / f"{shard}.tar") for shard in range(NUM_SHARDS)])


class Recorder(Trainer):
    """Writes each step's loss and this rank's sample keys, boxes, colours and noise to a file."""

    record: Path
    kill_at: int | None = None
    on_step: Callable[[int], None] | None = None

    def train_step(self, batch):
        terms = super().train_step(batch)
        line = {
            "step": self.step,
            "keys": batch.keys,
            "boxes": batch.student_boxes.tolist(),
            "colours": batch.augment_params.tolist(),
            "noise": [] if batch.mask_noise is None else batch.mask_noise.tolist(),
        }
        with open(self.record, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.kill_at == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.on_step is not None:
            self.on_step(self.step)
        return terms


def run_trainer(
    run,
    shards,
    stage="0",
    micro_batch=None,
    overrides=(),
    kill_at=None,
    stop_at=None,
    on_step=None,
    notes=None,
    evaluator=None,
    place=FIRST_STAGE,
):
    """Runs a trainer on this rank to its end; called inside run_distributed.

    Args:
        notes: folder of the test's own files, where they don't belong into `run`.

    Returns:
        Whether the run goes on behind this stage.
    """
    notes = notes or run
    device = init_distributed()
    ranks = int(os.environ["WORLD_SIZE"])
    values = {"gradient_clipping": 0.0, "zero_optimization": {"stage": int(stage[0])}}
    if stage.endswith("_offload"):
        values["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if stage[0] == "3":
        values["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    if micro_batch is not None:
        values["train_micro_batch_size_per_gpu"] = micro_batch
    run.mkdir(exist_ok=True)
    path = notes / f"ds-{os.environ['RANK']}.json"
    path.write_text(json.dumps(values))
    recipe = load_recipe(SMALL_RECIPE, [*RECIPE, *overrides])
    ds_config = read_ds_config(str(path), BATCH, ranks)
    resume_from = checkpoint_folder.find(run / "checkpoints", "auto")
    stage = Stage(recipe, ds_config, shards, val_shards=[], place=place)
    trainer = Recorder(stage, run, resume_from, device, evaluator=evaluator)
    trainer.record = notes / f"record-{os.environ['RANK']}-of-{ranks}.jsonl"
    trainer.kill_at, trainer.on_step = kill_at, on_step
    if stop_at is not None:
        trainer.num_steps = stop_at
    goes_on = trainer.train()
    trainer.close()
    return goes_on


def read_losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["terms"]["loss"] for record in records]


def train_in(run, shards, **options):
    return lambda: run_trainer(run, shards, **options)
