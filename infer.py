r"""infer.py - lecture 10: inference.

What   From a checkpoint to text, for many users at once: drawing tokens, a KV cache in blocks, continuous
       batching, speculative sampling, quantisation, pruning, distillation, masked diffusion, and a server
       that speaks the OpenAI API.
Why    Training sees all tokens at once; decoding makes one at a time, and each reads every weight and the
       whole cache for a few FLOPs a byte, where a GPU needs hundreds. So time is bytes read: read them for
       more rows (batching), for more tokens (speculation), or have fewer of them (smaller caches, fewer bits,
       smaller models). Llama-2-13B in bf16 on an H100: at most 125 tokens/s for one user, 2,689 for 64.

Equations
       cache       = 2 K H L numbers a token;   latency >= (weights + B * cache * S) bytes / bandwidth
       intensity   = B T in the feed-forward layers;  S T / (S + T) in attention, whatever B
       speculative : keep draft x with probability min(1, p(x)/q(x)), else draw from max(p - q, 0): exactly p
       absmax      : w = scale * integer,  scale = max|w| / (2^(bits-1) - 1)
       distillation= sum p ln(p / s);   diffusion: -ln p(text) <= E over t of 1/t * sum over masked of -ln p

Run    python infer.py                                     # the ladder below, a minute on two cores
       python infer.py --prompt "def main"                 # continue a text with out/checkpoint.pt
       python infer.py chat --checkpoint out/align/checkpoint.pt
       python infer.py serve --port 8000                   # OpenAI API; a chat page at http://127.0.0.1:8000/
       python infer.py batch FILE.jsonl                    # many prompts, in order, resumable
       python infer.py quantize                            # the price of int8, int4, fp8, AWQ, LLM.int8
       python infer.py prune --minutes 5 --out out/small   # cut and repair; also: distill
       python infer.py eagle --minutes 5                   # a drafter for --draft out/eagle.pt; also: medusa
       python infer.py diffuse --minutes 2                 # all places at once, against one after the other
       python infer.py cost                                # the lecture's calculator

You should see (two threads on two cores, 17 s, the default run's checkpoint; shortened)
                                 tokens/s at most  measured  first, ms  cache MB  tokens/pass  same text
       one text: no cache                     445        72          -         -         1.00       100%
         KV cache                           2,005       202          -         -         1.00       100%
         this engine                        2,005       332          8       1.0         1.00       100%
         n-gram drafts                      3,078       294          7       1.0         1.60       100%
       24 texts: one at a time              1,947       364          5       1.0         1.00       100%
         8 at a time, padded                7,902       514          -         -         1.00       100%
         continuous, 8 rows                 7,902     1,030         24       8.4         1.00       100%
         paged, prefixes shared             7,902     1,064         36       2.9         1.00       100%
         int8 cache (lossy)                 7,902       877         30       0.8         1.00        97%
         int8 weights (lossy)               7,902       842         31       2.9         1.00        86%
       cache (Llama-2-13B, H100)  batch        GB  ms/token  tokens/s
       40 key/value heads             1     26.87      8.02       125
                                     64     79.72     23.80     2,689
                                    256  240.78 *     71.87     3,562
       8 (grouped)                  256     65.63     19.59    13,068

Outline  1 a request, drawing   2 naive   3 the cache   4 the engine   5 fewer, better shaped operations
         6 speculation   7 quantisation   8 pruning, distillation   9 diffusion   10 accounting
         11 the server   12 commands   13 demo   14 command line.   On a first reading: 1 to 4, 6, 10.

References  stand at their sections; above all Pope et al. 2022 (the cost), Yu et al. 2022 (Orca),
            Kwon et al. 2023 (PagedAttention), Leviathan et al. 2023 (speculative sampling).

What serving is for besides chat: evaluation, reinforcement learning (align.py samples more than it trains),
test-time compute; over a model's life inference outweighs training. vLLM, TensorRT-LLM and TGI do what is
here with kernels that read cache blocks in place (FlashDecoding: one row's cache over many cores).
"""
import codecs
import collections
import contextlib
import copy
import ctypes
import hashlib
import http.server
import json
import math
import os
import queue
import random
import re
import select
import signal
import socket
import socketserver
import sys
import threading
import time
import timeit
from dataclasses import asdict, dataclass, field, replace

# CPU threads wait for one another in loops of this many turns, then sleep. The small calls between a decoding
# step's products take longer than model.py's 3,000 turns, and waking is dear. A step of a 12-layer model with
# 1 and 16 rows: 10.6 and 26.4 ms with 3,000 turns, 7.8 and 20.4 with 10,000; beside a busy process 25 and
# 51 ms for one row, but 10 with --threads 1.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import bpe
import model as M                                          # before torch, which reads it

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# Shape letters: B rows of a batch, T tokens fed, S tokens in the cache, D model, N query heads, K key/value
# heads, H head dim, V vocabulary, L layers; k drafted tokens. GB = 1e9 bytes.


# --- 1. a request, and how a token is drawn for it ----------------------------------------------------------

@dataclass(eq=False)
class Request:
    """One text being continued: what was asked for, what came of it, and where its past is cached."""
    ids: list                                              # the prompt; new tokens are appended
    max_tokens: int = 128
    temperature: float = 1.0                               # logits are divided by it; 0: the likeliest token
    top_k: int = 0                                         # only the k likeliest; 0: all
    top_p: float = 1.0                                     # only the likeliest whose mass reaches p
    min_p: float = 0.0                                     # only those with this share of the best one's mass
    repetition_penalty: float = 1.0                        # > 1 makes tokens that were seen less likely
    seed: int = 0
    stop: tuple = ()                                       # strings that end the text; not shown
    stop_ids: tuple = ()                                   # tokens that end it; not shown
    n: int = 1                                             # continuations of the same prompt
    tokenizer: object = None                               # needed for .text and stop strings only
    listener: object = None                                # whom the caller tells about it
    index: int = 0                                         # which of the n
    finish: str = ""                                       # stop, length, cancelled; empty while it runs
    text: str = ""
    shown: int = 0                                         # characters of text that next_text gave out
    fresh: bool = True                                     # no token was drawn since it was let in
    length: int = 0                                        # tokens in the cache; ids[length:] are to be fed
    blocks: list = field(default_factory=list)             # the cache's blocks of this text, in order
    keys: list = field(default_factory=list)               # hashes of its full blocks
    dropped: int = 0                                       # leading blocks that no window reaches any more
    states: dict = field(default_factory=dict)             # what recurrent layers carry
    feature: object = None                                 # the model's last feature, for its drafter (D,)

    def __post_init__(self):
        self.prompt_tokens = len(self.ids)
        self.begin(self.seed)

    def begin(self, seed):
        """Its own random stream: the same request gives the same text alone or in any batch (with drafts,
        whose number depends on the others: a text of the same distribution)."""
        self.random, self.decoder = random.Random(seed), codecs.getincrementaldecoder("utf-8")("replace")

    def check(self, context_length, vocab_size):
        """ValueError if no model of this shape can do it."""
        room = context_length - len(self.ids)
        if not self.ids or room < 1:
            raise ValueError(f"the prompt has {len(self.ids)} tokens: this model takes "
                             f"1 to {context_length - 1}")
        if not all(isinstance(i, int) and 0 <= i < vocab_size for i in self.ids):
            raise ValueError(f"the prompt holds an id outside 0 .. {vocab_size - 1}")
        if not all(self.stop):
            raise ValueError("a stop string is empty, and ends every text before it begins: leave it out")
        for name, low, high in (("max_tokens", 1, room), ("temperature", 0, 100), ("top_k", 0, 10**9),
                                ("top_p", 1e-6, 1), ("min_p", 0, 1), ("repetition_penalty", 0.01, 100),
                                ("n", 1, 16)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)} is out of range: {low:g} to {high:g}"
                                 + f", the context's {context_length} tokens less the prompt's"
                                 * (name == "max_tokens"))

    def push(self, token):
        """Take one drawn token."""
        if token in self.stop_ids:
            self.finish = "stop"
        else:
            self.ids.append(token)
            if len(self.ids) - self.prompt_tokens >= self.max_tokens:
                self.finish = "length"
        if self.tokenizer is not None:
            data = b"" if self.finish == "stop" else self.tokenizer.vocab.get(token, b"")
            self.text += self.decoder.decode(data, final=bool(self.finish))  # half a character waits
            found = [at for at in map(self.text.find, self.stop) if at >= 0]
            if found:
                self.text, self.finish = self.text[:min(found)], "stop"

    def next_text(self):
        """What can be shown now: not an end that may yet become a stop string."""
        end = len(self.text)
        if not self.finish:
            end -= max((n for s in self.stop for n in range(1, min(len(s), end + 1))
                        if self.text.endswith(s[:n])), default=0)
        out, self.shown = self.text[self.shown:end], max(self.shown, end)
        return out

    output = property(lambda self: self.ids[self.prompt_tokens:])


DIVERGED = "the model's probabilities are not numbers: its training diverged; use an earlier checkpoint"


def likeliest(logits):
    """logits (...,V) -> ids (...)."""
    best, ids = logits.max(-1)
    if best.isnan().any():
        raise ValueError(DIVERGED)
    return ids


def distribution(logits, requests, drafted=None):
    """logits (R,V), a request a row -> the probabilities (R,V) its token is drawn from. drafted: tokens that
    a row assumes after the request's own, which only the repetition penalty must know.

    Temperature, then top-k, top-p and min-p cut the tail. Every decoder below draws from this function's
    result and nothing else: speculative sampling is exact only if drafts and target are both processed so.
    """
    logits = logits.float()
    if any(r.repetition_penalty != 1 for r in requests):
        logits = logits.clone()
    for i, r in enumerate(requests):
        if r.repetition_penalty != 1:                      # Keskar et al. 2019: less likely, either sign
            seen = torch.tensor(list({*r.ids, *(drafted[i] if drafted else ())}), device=logits.device)
            z = logits[i, seen]
            logits[i, seen] = torch.where(z > 0, z / r.repetition_penalty, z * r.repetition_penalty)
    if all(r.temperature == 0 for r in requests):
        return F.one_hot(likeliest(logits), logits.shape[-1]).float()
    def column(values):
        return torch.tensor(list(values), device=logits.device)[:, None]
    # 1e-3 is as good as greedy; nearer to 0, the quotient would overflow.
    probs = M.softmax(logits / column(max(r.temperature, 1e-3) for r in requests))
    if all(r.temperature and not r.top_k and r.top_p == 1 and not r.min_p for r in requests):
        return probs                                       # nothing to cut: no need to sort
    probs, order = probs.sort(dim=-1, descending=True, stable=True)
    rank, before = torch.arange(probs.shape[-1], device=logits.device), probs.cumsum(-1) - probs
    keep = ((rank < column(1 if r.temperature == 0 else r.top_k or len(rank) for r in requests))
            & (before < column(r.top_p if r.top_p < 1 else math.inf for r in requests))
            & (probs >= column(r.min_p for r in requests) * probs[:, :1]))
    keep[:, 0] = True
    probs = probs * keep
    return torch.zeros_like(probs).scatter(-1, order, probs / probs.sum(-1, keepdim=True))


def draw(probs, requests):
    """probs (R,V) -> R tokens: the first whose cumulated mass exceeds one number of the request's stream."""
    if all(r.temperature == 0 for r in requests):          # one token has all the mass
        return probs.argmax(-1).tolist()
    probs = probs.cpu() if probs.device.type == "mps" else probs             # which has no double
    mass = probs.double().cumsum(-1)
    if not (mass[:, -1] > 0).all():                        # NaN compares false
        raise ValueError(DIVERGED)
    u = torch.tensor([[r.random.random()] for r in requests], dtype=torch.double).to(mass.device)
    return torch.searchsorted(mass, u * mass[:, -1:], right=True)[:, 0].tolist()


# --- 2. the naive version -----------------------------------------------------------------------------------
# Without a cache: model.generate, which runs the whole text again for every token, O(T^3) in all.

def example(model):
    """One of its tensors: which device, which type."""
    return next(t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())


@torch.inference_mode()
def generate_naive(model, ids, max_tokens):
    """Greedy, one text, with a cache: prefill feeds the whole prompt at once, then each step feeds one token.
    O(T^2) in all. Everything below must give these tokens."""
    cache, feed, out = model.make_cache(), ids, []
    for _ in range(max_tokens):
        logits = model(torch.tensor([feed], device=example(model).device), cache=cache)
        out.append(logits[0, -1].argmax().item())
        feed = out[-1:]
    return out


@torch.inference_mode()
def generate_static(model, prompts, limits, batch_size):
    """Greedy, batch_size texts at a time, padded on the left to the longest prompt; all wait for the longest
    answer. Padding has a position after every query's, where the causal mask hides it."""
    out, device = [], example(model).device
    for i in range(0, len(prompts), batch_size):
        batch, T = prompts[i:i + batch_size], max(map(len, prompts[i:i + batch_size]))
        feed = torch.tensor([[0] * (T - len(p)) + p for p in batch], device=device)
        positions = torch.tensor([[model.config.context_length - 1] * (T - len(p)) + list(range(len(p)))
                                  for p in batch], device=device)
        cache, texts = model.make_cache(), []
        for _ in range(max(limits[i:i + batch_size])):
            feed = model(feed, positions, cache)[:, -1:].argmax(-1)
            positions = positions[:, -1:] + 1
            texts.append(feed[:, 0].tolist())
        out += [list(text)[:n] for text, n in zip(zip(*texts), limits[i:])]
    return out


# --- 3. the cache: blocks and who owns them -----------------------------------------------------------------

