"""Writing segments: of record batches as they come, and of many segments as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import pyarrow as pa
from upath import UPath

from pipeline.keys import Keys, minus
from pipeline.records.files import written
from pipeline.records.join import ROWS
from pipeline.records.records import Records
from pipeline.records.rows import widened
from schemas.cards import Segment
from schemas.errors import NothingToDo

FOLDER = "records"


def write_segment(folder: UPath, batches: Iterable[pa.RecordBatch] | pa.Table, name: str) -> Segment:
    """Write records (see ``schemas.records``) as one Arrow IPC file, a batch at a time.

    The first batch has all columns; what a later one lacks is null.

    Args:
        folder: the encoder's folder of indices; the file goes to ``records/NAME.arrow`` under it.
        name: of this segment alone: what was written under it before is replaced.

    Raises:
        NothingToDo: there is no batch at all.
        WorkspaceError: it cannot be written.
    """
    if isinstance(batches, pa.Table):
        table = batches.combine_chunks()
        rows = iter(table.to_batches(max_chunksize=ROWS) or [pa.RecordBatch.from_pylist([], schema=table.schema)])
    else:
        rows = iter(batches)
    first = next(rows, None)
    if first is None:
        raise NothingToDo("there are no records to write", remedy="clipmill embed first")
    path, count = f"{FOLDER}/{name}.arrow", 0
    with written(folder / path) as file:
        sink = pa.PythonFile(file, mode="w")
        with pa.ipc.new_file(sink, first.schema) as writer:
            for batch in chain([first], rows):
                writer.write_batch(widened(batch, first.schema))
                count += batch.num_rows
        sink.flush()
    return Segment(path=path, rows=count, bytes=file.bytes, sha256=file.sha256)


def compact(
    folder: UPath, segments: Sequence[Segment], name: str, without: Keys | None = None, verify: bool = True
) -> Segment:
    """Write the records of many segments as one, in the order of their keys; each key once, ``without`` these.

    The other segments stay: earlier versions name them.

    Raises:
        CardError: a segment is missing, truncated or changed.
        NothingToDo: no record is left.
    """
    records = Records.open(folder, segments, verify)
    keys = records.keys if without is None else minus(records.keys, without)

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(keys), ROWS):
            yield from records.take(keys[start : start + ROWS], records.schema.names).to_batches()

    return write_segment(folder, batches(), name)
