"""img2dataset's shards, indexed where they lie."""

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from aclip.data.convert.pool import end_with_parent
from aclip.data.convert.report import write_json
from aclip.data.convert.sources.text_files import existing_folder
from aclip.data.images.suffixes import is_litter
from aclip.data.members import IMAGE_SUFFIXES
from aclip.data.progress import progress_bar
from aclip.data.shards.counts import SIZES_FILE
from aclip.data.shards.tar import TarShard
from aclip.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ShardFacts:
    name: str
    samples: int
    without_image: int
    without_caption: int
    is_broken: bool


def index_in_place(folder: str, processes: int) -> str:
    """Writes sizes.json beside the shards of a folder; nothing else is written or copied.

    Headers alone are read, so an image is not known to be good; the loader skips and counts it.

    Returns:
        A table of what was found.

    Raises:
        ConfigError: no such folder, no .tar in it, one can't be read, or none holds a sample.
        NotWritten: sizes.json can't be written.
    """
    root = existing_folder(folder, "FOLDER")
    names = sorted(path for path in root.iterdir() if not is_litter(path.name))
    paths = [path for path in names if path.suffix.lower() == ".tar" and path.is_file()]
    if not paths:
        raise ConfigError(
            f"FOLDER is {root}, which holds no .tar but {_describe(names)}; give img2dataset's "
            "output (output_format=webdataset)"
        )
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, end_with_parent) as pool:
        counted = pool.map(count_shard, paths)
        found = list(progress_bar(counted, desc="counting", total=len(paths), unit=" shards"))
    samples = sum(facts.samples for facts in found)
    if samples == 0:
        raise ConfigError(f"FOLDER is {root}, whose {len(found)} shards hold no sample; check them")
    write_json(root / SIZES_FILE, {facts.name: facts.samples for facts in found})
    lines = [f"{samples:,} samples in {len(found):,} shards: {root / SIZES_FILE}"]
    for words, names in {
        "truncated or corrupt": [facts.name for facts in found if facts.is_broken],
        "without a sample": [facts.name for facts in found if facts.samples == 0],
    }.items():
        if names:
            lines.append(f"{len(names):,} shards {words}: {', '.join(names[:10])}")
    for words, count in {
        "image": sum(facts.without_image for facts in found),
        "caption": sum(facts.without_caption for facts in found),
    }.items():
        if count:
            lines.append(f"{count:,} samples have no {words}; the loader skips and counts them")
    return "\n".join(lines)


def _describe(paths: list[Path]) -> str:
    kinds = Counter("folders" if path.is_dir() else path.suffix or "files" for path in paths)
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5)) or "nothing"


def count_shard(path: Path) -> ShardFacts:
    """What the headers of a shard tell."""
    shard = TarShard(str(path))
    samples = without_image = without_caption = 0
    for sample in shard.walk():
        samples += 1
        without_image += not any(suffix in sample.members for suffix in IMAGE_SUFFIXES)
        without_caption += not ("txt" in sample.members or "json" in sample.members)
    return ShardFacts(path.name, samples, without_image, without_caption, shard.is_broken)
