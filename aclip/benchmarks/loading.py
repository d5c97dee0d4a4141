"""What loading costs: this loader's two ways, open_clip's pipeline and a plain one, in one run.

All read the same shards in this process and take turns, and what counts is CPU time, so that other
processes and a machine whose speed drifts are fair to each. Each makes the batches that its own
trainer would get.
"""

import argparse
import io
import json
import os
import platform
import statistics
import tarfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from aclip.cli import text_table
from aclip.config.recipe import Recipe
from aclip.config.recipe_file import load_recipe
from aclip.data.loader import build_train_loader
from aclip.data.members import IMAGE_SUFFIXES
from aclip.data.shards.listing import index_shards, list_shards
from aclip.data.tokenizer import build_tokenizer
from aclip.errors import ConfigError
from aclip.files import check_writable, write_whole
from aclip.run_folder.layout import METRICS_FILE
from aclip.run_folder.metrics_file import read_metrics

BATCH_SIZE = 64
RECIPE = "aclip_vitb16"
NUM_SHARDS, SHARD_SIZE = 4, 64
WIDTH, HEIGHT = 500, 375
IMAGE_ENDINGS = ";".join(IMAGE_SUFFIXES)
EXACT, ON_DEVICE = "aclip, data.crops=worker", "aclip, data.crops=device"
OPEN_CLIP, PLAIN = "open_clip, 1 crop", "plain, 3 crops and colour"


@dataclass
class Pipeline:
    """One row: batches without end, and the CPU seconds of each round."""

    name: str
    batches: Iterator
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    name: str
    milliseconds: float
    """The CPU time of an image."""
    images_per_second: float
    """The speed of one core."""
    to_open_clip: float
    """Its speed as a multiple of open_clip's, median of the rounds' ratios."""
    to_plain: float
    cores: float
    """How many cores feed one GPU at the stated rate."""


def benchmark_loading(arguments: argparse.Namespace) -> int:
    """Runs `launch/benchmark.py --loader`; returns the exit status."""
    for name in ("rounds", "images", "gpu_rate"):
        if getattr(arguments, name) <= 0:
            raise ConfigError(f"--{name} is {getattr(arguments, name)}; give more than 0")
    if arguments.json:
        check_writable(Path(arguments.json).absolute().parent, "the folder of --json")
    waits = data_waits(Path(arguments.run)) if arguments.run else []
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        pattern = arguments.shards or _write_shards(Path(folder))
        urls = list_shards(pattern, "--shards")
        pipelines = build_pipelines(urls, arguments.set)
        per_round = max(1, round(arguments.images / BATCH_SIZE))
        _measure(pipelines, arguments.rounds, per_round)
    rows = make_rows(pipelines, per_round * BATCH_SIZE, arguments.gpu_rate)
    environment = {
        "shards": arguments.shards or f"generated, {WIDTH} x {HEIGHT} JPEG",
        "time": f"CPU time of one process, median of {arguments.rounds} rounds",
        "images a round": per_round * BATCH_SIZE,
        "machine": platform.machine(),
        **{name: version(name) for name in ("torch", "pillow", "simplejpeg", "open_clip_torch")},
    }
    print(format_table(rows, arguments.gpu_rate, environment))
    if waits:
        print(
            f"{arguments.run} waited for data for {statistics.mean(waits):.1f} % of its time "
            f"({len(waits)} log lines, at most {max(waits):.1f} %)"
        )
    if arguments.json:
        content = {"environment": environment, "rows": [asdict(row) for row in rows]}
        write_whole(Path(arguments.json), json.dumps({**content, "data_wait_percent": waits}))
    return 0


def data_waits(run: Path) -> list[float]:
    """The data-wait shares, percent, in the log lines of a run folder or a metrics.jsonl."""
    try:
        waits = [line.data_wait_percent for line in read_metrics(run).steps]
    except (OSError, ValueError):
        waits = []
    waits = [wait for wait in waits if wait is not None]
    if not waits:
        raise ConfigError(
            f"--run is {run}, which has no readable {METRICS_FILE} with a log step; give the "
            "folder of a run"
        )
    return waits


def build_pipelines(urls: list[str], overrides: list[str]) -> list[Pipeline]:
    """The four pipelines over the same shards."""
    recipes = {
        name: load_recipe(
            RECIPE,
            [
                *overrides,
                f"data.crops={crops}",
                f"train.global_batch_size={BATCH_SIZE}",
                "data.workers=0",
            ],
        )
        for name, crops in ((EXACT, "worker"), (ON_DEVICE, "device"))
    }
    shards = index_shards(urls)

    def batches(recipe: Recipe) -> Iterator:
        loader = build_train_loader(recipe, shards, 0, 1)
        # Beside a GPU it would run ahead, while another pipeline is measured.
        loader.pin_memory = False
        return iter(loader)

    return [
        *(Pipeline(name, batches(recipe)) for name, recipe in recipes.items()),
        Pipeline(OPEN_CLIP, _open_clip_batches(urls, recipes[EXACT])),
        Pipeline(PLAIN, _plain_batches(urls, recipes[EXACT])),
    ]


