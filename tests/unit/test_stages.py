"""Stages of a recipe: what each of them trains, what is refused, and where each lies in the run."""

import pytest
import torch
from small_recipe import SMALL_RECIPE
from timm.layers import resample_abs_pos_embed

from aclip.config.recipe_file import dump_recipe, load_recipe, recipe_of_values, stages_of
from aclip.errors import ConfigError
from aclip.planning.stage_shares import stage_shares
from aclip.training.begin_stage import check_stages
from aclip.training.stage import Stage, StagePlace, stage_places, stage_to_begin
from aclip.weights.initial_weights import resize_image_positions

TUNE = "{mask: {policy: none}, teacher: null, train: {epochs: 0.5}}"


def stages(*overrides, name=SMALL_RECIPE):
    return stages_of(load_recipe(name, list(overrides)))


def test_a_recipe_is_its_own_first_stage():
    (alone,) = stages()
    first, second = stages(f"stages=[{TUNE}]")
    assert first.mask.policy == "attentive" and first.train.epochs == alone.train.epochs
    assert second.mask.policy == "none" and second.teacher is None
    assert second.train.epochs == 0.5
    assert second.mask.keep_ratio == first.mask.keep_ratio, "what is not named goes on"
    assert (first.train.seed, second.train.seed) == (0, 1), "another order of samples"
    assert second.stages == []


def test_each_stage_changes_the_one_before_it():
    small = "{model: {image: {resolution: 32}}, mask: {block_size: 1}, train: {samples: 640}}"
    longer = "{optimizer: {lr: 1e-5}, train: {epochs: 2, seed: 9}}"
    first, second, third = stages(f"stages=[{small}, {longer}]")
    assert [each.model.image.resolution for each in (first, second, third)] == [64, 32, 32]
    assert [each.num_steps(3200) for each in (second, third)] == [20, 200]
    assert third.train.samples is None and third.train.seed == 9
    assert [each.optimizer.lr for each in (first, second, third)] == [1e-3, 1e-3, 1e-5]


def test_what_a_run_records_of_a_stage_reads_back_as_that_stage_and_the_rest(tmp_path):
    every = stages(f"stages=[{TUNE}, {{train: {{epochs: 1}}}}]")
    for number, stage in enumerate(every):
        path = tmp_path / f"{number}.yaml"
        path.write_text(dump_recipe(stage))
        assert stages_of(load_recipe(str(path))) == every[number:]


@pytest.mark.parametrize("key, value", [("text.threshold", "1e-7"), ("text.word_counts", "a.json")])
def test_what_frequency_reads_ends_with_it(key, value):
    """So that the overrides that clipf_vitb16 names hold for its stage of short captions alone."""
    first, second = stages(f"{key}={value}", name="clipf_vitb16")
    name = key.partition(".")[2]
    assert getattr(first.text, name) == {"1e-7": 1e-7}.get(value, value)
    assert (second.text.threshold, second.text.word_counts) == (1e-6, "")


def test_probabilities_of_captions_are_given_whole():
    given = "data.captions={long.txt: 0.7, txt: 0.3}"
    _, second = stages(given, "stages=[{data: {captions: {txt: 1}}, train: {epochs: 1}}]")
    assert second.data.captions == {"txt": 1}


def test_a_later_stage_reads_no_initial_weights():
    first, second = stages("model.init=weights.pt", f"stages=[{TUNE}]")
    assert (first.model.init, second.model.init) == ("weights.pt", "")


def test_one_value_of_a_stage_can_be_given_on_the_command_line():
    _, second = stages(f"stages=[{TUNE}]", "stages.0.train.epochs=3", "stages.0.optimizer.lr=2e-5")
    assert (second.train.epochs, second.optimizer.lr) == (3, 2e-5)
    _, second = stages(f"stages=[{TUNE}]", "stages.0.train.samples=640")
    assert second.num_steps(1000) * second.train.global_batch_size == 640
    first, second = stages(
        "train.samples=640",
        "train.epochs=2",
        f"stages=[{TUNE}]",
        "stages.0.train.samples=640",
        "stages.0.train.epochs=3",
    )
    assert [each.num_steps(640) * each.train.global_batch_size for each in (first, second)] == [
        1280,
        1920,
    ]
    for override, words in (
        ("stages.1.train.epochs=3", "has 1 items, which count from 0"),
        ("stages.x.train.epochs=3", "has 1 items, which count from 0"),
        ("stages.0=3", "a list is given whole"),
    ):
        with pytest.raises(ConfigError, match=words):
            stages(f"stages=[{TUNE}]", override)


