"""Prove that sampling ends where it should, and gives what it draws as it draws it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritium.model import ModelConfig, Transformer
from tritium.model.sampling import generate, sample, spoken, stream, write_on, write_stream

CONFIG = ModelConfig(vocab_size=257, n_layers=1, d_model=16, n_heads=2, max_seq_len=12)


class Bytes:
    """A token for each byte, and 256 for the end."""

    eot = 256

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        parts = ["<|endoftext|>" if i == 256 else bytes([i]) for i in ids]
        text, run = "", b""
        for part in [*parts, ""]:
            if isinstance(part, bytes):
                run += part
            else:
                text, run = text + run.decode(errors="replace") + part, b""
        return text


def prompts(device, rows=3):
    return torch.randint(256, (rows, 4), device=device)


def drawn_with(model, tokens, seed, **options):
    generator = torch.Generator(tokens.device).manual_seed(seed)
    return model.generate(tokens, 20, generator=generator, **options)


def test_a_stream_gives_what_generate_does(device):
    model, tokens = Transformer(CONFIG).to(device), prompts(device)
    generator = torch.Generator(device).manual_seed(5)
    parts = list(stream(model, tokens, 20, generator=generator))
    assert len(parts) == 20
    expected = drawn_with(model, tokens, 5)
    assert torch.equal(torch.cat((tokens, *parts), 1), expected)
    assert not any(part.requires_grad for part in parts)
    generator = torch.Generator(device).manual_seed(5)
    assert torch.equal(generate(model, tokens, 20, generator=generator), expected)


@pytest.mark.parametrize("count", [1, 3, 60])
def test_a_row_ends_with_its_first_stop_token(count, device):
    model, tokens = Transformer(CONFIG).to(device), prompts(device)
    stops = list(range(0, 257, 257 // count))[:count]
    free, found = (drawn_with(model, tokens, 3, stop_tokens=x)[:, 4:].tolist() for x in ((), stops))
    lengths = []
    for freely, row in zip(free, found, strict=True):
        first = next((i for i, x in enumerate(freely) if x in stops), len(freely))
        lengths.append(first + 1)
        assert row[: first + 1] == freely[: len(row)][: first + 1]
        assert set(row[first:]) <= {freely[first]} if first < 20 else True
    assert {len(row) for row in found} == {min(20, max(lengths))}
    assert count < 60 or any(n < 20 for n in lengths)


@pytest.mark.parametrize("count", [1, 3, 60])
def test_of_a_list_each_row_is_kept_up_to_its_first_stop_token(count, device):
    model, rows = Transformer(CONFIG).to(device), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    stops = list(range(0, 257, 257 // count))[:count]
    draws = (torch.Generator(device).manual_seed(3) for _ in range(2))
    free, found = (
        model.generate(rows, 20, stop_tokens=stop, generator=next(draws)) for stop in ((), stops)
    )
    for prompt, freely, row in zip(rows, free, found, strict=True):
        drawn = freely[len(prompt) :].tolist()
        first = next((i for i, x in enumerate(drawn) if x in stops), len(drawn))
        assert row.tolist() == [*prompt, *drawn[: first + 1]]
    assert count < 60 or len({len(row) - len(x) for x, row in zip(rows, found, strict=True)}) > 1


def test_the_prompt_itself_does_not_stop(device):
    model, tokens = Transformer(CONFIG).to(device), torch.full((1, 3), 256, device=device)
    with torch.no_grad():  # every token is as probable as any other
        model.head.weight.zero_()
    found = model.generate(tokens, 5, temperature=0, stop_tokens=[256])
    assert found.tolist() == [[256] * 3 + [0] * 5]


@pytest.mark.parametrize("stop", [257, -1])
def test_refuses_a_stop_token_that_is_none(stop, device):
    model, tokens = Transformer(CONFIG).to(device), prompts(device)
    with pytest.raises(ValueError, match=rf"stop_tokens must be in \[0, 257\), got {stop}"):
        stream(model, tokens, 2, stop_tokens=[stop])  # at once, not with the first token


@pytest.mark.parametrize("kind", [range, torch.arange, lambda n: (i for i in range(n)), set])
def test_stop_tokens_come_from_any_iterable(kind, device):
    """Also from one that gives them but once; every id stops here, so that one token is drawn."""
    model = Transformer(CONFIG).to(device)
    stops = set(range(257)) if kind is set else kind(257)
    assert model.generate(
        torch.zeros(2, 3, dtype=torch.long, device=device), 9, stop_tokens=stops
    ).shape == (2, 4)
    stops = set(range(257)) if kind is set else kind(257)
    assert [*map(len, model.generate([[1], [2, 3]], 9, stop_tokens=stops))] == [2, 3]


def test_nothing_is_drawn_behind_the_end_of_all_rows(device, monkeypatch):
    model, read = Transformer(CONFIG).to(device), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *x: read.append(1) or hidden(*x))
    assert drawn_with(model, prompts(device), 3, stop_tokens=range(257)).shape == (3, 5)
    assert len(read) == (1 if device == "cpu" else 16)  # a GPU is looked at every 16 tokens


@pytest.mark.parametrize("stops", [3, [1.5], "ab", torch.tensor(3)])
def test_refuses_stop_tokens_that_are_no_ids(stops, device):
    with pytest.raises(ValueError, match=r"^generate: stop_tokens must be ids, as "):
        Transformer(CONFIG).to(device).generate([[1]], 2, stop_tokens=stops)


@pytest.mark.parametrize("temperature", [1e-25, 1e-30, 1e-38, 1e-39, 1e-45, 5e-324])
def test_the_coldest_takes_the_most_probable(temperature, device):
    logits = torch.randn(4, 50, device=device) * 1e4
    assert torch.equal(sample(logits, temperature), sample(logits, 0))


@given(st.lists(st.integers(0, 256), max_size=30) | st.text().map(lambda x: list(x.encode())))
def test_pieces_of_text_make_the_whole(ids):
    pieces = list(spoken(Bytes(), ids))
    assert "".join(pieces) == Bytes().decode([i for i in ids if i != 256])


@given(st.text())
def test_a_character_comes_whole(text):
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(list(spoken(Bytes(), text.encode())))
        assert all(pieces and "\ufffd" not in pieces for pieces in spoken(Bytes(), text.encode()))


def test_text_ends_at_its_end_and_never_names_it(device):
    model = Transformer(CONFIG).to(device)
    text = write_on(model, Bytes(), "", 40, seed=1)
    assert "<|endoftext|>" not in text
    assert model.training
    with torch.no_grad():  # every token is as probable as any other
        model.head.weight.zero_()
    pieces = write_stream(model, Bytes(), "ab", 9999, temperature=1.0, top_p=None, seed=2)
    written = "".join(pieces)
    assert len(written) < 9000
    assert written.startswith("ab")
    assert "<|endoftext|>" not in written
