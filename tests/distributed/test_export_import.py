"""Weights out of and into real runs: every ZeRO stage exports what it trained, and starts from
what it is given."""

import argparse
import io
import json
import os
import tarfile

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_recipe import SMALL_RECIPE

from aclip.config.ds_config import read_ds_config
from aclip.config.recipe_file import dump_recipe, load_recipe
from aclip.data.shards.listing import index_shards
from aclip.engine.host_copy import HostBuffers
from aclip.engine.process_group import init_distributed
from aclip.engine.sharded_state import ShardedState
from aclip.engine.snapshot import Snapshot
from aclip.method.tokens import clip_tokens
from aclip.reports.figure import attention
from aclip.run_folder import checkpoint_folder
from aclip.training.stage import Stage
from aclip.training.trainer import Trainer
from aclip.weights.checkpoint_weights import load_checkpoint_weights
from aclip.weights.export import export

pytestmark = pytest.mark.distributed

BATCH, STEPS = 8, 2
RECIPE = [
    f"train.global_batch_size={BATCH}",
    "train.epochs=1",
    "train.warmup_epochs=0",
    "optimizer.lr=1e-3",
    "train.evaluate_every=0",
    "model.image.resolution=32",
    "model.image.kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
    "model.text={width: 16, heads: 2, layers: 1, context_length: 16}",
    "model.embed_dim=12",
    "loss.byol=2",
    "loss.byol_widths=[24, 8]",
    "teacher.resolution=32",
    "teacher.momentum=0.5",
    "mask.block_size=1",
    "data.workers=0",
]
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randint(256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(2)).byte()
MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
CAPTIONS = ["a thing", "one of many more things", "x"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for index in range(BATCH * STEPS // 2):
                buffer = io.BytesIO()
                Image.new("RGB", (40, 40), (20 * index, 90 * shard, 50)).save(buffer, "JPEG")
                caption = f"thing {shard} {index}".encode()
                for suffix, content in (("jpg", buffer.getvalue()), ("txt", caption)):
                    info = tarfile.TarInfo(f"{index:03d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return index_shards([str(folder / f"{shard}.tar") for shard in range(2)])


def build(run, shards, stage, dtype="fp32", overrides=()):
    """A trainer on this rank, which continues where the run has a checkpoint."""
    device = init_distributed()
    values = {"zero_optimization": {"stage": stage}}
    if stage == 3:
        values["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    if dtype == "bf16":
        values["bf16"] = {"enabled": True}
    run.mkdir(exist_ok=True)
    path = run / f"ds-{os.environ['RANK']}.json"
    path.write_text(json.dumps(values))
    recipe = load_recipe(SMALL_RECIPE, [*RECIPE, *overrides])
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    ds_config = read_ds_config(str(path), BATCH, int(os.environ["WORLD_SIZE"]))
    resume_from = checkpoint_folder.find(run / "checkpoints", "auto")
    return Trainer(Stage(recipe, ds_config, shards, []), run, resume_from, device)


def run_export(run, out, model):
    arguments = {"checkpoint": str(run), "out": str(out), "format": "open_clip", "model": model}
    export(argparse.Namespace(**arguments))


@torch.no_grad()
def open_clip_embeds(folder):
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    return model.encode_image(PIXELS), model.encode_text(tokens)


@pytest.mark.parametrize("stage, ranks", [(0, 1), (2, 2), (3, 2)])
def test_export_and_figure_compute_what_the_run_computed(
    run_distributed, tmp_path, shards, stage, ranks
):
    run = tmp_path / "run"

    def train():
        trainer = build(run, shards, stage)
        assert trainer.train()
        engine, teacher = trainer.stepper.engine, trainer.stepper.teacher
        engine.eval()
        tokens = clip_tokens(open_clip.SimpleTokenizer(context_length=16)(CAPTIONS))
        with torch.no_grad():
            student = engine("encode_image", PIXELS), engine("encode_text", tokens)
        pixels = (IMAGES / 255 - MEAN) / STD
        scores = teacher.forward(pixels).scores
        return student, (teacher.encode_image(PIXELS), teacher.encode_text(tokens)), scores

    student, teacher, scores = run_distributed(train, ranks)[0]
    for model, expected in (("student", student), ("teacher", teacher)):
        run_export(run, tmp_path / model, model)
        for theirs, ours in zip(open_clip_embeds(tmp_path / model), expected, strict=True):
            assert (theirs - ours).abs().max() < 1e-5
    assert (student[0] - teacher[0]).abs().max() > 1e-4
    shown = attention(load_checkpoint_weights(str(run), None), IMAGES)
    assert (shown - scores).abs().max() < 1e-6 < scores.std()


@pytest.mark.parametrize("stage, dtype", [(0, "fp32"), (2, "bf16"), (3, "bf16")])
def test_new_run_starts_from_the_given_weights_and_a_resumed_one_does_not(
    run_distributed, tmp_path, shards, stage, dtype
):
    first = tmp_path / "first"

    def train_first():
        build(first, shards, 0, overrides=["train.seed=3"]).train()

    run_distributed(train_first, 1)
    run_export(first, tmp_path / "export", "student")
    weights = load_file(next((first / "checkpoints").glob("samples-*")) / "student.safetensors")
    init = [f"model.init={tmp_path / 'export'}"]

    def start():
        trainer = build(tmp_path / "second", shards, stage, dtype, init)
        gathered = Snapshot(ShardedState(trainer.stepper.engine), HostBuffers()).collect()
        masters = {
            name: whole.clone() for (name, kind), whole in gathered.items() if kind == "master"
        }
        average = {n: t.clone() for n, t in trainer.stepper.teacher.state_dict().items()}
        report = trainer.stepper.init_report
        assert trainer.train()
        return masters, average, report

    def resume():
        # The file may be gone: a run that continues does not look for it.
        overrides = [f"model.init={tmp_path / 'gone'}", "train.epochs=2"]
        trainer = build(tmp_path / "second", shards, stage, dtype, overrides)
        return trainer.samples, trainer.stepper.init_report

    masters, average, report = run_distributed(start, 2)[0]
    assert report.random and all(name.startswith("byol") for name in report.random)
    loaded = masters.keys() - set(report.random)
    assert loaded == weights.keys() - set(report.random)
    # Exact in bf16 too: the masters are not made of rounded weights.
    assert all(torch.equal(masters[name], weights[name]) for name in loaded)
    shared = average.keys() & loaded
    assert len(shared) > 40 and all(torch.equal(average[n], weights[n]) for n in shared)
    for samples, report in run_distributed(resume, 2):
        assert samples == BATCH * STEPS and report is None
