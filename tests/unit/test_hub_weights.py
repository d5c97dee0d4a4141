"""Weights that `--init` and launch/evaluate.py take by their name on the Hub."""

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
import yaml
from hub_server import OWNER
from released_model import inputs
from run_starts import at, start
from small_recipe import SMALL_RECIPE
from written_run import write_run

from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError
from aclip.evaluation.evaluate import evaluate
from aclip.evaluation.load_model import load_model
from aclip.evaluation.origin import find_origin
from aclip.method.tokens import clip_tokens
from aclip.models.student import build_student
from aclip.weights.find_named import check_init, find_named, pinned
from aclip.weights.initial_weights import load_initial_weights
from aclip.weights.push import push

NAME = f"{OWNER}/tiny"
INIT = f"hf-hub:{NAME}"
CAPTIONS = ["a red circle", "two dogs, one ball", "x"]
FORMATS = {
    "open_clip": {"open_clip_config.json", "open_clip_model.safetensors", "config.json"},
    "huggingface": {"config.json", "processor_config.json", "model.safetensors"},
    "safetensors": {"recipe.yaml", "model.safetensors"},
}
"""By format: the files of an export that aclip reads."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(the teacher of a run, folder by format with the files that a push sends)."""
    folder = tmp_path_factory.mktemp("exported")
    run, _, teacher = write_run(folder / "run", load_recipe(SMALL_RECIPE))
    for output_format in FORMATS:
        options = {"checkpoint": str(run), "format": output_format, "model": None, "push": NAME}
        options |= {"out": str(folder / output_format), "private": False, "revision": None}
        push(argparse.Namespace(**options, dry_run=True))
    return teacher, folder


@pytest.fixture
def publish(hub, exported):
    """publish(format) -> the stand-in's repository NAME with that export and files besides."""

    def commit(output_format):
        paths = (exported[1] / output_format).iterdir()
        files = {path.name: path.read_bytes() for path in paths}
        repository = hub.repositories.get(("model", NAME)) or hub.make(NAME)
        repository.commit("main", files | {"pytorch_model.bin": b"x", "notes.txt": b"x"})
        return repository

    return commit


def without_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def fetched(hub):
    """The names of the files whose content was asked for."""
    lines = [line for line in hub.asked if line.startswith("GET") and "/resolve/" in line]
    return sorted(line.rpartition("/")[2] for line in lines)


@pytest.mark.parametrize("output_format", FORMATS)
def test_an_export_comes_back_by_its_name_and_then_from_the_cache(
    hub, publish, exported, monkeypatch, output_format
):
    sha = publish(output_format).branches["main"]
    expected = exported[0].model_parameters()
    loaded = load_model(INIT)
    assert fetched(hub) == sorted(FORMATS[output_format]), "each file once, and no other"
    for name, parameter in loaded.student.model_parameters().items():
        if name != "logit_scale.log_logit_scale":  # the student's, which a teacher has not
            assert torch.equal(parameter, expected[name])
    without_network(monkeypatch)
    for name in (INIT, f"{INIT}@{sha}"):
        check_init(name)
        student = build_student(load_recipe(SMALL_RECIPE, ["train.seed=5"]))
        report = load_initial_weights(student, name)
        assert torch.equal(student.image.vit.cls_token, exported[0].image.vit.cls_token)
    assert f"starting from {INIT}@{sha}" in report.summary()


LOAD = """
import sys, torch, open_clip
from transformers import AutoTokenizer, VisionTextDualEncoderModel
theirs, processed = open_clip.create_model_from_pretrained(f"hf-hub:{sys.argv[1]}")
dual = VisionTextDualEncoderModel.from_pretrained(sys.argv[2]).eval()
given = torch.load(sys.argv[3])
pixels, captions = given["pixels"], given["captions"]
tokens = open_clip.get_tokenizer(f"hf-hub:{sys.argv[1]}")(captions)
ids = AutoTokenizer.from_pretrained(sys.argv[2])(
    captions, padding=True, truncation=True, return_tensors="pt"
)
with torch.no_grad():
    found = [theirs.eval().encode_image(pixels), theirs.encode_text(tokens)]
    found += [dual.get_image_features(pixels).pooler_output]
    found += [dual.get_text_features(**ids).pooler_output]
torch.save([*found, tokens], sys.argv[4])
"""


