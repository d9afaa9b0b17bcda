"""Tests of ddp.py: (1) equal to one process, (2) to torch's collectives and attention, (3) invariants,
(4) bytes and overlap, (5) faults, files, the command line.

Four rank processes live as long as the module: `ranks(P, f, ...)` runs f on the first P of them, in a group
of its own, and returns what each returned. Faults kill their ranks: those tests start others with ddp.launch.
"""
import functools, itertools, json, multiprocessing, os, pickle, random, re, shlex, signal, socket
import sys, threading, time, traceback
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import bpe  # noqa: E402
import ddp as D  # noqa: E402
import model as M  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

torch.set_num_threads(1)
FORK = multiprocessing.get_context("forkserver")           # ranks: forks of a process that has loaded torch
FORK.set_forkserver_preload(["torch", "torch._dynamo"])    # every optimizer imports both
close = torch.testing.assert_close
WORLDS = (1, 2, 3, 4)
SHAPE = dict(vocab_size=61, context_length=12, d_model=24, num_layers=3, num_heads=4, d_ff=44, qk_norm=True,
             init="glorot")


def serve(pipe, port, rank):
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    while True:
        try:
            number, P, f, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        dist.init_process_group("gloo", store=dist.PrefixStore(str(number), store), rank=rank, world_size=P)
        try:
            result = True, f(*args)
        except Exception:
            result = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(result))
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks():
    numbers, pipes = itertools.count(), []
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for rank in range(max(WORLDS)):
        ours, theirs = FORK.Pipe()
        FORK.Process(target=serve, args=(theirs, store.port, rank), daemon=True).start()
        theirs.close()
        pipes.append(ours)

    def run(P, f, *args):
        number = next(numbers)
        for pipe in pipes[:P]:
            pipe.send_bytes(pickle.dumps((number, P, f, args)))
        results = [pickle.loads(pipe.recv_bytes()) for pipe in pipes[:P]]
        for fine, value in results:
            assert fine, value
        return [value for _, value in results]
    yield run
    for pipe in pipes:
        pipe.close()


# --- 1. equal to one process --------------------------------------------------------------------------------

def make(seed=0, dtype=torch.float32, **knobs):
    torch.manual_seed(seed)
    return M.Transformer(M.ModelConfig(**{**SHAPE, **knobs})).to(dtype)


def some_ids(n=12, T=12):
    return torch.randint(0, 61, (n, T + 1), generator=torch.Generator().manual_seed(1))


def train(model, ids, steps=5, micro=0, clip=0.1, positions=None):
    """clip is far below the gradients' norm, so that it acts in every step."""
    optimizer = D.make_optimizer(model, 1e-3)
    return [(D.backward(model, ids, positions, micro).item(), D.update(model, optimizer, clip).item())
            for _ in range(steps)]


def exact_loss(dtype):
    """lm_loss rounds to fp32, whatever it gets: in float64 the tests want all of it."""
    def loss64(logits, targets, z_loss=0.0):
        ce = torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
        return ce, ce
    return mock.patch.object(M, "lm_loss", loss64 if dtype == torch.float64 else M.lm_loss)


def difference(model, other):
    return max((p - q).abs().max().item() for p, q in zip(model.parameters(), other.parameters()))


def against_one(way, dtype, knobs, freeze="", micro=0, bucket_mb=0.005):
    """-> largest difference of weights and of gradient norms after 5 steps, on this rank."""
    P, rank = dist.get_world_size(), dist.get_rank()
    single, many = make(0, dtype, **knobs), make(rank, dtype, **knobs)       # rank 0's weights are to be used
    for model in (single, many):
        for name, p in model.named_parameters():
            p.requires_grad_(not (freeze and freeze in name))
    with exact_loss(dtype):
        expected = train(single, some_ids())
        got = train(D.WAYS[way](many, bucket_mb), some_ids().chunk(P)[rank], micro=micro)
    return difference(single, many), max(abs(a[1] - b[1]) for a, b in zip(expected, got))


@pytest.mark.parametrize("P", WORLDS)
@pytest.mark.parametrize("way", D.WAYS)
def test_five_steps_equal_one_process(ranks, P, way):
    for weights, norms in ranks(P, against_one, way, torch.float32, {}):
        assert weights < 1e-6 and norms < 1e-6
    for weights, norms in ranks(P, against_one, way, torch.float64, {}):
        assert weights < 1e-12 and norms < 1e-12


