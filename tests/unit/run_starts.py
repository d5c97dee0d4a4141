"""Starts in a run folder, as far as they go before the ranks meet, and their checkpoints."""

import json
import os

from small_recipe import SMALL_RECIPE

from aclip.config.ds_config import read_ds_config
from aclip.config.recipe_file import load_recipe
from aclip.lock import release
from aclip.run_folder import checkpoint_folder
from aclip.training.run_record import record_run
from aclip.training.take_folder import find_beginning, take_folder, with_init

BATCH, SIZE = 4, 24  # six steps an epoch
TINY = [f"train.global_batch_size={BATCH}", "train.epochs=1", "optimizer.lr=1e-3"]
ZERO1 = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}


def save(run, samples, name=None):
    """A checkpoint as far as a start looks into it before it loads one."""
    root = run / "checkpoints"
    partial = root / "partial.tmp"
    partial.mkdir(parents=True)
    state = {"samples": samples, "step": samples // BATCH, "data": {"samples": SIZE}}
    (partial / "state.json").write_text(json.dumps(state))
    folder = root / (name or f"samples-{samples:012d}")
    checkpoint_folder.publish(root, partial, folder)
    return folder


def config(tmp_path, values):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(values))
    return read_ds_config(str(path), BATCH, 1)


def start(run, resume="auto", overrides=(), ds_values=ZERO1, allow_changes=False, saves=()):
    """What a start finds; it then records itself, and saves at these numbers of samples."""
    recipe, ds_config = (
        load_recipe(SMALL_RECIPE, [*TINY, *overrides]),
        config(run.parent, ds_values),
    )
    try:
        found = take_folder(run, resume, recipe, ds_config, allow_changes)
    finally:
        release(run)
    recipe = with_init(recipe, found["init"])
    beginning = find_beginning(run, resume)
    samples = 0
    if beginning.checkpoint is not None:
        folder = run.parent / beginning.checkpoint
        samples = checkpoint_folder.read_progress(folder)["samples"]
        if beginning.is_rewind:
            checkpoint_folder.make_latest(run / "checkpoints", folder)
    if not found["is_complete"]:
        begun, is_first = beginning.record, beginning.is_first
        record_run(run, recipe, ds_config.values, None, [], samples, begun, is_first)
    for each in saves:
        save(run, each)
    return None if found["checkpoint"] is None else os.path.basename(found["checkpoint"])


def at(samples):
    return f"samples-{samples:012d}"
