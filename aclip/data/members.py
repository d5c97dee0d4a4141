"""What a sample's members mean: its image and its captions."""

from dataclasses import replace

from aclip.data.captions import Captions, captions_of
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


def read_captions(sample: RawSample) -> Captions | Skip:
    """The captions of a sample's txt and json, see captions_of."""
    texts = [sample.read("txt")] if _has_text(sample, "txt") else []
    return captions_of(texts, sample.read("json") if _has_text(sample, "json") else None)


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
