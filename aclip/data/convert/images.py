"""Images of a source: their bytes, and what of them a shard keeps."""

import errno
import io
import os
import stat
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from aclip.data.captions import Captions, captions_of
from aclip.data.convert.entries import Entry, Rejected
from aclip.data.convert.other_formats import recognise
from aclip.data.convert.sources.text_files import unreadable
from aclip.data.images.decode import DECODE_ERRORS, FORMATS, to_rgb
from aclip.data.members import MAX_TEXT_BYTES
from aclip.data.shards.listing import Skip

MAX_BYTES = 256 * 2**20
"""An image file that is larger is not read, so that memory stays flat."""
OPEN_ZIPS = 8
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""What is stored as it is: formats that the loader knows by suffix. An MPO is a JPEG with more."""
ENCODERS = {"jpeg": "JPEG", "webp": "WEBP"}
ORIENTATION = 0x0112
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image of an EXIF orientation upright."""


@dataclass(frozen=True)
class ImageRule:
    """What a shard keeps of an image."""

    min_side: int
    """Images with a shorter side, pixels, are rejected."""
    short_side: int | None = None
    """Images are brought upright, and to this shorter side, pixels, if theirs is longer; None for
    the bytes as they are."""
    encoding: str = "jpeg"
    """A key of ENCODERS, for images that change."""
    quality: int = 90


@dataclass(frozen=True, slots=True)
class StoredImage:
    suffix: str
    content: bytes
    what: str
    """original, reencoded, or rotated: original bytes whose EXIF orientation asks for a turn."""


class FileReader:
    """Reads files and members of zips below a folder.

    Raises:
        ConfigError: a file is there but can't be read.
    """

    def __init__(self, root: Path):
        self.root = root
        self._open_zip = lru_cache(OPEN_ZIPS)(zipfile.ZipFile)

    def read_image(self, entry: Entry) -> bytes | Rejected:
        """The encoded image, or Rejected as no_image or unreadable_image."""
        if entry.member is None:
            return self._read_file(entry, entry.image, MAX_BYTES)
        path = self._regular_file(entry.image)
        if path is None:
            return Rejected(entry.key, "no_image", f"no file {entry.image} in {self.root}")
        try:
            archive = self._open_zip(path)
            member = archive.getinfo(entry.member)
            if member.file_size > MAX_BYTES:
                return Rejected(entry.key, "unreadable_image", f"{member.file_size} bytes long")
            return archive.read(member)
        except KeyError:
            return Rejected(entry.key, "no_image", f"no {entry.member} in {entry.image}")
        # Encryption and compression methods that zipfile does not know are RuntimeErrors.
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
            why = f"{entry.image}: {error or type(error).__name__}"
            return Rejected(entry.key, "unreadable_image", why)
        except OSError as error:
            if error.errno is None:  # a decompressor's
                return Rejected(entry.key, "unreadable_image", f"{entry.image}: {error}")
            raise unreadable(path, error) from None

    def read_captions(self, entry: Entry) -> Captions | Rejected:
        """The captions in the entry's caption files, or Rejected as no_caption or empty_caption."""
        texts, facts, why = [], None, []
        for name in entry.caption_files:
            content = self._read_file(entry, name, MAX_TEXT_BYTES)
            if isinstance(content, Rejected):
                why.append(content.why)
            elif name.lower().endswith(".json"):
                facts = facts or content
            else:
                texts.append(content)
        captions = captions_of(texts, facts)
        if isinstance(captions, Skip):
            why = why or [f"no caption in {' or '.join(entry.caption_files)}"]
            return Rejected(entry.key, captions.kind, " and ".join(why))
        return captions

    def _read_file(self, entry: Entry, name: str, limit: int) -> bytes | Rejected:
        path = self._regular_file(name)
        if path is None:
            return Rejected(entry.key, "no_image", f"no file {name} in {self.root}")
        try:
            with open(path, "rb") as file:
                content = file.read(limit + 1)
        except OSError as error:
            raise unreadable(path, error) from None
        if len(content) > limit:
            return Rejected(entry.key, "unreadable_image", f"{name} is over {limit} bytes long")
        return content

    def _regular_file(self, name: str) -> Path | None:
        """The path below the root, or None if there is no such file; a pipe is none either."""
        path = self.root / name
        try:
            return path if stat.S_ISREG(os.stat(path).st_mode) else None
        except ValueError:  # a NUL in the name
            return None
        except OSError as error:
            if error.errno in NOT_THERE:
                return None
            raise unreadable(path, error) from None


def prepare_image(key: str, content: bytes, rule: ImageRule) -> StoredImage | Rejected:
    """What a shard keeps of an image, after it was decoded whole as the loader does.

    Bytes stay as they are, except: GIF, BMP, TIFF and PPM, whose suffix few readers of shards look
    for, and 16 bit grayscale, which decoders clip to white, become PNG of the same pixels. With
    rule.short_side only images that are upright, small enough and in the rule's encoding stay as
    they are.

    Returns:
        The image, or Rejected as unreadable_image (damaged, of another format, or with more pixels
        than Image.MAX_IMAGE_PIXELS), unsupported_format or image_too_small.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            if min(image.size) < rule.min_side:
                width, height = image.size
                return Rejected(key, "image_too_small", f"{width} x {height}")
            return _stored(image, content, rule)
        except UnidentifiedImageError:
            name = recognise(content)
            if name is not None:
                return Rejected(key, f"unsupported_format ({name})", f"its bytes are {name}")
            size = "" if content else "; the file is empty"
            return Rejected(key, "unreadable_image", f"none of {', '.join(FORMATS)}{size}")
        except DECODE_ERRORS as error:
            return Rejected(key, "unreadable_image", str(error) or type(error).__name__)


def _stored(image: Image.Image, content: bytes, rule: ImageRule) -> StoredImage:
    kind, short_side = image.format, min(image.size)
    if rule.short_side is not None and short_side > rule.short_side:
        # libjpeg scales while it decodes; twice the side leaves the rest to a good filter.
        image.draft(None, (2 * rule.short_side, 2 * rule.short_side))
    is_deep = image.mode.startswith("I")
    pixels = to_rgb(image)
    orientation = _orientation(image)
    keeps_kind = kind in SUFFIXES and not is_deep
    if rule.short_side is None:
        if keeps_kind:
            what = "rotated" if orientation in TRANSPOSES else "original"
            return StoredImage(SUFFIXES[kind], content, what)
        return StoredImage("png", _encode(pixels, "PNG"), "reencoded")
    encoder = ENCODERS[rule.encoding]
    is_small = short_side <= rule.short_side
    if keeps_kind and is_small and kind == encoder and orientation not in TRANSPOSES:
        return StoredImage(SUFFIXES[kind], content, "original")
    if not is_small:
        scale = rule.short_side / min(pixels.size)
        size = tuple(max(rule.short_side, round(side * scale)) for side in pixels.size)
        pixels = pixels.resize(size, Image.Resampling.BICUBIC)
    if orientation in TRANSPOSES:
        pixels = pixels.transpose(TRANSPOSES[orientation])
    encoded = _encode(pixels, encoder, quality=rule.quality)
    return StoredImage(SUFFIXES[encoder], encoded, "reencoded")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except (*DECODE_ERRORS, KeyError, TypeError):  # the EXIF is damaged, the image is not
        return 1


def _encode(pixels: Image.Image, encoder: str, **options) -> bytes:
    pixels.info = {}  # Pillow would write comments and profiles again
    buffer = io.BytesIO()
    pixels.save(buffer, encoder, **options)
    return buffer.getvalue()
