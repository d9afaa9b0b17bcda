"""Tests of zero.py: (1) equal to one process, (2) torch's classes, (3) invariants, (4) accounting, (5) runs.

Four rank processes live as long as the module; a test runs a function on the first N of them
(`ranks(N, f, ...)`), each time in a fresh process group on loopback.
"""
import dataclasses, functools, multiprocessing, os, random, re, shlex
import signal, subprocess, sys, threading, time, traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import bpe  # noqa: E402
import model as M  # noqa: E402
import zero as Z  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

torch.set_num_threads(1)
close = torch.testing.assert_close
C = M.ModelConfig(vocab_size=61, context_length=12, d_model=24, num_layers=3, num_heads=6, num_kv_heads=6,
                  d_ff=44, qk_norm=True, init="glorot")


def serve(pipe, port, rank):
    """A rank process: runs what it is sent until the pipe closes."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    while True:
        try:
            number, world, f, args = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group("gloo", store=dist.PrefixStore(str(number), store), rank=rank,
                                    world_size=world)
            pipe.send((True, f(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes, numbers = [], [], iter(range(10**9))
    for rank in range(4):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, store.port, rank), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)

    def run(world, f, *args):
        number = next(numbers)
        for pipe in pipes[:world]:
            pipe.send((number, world, f, args))
        answers = [pipe.recv() if pipe.poll(100) else (False, "no answer in 100 s") for pipe in pipes[:world]]
        failures = [f"rank {rank}:\n{value}" for rank, (fine, value) in enumerate(answers) if not fine]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]
    yield run
    for process in processes:
        process.kill()


# --- (1) equal to one process -------------------------------------------------------------------------------

def data(c, batch, steps=5):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, c.vocab_size, (steps, batch, c.context_length + 1), generator=g)
    return ids[..., :-1], ids[..., 1:]


# Adam divides a gradient by its own size, up to eps: rounding of 1e-8 in a gradient near 0 moves a weight by
# lr/eps 1e-8 = 1e-6.
ADAM = dict(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-5)


def alone(c, batch, groups=1, optimizer_cls=torch.optim.AdamW, clip=0.5, **settings):
    """The oracle: plain training on the whole batch (in `groups` parts, where a loss is that of a part)."""
    torch.manual_seed(0)
    model = M.Transformer(c)
    optimizer = optimizer_cls(model.parameters(), **(settings or ADAM))
    losses = []
    for x, y in zip(*data(c, batch)):
        loads = []
        for a, b in zip(x.chunk(groups), y.chunk(groups)):
            loss = M.training_loss(model, a, b)[1] / groups
            loss.backward()
            total = loss.item() + (total if loads else 0)
            loads.append([m.load for m in model.modules() if isinstance(m, M.MoE)])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        for m, load in zip([m for m in model.modules() if isinstance(m, M.MoE)], zip(*loads)):
            m.load = sum(load) / groups
        model.balance_experts()
        losses.append((total, norm.item()))
    return {n: p.detach() for n, p in model.named_parameters()}, losses


def collect(trainer):
    """{name: whole tensor} from the pieces of all ranks."""
    pieces = [(n, Z.positions(trainer.shapes[n], trainer.split.get(n), first, p.numel()),
               p.detach().flatten().clone()) for n, first, p, _ in trainer.pieces()]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, pieces)
    found = {n: torch.full(shape, float("nan")) for n, shape in trainer.shapes.items()}
    for n, at, values in (x for pieces in everyone for x in pieces):
        found[n].view(-1)[at] = values
    return found


def together(c, batch, micro=0, optimizer_cls=torch.optim.AdamW, clip=0.5, settings=None, **layout):
    torch.manual_seed(0)
    trainer = Z.Trainer(M.Transformer(c), optimizer_cls=optimizer_cls, **layout, **(settings or ADAM))
    losses, dp, place = [], *trainer.mesh["dp"][1:]
    for x, y in zip(*data(c, batch)):
        losses.append(trainer.step(x.chunk(dp)[place], y.chunk(dp)[place], micro, clip=clip))
    return collect(trainer), losses


LAYOUTS = [(n, dict(stage=s)) for s in range(4) for n in (1, 2, 3, 4)]
LAYOUTS += [(2, dict(tp=2)), (3, dict(tp=3)), (2, dict(tp=2, sequence=False)), (2, dict(pp=2)),
            (3, dict(pp=3, kind="gpipe")), (4, dict(tp=2, stage=3)), (4, dict(pp=2, stage=1)),
            (4, dict(pp=2)), (4, dict(tp=2, pp=2))]


@pytest.mark.parametrize("world, layout", LAYOUTS, ids=str)
def test_equals_one_process(ranks, world, layout):
    expected, losses = alone(C, 12)
    for found, seen in ranks(world, functools.partial(together, C, 12, **layout)):
        close(torch.tensor(seen), torch.tensor(losses), rtol=1e-5, atol=1e-6)
        for name in expected:
            close(found[name], expected[name], rtol=0, atol=1e-6)


def fsdp_in(dtype):
    torch.manual_seed(0)
    trainer = Z.Trainer(M.Transformer(C), stage=3, compute_dtype=dtype, **ADAM)
    dp, place = trainer.mesh["dp"][1:]
    for x, y in zip(*data(C, 6)):
        trainer.step(x.chunk(dp)[place], y.chunk(dp)[place], clip=0.5)
    return collect(trainer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_equals_its_emulation(ranks, dtype):
    """One process that rounds the matrices before use, takes each rank's gradient in that precision, and adds
    up, clips and steps in fp32."""
    torch.manual_seed(0)
    model = M.Transformer(C)
    master = dict(model.named_parameters())
    model.embedding.register_forward_hook(lambda module, ids, x: x.float())      # the stream is fp32
    optimizer = torch.optim.AdamW(master.values(), **ADAM)
    for x, y in zip(*data(C, 6)):
        for a, b in zip(x.chunk(2), y.chunk(2)):
            used = {n: p.detach().to(dtype if p.dim() > 1 else p.dtype).requires_grad_()
                    for n, p in master.items()}
            with torch.autocast("cpu", dtype):
                loss = M.lm_loss(torch.func.functional_call(model, used, (a,)), b)[0]
            for p, g in zip(master.values(), torch.autograd.grad(loss, list(used.values()))):
                p.grad = g.float() / 2 + (0 if p.grad is None else p.grad)
        torch.nn.utils.clip_grad_norm_(master.values(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for found in ranks(2, fsdp_in, dtype):
        for name in master:
            close(found[name], master[name].detach(), rtol=0, atol=1e-4)


MOE = dataclasses.replace(C, num_experts=4, experts_per_token=2, shared_experts=1, d_expert=20)


@pytest.mark.parametrize("world, more", [
    (1, {}), (2, {}), (4, {"capacity_factor": 1.0}), (2, {"router": "expert_choice"}),
    (2, {"balance": "bias"})], ids=str)
def test_experts_equal_one_process(ranks, world, more):
    """Groups: capacity, balance and expert choice are those of the tokens of a rank."""
    c = dataclasses.replace(MOE, **more)
    expected, losses = alone(c, 8, groups=world)
    for found, seen in ranks(world, functools.partial(together, c, 8, ep=True)):
        close(torch.tensor(seen), torch.tensor(losses), rtol=1e-5, atol=1e-6)
        for name in expected:
            close(found[name], expected[name], rtol=0, atol=1e-6)


def save(c, folder, layout, steps):
    torch.manual_seed(0)
    trainer = Z.Trainer(M.Transformer(c), **layout, **ADAM)
    dp, place = trainer.mesh["dp"][1:]
    for x, y in list(zip(*data(c, 12)))[:steps]:
        trainer.step(x.chunk(dp)[place], y.chunk(dp)[place], clip=0.5)
    Z.save_sharded(folder, trainer, tokenizer="t")


def go_on(c, folder, layout):
    torch.manual_seed(1)                                   # other weights, to be overwritten
    trainer = Z.Trainer(M.Transformer(c), **layout, **ADAM)
    Z.ShardedCheckpoint(folder).load(trainer)
    dp, place = trainer.mesh["dp"][1:]
    for x, y in list(zip(*data(c, 12)))[trainer.steps_done:]:
        trainer.step(x.chunk(dp)[place], y.chunk(dp)[place], clip=0.5)
    return collect(trainer) | dict(trainer.model.named_buffers())


@pytest.mark.parametrize("before, after", [
    ((2, dict(stage=3)), (3, dict(stage=3))), ((3, dict(stage=1)), (2, dict(tp=2))),
    ((2, dict(tp=2)), (4, dict(pp=2, stage=1))), ((4, dict(tp=2, stage=3)), (1, {}))], ids=str)
def test_checkpoint_resumes_in_any_layout(ranks, tmp_path, before, after):
    expected, _ = alone(C, 12)
    ranks(before[0], save, C, str(tmp_path), before[1], 3)
    for found in ranks(after[0], go_on, C, str(tmp_path), after[1]):
        for name in expected:
            close(found[name], expected[name], rtol=0, atol=1e-6)


def test_checkpoint_of_experts(ranks, tmp_path):
    """Experts on two ranks, then FSDP on the same two: balance is still that of halves of the batch."""
    c = dataclasses.replace(MOE, balance="bias")
    ranks(2, save, c, str(tmp_path), dict(ep=True), 5)
    expected = ranks(2, go_on, c, str(tmp_path), dict(ep=True))[0]
    assert any(expected[n].abs().sum() > 0 for n in expected if n.endswith("ffn.bias"))
    ranks(2, save, c, str(tmp_path), dict(ep=True), 2)     # what was there is removed
    for found in ranks(2, go_on, c, str(tmp_path), dict(stage=3)):
        for name in expected:
            close(found[name], expected[name], rtol=0, atol=1e-6)


VARIANTS = {"tied": dict(tie_embeddings=True), "grouped": dict(num_heads=8, num_kv_heads=4, d_head=6),
            "gpt2": dict(norm="layernorm", position="learned", ffn="gelu", bias="all", init="gpt2"),
            "parallel": dict(parallel=True, norm_position="double")}


@pytest.mark.parametrize("layout", [dict(stage=2), dict(stage=3), dict(tp=2), dict(tp=2, sequence=False),
                                    dict(pp=2)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_in_micro_batches(ranks, variant, layout):
    c = dataclasses.replace(C, **VARIANTS[variant])
    if variant == "tied" and "pp" in layout:
        with pytest.raises(AssertionError, match="drop --tie_embeddings"):
            ranks(2, functools.partial(together, c, 4, **layout))
        return
    expected, losses = alone(c, 8)
    for found, seen in ranks(2, functools.partial(together, c, 8, micro=2, **layout)):
        close(torch.tensor(seen), torch.tensor(losses), rtol=1e-5, atol=1e-6)
        for name in expected:
            close(found[name], expected[name], rtol=0, atol=1e-6)


def recomputed(batch):
    torch.manual_seed(0)
    trainer = Z.Trainer(M.Transformer(C), stage=3, **ADAM)
    trainer.model.checkpoint_blocks = True
    dp, place = trainer.mesh["dp"][1:]
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):            # on to where layers are freed
        for x, y in zip(*data(C, batch)):
            trainer.step(x.chunk(dp)[place], y.chunk(dp)[place], clip=0.5)
    return collect(trainer)


def test_fsdp_recomputes_blocks(ranks):
    expected, _ = alone(C, 4)
    for name, value in ranks(2, recomputed, 4)[1].items():
        close(value, expected[name], rtol=0, atol=1e-6)


# --- (2) torch's classes, and other optimizers --------------------------------------------------------------

class Toy(torch.nn.Module):
    """Any module: matrices of odd sizes, a tied and a frozen one, norms, and a layer that nothing uses."""
    def __init__(self):
        super().__init__()
        self.embedding, self.norm = torch.nn.Embedding(7, 5), torch.nn.LayerNorm(5)
        half_frozen = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Linear(5, 5, bias=False))
        half_frozen[0].requires_grad_(False)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(5, 5), half_frozen])
        self.frozen, self.head = torch.nn.Linear(5, 5), torch.nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen.requires_grad_(False)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + self.frozen(torch.tanh(layer(x)))
        return self.head(self.norm(x))


def toy_step(model, optimizer, rank, world, synchronise):
    ids = torch.arange(24).view(12, 2) % 7
    x = ids.chunk(world)[rank]
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    synchronise()
    optimizer.step()


def toy_fsdp():
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)                                # rank 0's weights count
    toy = Toy()
    names = [n for n, _ in toy.named_parameters()]
    model = Z.FSDP(toy)
    assert [n for n, _ in toy.named_parameters()] == names and type(toy.head) is torch.nn.Linear
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        toy_step(model, optimizer, rank, world, model.finish_gradient_synchronization)
    whole = model.gather_full_params()
    assert list(whole) == names
    return whole


def toy_alone(optimizer_cls=torch.optim.SGD, steps=3, **settings):
    torch.manual_seed(0)
    toy = Toy()
    optimizer = optimizer_cls(toy.parameters(), **(settings or dict(lr=0.1, momentum=0.9)))
    for _ in range(steps):
        toy_step(toy, optimizer, 0, 1, lambda: None)
    return {n: p.detach() for n, p in toy.named_parameters()}, optimizer.state_dict()


@pytest.mark.parametrize("world", [2, 3])
def test_fsdp_wraps_any_module(ranks, world):
    expected, _ = toy_alone()
    for whole in ranks(world, toy_fsdp):
        for name in expected:
            close(whole[name], expected[name], rtol=0, atol=1e-6)


def toy_sharded(cls, state, steps):
    """Trains `steps` steps from state; -> (weights, state_dict)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    toy, (weights, saved) = Toy(), state or (None, None)
    if weights:
        toy.load_state_dict(weights | {"head.weight": weights["embedding.weight"]})
    first, *rest = toy.parameters()
    optimizer = getattr(Z, cls)([first], torch.optim.AdamW, lr=0.5)
    optimizer.add_param_group({"params": rest, "lr": 0.01})
    optimizer.param_groups[0]["lr"] = 0.01                 # as a schedule would
    if saved:
        optimizer.load_state_dict(saved)
    for _ in range(steps):
        toy_step(toy, optimizer, rank, world, optimizer.finish_gradient_synchronization)
    assert not any(p.requires_grad is False and p in optimizer.inner.state for p in rest)
    return {n: p.detach().clone() for n, p in toy.named_parameters()}, optimizer.state_dict()


