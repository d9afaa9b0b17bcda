"""model.py - lectures 2-4: the Transformer language model, and what it costs.

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
       linear, Mamba  : S_t = decay_t S_{t-1} + k_t^T v_t;  y_t = q_t S_t       a state instead of all keys
       MoE            = sum over a token's k of E experts of gate_e(x) ffn_e(x)
       loss           = mean over tokens of  log sum_v exp(z_v) - z_target            (nats a token)

Run    python model.py                      # under a minute on two cores: the tables below, a plot in out
       python model.py --preset gpt2        # the same accounting for another preset, or any --d_model, ...
       python model.py --layers MMMG        # ... or any other insides: sections 7 and 8
       python model.py import DIR --out out # a Hugging Face folder (GPT-2, Llama, Qwen, Mistral, Mixtral)
       python model.py export out/checkpoint.pt DIR   # and back, for transformers to load

You should see (two cores, CPU; shortened)
       model            parameters  GFLOPs/token    FFN  scores 1k    16k   128k  KV/token  training
       gpt2-xl       1,557,611,200          3.42  57.4%       9.2%  61.8%  92.8%    307 kB   24.9 GB
       llama2-7b     6,738,415,616         13.75  63.0%       3.9%  39.4%  83.9%    524 kB  107.8 GB
       quantity                                 predicted     counted   ratio
       parameters                               1,803,904   1,803,904  1.0000
       forward FLOPs a token                    3,080,192   3,080,192  1.0000
       bytes kept for backward, batch 4 x 256  69,357,568  69,357,572  1.0000
       Llama-2-13B's shape with other insides
       variant                             parameters  active  FLOPs/token  state 1k  state 128k
       multi-head attention                      13 G    13 G       26.5 G     839 M       107 G
       latent attention (MLA)                  11.8 G  11.8 G       24.3 G    47.2 M      6.04 G
       Mamba                                   15.2 G  15.2 G       30.3 G     212 M       212 M
       8 experts, 2 active                     38.5 G    13 G       26.5 G     839 M       107 G
       Associative recall    4 pairs  16 pairs  64 pairs  256 pairs
       attention                100%      100%      100%       100%
       linear                   100%      100%       87%        18%
       balance of 8 experts  busiest  idlest  nearly idle  dropped at capacity 1  last loss
       none                      64%    1.3%            3                    60%       1.60
       loss                      15%   11.6%            0                    15%       1.62

Outline  1 the shape: ModelConfig, PRESETS   2 functions, written plainly   3 layers
         4 attention      5 feed-forward     6 the block and the model      -- stop here on a first reading --
         7 other mixers   8 mixture of experts      9 generation      10 accounting      11 checkpoints
         12 Hugging Face checkpoints                 13 command line, device, plots      14 demo

References  Vaswani et al. 2017 (Transformer), Xiong et al. 2020 (pre-norm), Zhang & Sennrich 2019 (RMSNorm),
            Su et al. 2021 (RoPE), Shazeer 2019 (multi-query), Ainslie et al. 2023 (grouped-query), Shazeer
            2020 (SwiGLU), Henry et al. 2020 (QK-norm), Beltagy et al. 2020 (sliding window), Gemma Team 2024
            (soft-capping), Wang & Komatsuzaki 2021 (parallel block), Press & Wolf 2017 (tied embeddings);
            those of sections 7 and 8 stand there. Models that pool bytes inside (MEGABYTE, BLT) or hash words
            (T-FREE) are not here; train.py --tokenizer bytes is.
"""
import argparse
import contextlib
import copy
import functools
import json
import math
import os
import pickle
import re
import shutil
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, fields, replace

# How long an idle CPU thread spins before it sleeps. libgomp's default suits an idle machine only: beside one
# busy process, spinning threads wait for one another. Training the tiny model on two cores, tokens/s idle and
# beside a busy process: default 7,700 and 2,000; never spinning 3,900 and 3,300; this 8,600 and about 2,700.
# It must be set before torch loads its OpenMP.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
import torch.nn as nn
import torch.nn.functional as F

