"""Planted faults: one file per operation, whose own test file must catch every one of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A fault: in `file`, `original`, which occurs once, becomes `replacement`."""

    what: str
    file: str
    original: str
    replacement: str

    def apply(self, source: str) -> str:
        """Return `source` with the fault in it.

        Raises:
            ValueError: `original` does not occur exactly once: the table is stale.
        """
        if (found := source.count(self.original)) != 1:
            raise ValueError(
                f"mutants: {self.file} must hold {self.original!r} once, got {found} times; "
                f"rewrite the mutant {self.what!r}"
            )
        return source.replace(self.original, self.replacement)
