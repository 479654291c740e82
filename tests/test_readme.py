"""What the README shows runs, and says what is so."""

import re
from pathlib import Path

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


def test_examples_are_as_short_as_promised() -> None:
    """15 lines for Optax, 20 for Flax."""
    assert [len(example.splitlines()) for example in EXAMPLES] == [15, 20]


def test_every_public_name_is_in_the_table() -> None:
    functions = [name for name in at.__all__ if name[0].islower()]
    assert [name for name in functions if f"`{name}`" not in README] == []
