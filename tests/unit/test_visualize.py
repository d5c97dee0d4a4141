"""The picture of kept patches: what lies where, captions on the page, files written whole."""

import argparse
import warnings

import numpy as np
import pytest
from PIL import Image

from aclip.errors import ConfigError, NotWritten
from aclip.files import write_whole
from aclip.reports import mask_pictures
from aclip.reports.mask_pictures import draw_figure, encode, picture_columns
from aclip.reports.visualize import visualize

R, G = 96, 4
CELL = 192


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def inputs(num_samples=1, num_views=2, captions=None):
    """Red teacher views, and green student views whose first two patches are kept."""
    teacher = np.zeros((num_samples, 3, 48, 48), dtype=np.uint8)
    teacher[:, 0] = 255
    student = np.zeros((num_samples, num_views, 3, R, R), dtype=np.uint8)
    student[:, :, 1] = 255
    return {
        "images": teacher,
        "scores": np.zeros((num_samples, 3, 3), dtype=np.float32),
        "student_views": student,
        "keep_ids": np.tile(np.array([0, 1]), (num_samples, num_views, 1)),
        "grid": G,
        "captions": captions or ["a caption"] * num_samples,
    }


def kept_patches_figure(captions, **arrays):
    return draw_figure(picture_columns(**arrays), captions)


def cell_at(figure, column, row=0):
    height = CELL + 2 * mask_pictures.GAP + mask_pictures.CAPTION_LINES * mask_pictures.LINE_HEIGHT
    top = mask_pictures.MARGIN + mask_pictures.TITLE_HEIGHT + row * height
    left = mask_pictures.MARGIN + column * (CELL + mask_pictures.GAP)
    return figure[top : top + CELL, left : left + CELL]


def is_white(pixels):
    return (pixels == 255).all()


def test_columns_are_image_attention_and_each_student_view():
    figure = kept_patches_figure(**inputs(num_samples=2))
    assert figure.dtype == np.uint8
    assert figure.shape[1] == 2 * mask_pictures.MARGIN + 4 * CELL + 3 * mask_pictures.GAP
    for row in range(2):
        assert (cell_at(figure, 0, row) == (255, 0, 0)).all()
        for column in (2, 3):
            kept = cell_at(figure, column, row)[: CELL // G, : CELL // 2]
            assert (kept == (0, 255, 0)).all()


def test_dropped_patches_are_grey_and_kept_ones_untouched():
    data = inputs()
    data["keep_ids"] = np.array([[[5, 15], [0, 1]]])
    view = cell_at(kept_patches_figure(**data), 2)
    patch = CELL // G
    for number in range(G * G):
        row, column = divmod(number, G)
        shown = view[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        if number in (5, 15):
            assert (shown == (0, 255, 0)).all()
        else:
            assert (shown.min(-1) == shown.max(-1)).all()
            assert shown.min() > 180


def test_attention_is_brightest_at_the_highest_score():
    data = inputs()
    data["scores"] = np.array([[[0, 0, 0], [0, 0, 0], [0, 0, 1.0]]])
    heat = cell_at(kept_patches_figure(**data), 1).astype(int).sum(-1)
    third = CELL // 3
    corners = heat[:third, :third].mean(), heat[-third:, -third:].mean()
    assert corners[1] > 2 * corners[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0])
def test_scores_that_are_not_finite_or_all_equal_can_be_drawn(value):
    data = inputs()
    data["scores"] = np.full((1, 3, 3), value)
    kept_patches_figure(**data)


def test_without_a_teacher_there_is_no_attention_column():
    data = inputs(num_views=1) | {"scores": None}
    figure = kept_patches_figure(**data)
    assert figure.shape[1] == 2 * mask_pictures.MARGIN + 2 * CELL + mask_pictures.GAP
    assert (cell_at(figure, 1)[: CELL // G, : CELL // 2] == (0, 255, 0)).all()


def test_at_most_eight_samples_are_drawn():
    assert (
        kept_patches_figure(**inputs(num_samples=11)).shape
        == kept_patches_figure(**inputs(num_samples=8)).shape
    )


@pytest.mark.parametrize(
    "caption",
    [
        pytest.param("word " * 500, id="long"),
        pytest.param("W" * 5000, id="one long word"),
        pytest.param("猫がいる " * 50 + "हिन्दी \U0001fae8", id="scripts that no font has"),
        pytest.param("مرحبا שלום \u202e turned around " * 20, id="right to left"),
        pytest.param("costs $5, $x_{1}$, 100 % \\frac a_b^c {", id="what looks like a formula"),
        pytest.param(
            "line\nline\r\n\ttab\x00\x07\u2028end \ud800\ufffe", id="controls, surrogates"
        ),
        pytest.param("e\u0301" * 300, id="combining"),
    ],
)
def test_any_caption_stays_on_the_page_without_warnings(caption):
    figure = kept_patches_figure(**inputs(captions=[caption]))
    margin = mask_pictures.MARGIN
    below = margin + mask_pictures.TITLE_HEIGHT + CELL + 2
    assert not is_white(figure[below:])
    assert is_white(figure[below:, : margin - 2])
    assert is_white(figure[below:, -margin + 2 :])
    assert is_white(figure[-3:])


def test_an_empty_caption_leaves_its_space_empty():
    figure = kept_patches_figure(**inputs(captions=[" \n "]))
    assert is_white(figure[mask_pictures.MARGIN + mask_pictures.TITLE_HEIGHT + CELL + 2 :])


def test_a_png_is_written_whole_into_a_new_folder_and_replaces_the_old(tmp_path):
    path = tmp_path / "pictures" / "kept.png"
    for value in (10, 200):
        write_whole(path, encode(np.full((5, 7, 3), value, dtype=np.uint8)))
    assert [entry.name for entry in path.parent.iterdir()] == ["kept.png"]
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), np.full((5, 7, 3), 200))


def test_a_failed_write_keeps_the_old_picture_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "kept.png"
    write_whole(path, encode(np.zeros((5, 7, 3), dtype=np.uint8)))
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(NotWritten, match="disk full"):
        write_whole(path, encode(np.ones((5, 7, 3), dtype=np.uint8)))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_images_that_are_not_there_are_named_before_the_weights_are_read(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("no weights here")
    for images in (["nope.jpg"], [str(tmp_path / "nope.tar")]):
        arguments = argparse.Namespace(
            checkpoint=str(checkpoint), images=images, out=str(tmp_path / "out")
        )
        with pytest.raises(ConfigError, match="IMAGES is .*nope"):
            visualize(arguments)
