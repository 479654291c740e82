"""The whole demonstration: corpus, training, table and figure."""

from rich.console import Console

from adam_transforms._demo import figure, report
from adam_transforms._demo.corpus import build_corpus
from adam_transforms._demo.optimizers import OPTIMIZERS
from adam_transforms._demo.options import Options
from adam_transforms._demo.problem import Problem
from adam_transforms._demo.progress import show_progress
from adam_transforms._demo.training import train


def compare(options: Options, *, max_files: int | None = None) -> None:
    """Trains with the chosen optimizers, prints the results and writes the figure.

    Args:
      options: the parsed command line.
      max_files: the number of files of the standard library to read; None for all.
    """
    console = Console(highlight=False, markup=False)
    console.print("Learning to predict the next word of Python's standard library.")
    problem = Problem(
        build_corpus(max_files=max_files),
        rows=options.rows,
        dim=options.dim,
        batch=options.batch,
        seed=options.seed,
    )
    report.print_plan(console, problem, options)
    optimizers = {name: OPTIMIZERS[name] for name in options.optimizers}
    with show_progress(console, options.optimizers, options.steps) as observer:
        results = train(problem, optimizers, options.learning_rate, options.steps, observer)
    report.print_results(console, problem, results)
    figure.save(figure.draw(results), options.output)
    report.print_next_steps(console, options.output)