@torch.no_grad()
def test_other_libraries_load_what_was_pushed_by_its_name(hub, exported, tmp_path, monkeypatch):
    """In a process of its own, as the libraries read where the Hub is when they are imported."""
    teacher, folder = exported
    for output_format in ("open_clip", "huggingface"):
        options = {"checkpoint": str(folder / "run"), "format": output_format, "model": None}
        options |= {"push": f"{OWNER}/{output_format}", "revision": None, "dry_run": False}
        push(argparse.Namespace(**options, out=None, private=False))
    pixels, _ = inputs(64, (3, 32, 20))
    torch.save({"pixels": pixels, "captions": CAPTIONS}, tmp_path / "given.pt")
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    names = [f"{OWNER}/open_clip", f"{OWNER}/huggingface"]
    words = [
        sys.executable,
        "-c",
        LOAD,
        *names,
        str(tmp_path / "given.pt"),
        str(tmp_path / "found"),
    ]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    *found, tokens = torch.load(tmp_path / "found")
    image, text = teacher.encode_image(pixels), teacher.encode_text(clip_tokens(tokens))
    for actual, expected in zip(found, (image, text, image, text), strict=True):
        # The same products, summed in another order.
        assert (actual - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


def test_of_several_ranks_of_a_node_one_downloads(hub, publish):
    publish("safetensors")
    context = multiprocessing.get_context("fork")
    name = pinned(INIT)
    before = len(hub.asked)
    ranks = [context.Process(target=find_named, args=(name,)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert fetched(hub) == sorted(FORMATS["safetensors"])
    lists = [line for line in hub.asked[before:] if "/tree/" in line]
    assert len(lists) == 2, "of the one rank, which looks what there is and then downloads"


REFUSED = {
    "hf-hub:tiny": "is no name of a model on the Hub; write hf-hub:OWNER/NAME",
    f"{INIT}@": "is no name of a model on the Hub",
    f"hf-hub:{OWNER}/absent": "is no model on http.*or one that you may not read; check the name",
    f"{INIT}@v2": "has no revision v2; give a branch",
    f"{INIT}@{'0' * 40}": f"has no revision {'0' * 40}; give",
    f"hf-hub:{OWNER}/clip": "a Hugging Face folder of a clip model",
    f"hf-hub:{OWNER}/pictures": r"holds no weights that aclip knows, but \.gitattributes, cat\.jpg",
    f"hf-hub:{OWNER}/empty": "holds open_clip_config.json, but no open_clip_model",
}


def test_what_can_not_be_taken_by_its_name_is_one_sentence(hub, publish, monkeypatch):
    publish("safetensors")
    hub.make(f"{OWNER}/clip").commit("main", {"config.json": b'{"model_type": "clip"}'})
    hub.make(f"{OWNER}/pictures").commit("main", {"cat.jpg": b"x"})
    hub.make(f"{OWNER}/empty").commit("main", {"open_clip_config.json": b"{}"})
    for init, words in REFUSED.items():
        for look in (check_init, load_model):
            with pytest.raises(ConfigError, match=words) as refusal:
                look(init)
            assert init in str(refusal.value) and "\n" not in str(refusal.value)
    assert not fetched(hub) or set(fetched(hub)) <= {"config.json", "open_clip_config.json"}
    hub.make(f"{OWNER}/mine", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ConfigError, match=r"does not know your token \(401\)"):
        check_init(f"hf-hub:{OWNER}/mine")
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(ConfigError, match="one that you may not read; check the name, or log in"):
        check_init(f"hf-hub:{OWNER}/mine")


@pytest.mark.parametrize("silence", ["nobody listens", "nobody answers", "HF_HUB_OFFLINE"])
def test_without_a_network_what_is_not_in_the_cache_is_refused_in_three_seconds(
    hub, monkeypatch, silence
):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1] if silence == "nobody answers" else 9
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        words = rf"http://127\.0\.0\.1:{port} can't be reached; fetch it where it can be"
        if silence == "HF_HUB_OFFLINE":
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            words = "HF_HUB_OFFLINE forbids to ask the Hub"
        for init in (INIT, f"{INIT}@{'0' * 40}"):
            begin = time.monotonic()
            with pytest.raises(
                ConfigError, match=f"{init}, which is not in .*cache, while {words}"
            ):
                check_init(init)
            assert time.monotonic() - begin < 3


def test_what_another_library_has_put_into_the_cache_needs_no_network(
    hub, publish, exported, monkeypatch
):
    """Its files alone, without the list of what there is besides."""
    publish("huggingface")
    find_named(INIT)
    shutil.rmtree(find_named(INIT).path.parents[1] / "trees")
    without_network(monkeypatch)
    assert torch.equal(
        load_model(INIT).student.image.vit.cls_token, exported[0].image.vit.cls_token
    )
    weights = find_named(INIT).weights
    weights.unlink()
    with pytest.raises(ConfigError, match="is not in Hugging Face's cache, while"):
        load_model(INIT)


def test_a_run_records_the_commit_and_goes_on_whatever_the_name_stands_for_later(
    publish, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    repository = publish("safetensors")
    begun = repository.branches["main"]
    init = [f"model.init={INIT}"]

    def recorded(name="recipe.yaml"):
        return yaml.safe_load((run / name).read_text())["model"]["init"]

    assert start(run, overrides=init, saves=[8]) is None
    assert recorded() == f"{INIT}@{begun}"
    assert publish("huggingface").branches["main"] != begun
    for each in (init, [f"model.init={INIT}@main"], [f"model.init={INIT}@{begun}"]):
        assert start(run, overrides=each) == at(8)
    without_network(monkeypatch)
    assert start(run, overrides=init) == at(8)
    assert recorded() == f"{INIT}@{begun}" and not list(run.glob("recipe-samples-*"))
    for other in (f"{INIT}@{'0' * 40}", f"hf-hub:{OWNER}/other", "''"):
        with pytest.raises(
            ConfigError, match=f"""model.init .*{begun}" -> ".*{other.strip("'")}"""
        ):
            start(run, overrides=[f"model.init={other}"])
    with pytest.raises(ConfigError, match="--init is hf-hub:x, which is no name of a model"):
        start(run, overrides=["model.init=hf-hub:x"])


def test_an_evaluation_is_one_of_the_commit(publish, monkeypatch):
    sha = publish("safetensors").branches["main"]

    def stop(*_):
        raise ConfigError("stop")

    monkeypatch.setattr("aclip.evaluation.evaluate.find_tasks", stop)
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    options = {"model": None, "recipe": None, "suite": ["scenes"], "data": None, "output": None}
    options |= {"download": False, "slip_checkout": None, "linear_probe": False, "batch_size": 8}
    arguments = argparse.Namespace(checkpoint=INIT, published="aclip-25", **options)
    with pytest.raises(ConfigError, match="stop"):
        evaluate(arguments)
    assert arguments.checkpoint == f"{INIT}@{sha}", "what is loaded later"
    origin = find_origin(arguments.checkpoint, None, None)
    assert origin.identity.startswith(f"{INIT}@{sha} ")
    assert str(origin.output) == f"runs/evaluation/{OWNER}--tiny"
    arguments.checkpoint = f"{INIT}@v9"
    with pytest.raises(ConfigError, match=f"the checkpoint is {INIT}@v9, which has no revision v9"):
        evaluate(arguments)


def test_an_open_clip_folder_from_the_hub_needs_no_hub_for_its_tower(exported, tmp_path):
    """Downloaded by hand: its config.json lies beside, so nobody is asked for it."""
    copy = shutil.copytree(exported[1] / "open_clip", tmp_path / "copy")
    config = json.loads((copy / "open_clip_config.json").read_text())
    assert config["model_cfg"]["vision_cfg"]["timm_model_name"] == INIT
    loaded = load_model(str(copy))
    assert torch.equal(loaded.student.image.vit.cls_token, exported[0].image.vit.cls_token)
