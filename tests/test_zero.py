"""Tests of zero.py: (1) equal to one process, (2) torch's classes, (3) invariants, (4) accounting, (5) runs.

Four rank processes live as long as the module; a test runs a function on the first N of them
(`ranks(N, f, ...)`), each time in a fresh process group on loopback.
"""
import dataclasses, datetime, functools, json, math, multiprocessing, os, random, re, shlex
import signal, socket, sys, threading, time, traceback
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import bpe  # noqa: E402
import model as M  # noqa: E402
import zero as Z  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

torch.set_num_threads(1)
FORK = multiprocessing.get_context("forkserver")           # ranks: forks of a process that has loaded torch
FORK.set_forkserver_preload(["torch", "torch._dynamo"])    # every optimizer imports both
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
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes, numbers = [], [], iter(range(10**9))
    for rank in range(4):
        ours, theirs = FORK.Pipe()
        processes.append(FORK.Process(target=serve, args=(theirs, store.port, rank), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)

    def run(world, f, *args, **kwargs):
        number = next(numbers)
        for pipe in pipes[:world]:
            pipe.send((number, world, functools.partial(f, **kwargs), args))
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


def alone(c, batch, groups=1, clip=0.5):
    """The oracle: plain training on the whole batch (in `groups` parts, where a loss is that of a part)
    -> (weights, [(loss, norm), ...])."""
    torch.manual_seed(0)
    model = M.Transformer(c)
    optimizer, losses = torch.optim.AdamW(model.parameters(), **ADAM), []
    for x, y in zip(*data(c, batch)):
        total, loads = 0.0, []
        for a, b in zip(x.chunk(groups), y.chunk(groups)):
            loss = M.training_loss(model, a, b)[1] / groups
            loss.backward()
            total += loss.item()
            loads.append([m.load for m in model.modules() if isinstance(m, M.MoE)])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        for m, load in zip([m for m in model.modules() if isinstance(m, M.MoE)], zip(*loads)):
            m.load = sum(load) / groups
        model.balance_experts()
        losses.append((total, norm.item()))
    return {n: p.detach() for n, p in model.named_parameters()}, losses


def make(c, seed=0, **layout):
    torch.manual_seed(seed)
    return Z.Trainer(M.Transformer(c), **layout, **ADAM)


def steps(trainer, c, batch, first=0, last=5, micro=0, clip=0.5):
    """-> [(loss, norm), ...] of these steps of data()."""
    dp, place = trainer.mesh["dp"][1:]
    return [trainer.step(x.chunk(dp)[place], y.chunk(dp)[place], micro, clip=clip)
            for x, y in list(zip(*data(c, batch)))[first:last]]


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


def together(c, batch, micro=0, clip=0.5, recompute=False, **layout):
    trainer = make(c, **layout)
    trainer.model.checkpoint_blocks = recompute            # on to where layers are freed, not just to what is
    with torch.utils.checkpoint.set_checkpoint_early_stop(not recompute):    # needed
        losses = steps(trainer, c, batch, micro=micro, clip=clip)
    return collect(trainer), losses


def equal(answers, expected, losses=None, atol=1e-6):
    """Every rank's (weights, losses) are these."""
    for found, seen in answers:
        if losses:
            close(torch.tensor(seen), torch.tensor(losses), rtol=1e-5, atol=1e-6)
        for name in expected:
            close(found[name], expected[name], rtol=0, atol=atol)


LAYOUTS = [(n, dict(stage=s)) for s in range(4) for n in (1, 2, 3, 4)]
LAYOUTS += [(2, dict(tp=2)), (3, dict(tp=3)), (2, dict(tp=2, sequence=False)), (2, dict(pp=2)),
            (3, dict(pp=3, kind="gpipe")), (4, dict(tp=2, stage=3)), (4, dict(pp=2, stage=1)),
            (4, dict(pp=2)), (4, dict(tp=2, pp=2)), (2, dict(stage=3, recompute=True))]


@pytest.mark.parametrize("world, layout", LAYOUTS, ids=str)
def test_equals_one_process(ranks, world, layout):
    equal(ranks(world, together, C, 12, **layout), *alone(C, 12))


def test_clip_0_is_no_clipping(ranks):
    equal(ranks(2, together, C, 4, clip=0, stage=2), *alone(C, 4, clip=math.inf))


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
    expected = {n: p.detach() for n, p in master.items()}
    equal(ranks(2, together, C, 6, stage=3, compute_dtype=dtype), expected, atol=1e-4)


def autocast_in_backward(**layout):
    """-> is autocast on where gradients are computed?"""
    trainer, seen = make(C, compute_dtype=torch.bfloat16, **layout), set()
    for p in trainer.model.parameters():
        p.register_hook(lambda grad: seen.add(torch.is_autocast_enabled("cpu")))
    steps(trainer, C, 4, last=1)
    return seen


@pytest.mark.parametrize("layout", [dict(stage=1), dict(pp=2)], ids=str)
def test_autocast_is_for_forward_alone(ranks, layout):
    assert ranks(2, autocast_in_backward, **layout) == [{False}, {False}]


MOE = dataclasses.replace(C, num_experts=4, experts_per_token=2, shared_experts=1, d_expert=20)


@pytest.mark.parametrize("world, more", [
    (1, {}), (2, {}), (4, {"capacity_factor": 1.0}), (2, {"router": "expert_choice"}),
    (2, {"balance": "bias"})], ids=str)
def test_experts_equal_one_process(ranks, world, more):
    """Groups: capacity, balance and expert choice are those of the tokens of a rank."""
    c = dataclasses.replace(MOE, **more)
    equal(ranks(world, together, c, 8, ep=True), *alone(c, 8, groups=world))


def save(c, folder, layout, number):
    """Without a group of its own: the store is there, and waits as long as a disk needs."""
    trainer = make(c, **layout)
    steps(trainer, c, 12, 0, number)
    with mock.patch.object(dist, "new_group", None):
        Z.save_sharded(folder, trainer, dist.distributed_c10d._get_default_store(), tokenizer="t")


def go_on(c, folder, layout):
    """Rank 1 reads when the others have read and wait: not in a collective, which has --timeout seconds."""
    trainer = make(c, seed=1, **layout)                    # other weights, to be overwritten
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 1:
        store.wait(["arrived"], datetime.timedelta(seconds=30))
    Z.ShardedCheckpoint(folder).load(trainer, store)
    for _, _, piece, _ in trainer.pieces():                # a slice, not a view that keeps the whole alive
        for v in trainer.updater.state[piece].values():
            assert v.untyped_storage().nbytes() == v.nbytes
    steps(trainer, c, 12, trainer.steps_done)
    return collect(trainer) | dict(trainer.model.named_buffers()), None


@pytest.mark.parametrize("before, after", [
    ((2, dict(stage=3)), (3, dict(stage=3))), ((3, dict(stage=1)), (2, dict(tp=2))),
    ((2, dict(tp=2)), (4, dict(pp=2, stage=1))), ((4, dict(tp=2, stage=3)), (1, {}))], ids=str)
def test_checkpoint_resumes_in_any_layout(ranks, tmp_path, before, after):
    ranks(before[0], save, C, str(tmp_path), before[1], 3)
    equal(ranks(after[0], go_on, C, str(tmp_path), after[1]), alone(C, 12)[0])


def test_checkpoint_of_experts(ranks, tmp_path):
    """Experts on two ranks, then FSDP on the same two: balance is still that of halves of the batch."""
    c = dataclasses.replace(MOE, balance="bias")
    ranks(2, save, c, str(tmp_path), dict(ep=True), 5)
    expected = ranks(2, go_on, c, str(tmp_path), dict(ep=True))[0][0]
    assert any(expected[n].abs().sum() > 0 for n in expected if n.endswith("ffn.bias"))
    ranks(2, save, c, str(tmp_path), dict(ep=True), 2)     # what was there is removed
    equal(ranks(2, go_on, c, str(tmp_path), dict(stage=3)), expected)


VARIANTS = {"tied": dict(tie_embeddings=True), "grouped": dict(num_heads=8, num_kv_heads=4, d_head=6),
            "gpt2": dict(norm="layernorm", position="learned", ffn="gelu", bias="all", init="gpt2"),
            "parallel": dict(parallel=True, norm_position="double")}


@pytest.mark.parametrize("world, layout", [
    (2, dict(stage=2)), (2, dict(stage=3)), (2, dict(tp=2)), (2, dict(tp=2, sequence=False)),
    (4, dict(tp=2, stage=3)), (2, dict(pp=2))], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_in_micro_batches(ranks, variant, world, layout):
    c = dataclasses.replace(C, **VARIANTS[variant])
    if variant == "tied" and "pp" in layout:
        with pytest.raises(AssertionError, match="drop --tie_embeddings"):
            ranks(2, together, c, 4, **layout)
        return
    equal(ranks(world, together, c, 8, micro=2, **layout), *alone(c, 8))


# --- (2) torch's classes, and other optimizers --------------------------------------------------------------

class Toy(torch.nn.Module):
    """Any module: matrices of odd sizes, a tied, a frozen, an unused one, norms, a layer used twice."""
    def __init__(self):
        super().__init__()
        self.embedding, self.norm = torch.nn.Embedding(7, 5), torch.nn.LayerNorm(5)
        half_frozen = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Linear(5, 5, bias=False))
        half_frozen[0].requires_grad_(False)
        half_used = torch.nn.Linear(5, 5)
        half_used.unused = torch.nn.Parameter(torch.ones(5, 5))
        self.layers = torch.nn.ModuleList([half_used, half_frozen])
        self.frozen, self.head = torch.nn.Linear(5, 5), torch.nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen.requires_grad_(False)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + self.frozen(torch.tanh(layer(x)))
        return self.head(self.norm(x))


def toy_step(model, optimizer, rank, world, synchronise):
    x = (torch.arange(24).view(12, 2) % 7).chunk(world)[rank]

    def closure():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        synchronise()
    optimizer.step(closure)


def clipping(sharded, synchronise):
    """-> (what to do between backward and step, the norms that it found)."""
    norms = []

    def finish():
        synchronise()
        norms.append(Z.clip_grad_norm(sharded, 0.2))
    return finish, norms


def toy_fsdp():
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)                                # rank 0's weights count
    toy = Toy()
    names = [n for n, _ in toy.named_parameters()]
    model = Z.FSDP(toy)
    assert [n for n, _ in toy.named_parameters()] == names and type(toy.head) is torch.nn.Linear
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    finish, norms = clipping(model, model.finish_gradient_synchronization)
    for _ in range(3):
        toy_step(model, optimizer, rank, world, finish)
    assert not any(unit.here for unit in model.units)
    whole = model.gather_full_params()
    assert list(whole) == names
    return whole, norms


