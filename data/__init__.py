"""From text to batches: `prepare` a corpus once, then read it with a loader.

`TokenLoader` reads contiguous windows, `DocumentLoader` windows of complete documents.
"""

import tritium

tritium.require(
    "tritium.data", "train", "datasets", "huggingface_hub", "pyarrow", "tiktoken", "tokenizers"
)

from tritium.data.corpus import Source
from tritium.data.documents import DocumentLoader
from tritium.data.error import DataError
from tritium.data.loader import Loader, TokenLoader
from tritium.data.prepare import prepare
from tritium.data.shards import Prepared
from tritium.data.tokenizer import Tokenizer

LOADERS = {"contiguous": TokenLoader, "documents": DocumentLoader}
"""Loaders by packing: contiguous text, or complete documents."""

__all__ = [
    "LOADERS",
    "DataError",
    "DocumentLoader",
    "Loader",
    "Prepared",
    "Source",
    "TokenLoader",
    "Tokenizer",
    "prepare",
]
