"""Tests of kernels.py without a GPU: (1-4) equal to float64 and to torch, in Triton's interpreter,
(5) accounting: bytes counted, code compiled for sm_90, (6) in the model, (7) the command line and bad input,
and the runner of tests/gpu.py, which does the rest on a GPU.
"""
import contextlib, json, math, os, re, shlex, subprocess, sys
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["TRITON_INTERPRET"] = "1"                       # before triton is imported, by whomever
pytest.importorskip("triton", reason="triton is made for Linux")
import model as M  # noqa: E402
import kernels as K  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import (InterpretedFunction, InterpreterBuilder, TensorHandle,  # noqa: E402
                                        _patch_lang)

torch.set_num_threads(1)
pytestmark = [pytest.mark.skipif(not K.INTERPRETED, reason="triton was imported without its interpreter"),
              pytest.mark.filterwarnings("ignore:.*encountered in")]   # numpy, where a GPU says nothing
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}    # |ours - exact| / |exact|; bf16 keeps 8 bits


# --- the interpreter, corrected: bf16 and fp8 are bits in integer arrays, and it forgets that ---------------

LOW = {tl.bfloat16: (torch.bfloat16, torch.int16, np.uint16),
       tl.float8e4nv: (torch.float8_e4m3fn, torch.int8, np.uint8)}


def decoded(handle):
    """A handle of bits -> a handle of float32."""
    kind = LOW.get(handle.dtype.scalar)
    if kind is None:
        return handle
    signed = np.int16 if kind[2] is np.uint16 else np.int8
    bits = torch.from_numpy(np.ascontiguousarray(handle.data).view(signed))
    return TensorHandle(bits.view(kind[0]).float().numpy(), tl.float32)


def corrected_cast(original):
    def cast(self, src, dst, *rounding):
        src, target = decoded(src), LOW.get(dst.scalar)
        if target is None:
            return src if src.dtype.scalar == dst.scalar else original(self, src, dst, *rounding)
        data = torch.from_numpy(np.ascontiguousarray(src.data)).float().to(target[0])      # to nearest even
        return TensorHandle(data.view(target[1]).numpy().view(target[2]), dst.scalar)
    return cast


def call_quickly(self, *args, **kwargs):
    """The interpreter patches the language at every call of a function inside a kernel (tl.sum, ...), two
    milliseconds each; once a module is enough, and the tests run in half the time."""
    modules = frozenset(id(v) for v in self.fn.__globals__.values() if v is tl or v is tl.core)
    if modules not in PATCHED:
        PATCHED.add(modules)
        _patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


PATCHED = {frozenset([id(tl)])}                            # the kernel around it has patched that one
InterpretedFunction.__call__ = call_quickly
ORIGINAL = {name: getattr(InterpreterBuilder, name)
            for name in ("cast_impl", "create_fp_to_fp", "create_dot")}
CORRECTED = {"cast_impl": corrected_cast(ORIGINAL["cast_impl"]),
             "create_fp_to_fp": corrected_cast(ORIGINAL["create_fp_to_fp"]),
             "create_dot": lambda self, a, b, *rest: ORIGINAL["create_dot"](self, decoded(a), decoded(b),
                                                                            *rest)}


@contextlib.contextmanager
def interpreter(methods):
    with patch.multiple(InterpreterBuilder, **methods):
        K.interpreter_knows_bf16.cache_clear()
        yield
    K.interpreter_knows_bf16.cache_clear()


@pytest.fixture(autouse=True)
def right_bf16():
    torch.manual_seed(0)
    with interpreter(CORRECTED):
        yield


def test_the_correction_is_needed():
    """Without it bf16 is silently wrong, so kernels.py refuses; the day this fails, drop the correction."""
    a = torch.full((16, 16), 1.5, dtype=torch.bfloat16)
    assert K.interpreter_knows_bf16()
    with interpreter(ORIGINAL):
        assert not K.interpreter_knows_bf16()
        with pytest.raises(ValueError, match="float32 on a CPU"):
            K.gelu(a)


# --- helpers ------------------------------------------------------------------------------------------------

def leaves(*shapes, dtype=torch.float32):
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def agree(ours, exact, inputs, tolerance=1e-5):
    """Outputs and gradients of `ours` are those of `exact` in float64."""
    for a, b in zip(K.outcome(ours, inputs), K.outcome(exact, K.as_double(inputs)), strict=True):
        assert a.shape == b.shape and torch.isfinite(a).all()
        error = (a.double() - b).norm()                    # at least 0.1: terms of size 1 may cancel
        assert error <= tolerance * b.norm().clamp(min=0.1), (error / b.norm()).item()


# --- 1. every kernel against float64 ------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [case.name for case in K.cases("meta")])
def test_kernel_equals_float64(name, dtype):
    case = next(case for case in K.cases(dtype=dtype) if case.name == name)
    limit = 1e-2 if "fp8" in name else TOLERANCE[dtype]    # fp8 comes back as bf16
    assert max(K.errors(case.ours, case.plain, case.inputs())) < limit


ROWS = {"softmax": (K.softmax, lambda x: torch.softmax(x, -1), 0),
        "rms_norm": (K.rms_norm, lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), 1),
        "weighted_sum": (K.weighted_sum, lambda x, w: (x * w).sum(-1), 1)}


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 123), (33, 256), (2, 5000)])
@pytest.mark.parametrize("name", ROWS)
def test_rows_of_any_length(name, shape):
    ours, exact, gains = ROWS[name]
    agree(ours, exact, leaves(shape, *[shape[-1:]] * gains))


def test_softmax_of_rows_wider_than_registers():
    agree(K.softmax, lambda x: torch.softmax(x, -1), leaves((2, 40000)))


