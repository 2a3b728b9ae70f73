"""A file is there whole or not at all, and what a killed writer left is known as such."""

import os
import socket
import subprocess
import sys

import pytest

from prefetch.written import disk_error, is_alive, left_parts, write_whole


def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(60)
    return process.pid


def test_a_file_replaces_another_and_leaves_nothing_beside_it(tmp_path):
    for text in ("one", "two"):
        write_whole(tmp_path / "a.json", text)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "two"


def test_an_error_names_the_file_that_was_asked_for_and_the_old_one_stays(tmp_path, monkeypatch):
    write_whole(tmp_path / "a", "old")

    def full(_number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'$"):
        write_whole(tmp_path / "a", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    write_whole(tmp_path / "a", "new", lasting=False)  # asks for no fsync


def test_only_what_nobody_can_end_is_left_behind(tmp_path):
    here = socket.gethostname()
    of_dead = f".a.json-{here}-{dead()}-1.part"
    names = [
        of_dead,
        f".b-{here}-{os.getpid()}-1.part",
        ".c-elsewhere.net-1-1.part",
        "mine.part",
        ".odd.part",
    ]
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in left_parts(tmp_path)] == [of_dead]
    assert {path.name for path in left_parts(tmp_path, alone=True)} == set(names[:3])
    assert list(left_parts(tmp_path / "gone")) == []


def test_who_lives(tmp_path):
    assert is_alive(os.getpid()) and is_alive(1) and not is_alive(dead())


def test_what_a_library_says_of_the_disk_is_understood(tmp_path):
    told = disk_error(
        RuntimeError("Error while serializing: I/O error (os error 28) at x"), tmp_path
    )
    assert told is not None and told.errno == 28 and "No space left" in str(told)
    assert disk_error(RuntimeError("a matrix is singular"), tmp_path) is None
    silent = disk_error(RuntimeError("file write failed"), tmp_path / "gone")
    assert isinstance(silent, FileNotFoundError)