class Pool:
    """Cache memory in blocks of block_size tokens (Kwon et al. 2023, PagedAttention).

    Reserving context_length tokens a request wastes most of them, as nobody knows how long a text becomes.
    In blocks a text wastes less than one, and texts that begin alike share blocks: a full block is found by
    the hash of all tokens up to its end. A block that two own is copied before either writes to it (drafters
    feed one token again, in place: where twins differ there, their drafts are worse, their texts not). One
    table of blocks serves all layers. A contiguous cache is the case of one block a text.
    """
    def __init__(self, num_blocks, block_size, int8=False, share=True):
        self.num_blocks, self.block_size, self.int8, self.share = num_blocks, block_size, int8, share
        self.free = dict.fromkeys(range(num_blocks))       # an ordered set: the longest unused comes first
        self.owners = [0] * num_blocks
        self.key_of, self.block_of = {}, {}                # of full blocks, free ones included until reused
        self.layers, self.step = [], None

    def take(self):
        """A block to write to; what it held is forgotten. None: all are owned."""
        if not self.free:
            return None
        block = next(iter(self.free))
        del self.free[block]
        self.block_of.pop(self.key_of.pop(block, None), None)
        self.owners[block] = 1
        return block

    def own(self, block):
        self.free.pop(block, None)
        self.owners[block] += 1
        return block

    def drop(self, block):
        self.owners[block] -= 1
        if not self.owners[block]:
            self.free[block] = None

    def register(self, key, block):
        if key not in self.block_of and block not in self.key_of:
            self.block_of[key], self.key_of[block] = block, key

    def copy(self, source, target):
        for t in self.tensors():
            t[target] = t[source]

    @torch.inference_mode()
    def clear(self):
        """After a step that failed: a NaN left in a block would reach its next owners, for 0 NaN is NaN."""
        self.key_of, self.block_of = {}, {}
        for t in self.tensors():
            t.zero_()

    def used(self):
        return self.num_blocks - len(self.free)

    def tensors(self):
        return [t for layer in self.layers for store in layer.stores.values() for t in store]

    def nbytes(self):
        return sum(t.nbytes for t in self.tensors())


class PagedLayer:
    """One layer's cache on the pool's blocks; a mixer takes it for a model.KVCache.

    A store, of keys, values or both, is one tensor (num_blocks, heads, block_size, H): what a head reads lies
    in one piece. As int8 it is two: round(x / scale), and the scales, one a token and head: a large one does
    not cost its neighbours their precision.
    """
    def __init__(self, pool):
        self.pool, self.stores = pool, {}
        pool.layers.append(self)

    def append(self, k, v, positions):
        """k, v (B,K,T,H) of the step's rows -> everything these rows have, and its positions (B,S). Slots
        beyond a row's end hold old numbers at positions that no query reaches: the mask hides them."""
        k, v = (self.exchange(name, x.transpose(1, 2)) for name, x in (("k", k), ("v", v)))
        return k, v, self.pool.step.key_positions

    def exchange(self, name, x):
        """Write x (B,T,heads,H) to the step's slots; read all that its rows have, (B,heads,S,H)."""
        pool, heads, parts = self.pool, x.shape[2], [x]
        if pool.int8 and x.numel():
            scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
            parts = [(x / scale).round().to(torch.int8), scale]
        if name not in self.stores:     # zeros, not empty: a masked key has weight 0, and 0 times NaN is NaN
            shape = pool.num_blocks, heads, pool.block_size
            self.stores[name] = [p.new_zeros(*shape, p.shape[3]) for p in parts]
        slots, blocks = pool.step.places(heads)
        for t, part in zip(self.stores[name], parts):
            t.flatten(0, 2).index_copy_(0, slots, part.flatten(0, 2))
        numbers, *scales = [pool.step.read(t, blocks) for t in self.stores[name]]
        return (numbers * scales[0]).to(x.dtype) if scales else numbers


class Step:
    """One forward pass over rows of the pool; the model takes it for its cache (.layers, .length)."""
    def __init__(self, pool, layers, positions, table, base, S, run, even):
        """positions (B,T); table (B,blocks), the rows' blocks from position base (B,1) on; S tokens to read;
        run: the first block, where the rows' blocks are consecutive, one each; even: all rows have S."""
        self.layers, self.length, self.positions = layers, 0, positions
        self.table, self.S, self.run, size = table, S, run, pool.block_size
        place = positions - base
        self.block, self.at, self.size = table.gather(1, place // size), place % size, size      # (B,T)
        self.key_positions = base + torch.arange(S, device=positions.device)                     # (B,S)
        # No mask is needed: one query, which sees all keys, or the queries are all the keys (is_causal).
        self.plain = even and positions.shape[1] in (1, S)
        self.masks, self.turns, self.found = {}, None, {}

    def places(self, heads):
        """Indices into a store (num_blocks, heads, block_size, H), once a step: of what is fed, over its
        first three dimensions (B*T*heads,); of the rows' blocks, over its first two (B,heads,blocks)."""
        if heads not in self.found:
            head = torch.arange(heads, device=self.table.device)
            slots = (self.block[..., None] * heads + head) * self.size + self.at[..., None]
            self.found[heads] = slots.flatten(), self.table[:, None] * heads + head[:, None]
        return self.found[heads]

    def read(self, t, blocks):
        """What the rows have of a store, (B,heads,S,H): a view where their blocks lie in order, else a copy,
        as torch's attention wants one tensor (a GPU kernel for paged attention reads blocks in place)."""
        if self.run is not None:
            return t[self.run:self.run + len(self.table), :, :self.S]
        t = t.flatten(0, 1)
        t = t[:, :self.S] if blocks.shape[2] == 1 else t
        return t.index_select(0, blocks.flatten()).unflatten(0, blocks.shape).flatten(2, 3)[:, :, :self.S]

    def mask(self, window, dtype):
        """(B,1,T,S) of 0 and -inf, once a step, not once a layer. None: see plain."""
        if self.plain and not 0 < window < self.S:
            return None
        if window not in self.masks:
            seen = M.attention_mask(self.positions, self.key_positions, window)[:, None]
            self.masks[window] = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
                ~seen, -math.inf)
        return self.masks[window]


def stack_states(caches):
    """Recurrent layers carry a state of fixed size instead of blocks; a batch is their tensors joined."""
    whole = copy.copy(caches[0])
    for name, t in vars(whole).items():
        if isinstance(t, torch.Tensor):
            setattr(whole, name, torch.cat([getattr(c, name) for c in caches]))
    return whole


def unstack_states(whole, caches):
    for i, c in enumerate(caches):
        for name, t in vars(whole).items():
            setattr(c, name, t[i:i + 1] if isinstance(t, torch.Tensor) else t)


# --- 4. the engine: continuous batching ---------------------------------------------------------------------

CACHE_BYTES = 4e9                                          # of the pool, where num_blocks is not given
# Tokens times parameters below which a second CPU thread does not help a step, and may hurt: 2.1 ms a token
# of a 1.8M model with one thread or two, and with two up to 3.7 on a shared machine.
SMALL = 5e6


