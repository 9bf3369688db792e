"""The files of the page hold together, and name nothing outside."""

import re
from importlib.resources import files
from pathlib import Path

import pytest

FOLDER = Path(str(files("pipelines.serve"))) / "page"
FILES = sorted(path.name for path in FOLDER.iterdir())
# A namespace is a name that looks like an address; nothing is ever asked of it.
NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'
OUTSIDE = re.compile(r"""[a-zA-Z]+:?//[\w.]|["'(=`]\s*//[\w.]|@import|url\(|importScripts|\bimport\(""")


def outside(text: str) -> list[str]:
    """Where a text names another host, or loads what this test would not see."""
    return OUTSIDE.findall(text.replace(NAMESPACE, ""))


@pytest.mark.parametrize("name", FILES)
def test_a_file_names_no_outside_host(name: str) -> None:
    assert outside((FOLDER / name).read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://cdn.example/x.js">',
        '<link href="//fonts.example/a.css">',
        "import x from 'http://example.com/x.js'",
        "new WebSocket(`wss://example.com`)",
        "@import 'a.css';",
        "background: url(a.png)",
    ],
)
def test_a_planted_host_is_found(text: str) -> None:
    assert len(outside(text)) == 1


def test_each_file_is_loaded_and_each_that_is_loaded_is_there() -> None:
    html = (FOLDER / "index.html").read_text()
    loaded = set(re.findall(r'(?:src|href)="page/([^"]+)"', html))
    for name in FILES:
        if name.endswith(".js"):
            loaded |= set(re.findall(r'from "\./([^"]+)"', (FOLDER / name).read_text()))
    assert loaded == set(FILES) - {"index.html"}


def test_each_element_that_a_script_asks_for_is_on_the_page() -> None:
    html = (FOLDER / "index.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    asked = {
        name for path in FOLDER.glob("*.js") for name in re.findall(r'(?:byId|copy)\("([^"]+)"\)', path.read_text())
    }
    assert asked - set(ids) == set()
    labelled = set(re.findall(r'\bfor="([^"]+)"', html))
    assert labelled - set(ids) == set()
