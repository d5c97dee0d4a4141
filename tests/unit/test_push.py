"""An export goes to the Hub under a name: one commit, or a sentence that says why not."""

import argparse
import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from hub_server import OWNER, TOKEN
from small_recipe import SMALL_RECIPE
from text_folders import write_text_folder
from written_run import write_run

from aclip.config.recipe_file import load_recipe
from aclip.errors import ConfigError, NotWritten
from aclip.weights.push import push

NAME = f"{OWNER}/tiny"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose recipe names a folder of this machine."""
    folder = tmp_path_factory.mktemp("push")
    return write_run(folder / "run", load_recipe(SMALL_RECIPE, [f"data.train={folder}/*.tar"]))[0]


def run_push(checkpoint, output_format="open_clip", name=NAME, **options):
    values = {"out": None, "model": None, "private": False, "revision": None, "dry_run": False}
    values |= {"checkpoint": str(checkpoint), "format": output_format, "push": name} | options
    push(argparse.Namespace(**values))


def files_of(hub, name=NAME, revision="main"):
    files = dict(hub.repositories["model", name].files(revision))
    files.pop(".gitattributes", None)
    return files


def test_an_export_goes_in_one_commit_and_a_second_time_in_none(hub, run, tmp_path, capsys):
    for number, output_format in enumerate(("open_clip", "huggingface", "safetensors")):
        name = f"{OWNER}/tiny{number}"
        run_push(run, output_format, name, private=number == 0)
        repository = hub.repositories["model", name]
        assert repository.private == (number == 0)
        assert len(repository.commits) == 2, "the Hub's own first one, and the push"
        large = hub.count("PUT /lfs/")
        run_push(run, output_format, name)
        assert len(repository.commits) == 2 and hub.count("PUT /lfs/") == large
        files = files_of(hub, name)
        said = capsys.readouterr().out
        for path, content in files.items():
            assert path in said and f"{len(content):,}" in said
        assert name.encode() in files["README.md"], "the card's code loads it by its name"
        assert f"teacher is at http://127.0.0.1/{name}/commit/" in said
    assert {"open_clip_config.json", "config.json", "open_clip_model.safetensors"} <= set(
        files_of(hub, f"{OWNER}/tiny0")
    )
    assert not list((tmp_path / "cache").rglob("*.*")), "what was sent is not kept twice"


def test_no_token_and_no_place_of_this_machine_is_sent(hub, tmp_path):
    """In the format whose export copies files of the user's."""
    folder = write_text_folder(tmp_path / "folder", "bert")
    for file in ("config.json", "tokenizer_config.json"):
        values = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        values |= {"_name_or_path": str(tmp_path), "tokenizer_file": str(tmp_path / "x.json")}
        (folder / file).write_text(json.dumps(values))
    shards = f"{tmp_path}/train/*.tar"
    places = [
        f"data.train={shards}",
        f"data.val=[{shards}]",
        f"data.cache={tmp_path}/shards",
        f"train.upload_to=file://{tmp_path}/copies",
        f"model.init={tmp_path}/start.pt",
        f"stages=[{{data: {{train: {shards}}}, train: {{epochs: 1}}}}]",
    ]
    text = f"model.text={{name: {folder}, context_length: 12}}"
    recipe = load_recipe(SMALL_RECIPE, [*places, text])
    run, *_ = write_run(tmp_path / "run", recipe, has_teacher=False)
    run_push(run, "safetensors")
    assert "text_tower/tokenizer_config.json" in files_of(hub)
    sent = [*files_of(hub).values(), *hub.received]
    for secret in (TOKEN, str(tmp_path), str(run), str(Path.home()), os.getcwd()):
        assert not any(secret.encode() in content for content in sent), secret
    load_recipe(_write(tmp_path / "recipe.yaml", files_of(hub)["recipe.yaml"]))


def _write(path, content):
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("output_format", ["open_clip", "huggingface"])
def test_exports_of_other_libraries_hold_no_place_either(hub, run, tmp_path, output_format):
    run_push(run, output_format)
    sent = [*files_of(hub).values(), *hub.received]
    for secret in (TOKEN, str(tmp_path), str(Path.home()), os.getcwd()):
        assert not any(secret.encode() in content for content in sent), secret


