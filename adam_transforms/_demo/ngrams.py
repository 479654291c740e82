"""Words as bags of hashed character n-grams, after fastText (arXiv:1607.04606, section 3.2).

A word's vector is the mean of a table's rows for the word itself and for its n-grams. Hashing
bounds the size of the table for any vocabulary. Words with common n-grams share rows.
"""

import zlib
from collections.abc import Sequence

import numpy as np

SHORTEST, LONGEST = 3, 5  # characters
MAX_NGRAMS = 32  # enough for four words in five; the others lose some of their longest n-grams
PADDING = 0  # a row that no n-gram hashes to


def ngrams(word: str) -> list[str]:
    """The word and its distinct n-grams, shortest first; `<` and `>` mark its beginning and end.

    >>> ngrams("loss")
    ['<loss>', '<lo', 'los', 'oss', 'ss>', '<los', 'loss', 'oss>', '<loss', 'loss>']
    """
    marked = f"<{word}>"
    parts = [
        marked[start : start + size]
        for size in range(SHORTEST, LONGEST + 1)
        for start in range(len(marked) - size + 1)
    ]
    return list(dict.fromkeys([marked, *parts]))[:MAX_NGRAMS]


def row_of(ngram: str, rows: int) -> int:
    """An n-gram's row in [1, rows), by a hash that is the same in every process."""
    return 1 + zlib.crc32(ngram.encode()) % (rows - 1)


def ngram_rows(words: Sequence[str], rows: int) -> np.ndarray:
    """The row ids of each word's n-grams: (words + 1, MAX_NGRAMS) int32, padded with PADDING.

    The last line belongs to the corpus's `pad` and is all PADDING.
    """
    table = np.full((len(words) + 1, MAX_NGRAMS), PADDING, np.int32)
    for index, word in enumerate(words):
        hashed = [row_of(ngram, rows) for ngram in ngrams(word)]
        table[index, : len(hashed)] = hashed
    return table
