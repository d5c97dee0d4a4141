"""What a sample of a recipe holds: views, boxes and noise, drawn in an order that stays."""

import numpy as np
import pytest
import torch
from small_recipe import SMALL_RECIPE

from aclip.config.recipe_file import load_recipe
from aclip.data.batch import collate, join
from aclip.data.images.views import draw_boxes
from aclip.data.lanes.order import Place, sample_rng
from aclip.data.samples import SampleMaker
from aclip.data.shards.listing import Shard
from aclip.data.shards.tar import TarShard
from aclip.data.tokenizer import Tokenizer

HALF_TEACHER = ["model.image.resolution=32", "teacher.resolution=16"]
NO_TEACHER = ["model.image.resolution=32", "teacher=null", "mask.policy=none"]


@pytest.fixture
def make_sample(write_tar, encode_image):
    def make(overrides, text=b"a thing", epoch=0):
        shard = write_tar("0.tar", [("0.jpg", encode_image(50, 40)), ("0.txt", text)])
        (raw,) = TarShard(shard).walk()
        maker = SampleMaker(load_recipe(SMALL_RECIPE, overrides), [Shard("0.tar", 1)])
        return maker.make(0, Place(0, 0, epoch, 0), raw)

    return make


def test_views_have_the_asked_number_and_resolution(make_sample):
    sample = make_sample(HALF_TEACHER)
    assert sample.student_views.shape == (2, 3, 32, 32) and sample.student_views.dtype == np.uint8
    assert sample.teacher_view.shape == (3, 16, 16) and sample.teacher_view.dtype == np.uint8
    assert sample.student_boxes.shape == (2, 4) and sample.student_boxes.dtype == np.int32
    assert sample.teacher_box.shape == (4,) and sample.teacher_box.dtype == np.int32
    assert not np.array_equal(*sample.student_boxes)


def test_a_recipe_without_a_teacher_gets_the_same_student_boxes_and_later_draws(make_sample):
    with_teacher, without = make_sample(HALF_TEACHER), make_sample(NO_TEACHER)
    assert without.teacher_view is None and without.teacher_box is None
    np.testing.assert_array_equal(with_teacher.student_boxes, without.student_boxes)
    np.testing.assert_array_equal(with_teacher.augment_params, without.augment_params)


def test_noise_is_drawn_for_the_policy_and_the_terms_that_read_it(make_sample):
    assert make_sample(HALF_TEACHER).mask_noise is None
    assert make_sample(HALF_TEACHER).term_noise == {}
    sample = make_sample(
        [
            *NO_TEACHER,
            "mask.policy=random",
            "loss.mlm=1",
            "loss.distill=1",
            "distill.targets=pixels",
        ]
    )
    assert sample.mask_noise.shape == (2, 2, 2)  # of 4 x 4 patches, in blocks of 2 x 2
    for reads_noise in ("mask.warmup=0.1", "mask.temperature=1"):
        noise = make_sample([*HALF_TEACHER, reads_noise]).mask_noise
        # Drawn where that of a random mask is, so that the same place gives the same noise.
        np.testing.assert_array_equal(noise, sample.mask_noise)
    shapes = {name: noise.shape for name, noise in sample.term_noise.items()}
    assert shapes == {"distill": (1, 4, 4), "mlm": (32,)}
    # A term's noise does not depend on the terms behind it.
    alone = make_sample(
        [*NO_TEACHER, "mask.policy=random", "loss.distill=1", "distill.targets=pixels"]
    )
    np.testing.assert_array_equal(alone.term_noise["distill"], sample.term_noise["distill"])


def test_of_several_lines_one_is_drawn_an_epoch_and_a_single_one_draws_nothing(make_sample):
    five = b"one\ntwo\n\nthree\nfour\nfive\n"
    drawn = {make_sample(NO_TEACHER, five, epoch).caption for epoch in range(40)}
    assert drawn == {"one", "two", "three", "four", "five"}
    alone, ended = make_sample(NO_TEACHER, b"a thing"), make_sample(NO_TEACHER, b"a thing\n\n")
    assert ended.caption == alone.caption == "a thing"
    # What comes after the caption's draw is as it was when a text was never split.
    rng = sample_rng(load_recipe(SMALL_RECIPE, NO_TEACHER).train.seed, 0, 0, 0, 0)
    rng.integers(1)
    boxes, _ = draw_boxes(rng, 40, 50, 2, load_recipe(SMALL_RECIPE, NO_TEACHER).views.scale)
    np.testing.assert_array_equal(alone.student_boxes, boxes)


def test_several_captions_of_an_image_are_its_own_and_change_no_other_draw(make_sample):
    five, three = b"one\ntwo\nthree\nfour\nfive\n", [*NO_TEACHER, "data.captions_per_image=3"]
    three += ["mask.policy=random", "loss.distill=1", "distill.targets=pixels"]
    for epoch in range(5):
        alone = make_sample([key for key in three if "captions" not in key], five, epoch)
        sample, again = (make_sample(three, five, epoch) for _ in range(2))
        assert alone.others == () and sample.others == again.others
        drawn = {sample.caption, *sample.others}
        assert len(drawn) == 3 and drawn < {"one", "two", "three", "four", "five"}
        assert sample.caption == alone.caption
        for name in ("student_boxes", "augment_params", "mask_noise"):
            np.testing.assert_array_equal(getattr(sample, name), getattr(alone, name))
        np.testing.assert_array_equal(sample.term_noise["distill"], alone.term_noise["distill"])


def test_a_batch_of_several_captions_holds_them_by_image(make_sample):
    texts = (b"one\ntwo\nthree", b"alone", b"alone\nalone", b"a red ring\ntwo stars")
    samples = [make_sample([*NO_TEACHER, "data.captions_per_image=3"], text) for text in texts]
    batch = collate(samples, Tokenizer(16), np.zeros((1, 3), dtype=np.int64), {})
    assert batch.tokens.num_captions.tolist() == [3, 1, 1, 2] and len(batch.tokens) == 4
    rows = [caption or "" for sample in samples for caption in (sample.caption, *sample.others)]
    assert rows[3:9] == ["alone", "", "", "alone", "", ""] and rows.count("") == 5
    assert torch.equal(batch.tokens.ids, Tokenizer(16).encode(rows).ids)
    assert batch.captions == [sample.caption for sample in samples]


def test_a_batch_counts_the_samples_whose_text_was_guessed(make_sample):
    samples = [make_sample(NO_TEACHER, text) for text in (b"plain", b"caf\xe9", b"na\xefve")]
    assert [sample.caption for sample in samples] == ["plain", "café", "naïve"]
    batch = collate(samples, Tokenizer(16), np.zeros((1, 3), dtype=np.int64), {})
    assert batch.noted == {"decoded_as_cp1252": 2}
    assert [part.noted for part in batch.split(2)] == [{"decoded_as_cp1252": 2}, {}]
    assert join([batch, batch]).noted == {"decoded_as_cp1252": 4}


def test_views_turn_into_tensors_without_a_warning(make_sample, recwarn):
    sample = make_sample(HALF_TEACHER)
    torch.from_numpy(sample.teacher_view), torch.from_numpy(sample.student_views)
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]
