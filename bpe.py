r"""bpe.py - lecture 1: tokenization.
What   text -> token ids and back: characters, bytes, words, and byte-pair encoding (BPE) trained, stored, applied, written to disk.
"""
import argparse, ast, codecs, functools, gc, gzip, hashlib, heapq, itertools, json, os, re, signal, sys, threading, time, unicodedata
import multiprocessing as mp
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import regex                                         # re has no \p{L} (any letter of any script)

EOT = "<|endoftext|>"                                # ends every document of a token file
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_AFTER_GPT2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT4_PATTERN = _AFTER_GPT2 % "{1,3}"                 # digits in threes; Llama-3 uses the same, Qwen2 one digit a token
PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN, "llama3": GPT4_PATTERN, "qwen2": _AFTER_GPT2 % ""}


# --- 1. the naive version ---------------------------------------------------------------------------------------------

def split_special(text, special_tokens):
    """Pieces of text, special tokens as pieces of their own; of overlapping ones the longest wins."""
    return special_regex(tuple(special_tokens)).split(text) if special_tokens else [text]


@functools.lru_cache(64)
def special_regex(special_tokens):
    return re.compile("(" + "|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) + ")")


def train_bpe_naive(text, vocab_size, special_tokens=(), pattern=GPT2_PATTERN):
    """Count every adjacent pair, merge the most frequent, start again: O(merges * text).  The oracle of train_bpe."""
    documents = [text] if isinstance(text, str) else read_documents(text)          # a str is text, a Path a file
    pieces = [p for text in documents for part in split_special(text, special_tokens)[::2]
              for p in regex.findall(pattern, part)]
    words = Counter(tuple(bytes([b]) for b in p.encode()) for p in pieces)
    merges = []
    while len(merges) < vocab_size - 256 - len(special_tokens):
        counts = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]): counts[pair] += n
        if not counts: break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        words = {merge_word(word, best): n for word, n in words.items()}
    return make_vocab(merges, special_tokens), merges


def merge_word(word, pair):
    """(b"t", b"h", b"e"), (b"t", b"h") -> (b"th", b"e"), from left to right: "aaa" by (a, a) gives (aa, a)."""
    out, i = [], 0
    while i < len(word):
        step = 2 if word[i:i + 2] == pair else 1
        out.append(b"".join(word[i:i + step]))
        i += step
    return tuple(out)


def encode_naive(piece, merges):
    """One pre-token -> its tokens as bytes: every merge of the list in the order in which training made it."""
    word = tuple(bytes([b]) for b in piece.encode())
    for pair in merges: word = merge_word(word, pair)
    return list(word)


def make_vocab(merges, special_tokens):
    """id -> bytes: the bytes, the special tokens, the merges; a larger vocabulary moves no id of a smaller one."""
    tokens = [bytes([b]) for b in range(256)] + [s.encode() for s in special_tokens] + [a + b for a, b in merges]
    return dict(enumerate(tokens))


def compression_ratio(text, ids):
    """UTF-8 bytes per token: how much shorter the model's sequence is than the byte sequence."""
    return len(text.encode()) / max(1, len(ids))


# --- 2. three tokenizers that are not enough --------------------------------------------------------------------------

class CharacterTokenizer:
    """id = code point.  A vocabulary of 1.1 million, of which a corpus meets a few thousand; 1.0 to 3 bytes per token."""
    vocab_size = 0x110000

    def encode(self, text): return [ord(c) for c in text]
    def decode(self, ids): return "".join(map(chr, ids))


class WordTokenizer:
    """id = whole pre-token.  Good compression, and every word that the corpus did not hold is UNK: information is lost."""
    UNK = "<unk>"

    def __init__(self, corpus, pattern=GPT2_PATTERN):
        self.pattern = pattern
        self.words = [self.UNK, *sorted(set(regex.findall(pattern, corpus)))]
        self.ids = {w: i for i, w in enumerate(self.words)}
        self.vocab_size = len(self.words)

    def encode(self, text): return [self.ids.get(w, 0) for w in regex.findall(self.pattern, text)]
    def decode(self, ids): return "".join(self.words[i] for i in ids)


# --- 3. reading text in pieces ----------------------------------------------------------------------------------------

BLOCK = 1 << 20                                      # characters (or bytes) read or encoded at a time
# Places where a pre-tokenizer of PATTERNS cuts whatever stands left and right of it, so that both sides may be handled
# alone: the end of a word or number (not before a combining mark, which belongs to it), before a blank, and after a line.
CUT = regex.compile(r"\p{L}(?=[^\p{L}\p{M}])|\p{N}(?=[^\p{N}\p{M}])|\S(?=[^\S\r\n])|\S\n(?=\S)", regex.REVERSE)
CUT_NFC = regex.compile(r"\S(?=[^\S\r\n])|\S\n(?=\S)", regex.REVERSE)   # a letter may decompose to letter + mark


class Cutter:
    """Cuts a stream of text into pieces that can be tokenized alone.  cut: regex of safe places, None if none is proven."""

    def __init__(self, cut, special_tokens=()):
        specials = sorted(special_tokens, key=len, reverse=True)
        self.cut, self.longest = cut, max(map(len, specials), default=1)
        self.special = regex.compile("|".join(map(regex.escape, specials))) if specials else None

    def last(self, text):
        """The last safe place in text when more may follow; 0 if there is none.  It is never inside a special token."""
        end = len(text) - self.longest + 1            # a special token that begins before `end` is complete
        while end > 0:
            m = (self.cut or self.special).search(text, 0, end) if self.cut else None
            if not m: return 0
            i = m.end()
            spans = self.special.finditer(text, max(0, i - self.longest), i + self.longest, overlapped=True) \
                if self.special else ()
            clash = [s.start() for s in spans if s.start() < i < s.end()]
            if not clash: return i
            end = min(clash) + 1
        return 0

    def pieces(self, chunks, size=0):
        """Joins chunks and yields pieces as soon as `size` characters can be cut off."""
        held, need = "", size
        for chunk in chunks:
            held += chunk
            if len(held) <= need: continue
            i = self.last(held)
            if i:
                yield held[:i]
                held = held[i:]
                need = size
            else: need = 2 * len(held)               # looking again at each chunk would be quadratic
        if held: yield held


def slices(text, size=BLOCK):
    return (text[i:i + size] for i in range(0, len(text), size))


def file_blocks(path, errors="strict", start=0, end=None):
    """Decoded blocks of a text file; .gz is unpacked.  Byte-exact: no newline translation."""
    decoder, at = codecs.getincrementaldecoder("utf-8")(errors), start
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as f:
        f.seek(start)
        while True:
            block = f.read(BLOCK if end is None else min(BLOCK, end - at))
            if b"\0" in block and errors == "strict":
                raise ValueError(f"{path}: not a text file (NUL byte at offset {at + block.index(0)}); --errors replace reads on")
            pending = len(decoder.getstate()[0])
            try: text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                raise ValueError(f"{path}: invalid UTF-8 at byte {at - pending + e.start} ({e.reason}); "
                                 f"--errors replace reads on with U+FFFD") from None
            if text: yield text
            if not block: return
            at += len(block)


def jsonl_documents(path, errors):
    """Field "text" of every line."""
    held, number = "", 0
    for block in itertools.chain(file_blocks(path, errors), ["\n"]):
        *lines, held = (held + block).split("\n")
        for line in lines:
            number += 1
            if not line.strip(): continue
            try: text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(f'{path}: line {number} is not a JSON object with a field "text" ({e})') from None
            if not isinstance(text, str): raise ValueError(f'{path}: line {number}: "text" is {type(text).__name__}')
            yield text


