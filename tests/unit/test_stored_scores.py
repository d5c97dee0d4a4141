"""Kept scores on disk: what a record counts for, and what becomes of a damaged file."""

import errno
import os
import pickle
import threading
import time
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest

from aclip.data import stored_scores
from aclip.data.lanes.order import Place
from aclip.data.shards.listing import Shard
from aclip.data.stored_scores import (
    DAMAGED,
    DUE,
    HEADER_BYTES,
    MISSING,
    TOO_NEW,
    ScoreFiles,
    ScoreReader,
    ScoreWriter,
)
from aclip.errors import DataError, NotWritten
from aclip.method.teaching import Teaching

SIDE = 2
RECORD = SIDE * SIDE + 4 + 4
SHARDS = [Shard("a.tar", 6), Shard("b.tar", 4)]
# Epochs of two steps: 0 and 1 are warm-up, 2 is scored, 3 and 4 read, 5 is scored.
TEACHING = Teaching(num_samples=10, batch_size=5, num_steps=12, reuse=3, warmup=4 / 12)


@pytest.fixture
def files(tmp_path):
    files = ScoreFiles(tmp_path / "scores", SIDE, 10, "these data")
    files.let_read()
    return files


def codes(first):
    return np.arange(first, first + 4, dtype=np.uint8).reshape(2, 2)


def write(files, epoch, samples):
    writer = ScoreWriter(files, 2, epoch)
    writer.write(np.array(samples), np.stack([codes(10 + sample) for sample in samples]))
    writer.sync()
    writer.close()


def find(files, step, sample, is_first=True):
    """What a worker does about a sample in a step: why it is taught, its codes, its place."""
    reader = ScoreReader(TEACHING, SHARDS, files)
    reader.start_step(step)
    shard, index = (0, sample) if sample < 6 else (1, sample - 6)
    found = reader.find(Place(shard, index, TEACHING.epoch(step), 0, is_first))
    return found.to_teach, None if found.codes is None else found.codes.tolist(), int(found.place)


def test_record_is_read_back_in_later_epochs_by_the_samples_number(files):
    files.create(2)
    write(files, 2, [3, 7, -1])  # what is to be written nowhere has the number -1
    assert find(files, 7, 7) == ("", codes(17).tolist(), -1)
    assert find(files, 9, 3) == ("", codes(13).tolist(), -1)
    assert find(files, 7, 8) == (MISSING, None, 8)
    assert find(files, 7, 8, is_first=False) == (MISSING, None, -1)
    size = HEADER_BYTES + 10 * RECORD
    assert files.path(2).stat().st_size == size and files.path(2).name == "epoch-00002.scores"


def test_epoch_that_scores_writes_all_and_one_before_the_first_kept_one_nothing(files):
    files.create(2)
    write(files, 2, [3])
    assert find(files, 5, 3) == (DUE, None, 3)
    assert find(files, 5, 3, is_first=False) == (DUE, None, -1)
    assert find(files, 1, 3) == (DUE, None, -1)
    blind = replace(TEACHING, is_blind=True)
    reader = ScoreReader(blind, SHARDS, files)
    reader.start_step(4)
    assert reader.find(Place(0, 3, 1, 0)).to_teach == ""
    reader.start_step(5)
    assert reader.find(Place(0, 3, 2, 0)).to_teach == DUE


def test_record_does_not_count_in_the_epoch_that_wrote_it_nor_before(files):
    """A run that was killed goes through an epoch again, and must read what it read."""
    files.create(2)
    write(files, 3, [8])
    write(files, 4, [9])
    assert find(files, 7, 8) == (TOO_NEW, None, 8)
    assert find(files, 7, 9) == (TOO_NEW, None, 9)
    assert find(files, 9, 8) == ("", codes(18).tolist(), -1)


