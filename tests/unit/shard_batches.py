"""Nine small shards, and the global batches that loaders make of them."""

import os
import tarfile

import torch

from aclip.config.recipe import Recipe
from aclip.data.batch import Batch, join
from aclip.data.loader import build_train_loader
from aclip.data.shards.listing import Shard

BATCH = 16
NUM_SHARDS, SHARD_SIZE = 9, 7
PARTS = ["student_views", "teacher_view", "student_boxes", "teacher_box", "augment_params"]


def write_shards(write_tar, encode_image) -> list[Shard]:
    """Nine shards of seven samples, nine of them unusable: five in shard 1, four in shard 2."""
    paths = []
    for shard in range(NUM_SHARDS):
        members = {}
        for index in range(SHARD_SIZE):
            seed = shard * SHARD_SIZE + index
            members[f"{shard}-{index}.jpg"] = encode_image(30 + index, 34, seed)
            members[f"{shard}-{index}.txt"] = b"word " * (1 + index)
        if shard == 1:
            members["1-0.jpg"] = members["1-0.jpg"][:300]
            members["1-1.txt"] = b" "
            members["1-2.jpg"] = encode_image(4000, 1)
            del members["1-3.txt"], members["1-4.jpg"]
        paths.append(write_tar(f"{shard}.tar", list(members.items())))
    with tarfile.open(paths[2]) as archive:
        cut = archive.getmember("2-3.jpg").offset_data + 100
    os.truncate(paths[2], cut)
    return [Shard(path, SHARD_SIZE) for path in paths]


def make_recipe(workers: int = 0, **sections) -> Recipe:
    values = {
        "model": {"image": {"resolution": 32, "kwargs": {"patch_size": 8}}},
        "teacher": {"resolution": 16},
        "data": {"workers": workers, "lanes": 8, "shuffle_block": 5},
        "train": {"global_batch_size": BATCH, "seed": 3},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if section is not None else None
    return Recipe(**values)


def take(recipe: Recipe, shards, ranks: int, count: int, cursors=None) -> list[Batch]:
    """The next global batches, joined from the loaders of all ranks."""
    loaders = [
        iter(build_train_loader(recipe, shards, rank, ranks, cursors)) for rank in range(ranks)
    ]
    batches = [join([next(loader) for loader in loaders]) for _ in range(count)]
    for loader in loaders:
        loader.close()
    return batches


def assert_equal_batches(first: Batch, second: Batch) -> None:
    assert first.keys == second.keys and first.captions == second.captions
    for name in [*PARTS, "cursors"]:
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert torch.equal(first.tokens.ids, second.tokens.ids)
    assert torch.equal(first.tokens.lengths, second.tokens.lengths)


def with_sources(workers: int, weights=(1, 3)) -> Recipe:
    sources = [{"shards": "unread", "weight": weight} for weight in weights]
    return make_recipe(workers, data={"sources": sources})