def read_pieces(paths, errors="strict", cutter=None, start=0, end=None):
    """(piece, ends a document) of all files, in order.  A document longer than BLOCK comes in several pieces if the cutter
    can cut it, so memory stays bounded; without a cutter every document is one piece.  EOT ends a document:
    none begins after the last one."""
    for path in paths:
        path = Path(path)
        if not path.is_file(): raise FileNotFoundError(f"{path}: no such file; give --data a text file or a folder of them")
        if path.stat().st_size == 0: raise ValueError(f"{path}: is empty")
        if ".jsonl" in path.suffixes[-2:]:
            yield from document_pieces(jsonl_documents(path, errors), cutter)
            continue
        held, need = "", BLOCK
        for block in file_blocks(path, errors, start, end):
            held += block
            if len(held) < need and EOT not in held: continue
            *documents, held = held.split(EOT)
            yield from document_pieces(documents, cutter)
            need = BLOCK
            if cutter and len(held) >= BLOCK:
                i = cutter.last(held[:len(held) - len(EOT)])     # the end may be the beginning of an EOT
                if i: yield held[:i], False
                else: need = 2 * len(held)
                held = held[i:]
        if held: yield held, True


def document_pieces(documents, cutter):
    for document in documents:
        parts = deque(cutter.pieces(slices(document), BLOCK) if cutter and document else [document])
        while parts: yield parts.popleft(), not parts


def read_documents(paths, errors="strict"):
    """Documents of text files: a file is one, unless it holds EOT between several; .jsonl has one a line; .gz of both."""
    for piece, _ in read_pieces(as_paths(paths), errors): yield piece


def as_paths(paths):
    return [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(p) for p in paths]


# --- 4. many processes ------------------------------------------------------------------------------------------------

_worker = None


def _start_worker(function, args):
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)     # Ctrl-C is the parent's to handle, who then ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stderr = open(os.devnull, "w")               # errors travel with the result; a worker that is ended has none
    gc.disable()                                     # millions of strings, no cycles: a quarter of the time
    parent = mp.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()     # no orphans
    _worker = lambda task: function(task, *args)


def _work(task): return _worker(task)


def parallel_map(function, tasks, num_processes, *args):
    """function(task, *args) of every task, in order; at most 2 tasks a process are in flight, so memory is bounded."""
    if num_processes == 1:
        yield from (function(task, *args) for task in tasks)
        return
    others, waiting = set(mp.active_children()), deque()
    context = mp.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(num_processes, context, _start_worker, (function, args))
    try:
        for task in tasks:
            waiting.append(pool.submit(_work, task))
            if len(waiting) > 2 * num_processes: yield waiting.popleft().result()
        while waiting: yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RuntimeError("a worker process was killed (out of memory?); try --processes 1") from None
    finally:
        if waiting:                                  # stopped early: do not wait for work that nobody wants
            for p in set(mp.active_children()) - others: p.terminate()
        pool.shutdown(cancel_futures=True)


def batches(pieces, size):
    """Lists of pieces of about `size` characters: one task each."""
    batch, n = [], 0
    for piece in pieces:
        batch.append(piece)
        n += len(piece[0])
        if n >= size:
            yield batch
            batch, n = [], 0
    if batch: yield batch


def default_processes():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Progress:
    """One line on stderr, at most once a second: done, rate, estimated end."""

    def __init__(self, what, total, on):
        self.what, self.total, self.on, self.start, self.next = what, total, on, time.monotonic(), 1.0

    def __call__(self, done, unit="MB", scale=1e6):
        seconds = time.monotonic() - self.start
        if not self.on or seconds < self.next: return
        self.next = seconds + 1
        rate = done / seconds
        left = f"{max(0, self.total - done) / rate:.0f} s left" if self.total else ""
        print(f"\r{self.what}: {done / scale:,.1f} {unit}, {rate / scale:,.1f} {unit}/s, {left}   ", end="", file=sys.stderr)

    def close(self):
        if self.on and self.next > 1: print(file=sys.stderr)


# --- 5. training BPE --------------------------------------------------------------------------------------------------

UNIT = r"[^\p{L}\p{N}]*+(?:\p{L}++|\p{N}++)|[^\p{L}\p{N}]++"      # everything up to the end of the next word or number


class Splitter:
    """Text -> units -> pre-tokens.  The pattern is the slow part of all that follows, and text repeats itself: a cheap
    regex cuts units at the ends of words (a CUT, so no pre-token crosses one), and the pattern sees each unit once."""

    def __init__(self, pattern):
        try: self.any = regex.compile(pattern)
        except regex.error as e: raise ValueError(f"pattern {pattern!r} is not a regular expression: {e}") from None
        if self.any.groups: raise ValueError(f"pattern {pattern!r} has {self.any.groups} capture groups; write (?:...)")
        self.known = pattern in PATTERNS.values()    # of another pattern nothing is proven: a text is one unit
        self.ascii = re.compile(ascii_twin(pattern), re.ASCII) if self.known else self.any
        self.unit, self.ascii_unit = regex.compile(UNIT), re.compile(ascii_twin(UNIT))

    def units(self, text):
        if not self.known: return [text] if text else []
        return (self.ascii_unit if text.isascii() else self.unit).findall(text)

    def pieces(self, unit): return (self.ascii if unit.isascii() else self.any).findall(unit)


def ascii_twin(pattern):
    r"""The pattern for ASCII text, which re can search, twice as fast as regex: \p{L} is [a-zA-Z], \p{N} is [0-9]."""
    ranges = {r"\p{L}": "a-zA-Z", r"\p{N}": "0-9"}
    inside = re.sub(r"\[[^]]*\]", lambda m: re.sub(r"\\p{.}", lambda p: ranges[p[0]], m[0]), pattern)
    return re.sub(r"\\p{.}", lambda p: f"[{ranges[p[0]]}]", inside)


def count_pieces(batch, splitter, special_tokens):
    """Counter of pre-tokens (bytes) of a batch of (text, last) pieces."""
    units, words = Counter(), {}
    for text, _ in batch:
        for part in split_special(text, special_tokens)[::2]: units.update(splitter.units(part))
    for unit, n in units.items():
        for piece in splitter.pieces(unit): words[piece] = words.get(piece, 0) + n
    return {piece.encode(): n for piece, n in words.items()}


def check_training(vocab_size, special_tokens):
    repeated = [s for s, n in Counter(special_tokens).items() if n > 1]
    if repeated: raise ValueError(f"special token {repeated[0]!r} is repeated; give each once")
    if "" in special_tokens: raise ValueError("a special token is empty; give it at least one character")
    if vocab_size < 256 + len(special_tokens):
        raise ValueError(f"vocab_size={vocab_size} is smaller than 256 bytes + {len(special_tokens)} special tokens: "
                         f"try --vocab_size {max(512, 256 + len(special_tokens))} or more")


def train_bpe(input_path, vocab_size, special_tokens, *, pattern=GPT2_PATTERN, num_processes=None, errors="strict",
              progress=False):
    """Trains byte-pair encoding on text files -> (vocab: dict[int, bytes], merges: list[tuple[bytes, bytes]]).

    Ids 0..255 are the bytes, then the special tokens, then the merges, so that no id moves when the vocabulary grows.
    Ties go to the greater pair of byte strings.  The result does not depend on num_processes.  A corpus that runs out of
    pairs gives fewer merges than asked for.  ValueError: vocab_size < 256 + special tokens, bad special tokens, bad text."""
    paths = as_paths(input_path)
    cutter = Cutter(CUT if pattern in PATTERNS.values() else None, special_tokens)
    size = sum(p.stat().st_size for p in paths if p.is_file())
    return train_pieces(read_pieces(paths, errors, cutter), vocab_size, special_tokens, pattern, num_processes,
                        Progress("count", size, progress))


