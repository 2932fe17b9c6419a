"""Records: what a search result says of its pair, and its vectors, in Arrow files mapped into memory.

A segment is immutable. An index version names its segments, newest last; of a key that several hold the last one
counts. See ``schemas.records`` for the columns.
"""

from pipeline.records.join import gone_batch, record_batches
from pipeline.records.records import Records
from pipeline.records.segments import compact, write_segment

__all__ = ["Records", "compact", "gone_batch", "record_batches", "write_segment"]
