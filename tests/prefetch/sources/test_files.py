"""Finding files, naming them, and lending a card: no file lost, none read twice, no size overwritten."""

import pytest

from prefetch.errors import ConfigError, PrefetchError
from prefetch.models.cards import load_card
from prefetch.sources.files import FileSource, find_files


def touched(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)


def test_no_file_is_lost_where_two_have_the_same_name(tmp_path, monkeypatch):
    touched(tmp_path, "x.csv", "sub/x.csv")
    monkeypatch.chdir(tmp_path)
    assert len(find_files(["sub/x.csv", "x.csv"], (".csv",))) == 2


def test_a_file_that_is_named_twice_is_refused(tmp_path, monkeypatch):
    touched(tmp_path, "x.csv")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is named twice"):
        find_files(["x.csv", str(tmp_path / "x.csv")], (".csv",))


def test_a_moved_list_of_files_is_the_same(tmp_path):
    names = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        touched(tmp_path / place, "a/x.csv", "b/x.csv")
        names.append(
            list(find_files([str(tmp_path / place / n) for n in ("a/x.csv", "b/x.csv")], (".csv",)))
        )
    assert names[0] == names[1]


@pytest.mark.parametrize("path", ["~nouser/x", "/tmp/" + "a" * 300])
def test_a_path_that_cannot_be_is_refused_in_words(path):
    with pytest.raises(PrefetchError, match=r"source\.path"):
        find_files(path, (".csv",))


def test_sizes_that_the_file_has_win_over_those_that_a_card_lends():
    source = FileSource(path="x", model_card="qwen3_30b_a3b")
    card = source.card(
        "x", n_experts=128, top_k=6, layer_numbers=tuple(range(48)), expert_bytes_L=(5,) * 48
    )
    assert card.expert_bytes_L == (5,) * 48


def test_a_card_of_two_stacks_lends_the_layers_of_the_one_that_was_named():
    layers = {"n_experts": 128, "top_k": 1, "layer_numbers": (1, 3, 5, 7, 9, 11)}
    for stack in ("encoder", "decoder"):
        card = FileSource(path="x", model_card="switch_base_128", stack=stack).card("x", **layers)
        assert set(card.layer_stacks) == {stack} and len(card.expert_bytes_L) == 6
    said = (
        r"has 6 MoE layers \(1 to 11\), the file 1 MoE layer \(2\): .*source.stack names the other"
    )
    with pytest.raises(ConfigError, match=said):
        FileSource(path="x", model_card="switch_base_128").card(
            "x", **{**layers, "layer_numbers": (2,)}
        )


def test_a_file_that_counts_its_layers_from_zero_gets_the_true_numbers():
    source = FileSource(path="x", model_card="deepseek_v2_lite")
    card = source.card("x", n_experts=64, top_k=6, layer_numbers=tuple(range(26)))
    assert card.layer_numbers == tuple(range(1, 27))


def test_a_card_file_in_another_encoding_is_refused_in_words(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(ConfigError):
        load_card(tmp_path / "c.yaml")
