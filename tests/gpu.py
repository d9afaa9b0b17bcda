"""tests/gpu.py - everything that needs a GPU, in under eight minutes.

    python tests/gpu.py                          # all parts; out/gpu.json as results come, then a table
    python tests/gpu.py --only correct bench     # some parts
    python tests/gpu.py --minutes 20             # every part's time limit in proportion
    python tests/gpu.py --dry                    # no GPU: every check at tiny shapes, for its own errors

A part is a generator of (check, function) pairs under @part(seconds); a function returns a dict of results,
with "ok": False when it is wrong, and raises what it likes. To add one, write it at the end of section 2.
Each part runs in a process of its own (what takes no times, in several at once): a check that fails, runs out
of memory or corrupts the device costs itself alone, since the part starts again behind it; what hangs is
ended at the part's limit. A first run spends most of its time compiling; a part that did not reach its end
says so, and a second run finds the compiled code on disk. Without a GPU: one line, status 0.
"""
import argparse
import gc
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

START = time.monotonic()                                   # a cold machine may need a minute to import torch
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model as M  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

Part = namedtuple("Part", "seconds processes checks")      # seconds: of the eight minutes
PARTS = {}
D = "cuda"                                                 # "cpu" in a dry run


def pick(real, small):
    return real if D == "cuda" else small


def dry_run():
    """Make this process walk through all checks on a CPU: one call where a clock would want many, no
    compiler, fp32. What is wrong in this file shows here, not on a GPU that is lent for minutes."""
    global D
    import kernels as K
    D, cases = "cpu", K.cases
    assert K.INTERPRETED, "a dry run needs TRITON_INTERPRET=1 where there is a GPU"

    def race(functions, *_, **__):
        for f in functions.values():
            f()
        return dict.fromkeys(functions, (1.0, 0.0))
    K.cases, K.race = lambda device="cpu", *_, **__: cases(device), race
    torch.compile = lambda f, **_: f
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, lambda *_: None)
    torch.cuda.memory_allocated = torch.cuda.max_memory_allocated = lambda *_: 0
    torch.cuda.get_device_name = lambda *_: "a dry run"
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(total_memory=0)
    PARTS.update({name: p._replace(processes=1) for name, p in PARTS.items()})


def part(seconds, processes=1):
    def register(function):
        PARTS[function.__name__] = Part(seconds, min(processes, os.cpu_count() or 1), function)
        return function
    return register


# --- 1. peers: the best libraries, as far as they are here --------------------------------------------------

def peers(K):
    """{case: {peer: function of the same inputs}}"""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa(backend):
        def run(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return run

    def flex():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        compiled, masks = torch.compile(flex_attention, dynamic=False), {}

        def run(q, k, v):
            T = q.shape[2]
            if T not in masks:
                masks[T] = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=D)
            return compiled(q, k, v, block_mask=masks[T], enable_gqa=True)
        return run

    def once(make):
        """A peer that prepares something, such as a copy of the weights, at its first call."""
        made = []

        def run(*inputs):
            if not made:
                made.append(make(*inputs))
            return made[0](*inputs)
        return run

    def fused_adamw(p, g, m, v):
        weight = torch.nn.Parameter(p.clone())
        weight.grad = g
        optimizer = torch.optim.AdamW([weight], lr=1e-3, fused=True)
        return lambda p, *_: optimizer.step() or p         # step returns None

    def bf16_weights(x, q, scale):                         # what the quantised product replaces
        w = K.dequantize(q, scale).to(x.dtype)
        return lambda x, *_: F.linear(x, w)

    def scaled(x, w, a, b):                                # fast_accum: sums as ours, in some 14 bits
        return torch._scaled_mm(x, w.T, scale_a=a[:, None], scale_b=b[None], out_dtype=torch.bfloat16,
                                use_fast_accum=True)

    def no_loop(*_):
        raise ValueError("a loop over lengths that only the GPU knows")
    found = {"GeLU": {"torch": lambda x: F.gelu(x, approximate="tanh")},
             "SwiGLU": {"torch": lambda a, b: F.silu(a) * b},
             "softmax": {"torch": lambda x: F.softmax(x, -1)},
             "RMSNorm": {"torch": lambda x, w: F.rms_norm(x, w.shape, w, 1e-5)},
             "cross-entropy": {"torch": F.cross_entropy},
             "attention": {"cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION), "flex": flex(),
                           "FlashAttention-2": sdpa(SDPBackend.FLASH_ATTENTION)},
             "linear, fp8": {"cuBLAS": scaled},
             "linear, int8 weights": {"bf16 weights": once(bf16_weights)},
             "linear, int4 weights": {"bf16 weights": once(bf16_weights)},
             "grouped linear": {"torch.compile": no_loop},
             "AdamW": {"torch, fused": once(fused_adamw)}}
    if hasattr(F, "grouped_mm"):
        found["grouped linear"]["F.grouped_mm"] = lambda x, w, ends: F.grouped_mm(x, w.mT, offs=ends)
    if hasattr(F, "linear_cross_entropy"):
        found["linear + cross-entropy"] = {"torch": F.linear_cross_entropy}
    try:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction as CE
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as FLCE
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction as Norm
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction as SiLUMul
    except ImportError:
        return found
    liger = {"RMSNorm": lambda x, w: Norm.apply(x, w, 1e-5), "SwiGLU": SiLUMul.apply,
             "cross-entropy": lambda z, t: CE.apply(z, t, None)[0],
             "linear + cross-entropy": lambda x, w, t: FLCE.apply(x, w, t)[0]}
    for case, function in liger.items():
        found.setdefault(case, {})["Liger"] = function
    return found


