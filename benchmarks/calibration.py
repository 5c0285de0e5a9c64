"""Which methods draw from the posterior they claim: simulation-based calibration and TARP where the prior's own law can be drawn.

    python benchmarks/calibration.py                               # everything: about half an hour
    python benchmarks/calibration.py --only smc --simulations 100
    python benchmarks/calibration.py --problem mixture

Two priors with exact denoisers, N(0, I) in three dims and a mixture of three Gaussians in two; y = A x + noise. Either the noise is
of known size and x alone unknown, or log sigma ~ N(-0.7, 0.5) is unknown too. The truth is drawn from the prior that the method
claims to have:

* "chain": a chain of 16 steps ("short": 8), by `sample`, whose law need not be that of the data;
* "flow": the probability flow by its solver, of 8 steps of RK4;
* "data": the mixture itself, which the bound in continuous time is of.

Of each method: p-values of SBC (of all coordinates and the log-likelihood, times their number) and of TARP (references: an estimate of x
from y, with noise), the quantity with the least p-value, and the effective number behind the draws.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.optim import ClippedAdam
from torch import Tensor, nn

from pyrodiff import GaussianDiffusion, LogLinearSchedule, sample
from pyrodiff.inference import DiffusionPrior, FlowReparam, bound
from pyrodiff.inference.calibration import sbc, tarp
from pyrodiff.inference.gibbs import particle_gibbs
from pyrodiff.inference.guidance import guided, mmps, pigdm
from pyrodiff.inference.operators import LinearGaussian, matrix
from pyrodiff.inference.smc import Posterior, smc
from pyrodiff.likelihood.importance import effective_chains, pareto_k

F64 = torch.float64
STEPS, ENDS = 16, (-6.0, 6.0)
SHORT = 8  # steps of the chain where each draw is dear
L = 31  # draws that the truth is ranked among
PARTICLES = 1000
KNOWN, SEEN = 0.7, 2  # where the noise is known: its size, and how many rows of A are observed
WIDER = 1.4  # a guide to draw weighted particles from: the best one by KL(q || p) is too narrow for that
FALSE_ALARM = 0.01  # of a verdict, SBC's and TARP's together

Draws = dict[str, Tensor]


class Mixture(nn.Module):
    """E[x_0 | x_t] for a mixture of Gaussians, each N(mean, variance I)."""

    def __init__(self, weights: list[float], means: list[list[float]], variance: float) -> None:
        super().__init__()
        self.weights, self.means, self.variance = torch.tensor(weights).double(), torch.tensor(means).double(), variance
        self.like = nn.Parameter(torch.zeros((), dtype=F64), requires_grad=False)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        alpha, noise = log_snr.double().sigmoid().sqrt()[:, None], (-log_snr.double()).sigmoid()[:, None]
        total = alpha**2 * self.variance + noise
        off = x[:, None] - alpha[..., None] * self.means
        share = torch.softmax(self.weights.log() - off.square().sum(2) / (2 * total), 1)
        gain = alpha * self.variance / total
        return share @ self.means + gain * (x - alpha * (share @ self.means))

    def draw(self, n: int) -> Tensor:
        means = self.means[self.weights.multinomial(n, replacement=True)]
        return means + math.sqrt(self.variance) * torch.randn_like(means)


class Problem:
    def __init__(self, net: Mixture, a: list[list[float]]) -> None:
        self.net, self.a = net, torch.tensor(a).double()
        self.dims = self.a.shape[1]
        self.noise = dist.LogNormal(torch.tensor(-0.7, dtype=F64), 0.5)

        def diffusion(steps: float) -> GaussianDiffusion:
            schedule = LogLinearSchedule(steps, *ENDS)
            return GaussianDiffusion(net, schedule, (self.dims,), "x0", variance="fixed_large")

        self.diffusion = diffusion(STEPS)
        self.short = self.diffusion.respace(SHORT)
        self.chain, self.flow = DiffusionPrior(self.diffusion), DiffusionPrior(self.diffusion, "flow", steps=8)
        self.endless = DiffusionPrior(
            GaussianDiffusion(net, LogLinearSchedule(math.inf, -8.0, 8.0), (self.dims,), "x0")
        )

    def prior(self, law: str, n: int) -> Tensor:
        if law in ("chain", "short"):
            return sample(self.diffusion if law == "chain" else self.short, n, last="sample", batch_size=n)
        return self.net.draw(n) if law == "data" else self.flow.sample((n,))

    def log_likelihood(self, theta: Draws, y: Tensor) -> Tensor:
        sigma = theta.get("sigma", torch.tensor(KNOWN, dtype=F64))
        return dist.Normal(theta["x"] @ self.a[: y.shape[-1]].T, sigma[..., None]).log_prob(y).sum(-1)

    def simulate(self, law: str, n: int, noisy: bool) -> tuple[Draws, Tensor]:
        truth = {"x": self.prior(law, n)} | ({"sigma": self.noise.sample((n,))} if noisy else {})
        a, scale = (self.a, truth["sigma"][:, None]) if noisy else (self.a[:SEEN], KNOWN)
        return truth, truth["x"] @ a.T + scale * torch.randn(n, len(a), dtype=F64)

    def model(self, prior: DiffusionPrior) -> Callable[[Tensor], None]:
        """Of many observations, each with its own x and sigma."""

        def model(y: Tensor) -> None:
            with pyro.plate("problems", len(y), dim=-1):
                x = pyro.sample("x", prior)
                sigma = pyro.sample("sigma", self.noise)
                pyro.sample("y", dist.Normal(x @ self.a.T, sigma[..., None]).to_event(1), obs=y)

        return model


PROBLEMS = {
    "gaussian": lambda: Problem(
        Mixture([1.0], [[0.0] * 3], 1.0), [[1.0, 0.5, 0.0], [0.0, 1.0, -0.5], [0.5, 0.0, 1.0], [1.0, 1.0, 0.5]]
    ),
    "mixture": lambda: Problem(
        Mixture([0.5, 0.3, 0.2], [[-0.9, -0.4], [0.9, -0.4], [0.3, 1.2]], 0.1), [[1.0, 0.5], [0.0, 1.0], [1.0, -0.5]]
    ),
}


class Found(NamedTuple):
    draws: Draws  # [S, L, *shape]
    note: str = ""


# ---------------------------------------------------------------------- x alone


def each(problem: Problem, y: Tensor, run: Callable[[LinearGaussian], Posterior]) -> Found:
    """A posterior of x for each observation; L draws by weight."""
    found = [run(LinearGaussian(matrix(problem.a[:SEEN]), row, KNOWN)) for row in y]
    x = torch.stack([posterior.sample(L) for posterior in found])
    families = torch.cat([posterior.families for posterior in found])
    if families.isnan().all():
        return Found({"x": x})
    return Found({"x": x}, f"families {families.median():.0f} ({families.min():.0f} at the least)")


def particles(problem: Problem, y: Tensor, make: Callable[[LinearGaussian], dict]) -> Found:
    return each(problem, y, lambda seen: smc(problem.diffusion, seen, PARTICLES, batch_size=PARTICLES, **make(seen)))


def heuristic(problem: Problem, y: Tensor, make: Callable[[LinearGaussian], dict]) -> Found:
    return each(problem, y, lambda seen: guided(problem.diffusion, seen, L, **make(seen)))


# ---------------------------------------------------------------------- x and sigma


def full_rank(problem: Problem, y: Tensor) -> Callable[[Tensor], None]:
    """AutoMultivariateNormal's family for each problem by itself: (x, log sigma) ~ N(m, R R^T)."""
    n, size = len(y), problem.dims + 1

    def guide(y: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(n, size, dtype=F64))
        tril = pyro.param(
            "tril", 0.5 * torch.eye(size, dtype=F64).repeat(n, 1, 1), constraint=dist.constraints.lower_cholesky
        )
        with pyro.plate("problems", n, dim=-1):
            z = pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril), infer={"is_auxiliary": True})
            pyro.sample("x", dist.Delta(z[..., :-1], event_dim=1))
            pyro.sample("sigma", dist.Delta(z[..., -1].exp(), log_density=-z[..., -1]))

    return guide


