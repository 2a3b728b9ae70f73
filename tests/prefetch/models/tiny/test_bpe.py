"""Byte-pair encoding: what holds for every text, and its definition, one merge after the other."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefetch.models.tiny import bpe

SAMPLE = (
    b"the cat sat on the mat; for (int i = 0; i < 10; ++i) { the += cat[i]; }\n    return the\n" * 3
)
CODER = bpe.train(SAMPLE, 300)
texts = st.binary() | st.text(alphabet="the cat\n i=0;", max_size=80).map(str.encode)


@given(texts)
def test_decoding_gives_back_every_text(text):
    assert CODER.decode(CODER.encode(text)) == text


@given(texts)
def test_encoding_equals_one_merge_after_the_other(text):
    tokens = []
    for word in bpe.WORD.findall(text):
        part = list(word)
        for rank, (a, b) in enumerate(CODER.merges):
            i = 0
            while i < len(part) - 1:
                if (part[i], part[i + 1]) == (a, b):
                    part[i : i + 2] = [256 + rank]
                i += 1
        tokens += part
    assert CODER.encode(text) == tokens


@given(st.binary(max_size=300))
def test_the_first_merge_is_the_most_frequent_pair(text):
    pairs = [pair for word in bpe.WORD.findall(text) for pair in pairwise(word)]
    counts = {pair: pairs.count(pair) for pair in pairs}
    merges = bpe.train(text, 257).merges
    if max(counts.values(), default=0) < 2:
        assert merges == ()
    else:
        assert merges == (min(counts, key=lambda pair: (-counts[pair], pair)),)


def test_the_same_text_gives_the_same_merges_within_the_vocabulary():
    assert CODER.merges == bpe.train(SAMPLE, 300).merges
    assert 0 < len(CODER.merges) <= 44
    assert max(CODER.encode(SAMPLE)) < 300


@pytest.mark.parametrize("text", [b"", b"a", b"abc"])
def test_a_text_without_repetition_has_no_merges(text):
    assert bpe.train(text, 512).merges == ()
