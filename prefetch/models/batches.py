"""Batches of token ids through a model, rows of routing out: prompts as prefill, generated tokens as decode.

It knows no text and no file. Padding is routed by the model and left out here; what a finished request is fed while
the others of its batch go on is left out too. B requests, S positions of one forward pass, L layers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefetch.errors import FormatError
from prefetch.models.capture import Decision, RouterHooks, decide
from prefetch.models.hf import LoadedModel
from prefetch.models.measured import card_of
from prefetch.models.routers import DROPPED
from prefetch.trace.card import ModelCard
from prefetch.trace.routing import DECODE, PREFILL

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Wanted:
    """What is recorded beside ids and weights."""

    scores: int | None = None  # the best so many of every layer; 0 = all E
    gate_inputs: bool = False


@dataclass(frozen=True, eq=False)
class Span:
    """S positions that one forward pass ran in one stack, for every layer of the model."""

    arrays: Arrays  # name -> [B, S, L, ...]
    token_BS: NDArray[np.int64]
    keep_BS: NDArray[np.bool_]
    phase: int


class Capture:
    """`capture.rows([[1, 5, 9], [1, 7]], new_tokens=8)`: the arrays of `trace_of`, one request after the other."""

    def __init__(self, loaded: LoadedModel, wanted: Wanted, *, temperature: float = 0.0) -> None:
        self.loaded, self.wanted, self.temperature = loaded, wanted, temperature
        self.hooks = RouterHooks(loaded.model)
        self.decisions = 0  # of one router about one token
        self.reproduced = 0  # by the own-gate control
        self.padding_rows = 0  # routed by the model, left out here
        self.unheard: set[str] = set()  # routers whose experts ran something else
        self._passes: list[dict[str, Arrays]] = []  # stack -> name -> [N, L, ...]
        self._first: Decision | None = None

    @cached_property
    def card(self) -> ModelCard:
        """What the first batch and the parameters tell; there is none before `rows`."""
        assert self._first is not None, "rows() comes before card"
        return card_of(self.loaded, self.hooks.layers, self._first)

    @torch.no_grad()
    def rows(self, prompts: list[list[int]], new_tokens: int) -> Arrays:
        """Prompt rows, then the rows of `new_tokens` generated tokens, fewer where a request ends itself."""
        is_left = new_tokens > 0 and not self.loaded.has_encoder
        token_BS, keep_BS = _padded(prompts, self.loaded.pad, left=is_left)
        self.padding_rows += int((~keep_BS).sum())
        self._passes, self._keep_N = [], torch.from_numpy(keep_BS.ravel())
        with self.hooks:
            inputs = {
                "input_ids": torch.from_numpy(token_BS).to(self.loaded.model.device),
                "attention_mask": torch.from_numpy(keep_BS.astype(np.int64)).to(
                    self.loaded.model.device
                ),
            }
            made_BS = self._generate(inputs, new_tokens) if new_tokens else self._prefill(inputs)
        prompt_stack = "encoder" if self.loaded.has_encoder else "decoder"
        prompt = self._passes[0].pop(prompt_stack, None)  # an encoder may be dense
        spans = [_span(prompt, token_BS, keep_BS, PREFILL)] if prompt else []
        return _joined(spans + self._decoded(made_BS))

    def told(self) -> dict[str, Any]:
        """What was found so far, for a process that puts several together."""
        return {
            "decisions": self.decisions,
            "reproduced": self.reproduced,
            "padding_rows": self.padding_rows,
            "unheard": sorted(self.unheard),
        }

    def add_told(self, others: Sequence[Mapping[str, Any]]) -> None:
        for told in others:
            self.decisions += told["decisions"]
            self.reproduced += told["reproduced"]
            self.padding_rows += told["padding_rows"]
            self.unheard |= set(told["unheard"])

    def _prefill(self, inputs: dict[str, Tensor]) -> NDArray[np.int64]:
        model = self.loaded.model
        if self.loaded.has_encoder:
            model.get_encoder()(**inputs, use_cache=False)
        else:
            model.base_model(**inputs, use_cache=False)  # without the head: nobody reads its logits
        self._end_pass()
        return np.empty((len(inputs["input_ids"]), 0), np.int64)

    def _generate(self, inputs: dict[str, Tensor], new_tokens: int) -> NDArray[np.int64]:
        """Plain sampling, whatever the checkpoint would like; returns what the decoder was fed after the prompt."""
        model, has_encoder = self.loaded.model, self.loaded.has_encoder
        settings = copy.deepcopy(model.generation_config)
        sampled = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        settings.update(
            # The last token that is made is never fed; with an encoder the start token is fed first.
            max_new_tokens=new_tokens + (not has_encoder),
            pad_token_id=self.loaded.pad,
            num_beams=1,
            **(sampled if self.temperature else greedy),
        )
        handle = model.register_forward_hook(lambda *_: self._end_pass())
        try:
            made_BS = model.generate(**inputs, generation_config=settings).cpu().numpy()
        finally:
            handle.remove()
        return made_BS if has_encoder else made_BS[:, inputs["input_ids"].shape[1] :]

    def _end_pass(self) -> None:
        """Every call of this forward pass becomes arrays, so that its tensors can go."""
        layers = self.hooks.layers
        decisions = {slot: decide(layers[slot], call) for slot, call in self.hooks.take().items()}
        for slot, decision in decisions.items():
            self.decisions += len(decision.own_gate_N)
            self.reproduced += int(decision.own_gate_N.sum())
            if decision.heard is False:
                self.unheard.add(type(layers[slot].router).__name__)
        if self._first is None and decisions:
            first = decisions[min(decisions)]
            is_prompt = len(first.own_gate_N) == len(self._keep_N)
            keep_N = self._keep_N.to(first.own_gate_N.device)
            self._first = first.kept(keep_N) if is_prompt else first
        stacks: dict[str, dict[int, Decision]] = {}
        for slot, decision in decisions.items():
            stacks.setdefault(layers[slot].stack, {})[slot] = decision
        self._passes.append({stack: self._arrays(part) for stack, part in stacks.items()})

    def _arrays(self, decisions: dict[int, Decision]) -> Arrays:
        """[N, L, ...]; layers that did not run hold no expert, and zeros."""
        columns = {slot: _columns(decision, self.wanted) for slot, decision in decisions.items()}
        arrays = {}
        for name, sample in next(iter(columns.values())).items():
            fill = {"ids_TLK": DROPPED, "score_ids_TLM": -1}.get(name, 0)
            shape = len(sample), len(self.hooks.layers), *sample.shape[1:]
            arrays[name] = np.full(shape, fill, sample.dtype)
            for slot, column in columns.items():
                arrays[name][:, slot] = column[name]
        return arrays

    def _decoded(self, made_BS: NDArray[np.int64]) -> list[Span]:
        """One position per forward pass, until a request has made its end token, which is not run."""
        end = self.loaded.model.generation_config.eos_token_id
        is_end_BS = np.isin(made_BS, [] if end is None else end)
        is_end_BS[:, : self.loaded.has_encoder] = False  # the start token may be the end token
        alive_BS = ~np.logical_or.accumulate(is_end_BS, axis=1)
        passes = [arrays["decoder"] for arrays in self._passes if "decoder" in arrays]
        return [
            _span(arrays, made_BS[:, [s]], alive_BS[:, [s]], DECODE)
            for s, arrays in enumerate(passes)
        ]


def _padded(
    prompts: list[list[int]], pad: int, *, left: bool
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Right, so that positions count from 0; left before generation, which goes on at the right."""
    width = max(map(len, prompts))
    token_BS, keep_BS = np.full((len(prompts), width), pad), np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), None) if left else slice(len(prompt))
        token_BS[row, place], keep_BS[row, place] = prompt, True
    return token_BS, keep_BS


