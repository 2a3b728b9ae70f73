"""Arrays that stand beside the rows of a trace (router weights, a drawn chain): what of them goes into another trace.

It knows which of them have a layer in their names, and nothing of what they are for.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from prefetch.errors import FormatError
from prefetch.manifest import sha256_of
from prefetch.trace.card import ModelCard
from prefetch.trace.parquet import TraceReader

SUFFIX = ".safetensors"
BY_LAYER = {  # of these every array is `layer.<number>` of one stack, and tells the model
    "router_weights": "decoder",
    "encoder_router_weights": "encoder",
}


def names_beside(reader: TraceReader) -> tuple[str, ...]:
    return tuple(
        sorted(path.name.removesuffix(SUFFIX) for path in reader.folder.glob(f"*{SUFFIX}"))
    )


def copy_beside(reader: TraceReader, card: ModelCard, folder: Path) -> list[str]:
    """Of the layers of `card`, a part of the reader's; says what is left out."""
    said = []
    for name in names_beside(reader):
        if card.n_layers == reader.card.n_layers:
            shutil.copyfile(reader.folder / f"{name}{SUFFIX}", folder / f"{name}{SUFFIX}")
        elif name in BY_LAYER:
            _copy_layers(reader, name, card, folder)
        else:
            said.append(f"left out: {name}, which belongs to all layers together")
    return said


def _copy_layers(reader: TraceReader, name: str, card: ModelCard, folder: Path) -> None:
    from safetensors.numpy import save_file

    arrays = reader.beside(name)
    stacks = set(reader.card.layer_stacks)  # a model of one stack has all its routers in one file
    kept = {
        f"layer.{number}"
        for number, stack in zip(card.layer_numbers, card.layer_stacks, strict=True)
        if len(stacks) == 1 or stack == BY_LAYER[name]
    }
    chosen = {key: array for key, array in arrays.items() if key in kept}
    if chosen:
        save_file(chosen, folder / f"{name}{SUFFIX}")


def merge_beside(readers: Sequence[TraceReader], folder: Path) -> list[str]:
    """What is the same in all that have it; routers that differ are those of different models."""
    said = []
    for name in sorted({name for reader in readers for name in names_beside(reader)}):
        having = [reader for reader in readers if name in names_beside(reader)]
        digests = {r.folder: sha256_of(r.folder / f"{name}{SUFFIX}") for r in having}
        odd = [place for place, own in digests.items() if own != digests[having[0].folder]]
        if odd and name in BY_LAYER:
            raise FormatError(
                f"{odd[0]}: its {name} differ from those of {having[0].folder}: not the same model"
            )
        if odd:
            said.append(f"left out: {name}, which differs between {having[0].folder} and {odd[0]}")
            continue
        shutil.copyfile(having[0].folder / f"{name}{SUFFIX}", folder / f"{name}{SUFFIX}")
        if len(having) < len(readers):
            said.append(f"{name}: from {having[0].folder.name}; not all of the traces have it")
    return said
