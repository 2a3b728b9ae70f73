"""The store: keys that change with content and with nothing else, one build among many askers, nothing half-made."""

import errno
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefetch.artifacts import Outside, Recipe, Store, discard, lock_path
from prefetch.config import ArtifactsConfig
from prefetch.errors import ArtifactError, ConfigError
from prefetch.manifest import MANIFEST, check_files, sha256_of
from prefetch.runs.index import write_index
from prefetch.stock import entries, remove, run, used_names


def recipe(value: int = 1, upstream=None, files=None, built: list | None = None) -> Recipe:
    def build(folder: Path, above) -> None:
        if built is not None:
            built.append(value)
        (folder / "deep").mkdir()
        (folder / "deep" / "value.txt").write_text(f"{value} {sorted(above)}")

    return Recipe("toy", 1, {"value": value}, build, upstream or {}, ("numpy",), files or {})


def test_what_was_made_is_found(tmp_path):
    store, built = Store(tmp_path), []
    first = store.make(recipe(built=built))
    second = store.make(recipe(built=built))
    assert (first.was_made, second.was_made, built) == (True, False, [1])
    assert (first.folder / "deep" / "value.txt").read_text() == "1 []"
    assert list(store.used) == [f"toy/{first.key}"]


def test_the_key_follows_everything_that_determines_the_content(tmp_path):
    outside = tmp_path / "a.txt"
    outside.write_text("one")
    base = recipe(files={"a": outside})
    keys = {base.key, recipe(2, files={"a": outside}).key, recipe(files={"b": outside}).key}
    keys.add(recipe(files={"a": outside}, upstream={"x": recipe(5)}).key)
    keys.add(recipe(files={"a": outside}, upstream={"x": recipe(6)}).key)
    moved = tmp_path / "moved.txt"
    moved.write_text("one")
    assert recipe(files={"a": moved}).key == base.key, "the place of a file does not count"
    outside.write_text("two")
    keys.add(recipe(files={"a": outside}).key)
    assert len(keys) == 6


def test_a_setting_by_numbers_is_found_again(tmp_path):
    """JSON orders 2 before 10, and "10" before "2"."""
    numbered = Recipe("toy", 1, {"width": {2: 1, 10: 2}}, recipe().build)
    made = Store(tmp_path).make(numbered)
    assert Store(tmp_path).make(numbered).folder == made.folder


def test_upstream_is_made_first_and_only_when_needed(tmp_path):
    store, built = Store(tmp_path), []
    top = recipe(2, upstream={"low": recipe(1, built=built)}, built=built)
    artifact = store.make(top)
    assert built == [1, 2]
    assert artifact.manifest["identity"]["upstream"] == {"low": recipe(1).key}
    Store(tmp_path).make(top)
    assert built == [1, 2]


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(folder: Path, above) -> None:
        (folder / "half.txt").write_text("half")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        Store(tmp_path).make(Recipe("toy", 1, {}, build))
    assert [p.name for p in (tmp_path / "toy").iterdir() if p.is_dir()] == []


def test_a_store_that_went_away_while_a_library_wrote_is_said_to_be_the_store(tmp_path):
    def build(folder: Path, above) -> None:  # Arrow's error knows its file in words only
        raise FileNotFoundError(f"Failed to open local file '{folder / 'tokens-00001.parquet'}'")

    with pytest.raises(ArtifactError, match=r"cannot be written \(Failed to open.*pass store=DIR"):
        Store(tmp_path).make(Recipe("toy", 1, {}, build))


def test_an_empty_build_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match="wrote no file"):
        Store(tmp_path).make(Recipe("toy", 1, {}, lambda folder, above: None))


@pytest.mark.parametrize("content", [b"2 []", b"1 [] "])
def test_a_corrupted_file_is_named(tmp_path, content):
    folder = Store(tmp_path).make(recipe()).folder
    (folder / "deep" / "value.txt").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"value\.txt: its sha256 differs from the manifest"):
        Store(tmp_path).make(recipe())
    assert not Store(tmp_path, verify=False).make(recipe()).was_made


@pytest.mark.parametrize("name", ["../beside.txt", "/etc/hostname", "a/../../b"])
def test_a_manifest_that_leads_outside_its_folder_is_refused(tmp_path, name):
    manifest = {"files": {name: {"bytes": 1, "sha256": "0" * 64}}}
    with pytest.raises(ArtifactError, match="which lies outside its folder"):
        check_files(tmp_path, manifest)


