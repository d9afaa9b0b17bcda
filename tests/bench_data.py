"""bench_data.py - is the data pipeline fast, and as right as its peers?

Run    python tests/bench_data.py                # half a minute, one core: ours | peer | ratio, from one run
       python tests/bench_data.py html warc      # some of: html warc language pii minhash ngram classifier dsir bloom

Ours and the peer take turns, so that a noisy machine disturbs both alike; the table has medians. Ratio = ours / peer:
above 1 ours is faster. The texts are Python's own: help pages, the language reference, docstrings.
"""
import argparse
import contextlib
import importlib.metadata
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
import bpe  # noqa: E402
import data as D  # noqa: E402

import numpy as np  # noqa: E402

ROWS = []


def race(contestants, repeats=7):
    """{name: function} -> {name: median seconds}; they take turns."""
    taken = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, work in contestants.items():
            begin = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in taken.items()}


def row(what, amount, unit, seconds, goal):
    """One line a peer: amount / seconds of each, in unit."""
    ours = amount / seconds["ours"]
    for peer, theirs in list(seconds.items())[1:] or [("-", None)]:
        rate, ratio = (f"{amount / theirs:,.1f}", f"{theirs / seconds['ours']:.2f}") if theirs else ("-", "-")
        ROWS.append([what, unit, f"{ours:,.1f}", peer, rate, ratio, goal])


def figure(what, ours, peer, theirs, goal):
    ROWS.append([what, "", ours, peer, theirs, "", goal])


def version(name):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return f"{name} {importlib.metadata.version(name)}"
    return f"no {name}"


def reference_texts():
    from pydoc_data.topics import topics
    return [topics[name] for name in sorted(topics)]


class Standard(HTMLParser):
    """What one writes with the standard library: text, a line end at blocks, scripts and navigation left out."""
    def __init__(self):
        super().__init__()
        self.out, self.skip = [], 0

    def handle_starttag(self, tag, attributes):
        self.skip += tag in ("script", "style", "nav")
        self.out.append("\n" if tag in D.BLOCKS else "")

    def handle_endtag(self, tag):
        self.skip -= tag in ("script", "style", "nav")
        self.out.append("\n" if tag in D.BLOCKS else "")

    def handle_data(self, text):
        self.out.append("" if self.skip else text)


def bench_html():
    import idlelib
    from resiliparse.extract.html2text import extract_plain_text
    raw = Path(idlelib.__file__).with_name("help.html").read_bytes()
    page = raw.decode()

    def standard():
        parser = Standard()
        parser.feed(page)
        parser.close()
        return "".join(parser.out)
    skip = ["nav", "footer", "aside", "button", "title", "[role=navigation]", "[role=search]", "[role=contentinfo]"]
    seconds = race({"ours": lambda: D.extract_text(raw), "HTMLParser": standard,
                    "resiliparse": lambda: extract_plain_text(page)}, 15)
    row("HTML to text", len(raw) / 1e6, "MB/s", seconds, ">= 5; 2x HTMLParser")
    a, b = (Counter(t.split()) for t in (D.extract_text(raw), extract_plain_text(page, alt_texts=False, skip_elements=skip)))
    figure("  words in common, F1", f"{2 * (a & b).total() / (a.total() + b.total()):.4f}", "resiliparse", "", ">= 0.995")


def bench_warc():
    import fastwarc
    rng, pieces = random.Random(0), reference_texts()
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nServer: x\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT"
    records = [D.warc_record("response", f"http://example.com/{i}", "".join(rng.choices(pieces, k=4)).encode()[:20_000], http)
               for i in range(1500)]
    with tempfile.NamedTemporaryFile(suffix=".warc.gz") as f:
        f.write(b"".join(records))
        f.flush()

        def ours():
            return [record.body for record in D.read_warc(f.name)]

        def peer():
            with open(f.name, "rb") as stream:
                return [record.reader.read() for record in fastwarc.ArchiveIterator(stream, parse_http=True)]
        assert ours() == peer(), "the bodies differ"
        row("WARC, bodies identical", len(records), "records/s", race({"ours": ours, "fastwarc": peer}, 5), ">= 0.7")


