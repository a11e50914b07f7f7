"""Tests of data: no network, a cache of their own, and a small tokenizer made once."""

import socket

import pytest

from tritium.data import Tokenizer

TEXT = "".join(f"the quick brown fox {i} jumps\nover the lazy dog {i * i}\n\n" for i in range(400))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("data must not touch the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("TRITIUM_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 300)


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file
