"""Where an export is written: a full disk, two exports at once, a place that is taken."""

import argparse
import resource
from contextlib import contextmanager

import pytest
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError, NotWritten
from aclip.weights import write_export
from aclip.weights.export import export


def run_export(checkpoint, out, output_format="safetensors", model=None):
    options = {"checkpoint": str(checkpoint), "out": str(out), "format": output_format}
    export(argparse.Namespace(**options, model=model))


@contextmanager
def no_file_over(size):
    """The kernel refuses to let a file grow beyond `size` bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("output_format", ["open_clip", "huggingface", "safetensors"])
def test_disk_that_fills_up_is_one_sentence_and_leaves_nothing(write_run, tmp_path, output_format):
    run, *_ = write_run(load_recipe(SMALL_RECIPE))
    out = tmp_path / "out"
    with no_file_over(100_000), pytest.raises(NotWritten) as refusal:
        run_export(run, out, output_format)
    assert str(refusal.value).startswith(f"{out} can't be written (File too large)")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_second_of_two_exports_into_one_folder_leaves_the_first_ones_files(
    write_run, tmp_path, monkeypatch
):
    run, *_ = write_run(load_recipe(SMALL_RECIPE))
    write = write_export.write_export

    def meet_another(folder, out, output_format, weights):
        monkeypatch.setattr(write_export, "write_export", write)
        out.mkdir()
        (out / "theirs").write_text("whole")
        return write(folder, out, output_format, weights)

    monkeypatch.setattr(write_export, "write_export", meet_another)
    with pytest.raises(NotWritten, match=f"{tmp_path}/out can't be written"):
        run_export(run, tmp_path / "out")
    assert (tmp_path / "out" / "theirs").read_text() == "whole"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_a_models_file_in_a_checkpoint_stands_for_that_model(write_run, tmp_path, capsys):
    run, *_ = write_run(load_recipe(SMALL_RECIPE))
    (folder,) = (run / "checkpoints").glob("samples-*")
    run_export(folder / "student.safetensors", tmp_path / "out")
    assert f"wrote the student of {folder}" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="it is a file"):
        run_export(folder / "student.safetensors", tmp_path / "other", model="teacher")
