"""`launch/ablate.py` as a user types it, with tiny towers and few steps."""

import json
import re

import pytest

pytestmark = pytest.mark.e2e
TINY = [
    "train.global_batch_size=32",
    "train.samples=1280",
    "train.warmup_epochs=0.01",
    "train.log_every=5",
    "model.image.kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
    "model.text={width: 16, heads: 2, layers: 1, context_length: 16}",
    "model.embed_dim=12",
]


def run(launcher, script, *arguments):
    return launcher.run(*arguments, ranks=1, launcher=False, script=script)


def test_rows_are_trained_compared_and_not_trained_twice(launcher, tmp_path):
    output = tmp_path / "ablation"
    arguments = ["--rows", "random_1x", "attentive_1x", "--keep_ratio", "0.25", "--seeds", "1"]
    arguments += ["--output", str(output), "--keep_checkpoints", *TINY]
    first = run(launcher, "ablate.py", *arguments)
    assert first.status == 0, first.output
    assert "2 runs, 0 of them finished before" in first.output
    rows = {row["row"]: row for row in json.loads((output / "ablation.json").read_text())["rows"]}
    assert list(rows) == ["random_1x", "attentive_1x"]
    for row in rows.values():
        # 40 steps of 32 samples.
        assert row["samples"] == [0, 320, 640, 960, 1280]
        assert len(row["outcomes"]["0"]["objects"]) == 5
    row = r"\| random, 1 x 25 % \|( \d+\.\d \|){4} \d+\.\d \(\d+\.\d\) \| 1,280 \| 1.00 \|"
    assert re.search(row, first.output)

    # The share of the objects' patches that is kept is what the checkpoint's figure says.
    figure = run(launcher, "visualize.py", str(output / "attentive_1x-keep25-seed0"))
    (shown,) = re.findall(r"\| attentive \| (\d+\.\d) % \|", figure.output)
    measured = rows["attentive_1x"]["outcomes"]["0"]["objects"][-1]
    assert f"{100 * measured:.1f}" == shown, figure.output

    again = run(launcher, "ablate.py", *arguments)
    assert again.status == 0 and "2 runs, 2 of them finished before" in again.output
    assert json.loads((output / "ablation.json").read_text())["rows"] == list(rows.values())
    other = run(launcher, "ablate.py", *arguments, "optimizer.lr=2e-3")
    assert other.status == 2 and "Traceback" not in other.output
    assert "keep25-seed0, which was trained with other settings" in other.output


def test_wrong_arguments_end_with_a_sentence(launcher, tmp_path):
    for arguments, sentence in (
        (["--seeds", "0"], "--seeds is 0; give 1 to 1000"),
        (["--rows", "all"], "--rows names all; take some of masks, systems, clip"),
        (["--keep_ratio", "0.5", "0.5"], "--keep_ratio is 0.5 0.5; give each value once"),
        (["train.epochs=0.1"], "train.epochs is 0.1, which is 2 steps, but"),
        (["mask.keep_ratio=0.1"], "override is mask.keep_ratio=0.1, but an ablation decides"),
        (["loss.simclr=1"], "override is loss.simclr=1, but an ablation decides"),
        (["--recipe", "clip_vitb16"], "data.train is empty in clip_vitb16; give shards"),
        (["data.train=/nowhere/*.tar"], "data.train is /nowhere/*.tar"),
    ):
        ended = run(launcher, "ablate.py", "--output", str(tmp_path), *arguments)
        assert ended.status == 2 and "Traceback" not in ended.output
        assert sentence in ended.output