@pytest.mark.parametrize("cls", ["ShardedOptimizer", "ZeRO2"])
def test_state_dict_is_the_unsharded_one_at_any_world_size(ranks, cls):
    expected, state = toy_alone(torch.optim.AdamW, 4, lr=0.01)
    halfway = ranks(3, toy_sharded, cls, None, 2)[2]
    for weights, found in ranks(2, toy_sharded, cls, halfway, 2):
        for name in expected:
            close(weights[name], expected[name], rtol=0, atol=1e-6)
        assert found["state"].keys() == state["state"].keys()
        for i, values in state["state"].items():
            for k, v in values.items():
                close(found["state"][i][k], v, rtol=1e-5, atol=1e-7)


def with_muon(whole):
    import train
    torch.manual_seed(0)
    model = M.Transformer(C)
    matrices = [p for n, p in model.named_parameters() if n.startswith("blocks.") and p.dim() == 2]
    optimizer = Z.ShardedOptimizer([{"params": matrices, "muon": True}], train.Muon, whole=whole, lr=0.02)
    for x, y in zip(*data(C, 4)):
        M.lm_loss(model(x), y)[0].backward()               # the same gradients on all ranks: step() alone
        optimizer.step()
        optimizer.zero_grad()
    numbers = sum(v.numel() for s in optimizer.inner.state.values() for v in s.values() if torch.is_tensor(v))
    return {n: p.detach() for n, p in model.named_parameters()}, numbers


