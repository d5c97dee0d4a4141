"""The rooms of aclip import downwards only; see aclip/README.md."""

import ast
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "aclip"
LAYERS = (
    {"method", "run_folder"},
    {"config"},
    {"models", "data"},
    {"engine"},
    {"weights", "nodes"},
    {"reports"},
    {"evaluation"},
    {"training"},
    {"planning"},
    {"ablation", "benchmarks"},
)
FLOOR = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
GROUND = -1
"""The floor of the modules directly in aclip/, which import no room at all."""


def imported_rooms(path: Path) -> set[str]:
    """The rooms and ground modules that a file imports from."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "aclip":
            rooms |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aclip."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("aclip.")}
    return rooms


def test_rooms_import_downwards():
    broken = []
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).parts[0]
        floor = FLOOR.get(here, GROUND)
        broken += [
            f"{path.relative_to(PACKAGE)} imports aclip.{there}"
            for there in imported_rooms(path)
            if there in FLOOR and there != here and FLOOR[there] >= floor
        ]
    assert not broken


def test_every_room_has_a_floor():
    rooms = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == FLOOR.keys()


def test_what_starts_over_ssh_does_not_wait_for_torch():
    code = "import sys, aclip.nodes.agent, aclip.nodes.probe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_only_the_room_of_the_engine_names_deepspeeds_marks_on_parameters():
    marks = re.compile(r"\bds_(shape|id|tensor|numel|status|persist)\b|_hp_mapping")
    named = [path for path in PACKAGE.rglob("*.py") if marks.search(path.read_text())]
    assert {path.relative_to(PACKAGE).parts[0] for path in named} == {"engine"}