def test_addition_and_norm_of_wide_rows():
    """Beyond 8,192 numbers the addition is a pass of its own."""
    agree(K.add_rms_norm, lambda x, r, w: (F.rms_norm(x + r, w.shape, w, 1e-5), x + r),
          leaves((2, 8200), (2, 8200), (8200,), dtype=torch.bfloat16), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("n", [1, 7, 1023, 1025])
def test_elementwise_of_any_length(n):
    agree(K.gelu, M.gelu, leaves((n,)))
    agree(K.swiglu, lambda a, b: M.silu(a) * b, leaves((n,), (n,)))


def test_inputs_that_are_not_contiguous():
    x, w = leaves((12, 40), (12,))
    agree(lambda x: K.gelu(x.T), lambda x: M.gelu(x.T), [x])
    agree(lambda x: K.softmax(x.T), lambda x: torch.softmax(x.T, -1), [x])
    agree(lambda x, w: K.rms_norm(x.T, w), lambda x, w: F.rms_norm(x.T, w.shape, w, 1e-5), [x, w])
    agree(lambda x, w: K.add_rms_norm(x.T, x.T, w),
          lambda x, w: (F.rms_norm(2 * x.T, w.shape, w, 1e-5), 2 * x.T), [x, w])
    agree(lambda a, b: K.matmul(a.T, b.T), lambda a, b: a.T @ b.T,
          [t.detach() for t in leaves((40, 12), (33, 40))])
    q, scale = K.quantize(torch.randn(20, 128))
    x = torch.randn(3, 128)
    torch.testing.assert_close(K.low_bit_linear(x, q[::2], scale[::2]), K.low_bit_linear(x, q, scale)[:, ::2])


def test_no_rows_and_no_tokens():
    """Nothing in, nothing out; not the division by zero or the empty descriptor that a launch would meet."""
    nothing, w = torch.zeros(0, 64, requires_grad=True), torch.ones(64)
    for y in (K.gelu(nothing), K.swiglu(nothing, nothing), K.softmax(nothing), K.rms_norm(nothing, w)):
        assert y.shape == (0, 64)
        assert torch.autograd.grad(y.sum(), nothing)[0].shape == (0, 64)
    for y in (K.linear(nothing, torch.zeros(8, 64)), K.matmul(nothing, torch.zeros(64, 8)),
              K.low_bit_linear(torch.zeros(0, 128), *K.quantize(torch.zeros(8, 128))),
              K.grouped_linear(nothing, torch.zeros(2, 8, 64), torch.zeros(2, dtype=torch.int32))):
        assert y.shape == (0, 8)


def test_rows_far_apart():
    """The last tokens, or heads, start beyond 2^31 numbers: an offset in 32 bits would wrap. (The memory
    between is never touched, so the system never provides it.)"""
    T, far = 131, 2**24 - 16
    try:
        memory = torch.empty(T * far, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("this system does not promise 4 GB that are not used")
    x = memory.as_strided((1, T, 1, 16), (T * far, far, 16, 1)).copy_(torch.randn(1, T, 1, 16))  # (B,T,N,H)
    near, table = x.clone(memory_format=torch.contiguous_format), K.rope_table(torch.arange(T), 16)
    assert torch.equal(K.rope(x, *table), K.rope(near, *table))
    assert torch.equal(K.matmul(near[0, :3, 0], x[0, :, 0].T), K.matmul(near[0, :3, 0], near[0, :, 0].T))
    results = []
    for heads in (x.transpose(1, 2).requires_grad_(), near.transpose(1, 2).requires_grad_()):
        y = K.attention(heads, heads, heads)
        results.append((y, *torch.autograd.grad(y.sum(), heads)))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    heads, two = memory.as_strided((1, 2, 3, 16), (32, 16, 2**30, 1)), [t[:2] for t in table]
    turned = K.rope(heads.copy_(torch.randn(1, 2, 3, 16)).clone(memory_format=torch.contiguous_format), *two)
    assert torch.equal(K.rope(heads, *two, inplace=True), turned)


@pytest.mark.parametrize("x", [100.0, 12.0, -12.0, -100.0])
def test_gates_are_finite_far_out(x):
    """tanh written as (e^u - 1)/(e^u + 1) is NaN here."""
    agree(K.gelu, M.gelu, [torch.full((5,), x, requires_grad=True)])
    agree(lambda a: K.swiglu(a, a), lambda a: M.silu(a) * a, [torch.full((5,), x, requires_grad=True)])


def test_softmax_extremes():
    inf = math.inf
    x = torch.tensor([[0, 0, 100.0], [-inf, 1, -inf], [-inf] * 3, [1e30, -1e30, 1e30], [-3e38, -3e38, -3e38]])
    torch.testing.assert_close(K.softmax(x), M.softmax(x))
    assert K.softmax(x)[2].eq(0).all()


def test_rms_norm_extremes():
    w = torch.ones(64)
    for scale in (0.0, 1e-20, 1e18):
        x = torch.randn(3, 64) * scale
        torch.testing.assert_close(K.rms_norm(x, w), F.rms_norm(x, (64,), w, 1e-5))


@pytest.mark.parametrize("heads, H", [(1, 16), (3, 12), (5, 96)])
def test_rope(heads, H):
    at = torch.randint(0, 1000, (2, 7))
    cos, sin = K.rope_table(at, H)
    agree(lambda x: K.rope(x, cos, sin),
          lambda x: M.apply_rope(x.transpose(1, 2), at[:, None]).transpose(1, 2), leaves((2, 7, heads, H)))
    x, = leaves((2, 7, heads, H))
    spread = [t.repeat_interleave(2, -1)[..., ::2] for t in (cos, sin)]      # the same, not side by side
    assert torch.equal(K.rope(x, *spread), K.rope(x, cos, sin))


def test_rope_in_place_on_queries_and_keys_of_the_projection():
    """One launch turns the first heads of (B,T,heads,H); the values behind them stay; gradients pass."""
    cos, sin = K.rope_table(torch.arange(9), 12)

    def ours(y):
        y = y.view(2, 9, 7, 12)
        before = y.data_ptr()
        assert K.rope(y[:, :, :5], cos, sin, inplace=True).data_ptr() == before
        return y

    def exact(y):
        q, v = y.view(2, 9, 7, 12).split([5, 2], 2)
        return torch.cat((M.apply_rope(q.transpose(1, 2), torch.arange(9)).transpose(1, 2), v), 2)
    agree(ours, exact, leaves((2, 9, 84)))


# --- 2. cross-entropy against torch -------------------------------------------------------------------------

def plain_loss(z, t, smoothing, z_loss, reduction):
    rows = F.cross_entropy(z, t, reduction="none", label_smoothing=smoothing)
    rows = rows + z_loss * z.logsumexp(-1).square() * (t != -100)
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / (t != -100).sum()}[reduction]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-2)])
def test_cross_entropy(smoothing, z_loss, reduction):
    z, = leaves((11, 777))
    t = torch.randint(0, 777, (11,))
    t[[0, 4]] = -100
    agree(lambda z: K.cross_entropy(4 * z, t, label_smoothing=smoothing, z_loss=z_loss, reduction=reduction),
          lambda z: plain_loss(4 * z, t, smoothing, z_loss, reduction), [z])


