"""train.py - lecture 2: from text to a trained language model. The main job of the project.

What   Reads tokens, predicts each one from those before it, and moves the weights down the gradient of the
       loss until the budget (minutes, steps or tokens) is spent. With no arguments the text is the Python
       standard library of this machine.
Why    A language model is a compressor: -log2 p(text) bits are what an arithmetic coder needs to write the
       text down. So the score is bits per byte of files that training never saw, next to gzip, bzip2 and xz
       on the same files, and no choice of tokenizer can flatter it.

Equations
       loss           = mean over tokens of -ln p(token | before)
       bits per byte  = sum of losses / ln 2 / bytes
       AdamW          m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  w -= lr (m' / (sqrt(v') + eps) + decay w)
                      m' = m / (1 - b1^t);  v' = v / (1 - b2^t):  as if the means had not begun at 0
       SOAP           AdamW on QL^T g QR, the step turned back; QL, QR the eigenvectors of mean g g^T, g^T g
       Muon           m = mu m + g;  w -= lr (0.2 sqrt(max(rows, cols)) U V^T + decay w),  g + mu m = U S V^T
       schedule       a line up over the warm-up, then  cosine: half a cosine down  or  wsd: flat, then a line
       gradient noise B_noise = tr(covariance of one sequence's gradient) / |mean gradient|^2
       MFU            = FLOPs a token, forward and backward, x tokens/s / peak FLOP/s

Run    python train.py                                   # under 5 minutes on two cores
       python train.py --preset small --minutes 60       # the same text, a larger model
       python train.py --data DIR --preset gpt2          # your files: .txt, .jsonl(.gz), ... or token files
       python train.py --resume                          # go on after Ctrl-C, kill -9 or a power cut
       python train.py --ablate                          # what each part is worth: one table, one plot
       python train.py --bakeoff                         # the architectures at equal FLOPs: table and plot
       python train.py --tokenizer bytes                 # no tokenizer: 257 ids, four times the positions
       python train.py --sweep lr=0.01,0.02 --minutes 1  # any grid over any flags

You should see (two cores, CPU)
       step      0 | held out: loss 8.3178, 3.4051 bits/byte (first 121,097 tok)
       step    483 | loss  3.0790 | lr 0.00e+00 | gnorm   0.34 |   288.8 ms |     7,092 tok/s | mfu n/a | ...
       Held-out text, 121,097 tokens, 426,765 bytes
                                              loss, nats/token  bits/byte
         at the start                                   8.3178      3.405
         at the end                                     3.2646      1.336
         ln V for V = 4,096: knowing nothing            8.3178
         gzip -9                                                    1.858
         bzip2 -9                                                   1.599
         xz -9e                                                     1.572
         1.336 bits/byte: below every compressor

Outline  1 optimizers     2 schedules, clipping     3 batches: no token twice     4 evaluation
         5 resources      6 the loop                7 the report
         8 sweeps, ablations, bake-off              9 the command line

References  Loshchilov & Hutter 2019 (AdamW), Jordan et al. 2024 and Liu et al. 2025 (Muon), Vyas et al. 2024
            (SOAP), Yang et al. 2022 (muP), Loshchilov & Hutter 2017 (cosine), Hu et al. 2024 (WSD), Pascanu
            et al. 2013 (clipping), McCandlish et al. 2018 (gradient noise scale), Chen et al. 2016
            (activation checkpointing), Chowdhery et al. 2022 (MFU).
"""
import argparse
import bz2
import contextlib
import ctypes
import gzip
import itertools
import json
import lzma
import math
import os
import shlex
import signal
import statistics
import sys
import time
import zlib

import bpe
import model as M                                          # before torch: it sets how CPU threads wait

import numpy as np
import torch
import torch.nn.functional as F

# Shape letters: B sequences in a micro-batch, T context length, V vocabulary. Loss in nats; GB = 1e9 bytes.


# --- 1. optimizers ------------------------------------------------------------------------------------------
# The ladder: SGD follows the gradient; momentum averages it over time; AdaGrad and RMSProp divide each
# coordinate by the root of its own squared gradients (summed, or averaged); Adam does both and
# corrects their cold start; AdamW takes weight decay out of the gradient. Muon leaves coordinates and
# treats a matrix as a matrix.

