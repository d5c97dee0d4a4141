"""What decides which sample comes next, kept in checkpoints and compared when a run continues."""

import hashlib
import json
import os
from collections import Counter
from itertools import groupby, zip_longest
from pathlib import Path

from aclip.config.recipe import Recipe
from aclip.config.sections import DataConfig
from aclip.data.dealing import count_lanes
from aclip.data.marks import describe_difference, shard_marks
from aclip.data.shards.listing import Shard, shard_names
from aclip.data.word_counts import word_counts_digest
from aclip.errors import ConfigError
from aclip.run_folder.layout import SHARDS_FILE

SHARD_LIST, MARKS = "sha256", "marks"
ORDER, ORDER_NOW = "order", 2
"""How the samples are dealt, and the way of this version: lanes that take consecutive parts of an
epoch. Checkpoints that name none dealt whole shards to the lanes."""
WORD_COUNTS = "word_counts"
"""The counts of words that shorten the captions, where the recipe reads some."""
FIELDS = ("train.seed", "data.shuffle_block", "data.lanes")


def count_shards(config: DataConfig, shards: list[Shard]) -> dict:
    """What tells the training data of two runs apart, as far as counting can."""
    values = {"shards": len(shards), "samples": sum(shard.num_samples for shard in shards)}
    if config.sources:
        sizes = Counter(shard.source for shard in shards)
        values["sources"] = [
            [sizes[index], source.weight] for index, source in enumerate(config.sources)
        ]
    return values


def fingerprint(recipe: Recipe, shards: list[Shard]) -> dict:
    """What the order of samples is made of: with another value of any of these, a continued run
    would repeat samples and leave out others, so that it is refused.

    How a sample is treated may change: views, augmentation, masks, losses, captions; and which
    samples are skipped (data.min_image_side, data.on_shard_error, data.captions), since a cursor
    counts those too. Nobody sees when a file of word counts beside the data changes, so its digest
    is a part of the fingerprint.

    Returns:
        JSON-compatible: the counts, the kind of order, a SHA-256 of list_lines, the marks of
        shard_marks, a value for each of FIELDS, and where the recipe reads counts of words, a
        SHA-256 of their files.
    """
    values = (recipe.train.seed, recipe.data.shuffle_block, count_lanes(recipe))
    by_frequency = recipe.text.reduce == "frequency"
    return {
        **({WORD_COUNTS: word_counts_digest(recipe, shards)} if by_frequency else {}),
        **count_shards(recipe.data, shards),
        ORDER: ORDER_NOW,
        SHARD_LIST: _digest(list_lines(shards)),
        MARKS: shard_marks(shards),
        **dict(zip(FIELDS, values, strict=True)),
    }


def digests(shards: list[Shard]) -> dict[str, str | None]:
    """What tells two sets of equal counts apart, wherever they lie: a SHA-256 of list_lines, and
    one of the marks of shard_marks, which is None where a shard has no mark."""
    marks = shard_marks(shards)
    return {
        SHARD_LIST: _digest(list_lines(shards)),
        MARKS: None if None in marks else _digest(marks),
    }


def list_lines(shards: list[Shard]) -> list[str]:
    """A line for each shard in order: its name, samples and source. The name leaves out what all
    paths of a source begin with, since data may lie elsewhere on another machine."""
    lines = []
    for source, group in groupby(shards, key=lambda shard: shard.source):
        of_source = list(group)
        names = shard_names([shard.url for shard in of_source])
        prefix = os.path.commonprefix(names)
        start = prefix.rfind("/") + 1
        lines += [
            f"{name[start:]} {shard.num_samples} {source}"
            for name, shard in zip(names, of_source, strict=True)
        ]
    return lines


def check_progress(recipe: Recipe, shards: list[Shard], progress: dict, checkpoint: Path) -> None:
    """Refuses to continue from a checkpoint where the stream of samples would not go on as it was.

    Args:
        progress: what the checkpoint's state.json holds.

    Raises:
        ConfigError: names the global batch, or what `check_continues` names.
    """
    batch_size = recipe.train.global_batch_size
    samples = progress["samples"] - progress.get("stage", {}).get("samples", 0)
    if samples != progress["step"] * batch_size:
        raise ConfigError(
            f"train.global_batch_size is {batch_size}, but {checkpoint} was trained with "
            f"{samples // progress['step']}; set it back, or use --resume none with "
            "another --output"
        )
    check_continues(recipe, shards, progress["data"], checkpoint)


def check_continues(recipe: Recipe, shards: list[Shard], then: dict, checkpoint: Path) -> None:
    """Refuses to continue where the stream of samples would not go on as it was.

    Args:
        then: the fingerprint of the run that wrote the checkpoint.

    Raises:
        ConfigError: names the first field that differs, or says that an earlier version wrote the
            checkpoint, whose order can't be continued.
    """
    if then.get(ORDER) != ORDER_NOW:
        raise ConfigError(
            f"{checkpoint} was written by a version that dealt the samples in another order, which "
            "can't be continued; use --resume none with another --output, and --init with the "
            "checkpoint to start from its weights"
        )
    now = fingerprint(recipe, shards)
    anew = "or use --resume none with another --output"
    if _counted(now) != _counted(then) or then[SHARD_LIST] != now[SHARD_LIST]:
        field = "data.sources" if recipe.data.sources else "data.train"
        difference = _first_difference(list_lines(shards), checkpoint, then[SHARD_LIST])
        raise ConfigError(
            f"{field} gives {_counted(now)}, but {checkpoint} was trained on {_counted(then)}"
            f"{difference}; give the same shards in the same order, {anew}"
        )
    # A checkpoint of an earlier version has no marks.
    for shard, mark, before in zip(shards, now[MARKS], then.get(MARKS, ()), strict=False):
        if None not in (mark, before) and mark != before:
            raise ConfigError(
                f"shard {shard.url} is not the one that {checkpoint} was trained on: "
                f"{describe_difference(mark, before)}; put that one back, {anew}"
            )
    if now.get(WORD_COUNTS) != then.get(WORD_COUNTS) and {WORD_COUNTS} <= now.keys() & then.keys():
        raise ConfigError(
            f"the counts of words (text.word_counts) are not those that {checkpoint} was trained "
            f"with; put that file back, {anew}"
        )
    weights_now, weights_then = (_weights(values) for values in (now, then))
    if weights_now != weights_then:
        raise ConfigError(
            f"data.sources has the weights {weights_now}, but {checkpoint} was trained with "
            f"{weights_then}; set them back, {anew}"
        )
    for field in FIELDS:
        if then[field] != now[field]:
            raise ConfigError(
                f"{field} is {now[field]}, but {checkpoint} was trained with {then[field]}; "
                f"set it back, {anew}"
            )


def _counted(values: dict) -> str:
    text = f"{values['shards']} shards with {values['samples']} samples"
    sizes = [str(size) for size, _ in values.get("sources", ())]
    return f"{text} ({' + '.join(sizes)} shards by source)" if sizes else text


def _weights(values: dict) -> list[float]:
    return [weight for _, weight in values.get("sources", ())]


def _first_difference(now: list[str], checkpoint: Path, digest: str) -> str:
    """The first difference, in words, where the checkpoint's run folder holds the list with that
    SHA-256."""
    path = checkpoint.resolve().parent.parent / SHARDS_FILE
    if not path.is_file():
        return ""
    then = json.loads(path.read_text())
    if _digest(then) != digest:
        return ""
    for place, (line, before) in enumerate(zip_longest(now, then, fillvalue="none")):
        if line != before:
            return f" (name, samples and source of shard {place}: {line} instead of {before})"
    return ""


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