def toy_alone(optimizer_cls, number, **settings):
    torch.manual_seed(0)
    toy = Toy()
    optimizer, norms = optimizer_cls(toy.parameters(), **settings), []

    def fill():                                            # what took no part has gradient 0
        for p in toy.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad and p.grad is None else p.grad
        norms.append(torch.nn.utils.clip_grad_norm_(toy.parameters(), 0.2).item())
    for _ in range(number):
        toy_step(toy, optimizer, 0, 1, fill)
    assert min(norms) > 0.2                                # it has acted
    return {n: p.detach() for n, p in toy.named_parameters()}, optimizer.state_dict(), norms


@pytest.mark.parametrize("world", [2, 3])
def test_fsdp_wraps_any_module(ranks, world):
    expected, _, norms = toy_alone(torch.optim.SGD, 3, lr=0.1, momentum=0.9)
    equal(ranks(world, toy_fsdp), expected, norms)


def toy_sharded(cls, state, number):
    """Trains this many steps from state; -> (weights, state_dict)."""
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
    finish, _ = clipping(optimizer, optimizer.finish_gradient_synchronization)
    for _ in range(number):
        toy_step(toy, optimizer, rank, world, finish)
    assert not any(p.requires_grad is False and p in optimizer.inner.state for p in rest)
    return {n: p.detach().clone() for n, p in toy.named_parameters()}, optimizer.state_dict()


