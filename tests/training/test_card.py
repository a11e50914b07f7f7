"""Prove that the default run of a GPU fits its rate, its memory and the text, whatever they are."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritium.data.corpus import INSTALLED
from tritium.model.shapes import flops_per_token, num_parameters
from tritium.training import card as module
from tritium.training.card import Card, fit_to_card
from tritium.training.command_line import parse
from tritium.training.memory.plan import MemoryConfig
from tritium.training.schedule import Length, Schedule
from tritium.training.settings import EPOCHS, PRESETS

USUAL = PRESETS["gpu"]
GIB, CORPUS = 2**30, 40_000_000
H100 = Card(rate=750e12, memory=78 * GIB)
RTX_4090 = Card(rate=160e12, memory=23 * GIB)
RTX_4060 = Card(rate=60e12, memory=7 * GIB)  # 8 GB
T4 = Card(rate=8e12, memory=15 * GIB)

cards = st.builds(Card, rate=st.floats(1e11, 5e15), memory=st.integers(GIB // 8, 200 * GIB))
corpora = st.integers(10_000, 10**10)


def fitted(card, corpus_tokens=CORPUS, config=USUAL):
    return fit_to_card(config, USUAL, card, corpus_tokens)[0]


def tokens_of(config):
    return config.length.max_steps * config.batch_size * config.model.max_seq_len


@pytest.mark.parametrize(
    ("card", "width", "batch"),
    [(H100, 768, 64), (RTX_4090, 512, 64), (RTX_4060, 512, 64), (T4, 256, 32)],
)
def test_each_card_gets_a_run_of_its_size(card, width, batch):
    config = fitted(card)
    assert (config.model.d_model, config.batch_size) == (width, batch)
    seconds = tokens_of(config) * flops_per_token(config.model) / card.rate
    assert seconds / module.UTILIZATION <= module.SECONDS
    assert config.length.max_steps >= module.LEAST_STEPS


@given(cards, corpora)
def test_a_step_fits_the_memory_and_the_run_the_time_and_the_text(card, corpus_tokens):
    config = fitted(card, corpus_tokens)
    model, micro = config.model, config.memory.micro_batch_size
    assert config.batch_size % micro == 0
    taken = 17 * num_parameters(model)
    taken += 48 * micro * model.max_seq_len * model.n_layers * model.d_model
    assert taken <= 0.8 * card.memory or (micro == 1 and model.d_model == 256)
    if config.length.max_steps > 1:
        assert tokens_of(config) <= 4 * corpus_tokens
        assert tokens_of(config) * flops_per_token(model) <= 150 * card.rate * (1 + 1e-9)
    assert tokens_of(config) >= num_parameters(model) / 2 or model.d_model == 256
    assert config.eval_every <= max(1, config.length.max_steps // 10)
    assert config.schedule.warmup_steps <= config.length.max_steps // 10
    assert fit_to_card(USUAL, USUAL, card, corpus_tokens) == fit_to_card(
        USUAL, USUAL, card, corpus_tokens
    )


@given(cards, corpora, st.floats(1, 10))
def test_a_faster_card_with_more_memory_trains_no_smaller_model(card, corpus_tokens, more):
    better = Card(card.rate * more, int(card.memory * more))
    sizes = [num_parameters(fitted(x, corpus_tokens).model) for x in (card, better)]
    assert sizes == sorted(sizes)


@given(cards)
def test_what_was_set_stays(card):
    own = replace(
        USUAL,
        model=replace(USUAL.model, n_layers=3),
        batch_size=24,
        memory=MemoryConfig(micro_batch_size=8),
        length=Length(max_epochs=2),
    )
    assert fitted(card, config=own) == own
    assert fitted(card, config=replace(USUAL, eval_every=7)).eval_every == 7
    schedule = Schedule(warmup_steps=900)
    assert fitted(card, config=replace(USUAL, schedule=schedule)).schedule == schedule


def test_the_vocabulary_of_the_data_is_no_shape_of_ones_own():
    small = replace(USUAL, model=replace(USUAL.model, vocab_size=5000))
    model = fitted(RTX_4060, config=small).model
    assert (model.vocab_size, model.d_model) == (5000, 512)


def test_a_line_says_what_was_chosen_and_why():
    _, line = fit_to_card(USUAL, USUAL, H100, CORPUS)
    for part in ("750 TFLOP/s", "78.0 GiB", "5 minutes", "12 layers of width 768", "98M", "epochs"):
        assert part in line, line
    assert "\n" not in line
    own = replace(USUAL, length=Length(max_steps=3))
    assert "epochs" not in fit_to_card(own, USUAL, H100, CORPUS)[1]


def test_a_gpu_gets_the_fitted_preset_and_a_cpu_what_it_had(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config, preset, _ = parse([])
    assert (preset, config.data, config.length.max_epochs) == ("gpu", INSTALLED, EPOCHS)
    assert parse(["--data", "notes.txt"])[0].data == "notes.txt"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert parse([])[1] == "small"
    assert parse([])[0].data is None
