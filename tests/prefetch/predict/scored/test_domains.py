"""Learning from some domains only: who was learnt from, what is tested, and two domains that contradict each other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from prefetch import config
from prefetch.artifacts import Store
from prefetch.config import Config
from prefetch.errors import ConfigError, PrefetchError
from prefetch.predict.part import Part
from prefetch.predict.scored.domains import SEVERAL, of_units, only
from prefetch.predict.train import run
from prefetch.runs.outputs import Outputs
from prefetch.trace.card import plain_card
from prefetch.trace.provenance import Provenance
from prefetch.trace.routing import RoutingTrace, trace_of
from prefetch.trace.writer import TraceWriter
from prefetch.tracking import NoTracker

EXPERTS, LAYERS, REQUESTS, TOKENS = 8, 5, 40, 12


def up_and_down() -> RoutingTrace:
    """Choices walk up the experts from layer to layer in requests of one domain, down in those of the other."""
    rng = np.random.default_rng(0)
    request_T = np.repeat(np.arange(REQUESTS), TOKENS)
    domain_T = request_T % 2
    start_T = rng.integers(0, EXPERTS, len(request_T))
    step_T = np.where(domain_T == 0, 1, -1)
    ids_TL = (start_T[:, None] + step_T[:, None] * np.arange(LAYERS)) % EXPERTS
    card = plain_card("up and down", n_experts=EXPERTS, top_k=1, layer_numbers=tuple(range(LAYERS)))
    trace = trace_of(card, ids_TL[..., None], request_T=request_T)
    return dataclasses.replace(
        trace, domain_T=domain_T.astype(trace.domain_T.dtype), domains=("up", "down")
    )


def trained(tmp_path: Path, *words: str) -> tuple[dict[str, float], Path]:
    folder = tmp_path / "trace"
    if not folder.exists():
        folder.mkdir()
        writer = TraceWriter(folder, Provenance("synthetic", "test"), max_dropped=0.5)
        writer.begin(up_and_down().card)
        writer.append(up_and_down())
        writer.close()
    told = (
        "stage=train", f"store={tmp_path / 'store'}", f"trace={folder}", "predictor=markov", "train.horizons=[1,2]",
        "train.figures=false", "train.baselines=none", *words,
    )  # fmt: skip
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        cfg = cast(Config, compose("config", overrides=list(told)))
    out = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
    return run(cfg, Store(cfg.store, makers=cfg.makers), Outputs(out, NoTracker())), out


def test_what_was_learnt_from_one_domain_fails_on_the_opposite(tmp_path: Path) -> None:
    told, folder = trained(tmp_path, "train.domains=[up]")
    table = pd.read_csv(folder / "by_domain.csv").set_index(["horizon", "domain"])
    assert table.loc[(1, "up"), "recall_at_k"] == 1
    assert table.loc[(1, "down"), "recall_at_k"] < 0.01
    assert table.loc[(1, "up"), "was_learnt"] and not table.loc[(1, "down"), "was_learnt"]
    assert told["recall_at_k_learnt_domains"] == 1 and told["recall_at_k_other_domains"] < 0.01
    both, folder = trained(tmp_path)
    assert "recall_at_k_other_domains" not in both
    assert pd.read_csv(folder / "by_domain.csv").was_learnt.all()
    assert 0.3 < both["recall_at_k"] < 0.7, "two steps are equally likely, of which one is right"
    assert told["requests"] == both["requests"] == REQUESTS, "the same requests are tested"


def test_only_their_requests_are_fitted_on(tmp_path: Path) -> None:
    trained(tmp_path, "train.domains=[down]", "train.folds=1")
    (about,) = tmp_path.glob("store/predictor/*/predictor.json")
    fitted = json.loads(about.read_text())["fitted_requests"]
    assert fitted and all(request % 2 == 1 for request in fitted)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("[sideways]", "'sideways' is no domain of this trace; it has up, down"),
        ("[]", "no request"),
    ],
)
def test_a_domain_that_is_not_there_is_named(tmp_path: Path, word: str, said: str) -> None:
    with pytest.raises(PrefetchError, match=said):
        trained(tmp_path, f"train.domains={word}")


def test_units_of_several_domains_say_so() -> None:
    part = Part(up_and_down(), np.arange(4))
    assert of_units(part, np.array([0, 1, 2, 3])) == ("up", "down", "up", "down")
    assert of_units(part, np.array([0, 0, 1, 2])) == (SEVERAL, "up", "down")


def test_a_split_in_time_knows_no_domains() -> None:
    with pytest.raises(ConfigError, match="split in time"):
        only(Part(up_and_down(), np.arange(4), stop=10), ["up"])
