"""Tests of infer.py: (1) every rung equal to the naive loop, (2) drawing tokens, also speculatively: exact
distributions, (3) quantisation, pruning, distillation, diffusion, (4) accounting, (5) the server, (6) commands and
bad input. Models are tiny and random; the server listens on loopback.
"""
import contextlib, copy, http.client, json, math, random, re
import select, shlex, signal, socket, subprocess, sys, threading, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bpe  # noqa: E402
import model as M  # noqa: E402
import infer as I  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

torch.set_num_threads(1)
close = torch.testing.assert_close
SHAPE = dict(vocab_size=97, context_length=64, d_model=32, num_layers=3, num_heads=4, num_kv_heads=2, d_ff=48,
             init="glorot")
VARIANTS = {
    "plain": {}, "qk_norm": dict(qk_norm=True), "multi-head, odd head": dict(num_kv_heads=4, d_head=6),
    "window": dict(window=9), "softcap": dict(attn_softcap=3.0, logit_softcap=5.0),
    "gpt2": dict(norm="layernorm", position="learned", ffn="gelu", bias="all", tie_embeddings=True),
    "post, parallel": dict(norm_position="post", parallel=True), "sinusoidal": dict(position="sinusoidal"),
    "local and global": dict(layers="LG", window=5), "shared keys": dict(layers="GC"), "mla": dict(mixer="mla"),
    "odd mla": dict(mixer="mla", kv_latent=3),
    "stretched rope": dict(rope_factor=4.0, rope_original_context=16),
    "linear": dict(mixer="linear"), "mamba": dict(mixer="mamba"), "hyena": dict(mixer="hyena"),
    "hybrid": dict(layers="RG"), "experts": dict(num_experts=4),
}
RECURRENT = ("linear", "mamba", "hybrid")


def build(name="plain", **change):
    torch.manual_seed(0)
    model = M.Transformer(M.ModelConfig(**{**SHAPE, **VARIANTS[name], **change})).eval()
    with torch.no_grad():                                  # gains and biases of their own, not ones and zeros
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model


def prompts(count=7, longest=30, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(97) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def greedy(engine, texts, n=12):
    out = engine.generate([I.Request(list(p), n, temperature=0) for p in texts])
    assert len(engine.pool.free) == engine.pool.num_blocks and not any(engine.pool.owners)       # nothing leaks
    return out


# --- 1. every rung gives the naive loop's tokens ------------------------------------------------------------

@pytest.mark.parametrize("name", VARIANTS)
def test_rungs(name):
    model, texts = build(name), prompts()
    want = [M.generate(model, p, 12, temperature=0) for p in texts]
    assert [I.generate_naive(model, p, 12) for p in texts] == want
    tuned = I.tune(copy.deepcopy(model))
    assert greedy(I.Engine(tuned, 3, 4, chunk=5), texts) == want
    assert greedy(I.Engine(tuned, 16, 0), texts) == want
    assert greedy(I.Engine(model, 1, 16), texts[:2]) == want[:2]


@pytest.mark.parametrize("block_size", [0, 1, 3, 16, 64])
@pytest.mark.parametrize("chunk, max_batch", [(1, 2), (7, 4), (256, 16)])
def test_blocks_chunks_batches(block_size, chunk, max_batch):
    model, texts = build(), prompts()
    want = [I.generate_naive(model, p, 12) for p in texts]
    assert greedy(I.Engine(I.tune(model), max_batch, block_size, chunk=chunk), texts) == want


@pytest.mark.parametrize("name", ["plain", "local and global", "mla", "sinusoidal"])
def test_graphs_are_few_and_their_keys_complete(name, monkeypatch):
    """As on a GPU, where the operations that were recorded for a key are repeated on other numbers: here the
    first function of a key is called again."""
    model, recorded = build(name), {}
    monkeypatch.setattr(I.Engine, "replay",
                        lambda engine, forward, key, fed: recorded.setdefault(key, forward)(fed))
    texts = prompts(30)
    want, engine = [I.generate_naive(model, p, 6) for p in texts], I.Engine(I.tune(model), 2, 4)
    engine.graphs = {}
    assert greedy(engine, texts, 6) == want
    assert greedy(engine, texts[:1], 6) == want[:1]
    assert len(recorded) <= 2 * 5                          # 1 or 2 rows, 1 to 16 blocks in powers of two


def test_a_prompt_found_in_the_cache_keeps_to_its_window():
    """Of the blocks that it finds, those behind the window go at once: held, they would leave no room."""
    model = build(window=16, context_length=512)
    engine = I.Engine(I.tune(model), 4, 16, num_blocks=10, chunk=64)
    first = I.Request([i % 97 for i in range(150)], 11, temperature=0)
    engine.generate([first])
    again = [*first.ids, *[5] * 20]
    engine.add(r := I.Request(list(again), 10, temperature=0))
    for _ in range(30):
        engine.step()
    assert not engine.busy() and engine.counters["shared_tokens"] and r.output == I.generate_naive(model, again, 10)


@pytest.mark.parametrize("block_size", [0, 16])
def test_every_row_is_used_while_others_wait(block_size):
    engine = I.Engine(I.tune(build()), 4, block_size, share=False)
    for p in prompts(12):
        engine.add(I.Request(p, 8, temperature=0))
    engine.step()
    assert len(engine.running) == 4 and len(engine.waiting) == 8


def test_what_is_not_a_number_goes_with_the_step_that_failed():
    """As the server does it: all of the step's requests end; those after them read no NaN in their blocks."""
    model = build()
    with torch.no_grad():
        model.embedding.weight[7] = math.nan
    engine, well = I.Engine(I.tune(model), 2, 4, num_blocks=12), [[1, 2, 3], list(range(20, 40))]
    want = [I.generate_naive(model, p, 8) for p in well]
    bad = engine.add(I.Request([7] * 30, 8, temperature=0))
    with pytest.raises(ValueError, match="not numbers"):
        engine.step()
    bad.finish = "error"
    engine.pool.clear()
    assert greedy(engine, well, 8) == want


def test_static_batches():
    model, texts, limits = build(), prompts(), [5, 12, 1, 7, 9, 3, 2]
    want = [I.generate_naive(model, p, n) for p, n in zip(texts, limits)]
    assert I.generate_static(model, texts, limits, 3) == want


def test_tuned_logits():
    """Rounding is all that changes; the weights are shared, and training-style calls still work."""
    for name in VARIANTS:
        model = build(name)
        tuned = I.tune(copy.deepcopy(model))
        for shape in ((1, 1), (3, 7), (2, 64)):
            ids = torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(1))
            close(tuned(ids), model(ids), atol=2e-5, rtol=1e-4)
        assert tuned.state_dict().keys() == model.state_dict().keys()
        assert I.model_bytes(tuned) == I.model_bytes(model)
        for block in tuned.blocks:
            if getattr(block, "both", None) is not None:   # nothing is kept twice
                assert block.ffn.w1.weight.data_ptr() == block.both.weight.data_ptr()


