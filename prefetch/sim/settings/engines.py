"""Settings of every engine for one placement. It knows what each is called, and nothing else."""

from __future__ import annotations

from prefetch.sim.memory import spoken
from prefetch.sim.settings.ktransformers import ktransformers
from prefetch.sim.settings.llama_cpp import llama_cpp
from prefetch.sim.settings.offloaded import offloaded
from prefetch.sim.settings.placement import Block, Placement
from prefetch.sim.settings.vllm import vllm

ENGINES = (llama_cpp, ktransformers, vllm, offloaded)


def settings_of(placement: Placement) -> tuple[Block, ...]:
    return tuple(engine(placement) for engine in ENGINES)


def page_of(placement: Placement) -> str:
    """One text with all of them."""
    host = (
        "" if placement.host_bytes is None else f"; {spoken(placement.host_bytes)} of host memory"
    )
    title = f"# {placement.card.name}: {placement.told}; context {placement.context}, batch {placement.batch}{host}"
    return "\n\n".join([title, *(block.text for block in settings_of(placement))]) + "\n"
