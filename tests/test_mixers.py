"""Tests of model.py's mixers and experts: (1) mixers against naive oracles, (2) experts, (3) extra
predictions, (4) invariants of every variant, (5) accounting, (6) configurations, old checkpoints, the demo.

The oracles are written here from the docstrings' equations, in float64 and with loops over tokens.
"""
import copy, functools, io, itertools, math, re
from dataclasses import asdict, replace

import pytest

import test_model
from test_model import BASE, FP32, M, T, V, build, close, name, some_ids
from test_model import VARIANTS as PLAIN

import torch
import torch.nn.functional as F

FP64 = dict(atol=1e-10, rtol=1e-9)
VARIANTS = [dict(mixer="mla"), dict(mixer="mla", kv_latent=5, rope_dims=2, qk_norm=True, position="none"),
            dict(mixer="linear"), dict(mixer="mamba"), dict(mixer="mamba", num_heads=1, d_model=6),
            dict(mixer="hyena"), dict(layers="GC", qk_norm=True, bias="all"),
            dict(layers="LCCG", window=3, num_layers=5, num_kv_heads=2),
            dict(layers="LC", window=4, attn_softcap=0.7),
            dict(layers="MMG", num_layers=3), dict(layers="AHR", num_layers=3, parallel=True),
            dict(layers="LLG", window=2, num_layers=3, position="learned"),
            dict(rope_factor=8.0, rope_original_context=8),
            dict(num_experts=4), dict(num_experts=5, experts_per_token=1, ffn="gelu", bias="all"),
            dict(num_experts=6, experts_per_token=3, shared_experts=1, d_expert=7, balance="bias"),
            dict(num_experts=4, router="sinkhorn", balance="none", mixer="mamba"),
            dict(mtp=2, d_head=4), dict(mtp=1, num_experts=3, layers="GCR", num_layers=3)]
each_variant = pytest.mark.parametrize("kw", VARIANTS, ids=name)
each_of_all = pytest.mark.parametrize("kw", PLAIN + VARIANTS, ids=name)
EXPERTS = dict(num_experts=4, d_expert=10)
normal = functools.partial(test_model.normal, dtype=torch.float64)


def config(**kw):
    return M.ModelConfig(**{**BASE, **kw})


def mixer_of(**kw):
    """One mixer in float64, its weights, and an input (3,T,D)."""
    net = build(**kw).blocks[0].mixer.double()
    return net, dict(net.named_parameters()), normal(3, T, BASE["d_model"])


