"""What a conversion wrote and what it left out, as JSON and as a table."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from aclip.cli import text_table
from aclip.data.convert.entries import SKIP_KINDS
from aclip.data.convert.plan import ConversionPlan, Rejections
from aclip.data.convert.shard_writer import ShardRecord
from aclip.files import write_whole

REPORT_FILE = "report.json"
EXAMPLE_LENGTH = 100
"""Characters of an example in the table."""
REASONS = {
    "unreadable_image": "damaged, of no known format, or far too large",
    "image_too_small": "a side shorter than --min-side",
    "no_image": "the image is not there",
    "empty_caption": "no caption, or only blank ones",
    "no_caption": "the caption is not there",
    "duplicate_key": "an earlier entry has the key",
    "malformed_row": "the row can't be understood",
}
WHAT = {
    "original": "bytes as they were",
    "reencoded": "encoded anew",
    "rotated": "bytes as they were; the loader does not apply their EXIF orientation",
}


def make_report(
    conversion: dict[str, Any], plan: ConversionPlan, records: list[ShardRecord]
) -> dict[str, Any]:
    """The report, which is the same whether the conversion was interrupted or not.

    The number of entries is the number of samples and of all that was skipped.

    Args:
        conversion: the conversion's arguments.
        plan: its complete plan.
        records: the records of all shards, in their order.
    """
    rejections = Rejections()
    rejections.merge(plan.rejections.counts, plan.rejections.examples)
    images: Counter[str] = Counter()
    for record in records:
        rejections.merge(record.counts, record.examples)
        images.update(record.images)
    return {
        "conversion": conversion,
        "entries": plan.num_seen,
        "samples": sum(record.samples for record in records),
        "shards": len(records),
        "bytes": sum(record.bytes for record in records),
        "images": dict(sorted(images.items())),
        "skipped": {
            kind: rejections.counts[kind] for kind in SKIP_KINDS if rejections.counts[kind]
        },
        "examples": rejections.examples,
    }


def format_report(report: dict[str, Any]) -> str:
    """The report as a text table."""
    rows = [("entries", report["entries"], "of the source")]
    rows += [("samples", report["samples"], f"in {report['shards']:,} shards")]
    rows += [(f"  {what}", count, WHAT[what]) for what, count in report["images"].items()]
    rows += [("skipped", sum(report["skipped"].values()), "")]
    for kind, count in report["skipped"].items():
        example = report["examples"][kind][0]
        rows.append((f"  {kind}", count, f"{REASONS[kind]}, e.g. {example[:EXAMPLE_LENGTH]}"))
    return text_table([(name, f"{count:,}", text) for name, count, text in rows], left=(0, 2))


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that appears complete."""
    write_whole(path, json.dumps(content, indent=1).encode())
