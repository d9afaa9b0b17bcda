r"""infer.py - lecture 10: inference.

What   From a checkpoint to text, for many users at once: drawing tokens, a KV cache in blocks, continuous
       batching, speculative sampling, quantisation, pruning, distillation, masked diffusion, and a server
       that speaks the OpenAI API.
Why    Training sees all tokens at once; decoding makes one at a time, and each reads every weight and the
       whole cache for a few FLOPs a byte, where a GPU needs hundreds. So time is bytes read: read them for
       more rows (batching), for more tokens (speculation), or have fewer of them (smaller caches, fewer bits,
       smaller models). Llama-2-13B in bf16 on an H100 makes 125 tokens/s for one user, 2,689 for 64 together.

Equations
       cache       = 2 K H L numbers a token;   latency >= (weights + B * cache * S) bytes / bandwidth
       intensity   = B T in the feed-forward layers;  S T / (S + T) in attention, whatever B
       speculative : keep draft x with probability min(1, p(x)/q(x)), else draw from max(p - q, 0): exactly p
       absmax      : w = scale * integer,  scale = max|w| / (2^(bits-1) - 1)
       distillation= sum p ln(p / s);      diffusion <= E over t of  1/t * sum over masked of -ln p(token)

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

You should see
       (two cores shared with other work, no checkpoint: a byte model of 5 million weights; trust the ratios)
                                    tokens/s at most  measured  first, ms  cache MB  tokens/pass  same text
       one text: no cache                         18         5          -         -         1.00       100%
         KV cache                                181        28          -         -         1.00       100%
         this engine                             181        22        226       3.1         1.00       100%
         n-gram drafts                           293        23        329       3.1         1.84       100%
         EAGLE drafts                            183         5        604       3.7         1.02       100%
       24 texts: one at a time                   172        11        224       3.1         1.00       100%
         8 at a time, padded                     513        61          -         -         1.00       100%
         continuous, 8 rows                      513        64        554      25.2         1.00       100%
         paged, prefixes shared                  513        94        296      10.4         1.00       100%
         int8 cache (lossy)                      513        72        510       2.8         1.00        94%
         int8 weights (lossy)                    513        62        531      10.4         1.00       100%
       cache (Llama-2-13B, H100)  batch        GB  ms/token  tokens/s
       40 key/value heads             1     26.87      8.02       125
                                     64     79.72     23.80     2,689
                                    256  240.78 *     71.87     3,562
       8 (grouped)                  256     65.63     19.59    13,068
       MLA, latent 512              256     35.62     10.63    24,076

Outline  1 a request, drawing   2 naive   3 the cache   4 the engine   5 fewer, better shaped operations
         6 speculation   7 quantisation   8 pruning, distillation   9 diffusion   10 accounting
         11 the server   12 commands   13 demo   14 command line.   On a first reading: 1 to 4, 6, 10.

References  Pope et al. 2022 (cost of inference), Yu et al. 2022 (Orca), Kwon et al. 2023 (PagedAttention),
            Agrawal et al. 2023 (chunked prefill), Leviathan et al. 2023 and Chen et al. 2023 (speculative
            sampling), Cai et al. 2024 (Medusa), Li et al. 2024 (EAGLE), Dettmers et al. 2022 (LLM.int8),
            Lin et al. 2024 (AWQ), Muralidharan et al. 2024 (Minitron), Hinton et al. 2015 (distillation),
            Sahoo et al. 2024 (masked diffusion).

What serving is for besides chat: evaluation, reinforcement learning (align.py samples more than it trains),
test-time compute; over a model's life inference outweighs training. vLLM, TensorRT-LLM and TGI do what is
here with kernels that read cache blocks in place (FlashDecoding: one row's cache over many cores).
"""
import argparse
import asyncio
import codecs
import collections
import contextlib
import copy
import ctypes
import hashlib
import http
import json
import math
import os
import random
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace

import bpe
import model as M                                          # before torch: it sets how CPU threads wait

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
    listener: object = None                                # the server's queue
    index: int = 0                                         # which of the n
    length: int = 0                                        # tokens in the cache; ids[length:] are to be fed
    blocks: list = field(default_factory=list)             # the cache's blocks of this text, in order
    keys: list = field(default_factory=list)               # hashes of its full blocks
    dropped: int = 0                                       # leading blocks that no window reaches any more
    fresh: bool = True                                     # no token was drawn since it was let in
    finish: str = ""                                       # stop, length, cancelled; empty while it runs
    text: str = ""
    shown: int = 0                                         # characters of text that next_text gave out

    def __post_init__(self):
        self.prompt_tokens, self.states = len(self.ids), {}
        self.begin(self.seed)

    def begin(self, seed):
        """Its own random stream: the same request gives the same text alone or in any batch."""
        self.random, self.decoder = random.Random(seed), codecs.getincrementaldecoder("utf-8")("replace")

    def check(self, context_length, vocab_size):
        room = context_length - len(self.ids)
        ranges = [("max_tokens", 1, max(room, 1)), ("temperature", 0, 100), ("top_k", 0, 10**9),
                  ("top_p", 1e-6, 1), ("min_p", 0, 1), ("repetition_penalty", 0.01, 100), ("n", 1, 16)]
        if not self.ids or room < 1:
            raise ValueError(f"the prompt has {len(self.ids)} tokens: this model takes "
                             f"1 to {context_length - 1}")
        if not all(isinstance(i, int) and 0 <= i < vocab_size for i in self.ids):
            raise ValueError(f"the prompt holds an id outside 0 .. {vocab_size - 1}")
        for name, low, high in ranges:
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)} is out of range: {low:g} to {high:g}"
                                 + (f", as {context_length} tokens less the prompt's {len(self.ids)} are left"
                                    if name == "max_tokens" else ""))

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
            end -= max((n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n])),
                       default=0)
        out, self.shown = self.text[self.shown:end], max(self.shown, end)
        return out

    output = property(lambda self: self.ids[self.prompt_tokens:])


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
            seen = torch.tensor(sorted({*r.ids, *(drafted[i] if drafted else ())}), device=logits.device)
            z = logits[i, seen]
            logits[i, seen] = torch.where(z > 0, z / r.repetition_penalty, z * r.repetition_penalty)
    if all(r.temperature == 0 for r in requests):
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    def column(values):
        return torch.tensor(list(values), device=logits.device)[:, None]
    probs = M.softmax(logits / column(r.temperature or 1.0 for r in requests))
    if all(r.temperature and not r.top_k and r.top_p == 1 and not r.min_p for r in requests):
        return probs                                       # nothing to cut: no need to sort
    probs, order = probs.sort(dim=-1, descending=True, stable=True)
    rank, before = torch.arange(probs.shape[-1], device=logits.device), probs.cumsum(-1) - probs
    keep = ((rank < column(1 if r.temperature == 0 else r.top_k or len(rank) for r in requests))
            & (before < column(r.top_p for r in requests))
            & (probs >= column(r.min_p for r in requests) * probs[:, :1]))
    keep[:, 0] = True
    probs = probs * keep
    return torch.zeros_like(probs).scatter(-1, order, probs / probs.sum(-1, keepdim=True))


def draw(probs, requests):
    """probs (R,V) -> R tokens: the first whose cumulated mass exceeds one number of the request's stream."""
    mass = probs.double().cumsum(-1)
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
    the hash of all tokens up to its end. A block that two own is copied before either writes to it. One
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
        if self.share and key not in self.block_of and block not in self.key_of:
            self.block_of[key], self.key_of[block] = block, key

    def copy(self, source, target):
        for t in self.tensors():
            t[target] = t[source]

    def tensors(self):
        return [t for layer in self.layers for store in layer.stores.values() for t in store.tensors]

    def nbytes(self):
        return sum(t.nbytes for t in self.tensors())


class Store:
    """Keys, values or both of one layer: (num_blocks, block_size, heads, H). As int8: round(x / scale), with
    a scale a token and head, so that a large one does not cost its neighbours their precision."""
    def __init__(self, pool, like):
        shape, self.dtype = (pool.num_blocks, pool.block_size, *like.shape[2:]), like.dtype
        # Zeros, not empty: a masked key has weight 0, and 0 times a NaN would be NaN.
        self.numbers = torch.zeros(shape, device=like.device, dtype=torch.int8 if pool.int8 else like.dtype)
        self.scales = torch.zeros(*shape[:3], 1, device=like.device) if pool.int8 else None
        self.tensors = [self.numbers] if self.scales is None else [self.numbers, self.scales]

    def exchange(self, x, step):
        """Write x (B,T,heads,H) to the step's slots; read all that its rows have, (B,S,heads,H): a view where
        their blocks lie in order, else a copy, as torch's attention wants one tensor (a GPU kernel for paged
        attention reads the blocks where they are)."""
        parts = [x]
        if self.scales is not None:
            scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
            parts = [(x / scale).round().to(torch.int8), scale]
        for i, (t, part) in enumerate(zip(self.tensors, parts)):
            t.flatten(0, 1).index_copy_(0, step.slots, part.flatten(0, 1))
            if step.run is not None:
                parts[i] = t[step.run:step.run + len(x), :step.S]
            else:
                rows = t.index_select(0, step.table.flatten())               # (B*blocks,block_size,heads,H)
                parts[i] = rows.view(len(x), step.reach, *t.shape[2:])[:, :step.S]
        return parts[0] if self.scales is None else (parts[0] * parts[1]).to(self.dtype)


