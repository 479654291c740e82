"""What a release says of itself agrees."""

import re
import tomllib
from pathlib import Path

import adam_transforms as at

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"


def test_the_version_stands_in_the_changelog_and_the_citation() -> None:
    changelog = (GITHUB / "CHANGELOG.md").read_text()
    versions = re.findall(
        r"^## \[(\S+)\] - (?:unreleased|\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE
    )
    assert versions[0] == at.__version__
    links = re.findall(r"^\[(\S+)\]: http", changelog, re.MULTILINE)
    assert links == versions
    citation = (GITHUB / "CITATION.cff").read_text()
    assert f"\nversion: {at.__version__}\n" in citation


def test_the_changelog_names_what_there_is() -> None:
    latest = (GITHUB / "CHANGELOG.md").read_text().split("\n## ")[1]
    added, _, _ = latest.partition("### Changed")
    for name in re.findall(r"^- `(\w+)`[:,]", added, re.MULTILINE):
        assert hasattr(at, name), name


def test_every_address_has_the_same_owner() -> None:
    """A placeholder that is filled in must be filled in everywhere."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    files = [GITHUB / "CHANGELOG.md", GITHUB / "CITATION.cff", ROOT / "README.md"]
    files += (ROOT / "notebooks").glob("*.ipynb")
    text = "\n".join([*project["urls"].values(), *(path.read_text() for path in files)])
    found = re.findall(r"github\.com/([\w-]+)/adam_transforms|//([\w-]+)\.github\.io", text)
    assert len({of_source or of_site for of_source, of_site in found}) == 1
