"""Data sets: files to rows, rows to tokens, tokens to packed batches."""

from typing import TYPE_CHECKING

from fastalign.lazy import lazy_exports

if TYPE_CHECKING:
    from fastalign.data.batch import Batch as Batch
    from fastalign.data.collate import Collator as Collator
    from fastalign.data.loading import load_rows as load_rows
    from fastalign.data.packing import PackedBatch as PackedBatch
    from fastalign.data.packing import lay_out as lay_out
    from fastalign.data.packing import pack as pack
    from fastalign.data.packing import pad as pad
    from fastalign.data.packing import pad_to_multiple as pad_to_multiple
    from fastalign.data.report import DataReport as DataReport
    from fastalign.data.report import Lengths as Lengths
    from fastalign.data.segments import Group as Group
    from fastalign.data.text import text_windows as text_windows
    from fastalign.data.tokenization import tokenize as tokenize

lazy_exports(
    __name__,
    {
        "Batch": "fastalign.data.batch",
        "Collator": "fastalign.data.collate",
        "DataReport": "fastalign.data.report",
        "Group": "fastalign.data.segments",
        "Lengths": "fastalign.data.report",
        "PackedBatch": "fastalign.data.packing",
        "lay_out": "fastalign.data.packing",
        "load_rows": "fastalign.data.loading",
        "pack": "fastalign.data.packing",
        "pad": "fastalign.data.packing",
        "pad_to_multiple": "fastalign.data.packing",
        "text_windows": "fastalign.data.text",
        "tokenize": "fastalign.data.tokenization",
    },
)
