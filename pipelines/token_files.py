"""Who else may read the file of a token."""

import os
import stat
from pathlib import Path


def other_readers(path: Path) -> str:
    """ "everyone", "the file's group", or "" where nobody but its owner, or whom its owner chose, may read it.

    A file of somebody else that lets its group read is that one's choice: so Kubernetes hands secrets to a pod
    (root's, mode 0440, of the pod's group). Raises OSError where there is no file.
    """
    about = path.stat()
    if about.st_mode & stat.S_IROTH:
        return "everyone"
    return "the file's group" if about.st_mode & stat.S_IRGRP and about.st_uid == os.geteuid() else ""
