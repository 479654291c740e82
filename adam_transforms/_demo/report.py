"""The printed output around training: the plan before it, and the results after it."""

from collections.abc import Mapping
from pathlib import Path
from textwrap import indent

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from adam_transforms._demo.findings import about_each, in_equal_time
from adam_transforms._demo.optimizers import OPTIMIZERS
from adam_transforms._demo.options import Options
from adam_transforms._demo.problem import Problem
from adam_transforms._demo.training import Result

# Where a loop with `jax.value_and_grad` and `optax.adam` changes, for a table to be lazy.
TWO_LINES = """\
tx = at.lazy_adam(1e-3, tables="my_table")
loss, grads = at.value_and_grad(loss_fn)(params, batch)"""
NOTEBOOK = "notebooks/02_embedding_tables.ipynb"
README_SECTION = "Which optimizer to take"


def print_plan(console: Console, problem: Problem, options: Options) -> None:
    """Prints corpus, model, training settings, optimizers and device."""
    corpus, device = problem.corpus, jax.devices()[0]
    shapes = jax.eval_shape(problem.init_params)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    rows_read = len(np.unique(next(problem.batches()).context_rows))
    _print_pairs(
        console,
        {
            "corpus": f"{corpus.num_files:,} files, {corpus.num_characters / 1e6:.1f} MB of source;"
            f" {len(corpus.positions(corpus.train)):,} words to train on,"
            f" {len(corpus.positions(corpus.held_out)):,} in files held out",
            "vocabulary": f"{len(corpus.words):,} words",
            "model": f"{num_params:,} parameters, of which {options.rows * options.dim:,} are the"
            f" n-gram table of {options.rows:,} rows of {options.dim}",
            "training": f"{options.steps:,} steps with each optimizer, in turns of one step;"
            f" a step reads {options.batch:,} words and, for these, about {rows_read:,} rows of the"
            f" table; learning rate {options.learning_rate:g}, seed {options.seed}",
            "device": f"{device.device_kind} ({device.platform})",
        },
    )
    console.print("\nOptimizers:")
    _print_pairs(console, {name: OPTIMIZERS[name].description for name in options.optimizers})
    console.print()


def print_results(console: Console, problem: Problem, results: Mapping[str, Result]) -> None:
    """Prints a table with a line for each optimizer, and what it means."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("optimizer")
    for heading in ("ms/step", "state MiB", "held-out loss"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.step_milliseconds:.1f}",
            f"{result.state_bytes / 2**20:.1f}",
            f"{result.held_out_loss:.4f}",
        )
    table.add_row("(unigram)", "", "", f"{problem.held_out.unigram_loss():.4f}")
    console.print(table)
    compile_seconds = [result.compile_seconds for result in results.values()]
    console.print(
        "ms/step: the median, without compilation"
        f" ({min(compile_seconds):.1f} to {max(compile_seconds):.1f} s). Held-out loss: nats a"
        f" word over the full vocabulary, at {len(problem.held_out):,} held-out words; (unigram)"
        " knows only the frequency of each word. One seed: --seed 1 shows how much the losses"
        " vary.\n"
    )
    meanings = about_each(results)
    if meanings:
        console.print("What it means:")
        _print_pairs(console, meanings)
    compared = in_equal_time(results)
    if compared is not None:
        console.print(compared)


def print_next_steps(console: Console, figure: Path) -> None:
    """Prints where the figure is, and what to do after the demonstration."""
    console.print("\nLoss curves, over steps and over seconds:")
    console.print(f"  {figure}", soft_wrap=True)
    console.print("\nWhat to do next:")
    console.print("1. Make a table of your own model lazy: change two lines of its training loop.")
    console.print(indent(TWO_LINES, "     "), soft_wrap=True)
    console.print(f"2. Run {NOTEBOOK}: time, memory and quality.")
    console.print(f'3. Choose an optimizer: README.md, "{README_SECTION}".')


def _print_pairs(console: Console, pairs: Mapping[str, str]) -> None:
    """Prints two columns, the second wrapped."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for name, text in pairs.items():
        grid.add_row(f"  {name}", text)
    console.print(grid)
