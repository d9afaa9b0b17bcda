r"""zero.py - lectures 7-8: many devices, each holding a part of the model.

What   N processes (ranks) train one model; none holds all weights, gradients and optimizer state. ZeRO cuts
       these into N slices; where weights are cut too (FSDP), those of a layer meet just before it computes.
       Tensor parallelism splits every matrix and sends activations; a pipeline gives each rank some layers,
       expert parallelism some experts. The results are those of one process: the table says how closely.
Why    AdamW in fp32 needs 16 bytes a parameter: 108 GB for 7B, on devices of 80 GB. In data parallelism every
       rank holds all of it, though it needs only a part at a time. What is not held must be sent. This file
       predicts both for each layout, bytes held and bytes sent, and counts them on the running program.

Equations (n parameters, N ranks, t tensor ranks, p pipeline stages, m micro-batches, b tokens a rank)
       bytes held     stage 0  4n + 4n + 8n        data parallel: weights, gradients, AdamW's two averages
                      stage 1  4n + 4n + 8n/N      ZeRO-1: optimizer state in slices
                      stage 2  4n + 4n/N + 8n/N    ZeRO-2: gradients too
                      stage 3  16n/N               ZeRO-3 or FSDP: weights too
       bytes sent     stages 0, 1, 2  2 (N-1)/N 4n;    stage 3  3 (N-1)/N 4n       (2 and 3: if m = 1)
                      tensor   4 all-reduces of (B,T,D) a layer;    pipeline  (B,T,D) each way between stages
       y = x W^T      by rows, W = [A; B]: [x A^T | x B^T];   by columns, [A | B]: x1 A^T + x2 B^T, a sum
       bubble         (p-1)/(m+p-1) of a step: the time in which a stage of a pipeline has nothing to do
       FSDP hides     6nb / speed >= 3 * 2n / far: b >= speed / far;    x tensor: b >= speed / (far t)
                      (messages in bf16; speed in FLOP/s; far: bytes/s between nodes)

Run    python zero.py                                                 # the lecture: two local ranks
       python zero.py --steps 200 --stage 3                           # train on two local ranks
       python zero.py --steps 400 --resume --stage 1 --tp 2 --world_size 4
       python zero.py --plan --params 70e9 --gpus 1024 --gpu h100     # which layout for a real cluster
       torchrun --nproc_per_node=8 zero.py --steps 5000 --preset gpt2-xl --dtype bf16 --batch_size 480 \
                --micro_batch 4 --lr 2e-4 --data DIR

You should see (two ranks, CPU; shortened; MB on rank 0; differences from one process after five steps)
       layout             state: predicted  measured  sent a step: predicted  counted  difference
       data parallel                28.862    28.862                   7.216    7.216     1.2e-07
       ZeRO-1                       21.647    21.647                   7.216    7.216     1.2e-07
       ZeRO-2                       18.039    18.039                   7.216    7.216     1.2e-07
       FSDP (ZeRO-3)                14.445    14.445                  10.820   10.820     1.2e-07
       tensor + sequence            14.445    14.445                  18.906   18.906     1.2e-07
       pipeline, 1F1B               14.430    14.430                   1.049    1.049     1.2e-07
       Llama-2 7B, GB of state a rank, predicted and measured on simulated ranks; * fits 80 GB
       ranks    data parallel         ZeRO-1         ZeRO-2  FSDP (ZeRO-3)
       8      107.81 107.81    60.65 60.65 *  37.06 37.06 *  13.48 13.48 *
       64     107.81 107.81    54.75 54.75 *  28.22 28.22 *    1.69 1.69 *
       1,024  107.81 107.81    53.96 53.96 *  27.03 27.03 *    0.11 0.11 *

Outline  1 what moves       2 one buffer, N slices   3 ZeRO-1, ZeRO-2   4 FSDP         5 tensor parallelism
         6 pipeline         7 experts                8 all together    -- stop here on a first reading --
         9 checkpoints     10 accounting            11 planning        12 ranks       13 training
        14 the lecture     15 command line

References  Rajbhandari et al. 2020 (ZeRO), Zhao et al. 2023 (FSDP), Shoeybi et al. 2019 (tensor parallelism),
            Korthikanti et al. 2022 (sequence parallelism), Huang et al. 2018 (GPipe), Fan et al. 2021 and
            Narayanan et al. 2021 (1F1B with a flush: DAPPLE, Megatron-LM), Lepikhin et al. 2020 (GShard).
"""
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import math
import multiprocessing.connection
import os
import shutil
import signal
import statistics
import sys
import threading
import time
from fractions import Fraction

import bpe
import model as M                                          # before torch: it sets how CPU threads wait

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.profiler import profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

# N ranks in a group (not heads), r this one; other letters as in model.py. A collective is a call that all of
# them make together. Bytes sent: by one rank, on the ring of ddp.py: in one round, (N-1)/N of the tensor.


# --- 1. what moves: three collectives, a counter, and the baseline ------------------------------------------

def all_gather(whole, mine, group=None, async_op=False):
    """whole (N*s) <- mine (s) of all ranks; `mine` may be this rank's slice of `whole`. Sends (N-1) s."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renamed it
    return gather(whole, mine, group=group, async_op=async_op)


def reduce_scatter(mine, whole, group=None):
    """mine (s) <- the sum over ranks of slice r of `whole` (N*s). Sends (N-1) s.
    Starts it, and returns the function that waits for the result."""
    if whole.is_cuda:
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return scatter(mine, whole, group=group, async_op=True).wait
    # gloo's own, on CPUs, took longer than its all-reduce of twice the bytes (8 MB, two ranks: 16 and 9 ms).
    # Here slices travel to their owners, who add them up in the order of ranks: the same sum in every run.
    arrived = torch.empty_like(whole)
    work = dist.all_to_all_single(arrived, whole, group=group, async_op=True)

    def finish():
        work.wait()
        torch.sum(arrived.view(dist.get_world_size(group), -1), 0, out=mine)
    return finish


def all_reduce_mean(tensors, group=None):
    """The mean over ranks of every tensor, in place, through one flat buffer. Sends 2 (N-1)/N of it."""
    if tensors:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        for t, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(mean.view_as(t))


class CountBytes(TorchDispatchMode):
    """with CountBytes() as sent: ...  Then sent.total is what this rank sent, in bytes, an exact fraction.
    Sees each collective on its way to the backend, and adds `rounds` times (N-1)/N of its whole tensor."""
    total = 0
    rounds = {"allreduce": 2, "allgather_base": 1, "reduce_scatter_base": 1, "alltoall_base": 1}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d":
            self.total += self.bytes_of(op._schema.name.removeprefix("c10d::").strip("_"), args)
        return op(*args, **(kwargs or {}))

    def bytes_of(self, name, args):
        if name == "send":
            return args[0][0].nbytes
        if name not in self.rounds:
            return 0
        group = dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)
                                             and str(a._type()).endswith("ProcessGroup")))
        if name == "alltoall_base" and args[4]:            # rows to each rank, unequal: all but its own leave
            return args[1].nbytes * (1 - Fraction(args[4][group.rank()], max(1, sum(args[4]))))
        tensors = args[0] if isinstance(args[0], (list, tuple)) else args[:2]
        whole = max(t.nbytes for t in tensors)             # of input and output, where their sizes differ
        return whole * Fraction(self.rounds[name] * (group.size() - 1), group.size())


class DataParallel:
    """Stage 0, the baseline (ddp.py does it well): whole weights, gradients averaged after backward. `alone`:
    parameters that other ranks do not have (experts). Every stage below has these, too:

    finish_gradient_synchronization()   call it after the last micro-batch's backward pass or, where
                                        every_backward is True, after each one's
    pieces   (parameter, first, piece): this rank updates `piece`, numbers first, first+1, ... of parameter
    copies   those parameters that every rank of the group updates, whole
    """
    every_backward = False

    def __init__(self, params, group, alone=()):
        self.pieces, self.group = [(p, 0, p) for p in params], group
        self.copies = {p for p, _, _ in self.pieces} - set(alone)

    def finish_gradient_synchronization(self):
        grads = [p.grad for p, _, _ in self.pieces if p.grad is not None and p in self.copies]
        all_reduce_mean(grads, self.group)


# --- 2. one buffer, N slices --------------------------------------------------------------------------------

class Flat:
    """Tensors end to end in one buffer, padded to N equal slices; rank r owns slice r. All of ZeRO is this:
    stage 1 owns the optimizer state of its slice, stage 2 its gradients too, stage 3 (FSDP) its weights.
    One collective moves a buffer, whatever the number of tensors.

    A slice begins and ends in the middle of a matrix. Adam does not mind: it treats each number alone.
    whole=True keeps tensors whole for optimizers that look at a matrix (Muon); slices are then as long as
    the fullest rank needs, and little is gained where one tensor is most of the model.
    """
    def __init__(self, tensors, group=None, whole=False):
        self.tensors, self.group = list(tensors), group
        self.N, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.dtype, self.device = self.tensors[0].dtype, self.tensors[0].device
        sizes = [t.numel() for t in self.tensors]
        self.size = -(-sum(sizes) // self.N)               # of a slice, rounded up
        self.offsets = [0, *itertools.accumulate(sizes)][:-1]                # where each tensor begins
        if whole:                                          # the largest first, each to the emptiest rank
            load, place = [0] * self.N, {}                 # place {tensor: (rank, where in its slice)}
            for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
                r = load.index(min(load))
                place[i] = r, load[r]
                load[r] += sizes[i]
            self.size = max(load)
            self.offsets = [place[i][0] * self.size + place[i][1] for i in range(len(sizes))]
        self.pieces, self.mean = [], None                  # see DataParallel; this slice's mean gradient

    def buffer(self, dtype=None):
        """Uninitialised: nobody uses what comes of the padding."""
        return torch.empty(self.N * self.size, dtype=dtype or self.dtype, device=self.device)

    def views(self, buffer):
        """The tensors as they lie in the buffer."""
        return [buffer[o:o + t.numel()].view(t.shape) for o, t in zip(self.offsets, self.tensors)]

    def mine(self, buffer):
        return buffer[self.rank * self.size:][:self.size]

    def parts(self, mine):
        """For each tensor (first, part): part is what this rank's slice `mine` holds of it, numbers first,
        first+1, ... of the tensor, perhaps none. A whole tensor keeps its shape."""
        begin, found = self.rank * self.size, []
        for offset, t in zip(self.offsets, self.tensors):
            low, high = max(offset, begin), min(offset + t.numel(), begin + self.size)
            part = mine[low - begin:high - begin] if low < high else mine[:0]
            found.append((max(0, low - offset), part.view(t.shape) if part.numel() == t.numel() else part))
        return found

    @torch.no_grad()
    def share(self):
        """A buffer with the tensors of the group's first rank, on all ranks."""
        buffer = self.buffer()
        for view, t in zip(self.views(buffer), self.tensors):
            view.copy_(t)
        dist.broadcast(buffer, group=self.group, group_src=0)
        return buffer

    @torch.no_grad()
    def start_mean(self, grads):
        """Start the reduce-scatter of one gradient a tensor (None is 0) -> a function that waits, and returns
        this rank's slice of their mean. The sum is in the master weights' dtype, fp32 in this file."""
        buffer = self.buffer()
        for view, g in zip(self.views(buffer), grads):
            view.copy_(g) if g is not None else view.zero_()
        mine = buffer.new_empty(self.size)
        wait = reduce_scatter(mine, buffer, self.group)

        def finish():
            wait()
            return mine.div_(self.N)
        return finish

    def take(self, mean):
        """Add `mean`, of this rank's slice, to .grad of its pieces: views of one buffer, self.mean."""
        cleared = all(piece.grad is None for _, _, piece in self.pieces)
        self.mean = mean if cleared else self.mean.add_(mean)
        for (_, _, piece), (_, part) in zip(self.pieces, self.parts(self.mean)):
            piece.grad = part if piece.requires_grad else None


