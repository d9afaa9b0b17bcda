"""Tests of scaling.py: (1) planted laws recovered, (2) scipy and closed forms, (3) invariants of the ledger and the
intervals, (4) published figures, (5) the command line and bad input. 30 s on two idle cores."""
import json
import math
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import scaling as s  # noqa: E402  (the scripts are flat files, not a package)

import torch  # noqa: E402

HOFFMANN, BESIROGLU = s.LAWS["hoffmann"], s.LAWS["besiroglu"]
BUDGETS = np.geomspace(6e18, 3e21, 9)


def fitted(runs, **how):
    N, _, D, L = s.columns(runs)
    return s.fit_chinchilla(N, D, L, **how)


# --- 1. planted laws ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("law", [HOFFMANN, BESIROGLU, s.Law(0.5, 30.0, 0.6, 900.0, 0.25)])
@pytest.mark.parametrize("span", [(0.12, 6.0), (0.5, 20.0)])                # centred on the optimum or not
def test_a_noise_free_law_comes_back_to_a_millionth(law, span):
    found = fitted(s.planted_runs(law, BUDGETS, span=span)).law
    for name in ("E", "A", "alpha", "B", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=1e-6)


def test_exponent_under_noise():
    """TOPICS S3: log-noise 0.002, every one of 20 draws within 0.005 of the exponent; a few wild runs change little."""
    for seed in range(20):
        runs = s.planted_runs(HOFFMANN, np.geomspace(1e18, 3.2e21, 9), 9, 0.002, seed, (10**-0.9, 10**0.9))
        assert fitted(runs).law.exponent == pytest.approx(HOFFMANN.exponent, abs=0.005)
    runs[5]["L"] *= 1.3
    runs[40]["L"] *= 1.2
    robust, squares = (abs(fitted(runs, delta=d).law.exponent - HOFFMANN.exponent) for d in (None, 1e9))
    assert robust < 0.005 and squares > 0.01


def test_three_ways_rank_as_the_docstring_says():
    """Argmin errs by the grid, the parabola by a few percent, the law by nothing (noise-free)."""
    runs, error = s.planted_runs(HOFFMANN, BUDGETS, 8), {}
    for how in ("argmin", "parabola"):
        k, a = s.power_law(*zip(*((m["C"], m["N"]) for m in s.isoflop_minima(runs, how))))
        error[how] = abs(k * 5.76e23**a / HOFFMANN.optimum(5.76e23)[0] - 1)
    error["law"] = abs(fitted(runs).law.optimum(5.76e23)[0] / HOFFMANN.optimum(5.76e23)[0] - 1)
    assert error["law"] < 1e-6 < error["parabola"] < 0.06 < error["argmin"]


def test_planted_errors_are_typical_ones(capsys):
    """Each error of the lecture's table is the root mean square over draws of the noise, not one draw's."""
    s.demo_planted(draws=3)
    line, = re.findall(r"^  0\.2%  *([\d.]+)%  *([\d.]+)%  *([\d.]+)%", capsys.readouterr().out, re.M)
    true = HOFFMANN.optimum(5.76e23)[0]
    draws = [s.planted_runs(HOFFMANN, BUDGETS, noise=0.002, seed=seed) for seed in range(3)]
    sizes = [[*(s.extrapolate_minima(runs, 5.76e23, how) for how in ("argmin", "parabola")),
              fitted(runs).law.optimum(5.76e23)[0]] for runs in draws]
    want = 100 * np.sqrt(np.mean((np.array(sizes) / true - 1) ** 2, 0))
    np.testing.assert_allclose(np.array(line, float), want, atol=0.06)


def test_minima_over_training_curves():
    """Approach 1 with curves that really follow the law gives its exponent within the grid of sizes."""
    sizes = np.geomspace(1e8, 2e10, 60)
    curves = [(N, {C: HOFFMANN.loss(N, C / 6 / N) for C in np.geomspace(1e18, 1e22, 80)}) for N in sizes]
    found = s.curve_minima(curves, np.geomspace(1e19, 1e21, 12))
    assert len(found) == 12
    assert s.power_law(*zip(*found))[1] == pytest.approx(HOFFMANN.exponent, abs=0.03)
    assert s.interpolate({1.0: 3.0, 10.0: 2.0}, 100) is None


# --- 2. scipy and closed forms -----------------------------------------------------------------------------------

