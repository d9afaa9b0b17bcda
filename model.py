"""model.py - lectures 2-3: the Transformer language model, and what it costs.

What   A function from token ids (B,T) to logits (B,T,V): logits[b,t] scores every candidate for token t+1
       given tokens 0..t. Inside: an embedding, L blocks of (attention, feed-forward) that each add to a
       residual stream of D numbers a token, a last norm, and a matrix to the vocabulary.
Why    Almost every number about training and serving follows from the shape alone. A forward pass costs
       two FLOPs a weight and token, the backward pass twice that: six FLOPs a weight and token to train.
       This file builds the model, predicts its costs in closed form, and counts them on the real thing:
       the two columns agree.

Equations
       rms_norm(x)    = x / sqrt(mean(x^2) + eps) * gain
       attention      = softmax(q k^T / sqrt(H)) v          query t sees keys 0..t only
       rope(x, m)     = x_pair * exp(i m theta^(-2j/H))      so that <q_m, k_n> depends on m - n alone
       swiglu(x)      = w2(silu(w1 x) * w3 x)
       block(x)       : x = x + attention(norm(x));  x = x + ffn(norm(x))
       loss           = mean over tokens of  log sum_v exp(z_v) - z_target            (nats a token)

Run    python model.py                      # 10 s on two cores: the tables below and out/model.png
       python model.py --preset gpt2        # the same accounting for another preset, or any --d_model, ...

You should see (two cores, CPU; shortened)
       model            parameters  GFLOPs/token    FFN  scores 1k    16k   128k  KV/token  training
       gpt2            124,439,808          0.28  39.8%      13.3%  71.0%  95.1%     37 kB    2.0 GB
       gpt2-xl       1,557,611,200          3.42  57.4%       9.2%  61.8%  92.8%    307 kB   24.9 GB
       llama2-7b     6,738,415,616         13.75  63.0%       3.9%  39.4%  83.9%    524 kB  107.8 GB
       quantity                                 predicted     counted   ratio
       parameters                               1,803,904   1,803,904  1.0000
       forward FLOPs a token                    3,080,192   3,080,192  1.0000
       backward FLOPs a token                   6,160,384   6,160,384  1.0000
       bytes kept for backward, batch 4 x 256  69,357,568  69,357,572  1.0000
       AdamW state bytes                       14,431,232  14,431,232  1.0000
       KV cache bytes a token, fp32                 4,096       4,096  1.0000
       first loss (ln V with init zero)            8.3178      8.3178  1.0000

Outline  1 the shape: ModelConfig, PRESETS   2 functions, written plainly   3 layers
         4 attention      5 feed-forward     6 the block and the model      -- stop here on a first reading --
         7 generation     8 accounting       9 checkpoints     10 command line, device, plots      11 demo

References  Vaswani et al. 2017 (Transformer), Xiong et al. 2020 (pre-norm), Zhang & Sennrich 2019 (RMSNorm),
            Su et al. 2021 (RoPE), Shazeer 2019 (multi-query), Ainslie et al. 2023 (grouped-query), Shazeer
            2020 (SwiGLU), Henry et al. 2020 (QK-norm), Beltagy et al. 2020 (sliding window), Gemma Team 2024
            (soft-capping), Wang & Komatsuzaki 2021 (parallel block), Press & Wolf 2017 (tied embeddings).
"""
import argparse
import contextlib
import math
import os
import pickle
import re
import warnings
from dataclasses import asdict, dataclass, field, fields

# How long an idle CPU thread spins before it sleeps. libgomp's default suits an idle machine only: beside one
# busy process, spinning threads wait for one another. Training the tiny model on two cores, tokens/s idle and
# beside a busy process: default 7,700 and 2,000; never spinning 3,900 and 3,300; this 8,600 and about 2,700.
# It must be set before torch loads its OpenMP.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
import torch.nn as nn
import torch.nn.functional as F

# Shape letters, everywhere: B batch, T query positions, S key positions, D d_model, N query heads,
# K key/value heads, H head dim, F feed-forward, V vocabulary, L layers.


# --- 1. the shape of a model --------------------------------------------------------------------------------

