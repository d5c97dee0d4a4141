"""The commands of launch/README.md from a download to a table, on small sets of the same layout.

Left out are img2dataset, which needs the web, and the doctor, which looks for GPUs.
"""

import io
import json
import pickle
import re
import shlex
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_files import add

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
NUM_PAIRS = 96
SMALL = [
    "train.global_batch_size=16",
    "train.epochs=6",
    "train.log_every=6",
    "train.warmup_epochs=1",
    "mask.warmup=0.2",
    "mask.block_size=1",
    "model.image.name=vit_tiny_patch16_224",
    "model.image.resolution=32",
    "model.image.kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
    "model.text={width: 16, heads: 2, layers: 1, context_length: 16}",
    "model.embed_dim=12",
    "teacher.resolution=16",
]


def picture(number: int, side: int = 80) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((side + 16, side)).save(buffer, "JPEG")
    return buffer.getvalue()


def caption(number: int) -> str:
    return f"a photo of thing {number % 7}, number {number}"


def write_img2dataset_output(folder: Path) -> None:
    """Two shards as img2dataset leaves them: picture, caption and facts of each link that it could
    fetch, with figures and a table beside them."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for index in range(shard, NUM_PAIRS, 2):
                key, facts = f"{shard:05d}{index:04d}", {"status": "success", "url": f"x/{index}"}
                add(tar, f"{key}.jpg", picture(index))
                add(tar, f"{key}.json", json.dumps(facts | {"caption": caption(index)}).encode())
                add(tar, f"{key}.txt", caption(index).encode())
        (folder / f"{shard:05d}_stats.json").write_text('{"successes": 48}')
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")


def write_yfcc(folder: Path) -> None:
    """SLIP's layout: 00/000.zip to 99/999.zip, and a list of index, title and description."""
    rows = []
    for number in range(NUM_PAIRS):
        digits = f"{12_345_000 + 997 * number:08d}"
        path = folder / "yfcc100m/images" / digits[:2] / f"{digits[2:5]}.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"{digits[5:]}.jpg", picture(number, side=300))
        rows.append((int(digits), caption(number), "" if number % 2 else "as described"))
    (folder / "yfcc15m.pkl").write_bytes(pickle.dumps(rows))


def write_evaluation_set(folder: Path) -> None:
    """food101 of the papers' 26 sets, as a folder of classes."""
    for index, name in enumerate(("apple pie", "sushi")):
        images = folder / "food101/test" / name
        images.mkdir(parents=True)
        for number in range(3):
            (images / f"{number}.jpg").write_bytes(picture(100 * index + number))


def commands() -> list[list[str]]:
    """Those of the section that start a script of launch/, as words."""
    text = (ROOT / "launch/README.md").read_text()
    section = text.split("## From a download to a table\n")[1].split("\n## ")[0]
    lines = "\n".join(re.findall(r"^    (.*)$", section, re.MULTILINE)).replace("\\\n", " ")
    return [shlex.split(line) for line in lines.splitlines() if "launch/" in line]


@pytest.mark.parametrize("name", ["cc12m", "yfcc15m"])  # cc3m differs in its name alone
def test_the_commands_lead_to_a_table(launcher, tmp_path, name):
    data = tmp_path / "data"
    data.mkdir()
    write_yfcc(data) if name == "yfcc15m" else write_img2dataset_output(data / name)
    write_evaluation_set(data / "eval")
    found = commands()
    converting = [words for words in found if "convert.py" in words[1]]
    ours = [words for words in converting if f"/data/{name}" in words]
    assert len(ours) == 1, "one command makes or indexes the shards of a set"
    later = [words for words in found if words not in converting]
    counting = [words for words in converting if "word-counts" in words]
    done = []
    for words in ours + counting + later:
        script, *arguments = words[1:]
        arguments = [
            each.replace("cc3m", name) if words not in ours else each for each in arguments
        ]
        arguments = [re.sub(r"^(/data|runs|results)/", f"{tmp_path}/\\1/", a) for a in arguments]
        script = script.removeprefix("launch/")
        if script == "pretrain.py":
            arguments += SMALL
        if script == "evaluate.py":  # of the papers' sets, the one that is there
            arguments[arguments.index("paper")] = "food101"
            arguments.remove("--download")
        if script == "doctor.py":
            continue
        result = launcher.run(*arguments, ranks=1, launcher=False, script=script)
        assert result.status == 0, (words, result.output)
        done.append(script)
    assert done == [
        *("convert.py", "convert.py", "plan.py", "pretrain.py", "evaluate.py", "report.py")
    ]
    sizes = json.loads((data / name / "sizes.json").read_text())
    assert sum(sizes.values()) == NUM_PAIRS
    table = (tmp_path / f"results/{name}/results.md").read_text()
    assert "| Food-101 | top-1 | 6 |" in table
    assert (tmp_path / f"results/{name}/report/report.html").is_file()
