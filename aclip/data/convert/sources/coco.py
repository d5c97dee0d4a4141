"""COCO Captions: the annotations JSON, about five captions an image."""

import os
from collections.abc import Iterator

from aclip.data.captions import texts_in
from aclip.data.convert.entries import Entry, Rejected, Source, make_key
from aclip.data.convert.sources.json_stream import iterate_objects, require_ijson
from aclip.data.convert.sources.text_files import existing_file, existing_folder


def coco_source(annotations: str, images: str) -> Source:
    """The images in the order of the JSON, each with all its captions.

    The captions are held in memory: annotations come in no order, and COCO has 600,000 of them.

    Args:
        annotations: captions_train2017.json or another of its format.
        images: the folder train2017.

    Raises:
        ConfigError: no such file or folder, or ijson is not installed; while iterating, the JSON is
            of another format.
    """
    path = existing_file(annotations, "ANNOTATIONS")
    require_ijson(annotations)

    def entries() -> Iterator[Entry | Rejected]:
        names: dict[int, str] = {}
        captions: dict[int, list[str]] = {}
        for image in iterate_objects(path, "images"):
            if isinstance(image.get("file_name"), str) and isinstance(image.get("id"), int | str):
                names[image["id"]] = image["file_name"]
            else:
                yield _malformed(image, "image", "file_name")
        for annotation in iterate_objects(path, "annotations"):
            index, (texts, _) = annotation.get("image_id"), texts_in(annotation.get("caption"))
            if texts and isinstance(index, int | str):
                captions.setdefault(index, []).extend(texts)
            elif isinstance(index, int | str) and isinstance(annotation.get("caption"), str):
                captions.setdefault(index, [])  # blank
            else:
                yield _malformed(annotation, "annotation", "caption")
        for index, name in names.items():
            key = make_key(os.path.splitext(name)[0])
            if index in captions:
                yield Entry(key, name, tuple(captions.pop(index)))
            else:
                yield Rejected(key, "no_caption", "no annotation names the image")
        for index in captions:
            yield Rejected(str(index), "no_image", "images does not list the id")

    return Source(existing_folder(images, "--images"), (path,), entries)


def _malformed(item: dict, name: str, field: str) -> Rejected:
    fields = ", ".join(map(str, item))[:80]
    why = f"no text in {field}, or no id; it has {fields or 'no fields'}"
    return Rejected(f"{name} {item.get('id')}", "malformed_row", why)