def test_whole_matrices_for_muon(ranks):
    (expected, all_states), = ranks(1, with_muon, True)
    answers = ranks(3, with_muon, True)
    for found, states in answers:
        assert 0 < states < all_states / 2
        for name in expected:
            close(found[name], expected[name], rtol=0, atol=1e-5)
    assert sum(states for _, states in answers) == all_states


def test_vocabulary_parallel_loss_of_extreme_logits(ranks):
    for loss, grad in ranks(3, extreme):
        z = (torch.arange(10.0) * 1000 - 5000).repeat(4, 1).requires_grad_()
        expected = torch.nn.functional.cross_entropy(z, torch.tensor([0, 9, 5, 9]))
        expected.backward()
        close(loss, expected.detach())
        close(grad, z.grad)


def extreme():
    world, rank = dist.get_world_size(), dist.get_rank()
    z = (torch.arange(10.0) * 1000 - 5000).repeat(4, 1).requires_grad_()
    parts = z.tensor_split(world, -1)
    first = sum(p.shape[-1] for p in parts[:rank])
    loss = Z.vocabulary_parallel_loss(parts[rank], torch.tensor([0, 9, 5, 9]), dist.group.WORLD, first)
    loss.backward()
    grad = z.grad.clone()
    dist.all_reduce(grad)
    return loss.detach(), grad


