"""Tars of odd kinds, as bytes; each holds at least 17 samples."""

import io
import tarfile


def tar(names: list, tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    """Members by name, or as a TarInfo, or raw bytes that are put between."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tar_format) as archive:
        for number, name in enumerate(names):
            if isinstance(name, bytes):
                archive.fileobj.write(name)
                archive.offset += len(name)
                continue
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            data = b"%d " % number * (number % 7 * 60)
            info.size = len(data) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "0.txt"
    return info


PAIRS = [f"{n}.{suffix}" for n in range(24) for suffix in ("jpg", "txt")]
LONG = [f"{'k' * (200 if n % 3 else 20)}{n}.{s}" for n in range(24) for s in ("jpg", "txt")]
GLOBAL = tarfile.TarInfo.create_pax_global_header({"path": "same.txt"})
AMONG = [
    part
    for n in range(24)
    for part in (
        special(f"d{n}", tarfile.DIRTYPE),
        f"__meta__/{n}.txt",
        f"{n}.jpg",
        special(f"{n}.link", tarfile.LNKTYPE),
        "no suffix",
        special(f"{n + 1}.link", tarfile.SYMTYPE),
        f"{n}.txt",
    )
]
BROKEN = bytearray(tar(PAIRS))
BROKEN[BROKEN.index(b"17.jpg") : BROKEN.index(b"17.jpg") + 512] = b"\xff" * 512
ODD = {
    "plain": tar(PAIRS),
    "pairs apart": tar([f"{n // 2 + n % 2}.{'jt'[n % 2]}xt" for n in range(40)]),
    "folders": tar([f"a.{n // 5}/b/{n % 5}.{s}" for n in range(24) for s in ("jpg", "txt")]),
    "GNU long names": tar(LONG),
    "pax long names": tar(LONG, tarfile.PAX_FORMAT),
    "names that are no ASCII": tar([f"é{n}.txt" for n in range(24)], tarfile.PAX_FORMAT),
    # It renames what follows, except long names, which have a name in a header of their own.
    "global header first": tar([GLOBAL, *LONG], tarfile.PAX_FORMAT),
    "global header among": tar([*LONG[:21], GLOBAL, *LONG[21:]], tarfile.PAX_FORMAT),
    "links and others": tar(AMONG),
    "cut in a header": tar(PAIRS)[: tar(PAIRS).index(b"19.jpg") + 100],
    "cut in a member": tar(PAIRS)[: tar(PAIRS).index(b"19.jpg") + 600],
    "cut after a member": tar(PAIRS)[: tar(PAIRS).index(b"19.jpg")],
    "corrupt header": bytes(BROKEN),
    "no end": tar(PAIRS).rstrip(b"\0") + b"\0" * 300,
    "rubbish at the end": tar(PAIRS)[:-10240] + b"rubbish" * 1000,
}
