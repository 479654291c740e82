"""What the README shows runs, and says what is so."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_transforms as at

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# {the first word or words of a tab: its program}
EXAMPLES = dict(
    re.findall(r"<summary>([\w ]*?\w)(?:: .*)?</summary>\n\n```python\n(.*?)```", README, re.DOTALL)
)

Names = dict[str, Any]


@pytest.fixture
def run(relaxed_promotion: None, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Names]:
    """Runs an example, and returns its names; it has printed its loss."""

    def run(title: str) -> Names:
        names: Names = {}
        exec(EXAMPLES[title], names)
        assert capsys.readouterr().out == f"loss {names['loss']:.4f}\n"
        return names

    return run


def test_there_is_an_example_for_each_library() -> None:
    titles = ["Plain JAX", "Flax linen", "Flax NNX", "Equinox", "Haiku", "deferred_adam"]
    assert [*EXAMPLES] == titles


@pytest.mark.parametrize("title", ["Plain JAX", "deferred_adam"])
@pytest.mark.every_case
def test_plain_examples_learn_the_rows_that_they_read(
    title: str, run: Callable[[str], Names]
) -> None:
    names = run(title)
    assert names["loss"] < 0.1
    table = np.asarray(names["params"]["embedding"])
    assert table[:1000].any()
    assert not table[1000:].any()
    if title == "deferred_adam":
        assert int(at.owed(names["params"], names["state"])["embedding"].rows) == 0


@pytest.mark.parametrize("title", ["Flax linen", "Flax NNX", "Equinox", "Haiku"])
@pytest.mark.every_case
def test_examples_of_modules_learn(title: str, run: Callable[[str], Names]) -> None:
    pytest.importorskip({"Equinox": "equinox", "Haiku": "haiku"}.get(title, "flax"))
    assert run(title)["loss"] < 0.01


def test_the_first_change_is_two_lines_of_an_optax_loop(relaxed_promotion: None) -> None:
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    lines = diff.splitlines()
    assert [sum(x.startswith(sign) for x in lines) for sign in "-+ "] == [2, 3, 2]

    def run(program: list[str], steps: int) -> Names:
        names: Names = {"jax": jax, "optax": optax}
        names["params"] = {"embedding": jnp.ones((50, 2))}
        names["loss_fn"] = lambda params, ids: jnp.sum(params["embedding"][ids] ** 2)
        names["batch"] = jnp.array([3, 4])
        start = next(i for i, line in enumerate(program) if line.startswith("tx = ")) + 1
        exec("\n".join(program[:start]), names)
        names["state"] = names["tx"].init(names["params"])
        for _ in range(steps):
            exec("\n".join(program[start:]), names)
        return names

    # All rows are read at the first step, so that lazy and dense Adam differ afterwards.
    for steps in (1, 3):
        before, after = (run([x[1:] for x in lines if x[0] in f"{sign} "], steps) for sign in "-+")
        assert after["loss"] == pytest.approx(before["loss"])
        np.testing.assert_allclose(
            after["params"]["embedding"], before["params"]["embedding"], rtol=1e-6
        )


def test_examples_name_what_there_is() -> None:
    for title, example in EXAMPLES.items():
        assert len(example.splitlines()) <= 15, title
        for name in re.findall(r"\bat\.(\w+)", example):
            assert hasattr(at, name), f"{title}: at.{name}"


def test_the_first_numbers_are_those_of_the_results() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "sparse.json").read_text())
    of_largest = {row["name"]: row["ms"] for row in results["growth"] if row["rows"] == 10**7}
    lazy, dense = of_largest["lazy_adam"], of_largest["dense optax.adam"]
    assert f"10 million takes {lazy:.2g} ms; with `optax.adam` it takes {dense:.0f} ms" in README


def test_the_readme_is_short_enough_to_be_read() -> None:
    assert len(README.splitlines()) <= 250


def test_messages_in_troubleshooting_are_those_of_the_package() -> None:
    _, _, table = README.partition("| what you see | cause, and what to do |\n|---|---|\n")
    messages = re.findall(r"^\| `([^`]+)`", table.partition("\n\n")[0], re.MULTILINE)
    sources = (path.read_text() for path in Path(at.__file__).parent.rglob("*.py"))
    # Long messages are several strings in the source.
    source = re.sub(r'"\s*\n\s*f?"', "", "".join(sources))
    assert len(messages) >= 5
    assert [x for x in messages if x not in source] == []


def test_paths_exist() -> None:
    links = [x for x in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in x]
    assert len(links) > 5
    assert [x for x in links if not (ROOT / x).exists()] == []


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
            updates, _ = jax.jit(result.update)(grad(params), result.init(params), params)
            assert jax.tree.structure(at.to_dense(updates)) == jax.tree.structure(params), piece


def test_every_public_name_is_there() -> None:
    functions = [name for name in at.__all__ if name[0].islower()]
    assert [x for x in functions if f"`{x}`" not in README and f"`at.{x}`" not in README] == []
