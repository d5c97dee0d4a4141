"""RedCaps: annotation files, one a subreddit and year, or SLIP's single file of them all."""

from collections.abc import Iterator
from pathlib import Path

from aclip.data.captions import texts_in
from aclip.data.convert.entries import Entry, Rejected, Source, make_key
from aclip.data.convert.sources.json_stream import iterate_objects, require_ijson
from aclip.data.convert.sources.text_files import existing_file, existing_folder
from aclip.errors import ConfigError

FIELDS = ("image_id", "subreddit", "caption")


def redcaps_source(annotations: str, images: str) -> Source:
    """The images SUBREDDIT/IMAGE_ID.jpg with the processed caption.

    Args:
        annotations: a JSON file, or a folder of them, read in the order of their names.
        images: the folder that redcaps-downloader writes.

    Raises:
        ConfigError: no such file or folder, or ijson is not installed; while iterating, a JSON is
            of another format.
    """
    if Path(annotations).is_dir():
        files = tuple(sorted(Path(annotations).glob("*.json")))
        if not files:
            raise ConfigError(f"ANNOTATIONS is {annotations}, which holds no .json; check the path")
    else:
        files = (existing_file(annotations, "ANNOTATIONS"),)
    require_ijson(annotations)

    def entries() -> Iterator[Entry | Rejected]:
        for path in files:
            for annotation in iterate_objects(path, "annotations", may_be_bare=True):
                yield _entry(annotation)

    return Source(existing_folder(images, "--images"), files, entries)


def _entry(annotation: dict) -> Entry | Rejected:
    image_id, subreddit, caption = (annotation.get(field) for field in FIELDS)
    captions = [caption] if isinstance(caption, str) else texts_in(caption)[0]
    lacking = [
        field
        for field, value in zip(FIELDS, (image_id, subreddit, captions), strict=True)
        if not value or not isinstance(value, str | list)
    ]
    if lacking:
        return Rejected(str(image_id), "malformed_row", f"no text in {' and '.join(lacking)}")
    path = f"{subreddit}/{image_id}"
    return Entry(make_key(path), f"{path}.jpg", tuple(captions))
