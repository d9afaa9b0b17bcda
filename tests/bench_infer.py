"""bench_infer.py - decoding against transformers, continuous batching against static, speculation against plain.

Run    python tests/bench_infer.py                  # all parts, 5 to 9 minutes
       python tests/bench_infer.py --only peers     # one of: peers, batching, speculation, memory, load

peers        The same random weights in `transformers` (LlamaForCausalLM, generate with its cache) and here: prefill,
             and decoding at batch 1 and 16, greedy; the texts must be the same. The two take turns; medians.
batching     64 requests with prompts of 4 to 120 and answers of 4 to 100 tokens: one at a time, static batches of 16
             (padded, all wait for the longest), continuous with 16 rows.
speculation  A target of 8 layers and a draft of its first, with the same output matrix. Random layers do not agree, so
             the target's later layers are scaled down until 7 in 10 of the drafts that are judged are kept (the first
             refusal ends a pass): the speed at a stated acceptance, not a claim about trained pairs.
memory       Bytes of the weights as int8 and int4.
load         `infer.py serve` as a process, few blocks, and 64 clients for --seconds: mixed prompts, whole or streamed, one
             in five hangs up early. Each text must be as it is alone, and nothing be left in the end; then SIGTERM among
             eight streams, which must all come to their ends, and the status be 0.
"""
import collections
import copy
import http.client
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import infer as I                                                            # before model and torch: it sets how
import model as M                                                            # their threads wait

import torch


def model_of(d_model, num_layers, num_heads, vocab_size=4096, context_length=512):
    torch.manual_seed(0)
    return M.Transformer(M.ModelConfig(vocab_size=vocab_size, context_length=context_length, d_model=d_model,
                                       num_layers=num_layers, num_heads=num_heads, init="glorot")).eval()


@torch.no_grad()
def as_llama(model):
    """The same weights in transformers. It pairs j with j + H/2 in RoPE, model.py neighbours: rows are reordered."""
    from transformers import LlamaConfig, LlamaForCausalLM
    c = model.config
    D, H, N = c.d_model, c.head_dim, c.num_heads
    peer = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=D, intermediate_size=c.ffn_dim, num_hidden_layers=c.num_layers,
        num_attention_heads=N, max_position_embeddings=c.context_length, rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None)).eval()  # no token ends
    order = torch.cat([n * H + torch.cat((torch.arange(0, H, 2), torch.arange(1, H, 2))) for n in range(N)])
    peer.model.embed_tokens.weight.copy_(model.embedding.weight)
    peer.model.norm.weight.copy_(model.norm.weight)
    peer.lm_head.weight.copy_(model.head.weight)
    for ours, theirs in zip(model.blocks, peer.model.layers):
        q, k, v = ours.mixer.wqkv.weight.chunk(3)
        pairs = [(theirs.self_attn.q_proj, q[order]), (theirs.self_attn.k_proj, k[order]), (theirs.self_attn.v_proj, v),
                 (theirs.self_attn.o_proj, ours.mixer.wo.weight), (theirs.mlp.gate_proj, ours.ffn.w1.weight),
                 (theirs.mlp.up_proj, ours.ffn.w3.weight), (theirs.mlp.down_proj, ours.ffn.w2.weight),
                 (theirs.input_layernorm, ours.norm1.weight), (theirs.post_attention_layernorm, ours.norm2.weight)]
        for module, weight in pairs:
            module.weight.copy_(weight)
    return peer


def seconds(f):
    begin = time.perf_counter()
    out = f()
    return time.perf_counter() - begin, out


