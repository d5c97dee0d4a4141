"""COCO Captions: the annotations JSON, about five captions an image."""

import os
from collections.abc import Iterator

from aclip.data.convert.entries import Entry, Rejected, Source, make_key
from aclip.data.convert.sources.json_stream import iterate_objects, require_ijson
from aclip.data.convert.sources.text_files import existing_file, existing_folder
from aclip.errors import ConfigError


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
        try:
            for image in iterate_objects(path, "images"):
                names[image["id"]] = _text(image, "file_name")
            for annotation in iterate_objects(path, "annotations"):
                own = captions.setdefault(annotation["image_id"], [])
                own.append(_text(annotation, "caption"))
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} holds an image or annotation of another form ({type(error).__name__}: "
                f"{error}); give COCO's captions JSON"
            ) from None
        for index, name in names.items():
            key = make_key(os.path.splitext(name)[0])
            if index in captions:
                yield Entry(key, name, tuple(captions.pop(index)))
            else:
                yield Rejected(key, "no_caption", "no annotation names the image")
        for index in captions:
            yield Rejected(str(index), "no_image", "images does not list the id")

    return Source(existing_folder(images, "--images"), (path,), entries)


def _text(item: dict, field: str) -> str:
    if not isinstance(item[field], str):
        raise TypeError(f"{field} is no text")
    return item[field]
