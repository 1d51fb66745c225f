"""TFRecord files and the tf.Examples in them, without TensorFlow.

A file is records end to end: length (uint64), its CRC, the data, its CRC; all little-endian. Other readers
without TensorFlow step over both CRCs or trust the length (tfrecord 1.14, tfd-utils 1.3, Ray 2.60); here
both are checked and nothing is allocated that the file cannot hold.
"""

import functools
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

HEADER = struct.Struct("<QI")
FOOTER = struct.Struct("<I")
FRAMING_BYTES = HEADER.size + FOOTER.size
MAX_RECORD_BYTES = 2**31 - 1
"""The largest message that protobuf parses."""

EXAMPLE_PROTO = """
name: "example.proto" package: "tensorflow" syntax: "proto3"
message_type {
  name: "BytesList"
  field { name: "value" number: 1 type: TYPE_BYTES label: LABEL_REPEATED }
}
message_type {
  name: "FloatList"
  field { name: "value" number: 1 type: TYPE_FLOAT label: LABEL_REPEATED }
}
message_type {
  name: "Int64List"
  field { name: "value" number: 1 type: TYPE_INT64 label: LABEL_REPEATED }
}
message_type {
  name: "Feature"
  field { name: "bytes_list" number: 1 type_name: ".tensorflow.BytesList" oneof_index: 0 }
  field { name: "float_list" number: 2 type_name: ".tensorflow.FloatList" oneof_index: 0 }
  field { name: "int64_list" number: 3 type_name: ".tensorflow.Int64List" oneof_index: 0 }
  oneof_decl { name: "kind" }
}
message_type {
  name: "Features"
  field { name: "feature" number: 1 type_name: ".tensorflow.Features.FeatureEntry" label: LABEL_REPEATED }
  nested_type {
    name: "FeatureEntry"
    field { name: "key" number: 1 type: TYPE_STRING }
    field { name: "value" number: 2 type_name: ".tensorflow.Feature" }
    options { map_entry: true }
  }
}
message_type {
  name: "Example"
  field { name: "features" number: 1 type_name: ".tensorflow.Features" }
}
"""
"""tf.train.Example as protobuf describes a .proto file; the fields are TensorFlow's, fixed for good."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where the data of a record lies in its file."""

    offset: int
    length: int


class RecordError(Exception):
    """What is wrong with a record: a reason to count and a sentence."""

    def __init__(self, reason: str, detail: str, *, frame: int | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.frame = frame


def spans(stream: BinaryIO, *, size: int) -> Iterator[Span]:
    """Walk over a file of `size` bytes, reading only the 12 bytes before each record.

    Raises:
        RecordError: a record does not lie within the file, or its length is damaged. Where the next one
        begins is then unknown.
    """
    offset = 0
    while offset < size:
        stream.seek(offset)
        header = stream.read(HEADER.size)
        if len(header) < HEADER.size:
            raise RecordError("record_truncated", f"the file ends {len(header)} bytes into a record's header")
        length, crc = HEADER.unpack(header)
        if masked_crc(header[:8]) != crc:
            raise RecordError(
                "crc_mismatch", f"the checksum of the record's length is wrong at byte {offset}"
            )
        left = size - offset - FRAMING_BYTES
        if length > left:
            raise RecordError("record_truncated", f"{length} bytes at byte {offset}, the file holds {left}")
        yield Span(offset + HEADER.size, length)
        offset += FRAMING_BYTES + length


def record(stream: BinaryIO, span: Span) -> bytes:
    """Read the data of a record.

    Raises:
        RecordError: it is too large, no longer whole, or its checksum is wrong.
    """
    if span.length > MAX_RECORD_BYTES:
        raise RecordError(
            "record_too_large", f"{span.length} bytes, at most {MAX_RECORD_BYTES} can be parsed"
        )
    stream.seek(span.offset)
    data = stream.read(span.length)
    footer = stream.read(FOOTER.size)
    if len(data) < span.length or len(footer) < FOOTER.size:
        raise RecordError("record_truncated", f"the file ends within the record at byte {span.offset}")
    if masked_crc(data) != FOOTER.unpack(footer)[0]:
        raise RecordError("crc_mismatch", f"the checksum of the data at byte {span.offset} is wrong")
    return data


def masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and shifted as TFRecord stores it, so that a CRC over CRCs stays strong."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def example(data: bytes) -> Mapping[str, Any]:
    """Parse a tf.Example: name -> tf.Feature.

    Raises:
        RecordError: the data is none.
    """
    try:
        return _example_class().FromString(data).features.feature
    except DecodeError as error:
        raise RecordError("record_unreadable", f"not a tf.Example: {error}") from None


def numbers(feature: Any) -> np.ndarray:
    """Return the values of a tf.Feature of numbers, flat: float32 or int64."""
    kind = feature.WhichOneof("kind")
    if kind == "bytes_list":
        raise RecordError("wrong_dtype", "holds bytes, declared as numbers")
    values = feature.int64_list.value if kind == "int64_list" else feature.float_list.value
    return np.fromiter(values, np.int64 if kind == "int64_list" else np.float32, len(values))


def strings(feature: Any) -> list[bytes]:
    """Return the values of a tf.Feature of bytes."""
    if feature.WhichOneof("kind") in ("float_list", "int64_list"):
        raise RecordError("wrong_dtype", "holds numbers, declared as bytes")
    return list(feature.bytes_list.value)


@functools.cache
def _example_class() -> Any:
    """Build tf.train.Example; in a pool of its own, so that TensorFlow's may be loaded as well."""
    file = text_format.Parse(EXAMPLE_PROTO, descriptor_pb2.FileDescriptorProto())
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))
