"""The simulation of the dealing: small sets by hand, and bad input."""

import argparse
import json

import pytest

from aclip.benchmarks.dealing import (
    DataSet,
    benchmark_dealing,
    deal,
    default_sets,
    format_table,
    read_sizes,
)
from aclip.errors import ConfigError


def test_a_set_by_hand():
    # 15 samples in batches of 6: 2, 3 and 2 batches in the epochs' 12, 18 and 12 places.
    row = deal(DataSet("by hand", [4, 5, 6], 6), num_workers=4, epochs=3)
    assert (row.samples, row.lanes, row.num_workers) == (15, 6, 2)
    assert row.unseen == row.carried == 3
    assert row.sample_passes == (2, 3) and row.lane_epochs == (3, 3)
    # 42 of 45 places: the last shard of the third pass lacks 3 of its samples.
    assert row.shard_passes[0] in (2 + 1 / 4, 2 + 2 / 5, 2 + 3 / 6) and row.shard_passes[1] == 3
    # 6 lanes begin in 18 places of the 3 epochs, and 9 shards in 42 places.
    assert 18 / 3 <= row.opened <= 27 / 3
    table = format_table([row], 3)
    assert "passes of a shard after 3" in table and "3 (20.00%)" in table


def test_a_set_that_fills_its_batches_is_seen_whole():
    row = deal(DataSet("even", [8] * 4, 8), num_workers=512, epochs=2)
    assert (row.unseen, row.carried, row.sample_passes) == (0, 0, (2, 2))
    assert row.shard_passes == (2.0, 2.0) and row.num_workers == 8
    assert row.opened == 8  # two lanes a shard


def test_a_set_smaller_than_a_batch_gives_none_in_the_first_epoch():
    # 6 samples in batches of 8: 0, 1, 1 and 1 batches in the epochs, which are 24 places.
    row = deal(DataSet("small", [3, 3], 8), num_workers=2, epochs=4)
    assert (row.unseen, row.carried, row.sample_passes) == (6, 6, (4, 4))


def test_the_default_sets_are_those_of_the_manual():
    sets = {each.name: (len(each.sizes), each.batch_size) for each in default_sets()}
    assert sets["YFCC-15M"] == (1483, 4096) and sets["the built-in scenes"] == (100, 128)
    assert len(sets) == 5


def test_the_command_prints_and_writes_its_rows(capsys, tmp_path):
    arguments = argparse.Namespace(
        sizes=["3x5", "2x7"],
        batch_size=4,
        ranks=2,
        workers=2,
        epochs=2,
        json=str(tmp_path / "rows.json"),
    )
    assert benchmark_dealing(arguments) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["3x5", "2x7"]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["samples"] for row in rows] == [15, 14]
    arguments.epochs = 0
    with pytest.raises(ConfigError, match="--epochs or --batch_size is below 1"):
        benchmark_dealing(arguments)


@pytest.mark.parametrize("text", ["", "5", "0x5", "5x0", "5x", "axb", "1483*10000"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="give shards x samples of each"):
        read_sizes(text, 4)


def test_place_of_the_figures_is_checked_first_and_they_appear_whole(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    arguments = argparse.Namespace(ranks=1, workers=1, epochs=1, batch_size=4, sizes=["2x8"])
    arguments.json = str(tmp_path / "file" / "x.json")
    with pytest.raises(ConfigError, match="the folder of --json is .*file, which can't be written"):
        benchmark_dealing(arguments)
    assert capsys.readouterr().out == ""
    arguments.json = str(tmp_path / "new" / "x.json")
    assert benchmark_dealing(arguments) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.json"]
