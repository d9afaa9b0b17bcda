"""train.py - lectures 2-3: from text to a trained language model. The main job of the project.

What   Reads tokens, predicts each one from those before it, and moves the weights down the gradient of the loss until
       the budget (minutes, steps or tokens) is spent. With no arguments: the Python standard library of this machine.
Why    A language model is a compressor: -log2 p(text) bits are what an arithmetic coder needs to write the text down.
       So the score is bits per byte of files that training never saw, next to gzip, bzip2 and xz on the same files,
       and no tokenizer can flatter it. In four minutes on two cores the model beats all three.

Equations
       loss           = mean over tokens of -ln p(token | before);   bits per byte = sum of losses / ln 2 / bytes
       AdamW          m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  w -= lr (m' / (sqrt(v') + eps) + decay w)
       Muon           m = mu m + g;  w -= lr * 0.2 sqrt(max(rows, cols)) * U V^T    where  g + mu m = U S V^T
       warm-up        lr * t/warmup, then  cosine: to final_lr over the rest   or  wsd: flat, then a line to zero
       gradient noise B_noise = tr(covariance of the per-sequence gradient) / |mean gradient|^2
       MFU            = (FLOPs a token, forward and backward) * tokens/s / peak FLOP/s

Run    python train.py                                     # the standard library, two cores, under 5 minutes
       python train.py --preset small --minutes 60         # the same text, a larger model
       python train.py --data DIR --preset gpt2            # your files: .txt, .jsonl(.gz), .py, ... or token files
       python train.py --resume                            # go on after Ctrl-C, kill -9 or a power cut
       python train.py --ablate                            # what each part is worth: 15 minutes, one table
       python train.py --sweep lr=0.01,0.02 --minutes 1    # any grid over any flags

You should see (two cores, CPU)
@@DEMO@@

Outline  1 optimizers     2 schedules and clipping     3 batches: every token once     4 evaluation
         5 resources      6 the loop                   7 the report                    8 many runs: sweeps, ablations

References  Loshchilov & Hutter 2019 (AdamW), Jordan et al. 2024 and Liu et al. 2025 (Muon), Hu et al. 2024 (WSD),
            Pascanu et al. 2013 (clipping), McCandlish et al. 2018 (gradient noise scale), Chen et al. 2016
            (activation checkpointing), Chowdhery et al. 2022 (MFU, z-loss).
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
import resource
import shlex
import signal
import statistics
import sys
import time

import bpe
import model as M                                                            # before torch: it sets how CPU threads wait

import numpy as np
import torch

# Shape letters: B sequences in a micro-batch, T context length, V vocabulary. Loss in nats; GB = 1e9 bytes.


# --- 1. optimizers ----------------------------------------------------------------------------------------------
# The ladder: SGD follows the gradient; momentum averages it over time; AdaGrad and RMSProp divide each coordinate by
# the root of its own squared gradients (summed, or averaged); Adam does both averages and corrects their cold start;
# AdamW takes weight decay out of the gradient. Muon leaves the coordinates and treats a matrix as a matrix.

class SGD(torch.optim.Optimizer):
    """m = momentum m + g;  w -= lr m.      One state a weight with momentum, none without."""
    def __init__(self, params, lr=1e-2, momentum=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group, p in weights_with_gradient(self):
            step = p.grad
            if group["momentum"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                step = m.mul_(group["momentum"]).add_(p.grad)
            p.sub_(step, alpha=group["lr"])


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019).      Two states a weight: 16 bytes with weight and
    gradient in fp32.  The decay pulls each weight by lr * decay * w whatever its gradient: it sets, together with lr,
    the size at which weights settle and so their relative step. On single-epoch data it is not there against overfitting."""
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
    state["m"].lerp_(p.grad, 1 - b1)                                         # m + (1-b1)(g - m)
    state["v"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
    p.mul_(1 - group["lr"] * group["weight_decay"])
    size = (state["v"] / (1 - b2**t)).sqrt_().add_(group["eps"])
    p.addcdiv_(state["m"], size, value=-group["lr"] / (1 - b1**t))


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix (Jordan et al. 2024), for groups with muon=True; AdamW for the rest.

    A gradient matrix is dominated by a few directions; U V^T keeps its directions and gives all of them the same size,
    so rare ones learn too. 0.2 sqrt(max(rows, cols)) makes the step's RMS 0.2, about AdamW's (Liu et al. 2025): both kinds of
    group live with one learning rate and decay. Only hidden matrices: embedding rows and output rows are separate things.
    One state a weight instead of two.
    """
    def __init__(self, params, lr=1e-2, momentum=0.95, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        super().__init__(params, dict(lr=lr, momentum=momentum, betas=betas, eps=eps, weight_decay=weight_decay, muon=False))

    @torch.no_grad()
    def step(self):
        for group, p in weights_with_gradient(self):
            if not group["muon"]:
                adamw_update(p, self.state[p], group)
                continue
            mu, m = group["momentum"], self.state[p].setdefault("m", torch.zeros_like(p))
            m.mul_(mu).add_(p.grad)
            direction = orthogonalise(p.grad + mu * m)                       # Nesterov: one step ahead of the average
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(direction, alpha=group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonalise(g, steps=5):
    """G = U S V^T -> about U V^T, without an SVD: each step applies x -> a x + b x^3 + c x^5 to every singular value.

    g (rows, cols), or a stack of such. The coefficients (Jordan et al. 2024) trade exactness for speed: after five steps singular
    values from 0.01 to 1 lie within 0.7 .. 1.2, which trains as well as 1. Cost: 5 (4 r^2 c + 2 r^3) FLOPs, r the short side.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if g.is_cuda else g.float()                             # tensor cores; CPUs are slower in bf16
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x                                                  # x x^T on the short side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)                      # all singular values into 0..1
    for _ in range(steps):
        xx = x @ x.mT
        x = a * x + (b * xx + c * xx @ xx) @ x
    return (x.mT if tall else x).to(g.dtype)


def weights_with_gradient(optimizer):
    """(group, p) for every parameter that took part in the loss."""
    return ((g, p) for g in optimizer.param_groups for p in g["params"] if p.grad is not None)


def make_optimizer(model, s):
    """Parameter groups: hidden matrices, output matrix, embeddings, gains and biases. Only hidden matrices decay: a gain near 1
    or an embedding row that is rarely visited should not be pulled to zero. `scale` multiplies the schedule's rate."""
    hidden, head, embeddings, vectors = [], [], [], []
    for name, p in model.named_parameters():
        (vectors if p.dim() < 2 else hidden if name.startswith("blocks.") else head if name.startswith("head.") else embeddings).append(p)
    groups = [dict(params=hidden, scale=1.0, muon=s.optimizer == "muon"),
              dict(params=head, scale=s.head_lr, weight_decay=0.0),
              dict(params=embeddings, scale=s.embedding_lr, weight_decay=0.0),
              dict(params=vectors, scale=1.0, weight_decay=0.0)]
    groups = [g for g in groups if g["params"]]
    if s.optimizer == "sgd":
        return SGD([{k: g[k] for k in ("params", "scale")} for g in groups], s.lr, s.beta1)
    if s.optimizer == "adamw":
        return AdamW(groups, s.lr, (s.beta1, s.beta2), weight_decay=s.weight_decay)
    return Muon(groups, s.lr, s.momentum, (s.beta1, s.beta2), weight_decay=s.weight_decay)


# --- 2. schedules and clipping ----------------------------------------------------------------------------------

def cosine(progress, warmup=0.02, final=0.1):
    """Share of the peak rate at progress 0..1: a line up over `warmup`, then half a cosine down to `final`, reached
    exactly at 1. Its shape depends on the end, so a run cannot be prolonged (Loshchilov & Hutter 2017)."""
    if progress < warmup:
        return progress / warmup
    t = min(1.0, (progress - warmup) / (1 - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * t))


def wsd(progress, warmup=0.02, final=0.0, decay=0.4):
    """Warm-up, stable, decay (Hu et al. 2024): flat, then a line down to `final` over the last `decay` of the run.
    Any checkpoint from the flat part can be decayed, or trained further: the end is chosen late."""
    if progress < warmup:
        return progress / warmup
    return 1.0 if progress < 1 - decay else final + (1 - final) * max(0.0, 1 - progress) / decay


def constant(progress, warmup=0.02, final=1.0):
    return min(1.0, progress / warmup) if warmup else 1.0


SCHEDULES = {"wsd": wsd, "cosine": cosine, "constant": constant}


@torch.no_grad()
def clip_gradients(params, max_norm, eps=1e-6):
    """Scale all gradients, in place, so that their joint l2 norm is at most max_norm; returns the norm before.
    One norm over everything: clipping each tensor alone would change the direction of the step (Pascanu et al. 2013)."""
    grads = [p.grad for p in params if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    scale = (max_norm / (norm + eps)).clamp(max=1.0)
    for g in grads:
        g.mul_(scale)                                                        # a product with 1.0 instead of a branch: no GPU sync
    return norm


def noise_scale(small_sq, big_sq, b_small, b_big):
    """B_noise = tr(S)/|G|^2 from squared gradient norms at two batch sizes (McCandlish et al. 2018, appendix A).

    E|g_B|^2 = |G|^2 + tr(S)/B holds at both sizes: two equations, two unknowns, both unbiased. Their ratio is not, so average the
    squared norms over many steps first. Batches far below B_noise waste no data, far above they waste compute.
    """
    signal = (b_big * big_sq - b_small * small_sq) / (b_big - b_small)
    noise = (small_sq - big_sq) / (1 / b_small - 1 / b_big)
    return noise / signal if signal > 0 else math.inf


# --- 3. batches: every token once an epoch ----------------------------------------------------------------------

class Batches:
    """Token file -> (x, y) of shape (B,T), y one token ahead of x, each token a target exactly once an epoch.

    The file is cut into windows of T tokens, visited in an order that depends on (seed, epoch) alone; each epoch starts the cut
    at another offset. So the whole reading state is one integer, the number of sequences read: resuming is reading on.
    """
    def __init__(self, tokens, context_length, seed=0):
        self.tokens, self.T, self.seed, self.epoch = tokens, context_length, seed, -1
        self.windows = (len(tokens) - 1) // context_length - 1               # one less, so that every offset fits
        if self.windows < 1:
            raise ValueError(f"{len(tokens):,} training tokens are fewer than two contexts of {context_length}: "
                             f"give more text, or --context_length {max(1, (len(tokens) - 1) // 2)}")

    def __call__(self, first, batch_size, device="cpu"):
        """Sequences number first .. first + batch_size - 1 of the endless stream of epochs."""
        rows = [self.window(i) for i in range(first, first + batch_size)]
        batch = torch.from_numpy(np.stack(rows).astype(np.int64))            # (B,T+1); uint16 cannot index
        if device != "cpu":
            batch = batch.pin_memory().to(device, non_blocking=True) if "cuda" in device else batch.to(device)
        return batch[:, :-1], batch[:, 1:]

    def window(self, i):
        epoch, i = divmod(i, self.windows)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.epoch, self.offset, self.order = epoch, rng.integers(self.T), rng.permutation(self.windows)
        start = self.offset + self.order[i] * self.T
        return self.tokens[start:start + self.T + 1]


# --- 4. evaluation ----------------------------------------------------------------------------------------------

@torch.inference_mode()
def evaluate(model, tokens, eot, device="cpu", autocast=contextlib.nullcontext, batch_size=16, max_tokens=None):
    """Nats summed over `tokens`, and their number: the code length of the file under the model.

    Windows of T tokens overlap by half, and a window scores its second half: each token is predicted from at least T/2 tokens
    before it where there are so many. An end-of-text token stands before the first, so that no token goes free.
    """
    T, was_training = model.config.context_length, model.training
    half = max(1, T // 2)
    tokens = np.concatenate(([eot], tokens[:max_tokens])).astype(np.int64)
    n, total = len(tokens) - 1, 0.0
    # starts 0, half, 2 half, ...: the window at s scores targets s + T - half .. s + T - 1, the first one all of its own
    starts = [0] + list(range(half, n - T + half, half)) if n > T else [0]
    model.eval()
    width = min(T, n)
    for i in range(0, len(starts), batch_size):
        first = np.array(starts[i:i + batch_size])[:, None]
        index = first + np.arange(width + 1)                                 # (B,T+1), the last may run past the end
        batch = torch.from_numpy(tokens[np.minimum(index, n)]).to(device)
        scored = torch.from_numpy((index[:, 1:] <= n) & ((np.arange(width) >= T - half) | (first == 0)))
        with autocast():
            logits = model(batch[:, :-1])
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")
        total += nats[scored.flatten().to(device)].double().sum().item()
    model.train(was_training)
    return total, n


def bits_per_byte(nats, num_bytes):
    return nats / math.log(2) / num_bytes


def token_bytes(tokenizer):
    """(V,) UTF-8 bytes of each id; 0 for special tokens, which are no part of the text."""
    special = set(tokenizer.special_tokens.values())
    return np.array([0 if i in special else len(tokenizer.vocab.get(i, b"")) for i in range(tokenizer.vocab_size)])


# --- 5. resources: what a run will cost -------------------------------------------------------------------------

PEAK_FLOPS = {  # dense tensor-core FLOP/s (bf16, tf32) from NVIDIA's data sheets; the longest matching name counts
    "A100": (312e12, 156e12), "H100": (989.5e12, 494.7e12), "H100 PCIe": (756e12, 378e12), "H200": (989.5e12, 494.7e12),
    "L4": (121e12, 60e12), "L40S": (362e12, 183e12), "A10": (125e12, 62.5e12), "B200": (2250e12, 1100e12)}


def peak_flops(device, dtype):
    """FLOP/s of this device, or None: a wrong constant is worse than none."""
    if "cuda" not in device:
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    fits = [name for name in PEAK_FLOPS if set(name.split()) <= set(words)]
    return PEAK_FLOPS[max(fits, key=len)][0 if dtype == "bf16" else 1] if fits else None


def matmul_flops(device, n=768, repeats=7):
    """Measured FLOP/s of a plain fp32 product, about 0.1 s: what the time estimate stands on where no peak is known."""
    a, seconds = torch.ones(n, n, device=device), []                         # not randn: the run's random stream is its own
    for _ in range(repeats):
        start = time.perf_counter()
        (a @ a)[0, 0].item()                                                 # .item() waits for a GPU to finish
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds)


def memory_plan(c, s):
    """{what: bytes} at the peak of a step: after the forward pass, when the logits' gradient appears."""
    n = M.num_params(c)
    states = {"sgd": 1, "adamw": 2, "muon": 2 - sum(M.count_params(c)[k] for k in ("attention", "ffn")) / n}[s.optimizer]
    kept = M.activation_bytes(c, s.micro_batch or s.batch_size, checkpoint_blocks=s.checkpoint_blocks)
    return {"weights": 4 * n, "gradients": 4 * n, "optimizer": int(4 * n * states),
            "activations": sum(kept.values()), "logit gradients": kept["logits"]}


def describe(c, s, device, dtype, train_tokens, tokenizer):
    """Everything that can be known before step 0."""
    micro = s.micro_batch or s.batch_size
    batch = s.batch_size * c.context_length
    flops = 3 * sum(M.flops_per_token(c).values())
    plan, rate = memory_plan(c, s), matmul_flops(device)
    expected = 0.5 * rate / flops                                            # tokens/s: half of the product's speed
    steps = total_steps(s, c)
    tokens = steps * batch if steps else s.minutes * 60 * expected
    print(f"config   {json.dumps({**M.asdict(c)})}")
    print(f"device   {device}, {dtype}, {torch.get_num_threads()} CPU threads, seed {s.seed}, "
          f"matrix product {rate / 1e9:,.0f} GFLOP/s measured")
    print(f"model    {M.num_params(c):,} parameters, {M.num_params(c, False):,} without embeddings; {flops / 1e6:,.1f} MFLOPs a training token")
    print(f"batch    {batch:,} tok = {micro} seq x {c.context_length} x {s.batch_size // micro} accumulated;  "
          f"data {train_tokens:,} tok, vocabulary {tokenizer.vocab_size:,}")
    print(f"memory   {sum(plan.values()) / 1e9:.2f} GB predicted = " + " + ".join(f"{k} {v / 1e9:.2f}" for k, v in plan.items()))
    print(f"budget   {f'{steps:,} steps' if steps else f'{s.minutes:g} min'}: about {tokens / 1e6:,.1f}M tok, "
          f"{tokens / train_tokens:.2f} epochs, {tokens * flops / 1e12:,.1f} TFLOPs, {tokens / expected / 60:.1f} min at "
          f"{expected:,.0f} tok/s (half of the product's speed)")
    return plan


# --- 6. the loop ------------------------------------------------------------------------------------------------

class Stop:
    """SIGINT and SIGTERM ask the loop to save and leave after the current step; a second SIGINT leaves at once."""
    signal = None

    def __enter__(self):
        self.before = {n: signal.signal(n, self.ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *_):
        for n, handler in self.before.items():
            signal.signal(n, handler)


def total_steps(s, c):
    """Steps of the budget, or 0 when it is a time."""
    return s.steps or math.ceil(s.tokens / (s.batch_size * c.context_length))


class Run:
    """One training run: model, optimizer, reading position and clock; all of it goes into the checkpoint and comes back."""

    def __init__(self, s, tokenizer, train_tokens, val_tokens, state=None):
        self.s, self.tokenizer, self.val = s, tokenizer, val_tokens
        self.device = M.pick_device(s.device)
        self.dtype = s.dtype if s.dtype != "auto" else \
            "bf16" if "cuda" in self.device and torch.cuda.is_bf16_supported() else "fp32"   # CPUs without AVX-512: 7x slower
        torch.set_float32_matmul_precision("high")                           # fp32 products on a GPU may use TF32
        torch.manual_seed(s.seed)
        self.config = M.model_config(s, vocab_size=tokenizer.vocab_size)
        self.model = M.Transformer(self.config).to(self.device)
        self.model.checkpoint_blocks = s.checkpoint_blocks
        self.optimizer = make_optimizer(self.model, s)
        self.batches = Batches(train_tokens, self.config.context_length, s.seed)
        self.step, self.sequences, self.elapsed, self.bad_steps, self.first_val = 0, 0, 0.0, 0, None
        self.token_bytes = token_bytes(tokenizer)
        self.noise = [0.0, 0.0]                                              # running |g|^2 of a micro-batch and of the batch
        if state:
            self.restore(state)
        self.forward = torch.compile(self.model) if s.compile else self.model

    # what changes while training, besides weights and optimizer
    POSITION = ("sequences", "elapsed", "bad_steps", "first_val", "noise")

    def save(self, path):
        rng = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if "cuda" in self.device else {})
        M.save_checkpoint(path, self.model, self.optimizer, self.step, settings=vars(self.s), rng=rng,
                          tokenizer=self.tokenizer.hash(), **{k: getattr(self, k) for k in self.POSITION})

    def restore(self, state):
        if state["tokenizer"] != self.tokenizer.hash():
            raise ValueError(f"the checkpoint was trained with tokenizer {state['tokenizer']}, the token files hold "
                             f"{self.tokenizer.hash()}: give the --data of that run, or train afresh without --resume")
        M.load_weights(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"]["cpu"].cpu())
        if "cuda" in state["rng"] and "cuda" in self.device:
            torch.cuda.set_rng_state(state["rng"]["cuda"].cpu())
        self.step = state["step"]
        for k in self.POSITION:
            setattr(self, k, state[k])

    def progress(self):
        """0 at the start, 1 when the budget is spent."""
        steps = total_steps(self.s, self.config)
        return self.step / steps if steps else self.elapsed / (60 * self.s.minutes)

    def autocast(self):
        return torch.autocast("cuda", torch.bfloat16) if self.dtype == "bf16" else contextlib.nullcontext()

    def gradients(self):
        """Forward and backward over one batch, in micro-batches; leaves the mean gradient in .grad, returns the mean loss.
        Each micro-batch loss is a mean over its own tokens: divided by their number, the sum is the mean over the batch."""
        s, micro, total, self.small = self.s, self.s.micro_batch or self.s.batch_size, 0.0, 0.0
        accumulate = s.batch_size // micro
        for i in range(accumulate):
            x, y = self.batches(self.sequences + i * micro, micro, self.device)
            with self.autocast():
                logits = self.forward(x)
            ce, objective = M.lm_loss(logits, y, s.z_loss)
            (objective / accumulate).backward()
            total = total + ce.detach() / accumulate
            if s.noise_scale and i == 0:                                     # the first micro-batch alone: b_small
                self.small = accumulate**2 * sum(p.grad.square().sum().item() for p in self.model.parameters())
        return total

    def train_step(self):
        """One optimizer step; returns the fields of the log line. A non-finite loss or gradient changes no weight."""
        s, start = self.s, time.perf_counter()
        steps = total_steps(s, self.config)
        ahead = 1 / steps if steps else (self.elapsed / self.step if self.step else 0.0) / (60 * s.minutes)
        lr = s.lr * SCHEDULES[s.schedule](min(1.0, self.progress() + ahead), s.warmup, s.final_lr)  # the last step is at 1
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        loss = self.gradients()
        norm = clip_gradients(self.model.parameters(), s.clip)
        loss, norm = loss.item(), norm.item()                                # waits for the GPU
        fine = math.isfinite(loss) and math.isfinite(norm)
        if fine:
            self.optimizer.step()
        self.bad_steps = 0 if fine else self.bad_steps + 1
        self.optimizer.zero_grad(set_to_none=True)
        if s.noise_scale and fine:
            self.noise = [old + (new - old) / min(self.step + 1, 100) for old, new in zip(self.noise, (self.small, norm**2))]
        self.step, self.sequences = self.step + 1, self.sequences + s.batch_size
        seconds = time.perf_counter() - start
        self.elapsed += seconds
        tokens = s.batch_size * self.config.context_length
        flops, peak = 3 * sum(M.flops_per_token(self.config).values()), peak_flops(self.device, self.dtype)
        return dict(step=self.step, tokens=self.step * tokens, seconds=round(self.elapsed, 3), loss=loss, lr=lr, gnorm=norm,
                    step_ms=1000 * seconds, tok_s=tokens / seconds, mfu=flops * tokens / seconds / peak if peak else None)

    def validate(self, max_tokens):
        """{val_loss (nats a token), val_bpb} on the first max_tokens held-out tokens."""
        nats, n = evaluate(self.forward, self.val, self.tokenizer.eot_id, self.device, self.autocast,
                           self.s.micro_batch or self.s.batch_size, max_tokens)
        return dict(val_loss=nats / n, val_bpb=bits_per_byte(nats, int(self.token_bytes[self.val[:n]].sum())))


def train(s, tokenizer, train_tokens, val_tokens, state=None, quiet=False):
    """The whole run: Run in, {first_val, val_loss, val_bpb, ...} out. Everything of interest is in out/log.jsonl."""
    run = Run(s, tokenizer, train_tokens, val_tokens, state)
    log_path, checkpoint = os.path.join(s.out, "log.jsonl"), os.path.join(s.out, "checkpoint.pt")
    plan = None if quiet else describe(run.config, s, run.device, run.dtype, len(train_tokens), tokenizer)
    say = (lambda *_: None) if quiet else print
    trim_log(log_path, run.step if state else -1)
    with open(log_path, "a") as log, Stop() as stop:
        def record(kind, fields):
            log.write(json.dumps(dict(kind=kind, **fields)) + "\n")
            log.flush()

        if run.first_val is None:
            run.first_val = run.validate(s.val_tokens)
            record("val", dict(step=0, tokens=0, seconds=0.0, **run.first_val))
            say(f"step {0:>6} | held out: loss {run.first_val['val_loss']:.4f} (ln V = {math.log(tokenizer.vocab_size):.4f}), "
                f"{run.first_val['val_bpb']:.3f} bits/byte")
        run.model.train()
        saved, printed, next_eval = time.perf_counter(), 0.0, run.progress() + 1 / max(1, s.evals)
        while run.progress() < 1 and not stop.signal:
            fields = run.train_step()
            record("train", fields)
            done = run.progress()
            if time.perf_counter() - printed > s.log_seconds or done >= 1:
                printed = time.perf_counter()
                say(log_line(fields, done, run))
            if run.bad_steps >= s.max_bad_steps:
                run.save(checkpoint)
                raise FloatingPointError(
                    f"{run.bad_steps} steps in a row had a non-finite loss or gradient, the last at step {run.step}; the weights "
                    f"of the last good step are in {checkpoint}. Try --lr {s.lr / 3:g}, --clip {s.clip / 2:g}, --qk_norm or --dtype fp32")
            if s.evals and next_eval <= done < 1:
                next_eval += 1 / s.evals
                start, fields = time.perf_counter(), run.validate(s.eval_tokens)
                run.elapsed += time.perf_counter() - start
                record("val", dict(step=run.step, tokens=fields_tokens(run), seconds=round(run.elapsed, 3), **fields))
                say(f"step {run.step:>6} | held out ({s.eval_tokens:,} tok): loss {fields['val_loss']:.4f}, {fields['val_bpb']:.3f} bits/byte")
            if not quiet and time.perf_counter() - saved > 60 * s.save_minutes:
                run.save(checkpoint)
                saved = time.perf_counter()
        if stop.signal:
            run.save(checkpoint)
            print(f"\n{signal.Signals(stop.signal).name}: saved {checkpoint} at step {run.step}. Go on with:  "
                  f"python train.py --resume{'' if s.out == 'out' else ' --out ' + shlex.quote(s.out)}", file=sys.stderr)
            raise SystemExit(128 + stop.signal)
        final = run.validate(s.val_tokens)
        record("val", dict(step=run.step, tokens=fields_tokens(run), seconds=round(run.elapsed, 3), **final))
    if not quiet:
        run.save(checkpoint)
    return dict(run=run, plan=plan, checkpoint=checkpoint, log=log_path, **final)


def fields_tokens(run):
    return run.sequences * run.config.context_length


def log_line(f, done, run):
    """One fixed-width line; log.jsonl has every step, the screen one every log_seconds."""
    s, steps = run.s, total_steps(run.s, run.config)
    left = run.elapsed * (1 - done) / done
    mfu = f"mfu {f['mfu']:.1%}" if f["mfu"] else "mfu n/a"
    noise = ""
    micro = (s.micro_batch or s.batch_size)
    if s.noise_scale and s.batch_size > micro:
        noise = f" | noise scale {noise_scale(*run.noise, micro, s.batch_size):,.0f} seq"
    bad = f" | SKIPPED, not finite ({run.bad_steps} in a row)" if run.bad_steps else ""
    return (f"step {f['step']:>6}{f'/{steps}' if steps else ''} | loss {f['loss']:7.4f} | lr {f['lr']:.2e} | gnorm {f['gnorm']:6.2f} | "
            f"{f['step_ms']:7.1f} ms | {f['tok_s']:>9,.0f} tok/s | {mfu} | {done:4.0%}, {left // 60:.0f}:{left % 60:02.0f} left{noise}{bad}")


def trim_log(path, step):
    """A run that resumes at `step` repeats the steps after it: drop their records, so that the log has each step once.
    A half-written last line (kill -9) goes too. Step -1, a new run, starts a new log."""
    kept = []
    if step >= 0 and os.path.exists(path):
        with open(path) as f:
            for line in f:
                with contextlib.suppress(ValueError, KeyError):
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
    with open(path, "w") as f:
        f.writelines(kept)


# --- 7. the report ----------------------------------------------------------------------------------------------

def compressors(data, seen=b""):
    """{name: bits per byte} of gzip, bzip2 and xz at their strongest on the same held-out bytes, as one stream.
    With `seen`, also xz that has read the training text: what it adds for data after seen."""
    xz = lambda b: len(lzma.compress(b, preset=9 | lzma.PRESET_EXTREME))
    sizes = {"gzip -9": len(gzip.compress(data, 9)), "bzip2 -9": len(bz2.compress(data, 9)), "xz -9e": xz(data)}
    if seen:
        sizes["xz -9e after the training text"] = xz(seen + data) - xz(seen)
    return {name: 8 * n / max(1, len(data)) for name, n in sizes.items()}


def report(s, result, tokenizer, train_tokens, val_tokens):
    """The closing table, the plot and one sample."""
    run, held_out = result["run"], val_tokens[:s.val_tokens]
    text = lambda ids: tokenizer.decode_bytes(ids[ids != tokenizer.eot_id].tolist())
    others = compressors(text(held_out), text(train_tokens[:20_000_000]) if run.elapsed > 600 else b"")
    first, tokens = run.first_val, fields_tokens(run)
    rows = [["at the start", f"{first['val_loss']:.4f}", f"{first['val_bpb']:.3f}"],
            ["at the end", f"{result['val_loss']:.4f}", f"{result['val_bpb']:.3f}"],
            [f"ln V, V = {tokenizer.vocab_size:,}: knowing nothing", f"{math.log(tokenizer.vocab_size):.4f}", ""],
            *[[name, "", f"{bpb:.3f}"] for name, bpb in others.items()]]
    M.table(f"Held-out text, {len(held_out):,} tokens, {run.token_bytes[held_out].sum():,} bytes", ["", "loss, nats/token", "bits/byte"], rows)
    best = min(others, key=others.get)
    verdict = "below every compressor" if result["val_bpb"] < others[best] else f"{best} is better; train longer: --minutes {2 * run.elapsed / 60:.0f}"
    print(f"  {result['val_bpb']:.3f} bits/byte: {verdict}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if "cuda" in run.device:
        peak = torch.cuda.max_memory_allocated()
    print(f"  {tokens:,} tokens ({tokens / len(train_tokens):.2f} epochs) in {run.elapsed:.0f} s, {tokens / max(run.elapsed, 1e-9):,.0f} tok/s, "
          f"{3 * sum(M.flops_per_token(run.config).values()) * tokens / max(run.elapsed, 1e-9) / 1e9:,.0f} GFLOP/s; "
          f"memory {sum(result['plan'].values()) / 1e9:.2f} GB predicted, {peak / 1e9:.2f} GB peak of the process")
    plot(os.path.join(s.out, "loss.png"), result["log"], len(held_out) and run, others)
    prompt = tokenizer.encode(s.prompt, allowed_special=())
    ids = M.generate(run.model, [tokenizer.eot_id, *prompt], s.sample_tokens, temperature=0.8, top_p=0.95, stop=(tokenizer.eot_id,),
                     generator=torch.Generator().manual_seed(s.seed))
    print(f"\nSample (temperature 0.8, top_p 0.95), prompt {s.prompt!r}:\n\n{s.prompt}{tokenizer.decode(ids)}\n")
    print(f"saved {result['checkpoint']}, {result['log']}, {os.path.join(s.out, 'loss.png')}")


def plot(path, log_path, run, others):
    """Bits per byte against tokens read: training loss (smoothed), held-out text, and the compressors as lines."""
    plt = M.pyplot()
    if plt is None:
        return
    records = [json.loads(line) for line in open(log_path)]
    scale = run.first_val["val_bpb"] / run.first_val["val_loss"]             # nats a token -> bits a byte, on this text
    steps = [r for r in records if r["kind"] == "train" and math.isfinite(r["loss"])]
    smooth, width = [], max(1, len(steps) // 100)
    for i in range(len(steps)):
        smooth.append(scale * statistics.fmean(r["loss"] for r in steps[max(0, i - width + 1):i + 1]))
    val = [r for r in records if r["kind"] == "val"]
    fig, ax = plt.subplots(figsize=(8, 4.5))
    ax.plot([r["tokens"] / 1e6 for r in steps], smooth, lw=1, label="training")
    ax.plot([r["tokens"] / 1e6 for r in val], [r["val_bpb"] for r in val], "o-", ms=4, label="held out")
    for (name, bpb), colour in zip(others.items(), ("C2", "C3", "C4", "C5")):
        ax.axhline(bpb, ls="--", lw=1, color=colour, label=f"{name}: {bpb:.2f}")
    ax.set(xlabel="million tokens read", ylabel="bits per byte", ylim=(min([*others.values(), val[-1]["val_bpb"]]) - 0.2, 4))
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


# --- 8. many runs: sweeps and ablations -------------------------------------------------------------------------

def run_many(name, variants, seeds, s, data):
    """[(label, {flag: value})] -> {label: [bits per byte, one a seed]}. Every finished run is a line of out/NAME/results.jsonl;
    a second call with the same settings reads it there."""
    folder = os.path.join(s.out, name)
    os.makedirs(folder, exist_ok=True)
    path, done = os.path.join(folder, "results.jsonl"), {}
    if os.path.exists(path):
        for line in open(path):
            with contextlib.suppress(ValueError):                            # a line cut by a kill
                r = json.loads(line)
                done[r["key"]] = r
    results, start, fresh, total = {}, time.perf_counter(), 0, len(variants) * len(seeds)
    for i, (seed, (label, change)) in enumerate(itertools.product(seeds, variants)):
        changed = argparse.Namespace(**{**vars(s), **change, "seed": seed, "out": os.path.join(folder, f"{i}")})
        key = json.dumps({k: v for k, v in vars(changed).items() if k not in ("out", "sweep")}, sort_keys=True, default=str)
        if key not in done:
            os.makedirs(changed.out, exist_ok=True)
            with contextlib.suppress(FloatingPointError):                    # a run that diverges is a result, too
                r = train(changed, *data, quiet=True)
                done[key] = dict(key=key, label=label, seed=seed, bpb=r["val_bpb"], loss=r["val_loss"], seconds=r["run"].elapsed,
                                 params=M.num_params(r["run"].config), log=r["log"])
            done.setdefault(key, dict(key=key, label=label, seed=seed, bpb=math.inf, loss=math.inf, seconds=0.0, params=0, log=None))
            with open(path, "a") as f:
                f.write("\n" + json.dumps(done[key]) + "\n")                 # a fresh line, even after one that was cut
            fresh += 1
        left = (time.perf_counter() - start) / max(1, fresh) * (total - i - 1)
        print(f"  run {i + 1:>3}/{total} | {label:<28} | seed {seed} | {done[key]['bpb']:.4f} bits/byte | {done[key]['seconds']:5.0f} s | "
              f"{left // 60:.0f}:{left % 60:02.0f} left at most", flush=True)
        results.setdefault(label, []).append(done[key])
    return results


def results_table(title, results):
    """One row a variant: the mean over seeds, the spread, and the distance from the first row in units of that spread."""
    base = statistics.fmean(r["bpb"] for r in next(iter(results.values())))
    rows = []
    for label, rs in results.items():
        values = [r["bpb"] for r in rs]
        rows.append([label, f"{rs[0]['params']:,}", f"{statistics.fmean(values):.4f}", f"{max(values) - min(values):.4f}",
                     f"{statistics.fmean(values) - base:+.4f}", f"{statistics.fmean(r['seconds'] for r in rs):.0f}"])
    M.table(title, ["variant", "parameters", "bits/byte", "max - min", "against the first", "seconds"], rows)


def plot_many(path, results):
    plt = M.pyplot()
    if plt is None:
        return
    fig, ax = plt.subplots(figsize=(9, 5))
    for label, rs in results.items():
        curves = [[json.loads(line) for line in open(r["log"])] for r in rs if r["log"] and os.path.exists(r["log"])]
        curves = [[(r["tokens"], r["val_bpb"]) for r in c if r["kind"] == "val" and r["tokens"]] for c in curves]
        if curves:
            points = list(zip(*curves))
            ax.plot([p[0][0] / 1e6 for p in points], [statistics.fmean(v for _, v in p) for p in points], "o-", ms=3, label=label)
    ax.set(xlabel="million tokens read", ylabel="bits per byte, held out (mean over seeds)")
    ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)
    print(f"saved {path}")


def sweep(s, data):
    """--sweep lr=0.01,0.02 d_model=128,192: the grid of all given values, one run each."""
    names, values = [], []
    for item in s.sweep:
        name, _, listed = item.partition("=")
        names.append(name)
        values.append([setting_value(name, v) for v in listed.split(",")])
    variants = [(" ".join(f"{n}={v}" for n, v in zip(names, combo)), dict(zip(names, combo))) for combo in itertools.product(*values)]
    results = run_many("sweep", variants, [s.seed], s, data)
    results_table(f"Sweep over {' x '.join(names)}", dict(sorted(results.items(), key=lambda r: r[1][0]["bpb"])))


# The lecture's ablations, all at equal tokens. Where a change moves the best learning rate, the variant brings its own:
# each was chosen by --sweep among factors of two.
ABLATIONS = [
    ("the default", {}),
    ("no norm", dict(norm="none")),
    ("post-norm", dict(norm_position="post")),
    ("NoPE: no positions", dict(position="none")),
    ("learned positions", dict(position="learned")),
    ("LayerNorm", dict(norm="layernorm")),
    ("no QK-norm", dict(qk_norm=False)),
    ("SiLU, 4D, no gate", dict(ffn="silu")),
    ("parallel block", dict(parallel=True)),
    ("AdamW", dict(optimizer="adamw")),
    ("cosine", dict(schedule="cosine")),
    ("tied embeddings", dict(tie_embeddings=True)),
    ("Glorot init, no zeros", dict(init="glorot")),
]


def ablate(s, data):
    results = run_many("ablate", ABLATIONS, [s.seed, s.seed + 1, s.seed + 2], s, data)
    results_table("Ablations, equal tokens, three seeds", results)
    plot_many(os.path.join(s.out, "ablate.png"), results)


# --- the command line -------------------------------------------------------------------------------------------

TRAINING = {  # what a preset changes besides the model's shape
    "tiny": dict(minutes=3.0),
    "small": dict(minutes=60.0, batch_size=16),
    "tinystories": dict(tokens=327_680_000, batch_size=128, minutes=0.0),
    "gpt2-recipe": dict(minutes=3.0, optimizer="adamw", schedule="cosine", lr=1e-3, final_lr=0.1, head_lr=1.0, embedding_lr=1.0),
    "gpt2": dict(tokens=10_000_000_000, batch_size=480, micro_batch=12, minutes=0.0, lr=6e-4, optimizer="adamw",
                 schedule="cosine", final_lr=0.1, head_lr=1.0, embedding_lr=1.0),
}
ABLATION = dict(num_layers=3, tokens=300_000, minutes=0.0, val_tokens=40_000, evals=5)


def make_parser():
    p = M.cli(__doc__)
    mode = p.add_argument_group("what to do (default: one training run)")
    mode.add_argument("--resume", action="store_true", help="continue the run in --out, with its settings")
    mode.add_argument("--ablate", action="store_true", help="train the lecture's ablations, three seeds each")
    mode.add_argument("--sweep", nargs="+", default=None, metavar="FLAG=V1,V2", help="train every combination of these values")
    data = p.add_argument_group("data")
    data.add_argument("--data", nargs="+", default=None, metavar="PATH", help="text files or folders, or a folder with train.bin, val.bin "
                      "and tokenizer.json; default: the Python standard library")
    data.add_argument("--val", nargs="+", default=None, metavar="PATH", help="held-out text; default: a fixed 5%% of the files of --data")
    data.add_argument("--corpus", default=None, help="a public corpus by name, fetched once: tinyshakespeare, tinystories, owt, fineweb-edu")
    data.add_argument("--tokenizer", default=None, metavar="PATH", help="a tokenizer.json to use; default: train one on the data")
    data.add_argument("--errors", choices=("strict", "replace"), default="strict", help="what to do with invalid UTF-8")
    data.add_argument("--out", default="out", metavar="DIR", help="folder for everything the run makes")
    budget = p.add_argument_group("budget (one of three; the schedule ends exactly there)")
    budget.add_argument("--minutes", type=float, default=0.0, help="wall-clock minutes of training")
    budget.add_argument("--steps", type=int, default=0, help="optimizer steps")
    budget.add_argument("--tokens", type=int, default=0, help="training tokens")
    o = p.add_argument_group("optimization")
    o.add_argument("--batch_size", type=int, default=16, help="sequences per optimizer step")
    o.add_argument("--micro_batch", type=int, default=0, help="sequences at a time, accumulated to batch_size; 0: all at once")
    o.add_argument("--optimizer", choices=("muon", "adamw", "sgd"), default="muon", help="muon: for hidden matrices, AdamW for the rest")
    o.add_argument("--lr", type=float, default=0.02, help="peak learning rate")
    o.add_argument("--head_lr", type=float, default=0.3, help="factor on lr for the output matrix")
    o.add_argument("--embedding_lr", type=float, default=10.0, help="factor on lr for the embeddings")
    o.add_argument("--schedule", choices=SCHEDULES, default="wsd", help="shape of the learning rate over the run")
    o.add_argument("--warmup", type=float, default=0.02, help="share of the run in which the rate rises")
    o.add_argument("--final_lr", type=float, default=0.0, help="last rate as a share of the peak")
    o.add_argument("--weight_decay", type=float, default=0.1, help="pull on hidden matrices, times the rate")
    o.add_argument("--momentum", type=float, default=0.95, help="Muon's average of gradients")
    o.add_argument("--beta1", type=float, default=0.9, help="AdamW's average of gradients (SGD: momentum)")
    o.add_argument("--beta2", type=float, default=0.95, help="AdamW's average of squared gradients")
    o.add_argument("--clip", type=float, default=1.0, help="largest l2 norm of all gradients together")
    o.add_argument("--z_loss", type=float, default=0.0, help="weight of mean(log Z)^2 in the objective")
    o.add_argument("--max_bad_steps", type=int, default=10, help="non-finite steps in a row before giving up")
    o.add_argument("--noise_scale", action=argparse.BooleanOptionalAction, default=False, help="estimate the gradient noise scale (needs --micro_batch)")
    r = p.add_argument_group("running")
    r.add_argument("--device", default="auto", help="cuda, mps or cpu; auto takes the first there is")
    r.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="of matrix products; auto: bf16 on GPUs that have it")
    r.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile: a minute to start, faster steps on a GPU")
    r.add_argument("--checkpoint_blocks", action=argparse.BooleanOptionalAction, default=False, help="recompute blocks in backward: memory for time")
    r.add_argument("--threads", type=int, default=0, help="CPU threads; 0: one a core")
    r.add_argument("--seed", type=int, default=0, help="of weights, data order and samples")
    r.add_argument("--evals", type=int, default=8, help="evaluations during the run")
    r.add_argument("--eval_tokens", type=int, default=8192, help="held-out tokens in each of them")
    r.add_argument("--val_tokens", type=int, default=1_000_000, help="held-out tokens before and after the run")
    r.add_argument("--save_minutes", type=float, default=5.0, help="minutes between checkpoints")
    r.add_argument("--log_seconds", type=float, default=5.0, help="seconds between lines on the screen")
    r.add_argument("--prompt", default="def ", help="start of the sample")
    r.add_argument("--sample_tokens", type=int, default=150, help="length of the sample, tokens")
    M.add_model_flags(p)
    return p


def settings(argv=None, parser=None):
    """Command line -> (every setting, those that were typed). Typed flags beat the preset, the preset beats the defaults."""
    parser = parser or make_parser()
    unset = object()
    known = {a.dest: a.default for a in parser._actions if a.dest != "help"}
    typed = {k: v for k, v in vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(known, unset)))).items() if v is not unset}
    preset = dict(TRAINING.get(typed.get("preset", known["preset"]), {}))
    if typed.get("ablate"):
        preset.update(ABLATION)
    if {"minutes", "steps", "tokens"} & typed.keys():                        # a typed budget replaces the preset's
        preset.update(minutes=0.0, steps=0, tokens=0)
    defaults = {k: v for k, v in known.items() if v != argparse.SUPPRESS}
    return argparse.Namespace(**{**defaults, **preset, **typed}), typed