class Reducer:
    """Gradients travel while backward computes: a hook takes each parameter off `missing`, and a buffer with
    none missing sends its gradients to their owners and frees them. At most two buffers are `flying`."""
    def __init__(self):
        self.flying = []

    def watch(self, flat):
        flat.missing = {p for p in flat.tensors if p.requires_grad}
        for p in flat.missing:
            p.register_post_accumulate_grad_hook(functools.partial(self.arrived, flat))

    def arrived(self, flat, p):
        flat.missing.discard(p)
        if not flat.missing:
            self.send(flat)

    def send(self, flat):
        self.flying.append((flat, flat.start_mean([p.grad for p in flat.tensors])))
        flat.missing = {p for p in flat.tensors if p.requires_grad}
        for p in flat.tensors:
            p.grad = None
        self.land(all_but=1)                               # wait for the buffer before this one

    def land(self, all_but=0):
        while len(self.flying) > all_but:
            flat, finish = self.flying.pop(0)
            flat.take(finish())

    def finish(self, flats):
        for flat in flats:
            if any(p.grad is not None for p in flat.tensors):
                self.send(flat)                            # a parameter without a gradient kept it back
        self.land()


def clip_grad_norm(sharded, most):
    """As torch's clip_grad_norm_, which would see this rank's part alone; sharded: an optimizer of section 3,
    or FSDP."""
    N, sums = dist.get_world_size(sharded.group), sharded.pieces[0][2].new_zeros(1, dtype=torch.float64)
    grads = [(x.grad, N if p in sharded.copies else 1) for p, _, x in sharded.pieces if x.grad is not None]
    return clip_all(grads, most, sums, sharded.group)


def clip_all(grads, most, sums, group=None):
    """Scales grads [(gradient, on how many ranks it is), ...] to the l2 norm `most` or less (0: any), all
    together -> what it was. Ranks add up its square in sums[0], and what else is in `sums` on the way."""
    sums[0] = sum(g.double().square().sum() / copies for g, copies in grads)
    dist.all_reduce(sums, group=group)
    norm = sums[0].sqrt().item()
    for g, _ in grads:
        g.mul_(min(1.0, (most or math.inf) / (norm + 1e-6)))
    return norm


# --- 3. ZeRO-1 and ZeRO-2: the optimizer in N parts ---------------------------------------------------------

class ShardedOptimizer(torch.optim.Optimizer):
    """ZeRO-1: rank r keeps optimizer state for, and updates, its slice alone.

        loss.backward()                              every rank on its own tokens
        optimizer.finish_gradient_synchronization()  reduce-scatter: rank r gets the mean of its slice
        clip_grad_norm(optimizer, 1.0)               if at all; not torch's, which sees this rank's slice
        optimizer.step()                             update it, all-gather the weights
    Sends 2 (N-1)/N of the weights, as plain data parallelism does: an all-reduce is these two halves.
    Where all ranks have the mean gradient already, step() alone will do. A parameter that has no gradient
    when gradients are synchronised gets zeros; frozen ones are left out.
    """
    bucket_numbers = 6_250_000                             # 25 MB of fp32, as torch's DDP
    every_backward, copies = False, ()

    def __init__(self, params, optimizer_cls, group=None, whole=False, **settings):
        self.optimizer_cls, self.group, self.whole = optimizer_cls, group, whole
        self.inner, self.buckets, self.reducer = None, [], Reducer()         # inner: updates the pieces
        super().__init__(params, settings)                 # calls add_param_group for every group

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        new = [self.attach(tensors) for tensors in self.bucketed(group["params"])]
        for p in group["params"]:
            if not p.requires_grad:                        # attach() makes the others equal on all ranks
                dist.broadcast(p.data, group=self.group, group_src=0)
        settings = dict(group, params=[x for b in new for _, _, x in b.pieces if x.numel()])
        if self.inner is None:
            self.inner = self.optimizer_cls([settings], **self.defaults)
        else:
            self.inner.add_param_group(settings)
        for k, v in self.inner.param_groups[-1].items():   # what was left to the optimizer's defaults
            group.setdefault(k, v)
        self.buckets += new

    def bucketed(self, params):
        """Trainable parameters in buckets of one dtype and device, the last first: backward reaches those
        first. Whole tensors share one bucket, which is easier to divide evenly."""
        buckets, kind, numbers = [], None, 0
        most = math.inf if self.whole else self.bucket_numbers
        for p in reversed([p for p in params if p.requires_grad]):
            if kind != (p.dtype, p.device) or numbers + p.numel() > most:
                buckets.append([])
                kind, numbers = (p.dtype, p.device), 0
            buckets[-1].append(p)
            numbers += p.numel()
        return buckets

    def attach(self, params):
        """Move weights into one buffer, the same on all ranks, and cut out this rank's pieces."""
        bucket = Flat(params, self.group, self.whole)
        bucket.weights = bucket.share()
        for p, view in zip(params, bucket.views(bucket.weights)):
            p.data = view
        bucket.pieces = [(p, first, nn.Parameter(part)) for p, (first, part)
                         in zip(params, bucket.parts(bucket.mine(bucket.weights)))]
        return bucket

    @property
    def pieces(self):
        """(parameter, first, piece) of all buckets; some pieces are empty."""
        return [x for b in self.buckets for x in b.pieces]

    def finish_gradient_synchronization(self):
        for b in self.buckets:
            mean = b.start_mean([p.grad for p in b.tensors])()
            for (p, first, _), (_, part) in zip(b.pieces, b.parts(mean)):    # the rest of p.grad is of no use
                if p.grad is None or not p.grad.is_contiguous():
                    p.grad = torch.zeros_like(p)
                p.grad.view(-1)[first:first + part.numel()] = part.flatten()
        self.give_gradients()

    def give_gradients(self):
        """Each piece gets its part of its parameter's gradient, without a copy where that is contiguous."""
        for p, first, piece in self.pieces:
            piece.grad = None if p.grad is None else \
                p.grad.reshape(-1)[first:first + piece.numel()].view_as(piece)

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        self.give_gradients()
        for inner, group in zip(self.inner.param_groups, self.param_groups):   # a schedule changes the outer
            inner.update({k: v for k, v in group.items() if k != "params"})
        self.inner.step()
        self.gather_weights()
        return loss

    def gather_weights(self):
        for work in [all_gather(b.weights, b.mine(b.weights), b.group, async_op=True) for b in self.buckets]:
            work.wait()

    def zero_grad(self, set_to_none=True):
        """Clears the gradients of all parameters, also of those that other ranks update."""
        super().zero_grad(set_to_none)
        for _, _, piece in self.pieces:
            piece.grad = None

    def state_dict(self):
        """What the unsharded optimizer would write, on the CPU. Every rank must call it and gets all of it,
        pickled: for models that fit one rank; others use section 9."""
        params = [p for g in self.param_groups for p in g["params"]]
        index, state = {p: i for i, p in enumerate(params)}, {}
        mine = [(index[p], first if per_number(v, piece) else None, k, v.cpu() if torch.is_tensor(v) else v)
                for p, first, piece in self.pieces for k, v in self.inner.state.get(piece, {}).items()]
        ranks = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(ranks, mine, group=self.group)
        for i, first, k, v in itertools.chain(*ranks):
            values = state.setdefault(i, {})
            if first is None:                              # Adam's count of steps: the same in all pieces
                values[k] = v
                continue
            if k not in values:
                values[k] = v.new_zeros(params[i].shape)
            values[k].view(-1)[first:first + v.numel()] = v.flatten()
        return {"state": state, "param_groups": super().state_dict()["param_groups"]}

    def load_state_dict(self, saved):
        """What state_dict wrote at any world size, or what the unsharded optimizer did."""
        params = [p for g in self.param_groups for p in g["params"]]
        index = {p: i for i, p in enumerate(params)}
        for group, old in zip(self.param_groups, saved["param_groups"], strict=True):
            group.update({k: v for k, v in old.items() if k != "params"})
        put_state(self.inner, {
            piece: {k: v.reshape(-1)[first:first + piece.numel()].view_as(piece).clone()
                    if per_number(v, p) else copy.deepcopy(v) for k, v in saved["state"][index[p]].items()}
            for p, first, piece in self.pieces if piece.numel() and index[p] in saved["state"]})


def per_number(state, p):
    """A state with one number a weight, such as Adam's averages; not its count of steps."""
    return torch.is_tensor(state) and state.dim() > 0 and state.numel() == p.numel()


def put_state(optimizer, state):
    """state {parameter: values} into an optimizer. Its own load_state_dict knows which device each value must
    be on: a fused AdamW on a GPU keeps its count of steps there, too."""
    saved, params = optimizer.state_dict(), [p for g in optimizer.param_groups for p in g["params"]]
    saved["state"] = {i: state[p] for i, p in enumerate(params) if p in state}
    optimizer.load_state_dict(saved)


class ZeRO2(ShardedOptimizer):
    """Gradients go to their owner as soon as backward has a bucket of them, and are freed: no rank ever holds
    them all. Call finish_gradient_synchronization() after every backward pass: with m micro-batches gradients
    travel m times, weights once: (m+1) (N-1)/N of their bytes, the price of not keeping the gradients' sum.
    All ranks must use the same parameters in a pass, or the collectives of two ranks would not match."""
    every_backward = True

    def attach(self, params):
        bucket = super().attach(params)
        self.reducer.watch(bucket)
        return bucket

    def finish_gradient_synchronization(self):
        self.reducer.finish(self.buckets)

    def give_gradients(self):
        pass                                               # Flat.take did


# --- 4. FSDP: the weights in N parts ------------------------------------------------------------------------

class Unit(Flat):
    """The matrices of one layer: this rank's slice of them at rest, all of them while the layer computes.

    At rest the module's parameters are the pieces of that slice: optimizer, clipping and checkpoints see
    nothing else. For the layer's forward and backward pass `full` takes their place: views into the buffer
    `whole`, whose memory is given back in between. Autograd keeps these views from the forward pass; in
    backward they show the same numbers again, because the buffer is filled again.
    """
    def __init__(self, owners, group, compute_dtype):
        """owners: {parameter: [(module, name), ...]}, several where a weight is tied."""
        super().__init__(owners, group)
        self.shard = self.mine(self.share()).clone()                         # the master weights, fp32
        self.whole = self.buffer(compute_dtype)
        self.bytes, trained = self.whole.nbytes, [p.requires_grad for p in self.tensors]
        # .data: to write into `whole` must not look to autograd like a change of what it has kept.
        self.full = [nn.Parameter(v.data, t) for v, t in zip(self.views(self.whole), trained)]
        for (first, part), t in zip(self.parts(self.shard), trained):
            piece = nn.Parameter(part, t)
            self.pieces.append((piece, first, piece))
        self.places = [(i, *place) for i, places in enumerate(owners.values()) for place in places]
        self.tensors = self.full                           # whose shapes and gradients count from now on
        self.work, self.here = None, True                  # the gather under way; has `whole` its memory?
        self.free()

    def gather(self):
        """Start the all-gather. Cast first: bf16 halves what travels."""
        if not self.here:
            self.here = True
            self.whole.untyped_storage().resize_(self.bytes)
            self.work = all_gather(self.whole, self.shard.to(self.whole.dtype), self.group, async_op=True)

    def use(self):
        self.gather()
        self.put(self.full)

    def free(self):
        self.put([piece for piece, _, _ in self.pieces])
        self.here = self.in_backward = False
        self.whole.untyped_storage().resize_(0)

    def start_mean(self, grads):
        """All gradients are there: backward is done with these weights. A unit with frozen parameters cannot
        tell, and waits for finish_gradient_synchronization()."""
        if all(f.requires_grad for f in self.full):
            self.free()
        return super().start_mean(grads)

    def put(self, tensors):
        """Make these the layer's parameters."""
        if self.work is not None:                          # gathered ahead, used now or not at all
            self.work.wait()
            self.work = None
        for i, module, name in self.places:
            module._parameters[name] = tensors[i]