@pytest.mark.parametrize("way", D.WAYS)
@pytest.mark.parametrize("case", [
    dict(knobs=dict(tie_embeddings=True)), dict(knobs={}, freeze="blocks.1"), dict(knobs={}, micro=1),
    dict(knobs={}, micro=2, bucket_mb=1e-9), dict(knobs={}, bucket_mb=1000.0),
    dict(knobs=dict(bias="all", norm="layernorm", position="learned")),
    dict(knobs=dict(mtp=1)),
    dict(knobs=dict(num_experts=4, experts_per_token=2, balance="bias")),
], ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()))
def test_tied_frozen_accumulated_and_any_bucket(ranks, way, case):
    for weights, _ in ranks(3, functools.partial(against_one, way, torch.float64, **case)):
        assert weights < 1e-12


class Branches(torch.nn.Module):
    """Which of three matrices is used depends on the data: a different one on each rank, the last on none."""
    def __init__(self):
        super().__init__()
        self.branch = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(3)).double()

    def forward(self, x, which):
        return self.branch[which](x).square().sum()


def unused(way, bucket_mb):
    torch.manual_seed(0)
    x, rank = torch.randn(2, 3, dtype=torch.float64), dist.get_rank()
    net, out = D.WAYS[way](Branches(), bucket_mb, find_unused=True), []
    for step in range(2):                                  # the same again: no state is left behind
        net.zero_grad()
        net(x[rank], rank).backward()
        net.finish_gradient_synchronization()
        out.append([None if p.grad is None else p.grad.clone() for p in net.parameters()])
    single = Branches()
    single.load_state_dict(net.module.state_dict())
    ((single(x[0], 0) + single(x[1], 1)) / 2).backward()
    return out, [p.grad for p in single.parameters()]


@pytest.mark.parametrize("way", D.WAYS)
@pytest.mark.parametrize("bucket_mb", [1e-9, 1.0])
def test_parameters_used_by_some_or_by_nobody(ranks, way, bucket_mb):
    for steps, expected in ranks(2, unused, way, bucket_mb):
        for got in steps:
            for g, e in zip(got, expected):
                assert (g is None) == (e is None)
                if e is not None:
                    close(g, e)


def refused(f, *args):
    """What f says when it refuses, on this rank."""
    try:
        f(*args)
    except (ValueError, RuntimeError) as e:
        return str(e)


def used_wrongly(way, case):
    net, x = D.WAYS[way](Branches()), torch.ones(3, dtype=torch.float64)
    try:
        loss = net(x, 0) if case == "unused" else sum(net(x, i) for i in range(3))
        loss.backward(retain_graph=True)
        if case == "twice":
            loss.backward()
        net.finish_gradient_synchronization()
    finally:
        net.works = []                                     # not to outlive the group


@pytest.mark.parametrize("way", D.WAYS)
def test_an_unused_parameter_or_a_second_backward_pass_is_refused(ranks, way):
    assert all(text.startswith("4 parameters have no gradient, branch.1.weight is the first")
               for text in ranks(2, refused, used_wrongly, way, "unused"))
    if way in ("overlapped", "bucketed"):
        assert "no_sync" in ranks(1, refused, used_wrongly, way, "twice")[0]


def buffers_and_weights():
    net = torch.nn.BatchNorm1d(3)
    net.running_mean.fill_(dist.get_rank() + 5)
    net.weight.data.fill_(dist.get_rank() + 7)
    D.NaiveDDP(net)
    return net.running_mean.tolist(), net.weight.tolist()


def test_rank_0_gives_weights_and_buffers(ranks):
    assert ranks(3, buffers_and_weights) == [([5.0] * 3, [7.0] * 3)] * 3


# --- 2. collectives and attention against torch's -----------------------------------------------------------

def test_eight_collectives(ranks):
    for P in WORLDS:
        x = [[float(i + 10 * r) for i in range(P)] for r in range(P)]
        total = [sum(column) for column in zip(*x)]
        for r, held in enumerate(ranks(P, eight, P)):
            root = r == 0
            assert held == {"broadcast": x[0], "scatter": [x[0][r]], "gather": sum(x, []) if root else [],
                            "reduce": total if root else [], "all-gather": sum(x, []),
                            "reduce-scatter": [total[r]], "all-reduce": total,
                            "all-to-all": [x[j][r] for j in range(P)]}


def eight(P):
    x = torch.arange(float(P)) + 10 * dist.get_rank()
    return {name: t.tolist() for name, t in D.eight_collectives(x).items()}


