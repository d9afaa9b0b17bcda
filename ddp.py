r"""ddp.py - lectures 7-8: many devices, each holding the whole model. The tokens are split.

What   P processes (ranks) hold the same weights and read different tokens. After the backward pass they
       average their gradients and take the same step: together one process with P times the batch. A
       sequence too long for one device is split as well, and then attention alone has to talk.
Why    In a ring each rank sends 2 (P-1)/P n bytes to average n bytes of gradients, however many ranks there
       are. And the last layer's gradients are ready when most of the backward pass is still to come: sent
       at once, in buckets, they travel behind it. What cannot hide bounds the number of useful devices.

Equations
       all-reduce     = reduce-scatter, then all-gather: each P-1 messages of n/P bytes a rank
       data parallel  mean over ranks of the mean over their tokens = mean over all tokens (equal shares)
       ring attention softmax over two sets of keys:  Z = Z1 + Z2,  out = (Z1 out1 + Z2 out2) / Z
       useful ranks   n weights; sending hides behind backward while
                      2 (P-1)/P n gradient_bytes / bandwidth <= 4 n tokens / P / flops       (bytes/s, FLOP/s)
                      <=>  P <= 1 + 2 tokens bandwidth / (gradient_bytes flops)

Run    python ddp.py                                        # the lecture, on two local ranks
       python ddp.py --steps 200                            # train on two local ranks
       torchrun --nproc_per_node=8 ddp.py --steps 5000 --preset gpt2 --batch_size 480 --micro_batch 12 \
                --lr 6e-4 --data DIR
       torchrun --nproc_per_node=8 ddp.py --steps 100 --sequence_ranks 4 --context_length 8192
       python ddp.py --bench_collectives 1,10,100           # all-reduce and its family, at these megabytes

You should see (two ranks on two cores, 19 s; shortened)
       Averaging 93 gradients on 2 ranks, 5 steps; ms predicted: computing, 61.7, and messages not hidden
                     messages  bytes predicted    counted  ms alone  hidden  ms predicted  measured  error
         naive             93        2,402,560  2,402,560     121.0      0%         182.8     194.3  1e-06
         flat               1        2,402,560  2,402,560       6.3      0%          68.1      68.4  1e-06
         overlapped        93        2,402,560  2,402,560      83.3     66%          90.1     162.3  1e-06
         bucketed          11        2,402,560  2,402,560      18.3     84%          64.7      75.2  1e-06
       Ranks until averaging shows: 4,000,000 tokens a step, gradients in fp32, 396 TFLOP/s
         wires           bytes/s  ranks
         NVLink          4.5e+11  2,276
         PCIe 5 x16      6.0e+10    304
         InfiniBand NDR  5.0e+10    254
         10 Gb Ethernet  1.2e+09      7

On CPUs messages also take time from computing, so hiding them saves only the waiting.

Outline  1 eight collectives, counted    2 rings by hand      3 data parallelism, four ways
         4 sequence parallelism          5 what it must cost  6 ranks: started, watched, ended
         7 training                      8 the lecture        9 command line

The principle of both lectures: move as few bytes as you can, over as short a way. An H100 reads its own
memory at 3.4e12 bytes/s; each step outwards (WIRES) costs a factor of ten or less, until Ethernet: forty.

References  Patarasuk & Yuan 2009 (ring all-reduce), Li et al. 2020 (PyTorch DDP: buckets, overlap), Liu et
            al. 2023 (ring attention), Brandon et al. 2023 (striped) and Llama Team 2024 (zig-zag),
            Jacobs et al. 2023 (DeepSpeed Ulysses).
"""
import contextlib
import datetime
import functools
import hashlib
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import asdict
from multiprocessing.connection import wait
from pathlib import Path

import bpe
import model as M                                          # before torch: it sets how CPU threads wait

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.profiler import profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Letters: P ranks, of which C share a sequence; B sequences, T tokens, N query heads, K key/value heads, H
# head dim, G = N/K; n a size: weights, bytes, a rank's tokens. A collective's bytes are those of the whole
# tensor: what an all-gather ends with. Messages go by nccl on GPUs, by gloo on CPUs; the code is the same.

# Bytes/s one way.
WIRES = {"NVLink": 4.5e11, "PCIe 5 x16": 6e10, "InfiniBand NDR": 5e10, "10 Gb Ethernet": 1.2e9}

# torch 2.13 gave these two a new name and warns about the old one.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# --- 1. eight collectives, counted --------------------------------------------------------------------------
# A collective is called by all ranks of a group in the same order; a rank that does not come is waited for.
# Four have a root, in scatter and gather a bottleneck; in the other four all ranks do the same: they scale.

def eight_collectives(x):
    """x (P,): this rank's numbers -> {name: what this rank holds afterwards}."""
    P, root, after = len(x), dist.get_rank() == 0, {}
    after["broadcast"] = x.clone()                                           # all have the root's
    dist.broadcast(after["broadcast"], src=0)
    after["scatter"] = x.new_empty(1)                                        # rank r has the root's part r
    dist.scatter(after["scatter"], list(x.split(1)) if root else None, src=0)
    after["gather"] = x.new_empty(P * P if root else 0)                      # the root has everyone's
    dist.gather(x, list(after["gather"].split(P)) if root else None, dst=0)
    total = x.clone()                                                        # the root has the sum
    dist.reduce(total, dst=0)
    after["reduce"] = total if root else total[:0]                           # elsewhere it is undefined
    after["all-gather"] = x.new_empty(P * P)                                 # all have everyone's
    all_gather(after["all-gather"], x)
    after["reduce-scatter"] = x.new_empty(1)                                 # rank r has part r of the sum
    reduce_scatter(after["reduce-scatter"], x.clone())
    after["all-reduce"] = x.clone()                                          # all have the sum
    dist.all_reduce(after["all-reduce"])
    after["all-to-all"] = x.new_empty(P)                                     # rank r has part r of each rank
    dist.all_to_all_single(after["all-to-all"], x)
    return after


class Count(TorchDispatchMode):
    """with Count() as c: ...   counts the collectives that this process issues, in backward and hooks, too:
    c.calls and c.payload (bytes) by kind; c.sent(P) is what this rank sends for them."""
    # As a ring, a collective makes each rank send this many times (P-1)/P of the whole tensor.
    PASSES = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1, "alltoall_base_": 1}

    def __init__(self):
        super().__init__()
        self.calls, self.payload = Counter(), Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d":
            kind = op._schema.name.removeprefix("c10d::")
            sizes = [sum(t.nbytes for t in tree_leaves(arg) if torch.is_tensor(t)) for arg in args]
            self.calls[kind] += 1
            self.payload[kind] += max(sizes)               # of input and output the larger is the whole
        return op(*args, **(kwargs or {}))

    def sent(self, P):
        """Bytes that this rank sends, all kinds together."""
        ring = sum(passes * self.payload[kind] for kind, passes in self.PASSES.items())
        return ring * (P - 1) / P + self.payload["send"]


# --- 2. rings by hand ---------------------------------------------------------------------------------------
# P ranks in a circle. Each sends to the next and receives from the one before, all at the same time: every
# link is busy in every step.

def start_shift(t, group=None):
    """Send t to the next rank while the previous one's arrives -> a function that waits for that, and returns
    it."""
    group, arriving = group or dist.group.WORLD, torch.empty_like(t)
    r, P = dist.get_rank(group), dist.get_world_size(group)
    following, previous = (dist.get_global_rank(group, (r + step) % P) for step in (1, -1))
    works = dist.batch_isend_irecv([dist.P2POp(dist.isend, t, following, group),
                                    dist.P2POp(dist.irecv, arriving, previous, group)])

    def arrived():
        for work in works:
            work.wait()
        return arriving
    return arrived