def test_same_minimum_as_lbfgs():
    optimize = pytest.importorskip("scipy.optimize")
    runs = s.planted_runs(BESIROGLU, BUDGETS[::2], 6, 0.01, 3)
    N, _, D, L = s.columns(runs)
    fit = s.fit_chinchilla(N, D, L, delta=1e-3)
    x, y = np.log(N) - fit.centre[0], np.log(D) - fit.centre[1]

    def cost(theta):
        return 1e3 * s.huber(s.predict(theta[None], x, y)[0][0] - np.log(L), 1e-3).sum()
    found = optimize.minimize(cost, fit.theta + 0.05, method="L-BFGS-B", options={"maxiter": 2000})
    assert fit.cost <= found.fun / 1e3 * (1 + 1e-6)
    again, _ = s.refine(fit.theta[None] + 0.05, x, y, np.log(L))               # from afar to the same place
    np.testing.assert_allclose(again[0], fit.theta, atol=1e-3)


def test_many_starts_end_where_one_does():
    runs = s.planted_runs(HOFFMANN, BUDGETS[::2], 6, 0.003, 1)
    rng = np.random.default_rng(0)
    one = fitted(runs, delta=1e-3)
    starts = one.theta + rng.normal(0, [0.3, 1, 1, 0.2, 0.2], (50, 5))
    many = fitted(runs, starts=starts, delta=1e-3)
    assert many.cost <= one.cost + 1e-12 and many.cost == pytest.approx(one.cost, rel=1e-5)


@pytest.mark.parametrize("law", [HOFFMANN, BESIROGLU])
def test_the_optimum_is_one(law):
    N, D = law.optimum(1e22)
    assert 6 * N * D == pytest.approx(1e22)
    grid = N * np.geomspace(0.1, 10, 2001)
    assert grid[law.loss(grid, 1e22 / 6 / grid).argmin()] == pytest.approx(N, rel=3e-3)


def test_power_law_and_huber():
    x = np.array([1.0, 7.0, 123.0])
    k, a = s.power_law(x, 3 * x**0.7)
    assert (k, a) == pytest.approx((3, 0.7))
    r = np.linspace(-3, 3, 7)
    want = torch.nn.functional.huber_loss(torch.tensor(r), torch.zeros(7, dtype=torch.float64), delta=0.5,
                                          reduction="none")
    np.testing.assert_allclose(s.huber(r, 0.5), want)
    with pytest.raises(ValueError, match="too few for a power law"):
        s.power_law([1.0], [2.0])
    x, two = np.geomspace(1e6, 1e8, 6), np.tile([1e6, 1e7], 3)
    for N, D, cause in ((x[:5], x[:5], "5 run"), (two, x, "2 size"), (x, two, "2 token count")):
        with pytest.raises(ValueError, match=f"{cause}.*3 or more of each"):
            s.fit_chinchilla(N, D, np.full(len(N), 3.0))


def test_critical_batch_inverts_its_curve():
    B = np.array([8, 32, 128, 512])
    assert s.critical_batch(B, 200 + 30_000 / B) == pytest.approx((200, 30_000, 150))


def test_noise_scale_on_known_gradients():
    """TOPICS S4: gradients of covariance I and mean m; averaging squared norms first is within 3% at 200 steps."""
    g, mean = torch.Generator().manual_seed(0), torch.full((300,), 0.1)
    true = 300 / mean.square().sum().item()

    def squared(batch):
        return (mean + torch.randn(300, generator=g) / math.sqrt(batch)).square().sum().item()
    pairs = np.array([[squared(16), squared(256)] for _ in range(400)])
    assert s.noise_scale(*pairs.mean(0), 16, 256) == pytest.approx(true, rel=0.03)
    ratios = np.mean([s.noise_scale(*p, 16, 256) for p in pairs[:200]])
    assert abs(ratios - true) > abs(s.noise_scale(*pairs[:200].mean(0), 16, 256) - true)
    assert s.noise_scale(1.0, 0.01, 16, 256) == math.inf                      # no signal left: any batch is too small


# --- 3. invariants -----------------------------------------------------------------------------------------------

