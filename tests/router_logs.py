"""Routing of a Zipf router as llama.cpp loggers see it: passes of rows per layer, rightly or with a wrong stride."""

import numpy as np

LAYERS = (3, 4, 5, 6)


def ranks(n_tokens: int, n_experts: int, seed: int) -> np.ndarray:
    """[T, E] the argsort of a Zipf router's noisy logits."""
    rng = np.random.default_rng(seed)
    logits = -np.log(np.arange(1, n_experts + 1)) + rng.gumbel(size=(n_tokens, n_experts))
    return np.argsort(-logits, axis=1)


def zipf_passes(
    sizes: list[int], n_experts=160, k=8, stride=False, layers=LAYERS, last: int | None = None
):
    """Passes of these sizes; with `stride` as the defective logger writes them; `last` rows in the last layer."""
    passes = []
    for p, size in enumerate(sizes):
        one = []
        for i, layer in enumerate(layers):
            rank = ranks(size, n_experts, seed=1000 * p + layer)
            rows = rank.ravel()[: size * k].reshape(size, k) if stride else rank[:, :k]
            is_last = i == len(layers) - 1
            one.append(rows[-last:] if last and is_last and size > 1 else rows)
        passes.append(one)
    return passes