def test_what_is_damaged_is_made_again_on_request(tmp_path, caplog):
    held, built = Store(tmp_path).make(recipe()), []
    path = held.folder / "deep" / "value.txt"
    path.write_text("2 []")
    with pytest.raises(ArtifactError, match=r"artifacts\.rebuild=true makes it again"):
        Store(tmp_path).make(recipe(built=built))
    again = Store(tmp_path, rebuild=True).make(recipe(built=built))
    assert (again.was_made, built, path.read_text()) == (True, [1], "1 []")
    assert [record.message.count("value.txt: its sha256 differs") for record in caplog.records] == [
        1
    ]
    assert not Store(tmp_path, rebuild=True).make(recipe(built=built)).was_made and built == [1]


def test_any_byte_of_a_manifest_counts(tmp_path):
    """Its own sum finds what the sums of the files do not: a time, a commit."""
    path = Store(tmp_path).make(recipe()).folder / MANIFEST
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(
            ArtifactError, match=r"manifest\.json: the artifact is damaged|another artifact"
        ):
            Store(tmp_path).make(recipe())
    old = json.loads(whole)
    path.write_text(
        json.dumps({name: old[name] for name in old if name != "sum"})
    )  # of older stores
    assert not Store(tmp_path).make(recipe()).was_made


def test_a_folder_of_the_user_s_own_is_not_made_again(tmp_path):
    made = Store(tmp_path / "store").make(recipe())
    (made.folder / "deep" / "value.txt").write_text("2 []")
    with pytest.raises(ArtifactError, match=r"value\.txt: its sha256 differs.*get it anew"):
        Store(tmp_path / "other", rebuild=True).make(Outside("toy", made.folder))
    assert made.folder.exists()


def test_damaged_artifacts_are_listed_and_removed_on_request(tmp_path, capsys):
    store = Store(tmp_path)
    whole, changed, torn = (store.make(recipe(value)).folder for value in (1, 2, 3))
    (changed / "deep" / "value.txt").write_text("9 []")
    (torn / MANIFEST).write_text("{")
    foreign = tmp_path / "toy" / "notes"
    foreign.mkdir()
    run(Cfg(None), store)
    assert capsys.readouterr().out.count("no, damaged") == 1, "files are read on request only"
    run(Cfg("damaged"), store)
    said = capsys.readouterr().out
    assert "value.txt: its sha256 differs" in said and "manifest.json: the artifact is" in said
    assert whole.exists() and foreign.exists() and not changed.exists() and not torn.exists()
    assert list(tmp_path.glob("toy/*.building")) == []


def test_what_may_not_be_read_stays_and_the_damaged_ones_behind_it_go(
    tmp_path, monkeypatch, capsys
):
    store = Store(tmp_path)
    closed, torn = (store.make(recipe(value)).folder for value in (1, 2))
    (torn / "deep" / "value.txt").write_text("9 []")

    def opened(path: Path) -> str:
        if closed in path.parents:
            raise ArtifactError(f"{path}: cannot be read") from PermissionError(errno.EACCES, "")
        return sha256_of(path)

    monkeypatch.setattr("prefetch.manifest.sha256_of", opened)
    held = sorted(entries(store), key=lambda entry: entry.folder == torn)
    monkeypatch.setattr("prefetch.stock.entries", lambda _: held)
    run(Cfg("damaged"), store)
    assert closed.exists() and not torn.exists()
    assert "value.txt: may not be read by this user" in capsys.readouterr().out


def test_a_library_that_meets_a_full_disk_is_understood(tmp_path):
    def build(folder, above):
        raise RuntimeError("Error while serializing: I/O error (os error 28)")

    with pytest.raises(ArtifactError, match=r"No space left.*pass store=DIR"):
        Store(tmp_path).make(Recipe("toy", 1, {}, build))