# --- 2. the parts -------------------------------------------------------------------------------------------

@part(30, processes=12)
def compiled():
    """What the timed parts will run, compiled for this GPU by all cores at once: they find it on disk."""
    import kernels as K

    def run(function, inputs):
        if K.INTERPRETED:                                  # a dry run
            return {"rows": []}
        major, minor = torch.cuda.get_device_capability()
        with K.compile_only(True, arch=10 * major + minor) as log:
            K.outcome(function, inputs())
        return {"rows": [{**r, "faults": K.faults(r)} for r in log]}
    for case in K.cases("meta", torch.bfloat16, full=True):
        yield case.name, lambda case=case: run(case.ours, case.inputs)
    for B, N, heads, T, H, window in SHAPES:
        yield f"attention, {B} {N} {heads} {T} {H} {window}", lambda B=B, N=N, heads=heads, T=T, H=H, w=window: run(
            lambda q, k, v: K.attention(q, k, v, True, w),
            lambda: [torch.empty(B, n, T, H, dtype=torch.bfloat16, device="meta", requires_grad=True)
                     for n in (N, heads, heads)])


@part(20)
def ceilings():
    """What this GPU reaches at best: the floors of everything below."""
    import kernels as K

    def copy():
        x, y = torch.empty(2, pick(2**29, 2**10), dtype=torch.uint8, device=D)
        return {"GB/s": 2 * x.numel() / K.race({"copy": lambda: y.copy_(x)}, D)["copy"][0] / 1e9}

    def product(dtype, n=8192):
        def run():
            a, b = torch.randn(2, *pick((n, n), (8, 8)), device=D).to(dtype)         # zeros would run cooler
            return {"TFLOP/s": 2 * n**3 / K.race({"a @ b": lambda: a @ b}, D)["a @ b"][0] / 1e12}
        return run
    yield "copy of 512 MB", copy
    yield "bf16 product, 8192^3", product(torch.bfloat16)
    yield "fp32 product, 8192^3", product(torch.float32)


