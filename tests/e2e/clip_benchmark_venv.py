"""The clip_benchmark command in an environment of its own, and sets in its layout.

Its accuracy() breaks on numpy >= 2.4, which aclip allows, so it can't share aclip's environment.
All else is taken from there, so that both evaluate with the same torch and open_clip.
"""

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv-clip_benchmark"
REQUIREMENTS = ["clip-benchmark==1.6.2", "requests", "numpy<2.4"]


def ensure_command() -> str:
    """The path of the command, after installing it if it is not there. Processes wait for one."""
    command, stamp = FOLDER / "bin" / "clip_benchmark", FOLDER / "requirements.json"
    packages = [str(Path(path).resolve()) for path in sys.path if path.endswith("-packages")]
    content = json.dumps([REQUIREMENTS, packages, sys.version])
    with FileLock(f"{FOLDER}.lock"):
        if not stamp.is_file() or stamp.read_text() != content:
            shutil.rmtree(FOLDER, ignore_errors=True)
            venv.create(FOLDER, with_pip=True)
            (own,) = FOLDER.glob("lib/python*/site-packages")
            (own / "aclips.pth").write_text("\n".join(packages))
            pip = [str(FOLDER / "bin" / "python"), "-m", "pip", "install", "--quiet"]
            subprocess.run([*pip, *REQUIREMENTS], check=True)
            # The extra eval has it in aclip's environment, where its command has another Python.
            subprocess.run([*pip, "--ignore-installed", "--no-deps", REQUIREMENTS[0]], check=True)
            stamp.write_text(content)
    return str(command)


def clip_benchmark_arguments(export: Path, dataset: Path, task: str, output: Path) -> list[str]:
    """Its command line for one set; fp32, in one process."""
    arguments = ["eval", "--model", f"local-dir:{export}", "--pretrained", "none"]
    arguments += ["--dataset", f"wds/{dataset.name}", "--dataset_root", str(dataset)]
    arguments += ["--task", f"zeroshot_{task}", "--no_amp", "--num_workers", "0", "--quiet"]
    if task == "retrieval":
        arguments += ["--recall_k", "1", "5", "10"]
    return [*arguments, "--batch_size", "64", "--output", str(output)]


def write_layout(folder: Path, shard: Path, names: list[str] | None, templates: list[str]) -> None:
    """Makes a folder of clip_benchmark's layout around one shard; without names for retrieval."""
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "0.tar").symlink_to(shard)
    (folder / "test" / "nshards.txt").write_text("1")
    if names is None:
        (folder / "dataset_type.txt").write_text("retrieval")
        return
    (folder / "classnames.txt").write_text("\n".join(names))
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates))