def shift(t, group=None):
    return start_shift(t, group)()


def ring_all_reduce_naive(x):
    """Pass whole tensors around and add what comes: P-1 messages of n bytes, P/2 times too much."""
    total = travelling = x
    for _ in range(dist.get_world_size() - 1):
        travelling = shift(travelling)
        total = total + travelling
    return total


def ring_reduce_scatter(x):
    """x (n,) -> part r of the sum over ranks, (n/P,), on rank r. P-1 messages of n/P.

    A partial sum of each part travels around and collects a share at each rank. Part r's starts at
    rank r+1, so that it ends at rank r."""
    r, P = dist.get_rank(), dist.get_world_size()
    parts = x.view(P, -1)
    travelling = parts[r - 1]
    for step in range(2, P + 1):
        travelling = shift(travelling) + parts[r - step]                     # a negative index goes around
    return travelling


def ring_all_gather(part):
    """part (m,) -> (P m,), everyone's. P-1 messages of m: pass on what came last."""
    r, P = dist.get_rank(), dist.get_world_size()
    parts = part.new_empty(P, len(part))
    parts[r] = part
    for step in range(1, P):
        part = parts[r - step] = shift(part)
    return parts.flatten()


def ring_all_reduce(x):
    """2 (P-1) messages of n/P. Each part is summed once and then copied: the same bits on all ranks."""
    if x.numel() % dist.get_world_size():
        raise ValueError(f"{x.numel()} numbers do not split into {dist.get_world_size()} parts: pad them")
    return ring_all_gather(ring_reduce_scatter(x.flatten())).view_as(x)


# --- 3. data parallelism, four ways -------------------------------------------------------------------------
# All start from rank 0's weights. finish_gradient_synchronization() belongs between backward() and the
# optimizer; after it the gradients are the same everywhere, so clipping and the step need no communication.

def average(t, async_op=False):
    return dist.all_reduce(t, op=dist.ReduceOp.AVG, async_op=async_op)


class NaiveDDP(nn.Module):
    """One all-reduce a parameter, after the backward pass: each pays its latency, and none is hidden.

    find_unused: for models where in some steps some parameters get no gradient, on some ranks or on all. A
    byte each then tells who has one. Used by nobody, it stays None: zeros would let the optimizer decay it.
    Used somewhere, the others send zeros.
    """
    def __init__(self, module, bucket_mb=25.0, find_unused=False):
        super().__init__()
        self.module, self.bucket_mb, self.syncing = module, bucket_mb, True
        for t in [*module.parameters(), *module.buffers()]:
            dist.broadcast(t.detach(), src=0)
        self.params = [p for p in module.parameters() if p.requires_grad]    # a tied one is listed once
        # These bytes go in a group of their own: within a group all ranks must send in one order, and when
        # backward ends, the hooks below may have sent more on one rank than on another.
        self.used_group = dist.new_group(backend="gloo") if find_unused else None

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self):
        """Around all micro-batches but the last: gradients add up in p.grad, and nothing is sent."""
        self.syncing = False
        try:
            yield
        finally:
            self.syncing = True

    def fill_unused(self):
        """Afterwards a parameter has a gradient on all ranks or on none."""
        missing = [p for p in self.params if p.grad is None]
        if missing and not self.used_group:
            first = next(name for name, p in self.module.named_parameters() if p is missing[0])
            raise ValueError(f"{len(missing)} parameters have no gradient, {first} is the first: "
                             f"freeze what is never used, or construct with find_unused=True")
        if self.used_group:
            used = torch.tensor([p.grad is not None for p in self.params], dtype=torch.uint8)
            dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self.used_group)
            for p, somewhere in zip(self.params, used.tolist()):
                if somewhere and p.grad is None:
                    p.grad = torch.zeros_like(p)

    def finish_gradient_synchronization(self):
        self.fill_unused()
        for p in self.params:
            if p.grad is not None:
                average(p.grad)


