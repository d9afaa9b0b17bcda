"""bench_bpe.py - bpe.py beside its peers: seconds and peak memory from one run.

    python tests/bench_bpe.py                   # 30 MB of Python, 20 MB of text; under 8 minutes on 2 cores
    python tests/bench_bpe.py --quick           # 6 MB and 4 MB, one round; under 1 minute
    python tests/bench_bpe.py --text PATH       # your own text (EOT between documents) instead of docstrings

Every figure is the median over rounds; a round runs ours and each peer in turn, each in a process of its own,
so that no cache, allocator or load of one helps another. Seconds exclude start and imports. Before a time is
printed the results are compared: ids, token files and decoded text must be identical. Merges cannot be, since
`rustbpe` and `tokenizers` break ties otherwise than by bytes: their vocabularies must compress as well as
ours, to 0.5%. ratio = peer / ours: above 1.0 ours is faster, or smaller.
Memory is the peak resident set; for ours every worker is added in full, so pages shared by fork count twice.
"""
import argparse, ast, hashlib, json, multiprocessing, os, platform, resource, statistics, subprocess, sys
import sysconfig, time, warnings
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bpe  # noqa: E402

VOCAB = 10_000


# --- the two corpora ---

def by_hash(files):
    """An order in which every prefix is a fair mixture."""
    return sorted(files, key=lambda f: hashlib.md5("/".join(f.parts[-3:]).encode()).digest())


def source_files():
    """Standard library and site-packages."""
    places = map(sysconfig.get_path, ("stdlib", "purelib"))
    return by_hash({f for place in places for f in Path(place).rglob("*.py")})


def read(file):
    try:
        text = file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):       # broken links; test data that is invalid on purpose
        return ""
    return "" if "\x00" in text else text


def docstrings(file):
    """All docstrings of a file as one document: the prose that every installed library carries."""
    text = read(file)
    if 4 * sum(map(len, text.split('"""')[1::2])) < len(text):     # parsing is slow: no prose, no parsing
        return ""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return "\n\n".join(filter(None, (ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, nodes))))


def documentation(file):
    return docstrings(file) if file.suffix == ".py" else read(file)


def write_corpus(path, documents, limit_bytes):
    """Documents, each ended by EOT, until the limit. A copy seen before (vendored libraries) is left out."""
    seen, size = set(), 0
    with path.open("wb") as f:
        for document in documents:
            data = document.replace(bpe.EOT, "").replace("\0", "").encode("utf-8", "replace")
            if data and data not in seen:
                seen.add(data)
                whole = data[:limit_bytes - size].decode("utf-8", "ignore")  # no character is cut in two
                size += f.write(whole.encode() + bpe.EOT.encode())
            if size >= limit_bytes:
                break
    return path


def make_corpora(folder, mb, text):
    corpora = {"Python": write_corpus(folder / "python.txt", map(read, source_files()), int(mb * 1e6))}
    file, limit = folder / "text.txt", int(mb * 2e6 / 3)
    if text:
        return corpora | {"text": write_corpus(file, bpe.read_documents([text]), limit)}
    site = Path(sysconfig.get_path("purelib"))
    written = [f for end in ("md", "rst", "txt") for f in site.rglob(f"*.{end}") if f.stat().st_size > 2000]
    with multiprocessing.Pool(2) as pool, warnings.catch_warnings():
        documents = pool.imap(documentation, by_hash({*written, *source_files()}), chunksize=16)
        return corpora | {"text": write_corpus(file, documents, limit)}


def documents_of(path):
    """One by one, so that a peer's memory is its own and not the file's."""
    rest = ""
    with open(path, encoding="utf-8", newline="") as f:
        while block := f.read(1 << 20):
            *whole, rest = (rest + block).split(bpe.EOT)
            yield from whole


# --- one measurement, in its own process: each returns (seconds, what is compared) ---

def timed(function, *args, **kwargs):
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return time.perf_counter() - start, result


def train_ours(path, _, processes):
    seconds, (vocab, _) = timed(bpe.train_bpe, path, VOCAB, [bpe.EOT], num_processes=processes)
    return seconds, list(vocab.values())


def train_rustbpe(path, _, processes):
    import rustbpe
    peer = rustbpe.Tokenizer()
    seconds, _ = timed(peer.train_from_iterator, documents_of(path), VOCAB - 1, pattern=bpe.GPT2_PATTERN)
    return seconds, [bytes(token) for token, _ in peer.get_mergeable_ranks()]


def train_tokenizers(path, _, processes):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    peer, level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    peer.pre_tokenizer = level
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[bpe.EOT], show_progress=False,
                                  initial_alphabet=level.alphabet())
    seconds, _ = timed(peer.train_from_iterator, documents_of(path), trainer)
    peer.save(path + ".json")                   # read back by our reader, which knows the byte alphabet
    return seconds, list(bpe.BPETokenizer.load(path + ".json").vocab.values())