class Engine:
    """Continuous batching (Yu et al. 2022, Orca): requests join and leave between two tokens.

    A step lets waiting requests in, feeds one chunk of prompts, and one token (or its drafts) of the others.
    Reading the weights is the cost of a step, and all that decode share it in one pass; attention is each
    row's own, so batching does nothing for it. Chunks bound how long a long prompt holds up the others
    (Agrawal et al. 2023). Rows are at different lengths and no token is padded: positions and block tables
    say who is where; attention reads each row as far as the longest, and masks the rest.
    """
    def __init__(self, model, max_batch=16, block_size=16, num_blocks=0, chunk=256, int8_cache=False,
                 share=True, drafter=None, graphs=True):
        c, self.device = model.config, example(model).device
        made = [block.mixer.make_cache() for block in model.blocks]
        spans = [m.window for m in made if isinstance(m, M.KVCache)]
        self.window = max(spans) if spans and all(spans) and drafter is None else 0  # older blocks are let go
        self.recurrent = any(isinstance(m, M.StateCache) for m in made)
        if drafter is not None and self.recurrent:
            raise ValueError("speculative decoding must take back tokens that the target rejects, and a "
                             "recurrent state cannot: use a model whose layers all attend")
        size = min(block_size or c.context_length, c.context_length)         # 0: contiguous, one a request
        most = CACHE_BYTES // max(1, M.state_bytes(c, size, example(model).itemsize))
        blocks = num_blocks or max(1, min(max_batch * -(-c.context_length // size), int(most)))
        self.pool = Pool(blocks, size, int8_cache, share and not self.recurrent)
        self.model, self.max_batch, self.chunk, self.fresh_states = model, max_batch, chunk, made
        self.params = M.num_params(c)
        self.layers = self.new_layers(made)
        # CUDA graphs; not with experts, whose loads differ from step to step.
        graphs = graphs and self.device.type == "cuda" and not c.num_experts and not self.recurrent
        self.graphs = {} if graphs else None
        self.graph_pool = torch.cuda.graph_pool_handle() if graphs else None
        self.waiting, self.running = collections.deque(), []
        self.counters, self.stop_ids, self.drafter = collections.Counter(), (), drafter
        if drafter is not None:
            drafter.attach(self)

    def new_layers(self, made):
        return [PagedLayer(self.pool) if isinstance(m, M.KVCache) else None for m in made]

    def check(self, r):
        """ValueError, with the remedy, if r asks for what cannot be."""
        r.check(self.model.config.context_length, self.model.config.vocab_size)
        have, k = self.pool.num_blocks * self.pool.block_size, self.drafter.k if self.drafter else 0
        need = min(len(r.ids) + r.max_tokens + k, self.model.config.context_length)
        need = min(need, self.window + self.chunk + 2 * self.pool.block_size) if self.window else need
        if need > have:                                    # alone it must fit, or it would wait for ever
            raise ValueError(f"this request may need {need} tokens of cache, and there are {have}: raise "
                             f"--num_blocks, or lower max_tokens")

    def add(self, r):
        self.check(r)
        self.waiting.append(r)
        self.counters["requests"] += 1
        return r

    def busy(self):
        return bool(self.waiting or self.running)

    def generate(self, requests):
        """All of them to the end -> their new tokens."""
        for r in requests:
            self.add(r)
        while self.busy():
            self.step()
        return [r.output for r in requests]

    @torch.inference_mode()
    def step(self):
        """One iteration -> the requests that got tokens or ended."""
        self.admit()
        groups, budget, changed = collections.defaultdict(list), self.chunk, []
        k = min([self.drafter.k if self.drafter else 0,
                 *(self.model.config.context_length - 1 - r.length for r in self.running if not r.fresh)])
        for r in list(self.running):                       # oldest first: reserve puts back the youngest
            n = min(len(r.ids) - r.length, budget) if r.fresh else 1 + k
            if n and r in self.running and self.reserve(r, n):
                groups[r.length if r.fresh else -1, n].append(r)   # equal pieces of prompts need no mask
                budget -= n if r.fresh else 0
        threads, tokens = torch.get_num_threads(), sum(n * len(rows) for (_, n), rows in groups.items())
        try:
            if tokens * self.params < SMALL and self.device.type == "cpu":
                torch.set_num_threads(1)
            for (start, n), rows in groups.items():
                rows.sort(key=lambda r: r.blocks[-1])      # neighbours in memory: see Step.read
                changed += self.speculate(rows, k) if k and start == -1 else self.extend(rows, n)
        finally:
            torch.set_num_threads(threads)
        for r in [r for r in self.running if r.finish]:
            self.release(r)
        return changed

    def admit(self):
        """Let requests in while there is room for their prompts; what an earlier one computed is found."""
        for r in [r for r in (*self.waiting, *self.running) if r.finish]:    # cancelled from outside
            self.release(r)
        size, pool = self.pool.block_size, self.pool
        most = min(-(-self.model.config.context_length // size), pool.num_blocks)            # of any request
        while self.waiting and len(self.running) < self.max_batch:
            r = self.waiting[0]
            if self.running and len(pool.free) < min(-(-len(r.ids) // size) + 1, most):
                break
            self.running.append(self.waiting.popleft())
            r.states = {i: copy.copy(m) for i, m in enumerate(self.fresh_states)
                        if isinstance(m, M.StateCache)}
            for i in range((len(r.ids) - 1) // size if pool.share else 0):   # one token is left to feed
                block = pool.block_of.get(self.key(r, i))
                if block is None:
                    break
                r.blocks.append(pool.own(block))
                r.length += size
                self.counters["shared_tokens"] += size
            self.advance(r, 0)                             # of those, some may lie behind the window

    def key(self, r, i):
        """A hash of all tokens up to the end of block i; two texts that begin alike have the same."""
        size = self.pool.block_size
        while len(r.keys) <= i:
            at = len(r.keys) * size
            tokens = np.array(r.ids[at:at + size], np.int64).tobytes()
            r.keys.append(hashlib.blake2b((r.keys[-1] if r.keys else b"") + tokens, digest_size=16).digest())
        return r.keys[i]

    def reserve(self, r, n):
        """Blocks for r's next n tokens, each its own. If none is left, the youngest request is put back."""
        size, pool = self.pool.block_size, self.pool
        for i in range(r.length // size, -(-(r.length + n) // size)):
            shared = i < len(r.blocks) and pool.owners[r.blocks[i]] > 1
            if i < len(r.blocks) and not shared:
                continue
            while (block := pool.take()) is None:
                victim = self.running[-1]
                self.release(victim)                       # its tokens stay; its cache is computed again
                victim.fresh = True
                self.waiting.appendleft(victim)
                self.counters["preempted"] += 1
                if victim is r:
                    return False
            if shared:                                     # copy on write
                pool.copy(r.blocks[i], block)
                pool.drop(r.blocks[i])
                r.blocks[i] = block
                self.counters["copied_blocks"] += 1
            else:
                r.blocks.append(block)
        return True

    def advance(self, r, n):
        """n more tokens of r are cached: full blocks can be found now, those behind the window go."""
        size = self.pool.block_size
        if self.pool.share:
            for i in range(r.length // size, (r.length + n) // size):
                self.pool.register(self.key(r, i), r.blocks[i])
        r.length += n
        while self.window and (r.dropped + 1) * size <= r.length - self.window:
            self.pool.drop(r.blocks[r.dropped])
            r.blocks[r.dropped] = None
            r.dropped += 1

    def release(self, r):
        for block in reversed(r.blocks[r.dropped:]):       # a text's end is reused before its beginning
            self.pool.drop(block)
        r.blocks, r.length, r.dropped, r.states, r.feature = [], 0, 0, {}, None
        for where in (self.running, self.waiting):
            if r in where:
                where.remove(r)

    def fork(self, r, i):
        """Continuation i of the same prompt. It shares all blocks, the half full one too, until it writes."""
        twin = copy.copy(r)
        twin.ids, twin.keys, twin.index, twin.n = list(r.ids), list(r.keys), r.index + i, 1
        twin.blocks = [b if b is None else self.pool.own(b) for b in r.blocks]
        twin.states = {j: copy.copy(s) for j, s in r.states.items()}
        twin.begin(r.seed + i)
        self.running.append(twin)
        return twin

    def extend(self, rows, n):
        """Feed n tokens of each row, of its prompt or the one it drew last -> the rows that have no more to
        feed, each with a new token."""
        features = self.run(self.model, self.layers, rows, [r.ids[r.length:r.length + n] for r in rows],
                            [r.length for r in rows])
        for r in rows:
            self.advance(r, n)
        if self.drafter is not None:
            self.drafter.observe(rows, features, [n] * len(rows))
        self.counters["prompt_tokens"] += n * len(rows) if rows[0].fresh else 0
        through = [(i, twin) for i, r in enumerate(rows) if r.length == len(r.ids)
                   for twin in (r, *(self.fork(r, j) for j in range(1, 1 if r.output else r.n)))]
        if through:
            self.emit([r for _, r in through], self.logits(features[[i for i, _ in through], -1]))
        return [r for _, r in through]

    def speculate(self, rows, k):
        """Guess k tokens a row and judge them in one pass -> the rows, each with 1 to k + 1 new tokens."""
        drafts, q = self.drafter.propose(rows, k)
        if q is None:                                      # no idea
            return self.extend(rows, 1)
        features = self.run(self.model, self.layers, rows, [r.ids[-1:] + d for r, d in zip(rows, drafts)],
                            [r.length for r in rows])
        p = distribution(self.logits(features).flatten(0, 1), [r for r in rows for _ in range(k + 1)],
                         [d[:i] for d in drafts for i in range(k + 1)]).unflatten(0, (len(rows), k + 1))
        going = []
        for i, (r, d) in enumerate(zip(rows, drafts)):
            tokens = accept(p[i], q[i], d, r)
            self.counters.update(drafted=k, judged=min(k, len(tokens)), accepted=len(tokens) - 1)
            for token in tokens:
                if not r.finish:
                    r.push(token)
                    self.counters["tokens"] += 1
            if not r.finish:
                self.advance(r, len(tokens))               # each row goes on at its own length
                going.append((i, len(tokens)))
        if going:
            at, counts = zip(*going)
            self.drafter.observe([rows[i] for i in at], features[list(at)], counts)
        return rows

    def emit(self, rows, logits):
        greedy = all(r.temperature == 0 and r.repetition_penalty == 1 for r in rows)
        tokens = likeliest(logits).tolist() if greedy else draw(distribution(logits, rows), rows)
        for r, token in zip(rows, tokens):
            r.fresh = False
            r.push(token)
        self.counters["tokens"] += len(rows)

    def logits(self, features, model=None):
        model = model or self.model
        return M.soft_cap(model.head(features), model.config.logit_softcap)

    def run(self, model, layers, rows, ids, starts, inputs=None):
        """One forward pass: ids, a list of T tokens a row, which begin at positions `starts` -> features
        (B,T,D). inputs: a function of the step instead of the model."""
        size, T = self.pool.block_size, len(ids[0])
        graph = self.graphs is not None and inputs is None and not rows[0].fresh             # it decodes
        lengths = [start + T - r.dropped * size for r, start in zip(rows, starts)]
        S, even = max(lengths), min(lengths) == max(lengths)
        n = -(-S // size)
        if graph:
            most = -(-model.config.context_length // size)
            n = min(2 ** (n - 1).bit_length(), most)       # few sizes, few graphs
            S, even = n * size, False
        table = [(r.blocks[r.dropped:] + [0] * n)[:n] for r in rows]
        first = table[0][0]
        run = first if not graph and n == 1 and all(t[0] == first + i for i, t in enumerate(table)) else None
        fed = torch.tensor([[*i, *range(start, start + T), *t, r.dropped * size] for i, start, t, r in
                            zip(ids, starts, table, rows)]).to(self.device)  # in one piece: one transfer
        states = {i: stack_states([r.states[i] for r in rows]) for i in rows[0].states}
        layers = [states.get(i, layer) for i, layer in enumerate(layers)]

        def forward(fed):
            ids, positions, table, base = fed.split((T, T, n, 1), 1)
            step = self.pool.step = Step(self.pool, layers, positions, table, base, S, run, even)
            return inputs(step, ids) if inputs else model.features(ids, positions, step)
        features = self.replay(forward, (id(layers[0]), S, fed.shape), fed) if graph else forward(fed)
        for i, whole in states.items():
            unstack_states(whole, [r.states[i] for r in rows])
        return features

    def replay(self, forward, key, fed):
        """The same as a CUDA graph: a decoding step is hundreds of kernels of microseconds each, and
        launching them one by one from Python takes longer than they do. A graph is recorded once a shape,
        over inputs at a fixed address, and launched as one. All share one memory: they run one after the
        other, and each result is copied out."""
        if key not in self.graphs:
            static, side = fed.clone(), torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):                  # once unrecorded: libraries set themselves up
                forward(static)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.graph_pool):
                out = forward(static)
            self.graphs[key] = graph, static, out
        graph, static, out = self.graphs[key]
        static.copy_(fed)
        graph.replay()
        return out.clone()                                 # the next replay writes there again


# --- 5. the same model in fewer, better shaped operations ---------------------------------------------------
# A decoding step of a small model on a CPU is hundreds of calls of microseconds each, and products of a few
# rows, for which libraries are not at their best. So: fewer calls, and the same products in another shape.

FEW, MANY = 12, 64                                         # rows


class DecodeLinear(M.Linear):
    """x W^T + b, + add where there is one, for rows x (R,in). On a CPU as (W x^T)^T, with W cut into a stack
    of up to eight matrices: MKL is slow at a product whose result has few rows and fast at one with few
    columns, of the same sums; and it gives a matrix times a vector to one thread, but a stack of them to all.
    Microseconds for W of 1,408 x 256 on two threads (78 are 19 GB/s, what this memory gives):

        R             1     2     4     8    16    32
        x W^T       162   215   335   387   433   557
        (W x^T)^T    78    97   110   192   213   284
    """
    def __init__(self, weight, bias=None):
        nn.Module.__init__(self)
        self.weight, self.bias, self.stack = weight, bias, None              # tune changes no weight
        if weight.device.type == "cpu":
            self.stack = weight.detach().reshape(math.gcd(8, len(weight)), -1, weight.shape[1])

    def forward(self, x, add=None):
        if self.stack is None or x.dim() != 2 or len(x) > MANY:
            y = F.linear(x, self.weight, self.bias)
        else:
            x = x if len(x) >= FEW else x.contiguous()     # few rows must be rows in memory, too
            (n, m, D), R = self.stack.shape, len(x)
            columns = x.as_strided((n, D, R), (0, x.stride(1), x.stride(0)))             # x^T, n times
            y = torch.bmm(self.stack, columns).as_strided((R, n * m), (1, R))            # (n,m,R), transposed
            y = y if self.bias is None else y + self.bias
        return y if add is None else add + y


class DecodeNorm(M.RMSNorm):
    """x / sqrt(mean x^2 + eps) * g as x / hypot(|x|, sqrt(eps D)) * (g sqrt(D)): four operations. On a CPU
    torch has no kernel for RMSNorm, and takes seven.      weight (...,D)"""
    def __init__(self, weight, eps):
        nn.Module.__init__(self)
        D, self.weight, self.eps = weight.shape[-1], weight, eps
        self.small = torch.tensor((eps * D)**0.5) if weight.device.type == "cpu" else None
        self.gain = weight.detach() * (D**0.5 if self.small is not None else 1)

    def forward(self, x):
        if self.small is None or x.dtype != torch.float32:
            return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.small) * self.gain


class DecodeBlock(M.Block):
    """model.Block as most models have it (attention, then a feed-forward layer, a norm before each) on the
    pool, in half the operations: q and k are normed and turned in one piece, k and v stored in one, angles
    and mask looked up once a step, and the two products of a gated layer's input are one."""
    def __init__(self, block, turns):
        nn.Module.__init__(self)
        self.__dict__.update(block.__dict__)               # the same parameters
        (m, ffn), self.turns, self.both = (self.mixer, self.ffn), turns, None
        if m.c.qk_norm:
            self.gains = DecodeNorm(torch.cat([norm.weight.detach().expand(heads, -1) for norm, heads in (
                (m.q_norm, m.c.num_heads), (m.k_norm, m.c.kv_heads))]), m.c.norm_eps)            # (N+K,H)
        if type(ffn) is M.GatedFFN and type(ffn.w1) is M.Linear and ffn.w1.bias is None:
            self.both = DecodeLinear(torch.cat((ffn.w1.weight, ffn.w3.weight)).detach())         # (2F,D)
            ffn.w1.weight.data, ffn.w3.weight.data = self.both.weight.chunk(2)           # views, no copies
        for module in (self, m, ffn):
            swap(module)

    def forward(self, x, positions, cache=None):
        if not isinstance(cache, PagedLayer):
            return super().forward(x, positions, cache)
        B, T, D = x.shape
        x = x.reshape(B * T, D)
        x = plus(self.mixer.wo, self.attend(self.norm1(x), positions, cache), x)
        h = self.norm2(x)
        if self.both is None:
            return (x + self.ffn(h)).view(B, T, D)
        gate, up = self.both(h).chunk(2, -1)
        return plus(self.ffn.w2, self.ffn.act(gate) * up, x).view(B, T, D)

    def attend(self, x, positions, cache):
        """x (B*T,D), normed -> (B*T,N*H): attention without its last matrix."""
        m, step, (B, T) = self.mixer, cache.pool.step, positions.shape
        N, K, H = m.c.num_heads, m.c.kv_heads, m.c.head_dim
        x = m.wqkv(x).contiguous().view(B, T, N + 2 * K, H)
        qk = x[:, :, :N + K]                               # changed in place: v lies behind it
        if m.c.qk_norm:
            qk.copy_(self.gains(qk))
        if m.c.position == "rope":
            if step.turns is None:
                step.turns = self.turns[positions]                                       # (B,T,1,H/2)
            pairs = torch.view_as_complex(qk.float().unflatten(-1, (-1, 2))).mul_(step.turns)
            if qk.dtype != torch.float32:                  # .float() made a copy
                qk.copy_(torch.view_as_real(pairs).flatten(-2))
        k, v = cache.exchange("kv", x[:, :, N:]).split(K, 1)                             # (B,K,S,H)
        if m.c.attn_softcap:
            q = x[:, :, :N].transpose(1, 2)                                              # (B,N,T,H)
            y = m.choose_kernel(q, k, v, positions, step.key_positions, plain=False).transpose(1, 2)
        elif T == 1:                                       # the heads of a group are the rows of one product
            y = M.attend(x[:, 0, :N].view(B, K, -1, H), k, v, attn_mask=step.mask(m.c.window, x.dtype))
        else:
            mask = step.mask(m.c.window, x.dtype)
            y = M.attend(x[:, :, :N].transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None,
                         enable_gqa=K < N).transpose(1, 2)
        return y.reshape(B * T, N * H)


def plus(linear, x, add):
    return linear(x, add) if type(linear) is DecodeLinear else add + linear(x)


def swap(parent):
    """The parent's own linear layers and norms in their decoding forms."""
    for name, child in list(parent.named_children()):
        if type(child) is M.Linear:
            setattr(parent, name, DecodeLinear(child.weight, child.bias))
        elif type(child) is M.RMSNorm and child.weight.device.type == "cpu":
            setattr(parent, name, DecodeNorm(child.weight, child.eps))


def tune(model):
    """Swap these in, in place, where they fit: the same weights, and logits that differ by rounding alone. To
    be done last: weights that are replaced or moved afterwards are not seen."""
    c, turns = model.config, None
    if c.position == "rope":                               # the model's own RoPE of 1 + 0i at every position
        one, at = torch.tensor([1.0, 0.0] * (c.head_dim // 2)), torch.arange(c.context_length)
        turned = M.apply_rope(one.expand(len(at), -1), at, *c.rope).unflatten(-1, (-1, 2))
        turns = torch.view_as_complex(turned)[:, None].to(example(model).device)             # (context,1,H/2)
    for i, block in enumerate(model.blocks):
        usual = block.c.norm_position == "pre" and not block.c.parallel and block.c.rope == c.rope
        if usual and type(block.mixer) is M.Attention and not block.mixer.lends:
            model.blocks[i] = DecodeBlock(block, turns)
    swap(model)
    return model.eval()


# --- 6. speculative sampling: cheap drafts, exact results ---------------------------------------------------
# Decoding reads all weights for one token; judging k + 1 tokens reads them once, too. So let something cheap
# guess k tokens, and the model judge them in one pass.

def accept(p, q, drafts, r):
    """p (k+1,V) the target's distributions, q (k,V) those the k drafts were drawn from -> 1 to k+1 tokens.

    Keep draft x with probability min(1, p(x)/q(x)); at the first refusal draw from max(p - q, 0) and end; if
    all are kept, the target's last distribution gives one more (Leviathan et al. 2023, Chen et al. 2023).
    P(x) = q(x) min(1, p(x)/q(x)) + P(refused) (p(x) - q(x))+ / sum (p - q)+ = min(p,q) + (p - q)+ = p(x):
    exactly the target's distribution, whatever the drafts are worth. Greedy p gives the greedy text.
    """
    at = torch.tensor(drafts, device=p.device)[:, None]
    keep = (p[:-1].gather(1, at) / q.gather(1, at))[:, 0].tolist()
    for i, ratio in enumerate(keep):
        if r.random.random() >= ratio:
            rest = (p[i] - q[i]).clamp(min=0)
            return drafts[:i] + draw((rest if rest.sum() > 0 else p[i])[None], [r])  # all zero: rounding only
    return drafts + draw(p[-1:], [r])


class Drafter:
    """What the engine asks: attach once, observe whatever the target computed, propose k tokens a row."""
    def attach(self, engine):
        self.engine = engine

    def observe(self, rows, features, counts):
        """The target's features (B,T,D) of tokens just fed; of row i, counts[i] of them stay."""

    def propose(self, rows, k):
        """-> k tokens a row, and the distributions q (B,k,V) they were drawn from; None: no idea."""
        drafts, q = [[] for _ in rows], []
        for i in range(k):
            q.append(distribution(self.guess(rows, drafts, i), rows, drafts))
            drafts = [[*d, t] for d, t in zip(drafts, draw(q[-1], rows))]
        return drafts, torch.stack(q, 1)


class NGram(Drafter):
    """Prompt look-up: what followed the last time the text ended like this? No model: q is 1 at the guess."""
    def __init__(self, k=4, longest=3):
        self.k, self.longest = k, longest

    def propose(self, rows, k):
        drafts = [self.look_up(r.ids)[:k] for r in rows]
        if not any(drafts):
            return drafts, None
        drafts = [d + [0] * (k - len(d)) for d in drafts]  # a blind guess is as lawful as any other
        ids = torch.tensor(drafts, device=self.engine.device)
        return drafts, F.one_hot(ids, self.engine.model.config.vocab_size).float()

    def look_up(self, ids):
        for n in range(min(self.longest, len(ids) - 1), 0, -1):
            end = ids[-n:]
            for at in range(len(ids) - n - 1, -1, -1):
                if ids[at:at + n] == end:
                    return ids[at + n:]
        return []


class DraftModel(Drafter):
    """A smaller model of the same vocabulary, whose layers lie in the same pool under the same tables."""
    def __init__(self, model, k=4):
        self.model, self.k = model, k

    def attach(self, engine):
        c, d = engine.model.config, self.model.config
        if d.vocab_size != c.vocab_size or d.context_length < c.context_length:
            raise ValueError(f"the draft model has V={d.vocab_size} and context {d.context_length}, the "
                             f"target {c.vocab_size} and {c.context_length}: vocabularies must agree, and "
                             f"the draft's context be as long")
        made = [block.mixer.make_cache() for block in self.model.blocks]
        if any(isinstance(m, M.StateCache) for m in made):
            raise ValueError("the draft model has recurrent layers, which cannot take back a rejected draft: "
                             "use one whose layers all attend")
        self.engine, self.layers = engine, engine.new_layers(made)

    def observe(self, rows, features, counts):
        if rows[0].fresh:                                  # prompts; what was drafted is in its cache already
            starts = [r.length - n for r, n in zip(rows, counts)]
            self.engine.run(self.model, self.layers, rows,
                            [r.ids[start:r.length] for r, start in zip(rows, starts)], starts)

    def guess(self, rows, drafts, i):
        """The first pass feeds the last two tokens: if all drafts were kept, the last was never fed."""
        feed = [d[-1:] or r.ids[-2:] for r, d in zip(rows, drafts)]
        starts = [r.length + i - (i == 0) for r in rows]
        features = self.engine.run(self.model, self.layers, rows, feed, starts)
        return self.engine.logits(features[:, -1], self.model)


class Medusa(Drafter, nn.Module):
    """k extra heads on the target's last feature: head i guesses the token i + 1 places after the next (Cai
    et al. 2024). One product a draft, but each is blind to the drafts before it.      params k D^2"""
    def __init__(self, config, k=3):
        super().__init__()
        self.config, self.k = config, k
        self.heads = nn.ModuleList(M.Linear(config.d_model, config.d_model) for _ in range(k))
        for head in self.heads:                            # at first every head repeats the model's own guess
            nn.init.zeros_(head.weight)

    def forward(self, features, i):
        return features + F.silu(self.heads[i](features))

    def loss(self, target, features, ids):
        """features (B,T,D) of ids (B,T): feature t foretells token t+1, head i token t+2+i."""
        return sum(M.lm_loss(target.head(self(features[:, :-2 - i], i)), ids[:, 2 + i:])[0]
                   for i in range(self.k)) / self.k

    def observe(self, rows, features, counts):
        for r, f, n in zip(rows, features, counts):
            r.feature = f[n - 1]

    def guess(self, rows, drafts, i):
        return self.engine.logits(self(torch.stack([r.feature for r in rows]), i))


class Eagle(Drafter, nn.Module):
    """One block that foretells the target's next feature from this one and the next token (Li et al. 2024);
    the target's own head turns it into a token. Unlike Medusa's, a draft sees the drafts before it."""
    def __init__(self, config, k=3):
        super().__init__()
        self.config, self.k = config, k
        one = replace(config, num_layers=1, layers="", mixer="attention", num_experts=0, init="glorot")
        # Embeddings may be ten times as large as features: unscaled, the features are hardly heard.
        self.norms = nn.ModuleList(M.RMSNorm(config.d_model) for _ in range(2))
        self.join, self.block = M.Linear(2 * config.d_model, config.d_model), M.Block(one)

    def forward(self, features, embeddings, positions, cache=None):
        inputs = torch.cat((self.norms[0](features), self.norms[1](embeddings)), -1)           # (B,T,2D)
        return self.block(self.join(inputs), positions, cache)

    def loss(self, target, features, ids):
        """What counts is the token drawn from the guess: cross-entropy with the target's own distribution."""
        positions = torch.arange(ids.shape[1] - 1, device=ids.device)
        guess = self(features[:, :-1], target.embedding(ids[:, 1:]), positions)    # of feature t + 1
        teacher = target.head(features[:, 1:]).float().softmax(-1)
        return F.cross_entropy(target.head(guess).float().flatten(0, 1), teacher.flatten(0, 1))

    def attach(self, engine):
        self.engine, self.layers = engine, engine.new_layers([self.block.mixer.make_cache()])

    def feed(self, rows, features, tokens, starts):
        """features (B,T,D) of positions starts.., each with the token after it -> (B,T,D)."""
        def inputs(step, ids):
            return self(features, self.engine.model.embedding(ids), step.positions, step.layers[0])
        return self.engine.run(self.engine.model, self.layers, rows, tokens, starts, inputs)

    def observe(self, rows, features, counts):
        """Replace guessed features by the true ones; the last waits for its next token."""
        T, starts = features.shape[1], [r.length - n for r, n in zip(rows, counts)]
        between = [(r, at) for r, at in zip(rows, starts) if r.fresh and at and r.feature is not None]
        if between:                                        # what followed a prompt's last chunk is known now
            self.feed([r for r, _ in between], torch.stack([r.feature for r, _ in between])[:, None],
                      [[r.ids[at]] for r, at in between], [at - 1 for _, at in between])
        if T > 1:
            tokens = [(r.ids[at + 1:at + T] + [0] * T)[:T - 1] for r, at in zip(rows, starts)]
            self.feed(rows, features[:, :-1], tokens, starts)
        for r, f, n in zip(rows, features, counts):
            r.feature = f[n - 1]

    def guess(self, rows, drafts, i):
        """r.feature becomes the guessed one, until observe puts the true one there."""
        features = torch.stack([r.feature for r in rows])[:, None]
        tokens = [d[-1:] or r.ids[-1:] for r, d in zip(rows, drafts)]
        last = self.feed(rows, features, tokens, [r.length - 1 + i for r in rows])
        for r, f in zip(rows, last[:, -1]):
            r.feature = f
        return self.engine.logits(last[:, -1])


def fit(module, loss_of, tokens, context_length, seconds, lr=1e-3, batch_size=8, seed=0, half=False):
    """AdamW on random windows of a token file until the time is up; the rate falls to 0 with it.
    loss_of(ids (B,T)) -> scalar. half: products in bf16; the module's own weights are fp32 in any case, as
    steps of bf16 weights are lost in rounding."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    rng, begin, losses, shown = np.random.default_rng(seed), time.monotonic(), [], 0.0
    while (passed := time.monotonic() - begin) < seconds or not losses:
        ids = windows(tokens, context_length, rng.random(batch_size))
        with torch.autocast((device := example(module).device).type, torch.bfloat16, enabled=half):
            loss = loss_of(ids.to(device))
        for group in optimizer.param_groups:               # 20 steps of warm-up, then down
            group["lr"] = lr * min(1, (len(losses) + 1) / 20) * max(0.02, 1 - passed / max(seconds, 1e-9))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss is {losses[-1]} after {len(losses)} steps: it diverged")
        if passed - shown > 10:
            shown = passed
            with contextlib.suppress(OSError):             # nobody looks: no reason to stop
                print(f"  {passed:4.0f} of {seconds:.0f} s | step {len(losses):,} | "
                      f"loss {np.mean(losses[-20:]):.4f}", flush=True)


def windows(tokens, length, places):
    """(rows,length) int64 of a token file, at places between 0, its beginning, and 1, its end."""
    if len(tokens) < length:
        raise ValueError(f"{len(tokens)} tokens are fewer than one window of {length}: give more with --data")
    starts = (np.asarray(places) * (len(tokens) - length)).round().astype(int)
    return torch.from_numpy(np.stack([tokens[i:i + length] for i in starts]).astype(np.int64))


def train_drafter(kind, model, tokens, k, seconds, seed=0):
    """Medusa heads or an EAGLE block, on the frozen target's features."""
    torch.manual_seed(seed)
    drafter = kind(model.config, k).to(example(model).device)

    def loss(ids):
        with torch.no_grad():
            features = model.features(ids)
        return drafter.loss(model, features, ids)
    with contextlib.suppress(KeyboardInterrupt):           # keep what was learnt
        fit(drafter, loss, tokens, min(model.config.context_length, 256), seconds, 3e-3, seed=seed,
            half=example(model).dtype == torch.bfloat16)
    return drafter.eval()


# --- 7. quantisation: fewer bytes a weight ------------------------------------------------------------------
# Decoding reads every weight once a step, so bytes a weight are seconds a token. int8 holds -128 .. 127, int4
# -8 .. 7; fp8 e4m3 reaches +-448 with 3 bits of mantissa (the lecture's +-240 is another variant of it).

def quantize(w, bits=8, group=0):
    """w (out,in) -> integers (out,in/g,g) int8, scales (out,in/g,1): w = integer * scale, off by scale/2 at
    most. scale = max|w| / (2^(bits-1) - 1) over `group` columns of a row; 0: the row; -1: the whole matrix,
    where one large weight costs all others their precision."""
    top = 2 ** (bits - 1) - 1
    parts = w.unflatten(1, (-1, group if group > 0 else w.shape[1])).float()
    scale = (parts.abs().amax(-1, keepdim=True) if group >= 0 else
             parts.abs().amax().expand(*parts.shape[:2], 1)).clamp(min=1e-12) / top
    return (parts / scale).round().clamp(-top - 1, top).to(torch.int8), scale


class QuantLinear(nn.Module):
    """A Linear whose weights are stored small and widened for the product.

    kind     int8 (one scale a row), int4 (one for every `group` columns; two numbers a byte), fp8
    keep     columns that stay as they are. With int8_inputs this is LLM.int8() (Dettmers et al. 2022): inputs
             are int8, too, but for the few columns whose huge values would cost all others their precision
    smooth   s (in,): the columns of W times s, the inputs divided by it: AWQ (Lin et al. 2024)
    """
    def __init__(self, linear, kind="int8", group=64, keep=(), smooth=None, int8_inputs=False):
        super().__init__()
        w = linear.weight.detach()
        self.kind = "int8" if kind == "int4" and w.shape[1] % 2 else kind    # two numbers a byte
        self.dtype, self.bias, self.int8_inputs = w.dtype, getattr(linear, "bias", None), int8_inputs
        self.register_buffer("keep", torch.as_tensor(keep, dtype=torch.long, device=w.device))
        self.register_buffer("kept", w[:, self.keep].clone())                # (out,kept)
        self.register_buffer("smooth", smooth)
        w = w.float().index_fill(1, self.keep, 0) * (1 if smooth is None else smooth)
        if self.kind == "fp8":
            scale = w.abs().amax(1, keepdim=True).clamp(min=1e-12)[..., None] / 448
            numbers = (w[:, None] / scale).to(torch.float8_e4m3fn)
        elif self.kind == "int8":
            numbers, scale = quantize(w)
        else:
            numbers, scale = quantize(w, 4, math.gcd(group, w.shape[1]))
            numbers = (numbers[..., ::2] & 15) | (numbers[..., 1::2] << 4)   # low half, high half
        self.register_buffer("numbers", numbers)                             # (out,groups,columns)
        self.register_buffer("scale", scale.to(self.dtype))                  # (out,groups,1)

    def widened(self, rows=slice(None)):
        """W (out,in) again, or some rows, as near as stored. A GPU kernel does this in registers."""
        n = self.numbers[rows]
        if self.kind == "int4":
            n = torch.stack((n << 4 >> 4, n >> 4), -1).flatten(-2)           # shifts of int8 keep the sign
        return (n.to(self.dtype) * self.scale[rows]).flatten(-2)

    @property
    def weight(self):
        """As one matrix, for a mixer that takes it apart: MLA."""
        w = self.widened() if self.smooth is None else self.widened() / self.smooth
        return w.index_copy(1, self.keep, self.kept)

    def forward(self, x):
        y = x if self.smooth is None else x / self.smooth
        if self.int8_inputs:
            y = y.index_fill(-1, self.keep, 0)
            step = y.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127      # a scale a token
            whole = self.numbers.flatten(1).to(self.dtype)                   # integers, multiplied as floats
            y = F.linear((y / step).round(), whole) * step * self.scale.flatten()
        else:
            y = F.linear(y, self.widened())
        if len(self.keep):
            y = y + F.linear(x[..., self.keep], self.kept)
        return y if self.bias is None else y + self.bias


class QuantEmbedding(nn.Module):
    """Rows of a table stored as a QuantLinear's; where it is tied, as the output matrix's own."""
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, ids):
        return self.table.widened(ids)


@torch.no_grad()
def watch_inputs(model, names, ids, rows=2048):
    """{name: inputs (rows,in)} of these modules while the model reads ids (B,T)."""
    seen = {}
    hooks = [model.get_submodule(name).register_forward_pre_hook(
        lambda _, x, name=name: seen.__setitem__(name, x[0].flatten(0, -2)[:rows])) for name in names]
    model(ids.to(example(model).device))
    for hook in hooks:
        hook.remove()
    return seen


def awq_scale(linear, x, kind="int4", group=64):
    """s = mean|x|^a, of the a in 0 .. 1 whose quantised output is nearest. A weight column that meets large
    inputs matters most; times s > 1 it is rounded to a finer grid, and its neighbours pay."""
    size, want = x.abs().mean(0).clamp(min=1e-6), F.linear(x, linear.weight)
    tries = []
    for a in (0, 0.25, 0.5, 0.75, 1):
        s = size ** a
        s = s / (s.max() * s.min()).sqrt()
        got = F.linear(x / s, QuantLinear(linear, kind, group, smooth=s).widened())
        tries.append(((got - want).square().mean().item(), a, s))
    return min(tries, key=lambda t: t[0])[2]


SCHEMES = ("int8", "int4", "fp8", "awq", "llm.int8")


@torch.no_grad()
def quantize_model(model, scheme, calibration=None, group=64, outlier=6.0):
    """Swap every Linear and the embedding for quantised ones, in place. awq and llm.int8 look at the inputs
    that calibration ids (B,T) give."""
    looks = scheme in ("awq", "llm.int8")
    if looks and calibration is None:
        raise ValueError(f"{scheme} looks at a few texts first: give --data a folder with train.bin")
    if model.config.num_experts:
        raise ValueError(f"quantize {scheme} knows Linear layers, and most weights of this model are experts")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, M.Linear)}
    inputs = watch_inputs(model, linears.keys() - {"head"}, calibration) if looks else {}
    for name, module in linears.items():
        x, options = inputs.get(name), {"kind": scheme}    # of the output matrix: none
        if scheme == "awq":
            options = {"kind": "int4", "smooth": None if x is None else awq_scale(module, x, "int4", group)}
        elif scheme == "llm.int8":
            columns = [] if x is None else (x.abs().amax(0) > outlier).nonzero()[:, 0]
            options = {"kind": "int8", "keep": columns, "int8_inputs": x is not None}
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantLinear(module, group=group, **options))
    simple = "int8" if looks else scheme                   # a row is only looked up
    model.embedding = QuantEmbedding(model.head if model.config.tie_embeddings else
                                     QuantLinear(model.embedding, simple, group))
    return model


def model_bytes(model):
    """Weights as they are stored, what is shared once."""
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@torch.no_grad()
def held_out_loss(model, tokens, count=8):
    """Nats a token over evenly spaced windows of held-out tokens."""
    T = min(model.config.context_length, max(1, len(tokens) - 1))
    ids = windows(tokens, T + 1, np.linspace(0, 1, count)).to(example(model).device)
    return M.lm_loss(model(ids[:, :-1]), ids[:, 1:])[0].item()


# --- 8. pruning and distillation: a smaller model -----------------------------------------------------------

@torch.no_grad()
def importance(model, ids):
    """By calibration on ids (B,T) -> per layer (L,), per group of heads (L,K), per hidden unit (L,F).

    A layer matters by how far it turns the stream (1 - cosine between what comes in and what goes out), a
    head or hidden unit by the size of what it adds: |activation| times the norm of its weights in wo or w2.
    """
    blocks = [f"blocks.{i}" for i in range(model.config.num_layers)]
    wo, w2 = ([block + part for block in blocks] for part in (".mixer.wo", ".ffn.w2"))
    seen = watch_inputs(model, [*blocks, *wo, *w2, "norm"], ids)
    stream = [seen[name] for name in (*blocks, "norm")]
    layers = [1 - F.cosine_similarity(x.float(), y.float(), -1).mean() for x, y in zip(stream, stream[1:])]
    heads, units = (torch.stack([seen[name].abs().mean(0) * model.get_submodule(name).weight.norm(dim=0)
                                 for name in names]) for names in (wo, w2))
    return torch.stack(layers), heads.unflatten(1, (model.config.kv_heads, -1)).sum(-1), units


@torch.no_grad()
def prune(model, ids, layers, groups, d_ff):
    """A new, smaller model of the `layers` blocks, `groups` key/value heads a block (with their queries) and
    `d_ff` hidden units that matter most (Muralidharan et al. 2024, Minitron)."""
    c = model.config
    if c.layers or c.mixer != "attention" or c.num_experts:
        raise ValueError("pruning knows attention and dense feed-forward layers, and this model has others")
    for name, n, most in (("num_layers", layers, c.num_layers), ("num_kv_heads", groups, c.kv_heads),
                          ("d_ff", d_ff, c.ffn_dim)):
        if not 1 <= n <= most:
            raise ValueError(f"--{name} {n} is out of range: 1 to the model's {most}")
    by_layer, by_group, by_unit = (t.cpu() for t in importance(model, ids))
    N, K, H = c.num_heads, c.kv_heads, c.head_dim
    out = M.Transformer(replace(c, num_layers=layers, num_heads=groups * (N // K), num_kv_heads=groups,
                                d_head=H, d_ff=d_ff, mtp=0))
    for to, at in enumerate(by_layer.topk(layers).indices.sort().values.tolist()):
        g, units = (best[at].topk(n).indices.sort().values
                    for best, n in ((by_group, groups), (by_unit, d_ff)))
        q_rows = torch.arange(N * H).view(K, -1)[g].flatten()
        kv_rows = [N * H + part * K * H + torch.arange(K * H).view(K, H)[g].flatten() for part in (0, 1)]
        rows = {"wqkv": torch.cat((q_rows, *kv_rows)), "w1": units, "w3": units}
        columns = {"wo": q_rows, "w2": units}
        for name, p in out.blocks[to].named_parameters():
            t, part = model.blocks[at].get_parameter(name), name.split(".")[-2]
            t = t[rows[part]] if part in rows else t
            p.copy_(t[:, columns[part]] if part in columns and t.dim() == 2 else t)      # a bias stays whole
    for name, p in out.named_parameters():
        if not name.startswith("blocks."):
            p.copy_(model.get_parameter(name))
    return out.eval()


def distillation_loss(teacher, student, ids):
    """KL(teacher || student) = sum p (ln p - ln s), mean over tokens, in nats (Hinton et al. 2015): the whole
    distribution at every place, where the text itself tells one token."""
    with torch.no_grad():
        p = F.log_softmax(teacher(ids).float(), -1)
    return (p.exp() * (p - F.log_softmax(student(ids).float(), -1))).sum(-1).mean()


# --- 9. masked diffusion: all places at once ----------------------------------------------------------------

class BidirectionalAttention(M.Attention):
    """Every place sees every place."""
    def choose_kernel(self, q, k, v, positions, key_positions, plain):
        return M.attend(q, k, v, enable_gqa=self.c.kv_heads < self.c.num_heads)


def diffusion_model(config):
    """The same Transformer, seeing both ways, with one more id: the mask."""
    c = config
    if c.mixer != "attention" or c.layers or c.window or c.attn_softcap:
        raise ValueError("diffusion needs every place to see every place: leave --mixer, --layers, --window "
                         "and --attn_softcap as they are")
    model = M.Transformer(replace(c, vocab_size=c.vocab_size + 1))
    for block in model.blocks:
        block.mixer.__class__ = BidirectionalAttention     # the same weights, another choice of kernel
    return model


def diffusion_loss(model, ids, generator=None):
    """Mask each token with probability t, t uniform; guess the masked; weigh with 1/t (Sahoo et al. 2024).
    An upper bound of -log p(text), in nats a token."""
    B, T = ids.shape
    t = (torch.arange(B) + torch.rand(B, generator=generator)) / B           # spread out: less noise
    t = t.clamp(min=1 / T)[:, None].to(ids.device)
    masked = torch.rand(B, T, generator=generator).to(ids.device) < t
    logits = model(ids.masked_fill(masked, model.config.vocab_size - 1))[..., :-1].float()  # never "mask"
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(B, T)
    return (loss * masked / t).mean()


@torch.no_grad()
def diffusion_generate(model, length, rounds, prompt=(), temperature=1.0, seed=0):
    """Start all masked; in each round fill the share of places that the model is surest of. rounds = length
    fills one a round; fewer rounds fill places that do not know of each other: speed against quality."""
    g, mask = torch.Generator().manual_seed(seed), model.config.vocab_size - 1
    ids = torch.tensor([*prompt, *[mask] * length])
    for left in range(rounds, 0, -1):
        todo = (ids == mask).nonzero()[:, 0]
        if not len(todo):
            break
        logits = model(ids[None].to(example(model).device))[0, todo, :-1].cpu()
        probs = M.next_token_probs(logits, temperature)
        drawn = torch.multinomial(probs, 1, generator=g)
        sure = probs.gather(1, drawn)[:, 0].topk(-(-len(todo) // left)).indices
        ids[todo[sure]] = drawn[sure, 0]
    return ids[len(prompt):].tolist()


# --- 10. accounting: what decoding must cost ----------------------------------------------------------------

# Peak dense bf16 FLOP/s and memory bytes/s of an H100 SXM (NVIDIA's data sheet): 295 FLOPs a byte.
H100 = (989e12, 3.35e12)


def intensities(S, T, B, D, F_):
    """FLOPs a byte of a gated FFN and of attention over S cached tokens, T new ones, in bf16.

    ffn        6 B T D F / (4 B T D + 4 B T F + 6 D F) -> B T when D and F are large: batching helps
    attention  4 B S T D / (4 B S D + 4 B T D) = S T / (S + T): below 1 for T = 1, whatever B: it does not
    """
    ffn = 6 * B * T * D * F_ / (4 * B * T * D + 4 * B * T * F_ + 6 * D * F_)
    return ffn, 4 * B * S * T * D / (4 * B * S * D + 4 * B * T * D)


def decode_cost(c, B, S, bandwidth=H100[1], bytes_per_number=2):
    """(memory bytes, seconds a token, tokens/s): decoding reads weights and caches once a step and computes
    too little to matter, so latency = memory / bandwidth, throughput = B / latency."""
    memory = bytes_per_number * M.num_params(c) + B * M.state_bytes(c, S, bytes_per_number)
    return memory, memory / bandwidth, B * bandwidth / memory


def calculator():
    """The lecture's figures: Llama-2-13B, 1,024 tokens of context, bf16, one H100."""
    base = M.ModelConfig(**M.PRESETS["llama2-13b"])
    variants = {"40 key/value heads": {}, "8 (grouped)": dict(num_kv_heads=8),
                "MLA, latent 512": dict(mixer="mla", kv_latent=512, rope_dims=64),
                "8, every 2nd shared (CLA)": dict(num_kv_heads=8, layers="GC"),
                "8, 3 of 4 local, 256": dict(num_kv_heads=8, layers="LLLG", window=256),
                "linear attention": dict(mixer="linear")}
    rows = []
    for name, change in variants.items():
        for B in (1, 64, 256):
            memory, latency, throughput = decode_cost(replace(base, **change), B, 1024)
            rows.append([name if B == 1 else "", str(B), f"{memory / 1e9:.2f}" + " *" * (memory > 80e9),
                         f"{latency * 1e3:.2f}", f"{throughput:,.0f}"])
    M.table("Llama-2-13B on an H100 by the formulas (* does not fit its 80 GB)",
            ["cache", "batch", "GB", "ms/token", "tokens/s"], rows)


# --- 11. the server: the OpenAI API over continuous batching ------------------------------------------------

MAX_BODY, MAX_WAITING, MAX_THREADS = 1 << 20, 128, 512     # bytes, requests, two a client: memory is bounded
ASK_SECONDS, READ_SECONDS = 10, 30                         # to send a request in full; to take what we send
KNOBS = {**dict.fromkeys(("max_tokens", "top_k", "seed", "n"), (int,)),
         **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), (int, float))}
FIELDS = {**KNOBS, "model": (str,), "prompt": (str, list), "messages": (list,), "stop": (str, list),
          "stream": (bool,), "stream_options": (dict,), "user": (str,)}


class ApiError(ValueError):
    def __init__(self, message, param=None, status=400):
        super().__init__(message)
        self.param, self.status = param, status


def need(ok, message, param=None, status=400):
    if not ok:
        raise ApiError(message, param, status)


def render_chat(tokenizer, template, messages):
    """[{role, content}] -> ids that end where the answer begins. What people typed is encoded apart, with no
    special token allowed, so that it cannot speak for another role."""
    ids = []
    for m in messages:
        before, after = template[m["role"]]
        ids += tokenizer.encode(before) + tokenizer.encode(m["content"], ()) + tokenizer.encode(after)
    return ids + tokenizer.encode(template["assistant"][0])


def stop_tokens(tokenizer, template=None, more=None):
    """What ends an answer: the template's end of turn, the end of text, what an imported checkpoint names."""
    end = tokenizer.encode(template["assistant"][1])[:1] if template else []
    return tuple({*end, *(more or ()), tokenizer.eot_id} - {None})


def read_call(asked, chat, tokenizer, template, engine, name="model", most=256):
    """The JSON of a call -> its Requests, or a ValueError that says what is wrong; ranges: Request.check."""
    need(isinstance(asked, dict), "the body must be a JSON object")
    newer = {"max_completion_tokens": "max_tokens"}
    asked = {newer.get(key, key): value for key, value in asked.items() if value is not None}
    for key, value in asked.items():
        need(key in FIELDS or not value, f"{key} is unknown; known: {', '.join(FIELDS)}", key)
        kinds = FIELDS.get(key, (type(value),))
        names = " or ".join(kind.__name__ for kind in kinds)
        need(type(value) in kinds, f"{key}={value!r:.60} must be {names}", key)
    model, stop = asked.get("model", name), asked.get("stop", [])
    need(model == name, f"model {model!r:.60} is not here: ask for {name!r}", "model", 404)
    stop = [stop] if isinstance(stop, str) else stop
    need(len(stop) <= 16 and all(isinstance(s, str) and len(s) <= 1000 for s in stop),
         "stop must be up to 16 texts of up to 1,000 characters", "stop")
    room = engine.model.config.context_length

    def short(texts):                                      # before they are encoded, which may take minutes
        need(all(len(t) <= room or len(t) <= room * max(map(len, tokenizer.vocab.values())) for t in texts),
             f"{param} is longer than the model's context of {room} tokens", param)
    if chat:
        param, messages = "messages", asked.get("messages")
        need(template, "this checkpoint has no chat template: use /v1/completions, or make one with "
                       "python align.py sft")
        need(messages and all(isinstance(m, dict) and m.get("role") in [*template]
                              and isinstance(m.get("content"), str) for m in messages),
             f"messages must be a list of {{role, content: text}}, roles {', '.join(template)}", param)
        short(m["content"] for m in messages)
        prompts = [render_chat(tokenizer, template, messages)]
        typed = [m["content"] for m in messages if m["role"] != "assistant"]
    else:
        param, prompt = "prompt", asked.get("prompt")
        many = isinstance(prompt, list) and not any(type(i) is int for i in prompt)    # or the ids of one
        prompts = prompt if many else [prompt]
        need(1 <= len(prompts) <= 64 and all(type(p) in (str, list) for p in prompts),
             "prompt must be a text, a list of ids, or 1 to 64 of them", param)
        typed = [p for p in prompts if isinstance(p, str)]
        short(typed)
        prompts = [tokenizer.encode(p, ()) if isinstance(p, str) else p for p in prompts]
    for token in tokenizer.special_tokens:
        need(not any(token in text for text in typed),
             f"{param} holds the control token {token}, which cannot be typed", param)
    knobs = {"seed": random.getrandbits(31), **{key: asked[key] for key in KNOBS if key in asked}}
    requests = []
    for i, ids in enumerate(prompts):
        limited = {"max_tokens": min(most, max(1, room - len(ids))), **knobs}
        requests.append(Request(ids, **limited, stop=tuple(stop), stop_ids=engine.stop_ids,
                                tokenizer=tokenizer, index=i * knobs.get("n", 1)))
        engine.check(requests[-1])
    return requests


class Server(socketserver.ThreadingTCPServer):
    """A thread a client, and one for the engine; it takes requests in and lets those of lost clients go
    between two steps, so the engine needs no locks. Leaving `with Server` waits until all are answered."""
    allow_reuse_address, request_queue_size = True, 128

    def __init__(self, address, engine, tokenizer, name="model", template=None):
        self.engine, self.tokenizer, self.name, self.template = engine, tokenizer, name, template
        engine.stop_ids = engine.stop_ids or stop_tokens(tokenizer, template)
        self.inbox, self.lock, self.created = queue.SimpleQueue(), threading.Lock(), int(time.time())
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Client)
        threading.Thread(target=self.pump, daemon=True).start()

    def pump(self):
        e = self.engine
        while True:
            while not e.busy() or not self.inbox.empty():
                e.add(self.inbox.get())
            for r in (*e.running, *e.waiting):
                r.finish = "cancelled" if r.listener.gone else r.finish
            try:
                changed = e.step()
            except Exception as error:                     # one bad step must not end the service
                with contextlib.suppress(OSError):
                    print(f"infer.py: a step failed: {M.first_line(error)}", file=sys.stderr, flush=True)
                changed = [*e.running, *e.waiting]
                for r in changed:
                    r.finish = "error"                     # the next step lets go of them
                e.pool.clear()
            for r in changed:
                r.listener.events.put((r, r.next_text(), r.finish))


class Client(http.server.BaseHTTPRequestHandler):
    """A client and its one request. The library reads the head, and logs each answer's status."""
    protocol_version = default_request_version = request_version = "HTTP/1.1"
    timeout, disable_nagle_algorithm, streaming, gone = READ_SECONDS, True, False, False
    requestline = command = ""                             # until they are read

    def handle(self):
        end = time.monotonic() + ASK_SECONDS
        late = threading.Timer(ASK_SECONDS, self.connection.shutdown, [socket.SHUT_RD])

        def in_time():
            need(time.monotonic() < end, f"the request took over {ASK_SECONDS} s", None, 408)
        try:
            need(threading.active_count() < MAX_THREADS, "too many clients: try again in a second", None, 429)
            late.start()                                   # for all of it: a trickle of bytes gets no longer
            self.raw_requestline = self.rfile.readline(1 << 16)
            in_time()
            if self.parse_request():                       # if not, it said why by send_error
                try:
                    body = self.read()
                finally:                                   # what is wrong with half a request is its end
                    in_time()
                late.cancel()
                self.route(body)
        except OSError:
            pass                                           # the client is gone, or takes nothing
        except (ValueError, RecursionError) as e:
            with contextlib.suppress(OSError):
                self.send_error(getattr(e, "status", 400), M.first_line(e), None, getattr(e, "param", None))
        finally:
            late.cancel()
            self.gone = True

    def log_message(self, *args):
        with contextlib.suppress(OSError):                 # nobody reads the log: that is no client's fault
            super().log_message(*args)

    def read(self):
        size = self.headers.get("Content-Length", "none" if self.command == "POST" else "0")
        need(re.fullmatch("[0-9]{1,15}", size), f"Content-Length is {size}, and must be a number of bytes")
        if (left := int(size)) <= MAX_BODY:
            return self.rfile.read(left)
        while left > 0 and (piece := self.rfile.read1(1 << 16)):             # thrown away, but read: who is
            left -= len(piece)                                               # still talking hears no answer
        raise ApiError(f"the body has {size} bytes: at most {MAX_BODY}", status=413)

    def send(self, body, status=200, kind="application/json"):
        """A whole answer; or a stream's beginning, then its events."""
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        if self.streaming:
            return self.wfile.write(b"data: %b\n\n" % data)
        self.streaming = kind == "text/event-stream"
        headers = {"Content-Type": kind, "Connection": "close"}
        headers |= {} if self.streaming else {"Content-Length": len(data)}
        headers |= {"Retry-After": 1} if status == 429 else {}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)

    def send_error(self, status, message=None, explain=None, param=None):
        kind = {429: "rate_limit_error", 500: "server_error"}.get(status, "invalid_request_error")
        self.send({"error": {"message": message, "type": kind, "param": param, "code": int(status)}}, status)

    def route(self, body):
        s, e, path = self.server, self.server.engine, self.path.split("?")[0]
        card = {"id": s.name, "object": "model", "created": s.created, "owned_by": "local"}
        gets = {"/": PAGE.replace("CHAT", json.dumps(bool(s.template))),
                "/v1/models": {"object": "list", "data": [card]}, f"/v1/models/{s.name}": card,
                "/health": {"status": "ok", "running": len(e.running),
                            "waiting": len(e.waiting) + s.inbox.qsize(), "blocks": e.pool.num_blocks,
                            "blocks_in_use": e.pool.used(), **e.counters}}
        posts = ("/v1/completions", "/v1/chat/completions")
        need(path in (*gets, *posts), f"no {path[:100]} here: {', '.join((*gets, *posts))}", None, 404)
        method = "GET" if path in gets else "POST"
        need(self.command == method, f"{path} takes {method}", None, 405)
        if path in gets:
            return self.send(gets[path], kind="text/html" if path == "/" else "application/json")
        asked, chat = json.loads(body.decode("utf-8")), path == posts[1]
        requests = read_call(asked, chat, s.tokenizer, s.template, e, s.name)
        self.events = queue.SimpleQueue()
        with s.lock:
            need(len(e.waiting) + s.inbox.qsize() + len(requests) <= MAX_WAITING,
                 "too many requests: try again in a second", None, 429)
            for r in requests:
                r.listener = self
                s.inbox.put(r)
        self.answer(asked, chat, requests)

    def answer(self, asked, chat, requests):
        """Pass on what the engine says, at once or in the end."""
        stream, done = asked.get("stream"), {}
        head = {"id": f"cmpl-{random.getrandbits(64):016x}", "created": int(time.time()),
                "object": ("chat.completion" + ".chunk" * bool(stream)) if chat else "text_completion",
                "model": self.server.name}

        def choice(r, text, end):
            said = {"delta" if stream else "message": {"role": "assistant", "content": text}}
            return {"index": r.index, **(said if chat else {"text": text}), "finish_reason": end or None,
                    "logprobs": None}
        if stream:
            self.send("", kind="text/event-stream")
        while len(done) < sum(r.n for r in requests):
            if select.select([self.connection], [], [], 0)[0]:
                return                                     # there is nothing to read but an end: it hung up
            try:
                r, text, end = self.events.get(timeout=0.5)
            except queue.Empty:
                continue
            need(end != "error", "internal error", None, 500)
            if end:
                done[r.index] = r
            if stream and (text or end):
                self.send({**head, "choices": [choice(r, text, end)]})
        prompt, new = sum(r.prompt_tokens for r in requests), sum(len(r.output) for r in done.values())
        usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        if not stream:
            choices = [choice(done[i], done[i].text, done[i].finish) for i in sorted(done)]
            return self.send({**head, "choices": choices, "usage": usage})
        if (asked.get("stream_options") or {}).get("include_usage"):
            self.send({**head, "choices": [], "usage": usage})
        self.send("[DONE]")


PAGE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>infer.py</title><link rel="icon" href="data:,">
<style>
body { font: 16px/1.5 system-ui; max-width: 44rem; margin: 2rem auto; padding: 0 1rem }
div { white-space: pre-wrap; overflow-wrap: anywhere; margin: .6rem 0; padding: .5rem; background: #eee }
.user { background: #e3ebf7 }  .error { background: #fbe3e0 }
form { display: flex; gap: .5rem } textarea { flex: 1 } textarea, button { font: inherit }
</style>
<h1>infer.py</h1><main aria-live="polite"></main>
<form><textarea rows="2" autofocus placeholder="Enter sends" aria-label="message"></textarea>
<button>Send</button></form>
<script>
const [form, box, button, log] = ["form", "textarea", "button", "main"].map(s => document.querySelector(s))
let stop = null                                 // ends the answer that is coming in
const say = (role, text) =>                     // the page is all that remembers what was said
  Object.assign(log.appendChild(document.createElement("div")), { className: role, textContent: text })
form.onsubmit = async event => {
  event.preventDefault()
  if (stop) return stop.abort()
  const prompt = box.value; if (!prompt) return
  const mine = say("user", prompt)
  const messages = Array.from(log.querySelectorAll(":not(.error)"),
                              div => ({ role: div.className, content: div.textContent }))
  const out = say("assistant", "")
  box.value = ""; button.textContent = "Stop"; stop = new AbortController()
  try {
    const body = JSON.stringify({ ...(CHAT ? { messages } : { prompt }), stream: true })
    const reply = await fetch(CHAT ? "/v1/chat/completions" : "/v1/completions",
                              { method: "POST", signal: stop.signal, body })
    if (!reply.ok) throw Error((await reply.json()).error.message)
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader()
    for (let rest = "", piece; !(piece = await reader.read()).done;) {
      const lines = (rest + piece.value).split("\\n\\n"); rest = lines.pop()
      for (const line of lines) if (line != "data: [DONE]") {      // server-sent events: "data: {...}"
        const said = JSON.parse(line.slice(6))
        if (said.error) throw Error(said.error.message)
        out.textContent += said.choices[0].text ?? said.choices[0].delta.content; out.scrollIntoView()
      }
    }
  } catch (e) {
    if (e.name != "AbortError") { mine.className = out.className = "error"; out.textContent = e.message }
  }
  stop = null; button.textContent = "Send"
}
box.onkeydown = e => { if (e.key == "Enter" && !e.shiftKey) { e.preventDefault(); form.requestSubmit() } }
</script>
"""


# --- 12. the commands ---------------------------------------------------------------------------------------

def keep_freed_memory():
    """On Linux, tell malloc not to give large freed blocks back: each step asks for the same ones again."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        if libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25):               # M_MMAP_THRESHOLD; older: 32 MB
            libc.mallopt(-1, 2**31 - 1)                                      # M_TRIM_THRESHOLD


def open_model(a):
    """-> (model, tokenizer, the checkpoint's dict). The tokenizer lies beside the checkpoint."""
    state = M.load_checkpoint(a.checkpoint, device := M.pick_device(a.device))
    model = M.load_model(state, device)
    if device.startswith("cuda"):
        model = model.bfloat16()
    tokenizer = bpe.load_tokenizer(os.path.join(os.path.dirname(a.checkpoint), "tokenizer.json"))
    if state.get("tokenizer", tokenizer.hash()) != tokenizer.hash():
        raise ValueError(f"{a.checkpoint} was trained with tokenizer {state['tokenizer']}, and the "
                         f"tokenizer.json beside it is {tokenizer.hash()}: put the right one there")
    return model, tokenizer, state


def open_tokens(a, name, tokenizer):
    return bpe.load_tokens(os.path.join(a.data, f"{name}.bin"), tokenizer)


def calibration(a, tokenizer, context_length):
    """ids (8,T) from all over the training text."""
    tokens = open_tokens(a, "train", tokenizer)
    return windows(tokens, min(context_length, max(1, len(tokens))), np.linspace(0, 1, 8))


def open_drafter(a, model):
    if a.draft in ("", "ngram"):
        return NGram(a.k) if a.draft else None
    state = M.load_checkpoint(a.draft, M.pick_device(a.device))
    kind = {"medusa": Medusa, "eagle": Eagle}.get(state.get("drafter"))
    if kind is None:
        return DraftModel(tune(M.load_model(state).to(example(model))), a.k)
    if state["config"] != asdict(model.config):
        raise ValueError(f"{a.draft} was trained for a model of another shape: python infer.py "
                         f"{state['drafter']} --checkpoint {a.checkpoint}")
    drafter = kind(model.config, min(a.k, state.get("k", 1)) if kind is Medusa else a.k)
    use = drafter.state_dict()                             # --k may use fewer Medusa heads than there are
    M.load_weights(drafter, {name: t for name, t in state["model"].items() if name in use})
    return drafter.to(example(model)).eval()


def open_engine(a, rows=None):
    """-> (engine of --max_batch rows, or `rows`, tokenizer, chat template or None)"""
    model, tokenizer, state = open_model(a)
    if a.quantize != "none":
        looks = a.quantize in ("awq", "llm.int8")
        quantize_model(model, a.quantize,
                       calibration(a, tokenizer, model.config.context_length) if looks else None)
    engine = Engine(tune(model), rows or a.max_batch, a.block_size, a.num_blocks, a.chunk, a.int8_cache,
                    drafter=open_drafter(a, model))
    engine.stop_ids = stop_tokens(tokenizer, state.get("chat"), state.get("stop_ids"))
    return engine, tokenizer, state.get("chat")


def stream(a, engine, tokenizer, ids):
    """Continue ids and print the text as it comes -> the request. Ctrl-C ends the text, not the program."""
    room = max(1, engine.model.config.context_length - len(ids))
    r = engine.add(Request(ids, min(a.max_tokens, room), a.temperature, a.top_k, a.top_p, a.min_p,
                           a.repetition_penalty, a.seed, tuple(a.stop), engine.stop_ids, tokenizer=tokenizer))
    before = signal.signal(signal.SIGINT, lambda *_: setattr(r, "finish", "cancelled"))
    try:
        while engine.busy():
            engine.step()
            print(r.next_text(), end="", flush=True)
    finally:
        signal.signal(signal.SIGINT, before)
    print(flush=True)
    return r


def run_complete(a):
    if a.prompt is None:
        return demo(a)
    engine, tokenizer, _ = open_engine(a, 1)
    print(a.prompt, end="")
    begin = time.perf_counter()
    r = stream(a, engine, tokenizer, tokenizer.encode(a.prompt) or [tokenizer.eot_id or 0])  # nothing said:
    seconds = time.perf_counter() - begin                                                    # a new document
    print(f"[{len(r.output)} tokens in {seconds:.2f} s, {len(r.output) / seconds:.0f} tokens/s; {r.finish}]",
          file=sys.stderr)
    if r.finish == "cancelled":
        raise KeyboardInterrupt


def run_chat(a):
    engine, tokenizer, template = open_engine(a, 1)
    if not template:
        raise ValueError(f"{a.checkpoint} is a base model and has no chat template: make a chat model with "
                         f"python align.py sft, or continue a text with --prompt")
    messages, context = [], engine.model.config.context_length
    print("Your turn; Ctrl-C stops an answer, Ctrl-D ends the conversation.")
    while True:
        try:
            turns = [*messages, {"role": "user", "content": input("> ")}]
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends the conversation)")
            continue
        except UnicodeDecodeError:
            print("that is not UTF-8 text")
            continue
        except EOFError:
            return print()
        try:
            while len(ids := render_chat(tokenizer, template, turns)) >= context - 16 and len(turns) > 1:
                turns = turns[2:]                          # the oldest turns are forgotten
            r = stream(a, engine, tokenizer, ids)
            messages = [*turns, {"role": "assistant", "content": r.text}]
        except ValueError as e:                            # too long: ask again
            print(e)


def run_serve(a):
    engine, tokenizer, template = open_engine(a)
    try:
        server = Server((a.host, a.port), engine, tokenizer, a.name, template)
    except OSError as e:
        raise ValueError(f"cannot listen at {a.host} port {a.port} ({e.strerror}): choose another --port or "
                         f"--host") from None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    url = f"http://{f'[{a.host}]' if ':' in a.host else a.host}:{server.server_address[1]}/"
    print(f"{a.name} at {url}v1   chat page {url}   (Ctrl-C or SIGTERM: finish what was asked, then stop)",
          flush=True)
    with server:
        server.serve_forever()
    print(f"served {engine.counters['requests']} requests, {engine.counters['tokens']} tokens")


def fingerprint(line):
    return hashlib.blake2b(line.strip().encode(), digest_size=8).hexdigest()


def answers(result, line):
    """Was this line of results written for that line of prompts?"""
    try:
        return json.loads(result)["line"] == fingerprint(line)
    except (ValueError, TypeError, KeyError):
        return False


def run_batch(a):
    """Lines as the API takes them, {"prompt": ..., "max_tokens": ...} -> lines of results in the same order.
    Only whole lines count, so an interrupted run goes on where it was."""
    with open(a.file, encoding="utf-8-sig") as f:
        lines = [line for line in f if line.strip()]
    engine, tokenizer, template = open_engine(a)
    os.makedirs(a.out, exist_ok=True)
    path = os.path.join(a.out, os.path.basename(a.file).removesuffix(".jsonl") + ".results.jsonl")
    with open(path, "a+b") as out:
        out.seek(0)
        whole = (data := out.read()).rfind(b"\n") + 1
        first = done = data.count(b"\n")
        if done > len(lines) or not all(map(answers, data[:whole].splitlines(), lines)):
            raise ValueError(f"{path} has {done} results and {a.file} {len(lines)} lines, so they are of "
                             f"another file: remove it, or choose another --out")
        out.truncate(whole)
        results, waiting = {}, collections.deque(range(done, len(lines)))
        begin, shown = time.monotonic(), 0.0
        while done < len(lines):
            while waiting and len(engine.waiting) < engine.max_batch:
                i = waiting.popleft()
                try:
                    asked = json.loads(lines[i])
                    asked = {"seed": a.seed, **asked} if isinstance(asked, dict) else asked
                    r, *more = read_call(asked, isinstance(asked, dict) and "messages" in asked, tokenizer,
                                         template, engine, most=a.max_tokens)
                    need(not more and r.n == 1, "a line is one text: write several lines, and no n")
                    engine.add(r).listener = i
                except (ValueError, RecursionError) as e:
                    results[i] = {"error": M.first_line(e)}
            for r in engine.step() if engine.busy() else ():
                if r.finish:
                    results[r.listener] = {"text": r.text, "finish_reason": r.finish, "tokens": len(r.output)}
            while done in results:
                result = {"index": done, "line": fingerprint(lines[done]), **results.pop(done)}
                out.write(json.dumps(result).encode() + b"\n")
                done += 1
            out.flush()
            seconds = time.monotonic() - begin
            if seconds - shown > 2 or done == len(lines):
                shown, eta = seconds, seconds / max(1, done - first) * (len(lines) - done)
                with contextlib.suppress(OSError):         # nobody looks: no reason to stop
                    print(f"{done}/{len(lines)} | {engine.counters['tokens'] / max(seconds, 1e-9):,.0f} "
                          f"tokens/s | {eta:.0f} s to go", file=sys.stderr, flush=True)
    print(f"{path}: {len(lines)} results, {first} of them from before")


def step_seconds(model, B=1, T=8, n=32):
    """Decoding n tokens greedily after B prompts of T tokens: seconds a step, the median."""
    engine, times = Engine(model, B, 0, chunk=T * B, share=False), []
    for _ in range(B):
        engine.add(Request(list(range(T)), min(n, model.config.context_length - T), temperature=0))
    engine.step()                                          # all prompts, and a token
    while engine.busy():
        begin = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


PRICE = ["", "parameters", "MB", "bits/byte", "tokens/s"]


def price_row(name, model, a, tokenizer):
    info = bpe.token_info(os.path.join(a.data, "val.bin"))
    bits = held_out_loss(model, open_tokens(a, "val", tokenizer), 16) / math.log(2)          # a token
    return [name, f"{M.num_params(model.config):,}", f"{model_bytes(model) / 1e6:.1f}",
            f"{bits * info['tokens'] / info['bytes']:.4f}", f"{1 / step_seconds(model):.0f}"]


def run_quantize(a):
    model, tokenizer, _ = open_model(a)
    ids, rows = calibration(a, tokenizer, model.config.context_length), []
    for scheme in ("as trained", *SCHEMES):
        m = copy.deepcopy(model)
        m = m if scheme == "as trained" else quantize_model(m, scheme, ids)
        rows.append(price_row(scheme, tune(m), a, tokenizer))
    M.table("What fewer bits cost (held-out text; one text at a time)", PRICE, rows)


def run_shrink(a):
    """prune: cut the checkpoint and repair it, taught by what it was. distill: teach a new, small one."""
    os.makedirs(a.out, exist_ok=True)                      # if this fails, then before the work
    teacher, tokenizer, state = open_model(a)
    c, rows = teacher.config, [price_row("before", teacher, a, tokenizer)]
    if a.command == "prune":
        student = prune(teacher, calibration(a, tokenizer, c.context_length),
                        a.num_layers or max(1, c.num_layers - 1), a.num_kv_heads or c.kv_heads,
                        a.d_ff or c.ffn_dim * 3 // 4)
    else:
        torch.manual_seed(a.seed)
        student = M.Transformer(replace(c, num_layers=a.num_layers or max(1, c.num_layers // 4),
                                        num_kv_heads=a.num_kv_heads or c.num_kv_heads, d_ff=a.d_ff or c.d_ff))
    at = example(teacher)                                  # the student learns in fp32, is judged in its type

    def price(name):
        rows.append(price_row(name, copy.deepcopy(student.eval()).to(at), a, tokenizer))
    if a.command == "prune":
        price("pruned")
    student = student.to(at.device)
    with contextlib.suppress(KeyboardInterrupt):           # keep what was learnt
        fit(student.train(), lambda ids: distillation_loss(teacher, student, ids),
            open_tokens(a, "train", tokenizer), c.context_length, 60 * a.minutes, seed=a.seed,
            half=at.dtype == torch.bfloat16)
    price(f"distilled, {a.minutes:g} min")
    path = os.path.join(a.out, "checkpoint.pt")
    tokenizer.save(os.path.join(a.out, "tokenizer.json"))
    M.save_checkpoint(path, student, tokenizer=tokenizer.hash(),
                      **{k: state[k] for k in ("chat", "stop_ids") if k in state})
    M.table("A smaller model (held-out text; one text at a time)", PRICE, rows)
    print(f"\nsaved {path}")


def run_drafter(a):
    os.makedirs(a.out, exist_ok=True)                      # what fails should fail before the work
    model, tokenizer, _ = open_model(a)
    Engine(model, 1, drafter=NGram(a.k))                   # does a model like this take drafts?
    if a.k > (most := min(model.config.context_length, 256) - 3):
        raise ValueError(f"--k {a.k} does not fit the windows of training: try --k {max(1, most)} or less")
    drafter = train_drafter({"medusa": Medusa, "eagle": Eagle}[a.command], model,
                            open_tokens(a, "train", tokenizer), a.k, 60 * a.minutes, a.seed)
    path = os.path.join(a.out, f"{a.command}.pt")
    M.save_checkpoint(path, drafter, drafter=a.command, k=a.k)
    print(f"saved {path}: python infer.py --checkpoint {a.checkpoint} --draft {path} --prompt TEXT")


def run_diffuse(a):
    """A diffusion model and an autoregressive one: same shape, same text, same minutes."""
    tokenizer = bpe.load_tokenizer(os.path.join(a.data, "tokenizer.json"))
    tokens, val = open_tokens(a, "train", tokenizer), open_tokens(a, "val", tokenizer)
    torch.manual_seed(a.seed)
    c = M.model_config(a, vocab_size=tokenizer.vocab_size)
    if c.context_length < 18:
        raise ValueError(f"--context_length {c.context_length} has no room for 16 tokens and an answer: "
                         f"try 64")
    T, plain, masked = c.context_length, M.Transformer(c), diffusion_model(c)
    for m, loss in ((plain, lambda ids: M.lm_loss(plain(ids[:, :-1]), ids[:, 1:])[0]),
                    (masked, lambda ids: diffusion_loss(masked, ids))):
        fit(m, loss, tokens, T, 60 * a.minutes, 3e-3, seed=a.seed)
        m.eval()
    ids = windows(val, T, np.linspace(0, 1, 32))
    with torch.no_grad():
        bound = diffusion_loss(masked, ids, torch.Generator().manual_seed(0)).item()
    prompt, n, rows = ids[0, :16].tolist(), min(64, T - 17), []
    engine = Engine(tune(copy.deepcopy(plain)), 1)
    for rounds in (0, 1, 4, 16, n):
        begin = time.perf_counter()
        out = (diffusion_generate(masked, n, rounds, prompt) if rounds else
               engine.generate([Request(list(prompt), n)])[0])
        ms = (time.perf_counter() - begin) * 1e3
        with torch.no_grad():
            nats = M.lm_loss(plain(torch.tensor([prompt + out]))[:, 15:-1], torch.tensor([out]))[0].item()
        name = "diffusion" if rounds else "autoregressive"
        rows.append([name, str(rounds or n), f"{ms:.0f}", f"{nats:.2f}"])
    M.table(f"{n} tokens, judged by the autoregressive model (nats a token). Held out: autoregressive "
            f"{held_out_loss(plain, val):.3f}, diffusion at most {bound:.3f}",
            ["decoder", "passes", "ms", "judged"], rows)


def run_cost(a):
    cases = ((1, 1024, 1024), (1, 1, 1024), (64, 1, 1024), (256, 1, 1024))
    M.table(f"FLOPs a byte, Llama-2-13B; an H100 needs {H100[0] / H100[1]:.0f} to be busy",
            ["", "B", "T", "S", "feed-forward", "attention"],
            [["prefill" if T > 1 else "decoding", str(B), str(T), str(S),
              *(f"{f:.2f}" for f in intensities(S, T, B, 5120, 13824))] for B, T, S in cases])
    calculator()


# --- 13. demo: the ladder -----------------------------------------------------------------------------------

def demo_model(a):
    """The checkpoint; where there is none, a byte model trained for seconds, just enough to say something."""
    if os.path.exists(a.checkpoint) or a.checkpoint != DEFAULT:
        model, tokenizer, _ = open_model(a)
        print(f"{a.checkpoint}: {M.num_params(model.config):,} parameters")
        return model, bpe.load_tokens(os.path.join(os.path.dirname(a.checkpoint), "train.bin"), tokenizer)
    print(f"no {a.checkpoint} (python train.py makes one): training a byte model for {a.seconds:.0f} s")
    files = bpe.corpus_files()
    text = b"".join(open(f, "rb").read() for f in files[::max(1, len(files) // 100)])
    c = M.ModelConfig(vocab_size=257, d_model=256, num_layers=6, num_heads=4, qk_norm=True)
    torch.manual_seed(a.seed)
    model, tokens = M.Transformer(c), np.frombuffer(text, np.uint8)
    fit(model, lambda ids: M.lm_loss(model(ids[:, :-1]), ids[:, 1:])[0], tokens, 128, a.seconds, 3e-3, 4)
    return model.eval(), tokens


def machine(at):
    """(FLOP/s, bytes/s) of the device and type of tensor `at`, measured: a square product, and a matrix times
    a vector."""
    cpu = at.device.type == "cpu"
    n, (rows, columns) = (1024, (8192, 4096)) if cpu else (8192, (65536, 16384))
    m, v = (torch.randn(shape, device=at.device, dtype=at.dtype) for shape in ((n, n), (rows, columns)))
    products, reads = (min(timeit.repeat(lambda: f()[0, 0].item(), number=1))    # .item() waits for a GPU
                       for f in (lambda: m @ m, lambda: v @ v[:1].T))
    return 2 * n**3 / products, v.nbytes / reads


def race(run, prompts, limits):
    """All prompts, greedily, by an engine or a function -> (texts, first token after s, all after s, most
    cache bytes in use, tokens a pass and row)."""
    first, most, begin = 0.0, 0, time.perf_counter()
    if not isinstance(run, Engine):
        return run(prompts, limits), first, time.perf_counter() - begin, most, 1
    pool, requests = run.pool, [run.add(Request(list(p), n, temperature=0)) for p, n in zip(prompts, limits)]
    while run.busy():
        run.step()
        most = max(most, pool.used())
        first = first or (time.perf_counter() - begin) * any(r.output for r in requests)
    seconds = time.perf_counter() - begin
    rounds = run.counters["drafted"] / (run.drafter.k if run.drafter else 1)
    return ([r.output for r in requests], first, seconds, most * pool.nbytes() / pool.num_blocks,
            1 + run.counters["accepted"] / rounds if rounds else 1)


def demo(a):
    """Rung by rung: the same greedy texts, sooner."""
    model, tokens = demo_model(a)
    c, plain = model.config, copy.deepcopy(model)
    tune(model)
    small = None if c.num_experts else tune(quantize_model(copy.deepcopy(plain), "int8"))
    recurrent = any(isinstance(block.mixer.make_cache(), M.StateCache) for block in model.blocks)
    flops, bandwidth = machine(example(plain))
    params, T, n = M.num_params(c), min(c.context_length // 3, 96), min(64, c.context_length // 2)
    rng = random.Random(a.seed)

    def text(n):
        at = rng.randrange(len(tokens) - n)
        return [int(i) for i in tokens[at:at + n]]

    def floor(B, S, rows=1, run=None):                     # seconds: the slower of reading and computing
        engine, number = isinstance(run, Engine), example(plain).itemsize    # bytes of a cached number
        number = 1 + 4 / c.head_dim if engine and run.pool.int8 else number
        weights = model_bytes(run.model if engine else plain)
        return max((weights + B * M.state_bytes(c, S, number)) / bandwidth, 2 * params * B * rows / flops)
    one, shared = [text(T)], text(T)
    mixed = [(shared if i % 2 else []) + text(rng.randrange(4, max(5, T // 2))) for i in range(24)]
    limits = [rng.randrange(4, n) for _ in mixed]
    slots = dict(block_size=0, share=False)                # contiguous: a row of the longest length for each
    ladder = [  # name, what runs, prompts, rows
        ("one text: no cache", lambda p, n: [M.generate(plain, p[0], n[0], temperature=0)], one, 1),
        ("  KV cache", lambda p, n: [generate_naive(plain, p[0], n[0])], one, 1),
        ("  this engine", Engine(model, 1, **slots), one, 1),
        ("  n-gram drafts", None if recurrent else Engine(model, 1, drafter=NGram(4), **slots), one, 1),
        ("24 texts: one at a time", Engine(model, 1, **slots), mixed, 1),
        ("  8 at a time, padded", lambda p, n: generate_static(plain, p, n, 8), mixed, 8),
        ("  continuous, 8 rows", Engine(model, 8, **slots), mixed, 8),
        ("  paged, prefixes shared", Engine(model, 8), mixed, 8),
        ("  int8 cache (lossy)", Engine(model, 8, int8_cache=True), mixed, 8),
        ("  int8 weights (lossy)", small and Engine(small, 8), mixed, 8)]
    rows, want = [], {}
    for name, run, prompts, B in (rung for rung in ladder if rung[1]):       # some models lack some rungs
        lengths = [n] if prompts is one else limits
        texts, first, seconds, most, per_pass = race(run, prompts, lengths)
        count, fed = sum(map(len, texts)), sum(map(len, prompts))
        same = sum(x == y for a, b in zip(texts, want.setdefault(len(prompts), texts)) for x, y in zip(a, b))
        S = T if prompts is one else fed // len(prompts) + n // 2
        least = count * floor(1, S, S) if "no cache" in name else (
            2 * params * fed / flops + count / B / per_pass * floor(B, S, 1, run))
        rows.append([name, f"{count / least:,.0f}", f"{count / seconds:,.0f}", f"{seconds / count * 1e3:.2f}",
                     f"{first * 1e3:.0f}" if first else "-", f"{most / 1e6:.1f}" if most else "-",
                     f"{per_pass:.2f}", f"{same / count:.0%}"])
    M.table(f"The ladder: greedy, {n} tokens after {T}; then 24 mixed requests. At most: weights and cache "
            f"read at {bandwidth / 1e9:.0f} GB/s, products at {flops / 1e9:.0f} GFLOP/s, measured here",
            ["", "tokens/s at most", "measured", "ms/token", "first, ms", "cache MB", "tokens/pass",
             "same text"], rows)
    calculator()
    plot_batches(os.path.join(a.out, "infer.png"), model, floor, T)


def plot_batches(path, model, floor, T):
    """Latency against throughput as the batch grows."""
    plt, sizes = M.pyplot(), (1, 2, 4, 8, 16, 32)
    if plt is None:
        return
    fig, ax = plt.subplots(figsize=(7, 4.5))
    for label, seconds, style in (
            ("measured", [step_seconds(model, B, T, 12) for B in sizes], "o-"),
            ("at best, by the formulas", [floor(B, T) for B in sizes], "--")):
        ax.plot([B / s for B, s in zip(sizes, seconds)], [s * 1e3 for s in seconds], style, label=label)
        for B, s in zip(sizes, seconds):
            ax.annotate(f"{B} rows", (B / s, s * 1e3), textcoords="offset points", xytext=(4, -9), fontsize=8)
    ax.set(xlabel="tokens/s, all texts together", ylabel="ms a token, each text",
           title="A larger batch: more throughput, more latency")
    ax.legend()
    fig.tight_layout()
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    fig.savefig(path, dpi=120)
    print(f"\nsaved {path}")


# --- 14. the command line -----------------------------------------------------------------------------------

DEFAULT = "out/checkpoint.pt"
FLAGS = {
    "prompt": dict(help="text to continue; without it and without a command: the lecture"),
    "file": dict(metavar="FILE.jsonl", help="one request a line, as the API takes them"),
    "checkpoint": dict(default=DEFAULT, metavar="PATH", help="the model; tokenizer.json lies beside it"),
    "data": dict(default="out", metavar="DIR", help="folder with train.bin, val.bin and tokenizer.json"),
    "out": dict(default="out", metavar="DIR", help="folder for what the command makes"),
    "max_tokens": dict(type=int, default=256, help="new tokens at most"),
    "temperature": dict(type=float, default=0.8, help="0: greedy"),
    "top_k": dict(type=int, default=0, help="draw from the k likeliest only; 0: all"),
    "top_p": dict(type=float, default=0.95, help="draw from the likeliest of this mass only"),
    "min_p": dict(type=float, default=0.0, help="drop what has less than this share of the likeliest"),
    "repetition_penalty": dict(type=float, default=1.0, help="above 1: seen tokens become less likely"),
    "stop": dict(nargs="*", default=[], metavar="TEXT", help="strings that end the text"),
    "seed": dict(type=int, default=0, help="of the draws, and of training"),
    "quantize": dict(choices=("none", *SCHEMES), default="none", help="weights in fewer bits"),
    "int8_cache": dict(action="store_true", help="keys and values in 8 bits"),
    "draft": dict(default="", metavar="ngram|PATH", help="speculate: n-grams of the text, or a small model, "
                                                        "Medusa or EAGLE file"),
    "k": dict(type=int, default=3, help="tokens drafted at a time"),
    "max_batch": dict(type=int, default=16, help="requests decoded together"),
    "block_size": dict(type=int, default=16, help="tokens a cache block; 0: one contiguous block a request"),
    "num_blocks": dict(type=int, default=0, help="cache blocks; 0: enough for max_batch full "
                                                  "contexts, at most 4 GB"),
    "chunk": dict(type=int, default=256, help="prompt tokens fed between two decoding steps"),
    "host": dict(default="127.0.0.1", help="address to listen on"),
    "port": dict(type=int, default=8000, help="TCP port; 0: any free one"),
    "name": dict(default="model", help="the model's name in the API"),
    "minutes": dict(type=float, default=1.0, help="minutes of training"),
    "seconds": dict(type=float, default=8.0, help="seconds of training in the lecture"),
    "num_layers": dict(type=int, default=0, help="its blocks; 0: one less (distill: a quarter)"),
    "num_kv_heads": dict(type=int, default=0, help="its key/value heads; 0: as before"),
    "d_ff": dict(type=int, default=0, help="its hidden units; 0: 3/4 (distill: all)"),
    "device": dict(default="auto", help="cuda, mps or cpu; auto takes the first there is"),
    "threads": dict(type=int, default=0, help="CPU threads; 0: one a core"),
}
_common = "checkpoint device threads seed "
_engine = "quantize int8_cache draft k max_batch block_size num_blocks chunk data "
_draw = "max_tokens temperature top_k top_p min_p repetition_penalty stop "
COMMANDS = {  # name -> (function, its flags, what it does)
    "": (run_complete, _common + _engine + _draw + "prompt out seconds", "continue a text; or the lecture"),
    "chat": (run_chat, _common + _engine + _draw, "a conversation in the terminal"),
    "serve": (run_serve, _common + _engine + "host port name", "the OpenAI API and a chat page over HTTP"),
    "batch": (run_batch, "file " + _common + _engine + "max_tokens out", "many requests from a file"),
    "quantize": (run_quantize, _common + "data", "the price of fewer bits: a table"),
    "prune": (run_shrink, _common + "data out num_layers num_kv_heads d_ff minutes", "cut and repair"),
    "distill": (run_shrink, _common + "data out num_layers num_kv_heads d_ff minutes", "teach a small model"),
    "medusa": (run_drafter, _common + "data out k minutes", "train Medusa heads for --draft"),
    "eagle": (run_drafter, _common + "data out k minutes", "train an EAGLE block for --draft"),
    "diffuse": (run_diffuse, "seed threads data minutes", "masked diffusion against autoregression"),
    "cost": (run_cost, "", "the lecture's calculator"),
}


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    command = argv.pop(0) if argv and argv[0] in COMMANDS else ""
    run, flags, text = COMMANDS[command]
    p = M.cli(__doc__ if not command else text)
    p.usage = f"infer.py {command or '[' + '|'.join(filter(None, COMMANDS)) + ']'} [--flag value ...]"
    for name in flags.split():
        p.add_argument(name if name == "file" else f"--{name}", **FLAGS[name])
    if command == "diffuse":
        M.add_model_flags(p)
    a = p.parse_args(argv)
    a.run, a.command, a.error = run, command, p.error
    highest = dict(port=65535, threads=1024, seed=2**63 - 1)
    for name, low in dict(seed=0, k=1, max_batch=1, block_size=0, num_blocks=0, chunk=1, threads=0, minutes=0,
                          seconds=0, max_tokens=1, port=0, num_layers=0, num_kv_heads=0, d_ff=0).items():
        value, high = getattr(a, name, low), highest.get(name, math.inf)
        if not low <= value <= high:
            p.error(f"--{name} {value} is out of range: {low} "
                    f"{f'to {high}' if name in highest else 'or more'}")
    if not command and a.prompt is None:                   # a flag that would do nothing is a mistake
        for name in (_engine + _draw).split():
            if getattr(a, name) != FLAGS[name].get("default", False):
                p.error(f"--{name} is for a text: give --prompt TEXT, too (without it the lecture runs)")
    if hasattr(a, "top_k"):
        try:
            Request([0], 1, a.temperature, a.top_k, a.top_p, a.min_p, a.repetition_penalty).check(2, 1)
        except ValueError as e:
            p.error("--" + str(e).replace("=", " ", 1))
    return a


def main(argv=None):
    a = parse_args(argv)
    try:
        keep_freed_memory()
        if getattr(a, "threads", 0):
            torch.set_num_threads(a.threads)
        a.run(a)
        sys.stdout.flush()
    except BrokenPipeError:                                # the reader of our output, such as head, is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (ValueError, OSError) as e:
        a.error(M.first_line(e))
    except (MemoryError, RuntimeError) as e:               # of a CPU and of a GPU
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(e):
            raise
        a.error(f"out of memory ({M.first_line(e)}): lower --num_blocks or --max_batch, or take a smaller "
                f"model")
    except KeyboardInterrupt:
        print("\ninfer.py: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