def peers(rounds, prompt_length=128, new=48, shapes=((256, 12, 4), (384, 8, 6), (512, 8, 8))):
    rows = []
    for shape in shapes:
        model = model_of(*shape)
        peer = as_llama(model)
        I.tune(model)
        for B in (1, 16):
            ids = torch.randint(0, 4096, (B, prompt_length), generator=torch.Generator().manual_seed(1))
            engine = I.Engine(model, B, 0, chunk=10**6, share=False)         # made once, as a server's is
            def ours(n):
                return engine.generate([I.Request(row, n, temperature=0) for row in ids.tolist()])
            def theirs(n):
                return peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False,
                                     pad_token_id=0)[:, prompt_length:].tolist()
            times = {name: [] for name in ("ours 1", "ours n", "peer 1", "peer n")}
            for _ in range(rounds + 1):
                texts = []
                for who, f in (("ours", ours), ("peer", theirs)):
                    times[who + " 1"].append(seconds(lambda: f(1))[0])
                    t, text = seconds(lambda: f(new))
                    times[who + " n"].append(t)
                    texts.append(text)
            t = {name: statistics.median(v[1:]) for name, v in times.items()}                  # the first warms up
            same = sum(x == y for p, q in zip(*texts) for x, y in zip(p, q)) / (B * new)
            step = [(t[who + " n"] - t[who + " 1"]) / (new - 1) for who in ("ours", "peer")]
            rows.append([f"{M.num_params(model.config) / 1e6:.1f}M, {shape[1]} x {shape[0]}", str(B),
                         f"{B / step[0]:,.0f}", f"{B / step[1]:,.0f}", f"{step[1] / step[0]:.2f}x",
                         f"{t['ours 1'] * 1e3:.0f}", f"{t['peer 1'] * 1e3:.0f}", f"{t['peer 1'] / t['ours 1']:.2f}x",
                         f"{same:.1%}"])
    import transformers
    M.table(f"Greedy decoding after {prompt_length} tokens, against transformers {transformers.__version__}, fp32; {header()}",
            ["model", "batch", "ours tok/s", "peer", "ratio", "prefill ms", "peer", "ratio", "same text"], rows)


def batching(rounds, count=64, rows=16):
    model, rng = model_of(256, 8, 4), random.Random(0)
    prompts = [[rng.randrange(4096) for _ in range(rng.randrange(4, 121))] for _ in range(count)]
    limits = [rng.randrange(4, 101) for _ in prompts]
    tuned = I.tune(copy.deepcopy(model))
    def engine(B, block_size):
        e = I.Engine(tuned, B, block_size, share=False)    # shared prefixes would make every round but the first easy
        return lambda: e.generate([I.Request(list(p), n, temperature=0) for p, n in zip(prompts, limits)])
    runs = {"one at a time": engine(1, 0),
            f"static, {rows} padded, model.py as it is": lambda: I.generate_static(model, prompts, limits, rows),
            f"static, {rows} padded, tuned": lambda: I.generate_static(tuned, prompts, limits, rows),
            f"continuous, {rows} rows": engine(rows, 0), f"continuous, {rows} rows, paged": engine(rows, 16)}
    times, texts = {name: [] for name in runs}, {}
    for _ in range(rounds):
        for name, f in runs.items():
            t, texts[name] = seconds(f)
            times[name].append(t)
    total, base = sum(limits), statistics.median(times["one at a time"])
    M.table(f"{count} mixed requests, {total:,} new tokens, {M.num_params(model.config) / 1e6:.1f}M parameters; {header()}",
            ["", "tokens/s", "against one at a time", "same text"],
            [[name, f"{total / statistics.median(t):,.0f}", f"{base / statistics.median(t):.2f}x",
              f"{sum(x == y for a, b in zip(texts[name], texts['one at a time']) for x, y in zip(a, b)) / total:.1%}"]
             for name, t in times.items()])


def agreement(model, scale, k):
    """The target with its later layers scaled, its first layer as draft, and how often the draft is right."""
    target = copy.deepcopy(model)
    with torch.no_grad():
        for block in target.blocks[1:]:
            block.mixer.wo.weight.mul_(scale)
            block.ffn.w2.weight.mul_(scale)
    draft = copy.deepcopy(target)
    draft.blocks = draft.blocks[:1]
    I.tune(target), I.tune(draft)
    engine = I.Engine(target, 8, 0, drafter=I.DraftModel(draft, k), share=False)
    engine.generate([I.Request([i + 1] * 16, 48, temperature=0) for i in range(8)])
    return target, draft, engine.counters["accepted"] / engine.counters["judged"]


def speculation(rounds, k=3):
    model, rows, low, high = model_of(512, 8, 8, vocab_size=512), [], 0.0, 1.0
    for _ in range(8):
        target, draft, rate = agreement(model, (low + high) / 2, k)
        low, high = ((low + high) / 2, high) if rate > 0.7 else (low, (low + high) / 2)
    for B in (1, 4):
        def run(drafter):
            engine = I.Engine(target, B, 0, drafter=drafter, share=False)
            requests = [engine.add(I.Request([7 * i + 1] * 32, 96, temperature=0)) for i in range(B)]
            while any(r.fresh for r in requests):
                engine.step()
            t, _ = seconds(lambda: [engine.step() for _ in iter(engine.busy, False)])
            return t, [r.output for r in requests], engine.counters
        plain, quick = [], []
        for _ in range(rounds):
            a, b = run(None), run(I.DraftModel(draft, k))
            plain.append(a[0])
            quick.append(b[0])
            assert a[1] == b[1], "speculation changed a greedy text"
        counters, p, q = b[2], statistics.median(plain), statistics.median(quick)
        kept = counters["accepted"] / (counters["drafted"] / k)              # a pass; the first refusal ends it
        rows.append([str(B), f"{counters['accepted'] / counters['judged']:.2f}", f"{kept + 1:.2f}", f"{95 * B / p:,.0f}",
                     f"{95 * B / q:,.0f}", f"{p / q:.2f}x"])
    sizes = [sum(w.numel() for w in m.blocks.parameters()) for m in (target, draft)]
    M.table(f"Speculation, {k} drafts, blocks of the draft {sizes[1] / sizes[0]:.3f} of the target's; {header()}",
            ["batch", "acceptance", "tokens/pass", "plain tok/s", "speculative", "ratio"], rows)


