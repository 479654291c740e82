"""Trajectories recorded from Optax, PyTorch, Keras 3, legacy Keras, TensorFlow Addons and
TensorFlow 1, step by step.

`data/index.json` says how each run was configured; `data/<case>.npz` holds its start, its gradients
and what came of them. Those in `data/sparse` have row gradients, with duplicates.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import adam_transforms as at

DATA = Path(__file__).parent / "data"


def _index(folder: Path) -> dict[str, Any]:
    return {entry["case"]: entry for entry in json.loads((folder / "index.json").read_text())}


DENSE = _index(DATA)
SPARSE = _index(DATA / "sparse")


def of_class(*names: str) -> list[str]:
    """The cases recorded from optimizers whose class ends so."""
    return [case for case, entry in (DENSE | SPARSE).items() if entry["class"].endswith(names)]


def differs_most(case: str) -> bool:
    """Whether it is for the first tier: of two runs of one optimizer, with the default numbers and
    with others, that with others; and of several with the same option, one."""
    custom = case.removesuffix("_default") + "_custom"
    return custom not in DENSE | SPARSE and case not in (
        "k3_weight_decay_zero",
        "legacy_dense_clipnorm",
        "legacy_dense_clipvalue",
    )


class Recording:
    """One recorded run; arrays are read by group ("p", "g", "m", ...) as flat dictionaries."""

    def __init__(self, case: str):
        folder = DATA if case in DENSE else DATA / "sparse"
        self.case = case
        self.entry = (DENSE | SPARSE)[case]
        self.config: dict[str, Any] = self.entry["config"]
        self.setup: dict[str, Any] = self.entry["setup"]
        with np.load(folder / f"{case}.npz") as file:
            self.arrays = {key: file[key] for key in file.files}
        self.start = self.group("p0")

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        return {
            key.removeprefix(f"{prefix}/"): array
            for key, array in self.arrays.items()
            if key.startswith(f"{prefix}/")
        }

    @property
    def steps(self) -> int:
        return self.entry["steps"]

    def gradients(self, step: int) -> dict[str, Any]:
        """An array for each variable, or a `SparseRows`."""
        dense = {name: g[step] for name, g in self.group("g").items()}
        values = self.group("rows")
        return dense | {
            name: at.SparseRows(
                ids[step], values[name][step], len(self.start[name]), synchronized=True
            )
            for name, ids in self.group("ids").items()
        }

    def params(self, step: int) -> dict[str, np.ndarray]:
        """As they were after `step`."""
        return {name: p[step] for name, p in self.group("p").items()}

    @property
    def replay_error(self) -> float:
        """How far an exact replay is from the recorded float32 run, to two digits."""
        return self.entry["float64_replay"]["exact_coefficients"]["max_abs_err_p"]

    @property
    def tolerance(self) -> float:
        return 2 * self.replay_error + 1e-6

    @property
    def scheduled(self) -> bool:
        config = self.setup.get("inner", self.config)
        return isinstance(config.get("learning_rate"), Mapping)


def differences(
    ours: Mapping[str, np.ndarray], recorded: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """The largest difference in each variable."""
    assert ours.keys() == recorded.keys()
    return {name: float(np.max(np.abs(ours[name] - x))) for name, x in recorded.items()}


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The tree whose paths are the keys, which have slashes."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def slot_tolerance(b: float) -> float:
    """How far a recorded moment may be off, relative to its largest entry.

    A system that keeps its decay rate b in float32 is off by up to 2^-25 in it, which is that over
    1 - b in the moment; the rest is the rounding of a few dozen float32 operations.
    """
    return 2e-6 + 2**-25 / (1 - b)