def compared(K, ours, exact, inputs, limit):
    """{worst error, ok} of outputs and gradients against float64 on the same inputs. torch.empty gives NaN
    meanwhile: an element that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        errors = K.errors(ours, exact, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    return {"error": max(errors, key=lambda e: math.inf if math.isnan(e) else e), "limit": limit,
            "ok": all(e < limit for e in errors)}


@part(55, processes=12)
def correct():
    """Every kernel on fresh random inputs against float64. Compiling them takes longest: many processes."""
    import kernels as K
    torch.manual_seed(time.time_ns() % 2**31)
    limits = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}
    low = pick(torch.bfloat16, torch.float32)
    for dtype, limit in pick(limits, {low: 1e-5}).items():
        for case in K.cases(D, dtype):
            if case.name == "linear, TMA" and dtype == torch.float32 and D == "cuda":
                continue                                   # bf16, fp16 and fp8 only
            yield f"{case.name}, {str(dtype)[6:]}", lambda case=case, limit=limit: compared(
                K, case.ours, case.plain, case.inputs(), max(limit, 1e-2 if "fp8" in case.name else 0))

    def attention(T, S, H, causal, window, dtype):
        def exact(q, k, v):
            position = torch.arange(S, device=D)
            mask = M.attention_mask(position[S - T:], position, window) if causal else None
            k, v = (t.repeat_interleave(3, 1) for t in (k, v))
            return M.scaled_dot_product_attention(q, k, v, mask)

        def inputs():
            return [torch.randn(2, n, t, H, device=D).to(dtype).requires_grad_()
                    for n, t in ((6, T), (2, S), (2, S))]
        return lambda: compared(K, lambda *t: K.attention(*t, causal, window), exact, inputs(), limits[dtype])
    for H in pick((16, 32, 64, 80, 128, 256), [16]):
        for T, S, causal, window in pick(((777, 777, True, 0), (300, 777, True, 0), (500, 600, False, 0),
                                          (777, 777, True, 100), (1, 777, True, 0)), [(9, 20, True, 5)]):
            yield f"attention H {H}, {T} x {S}, {'causal' if causal else 'full'}, window {window}", \
                attention(T, S, H, causal, window, low)
    for H in pick((64, 128), [24]):
        yield f"attention H {H}, fp32", attention(*pick((333, 333), (9, 9)), H, True, 0, torch.float32)
    for n in pick((1, 7, 123, 4095, 16384, 50257), (1, 7)):
        yield f"softmax, rows of {n}", lambda n=n: compared(
            K, K.softmax, lambda x: torch.softmax(x, -1),
            [torch.randn(37, n, device=D, requires_grad=True)], 1e-5)
    for n in pick((16384, 8192), [24]):                    # the widest, in bf16 and fp32
        yield f"RMSNorm, rows of {n}", lambda n=n, kind=pick(torch.bfloat16, low) if n > 8192 else torch.float32: \
            compared(K, K.rms_norm, lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), [
                torch.randn(shape, device=D).to(kind).requires_grad_() for shape in ((1000, n), (n,))],
                limits[kind])
    yield "softmax and cross-entropy beyond 2^31 elements", lambda: far_rows(K)
    yield "attention and RoPE beyond 2^31 elements", lambda: far_tokens(K)


def far_rows(K):
    """Offsets in 32 bits would wrap: the last rows of 2.4e9 elements, forward and backward."""
    R, V = pick((80_000, 30_000), (9, 300))
    x = torch.randn(R, V, device=D, dtype=pick(torch.bfloat16, torch.float32)).requires_grad_()
    t = torch.randint(0, V, (R,), device=D)
    tail, last = x.detach()[-5:].double().requires_grad_(), t[-5:]
    pairs = [(K.softmax(x.detach())[-5:], tail.detach().softmax(-1))]
    loss, exact = K.cross_entropy(x * 1, t, reduction="none"), F.cross_entropy(tail, last, reduction="none")
    pairs += [(loss[-5:], exact), (torch.autograd.grad(loss.sum(), x)[0][-5:],
                                   torch.autograd.grad(exact.sum(), tail)[0])]
    error = max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)
    return {"error": error, "ok": error < 1e-2}


def far_tokens(K):
    """The last 8 of 300,000 tokens, 64 heads and one key head among them; a window, so that time stays short
    and the last tokens alone give the same numbers. Takes 20 GB."""
    T, N, H, W = pick((300_000, 64, 128, 128), (40, 4, 16, 8))
    q = torch.randn(1, T, N, H, device=D, dtype=pick(torch.bfloat16, torch.float32))
    q = q.transpose(1, 2).requires_grad_()
    key = q.detach()[:, :1]                                # a view: its rows are as far apart as q's
    y = K.attention(q, key, key, True, W)
    dy = torch.randn_like(y)
    dq, = torch.autograd.grad(y, q, dy)
    at = torch.arange(T - W - 8, T, device=D)
    tail = q.detach()[:, :, at].double().requires_grad_()
    exact = M.scaled_dot_product_attention(tail, *[key[:, :, at].double()] * 2, M.attention_mask(at, at, W))
    dtail, = torch.autograd.grad(exact, tail, dy[:, :, at].double())
    turned = K.rope(q.detach().transpose(1, 2), *K.rope_table(torch.arange(T, device=D), H))
    pairs = [(y[:, :, -8:], exact[:, :, -8:]), (dq[:, :, -8:], dtail[:, :, -8:]),
             (turned[:, -8:].transpose(1, 2), M.apply_rope(tail[:, :, -8:].float(), at[-8:]))]
    error = max(((a.double() - b).norm() / b.double().norm()).item() for a, b in pairs)
    return {"error": error, "ok": error < 2e-2}


@part(115)
def bench():
    """ours | operators | torch.compile | the best library, in turn; the share of the floor reached."""
    import kernels as K
    libraries = peers(K)
    for case in K.cases("meta"):
        yield case.name, lambda case=case: {"rows": K.benchmark(D, peers=libraries, only=[case.name])}


# Of causal attention: batch, heads, kv heads, tokens, head dim, window.
SHAPES = [(4, 32, 32, 4096, 128, 0), (1, 16, 16, 16384, 64, 0), (4, 32, 8, 4096, 128, 0),
          (1, 16, 16, 16384, 128, 0), (2, 32, 32, 8192, 64, 0), (1, 8, 8, 32768, 128, 0),
          (1, 8, 8, 32768, 128, 1024)]


@part(45)
def attention():
    """Causal attention against torch's best, by shape; flex, which compiles long, is in bench."""
    import kernels as K
    known = {name: f for name, f in peers(K)["attention"].items() if name != "flex"}

    def run(B, N, heads, T, H, window):
        kind = pick(torch.bfloat16, torch.float32)
        q, k, v = (torch.randn(B, T, n, H, device=D).to(kind).transpose(1, 2).requires_grad_()
                   for n in (N, heads, heads))
        flops = 2 * B * N * T * T * H                      # a full row is 4 T^2 H; the causal half of it
        out = {}
        ways = {"ours": lambda q, k, v: K.attention(q, k, v, True, window), **({} if window else known)}
        for which, amount in (("forward", flops), ("forward + backward", 3.5 * flops)):
            ready = {}
            for name, f in ways.items():
                try:
                    ready[name] = K.prepare(f, [q, k, v], which)
                except Exception as e:
                    out[f"{name}, {which}"] = M.first_line(e)[:60]
            for name, (seconds, _) in K.race(ready, D, 10).items():
                out[f"{name}, {which}, ms"] = 1000 * seconds
                if not window:
                    out[f"{name}, {which}, TFLOP/s"] = amount / seconds / 1e12
        return out
    for shape in pick(SHAPES, [(1, 2, 1, 20, 16, 5)]):
        yield "B {} N {} K {} T {} H {} window {}".format(*shape), lambda shape=shape: run(*shape)
    # The course's table: batch 8, no heads; the naive form runs out of memory where ours does not.
    for H in pick((16, 64, 128), [16]):
        for T in pick((256, 1024, 4096, 16384), [20]):
            yield f"naive against ours, batch 8, T {T}, H {H}", lambda T=T, H=H: naive_against_ours(K, T, H)


