"""Configs in Keras's format: dictionaries of JSON values."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from adam_transforms._core import arguments


def number(name: str, value: Any, **limits: float) -> int | float:
    """`value` as a Python number, checked against the limits of `arguments.scalar`."""
    if isinstance(value, jax.Array | np.ndarray):
        raise TypeError(f"{name} must be a Python number, got {value!r}")
    arguments.scalar(name, value, **limits)
    return value.item() if isinstance(value, np.generic) else value


def serialized(instance: Any, module: str | None) -> dict[str, Any]:
    """An object with a `get_config` in Keras's format.

    Args:
      instance: the object.
      module: the Keras module of its class; None for a custom class, which Keras finds in its
        custom_objects.
    """
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
      what: the name of the object in an error.
      config: the result of `serialized` or of Keras.
      classes: {name: class}.
    """
    if not (
        isinstance(config, Mapping)
        and isinstance(config.get("class_name"), str)
        and isinstance(config.get("config"), Mapping)
    ):
        raise ValueError(
            f"{what} must be a dictionary with a class_name and a config, got {config!r}"
        )
    # Keras writes a registered class as "package>name", and its own classes in any letter case.
    name = config["class_name"].rpartition(">")[2]
    by_lower_case = {key.lower(): key for key in reversed(classes)}
    name = name if name in classes else by_lower_case.get(name.lower())
    if name is None:
        raise ValueError(
            f"{what} must be one of {', '.join(classes)}, got {config['class_name']!r}"
        )
    return classes[name], dict(config["config"])


def construct(cls: Any, config: Any) -> Any:
    """The dataclass `cls` with the arguments `config`.

    Raises:
      TypeError: the config is no dictionary.
      ValueError: a key is no field, or a required field is missing.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"the config of {cls.__name__} must be a dictionary, got {config!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(str(key) for key in config if key not in fields)
    if unknown:
        raise ValueError(
            f"{cls.__name__} has no {', '.join(unknown)}; its fields are {', '.join(fields)}"
        )
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in config]
    if missing:
        raise ValueError(f"the config of {cls.__name__} lacks {', '.join(missing)}")
    return cls(**config)


def jsonable(name: str, value: Any) -> Any:
    """`value` as a JSON value: scalar arrays become numbers, tuples become lists."""
    if isinstance(value, list | tuple):
        return [jsonable(name, x) for x in value]
    if isinstance(value, Tracer):
        raise TypeError(f"{name} is traced: a config needs a concrete value")
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return np.asarray(value).item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} must be a number to be part of a config, got {value!r}")
