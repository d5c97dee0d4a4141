"""A run that continues must deal out the samples as before; what differs is refused by its name."""

import io
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.data.fingerprint import (
    check_continues,
    count_shards,
    digests,
    fingerprint,
    list_lines,
)
from aclip.data.marks import _mark
from aclip.data.shards.listing import Shard
from aclip.data.shards.remote import RemoteShards
from aclip.errors import ConfigError

SOURCES = (
    "data.sources=[{shards: a, weight: 3}, {shards: b, weight: 1}]",
    "data.train=[]",
)
OVERRIDES = ("train.global_batch_size=8", "data.lanes=2", "data.shuffle_block=4", "train.seed=1")


def make(*overrides):
    return load_recipe(SMALL_RECIPE, [*OVERRIDES, *overrides])


def make_shards(folder="/data", num=3, source=0):
    return [Shard(f"{folder}/{index:05d}.tar", 10 + index, source) for index in range(num)]


def two_sources(first="/data/a", second="/data/b"):
    return make_shards(first) + make_shards(second, source=1)


@pytest.fixture
def checkpoint(tmp_path):
    """Of a run with three shards, whose folder holds their list."""
    (tmp_path / "shards.json").write_text(json.dumps(list_lines(make_shards())))
    return tmp_path / "checkpoints" / "samples-000000000008"


def refusal(recipe, shards, then, checkpoint):
    # As it comes out of state.json.
    then = json.loads(json.dumps(then))
    with pytest.raises(ConfigError) as caught:
        check_continues(recipe, shards, then, checkpoint)
    message = str(caught.value)
    assert str(checkpoint) in message
    assert message.endswith("or use --resume none with another --output")
    return message


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.seed=2", "train.seed is 2, but {} was trained with 1; set it back,"),
        ("data.shuffle_block=8", "data.shuffle_block is 8, but {} was trained with 4; set it"),
        ("data.lanes=4", "data.lanes is 4, but {} was trained with 2; set it back,"),
    ],
)
def test_another_value_is_refused_by_the_fields_name(checkpoint, override, words):
    shards = make_shards()
    message = refusal(make(override), shards, fingerprint(make(), shards), checkpoint)
    assert message.startswith(words.format(checkpoint))


@pytest.mark.parametrize(
    "shards, given, difference",
    [
        (make_shards(num=2), "2 shards with 21", "2: none instead of 00002 12 0"),
        (make_shards()[::-1], "3 shards with 33", "0: 00002 12 0 instead of 00000 10 0"),
        (
            [*make_shards(num=2), Shard("/data/other.tar", 12)],
            "3 shards with 33",
            "2: other 12 0 instead of 00002 12 0",
        ),
        (
            [Shard("/data/00000.tar", 11), Shard("/data/00001.tar", 10), make_shards()[2]],
            "3 shards with 33",
            "0: 00000 11 0 instead of 00000 10 0",
        ),
    ],
    ids=["fewer", "another order", "another name", "other sizes, equal sum"],
)
def test_other_shards_are_refused_and_the_first_one_is_named(checkpoint, shards, given, difference):
    then = fingerprint(make(), make_shards())
    message = refusal(make(), shards, then, checkpoint)
    assert message.startswith(
        f"data.train gives {given} samples, but {checkpoint} was trained on 3 shards with 33 "
        f"samples (name, samples and source of shard {difference}); give the same shards"
    )
    # A list that is lost, or of another run, names nothing.
    path = checkpoint.parent.parent / "shards.json"
    path.write_text(json.dumps(["of another run"]))
    assert "(name" not in refusal(make(), shards, then, checkpoint)
    path.unlink()
    assert "(name" not in refusal(make(), shards, then, checkpoint)


def test_sources_are_refused_by_their_shards_and_by_their_weights(checkpoint):
    then = fingerprint(make(*SOURCES), two_sources())
    other = [replace(shard, source=min(index, 1)) for index, shard in enumerate(two_sources())]
    message = refusal(make(*SOURCES), other, then, checkpoint)
    assert "data.sources gives 6 shards with 66 samples (1 + 5 shards by source)" in message
    assert "was trained on 6 shards with 66 samples (3 + 3 shards by source)" in message
    swapped = ("data.sources=[{shards: a, weight: 1}, {shards: b, weight: 3}]", "data.train=[]")
    message = refusal(make(*swapped), two_sources(), then, checkpoint)
    assert message.startswith(
        f"data.sources has the weights [1.0, 3.0], but {checkpoint} was trained with [3.0, 1.0]; "
        "set them back"
    )
    message = refusal(make(), make_shards(), then, checkpoint)
    assert message.startswith("data.train gives 3 shards with 33 samples, but")
    one = make("data.sources=[{shards: a, weight: 3}]", "data.train=[]")
    message = refusal(one, make_shards(), fingerprint(make(), make_shards()), checkpoint)
    assert "(3 shards by source), but" in message and "(name" not in message


@pytest.mark.parametrize(
    "override",
    [
        "views.scale=[0.2, 1]",
        "augment.jitter_prob=0.1",
        "mask.keep_ratio=0.25",
        "data.min_image_side=20",
        "data.on_shard_error=skip",
        "data.workers=1",
        "train.epochs=3",
        "optimizer.lr=0.1",
    ],
)
def test_treatment_of_samples_may_change(checkpoint, override):
    then = fingerprint(make(), make_shards())
    check_continues(make(override), make_shards(), then, checkpoint)