def test_a_file_that_grows_while_it_is_read_leaves_nothing_under_its_old_key(tmp_path):
    log = tmp_path / "server.log"
    log.write_text("one")

    def build(folder: Path, above) -> None:
        log.write_text("one, two")  # whoever writes it goes on
        (folder / "read.txt").write_text(log.read_text())

    def asked() -> Recipe:
        return Recipe("toy", 1, {}, build, files={"log": log})

    with pytest.raises(ArtifactError, match=r"server\.log: was changed while the toy was made"):
        Store(tmp_path / "store").make(asked())
    assert not list(tmp_path.glob("store/toy/[!.]*"))
    made = Store(tmp_path / "store").make(asked())
    assert (made.folder / "read.txt").read_text() == "one, two"


def test_code_that_is_edited_while_it_runs_spoils_nothing(tmp_path, monkeypatch):
    module = tmp_path / "mine_to_edit.py"
    module.write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    value = importlib.import_module("mine_to_edit").VALUE

    def build(folder: Path, above) -> None:
        module.write_text("VALUE = 2\n")
        (folder / "read.txt").write_text(str(value))

    made = Store(tmp_path / "store").make(Recipe("toy", 1, {}, build, files={"source": module}))
    assert made.was_made and (made.folder / "read.txt").read_text() == "1"


def test_what_is_taken_away_while_it_is_checked_is_made_again(tmp_path, monkeypatch):
    """By a run that removes it, or makes it again: nobody has damaged it."""
    held, built = Store(tmp_path).make(recipe()), []

    def late(folder: Path, manifest) -> None:
        if not built:
            remove(held.folder)
        check_files(folder, manifest)

    monkeypatch.setattr("prefetch.artifacts.check_files", late)
    assert Store(tmp_path).make(recipe(built=built)).was_made and built == [1]


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_file_that_the_disk_cannot_read_is_damage_and_one_that_may_not_be_read_is_not(
    tmp_path, monkeypatch, code
):
    store = Store(tmp_path, rebuild=True)
    store.make(recipe())

    def refuse(path: Path) -> str:
        cause = OSError(code, os.strerror(code))
        raise ArtifactError(f"{path}: cannot be read ({cause.strerror})") from cause

    def forgotten(folder: Path) -> None:
        monkeypatch.undo()
        discard(folder)

    monkeypatch.setattr("prefetch.manifest.sha256_of", refuse)
    monkeypatch.setattr("prefetch.artifacts.discard", forgotten)
    if code == errno.EIO:
        assert store.make(recipe()).was_made
    else:
        with pytest.raises(ArtifactError, match=r"value\.txt: may not be read.*store=DIR"):
            store.make(recipe())


def test_what_was_stood_on_is_the_same_whether_it_was_made_or_found(tmp_path):
    top = recipe(2, upstream={"low": recipe(1)})
    first, second = Store(tmp_path), Store(tmp_path)
    first.make(top), second.make(top)
    assert first.used == second.used and len(first.used) == 2


def test_the_list_sweeps_what_killed_writers_left_of_single_files(tmp_path):
    store = Store(tmp_path)
    store.make(recipe())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(60)
    left = [
        f".x.json-{socket.gethostname()}-{process}-1.part" for process in (gone.pid, os.getpid())
    ]
    for folder in (tmp_path / "runs", tmp_path / "cells" / ".code.unfinished"):
        folder.mkdir(parents=True)
        for name in left:
            (folder / name).touch()
        run(Cfg(None), store)
        assert [path.name for path in folder.iterdir()] == left[1:], "somebody is writing the other"


def test_a_missing_file_and_a_damaged_manifest_are_named(tmp_path):
    folder = Store(tmp_path).make(recipe()).folder
    (folder / "deep" / "value.txt").unlink()
    with pytest.raises(ArtifactError, match=r"value\.txt: missing from the artifact"):
        Store(tmp_path).make(recipe())
    (folder / MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match=r"manifest\.json: the artifact is damaged"):
        Store(tmp_path).make(recipe())


def test_an_unwritable_store_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="pass store=DIR"):
        Store(tmp_path / "file").make(recipe())


SLOW = """
import sys, time
from pathlib import Path
from prefetch.artifacts import Recipe, Store
def build(folder, above):
    with open(sys.argv[2], "a") as log: log.write("built\\n")
    (folder / "a.txt").write_text("a" * 100)
    time.sleep(float(sys.argv[3]))
    (folder / "b.txt").write_text("b")
Store(sys.argv[1]).make(Recipe("slow", 1, {}, build))
"""