def knob(default, help, choices=None):
    """A ModelConfig field with its help text: the command line of every script is made from these."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class ModelConfig:
    """Everything that defines a model. Each knob is declared here and nowhere else."""
    vocab_size: int = knob(4096, "V, ids run from 0 to V-1")
    context_length: int = knob(256, "T, the longest sequence, in tokens")
    d_model: int = knob(128, "D, the width of the residual stream")
    num_layers: int = knob(4, "L, blocks")
    num_heads: int = knob(2, "N, query heads; the head dim is H = D/N")
    num_kv_heads: int = knob(0, "K, key/value heads: N is multi-head, 1 multi-query, between grouped; "
                                "0 means N")
    d_ff: int = knob(0, "F, feed-forward width; 0 means 8/3 D for gated kinds, else 4 D, "
                        "to the nearest multiple of 64")
    mixer: str = knob("attention", "what moves information between positions", ("attention",))
    ffn: str = knob("swiglu", "feed-forward kind",
                    ("swiglu", "geglu", "reglu", "silu", "gelu", "relu", "relu2"))
    norm: str = knob("rmsnorm", "normalisation", ("rmsnorm", "layernorm", "none"))
    norm_position: str = knob("pre", "where the norm sits: x+f(Nx), N(x+fx), x+N(f(Nx))",
                              ("pre", "post", "double"))
    norm_eps: float = knob(1e-5, "added to the mean square")
    parallel: bool = knob(False, "attention and feed-forward side by side instead of one after the other")
    position: str = knob("rope", "how positions enter", ("rope", "learned", "sinusoidal", "none"))
    rope_theta: float = knob(10000.0, "RoPE base: pair j turns once in 2 pi theta^(2j/H) tokens")
    qk_norm: bool = knob(False, "RMSNorm on queries and keys, so that no logit can explode")
    window: int = knob(0, "sliding window: a query sees this many keys, itself included; 0 means all")
    attn_softcap: float = knob(0.0, "c: attention logits become c tanh(l/c); 0 means off")
    logit_softcap: float = knob(0.0, "c: output logits become c tanh(l/c); 0 means off")
    dropout: float = knob(0.0, "probability of zeroing an activation (training only)")
    bias: str = knob("none", "which Linear and LayerNorm layers have a bias", ("none", "qkv", "all"))
    tie_embeddings: bool = knob(False, "the output matrix is the embedding matrix")
    init: str = knob("zero", "initial weights", ("zero", "glorot", "gpt2"))

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if f.type is float and type(value) is int:
                object.__setattr__(self, f.name, float(value))  # 10000 for 10000.0; the class is frozen
                continue
            if f.type is not bool and isinstance(value, bool) or not isinstance(value, f.type):
                raise ValueError(f"{f.name}={value!r} is not of type {f.type.__name__}: "
                                 f"give --{f.name} {f.default}")
            if choices and value not in choices:
                raise ValueError(f"{f.name}={value!r} is unknown: choose one of {', '.join(choices)}")
        for name in ("vocab_size", "context_length", "d_model", "num_layers", "num_heads", "rope_theta",
                     "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive: give --{name} 1 or more"
                                 if name != "norm_eps" else
                                 f"norm_eps={self.norm_eps} must be positive: try 1e-5")
        for name in ("num_kv_heads", "d_ff", "window", "attn_softcap", "logit_softcap"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative: 0 is the default")
        D, N = self.d_model, self.num_heads
        if D % N:
            raise ValueError(f"d_model={D} is not divisible by num_heads={N}: "
                             f"try --d_model {N * max(1, D // N)}")
        if N % self.kv_heads:
            raise ValueError(f"num_heads={N} is not divisible by "
                             f"num_kv_heads={self.kv_heads}: try --num_kv_heads "
                             f"{max(k for k in range(1, N + 1) if N % k == 0 and k <= self.kv_heads)}")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head dim d_model/num_heads={self.head_dim} is odd and RoPE turns pairs: "
                             f"try --d_model {N * (self.head_dim + 1)}")
        if self.position == "sinusoidal" and D % 2:                          # then N is odd, too
            raise ValueError(f"d_model={D} is odd and sinusoidal positions come in pairs: "
                             f"try --d_model {D + N}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is not a probability below 1: try --dropout 0.1")

    # The zeros above stand for "the usual"; these say what that is.
    kv_heads = property(lambda self: self.num_kv_heads or self.num_heads)                # K
    head_dim = property(lambda self: self.d_model // self.num_heads)                     # H
    gated = property(lambda self: self.ffn in GATES)

    @property
    def ffn_dim(self):                                                                   # F
        """A gated FFN has 3 matrices, a plain one 2: 3 * 8/3 D * D = 2 * 4D * D, but for rounding."""
        exact = self.d_model * 8 / 3 if self.gated else self.d_model * 4
        return self.d_ff or 64 * max(1, round(exact / 64))


_gpt2 = dict(vocab_size=50257, context_length=1024, norm="layernorm", position="learned", ffn="gelu",
             bias="all", tie_embeddings=True, init="gpt2")
_llama2 = dict(vocab_size=32000, context_length=4096, init="glorot")
# Large models keep D/L near 100 and H at 64 to 128; small ones do well with D/L = 32.
PRESETS = {  # name -> fields of ModelConfig
    "tiny": dict(qk_norm=True),  # two CPU cores, minutes
    "small": dict(d_model=256, num_layers=8, num_heads=4, context_length=512, qk_norm=True),  # 1 h, or a GPU
    "tinystories": dict(vocab_size=10000, d_model=512, d_ff=1344, num_layers=4, num_heads=16, qk_norm=True),
    "gpt2-recipe": dict(_gpt2, vocab_size=4096, context_length=256, d_model=128, num_layers=6, num_heads=2),
    "gpt2": dict(_gpt2, d_model=768, num_layers=12, num_heads=12),
    "gpt2-medium": dict(_gpt2, d_model=1024, num_layers=24, num_heads=16),
    "gpt2-large": dict(_gpt2, d_model=1280, num_layers=36, num_heads=20),
    "gpt2-xl": dict(_gpt2, d_model=1600, num_layers=48, num_heads=25),
    "llama2-7b": dict(_llama2, d_model=4096, num_layers=32, num_heads=32, d_ff=11008),
    "llama2-13b": dict(_llama2, d_model=5120, num_layers=40, num_heads=40, d_ff=13824),
}


# --- 2. functions, written plainly --------------------------------------------------------------------------
# Where torch has a fused call for one of these, the layers run that call; the tests hold the two equal.

def softmax(x, dim=-1):
    """exp(x) / sum exp(x). Adding a constant to x changes nothing, so the maximum is subtracted: exp never
    overflows. A row that is -inf throughout (nothing may be attended to) gives zeros."""
    top = x.amax(dim, keepdim=True).clamp(min=torch.finfo(x.dtype).min)      # -inf minus -inf would be NaN
    e = torch.exp(x - top)
    return e / e.sum(dim, keepdim=True).clamp(min=1)               # the maximum itself contributes exp(0) = 1


def silu(x):
    """x * sigmoid(x), also called swish: a ReLU with a smooth knee."""
    return x * torch.sigmoid(x)


def gelu(x):
    """x * P(standard normal < x), in the tanh form of GPT-2 (Hendrycks & Gimpel 2016)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rms_norm(x, gain, eps=1e-5):
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension, computed in fp32:
    bf16 squares lose the sum's low bits."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y * gain.float()).to(x.dtype)