def mean_field(problem: Problem, y: Tensor) -> AutoNormal:
    start = {"x": torch.zeros(len(y), problem.dims, dtype=F64), "sigma": torch.full((len(y),), 0.5, dtype=F64)}
    return AutoNormal(problem.model(problem.endless), init_loc_fn=init_to_value(values=start), init_scale=0.3)


def fit(model: Callable, guide: Callable, y: Tensor, steps: int, count: int, lr: float = 0.05) -> None:
    """Stock SVI; the observations' parameters are their own, so that one step is one of each."""
    optimiser = ClippedAdam({"lr": lr, "lrd": 0.01 ** (1 / steps)})
    svi = SVI(model, guide, optimiser, Trace_ELBO(num_particles=count, vectorize_particles=True, max_plate_nesting=1))
    for _ in range(steps):
        svi.step(y)


def weighted(model: Callable, guide: Callable, y: Tensor, count: int, at_once: int) -> tuple[Draws, Tensor]:
    """Draws of the guide, ``[S, K, *shape]``, and their log-weights, ``[S, K]``."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(count // at_once):
        with torch.no_grad(), pyro.plate("draws", at_once, dim=-2):
            q = poutine.trace(guide).get_trace(y)
            p = poutine.trace(poutine.replay(model, trace=q)).get_trace(y)
        total: Tensor = torch.zeros(at_once, len(y), dtype=F64)
        for trace, sign in ((p, 1), (q, -1)):
            trace.compute_log_prob()
            total = total + sign * sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site)
        parts.append((q.nodes["x"]["value"], q.nodes["sigma"]["value"], total))
    x, sigma, log_w = (torch.cat(z).transpose(0, 1) for z in zip(*parts, strict=True))
    return {"x": x, "sigma": sigma}, log_w


def variational(problem: Problem, y: Tensor, family: Callable, *, weights: bool = False, flow: bool = False) -> Found:
    """SVI under the bound, in continuous time; then under the flow's density too; or of the 16 steps, and the weights of whole chains."""
    pyro.clear_param_store()
    prior = problem.chain if weights else problem.endless
    model, guide = problem.model(prior), family(problem, y)
    fit(*bound(model, guide, {"x": prior}), y, steps=800, count=8)
    if flow:
        fit(problem.model(problem.flow), guide, y, steps=100, count=4, lr=0.01)
    if not weights:
        with torch.no_grad(), pyro.plate("draws", L, dim=-2):
            trace = poutine.trace(guide).get_trace(y)
        return Found({name: trace.nodes[name]["value"].transpose(0, 1) for name in ("x", "sigma")})
    pyro.get_param_store()["tril"] = WIDER * pyro.param("tril").detach()
    draws, log_w = weighted(*bound(model, guide, {"x": prior}, chain=True), y, PARTICLES, 100)
    chosen = log_w.softmax(1).multinomial(L, replacement=True)
    rows = torch.arange(len(y))[:, None]
    ess, k = effective_chains(log_w.mT), pareto_k(log_w.mT)
    note = f"effective {ess.median():.0f} ({ess.min():.0f} at the least), k-hat above 0.7 in {int((k > 0.7).sum())} of {len(y)}"
    return Found({name: value[rows, chosen] for name, value in draws.items()}, note)