@pytest.mark.parametrize("d_in, d_out", [(1, 1), (7, 16), (123, 7), (64, 123), (40, 256)])
@torch.no_grad()
def test_decode_linear(d_in, d_out):
    """The product in its other shape, for any number of rows, laid out as rows or as columns."""
    torch.manual_seed(0)
    for bias in (False, True):
        plain = M.Linear(d_in, d_out, bias)
        linear = I.DecodeLinear(plain.weight, plain.bias)
        for R in (1, 2, I.FEW - 1, I.FEW, 16, I.MANY, I.MANY + 1):
            x, add = torch.randn(R, d_in), torch.randn(R, d_out)
            for rows in (x, x.t().contiguous().t(), torch.stack((x, x), 1)[:, 0]):
                close(linear(rows), plain(x), atol=1e-5, rtol=1e-5)
                close(linear(rows, add), add + plain(x), atol=1e-5, rtol=1e-5)
        x = torch.randn(2, 3, d_in)
        close(linear(x), plain(x), atol=1e-5, rtol=1e-5)


def test_decode_norm():
    torch.manual_seed(0)
    for D in (1, 7, 123, 256):
        norm = M.RMSNorm(D, 1e-5)
        torch.nn.init.normal_(norm.weight)
        for scale in (0, 1e-15, 1e-3, 1, 1e15):            # eps decides, eps counts, eps is nothing
            x = scale * torch.randn(3, 5, D)
            close(I.DecodeNorm(norm.weight, norm.eps)(x), norm(x), atol=1e-6, rtol=1e-5)
        gain = torch.randn(4, D)
        close(I.DecodeNorm(gain, 1e-5)(x[:, :4]), torch.nn.functional.rms_norm(x[:, :4], (D,), None, 1e-5) * gain,
              atol=1e-6, rtol=1e-5)


def test_window_bounds_memory():
    model = build("window")
    engine = I.Engine(model, 1, 4, num_blocks=6, chunk=5)  # 24 tokens for a text of 60: the window is 9
    text = (prompts(1)[0] * 9)[:20]
    r = engine.add(I.Request(list(text), 40, temperature=0))
    most = 0
    while engine.busy():
        engine.step()
        most = max(most, engine.pool.num_blocks - len(engine.pool.free))
    assert r.output == I.generate_naive(model, text, 40) and most <= 5
    assert engine.counters["preempted"] == 0


@pytest.mark.parametrize("name", ["plain", "mamba", "window"])
def test_preemption(name):
    """Blocks for one and a half texts, four texts: some are put back and computed again."""
    model, texts = build(name), prompts(4)
    want = [I.generate_naive(model, p, 30) for p in texts]
    engine = I.Engine(model, 4, 4, num_blocks=18, chunk=8)
    assert greedy(engine, texts, 30) == want
    assert engine.counters["preempted"] or name == "window"


def test_what_can_never_fit_is_refused():
    model = build()
    for options in (dict(num_blocks=5), dict(num_blocks=6, drafter=I.NGram(8))):
        engine = I.Engine(model, 4, 4, **options)
        with pytest.raises(ValueError, match="num_blocks"):
            engine.add(I.Request([1] * 10, 12))
        assert not engine.busy()
    assert greedy(I.Engine(model, 4, 4, num_blocks=6, drafter=I.NGram(2)), [[1] * 10], 12)


def test_prefix_is_shared_once():
    model, head = build(), prompts(1, 30, seed=5)[0][:1] * 24
    texts = [head + [i, i + 1] for i in range(6)]
    engine = I.Engine(model, 6, 8)
    greedy(engine, texts[:1], 2)                           # leaves its blocks, unowned but findable
    want = [I.generate_naive(model, p, 6) for p in texts]
    requests = [engine.add(I.Request(list(p), 6, temperature=0)) for p in texts]
    engine.step()
    assert engine.counters["shared_tokens"] == 6 * 24
    assert len({r.blocks[0] for r in requests}) == 1 and len({r.blocks[3] for r in requests}) == 6
    assert engine.pool.num_blocks - len(engine.pool.free) == 3 + 6           # three shared, one each
    while engine.busy():
        engine.step()
    assert [r.output for r in requests] == want
    late = [[i] * 8 + [5] * 8 + [7] for i in range(3)]     # the same second block after different first ones
    assert greedy(engine, late, 6) == [I.generate_naive(model, p, 6) for p in late]
    other = I.Engine(model, 6, 8, share=False)
    assert greedy(other, texts, 6) == want and not other.counters["shared_tokens"]


def test_copy_on_write():
    """n continuations share the prompt's half full block until they write, and equal separate requests."""
    model, prompt = I.tune(build()), prompts(1, 30, seed=2)[0][:1] * 11
    engine, found = I.Engine(model, 8, 4), {}
    engine.add(I.Request(list(prompt), 9, seed=5, n=3))
    while engine.busy():
        found.update({r.index: r.output for r in engine.step()})
    assert engine.counters["copied_blocks"] == 2 and engine.counters["prompt_tokens"] == 11
    for i in range(3):
        assert I.Engine(model, 1).generate([I.Request(list(prompt), 9, seed=5 + i)]) == [found[i]]
    assert len({tuple(t) for t in found.values()}) == 3
    assert len(engine.pool.free) == engine.pool.num_blocks


def test_same_request_same_text_alone_or_in_a_batch():
    model, texts = I.tune(build()), prompts(9)
    knobs = [dict(temperature=0.7 + i / 10, top_k=i * 3, top_p=1 - i / 20, min_p=i / 50, seed=i,
                  repetition_penalty=1 + i / 10) for i in range(9)]
    alone = [I.Engine(model, 1).generate([I.Request(list(p), 10, **k)])[0] for p, k in zip(texts, knobs)]
    for settings in (dict(max_batch=9), dict(max_batch=4, block_size=3, chunk=4, num_blocks=40)):
        together = I.Engine(model, **settings).generate([I.Request(list(p), 10, **k) for p, k in zip(texts, knobs)])
        assert together == alone


@pytest.mark.parametrize("name", ["plain", "mla", "hyena"])
def test_int8_cache(name):
    """Each number is off by half a step of 1/127 of its head's largest; a quarter of the bytes and the scales."""
    model = build(name)
    engine, exact = I.Engine(model, 2, 4, int8_cache=True), I.Engine(model, 2, 4)
    for e in (engine, exact):
        e.add(I.Request([5] * 30, 2, temperature=0))
        e.step()
    assert engine.pool.nbytes() < (0.6 if name == "mla" else 0.45) * exact.pool.nbytes()
    for store, (numbers,) in zip(engine.pool.layers[0].stores.values(), exact.pool.layers[0].stores.values()):
        if numbers.numel():                                # hyena keeps nothing for values
            assert ((store[0] * store[1] - numbers).abs() <= 0.5001 * store[1]).all()


def test_finishing():
    """Stop tokens and strings, limits, the end of the context."""
    model, tok = build(vocab_size=257, context_length=64), bpe.ByteTokenizer()
    r = I.Request([65] * 4, 60, temperature=0, tokenizer=tok)
    I.Engine(model).generate([r])
    assert r.finish == "length" and len(r.ids) == 64       # the last token needs no place in the cache
    text = r.text
    again = I.Request([65] * 4, 60, temperature=0, tokenizer=tok, stop_ids=(r.output[5],))
    out = I.Engine(model).generate([again])[0]
    assert again.finish == "stop" and out == r.output[:r.output.index(r.output[5])]
    stop = text[7:10]
    cut = I.Request([65] * 4, 60, temperature=0, tokenizer=tok, stop=("no such", stop))
    engine, shown = I.Engine(model), []
    engine.add(cut)
    while engine.busy():
        engine.step()
        shown.append(cut.next_text())
    assert "".join(shown) == cut.text == text[:text.index(stop)] and cut.finish == "stop"