def test_cross_entropy_extremes():
    z = torch.tensor([[1e4, -1e4, 0.0], [-math.inf, 5.0, 5.0], [3e38, 0.0, 0.0]], requires_grad=True)
    t = torch.tensor([1, 1, 0])
    exact = F.cross_entropy(z, t, reduction="none")
    torch.testing.assert_close(K.cross_entropy(z, t, reduction="none"), exact)
    assert K.cross_entropy(z, torch.tensor([3, -1, 0]), reduction="none").isnan().tolist() == [1, 1, 0]
    wide = torch.randn(2, 9000)                            # more than one block
    torch.testing.assert_close(K.cross_entropy(wide, t[:2]), F.cross_entropy(wide, t[:2]))


def test_logits_are_overwritten_and_a_second_backward_pass_fails():
    z, t = torch.randn(4, 50, requires_grad=True), torch.randint(0, 50, (4,))
    logits = z * 1
    loss = K.cross_entropy(logits, t)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(logits.detach(), z.grad)    # their memory holds the gradient now
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def fused(x, w, t, smoothing=0.0, z_loss=0.0, chunk=16):
    """The objective, in chunks that are small enough for the interpreter."""
    return K.LinearCrossEntropy.apply(x, w, t, (-100, smoothing, z_loss), chunk, True)[0]


