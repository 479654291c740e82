"""The whole demonstration: corpus, training, table and plot."""

from rich.console import Console

from adam_transforms._demo import report
from adam_transforms._demo.corpus import build_corpus
from adam_transforms._demo.optimizers import OPTIMIZERS
from adam_transforms._demo.options import Options
from adam_transforms._demo.training import Problem, train


def compare(options: Options, *, max_files: int | None = None) -> None:
    """Trains with each optimizer, prints the table and writes the plot.

    Args:
      options: the parsed command line.
      max_files: the number of files of the standard library to read; None for all.
    """
    console = Console(highlight=False, markup=False)
    problem = Problem(
        build_corpus(max_files=max_files),
        rows=options.rows,
        dim=options.dim,
        batch=options.batch,
        seed=options.seed,
    )
    report.print_plan(console, problem, options)
    results = {}
    for name in options.optimizers:
        with report.show_progress(console, name, options.steps) as on_step:
            results[name] = train(
                problem, OPTIMIZERS[name], options.learning_rate, options.steps, on_step
            )
    report.print_table(console, problem, results)
    report.save_plot(options.output, problem, results)
    console.print(f"Loss curves: {options.output}", soft_wrap=True)
