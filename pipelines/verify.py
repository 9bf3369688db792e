"""A latent dataset checked against its own manifest; in full, a receipt at a time on Ray."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from pydantic import Field

from ldm import storage
from ldm.config import Config, Location
from ldm.latents.manifest import Manifest
from ldm.latents.receipt import ShardReceipt
from ldm.latents.verify import Extras, open_to_verify, verify_autoencoder, verify_quick
from ldm.latents.verify_shard import verify_receipt
from pipelines import cluster
from pipelines.progress import Progress, say

_SHOWN = 1000


class VerifyConfig(Config):
    """Whether a latent dataset is whole."""

    latents: Location = Field(description="directory or URL of the latent dataset")
    level: Literal["quick", "full"] = Field(
        "quick", description="quick: manifest, counts, sizes; full: every byte of every shard too, on Ray"
    )
    generation: str | None = Field(None, description="of the manifest; null: the newest")


@dataclass(frozen=True)
class VerifyReport:
    """What scripts may rely on: ok and problems, one line each that begins with the file.

    checked: records of the generation. orphans: files that belong to no receipt, as a killed run leaves them.
    newer_receipts: shards that are encoded, and in no generation yet. Neither is a problem.
    """

    ok: bool
    problems: list[str]
    generation: str
    checked: int
    orphans: int
    newer_receipts: int
    exit_code: int = 0


def verify(config: VerifyConfig) -> VerifyReport:
    """Lists all that is wrong. Raises RequestError where there is no latent dataset."""
    url = storage.absolute(config.latents)  # Ray's workers stand in another folder
    opened = open_to_verify(url, config.generation)
    manifest, problems, extras = opened.manifest, [*opened.problems], Extras(0, 0)
    if manifest is not None:
        found, extras = verify_quick(manifest, opened.receipts)
        problems += found
        if config.level == "full":
            problems += verify_autoencoder(manifest)
            problems += _verify_receipts(manifest, opened.receipts)
    if len(problems) > _SHOWN:
        problems = [*problems[:_SHOWN], f"{url}: and {len(problems) - _SHOWN:,} problems more"]
    for line in problems:
        say(line)
    return VerifyReport(
        ok=not problems,
        problems=problems,
        generation=manifest.generation if manifest else "",
        checked=manifest.num_samples if manifest else 0,
        orphans=extras.orphans,
        newer_receipts=extras.newer_receipts,
        exit_code=1 if problems else 0,
    )


def _verify_receipts(manifest: Manifest, receipts: Sequence[ShardReceipt]) -> list[str]:
    """One task each, a few more at a time than there are CPUs; what they find is told in the order of the receipts."""
    import ray

    found: dict[int, list[str]] = {}
    with cluster.ray_session(), Progress("verify", len(receipts), "shards") as progress:
        check = ray.remote(verify_receipt)
        at_once = int(ray.cluster_resources().get("CPU", 1)) + 2
        todo, running = iter(enumerate(receipts)), dict[Any, int]()
        while len(found) < len(receipts):
            for number, receipt in islice(todo, at_once - len(running)):
                running[check.remote(manifest.url, manifest.channels, receipt)] = number
            for future in ray.wait([*running], timeout=1.0)[0]:
                number = running.pop(future)
                found[number] = _result(future, manifest.url, receipts[number])
                progress.advance(1, f"{sum(map(len, found.values())):,} problems")
    return [line for number in range(len(receipts)) for line in found[number]]


def _result(future: Any, url: str, receipt: ShardReceipt) -> list[str]:
    import ray

    try:
        lines: list[str] = ray.get(future)
        return lines
    except ray.exceptions.RayError as error:  # a worker that was killed; what a check cannot foresee
        why = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:200]
        return [f"{storage.join(url, 'receipts', receipt.name)}.json: what it names could not be checked ({why})"]
