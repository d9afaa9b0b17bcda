"""tests/gpu.py - everything that needs a GPU, in under eight minutes.

    python tests/gpu.py                          # all parts; out/gpu.json as results come, then a table
    python tests/gpu.py --only correct bench     # some parts
    python tests/gpu.py --minutes 20             # every part's time limit in proportion

A part is a generator of (check, function) pairs under @part(seconds); a function returns a dict of results,
with "ok": False when it is wrong, and raises what it likes. To add one, write it at the end of section 2.
Each part runs in a process of its own (what takes no times, in several at once): a check that fails, runs out
of memory or corrupts the device costs itself alone, since the part starts again behind it; what hangs is
ended at the part's limit. A first run spends most of its time compiling; a part that did not reach its end
says so, and a second run finds the compiled code on disk. Without a GPU: one line, status 0.
"""
import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model as M  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

Part = namedtuple("Part", "seconds processes checks")      # seconds: of the eight minutes
PARTS = {}


def part(seconds, processes=1):
    def register(function):
        PARTS[function.__name__] = Part(seconds, processes, function)
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
                masks[T] = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device="cuda")
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

    def scaled(x, w, a, b):
        return torch._scaled_mm(x, w.T, scale_a=a[:, None], scale_b=b[None], out_dtype=torch.bfloat16)
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
             "AdamW": {"torch, fused": once(fused_adamw)}}
    if hasattr(F, "grouped_mm"):
        found["grouped linear"] = {"F.grouped_mm": lambda x, w, ends: F.grouped_mm(x, w.mT, offs=ends)}
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

@part(20)
def ceilings():
    """What this GPU reaches at best: the floors of everything below."""
    import kernels as K

    def copy():
        x, y = torch.empty(2, 2**29, dtype=torch.uint8, device="cuda")
        return {"GB/s": 2 * x.numel() / K.race({"copy": lambda: y.copy_(x)}, "cuda")["copy"][0] / 1e9}

    def product(dtype):
        def run():
            a, b = torch.randn(2, 8192, 8192, device="cuda").to(dtype)     # zeros would run cooler and faster
            return {"TFLOP/s": 2 * 8192**3 / K.race({"a @ b": lambda: a @ b}, "cuda")["a @ b"][0] / 1e12}
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


@part(60, processes=8)
def correct():
    """Every kernel on fresh random inputs against float64. Compiling them takes longest: eight processes."""
    import kernels as K
    torch.manual_seed(time.time_ns() % 2**31)
    limits = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}
    for dtype, limit in limits.items():
        for case in K.cases("cuda", dtype):
            if case.name == "linear, TMA" and dtype == torch.float32:
                continue                                   # bf16, fp16 and fp8 only
            yield f"{case.name}, {str(dtype)[6:]}", lambda case=case, limit=limit: compared(
                K, case.ours, case.plain, case.inputs(), max(limit, 1e-2 if "fp8" in case.name else 0))

    def attention(T, S, H, causal, window, dtype):
        def exact(q, k, v):
            position = torch.arange(S, device="cuda")
            mask = M.attention_mask(position[S - T:], position, window) if causal else None
            k, v = (t.repeat_interleave(3, 1) for t in (k, v))
            return M.scaled_dot_product_attention(q, k, v, mask)

        def inputs():
            return [torch.randn(2, n, t, H, device="cuda").to(dtype).requires_grad_()
                    for n, t in ((6, T), (2, S), (2, S))]
        return lambda: compared(K, lambda *t: K.attention(*t, causal, window), exact, inputs(), limits[dtype])
    for H in (16, 32, 64, 80, 128, 256):
        for T, S, causal, window in ((777, 777, True, 0), (300, 777, True, 0), (500, 600, False, 0),
                                     (777, 777, True, 100)):
            yield f"attention H {H}, {T} x {S}, {'causal' if causal else 'full'}, window {window}", \
                attention(T, S, H, causal, window, torch.bfloat16)
    for H in (64, 128, 256):
        yield f"attention H {H}, fp32", attention(333, 333, H, True, 0, torch.float32)
    for n in (1, 7, 123, 4095, 50257):
        yield f"softmax, rows of {n}", lambda n=n: compared(
            K, K.softmax, lambda x: torch.softmax(x, -1),
            [torch.randn(37, n, device="cuda", requires_grad=True)], 1e-5)
    yield "softmax and cross-entropy beyond 2^31 elements", lambda: far_rows(K)
    yield "attention and RoPE beyond 2^31 elements", lambda: far_tokens(K)


