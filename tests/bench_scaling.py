"""python tests/bench_scaling.py: the parametric fit of 240 points from 500 starts, against scipy's L-BFGS from the same
starts (the papers' way), in one run. Ours | peer | ratio, and whether both found the same minimum."""
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import scaling as s  # noqa: E402

import numpy as np  # noqa: E402
import scipy  # noqa: E402
from scipy.optimize import minimize  # noqa: E402


def main(points=240, starts=500, rounds=3):
    runs = s.planted_runs(s.LAWS["besiroglu"], np.geomspace(6e18, 3e21, 24), points // 24, 0.01, 0)
    N, _, D, L = s.columns(runs)
    centre = np.log(N).mean(), np.log(D).mean()
    x, y, logL = np.log(N) - centre[0], np.log(D) - centre[1], np.log(L)
    rng = np.random.default_rng(0)
    guesses = np.column_stack([rng.uniform(-1, 1, (starts, 3)), rng.uniform(0, 2, (starts, 2))])

    def objective(theta):                       # 1e3: L-BFGS stops by absolute tolerances
        value, share = s.predict(theta[None], x, y)
        r, p = value[0] - logL, share[0]
        slope = np.clip(r, -1e-3, 1e-3)
        gradient = np.array([slope @ p[:, 0], slope @ p[:, 1], slope @ p[:, 2], -slope @ (p[:, 1] * x),
                             -slope @ (p[:, 2] * y)])
        return 1e3 * s.huber(r, 1e-3).sum(), 1e3 * gradient
    ours, peers = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        theta, cost = s.refine(guesses, x, y, logL, 1e-3)
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        found = [minimize(objective, g, jac=True, method="L-BFGS-B") for g in guesses[:starts // 5]]
        peers.append((time.perf_counter() - began) * 5)                        # a fifth of the starts, times five
    best = min(f.fun for f in found) / 1e3
    began = time.perf_counter()
    fit = s.fit_chinchilla(N, D, L, delta=1e-3)
    single = time.perf_counter() - began
    a, b = statistics.median(ours), statistics.median(peers)
    print(f"{points} points, {starts} starts, Huber 1e-3; numpy {np.__version__}, scipy {scipy.__version__}, "
          f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, median of {rounds}")
    print(f"{'':34}{'ours':>10}{'scipy':>10}{'ratio':>8}")
    print(f"{'all starts, seconds':34}{a:10.2f}{b:10.2f}{b / a:7.1f}x   (scipy: a fifth of the starts, times 5)")
    print(f"{'lowest objective':34}{cost.min():10.7f}{best:10.7f}{cost.min() / best:8.6f}")
    print(f"{'starts that reach it':34}{np.mean(cost < 1.0001 * cost.min()):10.0%}"
          f"{np.mean([f.fun / 1e3 < 1.0001 * best for f in found]):10.0%}")
    print(f"{'fit_chinchilla, no start to guess':34}{single:9.2f}s   objective {fit.cost:.7f}")


if __name__ == "__main__":
    main()
