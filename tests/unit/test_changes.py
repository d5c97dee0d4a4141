"""A run goes on with the settings that it was trained with, unless its user says otherwise."""

import pytest
import torch
from run_starts import SIZE, TINY, ZERO1, at, config, save, start
from small_recipe import SMALL_RECIPE

from aclip.config.continuing import MAY_CHANGE, NEVER_CHANGE
from aclip.config.recipe_file import dump_recipe, load_recipe
from aclip.data.loader import with_crops
from aclip.errors import ConfigError
from aclip.lock import release
from aclip.training.take_folder import take_folder


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def test_each_setting_that_differs_is_named_then_and_now(run):
    start(run, saves=[8])
    clipped = ZERO1 | {"gradient_clipping": 1.0, "bf16": {"enabled": False}}
    overrides = ["optimizer.lr=5e-4", "train.epochs=2", "model.image.kwargs={embed_dim: 24}"]
    overrides += ["mask.warmup=0.5", "mask.warmup_change=gradual", "mask.temperature=1"]
    with pytest.raises(ConfigError) as raised:
        start(run, overrides=overrides, ds_values=clipped)
    words = str(raised.value)
    for change in (
        "optimizer.lr 0.001 -> 0.0005",
        "train.epochs 1.0 -> 2.0",
        "model.image.kwargs.embed_dim ",
        "mask.warmup 0.0 -> 0.5",
        'mask.warmup_change "at_once" -> "gradual"',
        "mask.temperature 0.0 -> 1.0",
        "gradient_clipping 0.0 -> 1.0 (ds_config)",
        "bf16.enabled true -> false (ds_config)",
    ):
        assert change in words
    assert words.startswith(f"--output is {run}, whose run was trained with other settings")
    assert "give another --output" in words and "--allow_changes" in words
    assert not list(run.glob("recipe-*"))


def test_word_allows_changes_and_the_same_command_goes_on(run, capsys):
    start(run, saves=[8])
    changed = {"overrides": ["optimizer.lr=5e-4"], "allow_changes": True}
    assert start(run, **changed, saves=[12]) == at(8)
    assert "continues with other settings (then -> now): optimizer.lr 0.001 -> 0.0005" in (
        capsys.readouterr().out
    )
    assert start(run, **changed) == at(12)
    assert capsys.readouterr().out == ""
    assert start(run, overrides=changed["overrides"]) == at(12)
    with pytest.raises(ConfigError, match=r"optimizer.lr 0.0005 -> 0.001"):
        start(run)
    # At 8 samples it was trained with the first recipe.
    assert start(run, str(run / "checkpoints" / at(8))) == at(8)


def test_what_computes_the_same_may_change(run):
    start(run, saves=[8])
    overrides = ["data.workers=3", "train.log_every=7", "train.checkpoint_every=99"]
    overrides += ["train.hang_timeout=5", "train.keep_checkpoints=9", "train.keep_every=7"]
    overrides += ["train.evaluate_every=3", "data.val=/x.tar", "model.image.recompute=blocks"]
    overrides += ["train.upload_to=/y", "data.cache=/z", "data.train=/moved/*.tar", "train.wandb=p"]
    stage3 = ZERO1 | {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 7},
        "data_types": {"grad_accum_dtype": "fp32"},
        "train_micro_batch_size_per_gpu": 2,
    }
    assert start(run, overrides=overrides, ds_values=stage3) == at(8)


