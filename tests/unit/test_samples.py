"""What a sample of a recipe holds: views, boxes and noise, drawn in an order that stays."""

import numpy as np
import pytest
import torch

from aclip.config.recipe_file import load_recipe
from aclip.data.samples import SampleMaker
from aclip.data.shards.listing import Shard
from aclip.data.shards.tar import TarShard

HALF_TEACHER = ["model.image.resolution=32", "teacher.resolution=16"]
NO_TEACHER = ["model.image.resolution=32", "teacher=null", "mask.policy=none"]


@pytest.fixture
def make_sample(write_tar, encode_image):
    def make(overrides):
        shard = write_tar("0.tar", [("0.jpg", encode_image(50, 40)), ("0.txt", b"a thing")])
        (raw,) = TarShard(shard).walk()
        maker = SampleMaker(load_recipe("demo", overrides), [Shard("0.tar", 1)])
        return maker.make(0, 0, raw, 0, 0)

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
    shapes = {name: noise.shape for name, noise in sample.term_noise.items()}
    assert shapes == {"distill": (1, 4, 4), "mlm": (32,)}
    # A term's noise does not depend on the terms behind it.
    alone = make_sample(
        [*NO_TEACHER, "mask.policy=random", "loss.distill=1", "distill.targets=pixels"]
    )
    np.testing.assert_array_equal(alone.term_noise["distill"], sample.term_noise["distill"])


def test_views_turn_into_tensors_without_a_warning(make_sample, recwarn):
    sample = make_sample(HALF_TEACHER)
    torch.from_numpy(sample.teacher_view), torch.from_numpy(sample.student_views)
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]