@pytest.mark.parametrize("cls", ["ShardedOptimizer", "ZeRO2"])
def test_state_dict_is_the_unsharded_one_at_any_world_size(ranks, cls):
    expected, state, _ = toy_alone(torch.optim.AdamW, 4, lr=0.01)
    halfway = ranks(3, toy_sharded, cls, None, 2)[2]
    answers = ranks(2, toy_sharded, cls, halfway, 2)
    equal(answers, expected)
    for _, found in answers:
        assert found["state"].keys() == state["state"].keys()
        for i, values in state["state"].items():
            for k, v in values.items():
                close(found["state"][i][k], v, rtol=1e-5, atol=1e-7)


def with_muon():
    import train
    torch.manual_seed(0)
    model = M.Transformer(C)
    matrices = [p for n, p in model.named_parameters() if n.startswith("blocks.") and p.dim() == 2]
    optimizer = Z.ShardedOptimizer([{"params": matrices, "muon": True}], train.Muon, whole=True, lr=0.02)
    for x, y in zip(*data(C, 4)):
        M.lm_loss(model(x), y)[0].backward()               # the same gradients on all ranks: step() alone
        optimizer.step()
        optimizer.zero_grad()
    numbers = sum(v.numel() for s in optimizer.inner.state.values() for v in s.values() if torch.is_tensor(v))
    return {n: p.detach() for n, p in model.named_parameters()}, numbers