def layer_norm(x, gain, bias=None, eps=1e-5):
    """(x - mean) / std * gain + bias (Ba et al. 2016). RMSNorm simplifies it by dropping mean and bias."""
    centred = x.float() - x.float().mean(-1, keepdim=True)
    y = rms_norm(centred, gain, eps)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def cross_entropy(logits, targets):
    """Mean over tokens of  log sum_v exp(z_v) - z_target, in nats. logits (...,V), targets (...) int64.
    V equal logits give ln V: the loss of a model that knows nothing, the first number to check in any run."""
    z = logits.float() - logits.float().amax(-1, keepdim=True)
    return (z.exp().sum(-1).log() - z.gather(-1, targets[..., None])[..., 0]).mean()


def scaled_dot_product_attention(q, k, v, mask=None, softcap=0.0):
    """softmax(q k^T / sqrt(H)) v.    q (...,T,H), k and v (...,S,H) -> (...,T,H).
    mask (...,T,S) bool, True = may attend.

    Entries of q k^T have variance H when those of q and k have variance 1; sqrt(H) brings it back
    to 1 so that the softmax starts soft. This form writes the (T,S) matrix to memory; the fused one
    never does (FlashAttention).
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])                # (...,T,S)
    scores = soft_cap(scores, softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)                        # after the softmax exactly 0
    return softmax(scores) @ v


def soft_cap(x, cap):
    """cap * tanh(x / cap): close to x while |x| is far below cap, never beyond it. 0 means off (Gemma 2)."""
    return cap * torch.tanh(x / cap) if cap else x


def attention_mask(positions, key_positions, window=0):
    """(...,T) and (...,S) -> (...,T,S) bool: key s is visible to query t when  t - window < s <= t."""
    distance = positions[..., :, None] - key_positions[..., None, :]
    return (distance >= 0) & (distance < window) if window else distance >= 0


def apply_rope(x, positions, theta=10000.0):
    """Rotary position embedding (Su et al. 2021).   x (...,T,H), positions (...,T) of integers -> (...,T,H).

    The pair (x[2j], x[2j+1]) is one complex number, turned by the angle  position * theta^(-2j/H): the first
    pair by one radian a token, the last almost not at all. Turning q by m and k by n leaves <q,k> a function
    of m - n, which is all that attention sees. Norms are kept, and position 0 is the identity.
    The pairs are neighbours (interleaved) as in the paper and Llama's code; Hugging Face pairs j with j+H/2.
    """
    H = x.shape[-1]
    real = x if x.dtype == torch.float64 else x.float()               # bf16 positions above 256 would collide
    rate = theta ** (-torch.arange(0, H, 2, device=x.device, dtype=real.dtype) / H)              # (H/2,)
    angle = positions[..., None] * rate                                                          # (...,T,H/2)
    pairs = real.unflatten(-1, (-1, 2))                                      # (...,T,H/2,2), a view
    if torch.compiler.is_compiling():              # the compiler fuses real arithmetic, not complex numbers
        (a, b), cos, sin = pairs.unbind(-1), angle.cos(), angle.sin()
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)     # (a + ib) exp(i angle)
    else:                                          # the same as one complex product: 8 times faster on a CPU
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.polar(torch.ones_like(angle), angle))
    return turned.flatten(-2).to(x.dtype)                                    # (...,T,H)


# The seam for faster attention: kernels.py puts its own function of the same arguments here.
attend = F.scaled_dot_product_attention


# --- 3. layers: parameters and how they start ---------------------------------------------------------------

class Linear(nn.Module):
    """y = x W^T + b, W (d_out, d_in): 2 d_in d_out FLOPs a token. Most models since PaLM (2022) omit b."""
    def __init__(self, d_in, d_out, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        # Variance 2/(d_in + d_out) keeps both the forward signal and the backward one near their size
        # (Glorot 2010); cut at three sigma, so that no weight starts far out.
        std = math.sqrt(2 / (d_in + d_out))
        nn.init.trunc_normal_(self.weight, 0, std, -3 * std, 3 * std)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Row ids of a (V, D) table: no FLOPs, and a gradient only in the rows that were used."""
    def __init__(self, num_rows, d_model):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, d_model))
        nn.init.trunc_normal_(self.weight, 0, 1, -3, 3)

    def forward(self, ids):
        return self.weight[ids]


class RMSNorm(nn.Module):
    def __init__(self, d, eps=1e-5, bias=False):                  # bias: RMSNorm has none; NORMS share a call
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(nn.Module):
    def __init__(self, d, eps=1e-5, bias=False):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps
        self.bias = nn.Parameter(torch.zeros(d)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Identity(nn.Module):
    """Stands where a norm would: the ablation without one, and the places a norm position leaves empty."""
    def __init__(self, d=0, eps=0.0, bias=False):
        super().__init__()

    def forward(self, x):
        return x


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm, "none": Identity}


# --- 4. attention: the one place where positions talk to each other -----------------------------------------

class KVCache:
    """Keys and values of one layer's past, so that decoding a token costs one token. Positions are stored
    with them: the mask is made from positions alone, so chunks of any size, and rows at different
    positions, need no special case."""
    def __init__(self, window=0):
        self.k = self.v = self.positions = None
        self.window = window

    def append(self, k, v, positions):
        """k, v (B,K,T,H), positions (T,) or (B,T) -> past and new. A window keeps its last keys only."""
        new = (k, v, positions)
        if self.k is not None:
            new = (torch.cat((self.k, k), -2), torch.cat((self.v, v), -2),
                   torch.cat((self.positions, positions), -1))
        k, v, positions = new
        first = max(0, k.shape[-2] - self.window + 1) if self.window else 0     # the next query brings one
        self.k, self.v, self.positions = k[..., first:, :], v[..., first:, :], positions[..., first:]
        return new