# --- (3) invariants -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("N", [1, 2, 3, 7])
def test_flat_slices_cover_every_number_once(N, whole, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: N)
    tensors = [torch.arange(float(n)) + 100 * i for i, n in enumerate((5, 1, 12, 7, 123))]
    found = [[] for _ in tensors]
    for rank in range(N):
        monkeypatch.setattr(dist, "get_rank", lambda group=None: rank)
        flat = Z.Flat(tensors, whole=whole)
        buffer = flat.buffer()
        for view, t in zip(flat.views(buffer), tensors):
            view.copy_(t)
        for i, (first, part) in enumerate(flat.parts(flat.mine(buffer))):
            found[i] += [(first + j, x) for j, x in enumerate(part.flatten().tolist())]
            assert not whole or part.numel() in (0, tensors[i].numel())
    for t, numbers in zip(tensors, found):
        assert sorted(numbers) == list(enumerate(t.tolist()))


def whole_layers():
    """How many layers are whole whenever one starts to compute, forward and backward; and at the end."""
    torch.manual_seed(0)
    model = Z.FSDP(M.Transformer(C))
    seen, use = [], Z.Unit.use

    def spy(unit):
        use(unit)
        seen.append((model.units.index(unit), [i for i, u in enumerate(model.units) if u.here]))
    Z.Unit.use = spy
    try:
        x, y = (t[0] for t in data(C, 2))
        M.lm_loss(model(x), y)[0].backward()
        model.finish_gradient_synchronization()
    finally:
        Z.Unit.use = use
    assert all(u.whole.untyped_storage().nbytes() == 0 and not u.here for u in model.units)
    assert sum(p.numel() for p in model.parameters()) < 0.6 * M.num_params(C)
    return seen