def _webdataset(urls: list[str], image, text) -> Iterator:
    """open_clip's stages for training: resampled shards, shuffle, decode, transform, batch."""
    import webdataset as wds

    stages = [
        wds.ResampledShards(urls),
        wds.tarfile_to_samples(),
        # Full after the warm-up, so that each round costs alike.
        wds.shuffle(bufsize=1000, initial=1000),
        wds.decode("pilrgb"),
        wds.rename(image=IMAGE_ENDINGS, text="txt"),
        wds.map_dict(image=image, text=text),
        wds.to_tuple("image", "text"),
        wds.batched(BATCH_SIZE, partial=False),
    ]
    return iter(wds.DataPipeline(*stages))


def _open_clip_batches(urls: list[str], recipe: Recipe) -> Iterator:
    import open_clip

    preprocess = open_clip.image_transform(recipe.model.image.resolution, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    return _webdataset(urls, preprocess, lambda text: tokenizer(text)[0])


def _plain_batches(urls: list[str], recipe: Recipe) -> Iterator:
    """Two student views and the teacher's as torchvision makes them on the CPU, colours too."""
    from torchvision import transforms as T

    augment, side = recipe.augment, recipe.model.image.resolution
    crop = T.RandomResizedCrop(side, scale=recipe.views.scale)
    finish = T.Compose([T.ToTensor(), T.Normalize(augment.mean, augment.std)])
    colour = T.Compose(
        [
            T.RandomApply([T.ColorJitter(*augment.jitter)], augment.jitter_prob),
            T.RandomGrayscale(augment.grayscale_prob),
            T.RandomApply([T.GaussianBlur(13, augment.blur_sigma)], augment.blur_prob),
            T.RandomSolarize(128, augment.solarize_prob),
        ]
    )
    student, teacher = T.Compose([crop, colour, finish]), T.Compose([crop, finish])
    tokenizer = build_tokenizer(recipe.model.text)

    def views(image: Image.Image) -> torch.Tensor:
        return torch.stack([student(image), student(image), teacher(image)])

    # Padded to one length, so that captions stack.
    return _webdataset(urls, views, lambda text: tokenizer._simple([text])[0])


def _measure(pipelines: list[Pipeline], rounds: int, per_round: int) -> None:
    for index in range(1 + rounds):
        for pipeline in pipelines:
            before = time.process_time()
            for _ in range(per_round):
                next(pipeline.batches)
            if index:  # the first round warms up, and fills shuffle buffers
                pipeline.seconds.append(time.process_time() - before)
        if index:
            print(f"round {index} of {rounds}", flush=True)


def make_rows(pipelines: list[Pipeline], images: int, gpu_rate: float) -> list[Row]:
    """Medians over the rounds; a ratio is the median of the rounds' ratios."""
    seconds = {pipeline.name: pipeline.seconds for pipeline in pipelines}

    def faster_than(name: str, other: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds[name], seconds[other], strict=True))

    rows = []
    for name, rounds in seconds.items():
        rate = images / statistics.median(rounds)
        rows.append(
            Row(
                name,
                milliseconds=1000 / rate,
                images_per_second=rate,
                to_open_clip=faster_than(name, OPEN_CLIP),
                to_plain=faster_than(name, PLAIN),
                cores=gpu_rate / rate,
            )
        )
    return rows


def format_table(rows: list[Row], gpu_rate: float, environment: dict) -> str:
    """The rows as text, the environment below."""
    cores = f"cores a GPU at {gpu_rate:,.0f} img/s"
    cells = [["", "ms/img", "img/s/core", "/ open_clip", "/ plain", cores]]
    for row in rows:
        speed = [f"{row.milliseconds:.3f}", f"{row.images_per_second:,.0f}"]
        ratios = [f"{row.to_open_clip:.2f}", f"{row.to_plain:.2f}"]
        cells.append([row.name, *speed, *ratios, f"{row.cores:.1f}"])
    facts = ", ".join(f"{key} {value}" for key, value in environment.items())
    return f"{text_table(cells)}\n{facts}"


def _write_shards(folder: Path) -> str:
    """Shards of pictures as heavy as a photo of this size: about 73 KB each."""
    rng = np.random.default_rng(0)
    words = ["a", "photo", "of", "the", "old", "town", "with", "people", "near", "river", "summer"]
    for shard in range(NUM_SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for index in range(SHARD_SIZE):
                caption = " ".join(rng.choice(words, 12)).encode()
                for suffix, content in (("jpg", _picture(rng)), ("txt", caption)):
                    member = tarfile.TarInfo(f"{shard}-{index}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return os.path.join(folder, "*.tar")


def _picture(rng: np.random.Generator) -> bytes:
    """Broad shapes under film grain, at the quality of a camera's JPEG."""
    coarse = rng.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
    broad = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 8.5, (HEIGHT, WIDTH, 3))
    buffer = io.BytesIO()
    pixels = (np.asarray(broad) + grain).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
