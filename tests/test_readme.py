"""What the README shows runs, and says what is so."""

import re
from pathlib import Path

import pytest

import adam_transforms as at

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(
    number: int, relaxed_promotion: None, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(EXAMPLES[number], f"README example {number + 1}", "exec"), {})
    assert "nan" not in capsys.readouterr().out


def test_first_example_reaches_the_optimum(
    relaxed_promotion: None, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict = {}
    exec(EXAMPLES[0], names)
    final = at.finalize(names["params"], names["state"])["w"]
    assert abs(final - 1.0).max() < 0.05


def test_flax_example_learns(relaxed_promotion: None, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict = {}
    exec(EXAMPLES[1], names)
    assert names["loss"] < 0.5 * float(names["y"].var())


def test_examples_are_as_short_as_promised() -> None:
    assert [
        len(example.splitlines()) <= most for example, most in zip(EXAMPLES, (16, 22), strict=True)
    ] == [
        True,
        True,
    ]


def test_every_public_name_is_in_the_table() -> None:
    functions = [name for name in at.__all__ if name[0].islower()]
    assert [name for name in functions if f"`{name}`" not in README] == []
