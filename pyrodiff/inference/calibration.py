r"""Whether a posterior is calibrated: simulation-based calibration, and coverage by random reference points.

Draw :math:`\theta^*` from the prior, y from :math:`p(y \mid \theta^*)`, and L draws :math:`\theta_l` of the posterior under test, given
y. If that posterior is the right one, :math:`\theta^*` and the draws have one law given y, and among the L + 1 values of any function
:math:`f(\theta, y)` that of :math:`\theta^*` has the rank

.. math:: r = \#\{l : f(\theta_l, y) < f(\theta^*, y)\} \sim \mathrm{Uniform}\{0, \dots, L\}.

Both tests are of this law, over S independent simulations, and differ in f alone. :func:`sbc` takes what it is given, and every
coordinate of it; functions of y, such as the log-likelihood, see errors that coordinates do not: the prior in the place of the
posterior passes for every function of :math:`\theta` alone. :func:`tarp` takes the distance from a reference point.

**The test** is of the ranks' cumulative counts :math:`c_k = \#\{s : r_s < k\} \sim \mathrm{Binomial}(S, \tfrac{k}{L + 1})`, k = 1..L,
all at once. Its statistic is the least of their L two-sided tail probabilities, and its p-value the probability of a lesser or equal
one, exactly: :math:`c_1, c_2, \dots` is a walk of independent Poisson increments, given that it ends at S, and the probability that
it stays between limits is a sequence of convolutions.

**The draws** must be independent given y, or nearly. Ranks among draws that depend on each other are too often low or high, and a
right method fails. Where the L draws are worth n independent ones, the variance of the ranks is larger by the share
:math:`2 (1/n - 1/L)`, and a test of S simulations sees about :math:`2 / \sqrt S`. So

* **weighted particles** are drawn by their weights (``Posterior.sample``), from so many that the effective number is far above
  :math:`\sqrt S`: the share is 2 / (effective number, or number of families), whatever L is. Drawn twice or not, a particle counts.
* **chains** are thinned until their neighbours are hardly correlated, after their first part is left out.

Values equal to that of :math:`\theta^*` are put in random order, which keeps the law of the rank.

References:
    Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018), theorem 1.
    https://arxiv.org/abs/1804.06788
    Simulation-Based Calibration Checking for Bayesian Computation: the Choice of Test Quantities Shapes Sensitivity (Modrak et al.,
    2023), section 3. https://arxiv.org/abs/2211.02383
    Graphical Test for Discrete Uniformity and its Applications in Goodness of Fit Evaluation and Multiple Sample Comparison
    (Saeilynoja et al., 2022), section 2; the walk is ours. https://arxiv.org/abs/2103.10522
    Sampling-Based Accuracy Testing of Posterior Estimators for General Inference (Lemos et al., 2023), section 3.
    https://arxiv.org/abs/2302.03026
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import DataError, OptionError, ShapeError

__all__ = ["Calibration", "band", "sbc", "tarp", "uniformity"]

TIE = 1 + 1e-9  # tail probabilities that are equal but for rounding are equal
SHOWN = 12  # quantities that are printed


@dataclass(frozen=True)
class Calibration:
    """Ranks of the truth among draws of its posterior, and the p-values of their being uniform.

    Attributes:
        test: ``"SBC"`` or ``"TARP"``.
        names: of the Q quantities.
        ranks: of simulations, ``[S, Q]``, in 0..L.
        draws: L.
        p_values: of each quantity, ``[Q]``: where the posterior is right, at most a with probability at most a.
    """

    test: str
    names: tuple[str, ...]
    ranks: Tensor = field(repr=False)
    draws: int
    p_values: Tensor

    @property
    def p_value(self) -> float:
        """Of all quantities: the least p-value times Q (Bonferroni), valid however they depend on each other."""
        return min(1.0, len(self.names) * float(self.p_values.min()))

    @property
    def coverage(self) -> Tensor:
        """Share of the simulations whose rank is below k = 0, ..., L + 1, ``[Q, L + 2]``; expected: k / (L + 1).

        With the distance as the quantity this is TARP's expected coverage.
        """
        counts = _below(self.ranks, self.draws).double() / len(self.ranks)
        return torch.cat([torch.zeros_like(counts[:, :1]), counts], 1)

    @property
    def deviation(self) -> Tensor:
        """Largest difference of :attr:`coverage` from what is expected, ``[Q]``."""
        expected = torch.linspace(0, 1, self.draws + 2, dtype=torch.float64, device=self.ranks.device)
        return (self.coverage - expected).abs().amax(1)

    def __str__(self) -> str:
        count = len(self.names)
        head = f"{self.test}: {len(self.ranks):,} simulations, {self.draws:,} draws each: p = {self.p_value:.2g}"
        if count == 1:
            return f"{head}, off by at most {float(self.deviation):.3f}"
        order = self.p_values.argsort()[:SHOWN].tolist()
        width = max(len(self.names[i]) for i in order)
        rows = [
            f"  {self.names[i]:{width}s}  p = {float(self.p_values[i]):.2g}, off by at most {float(self.deviation[i]):.3f}"
            for i in order
        ]
        return "\n".join([f"{head}, {count} times the least of {count}", *rows, *["  ..."] * (count > SHOWN)])


def sbc(truth: Mapping[str, Tensor], draws: Mapping[str, Tensor], *, seed: int = 0) -> Calibration:
    """Simulation-based calibration of every coordinate of every quantity.

    Args:
        truth: of S simulations, by name: parameters as they were drawn from the prior, and functions of them and of y,
            ``[S, *shape]``.
        draws: the same of L draws of each simulation's posterior, ``[S, L, *shape]``.
        seed: of the order of equal values.

    Raises:
        ShapeError: the two do not fit.
        DataError: NaN, of which there is no rank.
    """
    fitted = _fitted(truth, draws)
    names = [
        name + "".join(f"[{i}]" for i in index)
        for name, value in truth.items()
        for index in itertools.product(*map(range, value.shape[1:]))
    ]
    return _calibration("SBC", names, *fitted, seed)


def tarp(
    truth: Mapping[str, Tensor], draws: Mapping[str, Tensor], references: Mapping[str, Tensor], *, seed: int = 0
) -> Calibration:
    """Tests of accuracy with random points: ranks of the truth's distance from a reference point.

    The distance is Euclidean, over the coordinates of all parameters together, each in units of its standard deviation over
    simulations. Only if the references depend on y can the test see a posterior that does not, such as the prior; whatever they
    are, they know the truth through y alone.

    Args:
        truth: parameters as they were drawn from the prior, by name, ``[S, *shape]``.
        draws: of each simulation's posterior, ``[S, L, *shape]``.
        references: a point for each simulation, ``[S, *shape]``, such as an estimate from y with noise added.
        seed: of the order of equal distances.

    Raises:
        ShapeError, DataError: see :func:`sbc`; a parameter that does not vary; infinite values.
    """
    theta, others = _fitted(truth, draws)
    points, _ = _fitted(references, draws)
    if not all(x.isfinite().all() for x in (theta, others, points)):
        raise DataError("infinite values among the truth, the draws or the references: they have no distance")
    if len(theta) < 2 or not (scale := theta.std(0)).all():
        raise DataError("a parameter is the same in all simulations, and has no scale to measure distances by")
    distances = [((x - points[:, None]) / scale).square().sum(2, keepdim=True) for x in (theta[:, None], others)]
    return _calibration("TARP", ["distance"], distances[0][:, 0], distances[1], seed)


def uniformity(ranks: Tensor, draws: int) -> Tensor:
    """The p-value of ranks as independent draws of Uniform{0, ..., L}: of all cumulative counts at once, exactly.

    Args:
        ranks: ``[S, Q]``, in 0..L.
        draws: L.

    Returns:
        ``[Q]``, float64, right to about 1e-13.
    """
    if draws < 1 or ranks.dim() != 2 or not ranks.numel() or ranks.is_floating_point():
        raise ShapeError(
            f"ranks of shape {list(ranks.shape)}, {ranks.dtype}, among draws={draws!r}: not whole numbers [S, Q] among at least 1"
        )
    if int(ranks.min()) < 0 or int(ranks.max()) > draws:
        raise DataError(f"ranks lie in {int(ranks.min())}..{int(ranks.max())}, not in 0..{draws}")
    tails = _tails(len(ranks), draws)
    counts = _below(ranks.cpu(), draws)[:, :-1]
    least = tails.expand(len(counts), -1, -1).gather(2, counts[..., None])[..., 0].amin(1)
    return _false_alarm(tails, least)


def _below(ranks: Tensor, draws: int) -> Tensor:
    """How many ranks are below k = 1, ..., L + 1, ``[Q, L + 1]``."""
    rows = ranks.mT.long()
    return (
        torch.zeros(len(rows), draws + 1, dtype=torch.long, device=ranks.device)
        .scatter_add_(1, rows, torch.ones_like(rows))
        .cumsum(1)
    )


def band(simulations: int, draws: int, alpha: float = 0.05) -> tuple[Tensor, Tensor]:
    """Limits that the :attr:`~Calibration.coverage` of a right posterior leaves with probability ``alpha`` at most, at any k.

    Args:
        simulations: S.
        draws: L.
        alpha: of one quantity; those limits are left where its p-value is at most ``alpha``.

    Returns:
        The lowest and the highest shares within, at k = 0, ..., L + 1, each ``[L + 2]``, float64.
    """
    if simulations < 1 or draws < 1 or not 0 < alpha < 1:
        raise OptionError(
            f"simulations={simulations!r} and draws={draws!r} are not at least 1, or alpha={alpha!r} not in (0, 1)"
        )
    tails = _tails(simulations, draws)
    low, high = 0.0, 1.0
    for _ in range(50):  # the largest statistic that is rejected: its p-value is at most alpha
        middle = (low + high) / 2
        rejected = float(_false_alarm(tails, torch.tensor([middle], dtype=torch.float64, device="cpu"))) <= alpha
        low, high = (middle, high) if rejected else (low, middle)
    within = tails > low * TIE
    counts = torch.arange(simulations + 1, device="cpu")
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")
    lowest = torch.where(within, counts, simulations).amin(1).double() / simulations
    highest = torch.where(within, counts, 0).amax(1).double() / simulations
    return torch.cat([ends[:1], lowest, ends[1:]]), torch.cat([ends[:1], highest, ends[1:]])


def _calibration(test: str, names: list[str], truth: Tensor, draws: Tensor, seed: int) -> Calibration:
    """Ranks of ``[S, Q]`` among ``[S, L, Q]``, and what they say."""
    generator = torch.Generator(truth.device).manual_seed(seed)
    equal = (draws == truth[:, None]).sum(1)
    uniform = torch.rand(equal.shape, dtype=torch.float64, device=truth.device, generator=generator)
    ranks = (draws < truth[:, None]).sum(1) + (uniform * (equal + 1)).long()
    return Calibration(test, tuple(names), ranks, draws.shape[1], uniformity(ranks, draws.shape[1]))


def _fitted(truth: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of all names, flattened and side by side: ``[S, Q]`` and ``[S, L, Q]``, float64."""
    if not (isinstance(truth, Mapping) and isinstance(draws, Mapping)):
        raise ShapeError(
            f"a {type(truth).__name__} and a {type(draws).__name__} are not two mappings from names to tensors"
        )
    if not truth or truth.keys() != draws.keys():
        raise ShapeError(f"of the truth there is {[*truth]}, and of the draws {[*draws]}: not the same")
    for name in truth:
        for value in (truth[name], draws[name]):
            if not isinstance(value, Tensor) or value.is_complex():
                found = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
                raise ShapeError(f"{name} is a {found}, not a torch.Tensor of real numbers")
    first = draws[next(iter(truth))]
    lengths = {*first.shape[1:2]}
    for name, value in truth.items():
        shape = draws[name].shape
        if value.dim() < 1 or not value.numel() or shape[:1] + shape[2:] != value.shape or {*shape[1:2]} != lengths:
            raise ShapeError(
                f"{name}: truth {list(value.shape)} and draws {list(shape)} are not [S, *shape] and [S, L, *shape], of the S and L "
                f"of all ({list(first.shape[:2])})"
            )
    columns = torch.cat(
        [truth[name].double().flatten(1) if truth[name].dim() > 1 else truth[name].double()[:, None] for name in truth],
        1,
    )
    rows = torch.cat(
        [
            draws[name].double().flatten(2) if draws[name].dim() > 2 else draws[name].double()[..., None]
            for name in truth
        ],
        2,
    )
    if columns.isnan().any() or rows.isnan().any():
        raise DataError("NaN among the truth or the draws: it has no rank")
    return columns, rows


