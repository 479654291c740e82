"""The site: the README, the notebooks as they are committed, and a reference made of docstrings."""

import importlib.util
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import jax.typing
from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation

import adam_transforms
from adam_transforms._core import patterns

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]

# Sphinx reads sources in this folder alone.
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
shutil.copytree(
    ROOT / "notebooks",
    HERE / "notebooks",
    ignore=lambda _, names: {name for name in names if not name.endswith(".ipynb")},
)

project = "adam_transforms"
author = copyright = "The adam_transforms authors"
release = version = adam_transforms.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
# A name in single backticks is a link where this site has it, and code where it does not.
default_role = "py:obj"

nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

napoleon_numpy_docstring = False
napoleon_use_param = False
# Sentences: what stands before a colon is no type.
napoleon_custom_sections = ["Returns", ("Attributes", "params_style")]
autodoc_default_options = {"exclude-members": "__new__, __init__"}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {
    "optax.ScalarOrSchedule": "optax.ScalarOrSchedule",
    "DTypeLike": "DTypeLike",
    "patterns.Selection": "Selection",
    "Selection": "Selection",
}
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

# Quotes of strings and code stay as they are.
smartquotes = False

html_theme = "furo"
html_title = f"adam_transforms {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {
    "source_repository": SOURCE,
    "source_branch": "main",
    "source_directory": ".github/docs/",
}
mathjax_path = "mathjax/tex-chtml.js"


def readme() -> str:
    """The README, whose links to files are links into the site or to the repository."""
    text = (ROOT / "README.md").read_text()

    def link(match: re.Match[str]) -> str:
        before, target = match.groups()
        if target.startswith(("http", "#", "notebooks/")):
            return match[0]
        is_image = target.endswith((".png", ".svg"))
        return before + (f"../../{target}" if is_image else f"{SOURCE}/blob/main/{target}")

    return re.sub(r'(\]\(|src=")([^)"\s]+)', link, text)


def insert_readme(app: Sphinx, docname: str, source: list[str]) -> None:
    source[0] = source[0].replace("{{ README }}", readme())


def convert_tables(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Makes the Markdown tables in docstrings of modules tables of reStructuredText."""
    converted: list[str] = []
    for line in lines:
        if not line.startswith("|"):
            converted.append(line)
        elif not line.startswith("|---"):
            if not converted or not converted[-1].startswith("   "):
                converted += [".. list-table::", "   :header-rows: 1", ""]
            first, *others = line.strip("|").split(" | ")
            converted += [f"   * - {first.strip()}", *(f"     - {x.strip()}" for x in others)]
    lines[:] = converted


# {a type as signatures show it, evaluated: its name}
NAMES_OF_TYPES = {
    stringify_annotation(patterns.Selection, "smart"): "Selection",
    stringify_annotation(patterns.Patterns, "smart"): "Patterns",
    stringify_annotation(jax.typing.DTypeLike, "smart"): "DTypeLike",
    "[[~A], ": "[~A, ",
}


def name_types(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, result: str
) -> tuple[str, str]:
    """A signature with short names of types."""

    def named(text: str | None) -> Any:
        text = re.sub(r"TypeAliasForwardRef\('([\w.]+)'\)", r"\1", text or "")
        for evaluated, short in NAMES_OF_TYPES.items():
            text = text.replace(evaluated, short)
        return text or None

    return named(signature), named(result)


def copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    """What formulas need of MathJax, so that pages load nothing from elsewhere."""
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    assert package is not None and package.submodule_search_locations
    source = Path(package.submodule_search_locations[0], "static", "mathjax")
    target, fonts = Path(app.outdir, "_static", "mathjax"), "output/chtml/fonts"
    shutil.copytree(source / fonts, target / fonts, dirs_exist_ok=True)
    shutil.copy(source / "tex-chtml.js", target)


def setup(app: Sphinx) -> None:
    app.connect("source-read", insert_readme)
    app.connect("autodoc-process-docstring", convert_tables)
    app.connect("autodoc-process-signature", name_types)
    app.connect("build-finished", copy_mathjax)