class FSDP(nn.Module):
    """ZeRO-3, or fully sharded data parallelism: rank r holds slice r of all matrices, their gradients and
    their optimizer state, 16/N bytes a parameter with AdamW. A layer's matrices are gathered while the layer
    before it computes (in backward, the one after) and freed after use: at most two layers are whole.
    Sends 3 (N-1)/N of the weights: gather, gather again, reduce-scatter; half as much again as ZeRO-1.

        model = FSDP(model)
        optimizer = AdamW(model.parameters())
        loss.backward()
        model.finish_gradient_synchronization()              after every backward pass
        clip_grad_norm(model, 1.0)                           if at all; not torch's, which sees a part
        optimizer.step()
    Norms and biases, a thousandth of a model, stay whole, and their gradients are averaged. compute_dtype:
    weights are cast before they travel, and autocast runs the products; master weights, gradients and steps
    stay fp32. A layer's first argument and its result are tensors. What torch's fully_shard adds: hybrid
    sharding, CPU offload, start on the meta device.
    """
    every_backward = True

    def __init__(self, module, compute_dtype=None, group=None):
        super().__init__()
        self.module, self.group, self.compute_dtype = module, group, compute_dtype
        self.units, self.reducer, owners, unit_of, order = [], Reducer(), {}, {}, []
        for m in module.modules():
            for name, p in m.named_parameters(recurse=False):
                owners.setdefault(p, []).append((m, name))
        layers = [(layer, [p for p in layer.parameters() if p.dim() > 1]) for layer in layers_of(module)]
        for layer, matrices in layers:                     # listed before any Unit replaces parameters
            new = {p: owners[p] for p in matrices if p not in unit_of}
            if new:
                unit = Unit(new, group, compute_dtype)
                self.units.append(unit)
                unit_of.update(dict.fromkeys(new, unit))
                self.reducer.watch(unit)
            order += [(layer, unit) for unit in dict.fromkeys(unit_of[p] for p in matrices)]  # two if tied
        units = [unit for _, unit in order]                # as forward meets them
        for i, (layer, unit) in enumerate(order):          # its neighbours: [unit], or [] at the two ends
            self.surround(layer, unit, units[i + 1:i + 2], units[i - 1:i])
        self.copies = {p: None for p in owners if p not in unit_of}          # in order, unlike a set
        for p in self.copies:
            dist.broadcast(p.data, group=group, group_src=0)
        self.pieces = [x for u in self.units for x in u.pieces] + [(p, 0, p) for p in self.copies]

    def surround(self, layer, unit, following, preceding):
        """Hooks: the unit is whole while the layer computes; the next one travels meanwhile."""
        def before(*_):
            unit.use()
            if not unit.in_backward:
                for ahead in following:
                    ahead.gather()

        def after(module, args, output):
            if not unit.in_backward:                       # a checkpointed layer runs again inside backward
                unit.free()
            if not args[0].is_floating_point():            # ids: an embedding. The stream stays fp32
                output = output.to(unit.dtype)
            if output.requires_grad:                       # the layer's backward begins with its gradient
                output.register_hook(before_backward)
            return output

        def before_backward(grad):
            unit.use()
            unit.in_backward = True
            for ahead in preceding:
                ahead.gather()
        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)

    def forward(self, *args, **kwargs):
        device = next(self.parameters()).device.type
        with torch.autocast(device, self.compute_dtype) if self.compute_dtype else contextlib.nullcontext():
            return self.module(*args, **kwargs)

    def finish_gradient_synchronization(self):
        """Afterwards .grad of the pieces has the mean added to it, and no layer is whole."""
        self.reducer.finish(reversed(self.units))
        for unit in self.units:
            if unit.here:
                unit.free()
        all_reduce_mean([p.grad for p in self.copies if p.grad is not None], self.group)

    def gather_full_params(self):
        """{name: whole fp32 tensor}, on every rank, with the names of the wrapped module."""
        names = {p: n for n, p in self.module.named_parameters()}
        found = {names[p]: p.detach().clone() for p in self.copies}
        for unit in self.units:
            whole = unit.buffer()
            all_gather(whole, unit.shard, self.group)
            found.update({names[p]: v for (p, _, _), v in zip(unit.pieces, unit.views(whole))})
        return {n: found[n] for n in names.values()}


def layers_of(module):
    """What FSDP gathers at once: a block (an entry of a ModuleList), or a module with matrices of its own."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    own = [module] if any(p.dim() > 1 for p in module.parameters(recurse=False)) else []
    return own + [layer for child in module.children() for layer in layers_of(child)]


# --- 5. tensor parallelism: every matrix in t parts ---------------------------------------------------------
# y = x W^T in parts: by rows of W (outputs), each rank has a part of y; by columns (inputs), each rank has a
# term of a sum. Rows, then columns: a feed-forward, or attention by heads, needs one sum at its end. Backward
# goes through the transpose of each step: a sum where all read the same x, a copy where terms were summed.

class Collective(torch.autograd.Function):
    """there(x) forward, back(gradient) backward: a collective and its transpose."""
    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.back(grad), None, None


def add_up(x, group):
    total = x.clone(memory_format=torch.contiguous_format)                   # all_reduce works in place
    dist.all_reduce(total, group=group)
    return total


def gather_tokens(x, group):
    """(B,T/t,D) -> (B,T,D): every rank's part of the sequence."""
    parts = x.new_empty(dist.get_world_size(group), *x.shape)                # (t,B,T/t,D)
    all_gather(parts.flatten(0, 1), x.contiguous(), group)
    return parts.transpose(0, 1).flatten(1, 2)


def scatter_tokens(x, group):
    """(B,T,D) -> (B,T/t,D): this rank's part of the sequence, summed over ranks."""
    parts = x.unflatten(1, (dist.get_world_size(group), -1)).transpose(0, 1).contiguous()        # (t,B,T/t,D)
    mine = torch.empty_like(parts[0])
    reduce_scatter(mine.view(-1), parts.view(-1), group)()
    return mine


def split_of(name, shape, c, part, parts):
    """Which part of a weight a rank holds: (dimension, indices along it), or None for all of it.

    wqkv, w1, w3      rows ("column parallel" if W is (d_in,d_out)): wqkv by whole heads, of q, k and v each
    wo, w2            columns ("row parallel"); their biases whole, added once after the sum
    embedding, head   rows: a part of the vocabulary
    ffn.w1, w2, w3    of a mixture: whole experts
    """
    *_, layer, kind = name.split(".")
    if layer in ("wqkv", "w1", "w3", "embedding", "head") or is_expert(name):
        dim = 0
    elif layer in ("wo", "w2") and kind == "weight":
        dim = 1
    else:
        return None
    heads, kv_heads, H = c.num_heads, c.kv_heads, c.head_dim
    sections = [heads * H, kv_heads * H, kv_heads * H] if layer == "wqkv" else [shape[dim]]
    starts = itertools.accumulate(sections, initial=0)
    return dim, torch.cat([s + torch.arange(n).tensor_split(parts)[part] for s, n in zip(starts, sections)])


def is_expert(name):
    return name.endswith((".w1", ".w2", ".w3"))            # stacked matrices; others end in .weight


def cut_parameters(model, part, parts, fits=lambda name: True):
    """Keep this rank's part of every parameter that splits (and fits) -> {name: split}."""
    splits = {}
    for name, p in model.named_parameters():
        split = split_of(name, p.shape, model.config, part, parts) if fits(name) else None
        if split:
            splits[name], (dim, index) = split, split
            p.data = p.data.index_select(dim, index.to(p.device))
    return splits


