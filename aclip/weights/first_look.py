"""What `--init` or a model's path names, told by names and first bytes, before anything is loaded.

Imports no torch, so that a wrong path is refused at once.
"""

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aclip.errors import ConfigError
from aclip.run_folder.checkpoint_folder import STUDENT, TEACHER, locate
from aclip.run_folder.layout import METRICS_FILE, RECIPE_FILE

TIMM = "timm:"
LOCAL_DIR = "local-dir:"
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)
"""What the weights in an open_clip folder may be called, in open_clip's order of preference."""
HUGGING_FACE_CONFIG = "config.json"
HUGGING_FACE_PROCESSOR = "processor_config.json"
DUAL_ENCODER = "vision-text-dual-encoder"
"""The `model_type` of the Hugging Face folders that launch/export.py writes."""
PLAIN_WEIGHTS = "model.safetensors"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl")
_DEEPSPEED = re.compile(r"(mp_rank_\d+|zero_pp_rank_\d+.*)_(model|optim)_states\.pt")
_MOST_NAMED = 5
_HEADER = 4096


@dataclass(frozen=True)
class Found:
    """What is at a path.

    Attributes:
        kind: a checkpoint of a run, a folder of open_clip's or Hugging Face's, or a file whose keys
            tell the rest.
        path: the folder of the first three kinds, or the file.
        model: of a checkpoint, "student" or "teacher" where a file of it was named.
        weights: the file of the weights in a folder of another project.
    """

    kind: Literal["checkpoint", "open_clip", "huggingface", "file"]
    path: Path
    model: str | None = None
    weights: Path | None = None


def find_weights(path: Path) -> Found:
    """Says what kind of weights is at a path.

    Raises:
        ValueError: nothing that could be weights; the message ends a sentence that begins with the
            path.
    """
    if path.is_dir():
        return _look_into_folder(path)
    if not path.exists():
        raise ValueError("does not exist")
    if path.name in (STUDENT, TEACHER) and locate(path.parent) == path.parent:
        return Found("checkpoint", path.parent, path.stem)
    if _DEEPSPEED.fullmatch(path.name):
        raise ValueError(_whole_of_deepspeed(path.parent.parent))
    problem = problem_of(path)
    if problem is not None:
        raise ValueError(f"is no checkpoint: {problem}")
    if path.name in OPEN_CLIP_WEIGHTS and (path.parent / OPEN_CLIP_CONFIG).is_file():
        return Found("open_clip", path.parent, weights=path)
    if path.name == PLAIN_WEIGHTS and hugging_face_type(path.parent) == DUAL_ENCODER:
        return Found("huggingface", path.parent, weights=path)
    return Found("file", path)


def find_checkpoint(path: str, model: str | None) -> tuple[Path, str]:
    """The checkpoint's folder and the model in it, "student" or "teacher", that a path means.

    Args:
        path: a checkpoint's folder, a file of a model in it, or a run's folder for its latest.
        model: which of the two; None for the teacher if there is one.

    Raises:
        ConfigError: there is no checkpoint, or no such model in it.
    """
    place = Path(path)
    if place.name in (STUDENT, TEACHER) and place.is_file() and model in (None, place.stem):
        place, model = place.parent, place.stem
    folder = locate(place)
    if folder is None:
        if not place.exists():
            found = "there is no such folder"
        elif not place.is_dir():
            found = "it is a file"
        elif (place / METRICS_FILE).is_file() or (place / RECIPE_FILE).is_file():
            found = "it is a run that has no checkpoint yet"
        else:
            found = f"it {_content(place).partition(';')[0]}"
        raise ConfigError(
            f"{path} is neither a checkpoint nor a run folder that holds one ({found}); give the "
            "folder that contains manifest.json, or the run's"
        )
    has_teacher = (folder / TEACHER).is_file()
    if model == "teacher" and not has_teacher:
        raise ConfigError(f"--model is teacher, but {folder} has none; take --model student")
    return folder, model or ("teacher" if has_teacher else "student")


def refusal_of_init(init: str, problem: ValueError) -> ConfigError:
    """The sentence about `--init`."""
    advice = (
        "give a SLIP or A-CLIP checkpoint, an open_clip local-dir folder, a run of aclip, hf-hub: "
        "with a name of the Hub, or timm: with a file or name"
    )
    return refusal(f"--init is {init}", problem, advice)