@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 1e-2)])
@pytest.mark.parametrize("tokens", [1, 16, 37])
def test_linear_cross_entropy(tokens, smoothing, z_loss):
    t = torch.randint(0, 500, (tokens,))
    t[tokens // 2 + 1:tokens // 2 + 3] = -100
    agree(lambda x, w: fused(x, w, t, smoothing, z_loss),
          lambda x, w: plain_loss(x @ w.T, t, smoothing, z_loss, "mean"), leaves((tokens, 24), (500, 24)))
    agree(lambda x, w: K.linear_cross_entropy(x, w, t, -100, smoothing, z_loss)[0],        # one chunk
          lambda x, w: plain_loss(x @ w.T, t, smoothing, z_loss, "mean"), leaves((tokens, 24), (500, 24)))


def test_linear_cross_entropy_tells_the_loss_without_z_and_scales_its_gradient():
    x, w = leaves((2, 5, 16), (100, 16))
    t = torch.randint(0, 100, (2, 5))
    objective, plain = K.linear_cross_entropy(x, w, t, z_loss=0.1)
    torch.testing.assert_close(plain, F.cross_entropy((x @ w.T).flatten(0, 1), t.flatten()))
    assert objective > plain and not plain.requires_grad
    agree(lambda x, w: 7 * K.linear_cross_entropy(x, w, t)[0],
          lambda x, w: 7 * F.cross_entropy((x @ w.T).flatten(0, 1), t.flatten()), [x, w])


def test_linear_cross_entropy_makes_gradients_only_where_they_are_wanted(monkeypatch):
    x, w = leaves((5, 16), (100, 16))
    monkeypatch.setattr(K, "cross_entropy_backward", None)                   # a call would raise
    with torch.no_grad():
        K.linear_cross_entropy(x, w, torch.randint(0, 100, (5,)))
    with pytest.raises(TypeError):
        K.linear_cross_entropy(x, w, torch.randint(0, 100, (5,)))


def test_no_tensor_is_as_large_as_the_logits():
    x, w = leaves((100, 8), (300, 8))
    t = torch.randint(0, 300, (100,))

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.nbytes = max([self.nbytes, *made])
            return out
    with Largest() as largest:
        fused(x, w, t).backward()
    assert largest.nbytes == 4 * 16 * 300                  # one chunk of 16 rows


def test_the_weight_gradient_is_summed_in_fp32():
    """Chunks summed in bf16 lose what is small beside the sum: 64 chunks are no worse than one."""
    x, w = leaves((64, 8), (130, 8), dtype=torch.bfloat16)
    t = torch.randint(0, 5, (64,))                         # few targets: large sums

    def error(chunk):
        return K.errors(lambda x, w: fused(x, w, t, chunk=chunk),
                        lambda x, w: F.cross_entropy(x @ w.T, t), [x, w])[2]
    assert error(1) < 1.2 * error(64) < 1e-2


def test_linear_cross_entropy_in_fp16_keeps_small_gradients():
    """p is 6e-6 for all words but one: stored as a share of the mean over 64 targets nothing would be left of
    it. And the factor of loss scaling is beyond fp16."""
    x, w, t = torch.randn(64, 8) / 8, torch.randn(500, 8), torch.arange(64) % 2
    x[:, 0], w[0], w[1:, 0] = 1.0, torch.eye(8)[0] * 12, 0.0
    inputs = [x.half().requires_grad_(), w.half().requires_grad_()]
    double = K.as_double(inputs)
    ours = torch.autograd.grad(2**16 * K.linear_cross_entropy(*inputs, t)[0], inputs)
    exact = torch.autograd.grad(2**16 * F.cross_entropy(double[0] @ double[1].T, t), double)
    for a, b in ((ours[0], exact[0]), (ours[1][2:], exact[1][2:])):        # of W, words that are no target
        assert (a - b).norm() < 1e-2 * b.norm()


def test_linear_cross_entropy_without_targets_is_torchs():
    x, w = leaves((3, 8), (20, 8))
    for loss in (K.linear_cross_entropy(x, w, torch.full((3,), -100))[0],
                 F.cross_entropy(x @ w.T, torch.full((3,), -100))):
        assert loss.isnan() and all(g.eq(0).all() for g in torch.autograd.grad(loss, (x, w)))


# --- 3. attention -------------------------------------------------------------------------------------------

def exact_attention(q, k, v, causal=True, window=0):
    if q.dim() == 4:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    T, S = q.shape[-2], k.shape[-2]
    mask = M.attention_mask(torch.arange(S - T, S), torch.arange(S), window) if causal else None
    return M.scaled_dot_product_attention(q, k, v, mask)


# heads N, K, queries T, keys S, head dim, causal, window
@pytest.mark.parametrize("N, heads, T, S, H, causal, window", [
    (4, 2, 100, 100, 32, True, 0), (2, 1, 70, 130, 40, True, 0), (2, 2, 130, 70, 16, True, 0),
    (1, 1, 1, 90, 64, True, 0), (2, 1, 150, 150, 64, True, 34), (1, 1, 90, 160, 16, True, 64),
    (1, 1, 65, 90, 64, False, 0), (1, 1, 7, 7, 256, True, 0), (1, 1, 140, 140, 128, True, 1000)])
def test_attention(N, heads, T, S, H, causal, window):
    agree(lambda *qkv: K.attention(*qkv, causal, window), lambda *qkv: exact_attention(*qkv, causal, window),
          leaves((1, N, T, H), (1, heads, S, H), (1, heads, S, H)))


@pytest.mark.parametrize("Fn", [K.FlashAttention, K.TiledAttention])
@pytest.mark.parametrize("causal", [False, True])
def test_the_course_contract(Fn, causal):
    """apply(q, k, v, is_causal) on (B,T,D); one saved tensor of shape (B,T) is L, in natural log."""
    q, k, v = leaves((2, 128, 64), (2, 128, 64), (2, 128, 64))
    agree(lambda *qkv: Fn.apply(*qkv, causal), lambda *qkv: exact_attention(*qkv, causal), [q, k, v])
    o = Fn.apply(q, k, v, causal)
    L, = [t for t in o.grad_fn.saved_tensors if t.shape == (2, 128)]
    scores = q @ k.mT / 8
    if causal:
        scores = scores.masked_fill(~torch.ones(128, 128, dtype=bool).tril(), -math.inf)
    torch.testing.assert_close(L, scores.logsumexp(-1))
    torch.testing.assert_close(Fn.apply(q, k, v), exact_attention(q, k, v, False))         # by default


def test_attention_of_queries_that_see_nothing():
    q, k, v = leaves((1, 1, 40, 16), (1, 1, 10, 16), (1, 1, 10, 16))
    o, dq, dk, dv = K.outcome(lambda *t: K.attention(*t), [q, k, v])
    assert o[0, 0, :30].eq(0).all() and dq[0, 0, :30].eq(0).all()
    assert dk.isfinite().all() and dv.isfinite().all()
    L = K.FlashAttention.apply(q, k, v, True).grad_fn.saved_tensors[-1]
    assert L[0, 0, :30].eq(-math.inf).all() and L[0, 0, 30:].isfinite().all()


def test_attention_extremes_and_views():
    q, k, v = leaves((1, 33, 6, 16), (1, 33, 2, 16), (1, 33, 2, 16))
    views = lambda f: lambda q, k, v: f(*(t.transpose(1, 2) for t in (10 * q, 10 * k, v)))
    agree(views(K.attention), views(exact_attention), [q, k, v], 1e-4)     # scores of hundreds, in fp32
    assert K.attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).is_contiguous()


def test_attention_cannot_see_the_future():
    q, k, v = (t.detach() for t in leaves(*[(1, 1, 70, 16)] * 3))
    changed = [torch.cat((t[:, :, :50], t[:, :, 50:] + 1), 2) for t in (q, k, v)]
    assert torch.equal(K.attention(q, k, v)[:, :, :50], K.attention(*changed)[:, :, :50])


# --- 4. products and AdamW ----------------------------------------------------------------------------------

@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (7, 123, 5), (130, 70, 260)])
def test_matmul(m, k, n):
    a, b = (t.detach() for t in leaves((m, k), (k, n)))
    agree(K.matmul, torch.matmul, [a, b])
    agree(lambda a, b: K.matmul(a, b, gelu=True), lambda a, b: M.gelu(a @ b), [a, b])


