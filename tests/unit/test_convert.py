"""Each kind of source -> shards -> aclip's own loader: every good sample once, all else counted."""

import json
import tarfile
from pathlib import Path

import pytest
from convert_sources import (
    GOOD,
    IMAGES,
    NAMES,
    SOURCES,
    make_coco,
    make_folder,
    make_job,
    write_file,
)

from aclip.config.recipe import Recipe
from aclip.data.convert.conversion import run
from aclip.data.convert.entries import make_key
from aclip.data.convert.images import ImageRule
from aclip.data.loader import build_train_loader
from aclip.data.members import read_captions
from aclip.data.shards.listing import Shard, index_shards, read_shard


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))


def read_samples(shards: list[Shard]) -> dict[str, list[str]]:
    """{key: captions} of all samples of all shards."""
    return {raw.key: read_captions(raw) for shard in shards for _, raw in read_shard(shard)}


def one_epoch(shards: list[Shard]):
    """The batch of one epoch as training gets it."""
    count = sum(shard.num_samples for shard in shards)
    recipe = Recipe(
        model={"image": {"resolution": 16, "kwargs": {"patch_size": 8}}},
        teacher={"resolution": 16},
        data={"workers": 0, "lanes": 1},
        train={"global_batch_size": count},
    )
    return next(iter(build_train_loader(recipe, shards, 0, 1)))


@pytest.mark.parametrize(
    ("name", "rule"),
    [pytest.param(name, ImageRule(16), id=name) for name in SOURCES]
    + [pytest.param("yfcc15m", ImageRule(16, 32, "webp"), id="yfcc15m, short side 32, webp")],
)
def test_every_good_sample_comes_once_an_epoch_and_the_rest_is_counted(tmp_path, name, rule):
    source, expected, skipped = SOURCES[name](tmp_path)
    report = run(make_job(tmp_path, source, rule), processes=2)
    assert report["skipped"] == dict(skipped)
    assert report["samples"] == len(GOOD) == sum(report["images"].values())
    further = report["noted"].get("further_caption", 0)
    assert report["entries"] == report["samples"] + skipped.total() + further
    assert further == (name in ("yfcc15m", "coco"))

    out = tmp_path / "out"
    shards = index_shards(sorted(str(path) for path in out.glob("*.tar")))
    sizes = json.loads((out / "sizes.json").read_text())
    counted = {Path(shard.url).name: shard.num_samples for shard in shards}
    assert {name: size for name, size in sizes.items() if size} == counted
    assert json.loads((out / "report.json").read_text()) == report
    assert {path.name for path in out.iterdir()} == {*sizes, "sizes.json", "report.json"}
    assert read_samples(shards) == expected

    batch = one_epoch(shards)
    assert sorted(key.partition("/")[2] for key in batch.keys) == sorted(expected)  # noqa: SIM118
    assert batch.skipped == {}
    for key, caption in zip(batch.keys, batch.captions, strict=True):
        assert caption in expected[key.partition("/")[2]]


def test_shards_hold_what_other_readers_of_webdataset_look_for(tmp_path):
    source, expected, _ = make_coco(tmp_path)
    run(make_job(tmp_path, source), processes=1)
    with tarfile.open(tmp_path / "out" / "00000.tar") as archive:
        infos = archive.getmembers()
        contents = {info.name: archive.extractfile(info).read() for info in infos}
    assert list(contents)[:3] == [f"000000000000.{suffix}" for suffix in ("jpg", "txt", "json")]
    captions = expected["000000000000"]
    assert contents["000000000000.txt"].decode() == captions[0]
    assert json.loads(contents["000000000000.json"]) == {"captions": captions}
    assert contents["000000000000.jpg"] == IMAGES["jpeg"]
    assert {(info.mtime, info.uid, info.gid, info.uname, info.gname) for info in infos} == {
        (0, 0, 0, "", "")
    }


def test_shards_are_equally_long_and_none_is_longer_than_asked(tmp_path):
    source, _, _ = make_folder(tmp_path)
    for name in NAMES:  # 11 good entries and the plan's others
        write_file(tmp_path / "pairs" / "z" / f"{name}.jpg", IMAGES["jpeg"])
        write_file(tmp_path / "pairs" / "z" / f"{name}.txt", b"text")
    run(make_job(tmp_path, source, shard_size=7), processes=2)
    # 13 entries of z and 13 of the others less the missing image are planned: 25 in 4 shards
    sizes = json.loads((tmp_path / "out" / "sizes.json").read_text())
    assert len(sizes) == 4
    assert sum(sizes.values()) == len(GOOD) + len(NAMES)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("a/b", "a/b"),
        ("a.b/c.d", "a%2Eb/c%2Ed"),
        ("../up", "%2E%2E/up"),
        ("/root", "%2Froot"),
        ("__meta__/x", "%5F_meta__/x"),
        ("é %", "%C3%A9%20%25"),
        ("\udcff", "%FF"),  # a file name that is no UTF-8
    ],
)
def test_a_key_is_one_that_the_loader_finds_again(tmp_path, write_tar, path, key):
    assert make_key(path) == key
    url = write_tar("x.tar", [(f"{make_key(path)}.jpg", b"x")])
    assert list(read_samples([Shard(url, 1)])) == [key]