def setting_value(name, text):
    """A value from --sweep, typed as the flag of that name is."""
    s, typed = settings([f"--{name}", text] if text not in ("True", "False") else [f"--{name}" if text == "True" else f"--no-{name}"])
    return typed[name]


def check(s):
    """Values that argparse cannot judge alone."""
    budgets = [k for k in ("minutes", "steps", "tokens") if getattr(s, k)]
    if len(budgets) != 1:
        raise ValueError(f"give one budget, not {len(budgets)} ({', '.join(budgets) or 'none'}): --minutes 3, --steps 1000 or --tokens 1000000")
    for name, low in dict(minutes=0, steps=0, tokens=0, batch_size=1, micro_batch=0, lr=0, head_lr=0, embedding_lr=0, clip=0, eval_tokens=1, val_tokens=2,
                          weight_decay=0, evals=0, save_minutes=0, max_bad_steps=1, threads=0, sample_tokens=0, z_loss=0, log_seconds=0).items():
        if not low <= getattr(s, name) < math.inf:
            raise ValueError(f"--{name} {getattr(s, name)} is out of range: {low} or more")
    for name in ("warmup", "final_lr", "momentum", "beta1", "beta2"):
        if not 0 <= getattr(s, name) <= (1 if name == "final_lr" else 0.9999):
            raise ValueError(f"--{name} {getattr(s, name)} is out of range: from 0 to below 1")
    if s.micro_batch and s.batch_size % s.micro_batch:
        raise ValueError(f"--batch_size {s.batch_size} is not a multiple of --micro_batch {s.micro_batch}: "
                         f"try --batch_size {s.micro_batch * max(1, round(s.batch_size / s.micro_batch))}")
    if s.corpus and s.data:
        raise ValueError(f"--corpus {s.corpus} and --data {' '.join(s.data)} are two sources: give one")
    if s.noise_scale and (not s.micro_batch or s.micro_batch == s.batch_size):
        raise ValueError("--noise_scale compares a micro-batch with the batch: give --micro_batch a divisor of "
                         f"--batch_size {s.batch_size}, such as {max(1, s.batch_size // 4)}")