class FlatDDP(NaiveDDP):
    """All gradients in one message: one latency. Still after the backward pass, and copied twice."""
    def finish_gradient_synchronization(self):
        self.fill_unused()
        grads = [p.grad for p in self.params if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        average(flat)
        for g, mean in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(mean.view_as(g))


class OverlappedDDP(NaiveDDP):
    """Each gradient is sent as soon as it is complete, behind the rest of the backward pass.

    All ranks must send in the same order, whatever is ready first, or they would add up different parameters:
    a unit (here one parameter) goes when it is complete and all units before it have gone. The order is
    that of the parameters in reverse, about the one in which backward reaches them.
    """
    def __init__(self, module, bucket_mb=25.0, find_unused=False):
        super().__init__(module, bucket_mb, find_unused)
        self.units = self.make_units()
        self.unit_of = {p: i for i, unit in enumerate(self.units) for p in unit}
        self.start_over()
        for p in self.params:                              # called once in a backward pass, p.grad complete
            p.register_post_accumulate_grad_hook(self.on_ready)

    def make_units(self):
        return [[p] for p in reversed(self.params)]

    def start_over(self):
        self.missing = [len(unit) for unit in self.units]  # gradients that each unit still waits for
        self.sent, self.works = 0, []                      # units gone, messages under way

    def on_ready(self, p):
        if not self.syncing:
            return
        unit = self.unit_of[p]
        if self.missing[unit] == 0:
            raise RuntimeError("a second backward pass before finish_gradient_synchronization(): "
                               "put all but the last under no_sync()")
        self.missing[unit] -= 1
        while self.sent < len(self.units) and self.missing[self.sent] == 0:
            self.send(self.units[self.sent])
            self.sent += 1

    def send(self, unit):
        if unit[0].grad is not None:                       # None: nobody used it, so nobody sends it
            self.works.append(average(unit[0].grad, async_op=True))

    def finish_gradient_synchronization(self):
        self.fill_unused()
        for unit in self.units[self.sent:]:                # an unused parameter held these back
            self.send(unit)
        for work in self.works:
            work.wait()
        self.start_over()


class BucketedDDP(OverlappedDDP):
    """Overlapped, with neighbours in one message of at most bucket_mb: large enough that latency does not
    count, small enough that the first goes early and the last, which nothing hides, is short.

    A bucket is a buffer that is kept; after a step the gradients are views of it. One copy, not two.
    """
    def make_units(self):
        units = []
        for p in reversed(self.params):
            alike = units and (p.dtype, p.device) == (units[-1][0].dtype, units[-1][0].device)
            if alike and p.nbytes + sum(q.nbytes for q in units[-1]) <= self.bucket_mb * 1e6:
                units[-1].append(p)
            else:
                units.append([p])
        self.places = {}                                   # first parameter -> the buffer and its views
        for unit in units:
            buffer = unit[0].new_empty(sum(p.numel() for p in unit))
            parts = buffer.split([p.numel() for p in unit])
            self.places[unit[0]] = buffer, [part.view_as(p) for part, p in zip(parts, unit)]
        return units

    def send(self, unit):
        buffer, places = self.places[unit[0]]
        used = [(p, place) for p, place in zip(unit, places) if p.grad is not None]
        if not used:                                       # by any rank; what is half used goes whole
            return
        torch._foreach_copy_([place for _, place in used], [p.grad for p, _ in used])    # one call for all
        for p, place in used:
            p.grad = place
        self.works.append(average(buffer, async_op=True))


WAYS = {"naive": NaiveDDP, "flat": FlatDDP, "overlapped": OverlappedDDP, "bucketed": BucketedDDP}


# --- 4. sequence parallelism --------------------------------------------------------------------------------
# C ranks share each sequence. Norms, feed-forward, embedding and loss look at one token at a time and stay as
# they are; attention needs everyone's keys and values. Either these travel around a ring (any number of
# heads, memory T/C), or an all-to-all trades tokens for heads (C must divide them; any kernel serves).

def my_positions(rank, C, T, zigzag):
    """(T/C,) positions that a rank holds. Under a causal mask the last of C plain pieces costs 2 - 1/C times
    the mean, and all wait for it; an early piece and a late one, zig-zag, cost everyone the same."""
    pieces = 2 * C if zigzag else C
    if T % pieces:
        raise ValueError(f"a sequence of {T} tokens does not split into {pieces} pieces for {C} ranks: "
                         f"try --context_length {pieces * max(1, T // pieces)}")
    piece = torch.arange(T).chunk(pieces)
    return torch.cat((piece[rank], piece[-1 - rank])) if zigzag else piece[rank]


def visible(r, j, n):
    """What rank r's n tokens see of rank j's -> (queries, keys, causal). Rank j holds pieces j and 2C-1-j.
    j < r: the first lies before both of mine, the other after both. j > r: both lie between my two. So a
    block is seen in whole halves, and only my own needs a mask."""
    if j == r:
        return slice(None), slice(None), True
    return (slice(None), slice(n // 2), False) if j < r else (slice(n // 2, None), slice(None), False)


def passing_blocks(k, v, group):
    """Each rank's k and v (B,K,n,H) go around: in step s rank r has those of rank r-s at hand, while they are
    on their way to the next. Yields (queries, keys, causal, k, v), k and v cut to what is visible."""
    r, C = dist.get_rank(group), dist.get_world_size(group)
    block = torch.stack((k, v))                                              # (2,B,K,n,H): one message
    for step in range(C):
        coming = start_shift(block, group) if step < C - 1 else None
        queries, keys, causal = visible(r, (r - step) % C, k.shape[2])
        yield queries, keys, causal, *block[..., keys, :]
        if coming:
            block = coming()


def attention_scores(q, k, causal):
    """q (B,K,G,T,H), k (B,K,S,H) -> (B,K,G,T,S), fp32 or wider."""
    kind = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):     # in bf16 a score of 100 is off by up to a quarter
        s = q.to(kind) @ k[:, :, None].to(kind).mT / math.sqrt(q.shape[-1])
    return s.masked_fill(torch.ones_like(s[0, 0, 0], dtype=torch.bool).triu(1), -math.inf) if causal else s


class RingAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(H)) v over keys that lie on C ranks. q (B,N,n,H), k and v (B,K,n,H), n = T/C.

    out and log Z are kept as if the blocks seen so far were all, and each new block corrects them. Backward
    goes round again: with the final log Z each block's probabilities come back exactly, and its gradients
    travel with it until they are home.      Bytes: C-1 blocks forward, 2 (C-1) backward. The scores of a
    block, n^2/2 a head, n^2 of one's own, are formed in memory: this is where a fused kernel would go.
    """
    @staticmethod
    def forward(ctx, q, k, v, group):
        q = q.unflatten(1, (k.shape[1], -1))                                 # (B,K,G,n,H)
        out = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
        log_z = torch.full_like(out[..., :1], -math.inf)                     # (B,K,G,n,1)
        for queries, keys, causal, k_block, v_block in passing_blocks(k, v, group):
            scores = attention_scores(q[..., queries, :], k_block, causal)
            before, here = log_z[..., queries, :], scores.logsumexp(-1, keepdim=True)
            both = torch.logaddexp(before, here)                             # Z = Z1 + Z2
            out[..., queries, :] *= (before - both).exp()                    # Z1/Z out1 + Z2/Z out2
            out[..., queries, :] += (scores - both).exp().to(v.dtype) @ v_block[:, :, None]
            log_z[..., queries, :] = both
        ctx.save_for_backward(q, k, v, out, log_z)
        ctx.group = group
        return out.flatten(1, 2).to(q.dtype)

    @staticmethod
    def backward(ctx, dout):
        """p = exp(s - log Z); dv = p^T dout; ds = p (dout v^T - delta) / sqrt(H); dq = ds k; dk = ds^T q."""
        q, k, v, out, log_z = ctx.saved_tensors
        q, k, v, dout = (t.to(out.dtype) for t in (q, k, v, dout.unflatten(1, q.shape[1:3])))
        delta = (dout * out).sum(-1, keepdim=True)                           # = sum over keys of p (dout v^T)
        dq, mine = torch.zeros_like(q), None
        travelling = torch.zeros_like(torch.stack((k, v)))                   # gradients of the block at hand
        for queries, keys, causal, k_block, v_block in passing_blocks(k, v, ctx.group):
            q_part, dout_part = q[..., queries, :], dout[..., queries, :]
            p = (attention_scores(q_part, k_block, causal) - log_z[..., queries, :]).exp()
            ds = p * (dout_part @ v_block[:, :, None].mT - delta[..., queries, :]) / math.sqrt(q.shape[-1])
            dq[..., queries, :] += ds @ k_block[:, :, None]
            here = torch.stack(((ds.mT @ q_part).sum(2), (p.mT @ dout_part).sum(2)))     # over the G heads
            if mine is None:
                mine = here                                # my own block's stay here; the others' go home
            else:
                travelling[..., keys, :] += here
                travelling = shift(travelling, ctx.group)
        return dq.flatten(1, 2), *(mine + travelling), None


class TradeDims(torch.autograd.Function):
    """All-to-all: x is cut into C parts along one dimension, part j goes to rank j, what comes is joined
    along another. Backward is the way back.      Bytes: (C-1)/C of x."""
    @staticmethod
    def forward(ctx, x, cut, join, group):
        ctx.way_back = join, cut, group
        parts = torch.stack(x.chunk(dist.get_world_size(group), cut))
        arriving = torch.empty_like(parts)
        dist.all_to_all_single(arriving, parts, group=group)
        return torch.cat(arriving.unbind(), join)

    @staticmethod
    def backward(ctx, grad):
        return TradeDims.apply(grad, *ctx.way_back), None, None, None


def ulysses_attention(q, k, v, group):
    """(B,N,T/C,H) of all heads -> (B,N/C,T,H) of all tokens -> ordinary attention -> back."""
    q, k, v = (TradeDims.apply(t, 1, 2, group) for t in (q, k, v))
    y = M.attend(q, k, v, is_causal=True, enable_gqa=k.shape[1] < q.shape[1])
    return TradeDims.apply(y, 2, 1, group)


def split_sequences(model, group, way="ring"):
    """From here on model(ids, positions) takes this rank's tokens of each sequence. Returns their positions
    (T/C,), T the context_length. The gradients are those of the loss on these tokens alone: averaged over all
    ranks, as in data parallelism, they are the whole sequence's."""
    c, C = model.config, dist.get_world_size(group)
    plain = all(type(block.mixer) is M.Attention for block in model.blocks)
    if not plain or c.mtp or c.window or c.attn_softcap:
        raise ValueError("--sequence_ranks splits plain causal attention alone: drop it, or --mixer, "
                         "--layers, --mtp, --window and --attn_softcap")
    if way == "ulysses" and c.kv_heads % C:
        raise ValueError(f"{c.kv_heads} key/value heads do not split among {C} ranks: "
                         f"use --attention ring, or --sequence_ranks {math.gcd(c.kv_heads, C)}")
    attend = RingAttention.apply if way == "ring" else ulysses_attention
    for block in model.blocks:                             # an object's attribute hides the class's method
        block.mixer.choose_kernel = lambda q, k, v, *_, **__: attend(q, k, v, group)
    return my_positions(dist.get_rank(group), C, c.context_length, zigzag=way == "ring")


# --- 5. what it must cost -----------------------------------------------------------------------------------

def all_reduce_bytes(n, P):
    """Sent by each rank to reduce n bytes. Where the ranks themselves add, no algorithm needs less."""
    return 2 * (P - 1) / P * n


def sequence_bytes(c, batch_size, C, way):
    """Sent by each rank for the attention of a forward and a backward pass, fp32. For a given T, the ring's
    nears a constant as C grows, the all-to-all's falls as 1/C; few key/value heads favour the ring."""
    numbers = batch_size * c.context_length // C * c.head_dim                # of one head
    if way == "ring":
        return c.num_layers * 3 * (C - 1) * 2 * c.kv_heads * numbers * 4
    return c.num_layers * 2 * (C - 1) / C * (2 * c.num_heads + 2 * c.kv_heads) * numbers * 4


def useful_ranks(tokens, flops, bandwidth, gradient_bytes=4):
    """The largest P whose all-reduce still hides behind the backward pass, 4 FLOPs a weight and token. The
    weights cancel, so the shape does not matter: only more tokens a step, or better wires, feed more
    devices."""
    return 1 + 2 * tokens * bandwidth / (gradient_bytes * flops)


# --- 6. ranks: started, watched, ended ----------------------------------------------------------------------
# A rank that dies leaves the others in a collective that never ends. gloo then reports a closed socket, nccl
# nothing, and neither says who. All must end, soon, and name the culprit: torchrun starts them again, from
# the last checkpoint. What they know of each other stands in a store (keys and values, held by whoever
# started them).
PATIENT = datetime.timedelta(days=1)                       # a collective's own limit; Watch acts sooner


class RankLost(RuntimeError):
    """A rank died, hung or raised. The text names it and its step."""


class Watch:
    """Once a second each rank tells the store that it lives, where it is, and since when. When a collective
    fails, or no rank moves for `timeout` seconds, that is enough to find whom the others wait for."""
    def __init__(self, store, rank, world, timeout=20.0, loud=False):
        self.store, self.rank, self.world, self.timeout, self.loud = store.clone(), rank, world, timeout, loud
        self.beats, self.ended = 0, False
        self.at(0, "starting")                             # before anyone may read it
        threading.Thread(target=self.run, daemon=True).start()

    def at(self, step, phase, part=0):
        """starting (may take any time), computing (micro-batch number `part`), waiting for the others, or
        saving (the others wait)."""
        self.since = time.monotonic()                      # first: the other thread may beat at any moment
        self.step, self.phase, self.part, self.patience = step, phase, part, self.since + self.timeout
        self.beat()

    def beat(self):
        self.beats += 1
        facts = self.beats, self.step, self.phase, self.part, time.monotonic() - self.since
        self.store.set(f"beat/{self.rank}", " ".join(map(str, facts)))

    def run(self):
        try:
            while not self.ended:
                self.beat()
                if self.phase in ("computing", "waiting") and time.monotonic() > self.patience:
                    self.accuse("")
                time.sleep(1)
        except Exception:                                  # the store is gone, and with it whoever started
            os._exit(1)                                    # us: leave no orphans

    def look(self):
        beats = self.store.multi_get([f"beat/{r}" for r in range(self.world)])
        return [beat.decode().split() for beat in beats]   # of each rank: count, step, phase, part, still

    def accuse(self, error):
        """A second look after three seconds tells who is alive. Of the living, the one that is behind is the
        one that hangs: at an earlier step or micro-batch, or still computing when the others wait."""
        before = self.look()
        for _ in range(3):
            time.sleep(1)
            self.beat()                                    # this may be the thread that does it
        after = self.look()
        dead = [r for r in range(self.world) if r != self.rank and before[r] == after[r]]
        if dead:
            self.end(f"rank {dead[0]} at step {after[dead[0]][1]} does not answer: it was killed or stopped")
        if error:
            self.end(f"rank {self.rank} at step {self.step} lost the others: {error}")
        still = min(0.0 if phase == "saving" else float(still) for _, _, phase, _, still in after)
        if still < self.timeout:                           # somebody saves, or moves: wait on
            self.patience = time.monotonic() + self.timeout - still
            return
        progress = [(int(step), phase == "waiting", int(part)) for _, step, phase, part, _ in after]
        behind = [str(r) for r in range(self.world) if progress[r] == min(progress)]
        who = f"no rank moves at step {self.step}" if len(behind) == self.world > 1 else \
            f"rank {' or '.join(behind)} at step {min(progress)[0]} hangs"
        self.end(f"{who}: {self.timeout:g} s without progress (--timeout allows more)")

    def end(self, text, status=1):
        """The first rank to come says its line, all others go in silence. Not sys.exit, which would wait for
        messages that never come."""
        if self.store.add("said", 1) == 1:
            self.store.set("line", text)
            if self.loud:
                print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr, flush=True)
        os._exit(status)

    def fail(self, e):
        """What it means that this rank's job raised."""
        text, here = M.first_line(e), f"rank {self.rank} at step {self.step}"
        if isinstance(e, dist.DistError) or "gloo" in str(e):
            self.accuse(text)
        if isinstance(e, (ValueError, OSError)):
            self.end(text if self.phase == "starting" else f"{here}: {text}", status=2)
        where = traceback.extract_tb(e.__traceback__)[-1]
        self.end(f"{here}: {type(e).__name__}: {text} ({os.path.basename(where.filename)}:{where.lineno})")


