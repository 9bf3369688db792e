"""What stands beside Ray on the test bed: PostgreSQL, and MLflow's server with its runs there and artifacts on S3."""

import os
import pwd
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import processes


def _server_programs() -> Path:
    """Where Debian's package has its programs. Skips where it is missing, but not in continuous integration."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        missing = "no PostgreSQL in /usr/lib/postgresql: apt-get install postgresql"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    return found[-1].parent


class PostgreSQL:
    """A server with a database `mlflow`, in a folder of its own; root has the package's user run it."""

    def __init__(self, folder: Path, port: int) -> None:
        programs, self.port = _server_programs(), port
        data, self._options = folder / "postgresql", dict[str, Any]()
        data.mkdir()
        if os.geteuid() == 0:  # as which PostgreSQL does not run
            user = pwd.getpwnam("postgres")
            os.chown(data, user.pw_uid, user.pw_gid)
            self._options = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
        made = [str(programs / "initdb"), "--pgdata", str(data), "--username", "mlflow", "--auth", "trust", "--no-sync"]
        done = subprocess.run(made, env=environment, capture_output=True, text=True, cwd="/", **self._options)
        assert done.returncode == 0, done.stderr
        served = [str(programs / "postgres"), "-D", str(data), "-p", str(port), "-h", "127.0.0.1", "-k", "", "-F"]
        self.process = processes.start(served, folder / "postgresql.log", environment, cwd="/", **self._options)
        processes.until(self._makes_database, "PostgreSQL", self.process)

    @property
    def uri(self) -> str:
        return f"postgresql+psycopg2://mlflow@127.0.0.1:{self.port}/mlflow"

    def _makes_database(self) -> bool:
        import psycopg2

        try:
            connection = psycopg2.connect(host="127.0.0.1", port=self.port, user="mlflow", dbname="postgres")
        except psycopg2.OperationalError:
            return False
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("CREATE DATABASE mlflow")
        connection.close()
        return True


class MlflowServer:
    """`mlflow server`, which can be killed and started again at the same address."""

    def __init__(self, folder: Path, port: int, store: str, artifacts: str, environment: Mapping[str, str]) -> None:
        self.uri, self._log, self._environment = f"http://127.0.0.1:{port}", folder / "mlflow.log", environment
        self._command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        self._command += ["--workers", "1", "--backend-store-uri", store, "--artifacts-destination", artifacts]
        self._folder = folder
        self.start()

    def start(self) -> None:
        self.process = processes.start(self._command, self._log, self._environment, cwd=self._folder)
        processes.until(self._answers, "MLflow's server", self.process)

    def kill(self) -> None:
        processes.kill(self.process)

    def _answers(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False
