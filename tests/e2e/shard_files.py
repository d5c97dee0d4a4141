"""Shards of plain pictures, for the tests that start the launch scripts."""

import io
import tarfile
from pathlib import Path

from PIL import Image


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def jpeg(width: int = 64, height: int = 64, color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "JPEG")
    return buffer.getvalue()


def write_shard(path: Path, num_samples: int) -> None:
    with tarfile.open(path, "w") as tar:
        for index in range(num_samples):
            add(tar, f"{index:04d}.jpg", jpeg())
            add(tar, f"{index:04d}.txt", f"picture {index}".encode())