def test_whole_matrices_for_muon(ranks):
    (expected, all_states), = ranks(1, with_muon)
    answers = ranks(3, with_muon)
    equal(answers, expected, atol=1e-5)
    assert all(0 < states < all_states / 2 for _, states in answers)
    assert sum(states for _, states in answers) == all_states


EXTREME = torch.arange(10.0) * 1000 - 5000


def extreme():
    world, rank = dist.get_world_size(), dist.get_rank()
    z = EXTREME.repeat(4, 1).requires_grad_()
    parts = z.tensor_split(world, -1)
    first = sum(p.shape[-1] for p in parts[:rank])
    loss = Z.vocabulary_parallel_loss(parts[rank], torch.tensor([0, 9, 5, 9]), dist.group.WORLD, first)
    loss.backward()
    dist.all_reduce(z.grad)
    return loss.detach(), z.grad


def test_vocabulary_parallel_loss_of_extreme_logits(ranks):
    z = EXTREME.repeat(4, 1).requires_grad_()
    expected = torch.nn.functional.cross_entropy(z, torch.tensor([0, 9, 5, 9]))
    expected.backward()
    for loss, grad in ranks(3, extreme):
        close(loss, expected.detach())
        close(grad, z.grad)


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


def whole_layers(tied):
    """[(layer, was it gathered ahead?, those that are whole), ...] whenever one starts to compute."""
    torch.manual_seed(0)
    model = Z.FSDP(M.Transformer(dataclasses.replace(C, tie_embeddings=tied)))
    seen, use = [], Z.Unit.use

    def spy(unit):
        ahead = unit.here
        use(unit)
        seen.append((model.units.index(unit), ahead, {i for i, u in enumerate(model.units) if u.here}))
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


@pytest.mark.parametrize("tied, order", [(False, [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]),   # embedding, three blocks,
                                         (True, [0, 1, 2, 3, 0, 0, 3, 2, 1, 0])])   # head, and back
