"""A trace as responses of vLLM with routed experts: JSON lines, a request each, ids as nested lists.

Fields of vLLM 0.21: `prompt_routed_experts` [prompt, L, k], `routed_experts` [generated, L, k], token ids, and how many
prompt tokens the prefix cache answered. `source=vllm` reads it back. Layers are counted by MoE slot.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from prefetch.errors import FormatError
from prefetch.progress import Progress
from prefetch.trace.exports.arrays import signed
from prefetch.trace.parquet import TraceReader
from prefetch.trace.routing import DECODE, NO_TOKEN, PREFILL, RoutingTrace

ODD = (
    "a response has positions without gaps, the prompt first and from 0 on (or only generated tokens), and what "
    "was not executed at its start"
)


def write_vllm(reader: TraceReader, path: Path) -> list[str]:
    """Says what was left out."""
    n_odd = n_written = n_bare = 0
    with (
        path.open("w", newline="\n") as file,
        Progress("writing", reader.n_tokens, "tokens") as bar,
    ):
        for request in _requests(reader):
            bar.advance(request.n_tokens)
            if not _is_a_sequence(request):
                n_odd += 1
                continue
            response = response_of(request)
            n_written, n_bare = n_written + 1, n_bare + ("prompt_token_ids" not in response)
            file.write(json.dumps(response, separators=(",", ":")) + "\n")
    if not n_written:
        raise FormatError(f"{reader.folder}: no request can be written as a response: {ODD}")
    lines = ["not held: weights, domains, the model's own layer numbers (layers are slots)"]
    lines += [f"left out: {n_odd} requests: {ODD}"] * bool(n_odd)
    bare = f"{n_bare} requests do not know all their token ids: written without"
    return lines + [bare] * bool(n_bare)


def _requests(reader: TraceReader) -> Iterator[RoutingTrace]:
    for block in reader.batches():
        for start, stop in itertools.pairwise([*block.starts_R.tolist(), block.n_tokens]):
            yield block.rows(slice(start, stop))


def _is_a_sequence(request: RoutingTrace) -> bool:
    position_T, is_prompt_T = request.position_T, request.phase_T == PREFILL
    has_prompt = bool(is_prompt_T[0])
    return bool(
        (np.diff(position_T) == 1).all()
        and (np.diff(is_prompt_T.astype(int)) <= 0).all()
        and (np.diff(request.executed_T.astype(int)) >= 0).all()
        and (position_T[0] == 0 if has_prompt else position_T[0] > 0)
        and (request.executed_T | is_prompt_T).all()
    )


def response_of(request: RoutingTrace) -> dict[str, Any]:
    """One request; generated tokens alone say where they begin."""
    ids_TLK = signed(request.ids_TLK, request.card)
    generated = request.phase_T == DECODE
    routed = {"routed_experts": ids_TLK[generated].tolist()} if generated.any() else {}
    if generated.all():
        first = int(request.position_T[0])
        usage = {"prompt_tokens": first, "completion_tokens": request.n_tokens}
        return {"usage": usage, "routed_experts_prompt_start": first, **routed}
    response: dict[str, Any] = {"prompt_routed_experts": ids_TLK[~generated].tolist(), **routed}
    response["num_cached_tokens"] = int((~request.executed_T).sum())
    if (request.token_T != NO_TOKEN).all():
        response["prompt_token_ids"] = request.token_T[~generated].tolist()
        response["token_ids"] = request.token_T[generated].tolist()
    return response