@pytest.mark.parametrize(
    "stage, words",
    [
        ("{mask: {policy: none}, teacher: null}", "does not say how long it is"),
        ("{train: {epochs: 1}, mask: {polcy: none}}", "mask.polcy is not a key .*mask.policy"),
        ("{train: {epochs: 1}, mask: {policy: none}}", "teacher.resolution is 64, but neither"),
        ("{train: {epochs: -1}}", "train.epochs is -1"),
        ("{train: {epochs: 1, samples: 64}}", "train.epochs 1 and train.samples 64, two lengths"),
        ("{train: 5}", "does not say how long it is"),
        ("{train: {epochs: 1}, model: null}", "model is None, but input should be"),
        ("{train: {epochs: 1}, model: {text: 3}}", "model.text is 3, but input should be"),
        ("{train: {epochs: 1}, model: {text: {name: /a}}}", "model.text.name from '' to '/a'"),
        ("{train: {epochs: 1}, optimizer: null}", "optimizer is None, but input should be"),
        ("{train: {epochs: 1}, text: 5}", "text is 5, but input should be"),
        (
            "{train: {epochs: 1, wandb: p}}",
            "train.wandb from '' to 'p', but it holds for the whole",
        ),
        (
            "{train: {epochs: 1, hang_timeout: 9}}",
            "train.hang_timeout from 600.0 to 9, but it holds",
        ),
        ("{train: {epochs: 1}, stages: []}", "gives stages, but it goes on with the weights"),
        ("{train: {epochs: 1}, model: {init: a.pt}}", "gives model.init, but it goes on"),
        ("{train: {epochs: 1}, model: {embed_dim: 8}}", "model.embed_dim from 96 to 8"),
        ("{train: {epochs: 1}, model: {text: {context_length: 8}}}", "context_length from 32 to 8"),
    ],
)
def test_a_wrong_stage_is_refused_by_its_number(stage, words):
    with pytest.raises(ConfigError, match=f"stage 3 of .*small.yaml: .*{words}"):
        stages(f"stages=[{{train: {{epochs: 1}}}}, {stage}]")


@pytest.mark.parametrize(
    "stage, words",
    [
        ("teacher: {resolution: 33}", "teacher.resolution is 33"),
        ("mask: {block_size: 3}", "mask.block_size is 3"),
        ("loss: {byol: 2, byol_widths: [128, 64]}", "byol_projector.* in the stage before and"),
        ("model: {image: {resolution: 32}}, teacher: {resolution: 32}", ""),
    ],
)
def test_a_stage_whose_towers_do_not_fit_is_refused_before_the_first(stage, words):
    recipes = stages("loss.byol=2", f"stages=[{{{stage}, train: {{epochs: 1}}}}]")
    places = stage_places(recipes, [3200, 3200], 1, {"samples": 0, "steps": 0})
    found = [
        Stage(*each) for each in zip(recipes, [None] * 2, [[]] * 2, [[]] * 2, places, strict=True)
    ]
    if not words:
        check_stages(found)
        return
    with pytest.raises(ConfigError, match=f"stage 2 of the recipe: {words}"):
        check_stages(found)


def test_stages_are_a_list_of_sections():
    with pytest.raises(ConfigError, match="stages"):
        recipe_of_values({"stages": ["mask"]}, "recipe.yaml")


def test_places_add_up_to_the_run():
    recipes = stages(
        "train.global_batch_size=10",
        "train.epochs=2",
        "stages=[{train: {epochs: 1, global_batch_size: 20}}, {train: {samples: 60}}]",
    )
    begun = {"samples": 0, "steps": 0}
    places = stage_places(recipes, [100, 100, 50], 1, begun)
    assert places == [
        StagePlace(1, samples=0, steps=0, rest_samples=160, rest_steps=8),
        StagePlace(2, samples=200, steps=20, rest_samples=60, rest_steps=3),
        StagePlace(3, samples=300, steps=25, rest_samples=0, rest_steps=0),
    ]
    lengths = [(200, 20), (100, 5), (60, 3)]
    for place, length in zip(places, lengths, strict=True):
        assert place.run_length(*length) == (360, 28)
    # A start in the second stage finds the same.
    assert stage_places(recipes[1:], [100, 50], 2, {"samples": 200, "steps": 20}) == places[1:]
    shares = [share for _, share in stage_shares(recipes[0], num_samples=100)]
    assert shares == pytest.approx([200 / 360, 100 / 360, 60 / 360])
    sized = [stage.train.global_batch_size for stage, _ in stage_shares(recipes[0], 8)]
    assert sized == [8, 8, 8]


def test_a_checkpoint_at_the_end_of_a_stage_begins_the_next():
    of_first = {"samples": 200, "step": 20}  # as older versions write it
    of_second = {"samples": 280, "step": 4, "stage": {"number": 2, "samples": 200, "steps": 20}}
    assert stage_to_begin(of_first, is_done=False, num_stages=2) == {
        "stage": 1,
        "begun": {"samples": 0, "steps": 0},
        "is_complete": False,
    }
    assert stage_to_begin(of_first, is_done=True, num_stages=2) == {
        "stage": 2,
        "begun": {"samples": 200, "steps": 20},
        "begins_stage": True,
    }
    assert stage_to_begin(of_first, is_done=True, num_stages=1)["is_complete"]
    assert stage_to_begin(of_second, is_done=True, num_stages=3)["begun"] == {
        "samples": 280,
        "steps": 24,
    }


def test_positions_are_resized_as_timm_does():
    positions = torch.randn(1, 1 + 16, 8, generator=torch.Generator().manual_seed(0))
    resized = resize_image_positions(positions, torch.Size((1, 1 + 49, 8)), num_prefix=1)
    torch.testing.assert_close(resized, resample_abs_pos_embed(positions, [7, 7]))
    assert resize_image_positions(positions, torch.Size((1, 50, 6)), num_prefix=1) is None
