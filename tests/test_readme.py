"""What the README shows runs, and says what is so."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_transforms as at

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_optax_example_reaches_the_optimum(
    relaxed_promotion: None, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict = {}
    exec(EXAMPLES[0], names)
    final = at.finalize(names["params"], names["state"])["w"]
    assert abs(final - 1.0).max() < 0.05
    assert capsys.readouterr().out.startswith("{'w': Array(")


def test_flax_example_learns(relaxed_promotion: None, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict = {}
    exec(EXAMPLES[1], names)
    assert names["loss"] < 0.5 * float(names["y"].var())


def test_table_example_learns_and_moves_only_what_it_reads(relaxed_promotion: None) -> None:
    names: dict = {}
    exec(EXAMPLES[2], names)
    assert names["loss"] < 0.1 * float(names["y"].var())
    table = names["params"]["params"]["layers_0"]["embedding"]
    start = names["model"].init(jax.random.key(2), names["ids"])["params"]["layers_0"]["embedding"]
    moved = np.flatnonzero(np.any(np.asarray(table) != np.asarray(start), axis=1))
    assert set(moved) == set(np.asarray(names["ids"]).tolist())


@pytest.mark.slow  # test_deferred and the test below keep the first tier's promise
def test_deferred_example_learns_and_leaves_nothing_owed(relaxed_promotion: None) -> None:
    names: dict = {}
    exec(EXAMPLES[3], names)
    assert names["loss"] < 0.1
    assert int(at.owed(names["params"], names["state"])["table"].rows) == 0


def test_examples_compile_and_name_what_there_is() -> None:
    for number, example in enumerate(EXAMPLES):
        compile(example, f"example {number}", "exec")
        for module, name in re.findall(r"\b(at|optax)\.(\w+)", example):
            assert hasattr({"at": at, "optax": optax}[module], name), f"{module}.{name}"


def test_every_line_of_the_migration_table_runs(relaxed_promotion: None) -> None:
    _, _, table = README.partition("| there | here |\n|---|---|\n")
    lines = [line.split(" | ")[-1] for line in table.partition("\n\n")[0].splitlines()]
    code = [piece for line in lines for piece in re.findall("`([^`]*[(].*?)`", line)]
    assert len(lines) >= 20
    assert len(code) >= len(lines)

    opt, tx = at.compat.tf1.AdamOptimizer(), at.adam(1e-3)
    kernel = jnp.arange(6.0).reshape(3, 2)
    params = {"dense": {"kernel": kernel, "bias": jnp.ones(2)}, "table": jnp.ones((5, 3))}
    names = ["dense/bias", "dense/kernel", "table"]
    state = tx.init(params)
    there = {
        "names": names,
        "paths": names,
        "grads": jax.tree.leaves(jax.tree.map(jnp.ones_like, params)),
        "averaged_state": at.adam(ema=0.99).init(params),
        "scaled_state": at.adam(loss_scale="dynamic").init(params),
        "config": at.compat.keras.Adam().get_config(),
        "state_dict": at.interop.torch.state_to(state, params, names),
        "store": at.interop.keras.state_to(state, params, names, learning_rate=1e-3),
        "checkpoint": at.interop.tf1.state_to(state, params),
    }

    def loss(params):
        return jnp.sum(
            (params["table"][1] @ params["dense"]["kernel"] + params["dense"]["bias"]) ** 2
        )

    for piece in code:
        names_there = there | {"at": at, "jax": jax, "jnp": jnp, "optax": optax, "opt": opt}
        names_there |= {"dataclasses": dataclasses}
        names_there |= {"tx": tx, "params": params, "state": opt.init(params), "loss": loss}
        result = eval(piece, names_there)
        assert result is not None, piece
        if isinstance(result, optax.GradientTransformation):
            grad = at.grad(loss, tables="table") if "lazy" in piece else jax.grad(loss)
            updates, _ = result.update(grad(params), result.init(params), params)
            assert jax.tree.structure(at.to_dense(updates)) == jax.tree.structure(params), piece


def test_examples_are_as_short_as_promised() -> None:
    """15 lines for Optax, 20 for Flax."""
    assert [len(example.splitlines()) for example in EXAMPLES[:2]] == [15, 20]


def test_every_public_name_is_in_the_table() -> None:
    functions = [name for name in at.__all__ if name[0].islower()]
    assert [name for name in functions if f"`{name}`" not in README] == []
