"""SLIP's and MaskCLIP's parts: what is hidden, what is predicted, and what is not built."""

import math

import pytest
import torch
from small_recipe import SMALL_RECIPE
from torch import nn

from aclip.config.recipe_file import load_recipe
from aclip.data import samples
from aclip.data.images import views
from aclip.data.lanes.order import Place
from aclip.data.samples import SampleMaker
from aclip.data.shards.listing import Shard
from aclip.data.shards.tar import TarShard
from aclip.errors import ConfigError
from aclip.method.losses.distill import (
    Codewords,
    PatchDecoder,
    distill,
    normalised_patches,
    reconstruct,
)
from aclip.method.losses.mlm import TextDecoder, mask_tokens, mlm
from aclip.method.masks.policy import other_patches
from aclip.method.tokens import Tokens
from aclip.models.student import build_student

START, END = 49406, 49407


def tokens_of(*lengths, columns=None):
    """Captions of so many word pieces, numbered from 1."""
    ids = torch.zeros(len(lengths), columns or max(lengths) + 2, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, : length + 2] = torch.tensor([START, *range(1, length + 1), END])
    return Tokens(ids, torch.tensor(lengths) + 2)


def test_distill_of_two_patches_by_hand():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
    targets = torch.tensor([[[0.75, 0.25], [1.0, 0.0]]])
    # At temperature 2 the first patch's logits are (1, 0).
    denominator = math.log(math.e + 1)
    first = 0.75 * (denominator - 1) + 0.25 * denominator
    expected = (first + math.log(2)) / 2
    assert distill(logits, targets, 2.0).tolist() == pytest.approx([expected])


def test_reconstruct_is_each_samples_mean_square():
    predictions = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])
    targets = torch.tensor([[[1.0, 4.0]], [[3.0, 4.0]]])
    assert reconstruct(predictions, targets).tolist() == [2.0, 12.5]


def test_mlm_weighs_every_masked_token_of_a_caption_equally():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(3)]])
    labels, rows = torch.tensor([0, 0, 0]), torch.tensor([0, 2, 2])
    loss = mlm(logits, labels, rows, torch.tensor([1.0, 0.5, 0.5]), 3)
    # -log 1/2; no masked token; the mean of -log 3/4 and -log 1/4.
    expected = [math.log(2), 0.0, (math.log(4 / 3) + math.log(4)) / 2]
    assert loss.tolist() == pytest.approx(expected)


def test_hidden_tokens_are_the_share_of_the_caption_and_never_its_ends():
    tokens = tokens_of(1, 3, 10, 20)
    noise = torch.rand(4, 30, generator=torch.Generator().manual_seed(0))
    masked = mask_tokens(tokens, noise, 0.2)
    assert masked.sum(1).tolist() == [1, 1, 2, 4]
    ids = tokens.ids
    assert not masked[(ids == START) | (ids == END) | (ids == 0)].any()
    row = masked[3].nonzero().squeeze(1) - 1
    assert sorted(row.tolist()) == sorted(noise[3, :20].argsort()[:4].tolist())


def test_hidden_tokens_do_not_depend_on_the_other_captions():
    noise = torch.rand(1, 30, generator=torch.Generator().manual_seed(1))
    short = mask_tokens(tokens_of(10), noise, 0.3)
    padded = mask_tokens(tokens_of(10, columns=22), noise, 0.3)
    assert torch.equal(padded[:, :12], short) and not padded[:, 12:].any()


def test_caption_without_word_pieces_hides_nothing():
    assert not mask_tokens(tokens_of(0, 4), torch.rand(2, 8), 0.5)[0].any()


def test_other_patches_are_the_complement_in_order():
    keep = torch.tensor([[0, 3, 4], [1, 2, 5]])
    assert other_patches(keep, 6).tolist() == [[1, 2, 5], [0, 3, 4]]


