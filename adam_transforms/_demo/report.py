"""The output of the demonstration: plan, progress, table and plot."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from adam_transforms._demo import DemoError
from adam_transforms._demo.optimizers import OPTIMIZERS, REFERENCE
from adam_transforms._demo.options import Options
from adam_transforms._demo.training import Problem, Result, largest_difference


def print_plan(console: Console, problem: Problem, options: Options) -> None:
    """Prints corpus, model, training settings, optimizers and device."""
    corpus, device = problem.corpus, jax.devices()[0]
    shapes = jax.eval_shape(problem.init_params)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    console.print(
        "Learning to predict the next word of Python's standard library.\n"
        f"  corpus      {corpus.num_files:,} files, {corpus.num_characters / 1e6:.1f} MB of source;"
        f" {len(corpus.positions(corpus.train)):,} words to\n"
        f"              train on, {len(corpus.positions(corpus.held_out)):,} in files held out\n"
        f"  vocabulary  {len(corpus.words):,} words\n"
        f"  model       {num_params:,} parameters, of which {options.rows * options.dim:,} in"
        f" the n-gram\n              table of {options.rows:,} rows of {options.dim}\n"
        f"  training    {options.steps:,} steps of {options.batch:,} words;"
        f" learning rate {options.learning_rate:g}, seed {options.seed}\n"
        f"  optimizers  {', '.join(options.optimizers)}\n"
        f"  device      {device.device_kind} ({device.platform})\n"
    )


@contextmanager
def show_progress(
    console: Console, name: str, steps: int
) -> Iterator[Callable[[float, float], None]]:
    """A progress bar with loss and step time; without a terminal, one line at the end.

    Yields a function to call at each step with its loss and its milliseconds.
    """
    loss = time = float("nan")
    columns = (
        TextColumn(f"{name:8}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[time]:.1f} ms/step"),
    )
    with Progress(
        *columns, console=console, disable=not console.is_terminal, expand=True
    ) as progress:
        task = progress.add_task(name, total=steps, loss=loss, time=time)

        def on_step(new_loss: float, new_time: float) -> None:
            nonlocal loss, time
            loss, time = _smooth(loss, new_loss), _smooth(time, new_time)
            progress.update(task, advance=1, loss=loss, time=time)

        yield on_step
    if not console.is_terminal:
        console.print(f"{name:8} {steps:,} steps, loss {loss:.3f}, {time:.1f} ms/step")


def _smooth(average: float, new: float) -> float:
    """An exponential average over about twenty steps; single batches are noisy."""
    return new if np.isnan(average) else 0.95 * average + 0.05 * new


def print_table(console: Console, problem: Problem, results: Mapping[str, Result]) -> None:
    """Prints the results: one line for the unigram model and one for each optimizer."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("optimizer")
    headings = ["held-out loss\nnats/word", "step\nmedian ms", "state\nMiB"]
    reference = results.get(REFERENCE)
    if reference is not None:
        headings += [f"max |loss\n- {REFERENCE}'s|", f"max |param\n- {REFERENCE}'s|"]
    for heading in headings:
        table.add_column(heading, justify="right")
    table.add_row("(unigram)", f"{problem.unigram_loss():.4f}")
    for name, result in results.items():
        row = [
            f"{result.held_out_loss:.4f}",
            f"{np.median(result.milliseconds):.1f}",
            f"{result.state_bytes / 2**20:.1f}",
        ]
        if reference is not None and result is not reference:
            loss_difference = np.abs(result.losses - reference.losses).max()
            params_difference = float(largest_difference(result.params, reference.params))
            row += [f"{loss_difference:.1e}", f"{params_difference:.1e}"]
        table.add_row(name, *row)
    console.print(table)
    for name in results:
        console.print(f"{name:9} {OPTIMIZERS[name].description}")
    console.print(
        f"Held-out loss: over the full vocabulary, at {len(problem.evaluated):,} of the words held"
        " out;\n(unigram) knows only the frequency of each word. Step: without compilation"
        f"\n({', '.join(f'{result.compile_seconds:.1f} s' for result in results.values())})."
    )
    if reference is not None:
        console.print(
            "Differences: of the training losses, and of the parameters after training."
            "\nAdam normalizes gradients: near zero, rounding errors become whole steps."
        )


def save_plot(path: Path, problem: Problem, results: Mapping[str, Result]) -> None:
    """Writes a PNG of the smoothed training losses and the final held-out losses."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    # Each line is thinner than the one beneath it, so that equal trajectories stay visible.
    widths = np.linspace(2.0 + len(results), 1.5, len(results))
    axes.plot([], [], " ", label=f"{problem.unigram_loss():.3f}  (unigram)")
    for (name, result), width in zip(results.items(), widths, strict=True):
        steps, held_out = len(result.losses), result.held_out_loss
        window = max(1, steps // 20)
        smooth = np.convolve(result.losses, np.full(window, 1 / window), mode="valid")
        label = f"{held_out:.3f}  {name}: {OPTIMIZERS[name].description}"
        (line,) = axes.plot(np.arange(window, steps + 1), smooth, lw=width, label=label)
        axes.plot(steps, held_out, "o", ms=2 * width, color=line.get_color(), clip_on=False)
    axes.set_title("Predicting the next word of Python's standard library")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss in nats/word, smoothed")
    axes.grid(alpha=0.3)
    axes.legend(title="held-out loss at the end (dots)", alignment="left", loc="upper right")
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise DemoError(f"cannot write {path}: {error.strerror or error}") from error
