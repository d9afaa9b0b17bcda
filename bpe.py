r"""bpe.py - lecture 1: tokenization.

What   text -> token ids and back: characters, bytes, words, and byte-pair encoding (BPE); training it,
       applying it, storing it, and writing a corpus to disk as one array of ids.
Why    A model predicts one id at a time, so fewer ids for the same text are fewer steps and a longer view.
       Characters: 154,998 ids (assigned in Unicode 16), 1 to 4 bytes each. Bytes: 256 ids, 1 byte each.
       Words: no end of ids, and there is always an unknown one. BPE begins with the bytes and adds what
       is frequent: 3.5 bytes an id of Python at 4,096 ids, 4.0 at 16,384 (production models: 100,000 to
       250,000), and there is no text that it cannot write.
How    pre-tokens = findall(pattern, text)      a regex cuts text into words; no id ever spans two pre-tokens
       merge      = the pair with the greatest (count over all pre-tokens, pair); again, up to vocab_size ids
       encode     = in every pre-token apply the merge of lowest rank until none applies
       ratio      = UTF-8 bytes / ids           compression_ratio(text, ids): what the lecture compares
Facts  ord("牛") = 29275, ord("🌍") = 127757, "🌍".encode() = f0 9f 8c 8d: one byte of it is no character, which
       is why decode works on all ids together. Over 98% of web pages are UTF-8. Models without a tokenizer,
       on bytes (ByT5, MEGABYTE, BLT) or on hashed words (T-FREE), exist and are not yet scaled to the
       frontier; compare them in bits per byte, never in loss per token.
Run    python bpe.py                                              # this lecture, 20 s on 2 cores; out/bpe.png
       python bpe.py train --data FILE --vocab_size 10000 --out out      # -> out/tokenizer.json
       python bpe.py encode --tokenizer out/tokenizer.json --data FILE --out out/train.bin
       python bpe.py decode --tokenizer out/tokenizer.json out/train.bin
       python bpe.py show --tokenizer out/tokenizer.json --text "Hello"
       python bpe.py prepare --out out                            # the standard library -> train.bin, val.bin
See    1  243 merges of 130 kB: naive 5.14 s | incremental 0.08 s | 68x | identical merges: True
       2  bytes an id   English: character 1.00, byte 1.00, word 4.00 (9% unknown), BPE 2.79
                        Chinese: character 3.00, byte 1.00, word 16.50 (100% unknown), BPE 1.00
       3  trained on code: 3.53 on code, 3.46 on docstrings; trained on docstrings: 3.01 and 3.63
       4  encode 4.2 MB/s, all words known 9.9, decode 109: the Pile takes 59, 25 and 2 hours
       5  512 ids 2.10 | 1,024 2.65 | 2,048 3.15 | 4,096 3.53 | 8,192 3.82 | 16,384 4.00
Outline  1 the naive version   2 characters and words   3 incremental training   4 text in pieces that can
         stand alone   5 many processes   6 the tokenizer   7 tokenizer.json   8 token files   9 corpora
         10 accounting and demo   11 command line.   On a first reading: 1, 2, 3, 6 and the demo.
Sources  Gage 1994; Sennrich et al. 2016, arXiv 1508.07909; GPT-2 (Radford et al. 2019): byte alphabet, regex.
"""
import argparse
import ast
import codecs
import contextlib
import functools
import gc
import gzip
import hashlib
import heapq
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import unicodedata
import zlib
from array import array
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import regex                                         # re knows no \p{L}, a letter of any script

EOT = "<|endoftext|>"                                # ends every document of a token file
# Contractions; letters, numbers, other signs, each with the one blank before it; white space, less its last
# character if something follows (a blank goes with what follows, a line end or tab stands alone).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-4 (cl100k), Llama 3, Qwen2; GPT-4o has another: also 'LL, any one sign before letters, line ends close a
# pre-token; %s: digits per number
LATER_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT4_PATTERN = LATER_PATTERN % "{1,3}"
PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN, "llama3": GPT4_PATTERN, "qwen2": LATER_PATTERN % ""}
BLOCK = 1 << 16                                      # characters, bytes or ids handled at a time
BATCH = 1 << 21                                      # characters of text that are one task of a worker


# --- 1. the naive version -------------------------------------------------------------------------

def split_special(text, special_tokens):
    """[text, special, text, ..., text]: special tokens at odd places; the leftmost, then the longest, wins.
    Nothing is counted or merged across one, so this comes before the regex, in training and in encoding."""
    return special_regex(tuple(special_tokens)).split(text) if special_tokens else [text]


@functools.lru_cache(64)
def special_regex(special_tokens):
    # a regex takes the first alternative that fits; (?!) fits nowhere
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return regex.compile("(" + ("|".join(map(regex.escape, longest_first)) or "(?!)") + ")")


def train_bpe_naive(text, vocab_size, special_tokens=(), pattern=GPT2_PATTERN):
    """Count every pair, merge the most frequent, count again: O(merges * text). The oracle of train_bpe."""
    pre_tokens = Counter(pre_token for part in split_special(text, special_tokens)[::2]
                         for pre_token in regex.findall(pattern, part))
    words = {tuple(bytes([b]) for b in pre_token.encode()): n for pre_token, n in pre_tokens.items()}
    merges = []
    while len(merges) < vocab_size - 256 - len(special_tokens):
        counts = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                # "aaa" holds (a, a) twice, though only one of them can merge
                counts[pair] += n
        if not counts:
            break
        # a tie goes to the greater pair of byte strings
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        words = {merge_naive(word, best): n for word, n in words.items()}
    return make_vocab(merges, special_tokens), merges


def merge_naive(word, pair):
    """(t, h, e) by (t, h) -> (th, e). From left to right, so (a, a, a) by (a, a) -> (aa, a)."""
    out, i = [], 0
    while i < len(word):
        step = 2 if word[i:i + 2] == pair else 1
        out.append(b"".join(word[i:i + step]))
        i += step
    return tuple(out)


def encode_naive(pre_token, merges):
    """One pre-token's tokens (bytes): every merge, in the order of training. The oracle of encode."""
    word = tuple(bytes([b]) for b in pre_token.encode())
    for pair in merges:
        word = merge_naive(word, pair)
    return list(word)


def make_vocab(merges, special_tokens):
    """id -> bytes: 256 bytes, special tokens, merges: a larger vocabulary moves no id of a smaller one."""
    tokens = [bytes([b]) for b in range(256)]
    tokens += [name.encode() for name in special_tokens] + [a + b for a, b in merges]
    return dict(enumerate(tokens))


# --- 2. characters and words: two tokenizers that are not enough (bytes follow in 6) --------------

class CharacterTokenizer:
    """id = code point: 1.1 million (154,998 are assigned), most never seen in training; 1 to 4 bytes each."""
    vocab_size = 0x110000

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


class WordTokenizer:
    """id = a whole pre-token of a corpus. Compresses best; what the corpus lacks is UNK, its text lost."""
    UNK = "<unk>"

    def __init__(self, corpus, pattern=GPT2_PATTERN):
        self.pattern = pattern
        self.words = [self.UNK, *sorted(set(regex.findall(pattern, corpus)))]
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.vocab_size = len(self.words)

    def encode(self, text):
        return [self.ids.get(word, 0) for word in regex.findall(self.pattern, text)]

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


# --- 3. incremental training ----------------------------------------------------------------------
# A merge changes only the pairs at its own places. So keep for every pair the places where it stands, and a
# heap of pairs by count. All pairs that hold a new token appear at the moment it is made; after that a pair
# can only lose places to other merges. A count in the heap is therefore an upper bound: recount when it comes
# to the top, no sooner.

DEAD = -2                                            # a place inside a token; -1 stands between words


def merge_pairs(counts, num_merges, show=False):
    """{pre-token: count} -> the naive trainer's merges; each costs only the places it touches."""
    symbol, weight = lay_out(counts)
    tokens = [bytes([b]) for b in range(256)]
    order = [tie_key(token) for token in tokens]
    # bytes of each token; a merge takes a symbol away, so there are no more merges than symbols
    length = np.ones(256 + min(num_merges, len(symbol)), symbol.dtype)
    heap, merges = [], []
    at = ((symbol[:-1] >= 0) & (symbol[1:] >= 0)).nonzero()[0].astype(symbol.dtype)
    key = (symbol[at] << 8 | symbol[at + 1]).astype(np.uint16)
    push_pairs(heap, order, weight, key, at, lambda k: divmod(k, 256))
    progress = Progress("merge", num_merges, show, "merges", 1)
    while heap and len(merges) < num_merges:
        minus_bound, _, _, a, b, at = heapq.heappop(heap)
        # keep the places where a still begins and b still follows; other merges took the rest
        at = at[(symbol[at] == a) & (symbol[at + length[a]] == b)]
        count = int(weight[at].sum())
        if count < -minus_bound:                     # only a bound: back into the heap with the true count
            if count:
                heapq.heappush(heap, (-count, order[a], order[b], a, b, at))
            continue
        if a == b:
            at = every_second(at, length[a])
        new = len(tokens)
        merges.append((tokens[a], tokens[b]))
        tokens.append(tokens[a] + tokens[b])
        order.append(tie_key(tokens[new]))
        length[new] = length[a] + length[b]
        # A token's id stands at its first and its last byte, so either neighbour finds it in one step:
        # "th" "e" is [th th e], merged [new DEAD new]. Old heap entries that name these places fail the test
        # above, since no a and no b stands there any more: nothing must be deleted from the heap.
        middle = at + length[a]
        symbol[middle - 1] = symbol[middle] = DEAD
        symbol[at] = symbol[at + length[new] - 1] = new
        left, right = symbol[at - 1], symbol[at + length[new]]
        # (new, new) is counted once: as the left one's right pair
        has_left = (left >= 0) & (left != new)
        has_right = right >= 0
        left, right = left[has_left], right[has_right]
        # new pairs: the left neighbour as it is, the right one as its complement, which is negative
        push_pairs(heap, order, weight, np.concatenate([left, ~right]),
                   np.concatenate([at[has_left] - length[left], at[has_right]]),
                   lambda k: (k, new) if k >= 0 else (new, ~k))
        progress(len(merges))
    progress.close()
    return merges


