"""YFCC's lists: pickles are read item by item and run nothing, and the raw list gives SLIP's."""

import bz2
import gzip
import json
import os
import pickle
import random
import re
import tracemalloc
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from aclip.data.convert.entries import Entry
from aclip.data.convert.plan import ConversionPlan, write_plan
from aclip.data.convert.sources.pickle_stream import iterate_pickled_list
from aclip.data.convert.sources.yfcc import yfcc_source
from aclip.data.convert.sources.yfcc_list import clean_text, write_yfcc_list
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
