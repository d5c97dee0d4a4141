"""Each kind of source -> shards -> aclip's own loader: every good sample once, all else counted."""

import csv
import io
import json
import os
import pickle
import tarfile
import zipfile
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from aclip.config import Recipe
from aclip.data.convert import conversion
from aclip.data.convert.coco import coco_source
from aclip.data.convert.conceptual import conceptual_source
from aclip.data.convert.conversion import Job, run
from aclip.data.convert.entries import make_key
from aclip.data.convert.folder import folder_source
from aclip.data.convert.images import ImageRule
from aclip.data.convert.redcaps import redcaps_source
from aclip.data.convert.table import table_source
from aclip.data.convert.yfcc import yfcc_source
from aclip.data.loader import build_train_loader
from aclip.data.shards import Shard, index_shards, read_captions, read_shard
from aclip.errors import ConfigError

CAPTION = "Ünïcode &amp; <b>html</b> 猫 no. {}"


def encode(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def make_images() -> dict[str, bytes]:
    """An image of each kind that data sets hold, and three that no loader can use."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = encode(picture, "JPEG")
    return {
        "jpeg": jpeg,
        "cmyk": encode(picture.convert("CMYK"), "JPEG"),
        "palette": encode(picture.convert("P"), "PNG"),
        "deep": encode(Image.fromarray(noise[..., 0].astype(np.uint16) * 257), "PNG"),
        "rotated": encode(picture, "JPEG", exif=exif),
        "gif": encode(picture, "GIF"),
        "webp": encode(picture, "WEBP"),
        "alpha": encode(picture.convert("RGBA"), "PNG"),
        "truncated": jpeg[: len(jpeg) // 2],
        "page": b"<html>404</html>",
        "tiny": encode(Image.new("RGB", (40, 8)), "PNG"),
    }


IMAGES = make_images()
GOOD = ("jpeg", "cmyk", "palette", "deep", "rotated", "gif", "webp", "alpha")
BAD = {"truncated": "unreadable_image", "page": "unreadable_image", "tiny": "image_too_small"}
SKIPPED = Counter(BAD.values()) + Counter(["no_image", "empty_caption", "duplicate_key"])
NAMES = [*IMAGES, "missing", "blank"]
"""A case each: the images, one whose file is not there, one whose captions are blank."""


def content_of(name: str) -> bytes | None:
    return IMAGES["jpeg"] if name == "blank" else IMAGES.get(name)


def captions_of(name: str, count: int) -> list[str]:
    return [" \n"] * count if name == "blank" else [CAPTION.format(i) for i in range(count)]


def write_file(path: Path, content: bytes | None) -> None:
    if content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def make_yfcc(root: Path):
    rows, expected = [], {}
    ids = [12_345_000 + 997 * number for number in range(len(NAMES))]
    for index, name in zip(ids, NAMES, strict=True):
        rows.append((index, *captions_of(name, 2)))
        digits = f"{index:08d}"
        path = root / "images" / digits[:2] / f"{digits[2:5]}.zip"
        if content_of(name) is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr(f"{digits[5:]}.jpg", content_of(name))
        if name in GOOD:
            expected[digits] = captions_of(name, 2)
    rows.append((ids[1], "another title", ""))
    (root / "yfcc15m.pkl").write_bytes(pickle.dumps(rows))
    return yfcc_source(str(root / "yfcc15m.pkl"), str(root / "images")), expected, SKIPPED


def make_cc3m(root: Path):
    lines, expected = ["caption\turl"], {}
    for name in NAMES:
        url = f"http://example.com/{name}.jpg?é"
        crc = zlib.crc32(url.encode())
        caption = captions_of(name, 1)[0].strip("\n")
        lines.append(f"{caption}\t{url}")
        write_file(root / "images" / str(crc), content_of(name))
        if name in GOOD:
            expected[str(crc)] = [caption]
    lines += [lines[2], "no url"]
    write_file(root / "cc3m.tsv", "\n".join(lines).encode())
    source = conceptual_source("cc3m", str(root / "cc3m.tsv"), str(root / "images"), None)
    return source, expected, SKIPPED + Counter(["malformed_row"])


def make_cc12m(root: Path):
    lines, expected = [], {}
    for row, name in enumerate(NAMES):
        caption = captions_of(name, 1)[0].strip("\n")
        lines.append(f"http://example.com/{name}\t{caption}\r")
        write_file(root / "images" / str(row % 1000) / f"{row:05d}.jpg", content_of(name))
        if name in GOOD:
            expected[f"{row}/{row:05d}"] = [caption]
    write_file(root / "cc12m.tsv", "\n".join(lines).encode())
    source = conceptual_source(
        "cc12m", str(root / "cc12m.tsv"), str(root / "images"), "{thousand}/{row:05d}.jpg"
    )
    return source, expected, SKIPPED - Counter(["duplicate_key"])


def make_coco(root: Path):
    images, annotations, expected = [], [], {}
    for number, name in enumerate(NAMES):
        file_name = f"{number:012d}.jpg"
        images.append({"id": number, "file_name": file_name, "license": 1})
        captions = captions_of(name, 5)
        annotations += [{"image_id": number, "id": i, "caption": captions[i]} for i in range(5)]
        write_file(root / "train2017" / file_name, content_of(name))
        if name in GOOD:
            expected[f"{number:012d}"] = captions
    images += [{"id": 77, "file_name": images[1]["file_name"]}, {"id": 78, "file_name": "78.jpg"}]
    annotations.sort(key=lambda annotation: annotation["id"])  # those of an image lie apart
    annotations += [{"image_id": 77, "caption": "again"}, {"image_id": 99, "caption": "lost"}]
    content = {"info": {"annotations": []}, "images": images, "annotations": annotations}
    write_file(root / "captions_train2017.json", json.dumps(content).encode())
    source = coco_source(str(root / "captions_train2017.json"), str(root / "train2017"))
    return source, expected, SKIPPED + Counter(["no_caption", "no_image"])


def make_redcaps(root: Path, in_one_file: bool = False):
    annotations, expected = [], {}
    for number, name in enumerate(NAMES):
        caption = captions_of(name, 1)[0]
        subreddit = "abandoned" if number < 5 else "itookapicture"
        facts = {"image_id": f"{number}ab", "subreddit": subreddit, "caption": caption}
        annotations.append(facts | {"raw_caption": "x", "score": 2, "url": "http://i.redd.it"})
        write_file(root / "images" / subreddit / f"{number}ab.jpg", content_of(name))
        if name in GOOD:
            expected[f"{subreddit}/{number}ab"] = [caption]
    annotations += [annotations[1], {"image_id": "x", "subreddit": None, "caption": "c"}]
    path = root / "annotations"
    if in_one_file:
        path = root / "redcaps_v1.json"
        write_file(path, json.dumps(annotations).encode())
    else:
        for name, part in (("abandoned_2017", annotations[:5]), ("itook_2019", annotations[5:])):
            content = {"info": {"version": "1"}, "annotations": part}
            write_file(path / f"{name}.json", json.dumps(content).encode())
    source = redcaps_source(str(path), str(root / "images"))
    return source, expected, SKIPPED + Counter(["malformed_row"])


def make_folder(root: Path):
    expected = {}
    for name in NAMES:
        path = root / "pairs" / name[0] / f"a.b {name} é.jpg"
        caption = captions_of(name, 1)[0]
        write_file(path, content_of(name))
        write_file(path.with_suffix(".txt"), caption.encode())
        if name in GOOD:
            expected[f"{name[0]}/a%2Eb%20{name}%20%C3%A9"] = [caption]
    write_file(root / "pairs" / "j" / "a.b jpeg é.png", IMAGES["palette"])
    write_file(root / "pairs" / "alone.jpg", IMAGES["jpeg"])
    write_file(root / "pairs" / "notes.json", b"{}")
    (root / "pairs" / "up").symlink_to(root / "pairs")
    return folder_source(str(root / "pairs")), expected, SKIPPED + Counter(["no_caption"])


def make_table(root: Path, kind: str):
    rows, expected = [], {}
    for name in NAMES:
        path = f"part.1/{name}.jpg"
        captions = captions_of(name, 2)
        write_file(root / path, content_of(name))
        rows.append((captions[0], path, captions[1] + ' "quoted",\n\tlonger'))
        if name == "blank":
            rows[-1] = (" ", path, "")
        if name in GOOD:
            expected[f"part%2E1/{name}"] = [rows[-1][0], rows[-1][2]]
    rows += [("again", "part.1/cmyk.png", "c"), ("no path", "", "c")]
    columns = ("title", "filepath", "text")
    path = root / f"pairs.{kind}"
    if kind == "parquet":
        table = pyarrow.table({c: [row[i] for row in rows] for i, c in enumerate(columns)})
        parquet.write_table(table, path, row_group_size=3)
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter={"csv": ",", "tsv": "\t"}[kind])
            writer.writerows([columns, *rows])
    source = table_source(str(path), None, "filepath", ["title", "text"])
    return source, expected, SKIPPED + Counter(["no_image"])


SOURCES = {
    "yfcc15m": make_yfcc,
    "cc3m": make_cc3m,
    "cc12m": make_cc12m,
    "coco": make_coco,
    "redcaps": make_redcaps,
    "redcaps in one file": lambda root: make_redcaps(root, in_one_file=True),
    "folder": make_folder,
    "csv": lambda root: make_table(root, "csv"),
    "tsv": lambda root: make_table(root, "tsv"),
    "parquet": lambda root: make_table(root, "parquet"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))


def make_job(root: Path, source, rule=ImageRule(min_side=16), shard_size: int = 5) -> Job:  # noqa: B008
    return Job(source, {"source": "test"}, rule, shard_size, root / "out")


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
    assert report["entries"] == report["samples"] + skipped.total()

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


@pytest.mark.parametrize("make", [make_folder, make_coco])
def test_the_same_command_after_the_end_changes_nothing_and_says_so(tmp_path, capsys, make):
    source, _, _ = make(tmp_path)
    report = run(make_job(tmp_path, source), processes=1)
    assert capsys.readouterr().out == ""
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(make_job(tmp_path, source), processes=1) == report
    assert capsys.readouterr().out == (
        f"{tmp_path}/out is already finished, so nothing was read; give another --out, or delete "
        "the folder, to convert again\n"
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == stamps


def add_pair(pairs):
    write_file(pairs / "k" / "new.jpg", IMAGES["jpeg"])
    write_file(pairs / "k" / "new.txt", b"text")


CHANGES = {
    "a pair comes": add_pair,
    "an image without a caption comes": lambda pairs: write_file(pairs / "new.jpg", b"x"),
    "an image goes": lambda pairs: (pairs / "c" / "a.b cmyk é.jpg").unlink(),
    "an image changes": lambda pairs: os.utime(pairs / "c" / "a.b cmyk é.jpg", (1, 1)),
    "a caption changes": lambda pairs: (pairs / "c" / "a.b cmyk é.txt").write_text("text"),
    "an image moves": lambda pairs: (pairs / "c").rename(pairs / "moved"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_folder_that_has_changed_since_is_refused(tmp_path, change):
    source, _, _ = make_folder(tmp_path)
    run(make_job(tmp_path, source), processes=1)
    (tmp_path / "pairs" / "notes.json").write_text("[1, 2]")  # is not of the source
    run(make_job(tmp_path, source), processes=1)
    change(tmp_path / "pairs")
    with pytest.raises(ConfigError, match=r"--out is .*changed since"):
        run(make_job(tmp_path, source), processes=1)


def test_a_stopped_conversion_of_a_folder_continues_unless_it_has_changed(tmp_path, monkeypatch):
    source, _, _ = make_folder(tmp_path)
    (tmp_path / "pairs" / "nowhere.jpg").symlink_to(tmp_path / "gone")
    write_file(tmp_path / "pairs" / "nowhere.txt", b"text")
    job = replace(make_job(tmp_path, source), out=tmp_path / "pairs" / "out")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "make_report", stop)
        with pytest.raises(KeyboardInterrupt):
            run(job, processes=1)
    stamps = {path: path.stat().st_mtime_ns for path in job.out.glob("*.tar")}
    assert stamps
    added = tmp_path / "pairs" / "new.jpg"
    added.write_bytes(IMAGES["jpeg"])
    with pytest.raises(ConfigError, match=r"--out is .*changed since"):
        run(job, processes=1)
    added.unlink()
    assert run(job, processes=1)["samples"] == len(GOOD)
    assert {path: path.stat().st_mtime_ns for path in job.out.glob("*.tar")} == stamps


def test_another_conversion_in_the_same_folder_is_refused(tmp_path):
    source, _, _ = make_redcaps(tmp_path, in_one_file=True)
    run(make_job(tmp_path, source), processes=1)
    with pytest.raises(ConfigError, match=r"--out is .*other arguments"):
        run(make_job(tmp_path, source, ImageRule(32)), processes=1)
    (tmp_path / "redcaps_v1.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"--out is .*changed since"):
        run(make_job(tmp_path, source), processes=1)


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    source, _, _ = make_folder(tmp_path)
    write_file(tmp_path / "out" / "thesis.tex", b"x")
    with pytest.raises(ConfigError, match=r"--out is .*not empty"):
        run(make_job(tmp_path, source), processes=1)


def test_a_source_without_a_usable_sample_ends_with_a_sentence(tmp_path):
    write_file(tmp_path / "pairs" / "a.jpg", b"no image")
    write_file(tmp_path / "pairs" / "a.txt", b"text")
    job = make_job(tmp_path, folder_source(str(tmp_path / "pairs")))
    with pytest.raises(ConfigError, match=r"no entry of the source.*report\.json"):
        run(job, processes=1)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["samples"] == 0


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
