"""scaling.py - lectures 9 and 11: scaling laws. Small runs that predict the large one.

What   Train many small models, fit how the loss falls with parameters N and tokens D, and read off the model
       that a budget nobody can afford twice should buy: its size, its data, its loss, with intervals.
Why    The last run of a project costs as much as all before it together, and there is only one. Its size has
       to be chosen from runs a thousand times smaller. How the law is fitted decides how wrong one is: on
       runs of a known law, extrapolated two hundred times, taking the best run of each budget errs by 12%,
       a parabola by 3%, fitting the law by nothing; with noise of 0.2% typically by 28%, 4% and 2%.

Equations
       C        = 6 N D                                two FLOPs a weight and token forward, four backward
       L(N, D)  = E + A / N^alpha + B / D^beta         E: what no model removes; too small; too little data
       N*(C)    = G (C/6)^a,  D* = C / (6 N*)          a = beta / (alpha + beta)
       G        = (alpha A / (beta B))^(1 / (alpha + beta))
       fit      = argmin sum huber(log L(N, D) - log L_run)      by variable projection, then damped Newton
       muP      hidden and output weights: Adam's rate x base/width, so that the best rate holds at any width
       batch      (steps/S_min - 1)(examples/E_min - 1) = 1,  B_crit = E_min/S_min ~ tr(cov)/|gradient|^2

Run    python scaling.py                       # the lecture: planted laws, real runs, a checked prediction
       python scaling.py fit runs.json         # a table of runs -> law, optimum at any --flops, curves
       python scaling.py study --minutes 30    # train.py on 4 budgets; predict one 8 times larger; train it
       python scaling.py plan --flops 1e21 --gpu h100 --count 8
       python scaling.py mup                   # the best learning rate against width, standard and muP
       python scaling.py noise                 # critical batch size: predicted and measured
       python scaling.py api --parameters 1e7 --flops 1e17     # the assignment's training API, on a simulator

You should see (two cores, CPU)
       noise   argmin  parabola  the law  its 90% interval                a
       0.0%     12.2%      3.0%     0.0%    -0.0% to +0.0%  0.4516 ± 0.0000
       0.2%     28.3%      4.1%     2.3%    -4.1% to +4.9%  0.4521 ± 0.0024
       1.0%     53.7%     16.3%    12.2%  -18.3% to +27.0%  0.4542 ± 0.0121
       FLOPs      loss by size, nats a byte  N*, parabola  N*, law  loss there
       1e+09  2.87 2.83 2.83 2.83 2.87 2.93         6,936    6,710       2.824
       3e+09  2.59 2.51 2.48 2.53 2.58 2.65         9,476    9,444       2.501
       1e+10  2.35 2.33 2.30 2.28 2.33 2.34        15,206   13,737       2.302
       3e+10 FLOPs, width 56: predicted 2.129 (the curve's 90%: 2.104 to 2.163) | trained 2.100 | +1.4%

Outline  1 the law and its optimum   2 runs, checked   3 IsoFLOP: minima and power laws   4 fitting the law
         5 intervals   6 a training API with a budget   7 real runs in seconds   8 the learning rate: muP
         9 the batch size   10 the study   11 planning and the demo   12 the command line

References  Kaplan et al. 2020 (power laws), McCandlish et al. 2018 (critical batch), Hoffmann et al. 2022
            (Chinchilla), Besiroglu et al. 2024 (its replication), Pearce & Song 2024 (Kaplan against
            Chinchilla), Yang et al. 2022 (muP), Schaeffer et al. 2023 (emergence), Golub & Pereyra 1973
            (variable projection), Huber 1964.
"""
import contextlib
import csv
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import astuple, dataclass
from pathlib import Path

import bpe
import model as M                                          # before torch: it sets how CPU threads wait

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# N parameters, D training tokens, C FLOPs, L loss in nats a token; n runs, S starts or replicas.
# E_min, S_min: the fewest examples and steps to a loss, unrelated to E and S above.


# --- 1. the law and its optimum -----------------------------------------------------------------------------

@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, approach 3)."""
    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, N, D):
        return self.E + self.A / N**self.alpha + self.B / D**self.beta

    @property
    def exponent(self):
        """a in N* ~ C^a. One half if more parameters and more data help alike."""
        return self.beta / (self.alpha + self.beta)

    def optimum(self, C):
        """C FLOPs -> (N*, D*) of least loss. Put D = C/6N into L and set dL/dN = 0:
        alpha A / N^alpha = beta B / D^beta: both terms fall at the same rate. NaN if one of them rises."""
        if min(self.alpha, self.beta) <= 0:
            return math.nan, math.nan
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        N = G * (C / 6) ** self.exponent
        return N, C / 6 / N


LAWS = {  # published constants; they hold for their authors' data and tokenizers
    "hoffmann": Law(1.69, 406.4, 0.34, 410.7, 0.28),             # as printed; the rounding alone biases it
    "besiroglu": Law(1.8172, 482.01, 0.3478, 2085.43, 0.3658),   # refitted to the points of their figure
}


# --- 2. runs, checked ---------------------------------------------------------------------------------------

COLUMNS = {"N": ("parameters", "N", "params"), "C": ("compute_budget", "flops", "C"), "D": ("tokens", "D"),
           "L": ("final_loss", "loss", "L")}


def read_runs(path):
    """A JSON list of {"parameters", "compute_budget" or "tokens", "final_loss"}, or a CSV with these columns
    -> [{N, C, D, L}]. ValueError names the row that is odd."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; make one with  python scaling.py study, or give a "
                                f'JSON list of {{"parameters", "compute_budget", "final_loss"}}')
    try:
        text = path.read_text("utf-8")
        rows = list(csv.DictReader(text.splitlines())) if path.suffix == ".csv" else json.loads(text)
    except ValueError as e:
        raise ValueError(f"{path}: neither JSON nor CSV ({M.first_line(e)})") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: holds a {type(rows).__name__}, not a list of runs")
    return [read_run(row, f"{path}: run {i}") for i, row in enumerate(rows, 1)]


def read_run(row, where):
    try:
        run = {name: next((float(row[k]) for k in keys if k in row), None) for name, keys in COLUMNS.items()}
    except (TypeError, ValueError):
        raise ValueError(f"{where} is {str(row)[:100]}: give numbers for parameters, compute_budget (or "
                         f"tokens) and final_loss") from None
    N, C, D, L = (run[k] for k in "NCDL")
    if N is None or L is None or (C is None and D is None):
        raise ValueError(f"{where} lacks parameters, final_loss, or both of compute_budget and tokens: "
                         f"{str(row)[:100]}")
    for name, value in run.items():
        if value is not None and name != "L" and not 0 < value < math.inf:
            raise ValueError(f"{where}: {COLUMNS[name][0]} {value:g} must be positive")
    run["C"], run["D"] = C or 6 * N * D, D or C / 6 / N
    return run


def clean(runs):
    """Runs fit to be fitted -> (runs sorted by budget and size, what was left out and why, one line each).
    A diverged run is no point of the law; of two equal runs with different losses nobody knows which is true:
    the mean is kept and the difference is told, since it is the noise."""
    kept, notes = {}, []
    for run in runs:
        if not math.isfinite(run["L"]) or run["L"] <= 0:
            notes.append(f"left out: N={run['N']:.3g}, C={run['C']:.3g} has loss {run['L']}")
            continue
        kept.setdefault((float(f"{run['C']:.6g}"), float(f"{run['N']:.6g}")), []).append(run)
    for (C, N), same in kept.items():
        losses = [r["L"] for r in same]
        if len(same) > 1:
            spread = max(losses) - min(losses)
            notes.append(f"{len(same)} runs of N={N:.3g}, C={C:.3g}: their mean, losses {spread:.4g} apart")
    merged = [{**same[0], "L": sum(r["L"] for r in same) / len(same)} for same in kept.values()]
    return sorted(merged, key=lambda r: (r["C"], r["N"])), notes