def naive_against_ours(K, T, H):
    out = {}
    for name, f in (("naive", lambda q, k, v: M.scaled_dot_product_attention(
            q, k, v, torch.ones(T, T, dtype=bool, device=D).tril())), ("ours", K.attention)):
        q, k, v = (torch.randn(8, T, H, device=D, dtype=pick(torch.bfloat16, torch.float32),
                               requires_grad=True) for _ in range(3))
        try:
            before = torch.cuda.memory_allocated()
            y = f(q, k, v)
            out[f"{name}, MB kept for backward"] = (torch.cuda.memory_allocated() - before) / 1e6
            del y
            for which in ("forward", "forward + backward"):
                call = K.prepare(f, [q, k, v], which)
                out[f"{name}, {which}, ms"] = 1000 * K.race({name: call}, D, 10)[name][0]
        except torch.OutOfMemoryError:
            out[name] = "out of memory"
            torch.cuda.empty_cache()
    return out


@part(40)
def model():
    """The model of model.py on our kernels: loss, gradients, step time, peak memory. 4 x 2048 tokens."""
    import kernels as K
    c = M.ModelConfig(vocab_size=50304, context_length=2048, d_model=pick(1024, 256), num_layers=6,
                      num_heads=16, num_kv_heads=4, init="glorot")

    def run(ways):
        names, rows = ("way", "loss", "gradient", "ms", "peak GB"), K.end_to_end(c, 4, D, ways)
        return {"rows": [dict(zip(names, r)) for r in rows], "ok": all(float(r[2]) < 5e-2 for r in rows)}
    for ways in (K.WAYS[:2], K.WAYS[::3], K.WAYS[::2])[:pick(3, 1)]:         # compiled ones last: minutes
        yield " against ".join(ways[::-1]), lambda ways=ways: run(ways)