def test_intervals_cover_the_truth_at_their_rate():
    """200 draws of noisy runs; the 90% interval of the exponent holds the true one in about 180 (3 sigma: 13)."""
    inside = 0
    for seed in range(200):
        runs = s.planted_runs(HOFFMANN, BUDGETS[::2], 6, 0.01, seed)
        N, _, D, L = s.columns(runs)
        fit = s.fit_chinchilla(N, D, L)
        low, high = s.interval([law.exponent for law in s.bootstrap(fit, N, D, 60, seed)])
        inside += low <= HOFFMANN.exponent <= high
    assert 160 <= inside <= 196


def test_runs_in_any_order_and_twice():
    runs = s.planted_runs(HOFFMANN, BUDGETS[:4], 6, 0.002)
    again, notes = s.clean(runs[::-1] + [{**runs[0], "L": runs[0]["L"] + 0.1}, {**runs[3], "L": math.nan}])
    assert len(again) == len(runs) and len(notes) == 2
    assert "left out" in notes[0] and "2 runs of" in notes[1]
    assert again[0]["L"] == pytest.approx(runs[0]["L"] + 0.05)
    # budgets that differ by a step's rounding are one; within it the sizes rise, as the tables print them
    rounded = [{**r, "C": r["C"] * (1 + 1e-4 * i)} for i, r in enumerate(runs[::-1])]
    assert [[r["N"] for r in group] for _, group in s.by_budget(rounded)] == [
        [r["N"] for r in runs[i:i + 6]] for i in range(0, 24, 6)]


def test_ledger_never_overspends_and_survives(tmp_path):
    """300 random submissions, restarts between them: spent + reserved never exceeds the budget, and equals the sum."""
    rng, path, asked = np.random.default_rng(0), tmp_path / "ledger.jsonl", 0

    def run(config, limit):
        if config["cost"] > 9:
            raise RuntimeError("exploded")
        return {"loss": float("nan") if config["cost"] > 8 else 1.0, "cost": config["cost"]}
    api = s.TrainingAPI(path, 100, run)
    for i in range(300):
        if i % 50 == 49:
            before = api.budget()
            api = s.TrainingAPI(path, 100, run)
            assert api.budget() == before
        config, reserve = {"cost": round(float(rng.uniform(0, 10)), 2)}, float(rng.uniform(0.5, 10))
        left = api.budget()["left"]
        try:
            job = api.submit(config, reserve)
        except ValueError as e:
            assert reserve > left and "submit a smaller run" in str(e)
            continue
        asked += 1
        if config["cost"] > 9:
            assert job["state"] == "failed" and job["cost"] == 0 and "exploded" in job["error"]
        elif config["cost"] > reserve and not job.get("duplicate"):
            assert job["state"] == "failed" and job["cost"] == reserve and "loss" not in job
        budget = api.budget()
        assert budget["reserved"] == 0 and 0 <= budget["spent"] <= 100 and budget["left"] >= 0
    assert asked > 20


def test_ledger_duplicates_and_crashes(tmp_path):
    path, calls = tmp_path / "ledger.jsonl", []

    def run(config, limit):
        calls.append(config)
        if config.get("stop"):
            raise KeyboardInterrupt
        return {"loss": 2.0, "cost": 10.0}
    api = s.TrainingAPI(path, 100, run)
    first = api.submit({"a": 1, "b": 2}, 30)
    assert first["state"] == "completed" and api.budget()["left"] == 90                 # 20 came back
    assert api.submit({"b": 2, "a": 1}, 30)["duplicate"] and len(calls) == 1
    with pytest.raises(KeyboardInterrupt):
        api.submit({"stop": True}, 40)
    lines = path.read_text().splitlines()
    assert [json.loads(x)["state"] for x in lines] == ["queued", "running", "completed", "queued", "running", "failed"]
    path.write_text("\n".join(lines[:-1]) + '\n{"id": 9}\n7\n{"id": 2, "sta')         # killed while running, mid-line
    again = s.TrainingAPI(path, 100, run)
    assert again.budget() == {"total": 100.0, "spent": 10.0, "reserved": 0, "left": 90.0}
    assert again.jobs[2]["state"] == "failed"
    assert again.final_submission({"N": 1}, 2.5)["runs"] == [1]
    assert s.TrainingAPI(path, 100, run).budget()["left"] == 90
    path.write_text("".join(line + "\n" for line in lines if json.loads(line)["id"] == 2))     # the first job's are gone
    assert s.TrainingAPI(path, 100, run).submit({"c": 3}, 30)["id"] == 3


