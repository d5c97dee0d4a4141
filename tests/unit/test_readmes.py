"""What the manuals name is there: links, paths and rooms; and scripts understand their commands."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

from aclip.config import arguments
from aclip.nodes import supervisor

ROOT = Path(__file__).parents[2]
MOST_LINES = 130
ROOMS = ("aclip", "ds_configs", "kernels", "launch", "tests")
MANUALS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
MANUALS += sorted(path for room in ROOMS for path in (ROOT / room).rglob("README.md"))
IDS = [str(path.relative_to(ROOT)) for path in MANUALS]
EVERY_MANUAL = pytest.mark.parametrize("manual", MANUALS, ids=IDS)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED_PATH = re.compile(r"`([\w.-]+(?:/[\w.-]+)+\.(?:py|md|yaml|json|sh))`")
COMMAND = re.compile(
    r"^ +(?:\w+=\S+ )*(?:python |deepspeed (?:[^\n]*? )?)?(launch/\w+\.(?:py|sh) .*)$", re.M
)


def anchors(manual: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", manual.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(manual: Path) -> list[tuple[Path, str]]:
    """The file and the anchor of each link within the repository; a figure is a link too."""
    found = (link.partition("#") for link in LINK.findall(manual.read_text()) if "://" not in link)
    return [
        ((manual.parent / path if path else manual).resolve(), anchor) for path, _, anchor in found
    ]


@EVERY_MANUAL
def test_links_resolve(manual):
    for target, anchor in links(manual):
        assert target.exists(), target
        assert not anchor or anchor in anchors(target), f"{target}#{anchor}"


@EVERY_MANUAL
def test_named_paths_exist(manual):
    for name in NAMED_PATH.findall(manual.read_text()):
        folders = (ROOT, ROOT / "aclip", manual.parent)
        assert any((folder / name).exists() for folder in folders), name


def test_every_manual_is_linked_from_another():
    linked = {target for manual in MANUALS for target, _ in links(manual) if target != manual}
    assert linked | {ROOT / "README.md"} >= set(MANUALS)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES


def test_the_map_names_every_room():
    text = (ROOT / "aclip" / "README.md").read_text()
    rooms = {path.parent.name for path in (ROOT / "aclip").glob("*/__init__.py")}
    assert all(f"{room}/" in text for room in rooms), rooms


def commands() -> list[str]:
    texts = (manual.read_text().replace("\\\n", " ") for manual in MANUALS)
    return [" ".join(command.split()) for text in texts for command in COMMAND.findall(text)]


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command, monkeypatch):
    """Parsed by their scripts, and what they hand on to pretrain.py too."""
    words = shlex.split(command, comments=True)
    script = Path(words[0])
    monkeypatch.setattr(sys, "argv", words)
    if script.stem == "pretrain":
        arguments.read_recipe(arguments.parse(words[1:]))
    elif script.stem == "multinode":
        monkeypatch.setattr(sys, "argv", [words[0], "--script", "pretrain.py", *words[1:]])
        arguments.read_recipe(arguments.parse(supervisor.parse_arguments().arguments))
    else:
        spec = importlib.util.spec_from_file_location(f"launch_{script.stem}", ROOT / script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.parse_arguments()