@part(50)
def leaderboard():
    """The course's systems leaderboard: a full step of an 8.13B model on 2 x 32768 tokens in bf16. Two B200s:
    naive 10 s, the class's best 3.84 s. One GPU holds it with each block recomputed in the backward pass:
    65 GB of weights, gradients and moments, 18 GB of block inputs, 20 GB for the block at hand."""
    c = M.ModelConfig(vocab_size=151936, context_length=32768, d_model=4096, d_ff=11008, num_layers=34,
                      num_heads=32)

    def run():
        memory = torch.cuda.get_device_properties(0).total_memory
        return full_step(c, 2, D) if memory > 115e9 else {"s a step": f"not run: {memory / 1e9:.0f} GB"}
    yield "8.13B, 2 x 32768 tokens", run


def full_step(c, batch_size, device, dtype=torch.bfloat16):
    """Forward, backward and AdamW on our kernels, nothing in fp32 but sums."""
    import kernels as K
    net = M.skeleton(c).to(dtype).to_empty(device=device).train()
    for p in net.parameters():
        torch.nn.init.normal_(p, float(p.dim() == 1), 0.02)                  # gains near 1, matrices near 0
    net.checkpoint_blocks = True
    with K.in_model():
        *_, step = K.training_steps(net, K.random_ids(c, batch_size, device), device).values()
        for _ in range(2):                                 # the first compiles
            start = time.perf_counter()
            step()
            if "cuda" in device:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
    tokens = batch_size * c.context_length
    return {"s a step": seconds, "tok/s": tokens / seconds, "parameters": M.num_params(c),
            "TFLOP/s": M.train_flops(c, tokens) / seconds / 1e12,            # recomputing is not counted
            "peak GB": torch.cuda.max_memory_allocated() / 1e9 if "cuda" in device else 0.0,
            "ok": bool(net.norm.weight.isfinite().all())}  # one NaN in the loss, and it were NaN, too


@part(45)
def decode():
    """infer.py's engine with its CUDA graphs, bf16, 128 tokens in, greedy; the bound: every weight that a token
    needs (not the rows of the embedding that it does not look up) is read once a step."""
    import infer as I
    import kernels as K

    def run(shape, rows, steps=32):
        c = M.ModelConfig(**{**shape, "init": "glorot", "tie_embeddings": False, "context_length": 256})
        with torch.device(D):
            net = M.Transformer(c).to(pick(torch.bfloat16, torch.float32))
        engine = I.Engine(I.tune(net), rows, 0, num_blocks=rows, share=False)
        requests = [engine.add(I.Request(torch.randint(0, c.vocab_size, (128,)).tolist(), 96, temperature=0))
                    for _ in range(rows)]
        while not all(len(r.output) >= 8 for r in requests):                 # prompts, and the graph recorded
            engine.step()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / steps
        parts = M.count_params(c)
        moved = 2 * (sum(parts.values()) - parts["embedding"] - parts["position"]) / seconds
        _, bandwidth = K.HARDWARE.get(torch.cuda.get_device_name(), (0, math.nan))
        return {"tok/s": rows / seconds, "ms a step": 1000 * seconds, "GB/s of weights": moved / 1e9,
                "of the data sheet": moved / bandwidth, "ok": not any(r.finish for r in requests)}
    tiny = dict(d_model=32, num_layers=1, num_heads=2, vocab_size=64)
    for name, shape in (("GPT-2 124M", {**M.PRESETS["gpt2"], "vocab_size": 50304}), ("1.4B", dict(
            vocab_size=50304, d_model=2048, num_layers=24, num_heads=16))):
        for rows in (1, 16):
            yield f"{name}, {rows} at once", lambda shape=shape, rows=rows: run(pick(shape, tiny), rows)


