"""Training the embedded model on the spot, on one thread, and the files that it leaves.

It knows no trace and no source: texts by domain go in; weights, merges and held-out tokens come out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from prefetch.errors import ConfigError, FormatError, reading
from prefetch.models.tiny import bpe, corpus
from prefetch.models.tiny.net import Routed, Shape, TinyMoE
from prefetch.progress import Progress
from prefetch.threads import one_thread

HELD_OUT = 0.1  # share of every text, its end, that no training step sees
BPE_BYTES = 200_000  # of every domain: more changes few merges and takes longer
BATCH = 8  # sequences of one step
LEARNING_RATE, WARM_UP_STEPS, LAST_SHARE = 4e-3, 30, 0.1
WEIGHT_DECAY, BETAS, CLIP = 0.05, (0.9, 0.98), 1.0
BALANCE, Z_LOSS = 0.01, 1e-4  # Switch Transformer's and ST-MoE's auxiliary losses
LOSS_WINDOWS = 8  # held-out sequences per domain that the reported loss is a mean over


@dataclass(frozen=True)
class Trained:
    """What `load` gives back: the net, its tokens, and the text it never saw."""

    net: TinyMoE
    coder: bpe.BPE
    held_out: Mapping[str, NDArray[np.int32]]  # domain -> tokens, in the order of the corpus
    corpus_md5: Mapping[str, str]
    held_out_loss: Mapping[str, float]  # untrained, trained: nats per token, mean over the domains


def make(folder: Path, texts: Mapping[str, bytes], shape: Shape, *, steps: int, seed: int) -> None:
    """Learns merges and weights from the first nine tenths of every text, and keeps the tokens of the last."""
    parts = {name: split(text) for name, text in texts.items()}
    coder = bpe.train(b"\n".join(seen[:BPE_BYTES] for seen, _ in parts.values()), shape.vocabulary)
    seen = {name: torch.tensor(coder.encode(part)) for name, (part, _) in parts.items()}
    held_out = {name: torch.tensor(coder.encode(part)) for name, (_, part) in parts.items()}
    _check_lengths(seen, held_out, shape.context)
    generator = torch.Generator().manual_seed(seed)
    net = TinyMoE(shape, generator)
    with one_thread():
        loss = {"untrained": loss_of(net, held_out)}
        fit(net, list(seen.values()), steps, generator)
        loss["trained"] = loss_of(net, held_out)
    save_file(net.state_dict(), folder / "model.safetensors")
    save_file(
        {name: part.int() for name, part in held_out.items()}, folder / "held_out.safetensors"
    )
    about = {
        "shape": asdict(shape),
        "merges": coder.merges,
        "corpus_md5": {name: corpus.md5_of(text) for name, text in texts.items()},
        "training_tokens": {name: len(part) for name, part in seen.items()},
        "held_out_loss": loss,
    }
    (folder / "model.json").write_text(json.dumps(about, indent=1) + "\n")


def load(folder: Path, shape: Shape) -> Trained:
    """Of the shape that was asked for: a file says nothing about how much memory is taken."""
    with reading(folder, f"an embedded model of {shape}"):
        about: dict[str, Any] = json.loads((folder / "model.json").read_text())
        net = TinyMoE(shape, torch.Generator())
        net.load_state_dict(load_file(folder / "model.safetensors"))
        digests, losses = dict(about["corpus_md5"]), dict(about["held_out_loss"])
        held_out = load_arrays(folder / "held_out.safetensors")
        if sorted(digests) != sorted(held_out):
            raise FormatError(f"held-out texts of {sorted(held_out)}, digests of {sorted(digests)}")
        for name, tokens in held_out.items():
            _check_tokens(name, tokens, shape)
        return Trained(
            net=net.requires_grad_(False),
            coder=bpe.BPE(about["merges"]),
            held_out={name: held_out[name] for name in digests},
            corpus_md5={name: str(digest) for name, digest in digests.items()},
            held_out_loss={when: float(loss) for when, loss in losses.items()},
        )


def _check_tokens(name: str, tokens: NDArray[Any], shape: Shape) -> None:
    if tokens.dtype != np.int32 or tokens.ndim != 1 or len(tokens) <= shape.context:
        raise FormatError(
            f"held-out text {name}: expected more than {shape.context} int32 tokens, found {tokens.dtype} "
            f"{tokens.shape}"
        )
    if tokens.min() < 0 or tokens.max() >= shape.vocabulary:
        raise FormatError(f"held-out text {name}: tokens from {tokens.min()} to {tokens.max()}")


def split(text: bytes) -> tuple[bytes, bytes]:
    """What is learnt and what is held out, cut where a line ends."""
    cut = int(len(text) * (1 - HELD_OUT))
    cut = text.rfind(b"\n", 0, cut) + 1 or cut
    return text[:cut], text[cut:]


def _check_lengths(
    seen: Mapping[str, Tensor], held_out: Mapping[str, Tensor], context: int
) -> None:
    for name in seen:
        if min(len(seen[name]), len(held_out[name])) <= context:
            raise ConfigError(
                f"corpus domain {name}: expected more than {context} tokens (source.context) to learn from and "
                f"as many held out, got {len(seen[name])} and {len(held_out[name])}; give it more text, or raise "
                "source.bytes_per_domain"
            )


def fit(net: TinyMoE, texts: list[Tensor], steps: int, generator: torch.Generator) -> None:
    """AdamW with a warm-up and a cosine."""
    optimizer = torch.optim.AdamW(
        net.parameters(), betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    with Progress("training", steps, "steps") as progress:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            x_BS = _batch(texts, step, net.shape.context + 1, generator)
            logits_BSV, routed_L = net(x_BS[:, :-1])
            loss = functional.cross_entropy(logits_BSV.flatten(0, 1), x_BS[:, 1:].flatten())
            (loss + routing_loss(routed_L)).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.advance()


def _batch(texts: list[Tensor], step: int, length: int, generator: torch.Generator) -> Tensor:
    """Random parts of the domains, taken in turn over the steps."""
    rows = []
    for i in range(step * BATCH, (step + 1) * BATCH):
        text = texts[i % len(texts)]
        start = int(torch.randint(len(text) - length + 1, (), generator=generator))
        rows.append(text[start : start + length])
    return torch.stack(rows)


def learning_rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    fall = 0.5 * (1 + cos(pi * step / steps))
    return LEARNING_RATE * warm * (LAST_SHARE + (1 - LAST_SHARE) * fall)


def routing_loss(routed_L: list[Routed]) -> Tensor:
    """Load balance (Fedus et al. 2021) and router z-loss (Zoph et al. 2022), means over the layers."""
    logits_LNE = torch.stack([routed.logits for routed in routed_L])
    n_experts = logits_LNE.shape[2]
    counts = [routed.ids.flatten().bincount(minlength=n_experts) for routed in routed_L]
    share_LE = torch.stack(counts) / routed_L[0].ids.numel()
    balance_L = n_experts * (share_LE * logits_LNE.softmax(-1).mean(1)).sum(-1)
    z_L = logits_LNE.logsumexp(-1).square().mean(-1)
    return (BALANCE * balance_L + Z_LOSS * z_L).mean()


@torch.inference_mode()
def loss_of(net: TinyMoE, held_out: Mapping[str, Tensor]) -> float:
    """Nats per token on unseen text, over evenly spaced windows of every domain."""
    length, losses = net.shape.context + 1, []
    for text in held_out.values():
        starts = np.linspace(0, len(text) - length, LOSS_WINDOWS, dtype=int)
        x_BS = torch.stack([text[i : i + length] for i in starts])
        logits_BSV, _ = net(x_BS[:, :-1])
        losses.append(
            functional.cross_entropy(logits_BSV.flatten(0, 1), x_BS[:, 1:].flatten()).item()
        )
    return float(np.mean(losses))