def test_simulator_player_with_a_tenth(tmp_path):
    """Runs worth a tenth of the budget choose a size whose true loss is within half a percent of the best (S8)."""
    api = s.TrainingAPI(tmp_path / "l.jsonl", 1e20, s.simulator())
    for C in (1e17, 3e17, 1e18):
        for N in s.LAWS["besiroglu"].optimum(C)[0] * np.geomspace(0.2, 5, 5):
            api.submit({"parameters": N, "tokens": C / 6 / N}, 1.01 * C)
    assert api.budget()["spent"] < 1e19
    runs = [{"N": j["config"]["parameters"], "D": j["config"]["tokens"], "C": j["cost"], "L": j["loss"]}
            for j in api.jobs.values()]
    C = api.budget()["left"]
    N = fitted(runs).law.optimum(C)[0]
    assert BESIROGLU.loss(N, C / 6 / N) <= 1.005 * BESIROGLU.loss(*BESIROGLU.optimum(C))


# --- 4. published figures, counting ---------------------------------------------------------------------------------

def test_published_optima():
    N, D = HOFFMANN.optimum(5.76e23)
    assert (N, D) == (pytest.approx(3.22e10, rel=0.01), pytest.approx(2.98e12, rel=0.01))
    N, D = BESIROGLU.optimum(5.76e23)
    assert N == pytest.approx(7.22e10, rel=0.01) and D / N == pytest.approx(18.4, rel=0.01)
    for law, seen in ((HOFFMANN, 0.74), (BESIROGLU, 0.78)):                    # Pearce & Song's, near Kaplan's 0.73
        assert s.non_embedding_exponent(law) == pytest.approx(seen, abs=0.01)


@pytest.mark.parametrize("width", [1, 7, 64])
def test_tiny_model_counts(width):
    assert s.tiny_params(width) == sum(p.numel() for p in s.TinyLM(width).parameters())


def test_study_models_cost_what_they_claim():
    for d in s.WIDTHS:
        c = s.study_config(s.shape(d))
        assert c.d_model == d and c.head_dim % 2 == 0
        assert 6 * s.cost_parameters(d) == s.M.train_flops(c, 1)
    sizes = [s.cost_parameters(d) for d in s.WIDTHS]
    assert sizes == sorted(sizes)


def test_mup_groups_and_its_start():
    """Where muP and the standard part: widths above the base, hidden and output rates, the head's first scale."""
    narrow, wide = s.TinyLM(64).groups(1.0), s.TinyLM(256).groups(1.0)
    assert [g["peak"] for g in narrow] == [1, 1] and [g["peak"] for g in wide] == [1, 0.25]
    assert [g["peak"] for g in s.TinyLM(256, mup=False).groups(1.0)] == [1, 1]
    std = [s.TinyLM(1024, mup).head.weight.std().item() for mup in (False, True)]
    assert std[0] == pytest.approx(1 / 32, rel=0.05) and std[1] == pytest.approx(1 / 128, rel=0.05)


def test_tiny_runs_learn_and_repeat():
    text = [torch.frombuffer(bytearray(b"the quick brown fox; " * 400), dtype=torch.uint8)] * 2
    loss, net, steps = s.tiny_run(16, 64 * 60, text, batch=64)
    assert steps == 60 and loss < 1.5 < math.log(128)
    assert s.tiny_run(16, 64 * 60, text, batch=64)[0] == loss
    assert s.tiny_run(16, 64 * 300, text, batch=64, target=2.0)[2] < 100
    assert s.tiny_run(16, 64 * 3, text, batch=64, target=0.1)[2] is None
    one, eight = s.exact_match(net, text[1], windows=200)
    assert 0 <= eight <= one <= 1


# --- 5. the command line, bad input -----------------------------------------------------------------------------------

def test_commands_of_the_docstring_parse():
    for line in re.findall(r"python scaling\.py((?: +[^\s#]+)*)", s.__doc__):
        s.parse_args(shlex.split(line))


@pytest.mark.parametrize("argv", [["--lr", "3"], ["study", "--minuts", "3"], ["plan", "--flops", "-1"],
                                  ["plan"], ["plan", "--flops", "1e21", "--gpu", "tpu"], ["fitt", "x"],
                                  ["plan", "--flops", "nan"], ["api", "--budget", "0"],
                                  ["plan", "--flops", "1e21", "--count", "0"], ["mup", "--widths", "64", "0"],
                                  ["noise", "--batches", "-8"]])
