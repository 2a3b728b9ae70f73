"""An error is one line that every terminal and file can hold, whatever somebody's file has put into it."""

import errno

import pytest

from prefetch.errors import LONGEST, ConfigError, FormatError, reading


def test_what_a_file_says_ends_no_line_and_moves_no_cursor(tmp_path):
    error = FormatError("a.json: found 'x\n\x1b[31m\x00\u202ey\udcff'")
    assert str(error) == "a.json: found 'x [31m y?'"
    (tmp_path / "error.txt").write_text(str(error), encoding="utf-8")


def test_of_a_long_one_the_beginning_and_the_end_are_left():
    text = str(ConfigError(f"a.yaml: found {'x' * 100_000}; pass source.field=..."))
    assert (
        len(text) < LONGEST and text.startswith("a.yaml") and text.endswith("pass source.field=...")
    )


def test_whatever_a_parser_raises_becomes_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "a\nb.json"  # a name is not prefixed twice because it was made safe
    with pytest.raises(FormatError) as error, reading(path, "JSON"), reading(path, "JSON"):
        raise RecursionError("too deep")
    assert "\n" not in str(error.value) and str(error.value).count("b.json") == 1


def test_a_full_disk_is_not_the_fault_of_the_file_that_was_read():
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left") as error, reading("a.csv", "rows"):
        raise full
    assert error.value is full
    with (
        pytest.raises(FormatError, match=r"a\.csv: expected rows; OSError"),
        reading("a.csv", "rows"),
    ):
        raise OSError(errno.EIO, "Input/output error")


def test_a_file_is_named_once_where_more_is_known_of_the_place():
    with pytest.raises(FormatError) as error, reading("a.npz, rows from 0"), reading("a.npz", "x"):
        raise FormatError("its header lies")
    assert str(error.value) == "a.npz, rows from 0: its header lies"