def bench_language():
    texts = [p for t in reference_texts() for p in t.split("\n\n") if 100 < len(p) < 1500 and " " in p][:800]
    seconds = race({"ours": lambda: [D.identify_language(t) for t in texts]}, 3)
    row("language", len(texts), "docs/s", seconds, "")
    for what, some in (("paragraphs, a tenth of them code,", texts), ("articles", reference_texts())):
        right = sum(D.identify_language(t)[0] == "en" for t in some)
        figure(f"  {what} of the reference found English", f"{right / len(some):.1%}", "", "", ">= 98%")


def bench_pii():
    text = "\n".join(bpe.docstrings(bpe.corpus_files()[::4]))
    row("PII, all four masks", len(text.encode()) / 1e6, "MB/s", race({"ours": lambda: D.mask_pii(text)}, 5), ">= 8")


def bench_minhash():
    from datasketch import MinHash
    words = " ".join(bpe.docstrings(bpe.corpus_files()[::8])).split()
    docs = [" ".join(words[i:i + 500]) for i in range(0, len(words) - 500, 500)][:200]

    def peer():
        for doc in docs:
            normal = D.normal_words(doc)
            m = MinHash(num_perm=112)
            m.update_batch([" ".join(g).encode() for g in zip(*(normal[i:] for i in range(5)))])
    row("shingles and 112 MinHashes", len(docs), "docs/s",
        race({"ours": lambda: [D.minhash(D.shingles(d), 112) for d in docs], "datasketch": peer}, 5), ">= 1.5")
    rng, z = np.random.default_rng(0), []
    for _ in range(360):
        a, b = D.similar_sets(rng.uniform(.1, .9), rng, 300)
        j, seed = D.jaccard(a, b), int(rng.integers(1 << 30))
        z.append(((D.minhash(a, 112, seed) == D.minhash(b, 112, seed)).mean() - j) / (j * (1 - j) / 112) ** .5)
    figure("  error / its standard deviation: mean, sd", f"{np.mean(z):+.2f}, {np.std(z):.2f}", "", "", "0, 1")


def bench_ngram():
    sentences = [" ".join(re.findall(r"\w+|[^\w\s]", part.lower())) for text in reference_texts()
                 for part in re.split(r"(?<=[.!?])\s+|\n\n", text)]
    sentences = [s for s in sentences if s]
    words = sum(len(s.split()) for s in sentences)
    for order in (3, 5):
        row(f"Kneser-Ney, order {order}: train", words, "words/s", race({"ours": lambda: D.KneserNey(order).fit(sentences)}, 3),
            ">= 50,000" if order == 5 else "")
    model, probe = D.KneserNey(5).fit(sentences), sentences[:400]
    contestants = {"ours": lambda: [model.logprob(s) for s in probe]}
    with contextlib.suppress(ImportError):
        import kenlm
        with tempfile.TemporaryDirectory() as folder:
            model.write_arpa(Path(folder, "a.arpa"))
            peer = kenlm.Model(str(Path(folder, "a.arpa")))
        contestants["kenlm (query)"] = lambda: [peer.score(s) for s in probe]
        worst = max(abs(model.logprob(s) - peer.score(s)) for s in probe)
        figure("  log10 p of 400 sentences, greatest difference", f"{worst:.1e}", "kenlm", "", "1e-4")
    row("  order 5: score", sum(len(s.split()) + 1 for s in probe), "words/s", race(contestants, 5), "")


