"""Bad input ends within 30 s, non-zero, with one sentence, no traceback, on one and two ranks."""

import json
import tarfile
from pathlib import Path

import pytest
from shard_files import add, jpeg, write_shard

pytestmark = pytest.mark.e2e

LIMIT = 30
ZERO0 = ["--ds_config", "ds_configs/zero0.json"]


def _cases(folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Arguments, and words that the sentence must hold, by name."""
    for index in range(2):
        write_shard(folder / f"{index}.tar", 12)
    (folder / "broken.json").write_text("{not json")
    (folder / "contradiction.json").write_text(json.dumps({"train_batch_size": 17}))
    (folder / "indivisible.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 7}))
    (folder / "file").write_text("in the way")
    return {
        "shards that match nothing": (
            [*ZERO0, "--train", f"{folder}/none-*.tar"],
            ["data.train", "none-*.tar"],
        ),
        "unknown recipe": ([*ZERO0, "--recipe", "aclip_vitb61"], ["aclip_vitb61", "aclip_vitb16"]),
        "unknown key": ([*ZERO0, "loss.simclear=1"], ["loss.simclear", "loss.simclr"]),
        "wrong type": ([*ZERO0, "loss.byol=two"], ["loss.byol", "two"]),
        "missing ds_config": (["--ds_config", f"{folder}/no.json"], ["no.json", "no such file"]),
        "ds_config that is not JSON": (["--ds_config", f"{folder}/broken.json"], ["not JSON"]),
        "ds_config contradicts the batch": (
            ["--ds_config", f"{folder}/contradiction.json"],
            ["train_batch_size", "17", "global_batch_size"],
        ),
        "ranks x micro-batch does not divide": (
            ["--ds_config", f"{folder}/indivisible.json"],
            ["global_batch_size", "train_micro_batch_size_per_gpu 7"],
        ),
        "ranks that do not divide the lanes": (
            [*ZERO0, "--train", f"{folder}/[01].tar", "data.lanes=4", "data.workers=3"],
            ["data.workers is 3", "data lanes", "data.workers to 2"],
        ),
        "shards and sources": (
            [*ZERO0, "--train", "/x.tar", "data.sources=[{shards: /x.tar, weight: 1}]"],
            ["data.train", "data.sources", "one of the two"],
        ),
        "an address without its package": (
            [*ZERO0, "--train", "s3://bucket/{00..09}.tar"],
            ["data.train", "s3://bucket", "pip install 'fsspec[s3]'"],
        ),
        "output that can't be written": (
            [*ZERO0, "--output", f"{folder}/file/run"],
            ["--output", "file/run"],
        ),
        "resume of nothing": ([*ZERO0, "--resume", f"{folder}/no-run"], ["--resume", "no-run"]),
        "init that is no checkpoint": (
            [*ZERO0, "--init", f"{folder}/broken.json", "--train", f"{folder}/[01].tar"],
            ["--init", "broken.json", "no checkpoint"],
        ),
        "keep_ratio of 0": ([*ZERO0, "mask.keep_ratio=0"], ["mask.keep_ratio", "0"]),
        "keep_ratio above 1": ([*ZERO0, "mask.keep_ratio=1.5"], ["mask.keep_ratio", "1.5"]),
    }


def _assert_one_sentence(result, words: list[str], ranks: int) -> None:
    assert result.status != 0
    assert result.seconds < LIMIT
    assert "Traceback" not in result.output, result.output
    sentences = {
        line.split("error: ", 1)[1] for line in result.output.splitlines() if "error: " in line
    }
    assert len(sentences) == 1, result.output
    for word in words:
        assert word in next(iter(sentences))
    reporting = {line.split()[1] for line in result.output.splitlines() if "] error: " in line}
    assert len(reporting) == ranks, result.output


CASES = (
    "shards that match nothing",
    "unknown recipe",
    "unknown key",
    "wrong type",
    "missing ds_config",
    "ds_config that is not JSON",
    "ds_config contradicts the batch",
    "ranks x micro-batch does not divide",
    "ranks that do not divide the lanes",
    "shards and sources",
    "an address without its package",
    "output that can't be written",
    "resume of nothing",
    "init that is no checkpoint",
    "keep_ratio of 0",
    "keep_ratio above 1",
)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_with_one_sentence(launcher, tmp_path, name, ranks):
    arguments, words = _cases(tmp_path)[name]
    if "--output" not in arguments:
        arguments = [*arguments, "--output", str(tmp_path / "run")]
    # The launcher takes longer than the check, so two cases stand for all: one that is found before
    # the ranks meet and one after.
    through_launcher = ranks > 1 and name in ("unknown key", "shards that match nothing")
    result = launcher.run(*arguments, ranks=ranks, launcher=through_launcher)
    _assert_one_sentence(result, words, ranks)


def test_bad_samples_are_skipped_counted_and_named(launcher, tmp_path):
    write_shard(tmp_path / "0.tar", 40)
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        for index in range(20):
            add(tar, f"good{index}.jpg", jpeg())
            add(tar, f"good{index}.txt", b"good")
        add(tar, "latin.jpg", jpeg())
        add(tar, "latin.txt", b"caf\xe9\nna\xefve")
        add(tar, "corrupt.jpg", b"\xff\xd8 this is no picture")
        add(tar, "corrupt.txt", b"corrupt")
        add(tar, "empty.jpg", jpeg())
        add(tar, "empty.txt", b"  ")
        add(tar, "thin.jpg", jpeg(4000, 1))
        add(tar, "thin.txt", b"thin")
    write_shard(tmp_path / "2.tar", 20)
    content = (tmp_path / "2.tar").read_bytes()
    (tmp_path / "sizes.json").write_text(json.dumps({"2.tar": 20}))
    (tmp_path / "2.tar").write_bytes(content[: len(content) // 2])
    with tarfile.open(tmp_path / "3.tar", "w") as tar:
        for index in range(5):
            add(tar, f"bad{index}.jpg", b"no picture")
            add(tar, f"bad{index}.txt", b"bad")
    run = tmp_path / "run"
    result = launcher.run(
        *ZERO0, "--train", f"{tmp_path}/*.tar", "--output", str(run), "data.lanes=1",
        "train.global_batch_size=32", "train.epochs=3", "train.log_every=1", ranks=1,
        launcher=False,
    )  # fmt: skip
    assert result.status == 0, result.output
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    skipped = last["skipped"]
    kinds = {"unreadable_image", "empty_caption", "image_too_small", "truncated_shard"}
    assert kinds <= set(skipped)
    assert last["noted"].keys() == {"decoded_as_cp1252"}
    assert f"decoded_as_cp1252 {last['noted']['decoded_as_cp1252']}" in result.output
    assert "3.tar" in result.output, "a shard with nothing usable is named"