def lay_out(counts, large=1 << 24):
    """{b"ab": 5, b"c": 2} -> symbol [a b -1 c -1], weight [5 5 5 2 2]: all words in one array. symbol[at - 1]
    at the first place wraps to the end of the array, which is a separator too."""
    text = b"\xff".join(counts) + b"\xff"            # UTF-8 has no byte 0xff
    # places and symbols are most of the memory: 4 bytes each in a large text, but numpy is faster with 8
    small = large < len(text) < 1 << 31 and max(counts.values()) < 1 << 31
    kind = np.int32 if small else np.int64
    symbol = np.frombuffer(text, np.uint8).astype(kind)
    symbol[symbol == 0xff] = -1
    size = np.fromiter(map(len, counts), np.int64, len(counts))
    return symbol, np.repeat(np.fromiter(counts.values(), kind, len(counts)), size + 1)


def tie_key(token):
    """A string that sorts the lower, the greater the token, since heapq gives the smallest first: every byte
    becomes its complement, and an end mark above them all puts b"ab" before b"a"."""
    return "".join([chr(255 - b) for b in token]) + "\u0100"


def push_pairs(heap, order, weight, key, at, pair):
    """At at[i] stands the pair (a, b) = pair(key[i]). One heap entry (-count, tie, tie, a, b, places) a
    distinct pair: sorted by key, its places are one slice of at, from start to end."""
    if not len(at):
        return
    # stable: the places of one pair stay ascending, as every_second needs them
    by_pair = key.argsort(kind="stable")
    key, at = key[by_pair], at[by_pair]
    del by_pair                                      # half a gigabyte for a large text
    start = np.concatenate([[0], (key[1:] != key[:-1]).nonzero()[0] + 1])
    count = np.add.reduceat(weight[at], start)
    end = [*start[1:].tolist(), len(at)]
    for k, n, i, j in zip(key[start].tolist(), count.tolist(), start.tolist(), end):
        a, b = pair(k)
        heapq.heappush(heap, (-n, order[a], order[b], a, b, at[i:j]))


def every_second(at, step):
    """Of overlapping places keep every second, from the left: "aaaa" holds (a, a) at 0, 1, 2: keep 0, 2."""
    follows = at[1:] - at[:-1] == step
    if not follows.any():
        return at
    index = np.arange(len(at))
    # a run of overlapping places begins where none follows the place before; the running maximum carries the
    # index of its beginning along; the difference counts within the run
    in_run = index - np.maximum.accumulate(np.where(np.append(False, follows), 0, index))
    return at[in_run % 2 == 0]


# --- 4. text in pieces that can stand alone -------------------------------------------------------
# A 5 GB file, a stream, two workers: all need places where a text may be cut without changing a single
# pre-token. Such a place must be a pre-token's edge whatever stands left and right of it. For every pattern
# in PATTERNS these are: the end of a run of letters or of numbers, a blank after something else, and what
# follows a single line end. Not safe: between a sign and a line end ("}\n" is one pre-token of GPT-4), or in
# white space (what it becomes depends on the character after it). Marks (\p{M}) stay with their letter.

CUT = regex.compile(r"\p{L}(?=[^\p{L}\p{M}])|\p{N}(?=[^\p{N}\p{M}])|\S(?=[^\S\r\n])|\S\n(?=\S)",
                    regex.REVERSE)
# NFC may turn a letter into letter and mark
CUT_NFC = regex.compile(r"\S(?=[^\S\r\n])|\S\n(?=\S)", regex.REVERSE)
# everything up to the end of a word or number; at the end of a text, what is left
UNIT = regex.compile(r"[^\p{L}\p{N}]*+(?:\p{L}++|\p{N}++)|[^\p{L}\p{N}]++")
ASCII_UNIT = re.compile(r"[^a-zA-Z0-9]*+(?:[a-zA-Z]++|[0-9]++)|[^a-zA-Z0-9]++")


class Cutter:
    """Cuts streams of text at safe places. cut: CUT, CUT_NFC, or None where none is proven: then nothing is
    ever cut."""

    def __init__(self, cut, special_tokens=()):
        self.cut, self.special = cut, special_regex(tuple(special_tokens))
        self.longest = max(map(len, special_tokens), default=1)

    def last(self, text):
        """The last safe place in a text of which more may follow; 0 if there is none."""
        # a special token that begins before `end` is here completely
        end = len(text) - self.longest + 1
        while self.cut and end > 0:
            match = self.cut.search(text, 0, end)    # searches backwards, and looks at nothing from `end` on
            if not match:
                break
            i = match.end()
            near = self.special.finditer(text, max(0, i - self.longest), i + self.longest, overlapped=True)
            inside = [s.start() for s in near if s.start() < i < s.end()]
            if not inside:
                return i
            end = min(inside) + 1                    # never cut a special token in two: look further left
        return 0

    def pieces(self, chunks, size=BLOCK):
        """(chunk, whether it ends a document), ... -> the same of pieces that can stand alone. A piece is a
        document, or what could be cut off as soon as more than `size` characters of one were there."""
        held, need = "", size
        for chunk, ends in chunks:
            held += chunk
            if ends:
                yield held, True
                held, need = "", size
            elif len(held) > need:
                i = self.last(held)
                if i:
                    yield held[:i], False
                # no place found: look again when the text has doubled (at every chunk would be quadratic)
                held, need = held[i:], size if i else 2 * len(held)


def slices(sequence, size=BLOCK):
    return (sequence[i:i + size] for i in range(0, len(sequence), size))


def document_chunks(documents):
    """Documents in memory, as Cutter.pieces takes them."""
    for document in documents:
        for chunk in slices(document):
            yield chunk, False
        yield "", True


def stream_chunks(blocks):
    """A stream in which EOT stands between documents, as Cutter.pieces takes it."""
    held = ""
    for block in blocks:
        *documents, held = (held + block).split(EOT)
        for document in documents:
            yield document, True
        # the last len(EOT) - 1 characters may begin an EOT
        yield held[:1 - len(EOT)], False
        held = held[1 - len(EOT):]
    if held:                                         # an EOT at the very end begins no document
        yield held, True


def open_binary(path):
    return (gzip.open if str(path).endswith(".gz") else open)(path, "rb")


def file_blocks(path, errors="strict", start=0, end=None):
    """The text of a file (unpacked if .gz) block by block, bytes start to end. No newline is translated: ids
    decode to the same bytes. ValueError: NUL bytes (no text file) or invalid UTF-8, with the offset;
    errors="replace" goes on."""
    decoder, at = codecs.getincrementaldecoder("utf-8")(errors), start
    with open_binary(path) as f:
        f.seek(start)
        while True:
            block = f.read(BLOCK if end is None else min(BLOCK, end - at))
            if b"\0" in block and errors == "strict":
                raise ValueError(f"{path}: not a text file (NUL byte at offset {at + block.index(0)}); "
                                 f"--errors replace reads it all the same")
            pending = len(decoder.getstate()[0])     # bytes of a character that the block before began
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                raise ValueError(f"{path}: invalid UTF-8 at byte {at - pending + e.start} ({e.reason}); "
                                 f"--errors replace reads on with U+FFFD") from None
            if not block:
                return
            at += len(block)


def jsonl_documents(path, errors):
    """The field "text" of every line."""
    with open_binary(path) as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line.decode("utf-8", errors))["text"]
                text.encode()                        # is it text, and without lone surrogates?
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
                raise ValueError(f'{path}: line {number}: no JSON object with a text "text" ({e})') from None
            yield text


def read_pieces(paths, errors="strict", cutter=None, start=0, end=None):
    """(piece, whether it ends a document) of all files in turn. A file is one document, or several with EOT
    between them; a .jsonl has one a line. A long document comes in several pieces if the cutter can cut it;
    so memory does not grow with a file."""
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give --data a text file or a folder of them")
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: is empty; give --data a file with text")
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            chunks = document_chunks(jsonl_documents(path, errors))
        else:
            chunks = stream_chunks(file_blocks(path, errors, start, end))
        try:
            yield from (cutter or Cutter(None)).pieces(chunks)
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise ValueError(f"{path}: truncated or damaged .gz ({e})") from None