def far_rows(K):
    """Offsets in 32 bits would wrap: the last rows of 2.4e9 elements."""
    x = torch.randn(80_000, 30_000, device="cuda", dtype=torch.bfloat16)
    t = torch.randint(0, 30_000, (80_000,), device="cuda")
    tail = x[-5:].float()
    error = (K.softmax(x)[-5:].float() - tail.softmax(-1)).abs().max().item()
    loss = K.cross_entropy(x, t, reduction="none")[-5:]
    error = max(error, (loss - F.cross_entropy(tail, t[-5:], reduction="none")).abs().max().item())
    return {"error": error, "ok": error < 1e-2}


def far_tokens(K, T=300_000, N=64, H=128, W=128):
    """The last 8 of 300,000 tokens, 64 heads and one key head among them; a window, so that time stays short
    and the last tokens alone give the same numbers. Takes 20 GB."""
    q = torch.randn(1, T, N, H, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
    key = q.detach()[:, :1]                                # a view: its rows are as far apart as q's
    y = K.attention(q, key, key, True, W)
    dy = torch.randn_like(y)
    dq, = torch.autograd.grad(y, q, dy)
    at = torch.arange(T - W - 8, T, device="cuda")
    tail = q.detach()[:, :, at].double().requires_grad_()
    exact = M.scaled_dot_product_attention(tail, *[key[:, :, at].double()] * 2, M.attention_mask(at, at, W))
    dtail, = torch.autograd.grad(exact, tail, dy[:, :, at].double())
    turned = K.rope(q.detach().transpose(1, 2), *K.rope_table(torch.arange(T, device="cuda"), H))
    pairs = [(y[:, :, -8:], exact[:, :, -8:]), (dq[:, :, -8:], dtail[:, :, -8:]),
             (turned[:, -8:].transpose(1, 2), M.apply_rope(tail[:, :, -8:].float(), at[-8:]))]
    error = max(((a.double() - b).norm() / b.double().norm()).item() for a, b in pairs)
    return {"error": error, "ok": error < 2e-2}


@part(130)
def bench():
    """ours | operators | torch.compile | the best library, in turn; the share of the floor reached."""
    import kernels as K
    libraries = peers(K)
    for case in K.cases("meta"):
        yield case.name, lambda case=case: {"rows": K.benchmark("cuda", peers=libraries, only=[case.name])}


@part(50)
def attention():
    """Causal attention against torch's best, by shape: (batch, heads, kv heads, tokens, head dim, window)."""
    import kernels as K
    known = peers(K)["attention"]
    shapes = [(4, 32, 32, 4096, 128, 0), (1, 16, 16, 16384, 64, 0), (4, 32, 8, 4096, 128, 0),
              (1, 16, 16, 16384, 128, 0), (2, 32, 32, 8192, 64, 0), (1, 8, 8, 32768, 128, 0),
              (1, 8, 8, 32768, 128, 1024)]

    def run(B, N, heads, T, H, window):
        q, k, v = (torch.randn(B, T, n, H, device="cuda").bfloat16().transpose(1, 2).requires_grad_()
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
            for name, (seconds, _) in K.race(ready, "cuda", 10).items():
                out[f"{name}, {which}, ms"] = 1000 * seconds
                if not window:
                    out[f"{name}, {which}, TFLOP/s"] = amount / seconds / 1e12
        return out
    for shape in shapes:
        yield "B {} N {} K {} T {} H {} window {}".format(*shape), lambda shape=shape: run(*shape)
    # The course's table: batch 8, no heads; the naive form runs out of memory where ours does not.
    for H in (16, 64, 128):
        for T in (256, 1024, 4096, 16384):
            yield f"naive against ours, batch 8, T {T}, H {H}", lambda T=T, H=H: naive_against_ours(K, T, H)


def naive_against_ours(K, T, H):
    out = {}
    for name, f in (("naive", lambda q, k, v: M.scaled_dot_product_attention(
            q, k, v, torch.ones(T, T, dtype=bool, device="cuda").tril())), ("ours", K.attention)):
        q, k, v = (torch.randn(8, T, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                   for _ in range(3))
        try:
            before = torch.cuda.memory_allocated()
            y = f(q, k, v)
            out[f"{name}, MB kept for backward"] = (torch.cuda.memory_allocated() - before) / 1e6
            del y
            for which in ("forward", "forward + backward"):
                call = K.prepare(f, [q, k, v], which)
                out[f"{name}, {which}, ms"] = 1000 * K.race({name: call}, "cuda", 10)[name][0]
        except torch.OutOfMemoryError:
            out[name] = "out of memory"
            torch.cuda.empty_cache()
    return out


@part(40)
def model():
    """The model of model.py on our kernels: loss, gradients, step time, peak memory."""
    import kernels as K
    c = M.ModelConfig(vocab_size=50304, context_length=2048, d_model=1024, num_layers=8, num_heads=16,
                      num_kv_heads=4, init="glorot")

    def run():
        rows = K.end_to_end(c, 4, "cuda")
        names = ("way", "loss", "gradient", "ms", "peak GB")
        return {"rows": [dict(zip(names, r)) for r in rows], "ok": all(float(r[2]) < 5e-2 for r in rows)}
    yield "8 layers of 1024, 4 x 2048 tokens", run


class RandomText:
    """As much of a tokenizer as train.Run asks for: speed does not depend on what the tokens say."""
    vocab_size, eot_id = 50304, 0

    def hash(self):
        return "random"


GPT2 = "--preset gpt2 --batch_size 64 --micro_batch 32 --optimizer adamw --steps 1000 --dtype bf16"
LARGE = ("--preset small --d_model 2048 --num_layers 24 --num_heads 16 --context_length 2048 --batch_size 16 "
         "--micro_batch 4 --optimizer adamw --steps 1000 --dtype bf16")    # 1.4B parameters


@part(130)
def train():
    """Tokens a second and MFU of train.py's own step, with and without our kernels."""
    import contextlib
    import numpy as np
    import kernels as K
    import train as R
    R.token_bytes = lambda tokenizer: np.ones(tokenizer.vocab_size, dtype=np.int64)

    def run(flags, ours, steps=6):
        s = R.settings(flags.split() + ["--device", "cuda"])[0]
        tokens = np.random.default_rng(0).integers(0, RandomText.vocab_size, 2**22, dtype=np.uint16)
        with K.in_model() if ours else contextlib.nullcontext():
            run = R.Run(s, RandomText(), tokens, tokens[:10000])
            run.model.train()
            torch.cuda.reset_peak_memory_stats()
            fields = [run.train_step() for _ in range(steps)][2:]          # two to warm up and compile
        return {"tok/s": statistics.median(f["tok_s"] for f in fields), "loss": fields[-1]["loss"],
                "mfu": statistics.median(f["mfu"] or math.nan for f in fields),
                "peak GB": torch.cuda.max_memory_allocated() / 1e9, "ok": math.isfinite(fields[-1]["loss"])}
    for compiled in ("", " --compile"):                    # what compiles for minutes comes last
        for name, flags in (("GPT-2 124M", GPT2), ("1.4B", LARGE)):
            for ours in (True, False):
                label = name + ", our kernels" * ours + ", compiled" * bool(compiled)
                yield label, lambda flags=flags + compiled, ours=ours: run(flags, ours)


@part(60)
def leaderboard():
    """The course's systems leaderboard: a full step of an 8.13B model on 2 x 32768 tokens in bf16. Two B200s:
    naive 10 s, the class's best 3.84 s. One GPU holds it with each block recomputed in the backward pass:
    65 GB of weights, gradients and moments, 18 GB of block inputs, 20 GB for the block at hand."""
    c = M.ModelConfig(vocab_size=151936, context_length=32768, d_model=4096, d_ff=11008, num_layers=34,
                      num_heads=32)

    def run():
        memory = torch.cuda.get_device_properties(0).total_memory
        return full_step(c, 2, "cuda") if memory > 115e9 else {"s a step": f"not run: {memory / 1e9:.0f} GB"}
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


@part(20)
def decode():
    """One sequence, token by token, bf16, model.py's plain cache; the bound: each weight read once."""
    def run(shape, tokens=64):
        c = M.ModelConfig(**shape)
        net = M.Transformer(c).to("cuda", torch.bfloat16).eval()
        cache, ids = net.make_cache(), torch.randint(0, c.vocab_size, (1, 128), device="cuda")
        with torch.no_grad():
            ids = net(ids, cache=cache)[:, -1:].argmax(-1)
            for i in range(tokens):
                if i == 8:                                 # the first ones warm up
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                ids = net(ids, cache=cache)[:, -1:].argmax(-1)
            torch.cuda.synchronize()
        rate = (tokens - 8) / (time.perf_counter() - start)
        return {"tok/s": rate, "GB/s of weights": rate * 2 * M.num_params(c) / 1e9}
    yield "GPT-2 124M", lambda: run(dict(M.PRESETS["gpt2"], init="glorot", tie_embeddings=False))
    yield "1.4B", lambda: run(dict(vocab_size=50304, context_length=2048, d_model=2048, num_layers=24,
                                   num_heads=16, init="glorot"))


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
            fields.update(status="FAILED", why=M.first_line(e), where=traceback.format_exc(limit=-2))
        record(path, **fields, seconds=time.perf_counter() - start)
        if "CUDA error" in fields.get("why", ""):          # nothing after it in this process can be believed
            os._exit(3)
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
                log.seek(0)
                said = log.read().strip().split("\n")[-1][:300]
                why = f"not done after {seconds:.0f} s, the limit of this part, nor were checks behind it" \
                    if late else f"the process ended with status {status}: {said}"
                began = [r for r in read(path, name, share) if r["status"] == "started"]
                for r in began or [dict(part=name, share=share, check=f"(process {share}, between checks)")]:
                    record(path, **{**r, "status": "FAILED", "why": why})
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
    parser.add_argument("--run_part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main():
    args = parse_args()
    if args.run_part:
        return run_part(args.run_part, args.lines, args.share)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        (out / "gpu.json").write_text(json.dumps({"skipped": "no CUDA GPU here"}))
        return print(f"skipped: no CUDA GPU here (torch {torch.__version__}); the checks without one: "
                     f"python -m pytest tests/test_kernels.py")
    import triton
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    path, start = (out / "gpu.jsonl").resolve(), time.monotonic()
    path.unlink(missing_ok=True)
    for i, name in enumerate(args.only):
        left = 60 * args.minutes - (time.monotonic() - start)                # what a part saves, others get
        supervise(name, path, left * PARTS[name].seconds / sum(PARTS[n].seconds for n in args.only[i:]))
        mine, results = read(path, name), read(path)
        print(f"{name:<11} {sum(r['status'] == 'ok' for r in mine):>3} of {len(mine)} passed, "
              f"{time.monotonic() - start:.0f} s so far", flush=True)
        (out / "gpu.json").write_text(json.dumps({"device": device, "results": results}, indent=1))
        (out / "gpu.md").write_text(markdown(device, results))
    print("\n" + (out / "gpu.md").read_text())
    return int(any(r["status"] != "ok" for r in results))


if __name__ == "__main__":
    sys.exit(main())