def rings(n):
    P, r = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(r)
    x = torch.randn(P, n).double().squeeze(-1)             # (P,n); n = 1: (P,)
    total = x.clone()
    dist.all_reduce(total)
    errors, counts = [], []
    for ring in (D.ring_all_reduce, D.ring_all_reduce_naive):
        with D.Count() as count:
            out = ring(x)
        errors.append((out - total).abs().max().item())
        counts.append((count.calls.get("send", 0), count.sent(P), count.payload.get("recv_", 0)))
    errors.append((D.ring_reduce_scatter(x.flatten()) - total.flatten().chunk(P)[r]).abs().max().item())
    gathered = torch.empty(P, n).double()
    dist.all_gather(list(gathered.unbind()), x.view(P, n)[0])
    same = torch.equal(D.ring_all_gather(x.view(P, n)[0]), gathered.flatten())
    return errors, counts, same, D.ring_all_reduce(x).tolist(), x.nbytes


@pytest.mark.parametrize("P", WORLDS)
@pytest.mark.parametrize("n", [1, 7, 123])
def test_rings_equal_torch_and_send_what_the_formula_says(ranks, P, n):
    results = ranks(P, rings, n)
    for errors, counts, same, out, size in results:
        assert max(errors) < 1e-12 and same
        assert out == results[0][3]                        # to the bit, on all ranks
        assert counts[0] == (2 * (P - 1), 2 * (P - 1) / P * size, 2 * (P - 1) / P * size)
        assert counts[1] == (P - 1, (P - 1) * size, (P - 1) * size)


def test_a_ring_needs_equal_parts(ranks):
    texts = ranks(2, refused, D.ring_all_reduce, torch.ones(7))
    assert texts == ["7 numbers do not split into 2 parts: pad them"] * 2


def attention(way, shape, dtype):
    """Sequence-parallel attention of this rank's tokens -> errors of the output and of dq, dk, dv."""
    C, r, (B, N, K, T, H) = dist.get_world_size(), dist.get_rank(), shape
    torch.manual_seed(0)
    size = 3 if dtype == torch.float64 else 1              # 3: a few keys take it all
    q, k, v, dy = (torch.randn(B, heads, T, H, dtype=dtype) * size for heads in (N, K, K, N))
    whole = [t.clone().requires_grad_() for t in (q, k, v)]
    y = torch.nn.functional.scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=True)
    y.backward(dy)
    at = D.my_positions(r, C, T, zigzag=way == "ring")
    mine = [t[:, :, at].clone().requires_grad_() for t in (q, k, v)]
    function = D.RingAttention.apply if way == "ring" else D.ulysses_attention
    out = function(*mine, dist.group.WORLD)
    out.backward(dy[:, :, at])
    pairs = [(out, y[:, :, at]), *((a.grad, b.grad[:, :, at]) for a, b in zip(mine, whole))]
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]


@pytest.mark.parametrize("P", WORLDS)
@pytest.mark.parametrize("way", ["ring", "ulysses"])
def test_split_attention_and_its_gradients(ranks, P, way):
    for N, K, piece, H in ((2 * P, P, 1, 2), (P, P, 7, 6), (6 * P, 2 * P, 3, 4)):
        shape = (2, N, K, 2 * P * piece, H)
        for errors in ranks(P, attention, way, shape, torch.float64):
            assert max(errors) < 1e-12
        for errors in ranks(P, attention, way, shape, torch.float32):
            assert max(errors) < 1e-5
    if way == "ring":                                      # any number of heads
        for errors in ranks(P, attention, way, (1, 3, 1, 2 * P * 5, 4), torch.float64):
            assert max(errors) < 1e-12


