"""Lineage in MLflow: the data that a run read, the snapshot that came of it, the snapshot that it measured.

What a run that goes on writes again stands there once: MLflow keeps one input for each (dataset, run) and for each
(model, run), and a snapshot is looked up by the hash of its weights before it becomes a logged model.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from ldm import storage
from ldm.config import canonical_json
from ldm.latents.manifest import Manifest, fingerprint_hash
from ldm.snapshot import Snapshot

WEIGHTS_TAG = "weights_sha256"
BEST_TAG = "best"
GONE_TAG = "removed"
SNAPSHOT_PARAM = "snapshot"
_EXTERNAL_TAG = "mlflow.model.isExternal"


@dataclass(frozen=True)
class TrackedDataset:
    """A data set as MLflow knows it: runs that name the same (name, digest) meet in one entity of their experiment.

    digest: at most 36 characters. profile: what a person sees of it, plain values; the first run's stands.
    """

    name: str
    digest: str
    url: str
    profile: dict[str, Any]


@dataclass(frozen=True)
class TrackedModel:
    """A snapshot as MLflow knows it: its weights stay where they are. params: what a person sees of it."""

    name: str
    images_seen: int
    weights_sha256: str
    fingerprint: str
    params: dict[str, str]


def image_dataset(sizes: dict[str, int]) -> TrackedDataset:
    """Image shards, as URL => bytes: the same for the same files, whatever pattern named them."""
    folders = sorted({url.rpartition("/")[0] for url in sizes})
    named = {storage.name(url): size for url, size in sizes.items()}
    digest = hashlib.sha256(canonical_json(named).encode()).hexdigest()[:16]
    profile = {"num_shards": len(sizes), "bytes": sum(sizes.values())}
    return TrackedDataset(storage.name(folders[0]), digest, ",".join(folders), profile)


def latent_dataset(manifest: Manifest) -> TrackedDataset:
    """One generation of a latent dataset: the same entity for the run that wrote it and for those that train on it."""
    profile = {
        "num_samples": manifest.num_samples,
        "num_shards": len(manifest.shards),
        "num_classes": manifest.conditioning.num_classes,
        "store": manifest.store,
        "fingerprint": fingerprint_hash(manifest.fingerprint),
    }
    url = storage.absolute(manifest.url)
    return TrackedDataset(storage.name(url), manifest.generation, url, profile)


def write_dataset(client: Any, run_id: str, dataset: TrackedDataset, context: str) -> None:
    """Logs a data set as an input of the run, in the role `context`."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    kind = "local" if storage.is_local(dataset.url) else dataset.url.partition("://")[0]
    source, profile = json.dumps({"uri": dataset.url}), json.dumps(dataset.profile)
    entity = Dataset(dataset.name, dataset.digest, kind, source, profile=profile)
    client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", context)])])


def plain_name(name: str) -> str:
    """A name of a model without the characters that MLflow refuses."""
    return "".join("-" if character in "/:.%\"'" else character for character in name)


def snapshot_model(run_name: str, snapshot: Snapshot) -> TrackedModel:
    params = {
        SNAPSHOT_PARAM: snapshot.url,
        "step": snapshot.step,
        "images_seen": snapshot.images_seen,
        "latent_shape": list(snapshot.latent_shape),
        "num_classes": snapshot.conditioning.num_classes,
        **{f"denoiser.{key}": value for key, value in snapshot.denoiser.items()},
    }
    return TrackedModel(
        plain_name(f"{run_name}-step-{snapshot.step}"),
        snapshot.images_seen,
        snapshot.weights_sha256,
        fingerprint_hash(snapshot.fingerprint),
        {key: str(value)[:6000] for key, value in params.items()},
    )


