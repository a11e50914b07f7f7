"""From text to batches: `prepare` a corpus once, then read it with a loader.

`TokenLoader` reads contiguous windows, `DocumentLoader` windows of whole documents.
"""

from .corpus import Source
from .documents import DocumentLoader
from .error import DataError
from .loader import TokenLoader
from .prepare import prepare
from .tokenizer import Tokenizer

__all__ = ["DataError", "DocumentLoader", "Source", "TokenLoader", "Tokenizer", "prepare"]