def attention_under_autocast():
    """Ring attention in bf16 on one rank -> errors against fp32. Scores reach 50: in bf16 they are off by an
    eighth."""
    torch.manual_seed(0)
    q, k, v, dy = ((torch.randn(2, 4, 64, 32) * size).bfloat16() for size in (4, 4, 1, 1))
    mine, whole = ([t.to(dtype, copy=True).requires_grad_() for t in (q, k, v)]
                   for dtype in (torch.bfloat16, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out = D.RingAttention.apply(*mine, dist.group.WORLD)
    out.backward(dy)
    y = torch.nn.functional.scaled_dot_product_attention(*whole, is_causal=True)
    y.backward(dy.float())
    return [((a - b).abs().max() / b.abs().max()).item()
            for a, b in [(out, y), *((a.grad, b.grad) for a, b in zip(mine, whole))]]


def test_ring_attention_keeps_its_scores_in_fp32_under_autocast(ranks):
    assert max(ranks(1, attention_under_autocast)[0]) < 0.015


def split_model(way, batch, knobs):
    C, lanes = 2, dist.get_world_size() // 2
    groups = [dist.new_group(range(i, i + C)) for i in range(0, lanes * C, C)]
    lane = dist.get_rank() // C
    single, many = make(0, torch.float64, **knobs), make(0, torch.float64, **knobs)
    positions = D.split_sequences(many, groups[lane], way)
    with exact_loss(torch.float64):
        train(single, some_ids(batch))
        train(D.BucketedDDP(many, 0.005), some_ids(batch).chunk(lanes)[lane], positions=positions)
    return difference(single, many)


@pytest.mark.parametrize("way", ["ring", "ulysses"])
@pytest.mark.parametrize("P", [2, 4])
def test_training_with_split_sequences_equals_one_process(ranks, way, P):
    """Four ranks are two lanes of two: both splits at once."""
    for knobs in ({}, dict(num_kv_heads=2, position="learned"),
                  dict(tie_embeddings=True, position="sinusoidal")):
        assert max(ranks(P, split_model, way, 4, knobs)) < 1e-12


# --- 3. invariants ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("C", [1, 2, 3, 5])
def test_zigzag_is_a_partition_and_balanced(C):
    T = 2 * C * 3
    held = [D.my_positions(r, C, T, True) for r in range(C)]
    assert sorted(torch.cat(held).tolist()) == list(range(T))
    n = T // C
    for r in range(C):
        pairs = 0
        for j in range(C):                                 # exactly the pairs that the causal mask allows
            seen = torch.zeros(n, n, dtype=torch.bool)
            queries, keys, causal = D.visible(r, j, n)
            seen[queries, keys] = True
            seen = seen.tril() if causal else seen
            assert torch.equal(seen, held[r][:, None] >= held[j][None])
            pairs += seen.sum().item()
        assert pairs == T * (T + 1) // 2 // C              # and as many on every rank


def split(way, knobs):
    D.split_sequences(make(**knobs), dist.group.WORLD, way)


@pytest.mark.parametrize("way, knobs, text", [
    ("ring", dict(context_length=10), "a sequence of 10 tokens does not split into 6 pieces for 3 ranks: "
                                      "try --context_length 6"),
    ("ulysses", {}, "4 key/value heads do not split among 3 ranks: use --attention ring, or "
                    "--sequence_ranks 1"),
    *(("ring", knobs, "--sequence_ranks splits plain causal attention alone: drop it, or --mixer, --layers, "
                      "--mtp, --window and --attn_softcap")
      for knobs in (dict(window=4), dict(attn_softcap=5.0), dict(mixer="linear"), dict(mtp=1)))])
def test_sequences_that_cannot_be_split_are_refused(ranks, way, knobs, text):
    assert ranks(3, refused, split, way, knobs) == [text] * 3


def test_every_window_once_an_epoch_and_the_same_for_any_number_of_ranks():
    tokens, T = torch.arange(60).numpy(), 5                # 11 windows
    epoch = D.batch(tokens, T, 0, 11, seed=3)
    assert sorted(epoch[:, 0].tolist()) == list(range(0, 55, 5))
    assert torch.equal(epoch[:, 1:], epoch[:, :1] + torch.arange(1, 6))      # one ahead
    assert not torch.equal(epoch, D.batch(tokens, T, 11, 11, seed=3))        # another order in the next
    parts = [D.batch(tokens, T, i, 4, 3) for i in (0, 4, 8)]
    assert torch.equal(torch.cat(parts), D.batch(tokens, T, 0, 12, 3))
    with pytest.raises(ValueError, match="5 tokens are not a context of 5 and one .* --context_length 4"):
        D.batch(tokens[:5], T, 0, 1, 0)


def test_the_schedule_ends_exactly_at_a_tenth():
    for steps in (1, 2, 7, 1000):
        rates = [D.learning_rate(s, steps, 3.0) for s in range(1, steps + 1)]
        assert max(rates) == pytest.approx(3.0) and min(rates) > 0
        assert steps == 1 or rates[-1] == pytest.approx(0.3)


# --- 4. bytes and overlap -----------------------------------------------------------------------------------

def counted(way, steps=2, micro=1):
    model = make()
    wrapped, P = D.WAYS[way](model, 0.01), dist.get_world_size()
    with D.Count() as count:
        train(wrapped, some_ids().chunk(P)[dist.get_rank()], steps, micro)
    units = len(getattr(wrapped, "units", []))
    return count.calls, count.payload, count.sent(P) / steps, len(list(model.parameters())), units


@pytest.mark.parametrize("P", [1, 2, 3])
def test_gradient_bytes_are_the_formula_whatever_is_accumulated(ranks, P):
    n = 4 * M.num_params(make().config)
    for way in D.WAYS:
        for calls, payload, sent, params, units in ranks(P, counted, way):
            assert sent == D.all_reduce_bytes(n, P)
            assert payload == {"allreduce_": 2 * n}
            assert calls == {"allreduce_": 2 * {"naive": params, "flat": 1, "overlapped": params,
                                                "bucketed": units}[way]}
    assert 2 < units < params


def sequence_count(way, knobs, batch):
    model = make(**knobs)
    positions = D.split_sequences(model, dist.group.WORLD, way)
    with D.Count() as count:
        D.backward(model, some_ids(batch), positions)
    C = dist.get_world_size()
    return count.sent(C), D.sequence_bytes(model.config, batch, C, way)


@pytest.mark.parametrize("C", [1, 2, 3])
@pytest.mark.parametrize("way", ["ring", "ulysses"])
def test_sequence_bytes_are_the_formula(ranks, C, way):
    for knobs in (dict(num_heads=6, num_kv_heads=6), dict(num_heads=6, num_kv_heads=6, num_layers=1)):
        for sent, formula in ranks(C, sequence_count, way, knobs, 3):
            assert sent == formula


def test_useful_ranks_is_where_both_times_meet():
    tokens, flops, wires, n = 1e6, 4e14, 5e10, 7e9
    P = D.useful_ranks(tokens, flops, wires)
    assert D.all_reduce_bytes(4 * n, P) / wires == pytest.approx(4 * tokens / P * n / flops)


def overlap(path):
    """A backward pass long enough (some 100 ms) that a busy machine does not hide what is to be seen."""
    found = {}
    for way in ("naive", "bucketed"):
        model = make(d_model=128, d_ff=256, num_layers=6, context_length=64, vocab_size=100)
        wrapped = D.WAYS[way](model, 0.3)
        ids = torch.randint(0, 100, (8, 65))
        train(wrapped, ids, 1)
        trace = f"{path}/{way}{dist.get_rank()}.json"
        with D.traced(trace):
            train(wrapped, ids, 1)
        spans = D.timeline(trace)
        messages = spans["messages"]
        found[way] = D.hidden_share(spans), messages[0][0], spans["matmul"][-1][1], len(messages)
    return found


def test_buckets_hide_behind_backward(ranks, tmp_path):
    """Counted on the rank that computes longest: the other one waits, for that and not for messages."""
    found = ranks(2, overlap, str(tmp_path))
    for hidden, first_message, last_matmul, messages in (f["naive"] for f in found):
        assert hidden == 0 and first_message > last_matmul and messages == 57
    for _, first_message, last_matmul, messages in (f["bucketed"] for f in found):
        assert first_message < last_matmul and 5 < messages < 57
    assert max(f["bucketed"][0] for f in found) >= 0.6
    assert D.hidden_share({"backward": [(0, 9)], "messages": []}) == 0       # one rank sends none


# --- 5. faults, files, the command line ---------------------------------------------------------------------

def fault(watch, kind):
    x = torch.ones(10)
    for step in range(1, 6):
        watch.at(step, "computing")
        if step == 3 and watch.rank == 1:
            if kind == "raise":
                raise ArithmeticError("no\nsecond line")
            if kind == "value":
                raise ValueError("bad value")
            if kind == "hang":
                time.sleep(1000)
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])
        watch.at(step, "waiting")
        dist.all_reduce(x)
    return os.getpid()


