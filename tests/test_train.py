"""Tests of train.py: (1) equal to a naive oracle, (2) to torch and published figures, (3) invariants,
(4) accounting, (5) the run: files, resuming, signals, kills, (6) the command line and bad input.

Runs go through train.run_command in this process; those that must not (kill -9) start from a fork server that
has torch loaded already. Everything is tiny: 2 layers of width 32, a vocabulary of 300.
"""
import io, itertools, json, math, multiprocessing, os, pickle, random, re
import shlex, shutil, signal, subprocess, sys, zlib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bpe  # noqa: E402  (the scripts are flat files, not a package)
import model as M  # noqa: E402
import train as R  # noqa: E402

import torch  # noqa: E402

# tiny shapes: a second thread only waits
torch.set_num_threads(1)
close = torch.testing.assert_close
SHAPE = ("--num_layers 2 --d_model 32 --num_heads 2 --context_length 16 --batch_size 4 --val_tokens 300 "
         "--eval_tokens 100 --sample_tokens 5 --threads 1 --device cpu").split()


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder of 60 small files that no compressor and no model finds empty."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randrange(1, 7)))
             for _ in range(50)] + ["def", "return", "Größe", "🌍"]
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(" ".join(rng.choices(words, k=60)) + "\n")
    return folder


@pytest.fixture(scope="session")
def data(texts, tmp_path_factory):
    """A folder with tokenizer.json, train.bin and val.bin."""
    folder = tmp_path_factory.mktemp("data")
    bpe.prepare(folder, [texts], None, vocab_size=300, num_processes=1, log=lambda *_: None)
    return folder


@pytest.fixture(scope="session")
def tokens(data):
    tok = bpe.load_tokenizer(data / "tokenizer.json")
    return tok, bpe.load_tokens(data / "train.bin", tok), bpe.load_tokens(data / "val.bin", tok)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A short clock, no picture; one test below starts the real command."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(R, "matmul_flops", lambda *_: 1e10)
    monkeypatch.setattr(R, "plot", lambda *_: None)


def settings(*flags):
    return R.settings([*SHAPE, *map(str, flags)])[0]


def make_run(tokens, *flags):
    return R.Run(settings(*flags), *tokens)


def command(*flags):
    """train.py FLAGS in this process -> exit status."""
    try:
        R.run_command([str(f) for f in flags])
        return 0
    except SystemExit as e:
        return e.code


def go(data, out, *flags):
    return command("--data", data, "--out", out, *SHAPE, *flags)


def state_of(out):
    return M.load_checkpoint(Path(out) / "checkpoint.pt")


def records(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def without_clock(log):
    return [{k: v for k, v in r.items() if k not in ("seconds", "step_ms", "tok_s")} for r in log]


def same_state(a, b):
    """Weights, optimizer, reading position and random state, to the bit."""
    def leaves(v, at=""):
        if isinstance(v, (list, tuple)):
            v = dict(enumerate(v))
        return [x for k in v for x in leaves(v[k], f"{at}.{k}")] if isinstance(v, dict) else [(at, v)]
    parts = ("model", "optimizer", "step", "sequences", "rng", "config")
    for (key, x), (other, y) in itertools.zip_longest(*(leaves({k: s[k] for k in parts}) for s in (a, b))):
        assert key == other and (torch.equal(x, y) if torch.is_tensor(x) else x == y), key


# --- 1. optimizers and reading against naive versions -------------------------------------------------------

@pytest.mark.parametrize("lr,want,rel", [(1.0, 21.7, 0.01), (10.0, 3.53, 0.01), (100.0, 0.0, 0),
                                         (1000.0, 2.4e18, 0.03)])
def test_sgd_on_the_toy_of_the_lecture(lr, want, rel):
    """w (10,10) of 5 N(0,1), loss mean w^2, rate lr / sqrt(t + 1); the tenth loss printed."""
    torch.manual_seed(0)
    w = torch.nn.Parameter(5 * torch.randn(10, 10))
    opt = R.SGD([w], lr)
    for t in range(10):
        opt.zero_grad()
        loss = (w**2).mean()
        loss.backward()
        first = loss.item() if t == 0 else first
        opt.param_groups[0]["lr"] = lr / math.sqrt(t + 1)
        opt.step()
    assert first == pytest.approx(26.3, abs=0.05)
    # at 100 the fourth step lands on 0, but for rounding
    assert loss.item() == pytest.approx(want, rel=rel, abs=1e-20)


def follow(ours, theirs, make, steps, dtype=torch.float32, **kw):
    """Both optimizers see the same random gradients; one weight has none every third step, one never."""
    torch.manual_seed(0)
    start = [torch.randn(*s, dtype=dtype) for s in ((5, 3), (7,), (1, 1), (2,))]
    sides = [[torch.nn.Parameter(p.clone()) for p in start] for _ in range(2)]
    opts = [f([dict(params=p[:1], lr=3e-3), dict(params=p[1:])], **kw) for f, p in zip((ours, theirs), sides)]
    for t in range(steps):
        for i in range(3):
            g = make(t, start[i])
            for p in sides:
                p[i].grad = None if i == 1 and t % 3 == 0 else g.clone()
        for opt in opts:
            opt.param_groups[1]["lr"] = 1e-2 * (1 + t % 5)
            opt.step()
    return sides


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_torch_after_1000_steps(decay):
    noise = lambda t, like: torch.randn_like(like) * (1 + t % 7)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        kw = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
        ours, theirs = follow(R.AdamW, torch.optim.AdamW, noise, 1000, dtype, **kw)
        for a, b in zip(ours, theirs):
            close(a, b, atol=tolerance * max(1, b.abs().max().item()), rtol=0)
    a, b = follow(R.SGD, torch.optim.SGD, noise, 50, lr=1e-3, momentum=0.9)
    close(a, b)


def with_singular_values(rows, cols, s):
    u, _ = torch.linalg.qr(torch.randn(rows, len(s)))
    v, _ = torch.linalg.qr(torch.randn(cols, len(s)))
    return u, v, u @ torch.diag(s) @ v.T


@pytest.mark.parametrize("rows,cols", [(16, 16), (40, 8), (8, 40), (1, 30), (30, 1), (1, 1), (16, 123)])
def test_orthogonalise(rows, cols):
    torch.manual_seed(0)
    r = min(rows, cols)
    # the length of the gradient does not matter
    for size in (1e-3, 1.0, 1e4):
        u, v, g = with_singular_values(rows, cols, torch.linspace(0.1, 1, r))
        x = R.orthogonalise(size * g)
        assert x.shape == g.shape
        inside = u.T @ x @ v
        assert 0.6 < inside.diagonal().min() and inside.diagonal().max() < 1.3
        assert (inside - torch.diag(inside.diagonal())).abs().max() < 1e-3
    stack = torch.randn(3, rows, cols)
    close(R.orthogonalise(stack), torch.stack([R.orthogonalise(g) for g in stack]), atol=1e-4, rtol=1e-4)
    assert not R.orthogonalise(torch.zeros(rows, cols)).any()


def test_muon_is_momentum_then_orthogonalise():
    torch.manual_seed(0)
    w, b = torch.nn.Parameter(torch.randn(6, 20)), torch.nn.Parameter(torch.randn(6))
    twin = torch.nn.Parameter(b.detach().clone())
    opt = R.Muon([dict(params=[w], muon=True), dict(params=[b], weight_decay=0.0)], lr=0.01, momentum=0.9,
                 weight_decay=0.3)
    adam = R.AdamW([twin], lr=0.01, weight_decay=0.0)
    want, m = w.detach().clone(), 0
    for _ in range(4):
        w.grad, b.grad = torch.randn(6, 20), torch.randn(6)
        twin.grad = b.grad.clone()
        m = 0.9 * m + w.grad
        step = R.orthogonalise(w.grad + 0.9 * m) * 0.2 * math.sqrt(20)
        assert step.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.3)          # AdamW's size
        want = want * (1 - 0.01 * 0.3) - 0.01 * step
        opt.step(), adam.step()
    close(w, want)
    assert torch.equal(b, twin) and [len(opt.state[p]) for p in (w, b)] == [1, 3]


