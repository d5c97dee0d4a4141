"""launch/convert.py's arguments: bad ones are named before any work."""

import importlib.util
import re
import shlex
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from aclip.config.sections import DataConfig
from aclip.data import progress
from aclip.errors import ConfigError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "convert.py"

BAD = {
    "no folder": (["folder", "{tmp}/none", "--out", "{tmp}/o"], ["FOLDER is", "none"]),
    "no metadata": (
        ["yfcc15m", "{tmp}/no.pkl", "--images", "{tmp}", "--out", "{tmp}/o"],
        ["METADATA is", "no.pkl"],
    ),
    "no images": (
        ["coco", "{tmp}/x.json", "--images", "{tmp}/none", "--out", "{tmp}/o"],
        ["--images is", "none"],
    ),
    "processes": (
        ["folder", "{tmp}", "--out", "{tmp}/o", "--processes", "0"],
        ["--processes", "0"],
    ),
    "shard size": (["folder", "{tmp}", "--out", "{tmp}/o", "--shard-size", "0"], ["--shard-size"]),
    "quality alone": (
        ["folder", "{tmp}", "--out", "{tmp}/o", "--quality", "80"],
        ["--quality is 80", "--short-side"],
    ),
    "quality": (
        ["folder", "{tmp}", "--out", "{tmp}/o", "--short-side", "64", "--quality", "101"],
        ["--quality is 101"],
    ),
    "short side": (
        ["folder", "{tmp}", "--out", "{tmp}/o", "--short-side", "4"],
        ["--short-side is 4"],
    ),
    "out is a file": (["folder", "{tmp}", "--out", "{tmp}/x.json"], ["--out is", "x.json"]),
}


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("launch_convert", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def convert(script, monkeypatch):
    """convert(*arguments) runs the script in this process."""

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["convert.py", *arguments])
        script.main()

    return run


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named_and_nothing_is_written(tmp_path, convert, name):
    (tmp_path / "x.json").write_text("{}")
    arguments, words = BAD[name]
    with pytest.raises(ConfigError) as error:
        convert(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("source", ["yfcc15m", "cc3m", "coco", "redcaps", "table", "img2dataset"])
def test_a_file_that_is_not_there_is_named(tmp_path, convert, source):
    arguments = [source, "/nowhere/x.csv"]
    if source != "img2dataset":
        arguments += ["--images", str(tmp_path), "--out", str(tmp_path / "o")]
    with pytest.raises(ConfigError, match=r"is /nowhere/x\.csv, but there is no such f"):
        convert(*arguments)


@pytest.mark.parametrize(
    ("source", "file", "package"),
    [
        ("coco", "x.json", "ijson"),
        ("redcaps", "x.json", "ijson"),
        ("table", "x.parquet", "pyarrow"),
    ],
)
def test_a_package_of_the_extra_convert_that_is_missing_is_named_before_any_work(
    tmp_path, convert, monkeypatch, source, file, package
):
    (tmp_path / file).touch()
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    words = f"is {tmp_path}/{file}, but {package} is not installed; pip install -e '.[convert]' "
    with pytest.raises(ConfigError, match=re.escape(words)):
        convert(source, f"{tmp_path}/{file}", "--images", str(tmp_path), "--out", f"{tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_the_list_and_the_index_are_made_by_the_same_script(tmp_path, convert, write_tar, capsys):
    (tmp_path / "d.txt").write_text("7" + "\tx" * 7 + "\ta+title\t\n")
    (tmp_path / "s.tsv").write_text("7\t1\t2\n")
    arguments = [str(tmp_path / "d.txt"), "--subset", str(tmp_path / "s.tsv")]
    convert("yfcc-list", *arguments, "--out", str(tmp_path / "l.jsonl"))
    expected = '{"id": 7, "title": "a title", "description": ""}\n'
    assert (tmp_path / "l.jsonl").read_text() == expected
    with pytest.raises(ConfigError, match=r"--out is .*l\.jsonl, which exists"):
        convert("yfcc-list", *arguments, "--out", str(tmp_path / "l.jsonl"))
    write_tar("0.tar", [("a.jpg", b"x"), ("a.txt", b"c")])
    convert("img2dataset", str(tmp_path), "--processes", "1")
    assert "1 samples in 1 shards" in capsys.readouterr().out
    assert (tmp_path / "sizes.json").exists()


def test_the_commands_of_the_readme_are_understood(script, monkeypatch):
    manual = ROOT / "aclip" / "data" / "convert" / "README.md"
    text = manual.read_text().replace("\\\n", " ")
    commands = re.findall(r"^ +python (launch/convert\.py .*)$", text, re.MULTILINE)
    sources = set()
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command, comments=True))
        sources.add(script.parse_arguments().source)
    assert sources >= {"yfcc15m", "cc3m", "cc12m", "coco", "redcaps", "folder", "table"}
    assert sources >= {"img2dataset", "yfcc-list"}


@pytest.mark.parametrize("option", ["--shard", "--short", "--ou", "--proc", "--imag"])
def test_an_abbreviation_is_no_option(script, monkeypatch, capsys, option):
    words = ["table", "t.csv", "--out", "o", option, "8"]
    monkeypatch.setattr(sys, "argv", ["convert.py", *words])
    with pytest.raises(SystemExit):
        script.parse_arguments()
    assert f"unrecognized arguments: {option} 8" in capsys.readouterr().err


def test_a_log_gets_no_bar_and_a_line_only_after_a_while(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)
    with progress.progress_bar(total=200, desc="writing", unit=" entries") as bar:
        bar.update(20)  # at once: nothing is said
        for _ in range(6):
            time.sleep(0.02)
            bar.update(30)
    errors = capsys.readouterr().err
    assert "\r" not in errors and not re.search("[^ -~\n]", errors)
    lines = errors.splitlines()
    assert 1 <= len(lines) <= 6
    assert all(re.match(r"writing: \d+ of 200 entries, ", line) for line in lines)


def test_a_quick_conversion_prints_no_progress_into_a_log(tmp_path, convert, capsys):
    for name in ("a", "b"):
        (tmp_path / "pairs").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "pairs" / f"{name}.png")
        (tmp_path / "pairs" / f"{name}.txt").write_text("text")
    convert("folder", str(tmp_path / "pairs"), "--out", str(tmp_path / "o"), "--processes", "1")
    captured = capsys.readouterr()
    assert captured.err == "" and "samples     2" in captured.out


def test_what_is_too_small_is_what_the_loader_finds_too_small(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert.py", "folder", "x", "--out", "y"])
    assert script.parse_arguments().min_side == DataConfig().min_image_side