class Attention(nn.Module):
    """Causal self-attention with grouped heads: N query heads share K key/value heads
    (K = N multi-head, 1 multi-query).

    params D (N+2K) H + N H D      cache 2 K H numbers a token      FLOPs 2 params + 4 S N H a token
    """
    def __init__(self, c):
        super().__init__()
        self.c = c
        N, K, H = c.num_heads, c.kv_heads, c.head_dim
        self.wqkv = Linear(c.d_model, (N + 2 * K) * H, bias=c.bias != "none")  # three matrices in one product
        self.wo = Linear(N * H, c.d_model, bias=c.bias == "all")
        self.q_norm = RMSNorm(H, c.norm_eps) if c.qk_norm else Identity()
        self.k_norm = RMSNorm(H, c.norm_eps) if c.qk_norm else Identity()

    def forward(self, x, positions, cache=None):
        """x (B,T,D), positions (T,) or (B,T), cache KVCache or None -> (B,T,D). Positions rise along T.
        Without cache, window and soft-cap the mask comes from the order alone, not from their values."""
        c, (B, T, D) = self.c, x.shape
        N, K, H = c.num_heads, c.kv_heads, c.head_dim
        q, k, v = self.wqkv(x).view(B, T, N + 2 * K, H).split([N, K, K], 2)  # (B,T,N,H), 2 x (B,T,K,H)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))          # (B,N,T,H), views; so y below needs no copy
        if c.position == "rope":
            at = positions if positions.dim() == 1 else positions[:, None]  # (T,), or (B,1,T) for the heads
            q, k = apply_rope(q, at, c.rope_theta), apply_rope(k, at, c.rope_theta)
        key_positions = positions
        if cache is not None:
            k, v, key_positions = cache.append(k, v, positions)              # (B,K,S,H)
        y = self.choose_kernel(q, k, v, positions, key_positions, plain=cache is None)
        return self.wo(y.transpose(1, 2).reshape(B, T, N * H))

    def choose_kernel(self, q, k, v, positions, key_positions, plain):
        """The fused kernel, unless soft-capped. Plain: the queries are all the keys, so no mask is built."""
        c = self.c
        grouped = c.kv_heads < c.num_heads
        if plain and not c.attn_softcap and (not c.window or c.window >= q.shape[-2]):
            return attend(q, k, v, is_causal=True, enable_gqa=grouped)
        mask = attention_mask(positions, key_positions, c.window)            # (T,S) or (B,T,S)
        mask = mask if mask.dim() == 2 else mask[:, None]                    # the same for every head
        if not c.attn_softcap:
            return attend(q, k, v, attn_mask=mask, enable_gqa=grouped)
        # Head n reads group n // (N/K).
        k, v = (t.repeat_interleave(c.num_heads // c.kv_heads, 1) for t in (k, v))
        return scaled_dot_product_attention(q, k, v, mask, c.attn_softcap)  # the fused kernel has no soft-cap

    def make_cache(self):
        return KVCache(self.c.window)


# --- 5. feed-forward: each position alone -------------------------------------------------------------------

GATES = {"swiglu": F.silu, "geglu": lambda x: F.gelu(x, approximate="tanh"), "reglu": F.relu}
ACTIVATIONS = {"silu": F.silu, "gelu": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu,
               "relu2": lambda x: F.relu(x).square()}                        # relu2: Primer (So et al. 2021)


class GatedFFN(nn.Module):
    """w2(act(w1 x) * w3 x): half of the hidden layer decides how much of the other half passes. SwiGLU when
    act is SiLU (Shazeer 2020, who attributes its success "to divine benevolence").      params 3 D F"""
    def __init__(self, c):
        super().__init__()
        bias, self.act = c.bias == "all", GATES[c.ffn]
        self.w1 = Linear(c.d_model, c.ffn_dim, bias)                         # gate
        self.w3 = Linear(c.d_model, c.ffn_dim, bias)                         # up
        self.w2 = Linear(c.ffn_dim, c.d_model, bias)                         # down

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class FFN(nn.Module):
    """w2(act(w1 x)).      params 2 D F"""
    def __init__(self, c):
        super().__init__()
        bias, self.act = c.bias == "all", ACTIVATIONS[c.ffn]
        self.w1 = Linear(c.d_model, c.ffn_dim, bias)
        self.w2 = Linear(c.ffn_dim, c.d_model, bias)

    def forward(self, x):
        return self.w2(self.act(self.w1(x)))


MIXERS = {"attention": Attention}                                            # mixer(x, positions, cache) -> y
FFNS = {**dict.fromkeys(GATES, GatedFFN), **dict.fromkeys(ACTIVATIONS, FFN)}  # ffn(x) -> y


# --- 6. the block and the model -----------------------------------------------------------------------------

class Block(nn.Module):
    """Two branches read the residual stream and add to it. Where the norm sits decides how well it trains:
    pre     x + f(N x)      unobstructed path from loss to embedding; needs a norm at the end (the standard)
    post    N(x + f(x))     original Transformer: every path crosses 2L norms, needs warm-up and a lower rate
    double  x + N'(f(N x))  norms around the branch, none on the stream (Gemma 2)
    """
    def __init__(self, c):
        super().__init__()
        def norm(*places):
            return (NORMS[c.norm](c.d_model, c.norm_eps, c.bias == "all") if c.norm_position in places else
                    Identity())
        self.mixer, self.ffn, self.c = MIXERS[c.mixer](c), FFNS[c.ffn](c), c
        self.norm1, self.norm2 = norm("pre", "double"), Identity() if c.parallel else norm("pre", "double")
        self.out1, self.out2 = norm("double"), norm("double")
        self.after1, self.after2 = Identity() if c.parallel else norm("post"), norm("post")

    def forward(self, x, positions, cache=None):
        drop = lambda y: F.dropout(y, self.c.dropout, self.training)         # at 0 a no-op
        if self.c.parallel:             # one norm, and under tensor parallelism one all-reduce instead of two
            h = self.norm1(x)
            return self.after2(x + drop(self.out1(self.mixer(h, positions, cache)))
                               + drop(self.out2(self.ffn(h))))
        x = self.after1(x + drop(self.out1(self.mixer(self.norm1(x), positions, cache))))
        return self.after2(x + drop(self.out2(self.ffn(self.norm2(x)))))


class Transformer(nn.Module):
    """ids (B,T) int64 -> logits (B,T,V). With a cache, ids are the tokens that follow what it holds."""
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embedding = Embedding(c.vocab_size, c.d_model)
        self.position = Embedding(c.context_length, c.d_model) if c.position == "learned" else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        last = NORMS[c.norm] if c.norm_position != "post" else Identity  # a post-norm block ends in a norm
        self.norm = last(c.d_model, c.norm_eps, c.bias == "all")
        self.head = Linear(c.d_model, c.vocab_size)
        if c.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.checkpoint_blocks = False                               # recompute blocks in backward (train.py)
        initialise(self)

    def forward(self, ids, positions=None, cache=None):
        return soft_cap(self.head(self.features(ids, positions, cache)), self.config.logit_softcap)

    def features(self, ids, positions=None, cache=None):
        """The stream before the output matrix, (B,T,D): for a value head, a reward model or a fused loss."""
        c, T, past = self.config, ids.shape[-1], cache.length if cache is not None else 0
        if past + T > c.context_length:
            raise ValueError(f"{past + T} tokens do not fit context_length={c.context_length}: "
                             f"shorten the input, or train with --context_length {past + T}")
        if positions is None:
            positions = torch.arange(past, past + T, device=ids.device)
        x = self.embedding(ids)                                              # (B,T,D)
        if self.position is not None:
            x = x + self.position(positions)
        elif c.position == "sinusoidal":
            x = x + sinusoids(positions, c.d_model).to(x.dtype)
        x = F.dropout(x, c.dropout, self.training)
        for i, block in enumerate(self.blocks):
            if self.checkpoint_blocks and cache is None and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, positions, use_reentrant=False)
            else:
                x = block(x, positions, cache.layers[i] if cache is not None else None)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def make_cache(self):
        """An empty cache for all layers: model(ids, cache=cache), then model(next_ids, cache=cache), ..."""
        return Cache([block.mixer.make_cache() for block in self.blocks])


class Cache:
    """One entry a layer, and the number of tokens seen."""
    def __init__(self, layers):
        self.layers, self.length = layers, 0


def sinusoids(positions, d_model):
    """Fixed absolute positions (Vaswani et al. 2017): PE(p + k) is one linear map of PE(p), whatever p is."""
    rate = 10000.0 ** (-torch.arange(0, d_model, 2, device=positions.device) / d_model)
    angle = positions[..., None] * rate                                                          # (...,T,D/2)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)                               # (...,T,D)


@torch.no_grad()
def initialise(model):
    """Change the layers' own start (Glorot for Linear, N(0,1) for Embedding) where config.init asks for it.

    zero   the last matrix of every branch and the output matrix start at 0: each block is the identity
           (post: a norm), the first loss exactly ln V (untied) at any depth, and steps can be large from
           the start (Zhang et al. 2019, Fixup)
    gpt2   N(0, 0.02) everywhere, branch outputs / sqrt(2L) so that the stream's variance does not grow with L
    A tied table is also the output matrix: N(0,1) would give logits of variance D, so it starts at 0.02.
    """
    c = model.config
    for name, p in model.named_parameters():
        branch_output = name.endswith(("wo.weight", "w2.weight"))
        if c.init == "gpt2" and p.dim() == 2:
            p.normal_(0, 0.02 / math.sqrt(2 * c.num_layers) if branch_output else 0.02)
        elif c.tie_embeddings and name == "embedding.weight":
            p.normal_(0, 0.02)
        elif c.init == "zero" and (branch_output or name == "head.weight"):
            p.zero_()


def lm_loss(logits, targets, z_loss=0.0):
    """(cross-entropy, cross-entropy + z_loss * mean(log Z)^2): report the first, minimise the second.

    log Z = log sum_v exp(z_v) may drift: softmax does not see it. The z term holds it near 0 (PaLM 2022).
    """
    logits = logits.flatten(0, -2).float()                                   # (B*T,V)
    ce = F.cross_entropy(logits, targets.flatten())
    return ce, ce + z_loss * logits.logsumexp(-1).square().mean() if z_loss else ce


# --- stop here on a first reading ---------------------------------------------------------------------------
# You have seen the whole model. What follows is about using it and knowing what it costs.


# --- 7. generation, naive -----------------------------------------------------------------------------------

def next_token_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """logits (...,V) -> probabilities to draw from. Temperature 0 is greedy: all mass on the
    largest logit. top_k keeps the k likeliest; top_p the smallest set whose mass reaches p
    (Holtzman et al. 2019), at least one."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    probs, order = softmax(logits.float() / temperature).sort(-1, descending=True)
    before = probs.cumsum(-1) - probs                                     # mass of the strictly likelier ones
    keep = before < top_p
    keep[..., 0] = True
    if top_k:
        keep[..., top_k:] = False
    probs = probs * keep
    return torch.zeros_like(probs).scatter(-1, order, probs / probs.sum(-1, keepdim=True))


@torch.no_grad()
def generate(model, ids, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop=(), generator=None):
    """Continue one sequence: list of ids in, new ids out; ends after any id in `stop`, which is not returned.

    The plain loop: each new token runs the model over the whole text again, O(T) forward passes of O(T)
    tokens. infer.py is about doing better. Text beyond context_length is forgotten from the left.
    """
    if not ids:
        raise ValueError("generate needs at least one token to start from: "
                         "give the end-of-text token for a fresh text")
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(f"temperature={temperature} (0 or more), top_p={top_p} (above 0, at most 1), "
                         f"top_k={top_k} (0 or more)")
    device, out, was_training = model.head.weight.device, [], model.training
    model.eval()
    for _ in range(max_new_tokens):
        seen = torch.tensor([(ids + out)[-model.config.context_length:]], device=device)
        probs = next_token_probs(model(seen)[0, -1], temperature, top_k, top_p)
        # Drawn on the CPU: the same on any device.
        token = torch.multinomial(probs.cpu(), 1, generator=generator).item()
        if token in stop:
            break
        out.append(token)
    model.train(was_training)
    return out


# --- 8. accounting: closed forms ----------------------------------------------------------------------------

def count_params(c):
    """{component: parameters} of a ModelConfig.
    Without embeddings about 12 L D^2: 4 D^2 attention + 8 D^2 FFN a layer."""
    D, N, K, H, F_, L, V = (c.d_model, c.num_heads, c.kv_heads, c.head_dim, c.ffn_dim,
                            c.num_layers, c.vocab_size)
    norm = {"rmsnorm": D, "layernorm": D * (2 if c.bias == "all" else 1), "none": 0}[c.norm]
    attention = D * (N + 2 * K) * H + N * H * D + (2 * H if c.qk_norm else 0)
    attention += {"none": 0, "qkv": (N + 2 * K) * H, "all": (N + 2 * K) * H + D}[c.bias]
    ffn = (3 if c.gated else 2) * D * F_ + ((2 if c.gated else 1) * F_ + D if c.bias == "all" else 0)
    return {"embedding": V * D, "position": c.context_length * D if c.position == "learned" else 0,
            "attention": L * attention, "ffn": L * ffn,
            "norms": L * norms_per_block(c) * norm + (norm if c.norm_position != "post" else 0),
            "head": 0 if c.tie_embeddings else V * D}


def num_params(c, embeddings=True):
    """All parameters, or those that multiply a token's activations in the blocks (what '12 L D^2' counts)."""
    parts = count_params(c)
    return sum(parts.values()) if embeddings else parts["attention"] + parts["ffn"] + parts["norms"]


def flops_per_token(c, context=None):
    """{component: forward FLOPs a token} at `context` keys a query. A product (m,n)x(n,p) is 2mnp FLOPs.

    scores is q k^T and the weighted sum of v: 4 S N H a layer, the only term that grows with context.
    Counted for all S keys, as the papers do; a causal kernel may skip half. The backward pass costs twice
    the forward: each product y = x W needs dx = dy W^T and dW = x^T dy. So training costs 3 x this,
    about 6 FLOPs a weight and token.
    """
    D, N, K, H, F_, L = c.d_model, c.num_heads, c.kv_heads, c.head_dim, c.ffn_dim, c.num_layers
    S = context or c.context_length
    return {"attention": L * 2 * (D * (N + 2 * K) * H + N * H * D),
            "scores": L * 4 * S * N * H,
            "ffn": L * 2 * (3 if c.gated else 2) * D * F_,
            "head": 2 * D * c.vocab_size}


def train_flops(c, tokens, context=None):
    return 3 * tokens * sum(flops_per_token(c, context).values())


def kv_bytes_per_token(c, bytes_per_number=2):
    """What decoding must keep, and read again for every new token: 2 K H numbers a layer.
    A window bounds the tokens."""
    return 2 * c.kv_heads * c.head_dim * c.num_layers * bytes_per_number


def optimizer_bytes(c, states=2, bytes_per_number=4):
    """AdamW keeps two fp32 numbers a parameter, SGD with momentum (and Muon) one.
    Weights and gradients come on top."""
    return num_params(c) * states * bytes_per_number


def activation_bytes(c, batch_size, context=None, checkpoint_blocks=False):
    """{component: bytes} the forward pass keeps for the backward one, in fp32: every product keeps its input.

    Exact for the CPU's kernels without dropout, window and soft-caps (a test counts it); CUDA's fused RMSNorm
    and attention keep D a norm and a block less. Tokens x (about 14 D + 4 F) x L + tokens x V: the last term,
    the logits, is why small models spend more memory on the vocabulary than on the blocks. With checkpointing
    a block keeps its input alone and runs twice: a third more FLOPs.
    """
    D, N, K, H, F_, L, T = (c.d_model, c.num_heads, c.kv_heads, c.head_dim, c.ffn_dim,
                            c.num_layers, context or c.context_length)
    # A norm: input, normalised (RMSNorm), 1/std (and mean).
    norm = {"rmsnorm": 2 * D + 1, "layernorm": D + 2, "none": 0}[c.norm]
    qk = (N + K) * (2 * H + 1) if c.qk_norm else (N + K) * H if c.position == "rope" else 0
    attention = D + (N + 2 * K) * H + qk + N * H + N                # input, q k v, changed q k, output, log Z
    hidden = {"relu": 1, "reglu": 3}.get(c.ffn, 4 if c.gated else 2)  # a ReLU's output tells its derivative
    block = attention + (0 if c.parallel else D) + hidden * F_ + norms_per_block(c) * norm
    rope = 2 * T * H if c.position == "rope" else 0                    # two tables of T x H/2 complex a layer
    last = (norm if c.norm_position != "post" else 0) + D + 4        # norm, the head's input, ids and targets
    tokens = batch_size * T
    return {"blocks": 4 * L * (tokens * D if checkpoint_blocks else tokens * block + rope),
            "last norm": 4 * tokens * last, "logits": 4 * tokens * c.vocab_size}


def norms_per_block(c):
    """pre and post 2, double 4; side by side, the two branches share the norm before (or after) them."""
    return {"pre": 2, "post": 2, "double": 4}[c.norm_position] - c.parallel


@contextlib.contextmanager
def count_saved_bytes(model):
    """with count_saved_bytes(model) as kept: loss = ...  ->  sum(kept.values()) bytes wait for backward.
    autograd hands every tensor it saves to a hook; a storage counts once, and the weights do not count."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive = []                                                           # a freed address could be used again

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(t)
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


# --- 9. checkpoints -----------------------------------------------------------------------------------------

def save_checkpoint(out, model, optimizer=None, step=0, **extra):
    """Write {config, model, optimizer, step, ...} to a path or an open binary file.

    To a path: a temporary file beside it, flushed to disk, then renamed over the old one. A crash, a full
    disk or a kill -9 at any moment leaves either the old checkpoint or the new one, never half of one.
    """
    while inner := getattr(model, "_orig_mod", getattr(model, "module", None)):
        model = inner                              # torch.compile and DistributedDataParallel wrap the module
    state = {"config": asdict(model.config), "model": model.state_dict(),
             "optimizer": optimizer.state_dict() if optimizer else None, "step": step, **extra}
    refuse_objects(state)
    if hasattr(out, "write"):
        return torch.save(state, out)
    out, temporary = os.fspath(out), f"{os.fspath(out)}.tmp"  # one name: what a kill -9 leaves is overwritten
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())                                     # on the disk, not only in the page cache
        os.replace(temporary, out)
    except (OSError, RuntimeError) as e:                           # torch reports a full disk as RuntimeError
        raise OSError(f"could not save {out}: {first_line(e)}; what was there before is unharmed. "
                      f"Free some space, or choose another folder with --out") from e
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def refuse_objects(value, name="checkpoint"):
    """Raise now what load_checkpoint would refuse later, such as a numpy number."""
    if isinstance(value, dict):
        for k, v in value.items():
            refuse_objects(v, f"{name}[{k!r}]")
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            refuse_objects(v, f"{name}[{i}]")
    elif not (isinstance(value, torch.Tensor) or value is None or type(value) in (bool, int, float, str)):
        raise TypeError(f"{name} is a {type(value).__name__}: "
                        f"a checkpoint holds tensors and plain values only")


def load_checkpoint(src, device="cpu"):
    """A path or an open binary file -> the dict that save_checkpoint wrote, tensors on `device`.

    weights_only=True: the file may hold tensors and plain values, nothing that runs code when it is opened.
    Raises FileNotFoundError or ValueError with what to do.
    """
    try:
        with open(src, "rb") if isinstance(src, (str, os.PathLike)) else contextlib.nullcontext(src) as f:
            with warnings.catch_warnings(action="ignore"):  # about odd files: the one line below says it
                state = torch.load(f, map_location=device, weights_only=True)
    except FileNotFoundError:
        folder = os.path.dirname(os.fspath(src)) or "."
        raise FileNotFoundError(f"no checkpoint at {src}: "
                                f"make one with  python train.py --out {folder}") from None
    except (PermissionError, IsADirectoryError) as e:
        raise OSError(f"cannot read {src}: {e.strerror}") from None
    except pickle.UnpicklingError as e:
        raise ValueError(f"{src} holds a pickled object that would run code when opened, or is damaged, "
                         f"and was refused ({first_line(e)}): "
                         f"a checkpoint holds tensors and plain values only") from None
    except Exception as e:     # a cut or altered zip archive fails anywhere in the reader, with any exception
        raise ValueError(f"{src} is truncated, damaged or no checkpoint ({first_line(e)}): "
                         f"go back to an older copy, or train again") from None
    kinds = {"config": dict, "model": dict, "step": int}
    wrong = [k for k, kind in kinds.items()
             if not isinstance(state, dict) or not isinstance(state.get(k), kind)]
    if wrong:
        raise ValueError(f"{src} is a torch file but no checkpoint of this project: "
                         f"{', '.join(wrong)} missing or odd")
    # Files saved by hand from a compiled or wrapped module carry these prefixes in every name, in any order.
    state["model"] = {re.sub(r"^(_orig_mod\.|module\.)+", "", k): v for k, v in state["model"].items()}
    return state


def load_model(src, device="cpu"):
    """A checkpoint (path, open file, or the loaded dict) -> Transformer with its weights, in eval mode."""
    state = src if isinstance(src, dict) else load_checkpoint(src, device)
    try:
        config = ModelConfig(**state["config"])
    except TypeError as e:
        raise ValueError(f"the checkpoint's config does not fit this model.py ({first_line(e)})") from None
    with torch.device(device):
        model = Transformer(config)
    load_weights(model, state["model"])
    return model.eval()


def load_weights(model, weights):
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        raise ValueError(f"the checkpoint's weights do not fit its config: "
                         f"{' '.join(str(e).split())[:200]}") from None


def first_line(e):
    return re.sub(r"\x1b\[[0-9;]*m", "", (str(e) or type(e).__name__).strip().split("\n")[0])[:300]


# --- 10. for every script: command line, device, tables, plots ----------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line on stderr, exit status 2."""
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}   ({self.prog} -h lists every flag)\n")


