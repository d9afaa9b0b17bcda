"""Tests of model.py's plain model: (1) equal to a naive oracle, (2) to torch and published figures,
(3) invariants (those of every variant are in test_mixers.py), (4) accounting, (5) checkpoints, (6) bad input.

The oracle of the whole model, `reference`, is written here in float64 numpy with loops over heads and queries
and real arithmetic: it shares no line with model.py, so it cannot share a mistake with it.
"""
import io, itertools, math, os, pickle, random, re, resource, subprocess, sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model as M  # noqa: E402  (the scripts are flat files, not a package)

# tiny shapes: a second thread only waits
torch.set_num_threads(1)
close = torch.testing.assert_close
FP32, BF16 = dict(atol=1e-5, rtol=1e-5), dict(atol=2e-2, rtol=2e-2)
T, V = 11, 53
BASE = dict(vocab_size=V, context_length=16, d_model=24, num_layers=2, num_heads=4, d_ff=40, init="glorot")
VARIANTS = [dict(), dict(qk_norm=True), dict(num_kv_heads=4), dict(num_kv_heads=2), dict(num_kv_heads=1),
            dict(num_heads=1, tie_embeddings=True),
            dict(window=1), dict(window=2), dict(window=T), dict(window=16), dict(attn_softcap=0.7),
            dict(logit_softcap=0.5),
            dict(window=3, attn_softcap=2.0, num_kv_heads=2, qk_norm=True, logit_softcap=3.0),
            dict(rope_theta=77.0),
            dict(position="learned", bias="qkv"), dict(position="sinusoidal"),
            dict(position="none", window=4),
            dict(norm="none", norm_position="pre"), dict(bias="all", init="gpt2", norm="layernorm",
                                                         position="learned", ffn="gelu"),
            *[dict(norm=n, norm_position=p, parallel=q, bias=b) for n, p, q, b in itertools.product(
                ("rmsnorm", "layernorm"), ("pre", "post", "double"), (False, True), ("none", "all"))],
            *[dict(ffn=f) for f in M.FFNS]]
name = lambda kw: "-".join(f"{k}={v}" for k, v in kw.items()) or "default"
each_variant = pytest.mark.parametrize("kw", VARIANTS, ids=name)


def build(seed=0, **kw):
    """A model in which no gain is 1 and no bias 0: a swapped or forgotten one shows."""
    torch.manual_seed(seed)
    net = M.Transformer(M.ModelConfig(**{**BASE, **kw}))
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() < 2:
                p.add_(0.3 * torch.randn_like(p))
    return net


def some_ids(rows=2, length=T, seed=1):
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- 1. the naive oracle ------------------------------------------------------------------------------------

ACT = {"silu": lambda x: x / (1 + np.exp(-x)), "relu": lambda x: np.maximum(x, 0),
       "relu2": lambda x: np.maximum(x, 0)**2,
       "gelu": lambda x: 0.5 * x * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))}
ACT.update(swiglu=ACT["silu"], reglu=ACT["relu"], geglu=ACT["gelu"])


