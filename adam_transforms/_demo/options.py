"""The command line: its options and their checks, before any work."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from adam_transforms._demo import CONTEXT, NEGATIVES
from adam_transforms._demo.ngrams import MAX_NGRAMS
from adam_transforms._demo.optimizers import DEFAULT, OPTIMIZERS

ALL = "all"


@dataclass(frozen=True)
class Options:
    """The validated options."""

    optimizers: tuple[str, ...]
    rows: int
    dim: int
    steps: int
    batch: int
    learning_rate: float
    seed: int
    output: Path


class _Parser(argparse.ArgumentParser):
    """Prints an error in exactly one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Parses `arguments`, by default the command line; exits with status 2 if one is invalid."""
    parser = _make_parser()
    values = vars(parser.parse_args(arguments))
    chosen = values.pop("optimizer")
    options = Options(
        optimizers=tuple(name for name in OPTIMIZERS if name in chosen or ALL in chosen), **values
    )
    problem = _write_problem(options.output)
    if problem:
        parser.error(f"argument --output: cannot write {str(options.output)!r}: {problem}")
    needed, memory = _needed_bytes(options), _memory_bytes()
    if needed > memory:
        parser.error(
            f"--rows {options.rows} --dim {options.dim} --batch {options.batch} need about"
            f" {needed / 2**30:,.0f} GiB of memory with {', '.join(options.optimizers)};"
            f" this machine has {memory / 2**30:,.0f}"
        )
    return options


def _make_parser() -> argparse.ArgumentParser:
    names = "; ".join(f"{name}: {item.description}" for name, item in OPTIMIZERS.items())
    parser = _Parser(
        prog="adam_transforms",
        usage="python -m adam_transforms [options]",
        description="Trains a next-word model on the source of Python's standard library with"
        " several optimizers, in turns of one step, and compares loss, speed and memory. With the"
        " defaults it takes about three minutes on two CPU cores; nothing is downloaded.",
        allow_abbrev=False,
    )

    def add(flag: str, kind: Callable[[str], object], default: object, text: str) -> None:
        metavar = flag.removeprefix("--").replace("-", "_").upper()
        text += " (default: %(default)s)"
        parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=text)

    parser.add_argument(
        "--optimizer",
        nargs="+",
        choices=(*OPTIMIZERS, ALL),
        default=DEFAULT,
        metavar="NAME",
        help=f"optimizers to train with: {names}; {ALL}: each of them (default:"
        f" {' '.join(DEFAULT)})",
    )
    add("--rows", _integer(2, 2**31 - 1), 2**20, "rows of the hashed n-gram table")
    add("--dim", _integer(1, 2**16), 32, "numbers in a row of the table")
    add("--steps", _integer(1, 10**9), 320, "training steps with each optimizer")
    add("--batch", _integer(1, 2**24), 512, "words to predict in a step")
    add("--learning-rate", _positive, 5e-3, "Adam's learning rate")
    add("--seed", _integer(0, 2**32 - 1), 0, "seed of the initial parameters and the batches")
    add("--output", _png_path, "adam_transforms_demo.png", "PNG file for the loss curves")
    return parser


def _integer(lowest: int, highest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not lowest <= value <= highest:
            expected = f"an integer from {lowest} to {highest}"
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def _png_path(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png, got {text!r}")
    return path


def _write_problem(path: Path) -> str | None:
    """Why a file cannot be written, or None. Opens the file, and removes it if it is new."""
    try:
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        return getattr(error, "strerror", None) or str(error)
    return None


def _needed_bytes(options: Options) -> int:
    """An estimate of the peak memory of training.

    Tables: parameters and two moments of each optimizer, and of the one whose turn it is the
    gradient, an average and temporaries. A batch: n-gram vectors and logits of the negatives, and
    their gradients.
    """
    table = (3 * len(options.optimizers) + 4) * options.rows * options.dim
    batch = 2 * options.batch * (CONTEXT * MAX_NGRAMS * options.dim + NEGATIVES)
    return 4 * (table + batch)


def _memory_bytes() -> float:
    """The machine's memory; infinity if it is unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf
