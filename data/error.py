"""The errors that text, tokenizers and prepared data raise."""


class DataError(ValueError):
    """Data that cannot be used as given. The message names what, why, and the fix."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class UnreachableError(DataError):
    """A source that did not answer now and may answer later."""


def printable(text: object) -> str:
    """Return `text` as one line that every stream can take.

    Names of files hold what they like: line ends, control characters, bytes that are not UTF-8.
    These are shown as escapes.
    """
    text = str(text)
    if text.isprintable():
        return text
    escaped = (c if c.isprintable() else c.encode("unicode_escape", "surrogatepass") for c in text)
    return "".join(c if isinstance(c, str) else c.decode("ascii") for c in escaped)
