"""Tables: separators, malformed rows, types of columns, and several captions of an image."""

import json
import re
from pathlib import Path

import pyarrow
import pytest
from convert_sources import IMAGES, make_job, write_file
from pyarrow import parquet

from aclip.data.convert.conversion import run
from aclip.data.convert.entries import Entry, Note, Rejected
from aclip.data.convert.sources.table import table_source
from aclip.data.members import read_captions
from aclip.data.shards.listing import Shard, read_shard
from aclip.errors import ConfigError


def open_table(path: Path, **changes):
    arguments = {"image_column": "filepath", "caption_columns": ["caption"]} | changes
    return table_source(str(path), None, **arguments)


def captions(path: Path, **changes) -> list[tuple[str, ...]]:
    """Of the entries of a table, in its order."""
    entries = open_table(path, **changes).entries()
    return [entry.captions for entry in entries if isinstance(entry, Entry)]


def others(path: Path, **changes) -> list[tuple[str, str]]:
    """(where, kind) of the rows that are no entries, and of notes."""
    entries = open_table(path, **changes).entries()
    return [(entry.key, entry.kind) for entry in entries if isinstance(entry, Rejected | Note)]


def test_five_rows_an_image_are_one_sample_with_five_captions_and_so_are_five_lines_of_json(
    tmp_path,
):
    rows = [(name, f"{name} from {side}") for side in range(5) for name in ("x", "y", "z")]
    (tmp_path / "t.csv").write_text(
        "filepath,caption\n" + "".join(f"i/{name}.jpg,{text}\n" for name, text in rows)
    )
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"filepath": f"i/{n}.jpg", "caption": text}) + "\n" for n, text in rows)
    )
    for name in ("x", "y", "z"):
        write_file(tmp_path / "i" / f"{name}.jpg", IMAGES["jpeg"])
    expected = {f"i/{n}": [f"{n} from {side}" for side in range(5)] for n in ("x", "y", "z")}
    for kind in ("csv", "jsonl"):
        folder = tmp_path / kind
        report = run(make_job(folder, open_table(tmp_path / f"t.{kind}")), processes=1)
        assert (report["entries"], report["samples"], report["skipped"]) == (15, 3, {})
        assert report["noted"] == {"further_caption": 12}
        samples = [sample for _, sample in read_shard(Shard(str(folder / "out" / "00000.tar"), 3))]
        assert {sample.key: read_captions(sample) for sample in samples} == expected
        assert [sample.read("txt") for sample in samples] == [b"x from 0", b"y from 0", b"z from 0"]


def test_a_caption_of_several_lines_in_a_cell_is_one_caption_in_the_shard_too(tmp_path):
    write_file(tmp_path / "a.jpg", IMAGES["jpeg"])
    (tmp_path / "t.csv").write_text('filepath,caption\na.jpg,"first\n\n second"\n')
    run(make_job(tmp_path, open_table(tmp_path / "t.csv")), processes=1)
    ((_, sample),) = read_shard(Shard(str(tmp_path / "out" / "00000.tar"), 1))
    assert read_captions(sample) == ["first\n\n second"]
    assert sample.read("txt") == b"first second"  # other readers take it for one text


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "txt", "CSV"])
def test_the_separator_is_found_from_the_header(tmp_path, separator, suffix):
    text = "id,filepath,caption\n1,a.jpg,one\n2,b.jpg,two\n".replace(",", separator)
    (tmp_path / f"t.{suffix}").write_text(text)
    assert captions(tmp_path / f"t.{suffix}") == [("one",), ("two",)]


def test_a_separator_can_be_given_or_stand_in_the_first_line(tmp_path):
    (tmp_path / "t.csv").write_text("filepath^caption\na.jpg^a, b; c\n")
    assert captions(tmp_path / "t.csv", separator="^") == [("a, b; c",)]
    (tmp_path / "t.csv").write_text("filepath;caption\na.jpg;one\n")
    for given in ("semicolon", ";"):
        assert captions(tmp_path / "t.csv", separator=given) == [("one",)]
    (tmp_path / "t.csv").write_text("sep=;\r\nfilepath;caption\r\na.jpg;one\r\n")
    assert captions(tmp_path / "t.csv") == [("one",)]
    for given in ("", "ab", '"'):
        with pytest.raises(ConfigError, match=r"--separator is .*comma, tab"):
            open_table(tmp_path / "t.csv", separator=given)
    (tmp_path / "t.jsonl").write_text('{"filepath": "a.jpg", "caption": "c"}\n')
    with pytest.raises(ConfigError, match=r"--separator is for \.csv.*t\.jsonl"):
        open_table(tmp_path / "t.jsonl", separator=",")


