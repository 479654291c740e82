"""What the measurements mean, in sentences that follow from the numbers alone."""

import math
from collections.abc import Mapping

import numpy as np

from adam_transforms._demo.optimizers import OPTIMIZERS, REFERENCES
from adam_transforms._demo.training import Result

SAME_TIME = 1.1  # step times whose ratio is smaller are called the same
SAME_PATH = 1e-3  # nats; training losses that always differ by less follow the same path
SAME_LOSS = 5e-5  # nats; smaller differences are not visible in the table


def about_each(results: Mapping[str, Result]) -> dict[str, str]:
    """What distinguishes each optimizer from those that it is compared with."""
    reference = _reference(results)
    meanings = {}
    for name, result in results.items():
        sentences = []
        if reference is not None and name != reference:
            other = results[reference]
            sentences += [_speed(result, reference, other), _path(result, reference, other)]
        float32 = OPTIMIZERS[name].float32
        if float32 is not None and float32 in results:
            other = results[float32]
            sentences.append(_memory(result, float32, other))
            if float32 != reference:
                sentences.append(_loss(result, float32, other))
        if sentences:
            meanings[name] = " ".join(sentences)
    return meanings


def in_equal_time(results: Mapping[str, Result]) -> str | None:
    """Compares the fastest optimizer with the reference, if it is slower, at the same seconds."""
    reference = _reference(results)
    if reference is None:
        return None
    fastest = min(results, key=lambda name: results[name].step_milliseconds)
    fast, slow = results[fastest], results[reference]
    steps, seconds = len(fast.losses), fast.seconds[-1]
    loss = np.interp(seconds, slow.seconds, slow.held_out_losses)
    is_slower = (
        min(slow.step_milliseconds / fast.step_milliseconds, slow.seconds[-1] / seconds)
        >= SAME_TIME
    )
    if not is_slower or not np.isfinite([fast.held_out_loss, loss]).all():
        return None
    return (
        f"In equal time: the {steps:,} steps of {fastest} take {seconds:.3g} s and reach a held-out"
        f" loss of {fast.held_out_loss:.3f}. After {seconds:.3g} s {reference} is at about"
        f" {loss:.3f}; its {steps:,} steps take {slow.seconds[-1]:.3g} s."
    )


def _reference(results: Mapping[str, Result]) -> str | None:
    return next((name for name in REFERENCES if name in results), None)


def _speed(result: Result, name: str, other: Result) -> str:
    ratio = other.step_milliseconds / result.step_milliseconds
    if ratio >= SAME_TIME:
        return f"Steps are {ratio:.1f} times as fast as with {name}."
    if ratio <= 1 / SAME_TIME:
        return f"Steps take {1 / ratio:.1f} times as long as with {name}."
    return f"Steps take as long as with {name}, to a tenth."


def _path(result: Result, name: str, other: Result) -> str:
    difference = float(np.abs(result.losses - other.losses).max())
    if difference < SAME_PATH:
        return f"Every training loss is within {difference:.1e} nats of {name}'s."
    return _loss(result, name, other)


def _loss(result: Result, name: str, other: Result) -> str:
    difference = result.held_out_loss - other.held_out_loss
    if not math.isfinite(difference):
        return f"The held-out loss, or {name}'s, is not finite: training diverged."
    if abs(difference) < SAME_LOSS:
        return f"The held-out loss is {name}'s, to four decimals."
    percent = 100 * abs(difference) / abs(other.held_out_loss)
    direction = "above" if difference > 0 else "below"
    return f"The held-out loss is {abs(difference):.4f} nats ({percent:.2g}%) {direction} {name}'s."


def _memory(result: Result, name: str, other: Result) -> str:
    return f"The state is {other.state_bytes / result.state_bytes:.1f} times smaller than {name}'s."