def test_fsdp_keeps_two_layers_at_most_and_gathers_one_ahead(ranks, tied, order):
    for seen in ranks(2, whole_layers, tied):
        assert [i for i, _, _ in seen] == order
        assert [ahead for _, ahead, _ in seen] == [False, True, True, True, True] * 2
        for i, _, here in seen:                            # a tied one is needed until backward's end
            assert here <= ({i, 0} if tied else {i, i - 1})


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
    (tmp_path / "notes.txt").write_text("mine")
    for number in (1, 3):
        ranks(2, save, C, str(tmp_path), dict(stage=3), number)
    (path, _), = Z.checkpoints(tmp_path)                   # the older is gone
    assert path.endswith("step-00000003") and (tmp_path / "notes.txt").exists()
    newer = tmp_path / "step-00000009"
    newer.mkdir()
    for file in Path(path).iterdir():
        (newer / file.name).write_bytes(file.read_bytes())
    assert Z.checkpoints(tmp_path)[0][0] == str(newer)
    part = newer / "rank-1-of-2.pt"
    for harm in (lambda: part.write_bytes(b"half"), part.unlink,             # a crash at any moment, or worse
                 *(functools.partial((newer / "whole.json").write_text, text)
                   for text in ("{", "{}", "[]", "3", '{"files": 3}', '{"files": {}}'))):
        harm()
        assert [found for found, _ in Z.checkpoints(tmp_path)] == [path]
    Z.ShardedCheckpoint(tmp_path).export(tmp_path / "one.pt")
    model, (expected, _) = M.load_model(tmp_path / "one.pt"), ranks(1, together, C, 12)[0]
    assert model.config == C and M.load_checkpoint(tmp_path / "one.pt")["step"] == 3
    assert set(expected) == {n for n, _ in model.named_parameters()}
    part = Path(path) / "rank-1-of-2.pt"
    part.write_bytes(bytes(part.stat().st_size))           # the right size, and nothing in it
    with pytest.raises(ValueError, match="is damaged"):
        Z.ShardedCheckpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        Z.ShardedCheckpoint(tmp_path / "nothing")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_full_disk_leaves_the_old_file(tmp_path, error):
    def write(f):
        f.write(b"new")
        raise error
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="could not save .*Free some space"):
        Z.write_file(tmp_path / "a", write)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


# --- (4) accounting -----------------------------------------------------------------------------------------