# Shape letters, everywhere: B batch, T query positions, S key positions, D d_model, N query heads,
# K key/value heads, H head dim, F feed-forward, V vocabulary, L layers, E experts.


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
    num_heads: int = knob(2, "N, query heads")
    num_kv_heads: int = knob(0, "K, key/value heads: N multi-head, 1 multi-query, else grouped; 0 means N")
    d_head: int = knob(0, "H, head dim; 0 means D/N")
    d_ff: int = knob(0, "F, feed-forward width; 0 means 8/3 D if gated, else 4 D, to a multiple of 64")
    mixer: str = knob("attention", "what moves information between positions",
                      ("attention", "shared", "mla", "linear", "mamba", "hyena"))
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
    bias: str = knob("none", "a bias in attention's q, k and v, or in all Linear and LayerNorm layers of "
                    "attention and dense feed-forwards", ("none", "qkv", "all"))
    tie_embeddings: bool = knob(False, "the output matrix is the embedding matrix")
    init: str = knob("zero", "initial weights", ("zero", "glorot", "gpt2", "mup"))
    # For a second reading: other mixers (section 7), experts and extra predictions (8), a longer context.
    layers: str = knob("", "a letter a layer, repeated: G global attention, L local (--window), C with the "
                           "keys of the last G or L, A mla, R linear, M mamba, H hyena; '': all --mixer")
    kv_latent: int = knob(0, "mla: C, the shared latent of keys and values; 0 means 4 H")
    rope_dims: int = knob(0, "mla: R, key dims that carry the position; 0 means H/2")
    num_experts: int = knob(0, "E, experts a layer (mixture of experts); 0 means one dense feed-forward")
    experts_per_token: int = knob(2, "k, experts that a token visits")
    shared_experts: int = knob(0, "experts that every token visits, besides")
    d_expert: int = knob(0, "width of one expert; 0 means F / (k + shared): as many active weights as dense")
    router: str = knob("topk", "who chooses: a token its k experts, an expert its tokens, or a balanced plan",
                       ("topk", "expert_choice", "sinkhorn"))
    capacity_factor: float = knob(0.0, "c: an expert takes c times its share and drops the rest; 0 means all")
    balance: str = knob("loss", "what keeps experts equally busy: a loss, a bias on the choice, nothing",
                        ("loss", "bias", "none"))
    balance_loss: float = knob(0.01, "weight of the balance loss")
    balance_devices: int = knob(1, "groups of experts that the loss balances, too; 1 means experts alone")
    router_z_loss: float = knob(0.001, "weight of mean (log Z)^2 of the router's logits")
    router_noise: float = knob(0.0, "std of noise on the router's logits (training only)")
    router_jitter: float = knob(0.0, "e: the router's input times 1-e .. 1+e (training only)")
    mtp: int = knob(0, "extra tokens predicted at each position in training (multi-token prediction)")
    rope_factor: float = knob(1.0, "f, Llama-3's stretched RoPE: slow pairs turn f times slower; 1 means off")
    rope_low_freq: float = knob(1.0, "turns in the original context below which a pair is stretched in full")
    rope_high_freq: float = knob(4.0, "turns in it above which a pair is left alone")
    rope_original_context: int = knob(8192, "the context before stretching, tokens")

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if f.type is float and type(value) is int:
                value = float(value)                                         # 10000 for 10000.0
                object.__setattr__(self, f.name, value)                      # the class is frozen
            if not isinstance(value, f.type) or isinstance(value, bool) != (f.type is bool):
                raise ValueError(f"{f.name}={value!r} is not of type {f.type.__name__}: "
                                 f"try --{f.name} {f.default}")
            if choices and value not in choices:
                raise ValueError(f"{f.name}={value!r} is unknown: choose one of {', '.join(choices)}")
            may_be_zero = f.default == 0 or f.name in ("balance_loss", "router_z_loss")
            if f.type in (int, float) and not (0 <= value < math.inf and (value or may_be_zero)):
                raise ValueError(f"{f.name}={value} must be {'0 or more' if may_be_zero else 'positive'} and "
                                 f"finite: try --{f.name} {f.default}")
        D, N, K, H = self.d_model, self.num_heads, self.kv_heads, self.head_dim
        for wrong, message in [
                (D % N and not self.d_head,
                 f"d_model={D} is not divisible by num_heads={N}: try --d_model {N * max(1, D // N)}"),
                (N % K, f"num_heads={N} is not divisible by num_kv_heads={K}: try --num_kv_heads "
                        f"{max(k for k in range(1, N + 1) if N % k == 0 and k <= K)}"),
                (self.position == "rope" and H % 2,
                 f"d_head={H} is odd and RoPE turns pairs: try --d_head {H + 1}"),
                (self.position == "sinusoidal" and D % 2,                # without d_head, N is odd then, too
                 f"d_model={D} is odd and sinusoidal positions come in pairs: "
                 f"try --d_model {D + (1 if self.d_head else N)}"),
                (self.dropout >= 1,
                 f"dropout={self.dropout} is not a probability below 1: try --dropout 0.1"),
                *variant_checks(self)]:                                      # of sections 7 and 8
            if wrong:
                raise ValueError(message)

    # The zeros above stand for "the usual"; these say what that is.
    kv_heads = property(lambda self: self.num_kv_heads or self.num_heads)                # K
    head_dim = property(lambda self: self.d_head or self.d_model // self.num_heads)      # H
    gated = property(lambda self: self.ffn in GATES)

    @property
    def ffn_dim(self):                                                                   # F
        """A gated FFN has 3 matrices, a plain one 2: 3 * 8/3 D * D = 2 * 4D * D, but for rounding."""
        exact = self.d_model * 8 / 3 if self.gated else self.d_model * 4
        return self.d_ff or 64 * max(1, round(exact / 64))

    @property
    def rope(self):                                        # what apply_rope takes after x and positions
        stretch = (self.rope_factor, self.rope_low_freq, self.rope_high_freq, self.rope_original_context)
        return (self.rope_theta, *stretch) if self.rope_factor != 1 else (self.rope_theta,)

    # For a second reading.
    latent_dim = property(lambda self: self.kv_latent or 4 * self.head_dim)              # C
    rotary_dim = property(lambda self: self.rope_dims or 2 * max(1, self.head_dim // 4))  # R, even
    expert_dim = property(lambda self: self.d_expert or
                          max(1, self.ffn_dim // (self.experts_per_token + self.shared_experts)))


_gpt2 = dict(vocab_size=50257, context_length=1024, norm="layernorm", position="learned", ffn="gelu",
             bias="all", tie_embeddings=True, init="gpt2")
_llama2 = dict(vocab_size=32000, context_length=4096, init="glorot")
# Large models keep D/L near 100 and H at 64 to 128; small ones do well with D/L = 32.
PRESETS = {  # name -> fields of ModelConfig
    "tiny": dict(qk_norm=True),  # two CPU cores, minutes
    "small": dict(d_model=192, num_layers=6, num_heads=3, context_length=512, qk_norm=True),  # an hour
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


def per_head(positions):
    """(T,) stays, (B,T) -> (B,1,T): the same positions for every head of a (B,N,T,H) tensor."""
    return positions if positions.dim() == 1 else positions[:, None]


def apply_rope(x, positions, theta=10000.0, *stretch):
    """Rotary position embedding (Su et al. 2021).   x (...,T,H), positions (...,T) of integers -> (...,T,H).

    The pair (x[2j], x[2j+1]) is one complex number, turned by the angle  position * theta^(-2j/H): the first
    pair by one radian a token, the last almost not at all. Turning q by m and k by n leaves <q,k> a function
    of m - n, which is all that attention sees. Norms are kept, and position 0 is the identity.
    The pairs are neighbours (interleaved) as in the paper and Llama's code; Hugging Face pairs j with j+H/2.
    stretch: the arguments of stretch_rope, for models whose context was made longer.
    """
    H = x.shape[-1]
    real = x if x.dtype == torch.float64 else x.float()               # bf16 positions above 256 would collide
    rate = theta ** (-torch.arange(0, H, 2, device=x.device, dtype=real.dtype) / H)              # (H/2,)
    rate = stretch_rope(rate, *stretch) if stretch else rate
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
        return F.embedding(ids, self.weight)               # weight[ids], with a gradient twice as fast


class RMSNorm(nn.Module):
    def __init__(self, d, eps=1e-5, bias=False):                  # bias: RMSNorm has none; NORMS share a call
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x):
        kind = torch.promote_types(x.dtype, self.weight.dtype)    # under autocast x is bf16, the gain fp32
        return F.rms_norm(x.to(kind), self.weight.shape, self.weight.to(kind), self.eps).to(x.dtype)


# norm(d, eps, bias). nn.Identity also stands in the places that a norm position leaves empty.
NORMS = {"rmsnorm": RMSNorm, "layernorm": lambda d, eps, bias: nn.LayerNorm(d, eps, bias=bias),
         "none": nn.Identity}


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
        if self.k is not None:
            k, v = torch.cat((self.k, k), -2), torch.cat((self.v, v), -2)
            positions = torch.cat((self.positions, positions), -1)
        first = max(0, k.shape[-2] - self.window + 1) if self.window else 0     # the next query brings one
        self.k, self.v, self.positions = k[..., first:, :], v[..., first:, :], positions[..., first:]
        return k, v, positions

    def nbytes(self):
        return self.k.nbytes + self.v.nbytes if self.k is not None else 0


class Attention(nn.Module):
    """Causal self-attention with grouped heads: N query heads share K key/value heads
    (K = N multi-head, 1 multi-query).

    params D (N+2K) H + N H D      cache 2 K H numbers a token      FLOPs 2 params + 4 S N H a token
    """
    lends = False                                          # SharedAttention, in section 7, sets it

    def __init__(self, c):
        super().__init__()
        self.c = c
        N, K, H = c.num_heads, c.kv_heads, c.head_dim
        self.wqkv = Linear(c.d_model, (N + 2 * K) * H, bias=c.bias != "none")  # three matrices in one product
        self.wo = Linear(N * H, c.d_model, bias=c.bias == "all")
        self.q_norm = RMSNorm(H, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(H, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, positions, cache=None):
        """x (B,T,D), positions (T,), consecutive, or (B,T), rising; cache KVCache or None -> (B,T,D).
        Without cache, window and soft-cap the mask comes from the order alone, not from their values."""
        c, (B, T, D) = self.c, x.shape
        N, K, H = c.num_heads, c.kv_heads, c.head_dim
        q, k, v = self.wqkv(x).view(B, T, N + 2 * K, H).split([N, K, K], 2)  # (B,T,N,H), 2 x (B,T,K,H)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))          # (B,N,T,H), views; so y below needs no copy
        if c.position == "rope":
            q, k = (apply_rope(t, per_head(positions), *c.rope) for t in (q, k))
        key_positions = positions
        if cache is not None:
            k, v, key_positions = cache.append(k, v, positions)              # (B,K,S,H)
        if self.lends:
            self.lent = k, v, key_positions, cache is None
        y = self.choose_kernel(q, k, v, positions, key_positions, plain=cache is None)
        return self.wo(y.transpose(1, 2).reshape(B, T, N * H))

    def choose_kernel(self, q, k, v, positions, key_positions, plain):
        """The fused kernel, unless soft-capped. Plain: the queries are all the keys, so no mask is built."""
        c = self.c
        grouped = c.kv_heads < c.num_heads
        # A window as wide as the text hides nothing, unless positions are given per row: they may lie apart.
        hides = c.window and (c.window < q.shape[-2] or positions.dim() > 1)
        if plain and not c.attn_softcap and not hides:
            return attend(q, k, v, is_causal=True, enable_gqa=grouped)
        mask = attention_mask(per_head(positions), per_head(key_positions), c.window)    # (T,S) or (B,1,T,S)
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


MIXERS = {"attention": Attention}  # mixer(x, positions, cache) -> y; section 7 adds the others
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
            kind = NORMS[c.norm] if c.norm_position in places else nn.Identity
            return kind(c.d_model, c.norm_eps, c.bias == "all")
        self.mixer, self.c = MIXERS[c.mixer](c), c
        self.ffn = MoE(c) if c.num_experts else FFNS[c.ffn](c)               # MoE: section 8
        self.norm1, self.norm2 = norm("pre", "double"), nn.Identity() if c.parallel else norm("pre", "double")
        self.out1, self.out2 = norm("double"), norm("double")
        self.after1, self.after2 = nn.Identity() if c.parallel else norm("post"), norm("post")

    def forward(self, x, positions, cache=None):
        p = self.c.dropout
        drop = lambda y: F.dropout(y, p, self.training) if p else y
        if self.c.parallel:             # one norm; under tensor parallelism both could share an all-reduce
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
        layers = layer_configs(c)                                            # all are c, without a pattern
        self.blocks = nn.ModuleList(Block(layer) for layer in layers)
        self.mtp = nn.ModuleList(Block(layers[0]) for _ in range(c.mtp))     # see training_loss
        lend_keys(self.blocks)
        last = NORMS[c.norm] if c.norm_position != "post" else nn.Identity   # post: a block ends in a norm
        self.norm = last(c.d_model, c.norm_eps, c.bias == "all")
        self.head = Linear(c.d_model, c.vocab_size)
        if c.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.checkpoint_blocks = False                               # recompute blocks in backward (train.py)
        initialise(self)

    def forward(self, ids, positions=None, cache=None):
        x = self.features(ids, positions, cache)
        if self.mtp:
            self.stream = x                                                  # for training_loss
        return soft_cap(self.head(x), self.config.logit_softcap)

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
        x = F.dropout(x, c.dropout, self.training) if c.dropout else x
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

    def __deepcopy__(self, memo):
        """What the last forward pass left behind hangs on its graph, which cannot be copied: let go of it."""
        for m in self.modules():
            m.__dict__.update({k: v for k, v in dict(aux_loss=0.0, lent=None, stream=None).items()
                               if k in m.__dict__})
        memo[id(self)] = new = self.__class__.__new__(self.__class__)
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

    def aux_loss(self):
        """What the experts of the last forward pass ask to be added to the loss; 0.0 without experts."""
        return sum((m.aux_loss for m in self.modules() if isinstance(m, MoE)), 0.0)

    @torch.no_grad()
    def balance_experts(self, speed=0.001):
        """With balance=bias, once an optimizer step: see MoE.rebalance."""
        for m in self.modules():
            if isinstance(m, MoE) and m.bias is not None and m.load is not None:
                m.rebalance(speed)


class Cache:
    """One entry a layer (None where a layer keeps nothing), and the number of tokens seen."""
    def __init__(self, layers):
        self.layers, self.length = layers, 0

    def nbytes(self):
        return sum(layer.nbytes() for layer in self.layers if layer is not None)


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
    mup    N(0, 1/d_in) in the blocks, the output matrix 0: activations have the same size at any width, and
           with train.py's --mup_base so have their steps (Yang et al. 2022)
    gpt2   N(0, 0.02^2) everywhere, branch outputs / sqrt(2L): the stream's variance does not grow with L
    A tied table is also the output matrix: N(0,1) would give logits of variance D, so it is N(0, 0.02^2).
    """
    c = model.config
    for name, p in model.named_parameters():
        branch_output = name.endswith(("wo.weight", "w2.weight", "ffn.w2"))
        if c.init == "gpt2" and p.dim() >= 2:
            p.normal_(0, 0.02 / math.sqrt(2 * c.num_layers) if branch_output else 0.02)
        elif c.init == "mup" and p.dim() >= 2 and name.startswith(("blocks.", "mtp.")):
            p.normal_(0, p.shape[-1] ** -0.5)
        elif c.tie_embeddings and name == "embedding.weight":
            p.normal_(0, 0.02)
        elif c.init == "zero" and (branch_output or name == "head.weight") or (
                c.init == "mup" and name == "head.weight"):
            p.zero_()


def lm_loss(logits, targets, z_loss=0.0):
    """(cross-entropy, cross-entropy + z_loss * mean (log Z)^2): report the first, minimise the second.

    log Z = log sum_v exp(z_v) may drift: softmax does not see it. The z term holds it near 0 (PaLM 2022).
    Tokens whose target is -100 count in neither mean.
    """
    logits, targets = logits.flatten(0, -2).float(), targets.flatten()       # (B*T,V) and (B*T)
    ce = F.cross_entropy(logits, targets)
    if not z_loss:
        return ce, ce
    counted = targets != -100
    return ce, ce + z_loss * (logits.logsumexp(-1).square() * counted).sum() / counted.sum()


# --- stop here on a first reading ---------------------------------------------------------------------------
# You have seen the whole model. What follows is about using it and knowing what it costs.


# --- 7. other mixers ----------------------------------------------------------------------------------------
# One question, five more answers: what is carried from token to token? Attention carries all keys and values;
# SharedAttention those of another layer; MLA a compressed form of them; linear attention and Mamba one matrix
# a head, whatever the length; Hyena its inputs, which a long filter weighs by distance alone. Layers may
# differ: Jamba (Lieber et al. 2024) is --layers MMMMGMMM, with experts in every second one (here in all).

# A letter of ModelConfig.layers -> what it changes in the layer's own config.
LAYERS = {"G": dict(mixer="attention", window=0), "L": dict(mixer="attention"), "C": dict(mixer="shared"),
          **{letter: dict(mixer=mixer, window=0, attn_softcap=0.0) for letter, mixer in
             (("A", "mla"), ("R", "linear"), ("M", "mamba"), ("H", "hyena"))}}


def layer_configs(c):
    """One ModelConfig a layer: the pattern c.layers spelled out. Without a pattern all layers are c."""
    if not c.layers:
        return [c] * c.num_layers
    out, lender = [], None
    for i in range(c.num_layers):
        letter = c.layers[i % len(c.layers)]
        one = replace(c, layers="", **LAYERS[letter])
        if letter == "C":                                  # whose keys it reads decides about the mask
            one = replace(one, window=lender.window)
        lender = one if letter in "GL" else lender
        out.append(one)
    return out


def variant_checks(c):
    """ModelConfig's checks of what this section and the next add: [(is it wrong, what to say)]."""
    attends = set("GLC") & set(c.layers) if c.layers else c.mixer in ("attention", "shared")
    return [
        (set(c.layers) - set(LAYERS),
         f"layers={c.layers} has letters other than {''.join(LAYERS)}: try --layers GM"),
        (re.match("[^GL]*C", c.layers),
         f"layers={c.layers}: a C takes the keys of a G or L before it: try --layers G{c.layers}"),
        ("L" in c.layers and not c.window,
         f"layers={c.layers} has local layers, and window={c.window}: try --window 128"),
        (c.window and not attends,
         f"window={c.window} is for attention layers, and there is none: try --window 0"),
        (c.attn_softcap and not attends,
         f"attn_softcap={c.attn_softcap} is for attention layers: try --attn_softcap 0"),
        (c.rope_dims % 2,
         f"rope_dims={c.rope_dims} is odd and RoPE turns pairs: try --rope_dims {c.rope_dims + 1}"),
        (c.rope_low_freq >= c.rope_high_freq,
         f"rope_low_freq={c.rope_low_freq} is not below rope_high_freq={c.rope_high_freq}: "
         f"try --rope_high_freq {4 * c.rope_low_freq}"),
        (0 < c.num_experts < c.experts_per_token,
         f"experts_per_token={c.experts_per_token} is more than num_experts={c.num_experts}: "
         f"try --experts_per_token {c.num_experts}"),
        (c.num_experts % c.balance_devices,
         f"balance_devices={c.balance_devices} does not divide num_experts={c.num_experts}: "
         f"try --balance_devices 1"),
        (c.mtp >= c.context_length,
         f"mtp={c.mtp} tokens ahead do not fit context_length={c.context_length}: try --mtp 0")]


def stretch_rope(rate, factor, low_freq, high_freq, original_context):
    """RoPE for a longer context than the trained one, as Llama 3.1 does it (factor 8 for one 16 times as
    long): pairs that turn more than high_freq times in the original context keep their rate, those under
    low_freq turns are slowed by `factor` (they would meet angles never seen), between the two a blend."""
    turns = original_context * rate / (2 * math.pi)
    keep = ((turns - low_freq) / (high_freq - low_freq)).clamp(0, 1)
    return rate * (keep + (1 - keep) / factor)


class SharedAttention(Attention):
    """Cross-layer attention (Brandon et al. 2024): own queries, keys and values of the last G or L layer.

    params 2 D N H      cache 0      FLOPs 2 params + 4 S N H a token
    """
    def __init__(self, c):
        super().__init__(c)
        self.wq = Linear(c.d_model, c.num_heads * c.head_dim, bias=c.bias != "none")
        self.wqkv, self.k_norm, self.lender = None, nn.Identity(), None

    def forward(self, x, positions, cache=None):
        c, (B, T, D) = self.c, x.shape
        q = self.q_norm(self.wq(x).view(B, T, c.num_heads, c.head_dim)).transpose(1, 2)      # (B,N,T,H)
        q = apply_rope(q, per_head(positions), *c.rope) if c.position == "rope" else q
        k, v, key_positions, plain = self.lender[0].lent
        y = self.choose_kernel(q, k, v, positions, key_positions, plain)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))

    def make_cache(self):
        return None


def lend_keys(blocks):
    """Tell each SharedAttention whose keys it reads, and that layer to leave them behind."""
    lender = None
    for mixer in (block.mixer for block in blocks):
        if isinstance(mixer, SharedAttention):
            if lender is None:
                raise ValueError("mixer=shared takes the keys of a layer before it, and the first has none: "
                                 "try --layers GC")
            lender.lends, mixer.lender = True, (lender,)   # in a tuple: not a submodule, or it counts twice
        elif isinstance(mixer, Attention):
            lender = mixer


class MLA(nn.Module):
    """Multi-head latent attention (DeepSeek-AI 2024, V2): one latent of C numbers stands for the keys and
    values of all heads, and the cache holds nothing else but R key dims that carry the position.

        latent = norm(Wd x)  (C)      turned = rope(Wr x)  (R, the same for all heads)
        k_n = [Uk_n latent, turned]   v_n = Uv_n latent     n = 1..N
    Absorbed:  q . Uk latent = (Uk^T q) . latent  and  sum_s p_s Uv latent_s = Uv sum_s p_s latent_s, so
    decoding is multi-query attention over the latents: no key or value is built. A rotation between q and Uk
    would not let Uk move over to q: hence the R separate dims.

    params D N (H+R) + D (C+R) + 2 C N H + N H D      cache C + R numbers a token
    """
    def __init__(self, c):
        super().__init__()
        self.c = c
        D, N, H, C, R = c.d_model, c.num_heads, c.head_dim, c.latent_dim, c.rotary_dim
        self.wq = Linear(D, N * (H + R))
        self.w_down = Linear(D, C + R)                                       # Wd and Wr
        self.w_up = Linear(C, N * 2 * H)                                     # Uk and Uv
        self.wo = Linear(N * H, D)
        self.kv_norm = RMSNorm(C, c.norm_eps)
        self.q_norm = RMSNorm(H + R, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, positions, cache=None):
        c, (B, T, D) = self.c, x.shape
        N, H, C, R = c.num_heads, c.head_dim, c.latent_dim, c.rotary_dim
        q = self.q_norm(self.wq(x).view(B, T, N, H + R)).transpose(1, 2)     # (B,N,T,H+R)
        latent, turned = self.w_down(x)[:, None].split([C, R], -1)           # (B,1,T,C), (B,1,T,R)
        latent = self.kv_norm(latent)
        if c.position == "rope":
            def turn(t):                                   # pairs need an even stride and place: a copy
                t = t.clone(memory_format=torch.contiguous_format)
                return apply_rope(t, per_head(positions), *c.rope)
            turned, q = turn(turned), torch.cat((q[..., :H], turn(q[..., H:])), -1)
        mask = None
        if cache is not None:
            latent, turned, key_positions = cache.append(latent, turned, positions)
            mask = attention_mask(per_head(positions), per_head(key_positions))        # (T,S) or (B,1,T,S)
        # To build all keys and values costs 4 S C N H FLOPs, longer queries and values 4 T S N (C - H): as
        # much at T = 4/3 H, where C = 4 H.
        form = self.absorbed if cache is not None and T < H else self.explicit
        return self.wo(form(q, latent, turned, mask).transpose(1, 2).reshape(B, T, N * H))

    def explicit(self, q, latent, turned, mask):
        """Keys and values written out, then attention as usual -> (B,N,T,H)."""
        B, N, H = len(q), self.c.num_heads, self.c.head_dim
        k, v = self.w_up(latent[:, 0]).view(B, -1, N, 2 * H).transpose(1, 2).split(H, -1)    # (B,N,S,H) each
        k = torch.cat((k, turned.expand(-1, N, -1, -1)), -1)                 # (B,N,S,H+R)
        return attend(q, k, v, attn_mask=mask, is_causal=mask is None)

    def absorbed(self, q, latent, turned, mask):
        """The same numbers from queries of C + R dims and one key head, the latent -> (B,N,T,H)."""
        N, H, C = self.c.num_heads, self.c.head_dim, self.c.latent_dim
        uk, uv = self.w_up.weight.view(N, 2 * H, C).split(H, 1)              # (N,H,C) each
        scale = q.shape[-1] ** -0.5                                          # of H + R dims, as in explicit
        q = torch.cat((q[..., :H] @ uk, q[..., H:]), -1)                     # (B,N,T,C+R)
        y = attend(q, torch.cat((latent, turned), -1), latent, attn_mask=mask, is_causal=mask is None,
                   scale=scale, enable_gqa=True)                             # (B,N,T,C)
        return y @ uv.mT

    def make_cache(self):
        return KVCache()


class StateCache:
    """What a recurrent mixer carries, of fixed size: None at the start, then tensors (B,...), replaced, never
    changed in place. Whoever wants to go back must keep the old ones: a state, being a sum, cannot be cut."""
    def __init__(self):
        self.state = self.recent = None

    def nbytes(self):
        return sum(t.nbytes for t in (self.state, self.recent) if t is not None)


CHUNK = 64   # tokens: long enough for matrix products, short enough that chunk^2 stays small


def chunked(q, k, v, log_decay, state=None, chunk=CHUNK):
    """y_t = q_t S_t,  S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t.
    q, k (B,N,T,H), v (B,N,T,P), log_decay (B,N,T) at most 0, state (B,N,H,P) -> y (B,N,T,P), last state.

    Unrolled, y_t is the sum over s <= t of (decay from s to t) (q_t . k_s) v_s: attention without softmax. So
    a chunk of C tokens is two products with a (C,C) matrix, and all that came before is one product with the
    state (Hua et al. 2022). chunk=1 is the recurrence, chunk >= T the parallel form, between the two T/C
    steps of 2 C (H + P) + 4 H P FLOPs a token and head. With the same q, k and decay at every t (a linear
    time-invariant state space, S4) it is a convolution: y = h conv v, h_t = (q . k) decay^t.
    """
    kind = torch.promote_types(q.dtype, torch.float32)     # the state sums over thousands of tokens
    q, k, v, log_decay = (t.to(kind) for t in (q, k, v, log_decay))
    state = v.new_zeros(*v.shape[:2], q.shape[-1], v.shape[-1]) if state is None else state
    out = []
    for q, k, v, log_decay in zip(*(t.split(chunk, 2) for t in (q, k, v, log_decay))):
        total = log_decay.cumsum(-1)                                         # (B,N,C) from the chunk's start
        between = total[..., :, None] - total[..., None, :]                  # (B,N,C,C) from s to t
        later = torch.ones(between.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        weight = between.masked_fill(later, -math.inf).exp()                 # first masked: exp may overflow
        out.append((q @ k.mT * weight) @ v + (q * total.exp()[..., None]) @ state)
        left = (total[..., -1:] - total).exp()[..., None]                    # (B,N,C,1) until the chunk's end
        state = total[..., -1:, None].exp() * state + (k * left).mT @ v
    return torch.cat(out, 2), state


class LinearAttention(nn.Module):
    """Attention without the softmax (Katharopoulos et al. 2020), with a fixed decay a head and a norm behind
    (RetNet, Sun et al. 2023; Lightning attention, MiniMax 2025): keys and values add up in one H x H matrix.

        S_t = a_n S_{t-1} + k_t^T v_t      y_t = norm(q_t S_t / sqrt(H))      a_n = exp(-2^(-8n/N)), n = 1..N
    The matrix holds about H pairs; more, and they blur: cheap for long texts, poor at recall.

    params 4 D N H      state N H H numbers, whatever the context
    """
    def __init__(self, c):
        super().__init__()
        self.c, width = c, c.num_heads * c.head_dim
        self.wqkv, self.wo = Linear(c.d_model, 3 * width), Linear(width, c.d_model)
        self.norm = RMSNorm(c.head_dim, c.norm_eps)

    def forward(self, x, positions, cache=None):
        B, T, N, H = *x.shape[:2], self.c.num_heads, self.c.head_dim
        q, k, v = self.wqkv(x).view(B, T, 3, N, H).permute(2, 0, 3, 1, 4)    # (B,N,T,H) each
        rate = 2.0 ** (-8 / N * torch.arange(1, N + 1, device=x.device))     # the last head: about 256 tokens
        y, state = chunked(q / math.sqrt(H), k, v, -rate[:, None].expand(B, N, T),
                           cache.state if cache is not None else None)
        if cache is not None:
            cache.state = state
        return self.wo(self.norm(y.to(x.dtype)).transpose(1, 2).reshape(B, T, N * H))

    def make_cache(self):
        return StateCache()


class Mamba(nn.Module):
    """Selective state space (Gu & Dao 2023), in the form of Mamba-2 (Dao & Gu 2024): the same recurrence, but
    each token chooses how much is forgotten and written: a large d_t opens the state, with a small one the
    token passes by. In chunked's letters q = C, k = B, v = d u, decay = exp(-d A).

        S_t = exp(-d_t A) S_{t-1} + d_t B_t^T u_t      y_t = C_t S_t + skip u_t      out = wo(norm(y silu(z)))
        [z, u, B, C, d] = W x;  u, B, C then pass a convolution over 4 tokens;  d = softplus(d + bias)
    2N heads of H dims; B and C, H dims each, serve all heads, as the one key head of multi-query attention.

    params D (6 N H + 2 H + 2 N)      state 2 N H H + 3 (2 N H + 2 H) numbers, whatever the context
    """
    def __init__(self, c):
        super().__init__()
        self.c, heads, H = c, 2 * c.num_heads, c.head_dim
        self.heads, self.parts = heads, [heads * H, heads * H + 2 * H, heads]                # z, (u, B, C), d
        self.w_in, self.wo = Linear(c.d_model, sum(self.parts)), Linear(heads * H, c.d_model)
        self.norm = RMSNorm(heads * H, c.norm_eps)
        # Kept in one dimension, so that optimizers do not take them for matrices.
        self.conv = nn.Parameter(torch.empty(4 * self.parts[1]).uniform_(-0.5, 0.5))
        step = 0.001 * 100 ** torch.linspace(0, 1, heads)                    # d at the start: 0.001 .. 0.1
        self.d_bias = nn.Parameter(step.expm1().log())                       # softplus of this is that
        self.log_a = nn.Parameter(torch.linspace(1, 16, heads).log())
        self.skip = nn.Parameter(torch.ones(heads))

    def forward(self, x, positions, cache=None):
        B, T, heads = *x.shape[:2], self.heads
        z, mixed, d = self.w_in(x).split(self.parts, -1)
        past = cache.recent if cache is not None else None
        mixed = torch.cat((mixed.new_zeros(B, 3, mixed.shape[-1]) if past is None else past, mixed), 1)
        taps, H = self.conv.view(4, -1), self.c.head_dim
        u, b, c = F.silu(sum(taps[i] * mixed[:, i:i + T] for i in range(4))).split([heads * H, H, H], -1)
        u = u.view(B, T, heads, -1).transpose(1, 2)                          # (B,2N,T,H)
        d = F.softplus(d + self.d_bias).transpose(1, 2)                      # (B,2N,T)
        y, state = chunked(c[:, None], b[:, None], d[..., None] * u, -d * self.log_a.exp()[:, None],
                           cache.state if cache is not None else None)
        if cache is not None:
            cache.recent, cache.state = mixed[:, -3:], state
        y = (y + self.skip[:, None, None] * u).transpose(1, 2).reshape(B, T, -1).to(x.dtype)
        return self.wo(self.norm(y * F.silu(z)))

    def make_cache(self):
        return StateCache()


FILTER = (17, 64)    # Hyena's filter: features of a distance, hidden width


def fft_conv(x, h):
    """y_t = sum over s <= t of h_{t-s} x_s, for x (B,T,D), h (T,D), in O(T log T): a product of spectra is a
    circular convolution, and T zeros behind keep the end from running into the start. Rounding reaches
    every position, the future's too (1e-7 of the largest): causal, but not to the bit."""
    kind, T = torch.promote_types(x.dtype, torch.float32), x.shape[1]
    spectrum = torch.fft.rfft(x.to(kind), 2 * T, dim=1) * torch.fft.rfft(h.to(kind), 2 * T, dim=0)
    return torch.fft.irfft(spectrum, 2 * T, dim=1)[:, :T].to(x.dtype)


class Hyena(nn.Module):
    """A gated convolution as long as the text (Poli et al. 2023, order 2, without its first long convolution
    and the short ones): no token looks at another, only at how far away it is.

        y = wo(a * (h conv z + skip z)),  z = b * v,  [a, b, v] = W x      h_t = mlp(waves of t) exp(-rate t)

    params 4 D^2 + 64 D      cache D numbers a token: a new token needs all inputs, but no products of T x T
    """
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.w_in, self.wo = Linear(c.d_model, 3 * c.d_model), Linear(c.d_model, c.d_model)
        self.filter_in, self.filter_out = Linear(*FILTER), Linear(FILTER[1], c.d_model)
        self.skip = nn.Parameter(torch.ones(c.d_model))

    def filter(self, distance):
        """h at these distances (...) -> (...,D): a small network of the distance, whatever the length."""
        c, t = self.c, distance.clamp(min=0) / self.c.context_length
        waves = 2 * math.pi * t[..., None] * torch.arange(1, 9, device=t.device)
        h = self.filter_out(self.filter_in(torch.cat((t[..., None], waves.sin(), waves.cos()), -1).to(
            self.skip.dtype)).sin())
        # Channels from a few tokens' reach to the whole context's.
        rate = 3 * max(1, c.context_length / 6) ** torch.linspace(0, 1, c.d_model, device=t.device)
        return h * torch.exp(-rate * t[..., None]).to(h.dtype)

    def forward(self, x, positions, cache=None):
        a, b, v = self.w_in(x).chunk(3, -1)
        z = b * v                                                            # (B,T,D)
        if cache is None:
            y = fft_conv(z, self.filter(torch.arange(x.shape[1], device=x.device)))
        else:                                              # query by query, each against all inputs
            past, _, key_positions = cache.append(z[:, None], z[:, None, :, :0], positions)
            distance = positions[..., :, None] - key_positions[..., None, :]                 # (...,T,S)
            y = torch.stack([(self.filter(d) * (d >= 0)[..., None] * past[:, 0]).sum(-2)
                             for d in distance.unbind(-2)], -2)
        return self.wo(a * (y + self.skip * z))

    def make_cache(self):
        return KVCache()


MIXERS.update(shared=SharedAttention, mla=MLA, linear=LinearAttention, mamba=Mamba, hyena=Hyena)


# --- 8. mixture of experts ----------------------------------------------------------------------------------
# E feed-forwards instead of one, and each token visits k of them: the weights of a large model at the FLOPs
# of a small one. The layer is not the hard part; keeping all experts busy is.

class MoE(nn.Module):
    """y = sum over the token's k experts of gate_e(x) ffn_e(x)  +  shared experts(x)    (Shazeer et al. 2017)

    gate = softmax(router x), of the chosen ones made to sum 1 (not for k = 1: a gate that is always 1 teaches
    the router nothing; Switch, Fedus et al. 2021). Fine-grained (DeepSeekMoE, Dai et al. 2024): m times as
    many experts of 1/m the width, m k of them active, at the same FLOPs.

    params D E + (E + shared) 3 D F_e, of the experts k + shared active
    Left behind by each forward: aux_loss (add it to the loss), load (E,) shares of all visits, dropped share.
    """
    def __init__(self, c):
        super().__init__()
        self.c, E, width = c, c.num_experts, c.expert_dim
        self.router = Linear(c.d_model, E)
        one = [FFNS[c.ffn](replace(c, d_ff=width, bias="none")) for _ in range(E)]
        def stack(name):
            return nn.Parameter(torch.stack([getattr(expert, name).weight.detach() for expert in one]))
        self.w1, self.w2 = stack("w1"), stack("w2")                          # (E,F,D), (E,D,F)
        self.w3 = stack("w3") if c.gated else None                           # (E,F,D)
        self.act, self.shared = one[0].act, None
        if c.shared_experts:                               # side by side they are one wide feed-forward
            self.shared = FFNS[c.ffn](replace(c, d_ff=c.shared_experts * width, bias="none"))
        self.register_buffer("bias", torch.zeros(E) if c.balance == "bias" else None)
        self.aux_loss, self.load, self.dropped = 0.0, None, 0.0

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])                                    # (n,D) tokens of all rows
        token, gate, counts = self.route(flat)
        y = self.experts(flat.index_select(0, token), counts) * gate[:, None].to(x.dtype)
        y = torch.zeros_like(flat).index_add(0, token, y.to(flat.dtype))     # a dropped token gets 0: the
        y = y + self.shared(flat) if self.shared is not None else y          # residual stream carries it on
        return y.view_as(x)

    def route(self, x):
        """Tokens (n,D) -> visits, sorted by expert: token (m,), gate (m,), and each expert's number (E,)."""
        c, n, E, k = self.c, len(x), self.c.num_experts, self.c.experts_per_token
        logits = self.router_logits(x)                                       # (n,E)
        probs = logits.softmax(-1)
        if c.router == "expert_choice":  # Zhou et al. 2022: gates as they are. Later tokens compete for the
            # seats, so it is not causal, and a token decoded alone visits all experts: for training only.
            visits = min(n, max(1, round(k * n / E)))
            gate, token = probs.t().topk(visits)                             # (E,visits)
            token, gate, counts = token.flatten(), gate.flatten(), torch.full((E,), visits, device=x.device)
        else:
            scores = sinkhorn(logits) if c.router == "sinkhorn" and self.training else probs
            scores = scores if self.bias is None else scores + self.bias     # moves the choice, not the gate
            chosen = scores.topk(k).indices                                  # (n,k)
            gate = probs.gather(-1, chosen)
            gate = gate / gate.sum(-1, keepdim=True) if k > 1 else gate
            order = chosen.flatten().argsort(stable=True)                    # expert 0's visits come first
            token, gate = order // k, gate.flatten()[order]
            counts = F.one_hot(chosen, E).sum((0, 1))
        self.load = counts.detach() / counts.sum()
        self.aux_loss = self.balance_loss(probs, logits)
        if c.capacity_factor:
            token, gate, counts = self.drop(token, gate, counts, math.ceil(c.capacity_factor * k * n / E))
        return token, gate, counts

    def router_logits(self, x):
        """In fp32 whatever the rest runs in: bf16 has 8 bits, and close calls would flip (Switch)."""
        c, kind = self.c, torch.promote_types(x.dtype, torch.float32)
        if self.training and c.router_jitter:
            x = x * torch.empty_like(x).uniform_(1 - c.router_jitter, 1 + c.router_jitter)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(kind), self.router.weight.to(kind))
        if self.training and c.router_noise:                                 # so that others get a chance
            logits = logits + c.router_noise * torch.randn_like(logits)
        return logits

    def balance_loss(self, probs, logits):
        """E sum_e load_e P_e, P the mean probability: 1 if uniform, E if all go to one expert. The load has
        no gradient; P has, and is pushed down where the load is high. Per device: the same of group sums (a
        single group is always balanced)."""
        c, loss = self.c, 0.0
        for groups in ({c.num_experts, c.balance_devices} - {1} if c.balance == "loss" else ()):
            load, P = (t.view(groups, -1).sum(-1) for t in (self.load, probs.mean(0)))
            loss = loss + c.balance_loss * groups * (load * P).sum()
        return loss + c.router_z_loss * logits.logsumexp(-1).square().mean()

    def rebalance(self, speed):
        """Balance without a loss (DeepSeek-AI 2024, DeepSeek-V3): a busy expert becomes a little harder to
        choose, an idle one easier. Outside of forward: recomputed blocks must choose the same again."""
        self.bias += speed * torch.sign(1 / len(self.load) - self.load)

    def drop(self, token, gate, counts, capacity):
        """Each expert keeps its first `capacity` visits, so that no device waits for a crowded one. Who is
        dropped depends on who else is in the batch."""
        start = counts.cumsum(0) - counts
        place = torch.arange(len(token), device=token.device) - start.repeat_interleave(counts)
        kept = place < capacity
        self.dropped = 1 - kept.float().mean()
        return token[kept], gate[kept], counts.clamp(max=capacity)

    def experts(self, x, counts):
        """Visits (m,D), sorted by expert -> (m,D): products of different heights in a row."""
        def product(x, w):                                                   # w (E,out,in)
            kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
            # One kernel for all, where torch has it: bf16 on a GPU, rows of 16 bytes.
            if x.is_cuda and kind == torch.bfloat16 and w.shape[1] % 8 == w.shape[2] % 8 == 0:
                return F.grouped_mm(x.to(kind), w.to(kind).mT, offs=counts.cumsum(0).int())
            return torch.cat([F.linear(part, one) for part, one in zip(x.split(counts.tolist()), w.unbind())])
        h = self.act(product(x, self.w1))
        return product(h if self.w3 is None else h * product(x, self.w3), self.w2)

    def naive(self, x):
        """The same, expert by expert. The oracle, and slower: every expert gathers and scatters."""
        flat = x.reshape(-1, x.shape[-1])
        token, gate, counts = self.route(flat)
        expert = torch.arange(len(counts), device=x.device).repeat_interleave(counts)
        y = self.shared(flat) if self.shared is not None else torch.zeros_like(flat)
        for e in range(len(counts)):
            mine = token[expert == e]
            h = self.act(flat[mine] @ self.w1[e].t())
            h = h if self.w3 is None else h * (flat[mine] @ self.w3[e].t())
            y = y.index_add(0, mine, gate[expert == e][:, None] * (h @ self.w2[e].t()))
        return y.view_as(x)


@torch.no_grad()
def sinkhorn(logits, rounds=8):
    """Scores (n,E) -> log of a plan in which each token spends 1 and each expert gets n/E, near exp(scores):
    divide columns, then rows, by their sums, and again (Clark et al. 2022; BASE, Lewis et al. 2021, solves
    the assignment exactly). In training only: the plan of a token depends on all others, later ones too."""
    for _ in range(rounds):
        logits = logits - logits.logsumexp(0)
        logits = logits - logits.logsumexp(1, keepdim=True)
    return logits


@torch.no_grad()
def upcycle(model, **experts):
    """A dense model -> a mixture of experts that computes the same: every expert is a copy of the dense
    feed-forward, the router fresh (Komatsuzaki et al. 2022). experts: ModelConfig's num_experts=8, ..."""
    c = replace(model.config, d_expert=model.config.ffn_dim, **experts)
    if (c.bias == "all" or c.experts_per_token == 1 or c.shared_experts      # a lone gate is not 1
            or c.router == "expert_choice" or c.capacity_factor):
        raise ValueError(f"bias={c.bias}, experts_per_token={c.experts_per_token}, shared_experts="
                         f"{c.shared_experts}, router={c.router}, capacity_factor={c.capacity_factor}: "
                         f"copies compute the same without biases, with 2 experts a token or more, none "
                         f"shared, and where tokens choose and none is dropped")
    moe = Transformer(c).to(model.head.weight.device)
    weights = moe.state_dict()
    for name, w in model.state_dict().items():
        dense = re.fullmatch(r"(.*\bffn\.w[123])\.weight", name)
        weights[dense[1] if dense else name] = w.expand(c.num_experts, -1, -1) if dense else w
    moe.load_state_dict(weights)
    return moe


def training_loss(model, ids, targets, z_loss=0.0, mtp_weight=0.3):
    """(cross-entropy, what to minimise): lm_loss, the experts' balance, and with c.mtp the extra predictions:
    head k reads the stream at t and predicts token t+1+k through one block of its own and the shared output
    matrix (Gloeckle et al. 2024). In use they are dropped; they could draft for speculative decoding."""
    ce, objective = lm_loss(model(ids), targets, z_loss)
    net = unwrapped(model)
    positions = torch.arange(ids.shape[1], device=ids.device)
    for k, block in enumerate(net.mtp, 1):
        logits = net.head(net.norm(block(net.stream, positions)))[:, :-k]    # (B,T-k,V)
        ahead = lm_loss(soft_cap(logits, net.config.logit_softcap), targets[:, k:])[0]
        objective = objective + mtp_weight / len(net.mtp) * ahead
    return ce, objective + net.aux_loss()


# --- 9. generation, naive -----------------------------------------------------------------------------------

def next_token_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """logits (...,V) -> probabilities to draw from. Temperature 0 is greedy: all mass on the
    largest logit. top_k keeps the k likeliest; top_p the smallest set whose mass reaches p
    (Holtzman et al. 2019), at least one."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits.float() - logits.float().amax(-1, keepdim=True)          # or a tiny one would overflow
    probs, order = softmax(logits / temperature).sort(-1, descending=True)
    before = probs.cumsum(-1) - probs                                     # mass of the strictly likelier ones
    keep = before < (top_p if top_p < 1 else math.inf)                    # rounding may bring the sum above 1
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
    if not (0 <= temperature < math.inf and 0 < top_p <= 1 and top_k >= 0):
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


# --- 10. accounting: closed forms ---------------------------------------------------------------------------

def count_params(c):
    """{component: parameters} of a ModelConfig.
    Without embeddings about 12 L D^2: 4 D^2 attention + 8 D^2 FFN a layer."""
    D, L, V, bias = c.d_model, c.num_layers, c.vocab_size, c.bias == "all"
    norm = {"rmsnorm": D, "layernorm": D * (2 if bias else 1), "none": 0}[c.norm]
    mixers = [mixer_costs(layer)["params"] for layer in layer_configs(c)]
    ffn = ffn_weights(c) + ((2 if c.gated else 1) * c.ffn_dim + D if bias and not c.num_experts else 0)
    norms = norms_per_block(c) * norm
    parts = {"embedding": V * D, "position": c.context_length * D if c.position == "learned" else 0,
             "attention": sum(mixers), "ffn": L * ffn,
             "norms": L * norms + (norm if c.norm_position != "post" else 0),
             "head": 0 if c.tie_embeddings else V * D}
    return {**parts, "mtp": c.mtp * (mixers[0] + ffn + norms)} if c.mtp else parts


def num_params(c, embeddings=True):
    """All parameters, or those that multiply a token's activations in the blocks (what '12 L D^2' counts)."""
    parts = count_params(c)
    return sum(parts.values()) if embeddings else parts["attention"] + parts["ffn"] + parts["norms"]


def num_params_active(c):
    """Those that one token meets in a forward pass: not the experts it does not visit."""
    return num_params(c) - count_params(c).get("mtp", 0) - c.num_layers * (
        ffn_weights(c) - ffn_weights(c, active=True))


def norms_per_block(c):
    """pre and post 2, double 4; side by side, the two branches share the norm before (or after) them."""
    return {"pre": 2, "post": 2, "double": 4}[c.norm_position] - c.parallel


def ffn_weights(c, active=False):
    """Entries of the matrices of one layer's feed-forward, or of those that one token visits."""
    matrices = (3 if c.gated else 2) * c.d_model
    if not c.num_experts:
        return matrices * c.ffn_dim
    experts = (c.experts_per_token if active else c.num_experts) + c.shared_experts
    return c.num_experts * c.d_model + experts * matrices * c.expert_dim     # the router, then the experts


def mixer_costs(c, S=1):
    """What one layer's mixer (c: its own config) costs, as a dict of numbers:
    matrices   entries of its matrices              params  these, and gains and biases
    scores     FLOPs a token at S keys a query, besides 2 a matrix entry
    cached     kept for decoding, for each of the last `held` tokens
    recent, state   kept for decoding in all, however long the context; state is in fp32 at least
    saved      a token, for the backward pass: exact for attention, rounded from what was counted elsewhere
    """
    D, N, K, H, C, R = c.d_model, c.num_heads, c.kv_heads, c.head_dim, c.latent_dim, c.rotary_dim
    cached, recent, state, held, chunk = 0, 0, 0, math.inf, min(S, CHUNK)    # chunk: see chunked
    if c.mixer in ("attention", "shared"):
        made, changed = (N + 2 * K, N + K) if c.mixer == "attention" else (N, N)         # heads: q k v, q k
        matrices, scores = D * made * H + N * H * D, 4 * S * N * H
        vectors = {"none": 0, "qkv": made * H, "all": made * H + D}[c.bias]
        vectors += H * c.qk_norm * (2 if c.mixer == "attention" else 1)
        if c.mixer == "attention":
            cached, held = 2 * K * H, c.window - 1 if c.window else math.inf
        # Input, q k v, changed q k, output, log Z.
        again = 2 * H + 1 if c.qk_norm else H if c.position == "rope" else 0
        saved = D + made * H + changed * again + N * H + N
    elif c.mixer == "mla":
        matrices, scores = D * N * (H + R) + D * (C + R) + C * N * 2 * H + N * H * D, 2 * S * N * (H + R + H)
        vectors, cached = C + (H + R) * c.qk_norm, C + R
        saved = 2 * D + 5 * N * (H + R) + 4 * N * H + 3 * C
    elif c.mixer == "linear":
        matrices, vectors, scores = 4 * D * N * H, H, N * (4 * chunk * H + 4 * H * H)
        state, saved = N * H * H, 13 * N * H
    elif c.mixer == "mamba":
        inner, mixed = 2 * N * H, 2 * N * H + 2 * H
        matrices, vectors = D * (inner + mixed + 2 * N) + inner * D, 4 * mixed + 6 * N + inner
        scores = 2 * chunk * H + 2 * N * (2 * chunk * H + 4 * H * H)
        recent, state, saved = 3 * mixed, 2 * N * H * H, 40 * N * H
    else:                                                  # hyena; an FFT of n is 5 n log2 n
        matrices, vectors = 4 * D * D + FILTER[0] * FILTER[1] + FILTER[1] * D, D
        scores, cached, saved = round(2 * D * 5 * 2 * math.log2(2 * S)), D, 14 * D
    return dict(matrices=matrices, params=matrices + vectors, scores=scores, cached=cached, held=held,
                recent=recent, state=state, saved=saved)


def flops_per_token(c, context=None):
    """{component: forward FLOPs a token} at `context` keys a query. A product (m,n)x(n,p) is 2mnp FLOPs.

    scores is q k^T and the weighted sum of v: 4 S N H a layer, the only term that grows with context.
    Counted for all S keys, as the papers do; a causal kernel may skip half. The backward pass costs twice
    the forward: each product y = x W needs dx = dy W^T and dW = x^T dy. So training costs 3 x this,
    about 6 FLOPs a weight and token.
    """
    costs = [mixer_costs(layer, context or c.context_length) for layer in layer_configs(c)]
    return {"attention": sum(2 * m["matrices"] for m in costs),
            "scores": sum(m["scores"] for m in costs),
            "ffn": c.num_layers * 2 * ffn_weights(c, active=True),
            "head": 2 * c.d_model * c.vocab_size}


def train_flops(c, tokens, context=None):
    """Forward and backward; each extra token predicted costs one more block and one more output matrix."""
    f, first = flops_per_token(c, context), mixer_costs(layer_configs(c)[0], context or c.context_length)
    extra = 2 * first["matrices"] + first["scores"] + f["ffn"] // c.num_layers + f["head"]
    return 3 * tokens * (sum(f.values()) + c.mtp * extra)


def kv_bytes_per_token(c, bytes_per_number=2):
    """What one more token of a text adds to the cache (up to the window, if there is one), and what decoding
    reads again for every new token: with attention 2 K H numbers a layer."""
    return sum(mixer_costs(layer)["cached"] for layer in layer_configs(c)) * bytes_per_number


def state_bytes(c, context, bytes_per_number=2):
    """What decoding keeps of one sequence of `context` tokens, all layers."""
    costs = [mixer_costs(layer) for layer in layer_configs(c)]
    numbers = sum(m["recent"] + m["cached"] * min(context, m["held"]) for m in costs)
    return bytes_per_number * numbers + max(4, bytes_per_number) * sum(m["state"] for m in costs)


def activation_bytes(c, batch_size, context=None, checkpoint_blocks=False):
    """{component: bytes} the forward pass keeps for the backward one, in fp32: every product keeps its input.

    Exact for the CPU's kernels without dropout, window and soft-caps (a test counts it); CUDA's fused RMSNorm
    and attention keep D numbers fewer a norm, and D fewer a block. About tokens x (8 D + 2 F for GPT-2, 12 D
    + 4 F for Llama) x L + tokens x V; the last term, the logits, is a quarter of it all in a small model, and
    1% in Llama-2-7B. With checkpointing a block keeps its input alone and runs twice: a third more FLOPs.
    Other mixers and experts: within a quarter.
    """
    D, T, layers = c.d_model, context or c.context_length, layer_configs(c)
    # A norm: input, normalised (RMSNorm), 1/std (and mean).
    norm = {"rmsnorm": 2 * D + 1, "layernorm": D + 2, "none": 0}[c.norm]
    hidden = {"relu": 1, "reglu": 3}.get(c.ffn, 4 if c.gated else 2)  # a ReLU's output tells its derivative
    ffn, k = (0 if c.parallel else D) + hidden * c.ffn_dim, c.experts_per_token
    if c.num_experts:                                      # a visit: a copy of the token, its output twice
        ffn = D + k * 3 * D + (k + c.shared_experts) * hidden * c.expert_dim
    block = ffn + norms_per_block(c) * norm
    mixers, tokens = [mixer_costs(layer)["saved"] for layer in layers], batch_size * T
    kept = len(layers) * tokens * D if checkpoint_blocks else tokens * (sum(mixers) + len(layers) * block)
    if c.position == "rope" and not checkpoint_blocks:     # (T,H/2) complex numbers, once for q and for k
        kept += sum({"attention": 2, "shared": 1}.get(layer.mixer, 0) for layer in layers) * c.head_dim * T
    last = (norm if c.norm_position != "post" else 0) + D + 4        # norm, the head's input, ids and targets
    return {"blocks": 4 * (kept + c.mtp * tokens * (mixers[0] + block)),
            "last norm": 4 * tokens * last, "logits": 4 * tokens * c.vocab_size * (1 + c.mtp)}


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


# --- 11. checkpoints ----------------------------------------------------------------------------------------

def unwrapped(model):
    """The Transformer inside what torch.compile or DistributedDataParallel made of it."""
    while inner := getattr(model, "_orig_mod", getattr(model, "module", None)):
        model = inner
    return model


def save_checkpoint(out, model, optimizer=None, step=0, **extra):
    """Write {config, model, optimizer, step, ...} to a path or an open binary file.

    To a path: a temporary file beside it, flushed to disk, then renamed over the old one. A crash, a full
    disk or a kill -9 at any moment leaves either the old checkpoint or the new one, never half of one.
    """
    model = unwrapped(model)
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
    if isinstance(value, (dict, list, tuple)):
        for key, v in value.items() if isinstance(value, dict) else enumerate(value):
            refuse_objects(v, f"{name}[{key!r}]")
    elif not (isinstance(value, torch.Tensor) or value is None or type(value) in (bool, int, float, str)):
        raise TypeError(f"{name} is a {type(value).__name__}: "
                        f"a checkpoint holds tensors and plain values only")


def load_checkpoint(src, device="cpu"):
    """A path or an open binary file -> the dict that save_checkpoint wrote, tensors on `device`.

    weights_only=True: the file may hold tensors and plain values, nothing that runs code when it is opened.
    Raises FileNotFoundError, OSError or ValueError with what to do.
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
    if not isinstance(state, dict) or any(not isinstance(state.get(k), kind) for k, kind in kinds.items()):
        raise ValueError(f"{src} is a torch file but no checkpoint of this project: config, model and step")
    # Files saved by hand from a compiled or wrapped module carry these prefixes in every name, in any order.
    state["model"] = {re.sub(r"^(_orig_mod\.|module\.)+", "", str(k)): v for k, v in state["model"].items()}
    return state


def load_model(src, device="cpu"):
    """A checkpoint (path, open file, or the loaded dict) -> Transformer with its weights, in eval mode."""
    state = src if isinstance(src, dict) else load_checkpoint(src, device)
    with torch.device(device):
        model = Transformer(config_of(state))
    load_weights(model, state["model"])
    return model.eval()


def config_of(state):
    try:
        return ModelConfig(**state["config"])
    except TypeError as e:
        raise ValueError(f"the checkpoint's config does not fit this model.py ({first_line(e)})") from None


def load_weights(model, weights, assign=False):
    try:
        model.load_state_dict(weights, assign=assign)
    except RuntimeError as e:
        raise ValueError(f"the checkpoint's weights do not fit its config: "
                         f"{' '.join(str(e).split())[:200]}") from None


def first_line(e):
    return re.sub(r"\x1b\[[0-9;]*m", "", (str(e) or type(e).__name__).strip().split("\n")[0])[:300]


# --- 12. Hugging Face checkpoints, both ways ----------------------------------------------------------------
# A folder of theirs holds config.json (the shape), *.safetensors (the weights) and tokenizer.json. GPT-2, and
# Llama with its kin, compute there what they compute here, but for names and two habits:
#   RoPE   turns dimensions j and j + H/2 of a head as a pair, ours 2j and 2j + 1. <q,k> does not depend on
#          the order of dimensions if q and k share it, so the rows of wq and wk are reordered, no more.
#   GPT-2  computes x W, ours x W^T: each matrix is the other's transpose.
# hf_parts shows a tensor of ours as views with their names and order. To read a file into the views is to
# import, to write the views to a file is to export: one list serves both, so the two cannot disagree.

HF_NAMES = {  # a module of ours: (theirs in Llama's family, in GPT-2), so that kind == "gpt2" is the index
    "embedding": ("model.embed_tokens", "wte"),
    "position": (None, "wpe"),
    "blocks": ("model.layers", "h"),
    "norm1": ("input_layernorm", "ln_1"),
    "mixer.wqkv": ("self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attn.c_attn"),    # three, or in one
    "mixer.q_norm": ("self_attn.q_norm", None),
    "mixer.k_norm": ("self_attn.k_norm", None),
    "mixer.wo": ("self_attn.o_proj", "attn.c_proj"),
    "norm2": ("post_attention_layernorm", "ln_2"),
    "ffn.w1": ("mlp.gate_proj", "mlp.c_fc"),
    "ffn.w3": ("mlp.up_proj", None),
    "ffn.w2": ("mlp.down_proj", "mlp.c_proj"),
    "ffn.router": ("block_sparse_moe.gate", None),
    "ffn.w1[e]": ("block_sparse_moe.experts.{}.w1", None),                                # ours: all e in one
    "ffn.w3[e]": ("block_sparse_moe.experts.{}.w3", None),
    "ffn.w2[e]": ("block_sparse_moe.experts.{}.w2", None),
    "norm": ("model.norm", "ln_f"),
    "head": ("lm_head", "lm_head")}
HF_KEYS = {  # a field of ModelConfig: (its key in config.json in Llama's family, in GPT-2)
    "vocab_size": ("vocab_size", "vocab_size"),
    "context_length": ("max_position_embeddings", "n_positions"),
    "d_model": ("hidden_size", "n_embd"),
    "num_layers": ("num_hidden_layers", "n_layer"),
    "num_heads": ("num_attention_heads", "n_head"),
    "d_ff": ("intermediate_size", "n_inner"),
    "ffn": ("hidden_act", "activation_function"),
    "norm_eps": ("rms_norm_eps", "layer_norm_epsilon"),                      # to here a file must name them
    "tie_embeddings": ("tie_word_embeddings", "tie_word_embeddings"),
    "num_kv_heads": ("num_key_value_heads", None),
    "d_head": ("head_dim", None),
    "window": ("sliding_window", None),
    "num_experts": ("num_local_experts", None),
    "experts_per_token": ("num_experts_per_tok", None),
    "rope_theta": ("rope_theta", None)}
HF_STRETCH = {  # the same within its rope_scaling
    "rope_factor": "factor", "rope_low_freq": "low_freq_factor", "rope_high_freq": "high_freq_factor",
    "rope_original_context": "original_max_position_embeddings"}
HF_FFN = {  # c.ffn: their activation; which of the two lines is a matter of the family
    "swiglu": "silu", "geglu": "gelu_pytorch_tanh", "reglu": "relu",
    "silu": "silu", "gelu": "gelu_new", "relu": "relu"}
HF_KINDS = {  # model_type: what it implies
    "gpt2": dict(norm="layernorm", position="learned", bias="all", tie_embeddings=True),
    "llama": {}, "qwen2": dict(bias="qkv"), "qwen3": dict(qk_norm=True), "mistral": {}, "mixtral": {}}
HF_ONLY = dict(  # what config.json may ask for and is computed here; an absent or null key always is
    rope_type=["default", "llama3"], partial_rotary_factor=[1.0], use_sliding_window=[False],
    quantization_config=[], scale_attn_weights=[True], scale_attn_by_inverse_layer_idx=[False])


def config_from_hf(hf):
    """Their config.json as a dict -> (model_type, ModelConfig). ValueError where it asks for other things."""
    kind = hf.get("model_type")
    if kind not in HF_KINDS:
        raise ValueError(f"model_type {kind!r} is not one of {', '.join(HF_KINDS)}")
    hf = {**hf, **(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}       # old files, new
    hf["rope_type"] = hf.get("rope_type") or hf.get("type")                                  # oldest
    for key, values in HF_ONLY.items():
        if hf.get(key) not in (None, *values):
            raise ValueError(f"{key} {hf[key]!r} is not supported, only {values or 'none'}")
    if kind not in ("mistral", "mixtral"):                             # Qwen files name a window, unused
        hf["sliding_window"] = None
    keys = {ours: key[kind == "gpt2"] for ours, key in HF_KEYS.items()}
    keys.update(HF_STRETCH if hf["rope_type"] == "llama3" else {})
    found = {ours: hf[key] for ours, key in keys.items() if hf.get(key) is not None}
    if kind == "gpt2" and "d_model" in found:
        found.setdefault("d_ff", 4 * found["d_model"])
    missing = [keys[ours] for ours in list(HF_KEYS)[:8] if ours not in found]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    ffns = {theirs: ours for ours, theirs in HF_FFN.items() if (ours in GATES) == (kind != "gpt2")}
    if found["ffn"] not in ffns:
        raise ValueError(f"{keys['ffn']} {found['ffn']!r} is not one of {', '.join(ffns)}")
    found["ffn"] = ffns[found["ffn"]]
    if hf.get("attention_bias") or hf.get("mlp_bias"):
        if kind != "llama" or not (hf.get("attention_bias") and hf.get("mlp_bias")):
            raise ValueError("attention_bias and mlp_bias are supported in llama alone, and both together")
        found["bias"] = "all"
    if kind == "mixtral":
        found["d_expert"] = found["d_ff"]
        if found.get("experts_per_token") == 1:                        # a lone gate is 1; here it is p
            raise ValueError("num_experts_per_tok 1 is not supported, only more")
    return kind, ModelConfig(**{**HF_KINDS[kind], **found})


def config_to_hf(c):
    """ModelConfig -> their config.json. It is read back, and what does not return is a ValueError."""
    kind = ("gpt2" if c.position == "learned" else "mixtral" if c.num_experts else "mistral" if c.window else
            "qwen3" if c.qk_norm else "qwen2" if c.bias == "qkv" else
            "mistral" if c.d_model % c.num_heads else "llama")               # their Llama wants N | D
    full = spelled_out(c)
    hf = {key[kind == "gpt2"]: getattr(full, ours) for ours, key in HF_KEYS.items()
          if c.num_experts or "expert" not in ours}
    hf.update({"model_type": kind, HF_KEYS["ffn"][kind == "gpt2"]: HF_FFN.get(c.ffn, c.ffn)})
    hf.pop(None, None)                                                       # fields without a key in GPT-2
    if kind != "gpt2":
        stretch = {key: getattr(c, ours) for ours, key in HF_STRETCH.items()}
        hf.update(sliding_window=c.window or None, attention_bias=c.bias == "all", mlp_bias=c.bias == "all",
                  rope_scaling={"rope_type": "llama3", **stretch} if c.rope_factor != 1 else None)
    back = spelled_out(config_from_hf(hf)[1])
    lost = [f"{name}={getattr(c, name)}" for name in asdict(c) if getattr(back, name) != getattr(full, name)]
    if lost:
        raise ValueError(f"the nearest architecture of Hugging Face, {kind}, has no {', '.join(lost)}")
    return hf


def spelled_out(c):
    """Zeros replaced by what they stand for, and what only training reads by its default."""
    training = ("dropout", "init", "balance", "balance_loss", "balance_devices", "router_z_loss",
                "router_noise", "router_jitter")                       # balance="bias" has a tensor to show
    width = c.expert_dim if c.num_experts else c.ffn_dim
    return replace(c, num_kv_heads=c.kv_heads, d_head=c.head_dim, d_ff=width, d_expert=width,
                   **{f.name: f.default for f in fields(c) if f.name in training})


def skeleton(c):
    """The model without numbers, on torch's "meta" device. An `init` that draws normal numbers would load
    150 MB of compiler there."""
    with torch.device("meta"):
        model = Transformer(replace(c, init="glorot", tie_embeddings=False))
    model.config = c
    return model.eval()


def hf_parts(kind, model):
    """For each tensor of theirs (its name, a view of ours with its numbers in its order, its shape)."""
    c, H, gpt2, parts = model.config, model.config.head_dim, kind == "gpt2", []
    for name, ours in model.state_dict().items():
        if c.tie_embeddings and name == "head.weight":                       # the embedding once more
            continue
        # "blocks.3.mixer.wo.weight" -> 3, mixer.wo, weight;   "blocks.3.ffn.w1" (experts) -> 3, ffn.w1, None
        layer, module, leaf = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+?)(?:\.(weight|bias))?", name).groups()
        names = HF_NAMES.get(module if leaf else f"{module}[e]", (None, None))[gpt2]
        if names is None:
            raise ValueError(f"{name} has no counterpart in a {kind} checkpoint")
        names, views = names.split(), [ours]
        if not leaf:
            names, views = [names[0].format(e) for e in range(len(ours))], ours.unbind()
        elif len(names) == 3:
            views = ours.split([c.num_heads * H, c.kv_heads * H, c.kv_heads * H])
        prefix = f"{HF_NAMES['blocks'][gpt2]}.{layer}." if layer else ""
        for theirs, view in zip(names, views):
            view = view.t() if gpt2 and layer and view.dim() == 2 else view
            shape = tuple(view.shape)
            if c.position == "rope" and re.search("[qk]_(proj|norm)", theirs):
                # A head's row 2j + p here is row p H/2 + j there: (heads,H/2,2,...) -> (heads,2,H/2,...).
                view = view.unflatten(0, (-1, H // 2, 2)).transpose(1, 2)
            parts.append((f"{prefix}{theirs}.{leaf or 'weight'}", view, shape))
    return parts


# Their container: 8 bytes n, little endian; n bytes of JSON, {name: {dtype, shape, data_offsets}}; numbers.
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return dict(json.load(f))
    except FileNotFoundError:
        raise FileNotFoundError(f"no {path}: give a folder of a model, such as that of  "
                                f"hf download Qwen/Qwen3-0.6B --local-dir qwen") from None
    except (ValueError, TypeError, RecursionError) as e:
        raise ValueError(f"{path} is truncated or damaged ({first_line(e)}): fetch it again") from None


def read_header(path):
    """{name: (path, first byte, shape, dtype)} of a .safetensors file. No number is read."""
    with open(path, "rb") as f:
        size, n = os.fstat(f.fileno()).st_size, int.from_bytes(f.read(8), "little")
        if not 2 <= n <= size - 8:
            raise ValueError(f"{path} is truncated, or no safetensors file: a header of {n:,} bytes does not "
                             f"fit into {size:,}; fetch it again")
        text = f.read(n)
    found = {}
    try:
        for name, t in json.loads(text).items():
            if name == "__metadata__":
                continue
            shape, (begin, end) = tuple(map(int, t["shape"])), map(int, t["data_offsets"])
            dtype = SAFETENSORS.get(t["dtype"], t["dtype"])                  # an unknown one stays a string
            size_of = getattr(dtype, "itemsize", None)
            if (not 0 <= begin <= end <= size - 8 - n
                    or size_of and end - begin != math.prod(shape) * size_of):
                raise ValueError(f"{name} of shape {shape} at bytes {begin} to {end} of {size - 8 - n}")
            found[name] = path, 8 + n + begin, shape, dtype
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path} is truncated or damaged ({first_line(e)}): fetch it again") from None
    return found


def find_tensors(folder):
    """read_header of model.safetensors, or of all the shards in its index."""
    index, found = os.path.join(folder, "model.safetensors.index.json"), {}
    shards = read_json(index).get("weight_map") if os.path.exists(index) else {"all": "model.safetensors"}
    if not isinstance(shards, dict):
        raise ValueError(f"{index} has no weight_map: fetch it again")
    for name in sorted(set(map(str, shards.values()))):
        path = os.path.join(folder, os.path.basename(name))
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} is missing: fetch it (pickled .bin weights are not read)")
        found.update(read_header(path))
    return found


def check_tensors(folder, stored, shapes):
    """The files hold what config.json promises: no tensor less, none more, each of its shape.
    Besides weights they may hold GPT-2's causal mask, RoPE's rates, and a tied matrix once more."""
    besides = r"\.attn\.(masked_)?bias$|rotary_emb|^lm_head\.weight$"
    unknown = [name for name in stored if name not in shapes and not re.search(besides, name)]
    for names, what in (([name for name in shapes if name not in stored], "missing"), (unknown, "unknown")):
        if names:
            raise ValueError(f"{folder}: {len(names)} tensors are {what}, such as {names[0]}: "
                             f"weights and config.json are not of one model")
    for name, shape in shapes.items():
        _, _, found, dtype = stored[name]
        if found != shape or not isinstance(dtype, torch.dtype):
            raise ValueError(f"{folder}: {name} has shape {found} and dtype {dtype}, and should have {shape} "
                             f"and one of {', '.join(SAFETENSORS)}")


def read_tensor(view, path, begin, shape, dtype):
    """Fill a view of ours: straight from the file where nothing is reordered, else through a copy of this one
    tensor. A mapped file would cost more: its pages count as ours until the system wants them back."""
    straight = view.shape == shape and view.is_contiguous() and view.dtype == dtype
    target = view if straight else torch.empty(shape, dtype=dtype)
    with open(path, "rb") as f:
        f.seek(begin)
        if f.readinto(target.view(torch.uint8).numpy()) != target.nbytes:
            raise ValueError(f"{path} became shorter while it was read: fetch it again")
    if not straight:
        view.copy_(target.view(view.shape))


def write_tensors(path, parts):
    """What hf_parts gives -> a .safetensors file."""
    codes = {dtype: code for code, dtype in SAFETENSORS.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, view, shape in parts:
        begin, end = end, end + view.nbytes
        header[name] = {"dtype": codes[view.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                                          # so that the numbers are aligned
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, view, shape in parts:
            f.write(view.reshape(shape).contiguous().view(torch.uint8).numpy())


def import_huggingface(folder, out):
    """Their folder -> out/checkpoint.pt with the weights in the files' dtype, and out/tokenizer.json."""
    refuse_overwriting(out, "checkpoint.pt", "tokenizer.json")
    path = os.path.join(folder, "config.json")
    hf = read_json(path)
    try:
        kind, c = config_from_hf(hf)
    except (ValueError, TypeError) as e:                                     # TypeError: "hidden_act": []
        raise ValueError(f"{path}: {e}") from None
    stored = {name.removeprefix("transformer." if kind == "gpt2" else ""): t
              for name, t in find_tensors(folder).items()}
    model = skeleton(c)
    shapes = {name: shape for name, _, shape in hf_parts(kind, model)}
    check_tensors(folder, stored, shapes)
    dtype = functools.reduce(torch.promote_types, (stored[name][-1] for name in shapes))     # loses nothing
    room = {name: torch.empty(t.shape, dtype=dtype) for name, t in model.state_dict().items()}
    load_weights(model, room, assign=True)
    if c.tie_embeddings:
        model.head.weight = model.embedding.weight
    for name, view, _ in hf_parts(kind, model):
        read_tensor(view, *stored[name])
    stop = hf.get("eos_token_id")                                            # one id, a list of them, or null
    stop = stop if isinstance(stop, list) else [] if stop is None else [stop]
    os.makedirs(out, exist_ok=True)
    save_checkpoint(os.path.join(out, "checkpoint.pt"), model, stop_ids=stop)
    copy_tokenizer(folder, out)
    print(f"{folder} -> {out}/checkpoint.pt: {kind}, {num_params(c):,} parameters, {dtype}")


def export_huggingface(checkpoint, folder):
    """A checkpoint, and the tokenizer.json beside it -> a folder that transformers loads."""
    refuse_overwriting(folder, "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    state = load_checkpoint(checkpoint)
    c = config_of(state)
    hf = config_to_hf(c)
    model = skeleton(c)
    load_weights(model, state["model"], assign=True)                         # takes the tensors over
    kind, dtype = hf["model_type"], model.embedding.weight.dtype
    parts = hf_parts(kind, model)
    os.makedirs(folder, exist_ok=True)
    write_tensors(os.path.join(folder, "model.safetensors"), parts)
    copy_tokenizer(os.path.dirname(checkpoint), folder)
    hf.update(architectures=["GPT2LMHeadModel" if kind == "gpt2" else f"{kind.capitalize()}ForCausalLM"],
              torch_dtype=str(dtype).removeprefix("torch."), bos_token_id=None,
              eos_token_id=state.get("stop_ids") or None)
    # Without a class named, transformers takes that of model_type, which may split words in its own way.
    plain = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, data in (("tokenizer_config.json", plain), ("config.json", hf)):   # the last makes it whole
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            json.dump(data, f, indent=1)
    print(f"{checkpoint} -> {folder}: {kind}, {num_params(c):,} parameters, {dtype}")


def refuse_overwriting(folder, *names):
    for path in (os.path.join(folder, name) for name in names):
        if os.path.exists(path):
            raise FileExistsError(f"{path} is there already: give another folder")


def copy_tokenizer(source, target):
    """bpe.py and transformers read the same file; this script sees ids alone."""
    try:
        shutil.copyfile(os.path.join(source, "tokenizer.json"), os.path.join(target, "tokenizer.json"))
    except FileNotFoundError:
        print(f"note: {source or '.'} has no tokenizer.json: put it into {target} before text is asked for")


# --- 13. for every script: command line, device, tables, plots ----------------------------------------------

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
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    have = [d for d in count if count[d]]
    name = have[0] if name == "auto" else name
    kind, _, index = name.partition(":")
    if not (index or "0").isdecimal() or int(index or 0) >= count.get(kind, 0):
        raise ValueError(f"--device {name} is not available here: this machine has {', '.join(have)}")
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


# --- 14. demo -----------------------------------------------------------------------------------------------

SMALL = 2e7                                                # parameters: built here within a second


def demo_formulas(names, contexts=(1024, 16384, 131072)):
    """Published shapes by the formulas alone: nothing of this size is built."""
    rows = []
    for name in names:
        c = ModelConfig(**PRESETS[name])
        flops = [flops_per_token(c, S) for S in contexts]
        total = [sum(f.values()) for f in flops]
        rows.append([name, f"{num_params(c):,}", f"{total[0] / 1e9:.2f}", f"{flops[0]['ffn'] / total[0]:.1%}",
                     *(f"{f['scores'] / t:.1%}" for f, t in zip(flops, total)),
                     f"{kv_bytes_per_token(c) / 1e3:.0f} kB", f"{16 * num_params(c) / 1e9:.1f} GB"])
    table("By the formulas (forward; FFN share at 1k; KV cache in bf16; "
          "training = 16 bytes a parameter with fp32 AdamW)",
          ["model", "parameters", "GFLOPs/token", "FFN", "scores 1k", "16k", "128k", "KV/token", "training"],
          rows)


def demo_counted(c, batch_size):
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
        again = training_loss(model, x, y)[1]
    with FlopCounterMode(display=False) as backward, sdpa_kernel(SDPBackend.MATH):
        again.backward()
    adam = torch.optim.AdamW(model.parameters())
    adam.step()
    moments = sum(t.nbytes for s in adam.state.values() for name, t in s.items() if name != "step")
    cache = model.make_cache()
    with torch.no_grad():
        model(x[:1], cache=cache)
    tokens, per_token = batch_size * T, train_flops(c, 1) / 3
    rows = [("parameters", num_params(c), sum(p.numel() for p in model.parameters())),
            ("forward FLOPs a token", per_token, forward.get_total_flops() / tokens),
            ("backward FLOPs a token", 2 * per_token, backward.get_total_flops() / tokens),
            (f"bytes kept for backward, batch {batch_size} x {T}",
             sum(activation_bytes(c, batch_size).values()), sum(kept.values())),
            ("AdamW state bytes (two fp32 numbers a parameter)", 8 * num_params(c), moments),
            (f"bytes kept to decode after {T} tokens, fp32", state_bytes(c, T, 4), cache.nbytes()),
            ("first loss (ln V with init zero)", math.log(c.vocab_size), loss.item())]
    show = lambda v: f"{v:,.4f}" if v < 100 else f"{v:,.0f}"
    shape = ", ".join(f"{k} {v}" for k, v in asdict(c).items() if v and k.startswith(("d_", "num_")))
    table(f"This model ({shape}; {c.norm}, {c.position}, {c.ffn})",
          ["quantity", "predicted", "counted", "ratio"],
          [[n, show(p), show(m), f"{m / p:.4f}" if p else "n/a"] for n, p, m in rows])


def variants(c):
    """[(label, ModelConfig)]: the architectures of this file in the shape of c."""
    c = replace(c, mixer="attention", layers="", window=0, attn_softcap=0.0, num_experts=0, mtp=0,
                experts_per_token=2, shared_experts=0, balance_devices=1)
    N = c.num_heads
    fifth = max(K for K in range(1, N + 1) if N % K == 0 and K <= max(1, N / 5))
    changes = [("multi-head attention", dict(num_kv_heads=0)),
               (f"grouped-query, {fifth} of {N} key heads", dict(num_kv_heads=fifth)),
               ("multi-query, one key head", dict(num_kv_heads=1)),
               ("3 local layers, 1 global", dict(layers="LLLG", window=math.ceil(c.context_length / 4))),
               ("keys shared by 2 layers", dict(layers="GC")),
               ("latent attention (MLA)", dict(mixer="mla", kv_latent=min(4 * c.head_dim, c.d_model // 2))),
               ("linear attention", dict(mixer="linear")),
               ("Mamba", dict(mixer="mamba")),
               ("3 Mamba, 1 attention", dict(layers="MMMG")),
               ("Hyena", dict(mixer="hyena")),
               ("8 experts, 2 active", dict(num_experts=8)),
               ("64 experts, 6 active, 2 shared",
                dict(num_experts=64, experts_per_token=6, shared_experts=2))]
    return [(label, replace(c, **change)) for label, change in changes]


def demo_variants(title, base):
    """One row a variant, by the formulas; of a small model also how far cached decoding is from one pass."""
    build = num_params(base) < SMALL

    def short(n):
        power = max(0, min(4, math.floor(math.log10(max(1, n)) / 3)))
        return f"{n / 1000**power:.3g} {' kMGT'[power]}".rstrip()
    rows = []
    for label, c in variants(base):
        numbers = [num_params(c), num_params_active(c), sum(flops_per_token(c, 1024).values()),
                   state_bytes(c, 1024), state_bytes(c, 131072)]
        rows.append([label, *map(short, numbers), *([f"{cache_error(c):.1e}"] if build else [])])
    table(title, ["variant", "parameters", "active", "FLOPs/token", "state 1k", "state 128k",
                  *(["cached - full"] if build else [])], rows)


@torch.no_grad()
def cache_error(c, prompt=40, steps=8):
    """Largest difference of a logit between decoding with a cache and one forward pass over everything."""
    torch.manual_seed(0)
    model = Transformer(replace(c, init="glorot")).eval()
    ids = torch.randint(0, c.vocab_size, (1, min(c.context_length, prompt + steps)))
    cache = model.make_cache()
    parts = [ids[:, :prompt], *ids[:, prompt:].split(1, 1)]
    cached = torch.cat([model(part, cache=cache) for part in parts if part.numel()], 1)
    return (cached - model(ids)).abs().max().item()


def demo_recall(pairs=(4, 16, 64, 256), heads=4, H=16, texts=16):
    """Associative recall: a text of P random pairs (key, value), one a position, then all P keys again; an
    answer is right if no other value of the text is nearer. Attention looks a key up among all P. A recurrent
    state is H x H numbers a head, the sum of P products: keys that are not orthogonal blur one another."""
    right = {"attention": [], "linear": []}
    for P in pairs:
        k, v = F.normalize(torch.randn(texts, heads, P, H), dim=-1), torch.randn(texts, heads, P, H)
        none = torch.zeros_like(k)                         # pairs ask for nothing, questions write nothing
        asked, keys, values = torch.cat((none, k), 2), torch.cat((k, none), 2), torch.cat((v, none), 2)
        read = chunked(asked, keys, values, asked.new_zeros(texts, heads, 2 * P))[0][:, :, P:]
        for name, y in (("attention", scaled_dot_product_attention(1000 * k, k, v)), ("linear", read)):
            y, want = (t.transpose(1, 2).flatten(2) for t in (y, v))         # (texts,P,heads*H)
            right[name].append((torch.cdist(y, want).argmin(-1) == torch.arange(P)).float().mean().item())
    table(f"Associative recall: right answers ({heads} heads of {H} dims, a state of {heads * H * H:,})",
          ["", *(f"{P} pairs" for P in pairs)],
          [[name, *(f"{share:.0%}" for share in shares)] for name, shares in right.items()])
    return right


def demo_reach(c, layers=4):
    """How far back the last output depends on the input, through stacked local layers."""
    window = max(2, c.context_length // (2 * layers))
    local = dict(num_layers=layers, layers="L", window=window, num_experts=0, init="glorot")
    model = Transformer(replace(c, **local))
    ids, seen = torch.randint(0, c.vocab_size, (1, c.context_length)), []
    model.embedding.register_forward_hook(lambda module, args, out: seen.append(out) or out.retain_grad())
    model(ids)[0, -1].square().sum().backward()
    counted = (seen[0].grad[0].abs().sum(-1) > 0).sum().item()
    print(f"\n{layers} local layers with a window of w = {window} reach L (w - 1) + 1 = "
          f"{layers * (window - 1) + 1} tokens, the last among them; the gradient reaches {counted}")


def demo_sorted(tokens=1024, repeats=5):
    """The two ways through the experts, forward and backward, taking turns."""
    rows = []
    for experts in (8, 64):
        moe, x = MoE(ModelConfig(num_experts=experts)), torch.randn(tokens, 128, requires_grad=True)
        ms = {moe.naive: [], moe: []}
        for way in [moe.naive, moe] * repeats:
            start = time.perf_counter()
            way(x).sum().backward()
            ms[way].append(1000 * (time.perf_counter() - start))
        loop, together = (sorted(m)[repeats // 2] for m in ms.values())
        rows.append([str(experts), f"{loop:.1f}", f"{together:.1f}", f"{loop / together:.1f}"])
    table(f"{tokens:,} tokens through the experts, forward and backward, median of {repeats}",
          ["experts", "loop, ms", "sorted, ms", "ratio"], rows)


def demo_experts(steps=120, experts=8, T=64):
    """Where tokens go as training proceeds, with and without balancing -> {balance: a load (E,) a step}."""
    with open(argparse.__file__, "rb") as f:                                 # a text that every Python has
        text = torch.tensor(list(f.read()))
    loads, rows = {}, []
    for balance in ("none", "loss", "bias"):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(vocab_size=256, context_length=T, d_model=64, num_layers=2,
                                        num_experts=experts, experts_per_token=1, d_expert=64, qk_norm=True,
                                        balance=balance, balance_loss=0.1))
        adam, moe, loads[balance] = torch.optim.AdamW(model.parameters(), 0.02), model.blocks[-1].ffn, []
        for _ in range(steps):
            ids = text[torch.randint(len(text) - T, (16, 1)) + torch.arange(T + 1)]
            ce, objective = training_loss(model, ids[:, :-1], ids[:, 1:])
            adam.zero_grad()
            objective.backward()
            adam.step()
            model.balance_experts(speed=0.01)
            loads[balance].append(moe.load)
        last = torch.stack(loads[balance][-20:])
        mean, beyond = last.mean(0), (last - 1 / experts).clamp(min=0).sum(1).mean()     # a fair share
        rows.append([balance, f"{mean.max():.0%}", f"{mean.min():.1%}", f"{(mean < 0.2 / experts).sum()}",
                     f"{beyond:.0%}", f"{ce:.2f}"])
    table(f"One expert a token, {steps} steps: shares of the tokens (mean of the last 20 steps)",
          [f"balance of {experts} experts", "busiest", "idlest", "nearly idle", "dropped at capacity 1",
           "last loss"], rows)
    return loads


def plot_shares(path, loads):
    """Where GPT-2 XL's FLOPs go as its context grows; where tokens go as experts learn."""
    plt = pyplot()
    if plt is None:
        return
    xl, contexts = ModelConfig(**PRESETS["gpt2-xl"]), [2**i for i in range(10, 18)]
    flops = [flops_per_token(xl, S) for S in contexts]
    fig, axes = plt.subplots(1, 1 + len(loads), figsize=(14, 3.5), sharey=True)
    shares = [[f[part] / sum(f.values()) for f in flops] for part in flops[0]]
    axes[0].stackplot(contexts, shares, labels=flops[0])
    axes[0].set(title="GPT-2 XL: shares of the FLOPs", xlabel="context, tokens", xscale="log", ylim=(0, 1))
    axes[0].legend(loc="lower left", fontsize=8)
    for ax, (balance, load) in zip(axes[1:], loads.items()):
        ax.stackplot(range(len(load)), torch.stack(load).t().numpy())
        ax.set(title=f"tokens by expert, balance: {balance}", xlabel="step")
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    print(f"\nsaved {path}")


def demo(c, out):
    os.makedirs(out, exist_ok=True)                        # if this fails, then before the work
    demo_formulas(["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "llama2-7b", "llama2-13b"])
    small = num_params(c) < SMALL
    batch_size = 4 if small else 1
    # AdamW, what backward needs, and the scores (T,T): the counter's attention writes them, and a gradient.
    memory = (16 * num_params(c) + sum(activation_bytes(c, batch_size).values())
              + 8 * batch_size * c.num_layers * c.num_heads * c.context_length**2)
    if memory < 6e9:
        demo_counted(c, batch_size)
    else:
        print(f"\na step of this model takes {memory / 1e9:,.0f} GB here: the formulas stand alone")
    demo_variants("Llama-2-13B's shape with other insides (state: bytes to decode 1k and 128k tokens, bf16)",
                  ModelConfig(**PRESETS["llama2-13b"]))
    demo_variants("This model with other insides", c)
    if small and memory < 6e9:
        demo_reach(c)
    demo_recall()
    demo_sorted()
    plot_shares(os.path.join(out, "model.png"), demo_experts())


def parse_args(argv=None):
    """The command line, checked; nothing runs. import and export have arguments of their own."""
    argv = sys.argv[1:] if argv is None else argv
    parser, command = cli(__doc__), argv[0] if argv else None
    if command in ("import", "export"):
        parser.add_argument("command", metavar=command)
        if command == "export":
            parser.add_argument("checkpoint", metavar="CHECKPOINT", help="such as out/checkpoint.pt")
        parser.add_argument("folder", metavar="DIR", help="of config.json, *.safetensors, tokenizer.json")
        if command == "import":
            parser.add_argument("--out", default="out", help="folder for checkpoint.pt and tokenizer.json")
        return parser.parse_args(argv)
    add_model_flags(parser)
    parser.add_argument("--out", default="out", help="folder for the picture")
    args = parser.parse_args(argv)
    try:
        args.command, args.config = None, model_config(args)
    except ValueError as e:
        parser.error(first_line(e))
    return args


def main():
    args, parser = parse_args(), cli(__doc__)
    try:
        if args.command == "import":
            import_huggingface(args.folder, args.out)
        elif args.command == "export":
            export_huggingface(args.checkpoint, args.folder)
        else:
            demo(args.config, args.out)
    except (ValueError, OSError) as e:
        parser.error(first_line(e))
    except KeyboardInterrupt:
        parser.exit(130, "\nmodel.py: interrupted\n")


if __name__ == "__main__":
    main()
