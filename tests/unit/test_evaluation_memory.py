"""What an evaluation keeps: classes and ranks, however many prompts and images pass."""

import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from aclip.evaluation.evaluate_set import evaluate_set
from aclip.evaluation.sets.evaluation_set import Example
from aclip.evaluation.sets.prompts import ClassPrompts
from aclip.evaluation.towers import Towers
from aclip.method.tokens import Tokens

CLASSES, TEMPLATES, IMAGES, EMBED_DIM, SIDE = 1000, 80, 50_000, 512, 8
BOUND = 32 * 2**20
"""Bytes. All prompts' embeddings would be 156 MiB, all logits 190, all images' embeddings 98."""
STATUS = Path("/proc/self/status")


class Images:
    name = "grey images"

    def __init__(self, num_samples):
        self.num_samples = num_samples
        self._image = Image.new("RGB", (SIDE, SIDE), "grey")

    def read(self, rank, world_size):
        for index in range(rank, self.num_samples, world_size):
            yield index, lambda index=index: Example(self._image, index % CLASSES, [])


class Tokenizer:
    def encode(self, texts):
        ids = torch.tensor([[len(text), hash(text) % 49408] for text in texts])
        return Tokens(ids, torch.full((len(texts),), 2))


def towers():
    weight = torch.randn(3 * SIDE * SIDE, EMBED_DIM, generator=torch.manual_seed(0))
    return Towers(
        lambda pixels: pixels.flatten(1) @ weight,
        lambda tokens: weight[tokens.ids.sum(1) % len(weight)],
        Tokenizer(),
        SIDE,
        torch.device("cpu"),
        torch.float32,
        (0.5,) * 3,
        (0.5,) * 3,
    )


def peak_growth(run):
    """Bytes that the memory the process has allocated rises above where it stands, at the most.

    Sampled, since the kernel keeps a peak only of all resident pages, and of those that belong to
    files it takes back and returns some at any time.
    """
    before, peak, is_done = allocated(), [0], threading.Event()

    def watch():
        while not is_done.wait(0.01):
            peak[0] = max(peak[0], allocated())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        is_done.set()
        watcher.join()
    return peak[0] - before


def allocated():
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def run_evaluation(num_images, num_templates):
    names = [[f"class {number}"] for number in range(CLASSES)]
    prompts = ClassPrompts("test", names, [f"{n} of a {{c}}" for n in range(num_templates)])
    metrics = evaluate_set(towers(), Images(num_images), prompts, 256)
    assert metrics["num_images"] == num_images and metrics["num_classes"] == CLASSES
    # All images are the same, so that one class takes them all.
    assert metrics["zero_shot_top1"] <= 1 / min(CLASSES, num_images)


def test_a_thousand_classes_of_eighty_prompts_and_fifty_thousand_images_stay_within_the_bound():
    if not STATUS.exists():
        pytest.skip("needs Linux' /proc")
    # A process that has freed a large block: from then on malloc keeps blocks of that size in its
    # heap, where they may be torn up.
    torch.ones(7 * 2**20).sum()
    run_evaluation(256, 1)  # what torch and the allocator keep from the first batch on
    assert peak_growth(lambda: run_evaluation(IMAGES, TEMPLATES)) < BOUND