def rotation(n, seed):
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed)).double())[0]


def soap_path(start, gradient, steps=25, **kw):
    """Weights after each step of SOAP on a matrix whose gradient is a function of it."""
    w, path = torch.nn.Parameter(start.clone()), []
    opt = R.SOAP([dict(params=[w], soap=True)], lr=0.05, **kw)
    for _ in range(steps):
        w.grad = gradient(w.detach())
        opt.step()
        path.append(w.detach().clone())
    return torch.stack(path), opt.state[w]


def test_soap_takes_the_same_path_in_turned_coordinates():
    """Adam does not. A quadratic A (w - b) C, in the given coordinates and in turned ones."""
    torch.manual_seed(0)
    A, C = (torch.diag(torch.logspace(0, end, 5).double()) for end in (-2, -1))
    start, b, U, W = torch.randn(5, 5).double(), torch.randn(5, 5).double(), rotation(5, 1), rotation(5, 2)
    plain = lambda w: A @ (w - b) @ C
    turned = lambda w: U @ plain(U.T @ w @ W) @ W.T
    straight, state = soap_path(start, plain, weight_decay=0.0, every=5)
    round_trip, _ = soap_path(U @ start @ W.T, turned, weight_decay=0.0, every=5)
    close(U.T @ round_trip @ W, straight, atol=1e-6, rtol=1e-5)
    for Q in (state["QL"], state["QR"]):
        close(Q.T @ Q, torch.eye(len(Q)).double())
    adam = []
    for f, at in ((plain, start), (turned, U @ start @ W.T)):
        w = torch.nn.Parameter(at.clone())
        opt = R.AdamW([w], lr=0.05, weight_decay=0.0)
        for _ in range(25):
            w.grad = f(w.detach())
            opt.step()
        adam.append(w.detach())
    assert (U.T @ adam[1] @ W - adam[0]).abs().max() > 0.1


def test_soap_keeps_its_basis_when_it_refreshes_it():
    """The gradients' strong directions stay the same ones, so v still belongs to its columns."""
    torch.manual_seed(0)
    size = torch.logspace(0, -3, 32).double()
    w, lr, steps = torch.nn.Parameter(torch.zeros(32, 32).double()), 0.01, []
    opt = R.SOAP([dict(params=[w], soap=True)], lr=lr, weight_decay=0.0, every=10)
    for _ in range(15):
        before, w.grad = w.detach().clone(), size[:, None] * torch.randn(32, 32).double() * size
        opt.step()
        steps.append((w.detach() - before).square().mean().sqrt().item() / lr)
    assert max(steps[11:]) < 1.5 * max(steps[6:11])


def test_soap_in_the_identity_basis_is_adamw(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (None, torch.eye(len(m))))
    w, b = torch.nn.Parameter(torch.randn(3, 5)), torch.nn.Parameter(torch.randn(4))
    twins = [torch.nn.Parameter(p.detach().clone()) for p in (w, b)]
    soap = R.SOAP([dict(params=[w], soap=True), dict(params=[b])], lr=0.01, every=10**9)
    adam = R.AdamW(twins, lr=0.01)
    for i in range(20):
        for p, twin in zip((w, b), twins):
            p.grad = torch.randn_like(p)
            twin.grad = p.grad.clone()
        if i == 0:                                         # SOAP's first gradient only finds the basis
            twins[0].grad = None
        soap.step(), adam.step()
    close(w, twins[0]), close(b, twins[1], atol=0, rtol=0)
    monkeypatch.undo()
    stack = torch.randn(3, 4, 4).double()                  # experts: one basis each
    one = soap_path(stack[1], lambda w: w - 1, weight_decay=0.1)[0]
    close(soap_path(stack, lambda w: w - 1, weight_decay=0.1)[0][:, 1], one, atol=1e-6, rtol=1e-5)