def read_documents(paths, errors="strict"):
    """The documents of a path or a list of paths, one string each (see read_pieces)."""
    for document, _ in read_pieces(as_paths(paths), errors):
        yield document


def as_paths(paths):
    return [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(p) for p in paths]


class PreTokenizer:
    """Text -> units -> pre-tokens. The pattern is slow and text repeats itself, so a cheap regex first cuts
    units, at ends of words (safe places, each unit is whole pre-tokens), and the pattern sees each distinct
    unit once."""

    def __init__(self, pattern):
        try:
            self.any = regex.compile(pattern)
        except regex.error as e:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {e}") from None
        if self.any.groups:
            raise ValueError(f"pattern {pattern!r} has capture groups; write (?:...) instead")
        # of another pattern nothing is proven: a text is one unit
        self.known = pattern in PATTERNS.values()
        self.ascii = re.compile(ascii_twin(pattern), re.ASCII) if self.known else self.any

    def units(self, text):
        if not self.known:
            return [text]
        return (ASCII_UNIT if text.isascii() else UNIT).findall(text)

    def pre_tokens(self, unit):
        found = (self.ascii if unit.isascii() else self.any).findall(unit)
        return found if self.known else [p for p in found if p]           # an own pattern may match nothing


def ascii_twin(pattern):
    r"""The same pattern for ASCII text, where re can search, twice as fast as regex: \p{L} is [a-zA-Z], \p{N}
    is [0-9]."""
    ranges = {r"\p{L}": "a-zA-Z", r"\p{N}": "0-9"}
    in_class = re.sub(r"\[[^]]*\]", lambda m: re.sub(r"\\p{.}", lambda p: ranges[p[0]], m[0]), pattern)
    return re.sub(r"\\p{.}", lambda p: f"[{ranges[p[0]]}]", in_class)


# --- 5. many processes ----------------------------------------------------------------------------
# Counting and encoding are parallel over pieces of text; merging is not (each merge depends on all before).

_task_function = None                                # set in a worker process when it starts


def _start_worker(function, args):
    global _task_function
    _task_function = functools.partial(function, *args)
    # Ctrl-C reaches the whole group; the parent ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.disable()                                     # millions of strings, and no cycles among them
    # errors travel with results; a worker that is ended has none to tell
    sys.stderr = open(os.devnull, "w")
    parent = multiprocessing.parent_process()
    # no orphans after a kill -9
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _run_task(task):
    return _task_function(task)


@contextlib.contextmanager
def ctrl_c_later():
    """A Ctrl-C in here arrives at the end of the block, and never in a process forked inside it."""
    if not hasattr(signal, "pthread_sigmask"):       # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def parallel_map(function, tasks, num_processes, *args):
    """function(*args, task) of each task, in order; about two per process wait at most: memory is bounded."""
    if num_processes == 1:
        yield from map(functools.partial(function, *args), tasks)
        return
    others, waiting = set(multiprocessing.active_children()), deque()
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(num_processes, context, _start_worker, (function, args))
    try:
        for task in tasks:
            with ctrl_c_later():                     # submit forks workers, which must not meet it halfway
                waiting.append(pool.submit(_run_task, task))
            if len(waiting) > 2 * num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ChildProcessError(f"one of {num_processes} worker processes was killed (too little memory?); "
                                f"try --processes 1") from None
    finally:
        # an error or Ctrl-C: do not wait for work that nobody wants
        if waiting:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
        pool.shutdown(cancel_futures=True)


def batches(pieces):
    """Lists of pieces of about BATCH characters: a task each."""
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[0])
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def default_processes():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Progress:
    """A line on stderr once a second (every ten into a file): done, rate, time left if the total is known."""

    def __init__(self, what, total=0, on=False, unit="MB", scale=1e6):
        self.what, self.total, self.on, self.unit, self.scale = what, total, on, unit, scale
        self.every, self.end = (1, "\r") if sys.stderr.isatty() else (10, "\n")
        self.start = self.shown = time.monotonic()

    def __call__(self, done):
        now = time.monotonic()
        if not self.on or now - self.shown < self.every:
            return
        rate, self.shown = done / (now - self.start), now
        left = f", {max(0, self.total - done) / rate:.0f} s left" if self.total and rate else ""
        done, rate = done / self.scale, rate / self.scale
        line = f"{self.what} {done:,.1f} {self.unit}, {rate:,.1f} {self.unit}/s{left}   "
        print(line, end=self.end, file=sys.stderr, flush=True)

    def close(self):
        if self.shown > self.start and self.end == "\r":
            print(file=sys.stderr)


def total_bytes(paths):
    """What a Progress over these files counts up to; 0, unknown, if one is packed or missing."""
    known = all(p.is_file() and p.suffix != ".gz" for p in paths)
    return sum(p.stat().st_size for p in paths) if known else 0


def count_pre_tokens(pre_tokenizer, special_tokens, batch):
    """One worker's task: list of (piece, ends a document) -> {pre-token as bytes: count}, bytes of text."""
    units, counts = Counter(), {}
    for text, _ in batch:
        for part in split_special(text, special_tokens)[::2]:
            units.update(pre_tokenizer.units(part))
    for unit, n in units.items():
        for pre_token in pre_tokenizer.pre_tokens(unit):
            counts[pre_token] = counts.get(pre_token, 0) + n
    size = sum(len(text.encode()) for text, _ in batch)
    return {pre_token.encode(): n for pre_token, n in counts.items()}, size


def train_bpe(input_path, vocab_size, special_tokens, *, pattern=GPT2_PATTERN, num_processes=None,
              errors="strict", progress=False):
    """Trains BPE on a text file or a list of them -> (vocab: dict[int, bytes], merges: list[tuple[bytes,
    bytes]]).

    Ids as make_vocab gives them; a tie goes to the greater pair. A corpus that runs out of pairs gives
    fewer merges than asked for. EOT ends a document and is no text, even if special_tokens lacks it (see
    read_pieces). Neither the number of processes nor the order of the files matters. Memory:
    the distinct pre-tokens, not the text. ValueError: vocab_size below 256 + special tokens; a special token
    empty or repeated; a file that is no UTF-8 text."""
    paths = as_paths(input_path)
    cutter = Cutter(CUT if pattern in PATTERNS.values() else None, special_tokens)
    return train_pieces(read_pieces(paths, errors, cutter), vocab_size, special_tokens, pattern,
                        num_processes, Progress("count", total_bytes(paths), progress))


def train_pieces(pieces, vocab_size, special_tokens, pattern=GPT2_PATTERN, num_processes=None, progress=None):
    """train_bpe on (piece, ends a document) from anywhere."""
    check_special(special_tokens)
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} is below 256 bytes + {len(special_tokens)} special tokens "
                         f"= {smallest}: try --vocab_size {max(512, smallest)}")
    counts, done, progress = Counter(), 0, progress or Progress("count")
    for part, size in parallel_map(count_pre_tokens, batches(pieces), num_processes or default_processes(),
                                   PreTokenizer(pattern), special_tokens):
        counts.update(part)
        done += size
        progress(done)
    progress.close()
    merges = merge_pairs(counts, vocab_size - smallest, progress.on)
    return make_vocab(merges, special_tokens), merges


def check_special(special_tokens):
    for name, n in Counter(special_tokens).items():
        if n > 1 or not name.encode():               # encode: a lone surrogate is a ValueError, too
            raise ValueError(f"special token {name!r} is {'repeated' if name else 'empty'}; give each once, "
                             f"with at least one character")


# --- 6. the BPE tokenizer -------------------------------------------------------------------------

NO_MERGE = 1 << 62                                   # the rank of a pair that no merge joins
MAX_IDS = 1 << 24                                    # tables below have a row an id; production models: 2^18


