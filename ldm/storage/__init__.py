"""Paths and fsspec URLs: one set of functions for the local disk and for object stores.

Every write is whole or absent. Local files are written under a temporary name, flushed to the disk and renamed;
an object store shows an object only when its upload is complete. Every answer is right or an OSError of one line that
names the URL: what may pass (503, a reset connection, a body that ends short) is asked for again, for about a minute.
"""

from ldm.storage.files import (
    Readable,
    commit_file,
    create,
    fetch,
    fetch_known,
    open_read,
    read_bytes,
    read_json,
    read_json_lines,
    remove,
    to_json,
    write_bytes,
    write_json,
    writing,
)
from ldm.storage.listing import exists, is_directory, list_dir, list_files, list_tree, size
from ldm.storage.sources import FoundFile, expand, find, split_commas
from ldm.storage.space import check_space, check_writable, readable, same_disk
from ldm.storage.temporary import attempt_folder, sweep, temporary_beside
from ldm.storage.transport import absolute, is_local, join, local_path, name, open_fs

__all__ = [
    "FoundFile",
    "Readable",
    "absolute",
    "attempt_folder",
    "check_space",
    "check_writable",
    "commit_file",
    "create",
    "exists",
    "expand",
    "fetch",
    "fetch_known",
    "find",
    "is_directory",
    "is_local",
    "join",
    "list_dir",
    "list_files",
    "list_tree",
    "local_path",
    "name",
    "open_fs",
    "open_read",
    "read_bytes",
    "read_json",
    "read_json_lines",
    "readable",
    "remove",
    "same_disk",
    "size",
    "split_commas",
    "sweep",
    "temporary_beside",
    "to_json",
    "write_bytes",
    "write_json",
    "writing",
]
