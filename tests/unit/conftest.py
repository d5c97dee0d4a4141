"""Shards, written member by member, and runs with a checkpoint."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


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
    """write_run(recipe) -> (run folder, student, teacher): a run with one checkpoint, written
    without training. All weights are random, biases and norms too, and the two models differ."""

    # Here, since the towers take seconds to import and most tests need none.
    from safetensors.torch import save_file

    from aclip import checkpoint_folder
    from aclip.models.student import build_student
    from aclip.recipe_file import dump_recipe

    def write(recipe, has_teacher: bool = True):
        run = tmp_path / "run"
        partial = run / "checkpoints" / "samples-000000000008.tmp"
        partial.mkdir(parents=True)
        (run / "recipe.yaml").write_text(dump_recipe(recipe))
        models = []
        for seed, name in enumerate(("student", "teacher")):
            model = build_student(recipe).eval()
            _randomise(model, seed)
            models.append(model)
            average = {n: p.detach() for n, p in model.named_parameters()}
            if name == "teacher":
                del average["logit_scale.log_logit_scale"]
            if name == "student" or has_teacher:
                save_file(average, partial / f"{name}.safetensors")
        checkpoint_folder.publish(partial.parent, partial, partial.with_suffix(""))
        return run, *models

    return write


def _randomise(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.5 if parameter.ndim == 1 else 0.02
            parameter += size * torch.randn(parameter.shape, generator=generator)