class BPETokenizer:
    """vocab: dict[int, bytes]; merges: list[tuple[bytes, bytes]] by rank; special_tokens: strings that are
    one id each.

    Special tokens that vocab lacks get the next ids. normalizer: None or "NFC". ignore_merges (Llama-3): a
    pre-token that is in vocab is that id, whatever the merges make of it. ordinary_added: special tokens that
    a tokenizer.json does not call special. ValueError: vocab lacks a part of a merge; a merge uses a token
    that only later merges make."""
    CACHE = 1 << 25                                  # characters of units whose ids are kept: bounds memory

    def __init__(self, vocab, merges, special_tokens=None, pattern=GPT2_PATTERN, *, normalizer=None,
                 ignore_merges=False, ordinary_added=()):
        self.vocab, self.merges, self.pattern = dict(vocab), [tuple(m) for m in merges], pattern
        self.normalizer, self.ignore_merges = normalizer, ignore_merges
        self.ordinary_added = frozenset(ordinary_added)
        self._add_special(special_tokens or ())
        bad = [i for i in self.vocab if not (isinstance(i, int) and 0 <= i < MAX_IDS)]
        if bad or not self.vocab:
            raise ValueError(f"vocab has the ids {bad[:3]}: ids are whole numbers from 0 to {MAX_IDS - 1}")
        self.vocab_size = max(self.vocab) + 1        # ids may have gaps
        self.eot_id = self.special_tokens.get(EOT)
        self._pre_tokenizer = PreTokenizer(pattern)
        cut = CUT_NFC if normalizer else CUT
        self.cut = cut if self._pre_tokenizer.known else None             # where text may be cut: see Cutter
        self._cache, self._words = {}, {}            # unit -> packed ids, pre-token -> packed ids
        self._cached = 0                             # characters of the units
        self._index_tokens()
        self._index_merges()

    def _add_special(self, given):
        """given: names, or a dict name -> id."""
        check_special(list(given))
        self.special_tokens = {}
        # of two equal tokens the later is the special one
        known = {token: i for i, token in sorted(self.vocab.items())}
        new = max(self.vocab, default=-1) + 1
        for name in given:
            i = given[name] if isinstance(given, dict) else known.get(name.encode(), new)
            if self.vocab.setdefault(i, name.encode()) != name.encode():
                raise ValueError(f"special token {name!r} has id {i}, which is {self.vocab[i]!r}")
            self.special_tokens[name], new = i, max(new, i + 1)

    def _index_tokens(self):
        """bytes -> id of ordinary tokens, and all tokens' bytes in one array for decoding."""
        special = set(self.special_tokens.values())
        ordinary = {bytes([b]) for b in range(256)} | {a + b for a, b in self.merges}
        # Of ids with the same bytes a dict keeps the last: an ordinary one, and of those the smallest.
        last_wins = sorted(self.vocab, key=lambda i: (i not in special, -i))
        self.ids = {self.vocab[i]: i for i in last_wins if i not in special or self.vocab[i] in ordinary}
        self._byte_id = [self.ids.get(bytes([b]), -1) for b in range(256)]
        table = [self.vocab.get(i, b"") for i in range(self.vocab_size)]
        self._bytes, self._size = np.frombuffer(b"".join(table), np.uint8), np.array([len(t) for t in table])
        self._start = np.cumsum(self._size) - self._size

    def _index_merges(self):
        """A pair (a, b) is the number a * vocab_size + b. Its rank stands in a dict, and in arrays sorted by
        pair, where one binary search finds many."""
        used, made, self._ranks = {}, {}, {}
        for rank, (a, b) in enumerate(self.merges):
            if not {a, b, a + b} <= self.ids.keys():
                raise ValueError(f"vocab lacks a part of merge {rank}, {a!r} + {b!r}")
            used.setdefault(a, rank)
            used.setdefault(b, rank)
            made[a + b] = rank
            self._ranks.setdefault(self.ids[a] * self.vocab_size + self.ids[b], rank)
        # A token must be made before any merge uses it. Then a merge never gives rise to a pair of lower
        # rank, and _merge may take all places of a pair in one round.
        for token, rank in used.items():
            if made.get(token, -1) >= rank:
                raise ValueError(f"merge {rank} uses {token!r}, which merge {made[token]} makes only later")
        # a last pair above all others: searchsorted never points past the end
        pair, rank = np.array([*self._ranks, NO_MERGE]), np.array([*self._ranks.values(), NO_MERGE])
        order = np.argsort(pair)
        self._pair, self._rank = pair[order], rank[order]
        self._made = [self.ids[a + b] for a, b in self.merges]            # rank -> id
        self._made_array = np.array(self._made, np.int64)

    def encode(self, text, allowed_special="all"):
        """The ids of text. allowed_special: "all", or those special tokens that count; () for text from
        users, who then cannot type a control token. No beginning-of-text is added. ValueError: lone
        surrogates, unknown special tokens."""
        specials = self._allowed(allowed_special)
        # what encoding needs besides the ids does not grow with the text: it goes in batches
        pieces = Cutter(self.cut, specials).pieces(document_chunks([text]))
        packed = [self._pack(batch, specials) for batch in batches(pieces)]
        return np.frombuffer(b"".join(packed), np.uint32).tolist()

    def encode_iterable(self, chunks, allowed_special="all"):
        """The ids of "".join(chunks), lazily, however the text is cut: through a special token, a word, white
        space. Only the text since the last safe place is held back, so memory is bounded by the longest
        stretch without one."""
        specials = self._allowed(allowed_special)
        parts = ((part, False) for chunk in chunks for part in slices(chunk))
        for piece in Cutter(self.cut, specials).pieces(itertools.chain(parts, [("", True)]), size=0):
            yield from np.frombuffer(self._pack([piece], specials), np.uint32).tolist()

    def _allowed(self, allowed_special):
        """{name: packed id} of the special tokens that count."""
        names = self.special_tokens if allowed_special == "all" else allowed_special
        unknown = set(names) - set(self.special_tokens)
        if unknown:
            raise ValueError(f"allowed_special {sorted(unknown)} are not among the special tokens "
                             f"{list(self.special_tokens)}")
        return {name: np.uint32(self.special_tokens[name]).tobytes() for name in names}

    def _pack(self, pieces, specials):
        """The ids of one text's pieces as uint32 in bytes."""
        splits = [split_special(text, specials) for text, _ in pieces]
        ordinary = iter(self.encode_texts([part for parts in splits for part in parts[::2]]))
        return b"".join([specials[part] if i % 2 else next(ordinary)
                         for parts in splits for i, part in enumerate(parts)])

    def encode_texts(self, texts):
        """The ids of each ordinary text, as uint32 in bytes. Many at once cost less than one by one."""
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as e:
                code = ord(text[e.start])
                raise ValueError(f"text holds a lone surrogate U+{code:04X} at character {e.start}; "
                                 f'text.encode("utf-8", "replace").decode() turns it into "?"') from None
        if self.normalizer:
            texts = [unicodedata.normalize(self.normalizer, text) for text in texts]
        units = [self._pre_tokenizer.units(text) for text in texts]
        cache = self._learn(set(itertools.chain.from_iterable(units)))
        return [b"".join(map(cache.__getitem__, units_of_text)) for units_of_text in units]

    def _learn(self, units):
        """The cache with these units in it. Only new ones cost anything; new words are merged together."""
        cache, ids = self._cache, self._words
        new = units.difference(cache)
        self._cached += sum(map(len, new))
        # begin again; another thread may still read the old dictionaries
        if self._cached > self.CACHE:
            self._cache, self._words = cache, ids = {}, {}
            new, self._cached = units, sum(map(len, units))
        split = {unit: self._pre_tokenizer.pre_tokens(unit) for unit in new}
        if not self._pre_tokenizer.known and any("".join(p) != unit for unit, p in split.items()):
            raise ValueError(f"pattern {self.pattern!r} leaves out part of the text, which would be lost")
        words = list(set(itertools.chain.from_iterable(split.values())).difference(ids))
        ids |= zip(words, self._merge([word.encode() for word in words]))
        if self.ignore_merges:
            ids |= {w: np.uint32(self.ids[w.encode()]).tobytes() for w in words if w.encode() in self.ids}
        for unit, pre_tokens in split.items():
            cache[unit] = b"".join([ids[p] for p in pre_tokens])
        return cache

    def _merge(self, words):
        """Pre-tokens (bytes) -> packed ids."""
        lacking = {b for b in set(b"".join(words)) if self._byte_id[b] < 0}
        if lacking:
            raise ValueError(f"vocab lacks the byte {min(lacking):#04x} of the text")
        # arrays pay from some hundred words on; one by one takes time quadratic in the word's length
        if sum(map(len, words)) < 2048:
            return [self._merge_one(word) for word in words]
        return self._merge_many(words)

    def _merge_one(self, word):
        """The pair of lowest rank becomes one id, again and again, until no merge joins any pair."""
        V, rank_of = self.vocab_size, self._ranks.get
        ids = [self._byte_id[b] for b in word]
        ranks = [rank_of(a * V + b, NO_MERGE) for a, b in zip(ids, ids[1:])]
        while (best := min(ranks, default=NO_MERGE)) < NO_MERGE:
            i = ranks.index(best)
            ids[i:i + 2] = [self._made[best]]
            del ranks[i]
            # the new id's pairs, to the left and to the right
            for j in range(max(0, i - 1), min(i + 1, len(ranks))):
                ranks[j] = rank_of(ids[j] * V + ids[j + 1], NO_MERGE)
        return array("I", ids).tobytes()

    def _merge_many(self, words):
        """The same in arrays: all words lie in one, and in every round each word merges its pair of lowest
        rank, wherever it stands; a word without such a pair leaves. At most as many rounds as the word that
        needs most merges."""
        out = [b""] * len(words)
        size = np.fromiter(map(len, words), np.int64, len(words))         # symbols left in each word
        ids = np.array(self._byte_id)[np.frombuffer(b"".join(words), np.uint8)]
        origin = np.arange(len(words))               # of each word still in the array: its index in words
        while len(origin):
            start = np.cumsum(size) - size
            # rank[i] is that of the pair at i, i + 1; the last symbol of all has none, hence the append
            pair = ids[:-1] * self.vocab_size + ids[1:]
            found = self._pair.searchsorted(pair)
            rank = np.append(np.where(self._pair[found] == pair, self._rank[found], NO_MERGE), NO_MERGE)
            # the last symbol of a word and the first of the next are no pair
            rank[start[1:] - 1] = NO_MERGE
            best = np.minimum.reduceat(rank, start)
            done = best == NO_MERGE
            packed = ids.astype(np.uint32).tobytes() if done.any() else b""
            for w, i, n in zip(origin[done].tolist(), start[done].tolist(), size[done].tolist()):
                out[w] = packed[4 * i:4 * (i + n)]
            keep = np.repeat(~done, size)            # symbols that go on to the next round
            # where a pair of lowest rank stands; of "aaa" the first two
            at = every_second(np.flatnonzero(keep & (rank == np.repeat(best, size))), 1)
            ids[at] = self._made_array[rank[at]]
            keep[at + 1] = False
            size = np.add.reduceat(keep, start, dtype=np.int64)[~done]
            ids, origin = ids[keep], origin[~done]
        return out

    def decode_bytes(self, ids):
        """The bytes of a list or, faster, an array of ids. ValueError: an id outside 0 .. vocab_size - 1."""
        if not isinstance(ids, np.ndarray):
            ids = list(ids)
            try:
                ids = np.frombuffer(array("I", ids), np.uint32)           # three times as fast as np.array
            except OverflowError:
                ids = np.array(ids, object)          # refused below
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            bad = next(i for i in ids.tolist() if not 0 <= i < self.vocab_size)
            raise ValueError(f"id {bad} is not in the vocabulary of {self.vocab_size} ids, which begin at 0")
        out = []
        # blocks this small keep the arrays below in the processor's cache: twice as fast
        for block in slices(ids, 1 << 14):
            size = self._size[block]
            # of each token: its start in _bytes minus its start in the text. A byte's place in the text plus
            # this is its place in _bytes.
            shift = self._start[block] - (np.cumsum(size) - size)
            at = np.repeat(shift, size) + np.arange(size.sum())
            out.append(self._bytes[at].tobytes())
        return b"".join(out)

    def decode(self, ids, errors="replace"):
        """The text of ids. A model may stop inside a character: U+FFFD stands for what is not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors)

    def hash(self):
        """16 hex digits over everything that decides a text's ids; token files and checkpoints record it."""
        state = [sorted((i, token.hex()) for i, token in self.vocab.items()),
                 [(a.hex(), b.hex()) for a, b in self.merges],
                 sorted(self.special_tokens.items()), self.pattern, self.normalizer, self.ignore_merges]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]

    def save(self, path):
        """Writes a Hugging Face tokenizer.json, from which `tokenizers` gives the same ids."""
        write_atomic(path, json.dumps(tokenizer_json(self), ensure_ascii=False, indent=1).encode())

    @classmethod
    def load(cls, path):
        """Reads a tokenizer.json of the GPT-2, Llama-3 or Qwen2 kind. Same ids as tokenizers' encode(...,
        add_special_tokens=False). What would change ids and is not done here is a ValueError that names
        it."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; python bpe.py train --data FILE --out DIR")
        try:
            return cls(**parse_tokenizer(json.loads(path.read_bytes())))
        except (json.JSONDecodeError, LookupError, TypeError, AttributeError, RecursionError) as e:
            raise ValueError(f"{path}: truncated, or not built like a tokenizer.json ({e!r})") from None
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None

    @classmethod
    def from_gpt2(cls, vocab_json_path, merges_txt_path, special_tokens=(EOT,)):
        """From vocab.json and merges.txt, the form in which GPT-2 was published."""
        try:
            names = json.loads(Path(vocab_json_path).read_bytes())
        except ValueError as e:
            raise ValueError(f"{vocab_json_path}: truncated, or no vocab.json ({e})") from None
        lines = Path(merges_txt_path).read_text("utf-8").split("\n")
        lines = [line for line in lines if line and not line.startswith("#version")]
        merges = [tuple(map(from_printable, line.split(" "))) for line in lines]
        vocab = {i: name.encode() if name in special_tokens else from_printable(name)
                 for name, i in names.items()}
        return cls(vocab, merges, list(special_tokens))


load_tokenizer = BPETokenizer.load                   # the tokenizer of a tokenizer.json, of bytes or of BPE


class ByteTokenizer(BPETokenizer):
    """id = byte, 256 = EOT: BPE without a single merge. Never an unknown word, and exactly 1 byte an id."""

    def __init__(self):
        super().__init__(make_vocab([], [EOT]), [], [EOT])


# --- 7. tokenizer.json ----------------------------------------------------------------------------
# JSON holds text, tokens are bytes. GPT-2's way out: a printable byte is written as itself, the others as
# U+0100 and on.

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHAR_OF_BYTE = {b: chr(b) for b in PRINTABLE}
CHAR_OF_BYTE |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in CHAR_OF_BYTE)}
BYTE_OF_CHAR = {c: b for b, c in CHAR_OF_BYTE.items()}


def to_printable(token):
    return "".join([CHAR_OF_BYTE[b] for b in token])


def from_printable(name):
    try:
        return bytes([BYTE_OF_CHAR[c] for c in name])
    except KeyError as e:
        raise ValueError(f"token {name!r} is not in GPT-2's byte alphabet ({e})") from None


def tokenizer_json(tok):
    """What save writes. Special tokens are in the model's vocabulary too: else tokenizers gives other ids."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": tok.pattern}, "behavior": "Isolated", "invert": False}
    special = {i: name for name, i in tok.special_tokens.items()}
    vocab = {special.get(i) or to_printable(token): i for i, token in sorted(tok.vocab.items())}
    if len(vocab) < len(tok.vocab):
        raise ValueError(f"a special token of {list(tok.special_tokens)} is written like another token")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags, "special": name not in tok.ordinary_added}
                         for i, name in sorted(special.items())],
        "normalizer": {"type": tok.normalizer} if tok.normalizer else None,
        "pre_tokenizer": byte_level if tok.pattern == GPT2_PATTERN else
        {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]},
        "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": tok.ignore_merges, "vocab": vocab,
                  "merges": [[to_printable(a), to_printable(b)] for a, b in tok.merges]}}