def test_spaces_behind_separators_belong_to_none_of_the_names(tmp_path):
    # As Flickr30k is distributed, with one row whose separator is missing.
    (tmp_path / "t.csv").write_text(
        "filepath| number| caption\na.jpg| 0| A dog .\nb.jpg| 4   Two dogs .\n"
    )
    assert captions(tmp_path / "t.csv") == [("A dog .",)]
    assert others(tmp_path / "t.csv") == [("line 3", "malformed_row")]


def test_a_table_of_another_form_is_refused_by_name(tmp_path):
    (tmp_path / "x.csv").write_text("path;text\na.jpg;c\n")
    words = r"--image-column is filepath, but .*separator: semicolon\) has path, text; name one"
    with pytest.raises(ConfigError, match=words):
        open_table(tmp_path / "x.csv")
    with pytest.raises(ConfigError, match=r"--caption-column is title"):
        open_table(tmp_path / "x.csv", image_column="path", caption_columns=["title"])
    (tmp_path / "empty.csv").touch()
    with pytest.raises(ConfigError, match=r"--image-column is filepath, but .* has no columns"):
        open_table(tmp_path / "empty.csv")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"TABLE is .*x\.json, which is no"):
        open_table(tmp_path / "x.json")
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(ConfigError, match=r"x\.parquet can't be read"):
        open_table(tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"TABLE is .*, which is a folder; give a file"):
        open_table(tmp_path)


def test_a_malformed_row_costs_that_row_and_is_named_by_its_line(tmp_path):
    (tmp_path / "t.csv").write_text(
        "filepath,caption\n"
        'a.jpg,"one, with a comma"\n'
        'b.jpg,"he said "hi" there"\n'
        "\n"
        'c.jpg,"over\ntwo lines"\n'
        "d.jpg,too,many\n"
        'e.jpg,"never closes\n'
        "f.jpg,fine\n"
        'g.jpg,5" wide\n'
        "h.jpg\n"
        'i.jpg,"last"\n'
    )
    assert captions(tmp_path / "t.csv") == [
        ("one, with a comma",),
        ("over\ntwo lines",),
        ("fine",),
        ('5" wide',),
        ("last",),
    ]
    assert others(tmp_path / "t.csv") == [
        (f"line {line}", "malformed_row") for line in (3, 7, 8, 11)
    ]
    rejected = [e for e in open_table(tmp_path / "t.csv").entries() if isinstance(e, Rejected)]
    assert 'b.jpg,"he said "hi" there"' in rejected[0].why
    assert rejected[1].why == "3 columns, not 2: d.jpg,too,many"
    assert "a quote opens and does not close" in rejected[2].why


def test_a_quote_that_never_closes_costs_one_row_of_many_thousand(tmp_path):
    rows = [f"{number}.jpg,text {number}\n" for number in range(5000)]
    rows[2] = '2.jpg,"text 2\n'
    (tmp_path / "t.csv").write_text("filepath,caption\n" + "".join(rows))
    assert len(captions(tmp_path / "t.csv")) == 4999
    assert others(tmp_path / "t.csv") == [("line 4", "malformed_row")]


def test_without_quotes_the_last_column_goes_to_the_end_of_the_line(tmp_path):
    (tmp_path / "t.csv").write_text('filepath,caption\na.jpg,"x" and y\nb.jpg,red, green\nc.jpg\n')
    assert captions(tmp_path / "t.csv", has_quotes=False) == [('"x" and y',), ("red, green",)]
    assert others(tmp_path / "t.csv", has_quotes=False) == [
        ("line 3", "separator_in_caption"),
        ("line 4", "malformed_row"),
    ]
    # Where the last column is no caption, nothing says which column holds the separator.
    (tmp_path / "t.csv").write_text("caption,filepath\nred, green,b.jpg\n")
    assert others(tmp_path / "t.csv", has_quotes=False) == [("line 2", "malformed_row")]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_table_from_a_spreadsheet_has_a_byte_order_mark(tmp_path, encoding):
    text = "filepath,caption\r\na.jpg,é\r\n"
    (tmp_path / "x.csv").write_bytes(text.encode(encoding))
    assert list(open_table(tmp_path / "x.csv").entries()) == [Entry("a", "a.jpg", ("é",))]


