"""What a submitted job runs: what only the cluster can answer is checked, then the stage does its work.

python -m jobs.entry [--unless-done] STAGE …      # the rest as for `ldm STAGE …`
"""

import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from jobs import cli, cluster_checks
from jobs.outcome import Outcome, do, do_unless_done
from ldm.config import Config
from pipelines import cluster

UNLESS_DONE = "--unless-done"


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code of the stage; 2 where the cluster is not as the stage needs it."""
    unless_done = list(arguments[:1]) == [UNLESS_DONE]
    work = do_unless_done if unless_done else do
    return cli.main(arguments[1:] if unless_done else arguments, lambda stage, config: _checked(work, stage, config))


def _checked(work: Callable[[ModuleType, Config], Outcome], stage: ModuleType, config: Config) -> Outcome:
    with cluster.ray_session():
        cluster_checks.check(config)
        return work(stage, config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