def neighbours(x: Tensor) -> str:
    """The correlation of neighbouring draws, ``[S, L, d]``, about each chain's own mean, which makes it lower by about 1 / L."""
    x = x - x.mean(1, keepdim=True)
    found = (x[:, 1:] * x[:, :-1]).mean((0, 1)) / x.square().mean((0, 1)) + 1 / x.shape[1]
    return f"correlation of neighbours {float(found.max()):.2f} at the most"


def importance(problem: Problem, y: Tensor, count: int = 200_000) -> Found:
    """Draws of the flow's prior, the same for all observations, weighted by the likelihood: what NUTS aims at, without a chain."""
    with torch.no_grad():
        theta = {"x": problem.flow.sample((count,)), "sigma": problem.noise.sample((count,))}
    chosen, effective = [], []
    for row in y:
        w = problem.log_likelihood(theta, row).softmax(0)
        chosen.append(w.multinomial(L, replacement=True))
        effective.append(1 / w.square().sum())
    found, ess = torch.stack(chosen), torch.stack(effective)
    note = f"effective {ess.median():.0f} ({ess.min():.0f} at the least)"
    return Found({name: value[found] for name, value in theta.items()}, note)


def nuts(problem: Problem, y: Tensor, warmup: int = 200, thin: int = 12) -> Found:
    """One chain of all observations' unknowns together, in the noise of the flow."""
    pyro.clear_param_store()
    model = poutine.reparam(problem.model(problem.flow), {"x": FlowReparam()})
    start = {"x_T": torch.zeros(len(y), problem.dims, dtype=F64), "sigma": torch.full((len(y),), -0.7, dtype=F64)}
    kernel = NUTS(model, max_tree_depth=4, init_strategy=init_to_value(values=start | {"sigma": start["sigma"].exp()}))
    mcmc = MCMC(kernel, num_samples=L * thin, warmup_steps=warmup, disable_progbar=True)
    mcmc.run(y)
    found = {name: value[thin - 1 :: thin] for name, value in mcmc.get_samples().items()}
    draws = {"x": problem.flow.decode(found["x_T"]).transpose(0, 1), "sigma": found["sigma"].mT}
    return Found(draws, neighbours(torch.cat([draws["x"], draws["sigma"][..., None].log()], 2)))


