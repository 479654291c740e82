"""What `explain` says of a loss is what `value_and_grad` does with it, and names the line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import adam_transforms as at

V, D = 100, 4
PARAMS = {"t": jnp.ones((V, D)), "u": jnp.ones((V, D)), "w": jnp.ones((D, D))}
IDS = jnp.array([[1, 2, 3], [3, 4, 5]])


def explained(loss: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The report, which must agree with the gradients."""
    report = at.explain(loss, *args, **options)
    gradients = jax.eval_shape(at.grad(loss, **options), *args)
    for path, leaf in report.items():
        assert leaf.is_rows == isinstance(gradients[path], at.SparseRows), path
    return report


def by_scan(p: Any, ids: Any) -> Any:
    def cell(carry: Any, i: Any) -> Any:
        return jnp.tanh(carry + p["t"][i] @ p["w"]), None

    return jnp.sum(jax.lax.scan(cell, jnp.zeros((2, D)), ids.T)[0])


@jax.custom_vjp
def own_gradient(table: Any) -> Any:
    return 2 * table


own_gradient.defvjp(lambda table: (2 * table, None), lambda _, g: (2 * g,))


def test_rows_have_their_number_and_the_line_that_reads_them() -> None:
    report = explained(by_scan, PARAMS, IDS)
    assert (report["t"].is_rows, report["t"].n, report["t"].why) == (True, 6, "")
    (place,) = report["t"].reads
    file, line = place.rsplit(":", 1)
    assert Path(file).name == "test_explain.py"
    assert 'p["t"][i]' in Path(__file__).read_text().splitlines()[int(line) - 1]
    assert f"t  [{V},{D}]  rows   1 read, 6 rows: {place}" in str(report)


@pytest.mark.parametrize(
    ("loss", "operation", "is_inherent", "why"),
    [
        (
            lambda p, ids: jnp.sum((p["t"][ids] @ p["t"].T) ** 2),
            *("dot_general", True, "a softmax over all rows? A sampled softmax reads rows"),
        ),
        (
            lambda p, ids: jnp.sum(p["t"][ids]) + jnp.sum(p["t"] ** 2),
            *("", True, "an L2 term over all rows? Weight decay inside lazy is by row"),
        ),
        (
            lambda p, ids: jnp.sum(jnp.sort(p["t"], axis=0)[ids]),
            *("sort", True, "it uses all rows"),
        ),
        (
            lambda p, ids: jnp.sum(own_gradient(p["t"])[ids]),
            *("custom_vjp", False, "custom_vjp"),
        ),
    ],
    ids=["tied softmax", "L2 term", "sort", "a rule of the table"],
)
@pytest.mark.every_case
def test_a_dense_gradient_has_the_operation_and_whether_it_must_be(
    loss: Callable[..., Any], operation: str, is_inherent: bool, why: str
) -> None:
    leaf = explained(loss, PARAMS, IDS)["t"]
    assert not leaf.is_rows
    assert operation in leaf.operation
    assert leaf.is_inherent == is_inherent
    assert why in leaf.why
    assert "test_explain.py:" in leaf.where


def test_what_is_left_dense_has_a_reason() -> None:
    def loss(p: Any, ids: Any) -> Any:
        fixed = jnp.sum(p["u"][3])
        return jnp.sum(p["t"][jnp.tile(ids.ravel(), V)]) + fixed + jnp.sum(p["w"][0]) * p["scale"]

    report = explained(loss, PARAMS | {"scale": jnp.ones(()), "unused": jnp.ones((V, D))}, IDS)
    assert f"{6 * V} rows are read of {V}" in report["t"].why
    assert "positions fixed in the program" in report["u"].why
    assert "a scalar has no rows" in report["scale"].why
    assert "the loss does not use it" in report["unused"].why
    named = at.explain(loss, PARAMS | {"scale": jnp.ones(())}, IDS, tables=["^t$", "^u$"])
    assert [x for x, leaf in named.items() if leaf.is_rows] == ["t", "u"]
    assert "not selected" in named["w"].why


def test_several_arguments_have_their_positions_in_the_paths() -> None:
    def loss(p: Any, q: Any, ids: Any) -> Any:
        return jnp.sum(p["t"][ids] * q["t"][ids])

    report = at.explain(loss, {"t": PARAMS["t"]}, {"t": PARAMS["u"]}, IDS, argnums=(0, 1))
    assert {path: leaf.is_rows for path, leaf in report.items()} == {"0/t": True, "1/t": True}


def test_too_few_arguments_are_an_error_as_in_jax() -> None:
    with pytest.raises(TypeError, match="requires at least 1 positional arguments"):
        at.explain(by_scan)
    with pytest.raises(TypeError, match="requires at least 4 positional arguments"):
        at.explain(by_scan, PARAMS, IDS, argnums=3)
