"""The commands of infra/README.md are right requests, and the files that it names are there."""

import re
import shlex

from jobs import cli
from jobs.submit import SUBMITTABLE
from tests.infra.deployed import INFRA, ROOT, base_objects

README = (INFRA / "README.md").read_text()


def ldm_commands() -> list[list[str]]:
    """All `ldm …` lines in blocks of code, those that go on joined."""
    lines = README.replace("\\\n", " ").replace("=PRICE", "=1.5").splitlines()
    found = [re.match(r"(?:\$ | {4})(ldm .*)", line) for line in lines]
    return [shlex.split(line[1], comments=True)[1:] for line in found if line and "…" not in line[1]]


def test_its_ldm_commands_are_understood() -> None:
    verbs = []
    for command in ldm_commands():
        if command[0] == "submit":
            assert command[1] in SUBMITTABLE and command[2:6] == [
                "--address",
                "http://localhost:8265",
                "--python",
                "python3",
            ]
            command = [command[1], *command[6:]]
        verbs.append(command[0])
        _, config = cli.parse_stage(command[0], [part for part in command[1:] if part != "--dry-run"])
        assert config is not None
    assert verbs == ["inspect", "train", "encode", "verify", "train"]


def test_the_files_that_it_names_are_there() -> None:
    table = README.split("\n\n")[1]
    named = {name for row in table.splitlines() for name in re.findall(r"`([\w/.*-]+)`", row.split("|")[1])}
    assert len(named) > 10
    assert all(list(INFRA.glob(name)) for name in named), named
    commands = set(re.findall(r"\binfra/[\w/.-]+\w", README)) - {"infra/compose/.env", "infra/k8s/overlays/mine"}
    assert all((ROOT / name).exists() for name in commands), commands


def test_what_it_selects_is_there() -> None:
    labels = {label for each in base_objects() for label in each["metadata"].get("labels", {})}
    selected = set(re.findall(r" -l (ldm/\w+)", README))
    assert selected == {"ldm/serve", "ldm/train"} and selected <= labels
