"""Batches of a run that keeps the teacher's scores: who is scored, read, and written where."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from shard_batches import BATCH, NUM_SHARDS, SHARD_SIZE, make_recipe, write_shards

from aclip.data.batch import join
from aclip.data.loader import build_train_loader
from aclip.data.stored_scores import DUE, MISSING, TOO_NEW, ScoreFiles, ScoreWriter
from aclip.errors import ConfigError, DataError

SIDE = 2  # teacher views of 16 pixels, patches of 8
NO_LOSS = {"simclr": 0, "byol": 0}


def recipe(workers=0, **teacher):
    return make_recipe(workers, teacher={"reuse": 2, **teacher}, loss=NO_LOSS)


def take(recipe, shards, ranks, files, count):
    """The first global batches. After the first epoch, of three steps, what they scored is written,
    as the trainer would."""
    loaders = [
        iter(build_train_loader(recipe, shards, rank, ranks, scores=files)) for rank in range(ranks)
    ]
    batches, writer = [], None
    for step in range(count):
        if step in (0, 3):
            files.create(0) if step == 0 else None
            files.let_read(step // 3)
            writer = ScoreWriter(files, 0, step // 3)
        batch = join([next(loader) for loader in loaders])
        places = batch.score_place.numpy()
        writer.write(places, np.stack([codes_of(place) for place in places]))
        batches.append(batch)
    for loader in loaders:
        loader.close()
    files.wait_for(10**6)  # what has run ahead, into an epoch that never begins, waits no longer
    return batches


def codes_of(place):
    return np.full((SIDE, SIDE), 1 + place % 250, dtype=np.uint8)


@pytest.fixture
def shards(write_tar, encode_image):
    return write_shards(write_tar, encode_image)


def test_second_epoch_reads_what_the_first_has_scored(shards, tmp_path):
    def files(name):
        return ScoreFiles(tmp_path / name, SIDE, NUM_SHARDS * SHARD_SIZE, "")

    batches = take(recipe(), shards, 1, files("one"), 7)
    number = {f"{s}/{s}-{i}": s * 7 + i for s in range(NUM_SHARDS) for i in range(SHARD_SIZE)}
    written = set()
    for batch in batches[:3]:
        assert batch.to_teach == [DUE] * BATCH and batch.stored_scores is None
        assert batch.teacher_view.shape == (BATCH, 3, 16, 16)
        # The whole image, so that the scores fit every box.
        assert not batch.teacher_box[:, :2].any()
        for key, place in zip(batch.keys, batch.score_place.tolist(), strict=True):
            assert place in (number[key], -1) and place not in written
            written |= {place} - {-1}
    assert len(written) > 30
    has_view = {
        key: view
        for batch in batches[:3]
        for key, view in zip(batch.keys, batch.teacher_view, strict=True)
    }
    again = set()
    for batch in batches[3:]:
        for index, key in enumerate(batch.keys):
            if number[key] in written:
                assert batch.to_teach[index] == "" and batch.score_place[index] == -1
                expected = torch.from_numpy(codes_of(number[key]))
                assert torch.equal(batch.stored_scores[index], expected)
                assert batch.teacher_view is None or not batch.teacher_view[index].any()
            else:
                assert batch.to_teach[index] in (MISSING, TOO_NEW)
                assert not batch.stored_scores[index].any()
                place = int(batch.score_place[index])
                assert place in (number[key], -1) and place not in again
                again |= {place} - {-1}
                if key in has_view:
                    assert torch.equal(batch.teacher_view[index], has_view[key])
    assert 0 < len(again) < 20
    for ranks, workers in ((2, 0), (1, 2)):
        other = take(recipe(workers), shards, ranks, files(f"{ranks}-{workers}"), 7)
        for one, two in zip(batches, other, strict=True):
            assert one.keys == two.keys
            assert [*map(bool, one.to_teach)] == [*map(bool, two.to_teach)]
            for name in ("teacher_view", "stored_scores", "score_place"):
                first, second = getattr(one, name), getattr(two, name)
                assert (first is None) == (second is None) or not first.any()
                assert first is None or torch.equal(first, second)


def test_parts_with_and_without_a_teacher_view_are_joined_with_zeros(shards, tmp_path):
    files = ScoreFiles(tmp_path / "scores", SIDE, NUM_SHARDS * SHARD_SIZE, "")
    first, second = take(recipe(), shards, 1, files, 1)[0].split(8)
    joined = join([first, replace(second, teacher_view=None, stored_scores=torch.ones(8, 2, 2))])
    assert torch.equal(joined.teacher_view[:8], first.teacher_view)
    assert joined.teacher_view.shape[0] == 16 and not joined.teacher_view[8:].any()
    assert not joined.stored_scores[:8].any() and joined.stored_scores[8:].all()


def test_data_of_less_than_a_batch_are_refused(shards):
    with pytest.raises(ConfigError, match="teacher.reuse is 2, but the data hold 14 samples, less"):
        build_train_loader(recipe(), shards[:2], 0, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_scores_that_can_not_be_read_are_data_that_may_come_back(shards, tmp_path, workers):
    """So that the run starts again by itself, see the exit statuses."""
    files = ScoreFiles(tmp_path / "scores", SIDE, NUM_SHARDS * SHARD_SIZE, "")
    loader = iter(build_train_loader(recipe(workers), shards, 0, 1, scores=files))
    for _ in range(3):
        next(loader)
    files.let_read(1)
    with pytest.raises(DataError, match="epoch-00000.scores can't be read .No such file"):
        next(loader)
    loader.close()
