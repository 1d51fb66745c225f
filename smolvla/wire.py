"""What a robot and the server of a policy tell each other, as bytes: msgpack or JSON, nothing pickled.

A message is a mapping of names to numbers, texts, lists, bytes and arrays. An array is written as a mapping
{dtype, shape, data}: little-endian, row by row, `data` as bytes in msgpack and as base64 in JSON. Lists of
numbers do as well. Knows no torch: a robot's computer has none.
"""

import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

MSGPACK, JSON = "application/msgpack", "application/json"
CONTENT_TYPES = (MSGPACK, JSON)
DTYPES = {"uint8": "<u1", "int32": "<i4", "int64": "<i8", "float32": "<f4", "float64": "<f8"}
ARRAY = frozenset({"dtype", "shape", "data"})
MOST_AXES = 4
MALFORMED, TOO_LARGE, UNKNOWN_TYPE, WRONG_FIELD = 400, 413, 415, 422


class RefusedError(ValueError):
    """Why a request gets no answer: raised by the server's checks, sent, and raised again by the client.

    Args:
        message: says what is wrong, with the value.
        status: as HTTP has them.
        field: dotted name of the field that is wrong, if it is one.
    """

    def __init__(self, message: str, *, status: int = WRONG_FIELD, field: str = "") -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.message, self.status, self.field = message, status, field

    def as_message(self) -> dict[str, Any]:
        """What is sent."""
        return {"status": self.status, "field": self.field, "error": str(self)}


def content_type_of(header: str | None) -> str:
    """The content type of a header, without its parameters.

    Raises:
        RefusedError: 415, there is no such form here.
    """
    kind = (header or "").partition(";")[0].strip().lower()
    if kind not in CONTENT_TYPES:
        raise RefusedError(
            f"Content-Type {header!r} is unknown; it must be one of {CONTENT_TYPES}", status=UNKNOWN_TYPE
        )
    return kind


def encoded(message: Mapping[str, Any], content_type: str) -> bytes:
    """A message's bytes; arrays, numpy's numbers and bytes may stand anywhere in it."""
    if content_type == MSGPACK:
        packed: Any = msgpack.packb(message, default=_packed)
        return packed
    return json.dumps(message, default=_listed, allow_nan=False).encode()


def decoded(body: bytes, content_type: str) -> dict[str, Any]:
    """A message of its bytes; arrays in it stay as they were written, see `array`.

    Raises:
        RefusedError: 400, the bytes are no message of that form.
    """
    try:
        if content_type == MSGPACK:
            message = msgpack.unpackb(body, raw=False, strict_map_key=True)
        else:
            message = json.loads(body)
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise RefusedError(f"the body is not {content_type}: {error}", status=MALFORMED) from None
    if not isinstance(message, dict):
        raise RefusedError(f"the body is a {type(message).__name__}, not a mapping", status=MALFORMED)
    return message


def array(value: Any, *, field: str) -> NDArray[Any]:
    """The array that stands in a message under the name `field`.

    Raises:
        RefusedError: it is none.
    """
    if isinstance(value, dict):
        return _of_bytes(value, field)
    if isinstance(value, list):
        try:
            found = np.array(value)
        except ValueError:
            raise RefusedError("the lists in it differ in length", field=field) from None
        if found.dtype.kind in "iuf":
            return found
    raise RefusedError(f"{shown(value)} is neither an array nor a list of numbers", field=field)


def of_base64(text: str, *, field: str) -> bytes:
    """Bytes that JSON carries.

    Raises:
        RefusedError: it is something else.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RefusedError(f"not base64: {error}", field=field) from None


def shown(value: Any) -> str:
    """A value as an error shows it: short, whatever it is."""
    text = repr(value[:32] if isinstance(value, str | bytes | list) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _of_bytes(value: Mapping[str, Any], field: str) -> NDArray[Any]:
    if set(value) != ARRAY:
        raise RefusedError(
            f"an array has the fields {sorted(ARRAY)}, this has {sorted(value)[:5]}", field=field
        )
    dtype, shape, data = value["dtype"], value["shape"], value["data"]
    if dtype not in list(DTYPES):  # a list: what cannot be hashed is no name either
        raise RefusedError(f"dtype {shown(dtype)} is none of {list(DTYPES)}", field=field)
    if not _is_shape(shape):
        raise RefusedError(f"shape {shown(shape)} is no list of up to {MOST_AXES} sizes", field=field)
    if isinstance(data, str):
        data = of_base64(data, field=field)
    if not isinstance(data, bytes):
        raise RefusedError(f"data is {type(data).__name__}, not bytes", field=field)
    needed = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if len(data) != needed:
        raise RefusedError(f"data has {len(data)} bytes; {dtype} of shape {shape} has {needed}", field=field)
    return np.frombuffer(data, DTYPES[dtype]).reshape(shape)


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, Sequence)
        and not isinstance(shape, str | bytes)
        and len(shape) <= MOST_AXES
        and all(type(size) is int and size >= 0 for size in shape)
    )


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _described(value) | {"data": np.ascontiguousarray(value, _order(value)).tobytes()}
    return _plain(value)


def _listed(value: Any) -> Any:
    """Numbers as people read them; pixels and files in base64."""
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8:
            return value.tolist()
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return _described(value) | {"data": data}
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return _plain(value)


def _described(value: NDArray[Any]) -> dict[str, Any]:
    _order(value)
    return {"dtype": value.dtype.name, "shape": list(value.shape)}


def _order(value: NDArray[Any]) -> str:
    if value.dtype.name not in DTYPES:
        raise TypeError(f"an array of {value.dtype} cannot be sent; these can: {list(DTYPES)}")
    return DTYPES[value.dtype.name]


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__} cannot be sent")
