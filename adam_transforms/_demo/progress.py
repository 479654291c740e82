"""What is shown during training: bars on a terminal, otherwise a line at each evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from adam_transforms._demo.training import Observer


@contextmanager
def show_progress(console: Console, names: Sequence[str], steps: int) -> Iterator[Observer]:
    """Yields an observer of `train`, and shows on the console what it is told."""
    if not console.is_terminal:
        console.print(f"compiling {', '.join(names)}")
        yield _Lines(console)
        console.print()
        return
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        yield _Bars(progress, names, steps)


class _Lines(Observer):
    def __init__(self, console: Console) -> None:
        self._console = console

    def on_evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        values = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        self._console.print(f"step {step:,}: held-out loss {values}")


class _Bars(Observer):
    """A bar for each optimizer, with averages of its training loss and of its step time."""

    def __init__(self, progress: Progress, names: Sequence[str], steps: int) -> None:
        self._progress = progress
        self._tasks = {
            name: progress.add_task(name, total=steps, status="compiling") for name in names
        }
        self._averages: dict[str, tuple[float, float]] = {}

    def on_step(self, name: str, loss: float, milliseconds: float) -> None:
        old = self._averages.get(name, (loss, milliseconds))
        # Over about twenty steps: single batches are noisy.
        new = 0.95 * old[0] + 0.05 * loss, 0.95 * old[1] + 0.05 * milliseconds
        self._averages[name] = new
        status = f"loss {new[0]:.3f}  {new[1]:.1f} ms/step"
        self._progress.update(self._tasks[name], advance=1, status=status)