def test_fsdp_keeps_two_layers_at_most_and_gathers_one_ahead(ranks):
    for seen in ranks(2, whole_layers):
        order = [i for i, _ in seen]
        assert order == [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]     # embedding, three blocks, head, and back
        assert all(set(here) <= {i, i - 1} for i, here in seen)


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
@pytest.mark.parametrize("p, m", [(1, 3), (2, 1), (2, 4), (3, 7), (4, 4)])
def test_pipeline_order_and_its_bubble(kind, p, m):
    """Run the orders with one tick a forward and two a backward: nobody waits for what never comes, and the
    idle share is (p-1)/(m+p-1)."""
    orders = [Z.pipeline_order(kind, s, p, m) for s in range(p)]
    done, clock, at, most = {}, [0] * p, [0] * p, [0] * p
    while any(at[s] < 2 * m for s in range(p)):
        moved = False
        for s in range(p):
            if at[s] < 2 * m:
                what, i = orders[s][at[s]]
                needs = (("F", i, s - 1) if s else None) if what == "F" else \
                    (("B", i, s + 1) if s < p - 1 else ("F", i, s))
                if needs is None or needs in done:
                    clock[s] = max(clock[s], done.get(needs, 0)) + (1 if what == "F" else 2)
                    done[what, i, s] = clock[s]
                    at[s], moved = at[s] + 1, True
                    so_far = [w for w, _ in orders[s][:at[s]]]
                    most[s] = max(most[s], so_far.count("F") - so_far.count("B"))
        assert moved
    assert max(clock) * (m / (m + p - 1)) == pytest.approx(3 * m)
    assert most == ([m] * p if kind == "gpipe" else [min(m, p - s) for s in range(p)])