def _tails(simulations: int, draws: int) -> Tensor:
    """Twice the smaller tail probability of Binomial(S, k / (L + 1)) at each count, ``[L, S + 1]``."""
    share = torch.arange(1, draws + 1, dtype=torch.float64, device="cpu")[:, None] / (draws + 1)
    law = torch.distributions.Binomial(simulations, share, validate_args=False)
    mass = law.log_prob(torch.arange(simulations + 1, dtype=torch.float64, device="cpu")).exp()
    return 2 * torch.minimum(mass.cumsum(1), mass.flip(1).cumsum(1).flip(1))


def _false_alarm(tails: Tensor, least: Tensor) -> Tensor:
    """The probability that the least tail probability of uniform ranks is ``least`` ``[Q]``, or less."""
    draws, simulations = tails.shape[0], tails.shape[1] - 1
    counts = torch.arange(simulations + 1, dtype=torch.float64, device="cpu")
    rate = torch.tensor(simulations / (draws + 1), dtype=torch.float64, device="cpu")
    size = 1 << (2 * simulations).bit_length()  # convolutions of this length do not wrap round
    increment = torch.fft.rfft((counts * rate.log() - rate - torch.lgamma(counts + 1)).exp(), size)
    walk = torch.zeros(len(least), simulations + 1, dtype=torch.float64, device="cpu")
    walk[:, 0] = 1

    def step(walk: Tensor) -> Tensor:
        moved: Tensor = torch.fft.irfft(torch.fft.rfft(walk, size) * increment, size)
        return moved[:, : simulations + 1].clamp(min=0)

    for tail in tails:
        walk = step(walk) * (tail > least[:, None] * TIE)
    whole = math.exp(simulations * math.log(simulations) - simulations - math.lgamma(simulations + 1))
    return (1 - step(walk)[:, -1] / whole).clamp(0, 1)