def _columns(decision: Decision, wanted: Wanted) -> Arrays:
    routing = decision.routing
    columns = {
        "ids_TLK": routing.ids_NK.to(torch.int32),
        "weights_TLK": routing.weights_NK.to(torch.float16),
    }
    if wanted.scores == 0:
        columns["scores_TLM"] = routing.scores_NE.to(torch.float16)
    elif wanted.scores is not None:
        best = routing.scores_NE.topk(min(wanted.scores, routing.scores_NE.shape[1]), dim=-1)
        columns["scores_TLM"] = best.values.to(torch.float16)
        columns["score_ids_TLM"] = best.indices.to(torch.int32)
    if wanted.gate_inputs:
        columns["gate_inputs_TLD"] = decision.gate_input_ND.to(torch.float16)
    return {name: tensor.cpu().numpy() for name, tensor in columns.items()}


def _span(
    arrays: Arrays, token_BS: NDArray[np.int64], keep_BS: NDArray[np.bool_], phase: int
) -> Span:
    n_tokens = len(arrays["ids_TLK"])
    if n_tokens != token_BS.size:
        raise FormatError(
            f"the routers saw {n_tokens} tokens where the model was given {token_BS.shape[0]} x {token_BS.shape[1]}; "
            "this model packs or repeats its tokens, which cannot be attributed: pass source.batch_size=1"
        )
    shaped = {
        name: array.reshape(*token_BS.shape, *array.shape[1:]) for name, array in arrays.items()
    }
    return Span(shaped, token_BS, keep_BS, phase)


def _joined(spans: list[Span]) -> Arrays:
    """The rows that are kept, request after request, each in the order in which it ran."""
    keep_BT = np.concatenate([span.keep_BS for span in spans], axis=1)
    phase_T = np.concatenate([np.full(span.keep_BS.shape[1], span.phase) for span in spans])
    rows = {
        name: np.concatenate([span.arrays[name] for span in spans], axis=1)[keep_BT]
        for name in spans[0].arrays
    }
    return rows | {
        "token_T": np.concatenate([span.token_BS for span in spans], axis=1)[keep_BT],
        "phase_T": np.broadcast_to(phase_T, keep_BT.shape)[keep_BT],
        "request_T": np.repeat(np.arange(len(keep_BT)), keep_BT.sum(axis=1)),
    }