def three_classes():
    """Paragraphs of the reference, of docstrings, and blocks of code: the same number of each."""
    rng, files = random.Random(0), bpe.corpus_files()
    long = lambda parts: [" ".join(p.split()) for p in parts if len(p.split()) >= 12]
    kinds = {"reference": long(p for t in reference_texts() for p in t.split("\n\n")),
             "docstring": long(p for d in bpe.docstrings(files[::3]) for p in d.split("\n\n")),
             "code": long(p for f in files[1::3] for p in f.read_text("utf-8", "replace").split("\n\n") if '"""' not in p)}
    size = min(map(len, kinds.values()))
    pairs = [(text, kind) for kind, texts in kinds.items() for text in rng.sample(texts, size)]
    rng.shuffle(pairs)
    return pairs[len(pairs) // 5:], pairs[:len(pairs) // 5]


def bench_classifier():
    learn, test = three_classes()
    plain = lambda text: " ".join(re.findall(r"\w+|[^\w\s]", text.lower()))
    model, seconds = None, {}

    def ours():
        nonlocal model
        model = D.TextClassifier(dim=16).fit(*zip(*learn))
    contestants = {"ours": ours}
    with contextlib.suppress(ImportError):
        import fasttext
        folder = tempfile.TemporaryDirectory()
        path = Path(folder.name, "train.txt")
        path.write_text("".join(f"__label__{label} {plain(text)}\n" for text, label in learn), "utf-8")
        best = {}

        def peer():
            for lr in (0.1, 0.5, 1.0):                                       # its best rate, as ours has one that suits it
                m = fasttext.train_supervised(str(path), dim=16, wordNgrams=2, bucket=1 << 17, epoch=5, lr=lr, thread=1, verbose=0)
                right = sum(m.f.predict(plain(t) + "\n", 1, 0.0, "strict")[0][1] == f"__label__{y}" for t, y in test)
                best[lr] = right / len(test)
        contestants["fastText, three rates"] = peer
    seconds = race(contestants, 1)
    row(f"classifier, {len(learn):,} texts x 5 epochs", len(learn) * 5, "texts/s", seconds, "")
    ours_right = sum(model.classify(t)[0] == y for t, y in test) / len(test)
    counts = {label: Counter(w for t, y in learn if y == label for w in plain(t).split()) for label in model.labels}
    totals, size = {k: c.total() for k, c in counts.items()}, len(set().union(*counts.values()))

    def bayes(text):
        return max(counts, key=lambda k: sum(np.log((counts[k][w] + 1) / (totals[k] + size)) for w in plain(text).split()))
    figure("  accuracy on a fifth held out", f"{ours_right:.4f}", "naive Bayes",
           f"{sum(bayes(t) == y for t, y in test) / len(test):.4f}", ">= 0.02 above")
    if len(contestants) > 1:
        figure("", f"{ours_right:.4f}", "fastText, best rate", f"{max(best.values()):.4f}", ">= -0.01")


def bench_dsir():
    learn, _ = three_classes()
    kinds = {kind: [t for t, k in learn if k == kind] for kind in ("reference", "docstring", "code")}
    target = kinds["reference"][300:]
    raw = kinds["reference"][:300] + kinds["docstring"][:900] + kinds["code"][:1200]
    seconds = race({"ours": lambda: D.dsir_weights(target, raw)}, 3)
    row("DSIR weights", len(raw) + len(target), "docs/s", seconds, "")
    chosen = D.gumbel_top_k(D.dsir_weights(target, raw), 300)
    figure("  share of the target's kind in 300 chosen", f"{np.mean(chosen < 300):.3f}", "at random", f"{300 / len(raw):.3f}", ">= 0.70")


def bench_bloom():
    bloom, keys = D.Bloom(100_000, 0.01), [b"%d" % i for i in range(100_000)]
    row("Bloom filter, n = 100,000, 1%: add", len(keys), "keys/s", race({"ours": lambda: [bloom.add(k) for k in keys]}, 3), "")
    expected, found = D.measure_bloom(100_000, 0.01)
    figure("  false positives", f"{found:.5f}", "theory", f"{expected:.5f}", "equal")


def main():
    benches = {name.removeprefix("bench_"): f for name, f in globals().items() if name.startswith("bench_")}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("which", nargs="*", help=" ".join(benches))
    args = parser.parse_args()
    if unknown := set(args.which) - set(benches):
        parser.error(f"{', '.join(unknown)}: give some of {' '.join(benches)}")
    peers = ", ".join(map(version, ("resiliparse", "fastwarc", "datasketch", "fasttext-wheel", "kenlm", "numpy")))
    print(f"Python {sys.version.split()[0]}, one process, one thread, load {os.getloadavg()[0]:.1f}; {peers}")
    for name in args.which or benches:
        try:
            benches[name]()
        except ImportError as e:
            figure(name, "-", f"not measured: {e}", "-", "")
    header = ["", "unit", "ours", "peer", "peer's", "ratio", "goal"]
    width = [max(len(r[i]) for r in [header, *ROWS]) for i in range(len(header))]
    for r in [header, *ROWS]:
        print("  ".join(v.ljust(w) if i in (0, 1, 3, 6) else v.rjust(w) for i, (v, w) in enumerate(zip(r, width))).rstrip())


if __name__ == "__main__":
    main()
