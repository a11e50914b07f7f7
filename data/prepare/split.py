"""Validation split of documents, decided by the hash of the text alone."""

import hashlib
from collections.abc import Iterable, Iterator


def assign_splits(texts: Iterable[str], val_fraction: float) -> Iterator[tuple[str, str]]:
    """Yield `(split, text)` for every text, nearly in order; see `prepare` for the rule."""
    validated, lowest, held = False, 1.0, []
    for text in texts:
        share = _share(text)
        if share < val_fraction:
            validated = True
            yield "val", text
        elif validated or share > lowest:
            yield "train", text
        else:  # the lowest hash so far: validation may need it, with all its copies
            if share < lowest:
                yield from (("train", other) for other in held)
                lowest, held = share, []
            held.append(text)
    yield from (("train" if validated else "val", text) for text in held)


def _share(text: str) -> float:
    digest = hashlib.blake2b(text.encode(), digest_size=6).digest()  # 48 bits: exact as a float
    return int.from_bytes(digest, "big") / (1 << 48)
