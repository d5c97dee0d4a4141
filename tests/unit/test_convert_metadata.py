"""Reading metadata: plans of entries, JSON, tables, img2dataset's shards, and malformed input."""

import json
import os

import pytest

from aclip.data.convert.entries import Entry, Note, Rejected
from aclip.data.convert.plan import ConversionPlan, shard_bounds, write_plan
from aclip.data.convert.sources.conceptual import conceptual_source
from aclip.data.convert.sources.img2dataset import index_in_place
from aclip.data.convert.sources.json_stream import iterate_objects
from aclip.data.convert.sources.redcaps import redcaps_source
from aclip.data.shards.listing import index_shards
from aclip.errors import ConfigError


def test_entries_of_one_image_become_one_with_all_captions_and_blank_ones_do_not_take_the_key(
    tmp_path,
):
    entries = [
        Entry("a", "2.jpg", ("", "  ")),
        Entry("a", "2.jpg", ("first", " ", "second")),
        Entry("a", "3.jpg", ("of another image",)),
        Entry("a", "2.jpg", ("second", "third")),
        Entry("a", "2.jpg", ("first",)),
        Rejected("r", "malformed_row", "why"),
        Note("n", "decoded_as_cp1252", "why"),
        Entry("b", "4.jpg", ("half a pair: \ud83d",)),
        Entry("z/1", "z.zip", ("one",), member="1.jpg"),
        Entry("z/1", "z.zip", ("other member",), member="2.jpg"),
    ]
    write_plan(tmp_path / "plan.sqlite", entries, lambda _: None)
    plan = ConversionPlan(tmp_path / "plan.sqlite")
    assert plan.read(0, 9) == [
        Entry("a", "2.jpg", ("first", "second", "third")),
        Entry("b", "4.jpg", ("half a pair: ?",)),
        Entry("z/1", "z.zip", ("one",), member="1.jpg"),
    ]
    assert plan.num_seen == 9
    assert plan.rejections.counts == {"empty_caption": 1, "duplicate_key": 3, "malformed_row": 1}
    assert plan.notes.counts == {"further_caption": 1, "decoded_as_cp1252": 1}


@pytest.mark.parametrize(
    ("entries", "size", "bounds"),
    [(0, 5, [0]), (5, 5, [0, 5]), (6, 5, [0, 3, 6]), (11, 5, [0, 3, 7, 11]), (3, 1, [0, 1, 2, 3])],
)
def test_entries_are_dealt_evenly(entries, size, bounds):
    assert shard_bounds(entries, size) == bounds


def test_objects_of_a_json_array_come_one_by_one(tmp_path):
    annotations = [{"caption": f'"annotations": [{number}]'} for number in range(5000)]
    (tmp_path / "x.json").write_text(json.dumps({"info": [], "annotations": annotations}))
    assert list(iterate_objects(tmp_path / "x.json", "annotations")) == annotations
    (tmp_path / "y.json").write_text(" " + json.dumps(annotations))
    assert list(iterate_objects(tmp_path / "y.json", "annotations", True)) == annotations


@pytest.mark.parametrize("content", ["{", '{"annotations": [1]}', '{"images": []}', "", "[[1]]"])
def test_json_of_another_form_is_refused_by_name(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    (tmp_path / "images").mkdir()
    source = redcaps_source(str(tmp_path / "x.json"), str(tmp_path / "images"))
    with pytest.raises(ConfigError, match=r"x\.json"):
        list(source.entries())


def test_the_columns_of_the_other_release_are_noticed(tmp_path):
    (tmp_path / "cc.tsv").write_text("http://x.org/1.jpg\ta caption\n")
    source = conceptual_source("cc3m", str(tmp_path / "cc.tsv"), str(tmp_path), None)
    with pytest.raises(ConfigError, match=r"cc\.tsv has the url where cc3m.*take cc12m"):
        list(source.entries())
    with pytest.raises(ConfigError, match=r"--name is \{line\}\.jpg"):
        conceptual_source("cc12m", str(tmp_path / "cc.tsv"), str(tmp_path), "{line}.jpg")


def test_img2datasets_shards_are_indexed_where_they_lie(tmp_path, write_tar):
    facts = json.dumps({"caption": "c", "url": "u", "status": "success"}).encode()
    members = [
        (f"{number:09d}.{suffix}", content)
        for number in range(7)
        for suffix, content in (("jpg", b"x" * 600), ("json", facts), ("txt", b"c"))
    ]
    paths = [write_tar("00000.tar", members), write_tar("00001.tar", members[:6])]
    write_tar("00002.tar", [*members[:3], ("000000001.jpg", b"x"), ("000000002.txt", b"c")])
    os.truncate(write_tar("00003.tar", members), 3 * 512 + 100)
    for number in range(4):
        (tmp_path / f"{number:05d}_stats.json").write_text('{"successes": 9}')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    table = index_in_place(str(tmp_path), processes=2)
    sizes = {"00000.tar": 7, "00001.tar": 2, "00002.tar": 3, "00003.tar": 1}
    assert json.loads((tmp_path / "sizes.json").read_text()) == sizes
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {"sizes.json"}
    assert [shard.num_samples for shard in index_shards(paths)] == [7, 2]
    assert "13 samples in 4 shards" in table
    assert "1 shards truncated or corrupt: 00003.tar" in table
    assert "1 samples have no image" in table and "2 samples have no caption" in table


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"FOLDER is .*no \.tar"):
        index_in_place(str(tmp_path), processes=1)
    with pytest.raises(ConfigError, match=r"FOLDER is /nowhere, but there is no such folder"):
        index_in_place("/nowhere", processes=1)
