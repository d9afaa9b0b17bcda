"""kernels.py - lectures 5-6: one GPU used well, and proved without one.

What   Triton kernels, forward and backward, for what a Transformer does beside plain matrix products: GeLU,
       SwiGLU, softmax, RMSNorm, RoPE, cross-entropy (also fused with the output matrix), FlashAttention-2,
       AdamW; and the products themselves: tiled, persistent, fp8, int8 and int4 weights, grouped by expert.
Why    A GPU computes 200 FLOPs in the time in which its memory brings one byte. Most operations of a model
       need less than one FLOP a byte: their time is their traffic, and what is fused is not moved. Only
       products, and attention once it is fused, are bound by arithmetic.
       Here the numbers are proved on a CPU, by Triton's interpreter against float64; the machine code for
       Hopper is made and inspected on a CPU, too. Times need a GPU:  python tests/gpu.py

Equations
       time            >= max(FLOPs / peak, bytes / bandwidth)                               (the roofline)
       online softmax  m' = max(m, x);  l' = l exp(m - m') + exp(x - m')                  (rows of any length)
       attention       O = softmax(A) V,  A = Q K^T / sqrt(H),  L = log sum exp of a row of A
       its gradient    P = exp(A - L);  dA = P (dO V^T - rowsum(dO O));  dQ = dA K / sqrt(H), dV = P^T dO
       cross-entropy   dz = (softmax(z) - onehot) dloss                                      (written over z)

Run    python kernels.py                              # the lecture: a minute on two cores; with a GPU, times
       python kernels.py --compile_report             # every kernel compiled for sm_90 (H100, H200), no GPU
       python kernels.py --end_to_end --preset small  # model.py on these kernels, against plain PyTorch
       python kernels.py --profile --preset small     # where a training step's time goes; a trace to look at
       python tests/gpu.py                            # on a GPU: every check, benchmark and end-to-end run

You should see (two cores, CPU; shortened)
       operation          FLOPs/byte    fused    limit  us by operators  us fused     (one block, at best)
       RMSNorm                   0.1      1.0   memory              280        28
       QKV product           2,234.2  2,234.2  compute              833       833
       attention                41.8  2,048.0  compute            2,740       556
       kernel     error  gradient   bytes, by operators  predicted  counted  ratio  saved  (against float64)
       softmax  7.5e-08   8.5e-08             1,574,912    393,216  393,216  1.000   4.0x
       RMSNorm  5.4e-08   9.6e-08               691,200    196,608  209,152  1.064   3.3x
       machine code            warps  registers  spills   KB  wgmma  tma  wide             (sm_90, made here)
       rmsnorm_kernel              4         54       0    0      0    0   8/8  ok
       flash_kernel                8        175       0  128     24    0   8/8  ok
       tma_matmul_kernel           8        155       0  208      4    6   0/0  ok

Outline  1 what bounds an operation   2 elementwise        3 rows   4 RoPE   5 cross-entropy
         6 FlashAttention-2           7 matrix products    8 AdamW  9 all in one table
         10 proofs without a GPU      11 measuring         12 in the model    13 five ways    14 demo

References  Williams et al. 2009 (roofline), Tillet et al. 2019 (Triton), Milakov & Gimelshein 2018 (online
            softmax), Dao et al. 2022, Dao 2023 (FlashAttention), Zhang & Sennrich 2019 (RMSNorm), Su et al.
            2021 (RoPE), Hsu et al. 2024 (Liger kernels), Wijmans et al. 2024 (cut cross-entropy), Gale et al.
            2022 (products grouped by expert), Micikevicius et al. 2022 (fp8), Frantar et al. 2022 (int4).
"""
import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import model as M                                          # before torch: it sets how CPU threads wait

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if not torch.cuda.is_available():  # triton reads it when it is imported: kernels then run
    os.environ.setdefault("TRITON_INTERPRET", "1")         # as numpy programs, slowly, block by block
try:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.runtime import Autotuner, JITFunction, driver, interpreter
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    problem = ("kernels.py needs triton, which is made for Linux: pip install triton; "
               "elsewhere use the other scripts, none of which needs it")
    if __name__ == "__main__":
        M.cli("").error(problem)
    raise ImportError(problem) from None

# B batch, T query positions, S key positions, N query heads, K key/value heads, H head dim, D width.
INTERPRETED = isinstance(tl.sum, interpreter.InterpretedFunction)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LOG2E = tl.constexpr(1.4426950408889634)                   # exp(x) = exp2(x log2 e): the hardware has exp2
LOWEST = tl.constexpr(-3.4028234663852886e38)              # maxima start here: -inf minus -inf would be NaN


def check(*tensors, kinds=FLOATS, others=()):
    """Refuse in one line what would end in a wrong number, or deep inside the compiler. `others` may be of
    any type, on the same device."""
    device = tensors[0].device
    for t in (*tensors, *others):
        if t.device != device:
            raise ValueError(f"tensors on {device} and on {t.device}: move them to one device")
    for t in tensors:
        if t.dtype not in kinds:
            raise ValueError(f"{show(t)} is not supported here: use {', '.join(str(k)[6:] for k in kinds)}")
    if device.type not in ("cuda", "cpu", "meta"):         # meta: for compiling alone
        raise ValueError(f"triton does not run on {device.type}: use the plain PyTorch version")
    if device.type == "cuda" and not torch.compiler.is_compiling():          # these calls would split a graph
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise ValueError(f"{torch.cuda.get_device_name(device)} is older than sm_80 (Ampere): "
                             f"use the plain PyTorch version")
        if device.index != torch.cuda.current_device():    # where triton launches
            raise ValueError(f"a tensor on {device}, and cuda:{torch.cuda.current_device()} is the current "
                             f"device: call torch.cuda.set_device({device.index}) first")
    if device.type == "cpu" and not INTERPRETED:
        raise ValueError("a CPU tensor, and triton was imported without its interpreter: move it to cuda, or "
                         "set TRITON_INTERPRET=1 (slow), or use the plain PyTorch version")
    if device.type == "cpu" and torch.bfloat16 in {t.dtype for t in tensors} and not interpreter_knows_bf16():
        raise ValueError("triton's interpreter computes with the bits of bfloat16 as if they were integers: "
                         "use float32 on a CPU")


def show(*tensors):
    return " and ".join(f"{tuple(t.shape)} {str(t.dtype)[6:]}" for t in tensors)


def expect(right, name, tensors, wanted):
    if not right:
        raise ValueError(f"{name} of {show(*tensors)}: give {wanted}")


@functools.cache
def interpreter_knows_bf16():
    a, c = torch.full((16, 16), 1.5, dtype=torch.bfloat16), torch.empty(16, 16)
    matmul_kernel.fn[(1,)](a, a, c, 16, 16, 16, 16, 1, 16, 1, False, 16, 16, 16, 1)
    return bool((c == 16 * 1.5 * 1.5).all())


@functools.cache
def num_sms(device):
    """Streaming multiprocessors: that many programs fill the machine once. An H100 or H200 has 132."""
    if device.type != "cuda":
        return {"meta": 132, "cpu": 2}[device.type]
    return torch.cuda.get_device_properties(device).multi_processor_count


def work_dtype(x):
    """What autocast would compute in; without autocast, x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else x.dtype


# --- 1. what bounds an operation ----------------------------------------------------------------------------
# A GPU is a factory with a far warehouse. An H100 has 132 multiprocessors (SMs), each with tensor cores,
# registers (256 KB) and shared memory (227 KB a block); 50 MB of L2 for all; and HBM, large and slow.
# Programs go to SMs in waves; a last wave that is half empty wastes half of its time, so have many more
# programs than SMs, or exactly as many that stay. Time is at least the larger of FLOPs / peak and bytes /
# bandwidth: the roofline.

# Dense bf16 FLOP/s and HBM bytes/s (NVIDIA's data sheets), by the name that torch gives: a PCIe card of the
# same family is slower, and for a name that is not here no floor is printed.
HARDWARE = {"NVIDIA A100-SXM4-80GB": (312e12, 2.04e12), "NVIDIA H100 80GB HBM3": (989.5e12, 3.35e12),
            "NVIDIA H200": (989.5e12, 4.8e12)}


def block_operations(c, tokens):
    """[(name, FLOPs, bytes by operators, bytes fused)] of one block's forward pass and the loss, bf16."""
    t, S, D, N, K, H = tokens, c.context_length, c.d_model, c.num_heads, c.kv_heads, c.head_dim
    F_, V = c.ffn_dim, c.vocab_size
    qkv = (N + 2 * K) * H

    def product(m, n, k):                                  # (m,k) x (k,n)
        return 2 * m * n * k, 2 * (m * k + k * n + m * n), 2 * (m * k + k * n + m * n)
    return [("RMSNorm", 4 * t * D, 20 * 2 * t * D, 2 * 2 * t * D),
            ("QKV product", *product(t, qkv, D)),
            ("RoPE", 3 * t * (N + K) * H, 10 * 2 * t * (N + K) * H, 2 * 2 * t * (N + K) * H),
            # Eager writes the scores, masks them, takes the softmax, reads them again: six times N x t x S.
            ("attention", 4 * t * S * N * H, 2 * (6 * N * t * S + t * (qkv + N * H)), 2 * t * (qkv + N * H)),
            ("output product", *product(t, D, N * H)),
            ("FFN products up", *product(t, 2 * F_, D)),
            ("SwiGLU", 5 * t * F_, 8 * 2 * t * F_, 3 * 2 * t * F_),
            ("FFN product down", *product(t, D, F_)),
            ("head product", *product(t, V, D)),
            ("cross-entropy", 5 * t * V, 7 * 4 * t * V, 2 * t * V),
            ("decoding, 1 token", *product(1, 2 * F_, D))]


# --- 2. elementwise: GeLU and SwiGLU ------------------------------------------------------------------------
# A GPU runs a kernel as thousands of programs, each with a block of the output. An elementwise one does a few
# FLOPs a byte where the machine needs 200: its time is its traffic. Eager PyTorch launches a kernel an
# operator and sends every intermediate through HBM and back; a fused one reads inputs and writes outputs.

@triton.jit
def load(at, ok, other: tl.constexpr = 0.0):
    """Numbers from memory, as fp32 whatever they are there: bf16 is for traffic, not for arithmetic. `ok`
    keeps a block from reading beyond the end."""
    return tl.load(at, mask=ok, other=other).to(tl.float32)


@triton.jit
def activate(a, GELU: tl.constexpr):
    """-> act(a) and its slope. SiLU and GeLU are both a s(u): u = a, or 2 sqrt(2/pi) (a + 0.044715 a^3) since
    (1 + tanh(u/2))/2 = s(u). The sigmoid as 1/(1 + exp(-u)) stays finite; (e^u - 1)/(e^u + 1), as lectures
    write tanh(u/2), is NaN from a = 10.1 on."""
    u, du = a, 1.0
    if GELU:
        u, du = 1.5957691216057308 * (a + 0.044715 * a * a * a), 1.5957691216057308 * (1 + 0.134145 * a * a)
    s = tl.sigmoid(u)
    return a * s, s + a * s * (1 - s) * du


@triton.jit
def gate_kernel(a_ptr, b_ptr, y_ptr, n, GELU: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)       # int64: n may exceed 2^31
    y, _ = activate(load(a_ptr + at, at < n), GELU)
    if GATED:
        y *= load(b_ptr + at, at < n)
    tl.store(y_ptr + at, y, mask=at < n)


