"""The site's reference has every public name, each on one page."""

import importlib
import inspect
import re
from collections import Counter
from pathlib import Path

import adam_transforms as at

DOCS = Path(__file__).parent.parent / ".github" / "docs"
PAGES = {path.stem: path.read_text() for path in sorted((DOCS / "reference").glob("*.rst"))}
DOCUMENTED = Counter(
    name
    for text in PAGES.values()
    for name in re.findall(r"^\.\. auto(?:function|class|module):: (\S+)$", text, re.MULTILINE)
)
MODULES = [
    *("compat", "compat.capreolus", "compat.keras", "compat.keras.schedules", "compat.tf1"),
    *("equinox", "flax", "interop", "interop.keras", "interop.tf1", "interop.tf2", "interop.torch"),
]


def test_every_public_name_is_on_exactly_one_page() -> None:
    expected = {f"{at.__name__}.{name}" for name in at.__all__}
    for module in (f"{at.__name__}.{name}" for name in MODULES):
        expected |= {module, *(f"{module}.{x}" for x in importlib.import_module(module).__all__)}
    assert set(DOCUMENTED) == expected
    assert [name for name, pages in DOCUMENTED.items() if pages != 1] == []


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (DOCS / "index.md").read_text()
    assert sorted(re.findall(r"^reference/(\w+)$", index, re.MULTILINE)) == sorted(PAGES)


def test_docstrings_are_in_the_form_that_the_site_renders() -> None:
    """Markdown's links, fences and formulas would be shown as they are."""
    for name in DOCUMENTED:
        module, _, attribute = name.removeprefix(f"{at.__name__}.").rpartition(".")
        owner = importlib.import_module(f"{at.__name__}.{module}" if module else at.__name__)
        text = inspect.getdoc(getattr(owner, attribute, None)) or ""
        assert not re.search(r"\]\(http|^```|\$[^$\n]+\$", text, re.MULTILINE), name


def test_the_glossary_explains_the_words_of_the_readme() -> None:
    glossary = (DOCS / "glossary.rst").read_text()
    terms = re.findall(r"^   (\w[\w ]*)$", glossary, re.MULTILINE)
    words = {"table", "row", "slot", "touched", "lazy", "deferred", "pending update"}
    assert words <= set(terms)
    assert len(terms) == len(set(terms))