class RandomText:
    """As much of a tokenizer as train.Run asks for: speed does not depend on what the tokens say."""
    vocab_size, eot_id = 50304, 0

    def hash(self):
        return "random"


GPT2 = "--preset gpt2 --batch_size 64 --micro_batch 32 --optimizer adamw --steps 1000 --dtype bf16"
LARGE = ("--preset small --d_model 2048 --num_layers 24 --num_heads 16 --context_length 2048 --batch_size 16 "
         "--micro_batch 4 --optimizer adamw --steps 1000 --dtype bf16")    # 1.4B parameters
TINY = ("--preset tiny --num_layers 1 --d_model 32 --context_length 16 --batch_size 2 --micro_batch 1 "
        "--optimizer adamw --steps 1000 --dtype fp32")     # for a dry run


@part(100)
def train():
    """Tokens a second and MFU of train.py's own step, with and without our kernels."""
    import contextlib
    import numpy as np
    import kernels as K
    import train as R
    R.token_bytes = lambda tokenizer: np.ones(tokenizer.vocab_size, dtype=np.int64)

    def run(flags, ours, steps=pick(6, 3)):
        s, text = R.settings(pick(flags, TINY).split() + ["--device", D])[0], RandomText()
        text.vocab_size = pick(text.vocab_size, 64)
        tokens = np.random.default_rng(0).integers(0, text.vocab_size, 2**22, dtype=np.uint16)
        with K.in_model() if ours else contextlib.nullcontext():
            with torch.device(D):                          # 1.4e9 random numbers take a CPU half a minute
                run = R.Run(s, text, tokens, tokens[:10000])
            run.model.train()
            torch.cuda.reset_peak_memory_stats()
            fields = [run.train_step() for _ in range(steps)][2:]          # two to warm up and compile
        return {"tok/s": statistics.median(f["tok_s"] for f in fields), "loss": fields[-1]["loss"],
                "mfu": statistics.median(f["mfu"] or math.nan for f in fields),
                "peak GB": torch.cuda.max_memory_allocated() / 1e9, "ok": math.isfinite(fields[-1]["loss"])}
    for compiled in pick(("", " --compile"), [""]):        # what compiles for minutes comes last
        for name, flags in (("GPT-2 124M", GPT2), ("1.4B", LARGE)):
            for ours in (True, False):
                label = name + ", our kernels" * ours + ", compiled" * bool(compiled)
                yield label, lambda flags=flags + compiled, ours=ours: run(flags, ours)


# --- 3. running them ----------------------------------------------------------------------------------------

def record(path, **fields):
    with open(path, "a") as f:
        f.write(json.dumps(fields, default=str) + "\n")


def read(path, part=None, share=None):
    """The last line about each check: of all, or of one process of a part; not a line cut by a kill."""
    last = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.endswith("}"):
            r = json.loads(line)
            if part in (None, r["part"]) and share in (None, r["share"]):
                last[r["part"], r["check"]] = r
    return list(last.values())


BROKEN = 3                                                 # a process's status: the device can't be believed


def run_part(name, path, share):
    """In a process of its own: its share of the checks that are not done, a line before and behind each."""
    done = {r["check"] for r in read(path, name)}
    for i, (check, function) in enumerate(PARTS[name].checks()):
        if check in done or i % PARTS[name].processes != share:
            continue
        fields, start = dict(part=name, share=share, check=check), time.perf_counter()
        record(path, **fields, status="started")
        try:
            result = function()
            torch.cuda.synchronize()
            fields.update(result, status="ok" if result.pop("ok", True) else "WRONG")
        except Exception as e:
            fields.update(status="FAILED", why=M.first_line(e), where=traceback.format_exc(limit=-6))
        record(path, **fields, seconds=time.perf_counter() - start)
        if re.search("CUDA error|Triton Error", fields.get("why", "")):
            os._exit(BROKEN)
        torch.compiler.reset()
        gc.collect()                                       # a model may hold half of the memory
        torch.cuda.empty_cache()