def parse_tokenizer(data):
    """A tokenizer.json -> the arguments of BPETokenizer."""
    model = data["model"]
    for field, allowed in [("type", ("BPE", None)), ("dropout", (None, 0)), ("byte_fallback", (None, False)),
                           ("continuing_subword_prefix", (None, "")), ("end_of_word_suffix", (None, ""))]:
        if model.get(field) not in allowed:
            raise ValueError(f"model.{field} {model[field]!r} is not supported, only {allowed[0]!r}")
    for field in ("truncation", "padding"):
        if data.get(field):
            raise ValueError(f"{field} {data[field]} is not supported; set it to null in the file")
    normalizer = (data.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise ValueError(f"normalizer {data['normalizer']} is not supported, only NFC or none")
    added = data.get("added_tokens") or []
    # "normalized" means something only where there is a normalizer
    for token in added:
        for flag in ("single_word", "lstrip", "rstrip", *["normalized"] * bool(normalizer)):
            if token.get(flag):
                raise ValueError(f"added token {token['content']!r}: {flag} is not supported")
    special = {token["content"]: token["id"] for token in added}
    vocab = {i: name.encode() if special.get(name) == i else from_printable(name)
             for name, i in model["vocab"].items()}
    if len(vocab) < len(model["vocab"]):
        raise ValueError("two tokens of model.vocab have the same id")
    merges = [tuple(map(from_printable, m.split(" ") if isinstance(m, str) else m)) for m in model["merges"]]
    return dict(vocab=vocab, merges=merges, special_tokens=special,
                pattern=parse_pattern(data.get("pre_tokenizer")), normalizer=normalizer,
                ignore_merges=bool(model.get("ignore_merges")),
                ordinary_added=[token["content"] for token in added if not token.get("special")])


def parse_pattern(pre):
    """ByteLevel with its own regex (GPT-2), or Split by regex, then ByteLevel without one (later models)."""
    steps = (pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]) if pre else []
    kinds, level = [step["type"] for step in steps], steps[-1] if steps else {}
    if not level.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and level.get("use_regex", True):
            return GPT2_PATTERN
        if kinds == ["Split", "ByteLevel"] and not level.get("use_regex", True):
            split = steps[0]
            if "Regex" in split["pattern"] and split["behavior"] == "Isolated" and not split.get("invert"):
                return split["pattern"]["Regex"]
    raise ValueError(f"pre_tokenizer {pre} is not supported, only ByteLevel, or Split (Regex, Isolated) and "
                     f"ByteLevel")


# --- 8. token files: ids little endian, one after the other, in .bin; what they are in .json ------

REMAKE = "make it: python bpe.py encode --tokenizer tokenizer.json --data FILE --out"


