"""tests/gpu.py - everything that needs a GPU, in under eight minutes.

    python tests/gpu.py                          # all parts; out/gpu.json as results come, then a table
    python tests/gpu.py --only correct bench     # some parts
    python tests/gpu.py --minutes 20             # every part's time limit in proportion

A part is a generator of (check, function) pairs under @part(seconds); a function returns a dict of results,
with "ok": False when it is wrong, and raises what it likes. To add one, write it at the end of section 2.
Each part runs in a process of its own: a check that fails, runs out of memory or corrupts the device costs
itself alone, since the part starts again behind it; what hangs is ended at the part's limit. Without a GPU:
one line, status 0.
"""
import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model as M  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

PARTS = {}                                                 # name -> (seconds of eight minutes, generator)


def part(seconds):
    def register(function):
        PARTS[function.__name__] = (seconds, function)
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

    def fused_adamw():
        made = {}

        def run(p, g, m, v):
            if p not in made:
                weight = torch.nn.Parameter(p.clone())
                weight.grad, made[p] = g, torch.optim.AdamW([weight], lr=1e-3, fused=True)
            made[p].step()
            return p
        return run

    def scaled(x, w, a, b):
        return torch._scaled_mm(x, w.T, scale_a=a[:, None], scale_b=b[None], out_dtype=torch.bfloat16)

    def bf16_weights():
        made = {}

        def run(x, q, scale):                              # what the quantised product replaces
            if q not in made:
                made[q] = K.dequantize(q, scale).to(x.dtype)
            return F.linear(x, made[q])
        return run
    found = {"GeLU": {"torch": lambda x: F.gelu(x, approximate="tanh")},
             "softmax": {"torch": lambda x: F.softmax(x, -1)},
             "RMSNorm": {"torch": lambda x, w: F.rms_norm(x, w.shape, w, 1e-5)},
             "cross-entropy": {"torch": F.cross_entropy},
             "attention": {"cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION), "flex": flex(),
                           "FlashAttention-2": sdpa(SDPBackend.FLASH_ATTENTION)},
             "linear, fp8": {"cuBLAS": scaled},
             "linear, int8 weights": {"bf16 weights": bf16_weights()},
             "linear, int4 weights": {"bf16 weights": bf16_weights()},
             "AdamW": {"torch, fused": fused_adamw()}}
    if hasattr(F, "grouped_mm"):
        def grouped_mm(x, w, ends):
            return F.grouped_mm(x, w.transpose(1, 2), offs=ends)
        found["grouped linear"] = {"F.grouped_mm": grouped_mm}
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


class Poisoned:
    """While it lasts torch.empty gives NaN: an element that a kernel forgets to write shows."""
    def __enter__(self):
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *_):
        torch.use_deterministic_algorithms(False)


def compared(K, ours, exact, inputs, limit):
    """{worst error, ok} of outputs and gradients against float64 on the same inputs, outputs poisoned."""
    with Poisoned():
        errors = K.errors(ours, exact, inputs)
    return {"error": max(errors, key=lambda e: math.inf if math.isnan(e) else e), "limit": limit,
            "ok": all(e < limit for e in errors)}


@part(75)
def correct():
    """Every kernel on fresh random inputs against float64."""
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
    yield "rows beyond 2^31 elements", lambda: beyond_int32(K)


def beyond_int32(K):
    """Offsets in 32 bits would wrap: the last rows of 2.4e9 elements."""
    x = torch.randn(80_000, 30_000, device="cuda", dtype=torch.bfloat16)
    t = torch.randint(0, 30_000, (80_000,), device="cuda")
    y, tail = K.softmax(x), x[-5:].float()
    error = (y[-5:].float() - tail.softmax(-1)).abs().max().item()
    loss = K.cross_entropy(x, t, reduction="none")[-5:]
    error = max(error, (loss - F.cross_entropy(tail, t[-5:], reduction="none")).abs().max().item())
    return {"error": error, "ok": error < 1e-2}


@part(130)
def bench():
    """ours | operators | torch.compile | the best library, in turn; the share of the floor reached."""
    import kernels as K
    libraries = peers(K)
    for case in K.cases("meta"):
        yield case.name, lambda case=case: {"rows": K.benchmark("cuda", peers=libraries, only=[case.name])}


@part(60)
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
            fns = {}
            for name, f in ways.items():
                try:
                    K.run_once(f, [q, k, v], which)
                    fns[name] = lambda f=f: K.run_once(f, [q, k, v], which)
                except Exception as e:
                    out[f"{name}, {which}"] = M.first_line(e)[:60]
            for name, (seconds, _) in K.race(fns, "cuda", 10).items():
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
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            y = f(q, k, v)
            out[f"{name}, MB kept for backward"] = (torch.cuda.memory_allocated() - before) / 1e6
            torch.autograd.grad(y.sum(), (q, k, v))
            for which in ("forward", "forward + backward"):
                t = K.race({"f": lambda: K.run_once(f, [q, k, v], which)}, "cuda", 10)
                out[f"{name}, {which}, ms"] = 1000 * t["f"][0]
        except torch.OutOfMemoryError:
            out[name] = "out of memory"
            torch.cuda.empty_cache()
    return out


