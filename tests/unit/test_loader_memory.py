"""A worker's memory stays flat, however many samples it has made: `make soak`."""

import os
import re
from pathlib import Path

import pytest

from aclip.config.recipe import Recipe
from aclip.data.loader import build_train_loader
from aclip.data.shards.listing import Shard

NUM_SHARDS, SHARD_SIZE, BATCH = 8, 64, 50
SAMPLES, EVERY = 50_000, 5_000
ALLOWED_MIB = 16
"""Growth after the first tenth, which is what the allocator keeps of odd sizes; one kept picture
in a hundred would be 140 MiB."""


def worker_mib() -> float:
    (worker,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    status = Path(f"/proc/{worker}/status").read_text()
    # Pages of its own: shared ones hold batches that the main process has not freed yet.
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1024


@pytest.mark.soak
@pytest.mark.parametrize("crops", ["worker", "device"])
def test_memory_of_a_worker_is_flat(write_tar, encode_image, crops, capsys):
    shards = []
    for shard in range(NUM_SHARDS):
        members = []
        for index in range(SHARD_SIZE):
            size = 280 + 5 * index % 80, 240 + 3 * index % 50
            members.append((f"{index}.jpg", encode_image(*size, SHARD_SIZE * shard + index)))
            members.append((f"{index}.txt", b"some words %d" % index))
        shards.append(Shard(write_tar(f"{shard}.tar", members), SHARD_SIZE))
    recipe = Recipe(
        model={"image": {"resolution": 64, "kwargs": {"patch_size": 8}}},
        teacher={"resolution": 64},
        data={"workers": 1, "lanes": 2, "shuffle_block": 64, "crops": crops},
        train={"global_batch_size": BATCH},
    )
    loader = iter(build_train_loader(recipe, shards, 0, 1))
    sizes = []
    for number in range(1, SAMPLES // BATCH + 1):
        next(loader)
        if number * BATCH % EVERY == 0:
            sizes.append(worker_mib())
    loader.close()
    with capsys.disabled():
        print(f"\ncrops={crops}: MiB after every {EVERY}:", *(f"{size:.1f}" for size in sizes))
    assert max(sizes[1:]) - sizes[0] < ALLOWED_MIB
