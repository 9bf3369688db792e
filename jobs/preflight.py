"""What can be known of a cluster before anything is sent to it: that it answers, its versions, its nodes."""

import os
import platform
import re
from dataclasses import dataclass
from typing import Any

from ldm.config import Config, RequestError
from pipelines.progress import say

NODE_ID = "ray.io/node-id"
_TIMEOUT_S = 10
_MINOR = re.compile(r"\d+\.\d+")


@dataclass(frozen=True)
class Cluster:
    """A cluster that takes our jobs. nodes: those that live, as Ray's state API shows them."""

    client: Any
    address: str
    nodes: tuple[dict[str, Any], ...]

    @property
    def workers(self) -> list[dict[str, Any]]:
        """The nodes but the head that have a CPU for work."""
        return [n for n in self.nodes if not n["is_head_node"] and n["resources_total"].get("CPU", 0) >= 1]

    def place(self, verb: str, config: Config) -> dict[str, Any]:
        """Where the entry point runs, as arguments of `submit_job`: on a worker node where there is one.

        It reserves nothing, for the stages share out all CPUs that the nodes have and one of them would never come
        free. Only `sample` works in the entry point itself: it gets a CPU, and a GPU where there is one.
        """
        head = next((node["node_id"] for node in self.nodes if node["is_head_node"]), None)
        if head is None or not self.workers:
            say("submit: there is no worker node: the entry point runs on the head node")
            return {}
        where: dict[str, Any] = {"entrypoint_label_selector": {NODE_ID: f"!{head}"}}
        if verb == "sample":
            where["entrypoint_num_cpus"] = 1
            has_gpu = any(node["resources_total"].get("GPU", 0) >= 1 for node in self.workers)
            if has_gpu and getattr(config, "device", "cpu") != "cpu":
                where["entrypoint_num_gpus"] = 1
        return where


def connect(address: str) -> Cluster:
    """Asks whether the cluster takes our token and runs what we run. Raises RequestError."""
    # Ray 2.60 turns token authentication on for `ray start --head`; the client must be told to use its token.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        versions = _get(client, "/api/v0/cluster_metadata")
        found = _get(client, "/api/v0/nodes?detail=1&limit=10000")["result"]
    except Exception as error:  # requests, Ray and its RPC layer each have their own
        text = " ".join(str(error).split())[:200]
        raise RequestError(
            f"--address={address}: no Ray cluster takes the job ({text}); "
            "give its dashboard as http://HEAD:8265, with the cluster's token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        ) from None
    check_versions(address, versions)
    return Cluster(client, address, tuple(node for node in found["result"] if node["state"] == "ALIVE"))


def check_versions(address: str, versions: dict[str, Any]) -> None:
    """Raises RequestError where the cluster has another minor version of Ray or of Python than this process."""
    import ray

    ours = {"Ray": ray.__version__, "Python": platform.python_version()}
    theirs = {"Ray": str(versions["rayVersion"]), "Python": str(versions["pythonVersion"])}
    for what, version in ours.items():
        if _minor(version) != _minor(theirs[what]):
            raise RequestError(
                f"--address={address}: runs {what} {theirs[what]}, and this is {what} {version}; "
                f"submit with {what} {_minor(theirs[what])}, or install {_minor(version)} on the cluster"
            )


def _minor(version: str) -> str:
    found = _MINOR.match(version)
    return found[0] if found else version


def _get(client: Any, path: str) -> Any:
    answer = client._do_request("GET", path, timeout=_TIMEOUT_S)
    answer.raise_for_status()
    return answer.json()["data"]
