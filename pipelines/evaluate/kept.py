"""What was computed of the reference alone, kept in OUTPUT/kept: the next snapshot that is measured there finds it.

The hash in a file's name is of all that its tensors were computed of, the pictures themselves, the program and what
rounds its sums among them: nothing that is kept can be out of date, and figures have the same bits with it and without.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load, save
from torch import Tensor

import ldm
from ldm import storage

FOLDER = "kept"
_NAME = re.compile(r"[a-z]+-[0-9a-f]{32}\.safetensors")


class Kept:
    """The files in a folder or at a URL; None: nothing is kept."""

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._used: set[str] = set()

    def tensors(
        self, what: str, of: Sequence[str | Tensor], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What `compute` gives, or gave before. of: all that it depends on; `what` names it."""
        if self._folder is None:
            return compute()
        name = f"{what}-{_hash([_program(), *_rounding(), *of])}.safetensors"
        self._used.add(name)
        found = _read(storage.join(self._folder, name))
        if found is None:
            found = {key: value.cpu().contiguous() for key, value in compute().items()}
            storage.write_bytes(storage.join(self._folder, name), save(found))
        return found

    def rows(self, what: str, of: str, network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """network: pictures (N, 3, H, W) => rows (N, …), which `of` names; the same, of pictures of the reference."""
        return lambda pictures: self.tensors(what, [of, pictures], lambda: {"rows": network(pictures)})["rows"]

    def forget_others(self) -> None:
        """Removes what was not asked for: it is of another reference, or of other features."""
        if self._folder is not None:
            for name in set(storage.list_dir(self._folder)) - self._used:
                if _NAME.fullmatch(name):
                    storage.remove(storage.join(self._folder, name))


NOTHING_KEPT = Kept(None)


def _read(url: str) -> dict[str, Tensor] | None:
    """None where it is not there, or damaged: then it is computed again."""
    try:
        return load(storage.read_bytes(url))
    except (FileNotFoundError, safetensors.SafetensorError):
        return None


@functools.cache
def _program() -> str:
    """A hash of the files, and of the library, whose code features, reconstructions and a classifier are made by."""
    folders = (Path(ldm.__file__).parent, Path(__file__).parent)
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    return _hash([version("diffusers"), *(file.read_text() for file in files)])


def _rounding() -> list[str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return [torch.__version__, device, str(torch.get_num_threads())]


def _hash(of: Sequence[str | Tensor]) -> str:
    digest = hashlib.sha256()
    for part in of:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)}\n".encode())
            digest.update(part.contiguous().numpy().data)
        else:
            digest.update(f"{len(part)} {part}\n".encode())
    return digest.hexdigest()[:32]