def account(c, layout, m, batch=8):
    trainer = make(c, **layout)
    dp, place = trainer.mesh["dp"][1:]
    x, y = (t[0].chunk(dp)[place] for t in data(c, batch))
    trainer.step(x, y, len(x) // m)
    with Z.CountBytes() as sent:
        trainer.step(x, y, len(x) // m)
    trainer.gradients(x, y)
    return Z.measured_state(trainer), sent.total


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("name", Z.LAYOUTS)
@pytest.mark.parametrize("variant", [{}, VARIANTS["gpt2"]], ids=["", "gpt2"])
def test_bytes_held_and_sent_equal_the_formulas(ranks, variant, name, m):
    c, layout = dataclasses.replace(C, **variant), Z.LAYOUTS[name][0]
    state, sent = Z.predict(c, layout, 2, 8, m)
    measured, counted = ranks(2, account, c, layout, m)[0]
    assert counted == sent                                 # to the byte
    assert sum(measured.values()) == pytest.approx(state, rel=0.02)


@pytest.mark.parametrize("world", [3, 4])
def test_bytes_of_odd_worlds(ranks, world):
    for stage in range(4):
        state, sent = Z.predict(C, dict(stage=stage), world, 12, 1)
        for measured, counted in ranks(world, account, C, dict(stage=stage), 1, 12):
            assert counted == sent and sum(measured.values()) == pytest.approx(state, rel=0.02)


def test_bytes_of_expert_parallel(ranks):
    """A layer: two all-to-alls of the visits forward, two backward, and one of their counts. All else is
    averaged. With expert choice all experts are visited equally often."""
    c = dataclasses.replace(MOE, router="expert_choice")
    visits, experts = 4 * c.context_length * 2, c.num_layers * 4 * 3 * 24 * 20
    others = M.num_params(c) - experts
    sent = (c.num_layers * (4 * visits * 24 * 4 + 4 * 8) + 2 * 4 * others) / 2 + 24    # and three sums
    for measured, counted in ranks(2, account, c, dict(ep=True), 1):
        assert counted == sent
        assert sum(measured.values()) == pytest.approx(16 * (others + experts / 2), rel=0.02)


def counted_exchange():
    x = torch.arange(12.0).view(6, 2)
    to, fro = ([1, 5], [1, 2]) if dist.get_rank() == 0 else ([2, 4], [5, 4])
    with Z.CountBytes() as sent:
        Z.exchange(x, to, fro, dist.group.WORLD)
    return sent.total


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


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("more, sequences", [({}, 4), (dict(d_model=256, context_length=32), 1)], ids=str)
def test_memory_in_the_course_of_a_step(stage, more, sequences):
    """Once activations are most of the peak, once weights, gradients and messages."""
    c = M.ModelConfig(**more)
    predicted, measured = Z.step_memory(c, stage, 2, sequences), Z.measured_step_memory(c, stage, 2, sequences)
    assert measured == pytest.approx(predicted, rel=0.02) and not dist.is_initialized()


def test_limits_of_fsdp_x_tensor_parallelism_are_those_of_the_plan():
    peak, _, near, far = Z.GPUS["h100"]
    c, speed, gpus = Z.shape_of(70e9), peak * Z.REACHED, 1024
    n, D, L, T = M.num_params(c), c.d_model, c.num_layers, c.context_length
    t, b, in_turn = Z.fsdp_tp_limit(n, D, L, speed, near, far)
    for tokens, ranks, time_of in ((b, t, max), (in_turn, t / 2, sum)):      # where both sides are equal
        messages = 6 * n / ranks / far, 16 * L * tokens * ranks * D / near
        assert time_of(messages) == pytest.approx(6 * n * tokens / speed)
        assert messages[0] == pytest.approx(messages[1])
    more = M.train_flops(c, T) / (6 * n * T)               # attention's products, which the limits leave out
    products = 6 * n * 1024 * T / (gpus * speed)
    for tp, size in ((2, 1), (4, 2), (8, 4), (8, 8)):
        r = Z.plan_layout(c, gpus, "h100", 1024, 3, tp, 1, False, size)
        others = (r["dp"] - 1) / r["dp"], (tp - 1) / tp    # of ranks, who get what one sends
        assert r["sending"] * more == pytest.approx(others[0] * (b * t / tp) / (size * T / tp))
        stream = r["seconds"] - products * more * max(1, r["sending"])
        assert stream / products == pytest.approx(others[1] * tp / t)


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
             "hangs": threading.Event().wait, "stops": lambda: os.kill(os.getpid(), signal.SIGSTOP)}[what]()
        dist.all_reduce(torch.ones(3))


@pytest.mark.parametrize("what, line", [
    ("dies", "rank 1 at step 3: was killed by SIGKILL"), ("raises", "rank 1 at step 3: ZeroDivisionError"),
    ("hangs", "rank 1 at step 3: does not answer"), ("stops", "rank 1 at step 3: does not answer")])
def test_a_lost_rank_ends_all_and_is_named(what, line):
    begin, children = time.monotonic(), set(multiprocessing.active_children())
    with pytest.raises(RuntimeError, match=line) as e:
        Z.launch(misbehave, 3, what, timeout=3)
    assert "\n" not in str(e.value) and time.monotonic() - begin < 30
    assert set(multiprocessing.active_children()) <= children


def missed_call():
    """Rank 1 does not come to a collective of its tensor-parallel group -> do ranks 0 hear of it, in time?"""
    mesh, failed = Z.make_mesh(2, 1, timeout=0.2), False
    if dist.get_rank() % 2 == 0:
        try:
            dist.all_reduce(torch.ones(3), group=mesh["tp"][0])
        except Exception:
            failed = True
    dist.barrier()
    return failed


def test_groups_wait_no_longer_than_the_world(ranks):
    assert ranks(4, missed_call) == [True, False] * 2


def test_a_first_start_that_fails_does_not_let_the_next_resume_an_older_run(tmp_path, monkeypatch):
    """torchrun's starts, of one rank; what train() would do is left out."""
    def checkpoint():
        (folder / "step-7").mkdir(parents=True)
        (folder / "step-7" / "whole.json").write_text('{"files": {}, "step": 7, "config": 0, "shapes": 0}')
    folder, store, resumed = tmp_path / "sharded", dist.HashStore(), []
    for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([(store, 0, 1)]))
    monkeypatch.setattr(Z, "run_rank", lambda job, args, *_, **__: resumed.append(args.resume))
    for prepare in (checkpoint, lambda: None, checkpoint):  # an earlier run's; none; the second start's own
        prepare()
        Z.run(Z.parse_args(["--steps", "9", "--out", str(tmp_path), "--device", "cpu"]))
    assert resumed == [False, False, True]
    assert Z.checkpoints(f"{folder}.old")


