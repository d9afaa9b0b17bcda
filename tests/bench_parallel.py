"""bench_parallel.py - are ddp.py and zero.py as fast as torch's own? Two ranks on this machine, gloo.

Run    python tests/bench_parallel.py            # all tables
       python tests/bench_parallel.py ddp        # one of them

One optimizer step (forward, backward, averaging, clipping for ddp, fused AdamW) of the same model on the same
tokens. The ways take turns within a round, so that a noisy machine disturbs all alike; a step's time is that
of the slower rank, a row's the median over the rounds. The ratio is peer / ours: above 1, ours is faster.
"""
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import ddp
import model as M                                                            # before torch: see model.py
import zero

import torch
import torch.distributed as dist

SHAPES = {  # label: (fields of ModelConfig, sequences a rank)
    "default model": (dict(qk_norm=True), 2),
    "many small parameters": (dict(vocab_size=512, context_length=32, num_layers=24, d_model=32, num_heads=1,
                                   qk_norm=True), 2),
}


def interleaved(runs, rounds, steps=3):
    """{name: step function} -> {name: median ms of a step}, the slower rank's."""
    seen = {name: [] for name in runs}
    for i in range(rounds + 1):                                              # one round to warm up
        for name, step in runs.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(steps):
                step()
            ms = torch.tensor(1000 * (time.perf_counter() - start) / steps)
            dist.all_reduce(ms, dist.ReduceOp.MAX)
            if i:
                seen[name].append(ms.item())
    return {name: statistics.median(times) for name, times in seen.items()}


def model_and_ids(label):
    fields, batch = SHAPES[label]
    torch.manual_seed(0)
    model = M.Transformer(M.ModelConfig(**fields))
    ids = torch.randint(0, model.config.vocab_size, (batch, model.config.context_length + 1))
    return model, ids


def bench_ddp(watch, rounds):
    """Every way of ddp.py and DistributedDataParallel in two settings, all with buckets of 25 MB."""
    from torch.nn.parallel import DistributedDataParallel as Peer
    wraps = {**ddp.WAYS, "torch DDP": Peer, "torch DDP, gradients as views": lambda m: Peer(
        m, gradient_as_bucket_view=True)}
    rows = []
    for label in SHAPES:
        runs = {}
        for name, wrap in wraps.items():
            model, ids = model_and_ids(label)
            wrapped, optimizer = wrap(model), ddp.make_optimizer(model, 1e-3)

            def step(wrapped=wrapped, optimizer=optimizer, ids=ids):
                ddp.backward(wrapped, ids)
                ddp.update(wrapped, optimizer, 1.0)
            runs[name] = step
        times, tensors = interleaved(runs, rounds), len(list(model.parameters()))
        best_peer = min(ms for name, ms in times.items() if name.startswith("torch"))
        rows += [[f"{label} ({tensors} tensors, {4 * M.num_params(model.config) / 1e6:.1f} MB): {name}",
                  f"{ms:.1f}", f"{best_peer / ms:.2f}"] for name, ms in times.items()]
    return rows


def bench_zero(watch, rounds):
    """The stages of zero.py and torch, each with its own gradient averaging, fp32, fused AdamW. The peer
    of FSDP gathers again for backward everywhere, as zero.py does: the same memory at rest and at work."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel
    adam, rows = dict(lr=1e-3, fused=True), []

    def ours(model, stage):
        trainer = zero.Trainer(model, stage, **adam)
        return model, trainer.sync.finish_gradient_synchronization, trainer.optimizer

    def peer_zero1(model):
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **adam)
        return DistributedDataParallel(model, gradient_as_bucket_view=True), lambda: None, optimizer

    def peer_fsdp(model):
        for part in (model.embedding, *model.blocks, model.head, model):
            fully_shard(part, reshard_after_forward=True)
        return model, lambda: None, torch.optim.AdamW(model.parameters(), **adam)
    torch_zero1, torch_fsdp = "torch ZeroRedundancyOptimizer + DDP", "torch fully_shard"
    ways = {"zero.py ZeRO-1": (lambda model: ours(model, 1), torch_zero1),   # and whom it is compared with
            "zero.py ZeRO-2": (lambda model: ours(model, 2), torch_zero1),
            "zero.py FSDP": (lambda model: ours(model, 3), torch_fsdp),
            torch_zero1: (peer_zero1, torch_zero1), torch_fsdp: (peer_fsdp, torch_fsdp)}
    for label in SHAPES:
        runs = {}
        for name, (make, _) in ways.items():
            model, ids = model_and_ids(label)
            wrapped, synchronise, optimizer = make(model)

            def step(wrapped=wrapped, synchronise=synchronise, optimizer=optimizer, ids=ids):
                M.lm_loss(wrapped(ids[:, :-1]), ids[:, 1:])[0].backward()
                synchronise()
                optimizer.step()
                optimizer.zero_grad()
            runs[name] = step
        times = interleaved(runs, rounds)
        rows += [[f"{label}: {name}", f"{times[name]:.1f}", f"{times[peer] / times[name]:.2f}"]
                 for name, (_, peer) in ways.items()]
    return rows


BENCHES = {"ddp": bench_ddp, "zero": bench_zero}


def main():
    p = M.cli(__doc__)
    p.add_argument("what", nargs="?", choices=(*BENCHES, "all"), default="all", help="which table")
    p.add_argument("--rounds", type=int, default=5, help="timed rounds of three steps each")
    p.add_argument("--world_size", type=int, default=2, help="ranks")
    args = p.parse_args()
    for name, bench in BENCHES.items():
        if args.what in (name, "all"):
            rows = ddp.launch(bench, args.world_size, args.rounds)[0]
            threads = max(1, torch.get_num_threads() // args.world_size)
            M.table(f"{name}: {args.world_size} gloo ranks of {threads} threads, torch {torch.__version__}, "
                    f"load {os.getloadavg()[0]:.1f}, median of {args.rounds} interleaved rounds",
                    ["", "ms a step", "torch's / this"], rows)


if __name__ == "__main__":
    main()
