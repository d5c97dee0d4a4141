"""`~` in front of a path, wherever a user can give one: every option, and the recipe's values."""

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from released_model import DEMO, released_model, save_released
from small_recipe import SMALL_RECIPE

from aclip.config.arguments import parser as pretrain_parser
from aclip.config.arguments import read_recipe
from aclip.config.recipe_file import load_recipe
from aclip.data.shards.listing import list_shards, remote_shards
from aclip.errors import ConfigError
from aclip.files import expand_home
from aclip.models.student import build_student
from aclip.nodes import supervisor
from aclip.training.upload import Uploader
from aclip.weights.initial_weights import load_initial_weights

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(path.stem for path in LAUNCH.glob("*.py"))
OF_RECIPE = {"train", "val", "init", "overrides", "set"}
"""Values of the recipe, in which `~` is replaced where they are read."""
TEXT = {
    "captions",  # keys of them
    "arguments",  # pretrain.py's
    "caption_column",
    "image_column",
    "budget_row",
    "license",
    "master_addr",
    "name",  # a pattern of names inside a folder
    "published",
    "push",  # a name on the Hub
    "revision",
    "rows",
    "rsh",
    "separator",
    "script",  # multinode.sh gives it
    "sizes",
    "gpu",
}
"""Options that are no paths."""


class Seen(Exception):
    """Carries the parser that a script has built."""


@pytest.fixture
def parser_of(monkeypatch):
    """parser_of(parse_arguments): the parser that a function builds, which does not parse."""

    def stop(self, *_):
        raise Seen(self)

    def get(parse_arguments) -> argparse.ArgumentParser:
        with monkeypatch.context() as patch, pytest.raises(Seen) as seen:
            for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
                patch.setattr(argparse.ArgumentParser, name, stop)
            parse_arguments()
        return seen.value.args[0]

    return get


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(f"launch_{name}", LAUNCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_options(parser: argparse.ArgumentParser):
    """The actions that take text, those of sub-commands too."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from text_options(each)
        elif action.nargs != 0 and action.choices is None and action.type not in (int, float):
            yield action


def test_every_option_that_takes_a_path_knows_the_home_folder(parser_of, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parsers = [parser_of(load_script(n).parse_arguments) for n in SCRIPTS if n != "pretrain"]
    parsers += [pretrain_parser(), parser_of(supervisor.parse_arguments)]
    paths = []
    for action in (action for parser in parsers for action in text_options(parser)):
        if action.dest not in OF_RECIPE | TEXT:
            assert action.type is not None, f"{action.dest} takes a path without ~"
            assert action.type("~/a b/x") == "/home/me/a b/x"
            paths.append(action.dest)
    assert {"output", "out", "resume", "recipe", "ds_config", "images", "hostfile"} <= set(paths)


def test_doctors_hostfile_knows_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "argv", ["doctor.py", "~/hosts", "--train", "~/a.tar"])
    arguments = load_script("doctor").parse_arguments()
    assert arguments.hostfile == "/home/me/hosts"
    assert arguments.arguments == ["--train", "~/a.tar"]  # each node has a home of its own


def test_only_a_tilde_in_front_stands_for_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    unchanged = ["s3://bucket/~/x.tar", "pipe:cat ~/x.tar", "a~/b", "x~", "auto", "/a/~", ""]
    assert [expand_home(text, "--output") for text in unchanged] == unchanged
    assert expand_home("~", "--output") == "/home/me"
    assert expand_home("~root/x", "--output") == "/root/x"
    assert expand_home("timm:~/x.pt", "--init") == "timm:/home/me/x.pt"
    assert expand_home("local-dir:~/x", "--init") == "local-dir:/home/me/x"


def test_a_home_folder_that_nobody_has_is_refused_and_no_folder_of_that_name_made(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^--init is timm:~nobody-here/x, but.*timm:\./~nobody"):
        expand_home("timm:~nobody-here/x", "--init")
    with pytest.raises(SystemExit):
        pretrain_parser().parse_intermixed_args(["--ds_config", "x", "--output=~nobody-here/x"])
    assert "argument --output: this is ~nobody-here/x, but" in capsys.readouterr().err
    (tmp_path / "~old-copy").touch()
    assert expand_home("~old-copy", "--output") == "~old-copy"


def test_the_recipes_values_know_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).touch()
    words = ["--ds_config", "x", "--train=~/{a,b}.tar", "--val=~/a.tar", "--init=~/slip.pt"]
    recipe = read_recipe(pretrain_parser().parse_intermixed_args([*words, "data.cache=~/cache"]))
    both = [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    assert list_shards(recipe.data.train, "data.train") == both
    assert list_shards("~/*.tar", "data.train") == both
    assert list_shards(["~/b.tar", "~/a.tar"], "data.sources.0.shards") == both[::-1]
    assert remote_shards(recipe.data).folder == tmp_path / "cache"
    with pytest.raises(ConfigError, match=r"^data.val is ~nobody-here/a\.tar, but no such home"):
        list_shards("~nobody-here/a.tar", "data.val")
    assert Uploader("~/copies")._root == f"{tmp_path}/copies"
    save_released(tmp_path / "slip.pt", released_model(DEMO).state_dict())
    student = build_student(load_recipe(SMALL_RECIPE, ["model.text.context_length=77"]))
    assert load_initial_weights(student, recipe.model.init).layout == "SLIP checkpoint"
    torch.save(released_model(DEMO).visual.state_dict(), tmp_path / "vit.pt")
    assert load_initial_weights(student, "timm:~/vit.pt").layout == "timm image tower"