@triton.jit
def positions_kernel(out_ptr, tiles_m, tiles_n, GROUP: tl.constexpr):
    m, n = K.tile_position(tl.program_id(0), tiles_m, tiles_n, GROUP)
    tl.store(out_ptr + 2 * tl.program_id(0), m)
    tl.store(out_ptr + 2 * tl.program_id(0) + 1, n)


@pytest.mark.parametrize("rows, cols, group, loads", [(9, 9, 1, 90), (9, 9, 3, 54), (5, 3, 4, None)])
def test_tile_order(rows, cols, group, loads):
    """Every tile once; the first nine of a 9 x 9 grid load 90 blocks in row order, 54 in bands of three."""
    out = torch.empty(rows * cols, 2, dtype=torch.int32)
    positions_kernel[(rows * cols,)](out, rows, cols, group)
    order = [tuple(p) for p in out.tolist()]
    assert sorted(order) == [(i, j) for i in range(rows) for j in range(cols)]
    if loads:
        assert 9 * (len({i for i, _ in order[:9]}) + len({j for _, j in order[:9]})) == loads


@pytest.mark.parametrize("m, k, n", [(5, 64, 8), (200, 136, 264)])
def test_linear_by_descriptors(m, k, n):
    agree(K.linear, F.linear, [t.detach() for t in leaves((m, k), (n, k))])


@pytest.mark.parametrize("bits, error", [(8, 0.01), (4, 0.15)])
def test_low_bit_linear(bits, error):
    w = torch.randn(70, 1152)                              # 9 groups: not the same for each of 2 programs
    q, scale = K.quantize(w, bits)
    assert q.numel() == 70 * 1152 * bits // 8 and scale.shape == (70, 9)
    whole = K.dequantize(q, scale)
    assert ((whole - w).abs() <= 0.501 * scale.repeat_interleave(128, 1)).all()
    assert (whole - w).norm() < error * w.norm()
    for m in (1, 3, 33):                                   # one token, a few (columns shared out), a prompt
        agree(lambda x: K.low_bit_linear(x, q, scale), lambda x: x @ whole.double().T, [torch.randn(m, 1152)])


def test_fp8_scales_rows():
    x = torch.randn(40, 64) * torch.logspace(-6, 6, 40)[:, None]
    low, scale = K.to_fp8(x)
    assert low.float().abs().amax(-1).eq(448).all()
    assert ((low.float() * scale[:, None] - x).norm(dim=-1) < 0.04 * x.norm(dim=-1)).all()


@pytest.mark.parametrize("ends", [[0, 0, 7], [130, 130, 300], [1, 2, 3]])
def test_grouped_linear(ends):
    ends = torch.tensor(ends, dtype=torch.int32)
    agree(lambda x, w: K.grouped_linear(x, w, ends), lambda x, w: K.grouped_linear_naive(x, w, ends),
          leaves((ends[-1].item(), 40), (3, 72, 40)))


def test_adamw_is_torchs():
    p = torch.randn(1500)
    m, v, low = torch.zeros(1500), torch.zeros(1500), torch.empty(1500, dtype=torch.bfloat16)
    theirs = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, 6):
        theirs.grad = torch.randn(1500) * 10.0 ** -step
        K.adamw_(p, theirs.grad, m, v, step, 1e-2, low=low)
        optimizer.step()
    torch.testing.assert_close(p, theirs.detach(), rtol=1e-6, atol=1e-7)
    assert torch.equal(low, p.bfloat16())


# --- 5. accounting: bytes, machine code, clocks -------------------------------------------------------------

STREAMS = [case for case in K.cases() if case.bytes and "weights" not in case.name]


@pytest.mark.parametrize("case", STREAMS, ids=lambda case: case.name)
def test_predicted_bytes_are_moved(case):
    """Forward, what the kernels read and write is what their docstrings say, but for gains and statistics."""
    inputs = [t.detach() for t in case.inputs()]
    with K.count_kernel_bytes() as moved:
        case.ours(*inputs)
    assert 1.0 <= (moved["read"] + moved["written"]) / case.bytes[0] < 1.15


def test_eager_softmax_moves_what_the_lecture_counts():
    x = torch.randn(6, 50)
    with K.count_eager_bytes() as eager:
        e = torch.exp(x - x.amax(-1, keepdim=True))
        e / e.sum(-1, keepdim=True)
    assert eager.read == 4 * (5 * 300 + 2 * 6) and eager.written == 4 * (3 * 300 + 2 * 6)