@pytest.mark.parametrize("kind, error, text", [
    ("kill", D.RankLost, r"rank 1 at step 3: killed by SIGKILL"),
    ("raise", D.RankLost, r"rank 1 at step 3: ArithmeticError: no \(test_ddp.py:\d+\)"),
    ("value", ValueError, r"rank 1 at step 3: bad value"),
    ("hang", D.RankLost, r"rank 1 at step 3 hangs: 1 s without progress \(--timeout allows more\)"),
    ("stop", D.RankLost, r"rank 1 at step 3 does not answer: it was killed or stopped"),
])
def test_a_lost_rank_is_named_and_all_end(kind, error, text):
    start, before = time.monotonic(), set(multiprocessing.active_children())
    with pytest.raises(error, match=f"^{text}$"):
        D.launch(fault, 3, kind, timeout=1)
    assert time.monotonic() - start < 30
    assert set(multiprocessing.active_children()) <= before                  # none is left


class Ended(Exception):
    """What Watch.end would have said."""


def accused(monkeypatch, *places):
    """places: (step, phase, part, seconds ago) of each rank -> what rank 0 says when its patience is over, or
    None. All live: they beat while it sleeps."""
    def end(watch, text):
        raise Ended(text)
    monkeypatch.setattr(D.Watch, "run", lambda watch: None)
    monkeypatch.setattr(D.Watch, "end", end)
    store = dist.HashStore()
    watches = [D.Watch(store, r, len(places), timeout=20.0) for r in range(len(places))]
    monkeypatch.setattr(time, "sleep", lambda seconds: [watch.beat() for watch in watches])
    for watch, (step, phase, part, ago) in zip(watches, places):
        watch.at(step, phase, part)
        watch.since -= ago
    try:
        watches[0].accuse("")
    except Ended as e:
        return str(e).removesuffix(": 20 s without progress (--timeout allows more)")
    assert watches[0].patience > time.monotonic() + 10     # it looks again later