def columns(runs):
    return tuple(np.array([r[k] for r in runs]) for k in "NCDL")


# --- 3. IsoFLOP curves: the best size of each budget, then a power law --------------------------------------

def by_budget(runs):
    """[(C, runs by size)]: budgets within 1% of each other are one, since steps are whole."""
    groups = []
    for run in sorted(runs, key=lambda r: r["C"]):
        if groups and run["C"] < 1.01 * groups[-1][0]:
            groups[-1][1].append(run)
        else:
            groups.append((run["C"], [run]))
    return [(C, sorted(group, key=lambda r: r["N"])) for C, group in groups]


def isoflop_minima(runs, how="parabola"):
    """Each budget's best size -> [{C, N, L, note}]; N is NaN where the curve shows no minimum.

    how="argmin"     the best run (what is usually done first): off by up to the grid's spacing
    how="parabola"   vertex of a parabola through loss against log N (Hoffmann et al., approach 2): a few
                     percent, since the true curve is no parabola and its two sides differ in steepness
    """
    minima = []
    for C, group in by_budget(runs):
        N, _, _, L = columns(group)
        size, loss, note = N[L.argmin()], L.min(), ""
        if size in (N.min(), N.max()):
            note = "the best run is at the edge of its sizes: add smaller or larger ones"
        if how == "parabola":
            size, loss, wrong = parabola_minimum(np.log(N), L)
            note = wrong or note
        minima.append({"C": C, "N": float(size), "L": float(loss), "note": note})
    return minima


def parabola_minimum(x, y):
    """Least squares y = a x^2 + b x + c -> (exp of its vertex, y there, what is wrong with it or "")."""
    if len(set(x)) < 3:
        return math.nan, math.nan, f"{len(set(x))} size(s), too few for a parabola"
    centre = x.mean()
    a, b, c = np.polyfit(x - centre, y, 2)
    flat = a * np.ptp(x)**2 <= 1e-9 * np.abs(y).max()      # or downward: then its vertex is the worst size
    vertex = math.nan if flat else centre - b / (2 * a)
    if not x.min() <= vertex <= x.max():                   # NaN, too
        return math.nan, math.nan, "no minimum within its sizes: add smaller or larger ones"
    return math.exp(vertex), c - b * b / (4 * a), ""


def curve_minima(curves, budgets):
    """Hoffmann's approach 1. curves: [(N, losses {FLOPs: loss} while training)] -> [(C, N)]: at each budget
    the run that is best there. One run serves many budgets, but only with a learning rate that does not
    decay towards an end it has not reached; else every intermediate loss is too high."""
    found = []
    for C in budgets:
        at = [(loss, N) for N, curve in curves if (loss := interpolate(curve, C)) is not None]
        if len(at) > 1:
            found.append((C, min(at)[1]))
    return found


def interpolate(curve, C):
    """Loss at C FLOPs, on straight lines in log C; None outside the curve."""
    x, y = zip(*sorted(curve.items()))
    return float(np.interp(math.log(C), np.log(x), y)) if x[0] <= C <= x[-1] else None


def power_law(x, y):
    """(k, a) of y = k x^a by least squares in logarithms: relative errors count alike at every scale. In
    linear space the largest run alone would decide."""
    x, y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    ok = np.isfinite(x) & np.isfinite(y)
    if ok.sum() < 2:
        raise ValueError(f"{ok.sum()} usable point(s), too few for a power law: "
                         f"2 or more budgets with a minimum")
    a, b = np.polyfit(x[ok], y[ok], 1)
    return float(np.exp(b)), float(a)


def extrapolate_minima(runs, C, how="parabola"):
    """N*(C) by a power law through the budgets' minima. ValueError: fewer than two have one."""
    minima = isoflop_minima(runs, how)
    k, a = power_law([m["C"] for m in minima], [m["N"] for m in minima])
    return k * C**a


# --- 4. fitting the law itself ------------------------------------------------------------------------------
# theta = (log E, log A, log B, alpha, beta); A and B at the middle of the runs: x and y below are log N and
# log D less their means. Uncentred, A and alpha are nearly one parameter, and every solver crawls.

def predict(theta, x, y):
    """theta (S,5), x and y (n,) -> log L (S,n) and the shares of its three terms (S,n,3).
    log-sum-exp of three straight lines: nothing overflows, and E, A, B stay positive by themselves."""
    e, a, b, alpha, beta = (theta[:, i, None] for i in range(5))
    terms = np.stack(np.broadcast_arrays(e, a - alpha * x, b - beta * y), -1)          # (S,n,3) logs of terms
    top = terms.max(-1, keepdims=True)
    parts = np.exp(terms - top)
    total = parts.sum(-1, keepdims=True)
    return (top + np.log(total))[..., 0], parts / total


def huber(r, delta):
    """Squares for |r| < delta, straight lines beyond: a run gone wrong pulls, but not with its square."""
    size = np.abs(r)
    return np.where(size < delta, r * r / 2, delta * (size - delta / 2))


def project(x, y, L, rounds=6, grid=24):
    """Variable projection (Golub & Pereyra 1973): with alpha and beta given, E, A, B are a linear
    least-squares problem. So search two numbers, not five, on a grid that narrows: no start to guess.
    -> theta (5,)"""
    low, high = np.array([0.02, 0.02]), np.array([2.0, 2.0])
    for _ in range(rounds):
        alpha, beta = np.meshgrid(*np.linspace(low, high, grid).T, indexing="ij")
        # (g,g,n,3): the three terms of every run relative to its loss; their sum should be 1
        basis = np.stack(np.broadcast_arrays(np.ones_like(x), np.exp(-alpha[..., None] * x),
                                             np.exp(-beta[..., None] * y)), -1) / L[:, None]
        normal = np.einsum("ghni,ghnj->ghij", basis, basis) + 1e-12 * np.eye(3)
        c = np.linalg.solve(normal, basis.sum(-2)[..., None])[..., 0]                        # (g,g,3)
        cost = np.square(np.einsum("ghni,ghi->ghn", basis, c) - 1).sum(-1)
        cost[(c <= 0).any(-1)] = np.inf                    # a negative term is no law
        if not np.isfinite(cost).any():
            raise ValueError("no law E + A/N^alpha + B/D^beta with positive terms fits these runs: they need "
                             "sizes on both sides of the best one, at 3 or more budgets")
        i, j = np.unravel_index(cost.argmin(), cost.shape)
        best = np.array([alpha[i, j], beta[i, j]])
        step = (high - low) / (grid - 1)
        low, high = np.maximum(best - 1.5 * step, 1e-3), best + 1.5 * step
    return np.concatenate([np.log(c[i, j]), best])