class RowLinear(M.Linear):
    """y = sum over ranks of x_r W_r^T (`leave` adds up), then the bias."""
    def forward(self, x):
        y = self.leave(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias


class VocabularyEmbedding(M.Embedding):
    """Rows first, first+1, ... of the table; other ids give 0 here, and their row on another rank."""
    def forward(self, ids):
        local = ids - self.first
        here = (local >= 0) & (local < len(self.weight))
        return self.leave(self.weight[local.clamp(0, len(self.weight) - 1)] * here[..., None])


def tensor_parallel(model, group, sequence=True):
    """Keep this rank's part of every matrix -> {name: split} (Shoeybi et al. 2019). A block then talks where
    the stream enters attention or feed-forward (an all-reduce of its gradient) and where it leaves (an
    all-reduce of terms): four a layer.

    sequence=True: outside of these products the stream is split by tokens, (B,T/t,D), so that norms and
    residuals are not computed and stored t times over (Korthikanti et al. 2022). The all-reduces become pairs
    of all-gather and reduce-scatter: the same bytes.
    """
    c, t, r = model.config, dist.get_world_size(group), dist.get_rank(group)
    check_tensor_parallel(c, t, sequence)
    add = functools.partial(add_up, group=group)
    gather, scatter = (functools.partial(f, group=group) for f in (gather_tokens, scatter_tokens))
    same = lambda x: x.view_as(x)
    into, out_of = (gather, scatter) if sequence else (same, add)
    enter = lambda x: Collective.apply(x, into, out_of)
    leave = lambda x: Collective.apply(x, out_of, into)
    splits = cut_parameters(model, r, t)
    for name, p in model.named_parameters():               # unsplit gain or bias, of some tokens or heads
        if name not in splits and p.dim() == 1 and (sequence or "_norm." in name):
            p.register_hook(add)
    for block in model.blocks:
        block.mixer.c = dataclasses.replace(c, num_heads=c.num_heads // t, num_kv_heads=c.kv_heads // t,
                                            d_head=c.head_dim)
        for part, last in ((block.mixer, block.mixer.wo), (block.ffn, block.ffn.w2)):
            part.register_forward_pre_hook(lambda _, args: (enter(args[0]), *args[1:]))
            last.__class__, last.leave = RowLinear, leave  # the same parameters, another forward
    model.embedding.__class__, model.embedding.leave = VocabularyEmbedding, leave
    model.embedding.first = splits["embedding.weight"][1][0].item()
    if model.position is not None and sequence:            # (T,D): used in part, its gradient gathered whole
        mine = lambda y: y.chunk(t, 1)[r]
        model.position.register_forward_hook(lambda _, args, y: Collective.apply(y[None], mine, gather))
    model.head.register_forward_pre_hook(lambda _, args: (enter(args[0]),))
    return splits


def check_tensor_parallel(c, t, sequence):
    fits = [n for n in range(1, c.kv_heads + 1) if c.num_heads % n == c.kv_heads % n == 0]
    if t not in fits:
        raise ValueError(f"{c.num_heads} heads and {c.kv_heads} key/value heads do not split over --tp {t} "
                         f"ranks: allowed are {', '.join(map(str, fits))}")
    if sequence and c.context_length % t:
        raise ValueError(f"context_length={c.context_length} does not split over --tp {t} ranks: "
                         f"try --context_length {t * max(1, c.context_length // t)}")
    if c.mixer != "attention" or c.layers or c.num_experts or c.mtp or c.position == "sinusoidal":
        raise ValueError("--tp splits attention and dense feed-forwards: drop --mixer, --layers, "
                         "--num_experts, --mtp and --position sinusoidal, or use --stage 3")


def vocabulary_parallel_loss(logits, targets, group, first):
    """Cross-entropy from logits (B,T,V/t) of ids first, first+1, ...: log sum exp needs the maximum and the
    sum over all ranks, and the target's logit is on one of them: three numbers a token instead of V."""
    logits, targets = logits.flatten(0, -2).float(), targets.flatten() - first
    top = logits.detach().amax(-1)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    z = logits - top[:, None]
    here = (targets >= 0) & (targets < z.shape[-1])
    target = z.gather(-1, targets.clamp(0, z.shape[-1] - 1)[:, None])[:, 0] * here
    terms = torch.stack((z.exp().sum(-1), target))                           # (2,B*T) of this rank's ids
    total, target = Collective.apply(terms, functools.partial(add_up, group=group), lambda grad: grad)
    return (total.log() - target).mean()                   # the same on all ranks: no sum in backward


# --- 6. pipeline parallelism: every rank some layers --------------------------------------------------------

def pipeline_order(kind, stage, stages, micro_batches):
    """What a stage does: a list of ("F", i) and ("B", i), micro-batch i forward and backward.

    gpipe  all forward, then all backward: activations of all m micro-batches wait (Huang et al. 2018)
    1f1b   each backward as soon as it can: at most stages - stage micro-batches wait (Fan et al. 2021)
    In both, a stage works in m of a step's m+p-1 turns, p = stages: the rest, (p-1)/(m+p-1), is the bubble.
    """
    m = micro_batches
    ahead = m if kind == "gpipe" else min(m, stages - 1 - stage)
    order = [("F", i) for i in range(ahead)]
    for i in range(m - ahead):
        order += [("F", ahead + i), ("B", i)]
    return order + [("B", i) for i in range(m - ahead, m)]


class Received(nn.Module):
    """Stands for the embedding on later stages: what the stage before has sent."""
    def forward(self, ids):
        return self.x


class Skip(nn.Module):
    """Stands for a layer of another stage, so that this one's layers keep their numbers and names."""
    def forward(self, x, *_):
        return x


class Pipeline:
    """Stage s of p has L/p consecutive layers; the first also the embedding, the last also norm and head."""
    def __init__(self, model, group, back_group, kind="1f1b", token_parts=1):
        """back_group: the same ranks again. On a GPU, activations down and gradients up must not queue behind
        one another in one communicator. token_parts: t where the stream is (B,T/t,D), else 1."""
        self.model, self.group, self.back_group, self.kind = model, group, back_group, kind
        self.stage, self.stages, c = dist.get_rank(group), dist.get_world_size(group), model.config
        if c.num_layers < self.stages or c.tie_embeddings or c.num_experts or c.mtp or "C" in c.layers:
            raise ValueError(f"--pp {self.stages} needs as many layers (there are {c.num_layers}), and "
                             f"weights and losses that live on one stage: drop --tie_embeddings, "
                             f"--num_experts, --mtp and C in --layers")
        self.first, self.last, self.token_parts = self.stage == 0, self.stage == self.stages - 1, token_parts
        mine = np.array_split(range(c.num_layers), self.stages)[self.stage]
        for i in set(range(c.num_layers)) - set(mine.tolist()):
            model.blocks[i] = Skip()
        if not self.first:
            model.embedding, model.position = Received(), None
            model.config = dataclasses.replace(c, position="none", dropout=0.0)      # done on stage 0
        if not self.last:
            model.norm, model.head = Skip(), Skip()
        self.waited = 0                                    # seconds of the last step

    def receive(self, like, stage, group):
        begin, x = time.perf_counter(), torch.empty_like(like)
        dist.recv(x, group=group, group_src=stage)
        self.waited += time.perf_counter() - begin
        return x

    def run(self, batches, loss_of, autocast=contextlib.nullcontext):
        """batches [(ids, targets), ...], loss_of(features, targets) for the last stage. Leaves the gradients
        of the mean loss; returns that loss on the last stage, 0 elsewhere."""
        kept, sends, total, (B, T) = {}, [], 0.0, batches[0][0].shape
        like = torch.empty(B, T // self.token_parts, self.model.config.d_model, device=batches[0][0].device)
        self.waited = 0
        for what, i in pipeline_order(self.kind, self.stage, self.stages, len(batches)):
            ids, targets = batches[i]
            if what == "F":
                x = None
                if not self.first:
                    x = self.receive(like, self.stage - 1, self.group).requires_grad_()
                    self.model.embedding.x = x
                with autocast():
                    y = self.model.features(ids)
                    y = loss_of(y, targets) / len(batches) if self.last else y
                if self.last:
                    total = total + y.detach()
                else:
                    sends.append((y, dist.isend(y.detach(), group=self.group, group_dst=self.stage + 1)))
                kept[i] = x, y
            else:
                x, y = kept.pop(i)
                y.backward(None if self.last else self.receive(like, self.stage + 1, self.back_group))
                if not self.first:
                    sends.append((x, dist.isend(x.grad, group=self.back_group, group_dst=self.stage - 1)))
        for _, work in sends:                              # a tensor must live until it has left
            work.wait()
        return total


# --- 7. expert parallelism: every rank some experts ---------------------------------------------------------

def expert_parallel(model, group):
    """Rank r keeps experts r E/N, ... of every mixture -> {name: split}. A visit, a token's row for one of
    its experts, travels there and back: two all-to-alls forward, two backward. The rest is data parallel;
    capacity and balance are those of a rank's own tokens (the groups of GShard, Lepikhin et al. 2020)."""
    c, N = model.config, dist.get_world_size(group)
    if not c.num_experts or c.num_experts % N:
        raise ValueError(f"num_experts={c.num_experts} does not split over {N} ranks: "
                         f"try --num_experts {4 * N}")
    splits = cut_parameters(model, dist.get_rank(group), N, is_expert)
    for name, p in model.named_parameters():
        if name in splits:
            p.register_hook(lambda grad: grad / N)         # the tokens of all ranks came here: sum -> mean
    for moe in model.modules():
        if isinstance(moe, M.MoE):
            moe.experts = functools.partial(remote_experts, moe, group)
    return splits


def exchange(x, to, fro, group):
    """Rows (sum(to),D), to[r] for rank r -> rows (sum(fro),D), fro[r] from rank r; backward the other way."""
    def move(x, to, fro):
        y = x.new_empty(sum(fro), x.shape[-1])
        dist.all_to_all_single(y, x.contiguous(), fro, to, group=group)
        return y
    return Collective.apply(x, lambda x: move(x, to, fro), lambda grad: move(grad, fro, to))


def remote_experts(moe, group, x, counts):
    """Visits (n,D) sorted by expert, counts (E,) -> (n,D): MoE.experts, done where the experts are."""
    sent = counts.view(dist.get_world_size(group), -1)                       # (N,E/N) mine, by rank, expert
    arrived = torch.empty_like(sent)                                         # (N,E/N) here, by rank, expert
    dist.all_to_all_single(arrived, sent, group=group)
    to, fro = sent.sum(1).tolist(), arrived.sum(1).tolist()
    rows = exchange(x, to, fro, group)                                       # by rank, then expert
    expert = torch.arange(arrived.shape[1], device=x.device).repeat(len(arrived))
    order = expert.repeat_interleave(arrived.flatten()).argsort(stable=True)  # by expert, then rank
    y = M.MoE.experts(moe, rows[order], arrived.sum(0))
    return exchange(y[order.argsort()], fro, to, group)                      # argsort: the inverse order


# --- 8. all together: dp x pp x tp --------------------------------------------------------------------------

def make_mesh(tp, pp, timeout=None):
    """The ranks as a grid dp x pp x tp: dp replicas of the model, each on pp x tp ranks. tp talks most: its
    ranks are neighbours, in one node. -> {axis: (group, its size, my place)}; "back" is pp once more.
    timeout: the world's, seconds, which torch does not hand on to its groups (they would wait 30 minutes)."""
    rank, world, limit = dist.get_rank(), dist.get_world_size(), timeout and datetime.timedelta(0, timeout)
    if world % (tp * pp):
        raise ValueError(f"{world} ranks are not a multiple of --tp {tp} x --pp {pp}")
    grid, mesh = np.arange(world).reshape(-1, pp, tp), {}
    for name, axis in (("dp", 0), ("pp", 1), ("tp", 2), ("back", 1)):
        if grid.shape[axis] == 1 and name != "dp":
            mesh[name] = None, 1, 0
            continue
        for ranks in np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis]).tolist():
            everyone = len(ranks) == world and name != "back"
            group = dist.group.WORLD if everyone else dist.new_group(ranks, limit)    # all make all groups
            if rank in ranks:
                mesh[name] = group, len(ranks), ranks.index(rank)
    return mesh


class Trainer:
    """A model laid out over all ranks, its optimizer, and one step of training.

    Every rank builds the whole model, the same one, and keeps its part: each layout starts from the same
    weights. (One that does not fit a host's memory would have to be initialised part by part.)
    """
    def __init__(self, model, stage=0, tp=1, pp=1, ep=False, sequence=True, kind="1f1b", compute_dtype=None,
                 timeout=None, optimizer_cls=torch.optim.AdamW, **settings):
        if stage not in range(4) or (pp > 1 and stage > 1) or (ep and (stage or tp > 1 or pp > 1)):
            raise ValueError(f"--stage {stage} --tp {tp} --pp {pp}{' --ep' * ep} do not go together: stage 0 "
                             f"to 3 with --tp, 0 or 1 with --pp (the others would send weights or gradients "
                             f"once a micro-batch), 0 with --ep")
        self.model, self.config, self.compute_dtype, self.steps_done = model, model.config, compute_dtype, 0
        self.asked = self.stop = False                     # is this rank asked to end? is any? see step()
        self.shapes = {n: t.shape for n, t in (*model.named_parameters(), *model.named_buffers())}
        self.mesh = make_mesh(tp, pp, timeout)
        self.tp, self.dp, group = tp, self.mesh["dp"][1], self.mesh["dp"][0]
        self.split = tensor_parallel(model, self.mesh["tp"][0], sequence) if tp > 1 else {}
        self.split |= expert_parallel(model, group) if ep else {}
        self.first_id = model.embedding.first if tp > 1 else 0               # of this rank's vocabulary
        self.pipeline = Pipeline(model, self.mesh["pp"][0], self.mesh["back"][0], kind,
                                 tp if sequence else 1) if pp > 1 else None
        if stage in (1, 2):
            cls = ShardedOptimizer if stage == 1 else ZeRO2
            self.sync = self.optimizer = cls(list(model.parameters()), optimizer_cls, group, **settings)
        else:
            alone = [p for n, p in model.named_parameters() if ep and is_expert(n)]
            self.sync = (FSDP(model, compute_dtype, group) if stage else
                         DataParallel(model.parameters(), group, alone))
            self.optimizer = optimizer_cls(model.parameters(), **settings)   # with FSDP these are pieces
        self.updater = getattr(self.optimizer, "inner", self.optimizer)      # which has the pieces' state

    def loss(self, ids, targets):
        if self.tp > 1:
            return self.loss_of(self.model.features(ids), targets)
        return M.training_loss(self.model, ids, targets)[1]

    def loss_of(self, features, targets):
        logits = M.soft_cap(self.model.head(features), self.config.logit_softcap)
        if self.tp > 1:
            return vocabulary_parallel_loss(logits, targets, self.mesh["tp"][0], self.first_id)
        return M.lm_loss(logits, targets)[0]

    def gradients(self, ids, targets, micro_batch=0):
        """Forward and backward over this replica's sequences (B/dp,T) -> their mean loss (0 on all stages of
        a pipeline but the last). What this rank updates then has the mean gradient of the whole batch."""
        size, total = micro_batch or len(ids), 0.0
        if len(ids) % size:
            raise ValueError(f"{len(ids)} sequences a rank are no multiple of --micro_batch {size}")
        batches, autocast = list(zip(ids.split(size), targets.split(size))), contextlib.nullcontext
        if self.compute_dtype:                             # of forward passes; backward and its hooks follow
            autocast = functools.partial(torch.autocast, ids.device.type, self.compute_dtype)
        if self.pipeline:
            total = self.pipeline.run(batches, self.loss_of, autocast)
        for x, y in batches if not self.pipeline else ():
            with autocast():
                loss = self.loss(x, y) / len(batches)
            loss.backward()
            total = total + loss.detach()
            if self.sync.every_backward:
                self.sync.finish_gradient_synchronization()
        if not self.sync.every_backward:
            self.sync.finish_gradient_synchronization()
        return total

    def pieces(self):
        """(name, first, tensor, axes) of all that this rank updates: numbers first, first+1, ... of its part
        of a parameter, and the axes of the mesh along which other ranks hold, and update, the same."""
        names = {p: n for n, p in self.model.named_parameters()}
        for p, first, piece in self.sync.pieces:
            if piece.numel():
                whole = self.tp > 1 and names[p] not in self.split
                yield names[p], first, piece, ["dp"] * (p in self.sync.copies) + ["tp"] * whole

    def step(self, ids, targets, micro_batch=0, lr=None, clip=1.0):
        """One optimizer step on this replica's share of the batch -> (loss, gradient norm) of all of it. The
        norm is over all parameters: every rank adds up its pieces, divided by the number of their copies."""
        loss = torch.as_tensor(self.gradients(ids, targets, micro_batch), device=ids.device).double()
        grads = [(p.grad, math.prod(self.mesh[a][1] for a in axes))
                 for _, _, p, axes in self.pieces() if p.grad is not None]
        sums = torch.stack((0 * loss, loss / (self.dp * self.tp), loss.new_tensor(self.asked)))
        norm = clip_all(grads, clip, sums)
        loss, self.stop = sums[1].item(), sums[2].item() > 0
        if not math.isfinite(loss + norm):
            raise FloatingPointError(f"loss {loss}, gradient norm {norm}: try --resume with a lower --lr")
        for group in self.optimizer.param_groups if lr is not None else ():
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps_done += 1
        moes = [m for m in self.model.modules() if isinstance(m, M.MoE) and m.bias is not None]
        if moes:                                           # balance=bias: must stay the same on all ranks
            all_reduce_mean([m.load for m in moes], self.mesh["dp"][0])
            self.model.balance_experts()
        return loss, norm


