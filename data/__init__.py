"""From text to batches: `prepare` a corpus once, then read it with a loader.

`TokenLoader` reads contiguous windows, `DocumentLoader` windows of whole documents.
"""

from .corpus import Source
from .documents import DocumentLoader
from .error import DataError
from .loader import Loader, TokenLoader
from .prepare import prepare
from .shards import Prepared
from .tokenizer import Tokenizer

LOADERS = {"contiguous": TokenLoader, "documents": DocumentLoader}
"""By what a window holds: text as it comes, or whole documents."""

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