def encode_once_and_again(encode, documents):
    """Cold and warm: the second pass finds the words of the first in whatever cache there is."""
    cold, ids = timed(lambda: [i for d in documents for i in encode(d)])
    warm, _ = timed(lambda: [i for d in documents for i in encode(d)])
    return (cold, warm), hashlib.sha256(repr(ids).encode()).hexdigest()


def encode_ours(path, tokenizer, processes):
    return encode_once_and_again(bpe.BPETokenizer.load(tokenizer).encode, sample_of(path))


def encode_tokenizers(path, tokenizer, processes):
    from tokenizers import Tokenizer
    peer = Tokenizer.from_file(tokenizer)
    return encode_once_and_again(lambda d: peer.encode(d, add_special_tokens=False).ids, sample_of(path))


def encode_tiktoken(path, tokenizer, processes):
    return encode_once_and_again(as_tiktoken(tokenizer).encode_ordinary, sample_of(path))


def files_ours(path, tokenizer, processes):
    tok, out = bpe.BPETokenizer.load(tokenizer), Path(path).with_suffix(".ours.bin")
    seconds, _ = timed(bpe.encode_files, tok, [path], out, num_processes=processes)
    return seconds, hashlib.sha256(out.read_bytes()).hexdigest()


def files_tiktoken(path, tokenizer, processes):
    import numpy as np
    peer, out = as_tiktoken(tokenizer), Path(path).with_suffix(".peer.bin")
    eot = peer.encode_single_token(bpe.EOT)

    def encode_and_write():                     # in batches of 4 MB, since its ids are Python ints
        with out.open("wb") as f:
            documents, size = [], 0
            for d in [*documents_of(path), None]:
                if d is None or size > 4e6:
                    for ids in peer.encode_ordinary_batch(documents, num_threads=processes):
                        np.array([*ids, eot], "<u2").tofile(f)
                    documents, size = [], 0
                if d is not None:
                    documents.append(d)
                    size += len(d)
            f.flush()
            os.fsync(f.fileno())
    seconds, _ = timed(encode_and_write)
    return seconds, hashlib.sha256(out.read_bytes()).hexdigest()


def decode(decoder, path, tokenizer):
    tok = bpe.BPETokenizer.load(tokenizer)
    ids = [i for d in sample_of(path) for i in tok.encode(d, allowed_special=())]
    decoder(ids[:1000])                         # tables that are built on first use
    seconds, text = timed(decoder, ids)
    return seconds, hashlib.sha256(text.encode()).hexdigest()


def decode_ours(path, tokenizer, processes):
    return decode(bpe.BPETokenizer.load(tokenizer).decode, path, tokenizer)


def decode_tiktoken(path, tokenizer, processes):
    return decode(as_tiktoken(tokenizer).decode, path, tokenizer)


def decode_tokenizers(path, tokenizer, processes):
    from tokenizers import Tokenizer
    return decode(Tokenizer.from_file(tokenizer).decode, path, tokenizer)


def sample_of(path):
    """The first sixth of a corpus: `tokenizers` encodes about 1 MB a second."""
    documents, size, limit = [], 0, Path(path).stat().st_size / 6
    for d in documents_of(path):
        documents.append(d)
        size += len(d)
        if size > limit:
            break
    return documents


def as_tiktoken(tokenizer):
    import tiktoken
    tok = bpe.BPETokenizer.load(tokenizer)
    ranks = {token: i for i, token in tok.vocab.items() if i not in tok.special_tokens.values()}
    special = tok.special_tokens
    return tiktoken.Encoding("ours", pat_str=tok.pattern, mergeable_ranks=ranks, special_tokens=special)


# --- rounds and tables ---

def measure(name, path, tokenizer, processes):
    """Runs the function `name` in a fresh process; -> (seconds, MB, result)."""
    environment = os.environ | {"RAYON_NUM_THREADS": str(processes), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, __file__, "--measure", name, str(path), str(tokenizer), str(processes)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"bench_bpe.py: {name} failed:\n{run.stderr}")
    return json.loads(run.stdout)


def measured(name, path, tokenizer, processes):
    seconds, result = globals()[name](path, tokenizer, int(processes))
    if name.startswith("train"):
        result = [token.hex() for token in result]
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss             # KiB, of the largest worker
    print(json.dumps([seconds, (own_peak() + int(processes) * child) / 1000, result]))