def run_rank(job, args, store, rank, world, local_rank, device="cpu", timeout=20.0, loud=False):
    """Join the group, run job(watch, *args), leave -> what job returned."""
    watch = Watch(store, rank, world, timeout, loud)
    try:
        if device == "cuda":
            torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world, timeout=PATIENT)
        result = job(watch, *args)
        dist.barrier()                                     # nobody hangs up while another still listens
        watch.ended = True
        dist.destroy_process_group()
        return result
    except Exception as e:
        with contextlib.suppress(Exception):
            watch.fail(e)
        os._exit(1)                                        # the store is gone, too


def local_rank_main(rank, job, args, port, world, threads, options):
    signal.signal(signal.SIGINT, signal.SIG_DFL)           # Ctrl-C: die in silence, the parent speaks
    torch.set_num_threads(threads)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    store.set(f"result/{rank}", json.dumps(run_rank(job, args, store, rank, world, rank, **options)))
    sys.stdout.flush()
    os._exit(0)                                            # nothing is left to do, and nothing may hang here


def launch(job, world_size, *args, **options):
    """Run job(watch, *args) in world_size local processes -> their results, which JSON can hold; RankLost, or
    a rank's ValueError, when all have ended. torchrun does the same, and for many hosts.

    The parent holds the store, at a port that the system picks. Ranks are forked from a server that has
    imported torch once, and has no threads yet.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo"])               # every optimizer imports both
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, torch.get_num_threads() // world_size)
    ranks = [context.Process(target=local_rank_main, daemon=True, args=(
        rank, job, args, store.port, world_size, threads, options)) for rank in range(world_size)]
    interrupted = False
    try:
        for process in ranks:
            process.start()
        while running := [process for process in ranks if process.exitcode is None]:
            try:
                wait([process.sentinel for process in running])
            except KeyboardInterrupt:                      # training saves and returns, all else dies
                if interrupted:
                    raise
                interrupted = True
                for process in running:
                    with contextlib.suppress(ProcessLookupError):            # the terminal has told it, too
                        os.kill(process.pid, signal.SIGINT)
            lost = [rank for rank, process in enumerate(ranks) if process.exitcode]
            if lost and interrupted:
                raise KeyboardInterrupt
            if lost:
                raise what_happened(store, lost[0], ranks[lost[0]].exitcode)
    finally:
        for process in ranks:
            if process.pid:                                # it was started
                process.kill()                             # ends a stopped one, too
                process.join()
    return [json.loads(store.get(f"result/{rank}")) for rank in range(world_size)]


def what_happened(store, rank, status):
    if store.add("said", 1) > 1:                           # a rank has named the cause
        return (ValueError if status == 2 else RankLost)(store.get("line").decode())
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
    at = store.get(f"beat/{rank}").decode().split()[1] if store.check([f"beat/{rank}"]) else 0
    return RankLost(f"rank {rank} at step {at}: {how}")


def check_alike(facts):
    """facts {name: plain value} must agree on all ranks. Other code, data, flags or weights on one of them
    would raise no error, and train something else."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, facts)
    odd = [f"rank {r} has {name} {theirs.get(name)!r}, rank 0 {value!r}" for r, theirs in enumerate(everyone)
           for name, value in everyone[0].items() if theirs.get(name) != value]
    if odd:
        raise ValueError("the ranks differ: " + "; ".join(odd[:3]))


