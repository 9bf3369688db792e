"""Every `ldm …` that a page names, in running text too, has a stage, keys and values that the program takes."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import cli
from ldm.config import RequestError

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "infra/README.md")),
]


def commands(text: str) -> Iterator[str]:
    """The commands in code spans, console blocks and indented blocks, without what only explains them."""
    text = re.sub(r"\s*\\\n\s*", " ", text)
    spans = re.findall(r"`(ldm [a-z][^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = re.findall(r"^(?:    |\$ )(?:[A-Z_]+=\S+ )*(ldm [a-z].*)", text, re.MULTILINE)
    for command in dict.fromkeys([*spans, *lines]):
        explained = re.search(r"\s#|   ", command)
        command = command[: explained.start()] if explained else command
        yield re.sub(r"=(…|PRICE)", "=1", command).replace(" …", "").strip()


def check(command: str) -> None:
    """Raises RequestError for a stage, a key or a value that there is not; keys may be missing, as prose has it."""
    verb, *arguments = shlex.split(command)[1:]
    if verb == "submit":
        takes_one = ("--address", "--python")
        kept = [word for before, word in zip([verb, *arguments], arguments, strict=False) if before not in takes_one]
        verb, *arguments = [word for word in kept if word not in takes_one] or ["STAGE"]
    if verb in cli.COMMANDS or verb == "STAGE":
        return
    arguments = [word for word in arguments if word != "--dry-run"]  # which looks for the files
    while arguments:
        try:
            cli.parse_stage(verb, arguments)
        except RequestError as error:
            missing = re.match(r"(\w+): missing; give ", str(error))
            if not missing:
                raise
            arguments.append(f"{missing[1]}=1")
        else:
            return
    cli.stage_module(verb)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_are_those_of_the_program(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = list(commands(path.read_text()))
    for command in found:
        try:
            check(command)
        except RequestError as error:
            pytest.fail(f"{command}: {error}")


@pytest.mark.parametrize("command", ["ldm encod", "ldm encode sorce=a", "ldm sample batch_size=x"])
def test_a_wrong_one_would_be_seen(command: str) -> None:
    with pytest.raises(RequestError):
        check(command)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("call `ldm sample\n--help`", ["ldm sample\n--help"]),
        ("call\n\n    ldm encode source=… flip=true …    mirrored", ["ldm encode source=1 flip=true"]),
        ("```console\n$ A=b ldm train \\\n      latents=a  # now\n```", ["ldm train latents=a"]),
    ],
)
def test_where_commands_are_found(text: str, found: list[str]) -> None:
    assert list(commands(text)) == found