def own_peak():
    """KiB. ru_maxrss is second choice: it survives exec, and so holds our parent's peak."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def say(what):
    if sys.stderr.isatty():
        print(f"\r{what:<70}\r", end="", file=sys.stderr, flush=True)


def rounds_of(names, path, tokenizer, args):
    """-> {name: (seconds of each round, MB, result)}; the order turns, so that none always runs first."""
    runs = {name: [] for name in names}
    for r in range(args.rounds):
        for name in names[r % len(names):] + names[:r % len(names)]:
            say(f"{Path(path).stem}: {name}, round {r + 1} of {args.rounds}")
            runs[name].append(measure(name, path, tokenizer, args.processes))
    say("")
    return {name: ([r[0] for r in rs], max(r[1] for r in rs), rs[0][2]) for name, rs in runs.items()}


def check_equal(results, what):
    if len({str(r[2]) for r in results.values()}) != 1:
        raise SystemExit(f"bench_bpe.py: {what} differ between {', '.join(results)}: no times")


def check_compression(results, path):
    """-> {name: bytes per token of its vocabulary}, on the same sample, by the same encoder."""
    import tiktoken
    sample, ratio = sample_of(path), {}
    for name, (_, _, tokens) in results.items():
        tokens = [t for t in map(bytes.fromhex, tokens) if t != bpe.EOT.encode()]
        tokens.sort(key=lambda t: len(t) > 1)   # bytes first; the sort is stable, so merges keep their rank
        coder = tiktoken.Encoding(name, pat_str=bpe.GPT2_PATTERN, special_tokens={},
                                  mergeable_ranks={t: i for i, t in enumerate(tokens)})
        tokens = sum(map(len, coder.encode_ordinary_batch(sample)))
        ratio[name] = sum(len(d.encode()) for d in sample) / tokens
    if max(ratio.values()) > 1.005 * min(ratio.values()):
        raise SystemExit(f"bench_bpe.py: the vocabularies compress differently: {ratio}")
    return ratio


def print_rows(what, results, mb, pick=lambda s: s):
    ours, *peers = results
    mine = statistics.median(map(pick, results[ours][0]))
    for peer in peers:
        theirs = statistics.median(map(pick, results[peer][0]))
        memory = results[ours][1], results[peer][1]
        print(f"{what:<24} {peer.split('_')[1]:<11}{mine:7.2f} s {theirs:7.2f} s {theirs / mine:6.2f}x"
              f" {mb / mine:8.1f} {mb / theirs:8.1f} MB/s {memory[0]:6.0f} {memory[1]:6.0f} MB"
              f" {memory[1] / memory[0]:6.2f}x")


def bench(name, path, args):
    mb = path.stat().st_size / 1e6
    sample_mb = sum(len(d.encode()) for d in sample_of(path)) / 1e6
    print(f"\n{name}: {mb:.1f} MB; encode and decode: its first {sample_mb:.1f} MB")
    print(f"{'':<24} {'peer':<11}{'ours':>9} {'peer':>9} {'ratio':>7} {'ours':>8} {'peer':>8}      "
          f"{'ours':>6} {'peer':>6}    {'ratio':>7}")
    tokenizer = path.with_suffix(".tokenizer.json")
    trained = bpe.train_bpe(path, VOCAB, [bpe.EOT], num_processes=args.processes)
    bpe.BPETokenizer(*trained, [bpe.EOT]).save(tokenizer)
    trained = rounds_of(["train_ours", "train_rustbpe", "train_tokenizers"], path, tokenizer, args)
    ratio = check_compression(trained, path)
    print_rows(f"train {VOCAB:,} tokens", trained, mb)
    coded = rounds_of(["encode_ours", "encode_tokenizers", "encode_tiktoken"], path, tokenizer, args)
    check_equal(coded, "the ids")
    print_rows("encode, cold", coded, sample_mb, lambda s: s[0])
    print_rows("encode, warm", coded, sample_mb, lambda s: s[1])
    filed = rounds_of(["files_ours", "files_tiktoken"], path, tokenizer, args)
    check_equal(filed, "the token files")
    print_rows(f"encode_files, {args.processes} proc.", filed, mb)
    decoded = rounds_of(["decode_ours", "decode_tiktoken", "decode_tokenizers"], path, tokenizer, args)
    check_equal(decoded, "the texts")
    print_rows("decode", decoded, sample_mb)
    ours = set(trained["train_ours"][2])
    for peer, (_, _, tokens) in trained.items():
        print(f"  bytes per token, vocabulary of {peer:<17} {ratio[peer]:.4f}"
              f"   tokens in common with ours {len(ours & set(tokens)):,}")


def main():
    if sys.argv[1:2] == ["--measure"]:
        return measured(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=30, help="MB of Python source; text is two thirds of it")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each, the median counts")
    parser.add_argument("--processes", type=int, default=2, help="of ours; threads of the peers")
    parser.add_argument("--quick", action="store_true", help="--mb 6 --rounds 1")
    parser.add_argument("--text", type=Path, help="text file to use in place of docstrings and documentation")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench", help="folder of the corpora")
    args = parser.parse_args()
    if args.quick:
        args.mb, args.rounds = 6, 1
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    names = ", ".join(f"{p} {version(p)}" for p in ("rustbpe", "tokenizers", "tiktoken", "numpy", "regex"))
    print(f"Python {platform.python_version()}, {names}\n{os.cpu_count()} cores, {platform.machine()}, "
          f"load average {os.getloadavg()[0]:.2f}, rounds {args.rounds}, processes/threads {args.processes}")
    for name, path in make_corpora(args.out, args.mb, args.text).items():
        bench(name, path, args)
    print(f"\n{time.time() - start:.0f} s, load average now {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
