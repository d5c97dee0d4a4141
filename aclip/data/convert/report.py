"""What a conversion wrote and what it left out, as JSON and as a table."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from aclip.cli import text_table
from aclip.data.captions import NOTE_KINDS
from aclip.data.convert.entries import FURTHER_CAPTION, SKIP_KINDS
from aclip.data.convert.plan import ConversionPlan, Tally
from aclip.data.convert.shard_writer import ShardRecord
from aclip.files import write_whole

REPORT_FILE = "report.json"
EXAMPLE_LENGTH = 100
"""Characters of an example in the table."""
REASONS = {
    "unreadable_image": "damaged, of no known format, or far too large",
    "unsupported_format": "an image of a format that aclip does not decode",
    "image_too_small": "a side shorter than --min-side",
    "no_image": "the image is not there",
    "empty_caption": "no caption, or only blank ones",
    "no_caption": "the caption is not there",
    "duplicate_key": "an earlier entry has the key",
    "malformed_row": "the row can't be understood",
    FURTHER_CAPTION: "an entry that gave an earlier image one more caption",
    "separator_in_caption": "the last column was taken to the end of the line",
    "no_text_in_row": "a caption in the row is no text and was left out",
    "litter": "left by a system or another tool, and passed over",
    "other_file": "neither an image nor a caption, and passed over",
} | NOTE_KINDS
"""By kind; the format may stand behind a kind, see SKIP_KINDS."""
WHAT = {
    "original": "bytes as they were",
    "reencoded": "encoded anew",
    "rotated": "bytes as they were; the loader does not apply their EXIF orientation",
}


def make_report(
    conversion: dict[str, Any], plan: ConversionPlan, records: list[ShardRecord]
) -> dict[str, Any]:
    """The report, which is the same whether the conversion was interrupted or not.

    The entries are the samples, all that was skipped, and the further captions.

    Args:
        conversion: the conversion's arguments.
        plan: its complete plan.
        records: the records of all shards, in their order.
    """
    rejections, notes = Tally(), Tally()
    rejections.merge(plan.rejections)
    notes.merge(plan.notes)
    images: Counter[str] = Counter()
    for record in records:
        rejections.merge(record.rejections)
        notes.merge(record.notes)
        images.update(record.images)
    return {
        "conversion": conversion,
        "entries": plan.num_seen,
        "samples": sum(record.samples for record in records),
        "shards": len(records),
        "bytes": sum(record.bytes for record in records),
        "images": dict(sorted(images.items())),
        "skipped": dict(sorted(rejections.counts.items(), key=_place)),
        "noted": dict(sorted(notes.counts.items())),
        "examples": rejections.examples | notes.examples,
    }


def format_report(report: dict[str, Any]) -> str:
    """The report as a text table."""
    rows = [("entries", report["entries"], "of the source")]
    rows += [("samples", report["samples"], f"in {report['shards']:,} shards")]
    rows += [(f"  {what}", count, WHAT[what]) for what, count in report["images"].items()]
    for part in ("skipped", "noted"):
        if part == "skipped" or report[part]:
            rows.append((part, sum(report[part].values()), ""))
        for kind, count in report[part].items():
            rows.append((f"  {kind}", count, _explain(kind, report)))
    return text_table([(name, f"{count:,}", text) for name, count, text in rows], left=(0, 2))


def say_nothing_was_usable(report: dict[str, Any]) -> str:
    """Why a conversion gave no sample, in a sentence."""
    skipped = report["skipped"]
    if not skipped:
        found = ", ".join(f"{kind} {count:,}" for kind, count in report["noted"].items())
        return f"the source holds no entry{f', only {found}' * bool(found)}; check it"
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in skipped.items())
    kind = max(skipped, key=skipped.get)
    return (
        f"no entry of the source became a sample ({kinds}); {kind} means: {_explain(kind, report)}"
    )


def _place(counted: tuple[str, int]) -> tuple[int, str]:
    kind = counted[0]
    return SKIP_KINDS.index(kind.partition(" ")[0]), kind


def _explain(kind: str, report: dict[str, Any]) -> str:
    example = report["examples"][kind][0]
    # A name may hold line ends, and bytes that are no text.
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in example[:EXAMPLE_LENGTH])
    return f"{REASONS[kind.partition(' ')[0]]}, e.g. {shown}"


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that appears complete."""
    write_whole(path, json.dumps(content, indent=1).encode())