# --- 7. training --------------------------------------------------------------------------------------------

def backward(model, ids, positions=None, micro_batch=0, autocast=contextlib.nullcontext, at=lambda i: None):
    """ids (B,T+1), the positions (T,) that this rank works on, None for all -> mean loss; gradients add up in
    .grad. A micro-batch's loss is a mean, so it is divided by their number; the ranks' are averaged later."""
    parts, total = ids.split(micro_batch or len(ids)), 0.0
    for i, part in enumerate(parts):
        at(i)                                              # tells Watch that this rank moves
        quiet = isinstance(model, NaiveDDP) and i < len(parts) - 1
        with model.no_sync() if quiet else contextlib.nullcontext():
            with autocast():
                if positions is None:
                    loss, objective = M.training_loss(model, part[:, :-1], part[:, 1:])
                else:
                    loss, _ = M.lm_loss(model(part[:, positions], positions), part[:, positions + 1])
                    objective = loss + M.unwrapped(model).aux_loss()
            with record_function("backward"):
                (objective / len(parts)).backward()
        total = total + loss.detach() / len(parts)
    return total


def update(model, optimizer, clip):
    """Average, clip to the global norm, step -> the norm: of the mean gradient, so the same on all ranks."""
    net = M.unwrapped(model)
    if isinstance(model, NaiveDDP):
        model.finish_gradient_synchronization()
        for moe in net.modules():                          # experts are balanced over all tokens
            if isinstance(moe, M.MoE) and moe.bias is not None:
                average(moe.load)
    norm = nn.utils.clip_grad_norm_(net.parameters(), clip or math.inf)
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient's norm is {norm.item()}: try a smaller --lr or --clip")
    optimizer.step()
    optimizer.zero_grad()
    net.balance_experts()
    return norm


