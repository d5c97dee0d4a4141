"""Reading metadata: pickles that run nothing, YFCC's raw list, streams, and malformed input."""

import bz2
import gzip
import json
import os
import pickle
import random
import re
import tracemalloc
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from aclip.data.convert.entries import Entry, Rejected
from aclip.data.convert.plan import ConversionPlan, shard_bounds, write_plan
from aclip.data.convert.sources.conceptual import conceptual_source
from aclip.data.convert.sources.img2dataset import index_in_place
from aclip.data.convert.sources.json_stream import iterate_objects
from aclip.data.convert.sources.pickle_stream import iterate_pickled_list
from aclip.data.convert.sources.redcaps import redcaps_source
from aclip.data.convert.sources.table import table_source
from aclip.data.convert.sources.yfcc import yfcc_source
from aclip.data.convert.sources.yfcc_list import clean_text, write_yfcc_list
from aclip.data.shards.listing import index_shards
from aclip.errors import ConfigError


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch /tmp/aclip-pickle-ran",)


def make_rows(count: int) -> list[tuple]:
    rng = random.Random(0)
    shared = [f"shared {index}" for index in range(9)]
    return [
        (
            rng.randrange(10**8),
            rng.choice(["", "é", rng.choice(shared), f"title {number} 猫"]),
            rng.choice([None, "d" * rng.randrange(400)]),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("pickler", [pickle._Pickler, pickle.Pickler], ids=["python", "c"])
def test_a_pickled_list_comes_item_by_item(tmp_path, protocol, pickler):
    rows = make_rows(2500)
    rows += rows[3:9]  # the same tuples again
    rows.append((-1, "l" * 300_000, "x"))  # in a frame of its own
    rows.append((2**70, "a", rows[-1][1]))
    with open(tmp_path / "x.pkl", "wb") as file:
        pickler(file, protocol).dump(rows)
    assert list(iterate_pickled_list(tmp_path / "x.pkl")) == rows


@pytest.mark.parametrize("count", [0, 1, 2, 1000, 1001])
def test_pickled_lists_of_any_length_are_whole(tmp_path, count):
    rows = make_rows(count)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(rows))
    assert list(iterate_pickled_list(tmp_path / "x.pkl")) == rows


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(pickle.dumps([RunsCode()]), id="runs a command"),
        pytest.param(pickle.dumps([(1, "a", RunsCode())]), id="runs a command within"),
        pytest.param(b"cos\nsystem\n(S'touch /tmp/aclip-pickle-ran'\ntR.", id="runs, protocol 0"),
        pytest.param(pickle.dumps(np.arange(3)), id="numpy array"),
        pytest.param(pickle.dumps({"a": 1}), id="dict"),
        pytest.param(pickle.dumps((1, 2)), id="tuple"),
        pytest.param(pickle.dumps("text"), id="text"),
        pytest.param(pickle.dumps([[1], 2]), id="list in list"),
        pytest.param(pickle.dumps(make_rows(50))[:-40], id="truncated"),
        pytest.param(b"", id="empty"),
        pytest.param(b"\x80\x04]\x94(\x86e.", id="stack too short"),
        pytest.param(b"\x80\x04]\x94h\x07a.", id="refers to nothing"),
        pytest.param(b"\x80\x04e.", id="appends to nothing"),
        pytest.param(b"id,title\n1,a\n", id="csv"),
    ],
)
def test_any_other_pickle_is_refused_by_name_and_nothing_is_run(tmp_path, content):
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(ConfigError, match=r"x\.pkl is not a pickled list"):
        list(iterate_pickled_list(tmp_path / "x.pkl"))
    assert not Path("/tmp/aclip-pickle-ran").exists()


def test_fuzzed_pickles_give_items_or_a_sentence(tmp_path):
    content, rng = pickle.dumps(make_rows(60)), random.Random(1)
    path = tmp_path / "x.pkl"
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(bytes(damaged))
        try:
            list(iterate_pickled_list(path))
        except ConfigError as error:
            assert "x.pkl is not a pickled list" in str(error)


