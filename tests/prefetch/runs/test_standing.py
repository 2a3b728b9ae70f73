"""Whether a folder holds the very run that is asked for: the same settings, by the same code."""

from pathlib import Path

import pytest

from prefetch.errors import ConfigError
from prefetch.runs import standing
from prefetch.runs.outputs import write_json
from prefetch.runs.standing import Standing


def run_in(folder: Path, **settings: object) -> Standing:
    return Standing(folder, "collect", ["stage=collect"], settings)


def finish(one: Standing) -> None:
    with one.kept():
        write_json(one.folder / "metrics.json", {"tokens": 5})


def test_a_finished_run_is_found_and_one_of_other_settings_is_not(tmp_path):
    finish(run_in(tmp_path, seed=1))
    assert run_in(tmp_path, seed=1).done() == {"tokens": 5}
    assert run_in(tmp_path, seed=1, tracker="another").done() == {"tokens": 5}
    assert run_in(tmp_path, seed=2).done() is None


def test_a_run_of_other_code_is_not_found_though_nothing_was_committed(tmp_path, monkeypatch):
    """Any two states of a working tree with changes have one name to git."""
    monkeypatch.setattr(standing, "git_commit", lambda: "0123abcd-dirty")
    finish(run_in(tmp_path))
    monkeypatch.setattr(standing, "code_digest", lambda: "edited")
    assert run_in(tmp_path).done() is None


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_a_run_that_did_not_end_well_is_not_found(tmp_path, error):
    with pytest.raises(type(error)), run_in(tmp_path).kept():
        write_json(tmp_path / "metrics.json", {"tokens": 5})
        raise error
    assert run_in(tmp_path).done() is None


def test_who_is_refused_a_folder_leaves_the_settings_of_who_has_it(tmp_path):
    """Hydra writes its own before anything of ours is asked; a report would put them beside the other's numbers."""
    hydra = tmp_path / ".hydra" / "overrides.yaml"
    hydra.parent.mkdir()
    hydra.write_text("- seed=1\n")
    with run_in(tmp_path, seed=1).kept():
        hydra.write_text("- seed=2\n")
        with pytest.raises(ConfigError, match="another process"), run_in(tmp_path, seed=2).kept():
            pass
    assert hydra.read_text() == "- seed=1\n"
