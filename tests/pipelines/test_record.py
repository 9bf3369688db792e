"""What a run writes down of itself."""

from pathlib import Path

import pytest

from pipelines.train import TrainConfig
from pipelines.train.record import (
    RunRecord,
    Validated,
    best_steps,
    exclusions_asked,
    forget_validations,
    note_validation,
    validations,
    write_exclusions,
    write_note,
)


def test_going_back_takes_along_what_was_left_out_later(tmp_path: Path) -> None:
    config = TrainConfig(latents="latents", output=str(tmp_path))
    lists = {0: frozenset({1}), 150: frozenset({1, 2})}
    record = RunRecord({}, (), "", None, {}, write_exclusions(str(tmp_path), lists))
    assert exclusions_asked(config, record, 150) == exclusions_asked(config, record, 200) == lists
    assert exclusions_asked(config, record, 100) == {0: {1}, 100: {1, 2}}
    (tmp_path / "more.txt").write_text("1\n2\n3\n")
    more = config.model_copy(update={"exclude": str(tmp_path / "more.txt")})
    assert exclusions_asked(more, record, 100) == {0: {1}, 100: {1, 2, 3}}


def test_a_note_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("no folder")
    write_note(str(tmp_path / "file" / "note.json"), {})
    assert capsys.readouterr().err.startswith(f"train: {tmp_path}/file/note.json cannot be written (")


def test_validation_losses_are_kept_by_step(tmp_path: Path) -> None:
    output = str(tmp_path)
    assert validations(output) == {} and best_steps(output) == []
    for step, loss in ((10, 0.5), (20, float("nan")), (10, 0.25)):
        note_validation(output, step, loss, "9 of a")
    assert validations(output) == {10: Validated(0.25, "9 of a"), 20: Validated(None, "9 of a")}


def test_the_best_is_sought_among_validations_of_the_same_samples(tmp_path: Path) -> None:
    output = str(tmp_path)
    for step, loss, samples in (
        (10, 0.5, "9 of a"),
        (20, 0.1, "4 of a"),
        (30, 0.4, "9 of a"),
        (40, 0.1, "9 of b"),
        (50, 0.7, "9 of a"),
        (60, float("nan"), "9 of a"),
    ):
        note_validation(output, step, loss, samples)
    assert best_steps(output) == [(0.4, 30), (0.5, 10), (0.7, 50)]
    forget_validations(output, 20)
    assert best_steps(output) == [(0.1, 20)] and list(validations(output)) == [10, 20]