# --- 1. naive oracles ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("heads_of_q", [1, 2])
@pytest.mark.parametrize("length", [1, 7, 65, 123])
def test_chunked_equals_the_recurrence_and_the_double_sum(length, heads_of_q):
    q, k = (normal(2, heads_of_q, length, 3, seed=s) for s in (0, 1))
    v = normal(2, 2, length, 5, seed=2)
    decay, start = -normal(2, 2, length, seed=3).abs(), normal(2, 2, 3, 5, seed=4)
    decay[..., ::5] = 0.0                                  # nothing forgotten
    decay[..., 3::7] = -1e4                                # everything: e^-10000 is 0, and no inf appears
    S, want = start.clone(), []
    for t in range(length):
        S = decay[:, :, t, None, None].exp() * S + k[:, :, t, :, None] * v[:, :, t, None, :]
        want.append((q[:, :, t, None, :] @ S)[:, :, 0])
    want = torch.stack(want, 2)
    for chunk in (1, 3, 64, length):
        y, state = M.chunked(q, k, v, decay, start, chunk)
        close(y, want, **FP64)
        close(state, S, **FP64)
    zero, _ = M.chunked(q, k, v, decay)
    total = decay.cumsum(-1)
    for t in (0, length // 2, length - 1):                 # the parallel form, written as a sum
        weight = lambda s: (total[:, :, t] - total[:, :, s]).exp() * (q[:, :, t] * k[:, :, s]).sum(-1)
        close(zero[:, :, t], sum(weight(s)[..., None] * v[:, :, s] for s in range(t + 1)), **FP64)
    assert M.chunked(q.bfloat16(), k.bfloat16(), v.bfloat16(), decay.bfloat16())[1].dtype == torch.float32


@pytest.mark.parametrize("length", [1, 7, 123])
def test_fft_convolution_equals_the_direct_one_and_an_lti_state_space(length):
    x, h = normal(2, length, 3), normal(length, 3, seed=1)
    want = torch.stack([sum(h[t - s] * x[:, s] for s in range(t + 1)) for t in range(length)], 1)
    close(M.fft_conv(x, h), want, **FP64)
    # constant B, C and decay: the recurrence is a convolution with (C . B) exp(-A t)
    b, c, rate = normal(4), normal(4, seed=2), torch.tensor([0.1, 0.7])
    same = lambda r: r.expand(2, 2, length, 4)
    u = normal(2, 2, length, 3, seed=3)
    y, _ = M.chunked(same(c), same(b), u, -rate[:, None].double().expand(2, 2, length))
    t = torch.arange(length)
    for head in range(2):
        kernel = (c @ b) * torch.exp(-rate[head].double() * t)[:, None].expand(-1, 3)
        close(y[:, head], M.fft_conv(u[:, head], kernel), **FP64)


def rms(x, gain, eps=1e-5):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain


def test_linear_attention_token_by_token():
    net, w, x = mixer_of(mixer="linear")
    B, N, H = 3, 4, 6
    q, k, v = (x @ w["wqkv.weight"].t()).view(B, T, 3, N, H).unbind(2)
    rate = torch.tensor([2.0**(-8 * n / N) for n in range(1, N + 1)])
    S, out = torch.zeros(B, N, H, H).double(), []
    for t in range(T):
        S = torch.exp(-rate.double())[:, None, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append(rms(torch.einsum("bnh,bnhp->bnp", q[:, t], S) / math.sqrt(H), w["norm.weight"]).flatten(1))
    close(net(x, torch.arange(T)), torch.stack(out, 1) @ w["wo.weight"].t(), atol=1e-6, rtol=1e-6)


def test_mamba_token_by_token():
    net, w, x = mixer_of(mixer="mamba")
    heads, H = 8, 6
    inner, out, S = heads * H, [], torch.zeros(3, heads, H, H).double()
    z, mixed, d = (x @ w["w_in.weight"].t()).split([inner, inner + 2 * H, heads], -1)
    taps = w["conv"].view(4, -1)
    for t in range(T):
        seen = sum(taps[3 - i] * mixed[:, t - i] for i in range(4) if t >= i)
        u, b, c = F.silu(seen).split([inner, H, H], -1)
        u, step = u.view(3, heads, H), torch.log1p(torch.exp(d[:, t] + w["d_bias"]))
        decay = torch.exp(-step * w["log_a"].exp())
        S = decay[..., None, None] * S + step[..., None, None] * b[:, None, :, None] * u[:, :, None, :]
        y = torch.einsum("bh,bnhp->bnp", c, S) + w["skip"][:, None] * u
        out.append(rms(y.flatten(1) * F.silu(z[:, t]), w["norm.weight"]) @ w["wo.weight"].t())
    close(net(x, torch.arange(T)), torch.stack(out, 1), atol=1e-6, rtol=1e-5)
    fresh = M.Mamba(config())                              # d starts between 0.001 and 0.1
    steps = F.softplus(fresh.d_bias)
    close(steps[[0, -1]], torch.tensor([0.001, 0.1]), atol=1e-6, rtol=1e-4)


def test_hyena_token_by_token():
    net, w, x = mixer_of(mixer="hyena")
    a, b, v = (x @ w["w_in.weight"].t()).split(24, -1)
    z, h = b * v, net.filter(torch.arange(T))
    close(net.filter(torch.tensor([[3, 5]]))[0, 1], h[5])
    y = torch.stack([sum(h[t - s] * z[:, s] for s in range(t + 1)) for t in range(T)], 1) + w["skip"] * z
    close(net(x, torch.arange(T)), (a * y) @ w["wo.weight"].t(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kw", [dict(), dict(kv_latent=7, rope_dims=4, qk_norm=True), dict(position="none")],
                         ids=name)
def test_mla_head_by_head_in_both_forms(kw):
    net, w, x = mixer_of(mixer="mla", **kw)
    c, at = net.c, torch.arange(T)
    N, H, C, R = 4, 6, c.latent_dim, c.rotary_dim
    turn = (lambda v: M.apply_rope(v.contiguous(), at)) if c.position == "rope" else lambda v: v
    down = x @ w["w_down.weight"].t()
    latent, turned = rms(down[..., :C], w["kv_norm.weight"]), turn(down[..., C:])
    heads = []
    for n in range(N):
        q = x @ w["wq.weight"].view(N, H + R, -1)[n].t()
        q = rms(q, w["q_norm.weight"]) if c.qk_norm else q
        q = torch.cat((q[..., :H], turn(q[..., H:])), -1)
        up = w["w_up.weight"].view(N, 2, H, C)[n]
        k, v = torch.cat((latent @ up[0].t(), turned), -1), latent @ up[1].t()
        scores = (q @ k.mT / math.sqrt(H + R)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v)
    want = torch.cat(heads, -1) @ w["wo.weight"].t()
    close(net(x, at), want, atol=1e-6, rtol=1e-6)          # RoPE's angles and RMSNorm's eps: fp32 in places
    for form, steps in (("absorbed", 1), ("explicit", H)):  # with a cache, short queries absorb
        calls, real = [], getattr(net, form)
        setattr(net, form, lambda *a: calls.append(1) or real(*a))
        cache = net.make_cache()
        got = [net(p, q, cache) for p, q in zip(x.split(steps, 1), at.split(steps))]
        close(torch.cat(got, 1), want, atol=1e-6, rtol=1e-6)
        assert len(calls) == T // steps
        setattr(net, form, real)
    assert cache.k.shape == (3, 1, T, C) and cache.v.shape == (3, 1, T, R)


def test_mla_with_a_full_latent_is_multi_head_attention():
    torch.manual_seed(0)
    mha = M.Attention(config(position="none")).double()
    mla = M.MLA(config(position="none", kv_latent=24, rope_dims=2)).double()
    x = normal(2, T, 24)
    x = x / x.pow(2).mean(-1, keepdim=True).sqrt()         # so that the latent's norm changes nothing
    q, k, v = mha.wqkv.weight.view(3, 4, 6, 24)
    with torch.no_grad():
        mla.kv_norm.eps = 0.0
        mla.wo.weight.copy_(mha.wo.weight)
        mla.w_down.weight.zero_()[:24].fill_diagonal_(1.0)
        mla.w_up.weight.copy_(torch.cat((k, v), 1).reshape(48, 24))
        mla.wq.weight.zero_().view(4, 8, 24)[:, :6] = q * math.sqrt(8 / 6)   # MLA divides by sqrt(H + R)
    close(mla(x, torch.arange(T)), mha(x, torch.arange(T)), **FP64)


def test_shared_keys_are_those_of_the_lender():
    net = build(layers="LGCC", num_layers=4, window=3, num_kv_heads=2).double()
    x, at = normal(2, T, 24), torch.arange(T)
    lender, one, two = (net.blocks[i].mixer for i in (1, 2, 3))
    lender(x, at)
    same = M.Attention(lender.c).double()                  # the lender's keys, the borrower's queries
    with torch.no_grad():
        same.wqkv.weight.copy_(torch.cat((one.wq.weight, lender.wqkv.weight[24:])))
        same.wo.weight.copy_(one.wo.weight)
    close(one(x, at), same(x, at), **FP64)
    assert two.lender[0] is lender and not net.blocks[0].mixer.lends
    assert not any("lender" in key for key in net.state_dict())
    assert [layer.window for layer in M.layer_configs(net.config)] == [3, 0, 0, 0]
    assert M.layer_configs(config(layers="GLC", window=3, num_layers=3))[2].window == 3


def test_a_pattern_spelled_out():
    assert [layer.mixer for layer in M.layer_configs(config(layers="GMA", num_layers=5))] == [
        "attention", "mamba", "mla", "attention", "mamba"]
    for letter, kw in (("G", {}), ("L", dict(window=4)), ("A", dict(mixer="mla")),
                       ("R", dict(mixer="linear")), ("M", dict(mixer="mamba")), ("H", dict(mixer="hyena"))):
        one, two = build(**kw), build(layers=letter, window=kw.get("window", 0))
        assert torch.equal(one(some_ids()), two(some_ids())), letter


def test_stretched_rope():
    """Llama-3.1's: fast pairs as they were, slow ones slowed, a blend between."""
    H, factor, low, high, context = 64, 8.0, 1.0, 4.0, 8192
    rate = 500000.0 ** (-torch.arange(0, H, 2).double() / H)
    got = M.stretch_rope(rate, factor, low, high, context)
    for r, s in zip(rate.tolist(), got.tolist()):
        wavelength = 2 * math.pi / r
        if wavelength < context / high:
            want = r
        elif wavelength > context / low:
            want = r / factor
        else:
            blend = (context / wavelength - low) / (high - low)
            want = (1 - blend) * r / factor + blend * r
        assert s == pytest.approx(want, rel=1e-12)
    ids, plain = some_ids(), build()
    assert torch.equal(build(rope_factor=1.0)(ids), plain(ids))
    assert not torch.equal(build(rope_factor=8.0, rope_original_context=8)(ids), plain(ids))


# --- 2. mixture of experts ----------------------------------------------------------------------------------

def moe_of(seed=0, dtype=torch.float64, **kw):
    torch.manual_seed(seed)
    return M.MoE(config(**{**EXPERTS, **kw})).to(dtype), normal(3, T, 24).to(dtype)


@pytest.mark.parametrize("kw", [
    dict(), dict(experts_per_token=1), dict(experts_per_token=4), dict(ffn="relu2"), dict(shared_experts=2),
    dict(router="expert_choice"), dict(router="sinkhorn"), dict(balance="bias"), dict(capacity_factor=0.5),
    dict(num_experts=40, experts_per_token=3, capacity_factor=1.5), dict(num_experts=1, experts_per_token=1)],
    ids=name)
def test_sorted_experts_equal_the_loop(kw):
    net, x = moe_of(**kw)
    for training in (False, True):
        net.train(training)
        x = x.detach().requires_grad_()
        grads = []
        for f in (net, net.naive):
            net.zero_grad()
            x.grad = None
            y = f(x)
            (y.square().sum() + net.aux_loss).backward()
            grads.append((y, x.grad, *(p.grad for p in net.parameters())))
        for a, b in zip(*grads):
            close(a, b, **FP64)
    alone = torch.cat([net.eval()(row[None]) for row in x.detach().flatten(0, 1)[:, None]])
    if not net.c.capacity_factor and net.c.router != "expert_choice":       # a token does not see its batch
        close(alone.view_as(x), net(x.detach()), **FP64)


def test_each_token_gets_the_weighted_sum_of_its_k_best():
    net, x = moe_of()
    for token, y in zip(x.flatten(0, 1), net(x).flatten(0, 1)):
        p = (net.router.weight @ token).softmax(0)
        best = p.topk(2).indices
        ffn = lambda e: net.w2[e] @ (F.silu(net.w1[e] @ token) * (net.w3[e] @ token))
        close(y, sum(p[e] / p[best].sum() * ffn(e) for e in best), **FP64)
    token, gate, counts = net.route(x.flatten(0, 1))
    close(torch.zeros(3 * T, dtype=gate.dtype).index_add(0, token, gate), torch.ones(3 * T, dtype=gate.dtype))
    assert counts.sum() == 2 * 3 * T and net.load.sum() == pytest.approx(1)


def test_one_expert_is_the_dense_feed_forward():
    torch.manual_seed(0)
    dense = M.GatedFFN(config())
    net = M.MoE(config(num_experts=1, experts_per_token=1))
    assert net.w1.shape == (1, 40, 24)                     # as wide as the dense one
    with torch.no_grad():
        for w in ("w1", "w2", "w3"):
            getattr(net, w).copy_(getattr(dense, w).weight[None])
    close(net(normal(2, T, 24, dtype=torch.float32)), dense(normal(2, T, 24, dtype=torch.float32)), **FP32)


def test_expert_choice_and_sinkhorn_balance():
    net, x = moe_of(router="expert_choice", num_experts=4, experts_per_token=2)
    token, gate, counts = net.route(x.flatten(0, 1))
    visits = round(2 * 3 * T / 4)
    assert counts.tolist() == [visits] * 4
    p = F.linear(x.flatten(0, 1), net.router.weight).softmax(-1)
    for e in range(4):
        assert set(token[e * visits:(e + 1) * visits].tolist()) == set(p[:, e].topk(visits).indices.tolist())
    # sinkhorn: rows spend 1, columns get n/E
    scores = normal(12, 4)
    plan = M.sinkhorn(scores, 200).exp()
    close(plan.sum(1), torch.ones(12).double())
    close(plan.sum(0), torch.full((4,), 3.0).double(), atol=1e-6, rtol=0)
    # sharp scores: the best assignment of 6 tokens to 3 experts of 2 seats, against all of them
    scores = normal(6, 3, seed=5)
    best = max((p for p in itertools.product(range(3), repeat=6) if all(p.count(e) == 2 for e in range(3))),
               key=lambda p: sum(scores[t, e].item() for t, e in enumerate(p)))
    assert M.sinkhorn(scores * 50, 500).argmax(1).tolist() == list(best)
    assert scores.argmax(1).tolist() != list(best)         # or it would show nothing
    net, x = moe_of(router="sinkhorn", num_experts=8, experts_per_token=1)
    with torch.no_grad():
        x += 1
        net.router.weight[3] += 0.2                        # a favourite
    busiest = []
    for training in (True, False):                         # the plan is made in training alone
        net.train(training)(x)
        busiest.append(net.load.max())
    assert busiest[0] < busiest[1]


def test_balance_loss():
    n, E = 60, 6
    net, x = moe_of(num_experts=E, experts_per_token=1, balance_loss=1.0, router_z_loss=0.0)
    def loss_of(logits):
        net.load = F.one_hot(logits.argmax(-1), E).double().mean(0)
        return net.balance_loss(logits.softmax(-1), logits)
    even = 20 * torch.eye(E).repeat(n // E, 1).double()
    assert loss_of(even).item() == pytest.approx(1, abs=1e-6)                # uniform: the least
    assert loss_of(20 * torch.eye(E).double()[:1].repeat(n, 1)).item() == pytest.approx(E, abs=1e-3)
    assert all(loss_of(normal(n, E, seed=s) * 3) >= 1 - 0.2 for s in range(20))
    load, P = (lambda z: (F.one_hot(z.argmax(-1), E).double().mean(0), z.softmax(-1).mean(0)))(normal(n, E))
    assert loss_of(normal(n, E)).item() == pytest.approx(E * (load * P).sum().item())
    # two devices of three experts: the same of the sums, on top
    net.c = replace(net.c, balance_devices=2)
    by_device = 2 * (load.view(2, 3).sum(1) * P.view(2, 3).sum(1)).sum().item()
    assert loss_of(normal(n, E)).item() == pytest.approx(E * (load * P).sum().item() + by_device)
    # its gradient lowers the probability of a busy expert
    logits = (normal(n, E) + torch.tensor([3.0, 0, 0, 0, 0, 0])).requires_grad_()
    loss_of(logits).backward()
    assert logits.grad[:, 0].min() > 0 and logits.grad[:, 1:].sum() < 0
    # z loss: mean of log Z squared; its gradient shrinks log Z
    net.c = replace(net.c, balance="none", router_z_loss=0.5)
    logits = (normal(n, E) + 4).requires_grad_()
    loss = net.balance_loss(logits.softmax(-1), logits)
    close(loss, 0.5 * logits.exp().sum(-1).log().square().mean())
    loss.backward()
    stepped = logits - logits.grad
    assert stepped.logsumexp(-1).abs().mean() < logits.logsumexp(-1).abs().mean()


def test_the_bias_moves_the_choice_and_not_the_gate():
    net, x = moe_of(balance="bias", num_experts=4, experts_per_token=2)
    flat = x.flatten(0, 1)
    net(x)
    before, load = net.bias.clone(), net.load
    net.rebalance(0.01)
    close(net.bias - before, 0.01 * torch.sign(0.25 - load).double(), atol=1e-8, rtol=0)
    net.bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))     # now everyone visits 0 and 1
    token, gate, counts = net.route(flat)
    assert counts.tolist() == [3 * T, 3 * T, 0, 0]
    p = F.linear(flat, net.router.weight).softmax(-1)
    close(gate[:3 * T], p[:, 0] / (p[:, 0] + p[:, 1]), **FP64)
    assert "bias" in net.state_dict() and "bias" not in moe_of()[0].state_dict()
    model = build(num_experts=4, balance="bias")
    model.balance_experts()                                # before any forward: nothing to balance
    model(some_ids())
    model.balance_experts(0.5)
    assert all(b.ffn.bias.abs().max() == 0.5 for b in model.blocks) and model.aux_loss() > 0
    assert build().aux_loss() == 0.0


def test_capacity_drops_the_last_comers():
    net, x = moe_of(num_experts=4, experts_per_token=1, capacity_factor=1.0)
    with torch.no_grad():
        net.router.weight.zero_()[0] = 1.0
        x = x.abs()                                        # so that expert 0 is everyone's choice
    flat = x.flatten(0, 1)
    capacity = math.ceil(3 * T / 4)
    token, gate, counts = net.route(flat)
    assert token.tolist() == list(range(capacity)) and counts.tolist() == [capacity, 0, 0, 0]
    y = net(x).flatten(0, 1)
    assert y[:capacity].any(-1).all() and not y[capacity:].any()             # the stream carries these on
    assert net.dropped == pytest.approx(1 - capacity / (3 * T)) and net.load.tolist() == [1, 0, 0, 0]
    alone = net(x[2:])                                     # without the rows before it, a token finds a seat
    assert alone[0, 0].any() and not net(x)[2, 0].any()
    free = moe_of(num_experts=4, capacity_factor=4.0)[0]
    free(x)
    assert free.dropped == 0


def test_noise_and_jitter_are_for_training():
    x = normal(3, T, 24)
    for kw in (dict(router_noise=1.0), dict(router_jitter=0.3)):
        net, plain = moe_of(**kw)[0], moe_of()[0]
        assert torch.equal(net.eval()(x), plain.eval()(x))
        assert not torch.equal(net.train()(x), plain.train()(x))
    net = moe_of(router_jitter=0.3)[0]
    flat = torch.ones(1000, 24).double()
    with torch.no_grad():
        net.router.weight.fill_(1.0)
    logits = net.router_logits(flat)
    assert logits.min() >= 24 * 0.7 and logits.max() <= 24 * 1.3 and logits.std() > 0.5


def test_the_router_is_fp32_whatever_the_rest_is():
    net, x = moe_of(dtype=torch.bfloat16)
    assert net.router_logits(x[0]).dtype == torch.float32 and net(x).dtype == torch.bfloat16
    net, x = moe_of(dtype=torch.float32)
    want = net.router_logits(x[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.router_logits(x[0]), want)
        assert net(x).isfinite().all()
    close(net(x), net(x.bfloat16().float()), atol=0.2, rtol=0.1)


@pytest.mark.parametrize("insides", [dict(num_experts=4), dict(mtp=1), dict(layers="GC")])
def test_a_model_in_training_can_be_copied(insides):
    """What a forward pass leaves behind hangs on its graph."""
    net, ids = build(**insides), some_ids()
    M.training_loss(net, ids, ids)[1].backward()
    twin = copy.deepcopy(net)
    close(M.training_loss(twin, ids, ids)[1], M.training_loss(net, ids, ids)[1])
    for a, b in zip(net.parameters(), twin.parameters()):
        assert a is not b and torch.equal(a, b)


def test_upcycled_model_computes_the_same():
    dense, ids = build(mtp=1), some_ids()
    for kw in (dict(num_experts=4), dict(num_experts=3, experts_per_token=3),
               dict(num_experts=2, balance="bias")):
        moe = M.upcycle(dense, **kw)
        close(moe.eval()(ids), dense.eval()(ids), **FP32)
        assert moe.blocks[0].ffn.w1.shape == (kw["num_experts"], 40, 24)
        moe.blocks[0].ffn.w1.data[1:] += 1.0               # copies, not views
        close(dense(ids), build(mtp=1).eval()(ids))
    for bias, kw in (("none", dict(experts_per_token=1)), ("none", dict(shared_experts=1)), ("all", {}),
                     ("none", dict(router="expert_choice")), ("none", dict(capacity_factor=1.0))):
        with pytest.raises(ValueError, match="compute the same without"):
            M.upcycle(build(bias=bias), num_experts=4, **kw)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU"))])
def test_grouped_product_equals_the_slices(device):
    x, w = (normal(*shape, dtype=torch.float32).to(device) for shape in ((40, 16), (4, 24, 16)))
    counts = [7, 0, 30, 3]
    offs = torch.tensor(counts, device=device).cumsum(0).int()
    want = torch.cat([part @ one.t() for part, one in zip(x.split(counts), w)])
    close(F.grouped_mm(x.bfloat16(), w.bfloat16().mT, offs=offs).float(), want, atol=0.2, rtol=0.05)
    if device == "cuda":
        torch.manual_seed(0)
        net = M.MoE(M.ModelConfig(num_experts=8)).to(device)
        x = torch.randn(4, 64, 128, device=device)
        with torch.autocast(device, torch.bfloat16):
            close(net(x), net.naive(x), atol=5e-2, rtol=5e-2)


# --- 3. multi-token prediction ------------------------------------------------------------------------------

def test_extra_heads_predict_further_ahead():
    net, ids = build(mtp=2), some_ids()
    x, y = ids[:, :-1], ids[:, 1:]
    ce, objective = M.training_loss(net, x, y)
    assert torch.equal(ce, M.lm_loss(net(x), y)[0])
    assert torch.equal(objective, M.training_loss(build(mtp=2).eval(), x, y)[1])         # to evaluate, too
    at, stream, ahead = torch.arange(T - 1), net.features(x), []
    for k, block in enumerate(net.mtp, 1):
        logits = net.head(net.norm(block(stream, at)))
        for t in range(T - 1 - k):                         # position t comes before t + 1; head k: t + 1 + k
            ahead.append((k, F.cross_entropy(logits[:, t], ids[:, t + 1 + k])))
    mean = [torch.stack([v for j, v in ahead if j == k]).mean() for k in (1, 2)]
    close(objective, ce + 0.3 * (mean[0] + mean[1]) / 2, **FP32)
    off = M.training_loss(net, x, y, z_loss=0.1, mtp_weight=0.0)
    close(torch.stack(off), torch.stack(M.lm_loss(net(x), y, 0.1)))
    plain = build()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("mtp.")})
    assert torch.equal(plain(x), net(x))                   # in use the extra blocks are not there
    objective.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_extra_heads_see_no_future():
    net, ids = build(mtp=1), some_ids()
    before = net.mtp[0](net.features(ids), torch.arange(T))
    changed = ids.clone()
    changed[:, 6:] = (ids[:, 6:] + 1) % V
    after = net.mtp[0](net.features(changed), torch.arange(T))
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.equal(before[:, 6], after[:, 6])


# --- 4. every variant ---------------------------------------------------------------------------------------

@each_of_all
def test_future_cannot_leak(kw):
    """The logits of tokens 0..t do not know token t+1. To the bit, but for rounding: an FFT sums over all
    positions, and an expert's products are cut into tiles that depend on how many tokens come."""
    net, ids = build(**kw).eval(), some_ids(3)
    if "sinkhorn" in kw.values():                          # its plan in training is made over all tokens
        assert not torch.equal(net.train()(ids)[:, :4], net(torch.cat((ids[:, :4], ids[:, :7]), 1))[:, :4])
        net.eval()
    exact = "H" not in kw.get("layers", "") and kw.get("mixer") != "hyena" and "num_experts" not in kw
    before = net(ids)
    for t in (0, 4, T - 2):
        changed = ids.clone()
        changed[:, t + 1:] = (ids[:, t + 1:] + 7) % V
        after = net(changed)
        close(after[:, :t + 1], before[:, :t + 1], **(dict(atol=0, rtol=0) if exact else FP32))
        assert (after[:, t + 1] - before[:, t + 1]).abs().max() > 1e-4       # the test can see a change


@each_of_all
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(kw):
    net = build(**kw).eval()
    for rows, chunks in ((1, [1] * T), (3, [4, 1, 1, 3, 2]), (3, [1, 7, 3]), (1, [T])):
        ids, cache, got = some_ids(rows, seed=rows), net.make_cache(), []
        for part in ids.split(chunks, 1):
            got.append(net(part, cache=cache))
        close(torch.cat(got, 1), net(ids), **FP32)
        assert cache.length == T and cache.nbytes() == rows * M.state_bytes(net.config, T, 4)


@each_variant
@torch.no_grad()
def test_bf16_weights_and_autocast(kw):
    net, ids = build(**kw).eval(), some_ids()
    small, want = build(**kw).eval().bfloat16(), net(ids)
    half, cache = small(ids), small.make_cache()
    small(ids[:1], cache=cache)
    assert cache.nbytes() == M.state_bytes(net.config, T, 2)                 # a state is fp32 all the same
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(ids)
    assert half.dtype == mixed.dtype == torch.bfloat16
    far = 0.4 if "num_experts" in kw else 0.05             # 8 bits; a router may choose anew
    for got in (half, mixed):
        assert (got.float() - want).square().mean().sqrt() < far * want.std()


@pytest.mark.parametrize("kw", [dict(), dict(window=3), dict(attn_softcap=1.0), dict(position="learned"),
                                dict(position="sinusoidal", num_kv_heads=1), dict(mixer="mla"),
                                dict(layers="GC"), dict(mixer="hyena")], ids=name)
@torch.no_grad()
def test_rows_at_different_positions_share_a_cache(kw):
    """Prompts of 6, 3 and 1 tokens, padded in front with keys of a position that no query here reaches."""
    net, lengths, ids = build(**kw).eval(), (6, 3, 1), some_ids(3)
    prompt, at = torch.zeros(3, 6, dtype=torch.long), torch.full((3, 6), 15)
    for row, n in enumerate(lengths):
        prompt[row, 6 - n:], at[row, 6 - n:] = ids[row, :n], torch.arange(n)
    cache = net.make_cache()
    got = [net(prompt, at, cache)[:, -1]]
    for i in range(3):
        here = torch.tensor([[n + i] for n in lengths])
        got.append(net(ids.gather(1, here), here, cache)[:, 0])
    for row, n in enumerate(lengths):
        close(torch.stack([g[row] for g in got]), net(ids[row:row + 1])[0, n - 1:n + 3], **FP32)


@torch.no_grad()
def test_states_are_replaced_and_not_changed():
    """A state cannot be cut, but who keeps the old one can go back."""
    net, ids = build(mixer="mamba").eval(), some_ids()
    cache = net.make_cache()
    net(ids[:, :5], cache=cache)
    kept = [dict(vars(layer)) for layer in cache.layers]
    one = net(ids[:, 5:], cache=cache)
    for layer, before in zip(cache.layers, kept):
        vars(layer).update(before)
    cache.length = 5
    assert torch.equal(net(ids[:, 5:], cache=cache), one)


NO_FP32 = dict(norm="layernorm", position="none")           # no RMSNorm in fp32, no fp32 angles
@pytest.mark.parametrize("kw", [
    dict(qk_norm=True), dict(window=2, attn_softcap=1.5, num_kv_heads=1),
    dict(parallel=True, bias="all", ffn="geglu"), dict(norm_position="double", ffn="gelu"),
    dict(norm_position="post", ffn="silu"),
    *(dict(NO_FP32, mixer=m) for m in ("mla", "linear", "mamba", "hyena")),
    dict(NO_FP32, num_experts=3, shared_experts=1)], ids=name)
def test_gradients_in_float64(kw):
    torch.manual_seed(0)
    block = M.Block(config(**{"d_model": 4, "num_heads": 2, "d_ff": 6, **kw})).double()
    names, values = zip(*block.named_parameters())
    run = lambda x, *ws: torch.func.functional_call(block, dict(zip(names, ws)), (x, torch.arange(4)))
    x = normal(2, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True, nondet_tol=1e-12)


def test_gradients_through_shared_keys_and_recomputed_blocks():
    for kw in (dict(layers="GC"), dict(layers="LCG", window=3, num_layers=3),
               dict(num_experts=4, router_noise=0.5), dict(mixer="mamba", mtp=1)):
        grads = []
        for recompute in (False, True):
            net = build(**kw).double()
            net.checkpoint_blocks = recompute
            torch.manual_seed(3)                           # of the router's noise
            M.training_loss(net, some_ids(), some_ids(seed=2))[1].backward()
            grads.append([p.grad for p in net.parameters()])
        for a, b in zip(*grads):
            close(a, b, **FP64)
    net = build(layers="GC").double()
    names, values = zip(*((n, p) for n, p in net.named_parameters() if "mixer" in n))
    run = lambda *ws: torch.func.functional_call(net, dict(zip(names, ws)), (some_ids(1, 3),))
    assert torch.autograd.gradcheck(run, values, fast_mode=True)


@pytest.mark.parametrize("kw", [dict(layers="GCAMRH", num_layers=6), dict(num_experts=4, mtp=1)], ids=name)
def test_compiled_is_the_same(kw):
    """Traced, not lowered to C++: that takes minutes and tests the compiler."""
    net, ids = build(**kw), some_ids()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager")
    want, got = (M.training_loss(f, ids, ids)[1] for f in (net, compiled))
    close(got, want, **FP32)
    got.backward()
    assert all(p.grad is not None for p in net.parameters())


# --- 5. accounting ------------------------------------------------------------------------------------------

ACCOUNTED = [*VARIANTS, dict(mixer="linear", bias="all", qk_norm=True, d_head=10),
             dict(mixer="mla", d_head=10), dict(mixer="hyena", d_head=10),
             dict(mixer="mamba", d_head=10, norm="none"),
             dict(d_head=6, d_model=50, num_kv_heads=2, bias="all", qk_norm=True),
             dict(num_experts=8, experts_per_token=8, ffn="relu")]


@pytest.mark.parametrize("kw", ACCOUNTED, ids=name)
def test_parameters_flops_and_state_as_predicted(kw):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    net, ids = build(**kw), some_ids(2, 16)
    c = net.config
    total = sum(p.numel() for p in net.parameters())
    assert M.num_params(c) == total
    experts = [b.ffn for b in net.blocks if isinstance(b.ffn, M.MoE)]
    idle = sum((1 - c.experts_per_token / c.num_experts) * w.numel()
               for e in experts for w in (e.w1, e.w2, e.w3) if w is not None)
    assert M.num_params_active(c) == total - idle - sum(p.numel() for p in net.mtp.parameters())
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        loss = M.training_loss(net, ids, ids)[1]
    counted = forward.get_total_flops()
    predicted = M.train_flops(c, 2 * 16) / 3
    hyenas = [m for m in net.modules() if isinstance(m, M.Hyena)]
    for m in hyenas:                                       # a filter serves all rows; FFTs are not counted
        predicted -= 2 * 16 * (17 * 64 + 64 * 24) + 2 * 16 * M.mixer_costs(m.c, 16)["scores"]
    assert counted == predicted, c
    with FlopCounterMode(display=False) as backward, sdpa_kernel(SDPBackend.MATH):
        loss.backward()
    backward = backward.get_total_flops() / (2 * counted)
    recurrent = any(isinstance(m, (M.LinearAttention, M.Mamba)) for m in net.modules())
    assert hyenas or (0.8 < backward <= 1 if recurrent else backward == 1)   # the last state leads nowhere
    held = [M.state_bytes(c, n) for n in (1, 5, 1024, 131072)]
    assert held == sorted(held)
    if c.mixer in ("linear", "mamba") and not c.layers:
        assert len(set(held)) == 1 and M.kv_bytes_per_token(c) == 0
    if c.layers and set(c.layers) <= set("GLCA"):
        assert M.state_bytes(c, 1) == M.kv_bytes_per_token(c)


@pytest.mark.parametrize("kw", [dict(mixer=m) for m in ("mla", "linear", "mamba", "hyena")] + [
    dict(num_experts=8), dict(num_experts=16, experts_per_token=4, shared_experts=1), dict(mtp=1),
    dict(layers="GC")], ids=name)
def test_saved_bytes_are_about_as_predicted(kw):
    for D, N, T in ((64, 1, 64), (128, 2, 128), (128, 4, 64)):
        c = M.ModelConfig(vocab_size=64, d_model=D, num_heads=N, context_length=T, num_layers=2, **kw)
        net, ids = M.Transformer(c), torch.randint(0, 64, (2, T + 1))
        with M.count_saved_bytes(net) as kept:
            loss = M.training_loss(net, ids[:, :-1].contiguous(), ids[:, 1:].contiguous())[1]
        assert sum(M.activation_bytes(c, 2).values()) == pytest.approx(sum(kept.values()), rel=0.25), c
        del loss


def test_published_state_sizes():
    """DeepSeek-V2: 512 + 64 numbers a token and layer for 128 heads of 128. Llama-2-13B: 819 kB a token."""
    deepseek = M.ModelConfig(d_model=5120, num_heads=128, d_head=128, num_layers=60, mixer="mla")
    assert (deepseek.latent_dim, deepseek.rotary_dim) == (512, 64)
    assert M.kv_bytes_per_token(deepseek) == 2 * 60 * 576
    llama = M.ModelConfig(**M.PRESETS["llama2-13b"])
    assert M.state_bytes(llama, 1000) == 819_200_000
    assert M.state_bytes(replace(llama, layers="GC"), 1000) == 409_600_000
    sixth = replace(llama, layers="LLLLLG", window=1024)   # character.ai's pattern
    assert M.state_bytes(sixth, 131072) < M.state_bytes(llama, 131072) / 6
    mixtral = M.ModelConfig(vocab_size=32000, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=8,
                            d_ff=14336, num_experts=8, d_expert=14336)
    assert M.num_params(mixtral) == 46_702_792_704         # "47B", 13B of them active
    assert M.num_params_active(mixtral) == 12_879_925_248


def test_fine_grained_experts_cost_the_same():
    coarse = config(num_experts=4, experts_per_token=1, d_expert=40)
    fine = config(num_experts=16, experts_per_token=4, d_expert=10)
    without_router = lambda c, active: M.ffn_weights(c, active) - c.num_experts * c.d_model
    for active in (False, True):
        assert without_router(coarse, active) == without_router(fine, active)


# --- 6. configurations, checkpoints, the demo ---------------------------------------------------------------

@pytest.mark.parametrize("kw,words", [
    (dict(layers="GXG"), "layers=GXG"), (dict(layers="CG"), "--layers GCG"),
    (dict(layers="LG"), "--window 128"),
    (dict(layers="MA", window=4), "--window 0"), (dict(mixer="mamba", attn_softcap=3.0), "--attn_softcap 0"),
    (dict(rope_dims=3), "--rope_dims 4"), (dict(rope_low_freq=4.0), "--rope_high_freq"),
    (dict(num_experts=2, experts_per_token=3), "--experts_per_token 2"),
    (dict(num_experts=6, balance_devices=4), "--balance_devices 1"), (dict(mtp=-1), "mtp=-1"),
    (dict(mtp=16), "--mtp 0"),
    (dict(router_noise=math.nan), "router_noise"), (dict(router="best"), "expert_choice"),
    (dict(num_experts=-1), "num_experts=-1"), (dict(rope_factor=0.0), "rope_factor")], ids=lambda v: name(v)
    if isinstance(v, dict) else v)
def test_config_errors(kw, words):
    with pytest.raises(ValueError) as e:
        config(**kw)
    assert words in str(e.value) and "\n" not in str(e.value)
    remedy = re.search(r"try --(\w+) (\S+)$", str(e.value))
    if remedy:                                             # followed, it works
        kind = type(getattr(config(), remedy[1]))
        config(**{**kw, remedy[1]: kind(remedy[2])})


def test_shared_keys_need_a_layer_before_them():
    with pytest.raises(ValueError, match="--layers GC"):
        M.Transformer(config(mixer="shared"))


@each_variant
def test_checkpoints_of_variants(kw):
    net, f = build(**kw), io.BytesIO()
    M.save_checkpoint(f, net)
    f.seek(0)
    again = M.load_model(f)
    assert again.config == net.config and torch.equal(again(some_ids()), net.eval()(some_ids()))


def test_checkpoints_from_before_the_variants_load():
    net = build()
    old = {k: v for k, v in asdict(net.config).items() if k in (
        "vocab_size", "context_length", "d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff", "mixer",
        "ffn", "norm", "norm_position", "norm_eps", "parallel", "position", "rope_theta", "qk_norm", "window",
        "attn_softcap", "logit_softcap", "dropout", "bias", "tie_embeddings", "init")}
    again = M.load_model(dict(config=old, model=net.state_dict(), step=0))
    assert torch.equal(again(some_ids()), net.eval()(some_ids()))


def test_the_demos_of_variants(tmp_path, capsys):
    small = M.ModelConfig(d_model=32, num_heads=2, num_layers=4, context_length=32, vocab_size=99)
    assert M.variants(replace(small, layers="MLG", window=5, num_experts=2)) == M.variants(small)
    for preset in M.PRESETS.values():                      # every preset has all of them
        assert len(dict(M.variants(M.ModelConfig(**preset)))) == 12
    M.demo_variants("small", small)
    M.demo_variants("large", M.ModelConfig(**M.PRESETS["llama2-13b"]))
    M.demo_reach(small)
    out = capsys.readouterr().out
    errors = [float(e) for e in re.findall(r" (\d\.\de[-+]\d\d)$", out, re.M)]
    assert len(errors) == len(M.variants(small)) and max(errors) < 1e-5
    reach = re.search(r"= (\d+) tokens, the last among them; the gradient reaches (\d+)", out)
    assert reach[1] == reach[2]
    right = M.demo_recall(pairs=(1, 123), texts=8)
    assert right["attention"] == [1, 1] and right["linear"][0] == 1 and 0.2 < right["linear"][1] < 0.8
    M.demo_sorted(tokens=16, repeats=1)
    assert re.search(r"\n  64 +[\d.]+ +[\d.]+ +[\d.]+\n", capsys.readouterr().out)
    loads = M.demo_experts(steps=25)
    M.plot_shares(tmp_path / "model.png", loads)
    out = capsys.readouterr().out
    assert all(f"\n  {b} " in out for b in ("none", "loss", "bias"))
    assert all(len(load) == 25 and sum(load[-1]) == pytest.approx(1) for load in loads.values())
    assert (tmp_path / "model.png").stat().st_size > 5000