def supervise(name, path, seconds):
    """Start a part's processes, each again behind a check that ended it, until all are through or time is."""
    end, running = time.monotonic() + seconds, {}

    def start(share):
        log = tempfile.TemporaryFile("w+")
        running[share] = log, subprocess.Popen(
            [sys.executable, __file__, "--run_part", name, "--share", str(share), "--lines", str(path)],
            stdout=subprocess.DEVNULL, stderr=log, cwd=ROOT)
    try:
        for share in range(PARTS[name].processes):
            start(share)
        while running:
            time.sleep(0.05)
            for share, (log, process) in list(running.items()):
                late = time.monotonic() > end
                if process.poll() is None and not late:
                    continue
                process.kill()
                status = process.wait()
                del running[share]
                if status == 0:
                    continue
                if status == BROKEN and not late:          # that check is recorded: on with the next
                    start(share)
                    continue
                log.seek(0)
                log = log.read().strip()[-3000:]
                said = log.split("\n")[-1][:300]
                why = f"not done after {seconds:.0f} s, the limit of this part, nor were checks behind it" \
                    if late else f"the process ended with status {status}: {said}"
                began = [r for r in read(path, name, share) if r["status"] == "started"]
                for r in began or [dict(part=name, share=share, check=f"(process {share}, between checks)")]:
                    record(path, **{**r, "status": "FAILED", "why": why, "where": log})
                if began and not late:
                    start(share)
    finally:
        for _, process in running.values():                # Ctrl-C
            process.kill()


def markdown(device, results):
    """One table a part: a check's own fields, or its rows, are the columns."""
    lines, common = [f"# {device}", ""], ("part", "share", "check", "status", "seconds", "limit")
    for name in PARTS:
        mine = [r for r in results if r["part"] == name]
        good = [r for r in mine if r["status"] == "ok"]
        if not mine:
            continue
        lines += [f"## {name}: {len(good)} of {len(mine)} checks passed", ""]
        for r in mine:
            if r["status"] != "ok":
                lines.append(f"- **{r['status']}** {r['check']}: {r.get('why') or r.get('error')}")
        rows = [dict(check=r["check"], **{k: v for k, v in row.items() if k != "case"}) for r in good
                for row in r.get("rows", [{k: v for k, v in r.items() if k not in common}])]
        if name == "correct":                              # a hundred rows: the worst ten say it
            rows = sorted(rows, key=lambda r: -r["error"])[:10]
        if name == "compiled":
            rows = [r for r in rows if r["faults"]]
        columns = list(dict.fromkeys(k for r in rows for k in r))
        if rows:
            lines += ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
            lines += ["| " + " | ".join(number(r.get(k, "")) for k in columns) + " |" for r in rows]
        lines.append("")
    return "\n".join(lines)


def number(v):
    if not isinstance(v, float):
        return str(v)
    return f"{v:.1e}" if 0 < abs(v) < 0.01 else f"{v:,.3g}" if abs(v) < 100 else f"{v:,.0f}"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", default=list(PARTS),
                        help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--out", default="out", help="folder for gpu.json and gpu.md")
    parser.add_argument("--dry", action="store_true", help="on a CPU, at tiny shapes")
    parser.add_argument("--run_part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main():
    args = parse_args()
    if args.dry:
        dry_run()
    if args.run_part:
        return run_part(args.run_part, args.lines, args.share)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available() and not args.dry:
        (out / "gpu.json").write_text(json.dumps({"skipped": "no CUDA GPU here"}))
        return print(f"skipped: no CUDA GPU here (torch {torch.__version__}); the checks without one: "
                     f"python -m pytest tests/test_kernels.py")
    import triton
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    path = (out / "gpu.jsonl").resolve()
    path.unlink(missing_ok=True)
    for i, name in enumerate(args.only):
        left = 60 * args.minutes - (time.monotonic() - START)                # what a part saves, others get
        limit = left * PARTS[name].seconds / sum(PARTS[n].seconds for n in args.only[i:])
        run_part(name, path, 0) if args.dry else supervise(name, path, limit)
        mine, results = read(path, name), read(path)
        print(f"{name:<11} {sum(r['status'] == 'ok' for r in mine):>3} of {len(mine)} passed, "
              f"{time.monotonic() - START:.0f} s so far", flush=True)
        (out / "gpu.json").write_text(json.dumps({"device": device, "results": results}, indent=1))
        (out / "gpu.md").write_text(markdown(device, results))
    print("\n" + (out / "gpu.md").read_text())
    return int(any(r["status"] != "ok" for r in results))


if __name__ == "__main__":
    sys.exit(main())