def write_atomic(path, data):
    """Writes bytes, or what data(file) writes, to path.part, then renames: a crash leaves the old file."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            data(f) if callable(data) else f.write(data)
            f.flush()
            # else the new name could survive a power cut and the content not
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        if e.errno is None or e.filename and Path(e.filename) != part:    # not about this file
            raise
        raise OSError(e.errno, f"{e.strerror or e}; nothing new was written to", str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def encode_files(tokenizer, paths_or_documents, out_path, num_processes=None, progress=False,
                 errors="strict"):
    """Writes the ids of all documents with EOT after each; returns what is in the .json: dtype, tokens, bytes
    (UTF-8 of the documents, without EOTs), documents, vocab_size, tokenizer (hash).

    Given: a path, or any iterable of paths and documents; a str in it is a path if a file has that name, else
    a document. Documents are ordinary text: no special token but the EOTs between them. The result is the
    same for all num_processes."""
    single = isinstance(paths_or_documents, (str, os.PathLike))
    given = [Path(paths_or_documents)] if single else paths_or_documents
    paths = [Path(item) for item in given if is_path(item)] if isinstance(given, (list, tuple)) else []
    for made in (Path(out_path), Path(out_path).with_suffix(".json")):
        if made.resolve() in [path.resolve() for path in paths]:
            raise ValueError(f"{made} is a file to read and would be written over; give another --out")
    cutter = Cutter(tokenizer.cut)
    pieces = itertools.chain.from_iterable(
        read_pieces([item], errors, cutter) if is_path(item) else cutter.pieces(document_chunks([item]))
        for item in given)
    return encode_pieces(tokenizer, pieces, out_path, num_processes,
                         Progress("encode", total_bytes(paths), progress))


def is_path(item):
    return isinstance(item, os.PathLike) or len(item) < 4096 and "\0" not in item and os.path.isfile(item)


def encode_pieces(tok, pieces, out_path, num_processes=None, progress=None, **more):
    """encode_files on (piece, ends a document) from anywhere; more: further fields of the .json."""
    path, progress = Path(out_path), progress or Progress("encode")
    # 2 bytes an id as long as they suffice: the Pile at 3.5 bytes per token is 506 GB of uint16
    dtype = np.dtype("<u2" if tok.vocab_size <= 1 << 16 else "<u4")
    if tok.eot_id is None:
        raise ValueError(f"the tokenizer has no {EOT!r}, which ends every document of a token file; it has "
                         f"{list(tok.special_tokens)}")
    if path.suffix == ".json":
        raise ValueError(f"{path}: is the name of the record beside the ids; give --out a name in .bin")
    info = {"dtype": dtype.name, "tokens": 0, "bytes": 0, "documents": 0, "vocab_size": tok.vocab_size,
            "tokenizer": tok.hash(), **more}

    def write(f):
        for ids, size, documents in parallel_map(encode_task, batches(pieces),
                                                 num_processes or default_processes(), tok, dtype):
            f.write(ids)
            info["tokens"] += len(ids) // dtype.itemsize
            info["bytes"] += size
            info["documents"] += documents
            progress(info["bytes"])
        progress.close()
        if not info["documents"]:
            raise ValueError(f"{path}: no documents for it; give more text, or --val FILE")

    write_atomic(path, write)
    # last: a .bin without its .json is not used
    write_atomic(path.with_suffix(".json"), json.dumps(info).encode())
    return info


def encode_task(tok, dtype, batch):
    """One worker's task: (packed ids with EOT after every document, bytes of text, documents)."""
    end = np.uint32(tok.eot_id).tobytes()
    texts, lasts = zip(*batch)
    ids = b"".join([packed + end if last else packed for packed, last in zip(tok.encode_texts(texts), lasts)])
    size = sum(len(text.encode()) for text in texts)
    return np.frombuffer(ids, np.uint32).astype(dtype).tobytes(), size, sum(lasts)


def summary(path, info):
    return (f"{path}: {info['tokens']:,} tokens of {info['documents']:,} documents, "
            f"{info['bytes'] / info['tokens']:.2f} bytes per token")


def token_info(path):
    """What the .json of a token file says."""
    path = Path(path)
    record = path.with_suffix(".json")
    try:
        info = json.loads(record.read_bytes())
        if not (info["dtype"] in ("uint16", "uint32") and isinstance(info["tokenizer"], str)
                and isinstance(info["tokens"], int) and isinstance(info["vocab_size"], int)):
            raise ValueError(info)
        return info
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise ValueError(f"{record}: missing or damaged ({e}); {REMAKE} {path}") from None


def load_tokens(path, tokenizer=None):
    """The ids of a token file as np.memmap. ValueError, with both values: size, vocabulary or tokenizer do
    not match."""
    path, info = Path(path), token_info(path)
    dtype = np.dtype(info["dtype"]).newbyteorder("<")
    size = path.stat().st_size if path.is_file() else "no file"
    tokens = info["tokens"]
    checks = [(f"{tokens} tokens of {info['dtype']} in bytes:", size, tokens * dtype.itemsize)]
    if tokenizer is not None:
        checks += [("made with a vocabulary of", info["vocab_size"], tokenizer.vocab_size),
                   ("made with tokenizer", info["tokenizer"], tokenizer.hash())]
    for what, has, needs in checks:
        if has != needs:
            raise ValueError(f"{path}: {what} {has}, should be {needs}; {REMAKE} {path}")
    return np.memmap(path, dtype, "r")


# --- 9. corpora -----------------------------------------------------------------------------------

STDLIB = Path(os.__file__).resolve().parent
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".c", ".h", ".html", ".csv", ".jsonl", ".txt.gz", ".jsonl.gz")
RECORDS = "log.jsonl", "results.jsonl"               # what training writes, should --data hold --out
HELD_OUT = False, b"\xff" * 32                       # the greatest split_key of the 5%


def corpus_files():
    """The embedded corpus: the standard library's *.py, without tests and installed packages."""
    leave_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = []
    for folder, folders, names in os.walk(STDLIB):
        folders[:] = [name for name in folders if name not in leave_out]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return [path for path in sorted(files) if is_text(path)]


def is_text(path):
    try:
        data = path.read_bytes()
        return bool(data.decode()) and b"\0" not in data
    except (OSError, UnicodeDecodeError):
        return False


def text_files(data):
    """The files of a path, or of a list of paths; of a folder, all text files below it."""
    files = []
    for path in as_paths(data):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder; give --data a text file or a folder")
        found = [path] if not path.is_dir() else [
            p for p in sorted(path.rglob("*"))
            if p.name.endswith(TEXT_SUFFIXES) and p.name not in RECORDS and p.is_file() and p.stat().st_size]
        if not found:
            raise ValueError(f"{path}: no text files in this folder ({' '.join(TEXT_SUFFIXES)})")
        files += found
    return files


