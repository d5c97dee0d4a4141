"""What a sample's members mean: its image and its captions."""

import json
from dataclasses import replace

from aclip.data.images import suffixes
from aclip.data.shards.found import LINK, printable
from aclip.data.shards.listing import Skip
from aclip.data.shards.tar import RawSample

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
IMAGE_SUFFIXES += tuple(
    sorted({suffix[1:] for suffix in suffixes.IMAGE_SUFFIXES} - {*IMAGE_SUFFIXES})
)
"""Of a sample with several images, the first in this order is taken."""
MAX_IMAGE_BYTES = 2**28
MAX_TEXT_BYTES = 2**20


def read_image_bytes(sample: RawSample) -> bytes | Skip:
    """The encoded image of a sample: its first member with a suffix of IMAGE_SUFFIXES."""
    for suffix in IMAGE_SUFFIXES:
        if suffix in sample.members:
            if sample.size(suffix) > MAX_IMAGE_BYTES:
                return Skip("unreadable_image")
            return sample.read(suffix)
    return Skip("no_image")


def read_captions(sample: RawSample) -> list[str] | Skip:
    """The captions that are not blank: json's `captions`, else json's `caption`, else the txt."""
    captions = None
    if _has_text(sample, "json"):
        captions = _captions_of_json(sample.read("json"))
    if captions is None and _has_text(sample, "txt"):
        captions = [sample.read("txt").decode("utf-8", errors="replace")]
    if captions is None:
        return Skip("no_caption")
    return [caption for caption in captions if caption.strip()] or Skip("empty_caption")


def with_found(skip: Skip, sample: RawSample) -> Skip:
    """The same with the suffixes that were found, where an image or a caption is missing."""
    if skip.kind not in ("no_image", "no_caption"):
        return skip
    return replace(skip, found=found_in(sample))


def found_in(sample: RawSample) -> tuple[str, ...]:
    """The suffixes of a sample's members, for messages."""
    links = (f"{suffix}{LINK}" for suffix in sample.links)
    return tuple(sorted(map(printable, (*sample.members, *links))))


def _has_text(sample: RawSample, suffix: str) -> bool:
    return suffix in sample.members and sample.size(suffix) <= MAX_TEXT_BYTES


def _captions_of_json(content: bytes) -> list[str] | None:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    captions = values.get("captions")
    if isinstance(captions, list) and captions and all(isinstance(text, str) for text in captions):
        return [_valid(text) for text in captions]
    return [_valid(values["caption"])] if isinstance(values.get("caption"), str) else None


def _valid(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
