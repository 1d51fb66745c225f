"""Columns of Arrow tables."""

import pyarrow as pa


def whole(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array; copied only if it is in pieces (`combine_chunks` copies a single one, too)."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
