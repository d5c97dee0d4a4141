"""Shards, written member by member, and runs with a checkpoint."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aclip.data.shards import offsets
from aclip.data.shards.offsets import SampleOffsets
from aclip.data.shards.tar import TarShard


@pytest.fixture
def write_tar(tmp_path):
    """write_tar(name, [(member name, bytes), ...]) -> path of a tar in the test's folder."""

    def write(name: str, members: list[tuple[str, bytes]]) -> str:
        path = Path(tmp_path) / name
        with tarfile.open(path, "w") as archive:
            for member_name, content in members:
                member = tarfile.TarInfo(member_name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return str(path)

    return write


@pytest.fixture
def encode_image():
    """encode_image(width, height, seed, format) -> bytes of a picture of coloured noise."""

    def encode(width: int, height: int, seed: int = 0, image_format: str = "JPEG") -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, image_format)
        return buffer.getvalue()

    return encode


@pytest.fixture
def write_run(tmp_path):
    """write_run(recipe) -> (run folder, student, teacher); see written_run.py."""

    # Here, since the towers take seconds to import and most tests need none.
    from written_run import write_run

    return lambda recipe, has_teacher=True: write_run(tmp_path / "run", recipe, has_teacher)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for Hugging Face's Hub, which its client in this process asks, logged in; see
    hub_server.py."""
    import huggingface_hub.constants as constants
    from hub_server import TOKEN, serving

    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
        yield hub


@pytest.fixture
def offsets_cache(tmp_path, monkeypatch) -> Path:
    """Where offsets of samples are kept in this test; its shards are no small ones."""
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(SampleOffsets, "_has_warned", False)
    monkeypatch.setattr(offsets, "MAX_ROWS", 2)
    return tmp_path / "cache" / "offsets"


@pytest.fixture
def places(monkeypatch) -> list[int]:
    """The offsets of all reads of shards, headers and contents."""
    found, read = [], TarShard.read
    monkeypatch.setattr(
        TarShard,
        "read",
        lambda self, offset, size: found.append(offset) or read(self, offset, size),
    )
    return found
