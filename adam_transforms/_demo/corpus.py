"""A Zipf-distributed corpus that every Python installation includes: the standard library's source.

It consists of the words of comments and docstrings, and of the identifiers, in source order.
Keywords, numbers and other strings are left out.
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

# Tests and third-party packages are not on every machine. `encodings` and `pydoc_data` hold
# generated tables, not text.
_SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests"})
_SKIPPED |= {"idle_test", "encodings", "pydoc_data"}

RARE = "<rare>"
MIN_COUNT = 2  # a word seen less often in the training files is RARE
HELD_OUT = 10  # one file in HELD_OUT is held out

# A regular expression takes a second where `tokenize` takes several, and reads any file, of any
# version of Python. The first alternative that matches wins. A docstring is a triple-quoted string
# at the start of a line; other strings and numbers match without a group name and are skipped.
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
    """Word ids and the vocabulary that they index.

    A stream concatenates the ids of its files. CONTEXT ids `pad` precede each file, so that the
    CONTEXT ids before a word are its context and no context crosses a file boundary.
    """

    words: list[str]  # the vocabulary, indexed by id; the most frequent word first
    counts: np.ndarray  # (vocabulary,) int64, occurrences in the training files
    train: np.ndarray  # int32 stream of the training files
    held_out: np.ndarray  # int32 stream of the held-out files
    num_files: int
    num_characters: int

    @property
    def pad(self) -> int:
        """The padding id before each file; no word has it, and it is never predicted."""
        return len(self.words)

    def positions(self, stream: np.ndarray) -> np.ndarray:
        """The indices of the words in a stream, all but the padding."""
        return np.flatnonzero(stream != self.pad)


def contexts(stream: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """(positions, CONTEXT): the ids before each of these positions of a stream."""
    return stream[positions[:, None] + np.arange(-CONTEXT, 0)[None, :]]


def read_words(source: str) -> list[str]:
    """The words of comments and docstrings, and the identifiers, of Python source, in order."""
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
    """Whether a file is held out. Depends on its name alone: the split is the same everywhere."""
    return zlib.crc32(name.encode(errors="surrogateescape")) % HELD_OUT == 0


def source_files(root: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of each source file below `root`, sorted; names are relative to `root`."""
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name, path in sorted(files.items()):
        if _SKIPPED.isdisjoint(name.split("/")):
            try:
                yield name, path.read_bytes().decode("utf-8", errors="replace")
            except OSError:  # skip unreadable files
                continue


def build_corpus(root: Path | None = None, *, max_files: int | None = None) -> Corpus:
    """Builds a corpus from the Python files in `root`, by default the standard library.

    Args:
      root: a folder.
      max_files: the number of files to read, in the order of their names; None for all.

    Raises:
      DemoError: there are too few source files for a training and a held-out part.
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
    """Words and their counts, most frequent first; RARE stands for all rare words."""
    every = Counter(word for text in texts for word in text)
    kept = {word: count for word, count in every.items() if count >= MIN_COUNT}
    kept[RARE] = every.total() - sum(kept.values())
    ranked = sorted(kept.items(), key=lambda item: (-item[1], item[0]))
    return [word for word, _ in ranked], np.array([count for _, count in ranked], np.int64)


def _stream(texts: list[list[str]], ids: dict[str, int]) -> np.ndarray:
    lead, rare = [len(ids)] * CONTEXT, ids[RARE]
    stream = [i for text in texts for i in (*lead, *(ids.get(word, rare) for word in text))]
    return np.array(stream, np.int32)
