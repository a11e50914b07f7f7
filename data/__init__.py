"""From text to batches: `prepare` a corpus once, then read it with a `TokenLoader`."""

from .corpus import Source
from .error import DataError
from .loader import TokenLoader
from .prepare import prepare
from .tokenizer import Tokenizer

__all__ = ["DataError", "Source", "TokenLoader", "Tokenizer", "prepare"]
