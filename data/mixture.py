"""Several sources as one sequence of documents: one after another, or mixed by weight.

With weights, the next document always comes from the source that has given the fewest characters
for its weight, so every stretch of the mixture has the shares asked for. The mixture ends when that
source has no more: nothing is repeated beyond its `epochs`, and no share drifts.
"""

import hashlib
from collections.abc import Iterator, Sequence

from tritium.data.corpus import Source, documents
from tritium.data.error import DataError
from tritium.data.records import Tally


class Mixture:
    """The documents of several sources, in an order that they and their settings decide.

    Attributes:
        sources: its sources.
        tallies: what the first pass over each source met, as far as the last iteration went.
        given: how many documents of each source, repeats included, the last iteration gave.
    """

    def __init__(self, sources: Sequence[Source], deduplicate: bool = False):
        """Take at least one source, of which all have a weight or none has.

        With `deduplicate`, a document whose text came before, in whichever source, is left out.
        """
        weighted = [source for source in sources if source.weight is not None]
        if not sources or len(weighted) not in (0, len(sources)):
            raise DataError(
                "a mixture takes at least one source, and a weight for each of them or for none; "
                f"got {len(sources)}, of which {len(weighted)} with a weight"
            )
        self.sources = [*sources]
        self._deduplicate, self._weighted = deduplicate, bool(weighted)
        self._forget()

    def __iter__(self) -> Iterator[str]:
        """Read everything anew, from the first document."""
        self._forget()
        seen: set[bytes] | None = set() if self._deduplicate else None
        streams = [self._passes(i, seen) for i in range(len(self.sources))]
        if self._weighted:
            yield from self._weigh(streams)
        else:
            for i, stream in enumerate(streams):
                for text in stream:
                    self.given[i] += 1
                    yield text

    def position(self) -> int:
        """Return how many bytes of the files of all sources have been read, as stored."""
        return sum(tally.position() for tally in self.tallies)

    def _forget(self) -> None:
        self.tallies = [Tally() for _ in self.sources]
        self.given = [0] * len(self.sources)

    def _passes(self, i: int, seen: set[bytes] | None) -> Iterator[str]:
        source, is_new = self.sources[i], bytearray()  # of each document, as the first pass found
        for text in documents(source, self.tallies[i]):
            is_new.append(seen is None or _is_new(text, seen))
            if is_new[-1]:
                yield text
            else:
                self.tallies[i].left_out["duplicate"] += 1
        for _ in range(source.epochs - 1):
            for text, new in zip(documents(source), is_new, strict=False):
                if new:
                    yield text

    def _weigh(self, streams: list[Iterator[str]]) -> Iterator[str]:
        weights = [source.weight or 1.0 for source in self.sources]
        characters = [0] * len(streams)
        while True:
            i = min(range(len(streams)), key=lambda i: characters[i] / weights[i])
            text = next(streams[i], None)
            if text is None:
                return
            characters[i] += len(text)
            self.given[i] += 1
            yield text


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    if digest in seen:
        return False
    seen.add(digest)
    return True
