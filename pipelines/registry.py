"""The registered model of MLflow: the best snapshot of each run is a version of it, the best of these its champion.

The rule. Less is better, and values compare that were measured on the same: the same samples of the same data set,
under the same diffusion. A version becomes champion where there is none, where it is better than the present one, and
where the two do not compare, for then the newer one is what is being worked on.
"""

from typing import Any

from pipelines import lineage

CHAMPION = "champion"
MEASURED_ON_TAG = "measured_on"
MODEL_TAG = "logged_model"
SNAPSHOT_TAG = "snapshot"
"""Of a version: the URL of the snapshot."""


def write_candidate(
    client: Any,
    run_id: str,
    experiment_id: str,
    weights_sha256: str,
    name: str,
    metric: str,
    value: float,
    measured_on: str,
) -> None:
    """Makes the run's model with these weights a version of the registered model, and its champion by the rule."""
    model = lineage.model_of(client, run_id, experiment_id, weights_sha256)
    if model is None:
        raise ValueError(f"run {run_id} has no model with the weights {weights_sha256}")
    _make_registered_model(client, name)
    tags = {
        lineage.WEIGHTS_TAG: weights_sha256,
        metric: repr(value),
        MEASURED_ON_TAG: measured_on,
        MODEL_TAG: model.model_id,
        SNAPSHOT_TAG: model.params[lineage.SNAPSHOT_PARAM],
    }
    versions = client.search_model_versions(f"name = '{name}'")
    own = next((version for version in versions if version.tags.get(MODEL_TAG) == model.model_id), None)
    if own is None:
        # A server knows the model by its id; a database would look it up in the process's own MLflow.
        served = str(client.tracking_uri).startswith(("http://", "https://"))
        model_id = model.model_id if served else None
        own = client.create_model_version(name, model.artifact_location, run_id=run_id, tags=tags, model_id=model_id)
    else:  # a run that went on, and is validated on other samples now
        for key, text in tags.items():
            client.set_model_version_tag(name, own.version, key, text)
    if _is_better(value, metric, measured_on, _champion(client, name)):
        client.set_registered_model_alias(name, CHAMPION, own.version)


def _is_better(value: float, metric: str, measured_on: str, champion: Any) -> bool:
    if champion is None or champion.tags.get(MEASURED_ON_TAG) != measured_on or metric not in champion.tags:
        return True
    return value < float(champion.tags[metric])


def _make_registered_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _champion(client: Any, name: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
