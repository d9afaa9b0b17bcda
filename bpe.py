r"""bpe.py - lecture 1: tokenization.
What   text -> token ids and back: characters, bytes, words, and byte-pair encoding (BPE) trained, stored, applied, written to disk.
"""
import argparse, codecs, gzip, hashlib, heapq, itertools, json, os, re, signal, sys, threading, time, unicodedata
import multiprocessing as mp
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import regex                                         # re has no \p{L} (any letter of any script)

EOT = "<|endoftext|>"                                # ends every document of a token file
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_AFTER_GPT2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT4_PATTERN = _AFTER_GPT2 % "{1,3}"                 # digits in threes; Llama-3 uses the same, Qwen2 one digit a token
PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN, "llama3": GPT4_PATTERN, "qwen2": _AFTER_GPT2 % ""}


# --- 1. the naive version ---------------------------------------------------------------------------------------------

def split_special(text, special_tokens):
    """Pieces of text, special tokens as pieces of their own; of overlapping ones the longest wins."""
    if not special_tokens: return [text]
    return re.split("(" + "|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) + ")", text)


def train_bpe_naive(text, vocab_size, special_tokens=(), pattern=GPT2_PATTERN):
    """Count every adjacent pair, merge the most frequent, start again: O(merges * text).  The oracle of train_bpe."""
    pieces = [p for part in split_special(text, special_tokens) if part not in special_tokens
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
            if b"\0" in block:
                raise ValueError(f"{path}: not a text file (NUL byte at offset {at + block.index(0)})")
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
    can cut it, so memory stays bounded; without a cutter every document is one piece.  Empty documents are left out."""
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
        if not document: continue
        parts = deque(cutter.pieces(slices(document), BLOCK) if cutter else [document])
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)     # Ctrl-C is the parent's to handle
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


def batches(pieces, size=4 * BLOCK):
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

UNIT = re.compile(r"[^\S\x1c-\x1f]*[\S\x1c-\x1f]+|[^\S\x1c-\x1f]+")       # white space and the word after it
UNIT_LINES = regex.compile(r"[^\S\r\n]*\S+(?:\s*[\r\n])?|\s*[\r\n]|\s+")


class Splitter:
    """Text -> pre-tokens.  Units (a word and the white space before it) repeat, so the slow regex sees each once."""

    def __init__(self, pattern):
        try: self.regex = regex.compile(pattern)
        except regex.error as e: raise ValueError(f"pattern {pattern!r} is not a regular expression: {e}") from None
        if self.regex.groups: raise ValueError(f"pattern {pattern!r} has capture groups; write (?:...)")
        self.known = pattern in PATTERNS.values()
        self.unit = UNIT if pattern == GPT2_PATTERN else UNIT_LINES

    def units(self, text): return self.unit.findall(text) if self.known else [text]

    def pieces(self, unit):
        out = self.regex.findall(unit)
        if not self.known and "".join(out) != unit:
            raise ValueError(f"pattern {self.regex.pattern!r} leaves out part of {unit[:40]!r}")
        return out


def count_pieces(batch, splitter, special_tokens):
    """Counter of pre-tokens (bytes) of a batch of (text, last) pieces."""
    units, words = Counter(), Counter()
    for text, _ in batch:
        for part in split_special(text, special_tokens)[::2]: units.update(splitter.units(part))
    for unit, n in units.items():
        for piece in splitter.pieces(unit): words[piece] += n
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
    for part in parallel_map(count_pieces, batches(pieces), num_processes or default_processes(), Splitter(pattern),
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
            raise ValueError(f"special tokens {names} must be distinct and not empty")
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
        self.ids = {token: i for i, token in sorted(self.vocab.items(), reverse=True) if i not in special}
        for token in [bytes([b]) for b in range(256)] + [a + b for a, b in self.merges]:
            if token not in self.ids: raise ValueError(f"vocab lacks the token {token!r}, which bytes or merges make")
        self._byte_id = np.array([self.ids[bytes([b])] for b in range(256)], np.int64)
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
        self._table = [self.vocab.get(i, b"") for i in range(self.vocab_size)]

    # -- text -> ids
    def encode(self, text, allowed_special="all"):
        """ids of text.  allowed_special: "all", or the special tokens that count; () makes everything ordinary text."""
        return self.encode_array(text, allowed_special).tolist()

    def encode_array(self, text, allowed_special="all"):
        """encode as an array of uint32."""
        try: text.encode()
        except UnicodeEncodeError as e:
            raise ValueError(f"text holds a lone surrogate U+{ord(text[e.start]):04X} at character {e.start}: not Unicode text; "
                             f'try text.encode("utf-8", "replace").decode()') from None
        specials = self._allowed(allowed_special)
        out = []
        for i, part in enumerate(split_special(text, specials)):
            if i % 2: out.append(np.uint32(specials[part]).tobytes())
            else: out += map(self._encode_block, Cutter(self._cut).pieces(slices(part), BLOCK))
        return np.frombuffer(b"".join(out), np.uint32)

    def _allowed(self, allowed_special):
        if isinstance(allowed_special, str) and allowed_special == "all": return self.special_tokens
        unknown = set(allowed_special) - set(self.special_tokens)
        if unknown: raise ValueError(f"allowed_special {sorted(unknown)} are no special tokens: {list(self.special_tokens)}")
        return {s: self.special_tokens[s] for s in allowed_special}

    def _encode_block(self, text):
        """Ordinary text -> packed ids."""
        if self.normalizer: text = unicodedata.normalize(self.normalizer, text)
        units, cache = self._splitter.units(text), self._cache
        new = set(units).difference(cache)
        if new:
            self._cached += sum(map(len, new))
            if self._cached > self.CACHE:            # a new dictionary: other threads may still read the old one
                self._cache = cache = {}
                new = set(units)
                self._cached = sum(map(len, new))
            split = {unit: self._splitter.pieces(unit) for unit in new}
            words = list({piece for pieces in split.values() for piece in pieces})
            ids = dict(zip(words, self._merge([w.encode() for w in words])))
            for unit, pieces in split.items(): cache[unit] = b"".join([ids[p] for p in pieces])
        return b"".join(map(cache.__getitem__, units))

    def _merge(self, words):
        """words (bytes) -> packed ids: in every round each word merges its pair of lowest rank, all words at once."""
        out = [b""] * len(words)
        size = np.fromiter(map(len, words), np.int64, len(words))
        ids = self._byte_id[np.frombuffer(b"".join(words), np.uint8)]
        name = np.arange(len(words))
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
        for piece in cutter.pieces(chunks): yield from self.encode(piece, allowed_special)

    # -- ids -> text
    def decode_bytes(self, ids):
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        bad = (ids < 0) | (ids >= self.vocab_size)
        if bad.any(): raise ValueError(f"id {ids[bad][0]} is outside the vocabulary of {self.vocab_size}")
        return b"".join(map(self._table.__getitem__, ids.tolist()))

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
    if normalizer not in (None, "NFC"): raise ValueError(f"normalizer {normalizer!r} is not supported (NFC or none)")
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
    if [s["type"] for s in steps] not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise ValueError(f"pre_tokenizer {[s['type'] for s in steps]} is not supported (ByteLevel, or Split and ByteLevel)")
    if steps[-1].get("add_prefix_space"): raise ValueError("pre_tokenizer ByteLevel: add_prefix_space is not supported")
    if steps[-1].get("use_regex", True) != (len(steps) == 1): raise ValueError("pre_tokenizer ByteLevel: unexpected use_regex")
    if len(steps) == 1: return GPT2_PATTERN
    if steps[0]["behavior"] != "Isolated" or steps[0].get("invert") or "Regex" not in steps[0]["pattern"]:
        raise ValueError(f"pre_tokenizer Split {steps[0]} is not supported (Regex, Isolated, not inverted)")
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
    finally: part.unlink(missing_ok=True)


def encode_batch(batch, tokenizer, dtype):
    """(packed ids with EOT after each document, tokens, bytes of text, documents)."""
    end = np.array([tokenizer.eot_id], dtype).tobytes()
    out, size, documents = [], 0, 0
    for text, last in batch:
        out.append(tokenizer.encode_array(text, ()).astype(dtype).tobytes())
        if last: out.append(end)
        size += len(text.encode())
        documents += last
    return b"".join(out), size, documents


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
        for data, size, documents in parallel_map(encode_batch, batches(pieces), num_processes or default_processes(),
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
    """Byte offset of the first line end after 95% of the file (of the last before, if there is none)."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        start = size * 95 // 100
        f.seek(start)
        i = f.readline() and f.tell()
        if 0 < i < size: return i
        f.seek(0)
        i = f.read(start).rfind(b"\n") + 1
        if 0 < i: return i
    raise ValueError(f"{path}: one line only, nothing to hold out; give the validation text with --val FILE")


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


if __name__ == "__main__":
    pass