def turned(x, m, theta):
    """RoPE of one vector at position m, pair by pair, in real arithmetic."""
    y, H = np.empty_like(x), len(x)
    for j in range(H // 2):
        a = m * theta ** (-2 * j / H)
        y[2 * j] = x[2 * j] * math.cos(a) - x[2 * j + 1] * math.sin(a)
        y[2 * j + 1] = x[2 * j] * math.sin(a) + x[2 * j + 1] * math.cos(a)
    return y


def reference(net, ids):
    """Logits (T,V) of one sequence by the docstring's equations, one query and one head at a time."""
    c, w = net.config, {k: v.double().numpy() for k, v in net.state_dict().items()}
    N, K, H, L = c.num_heads, c.num_kv_heads or c.num_heads, c.d_model // c.num_heads, len(ids)
    bias = lambda layer, kinds: w[layer + ".bias"] if c.bias in kinds else 0.0
    linear = lambda x, layer, kinds=("all",): x @ w[layer + ".weight"].T + bias(layer, kinds)

    def norm(x, layer, kind=c.norm):
        if kind == "none":
            return x
        x = x - x.mean(-1, keepdims=True) if kind == "layernorm" else x
        y = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * w[layer + ".weight"]
        return y + bias(layer, ("all",)) if kind == "layernorm" else y

    def attention(x, at):
        heads, y = linear(x, at + "wqkv", ("qkv", "all")).reshape(L, N + 2 * K, H), np.zeros((L, N, H))
        def prepared(head, layer, t):
            v = norm(heads[t, head], at + layer, "rmsnorm") if c.qk_norm else heads[t, head]
            return turned(v, t, c.rope_theta) if c.position == "rope" else v
        for n, t in itertools.product(range(N), range(L)):
            seen, group = range(max(0, t - c.window + 1) if c.window else 0, t + 1), n // (N // K)
            scores = np.array([prepared(n, "q_norm", t) @ prepared(N + group, "k_norm", s)
                               for s in seen]) / math.sqrt(H)
            e = np.exp(c.attn_softcap * np.tanh(scores / c.attn_softcap) if c.attn_softcap else scores)
            y[t, n] = sum(p * heads[s, N + K + group] for p, s in zip(e / e.sum(), seen))
        return linear(y.reshape(L, N * H), at + "wo")

    def ffn(x, at):
        hidden = ACT[c.ffn](linear(x, at + "w1"))
        return linear(hidden * linear(x, at + "w3") if c.ffn.endswith("glu") else hidden, at + "w2")

    x = w["embedding.weight"][ids]
    if c.position == "learned":
        x = x + w["position.weight"][:L]
    if c.position == "sinusoidal":
        x = x + np.array([[(math.sin, math.cos)[d % 2](t / 10000 ** (d // 2 * 2 / c.d_model))
                           for d in range(c.d_model)] for t in range(L)])
    for i in range(c.num_layers):
        b = f"blocks.{i}."
        pre, out, post = (lambda x, n, k=k: norm(x, b + n) if c.norm_position in k else x
                          for k in (("pre", "double"), ("double",), ("post",)))
        if c.parallel:
            h = pre(x, "norm1")
            x = post(x + out(attention(h, b + "mixer."), "out1") + out(ffn(h, b + "ffn."), "out2"), "after2")
        else:
            x = post(x + out(attention(pre(x, "norm1"), b + "mixer."), "out1"), "after1")
            x = post(x + out(ffn(pre(x, "norm2"), b + "ffn."), "out2"), "after2")
    z = (x if c.norm_position == "post" else norm(x, "norm")) @ w["head.weight"].T
    return torch.from_numpy(c.logit_softcap * np.tanh(z / c.logit_softcap) if c.logit_softcap else z)


@each_variant
def test_model_equals_the_oracle(kw):
    net, ids = build(**kw).double(), some_ids()
    for row, logits in zip(ids, net(ids)):
        close(logits, reference(net, row.numpy()), atol=1e-6 if net.config.position == "sinusoidal"
              else 1e-10, rtol=1e-7)


@pytest.mark.parametrize("H,theta", [(2, 10000.0), (8, 10000.0), (6, 77.0), (64, 500000.0)])
def test_rope(H, theta):
    x, y = normal(7, H, dtype=torch.float64), normal(7, H, seed=1, dtype=torch.float64)
    at = torch.tensor([0, 1, 2, 5, 123, 1000, 4095])
    rope = lambda v, p: M.apply_rope(v, p, theta)
    close(rope(x, at), torch.stack([torch.from_numpy(turned(r.numpy(), m, theta)) for r,
                                    m in zip(x, at.tolist())]), atol=1e-9, rtol=0)
    close(rope(x, at).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rope(x, at * 0), x)
    # m - n alone
    close((rope(x, at) * rope(y, at + 17)).sum(-1), (rope(x, at + 333) * rope(y, at + 350)).sum(-1),
          atol=1e-9, rtol=0)
    for dtype, tolerance in ((torch.float32, dict(atol=2e-3, rtol=0)),
                             (torch.bfloat16, dict(atol=5e-2, rtol=0))):
        got = rope(x.to(dtype), at)
        assert got.dtype == dtype
        # bf16 angles would be off by radians
        close(got, rope(x.to(dtype).double(), at).to(dtype), **tolerance)


def test_rope_of_rows_at_different_positions():
    x, at = normal(2, 4, 3, 8), torch.tensor([[0, 1, 2], [9, 4, 7]])
    close(M.apply_rope(x, at[:, None]), torch.stack([M.apply_rope(x[0], at[0]), M.apply_rope(x[1], at[1])]))


def test_sinusoids_of_p_plus_k_are_one_linear_map_of_those_of_p():
    P = M.sinusoids(torch.arange(40), 8).double()
    A = torch.linalg.lstsq(P[:30], P[5:35]).solution
    close(P[30:35] @ A, P[35:40], atol=1e-4, rtol=0)


# --- 2. torch and published figures -------------------------------------------------------------------------

SHAPES = [(1, 1), (7, 1), (1, 7), (3, 123), (2, 1, 5, 7)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_plain_functions_equal_torch(shape, scale):
    x, d = normal(*shape) * scale, shape[-1]
    gain, bias = normal(d, seed=1), normal(d, seed=2)
    close(M.softmax(x), x.softmax(-1), **FP32)
    close(M.softmax(x, 0), x.softmax(0), **FP32)
    close(M.softmax(x + 100), M.softmax(x), atol=1e-4, rtol=1e-4)
    close(M.silu(x), F.silu(x), **FP32)
    close(M.gelu(x), F.gelu(x, approximate="tanh"), **FP32)
    close(M.rms_norm(x, gain), F.rms_norm(x, (d,), gain, 1e-5), **FP32)
    close(M.layer_norm(x, gain, bias), F.layer_norm(x, (d,), gain, bias), atol=1e-4, rtol=1e-5)
    close(M.layer_norm(x, gain), F.layer_norm(x, (d,), gain), atol=1e-4, rtol=1e-5)
    targets = torch.randint(0, d, shape[:-1])
    close(M.cross_entropy(x, targets), F.cross_entropy(x.reshape(-1, d), targets.reshape(-1)), atol=1e-4,
          rtol=1e-5)
    for z in (0.0, 0.3):
        ce, objective = M.lm_loss(x[None], targets[None], z)
        close(objective - ce, z * x.logsumexp(-1).square().mean(), atol=1e-4 * scale**2, rtol=1e-5)
        close(ce, M.cross_entropy(x, targets), atol=1e-4, rtol=1e-5)


def test_ignored_targets_count_in_neither_term_of_the_loss():
    x, targets = normal(3, 7, 11), torch.randint(0, 11, (3, 7))
    kept = torch.rand(3, 7) > 0.4
    close(torch.stack(M.lm_loss(x, targets.masked_fill(~kept, -100), 0.3)),
          torch.stack(M.lm_loss(x[kept], targets[kept], 0.3)), **FP32)


def test_bf16_of_large_magnitude_stays_finite_and_norms_run_in_fp32():
    x = normal(5, 123) * 1e4
    for f in (lambda v: M.rms_norm(v, torch.ones(123)), lambda v: M.layer_norm(v, torch.ones(123)), M.softmax,
              M.silu, M.gelu, M.RMSNorm(123)):
        got = f(x.bfloat16())
        assert got.isfinite().all()
        close(got.float(), f(x.bfloat16().float()), **BF16)
    assert M.rms_norm(x.bfloat16(), torch.ones(123)).dtype == torch.bfloat16
    layer, gain = M.RMSNorm(123), 1 + normal(123, seed=3) / 1000             # bf16 would round this gain to 1
    layer.weight.data.copy_(gain)
    assert torch.equal(layer(x.bfloat16()), M.rms_norm(x.bfloat16(), gain))
    half = torch.full((64,), 300.0, dtype=torch.float16)                     # 300^2 overflows fp16
    close(M.rms_norm(half, torch.ones(64)).float(), torch.ones(64), **BF16)
    close(M.layer_norm(x - x.mean(-1, keepdim=True), torch.ones(123)),
          M.rms_norm(x - x.mean(-1, keepdim=True), torch.ones(123)), **FP32)
    assert M.cross_entropy(torch.zeros(9, V), torch.arange(9)).item() == pytest.approx(math.log(V), abs=1e-6)
    z = M.soft_cap(x, 30.0)
    assert z.abs().max() <= 30 and (M.soft_cap(x / 1e6, 30.0) - x / 1e6).abs().max() < 1e-6
    assert M.soft_cap(x, 0.0) is x
    ordered = torch.linspace(-60, 60, 200)
    assert (M.soft_cap(ordered, 30.0).diff() > 0).all()


@pytest.mark.parametrize("batch", [(), (3,), (2, 1, 3)])
@pytest.mark.parametrize("t,s,h", [(1, 1, 1), (7, 7, 4), (5, 123, 8), (9, 2, 3)])
def test_attention_function_equals_torch(batch, t, s, h):
    q, k, v = normal(*batch, t, h), normal(*batch, s, h, seed=1), normal(*batch, s, h, seed=2)
    mask = torch.rand(*batch, t, s, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[..., 0] = True
    close(M.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v), **FP32)
    close(M.scaled_dot_product_attention(q, k, v, mask),
          F.scaled_dot_product_attention(q, k, v, attn_mask=mask), **FP32)
    close(M.scaled_dot_product_attention(q * 1e3, k, v, mask),
          F.scaled_dot_product_attention(q * 1e3, k, v, attn_mask=mask), atol=1e-3, rtol=1e-3)
    # a query that may see nothing: zeros, not NaN
    mask[..., 0, :] = False
    got = M.scaled_dot_product_attention(q, k, v, mask)
    assert not got[..., 0, :].any() and got.isfinite().all()
    # a masked value has weight exactly 0
    far = v.clone()
    far[..., ~mask.flatten(0, -2).any(0), :] = 1e30
    assert torch.equal(M.scaled_dot_product_attention(q, k, far, mask), got)


def test_published_sizes():
    want = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080,
            "gpt2-xl": 1_557_611_200,
            "llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320}
    assert {n: M.num_params(M.ModelConfig(**M.PRESETS[n])) for n in want} == want
    tiny = M.ModelConfig(**{**M.PRESETS["tinystories"], "qk_norm": False})
    assert (M.num_params(tiny, embeddings=False), M.num_params(replace(tiny, tie_embeddings=True)),
            M.num_params(tiny)) == (12_456_448, 17_576_448, 22_696_448)
    # the course's
    xl = M.ModelConfig(vocab_size=50257, context_length=1024, d_model=1600, num_layers=48, num_heads=25,
                       d_ff=6400)
    assert M.num_params(xl) == 2_127_057_600
    for context, total, ffn, scores in ((1024, 4.513e12, 0.669, 0.071), (16384, 1.495e14, None, 0.552)):
        f = M.flops_per_token(xl, context)
        assert context * sum(f.values()) == pytest.approx(total, rel=2e-4)
        assert f["scores"] / sum(f.values()) == pytest.approx(scores, abs=6e-4)
        assert ffn is None or f["ffn"] / sum(f.values()) == pytest.approx(ffn, abs=6e-4)
    llama = M.ModelConfig(**M.PRESETS["llama2-13b"])
    assert M.kv_bytes_per_token(llama) == 2 * 2 * 40 * 5120
    assert M.kv_bytes_per_token(replace(llama, num_kv_heads=8)) * 5 == M.kv_bytes_per_token(llama)


def test_initial_weights():
    torch.manual_seed(0)
    w = M.Linear(300, 200).weight
    sigma = math.sqrt(2 / 500)
    assert w.shape == (200, 300) and w.abs().max() <= 3 * sigma
    assert w.std().item() == pytest.approx(0.9866 * sigma, rel=0.02)
    e = M.Embedding(1000, 50).weight
    assert e.abs().max() <= 3 and e.std().item() == pytest.approx(0.9866, rel=0.02)
    assert abs(w.mean()) < 0.01 * sigma * 3
    assert (M.RMSNorm(5).weight == 1).all()
    net = M.Transformer(M.ModelConfig(**{**BASE, "init": "gpt2", "num_layers": 8, "d_model": 64,
                                         "d_ff": 256}))
    for key, std in (("blocks.3.mixer.wqkv", 0.02), ("blocks.3.mixer.wo", 0.005), ("blocks.3.ffn.w2", 0.005),
                     ("embedding", 0.02), ("head", 0.02)):
        assert net.state_dict()[key + ".weight"].std().item() == pytest.approx(std, rel=0.06), key
    assert build(tie_embeddings=True).embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)


# --- 3. invariants ------------------------------------------------------------------------------------------

def test_positions_can_be_given_and_only_distance_matters():
    net, ids = build(num_kv_heads=2), some_ids()
    close(net(ids, torch.arange(T)[None] + torch.tensor([[0], [5]])), net(ids), **FP32)
    # two documents in one row, further apart than the window: as if each came alone
    net, at = build(window=T), torch.cat((torch.arange(5), torch.arange(T - 5) + 99))[None]
    close(net(ids[:1], at), torch.cat((net(ids[:1, :5]), net(ids[:1, 5:])), 1), **FP32)
    learned = build(position="learned")
    assert (learned(ids, torch.arange(T) + 2) - learned(ids)).abs().max() > 0.01


def test_window_mask_by_brute_force_and_its_reach():
    for window, t in itertools.product((0, 1, 2, 5, 99), (1, 7)):
        at, keys = torch.tensor([3, 0, 8, 8, 2, 15, 1])[:t], torch.arange(10)
        want = [[s <= q and (not window or s > q - window) for s in range(10)] for q in at.tolist()]
        assert M.attention_mask(at, keys, window).tolist() == want
    # two layers of window 3 reach 4 tokens back
    net, ids = build(window=3), some_ids()
    changed = ids.clone()
    changed[:, 2] += 1
    moved = (net(changed % V) != net(ids)).any(-1).any(0).tolist()
    assert moved == [False] * 2 + [True] * 5 + [False] * (T - 7)


def test_qk_norm_bounds_every_logit(monkeypatch):
    largest = []
    def spy(q, k, v, **how):
        largest.append((q @ k.mT).abs().max().item() / math.sqrt(q.shape[-1]))
        return F.scaled_dot_product_attention(q, k, v, **how)
    monkeypatch.setattr(M, "attend", spy)                                    # the seam that kernels.py uses
    for qk_norm in (True, False):
        torch.manual_seed(0)
        layer = M.Attention(M.ModelConfig(**BASE, qk_norm=qk_norm))
        layer(1e4 * normal(2, T, 24), torch.arange(T))
    # |q| = |k| = sqrt(H) whatever x is
    assert largest[0] <= math.sqrt(6) * (1 + 1e-5) < largest[1] / 1e4


def test_dropout():
    ids = some_ids()
    assert M.ModelConfig().dropout == 0
    plain, net = build(), build(dropout=0.5)
    assert torch.equal(plain.train()(ids), plain.eval()(ids)) and torch.equal(net.eval()(ids), plain(ids))
    assert not torch.equal(net.train()(ids), net(ids))
    stream = []
    net.blocks[0].register_forward_pre_hook(lambda module, args: stream.append(args[0]))
    net(ids)
    kept = stream[0] != 0
    assert 0.4 < kept.float().mean() < 0.6
    close(stream[0][kept], 2 * net.embedding(ids)[kept])                     # scaled so that the mean stays


@pytest.mark.parametrize("kw", [dict(), dict(parallel=True), dict(bias="all"), dict(ffn="gelu", qk_norm=True),
                                dict(position="learned")], ids=name)
def test_zero_init_is_the_identity_and_knows_nothing(kw):
    net, x, ids = M.Transformer(M.ModelConfig(**{**BASE, **kw, "init": "zero"})), normal(2, T, 24), some_ids()
    assert torch.equal(net.blocks[0](x, torch.arange(T)), x)
    assert not torch.equal(net.norm(x), x)
    assert M.lm_loss(net(ids), ids)[0].item() == pytest.approx(math.log(V), abs=1e-6)


def test_tied_weights_are_one_storage():
    net = build(tie_embeddings=True)
    assert net.head.weight is net.embedding.weight
    assert len([k for k, _ in net.named_parameters() if "head" in k]) == 0
    net(some_ids()).sum().backward()
    # rows that were not read get a gradient from the head
    assert net.embedding.weight.grad.abs().sum(-1).all()
    copy = M.load_model(dict(config=asdict(net.config), model=net.state_dict()))
    assert copy.head.weight.data_ptr() == copy.embedding.weight.data_ptr()
    assert torch.equal(copy(some_ids()), net.eval()(some_ids()))


def test_sampling_probabilities():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1e9, 0.5], [0.0, 0.0, 9.0, 0.0, 0.0]])
    assert M.next_token_probs(logits, 0).tolist() == [[0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
    close(M.next_token_probs(logits, 0.5), (logits / 0.5).softmax(-1))
    close(M.next_token_probs(logits, 1e-3)[0], torch.eye(5)[1])
    for k in (1, 2, 3, 9):
        kept = logits[0].argsort(descending=True)[:k]
        want = torch.zeros(5).index_copy(0, kept, logits[0][kept].softmax(0))
        close(M.next_token_probs(logits, top_k=k)[0], want)
    rng = random.Random(0)
    # the smallest set that reaches p, by trying sizes
    for _ in range(100):
        p, z = rng.random(), normal(9, seed=rng.randrange(10**6)).double() * 2
        probs = sorted(z.softmax(0).tolist(), reverse=True)
        size = next(n for n in range(1, 10) if sum(probs[:n]) >= p or n == 9)
        got = M.next_token_probs(z, top_p=p)
        assert (got > 0).sum() == size and got.sum().item() == pytest.approx(1, abs=1e-5)
        assert set(got.topk(size).indices.tolist()) == set(z.topk(size).indices.tolist())
    for z in (normal(50_000), torch.tensor([0.0, -30.0])):                   # 1 means off, rounding or not
        assert (M.next_token_probs(z, top_p=1.0) > 0).all()
    assert (M.next_token_probs(torch.zeros(7), top_p=0.01) > 0).sum() == 1
    assert (M.next_token_probs(torch.zeros(4), top_p=0.5) > 0).sum() == 2    # two reach 1/2 exactly: no third


def test_generate():
    net = build().train()
    ids, want = [5, 6, 7], []
    # greedy, and past context_length the text slides
    for _ in range(30):
        want.append(net(torch.tensor([(ids + want)[-16:]]))[0, -1].argmax().item())
    assert M.generate(net, ids, 30, temperature=0) == want and net.training and ids == [5, 6, 7]
    stop = want[9]
    assert M.generate(net, ids, 30, temperature=0, stop={stop}) == want[:want.index(stop)]
    draw = lambda seed, **kw: M.generate(net, ids, 30, generator=torch.Generator().manual_seed(seed), **kw)
    assert draw(0) == draw(0) != draw(1) and draw(0, top_k=1) == draw(1, top_p=1e-6) == want
    assert draw(0, temperature=1e-39) == want              # and no overflow
    assert M.generate(net, ids, 0) == []
    assert M.generate(build(), list(range(40)), 1, 0) == M.generate(build(), list(range(24, 40)), 1, 0)
    for bad, word in ((dict(temperature=-1.0), "temperature"), (dict(temperature=math.nan), "temperature"),
                      (dict(top_p=0.0), "top_p"), (dict(top_p=1.5), "top_p"), (dict(top_k=-1), "top_k")):
        with pytest.raises(ValueError, match=word):
            draw(0, **bad)
    with pytest.raises(ValueError, match="at least one token"):
        M.generate(net, [], 3)


def test_text_longer_than_the_context_is_refused():
    net = build()
    for call in (lambda: net(some_ids(1, 17)), lambda: [net(some_ids(1, 9), cache=c)
                                                        for c in [net.make_cache()] for _ in range(2)]):
        with pytest.raises(ValueError,
                           match=r"1[78] tokens do not fit context_length=16.*--context_length 1[78]"):
            call()


# --- 4. accounting: closed form == counted (what decoding keeps: test_mixers.py) ----------------------------

def configs(number, seed=0, **fixed):
    """`number` random shapes from the product of all knobs that change a cost."""
    rng, out = random.Random(seed), []
    for _ in range(number):
        N, H = rng.choice((1, 2, 4, 6)), rng.choice((2, 4, 8))
        kw = dict(num_heads=N, num_kv_heads=rng.choice([0] + [k for k in range(1, N + 1) if N % k == 0]),
                  d_model=N * H,
                  num_layers=rng.choice((1, 2, 3)), d_ff=rng.choice((0, 1, 40)),
                  vocab_size=rng.choice((7, 300)), context_length=rng.choice((5, 16)))
        for key, values in dict(norm=("rmsnorm", "layernorm", "none"),
                                norm_position=("pre", "post", "double"), parallel=(False, True),
                                position=("rope", "learned", "sinusoidal", "none"),
                                bias=("none", "qkv", "all"), tie_embeddings=(False, True),
                                qk_norm=(False, True), ffn=tuple(M.FFNS)).items():
            kw[key] = rng.choice(values)
        out.append(M.ModelConfig(**{**kw, **fixed}))
    return out


def test_parameters_as_predicted():
    for c in configs(400) + [M.ModelConfig(**kw) for kw in M.PRESETS.values()]:
        with torch.device("meta"):
            net = M.Transformer(c)
        parts = {"embedding": net.embedding, "position": net.position, "head": net.head}
        counted = {k: sum(p.numel() for p in m.parameters()) if m is not None else 0 for k,
                   m in parts.items()}
        counted["head"] *= not c.tie_embeddings
        for kind in ("attention", "ffn"):
            counted[kind] = sum(p.numel() for b in net.blocks
                                for p in (b.mixer if kind == "attention" else b.ffn).parameters())
        total = sum(p.numel() for p in net.parameters())
        counted["norms"] = total - sum(counted.values())
        assert M.count_params(c) == counted and M.num_params(c) == total, c
        stored = sum(v.numel() for v in net.state_dict().values())
        assert stored == total + counted["embedding"] * c.tie_embeddings, "a stored buffer"


def test_flops_as_counted():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    for c in configs(40, seed=1):
        net, length = M.Transformer(c), c.context_length
        ids = torch.randint(0, c.vocab_size, (2, length))
        with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
            loss = M.lm_loss(net(ids), ids)[0]
        with FlopCounterMode(display=False) as backward, sdpa_kernel(SDPBackend.MATH):
            loss.backward()
        per_token = sum(M.flops_per_token(c).values())
        counted = forward.get_total_flops()
        assert counted == 2 * length * per_token, c
        assert backward.get_total_flops() == 2 * counted, c
        assert M.train_flops(c, 2 * length) == 3 * counted
    # 6 N D, once scores and the table are set aside
    plain = M.ModelConfig(**BASE, norm="none")
    parts = M.flops_per_token(plain, 1)
    assert 3 * (sum(parts.values()) - parts["scores"]) == 6 * (M.num_params(plain) - V * 24)
    assert M.flops_per_token(plain, 64)["scores"] == 64 * parts["scores"]


def test_saved_bytes_as_counted():
    for i, c in enumerate(configs(60, seed=2)):
        net = M.Transformer(c)
        net.checkpoint_blocks = i % 3 == 0
        ids = torch.randint(0, c.vocab_size, (3, c.context_length + 1))
        x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        with M.count_saved_bytes(net) as kept:
            loss = M.lm_loss(net(x), y)[0]
        predicted = M.activation_bytes(c, 3, checkpoint_blocks=net.checkpoint_blocks)
        missed = sum(kept.values()) - sum(predicted.values())
        # the positions and one scalar: no B, no D
        assert 0 <= missed <= 8 * c.context_length + 4, (missed, net.checkpoint_blocks, c)
        del loss


# --- 5. checkpoints -----------------------------------------------------------------------------------------

def trained(steps=3):
    net = build()
    adam = torch.optim.AdamW(net.parameters(), 1e-2)
    return net, adam, [train_a_little(net, adam, i) for i in range(steps)]


def train_a_little(net, adam, i):
    loss = M.lm_loss(net(some_ids(seed=i)), some_ids(seed=i + 1))[0]
    loss.backward()
    adam.step()
    adam.zero_grad()
    return loss.item()


@pytest.mark.parametrize("kind", ["path", "str", "open file"])
def test_checkpoint_round_trip(kind, tmp_path):
    net, adam, _ = trained()
    out = {"path": tmp_path / "c.pt", "str": str(tmp_path / "c.pt"), "open file": io.BytesIO()}[kind]
    M.save_checkpoint(out, net, adam, 3, note="x", rng=dict(cpu=torch.get_rng_state()))
    if kind == "open file":
        out.seek(0)
    state = M.load_checkpoint(out)
    assert (state["step"], state["note"], M.ModelConfig(**state["config"])) == (3, "x", net.config)
    again = M.load_model(state)
    assert not again.training
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), net.state_dict().values()))
    resumed = torch.optim.AdamW(again.parameters(), 1e-2)
    resumed.load_state_dict(state["optimizer"])
    assert [train_a_little(again, resumed, i) for i in (3, 4)] == [train_a_little(net, adam, i)
                                                                   for i in (3, 4)]
    assert os.listdir(tmp_path) == ([] if kind == "open file" else ["c.pt"])