def train_pieces(pieces, vocab_size, special_tokens, pattern=GPT2_PATTERN, num_processes=None, progress=None):
    special_tokens = list(special_tokens)
    check_training(vocab_size, special_tokens)
    progress = progress or Progress("count", 0, False)
    counts, done = Counter(), 0
    for part in parallel_map(count_pieces, batches(pieces, 16 * BLOCK), num_processes or default_processes(), Splitter(pattern),
                             special_tokens):
        counts.update(part)
        done += sum(map(len, part))
        progress(done)
    progress.close()
    merges = merge_pairs(counts, vocab_size - 256 - len(special_tokens), progress.on)
    return make_vocab(merges, special_tokens), merges


DEAD = -2                                            # a position inside a token; -1 separates words


def merge_pairs(counts, num_merges, show=False):
    """The merges of the word counts {bytes: n}."""
    symbol, weight = lay_out(counts)
    tokens = [bytes([b]) for b in range(256)]
    order = [tie_key(t) for t in tokens]
    length = np.ones(256 + num_merges, np.int64)
    heap, merges = [], []
    at = np.flatnonzero((symbol[:-1] >= 0) & (symbol[1:] >= 0))
    push_pairs(heap, order, weight, symbol[at], symbol[at + 1], at)
    progress = Progress("merge", num_merges, show)
    while heap and len(merges) < num_merges:
        bound, _, _, a, b, at = heap[0]
        at = at[(symbol[at] == a) & (symbol[at + length[a]] == b)]        # those that no later merge has taken
        count = int(weight[at].sum())
        if count < -bound:
            if count: heapq.heapreplace(heap, (-count, order[a], order[b], a, b, at))
            else: heapq.heappop(heap)
            continue
        heapq.heappop(heap)
        if a == b: at = every_second(at, length[a])
        new = len(tokens)
        merges.append((tokens[a], tokens[b]))
        tokens.append(tokens[a] + tokens[b])
        order.append(tie_key(tokens[new]))
        length[new] = length[a] + length[b]
        middle = at + length[a]
        symbol[middle - 1] = symbol[middle] = DEAD
        symbol[at] = symbol[at + length[new] - 1] = new
        left, right = symbol[at - 1], symbol[at + length[new]]
        l, r = (left >= 0) & (left != new), right >= 0                    # (new, new) is counted once, as a right pair
        push_pairs(heap, order, weight, np.concatenate([left[l], np.full(r.sum(), new)]),
                   np.concatenate([np.full(l.sum(), new), right[r]]),
                   np.concatenate([at[l] - length[left[l]], at[r]]))
        progress(len(merges), "merges", 1)
    progress.close()
    return merges


def lay_out(counts):
    """All words in one array: -1 word -1 word -1 ...; weight[i] = how often the word at position i occurs."""
    size = np.fromiter(map(len, counts), np.int64, len(counts))
    at = np.arange(size.sum()) + np.repeat(np.arange(1, len(counts) + 1), size)
    symbol = np.full(size.sum() + len(counts) + 1, -1, np.int32)
    weight = np.zeros(len(symbol), np.int64)
    symbol[at] = np.frombuffer(b"".join(counts), np.uint8)
    weight[at] = np.repeat(np.fromiter(counts.values(), np.int64, len(counts)), size)
    return symbol, weight


def tie_key(token):
    """A string that is smaller the greater the bytes: complements, and an end mark above all (b"ab" > b"a")."""
    return "".join(chr(255 - b) for b in token) + "\u0100"


def push_pairs(heap, order, weight, first, second, at):
    """One heap entry for each distinct pair (first[i], second[i]) with all its positions at[i], ascending."""
    if not len(at): return
    key = first.astype(np.int64) << 32 | second
    by = np.argsort(key, kind="stable")
    key, at = key[by], at[by]
    start = np.concatenate([[0], np.flatnonzero(key[1:] != key[:-1]) + 1])
    total = np.add.reduceat(weight[at], start)
    end = [*start[1:].tolist(), len(at)]
    for k, n, i, j in zip(key[start].tolist(), total.tolist(), start.tolist(), end):
        a, b = k >> 32, k & 0xFFFFFFFF
        heapq.heappush(heap, (-n, order[a], order[b], a, b, at[i:j]))


def every_second(at, step):
    """Of positions that overlap (a, a, a) every second one merges, from the left of each run."""
    new_run = np.concatenate([[True], at[1:] - at[:-1] != step])
    index = np.arange(len(at))
    return at[(index - np.maximum.accumulate(np.where(new_run, index, 0))) % 2 == 0]


# --- 6. the BPE tokenizer ---------------------------------------------------------------------------------------------

NONE = np.int64(1 << 62)                             # rank of a pair that no merge joins