def test_bad_flags_are_one_line(argv, capsys):
    with pytest.raises(SystemExit) as e:
        s.parse_args(argv)
    assert e.value.code == 2
    assert len(capsys.readouterr().err.strip().split("\n")) == 1


RUN = {"parameters": 1e6, "compute_budget": 1e15, "final_loss": 3.0}
BAD = {  # contents of a file of runs -> what the one line says
    "": "neither JSON nor CSV", "{}": "not a list", "[1]": "give numbers", '[{"parameters": 1}]': "lacks",
    json.dumps([{**RUN, "parameters": -1}]): "must be positive", json.dumps([{**RUN, "final_loss": "x"}]): "run 1",
    json.dumps([RUN]): "too few", json.dumps([{**RUN, "final_loss": math.nan}]): "finite loss",
    json.dumps([{"parameters": N, "compute_budget": C, "final_loss": 3 - abs(math.log(N / 1e6)) * (C / 1e15)}
                for N in (1e5, 1e6, 1e7) for C in (1e15, 2e15, 4e15)]): "too few",
    json.dumps([{"parameters": N, "compute_budget": C, "final_loss": 1 + (math.log(N / 1e6)) ** -2 + C / 1e15}
                for N in (2e5, 1.1e6, 1e7) for C in (1e15, 2e15, 4e15)]): "no law"}