def test_every_kernel_compiles_for_hopper(tmp_path):
    """No spills, shared memory that fits, tensor cores under every product, 16-byte loads along rows: in each
    of three dtypes, every tile that autotuning tries, head dims, masks, the widest rows."""
    run = subprocess.run([sys.executable, ROOT / "kernels.py", "--compile_report", "--all", "--out", tmp_path],
                         capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads((tmp_path / "compile.json").read_text())
    kernels = set(re.findall(r"@triton\.jit\ndef (\w+_kernel)\(", (ROOT / "kernels.py").read_text()))
    assert {r["name"] for r in rows} == kernels and len(kernels) >= 20
    for r in rows:
        assert not r["faults"] and r["spills"] == r["stack"] == 0 and r["shared"] <= 227 * 1024, r
    assert all(r["tma"] for r in rows if r["name"] == "tma_matmul_kernel")
    assert sum(r["dot"] for r in rows) >= 10


def test_faults_are_found():
    good = dict(name="k", warps=4, registers=64, spills=0, stack=0, shared=1024, dot=True, wgmma=4, mma=0,
                wide=0, fp32=False)
    assert K.faults(good) == ""
    for change in (dict(spills=2), dict(stack=8), dict(shared=240000), dict(registers=255, warps=16),
                   dict(wgmma=0), dict(mma=4), dict(dot=False)):
        assert K.faults({**good, **change}), change


def test_roofline():
    c = M.ModelConfig(**M.PRESETS["llama2-7b"])
    table = {name: (flops, eager, fused) for name, flops, eager, fused in K.block_operations(c, 4096)}
    block = sum(flops for name, (flops, *_) in table.items() if "product" in name and name != "head product")
    forward = M.flops_per_token(c)
    assert block == 4096 * (forward["attention"] + forward["ffn"]) / c.num_layers
    assert table["attention"][0] == 4096 * forward["scores"] / c.num_layers
    assert table["head product"][0] == 4096 * forward["head"]
    assert all(fused <= eager for _, eager, fused in table.values())


def test_roofline_counts_what_operators_move():
    c = M.ModelConfig(context_length=32, d_model=512, num_heads=32)
    table, (H, heads) = {name: eager for name, _, eager, _ in K.block_operations(c, 256)}, (16, 64)
    shapes = {"RMSNorm": [(256, 512), (512,)], "SwiGLU": [(256, c.ffn_dim)] * 2, "RoPE": [(8, 32, heads, H)]}
    for case in K.cases():
        if case.name in shapes:
            inputs = [torch.randn(shape).bfloat16() for shape in shapes[case.name]]
            with K.count_eager_bytes() as eager:
                case.plain(*inputs)
            assert eager.read + eager.written == pytest.approx(table[case.name], rel=0.05), case.name


def test_benchmark_rates_and_floors(monkeypatch):
    """In a second each: fp8 does the FLOPs of bf16, and its floor is half of it."""
    cases = K.cases()
    monkeypatch.setattr(K, "cases", lambda *_, **__: cases)
    monkeypatch.setattr(K, "race", lambda functions, *_: dict.fromkeys(functions, (1.0, 0.0)))
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    bf16, fp8 = K.benchmark("cpu", only=["linear, TMA", "linear, fp8"])
    assert bf16["TFLOP/s"] == fp8["TFLOP/s"] == pytest.approx(2 * 64 * 384 * 384 / 1e12)
    assert bf16["floor"] == 2 * fp8["floor"] > 0
    rope = next(case for case in cases if case.name == "RoPE")
    inputs = rope.inputs()
    monkeypatch.setattr(K, "rope_table", None)             # not a part of what is timed
    rope.ours(*inputs)


def test_a_gpu_is_busy_while_its_work_is_launched(monkeypatch):
    """Else the time of a short kernel is that of its launch."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            self.record = lambda: done.append("clock")

        def elapsed_time(self, end):
            return 2.0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("busy"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))
    assert K.race({"f": lambda: done.append("f")}, "cuda", 2, 0)["f"][0] == 0.002
    assert done == ["busy", "clock", "f", "clock", "wait"] * 2


def test_race_times_work_that_is_done():
    times = K.race({"a": lambda: sum(range(1000)), "b": lambda: sum(range(100000))}, "cpu", 5)
    assert 0 < times["a"][0] < times["b"][0]
    with pytest.raises(ValueError, match="no clock for meta"):
        K.race({"a": lambda: None}, "meta")
    with pytest.raises(ValueError, match="before the work is done"):
        K.race({"a": lambda: torch.empty(1, device="meta")}, "cpu")


# --- 6. in the model ----------------------------------------------------------------------------------------

TINY = dict(vocab_size=100, context_length=20, d_model=64, num_layers=2, num_heads=4, init="glorot")


KNOBS = [dict(num_kv_heads=2, qk_norm=True), dict(window=9, tie_embeddings=True), dict(ffn="geglu", d_ff=100),
         dict(attn_softcap=5.0, norm="layernorm", position="learned"), dict(mtp=1, num_layers=1)]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_model_on_our_kernels(knobs):
    """Loss and every gradient; what a kernel does not cover falls back."""
    torch.manual_seed(1)
    model = M.Transformer(M.ModelConfig(**{**TINY, **knobs}))
    ids = torch.randint(0, 100, (2, 21))
    x, y = ids[:, :-1], ids[:, 1:]

    def step():
        model.zero_grad()
        ce, objective = M.training_loss(model, x, y, 0.01)
        objective.backward()
        return [ce.detach(), objective.detach()] + [p.grad for p in model.parameters()]
    plain = step()
    with K.in_model():
        ours = step()
        model.eval()
        assert model(x).shape == (2, 20, 100)              # logits, where someone wants them
        model.train()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(step(), plain))           # and all is as it was


def test_what_kernels_do_not_cover_falls_back():
    """Windows over positions that lie apart, float64, rows too wide for registers."""
    model = M.Transformer(M.ModelConfig(**{**TINY, "num_layers": 1, "window": 3})).eval()
    ids, apart = torch.randint(0, 100, (2, 9)), torch.arange(9) * torch.tensor([[1], [2]])
    wide, x = M.RMSNorm(8200), torch.randn(2, 8200)
    plain = model(ids, apart), wide(x)
    with K.in_model():
        torch.testing.assert_close((model(ids, apart), wide(x)), plain, rtol=1e-4, atol=1e-5)
    model.double().train()
    plain = M.training_loss(model, ids[:, 1:], ids[:, :-1])
    with K.in_model():
        assert M.training_loss(model, ids[:, 1:], ids[:, :-1]) == plain


ONE_GRAPH = f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from unittest.mock import patch
import model as M, kernels as K, torch, torch.utils._triton
torch.utils._triton.has_triton = lambda *_: True           # there is no GPU, and nothing runs
K.INTERPRETED, K.interpreter_knows_bf16 = True, lambda: True
from functorch.compile import default_partition
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table as table
def partition(graph, inputs, **options):
    calls = [n for n in graph.graph.nodes if "triton_kernel" in str(n.target)]
    print(*(table.get_kernel(n.kwargs["kernel_idx"]).fn.__name__ for n in calls), file=sys.stderr)
    sys.stderr.flush()
    import os
    os._exit(0)
net = M.Transformer(M.ModelConfig(**{{**{dict(vocab_size=100, context_length=32, d_model=64, num_layers=1,
                                             num_heads=4, init="glorot")!r}, "num_kv_heads": 2}})).train()
with K.compile_only(), K.in_model(), torch.autocast("cpu", torch.bfloat16):
    backend = aot_autograd(fw_compiler=None, partition_fn=partition)
    torch.compile(net, backend=backend, fullgraph=True, dynamic=False)(torch.zeros(2, 32, dtype=int))
"""


def test_torch_compile_takes_the_model_on_our_kernels_in_one_graph():
    """Traced forward and backward; compiling that further, and running it, needs a GPU (tests/gpu.py)."""
    run = subprocess.run([sys.executable, "-c", ONE_GRAPH], capture_output=True, text=True, timeout=600,
                         env={**os.environ, "TRITON_INTERPRET": "0"})
    assert run.returncode == 0, run.stderr[-3000:]
    assert sorted(set(run.stderr.split("\n")[-2].split())) == sorted(
        f"{name}_kernel" for name in ("flash", "flash_dkv", "flash_dq", "gate", "gate_backward", "rmsnorm",
                                      "rmsnorm_backward", "rope"))


def test_end_to_end_table(capsys):
    rows = K.end_to_end(M.ModelConfig(**TINY), 1, "cpu")
    assert [r[0] for r in rows] == ["plain PyTorch", "our kernels"] and float(rows[1][2]) < 1e-5
    assert abs(float(rows[0][1]) - float(rows[1][1])) < 1e-5


def test_profile(tmp_path, capsys):
    K.profile(M.ModelConfig(**TINY), 1, "cpu", str(tmp_path))
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"blocks.0", "blocks.1.mixer", "blocks.1.ffn", "head"} <= names
    assert "forward + backward + AdamW" in capsys.readouterr().out