class BPETokenizer:
    """vocab: dict[int, bytes]; merges: list[tuple[bytes, bytes]] in order of rank; special_tokens: strings that are one id.

    Special tokens missing from vocab are appended.  Of overlapping special tokens the longest wins."""
    CACHE = 1 << 25                                  # characters of units whose ids are remembered

    def __init__(self, vocab, merges, special_tokens=None, pattern=GPT2_PATTERN, *, normalizer=None, ignore_merges=False,
                 ordinary_added=()):
        self.vocab, self.merges, self.pattern = dict(vocab), [tuple(m) for m in merges], pattern
        self.normalizer, self.ignore_merges, self.ordinary_added = normalizer, ignore_merges, frozenset(ordinary_added)
        names = list(special_tokens or ())
        if "" in names or len(set(names)) < len(names):
            raise ValueError(f"special tokens {names}: one is empty or repeated")
        known = {token: i for i, token in sorted(self.vocab.items())}     # of equal tokens the last is the special one
        self.special_tokens = dict(special_tokens) if isinstance(special_tokens, dict) else {}
        for s in names:
            if s not in self.special_tokens:
                self.special_tokens[s] = known.setdefault(s.encode(), max(self.vocab, default=-1) + 1)
            self.vocab.setdefault(self.special_tokens[s], s.encode())
        self.vocab_size = max(self.vocab) + 1
        self.eot_id = self.special_tokens.get(EOT)
        self._prepare()

    def _prepare(self):
        special = set(self.special_tokens.values())
        plain = {bytes([b]) for b in range(256)} | {a + b for a, b in self.merges}
        order = sorted(self.vocab, key=lambda i: (i not in special, -i))  # of equal tokens the ordinary, then lowest id wins
        self.ids = {self.vocab[i]: i for i in order if i not in special or self.vocab[i] in plain}
        for a, b in self.merges:
            if not {a, b, a + b} <= self.ids.keys(): raise ValueError(f"vocab lacks a part of the merge {a!r} {b!r}")
        self._byte_id = np.array([self.ids.get(bytes([b]), -1) for b in range(256)], np.int64)
        used, made = {}, {}
        for rank, (a, b) in enumerate(self.merges):
            used.setdefault(a, rank), used.setdefault(b, rank)
            made[a + b] = rank
        for token, rank in used.items():
            if len(token) > 1 and not made.get(token, rank) < rank:
                raise ValueError(f"merge {rank} uses {token!r}, which is made only by merge {made.get(token)}")
        pairs = {}
        for rank, (a, b) in enumerate(self.merges): pairs.setdefault(self.ids[a] * self.vocab_size + self.ids[b], rank)
        key, rank = np.array([*pairs, NONE], np.int64), np.array([*pairs.values(), NONE], np.int64)
        order = np.argsort(key)
        self._key, self._rank = key[order], rank[order]
        self._made = np.array([self.ids[a + b] for a, b in self.merges] or [0], np.int64)
        self._splitter = Splitter(self.pattern)
        self._cut = None if not self._splitter.known else CUT if self.normalizer is None else CUT_NFC
        self._cache, self._cached = {}, 0
        table = [self.vocab.get(i, b"") for i in range(self.vocab_size)]
        self._bytes, self._size = np.frombuffer(b"".join(table), np.uint8), np.array([len(t) for t in table])
        self._start = np.cumsum(self._size) - self._size

    # -- text -> ids
    def encode(self, text, allowed_special="all"):
        """ids of text.  allowed_special: "all", or the special tokens that count; () makes everything ordinary text."""
        return self.encode_array(text, allowed_special).tolist()

    def encode_array(self, text, allowed_special="all"):
        """encode as an array of uint32."""
        specials = self._allowed(allowed_special)
        parts = split_special(text, specials)
        parts[::2] = self.encode_texts(parts[::2])
        parts[1::2] = [np.uint32(specials[s]).tobytes() for s in parts[1::2]]
        return np.frombuffer(b"".join(parts), np.uint32)

    def encode_texts(self, texts):
        """ids of each text, as ordinary text, packed as uint32 (bytes).  Many texts at once cost less than one by one."""
        done, ids = [], []
        for batch in batches(document_pieces(texts, Cutter(self._cut)), BLOCK):
            for (_, last), packed in zip(batch, self._encode_batch([text for text, _ in batch])):
                ids.append(packed)
                if last:
                    done.append(b"".join(ids))
                    ids = []
        return done

    def _allowed(self, allowed_special):
        if isinstance(allowed_special, str) and allowed_special == "all": return self.special_tokens
        unknown = set(allowed_special) - set(self.special_tokens)
        if unknown: raise ValueError(f"allowed_special {sorted(unknown)} are no special tokens: {list(self.special_tokens)}")
        return {s: self.special_tokens[s] for s in allowed_special}

    def _encode_batch(self, texts):
        """A unit's ids are worked out once and then copied from the cache."""
        for text in texts:
            try: text.encode()
            except UnicodeEncodeError as e:
                raise ValueError(f"text holds a lone surrogate U+{ord(text[e.start]):04X} at character {e.start}: not Unicode; "
                                 'text.encode("utf-8", "replace").decode() makes it "?"') from None
        if self.normalizer: texts = [unicodedata.normalize(self.normalizer, text) for text in texts]
        units = [self._splitter.units(text) for text in texts]
        cache = self._learn(set(itertools.chain.from_iterable(units)))
        return [b"".join(map(cache.__getitem__, of_text)) for of_text in units]

    def _learn(self, units):
        """The cache {unit: packed ids}, with these units in it."""
        cache, new = self._cache, units.difference(self._cache)
        self._cached += sum(map(len, new))
        if self._cached > self.CACHE:                # start again; another thread may still read the old dictionary
            self._cache = cache = {}
            new, self._cached = units, sum(map(len, units))
        if not new: return cache
        split = {unit: self._splitter.pieces(unit) for unit in new}
        if not self._splitter.known and any("".join(pieces) != unit for unit, pieces in split.items()):
            raise ValueError(f"pattern {self.pattern!r} leaves out part of the text")
        words = list(set(itertools.chain.from_iterable(split.values())))
        ids = dict(zip(words, self._merge([w.encode() for w in words])))
        if self.ignore_merges:
            ids |= {w: np.uint32(self.ids[w.encode()]).tobytes() for w in words if w.encode() in self.ids}
        for unit, pieces in split.items(): cache[unit] = b"".join([ids[piece] for piece in pieces])
        return cache

    def _merge(self, words):
        """words (bytes) -> packed ids: in every round each word merges its pair of lowest rank, all words at once."""
        out = [b""] * len(words)
        size = np.fromiter(map(len, words), np.int64, len(words))
        ids = self._byte_id[np.frombuffer(b"".join(words), np.uint8)]
        name = np.arange(len(words))
        if (ids < 0).any(): raise ValueError("the text has a byte that the vocabulary lacks")
        while len(name):
            start = np.cumsum(size) - size
            pair = ids[:-1] * self.vocab_size + ids[1:]
            found = np.searchsorted(self._key, pair)
            rank = np.append(np.where(self._key[found] == pair, self._rank[found], NONE), NONE)
            rank[start[1:] - 1] = NONE               # a pair that crosses two words
            best = np.minimum.reduceat(rank, start)
            over = best == NONE
            if over.any():
                for w, i, n in zip(name[over].tolist(), start[over].tolist(), size[over].tolist()):
                    out[w] = ids[i:i + n].astype(np.uint32).tobytes()
                go = np.repeat(~over, size)
                ids, rank, name, size, best = ids[go], rank[go], name[~over], size[~over], best[~over]
                if not len(name): break
            word = np.repeat(np.arange(len(name)), size)
            at = every_second(np.flatnonzero(rank == best[word]), 1)
            ids[at] = self._made[rank[at]]
            size -= np.bincount(word[at], minlength=len(name))
            ids = np.delete(ids, at + 1)
        return out

    def encode_iterable(self, chunks, allowed_special="all"):
        """ids of "".join(chunks), lazily, for every way to cut the text.  Holds back at most the text since the last place
        where the pre-tokenizer cuts for certain: memory is bounded by the longest run without such a place."""
        cutter = Cutter(self._cut, self._allowed(allowed_special))
        for piece in cutter.pieces(part for chunk in chunks for part in slices(chunk)): yield from self.encode(piece, allowed_special)

    # -- ids -> text
    def decode_bytes(self, ids):
        """The bytes of ids (a list or, faster, an array): every token's bytes gathered from one table of all."""
        if not isinstance(ids, np.ndarray): ids = np.fromiter(ids, np.int64)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            bad = next(i for i in ids.tolist() if not 0 <= i < self.vocab_size)
            raise ValueError(f"id {bad} is outside the vocabulary of {self.vocab_size:} ids, 0 to {self.vocab_size - 1}")
        out = []
        for block in (ids[i:i + (1 << 14)] for i in range(0, len(ids), 1 << 14)):          # what fits the processor's cache
            size = self._size[block]
            end = np.cumsum(size)
            at = np.repeat(self._start[block] - (end - size), size) + np.arange(size.sum())
            out.append(self._bytes[at].tobytes())
        return b"".join(out)

    def decode(self, ids, errors="replace"):
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors)

    # -- files
    def hash(self):
        """16 hex digits over all that decides which ids a text gets."""
        state = [sorted((i, t.hex()) for i, t in self.vocab.items()), [(a.hex(), b.hex()) for a, b in self.merges],
                 sorted(self.special_tokens.items()), self.pattern, self.normalizer, self.ignore_merges]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]

    def save(self, path):
        """Writes the Hugging Face tokenizer.json."""
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        names = {i: s for s, i in self.special_tokens.items()}
        vocab = {names.get(i) or printable(t): i for i, t in sorted(self.vocab.items())}
        if len(vocab) < len(self.vocab): raise ValueError("a special token has the name of another token")
        added = [{"id": i, "content": s, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                  "special": s not in self.ordinary_added} for s, i in sorted(self.special_tokens.items(), key=lambda x: x[1])]
        data = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
                "normalizer": {"type": self.normalizer} if self.normalizer else None,
                "pre_tokenizer": level if self.pattern == GPT2_PATTERN else
                {"type": "Sequence", "pretokenizers": [split, level | {"use_regex": False}]},
                "post_processor": None, "decoder": level,
                "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                          "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                          "ignore_merges": self.ignore_merges, "vocab": vocab,
                          "merges": [[printable(a), printable(b)] for a, b in self.merges]}}
        write_atomic(path, json.dumps(data, ensure_ascii=False, indent=1).encode())

    @classmethod
    def load(cls, path):
        """Reads a Hugging Face tokenizer.json of the GPT-2, Llama-3 or Qwen2 kind; ValueError names what it cannot do.
        ids equal those of tokenizers with add_special_tokens=False."""
        path = Path(path)
        if not path.is_file(): raise FileNotFoundError(f"{path}: no such file; make one: python bpe.py train --data FILE --out DIR")
        try: data = json.loads(path.read_bytes())
        except ValueError as e: raise ValueError(f"{path}: not a tokenizer.json (truncated or not JSON: {e})") from None
        try: return cls(**parse_tokenizer(data))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
            raise ValueError(f"{path}: {e if isinstance(e, ValueError) else f'unexpected structure ({e!r})'}") from None

    @classmethod
    def from_gpt2(cls, vocab_json_path, merges_txt_path, special_tokens=(EOT,)):
        """From the vocab.json and merges.txt that GPT-2 was published with."""
        raw = json.loads(Path(vocab_json_path).read_text("utf-8"))
        lines = Path(merges_txt_path).read_text("utf-8").split("\n")
        merges = [tuple(map(unprintable, m.split(" "))) for m in lines if m and not m.startswith("#version")]
        vocab = {i: s.encode() if s in special_tokens else unprintable(s) for s, i in raw.items()}
        return cls(vocab, merges, list(special_tokens))