def make_optimizer(model, lr):
    """AdamW. Matrices decay, vectors (norms, biases) do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([{"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
                              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}],
                             lr=lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step, steps, peak):
    """A line up over the first 2% of steps 1..steps, then half a cosine down to a tenth at the last."""
    warm = max(1, steps // 50)
    down = max(0, step - warm) / max(1, steps - warm)
    return peak * min(step / warm, 0.55 + 0.45 * math.cos(math.pi * down))


def count_windows(tokens, T, name="train.bin"):
    if len(tokens) <= T:
        raise ValueError(f"{name}: {len(tokens):,} tokens are not a context of {T} and one more to predict: "
                         f"try more text, or --context_length {max(1, len(tokens) - 1)}")
    return (len(tokens) - 1) // T


def windows(tokens, T, numbers):
    """Windows of T tokens and their targets -> (len(numbers), T+1) int64."""
    return torch.from_numpy(np.stack([tokens[i * T:i * T + T + 1] for i in numbers]).astype(np.int64))


@functools.lru_cache(2)
def window_order(seed, epoch, count):
    return np.random.default_rng([seed, epoch]).permutation(count)


def batch(tokens, T, first, n, seed):
    """Sequences number first .. first+n-1 of the run. What they are depends on the seed alone: any number of
    ranks reads the same ones in the same step, and a run goes on with more ranks, or fewer."""
    count, numbers = count_windows(tokens, T), range(first, first + n)
    return windows(tokens, T, [window_order(seed, i // count, count)[i % count] for i in numbers])


class Run:
    """A training run on this rank. Of P ranks, C neighbours form a lane: they share its sequences."""
    def __init__(self, args, folder, resume):
        self.args, self.rank, self.P, C = args, dist.get_rank(), dist.get_world_size(), args.sequence_ranks
        self.lane, self.lanes, self.share = self.rank // C, self.P // C, args.batch_size // (self.P // C)
        self.device = f"cuda:{torch.cuda.current_device()}" if dist.get_backend() == "nccl" else "cpu"
        self.tokenizer = bpe.load_tokenizer(os.path.join(folder, "tokenizer.json"))
        self.tokens, self.val = (bpe.load_tokens(os.path.join(folder, f"{part}.bin"), self.tokenizer)
                                 for part in ("train", "val"))
        torch.manual_seed(args.seed)
        self.model = M.Transformer(M.model_config(args, vocab_size=self.tokenizer.vocab_size)).to(self.device)
        self.T = self.model.config.context_length
        self.val_windows = count_windows(self.val, self.T, "val.bin")
        # What decides the numbers, besides the config. A thousand tokens tell texts of one length apart.
        self.facts = {name: getattr(args, name) for name in ("batch_size", "steps", "lr", "clip", "seed")}
        some = self.tokens[::len(self.tokens) // 1000 + 1].astype(np.int64)
        self.facts["tokens"] = (f"{len(self.tokens)} of tokenizer {self.tokenizer.hash()}, "
                                f"{hashlib.sha256(some.tobytes()).hexdigest()[:8]}")
        self.check_ranks()
        self.optimizer = make_optimizer(self.model, args.lr)
        self.path = os.path.join(args.out, "checkpoint.pt")
        self.first = self.restore() if resume else 0       # steps that are done
        self.positions = None                              # all of them
        if C > 1:                                          # all ranks make all groups, their own and others'
            groups = [dist.new_group(range(i, i + C), PATIENT) for i in range(0, self.P, C)]
            self.positions = split_sequences(self.model, groups[self.lane], args.attention).to(self.device)
        self.ddp = WAYS[args.way](self.model, args.bucket_mb)
        bf16 = "cuda" in self.device and torch.cuda.is_bf16_supported()
        self.autocast = functools.partial(torch.autocast, "cuda", torch.bfloat16, enabled=bf16)

    def check_ranks(self):
        """Before the first step all ranks have the same flags, data, code and weights."""
        files = b"".join(Path(file).read_bytes() for file in (M.__file__, bpe.__file__, __file__))
        check_alike({**vars(self.args), **self.facts,
                     "torch": torch.__version__, "code": hashlib.sha256(files).hexdigest()[:12],
                     "weights": sum(p.double().sum().item() for p in self.model.parameters())})

    def restore(self):
        """Read the checkpoint -> steps done. The config and the facts may not change; how many ranks may."""
        state = M.load_checkpoint(self.path)
        if "ddp" not in state:
            raise ValueError(f"{self.path} was not written by ddp.py: train afresh with another --out")
        before, now = {**state["config"], **state["ddp"]}, {**asdict(self.model.config), **self.facts}
        for name, value in now.items():
            if before.get(name, value) != value:
                raise ValueError(f"{self.path} was made with {name} {before[name]}, not {value}: "
                                 f"give the same, or drop --resume")
        M.load_weights(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["step"]

    def step(self, step, watch, asked):
        """One optimizer step -> the log's fields, and whether a rank was asked to stop."""
        args, start, lr = self.args, time.perf_counter(), learning_rate(step, self.args.steps, self.args.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Dropout: other numbers in each step and on each rank, and nothing to be saved.
        torch.manual_seed(int(np.random.default_rng([args.seed, step, self.rank]).integers(2**63)))
        first = (step - 1) * args.batch_size + self.lane * self.share
        ids = batch(self.tokens, self.T, first, self.share, args.seed).to(self.device)
        loss = backward(self.ddp, ids, self.positions, args.micro_batch, self.autocast,
                        lambda i: watch.at(step, "computing", i))
        watch.at(step, "waiting")
        norm = update(self.ddp, self.optimizer, args.clip)
        stats = torch.stack((loss / self.P, loss.new_tensor(float(asked))))
        dist.all_reduce(stats)                             # the stop rides on the loss
        seconds, tokens = time.perf_counter() - start, args.batch_size * self.T
        return dict(step=step, tokens=step * tokens, loss=stats[0].item(), lr=lr, gnorm=norm.item(),
                    step_ms=1000 * seconds, tok_s=tokens / seconds), bool(stats[1])

    @torch.no_grad()
    def held_out_loss(self, most=1_000_000):
        """Nats a token over val.bin, at most `most` tokens of it; the lanes take turns."""
        self.model.eval()                                  # no dropout
        total, count = torch.zeros(2, device=self.device), min(self.val_windows, max(1, most // self.T))
        at = torch.arange(self.T, device=self.device) if self.positions is None else self.positions
        for first in range(self.lane * self.share, count, self.lanes * self.share):
            ids = windows(self.val, self.T, range(first, min(first + self.share, count))).to(self.device)
            with self.autocast():
                loss = M.lm_loss(self.model(ids[:, at], at), ids[:, at + 1])[0]
            total += len(ids) * torch.stack((loss, torch.ones_like(loss)))
        dist.all_reduce(total)
        return (total[0] / total[1]).item()


def train(watch, args, folder, resume):
    """The whole run on this rank -> the number of the signal that ended it, or 0."""
    run, signals = Run(args, folder, resume), []
    for number in (signal.SIGTERM, signal.SIGINT):         # noted, not obeyed: all leave after the same step
        signal.signal(number, lambda number, frame: signals.append(number))
    main = run.rank == 0
    say = functools.partial(print, flush=True) if main else lambda *_, **__: None
    say(f"{M.num_params(run.model.config):,} parameters on each of {run.P} ranks; a step "
        f"{args.batch_size * run.T:,} tokens = {run.lanes} x {run.share} sequences of {run.T}, "
        f"{args.sequence_ranks} ranks a sequence; {dist.get_backend()}, {args.way}, seed {args.seed}")
    with open(os.path.join(args.out, "log.jsonl"), "a" if resume else "w") if main else \
            contextlib.nullcontext() as log:               # after a restart some steps stand there twice
        for step in range(run.first + 1, args.steps + 1):
            watch.at(step, "computing")
            trace = os.path.join(args.out, f"trace{run.rank}.json")
            tracing = args.dump_trace and step == min(run.first + 3, args.steps)
            with traced(trace) if tracing else contextlib.nullcontext():
                fields, asked = run.step(step, watch, bool(signals))
            say(json.dumps(dict(kind="train", **fields)), file=log)
            if step % args.log_steps == 0 or step == args.steps:
                say("step {step:>6}/{} | loss {loss:7.4f} | lr {lr:.2e} | gnorm {gnorm:6.2f} | "
                    "{step_ms:7.1f} ms | {tok_s:>9,.0f} tok/s".format(args.steps, **fields))
            if main and (asked or step % args.save_steps == 0 or step == args.steps):
                watch.at(step, "saving")                   # the others go on, and wait at the next average
                M.save_checkpoint(run.path, run.model, run.optimizer, step, ddp=run.facts,
                                  tokenizer=run.tokenizer.hash())
            if asked:
                say(f"stopped: saved {run.path} at step {step}; the same command with --resume goes on")
                return signals[0] if signals else signal.SIGTERM
        watch.at(args.steps, "saving")                     # an evaluation may take its time, too
        loss = run.held_out_loss()
        say(json.dumps(dict(kind="val", step=args.steps, val_loss=loss)), file=log)
        say(f"held out: loss {loss:.4f} nats/token; saved {run.path}")
    return 0


# --- 8. the lecture -----------------------------------------------------------------------------------------

@contextlib.contextmanager
def traced(path):
    """with traced("x.json"): ...   writes a Chrome trace; ui.perfetto.dev shows it."""
    os.environ["KINETO_LOG_LEVEL"] = "6"                   # torch 2.13 says two lines about each trace
    with profile() as prof:
        yield
    prof.export_chrome_trace(path)


def timeline(path):
    """A Chrome trace -> {"backward", "matmul", "messages": [(start, end), ...]}, ms since backward began."""
    names = {"backward": ("backward",), "matmul": ("aten::mm",),
             "messages": ("gloo:all_reduce", "ncclDevKernel_AllReduce")}
    with open(path) as f:
        events = [e for e in json.load(f)["traceEvents"] if "dur" in e]
    zero = min(e["ts"] for e in events if e["name"] == "backward")
    return {what: sorted(((e["ts"] - zero) / 1000, (e["ts"] - zero + e["dur"]) / 1000) for e in events
                         if e["name"].startswith(starts)) for what, starts in names.items()}


def hidden_share(spans):
    """The part of the messages' time that lies within the backward pass; 0 without messages."""
    end, messages = spans["backward"][0][1], spans["messages"]
    inside = sum(max(0.0, min(b, end) - max(a, 0.0)) for a, b in messages)
    return inside / (sum(b - a for a, b in messages) or 1.0)


def show(title, header, rows):
    """One table, from rank 0; all ranks have taken part in what it shows."""
    if dist.get_rank() == 0:
        M.table(title, header, rows)


def show_collectives():
    P, rank = dist.get_world_size(), dist.get_rank()
    before = torch.arange(P) + 10 * rank
    mine = {name: x.tolist() for name, x in {"before": before, **eight_collectives(before)}.items()}
    everyone = [None] * P
    dist.all_gather_object(everyone, mine)
    show("Eight collectives: what each rank holds afterwards", ["", *(f"rank {r}" for r in range(P))],
         [[name, *(" ".join(map(str, held[name])) or "-" for held in everyone)] for name in mine])


def show_rings(n=1_200_000):
    """All-reduce of about n fp32 numbers in two ways: messages, bytes and error."""
    P, rows = dist.get_world_size(), []
    torch.manual_seed(dist.get_rank())
    x = torch.randn(n // P * P)
    total = x.clone()
    dist.all_reduce(total)
    for name, function, messages, sent in (
            ("whole tensors around the ring", ring_all_reduce_naive, P - 1, (P - 1) * x.nbytes),
            ("reduce-scatter, all-gather", ring_all_reduce, 2 * (P - 1), all_reduce_bytes(x.nbytes, P))):
        with Count() as count:
            error = (function(x) - total).abs().max()
        rows.append([name, f"{messages}", f"{count.calls['send']}", f"{sent:,.0f}", f"{count.sent(P):,.0f}",
                     f"{error:.0e}"])
    show(f"All-reduce of {x.nbytes:,} bytes on {P} ranks by hand: what one rank sends",
         ["", "messages", "counted", "bytes", "counted", "error against torch"], rows)


def full_step(model, optimizer, ids):
    backward(model, ids)
    update(model, optimizer, clip=1.0)


def show_ways(out, steps=5):
    """The four ways on a model of many small parameters: equal to one process, bytes as predicted, time. Adam
    divides by the gradient's size: where that is close to 0, its rounding is what the error shows."""
    P, rank = dist.get_world_size(), dist.get_rank()
    c = M.ModelConfig(vocab_size=512, context_length=64, num_layers=10, d_model=64, num_heads=1, qk_norm=True)
    torch.manual_seed(0)
    ids = torch.randint(0, 512, (4 * P, 65))
    mine, n = ids.chunk(P)[rank], 4 * M.num_params(c)

    def trained(wrap, ids):
        torch.manual_seed(0)
        model = wrap(M.Transformer(c))
        optimizer = make_optimizer(model, 1e-3)
        for _ in range(steps):
            full_step(model, optimizer, ids)
        return model, optimizer
    runs = {"one process": trained(lambda model: model, ids)}                # on the whole batch
    expected = [p.detach().clone() for p in runs["one process"][0].parameters()]
    spans, facts = {}, {}
    for name, way in WAYS.items():
        with Count() as count:
            runs[name] = trained(functools.partial(way, bucket_mb=0.25), mine)
        error = max((p - q).abs().max().item() for p, q in zip(runs[name][0].parameters(), expected))
        trace = os.path.join(out, f"ddp-{name}{rank}.json")
        with traced(trace):
            full_step(*runs[name], mine)
        spans[name] = timeline(trace)
        hidden = torch.tensor(hidden_share(spans[name]))
        dist.all_reduce(hidden, dist.ReduceOp.MAX)         # of the slowest rank: the others wait for it alone
        facts[name] = count.calls["allreduce_"] // steps, count.sent(P) / steps, hidden.item(), error
    times, rows = time_ways(runs, mine), []
    compute = times["one process"]
    for name, (messages, sent, hidden, error) in facts.items():
        alone = times[f"{name} alone"]
        rows.append([name, f"{messages}", f"{all_reduce_bytes(n, P):,.0f}", f"{sent:,.0f}", f"{alone:.1f}",
                     f"{hidden:.0%}", f"{compute + (1 - hidden) * alone:.1f}", f"{times[name]:.1f}",
                     f"{error:.0e}"])
    show(f"Averaging {len(expected)} gradients on {P} ranks, {steps} steps; ms predicted: computing, "
         f"{compute:.1f}, and messages not hidden",
         ["", "messages", "bytes predicted", "counted", "ms alone", "hidden", "ms predicted", "measured",
          "error"], rows)
    if rank == 0:
        plot(os.path.join(out, "ddp.png"), spans)


def time_ways(runs, ids, rounds=5):
    """Medians in ms, taken in turn: of a step, and of its messages alone."""
    seen = {}

    def clock(name, job, *args):
        dist.barrier()
        start = time.perf_counter()
        job(*args)
        seen.setdefault(name, []).append(1000 * (time.perf_counter() - start))
    for _ in range(rounds):
        for name, (model, optimizer) in runs.items():
            clock(name, full_step, model, optimizer, ids)
            if name in WAYS:
                with model.no_sync():
                    backward(model, ids)
                clock(f"{name} alone", model.finish_gradient_synchronization)
                optimizer.zero_grad()
    return {name: statistics.median(ms) for name, ms in seen.items()}


def plot(path, spans):
    """When backward computes, and when messages are under way."""
    plt = M.pyplot()
    if plt is None:
        return
    fig, axes = plt.subplots(len(spans), 1, figsize=(10, 1.2 * len(spans) + 1), sharex=True)
    for ax, (name, span) in zip(axes, spans.items()):
        for y, what, colour in ((1, "backward", "tab:blue"), (0, "messages", "tab:orange")):
            ax.broken_barh([(a, b - a) for a, b in span[what]], (y, 0.8), color=colour)
        ax.set_yticks([0.4, 1.4], ["messages", "backward"])
        ax.set_title(f"{name}: {hidden_share(span):.0%} hidden", loc="left", fontsize=9)
    axes[-1].set_xlabel("ms since the backward pass began")
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    print(f"\nsaved {path}, and Chrome traces {os.path.dirname(path)}/ddp-*.json")


def show_sequences(batch_size=2):
    """One sequence on all ranks: bytes against the formula, gradients against a single process."""
    P, rows = dist.get_world_size(), []
    c = M.ModelConfig(vocab_size=512, context_length=128 * P, num_layers=2, d_model=64 * P, num_heads=2 * P,
                      num_kv_heads=P, init="glorot")
    torch.manual_seed(0)
    ids, single = torch.randint(0, 512, (batch_size, c.context_length + 1)), M.Transformer(c)
    backward(single, ids)
    for way in ("ring", "ulysses"):
        model = M.Transformer(c)
        model.load_state_dict(single.state_dict())
        positions = split_sequences(model, dist.group.WORLD, way)
        with Count() as count:
            backward(model, ids, positions)
        FlatDDP(model).finish_gradient_synchronization()
        error = max((p.grad - q.grad).abs().max() / q.grad.abs().max()
                    for p, q in zip(model.parameters(), single.parameters()))
        rows.append([way, f"{sequence_bytes(c, batch_size, P, way):,.0f}", f"{count.sent(P):,.0f}",
                     f"{error:.0e}"])
    show(f"{c.context_length} tokens on {P} ranks, {c.num_heads} heads, {c.kv_heads} key/value heads",
         ["", "bytes", "counted", "relative error of gradients"], rows)


def lecture(watch, args, tokens=4e6, flops=0.4 * 989e12):
    show_collectives()
    show_rings()
    show_ways(args.out)
    show_sequences()
    show(f"Ranks until averaging shows: {tokens:,.0f} tokens a step, gradients in fp32, {flops / 1e12:.0f} "
         f"TFLOP/s",
         ["wires", "bytes/s", "ranks"],
         [[name, f"{bandwidth:.1e}", f"{useful_ranks(tokens, flops, bandwidth):,.0f}"]
          for name, bandwidth in WIRES.items()])
    return 0


def bench_collectives(watch, args, repeats=5):
    """Medians over sizes. Algorithm bandwidth, bytes / time, is what a caller sees; bus bandwidth, times the
    ring's factor, is what the wires carry: that is the one to compare with the hardware, at any P."""
    P, rows = dist.get_world_size(), []
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    for mb in args.bench_collectives:
        whole = torch.ones(P * math.ceil(mb * 250_000 / P), device=device)   # fp32
        part, other = torch.empty(len(whole) // P, device=device), torch.empty_like(whole)
        for name, passes, job in (("all-reduce", 2, lambda: average(whole)),
                                  ("all-reduce by hand", 2, lambda: ring_all_reduce(whole)),
                                  ("reduce-scatter", 1, lambda: reduce_scatter(part, whole)),
                                  ("all-gather", 1, lambda: all_gather(other, part)),
                                  ("all-to-all", 1, lambda: dist.all_to_all_single(other, whole))):
            times = []
            for _ in range(repeats + 2):                   # two to warm up
                dist.barrier()
                start = time.perf_counter()
                job()
                if device == "cuda":
                    torch.cuda.synchronize()               # the call returns when the work is queued
                times.append(time.perf_counter() - start)
            seconds = statistics.median(times[2:])
            speed = whole.nbytes / 1e9 / seconds
            rows.append([name, f"{mb:g}", f"{1e3 * seconds:.2f}", f"{speed:.2f}",
                         f"{passes * (P - 1) / P * speed:.2f}"])
    show(f"{P} ranks, {dist.get_backend()}, load {os.getloadavg()[0]:.1f}, medians of {repeats}",
         ["", "MB", "ms", "algorithm GB/s", "bus GB/s"], rows)
    return 0


# --- 9. command line ----------------------------------------------------------------------------------------

def megabytes(text):
    sizes = [float(mb) for mb in text.split(",")]
    if not all(0 < mb < 1e6 for mb in sizes):
        raise ValueError(text)
    return sizes


def make_parser():
    p = M.cli(__doc__)
    flag = p.add_argument
    flag("--steps", type=int, default=0, help="optimizer steps to train; 0: the lecture")
    flag("--bench_collectives", type=megabytes, metavar="MB,MB",
         help="time the collectives at these sizes, megabytes")
    flag("--world_size", type=int, default=2, help="local ranks to start; torchrun brings its own")
    flag("--way", choices=WAYS, default="bucketed", help="how gradients are averaged")
    flag("--bucket_mb", type=float, default=25.0, help="size of a bucket, megabytes")
    flag("--sequence_ranks", type=int, default=1, help="C: neighbouring ranks that share each sequence")
    flag("--attention", choices=("ring", "ulysses"), default="ring", help="of sequences on several ranks")
    flag("--batch_size", type=int, default=8, help="sequences per optimizer step, of all ranks together")
    flag("--micro_batch", type=int, default=0, help="sequences at a time on a rank; 0: all of its share")
    flag("--lr", type=float, default=3e-3, help="peak learning rate of AdamW")
    flag("--clip", type=float, default=1.0, help="largest l2 norm of all gradients together; 0: no clipping")
    flag("--data", metavar="PATH", help="a folder with train.bin, val.bin and tokenizer.json, or text; "
                                        "without it the Python standard library")
    flag("--out", default="out", metavar="DIR", help="folder for everything the run makes")
    flag("--resume", action="store_true", help="go on from the checkpoint in --out")
    flag("--save_steps", type=int, default=100, help="steps between checkpoints")
    flag("--log_steps", type=int, default=10, help="steps between lines on the screen")
    flag("--dump_trace", action="store_true", help="write a Chrome trace of the third step to --out")
    flag("--timeout", type=float, default=20.0, help="seconds without progress until a rank counts as hung")
    flag("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto takes the first there is")
    flag("--seed", type=int, default=0, help="of weights and data order")
    M.add_model_flags(p)
    return p


def check(args, world):
    """Values that argparse cannot judge alone."""
    for name, least in dict(steps=0, world_size=1, sequence_ranks=1, batch_size=1, micro_batch=0, lr=0,
                            clip=0, save_steps=1, log_steps=1, timeout=1, bucket_mb=0, seed=0).items():
        if not least <= getattr(args, name) < 2**63:
            raise ValueError(f"--{name} {getattr(args, name)} is out of range: {least} or more")
    C, B, lanes = args.sequence_ranks, args.batch_size, world // args.sequence_ranks
    if world % C:
        raise ValueError(f"{world} ranks do not split into groups of --sequence_ranks {C}: "
                         f"try {math.gcd(world, C)}")
    if args.steps and B % lanes:
        raise ValueError(f"--batch_size {B} does not split into {lanes} equal shares, and with unequal ones "
                         f"the mean is wrong: try --batch_size {lanes * max(1, round(B / lanes))}")
    if args.micro_batch and B // lanes % args.micro_batch:
        raise ValueError(f"a share of {B // lanes} sequences is not a multiple of --micro_batch "
                         f"{args.micro_batch}: try --micro_batch {math.gcd(B // lanes, args.micro_batch)}")
    M.model_config(args)


def parse_args(argv=None):
    """Parsed and checked; nothing runs."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        check(args, int(os.environ.get("WORLD_SIZE", args.world_size)))
    except ValueError as e:
        parser.error(M.first_line(e))
    return args


def without_effect(args, parser):
    """Flags that were given and change nothing here."""
    idle = {"bucket_mb": args.way != "bucketed", "attention": args.sequence_ranks == 1,
            "world_size": "RANK" in os.environ}
    if not args.steps:
        used = ("bench_collectives", "device") if args.bench_collectives else ()
        idle = {name: name not in ("world_size", "out", *used) for name in vars(args)}
    return [f"--{name}" for name in idle if idle[name] and getattr(args, name) != parser.get_default(name)]


def prepare(args, restarted=False):
    """What one process does before the ranks join: token files, the old checkpoint -> (folder, resume).
    Several hosts share --data and --out."""
    path = os.path.join(args.out, "checkpoint.pt")
    ready = args.data and os.path.exists(os.path.join(args.data, "train.bin"))
    if not ready:
        bpe.prepare(args.out, args.data, vocab_size=M.model_config(args).vocab_size)
    resume = args.resume or restarted and os.path.exists(path)
    if os.path.exists(path) and not resume:
        os.replace(path, os.path.join(args.out, "checkpoint.old.pt"))
        print(f"{path} is now checkpoint.old.pt: --resume would have gone on from it", flush=True)
    return args.data if ready else args.out, resume


def number_of_start(store, rank, world):
    """1, or more after restarts, on all ranks: torchrun's own count differs from host to host. The store
    outlives a start, and old answers stand in it: so each rank asks under a new name, and rank 0 answers."""
    if rank > 0:
        name = os.urandom(8).hex()
        store.set(f"ask/{rank}", name)
        return int(store.get(f"answer/{name}"))            # waits until there is one
    number, store = store.add("starts", 1), store.clone()

    def answer():
        with contextlib.suppress(Exception):               # the store is gone: so are we, soon
            while True:
                for asks in [f"ask/{r}" for r in range(1, world)]:
                    if store.check([asks]):
                        store.set(f"answer/{store.get(asks).decode()}", str(number))
                time.sleep(0.5)
    threading.Thread(target=answer, daemon=True).start()
    return number


def torchrun_rank(job, args, options):
    """torchrun has started this process, and the others. Rank 0 prepares; a restart goes on by itself."""
    store, rank, world = next(dist.rendezvous("env://"))
    number, more = number_of_start(store, rank, world), ()
    restarted = number > 1 or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    store = dist.PrefixStore(f"start{number}", store)      # the addresses of the dead are in there, too
    if job is train:
        if rank == 0:
            store.set("prepared", json.dumps(prepare(args, restarted)))
        store.wait(["prepared"], PATIENT)
        more = json.loads(store.get("prepared"))
    return run_rank(job, (args, *more), store, rank, world, int(os.environ["LOCAL_RANK"]), loud=True,
                    **options)


def main(argv=None):
    args, parser = parse_args(argv), make_parser()
    job = bench_collectives if args.bench_collectives else train if args.steps else lecture
    before = signal.getsignal(signal.SIGTERM)
    try:
        os.makedirs(args.out, exist_ok=True)
        # The lecture runs on CPUs, the same everywhere.
        cuda = job is not lecture and args.device != "cpu" and M.pick_device(args.device) == "cuda"
        options = dict(device="cuda" if cuda else "cpu", timeout=args.timeout)
        if os.environ.get("RANK", "0") == "0" and (idle := without_effect(args, parser)):
            print(f"note: without effect here: {', '.join(idle)}")
        if "RANK" in os.environ:
            status = torchrun_rank(job, args, options)
        else:
            if cuda and args.world_size > (gpus := torch.cuda.device_count()):
                raise ValueError(f"--world_size {args.world_size} needs as many GPUs, and here are {gpus}: "
                                 f"try --world_size {gpus} or --device cpu")
            more = prepare(args) if job is train else ()
            signal.signal(signal.SIGTERM, signal.default_int_handler)        # a kill saves, as Ctrl-C does
            status = launch(job, args.world_size, args, *more, **options)[0]
    except RankLost as e:
        parser.exit(1, f"{parser.prog}: {e}\n")
    except (ValueError, OSError) as e:
        parser.error(M.first_line(e))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    finally:
        signal.signal(signal.SIGTERM, before)
    if status:
        raise SystemExit(128 + status)


if __name__ == "__main__":
    main()
