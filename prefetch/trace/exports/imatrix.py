"""Expert counts as the counts of a llama.cpp importance matrix (GGUF), which `source=llama_imatrix` reads back.

It holds no sums of squared activations, which routing cannot tell: readers of counts take it, llama-quantize does not.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from prefetch.errors import FormatError
from prefetch.optional import require
from prefetch.trace.exports.counts import Counted

EXACT = 2**24  # float32 counts beyond this are rounded
TENSORS = ("gate", "up", "down")  # of a layer; all repeat the same counts


def write_imatrix(counted: Counted, path: Path) -> list[str]:
    gguf = require("gguf", "GGUFWriter", asked_by="writing GGUF")
    card, counts_LE = counted.counts.card, counted.counts.counts_LE
    if set(card.layer_stacks) != {"decoder"}:
        raise FormatError(f"{card.name}: an importance matrix holds one decoder's layers")
    if counts_LE.max() >= EXACT:
        raise FormatError(
            f"{card.name}: a count of {int(counts_LE.max()):,} is beyond float32's exact range; choose another format"
        )
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it tells every file it writes
    writer = gguf.GGUFWriter(path, arch="")
    writer.add_type("imatrix")
    for number, row_E in zip(card.layer_numbers, counts_LE, strict=True):
        for name in TENSORS:
            values = row_E.astype(np.float32).reshape(-1, 1)
            writer.add_tensor(f"blk.{number}.ffn_{name}_exps.weight.counts", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ["no in_sum2 (routing does not tell it): for readers of counts, not for llama-quantize"]