@pytest.mark.parametrize("text, words", BAD.items())
def test_bad_tables_are_refused_in_one_line(tmp_path, capsys, text, words):
    path = tmp_path / "runs.json"
    path.write_text(text)
    assert s.main(["fit", str(path), "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err.strip()
    assert words in err and "\n" not in err


def test_one_sided_and_upside_down_curves_give_no_size():
    """Only sizes below the minimum, or a parabola that opens downward: NaN and a note, never a number."""
    runs = s.planted_runs(HOFFMANN, BUDGETS[:3], 5, span=(0.05, 0.4))
    assert all(math.isnan(m["N"]) and "add smaller or larger" in m["note"] for m in s.isoflop_minima(runs))
    assert all("edge" in m["note"] for m in s.isoflop_minima(runs, "argmin"))
    down = [{"N": N, "C": 1e18, "D": 1.0, "L": -(math.log(N) - 5) ** 2 + 30} for N in (50.0, 150.0, 400.0)]
    assert math.isnan(s.isoflop_minima(down)[0]["N"])
    assert "too few" in s.isoflop_minima(down[:2])[0]["note"]
    assert math.isnan(s.isoflop_minima([{**run, "L": 3.0} for run in down])[0]["N"])              # and a flat one
    with pytest.raises(ValueError):
        s.power_law([m["C"] for m in s.isoflop_minima(runs)], [m["N"] for m in s.isoflop_minima(runs)])


def test_a_rising_law_has_no_optimum():
    rising = s.Law(1.0, 1.0, -0.1, 1.0, 0.3)
    assert math.isnan(rising.optimum(1e20)[0]) and s.interval([1, math.nan, 1]) == (1, 1)
    runs = s.planted_runs(HOFFMANN, BUDGETS[:4], 6)
    for run in runs:
        run["L"] = rising.loss(run["N"] / 1e9, run["D"] / 1e9)
    with pytest.raises(ValueError, match="no law"):
        fitted(runs)


def test_fit_and_plan_from_a_file(tmp_path, capsys):
    """The assignment's form, JSON and CSV alike; N and D at 1e23 with intervals; the plot is written."""
    runs = s.planted_runs(HOFFMANN, BUDGETS[::2], 6, 0.002)
    rows = [{"parameters": r["N"], "compute_budget": r["C"], "final_loss": r["L"]} for r in runs]
    (tmp_path / "runs.json").write_text(json.dumps(rows))
    (tmp_path / "runs.csv").write_text("\n".join(["parameters,compute_budget,final_loss",
                                                  *(",".join(map(str, r.values())) for r in rows)]))
    assert s.read_runs(tmp_path / "runs.json") == s.read_runs(tmp_path / "runs.csv")
    assert s.main(["fit", str(tmp_path / "runs.json"), "--out", str(tmp_path / "o")]) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "o" / "scaling.png").stat().st_size > 1000 and out.count("1.00e+23") == 3
    assert s.main(["plan", "--flops", "1e23", "--runs", str(tmp_path / "runs.json"), "--gpu", "h100",
                   "--out", str(tmp_path / "o")]) == 0
    assert "hours on 8 h100" in (out := capsys.readouterr().out) and "times beyond" not in out
    assert s.main(["plan", "--flops", "1e25", "--runs", str(tmp_path / "runs.json"), "--out", str(tmp_path)]) == 0
    assert "times beyond the largest run" in capsys.readouterr().out
    assert s.main(["plan", "--flops", "1e25", "--runs", str(tmp_path / "runs.json"), "--law", "hoffmann",
                   "--out", str(tmp_path)]) == 2 and "give one of them" in capsys.readouterr().err


def test_api_from_the_command_line(tmp_path, capsys):
    base = ["api", "--out", str(tmp_path), "--budget", "1e18"]
    assert s.main([*base, "--parameters", "1e7", "--flops", "1e16"]) == 0
    assert s.main([*base, "--parameters", "1e7", "--flops", "1e19"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[0])["state"] == "completed" and "not within" in captured.err
    assert s.main([*base, "--final", "1e8", "3.0"]) == 0
    assert "the best" in capsys.readouterr().out


def test_study_end_to_end(tmp_path, monkeypatch, capsys):
    """The whole study with a law in place of train.py: budgets, sizes, fit, prediction, check."""
    law = s.Law(1.5, 60.0, 0.4, 120.0, 0.35)

    def backend(data, out, flags=()):
        def run(config, limit):
            N = s.cost_parameters(config["d_model"])
            return {"loss": law.loss(N, config["tokens"]), "cost": 6 * N * config["tokens"], "seconds": 0.0,
                    "tokens": config["tokens"], "parameters": N}
        return run
    monkeypatch.setattr(s, "train_backend", backend)
    monkeypatch.setattr(s, "plan_study", lambda args, run, out: (4e12, s.TrainingAPI(out / "l.jsonl", 8e13, run)))
    text = tmp_path / "text.txt"
    text.write_text("some words to train a tokenizer on, again and again.\n" * 4000)
    args = s.parse_args(["study", "--out", str(tmp_path / "o"), "--data", str(text)])
    s.study(args)
    out = capsys.readouterr().out
    error = float(re.search(r"error ([+-][\d.]+)%", out)[1])
    assert abs(error) < 0.5 and (tmp_path / "o" / "study.png").exists()
    assert len(s.read_runs(tmp_path / "o" / "runs.json")) >= 16


def test_a_study_goes_on_with_its_own_budgets(tmp_path, monkeypatch):
    """The machine is faster the second time: the budgets stay, so that the ledger's runs are found again."""
    monkeypatch.setattr(s.bpe, "token_info", lambda path: {"inputs": "0123456789"})

    def plan(cost, *flags):
        run = lambda config, limit: {"cost": cost, "loss": 3.0}  # noqa: E731
        largest, api = s.plan_study(s.parse_args(["study", *flags]), run, tmp_path)
        return largest, api.submit({"tokens": 7}, 2 * cost).get("duplicate")
    assert plan(1e12) == (pytest.approx(1.9e14, rel=0.05), None)
    assert plan(5e12) == (pytest.approx(1.9e14, rel=0.05), True)
    assert plan(5e12, "--seed", "1")[1] is None


def test_train_backend_runs_train_py(tmp_path):
    """One real run of a few steps: held-out loss near ln V, cost by the formula; a bad flag is a failed job."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a small text, with {i * i % 97} in it.\n" for i in range(6000)))
    s.bpe.prepare(tmp_path / "data", text, vocab_size=512)
    run = s.train_backend(tmp_path / "data", tmp_path / "runs", ["--batch_size", 4, "--context_length", 128,
                                                                 "--val_tokens", 2000, "--sample_tokens", 1])
    config = {**s.shape(16), "tokens": 4 * 128 * 3}
    result = run(config, 1e18)
    assert 2 < result["loss"] < 7 and result["tokens"] == 4 * 128 * 3
    assert result["cost"] == pytest.approx(6 * s.cost_parameters(16) * result["tokens"], rel=0.01)
    with pytest.raises(RuntimeError, match="not divisible"):
        run({**s.shape(16), "num_heads": 5, "tokens": 512}, 1e18)
