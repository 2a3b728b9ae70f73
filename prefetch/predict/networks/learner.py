"""The Lightning side of a fit: loss and optimizer, the best weights, and where an interrupted fit goes on.

Imported by `training` when a net is trained: Lightning takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from prefetch.errors import ConfigError
from prefetch.predict.networks.training import LARGEST_GRADIENT, Diverged, Training
from prefetch.progress import Progress

if TYPE_CHECKING:
    from prefetch.predict.networks.training import Examples, Loss, Score

WARM_UP, LAST_SHARE = 0.05, 0.05  # of the steps; of the learning rate
WEIGHT_DECAY = 0.01
SCORE, LOSS = "score", "loss"


class Learner(pl.LightningModule):
    """Loss and optimizer of a net that was built elsewhere."""

    def __init__(self, net: nn.Module, loss: Loss, score: Score, settings: Training) -> None:
        super().__init__()
        self.net, self.settings = net, settings
        self._loss, self._score = loss, score
        self._right_of: list[Tensor] = []
        self.best_score: Tensor
        self.register_buffer("best_score", torch.tensor(math.nan))  # of the weights beside it

    def on_train_epoch_start(self) -> None:
        """What dropout draws depends on the epoch and not on what ran before it: a resumed fit draws the same."""
        torch.manual_seed(self.settings.seed * 1_000_003 + self.current_epoch)

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss = self._loss(self.net, batch)
        self.log(LOSS, loss, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        if not torch.isfinite(loss):
            raise Diverged(
                f"the loss is not a number in epoch {self.current_epoch + 1} of {self.settings.epochs}, at "
                f"learning_rate={self.settings.learning_rate:g}: lower learning_rate, to a tenth first; if that does "
                "not help, the recorded inputs are not what the model computed"
            )
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self._right_of.append(torch.stack(self._score(self.net, batch)))

    def on_validation_epoch_end(self) -> None:
        sums = torch.stack(self._right_of).sum(0)
        right, of = self.trainer.strategy.reduce(sums, reduce_op="sum")  # of all devices
        self._right_of.clear()
        self.log(SCORE, right.float() / of.clamp(min=1), sync_dist=True)

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.AdamW(
            self.parameters(), self.settings.learning_rate, weight_decay=WEIGHT_DECAY
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def _share(step: int, steps: int) -> float:
    """Of the learning rate: a warm-up, then a cosine."""
    warm = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return warm * (LAST_SHARE + (1 - LAST_SHARE) * fall)


class Rows(Dataset[Any]):
    """Tensors of one length; a batch is cut from all of them at once."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        lengths = {len(tensor) for tensor in tensors}
        if len(lengths) != 1:
            raise ValueError(f"expected tensors of one length, got {sorted(lengths)}")
        self.tensors = tuple(tensors)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, row: int) -> tuple[Tensor, ...]:
        return tuple(tensor[row] for tensor in self.tensors)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, ...]:
        which = torch.tensor(rows)
        return tuple(tensor[which] for tensor in self.tensors)


class Shuffled(Sampler[int]):
    """An order that depends on the seed and the epoch alone; Lightning tells it the epoch."""

    def __init__(self, n_rows: int, seed: int) -> None:
        self.n_rows, self.seed, self.epoch = n_rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.n_rows, generator=generator).tolist())

    def __len__(self) -> int:
        return self.n_rows


def loader_of(
    examples: Examples, settings: Training, *, is_shuffled: bool = False
) -> DataLoader[Any]:
    rows: Any = examples if isinstance(examples, Dataset) else Rows(examples)
    sampler = Shuffled(len(rows), settings.seed) if is_shuffled else None
    own = torch.Generator()  # else every iterator draws from the one that dropout draws from
    return DataLoader(rows, settings.batch, sampler=sampler, collate_fn=_as_it_is, generator=own)


def _as_it_is(batch: Any) -> Any:
    """`__getitems__` made the batch already."""
    return batch


class Best(pl.Callback):
    """The weights of the epoch with the best validation score."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        score = trainer.callback_metrics[SCORE]
        if not self.weights or score > self.weights["best_score"]:
            weights = {**learner.state_dict(), "best_score": score}
            self.weights = {name: weight.detach().cpu().clone() for name, weight in weights.items()}

    def on_fit_end(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        self.put_back(learner)  # here, because a process of its own hands over nothing but weights

    def put_back(self, learner: pl.LightningModule) -> None:
        if self.weights:
            learner.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state["weights"]


class Curve(pl.Callback):
    """Loss and validation score of every epoch; part of a checkpoint, so that a resumed fit has all of it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        known = {n: float(v) for n, v in trainer.callback_metrics.items() if n in (SCORE, LOSS)}
        self.rows.append({"epoch": trainer.current_epoch + 1, **known})

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows[:] = state["rows"]


class Resume(pl.Callback):
    """Writes where a fit stands after every epoch; a half-written file never looks whole."""

    def __init__(self, path: Path, stopping: EarlyStopping | None) -> None:
        self.path, self.stopping = path, stopping

    def on_train_start(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        if self.stopping is not None and self.stopping.wait_count >= self.stopping.patience:
            trainer.should_stop = True  # it had stopped early, and was asked again

    def on_train_epoch_end(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        half = self.path.with_suffix(".half")
        trainer.save_checkpoint(half)  # all devices take part
        if trainer.is_global_zero:
            half.replace(self.path)


class Shown(pl.Callback):
    """The project's own bar: on a terminal only."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._bar: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            steps = int(trainer.estimated_stepping_batches)
            self._bar = Progress(self.title, steps, "steps").__enter__()
            self._bar.advance(trainer.global_step)

    def on_train_batch_end(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.advance()

    def on_train_end(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
        self._bar = None

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()


def watchers_of(
    settings: Training, path: Path | None, title: str, *, has_validation: bool
) -> tuple[Best, Curve, list[pl.Callback]]:
    """What watches a fit: its best weights, its curve; when to stop, where to go on, how far it is."""
    curve = Curve()
    others: list[pl.Callback] = [Shown(title), curve]
    stopping = None
    if has_validation:
        stopping = EarlyStopping(
            SCORE, patience=settings.patience, mode="max", check_on_train_epoch_end=False
        )
        others.append(stopping)
    if path is not None:
        others.append(Resume(path, stopping))
    return Best(), curve, others


def trainer_of(settings: Training, callbacks: list[pl.Callback], scratch: Path) -> pl.Trainer:
    try:
        return _trainer(settings, callbacks, scratch)
    except Exception as error:  # Lightning asks its devices here, and refuses with many kinds
        raise ConfigError(
            f"accelerator={settings.accelerator}, devices={settings.devices}, strategy={settings.strategy}: Lightning "
            f"cannot train so ({type(error).__name__}: {str(error)[:300]})"
        ) from error


def _trainer(settings: Training, callbacks: list[pl.Callback], scratch: Path) -> pl.Trainer:
    return pl.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        strategy=settings.launched,
        max_epochs=settings.epochs,
        gradient_clip_val=LARGEST_GRADIENT,
        deterministic="warn",
        callbacks=callbacks,
        default_root_dir=scratch,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