def ask(root: Path, log: Path, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SLOW, str(root), str(log), str(seconds)])


def test_eight_processes_build_once(tmp_path):
    log = tmp_path / "log"
    processes = [ask(tmp_path / "store", log, 0.3) for _ in range(8)]
    assert [process.wait(60) for process in processes] == [0] * 8
    assert log.read_text() == "built\n"


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_build_looks_unfinished_and_the_next_run_succeeds(tmp_path, kill):
    log, root = tmp_path / "log", tmp_path / "store"
    process = ask(root, log, 60)
    while not log.exists() or not log.read_text():
        time.sleep(0.01)
    os.kill(process.pid, kill)
    process.wait(60)
    assert not list(root.glob(f"slow/*/{MANIFEST}"))
    assert ask(root, log, 0).wait(60) == 0
    (sealed,) = root.glob(f"slow/*/{MANIFEST}")
    assert sorted(json.loads(sealed.read_text())["files"]) == ["a.txt", "b.txt"]
    assert not list(root.glob("slow/*.building"))


def test_a_folder_that_the_user_names_is_known_by_its_content(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("same")
    here, there = Outside("toy", tmp_path / "here"), Outside("toy", tmp_path / "there")
    assert here.key == there.key
    (tmp_path / "there" / "x").write_text("other")
    assert here.key != Outside("toy", tmp_path / "there").key
    store = Store(tmp_path / "store")
    assert store.make(here).folder == tmp_path / "here"
    assert not (tmp_path / "store").exists()


class Cfg:
    def __init__(self, remove: str | None, spare_minutes: float = 0.0) -> None:
        self.artifacts = ArtifactsConfig(remove=remove, spare_minutes=spare_minutes)


def test_unused_is_what_no_living_run_stood_on(tmp_path, capsys):
    store = Store(tmp_path / "store")
    store.make(recipe(2, upstream={"toy": recipe(1)}))
    folder = tmp_path / "run"
    folder.mkdir()
    write_index(store, stage="x", folder=folder, failed=False)
    lonely = Store(tmp_path / "store").make(recipe(3))
    held = entries(store)
    assert {entry.name for entry in held} - used_names(store, held) == {f"toy/{lonely.key}"}
    run(Cfg("unused"), store)
    assert [entry.key for entry in entries(store)] == [
        entry.key for entry in held if entry.key != lonely.key
    ]
    assert "removed toy/" in capsys.readouterr().out
    folder.rmdir()
    run(Cfg("unused"), store)
    assert entries(store) == []


def test_what_was_just_used_is_spared_because_a_run_may_stand_on_it(tmp_path, capsys):
    held = Store(tmp_path).make(recipe())
    run(Cfg("unused", spare_minutes=60), Store(tmp_path))
    assert held.folder.exists() and "spared toy/" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", "/data/model"), ConnectionError("hub down")]
)
def test_an_error_of_the_builder_is_not_blamed_on_the_disk(tmp_path, error):
    def build(folder, above):
        raise error

    with pytest.raises(type(error)):
        Store(tmp_path).make(Recipe("toy", 1, {}, build))


def test_the_builder_s_own_file_is_not_the_store_s_where_the_store_is_the_current_folder(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)

    def build(folder, above):
        Path("data.csv").read_text()

    with pytest.raises(FileNotFoundError, match=r"data\.csv"):
        Store(".").make(Recipe("toy", 1, {}, build))


def test_a_full_disk_is_said_with_what_to_do(tmp_path):
    def build(folder, above):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ArtifactError, match=r"No space left.*pass store=DIR"):
        Store(tmp_path).make(Recipe("toy", 1, {}, build))
    assert not list(tmp_path.glob("toy/*.building"))


def test_a_folder_under_another_key_is_not_that_artifact(tmp_path):
    made = Store(tmp_path).make(recipe(1))
    made.folder.rename(made.folder.with_name(recipe(2).key))
    with pytest.raises(ArtifactError, match="that of another artifact"):
        Store(tmp_path).make(recipe(2))


@pytest.mark.parametrize("files", [[], {}, {"v": 3}, {"v": {"bytes": 1}}])
def test_a_manifest_that_lists_nothing_is_damaged(tmp_path, files):
    path = Store(tmp_path).make(recipe()).folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": files}))
    with pytest.raises(ArtifactError, match="damaged"):
        Store(tmp_path).make(recipe())