def split_key(name):
    """A hash as a sort key, the same on every machine: the 5% of all names or texts that are held out come
    first, whatever else the corpus holds."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest, "big") % 100 >= 5, digest


def split_files(files, root=STDLIB):
    """(train, val): 5% of the files, but of several at least one each, by a hash of the path below root."""
    files = list(dict.fromkeys(map(Path, files)))
    full = [Path(os.path.abspath(f)) for f in files]
    keys = [split_key(f.relative_to(root).as_posix() if f.is_relative_to(root) else f.name) for f in full]
    last = min(max(HELD_OUT, min(keys)), sorted(keys)[-2]) if len(keys) > 1 else HELD_OUT
    return [f for f, key in zip(files, keys) if key > last], [f for f, key in zip(files, keys) if key <= last]


def split_sources(data, val, errors):
    """(files, train, val): all files, and two functions cutter -> pieces. Held out are the files of val, else
    5% of the files; of a single file 5% of its documents; of a single document its end."""
    files = corpus_files() if data is None else text_files(data)
    files = list({os.path.abspath(f): f for f in files}.values())        # a file given twice is one
    if val or len(files) > 1:
        root = STDLIB if data is None else os.path.commonpath(map(os.path.abspath, as_paths(data)))
        train, held = (files, text_files(val)) if val else split_files(files, root)
        used = files + (held if val else [])
        return used, *(functools.partial(read_pieces, part, errors) for part in (train, held))
    path = files[0]
    ends = (last for _, last in read_pieces(files, errors, Cutter(CUT)) if last)
    if len(list(itertools.islice(ends, 2))) > 1:
        last = max(HELD_OUT, min(map(split_key, read_documents(path, errors))))

        def part(held, cutter):
            chosen = (d for d in read_documents(path, errors) if (split_key(d) <= last) == held)
            return cutter.pieces(document_chunks(chosen))
        if next(part(False, Cutter(CUT)), None) is None:
            raise ValueError(f"{path}: its documents are all the same, or too few, and none is left to train "
                             f"on; give the validation text with --val FILE")
        return files, functools.partial(part, False), functools.partial(part, True)
    if path.suffix in (".gz", ".jsonl"):
        raise ValueError(f"{path}: holds a single document; give the validation text with --val FILE")
    part, at = functools.partial(read_pieces, files, errors), last_twentieth(path)
    return files, functools.partial(part, end=at), functools.partial(part, start=at)


def last_twentieth(path):
    """The byte where a file's last 5% begin: after a line end, else at a blank, else at a character."""
    size = path.stat().st_size
    begin = size - max(1, size // 20)
    with open(path, "rb") as f:
        f.seek(begin)
        tail = f.read(BLOCK)
    for edge in (rb"\n(?=.)", rb"(?= .)", rb"(?=[\x00-\x7f\xc0-\xff])"):
        match = re.search(edge, tail, re.S)
        if match and begin + match.end() > 0:
            return begin + match.end()
    raise ValueError(f"{path}: {size} bytes are too few to hold some out; give --val FILE")


def prepare(out, data=None, val=None, vocab_size=4096, num_processes=None, errors="strict", tokenizer=None,
            log=print):
    """Text -> out/tokenizer.json, out/train.bin, out/val.bin; if they are there from the same inputs, they
    are used again.

    data: None (the standard library), or a path or list of paths. val: the same, or None: then a part of data
    is held out (see split_sources). tokenizer: the path of one to use instead of training it (on the training
    part only). Returns {"tokenizer", "train" (path), "val" (path), "reused" (bool)}."""
    out, begin, show = Path(out), time.monotonic(), sys.stderr.isatty()
    files, train, held = split_sources(data, val, errors)
    tok = load_tokenizer(tokenizer) if tokenizer else None
    state = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    state += [tok.hash() if tok else vocab_size, GPT2_PATTERN, errors]
    state += [[str(p) for p in as_paths(source)] if source else None for source in (data, val)]
    inputs = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    result = {"train": out / "train.bin", "val": out / "val.bin"}
    with contextlib.suppress(OSError, ValueError):   # missing or damaged files are made again
        old = load_tokenizer(out / "tokenizer.json")
        if all(load_tokens(path, old).size and token_info(path).get("inputs") == inputs
               for path in result.values()):
            log(f"{out}: reusing tokenizer.json, train.bin and val.bin, made from the same inputs")
            return {"tokenizer": old, **result, "reused": True}
    if tok is None:
        trained = train_pieces(train(cutter=Cutter(CUT, [EOT])), vocab_size, [EOT],
                               num_processes=num_processes, progress=Progress("count", 0, show))
        tok = BPETokenizer(*trained, [EOT])
        log(f"{out}/tokenizer.json: {tok.vocab_size:,} tokens trained in {time.monotonic() - begin:.1f} s")
    tok.save(out / "tokenizer.json")
    for path, pieces in zip(result.values(), (train, held)):
        info = encode_pieces(tok, pieces(cutter=Cutter(tok.cut)), path, num_processes,
                             Progress("encode", 0, show), inputs=inputs)
        log(summary(path, info))
    return {"tokenizer": tok, **result, "reused": False}


GITHUB = "https://raw.githubusercontent.com/"
HUB = "https://huggingface.co/datasets/"
CORPORA = {                                          # name: training file, validation file
    "tinyshakespeare": [f"{GITHUB}karpathy/char-rnn/master/data/tinyshakespeare/input.txt"],
    "tinystories": [f"{HUB}roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-{p}.txt"
                    for p in ("train", "valid")],
    "owt": [f"{HUB}stanford-cs336/owt-sample/resolve/main/owt_{p}.txt.gz" for p in ("train", "valid")],
    "fineweb-edu": [f"{HUB}HuggingFaceFW/fineweb-edu/resolve/main/sample/10BT/000_00000.parquet"],
}


def fetch(name, out="out/corpus", progress=False):
    """Downloads a public corpus into a folder -> [training file] or [training file, validation file], ready
    for prepare. OSError: what to do without a network."""
    if name not in CORPORA:
        raise ValueError(f"corpus {name!r} is unknown; there are {', '.join(CORPORA)}")
    files = []
    for url in CORPORA[name]:
        path = Path(out, f"{name}-{url.rsplit('/', 1)[1]}")
        text = path.with_suffix(".jsonl.gz") if path.suffix == ".parquet" else path
        if not text.exists() and not path.exists():
            download(url, path, progress)
        if not text.exists():
            parquet_to_jsonl(path, text)
        files.append(text)
    return files


def download(url, path, progress=False):
    """url -> path. What came before an interruption stays in path.part, and the next call goes on there. The
    length, and the sha256 if the server names it, are checked before the file gets its name."""
    import http.client
    import urllib.request
    answers = []                                     # headers, from the first redirection to the file itself

    class Redirection(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, request, body, code, message, headers, location):
            answers.append(headers)
            return super().redirect_request(request, body, code, message, headers, location)

    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.build_opener(Redirection).open(request, timeout=30) as response:
            # 200: the server begins at the beginning
            have = have if response.status == 206 else 0
            answers.append(response.headers)
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else 0
            bar = Progress(path.name, total, progress)
            with open(part, "ab" if have else "wb") as f:
                while block := response.read(BLOCK):
                    f.write(block)
                    bar(f.tell())
            bar.close()
    except (OSError, http.client.HTTPException) as e:                     # urllib's errors are OSErrors
        # 416, no bytes after the .part: it is complete or of another file, nobody can tell; begin anew
        if getattr(e, "code", None) == 416:
            part.unlink()
        raise OSError(f"{url}: cannot be fetched ({e}). With a network run this again, it goes on where it "
                      f"stopped; or put the file at {path}; or use a text of your own: --data FILE") from None
    have = part.stat().st_size
    if total and have != total:
        raise OSError(f"{url}: {have:,} of {total:,} bytes came; run this again to go on")
    with open(part, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    # the hub's name for the sha256 of a large file; an ETag may be any hash
    wanted = [headers["X-Linked-ETag"].strip('"') for headers in answers if "X-Linked-ETag" in headers]
    if wanted and digest != wanted[0]:
        part.unlink()
        raise OSError(f"{url}: sha256 is {digest}, should be {wanted[0]}; removed, run this again")
    os.replace(part, path)


def parquet_to_jsonl(path, out):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path} is a parquet file: pip install pyarrow, then run this again") from None

    def write(f):
        with gzip.open(f, "wt", encoding="utf-8") as z:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000, columns=["text"]):
                z.writelines(json.dumps({"text": text}) + "\n" for text in batch.column(0).to_pylist())
    write_atomic(out, write)


# --- 10. accounting and demo ----------------------------------------------------------------------

PILE_BYTES = 825 * 2**30                             # Gao et al. 2020, arXiv 2101.00027


def compression_ratio(text, ids):
    """UTF-8 bytes per id. The model's sequence is that many times shorter than the bytes."""
    return len(text.encode()) / max(1, len(ids))


SAMPLES = {
    "English": "A tokenizer decides what the model sees: a word it has met is one id, a new one falls apart.",
    "Python": "def total(values):\n    n = 0.0\n    for value in values:\n        n += value\n    return n\n",
    "Russian": "Токенизатор решает, что увидит модель: знакомое слово станет числом, новое распадётся.",
    "Chinese": "分词器决定模型看到什么：见过的词成为一个编号，没见过的词会被拆开。",
    "emoji": "Hello, 🌍! 你好! 👩‍🚀🚀✨",
}


def timed(work):
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def docstrings(files):
    """The docstrings of each file: the prose in the code."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for path in files:
        nodes = ast.walk(ast.parse(path.read_bytes()))
        found = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
        if any(found):
            yield "\n\n".join(filter(None, found))


def first_merges(tok, size):
    """The tokenizer of `size` ids that the same training would have given: bytes, EOT, the first merges."""
    merges = tok.merges[:size - 257]
    return BPETokenizer(make_vocab(merges, [EOT]), merges, [EOT])


def demo(out=Path("out")):
    """The lecture's claims, measured on the embedded corpus."""
    out.mkdir(parents=True, exist_ok=True)
    train, val = split_files(corpus_files())
    texts, held = list(read_documents(train)), "".join(read_documents(val))
    whole, held_prose = "".join(texts), "\n".join(docstrings(val))
    print(f"The Python standard library: {len(train)} files, {len(whole) / 1e6:.1f} MB; held out: {len(val)}")

    naive_s, naive = timed(lambda: train_bpe_naive(whole[:130_000], 500, [EOT]))
    fast_s, fast = timed(lambda: train_pieces([(whole[:130_000], True)], 500, [EOT], num_processes=1))
    print(f"1  {len(fast[1])} merges of 130 kB: naive {naive_s:.2f} s | incremental {fast_s:.2f} s | "
          f"{naive_s / fast_s:.0f}x | identical merges: {naive == fast}")

    large, prose = (BPETokenizer(*train_pieces(((d, True) for d in documents), size, [EOT]), [EOT])
                    for documents, size in ((texts, 16384), (docstrings(train), 4096)))
    code, words = first_merges(large, 4096), WordTokenizer("".join(texts[:200]))
    print(f"2  bytes an id; {words.vocab_size:,} words and {code.vocab_size:,} ids of BPE, of Python source\n"
          f"              character      byte      word       BPE   words unknown   BPE gives it back")
    for name, text in SAMPLES.items():
        ids = [tok.encode(text) for tok in (CharacterTokenizer(), ByteTokenizer(), words, code)]
        ratios = "".join(f"{compression_ratio(text, i):10.2f}" for i in ids)
        print(f"   {name:10}{ratios}{ids[2].count(0) / len(ids[2]):16.0%}   {code.decode(ids[3]) == text}")

    # trained on one kind of text, used on another: the vocabulary is the training text's
    print("3  trained on        on code  on docstrings   bytes per id of held-out text; longest tokens")
    for name, tok in (("code", code), ("docstrings", prose)):
        tokens = sorted((tok.decode([i]) for i in tok.vocab if i > 256), key=len, reverse=True)
        ratios = "".join(f"{compression_ratio(text, tok.encode(text)):15.2f}" for text in (held, held_prose))
        print(f"   {name:10}{ratios}   {' '.join([t for t in tokens if t.strip().isalpha()][:3])}")

    text = whole[:4_000_000]                         # no text twice: the first pass must meet new words
    cold, ids = first_merges(large, 4096), np.array(code.encode(text))
    print("4  one process                          MB/s    hours for the Pile")
    for name, work in (("encode, first time", lambda: cold.encode(text)),
                       ("encode, words known", lambda: cold.encode(text)),
                       ("decode", lambda: cold.decode_bytes(ids))):
        rate = len(text.encode()) / timed(work)[0]
        print(f"   {name:25}{rate / 1e6:16.1f}{PILE_BYTES / rate / 3600:22.1f}")
    demo_vocab_sizes(large, held, out)