class ByteTokenizer(BPETokenizer):
    """BPE without a single merge: id = byte, 256 = EOT.  Exactly 1 byte per token."""

    def __init__(self): super().__init__(make_vocab([], [EOT]), [], [EOT])


def load_tokenizer(path): return BPETokenizer.load(path)


def _byte_table():
    """GPT-2's way to write bytes as printable characters: those that print stand for themselves, the rest from U+0100."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {b: chr(b) for b in keep} | {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in keep)}


BYTE_CHAR = _byte_table()
CHAR_BYTE = {c: b for b, c in BYTE_CHAR.items()}


def printable(token): return "".join([BYTE_CHAR[b] for b in token])


def unprintable(name):
    try: return bytes([CHAR_BYTE[c] for c in name])
    except KeyError as e: raise ValueError(f"token {name!r} is not written in GPT-2's byte alphabet ({e} is not in it)") from None


def parse_tokenizer(data):
    """tokenizer.json as a dict -> arguments of BPETokenizer; whatever would change ids and is not supported is an error."""
    model = data["model"]
    for field, allowed in [("type", ("BPE", None)), ("dropout", (None, 0, 0.0)), ("continuing_subword_prefix", (None, "")),
                           ("end_of_word_suffix", (None, "")), ("byte_fallback", (None, False))]:
        if model.get(field) not in allowed: raise ValueError(f"model.{field} = {model.get(field)!r} is not supported")
    for field in ("truncation", "padding"):
        if data.get(field): raise ValueError(f"{field} = {data[field]!r} is not supported; remove it from the file")
    normalizer = (data.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"): raise ValueError(f"normalizer {data['normalizer']} is not supported (NFC or none)")
    added = data.get("added_tokens") or []
    for t in added:
        flags = [f for f in ("single_word", "lstrip", "rstrip") if t.get(f)] + ["normalized"] * bool(normalizer and t.get("normalized"))
        if flags: raise ValueError(f"added token {t['content']!r}: {flags[0]} is not supported")
    special = {t["content"]: t["id"] for t in added}
    vocab = {i: s.encode() if special.get(s) == i else unprintable(s) for s, i in model["vocab"].items()}
    merges = [tuple(map(unprintable, m.split(" ") if isinstance(m, str) else m)) for m in model["merges"]]
    return dict(vocab=vocab, merges=merges, special_tokens=special, pattern=parse_pattern(data.get("pre_tokenizer")),
                normalizer=normalizer, ignore_merges=bool(model.get("ignore_merges")),
                ordinary_added=[t["content"] for t in added if not t.get("special")])


def parse_pattern(pre):
    """ByteLevel(use_regex) or [Split(regex, Isolated), ByteLevel]."""
    steps = (pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]) if pre else []
    bad = [s["type"] for s in steps] not in (["ByteLevel"], ["Split", "ByteLevel"]) or steps[-1].get("add_prefix_space") \
        or steps[-1].get("use_regex", True) != (len(steps) == 1)
    if not bad and len(steps) == 2:
        bad = steps[0]["behavior"] != "Isolated" or steps[0].get("invert") or "Regex" not in steps[0]["pattern"]
    if bad: raise ValueError(f"pre_tokenizer {pre} is not supported: ByteLevel, or Split (Regex, Isolated) and ByteLevel")
    if len(steps) == 1: return GPT2_PATTERN
    return steps[0]["pattern"]["Regex"]


# --- 7. token files ---------------------------------------------------------------------------------------------------

def write_atomic(path, data):
    """Writes bytes, or what a function writes to the open file, under a temporary name; synced, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            if callable(data): data(f)
            else: f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e: raise OSError(e.errno, f"{e.strerror or e}: nothing was written to", str(path)) from None
    finally:
        if part.parent.is_dir(): part.unlink(missing_ok=True)


def encode_batch(batch, tokenizer, dtype):
    """(packed ids with EOT after each document, bytes of text, documents)."""
    end = np.uint32(tokenizer.eot_id).tobytes()
    packed = tokenizer.encode_texts([text for text, _ in batch])
    ids = b"".join([p + end if last else p for p, (_, last) in zip(packed, batch)])
    return (np.frombuffer(ids, np.uint32).astype(dtype).tobytes(), sum(len(text.encode()) for text, _ in batch),
            sum(last for _, last in batch))


def encode_files(tokenizer, paths_or_documents, out_path, num_processes=None, progress=False, errors="strict", **extra):
    """Writes the ids of all documents, EOT after each, to out_path (.bin) and its .json; returns what the .json holds.

    Text is ordinary text here: only EOT between documents is special.  A path, or a list of paths (Path, or str that
    names a file) or of documents (str).  "bytes" counts the documents' UTF-8 without the EOTs."""
    given = [paths_or_documents] if isinstance(paths_or_documents, (str, os.PathLike)) else paths_or_documents
    cutter, total = Cutter(tokenizer._cut), 0
    if isinstance(paths_or_documents, (str, os.PathLike)): given = [Path(paths_or_documents)]
    if isinstance(given, list): total = sum(Path(p).stat().st_size for p in given if is_path(p))
    pieces = itertools.chain.from_iterable(
        read_pieces([p], errors, cutter) if is_path(p) else document_pieces([p], cutter) for p in given)
    return encode_pieces(tokenizer, pieces, out_path, num_processes, Progress("encode", total, progress), **extra)


def is_path(item):
    return isinstance(item, os.PathLike) or (len(item) < 1000 and "\0" not in item and os.path.isfile(item))