# --- 7. the command line and bad input ----------------------------------------------------------------------

def test_docstring_commands_parse():
    commands = re.findall(r"^ *(?:Run +)?python kernels\.py([^#\n]*)", K.__doc__, re.M)
    assert len(commands) >= 4
    for words in commands:
        K.parse_args(shlex.split(words))


@pytest.mark.parametrize("words, says", [
    ("--nope", "unrecognized arguments"), ("--only nothing", "is no case"),
    ("--batch_size 0", "is out of range"), ("--compile_repor", "unrecognized"),
    ("--profile --end_to_end", "not allowed with")])
def test_bad_flags_are_one_line(words, says, capsys):
    with pytest.raises(SystemExit) as stop:
        K.parse_args(words.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and says in err and err.count("\n") == 1


@pytest.mark.parametrize("words, ignored", [
    ("--preset gpt2", ["preset"]), ("--compile_report --device cpu --only softmax", ["device"]),
    ("--profile --all --window 9", ["all"]), ("--end_to_end --batch_size 2 --qk_norm", []), ("", [])])
def test_flags_that_do_nothing_are_told(words, ignored, capsys):
    K.parse_args(words.split())
    assert re.findall(r"note: --(\w+) is ignored", capsys.readouterr().out) == ignored


def test_bad_values_are_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        K.main(["--profile", "--device", "nowhere"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


z = torch.zeros
BAD = {"older": (lambda: K.gelu(z(3, dtype=torch.int64)), "int64 is not supported"),
       "float64": (lambda: K.attention(*[z(1, 8, 16, dtype=torch.float64)] * 3), "float64 is not supported"),
       "devices": (lambda: K.swiglu(z(3), z(3, device="meta")), "move them to one device"),
       "shapes": (lambda: K.swiglu(z(3), z(4)), "give two alike"),
       "gain": (lambda: K.rms_norm(z(3, 4), z(3)), "as long as a row"),
       "wide": (lambda: K.rms_norm(z(1, 9000), z(9000)), "float32: 8192"),
       "residual": (lambda: K.add_rms_norm(z(3, 4), z(2, 4), z(4)), "give two alike"),
       "rows": (lambda: K.softmax(z(3, 0)), "one number or more"),
       "rope": (lambda: K.rope(z(1, 2, 3, 5), z(2, 2), z(2, 2)), "H even"),
       "rope table": (lambda: K.rope(z(2, 3, 1, 4), z(1, 3, 2), z(1, 3, 2)), "tables"),
       "targets": (lambda: K.cross_entropy(z(3, 4), z(3)), "targets in int64"),
       "reduction": (lambda: K.cross_entropy(z(3, 4), z(3).long(), reduction="max"), "choose mean, sum or"),
       "head dim": (lambda: K.attention(*[z(1, 8, 300)] * 3), "16 to 256"),
       "odd head dim": (lambda: K.attention(*[z(1, 8, 33)] * 3), "in steps of 8"),
       "heads": (lambda: K.attention(z(1, 3, 8, 16), z(1, 2, 8, 16), z(1, 2, 8, 16)), "N a multiple of K"),
       "window": (lambda: K.attention(*[z(1, 8, 16)] * 3, False, 4), "look back only"),
       "scales": (lambda: K.linear(*[z(8, 16).to(torch.float8_e4m3fn)] * 2), "both scales"),
       "scale": (lambda: K.linear(*[z(8, 16).to(torch.float8_e4m3fn)] * 2, z(8), z(1)), "one number a row"),
       "no scales": (lambda: K.linear(*[z(8, 16)] * 2, z(8), z(8)), "other types none"),
       "matmul": (lambda: K.matmul(z(3, 4), z(3, 4)), r"give \(M,K\) and \(K,N\)"),
       "linear": (lambda: K.linear(z(3, 5), z(8, 5)), "multiple of 16 bytes"),
       "bits": (lambda: K.quantize(z(3, 100)), "columns in 128s"),
       "low bit": (lambda: K.low_bit_linear(z(1, 128), *K.quantize(z(3, 256))), "quantize"),
       "experts": (lambda: K.grouped_linear(z(3, 4), z(2, 5, 4), torch.tensor([1, 3])), "int32"),
       "adamw": (lambda: K.adamw_(z(3), z(3), z(3), z(4), 1, 0.1), "of one length"),
       "adamw low": (lambda: K.adamw_(*[z(3)] * 4, 1, 0.1, low=z(6)[::2]), "contiguous"),
       "adamw step": (lambda: K.adamw_(*[z(3)] * 4, 0, 0.1), "steps from 1"),
       "fused": (lambda: K.linear_cross_entropy(z(3, 4), z(5, 6), z(3).long()), r"give w \(V, 4\)"),
       "elsewhere": (lambda: K.cross_entropy(z(3, 4), z(3, device="meta").long()), "move them to one device")}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, says = BAD[name]
    with pytest.raises(ValueError, match=says) as e:
        call()
    assert "\n" not in str(e.value)


def test_a_cpu_tensor_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(K, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        K.gelu(z(3))


@pytest.mark.parametrize("capability, says", [((7, 5), "older than sm_80"), ((9, 0), "set_device\\(1\\)")])
def test_a_gpu_that_cannot_be_used_is_refused(capability, says, monkeypatch):
    """Too old; or not the current one, on which triton would launch with the other's addresses."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    class OnGPU:
        device, dtype, shape = torch.device("cuda:1"), torch.float32, (3,)
    with pytest.raises(ValueError, match=says):
        K.check(OnGPU())


def test_without_triton(tmp_path):
    """macOS: one line that says what to use instead, and status 2."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('no triton')\n")
    run = subprocess.run([sys.executable, ROOT / "kernels.py"], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert run.returncode == 2 and "made for Linux" in run.stderr and run.stderr.count("\n") == 1


RUNNER = f"""import os, sys, time
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
import gpu, torch
torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None
torch.cuda.is_available, torch.cuda.get_device_name = lambda: True, lambda *_: "pretended"
gpu.__file__ = __file__
gpu.PARTS.clear()
@gpu.part(60, processes=2)
def some():
    yield "good", lambda: {{"ms": 1.5}}
    yield "wrong", lambda: {{"error": 3.0, "ok": False}}
    yield "raises", lambda: 1 / 0
    yield "dies", lambda: os._exit(7)
    yield "breaks", lambda: exec("raise RuntimeError('CUDA error: an illegal memory access')")
    yield "after", lambda: {{"ms": 2.5}}
    yield "then", lambda: {{"ms": 3.5}}
@gpu.part(20)
def slow():
    yield "hangs", lambda: time.sleep(600)
sys.exit(gpu.main())
"""


def run_gpu_runner(folder, *words):
    (folder / "run.py").write_text(RUNNER)
    run = subprocess.run([sys.executable, folder / "run.py", "--out", folder, *words], capture_output=True,
                         text=True)
    results = json.loads((folder / "gpu.json").read_text())["results"]
    return run, {r["check"]: r["status"] for r in results}


def test_the_gpu_runner_survives_its_checks(tmp_path):
    """One is wrong, one raises, one kills the process: the others are done, the report is whole."""
    run, status = run_gpu_runner(tmp_path, "--only", "some")
    assert run.returncode == 1, run.stderr
    assert status == {"good": "ok", "wrong": "WRONG", "raises": "FAILED", "dies": "FAILED", "breaks": "FAILED",
                      "after": "ok", "then": "ok"}
    assert "3 of 7 checks passed" in run.stdout and "| after | 2.5 |" in run.stdout


def test_the_gpu_runner_ends_what_hangs(tmp_path):
    run, _ = run_gpu_runner(tmp_path, "--only", "slow", "--minutes", "0.2")
    assert run.returncode == 1 and "the limit of this part" in run.stdout


def test_the_leaderboard_step_runs_small():
    sys.path.insert(0, str(ROOT / "tests"))
    import gpu
    result = gpu.full_step(M.ModelConfig(**{**TINY, "num_layers": 1}), 1, "cpu", torch.float32)
    assert result["ok"] and result["parameters"] == M.num_params(M.ModelConfig(**{**TINY, "num_layers": 1}))


def test_every_gpu_check_walks_on_a_cpu(tmp_path):
    """At tiny shapes: what is wrong in tests/gpu.py itself is found here."""
    run = subprocess.run([sys.executable, ROOT / "tests/gpu.py", "--dry", "--out", tmp_path], text=True,
                         capture_output=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    parts = {r["part"] for r in json.loads((tmp_path / "gpu.json").read_text())["results"]}
    assert parts == set(re.findall(r"^@part\(.*\)\ndef (\w+)", (ROOT / "tests/gpu.py").read_text(), re.M))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_checks_skip_without_one(tmp_path):
    run = subprocess.run([sys.executable, ROOT / "tests/gpu.py", "--out", tmp_path], capture_output=True,
                         text=True)
    assert run.returncode == 0 and run.stdout.startswith("skipped: no CUDA GPU")
    assert run.stdout.count("\n") == 1
