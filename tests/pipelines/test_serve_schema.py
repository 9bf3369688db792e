"""What OpenAPI says of the interface holds: requests made of the schema, right and wrong ones, never end in a 5xx."""

import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
import uvicorn
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import positive_data_acceptance

from pipelines.serve.app import create_app
from pipelines.serve.local import local_app
from pipelines.serve.replica import Task
from tests.pipelines.serving import replica
from tests.pipelines.tiny_snapshot import write_tiny_snapshot

load_all_checks()


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    snapshot = write_tiny_snapshot(tmp_path_factory.mktemp("schema") / "snapshot")
    with replica(snapshot, max_images=4, max_steps=3, deadline_s=20) as made:
        server = uvicorn.Server(uvicorn.Config(local_app(made), port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        server.should_exit = True
        thread.join()


class Nobody:
    """A backend for the sake of the schema, which does not depend on what is served."""

    def draw(self, task: Task) -> AsyncIterator[list[dict[str, Any]]]:
        raise NotImplementedError

    async def describe(self) -> dict[str, Any]:
        raise NotImplementedError


schema = schemathesis.openapi.from_dict(create_app(Nobody()).openapi())


@schema.parametrize()
@hypothesis.settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
def test_no_request_fails_the_server(case: schemathesis.Case, endpoint: str) -> None:
    # What is right by the schema may still be refused: it cannot say which classes a model knows.
    case.call_and_validate(base_url=endpoint, excluded_checks=[positive_data_acceptance], timeout=60)


def test_the_server_still_draws(endpoint: str) -> None:
    answer = httpx.post(f"{endpoint}/v1/samples", json={"num_inference_steps": 1}, trust_env=False)
    assert answer.status_code == 200