def test_text_arrives_in_whole_characters():
    tok = bpe.ByteTokenizer()
    r = I.Request([0], 20, tokenizer=tok, stop=("ab",))
    pieces = []
    for byte in "é🌍a-ab".encode():
        if not r.finish:
            r.push(byte)
            pieces.append(r.next_text())
    assert "".join(pieces) == r.text == "é🌍a-" and "\ufffd" not in r.text
    r = I.Request([0], 2, tokenizer=tok)
    for byte in "🌍".encode()[:2]:
        r.push(byte)
    assert r.next_text() == "\ufffd"                       # an end inside a character is shown as such


# --- 2. drawing: the right distribution, however it is reached ----------------------------------------------

@pytest.mark.parametrize("temperature, top_k, top_p", [(1, 0, 1), (0.5, 5, 1), (2.0, 0, 0.6), (1.3, 7, 0.8), (0, 0, 1), (0, 3, 0.5)])
def test_distribution(temperature, top_k, top_p):
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3
    rows = [I.Request([1], temperature=temperature, top_k=top_k, top_p=top_p)] + [I.Request([1], top_k=3)] * 3
    close(I.distribution(logits, rows)[0], M.next_token_probs(logits[0], temperature, top_k, top_p))
    assert (I.distribution(logits, rows)[1] > 0).sum() == 3                  # each row its own knobs


def test_min_p_repetition_penalty_and_extremes():
    logits = torch.tensor([[2.0, 1.0, -1.0, 0.0]])
    close(I.distribution(logits * 1e4, [I.Request([1], temperature=1e-45)])[0], torch.eye(4)[0])  # no overflow
    for request in (I.Request([1]), I.Request([1], temperature=0)):
        with pytest.raises(ValueError, match="not numbers"):
            I.draw(I.distribution(logits * math.nan, [request]), [request])
    long = torch.zeros(2, 50_000)                          # top_p=1 cuts nothing, whatever a neighbour asks for
    assert (I.distribution(long, [I.Request([1]), I.Request([1], top_k=3)]) > 0).sum(1).tolist() == [50_000, 3]
    p = M.softmax(logits[0])
    got = I.distribution(logits, [I.Request([1], min_p=0.2)])[0]
    want = p * (p >= 0.2 * p.max())
    close(got, want / want.sum())
    got = I.distribution(logits.clone(), [I.Request([0, 2, 2], repetition_penalty=2.0)])[0]
    close(got, M.softmax(torch.tensor([1.0, 1.0, -2.0, 0.0])))
    close(logits, torch.tensor([[2.0, 1.0, -1.0, 0.0]]))                     # the caller's logits are untouched


def test_draw_is_the_inverse_of_the_cumulated_mass():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    stream = I.Request([1])
    for u, want in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.999999, 3)):
        stream.random = type("R", (), {"random": staticmethod(lambda u=u: u)})
        assert I.draw(probs, [stream]) == [want]


def chi_squared(counts, probs, n):
    """The statistic, and its 99.99% point (Wilson and Hilferty) for the cells that can occur."""
    cells = probs > 0
    k = int(cells.sum()) - 1
    assert not counts[~cells].any()
    value = float(((counts - n * probs)[cells] ** 2 / (n * probs[cells])).sum())
    return value, k * (1 - 2 / (9 * k) + 3.719 * math.sqrt(2 / (9 * k))) ** 3


def rules():
    """accept, and three rules that look right and are not."""
    def keep_all(p, q, drafts, r):
        return drafts + I.draw(p[-1:], [r])
    def redraw_from_p(p, q, drafts, r):
        for i, d in enumerate(drafts):
            if r.random.random() >= float(p[i, d] / q[i, d]):
                return drafts[:i] + I.draw(p[i][None], [r])
        return drafts + I.draw(p[-1:], [r])
    def greedy_match(p, q, drafts, r):
        for i, d in enumerate(drafts):
            if d != int(p[i].argmax()):
                return drafts[:i] + I.draw(p[i][None], [r])
        return drafts + I.draw(p[-1:], [r])
    return {"ours": I.accept, "keep all": keep_all, "redraw from p": redraw_from_p, "greedy match": greedy_match}


@pytest.mark.parametrize("name", rules())
def test_speculative_sampling_is_exact(name):
    g = torch.Generator().manual_seed(0)
    p, q = (torch.rand(3, 5, generator=g) ** 2 for _ in range(2))
    p[0, 2] = 0                                            # a token the target never says
    p, q = p / p.sum(-1, keepdim=True), (q / q.sum(-1, keepdim=True))[:2]
    r, n, counts = I.Request([1], seed=1), 4000, torch.zeros(5)
    for _ in range(n):
        drafts = I.draw(q, [r, r])
        counts[rules()[name](p, q, drafts, r)[0]] += 1
    if name == "keep all":
        assert counts[2] > 0
        return
    value, limit = chi_squared(counts, p[0], n)
    assert (value < limit) == (name == "ours"), (value, limit)


def test_draft_equal_to_target_is_always_kept():
    g = torch.Generator().manual_seed(0)
    p = torch.rand(4, 9, generator=g)
    p, r = p / p.sum(-1, keepdim=True), I.Request([1])
    for _ in range(200):
        drafts = I.draw(p[:3], [r] * 3)
        got = I.accept(p, p[:3], drafts, r)
        assert got[:3] == drafts and len(got) == 4         # and one more
    refused = I.accept(torch.eye(9)[[0, 1]], torch.eye(9)[[5]], [5], r)
    assert refused == [0]                                  # at least one, the target's


def drafters(model):
    c = model.config
    small = M.Transformer(replace(c, num_layers=1, d_model=16, d_ff=16)).eval()
    torch.manual_seed(3)
    eagle, medusa = I.Eagle(c, 3).eval(), I.Medusa(c, 3).eval()
    with torch.no_grad():
        for p in medusa.parameters():
            p.normal_(0, 0.3)
    return {"n-gram": I.NGram(4), "small model": I.DraftModel(small, 3), "itself": I.DraftModel(model, 4),
            "medusa": medusa, "eagle": eagle}


@pytest.mark.parametrize("name, which", [
    *(("plain", which) for which in ("n-gram", "small model", "itself", "medusa", "eagle")),
    ("window", "eagle"), ("mla", "small model"), ("gpt2", "medusa"), ("local and global", "itself")])
def test_greedy_speculation(name, which):
    model, texts = build(name), prompts(4)
    want = [I.generate_naive(model, p, 20) for p in texts]
    for settings in (dict(max_batch=1), dict(max_batch=3, block_size=4, chunk=6),
                     dict(max_batch=4, block_size=4, num_blocks=24)):
        engine = I.Engine(model, **settings, drafter=drafters(model)[which])
        assert greedy(engine, texts, 20) == want
        assert engine.counters["tokens"] == 80
        if which == "itself" and not engine.counters["preempted"]:   # a block found again may lack a draft's last key
            assert engine.counters["accepted"] == engine.counters["drafted"] > 0


