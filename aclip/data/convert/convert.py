"""launch/convert.py's arguments -> a source, a rule and a run: the work behind the script."""

import argparse
import os
import sys
from pathlib import Path

from aclip.cli import EXIT_INTERRUPTED
from aclip.data.convert import conversion
from aclip.data.convert.entries import Source
from aclip.data.convert.images import ImageRule
from aclip.data.convert.report import REPORT_FILE, format_report
from aclip.data.convert.sources.coco import coco_source
from aclip.data.convert.sources.conceptual import conceptual_source
from aclip.data.convert.sources.folder import folder_source
from aclip.data.convert.sources.img2dataset import index_in_place
from aclip.data.convert.sources.redcaps import redcaps_source
from aclip.data.convert.sources.table import table_source
from aclip.data.convert.sources.yfcc import yfcc_source
from aclip.data.convert.sources.yfcc_list import write_yfcc_list
from aclip.errors import ConfigError
from aclip.machine import usable_cores

READING = ("source", "name", "image_column", "caption_column", "no_quotes", "separator")
"""Arguments that decide how a source is read, besides its paths."""


def convert(arguments: argparse.Namespace) -> None:
    """Runs `launch/convert.py` with its parsed arguments.

    Raises:
        ConfigError: bad arguments, or a source or folder that can't be used.
    """
    try:
        _run(arguments)
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to continue", file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED)  # the workers end by themselves


def _run(arguments: argparse.Namespace) -> None:
    if arguments.source == "yfcc-list":
        write_yfcc_list(arguments.metadata, arguments.subset, arguments.image_ids, arguments.out)
        return
    processes = _processes(arguments.processes)
    if arguments.source == "img2dataset":
        print(index_in_place(arguments.folder, processes), flush=True)
        return
    if arguments.source == "word-counts":
        # Imported here: the tokenizer's packages take seconds, which other commands do not need.
        from aclip.data.convert.word_counts import write_word_counts

        keys = arguments.captions or []
        print(write_word_counts(arguments.shards, arguments.out, keys, processes), flush=True)
        return
    rule = _image_rule(arguments)
    if arguments.shard_size < 1:
        raise ConfigError(f"--shard-size is {arguments.shard_size}; give 1 or more")
    given = {name: getattr(arguments, name, None) for name in READING}
    job = conversion.Job(
        _open_source(arguments),
        {name: value for name, value in given.items() if value is not None},
        rule,
        arguments.shard_size,
        Path(arguments.out),
    )
    report = conversion.run(job, processes)
    print(format_report(report))
    print(f"wrote {job.out}, {report['bytes'] / 1e9:.3g} GB; details in {job.out / REPORT_FILE}")
    print(f"train on it: --train '{job.out}/*.tar'", flush=True)


def _open_source(arguments: argparse.Namespace) -> Source:
    match arguments.source:
        case "yfcc15m":
            return yfcc_source(arguments.metadata, arguments.images)
        case "cc3m" | "cc12m" as release:
            return conceptual_source(release, arguments.tsv, arguments.images, arguments.name)
        case "coco":
            return coco_source(arguments.annotations, arguments.images)
        case "redcaps":
            return redcaps_source(arguments.annotations, arguments.images)
        case "folder":
            return folder_source(arguments.folder)
        case "table":
            return table_source(
                arguments.table,
                arguments.images,
                arguments.image_column,
                arguments.caption_column or ["caption"],
                not arguments.no_quotes,
                arguments.separator,
            )


def _image_rule(arguments: argparse.Namespace) -> ImageRule:
    if arguments.min_side < 1:
        raise ConfigError(f"--min-side is {arguments.min_side}; give pixels, 1 or more")
    if arguments.short_side is None:
        for option in ("format", "quality"):
            if getattr(arguments, option) is not None:
                raise ConfigError(
                    f"--{option} is {getattr(arguments, option)} without --short-side, so that no "
                    "image is encoded anew; give --short-side, or leave it out"
                )
        return ImageRule(arguments.min_side)
    if arguments.short_side < arguments.min_side:
        raise ConfigError(
            f"--short-side is {arguments.short_side}, below --min-side {arguments.min_side}; give "
            "pixels such as 256"
        )
    encoding, quality = arguments.format or ImageRule.encoding, arguments.quality
    quality = ImageRule.quality if quality is None else quality
    if not 1 <= quality <= 100:
        raise ConfigError(f"--quality is {quality}; give 1 to 100")
    return ImageRule(arguments.min_side, arguments.short_side, encoding, quality)


def _processes(given: int | None) -> int:
    if given is not None and given < 1:
        raise ConfigError(f"--processes is {given}; give 1 or more")
    return given or usable_cores()
