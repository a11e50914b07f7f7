"""The errors that text, tokenizers and prepared data raise."""


class DataError(ValueError):
    """Data that cannot be used as given. The message names what, why, and the fix."""


class UnreachableError(DataError):
    """A source that did not answer now and may answer later."""