@pytest.mark.parametrize("places, says", [
    ([(3, "waiting", 0, 30), (3, "computing", 5, 30)], "rank 1 at step 3 hangs"),
    ([(3, "computing", 1, 30), (2, "waiting", 0, 30)], "rank 1 at step 2 hangs"),
    ([(3, "computing", 1, 30), (3, "computing", 0, 30)], "rank 1 at step 3 hangs"),
    ([(3, "computing", 1, 30), (3, "computing", 1, 30)], "no rank moves at step 3"),     # a ring, or all slow
    ([(3, "computing", 1, 30), (3, "computing", 1, 30), (3, "waiting", 0, 30)],
     "rank 0 or 1 at step 3 hangs"),
    ([(3, "waiting", 0, 30)], "rank 0 at step 3 hangs"),
    ([(3, "waiting", 0, 30), (3, "computing", 5, 2)], None),                             # slow, but it moves
    ([(4, "waiting", 0, 30), (3, "saving", 0, 90)], None),
])
def test_only_who_is_behind_is_accused_and_only_when_nobody_moves(monkeypatch, places, says):
    assert accused(monkeypatch, *places) == says


def test_each_micro_batch_is_a_move():
    moves = []
    D.backward(make(), some_ids(6), micro_batch=2, at=moves.append)
    assert moves == [0, 1, 2]


def fine(watch, value):
    limit = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    return [dist.get_rank(), value, torch.get_num_threads(), limit.days]


def test_launch_returns_what_the_ranks_return():
    """And no collective of theirs gives up before Watch does."""
    assert D.launch(fine, 3, "x") == [[r, "x", 1, 1] for r in range(3)]


def unlike(watch):
    """Other code may have other flags."""
    D.check_alike({"flag": 3, "code": "abc"} if watch.rank != 2 else {"code": "abd", "new flag": 1})


def test_unlike_ranks_are_named():
    with pytest.raises(ValueError, match="^the ranks differ: rank 2 has flag None, rank 0 3; "
                                         "rank 2 has code 'abd', rank 0 'abc'$"):
        D.launch(unlike, 3)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder, text, rng = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("text"), random.Random(0)
    for i in range(40):
        (text / f"{i:02}.txt").write_text(" ".join("".join(rng.choices("abcdefgh", k=4)) for _ in range(60)))
    bpe.prepare(folder, [text], None, vocab_size=300, num_processes=1, log=lambda *_: None)
    return folder


SMALL = ("--num_layers 2 --d_model 32 --num_heads 2 --context_length 16 --batch_size 4 --steps 8 "
         "--save_steps 3 --device cpu").split()


def command(*flags):
    """ddp.py FLAGS in this process -> exit status."""
    try:
        D.main([str(f) for f in flags])
        return 0
    except SystemExit as e:
        return e.code


def weights(out):
    return M.load_checkpoint(Path(out) / "checkpoint.pt")["model"]