class PagedLayer:
    """What a mixer gets as its cache: model.KVCache's append, on the pool's blocks."""
    def __init__(self, pool):
        self.pool, self.stores = pool, {}
        pool.layers.append(self)

    def exchange(self, name, x):
        if name not in self.stores:
            self.stores[name] = Store(self.pool, x)
        return self.stores[name].exchange(x, self.pool.step)

    def append(self, k, v, positions):
        """k, v (B,K,T,H) of the step's rows -> everything these rows have, and its positions (B,S). Slots
        beyond a row's end hold old numbers at positions that no query reaches: the mask hides them."""
        k, v = (self.exchange(name, x.transpose(1, 2)).transpose(1, 2) for name, x in (("k", k), ("v", v)))
        return k, v, self.pool.step.key_positions


class Step:
    """One forward pass over rows of the pool; the model takes it for a cache (.layers, .length)."""
    def __init__(self, pool, layers, positions, table, base, S, run, exact):
        """positions (B,T); table (B,blocks), the rows' blocks from position base (B,1) on; S tokens to read;
        run: the first block, where the rows' blocks are consecutive, one each; exact: S is not padded."""
        self.layers, self.length, self.positions = layers, 0, positions
        self.table, self.S, self.run, size = table, S, run, pool.block_size
        self.reach = table.shape[1] * size                 # tokens in the rows' blocks, S or more
        place = positions - base
        self.slots = (table.gather(1, place // size) * size + place % size).flatten()
        self.key_positions = base + torch.arange(S, device=positions.device)                     # (B,S)
        self.masks, self.angles, self.exact = {}, None, exact

    def mask(self, window, dtype):
        """(B,1,T,S) of 0 and -inf, once a step, not once a layer. None: one row, which sees all it has."""
        if self.exact and self.positions.numel() == 1 and not window:
            return None
        if window not in self.masks:
            seen = M.attention_mask(self.positions, self.key_positions, window)[:, None]
            self.masks[window] = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
                ~seen, -math.inf)
        return self.masks[window]

    def rotation(self, c):
        """(B,T,N+2K,H/2) complex, once a step: the model's own RoPE of the number 1 for q and k, 1 for v."""
        if self.angles is None:
            one = (1 - torch.arange(c.head_dim, device=self.positions.device) % 2).float()       # 1, 0, 1, 0
            turned = M.apply_rope(one.expand(*self.positions.shape, -1), self.positions, *c.rope)
            heads = [t[:, :, None].expand(-1, -1, n, -1) for t, n in (
                (turned, c.num_heads + c.kv_heads), (one.expand_as(turned), c.kv_heads))]
            self.angles = torch.view_as_complex(torch.cat(heads, 2).unflatten(-1, (-1, 2)))
        return self.angles


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


class Engine:
    """Continuous batching (Yu et al. 2022, Orca): requests join and leave between two tokens.

    A step lets waiting requests in, feeds one chunk of prompts, and decodes one token for everyone else.
    Reading the weights is the cost of a step, and all rows share it; attention is each row's own, so batching
    does nothing for it. Chunks bound how long a long prompt holds up the others. Rows of a batch are at
    different lengths and nothing is padded: positions and block tables say who is where.
    """
    def __init__(self, model, max_batch=16, block_size=16, num_blocks=0, chunk=256, int8_cache=False,
                 share=True, drafter=None, graphs=True):
        c = model.config
        made = [block.mixer.make_cache() for block in model.blocks]
        grows = [isinstance(m, M.KVCache) for m in made]
        self.recurrent = any(m is not None and not g for m, g in zip(made, grows))
        windows = [m.window for m, g in zip(made, grows) if g]
        self.window = max(windows) if windows and all(windows) and drafter is None else 0
        size = block_size or c.context_length              # 0: contiguous, one block a request
        most = CACHE_BYTES // max(1, M.state_bytes(c, size, example(model).itemsize))
        blocks = num_blocks or max(1, min(max_batch * -(-c.context_length // size), int(most)))
        if drafter is not None and self.recurrent:
            raise ValueError("speculative decoding must take back tokens that the target rejects, and a "
                             "recurrent state cannot: use a model whose layers all attend")
        self.pool = Pool(blocks, size, int8_cache, share and not self.recurrent)
        self.model, self.max_batch, self.chunk, self.fresh_states = model, max_batch, chunk, made
        self.device = example(model).device
        graphs = graphs and self.device.type == "cuda" and not c.num_experts and not self.recurrent
        self.graphs = {} if graphs else None               # experts' loads differ from step to step
        self.layers = self.new_layers(made)
        self.waiting, self.running = collections.deque(), []
        self.counters, self.stop_ids = collections.Counter(), ()
        self.drafter = drafter
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
        changed, groups, budget = [], collections.defaultdict(list), self.chunk
        for r in [r for r in self.running if r.fresh]:
            n = min(len(r.ids) - r.length, budget)
            if not n or r not in self.running or not self.reserve(r, n):
                break
            groups[n, r.length == 0].append(r)             # equal pieces go through the model together
            budget -= n
        for (n, _), rows in groups.items():
            if rows := [r for r in rows if r in self.running]:
                changed += self.prefill(rows, n)
        rows = [r for r in self.running if not r.fresh and not r.finish]
        k = min([self.drafter.k if self.drafter else 0,
                 *(self.model.config.context_length - 1 - r.length for r in rows)])
        for r in list(rows):
            if r in self.running:
                self.reserve(r, 1 + k)
        rows = [r for r in rows if r in self.running]      # without those that were put back
        if rows:
            self.decode(rows, k)
        changed += rows
        for r in [r for r in self.running if r.finish]:
            self.release(r)
        return changed

    def prefill(self, rows, n):
        """Feed n tokens of each row's prompt -> the requests that are through, with their first token."""
        features = self.run(self.model, self.layers, rows, [r.ids[r.length:r.length + n] for r in rows],
                            [r.length for r in rows])
        for r in rows:
            self.advance(r, n)
        if self.drafter is not None:
            self.drafter.observe(rows, features, [n] * len(rows))
        self.counters["prompt_tokens"] += n * len(rows)
        changed = []
        for r, last in zip(rows, features[:, -1]):
            if r.length == len(r.ids):
                twins = [r, *(self.fork(r, i) for i in range(1, r.n if not r.output else 1))]
                self.emit(twins, self.logits(last).expand(len(twins), -1))
                changed += twins
        return changed

    def admit(self):
        """Let requests in while there is room for their prompts; what an earlier one computed is found."""
        for r in [r for r in (*self.waiting, *self.running) if r.finish]:    # cancelled from outside
            self.release(r)
        size = self.pool.block_size
        while self.waiting and len(self.running) < self.max_batch:
            r = self.waiting[0]
            if self.running and len(self.pool.free) < min(-(-len(r.ids) // size) + 1, self.pool.num_blocks):
                break
            self.waiting.popleft()
            self.running.append(r)
            if self.recurrent:
                r.states = {i: copy.copy(m) for i, m in enumerate(self.fresh_states)
                            if m is not None and self.layers[i] is None}
            for i in range((len(r.ids) - 1) // size if self.pool.share else 0):  # one token is left to feed
                block = self.pool.block_of.get(self.key(r, i))
                if block is None:
                    break
                r.blocks.append(self.pool.own(block))
                r.length += size
                self.counters["shared_tokens"] += size

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
        for block in reversed(r.blocks):                   # a text's end is reused before its beginning
            if block is not None:
                self.pool.drop(block)
        r.blocks, r.length, r.dropped, r.states = [], 0, 0, {}
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

    def decode(self, rows, k):
        """One round for all rows: a token each, or up to k + 1 with drafts."""
        drafts, q = (self.drafter.propose(rows, k) if k else None) or ([[] for _ in rows], None)
        features = self.run(self.model, self.layers, rows, [r.ids[-1:] + d for r, d in zip(rows, drafts)],
                            [r.length for r in rows])
        counts = [1] * len(rows)
        if q is None:
            for r in rows:
                self.advance(r, 1)
            self.emit(rows, self.logits(features[:, -1]))
        else:
            counts = self.verify(rows, k, drafts, q, self.logits(features))
        if self.drafter is not None:
            self.drafter.observe(rows, features, counts)

    def verify(self, rows, k, drafts, q, logits):
        """logits (B,k+1,V) -> tokens kept a row; each row goes on at its own length."""
        p = distribution(logits.flatten(0, 1), [r for r in rows for _ in range(k + 1)],
                         [d[:i] for d in drafts for i in range(k + 1)]).view_as(logits)
        counts = []
        for r, d, p_row, q_row in zip(rows, drafts, p, q):
            tokens = accept(p_row, q_row, d, r)
            self.counters["drafted"] += k
            self.counters["accepted"] += len(tokens) - 1
            counts.append(len(tokens))
            for i, token in enumerate(tokens):
                if not r.finish:
                    r.push(token)
                    self.counters["tokens"] += 1
            if not r.finish:
                self.advance(r, len(tokens))
        return counts

    def emit(self, rows, logits):
        greedy = all(r.temperature == 0 and r.repetition_penalty == 1 for r in rows)
        tokens = logits.argmax(-1).tolist() if greedy else draw(distribution(logits, rows), rows)
        for r, token in zip(rows, tokens):
            r.fresh = False
            r.push(token)
        self.counters["tokens"] += len(rows)

    def logits(self, features):
        return M.soft_cap(self.model.head(features), self.model.config.logit_softcap)

    def run(self, model, layers, rows, ids, starts, inputs=None):
        """One forward pass: ids, a list of T tokens a row, which begin at positions `starts` -> features
        (B,T,D). inputs: a function of the step instead of the model."""
        size, T = self.pool.block_size, len(ids[0])
        S = max(start + T - r.dropped * size for r, start in zip(rows, starts))
        n = -(-S // size)
        if self.graphs is not None:
            most = -(-model.config.context_length // size)
            n = min(2 ** (n - 1).bit_length(), most)       # few sizes, few graphs
            S = n * size
        table = [(r.blocks[r.dropped:] + [0] * n)[:n] for r in rows]
        first = table[0][0]
        run = first if n == 1 and all(t[0] == first + i for i, t in enumerate(table)) else None
        tensors = [torch.tensor(x).to(self.device) for x in
                   (ids, [list(range(start, start + T)) for start in starts], table,
                    [[r.dropped * size] for r in rows])]
        states = {i: stack_states([r.states[i] for r in rows]) for i in rows[0].states}
        layers = [states.get(i, layer) for i, layer in enumerate(layers)]
        forward = self.replay if self.graphs is not None and T <= 16 and inputs is None else self.forward
        features = forward(model, layers, S, run, *tensors, **({"inputs": inputs} if inputs else {}))
        for i, whole in states.items():
            unstack_states(whole, [r.states[i] for r in rows])
        return features

    def forward(self, model, layers, S, run, ids, positions, table, base, inputs=None):
        self.pool.step = step = Step(self.pool, layers, positions, table, base, S, run, self.graphs is None)
        return inputs(step, ids) if inputs else model.features(ids, positions, step)

    def replay(self, model, layers, S, run, *tensors):
        """The same as a CUDA graph: a decoding step is hundreds of kernels of microseconds each, and
        launching them one by one from Python takes longer than they do. A graph is recorded once a shape,
        over inputs at fixed addresses, and launched as one."""
        key = (id(model), S, run, *(t.shape for t in tensors))
        if key not in self.graphs:
            static, side = [t.clone() for t in tensors], torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):                  # once unrecorded: libraries set themselves up
                self.forward(model, layers, S, run, *static)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self.forward(model, layers, S, run, *static)
            self.graphs[key] = graph, static, out
        graph, static, out = self.graphs[key]
        for fixed, t in zip(static, tensors):
            fixed.copy_(t)
        graph.replay()
        return out.clone()                                 # the next replay writes there again


# --- 5. the same model in fewer, better shaped operations ---------------------------------------------------

class ThinLinear(nn.Module):
    """model.Linear for few rows on a CPU. A product's left rows are what MKL shares out among its threads:
    in x W^T those are the 1 to 64 tokens of a step, in W x^T the thousands of outputs."""
    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        if 1 < len(flat) <= 64:
            y = torch.mm(self.weight, flat.t()).t().contiguous()
        else:
            y = torch.mm(flat, self.weight.t())
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class ThinNorm(nn.Module):
    """model.RMSNorm in four small operations instead of torch's dozen on a CPU, where for one token each
    costs its call: x gain sqrt(D) / sqrt(|x|^2 + D eps), and hypot(|x|, sqrt(D eps)) is that root."""
    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight
        D = len(norm.weight)
        self.register_buffer("gain", norm.weight.detach() * math.sqrt(D), persistent=False)
        self.register_buffer("least", torch.tensor(math.sqrt(D * norm.eps)), persistent=False)

    def forward(self, x):
        return x * self.gain / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.least)


class DecodeAttention(M.Attention):
    """model.Attention on the pool, in half the operations: q, k and v are turned in one piece (v by nothing),
    k and v stored in one, the rotation and the mask made once a step. On a CPU a token costs as much in
    calls as in arithmetic."""
    def __init__(self, attention):
        nn.Module.__init__(self)
        self.__dict__.update(attention.__dict__)           # the same parameters, not copies
        if self.c.qk_norm:
            N, K = self.c.num_heads, self.c.kv_heads
            gains = [norm.weight.expand(heads, -1) for norm, heads in ((self.q_norm, N), (self.k_norm, K))]
            self.register_buffer("gains", torch.cat(gains).detach(), persistent=False)           # (N+K,H)

    def forward(self, x, positions, cache=None):
        if not isinstance(cache, PagedLayer):
            return super().forward(x, positions, cache)
        c, (B, T), step = self.c, x.shape[:2], cache.pool.step
        N, K, H = c.num_heads, c.kv_heads, c.head_dim
        x = self.wqkv(x).view(B, T, N + 2 * K, H)
        if c.qk_norm:
            qk, v = x.split([N + K, K], 2)
            x = torch.cat((F.rms_norm(qk, (H,), None, c.norm_eps) * self.gains, v), 2)
        if c.position == "rope":
            pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
            x = torch.view_as_real(pairs * step.rotation(c)).flatten(-2).to(x.dtype)
        q, kv = x.split([N, 2 * K], 2)
        q, (k, v) = q.transpose(1, 2), cache.exchange("kv", kv).transpose(1, 2).split(K, 1)      # (B,K,S,H)
        if c.attn_softcap:
            y = self.choose_kernel(q, k, v, positions, step.key_positions, plain=False)
        else:
            y = M.attend(q, k, v, attn_mask=step.mask(c.window, x.dtype), enable_gqa=K < N)
        return self.wo(y.transpose(1, 2).reshape(B, T, N * H))


def tune(model):
    """Swap these in. Weights are shared with what was there; logits change by rounding alone."""
    kinds = {type(block.mixer) for block in model.blocks}
    for block in model.blocks if kinds == {M.Attention} else ():
        block.mixer = DecodeAttention(block.mixer)
    for module in [m for m in model.modules() if example(model).device.type == "cpu"]:
        for name, child in module.named_children():
            if type(child) in (M.Linear, M.RMSNorm):
                setattr(module, name, ThinLinear(child) if type(child) is M.Linear else ThinNorm(child))
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


class NGram:
    """Prompt look-up: what followed the last time the text ended like this? No model: q is 1 at the guess."""
    def __init__(self, k=4, longest=3):
        self.k, self.longest = k, longest

    def attach(self, engine):
        self.vocab_size, self.device = engine.model.config.vocab_size, engine.device

    def observe(self, rows, features, counts):
        pass

    def propose(self, rows, k):
        drafts = [self.look_up(r.ids)[:k] for r in rows]
        if not any(drafts):
            return None
        drafts = [d + [0] * (k - len(d)) for d in drafts]  # a blind guess is as lawful as any other
        return drafts, F.one_hot(torch.tensor(drafts, device=self.device), self.vocab_size).float()

    def look_up(self, ids):
        for n in range(min(self.longest, len(ids) - 1), 0, -1):
            end = ids[-n:]
            for at in range(len(ids) - n - 1, -1, -1):
                if ids[at:at + n] == end:
                    return ids[at + n:]
        return []


class DraftModel:
    """A smaller model of the same vocabulary, whose layers lie in the same pool under the same tables."""
    def __init__(self, model, k=4):
        self.model, self.k = model, k

    def attach(self, engine):
        c, d = engine.model.config, self.model.config
        if d.vocab_size != c.vocab_size or d.context_length < c.context_length:
            raise ValueError(f"the draft model has V={d.vocab_size} and context {d.context_length}, the "
                             f"target {c.vocab_size} and {c.context_length}: vocabularies must agree, and "
                             f"the draft's context be as long")
        self.engine = engine
        self.layers = engine.new_layers([block.mixer.make_cache() for block in self.model.blocks])

    def observe(self, rows, features, counts):
        for r, n in zip(rows, counts):
            if r.fresh:                                    # prompts; what was drafted is in its cache already
                self.engine.run(self.model, self.layers, [r], [r.ids[r.length - n:r.length]], [r.length - n])

    def propose(self, rows, k):
        """The first pass feeds the last two tokens: if all drafts were kept, the last was never fed."""
        feed, starts = [r.ids[-2:] for r in rows], [r.length - 1 for r in rows]
        drafts, q = [[] for _ in rows], []
        for i in range(k):
            h = self.engine.run(self.model, self.layers, rows, feed, starts)[:, -1]
            logits = M.soft_cap(self.model.head(h), self.model.config.logit_softcap)
            q.append(distribution(logits, rows, drafts))
            feed, starts = [[t] for t in draw(q[-1], rows)], [r.length + 1 + i for r in rows]
            drafts = [d + t for d, t in zip(drafts, feed)]
        return drafts, torch.stack(q, 1)


class Medusa(nn.Module):
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

    def attach(self, engine):
        self.engine = engine

    def observe(self, rows, features, counts):
        for r, f, n in zip(rows, features, counts):
            r.feature = f[n - 1]

    def propose(self, rows, k):
        last, drafts, q = torch.stack([r.feature for r in rows]), [[] for _ in rows], []
        for i in range(k):
            q.append(distribution(self.engine.logits(self(last, i)), rows, drafts))
            drafts = [[*d, t] for d, t in zip(drafts, draw(q[-1], rows))]
        return drafts, torch.stack(q, 1)


class Eagle(nn.Module):
    """One block that foretells the target's next feature from this one and the next token (Li et al. 2024);
    the target's own head turns it into a token. Unlike Medusa's, a draft sees the drafts before it."""
    def __init__(self, config, k=3):
        super().__init__()
        self.config, self.k = config, k
        one = replace(config, num_layers=1, layers="", mixer="attention", num_experts=0, init="glorot")
        self.join, self.block = M.Linear(2 * config.d_model, config.d_model), M.Block(one)

    def forward(self, features, embeddings, positions, cache=None):
        return self.block(self.join(torch.cat((features, embeddings), -1)), positions, cache)

    def loss(self, target, features, ids):
        positions = torch.arange(ids.shape[1] - 1, device=ids.device)
        guess = self(features[:, :-1], target.embedding(ids[:, 1:]), positions)    # of feature t + 1
        tokens = M.lm_loss(target.head(guess[:, :-1]), ids[:, 2:])[0]
        return F.smooth_l1_loss(guess, features[:, 1:]) + 0.1 * tokens

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
        between = [(r, at) for r, at in zip(rows, starts) if r.fresh and at and hasattr(r, "feature")]
        if between:                                        # what followed a prompt's last chunk is known now
            self.feed([r for r, _ in between], torch.stack([r.feature for r, _ in between])[:, None],
                      [[r.ids[start]] for r, start in between], [start - 1 for _, start in between])
        if T > 1:
            tokens = [(r.ids[start + 1:start + T] + [0] * T)[:T - 1] for r, start in zip(rows, starts)]
            self.feed(rows, features[:, :-1], tokens, starts)
        for r, f, n in zip(rows, features, counts):
            r.feature = f[n - 1]

    def propose(self, rows, k):
        last, tokens = torch.stack([r.feature for r in rows])[:, None], [r.ids[-1:] for r in rows]
        drafts, q = [[] for _ in rows], []
        for i in range(k):
            last = self.feed(rows, last, tokens, [r.length - 1 + i for r in rows])
            q.append(distribution(self.engine.logits(last[:, -1]), rows, drafts))
            tokens = [[t] for t in draw(q[-1], rows)]
            drafts = [d + t for d, t in zip(drafts, tokens)]
        return drafts, torch.stack(q, 1)


def fit(module, loss_of, tokens, context_length, seconds, lr=1e-3, batch_size=8, seed=0):
    """AdamW on random windows of a token file until the time is up; the rate falls to 0 with it.
    loss_of(ids (B,T)) -> scalar. -> the last losses' mean."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    rng, begin, losses, shown = np.random.default_rng(seed), time.monotonic(), [], 0.0
    if len(tokens) < context_length:
        raise ValueError(f"{len(tokens)} training tokens are fewer than one window of {context_length}")
    while (passed := time.monotonic() - begin) < seconds or not losses:
        at = rng.integers(0, len(tokens) - context_length + 1, batch_size)
        ids = torch.from_numpy(np.stack([tokens[i:i + context_length] for i in at]).astype(np.int64))
        ids = ids.to(next(module.parameters()).device)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (len(losses) + 1) / 20) * max(0.02, 1 - passed / seconds)
        loss = loss_of(ids)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if passed - shown > 10:
            shown = passed
            print(f"  {passed:4.0f} of {seconds:.0f} s | step {len(losses):,} | "
                  f"loss {np.mean(losses[-20:]):.4f}", flush=True)
    return float(np.mean(losses[-20:]))


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

    kind     int8 (a scale a row), int4 (a scale `group` columns; two numbers a byte), fp8
    keep     columns that stay as they are. With int8_inputs this is LLM.int8() (Dettmers et al. 2022): inputs
             are int8, too, but for the few columns whose huge values would cost all others their precision
    smooth   s (in,): the columns of W times s, the inputs divided by it: AWQ (Lin et al. 2024)
    """
    def __init__(self, linear, kind="int8", group=64, keep=(), smooth=None, int8_inputs=False):
        super().__init__()
        w = linear.weight.detach()
        kind = "int8" if kind == "int4" and w.shape[1] % 2 else kind         # two numbers a byte
        self.shape, self.dtype, self.kind, self.int8_inputs = w.shape, w.dtype, kind, int8_inputs
        self.bias = getattr(linear, "bias", None)
        keep = torch.as_tensor(keep, dtype=torch.long, device=w.device)
        self.register_buffer("keep", keep)
        self.register_buffer("kept", w[:, keep].clone())                     # (out,kept)
        self.register_buffer("smooth", smooth)
        w = w.clone().float()
        w[:, keep] = 0
        if smooth is not None:
            w = w * smooth
        if kind == "fp8":
            scale = w.abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
            numbers = (w / scale).to(torch.float8_e4m3fn)
        else:
            group = math.gcd(group, w.shape[1]) if kind == "int4" else 0
            numbers, scale = quantize(w, int(kind[3:]), group)
        if kind == "int4":
            numbers = (numbers[..., ::2] & 15) | (numbers[..., 1::2] << 4)   # low half, high half
        self.register_buffer("numbers", numbers)
        self.register_buffer("scale", scale.to(self.dtype))

    def widened(self, rows=slice(None)):
        """W (out,in) again, or some rows, as near as stored. A GPU kernel does this in registers."""
        n = self.numbers[rows]
        if self.kind == "int4":
            n = torch.stack((n << 4 >> 4, n >> 4), -1).flatten(-2)           # shifts of int8 keep the sign
        w = n.to(self.dtype) * self.scale[rows]
        return w.reshape(*w.shape[:1] if isinstance(rows, slice) else rows.shape, self.shape[1])

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


def watch_inputs(model, ids, rows=512):
    """{name: inputs (rows,in)} of every Linear but the output matrix while the model reads ids (B,T)."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, (M.Linear, ThinLinear)) and module is not model.head:
            hooks.append(module.register_forward_pre_hook(
                lambda _, x, name=name: seen.__setitem__(name, x[0].detach().flatten(0, -2)[:rows])))
    with torch.no_grad():
        model(ids)
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
    if scheme in ("awq", "llm.int8") and calibration is None:
        raise ValueError(f"{scheme} looks at a few texts first: give --data a folder with train.bin")
    inputs = watch_inputs(model, calibration) if scheme in ("awq", "llm.int8") else {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, (M.Linear, ThinLinear)):
            continue
        x, options = inputs.get(name), {"kind": scheme}
        if scheme == "awq":
            options = {"kind": "int4", "smooth": None if x is None else awq_scale(module, x, "int4", group)}
        elif scheme == "llm.int8":
            columns = [] if x is None else (x.abs().amax(0) > outlier).nonzero()[:, 0]
            options = {"kind": "int8", "keep": columns, "int8_inputs": x is not None}
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], QuantLinear(module, group=group, **options))
    tied = model.config.tie_embeddings
    simple = scheme if scheme in ("int8", "int4", "fp8") else "int8"         # a row is only looked up
    model.embedding = QuantEmbedding(model.head if tied else QuantLinear(model.embedding, simple, group))
    return model


def model_bytes(model):
    """Weights as they are stored, a tied matrix once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


@torch.no_grad()
def held_out_loss(model, tokens, windows=8):
    """Nats a token over evenly spaced windows of held-out tokens."""
    T = min(model.config.context_length, len(tokens) - 1)
    at = np.linspace(0, len(tokens) - T - 1, windows).astype(int)
    ids = torch.from_numpy(np.stack([tokens[i:i + T + 1] for i in at]).astype(np.int64))
    ids = ids.to(example(model).device)
    return M.lm_loss(model(ids[:, :-1]), ids[:, 1:])[0].item()


# --- 8. pruning and distillation: a smaller model -----------------------------------------------------------

def importance(model, ids):
    """By calibration on ids (B,T) -> per layer (L,), per group of heads (L,K), per hidden unit (L,F).

    A layer matters as it turns the stream (1 - cosine of what comes in and out); a head or a hidden unit as
    the size of what it adds: |activation| times the norm of the weights it meets in wo or w2."""
    c, layers, heads, units = model.config, [], [], []
    hooks = [h for block in model.blocks for h in (
        block.register_forward_hook(
            lambda _, x, y: layers.append(1 - F.cosine_similarity(x[0], y, -1).mean())),
        block.mixer.wo.register_forward_pre_hook(lambda m, x: heads.append(
            (x[0].flatten(0, 1).abs().mean(0) * m.weight.norm(dim=0)).view(c.kv_heads, -1).sum(1))),
        block.ffn.w2.register_forward_pre_hook(lambda m, x: units.append(
            x[0].flatten(0, 1).abs().mean(0) * m.weight.norm(dim=0))))]
    with torch.no_grad():
        model(ids)
    for h in hooks:
        h.remove()
    return torch.stack(layers), torch.stack(heads), torch.stack(units)


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
    by_layer, by_group, by_unit = importance(model, ids)
    N, K, H = c.num_heads, c.kv_heads, c.head_dim
    small = replace(c, num_layers=layers, num_heads=groups * (N // K), num_kv_heads=groups, d_head=H,
                    d_ff=d_ff)
    out = M.Transformer(small)
    state, target = model.state_dict(), out.state_dict()
    for to, at in enumerate(by_layer.topk(layers).indices.sort().values.tolist()):
        g, units = (best[at].topk(n).indices.sort().values
                    for best, n in ((by_group, groups), (by_unit, d_ff)))
        q_rows = torch.arange(N * H).view(K, -1)[g].flatten()
        kv_rows = [N * H + part * K * H + torch.arange(K * H).view(K, H)[g].flatten() for part in (0, 1)]
        cut = {"mixer.wqkv": (torch.cat((q_rows, *kv_rows)), None), "mixer.wo": (None, q_rows),
               "ffn.w1": (units, None), "ffn.w3": (units, None), "ffn.w2": (None, units)}
        for name in [n for n in state if n.startswith(f"blocks.{at}.")]:
            t, (rows, columns) = state[name], cut.get(name.split(".", 2)[2].rpartition(".")[0], (None, None))
            t = t if rows is None else t[rows]
            t = t if columns is None or t.dim() == 1 else t[:, columns]
            target[f"blocks.{to}." + name.split(".", 2)[2]].copy_(t)
    for name in [n for n in state if not n.startswith("blocks.")]:
        target[name].copy_(state[name])
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
    c = replace(config, vocab_size=config.vocab_size + 1)
    model = M.Transformer(c)
    for block in model.blocks:
        weights, block.mixer = block.mixer.state_dict(), BidirectionalAttention(c)
        block.mixer.load_state_dict(weights)
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


def intensities(S, T, B, D, F_, N):
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
    variants = [("40 key/value heads", base), ("8 (grouped)", replace(base, num_kv_heads=8)),
                ("MLA, latent 512", replace(base, mixer="mla", kv_latent=512, rope_dims=64)),
                ("8, every 2nd shared (CLA)", replace(base, num_kv_heads=8, layers="GC")),
                ("8, 3 of 4 local, 256", replace(base, num_kv_heads=8, layers="LLLG", window=256)),
                ("linear attention", replace(base, mixer="linear"))]
    rows = []
    for name, c in variants:
        for B in (1, 64, 256):
            memory, latency, throughput = decode_cost(c, B, 1024)
            rows.append([name if B == 1 else "", str(B), f"{memory / 1e9:.2f}" + " *" * (memory > 80e9),
                         f"{latency * 1e3:.2f}", f"{throughput:,.0f}"])
    M.table("Llama-2-13B on an H100 by the formulas (* does not fit its 80 GB)",
            ["cache", "batch", "GB", "ms/token", "tokens/s"], rows)


# --- 11. the server: the OpenAI API over continuous batching ------------------------------------------------

MAX_BODY, MAX_WAITING, MAX_CLIENTS = 1 << 20, 128, 512     # bytes, requests, connections: memory is bounded
ASK_SECONDS, READ_SECONDS = 10, 30                         # to send a request in full; to take what we send
KNOBS = {"max_tokens": int, "temperature": float, "top_k": int, "top_p": float, "min_p": float,
         "repetition_penalty": float, "seed": int, "n": int}
OTHERS = ("model", "prompt", "messages", "stop", "stream", "stream_options", "user")


class ApiError(Exception):
    def __init__(self, status, message, param=None):
        super().__init__(message)
        self.status, self.param = status, param


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
    """The JSON of a call -> its Requests, or an ApiError that says what is wrong."""
    config = engine.model.config

    def wrong(param, what):
        return ApiError(400, f"{param}={json.dumps(asked.get(param))[:60]} {what}", param)

    def encode(text, param):
        typed = [s for s in tokenizer.special_tokens if isinstance(text, str) and s in text]
        if not isinstance(text, str) or typed:
            what = f"holds the control token {typed[0]}, which cannot be typed" if typed else "must be text"
            raise ApiError(400, f"{param} {what}", param)
        try:
            return tokenizer.encode(text, ())
        except ValueError as e:                            # half a surrogate pair
            raise ApiError(400, f"{param}: {M.first_line(e)}", param) from None
    if not isinstance(asked, dict):
        raise ApiError(400, "the body must be a JSON object")
    asked.setdefault("max_tokens", asked.pop("max_completion_tokens", None))  # its newer name
    for key, value in asked.items():
        if key not in KNOBS and key not in OTHERS and value not in (None, False, 0, [], {}):
            raise wrong(key, f"is not supported: known are {', '.join([*KNOBS, *OTHERS])}")
    if asked.get("model", name) != name:
        raise ApiError(404, f"model {str(asked['model'])[:60]!r} is not here: ask for {name!r}", "model")
    knobs = {key: asked[key] for key in KNOBS if asked.get(key) is not None}
    for key, value in knobs.items():
        if type(value) is not int and (KNOBS[key] is int or type(value) is not float):
            raise wrong(key, f"must be of type {KNOBS[key].__name__}")
    stop = [asked["stop"]] if isinstance(asked.get("stop"), str) else asked.get("stop") or []
    if not isinstance(stop, list) or len(stop) > 16 or not all(isinstance(s, str) and s for s in stop):
        raise wrong("stop", "must be a string or a list of up to 16")
    for key, kind, what in (("stream", bool, "true or false"), ("stream_options", dict, "an object")):
        if not isinstance(asked.get(key) or kind(), kind):
            raise wrong(key, f"must be {what}")
    if chat:
        if not template:
            raise ApiError(400, "this checkpoint has no chat template: use /v1/completions, or make one with "
                                "python align.py sft")
        messages = asked.get("messages")
        if not isinstance(messages, list) or not messages or not all(
                isinstance(m, dict) and m.get("role") in [*template] for m in messages):
            raise ApiError(400, f"messages must be a list of {{role, content}}, roles {', '.join(template)}",
                           "messages")
        for m in messages:
            encode(m.get("content"), "messages")
        prompts = [render_chat(tokenizer, template, messages)]
    else:
        prompts = asked.get("prompt")
        ids = isinstance(prompts, list) and prompts and all(type(i) is int for i in prompts)
        prompts = [prompts] if ids or not isinstance(prompts, list) or not 0 < len(prompts) <= 64 else prompts
        prompts = prompts if ids else [encode(p, "prompt") for p in prompts]
    knobs.setdefault("seed", random.getrandbits(31))
    out = []
    for i, ids in enumerate(prompts):
        limit = {"max_tokens": min(most, max(1, config.context_length - len(ids))), **knobs}
        out.append(Request(ids, **limit, stop=tuple(stop), stop_ids=engine.stop_ids,
                           tokenizer=tokenizer, index=i * knobs.get("n", 1)))
        try:
            engine.check(out[-1])
        except ValueError as e:
            raise ApiError(400, str(e)) from None
    return out


class Server:
    """One event loop speaks HTTP/1.1, a request a connection; one thread runs the engine, a step at a time.
    Requests and cancellations take effect between two steps, so the engine needs no locks."""
    def __init__(self, engine, tokenizer, name="model", template=None):
        self.engine, self.tokenizer, self.name, self.template = engine, tokenizer, name, template
        engine.stop_ids = engine.stop_ids or stop_tokens(tokenizer, template)
        self.clients, self.draining, self.created = set(), False, int(time.time())

    async def serve(self, host, port, ready=print):
        """Until SIGTERM or Ctrl-C; then what was asked is still answered."""
        self.loop, self.wake, self.stop = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        server = await asyncio.start_server(self.client, host, port, limit=1 << 16)
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # signals: main thread only
            for number in (signal.SIGTERM, signal.SIGINT):
                self.loop.add_signal_handler(number, self.stop.set)
        pump = asyncio.create_task(self.pump())
        ready(server.sockets[0].getsockname()[1])
        await self.stop.wait()
        self.draining = True
        server.close()
        while self.clients:
            await asyncio.wait(set(self.clients))
        self.wake.set()
        await pump

    async def pump(self):
        """Step while there is work, and hand out what changed."""
        while True:
            if not self.engine.busy():
                if self.draining and not self.clients:
                    return
                self.wake.clear()
                await self.wake.wait()
                continue
            try:
                changed = await self.loop.run_in_executor(None, self.engine.step)
            except Exception as e:                         # one bad step must not end the service
                print(f"infer.py: a step failed: {M.first_line(e)}", file=sys.stderr, flush=True)
                changed = [*self.engine.running, *self.engine.waiting]
                for r in changed:
                    r.finish = "error"
                    self.engine.release(r)
            for r in changed:
                r.listener.put_nowait((r.index, r.next_text(), r.finish, len(r.output)))

    async def client(self, reader, writer):
        self.clients.add(task := asyncio.current_task())
        try:
            if len(self.clients) > MAX_CLIENTS:
                raise ApiError(429, "too many connections: try again in a second")
            async with asyncio.timeout(ASK_SECONDS):       # in all, so a trickle of bytes gets no longer
                method, path, body = await self.read(reader)
            await self.route(method, path, body, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass                                           # the client is gone
        except Exception as e:
            if isinstance(e, TimeoutError):
                e = ApiError(408, f"the request took longer than {ASK_SECONDS} s")
            elif not isinstance(e, ApiError):              # ours, then: say so, and serve on
                print(f"infer.py: {type(e).__name__}: {M.first_line(e)}", file=sys.stderr, flush=True)
                e = ApiError(500, "internal error")
            kind = "invalid_request_error" if e.status < 429 else "server_error"
            with contextlib.suppress(ConnectionError, TimeoutError):
                await self.send(writer, {"error": {"message": str(e), "type": kind, "param": e.param,
                                                   "code": e.status}}, e.status)
        finally:
            writer.close()
            self.clients.discard(task)

    async def read(self, reader):
        """-> method, path, body."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        except asyncio.LimitOverrunError:
            raise ApiError(431, "the headers exceed 64 kB") from None
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:])}
        words, length = head[0].split(" "), headers.get("content-length", "0")
        if len(words) != 3 or not re.fullmatch("[0-9]{1,15}", length) or "transfer-encoding" in headers:
            raise ApiError(400, "not an HTTP/1.1 request with a Content-Length")
        if (left := int(length)) > MAX_BODY:               # read and forgotten, so that the answer is heard
            while left > 0 and (piece := await reader.read(1 << 16)):
                left -= len(piece)
            raise ApiError(413, f"the body has {length} bytes: at most {MAX_BODY}")
        return words[0], words[1].split("?")[0], await reader.readexactly(left)

    async def send(self, writer, body, status=200):
        kind = "text/html; charset=utf-8" if isinstance(body, str) else "application/json"
        body = body if isinstance(body, str) else json.dumps(body)
        lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", f"Content-Type: {kind}",
                 f"Content-Length: {len(body.encode())}", "Connection: close"]
        lines += ["Retry-After: 1"] if status in (429, 503) else []
        await self.write(writer, "\r\n".join([*lines, "", body]))

    async def write(self, writer, text):
        writer.write(text.encode())
        async with asyncio.timeout(READ_SECONDS):          # who does not read fills no memory of ours
            await writer.drain()

    async def route(self, method, path, body, reader, writer):
        e = self.engine
        card = {"id": self.name, "object": "model", "created": self.created, "owned_by": "local"}
        gets = {"/": PAGE.replace("CHAT", json.dumps(bool(self.template))),
                "/v1/models": {"object": "list", "data": [card]}, f"/v1/models/{self.name}": card,
                "/health": {"status": "draining" if self.draining else "ok", "running": len(e.running),
                            "waiting": len(e.waiting), "blocks": e.pool.num_blocks,
                            "blocks_in_use": e.pool.num_blocks - len(e.pool.free), **e.counters}}
        posts = ("/v1/completions", "/v1/chat/completions")
        if path not in gets and path not in posts:
            raise ApiError(404, f"no {path[:100]} here: there are {', '.join([*gets, *posts])}")
        if method != ("GET" if path in gets else "POST"):
            raise ApiError(405, f"{path} takes {'GET' if path in gets else 'POST'}")
        if path in gets:
            return await self.send(writer, gets[path])
        try:
            asked = json.loads(body.decode("utf-8"))
        except (ValueError, RecursionError) as error:      # malformed, or bytes that are not UTF-8
            raise ApiError(400, f"the body is not JSON in UTF-8: {M.first_line(error)}") from None
        chat = path == posts[1]
        requests = read_call(asked, chat, self.tokenizer, self.template, e, self.name)
        if self.draining or len(e.waiting) + len(requests) > MAX_WAITING:
            raise ApiError(503 if self.draining else 429, "busy: try again in a second")
        await self.answer(asked, chat, requests, reader, writer)

    async def answer(self, asked, chat, requests, reader, writer):
        """Feed the engine; pass on what it says, at once or in the end; if the client hangs up, cancel."""
        listener, gone = asyncio.Queue(), asyncio.create_task(reader.read(1))
        stream, total = asked.get("stream"), sum(r.n for r in requests)
        texts, ends, counts = [""] * total, [None] * total, [0] * total
        head = {"id": f"cmpl-{random.getrandbits(64):016x}", "created": int(time.time()), "model": self.name,
                "object": ("chat.completion" + ".chunk" * bool(stream)) if chat else "text_completion"}

        def choice(i, text, end):
            said = {"delta" if stream else "message": {"role": "assistant", "content": text}}
            return {"index": i, **(said if chat else {"text": text}), "finish_reason": end or None,
                    "logprobs": None}
        try:
            for r in requests:
                r.listener = listener
                self.engine.add(r)
            self.wake.set()
            if stream:
                await self.write(writer, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                                         "Connection: close\r\n\r\n")
            while not all(ends):
                get = asyncio.create_task(listener.get())
                await asyncio.wait({get, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not get.done():
                    return get.cancel()
                i, text, ends[i], counts[i] = get.result()
                texts[i] += text
                if ends[i] == "error":
                    raise ApiError(500, "internal error")
                if stream and (text or ends[i]):
                    chunk = {**head, "choices": [choice(i, text, ends[i])]}
                    await self.write(writer, f"data: {json.dumps(chunk)}\n\n")
            prompt, new = sum(r.prompt_tokens for r in requests), sum(counts)
            usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
            if not stream:
                choices = [choice(i, text, end) for i, (text, end) in enumerate(zip(texts, ends))]
                return await self.send(writer, {**head, "choices": choices, "usage": usage})
            if (asked.get("stream_options") or {}).get("include_usage"):
                await self.write(writer, f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n")
            await self.write(writer, "data: [DONE]\n\n")
        finally:
            gone.cancel()
            for r in (*tuple(self.engine.running), *tuple(self.engine.waiting)):
                if r.listener is listener and not r.finish:
                    r.finish = "cancelled"                 # the engine lets go of it before its next step
            self.wake.set()


PAGE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>infer.py</title>
<style>
body { font: 16px/1.5 system-ui; max-width: 44rem; margin: 2rem auto; padding: 0 1rem }
#log div { white-space: pre-wrap; overflow-wrap: anywhere; margin: .6rem 0; padding: .5rem; background: #eee }
#log .user { background: #e3ebf7 } #log .error { background: #fbe3e0 }
form { display: flex; gap: .5rem } textarea { flex: 1 } textarea, button { font: inherit }
</style>
<h1>infer.py</h1><div id="log" aria-live="polite"></div>
<form><textarea rows="2" autofocus placeholder="Enter sends" aria-label="message"></textarea>
<button>Send</button></form>
<script>
const [form, box, button, log] = ["form", "textarea", "button", "#log"].map(s => document.querySelector(s))
const messages = []
let stop = null                                 // ends the answer that is coming in
function say(role, text) {
  const div = log.appendChild(document.createElement("div"))
  div.className = role; div.textContent = text; return div
}
async function ask(path, body, show) {          // server-sent events: "data: {...}" and an empty line
  body = JSON.stringify({ ...body, stream: true })
  const reply = await fetch(path, { method: "POST", signal: stop.signal, body })
  if (!reply.ok) throw Error((await reply.json()).error.message)
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader()
  for (let rest = "", piece; !(piece = await reader.read()).done;) {
    const lines = (rest + piece.value).split("\\n\\n"); rest = lines.pop()
    for (const line of lines) if (line != "data: [DONE]") {
      const c = JSON.parse(line.slice(6)).choices[0]; show(c.text ?? c.delta.content)
    }
  }
}
form.onsubmit = async event => {
  event.preventDefault()
  if (stop) return stop.abort()
  const prompt = box.value; if (!prompt) return
  box.value = ""; button.textContent = "Stop"; stop = new AbortController()
  say("user", prompt); messages.push({ role: "user", content: prompt })
  const out = say("assistant", ""), show = text => { out.textContent += text; out.scrollIntoView() }
  try {
    if (CHAT) await ask("/v1/chat/completions", { messages }, show)
    else await ask("/v1/completions", { prompt }, show)
  } catch (e) { if (e.name != "AbortError") { out.className = "error"; out.textContent = e.message } }
  messages.push({ role: "assistant", content: out.textContent }); stop = null; button.textContent = "Send"
}
box.onkeydown = e => { if (e.key == "Enter" && !e.shiftKey) { e.preventDefault(); form.requestSubmit() } }
</script>
"""


# --- 12. the commands ---------------------------------------------------------------------------------------

def keep_freed_memory():
    """On Linux, tell malloc not to give large freed blocks back: each step asks for the same ones again."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**31 - 1)                        # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)                        # M_TRIM_THRESHOLD


def open_model(a, path=None):
    """-> (model, tokenizer, the checkpoint's dict). The tokenizer lies beside the checkpoint."""
    path = path or a.checkpoint
    state = M.load_checkpoint(path, device := M.pick_device(a.device))
    model = M.load_model(state, device)
    if device.startswith("cuda"):
        model = model.bfloat16()
    tokenizer = bpe.load_tokenizer(os.path.join(os.path.dirname(path), "tokenizer.json"))
    if state.get("tokenizer", tokenizer.hash()) != tokenizer.hash():
        raise ValueError(f"{path} was trained with tokenizer {state['tokenizer']}, and the tokenizer.json "
                         f"beside it is {tokenizer.hash()}: put the right one there")
    return model, tokenizer, state


def open_tokens(a, name, tokenizer):
    return bpe.load_tokens(os.path.join(a.data, f"{name}.bin"), tokenizer)


def calibration(a, tokenizer, context_length, rows=8):
    """ids (rows,T): the beginning of the training text."""
    tokens = open_tokens(a, "train", tokenizer)[:rows * context_length]
    return torch.from_numpy(np.array(tokens, np.int64)).view(-1, min(context_length, len(tokens)))


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
    drafter = kind(model.config, min(a.k, state["k"]) if kind is Medusa else a.k)
    drafter.load_state_dict(state["model"], strict=kind is Eagle)            # --k may use fewer Medusa heads
    return drafter.to(example(model)).eval()


def open_engine(a):
    model, tokenizer, state = open_model(a)
    if a.quantize != "none":
        needs = a.quantize in ("awq", "llm.int8")
        ids = calibration(a, tokenizer, model.config.context_length) if needs else None
        quantize_model(model, a.quantize, ids)
    engine = Engine(tune(model), a.max_batch, a.block_size, a.num_blocks, a.chunk, a.int8_cache,
                    drafter=open_drafter(a, model))
    engine.stop_ids = stop_tokens(tokenizer, state.get("chat"), state.get("stop_ids"))
    return engine, tokenizer, state.get("chat")


def request(a, engine, tokenizer, ids):
    room = max(1, engine.model.config.context_length - len(ids))
    return Request(ids, min(a.max_tokens, room), a.temperature, a.top_k, a.top_p, a.min_p,
                   a.repetition_penalty, a.seed, tuple(a.stop), engine.stop_ids,
                   tokenizer=tokenizer)


def stream(engine, r):
    """Print a request's text as it comes. Ctrl-C ends the text, not the program."""
    before = signal.signal(signal.SIGINT, lambda *_: setattr(r, "finish", "cancelled"))
    try:
        engine.add(r)
        while engine.busy():
            engine.step()
            print(r.next_text(), end="", flush=True)
    finally:
        signal.signal(signal.SIGINT, before)
    print(flush=True)


def run_complete(a):
    if a.prompt is None:
        return demo(a)
    engine, tokenizer, template = open_engine(a)
    ids = tokenizer.encode(a.prompt) or [tokenizer.eot_id or 0]              # nothing said: a new document
    r, begin = request(a, engine, tokenizer, ids), time.perf_counter()
    print(a.prompt, end="")
    stream(engine, r)
    seconds = time.perf_counter() - begin
    print(f"[{len(r.output)} tokens in {seconds:.2f} s, {len(r.output) / seconds:.0f} tokens/s; {r.finish}]",
          file=sys.stderr)
    if r.finish == "cancelled":
        raise KeyboardInterrupt


def run_chat(a):
    engine, tokenizer, template = open_engine(a)
    if not template:
        raise ValueError(f"{a.checkpoint} is a base model and has no chat template: make a chat model with "
                         f"python align.py sft, or continue a text with --prompt")
    messages, context = [], engine.model.config.context_length
    print("Your turn; Ctrl-C stops an answer, Ctrl-D ends the conversation.")
    while True:
        try:
            messages.append({"role": "user", "content": input("> ")})
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends the conversation)")
            continue
        except EOFError:
            return print()
        ids = render_chat(tokenizer, template, messages)
        while len(ids) >= context - 16 and len(messages) > 1:                # the oldest turns are forgotten
            messages = messages[2:]
            ids = render_chat(tokenizer, template, messages)
        r = request(a, engine, tokenizer, ids)
        try:
            stream(engine, r)
            messages.append({"role": "assistant", "content": r.text})
        except ValueError as e:                            # too long: ask again
            print(e)
            messages.pop()


def run_serve(a):
    engine, tokenizer, template = open_engine(a)
    server = Server(engine, tokenizer, a.name, template)
    asyncio.run(server.serve(a.host, a.port, lambda port: print(
        f"{a.name} at http://{a.host}:{port}/v1   chat page http://{a.host}:{port}/   "
        f"(Ctrl-C or SIGTERM: finish what was asked, then stop)", flush=True)))
    print(f"served {engine.counters['requests']} requests, {engine.counters['tokens']} tokens")


def run_batch(a):
    """Lines as the API takes them, {"prompt": ..., "max_tokens": ...} -> lines of results in the same order.
    Only whole lines count, so an interrupted run goes on where it was."""
    engine, tokenizer, template = open_engine(a)
    os.makedirs(a.out, exist_ok=True)
    path = os.path.join(a.out, os.path.basename(a.file).removesuffix(".jsonl") + ".results.jsonl")
    with open(a.file, encoding="utf-8") as f:
        lines = [line for line in f if line.strip()]
    data = open(path, "rb").read() if os.path.exists(path) else b""
    data = data[:data.rfind(b"\n") + 1]
    done, total, begin, shown = data.count(b"\n"), len(lines), time.monotonic(), 0.0
    first = done
    results, waiting = {}, collections.deque(range(done, total))
    with open(path, "wb") as out:
        out.write(data)
        while done < total:
            while waiting and len(engine.waiting) < engine.max_batch:
                i = waiting.popleft()
                try:
                    asked = json.loads(lines[i])
                    chat = isinstance(asked, dict) and "messages" in asked
                    r = read_call({"seed": a.seed, **asked, "n": None}, chat, tokenizer, template, engine,
                                  most=a.max_tokens)[0]
                    r.listener = i
                    engine.add(r)
                except (ValueError, TypeError, ApiError) as e:
                    results[i] = {"error": M.first_line(e)}
            for r in engine.step() if engine.busy() else ():
                if r.finish:
                    results[r.listener] = {"text": r.text, "finish_reason": r.finish, "tokens": len(r.output)}
            while done in results:
                out.write(json.dumps({"index": done, **results.pop(done)}).encode() + b"\n")
                done += 1
            out.flush()
            seconds = time.monotonic() - begin
            if seconds - shown > 2 or done == total:
                shown, tokens = seconds, engine.counters["tokens"]
                eta = seconds / max(1, done - first) * (total - done)
                print(f"{done}/{total} | {tokens / seconds:,.0f} tokens/s | {eta:.0f} s to go",
                      file=sys.stderr)
    print(f"{path}: {total} results, {first} of them from before")


def bits_per_byte(model, a, tokenizer, windows=16):
    info = bpe.token_info(os.path.join(a.data, "val.bin"))
    nats = held_out_loss(model, open_tokens(a, "val", tokenizer), windows)
    return nats / math.log(2) * info["tokens"] / info["bytes"]


def tokens_per_second(model, max_tokens=32):
    """Greedy decoding of one text by the engine, the best of three."""
    engine, best, n = Engine(model, 1, 0), 0.0, min(max_tokens, model.config.context_length - 8)
    for _ in range(3):
        r = engine.add(Request(list(range(8)), n, temperature=0))
        engine.step()                                      # the prompt
        begin = time.perf_counter()
        while engine.busy():
            engine.step()
        best = max(best, (len(r.output) - 2) / (time.perf_counter() - begin))
    return best


PRICE = ["", "parameters", "MB", "bits/byte", "tokens/s"]


def price_row(name, model, a, tokenizer):
    return [name, f"{M.num_params(model.config):,}", f"{model_bytes(model) / 1e6:.1f}",
            f"{bits_per_byte(model, a, tokenizer):.4f}", f"{tokens_per_second(model):.0f}"]


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
    teacher, tokenizer, _ = open_model(a)
    c, rows = teacher.config, [price_row("before", teacher, a, tokenizer)]
    if a.command == "prune":
        student = prune(teacher, calibration(a, tokenizer, c.context_length),
                        a.num_layers or max(1, c.num_layers - 1), a.num_kv_heads or c.kv_heads,
                        a.d_ff or c.ffn_dim * 3 // 4)
        rows.append(price_row("pruned", student, a, tokenizer))
    else:
        student = M.Transformer(replace(c, num_layers=a.num_layers or max(1, c.num_layers // 4),
                                        num_kv_heads=a.num_kv_heads or c.num_kv_heads, d_ff=a.d_ff or c.d_ff))
    fit(student.train(), lambda ids: distillation_loss(teacher, student, ids),
        open_tokens(a, "train", tokenizer), c.context_length, 60 * a.minutes, seed=a.seed)
    rows.append(price_row(f"distilled, {a.minutes:g} min", student.eval(), a, tokenizer))
    M.table("A smaller model (held-out text; one text at a time)", PRICE, rows)
    os.makedirs(a.out, exist_ok=True)
    tokenizer.save(os.path.join(a.out, "tokenizer.json"))
    M.save_checkpoint(path := os.path.join(a.out, "checkpoint.pt"), student, tokenizer=tokenizer.hash())
    print(f"\nsaved {path}")


def run_drafter(a):
    """Train Medusa heads or an EAGLE block on the frozen target's features."""
    model, tokenizer, _ = open_model(a)
    torch.manual_seed(a.seed)
    drafter = train_drafter({"medusa": Medusa, "eagle": Eagle}[a.command], model,
                            open_tokens(a, "train", tokenizer), a.k, 60 * a.minutes, a.seed)
    os.makedirs(a.out, exist_ok=True)
    path = os.path.join(a.out, f"{a.command}.pt")
    M.save_checkpoint(path, drafter, drafter=a.command, k=a.k)
    print(f"saved {path}: python infer.py --checkpoint {a.checkpoint} --draft {path} --prompt TEXT")


def train_drafter(kind, model, tokens, k, seconds, seed=0):
    drafter = kind(model.config, k).to(example(model))

    def loss(ids):
        with torch.no_grad():
            features = model.features(ids)
        return drafter.loss(model, features, ids)
    fit(drafter, loss, tokens, min(model.config.context_length, 256), seconds, 3e-3, seed=seed)
    return drafter.eval()


def run_diffuse(a):
    """A diffusion model and an autoregressive one: same shape, same text, same minutes."""
    tokenizer = bpe.load_tokenizer(os.path.join(a.data, "tokenizer.json"))
    tokens, val = open_tokens(a, "train", tokenizer), open_tokens(a, "val", tokenizer)
    torch.manual_seed(a.seed)
    c = M.model_config(a, vocab_size=tokenizer.vocab_size)
    T, plain, masked = c.context_length, M.Transformer(c), diffusion_model(c)
    for m, loss in ((plain, lambda ids: M.lm_loss(plain(ids[:, :-1]), ids[:, 1:])[0]),
                    (masked, lambda ids: diffusion_loss(masked, ids))):
        fit(m, loss, tokens, T, 60 * a.minutes, 3e-3, seed=a.seed)
        m.eval()
    at = np.linspace(0, len(val) - T, 32).astype(int)
    ids = torch.from_numpy(np.stack([val[i:i + T] for i in at]).astype(np.int64))
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
            [["prefill" if T > 1 else "decoding", str(B), str(T), str(S), *(f"{f:.2f}" for f in intensities(
                S, T, B, 5120, 13824, 40))] for B, T, S in cases])
    calculator()


# --- 13. demo: the ladder -----------------------------------------------------------------------------------

def demo_model(a):
    """The checkpoint; where there is none, a byte model trained for seconds, just enough to say something."""
    if os.path.exists(a.checkpoint) or a.checkpoint != DEFAULT:
        model, tokenizer, _ = open_model(a)
        folder = os.path.dirname(a.checkpoint)
        tokens = open_tokens(argparse.Namespace(data=folder), "train", tokenizer)
        print(f"{a.checkpoint}: {M.num_params(model.config):,} parameters")
        return model, tokens
    print(f"no {a.checkpoint} (python train.py makes one): training a byte model for {a.seconds:.0f} s")
    files = bpe.corpus_files()
    text = b"".join(open(f, "rb").read() for f in files[::max(1, len(files) // 100)])
    c = M.ModelConfig(vocab_size=257, d_model=256, num_layers=6, num_heads=4, qk_norm=True)
    torch.manual_seed(a.seed)
    model, tokens = M.Transformer(c), np.frombuffer(text, np.uint8)
    fit(model, lambda ids: M.lm_loss(model(ids[:, :-1]), ids[:, 1:])[0], tokens, 128, a.seconds, 3e-3, 4)
    return model.eval(), tokens


def machine():
    """(FLOP/s, bytes/s) of this CPU in fp32, measured: a square product, and a matrix times a vector."""
    m, v = torch.randn(1024, 1024), torch.randn(8192, 4096)
    def best(f, repeats=5):
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            f()
            times.append(time.perf_counter() - begin)
        return min(times)
    return 2 * 1024**3 / best(lambda: m @ m), v.nbytes / best(lambda: v @ v[0])


def race(run, prompts, limits):
    """All prompts, greedily, by an engine or a function -> (texts, first token after s, all after s, most
    cache bytes in use, tokens a pass and row)."""
    first, most, begin = 0.0, 0, time.perf_counter()
    if not isinstance(run, Engine):
        return run(prompts, limits), first, time.perf_counter() - begin, most, 1
    pool, requests = run.pool, [run.add(Request(list(p), n, temperature=0)) for p, n in zip(prompts, limits)]
    while run.busy():
        run.step()
        most = max(most, pool.num_blocks - len(pool.free))
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
    eagle = train_drafter(Eagle, plain, tokens, 3, a.seconds, a.seed)
    flops, bandwidth = machine()
    T, weights, params = min(c.context_length // 3, 96), 4 * M.num_params(c), M.num_params(c)
    rng = random.Random(a.seed)
    def text(n):
        at = rng.randrange(len(tokens) - n)
        return [int(i) for i in tokens[at:at + n]]
    one, n = [text(T)], min(64, c.context_length // 2)
    shared = text(T)
    mixed = [(shared if i % 2 else []) + text(rng.randrange(4, T // 2)) for i in range(24)]
    limits = [rng.randrange(4, n) for _ in mixed]
    def floor(B, S, rows=1):                               # seconds: the slower of reading and computing
        return max((weights + B * M.state_bytes(c, S, 4)) / bandwidth, 2 * params * B * rows / flops)
    slots = dict(block_size=0, share=False)                # contiguous: a row of the longest length for each
    small = tune(quantize_model(copy.deepcopy(plain), "int8"))
    ladder = [  # name, what runs, prompts, rows
        ("one text: no cache", lambda p, n: [M.generate(plain, p[0], n[0], temperature=0)], one, 1),
        ("  KV cache", lambda p, n: [generate_naive(plain, p[0], n[0])], one, 1),
        ("  this engine", Engine(model, 1, **slots), one, 1),
        ("  n-gram drafts", Engine(model, 1, drafter=NGram(4), **slots), one, 1),
        ("  EAGLE drafts", Engine(model, 1, drafter=eagle, **slots), one, 1),
        ("24 texts: one at a time", Engine(model, 1, **slots), mixed, 1),
        ("  8 at a time, padded", lambda p, n: generate_static(plain, p, n, 8), mixed, 8),
        ("  continuous, 8 rows", Engine(model, 8, **slots), mixed, 8),
        ("  paged, prefixes shared", Engine(model, 8), mixed, 8),
        ("  int8 cache (lossy)", Engine(model, 8, int8_cache=True), mixed, 8),
        ("  int8 weights (lossy)", Engine(small, 8), mixed, 8)]
    rows, want = [], {}
    for name, run, prompts, B in ladder:
        lengths = [n] if prompts is one else limits
        texts, first, seconds, most, per_pass = race(run, prompts, lengths)
        count, fed = sum(map(len, texts)), sum(map(len, prompts))
        same = sum(x == y for a, b in zip(texts, want.setdefault(len(prompts), texts)) for x, y in zip(a, b))
        S = T if prompts is one else fed // len(prompts) + n // 2
        least = count * floor(1, S, rows=S) if "no cache" in name else (
            2 * params * fed / flops + count / B / per_pass * floor(B, S))
        rows.append([name, f"{count / least:,.0f}", f"{count / seconds:,.0f}", f"{seconds / count * 1e3:.2f}",
                     f"{first * 1e3:.0f}" if first else "-", f"{most / 1e6:.1f}" if most else "-",
                     f"{per_pass:.2f}", f"{same / count:.0%}"])
    M.table(f"The ladder: greedy, {n} tokens after {T}; then 24 mixed requests. At most: weights and cache "
            f"read at {bandwidth / 1e9:.0f} GB/s, products at {flops / 1e9:.0f} GFLOP/s, measured here",
            ["", "tokens/s at most", "measured", "ms/token", "first, ms", "cache MB", "tokens/pass",
             "same text"], rows)
    calculator()
    plot_batches(os.path.join(a.out, "infer.png"), model, floor, T, n)


def plot_batches(path, model, floor, T, n):
    """Latency against throughput as the batch grows."""
    plt, sizes, points = M.pyplot(), (1, 2, 4, 8, 16, 32), []
    if plt is None:
        return
    for B in sizes:
        engine = Engine(model, B, 0, chunk=T * B, share=False)
        for _ in range(B):
            engine.add(Request(list(range(8, 8 + T)), 12, temperature=0))
        engine.step()                                      # all prompts
        begin = time.perf_counter()
        while engine.busy():
            engine.step()
        points.append((time.perf_counter() - begin) / 10)
    fig, ax = plt.subplots(figsize=(7, 4.5))
    for label, seconds, style in (("measured", points, "o-"),
                                  ("at best, by the formulas", [floor(B, T) for B in sizes], "--")):
        ax.plot([B / s for B, s in zip(sizes, seconds)], [s * 1e3 for s in seconds], style, label=label)
    for B, s in zip(sizes, points):
        ax.annotate(f"batch {B}", (B / s, s * 1e3), textcoords="offset points", xytext=(4, -10), fontsize=8)
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
    "num_blocks": dict(type=int, default=0, help="cache blocks; 0: enough for max_batch full contexts"),
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
    for name, low in dict(k=1, max_batch=1, block_size=0, num_blocks=0, chunk=1, threads=0, minutes=0,
                          seconds=0, max_tokens=1, port=0, num_layers=0, num_kv_heads=0, d_ff=0).items():
        if not low <= getattr(a, name, low) < math.inf:
            p.error(f"--{name} {getattr(a, name)} is out of range: {low} or more")
    if getattr(a, "max_tokens", None) and hasattr(a, "top_k"):
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
    except BrokenPipeError:                                # the reader of our output, such as head, is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (ValueError, OSError) as e:
        a.error(M.first_line(e))
    except KeyboardInterrupt:
        print("\ninfer.py: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