def memory(rounds):
    rows = []
    for name in ("small", "gpt2"):
        model = M.Transformer(M.ModelConfig(**M.PRESETS[name]))
        full = I.model_bytes(model)
        for scheme in ("int8", "int4"):
            small = I.model_bytes(I.quantize_model(copy.deepcopy(model), scheme))
            rows.append([f"{name}, {scheme}", f"{full / 1e6:.1f}", f"{small / 1e6:.1f}", f"{small / full:.2f}x",
                         f"{2 * small / full:.2f}x"])
    M.table("Weights in memory, the embedding included", ["", "fp32 MB", "MB", "of fp32", "of bf16"], rows)


def load(length, clients=64):
    import test_infer as T
    model = model_of(128, 4, 4, vocab_size=261, context_length=256)
    tokenizer, rng = T.chat_tokenizer(), random.Random(0)
    engine, jobs = I.Engine(I.tune(copy.deepcopy(model)), 1), []
    for i in range(48):
        text, n = "a prefix that some share; " * rng.randrange(4) + f"{i}" * rng.randrange(1, 30), rng.randrange(1, 80)
        r = I.Request(tokenizer.encode(text), n, temperature=0, tokenizer=tokenizer, stop_ids=I.stop_tokens(tokenizer))
        engine.generate([r])
        jobs.append(({"prompt": text, "max_tokens": n, "temperature": 0}, r.text))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(os.path.join(folder, "tokenizer.json"))
        path = os.path.join(folder, "checkpoint.pt")
        M.save_checkpoint(path, model, tokenizer=tokenizer.hash())
        server = subprocess.Popen([sys.executable, I.__file__, "serve", "--port", "0", "--num_blocks", "48",
                                   "--checkpoint", path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            port = int(re.search(r":(\d+)/v1", server.stdout.readline())[1])
            def call(method, url, body=None):
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request(method, url, body)
                return connection.getresponse()
            t, log = seconds(lambda: T.hammer(port, jobs, length, clients))
            health = T.idle(lambda *asked: (200, json.loads(call(*asked).read())))
            last = [call("POST", "/v1/completions", json.dumps({**asked, "stream": True})) for asked, _ in jobs[:8]]
            server.send_signal(signal.SIGTERM)             # their heads are here: all have begun
            for reply, (_, want) in zip(last, jobs):
                assert "".join(e["choices"][0]["text"] for e in T.events(reply.read().decode())) == want
            assert (status := server.wait(60)) == 0, status
        finally:
            server.kill()
    count = collections.Counter((what, asked["stream"]) for asked, what in log)
    M.table(f"{clients} clients for {length:g} s, {M.num_params(model.config) / 1e6:.1f}M parameters; {header()}",
            ["", "whole", "streamed"], [[text, f"{count[what, False]:,}", f"{count[what, True]:,}"] for what, text in (
                ("right", "the text as it is alone"), ("left", "hung up early"), ("busy", "told to come back (429)"))])
    print(f"{health['tokens'] / t:,.0f} tokens/s, {health.get('preempted', 0):,} preemptions; then 0 running, 0 waiting, "
          f"0 blocks in use; SIGTERM among 8 streams: all finished, status 0")


def header():
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"


PARTS = {"peers": peers, "batching": batching, "speculation": speculation, "memory": memory, "load": load}


def main():
    parser = M.cli(__doc__)
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--rounds", type=int, default=5, help="turns each; the table shows medians")
    parser.add_argument("--seconds", type=float, default=60, help="how long the clients of load ask")
    args = parser.parse_args()
    I.keep_freed_memory()
    for name, part in PARTS.items():
        if args.only in (None, name):
            part(args.seconds if name == "load" else args.rounds)


if __name__ == "__main__":
    main()