@triton.jit
def gate_backward_kernel(dy_ptr, a_ptr, b_ptr, da_ptr, db_ptr, n, GELU: tl.constexpr, GATED: tl.constexpr,
                         BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = load(dy_ptr + at, at < n)
    y, slope = activate(load(a_ptr + at, at < n), GELU)
    if GATED:
        b = load(b_ptr + at, at < n)
        tl.store(db_ptr + at, dy * y, mask=at < n)
        dy *= b
    tl.store(da_ptr + at, dy * slope, mask=at < n)


class Gate(torch.autograd.Function):
    """y = act(a) b (SwiGLU), or act(a) alone (GeLU).      da = dy b act'(a),  db = dy act(a)
    Traffic  SwiGLU 2 reads and 1 write an element forward, 3 and 2 backward; GeLU 1 and 1, 2 and 1: act(a) is
             computed again, not kept. By operators forward: SwiGLU 5 and 3, GeLU 10 and 8.
    Floor    SwiGLU 16384 x 14336 bf16 at an H200's 4.3 TB/s: 328 and 546 us."""
    @staticmethod
    def forward(ctx, a, b, gelu):
        a, ctx.options = a.contiguous(), (gelu, b is not None)
        b, y = a if b is None else b.contiguous(), torch.empty_like(a)       # a: a pointer that is not read
        # 1024 elements for 128 threads: 8 each, in bf16 one 16-byte load, the widest there is.
        gate_kernel[(triton.cdiv(a.numel(), 1024),)](a, b, y, a.numel(), *ctx.options, 1024)
        ctx.save_for_backward(a, b)
        return y

    @staticmethod
    def backward(ctx, dy):
        (a, b), gated = ctx.saved_tensors, ctx.options[1]
        da, db = torch.empty_like(a), torch.empty_like(b) if gated else a
        gate_backward_kernel[(triton.cdiv(a.numel(), 1024),)](dy.contiguous(), a, b, da, db, a.numel(),
                                                              *ctx.options, 1024)
        return da, db if gated else None, None


def gelu(x):
    check(x)
    return Gate.apply(x, None, True)


def swiglu(a, b):
    check(a, b)
    expect(a.shape == b.shape and a.dtype == b.dtype, "swiglu", [a, b], "two alike")
    return Gate.apply(a, b, False)


# --- 3. rows: softmax, weighted sum, RMSNorm ----------------------------------------------------------------
# A row that fits in registers is read once, whatever is computed from it. A program takes one row, or several
# short ones, so that it always has some 4096 elements: enough loads in flight to hide the latency of memory.

def by_rows(kernel, x, *args, programs=None, widest=16384, per_warp=1024):
    """Run a kernel whose last arguments are M, N (rows, columns), ROWS, BLOCK (the tile of one program).
    per_warp: elements; each of them is kept in a register or two."""
    M_, N = x.numel() // x.shape[-1], x.shape[-1]
    block = min(widest, triton.next_power_of_2(N))         # a block's sides are powers of two
    rows = max(1, 4096 // block)
    kernel[(programs or triton.cdiv(M_, rows),)](*args, M_, N, rows, block,
                                                 num_warps=max(4, rows * block // per_warp))


@triton.jit
def softmax_kernel(x_ptr, y_ptr, M, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The online softmax (Milakov & Gimelshein 2018): `total` is the sum of exp(x - top) so far, and a new
    maximum rescales it. Cross-entropy and attention below do the same."""
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    at, e = row.to(tl.int64) * N + col, tl.zeros((ROWS, BLOCK), tl.float32)
    top, total = tl.full((ROWS, 1), LOWEST, tl.float32), tl.zeros((ROWS, 1), tl.float32)
    for start in range(0, N, BLOCK):
        x = load(x_ptr + at + start, (row < M) & (col < N - start), -float("inf"))
        new = tl.maximum(top, tl.max(x, 1, keep_dims=True))
        e = tl.exp(x - new)
        top, total = new, total * tl.exp(top - new) + tl.sum(e, 1, keep_dims=True)
    total = tl.maximum(total, 1.0)  # the largest contributes exp(0) = 1: less is a row of -inf, all zeros
    for start in range(0, N, BLOCK):
        ok = (row < M) & (col < N - start)
        if N > BLOCK:                       # else e is still in registers, and this loop has one round
            e = tl.exp(load(x_ptr + at + start, ok, -float("inf")) - top)
        tl.store(y_ptr + at + start, e / total, mask=ok)


@triton.jit
def softmax_backward_kernel(dy_ptr, y_ptr, dx_ptr, M, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    at, dot = row.to(tl.int64) * N + col, tl.zeros((ROWS, 1), tl.float32)
    y, dy = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, N, BLOCK):
        ok = (row < M) & (col < N - start)
        y, dy = load(y_ptr + at + start, ok), load(dy_ptr + at + start, ok)
        dot += tl.sum(y * dy, 1, keep_dims=True)
    for start in range(0, N, BLOCK):
        ok = (row < M) & (col < N - start)
        if N > BLOCK:
            y, dy = load(y_ptr + at + start, ok), load(dy_ptr + at + start, ok)
        tl.store(dx_ptr + at + start, y * (dy - dot), mask=ok)


class Softmax(torch.autograd.Function):
    """exp(x - max) / sum over the last dimension, any width; a row of -inf gives zeros. dx = y (dy - <y, dy>)
    Traffic  forward 1 read, 1 write an element, backward 2 and 1; rows over 16384 (8192) are read twice.
             Eager, operator by operator: 5 and 3.
    Floor    16384 x 8192 bf16 at 4.3 TB/s: 125 and 187 us."""
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        y = torch.empty_like(x)
        by_rows(softmax_kernel, x, x, y)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        y, = ctx.saved_tensors
        dx = torch.empty_like(y)
        by_rows(softmax_backward_kernel, y, dy.contiguous(), y, dx, widest=8192)
        return dx


def softmax(x):
    check(x)
    expect(x.dim() and x.shape[-1], "softmax", [x], "rows of one number or more")
    return Softmax.apply(x)


@triton.jit
def weighted_sum_kernel(x_ptr, w_ptr, y_ptr, M, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    x = load(x_ptr + row.to(tl.int64) * N + col, (row < M) & (col < N))
    tl.store(y_ptr + row, tl.sum(x * load(w_ptr + col, col < N), 1, keep_dims=True), mask=row < M)


@triton.jit
def weighted_sum_backward_kernel(dy_ptr, x_ptr, w_ptr, dx_ptr, dw_ptr, M, N, ROWS: tl.constexpr,
                                 BLOCK: tl.constexpr):
    col, dw = tl.arange(0, BLOCK)[None, :], tl.zeros((ROWS, BLOCK), tl.float32)
    w = load(w_ptr + col, col < N)
    for first in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        at, ok = row.to(tl.int64) * N + col, (row < M) & (col < N)
        dy = load(dy_ptr + row, row < M)
        dw += dy * load(x_ptr + at, ok)
        tl.store(dx_ptr + at, dy * w, mask=ok)
    tl.store(dw_ptr + tl.program_id(0) * N + col, tl.sum(dw, 0, keep_dims=True), mask=col < N)


class WeightedSum(torch.autograd.Function):
    """y_i = sum_j x_ij w_j, the first lesson.      dx_ij = dy_i w_j,  dw_j = sum_i dy_i x_ij
    dw sums over rows that many programs hold: each sums its own into its own line of a (programs, N) buffer,
    and one more sum joins the lines. No atomics, so the same bits every time.
    Traffic  forward 1 read an element of x, backward 1 read, 1 write.
    Floor    16384 x 4096 bf16 at 4.3 TB/s: 31 and 62 us."""
    @staticmethod
    def forward(ctx, x, w):
        x, w = x.contiguous(), w.contiguous()
        y = torch.empty(x.shape[:-1], dtype=x.dtype, device=x.device)
        by_rows(weighted_sum_kernel, x, x, w, y)
        ctx.save_for_backward(x, w)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        dx, dw = torch.empty_like(x), partial_sums(x)
        by_rows(weighted_sum_backward_kernel, x, dy.contiguous(), x, w, dx, dw, programs=len(dw))
        return dx, dw.sum(0).to(w.dtype)


def partial_sums(x):
    """A line of fp32 for each program: four a multiprocessor, fewer where there are fewer rows."""
    return torch.empty(min(x.numel() // x.shape[-1], 4 * num_sms(x.device)), x.shape[-1], device=x.device)


def check_rows(x, w):
    check(x, w)
    expect(x.dim() and w.shape == x.shape[-1:] and 0 < x.shape[-1] * x.element_size() <= 2**15,
           "rows and gain", [x, w], "a gain as long as a row, and rows of 1 to 16384 numbers (float32: 8192) "
           "that fit in registers")


def weighted_sum(x, w):
    check_rows(x, w)
    return WeightedSum.apply(x, w)


@triton.jit
def rmsnorm_kernel(x_ptr, add_ptr, w_ptr, y_ptr, h_ptr, rstd_ptr, eps, ADD: tl.constexpr, M, N,
                   ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    at, ok = row.to(tl.int64) * N + col, (row < M) & (col < N)
    x = load(x_ptr + at, ok)
    if ADD:
        x += load(add_ptr + at, ok)
        tl.store(h_ptr + at, x, mask=ok)
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / N + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < M)
    tl.store(y_ptr + at, x * rstd * load(w_ptr + col, col < N), mask=ok)


@triton.jit
def rmsnorm_backward_kernel(dy_ptr, dh_ptr, h_ptr, w_ptr, rstd_ptr, dx_ptr, dw_ptr, ADD: tl.constexpr, M, N,
                            ROWS: tl.constexpr, BLOCK: tl.constexpr):
    col, dw = tl.arange(0, BLOCK)[None, :], tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        at, ok = row.to(tl.int64) * N + col, (row < M) & (col < N)
        rstd = load(rstd_ptr + row, row < M)
        n = load(h_ptr + at, ok) * rstd                    # the normalised row
        # w again, from L2: kept, it would spill in rows of 16384.
        dy, w = load(dy_ptr + at, ok), load(w_ptr + col, col < N)
        dw += dy * n
        dx = rstd * (dy * w - n * (tl.sum(dy * w * n, 1, keep_dims=True) / N))
        if ADD:                                            # the sum goes on along the residual stream
            dx += load(dh_ptr + at, ok)
        tl.store(dx_ptr + at, dx, mask=ok)
    tl.store(dw_ptr + tl.program_id(0) * N + col, tl.sum(dw, 0, keep_dims=True), mask=col < N)


class RMSNorm(torch.autograd.Function):
    """n = x / sqrt(mean x^2 + eps),  y = n w.    dn = dy w,  dx = (dn - n mean(dn n)) / rms,  dw = sum dy n
    With a residual, h = x + residual is normalised and returned, too: one pass where there were two.
    Keeps x (or h), w and one number a row.
    Traffic  an element: forward 1 read, 1 write, backward 2 and 1; with the addition 2 and 2, 3 and 1.
             Eager, operator by operator: 4 and 3 forward in fp32, and two casts more in bf16.
    Floor    16384 x 4096 bf16 at 4.3 TB/s: 62 and 94 us; with the addition 125 us each."""
    @staticmethod
    def forward(ctx, x, residual, w, eps):
        x, w, ctx.add = x.contiguous(), w.contiguous(), residual is not None
        residual, h = (residual.contiguous(), torch.empty_like(x)) if ctx.add else (x, x)
        y, rstd = torch.empty_like(x, dtype=work_dtype(x)), torch.empty(x.shape[:-1], device=x.device)
        by_rows(rmsnorm_kernel, x, x, residual, w, y, h, rstd, eps, ctx.add)
        ctx.save_for_backward(h, w, rstd)
        return (y, h) if ctx.add else y

    @staticmethod
    def backward(ctx, dy, dh=None):
        h, w, rstd = ctx.saved_tensors
        dy, dh = dy.contiguous(), dh.contiguous() if ctx.add else dy
        dx, dw = torch.empty_like(h), partial_sums(h)
        by_rows(rmsnorm_backward_kernel, h, dy, dh, h, w, rstd, dx, dw, ctx.add, programs=len(dw),
                per_warp=512 if ctx.add else 1024)         # or it would spill
        return dx, dx if ctx.add else None, dw.sum(0).to(w.dtype), None


def rms_norm(x, w, eps=1e-5):
    check_rows(x, w)
    return RMSNorm.apply(x, None, w, eps)


def add_rms_norm(x, residual, w, eps=1e-5):
    """-> (rms_norm(x + residual), x + residual)"""
    check_rows(x, w)
    check(x, residual)
    expect(x.shape == residual.shape and x.dtype == residual.dtype, "x and residual", [x, residual],
           "two alike")
    if x.shape[-1] > 8192:                                 # in one pass the backward would spill
        h = x + residual
        return rms_norm(h, w, eps), h
    return RMSNorm.apply(x, residual, w, eps)


# --- 4. RoPE ------------------------------------------------------------------------------------------------

@triton.jit
def rope_kernel(x_ptr, y_ptr, cos_ptr, sin_ptr, xb, xt, xn, yb, yt, yn, tb, T, N, sign, H: tl.constexpr,
                HEADS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)                  # one program a token, all its heads
    b, t = token // T, token % T
    n, h = tl.arange(0, HEADS)[:, None].to(tl.int64), tl.arange(0, BLOCK)[None, :]
    j = tl.arange(0, BLOCK // 2)[None, :]                  # int64: heads may lie far apart
    ok, angle = (n < N) & (h < H), (b * tb + t) * (H // 2) + j
    cos, sin = load(cos_ptr + angle, j < H // 2), load(sin_ptr + angle, j < H // 2) * sign
    x = load(x_ptr + b * xb + t * xt + n * xn + h, ok)
    # Pairs are neighbours: whole lines are loaded, and taken apart in registers.
    re, im = tl.split(tl.reshape(x, (HEADS, BLOCK // 2, 2)))
    y = tl.reshape(tl.join(re * cos - im * sin, re * sin + im * cos), (HEADS, BLOCK))
    tl.store(y_ptr + b * yb + t * yt + n * yn + h, y, mask=ok)


def rotate(x, cos, sin, sign, inplace=False):
    (B, T, N, H), tb = x.shape, 0 if cos.dim() == 2 else x.shape[1]
    y = x if inplace else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    heads, block = triton.next_power_of_2(N), triton.next_power_of_2(H)
    rope_kernel[(B * T,)](x, y, cos, sin, *x.stride()[:3], *y.stride()[:3], tb, T, N, sign, H, heads, block,
                          num_warps=min(16, max(4, heads * block // 2048)))
    return y


class Rope(torch.autograd.Function):
    """(x[2j] + i x[2j+1]) exp(i position theta^(-2j/H)).      backward: the turn the other way
    Queries and keys lie side by side in the projection's output: given that slice, one launch turns both.
    Traffic  1 read, 1 write an element, in place or not, and a small table. Eager in bf16: 3 and 3, wider.
    Floor    32 + 8 heads of 128, T = 16384, bf16 at 4.3 TB/s: 78 us."""
    @staticmethod
    def forward(ctx, x, cos, sin, inplace):
        ctx.save_for_backward(cos, sin)
        if inplace:
            ctx.mark_dirty(x)
        return rotate(x, cos, sin, 1.0, inplace)

    @staticmethod
    def backward(ctx, dy):
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        return rotate(dy, *ctx.saved_tensors, -1.0), None, None, None


def rope_table(positions, H, theta=10000.0):
    """positions (T,) or (B,T) -> cos and sin, (...,H/2) fp32: small, and the same for all heads."""
    rate = theta ** (-torch.arange(0, H, 2, device=positions.device, dtype=torch.float32) / H)
    angle = positions[..., None] * rate
    return angle.cos(), angle.sin()


def rope(x, cos, sin, inplace=False):
    """x (B,T,N,H), the last dimension contiguous; cos and sin from rope_table -> the same shape."""
    check(x, cos, sin)
    B, T, N, H = x.shape if x.dim() == 4 else (0, 0, 0, 1)
    expect(H % 2 == 0 and x.stride(-1) == 1 and cos.shape == sin.shape and
           cos.shape in ((T, H // 2), (B, T, H // 2)), "rope", [x, cos, sin],
           "(B,T,heads,H), H even and contiguous, and tables (T,H/2) or (B,T,H/2)")
    return Rope.apply(x, cos.contiguous(), sin.contiguous(), inplace)


# --- 5. cross-entropy, and with the output matrix -----------------------------------------------------------
# With V = 128k the logits of 8k tokens are 2 GB in bf16, the largest tensor of a step. Eager PyTorch reads
# and writes them in fp32 several times; here one read gives the loss, one read and one write the gradient.

@triton.jit
def cross_entropy_kernel(z_ptr, target_ptr, loss_ptr, lse_ptr, V, ignore, smooth, z_weight,
                         BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * V
    target = tl.load(target_ptr + row)
    top, total = tl.full((1,), LOWEST, tl.float32), tl.zeros((1,), tl.float32)
    every = tl.zeros((1,), tl.float32)                     # the sum of all logits, for label smoothing
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = load(z_ptr + col, col < V, -float("inf"))
        new = tl.maximum(top, tl.max(z, 0))
        top, total = new, total * tl.exp(top - new) + tl.sum(tl.exp(z - new), 0)
        every += tl.sum(tl.where(col < V, z, 0.0), 0)
    lse, at = top + tl.log(total), row + tl.arange(0, 1)
    # A target outside 0..V-1 gives NaN rather than a plausible number.
    right = load(z_ptr + target, (target >= 0) & (target < V), float("nan"))
    mean = tl.where(smooth > 0, every / V, 0.0)                              # 0 * -inf would be NaN
    loss = lse - (1 - smooth) * right - smooth * mean + z_weight * lse * lse
    tl.store(loss_ptr + at, tl.where(target == ignore, 0.0, loss))
    tl.store(lse_ptr + at, lse)


@triton.jit
def cross_entropy_backward_kernel(z_ptr, target_ptr, lse_ptr, g_ptr, V, ignore, smooth, z_weight,
                                  BLOCK: tl.constexpr):
    row, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target, lse, g = tl.load(target_ptr + row), tl.load(lse_ptr + row), tl.load(g_ptr + row)
    dz = tl.exp(load(z_ptr + row * V + col, col < V) - lse) * (1 + 2 * z_weight * lse) - smooth / V
    dz = tl.where(col == target, dz - (1 - smooth), dz)
    tl.store(z_ptr + row * V + col, tl.where(target == ignore, 0.0, dz * g), mask=col < V)


def cross_entropy_forward(z, targets, options):
    loss, lse = torch.empty(2, len(z), device=z.device)
    cross_entropy_kernel[(len(z),)](z, targets, loss, lse, z.shape[1], *options, 4096, num_warps=8)
    return loss, lse


def cross_entropy_backward(z, targets, lse, g, options):
    """Overwrites the logits z by their gradient; g (rows,) is the gradient of each row's loss."""
    grid = (len(z), triton.cdiv(z.shape[1], 4096))
    cross_entropy_backward_kernel[grid](z, targets, lse, g, z.shape[1], *options, 4096, num_warps=8)
    return z


class CrossEntropy(torch.autograd.Function):
    """loss = lse - (1-s) z_y - s mean(z) + c lse^2,   lse = log sum exp z,  s label smoothing, c z-loss
    dz   = (p (1 + 2 c lse) - s/V - (1-s) [v = y]) dloss,  p = exp(z - lse)
    Traffic  forward 1 read a logit; backward 1 read, 1 write, in place. Eager: 4 and 3 forward, in fp32.
    Floor    8192 x 128256 bf16, all three passes at 4.3 TB/s: 1.47 ms."""
    @staticmethod
    def forward(ctx, z, targets, options):
        z, ctx.options = z.contiguous(), options
        loss, lse = cross_entropy_forward(z, targets, options)
        ctx.save_for_backward(z, targets, lse)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        z, targets, lse = ctx.saved_tensors
        # The logits become their gradient: a second backward pass through them must fail, not lie.
        torch.autograd.graph.increment_version(z)
        return cross_entropy_backward(z, targets, lse, dloss.contiguous(), ctx.options), None, None


def cross_entropy(logits, targets, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean"):
    """logits (...,V), targets (...) int64 -> loss in nats: a number, or with reduction="none" one a target.
    The backward pass overwrites the logits."""
    check_targets(logits, targets)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is unknown: choose mean, sum or none")
    rows, t = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).contiguous()
    loss = CrossEntropy.apply(rows, t, (ignore_index, label_smoothing, z_loss))
    if reduction == "none":
        return loss.view(targets.shape)
    return loss.sum() / (t != ignore_index).sum() if reduction == "mean" else loss.sum()


def check_targets(x, targets):
    check(x, others=[targets])
    expect(x.dim() and targets.shape == x.shape[:-1] and targets.dtype == torch.int64, "cross-entropy",
           [x, targets], "targets in int64, of the first one's shape but for its last dimension")


def add_product(out, a, b):
    """out += a b, in fp32 whatever a and b are: chunks summed in bf16 lose what is small beside the sum."""
    if a.dtype == out.dtype:
        return out.addmm_(a, b)
    if not a.is_cuda:
        return out.add_(a.float() @ b.float())
    with torch.autocast("cuda", enabled=False):            # which would round `out` to bf16
        try:
            return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        except RuntimeError:                               # older torch wants `out` in bf16, too
            return out.add_(torch.mm(a, b, out_dtype=out.dtype))


class LinearCrossEntropy(torch.autograd.Function):
    """cross_entropy(x W^T, targets) without ever holding the (B T, V) logits: rows go in chunks through the
    product, the loss, its gradient in place, and the two products that turn that into dx and dW.
    FLOPs  6 V D a token, as unfused.  Memory  one chunk of logits and dW in fp32, not three times B T V.
    Floor  8192 tokens, D 4096, V 128256 at 790 TFLOP/s: 32.7 ms."""
    @staticmethod
    def forward(ctx, x, w, targets, options, chunk, need_grad):
        kind, ctx.dtype, (ignore, _, z_weight) = work_dtype(x), w.dtype, options
        low, loss, lse = w.to(kind), *torch.empty(2, len(x), device=x.device)
        dx, dw = (torch.empty_like(x), torch.zeros(w.shape, device=w.device)) if need_grad else (None, None)
        count, ones = (targets != ignore).sum(), torch.ones_like(loss)
        for part in (slice(i, i + chunk) for i in range(0, len(x), chunk)):
            rows = x[part].to(kind)
            z = rows @ low.T                               # (chunk, V)
            loss[part], lse[part] = cross_entropy_forward(z, targets[part], options)
            if need_grad:
                cross_entropy_backward(z, targets[part], lse[part], ones[part], options)
                dx[part] = z @ low                         # of the sum: a mean's would be 0 in fp16
                add_product(dw, z.T, rows)
        ctx.save_for_backward(dx, dw, count)
        objective = loss.sum() / count
        plain = objective - z_weight * lse.square().masked_fill(targets == ignore, 0.0).sum() / count
        ctx.mark_non_differentiable(plain)
        return objective, plain

    @staticmethod
    def backward(ctx, grad, _):
        dx, dw, count = ctx.saved_tensors                  # dw in place: torch refuses a second pass
        share = grad / count.clamp(min=1)                  # in fp32: loss scaling goes beyond fp16
        return dx.float().mul_(share).to(dx.dtype), dw.mul_(share).to(ctx.dtype), None, None, None, None


def linear_cross_entropy(x, w, targets, ignore_index=-100, label_smoothing=0.0, z_loss=0.0,
                         chunk_bytes=2**29):
    """x (...,D), w (V,D), targets (...) -> means over the targets: (objective, it without the z-loss)."""
    check(x, w)
    check_targets(x, targets)
    expect(w.dim() == 2 and w.shape[1:] == x.shape[-1:], "linear + cross-entropy", [x, w],
           f"w (V, {x.shape[-1]})")
    chunk = max(128, chunk_bytes // (2 * len(w)) // 128 * 128)  # rows; few chunks, few passes over dW
    need_grad = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    return LinearCrossEntropy.apply(x.reshape(-1, x.shape[-1]), w, targets.reshape(-1).contiguous(),
                                    (ignore_index, label_smoothing, z_loss), chunk, need_grad)


# --- 6. FlashAttention-2 ------------------------------------------------------------------------------------
# softmax(q k^T / sqrt(H)) v without the T x S matrix: keys and values pass by in tiles; the online softmax
# keeps a maximum, a sum and an output a query. Backward the probabilities are computed again, P = exp(A - L),
# from one saved number a query: L = log sum exp of its scores, natural log.

class TiledAttention(torch.autograd.Function):
    """FlashAttention-2 (Dao 2023) in plain PyTorch, tile by tile: what the kernel below does.
    apply(q, k, v, is_causal=False), (B,T,H) and (B,S,H) -> (B,T,H); saves L as one (B,T) tensor."""
    @staticmethod
    def forward(ctx, q, k, v, is_causal=False, tile=64):
        (B, T, H), S = q.shape, k.shape[1]
        o, L = torch.empty_like(q), torch.empty(B, T, device=q.device)
        position = torch.arange(max(S, T), device=q.device)
        for t in range(0, T, tile):
            qt = q[:, t:t + tile].float() / math.sqrt(H)                                   # (B,tile,H)
            top = torch.full(qt.shape[:2], LOWEST.value, device=q.device)
            total, acc = torch.zeros_like(top), torch.zeros_like(qt)
            for s in range(0, S, tile):
                ks, vs = k[:, s:s + tile].float(), v[:, s:s + tile].float()
                scores = qt @ ks.mT                                                        # (B,tile,tile)
                if is_causal:
                    sees = position[t:t + qt.shape[1], None] + S - T >= position[s:s + ks.shape[1]]
                    scores = scores.masked_fill(~sees, -math.inf)
                new = torch.maximum(top, scores.amax(-1))
                p, shrink = torch.exp(scores - new[..., None]), torch.exp(top - new)
                acc = acc * shrink[..., None] + p @ vs
                top, total = new, total * shrink + p.sum(-1)
            o[:, t:t + tile] = acc / total.clamp(min=1e-30)[..., None]
            L[:, t:t + tile] = top + total.log()
        ctx.save_for_backward(q, k, v, o, L)
        ctx.is_causal = is_causal
        return o

    @staticmethod
    def backward(ctx, do):
        """dV = P^T dO,  dP = dO V^T,  dA = P (dP - D),  dQ = dA K / sqrt(H),  dK = dA^T Q / sqrt(H).
        D = rowsum(dO O) is rowsum(P dP), which the softmax's gradient needs, known before any tile is."""
        q, k, v, o, L = ctx.saved_tensors
        scale, (T, S) = 1 / math.sqrt(q.shape[-1]), (q.shape[-2], k.shape[-2])
        scores = (q @ k.mT).float() * scale
        if ctx.is_causal:
            scores = scores.masked_fill(~torch.ones(T, S, device=q.device, dtype=bool).tril(S - T), -math.inf)
        p = torch.exp(scores - L[..., None]).nan_to_num(0.0)                 # a query that sees nothing
        da = p * ((do @ v.mT).float() - (do * o).float().sum(-1, keepdim=True)) * scale
        return da.to(q.dtype) @ k, da.to(q.dtype).mT @ q, p.to(do.dtype).mT @ do, None, None


@triton.jit
def load_rows(ptr, stride, start, rows, BLOCK: tl.constexpr, H: tl.constexpr, BH: tl.constexpr):
    """Rows from `start` on of a (rows, H) matrix -> (BLOCK, BH) in its own type, for tl.dot; zeros beyond it.
    Tensor cores do not take fp32: input_precision="tf32x3" splits each product into three of tf32, exact to
    about 1e-6; the default, a single one, is off by 3e-4. For bf16 and fp16 it changes nothing."""
    row, h = tl.arange(0, BLOCK)[:, None], tl.arange(0, BH)[None, :]
    ptr += tl.cast(start, tl.int64) * stride               # row * stride fits in 32 bits: see heads_last
    ok = row < rows - start
    if H < BH:
        ok = ok & (h < H)
    return tl.load(ptr + row * stride + h, mask=ok, other=0.0)


@triton.jit
def visible(t, s, T, S, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """May query t see key s? The last query sees the last key. t and s are a row and a column, or the
    reverse. Queries beyond T need no mask: they are zeros, and are not stored."""
    ok, ahead = s < S, s - t - (S - T)
    if CAUSAL:
        ok = ok & (ahead <= 0)
    if WINDOW:
        ok = ok & (ahead > -WINDOW)
    return ok


@triton.jit
def keys_seen(tile, T, S, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr):
    """A tile of queries -> [first, last): keys that some of them see. Tiles beyond are never touched, which
    makes a causal mask worth half of the time, and a window nearly all of it."""
    first, last, shift = 0, S, S - T
    if CAUSAL:
        last = tl.minimum(S, tl.maximum(0, tile * BQ + BQ + shift))
    if WINDOW:
        first = tl.maximum(0, tile * BQ + shift + 1 - WINDOW) // BK * BK
    return first, last


@triton.jit
def attend_tiles(acc, top, total, q, k_ptr, v_ptr, kt, vt, first, last, t, T, S, scale, MASKED: tl.constexpr,
                 CAUSAL: tl.constexpr, WINDOW: tl.constexpr, H: tl.constexpr, BH: tl.constexpr,
                 BK: tl.constexpr):
    """Keys first..last-1 pass by. Only tiles on an edge of the mask need it: inside, a compare and a select
    an element are saved, a good part of the work that is no matrix product."""
    for start in range(first, last, BK):
        s = start + tl.arange(0, BK)
        k, v = load_rows(k_ptr, kt, start, S, BK, H, BH), load_rows(v_ptr, vt, start, S, BK, H, BH)
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale    # (BQ,BK), in units of ln 2
        if MASKED:
            scores = tl.where(visible(t[:, None], s[None, :], T, S, CAUSAL, WINDOW), scores, -float("inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        p, shrink = tl.exp2(scores - new[:, None]), tl.exp2(top - new)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
        top, total = new, total * shrink + tl.sum(p, 1)
    return acc, top, total


@triton.jit
def flash_kernel(q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, qt, kt, vt, N, T, S, group, scale,
                 CAUSAL: tl.constexpr, WINDOW: tl.constexpr, H: tl.constexpr, BH: tl.constexpr,
                 BQ: tl.constexpr, BK: tl.constexpr):
    # Programs start in order: the last tile first, which under a causal mask is the longest.
    tile, n, b = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tile * BQ + tl.arange(0, BQ)
    q = load_rows(q_ptr + b * T * qt + n * H, qt, tile * BQ, T, BQ, H, BH)
    k_ptr += b * S * kt + n // group * H                   # `group` query heads read one key/value head
    v_ptr += b * S * vt + n // group * H
    # Keys [first, last) are seen by some query of the tile, [inner, outer) by all of them.
    first, last = keys_seen(tile, T, S, CAUSAL, WINDOW, BQ, BK)
    inner, outer = first, S // BK * BK
    if CAUSAL:
        outer = tl.minimum(outer, tl.maximum(first, (tile * BQ + S - T + 1) // BK * BK))
    acc, scale = tl.zeros((BQ, BH), tl.float32), scale * LOG2E
    top, total = tl.full((BQ,), LOWEST, tl.float32), tl.zeros((BQ,), tl.float32)
    if WINDOW:
        inner = tl.cdiv(tl.maximum(0, tile * BQ + BQ + S - T - WINDOW), BK) * BK
        inner = tl.minimum(inner, outer)
        acc, top, total = attend_tiles(acc, top, total, q, k_ptr, v_ptr, kt, vt, first, inner, t, T, S, scale,
                                       True, CAUSAL, WINDOW, H, BH, BK)
    acc, top, total = attend_tiles(acc, top, total, q, k_ptr, v_ptr, kt, vt, inner, outer, t, T, S, scale,
                                   False, CAUSAL, WINDOW, H, BH, BK)
    acc, top, total = attend_tiles(acc, top, total, q, k_ptr, v_ptr, kt, vt, outer, last, t, T, S, scale,
                                   True, CAUSAL, WINDOW, H, BH, BK)
    lse = tl.where(total > 0, top + tl.log2(tl.maximum(total, 1e-30)), -float("inf")) / LOG2E
    h, at = tl.arange(0, BH)[None, :], ((b * T + t) * N + n)[:, None] * H
    tl.store(o_ptr + at + h, acc / tl.maximum(total, 1e-30)[:, None], mask=(t < T)[:, None] & (h < H))
    tl.store(lse_ptr + (b * N + n) * T + t, lse, mask=t < T)


@triton.jit
def flash_dq_kernel(q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, qt, kt, vt, N, T, S,
                    group, scale, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, H: tl.constexpr,
                    BH: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr):
    tile, n, b = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, head, row = tile * BQ + tl.arange(0, BQ), (b * T * N + n) * H, (b * N + n) * T
    q = load_rows(q_ptr + b * T * qt + n * H, qt, tile * BQ, T, BQ, H, BH)
    k_ptr += b * S * kt + n // group * H
    v_ptr += b * S * vt + n // group * H
    do = load_rows(do_ptr + head, N * H, tile * BQ, T, BQ, H, BH)
    o = load_rows(o_ptr + head, N * H, tile * BQ, T, BQ, H, BH)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + row + t, delta, mask=t < T)       # for the other kernel, which runs after this one
    lse, dq = load(lse_ptr + row + t, t < T) * LOG2E, tl.zeros((BQ, BH), tl.float32)
    first, last = keys_seen(tile, T, S, CAUSAL, WINDOW, BQ, BK)
    for start in range(first, last, BK):
        s = start + tl.arange(0, BK)
        k, v = load_rows(k_ptr, kt, start, S, BK, H, BH), load_rows(v_ptr, vt, start, S, BK, H, BH)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="tf32x3") * (scale * LOG2E) - lse[:, None])
        p = tl.where(visible(t[:, None], s[None, :], T, S, CAUSAL, WINDOW), p, 0.0)
        da = p * (tl.dot(do, tl.trans(v), input_precision="tf32x3") - delta[:, None])
        dq = tl.dot(da.to(k.dtype), k, dq, input_precision="tf32x3")
    h, at = tl.arange(0, BH)[None, :], ((b * T + t) * N + n)[:, None] * H
    tl.store(dq_ptr + at + h, dq * scale, mask=(t < T)[:, None] & (h < H))


@triton.jit
def flash_dkv_kernel(q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, qt, kt, vt, N, T, S,
                     group, scale, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, H: tl.constexpr,
                     BH: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr):
    """A program owns a tile of keys and walks over the queries that see it, for every head of its group: the
    sums stay in registers, so no atomics. All is transposed, (BK,BQ), so that P^T and dA^T stand on the left
    of a product, where tensor cores read registers."""
    tile, kv, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    s, shift = tile * BK + tl.arange(0, BK), S - T
    k = load_rows(k_ptr + b * S * kt + kv * H, kt, tile * BK, S, BK, H, BH)
    v = load_rows(v_ptr + b * S * vt + kv * H, vt, tile * BK, S, BK, H, BH)
    first, last = 0, T
    if CAUSAL:
        first = tl.maximum(0, tile * BK - shift) // BQ * BQ
    if WINDOW:
        last = tl.minimum(T, tl.maximum(0, tile * BK + BK - 1 + WINDOW - shift))
    dk, dv = tl.zeros((BK, BH), tl.float32), tl.zeros((BK, BH), tl.float32)
    tiles = tl.maximum(0, tl.cdiv(last - first, BQ))
    for i in range(group * tiles):                         # heads and tiles in one loop: two cost registers
        n, start = kv * group + i // tiles, first + i % tiles * BQ
        t, row = start + tl.arange(0, BQ), (b * N + n) * T
        q = load_rows(q_ptr + b * T * qt + n * H, qt, start, T, BQ, H, BH)
        do = load_rows(do_ptr + (b * T * N + n) * H, N * H, start, T, BQ, H, BH)
        lse, delta = load(lse_ptr + row + t, t < T) * LOG2E, load(delta_ptr + row + t, t < T)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="tf32x3") * (scale * LOG2E) - lse[None, :])
        p = tl.where(visible(t[None, :], s[:, None], T, S, CAUSAL, WINDOW), p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="tf32x3")
        da = p * (tl.dot(v, tl.trans(do), input_precision="tf32x3") - delta[None, :])
        dk = tl.dot(da.to(q.dtype), q, dk, input_precision="tf32x3")
    h, at = tl.arange(0, BH)[None, :], ((b * S + s) * tl.num_programs(1) + kv)[:, None] * H
    tl.store(dk_ptr + at + h, dk * scale, mask=(s < S)[:, None] & (h < H))
    tl.store(dv_ptr + at + h, dv, mask=(s < S)[:, None] & (h < H))


def flash_tiles(x):
    """Tiles (queries, keys), warps, stages for forward, dQ and dK/dV: in bf16 the largest that compile for
    sm_90 without spilling a register. fp32 (each product as three of tf32) is for exactness, not speed. The
    same small tiles do for GPUs whose blocks have less shared memory (A100 163 KB, RTX 4090 99 KB)."""
    H = x.shape[-1]
    if x.dtype == torch.float32 or x.is_cuda and torch.cuda.get_device_properties(
            x.device).shared_memory_per_block_optin < 227 * 1024:
        tiles = ([(64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)] if H <= 64 else
                 [(16, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)])
    elif H <= 64:
        tiles = (128, 128, 8, 3), (128, 128, 8, 3), (64, 128, 8, 3)
    elif H <= 128:
        tiles = (128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 2)
        if H < 128 or x.shape[1] == 1:                     # a padded H: masks; one query: other code
            tiles = *tiles[:2], (32, 128, 8, 2)
    else:
        tiles = (64, 64, 8, 2), (64, 64, 8, 2), (16, 64, 8, 2)
    return [dict(zip(("BQ", "BK", "num_warps", "num_stages"), t)) for t in tiles]


def head_dims(dtype):
    """Those that compile without spilling: rows of 16 bytes, and in fp32, which takes most registers, 128."""
    return range(16, 136 if dtype == torch.float32 and not INTERPRETED else 264, 8)


def heads_last(x):
    """(B,N,T,H) -> (B,T,N,H) in which a token's heads lie side by side, as a projection leaves them; there
    this copies nothing, and one stride, from token to token, says it all."""
    x = x.transpose(1, 2)
    B, T, N, H = x.shape
    side_by_side = x.stride(3) == 1 and x.stride(2) == H and x.stride(0) == T * x.stride(1) < T * 2**24
    return x if side_by_side else x.contiguous()


class FlashAttention(torch.autograd.Function):
    """apply(q, k, v, is_causal=False, window=0): (B,T,H), (B,S,H), or (B,N,T,H), (B,K,S,H), K dividing N.
    FLOPs  4 T S H a head forward, half of it if causal; 10 backward in principle, which rates and floors go
           by; the two kernels do 14, since both compute A and dP again, rather than use atomics.
    HBM    q, k, v and o once each, where eager writes and reads the T x S matrix several times.
    Floor  causal, H 128, B 4, N 32, T 4096 at 790 TFLOP/s: 0.70 and 1.74 ms."""
    @staticmethod
    def forward(ctx, q, k, v, is_causal=False, window=0):
        ctx.flat = q.dim() == 3
        q, k, v = (heads_last(x[:, None] if ctx.flat else x) for x in (q, k, v))
        (B, T, N, H), S, K = q.shape, k.shape[1], k.shape[2]
        o, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(B, N, T, device=q.device)
        ctx.args = (q.stride(1), k.stride(1), v.stride(1), N, T, S, N // K, 1 / math.sqrt(H), is_causal,
                    window, H, max(16, triton.next_power_of_2(H)))           # tensor cores take 16 at least
        tiles = flash_tiles(q)[0]
        flash_kernel[triton.cdiv(T, tiles["BQ"]), N, B](q, k, v, o, lse, *ctx.args, **tiles)
        ctx.save_for_backward(q, k, v, o, lse[:, 0] if ctx.flat else lse)
        return o[:, :, 0] if ctx.flat else o.transpose(1, 2)

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        (B, T, N, H), S, K = q.shape, k.shape[1], k.shape[2]
        do = (do[:, None] if ctx.flat else do).transpose(1, 2).contiguous()
        dq, delta = torch.empty_like(o), torch.empty_like(lse)
        dk, dv = torch.empty(2, B, S, K, H, dtype=k.dtype, device=k.device)
        _, tiles_q, tiles_k = flash_tiles(q)
        flash_dq_kernel[triton.cdiv(T, tiles_q["BQ"]), N, B](q, k, v, o, do, lse, delta, dq, *ctx.args,
                                                             **tiles_q)
        flash_dkv_kernel[triton.cdiv(S, tiles_k["BK"]), K, B](q, k, v, do, lse, delta, dk, dv, *ctx.args,
                                                              **tiles_k)
        return *(x[:, :, 0] if ctx.flat else x.transpose(1, 2) for x in (dq, dk, dv)), None, None


def attention(q, k, v, is_causal=True, window=0):
    """q (B,N,T,H), k and v (B,K,S,H), or all without heads -> like q. Query t sees keys up to t + S - T; with
    a window only the last `window` of them, itself included."""
    check(q, k, v)
    H = q.shape[-1]
    expect(q.dim() in (3, 4) and k.dim() == q.dim() and k.shape == v.shape and k.shape[-1] == H and
           k.shape[0] == q.shape[0] and (q.dim() == 3 or q.shape[1] % k.shape[1] == 0) and
           q.dtype == k.dtype == v.dtype and len(q) < 2**16, "attention", [q, k, v],
           "(B,N,T,H) and twice (B,K,S,H), N a multiple of K, B at most 65,535")
    if H not in head_dims(q.dtype):
        raise ValueError(f"head dim {H} is not supported in {str(q.dtype)[6:]}: 16 to "
                         f"{head_dims(q.dtype)[-1]} in steps of 8, or torch's scaled_dot_product_attention")
    if window < 0 or window and not is_causal:
        raise ValueError(f"window={window}, is_causal={is_causal}: windows are 0 or more, and look back only")
    return FlashAttention.apply(q, k, v, is_causal, window)


# --- 7. matrix products -------------------------------------------------------------------------------------
# (M,K) x (K,N) takes 2 M N K FLOPs. A 128 x 256 tile of C reads 384 numbers a k and does 65,536 FLOPs with
# them: 85 a byte of bf16, where a GPU needs 200. The rest must come from L2, by programs that run at the same
# time and share rows of A or columns of B: hence the order of the tiles.

@triton.jit
def tile_position(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Number of a tile -> its row and column, in bands of GROUP rows. Nine programs on a grid of 9 x 9 tiles,
    each nine blocks deep: in row order they load 1 row and 9 columns of blocks, 90; in a square 3 + 3, 54."""
    width = GROUP * tiles_n
    first = tile // width * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + tile % width % height, tile % width // height


MATMUL_TILES = [triton.Config(dict(BM=BM, BN=BN, BK=BK, GROUP=8), num_warps=warps, num_stages=stages)
                for BM, BN, BK, warps, stages in ((128, 256, 64, 8, 3), (128, 128, 64, 4, 3),
                                                  (64, 128, 64, 4, 4), (64, 64, 32, 4, 3))]


def tiles_that_fit(tiles, args, **_):
    """fp32, three products of tf32, spills registers in all but the smallest."""
    return tiles[-1:] if args["a_ptr"].dtype == torch.float32 else tiles


@triton.autotune(MATMUL_TILES[:1 if INTERPRETED else None], key=["M", "N", "K"],       # timed once a shape
                 prune_configs_by=dict(early_config_prune=tiles_that_fit))
@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, M, N, K, am, ak, bk, bn, GELU: tl.constexpr, BM: tl.constexpr,
                  BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    pm, pn = tile_position(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    m, n = (pm * BM + tl.arange(0, BM))[:, None].to(tl.int64), (pn * BN + tl.arange(0, BN))[None, :]
    k, acc = tl.arange(0, BK), tl.zeros((BM, BN), tl.float32)
    ak, bk = tl.cast(ak, tl.int64), tl.cast(bk, tl.int64)  # BK rows of 2^25 numbers are 2^31 of them
    a_ptr += m * am + k[None, :] * ak
    b_ptr += k[:, None] * bk + n.to(tl.int64) * bn
    for start in range(0, K, BK):
        a = tl.load(a_ptr, mask=(m < M) & (k[None, :] < K - start), other=0.0)
        b = tl.load(b_ptr, mask=(k[:, None] < K - start) & (n < N), other=0.0)
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
        a_ptr += BK * ak
        b_ptr += BK * bk
    if GELU:                                               # the epilogue works on registers: no traffic
        acc, _ = activate(acc, True)
    tl.store(c_ptr + m * N + n, acc, mask=(m < M) & (n < N))


def matmul(a, b, gelu=False):
    """a b or gelu(a b), (M,K) x (K,N), any strides; forward only.      Floor  8192^3 bf16: 1.39 ms"""
    check(a, b)
    expect(a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0] and a.dtype == b.dtype, "matmul", [a, b],
           "(M,K) and (K,N) of one dtype")
    (M_, K), N = a.shape, b.shape[1]
    c = torch.empty(M_, N, dtype=a.dtype, device=a.device)
    if c.numel():
        matmul_kernel[lambda tile: (triton.cdiv(M_, tile["BM"]) * triton.cdiv(N, tile["BN"]),)](
            a, b, c, M_, N, K, *a.stride(), *b.stride(), gelu)
    return c


@triton.jit
def tma_matmul_kernel(a, b, c, a_scale_ptr, b_scale_ptr, M, N, K, SCALED: tl.constexpr, BM: tl.constexpr,
                      BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        pm, pn = tile_position(tile, tiles_m, tiles_n, GROUP)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            acc = tl.dot(a.load([pm * BM, k]), b.load([pn * BN, k]).T, acc)
        if SCALED:
            m, n = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
            acc *= load(a_scale_ptr + m, m < M)[:, None]
            acc *= load(b_scale_ptr + n, n < N)[None, :]
        c.store([pm * BM, pn * BN], acc.to(c.dtype))


def linear(x, w, x_scale=None, w_scale=None):
    """x W^T, (M,K) and (N,K) in bf16 or fp16, or in fp8 with an fp32 scale a row of each (to_fp8) -> (M,N).
    Hopper's copy engine (TMA) fetches a tile by its descriptor: one thread asks, none computes addresses, and
    what lies beyond the edge reads as zero. One program a multiprocessor stays and walks over the tiles, so
    that loads for the next start during this one's stores. fp8 doubles the rate and halves the bytes; Hopper
    adds fp8 products up with some 14 bits, which is less than fp32 and more than bf16 keeps."""
    check(x, w, kinds=(*(FLOATS if x.device.type == "cpu" else FLOATS[1:]), torch.float8_e4m3fn),
          others=[s for s in (x_scale, w_scale) if s is not None])
    scaled = x.dtype == torch.float8_e4m3fn
    expect(x.dim() == w.dim() == 2 and x.shape[1] == w.shape[1] > 0 and x.dtype == w.dtype and
           x.shape[1] * x.element_size() % 16 == 0 and len(w) % 8 == 0, "linear", [x, w],
           "(M,K) and (N,K) alike, K a multiple of 16 bytes, N of 8")
    shapes = [None if s is None else s.shape for s in (x_scale, w_scale)]
    expect(shapes == ([x.shape[:1], w.shape[:1]] if scaled else [None, None]), "linear", [x, w],
           "fp8 both scales, one number a row, and other types none")
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (9, 0):
        raise ValueError(f"{torch.cuda.get_device_name(x.device)} has no TMA (sm_90 has): use matmul")
    (M_, K), N = x.shape, len(w)
    c = torch.empty(M_, N, dtype=torch.bfloat16 if scaled else x.dtype, device=x.device)
    if not c.numel():
        return c
    x, w = (t if t.is_contiguous() and t.data_ptr() % 16 == 0 else        # the engine's addresses: 16s
            t.clone(memory_format=torch.contiguous_format) for t in (x, w))
    BM, BN, BK = 128, 256, 128 // x.element_size()
    a, b, out = (TensorDescriptor.from_tensor(t, tile)
                 for t, tile in ((x, [BM, BK]), (w, [BN, BK]), (c, [BM, BN])))
    grid = (min(triton.cdiv(M_, BM) * triton.cdiv(N, BN), num_sms(x.device)),)
    tma_matmul_kernel[grid](a, b, out, *(s.contiguous() if scaled else None for s in (x_scale, w_scale)),
                            M_, N, K, scaled, BM, BN, BK, 8, num_warps=8, num_stages=3)
    return c


def to_fp8(x):
    """(rows, K) -> fp8 (e4m3: 3 bits of mantissa, up to 448) and one fp32 scale a row."""
    scale = x.float().abs().amax(-1).clamp(min=1e-12) / 448
    return (x.float() / scale[:, None]).to(torch.float8_e4m3fn), scale


GROUP_SIZE = 128                                           # weights of a row that share one scale


@triton.jit
def low_bit_kernel(x_ptr, q_ptr, scale_ptr, y_ptr, M, N, K, steps, BITS: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    j, acc, half = tl.arange(0, BK // 2), tl.zeros((BM, BN), tl.float32), BK // 2
    x_ptr += m.to(tl.int64)[:, None] * K + j[None, :]
    q_ptr += n.to(tl.int64)[None, :] * (K * BITS // 8) + j[:, None]
    ok_m, ok_n = (m < M)[:, None], (n < N)[None, :]
    for g in range(tl.program_id(2) * steps, tl.minimum(K // BK, (tl.program_id(2) + 1) * steps)):
        x0 = tl.load(x_ptr + g * BK, mask=ok_m, other=0.0)                 # the group's first 64 columns,
        x1 = tl.load(x_ptr + g * BK + half, mask=ok_m, other=0.0)          # and its last 64
        if BITS == 8:
            w0 = tl.load(q_ptr + g * BK, mask=ok_n, other=0)
            w1 = tl.load(q_ptr + g * BK + half, mask=ok_n, other=0)
        else:                                              # byte j: column j below, column j + 64 above
            both = tl.load(q_ptr + g * half, mask=ok_n, other=0).to(tl.int32)
            w0, w1 = (both & 15) - 8, (both >> 4) - 8
        part = tl.dot(x0, w0.to(x0.dtype), input_precision="tf32x3")
        part = tl.dot(x1, w1.to(x1.dtype), part, input_precision="tf32x3")
        scale = load(scale_ptr + n * (K // BK) + g, n < N)
        acc += part * scale[None, :]                       # one product an output and group, none a weight
    y_ptr += tl.program_id(2).to(tl.int64) * M * N
    tl.store(y_ptr + m.to(tl.int64)[:, None] * N + n[None, :], acc, mask=ok_m & ok_n)


def quantize(w, bits=8):
    """(N,K) -> whole numbers, -127..127 or -7..7 (two a byte); a scale for each 128 of a row, (N,K/128)."""
    expect(w.dim() == 2 and w.shape[1] % GROUP_SIZE == 0 and bits in (4, 8), f"quantize, bits={bits},", [w],
           f"columns in {GROUP_SIZE}s, and 4 or 8 bits")
    groups = w.float().unflatten(1, (-1, GROUP_SIZE))                        # (N,K/128,128)
    scale = groups.abs().amax(-1).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    q = (groups / scale[..., None]).round().to(torch.int8)
    if bits == 4:
        low, high = (q + 8).to(torch.uint8).chunk(2, -1)
        q = low | high << 4
    return q.flatten(1), scale


def dequantize(q, scale):
    """The matrix that quantize stored, fp32."""
    if q.dtype == torch.uint8:
        q = q.view(len(q), -1, GROUP_SIZE // 2).int()
        q = torch.cat(((q & 15) - 8, (q >> 4) - 8), -1)
    return (q.reshape(*scale.shape, GROUP_SIZE).float() * scale[..., None]).flatten(1)


def low_bit_linear(x, q, scale):
    """x W^T with the weights of `quantize`, (M,K) -> (M,N). Decoding reads every weight for a few tokens: its
    time is the weights' bytes. Here half of them or a quarter, unpacked in registers, never written as bf16.
    Floor  14336 x 4096, M = 1..16 at 4.3 TB/s: int8 13.7 us, int4 6.8 us; bf16 weights 27.3 us."""
    check(x, scale, others=[q])
    bits = {torch.int8: 8, torch.uint8: 4}.get(q.dtype, 0)
    expect(bits and x.dim() == q.dim() == 2 and q.shape[1] * 8 == x.shape[1] * bits and
           scale.shape == (len(q), x.shape[1] // GROUP_SIZE), "low_bit_linear", [x, q, scale],
           "(M,K), and q and scale from quantize(w, bits)")
    (M_, K), N = x.shape, len(q)
    # Decoding, and fp32, which spills in the other; a prompt.
    BM, BN, stages = (16, 32, 4) if M_ <= 16 or x.dtype == torch.float32 else (64, 128, 2)
    tiles, groups = triton.cdiv(M_, BM) * triton.cdiv(N, BN), K // GROUP_SIZE
    # Too few tiles to fill the machine: programs share the columns of a tile, and one sum joins their parts.
    splits = max(1, min(8, groups // 4, 4 * num_sms(x.device) // max(1, tiles)))
    y = torch.empty(splits, M_, N, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    low_bit_kernel[(triton.cdiv(N, BN), triton.cdiv(M_, BM), splits)](
        x.contiguous(), q.contiguous(), scale.contiguous(), y, M_, N, K, triton.cdiv(groups, splits), bits,
        BM, BN, GROUP_SIZE, num_warps=4, num_stages=stages)
    return y[0] if splits == 1 else y.sum(0).to(x.dtype)


@triton.jit
def grouped_kernel(x_ptr, w_ptr, ends_ptr, y_ptr, E, N, K, we, wk, wn, BM: tl.constexpr, BN: tl.constexpr,
                   BK: tl.constexpr):
    """Every program walks over the experts and takes each num_programs-th tile of all."""
    tile, done, start, tiles_n = tl.program_id(0), 0, 0, tl.cdiv(N, BN)
    for e in range(E):
        end = tl.load(ends_ptr + e)
        tiles_m = tl.cdiv(end - start, BM)
        while tile < done + tiles_m * tiles_n:
            pm, pn = tile_position(tile - done, tiles_m, tiles_n, 8)
            m, n = (start + pm * BM + tl.arange(0, BM))[:, None], (pn * BN + tl.arange(0, BN))[None, :]
            k, acc = tl.arange(0, BK), tl.zeros((BM, BN), tl.float32)
            x_at = x_ptr + m.to(tl.int64) * K + k[None, :]
            w_at = w_ptr + k.to(tl.int64)[:, None] * wk + n.to(tl.int64) * wn
            for first in range(0, K, BK):
                x = tl.load(x_at + first, mask=(m < end) & (k[None, :] < K - first), other=0.0)
                w = tl.load(w_at, mask=(k[:, None] < K - first) & (n < N), other=0.0)
                acc = tl.dot(x, w, acc, input_precision="tf32x3")
                w_at += BK * wk
            tl.store(y_ptr + m.to(tl.int64) * N + n, acc, mask=(m < end) & (n < N))
            tile += tl.num_programs(0)
        done += tiles_m * tiles_n
        start = end
        w_ptr += we


@triton.jit
def grouped_dw_kernel(x_ptr, dy_ptr, ends_ptr, dw_ptr, N, K, BN: tl.constexpr, BK: tl.constexpr,
                      BM: tl.constexpr):
    """dW_e = dY_e^T X_e: the sum runs over the expert's own rows."""
    e, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    k, acc = tl.program_id(2) * BK + tl.arange(0, BK)[None, :], tl.zeros((BN, BK), tl.float32)
    start, end = tl.load(ends_ptr + e - 1, mask=e > 0, other=0), tl.load(ends_ptr + e)
    for first in range(start, end, BM):
        m = (first + tl.arange(0, BM).to(tl.int64))[:, None]
        x = tl.load(x_ptr + m * K + k, mask=(m < end) & (k < K), other=0.0)
        dy = tl.load(dy_ptr + m * N + n, mask=(m < end) & (n < N), other=0.0)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision="tf32x3")
    n = tl.trans(n)
    tl.store(dw_ptr + (e.to(tl.int64) * N + n) * K + k, acc, mask=(n < N) & (k < K))


class GroupedLinear(torch.autograd.Function):
    """y_r = x_r W_e^T for rows r sorted by their expert e.      dX = dY W_e,  dW_e = dY_e^T X_e
    A loop launches one small product an expert, one after the other; here the tiles of all are one launch.
    Floor  32768 tokens to 8 experts each, D 2048, F 768, three products at 790 TFLOP/s: 3.1 ms."""
    @staticmethod
    def forward(ctx, x, w, ends):
        ctx.save_for_backward(x, w, ends)
        return grouped_product(x, w.transpose(1, 2), ends)

    @staticmethod
    def backward(ctx, dy):
        (x, w, ends), dy = ctx.saved_tensors, dy.contiguous()
        (E, N, K), dw = w.shape, torch.empty_like(w)
        side, depth, warps = grouped_tile(x)
        grouped_dw_kernel[(E, triton.cdiv(N, side), triton.cdiv(K, side))](
            x, dy, ends, dw, N, K, side, side, depth, num_warps=warps, num_stages=3)
        return grouped_product(dy, w, ends), dw, None


def grouped_tile(x):
    """Side and depth of a tile, warps."""
    return (64, 32, 4) if x.dtype == torch.float32 else (128, 64, 8)         # as in tiles_that_fit


def grouped_product(x, w, ends):
    """x (R,K), w (E,K,N) of any strides -> (R,N)"""
    (E, K, N), y = w.shape, torch.empty(len(x), w.shape[2], dtype=x.dtype, device=x.device)
    side, depth, warps = grouped_tile(x)
    tiles = (triton.cdiv(len(x), side) + E) * triton.cdiv(N, side)           # at most: E of them not full
    grouped_kernel[(min(tiles, 2 * num_sms(x.device)),)](x, w, ends, y, E, N, K, *w.stride(), side, side,
                                                         depth, num_warps=warps, num_stages=3)
    return y


def grouped_linear(x, w, ends):
    """x (R,D) sorted by expert, w (E,F,D), ends (E,) int32, rising to R -> (R,F).
    Expert e has rows ends[e-1] to ends[e]-1."""
    check(x, w, others=[ends])
    expect(x.dim() == 2 and w.dim() == 3 and w.shape[2] == x.shape[1] and x.dtype == w.dtype and
           ends.shape == w.shape[:1] and ends.dtype == torch.int32, "grouped_linear", [x, w, ends],
           "(R,D), (E,F,D) alike and (E,) int32")
    return GroupedLinear.apply(x.contiguous(), w.contiguous(), ends.contiguous())


def grouped_linear_naive(x, w, ends):
    starts = [0, *ends.tolist()]
    return torch.cat([x[a:b] @ w[e].T for e, (a, b) in enumerate(zip(starts, starts[1:]))])


# --- 8. AdamW -----------------------------------------------------------------------------------------------

@triton.jit
def adamw_kernel(p_ptr, g_ptr, m_ptr, v_ptr, low_ptr, n, lr, beta1, beta2, eps, decay, fix1, fix2,
                 LOW: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = load(g_ptr + at, at < n)
    m = beta1 * load(m_ptr + at, at < n) + (1 - beta1) * g
    v = beta2 * load(v_ptr + at, at < n) + (1 - beta2) * g * g
    p = load(p_ptr + at, at < n) * (1 - lr * decay) - lr / fix1 * m / (tl.sqrt_rn(v / fix2) + eps)
    tl.store(p_ptr + at, p, mask=at < n)
    tl.store(m_ptr + at, m, mask=at < n)
    tl.store(v_ptr + at, v, mask=at < n)
    if LOW:
        tl.store(low_ptr + at, p, mask=at < n)


def adamw_(p, g, m, v, step, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, low=None):
    """One AdamW step in place over flat fp32 buffers that hold every weight of a model; step counts from 1.
    With `low` the new weights are also written there, in bf16, for a model that computes with those.
    Traffic  4 reads, 3 writes of 4 bytes a weight, 28 bytes (30 with low), in one launch however many tensors
             there are; a loop over tensors: 84 bytes, and eight launches each.
    Floor    1.2B weights at 4.3 TB/s: 7.8 ms."""
    buffers = [p, m, v, g] + ([] if low is None else [low])
    check(*buffers)
    expect(all(t.shape == p.shape and t.is_contiguous() for t in buffers) and step >= 1 and
           p.dtype == m.dtype == v.dtype == torch.float32, f"adamw_, step {step},", buffers,
           "contiguous buffers of one length, p, m and v in float32, and steps from 1")
    fix1, fix2 = 1 - betas[0] ** step, 1 - betas[1] ** step
    adamw_kernel[(triton.cdiv(p.numel(), 1024),)](p, g, m, v, p if low is None else low, p.numel(), lr,
                                                  *betas, eps, weight_decay, fix1, fix2, low is not None,
                                                  1024)


# --- 9. the kernels in one table ----------------------------------------------------------------------------

# plain: the same by PyTorch's operators, the oracle. bytes or flops: the least, (forward, backward); what is
# 0 is not timed. rate: of the tensor cores, against bf16.
Case = namedtuple("Case", "name ours plain inputs bytes flops rate", defaults=[1])


def cases(device="cpu", dtype=torch.float32, full=False):
    """Every kernel once, small or at the shapes of a large model: what the demo checks, --compile_report
    compiles (on meta tensors) and a GPU times. inputs() makes the arguments."""
    R, D, F_, V, B, T, N, K, H, E = (16384, 4096, 14336, 128256, 4, 4096, 32, 8, 128, 64) if full else \
        (64, 384, 320, 1000, 2, 80, 4, 2, 32, 4)
    e = torch.finfo(dtype).bits // 8

    def new(*shapes, grad=True):
        return [torch.randn(shape, device=device).to(dtype).requires_grad_(grad) for shape in shapes]

    def targets():
        return [torch.randint(0, V, (R // 2,), device=device)]

    def head():                                            # W of a size that keeps logits near 1
        x, w = new((R // 2, D), (V, D))
        return [x, w.detach().div_(D**0.5).requires_grad_(), *targets()]

    def wide(x):                                           # float64 stays float64: the oracle is exact
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def norm_plain(x, w):
        y = wide(x)
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * w).to(x.dtype)

    def loss_plain(z, t):
        z = wide(z) - wide(z).amax(-1, keepdim=True)
        return (z.exp().sum(-1).log() - z.gather(-1, t[:, None])[:, 0]).mean()

    def turn_inputs():                                     # rope_table is not timed: seven small launches
        return new((B, tokens, N + K, H)) + list(rope_table(torch.arange(tokens, device=device), H))

    def turn_plain(x, *_):                                 # the oracle makes a table of its own
        return M.apply_rope(x.transpose(1, 2), torch.arange(x.shape[1], device=device)).transpose(1, 2)

    def attend_plain(q, k, v):
        past = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        return M.scaled_dot_product_attention(q, *(t.repeat_interleave(N // K, 1) for t in (k, v)), past)

    def fp8():
        (x, x_scale), (w, w_scale) = map(to_fp8, new((R, D), (D, D), grad=False))
        return [x, w, x_scale, w_scale]

    def low_bit(bits):
        return lambda: new((16, D), grad=False) + list(quantize(*new((F_, D), grad=False), bits))

    def low_bit_plain(x, q, scale):
        return x @ dequantize(q, scale).to(x.dtype).T

    def ends():                                            # rows of each expert: uneven, none for the first
        return [torch.linspace(0, R, E, device=device).square().div(R).int()]

    def adamw(p, g, m, v):
        adamw_(p, g, m, v, 1, 1e-3)
        return p

    def adamw_plain(p, g, m, v):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        return p * (1 - 1e-4) - 1e-3 * (m / 0.1) / ((v / 0.05).sqrt() + 1e-8)
    row, hidden, logits, n = R * D * e, R * F_ * e, R // 2 * V * e, 2**28 if full else 3000
    tokens, scores = 1024 if full else 8, T * T * H * N * B  # one product of attention, the causal half
    turned, product = 2 * B * tokens * (N + K) * H * e, 2 * R * D * D
    return [
        Case("GeLU", gelu, M.gelu, lambda: new((R, F_)), (2 * hidden, 3 * hidden), None),
        Case("SwiGLU", swiglu, lambda a, b: M.silu(a) * b, lambda: new((R, F_), (R, F_)),
             (3 * hidden, 5 * hidden), None),
        Case("softmax", softmax, M.softmax, lambda: new((R, 2 * D)), (4 * row, 6 * row), None),
        Case("weighted sum", weighted_sum, lambda x, w: (x * w).sum(-1), lambda: new((R, D), (D,)),
             (row, 2 * row), None),
        Case("RMSNorm", rms_norm, norm_plain, lambda: new((R, D), (D,)), (2 * row, 3 * row), None),
        Case("add + RMSNorm", add_rms_norm, lambda x, r, w: (norm_plain(x + r, w), x + r),
             lambda: new((R, D), (R, D), (D,)), (4 * row, 4 * row), None),
        Case("RoPE", rope, turn_plain, turn_inputs, (turned, turned), None),
        Case("cross-entropy", cross_entropy, loss_plain, lambda: new((R // 2, V)) + targets(),
             (logits, 2 * logits), None),
        # Not timed forward: that pass makes the gradients, too.
        Case("linear + cross-entropy", lambda *xwt: linear_cross_entropy(*xwt)[0],
             lambda x, w, t: loss_plain(x @ w.T, t), head, None, (0, 3 * R * V * D)),
        Case("attention", attention, attend_plain, lambda: [t.transpose(1, 2) for t in new(
            (B, T, N, H), (B, T, K, H), (B, T, K, H))], None, (2 * scores, 5 * scores)),
        Case("matmul", matmul, torch.matmul, lambda: new((R, D), (D, D), grad=False), None, (product, 0)),
        Case("linear, TMA", linear, F.linear, lambda: new((R, D), (D, D), grad=False), None, (product, 0)),
        Case("linear, fp8", linear, lambda x, w, a, b: (x.to(a.dtype) @ w.to(b.dtype).T) * a[:, None] * b,
             fp8, None, (product, 0), 2),
        Case("linear, int8 weights", low_bit_linear, low_bit_plain, low_bit(8), (F_ * D, 0), None),
        Case("linear, int4 weights", low_bit_linear, low_bit_plain, low_bit(4), (F_ * D // 2, 0), None),
        Case("grouped linear", grouped_linear, grouped_linear_naive,
             lambda: new((R, D), (E, D // 2, D)) + ends(), None, (product // 2, product)),
        Case("AdamW", adamw, adamw_plain,                  # p, g, m, v: the last is not negative
             lambda: [torch.randn(n, device=device) ** power for power in (1, 1, 1, 2)], (28 * n, 0), None)]


def outcome(function, inputs):
    """Outputs and gradients of a function, on copies of its inputs, for gradients of its outputs that are
    random and the same every time."""
    given = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    y = function(*(t * 1 if t.requires_grad else t for t in given))        # not leaves: some are overwritten
    y, wanted = list(y) if isinstance(y, tuple) else [y], [t for t in given if t.requires_grad]
    random = torch.Generator().manual_seed(0)
    dy = [torch.empty_like(t) if t.is_meta else torch.randn(t.shape, generator=random).to(t) for t in y]
    return y + list(torch.autograd.grad(y, wanted, dy)) if wanted else y


def as_double(inputs):
    return [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
            for t in inputs]


def errors(ours, plain, inputs):
    """|ours - exact| / |exact| of each output and gradient; exact is plain PyTorch in float64."""
    return [((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()
            for a, b in zip(outcome(ours, inputs), outcome(plain, as_double(inputs)), strict=True)]


# --- 10. proofs without a GPU: bytes counted, code compiled -------------------------------------------------

@contextlib.contextmanager
def count_kernel_bytes():
    """with count_kernel_bytes() as moved: ...  ->  moved["read"], moved["written"]: what kernels asked of
    memory, element by element, in the interpreter. Reads that L2 would serve are counted each time."""
    builder, moved = interpreter.InterpreterBuilder, {"read": 0, "written": 0}

    def counted(method, kind, mask_at):
        def call(self, pointers, *args):
            element = pointers.get_element_ty().primitive_bitwidth // 8
            moved[kind] += int(args[mask_at].data.sum()) * element
            return method(self, pointers, *args)
        return call
    with patch.multiple(builder, create_masked_load=counted(builder.create_masked_load, "read", 0),
                        create_masked_store=counted(builder.create_masked_store, "written", 1)):
        yield moved


class count_eager_bytes(TorchDispatchMode):
    """with count_eager_bytes() as eager: ...  ->  eager.read, eager.written: the bytes of every operator."""
    read = written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.read += sum(t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
            self.written += sum(t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


@contextlib.contextmanager
def compile_only(every_tile=False, arch=90):
    """with compile_only() as log: attention(meta tensors ...)  ->  a dict a kernel. A launch becomes the
    compilation of the very code that it would run on sm_90. Meta tensors have shapes, and no memory. Before
    it runs, a launch asks only the driver, so a stand-in is enough; its device name keeps these compiled
    kernels apart in the cache."""
    hopper = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", arch, 32),
                             get_current_device=lambda: f"sm_{arch}", get_current_stream=lambda device: 0)
    log, seen, run = [], set(), JITFunction.run

    def compile(self, *args, grid, warmup=False, **kw):
        kernel = run(self, *args, grid=grid, warmup=True, **kw)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            log.append(inspect_kernel(kernel))
        return kernel

    def compile_tiles(self, *args, **kw):
        self.nargs = dict(zip(self.arg_names, args))
        for config in self.prune_configs(kw)[:None if every_tile else 1]:
            self.fn.run(*args, **kw, **config.all_kwargs())
    with patch.object(driver, "_active", hopper), patch.object(JITFunction, "run", compile), \
            patch.object(Autotuner, "run", compile_tiles):
        yield log


def inspect_kernel(kernel):
    """What the machine code uses and says, read by the tools in triton's wheel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        usage, code = (subprocess.run([tool, what, f.name], capture_output=True, text=True, check=True).stdout
                       for what in ("--dump-resource-usage", "--dump-sass"))

    def used(what):
        return int(re.search(rf"{what}:(\d+)", usage)[1])

    def count(pattern):
        return len(re.findall(pattern, code))
    return dict(name=kernel.metadata.name, warps=kernel.metadata.num_warps, shared=kernel.metadata.shared,
                registers=used("REG"), stack=used("STACK"), spills=count(r"\b(?:LDL|STL)\b"),
                wgmma=count(r"\b[HQI]GMMA"), mma=count(r"\b[HQI]MMA"), dot="tt.dot" in kernel.asm["ttir"],
                fp32=bool(re.search(r"tt\.dot .*: tensor<\w+xf32> \*", kernel.asm["ttir"])),
                tma=count(r"\bUTMALDG"), loads=count(r"\bLDG\b"), wide=count(r"\bLDG\.E\S*\.128"))


def faults(r):
    """What is wrong with a compiled kernel, in words."""
    # WGMMA wants 64 rows: decoding has 16, and fp32 attention no registers for them.
    few_rows = r["name"] == "low_bit_kernel" or r["fp32"] and r["name"].startswith("flash")
    wrong = {f"{r['spills']} spills, {r['stack']} bytes of stack": r["spills"] or r["stack"],
             f"{r['shared']:,} bytes of shared memory, over 227 KB": r["shared"] > 227 * 1024,
             "over 65,536 registers a block": r["registers"] * 32 * r["warps"] > 65536,
             "products without tensor cores": r["dot"] and not r["wgmma"] + r["mma"],
             "products by MMA, which is slower than WGMMA": r["mma"] and not few_rows,
             "rows in narrow loads": not r["dot"] and not r["wide"]}
    return "; ".join(text for text, bad in wrong.items() if bad)


def compile_report(out, only=(), every_tile=False):
    """Compile the cases at full size for sm_90, print the table, write out/compile.json -> is all well?
    Triton interprets or compiles for the life of a process: where this one interprets, another compiles."""
    if INTERPRETED:
        command = [sys.executable, __file__, "--compile_report", "--out", str(out), *["--all"] * every_tile]
        command += ["--only", *only] if only else []
        return not subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}).returncode
    rows, start = [], time.perf_counter()
    for kind in (torch.bfloat16, torch.float16, torch.float32)[:None if every_tile else 1]:
        for case in cases("meta", kind, full=True):
            if only and case.name not in only or case.name == "linear, TMA" and kind == torch.float32:
                continue
            with compile_only(every_tile) as log:
                outcome(case.ours, case.inputs())
                if every_tile and kind != torch.float16:   # which takes the tiles of bf16
                    compile_more(case, kind)
            name = case.name if kind == torch.bfloat16 else f"{case.name}, {str(kind)[6:]}"
            rows += [dict(case=name, **r, faults=faults(r)) for r in log]
    M.table(f"Machine code for sm_90 (H100, H200), made here by triton {triton.__version__} in "
            f"{time.perf_counter() - start:.0f} s; at most 255 registers a thread, 227 KB shared a block",
            ["case", "kernel", "warps", "registers", "spills", "KB", "wgmma", "mma", "tma", "wide", ""],
            [[r["case"], r["name"], str(r["warps"]), str(r["registers"]), str(r["spills"]),
              f"{r['shared'] / 1024:.0f}", str(r["wgmma"]), str(r["mma"]), str(r["tma"]),
              f"{r['wide']}/{r['loads']}", r["faults"] or "ok"] for r in rows])
    (Path(out) / "compile.json").write_text(json.dumps(rows, indent=1))
    return not any(r["faults"] for r in rows)


def compile_more(case, kind):
    """What a case leaves out: the other widths of rows, head dims, masks, one query, a prompt on few bits."""
    def new(*shapes, grad=True):
        return [torch.empty(s, dtype=kind, device="meta", requires_grad=grad) for s in shapes]
    if case.name in ("softmax", "weighted sum", "RMSNorm", "add + RMSNorm"):
        for N in (512, 8192, 16384, 50304):
            if case.name == "softmax" or N * kind.itemsize <= 2**15:
                like = [(N,) if len(t.shape) == 1 else (4096, N) for t in case.inputs()]
                outcome(case.ours, new(*like))
    if case.name == "RoPE":
        outcome(lambda x: rope(x, *new((64, 64), (64, 64), grad=False)), new((2, 64, 136, 128)))
    if "weights" in case.name:
        case.ours(*new((4096, 4096), grad=False), *case.inputs()[1:])
    if case.name == "attention":
        dims = (16, 32, 64, 80, 128, 256) if kind == torch.bfloat16 else (64, 128)
        for H, T, *options in [(H, 4096, True, 0) for H in dims] + [(128, 1, True, 0)] + [
                (H, 4096, *o) for H in dims[-1:] + (64,) for o in ((False, 0), (True, 1024))]:
            outcome(lambda q, k, v: attention(q, k, v, *options),
                    new((4, 32, T, H), (4, 8, 4096, H), (4, 8, 4096, H)))


# --- 11. measuring ------------------------------------------------------------------------------------------

def race(functions, device, rounds=20, warmup=3):
    """{name: function} -> {name: (median seconds, spread)}: in turn, round after round, so that a clock that
    drifts drifts for all. A GPU works behind the Python program, so CUDA events on its own stream are the
    clock; they are read once it is done, and its L2 cache is flushed before each call. Spread: half the
    quartiles' distance."""
    cuda, times = "cuda" in str(device), {name: [] for name in functions}
    if not cuda and str(device) != "cpu":
        raise ValueError(f"no clock for {device}: work there would be queued, not done, when time is taken")
    flush = torch.empty(2**26, device=device) if cuda else None              # 256 MB
    for i in range(warmup + rounds):
        for name, function in functions.items():
            if cuda:
                flush.zero_()
                torch.cuda._sleep(2_000_000)               # about 1 ms: launches wait in line, without gaps
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                torch.cuda.synchronize()
                seconds = start.elapsed_time(end) / 1000
            else:
                start = time.perf_counter()
                y = function()
                seconds = time.perf_counter() - start
                if isinstance(y, torch.Tensor) and not y.is_cpu:
                    raise ValueError(f"{name} returns a tensor on {y.device} and is timed as {device}: the "
                                     f"clock would stop before the work is done")
            times[name] += [seconds] * (i >= warmup)
    quartiles = {name: statistics.quantiles(t, n=4) for name, t in times.items()}
    return {name: (q[1], (q[2] - q[0]) / 2) for name, q in quartiles.items()}


def training_steps(model, ids, device):
    """ids (B,T+1) -> the three modes of the lecture's benchmark."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused="cuda" in device)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def forward():
        with torch.autocast("cuda", torch.bfloat16, enabled="cuda" in device):       # as in train.py
            return M.training_loss(model, x, y)[1]

    def backward():
        model.zero_grad()
        forward().backward()

    def step():
        backward()
        optimizer.step()
    return {"forward": forward, "forward + backward": backward, "forward + backward + AdamW": step}


def random_ids(c, batch_size, device):
    return torch.randint(0, c.vocab_size, (batch_size, c.context_length + 1), device=device)


def name_ranges(model):
    """Each block, mixer, feed-forward layer and head under its name in the trace, on a GPU for nsys (NVTX),
    too. Returns the hooks that do it."""
    names = {m: n for n, m in model.named_modules() if re.search(r"(^|\.)(blocks\.\d+|mixer|ffn|head)$", n)}

    def enter(module, *_):
        module.range = torch.profiler.record_function(names[module])
        module.range.__enter__()
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_push(names[module])

    def leave(module, *_):
        module.range.__exit__(None, None, None)
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_pop()
    return [hook for module in names for hook in (module.register_forward_pre_hook(enter),
                                                  module.register_forward_hook(leave))]


def profile(c, batch_size, device, out):
    """Where a training step's time goes: its three modes, the costliest operators, a trace for
    ui.perfetto.dev, and on a GPU a memory snapshot for pytorch.org/memory_viz."""
    torch.manual_seed(0)
    model, cuda = M.Transformer(c).to(device), "cuda" in device
    steps = training_steps(model, random_ids(c, batch_size, device), device)
    flops = batch_size * c.context_length * sum(M.flops_per_token(c).values())
    times = race(steps, device, rounds=10, warmup=5)
    M.table(f"{M.num_params(c):,} parameters, {batch_size} x {c.context_length} tokens, medians of 10",
            ["mode", "ms", "+-", "TFLOP/s"],
            [[name, f"{1000 * t:.2f}", f"{1000 * spread:.2f}", f"{passes * flops / t / 1e12:.3f}"]
             for (name, (t, spread)), passes in zip(times.items(), (1, 3, 3))])
    if cuda:
        torch.cuda.memory._record_memory_history()
    hooks, what = name_ranges(model), torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[what.CPU, what.CUDA] if cuda else [what.CPU]) as trace:
        steps["forward + backward + AdamW"]()
        if cuda:
            torch.cuda.synchronize()
    for hook in hooks:
        hook.remove()
    trace.export_chrome_trace(f"{out}/trace.json")
    if cuda:
        torch.cuda.memory._dump_snapshot(f"{out}/memory.pickle")
        torch.cuda.memory._record_memory_history(enabled=None)
    # On a GPU the kernels themselves: an operator's row repeats the time of the kernels that it launched.
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    spent = sorted(((getattr(e, own) / 1000, e.key, e.count) for e in trace.key_averages()
                    if e.device_type == kind and not (cuda and e.is_user_annotation)), reverse=True)
    whole = sum(ms for ms, *_ in spent)
    M.table("Costliest kernels of one step" if cuda else "Costliest operators of one step, their own time",
            ["", "calls", "ms", "share"],
            [[key[:60], str(count), f"{ms:.2f}", f"{ms / whole:.1%}"] for ms, key, count in spent[:12]])
    print(f"\nsaved {out}/trace.json" + f" and {out}/memory.pickle" * cuda)


# --- 12. in the model ---------------------------------------------------------------------------------------

Deferred = namedtuple("Deferred", "features weight")  # logits that are never made: the loss finishes them


@contextlib.contextmanager
def in_model():
    """While it lasts, the models of model.py run on these kernels: attention (a window without a T x S mask),
    RMSNorm, SwiGLU, RoPE, and in training the loss fused with the output matrix. The rest stays as it was."""
    plain_rope, plain_loss, plain_kernel = M.apply_rope, M.lm_loss, M.Attention.choose_kernel
    plain_norm, plain_ffn, plain_forward = M.RMSNorm.forward, M.GatedFFN.forward, M.Transformer.forward

    def apply_rope(x, positions, theta=10000.0, *stretch):
        if stretch or x.dim() != 4 or x.dtype not in FLOATS:
            return plain_rope(x, positions, theta, *stretch)
        at = positions[:, 0] if positions.dim() == 3 else positions        # (T,), or (B,1,T)
        return rope(x.transpose(1, 2), *rope_table(at, x.shape[-1], theta)).transpose(1, 2)

    def norm(self, x):
        known = x.dtype in FLOATS and x.shape[-1] * x.element_size() <= 2**15    # as in check_rows
        return rms_norm(x, self.weight, self.eps) if known else plain_norm(self, x)

    def ffn(self, x):
        known = x.dtype in FLOATS and self.act is F.silu
        return self.w2(swiglu(self.w1(x), self.w3(x))) if known else plain_ffn(self, x)

    def choose_kernel(self, q, k, v, positions, key_positions, plain):
        kind, apart = work_dtype(q), self.c.window and positions.dim() > 1   # these may lie apart
        if (not plain or apart or self.c.attn_softcap or q.dtype not in FLOATS or
                q.shape[-1] not in head_dims(kind)):
            return plain_kernel(self, q, k, v, positions, key_positions, plain)
        return attention(q.to(kind), k.to(kind), v.to(kind), True, self.c.window)

    def forward(self, ids, positions=None, cache=None):
        c, kind = self.config, self.head.weight.dtype
        if not self.training or cache is not None or c.logit_softcap or c.mtp or kind not in FLOATS:
            return plain_forward(self, ids, positions, cache)
        return Deferred(self.features(ids, positions), self.head.weight)

    def lm_loss(logits, targets, z_loss=0.0):
        if not isinstance(logits, Deferred):
            return plain_loss(logits, targets, z_loss)
        objective, ce = linear_cross_entropy(*logits, targets, z_loss=z_loss)
        return (ce if z_loss else objective), objective
    with patch.multiple(M, apply_rope=apply_rope, lm_loss=lm_loss), \
            patch.object(M.RMSNorm, "forward", norm), patch.object(M.GatedFFN, "forward", ffn), \
            patch.object(M.Attention, "choose_kernel", choose_kernel), \
            patch.object(M.Transformer, "forward", forward):
        yield


WAYS = ("plain PyTorch", "our kernels", "plain, compiled", "our kernels, compiled")


def end_to_end(c, batch_size, device, ways=WAYS):
    """One model and batch, plain and on our kernels (on a GPU also compiled): loss and gradients, time and
    peak memory of forward and backward -> rows of the table."""
    torch.manual_seed(0)
    cuda = "cuda" in device
    if not cuda:                                           # the interpreter needs milliseconds an operation
        small = dict(num_layers=2, vocab_size=512, context_length=32)
        c, batch_size = dataclasses.replace(c, **{k: min(v, getattr(c, k)) for k, v in small.items()}), 1
        print("note: no GPU, so kernels are interpreted: at most 2 layers, 32 tokens, a vocabulary of 512")
    model = M.Transformer(c).to(device)
    for p in model.parameters():                           # zeros would hide what they multiply
        if not p.any():
            torch.nn.init.normal_(p, 0, 0.02)
    ids, rows, exact = random_ids(c, batch_size, device), [], None
    for name in ways[:4 if cuda else 2]:
        with in_model() if "our" in name else contextlib.nullcontext():
            steps = training_steps(torch.compile(model, dynamic=False) if "compiled" in name else model, ids,
                                   device)
            loss = steps["forward"]().item()
            steps["forward + backward"]()
            grads = torch.cat([p.grad.flatten().cpu().double() for p in model.parameters()])
            exact = grads if exact is None else exact
            differs = ((grads - exact).norm() / exact.norm()).item()
            row = [name, f"{loss:.6f}", f"{differs:.1e}", "interpreted", "n/a"]
            if cuda:                                       # before race, whose flush takes 256 MB
                torch.cuda.reset_peak_memory_stats()
                steps["forward + backward"]()
                row[4] = f"{torch.cuda.max_memory_allocated() / 1e9:.2f}"
            if cuda or "our" not in name:                  # the interpreter's time says nothing
                row[3] = f"{1000 * race({name: steps['forward + backward']}, device, rounds=5)[name][0]:.1f}"
        rows.append(row)
        torch.compiler.reset()
    M.table(f"One training step of {M.num_params(c):,} parameters, {batch_size} x {c.context_length} tokens",
            ["", "loss", "gradient differs by", "ms", "peak GB"], rows)
    return rows


# --- 13. five ways to write one function --------------------------------------------------------------------

# In CUDA C++ one writes what a thread does with an element; in Triton, what a block does with 1024.
GELU_CUDA = r"""
#include <torch/extension.h>
#include <ATen/cuda/CUDAContext.h>
__global__ void gelu(const float* x, float* y, long n) {
    long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float a = x[i], u = 1.5957691216057308f * (a + 0.044715f * a * a * a);
    y[i] = a / (1.0f + expf(-u));
}
torch::Tensor gelu_cuda(torch::Tensor x) {
    auto y = torch::empty_like(x);
    gelu<<<(x.numel() + 255) / 256, 256, 0, at::cuda::getCurrentCUDAStream()>>>(
        x.data_ptr<float>(), y.data_ptr<float>(), x.numel());
    return y;
}
"""


@functools.cache
def cuda_extension():
    from torch.utils.cpp_extension import load_inline
    return load_inline("gelu_extension", "torch::Tensor gelu_cuda(torch::Tensor x);", GELU_CUDA,
                       ["gelu_cuda"])


def five_ways(device):
    """GeLU by operators, by PyTorch's kernel, torch.compile, CUDA C++ and Triton: one result, five times."""
    cuda, rows = "cuda" in device, []
    x = torch.randn(2**26 if cuda else 2**18, device=device)
    exact = M.gelu(x.double())
    ways = {"operators": M.gelu, "PyTorch's kernel": functools.partial(F.gelu, approximate="tanh"),
            "torch.compile": torch.compile(M.gelu, dynamic=False),
            "CUDA C++": lambda x: cuda_extension().gelu_cuda(x), "Triton": gelu}
    for name, way in ways.items():
        row = [name, "", "needs a GPU", ""]
        try:
            if cuda or name not in ("torch.compile", "CUDA C++"):
                row[1:3] = f"{(way(x) - exact).abs().max().item():.1e}", "interpreted"
            if cuda or name in ("operators", "PyTorch's kernel"):
                seconds = race({name: functools.partial(way, x)}, device, rounds=10)[name][0]
                row[2:] = f"{1000 * seconds:.3f}", f"{8e-9 * x.numel() / seconds:,.1f}"
        except Exception as e:                             # no nvcc, say
            row[2] = M.first_line(e)[:60]
        rows.append(row)
    M.table(f"One function, five ways: GeLU of {x.numel():,} fp32 numbers",
            ["way", "largest error", "ms", "GB/s in and out"], rows)


# --- 14. demo -----------------------------------------------------------------------------------------------

def demo_roofline(c, tokens=8192):
    """What bounds each operation of a block, and what fusing it changes."""
    peak, bandwidth = HARDWARE["NVIDIA H200"]
    rows = []
    for name, flops, eager, fused in block_operations(c, tokens):
        us = [f"{1e6 * max(flops / peak, moved / bandwidth):,.0f}" for moved in (eager, fused)]
        rows.append([name, f"{flops / 1e9:,.1f}", f"{flops / eager:,.1f}", f"{flops / fused:,.1f}",
                     "compute" if flops / fused > peak / bandwidth else "memory", *us])
    M.table(f"Forward through one block and the loss, {tokens:,} tokens in bf16 (D {c.d_model}, "
            f"F {c.ffn_dim}, V {c.vocab_size}), at best on an H200: {peak / 1e12:.0f} TFLOP/s and "
            f"{bandwidth / 1e12:.1f} TB/s; below {peak / bandwidth:.0f} FLOPs a byte memory is the limit",
            ["operation", "GFLOPs", "FLOPs/byte", "fused", "limit", "us by operators", "us fused"], rows)


def demo_kernels(device, dtype):
    """Each kernel's error, and in the interpreter the bytes that it and PyTorch's operators ask of memory."""
    rows = []
    for case in cases(device, dtype):
        inputs, row = case.inputs(), [case.name] + [""] * 7
        try:
            e = errors(case.ours, case.plain, inputs)
            row[1:3] = f"{e[0]:.1e}", f"{max(e[1:]):.1e}" if e[1:] else "none"
        except (RuntimeError, ValueError) as e:            # no TMA on this GPU, say: the others still stand
            row[1] = M.first_line(e)[:70]
        if case.bytes and case.bytes[1] and INTERPRETED:
            inputs = [t.detach() for t in inputs]
            with count_eager_bytes() as eager:
                case.plain(*inputs)
            with count_kernel_bytes() as moved:
                case.ours(*inputs)
            operators, counted = eager.read + eager.written, moved["read"] + moved["written"]
            row[3:] = (f"{operators:,}", f"{case.bytes[0]:,}", f"{counted:,}",
                       f"{counted / case.bytes[0]:.3f}", f"{operators / counted:.1f}x")
        rows.append(row)
    M.table(f"|ours - exact| / |exact| in {str(dtype)[6:]}, exact in float64; bytes moved forward, small "
            f"shapes (beyond the prediction: gains and statistics)",
            ["kernel", "forward", "worst gradient", "by operators", "predicted", "counted", "ratio", "saved"],
            rows)


def prepare(function, inputs, which):
    """-> a call to time: forward, or forward and backward for gradients of ones. Runs it once, which compiles
    it."""
    def outputs():
        y = function(*inputs)
        return y if isinstance(y, tuple) else (y,)
    ready = [t for t in outputs() if t.requires_grad]
    wanted, dy = [t for t in inputs if t.requires_grad], [torch.ones_like(t) for t in ready]

    def both():
        return torch.autograd.grad([t for t in outputs() if t.requires_grad], wanted, dy)[0]
    if which == "forward":
        return lambda: outputs()[0]
    both()
    return both


def benchmark(device, peers=None, only=()):
    """Every case at full size in bf16: ours, operators, torch.compile of those, and peers {case: {name: f}}
    -> [{case, which, ours: us, ..., floor: us, reached: share}]. A way that fails says why in its place."""
    limits, rows = HARDWARE.get(torch.cuda.get_device_name(device)), []
    for case in cases(device, torch.bfloat16, full=True):
        if only and case.name not in only:
            continue
        inputs = case.inputs()
        for i, which in enumerate(("forward", "forward + backward")):
            if not (case.bytes or case.flops)[i]:
                continue
            row, ready = dict(case=case.name, which=which), {}
            for name, f in {"ours": case.ours, "operators": case.plain,
                            "torch.compile": torch.compile(case.plain, dynamic=False),
                            **(peers or {}).get(case.name, {})}.items():
                try:
                    ready[name] = prepare(f, inputs, which)
                except Exception as e:  # out of memory, or not for this GPU: the others go on
                    row[name] = M.first_line(e)[:80]
                    torch.cuda.empty_cache()
            row.update({name: 1e6 * t for name, (t, _) in race(ready, device).items()})
            if limits:
                row["floor"] = 1e6 * (sum(case.flops[:i + 1]) / limits[0] / case.rate if case.flops else
                                      sum(case.bytes[:i + 1]) / limits[1])
                row["reached"] = row["floor"] / row["ours"] if "ours" in ready else 0.0
            if case.flops and "ours" in ready:
                row["TFLOP/s"] = sum(case.flops[:i + 1]) / row["ours"] / 1e6
            rows.append(row)
        torch.compiler.reset()
    return rows


def demo_benchmark(device):
    """Print the benchmark; -> its rows."""
    rows, columns = benchmark(device), ("ours", "operators", "torch.compile", "floor")
    M.table(f"{torch.cuda.get_device_name(device)}, bf16, us (medians of 20); the floor by its data sheet",
            ["kernel", "", *columns, "reached"],
            [[r["case"], r["which"],
              *(f"{r[n]:,.0f}" if isinstance(r.get(n), float) else "failed" if n in r else "n/a"
                for n in columns), f"{r['reached']:.0%}" if "reached" in r else "n/a"] for r in rows])
    return rows


def plot_roofline(path, c, measured=(), tokens=8192):
    """Attainable FLOP/s against FLOPs a byte: a block's operations, from operator by operator to fused."""
    plt = M.pyplot()
    if plt is None:
        return
    fig, ax = plt.subplots(figsize=(9, 5.5))
    for name, (peak, bandwidth) in HARDWARE.items():
        x = [0.1, peak / bandwidth, 5000]
        ax.loglog(x, [min(peak, i * bandwidth) / 1e12 for i in x], label=name)
    for name, flops, *moved in block_operations(c, tokens):                  # on the last of them, the H200
        x, y = zip(*((flops / b, min(peak, flops / b * bandwidth) / 1e12) for b in moved))
        ax.plot(x, y, "o:", color="black", ms=4, lw=1)
        if "product" not in name:                          # those lie on one spot, and fused attention there
            at = int(name != "attention")
            ax.annotate(name, (x[at], y[at]), fontsize=8, rotation=-25, textcoords="offset points",
                        xytext=(4, -12))
    for r in measured:                                     # of what arithmetic bounds, far right of the ridge
        if r["which"] == "forward" and "TFLOP/s" in r:
            ax.plot(2000, r["TFLOP/s"], "*", ms=10, label=f"{r['case']}, measured")
    ax.set(xlabel="FLOPs a byte of HBM traffic", ylabel="TFLOP/s at most, bf16",
           title=f"One block and the loss, {tokens:,} tokens on an H200: by operators ... fused")
    ax.legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    print(f"\nsaved {path}")


def demo(c, device, out):
    cuda = "cuda" in device
    demo_roofline(c)
    where = f"on {torch.cuda.get_device_name(device)}" if cuda else "on the CPU, in the interpreter"
    print(f"\nKernels run {where}; triton {triton.__version__}, torch {torch.__version__}")
    demo_kernels(device, torch.bfloat16 if cuda else torch.float32)
    if not cuda:
        compile_report(out, only=("RMSNorm", "attention", "linear, TMA"))
    five_ways(device)
    plot_roofline(f"{out}/kernels.png", c, demo_benchmark(device) if cuda else ())


def make_parser():
    parser = M.cli(__doc__)
    mode = parser.add_argument_group("what to do (default: the lecture)").add_mutually_exclusive_group()
    mode.add_argument("--compile_report", "--compile-report", action="store_true",
                      help="compile all for sm_90, no GPU needed")
    mode.add_argument("--end_to_end", "--end-to-end", action="store_true",
                      help="a training step on our kernels, and without")
    mode.add_argument("--profile", action="store_true",
                      help="where a training step's time goes: tables, trace, memory")
    flag = parser.add_argument
    flag("--all", action="store_true", help="with --compile_report: all tiles, head dims and masks")
    flag("--only", nargs="+", metavar="CASE", default=[], help="with --compile_report: these cases")
    flag("--batch_size", type=int, default=8, help="sequences, with --end_to_end and --profile")
    flag("--device", default="auto", help="cuda or cpu; auto takes cuda where it is")
    flag("--out", default="out", metavar="DIR", help="folder for everything the run makes")
    M.add_model_flags(parser)
    return parser


def parse_args(argv=None, parser=None):
    parser = parser or make_parser()
    args, known = parser.parse_args(argv), [case.name for case in cases("meta")]
    for name in args.only:
        if name not in known:
            parser.error(f"--only {name!r} is no case: choose from {', '.join(map(repr, known))}")
    if args.batch_size < 1:
        parser.error(f"--batch_size {args.batch_size} is out of range: 1 or more")
    heard = {"out", "device"}                              # by the lecture
    if args.compile_report:
        heard = {"compile_report", "out", "all", "only"}
    elif args.end_to_end or args.profile:
        heard = {*vars(args)} - {"all", "only"}
    for name in {*vars(args)} - heard:
        if getattr(args, name) != parser.get_default(name):
            print(f"note: --{name} is ignored here")
    return args


def main(argv=None):
    parser = make_parser()
    args = parse_args(argv, parser)
    try:
        torch.manual_seed(0)
        Path(args.out).mkdir(parents=True, exist_ok=True)
        if args.compile_report:
            return int(not compile_report(args.out, args.only, args.all))
        device = M.pick_device(args.device)
        device = "cpu" if device == "mps" or INTERPRETED else device       # no triton there
        if device == "cpu" and not INTERPRETED:
            raise ValueError("--device cpu: triton compiles for the GPU here; to interpret kernels, give "
                             "TRITON_INTERPRET=1 before python")
        if "cuda:" in device:
            torch.cuda.set_device(device)
        if args.profile:
            profile(M.model_config(args), args.batch_size, device, args.out)
        elif args.end_to_end:
            end_to_end(M.model_config(args), args.batch_size, device)
        else:
            demo(M.ModelConfig(**M.PRESETS["llama2-7b"]), device, args.out)
    except (ValueError, OSError) as e:
        parser.error(M.first_line(e))
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted\n")


if __name__ == "__main__":
    sys.exit(main())