class SGD(torch.optim.Optimizer):
    """m = momentum m + g;  w -= lr m.      One state a weight with momentum, none without."""
    def __init__(self, params, lr=1e-2, momentum=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group, p in weights_with_gradient(self):
            direction = p.grad
            if group["momentum"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                direction = m.mul_(group["momentum"]).add_(p.grad)
            p.sub_(direction, alpha=group["lr"])


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019).      Two states a weight.

    The decay pulls every weight by lr * decay * w, whatever its gradient. Together with lr it
    sets the size at which weights settle, and so their relative step; text read once
    cannot be overfitted, so that is not its purpose.
    """
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group, p in weights_with_gradient(self):
            adamw_update(p, self.state[p], group)


def adamw_update(p, state, group):
    """One weight. m and v start at zero, so early averages are too small by 1 - beta^t; t counts from 1."""
    if not state:
        state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
    state["t"] += 1
    t, (b1, b2) = state["t"], group["betas"]
    state["m"].lerp_(p.grad, 1 - b1)                       # m + (1-b1)(g - m)
    state["v"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
    p.mul_(1 - group["lr"] * group["weight_decay"])
    size = (state["v"] / (1 - b2**t)).sqrt_().add_(group["eps"])
    p.addcdiv_(state["m"], size, value=-group["lr"] / (1 - b1**t))


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix (Jordan et al. 2024) in groups with muon=True, else AdamW.

    A gradient matrix is dominated by a few directions. U V^T keeps the directions and gives all the same
    size, so that rare ones learn too. Its entries have RMS 1/sqrt(max(rows, cols)); times 0.2
    sqrt(max(rows, cols)) the step has RMS 0.2, about AdamW's (Liu et al. 2025), and both kinds of group live
    with one rate and one decay. Only for hidden matrices: the rows of an embedding or output matrix are
    separate things. One state a weight, not two.
    """
    def __init__(self, params, lr=1e-2, momentum=0.95, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        super().__init__(params, dict(lr=lr, momentum=momentum, betas=betas, eps=eps,
                                      weight_decay=weight_decay, muon=False))

    @torch.no_grad()
    def step(self):
        for group, p in weights_with_gradient(self):
            if not group["muon"]:
                adamw_update(p, self.state[p], group)
                continue
            mu, m = group["momentum"], self.state[p].setdefault("m", torch.zeros_like(p))
            m.mul_(mu).add_(p.grad)
            direction = orthogonalise(p.grad + mu * m)     # Nesterov: one step ahead of the average
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(direction, alpha=group["lr"] * 0.2 * math.sqrt(max(p.shape[-2:])))


def orthogonalise(g, steps=5):
    """g (rows, cols), or a stack of such, = U S V^T -> about U V^T, by matrix products alone (Newton-Schulz).

    One step x -> a x + b x x^T x + c (x x^T)^2 x changes each singular value s into a s + b s^3 + c s^5.
    These coefficients (Jordan et al. 2024) push fast instead of converging: after five steps, values
    that began between 0.01 and 1 lie in 0.7 .. 1.2, which trains as well as 1.   Cost:
    5 (4 r^2 n + 2 r^3) FLOPs, r the short side, n the long one.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if g.is_cuda else g.float()           # tensor cores; CPUs are slower in bf16
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x                                # so that x x^T is the small one
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)    # all singular values into 0..1
    for _ in range(steps):
        xx = x @ x.mT
        x = a * x + (b * xx + c * xx @ xx) @ x
    return (x.mT if tall else x).to(g.dtype)


class SOAP(torch.optim.Optimizer):
    """Adam in the eigenbasis of Shampoo (Vyas et al. 2024) in groups with soap=True, else AdamW.

    Adam divides coordinate by coordinate, so it depends on which coordinates the weights happen to have. The
    eigenvectors of mean g g^T and mean g^T g are the gradients' own: there the coordinates are least mixed.
    Turn the weights of a problem, and SOAP takes the same path, turned. 2 rc + 2 (r^2 + c^2) states a matrix
    of r x c, and four products each of r r c and r c c a step more; the basis follows every `every` steps.
    """
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, every=10):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, every=every,
                                      soap=False))

    @torch.no_grad()
    def step(self):
        for group, p in weights_with_gradient(self):
            if group["soap"]:
                soap_update(p, self.state[p], group)
            else:
                adamw_update(p, self.state[p], group)


def soap_update(p, state, group):
    """One matrix, or a stack of them. L and R average g g^T and g^T g; m is kept unturned, v turned. The
    first gradient only sets the basis: there it is diagonal, and Adam would divide the rounding errors beside
    the diagonal by their own size, and step along them."""
    def eigenvectors(a):
        return torch.linalg.eigh(a)[1].flip(-1)            # largest first: qr below begins on the left
    g, (b1, b2) = p.grad, group["betas"]
    outer = g @ g.mT, g.mT @ g
    if not state:
        state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p), L=outer[0], R=outer[1],
                     QL=eigenvectors(outer[0]), QR=eigenvectors(outer[1]))
        return
    state["t"] += 1
    t, QL, QR = state["t"], state["QL"], state["QR"]
    state["m"].lerp_(g, 1 - b1)
    turned = QL.mT @ g @ QR
    state["v"].mul_(b2).addcmul_(turned, turned, value=1 - b2)
    size = (state["v"] / (1 - b2**t)).sqrt_().add_(group["eps"])
    p.mul_(1 - group["lr"] * group["weight_decay"])
    p.sub_(QL @ (QL.mT @ state["m"] @ QR / size) @ QR.mT, alpha=group["lr"] / (1 - b1**t))
    for side, new in zip("LR", outer):
        state[side].lerp_(new, 1 - b2)
        if t % group["every"] == 0:       # one step of the power method: the basis moves little between steps
            state["Q" + side] = torch.linalg.qr(state[side] @ state["Q" + side])[0]


def weights_with_gradient(optimizer):
    """(group, p) for every parameter that took part in the loss."""
    return ((g, p) for g in optimizer.param_groups for p in g["params"] if p.grad is not None)


def make_optimizer(model, s):
    """Four parameter groups; `scale` multiplies the schedule's rate. Only hidden matrices decay: a gain
    near 1, or an embedding row that is rarely visited, should not be pulled to zero. Embeddings start at
    size 1 and meet their token rarely, so they take a higher rate: 1, 10 and 30 times that of the matrices
    gave 1.779, 1.735 and 1.715 bits per byte after 200,000 tokens (--sweep embedding_lr=1,10,30).

    --mup_base W: rates found at width W serve any width m W whose heads keep their size (Yang et al. 2022). A
    step of Adam changes every weight by about lr, and all d_in changes of a row point one way: what they
    add to an output grows with d_in, hence lr / m. Muon's step is m^(1/2) too large by its own scale."""
    if s.mup_base and (s.optimizer == "sgd" or model.config.tie_embeddings):
        raise ValueError(f"--mup_base {s.mup_base} is for muon, adamw and soap with an output matrix of its "
                         f"own: try --optimizer adamw --no-tie_embeddings")
    m = model.config.d_model / s.mup_base if s.mup_base else 1.0
    matrix = 1 / m if s.optimizer != "muon" else m ** -0.5
    hidden, head, embeddings, vectors = [], [], [], []
    for name, p in model.named_parameters():
        kind = (vectors if p.dim() < 2 else hidden if name.startswith(("blocks.", "mtp.")) else
                head if name.startswith("head.") else embeddings)
        kind.append(p)
    groups = [dict(params=hidden, scale=matrix, weight_decay=s.weight_decay / matrix),  # the pull: lr decay
              dict(params=head, scale=s.head_lr / m, weight_decay=0.0),
              dict(params=embeddings, scale=s.embedding_lr, weight_decay=0.0),
              dict(params=vectors, scale=1.0, weight_decay=0.0)]
    groups = [g for g in groups if g["params"]]
    if s.optimizer == "sgd":
        return SGD([{k: g[k] for k in ("params", "scale")} for g in groups], s.lr, s.beta1)
    if s.optimizer == "adamw":
        return AdamW(groups, s.lr, (s.beta1, s.beta2))
    groups[0][s.optimizer] = True                          # hidden matrices
    if s.optimizer == "soap":
        return SOAP(groups, s.lr, (s.beta1, s.beta2))
    return Muon(groups, s.lr, s.momentum, (s.beta1, s.beta2))


# --- 2. schedules and clipping ------------------------------------------------------------------------------
# A schedule maps progress 0..1 to a share of the peak rate. The last step is taken at progress 1 (with a time
# budget about there), so with final 0 it changes nothing.

def cosine(progress, warmup=0.02, final=0.1):
    """A line up over `warmup`, then half a cosine down to `final`, reached exactly at 1. Its shape depends on
    the end: a run cannot be prolonged (Loshchilov & Hutter 2017)."""
    if progress < warmup:
        return progress / warmup
    t = min(1.0, (progress - warmup) / (1 - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * t))


def wsd(progress, warmup=0.02, final=0.0, decay=0.4):
    """Warm-up, stable, decay (Hu et al. 2024): flat, then a line to `final` over the last `decay` of the run.
    Any checkpoint of the flat part can be decayed or trained further: the end is chosen late."""
    if progress < warmup:
        return progress / warmup
    return 1.0 if progress < 1 - decay else final + (1 - final) * max(0.0, 1 - progress) / decay


def constant(progress, warmup=0.02, final=1.0):
    return min(1.0, progress / warmup) if warmup else 1.0


SCHEDULES = {"wsd": wsd, "cosine": cosine, "constant": constant}


@torch.no_grad()
def clip_gradients(params, max_norm, eps=1e-6):
    """Scale all gradients in place so that their joint l2 norm is at most max_norm; returns the norm before.
    One norm over everything: clipping each tensor alone would turn the step (Pascanu et al. 2013)."""
    grads = [p.grad for p in params if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    scale = (max_norm / (norm + eps)).clamp(max=1.0)
    for g in grads:
        g.mul_(scale)  # times 1.0 rather than a branch: a GPU need not wait
    return norm


def noise_scale(small_sq, big_sq, b_small, b_big):
    """B_noise = tr(S)/|G|^2 from squared gradient norms at two batch sizes (McCandlish et al. 2018, app. A).

    E|g_B|^2 = |G|^2 + tr(S)/B holds at both sizes: two equations, two unknowns, both unbiased. Their
    ratio is not, so average the squared norms over many steps first. A batch far below B_noise
    wastes no data; one far above it wastes compute.
    """
    signal_sq = (b_big * big_sq - b_small * small_sq) / (b_big - b_small)
    noise = (small_sq - big_sq) / (1 / b_small - 1 / b_big)
    return noise / signal_sq if signal_sq > 0 else math.inf


# --- 3. batches: no token twice an epoch ------------------------------------------------------------------

class Batches:
    """Token file -> (x, y) of shape (B,T), y one token ahead of x. In an epoch no token is a
    target twice, and all but 2T at most are one.

    The file is cut into windows of T tokens, visited in an order that depends on (seed, epoch) alone; every
    epoch starts the cut at another offset. So the whole reading state is one integer, the sequences read so
    far, and to resume is to read on. Memory: 8 bytes a window; the tokens stay on disk (memmap).
    """
    def __init__(self, tokens, context_length, seed=0):
        self.tokens, self.T, self.seed, self.epoch = tokens, context_length, seed, -1
        self.windows = (len(tokens) - 1) // context_length - 1  # one less, so that every offset fits
        if self.windows < 1:
            raise ValueError(f"{len(tokens):,} training tokens are fewer than two contexts of "
                             f"{context_length}: give more text, or "
                             f"--context_length {max(1, (len(tokens) - 1) // 2)}")

    def __call__(self, first, batch_size, device="cpu"):
        """Sequences number first .. first + batch_size - 1 of the endless stream of epochs."""
        rows = [self.window(i) for i in range(first, first + batch_size)]
        batch = torch.from_numpy(np.stack(rows).astype(np.int64))          # (B,T+1); uint16 cannot index
        if "cuda" in device:
            batch = batch.pin_memory()         # the copy waits its turn on the GPU, and the host for nothing
        batch = batch.to(device, non_blocking=True)
        return batch[:, :-1], batch[:, 1:]

    def window(self, i):
        epoch, i = divmod(i, self.windows)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.epoch, self.offset, self.order = epoch, rng.integers(self.T), rng.permutation(self.windows)
        start = self.offset + self.order[i] * self.T
        return self.tokens[start:start + self.T + 1]


# --- 4. evaluation ------------------------------------------------------------------------------------------

@torch.inference_mode()
def evaluate(model, tokens, eot, device="cpu", autocast=contextlib.nullcontext, batch_size=16,
             max_tokens=None):
    """(nats summed over `tokens`, number of tokens): the length of the file in the model's code.

    Windows of T tokens overlap by half and score their second half: each token is predicted from at least T/2
    tokens before it, where there are so many. An end-of-text token stands before the first: none goes free.
    """
    T, was_training = model.config.context_length, model.training
    tokens = np.concatenate(([eot], tokens[:max_tokens])).astype(np.int64)
    n, half, total = len(tokens) - 1, max(1, T // 2), 0.0
    width = min(T, n)
    # The window that starts at s scores targets s + T - half .. s + T - 1; the first scores all of its own.
    starts = [0, *range(half, n - T + half, half)] if n > T else [0]
    B = min(batch_size, len(starts))
    model.eval()
    for i in range(0, len(starts), B):
        rows = starts[i:i + B]
        first = np.array(rows + rows[-1:] * (B - len(rows)))[:, None]      # one shape, compiled once
        index = first + np.arange(width + 1)               # (B,T+1), the last window may run past the end
        batch = torch.from_numpy(tokens[np.minimum(index, n)]).to(device)
        scored = torch.from_numpy((index[:, 1:] <= n) & ((np.arange(width) >= T - half) | (first == 0)))
        scored[len(rows):] = False                         # what fills the last batch up
        with autocast():
            logits = model(batch[:, :-1])
        nats = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")
        total += nats.cpu().double()[scored.flatten()].sum().item()        # on the CPU: MPS has no float64
    model.train(was_training)
    return total, n


def bits_per_byte(nats, num_bytes):
    return nats / math.log(2) / max(1, num_bytes)          # the first --eval_tokens may be all end of text


def token_bytes(tokenizer):
    """(V,) UTF-8 bytes of each id; 0 for special tokens, which are no part of the text."""
    special = set(tokenizer.special_tokens.values())
    return np.array([0 if i in special else len(tokenizer.vocab.get(i, b""))
                     for i in range(tokenizer.vocab_size)])


# --- 5. resources: what a run will cost ---------------------------------------------------------------------

# Dense tensor-core FLOP/s (bf16, tf32) from NVIDIA's data sheets; the longest name that fits counts.
PEAK_FLOPS = {"A100": (312e12, 156e12), "H100": (989.5e12, 494.7e12), "H100 PCIe": (756e12, 378e12),
              "H100 NVL": (835e12, 417.5e12), "H200": (989.5e12, 494.7e12), "H200 NVL": (835e12, 417.5e12),
              "L4": (121e12, 60e12), "L40S": (362e12, 183e12), "A10": (125e12, 62.5e12),
              "B200": (2250e12, 1100e12)}


def peak_flops(device, dtype):
    """FLOP/s of this device, or None: a wrong constant is worse than none."""
    if "cuda" not in device:
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    fits = [name for name in PEAK_FLOPS if set(name.split()) <= set(words) and "MIG" not in words]   # a slice
    return PEAK_FLOPS[max(fits, key=len)][dtype != "bf16"] if fits else None


def matmul_flops(device, dtype="fp32", repeats=7):
    """Measured FLOP/s of one product: the time estimate stands on it. A GPU needs a large one to be busy."""
    n, kind = 8192 if "cuda" in device else 768, torch.bfloat16 if dtype == "bf16" else torch.float32
    a, seconds = torch.ones(n, n, device=device, dtype=kind), []       # not randn: it would move the seed
    for _ in range(repeats):
        start = time.perf_counter()
        (a @ a)[0, 0].item()                               # .item() waits for a GPU to finish
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds)


def memory_plan(c, s):
    """{what: bytes} at the peak of a step: after the forward pass, when the logits' gradient appears."""
    parts, n = M.count_params(c), M.num_params(c)
    hidden = parts["attention"] + parts["ffn"] + parts.get("mtp", 0)
    # Muon keeps one state for these, AdamW two for all, SOAP six if they are square and more if oblong.
    states = {"sgd": n, "adamw": 2 * n, "muon": 2 * n - hidden, "soap": 2 * n + 4 * hidden}[s.optimizer]
    kept = M.activation_bytes(c, s.micro_batch or s.batch_size, checkpoint_blocks=s.checkpoint_blocks)
    return {"weights": 4 * n, "gradients": 4 * n, "optimizer": 4 * states, "activations": sum(kept.values()),
            "gradient of logits": kept["logits"]}


def describe(c, s, device, dtype, train_tokens, tokenizer):
    """Print everything that can be known before step 0; returns the memory plan."""
    micro, batch = s.micro_batch or s.batch_size, s.batch_size * c.context_length
    flops, plan, rate = M.train_flops(c, 1), memory_plan(c, s), matmul_flops(device, dtype)
    expected = 0.5 * rate / flops                          # tokens/s, if half of the product's speed remains
    steps = total_steps(s, c)
    tokens = steps * batch if steps else s.minutes * 60 * expected
    print(f"config   {json.dumps(M.asdict(c))}")
    print(f"device   {device}, {dtype}, {torch.get_num_threads()} CPU threads, seed {s.seed}; "
          f"a matrix product runs at {rate / 1e9:,.0f} GFLOP/s")
    print(f"model    {M.num_params(c):,} parameters, {M.num_params(c, False):,} without embeddings; "
          f"{flops / 1e6:,.1f} MFLOPs a training token")
    print(f"batch    {batch:,} tok = {micro} seq x {c.context_length} x {s.batch_size // micro} "
          f"accumulated;  data {train_tokens:,} tok, vocabulary {tokenizer.vocab_size:,}")
    print(f"memory   {sum(plan.values()) / 1e9:.2f} GB predicted (fp32): "
          + ", ".join(f"{k} {v / 1e9:.2f}" for k, v in plan.items()))
    print(f"budget   {f'{steps:,} steps' if steps else f'{s.minutes:g} min'}: about {tokens / 1e6:,.1f}M "
          f"tok, {tokens / train_tokens:.2f} epochs, {tokens * flops / 1e12:,.0f} TFLOPs, "
          f"{tokens / expected / 60:.1f} min at half of the product's speed")
    return plan


# --- 6. the loop --------------------------------------------------------------------------------------------

class Stop:
    """SIGINT and SIGTERM ask the loop to save and leave after this step; a second SIGINT leaves at once."""
    asked = None                                           # the number of the signal

    def __enter__(self):
        self.before = {n: signal.signal(n, self.ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number

    def __exit__(self, *_):
        for n, handler in self.before.items():
            signal.signal(n, handler)


def total_steps(s, c):
    """Steps of the budget, or 0 when it is a time."""
    return s.steps or math.ceil(s.tokens / (s.batch_size * c.context_length))


class Run:
    """One training run: model, optimizer, reading position, clock. All of it goes through the checkpoint."""
    # What moves besides weights, optimizer and step.
    POSITION = ("sequences", "elapsed", "bad_steps", "first_val", "noise")

    def __init__(self, s, tokenizer, train_tokens, val_tokens, state=None):
        self.s, self.tokenizer, self.val = s, tokenizer, val_tokens
        self.device = M.pick_device(s.device)
        if self.device.startswith("cuda:"):
            torch.cuda.set_device(self.device)             # random states and memory counts are this one's
        self.dtype = s.dtype
        if s.dtype == "auto":                              # a CPU without AVX-512 is 7 times slower in bf16
            able = "cuda" in self.device and torch.cuda.is_bf16_supported(including_emulation=False)
            self.dtype = "bf16" if able else "fp32"
        torch.set_float32_matmul_precision("high")         # what stays fp32 may use TF32 on a GPU
        torch.manual_seed(s.seed)
        self.config = M.model_config(s, vocab_size=tokenizer.vocab_size)
        self.model = M.Transformer(self.config).to(self.device)
        self.model.checkpoint_blocks = s.checkpoint_blocks
        self.optimizer = make_optimizer(self.model, s)
        self.micro = s.micro_batch or s.batch_size
        self.batches = Batches(train_tokens, self.config.context_length, s.seed)
        self.token_bytes = token_bytes(tokenizer)
        self.flops = M.train_flops(self.config, 1)         # a token, forward and backward
        self.steps = total_steps(s, self.config)
        self.step, self.sequences, self.elapsed, self.bad_steps, self.first_val = 0, 0, 0.0, 0, None
        self.noise = [0.0, 0.0]                            # mean |g|^2 of one micro-batch, and of the batch
        if state:
            try:
                self.restore(state)
            except (LookupError, TypeError, AttributeError) as e:          # another script's, or damaged
                raise ValueError(f"the checkpoint holds no training run to resume ({e!r}): load it with "
                                 f"model.load_model, or train afresh without --resume") from None
        self.forward = self.model
        if s.compile:                                      # now: the first step's minute would be counted
            self.forward = torch.compile(self.model, dynamic=False)
            with torch.random.fork_rng([self.device] if "cuda" in self.device else []):
                self.gradients()
            self.optimizer.zero_grad(set_to_none=True)

    def save(self, path):
        rng = {"cpu": torch.get_rng_state()} | (
            {"cuda": torch.cuda.get_rng_state()} if "cuda" in self.device else {})
        M.save_checkpoint(path, self.model, self.optimizer, self.step, settings=vars(self.s), rng=rng,
                          tokenizer=self.tokenizer.hash(), **{k: getattr(self, k) for k in self.POSITION})

    def restore(self, state):
        if state["tokenizer"] != self.tokenizer.hash():
            raise ValueError(f"the checkpoint was trained with tokenizer {state['tokenizer']}, "
                             f"the token files hold {self.tokenizer.hash()}: give the --data of that run, "
                             f"or train afresh without --resume")
        M.load_weights(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"]["cpu"].cpu())
        if "cuda" in state["rng"] and "cuda" in self.device:
            torch.cuda.set_rng_state(state["rng"]["cuda"].cpu())
        self.step = state["step"]
        for k in self.POSITION:
            setattr(self, k, state[k])

    @property
    def tokens(self):
        return self.sequences * self.config.context_length

    def progress(self, ahead=0):
        """0 at the start, 1 when the budget is spent; `ahead` steps from now."""
        if self.steps:
            return min(1.0, (self.step + ahead) / self.steps)
        budget = 60 * self.s.minutes                       # before the first step: guess a thousandth of it
        step_seconds = self.elapsed / self.step if self.step else budget / 1000
        return min(1.0, (self.elapsed + ahead * step_seconds) / budget)

    def autocast(self):
        """bf16 products with fp32 weights, sums and softmax: bf16 keeps fp32's range, so no loss scaling."""
        kind = self.device.split(":")[0]
        return torch.autocast(kind, torch.bfloat16) if self.dtype == "bf16" else contextlib.nullcontext()

    def gradients(self):
        """Forward and backward over one batch, in micro-batches; leaves the mean gradient in .grad,
        returns the mean loss. A micro-batch's loss is the mean over its own tokens; divided by the number of
        micro-batches, they add up to the batch's."""
        parts, total = self.s.batch_size // self.micro, 0.0
        for i in range(parts):
            x, y = self.batches(self.sequences + i * self.micro, self.micro, self.device)
            with self.autocast():
                ce, objective = M.training_loss(self.forward, x, y, self.s.z_loss)
            (objective / parts).backward()
            total = total + ce.detach() / parts
            if self.s.noise_scale and i == 0:              # |gradient of the first micro-batch alone|^2
                grads = [p.grad for _, p in weights_with_gradient(self.optimizer)]
                self.small_sq = parts**2 * sum(g.square().sum().item() for g in grads)
        return total

    def train_step(self):
        """One optimizer step -> the log line's fields. A non-finite loss or gradient changes no weight."""
        s, start = self.s, time.perf_counter()
        lr = s.lr * SCHEDULES[s.schedule](self.progress(ahead=1), s.warmup, s.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        loss = self.gradients()
        norm = clip_gradients(self.model.parameters(), s.clip or math.inf)
        loss, norm = loss.item(), norm.item()              # waits for the GPU
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.optimizer.step()
            self.model.balance_experts()                   # only where --balance bias asks for it
        self.optimizer.zero_grad(set_to_none=True)
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if s.noise_scale and finite:                       # running means, over the last 100 steps or so
            weight = 1 / min(self.step + 1, 100)
            self.noise = [old + weight * (new - old)
                          for old, new in zip(self.noise, (self.small_sq, norm**2))]
        self.step, self.sequences = self.step + 1, self.sequences + s.batch_size
        seconds = time.perf_counter() - start
        self.elapsed += seconds
        tok_s, peak = s.batch_size * self.config.context_length / seconds, peak_flops(self.device, self.dtype)
        fields = dict(step=self.step, tokens=self.tokens, seconds=round(self.elapsed, 3), loss=loss, lr=lr,
                      gnorm=norm, step_ms=1000 * seconds, tok_s=tok_s,
                      mfu=self.flops * tok_s / peak if peak else None)
        if self.config.capacity_factor:                    # visits that found their expert full, worst layer
            fields["dropped"] = max(float(m.dropped) for m in self.model.modules() if isinstance(m, M.MoE))
        return fields

    def validate(self, max_tokens):
        """{val_loss: nats a token, val_bpb: bits a byte} on the first max_tokens held-out tokens."""
        nats, n = evaluate(self.forward, self.val, self.tokenizer.eot_id, self.device, self.autocast,
                           self.micro, max_tokens)
        return dict(val_loss=nats / n, val_bpb=bits_per_byte(nats, int(self.token_bytes[self.val[:n]].sum())))


@contextlib.contextmanager
def saved_on_error(run, path):
    """A full disk under the log, or a closed pipe behind stdout, does not cost the weights."""
    try:
        yield
    except OSError:
        run.save(path)
        raise


def train(s, tokenizer, train_tokens, val_tokens, state=None, quiet=False):
    """The whole run -> {run, val_loss, val_bpb, checkpoint, log, plan}. Each step is a line of out/log.jsonl.
    Raises FloatingPointError after max_bad_steps, SystemExit after a signal; both leave a checkpoint."""
    run = Run(s, tokenizer, train_tokens, val_tokens, state)
    log_path, checkpoint = os.path.join(s.out, "log.jsonl"), os.path.join(s.out, "checkpoint.pt")
    plan = None if quiet else describe(run.config, s, run.device, run.dtype, len(train_tokens), tokenizer)
    say = (lambda line: None) if quiet else (lambda line: print(line, flush=True))
    trim_log(log_path, run.step if state else -1, run.progress() == 1)
    guard = contextlib.nullcontext() if quiet else saved_on_error(run, checkpoint)
    with guard, open(log_path, "a") as log, Stop() as stop:
        def record(kind, fields):
            log.write(json.dumps(dict(kind=kind, **fields)) + "\n")
            log.flush()

        def evaluation(max_tokens):
            start, fields = time.perf_counter(), run.validate(max_tokens)
            run.elapsed += time.perf_counter() - start if 0 < run.progress() < 1 else 0    # inside the budget
            scored = min(max_tokens, len(val_tokens))
            record("val", dict(step=run.step, tokens=run.tokens, seconds=round(run.elapsed, 3), scored=scored,
                               **fields))
            say(f"step {run.step:>6} | held out: loss {fields['val_loss']:.4f}, {fields['val_bpb']:.4f} "
                f"bits/byte (first {scored:,} tok)")
            return fields

        def both_evaluations():
            """Of what the curve is drawn from, and of all: another text is another number of bits."""
            if s.eval_tokens < min(s.val_tokens, len(val_tokens)):
                evaluation(s.eval_tokens)
            return evaluation(s.val_tokens)

        if run.first_val is None:
            run.first_val = both_evaluations()
        run.model.train()
        saved, printed, evals = time.perf_counter(), 0.0, math.floor(run.progress() * s.evals)
        while run.progress() < 1 and not stop.asked:
            fields = run.train_step()
            record("train", fields)
            now, done = time.perf_counter(), run.progress()
            if now - printed > s.log_seconds or done == 1:
                printed = now
                say(log_line(fields, done, run))
            if run.bad_steps >= s.max_bad_steps:
                run.save(checkpoint)
                raise FloatingPointError(f"{run.bad_steps} steps in a row had a non-finite loss or gradient, "
                                         f"the last at step {run.step}; {checkpoint} holds the weights of "
                                         f"the last good step. Try --lr {s.lr / 3:g}, "
                                         f"--clip {s.clip / 2 or 1:g}"
                                         f"{'' if run.config.qk_norm else ', --qk_norm'} or --dtype fp32")
            if math.floor(done * s.evals) > evals and done < 1:
                evals = math.floor(done * s.evals)
                evaluation(s.eval_tokens)
            if not quiet and now - saved > 60 * s.save_minutes:
                saved = now
                run.save(checkpoint)
        if stop.asked and quiet:
            print("\nstopped: the same command keeps the finished runs and goes on", file=sys.stderr)
            raise SystemExit(128 + stop.asked)
        if stop.asked:
            run.save(checkpoint)
            print(f"\n{signal.Signals(stop.asked).name}: saved {checkpoint} at step {run.step}. "
                  f"Go on with:  python train.py --resume"
                  f"{'' if s.out == 'out' else ' --out ' + shlex.quote(s.out)}", file=sys.stderr)
            raise SystemExit(128 + stop.asked)
        if not quiet:
            run.save(checkpoint)
        final = both_evaluations()
    return dict(run=run, plan=plan, checkpoint=checkpoint, log=log_path, **final)


def log_line(f, done, run):
    """One fixed-width line; log.jsonl has every step, the screen one every log_seconds."""
    left = divmod(round(run.elapsed * (1 - done) / done), 60)
    mfu = f"mfu {f['mfu']:.1%}" if f["mfu"] else "mfu n/a"
    line = (f"step {f['step']:>6}{f'/{run.steps}' if run.steps else ''} | loss {f['loss']:7.4f} | "
            f"lr {f['lr']:.2e} | gnorm {f['gnorm']:6.2f} | {f['step_ms']:7.1f} ms | "
            f"{f['tok_s']:>9,.0f} tok/s | {mfu} | {done:4.0%}, {left[0]}:{left[1]:02} left")
    if run.s.noise_scale:
        line += f" | noise scale {noise_scale(*run.noise, run.micro, run.s.batch_size):,.0f} seq"
    if "dropped" in f:
        line += f" | dropped {f['dropped']:.1%}"
    return line + (f" | SKIPPED, not finite ({run.bad_steps} in a row)" if run.bad_steps else "")


def trim_log(path, step, finished=False):
    """A run that resumes at `step` repeats what came after: drop those records, so that the log has
    each step once; a finished run repeats its last evaluation. A line cut by a kill goes too. Step -1,
    a new run, starts a new log."""
    kept = []
    if step >= 0 and os.path.exists(path):
        with open(path) as f:
            for line in f:
                with contextlib.suppress(ValueError, KeyError):
                    r = json.loads(line)
                    if r["step"] < step or r["step"] == step and not (finished and r["kind"] == "val"):
                        kept.append(line)
    bpe.write_atomic(path, "".join(kept).encode())         # a kill here loses nothing


# --- 7. the report ------------------------------------------------------------------------------------------

def compressors(data, seen=b""):
    """{name: bits per byte} of gzip, bzip2 and xz at their strongest, on the same held-out bytes as one
    stream. With `seen`, also xz that has read the training text (of a long one the beginning, as much as xz
    remembers): what it adds for `data` after `seen`."""
    def xz(b):
        return len(lzma.compress(b, preset=9 | lzma.PRESET_EXTREME))
    sizes = {"gzip -9": len(gzip.compress(data, 9)), "bzip2 -9": len(bz2.compress(data, 9)),
             "xz -9e": xz(data)}
    if seen:
        sizes["xz -9e, having read the training text"] = xz(seen + data) - xz(seen)
    return {name: 8 * n / max(1, len(data)) for name, n in sizes.items()}


def peak_memory(device):
    """Bytes: the most that this process had at one time, or its tensors on the GPU."""
    if "cuda" in device:
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:                                    # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def report(s, result, tokenizer, train_tokens, val_tokens):
    """The closing table, the plot and one sample."""
    run, held_out, first = result["run"], val_tokens[:s.val_tokens], result["run"].first_val
    if not math.isfinite(result["val_loss"]):
        raise FloatingPointError(f"the held-out loss is {result['val_loss']}: the run diverged. Try "
                                 f"--lr {s.lr / 3:g}")

    def text(ids):
        return tokenizer.decode_bytes(ids[ids != tokenizer.eot_id])
    long_run = run.elapsed > 600                           # reading 12 MB takes xz half a minute, twice
    others = compressors(text(held_out), text(train_tokens[:20_000_000]) if long_run else b"")
    rows = [["at the start", f"{first['val_loss']:.4f}", f"{first['val_bpb']:.3f}"],
            ["at the end", f"{result['val_loss']:.4f}", f"{result['val_bpb']:.3f}"],
            [f"ln V for V = {tokenizer.vocab_size:,}: knowing nothing",
             f"{math.log(tokenizer.vocab_size):.4f}", ""],
            *[[name, "", f"{bpb:.3f}"] for name, bpb in others.items()]]
    M.table(f"Held-out text, {len(held_out):,} tokens, {run.token_bytes[held_out].sum():,} bytes",
            ["", "loss, nats/token", "bits/byte"], rows)
    better = [name for name, bpb in others.items() if bpb <= result["val_bpb"]]
    print(f"  {result['val_bpb']:.3f} bits/byte: " + (
        f"not yet below {', '.join(better)}; train longer: --minutes {max(1, run.elapsed / 30):.0f}"
        if better else "below every compressor"))
    seconds = max(run.elapsed, 1e-9)
    print(f"  {run.tokens:,} tokens ({run.tokens / len(train_tokens):.2f} epochs) in {run.elapsed:.0f} s: "
          f"{run.tokens / seconds:,.0f} tok/s, {run.flops * run.tokens / seconds / 1e9:,.0f} GFLOP/s; memory "
          f"{sum(result['plan'].values()) / 1e9:.2f} GB predicted, "
          f"process peak {peak_memory(run.device) / 1e9:.2f} GB")
    plot(os.path.join(s.out, "loss.png"), result["log"], run, others)
    ids = M.generate(run.model, [tokenizer.eot_id, *tokenizer.encode(s.prompt, allowed_special=())],
                     s.sample_tokens, temperature=0.8, top_p=0.95, stop=(tokenizer.eot_id,),
                     generator=torch.Generator().manual_seed(s.seed))
    print(f"\nSample (temperature 0.8, top_p 0.95) after the prompt {s.prompt!r}:\n\n"
          f"{s.prompt}{tokenizer.decode(ids)}\n")
    print(f"saved {result['checkpoint']}, {result['log']}")


@contextlib.contextmanager
def figure(path, **labels):
    """Axes to draw on, or None without matplotlib; saved when the block ends."""
    plt = M.pyplot()
    if plt is None:
        yield None
        return
    fig, ax = plt.subplots(figsize=(9, 5))
    yield ax
    ax.set(**labels)
    if ax.get_legend_handles_labels()[1] and not ax.get_legend():
        ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)
    print(f"saved {path}")


def held_out_curve(records):
    """All evaluations, the last on all tokens; and those on the same tokens as the one before it."""
    val = [r for r in records if r["kind"] == "val"]
    return val, [r for r in val if r.get("scored") == val[-2:][0].get("scored")]


def plot(path, log_path, run, others):
    """Bits per byte against tokens read: training text (smoothed), held-out text, compressors as lines."""
    with open(log_path) as f:
        records = [json.loads(line) for line in f]
    scale = run.first_val["val_bpb"] / run.first_val["val_loss"]  # nats a token -> bits a byte, on this text
    steps = [r for r in records if r["kind"] == "train" and math.isfinite(r["loss"])]
    width = max(1, len(steps) // 50)
    smooth = [scale * statistics.fmean(r["loss"] for r in steps[max(0, i - width):i + 1])
              for i in range(len(steps))]
    val, curve = held_out_curve(records)
    with figure(path, xlabel="million tokens read", ylabel="bits per byte",
                ylim=(min([*others.values(), val[-1]["val_bpb"]]) - 0.2, 4)) as ax:
        if ax:
            ax.plot([r["tokens"] / 1e6 for r in steps], smooth, lw=1, label="model, training text")
            ax.plot([r["tokens"] / 1e6 for r in curve], [r["val_bpb"] for r in curve], "o-", ms=4,
                    label="model, the beginning of the held-out text")
            ax.plot([val[-1]["tokens"] / 1e6], [val[-1]["val_bpb"]], "k*", ms=9,
                    label=f"model, all held-out text: {val[-1]['val_bpb']:.2f}")
            for i, (name, bpb) in enumerate(others.items()):
                ax.axhline(bpb, ls="--", lw=1, color=f"C{i + 2}", label=f"{name}: {bpb:.2f}")


# --- 8. many runs: sweeps, ablations, the bake-off ----------------------------------------------------------

def run_many(name, variants, seeds, s, data):
    """[(label, {flag: value})] -> {label: [one record a seed]}. Every finished run is a line of
    out/NAME/results.jsonl; a second call with the same settings reads it there: delete that file after you
    edit the code."""
    folder = os.path.join(s.out, name)
    os.makedirs(folder, exist_ok=True)
    path, done = os.path.join(folder, "results.jsonl"), {}
    if os.path.exists(path):
        with open(path) as f:
            for line in f:
                with contextlib.suppress(ValueError):      # an empty line, or one cut by a kill
                    record = json.loads(line)
                    done[record["key"]] = record
    jobs = [(label, change, seed) for seed in seeds for label, change in variants]
    results, start, fresh = {}, time.perf_counter(), 0
    for i, (label, change, seed) in enumerate(jobs):
        changed = argparse.Namespace(**{**vars(s), "seed": seed, **change, "ablate": False, "bakeoff": False,
                                        "sweep": None})
        settled = {k: v for k, v in vars(changed).items() if k not in ("out", "resume")}
        key = json.dumps(dict(settled, tokenizer_hash=data[0].hash()), sort_keys=True)
        changed.out = os.path.join(folder, f"{zlib.crc32(key.encode()):08x}")
        if key not in done:
            fresh += 1
            done[key] = dict(key=key, **one_of_many(changed, data))
            with open(path, "a") as f:
                f.write("\n" + json.dumps(done[key]) + "\n")  # a fresh line, even after one that was cut
        r = done[key]
        left = (time.perf_counter() - start) / max(1, fresh) * (len(jobs) - i - 1)
        print(f"  run {i + 1:>3}/{len(jobs)} | {label:<28} | seed {changed.seed} | {r['bpb']:.4f} bits/byte "
              f"| {r['seconds']:4.0f} s | about {left // 60:.0f}:{left % 60:02.0f} left", flush=True)
        results.setdefault(label, []).append(r)
    return results


def one_of_many(s, data):
    """Train quietly; a run that diverges is a result, too: infinite loss."""
    os.makedirs(s.out, exist_ok=True)
    try:
        r = train(s, *data, quiet=True)
    except FloatingPointError:
        return dict(bpb=math.inf, loss=math.inf, seconds=0.0, params=0, log=None)
    return dict(bpb=r["val_bpb"], loss=r["val_loss"], seconds=r["run"].elapsed,
                params=M.num_params(r["run"].config), log=r["log"])


def results_table(title, results):
    """One row a variant: mean over seeds, their spread, and the distance from the first row."""
    def mean(label, field):
        return statistics.fmean(r[field] for r in results[label])
    first, rows = next(iter(results)), []
    for label, runs in results.items():
        values = [r["bpb"] for r in runs]
        rows.append([label, f"{runs[0]['params']:,}", f"{mean(label, 'bpb'):.4f}",
                     f"{max(values) - min(values):.4f}", f"{mean(label, 'bpb') - mean(first, 'bpb'):+.4f}",
                     f"{mean(label, 'seconds'):.0f}"])
    M.table(title, ["variant", "parameters", "bits/byte", "max - min", "against the first", "seconds"], rows)


def sweep(s, data):
    """--sweep lr=0.01,0.02 d_model=128,192: the grid of all given values, one run each."""
    names, values = [], []
    shared = {"vocab_size", "data", "val", "corpus", "tokenizer", "errors", "threads", "preset", "out",
              "resume", "ablate", "bakeoff", "sweep", "help"}
    for item in s.sweep:
        name, _, listed = item.partition("=")
        if name in shared:
            raise ValueError(f"--sweep {name}: all runs of a sweep share it; give each its own run and --out")
        names.append(name)
        values.append([setting_value(name, v) for v in listed.split(",")])
    grid = [dict(zip(names, combination)) for combination in itertools.product(*values)]
    # One budget is the grid's? Then it replaces the one given to all.
    others = dict.fromkeys(BUDGETS, 0) if {*BUDGETS} & {*names} else {}
    variants = [(" ".join(f"{k}={v}" for k, v in change.items()), {**others, **change}) for change in grid]
    for _, change in variants:
        check(argparse.Namespace(**{**vars(s), **change}))
    results = run_many("sweep", variants, [s.seed], s, data)
    results_table(f"Sweep over {' x '.join(names)}",
                  dict(sorted(results.items(), key=lambda r: r[1][0]["bpb"])))


# The lecture's ablations, each against the first. Four variants bring their own learning rate, the best of a
# --sweep in factors of two at the same budget; the rest share the default's.
ABLATIONS = [
    ("the default", {}),
    ("no norm", dict(norm="none", lr=0.005)),
    ("post-norm", dict(norm_position="post", lr=0.01)),
    ("NoPE: no positions", dict(position="none")),
    ("learned positions", dict(position="learned")),
    ("LayerNorm", dict(norm="layernorm")),
    ("no QK-norm", dict(qk_norm=False)),
    ("SiLU, 4 D wide, no gate", dict(ffn="silu")),
    ("parallel block", dict(parallel=True)),
    ("AdamW", dict(optimizer="adamw", lr=0.008, head_lr=1.0, embedding_lr=10.0)),
    ("cosine", dict(schedule="cosine")),
    ("tied embeddings", dict(tie_embeddings=True, embedding_lr=4.0)),
    ("Glorot, no zeros", dict(init="glorot")),
]


def ablate(s, data):
    results = run_many("ablate", ABLATIONS, [s.seed, s.seed + 1, s.seed + 2], s, data)
    results_table("Ablations: one budget, three seeds", results)
    with figure(os.path.join(s.out, "ablate.png"), xlabel="million tokens read",
                ylabel="bits per byte, beginning of the held-out text (mean over seeds)") as ax:
        for i, (label, runs) in enumerate(results.items()):
            curves = []
            for r in runs:
                if r["log"] and os.path.exists(r["log"]):
                    with open(r["log"]) as f:
                        curves.append([v for v in held_out_curve(map(json.loads, f))[1] if v["tokens"]])
            if ax and curves:
                ax.plot([v["tokens"] / 1e6 for v in curves[0]],
                        [statistics.fmean(v["val_bpb"] for v in at) for at in zip(*curves)],
                        ("o-", "s--", "^:")[i // 10 % 3], ms=3, label=label)


# The architectures. All read the same text in the same order, and stop when the FLOPs are spent.
BAKEOFF = [
    ("attention", {}),
    ("multi-query attention", dict(num_kv_heads=1)),
    ("3 local layers of 64, 1 global", dict(layers="LLLG", window=64)),
    ("keys of layer 1 for 2, of 3 for 4", dict(layers="GC")),
    ("latent attention (MLA)", dict(mixer="mla", kv_latent=64)),
    ("linear attention", dict(mixer="linear")),
    ("3 linear, 1 attention", dict(layers="RRRG")),
    ("Mamba", dict(mixer="mamba")),
    ("3 Mamba, 1 attention", dict(layers="MMMG")),
    ("Hyena", dict(mixer="hyena")),
    ("8 experts, 2 active", dict(num_experts=8)),
    ("16 experts, 3 active, 1 shared", dict(num_experts=16, experts_per_token=3, shared_experts=1)),
]


def bakeoff(s, data):
    """Every variant trains with the FLOPs that --tokens cost the first. Where the data is text, one more
    model reads it byte by byte, and is judged on the same held-out text."""
    flops = M.train_flops(M.model_config(s, vocab_size=data[0].vocab_size), s.tokens)
    corpora = [(data, BAKEOFF)]
    if not token_folder(s):
        held_out = data[2][:s.val_tokens]
        in_bytes = int(token_bytes(data[0])[held_out].sum() + (held_out == data[0].eot_id).sum())
        by_byte = dict(tokenizer="bytes", out=os.path.join(s.out, "bytes"))
        if s.corpus:                                       # it lies in s.out by now
            files = bpe.fetch(s.corpus, s.out)
            by_byte |= dict(corpus=None, data=files[:1], val=s.val or files[1:] or None)
        corpora.append((open_data(argparse.Namespace(**{**vars(s), **by_byte})),
                        [("attention, on bytes", dict(tokenizer="bytes", val_tokens=in_bytes))]))
    results, configs = {}, {}
    for corpus, variants in corpora:
        jobs = []
        for label, change in variants:
            c = M.model_config(argparse.Namespace(**{**vars(s), **change}), vocab_size=corpus[0].vocab_size)
            configs[label] = c
            jobs.append((label, {**change, "tokens": flops // M.train_flops(c, 1)}))
        results.update(run_many("bakeoff", jobs, [s.seed, s.seed + 1], s, corpus))
    rows, points = [], []
    for label, runs in results.items():
        c, bpb = configs[label], [r["bpb"] for r in runs]
        points.append((M.state_bytes(c, 1024) / 1024, statistics.fmean(bpb), label))
        rows.append([label, f"{M.num_params(c):,}", f"{M.num_params_active(c):,}", f"{points[-1][0]:,.0f}",
                     f"{flops // M.train_flops(c, 1):,}", f"{points[-1][1]:.4f}",
                     f"{max(bpb) - min(bpb):.4f}", f"{statistics.fmean(r['seconds'] for r in runs):.0f}"])
    M.table(f"Bake-off: {flops / 1e12:.2f} TFLOPs of training each, two seeds "
            f"(state: bytes a token of a text of 1,024, bf16)",
            ["variant", "parameters", "active", "state", "tokens", "bits/byte", "max - min", "seconds"], rows)
    with figure(os.path.join(s.out, "bakeoff.png"), ylabel="bits per byte, held out", xscale="log",
                xlabel="state, bytes a token of a text of 1,024 tokens (bf16)") as ax:
        for (kept, bpb, label), marker in zip(points if ax else (), itertools.cycle("os^vD*P")):
            ax.plot(kept, bpb, marker, ms=8, label=label)
        if ax:
            ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))


# --- 9. the command line ------------------------------------------------------------------------------------

TRAINING = {  # what a preset of model.py changes here; a typed flag beats it
    "tiny": dict(minutes=2.5),
    "small": dict(minutes=60.0),
    "tinystories": dict(tokens=327_680_000, batch_size=128),
    "gpt2-recipe": dict(minutes=2.5, optimizer="adamw", schedule="cosine", lr=1e-3, final_lr=0.1, head_lr=1.0,
                        embedding_lr=1.0),
    "gpt2": dict(tokens=10_000_000_000, batch_size=480, micro_batch=12, optimizer="adamw", schedule="cosine",
                 lr=6e-4, final_lr=0.1, head_lr=1.0, embedding_lr=1.0),
}
# What --ablate changes, and --bakeoff.
ABLATION = dict(tokens=100_000, batch_size=4, minutes=0.0, val_tokens=20_000, eval_tokens=4096, evals=4)
BAKEOFF_BUDGET = {**ABLATION, "tokens": 250_000, "evals": 0}


def make_parser():
    p = M.cli(__doc__)
    switch = argparse.BooleanOptionalAction
    mode = p.add_argument_group("what to do (default: one training run)").add_argument
    mode("--resume", action="store_true", help="continue the run in --out, with its settings")
    mode("--ablate", action="store_true", help="train the lecture's ablations, three seeds each")
    mode("--bakeoff", action="store_true", help="train the architectures at equal FLOPs, two seeds each")
    mode("--sweep", nargs="+", metavar="FLAG=V1,V2", help="train every combination of these values")
    data = p.add_argument_group("data").add_argument
    data("--data", nargs="+", metavar="PATH",
         help="text files or folders, or one folder with train.bin, val.bin and tokenizer.json; "
              "without it the Python standard library")
    data("--val", nargs="+", metavar="PATH",
         help="held-out text; without it a fixed 5%% of the files of --data")
    data("--corpus", help="a public corpus, fetched once: tinyshakespeare, tinystories, owt, fineweb-edu")
    data("--tokenizer", metavar="PATH",
         help="a tokenizer.json to use, or: bytes, one id a byte; without it one is trained on the data")
    data("--errors", choices=("strict", "replace"), default="strict", help="what to do with invalid UTF-8")
    data("--out", default="out", metavar="DIR", help="folder for everything the run makes")
    budget = p.add_argument_group("budget: one of three; the schedule ends exactly there").add_argument
    budget("--minutes", type=float, default=0.0, help="minutes of training (0: the preset's; tiny 2.5)")
    budget("--steps", type=int, default=0, help="optimizer steps")
    budget("--tokens", type=int, default=0, help="training tokens")
    o = p.add_argument_group("optimization").add_argument
    o("--batch_size", type=int, default=8, help="sequences per optimizer step")
    o("--micro_batch", type=int, default=0, help="sequences at a time, accumulated; 0: all at once")
    o("--optimizer", choices=("muon", "adamw", "soap", "sgd"), default="muon", help="of hidden matrices")
    o("--lr", type=float, default=0.02, help="peak learning rate")
    o("--head_lr", type=float, default=0.5, help="factor on lr for the output matrix (if not tied)")
    o("--embedding_lr", type=float, default=30.0, help="factor on lr for embeddings (and a tied head)")
    o("--mup_base", type=int, default=0, metavar="WIDTH",
      help="muP: the d_model at which the rates were found, at equal head dim; 0: as they are")
    o("--schedule", choices=SCHEDULES, default="wsd", help="shape of the learning rate over the run")
    o("--warmup", type=float, default=0.02, help="share of the run in which the rate rises")
    o("--final_lr", type=float, default=0.0, help="last rate as a share of the peak (not with constant)")
    o("--weight_decay", type=float, default=0.1, help="pull on hidden matrices, times the rate (not sgd)")
    o("--momentum", type=float, default=0.95, help="Muon's average of gradients")
    o("--beta1", type=float, default=0.9, help="AdamW's average of gradients (SGD: its momentum)")
    o("--beta2", type=float, default=0.95, help="AdamW's average of squared gradients")
    o("--clip", type=float, default=1.0, help="largest l2 norm of all gradients together; 0: no clipping")
    o("--z_loss", type=float, default=0.0, help="weight of mean (log Z)^2 in the objective")
    o("--max_bad_steps", type=int, default=10, help="non-finite steps in a row before giving up")
    o("--noise_scale", action=switch, default=False, help="of the gradient, shown (needs --micro_batch)")
    r = p.add_argument_group("running").add_argument
    r("--device", default="auto", help="cuda, mps or cpu; auto takes the first there is")
    r("--dtype", choices=("auto", "fp32", "bf16"), default="auto",
      help="of matrix products; auto: bf16 on a GPU that has it")
    r("--compile", action=switch, default=False, help="a minute to start, faster steps on a GPU")
    r("--checkpoint_blocks", action=switch, default=False, help="run blocks twice: time for memory")
    r("--threads", type=int, default=0, help="CPU threads; 0: one a core")
    r("--seed", type=int, default=0, help="of weights, data order and samples")
    r("--evals", type=int, default=8, help="evaluations during the run")
    r("--eval_tokens", type=int, default=8192, help="held-out tokens in each of them")
    r("--val_tokens", type=int, default=1_000_000, help="held-out tokens before and after the run")
    r("--save_minutes", type=float, default=5.0, help="minutes between checkpoints")
    r("--log_seconds", type=float, default=5.0, help="seconds between lines on the screen")
    r("--prompt", default="def __init__(self", help="start of the sample")
    r("--sample_tokens", type=int, default=150, help="length of the sample, tokens")
    M.add_model_flags(p)
    return p


BUDGETS = ("minutes", "steps", "tokens")


def settings(argv=None, parser=None):
    """Command line -> (all settings, those typed). Typed flags beat the preset, the preset the defaults."""
    parser, unset = parser or make_parser(), object()
    known = {a.dest: a.default for a in parser._actions if a.dest != "help"}
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(known, unset)))
    typed = {k: v for k, v in vars(given).items() if v is not unset}
    preset = {**TRAINING.get(typed.get("preset", known["preset"]), {}),
              **(ABLATION if typed.get("ablate") else BAKEOFF_BUDGET if typed.get("bakeoff") else {})}
    if any(k in typed for k in BUDGETS):                   # a typed budget replaces the preset's
        preset.update(dict.fromkeys(BUDGETS, 0))
    defaults = {k: v for k, v in known.items() if v != argparse.SUPPRESS}
    return argparse.Namespace(**{**defaults, **preset, **typed}), typed


def setting_value(name, text):
    """A value from --sweep, of the type that the flag of that name has."""
    argv = {"True": [f"--{name}"], "False": [f"--no-{name}"]}.get(text, [f"--{name}", text])
    return settings(argv)[1][name]


def check(s):
    """Values that argparse cannot judge alone."""
    modes = [f"--{k}" for k in ("ablate", "bakeoff", "sweep") if getattr(s, k)]
    if len(modes) > 1:
        raise ValueError(f"{' and '.join(modes)} are different jobs: give one")
    budgets = [k for k in BUDGETS if getattr(s, k)]
    if len(budgets) != 1:
        raise ValueError(f"give one budget, not {len(budgets)} ({', '.join(budgets) or 'none'}): "
                         f"--minutes 3, --steps 1000 or --tokens 1000000")
    least = dict(minutes=0, steps=0, tokens=0, batch_size=1, micro_batch=0, lr=0, head_lr=0, embedding_lr=0,
                 mup_base=0, clip=0, eval_tokens=1, val_tokens=2, weight_decay=0, evals=0, save_minutes=0,
                 max_bad_steps=1, threads=0, sample_tokens=0, z_loss=0, log_seconds=0, seed=0)
    for name, low in least.items():
        if not low <= getattr(s, name) < math.inf:
            raise ValueError(f"--{name} {getattr(s, name)} is out of range: {low} or more")
    most = dict(threads=1024, seed=2**63 - 1, lr=1e6, head_lr=1e6, embedding_lr=1e6, weight_decay=1e6)
    for name, high in most.items():                        # what torch can take
        if getattr(s, name) > high:
            raise ValueError(f"--{name} {getattr(s, name)} is out of range: {high} or less")
    for name in ("warmup", "final_lr", "momentum", "beta1", "beta2"):
        if not 0 <= getattr(s, name) <= (1 if name == "final_lr" else 0.9999):
            raise ValueError(f"--{name} {getattr(s, name)} is out of range: from 0 to below 1")
    if s.micro_batch and s.batch_size % s.micro_batch:
        raise ValueError(f"--batch_size {s.batch_size} is not a multiple of --micro_batch {s.micro_batch}: "
                         f"try --batch_size {s.micro_batch * max(1, round(s.batch_size / s.micro_batch))}")
    if s.noise_scale and s.micro_batch in (0, s.batch_size):
        raise ValueError("--noise_scale compares a micro-batch with the batch: give --micro_batch a "
                         f"divisor of --batch_size {s.batch_size}, such as {max(1, s.batch_size // 4)}")
    if s.corpus and s.data:
        raise ValueError(f"--corpus {s.corpus} and --data {' '.join(s.data)} are two sources: give one")
    if s.prompt.encode(errors="ignore").decode() != s.prompt:
        raise ValueError(f"--prompt {s.prompt!a} is not valid UTF-8")


FREE_ON_RESUME = {"resume", "out", "device", "threads", "evals", "eval_tokens", "val_tokens", "save_minutes",
                  "prompt", "log_seconds", "sample_tokens", "compile", "checkpoint_blocks", "max_bad_steps",
                  *BUDGETS}


def resume_settings(s, typed):
    """The settings of the run in s.out, with the typed ones that may change -> (settings, checkpoint)."""
    path = os.path.join(s.out, "checkpoint.pt")
    state = M.load_checkpoint(path)
    before = state.get("settings")
    if not before:
        raise ValueError(f"{path} holds weights but no training run to resume: "
                         f"load it with model.load_model, or train afresh")
    for k, v in typed.items():
        was = before.get(k, state["config"].get(k))        # a knob that was not typed is in the config alone
        if k not in FREE_ON_RESUME and was != v:
            raise ValueError(f"{path} was made with {k}={was}, not {v}: "
                             f"drop --{k} to resume it, or drop --resume to start afresh")
    if any(k in typed for k in BUDGETS):
        before = {**before, **dict.fromkeys(BUDGETS, 0)}
    # vars(s): the flags that an older version of this file did not have.
    return argparse.Namespace(**{**vars(s), **before, **typed, "resume": True, "out": s.out}), state


def token_folder(s):
    """Is --data one folder of token files?"""
    return bool(s.data) and len(s.data) == 1 and os.path.exists(os.path.join(s.data[0], "train.bin"))


def open_data(s):
    """-> (tokenizer, train tokens, held-out tokens).
    Text is tokenised once; bpe.prepare says when it reuses a file."""
    config = M.model_config(s)                             # a bad knob shows before long work
    folder = s.out
    if token_folder(s):
        folder = s.data[0]
        if s.val or s.tokenizer == "bytes":
            own, flag = ("val.bin", "--val") if s.val else ("tokenizer.json", "--tokenizer bytes")
            raise ValueError(f"{folder} has its own {own}: drop {flag}, or give text instead of token files")
        tokenizer = bpe.load_tokenizer(s.tokenizer or os.path.join(folder, "tokenizer.json"))
    else:
        text, held_out = s.data, s.val
        if s.corpus:
            files = bpe.fetch(s.corpus, s.out, progress=True)  # training text, then held-out text if any
            text, held_out = files[:1], held_out or files[1:] or None
        by_byte = s.tokenizer == "bytes"                   # 256 bytes, end of text, and no merge
        tokenizer = bpe.prepare(s.out, text, held_out, vocab_size=257 if by_byte else config.vocab_size,
                                errors=s.errors, tokenizer=None if by_byte else s.tokenizer)["tokenizer"]
    train_tokens, val_tokens = (bpe.load_tokens(os.path.join(folder, f"{part}.bin"), tokenizer)
                                for part in ("train", "val"))
    if len(val_tokens) < 2 or (val_tokens[:s.val_tokens] == tokenizer.eot_id).all():
        raise ValueError(f"{os.path.join(folder, 'val.bin')} holds {len(val_tokens)} tokens and no text: "
                         f"give held-out text with --val")
    return tokenizer, train_tokens, val_tokens


def keep_freed_memory():
    """On Linux, tell malloc not to hand large freed blocks back to the system: every step asks for the
    same ones again, and a fresh page costs a fault. 40,000 faults a step became 2,000; 5% of a small
    model's time on one core."""
    with contextlib.suppress(OSError, AttributeError, TypeError):            # another C library: nothing lost
        libc, largest = ctypes.CDLL(None), 2**31 - 1
        libc.mallopt(-3, largest)                          # M_MMAP_THRESHOLD
        libc.mallopt(-1, largest)                          # M_TRIM_THRESHOLD


@contextlib.contextmanager
def alone_in(folder):
    """Two runs would write one checkpoint.pt.tmp. The lock is the system's: a kill -9 frees it, too."""
    try:
        import fcntl
    except ImportError:                                    # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another train.py is at work there; "
                             f"wait, or give another --out") from None
        except OSError:                                    # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def keep_old_checkpoint(s):
    """A fresh run moves the last checkpoint aside. One is kept: an older .old.pt and the log are lost."""
    path, old = os.path.join(s.out, "checkpoint.pt"), os.path.join(s.out, "checkpoint.old.pt")
    if not s.resume and os.path.exists(path):
        os.replace(path, old)
        print(f"note     the checkpoint of an earlier run is now {old}  (--resume would have continued it)")


def run_command(argv=None):
    parser = make_parser()
    s, typed = settings(argv, parser)
    state = None
    try:
        if s.resume:
            s, state = resume_settings(s, typed)
        check(s)
        keep_freed_memory()
        if s.threads:
            torch.set_num_threads(s.threads)
        os.makedirs(s.out, exist_ok=True)
        with alone_in(s.out):
            data = open_data(s)
            if typed.get("vocab_size", data[0].vocab_size) != data[0].vocab_size:
                print(f"note     --vocab_size {s.vocab_size} is not used: "
                      f"the tokenizer has {data[0].vocab_size}")
            if s.ablate or s.bakeoff or s.sweep:
                return (ablate if s.ablate else bakeoff if s.bakeoff else sweep)(s, data)
            keep_old_checkpoint(s)
            report(s, train(s, *data, state), *data)
    except FloatingPointError as e:
        parser.exit(1, f"train.py: stopped: {e}\n")
    except RuntimeError as e:
        if not isinstance(e, torch.OutOfMemoryError) and "allocate memory" not in str(e):    # a GPU, a CPU
            raise
        parser.error(f"out of memory ({M.first_line(e)}): try --micro_batch "
                     f"{max(1, (s.micro_batch or s.batch_size) // 2)} or --checkpoint_blocks")
    except (ValueError, OSError) as e:
        parser.error(M.first_line(e))
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted: nothing half-written is left; the same command starts again\n")


if __name__ == "__main__":
    run_command()