# --- stop here on a first reading ---------------------------------------------------------------------------
# You have seen every layout. What follows saves them, predicts what they cost, and runs them.


# --- 9. sharded checkpoints ---------------------------------------------------------------------------------
# Every rank writes what it updates, and nothing else: no rank ever holds the whole. Each piece says where in
# the whole tensor its numbers belong, so that any layout on any number of ranks resumes what any other wrote.
PATIENT = datetime.timedelta(hours=12)

def positions(shape, split, first, count):
    """Where numbers first .. first+count-1 of a rank's part of a tensor are in the whole one, flat."""
    if split is None:
        return slice(first, first + count)
    dim, index = split
    return torch.arange(math.prod(shape)).view(shape).index_select(dim, index).flatten()[first:first + count]


def write_file(path, write):
    """write(file) to a temporary file, flushed to disk and renamed: a crash leaves the old one or the new."""
    try:
        with open(f"{path}.tmp", "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as e:                   # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            os.unlink(f"{path}.tmp")
        raise OSError(f"could not save {path}: {M.first_line(e)}; the checkpoint before it is unharmed. Free "
                      f"some space, or give an --out that all hosts see, then --resume") from e


def patient_barrier(store):
    """Disks are slow, and a collective has --timeout seconds."""
    arrived, N = store.add("arrived", 1), dist.get_world_size()              # in all barriers so far
    if arrived % N == 0:
        store.set(f"barrier {arrived // N}", "")
    store.wait([f"barrier {-(-arrived // N)}"], PATIENT)


def save_sharded(folder, trainer, store, **extra):
    """folder/step-S/rank-R-of-N.pt, and whole.json last: without it, or with a file missing or of another
    size, there is no checkpoint. Then older ones are removed."""
    rank, world = dist.get_rank(), dist.get_world_size()
    path = os.path.join(folder, f"step-{trainer.steps_done:08}")
    if rank == 0:
        os.makedirs(path, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):       # of a run that was resumed from before this step
            os.unlink(os.path.join(path, "whole.json"))
    patient_barrier(store)
    pieces = {n: dict(first=0, count=t.numel(), split=None, values={"weight": t.flatten()})
              for n, t in trainer.model.named_buffers() if rank == 0}
    for name, first, p, axes in trainer.pieces():
        if all(trainer.mesh[axis][2] == 0 for axis in axes):                 # of equal copies one is enough
            values = {k: v.detach().flatten().to("cpu", copy=True) if per_number(v, p) else v
                      for k, v in {"weight": p, **trainer.updater.state[p]}.items()}
            pieces[name] = dict(first=first, count=p.numel(), split=trainer.split.get(name), values=values)
    files = [f"rank-{r}-of-{world}.pt" for r in range(world)]
    write_file(os.path.join(path, files[rank]), lambda f: torch.save(pieces, f))
    patient_barrier(store)
    if rank == 0:
        about = dict(extra, step=trainer.steps_done, config=dataclasses.asdict(trainer.config),
                     shapes={n: list(shape) for n, shape in trainer.shapes.items()},
                     files={f: os.path.getsize(os.path.join(path, f)) for f in files})
        write_file(os.path.join(path, "whole.json"), lambda f: f.write(json.dumps(about).encode()))
        for name in os.listdir(folder):
            if name.startswith("step-") and name != os.path.basename(path):
                shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    patient_barrier(store)


def checkpoints(folder):
    """(path, what whole.json says) of the whole ones, the newest first."""
    found = []
    for name in sorted(os.listdir(folder) if os.path.isdir(folder) else (), reverse=True):
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):     # not whole
            with open(os.path.join(path, "whole.json")) as f:
                about = json.load(f)
            sizes = {file: os.path.getsize(os.path.join(path, file)) for file in about["files"]}
            if sizes == about["files"] and {"step", "config", "shapes"} <= set(about):
                found.append((path, about))
    return found


class ShardedCheckpoint:
    """The newest whole checkpoint in a folder, read tensor by tensor; the files stay on disk (mmap)."""
    def __init__(self, folder):
        found = checkpoints(folder)
        if not found:
            raise FileNotFoundError(f"no whole checkpoint in {folder}: make one with  "
                                    f"python zero.py --steps 100 --out {os.path.dirname(folder) or '.'}")
        self.path, self.about = found[0]
        try:
            self.ranks = [torch.load(os.path.join(self.path, name), "cpu", mmap=True, weights_only=True)
                          for name in self.about["files"]]
        except Exception as e:                             # a damaged archive fails anywhere in the reader
            raise ValueError(f"{self.path} is damaged ({M.first_line(e)}): train afresh without --resume"
                             ) from None

    def whole(self, name):
        """{"weight": the whole tensor, and the optimizer's "exp_avg", "exp_avg_sq", "step"}."""
        shape, found, covered = self.about["shapes"][name], {}, 0
        for piece in (pieces[name] for pieces in self.ranks if name in pieces):
            at = positions(shape, piece["split"], piece["first"], piece["count"])
            covered += piece["count"]
            for k, v in piece["values"].items():
                if not per_number(v, piece["values"]["weight"]):
                    found[k] = v
                    continue
                if k not in found:
                    found[k] = torch.empty(shape, dtype=v.dtype)
                found[k].view(-1)[at] = v
        if covered != math.prod(shape):
            raise ValueError(f"{self.path} holds {covered} numbers of {name}, not {math.prod(shape)}: "
                             f"it is damaged; train afresh without --resume")
        return found

    @torch.no_grad()
    def load(self, trainer, store):
        state = {}
        for name, first, piece, _ in trainer.pieces():
            at = positions(trainer.shapes[name], trainer.split.get(name), first, piece.numel())
            whole = self.whole(name)
            state[piece] = {k: v.view(-1)[at].view_as(piece).clone() if per_number(v, whole["weight"]) else v
                            for k, v in whole.items()}     # a copy: a view would keep the whole tensor
            piece.copy_(state[piece].pop("weight"))
        put_state(trainer.updater, state)
        for name, buffer in trainer.model.named_buffers():
            buffer.copy_(self.whole(name)["weight"])
        patient_barrier(store)                             # others may still read
        if isinstance(trainer.optimizer, ShardedOptimizer):
            trainer.optimizer.gather_weights()
        trainer.steps_done = self.about["step"]

    @torch.no_grad()
    def export(self, path):
        """The one-file checkpoint, for train.py's readers: infer.py, align.py."""
        model = M.Transformer(M.ModelConfig(**self.about["config"]))
        weights = model.state_dict()                       # the model's own tensors
        for name in self.about["shapes"]:
            weights[name].copy_(self.whole(name)["weight"])
        M.save_checkpoint(path, model, None, self.about["step"], tokenizer=self.about.get("tokenizer"))


# --- 10. accounting -----------------------------------------------------------------------------------------

def state_bytes(n, stage, N, whole=0):
    """Bytes a rank of n fp32 parameters with AdamW: 4 weight, 4 gradient, 8 state each, of which stage s
    divides the last s kinds by N. whole: parameters that stage 3 does not divide (norms, biases)."""
    part = (n - whole) / N + whole if stage == 3 else n / N
    return {"weights": 4 * (part if stage == 3 else n), "gradients": 4 * (part if stage >= 2 else n),
            "optimizer": 8 * (part if stage >= 1 else n)}


def measured_state(trainer):
    """The same, from the storages that this rank holds; one that two tensors share counts once."""
    params, pieces = list(trainer.model.parameters()), [p for _, _, p, _ in trainer.pieces()]
    state = trainer.updater.state
    kinds = {"weights": params + pieces, "gradients": [p.grad for p in params + pieces if p.grad is not None],
             "optimizer": [v for p in pieces for v in state[p].values() if per_number(v, p)]}
    sizes, seen = {}, set()
    for kind, tensors in kinds.items():
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
        sizes[kind] = sum(size for at, size in storages.items() if at not in seen)
        seen |= set(storages)
    return sizes


@contextlib.contextmanager
def simulated_group(world):
    """This process is rank 0 among ranks that do not exist and whose collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def simulate(c, stage, world, tokens=8):
    """What rank 0 of `world` holds after forward, backward and step: this file's own code, on tensors that
    have shapes but no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    with torch.device("meta"):                             # random numbers need real tensors; these have none
        model = M.Transformer(c)
    with simulated_group(world), FakeTensorMode(allow_non_fake_inputs=True):
        trainer = Trainer(model.to_empty(device="cpu"), stage, fused=True)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        trainer.gradients(ids, ids)
        trainer.optimizer.step()
        return measured_state(trainer)


MOMENTS = ("constructed", "before the step", "after the step")


def step_memory(c, stage, N, sequences):
    """{moment: bytes that a rank holds then, "peak": the most} in a step on `sequences` sequences. The most:
    weights, activations and the logits twice more, while the loss is differentiated; or gradients, and a
    bucket of them as it leaves and arrives on CPUs; or the state at the end."""
    n, kept = M.num_params(c), M.activation_bytes(c, sequences)
    held = list(itertools.accumulate(state_bytes(n, stage, N, M.count_params(c)["norms"]).values()))
    bucket = 4 * min(n, ShardedOptimizer.bucket_numbers)
    leaving = 4 * n + {1: 4 * n, 2: bucket}.get(stage, 0) + (stage in (1, 2)) * (2 + 1 / N) * bucket
    loss = held[0] + sum(kept.values()) + 2 * kept["logits"]
    return {**dict(zip(MOMENTS, held)), "peak": max(loss, leaving * (stage < 3), held[2])}


def measured_step_memory(c, stage, world, sequences):
    """The same: all that torch allocates for rank 0, real tensors in a simulated group. (In a real one gloo's
    threads free what they have sent, a little later, and the profiler does not see it.)"""
    held, most, found, ids = 0, 0, {}, torch.zeros(sequences, c.context_length, dtype=torch.long)
    os.environ["KINETO_LOG_LEVEL"] = "6"                   # torch 2.13 says two lines about each profile
    with simulated_group(world), profile(profile_memory=True) as seen:
        trainer = Trainer(M.Transformer(c), stage, fused=True)
        jobs = lambda: None, lambda: trainer.gradients(ids, ids), trainer.optimizer.step
        for moment, job in zip(MOMENTS, jobs):
            job()
            with record_function(moment):
                pass
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()                         # < 0: given back
            most = max(most, held)
        elif event.name() in MOMENTS:
            found[event.name()] = held
    return {**found, "peak": most}