def peak_of(action) -> int:
    """Bytes that Python allocates at most while `action` runs."""
    tracemalloc.start()
    action()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_planning_takes_no_more_memory_for_a_longer_list(tmp_path):
    peaks = []
    for count in (1_500, 4_500):
        rows = [(number, f"title {number}" * 9, "d" * 600) for number in range(count)]
        path = tmp_path / f"{count}.pkl"
        path.write_bytes(pickle.dumps(rows))
        del rows
        source = yfcc_source(str(path), str(tmp_path))
        plan = tmp_path / f"{count}.sqlite"
        peaks.append(peak_of(lambda s=source, p=plan: write_plan(p, s.entries(), lambda _: None)))
        assert ConversionPlan(plan).num_planned == count
    # The longer list holds 2 MB more text; a pickle's list is built 1000 items at a time.
    assert peaks[1] < peaks[0] + 300_000


def slip_list(lines: list[str], image_ids: set[int], clip_ids: set[int]) -> list[tuple]:
    """What SLIP's make_dataset.py describes: decoded, tags a, b, i and urls taken out."""
    rows = []
    for line in lines:
        row = line.strip().split("\t")
        if int(row[0]) in image_ids and int(row[0]) in clip_ids:
            texts = []
            for field in (row[8], row[9]):
                text = unquote(field).replace("+", " ")
                text = re.sub(r"<a.*?>|</a>|<b>|</b>|<i>|</i>", "", text)
                texts.append(re.sub(r"http\S+|www\S+", "", text))
            rows.append((int(row[0]), *texts))
    return rows


FIELDS = [
    "IMG_0520",
    "A+caf%C3%A9+%26+more",
    "see+%3Ca+href%3D%22http%3A%2F%2Fx.org%2Fa%22%3Ethis%3C%2Fa%3E+page",
    "%3Cb%3Ebold%3C%2Fb%3E+%3Ci%3Eit%3C%2Fi%3E",
    "http%3A%2F%2Fflickr.com%2F+www.x.org+end",
    "two%0Alines+%09tab",
    "1%2B1",
    "%E7%8C%AB",
    "%FF",
    "",
]


def make_metadata(count: int) -> list[str]:
    rng = random.Random(2)
    lines = []
    for number in range(count):
        columns = [str(number), "6985418911", "4e2f7a26", "39@N00", "nick", "2012", "133", "Canon"]
        columns += [rng.choice(FIELDS), rng.choice(FIELDS), "tags", "", "-81.8", "24.5", "12"]
        lines.append("\t".join([*columns, "http://page", "http://image", "by", "0"]))
    return lines


@pytest.mark.parametrize("suffix", ["txt", "bz2", "gz"])
def test_the_yfcc_list_equals_slips(tmp_path, capsys, suffix):
    lines = make_metadata(300)
    images, subset = set(range(0, 300, 2)), set(range(0, 300, 3))
    content = ("\n".join([*lines, "x\ty", ""]) + "\n").encode()
    compress = {"txt": lambda data: data, "bz2": bz2.compress, "gz": gzip.compress}[suffix]
    metadata = tmp_path / f"yfcc100m_dataset.{suffix}"
    metadata.write_bytes(compress(content))
    subset_file = tmp_path / f"yfcc100m_subset_data.tsv.{suffix}"
    subset_file.write_bytes(compress("".join(f"{i}\t6985\t4e2f\n" for i in subset).encode()))
    np.save(tmp_path / "ids.npy", np.array(sorted(images)))
    out = tmp_path / "lists" / "yfcc15m.jsonl"
    write_yfcc_list(str(metadata), str(subset_file), str(tmp_path / "ids.npy"), str(out))
    written = [tuple(json.loads(line).values()) for line in out.read_text().splitlines()]
    assert written == slip_list(lines, images, subset)
    # Half and a third of 300 is 50; the last two lines are no rows.
    output = capsys.readouterr().out
    assert "wrote 50 images" in output
    assert "250 lines are not in the subset, 2 malformed" in output
    assert [path.name for path in out.parent.iterdir()] == ["yfcc15m.jsonl"]

    # The converter reads it as it reads SLIP's pickle.
    (tmp_path / "yfcc15m.pkl").write_bytes(pickle.dumps(slip_list(lines, images, subset)))
    ours, slips = (
        list(yfcc_source(str(path), str(tmp_path)).entries())
        for path in (out, tmp_path / "yfcc15m.pkl")
    )
    assert ours == slips and ours[1] == Entry(
        "00000006", "00/000.zip", ours[1].captions, member="006.jpg"
    )


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("a+b%20c", "a b c"),
        ("%3CA%3E%3Cabbr%3Ex", "<A>x"),  # SLIP's pattern knows small letters only
        ("go+to+http%3A%2F%2Fx.org%2Fy%3Fz+now", "go to  now"),
        ("%C3%A9t%C3%A9", "été"),
    ],
)
def test_titles_are_cleaned(field, text):
    assert clean_text(field) == text