def demo_vocab_sizes(tok, text, out):
    """The first merges of a large vocabulary are a smaller one, so one training gives the whole curve."""
    sizes = [size for size in (257, 512, 1024, 2048, 4096, 8192, 16384) if size <= tok.vocab_size]
    ratios = [compression_ratio(text, first_merges(tok, size).encode(text)) for size in sizes]
    print("5  ids -> bytes per id:", " | ".join(f"{s:,} {ratio:.2f}" for s, ratio in zip(sizes, ratios)))
    try:
        import matplotlib
    except ImportError:
        print("   no plot: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.semilogx(sizes, ratios, "o-", base=2)
    axes.set(xlabel="vocabulary size", ylabel="bytes per id", title="BPE on held-out Python source")
    axes.grid(alpha=0.3)
    figure.savefig(out / "bpe.png", dpi=120, bbox_inches="tight")
    print(f"   {out / 'bpe.png'}")


# --- 11. the command line -------------------------------------------------------------------------

def check_writable(folder):
    """Before the work, not after it."""
    near = next(p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if p.exists())
    if not near.is_dir() or not os.access(near, os.W_OK):
        raise OSError(f"{folder}: cannot be written, {near} is no folder or not writable; give another --out")


def run_train(a):
    check_writable(a.out)
    path, begin = Path(a.out, "tokenizer.json"), time.monotonic()
    special = a.special if EOT in a.special else [EOT, *a.special]
    size = a.vocab_size or VOCAB_SIZE
    vocab, merges = train_bpe(text_files(a.data), size, special, pattern=PATTERNS[a.pattern],
                              num_processes=a.processes, errors=a.errors, progress=True)
    BPETokenizer(vocab, merges, special, PATTERNS[a.pattern]).save(path)
    few = f" (of {size:,}: the text has no more pairs)" if len(vocab) < size else ""
    longest = max(vocab.values(), key=len)
    print(f"{path}: {len(vocab):,} tokens{few} in {time.monotonic() - begin:.1f} s, longest {longest!r}")


def run_encode(a):
    tok = load_tokenizer(a.tokenizer)
    if a.data == ["-"]:
        if a.out:
            raise ValueError(f"--data - writes ids to stdout: drop --out {a.out}")
        # as in a file, EOT stands between documents and any other special token is text
        text, special = sys.stdin.buffer.read().decode("utf-8", a.errors), {EOT} & tok.special_tokens.keys()
        print(*tok.encode(text, special))
        return
    if not a.out:
        raise ValueError("--out is missing: name the token file to write, as in --out out/train.bin")
    check_writable(Path(a.out).parent)
    print(summary(a.out, encode_files(tok, text_files(a.data), a.out, a.processes, True, a.errors)))


def run_decode(a):
    tok = load_tokenizer(a.tokenizer)
    try:
        ids = load_tokens(a.file, tok) if a.file else np.array(sys.stdin.read().split(), np.int64)
    except OverflowError as e:
        raise ValueError(f"an id on stdin is out of range ({e})") from None
    for block in slices(ids):
        sys.stdout.buffer.write(tok.decode_bytes(block))


def run_show(a):
    tok = load_tokenizer(a.tokenizer)
    if a.text is not None:
        ids = tok.encode(a.text)
        print("".join(f"[{tok.decode([i], 'backslashreplace')}]" for i in ids))
        print(*ids)
        print(f"{len(ids)} ids, {compression_ratio(a.text, ids):.2f} bytes per id")
        return
    longest = sorted(tok.vocab.values(), key=len, reverse=True)[:10]
    print(f"{tok.vocab_size:,} ids, {len(tok.merges):,} merges, hash {tok.hash()}\n"
          f"special tokens {tok.special_tokens}\npattern {tok.pattern}")
    print("longest:", *(repr(token.decode(errors="replace")) for token in longest))


def run_prepare(a):
    check_writable(a.out)
    if a.corpus and a.data:
        raise ValueError(f"--corpus {a.corpus} and --data {' '.join(a.data)} are two sources: give one")
    if a.tokenizer and a.vocab_size:
        raise ValueError(f"--vocab_size {a.vocab_size}: the tokenizer of {a.tokenizer} has its own; drop one")
    data, val = a.data, a.val
    if a.corpus:
        data, *rest = fetch(a.corpus, Path(a.out, "corpus"), progress=True)
        val = val or rest
    prepare(a.out, data, val, a.vocab_size or VOCAB_SIZE, a.processes, a.errors, a.tokenizer)


def run_fetch(a):
    check_writable(a.out)
    print(*fetch(a.name, a.out, progress=True), sep="\n")


class Parser(argparse.ArgumentParser):
    """A mistake is one line, exit status 2; no flag may be shortened."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"bpe.py: error: {message}; see {self.prog} -h\n")


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


VOCAB_SIZE = 4096
FLAGS = {
    "--data": dict(nargs="+", metavar="PATH", help="text files or folders (.txt .md .py .jsonl .gz ...)"),
    "--val": dict(nargs="+", metavar="PATH", help="validation text (default: 5%% of the data)"),
    "--corpus": dict(choices=CORPORA, help="fetch a public corpus and use it instead of --data"),
    "--tokenizer": dict(metavar="FILE", help="a tokenizer.json"),
    "--vocab_size": dict(type=positive, metavar="N", help=f"number of ids (default {VOCAB_SIZE})"),
    "--pattern": dict(choices=PATTERNS, default="gpt2", help="regex of pre-tokens (default gpt2)"),
    "--special": dict(nargs="*", default=[EOT], metavar="TOKEN", help=f"special tokens; {EOT} always is one"),
    "--out": dict(metavar="PATH", help="folder (train, prepare, fetch) or .bin file (encode) to write"),
    "--processes": dict(type=positive, metavar="N", help="worker processes (default: one a core)"),
    "--errors": dict(choices=("strict", "replace"), default="strict",
                     help="invalid UTF-8 is an error (default), or becomes U+FFFD"),
    "--text": dict(metavar="TEXT", help="a text to cut into tokens (default: show the vocabulary)"),
    "file": dict(nargs="?", metavar="FILE.bin", help="token file (default: ids on stdin)"),
    "name": dict(choices=CORPORA, help="corpus"),
}
COMMANDS = {                                         # name: (function, flags, ! if required, what it does)
    "train": (run_train, "--data! --vocab_size --out! --pattern --special --processes --errors",
              "text -> tokenizer.json"),
    "encode": (run_encode, "--tokenizer! --data! --out --processes --errors",
               f"text -> token file; with --data - text on stdin -> ids on stdout; special is {EOT} alone"),
    "decode": (run_decode, "--tokenizer! file", "token file, or ids on stdin -> text"),
    "show": (run_show, "--tokenizer! --text", "a vocabulary, or a text cut into its tokens"),
    "prepare": (run_prepare, "--data --corpus --val --vocab_size --tokenizer --out! --processes --errors",
                "text (default: the standard library) -> tokenizer.json, train.bin, val.bin"),
    "fetch": (run_fetch, "name --out!", "download a public corpus"),
}


def parse_args(argv):
    parser = Parser(prog="python bpe.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage="%(prog)s [command] [--flag value ...]   (without a command: the lecture)")
    commands = parser.add_subparsers(dest="command", metavar="|".join(COMMANDS))
    for name, (run, flags, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        for flag in flags.split():
            required = {"required": True} if flag.endswith("!") else {}
            command.add_argument(flag.rstrip("!"), **FLAGS[flag.rstrip("!")], **required)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)

    def stop(*_):                                    # a SIGTERM then cleans up as Ctrl-C does
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGTERM, stop)
    try:
        args.run(args) if args.command else demo()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nbpe.py: interrupted; unfinished output is removed (a download is kept): run it again",
              file=sys.stderr)
        return 130
    except BrokenPipeError:                          # the reader of our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (ValueError, OSError) as e:
        print("bpe.py: error:", " ".join(str(e).split()), file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
