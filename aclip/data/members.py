"""What a sample's members mean: its image and its captions."""

from collections.abc import Sequence
from dataclasses import replace

from aclip.data.captions import Captions, captions_of, captions_under
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


def read_captions(sample: RawSample, keys: Sequence[str] = ()) -> Captions | Skip:
    """The captions of a sample's txt and json, see captions_of; with keys those under the first
    that has some, see captions_under."""
    if keys:
        return captions_under(keys, lambda suffix: _read_text(sample, suffix))
    text = _read_text(sample, "txt")
    return captions_of([] if text is None else [text], _read_text(sample, "json"))


def with_found(skip: Skip, sample: RawSample) -> Skip:
    """The same with the suffixes that were found, where an image or a caption is missing."""
    if skip.kind not in ("no_image", "no_caption"):
        return skip
    return replace(skip, found=found_in(sample))


def found_in(sample: RawSample) -> tuple[str, ...]:
    """The suffixes of a sample's members, for messages."""
    links = (f"{suffix}{LINK}" for suffix in sample.links)
    return tuple(sorted(map(printable, (*sample.members, *links))))


def _read_text(sample: RawSample, suffix: str) -> bytes | None:
    if suffix in sample.members and sample.size(suffix) <= MAX_TEXT_BYTES:
        return sample.read(suffix)
    return None