def refine(theta, x, y, logL, delta=1e-3, steps=300, tolerance=1e-13):
    """Minimise the summed Huber loss from each start: theta (S,5), logL (n,) or (S,n) -> (theta, cost (S,)).

    Levenberg-Marquardt: with weight w = min(1, delta/|r|) the Huber loss is locally a weighted least-squares
    problem whose normal equations are 5 x 5; the damping grows where a step does not help. The papers run
    L-BFGS from each start in turn; here all starts (or all bootstrap replicas) step together.
    """
    theta = np.array(theta, float)
    damping = np.full(len(theta), 1e-3)
    value, share = predict(theta, x, y)
    r = value - logL
    cost = huber(r, delta).sum(-1)
    live = np.arange(len(theta))                           # starts that still move
    for _ in range(steps):
        w, p = np.minimum(1, delta / np.maximum(np.abs(r[live]), 1e-300)), share[live]
        J = np.stack([p[..., 0], p[..., 1], p[..., 2], -p[..., 1] * x, -p[..., 2] * y], -1)      # (s,n,5)
        Jw = (J * w[..., None]).swapaxes(1, 2)                                                   # (s,5,n)
        H, g = Jw @ J, (Jw @ r[live][..., None])[..., 0]
        scale = np.einsum("sii->si", H)
        step = np.linalg.solve(H + (damping[live, None] * scale + 1e-14)[..., None] * np.eye(5), g[..., None])
        new = theta[live] - step[..., 0]
        new_value, new_share = predict(new, x, y)
        new_r = new_value - (logL if np.ndim(logL) == 1 else logL[live])
        new_cost = huber(new_r, delta).sum(-1)
        better = new_cost < cost[live]
        gain = np.where(better, cost[live] - new_cost, 0)
        move = live[better]
        theta[move], cost[move] = new[better], new_cost[better]
        r[move], share[move] = new_r[better], new_share[better]
        damping[live] = np.where(better, damping[live] / 3, damping[live] * 4)
        done = (better & (gain <= tolerance * cost[live] + 1e-26)) | (damping[live] > 1e12)
        live = live[~done]
        if not len(live):
            break
    return theta, cost


@dataclass
class Fit:
    law: Law
    theta: np.ndarray                                      # (5,), centred
    centre: tuple                                          # mean log N, mean log D
    residuals: np.ndarray                                  # (n,) log L(N, D) - log L_run
    cost: float
    delta: float


def as_law(theta, centre):
    e, a, b, alpha, beta = (float(v) for v in theta)
    return Law(math.exp(e), math.exp(min(700, a + alpha * centre[0])), alpha,
               math.exp(min(700, b + beta * centre[1])), beta)


def fit_chinchilla(N, D, L, delta=None, starts=()):
    """(n,) parameters, tokens, losses -> Fit. starts: further starting points (S,5); the lowest end wins.

    delta: where squares end. Hoffmann et al. fix 1e-3, which reproduces their figures; None is twice the
    standard deviation of the noise at hand (Huber 1964: nearly least squares' precision if the noise is
    normal, and wild runs still cannot pull), not below 1e-3.
    """
    N, D, L = (np.asarray(v, float) for v in (N, D, L))
    if len(N) < 6 or len(set(N)) < 3 or len(set(D)) < 3:
        raise ValueError(f"{len(N)} run(s) of {len(set(N))} size(s) and {len(set(D))} token count(s), "
                         f"too few for five constants: 6 or more runs, 3 or more of each")
    centre = float(np.log(N).mean()), float(np.log(D).mean())
    x, y = np.log(N) - centre[0], np.log(D) - centre[1]
    first = [project(x, y, L), *starts]
    if delta is None:
        first, _ = refine(first, x, y, np.log(L), 1e-3)
        noise = 1.4826 * np.median(np.abs(predict(first[:1], x, y)[0][0] - np.log(L)))      # robust sd
        delta = max(1e-3, 2 * float(noise))
    theta, cost = refine(first, x, y, np.log(L), delta)
    best = int(cost.argmin())
    if min(theta[best, 3:]) <= 0:
        raise ValueError(f"the best fit has alpha {theta[best, 3]:.3g}, beta {theta[best, 4]:.3g}: a loss "
                         f"that rises is no law; add runs on both sides of each budget's best size")
    residuals = predict(theta[best:best + 1], x, y)[0][0] - np.log(L)
    return Fit(as_law(theta[best], centre), theta[best], centre, residuals, float(cost[best]), delta)


# --- 5. intervals -------------------------------------------------------------------------------------------

def bootstrap(fit, N, D, replicas=200, seed=0):
    """Laws fitted to replicas of the runs: the fitted curve plus residuals drawn from the fit's own, scaled
    by sqrt(n / (n-5)) since five constants have already bent towards them. -> [Law]"""
    rng, n = np.random.default_rng(seed), len(N)
    x, y = np.log(N) - fit.centre[0], np.log(D) - fit.centre[1]
    noise = rng.choice(fit.residuals - np.median(fit.residuals), (replicas, n)) * math.sqrt(n / max(1, n - 5))
    clean_curve = predict(fit.theta[None], x, y)[0]
    start = np.repeat(fit.theta[None], replicas, 0)
    theta, _ = refine(start, x, y, clean_curve + noise, fit.delta, 100, 1e-6)
    return [as_law(t, fit.centre) for t in theta]


def fit_runs(runs):
    """-> (Fit, its bootstrapped Laws)"""
    N, _, D, L = columns(runs)
    fit = fit_chinchilla(N, D, L)
    return fit, bootstrap(fit, N, D)


