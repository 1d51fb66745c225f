"""State, action and cameras of a source whose arrays have names of their own: as mapped, else as usual."""

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from pipelines.sources import Feature
from pipelines.sources.mapping import CAMERA_PREFIX, Part, SourceMapping, assembled

Vectors = dict[str, tuple[Part, ...]]
"""`observation.state` and `action`, each as the parts it is laid together from."""


def chosen_vectors(
    mapping: SourceMapping, widths: Mapping[str, int], *, usual: Mapping[str, Sequence[str]]
) -> Vectors:
    """Return the mapped parts, or where nothing is mapped the first usual key that exists.

    Args:
        mapping: The user's choice; its slices are checked against the widths.
        widths: Numbers in a frame, for every array of numbers the source has.
        usual: Keys to look for, for `observation.state` and `action`.

    Raises:
        ValueError: a mapped key does not exist or a slice goes beyond it, or none of the usual keys exists.
    """
    vectors = dict(mapping.vectors)
    for name, keys in usual.items():
        if name in vectors:
            continue
        key = next((key for key in keys if key in widths), None)
        if key is None:
            known = ", ".join(f"{key} ({width})" for key, width in widths.items()) or "none"
            raise ValueError(
                f"nothing for {name}: no {' or '.join(map(repr, keys))}; a mapping (--mapping) can take it "
                f"from these arrays of numbers (width): {known}"
            )
        vectors[name] = (Part(key=key),)
    for part in itertools.chain.from_iterable(vectors.values()):
        require_key(part.key, widths)
        _width(part, widths)
    return {name: vectors[name] for name in usual}


def chosen_cameras(mapping: SourceMapping, keys: Iterable[str]) -> dict[str, str]:
    """Return `observation.images.<camera>` -> key: the mapped ones, else every key under its last name.

    Raises:
        ValueError: a mapped key does not exist, or two keys end in the same name.
    """
    known = list(keys)
    if mapping.cameras is not None:
        for key in mapping.cameras.values():
            require_key(key, known)
        return dict(mapping.cameras)
    cameras: dict[str, str] = {}
    for key in known:
        name = CAMERA_PREFIX + key.rpartition("/")[2]
        if name in cameras:
            raise ValueError(f"cameras {cameras[name]!r} and {key!r} end in one name; --mapping names them")
        cameras[name] = key
    return cameras


def require_key(key: str, known: Iterable[str]) -> None:
    """Raise a `ValueError` that lists what there is, unless the key is there."""
    known = list(known)
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known) or 'none'}"
        raise ValueError(f"mapping: no key {key!r}; {hint}")


def vector_features(vectors: Vectors, widths: Mapping[str, int]) -> dict[str, Feature]:
    """Describe the vectors as float32 columns."""
    return {
        name: {"dtype": "float32", "shape": [sum(_width(part, widths) for part in parts)], "names": None}
        for name, parts in vectors.items()
    }


def _width(part: Part, widths: Mapping[str, int]) -> int:
    """Return the numbers that a part takes of a frame; allocates nothing, whatever a file declares."""
    return part.of(np.broadcast_to(np.float32(0), (1, widths[part.key]))).shape[1]


def vector_columns(vectors: Vectors, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the columns of one episode: (L, D), or (L,) where D is 1, as the writer wants it."""
    columns = {name: assembled(parts, arrays) for name, parts in vectors.items()}
    return {name: values[:, 0] if values.shape[1] == 1 else values for name, values in columns.items()}


def keys_of(vectors: Vectors) -> list[str]:
    """Return every array that is read, once."""
    return list(dict.fromkeys(part.key for parts in vectors.values() for part in parts))