def sleeper(pipe, store):
    pipe.send(os.getpid())
    time.sleep(1000)


def runs(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_ranks_do_not_outlive_their_parent():
    ours, theirs = FORK.Pipe()
    parent = FORK.Process(target=Z.launch, args=(sleeper, 2, theirs))
    parent.start()
    pids, end = [ours.recv() for _ in range(2) if ours.poll(60)], time.monotonic() + 80
    assert len(pids) == 2 and all(map(runs, pids))
    parent.kill()
    while any(map(runs, pids)):
        assert time.monotonic() < end
        time.sleep(0.1)


def differ(_, store):
    Z.check_alike({"seed": dist.get_rank() // 2, "data": "x"})


def test_ranks_that_differ_are_named():
    with pytest.raises(ValueError, match="rank 2 has seed 1, rank 0 0"):
        Z.launch(differ, 3, None)


def other_text(args, store):
    """set_up, on whose rank 1 some tokens of the same number are others."""
    load = bpe.load_tokens

    def others(*which):
        tokens = load(*which)
        return tokens[::-1] if dist.get_rank() == 1 else tokens
    bpe.load_tokens = others
    Z.set_up(args, store)


def test_other_text_on_a_rank_is_named(tokens, tmp_path):
    with pytest.raises(ValueError, match=r"^the ranks differ: rank 1 has tokens '(\d+), .*, rank 0 '\1, .*'$"):
        Z.launch(other_text, 2, Z.parse_args(arguments(tokens, tmp_path)))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    text, folder, rng = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("tokens"), random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randrange(1, 7))) for _ in range(50)]
    for i in range(30):
        (text / f"{i}.txt").write_text(" ".join(rng.choices(words, k=200)))
    bpe.prepare(folder, [text], vocab_size=300, num_processes=1, log=lambda *_: None)
    return folder


def arguments(tokens, out, *more):
    return [*("--d_model 32 --num_layers 2 --context_length 16 --batch_size 4 --save_steps 2 --device cpu "
              "--steps 6").split(), "--data", str(tokens), "--out", str(out), *more]


def torchrun(flags, worker, *args):
    """What torchrun does with these flags, but for a function: its workers are forks of a process that has
    loaded torch."""
    from torch.distributed import launcher, run
    config, *_ = run.config_from_args(run.parse_args([*flags, "a function"]))
    config.start_method = "forkserver"
    launcher.api.elastic_launch(config, worker)(*args)


def main_dies_once(folder, flags):
    """zero.py, in which rank 1 is killed as it draws the sequences of step 5."""
    draw, killed = Z.draw, folder / "killed"

    def dies(tokens, T, seed, first, count):
        if os.environ["RANK"] == "1" and first // 4 == 4 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(tokens, T, seed, first, count)
    Z.draw = dies
    sys.stdout = sys.stderr = open(folder / "printed", "a", 1)
    Z.main(flags)