@pytest.mark.parametrize("wrappers", ["_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."])
def test_wrapped_modules(wrappers):
    """As torch.compile and DistributedDataParallel wrap: saved with plain names, and read from any."""
    net, f, by_hand = build(), io.BytesIO(), io.BytesIO()
    wrapped = net
    for attribute in reversed(wrappers.split(".")[:-1]):
        outer = torch.nn.Module()
        setattr(outer, attribute, wrapped)
        wrapped = outer
    M.save_checkpoint(f, wrapped)
    torch.save(dict(config=asdict(net.config), model=wrapped.state_dict(), step=1), by_hand)
    for file in (f, by_hand):
        file.seek(0)
        assert M.load_checkpoint(file)["model"].keys() == net.state_dict().keys()
        file.seek(0)
        assert torch.equal(M.load_model(file)(some_ids()), net.eval()(some_ids()))


class Payload:
    """What an attacker puts into a pickle: code that runs when it is opened."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def refused(path):
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        M.load_model(path)
    message = str(e.value)
    assert "\n" not in message and str(path) in message and len(message) < 700, message
    return message


def test_damaged_checkpoints_get_one_line(tmp_path):
    path, mark, rng = tmp_path / "c.pt", tmp_path / "ran", random.Random(0)
    assert "python train.py" in refused(path)                                # missing
    for data in (b"", b"def f():\n    return 1\n" * 99, b"PK\x03\x04", bytes(1000), b"\x80\x02",
                 rng.randbytes(5000)):
        path.write_bytes(data)
        refused(path)
    M.save_checkpoint(path, build(num_layers=1))
    whole = path.read_bytes()
    for n in [1, 4, 100, len(whole) // 2, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(40))]:
        path.write_bytes(whole[:n])
        assert "truncated" in refused(path) or n < 100
    # broken bytes: one line or a model, never another error
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 20))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            M.load_model(path)
        except ValueError as e:
            assert "\n" not in str(e)
    for dump in (lambda: torch.save(dict(config={}, model={}, step=Payload(mark)), path),
                 lambda: path.write_bytes(pickle.dumps(Payload(mark))),
                 lambda: torch.save(Payload(mark), path, _use_new_zipfile_serialization=False),
                 lambda: torch.save(build(), path)):
        dump()
        assert "refused" in refused(path) and not mark.exists()
    for state, word in (([1, 2], "no checkpoint"), (dict(model={}, step=1), "no checkpoint"),
                        (dict(config=3, model={}, step=1), "no checkpoint"),
                        (dict(config={}, model=[], step=1), "no checkpoint"),
                        (dict(config={}, model={3: 4}, step=1), "do not fit"),
                        (dict(config={3: 4}, model={}, step=1), "config")):
        torch.save(state, path)
        with pytest.raises(ValueError, match=word):
            M.load_model(path)


def test_weights_of_another_configuration():
    net = build()
    for change in (dict(d_model=32), dict(num_layers=3), dict(num_layers=1), dict(position="learned"),
                   dict(vocab_size=99)):
        with pytest.raises(ValueError, match="do not fit") as e:
            M.load_model(dict(config=asdict(replace(net.config, **change)), model=net.state_dict(), step=0))
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="flux"):
        M.load_model(dict(config={**asdict(net.config), "flux": 1}, model=net.state_dict(), step=0))


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path, net = tmp_path / "c.pt", build()
    M.save_checkpoint(path, net, step=1)
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # a real write that fails half way
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, hard))
    try:
        with pytest.raises(OSError, match="could not save.*unharmed.*--out") as e:
            M.save_checkpoint(path, net, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(e.value) and path.read_bytes() == old and os.listdir(tmp_path) == ["c.pt"]

    def interrupted(state, f):
        f.write(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        M.save_checkpoint(path, net, step=2)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["c.pt"]
    monkeypatch.undo()
    with open(path, "rb") as reader:      # who reads the old file reads all of it
        M.save_checkpoint(path, net, step=3)
        assert reader.read() == old and M.load_checkpoint(path)["step"] == 3
    with pytest.raises(OSError, match="nowhere"):
        M.save_checkpoint(tmp_path / "nowhere" / "c.pt", net)


# --- 6. configurations and the command line -----------------------------------------------------------------

BAD = [dict(vocab_size=0), dict(context_length=-1), dict(d_model=0), dict(num_layers=0), dict(num_heads=0),
       dict(rope_theta=-1.0), dict(rope_theta=math.nan),
       dict(norm_eps=0.0), dict(norm_eps=math.inf), dict(num_kv_heads=-1), dict(d_ff=-8), dict(window=-1),
       dict(attn_softcap=-1.0), dict(logit_softcap=math.nan),
       dict(d_model=100, num_heads=3), dict(d_model=10, num_heads=3), dict(d_model=2, num_heads=3),
       dict(num_heads=4, d_model=24, num_kv_heads=3),
       dict(num_heads=4, d_model=24, num_kv_heads=8), dict(d_model=9, num_heads=3),
       dict(d_model=9, num_heads=3, position="sinusoidal"),
       dict(d_model=7, num_heads=1, position="sinusoidal"), dict(dropout=1.0), dict(dropout=-0.1),
       dict(dropout=math.nan), dict(norm="batchnorm"), dict(ffn=""),
       dict(mixer="rnn"), dict(d_model=24.0), dict(num_heads="4"), dict(qk_norm=1), dict(num_layers=True),
       dict(bias="yes"), dict(d_head=7), dict(d_head=-2), dict(mtp=256), dict(balance_loss=-1.0)]


@pytest.mark.parametrize("kw", BAD, ids=name)
def test_config_errors_name_field_value_and_remedy(kw):
    """Followed, the remedy works: at once, or after one more message."""
    for attempt in range(3):
        with pytest.raises(ValueError) as e:
            M.ModelConfig(**kw)
        message = str(e.value)
        named = [f"{k}={v!r}" in message or f"{k}={v}" in message for k, v in kw.items()]
        assert any(named) or "d_head=" in message, message                   # D/N may be odd
        assert "\n" not in message
        remedy = re.search(r"try --(\w+) (\S+)$", message) or re.search(r"^(\w+)=.* one of (\w+)", message)
        field, value = remedy.groups()
        kind = next(f.type for f in fields(M.ModelConfig) if f.name == field)
        kw = {**kw, field: value == "True" if kind is bool else kind(value)}
        try:
            M.ModelConfig(**kw)
            return
        except ValueError:
            continue
    pytest.fail(f"the remedies lead nowhere: {kw}")


def test_config_defaults():
    c = M.ModelConfig()
    with pytest.raises(AttributeError):
        c.d_model = 3
    for D, gated, plain in ((192, 512, 768), (512, 1344, 2048), (768, 2048, 3072), (4096, 10944, 16384),
                            (24, 64, 128)):
        one = replace(c, d_model=D, num_heads=1)
        assert one.ffn_dim == gated and replace(one, ffn="silu").ffn_dim == plain
    six = replace(c, d_model=192, num_heads=6)
    assert six.kv_heads == 6 and replace(six, num_kv_heads=2).kv_heads == 2
    assert c.head_dim == 64


def command(monkeypatch, *argv):
    """python model.py ARGV in this process, without the demo -> (config, out)."""
    seen = []
    monkeypatch.setattr(M, "demo", lambda config, out: seen.append((config, out)))
    monkeypatch.setattr(sys, "argv", ["model.py", *argv])
    M.main()
    return seen[0]


def test_flags_reach_the_config(monkeypatch):
    assert command(monkeypatch) == (M.ModelConfig(**M.PRESETS["tiny"]), "out")
    c = command(monkeypatch, "--preset", "gpt2", "--d_model", "96", "--no-tie_embeddings", "--dropout", "0.1",
                "--norm", "rmsnorm", "--out", "x")[0]
    assert c == M.ModelConfig(**{**M.PRESETS["gpt2"], "d_model": 96, "tie_embeddings": False, "dropout": 0.1,
                                 "norm": "rmsnorm"})
    p = M.cli("doc")
    M.add_model_flags(p)
    # what the data decides wins
    assert M.model_config(p.parse_args(["--vocab_size", "9"]), vocab_size=300).vocab_size == 300
    # every knob is a flag with a help text
    for f in fields(M.ModelConfig):
        text = next(a for a in p._actions if a.dest == f.name)
        assert text.help and f.metadata["help"]


@pytest.mark.parametrize("argv,words", [(["--lrr", "3"], "unrecognized"), (["--d_model", "wide"], "wide"),
                                        (["--d_mod", "64"], "unrecognized"),
    (["--norm", "batch"], "batch"), (["--preset", "huge"], "huge"), (["--d_model", "101"], "num_heads=2"),
    (["--qk_norm", "maybe"], "maybe"),
    (["--dropout", "2"], "dropout=2"), (["--d_model"], "expected one argument")], ids=lambda v: " ".join(v)
    if isinstance(v, list) else "")
def test_bad_flags_are_one_line_and_status_2(argv, words, monkeypatch, capsys):
    with pytest.raises(SystemExit) as e:
        command(monkeypatch, *argv)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == "" and err.count("\n") == 1 and err.startswith("model.py: error: ")
    assert words in err


def test_help_and_devices(monkeypatch, capsys):
    with pytest.raises(SystemExit) as e:
        command(monkeypatch, "-h")
    assert e.value.code == 0 and "--d_model" in capsys.readouterr().out
    assert M.pick_device("cpu") == "cpu" and M.pick_device() in ("cuda", "mps", "cpu")
    for bad in ("tpu", "cpu:1", "cpu:x", *([] if torch.cuda.is_available() else ["cuda", "cuda:1"])):
        with pytest.raises(ValueError, match=f"{bad} is not available.*cpu"):
            M.pick_device(bad)


def test_the_demo_predicts_what_it_counts(tmp_path, monkeypatch, capsys):
    small = "--d_model 32 --num_heads 2 --num_layers 1 --context_length 32 --vocab_size 99"
    monkeypatch.setattr(sys, "argv", ["model.py", *small.split(), "--out", str(tmp_path / "new")])
    for part in ("demo_recall", "demo_sorted", "demo_experts"):             # small in test_mixers.py
        monkeypatch.setattr(M, part, lambda *_: {"none": [torch.full((2,), 0.5)]})
    M.main()
    out = capsys.readouterr().out
    rows = [line.split() for line in out.partition("predicted")[2].splitlines()[1:]]
    ratios = [float(r[-1]) for r in rows if r and re.fullmatch(r"\d\.\d{4}", r[-1])]
    assert len(ratios) == 7 and all(r == 1 for r in ratios), out
    sys.argv += ["--context_length", "200000"]
    M.main()
    assert "GB here: the formulas stand alone" in capsys.readouterr().out
    M.demo_counted(M.ModelConfig(vocab_size=1, d_model=8, num_layers=1, window=1), batch_size=1)   # 0 of 0
    assert capsys.readouterr().out.count("n/a") == 2
    assert (tmp_path / "new" / "model.png").stat().st_size > 5000


def test_importing_does_no_work():
    code = "import sys, model; print('matplotlib' in sys.modules, 'bpe' in sys.modules, sys.argv)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("False False ['-c']", "")
