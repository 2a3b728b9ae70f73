"""A net per layer on gate inputs: it finds what a router leaves behind, and owes what every predictor owes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded_traces import check_causal, check_restored, check_same_bytes, recall, recorded, routed
from routing_traces import random_trace

from prefetch.errors import ConfigError, MissingData
from prefetch.predict.hidden_mlp import HiddenMlp
from prefetch.predict.networks.layer_nets import Weights, popular_logits, scores_of
from prefetch.predict.networks.nets import LayerNets
from prefetch.predict.networks.training import Diverged
from prefetch.predict.part import Part, whole
from prefetch.predict.past import Past

QUICK = {"hidden": 8, "epochs": 2, "batch": 64}


def test_it_learns_what_routers_do() -> None:
    """Inputs that stand still: the layer before holds the answer, and other tokens teach how to read it."""
    told, asked = routed(0, 1600)[0], routed(1)[0]
    fitted = HiddenMlp((1, 3), hidden=32, epochs=5, batch=64).fit(whole(told), whole(asked))
    for horizon in (1, 3):
        scores_TLE = fitted.scores(Past(asked, horizon))
        assert recall(scores_TLE, asked, horizon) > 0.85
        assert (scores_TLE[:, :horizon] == scores_TLE[0, :horizon]).all()


def test_folded_weights_give_what_the_net_gives() -> None:
    rng = np.random.default_rng(0)
    x_TLD = (5 + 3 * rng.normal(size=(7, 3, 6))).astype(np.float16)
    mean, scale = torch.full((3, 6), 5.0), torch.full((3, 6), 3.0)
    for is_linear in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            net = LayerNets(mean, scale, torch.randn(3, 4), 9, is_linear=is_linear)
        expected = net(torch.from_numpy(x_TLD)).detach().numpy()
        weights = Weights(*(part.detach().numpy() for part in net.folded()))
        found = scores_of(x_TLD, weights, np.zeros((3, 4), np.float32), is_linear=is_linear)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_what_every_predictor_owes(tmp_path: Path) -> None:
    trace, other = recorded(0), recorded(1)
    parts = whole(trace), whole(other)
    fitted = HiddenMlp((1, 2), **QUICK).fit(*parts)
    check_same_bytes(fitted, HiddenMlp((1, 2), **QUICK).fit(*parts))
    check_restored(fitted, HiddenMlp((1, 2), **QUICK), trace, tmp_path)
    check_causal(fitted, trace, other)
    reseeded = HiddenMlp((1, 2), seed=1, **QUICK).fit(*parts)
    assert (reseeded.inner_HLDM_ != fitted.inner_HLDM_).any()


def test_rows_without_an_input_are_guessed_by_popularity() -> None:
    """As in a model of two stacks, where a token runs one of them; a layer that never had one learns nothing."""
    trace = recorded(0)
    trace.gate_inputs_TLD[::2, 1] = 0
    trace.gate_inputs_TLD[:, 2] = 0
    fitted = HiddenMlp((1,), **QUICK).fit(whole(trace), whole(trace))
    scores_TLE = fitted.scores(Past(trace, 1))
    np.testing.assert_array_equal(scores_TLE[::2, 2], np.tile(fitted.popular_LE_[2], (120, 1)))
    np.testing.assert_array_equal(scores_TLE[:, 3], np.tile(fitted.popular_LE_[3], (240, 1)))
    assert (scores_TLE[1::2, 2] != fitted.popular_LE_[2]).any()


def test_inputs_that_are_no_numbers_spoil_nothing() -> None:
    trace = recorded(0)
    trace.gate_inputs_TLD[3, 1] = np.nan
    trace.gate_inputs_TLD[5, 1, 2] = np.nan
    fitted = HiddenMlp((1,), **QUICK).fit(whole(trace), whole(trace))
    assert np.isfinite(fitted.scores(Past(trace, 1))).all()


def test_no_validation_rows_and_horizons_beyond_the_model() -> None:
    trace = recorded(0)
    none = Part(trace, np.zeros(0, np.int64))
    fitted = HiddenMlp((9,), **QUICK).fit(whole(trace), none)
    assert (fitted.scores(Past(trace, 9)) == fitted.popular_LE_).all()
    HiddenMlp((1,), **QUICK).fit(whole(trace), none)


def test_a_learning_rate_that_is_too_large_is_named() -> None:
    part = whole(recorded(0))
    with pytest.raises(Diverged, match=r"learning_rate=1e\+30"):
        HiddenMlp((1,), **{**QUICK, "learning_rate": 1e30}).fit(part, part)


def test_an_interrupted_fit_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped within the second horizon: the first one is found again, the second goes on."""
    from prefetch.predict.networks import nets

    parts, calls, whole_loss = (
        (whole(recorded(0)), whole(recorded(1))),
        iter(range(99)),
        nets.each_alone,
    )
    undisturbed = HiddenMlp((1, 2), **QUICK).fit(*parts)

    def interrupted(net: torch.nn.Module, batch: nets.Batch) -> torch.Tensor:
        if next(calls) == 13:  # four steps an epoch, two epochs a horizon
            raise KeyboardInterrupt
        return whole_loss(net, batch)

    resumed = HiddenMlp((1, 2), **QUICK)
    resumed.resume = tmp_path
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(nets, "each_alone", interrupted)
        resumed.fit(*parts)
    assert len(list(tmp_path.iterdir())) == 2
    check_same_bytes(resumed.fit(*parts), undisturbed)


def test_no_more_tokens_are_learnt_from_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some requests are drawn; they are learnt from as if they were all there is."""
    many, asked = whole(recorded(0, n_requests=12)), whole(recorded(1))
    popular_LE = popular_logits(many)
    monkeypatch.setattr("prefetch.predict.networks.layer_nets.popular_logits", lambda _: popular_LE)
    capped = HiddenMlp((1,), hidden=8, epochs=1, most_tokens=100, seed=3).fit(many, asked)
    few, few_asked = many.some(100, 3), asked.some(100, 3)
    assert len(few.requests) == 5
    check_same_bytes(capped, HiddenMlp((1,), hidden=8, epochs=1, seed=3).fit(few, few_asked))
    with pytest.raises(ConfigError, match="most_tokens: must be at least 1, got 0"):
        HiddenMlp(most_tokens=0)


def test_what_is_wrong_is_said_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="hidden: must be at least 1"):
        HiddenMlp(hidden=0)
    with pytest.raises(ConfigError, match="epochs: must be at least 1"):
        HiddenMlp(epochs=0)
    with pytest.raises(MissingData, match="gate_inputs"):
        HiddenMlp().fit(whole(random_trace()), whole(random_trace()))


def test_importing_it_does_not_import_torch() -> None:
    names = "hidden_mlp", "pre_attention", "gate_lookahead", "linear", "networks.training"
    code = "".join(f"import prefetch.predict.{name}; " for name in names) + "import sys; "
    code += "print(sorted({'torch', 'lightning', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
