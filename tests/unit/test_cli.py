"""How the launch scripts speak: their tables, and names of any bytes."""

import io
import sys

import pytest

from aclip.cli import run_reporting_errors, show_duration, text_table


def test_a_name_that_is_no_text_is_printed_with_escapes(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "utf-8", write_through=True))
    with pytest.raises(SystemExit) as end:
        run_reporting_errors(lambda: print("wrote é\udcff.tar"))
    assert end.value.code == 0
    assert written.getvalue() == "wrote é\\udcff.tar\n".encode()


def test_table_is_aligned_left_in_the_first_column_and_right_in_the_others():
    rows = [["", "ms", "of it"], ["aclip", "12.5", "7%"], ["a plain one", "1,112.5", ""]]
    assert text_table(rows).splitlines() == [
        "                  ms  of it",
        "aclip           12.5     7%",
        "a plain one  1,112.5",
    ]


def test_table_takes_other_columns_to_the_left_and_rows_that_end_early():
    rows = [["node", "slots", "torch"], ["a", "16", "2.14.1"], ["node-2", "8"]]
    assert text_table(rows, left=(0, 2)).splitlines() == [
        "node    slots  torch",
        "a          16  2.14.1",
        "node-2      8",
    ]


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.4, "0 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
        (273600, "3 d 04 h"),
    ],
)
def test_durations_are_shown_in_two_units(seconds, text):
    assert show_duration(seconds) == text