FREE_ON_RESUME = {"resume", "out", "device", "threads", "evals", "eval_tokens", "val_tokens", "save_minutes", "log_seconds", "prompt",
                  "sample_tokens", "minutes", "steps", "tokens", "compile", "max_bad_steps"}


def resume_settings(s, typed):
    """The settings of the run in s.out, with the typed ones that may change; -> (settings, checkpoint)."""
    path = os.path.join(s.out, "checkpoint.pt")
    state = M.load_checkpoint(path)
    if "settings" not in state:
        raise ValueError(f"{path} holds no training state to resume (it was saved without settings): use it with infer.py, or train afresh")
    before = state["settings"]
    for k, v in typed.items():
        if k not in FREE_ON_RESUME and before.get(k) != v:
            raise ValueError(f"{path} was made with {k}={before.get(k)}, not {v}: drop --{k} to resume it, or drop --resume to start afresh")
    changed = {k: v for k, v in typed.items() if k in FREE_ON_RESUME}
    if {"minutes", "steps", "tokens"} & typed.keys():
        before = {**before, "minutes": 0.0, "steps": 0, "tokens": 0}
    return argparse.Namespace(**{**before, **changed, "resume": True, "out": s.out}), state


def open_data(s):
    """-> (tokenizer, train tokens, held-out tokens). Text is tokenised once; bpe.prepare says when it reuses what is there."""
    config = M.model_config(s)                                               # bad knobs show before long work
    if s.data and len(s.data) == 1 and os.path.exists(os.path.join(s.data[0], "train.bin")):
        folder = s.data[0]
        tokenizer = bpe.BPETokenizer.load(s.tokenizer or os.path.join(folder, "tokenizer.json"))
    else:
        folder = s.out
        text, held_out = s.data, s.val
        if s.corpus:
            files = bpe.fetch(s.corpus, s.out)                               # the training file, then the held-out one if there is
            text, held_out = files[:1], held_out or files[1:] or None
        tokenizer = bpe.prepare(s.out, text, held_out, vocab_size=config.vocab_size, errors=s.errors, tokenizer=s.tokenizer)["tokenizer"]
    train_tokens, val_tokens = (bpe.load_tokens(os.path.join(folder, f"{part}.bin"), tokenizer) for part in ("train", "val"))
    if len(val_tokens) < 2:
        raise ValueError(f"{os.path.join(folder, 'val.bin')} holds {len(val_tokens)} tokens: give held-out text with --val")
    return tokenizer, train_tokens, val_tokens


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
        data = open_data(s)
        if s.ablate or s.sweep:
            return ablate(s, data) if s.ablate else sweep(s, data)
        keep_old_checkpoint(s)
        result = train(s, *data, state)
        report(s, result, *data)
    except FloatingPointError as e:
        parser.exit(1, f"train.py: stopped: {e}\n")
    except (ValueError, OSError) as e:
        parser.error(M.first_line(e))
    except torch.OutOfMemoryError as e:
        parser.error(f"out of GPU memory ({M.first_line(e)}): try --micro_batch {max(1, (s.micro_batch or s.batch_size) // 2)} or --checkpoint_blocks")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted: nothing half-written is left; the same command starts again\n")


def keep_freed_memory():
    """On Linux, tell malloc not to hand large freed blocks back to the system: every step asks for the same ones again, and a
    fresh page costs a fault. 40,000 faults a step became 2,000, a tenth of the time of a small model on two cores."""
    with contextlib.suppress(OSError, AttributeError):                       # another C library: nothing lost
        libc, largest = ctypes.CDLL(None), 2**31 - 1
        libc.mallopt(-3, largest)                                            # M_MMAP_THRESHOLD
        libc.mallopt(-1, largest)                                            # M_TRIM_THRESHOLD


def keep_old_checkpoint(s):
    """A fresh run never silently overwrites an older one."""
    path = os.path.join(s.out, "checkpoint.pt")
    if not s.resume and os.path.exists(path):
        old = os.path.join(s.out, "checkpoint.old.pt")
        os.replace(path, old)
        print(f"note     the checkpoint of an earlier run is now {old}  (--resume would have continued it)")


if __name__ == "__main__":
    run_command()