def test_a_stop_within_the_yfcc_list_leaves_no_list(tmp_path):
    content = bz2.compress(("\n".join(make_metadata(3000)) + "\n").encode())
    (tmp_path / "d.bz2").write_bytes(content[: len(content) // 2])
    (tmp_path / "s.tsv").write_text("1\n2\n")
    with pytest.raises(ConfigError, match=r"d\.bz2 can't be read"):
        write_yfcc_list(
            str(tmp_path / "d.bz2"), str(tmp_path / "s.tsv"), None, str(tmp_path / "o.jsonl")
        )
    assert not (tmp_path / "o.jsonl").exists()


def test_metadata_without_line_numbers_is_refused(tmp_path):
    (tmp_path / "d.txt").write_text("6985418911\t39@N00\n")
    (tmp_path / "s.tsv").write_text("1\n")
    arguments = [str(tmp_path / name) for name in ("d.txt", "s.tsv")]
    with pytest.raises(ConfigError, match=r"d\.txt starts with '6985418911'"):
        write_yfcc_list(*arguments, None, str(tmp_path / "o.jsonl"))
    np.save(tmp_path / "i.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match=r"--image-ids is .*i\.npy"):
        write_yfcc_list(*arguments, str(tmp_path / "i.npy"), str(tmp_path / "o.jsonl"))


def test_the_first_entry_of_a_key_counts_and_blank_ones_do_not_take_it(tmp_path):
    entries = [
        Entry("a", "1.jpg", ("", "  ")),
        Entry("a", "2.jpg", ("first", " ", "second")),
        Entry("a", "3.jpg", ("late",)),
        Rejected("r", "malformed_row", "why"),
        Entry("b", "4.jpg", ("half a pair: \ud83d",)),
    ]
    write_plan(tmp_path / "plan.sqlite", entries, lambda _: None)
    plan = ConversionPlan(tmp_path / "plan.sqlite")
    assert plan.read(0, 9) == [
        Entry("a", "2.jpg", ("first", "second")),
        Entry("b", "4.jpg", ("half a pair: ?",)),
    ]
    assert plan.num_seen == 5
    expected = Counter(["empty_caption", "duplicate_key", "malformed_row"])
    assert plan.rejections.counts == expected


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


def open_table(path: Path, **changes):
    arguments = {"image_column": "filepath", "caption_columns": ["caption"]} | changes
    return table_source(str(path), None, **arguments)


def test_a_table_of_another_form_is_refused_by_name(tmp_path):
    (tmp_path / "x.csv").write_text("path,caption\na.jpg,c\n")
    with pytest.raises(ConfigError, match=r"--image-column is filepath, but .*path, caption"):
        open_table(tmp_path / "x.csv")
    with pytest.raises(ConfigError, match=r"--caption-column is title"):
        open_table(tmp_path / "x.csv", image_column="path", caption_columns=["title"])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"TABLE is .*x\.json, which is no"):
        open_table(tmp_path / "x.json")
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(ConfigError, match=r"x\.parquet can't be read"):
        open_table(tmp_path / "x.parquet")


def test_rows_with_other_columns_are_counted_and_open_quotes_refused(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text('filepath\tcaption\na.jpg\tone\nb.jpg\n\nc.jpg\t"x" and y\n')
    source = open_table(path)
    with pytest.raises(ConfigError, match=r"x\.tsv line 5 is malformed.*--no-quotes"):
        list(source.entries())
    entries = list(open_table(path, has_quotes=False).entries())
    assert [entry.captions for entry in entries if isinstance(entry, Entry)] == [
        ("one",),
        ('"x" and y',),
    ]
    assert [entry.kind for entry in entries if isinstance(entry, Rejected)] == ["malformed_row"]


def test_a_table_from_a_spreadsheet_has_a_byte_order_mark(tmp_path):
    (tmp_path / "x.csv").write_bytes("\ufefffilepath,caption\r\na.jpg,c\r\n".encode())
    assert list(open_table(tmp_path / "x.csv").entries()) == [Entry("a", "a.jpg", ("c",))]


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