def test_normalised_patches_have_mean_zero_variance_one_and_patch_order():
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    patches = normalised_patches(pixels, 4)
    assert patches.shape == (2, 4, 48)
    one = pixels[1, :, 4:8, 0:4]  # row 1, column 0
    expected = (one - one.mean()) / (one.var(correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(patches[1, 2], expected.flatten())


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return PatchDecoder(16, 9, 1, nn.Identity()).eval()


def test_patch_decoder_reads_positions_and_not_the_order_of_the_tokens(decoder):
    tokens, keep = torch.randn(2, 5, 16), torch.tensor([[0, 2, 4, 8]]).repeat(2, 1)
    masked = torch.tensor([[1, 3, 5, 6, 7]]).repeat(2, 1)
    predictions = decoder(tokens, keep, masked)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = torch.cat([tokens[:, :1], tokens[:, 1:][:, order]], dim=1)
    torch.testing.assert_close(decoder(shuffled, keep[:, order], masked), predictions)
    torch.testing.assert_close(decoder(tokens, keep, masked.flip(1)), predictions.flip(1))
    moved = decoder(tokens, torch.tensor([[0, 2, 4, 7]]).repeat(2, 1), masked)
    assert (moved - predictions).abs().max() > 1e-4


def test_patch_decoder_tells_masked_patches_apart(decoder):
    predictions = decoder(torch.randn(1, 2, 16), torch.tensor([[0]]), torch.tensor([[1, 2]]))
    assert (predictions[0, 0] - predictions[0, 1]).abs().max() > 1e-4


def test_text_decoder_reads_later_tokens_but_no_padding():
    torch.manual_seed(0)
    decoder = TextDecoder(16, 1, 50).eval()
    tokens, ids = torch.randn(1, 6, 16), torch.tensor([1])
    is_real = torch.tensor([[True] * 4 + [False] * 2])
    logits = decoder(tokens, is_real, ids)
    assert logits.shape == (1, 50)
    later, padding = tokens.clone(), tokens.clone()
    later[0, 3] *= -1
    padding[0, 4:] *= -1
    assert (decoder(later, is_real, ids) - logits).abs().max() > 1e-4
    torch.testing.assert_close(decoder(padding, is_real, ids), logits)


def test_codewords_are_cosine_similarities():
    codewords = Codewords(2, 3)
    codewords.weight.data = torch.tensor([[2.0, 0], [0, 0.1], [1, 1]])
    similarities = codewords(torch.tensor([[3.0, 0.0]]))
    assert similarities.tolist()[0] == pytest.approx([1, 0, 2**-0.5])


SMALL = [
    "model.image.resolution=32",
    "model.image.kwargs={patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}",
    "model.text={width: 16, heads: 2, layers: 1, context_length: 16}",
    "teacher=null",
    "mask.policy=none",
]


@pytest.mark.parametrize(
    "overrides, names",
    [
        ([], set()),
        (["loss.mlm=0.1"], {"mlm_decoder", "mlm_mask_token"}),
        (["loss.distill=1", "distill.targets=pixels"], {"distill_decoder"}),
        (["loss.simclr=1", "views.ssl=2", "views.student=1"], {"simclr_head"}),
    ],
)
def test_part_without_weight_builds_no_module(overrides, names):
    always = {"image", "text", "image_projection", "text_projection", "logit_scale"}
    student = build_student(load_recipe(SMALL_RECIPE, [*SMALL, *overrides]))
    assert {name.split(".")[0] for name, _ in student.named_parameters()} == always | names


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["loss.simclr=1", "views.student=1"], ["loss.simclr", "views.ssl"]),
        (["views.ssl=2"], ["views.ssl", "loss.simclr"]),
        (["loss.distill=1", "teacher=null", "mask.policy=none"], ["teacher", "loss.distill"]),
        (
            ["loss.distill=1", "teacher.resolution=32", "mask.policy=none"],
            ["teacher.resolution", "32", "64"],
        ),
        (
            ["loss.distill=1", "distill.targets=pixels", "mask.policy=none"],
            ["teacher.resolution", "set teacher=null"],
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_in_one_sentence(overrides, words):
    with pytest.raises(ConfigError) as caught:
        load_recipe(SMALL_RECIPE, overrides)
    assert all(word in str(caught.value) for word in words)


SLIP = ["teacher=null", "mask.policy=none", "views.student=1", "views.ssl=2", "loss.simclr=1"]
CROPS = [  # recipe's overrides, crops of one image
    pytest.param(["teacher=null", "mask.policy=none", "views.student=1"], 1, id="clip"),
    pytest.param(["teacher=null", "mask.policy=random"], 2, id="random mask"),
    pytest.param(SLIP, 3, id="slip"),
    pytest.param(["mask.policy=none", "views.student=1", "loss.distill=1"], 1, id="maskclip"),
    pytest.param(["loss.byol=2"], 3, id="aclip"),
]


@pytest.mark.parametrize("overrides, num_crops", CROPS)
def test_sample_is_decoded_once_and_cut_for_the_parts_that_read_it(
    monkeypatch, write_tar, encode_image, overrides, num_crops
):
    calls = {"crop": 0, "decode_image": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    counted_crop = counted("crop", views.crop)
    for module in (samples, views):
        monkeypatch.setattr(module, "crop", counted_crop)
    monkeypatch.setattr(samples, "decode_image", counted("decode_image", samples.decode_image))
    shard = write_tar("0.tar", [("0.jpg", encode_image(90, 70)), ("0.txt", b"a thing")])
    (raw,) = TarShard(shard).walk()
    sample = SampleMaker(load_recipe(SMALL_RECIPE, overrides), [Shard("0.tar", 1)]).make(
        0, Place(0, 0, 0, 0), raw
    )
    assert calls == {"crop": num_crops, "decode_image": 1}
    assert sample.caption == "a thing"