def cli(doc):
    class Format(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass
    return Parser(description=doc, formatter_class=Format, allow_abbrev=False,
                  usage="%(prog)s [--flag value ...]")


def add_model_flags(parser, preset="tiny"):
    """--preset and one flag a ModelConfig field. Flags left out take the preset's value, then the default."""
    group = parser.add_argument_group("model (every knob of ModelConfig; the preset sets what is not given)")
    group.add_argument("--preset", choices=PRESETS, default=preset, help="a named shape")
    for f in fields(ModelConfig):
        how = {"action": argparse.BooleanOptionalAction} if f.type is bool else \
              {"type": f.type, "choices": f.metadata["choices"],
               "metavar": "|".join(f.metadata["choices"] or [f.type.__name__.upper()])}
        group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=f.metadata["help"], **how)


def model_config(args, **override):
    """The parsed flags -> ModelConfig. `override` is what the data decides, such as vocab_size; it wins."""
    given = {f.name: getattr(args, f.name) for f in fields(ModelConfig) if hasattr(args, f.name)}
    return ModelConfig(**{**PRESETS[args.preset], **given, **override})


def pick_device(name="auto"):
    """cuda, then mps, then cpu; a name that is not there is an error, not a silent CPU run."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(d for d in have if have[d])
    if not have.get(name.split(":")[0]):
        raise ValueError(f"--device {name} is not available here: "
                         f"this machine has {', '.join(d for d in have if have[d])}")
    return name


def table(title, header, rows):
    """Print rows of strings in columns: the first to the left, numbers to the right."""
    width = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for r in [header, *rows]:
        print("  " + "  ".join(v.ljust(w) if i == 0 else v.rjust(w)
                               for i, (v, w) in enumerate(zip(r, width))))


def pyplot():
    """matplotlib.pyplot that draws to files, or None and one line where it is not installed:
    a run goes on without plots."""
    try:
        import matplotlib
    except ImportError:
        return print("no plot: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


# --- 11. demo -----------------------------------------------------------------------------------------------

def demo_formulas(names, contexts=(1024, 16384, 131072)):
    """Published shapes by the formulas alone: nothing of this size is built."""
    rows = []
    for name in names:
        c = ModelConfig(**PRESETS[name])
        n, flops = num_params(c), flops_per_token(c, 1024)
        scores = [flops_per_token(c, S)["scores"] / sum(flops_per_token(c, S).values()) for S in contexts]
        rows.append([name, f"{n:,}", f"{sum(flops.values()) / 1e9:.2f}",
                     f"{flops['ffn'] / sum(flops.values()):.1%}", *(f"{s:.1%}" for s in scores),
                     f"{kv_bytes_per_token(c) / 1e3:.0f} kB", f"{16 * n / 1e9:.1f} GB"])
    table("By the formulas (forward; FFN share at 1k; KV cache in bf16; "
          "training = 16 bytes a parameter with fp32 AdamW)",
          ["model", "parameters", "GFLOPs/token", "FFN", "scores 1k", "16k", "128k", "KV/token", "training"],
          rows)


def demo_counted(c, batch_size=4):
    """The same formulas against what this model really does, one training step of it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    torch.manual_seed(0)
    model, T = Transformer(c), c.context_length
    ids = torch.randint(0, c.vocab_size, (batch_size, T + 1))
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    with count_saved_bytes(model) as kept:
        loss = lm_loss(model(x), y)[0]
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):  # attention as two products
        again = lm_loss(model(x), y)[0]
    with FlopCounterMode(display=False) as backward, sdpa_kernel(SDPBackend.MATH):
        again.backward()
    adam = torch.optim.AdamW(model.parameters())
    adam.step()
    states = sum(t.nbytes for s in adam.state.values() for name, t in s.items() if name != "step")
    cache = model.make_cache()
    with torch.no_grad():
        model(x[:1], cache=cache)
    cached = sum(layer.k.nbytes + layer.v.nbytes for layer in cache.layers) / cache.length
    tokens, per_token = batch_size * T, sum(flops_per_token(c).values())
    rows = [("parameters", num_params(c), sum(p.numel() for p in model.parameters())),
            ("forward FLOPs a token", per_token, forward.get_total_flops() / tokens),
            ("backward FLOPs a token", 2 * per_token, backward.get_total_flops() / tokens),
            (f"bytes kept for backward, batch {batch_size} x {T}",
             sum(activation_bytes(c, batch_size).values()), sum(kept.values())),
            ("AdamW state bytes", optimizer_bytes(c), states),
            ("KV cache bytes a token, fp32", kv_bytes_per_token(c, 4), cached),
            ("first loss (ln V with init zero)", math.log(c.vocab_size), loss.item())]
    show = lambda v: f"{v:,.4f}" if v < 100 else f"{v:,.0f}"
    shape = ", ".join(f"{k} {v}" for k, v in asdict(c).items() if k.startswith(("d_", "num_")))
    table(f"This model ({shape}; {c.norm}, {c.position}, {c.ffn})",
          ["quantity", "predicted", "counted", "ratio"],
          [[n, show(p), show(m), f"{m / p:.4f}"] for n, p, m in rows])


