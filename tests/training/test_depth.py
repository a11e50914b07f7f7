"""Prove that --depth sets shape, batch, rates, decay and length by its laws, and that flags win."""

from math import log2, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritium.model.config import ModelConfig
from tritium.model.shapes import num_parameters
from tritium.training.command_line import parse
from tritium.training.depth import described, parameters
from tritium.training.settings import PRESETS, TrainConfig
from tritium.training.validation import ConfigError

presets = st.sampled_from(sorted(PRESETS))
depths = st.integers(1, 10)


def settings(*words) -> TrainConfig:
    return parse([str(word) for word in words])[0]


def batch(config):
    return config.batch_size * config.model.max_seq_len


def tokens(config):
    return config.length.max_steps * batch(config)


def matrix_rate(config):
    return config.optimizer.muon_learning_rate or config.schedule.learning_rate


@given(presets, depths)
def test_everything_follows_from_the_depth(preset, depth):
    usual, config = PRESETS[preset], settings(preset, "--depth", depth)
    model = config.model
    assert (model.n_layers, model.d_model, model.n_heads) == (depth, 64 * depth, depth)
    assert (model.vocab_size, model.max_seq_len, model.activation) == (
        usual.model.vocab_size, usual.model.max_seq_len, usual.model.activation,
    )  # fmt: skip
    assert abs(tokens(config) - 20 * parameters(model)) <= batch(config) / 2
    assert config.length.max_epochs == usual.length.max_epochs
    assert log2(config.batch_size) % 1 == 0
    larger, longer = batch(config) / batch(usual), tokens(config) / tokens(usual)
    least = longer**0.383 * batch(usual) / model.max_seq_len < 1  # less than a sequence
    assert least or 0.7 < larger / longer**0.383 < 1.42
    factor = sqrt(larger * usual.model.d_model / model.d_model)
    assert config.schedule.learning_rate == pytest.approx(usual.schedule.learning_rate * factor)
    assert matrix_rate(config) == pytest.approx(matrix_rate(usual) * factor)
    timescales = [batch(x) / (matrix_rate(x) * x.optimizer.weight_decay * tokens(x))
                  for x in (usual, config)]  # fmt: skip
    assert timescales[0] == pytest.approx(timescales[1], rel=0.1 if tokens(config) < 1e6 else 0.01)
    assert config.schedule.warmup_steps == min(
        usual.schedule.warmup_steps, config.length.max_steps // 10
    )


@pytest.mark.parametrize(
    ("flag", "value", "read"),
    [
        ("batch-size", 24, lambda x: x.batch_size),
        ("learning-rate", 1e-3, lambda x: x.schedule.learning_rate),
        ("muon-learning-rate", 2e-3, lambda x: x.optimizer.muon_learning_rate),
        ("weight-decay", 0.25, lambda x: x.optimizer.weight_decay),
        ("warmup-steps", 7, lambda x: x.schedule.warmup_steps),
        ("max-steps", 321, lambda x: x.length.max_steps),
        ("max-tokens", 123_456, lambda x: x.length.max_tokens),
        ("max-epochs", 1.5, lambda x: x.length.max_epochs),
        ("max-minutes", 2.5, lambda x: x.length.max_minutes),
        ("model.n-layers", 5, lambda x: x.model.n_layers),
        ("model.d-model", 96, lambda x: x.model.d_model),
        ("model.n-heads", 2, lambda x: x.model.n_heads),
        ("model.d-ff", 100, lambda x: x.model.d_ff),
        ("model.max-seq-len", 64, lambda x: x.model.max_seq_len),
    ],
)
def test_a_flag_wins(flag, value, read):
    own = settings("small", "--depth", 3, f"--{flag}", value)
    assert read(own) == value
    assert read(settings("small", "--depth", 3)) != value
    if "max-" in flag and "model" not in flag:
        assert len(own.length.given()) == 1


def test_what_follows_from_a_flag_follows_from_its_value():
    usual = settings("small", "--depth", 2)
    larger = settings("small", "--depth", 2, "--batch-size", 4 * usual.batch_size)
    ratio = larger.schedule.learning_rate / usual.schedule.learning_rate
    assert ratio == pytest.approx(2.0)
    assert larger.optimizer.weight_decay / usual.optimizer.weight_decay == pytest.approx(
        2, rel=0.01
    )
    shorter = settings("small", "--depth", 2, "--max-tokens", tokens(usual) // 8)
    assert shorter.batch_size < usual.batch_size
    wide = settings("small", "--depth", 2, "--model.d-model", 512)
    assert wide.length.max_steps * batch(wide) == pytest.approx(
        20 * parameters(wide.model), rel=0.01
    )
    slower = settings("small", "--depth", 2, "--muon-learning-rate", matrix_rate(usual) / 2)
    assert slower.optimizer.weight_decay == pytest.approx(2 * usual.optimizer.weight_decay)
    same = settings("small", "--depth", 2, "--adjust-lr-fn", "original")
    grown = matrix_rate(same) / matrix_rate(usual)  # without the width's factor
    assert grown == pytest.approx(sqrt(usual.model.d_model / PRESETS["small"].model.d_model))


@pytest.mark.parametrize("steps", [40, 750, 20_000])
def test_the_batch_is_that_of_the_tokens_in_steps_that_were_given(steps):
    config, usual = settings("small", "--depth", 2, "--max-steps", steps), PRESETS["small"]
    wanted = (tokens(config) / tokens(usual)) ** 0.383 * usual.batch_size
    # Rounding to a power of two moves the tokens too.
    assert abs(log2(wanted / config.batch_size)) <= 0.5 * (1 + 0.383)
    assert config.optimizer.weight_decay == pytest.approx(
        usual.optimizer.weight_decay * batch(config) / batch(usual)
        * matrix_rate(usual) / matrix_rate(config) * tokens(usual) / tokens(config)
    )  # fmt: skip


def test_an_embedding_that_multiplies_nothing_does_not_count():
    tied, apart = (ModelConfig(64, 1, 64, 1, tie_embeddings=x) for x in (True, False))
    assert parameters(tied) == num_parameters(tied) == parameters(apart)


def test_without_a_depth_the_preset_is_as_it_was():
    assert settings("small") == settings("small", "--depth", "None") == PRESETS["small"]


def test_a_depth_is_no_setting_that_decides_weights_beside_what_it_sets():
    config = settings("tiny", "--depth", 1)
    assert config.depth == 1
    assert "depth" not in config.decisive()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("small", "--shape", "gpt2"), "--depth and --shape each name a shape; drop one of them"),
        (("--init-from", "runs/x"), "--depth is that of the model which --init-from names"),
        (("--resume", "--out", "runs/x"), "--depth is of a new run, and --resume has that of its"),
    ],
)
def test_what_names_another_shape_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        settings(*words, "--depth", 2)


@pytest.mark.parametrize("depth", ["0", "-1", "2.5", "many", "10001"])
def test_depths_that_are_none_are_refused(depth):
    with pytest.raises(ConfigError, match=r"depth must be .*change --depth"):
        settings("small", "--depth", depth)


def test_a_line_says_what_a_depth_has_set():
    config = settings("small", "--depth", 2, "--batch-size", 24, "--weight-decay", 0.25)
    said = described(config)
    assert said.startswith("Depth 2: width 128, steps of 24 × 256 tokens, learning rate ")
    assert f", Muon's {config.optimizer.muon_learning_rate:.3g}, weight decay 0.25, " in said
    assert "Muon" not in described(settings("tiny", "--depth", 1))
