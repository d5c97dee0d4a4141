"""One shard: entries -> a tar that appears complete and is the same bytes each time."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from aclip.data.convert.entries import Entry, Rejected
from aclip.data.convert.images import FileReader, ImageRule, prepare_image
from aclip.data.convert.plan import Rejections
from aclip.files import appearing


@dataclass(frozen=True)
class ShardRecord:
    """What became of a shard's entries."""

    number: int
    samples: int
    bytes: int
    """The size of the tar."""
    images: dict[str, int] = field(default_factory=dict)
    """Samples by StoredImage.what."""
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The rejected entries' counts and examples, see Rejections."""

    def dump(self) -> str:
        return json.dumps(asdict(self))


def write_shard(
    path: Path,
    number: int,
    entries: Iterable[Entry],
    reader: FileReader,
    rule: ImageRule,
    on_entry: Callable[[], None],
) -> ShardRecord:
    """Writes the samples of entries that are good: KEY.jpg (or png, webp), KEY.txt with the first
    caption, and KEY.json with `captions` if there are several.

    tarfile, not webdataset's writer: that one imports torch and takes no long names.

    Args:
        path: the tar's path.
        number: the shard's number.
        entries: entries with captions that are not blank, or with a caption file.
        reader: reads their files.
        rule: what is kept of an image.
        on_entry: called after each entry.

    Raises:
        NotWritten: the tar can't be written.
        ConfigError: a file of the source can't be read.
    """
    rejections = Rejections()
    images: Counter[str] = Counter()
    with appearing(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
            for entry in entries:
                members = _make_members(entry, reader, rule, images)
                if isinstance(members, Rejected):
                    rejections.add(members)
                else:
                    _add(archive, entry.key, members)
                on_entry()
        size = temporary.stat().st_size
    samples = sum(images.values())
    return ShardRecord(
        number, samples, size, dict(images), dict(rejections.counts), rejections.examples
    )


def _make_members(
    entry: Entry, reader: FileReader, rule: ImageRule, images: Counter[str]
) -> dict[str, bytes] | Rejected:
    """{suffix: content} of the sample; counts its image."""
    captions = entry.captions
    if entry.caption_file is not None:
        caption = reader.read_caption(entry)
        if isinstance(caption, Rejected):
            return caption
        captions = (caption,)
    content = reader.read_image(entry)
    if isinstance(content, Rejected):
        return content
    image = prepare_image(entry.key, content, rule)
    if isinstance(image, Rejected):
        return image
    images[image.what] += 1
    members = {image.suffix: image.content, "txt": captions[0].encode()}
    if len(captions) > 1:
        members["json"] = json.dumps({"captions": captions}, ensure_ascii=False).encode()
    return members


def _add(archive: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    for suffix, content in members.items():
        # TarInfo's owner and time are 0, so that the same samples are the same bytes.
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    archive.members.clear()  # tarfile would keep every header
