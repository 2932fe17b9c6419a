"""Records: what a search result says of its pair, memory-mapped beside the index. The columns of a segment.

A segment is an Arrow IPC file: these columns, then further ones of the embeddings table (scores, labels) as they are
there. Vectors are float16, little-endian, unit-norm, 2*D bytes; null where the pair has none of that modality.
"""

from __future__ import annotations

import pyarrow as pa

VECTORS = {"image": "image_vec", "text": "text_vec"}


def records_schema(dim: int, further: pa.Schema | None = None) -> pa.Schema:
    """The columns of a segment whose vectors have D = ``dim``."""
    fields = [
        pa.field("pair_key", pa.int64(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("url", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("similarity", pa.float32()),
        *(further or ()),
        pa.field("file", pa.string()),
        pa.field("image_vec", pa.binary(2 * dim)),
        pa.field("text_vec", pa.binary(2 * dim)),
    ]
    return pa.schema(fields)


FILE = "file"
"""Column: the file of the images table that has the pair's image, as its log names it. It may be gone (compaction)."""