def test_whole_checkpoints_only(tmp_path, ranks):
    for steps in (1, 3):
        ranks(2, save, C, str(tmp_path), dict(stage=3), steps)
    path, = Z.checkpoints(tmp_path)                        # the older is gone
    assert path.endswith("step-00000003")
    newer = tmp_path / "step-00000009"
    newer.mkdir()
    for file in Path(path).iterdir():
        (newer / file.name).write_bytes(file.read_bytes())
    assert Z.checkpoints(tmp_path)[0] == str(newer)
    (newer / "rank-1-of-2.pt").write_bytes(b"half")        # a crash while writing, at three moments
    assert Z.checkpoints(tmp_path) == [path]
    (newer / "rank-1-of-2.pt").unlink()
    assert Z.checkpoints(tmp_path) == [path]
    (newer / "whole.json").write_text("{")
    assert Z.checkpoints(tmp_path) == [path]
    Z.ShardedCheckpoint(tmp_path).export(tmp_path / "one.pt")
    model, (expected, _) = M.load_model(tmp_path / "one.pt"), ranks(1, together, C, 12)[0]
    assert model.config == C and M.load_checkpoint(tmp_path / "one.pt")["step"] == 3
    assert set(expected) == {n for n, _ in model.named_parameters()}
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        Z.ShardedCheckpoint(tmp_path / "nothing")


# --- (4) accounting -----------------------------------------------------------------------------------------

