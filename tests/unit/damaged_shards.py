"""Shards that are damaged or hostile, in ten kinds."""

import io
import os
import struct
import tarfile
import zlib
from functools import cache

import numpy as np
from PIL import Image

NUM_SAMPLES = 6
BLOCK = tarfile.BLOCKSIZE


def fuzzed_shard(seed: int) -> tuple[str, bytes]:
    """(kind, the shard's bytes); kinds take turns."""
    rng = np.random.default_rng(seed)
    kind = list(KINDS)[seed % len(KINDS)]
    return kind, KINDS[kind](rng)


def _truncated(rng) -> bytes:
    content = _tar(_good_members(rng))
    return content[: rng.integers(1, len(content))]


def _bit_flips(rng) -> bytes:
    content = bytearray(_tar(_good_members(rng)))
    for place in rng.integers(len(content), size=rng.integers(1, 60)):
        content[place] ^= 1 << int(rng.integers(8))
    return bytes(content)


def _header_flips(rng) -> bytes:
    """Bits of headers, whose checksums are made right again."""
    content = bytearray(_tar(_good_members(rng)))
    headers = _header_places(content)
    for place in rng.choice(headers, rng.integers(1, 4)):
        for _ in range(rng.integers(1, 6)):
            content[place + int(rng.integers(BLOCK))] ^= 1 << int(rng.integers(8))
        _fix_checksum(content, place)
    return bytes(content)


def _wrong_members(rng) -> bytes:
    members = _good_members(rng)
    texts = [
        b"[" * 100_000,
        b'{"captions": ' + b"[" * 50_000,
        b'{"caption": "\\ud800 half a pair"}',
        b'{"captions": ["' + b"9" * 5000 + b'", 3]}',
        b'{"caption": ' + b"9" * 5000 + b"}",
        b"\xff\xfe\x00" * 100,
        b"w" * 200_000,
        b"&" * 5000 + b"amp;" * 5000,
        " \u200f\u0301\U0001f600".encode() * 500,
        b"",
    ]
    for _ in range(rng.integers(1, 6)):
        place = int(rng.integers(len(members)))
        name, content = members[place]
        name = getattr(name, "name", name)
        key = name.split(".")[0]
        change = rng.integers(8)
        if change == 0:
            members[place] = (f"{key}.json", texts[rng.integers(len(texts))])
        elif change == 1:
            members[place] = (f"{key}.txt", texts[rng.integers(len(texts))])
        elif change == 2:
            members[place] = (f"{key}.jpg", rng.bytes(rng.integers(0, 2000)))
        elif change == 3:
            members[place] = (f"{key}.png", content)
        elif change == 4:
            members.insert(place, (name, b"twice"))
        elif change == 5:
            del members[place]
        elif change == 6:
            link = tarfile.TarInfo(name)
            link.type = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE][
                rng.integers(4)
            ]
            link.linkname = "../../etc/passwd"
            members[place] = (link, b"")
        else:
            members[place] = (["", ".", ".jpg", "a.", "a", "__x__/a.jpg"][rng.integers(6)], content)
    return _tar(members)


def _zero_length(rng) -> bytes:
    if rng.integers(4) == 0:
        return b"\0" * int(rng.choice([0, 1, 511, 512, 1024, 10240]))
    members = _good_members(rng)
    return _tar([(name, content if rng.integers(2) else b"") for name, content in members])


def _huge_sizes(rng) -> bytes:
    content = bytearray(_tar(_good_members(rng)))
    place = int(rng.choice(_header_places(content)))
    change = rng.integers(6)
    if change == 0:  # the largest of the old format, 8 GiB
        content[place + 124 : place + 136] = b"77777777777\0"
    elif change == 1:  # base 256
        content[place + 124 : place + 136] = b"\x80" + rng.bytes(11)
    elif change == 2:  # and negative: tarfile would go back for ever
        size = -int(rng.integers(1, 4096)) * int(rng.choice([1, BLOCK]))
        content[place + 124 : place + 136] = b"\xff" + size.to_bytes(11, "big", signed=True)
    elif change == 3:  # a name of that length
        content[place + 156 : place + 157] = bytes(rng.choice([b"L", b"K", b"x", b"g"]))
        content[place + 124 : place + 136] = [b"77777777777\0", b"\x80" + rng.bytes(11)][
            rng.integers(2)
        ]
    elif change == 4:  # sparse, with more to come that does not
        content[place + 156 : place + 157] = b"S"
        content[place + 482 : place + 483] = b"\1"
        content[place + 483 : place + 495] = b"77777777777\0"
    else:  # by an attribute
        sizes = ["-512", str(2**63), "9" * 400, "x"]
        info = tarfile.TarInfo("1.jpg")
        info.pax_headers = {"size": sizes[rng.integers(4)], "GNU.sparse.size": "9" * 20}
        return _tar([*_good_members(rng)[:5], (info, b"y"), *_good_members(rng)[5:]])
    _fix_checksum(content, place)
    return bytes(content)