def test_a_run_goes_on_with_the_crops_it_began_with_unless_told_otherwise(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    recipe, ds_config = load_recipe(SMALL_RECIPE, TINY), config(run.parent, ZERO1)
    assert recipe.data.crops is None
    start(run, overrides=["data.crops=worker"], saves=[8])

    def found(recipe):
        try:
            return take_folder(run, "auto", recipe, ds_config, allow_changes=False)["crops"]
        finally:
            release(run)

    assert found(recipe) == "worker"
    assert with_crops(recipe, found(recipe)).data.crops == "worker"
    assert with_crops(recipe).data.crops == "device"  # a run that begins now
    with pytest.raises(ConfigError, match=r'data.crops "worker" -> "device"'):
        found(load_recipe(SMALL_RECIPE, [*TINY, "data.crops=device"]))


@pytest.mark.parametrize(
    ("own", "begun", "on_gpu", "expected"),
    [
        (None, None, False, "worker"),
        (None, None, True, "device"),
        (None, "device", False, "device"),
        ("worker", None, True, "worker"),
        ("worker", "device", True, "worker"),
    ],
)
def test_empty_crops_are_those_that_feed_the_device(own, begun, on_gpu, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    recipe = load_recipe(SMALL_RECIPE, [] if own is None else [f"data.crops={own}"])
    assert with_crops(recipe, begun).data.crops == expected


def test_keys_that_may_change_are_keys_of_the_recipe():
    sources = ["data.train=[]", "data.sources=[{shards: a, weight: 1}]"]
    values = load_recipe(SMALL_RECIPE, sources).model_dump()
    for key in MAY_CHANGE | NEVER_CHANGE:
        section = values
        for name in key.split("."):
            section = section[0] if isinstance(section, list) else section
            assert name in section, key
            section = section[name]


def test_complete_run_is_not_given_other_settings(run, capsys):
    start(run, saves=[SIZE])
    for allowed in (False, True):
        with pytest.raises(ConfigError, match="holds a complete run with other settings") as raised:
            start(run, overrides=["optimizer.lr=5e-4"], allow_changes=allowed)
        assert "optimizer.lr 0.001 -> 0.0005" in str(raised.value)
    assert capsys.readouterr().out == ""
    assert start(run) == at(SIZE)
    assert capsys.readouterr().out == ""
    # What is only looked at says that it has no effect, and is not recorded as if it had.
    assert start(run, overrides=["data.val=/new.tar"]) == at(SIZE)
    assert 'no effect (then -> now): data.val [] -> "/new.tar"' in capsys.readouterr().out
    assert not list(run.glob("recipe-*"))
    with pytest.raises(ConfigError, match=r"train.epochs 1.0 -> 2.0.*--allow_changes"):
        start(run, overrides=["train.epochs=2"])
    assert start(run, overrides=["train.epochs=2"], allow_changes=True) == at(SIZE)
    again = run.with_name("again")
    start(again, saves=[SIZE])
    with pytest.raises(ConfigError, match=r"complete run.*train.epochs 1.0 -> 0.5"):
        start(again, overrides=["train.epochs=0.5"], allow_changes=True)


def test_between_two_stages_the_order_of_samples_counts_too(run, capsys):
    """Nothing else compares it there: the next stage has an order of its own."""
    stages = ["stages=[{train: {epochs: 1}}]"]
    start(run, overrides=stages, saves=[8])
    assert start(run, overrides=[*stages, "train.seed=5"]) == at(8), "which is compared later on"
    between = run.with_name("between")
    start(between, overrides=stages, saves=[SIZE])
    with pytest.raises(ConfigError, match=r"train.seed 0 -> 5"):
        start(between, overrides=[*stages, "train.seed=5"])
    capsys.readouterr()
    assert start(between, overrides=[*stages, "data.val=/new.tar"]) == at(SIZE)
    assert capsys.readouterr().out == "", "the next stage is evaluated on it"


def test_a_run_that_begins_at_the_end_of_another_is_recorded(run):
    start(run, saves=[SIZE])
    begun = run.with_name("begun")
    assert start(begun, str(run)) == at(SIZE)
    assert (begun / "recipe.yaml").is_file() and (begun / "start.json").is_file()


def test_weights_that_would_not_be_read_are_refused_or_said(run, capsys):
    start(run, saves=[8])
    init = ["model.init=timm:x"]
    with pytest.raises(ConfigError, match=r'model.init "" -> "timm:x"'):
        start(run, overrides=init)
    with pytest.raises(ConfigError, match="model.init is 'timm:x', but the run in .* continues"):
        start(run, overrides=init, allow_changes=True)
    given = run.with_name("given")
    start(given, overrides=init, saves=[8])
    assert start(given, allow_changes=True) == at(8)  # the weights may be gone by now
    start(run.with_name("new"), str(run), overrides=init)
    assert "so that model.init timm:x is not read" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, content",
    [
        pytest.param("recipe.yaml", b"{not yaml", id="no YAML"),
        pytest.param("recipe.yaml", b"\xff\xfe\x00", id="no text"),
        pytest.param("recipe.yaml", b"optimizer: {speed: 3}", id="a key of another version"),
        pytest.param("ds_config.json", b"[1]", id="ds_config"),
    ],
)
def test_record_that_cannot_be_read_is_one_sentence(run, name, content, capsys):
    start(run, saves=[8])
    (run / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{run / name}, which .*can't be read ") as raised:
        start(run)
    assert "--allow_changes to continue without comparing" in str(raised.value)
    assert start(run, allow_changes=True) == at(8)
    assert "; the settings are not compared" in capsys.readouterr().out


def test_folder_of_an_earlier_version_without_records_continues(run, capsys):
    save(run, 8)
    assert start(run) == at(8)
    assert "recipe.yaml is missing" in capsys.readouterr().out


def test_recipe_of_the_checkpoint_counts_and_not_what_was_recorded_at_it(run):
    start(run, saves=[8])
    start(run, overrides=["optimizer.lr=5e-4"], allow_changes=True)  # ends before it has saved
    assert start(run) == at(8)
    recorded = load_recipe(str(run / "recipe-samples-000000000008.yaml"))
    assert dump_recipe(recorded) == dump_recipe(load_recipe(str(run / "recipe.yaml")))
