"""A source of every format, with good and bad entries, and what is to come of it."""

import csv
import io
import json
import pickle
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

from aclip.data.convert.conversion import Job
from aclip.data.convert.images import ImageRule
from aclip.data.convert.sources.coco import coco_source
from aclip.data.convert.sources.conceptual import conceptual_source
from aclip.data.convert.sources.folder import folder_source
from aclip.data.convert.sources.redcaps import redcaps_source
from aclip.data.convert.sources.table import table_source
from aclip.data.convert.sources.yfcc import yfcc_source

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
    expected[f"{ids[1]:08d}"].append("another title")
    (root / "yfcc15m.pkl").write_bytes(pickle.dumps(rows))
    source = yfcc_source(str(root / "yfcc15m.pkl"), str(root / "images"))
    return source, expected, SKIPPED - Counter(["duplicate_key"])


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
    expected[f"{1:012d}"].append("again")  # the image has two ids
    content = {"info": {"annotations": []}, "images": images, "annotations": annotations}
    write_file(root / "captions_train2017.json", json.dumps(content).encode())
    source = coco_source(str(root / "captions_train2017.json"), str(root / "train2017"))
    skipped = SKIPPED - Counter(["duplicate_key"])
    return source, expected, skipped + Counter(["no_caption", "no_image"])


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


def make_job(root: Path, source, rule=ImageRule(min_side=16), shard_size: int = 5) -> Job:  # noqa: B008
    return Job(source, {"source": "test"}, rule, shard_size, root / "out")