@pytest.mark.parametrize("place", range(RECORD))
def test_every_flipped_byte_of_a_record_is_noticed(files, place):
    files.create(2)
    write(files, 2, range(10))
    content = bytearray(files.path(2).read_bytes())
    content[files.offset(4) + place] ^= 0x10
    files.path(2).write_bytes(content)
    assert find(files, 7, 4) == (DAMAGED, None, 4)
    assert find(files, 7, 3)[0] == find(files, 7, 5)[0] == ""


def test_file_that_can_not_be_used_is_mended_and_what_was_wrong_is_said(files, tmp_path):
    assert files.mend(2) == "is missing"
    write(files, 2, range(10))
    assert files.mend(2) is None
    whole = files.path(2).read_bytes()

    os.truncate(files.path(2), files.offset(7) + 5)
    assert files.mend(2) == f"has {HEADER_BYTES + 7 * RECORD + 5:,} bytes instead of {len(whole):,}"
    kinds = [find(files, 7, sample)[0] for sample in range(10)]
    assert kinds == [*[""] * 7, DAMAGED, MISSING, MISSING]

    files.path(2).write_bytes(b"\0" + whole[1:])
    assert files.mend(2) == "does not begin with what it is of"
    assert find(files, 7, 0) == (MISSING, None, 0)

    files.path(2).write_bytes(whole)
    for other, said in (
        (ScoreFiles(files.folder, 3, 10, "these data"), "has the side 2 instead of 3"),
        (ScoreFiles(files.folder, SIDE, 11, "these data"), "has the samples 10 instead of 11"),
        (ScoreFiles(files.folder, SIDE, 10, "others"), "has the data these data instead of others"),
        (ScoreFiles(files.folder, SIDE, 10, "these data", 4), "has the layers None instead of 4"),
    ):
        files.path(2).write_bytes(whole)
        assert other.mend(2) == said and other.mend(2) is None


def test_full_disk_is_a_failed_write_with_the_files_name(files, monkeypatch):
    files.create(2)
    monkeypatch.setattr(os, "pwrite", lambda descriptor, content, place: len(content) - 1)
    with pytest.raises(NotWritten, match="epoch-00002.scores can't be written .No space left"):
        write(files, 2, [1])

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", refuse)  # as a network file system says it
    with pytest.raises(NotWritten, match="epoch-00002.scores can't be written .No space left"):
        write(files, 2, [1])


def test_file_that_can_not_be_read_is_named(files, monkeypatch):
    with pytest.raises(DataError, match="epoch-00002.scores can't be read .No such file"):
        find(files, 7, 1)
    files.create(2)

    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DataError, match="epoch-00002.scores can't be read .Input/output error"):
        find(files, 7, 1)


def test_only_what_no_checkpoint_needs_is_removed(files):
    for epoch in (2, 5, 8, 11):
        files.create(epoch)
    files.forget({5, 8})
    left = sorted(path.name for path in files.folder.iterdir())
    assert left == [f"epoch-{epoch:05d}.scores" for epoch in (5, 8, 11)]
    files.forget(set())
    assert len(list(files.folder.iterdir())) == 3


def test_worker_that_is_ahead_waits_until_all_ranks_have_written(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_scores, "SECONDS_BETWEEN_LOOKS", 0.001)
    files = ScoreFiles(tmp_path / "scores", SIDE, 10, "these data")
    files.create(2)
    found = []
    thread = threading.Thread(target=lambda: found.append(find(files, 7, 3)))
    thread.start()
    files.let_read(2)
    time.sleep(0.05)
    assert not found and thread.is_alive()
    write(files, 2, [3])
    files.let_read(3)
    thread.join(5)
    assert found == [("", codes(13).tolist(), -1)]
    find(files, 5, 3)  # an epoch that reads nothing waits for nobody


def test_worker_that_does_not_fork_shares_what_it_waits_for(tmp_path):
    """On GPUs workers start through the forkserver, so that they get a pickled data set."""
    files = ScoreFiles(tmp_path / "scores", SIDE, 10, "these data")
    of_worker = pickle.loads(ForkingPickler.dumps(files))
    files.let_read(7)
    of_worker.wait_for(7)