def gibbs(
    problem: Problem, y: Tensor, proposal: str, particles: int, kept: int = 15, first: int = 8, thin: int = 3
) -> Found:
    xs, sigmas, moved = [], [], []
    for row in y:

        def program(x0: Tensor, row: Tensor = row) -> None:
            sigma = pyro.sample("sigma", problem.noise)
            pyro.sample("y", dist.Normal(x0 @ problem.a.T, sigma).to_event(1), obs=row)

        found = particle_gibbs(problem.short, program, first + kept * thin, particles=particles, proposal=proposal)
        rows = slice(first + thin - 1, None, thin)
        xs.append(found.x0[rows])
        sigmas.append(found.parameters["sigma"][rows])
        moved.append(found.moved)
    draws = {"x": torch.stack(xs), "sigma": torch.stack(sigmas)}
    told = neighbours(torch.cat([draws["x"], draws["sigma"][..., None].log()], 2))
    return Found(draws, f"{told}, x moved in {100 * sum(moved) / len(moved):.0f} % of sweeps")


# ---------------------------------------------------------------------- the table


class Method(NamedTuple):
    law: str
    noisy: bool
    run: Callable[[Problem, Tensor], Found]
    claim: str
    divide: int = 1  # of the number of simulations, where one is dear


def methods() -> dict[str, Method]:
    def known(run: Callable, claim: str, make: Callable[[LinearGaussian], dict]) -> Method:
        return Method("chain", False, functools.partial(run, make=make), claim)

    of = functools.partial
    consistent, approximate = "exact as N grows", "of its family"
    return {
        "the prior itself": Method(
            "chain", False, lambda p, y: Found({"x": p.prior("chain", len(y) * L).unflatten(0, (-1, L))}), "a control"
        ),
        "smc, bootstrap": known(particles, consistent, lambda seen: {"proposal": "bootstrap"}),
        "smc, twisted (TDS)": known(particles, consistent, lambda seen: {}),
        "smc, twisted, pigdm": known(particles, consistent, lambda seen: {"twist": pigdm(seen)}),
        "smc, twisted, mmps": known(particles, consistent, lambda seen: {"twist": mmps(seen)}),
        "smc, mcgdiff": known(particles, consistent, lambda seen: {"proposal": "mcgdiff"}),
        "smc, mcgdiff, data_std=1": known(particles, consistent, lambda seen: {"proposal": "mcgdiff", "data_std": 1.0}),
        "smc, replacement": known(particles, consistent, lambda seen: {"proposal": "replacement"}),
        "guided (DPS)": known(heuristic, "a heuristic", lambda seen: {}),
        "guided, pigdm": known(heuristic, "a heuristic", lambda seen: {"twist": pigdm(seen)}),
        "guided, mmps": known(heuristic, "a heuristic", lambda seen: {"twist": mmps(seen)}),
        "SVI, bound, AutoNormal": Method("data", True, of(variational, family=mean_field), approximate),
        "SVI, bound, full-rank Normal": Method("data", True, of(variational, family=full_rank), approximate),
        "the same, weighted, chain=True": Method(
            "chain", True, of(variational, family=full_rank, weights=True), consistent
        ),
        "SVI, flow, full-rank Normal": Method("flow", True, of(variational, family=full_rank, flow=True), approximate),
        "prior of the flow, weighted": Method("flow", True, importance, consistent),
        "NUTS, FlowReparam": Method("flow", True, nuts, "exact as the chain grows"),
        "particle Gibbs, bootstrap": Method(
            "short", True, of(gibbs, proposal="bootstrap", particles=24), "exact as the chain grows", 2
        ),
        "particle Gibbs, twisted": Method(
            "short", True, of(gibbs, proposal="twisted", particles=16), "exact as the chain grows", 2
        ),
    }


