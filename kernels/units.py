"""Numbers with their units, as people read them."""


def quantity(number: float, unit: str) -> str:
    """Return `number` with three digits and a decimal prefix: 1530 B is "1.53 kB"."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{_three_digits(number / size)} {prefix}{unit}"
    return f"{_three_digits(number)} {unit}"


def duration(seconds: float) -> str:
    """Return `seconds` with three digits, in s, ms or us."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_three_digits(seconds / size)} {unit}"
    return f"{_three_digits(seconds * 1e6)} us"


def counted(number: float, thing: str) -> str:
    """Return `number` with a noun, which is singular of one: "1 thread", "1,024 threads"."""
    digits = f"{number:,}" if isinstance(number, int) else f"{number:,g}"
    ending = "" if number == 1 else "es" if thing.endswith(("s", "ch")) else "s"
    return f"{digits} {thing}{ending}"


def _three_digits(number: float) -> str:
    if number >= 100:
        return f"{number:.0f}"
    return f"{number:.1f}" if number >= 10 else f"{number:.2f}"
