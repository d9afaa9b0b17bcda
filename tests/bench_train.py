"""bench_train.py - is the training loop fast, and is the default recipe good?

Run    python tests/bench_train.py speed               # 2 min: tokens/s, ours | plain torch.nn | transformers
       python tests/bench_train.py recipe --minutes 4  # 30 min: default recipe against GPT-2's, both tuned
       python tests/bench_train.py                     # both

speed   One training step (forward, backward, torch's AdamW) of the same Llama-shaped model, fp32, eager, the
        same threads. The three take turns, so that a noisy machine disturbs all alike; the table has medians.
recipe  `--preset gpt2-recipe` (LayerNorm, learned positions, GELU 4x, biases, tied, AdamW, cosine: nanoGPT's)
        trains for M minutes at several learning rates; the best is the mark. The default recipe, at the same
        number of parameters, gets M/2 and M/3 minutes, also at several rates. Same tokens files, same
        held-out text, same clock.
"""
import argparse
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import model as M                                                            # before torch: see model.py
import train

import torch
import torch.nn as nn
import torch.nn.functional as F


class PlainLlama(nn.Module):
    """The same architecture as anybody would write it with torch.nn: what 'no tricks' costs."""
    class Block(nn.Module):
        def __init__(self, D, N, ff):
            super().__init__()
            self.N = N
            self.n1, self.n2 = nn.RMSNorm(D, 1e-5), nn.RMSNorm(D, 1e-5)
            self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))
            self.gate, self.up = nn.Linear(D, ff, bias=False), nn.Linear(D, ff, bias=False)
            self.down = nn.Linear(ff, D, bias=False)

        def forward(self, x, cos, sin):
            B, T, D = x.shape
            h = self.n1(x)
            q, k, v = (f(h).view(B, T, self.N, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
            turn = lambda t: t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin
            y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
            x = x + self.o(y.transpose(1, 2).reshape(B, T, D))
            h = self.n2(x)
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def __init__(self, c):
        super().__init__()
        H = c.head_dim
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.blocks = nn.ModuleList(self.Block(c.d_model, c.num_heads, c.ffn_dim)
                                    for _ in range(c.num_layers))
        self.norm, self.head = nn.RMSNorm(c.d_model, 1e-5), nn.Linear(c.d_model, c.vocab_size, bias=False)
        angle = torch.arange(c.context_length)[:, None] * c.rope_theta ** (-torch.arange(0, H, 2) / H)
        self.register_buffer("cos", torch.cat((angle, angle), -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angle, angle), -1).sin(), persistent=False)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.cos[:ids.shape[1]], self.sin[:ids.shape[1]])
        return self.head(self.norm(x))


def transformers_llama(c):
    from transformers import LlamaConfig, LlamaForCausalLM
    peer = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads, intermediate_size=c.ffn_dim,
        max_position_embeddings=c.context_length, rms_norm_eps=1e-5, tie_word_embeddings=False,
        attn_implementation="sdpa", use_cache=False))
    return peer, lambda ids: peer(ids, use_cache=False).logits


def speed(repeats, batch_size):
    c = M.ModelConfig(**{**M.PRESETS["tiny"], "qk_norm": False})
    torch.manual_seed(0)
    ours, plain = M.Transformer(c), PlainLlama(c)
    peer, peer_logits = transformers_llama(c)
    runners = {"ours": (ours, ours), "plain torch.nn": (plain, plain), "transformers": (peer, peer_logits)}
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, (m, _) in runners.items()}
    assert len(set(sizes.values())) == 1, f"not the same model: {sizes}"
    ids = torch.randint(0, c.vocab_size, (batch_size, c.context_length + 1))
    optimizers = {name: torch.optim.AdamW(m.parameters(), 1e-3) for name, (m, _) in runners.items()}
    seconds = {name: [] for name in runners}
    for i in range(repeats + 2):                                             # two rounds to warm up
        for name, (_, logits) in runners.items():
            start = time.perf_counter()
            F.cross_entropy(logits(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if i >= 2:
                seconds[name].append(time.perf_counter() - start)
    tokens, flops = batch_size * c.context_length, 3 * sum(M.flops_per_token(c).values())
    base = statistics.median(seconds["ours"])
    M.table(f"Training step, {sizes['ours']:,} parameters, {batch_size} x {c.context_length} tokens, fp32, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}, "
            f"median of {repeats}",
            ["", "ms", "tokens/s", "GFLOP/s", "ours is faster by"],
            [[name, f"{1e3 * (t := statistics.median(s)):.0f}", f"{tokens / t:,.0f}",
              f"{flops * tokens / t / 1e9:.0f}", f"{t / base:.2f}x"]
             for name, s in seconds.items()])


def recipe(minutes, out, recipes):
    """recipes: {label: (command line, minutes, rates)}. The best rate of each is its result."""
    base, _ = train.settings(["--out", out])
    os.makedirs(out, exist_ok=True)
    data = train.open_data(base)
    rows, mark = [], None
    for label, (flags, share, rates) in recipes.items():
        s, _ = train.settings([*flags, "--out", out, "--minutes", str(minutes * share), "--evals", "4"])
        results = train.run_many("recipe", [(f"{label}, lr {lr:g}", dict(lr=lr)) for lr in rates],
                                 [0], s, data)
        runs = {lr: r[0] for lr, r in zip(rates, results.values())}
        best = min(runs, key=lambda lr: runs[lr]["bpb"])
        mark = mark if mark is not None else runs[best]["bpb"]
        tried = "  ".join(f"{lr:g}: {r['bpb']:.3f}" for lr, r in runs.items())
        rows.append([label, f"{runs[best]['params']:,}", f"{runs[best]['seconds']:.0f} s", f"{best:g}",
                     f"{runs[best]['bpb']:.4f}", f"{runs[best]['bpb'] - mark:+.4f}", tried])
    M.table(f"Recipes on the same held-out text, {torch.get_num_threads()} threads, "
            f"load {os.getloadavg()[0]:.1f}",
            ["recipe", "parameters", "time", "best rate", "bits/byte", "against GPT-2's", "all rates tried"],
            rows)


def main():
    p = M.cli(__doc__)
    p.add_argument("what", nargs="?", choices=("speed", "recipe", "all"), default="all", help="which table")
    p.add_argument("--repeats", type=int, default=15, help="timed steps of each")
    p.add_argument("--batch_size", type=int, default=8, help="sequences a step")
    p.add_argument("--minutes", type=float, default=4.0, help="M: the time of the GPT-2 recipe")
    p.add_argument("--out", default="out/bench", help="folder for the runs")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0: one a core")
    args = p.parse_args()
    train.keep_freed_memory()                              # as train.py does; it helps every model here alike
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.what in ("speed", "all"):
        speed(args.repeats, args.batch_size)
    if args.what in ("recipe", "all"):
        recipe(args.minutes, args.out, {
            "GPT-2 recipe": (["--preset", "gpt2-recipe"], 1.0, (7.5e-4, 1.5e-3, 3e-3)),
            "default, half the time": ([], 1 / 2, (0.01, 0.02, 0.04)),
            "default, a third": ([], 1 / 3, (0.02, 0.04))})


if __name__ == "__main__":
    main()