def predict(c, layout, N, sequences, m):
    """(bytes of weights, gradients and optimizer state, bytes sent a step) of rank 0 by the formulas; layout:
    Trainer's arguments. An all-gather or reduce-scatter sends `once` the whole, an all-reduce twice that."""
    with torch.device("meta"):
        params = dict(M.Transformer(c).named_parameters())
    numbers = lambda fits: sum(p.numel() for name, p in params.items() if fits(name, p))
    n, tokens, once = numbers(lambda *_: True), sequences * c.context_length, Fraction(N - 1, N)
    stream, sums = 4 * tokens * c.d_model, 2 * once * 24   # (B,T,D); the three float64 of Trainer.step
    if "tp" in layout:
        # All-reduces: four of the stream a layer, one each for embedding and output matrix, three numbers a
        # token for the loss, gradients of what is not split; that of the position table is only gathered.
        whole = numbers(lambda name, p: not split_of(name, p.shape, c, 0, N))
        summed = numbers(lambda name, _: "_norm." in name)
        if layout.get("sequence", True):
            summed = whole - Fraction(numbers(lambda name, _: name == "position.weight"), 2)
        sent = 2 * once * ((4 * c.num_layers + 2) * stream + 4 * 3 * tokens + 4 * m * summed)
        return 16 * ((n - whole) / N + whole), sums + sent
    if "pp" in layout:
        later = (*(f"blocks.{i}." for i in range(-(-c.num_layers // N), c.num_layers)), "norm.", "head.")
        return 16 * numbers(lambda name, _: not name.startswith(later)), sums + stream
    stage, buffers, whole = layout.get("stage", 0), [n], numbers(lambda _, p: p.dim() < 2)
    if stage == 3:                                         # a buffer a layer, of its matrices
        unit = lambda name: name.split(".")[:2] if name.startswith("blocks.") else name
        layers = itertools.groupby((name for name, p in params.items() if p.dim() > 1), unit)
        buffers = [sum(params[name].numel() for name in names) for _, names in layers]
    padded = sum(N * -(-b // N) for b in buffers)          # N equal slices of each
    sent = {0: 2 * n, 1: 2 * padded, 2: (m + 1) * padded, 3: m * (3 * padded + 2 * whole)}[stage] * 4 * once
    return sum(state_bytes(n, stage, N, whole).values()), sums + sent


# --- 11. planning -------------------------------------------------------------------------------------------

# bf16 FLOP/s, bytes of memory, bytes/s one way within a node of eight, and between nodes (data sheets).
GPUS = {"a100": (312e12, 80e9, 300e9, 25e9), "h100": (989.5e12, 80e9, 450e9, 50e9),
        "h200": (989.5e12, 141e9, 450e9, 50e9), "b200": (2250e12, 180e9, 900e9, 50e9)}
REACHED = 0.7                                              # of that FLOP/s, by large products: an assumption


def shape_of(n, context_length=4096):
    """A Llama-like shape of about n parameters: D/L near 100, H = 128, 12 L D^2 = n."""
    unit = 1024 if n > 3e9 else 128                        # so that 8 tensor-parallel ranks share the heads
    D = unit * max(1, round((n * 100 / 12) ** (1 / 3) / unit))
    return M.ModelConfig(vocab_size=32000, context_length=context_length, d_model=D, num_heads=D // 128,
                         num_layers=max(1, round(n / (12 * D * D))))


def fsdp_tp_limit(n, D, L, speed, near, far):
    """FSDP between nodes (far) x tensor parallelism within (near) -> (t, b, b if messages take turns): from b
    tokens a GPU and micro-batch on products take longer than messages; t is the number of tensor ranks for
    which b is smallest.
    Seconds, with n bf16 weights in L layers, speed in FLOP/s, near and far in bytes/s, (N-1)/N taken as 1:
        products     6 n b / speed
        FSDP         2 n / t bytes, gathered twice and their gradients scattered:   3 * 2 n / t / far
        tensor       four all-reduces a layer of a replica's (b t, D):              4 L * 2 * 2 b t D / near
    products >= FSDP from b = speed / (far t) on; products >= tensor, whatever b is, up to
    t = 3 n near / (8 L D speed): with this t the fewest tokens are needed, if both kinds travel at the same
    time. If they take turns: products >= FSDP + tensor >= 2 sqrt(FSDP tensor), from which t cancels. At the
    smallest b all are equal: FSDP = tensor = products / 2, with t / 2 ranks and 4 b."""
    t = 3 * n * near / (8 * L * D * speed)
    b = speed / (far * t)
    return t, b, 4 * b


def plan_layout(c, gpus, gpu, sequences, stage, tp, pp, recompute, size=1):
    """One layout's row, for `size` sequences a micro-batch, bf16 messages and products, fp32 state (this file
    itself sends gradients in fp32). Messages of weights and gradients hide behind products unless they take
    longer; tensor parallelism's never do."""
    peak, memory, near, far = GPUS[gpu]
    n, D, L, T, dp = M.num_params(c), c.d_model, c.num_layers, c.context_length, gpus // (tp * pp)
    m, kept = sequences // (dp * size), M.activation_bytes(c, size, checkpoint_blocks=recompute)
    block = M.activation_bytes(c, size)["blocks"] / L if recompute else 0    # one at a time, computed again
    blocks = kept["blocks"] / pp * min(m, pp) + block                        # 1F1B: of up to pp micro-batches
    activations = (blocks / 2 + kept["last norm"] / 2 + kept["logits"]) / tp     # bf16, logits fp32
    if not recompute:                                      # inputs of wqkv and of w1, w3 are kept whole
        activations += 2 * (1 - 1 / tp) * 2 * size * T * D * L / pp * min(m, pp)
    low = 2 * n / (tp * pp) * (3 / L if stage == 3 else 1)     # bf16: this layer, the next, a gradient; all
    held = sum(state_bytes(n / (tp * pp), stage, dp).values()) + activations + low
    useful = M.train_flops(c, sequences * T)
    compute = useful * (4 / 3 if recompute else 1) / (gpus * peak * REACHED)
    weights = {0: 2, 1: 2, 2: m + 1, 3: 3 * m}[stage] * (dp - 1) / dp * 2 * n / (tp * pp)
    stream = (4 + 2 * recompute) * 2 * (tp - 1) / tp * 2 * T * D * (L / pp) * m * size
    hidden = weights / (far if gpus > 8 else near)         # seconds; weights and stream are bytes
    seconds = (max(compute, hidden) + stream / near) * (m + pp - 1) / m      # and the bubble
    return dict(stage=stage, tp=tp, pp=pp, dp=dp, micro=m, size=size, recompute="yes" if recompute else "no",
                held=held / 1e9, fits=held <= 0.9 * memory, sent=(weights + stream) / 1e9,
                sending=hidden / compute, bubble=(pp - 1) / (m + pp - 1), seconds=seconds,
                mfu=useful / (gpus * peak * seconds))


def plan(n_params, gpus, gpu, tokens):
    """-> (shape, sequences a step, rows, best first, those that do not fit last). Of a layout's micro-batch
    sizes the best: the larger, the more products hide FSDP's messages, and the more memory they take."""
    c, rows, powers = shape_of(n_params), [], [2**i for i in range(11)]
    sequences, rank = max(1, round(tokens / c.context_length)), lambda r: (not r["fits"], -r["mfu"])
    for tp, pp, stage, recompute in itertools.product(powers[:4], powers, range(4), (False, True)):
        splits = gpus % (tp * pp) == 0 and pp <= c.num_layers and c.num_heads % tp == 0
        if splits and (pp == 1 or stage < 2) and sequences % (gpus // (tp * pp)) == 0:
            share = sequences * tp * pp // gpus
            rows.append(min((plan_layout(c, gpus, gpu, sequences, stage, tp, pp, recompute, size)
                             for size in powers if share % size == 0), key=rank))
    if not rows:
        raise ValueError(f"{sequences} sequences of {c.context_length} tokens do not split over --gpus "
                         f"{gpus}: try --tokens {gpus * c.context_length}")
    return c, sequences, sorted(rows, key=rank)


def show_plan(args):
    c, sequences, rows = plan(args.params, args.gpus, args.gpu, args.tokens)
    peak, memory, near, far = GPUS[args.gpu]
    speed, fitting, n = peak * REACHED, [r for r in rows if r["fits"]], M.num_params(c)
    t, together, in_turn = fsdp_tp_limit(n, c.d_model, c.num_layers, speed, near, far)
    print(f"{n:,} parameters (L {c.num_layers}, D {c.d_model}), {sequences} sequences of "
          f"{c.context_length} tokens a step, {args.gpus} x {args.gpu}, products at {REACHED:.0%} of "
          f"{peak / 1e12:,.0f} TFLOP/s\n"
          f"limits, from where on products take longer than messages, in tokens a GPU and micro-batch:\n"
          f"  FSDP           {speed / far:,.0f} between nodes, {speed / near:,.0f} within one\n"
          f"  tensor         any, up to tp {t:.0f}\n"
          f"  FSDP x tensor  {speed / far:,.0f} / tp: with tp 8 {speed / far / 8:,.0f}; least, in nodes that "
          f"large, {together:,.0f} with tp {t:.0f},\n                 or {in_turn:,.0f} with tp {t / 2:.0f} "
          f"if one kind of message waits for the other")
    columns = {"stage": "stage", "tp": "tp", "pp": "pp", "dp": "dp", "micro-batches": "micro",
               "sequences": "size", "recompute": "recompute", "GB held": "held:.1f",
               "GB sent": "sent:.1f", "sending/computing": "sending:.0%", "bubble": "bubble:.1%",
               "s/step": "seconds:.2f", "MFU": "mfu:.1%"}
    M.table(f"{len(fitting)} of {len(rows)} layouts fit in {memory / 1e9:.0f} GB less a tenth; the best, and "
            f"two that do not (sequences: of a micro-batch; GB: of a rank and step; sending: of weights and "
            f"gradients)",
            list(columns),
            [[f"{{{column}}}".format(**r) for column in columns.values()]
             for r in fitting[:10] + rows[len(fitting):][:2]])


# --- 12. ranks: started, watched, ended ---------------------------------------------------------------------

def run_rank(job, args, store, rank, world, device="cpu", timeout=20.0, loud=False):
    """Join the group, run job(args, store), leave. The job tells the store its step/RANK. An error ends the
    process, for the others would wait; who waits longer than `timeout` seconds for another has an error. (In
    gloo. nccl kills the process that waits: that rank is named then, and not the one that hangs.)"""
    try:
        if device == "cuda":
            torch.cuda.set_device(rank % torch.cuda.device_count())
        store.set(f"step/{rank}", "0")
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world, timeout=datetime.timedelta(seconds=timeout))
        job(args, store)
        patient_barrier(store)                             # nobody hangs up while another still works
        dist.destroy_process_group()
    except Exception as e:
        status = 1
        try:
            status = blame(e, store, rank, world, loud)
        finally:                                           # in silence where the store is gone, too
            os._exit(status)                               # sys.exit would wait for messages under way


def blame(e, store, rank, world, loud):
    """This rank ends with error e -> exit status. Whose fault it was: a rank that raised, or else one that
    does not answer. The first rank to get here writes that in one line."""
    lost = isinstance(e, dist.DistError) or "gloo" in str(e)                 # a collective failed: not me
    user = isinstance(e, (ValueError, OSError)) and store.get(f"step/{rank}") == b"0"    # a mistake of theirs
    text = "" if lost else M.first_line(e) if user else f"{type(e).__name__}: {M.first_line(e)}"
    store.set(f"end/{rank}", text)
    for _ in range(30 * lost):                             # three seconds for the others to notice, too
        if not store.check([f"end/{r}" for r in range(world)]):
            time.sleep(0.1)
    ends = {r: store.get(f"end/{r}").decode() for r in range(world) if store.check([f"end/{r}"])}
    guilty = [*(r for r in ends if ends[r]), *(r for r in range(world) if r not in ends), rank][0]
    text = ends.get(guilty) or "does not answer: it was killed, was stopped, or hangs"
    if not user:
        text = f"rank {guilty} at step {store.get(f'step/{guilty}').decode()}: {text}"
    if store.add("said", 1) == 1:
        store.set("line", text)
        if loud:
            print(f"zero.py: error: {text}", file=sys.stderr, flush=True)
    return 2 if user else 1


def local_rank(job, args, port, rank, world, options):
    def end_with_parent():                                 # no orphans, even of a kill -9
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)           # Ctrl-C: die in silence, the parent speaks
    torch.set_num_threads(max(1, torch.get_num_threads() // world))
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    run_rank(job, args, store, rank, world, **options)


def launch(job, world, args, **options):
    """job(args, store) in `world` local processes, all of which have ended afterwards; RuntimeError if one
    was lost, or its ValueError. The parent holds the store, on a port that the system picks."""
    context = multiprocessing.get_context("forkserver")    # ranks: forks of a process that has loaded torch
    context.set_forkserver_preload(["torch", "torch._dynamo"])               # every optimizer imports both
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [context.Process(target=local_rank, args=(job, args, store.port, rank, world, options))
             for rank in range(world)]
    try:
        for process in ranks:
            process.start()
        watch(store, ranks)
    except KeyboardInterrupt:                              # training saves and returns, all else dies
        for process in ranks:
            if process.is_alive():
                os.kill(process.pid, signal.SIGINT)
        with contextlib.suppress(RuntimeError):
            watch(store, ranks)
        raise
    finally:
        for process in ranks:
            if process.pid:
                process.kill()
                process.join()


def watch(store, ranks):
    """Wait until all have ended, or say which was lost."""
    running = dict(enumerate(ranks))
    while running:
        multiprocessing.connection.wait([process.sentinel for process in running.values()])
        for rank in [rank for rank, process in running.items() if not process.is_alive()]:
            status = running.pop(rank).exitcode
            if status > 0 and store.check(["line"]):
                raise (ValueError if status == 2 else RuntimeError)(store.get("line").decode())
            if status:
                step = store.get(f"step/{rank}").decode() if store.check([f"step/{rank}"]) else "0"
                how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended: {status}"
                raise RuntimeError(f"rank {rank} at step {step}: {how}")


def number_of_start(store, rank, world):
    """1, after restarts more, the same on all ranks. torchrun's own count differs from host to host, and its
    store outlives a start with all that stands in it: so each rank asks under a new name, rank 0 answers."""
    if rank:
        name = os.urandom(8).hex()
        store.set(f"ask/{rank}", name)
        number = int(store.get(f"answer/{name}"))          # waits until there is one
        store.add(f"met/{number}", 1)
        return number
    number = store.add("starts", 1)
    while store.add(f"met/{number}", 0) < world - 1:
        for ask in [f"ask/{r}" for r in range(1, world)]:
            if store.check([ask]):
                store.set(f"answer/{store.get(ask).decode()}", str(number))
        time.sleep(0.1)
    return number


def check_alike(facts):
    """facts {name: value} must be equal on all ranks: another seed, text or code on one of them would train
    on without an error, and be wrong."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, facts)
    for rank, theirs in enumerate(everyone):
        odd = [f"{k} {theirs.get(k)!r}, rank 0 {v!r}" for k, v in everyone[0].items() if theirs.get(k) != v]
        if odd:
            raise ValueError(f"the ranks differ: rank {rank} has {'; '.join(odd[:3])}")


# --- 13. training -------------------------------------------------------------------------------------------

def draw(tokens, T, seed, first, count):
    """Sequences first .. first+count-1 of a run, (count,T+1). Number i depends on (seed, i) alone: what a
    step sees does not depend on the number of ranks, and nothing has to be saved."""
    starts = [np.random.default_rng([seed, i]).integers(len(tokens) - T) for i in range(first, first + count)]
    return torch.from_numpy(np.stack([tokens[s:s + T + 1] for s in starts]).astype(np.int64))


def open_data(args, store):
    """Rank 0 makes the token files where there are none; the others wait, for as long as that takes."""
    folder, c = args.out, M.model_config(args)
    if args.data and len(args.data) == 1 and os.path.exists(os.path.join(args.data[0], "train.bin")):
        folder = args.data[0]
    elif dist.get_rank() == 0:
        bpe.prepare(args.out, args.data, vocab_size=c.vocab_size, log=functools.partial(print, flush=True))
        store.set("text", "ready")
    else:
        store.wait(["text"], PATIENT)
    tokenizer = bpe.load_tokenizer(os.path.join(folder, "tokenizer.json"))
    tokens = bpe.load_tokens(os.path.join(folder, "train.bin"), tokenizer)
    if len(tokens) <= c.context_length:
        raise ValueError(f"{len(tokens):,} training tokens are less than {c.context_length} + 1: give more "
                         f"text, or --context_length {max(1, len(tokens) - 1)}")
    return tokenizer, tokens


def set_up(args, store):
    """-> (trainer, facts, tokens, this replica's sequences a step), the same on all ranks or a ValueError.
    facts {name: value}: what resuming may not change, besides the config."""
    tokenizer, tokens = open_data(args, store)
    torch.manual_seed(args.seed)
    model = M.Transformer(M.model_config(args, vocab_size=tokenizer.vocab_size)).to(args.device)
    model.checkpoint_blocks = args.checkpoint_blocks
    code = hashlib.sha256()
    for path in (__file__, M.__file__, bpe.__file__):
        with open(path, "rb") as f:
            code.update(f.read())
    some = tokens[::len(tokens) // 1000 + 1].astype(np.int64)                # tells texts of one length apart
    facts = {"seed": args.seed, "batch_size": args.batch_size, "tokenizer": tokenizer.hash(),
             "tokens": f"{len(tokens)}, {hashlib.sha256(some.tobytes()).hexdigest()[:8]}"}
    check_alike({**vars(args), **facts, "torch": torch.__version__, "code": code.hexdigest()[:12],
                 "weights": sum(p.double().sum().item() for p in model.parameters())})
    trainer = Trainer(model, args.stage, args.tp, args.pp, args.ep, kind=args.pipeline, lr=args.lr,
                      compute_dtype=torch.bfloat16 if args.dtype == "bf16" else None, betas=(0.9, 0.95),
                      timeout=args.timeout, weight_decay=args.weight_decay, fused=True)
    unit = trainer.dp * (args.micro_batch or 1)
    if args.batch_size % unit:
        raise ValueError(f"--batch_size {args.batch_size} is no multiple of {trainer.dp} data-parallel ranks "
                         f"x --micro_batch {args.micro_batch or 1}: try --batch_size "
                         f"{unit * max(1, round(args.batch_size / unit))}")
    return trainer, facts, tokens, args.batch_size // trainer.dp


def set_aside(folder):
    """The checkpoint of an earlier run: what a restart finds must be this run's."""
    if checkpoints(folder):
        shutil.rmtree(f"{folder}.old", ignore_errors=True)
        os.replace(folder, f"{folder}.old")
        print(f"note     the checkpoint of an earlier run is now in {folder}.old  (--resume would have "
              f"continued it)", flush=True)


def resume(trainer, folder, facts, store):
    """Layout, steps, rates, clipping and precision may change, the model and what it reads may not."""
    checkpoint = ShardedCheckpoint(folder)
    before, now = checkpoint.about | checkpoint.about["config"], facts | dataclasses.asdict(trainer.config)
    odd = [f"{k} {before[k]} there, {v} here" for k, v in now.items() if before.get(k, v) != v]
    if odd:
        raise ValueError(f"{checkpoint.path} is of another run ({'; '.join(odd[:3])}): give that run's "
                         f"flags, or drop --resume")
    checkpoint.load(trainer, store)
    return f"resumed {checkpoint.path}, written by {len(checkpoint.ranks)} ranks"


def train(args, store):
    """A run, on every rank. Rank 0 prints and logs; every rank writes its pieces of the checkpoint. Ctrl-C
    and SIGTERM end it after the step under way, with a checkpoint."""
    rank, folder = dist.get_rank(), os.path.join(args.out, "sharded")
    say = functools.partial(print, flush=True) if rank == 0 else lambda *_: None
    trainer, facts, tokens, share = set_up(args, store)
    T, place = trainer.config.context_length, trainer.mesh["dp"][2]
    if args.resume:
        say(resume(trainer, folder, facts, store))
    elif rank == 0:
        set_aside(folder)
    say(f"{M.num_params(trainer.config):,} parameters on {trainer.dp} data x {args.pp} pipeline x {args.tp} "
        f"tensor ranks, stage {args.stage}, seed {args.seed}; a step: {args.batch_size} x {T} tokens")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: setattr(trainer, "asked", True))
    with open(os.path.join(args.out, "log.jsonl"), "a", 1) if rank == 0 else contextlib.nullcontext() as log:
        for step in range(trainer.steps_done, args.steps):
            store.set(f"step/{rank}", str(step + 1))
            begin = time.perf_counter()
            torch.manual_seed(hash((args.seed, step, place)))                # for dropout; resumable
            rows = draw(tokens, T, args.seed, step * args.batch_size + place * share, share).to(args.device)
            progress = (step + 1) / args.steps             # up in the first 2%, down a cosine to a tenth
            lr = args.lr * min(1.0, progress / 0.02) * (0.55 + 0.45 * math.cos(math.pi * progress))
            loss, norm = trainer.step(rows[:, :-1], rows[:, 1:], args.micro_batch, lr, args.clip)
            ms = 1000 * (time.perf_counter() - begin)
            tok_s, last = args.batch_size * T / ms * 1000, step + 1 == args.steps or trainer.stop
            if log:
                log.write(json.dumps(dict(step=step + 1, loss=loss, lr=lr, gnorm=norm, step_ms=ms,
                                          tok_s=tok_s)) + "\n")
            if step % args.print_steps == 0 or last:
                say(f"step {step + 1:>6}/{args.steps} | loss {loss:7.4f} | lr {lr:.2e} | gnorm {norm:6.2f} | "
                    f"{ms:7.1f} ms | {tok_s:>9,.0f} tok/s")
            if (step + 1) % args.save_steps == 0 or last:
                save_sharded(folder, trainer, store, **facts)
            if last:
                break
    if rank == 0:
        ShardedCheckpoint(folder).export(os.path.join(args.out, "checkpoint.pt"))
        say(f"saved {folder} (each rank its pieces) and {args.out}/checkpoint.pt (one file)")


# --- 14. the lecture ----------------------------------------------------------------------------------------

STAGES = ["data parallel", "ZeRO-1", "ZeRO-2", "FSDP (ZeRO-3)"]
# What the table shows: name -> (Trainer's arguments, micro-batches).
LAYOUTS = {**{name: ({"stage": s}, 1) for s, name in enumerate(STAGES)},
           "tensor parallel": ({"tp": 2, "sequence": False}, 1), "tensor + sequence": ({"tp": 2}, 1),
           "pipeline, GPipe": ({"pp": 2, "kind": "gpipe"}, 4), "pipeline, 1F1B": ({"pp": 2}, 4)}


def lecture_rank(args, store):
    """Five steps in each layout and by one process; rank 0 prints bytes held, bytes sent and differences."""
    c, N, rank, rows = args.config, dist.get_world_size(), dist.get_rank(), []
    g = torch.Generator().manual_seed(args.seed)
    batches = torch.randint(0, c.vocab_size, (5, args.batch_size, c.context_length + 1), generator=g)
    adam = dict(lr=1e-3, eps=1e-5, fused=True)             # a smaller eps blows up rounding near gradient 0

    def fresh():
        torch.manual_seed(args.seed)
        return M.Transformer(c)
    one = fresh()
    optimizer, expected = torch.optim.AdamW(one.parameters(), **adam), dict(one.named_parameters())
    for batch in batches:
        M.training_loss(one, batch[:, :-1], batch[:, 1:])[1].backward()
        torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    trainers = {name: Trainer(fresh(), timeout=args.timeout, **layout, **adam)
                for name, (layout, _) in LAYOUTS.items()}
    ms, waits = ({name: [] for name in trainers} for _ in range(2))
    for step, batch in enumerate(batches):
        store.set(f"step/{rank}", str(step + 1))
        for name, trainer in trainers.items():             # in turns: other work on the machine disturbs all
            mine = batch.chunk(trainer.dp)[trainer.mesh["dp"][2]]
            dist.barrier()
            begin = time.perf_counter()
            with CountBytes() as trainer.sent:
                trainer.step(mine[:, :-1], mine[:, 1:], len(mine) // LAYOUTS[name][1])
            ms[name].append(1000 * (time.perf_counter() - begin))
            waits[name].append(1000 * trainer.pipeline.waited / ms[name][-1] if trainer.pipeline else 0)
    for name, trainer in trainers.items():
        (layout, m), error, errors = LAYOUTS[name], 0.0, [0.0] * N
        for n, first, p, _ in trainer.pieces():
            at = positions(trainer.shapes[n], trainer.split.get(n), first, p.numel())
            error = max(error, (p.flatten() - expected[n].flatten()[at]).abs().max().item())
        dist.all_gather_object(errors, error)
        mine = batches[0].chunk(trainer.dp)[trainer.mesh["dp"][2]]
        trainer.gradients(mine[:, :-1], mine[:, 1:])       # state is measured where there is most of it
        (held, sent), state = predict(c, layout, N, args.batch_size, m), sum(measured_state(trainer).values())
        rows.append([name, *(f"{float(x) / 1e6:,.3f}" for x in (held, state, sent, trainer.sent.total)),
                     f"{statistics.median(ms[name]):.0f}", f"{max(errors):.1e}"])
    if rank == 0:
        M.table(f"{M.num_params(c):,} parameters on {N} ranks, fp32, AdamW, {args.batch_size} sequences of "
                f"{c.context_length} tokens a step;\nMB on rank 0, and the largest difference of a weight "
                f"from one process after five steps",
                ["layout", "state: predicted", "measured", "sent a step: predicted", "counted", "ms/step",
                 "difference"], rows)
        for name, (_, m) in list(LAYOUTS.items())[-2:]:
            print(f"  {name}: rank 0 waits for {statistics.median(waits[name]):.0%} of a step; were both "
                  f"stages equally long, (p-1)/(m+p-1) = {(N - 1) / (m + N - 1):.0%}")


def lecture(args):
    args.config, args.timeout = M.model_config(args), max(60.0, args.timeout)
    launch(lecture_rank, 2, args, timeout=args.timeout)
    big, worlds = M.ModelConfig(**M.PRESETS["llama2-7b"]), (8, 64, 1024)
    n, whole = M.num_params(big), M.count_params(big)["norms"]
    grid, share = list(itertools.product(range(4), worlds)), args.batch_size // 2
    step = [(args.config, stage, 2, share) for stage in range(4)]
    with multiprocessing.get_context("forkserver").Pool(     # Ctrl-C is this process's, which ends the pool
            min(4, os.cpu_count() or 1), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        steps = pool.starmap(measured_step_memory, step, chunksize=1)
        M.table(f"In the course of a step: MB that one of 2 ranks holds, and the most, with activations of "
                f"{share} sequences;\npredicted and measured", ["layout", *MOMENTS, "peak"],
                [[name, *(f"{predicted / 1e6:.2f} {seen[moment] / 1e6:.2f}" for moment, predicted
                          in step_memory(*which).items())] for name, which, seen in zip(STAGES, step, steps)])
        found = pool.starmap(simulate, [(big, *at) for at in grid], chunksize=1)
    measured = {at: sum(sizes.values()) / 1e9 for at, sizes in zip(grid, found)}

    def cell(stage, world):
        predicted = sum(state_bytes(n, stage, world, whole).values()) / 1e9
        return f"{predicted:.2f} {measured[stage, world]:.2f}{' *' if measured[stage, world] < 80 else '  '}"
    M.table(f"Llama-2 7B, {n:,} parameters: GB of state a rank, predicted and measured on simulated ranks; "
            f"* fits 80 GB", ["ranks", *STAGES],
            [[f"{w:,}", *(cell(s, w) for s in range(4))] for w in worlds])
    if plt := M.pyplot():
        for stage, name in enumerate(STAGES):
            plt.loglog(worlds, [measured[stage, w] for w in worlds], "o-", label=name)
        plt.axhline(80, color="grey", linestyle=":")
        plt.xlabel("ranks")
        plt.ylabel("GB a rank")
        plt.title("Llama-2 7B with AdamW: state a rank; dotted: 80 GB")
        plt.legend()
        plt.savefig(os.path.join(args.out, "zero.png"), dpi=120)
        print(f"\nsaved {args.out}/zero.png")


# --- 15. command line ---------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = M.cli(__doc__)
    t = p.add_argument_group("training (without --steps: the lecture)").add_argument
    t("--steps", type=int, default=0, help="optimizer steps; 0: the lecture")
    t("--data", nargs="+", metavar="PATH",
      help="text, or one folder with train.bin and tokenizer.json; without it the Python standard library")
    t("--out", default="out", metavar="DIR", help="folder for everything the run makes")
    t("--resume", action="store_true", help="continue from the checkpoint in --out, in any layout")
    t("--batch_size", type=int, default=8, help="sequences a step, all ranks together")
    t("--micro_batch", type=int, default=0, help="sequences a rank takes at a time; 0: its whole share")
    t("--lr", type=float, default=1e-3, help="peak learning rate")
    t("--weight_decay", type=float, default=0.1, help="pull on all weights, times the rate")
    t("--clip", type=float, default=1.0, help="largest l2 norm of all gradients together; 0: no clipping")
    t("--seed", type=int, default=0, help="of weights and data order")
    t("--save_steps", type=int, default=100, help="steps between checkpoints")
    t("--print_steps", type=int, default=10, help="steps between lines on the screen")
    r = p.add_argument_group("layout: ranks = data x pipeline x tensor parallel").add_argument
    r("--world_size", type=int, default=2, help="local ranks to start (torchrun starts its own)")
    r("--stage", type=int, choices=range(4), default=3, help="0 data parallel, 1 ZeRO-1, 2 ZeRO-2, 3 FSDP")
    r("--tp", type=int, default=1, help="tensor-parallel ranks")
    r("--pp", type=int, default=1, help="pipeline stages (with --stage 0 or 1)")
    r("--pipeline", choices=("1f1b", "gpipe"), default="1f1b", help="order of a stage's work")
    r("--ep", action="store_true", help="split experts over the data-parallel ranks (with --stage 0)")
    r("--dtype", choices=("fp32", "bf16"), default="fp32", help="of products, and of what FSDP gathers")
    r("--checkpoint_blocks", action="store_true", help="recompute blocks in backward: memory for time")
    r("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto takes cuda where it is")
    r("--timeout", type=float, default=20.0, help="seconds others wait for a rank before it counts as lost")
    g = p.add_argument_group("planning").add_argument
    g("--plan", action="store_true", help="the best layouts for a model and a cluster, by the formulas")
    g("--params", type=float, default=7e9, help="parameters of the model")
    g("--gpus", type=int, default=64, help="devices, eight a node")
    g("--gpu", choices=GPUS, default="h100", help="their kind")
    g("--tokens", type=float, default=2**22, help="tokens a step")
    M.add_model_flags(p)
    args = p.parse_args(argv)
    try:
        args.unused = unused(args, p.get_default)
        check(args)
    except ValueError as e:
        p.error(M.first_line(e))
    return args


def unused(args, default):
    """Flags that were given, and do nothing in this run."""
    planning, used = {"params", "gpus", "gpu", "tokens"}, {"plan", "steps", "out"}
    if args.plan:
        used |= planning
    elif args.steps:
        idle = (("pipeline", args.pp == 1), ("world_size", "RANK" in os.environ))
        used = set(vars(args)) - planning - {name for name, nothing in idle if nothing}
    else:                                                  # the lecture
        used |= {"batch_size", "seed", "timeout", "resume", "preset"}
        used |= {f.name for f in dataclasses.fields(M.ModelConfig)}
    return [f"--{name}" for name, value in vars(args).items() if name not in used and value != default(name)]


def check(args):
    least = dict(steps=0, batch_size=1, micro_batch=0, lr=0, weight_decay=0, clip=0, seed=0, save_steps=1,
                 tp=1, pp=1, print_steps=1, world_size=1, timeout=1, params=1e6, gpus=1, tokens=1)
    for name, low in least.items():
        if not low <= getattr(args, name) < math.inf:
            raise ValueError(f"--{name} {getattr(args, name)} is out of range: {low:g} or more")
    if args.seed >= 2**63:
        raise ValueError(f"--seed {args.seed} is out of range: less than 2^63")
    torchrun, lecture = "RANK" in os.environ, not args.steps and not args.plan
    if lecture and args.resume:
        raise ValueError("--resume needs the number of --steps to reach: try --steps 1000")
    if lecture and torchrun:
        raise ValueError("the lecture (no --steps) starts its own ranks: use python, or try --steps 1000")
    if lecture and args.batch_size % 4:
        raise ValueError(f"--batch_size {args.batch_size} does not split into the lecture's 4 micro-batches: "
                         f"try --batch_size 8")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    M.pick_device(args.device)                             # raises where there is none
    if args.steps and not torchrun and args.device == "cuda" and args.world_size > torch.cuda.device_count():
        raise ValueError(f"--world_size {args.world_size} ranks need as many GPUs, here are "
                         f"{torch.cuda.device_count()}: lower it, or give --device cpu")
    M.model_config(args)


def run(args):
    options, folder = dict(device=args.device, timeout=args.timeout), os.path.join(args.out, "sharded")
    os.makedirs(args.out, exist_ok=True)
    if args.unused and os.environ.get("RANK", "0") == "0":
        print(f"note     {', '.join(args.unused)}: of no effect here")
    if args.plan:
        show_plan(args)
    elif not args.steps:
        lecture(args)
    elif "RANK" not in os.environ:
        launch(train, args.world_size, args, **options)
    else:                                                  # torchrun has started this process
        store, rank, world = next(dist.rendezvous("env://"))
        number = number_of_start(store, rank, world)
        store = dist.PrefixStore(f"start {number}", store)                   # old keys are of dead ranks
        if rank == 0:
            again = number > 1 or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
            if not (again or args.resume):                 # train() may be late: this start could fail before
                set_aside(folder)
            store.set("again", str(int(again and bool(checkpoints(folder)))))
        store.wait(["again"], PATIENT)
        args.resume |= store.get("again") == b"1"
        run_rank(train, args, store, rank, world, loud=True, **options)


def main(argv=None):
    args = parse_args(argv)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)       # to be killed is like Ctrl-C
    try:
        return run(args)
    except (ValueError, OSError, RuntimeError) as e:       # RuntimeError: a rank was lost
        status, text = 1 if isinstance(e, RuntimeError) else 2, f"zero.py: error: {M.first_line(e)}"
    except KeyboardInterrupt:
        status, text = 130, "\ninterrupted" + "; --resume goes on from the last checkpoint" * bool(args.steps)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(text, file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
