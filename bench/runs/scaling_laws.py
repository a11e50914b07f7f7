"""Scaling laws: losses of models of several sizes, fitted by sums of powers, with intervals.

    ln L = q · ln Σ_k exp(c_k - p_k · ln x_k),    x_k parameters, tokens or compute

holds all three laws here. A term without x is a constant: the loss that no model gets below.

    Chinchilla   L = E + A / N^α + B / D^β                          q = 1
    Kaplan       L = ((N_c / N)^(α_N / α_D) + D_c / D)^α_D          q = α_D, p_D = 1
    compute      L = (C_c / C)^α_C                                  q = 1

N of Chinchilla counts all parameters, that of Kaplan leaves the embedding out. Errors are relative,
so the fit is least squares of ln L, by Levenberg and Marquardt's steps from many starts, as both
papers fit ln L; Hoffmann et al. by Huber's loss, because of outliers among 400 runs.

Intervals: losses are drawn anew from the fit, with the spread of its residuals, and fitted again,
many times. The spread is itself known only by the runs less the constants: each draw takes it from
its χ² distribution, which gives Student's t where a law is linear. A prediction's interval is that
of a run, its own spread included.

An error of the law's form is not in the residuals: where a curve bends more than its law, the law
fits all runs and misses the next. `hindcasts` measures it inside the ladder, where the outcomes are
known: each size is predicted from the sizes at least as far below it as the runs are below the one
to be predicted. With their root mean square s and number m, the prediction is drawn with s · t(m)
added. That errs on the wide side, since s holds the spread of runs and of constants too, which the
other draws have already. It cannot hold a bend that begins above the ladder.

Kaplan et al., "Scaling Laws for Neural Language Models", 2020, equations 1.3 and 1.5.
https://arxiv.org/abs/2001.08361
Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022, section 3.3 and D.3.
https://arxiv.org/abs/2203.15556
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

DRAWS = 1000
STEPS = 80  # of Levenberg and Marquardt, at most
SETTLED = 1e-8  # share of the squared error by which a last step lowers it
MOST_DAMPING = 1e6
STARTS = (0.2, 0.5, 1.0)  # exponents, and q where it is free
LEAST, MOST = 1e-3, 3.0  # exponents, and q
LEVEL = 0.95
LEAST_BELOW = 3  # sizes from which another is predicted


class Point(NamedTuple):
    """A run that ended."""

    parameters: float
    """All parameters."""
    hidden: float
    """Parameters without the embedding."""
    tokens: float
    """Tokens trained on."""
    flops: float
    """FLOPs of the training."""
    loss: float = float("nan")
    """Nats per token of held-out text."""


class Estimate(NamedTuple):
    """A number and its interval."""

    value: float
    low: float
    high: float

    def holds(self, number: float) -> bool:
        """Whether the interval holds a number."""
        return self.low <= number <= self.high


@dataclass(frozen=True)
class Law:
    """A form of the loss."""

    formula: str
    terms: tuple[str | None, ...]
    """Field of `Point` that each term is a power of; None for a constant."""
    constants: Callable[[np.ndarray], dict[str, np.ndarray]]
    """Names and values of the published form's constants, from rows of c, p and q."""
    slope: float | None = None
    """p of the last term where the form fixes it."""
    q: float | None = 1.0
    """The outer power. None: free."""

    @property
    def free(self) -> np.ndarray:
        """Mask of those of c, p and q that are fitted."""
        slopes = [name is not None for name in self.terms]
        slopes[-1] &= self.slope is None
        return np.array([True] * len(self.terms) + slopes + [self.q is None])

    def logs(self, points: Sequence[Point]) -> np.ndarray:
        """Return ln x, `[points, terms]`; 0 for a constant."""
        return np.array([[np.log(getattr(x, t)) if t else 0.0 for t in self.terms] for x in points])


def _chinchilla(theta: np.ndarray) -> dict[str, np.ndarray]:
    E, A, B = np.exp(theta[:, :3].T)
    return {"E": E, "A": A, "α": theta[:, 4], "B": B, "β": theta[:, 5]}


def _kaplan(theta: np.ndarray) -> dict[str, np.ndarray]:
    c_N, c_D, p, _, q = theta.T
    return {"N_c": np.exp(c_N / p), "α_N": p * q, "D_c": np.exp(c_D), "α_D": q}


