"""Training a net: settings that all nets share, and one routine for all, deterministic in its seed.

torch and Lightning are imported when a net is trained, not before; `learner` is their side of it. It knows no
predictor and no trace.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import signal
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prefetch.errors import ConfigError, PrefetchError
from prefetch.threads import one_thread
from prefetch.zipped import check_stored

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from prefetch.predict.networks.learner import Learner

    Examples = Sequence[Tensor] | Dataset[Any]  # tensors of one length, or a data set of batches
    Loss = Callable[[nn.Module, Any], Tensor]  # of one batch
    Score = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]  # whole numbers: right, of how many

log = logging.getLogger(__name__)
LARGEST_GRADIENT = 1.0
STARTS_AGAIN = ("ddp", "ddp_find_unused_parameters_true", "fsdp")  # run the command once per device


class Diverged(PrefetchError):
    """The loss is no number any more."""


@dataclass(frozen=True)
class Training:
    """How long, how fast and on what. A predictor has fields of these names; `training_of` collects them."""

    epochs: int = 10
    learning_rate: float = 1e-3
    batch: int = 512  # rows of a step, on every device
    patience: int = 3  # epochs without a better validation score before it stops
    seed: int = 0
    accelerator: str = "cpu"  # Lightning's: gpu, ...; with auto one setting would mean two results
    devices: int | str = 1
    strategy: str = "auto"  # with several devices: ddp_spawn
    resume: Path | str | None = None  # a folder: an interrupted fit goes on from its last epoch

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch", 1), ("patience", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: must be at least {least}, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate: must be above 0, got {self.learning_rate}")
        if self.strategy in STARTS_AGAIN:
            raise ConfigError(
                f"strategy={self.strategy}: starts this command again for every device, and each would wait for "
                "the artifact that the first one makes; use strategy=ddp_spawn"
            )

    @property
    def launched(self) -> str:
        """Lightning's strategy: its `auto` would start the command again for several devices."""
        is_one = str(self.devices) == "1"
        return "ddp_spawn" if self.strategy == "auto" and not is_one else self.strategy


def training_of(predictor: Any) -> Training:
    names = [field.name for field in dataclasses.fields(Training)]
    return Training(
        **{name: getattr(predictor, name) for name in names if hasattr(predictor, name)}
    )


def check(predictor: Any, *sizes: str) -> None:
    """Settings of a network: sizes of at least 1, a dropout below 1, and those of `Training`."""
    for name in sizes:
        if getattr(predictor, name) < 1:
            raise ConfigError(f"{name}: must be at least 1, got {getattr(predictor, name)}")
    dropout = getattr(predictor, "dropout", 0)
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout: must be a share below 1, got {dropout}")
    training_of(predictor)


def train_net(
    net: nn.Module,
    train: Examples,
    validation: Examples,
    *,
    loss: Loss,
    score: Score,
    settings: Training,
    title: str = "training",
    curve: list[dict[str, float]] | None = None,
) -> float | None:
    """Leaves the weights of the best epoch in `net`, on the CPU; returns its validation score.

    `title` tells this fit from the others that share its folder to resume from.

    `curve` gets a row per epoch: epoch, loss, score.

    A data set of batches has `__getitems__(row numbers) -> tensors` beside its length. Without validation rows the
    last epoch counts as the best one, and None comes back.
    """
    from prefetch.predict.networks.learner import Learner, loader_of, trainer_of, watchers_of

    learner = Learner(net, loss, score, settings)
    loaders = [loader_of(train, settings, is_shuffled=True), loader_of(validation, settings)]
    if not len(loaders[1]):
        loaders.pop()
    path = _checkpoint(net, loaders, settings, title)
    with alone(settings.seed), _quiet(), tempfile.TemporaryDirectory() as scratch:
        best, watched, others = watchers_of(settings, path, title, has_validation=len(loaders) > 1)
        trainer = trainer_of(settings, [best, *others], Path(scratch))
        _run(trainer, learner, loaders, path)
    learner.cpu()
    best.put_back(learner)
    if curve is not None:
        curve += watched.rows
    return float(learner.best_score) if len(loaders) > 1 else None


@contextmanager
def alone(seed: int) -> Iterator[None]:
    """One thread and random numbers of its own; afterwards threads, generator and switches are as before."""
    import torch

    is_strict = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(is_strict, warn_only=only_warns)


def flat(net: nn.Module) -> NDArray[np.float32]:
    """All that a net learnt, in one array."""
    return np.concatenate([tensor.detach().numpy().ravel() for tensor in net.state_dict().values()])


def fill(net: nn.Module, weights: NDArray[np.float32]) -> None:
    """Puts it back."""
    import torch

    at, state = 0, dict[str, Any]()
    for name, tensor in net.state_dict().items():
        part = weights[at : at + tensor.numel()]
        state[name] = torch.from_numpy(part.reshape(tensor.shape).copy())
        at += tensor.numel()
    net.load_state_dict(state)


def _run(trainer: pl.Trainer, learner: Learner, loaders: list[Any], path: Path | None) -> None:
    """Ctrl-C stays Ctrl-C: Lightning would end the process instead, and ignore the next one."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    started = path if path is not None and _is_whole(path) else None
    try:
        told, asked = loaders[0], loaders[1] if len(loaders) > 1 else None
        trainer.fit(learner, told, asked, ckpt_path=started, weights_only=True)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except Exception as error:
        last = str(error).strip().rpartition("\n")[2]  # another process tells its error as text
        name = f"{Diverged.__module__}.{Diverged.__name__}: "
        if not last.startswith(name):
            raise
        raise Diverged(last.removeprefix(name)) from error
    finally:
        if is_main and signal.getsignal(signal.SIGINT) is not before:
            signal.signal(signal.SIGINT, before)


def _checkpoint(net: nn.Module, loaders: list[Any], settings: Training, title: str) -> Path | None:
    """Every fit has a file of its own, named by all that it starts from: no other fit can go on from it.

    The title counts: nets of two horizons can start from the same weights and rows, and differ in what they see.
    """
    if settings.resume is None:
        return None
    digest = hashlib.blake2b(repr((title, dataclasses.replace(settings, resume=None))).encode())
    for parameter in net.state_dict().values():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    for loader in loaders:
        rows, size = len(loader.dataset), settings.batch
        for start in range(0, rows, size):
            batch = loader.dataset.__getitems__(list(range(start, min(start + size, rows))))
            for tensor in batch:
                digest.update(tensor.numpy().tobytes())
    folder = Path(settings.resume)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{digest.hexdigest()[:16]}.ckpt"


def _is_whole(path: Path) -> bool:
    """Whether an interrupted fit can go on from this file; torch itself checks no sums, and data alone is read."""
    import torch

    if not path.exists():
        return False
    try:
        with path.open("rb") as file:
            check_stored(file)
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()
        if damaged is not None:
            raise ValueError(f"the sum of {damaged} is wrong")
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes of its reader
        reason = str(error).strip().partition("\n")[0]
        log.warning("%s: damaged, so this fit begins anew (%s)", path, reason)
        return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's advice about loaders, loggers and devices is not about these small fits."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
