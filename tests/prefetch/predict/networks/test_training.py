"""The shared training routine: deterministic, interrupted without a trace, clear when the loss is lost."""

from __future__ import annotations

import dataclasses
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prefetch.errors import ConfigError, PrefetchError
from prefetch.predict.networks.training import Diverged, Training, train_net


def net_of(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 1))


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
    return x, x @ torch.arange(8.0).reshape(8, 1)


def loss(net: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(net(batch[0]), batch[1])


def score(net: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    right = (net(batch[0]) > 0) == (batch[1] > 0)
    return right.sum(), torch.tensor(right.numel())


def trained(settings: Training, loss: Callable[..., Tensor] = loss) -> tuple[Any, ...]:
    net = net_of()
    best = train_net(net, rows(900, 0), rows(200, 1), loss=loss, score=score, settings=settings)
    return best, *(parameter.detach().numpy().tobytes() for parameter in net.parameters())


def interrupted_at(step: int) -> Callable[..., Tensor]:
    steps = iter(range(step + 1))

    def interrupted(net: nn.Module, batch: Any) -> Tensor:
        if next(steps) == step:
            raise KeyboardInterrupt
        return loss(net, batch)

    return interrupted


def test_same_seed_same_bytes_and_nothing_else_moves() -> None:
    before = torch.get_num_threads(), torch.random.get_rng_state(), signal.getsignal(signal.SIGINT)
    one, two = trained(Training(epochs=3)), trained(Training(epochs=3))
    assert one == two and one[1:] != trained(Training(epochs=3, seed=1))[1:]
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert signal.getsignal(signal.SIGINT) is before[2]
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_best_epoch_is_kept() -> None:
    """What comes back is the score of the weights that stay, under dropout that is off."""
    net = net_of()
    settings = Training(epochs=6, learning_rate=0.5)
    best = train_net(net, rows(900, 0), rows(200, 1), loss=loss, score=score, settings=settings)
    right, of = score(net.eval(), rows(200, 1))
    assert best == pytest.approx(float(right / of), abs=1e-6)


@pytest.mark.parametrize("patience", [1, 99], ids=["stops early", "to the end"])
def test_interrupted_and_resumed_ends_like_an_undisturbed_one(
    tmp_path: Path, patience: int
) -> None:
    settings = Training(epochs=8, patience=patience, learning_rate=0.05, batch=300)
    undisturbed = trained(settings)
    resumed = dataclasses.replace(settings, resume=tmp_path / "fits")
    before = signal.getsignal(signal.SIGINT)
    for step in (1, 4, 2):  # in the first epoch, in the second, in the first one after that
        with pytest.raises(KeyboardInterrupt):
            trained(resumed, interrupted_at(step))
        assert signal.getsignal(signal.SIGINT) is before
    assert trained(resumed) == undisturbed
    assert trained(resumed) == undisturbed  # and once more, of a finished one
    assert len(list((tmp_path / "fits").iterdir())) == 1


def test_no_fit_goes_on_from_another_one(tmp_path: Path) -> None:
    plain = Training(epochs=2)
    trained(dataclasses.replace(plain, seed=5, resume=tmp_path))
    assert trained(dataclasses.replace(plain, resume=tmp_path)) == trained(plain)
    assert len(list(tmp_path.iterdir())) == 2
    resumed = dataclasses.replace(plain, resume=tmp_path)
    train_net(net_of(), rows(900, 0), rows(200, 1), loss=loss, score=score, settings=resumed,
              title="the same start, 4 ahead")  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 3


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("was_run"),)


@pytest.mark.parametrize("damage", ["a byte", "cut short", "code"])
def test_a_damaged_checkpoint_is_told_and_the_fit_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    settings = Training(epochs=4, resume=tmp_path / "fits", batch=300)
    with pytest.raises(KeyboardInterrupt):
        trained(settings, interrupted_at(7))
    (path,) = (tmp_path / "fits").iterdir()
    data = path.read_bytes()
    if damage == "code":
        torch.save({"state_dict": Hostile()}, path)
    elif damage == "a byte":
        with zipfile.ZipFile(path) as parts:
            weights = max(parts.infolist(), key=lambda part: part.file_size)
        at = weights.header_offset + weights.file_size // 2 + 100  # within its data
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    else:
        path.write_bytes(data[: len(data) // 2])
    assert trained(settings) == trained(dataclasses.replace(settings, resume=None))
    assert f"{path}: damaged, so this fit begins anew" in caplog.text
    assert not Path("was_run").exists()


def test_a_loss_that_is_no_number_is_one_clear_line() -> None:
    with pytest.raises(Diverged, match=r"epoch 1 of 3, at learning_rate=1e\+30: lower") as found:
        trained(Training(epochs=3, learning_rate=1e30))
    assert isinstance(found.value, PrefetchError) and "\n" not in str(found.value)


def test_without_validation_rows_the_last_epoch_counts() -> None:
    net, before = net_of(), net_of()
    asked = train_net(
        net, rows(100, 0), rows(0, 1), loss=loss, score=score, settings=Training(epochs=2)
    )
    assert asked is None
    assert not torch.equal(next(net.parameters()), next(before.parameters()))


def test_nothing_is_written_where_nothing_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained(Training(epochs=1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 0}, "epochs: must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate: must be above 0"),
        ({"strategy": "ddp"}, "use strategy=ddp_spawn"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Training(**given)


def test_several_devices_are_processes_of_this_command() -> None:
    assert Training(devices=2).launched == "ddp_spawn"
    assert Training().launched == "auto"