def refusal(found: str, problem: ValueError, advice: str) -> ConfigError:
    """The sentence about what can't be weights, with the advice where the problem brings none."""
    if isinstance(problem, ConfigError):
        return problem
    return ConfigError(f"{found}, which {problem}{'' if ';' in str(problem) else f'; {advice}'}")


def problem_of(path: Path) -> str | None:
    """Why a file can't be weights, in words; None where its first bytes don't tell."""
    size = path.stat().st_size
    if size == 0:
        return "the file is empty; fetch or copy it again"
    with open(path, "rb") as file:
        head = file.read(_HEADER)
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; run `git lfs pull` where it comes from"
    if re.match(rb"\s*<(!doctype|html|\?xml|head|script)", head, re.IGNORECASE):
        return "it is a web page, such as a login or an error page; download the weights themselves"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "it is compressed; unpack it first"
    if head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        return "the end of its archive is missing, so it was cut off; fetch or copy it again"
    return _cut_safetensors(path, size) if path.suffix == ".safetensors" else None


def _cut_safetensors(path: Path, size: int) -> str | None:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 1 < length < 10**8:
            return None  # no safetensors file at all, as its reader will say
        header = file.read(length)
    try:
        ends = [v["data_offsets"][1] for v in json.loads(header).values() if "data_offsets" in v]
        whole = 8 + length + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError):
        whole = 8 + length
    if size < whole:
        return f"it ends after {size} of {whole} bytes, so it was cut off; fetch or copy it again"
    return None


def _look_into_folder(path: Path) -> Found:
    if (path / OPEN_CLIP_CONFIG).is_file():
        for name in OPEN_CLIP_WEIGHTS:
            if (path / name).is_file():
                return Found("open_clip", path, weights=_sound(path / name))
        raise ValueError(f"holds {OPEN_CLIP_CONFIG}, but no {OPEN_CLIP_WEIGHTS[0]}")
    if locate(path) is not None:
        return Found("checkpoint", path)
    model_type = hugging_face_type(path)
    if model_type == DUAL_ENCODER and (path / PLAIN_WEIGHTS).is_file():
        return Found("huggingface", path, weights=_sound(path / PLAIN_WEIGHTS))
    if model_type is not None:
        raise ValueError(
            f"is a Hugging Face folder of a {model_type} model, of which aclip reads only "
            f"{DUAL_ENCODER} with {PLAIN_WEIGHTS}; give open_clip's form of the model, or timm: "
            "and a name for its image tower"
        )
    if (path / PLAIN_WEIGHTS).is_file() and (path / RECIPE_FILE).is_file():
        return Found("file", _sound(path / PLAIN_WEIGHTS))
    if any(_DEEPSPEED.fullmatch(each.name) for each in [*path.glob("*"), *path.glob("*/*")]):
        is_step = any(_DEEPSPEED.fullmatch(each.name) for each in path.glob("*"))
        raise ValueError(_whole_of_deepspeed(path.resolve().parent if is_step else path))
    if (path / METRICS_FILE).is_file() or (path / RECIPE_FILE).is_file():
        raise ValueError("is a run that has no checkpoint yet; wait for its first one")
    raise ValueError(f"is neither an open_clip folder nor a run, but {_content(path)}")


def _sound(path: Path) -> Path:
    problem = problem_of(path)
    if problem is not None:
        raise ValueError(f"holds {path.name}, which is no checkpoint: {problem}")
    return path


def _content(folder: Path) -> str:
    """What a folder without known weights holds, in words."""
    files = sorted(
        str(path.relative_to(folder))
        for pattern in ("*", "checkpoints/*")
        for path in folder.glob(pattern)
        if path.suffix in SUFFIXES
    )
    if len(files) == 1:
        return f"holds {files[0]}; give that file"
    if files:
        return f"holds {some(files)}; give one of these files"
    names = sorted(path.name for path in folder.iterdir())
    return f"holds {some(names)}" if names else "is empty"


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:_MOST_NAMED])
    return f"{shown} and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else shown


def hugging_face_type(folder: Path) -> str | None:
    """The `model_type` of a Hugging Face folder; None where there is no config that says one."""
    try:
        config = json.loads((folder / HUGGING_FACE_CONFIG).read_text(encoding="utf-8"))
        return config.get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def _whole_of_deepspeed(folder: Path) -> str:
    return (
        "is part of a checkpoint of DeepSpeed's own, which is split over the ranks; run "
        f"zero_to_fp32.py, which lies in {folder}, and give the file that it writes"
    )
