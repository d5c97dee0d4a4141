"""The split of a validation set over ranks, what is skipped, and the class files beside it."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aclip.config.sections import TextTowerConfig
from aclip.data.shards.listing import Shard, index_shards
from aclip.data.tokenizer import build_tokenizer
from aclip.errors import ConfigError
from aclip.evaluation.evaluate_set import evaluate_set
from aclip.evaluation.sets.evaluation_set import NO_LABEL, ShardSet, read_validation
from aclip.evaluation.sets.prompts import find_class_prompts
from aclip.evaluation.towers import Towers

TOKENIZER = build_tokenizer(TextTowerConfig(context_length=16))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))


def png(value, size=(8, 8)):
    """An image of one grey value."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, samples):
    """Writes dicts {suffix: bytes} as the samples of a tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, members in enumerate(samples):
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return str(path)


def index(*paths):
    return index_shards(list(paths))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_every_sample_is_read_once_by_its_rank_and_batches_are_equally_many(
    tmp_path, world_size, batch_size
):
    shards = index(
        write_shard(tmp_path / "0.tar", [{"png": png(i), "txt": b"a"} for i in range(4)]),
        write_shard(tmp_path / "1.tar", [{"png": png(i), "txt": b"a"} for i in range(4, 7)]),
    )
    batches = [
        list(read_validation(ShardSet(shards), 8, batch_size, rank, world_size))
        for rank in range(world_size)
    ]
    assert len({len(of_rank) for of_rank in batches}) == 1
    assert len({batch.images.shape for of_rank in batches for batch in of_rank}) == 1
    for rank, of_rank in enumerate(batches):
        indices = torch.cat([batch.indices for batch in of_rank]).tolist()
        assert indices == list(range(rank, 7, world_size))
        for batch in of_rank:
            real = batch.images[: len(batch.indices)]
            assert torch.equal(real.amax((1, 2, 3)), batch.indices.to(torch.uint8))
            assert not batch.images[len(batch.indices) :].any()


def test_unusable_samples_are_skipped_and_counted_and_move_nobody(tmp_path):
    samples = [
        {"png": png(0), "txt": b"a"},
        {"png": b"not an image", "txt": b"a"},
        {"png": png(2), "cls": b"3"},
        {"png": png(3), "txt": b"  "},
        {"txt": b"a"},
        {"png": png(5), "cls": b"cat", "txt": b"a"},
        {"png": png(6, size=(1, 4000)), "txt": b"a"},
        {"png": png(7), "json": json.dumps({"captions": ["a", "b"]}).encode(), "cls": b"0\n"},
        {"png": png(8), "cls": b"99999999999999999999"},
    ]
    dataset = ShardSet(index(write_shard(tmp_path / "0.tar", samples)))
    (batch,) = read_validation(dataset, 8, 100, 0, 1)
    assert batch.indices.tolist() == [0, 2, 7]
    assert batch.labels.tolist() == [NO_LABEL, 3, 0]
    assert batch.captions == [["a"], [], ["a", "b"]]
    assert batch.skipped == {
        "unreadable_image": 1,
        "empty_caption": 1,
        "no_image": 1,
        "bad_label": 2,
        "image_too_small": 1,
    }


def test_samples_of_a_truncated_shard_do_not_shift_those_of_the_next(tmp_path):
    first = write_shard(tmp_path / "0.tar", [{"png": png(i), "txt": b"a"} for i in range(3)])
    second = write_shard(tmp_path / "1.tar", [{"png": png(9), "txt": b"a"}])
    with open(first, "r+b") as file:
        file.truncate(512)
    shards = [Shard(first, 3), Shard(second, 1)]
    batches = [list(read_validation(ShardSet(shards), 8, 100, rank, 2)) for rank in range(2)]
    assert [b.indices.tolist() for of_rank in batches for b in of_rank] == [[], [3]]
    assert sum(b.skipped["truncated_shard"] for of_rank in batches for b in of_rank) == 3


def test_the_centre_of_the_image_is_kept(tmp_path):
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, 8:16] = 200
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    shards = index(write_shard(tmp_path / "0.tar", [{"png": buffer.getvalue(), "txt": b"a"}]))
    (batch,) = read_validation(ShardSet(shards), 8, 1, 0, 1)
    assert batch.images.unique().tolist() == [200]


def test_class_files_are_found_beside_the_shards_or_one_folder_above(tmp_path):
    (tmp_path / "classnames.txt").write_text("cat\nhot dog\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}.\n\nmany {c}s\n")
    for folder in (tmp_path, tmp_path / "test"):
        prompts = find_class_prompts(folder)
        assert prompts.texts(0) == ["a cat.", "many cats"]
        assert prompts.texts(1) == ["a hot dog.", "many hot dogs"]
    assert find_class_prompts(tmp_path / "test" / "deeper") is None


def test_without_templates_the_class_is_named_as_a_photo(tmp_path):
    (tmp_path / "classnames.txt").write_text("cat")
    assert find_class_prompts(tmp_path).texts(0) == ["a photo of a cat."]


@pytest.mark.parametrize(
    "names, templates, message",
    [
        ("cat\n\ndog", "a {c}", "empty line 2"),
        ("", "a {c}", "classnames.txt is empty"),
        ("cat", "a {}", "holds the template 'a {}'"),
        ("cat", "\n", "templates.txt is empty"),
    ],
)
def test_malformed_class_files_are_refused(tmp_path, names, templates, message):
    (tmp_path / "classnames.txt").write_text(names)
    (tmp_path / "zeroshot_classification_templates.txt").write_text(templates)
    with pytest.raises(ConfigError, match=message):
        find_class_prompts(tmp_path)


def encode_grey(pixels):
    """Grey value g to the direction at angle g degrees; only the first pixel is looked at."""
    angle = torch.deg2rad(pixels[:, 0, 0, 0].double() * 255).round(decimals=6)
    return torch.stack([angle.cos(), angle.sin()], 1) * 7


def encode_number(tokens):
    """A caption `number 30` to the direction at angle 30 degrees."""
    known = TOKENIZER.encode([f"number {number}" for number in range(91)])
    length = tokens.ids.shape[1]
    numbers = [(known.ids[:, :length] == row).all(1).nonzero().item() for row in tokens.ids]
    angle = torch.deg2rad(torch.tensor(numbers, dtype=torch.float64))
    return torch.stack([angle.cos(), angle.sin()], 1) * 3


def evaluate_here(shards, **kwargs):
    towers = Towers(
        encode_image=encode_grey,
        encode_text=encode_number,
        tokenizer=TOKENIZER,
        resolution=8,
        device=torch.device("cpu"),
        dtype=torch.float32,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    prompts = find_class_prompts(Path(shards[0].url).parent)
    return evaluate_set(replace(towers, **kwargs), ShardSet(shards), prompts, 2)


def test_the_suite_scores_what_the_set_allows(tmp_path):
    """Images lie at angles 10, 40, 80; the one at 20 degrees has no caption and is no candidate."""
    captions = {10: ["number 12", "number 30"], 40: ["number 44"], 80: ["number 90"]}
    samples = [
        {"png": png(10), "json": json.dumps({"captions": captions[10]}).encode(), "cls": b"0"},
        {"png": png(20), "cls": b"1"},
        {"png": png(40), "txt": captions[40][0].encode(), "cls": b"1"},
        {"png": b"broken", "txt": b"number 1"},
        {"png": png(80), "txt": captions[80][0].encode()},
    ]
    shards = index(write_shard(tmp_path / "0.tar", samples))
    (tmp_path / "classnames.txt").write_text("0\n60\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("number {c}\n")

    metrics = evaluate_here(shards)
    assert metrics["num_images"] == 4
    assert metrics["num_skipped"] == 1
    assert metrics["num_captions"] == 4
    assert metrics["num_classes"] == 2
    # Images 10, 40, 80 find 12, 44, 90. Captions 12, 44, 90 find their image, 30 finds 40.
    assert metrics["image_to_text_r1"] == 1.0
    assert metrics["text_to_image_r1"] == pytest.approx(3 / 4)
    assert metrics["text_to_image_r5"] == 1.0
    # Nearest of 0 and 60 degrees: 10 -> 0 (right), 20 -> 0 (wrong), 40 -> 60 (right); 80 has none.
    assert metrics["zero_shot_top1"] == pytest.approx(2 / 3)
    assert metrics["zero_shot_top5"] == 1.0
    assert metrics["zero_shot_mean_per_class"] == pytest.approx((1 + 1 / 2) / 2)
    # Margins (nearness to 60 less that to 0) grow with the angle: of 40 (class 1) and 10 (class 0)
    # right, of 20 (class 1) and 10 right.
    assert metrics["zero_shot_roc_auc"] == 1.0


def test_a_set_without_captions_gives_no_retrieval_and_without_class_files_no_zero_shot(tmp_path):
    labelled = index(write_shard(tmp_path / "a" / "0.tar", [{"png": png(10), "cls": b"0"}]))
    assert evaluate_here(labelled) == {"num_images": 1.0, "num_skipped": 0.0}
    captioned = index(write_shard(tmp_path / "b" / "0.tar", [{"png": png(1), "txt": b"number 1"}]))
    assert not [name for name in evaluate_here(captioned) if name.startswith("zero_shot")]


def test_lines_of_a_txt_are_captions_in_validation_and_guessed_text_is_counted(tmp_path):
    samples = [
        {"png": png(10), "txt": b"number 12\n\nnumber 30\n"},
        {"png": png(40), "txt": b"number\xa044"},  # no UTF-8: a space of Windows-1252
        {"png": png(80), "txt": b"number 90", "json": b'{"caption": "old", "captions": [null]}'},
    ]
    metrics = evaluate_here(index(write_shard(tmp_path / "0.tar", samples)))
    assert metrics["num_captions"] == 4
    assert metrics["num_decoded_as_cp1252"] == 1
    assert metrics["num_txt_before_json"] == 1 and metrics["num_no_text_in_json"] == 1


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_class_names_may_be_of_any_encoding_and_a_guess_is_said(tmp_path, encoding, capsys):
    (tmp_path / "classnames.txt").write_bytes("café\nthé\n".encode(encoding))
    assert find_class_prompts(tmp_path).names == [["café"], ["thé"]]
    assert ("classnames.txt: text that is no UTF-8" in capsys.readouterr().out) == (
        encoding == "cp1252"
    )


def test_a_label_without_a_class_is_refused(tmp_path):
    shards = index(write_shard(tmp_path / "0.tar", [{"png": png(1), "cls": b"2"}]))
    (tmp_path / "classnames.txt").write_text("number 0\nnumber 60")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("{c}")
    with pytest.raises(ConfigError, match=r"names 2 classes, but a sample's .cls is 2"):
        evaluate_here(shards)


def test_a_set_with_nothing_usable_is_refused_with_its_shard(tmp_path):
    shards = index(write_shard(tmp_path / "0.tar", [{"png": b"broken", "txt": b"a"}]))
    with pytest.raises(ConfigError, match=r"0.tar .*holds no usable sample, 1 are skipped"):
        evaluate_here(shards)


def test_pixels_reach_the_encoder_normalised_in_the_asked_dtype(tmp_path):
    shards = index(write_shard(tmp_path / "0.tar", [{"png": png(255), "txt": b"number 1"}]))
    seen = []

    def encode(pixels):
        seen.append(pixels)
        return torch.ones(len(pixels), 2)

    evaluate_here(
        shards, encode_image=encode, dtype=torch.bfloat16, mean=(0.5, 0, 1), std=(0.25, 1, 1)
    )
    assert seen[0].dtype == torch.bfloat16
    assert seen[0][0, :, 0, 0].tolist() == [2.0, 1.0, 0.0]