@pytest.mark.parametrize("which", ["itself", "n-gram", "eagle"])
def test_ends_of_text_and_context(which):
    """The context's end; and texts shorter than the drafts that end them, all of which are kept."""
    model = build()
    engine = I.Engine(model, 2, 8, drafter=drafters(model)[which])
    assert greedy(engine, [[1] * 50], 14) == [I.generate_naive(model, [1] * 50, 14)]
    engine.drafter.propose = lambda rows, k: (
        [I.generate_naive(model, r.ids, k) for r in rows],
        torch.nn.functional.one_hot(torch.tensor([I.generate_naive(model, r.ids, k) for r in rows]), 97).float())
    assert greedy(engine, [[1]], 3) == [I.generate_naive(model, [1], 3)]


@pytest.mark.parametrize("which", ["small model", "medusa"])
def test_sampled_speculation_has_the_targets_distribution(which):
    """Two tokens after a prompt, through the whole engine: 25 cells, exact probabilities from the model."""
    model = build(vocab_size=5, num_layers=1)
    with torch.no_grad():
        model.head.weight.mul_(0.5)
    prompt, knobs = [1, 2, 3], dict(temperature=0.8, top_p=0.9)
    first = M.next_token_probs(model(torch.tensor([prompt]))[0, -1], 0.8, 0, 0.9)
    joint = torch.stack([first[a] * M.next_token_probs(model(torch.tensor([prompt + [a]]))[0, -1], 0.8, 0, 0.9)
                         for a in range(5)]).detach()
    n, counts = 1000, torch.zeros(25)
    engine = I.Engine(model, 64, 8, drafter=drafters(model)[which])
    for out in engine.generate([I.Request(list(prompt), 2, seed=i, **knobs) for i in range(n)]):
        counts[out[0] * 5 + out[1]] += 1
    value, limit = chi_squared(counts, joint.flatten(), n)
    assert value < limit and engine.counters["accepted"] > 0


def test_n_gram():
    ngram = I.NGram(4, 3)
    assert ngram.look_up([1, 2, 3, 9, 1, 2, 3]) == [9, 1, 2, 3]
    assert ngram.look_up([7, 5, 7, 6, 7]) == [6, 7]         # the last time, not the first
    assert ngram.look_up([1, 2, 3]) == [] and ngram.look_up([1]) == []


class Clock:
    """time.monotonic that passes 10 ms a call: training loops of a fixed number of steps."""
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.01
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(I.time, "monotonic", Clock())


@pytest.mark.parametrize("kind", [I.Medusa, I.Eagle])
def test_drafters_learn(kind, clock):
    """A text of period 8 that the target knows: trained drafts are kept more often than the commonest token."""
    tokens = np.tile(np.array([3, 1, 4, 1, 5, 9, 2, 6], np.int64), 300)
    torch.manual_seed(0)
    model = M.Transformer(M.ModelConfig(**{**SHAPE, "num_layers": 1, "vocab_size": 11}))
    I.fit(model, lambda ids: M.lm_loss(model(ids[:, :-1]), ids[:, 1:])[0], tokens, 32, 0.8, 1e-2)
    drafter = I.train_drafter(kind, model.eval(), tokens, 3, 1.6)
    engine = I.Engine(model, drafter=drafter)
    greedy(engine, [tokens[i:i + 20].tolist() for i in range(3)], 30)
    assert engine.counters["accepted"] > 0.5 * engine.counters["drafted"]    # the commonest token: 1/4
    # Beside a model in bf16 it learns in fp32: steps of bf16 weights near 1 are lost in rounding.
    drafter = I.train_drafter(kind, model.bfloat16(), tokens, 3, 0.05)
    assert all(p.dtype == torch.float32 and (p != 1).any() for p in drafter.parameters())
    greedy(I.Engine(model, drafter=drafter.bfloat16()), [[3, 1, 4]], 5)


# --- 3. fewer bits, fewer weights, all places at once -------------------------------------------------------

@pytest.mark.parametrize("options", [dict(kind="int8"), dict(kind="int4", group=4), dict(keep=[1, 5]),
                                     dict(kind="int4", smooth=torch.linspace(0.5, 2, 12), keep=[3])])
def test_the_weight_of_a_quantised_layer_is_the_one_it_multiplies_by(options):
    """MLA takes it apart to decode."""
    torch.manual_seed(0)
    layer, x = I.QuantLinear(M.Linear(12, 7), **options), torch.randn(3, 12)
    close(F.linear(x, layer.weight), layer(x))


@pytest.mark.parametrize("bits, group", [(8, 0), (8, 4), (4, 0), (4, 4), (3, 12), (8, -1)])
def test_quantize(bits, group):
    w = torch.randn(7, 12, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 7)[:, None]
    n, scale = I.quantize(w, bits, group)
    error = ((n * scale).reshape(w.shape) - w).abs().view_as(n)
    assert (error <= scale / 2 * 1.0001).all() and n.int().abs().max() <= 2 ** (bits - 1)
    if group == 0:                                         # a scale a row is never worse than one for all
        whole, one = I.quantize(w, bits, -1)
        assert error.square().mean() < ((whole * one).reshape(w.shape) - w).square().mean()


@pytest.mark.parametrize("scheme", I.SCHEMES)
def test_quantized_model(scheme):
    model = build(d_model=64, d_ff=128)
    ids = torch.randint(0, 97, (4, 32), generator=torch.Generator().manual_seed(0))
    small = I.quantize_model(copy.deepcopy(model), scheme, ids)
    error = (small(ids) - model(ids)).norm() / model(ids).norm()
    assert 0 < error < {"int8": 0.02, "llm.int8": 0.03, "fp8": 0.08}.get(scheme, 0.3)
    linear = sum(m.weight.nbytes for m in model.modules() if isinstance(m, (M.Linear, M.Embedding)))
    rest = I.model_bytes(model) - linear
    assert I.model_bytes(small) - rest < (0.3 if "8" in scheme else 0.25) * linear
    for name in ("gpt2", "mla", "mamba"):                  # tied matrices, one read from outside, recurrent ones
        other = I.tune(I.quantize_model(build(name, d_model=64), scheme, ids))
        assert greedy(I.Engine(other), [[1, 2, 3]], 5) == [I.generate_naive(other, [1, 2, 3], 5)]
    for name, said in (("plain", "--data"), ("experts", "experts")):
        with pytest.raises(ValueError, match=said):
            I.quantize_model(build(name), "awq", ids if name == "experts" else None)


def test_int4_packs_two_numbers_a_byte():
    linear = M.Linear(128, 5)
    q, (n, scale) = I.QuantLinear(linear, "int4", 64), I.quantize(linear.weight.detach(), 4, 64)
    assert q.numbers.nbytes == n.numel() // 2
    close(q.widened(), (n * scale).reshape(5, 128))


def test_llm_int8_keeps_outliers_apart():
    """Two columns a hundred times larger ruin plain int8 inputs; apart, they cost nothing."""
    torch.manual_seed(0)
    linear, x = M.Linear(64, 48), torch.randn(32, 64)
    x[:, [3, 40]] *= 100
    want = linear(x)
    def error(**options):
        return ((I.QuantLinear(linear, "int8", int8_inputs=True, **options)(x) - want).norm() / want.norm()).item()
    assert error(keep=[3, 40]) < 0.2 * error()
    close(I.QuantLinear(linear, "int8", int8_inputs=True, keep=list(range(64)))(x), want, atol=1e-4, rtol=1e-5)