def test_data_may_lie_elsewhere(checkpoint):
    then = fingerprint(make(), make_shards("/data"))
    check_continues(make(), make_shards("s3://bucket/yfcc"), then, checkpoint)
    then = fingerprint(make(*SOURCES), two_sources("/data/a", "/data/b"))
    check_continues(make(*SOURCES), two_sources("/mnt/1/a", "https://host/b"), then, checkpoint)
    # Where names repeat, the folders that tell them apart count too.
    nested = [*make_shards("/data/x"), *make_shards("/data/y")]
    assert list_lines(nested)[2:4] == ["x/00002 12 0", "y/00000 10 0"]
    then = fingerprint(make(), nested)
    moved = [replace(s, url=s.url.replace("/data", "/mnt/1/data")) for s in nested]
    check_continues(make(), moved, then, checkpoint)
    message = refusal(make(), nested[3:] + nested[:3], then, checkpoint)
    assert message.startswith("data.train gives 6 shards")


def test_checkpoint_of_another_order_is_refused(checkpoint):
    then = fingerprint(make(), make_shards())
    assert then.pop("order") == 2
    counts = count_shards(make().data, make_shards())
    assert counts == {"shards": 3, "samples": 33}
    for earlier in (then, counts, then | {"order": 3}):
        with pytest.raises(ConfigError) as caught:
            check_continues(make(), make_shards(), earlier, checkpoint)
        assert str(caught.value) == (
            f"{checkpoint} was written by a version that dealt the samples in another order, which "
            "can't be continued; use --resume none with another --output, and --init with the "
            "checkpoint to start from its weights"
        )
    of_sources = count_shards(make(*SOURCES).data, two_sources())
    assert of_sources == {"shards": 6, "samples": 66, "sources": [[3, 3.0], [3, 1.0]]}


def test_list_of_shards_is_found_from_a_relative_path_too(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent.parent)
    relative = Path("checkpoints") / checkpoint.name
    then = fingerprint(make(), make_shards())
    assert "shard 2: none" in refusal(make(), make_shards(num=2), then, relative)


def write_shards(folder: Path, changed: str = "", **change) -> list[Shard]:
    """Three shards of four samples; `changed` names one with other keys, texts or order."""
    folder.mkdir(exist_ok=True)
    shards = []
    for name in ("0", "1", "2"):
        values = {"key": "k", "text": f"caption of {name}", "mtime": 0, "more": 0}
        values |= change if name == changed else {}
        path = folder / f"{name}.tar"
        with tarfile.open(path, "w") as archive:
            for number in range(4):
                content = values["text"].encode() + bytes(values["more"] * (number == 3))
                info = tarfile.TarInfo(f"{values['key']}{number}.txt")
                info.size, info.mtime = len(content), values["mtime"]
                archive.addfile(info, io.BytesIO(content))
        shards.append(Shard(str(path), 4))
    _mark.cache_clear()  # as in the next process
    return shards


@pytest.mark.parametrize(
    "change, words",
    [
        ({"key": "j"}, "its first sample is another"),
        ({"text": "CAPTION of 1"}, "its first sample is another"),
        ({"more": 20_000}, "it has 30,720 bytes instead of 10,240"),
    ],
)
def test_shard_replaced_by_one_of_as_many_samples_is_refused(checkpoint, change, words):
    folder = checkpoint.parent.parent / "data"
    then = fingerprint(make(), write_shards(folder))
    check_continues(make(), write_shards(folder), then, checkpoint)
    message = refusal(make(), write_shards(folder, "1", **change), then, checkpoint)
    assert message.startswith(
        f"shard {folder}/1.tar is not the one that {checkpoint} was trained on: {words}; put that"
    )


def test_digests_tell_sets_of_equal_counts_apart_wherever_they_lie(tmp_path):
    one = digests(write_shards(tmp_path / "one"))
    assert digests(write_shards(tmp_path / "two")) == one
    other = digests(write_shards(tmp_path / "one", "2", text="CAPTION of 2"))
    assert other["sha256"] == one["sha256"] and other["marks"] not in (None, one["marks"])
    assert digests(make_shards("s3://bucket"))["marks"] is None
    assert digests(make_shards())["sha256"] != digests(make_shards(num=2))["sha256"]


def test_shards_that_are_copied_packed_again_or_not_known_continue(checkpoint):
    folder = checkpoint.parent.parent / "data"
    shards = write_shards(folder)
    then = fingerprint(make(), shards)
    elsewhere = folder.parent / "elsewhere"
    shutil.copytree(folder, elsewhere)
    os.utime(elsewhere / "1.tar", (5, 5))
    moved = [replace(shard, url=shard.url.replace("/data/", "/elsewhere/")) for shard in shards]
    check_continues(make(), moved, then, checkpoint)
    check_continues(make(), write_shards(folder, "1", mtime=10**9), then, checkpoint)
    # A checkpoint of before, a shard that can't be read, and one at an address.
    other = write_shards(folder, "1", key="j")
    check_continues(make(), other, {k: v for k, v in then.items() if k != "marks"}, checkpoint)
    assert then["marks"][1] is not None
    remote = RemoteShards(folder.parent / "cache", 1, retries=0)
    addressed = [replace(s, url=f"file://{s.url}", remote=remote) for s in other]
    check_continues(make(), addressed, then, checkpoint)
    (folder / "1.tar").unlink()
    _mark.cache_clear()
    check_continues(make(), other, then, checkpoint)