@part(50)
def model():
    """The model of model.py on our kernels: loss, gradients, step time, peak memory."""
    import kernels as K
    c = M.ModelConfig(vocab_size=50304, context_length=2048, d_model=1024, num_layers=8, num_heads=16,
                      num_kv_heads=4, init="glorot")

    def run():
        rows = K.end_to_end(c, 4, "cuda")
        worst = max(float(r[2]) for r in rows)
        names = ("way", "loss", "gradient", "ms", "peak GB")
        return {"rows": [dict(zip(names, r)) for r in rows], "ok": worst < 5e-2}
    yield "8 layers of 1024, 4 x 2048 tokens", run


class RandomText:
    """As much of a tokenizer as train.Run asks for: speed does not depend on what the tokens say."""
    vocab_size, eot_id = 50304, 0

    def hash(self):
        return "random"


GPT2 = "--preset gpt2 --batch_size 64 --micro_batch 32 --optimizer adamw --steps 1000 --dtype bf16"
LARGE = ("--preset small --d_model 2048 --num_layers 24 --num_heads 16 --context_length 2048 --batch_size 16 "
         "--micro_batch 4 --optimizer adamw --steps 1000 --dtype bf16")    # 1.4B parameters in all


@part(165)
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
    for name, flags in (("GPT-2 124M", GPT2), ("1.3B", LARGE)):
        yield f"{name}, compiled", lambda flags=flags: run(flags + " --compile", False)
        yield f"{name}, our kernels, compiled", lambda flags=flags: run(flags + " --compile", True)
        yield f"{name}, our kernels", lambda flags=flags: run(flags, True)
        yield f"{name}, eager", lambda flags=flags: run(flags, False)


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

def run_part(name, path, done):
    """In a process of its own: every check of a part that is not done, with a line before and behind it."""
    with open(path, "a") as f:
        def say(**fields):
            f.write(json.dumps(dict(part=name, **fields), default=str) + "\n")
            f.flush()
        checks = iter(PARTS[name][1]())
        while True:
            try:
                check, function = next(checks)
            except StopIteration:
                return
            if check in done:
                continue
            say(check=check, status="started")
            start = time.perf_counter()
            try:
                result = function()
                torch.cuda.synchronize()
                status = "ok" if result.pop("ok", True) else "WRONG"
                say(check=check, status=status, seconds=time.perf_counter() - start, **result)
            except Exception as e:
                say(check=check, status="FAILED", seconds=time.perf_counter() - start, why=M.first_line(e),
                    where=traceback.format_exc(limit=-2))
                if "CUDA error" in str(e):                 # nothing after it in this process can be believed
                    os._exit(3)
            torch.cuda.empty_cache()


def read(path):
    """{(part, check): last line about it}"""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return {(r["part"], r["check"]): r for r in lines}


def supervise(name, path, seconds):
    """Start a part again behind each check that ended its process, until it is through or out of time."""
    end = time.monotonic() + seconds
    while True:
        before = len(read(path))
        process = subprocess.Popen([sys.executable, __file__, "--run_part", name, "--lines", str(path)],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            why = process.communicate(timeout=max(1, end - time.monotonic()))[1].strip().split("\n")[-1][:300]
            if process.returncode == 0:
                return
            why = f"the process ended with status {process.returncode}: {why}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            why = f"not done after {seconds:.0f} s, the limit of this part; checks behind it were not reached"
        began = [r for r in read(path).values() if r["part"] == name and r["status"] == "started"]
        with open(path, "a") as f:
            for r in began or [dict(part=name, check="(between checks)")]:
                f.write(json.dumps(dict(r, status="FAILED", why=why)) + "\n")
        if time.monotonic() > end or len(read(path)) == before or not began:
            return


def markdown(device, results):
    """One table a part: a check's own fields, or its rows, are the columns."""
    lines, common = [f"# {device}", ""], ("part", "check", "status", "seconds", "limit")
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
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main():
    args = parse_args()
    if args.run_part:
        return run_part(args.run_part, args.lines, {c for (p, c) in read(args.lines) if p == args.run_part})
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        (out / "gpu.json").write_text(json.dumps({"skipped": "no CUDA GPU here"}))
        return print(f"skipped: no CUDA GPU here (torch {torch.__version__}); the checks without one: "
                     f"python -m pytest tests/test_kernels.py")
    import triton
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    path, start, whole = out / "gpu.jsonl", time.monotonic(), sum(seconds for seconds, _ in PARTS.values())
    path.unlink(missing_ok=True)
    for name in args.only:
        left = 60 * args.minutes - (time.monotonic() - start)
        if left < 5:
            print(f"{name}: not reached in {args.minutes:g} minutes", flush=True)
            continue
        supervise(name, path, min(left, PARTS[name][0] * 60 * args.minutes / whole))
        mine = [r for (p, _), r in read(path).items() if p == name]
        print(f"{name:<10} {sum(r['status'] == 'ok' for r in mine):>3} of {len(mine)} passed, "
              f"{time.monotonic() - start:.0f} s so far", flush=True)
        results = list(read(path).values())
        (out / "gpu.json").write_text(json.dumps({"device": device, "results": results}, indent=1))
        (out / "gpu.md").write_text(markdown(device, results))
    print("\n" + (out / "gpu.md").read_text())
    return int(any(r["status"] != "ok" for r in results))


if __name__ == "__main__":
    sys.exit(main())