def test_awq_looks_at_activations():
    """Protecting 1 of 64 columns: chosen by input size it helps, by weight size it hardly does; scaling beats none."""
    torch.manual_seed(0)
    linear, x = M.Linear(64, 64), torch.randn(256, 64)
    x[:, 7] *= 30
    want = linear(x)
    def error(**options):
        return (I.QuantLinear(linear, "int4", 64, **options)(x) - want).square().mean().item()
    loudest = linear.weight.abs().mean(0).argmax().item()
    assert error(keep=[7]) < 0.6 * error() and error(keep=[loudest]) > 0.8 * error()
    assert error(smooth=I.awq_scale(linear, x)) < 0.8 * error()


def test_pruning_what_adds_nothing_changes_nothing():
    model, ids = build(num_layers=3), torch.randint(0, 97, (3, 20))
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.wo.weight[:, 16:] = 0              # the second group of heads
            block.ffn.w2.weight[:, ::3] = 0
        model.blocks[1].mixer.wo.weight.zero_()
        model.blocks[1].ffn.w2.weight.zero_()
    small = I.prune(model, ids, 2, 1, 32)
    c = small.config
    assert (c.num_layers, c.num_heads, c.kv_heads, c.head_dim, c.ffn_dim) == (2, 2, 1, 8, 32)
    close(small(ids), model(ids), atol=1e-5, rtol=1e-4)
    assert M.num_params(c) == sum(p.numel() for p in small.parameters())
    with pytest.raises(ValueError, match="1 to the model's 3"):
        I.prune(model, ids, 4, 1, 32)


def test_distillation_repairs(clock):
    teacher, tokens = build(), np.random.default_rng(0).integers(0, 97, 4000)
    ids = torch.from_numpy(tokens[:64]).view(2, 32)
    close(I.distillation_loss(teacher, teacher, ids), torch.tensor(0.0))
    student = I.prune(teacher, ids, 2, 1, 32)
    p, s = (m(ids).log_softmax(-1) for m in (teacher, student))
    close(I.distillation_loss(teacher, student, ids), torch.nn.functional.kl_div(
        s, p, log_target=True, reduction="sum") / 64)
    before = I.distillation_loss(teacher, student, ids).item()
    I.fit(student, lambda ids: I.distillation_loss(teacher, student, ids), tokens, 32, 0.8, 3e-3)
    assert I.distillation_loss(teacher, student, ids).item() < 0.6 * before


@pytest.mark.parametrize("rounds", [1, 3, 20])
def test_diffusion_sees_both_ways_and_fills_everything(rounds):
    torch.manual_seed(0)
    model, calls = I.diffusion_model(M.ModelConfig(**SHAPE)).eval(), []
    ids = torch.randint(0, 97, (1, 9))
    other = torch.cat((ids[:, :8], (ids[:, 8:] + 1) % 97), 1)
    assert (model(ids)[0, 0] - model(other)[0, 0]).abs().max() > 1e-4
    model.register_forward_hook(lambda _, x, y: calls.append((x[0] == 97).sum().item()))
    out = I.diffusion_generate(model, 20, rounds, [1, 2])
    assert len(out) == 20 and all(0 <= i < 97 for i in out)
    assert len(calls) == rounds and calls[0] == 20 and calls == sorted(calls, reverse=True)
    if rounds == 20:
        assert calls == list(range(20, 0, -1))             # one a round


def test_diffusion_learns(clock):
    tokens = np.tile(np.array([3, 1, 4, 1, 5], np.int64), 200)
    torch.manual_seed(0)
    model = I.diffusion_model(M.ModelConfig(**{**SHAPE, "vocab_size": 7, "num_layers": 1}))
    ids = torch.from_numpy(tokens[:80]).view(4, 20)
    before = I.diffusion_loss(model, ids, torch.Generator().manual_seed(0)).item()
    I.fit(model, lambda ids: I.diffusion_loss(model, ids), tokens, 20, 0.8, 1e-2)
    after = I.diffusion_loss(model, ids, torch.Generator().manual_seed(0)).item()
    assert after < 0.6 * before


# --- 4. accounting ------------------------------------------------------------------------------------------

def test_the_lectures_figures():
    c = M.ModelConfig(**M.PRESETS["llama2-13b"])
    figures = {(40, 1): (26.87, 8.02, 124.7), (40, 64): (79.72, 23.80, 2689), (40, 256): (240.8, 71.9, 3562),
               (8, 256): (65.6, 19.6, 13068)}
    for (K, B), (gigabytes, ms, rate) in figures.items():
        memory, latency, throughput = I.decode_cost(replace(c, num_kv_heads=K), B, 1024)
        assert abs(memory / 1e9 / gigabytes - 1) < 1e-3 and abs(latency * 1e3 / ms - 1) < 2e-3
        assert abs(throughput / rate - 1) < 1e-3
    assert round(I.H100[0] / I.H100[1]) == 295
    ffn, attention = I.intensities(1024, 1, 64, 4096, 14336)
    assert 60 < ffn <= 64 and attention == pytest.approx(1024 / 1025)
    assert I.intensities(512, 512, 9, 64, 64)[1] == pytest.approx(256)       # prefill: S/2


@pytest.mark.parametrize("name", ["plain", "mla", "shared keys"])
def test_cache_bytes(name):
    model = build(name)
    engine = I.Engine(model, 1, 16)
    engine.generate([I.Request([1, 2, 3], 2)])
    assert engine.pool.nbytes() == M.state_bytes(model.config, 64, 4)


# --- 5. the server ------------------------------------------------------------------------------------------

CHAT = {"system": ["<|system|>", ""], "user": ["<|user|>", ""], "assistant": ["<|assistant|>", "<|end|>"]}