@pytest.fixture(scope="session")
def undisturbed(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert command("--data", data, "--out", out, *SMALL) == 0
    return out


def held_out(data, out):
    """By the definition: nats a token over all whole windows of val.bin, without dropout."""
    ids, model = bpe.load_tokens(data / "val.bin"), M.load_model(out / "checkpoint.pt")
    T = model.config.context_length
    ids = D.windows(ids, T, range((len(ids) - 1) // T))
    return M.lm_loss(model(ids[:, :-1]), ids[:, 1:])[0].item()


def test_held_out_text_is_read_without_dropout(data, tmp_path):
    assert command("--data", data, "--out", tmp_path, *SMALL, "--steps", 2, "--dropout", 0.5,
                   "--world_size", 1) == 0
    val = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert val["val_loss"] == pytest.approx(held_out(data, tmp_path), abs=1e-5)


def test_a_run_leaves_a_checkpoint_and_a_log(data, undisturbed):
    log = [json.loads(line) for line in (undisturbed / "log.jsonl").read_text().splitlines()]
    train, val = log[:-1], log[-1]
    assert [r["step"] for r in train] == list(range(1, 9)) and train[-1]["loss"] < train[0]["loss"]
    assert val["kind"] == "val" and val["val_loss"] == pytest.approx(held_out(data, undisturbed), abs=1e-5)
    model = M.load_model(undisturbed / "checkpoint.pt")    # as infer.py and train.py read it
    assert M.generate(model, [1], 3, temperature=0)
    assert M.load_checkpoint(undisturbed / "checkpoint.pt")["tokenizer"] == bpe.load_tokenizer(
        data / "tokenizer.json").hash()


real_train, real_step = D.train, D.Run.step


def train_that_dies(watch, *args):
    """As D.train, in a rank's own process; rank 0 is killed in step 5."""
    def step(run, number, *rest):
        if number == 5 and run.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real_step(run, number, *rest)
    D.Run.step = step
    return real_train(watch, *args)


def test_ranks_lanes_and_a_kill_do_not_change_the_weights(data, undisturbed, tmp_path, monkeypatch, capsys):
    """4 ranks as 2 lanes, killed in step 5, saved at 3; then 1 rank with micro-batches."""
    flags = ["--data", data, "--out", tmp_path, *SMALL]
    with monkeypatch.context() as m:
        m.setattr(D, "train", train_that_dies)
        assert command(*flags, "--world_size", 4, "--sequence_ranks", 2, "--way", "naive") == 1
    assert capsys.readouterr().err.endswith("rank 0 at step 5: killed by SIGKILL\n")
    assert M.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3
    assert command(*flags, "--resume", "--world_size", 1, "--micro_batch", 1) == 0
    expected, got = weights(undisturbed), weights(tmp_path)
    assert max((expected[k] - got[k]).abs().max() for k in expected) < 1e-6


def torchrun(flags, worker, *args):
    """What torchrun does with these flags, but for a function: its workers are forks of a process that has
    loaded torch."""
    from torch.distributed import launcher, run
    config, *_ = run.config_from_args(run.parse_args([*flags, "a function"]))
    config.start_method = "forkserver"
    launcher.api.elastic_launch(config, worker)(*args)


def main_dies_once(folder, flags):
    """ddp.py, in which rank 1 is killed in step 5."""
    killed = folder / "killed"

    def step(run, number, *rest):
        if number == 5 and run.rank == 1 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real_step(run, number, *rest)
    D.Run.step = step
    sys.argv[0], sys.stderr = "killed.py", open(folder / "errors", "a", 1)
    D.main([str(flag) for flag in flags])


def test_torchrun_restarts_a_killed_rank_and_ends_with_the_same_weights(data, undisturbed, tmp_path, hosts=2):
    """Two torchruns, as on two hosts, which count their restarts apart."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torchruns = [FORK.Process(target=torchrun, args=([
        f"--nnodes={hosts}", f"--nproc_per_node={2 // hosts}", "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}", "--max-restarts=3"],
        main_dies_once, tmp_path, ["--data", data, "--out", tmp_path / "o", *SMALL]))
        for _ in range(hosts)]
    for process in torchruns:
        process.start()
    for process in torchruns:
        process.join(200)
        process.kill()
    errors = (tmp_path / "errors").read_text()
    assert [process.exitcode for process in torchruns] == [0] * hosts, errors
    assert errors.count("killed.py: rank 1 at step 5 does not answer: it was killed or stopped\n") == 1
    assert M.load_checkpoint(tmp_path / "o" / "checkpoint.pt")["step"] == 8
    assert not (tmp_path / "o" / "checkpoint.old.pt").exists()               # it went on from step 3
    expected, got = weights(undisturbed), weights(tmp_path / "o")
    assert all(torch.equal(expected[k], got[k]) for k in expected)


def hold_store(pipe):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    time.sleep(1000)


def sleep(watch, folder=None):
    if folder:
        (folder / str(os.getpid())).touch()
    time.sleep(1000)


def test_a_rank_does_not_outlive_who_started_it():
    """Who starts ranks holds their store; here it is killed in the middle."""
    ours, theirs = FORK.Pipe()
    holder = FORK.Process(target=hold_store, args=(theirs,), daemon=True)
    holder.start()
    port = ours.recv()
    rank = FORK.Process(target=D.local_rank_main, daemon=True, args=(0, sleep, (), port, 1, 1, {}))
    rank.start()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    wait_until(lambda: store.check(["beat/0"]), 60)        # it has found the store, and lives
    holder.kill()
    holder.join(30)
    rank.join(30)
    assert rank.exitcode == 1


def test_ctrl_c_ends_ranks_that_save_nothing(tmp_path):
    """The terminal tells them, too: some have gone when the parent's signal comes."""
    before = set(multiprocessing.active_children())        # of a test before this, which may end meanwhile

    def ranks():
        return set(multiprocessing.active_children()) - before

    def press():
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 60)
        first = min(process.pid for process in ranks())
        for pid in (first, os.getpid()):
            os.kill(pid, signal.SIGINT)
    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        D.launch(sleep, 2, tmp_path)
    assert not ranks()


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_kill_save_and_end_with_130(data, tmp_path, number):
    def press():
        wait_until(lambda: (tmp_path / "log.jsonl").exists() and (tmp_path / "log.jsonl").read_text(), 60)
        os.kill(os.getpid(), number)
    threading.Thread(target=press, daemon=True).start()
    assert command("--data", data, "--out", tmp_path, *SMALL, "--steps", 100_000, "--seed", 2**62) == 130
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert M.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == log[-1]["step"]


@pytest.mark.parametrize("flags, text", [
    ("--lr -1", "--lr -1.0 is out of range: 0 or more"),
    ("--steps 3 --batch_size 7", "--batch_size 7 does not split into 2 equal shares"),
    ("--steps 3 --world_size 3 --sequence_ranks 2",
     "3 ranks do not split into groups of --sequence_ranks 2: try 1"),
    ("--steps 3 --batch_size 6 --micro_batch 2",
     "a share of 3 sequences is not a multiple of --micro_batch 2: try --micro_batch 1"),
    ("--stepss 3", "unrecognized arguments: --stepss 3"),
    ("--bench_collectives 1,x", "argument --bench_collectives: invalid megabytes value"),
    ("--bench_collectives 1,0", "argument --bench_collectives: invalid megabytes value"),
    ("--device mps", "argument --device: invalid choice: 'mps'"),
    ("--seed 9999999999999999999", "--seed 9999999999999999999 is out of range"),
    ("--d_model 31 --num_heads 2", "d_model=31 is not divisible by num_heads=2"),
])
def test_mistakes_on_the_command_line_are_one_line(flags, text, capsys):
    with pytest.raises(SystemExit, match="2"):
        D.parse_args(flags.split())
    err = capsys.readouterr().err
    assert text in err and err.count("\n") == 1


def test_mistakes_in_files_are_one_line(data, undisturbed, tmp_path, capsys):
    def says(text, *flags):
        assert command(*SMALL, *flags) == 2
        err = capsys.readouterr().err
        assert text in err and err.count("\n") == 1
    says("was made with lr 0.003, not 0.1", "--data", data, "--out", undisturbed, "--resume", "--lr", "0.1")
    says("was made with rope_theta 10000.0, not 500.0", "--data", data, "--out", undisturbed, "--resume",
         "--rope_theta", "500")                            # weights of one shape, another model
    says("nothing", "--data", tmp_path / "nothing", "--out", tmp_path)
    says("no checkpoint at", "--data", data, "--out", tmp_path, "--resume")
    says("val.bin", "--data", data, "--out", tmp_path, "--context_length", 10_000)


def test_flags_without_effect_are_told():
    def told(*flags):
        return D.without_effect(D.parse_args([*flags]), D.make_parser())
    assert told() == told("--steps", "3", "--lr", "1") == []
    assert told("--bench_collectives", "1", "--device", "cpu") == []
    assert told("--steps", "3", "--way", "flat", "--bucket_mb", "1") == ["--bucket_mb"]
    assert set(told("--preset", "gpt2", "--num_layers", "8", "--device", "cpu")) == {
        "--device", "--preset", "--num_layers"}


def test_the_docstrings_commands_parse(monkeypatch):
    commands = D.__doc__.split("Run ")[1].split("You should see")[0].replace("\\\n", " ")
    lines = re.findall(r"ddp\.py( --[^#\n]*)?", commands)
    assert len(lines) >= 5
    monkeypatch.setenv("WORLD_SIZE", "8")
    for line in lines:
        D.parse_args(shlex.split(line or ""))