def write_model(client: Any, run_id: str, experiment_id: str, tracked: TrackedModel) -> None:
    """Logs a snapshot as a model that the run gave, by its URL: no weights are uploaded.

    What a kill left half done is finished. The step is the images seen, as for metrics.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    model, linked = model_of(client, run_id, experiment_id, tracked.weights_sha256), set()
    if model is None:
        model = _create_model(client, run_id, experiment_id, tracked)
    else:  # only then is there more to ask for: a run lists the models of all its snapshots
        linked = {output.model_id for output in client.get_run(run_id).outputs.model_outputs}
    if model.model_id not in linked:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, tracked.images_seen)])
    if model.status != LoggedModelStatus.READY:
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def write_best_model(
    client: Any, run_id: str, experiment_id: str, weights_sha256: str, metric: str, value: float
) -> None:
    """Tags the run's model with these weights as the best one by a metric, and no other of its models."""
    model = model_of(client, run_id, experiment_id, weights_sha256)
    if model is None:
        raise ValueError(f"run {run_id} has no model with the weights {weights_sha256}")
    best = f"tags.{BEST_TAG} = '{metric}' AND source_run_id = '{run_id}'"
    for other in client.search_logged_models([experiment_id], filter_string=best):
        if other.model_id != model.model_id:
            client.delete_logged_model_tag(other.model_id, BEST_TAG)
    client.set_logged_model_tags(model.model_id, {BEST_TAG: metric, metric: str(value)})


def write_used_model(client: Any, run_id: str, experiment_id: str, weights_sha256: str) -> None:
    """Links the run to the newest logged model with these weights in its experiment, where there is one."""
    from mlflow.entities import LoggedModelInput

    if model := _newest_model(client, experiment_id, weights_sha256):
        client.log_inputs(run_id, models=[LoggedModelInput(model.model_id)])


def write_score(
    client: Any,
    run_id: str,
    experiment_id: str,
    weights_sha256: str,
    step: int,
    group: str,
    dataset_name: str | None,
    dataset_digest: str | None,
) -> None:
    """Gives the run's metrics `group…` at a step to the model too: its own one with these weights, or the newest.

    The very same points are logged again with the model's id, which the store holds once.
    """
    from mlflow.entities import Metric

    model = model_of(client, run_id, experiment_id, weights_sha256)
    model = model or _newest_model(client, experiment_id, weights_sha256)
    if model is None:
        return
    keys = [key for key in client.get_run(run_id).data.metrics if key.startswith(group)]
    points = [point for key in keys for point in client.get_metric_history(run_id, key) if point.step == step]
    dataset = {"dataset_name": dataset_name, "dataset_digest": dataset_digest}
    metrics = [
        Metric(point.key, point.value, point.timestamp, step, model_id=model.model_id, **dataset)
        for point in points
        if math.isfinite(point.value)
    ]
    if metrics:
        client.log_batch(run_id, metrics=metrics)


def write_gone_models(client: Any, run_id: str, experiment_id: str, hashes: list[str]) -> None:
    """Tags the run's models with these weights as removed: their URLs lead nowhere any more."""
    for weights_sha256 in hashes:
        if model := model_of(client, run_id, experiment_id, weights_sha256):
            client.set_logged_model_tags(model.model_id, {GONE_TAG: "true"})


def mark_uploaded(client: Any, model: Any) -> None:
    """The model's files are in MLflow's store."""
    if _EXTERNAL_TAG in model.tags:
        client.delete_logged_model_tag(model.model_id, _EXTERNAL_TAG)


def model_of(client: Any, run_id: str, experiment_id: str, weights_sha256: str) -> Any:
    """The run's logged model with these weights, or None."""
    wanted = f"tags.{WEIGHTS_TAG} = '{weights_sha256}' AND source_run_id = '{run_id}'"
    return next(iter(client.search_logged_models([experiment_id], filter_string=wanted)), None)


def _newest_model(client: Any, experiment_id: str, weights_sha256: str) -> Any:
    """The experiment's newest logged model with these weights, or None."""
    wanted = f"tags.{WEIGHTS_TAG} = '{weights_sha256}'"
    return next(iter(client.search_logged_models([experiment_id], filter_string=wanted, max_results=1)), None)


def _create_model(client: Any, run_id: str, experiment_id: str, tracked: TrackedModel) -> Any:
    return client.create_logged_model(
        experiment_id,
        name=tracked.name,
        source_run_id=run_id,
        tags={
            WEIGHTS_TAG: tracked.weights_sha256,
            "fingerprint": tracked.fingerprint,
            _EXTERNAL_TAG: "true",  # its weights are not in MLflow's store
        },
        params=tracked.params,
        model_type="latent-diffusion",
    )
