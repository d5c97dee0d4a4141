"""The real clip_benchmark command and launch/evaluate.py say the same of one export."""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from clip_benchmark_venv import (
    ROOT,
    clip_benchmark_arguments,
    ensure_command,
    write_layout,
)
from PIL import Image
from small_recipe import SMALL_RECIPE
from written_run import write_run

pytestmark = [pytest.mark.clip_benchmark, pytest.mark.e2e]

CLASSES = ["red", "green", "blue", "dark", "bright", "grey", "yellow thing"]
TEMPLATES = ["a photo of a {c}.", "the {c}", "a very {c} picture, taken long ago"]


def write_shard(path, num_samples):
    """Coloured noise of odd sizes with an unbalanced label and one to five captions."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:
        for number in range(num_samples):
            height, width = rng.integers(40, 130, 2)
            tint = rng.integers(20, 236, 3)
            pixels = (tint + rng.normal(0, 40, (height, width, 3))).clip(0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).resize((int(width), int(height))).save(buffer, "JPEG")
            words = [
                f"{CLASSES[i]} number {i * number}" for i in rng.integers(7, size=1 + number % 5)
            ]
            members = {
                "jpg": buffer.getvalue(),
                "cls": str(min(int(rng.geometric(0.35)) - 1, 6)).encode(),
                "txt": "\n".join(f"a {word} of {number}" for word in words).encode(),
            }
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def export_folder(tmp_path_factory):
    """An open_clip export of a tiny run whose weights are random, so that embeddings spread."""
    from aclip.config.recipe_file import load_recipe
    from aclip.weights.export import export

    folder = tmp_path_factory.mktemp("model")
    run, *_ = write_run(folder / "run", load_recipe(SMALL_RECIPE), has_teacher=False)
    out = folder / "export"
    arguments = {"checkpoint": str(run), "out": str(out), "format": "open_clip", "model": None}
    export(argparse.Namespace(**arguments))
    return out


def run(*command, cache=""):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACLIP_CACHE": str(cache)}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_both_agree_to_the_last_digit(export_folder, tmp_path):
    write_shard(tmp_path / "shard.tar", 150)
    sets = {"classification": tmp_path / "classes", "retrieval": tmp_path / "captions"}
    write_layout(sets["classification"], tmp_path / "shard.tar", CLASSES, TEMPLATES)
    write_layout(sets["retrieval"], tmp_path / "shard.tar", None, [])
    theirs = {}
    for task, dataset in sets.items():
        output = tmp_path / f"{task}.json"
        run(ensure_command(), *clip_benchmark_arguments(export_folder, dataset, task, output))
        theirs |= json.loads(output.read_text())["metrics"]

    out = tmp_path / "ours"
    command = [sys.executable, "launch/evaluate.py", str(export_folder), "--output", str(out)]
    table = run(*command, "--suite", *map(str, sets.values()), cache=tmp_path / "cache")
    results = json.loads((out / "results.json").read_text())["sets"]
    classes, captions = (results[str(dataset)]["metrics"] for dataset in sets.values())

    assert classes["zero_shot_top1"] == theirs["acc1"]
    assert classes["zero_shot_top5"] == theirs["acc5"]
    assert classes["zero_shot_mean_per_class"] == theirs["mean_per_class_recall"]
    assert f"{100 * theirs['acc1']:.1f}" in table
    assert 0.02 < theirs["acc1"] < 0.9, "neither nothing nor all is right"
    for k in (1, 5, 10):
        for ours, name in (("image_to_text", "text"), ("text_to_image", "image")):
            value = theirs[f"{name}_retrieval_recall@{k}"]  # it averages in fp32
            assert np.float32(captions[f"{ours}_r{k}"]) == np.float32(value), (ours, k)
    assert theirs["text_retrieval_recall@10"] > theirs["text_retrieval_recall@1"]
    assert captions["num_captions"] == sum(1 + number % 5 for number in range(150))