@pytest.mark.parametrize("text", ["{", json.dumps({"folder": "x" * 5000, "used": []})])
def test_a_torn_entry_of_the_index_is_named(tmp_path, text):
    store = Store(tmp_path)
    store.make(recipe())
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"x\.json: the entry of a run is damaged"):
        used_names(store, entries(store))


def test_an_outside_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="gone: cannot be read"):
        Store(tmp_path).make(recipe(files={"gone": tmp_path / "gone"}))


def test_a_folder_that_a_store_sealed_keeps_its_key_when_it_is_named(tmp_path):
    made = Store(tmp_path / "store").make(recipe())
    named = Store(tmp_path / "other").make(Outside("toy", made.folder))
    assert (named.key, named.folder) == (made.key, made.folder)


def test_removing_by_name_takes_one_artifact_or_says_what_there_is(tmp_path, capsys):
    store = Store(tmp_path)
    key = store.make(recipe(1)).key
    store.make(recipe(2))
    with pytest.raises(ConfigError, match=f"it fits 2; the store holds .*{key}"):
        run(Cfg("toy/"), store)
    run(Cfg(f"toy/{key}"), store)
    assert len(entries(store)) == 1


def test_the_list_sweeps_what_a_killed_run_left(tmp_path, capsys):
    store = Store(tmp_path)
    folder = store.make(recipe()).folder
    remains = folder.with_name("0123456789abcdef.building")
    remains.mkdir()
    run(Cfg(None), store)
    assert not remains.exists() and folder.exists()
    assert lock_path(folder).parent == folder.parent


def test_a_store_of_somebody_else_can_be_read(tmp_path, monkeypatch):
    made = Store(tmp_path).make(recipe())

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    assert Store(tmp_path).make(recipe()).folder == made.folder


@pytest.mark.parametrize(
    "change",
    [
        {"identity": []},
        {"identity": {"config": 5}},
        {"identity": {"upstream": [1]}},
        {"identity": {"config": {"a": float("nan")}}},
        {"files": ["a"]},
        {"files": {"a": {"bytes": [], "sha256": "x"}}},
        {"files": {"a": {"bytes": "5", "sha256": "x"}}},
        {"files": 5},
    ],
)
def test_a_manifest_of_odd_values_is_damaged_and_ends_no_list(tmp_path, change):
    store = Store(tmp_path)
    folder = store.make(recipe()).folder
    manifest = json.loads((folder / MANIFEST).read_text()) | change
    manifest.pop("sum", None)  # as older versions sealed
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (entry,) = entries(store)
    assert entry.damage is not None and MANIFEST in entry.damage
    with pytest.raises(ArtifactError, match="damaged"):
        store.make(recipe())


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_json_of_brackets_is_damage_wherever_it_stands(tmp_path, text):
    store = Store(tmp_path)
    folder = store.make(recipe()).folder
    (folder / MANIFEST).write_text(text)
    (entry,) = entries(store)
    assert entry.damage is not None
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "0.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"0\.json"):
        used_names(store, [])


def test_what_somebody_else_left_stays_and_the_rest_is_listed(tmp_path, monkeypatch, capsys):
    store = Store(tmp_path)
    held = store.make(recipe())
    remains = held.folder.with_name("0123456789abcdef.building")
    remains.mkdir()

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("prefetch.stock.shutil.rmtree", refuse)
    run(Cfg(None), store)
    said = capsys.readouterr().out
    assert remains.exists() and "removed" not in said and held.key in said


def test_the_list_names_who_made_what_in_full(tmp_path, capsys):
    def build(folder: Path, _) -> None:
        (folder / "it").write_text("")

    store = Store(tmp_path)
    trace = Recipe("predictions", 1, {"source": "llama_eval_callback"}, build, {}, (), {})
    settings = {"predictor": "activation_matrix", "fold": 3}
    store.make(Recipe("predictions", 1, settings, build, {"predictions": trace}, (), {}))
    run(Cfg(None), store)
    told = capsys.readouterr().out
    assert "llama_eval_callback" in told and "activation_matrix" in told
    assert f"predictions/{trace.key}" in told