def account(layout, m, batch=8):
    torch.manual_seed(0)
    trainer = Z.Trainer(M.Transformer(C), **layout, **ADAM)
    dp, place = trainer.mesh["dp"][1:]
    x, y = (t[0].chunk(dp)[place] for t in data(C, batch))
    trainer.step(x, y, len(x) // m)
    with Z.CountBytes() as sent:
        trainer.step(x, y, len(x) // m)
    trainer.gradients(x, y)
    return Z.measured_state(trainer), sent.total()


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("name", Z.LAYOUTS)
def test_bytes_held_and_sent_equal_the_formulas(ranks, name, m):
    layout = Z.LAYOUTS[name][0]
    state, sent = Z.predict(C, layout, 2, 8, m)
    measured, counted = ranks(2, account, layout, m)[0]
    assert counted == sent                                 # to the byte
    assert sum(measured.values()) == pytest.approx(state, rel=0.02)


@pytest.mark.parametrize("world", [3, 4])
def test_bytes_of_odd_worlds(ranks, world):
    for stage in range(4):
        state, sent = Z.predict(C, dict(stage=stage), world, 12, 1)
        for measured, counted in ranks(world, account, dict(stage=stage), 1, 12):
            assert counted == sent and sum(measured.values()) == pytest.approx(state, rel=0.02)


def counted_exchange():
    x = torch.arange(12.0).view(6, 2)
    to, fro = ([1, 5], [1, 2]) if dist.get_rank() == 0 else ([2, 4], [5, 4])
    with Z.CountBytes() as sent:
        Z.Exchange.apply(x, to, fro, dist.group.WORLD)
    return sent.total()


def test_unequal_exchange_counts_what_leaves(ranks):
    assert ranks(2, counted_exchange) == [5 * 2 * 4, 2 * 2 * 4]


@pytest.mark.parametrize("stage, world", [(1, 8), (2, 64), (3, 1024)])
def test_simulated_ranks_of_a_7b_model(stage, world):
    c = M.ModelConfig(**M.PRESETS["llama2-7b"])
    n, whole = M.num_params(c), M.count_params(c)["norms"]
    predicted, measured = Z.state_bytes(n, stage, world, whole), Z.simulate(c, stage, world)
    for kind in predicted:
        assert measured[kind] == pytest.approx(predicted[kind], rel=0.02)
    assert not dist.is_initialized()


def test_published_figures():
    """Rajbhandari et al. 2020, figure 1, for 7.5B parameters on 64 ranks: 120, 31.4, 16.6, 1.9 GB with
    2 + 2 + 12 bytes a parameter; ours are 4 + 4 + 8, so that stages 0 and 3 agree."""
    gb = [sum(Z.state_bytes(7.5e9, s, 64).values()) / 1e9 for s in range(4)]
    assert gb[0] == 120 and gb[3] == pytest.approx(1.9, abs=0.05) and gb == sorted(gb, reverse=True)
    c, sequences, rows = Z.plan(70e9, 1024, "h100", 2**22)
    assert M.num_params(c) == pytest.approx(70e9, rel=0.05) and sequences == 1024
    fitting = [r for r in rows if r["fits"]]
    assert rows[:len(fitting)] == fitting == sorted(fitting, key=lambda r: -r["mfu"])
    for r in rows:
        assert r["dp"] * r["tp"] * r["pp"] == 1024 and r["mfu"] <= Z.REACHED + 1e-9
    assert not any(r["fits"] for r in rows if r["stage"] == 0 and r["tp"] * r["pp"] == 1)    # 1,120 GB


# --- (5) runs: faults, resuming, the command line -----------------------------------------------------------

def misbehave(what, store):
    rank = dist.get_rank()
    for step in range(1, 6):
        store.set(f"step/{rank}", str(step))
        if rank == 1 and step == 3:
            {"dies": lambda: os.kill(os.getpid(), signal.SIGKILL), "raises": lambda: 1 / 0,
             "hangs": threading.Event().wait}[what]()
        dist.all_reduce(torch.ones(3))
    return rank


@pytest.mark.parametrize("what, line", [
    ("dies", "rank 1 at step 3: was killed by SIGKILL"), ("raises", "rank 1 at step 3: ZeroDivisionError"),
    ("hangs", "rank 1 at step 3: does not answer")])
def test_a_lost_rank_ends_all_and_is_named(what, line):
    begin, children = time.monotonic(), set(multiprocessing.active_children())
    with pytest.raises(RuntimeError, match=line) as e:
        Z.launch(misbehave, 3, what, timeout=3)
    assert "\n" not in str(e.value) and time.monotonic() - begin < 30
    assert set(multiprocessing.active_children()) <= children


def differ(_, store):
    Z.check_alike({"seed": dist.get_rank() // 2, "data": "x"})


def test_ranks_that_differ_are_named():
    with pytest.raises(ValueError, match="rank 2 has seed 1, rank 0 0"):
        Z.launch(differ, 3, None)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("text"), random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randrange(1, 7))) for _ in range(50)]
    for i in range(30):
        (folder / f"{i}.txt").write_text(" ".join(rng.choices(words, k=200)))
    return folder


@pytest.fixture(scope="module")
def tokens(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    bpe.prepare(folder, [text], vocab_size=300, num_processes=1, log=lambda *_: None)
    return folder


SMALL = ("--d_model 32 --num_layers 2 --context_length 16 --batch_size 4 --save_steps 2 --device cpu "
         "--steps 6").split()


def arguments(tokens, out, *more):
    return [*SMALL, "--data", str(tokens), "--out", str(out), *more]


def weights(out):
    return M.load_checkpoint(out / "checkpoint.pt")["model"]


def test_killed_under_torchrun_it_restarts_and_ends_with_the_same_weights(tokens, tmp_path, capfd):
    """`torchrun --max-restarts`: rank 1 is killed at step 5; all restart from the checkpoint of step 4."""
    script = tmp_path / "killed.py"
    script.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import zero
draw = zero.draw
def killed(tokens, T, seed, first, count):
    if os.environ["RANK"] == "1" and first // 4 == 4 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(tokens, T, seed, first, count)
zero.draw = killed
zero.main()
""")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                "--max-restarts=2"]
    run = subprocess.run([*torchrun, script, *arguments(tokens, tmp_path / "a", "--stage", "3")],
                         env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                         timeout=200)
    assert run.returncode == 0, run.stderr
    assert "resumed" in run.stdout                         # torchrun says itself who was killed
    Z.main(arguments(tokens, tmp_path / "b", "--stage", "3"))                # undisturbed
    for name, w in weights(tmp_path / "b").items():
        close(weights(tmp_path / "a")[name], w, rtol=0, atol=0)
    with pytest.raises(SystemExit):
        Z.main(arguments(tokens, tmp_path / "b", "--resume", "--num_heads", "4"))
    err = capfd.readouterr().err.strip()
    assert "num_heads 2 there, 4 here" in err and err.count("\n") == 0


@pytest.mark.parametrize("bad, says", [
    ("--lrr 3", "unrecognized arguments: --lrr 3"), ("--steps -1", "--steps -1 is out of range: 0 or more"),
    ("--d_model 33 --num_heads 2", "d_model=33 is not divisible"), ("--resume", "try --steps 1000"),
    ("--gpu tpu", "invalid choice: 'tpu'"), ("--plan --gpus 7 --tokens 5e4", "do not split over --gpus 7")])
def test_mistakes_are_one_line(bad, says, capsys, tmp_path):
    with pytest.raises(SystemExit) as e:
        Z.main([*bad.split(), "--out", str(tmp_path)])
    err = capsys.readouterr().err.strip()
    assert e.value.code == 2 and says in err and "\n" not in err


@pytest.mark.parametrize("bad, says", [
    ("--batch_size 5", "try --batch_size 4"), ("--tp 2 --num_heads 1", "allowed are 1"),
    ("--pp 2 --stage 3", "do not go together"), ("--tp 3", "2 ranks are not a multiple of --tp 3")])
def test_mistakes_that_ranks_find_are_one_line(bad, says, tokens, tmp_path, capfd):
    with pytest.raises(SystemExit) as e:
        Z.main(arguments(tokens, tmp_path, *bad.split()))
    err = capfd.readouterr().err.strip()
    assert e.value.code == 2 and says in err and "\n" not in err


def test_commands_of_the_docstring_parse():
    commands = Z.__doc__.split("You should see")[0]
    found = re.findall(r"^(?:Run)? +(?:python|torchrun [^#\n]*?) ?zero\.py(.*?)(?:#.*)?$", commands, re.M)
    assert len(found) == 5
    for line in found:
        Z.parse_args(shlex.split(line))


def test_plan_prints(capsys, tmp_path):
    Z.main("--plan --params 70e9 --gpus 1024 --gpu h100 --out".split() + [str(tmp_path)])
    assert "MFU" in capsys.readouterr().out