def test_lines_that_are_no_utf_8_are_windows_1252_and_counted(tmp_path):
    lines = [b"filepath,caption\n", "a.jpg,é\n".encode(), "b.jpg,é\n".encode("cp1252")]
    (tmp_path / "x.csv").write_bytes(b"".join(lines))
    assert captions(tmp_path / "x.csv") == [("é",), ("é",)]
    assert others(tmp_path / "x.csv") == [("line 3", "decoded_as_cp1252")]


def write_parquet(path: Path, values) -> None:
    names = [f"{number}.jpg" for number in range(len(values))]
    parquet.write_table(pyarrow.table({"filepath": names, "caption": values}), path)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pyarrow.array(["a", None]), [("a",), ()]),
        (pyarrow.array([float("nan"), None, 1.5]), [(), (), ("1.5",)]),
        (pyarrow.array([None, None]), [(), ()]),
        (pyarrow.array([7]), [("7",)]),
        (pyarrow.array(["a", "b", "a"]).dictionary_encode(), [("a",), ("b",), ("a",)]),
        (pyarrow.array([["a", "b"], [], None, [None, "c"]]), [("a", "b"), (), (), ("c",)]),
        (pyarrow.array(["é".encode(), "é".encode("cp1252")]), [("é",), ("é",)]),
    ],
    ids=["text", "floats", "nulls", "integers", "categories", "lists", "bytes"],
)
def test_columns_of_a_parquet_become_captions_and_nan_is_none(tmp_path, values, expected):
    write_parquet(tmp_path / "t.parquet", values)
    assert captions(tmp_path / "t.parquet") == expected


def test_columns_that_hold_no_text_or_no_paths_are_refused_by_their_type(tmp_path):
    write_parquet(tmp_path / "t.parquet", pyarrow.array([{"raw": "a"}]))
    words = r"--caption-column is caption, which holds struct<raw: string>.*lists of text"
    with pytest.raises(ConfigError, match=words):
        open_table(tmp_path / "t.parquet")
    content = {"image": [{"bytes": b"x", "path": "a.jpg"}], "caption": ["c"]}
    parquet.write_table(pyarrow.table(content), tmp_path / "hub.parquet")
    with pytest.raises(ConfigError, match=r"--image-column is image, which holds struct<bytes"):
        open_table(tmp_path / "hub.parquet", image_column="image")


def test_lists_written_into_the_cells_of_a_csv_are_several_captions(tmp_path):
    (tmp_path / "t.csv").write_text(
        'filepath;caption\na.jpg;["one", "two"]\n'
        "b.jpg;['it', \"isn't\"]\nc.jpg;[Photo]\nd.jpg;[1]\n"
    )
    found = captions(tmp_path / "t.csv", has_quotes=False)
    assert found == [("one", "two"), ("it", "isn't"), ("[Photo]",), ("[1]",)]


def test_rows_of_a_jsonl_that_hold_no_caption_or_no_path_are_named(tmp_path):
    lines = [
        '{"filepath": "a.jpg", "caption": ["one", null, "two"]}',
        '{"filepath": "b.jpg", "caption": NaN}',
        '{"caption": "c"}',
        '{"filepath": {"path": "d.jpg"}, "caption": "c"}',
        "no json",
        "",
        '{"filepath": "e.jpg", "caption": "five"}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    assert captions(tmp_path / "t.jsonl") == [("one", "two"), (), ("five",)]
    assert others(tmp_path / "t.jsonl") == [
        ("line 1", "no_text_in_row"),
        ("line 3", "no_image"),
        ("line 4", "malformed_row"),
        ("line 5", "malformed_row"),
    ]
    with pytest.raises(ConfigError, match=re.escape("has filepath, caption; name one of them")):
        open_table(tmp_path / "t.jsonl", caption_columns=["title"])