def test_killed_under_torchrun_it_restarts_and_ends_with_the_same_weights(tokens, tmp_path, capfd):
    """Two torchruns, as on two hosts, which count their restarts apart: rank 1 is killed at step 5; all
    restart, and go on from the checkpoint of step 4."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ("--nnodes=2 --nproc_per_node=1 --max-restarts=3 --rdzv_backend=c10d "
             f"--rdzv_endpoint=127.0.0.1:{port}").split()
    torchruns = [FORK.Process(target=torchrun, args=(
        flags, main_dies_once, tmp_path, arguments(tokens, tmp_path / "a"))) for _ in range(2)]
    for process in torchruns:
        process.start()
    for process in torchruns:
        process.join(200)
        process.kill()
    printed = (tmp_path / "printed").read_text()
    assert [process.exitcode for process in torchruns] == [0, 0], printed
    assert "resumed" in printed and printed.count("error: rank 1 at step 5: does not answer") == 1
    Z.main(arguments(tokens, tmp_path / "b"))              # undisturbed
    found, expected = (M.load_checkpoint(tmp_path / out / "checkpoint.pt")["model"] for out in "ab")
    for name in expected:
        close(found[name], expected[name], rtol=0, atol=0)
    for flag, says in (("--num_heads", "num_heads 2 there, 4 here"), ("--seed", "seed 0 there, 4 here")):
        capfd.readouterr()
        with pytest.raises(SystemExit):
            Z.main(arguments(tokens, tmp_path / "b", "--resume", flag, "4"))
        err = capfd.readouterr().err.strip()
        assert says in err and err.count("\n") == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_kill_save_the_step_under_way(tokens, tmp_path, number, capfd):
    log, more = tmp_path / "log.jsonl", ["--steps", "100000", "--save_steps", "100000"]

    def press():
        end = time.monotonic() + 60
        while not (log.exists() and log.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), number)
    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(SystemExit) as e:
        Z.main(arguments(tokens, tmp_path, *more))
    out, err = capfd.readouterr()
    assert e.value.code == 130 and err.strip() == "interrupted; --resume goes on from the last checkpoint"
    done = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert M.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == len(done) == done[-1], out
    assert Z.checkpoints(tmp_path / "sharded")[0][1]["step"] == len(done)


@pytest.mark.parametrize("bad, says", [
    ("--lrr 3", "unrecognized arguments: --lrr 3"), ("--steps -1", "--steps -1 is out of range: 0 or more"),
    ("--d_model 33 --num_heads 2", "d_model=33 is not divisible"), ("--resume", "try --steps 1000"),
    ("--gpu tpu", "invalid choice: 'tpu'"), ("--plan --gpus 7 --tokens 5e4", "do not split over --gpus 7"),
    ("--batch_size 6", "try --batch_size 8"), ("torchrun", "the lecture (no --steps) starts its own ranks")])
def test_mistakes_are_one_line(bad, says, capsys, tmp_path, monkeypatch):
    if bad == "torchrun":
        monkeypatch.setenv("RANK", "0")
        bad = ""
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
    commands = Z.__doc__.split("You should see")[0].replace("\\\n", " ")          # lines that go on
    found = re.findall(r"^(?:Run)? +(?:python|torchrun [^#\n]*?) ?zero\.py(.*?)(?:#.*)?$", commands, re.M)
    assert len(found) == 5
    for line in found:
        assert Z.parse_args(shlex.split(line)).unused == []


def test_plan_prints_and_says_what_it_leaves_aside(capsys, tmp_path):
    Z.main([*"--plan --params 70e9 --gpus 1024 --gpu h100 --lr 3 --d_ff 64 --out".split(), str(tmp_path)])
    out = capsys.readouterr().out
    assert "MFU" in out and "--lr, --d_ff: of no effect here" in out