def interval(values, level=0.9):
    """The middle `level` of the values that are numbers: (low, high)."""
    numbers = [float(v) for v in values if not math.isnan(v)] or [math.nan]
    low, high = np.quantile(numbers, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def band(values, form=".3g"):
    """The 90% interval as text."""
    low, high = interval(values)
    return f"{low:{form}} to {high:{form}}"


def bootstrap_minima(runs, C, replicas=200, seed=0):
    """N*(C) by parabolas and a power law, residuals redrawn within each budget: many values, or a NaN."""
    rng, sizes, groups = np.random.default_rng(seed), [], by_budget(runs)
    for _ in range(replicas):
        drawn = []
        for _, group in groups:
            N, _, _, L = columns(group)
            p = np.polynomial.Polynomial.fit(np.log(N), L, min(2, len(N) - 1))
            noise = (L - p(np.log(N))) * math.sqrt(len(N) / max(1, len(N) - 3))
            drawn += [{**r, "L": float(v)} for r, v in zip(group, p(np.log(N)) + rng.choice(noise, len(N)))]
        with contextlib.suppress(ValueError):              # too few budgets had a minimum this time
            sizes.append(extrapolate_minima(drawn, C))
    return sizes if len(sizes) > replicas // 2 else [math.nan]


def non_embedding_exponent(law, sizes=(768, 1.5e9)):
    """Why Kaplan found N* ~ C^0.73 and Chinchilla C^0.50 (Pearce & Song 2024): Kaplan counted parameters, and
    FLOPs, without embeddings, and small models are mostly embedding. Total = N + 47491 N^(1/3) (their fit of
    the usual shapes). With FLOPs counted the same way, 6 N D, the best size follows N ~ C^exponent from 768
    to 1.5 billion, Kaplan's range."""
    N = np.geomspace(sizes[0] / 10, sizes[1] * 10, 4000)
    total, best = N + 47491 * N ** (1 / 3), []
    for C in np.geomspace(1e12, 1e24, 400):
        i = law.loss(total, C / 6 / N).argmin()
        if sizes[0] <= N[i] <= sizes[1]:
            best.append((C, N[i]))
    return power_law(*zip(*best))[1]


# --- 6. a training API with a budget ------------------------------------------------------------------------

class TrainingAPI:
    """submit(config, reserve) -> job, as the assignment's server has it: every run costs, the budget ends.

    A job reserves what it may cost at most, runs, and gets back what it did not use; one that cost more is
    charged its whole reservation, and its losses are no result. A config submitted again is answered
    from the ledger for nothing. Every change of state is one line of a JSONL file, on the disk before the run
    starts: after a restart the ledger is the truth, and a job cut off by a crash is failed and refunded.
    run: function (config, limit) -> {"loss": float, "cost": float, ...}. Costs in any unit: FLOPs or seconds.
    """

    def __init__(self, ledger, budget, run):
        self.path, self.total, self.run, self.jobs = Path(ledger), float(budget), run, {}
        if not 0 < self.total < math.inf:
            raise ValueError(f"budget {budget} must be positive")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            for line in self.path.read_text("utf-8").splitlines():
                with contextlib.suppress(ValueError):      # a line cut by a crash: the one before it holds
                    job = json.loads(line)
                    if isinstance(job, dict) and {"id", "config", "state", "cost", "reserve"} <= job.keys():
                        self.jobs[job["id"]] = job         # the last line about a job holds
            if self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n"):
                with open(self.path, "a") as f:
                    f.write("\n")
        for job in list(self.jobs.values()):
            if job["state"] in ("queued", "running"):
                self._record(job, state="failed", cost=0.0, error="cut off by a restart")

    def _record(self, job, **change):
        job.update(change)
        self.jobs[job["id"]] = job
        with open(self.path, "a") as f:
            f.write(json.dumps(job) + "\n")
            f.flush()
            os.fsync(f.fileno())
        return job

    def budget(self):
        """{total, spent, reserved, left}"""
        spent = sum(j["cost"] for j in self.jobs.values() if j["state"] in ("completed", "failed"))
        reserved = sum(j["reserve"] for j in self.jobs.values() if j["state"] in ("queued", "running"))
        left = self.total - spent - reserved
        return {"total": self.total, "spent": spent, "reserved": reserved, "left": left}

    def submit(self, config, reserve):
        """Run it now -> the job {id, config, state, cost, loss or error, ...}. ValueError: over budget."""
        key = json.dumps(config, sort_keys=True)
        for job in self.jobs.values():
            if json.dumps(job["config"], sort_keys=True) == key and job["state"] != "failed":
                return {**job, "duplicate": True}
        left = self.budget()["left"]
        if not 0 < reserve <= left:
            raise ValueError(f"a reservation of {reserve:.3g} is not within the {left:.3g} left of "
                             f"{self.total:.3g}: submit a smaller run")
        job = {"id": max(self.jobs, default=0) + 1, "config": config, "reserve": float(reserve), "cost": 0.0}
        self._record(job, state="queued")
        self._record(job, state="running")
        try:
            result = self.run(config, reserve)
        except Exception as e:                             # whatever a run does wrong, the ledger stays right
            return self._record(job, state="failed", cost=0.0, error=M.first_line(e))
        except BaseException:                              # Ctrl-C: say it, then go
            self._record(job, state="failed", cost=0.0, error="interrupted")
            raise
        if not result["cost"] <= reserve:
            return self._record(job, state="failed", cost=float(reserve), error="over its reservation")
        if not math.isfinite(result["loss"]):
            return self._record(job, state="failed", cost=result["cost"], error=f"loss {result['loss']}")
        return self._record(job, state="completed", **result)

    def final_submission(self, config, predicted_loss):
        """What the leaderboard sees: the config, the prediction, and the runs that led to it."""
        used = [j["id"] for j in self.jobs.values() if j["state"] == "completed"]
        return {"config": config, "predicted_final_loss": predicted_loss, "runs": used, **self.budget()}


def simulator(law=LAWS["besiroglu"], noise=0.002, seed=0):
    """A backend without a GPU: the loss of {"parameters", "tokens"} by a law that the player does not see,
    with seeded log-normal noise, at 6 N D FLOPs."""
    def run(config, limit):
        N, D = float(config["parameters"]), float(config["tokens"])
        rng = np.random.default_rng([seed, round(1e6 * math.log(N)), round(1e6 * math.log(D))])
        return {"loss": law.loss(N, D) * math.exp(noise * rng.standard_normal()), "cost": 6 * N * D}
    return run


def train_backend(data, out, flags=()):
    """A backend of real runs: config = flags of train.py with "tokens" -> held-out loss, FLOPs, seconds.
    Each run is a process of its own, so that a crash of one is one failed job."""
    script, env = Path(__file__).resolve().parent / "train.py", {**os.environ, "PYTHONHASHSEED": "0"}

    def run(config, limit):
        name = "-".join(str(v) for v in config.values())
        folder = Path(out, name)
        argv = [sys.executable, str(script), "--data", str(data), "--out", str(folder), "--evals", "0",
                *map(str, flags), *(str(w) for k, v in config.items() for w in (f"--{k}", v))]
        began = time.perf_counter()
        done = subprocess.run(argv, capture_output=True, text=True, env=env)
        if done.returncode:
            said = (done.stderr or done.stdout).strip()[-200:]
            raise RuntimeError(f"train.py ended with {done.returncode}: {said}")
        records = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
        last = [r for r in records if r["kind"] == "val"][-1]
        for file in ("checkpoint.pt", "loss.png"):         # 40 runs would keep 40 optimizers
            Path(folder, file).unlink(missing_ok=True)
        c = study_config(config)
        per_token = 3 * sum(M.flops_per_token(c).values())
        return {"loss": last["val_loss"], "cost": per_token * last["tokens"], "tokens": last["tokens"],
                "parameters": per_token / 6, "seconds": time.perf_counter() - began}
    return run


# --- 7. real runs in seconds --------------------------------------------------------------------------------
# A whole IsoFLOP study needs dozens of runs. This smallest of language models (Bengio et al. 2003: the last 8
# bytes, an embedding of 16, two hidden layers) makes one in a second, and its curves have the same shape.

class TinyLM(nn.Module):
    """8 bytes (B,8) -> logits of the next one (B,128).      params 2048 + 128 W + W^2 + 128 W"""
    CONTEXT, EMBED, V = 8, 16, 128
    BASE = 64                                              # up to this width muP and the standard agree

    def __init__(self, width, mup=True):
        super().__init__()
        self.width, self.mup = width, mup
        self.embedding = M.Embedding(self.V, self.EMBED)
        self.first = M.Linear(self.CONTEXT * self.EMBED, width)
        self.hidden = M.Linear(width, width)
        self.head = M.Linear(width, self.V)
        with torch.no_grad():
            for layer in (self.first, self.hidden):        # variance 2/fan-in keeps the output's size
                layer.weight.normal_(0, math.sqrt(2 / layer.weight.shape[1]))
            # Standard: 1/sqrt(fan-in). muP: 1/fan-in, so that the logits of a wide model are no larger once
            # its features have begun to line up with the head.
            self.head.weight.normal_(0, width**-0.5 * (math.sqrt(min(1, self.BASE / width)) if mup else 1))

    def features(self, x):
        h = F.silu(self.first(self.embedding(x).flatten(-2)))                              # (B,W)
        return F.silu(self.hidden(h))

    def forward(self, x):
        return self.head(self.features(x))

    def groups(self, lr):
        """Adam's step is lr whatever the gradient. A matrix of fan-in W adds up W such steps, which point the
        same way: the change of its output grows with W unless lr falls as 1/W (Yang et al., table 3)."""
        narrow = lr * (min(1, self.BASE / self.width) if self.mup else 1)
        return [{"params": [self.embedding.weight, self.first.weight], "peak": lr},
                {"params": [self.hidden.weight, self.head.weight], "peak": narrow}]


def tiny_params(width):
    """All of them, the embedding's too: C = 6 N D as Hoffmann et al. count it."""
    return TinyLM.V * TinyLM.EMBED + 2 * TinyLM.V * width + width * width


def tiny_text(limit=3_000_000):
    """(train, val) uint8 tensors: the embedded corpus, every byte above 127 a question mark."""
    parts = []
    for files, size in zip(bpe.split_files(bpe.corpus_files()), (limit, limit // 10)):
        data = np.frombuffer(b"".join(f.read_bytes() for f in files)[:size], np.uint8).copy()
        data[data > 127] = ord("?")
        parts.append(torch.from_numpy(data))
    return parts


def tiny_batch(text, at):
    """Positions (B,) -> the 8 bytes from there (B,8) and the one after them (B,)."""
    window = at[:, None] + torch.arange(TinyLM.CONTEXT + 1)
    ids = text[window].long()
    return ids[:, :-1], ids[:, -1]


def tiny_run(width, examples, text, lr=2**-6, mup=True, batch=64, seed=0, target=None):
    """Train on `examples` bytes -> (held-out loss in nats a byte, model, steps). target: stop at this loss of
    the running mean; steps is None if it was not reached."""
    torch.manual_seed(seed)
    net, g = TinyLM(width, mup), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.groups(lr), lr=lr, betas=(0.9, 0.99), fused=True)
    steps, mean = max(1, examples // batch), None
    for step in range(steps):
        done = (step + 1) / steps
        for group in optimizer.param_groups:               # a short rise, then a line down to 0
            group["lr"] = group["peak"] * min(1, 20 * done) * (1 if target else 1 - done + 1 / steps)
        x, y = tiny_batch(text[0], torch.randint(len(text[0]) - 9, (batch,), generator=g))
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if target:
            weight = min(0.05, batch / 2048)               # the last 2,048 examples or 20 steps
            mean = loss.item() if mean is None else mean + weight * (loss.item() - mean)
            if mean < target:
                return mean, net, step + 1
    return tiny_loss(net, text[1]), net, None if target else steps


@torch.no_grad()
def tiny_loss(net, val, examples=20_000):
    x, y = tiny_batch(val, torch.linspace(0, len(val) - 10, examples).long())
    return F.cross_entropy(net(x), y).item()


def tiny_isoflop(budgets, widths, text, seeds=2):
    """Real runs of every width at every budget -> [{N, C, D, L}], L the mean of the seeds: one seed alone
    moves a loss by 0.03, as much as half the height of these curves."""
    runs = []
    for C, group in zip(budgets, widths):
        for width in group:
            N = tiny_params(width)
            D = int(C / 6 / N)
            losses = [tiny_run(width, D, text, seed=s)[0] for s in range(seeds)]
            runs.append({"N": N, "C": 6 * N * D, "D": D, "L": sum(losses) / seeds})
    return runs


# --- 8. the learning rate against width ---------------------------------------------------------------------

def learning_rate_table(text, widths=(64, 256), rates=range(-11, -2), steps=150, seeds=1):
    """{(width, muP?): {log2 rate: loss}}"""
    return {(width, mup): {k: float(np.mean([tiny_run(width, 64 * steps, text, 2.0**k, mup, 64, s)[0]
                                             for s in range(seeds)])) for k in rates}
            for mup in (False, True) for width in widths}


def coordinate_check(text, widths=(64, 128, 256, 512, 1024), steps=5, lr=2**-7, seeds=3):
    """{muP?: slope of log|logits| against log width after a few steps}. Near 0: every width starts to learn
    the same function at the same speed, which is what lets a learning rate be carried over."""
    slopes = {}
    for mup in (False, True):
        sizes = []
        for width in widths:
            nets = [tiny_run(width, 64 * steps, text, lr, mup, 64, s)[1] for s in range(seeds)]
            x, _ = tiny_batch(text[1], torch.arange(0, 20_000, 40))
            with torch.no_grad():
                sizes.append(np.mean([net(x).abs().mean().item() for net in nets]))
        slopes[mup] = power_law(widths, sizes)[1]
    return slopes


def show_mup(args):
    text = tiny_text()
    table = learning_rate_table(text, tuple(args.widths), seeds=args.seeds)
    rates = sorted(next(iter(table.values())))
    rows = []
    for (width, mup), losses in table.items():
        best = min(losses, key=losses.get)
        rows.append([f"{'muP' if mup else 'standard'}, width {width}", *(f"{losses[k]:.3f}" for k in rates),
                     f"2^{best}"])
    M.table(f"Held-out loss, nats a byte, after 150 steps of 64, by learning rate ({args.seeds} seeds)",
            ["", *(f"2^{k}" for k in rates), "best"], rows)
    slopes = coordinate_check(text)
    print(f"\nCoordinate check: |logits| after 5 steps grows as width^{slopes[False]:+.2f} in the standard "
          f"parametrisation, width^{slopes[True]:+.2f} in muP")


# --- 9. the batch size --------------------------------------------------------------------------------------

def noise_scale(small_sq, big_sq, b_small, b_big):
    """tr(cov of one example's gradient) / |mean gradient|^2 from the mean squared norms of gradients at two
    batch sizes (McCandlish et al. 2018): E|g_B|^2 = |G|^2 + tr(cov)/B, twice, solved for both. Average the
    squared norms over many steps first: a mean of ratios is biased."""
    g_sq = (b_big * big_sq - b_small * small_sq) / (b_big - b_small)
    trace = (small_sq - big_sq) / (1 / b_small - 1 / b_big)
    return trace / g_sq if g_sq > 0 else math.inf


def measured_noise(net, text, b_small=16, b_big=1024, draws=40, seed=0):
    """The noise scale of a model where it stands, in examples."""
    g, sums = torch.Generator().manual_seed(seed), [0.0, 0.0]
    for _ in range(draws):
        for i, size in enumerate((b_small, b_big)):
            x, y = tiny_batch(text[0], torch.randint(len(text[0]) - 9, (size,), generator=g))
            grads = torch.autograd.grad(F.cross_entropy(net(x), y), net.parameters())
            sums[i] += sum(v.square().sum().item() for v in grads) / draws
    return noise_scale(*sums, b_small, b_big)


def critical_batch(batches, steps):
    """Steps S to one loss at several batch sizes B -> (S_min, E_min, B_crit) of  S = S_min + E_min / B, which
    is (steps/S_min - 1)(examples/E_min - 1) = 1. Least squares on relative errors."""
    B, S = np.asarray(batches, float), np.asarray(steps, float)
    X = np.stack([np.ones_like(B), 1 / B], 1) / S[:, None]
    (s_min, e_min), *_ = np.linalg.lstsq(X, np.ones_like(S), rcond=None)
    return float(s_min), float(e_min), float(e_min / s_min) if s_min > 0 else math.inf


def show_noise(args):
    """Both ways to the critical batch size: from the gradients, and from runs to one loss, each at the best
    of three rates (a rate fixed for all sizes would favour one of them)."""
    text, rows, steps = tiny_text(), [], []
    for batch in args.batches:
        found = [tiny_run(64, batch * 3000, text, 2.0**k, batch=batch, target=args.target)[2]
                 for k in (-8, -7, -6)]
        found = [s for s in found if s]
        if not found:
            raise ValueError(f"--target {args.target} was not reached in 3,000 steps of {batch}: "
                             f"try --target {args.target + 0.2:.1f}")
        steps.append(min(found))
        rows.append([str(batch), f"{steps[-1]:,}", f"{steps[-1] * batch:,}"])
    s_min, e_min, crit = critical_batch(args.batches, steps)
    M.table(f"Steps and examples to a training loss of {args.target} nats a byte",
            ["batch", "steps", "examples"], rows)
    net = tiny_run(64, 64 * 3000, text, 2**-7, batch=64, target=args.target)[1]
    print(f"\nS_min {s_min:,.0f} steps, E_min {e_min:,.0f} examples: critical batch size {crit:,.0f}; "
          f"gradient noise scale there {measured_noise(net, text):,.0f} (the order of magnitude, no sweep)")


@torch.no_grad()
def exact_match(net, val, length=8, windows=3000):
    """(share of next bytes guessed right, share of windows with `length` of them in a row right). Windows
    with a doubled byte (indentation, rules, also the ll of "all") do not count: any model continues a run."""
    starts = torch.linspace(0, len(val) - 9 - length, windows).long()
    guessed = starts[:, None] + torch.arange(TinyLM.CONTEXT, TinyLM.CONTEXT + length - 1)
    starts = starts[(val[guessed] != val[guessed + 1]).all(1)]
    right = torch.stack([net(x).argmax(-1) == y for x, y in
                         (tiny_batch(val, starts + i) for i in range(length))])            # (length,windows)
    return right.float().mean().item(), right.all(0).float().mean().item()


# --- 10. the study ------------------------------------------------------------------------------------------

def shape(d):
    """A family of one proportion, so that size is one number: heads of about 16, a feed-forward layer of
    8/3 d, a layer for every 40 of width. Left to itself, ModelConfig would round d_ff to a multiple of 64, at
    these widths anything from 2 d to 4 d: losses scatter by 1% around any law, ten times the seeds' noise."""
    return {"d_model": d, "num_layers": max(2, round(d / 40)), "num_heads": max(1, d // 16),
            "d_ff": 8 * round(d / 3)}


STUDY = {"context_length": 128, "qk_norm": True}           # every model of the study
WIDTHS = [16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384]
BATCH = 4 * 128                                            # tokens a step
MIN_STEPS = 200                                            # runs shorter than this follow no law of N and D


def study_config(config, vocab_size=512):
    known = {k: v for k, v in config.items() if k in M.ModelConfig.__dataclass_fields__}
    return M.ModelConfig(vocab_size=vocab_size, **STUDY, **known)


def cost_parameters(d):
    """FLOPs a training token / 6: the N for which C = 6 N D is exact, head and attention scores included. At
    these sizes the usual counts, with or without embeddings, are off by a factor (DeepSeek LLM 2024)."""
    return 3 * sum(M.flops_per_token(study_config(shape(d))).values()) / 6


def choose_widths(C, centre, count):
    """The `count` members of the family nearest to the size `centre` that get MIN_STEPS steps for C FLOPs."""
    sizes = {d: cost_parameters(d) for d in WIDTHS if C / 6 / cost_parameters(d) > MIN_STEPS * BATCH}
    return sorted(sorted(sizes, key=lambda d: abs(math.log(sizes[d] / centre)))[:count])


def study(args):
    """Four budgets, each twice the one before; the sizes of each centred where the ones before point; then
    the prediction for 8 times the largest, which is trained to see."""
    out = Path(args.out)
    bpe.prepare(out, args.data, vocab_size=512)
    available = bpe.token_info(out / "train.bin")["tokens"]
    flags = ["--batch_size", 4, "--val_tokens", 200_000, "--sample_tokens", 1, "--seed", args.seed,
             *(w for k, v in STUDY.items() for w in ([f"--{k}"] if v is True else [f"--{k}", v]))]
    run = train_backend(out, out / "runs", flags)
    largest, api = plan_study(args, run, out)
    runs, centre = [], 0.4 * math.sqrt(largest / 8 / 6)
    budgets = [largest / k for k in (8, 4, 2, 1)]
    print(f"study: budgets {', '.join(f'{C:.2e}' for C in budgets)}, then {8 * largest:.2e} FLOPs")
    for C in budgets:
        for d in choose_widths(C, centre, 6 if C == budgets[0] else 5):
            job = api.submit({**shape(d), "tokens": int(C / 6 / cost_parameters(d))}, 1.02 * C)
            if job["state"] == "completed":
                runs.append({"N": job["parameters"], "C": job["cost"], "D": job["tokens"], "L": job["loss"]})
                result = (f"N {job['parameters']:>9,.0f}  D {job['tokens']:>9,}  loss {job['loss']:.4f}  "
                          f"{job['seconds']:.0f} s{'  (known)' if job.get('duplicate') else ''}")
            else:
                result = f"{job['state']}: {job['error']}"
            print(f"  C {C:.2e}  width {d:>3}  {result}", flush=True)
        if not runs:
            raise ValueError(f"no run of {C:.2e} FLOPs was completed: see above, or give more --minutes")
        minima = [m["N"] for m in isoflop_minima(runs) if m["N"] > 0]
        centre = (minima[-1] if minima else min(runs, key=lambda r: r["L"])["N"]) * math.sqrt(2)
    check_prediction(args, api, runs, 8 * largest, available)


def plan_study(args, run, out):
    """How much compute the minutes hold, from one short run -> (largest of the four budgets, api). A study
    that was cut off goes on: its ledger's name holds what it depends on, and its largest budget."""
    inputs = bpe.token_info(out / "train.bin")["inputs"]
    name = f"ledger-{args.minutes:g}min-seed{args.seed}-{inputs[:8]}-"
    for known in out.glob(f"{name}*.jsonl"):
        largest = float(known.stem.removeprefix(name))
        return largest, TrainingAPI(known, 20 * largest, run)
    began, start_up = time.perf_counter(), 6.0             # seconds a process needs before its first step
    cost = run({**shape(64), "tokens": 400 * BATCH}, math.inf)["cost"]
    speed = cost / max(0.5, time.perf_counter() - began - start_up)
    usable = 60 * args.minutes - 22 * start_up
    if usable < 60:
        raise ValueError(f"--minutes {args.minutes:g} is too short for 22 runs: give 5 or more")
    # six runs at 1/8, five each at 1/4, 1/2 and 1, one at 8: 17.5 times the largest of the four
    largest = float(f"{usable * speed / 17.5:.1e}")
    return largest, TrainingAPI(out / f"{name}{largest:.1e}.jsonl", 20 * largest, run)


def check_prediction(args, api, runs, C, available):
    """Fit, predict, train, compare; runs.json and study.png."""
    out = Path(args.out)
    Path(out, "runs.json").write_text(json.dumps(
        [{"parameters": r["N"], "tokens": r["D"], "compute_budget": r["C"], "final_loss": r["L"]}
         for r in runs]))
    runs, notes = clean(runs)
    fit, replicas = fit_runs(runs)
    show_fit(runs, notes, fit, replicas, [C])
    d = min(WIDTHS, key=lambda w: abs(math.log(cost_parameters(w) / fit.law.optimum(C)[0])))
    size = cost_parameters(d)
    tokens = int(C / 6 / size)
    predicted, around = fit.law.loss(size, tokens), band([law.loss(size, tokens) for law in replicas], ".4f")
    print(f"\nThe large run: width {d}, N {size:,.0f}, D {tokens:,} ({tokens / available:.1f} epochs); "
          f"predicted loss {predicted:.4f}, the curve's 90% {around}. Training it ...", flush=True)
    job = api.submit({**shape(d), "tokens": tokens}, 1.02 * C)
    if job["state"] != "completed":
        raise ValueError(f"the large run failed: {job['error']}")
    print(f"predicted {predicted:.4f} | actual {job['loss']:.4f} | error {predicted / job['loss'] - 1:+.2%} "
          f"of the loss, at 8 times the compute of the largest run that was fitted")
    plot_runs(out / "study.png", runs, fit, replicas, (C, size, job["loss"]))


# --- 11. planning and the demo ------------------------------------------------------------------------------

PEAK = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12}   # bf16 FLOP/s, dense; data sheets


def plan(args):
    name = args.law or "besiroglu"
    law, replicas = LAWS[name], []
    if args.runs and args.law:
        raise ValueError("--law takes published constants, --runs fits new ones: give one of them")
    if args.runs:
        runs, notes = clean(read_runs(args.runs))
        fit, replicas = fit_runs(runs)
        law = fit.law
        for note in notes:
            print(f"note: {note}")
        reach = args.flops / max(r["C"] for r in runs)
        if reach > 100:
            print(f"note: {reach:,.0f} times beyond the largest run: the interval knows noise, not whether "
                  f"the law bends")
    if not args.gpu and (args.count, args.mfu, args.price) != (8, 0.4, 2.5):
        print("note: hours and cost need --gpu, too")
    N, D = law.optimum(args.flops)
    source = f"{args.runs} ({len(runs)} runs)" if args.runs else f"the published constants of {name}"

    def row(name, value, values):
        return [name, f"{value:.4g}", band(values) if replicas else "no runs, so none"]
    optima = [other.optimum(args.flops) for other in replicas]
    rows = [row("parameters", N, [n for n, _ in optima]), row("tokens", D, [d for _, d in optima]),
            row("tokens a parameter", D / N, [d / n for n, d in optima]),
            row("loss, nats a token", law.loss(N, D), [o.loss(*n) for o, n in zip(replicas, optima)])]
    if args.gpu:
        hours = args.flops / (PEAK[args.gpu] * args.mfu * args.count) / 3600
        rows += [[f"hours on {args.count} {args.gpu} at {args.mfu:.0%} MFU", f"{hours:,.1f}", ""],
                 [f"cost at ${args.price:g} a GPU hour", f"${hours * args.count * args.price:,.0f}", ""]]
    M.table(f"{args.flops:.3g} FLOPs, compute-optimal by {source}", ["", "best", "90% interval"], rows)


def show_fit(runs, notes, fit, replicas, budgets):
    """The table of a fit: constants, then what each method wants at each budget."""
    for note in notes:
        print(f"note: {note}")
    names = ("E", "A", "alpha", "B", "beta")
    values = [astuple(law) for law in replicas]
    rows = [[n, f"{v:.4g}", band([x[i] for x in values])]
            for i, (n, v) in enumerate(zip(names, astuple(fit.law)))]
    rows.append(["a, N* ~ C^a", f"{fit.law.exponent:.3f}", band([law.exponent for law in replicas], ".3f")])
    M.table(f"L = E + A/N^alpha + B/D^beta, {len(runs)} runs, residual "
            f"{float(np.sqrt(np.mean(fit.residuals**2))):.2%} of the loss", ["", "fit", "90% interval"], rows)
    rows = []
    for C in budgets:
        N, D = fit.law.optimum(C)
        optima = [law.optimum(C) for law in replicas]
        losses = [law.loss(*o) for law, o in zip(replicas, optima)]
        rows.append([f"{C:.2e}", "the law", f"{N:.3e}", band([n for n, _ in optima], ".2e"), f"{D:.3e}",
                     f"{D / N:.1f}", f"{fit.law.loss(N, D):.4f}", band(losses, ".3f")])
        for how in ("parabola", "argmin"):
            rows.append([f"{C:.2e}", how, *minima_row(runs, C, how), "", ""])
    M.table("Compute-optimal (90% intervals; trust the law first, argmin last)",
            ["FLOPs", "by", "N*", "interval", "D*", "D/N", "loss", "interval"], rows)
    for m in isoflop_minima(runs):
        if m["note"]:
            print(f"  note: budget {m['C']:.2e}: {m['note']}")


def minima_row(runs, C, how):
    try:
        N = extrapolate_minima(runs, C, how)
    except ValueError as e:
        return ["-", str(e).split(":")[0], "-", "-"]
    around = band(bootstrap_minima(runs, C), ".2e") if how == "parabola" else ""
    return [f"{N:.3e}", around, f"{C / 6 / N:.3e}", f"{C / 6 / N / N:.1f}"]


def plot_runs(path, runs, fit, replicas, target=None):
    """Left: loss against size, a curve a budget, its minimum marked. Right: best size against compute."""
    plt = M.pyplot()
    if plt is None:
        return
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for C, group in by_budget(runs):
        N, _, _, L = columns(group)
        dots, = left.semilogx(N, L, "o", label=f"{C:.1e} FLOPs")
        grid = np.geomspace(N.min() * 0.8, N.max() * 1.25, 60)
        left.semilogx(grid, fit.law.loss(grid, C / 6 / grid), color=dots.get_color(), lw=1)
        best = fit.law.optimum(C)
        left.semilogx(best[0], fit.law.loss(*best), "k+", ms=9)
    left.set(xlabel="N, parameters (C = 6 N D)", ylabel="held-out loss, nats a token",
             title="IsoFLOP curves: runs and the fitted law")
    largest = target[0] if target else max(r["C"] for r in runs)
    budgets = np.geomspace(min(r["C"] for r in runs) / 2, 2 * largest, 40)
    bands = np.array([[law.optimum(C)[0] for C in budgets] for law in replicas])
    low, high = np.nanquantile(bands, [0.05, 0.95], axis=0)
    right.fill_between(budgets, low, high, alpha=0.25, label="90% interval")
    right.loglog(budgets, [fit.law.optimum(C)[0] for C in budgets], label=f"N* ~ C^{fit.law.exponent:.2f}")
    minima = [m for m in isoflop_minima(runs) if m["N"] > 0]
    right.loglog([m["C"] for m in minima], [m["N"] for m in minima], "o", label="parabola minima")
    if target:
        left.semilogx(*target[1:], "*", ms=13, color="black", label=f"trained to check, {target[0]:.1e}")
        right.loglog(*target[:2], "*", ms=13, color="black", label="trained to check")
    right.set(xlabel="C, FLOPs", ylabel="best size N*", title="What compute wants")
    left.legend(fontsize=7)
    right.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)
    print(f"\nsaved {path}")


def planted_runs(law, budgets, sizes=8, noise=0.0, seed=0, span=(0.12, 6.0)):
    """Runs that a law would give, on sizes from span[0] to span[1] times the best of each budget."""
    rng, runs = np.random.default_rng(seed), []
    for C in budgets:
        for N in law.optimum(C)[0] * np.geomspace(*span, sizes):
            runs.append({"N": N, "C": C, "D": C / 6 / N,
                         "L": law.loss(N, C / 6 / N) * math.exp(noise * rng.standard_normal())})
    return runs


def demo_planted(law=LAWS["hoffmann"], C=5.76e23, draws=20):
    """Three ways to read the same runs of a known law, extrapolated two hundred times: who finds the truth?
    One draw of the noise may flatter any of them: errors are root mean squares, the rest means of many."""
    true, forms, rows = law.optimum(C)[0], (".4f", ".3f", ".0f", ".0f"), []
    for noise in (0.0, 0.002, 0.01):
        found, around, constants = [], [], []              # a row for each draw
        for seed in range(draws if noise else 1):
            runs = planted_runs(law, np.geomspace(6e18, 3e21, 9), noise=noise, seed=seed)
            N, _, D, L = columns(runs)
            fit = fit_chinchilla(N, D, L)
            found.append([*(extrapolate_minima(runs, C, how) for how in ("argmin", "parabola")),
                          fit.law.optimum(C)[0]])
            around.append(interval([other.optimum(C)[0] for other in bootstrap(fit, N, D, 50, seed)]))
            constants.append([fit.law.exponent, fit.law.E, fit.law.A, fit.law.B])
        typical = np.sqrt(np.mean((np.array(found) / true - 1)**2, 0))
        low, high = np.mean(around, 0) / true - 1
        mean, sd = np.mean(constants, 0), np.std(constants, 0)
        rows.append([f"{noise:.1%}", *(f"{e:.1%}" for e in typical), f"{low:+.1%} to {high:+.1%}",
                     *(f"{m:{form}} ± {s:{form}}" for m, s, form in zip(mean, sd, forms))])
    truth = law.exponent, law.E, law.A, law.B
    rows.append(["truth", "", "", "", "", *(f"{v:{form}}" for v, form in zip(truth, forms))])
    M.table(f"1. A planted law: error of the best size at {C:.3g} FLOPs, {draws} draws of 72 runs",
            ["noise", "argmin", "parabola", "the law", "its 90% interval", "a", "E", "A", "B"], rows)
    print("   A and B wander together; the exponent and the optimum stay. Judge a fit by what it predicts.")


def demo_published():
    rows = []
    for name, law in LAWS.items():
        N, D = law.optimum(5.76e23)
        D14 = (law.beta * law.B / (law.alpha * law.A) * 1.4e9**law.alpha) ** (1 / law.beta)
        rows.append([name, f"{law.exponent:.3f}", f"{N / 1e9:.1f}B", f"{D / 1e12:.2f}T", f"{D / N:.0f}",
                     f"{D14 / 1e9:.0f}B", f"{non_embedding_exponent(law):.2f}"])
    rows.append(["rule D = 20 N", "0.500", f"{math.sqrt(5.76e23 / 120) / 1e9:.1f}B",
                 f"{20 * math.sqrt(5.76e23 / 120) / 1e12:.2f}T", "20", "28B", ""])
    M.table("2. Published laws at Chinchilla's budget, 5.76e23 FLOPs (it was 70B and 1.4T); the tokens that "
            "1.4B parameters want; Kaplan's view",
            ["", "a", "N*", "D*", "D/N", "1.4B want", "a without embeddings"], rows)


BUDGETS = (1e9, 3e9, 1e10)
TINY_WIDTHS = ((8, 12, 16, 24, 32, 48), (12, 16, 24, 32, 48, 64), (16, 24, 32, 48, 64, 96))


def demo_real(out):
    """Three small budgets for real, then a prediction three times beyond, trained to see."""
    text, began = tiny_text(), time.perf_counter()
    runs = tiny_isoflop(BUDGETS, TINY_WIDTHS, text)
    fit, replicas = fit_runs(runs)
    rows = []
    for (C, group), minimum in zip(by_budget(runs), isoflop_minima(runs)):
        rows.append([f"{C:.0e}", " ".join(f"{r['L']:.2f}" for r in group), f"{minimum['N']:,.0f}",
                     f"{fit.law.optimum(C)[0]:,.0f}", f"{minimum['L']:.3f}"])
    sizes = [r["N"] for r in runs]
    M.table(f"3. Real runs (a byte model of {min(sizes):,} to {max(sizes):,} parameters on the standard "
            f"library, {2 * len(runs)} runs, two seeds each, {time.perf_counter() - began:.0f} s)",
            ["FLOPs", "loss by size, nats a byte", "N*, parabola", "N*, law", "loss there"], rows)
    C = 3e10
    width = min(range(8, 257, 4), key=lambda w: abs(math.log(tiny_params(w) / fit.law.optimum(C)[0])))
    size = tiny_params(width)
    tokens = int(C / 6 / size)
    actual, net, _ = tiny_run(width, tokens, text)
    predicted, around = fit.law.loss(size, tokens), band([law.loss(size, tokens) for law in replicas], ".3f")
    print(f"   exponent a = {fit.law.exponent:.2f}, 90% {band([law.exponent for law in replicas], '.2f')}")
    # the curve's: the noise of the run itself, 0.03 for one seed, comes on top
    print(f"   {C:.0e} FLOPs, width {width}: predicted {predicted:.3f} (the curve's 90%: {around}) | "
          f"trained {actual:.3f} | {predicted / actual - 1:+.1%}")
    small = tiny_run(8, 30_000, text)[1]
    (p0, k0), (p1, k1) = (exact_match(n, text[1]) for n in (small, net))
    print(f"   emergence? next byte right {p0:.0%} -> {p1:.0%}, eight in a row {k0:.1%} -> {k1:.1%}: none, "
          f"then some, is a matter of the metric; the loss falls smoothly")
    plot_runs(Path(out, "scaling.png"), runs, fit, replicas, (C, size, actual))


def demo(args):
    demo_planted()
    demo_published()
    demo_real(args.out)


# --- 12. the command line -----------------------------------------------------------------------------------

def fit_file(args):
    runs, notes = clean(read_runs(args.file))
    if not runs:
        raise ValueError(f"{args.file}: no run with a finite loss is left")
    fit, replicas = fit_runs(runs)
    show_fit(runs, notes, fit, replicas, args.flops)
    plot_runs(Path(args.out, "scaling.png"), runs, fit, replicas)


def use_api(args):
    """One submission to the simulator, or the state of the ledger."""
    api = TrainingAPI(Path(args.out, "ledger.jsonl"), args.budget, simulator())
    if args.final:
        N, loss = args.final
        D = args.budget * 10 / 6 / N
        law = LAWS["besiroglu"]
        best = law.loss(*law.optimum(args.budget * 10))
        print(json.dumps(api.final_submission({"parameters": N, "tokens": D}, loss)))
        print(f"at ten times the budget: your size gives {law.loss(N, D):.4f} (you said {loss:.4f}), "
              f"the best {best:.4f}")
    elif args.parameters:
        C = args.flops or args.budget / 50
        config = {"parameters": args.parameters, "tokens": round(C / 6 / args.parameters)}
        print(json.dumps(api.submit(config, 1.001 * C)))
    print(json.dumps(api.budget()))


def positive(text):
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def whole(text):
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


# What argparse calls the type when it rejects a value.
positive.__name__, whole.__name__ = "positive number", "positive whole number"


def parse_args(argv=None):
    p = M.cli(__doc__)
    p.add_argument("--out", default="out", help="folder for plots, ledgers and runs")
    p.set_defaults(run=demo)
    commands = p.add_subparsers(metavar="fit|plan|study|mup|noise|api", help="without one: the lecture")

    def command(name, run, help):
        c = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        c.add_argument("--out", default="out/scaling", help="folder for plots, ledgers and runs")
        c.set_defaults(run=run)
        return c.add_argument
    add = command("fit", fit_file, "fit the law to a table of runs")
    add("file", help='JSON list of {"parameters", "compute_budget" or "tokens", "final_loss"}, or CSV')
    add("--flops", type=positive, nargs="+", default=[1e23, 1e24], help="budgets to extrapolate to, FLOPs")
    add = command("plan", plan, "what a budget should buy")
    add("--flops", type=positive, required=True, help="training budget, FLOPs")
    add("--runs", metavar="FILE", help="fit these runs instead of taking a published law")
    add("--law", choices=LAWS, help="published constants; besiroglu without --law and --runs")
    add("--gpu", choices=PEAK, help="to print hours and cost")
    add("--count", type=whole, default=8, help="GPUs")
    add("--mfu", type=positive, default=0.4, help="share of the peak that training reaches")
    add("--price", type=positive, default=2.5, help="dollars a GPU hour")
    add = command("study", study, "small runs of train.py, a prediction, and the large run that checks it")
    add("--minutes", type=positive, default=30.0, help="for all of it")
    add("--data", nargs="+", metavar="PATH", help="text; without it the Python standard library")
    add("--seed", type=int, default=0, help="of weights and data order")
    add = command("mup", show_mup, "the best learning rate against width")
    add("--widths", type=whole, nargs="+", default=[64, 256, 1024], help="hidden widths")
    add("--seeds", type=whole, default=1, help="runs averaged in each cell")
    add = command("noise", show_noise, "the critical batch size")
    add("--batches", type=whole, nargs="+", default=[8, 16, 32, 64, 128, 256, 512], help="sizes, examples")
    add("--target", type=positive, default=2.5, help="training loss to reach, nats a byte")
    add = command("api", use_api, "submit a run to the simulated training API")
    add("--budget", type=positive, default=1e19, help="of all runs together, FLOPs")
    add("--parameters", type=positive, help="size of a run to submit")
    add("--flops", type=positive, help="its compute (default: a fiftieth of the budget)")
    add("--final", type=positive, nargs=2, metavar=("N", "LOSS"), help="your answer for ten times the budget")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(1)                               # products of 64 rows: a second thread only waits
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        args.run(args)
    except (ValueError, OSError) as e:
        print("scaling.py: error:", M.first_line(e), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "; the ledger keeps every finished run: the same command goes on" if args.run is study else ""
        print(f"\nscaling.py: interrupted{kept}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