def encode_pieces(tokenizer, pieces, out_path, num_processes, progress, **extra):
    if tokenizer.eot_id is None: raise ValueError(f"the tokenizer has no {EOT!r}, which ends every document of a token file")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65536 else "<u4")
    info = {"dtype": dtype.name, "tokens": 0, "bytes": 0, "documents": 0, "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer.hash(), **extra}

    def write(f):
        for data, size, documents in parallel_map(encode_batch, batches(pieces, 4 * BLOCK), num_processes or default_processes(),
                                                  tokenizer, dtype):
            f.write(data)
            info["tokens"] += len(data) // dtype.itemsize
            info["bytes"] += size
            info["documents"] += documents
            progress(info["bytes"])
        progress.close()
        if not info["documents"]: raise ValueError(f"no text to write to {out_path}")

    path = Path(out_path)
    write_atomic(path, write)
    write_atomic(path.with_suffix(".json"), (json.dumps(info) + "\n").encode())
    return info


def token_info(path):
    """What the .json beside a token file says."""
    path = Path(path).with_suffix(".json")
    make = f"python bpe.py encode --tokenizer tokenizer.json --data FILE --out {path.with_suffix('.bin')}"
    if not path.is_file(): raise FileNotFoundError(f"{path}: no such file; make it: {make}")
    try:
        info = json.loads(path.read_bytes())
        if info["dtype"] not in ("uint16", "uint32"): raise ValueError(f"dtype {info['dtype']!r}")
        int(info["tokens"]), int(info["vocab_size"]), info["tokenizer"]
        return info
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: damaged ({e}); make it again: {make}") from None


def load_tokens(path, tokenizer=None):
    """The ids of a token file as an array on disk (np.memmap), checked against its .json and the tokenizer."""
    path, info = Path(path), token_info(path)
    make = f"make it again: python bpe.py encode --tokenizer tokenizer.json --data FILE --out {path}"
    if not path.is_file(): raise FileNotFoundError(f"{path}: no such file; {make}")
    size, want = path.stat().st_size, info["tokens"] * np.dtype(info["dtype"]).itemsize
    if size != want:
        raise ValueError(f"{path}: has {size} bytes, but {info['tokens']} tokens of {info['dtype']} need {want}; {make}")
    if tokenizer is not None:
        for what, here, there in [("vocabulary", tokenizer.vocab_size, info["vocab_size"]),
                                  ("hash", tokenizer.hash(), info["tokenizer"])]:
            if here != there:
                raise ValueError(f"{path}: made with a tokenizer of {what} {there}, not this one of {what} {here}; {make}")
    return np.memmap(path, np.dtype(info["dtype"]).newbyteorder("<"), "r")


# --- 8. corpora -------------------------------------------------------------------------------------------------------

def corpus_root(): return Path(os.__file__).resolve().parent


def corpus_files():
    """The embedded corpus: the standard library of the running interpreter, *.py, without tests and site-packages."""
    out, drop = [], {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for folder, folders, files in os.walk(corpus_root()):
        folders[:] = [d for d in folders if d not in drop and not d.endswith("_test")]
        out += [Path(folder, f) for f in files if f.endswith(".py")]
    return [p for p in sorted(out) if readable(p)]


def readable(path):
    try:
        data = path.read_bytes()
        data.decode()
        return bool(data) and b"\0" not in data
    except (OSError, UnicodeDecodeError): return False


def held_out(name):
    """True for a fixed 5% of all names (or texts)."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < 5


def split_files(files, root=None):
    """(train, val): 5% of the files by a hash of the path below the library, so the same on every machine."""
    files = [Path(f) for f in files]
    root = Path(root) if root else corpus_root()
    name = {f: f.relative_to(root).as_posix() if f.is_relative_to(root) else f.name for f in files}
    val = [f for f in files if held_out(name[f])]
    if not val and len(files) > 1: val = [min(files, key=lambda f: hashlib.sha256(name[f].encode()).digest())]
    return [f for f in files if f not in set(val)], val


TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".txt.gz", ".jsonl.gz", ".html", ".c", ".h", ".json", ".csv")


def text_files(data):
    """Files of a list of files and folders, in a fixed order."""
    out = []
    for path in as_paths(data):
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if p.name.endswith(TEXT_SUFFIXES) and p.is_file() and p.stat().st_size]
            if not found: raise ValueError(f"{path}: no text files in this folder ({' '.join(TEXT_SUFFIXES)})")
            out += found
        elif path.is_file(): out.append(path)
        else: raise FileNotFoundError(f"{path}: no such file or folder; give --data a text file or a folder of them")
    return out


def split_sources(data, val, errors):
    """(files, train(cutter), val(cutter)): two functions that give the pieces of each part."""
    if data is None: files, (train, held) = corpus_files(), split_files(corpus_files())
    else:
        files = text_files(data)
        root = Path(data) if isinstance(data, (str, os.PathLike)) and Path(data).is_dir() else None
        train, held = (files, text_files(val)) if val else split_files(files, root)
    if held: return files + (held if val else []), *(lambda c, f=f: read_pieces(f, errors, c) for f in (train, held))
    path = files[0]
    first = list(itertools.islice(read_documents(path, errors), 2))
    if len(first) == 2:
        chosen = any(held_out(d) for d in read_documents(path, errors))
        least = None if chosen else min(read_documents(path, errors), key=lambda d: hashlib.sha256(d.encode()).digest())
        pick = held_out if chosen else lambda d: d == least
        part = lambda keep: lambda c: document_pieces((d for d in read_documents(path, errors) if pick(d) == keep), c)
        return files, part(False), part(True)
    if path.suffix == ".gz" or ".jsonl" in path.suffixes:
        raise ValueError(f"{path}: one document; give the validation text with --val FILE")
    at = line_end(path)
    return files, lambda c: read_pieces([path], errors, c, 0, at), lambda c: read_pieces([path], errors, c, at)


def line_end(path):
    """Byte offset where the last 5% of a file begin: after the next line end, or else the next blank or character."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        f.seek(size * 95 // 100)
        tail = f.read()
    for edge in (rb"\n(?=.)", rb"(?= .)", rb"(?=[\x00-\x7f\xc0-\xff])"):
        m = re.search(edge, tail, re.S)
        if m and size - len(tail) + m.end(): return size - len(tail) + m.end()
    raise ValueError(f"{path}: {size} bytes are too few to hold some out; give the validation text with --val FILE")


def prepare(out, data=None, val=None, vocab_size=4096, num_processes=None, errors="strict", tokenizer=None, log=print):
    """Text -> out/tokenizer.json, train.bin, val.bin; what is there from the same inputs is used again."""
    out, start = Path(out), time.monotonic()
    files, train, held = split_sources(data, val, errors)
    state = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    inputs = hashlib.sha256(json.dumps([state, vocab_size if given is None else given.hash(), GPT2_PATTERN, errors, val is None]).encode()).hexdigest()[:16]
    result = {"train": out / "train.bin", "val": out / "val.bin", "reused": True}
    try:
        tok = load_tokenizer(out / "tokenizer.json")
        if all(load_tokens(result[k], tok) is not None and token_info(result[k]).get("inputs") == inputs for k in ("train", "val")):
            log(f"reusing {out}/tokenizer.json, train.bin, val.bin (made from the same inputs)")
            return {"tokenizer": tok, **result}
    except (OSError, ValueError): pass
    progress = sys.stderr.isatty()
    size = sum(s for _, s, _ in state)
    if given is None:
        cutter = Cutter(CUT, [EOT])
        tok = BPETokenizer(*train_pieces(train(cutter), vocab_size, [EOT], GPT2_PATTERN, num_processes,
                                         Progress("count", 0, progress)), [EOT])
        log(f"trained a tokenizer of {tok.vocab_size} tokens on {size / 1e6:.1f} MB in {time.monotonic() - start:.1f} s")
    else: tok = given
    tok.save(out / "tokenizer.json")
    for name, source in [("train", train), ("val", held)]:
        info = encode_pieces(tok, source(Cutter(tok._cut)), result[name], num_processes, Progress("encode", 0, progress), inputs=inputs)
        log(f"{result[name]}: {info['tokens']:,} tokens of {info['documents']:,} documents, {info['bytes'] / info['tokens']:.2f} bytes/token")
    return {"tokenizer": tok, **result, "reused": False}


def held_out_bytes(out):
    """The validation documents of prepare(out), joined by nothing: what compressors are measured on."""
    tok = load_tokenizer(Path(out) / "tokenizer.json")
    ids = np.asarray(load_tokens(Path(out) / "val.bin", tok))
    return tok.decode_bytes(ids[ids != tok.eot_id])


CORPORA = {                                          # name: (training file, validation file) of the usual public corpora
    "tinyshakespeare": ["https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"],
    "tinystories": [f"https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-{part}.txt"
                    for part in ("train", "valid")],
    "owt": [f"https://huggingface.co/datasets/stanford-cs336/owt-sample/resolve/main/owt_{part}.txt.gz"
            for part in ("train", "valid")],
    "fineweb-edu": ["https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu/resolve/main/sample/10BT/000_00000.parquet"],
}


def fetch(name, out="out/corpus", base=None, progress=False):
    """Downloads a public corpus into a folder -> its files, [training] or [training, validation], ready for prepare.

    base replaces https://host, so that a mirror (or a test) can serve the same paths.  An interrupted download goes on
    where it stopped; a finished file is checked (length, and sha256 where the server names it) before it gets its name."""
    if name not in CORPORA: raise ValueError(f"corpus {name!r} is unknown; there are: {', '.join(CORPORA)}")
    files = []
    for url in CORPORA[name]:
        if base: url = base.rstrip("/") + "/" + url.split("/", 3)[3]
        path = Path(out, name + "-" + url.rsplit("/", 1)[1])
        done = path.with_suffix(".jsonl.gz") if path.suffix == ".parquet" else path
        if not done.exists():
            if not path.exists(): download(url, path, progress)
            if done != path: parquet_to_jsonl(path, done)
        files.append(done)
    return files


def download(url, path, progress=False):
    """url -> path by way of path.part, which a second call continues."""
    import urllib.error, urllib.request
    tags = []

    class Redirect(urllib.request.HTTPRedirectHandler):                   # the hub names the sha256 before it redirects
        def redirect_request(self, request, body, code, message, headers, location):
            tags.append(headers.get("X-Linked-ETag") or "")
            return super().redirect_request(request, body, code, message, headers, location)

    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.build_opener(Redirect).open(request, timeout=30) as r, open(part, "ab" if r.status == 206 else "wb") as f:
            have = f.tell()
            total = have + int(r.headers.get("Content-Length") or 0)
            tags.append(r.headers.get("ETag") or "")
            bar = Progress(path.name, total, progress)
            while block := r.read(BLOCK):
                f.write(block)
                have += len(block)
                bar(have)
            bar.close()
    except urllib.error.HTTPError as e:
        if e.code == 416: part.unlink()              # nothing is left to send: the .part is no beginning of this file
        raise OSError(f"{url}: the server says {e.code} {e.reason}; download it another way to {path}, or run this again") from None
    except (urllib.error.URLError, OSError) as e:
        raise OSError(f"{url}: cannot be fetched ({e}); with a network run this again (it goes on at {have:,} bytes), or put the "
                      f"file at {path}, or train on your own text: --data FILE") from None
    if total and have != total: raise OSError(f"{url}: {have:,} of {total:,} bytes came; run this again to go on")
    want = next((t.strip('"') for t in tags if re.fullmatch('"?[0-9a-f]{64}"?', t)), None)
    with open(part, "rb") as f: got = hashlib.file_digest(f, "sha256").hexdigest()
    if want and got != want:
        part.unlink()
        raise OSError(f"{url}: sha256 is {got}, the server says {want}; removed, run this again")
    os.replace(part, path)


def parquet_to_jsonl(path, out):
    """The column "text" of a parquet file as .jsonl.gz."""
    try: import pyarrow.parquet as parquet
    except ImportError: raise RuntimeError(f"{path} is parquet: pip install pyarrow, then run this again") from None

    def write(f):
        with gzip.open(f, "wt", encoding="utf-8") as z:
            for batch in parquet.ParquetFile(path).iter_batches(1000, columns=["text"]):
                for text in batch.column(0).to_pylist(): z.write(json.dumps({"text": text}) + "\n")
    write_atomic(out, write)


# --- 9. demo: what the lecture claims, measured -----------------------------------------------------------------------

SAMPLES = {
    "English": "A tokenizer decides what the model sees: words it has met become one id, new ones fall apart into pieces.",
    "Python": "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total / len(values)\n",
    "German": "Der Zerteiler bestimmt, was das Modell sieht: Bekanntes wird eine Zahl, Unbekanntes zerfällt in Stücke.",
    "Russian": "Токенизатор решает, что увидит модель: знакомое слово станет одним числом, новое распадётся на части.",
    "Hindi": "मॉडल वही देखता है जो टोकनाइज़र उसे दिखाता है।",
    "Chinese": "分词器决定模型看到什么：见过的词成为一个编号，没见过的词会被拆开。",
    "emoji": "Hello, 🌍! 你好! 👩‍🚀🚀✨",
}


def docstrings(files):
    """One text a file: all its docstrings, the prose among the code."""
    for f in files:
        tree = ast.parse(f.read_bytes())
        docs = [ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        if any(docs): yield "\n\n".join(filter(None, docs))


def prefix_tokenizer(tok, size):
    """The tokenizer of a smaller vocabulary: the first merges of a larger one."""
    merges = tok.merges[:size - 257]
    return BPETokenizer(make_vocab(merges, [EOT]), merges, [EOT])


def demo_trainers(text):
    """Naive against incremental: the same merges."""
    start = time.perf_counter()
    naive = train_bpe_naive(text, 500, [EOT])
    middle = time.perf_counter()
    fast = train_pieces([(text, True)], 500, [EOT], num_processes=1)
    slow_s, fast_s = middle - start, time.perf_counter() - middle
    print(f"1  training 243 merges on {len(text) / 1e3:.0f} kB\n"
          f"   naive {slow_s:.2f} s | incremental {fast_s:.2f} s | {slow_s / fast_s:.0f}x | identical merges: {naive == fast}")


def demo_ratios(tok, words):
    print(f"2  bytes per token: BPE is trained on Python, {tok.vocab_size:,} tokens; word: {words.vocab_size:,} words")
    print(f"   {'text':10}{'character':>10}{'byte':>7}{'word':>7}{'BPE':>7}   words unknown | 'character' predicted 1, 2 or 3 by UTF-8")
    for name, text in SAMPLES.items():
        ids = [t.encode(text) for t in (CharacterTokenizer(), ByteTokenizer(), words, tok)]
        assert tok.decode(ids[3]) == text
        print(f"   {name:10}" + "".join(f"{compression_ratio(text, i):>{w}.2f}" for i, w in zip(ids, (10, 7, 7, 7)))
              + f"   {ids[2].count(0) / len(ids[2]):.0%}")


def demo_domains(code, prose, val_code, val_prose):
    print(f"3  two vocabularies of {code.vocab_size:,}: longest tokens, and bytes per token on held-out text")
    print(f"   {'trained on':12}{'on code':>9}{'on prose':>9}   longest tokens")
    for name, tok in (("code", code), ("docstrings", prose)):
        longest = sorted((t for i, t in tok.vocab.items() if i > 256), key=len, reverse=True)
        longest = [t.decode(errors="replace") for t in longest if t.strip(b" -=#*_\n")][:4]
        print(f"   {name:12}{compression_ratio(val_code, tok.encode(val_code)):>9.2f}"
              f"{compression_ratio(val_prose, tok.encode(val_prose)):>9.2f}   {' '.join(map(repr, longest))}")


def demo_speed(tok, text):
    print(f"4  throughput on {len(text) / 1e6:.1f} MB of held-out code, one process, and the Pile (825 GB)")
    fresh, ids = BPETokenizer(tok.vocab, tok.merges, tok.special_tokens), tok.encode_array(text)
    for name, work in [("encode, cold cache", lambda: fresh.encode_array(text)), ("encode, warm", lambda: fresh.encode_array(text)),
                       ("decode", lambda: fresh.decode_bytes(ids))]:
        start = time.perf_counter()
        work()
        rate = len(text.encode()) / (time.perf_counter() - start)
        print(f"   {name:20}{rate / 1e6:7.1f} MB/s {825e9 / rate / 3600:8.1f} hours for the Pile on one core")


def demo_vocab_sizes(tok, text, out):
    sizes = [s for s in (257, 512, 1024, 2048, 4096, 8192, 16384) if s <= tok.vocab_size]
    ratios = [compression_ratio(text, prefix_tokenizer(tok, s).encode(text)) for s in sizes]
    print("5  vocabulary size -> bytes per token on held-out code (every doubling buys less)")
    print("   " + " | ".join(f"{s:,} {r:.2f}" for s, r in zip(sizes, ratios)))
    try: import matplotlib
    except ImportError: return print("   no plot: matplotlib is not installed (pip install matplotlib)")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6, 4))
    ax.semilogx(sizes, ratios, "o-", base=2)
    ax.set(xlabel="vocabulary size", ylabel="bytes per token", title="BPE on held-out Python source")
    ax.grid(alpha=0.3)
    fig.savefig(out / "bpe.png", dpi=120, bbox_inches="tight")
    plt.close(fig)
    print(f"   plot: {out / 'bpe.png'}")


def demo(out=Path("out")):
    """The lecture: every claim of the docstring, measured on the embedded corpus."""
    out.mkdir(parents=True, exist_ok=True)
    train, val = split_files(corpus_files())
    texts, held = [f.read_bytes().decode() for f in train], "".join(f.read_bytes().decode() for f in val)
    print(f"corpus: the Python standard library, {len(train)} files, {sum(map(len, texts)) / 1e6:.1f} MB; held out {len(val)} files")
    demo_trainers("".join(texts)[:130_000])
    large = BPETokenizer(*train_pieces(((t, True) for t in texts), 16384, [EOT]), [EOT])
    code = prefix_tokenizer(large, 4096)
    prose = BPETokenizer(*train_pieces(((t, True) for t in docstrings(train)), 4096, [EOT]), [EOT])
    demo_ratios(code, WordTokenizer("".join(texts[:200])))
    demo_domains(code, prose, held, "\n".join(docstrings(val)))
    demo_speed(code, held * 4)
    demo_vocab_sizes(large, held, out)


# --- 10. the command line ---------------------------------------------------------------------------------------------

def check_writable(folder):
    """Before the work, not after it: can `folder` be made and written?"""
    near = next(p for p in [Path(folder).absolute(), *Path(folder).absolute().parents] if p.exists())
    if not near.is_dir() or not os.access(near, os.W_OK): raise OSError(f"{folder}: cannot be written ({near} is no writable folder)")


def run_train(a):
    check_writable(a.out)
    special = a.special if EOT in a.special else [EOT, *a.special]
    start, files = time.monotonic(), text_files(a.data)
    vocab, merges = train_bpe(files, a.vocab_size, special, pattern=PATTERNS[a.pattern], num_processes=a.processes,
                              errors=a.errors, progress=True)
    BPETokenizer(vocab, merges, special, PATTERNS[a.pattern]).save(Path(a.out, "tokenizer.json"))
    longest = max(merges, key=lambda m: len(m[0] + m[1]), default=(b"", b""))
    few = f" (the text has no more pairs to merge: {a.vocab_size} were asked for)" if len(vocab) < a.vocab_size else ""
    print(f"{Path(a.out, 'tokenizer.json')}: {len(vocab):,} tokens{few}, longest {longest[0] + longest[1]!r}, "
          f"{time.monotonic() - start:.1f} s")


def run_encode(a):
    tok = load_tokenizer(a.tokenizer)
    if a.data == ["-"]: return print(*tok.encode(sys.stdin.buffer.read().decode("utf-8", a.errors)))
    if a.out: check_writable(Path(a.out).parent)
    else: raise ValueError("--out is missing: give the token file to write, as in --out out/x.bin")
    info = encode_files(tok, text_files(a.data), a.out, a.processes, progress=True, errors=a.errors)
    print(f"{a.out}: {info['tokens']:,} tokens of {info['documents']:,} documents, {info['bytes'] / max(1, info['tokens']):.2f} bytes per token")


def run_decode(a):
    tok = load_tokenizer(a.tokenizer)
    ids = load_tokens(a.file, tok) if a.file else np.array([int(i) for i in sys.stdin.read().split()], np.int64)
    for i in range(0, len(ids), BLOCK): sys.stdout.buffer.write(tok.decode_bytes(ids[i:i + BLOCK]))


def run_show(a):
    tok = load_tokenizer(a.tokenizer)
    if a.text is not None:
        ids = tok.encode(a.text)
        print("".join(f"[{tok.decode([i])}]" for i in ids))
        return print(f"{len(ids)} tokens, {compression_ratio(a.text, ids):.2f} bytes per token: {' '.join(map(str, ids))}")
    lengths = Counter(len(t) for i, t in tok.vocab.items() if i not in tok.special_tokens.values())
    print(f"{tok.vocab_size:,} ids, {len(tok.merges):,} merges, hash {tok.hash()}, special {tok.special_tokens}\npattern {tok.pattern}")
    print("bytes: tokens of that length  " + ", ".join(f"{n}: {c:,}" for n, c in sorted(lengths.items())))
    print("longest:", *(repr(t.decode(errors="replace")) for t in sorted(tok.vocab.values(), key=len, reverse=True)[:10]))


def run_prepare(a):
    data = fetch(a.corpus, Path(a.out, "corpus"), progress=True) if a.corpus else a.data
    val = a.val or (data[1:] if a.corpus else None)
    prepare(a.out, data[:1] if a.corpus else data, val or None, a.vocab_size, a.processes, a.errors, a.tokenizer)


def run_fetch(a): print(*fetch(a.name, a.out, progress=True), sep="\n")


class Parser(argparse.ArgumentParser):
    def __init__(self, *args, **options): super().__init__(*args, allow_abbrev=False, **options)
    def error(self, message): self.exit(2, f"bpe.py: error: {message}; {self.prog} -h lists what there is\n")


def parser():
    p = Parser(prog="python bpe.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", metavar="train|encode|decode|show|prepare|fetch")
    flags = {
        "--data": dict(nargs="+", metavar="PATH", help="text files or folders (.txt .md .py ... .jsonl .gz)"),
        "--tokenizer": dict(metavar="FILE", help="a tokenizer.json"),
        "--vocab_size": dict(type=int, default=4096, metavar="N", help="tokens (default 4096)"),
        "--out": dict(metavar="PATH", help="what to write"),
        "--pattern": dict(choices=sorted(PATTERNS), default="gpt2", help="pre-tokenizer (default gpt2)"),
        "--special": dict(nargs="*", default=[EOT], metavar="TOKEN", help=f"special tokens ({EOT} is always one)"),
        "--processes": dict(type=int, metavar="N", help="worker processes (default: one a core)"),
        "--errors": dict(choices=["strict", "replace"], default="strict", help="invalid UTF-8 stops, or becomes U+FFFD"),
        "--val": dict(nargs="+", metavar="PATH", help="validation text (default: 5%% of the data)"),
        "--corpus": dict(choices=sorted(CORPORA), help="a public corpus to fetch instead of --data"),
        "--text": dict(metavar="TEXT", help="text to cut into tokens"),
        "file": dict(nargs="?", metavar="FILE.bin", help="token file (default: ids on stdin)"),
        "name": dict(choices=sorted(CORPORA), help="corpus"),
    }
    for name, run, text, wanted in [
            ("train", run_train, "text -> tokenizer.json", "--data! --vocab_size --out! --pattern --special --processes --errors"),
            ("encode", run_encode, "text -> token file; --data - reads stdin and prints ids", "--tokenizer! --data! --out --processes --errors"),
            ("decode", run_decode, "token file or ids -> text", "--tokenizer! file"),
            ("show", run_show, "a vocabulary, or a text cut into tokens", "--tokenizer! --text"),
            ("prepare", run_prepare, "text -> tokenizer.json, train.bin, val.bin; without --data the standard library",
             "--data --corpus --val --vocab_size --tokenizer --out! --processes --errors"),
            ("fetch", run_fetch, "download a public corpus", "name --out!")]:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        for flag in wanted.split():
            sub.add_argument(flag.rstrip("!"), **flags[flag.rstrip("!")], **({"required": True} if flag.endswith("!") else {}))
    return p


def main(argv=None):
    args = parser().parse_args(argv)

    def stop(*_): raise KeyboardInterrupt            # SIGTERM cleans up as Ctrl-C does
    signal.signal(signal.SIGTERM, stop)
    try:
        if getattr(args, "processes", None) is not None and args.processes < 1:
            raise ValueError(f"--processes {args.processes}: give 1 or more")
        demo() if args.command is None else args.run(args)
    except KeyboardInterrupt:
        print("\ninterrupted: no unfinished file was left; the same command starts again", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as e:
        print("bpe.py: error: " + " ".join(str(e).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