def _compute(theta: np.ndarray) -> dict[str, np.ndarray]:
    c, p, _ = theta.T
    return {"C_c": np.exp(c / p), "α_C": p}


LAWS = {
    "Chinchilla": Law("E + A/N^α + B/D^β", (None, "parameters", "tokens"), _chinchilla),
    "Kaplan": Law(
        "((N_c/N)^(α_N/α_D) + D_c/D)^α_D", ("hidden", "tokens"), _kaplan, slope=1.0, q=None
    ),
    "compute": Law("(C_c/C)^α_C", ("flops",), _compute),
}
"""Laws by name; that of compute is one of runs whose tokens grow with their parameters."""


class Fit:
    """A law whose constants are those of runs.

    Args:
        law: its form.
        points: the runs, more than it has constants.
        draws: fits of losses drawn anew, for the intervals.
        seed: seed of the draws.

    Raises:
        ValueError: there are too few runs.
    """

    def __init__(self, law: Law, points: Sequence[Point], *, draws: int = DRAWS, seed: int = 0):
        n, unknown = len(points), int(law.free.sum())
        if n <= unknown:
            raise ValueError(
                f"{law.formula} has {unknown} constants and needs more runs than these, got {n}; "
                "add sizes or lengths"
            )
        self.law, self.points = law, points
        x = law.logs(points)
        self._center = x.mean(0)  # logs of millions would tie slopes to intercepts
        x, y = x - self._center, np.log([point.loss for point in points])
        starts = _starts(law, y.mean())
        found, errors = _least_squares(law, x, np.tile(y, (len(starts), 1)), starts)
        self._theta = found[[errors.argmin()]]
        freedom = n - unknown
        self.spread = float(np.sqrt(errors.min() / freedom))
        """Standard deviation of residuals of ln L: 0.01 is one per cent of the loss."""
        random = np.random.default_rng(seed)
        self._spreads = self.spread * np.sqrt(freedom / random.chisquare(freedom, draws))
        noise = random.standard_normal((draws, n + 1)) * self._spreads[:, None]
        y = _value(law, x, self._theta) + noise[:, :n]
        # From the fit, and from afar: where a term has vanished in the fit, no step brings it back.
        ends = [
            _least_squares(law, x, y, np.tile(start, (draws, 1)))
            for start in (self._theta, starts[len(starts) // 2])
        ]
        nearest = (ends[0][1] <= ends[1][1])[:, None]
        self._drawn = np.where(nearest, ends[0][0], ends[1][0])
        self._own = noise[:, n]
        self._seed = seed

    def predict(self, point: Point, level: float = LEVEL, errors: Sequence[float] = ()) -> Estimate:
        """Return the loss of a run in nats per token, and the interval that holds it.

        Args:
            point: the run.
            level: share of the runs that the interval holds.
            errors: of ln L, that the form makes so far from its runs, as `hindcasts` returns them.
                None given: the interval is that of a law which holds.
        """
        x = self.law.logs([point]) - self._center
        drawn = _value(self.law, x, self._drawn)[:, 0] + self._own
        if errors:
            spread = np.sqrt(np.mean(np.square(errors)))
            random = np.random.default_rng([self._seed, 1])
            drawn = drawn + spread * random.standard_t(len(errors), len(drawn))
        return _estimate(np.exp(_value(self.law, x, self._theta)[:, 0]), np.exp(drawn), level)

    def constants(self, level: float = LEVEL) -> dict[str, Estimate]:
        """Return the constants of the published form."""
        found, drawn = (self.law.constants(self._moved(x)) for x in (self._theta, self._drawn))
        return {name: _estimate(found[name], drawn[name], level) for name in found}

    def best_ratio(self, flops: float, level: float = LEVEL) -> Estimate:
        """Return the tokens for each parameter at which Chinchilla's form is least for a compute.

        That is taken to be 6 N D FLOPs, as in their equation 4.
        """
        ratios = []
        for theta in (self._theta, self._drawn):
            _, a, b, _, α, β, _ = self._moved(theta).T
            product = np.log(flops / 6)
            ln_N = (np.log(α / β) + a - b + β * product) / (α + β)
            ratios.append(np.exp(product - 2 * ln_N))
        return _estimate(ratios[0], ratios[1], level)

    def _moved(self, theta: np.ndarray) -> np.ndarray:
        """Return the rows for logs that are not centred."""
        K = len(self.law.terms)
        moved = theta.copy()
        moved[:, :K] += theta[:, K : 2 * K] * self._center
        return moved


def hindcasts(law: Law, points: Sequence[Point], beyond: Point) -> list[float]:
    """Return ln of (trained / predicted) loss where a law predicts sizes of its own runs.

    Each is predicted by a fit of smaller ones, as `divisions` has them; of several runs that are
    equally long it is the mean.
    """
    errors = []
    for longest, below in divisions(points, beyond):
        predicted = Fit(law, below, draws=1).predict(longest[0]).value
        errors.append(float(np.mean([np.log(x.loss / predicted) for x in longest])))
    return errors


def divisions(points: Sequence[Point], beyond: Point) -> list[tuple[list[Point], list[Point]]]:
    """Return sizes that can be predicted from others: their longest runs, and runs of the others.

    Args:
        points: the runs.
        beyond: the run to be predicted in the end, of a larger size. The others are at least as
            many times smaller as the largest of `points` is smaller than it, and of three sizes.
    """
    sizes = sorted({x.parameters for x in points})
    reach = sizes[-1] / beyond.parameters
    found = []
    for size in sizes:
        below = [x for x in points if x.parameters <= reach * size * (1 + 1e-9)]
        if len({x.parameters for x in below}) >= LEAST_BELOW:
            runs = [x for x in points if x.parameters == size]
            most = max(x.tokens for x in runs)
            found.append(([x for x in runs if x.tokens == most], below))
    return found


def _estimate(value: np.ndarray, drawn: np.ndarray, level: float) -> Estimate:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(value[0]), float(low), float(high))


def _starts(law: Law, mean: float) -> np.ndarray:
    """Return rows of c, p and q in which one term, or none, outweighs the others."""
    K = len(law.terms)
    rows = []
    for q in STARTS if law.q is None else (law.q,):
        for p in STARTS:
            for weights in (np.ones(K), *(np.eye(K) * 4 + 1)):
                slopes = [p if name else 0.0 for name in law.terms]
                slopes[-1] = law.slope or slopes[-1]
                rows.append([*(mean / q + np.log(weights / weights.sum())), *slopes, q])
    return np.array(rows)


def _terms(law: Law, x: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ln Σ_k, `[rows, points]`, and each term's share of Σ_k, `[rows, points, terms]`."""
    K = len(law.terms)
    each = theta[:, None, :K] - theta[:, None, K : 2 * K] * x
    most = each.max(-1, keepdims=True)
    shares = np.exp(each - most)
    total = shares.sum(-1, keepdims=True)
    return (most + np.log(total))[..., 0], shares / total


def _value(law: Law, x: np.ndarray, theta: np.ndarray) -> np.ndarray:
    return theta[:, -1:] * _terms(law, x, theta)[0]


def _least_squares(
    law: Law, x: np.ndarray, y: np.ndarray, theta: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fit each row of y from the same row of theta; return the constants and the squared errors."""
    free, K = law.free, len(law.terms)
    theta, damping = theta.copy(), np.full(len(y), 1e-3)
    error = ((y - _value(law, x, theta)) ** 2).sum(1)
    left = np.arange(len(y))
    for _ in range(STEPS):
        now = theta[left]
        logs, shares = _terms(law, x, now)
        q = now[:, -1][:, None, None]
        jacobian = np.concatenate([q * shares, -q * shares * x, logs[..., None]], -1)[..., free]
        residual = y[left] - now[:, -1:] * logs
        normal = np.einsum("bni,bnj->bij", jacobian, jacobian)
        diagonal = np.einsum("bii->bi", normal)
        diagonal += damping[left, None] * diagonal + 1e-12
        right = np.einsum("bni,bn->bi", jacobian, residual)
        now[:, free] += np.linalg.solve(normal, right[..., None])[..., 0]
        slopes = now[:, K:]
        slopes[:, free[K:]] = slopes[:, free[K:]].clip(LEAST, MOST)
        tried = ((y[left] - _value(law, x, now)) ** 2).sum(1)
        before = error[left]
        better = tried < before
        theta[left[better]], error[left[better]] = now[better], tried[better]
        damping[left] = np.where(better, damping[left] / 5, damping[left] * 5)
        moves = np.where(better, before - tried > SETTLED * before, damping[left] < MOST_DAMPING)
        left = left[moves]
        if not left.size:
            break
    return theta, error