def judge(problem: Problem, method: Method, n: int, seed: int) -> str:
    torch.manual_seed(seed)
    pyro.set_rng_seed(seed)
    n //= method.divide
    truth, y = problem.simulate(method.law, n, method.noisy)
    started = time.process_time()
    found = method.run(problem, y)
    seconds = time.process_time() - started
    theirs = {"log p(y given x)": problem.log_likelihood(found.draws, y[:, None])}
    ranks = sbc(truth | {"log p(y given x)": problem.log_likelihood(truth, y)}, found.draws | theirs)
    estimate = {"x": y @ torch.linalg.pinv(problem.a[: y.shape[1]]).T + torch.randn_like(truth["x"])}
    if method.noisy:
        estimate["sigma"] = problem.noise.sample((n,))
    points = tarp(truth, found.draws, estimate)
    worst = ranks.names[int(ranks.p_values.argmin())]
    fails = min(ranks.p_value, points.p_value) < FALSE_ALARM / 2
    return (
        f"{method.law} | {'x, σ' if method.noisy else 'x'} | {method.claim} | {n} | {_p(ranks.p_value)} ({len(ranks.names)}; {worst}) | "
        f"{_p(points.p_value)} | {float(points.deviation):.3f} | {'**fails**' if fails else 'passes'} | {found.note} | {seconds:.0f}"
    )


def _p(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.0e}" if value > 1e-12 else "< 1e-12"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=[*PROBLEMS], action="append", help="default: both")
    parser.add_argument("--only", nargs="*", default=[""], help="methods whose names contain one of these")
    parser.add_argument("--simulations", type=int, default=400, help="half of them for particle Gibbs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(
        "| prior | method | law | unknown | claim | S | SBC p (of quantities; the least) | TARP p | off by | verdict | draws | CPU s |"
    )
    print("|" + "---|" * 12)
    for name in arguments.problem or PROBLEMS:
        for title, method in methods().items():
            if any(part in title for part in arguments.only):
                text = judge(PROBLEMS[name](), method, arguments.simulations, arguments.seed)
                print(f"| {name} | {title} | {text} |", flush=True)


if __name__ == "__main__":
    main()
