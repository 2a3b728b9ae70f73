"""What is written appears whole or not at all, replaces nothing, and an interruption leaves nothing behind."""

import errno
import os
import subprocess
import sys

import pytest

from prefetch.errors import ConfigError
from prefetch.trace import target
from prefetch.trace.target import check_apart, new_file, new_folder


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_and_a_file_appear_when_they_are_done(tmp_path):
    with new_folder(tmp_path / "deep" / "a") as folder:
        (folder / "x").write_text("1")
        assert left(tmp_path / "deep") == [folder.name] and folder.name != "a"
    with new_file(tmp_path / "deep" / "b.txt") as path:
        path.write_text("2")
        assert not (tmp_path / "deep" / "b.txt").exists()
    assert left(tmp_path / "deep") == ["a", "b.txt"]
    assert (tmp_path / "deep" / "a" / "x").read_text() == "1"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_nothing(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("1")
        raise error
    with pytest.raises(error), new_file(tmp_path / "b") as path:
        path.write_text("1")
        raise error
    assert left(tmp_path) == []


def test_nothing_is_overwritten_but_an_empty_folder(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for place in ("full", "file"):
        with (
            pytest.raises(ConfigError, match=f"{place}: is there already"),
            new_folder(tmp_path / place),
        ):
            pass
    for place in ("file", "empty"):
        with (
            pytest.raises(ConfigError, match=f"{place}: is there already"),
            new_file(tmp_path / place),
        ):
            pass
    with new_folder(tmp_path / "empty") as folder:
        (folder / "x").write_text("new")
    assert (tmp_path / "full" / "x").read_text() == (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "empty" / "x").read_text() == "new"


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_a_place_that_cannot_be_written_is_named_as_it_was_typed(tmp_path, monkeypatch, new):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(type(tmp_path), "mkdir" if new is new_folder else "touch", refuse)
    place = tmp_path / "x.npz"
    monkeypatch.setattr(target, "_place", lambda to: place)
    with (
        pytest.raises(ConfigError, match=r"x\.npz: cannot be written \(Permission denied\)"),
        new(place),
    ):
        pass


def test_who_comes_second_overwrites_nothing(tmp_path):
    with (
        pytest.raises(ConfigError, match="a: cannot be written"),
        new_folder(tmp_path / "a") as folder,
    ):
        (folder / "x").write_text("second")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "x").write_text("first")
    with (
        pytest.raises(ConfigError, match="b: was written meanwhile"),
        new_file(tmp_path / "b") as path,
    ):
        path.write_text("second")
        (tmp_path / "b").write_text("first")
    assert (tmp_path / "a" / "x").read_text() == (tmp_path / "b").read_text() == "first"
    assert left(tmp_path) == ["a", "b"]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    code = (
        "import os, sys; from prefetch.trace.target import new_folder\n"
        "with new_folder(sys.argv[1]) as folder:\n    (folder / 'x').write_text('1'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=False)
    assert len(left(tmp_path)) == 1
    alive = tmp_path / left(tmp_path)[0].replace(
        left(tmp_path)[0].rpartition("-")[2], str(os.getppid())
    )
    alive.mkdir()
    with new_folder(tmp_path / "a"):
        pass
    assert left(tmp_path) == sorted(["a", alive.name]), "whose process lives is left alone"


def test_a_place_that_cannot_be_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="file/a: cannot be written"),
        new_folder(tmp_path / "file" / "a"),
    ):
        pass


def test_a_full_disk_is_said_and_an_error_of_the_reader_is_its_own(tmp_path):
    for error, wanted in (
        (OSError(28, "No space left"), ConfigError),
        (OSError(2, "gone"), OSError),
    ):
        with pytest.raises(wanted) as caught, new_file(tmp_path / "a") as path:
            path.write_text("1")
            raise error
        assert ("a: cannot be written (No space left)" in str(caught.value)) == (
            wanted is ConfigError
        )
    assert left(tmp_path) == []


def test_nothing_is_written_into_what_is_read(tmp_path):
    check_apart(tmp_path / "out", tmp_path / "trace", tmp_path / "other")
    for inside in ("trace", "trace/deep/out", "trace/../trace/x"):
        with pytest.raises(ConfigError, match=r"lies inside .*trace, which is read"):
            check_apart(tmp_path / inside, tmp_path / "other", tmp_path / "trace")


def test_every_file_is_on_disk_before_its_name_is(tmp_path, monkeypatch):
    synced, goal = set(), tmp_path / "deep" / "er" / "a"

    def watch(number):
        synced.add((os.fstat(number).st_ino, goal.exists()))

    monkeypatch.setattr(os, "fsync", watch)
    with new_folder(goal) as folder:
        (folder / "sub").mkdir()
        files = [folder / "x", folder / "sub" / "y"]
        for file in files:
            file.write_text("1")
        expected = {(file.stat().st_ino, False) for file in files}
    assert synced == expected
    synced.clear()
    goal = tmp_path / "b"
    with new_file(goal) as path:
        expected = {(path.stat().st_ino, False)}
    assert synced == expected


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_what_the_writer_removed_itself_hides_no_error(tmp_path, new):
    with pytest.raises(ValueError, match="own"), new(tmp_path / "a") as place:
        place.rmdir() if place.is_dir() else place.unlink()
        raise ValueError("own")
    assert left(tmp_path) == []
