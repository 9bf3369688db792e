"""What a run began with, and what was excluded from it since: `OUTPUT/run.json` and `OUTPUT/exclude/`."""

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from ldm import storage
from ldm.config import DamagedError, RequestError, differences, validate
from ldm.latents.choice import ids_hash, read_ids
from pipelines.train.config import TrainConfig, trajectory
from pipelines.train.tell import tell

RUN_FILE = "run.json"
VALIDATION_FILE = "validation.json"
FORMAT, VERSION = "ldm-run", 2
"""Version 1 drew other random numbers and had another order of samples."""
_EXCLUDED = re.compile("exclude/[0-9a-f]{16}[.]txt")


@dataclass(frozen=True)
class RunRecord:
    """The content of `run.json`.

    trajectory: the keys that decide what is learned. generations: of the latent datasets, which name their content.
    chosen: count and hash of the samples, and what was left out. exclusions: lists of ids by the step from which each
    is left out, as URLs below the output.
    """

    trajectory: dict[str, Any]
    generations: tuple[str, ...]
    fingerprint: str
    run_id: str | None
    chosen: dict[str, Any]
    exclusions: dict[int, str]


def read_record(config: TrainConfig, checkpoint: str | None) -> RunRecord | None:
    """What the run in `output` began with; None where it never came to a checkpoint, and so binds nobody.

    Raises RequestError where this request would change what it learns, DamagedError where it names others' files.
    """
    url = storage.join(config.output, RUN_FILE)
    if checkpoint is None or not storage.exists(url):
        return None
    values: dict[str, Any] = storage.read_json(url)
    if values.pop("format", None) != FORMAT or values.pop("version", None) != VERSION:
        raise RequestError(
            f"output={config.output}: holds a run of another version, which had another order of samples and cannot go "
            "on exactly; give another output, and init_from=SNAPSHOT to begin with its weights"
        )
    exclusions = {int(step): name for step, name in values.pop("exclusions").items()}
    if strange := [name for name in exclusions.values() if not _EXCLUDED.fullmatch(name)]:
        raise DamagedError(f"{url}: names the list {strange[0]!r}, which is none of the run")
    record = RunRecord(**{**values, "generations": tuple(values["generations"])}, exclusions=exclusions)
    # With the defaults of keys that are newer than the run.
    began = validate(TrainConfig, {"latents": config.latents, "output": config.output, **record.trajectory})
    changed = differences(trajectory(began), trajectory(config))
    if changed and config.resume != "never":
        raise RequestError(
            f"output={config.output}: holds a run with other settings ({'; '.join(changed)}); "
            "give another output, or the settings that it began with"
        )
    return record


def write_record(output: str, record: RunRecord) -> None:
    storage.write_json(storage.join(output, RUN_FILE), {"format": FORMAT, "version": VERSION, **asdict(record)})


def write_note(url: str, value: Any) -> None:
    """JSON that a run can do without: where it cannot be written, that is said, and training goes on."""
    try:
        storage.write_json(url, value)
    except OSError as error:
        tell(f"{url} cannot be written ({' '.join(str(error).split())[:200]})")


@dataclass(frozen=True)
class Validated:
    """A loss of the average, None where it was not finite, and on which samples: losses of others do not compare."""

    loss: float | None
    samples: str


def note_validation(output: str, step: int, loss: float, samples: str) -> None:
    """Adds to `OUTPUT/validation.json`, which says what snapshots are worth."""
    found = Validated(loss if math.isfinite(loss) else None, samples)
    _write_validations(output, {**validations(output), step: found})


def forget_validations(output: str, after: int) -> None:
    """Of a branch that is left: those of later steps."""
    found = validations(output)
    if any(step > after for step in found):
        _write_validations(output, {step: one for step, one in found.items() if step <= after})


def validations(output: str) -> dict[int, Validated]:
    """By optimizer step."""
    url = storage.join(output, VALIDATION_FILE)
    values = storage.read_json(url) if storage.exists(url) else {}
    # A run that is older names no samples.
    return {int(s): Validated(**v) if isinstance(v, dict) else Validated(v, "") for s, v in values.items()}


def newest_samples(output: str) -> str:
    """The samples of the newest validation; empty where there is none."""
    found = validations(output)
    return found[max(found)].samples if found else ""


def best_steps(output: str) -> list[tuple[float, int]]:
    """(loss, optimizer step) of the validations on the samples of the newest one, best first."""
    found, samples = validations(output), newest_samples(output)
    return sorted((one.loss, step) for step, one in found.items() if one.samples == samples and one.loss is not None)


def _write_validations(output: str, found: dict[int, Validated]) -> None:
    write_note(storage.join(output, VALIDATION_FILE), {str(step): asdict(one) for step, one in found.items()})


def tracking_url(output: str) -> str:
    """Where a run keeps what MLflow has not heard yet."""
    return storage.join(output, "tracking")


def exclusions_asked(config: TrainConfig, record: RunRecord | None, batches_read: int) -> dict[int, frozenset[int]]:
    """All that is left out from each batch on, when the run goes on after so many batches. Lists only grow.

    What a run that goes back left out later is left out from there on.

    Raises RequestError where the request lacks what the run leaves out already.
    """
    lists = record.exclusions if record else {}
    known = {at: read_ids(storage.join(config.output, name)) for at, name in lists.items()}
    before = frozenset[int]().union(*known.values())
    asked = read_ids(config.exclude) if config.exclude is not None else before
    if missing := before - asked:
        raise RequestError(
            f"exclude={config.exclude}: lacks {len(missing)} of the {len(before)} ids that the run leaves out already, "
            f"such as {min(missing)}; add to the list, and take nothing from it"
        )
    kept = {at: ids for at, ids in known.items() if at <= batches_read}
    return kept if asked == frozenset[int]().union(*kept.values()) else {**kept, batches_read: asked}


def write_exclusions(output: str, exclusions: dict[int, frozenset[int]]) -> dict[int, str]:
    """Keeps each list in the run, so that it goes on without the files it was asked with. Returns their names."""
    names = {}
    for step, ids in exclusions.items():
        names[step] = f"exclude/{ids_hash(ids)}.txt"
        place = storage.join(output, names[step])
        if not storage.exists(place):
            storage.write_bytes(place, "".join(f"{identity}\n" for identity in sorted(ids)).encode())
    return names