@pytest.mark.parametrize("keeps_folder", [True, False], ids=["--out", "no --out"])
def test_a_killed_push_goes_on_and_sends_nothing_twice(hub, run, tmp_path, keeps_folder):
    out = str(tmp_path / "out") if keeps_folder else None
    hub.hold = "tokenizer.json"
    process = multiprocessing.get_context("fork").Process(
        target=run_push, args=(run, "huggingface"), kwargs={"out": out}
    )
    process.start()
    assert hub.held.wait(60)
    deadline = time.monotonic() + 20
    while hub.count("PUT /lfs/") < 2 or len(hub.lfs) < 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    repository = hub.repositories["model", NAME]
    assert len(repository.commits) == 1 and len(hub.lfs) == 1
    hub.hold = None
    run_push(run, "huggingface", out=out)
    assert len(repository.commits) == 2 and len(hub.lfs) == 2
    assert hub.count("PUT /lfs/") == 3, "the weights once, and the tokenizer that was held again"
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= set(files_of(hub))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_dry_run_asks_nobody_and_shows_what_the_push_sends(
    hub, run, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("HF_TOKEN")
    out = tmp_path / "out"
    run_push(run, dry_run=True, out=str(out))
    said = capsys.readouterr().out
    assert not hub.asked
    assert f"would be sent to {hub.address}/{NAME}, branch main" in said
    for path in out.iterdir():
        assert path.name in said and f"{path.stat().st_size:,}" in said
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run_push(run, out=str(out))
    assert files_of(hub) == {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "more.txt").touch()
    with pytest.raises(ConfigError, match="--out is .* holds other files than this export"):
        run_push(run, out=str(out))


def test_a_branch_gets_the_commit_and_its_towers_name_it(hub, run):
    repository = hub.make(NAME)
    repository.commit("v2", {})
    with pytest.raises(ConfigError, match=r"--revision is v3, but .* no such branch \(main, v2\)"):
        run_push(run, revision="v3")
    run_push(run, revision="v2")
    assert not files_of(hub) and "open_clip_model.safetensors" in files_of(hub, revision="v2")
    config = json.loads(files_of(hub, revision="v2")["open_clip_config.json"])
    assert config["model_cfg"]["vision_cfg"]["timm_model_name"] == f"hf-hub:{NAME}@v2"


REFUSED = {
    "nobody": ({"HF_TOKEN": ""}, {}, r"nobody is logged in to the Hub; run hf auth login"),
    "wrong token": ({"HF_TOKEN": "hf_wrong"}, {}, r"does not know your token \(401\)"),
    "no right": ({}, {"name": "grace/tiny"}, r"does not let your token write there \(403\)"),
    "no right there": ({}, {"name": "grace/there"}, r"does not let your token write there \(403\)"),
    "data set": ({}, {"name": f"{OWNER}/scenes"}, "which is a dataset on the Hub; give"),
    "space": ({}, {"name": f"{OWNER}/show"}, "which is a space on the Hub; give"),
    "public": ({}, {"name": f"{OWNER}/open", "private": True}, "everybody can read already"),
    "no branch": ({}, {"revision": "v2"}, r"--revision is v2, but .* no such branch \(main\)"),
    "no owner": ({}, {"name": "tiny"}, "--push is tiny, which is no name on the Hub; write"),
    "three parts": ({}, {"name": "a/b/c"}, "a/b/c, which is no name on the Hub"),
    "dashes": ({}, {"name": "a/b--c"}, "which is no name on the Hub"),
    "branch in the name": ({}, {"name": "a/b@v2"}, "a/b@v2; give the part behind @ as --revision"),
    "blank branch": ({}, {"revision": ""}, "and --revision , which is no name on the Hub"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_refuses_is_one_sentence_before_anything_is_written(
    hub, tmp_path, monkeypatch, case
):
    environment, options, sentence = REFUSED[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hub.make(f"{OWNER}/scenes", "dataset")
    hub.make(f"{OWNER}/show", "space")
    hub.make(f"{OWNER}/open")
    hub.make("grace/there")
    repositories = set(hub.repositories)
    # A checkpoint of which nothing can be loaded: it is not looked into.
    folder = tmp_path / "run/checkpoints/samples-000000000008"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "student.safetensors").touch()
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=sentence) as refusal:
        run_push(folder, **options)
    assert time.monotonic() - begin < 3
    assert not isinstance(refusal.value, NotWritten) and "\n" not in str(refusal.value)
    assert set(hub.repositories) == repositories and "hf_" not in str(refusal.value)


@pytest.mark.parametrize("silence", ["nobody listens", "nobody answers"])
def test_without_a_network_a_push_ends_within_three_seconds(hub, run, monkeypatch, silence):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1] if silence == "nobody answers" else 9
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        begin = time.monotonic()
        with pytest.raises(ConfigError, match=rf"--push is {NAME}, but .*:{port} can't be reached"):
            run_push(run)
        assert time.monotonic() - begin < 3


def test_a_hub_that_fails_in_the_middle_is_one_sentence(hub, run, monkeypatch):

    def break_off(*arguments, **options):
        raise RuntimeError("https://storage/lfs?signature=secret") from ConnectionResetError()

    monkeypatch.setattr("huggingface_hub._commit_api.lfs_upload", break_off)
    with pytest.raises(NotWritten, match="did not take all of it.*the same command goes on") as no:
        run_push(run)
    assert "secret" not in str(no.value) and "\n" not in str(no.value)
