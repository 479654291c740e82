"""Configs, in Keras's form: dictionaries of what JSON has."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from adam_transforms._core import arguments


def number(name: str, value: Any, **limits: float) -> int | float:
    """`value`, a Python number within these limits, or one of NumPy's made one."""
    if isinstance(value, jax.Array | np.ndarray):
        raise TypeError(f"{name} must be a Python number, got {value!r}")
    arguments.scalar(name, value, **limits)
    return value.item() if isinstance(value, np.generic) else value


def serialized(instance: Any, module: str | None) -> dict[str, Any]:
    """An object with a `get_config` as Keras writes it: one of Keras's own from this module of
    Keras, or, for None, one that Keras needs to be told of by its custom_objects."""
    cls = type(instance)
    return {
        "module": cls.__module__ if module is None else module,
        "class_name": cls.__name__,
        "config": instance.get_config(),
        "registered_name": cls.__name__ if module is None else None,
    }


def class_and_config(what: str, config: Any, classes: dict[str, Any]) -> tuple[Any, Any]:
    """The class and a copy of the config of a serialized object.

    Args:
      what: what the object is called in an error.
      config: what Keras, or `serialized`, wrote.
      classes: those there are, by name.
    """
    if not (
        isinstance(config, Mapping)
        and isinstance(config.get("class_name"), str)
        and isinstance(config.get("config"), Mapping)
    ):
        raise ValueError(
            f"{what} must come as a dictionary with a class_name and a config, got {config!r}"
        )
    # Keras writes a registered class as "package>name", and its own in any case of letters.
    name = config["class_name"].rpartition(">")[2]
    lower = {key.lower(): key for key in reversed(classes)}
    name = name if name in classes else lower.get(name.lower())
    if name is None:
        raise ValueError(
            f"{what} must be one of {', '.join(classes)}, got {config['class_name']!r}"
        )
    return classes[name], dict(config["config"])


def construct(cls: Any, config: Any) -> Any:
    """The dataclass `cls` with the values of `config`.

    Raises:
      TypeError: the config is no dictionary.
      ValueError: a key is none of its fields, or one that it needs is missing.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"the config of {cls.__name__} must be a dictionary, got {config!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(str(key) for key in config if key not in fields)
    if unknown:
        raise ValueError(
            f"{cls.__name__} has no {', '.join(unknown)}; its config has {', '.join(fields)}"
        )
    needed = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    missing = [name for name in needed if name not in config]
    if missing:
        raise ValueError(f"the config of {cls.__name__} lacks {', '.join(missing)}")
    return cls(**config)


def jsonable(name: str, value: Any) -> Any:
    """`value` as JSON has it: scalar arrays become numbers, tuples lists."""
    if isinstance(value, list | tuple):
        return [jsonable(name, x) for x in value]
    if isinstance(value, Tracer):
        raise TypeError(f"{name} is traced, and a config holds what is known")
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return np.asarray(value).item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} must be a number for a config to hold it, got {value!r}")