def steps_of(width, base, kind):
    """Coordinate check: how far four steps move each block's output and the logits, RMS. Next = this + 1."""
    torch.manual_seed(0)
    s = settings("--steps", 9, "--optimizer", kind, "--mup_base", base, "--embedding_lr", 1, "--head_lr", 1)
    net = M.Transformer(M.ModelConfig(vocab_size=64, context_length=16, d_model=width, num_layers=2,
                                      qk_norm=True, num_heads=width // 32, d_ff=2 * width, init="mup"))
    opt, ids = R.make_optimizer(net, s), (torch.arange(16)[:, None] * 4 + torch.arange(17)) % 64
    def outputs():
        seen = []
        hooks = [b.register_forward_hook(lambda m, a, y: seen.append(y.detach())) for b in net.blocks]
        seen.append(net(ids[:, :-1]).detach())
        for h in hooks:
            h.remove()
        return seen
    first = outputs()
    for group in opt.param_groups:
        group["lr"] = 0.004 * group["scale"]
    for _ in range(4):
        M.lm_loss(net(ids[:, :-1]), ids[:, 1:])[0].backward()
        opt.step()
        opt.zero_grad()
    return torch.stack([(b - a).square().mean().sqrt() for a, b in zip(first, outputs())])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_mup_steps_have_one_size_at_any_width(kind):
    widths = (160, 320, 480) if kind == "adamw" else (160, 320)              # Newton-Schulz takes its time
    with_mup = torch.stack([steps_of(w, 160, kind) for w in widths])
    assert (with_mup.amax(0) / with_mup.amin(0)).max() < 1.2, with_mup       # flat to 20%
    without = torch.stack([steps_of(w, 0, kind) for w in widths[:2]])
    assert (without[1] / without[0]).min() > 1.25, without                   # or the check would show nothing
    assert torch.equal(with_mup[0], without[0])            # at the base width nothing changes


@pytest.mark.parametrize("kind", ["muon", "adamw", "soap", "sgd"])
def test_every_weight_is_in_one_group_and_only_hidden_matrices_decay(kind):
    for kw in (dict(bias="all", norm="layernorm", position="learned"), dict(num_experts=3, mtp=1),
               dict(layers="MH"), dict(tie_embeddings=True, qk_norm=True), {}):
        net = M.Transformer(M.ModelConfig(vocab_size=30, context_length=8, d_model=8, num_layers=2,
                                          num_heads=2, **kw))
        opt = R.make_optimizer(net, settings("--optimizer", kind))
        names, seen = {id(p): n for n, p in net.named_parameters()}, []
        for group in opt.param_groups:
            for p in group["params"]:
                seen.append(names[id(p)])
                hidden = names[id(p)].startswith(("blocks.", "mtp.")) and p.dim() >= 2
                for matrix_optimizer in ("muon", "soap"):
                    assert group.get(matrix_optimizer, False) == (kind == matrix_optimizer and hidden)
                assert (group.get("weight_decay", 0) > 0) == (hidden and kind != "sgd")
        assert sorted(seen) == sorted(names.values())


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("n,T", [(100, 7), (33, 16), (1000, 1), (257, 64)])
def test_batches(dtype, n, T):
    tokens = (np.arange(n) + (0 if dtype == np.uint16 else 70_000)).astype(dtype)
    read = lambda first, size, seed=3: R.Batches(tokens, T, seed)(first, size)
    W = R.Batches(tokens, T).windows
    assert n - 1 - 2 * T < W * T <= n - 1
    epochs = [read(e * W, W) for e in range(3)]
    for x, y in epochs:
        assert x.dtype == y.dtype == torch.int64 and x.shape == (W, T)
        # y is the next token, and from the file
        assert torch.equal(x + 1, y) and x.min() >= tokens[0] and y.max() <= tokens[-1]
        # no token twice in an epoch
        assert y.unique().numel() == W * T
    if n == 100:
        assert not torch.equal(epochs[0][0], epochs[1][0])
        assert len({x.min().item() for x, _ in epochs}) > 1                  # the cut starts elsewhere
        assert not torch.equal(read(0, W)[0], read(0, W, 4)[0])
    reader, whole = R.Batches(tokens, T, 3), torch.cat([x for x, _ in epochs])
    # one integer is the whole state
    for first in (3 * W - 2, 0, W - 1, W, 1):
        assert torch.equal(reader(first, 2)[0], whole[first:first + 2])


def test_too_few_tokens_say_what_to_do():
    with pytest.raises(ValueError, match="30 training tokens .*context.* 16.*--context_length (\\d+)") as e:
        R.Batches(np.zeros(30, np.uint16), 16)
    remedy = int(re.search(r"--context_length (\d+)", str(e.value))[1])
    assert R.Batches(np.zeros(30, np.uint16), remedy).windows >= 1


@pytest.mark.parametrize("T,n", [(8, 3), (8, 8), (8, 9), (8, 61), (7, 50), (1, 9), (2, 9), (8, 1),
                                 (5, 5 + 2 * 7)])
def test_evaluate_equals_token_by_token(T, n):
    """Each token from the context that the docstring promises: at least T/2 where there is so much."""
    torch.manual_seed(0)
    net = M.Transformer(M.ModelConfig(vocab_size=30, context_length=T, d_model=8, num_layers=1, num_heads=2,
                                      position="learned", init="glorot")).double()
    text, half, want = np.random.default_rng(0).integers(0, 29, n), max(1, T // 2), 0.0
    full = [29, *text.tolist()]
    for k in range(1, n + 1):
        start = 0 if k <= T else -(-(k - T) // half) * half
        assert k - start >= min(k, T / 2)
        want -= net(torch.tensor([full[start:k]]))[0, -1].log_softmax(-1)[full[k]].item()
    for batch in (1, 2, 3, 16):
        net.train()
        nats, count = R.evaluate(net, text.astype(np.uint16), 29, batch_size=batch)
        assert count == n and nats == pytest.approx(want, abs=1e-4) and net.training
    assert R.evaluate(net, text, 29, max_tokens=max(1, n // 2))[1] == max(1, n // 2)


def test_evaluation_has_one_shape(monkeypatch):
    """So that a compiled model is compiled for it once, and not for any shape."""
    net, shapes = M.Transformer(M.ModelConfig(vocab_size=30, context_length=8, d_model=8, num_layers=1)), set()
    net.register_forward_hook(lambda module, args, out: shapes.add(args[0].shape))
    R.evaluate(net, np.zeros(100, np.uint16), 29, batch_size=7)
    assert shapes == {(7, 8)}


def test_compiling_is_done_before_the_clock_starts(tokens, monkeypatch):
    plain, calls, real = make_run(tokens, "--steps", 5, "--dropout", 0.1), [], R.Run.gradients
    monkeypatch.setattr(torch, "compile", lambda net, dynamic: calls.append(dynamic) or net)
    monkeypatch.setattr(R.Run, "gradients", lambda run: calls.append("gradients") or real(run))
    run = make_run(tokens, "--steps", 5, "--dropout", 0.1, "--compile")
    assert calls == [False, "gradients"] and run.elapsed == run.step == 0
    assert all(p.grad is None for p in run.model.parameters())
    torch.manual_seed(0), plain.train_step(), torch.manual_seed(0), run.train_step()
    close(list(run.model.parameters()), list(plain.model.parameters()))


# --- 2. torch and published figures -------------------------------------------------------------------------

@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
def test_clipping_equals_torch(max_norm):
    torch.manual_seed(0)
    sides = [[torch.nn.Parameter(torch.zeros(s)) for s in ((3, 4), (5,), (2, 2))] for _ in range(2)]
    for a, b in zip(*sides):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    for p in sides:
        p[1].grad = None
    kept = sides[0][0].grad
    close(R.clip_gradients(sides[0], max_norm), torch.nn.utils.clip_grad_norm_(sides[1], max_norm))
    close([p.grad for p in sides[0] if p.grad is not None], [p.grad for p in sides[1] if p.grad is not None])
    assert sides[0][1].grad is None and sides[0][0].grad is kept             # in place


def test_half_precision_facts():
    total = lambda acc, x: sum((torch.tensor(0.01, dtype=x).to(acc) for _ in range(1000)),
                               torch.tensor(0.0, dtype=acc)).item()
    assert [round(total(*d), 4) for d in ((torch.float32, torch.float32), (torch.float16, torch.float16),
                                          (torch.float32, torch.float16))] == [10.0001, 9.9531, 10.0021]
    assert torch.tensor(1e-8, dtype=torch.float16) == 0 and torch.tensor(1e-8, dtype=torch.bfloat16) > 0


@pytest.mark.parametrize("name,bf16", [("NVIDIA H100 80GB HBM3", 989.5e12), ("NVIDIA H100 PCIe", 756e12),
                                       ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12),
                                       ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12),
                                       ("NVIDIA GeForce RTX 4090", None), ("NVIDIA A10G", None),
                                       ("Tesla T4", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None)])
def test_peak_flops_are_known_or_none(name, bf16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    assert R.peak_flops("cuda", "bf16") == bf16 and R.peak_flops("cpu", "bf16") is None
    assert bf16 is None or bf16 * 0.4 < R.peak_flops("cuda:0", "fp32") < bf16 * 0.6


def test_compressors_on_known_bytes():
    rng = random.Random(0)
    noise, text = rng.randbytes(20_000), b"the cat sat on the mat. " * 2000
    assert all(8 <= v < 8.3 for v in R.compressors(noise).values())
    assert all(v < 0.1 for v in R.compressors(text).values())
    raw = zlib.compressobj(9, zlib.DEFLATED, -15)
    # gzip is deflate, a header of 10 bytes and a tail of 8
    size = len(raw.compress(text) + raw.flush()) + 18
    got = R.compressors(text, noise)
    assert got["gzip -9"] == 8 * size / len(text) and len(R.compressors(text)) == 3 and len(got) == 4
    after = R.compressors(noise, noise)
    assert after.keys() - {"gzip -9", "bzip2 -9", "xz -9e"} and min(after.values()) < 0.2
    assert R.compressors(b"")


# --- 3. invariants ------------------------------------------------------------------------------------------

def test_schedules():
    grid = np.linspace(0, 1, 2001)
    for f, final in ((R.cosine, 0.1), (R.wsd, 0.0), (R.cosine, 0.0), (R.wsd, 0.3)):
        for warmup in (0.0, 0.02, 0.25):
            lr = np.array([f(p, warmup, final) for p in grid])
            up = grid < warmup
            assert lr[-1] == pytest.approx(final, abs=1e-12) and lr.max() <= 1 + 1e-12 and lr.min() >= 0
            assert np.allclose(lr[up], grid[up] / max(warmup, 1e-9))
            assert f(warmup, warmup, final) == pytest.approx(1)
            # no jump
            assert (np.diff(lr[~up]) <= 1e-12).all()
            assert np.abs(np.diff(lr)).max() <= 1.001 * (grid[1] / warmup if warmup else 0.01)
    assert {R.wsd(p) for p in np.linspace(0.02, 0.599, 50)} == {1.0} and R.wsd(0.8) == pytest.approx(0.5)
    assert R.cosine(0.51) == pytest.approx(0.55) and R.constant(0.01, 0.02) == 0.5
    assert R.constant(0.9) == R.constant(0.0, 0.0) == 1
    assert R.cosine(1.5) == pytest.approx(0.1) and R.wsd(1.5) == 0           # a step that ends late


@pytest.mark.parametrize("schedule,last", [("cosine", 0.1), ("wsd", 0.0), ("constant", 1.0)])
def test_the_schedule_ends_exactly_at_the_last_step(schedule, last, tokens):
    run = make_run(tokens, "--steps", 7, "--schedule", schedule, "--final_lr", last, "--lr", 1e-3,
                   "--optimizer", "adamw", "--head_lr", 1)
    rates = [run.train_step()["lr"] for _ in range(7)]
    assert run.progress() == 1 and rates[-1] == pytest.approx(1e-3 * last, abs=1e-12) and rates[0] > 0
    assert max(rates) <= 1e-3
    head = next(g for g in run.optimizer.param_groups if run.model.head.weight in set(g["params"]))
    assert head["lr"] == pytest.approx(rates[-1] * head["scale"])


def gradients(tokens, *flags):
    run = make_run(tokens, "--steps", 9, "--init", "glorot", *flags)
    loss = run.gradients().item()
    return run, loss, {n: p.grad.clone() for n, p in run.model.named_parameters()}


@pytest.mark.parametrize("z", [0.0, 0.1])
def test_accumulated_gradients_equal_those_of_the_big_batch(z, tokens):
    _, loss, want = gradients(tokens, "--z_loss", z)
    for micro in (1, 2, 4):
        _, other, got = gradients(tokens, "--z_loss", z, "--micro_batch", micro)
        assert other == pytest.approx(loss, rel=1e-5)
        close(got, want, atol=1e-5, rtol=1e-5)
    close(gradients(tokens, "--z_loss", z, "--checkpoint_blocks")[2], want, atol=1e-6, rtol=1e-6)


def test_checkpointed_blocks_keep_fewer_bytes(tokens):
    kept = []
    for flag in ("--checkpoint_blocks", "--no-checkpoint_blocks"):
        run = make_run(tokens, "--steps", 9, flag)
        with M.count_saved_bytes(run.model) as bytes_kept:
            loss = run.model(run.batches(0, 4)[0]).sum()
        kept.append(sum(bytes_kept.values()))
        del loss
    assert kept[0] < kept[1] / 3


def test_noise_scale_is_unbiased_on_gaussian_gradients():
    rng, d, small, big = np.random.default_rng(0), 40, 4, 32
    mean, sigma = rng.normal(size=d) * 0.3, rng.uniform(0.5, 2, size=d)
    squared = lambda b: np.mean(np.square(mean + sigma * rng.normal(size=(20_000, d)) / math.sqrt(b)).sum(1))
    assert R.noise_scale(squared(small), squared(big), small,
                         big) == pytest.approx((sigma**2).sum() / (mean**2).sum(), rel=0.03)
    assert R.noise_scale(1.0, 1.0, 1, 8) == 0 and R.noise_scale(1.0, 0.1, 1, 8) == math.inf


def test_noise_scale_reads_the_two_gradients(tokens, monkeypatch):
    run = make_run(tokens, "--steps", 9, "--init", "glorot", "--micro_batch", 1, "--noise_scale")
    norm = lambda grads: sum(g.square().sum().item() for g in grads.values())
    run.train_step()
    small = make_run(tokens, "--steps", 9, "--init", "glorot", "--batch_size", 1)
    small.gradients()
    assert run.noise[0] == pytest.approx(norm({n: p.grad for n, p in small.model.named_parameters()}),
                                         rel=1e-4)
    assert run.noise[1] == pytest.approx(norm(gradients(tokens)[2]), rel=1e-4)
    monkeypatch.setattr(M, "lm_loss", poisoned(M.lm_loss, {0}))
    run.train_step()
    # one bad step does not spoil the average
    assert all(map(math.isfinite, run.noise))


def test_overfits_one_batch(tokens):
    run = make_run(tokens, "--steps", 120)
    batch = run.batches(0, 4)
    run.batches = lambda first, size, device: batch
    losses = [run.train_step()["loss"] for _ in range(120)]
    assert losses[0] == pytest.approx(math.log(300), abs=1e-4) and losses[-1] < 0.05


def poisoned(loss, calls, value=math.nan):
    """lm_loss that is `value` times the truth in the calls with these numbers."""
    count = itertools.count()
    def wrong(*a):
        ce, objective = loss(*a)
        bad = next(count) in calls
        return (ce * value, objective * value) if bad else (ce, objective)
    return wrong


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_step_changes_no_weight(value, tokens, monkeypatch):
    run = make_run(tokens, "--steps", 9)
    run.train_step()
    def copy():
        states = [v for s in run.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
        return [t.clone() for t in (*run.model.state_dict().values(), *states)]
    before = copy()
    monkeypatch.setattr(M, "lm_loss", poisoned(M.lm_loss, {0, 1}, value))
    assert [run.train_step()["step"], run.bad_steps] == [2, 1]
    assert [run.train_step()["step"], run.bad_steps] == [3, 2]
    assert all(map(torch.equal, before, copy())) and all(p.grad is None for p in run.model.parameters())
    fields = run.train_step()
    assert run.bad_steps == 0 and math.isfinite(fields["loss"]) and not all(map(torch.equal, before, copy()))
    assert run.sequences == 16


# --- 4. accounting ------------------------------------------------------------------------------------------

def test_bits_per_byte(data, tokens):
    tok, train, val = tokens
    info = [json.loads((data / f"{part}.json").read_text()) for part in ("train", "val")]
    assert [R.token_bytes(tok)[ids].sum() for ids in (train, val)] == [i["bytes"] for i in info]
    uniform = M.Transformer(M.ModelConfig(vocab_size=300, context_length=16, d_model=8, num_layers=1,
                                          num_heads=2))
    nats, n = R.evaluate(uniform, val, tok.eot_id)
    assert n == len(val)
    assert R.bits_per_byte(nats, info[1]["bytes"]) == pytest.approx(n * math.log2(300) / info[1]["bytes"],
                                                                    rel=1e-5)


@pytest.mark.parametrize("kind", ["muon", "adamw", "sgd"])
def test_memory_plan_predicts_what_is_there(kind, tokens):
    run = make_run(tokens, "--steps", 9, "--optimizer", kind, "--no-qk_norm", "--norm", "none")
    plan = R.memory_plan(run.config, run.s)
    with M.count_saved_bytes(run.model) as kept:
        run.gradients()
    run.optimizer.step()
    weights = list(run.model.parameters())
    assert plan["weights"] == sum(p.nbytes for p in weights)
    assert plan["gradients"] == sum(p.grad.nbytes for p in weights)
    states = sum(t.nbytes for s in run.optimizer.state.values() for t in s.values() if torch.is_tensor(t))
    assert plan["optimizer"] == pytest.approx(states, rel=1e-6)
    assert plan["activations"] == pytest.approx(sum(kept.values()), rel=2e-3)
    assert plan["gradient of logits"] == 4 * 4 * 16 * 300


# --- 5. the run ---------------------------------------------------------------------------------------------

def test_end_to_end_in_a_fresh_process(texts, tmp_path):
    """The real command on a folder of text; then again: it reuses the tokens and keeps the old checkpoint."""
    flags = [*SHAPE, "--data", str(texts), "--vocab_size", "300", "--steps", "8", "--evals", "2",
             "--log_seconds", "0"]
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], cwd=tmp_path, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    for word in ("config", "batch    64 tok = 4 seq x 16 x 1", "memory", "budget   8 steps", "gzip -9",
                 "bzip2 -9", "xz -9e", "ln V", "bits/byte", "Sample", "mfu n/a", "tok/s", "seed 0"):
        assert word in done.stdout, word
    assert (out / "loss.png").stat().st_size > 5000 and {"tokenizer.json", "train.bin", "val.bin",
                                                         "checkpoint.pt", "log.jsonl"} <= set(os.listdir(out))
    log = records(out)
    assert [r["step"] for r in log if r["kind"] == "train"] == list(range(1, 9))
    assert [r["tokens"] for r in log if r["kind"] == "train"] == [64 * i for i in range(1, 9)]
    vals = [r for r in log if r["kind"] == "val"]
    assert vals[0]["step"] == 0 and vals[0]["val_loss"] == pytest.approx(math.log(300), abs=1e-4)
    assert vals[-1]["step"] == 8 and [v["scored"] for v in vals] == [100, 300, 100, 100, 300]
    assert vals[-1]["val_loss"] < vals[0]["val_loss"]
    tok = bpe.load_tokenizer(out / "tokenizer.json")
    val = bpe.load_tokens(out / "val.bin", tok)[:300]
    nats, n = R.evaluate(M.load_model(out / "checkpoint.pt"), val, tok.eot_id)
    assert nats / n == pytest.approx(vals[-1]["val_loss"], rel=1e-5)
    assert R.bits_per_byte(nats,
                           R.token_bytes(tok)[val].sum()) == pytest.approx(vals[-1]["val_bpb"], rel=1e-5)
    assert f"{vals[-1]['val_bpb']:.3f} bits/byte" in done.stdout
    again = io.StringIO()
    sys.stdout, keep = again, sys.stdout
    try:
        assert command(*flags[:-4], "--out", out) == 0
    finally:
        sys.stdout = keep
    assert "reusing" in again.getvalue() and "checkpoint.old.pt" in again.getvalue()
    # another process, the same weights
    same_state(M.load_checkpoint(out / "checkpoint.old.pt"), state_of(out))


def test_same_seed_same_log(data, tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert go(data, tmp_path / out, "--steps", 5, "--evals", 2, "--seed", seed, "--dropout", 0.1,
                  "--micro_batch", 2) == 0
    a, b, c = (without_clock(records(tmp_path / out)) for out in "abc")
    assert a == b != c and len(a) == 5 + 5
    same_state(state_of(tmp_path / "a"), state_of(tmp_path / "b"))


FOUR = ("--steps", 4, "--dropout", 0.1, "--evals", 0, "--schedule", "constant", "--warmup", 0)


@pytest.fixture(scope="session")
def undisturbed(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert go(data, out, *FOUR) == 0
    return out


def test_two_and_two_steps_are_four(data, undisturbed, tmp_path, capsys):
    assert go(data, tmp_path, "--steps", 2, *FOUR[2:]) == 0 and state_of(tmp_path)["step"] == 2
    assert command("--resume", "--out", tmp_path, "--steps", 4) == 0
    same_state(state_of(undisturbed), state_of(tmp_path))
    train = lambda out: [r for r in without_clock(records(out)) if r["kind"] == "train"]
    assert train(tmp_path) == train(undisturbed)
    # nothing left to do: the report again
    assert command("--resume", "--out", tmp_path) == 0
    same_state(state_of(undisturbed), state_of(tmp_path))
    steps = [(r["kind"], r["step"], r.get("scored")) for r in records(tmp_path)]
    assert len(set(steps)) == len(steps), steps


@pytest.mark.parametrize("number,status,at", [(signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 1),
                                              (signal.SIGINT, 130, 4), (signal.SIGTERM, 143, 0)])
def test_signals_save_and_say_how_to_go_on(number, status, at, data, undisturbed, tmp_path, monkeypatch,
                                           capsys):
    out, step, validate = tmp_path / "my run", R.Run.train_step, R.Run.validate
    def signalled(run, f, due):
        if due:
            os.kill(os.getpid(), number)
        return f()
    monkeypatch.setattr(R.Run, "train_step",
                        lambda run: signalled(run, lambda: step(run), run.step + 1 == at))
    monkeypatch.setattr(R.Run, "validate",
                        lambda run, n: signalled(run, lambda: validate(run, n), at == run.step == 0))
    assert go(data, out, *FOUR) == status and state_of(out)["step"] == at
    err = capsys.readouterr().err
    line = re.search(r"python train\.py (.*)", err)[1]
    assert signal.Signals(number).name in err and err.strip().count("\n") == 0
    monkeypatch.undo()
    monkeypatch.setattr(R, "plot", lambda *_: None)
    assert command(*shlex.split(line)) == 0
    same_state(state_of(undisturbed), state_of(out))
    assert without_clock(records(out)) == without_clock(records(undisturbed))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL                # the handlers are given back


def test_a_second_interrupt_leaves_at_once(data, tmp_path, monkeypatch, capsys):
    def twice(run):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still running")
    monkeypatch.setattr(R.Run, "train_step", twice)
    assert go(data, tmp_path, *FOUR) == 130
    assert "Traceback" not in capsys.readouterr().err


def killed_while_saving(argv, call, share):
    """train.py ARGV in a process that dies by kill -9 in that save, this share of the file written."""
    save, calls = torch.save, itertools.count(1)
    def dies(state, f):
        if next(calls) == call:
            whole = io.BytesIO()
            save(state, whole)
            f.write(whole.getvalue()[:int(share * whole.tell())])
            f.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, f)
    torch.save = dies
    R.run_command(argv)


def test_kill_9_at_any_moment_loses_nothing(data, tmp_path):
    """With --save_minutes 0 every step saves. Killed in saves and at random moments, again and again."""
    flags = [*map(str, ("--data", data)), *SHAPE, "--steps", "12", "--save_minutes", "0", "--evals", "3",
             "--dropout", "0.1"]
    assert command(*flags, "--out", tmp_path / "calm") == 0
    out, rng, kills = tmp_path / "killed", random.Random(0), 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", __name__])
    plans = [(1, 0.5), (3, 0.0), (2, 0.99), (2, 1.0), (1, 0.3), (2, 0.7), *[None] * 40]
    for plan in plans:
        argv = ["--resume"] if (out / "checkpoint.pt").exists() else list(flags)
        argv += ["--out", str(out)]
        process = (context.Process(target=killed_while_saving, args=(argv, *plan)) if plan else
                   context.Process(target=R.run_command, args=(argv,)))
        process.start()
        process.join(60 if plan or kills > 7 else rng.uniform(0.2, 1.5))
        if process.is_alive():
            process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        if (out / "checkpoint.pt").exists():
            state_of(out)                                                    # always whole
    assert process.exitcode == 0 and kills >= 6
    same_state(state_of(tmp_path / "calm"), state_of(out))
    log = [r for r in without_clock(records(out)) if r["kind"] == "train"]
    assert log == [r for r in without_clock(records(tmp_path / "calm")) if r["kind"] == "train"]
    assert not [f for f in os.listdir(out) if "tmp" in f]


def test_the_log_is_cut_where_a_resumed_run_starts(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [json.dumps(dict(kind="train", step=i)) + "\n" for i in range(1, 6)]
    path.write_text("".join(lines) + '{"kind": "tra')                        # a half-written line
    R.trim_log(path, 3)
    assert path.read_text() == "".join(lines[:3]) and os.listdir(tmp_path) == ["log.jsonl"]
    R.trim_log(tmp_path / "none.jsonl", 3)


def test_bad_steps_in_a_row_stop_the_run(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(M, "lm_loss", poisoned(M.lm_loss, {2, 4, 5, 6}))
    assert go(data, tmp_path, "--steps", 20, "--max_bad_steps", 3, "--lr", 0.03) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "3 steps in a row" in err and "step 7" in err
    assert re.search(r"--lr \S*\d", err) and "--clip" in err
    assert state_of(tmp_path)["step"] == 7
    assert all(t.isfinite().all() for t in state_of(tmp_path)["model"].values())
    monkeypatch.undo()


def test_minutes_are_the_budget(data, tmp_path):
    assert go(data, tmp_path, "--minutes", 0.02, "--evals", 0) == 0
    log = [r for r in records(tmp_path) if r["kind"] == "train"]
    assert 1.2 <= log[-1]["seconds"] < 1.2 + 10 * max(r["step_ms"] for r in log) / 1000 and len(log) > 5
    assert log[-1]["lr"] < 0.3 * max(r["lr"] for r in log)                   # the decay ends with the clock


def test_tokens_are_the_budget(data, tmp_path):
    assert go(data, tmp_path, "--tokens", 200) == 0 and state_of(tmp_path)["step"] == 4          # 64 a step


def test_sweep_runs_each_combination_once(data, tmp_path, monkeypatch, capsys):
    argv = ["--steps", 2, "--evals", 0, "--sweep", "lr=0.01,0.02", "qk_norm=True,False"]
    calls, real = [], R.train
    monkeypatch.setattr(R, "train", lambda s, *a, **kw: calls.append((s.lr, s.qk_norm)) or real(s, *a, **kw))
    assert go(data, tmp_path, *argv) == 0
    assert calls == [(0.01, True), (0.01, False), (0.02, True), (0.02, False)]
    table = lambda: [re.split(r"\s{2,}", line.strip())[:4]
                     for line in capsys.readouterr().out.partition("variant")[2].splitlines()[1:]]
    first, path = table(), tmp_path / "sweep" / "results.jsonl"
    assert len(first) == 4 and [float(r[2]) for r in first] == sorted(float(r[2]) for r in first)
    lines = [line + "\n" for line in path.read_text().splitlines() if line]
    # killed while writing the last result
    path.write_text("".join(lines[:3]) + lines[3][:40])
    assert go(data, tmp_path, *argv) == 0 and calls[4:] == [(0.02, False)] and table() == first
    assert go(data, tmp_path, *argv) == 0 and len(calls) == 5                # all on disk


def test_a_run_that_ends_diverged_says_so(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(R, "evaluate", lambda *a: (math.nan, 300))
    assert go(data, tmp_path, "--steps", 1) == 1
    assert re.fullmatch(r"train.py: stopped: .*diverged. Try --lr [\d.e-]+\n", capsys.readouterr().err)


def test_sweep_over_a_budget(data, tmp_path, monkeypatch):
    calls, real = [], R.train
    monkeypatch.setattr(R, "train", lambda s, *a, **kw: calls.append((s.steps, s.minutes)) or real(s, *a, **kw))
    assert go(data, tmp_path, "--minutes", 1, "--evals", 0, "--sweep", "steps=1,2") == 0
    assert calls == [(1, 0), (2, 0)]


def test_ablations_are_valid_and_a_diverged_run_is_a_result(data, tmp_path, monkeypatch, capsys):
    for label, change in R.ABLATIONS:
        s = settings("--ablate")
        assert all(hasattr(s, k) or k in M.asdict(M.ModelConfig()) for k in change), label
        M.model_config(R.argparse.Namespace(**{**vars(s), **change}))
    monkeypatch.setattr(R, "ABLATIONS", [("the default", {}), ("no norm", dict(norm="none"))])
    def fails(s, *a, **kw):
        if getattr(s, "norm", "") == "none":
            raise FloatingPointError("3 steps in a row")
        return real(s, *a, **kw)
    real = R.train
    monkeypatch.setattr(R, "train", fails)
    assert go(data, tmp_path, "--ablate", "--steps", 1, "--evals", 0) == 0
    out = capsys.readouterr().out
    assert "run   6/6" in out and "no norm" in out and "inf" in out


def test_bakeoff_spends_the_same_flops_on_each(texts, data, tmp_path, monkeypatch, capsys):
    s = R.settings(["--bakeoff"])[0]
    R.check(s)
    shapes = [M.model_config(R.argparse.Namespace(**{**vars(s), **change})) for _, change in R.BAKEOFF]
    assert len({str(c) for c in shapes}) == len(R.BAKEOFF)
    monkeypatch.setattr(R, "BAKEOFF", [("attention", {}), ("linear", dict(mixer="linear")),
                                       ("experts", dict(num_experts=4))])
    runs, real = [], R.train
    def spy(s, *a, **kw):
        r = real(s, *a, **kw)
        runs.append((r["run"].config, r["run"].tokens, s.val_tokens, kw))
        return r
    monkeypatch.setattr(R, "train", spy)
    argv = ["--data", texts, "--vocab_size", 300, "--out", tmp_path, *SHAPE, "--bakeoff", "--tokens", 2000]
    assert command(*argv) == 0
    out = capsys.readouterr().out
    assert len(runs) == 8 and (tmp_path / "bakeoff.png").stat().st_size > 5000
    budget = M.train_flops(runs[0][0], 2000)
    for config, tokens, *_ in runs:                        # in whole steps of 64 tokens
        assert -1 < tokens - budget / M.train_flops(config, 1) < 64
    assert runs[-1][0].vocab_size == 257 and "attention, on bytes" in out
    # the same held-out text: its bytes, and one end of text a document
    tok = bpe.load_tokenizer(tmp_path / "tokenizer.json")
    held = bpe.load_tokens(tmp_path / "val.bin", tok)[:300]
    by_byte = bpe.load_tokens(tmp_path / "bytes" / "val.bin")[:runs[-1][2]]
    assert tok.decode_bytes(held[held != tok.eot_id]) == bytes(by_byte[by_byte < 256].astype("uint8"))
    assert command(*argv) == 0 and len(runs) == 8          # all on disk
    assert go(data, tmp_path / "files", "--bakeoff", "--tokens", 64) == 0 and len(runs) == 14        # no text
    folders, files = set(), [texts / "00.txt", texts / "01.txt"]             # a corpus is fetched into one folder
    monkeypatch.setattr(bpe, "fetch", lambda name, out, progress=False: folders.add(out) or files)
    monkeypatch.setattr(R, "BAKEOFF", [("attention", {})])
    assert command("--corpus", "some", "--vocab_size", 260, "--out", tmp_path / "corpus", *SHAPE, "--bakeoff",
                   "--tokens", 64) == 0 and folders == {str(tmp_path / "corpus")}


def test_training_on_bytes(texts, data, tmp_path, capsys):
    assert command("--data", texts, "--tokenizer", "bytes", "--out", tmp_path, *SHAPE, "--steps", 2) == 0
    assert state_of(tmp_path)["config"]["vocab_size"] == 257
    assert "1.0" in re.search(r"val.bin: .*?([\d.]+) bytes per token", capsys.readouterr().out)[1]
    assert command("--resume", "--out", tmp_path, "--steps", 3) == 0
    capsys.readouterr()
    status = go(data, tmp_path / "o", "--steps", 1, "--tokenizer", "bytes")
    assert "drop --tokenizer bytes" in line_of(capsys, status)


def test_experts_and_extra_tokens_train_and_resume(data, tmp_path):
    flags = ("--num_experts", 4, "--balance", "bias", "--mtp", 1, "--evals", 0, "--schedule", "constant",
             "--warmup", 0, "--optimizer", "soap")
    assert go(data, tmp_path / "a", *flags, "--steps", 4) == 0
    assert go(data, tmp_path / "b", *flags, "--steps", 2) == 0
    assert command("--resume", "--out", tmp_path / "b", "--steps", 4) == 0
    same_state(state_of(tmp_path / "a"), state_of(tmp_path / "b"))
    bias = state_of(tmp_path / "a")["model"]["blocks.0.ffn.bias"]
    assert bias.abs().max() > 0.0005                       # moved by the training loop
    log = records(tmp_path / "a")
    assert [r["loss"] for r in log if r["kind"] == "train"][0] == pytest.approx(math.log(300), abs=1e-4)
    assert "dropped" not in log[-1]


def test_full_experts_are_reported(data, tmp_path, capsys):
    """With room for an eighth of its share each of 4 experts drops seven visits of eight, if all get some."""
    assert go(data, tmp_path, "--num_experts", 4, "--capacity_factor", 0.125, "--steps", 2, "--evals", 0,
              "--log_seconds", 0) == 0
    dropped = [r["dropped"] for r in records(tmp_path) if r["kind"] == "train"]
    assert len(dropped) == 2 and all(0.85 < share < 1 for share in dropped)
    assert " | dropped " in capsys.readouterr().out


def test_runs_from_before_the_variants_resume(data, undisturbed, tmp_path):
    out = tmp_path / "old"
    shutil.copytree(undisturbed, out)
    state = state_of(out)
    for key in ("mup_base", "bakeoff"):
        del state["settings"][key]
    for key in ("layers", "num_experts", "mtp", "router", "d_head"):
        del state["config"][key]
    torch.save(state, out / "checkpoint.pt")
    assert command("--resume", "--out", out, "--steps", 5) == 0 and state_of(out)["step"] == 5


# --- 6. the command line and bad input ----------------------------------------------------------------------

def line_of(capsys, status):
    """What the user reads after a mistake: one line on stderr, status 2."""
    err = capsys.readouterr().err
    assert status == 2 and err.count("\n") == 1 and err.startswith("train.py: error: "), err
    return err


@pytest.mark.parametrize("flags,words", [
    (["--learning_rate", 1], "unrecognized"), (["--steps", "many"], "many"), (["--lr", "nan"], "--lr nan"),
    (["--lr", -1], "--lr -1"), (["--step", 5], "unrecognized"),
    (["--steps", 5, "--minutes", 1], "one budget"), (["--steps", 0], "one budget"),
    (["--minutes", -1], "--minutes -1"), (["--minutes", "inf"], "--minutes inf"),
    (["--steps", 5, "--batch_size", 6, "--micro_batch", 4],
     "--batch_size 6 is not a multiple of --micro_batch 4: try --batch_size 8"),
    (["--steps", 5, "--batch_size", 0], "--batch_size 0"), (["--steps", 5, "--noise_scale"], "--micro_batch"),
    (["--steps", 5, "--beta1", 1.0], "--beta1"), (["--steps", 5, "--threads", 10**8], "--threads 100000000"),
    (["--steps", 5, "--seed", 2**63], "--seed 9223372036854775808"), (["--steps", 5, "--lr", 1e300], "--lr"),
    (["--ablate", "--bakeoff"], "--ablate and --bakeoff"), (["--steps", 5, "--prompt", "\udce9"], "--prompt"),
    (["--steps", 5, "--sweep", "help=1"], "--sweep help"),
    (["--steps", 5, "--sweep", "resume=True"], "--sweep resume"),
    (["--steps", 5, "--d_model", 33], "num_heads"), (["--steps", 5, "--device", "tpu"], "tpu"),
    (["--steps", 5, "--schedule", "linear"], "linear"),
    (["--steps", 5, "--context_length", 1_000_000], "--context_length"),
    (["--steps", 5, "--sweep", "lrr=1,2"], "lrr"), (["--steps", 5, "--sweep", "lr"], "lr"),
    (["--steps", 5, "--sweep", "d_model=33,32"], "33"), (["--steps", 5, "--preset", "huge"], "huge"),
    (["--steps", 5, "--corpus", "the-web"], "the-web"), (["--steps", 5, "--mup_base", -1], "--mup_base -1"),
    (["--steps", 5, "--mup_base", 16, "--tie_embeddings"], "--no-tie_embeddings"),
    (["--steps", 5, "--layers", "LG"], "--window 128"),
    (["--resume"], "checkpoint.pt: make one with"),
    (["--steps", 5, "--tokenizer", "none.json"], "none.json")],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else "")
def test_bad_flags(flags, words, data, tmp_path, capsys):
    assert words in line_of(capsys, go(data, tmp_path, *flags))


def test_a_remedy_can_be_followed(data, tmp_path, capsys):
    err = line_of(capsys, go(data, tmp_path, "--steps", 1, "--context_length", 1_000_000))
    assert go(data, tmp_path, "--steps", 1, "--batch_size", 1, "--context_length",
              re.search(r"--context_length (\d+)", err)[1]) == 0


def test_bad_text(texts, tmp_path, capsys):
    good, bad = texts / "00.txt", tmp_path / "bad.txt"
    run = lambda *flags: command("--data", bad, "--val", good, "--vocab_size", 300, "--out", tmp_path / "out",
                                 *SHAPE, "--steps", 1, *flags)
    assert "bad.txt" in line_of(capsys, run())                               # missing
    for content, words in ((b"", "empty"), (b"abc\0def" * 100, "offset 3"),
                           (b"fine \xff\xfe" * 300, "byte 5")):
        bad.write_bytes(content)
        err = line_of(capsys, run())
        assert "bad.txt" in err and words in err
    assert "--errors replace" in err and run("--errors", "replace") == 0     # the invalid UTF-8
    assert (tmp_path / "out" / "checkpoint.pt").exists()
    bad.write_text("some words " * 400)
    assert "100" in line_of(capsys, run("--vocab_size", 100)) and run() == 0
    (tmp_path / "empty").mkdir()
    assert "empty" in line_of(capsys, command("--data", tmp_path / "empty", "--out", tmp_path / "o", *SHAPE,
                                              "--steps", 1))


def test_a_corpus_by_name(texts, tmp_path, monkeypatch):
    """One that is fetched as (training, validation) files."""
    train, val = tmp_path / "t.txt", tmp_path / "v.txt"
    train.write_text("".join((texts / f"{i:02}.txt").read_text() for i in range(20)))
    val.write_text((texts / "30.txt").read_text())
    monkeypatch.setattr(bpe, "fetch", lambda name, out, **kw: [train, val])
    assert command("--corpus", "tinystories", "--vocab_size", 300, "--out", tmp_path / "out", *SHAPE,
                   "--steps", 1) == 0
    tok = bpe.load_tokenizer(tmp_path / "out" / "tokenizer.json")
    assert tok.decode_bytes(bpe.load_tokens(tmp_path / "out" / "val.bin",
                                            tok)[:-1]).decode() == val.read_text()


def test_bad_token_files(data, texts, tmp_path, capsys):
    fresh = lambda name: shutil.copytree(data, tmp_path / name)
    one = fresh("truncated")
    (one / "train.bin").write_bytes((one / "train.bin").read_bytes()[:-3])
    assert "train.bin" in line_of(capsys, go(one, tmp_path / "o", "--steps", 1))
    two, info = fresh("dtype"), json.loads((data / "val.json").read_text())
    (two / "val.json").write_text(json.dumps({**info, "dtype": "uint32"}))
    assert "uint32" in line_of(capsys, go(two, tmp_path / "o", "--steps", 1))
    three = fresh("tokenizer")
    bpe.prepare(three / "other", [texts / "01.txt"], [texts / "02.txt"], vocab_size=290, num_processes=1,
                log=lambda *_: None)
    shutil.copy(three / "other" / "tokenizer.json", three / "tokenizer.json")
    assert "made with" in line_of(capsys, go(three, tmp_path / "o", "--steps", 1))
    (three / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in line_of(capsys, go(three, tmp_path / "o", "--steps", 1))
    (fresh("gone") / "val.bin").unlink()
    assert "val.bin" in line_of(capsys, go(tmp_path / "gone", tmp_path / "o", "--steps", 1))
    assert not (tmp_path / "o" / "checkpoint.pt").exists()


class Payload:
    def __reduce__(self):
        return print, ("code in a pickle ran",)


def test_bad_checkpoints_on_resume(data, undisturbed, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    path = out / "checkpoint.pt"
    resume = lambda *flags: line_of(capsys, command("--resume", "--out", out, *flags))
    for flags, words in ((["--d_model", 64], "d_model=32, not 64"), (["--lr", 1], "lr"),
                         (["--no-qk_norm"], "qk_norm"), (["--data", tmp_path], "data"),
                         (["--steps", 4, "--minutes", 1], "one budget")):
        assert words in resume(*flags)
    assert command("--resume", "--out", out, "--d_model", 32) == 0           # the same value is no change
    whole = path.read_bytes()
    for content, words in ((whole[:len(whole) // 2], "truncated"), (b"", "truncated"),
                           (pickle.dumps(Payload()), "refused")):
        path.write_bytes(content)
        assert words in resume() and path.read_bytes() == content
    torch.save(dict(torch.load(io.BytesIO(whole), weights_only=True), step=Payload()), path)
    assert "refused" in resume()
    M.save_checkpoint(path, M.Transformer(M.ModelConfig(vocab_size=300, d_model=32, num_heads=2,
                                                        num_layers=1)))
    assert "no training" in resume()
    state = torch.load(io.BytesIO(whole), weights_only=True)
    for key in ("rng", "sequences", "optimizer", "tokenizer"):               # as another script leaves it
        torch.save({k: v for k, v in state.items() if k != key}, path)
        assert "no training run to resume" in resume()
    for change in (dict(tokenizer="0123"), dict(model={k: v for k, v in state["model"].items()
                                                       if "wo" not in k})):
        torch.save({**state, **change}, path)
        resume()
    assert "code in a pickle ran" not in capsys.readouterr().out


def test_a_folder_that_cannot_be_written(data, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert "file" in line_of(capsys, go(data, tmp_path / "file" / "out", "--steps", 1))


def test_a_closed_pipe_does_not_cost_the_weights(data, tmp_path, monkeypatch, capsys):
    def closed(*_):
        raise BrokenPipeError(32, "Broken pipe")
    monkeypatch.setattr(R, "log_line", closed)
    assert "Broken pipe" in line_of(capsys, go(data, tmp_path, "--steps", 3, "--log_seconds", 0))
    assert state_of(tmp_path)["step"] == 1
    monkeypatch.undo()
    assert command("--resume", "--out", tmp_path) == 0 and state_of(tmp_path)["step"] == 3


def test_two_runs_do_not_share_a_folder(data, tmp_path, capsys):
    with R.alone_in(tmp_path):
        assert "another train.py" in line_of(capsys, go(data, tmp_path, "--steps", 1))
    assert go(data, tmp_path, "--steps", 1) == 0           # and the lock is free again


def test_held_out_text_that_is_none(texts, tmp_path, capsys):
    (tmp_path / "val.txt").write_text(bpe.EOT * 3)
    flags = ("--data", texts, "--val", tmp_path / "val.txt", "--out", tmp_path / "out", "--vocab_size", 300)
    assert "no text" in line_of(capsys, command(*flags, *SHAPE, "--steps", 1))
    (tmp_path / "val.txt").write_text(bpe.EOT * 3 + "some text")           # the first tokens have no bytes
    assert command(*flags, *SHAPE, "--eval_tokens", 2, "--steps", 3, "--evals", 3) == 0


def test_a_disk_full_while_saving(data, tmp_path, monkeypatch, capsys):
    assert go(data, tmp_path, *FOUR) == 0
    old, save = (tmp_path / "checkpoint.pt").read_bytes(), torch.save
    def full(state, f):
        f.write(b"half of it")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    err = line_of(capsys, command("--resume", "--out", tmp_path, "--steps", 6))
    assert "No space left" in err and "checkpoint.pt" in err
    assert (tmp_path / "checkpoint.pt").read_bytes() == old
    monkeypatch.setattr(torch, "save", save)
    assert command("--resume", "--out", tmp_path, "--steps", 6) == 0 and state_of(tmp_path)["step"] == 6


def test_presets_and_docstring_commands():
    for name in M.PRESETS:
        s = R.settings(["--preset", name] + ([] if name in R.TRAINING else ["--steps", "9"]))[0]
        R.check(s)
        assert M.model_config(s) == M.ModelConfig(**M.PRESETS[name])
    lines = re.findall(r"python train\.py([^#\n]*)", R.__doc__)
    assert len(lines) >= 4
    for line in lines:
        R.check(R.settings(shlex.split(line))[0])
    for action in R.make_parser()._actions:
        assert action.help, action.dest
    assert settings("--steps", 5).minutes == 0 and R.settings([])[0].minutes > 0
    assert R.settings(["--preset", "gpt2", "--lr", "1"])[0].lr == 1
    plain, recipe = (M.num_params(M.ModelConfig(**M.PRESETS[n])) for n in ("tiny", "gpt2-recipe"))
    # the two recipes are compared as equals
    assert abs(plain / recipe - 1) < 0.5


def test_a_flag_without_effect_is_named(data, tmp_path, capsys):
    assert go(data, tmp_path, "--steps", 1, "--vocab_size", 4000) == 0
    assert "--vocab_size 4000 is not used: the tokenizer has 300" in capsys.readouterr().out


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_says_what_to_do(error, data, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise error
    monkeypatch.setattr(R.Run, "gradients", fails)
    assert "--micro_batch 2" in line_of(capsys, go(data, tmp_path, "--steps", 1))


def test_another_fault_of_a_gpu_is_not_called_lack_of_memory(data, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(R.Run, "gradients", fails)
    with pytest.raises(RuntimeError, match="illegal"):
        go(data, tmp_path, "--steps", 1)


def test_help_is_printed(capsys):
    assert command("-h") == 0
    assert "--micro_batch" in capsys.readouterr().out
