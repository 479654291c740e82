"""A corpus of real, Zipf-distributed text that every machine with Python already has.

The text is the standard library's own source, reduced to what people wrote for people: the words of
its comments and docstrings, and its identifiers, in the order in which they stand. Keywords,
numbers and other strings are left out.
"""

import keyword
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adam_transforms._demo import CONTEXT, DemoError

# Tests and other people's packages are not on every machine, and these two packages are generated
# tables rather than text.
_SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests"})
_SKIPPED |= {"idle_test", "encodings", "pydoc_data"}

RARE = "<rare>"
MIN_COUNT = 2  # a word seen less often in the training files is RARE
HELD_OUT = 10  # one file in so many

# A scan by regular expression takes a second where `tokenize` takes several, and reads any file, of
# any version of Python. Of the alternatives the first to match wins: a docstring is a triple-quoted
# string that begins its line; other strings and numbers match without a name and are passed over.
_SOURCE = re.compile(
    r'''
      ^[ \t]* [rRuU]? (?P<docstring>
          """ (?: [^"\\] | \\. | "(?!"") )* """
        | \'\'\' (?: [^'\\] | \\. | '(?!'') )* \'\'\' )
    | (?P<comment> \# [^\n]* )
    | [rRbBuUfF]{0,2} (?:
          """ (?: [^"\\] | \\. | "(?!"") )* """
        | \'\'\' (?: [^'\\] | \\. | '(?!'') )* \'\'\'
        | " (?: [^"\\\n] | \\. )* "
        | ' (?: [^'\\\n] | \\. )* ' )
    | \d [\w.]*
    | (?P<identifier> [^\W\d] \w* )
    ''',
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)
_WORD = re.compile(r"[^\W\d]\w*")
_KEYWORDS = frozenset(keyword.kwlist)


@dataclass(frozen=True)
class Corpus:
    """Word ids and the vocabulary behind them.

    A stream is the ids of its files, one after the other, each led by CONTEXT times the id `pad`:
    the ids before any word are its context, and no context reaches into another file.
    """

    words: list[str]  # the vocabulary: an id is an index into it; the most frequent word first
    counts: np.ndarray  # (vocabulary,) int64, occurrences in the training files
    train: np.ndarray  # int32 stream of the training files
    held_out: np.ndarray  # int32 stream of the held-out files
    num_files: int
    num_characters: int

    @property
    def pad(self) -> int:
        """The id before the beginning of a file. No word has it, and it is never predicted."""
        return len(self.words)

    def positions(self, stream: np.ndarray) -> np.ndarray:
        """The indices of a stream at which there is a word to predict."""
        return np.flatnonzero(stream != self.pad)


def read_words(source: str) -> list[str]:
    """The words of the comments, docstrings and identifiers of Python source, in order."""
    words: list[str] = []
    for match in _SOURCE.finditer(source):
        kind = match.lastgroup
        if kind == "identifier":
            if match[kind] not in _KEYWORDS:
                words.append(match[kind])
        elif kind is not None:
            words.extend(_WORD.findall(match[kind]))
    return words


def is_held_out(name: str) -> bool:
    """Whether a file is kept from training, by its name alone: the same split on every machine."""
    return zlib.crc32(name.encode(errors="surrogateescape")) % HELD_OUT == 0


def source_files(root: Path) -> Iterator[tuple[str, str]]:
    """Names, relative to `root` and sorted, and texts of the source files of a standard library."""
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name, path in sorted(files.items()):
        if _SKIPPED.isdisjoint(name.split("/")):
            try:
                yield name, path.read_bytes().decode("utf-8", errors="replace")
            except OSError:  # a file that cannot be read is no reason to give up the others
                continue


def build_corpus(root: Path | None = None, *, max_files: int | None = None) -> Corpus:
    """Reads the standard library, or the Python files in `root`, or the first `max_files` of them.

    Raises:
      DemoError: too few source files to train on some and hold out others.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    train: list[list[str]] = []
    held_out: list[list[str]] = []
    num_files = num_characters = 0
    for name, text in source_files(root):
        if num_files == max_files:
            break
        num_files += 1
        num_characters += len(text)
        (held_out if is_held_out(name) else train).append(read_words(text))
    if not any(train) or not any(held_out):
        raise DemoError(f"needs the source files of Python's standard library; too few in {root}")

    words, counts = _vocabulary(train)
    ids = {word: index for index, word in enumerate(words)}
    return Corpus(
        words=words,
        counts=counts,
        train=_stream(train, ids),
        held_out=_stream(held_out, ids),
        num_files=num_files,
        num_characters=num_characters,
    )


def _vocabulary(texts: list[list[str]]) -> tuple[list[str], np.ndarray]:
    """The words that are not rare, and RARE for the others, by falling count."""
    every = Counter(word for text in texts for word in text)
    kept = {word: count for word, count in every.items() if count >= MIN_COUNT}
    kept[RARE] = every.total() - sum(kept.values())
    ranked = sorted(kept.items(), key=lambda item: (-item[1], item[0]))
    return [word for word, _ in ranked], np.array([count for _, count in ranked], np.int64)


def _stream(texts: list[list[str]], ids: dict[str, int]) -> np.ndarray:
    lead, rare = [len(ids)] * CONTEXT, ids[RARE]
    stream = [i for text in texts for i in (*lead, *(ids.get(word, rare) for word in text))]
    return np.array(stream, np.int32)
