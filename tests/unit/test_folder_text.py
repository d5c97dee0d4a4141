"""Text towers out of folders of Hugging Face's equal transformers' own padded forward pass."""

import pickle

import pytest
import torch
import yaml
from small_recipe import SMALL_RECIPE
from text_folders import CAUSAL, KINDS, POSITIONS, WORDS, write_text_folder
from transformers import AutoModel, AutoTokenizer

from aclip.config.recipe_file import dump_recipe, load_recipe, recipe_of_values
from aclip.config.sections import TextTowerConfig
from aclip.config.text_folder import record_text_folder, text_changes
from aclip.data.synthetic import batch_of_mean_captions, synthetic_batch
from aclip.data.tokenizer import build_tokenizer
from aclip.errors import ConfigError
from aclip.method.tokens import Tokens
from aclip.models.student import build_student
from aclip.models.text import build_text_tower
from aclip.planning.measure_step import MODES, measure_step

CONTEXT = 10
CAPTIONS = ["a photo of a red circle", "", "dog", "two green square 1 2 3 4 5 6 7 8 9 0 a photo"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {kind: write_text_folder(root / kind, kind) for kind in KINDS}


def config_of(folder, **keys):
    return TextTowerConfig(name=str(folder), context_length=CONTEXT, **keys)


def plain_hidden(folder, ids, lengths):
    """transformers' own padded pass with an attention mask, in its eager attention: (B, L, W), and
    the model."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    mask = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
    extra = {}
    if model.config.model_type in ("roberta", "xlm-roberta"):
        # Counted from the padding token, which no caption of these holds.
        positions = model.config.pad_token_id + 1 + torch.arange(ids.shape[1])
        extra = {"position_ids": positions.expand(len(ids), -1)}
    return model(input_ids=ids, attention_mask=mask, **extra).last_hidden_state, model


def hand_feature(hidden, lengths, pooling):
    rows = []
    for row, length in zip(hidden, lengths.tolist(), strict=True):
        own = row[:length]
        rows.append({"end": own[-1], "cls": own[0], "mean": own.sum(0) / length}[pooling])
    return torch.stack(rows)


@pytest.mark.parametrize("pooling", ["own", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_captions_equal_the_padded_model(folders, kind, pooling):
    own = "end" if kind in CAUSAL else "cls"
    tower = build_text_tower(config_of(folders[kind], pooling=None if pooling == "own" else "mean"))
    tokens = build_tokenizer(config_of(folders[kind])).encode(CAPTIONS)
    # Ids behind a caption's end must not be read.
    behind = torch.arange(tokens.ids.shape[1]) >= tokens.lengths.unsqueeze(1)
    tokens = Tokens(tokens.ids.masked_fill(behind, 7), tokens.lengths)
    hidden, plain = plain_hidden(folders[kind], tokens.ids, tokens.lengths)
    expected = hand_feature(hidden, tokens.lengths, own if pooling == "own" else pooling)
    features = tower(tokens)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)

    weight = torch.randn_like(expected)
    (features * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    compared = 0
    for name, parameter in tower.transformer.named_parameters():
        theirs = gradients[name]
        assert parameter.grad is not None, name
        scale = theirs.abs().max()
        assert (parameter.grad - theirs).abs().max() <= 1e-4 * scale + 1e-5, name
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_recomputed_blocks_have_the_same_gradients(folders, kind):
    gradients = []
    for recompute in ("none", "blocks"):
        tower = build_text_tower(config_of(folders[kind], recompute=recompute)).train()
        tokens = build_tokenizer(config_of(folders[kind])).encode(CAPTIONS)
        layer = (tower.transformer.encoder.layer if kind == "bert" else tower.transformer.h)[0]
        calls = []
        (layer.mlp if kind == "gpt2" else layer.output).register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        tower(tokens).sin().sum().backward()
        assert len(calls) == (1 if recompute == "none" else 2)
        gradients.append({name: p.grad for name, p in tower.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_tokenizer_cuts_pads_and_ends_captions(folders, kind):
    tokenizer = build_tokenizer(config_of(folders[kind]))
    for each in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        tokens = each.encode([*CAPTIONS, "xyz dog"])
        rows = [
            row[:length].tolist() for row, length in zip(tokens.ids, tokens.lengths, strict=True)
        ]
        start = [WORDS.index("[CLS]")] if kind == "bert" else []
        word = [WORDS.index(name) for name in ["a", "photo", "of", "a", "red", "circle"]]
        long = [WORDS.index(name) for name in CAPTIONS[3].split()]
        end = WORDS.index("[SEP]")
        assert rows[0] == [*start, *word, end]
        assert rows[1] == [*start, end]
        assert rows[2] == [*start, WORDS.index("dog"), end]
        assert rows[3] == [*start, *long[: CONTEXT - len(start) - 1], end]
        assert rows[4] == [*start, WORDS.index("[UNK]"), WORDS.index("dog"), end]
        assert tokens.ids.shape == (5, 16) and tokens.ids.dtype == torch.int64
        assert not tokens.ids[2, 3:].any()
        assert len(each.encode([])) == 0


def test_weights_of_the_folder_or_random_ones_and_no_dropout(folders):
    theirs = AutoModel.from_pretrained(folders["bert"]).state_dict()
    own = build_text_tower(config_of(folders["bert"])).transformer.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    towers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        tower = build_text_tower(config_of(folders["bert"], pretrained=False))
        towers.append(tower.transformer.encoder.layer[0].output.dense.weight)
    assert torch.equal(towers[0], towers[1]) and not torch.equal(towers[0], towers[2])
    assert not torch.equal(towers[0], own["encoder.layer.0.output.dense.weight"])
    tower = build_text_tower(config_of(folders["bert"])).train()
    tokens = build_tokenizer(config_of(folders["bert"])).encode(CAPTIONS)
    assert torch.equal(tower(tokens), tower(tokens))


def test_rotary_frequencies_stay_in_fp32_in_a_bf16_tower(folders):
    tower = build_text_tower(config_of(folders["llama"]))
    table = tower.transformer.rotary_emb.inv_freq.clone()
    tower.to(torch.bfloat16)
    assert tower.transformer.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(tower.transformer.rotary_emb.inv_freq, table)
    tokens = build_tokenizer(config_of(folders["llama"])).encode(CAPTIONS)
    assert tower(tokens).dtype == torch.bfloat16


TINY = ["mask.policy=random", "teacher=null", "model.embed_dim=8"]


def recipe_of(folder, *overrides):
    text = f"model.text={{name: {folder}, context_length: {CONTEXT}}}"
    return load_recipe(SMALL_RECIPE, [*TINY, text, *overrides])


def test_plans_and_benchmarks_read_ids_of_the_models_own_vocabulary(folders):
    recipe = recipe_of(folders["gpt2"])
    ids = synthetic_batch(recipe, 8).tokens.ids
    assert 0 < ids.max() < 40
    with torch.device("meta"):
        student = build_student(recipe)
    assert student.text_projection.weight.shape == (8, 16)
    assert recipe_of_values(yaml.safe_load(dump_recipe(recipe)), "a dump") == recipe


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_plan_counts_the_tokens_that_are_there(folders, kind):
    caption, rows = 6, CONTEXT
    recipe = recipe_of(folders[kind])
    step = measure_step(recipe, batch_of_mean_captions(recipe, caption, rows), modes=MODES)
    # The models of text_folders.py: width 16, inner width 32, two layers; Llama has one head of
    # keys and values of two, and a third product in its MLP.
    keys, inner = (16, 2) if kind == "bert" else (8, 3)
    linears = 2 * caption * (16 * 16 + 2 * 16 * keys + 16 * 16 + inner * 16 * 32)
    layer = linears + 2 * (2 * rows * rows * 16)
    text = step.flops["text"]
    assert text.forward == pytest.approx(2 * layer, rel=0.01)
    assert text.backward == pytest.approx(2 * text.forward, rel=0.01)
    kept = {mode: encoding.kept for mode, encoding in step.encoding.items()}
    assert kept["blocks"] < kept["none"]


def test_what_was_recorded_tells_whether_the_folder_has_changed(tmp_path):
    folder = write_text_folder(tmp_path / "folder", "bert")
    record = tmp_path / "record"
    config = config_of(folder)
    assert list(text_changes(config, record)) == []
    (record).mkdir()
    (record / "vocab.txt").write_text("of an earlier run")
    record_text_folder(config, record)
    names = {path.name for path in record.iterdir()}
    assert names == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert list(text_changes(config, record)) == []
    again = config.model_copy(update={"name": str(record), "pretrained": False})
    assert build_tokenizer(again).encode(CAPTIONS).ids.tolist() == (
        build_tokenizer(config).encode(CAPTIONS).ids.tolist()
    )
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"dog"', '"cat"'))
    (change,) = text_changes(config, record)
    assert change.startswith("model.text.name ") and "->" in change


def test_all_positions_of_a_model_can_be_read(folders):
    for kind, most in (("bert", POSITIONS), ("roberta", POSITIONS - 1), ("gpt2", POSITIONS)):
        config = TextTowerConfig(name=str(folders[kind]), context_length=most)
        caption = "dog " * 50
        tokens = build_tokenizer(config).encode([caption])
        assert tokens.lengths.tolist() == [most]
        assert build_text_tower(config)(tokens).isfinite().all()
        with pytest.raises(ConfigError, match=f"reads {most} tokens at most"):
            build_text_tower(config.model_copy(update={"context_length": most + 1}))


def test_the_library_reads_a_caption_as_the_tokenizer_gives_it(folders):
    ids = AutoTokenizer.from_pretrained(folders["bert"])(CAPTIONS[0])["input_ids"]
    own = build_tokenizer(config_of(folders["bert"])).encode(CAPTIONS[:1])
    assert own.ids[0, : own.lengths[0]].tolist() == ids
