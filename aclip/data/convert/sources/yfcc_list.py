"""YFCC100M's raw metadata -> the list of captioned images, cleaned as SLIP does, in one pass."""

import json
import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from aclip.data.captions import NOTE_KINDS
from aclip.data.convert.sources.text_files import TextLines, existing_file
from aclip.data.convert.sources.yfcc import NUM_IDS
from aclip.data.progress import progress_bar
from aclip.errors import ConfigError
from aclip.files import appearing

HTML = re.compile("<a.*?>|</a>|</?[bi]>")
URL = re.compile(r"(?:http|www)\S+")
TITLE, DESCRIPTION = 8, 9  # columns of the metadata; column 0 is the line number


def write_yfcc_list(metadata: str, subset: str, image_ids: str | None, out: str) -> None:
    """Writes a JSON line {"id", "title", "description"} for each image of a subset.

    A line of text and two masks over the ids (100 MB each) are all that memory holds.

    Args:
        metadata: yfcc100m_dataset, plain, .bz2 or .gz.
        subset: OpenAI's yfcc100m_subset_data.tsv, plain, .bz2 or .gz; its first column is an id.
        image_ids: .npy of the ids that were downloaded, SLIP's flickr_unique_ids.npy; None for all.
        out: file to write, a new one; appears complete.

    Raises:
        ConfigError: an input is missing, damaged or of another format, or `out` can't be written.

    Source: facebookresearch/SLIP, make_dataset.py, whose list this equals.
    """
    path = Path(out)
    if path.exists():
        raise ConfigError(f"--out is {out}, which exists; remove it, or give another file")
    source = existing_file(metadata, "METADATA")
    wanted = _read_subset(existing_file(subset, "--subset"))
    if image_ids is not None:
        wanted &= _read_image_ids(existing_file(image_ids, "--image-ids"))
    with appearing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        counts = _write_rows(source, wanted, file)
    print(
        f"wrote {counts['written']:,} images to {path} ({counts['both_empty']:,} with neither "
        f"title nor description); {counts['not_in_subset']:,} lines are not in the subset, "
        f"{counts['malformed']:,} malformed",
        flush=True,
    )
    for kind in NOTE_KINDS:
        if counts[kind]:
            print(f"{kind} {counts[kind]:,}: {NOTE_KINDS[kind]}", flush=True)


def clean_text(field: str) -> str:
    """A title or description as text: decoded, without html tags and urls.

    SLIP puts spaces for plus signs after decoding, so that a real plus becomes a space too.
    """
    text = unquote(field).replace("+", " ")
    return URL.sub("", HTML.sub("", text))


def _write_rows(source: Path, wanted: np.ndarray, file) -> Counter:
    counts = Counter()
    size = source.stat().st_size
    with progress_bar(total=size, unit="B", unit_scale=True, desc="reading metadata") as bar:
        lines = TextLines(source, lambda position: bar.update(position - bar.n))
        for number, line in enumerate(lines, 1):
            counts.update(note.kind for note in lines.notes)
            lines.notes.clear()
            columns = line.rstrip("\n").split("\t", DESCRIPTION + 1)
            if number == 1:
                _check_id(columns[0], source)
            index = int(columns[0]) if _is_id(columns[0]) else None
            if index is None or len(columns) <= DESCRIPTION:
                counts["malformed"] += 1
            elif not wanted[index]:
                counts["not_in_subset"] += 1
            else:
                row = {
                    "id": index,
                    "title": clean_text(columns[TITLE]),
                    "description": clean_text(columns[DESCRIPTION]),
                }
                file.write(json.dumps(row) + "\n")
                counts["written"] += 1
                counts["both_empty"] += not (row["title"].strip() or row["description"].strip())
        bar.update(size - bar.n)
    return counts


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) < NUM_IDS


def _check_id(text: str, path: Path) -> None:
    if not _is_id(text):
        raise ConfigError(
            f"{path} starts with {text[:40]!r}, which is no line number below {NUM_IDS}; give the "
            "release of YFCC100M whose first column is the line number"
        )


def _read_subset(path: Path) -> np.ndarray:
    """(NUM_IDS,) bool"""
    mask = np.zeros(NUM_IDS, dtype=bool)
    for line in TextLines(path):
        index = line.split("\t", 1)[0].strip()
        if index:
            _check_id(index, path)
            mask[int(index)] = True
    return mask


def _read_image_ids(path: Path) -> np.ndarray:
    """(NUM_IDS,) bool"""
    mask = np.zeros(NUM_IDS, dtype=bool)
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
        if ids.dtype.kind not in "iu" or ids.ndim != 1:
            raise ValueError(f"it holds {ids.dtype} of shape {ids.shape}")
        if len(ids) and not (ids.min() >= 0 and ids.max() < NUM_IDS):
            raise ValueError(f"an id is not below {NUM_IDS}")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--image-ids is {path}, which is not a .npy list of ids ({error}); give SLIP's "
            "flickr_unique_ids.npy"
        ) from None
    mask[ids] = True
    return mask