def _names_outside(rng) -> bytes:
    names = ["../evil", "../../../../evil", f"{os.getcwd()}/evil", "/evil", "..", "C:\\evil"]
    names += ["a/" * 500 + "evil", "e" * 5000, "\udcff\udcfe", "new\nline", "~/evil", "$HOME/evil"]
    members = []
    for index in range(NUM_SAMPLES):
        name = f"{names[rng.integers(len(names))]}{index}"
        members += [(f"{name}.jpg", _jpeg(index)), (f"{name}.txt", b"words")]
    return _tar(members, rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))


def _bombs(rng) -> bytes:
    bombs = [
        _png(30_000, 30_000),  # ten times the limit
        _png(9_400, 9_400),  # a little below the limit of 89 million pixels
        _png(1_000_000, 20),
        _large_jpeg(65_500, 65_500),
        _large_jpeg(9_400, 9_400),
        _text_bomb(),
        b"GIF89a\xff\xff\xff\xff\xf0\0\0" + rng.bytes(100),
    ]
    members = _good_members(rng)
    image = int(rng.integers(len(bombs)))
    key = int(rng.integers(NUM_SAMPLES))
    members[2 * key] = (f"{key}.png", bombs[image])
    return _tar(members)


def _chains(rng) -> bytes:
    """Long names for long names for long names."""
    info = tarfile.TarInfo("n" * 150)
    header = info.tobuf(tarfile.GNU_FORMAT)[: 2 * BLOCK]
    return header * int(rng.integers(1, 3000)) + _tar(_good_members(rng))


def _garbage(rng) -> bytes:
    content = _tar(_good_members(rng))
    change = rng.integers(4)
    if change == 0:
        return rng.bytes(rng.integers(1, 5000))
    if change == 1:
        return zlib.compress(content)
    if change == 2:
        return content[rng.integers(1, BLOCK) :]
    return content[: -2 * BLOCK] + rng.bytes(2000)


KINDS = {
    "truncated": _truncated,
    "bit flips": _bit_flips,
    "header flips": _header_flips,
    "wrong members": _wrong_members,
    "zero length": _zero_length,
    "huge sizes": _huge_sizes,
    "names outside": _names_outside,
    "bombs": _bombs,
    "chains": _chains,
    "garbage": _garbage,
}


def _good_members(rng) -> list[tuple[str, bytes]]:
    members = []
    for index in range(NUM_SAMPLES):
        members.append((f"{index}.jpg", _jpeg(int(rng.integers(20)))))
        members.append((f"{index}.txt", b"a caption of some words"))
    return members


def _tar(members: list, tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.pax_headers:
                archive.fileobj.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
                archive.fileobj.write(content.ljust(BLOCK, b"\0"))
                archive.offset = archive.fileobj.tell()
                continue
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _header_places(content: bytes) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return [info.offset for info in archive]


def _fix_checksum(content: bytearray, place: int) -> None:
    content[place + 148 : place + 156] = b" " * 8
    total = sum(content[place : place + BLOCK])
    content[place + 148 : place + 156] = f"{total:06o}\0 ".encode()


@cache
def _jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def _chunk(name: bytes, content: bytes) -> bytes:
    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


@cache
def _png(width: int, height: int) -> bytes:
    """All black, one bit a pixel."""
    start = b"\x89PNG\r\n\x1a\n" + _chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    )
    row = b"\0" * (1 + -(-width // 8))
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return start + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


@cache
def _text_bomb() -> bytes:
    """A small picture with a comment that unpacks to 200 MB."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(b"\0" * 2**20) for _ in range(200)) + packer.flush()
    picture = _png(64, 64)
    return picture[:33] + _chunk(b"zTXt", b"comment\0\0" + packed) + picture[33:]


@cache
def _large_jpeg(height: int, width: int) -> bytes:
    """A small JPEG whose header says that it is large."""
    content = bytearray(_jpeg(0))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)
