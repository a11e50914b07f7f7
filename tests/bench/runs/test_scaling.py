"""Prove that laws of the loss are found in losses that follow them, and intervals cover at their
rate; that errors of a law's form are in them; that batch, rates and decay follow from a run's
tokens; that a ladder's prediction is made before its outcome, and a missed one is said."""

import re
from dataclasses import replace
from functools import partial
from math import exp, log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritium.bench import tables
from tritium.bench.ends import WrongInputError
from tritium.bench.runs import _trials, scaling, scaling_laws
from tritium.bench.runs._trials import Outcome, Trial, TrialError
from tritium.bench.runs.scaling_laws import LAWS, Estimate, Fit, Point
from tritium.model.shapes import flops_per_token, num_parameters
from tritium.model.transformer import Transformer
from tritium.training.command_line import parse

SIZES = 13e3, 20e3, 40e3, 68e3, 115e3


def point(n, d, loss=float("nan")):
    return Point(n, 0.8 * n, d, 6 * n * d, loss)


def ladder(law, noise=None):
    """Runs of five sizes, each on a quarter of its tokens and on all, or on all alone."""
    shares = (1,) if law is compute else (0.25, 1)
    places = [point(n, 20 * n * share) for n in SIZES for share in shares]
    noise = np.zeros(len(places)) if noise is None else noise.standard_normal(len(places)) * 0.005
    return [x._replace(loss=law(x) * exp(e)) for x, e in zip(places, noise, strict=True)]


def chinchilla(x, E=0.9, A=60.0, α=0.4, B=300.0, β=0.45):
    return E + A / x.parameters**α + B / x.tokens**β


def kaplan(x, N_c=1e6, α_N=0.25, D_c=2e6, α_D=0.35):
    return ((N_c / x.hidden) ** (α_N / α_D) + D_c / x.tokens) ** α_D


def compute(x, C_c=1e14, α_C=0.15):
    return (C_c / x.flops) ** α_C


FORMS = {"Chinchilla": chinchilla, "Kaplan": kaplan, "compute": compute}
NEXT = point(209e3, 20 * 209e3)


@given(
    E=st.floats(0.3, 1.5), α=st.floats(0.25, 0.6), β=st.floats(0.25, 0.6),
    reducible=st.tuples(st.floats(0.3, 3.0), st.floats(0.3, 3.0)),
)  # fmt: skip
def test_chinchillas_constants_are_recovered(E, α, β, reducible):
    planted = {"E": E, "A": reducible[0] * 4e4**α, "α": α, "B": reducible[1] * 4e5**β, "β": β}
    fit = Fit(LAWS["Chinchilla"], ladder(lambda x: chinchilla(x, **planted)), draws=2)
    assert {k: x.value for k, x in fit.constants().items()} == pytest.approx(planted, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("Kaplan", {"N_c": 3e6, "α_N": 0.08, "D_c": 5e6, "α_D": 0.3}),
        ("Kaplan", {"N_c": 1e5, "α_N": 0.3, "D_c": 9e5, "α_D": 0.2}),
        ("compute", {"C_c": 1e14, "α_C": 0.15}),
        ("compute", {"C_c": 3e16, "α_C": 0.05}),
    ],
)
def test_kaplans_constants_are_recovered(name, planted):
    shares = (0.25, 1.0)
    points = [point(n, 20 * n * s) for n in SIZES for s in shares]
    points = [x._replace(loss=FORMS[name](x, **planted)) for x in points]
    found = {k: x.value for k, x in Fit(LAWS[name], points, draws=2).constants().items()}
    assert found == pytest.approx(planted, rel=1e-3)


