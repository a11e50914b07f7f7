"""Prove that comments, docstrings, messages, names and pages use the field's words, no dialect.

A docstring's first words name the thing: none begins with a question or with "Of".
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = (
    "bench", "data", "docs", "examples", "kernels", "model", "tests", "training", "tritium",
    "train.py", "README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", ".ci",
)  # fmt: skip

GLOSSARY = {
    r"definitions?": "reference",
    r"ours": "Tritium",
    r"go(es)? on|going on|went on": "resume (a run), continue (text)",
    r"(is|are|was|were|it's) told": "is called with",
    r"but for": "except",
    r"besides": "in addition to, other than",
    r"lies?|lay|stands?|stood": "is stored, is defined, is in",
    r"(hold|holds|held) against": "compare with",
    r"written out": "hand-written",
    r"comput(e|es|ed|ing) again": "recomputed",
    r"given up": "discarded",
    r"aimed at": "target",
    r"untried": "not run yet",
    r"contenders?": "implementation",
    r"of then": "of that time",
    r"reckoned": "estimated",
    r"by (it|them)selves|by itself": "alone",
    r"lets? go of": "release",
}
PATTERN = re.compile(rf"\b({'|'.join(GLOSSARY)})\b", re.IGNORECASE)
NAMES = re.compile(r"(?:^|_)(contenders?|ours?)(?=_|$)", re.IGNORECASE)  # in names of code
OPENING = re.compile(r"(What|How|Where|Who|Whose|Which|Why|Of)\b")

ALLOWED = {
    # file: what is said there, and why
    "tests/test_words.py": r".*",  # the glossary itself
    "CONTRIBUTING.md": r"not (definition|go on|ours|but for|computed again)",  # names them
}
SUFFIXES = (".py", ".md", ".html", ".toml", ".txt", "")  # "" is the Makefile's and the script's
STANDS_IN = re.compile(r"\b(stands?[ -]in|stands? for)\b", re.IGNORECASE)  # a substitute, a symbol


def files(rooms=ROOMS) -> list[Path]:
    """Return the sources and pages of rooms, in order; pictures are none."""
    found = []
    for room in rooms:
        path = ROOT / room
        inside = path.rglob("*") if path.is_dir() else [path]
        found += sorted(file for file in inside if file.suffix in SUFFIXES and file.is_file())
    return found


@cache
def tokens(file: Path) -> list[tokenize.TokenInfo]:
    """Return the tokens of a source."""
    return list(tokenize.generate_tokens(io.StringIO(file.read_text()).readline))


def sentences(file: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers and words: comments and strings of a source, lines of a page."""
    text = file.read_text()
    if file.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    words = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1))
    for token in tokens(file):
        if token.type in words:
            yield from enumerate(token.string.splitlines(), token.start[0])


def dialect(text: str, allowed: str = "") -> list[str]:
    """Return the words of `text` that the glossary replaces."""
    text = STANDS_IN.sub("", text)
    text = re.sub(allowed, "", text) if allowed else text
    return [match[0] for match in PATTERN.finditer(text)]


def opening(docstring: str) -> str:
    """Return the question or the "Of" with which `docstring` begins, "" if it names the thing."""
    match = OPENING.match(docstring)
    return match[0] if match else ""


@pytest.mark.parametrize("room", ROOMS)
def test_words_are_those_of_the_field(room):
    found = []
    for file in files([room]):
        name = str(file.relative_to(ROOT))
        for line, text in sentences(file):
            for word in dialect(text, ALLOWED.get(name, "")):
                better = next(b for a, b in GLOSSARY.items() if re.fullmatch(a, word, re.I))
                found.append(f"{name}:{line}: {word!r}: say {better}: {text.strip()}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_words(room):
    assert any(words for file in files([room]) for words in sentences(file))


def test_names_are_those_of_the_field():
    found = []
    for file in (x for x in files() if x.suffix == ".py"):
        for token in tokens(file):
            if token.type == tokenize.NAME and NAMES.search(token.string):
                found.append(f"{file.relative_to(ROOT)}:{token.start[0]}: {token.string}")
    assert not found, "\n".join(found)


def test_docstrings_name_the_thing():
    found = []
    for file in (x for x in files() if x.suffix == ".py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                text = node.value.value  # docstrings of modules, classes, functions and fields
                if isinstance(text, str) and opening(text):
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno}: {text.splitlines()[0]}")
    assert not found, "\n".join(found)


def test_finds_names_and_openings():
    names = ("our_norm", "CONTENDERS", "_ours", "contenders_of", "hours", "source", "courses_of")
    assert [bool(NAMES.search(name)) for name in names] == [True] * 4 + [False] * 3
    texts = ("What it costs.", "Of the log.", "How many.", "Whether it is.", "Offsets.", "Whole.")
    assert [opening(text) for text in texts] == ["What", "Of", "How", "", "", ""]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# the Definition of ours", ["Definition", "ours"]),
        ("It goes on, but for one.", ["goes on", "but for"]),
        ("tensors lie where they stand", ["lie", "stand"]),
        ("a row of zeros stands in for all; hours of courses", []),
    ],
)
def test_finds_complete_words(text, words):
    assert dialect(text) == words


def test_reads_comments_strings_and_docstrings_but_no_code(tmp_path):
    file = tmp_path / "room.py"
    file.write_text('"""Of\nours."""\nours = 1  # stood\nprint(f"ours {ours}")\n')
    found = [(line, word) for line, text in sentences(file) for word in dialect(text)]
    assert [line for line, _ in found][:3] == [2, 3, 4]
