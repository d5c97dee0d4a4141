"""What can be seen of a validation set before a run starts."""

import json
import subprocess
import sys

import pytest
from evaluation_folders import png, write_tar

from aclip.data.shards.listing import index_shards
from aclip.errors import ConfigError
from aclip.evaluation.sets.validation_check import check_validation

IMAGE, TEXT = {"png": png(1)}, {"txt": b"words"}
TEMPLATES = "zeroshot_classification_templates.txt"


@pytest.fixture
def check(tmp_path, monkeypatch):
    """check(samples, names=None, templates=None): the sentences about a set of these members."""
    monkeypatch.setenv("ACLIP_CACHE", str(tmp_path / "cache"))

    def run(samples, names=None, templates=None):
        for file, text in (("classnames.txt", names), (TEMPLATES, templates)):
            if text is not None:
                (tmp_path / file).write_text(text)
        write_tar(tmp_path / "val" / "0.tar", [IMAGE | members for members in samples])
        return check_validation(index_shards([str(tmp_path / "val" / "0.tar")]))

    return run


def test_what_can_be_scored_needs_no_word(check):
    assert check([{"txt": b"a"}]) == []
    assert check([{"cls": b"1"}, {"cls": b"0"}, {"cls": b"x"}], names="a\nb") == []


@pytest.mark.parametrize(
    "samples, files, words",
    [
        ([{"cls": b"0"}], {}, r"hold .cls but no captions, and there is no classnames.txt; write"),
        ([{"cls": b"0", "txt": b" "}], {}, r"hold .cls but no captions, and there is no classnam"),
        ([{"cls": b"2"}], {"names": "a\nb"}, r"a sample's .cls is 2, but .* names 2 classes"),
        ([{"cls": b"cat"}] * 3, {"names": "cat"}, r"\(bad_label 3, such as 'cat'\); write"),
        ([{"cls": b"-1"}], {"names": "a"}, r"\(bad_label 1, such as '-1'\)"),
        ([{"txt": b" \n "}] * 2, {}, r"whose 2 samples hold neither .*\(empty_caption 2\)"),
        ([{}], {}, r"whose 1 samples hold neither .*\(no_caption 1\); write captions as .txt"),
        ([{"cls": b"0"}], {"names": "a", "templates": "a photo"}, r"holds the template 'a photo'"),
        ([{"cls": b"0"}], {"names": "\n"}, r"classnames.txt is empty"),
    ],
)
def test_what_cant_be_scored_is_refused(samples, files, words, check):
    with pytest.raises(ConfigError, match=words):
        check(samples, **files)


def test_what_is_there_but_not_scored_is_said(check):
    (sentence,) = check([{"cls": b"0", "txt": b"a"}])
    assert "it gives retrieval alone, since there is no classnames.txt" in sentence
    (sentence,) = check([{"txt": b"a"}], names="a\nb")
    assert "captions but no .cls" in sentence and "classnames.txt is not used" in sentence


def test_a_late_sample_that_can_be_scored_is_found(check):
    assert check([{"txt": b" "}] * 300 + [{"txt": b"a"}]) == []


def test_a_run_is_refused_at_its_start(write_tar, tmp_path):
    train = [(f"{n}.{suffix}", data) for n in range(4) for suffix, data in (IMAGE | TEXT).items()]
    val = [("0.png", IMAGE["png"]), ("0.cls", b"0")]
    (tmp_path / "val").mkdir()
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    words = ["--ds_config", str(tmp_path / "ds.json"), "--output", str(tmp_path / "run")]
    words += ["--train", write_tar("a.tar", train), "--val", write_tar("val/0.tar", val)]
    code = "import sys; from aclip.config.arguments import parse\n"
    code += "from aclip.training.start import check_start; check_start(parse(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *words, "train.global_batch_size=2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "data.val is" in done.stderr and "there is no classnames.txt" in done.stderr
