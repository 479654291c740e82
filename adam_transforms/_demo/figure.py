"""The figure: held-out loss over steps, and over seconds of training."""

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D

from adam_transforms._demo import DemoError
from adam_transforms._demo.optimizers import OPTIMIZERS
from adam_transforms._demo.training import Result

# Curves closer than this part of a panel's width and height coincide: a line is wider.
COINCIDE = 0.003

LABEL_WIDTH = 52  # characters, of a legend as wide as its panel


class Curve(NamedTuple):
    x: np.ndarray
    y: np.ndarray


def draw(results: Mapping[str, Result]) -> Figure:
    """Two panels with a curve for each optimizer, each with its legend below."""
    figure = Figure(figsize=(11, 6), dpi=130, layout="constrained")
    over_steps, over_seconds = figure.subplots(1, 2, sharey=True)
    figure.suptitle("Predicting the next word of Python's standard library")
    _draw_panel(
        over_steps,
        {name: Curve(r.evaluated_after, r.held_out_losses) for name, r in results.items()},
        "held-out loss after all steps",
        {name: f"{r.held_out_loss:.3f}" for name, r in results.items()},
    )
    _draw_panel(
        over_seconds,
        {name: Curve(r.seconds, r.held_out_losses) for name, r in results.items()},
        "time of all steps",
        {name: f"{r.seconds[-1]:.3g} s" for name, r in results.items()},
    )
    over_steps.set(xlabel="step", ylabel="held-out loss in nats a word")
    over_seconds.set(xlabel="seconds of training, without compilation")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG.

    Raises:
      DemoError: the file cannot be written.
    """
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise DemoError(f"cannot write {path}: {error.strerror or error}") from error


def _draw_panel(
    axes: Axes, curves: Mapping[str, Curve], title: str, values: Mapping[str, str]
) -> None:
    """Draws the curves, and below the panel a legend with a line for each group that coincides."""
    colors = {name: f"C{number}" for number, name in enumerate(OPTIMIZERS)}
    handles: list[tuple[Line2D, ...]] = []
    labels: list[str] = []
    for group in coinciding(curves):
        # Each line is thinner than the one beneath it, so that all stay visible.
        widths = 2.0 + 1.5 * np.arange(len(group))[::-1]
        handles.append(
            tuple(
                axes.plot(*curves[name], color=colors[name], lw=width, marker="o", ms=width + 2)[0]
                for name, width in zip(group, widths, strict=True)
            )
        )
        note = " (curves coincide)" if len(group) > 1 else ""
        labels.append(fill(f"{' = '.join(group)}{note}: {values[group[0]]}", LABEL_WIDTH))
    axes.grid(alpha=0.3)
    axes.legend(
        handles,
        labels,
        title=title,
        handler_map={tuple: HandlerTuple(ndivide=None)},
        alignment="left",
        loc="upper left",
        bbox_to_anchor=(0.0, -0.12),
        borderaxespad=0.0,
        frameon=False,
    )


def coinciding(curves: Mapping[str, Curve]) -> list[list[str]]:
    """The names of the curves, in groups that cannot be told apart in a panel that shows all."""
    width, height = (
        np.ptp(np.concatenate(values)) for values in zip(*curves.values(), strict=True)
    )

    def coincide(one: Curve, other: Curve) -> bool:
        ends = abs(one.x[-1] - other.x[-1])
        gaps = [np.interp(a.x, b.x, b.y) - a.y for a, b in ((one, other), (other, one))]
        return ends <= COINCIDE * width and np.abs(gaps).max() <= COINCIDE * height

    groups: list[list[str]] = []
    for name, curve in curves.items():
        group = next((group for group in groups if coincide(curves[group[0]], curve)), None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    return groups
