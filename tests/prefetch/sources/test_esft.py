"""ESFT's text: what is written comes back, per task, and files that do not fit each other are refused."""

import gzip

import numpy as np
import pytest

from prefetch.errors import FormatError
from prefetch.sources.esft import Esft

E, K = 12, 3


def text(ids_SK, weights_SK):
    """One line."""
    parts = (
        "\t".join(str(i) for i in ids_SK.ravel()),
        "\t".join(f"{w:.4f}" for w in weights_SK.ravel()),
    )
    return "\t\t".join(parts) + "\n"


def write(folder, seed, lengths=(4, 1, 7), layers=(1, 2)):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    ids, weights = {}, {}
    for layer in layers:
        ids[layer] = rng.random((sum(lengths), E)).argsort(axis=1)[:, :K]
        weights[layer] = rng.random((sum(lengths), K)).round(4)
        cuts = np.cumsum(lengths)[:-1]
        lines = map(text, np.split(ids[layer], cuts), np.split(weights[layer], cuts))
        (folder / f"expert_weights_{layer}.txt").write_text("".join(lines))
    return np.stack(list(ids.values()), axis=1), np.stack(list(weights.values()), axis=1)


def test_what_is_written_comes_back(collect, tmp_path):
    ids, weights = write(tmp_path / "law", 0, layers=(1, 2, 10))
    reader = collect(Esft(path=str(tmp_path), top_k=K, n_experts=E))
    trace = reader.load("weights")
    assert reader.card.layer_numbers == (1, 2, 10)  # by number, not by name
    np.testing.assert_array_equal(trace.ids_TLK, ids)
    np.testing.assert_array_equal(trace.weights_TLK, weights.astype(np.float16))
    assert trace.request_T.tolist() == [0] * 4 + [1] + [2] * 7


def test_folders_are_domains_and_gzip_is_read(collect, tmp_path):
    write(tmp_path / "law", 0)
    write(tmp_path / "intent", 1)
    plain = tmp_path / "law" / "expert_weights_1.txt"
    (tmp_path / "law" / "expert_weights_1.txt.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    reader = collect(Esft(path=str(tmp_path), top_k=K, n_experts=E))
    assert sorted(reader.domains) == ["intent", "law"] and reader.n_requests == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], r"expert_weights_2.*expected 3 lines .* got 2"),
        (
            lambda lines: [lines[0], lines[2], lines[1]],
            r"expert_weights_2.*line 2: expected 1 tokens",
        ),
        (
            lambda lines: [lines[0].replace("\t\t", "\t"), "1\t2\n", lines[2]],
            r"line 2: expected 3 ids",
        ),
        (lambda lines: ["0.5" + lines[0][1:], *lines[1:]], r"line 1: expected expert ids"),
        (lambda lines: ["layer\n", *lines[1:]], r"line 1: expected ids and weights, got 'layer'"),
        (lambda lines: [*lines[:2], lines[2][:-1]], r"the last line has no end"),
    ],
)
def test_files_that_do_not_fit(collect, tmp_path, change, message):
    write(tmp_path, 0)
    path = tmp_path / "expert_weights_2.txt"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    with pytest.raises(FormatError, match=message):
        collect(Esft(path=str(tmp_path), top_k=K, n_experts=E))


def test_the_wrong_k_is_refused(collect, tmp_path):
    write(tmp_path, 0)
    with pytest.raises(FormatError, match=r"expert_weights_1.txt.*source.top_k"):
        collect(Esft(path=str(tmp_path), top_k=5, n_experts=E))