def chat_tokenizer():
    return bpe.BPETokenizer(bpe.make_vocab([], [bpe.EOT]), [],
                            [bpe.EOT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"])


@contextlib.contextmanager
def serving(**options):
    """A server on a free port in a thread of this process -> (call, server)."""
    model = I.tune(build(vocab_size=261))
    server = I.Server(("127.0.0.1", 0), I.Engine(model, 8, 8, chunk=16, **options), chat_tokenizer(), "tiny", CHAT)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def call(method, path, body=None, raw=None):
        connection = http.client.HTTPConnection(*server.server_address, timeout=60)
        connection.request(method, path, raw if raw is not None else json.dumps(body) if body is not None else None)
        reply = connection.getresponse()
        data = reply.read()
        return reply.status, json.loads(data) if reply.headers["Content-Type"] == "application/json" else data.decode()
    call.port = server.server_address[1]
    try:
        yield call, server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def service():
    with serving() as both:
        yield both


def alone(server, text, **knobs):
    r = I.Request(server.tokenizer.encode(text, ()), **knobs, tokenizer=server.tokenizer,
                  stop_ids=I.stop_tokens(server.tokenizer, CHAT))
    I.Engine(server.engine.model, 1).generate([r])
    return r.text


def test_completions(service):
    call, server = service
    knobs = dict(max_tokens=12, temperature=0.9, top_p=0.8, seed=3)
    status, reply = call("POST", "/v1/completions", {"model": "tiny", "prompt": "hello", **knobs})
    assert status == 200 and reply["object"] == "text_completion"
    assert reply["choices"][0]["text"] == alone(server, "hello", **knobs)
    assert reply["usage"]["prompt_tokens"] == 5 and 0 < reply["usage"]["completion_tokens"] <= 12
    status, many = call("POST", "/v1/completions", {"prompt": ["hello", "abc"], "n": 2, **knobs})
    assert [c["index"] for c in many["choices"]] == [0, 1, 2, 3]
    assert many["choices"][0]["text"] == reply["choices"][0]["text"]
    assert many["choices"][3]["text"] == alone(server, "abc", **{**knobs, "seed": 4})
    status, ids = call("POST", "/v1/completions", {"prompt": list(b"hello"), **knobs})
    assert ids["choices"] == reply["choices"]


def events(text):
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_streams_and_chat(service):
    call, server = service
    asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 15, "temperature": 0.9, "seed": 1}
    status, whole = call("POST", "/v1/chat/completions", asked)
    assert status == 200 and whole["choices"][0]["message"]["role"] == "assistant"
    status, stream = call("POST", "/v1/chat/completions",
                          {**asked, "stream": True, "stream_options": {"include_usage": True}})
    parts = events(stream)
    assert "".join(p["choices"][0]["delta"]["content"] for p in parts[:-1]) == whole["choices"][0]["message"]["content"]
    assert parts[-1]["usage"] == whole["usage"] and parts[-2]["choices"][0]["finish_reason"] in ("stop", "length")
    assert all(p["object"] == "chat.completion.chunk" for p in parts)
    tok = server.tokenizer
    ids = I.render_chat(tok, CHAT, asked["messages"])
    assert ids == [tok.special_tokens["<|user|>"], *b"hi", tok.special_tokens["<|assistant|>"]]
    assert I.render_chat(tok, CHAT, [{"role": "user", "content": "<|end|>"}])[1:-1] == list(b"<|end|>")


def test_the_openai_client(service, monkeypatch):
    """The API's own client, as people have it: lists, texts, streams, and our errors as its exceptions."""
    openai = pytest.importorskip("openai")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    call, server = service
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{call.port}/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").owned_by == "local"

    knobs = dict(model="tiny", max_tokens=12, temperature=0.9, seed=3)
    reply = client.completions.create(prompt=["hello", "abc"], n=2, **knobs)
    assert [c.text for c in reply.choices] == [alone(server, text, max_tokens=12, temperature=0.9, seed=seed)
                                               for text in ("hello", "abc") for seed in (3, 4)]
    assert reply.usage.prompt_tokens == 8 and 4 <= reply.usage.completion_tokens <= 48
    greedy = {**knobs, "temperature": 0}
    whole = client.completions.create(prompt="hello", **greedy).choices[0]
    assert whole.text == alone(server, "hello", max_tokens=12, temperature=0.0) and whole.finish_reason == "length"
    cut = client.completions.create(prompt="hello", stop=whole.text[3:5], **greedy).choices[0]
    assert cut.finish_reason == "stop" and cut.text == whole.text[:whole.text.find(whole.text[3:5])]
    assert "".join(part.choices[0].text for part in client.completions.create(
        prompt="hello", stream=True, **greedy)) == whole.text

    asked = dict(messages=[{"role": "user", "content": "hi"}], model="tiny", max_completion_tokens=9, seed=1)
    said = client.chat.completions.create(**asked)
    parts = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert said.choices[0].message.content == "".join(p.choices[0].delta.content for p in parts[:-1])
    assert parts[-1].usage == said.usage and said.usage.total_tokens == said.usage.prompt_tokens + 9

    def refused(error, **change):
        with pytest.raises(error) as e:
            client.completions.create(**{**knobs, "prompt": "a", **change})
        return e.value
    assert refused(openai.BadRequestError, temperature=-1).type == "invalid_request_error"
    assert refused(openai.BadRequestError, prompt="<|end|>").param == "prompt"
    assert refused(openai.NotFoundError, model="gpt-9").param == "model"
    with monkeypatch.context() as patch:
        patch.setattr(I, "MAX_WAITING", 0)
        assert refused(openai.RateLimitError).response.headers["Retry-After"] == "1"
    monkeypatch.setattr(server.engine, "run", lambda *_, **__: 1 / 0)
    assert refused(openai.InternalServerError).type == "server_error"
    with pytest.raises(openai.APIError, match="internal"):
        list(client.completions.create(prompt="a", stream=True, **knobs))


BAD = {
    "malformed": (400, b'{"prompt": '), "not an object": (400, b"[1]"), "utf-8": (400, b'{"prompt": "\xff"}'),
    "deep": (400, b"[" * 100_000), "empty": (400, b""), "nan": (400, b'{"prompt": "a", "temperature": NaN}'),
    "no prompt": (400, {}), "number": (400, {"prompt": 5}), "ids": (400, {"prompt": [1, 999]}),
    "negative": (400, {"prompt": [-1]}), "surrogate": (400, b'{"prompt": "\\ud800"}'),
    "empty prompt": (400, {"prompt": ""}), "no prompts": (400, {"prompt": []}), "null": (400, {"prompt": None}),
    "long": (400, {"prompt": "a" * 65}), "max_tokens": (400, {"prompt": "a", "max_tokens": 10**9}),
    "zero": (400, {"prompt": "a", "max_tokens": 0}), "type": (400, {"prompt": "a", "temperature": "hot"}),
    "bool": (400, {"prompt": "a", "max_tokens": True}), "range": (400, {"prompt": "a", "top_p": 2}),
    "stop": (400, {"prompt": "a", "stop": [1]}), "stream": (400, {"prompt": "a", "stream": "yes"}),
    "options": (400, {"prompt": "a", "stream": True, "stream_options": 3}),
    "unknown": (400, {"prompt": "a", "logprobs": 5}), "model": (404, {"prompt": "a", "model": "gpt-9"}),
    "control": (400, {"prompt": "a<|end|>b"}), "n": (400, {"prompt": "a", "n": 1000}),
    "chat": (400, {"messages": "hi"}), "role": (400, {"messages": [{"role": "root", "content": "x"}]}),
    "role type": (400, {"messages": [{"role": [], "content": "x"}]}),
    "content": (400, {"messages": [{"role": "user", "content": None}]}),
    "typed": (400, {"messages": [{"role": "user", "content": "<|assistant|>"}]}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(service, name):
    call, _ = service
    want, body = BAD[name]
    chat = isinstance(body, dict) and "messages" in body
    status, reply = call("POST", "/v1/chat/completions" if chat else "/v1/completions",
                         *((None, body) if isinstance(body, bytes) else (body,)))
    assert status == want and set(reply["error"]) == {"message", "type", "param", "code"} and reply["error"]["message"]
    assert "internal" not in reply["error"]["message"]


def test_paths_and_bad_http(service, monkeypatch):
    call, server = service
    status, page = call("GET", "/")
    assert status == 200 and "<textarea" in page and "CHAT" not in page
    assert call("GET", "/v1/models")[1]["data"][0] == call("GET", "/v1/models/tiny")[1]
    assert call("GET", "/nothing")[0] == 404 and call("GET", "/v1/completions")[0] == 405
    assert call("DELETE", "/health")[0] == 405
    with socket.create_connection(("127.0.0.1", call.port), 30) as s:        # no body follows a HEAD
        s.sendall(b"HEAD /health HTTP/1.1\r\n\r\n")
        assert s.makefile("rb").read().endswith(b"\r\n\r\n")
    status, reply = call("POST", "/v1/completions", raw=bytes(100_000_000))   # a hundred times what is allowed
    assert status == 413 and "bytes" in reply["error"]["message"]
    for sent, want in ((b"nonsense\r\n\r\n", b"400"), (b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"400"),
                       (b"GET / HTTP/1.1\r\nX: " + b"a" * 70000 + b"\r\n\r\n", b"431")):
        with socket.create_connection(("127.0.0.1", call.port), 30) as s:
            s.sendall(sent)
            assert s.recv(100).startswith(b"HTTP/1.1 " + want)
    monkeypatch.setattr(I, "ASK_SECONDS", 0.05)            # a client that never finishes its sentence
    with socket.create_connection(("127.0.0.1", call.port), 30) as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Len")
        assert s.recv(100).startswith(b"HTTP/1.1 408")
    assert I.Client.timeout == I.READ_SECONDS
    monkeypatch.setattr(I.Client, "timeout", 0.1)          # and one that takes nothing of what it asked for
    monkeypatch.setattr(I, "PAGE", "x" * 50_000_000)
    before, end = threading.active_count(), time.monotonic() + 60
    with socket.create_connection(("127.0.0.1", call.port), 30) as s:
        s.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert select.select([s], [], [], 30)[0]
        while threading.active_count() > before:
            assert time.monotonic() < end
        assert sum(map(len, iter(lambda: s.recv(1 << 20), b""))) < 50_000_000
    assert call("GET", "/health")[0] == 200


def test_too_many(service, monkeypatch):
    call, _ = service
    monkeypatch.setattr(I, "MAX_WAITING", 3)
    connection = http.client.HTTPConnection("127.0.0.1", call.port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps({"prompt": ["a"] * 4}))
    reply = connection.getresponse()
    assert reply.status == 429 and reply.headers["Retry-After"] == "1"
    assert json.loads(reply.read())["error"]["type"] == "rate_limit_error"
    monkeypatch.setattr(I, "MAX_THREADS", 3)
    with socket.create_connection(("127.0.0.1", call.port), 60) as s:        # one too many: turned away unheard
        head, body = s.makefile("rb").read().split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 429") and b"Retry-After: 1" in head and b"too many clients" in body


def test_who_hangs_up_is_let_go(service, monkeypatch):
    call, server = service
    seen, step = [], server.engine.step

    def held():
        """A step; then wait until the client of whoever got a token is gone."""
        for r in (changed := step()):
            seen.append(r)
            end = time.monotonic() + 60
            while not r.listener.gone and time.monotonic() < end:
                call("GET", "/health")
        return changed
    monkeypatch.setattr(server.engine, "step", held)

    def wait(done):
        end = time.monotonic() + 60
        while not done():
            assert time.monotonic() < end
    for i, stream in enumerate((False, True)):
        body = json.dumps({"prompt": "a", "max_tokens": 40, "stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", call.port), 60) as s:
            s.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            wait(lambda: len(seen) > i)
        wait(lambda: not server.engine.busy())
    assert [(r.finish, len(r.output)) for r in seen] == [("cancelled", 1)] * 2


def test_a_failing_step_is_reported_and_survived(service, monkeypatch, capfd):
    call, server = service
    monkeypatch.setattr(server.engine, "run", lambda *_, **__: 1 / 0)
    assert call("POST", "/v1/completions", {"prompt": "a"})[0] == 500
    assert '"internal error"' in call("POST", "/v1/completions", {"prompt": "a", "stream": True})[1]
    monkeypatch.undo()
    assert call("POST", "/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200
    assert "division by zero" in capfd.readouterr().err


def hammer(port, jobs, seconds, clients=64):
    """That many clients ask for that long, whole or streamed; one in five hangs up early. jobs: [(what to ask, the
    right text)] -> [(what was asked, "right", "left" or "busy")]; the first wrong answer is an AssertionError."""
    end, log, errors = time.monotonic() + seconds, [], []

    def ask(rng):
        asked, want = rng.choice(jobs)
        asked, leaves = {**asked, "stream": rng.random() < 0.5}, rng.random() < 0.2
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(asked))
            if leaves and not asked["stream"]:
                return log.append((asked, "left"))
            reply = connection.getresponse()
            if leaves:
                assert reply.read(1)
                return log.append((asked, "left"))
            data = reply.read().decode()
            if reply.status == 429 and reply.headers["Retry-After"]:
                return log.append((asked, "busy"))
            parts = events(data) if asked["stream"] else [json.loads(data)]
            got = "".join(part["choices"][0]["text"] for part in parts)
            assert got == want and parts[-1]["choices"][0]["finish_reason"], (asked, got, want)
            log.append((asked, "right"))

    def client(number):
        rng = random.Random(number)
        try:
            while time.monotonic() < end and not errors:
                ask(rng)
        except Exception as e:
            errors.append(e)
    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors[0]
    return log


def idle(call):
    """The server's /health once nothing is left of what was asked: half a second after the last one hung up."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        health = call("GET", "/health")[1]
        if not health["running"] + health["waiting"] + health["blocks_in_use"]:
            return health
    raise AssertionError(health)


def test_load():
    """64 clients for two seconds, few blocks: right answers, alone or not, no error, no block lost."""
    with serving(num_blocks=40) as (call, server):
        jobs = []
        for i in range(24):
            knobs = dict(max_tokens=1 + 5 * i % 14, seed=i, temperature=i % 2)
            text = f"{'shared prefix ' * (i % 3)}{i}"
            jobs.append(({"prompt": text, **knobs}, alone(server, text, **knobs)))
        log = hammer(call.port, jobs, 2)
        seen = {(what, asked["stream"]) for asked, what in log}
        assert {("right", True), ("right", False), ("left", True), ("left", False)} <= seen
        assert 0 < idle(call)["requests"] <= len(log)


# --- 6. commands --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """checkpoint.pt, tokenizer.json, train.bin, val.bin, of bytes."""
    out = tmp_path_factory.mktemp("model")
    text = out / "text.txt"
    text.write_text("".join(f"line {i} says {i * i}\n" for i in range(400)))
    chat_tokenizer().save(out / "tokenizer.json")
    bpe.prepare(out, [text], None, tokenizer=out / "tokenizer.json", num_processes=1, log=lambda *_: None)
    tok = bpe.load_tokenizer(out / "tokenizer.json")
    M.save_checkpoint(out / "checkpoint.pt", build(vocab_size=261), tokenizer=tok.hash(), chat=CHAT)
    return out


def run(capsys, *argv):
    I.main([str(a) for a in argv])
    return capsys.readouterr().out


def test_complete(folder, capsys):
    words = ("--checkpoint", folder / "checkpoint.pt", "--prompt", "line 1", "--max_tokens", 20, "--seed", 3)
    out = run(capsys, *words)
    assert out.startswith("line 1") and out == run(capsys, *words) != run(capsys, *words[:-1], 4)
    for extra in (["--draft", "ngram"], ["--quantize", "int8"], ["--int8_cache"], ["--block_size", "0"],
                  ["--draft", folder / "checkpoint.pt"], ["--quantize", "awq", "--data", folder]):
        assert run(capsys, *words, *extra).startswith("line 1")


def test_chat_command(folder, capsys, monkeypatch):
    typed = iter(["hello", "again" * 20, KeyboardInterrupt, EOFError])

    def answer(_):
        text = next(typed)
        if not isinstance(text, str):
            raise text
        return text
    monkeypatch.setattr("builtins.input", answer)
    out = run(capsys, "chat", "--checkpoint", folder / "checkpoint.pt", "--max_tokens", 5)
    assert "Ctrl-D" in out


def test_batch_resumes(folder, tmp_path, capsys, monkeypatch):
    lines = [{"prompt": f"line {i}", "max_tokens": 3 + i % 5} for i in range(9)]
    file = tmp_path / "jobs.jsonl"
    file.write_text("\ufeff" + "\n".join(map(json.dumps, lines)) + "\nnot json\n" + json.dumps(
        {"messages": [{"role": "user", "content": "hi"}]}) + '\n{"prompt": ["a", "b"]}\n[1]\n')
    words = ("batch", file, "--checkpoint", folder / "checkpoint.pt", "--out", tmp_path, "--max_batch", 3)
    run(capsys, *words)
    result = tmp_path / "jobs.results.jsonl"
    whole = result.read_bytes()
    records = [json.loads(line) for line in whole.splitlines()]
    assert [r["index"] for r in records] == list(range(13))
    assert [i for i, r in enumerate(records) if "error" in r] == [9, 11, 12]
    assert "one text" in records[11]["error"] and "JSON object" in records[12]["error"]
    result.write_bytes(whole[:len(whole) // 2])            # killed in the middle of a line
    def interrupted(self):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:                   # and again, before anything new is done
        patch.setattr(I.Engine, "step", interrupted)
        with pytest.raises(SystemExit):
            run(capsys, *words)
    assert 0 < len(result.read_bytes()) <= len(whole) // 2
    run(capsys, *words)
    assert result.read_bytes() == whole
    for text in ('{"prompt": "a"}', '{"prompt": "a"}\n' * 20):              # another file of the same name
        file.write_text(text)
        with pytest.raises(SystemExit):
            run(capsys, *words)
        assert result.read_bytes() == whole and "another file" in capsys.readouterr().err


def test_nobody_reads_the_log(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(I.http.server.BaseHTTPRequestHandler, "log_message", full)
    I.Client.__new__(I.Client).log_message("%s", "GET")


@pytest.mark.parametrize("command", ["prune", "distill", "medusa", "eagle", "quantize", "diffuse"])
def test_training_commands(folder, tmp_path, capsys, clock, command):
    words = [command, "--data", folder, *(["--minutes", 0] if command != "quantize" else [])]
    if command == "diffuse":
        words += shlex.split("--d_model 16 --num_layers 1 --context_length 40")
    else:
        words += ["--checkpoint", folder / "checkpoint.pt"]
    words += ["--out", tmp_path] if command not in ("quantize", "diffuse") else []
    monkey = "bits/byte" if command in ("prune", "distill", "quantize") else "judged" if command == "diffuse" else "saved"
    assert monkey in run(capsys, *words)
    if command in ("medusa", "eagle"):
        assert run(capsys, "--checkpoint", folder / "checkpoint.pt", "--prompt", "x", "--max_tokens", 5, "--draft",
                   tmp_path / f"{command}.pt", "--k", 2)
    if command in ("prune", "distill"):
        assert run(capsys, "--checkpoint", tmp_path / "checkpoint.pt", "--prompt", "x", "--max_tokens", 3)
        assert M.load_checkpoint(tmp_path / "checkpoint.pt")["chat"] == CHAT


def test_demo(folder, tmp_path, capsys, monkeypatch, clock):
    monkeypatch.setattr(I, "machine", lambda at: (1e10, 1e10))
    out = run(capsys, "--seconds", 0.02, "--checkpoint", folder / "checkpoint.pt", "--out", tmp_path)
    rows = [line for line in out.splitlines() if line.endswith("%")]
    assert len(rows) == 10 and all(line.endswith("100%") for line in rows if "lossy" not in line)
    assert (tmp_path / "infer.png").exists()


MISTAKES = {
    "unknown flag": (["--promt", "x"], "unrecognized"), "no checkpoint": (["--prompt", "x", "--checkpoint", "no/x.pt"], "train.py"),
    "range": (["--top_p", "0"], "top_p"), "batch file": (["batch"], "FILE"), "negative": (["--k", "0"], "1 or more"),
    "missing data": (["diffuse", "--data", "no"], "no/tokenizer.json"), "abbreviated": (["--prom", "x"], "unrecognized"),
    "port": (["serve", "--port", "65536"], "65535"),
    "no effect": (["--temperature", "0"], "--prompt TEXT"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, said = MISTAKES[name]
    with pytest.raises(SystemExit) as e:
        I.main(words)
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and err.count("\n") == 1


def test_a_foreign_tokenizer_or_drafter_is_refused(folder, tmp_path, capsys):
    other = tmp_path / "checkpoint.pt"
    M.save_checkpoint(other, build(vocab_size=261), tokenizer="0" * 16)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    M.save_checkpoint(tmp_path / "small.pt", build(vocab_size=100))
    M.save_checkpoint(tmp_path / "mamba.pt", build("mamba", vocab_size=261))
    M.save_checkpoint(tmp_path / "eagle.pt", I.Eagle(M.ModelConfig(**SHAPE)), drafter="eagle", k=3)
    good = folder / "checkpoint.pt"
    for words, said in (((other,), "tokenizer"), ((good, "--draft", tmp_path / "small.pt"), "vocabular"),
                        ((good, "--draft", tmp_path / "mamba.pt"), "recurrent"), ((good, "--stop", ""), "stop string"),
                        ((good, "--draft", tmp_path / "eagle.pt"), "another shape")):
        with pytest.raises(SystemExit):
            I.main(["--prompt", "x", "--checkpoint", *map(str, words)])
        assert said in capsys.readouterr().err


def test_sigterm_drains_and_exits_0(folder):
    """As a process: it says its address, answers what was asked, and ends with status 0."""
    p = subprocess.Popen([sys.executable, str(ROOT / "infer.py"), "serve", "--port", "0", "--threads", "1",
                          "--checkpoint", str(folder / "checkpoint.pt")], stdout=subprocess.PIPE, text=True)
    try:
        port = int(re.search(r":(\d+)/v1", p.stdout.readline())[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps({"prompt": "a", "max_tokens": 60, "stream": True}))
        reply = connection.getresponse()                   # it has begun
        p.send_signal(signal.SIGTERM)
        assert events(reply.read().decode())[-1]["choices"][0]["finish_reason"]
        assert p.wait(60) == 0
    finally:
        p.kill()
        p.stdout.close()


def test_an_address_in_use_is_one_line(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit):
        I.main(["serve", "--port", str(taken.getsockname()[1]), "--checkpoint", str(folder / "checkpoint.pt")])
    assert "choose another --port" in (err := capsys.readouterr().err) and err.count("\n") == 1


def commands():
    return re.findall(r"python infer\.py((?: +[^\s#]+)*)", I.__doc__)


def test_commands_of_the_docstring_parse():
    assert len(commands()) >= 5
    for arguments in commands():
        words = shlex.split(arguments)
        assert I.parse_args(words).command == (words[0] if words and not words[0].startswith("-") else "")
