"""Files of tensors."""

import contextlib
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write safetensors that everybody may read who may read the files beside them.

    By itself safetensors (0.8) lets only the user read what it wrote, whatever the umask says: another one
    could not load a checkpoint on a shared disk.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
    path.chmod(mode)


@contextlib.contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Name a file of tensors that was cut off, say by an interrupted download.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
