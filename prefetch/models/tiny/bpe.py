"""Byte-pair encoding in plain Python (Sennrich et al. 2016): learnt from bytes, every byte string has tokens.

It knows no domain and no model. A merge (a, b) becomes the token 256 + its rank.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from prefetch.errors import FormatError

Pair = tuple[int, int]
# no token crosses these borders; the lengths are bounded because `_apply` is quadratic in them
WORD = re.compile(rb" ?[A-Za-z]{1,32}| ?[0-9]| ?[^\sA-Za-z0-9]{1,32}|\n[ \t]{0,32}|[ \t]{1,32}|\s")
LONGEST = 33  # bytes of a word
N_BYTES = 256


class BPE:
    """Text to tokens and back, for the merges of one training."""

    def __init__(self, merges: Sequence[Pair]) -> None:
        self.merges = tuple((int(a), int(b)) for a, b in merges)
        self._rank = {pair: N_BYTES + i for i, pair in enumerate(self.merges)}
        self._bytes = [bytes([i]) for i in range(N_BYTES)]
        for a, b in self.merges:
            if not 0 <= min(a, b) <= max(a, b) < len(self._bytes):
                raise FormatError(
                    f"merge ({a}, {b}): expected two of {len(self._bytes)} tokens before it"
                )
            self._bytes.append(self._bytes[a] + self._bytes[b])
            if len(self._bytes[-1]) > LONGEST:
                raise FormatError(f"merge ({a}, {b}): no word is longer than {LONGEST} bytes")
        self._tokens = lru_cache(maxsize=1 << 18)(self._encode_word)

    def encode(self, text: bytes) -> list[int]:
        return [token for word in WORD.findall(text) for token in self._tokens(word)]

    def decode(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self._bytes[token] for token in tokens)

    def _encode_word(self, word: bytes) -> tuple[int, ...]:
        """Merges in the order in which they were learnt, which is the order of their tokens."""
        tokens = list(word)
        while len(tokens) > 1:
            known = [self._rank[pair] for pair in pairwise(tokens) if pair in self._rank]
            if not known:
                break
            token = min(known)
            tokens = _merged(tokens, self.merges[token - N_BYTES], token)
        return tuple(tokens)


def train(text: bytes, vocabulary: int) -> BPE:
    """The most frequent pair becomes a token, again and again; ties go to the smaller pair."""
    counts = Counter(WORD.findall(text))
    words = [(list(word), count) for word, count in sorted(counts.items())]
    pairs: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for i, (tokens, count) in enumerate(words):
        _count(pairs, where, i, tokens, count)
    merges: list[Pair] = []
    while len(merges) < vocabulary - N_BYTES and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], -pair[0], -pair[1]))
        if pairs[best] < 2:
            break
        for i in where.pop(best):
            tokens, count = words[i]
            for pair in pairwise(tokens):
                pairs[pair] -= count
            tokens = _merged(tokens, best, N_BYTES + len(merges))
            words[i] = (tokens, count)
            _count(pairs, where, i, tokens, count)
        del pairs[best]
        merges.append(best)
    return BPE(merges)


def _count(
    pairs: Counter[Pair],
    where: defaultdict[Pair, set[int]],
    i: int,
    tokens: list[int],
    count: int,
) -> None:
    for pair in pairwise(tokens):
        pairs[pair] += count
        where[pair].add(i)


def _merged(tokens: list[int], pair: Pair, token: int) -> list[int]:
    """Every occurrence of the pair replaced, from the left."""
    merged, i = [], 0
    while i < len(tokens):
        if i + 1 < len(tokens) and (tokens[i], tokens[i + 1]) == pair:
            merged.append(token)
            i += 2
        else:
            merged.append(tokens[i])
            i += 1
    return merged