@pytest.mark.parametrize("name", LAWS)
def test_intervals_of_predictions_and_constants_cover_at_their_rate(name):
    # 60 worlds: 30 and 57 hits, of standard deviations 3.9 and 1.7; three of them, and one more for
    # a curved law's intervals, which are not exact.
    planted = dict(zip(Fit(LAWS[name], ladder(FORMS[name]), draws=2).constants(),
                       FORMS[name].__defaults__, strict=True))  # fmt: skip
    last = list(planted)[-1]
    random, hits = np.random.default_rng(7), np.zeros(4)
    for seed in range(60):
        fit = Fit(LAWS[name], ladder(FORMS[name], random), draws=100, seed=seed)
        trained = FORMS[name](NEXT) * exp(0.005 * random.standard_normal())
        hits += [fit.predict(NEXT, level).holds(trained) for level in (0.5, 0.95)] + [
            fit.constants(level)[last].holds(planted[last]) for level in (0.5, 0.95)
        ]
    assert all(18 <= x <= 42 for x in hits[::2]), hits
    assert all(x >= 50 for x in hits[1::2]), hits


def test_the_interval_of_a_straight_law_is_students():
    points = ladder(compute, np.random.default_rng(3))
    x, y = np.log([p.flops for p in points]), np.log([p.loss for p in points])
    slope, intercept = np.polyfit(x, y, 1)
    spread = sqrt(((y - intercept - slope * x) ** 2).sum() / 3)
    away = (log(NEXT.flops) - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
    half = 3.182 * spread * sqrt(1 + 1 / len(x) + away)  # 97.5 % of t of 3 degrees of freedom
    fit = Fit(LAWS["compute"], points, draws=20_000)
    value, low, high = map(log, fit.predict(NEXT))
    assert fit.spread == pytest.approx(spread)
    assert value == pytest.approx(intercept + slope * log(NEXT.flops))
    # A quantile of 20,000 draws of t is known to 2 % of its width.
    assert (value - low, high - value) == pytest.approx((half, half), rel=0.08)


@pytest.mark.parametrize("name", LAWS)
def test_no_step_of_a_fit_makes_it_worse(name):
    # Losses that follow no law, from every start: a full step overshoots.
    law, places = LAWS[name], ladder(FORMS[name])
    x = law.logs(places)
    x -= x.mean(0)
    starts = scaling_laws._starts(law, 0.5)
    y = np.random.default_rng(5).uniform(-3, 3, (len(starts), len(places)))
    before = ((y - scaling_laws._value(law, x, starts)) ** 2).sum(1)
    theta, error = scaling_laws._least_squares(law, x, y, starts)
    assert (error <= before).all()
    assert error == pytest.approx(((y - scaling_laws._value(law, x, theta)) ** 2).sum(1))


def test_a_constant_that_vanished_in_the_fit_has_an_interval():
    # The loss falls as if for ever; with noise, some of the draws bend.
    points = ladder(lambda x: chinchilla(x, E=1e-9, α=0.2, A=6.0, β=0.2, B=15.0))
    noise = np.random.default_rng(4).standard_normal(len(points)) * 0.006
    points = [x._replace(loss=x.loss * exp(e)) for x, e in zip(points, noise, strict=True)]
    E = Fit(LAWS["Chinchilla"], points).constants()["E"]
    assert E.value < 1e-3 < 0.1 < E.high


def test_hindcasts_are_those_of_smaller_sizes_as_far_away():
    # A straight law, by polyfit: of five sizes two have three others as far below them, 68e3 and
    # 115e3; the runs on a quarter of their tokens are no target.
    places = [point(n, 20 * n * share) for n in SIZES for share in (0.25, 1)]
    noise = np.random.default_rng(6).standard_normal(len(places)) * 0.02
    points = [x._replace(loss=compute(x) * exp(e)) for x, e in zip(places, noise, strict=True)]
    points += [points[-1]._replace(loss=points[-1].loss * exp(0.1))]  # a second run of the largest
    found = scaling_laws.hindcasts(LAWS["compute"], points, point(190e3, 0))
    expected = []
    for size, last in ((68e3, [points[7]]), (115e3, points[9:])):
        below = [x for x in points if x.parameters <= size * 115 / 190]
        assert len(below) == (6 if size == 68e3 else 8)
        line = np.polyfit([log(x.flops) for x in below], [log(x.loss) for x in below], 1)
        expected.append(np.mean([log(x.loss) - np.polyval(line, log(x.flops)) for x in last]))
    assert found == pytest.approx(expected)


def test_an_interval_with_the_forms_error_holds_where_the_curve_bends():
    # A loss with a bottom, by a law without one, as far above the ladder as its hindcasts reach.
    sizes = [13e3 * 1.4**i for i in range(10)]
    *bent, beyond = (point(n, 20 * n) for n in sizes)
    bent = [x._replace(loss=0.8 + compute(x, C_c=1e13, α_C=0.3)) for x in bent]
    trained = 0.8 + compute(beyond, C_c=1e13, α_C=0.3)
    fit = Fit(LAWS["compute"], bent)
    errors = scaling_laws.hindcasts(LAWS["compute"], bent, beyond)
    plain, wide = fit.predict(beyond), fit.predict(beyond, errors=errors)
    assert not plain.holds(trained)
    assert wide.holds(trained)
    assert wide.value == plain.value
    assert fit.predict(beyond, errors=errors) == wide


def test_the_forms_error_is_students_by_the_number_of_hindcasts():
    # A law without any spread: the interval is that of the errors alone.
    fit = Fit(LAWS["compute"], ladder(compute), draws=20_000)
    _, low, high = map(log, fit.predict(NEXT, errors=(0.03, 0.04)))
    half = 4.303 * sqrt((0.03**2 + 0.04**2) / 2)  # 97.5 % of t of 2 degrees of freedom
    assert (high - low) / 2 == pytest.approx(half, rel=0.08)


def test_the_best_ratio_has_the_least_loss_for_its_compute():
    fit = Fit(LAWS["Chinchilla"], ladder(chinchilla, np.random.default_rng(2)), draws=100)
    best = fit.best_ratio(1e13)

    def loss(ratio):
        N = sqrt(1e13 / 6 / ratio)
        return fit.predict(point(N, ratio * N)).value

    assert loss(best.value) < min(loss(0.98 * best.value), loss(1.02 * best.value))
    assert 0 < best.low < best.value < best.high


def test_a_law_needs_more_runs_than_constants():
    with pytest.raises(ValueError, match=r"has 5 constants and needs more runs than these, got 5"):
        Fit(LAWS["Chinchilla"], ladder(chinchilla)[:5])


@pytest.mark.parametrize(("name", "free"), [("Chinchilla", 5), ("Kaplan", 4), ("compute", 2)])
def test_a_law_has_as_many_free_numbers_as_published_constants(name, free):
    """One more would take a degree of freedom from the intervals, where the law fixes it."""
    points = ladder(FORMS[name], np.random.default_rng(5))
    assert LAWS[name].free.sum() == free == len(Fit(LAWS[name], points, draws=2).constants())


@given(st.floats(6e3, 1e7))
def test_a_shape_has_about_the_parameters_asked_for(size):
    model = scaling.shape(size)
    assert 0.6 < scaling.hidden(model) / size < 1.6  # widths are multiples of 8, from 16
    assert model.head_width >= 16
    assert scaling.shape(1.3 * size).d_model >= model.d_model * 0.7


def test_a_point_counts_what_the_model_has():
    model = scaling.shape(12e3)
    found = scaling._point(model, 7 * 4 * 128)
    weights = list(Transformer(model).parameters())
    assert found.parameters == sum(p.numel() for p in weights)
    assert found.hidden == sum(p.numel() for p in weights if p.shape != (257, model.d_model))
    assert found.tokens == 7 * 4 * 128
    assert found.flops == flops_per_token(model) * found.tokens


@given(st.floats(6e3, 4e5), st.floats(3.0, 60.0))
def test_train_py_takes_the_runs_which_follow_from_width_and_tokens(size, ratio):
    """By the laws of training.depth, from the preset's width, batch and length."""
    model, usual = scaling.shape(size), scaling.PRESET
    trial = scaling.trial(model, ratio, 0)
    config, *_ = parse([*scaling.COMMON, *trial.arguments])
    assert config.model == model
    tokens = config.length.max_steps * config.batch_size * scaling.CONTEXT
    half_a_step = config.batch_size * scaling.CONTEXT / 2
    assert tokens == pytest.approx(ratio * num_parameters(model), abs=half_a_step)
    assert scaling._planned(trial, model).tokens == tokens
    before = usual.batch_size * usual.model.max_seq_len
    longer = ratio * num_parameters(model) / (before * usual.length.max_steps)
    batch = before * longer**0.383 / scaling.CONTEXT
    assert config.batch_size == pytest.approx(batch, abs=0.501)
    larger = config.batch_size * scaling.CONTEXT / before
    rate = sqrt(larger * usual.model.d_model / model.d_model)
    assert config.schedule.learning_rate == pytest.approx(
        rate * usual.schedule.learning_rate, rel=1e-3
    )
    muon = rate * usual.optimizer.muon_learning_rate
    assert config.optimizer.muon_learning_rate == pytest.approx(muon, rel=1e-3)
    decay = usual.optimizer.weight_decay * larger / rate / longer
    assert config.optimizer.weight_decay == pytest.approx(decay, rel=1e-3)
    assert config.schedule.warmup_steps == min(30, config.length.max_steps // 10)


MODELS = [scaling.shape(6e3 * 2**i) for i in range(6)]


class Trainer:
    """Runs whose losses follow Chinchilla's form; the last size's are multiplied by `factor`."""

    def __init__(self, factor=1.0):
        self.factor, self.made, self.said = factor, [], lambda: ""

    def __call__(self, trials, folder, common):
        self.made += [(x, self.said()) for x in trials]
        return [
            Outcome(x.name, x.arguments, x.seed, self.loss(x), 1.0, self.model(x)[1],
                    self.seconds(x))
            for x in trials
        ]  # fmt: skip

    def model(self, trial):
        given = dict(zip(trial.arguments[::2], trial.arguments[1::2], strict=True))
        made = [x for x in MODELS if str(x.d_model) == given["--model.d-model"]]
        found = next(x for x in made if str(x.n_layers) == given["--model.n-layers"])
        return found, int(given["--max-steps"]) * int(given["--batch-size"]) * scaling.CONTEXT

    def loss(self, trial):
        found = scaling._point(*self.model(trial))
        last = found.hidden > 150e3
        noise = 0.002 * np.sin(hash((found.tokens, found.parameters)) % 1000)
        return chinchilla(found) * exp(noise) * (self.factor if last else 1.0)

    def seconds(self, trial):
        model, tokens = self.model(trial)
        return tokens * (1e-5 + 2e-11 * flops_per_token(model))


@pytest.fixture
def trainer(monkeypatch, tmp_path, capsys):
    made = Trainer()
    made.said = lambda: capsys.readouterr().out
    monkeypatch.setattr(scaling, "run_all", made)
    monkeypatch.setattr(scaling, "Fit", partial(Fit, draws=100))  # ten times as fast
    monkeypatch.setattr(tables, "results", lambda: tmp_path / "results")
    return made


def test_the_prediction_is_said_before_the_next_size_is_trained(trainer, tmp_path, capsys):
    scaling.main(out=tmp_path / "out", write=True)
    *before, (last, said) = trainer.made
    assert len(before) == 10
    assert re.search(r"Predicted by Chinchilla: \d\.\d+ \(", said)
    assert trainer.model(last)[0] == scaling.shape(192e3)
    page = (tmp_path / "results" / "scaling.md").read_text()
    predicted = float(re.search(r"Chinchilla: (\d\.\d+)", said)[1])
    assert f"form predicted {predicted:.4f} (" in page
    assert predicted == pytest.approx(trainer.loss(last), rel=0.02)
    assert "within the interval" in page
    assert "NOT" not in page
    assert f"{trainer.loss(last):.4f}" in page
    assert re.search(r"trained less predicted: [+-]\d\.\d+ %, [+-]\d\.\d+ %\. The intervals", page)
    assert 10_000 < (tmp_path / "results" / "scaling.png").stat().st_size < 300_000


def test_the_law_of_compute_is_that_of_runs_on_all_tokens():
    points = ladder(chinchilla)
    found = scaling.fit(points, 20.0)["compute"].constants()
    assert found == Fit(LAWS["compute"], points[1::2]).constants()


def test_a_prediction_that_misses_is_said_to(trainer, tmp_path, capsys, monkeypatch):
    """Unless the form is known to err as much."""
    trainer.factor = 1.2
    scaling.main(out=tmp_path / "out")
    assert "NOT within the interval" in capsys.readouterr().out
    monkeypatch.setattr(scaling, "hindcasts", lambda *_: [0.2, -0.2])
    scaling.main(out=tmp_path / "out")
    said = capsys.readouterr().out
    assert "trained less predicted: +20.00 %, -20.00 %." in " ".join(said.split())
    assert "NOT within" not in said
    assert (tmp_path / "out" / "scaling.png").exists()


def test_minutes_are_those_of_all_steps(trainer, tmp_path):
    scaling.main(minutes=3.0, seeds=2, out=tmp_path / "out")
    runs = [x for x, _ in trainer.made[2:]]
    assert len(runs) == 22
    assert sum(map(trainer.seconds, runs)) == pytest.approx(180, rel=0.01)


def test_after_a_kill_the_runs_that_ended_are_kept(tmp_path, monkeypatch, trainer):
    monkeypatch.setattr(scaling, "run_all", _trials.run_all)
    made = []

    def run(trial, folder):
        made.append((trial.name, trial.seed))
        if len(made) == 4:
            raise KeyboardInterrupt
        plain = Trial(trial.name, trial.arguments[len(scaling.COMMON) :], trial.seed)
        return replace(trainer([plain], folder, ())[0], arguments=trial.arguments)

    monkeypatch.setattr(_trials, "_run", run)
    with pytest.raises(KeyboardInterrupt):
        scaling.main(out=tmp_path)
    scaling.main(out=tmp_path)
    assert len(made) == 12
    assert made[3] == made[4]
    assert len({*made}) == 11


def test_a_run_that_diverged_ends_it(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "loss", lambda trial: float("nan"))
    with pytest.raises(TrialError, match=r"^2 x 16, 102 steps of 4, seed 0: diverged"):
        scaling.main(out=tmp_path)


def test_some_of_several_seeds_within():
    said = scaling.verdict(Estimate(1.0, 0.9, 1.1), [1.0, 1.2])
    assert "1.2000, 1 of 2 within the interval" in said


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"sizes": (1e4, 2e4, 4e4, 8e4)},
            "--sizes must be 5 or more numbers, growing from above 0, got 10000.0 2",
        ),
        (
            {"sizes": (1e4, 2e4, 8e4, 4e4, 9e4)},
            "--sizes must be 5 or more numbers, growing from above 0",
        ),
        (
            {"sizes": (-1.0, 2e4, 3e4, 4e4, 9e4)},
            "--sizes must be 5 or more numbers, growing from above 0",
        ),
        ({"sizes": (6e3, 12e3, 12.1e3, 48e3, 96e3)}, "two have 14,040 parameters, take them fur"),
        (
            {"predict": 4e5},
            "an interval needs 2 sizes with 3 others as far below as the ladder is below 400000, "
            "got 0; add sizes, or take --predict nearer",
        ),
        ({"predict": 9e4}, "--predict must be above the largest of --sizes, 96000, got 90000"),
        ({"minutes": 1.0, "tokens_per_parameter": 2.0}, "exclude each other; drop one"),
        ({"minutes": 0.0}, "--minutes must be above 0, got 0"),
        ({"tokens_per_parameter": -1.0}, "--tokens-per-parameter must be above 0, got -1"),
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_asked_is_refused(asked, words, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "run_all", lambda *_: pytest.fail("it was run"))
    with pytest.raises(WrongInputError, match=re.escape(words)):
        scaling.main(**asked, out=tmp_path)
