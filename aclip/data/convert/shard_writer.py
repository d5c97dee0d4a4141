"""One shard: entries -> a tar that appears complete and is the same bytes each time."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from aclip.data.captions import LINE_END
from aclip.data.convert.entries import Entry, Note, Rejected
from aclip.data.convert.images import FileReader, ImageRule, prepare_image
from aclip.data.convert.plan import Tally
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
    rejections: Tally = field(default_factory=Tally)
    notes: Tally = field(default_factory=Tally)

    def dump(self) -> str:
        tallies = {"rejections": self.rejections.dump(), "notes": self.notes.dump()}
        return json.dumps(vars(self) | tallies)

    @staticmethod
    def load(text: str) -> "ShardRecord":
        """From what `dump` gives.

        Raises:
            ValueError: it is not whole.
        """
        values = json.loads(text)
        tallies = {name: Tally.load(values[name]) for name in ("rejections", "notes")}
        return ShardRecord(**(values | tallies))


def write_shard(
    path: Path,
    number: int,
    entries: Iterable[Entry],
    reader: FileReader,
    rule: ImageRule,
    on_entry: Callable[[], None],
) -> ShardRecord:
    """Writes the samples of entries that are good: KEY.jpg (or png, webp), KEY.txt with the first
    caption on one line, and KEY.json with `captions` if there are several or one has line ends.

    tarfile, not webdataset's writer: that one imports torch and takes no long names.

    Args:
        path: the tar's path.
        number: the shard's number.
        entries: entries with captions that are not blank, or with caption files.
        reader: reads their files.
        rule: what is kept of an image.
        on_entry: called after each entry.

    Raises:
        NotWritten: the tar can't be written.
        ConfigError: a file of the source can't be read.
    """
    rejections, notes = Tally(), Tally()
    images: Counter[str] = Counter()
    with appearing(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
            for entry in entries:
                members = _make_members(entry, reader, rule, images, notes)
                if isinstance(members, Rejected):
                    rejections.add(members)
                else:
                    _add(archive, entry.key, members)
                on_entry()
        size = temporary.stat().st_size
    samples = sum(images.values())
    return ShardRecord(number, samples, size, dict(images), rejections, notes)


def _make_members(
    entry: Entry, reader: FileReader, rule: ImageRule, images: Counter[str], notes: Tally
) -> dict[str, bytes] | Rejected:
    """{suffix: content} of the sample; counts its image and what is noted about its captions."""
    captions, kinds = list(entry.captions), frozenset()
    if entry.caption_files:
        captions = reader.read_captions(entry)
        if isinstance(captions, Rejected):
            return captions
        kinds = captions.notes
    content = reader.read_image(entry)
    if isinstance(content, Rejected):
        return content
    image = prepare_image(entry.key, content, rule)
    if isinstance(image, Rejected):
        return replace(image, why=f"{entry.member or entry.image}: {image.why}")
    images[image.what] += 1
    for kind in kinds:
        notes.add(Note(entry.key, kind, " and ".join(entry.caption_files)))
    lines = LINE_END.split(captions[0])
    if len(lines) > 1:
        lines = [" ".join(line.strip() for line in lines if line.strip())]
    members = {image.suffix: image.content, "txt": lines[0].encode()}
    if [*captions] != lines:
        members["json"] = json.dumps({"captions": captions}, ensure_ascii=False).encode()
    return members


def _add(archive: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    for suffix, content in members.items():
        # TarInfo's owner and time are 0, so that the same samples are the same bytes.
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    archive.members.clear()  # tarfile would keep every header