def plot_shares(path, names):
    """Where the FLOPs go as models grow, and as contexts grow: the lecture's first picture."""
    plt = pyplot()
    if plt is None:
        return
    configs = [ModelConfig(**PRESETS[n]) for n in names]
    xl, contexts = ModelConfig(**PRESETS["gpt2-xl"]), [2**i for i in range(10, 18)]
    panels = [("as the model grows (1,024 tokens)", names, [flops_per_token(c, 1024) for c in configs]),
              ("GPT-2 XL as the context grows", [f"{S // 1024}k" for S in contexts],
               [flops_per_token(xl, S) for S in contexts])]
    fig, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for ax, (title, labels, flops) in zip(axes, panels):
        bottom = [0.0] * len(flops)
        for part, label in (("ffn", "feed-forward"), ("attention", "attention projections"),
                            ("scores", "attention scores"), ("head", "output matrix")):
            share = [f[part] / sum(f.values()) for f in flops]
            ax.bar(labels, share, bottom=bottom, label=label, width=0.8)
            bottom = [b + s for b, s in zip(bottom, share)]
        ax.set_title(title)
        ax.tick_params(axis="x", rotation=30)
    axes[0].set_ylabel("share of forward FLOPs")
    axes[1].legend(loc="lower left", fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    print(f"\nsaved {path}")


def demo(c, out):
    names = ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "llama2-7b", "llama2-13b"]
    demo_formulas(names)
    if num_params(c) < 5e8:
        demo_counted(c)
    else:
        print(f"\n{num_params(c):,} parameters: too large to build here, so the formulas stand alone")
    os.makedirs(out, exist_ok=True)
    plot_shares(os.path.join(out, "model.png"), names)


def main():
    parser = cli(__doc__)
    add_model_flags(parser)
    parser.add_argument("--out", default="out", help="folder for model.png")
    args = parser.parse_args()
    try:
        demo(model_config(args), args.out)
    except (ValueError, OSError) as e:
        parser.error(first_line(e))


if __name__ == "__main__":
    main()
