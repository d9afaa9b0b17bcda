"""data.py - lectures 13-14: data.

What   Crawl files as they are -> text -> what is worth reading, once -> token files for train.py. Every
       filter is an estimate, a score and a bound; every stage says what it lost and how fast it was.
Why    Most of the web is not worth a model's time: DCLM kept 3.8 of 240 trillion tokens. `prove` measures
       what leaving it out is worth: the same model at equal tokens on raw, filtered and deduplicated pages of
       a crawl in which all rubbish was planted and is labelled, so each filter's errors are counted, too.

Equations
       language        argmax over languages of the sum of log p(n-gram | language)
       classifier      p = softmax(W mean(E[words and pairs]))
       Kneser-Ney      p(w|h) = max(c(hw) - D, 0) / c(h) + backoff(h) p(w|h'); perplexity 10^(-log10 p/words)
       DSIR            log weight = sum over features of log p_target - log p_raw;  k largest + Gumbel noise
       MinHash         P(min h(A) = min h(B)) = J = |A and B| / |A or B|;  error of k of them sqrt(J(1-J)/k)
       LSH             P(a pair is compared) = 1 - (1 - J^r)^b
       Bloom filter    P(false yes) = (1 - (1 - 1/m)^(kn))^k,  least at k = ln 2 m/n

Run    python data.py                                     # this lecture, a minute on two cores; a plot
       python data.py run --data crawl/ --out out/web     # WARC, WET, .jsonl, .txt -> funnel, token files
       torchrun --nproc_per_node=8 data.py run --data crawl/ --out out/web     # the same result
       python data.py prove                               # 13 CPU minutes: is the model better for it?
       python data.py classify --train labels.txt --model out/quality.npz      # "__label__high a text" a line
       python data.py dedup --by lines --data a.txt b.txt --out out/lines
       python data.py mix --data web=a.jsonl code=b.jsonl --stages 0.9:web=8,code=2 0.1:code=1
       python train.py --data out/web                     # read what `run` wrote

You should see (CPU; shortened)
       stage            documents    lost   share       MB  MB_lost  tokens_lost       s    docs/s
       read                   952       2    0.2%     0.80     0.00            0     1.1       871
       language               950      75    7.9%     0.80     0.08       19,118     0.6     1,475
       rules                  875     201   23.0%     0.72     0.18       41,798     1.0       841
       quality                674     212   31.5%     0.54     0.15       33,992     0.9       775
       evaluation             462      73   15.8%     0.39     0.11       25,221     0.2     2,482
       exact copies           389      98   25.2%     0.29     0.07       16,691     1.4       279
       near copies            291      23    7.9%     0.21     0.02        3,660     0.1     2,200
       planted   should go at   pages    gone   where
       good      -                292   33.9%   kept 193, a copy 62, quality 23, rules 14
       shuffled  quality           73   90.4%   quality 64, kept 7, rules 2
       filters: precision 0.895; duplicates: recall 0.976, precision 1.000 (124 spare copies, 3 left, ...
                                                             predicted  measured
       pairs of J = 0.8 that share one of 14 bands of 8          0.924     0.927
       error of the estimate from 112 MinHashes, J = 0.9        0.0283    0.0283
       false positives of a Bloom filter for 0.01              0.01004   0.00945
       and from `prove`, bits per byte of held-out text after 300,000 tokens, means of 3 seeds (no two ranges
       meet): raw 1.902, filtered 1.884, deduplicated, too 1.831

Outline  1 WARC     2 HTML to text     3 language     4 personal data     5 rules     6 classifier
         7 n-gram model     8 importance resampling     9 duplicates     10 decontamination, mixing
         11 the pipeline     12 planted rubbish, and the proof     13 demo and command line     14 sentences
         On a first reading: 2, 5, 9, 11.

Notes    Tokens: the Pile 275 billion, LLaMA 1.4 trillion, Dolma 3, Nemotron-CC 6.3, FineWeb 15. Pages that a
         model rephrased or turned into questions and answers are one more source for `mix`. Whoever
         can edit pages just before a crawl can plant text in every model (poisoning). robots.txt says who may
         fetch, a licence who may copy, fair use is judged case by case: no filter here does that for you.

References  Rae et al. 2021 (Gopher), Raffel et al. 2020 (C4), Wenzek et al. 2020 (CCNet), Joulin et al. 2016
         (fastText), Chen & Goodman 1998, Heafield et al. 2013 (Kneser-Ney, KenLM), Xie et al. 2023 (DSIR),
         Broder 1997 (MinHash), Bloom 1970, Lee et al. 2022 (deduplication), Li et al. 2024 (DCLM).
"""
import argparse
import contextlib
import datetime
import functools
import gzip
import hashlib
import html
import itertools
import json
import math
import mmap
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

import bpe                                           # torch is imported by the ranks of `run` alone

MAX_RECORD = 10 << 20                                # bytes kept of a record or document; longer ones are cut
MAX_PAGE = 5 << 20                                   # bytes of HTML read, characters of text kept, a document
MAX_HEAD = 1 << 16                                   # bytes of WARC fields; real ones have under 2 kB
MAX_SKIP = 64 << 20                                  # bytes inflated only to be thrown away, a gzip member
MAX_WASTE = 1 << 28                                  # bytes read in vain, a file; then the rest is given up
MAX_TAGS = 300_000                                   # tags read of a page; real ones have a few thousand
CODE, MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)       # odd, their bits well spread
# Accents, points, vowel signs from Latin to Tibetan, but for Thai and Lao: \w alone cuts Hindi at each one.
MARKS = "".join(c for c in map(chr, (*range(0x300, 0xE00), *range(0xF00, 0x1000)))
                if unicodedata.category(c)[0] == "M")
WORD = re.compile(rf"[\w{MARKS}]+|[^\w\s]")           # a word or a sign


def ngram_hashes(values, longest):
    """64-bit hashes of all n-grams of an array, n = 1 .. longest, one array each, with no loop over the text.

    Languages, repetition, importance weights, MinHash and decontamination all see text as these numbers."""
    codes = values.astype(np.uint64) * CODE          # wraps around: arithmetic modulo 2^64
    h = codes
    yield h
    for n in range(1, longest):
        h = h[:-1] * MIX ^ codes[n:]                 # the hash of n+1 from that of the first n
        yield h


def word_ngrams(words, n):
    """The hashes of the word n-grams alone, of this n."""
    for h in ngram_hashes(word_values(words), n):
        pass                                         # one array at a time: 10 MB of text have 5 million words
    return h


def word_values(words):
    """crc32 of each word: the same on every machine and in every run, as Python's salted hash() is not."""
    return np.fromiter((zlib.crc32(word.encode("utf-8", "replace")) for word in words), np.uint64)


def word_features(text, buckets):
    """The words and word pairs of a text as numbers below `buckets`: what a classifier and DSIR see of it."""
    hashes = np.concatenate(list(ngram_hashes(word_values(WORD.findall(text.lower())), 2)))
    return ((hashes >> np.uint64(20)) % np.uint64(buckets)).astype(np.int64)


# --- 1. WARC: the crawl as it is stored ---------------------------------------------------------------------
# A file of records: a line "WARC/1.0", "Name: value" lines, an empty line, Content-Length bytes, two line
# ends. In a .warc.gz every record is its own gzip member, so a reader can begin at any of them. Three kinds
# of file: WARC holds what servers sent (HTTP head and body), WET its text, WAT its metadata as JSON.

GZIP = b"\x1f\x8b\x08"                               # how a gzip member begins


class Record(NamedTuple):
    type: str              # warcinfo, request, response, conversion (in a WET), metadata (in a WAT), damaged
    url: str
    headers: dict          # WARC fields, names in lower case
    head: bytes            # what an HTTP server sent before the body
    body: bytes
    flaw: str              # "", or what was wrong: cut, truncated, Content-Length, damaged

    @property
    def http(self):        # only when asked for: it is a third of the time a record takes
        return header_fields(self.head)


def header_fields(head):
    """b"Name: value" lines after the first -> {name: value}."""
    lines = head.decode("utf-8", "replace").split("\n")[1:]
    return {name.strip().lower(): value.strip() for name, _, value in [line.partition(":") for line in lines]}


def read_warc(source, max_record=MAX_RECORD):
    """Every record of a path or binary file, plain or gzipped. Memory: one record, cut at max_record bytes.

    Nothing in a file ends the reading: a false Content-Length is corrected by looking for the next record, a
    damaged or cut gzip member is left for the next one, a bomb is inflated no further than it may grow."""
    if not isinstance(source, (str, os.PathLike)):
        raw = source.read()
    elif os.path.getsize(source):
        with open(source, "rb") as f:                # mapped: read only as far as it is looked at
            raw = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    else:
        raw = b""                                    # which mmap refuses
    at, wasted = 0, 0
    if raw[:2] != GZIP[:2]:
        while found := next_record(raw, at, True, max_record):
            record, at = found
            yield record
        return
    while (begin := raw.find(GZIP, at)) >= 0:
        held, start, count, grown = b"", 0, 0, 0     # start: of the next record in `held`, or behind its end
        for data, at, state in inflate(raw, begin, max_record + MAX_HEAD):
            held += data
            grown += len(data)
            while start < len(held) and (found := next_record(held, start, state != "", max_record)):
                record, start = found
                count += 1
                yield record
            held, start = held[start:], max(0, start - len(held))
            if start > MAX_SKIP:                     # a claim, or a bomb: the next member is the next record
                break
        if state in ("damaged", "truncated"):        # it may have swallowed the next: look behind its head
            wasted += grown + at - begin + (1 << 14)                     # what came out, what went in
            at = begin + 1
            if not count or wasted > MAX_WASTE:
                yield Record("damaged", "", {}, b"", b"", f"gzip member {state}")
            if wasted > MAX_WASTE:                   # nothing but damage: the rest of the file is given up
                return


def inflate(raw, at, limit):
    """One gzip member in pieces of `limit` bytes at most: (data, where the input stands, how it ended)."""
    member, spent, step, state = zlib.decompressobj(31), 0, 1 << 14, ""
    while not state:
        fed = raw[at:at + step]                      # short at first: what follows the member is copied back
        try:
            data = member.decompress(fed, limit)
        except zlib.error:
            yield b"", at, "damaged"
            return
        at += len(fed) - len(member.unused_data if member.eof else member.unconsumed_tail)
        spent, step = spent + len(data), min(2 * step, 1 << 20)
        if member.eof:
            state = "end"
        elif not fed and not data:
            state = "truncated"
        elif spent > limit + MAX_SKIP:
            state = "cut"
        yield data, at, state


def next_record(buf, at, final, max_record):
    """(Record, where the next one begins) or None: nothing is left, or (not final) more bytes are needed."""
    at = buf.find(b"WARC/1.", at)
    end = buf.find(b"\r\n\r\n", at)
    if at < 0 or end < 0:
        return None
    if end - at > MAX_HEAD:                          # no head is that long: it begins at the last start
        at = buf.rfind(b"WARC/1.", at, end)
    fields, start, size = header_fields(buf[at:end]), end + 4, len(buf)
    claim = re.fullmatch("[0-9]{1,15}", fields.get("content-length", ""))
    stop = start + int(claim[0]) if claim else -1
    if claim and not final and size < min(stop, start + max_record) + 4:
        return None
    seen, flaw = stop + 4 <= size, ""
    if not claim or (buf[stop:stop + 4] != b"\r\n\r\n" if seen else final and stop != size):
        following = buf.find(b"\r\n\r\nWARC/1.", start)
        if following < 0 and not final and size - start < max_record:
            return None
        flaw = "Content-Length" if seen or following >= 0 else "truncated"
        stop = following if following >= 0 else size - 4 * (buf[size - 4:size] == b"\r\n\r\n")
    if stop - start > max_record:
        flaw = f"cut at {max_record:,} bytes"
    head, body, kind = b"", buf[start:min(stop, start + max_record)], fields.get("warc-type", "")
    if kind == "response" and body[:5] == b"HTTP/":
        head, _, body = body.partition(b"\r\n\r\n")
    return Record(kind, fields.get("warc-target-uri", ""), fields, head, body, flaw), stop + 4


def payload(record, limit=MAX_RECORD):
    """(the body with the transfer's packing undone: chunks joined, gzip inflated, at most `limit` bytes; ""),
    or (b"", "packed as br") where that cannot be undone."""
    body, http = record.body, record.http
    if "chunked" in http.get("transfer-encoding", "").lower():
        body = dechunk(body)
    packing = http.get("content-encoding", "").lower()
    if packing in ("", "identity") or not re.search(rb"[\0-\x08\x10-\x1a]", body[:1000]):
        return body, ""                              # crawlers often unpack it and leave the field
    for bits in (47, -15) if packing in ("gzip", "x-gzip", "deflate") else ():
        with contextlib.suppress(zlib.error):        # gzip or zlib; or deflate without a head, as some do
            return zlib.decompressobj(bits).decompress(body, limit), ""
    return b"", f"packed as {packing}"


def dechunk(body):
    """b"4\\r\\nWiki\\r\\n0\\r\\n\\r\\n" -> b"Wiki"; a body that is not chunked comes back as it is."""
    at, parts = 0, []
    while (end := body.find(b"\r\n", at, at + 64)) >= 0:
        size = re.match(rb"([0-9a-fA-F]{1,8})\s*(?:;|$)", body[at:end])
        if not size:
            break
        size = int(size[1], 16)
        parts.append(body[end + 2:end + 2 + size])
        at = end + 4 + size
    return b"".join(parts) if parts else body


def warc_record(kind, url, body, http=b"", packed=True):
    """The bytes of one record, as one gzip member if packed: for tests, demos and your own crawls."""
    content = http + b"\r\n\r\n" + body if http else body
    media = "application/http" if http else "text/plain"
    head = (f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nContent-Type: {media}\r\n"
            f"Content-Length: {len(content)}\r\n\r\n")
    data = head.encode() + content + b"\r\n\r\n"
    return gzip.compress(data, 6, mtime=0) if packed else data


# --- 2. HTML to text ----------------------------------------------------------------------------------------
# One regex cuts a page into text and tags, one loop walks over them. Each alternative, once begun, runs to
# its end or to the end of the page and never gives back a character (*+ and ++ are possessive): time is
# linear on any input. A parser that builds a tree is quadratic on some pages, or runs out of stack, and the
# tree is not wanted. PDF, Word and e-book files need a tool of their own first (pdftotext, pandoc); their
# text goes in as .txt.

# What is not ">" or "=", or an "=" and a value that quotes may enclose.
ATTRIBUTES = r"""(?:[^>=]++|=\s*+(?:"[^"]*+(?:"|\Z)|'[^']*+(?:'|\Z))?+)*+"""
TAG = re.compile(
    r"<(?:!--(?:[^-]++|-(?!->))*+(?:-->|\Z)"         # a comment; then elements without markup inside
    r"|(?i:(script|style|noscript|template|iframe|textarea|title|select|object|svg|canvas|xmp)"
    rf"(?=[\s/>]){ATTRIBUTES}(?:>[^<]*+(?:<(?!/\1[\s/>])[^<]*+)*+(?:</\1{ATTRIBUTES}(?:>|\Z)|\Z)|\Z))"
    rf"|(/?[a-zA-Z][^\s/>]*+)({ATTRIBUTES})(?:>|\Z)"  # any other tag: its name, its attributes
    r"|[!?/][^>]*+(?:>|\Z))")                        # <!DOCTYPE html>, <?xml ?>, </>
# What hides an element, or says that it is no part of the text: HIDDEN is a quick look for such words in a
# page or a tag, HIDING what the value of an attribute must hold.
HIDDEN = re.compile(r"""(?i)\shidden(?=[\s=/>]|\Z)|display\s*:\s*none|visibility\s*:\s*hidden"""
                    r"""|aria-hidden\s*=\s*["']?true"""
                    r"""|role\s*=\s*["']?(?:navigation|search|banner|contentinfo)""")
HIDING = {"hidden": "", "aria-hidden": "^true", "role": r"^(?:navigation|search|banner|contentinfo)(?:\s|$)",
          "style": r"(?<![\w-])(?:display\s*:\s*none|visibility\s*:\s*hidden)"}
ATTRIBUTE = re.compile(r"""([^\s=/]++)(?:\s*+=\s*+(?:"([^"]*+)"?|'([^']*+)'?|(\S*+)))?+""")      # name, value
# Characters that no page may hold stand for layout until the white space of the source is collapsed:
LINE, PARAGRAPH, BREAK, BLANK, TAB, ITEM = "\x01\x02\x03\x04\x05\x06"
BLOCKS = {**dict.fromkeys("p h1 h2 h3 h4 h5 h6 table".split(), PARAGRAPH), "br": BREAK, "td": TAB, "th": TAB,
          **dict.fromkeys("address article blockquote body caption center dd details dir div dl dt fieldset "
                          "figcaption figure form head header hgroup hr html legend li main menu ol option "
                          "pre section summary tbody tfoot thead tr ul".split(), LINE)}
LAYOUT = {**BLOCKS, **{"/" + name: mark for name, mark in BLOCKS.items() if name not in ("td", "th", "br")}}
BOILERPLATE = {"nav", "footer", "aside", "button", "dialog", "audio", "video", "math"}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}
ENDS_AT_NEXT = {"p", "li", "td", "dd", "dt", "tr"}   # elements that end where the next of their kind begins
CONTROLS = re.compile("[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")                  # \x85 is a line end
GAP = re.compile(f"[{LINE}{PARAGRAPH}{BREAK}][ {TAB}{LINE}{PARAGRAPH}{BREAK}]*")


def html_to_text(page):
    """Markup -> text: paragraphs and headings apart by an empty line, "  \u2022 " items, cells apart by tabs;
    title, scripts, navigation, asides, buttons, dialogs, form fields, images (and SVG), formulas (MathML) and
    hidden elements dropped; white space collapsed outside <pre>."""
    page = CONTROLS.sub("", page) if CONTROLS.search(page) else page
    if page.count("<") > MAX_TAGS:                   # hostile: a second and 100 MB are enough for one page
        page = page[:-len(page.split("<", MAX_TAGS)[-1]) - 1]
    pieces = TAG.split(page)                         # text, raw element, name, attributes, text, ...
    out, lists, pre, may_hide = [pieces[0]], [], False, HIDDEN.search(page)
    skip, depth = "", 0                              # the element being left out, and how deep in its like
    for name, attributes, text in zip(pieces[2::4], pieces[3::4], pieces[4::4]):
        name = (name or "").lower()                  # "" is a comment or a script
        if skip:
            if name.lstrip("/") != skip:
                continue
            depth += 1 if name[0] != "/" and skip not in ENDS_AT_NEXT else -1
            if depth:
                continue
            skip = ""
        suspect = may_hide and attributes and HIDDEN.search(attributes) and name[0] != "/"
        if name in BOILERPLATE or suspect and hides(attributes):
            if name not in VOID and not attributes.endswith("/"):
                skip, depth = name, 1
                continue
        mark = LAYOUT.get(name)
        if mark is None:                             # inline, as <b> and <a>: the text goes on
            out.append(text)
            continue
        out.append(mark)
        if name in ("li", "ul", "ol", "/ul", "/ol"):
            out.append(bullet(name, lists))
        elif name.endswith("pre"):
            pre = name == "pre"
        out.append(text.expandtabs(4).replace("\n", BREAK).replace(" ", BLANK) if pre else text)
    return tidy("".join(out))


def hides(attributes):
    """True for <p hidden>, but not for <p title="The hidden costs">, in which HIDDEN finds a word, too."""
    return any(name.lower() in HIDING and re.search(HIDING[name.lower()], "".join(value), re.I)
               for name, *value in ATTRIBUTE.findall(attributes))


def bullet(name, lists):
    """What a list tag prints. lists: one entry an open list, 0 or the number of the next item."""
    if name == "li":
        number = lists[-1] if lists else 0
        if number:
            lists[-1] += 1
        return BLANK * 2 * min(8, len(lists) or 1) + (f"{number}." if number else "\u2022") + ITEM
    if name[0] != "/":
        lists.append(int(name == "ol"))
    elif lists:
        lists.pop()
    return ""


def tidy(text):
    """Entities become characters only here, so that &lt;script&gt; stays text; then the white space: a run of
    layout is one line end, or an empty line where a paragraph or two <br> are in it."""
    def gap(match):
        return "\n\n" if PARAGRAPH in match[0] or match[0].count(BREAK) > 1 else "\n"
    text = re.sub("&#[0-9]{8,};?", "\ufffd", text)   # no character; int() refuses 4,301 digits with an error
    text = " ".join(html.unescape(text).split())
    text = re.sub(f"{ITEM}[ {LINE}{PARAGRAPH}{BREAK}]*", " ", text)      # <li><p>text: on the bullet's line
    text = re.sub(f"{TAB}[ {TAB}]*", "\t", GAP.sub(gap, text))
    text = text.replace(" \n", "\n").replace(" \t", "\t")
    return text.replace(BLANK, " ").strip("\n\t")


DECLARED = re.compile(rb"""(?i)<(?:meta[^>]{0,200}?charset|\?xml[^>]{0,80}?encoding)\s*=\s*["']?"""
                      rb"([\w-]{2,20})")
LEGACY = ("cp1252", "cp1251", "shift_jis", "euc_jp", "gb18030", "big5", "euc_kr", "iso8859_7", "cp1255",
          "cp1256", "cp1250", "iso8859_2", "koi8_u", "cp1254")           # the first of equals is taken


def decode(data, declared=""):
    """Bytes -> text; never fails. A byte order mark; UTF-16 by its zeros; UTF-8 if it is valid (98% of the
    web; other text hardly ever is by accident); what HTTP or the page declares; then the legacy code whose
    text looks most like a language."""
    for mark, code in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if data.startswith(mark):
            return data[len(mark):].decode(code, "replace")
    zeros = [data[i:2000:2].count(0) for i in (0, 1)]            # ASCII in UTF-16: every other byte is 0
    if max(zeros) > 5 * min(zeros) + len(data[:2000]) / 8:
        return data.decode("utf-16-le" if zeros[1] > zeros[0] else "utf-16-be", "replace")
    with contextlib.suppress(UnicodeDecodeError):
        return data.decode()
    found = DECLARED.search(data, 0, 2048)
    for name in (declared, found[1].decode() if found else ""):
        with contextlib.suppress(LookupError, ValueError):       # unknown, or the bytes do not fit
            if name and name.lower() not in ("utf-8", "utf8"):
                return data.decode(name).encode().decode()       # "unicode_escape" can give what is no text
    valid = data.decode("utf-8", "replace")
    if valid.count("\ufffd") * 50 < len(data.translate(None, bytes(range(128)))):
        return valid                                             # UTF-8 with a few bytes damaged
    best = max(LEGACY, key=lambda code: plausibility(data[:4000].decode(code, "replace")))
    return data.decode(best, "replace")


def extract_text(html_bytes, declared=""):
    """A page's bytes -> its text, or None if none is left. Longer than MAX_PAGE is cut."""
    return html_to_text(decode(html_bytes[:MAX_PAGE], declared)) or None


# --- 3. language --------------------------------------------------------------------------------------------
# Naive Bayes on character n-grams: log p(language | text) = sum over n-grams of log p(n-gram | language), up
# to a constant. The n-grams of a text are not independent (each letter is in ten of them), so the sum is ten
# times too sure of itself: a tenth of it makes scores that mean what they say.

ROWS = 1 << 16                                       # n-grams share rows by their hash


def letters(text):
    """Words in lower case, one blank around each. All Hangul count as one letter, so do all Han and all
    Katakana: there are too many to have met, and which of the three it is says enough."""
    text = text.lower()
    for script in ("[\uac00-\ud7a3]", "[\u4e00-\u9fff]", "[\u30a1-\u30ff]"):
        text = re.sub(script, script[1], text)
    return " " + " ".join(re.findall(rf"[^\W\d_]+(?:[{MARKS}]+[^\W\d_]*)*", text)) + " "


def ngram_rows(text):
    """The table's rows of all n-grams of 1 to 4 characters."""
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
    return (np.concatenate(list(ngram_hashes(codes, 4))) >> np.uint64(48)).astype(np.int64)


def language_samples():
    """[(code, text)] of SENTENCES, at the end of this file."""
    return re.findall(r"^(\w\w): (.*?)(?=^\w\w: |\Z)", SENTENCES, re.M | re.S)


@functools.cache
def language_table():
    """(codes, log p(row | language) of shape (ROWS, languages), every letter met): 0.1 s at first use."""
    samples = language_samples()
    counts = np.full((ROWS, len(samples)), 0.01)     # what was not met is unlikely, not impossible
    for column, (_, text) in enumerate(samples):
        rows, times = np.unique(ngram_rows(letters(text)), return_counts=True)
        counts[rows, column] += times
    common = map(chr, (*range(0xDF, 0x100), *range(0x3041, 0x3100)))     # Latin with accents; Kana
    known = {*" ".join(text for _, text in samples).lower(), *common, *"“”’–…«»"}
    return [code for code, _ in samples], np.log(counts / counts.sum(0)).astype(np.float32), known


def language_scores(text):
    """A tenth of the log likelihood of each language, (languages,)."""
    return language_table()[1][ngram_rows(letters(text))].sum(0) / 10


def identify_language(text, model=None):
    """text -> (code, score in 0..1). "und" (undetermined) if there are no letters, or none of a known script.

    model: what load_lid returned, for 176 languages. Reliable from about 60 characters on; short lines,
    code and formulas are not a language and get one all the same, often with a low score."""
    text = text[:1000]                               # the beginning decides
    if model:
        return model(text)
    sample, (codes, _, known) = [c for c in text if c.isalpha()][:200], language_table()
    if 2 * sum(c.lower() in known or "\u4e00" <= c <= "\ud7a3" for c in sample) <= len(sample):
        return "und", 0.0
    scores = language_scores(text)
    best = int(scores.argmax())
    return codes[best], float(1 / np.exp(scores - scores[best]).sum())


def plausibility(text):
    """How much a decoding looks like a language, for decode: its score, less something for Han and Hangul,
    which `letters` makes too easy, and for a Latin letter beside one from Greek to Arabic ("cafй" is cp1252
    read as cp1251), and much for every character never met."""
    known = language_table()[2]
    strange = sum(7 if c not in known else 2 * ("\u4e00" <= c <= "\ud7a3")
                  for c in text.lower() if not c.isascii())
    mixed = len(re.findall("[a-z][\u0370-\u06ff]|[\u0370-\u06ff][a-z]", text.lower()))
    return language_scores(text).max() - strange - 2 * mixed


def load_lid(path):
    """fastText's lid.176.bin or .ftz as a model for identify_language; it needs the fasttext package."""
    try:
        import fasttext
    except ImportError:
        raise ValueError(f"--lid176 {path}: it takes  pip install fasttext-wheel  to read it; "
                         f"without --lid176 28 languages are built in") from None
    model = fasttext.load_model(str(path))           # ValueError if it is no such file

    def classify(text):                              # .f is the C++ object: its wrapper fails with numpy 2
        found = model.f.predict(" ".join(text.split()) + "\n", 1, 0.0, "replace")
        return (found[0][1].removeprefix("__label__"), min(1.0, found[0][0])) if found else ("und", 0.0)
    return classify


# --- 4. personal data ---------------------------------------------------------------------------------------
# These masks find shapes, not meanings: a part number that looks like a phone number goes, an address in
# words stays. Every pattern bounds what it reads in vain, so 1 MB of "a@a@a@" or "1-1-1-" costs a tenth of a
# second; ([\w.]+)+@ would take hours. Nothing begins or ends at a mask: what is masked once stays masked.

def at_digit(pattern):
    """Tried only where a digit, "+" or "(" stands: re looks for characters many times faster than for more.
    Group 1 is the match; as the rest has no length, matches may overlap."""
    return re.compile(rf"[+(0-9](?<=(?=({pattern})).)")


LOCAL = re.compile(r"[\w.%+-]{1,65}")                # before the "@", and read backwards from it
DOMAIN = re.compile(r"@(?<=[\w.%+-]@)(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?\.){1,8}"
                    r"[a-zA-Z]{2,24}(?![\w@-])")
# North America: (283) 182-3829, 283-182-3829, 283.182.3829, 2831823829, +1 before any of them; elsewhere:
# "+", a country code and 2 to 6 groups.
PHONE = at_digit(r"(?<![\w.@/+-])(?<!\|\|\|)(?:"
                 r"(?:\+?1[ .-]?)?(?:\([0-9]{3}\)[ .-]{0,2}|[0-9]{3}[ .-]?)[0-9]{3}[ .-]?[0-9]{4}"
                 r"|\+[1-9][0-9]{0,2}(?:[ .-]?(?:\([0-9]{1,4}\)|[0-9]{1,4})){2,6}"
                 r")(?![\w@-]|\.[0-9]|\|\|\|)")
OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
IPV4 = at_digit(rf"(?<![\w.-])(?<!\|\|\|)(?:{OCTET}\.){{3}}{OCTET}(?![\w-]|\.[0-9]|\|\|\|)")
IPV6 = re.compile(r"(?<![\w:.])(?<!\|\|\|)[0-9a-fA-F:]{3,39}(?![\w:]|\|\|\|)")
CARD = at_digit(r"(?<![\w.-])(?<!\|\|\|)[3-6][0-9]{3}(?:[ -]?[0-9]){11,12}(?![\w-]|\.[0-9]|\|\|\|)")


def replace_spans(text, spans, mask):
    """(text with the (begin, end) spans replaced, how many); one that overlaps the last is passed over."""
    out, at, count = [], 0, 0
    for begin, end in spans:
        if begin >= at:
            out += text[at:begin], mask
            at, count = end, count + 1
    return "".join(out) + text[at:], count


def mask_emails(text):
    """The "@" and its domain are found first: what stands before is then read backwards."""
    def spans():
        last = 0                                     # where the last address ends: the next begins behind it
        for found in DOMAIN.finditer(text):
            at = found.start()
            before = LOCAL.match(text[max(last, at - 65):at][::-1])[0]
            local = before.rstrip(".")               # reversed: dots at the left do not belong to it
            if local and before[0] != "." and len(before) < 65:
                last = found.end()
                yield at - len(local), last
    return replace_spans(text, spans(), "|||EMAIL_ADDRESS|||")


def mask_phone_numbers(text):
    """At most 15 digits (E.164); fewer than 8 are taken for something else."""
    spans = (m.span(1) for m in PHONE.finditer(text) if 8 <= sum(map(str.isdigit, m[1])) <= 15)
    return replace_spans(text, spans, "|||PHONE_NUMBER|||")


def mask_ips(text):
    """IPv4 and IPv6. 256.1.1.1, 1.2.3.4.5, v1.2.3.4 and 12:30:45 are not addresses."""
    text, four = replace_spans(text, (m.span(1) for m in IPV4.finditer(text)), "|||IP_ADDRESS|||")

    def spans():
        for colons in re.finditer(":[0-9a-fA-F]{0,4}:[0-9a-fA-F:]*", text):
            at = colons.start()
            before = re.match("[0-9a-fA-F]*", text[max(0, at - 4):at][::-1])
            if match := IPV6.match(text, at - before.end()):
                with contextlib.suppress(OSError):                       # not an address after all
                    socket.inet_pton(socket.AF_INET6, match[0])
                    yield match.span()
    text, six = replace_spans(text, spans(), "|||IP_ADDRESS|||")
    return text, four + six


def luhn(number):
    """The checksum of payment cards: from the right, every second digit counts twice, less 9 if above 9."""
    digits = [int(d) for d in number if d.isdigit()][::-1]
    return sum(digits[::2] + [2 * d - 9 * (d > 4) for d in digits[1::2]]) % 10 == 0


def mask_cards(text):
    """15 and 16 digits, in groups or not, whose checksum is right: one in ten other numbers passes."""
    spans = (m.span(1) for m in CARD.finditer(text) if luhn(m[1]))
    return replace_spans(text, spans, "|||CARD_NUMBER|||")


MASKS = {"emails": mask_emails, "cards": mask_cards, "phones": mask_phone_numbers, "ips": mask_ips}


def mask_pii(text):
    """text -> (masked, {kind: how many}). A second pass finds nothing in ordinary text."""
    counts = {}
    for kind, mask in MASKS.items():
        text, counts[kind] = mask(text)
    return text, counts


# --- 5. rules of quality ------------------------------------------------------------------------------------
# Each rule states one way in which a page is no prose. They are cheap, they can be read, and they do not see
# meaning: a chatty forum page or a page of advertising in whole sentences passes them all. Hence section 6.
# They know words by the blanks between and sentences by . ! ?, so Chinese or Thai needs --no-rules.

STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}


def gopher_quality(text, english=True):
    """"" or the rule that the page breaks (Rae et al. 2021, appendix A.1). Words are what blanks separate."""
    words, lines = text.split(), [line.strip() for line in text.splitlines()] or [""]
    n = len(words)
    if not 50 <= n <= 100_000:
        return "words not in 50..100,000"
    if not 3 <= sum(map(len, words)) / n <= 10:
        return "mean word length not in 3..10"
    if text.count("#") > 0.1 * n:
        return "more than 0.1 # a word"
    if text.count("...") + text.count("\u2026") > 0.1 * n:
        return "more than 0.1 ellipses a word"
    if sum(line.startswith(("\u2022", "-", "*", "\u2023", "\u25cf")) for line in lines) > 0.9 * len(lines):
        return "more than 90% of lines are bullets"
    if sum(line.endswith(("...", "\u2026")) for line in lines) > 0.3 * len(lines):
        return "more than 30% of lines end in an ellipsis"
    if sum(any(map(str.isalpha, word)) for word in words) < 0.8 * n:
        return "fewer than 80% of words hold a letter"
    if english and len(STOP_WORDS.intersection(word.lower() for word in words)) < 2:
        return "fewer than 2 of the 8 English stop words"
    return ""


def gopher_quality_filter(text):
    return not gopher_quality(text)


DUPLICATES = (("paragraph", r"\n\n+", 0.30, 0.20), ("line", r"\n+", 0.30, 0.20))   # of parts, of characters
TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE_NGRAM = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def gopher_repetition(text):
    """"" or the rule that the page breaks (table A1 there): it says the same thing again and again. Shares
    are of characters unless "of lines"."""
    for name, end, most, most_characters in DUPLICATES:
        parts, first = re.split(end, text.strip()), {}
        again = [part for i, part in enumerate(parts) if first.setdefault(part, i) < i]
        if len(again) > most * len(parts):
            return f"more than {most:.0%} of {name}s are duplicates"
        if sum(map(len, again)) > most_characters * len(text):
            return f"more than {most_characters:.0%} in duplicate {name}s"
    words = text.split()
    lengths = np.array([len(word) for word in words])
    size = lengths.sum()
    for n, h in enumerate(ngram_hashes(word_values(words), 10), 1):
        if not len(h) or n < 2:
            continue
        _, first, which, times = np.unique(h, return_index=True, return_inverse=True, return_counts=True)
        if n in TOP_NGRAM and times.max() > 1:
            long = np.convolve(lengths, np.ones(n, int), "valid")        # characters of each n-gram
            if (times * long[first])[times == times.max()].max() > TOP_NGRAM[n] * size:
                return f"the most frequent {n}-gram is more than {TOP_NGRAM[n]:.0%}"
        if n in DUPLICATE_NGRAM:
            again = first[which] < np.arange(len(h))
            covered = np.convolve(again, np.ones(n, int)) > 0            # a word in two of them counts once
            if lengths[covered].sum() > DUPLICATE_NGRAM[n] * size:
                return f"more than {DUPLICATE_NGRAM[n]:.0%} in duplicate {n}-grams"
    return ""


def c4_rules(text):
    """(text of the lines kept, "" or why the page goes) (Raffel et al. 2020): lines that end like a sentence
    and have five words; pages with three such sentences, no code, no filler."""
    if "lorem ipsum" in text.lower():
        return text, "lorem ipsum"
    if "{" in text:
        return text, "a brace: code"
    kept = []
    for line in text.splitlines():
        whole = line.rstrip().endswith((".", "!", "?", '"', "\u201d")) and not line.rstrip().endswith("...")
        if whole and len(line.split()) >= 5 and "javascript" not in line.lower():
            kept.append(line)
    sentences = sum(len(re.findall(r"[.!?](?:[\"'\u201d)]|\s|$)", line)) for line in kept)
    return "\n".join(kept), "" if sentences >= 3 else "fewer than 3 sentences"


# --- 6. a classifier ----------------------------------------------------------------------------------------
# fastText (Joulin et al. 2016): a text is the mean of the rows of its words and word pairs, a matrix turns
# the mean into labels. There are too many pairs to give each a row, so words and pairs share a fixed number
# of rows by their hash: dim x (rows + labels) parameters, whatever the vocabulary. Good pages are those that
# people chose (Wikipedia's references, upvoted links), bad ones are any others; the model learns what tells
# them apart, good taste or not.

class TextClassifier:
    """fit(texts, labels), classify(text) -> (label, score in 0..1), save and load.

    p = softmax(W mean(E[rows]));  loss = -log p[label];  one step a text, the rate falls linearly to zero."""
    def __init__(self, dim=16, buckets=1 << 17, seed=0):
        self.dim, self.buckets, self.seed, self.labels = dim, buckets, seed, []

    def rows(self, text):
        """(rows, share of each) of words and pairs, each row once. The first thousand words say enough."""
        rows, times = np.unique(word_features(text[:6000], self.buckets), return_counts=True)
        return rows, (times / max(1, times.sum())).astype(np.float32)

    def fit(self, texts, labels, epochs=5, lr=0.5):
        self.labels, rng = sorted(set(labels)), np.random.default_rng(self.seed)
        if len(self.labels) < 2:
            raise ValueError(f"a classifier needs two labels or more; the files hold {self.labels}")
        self.E = rng.uniform(-1 / self.dim, 1 / self.dim, (self.buckets, self.dim)).astype(np.float32)
        self.W = np.zeros((len(self.labels), self.dim), np.float32)
        data = [(*self.rows(text), self.labels.index(label)) for text, label in zip(texts, labels)]
        steps = epochs * len(data)
        progress = bpe.Progress("classifier", steps, sys.stderr.isatty(), "texts", 1)
        for step in range(steps):
            if step % len(data) == 0:
                order = rng.permutation(len(data))
            rows, share, y = data[order[step % len(data)]]
            hidden = share @ self.E[rows]                                # (dim,)
            error = softmax(self.W @ hidden)                             # (labels,)
            error[y] -= 1                                                # the loss's gradient by the logits
            rate = np.float32(lr * (1 - step / steps))
            back = rate * (error @ self.W)
            self.W -= rate * error[:, None] * hidden
            self.E[rows] -= share[:, None] * back                        # rows are distinct, so none is lost
            progress(step)
        progress.close()
        return self

    def scores(self, text):
        """{label: p}."""
        rows, share = self.rows(text)
        return dict(zip(self.labels, softmax(self.W @ (share @ self.E[rows])).tolist()))

    def classify(self, text):
        return max(self.scores(text).items(), key=lambda item: item[1])

    def save(self, path):
        bpe.write_atomic(path, lambda f: np.savez(f, E=self.E, W=self.W, labels=self.labels))

    @classmethod
    def load(cls, path, label=None):
        """label: one that it must know."""
        try:
            with np.load(path, allow_pickle=False) as saved:
                E, W, labels = saved["E"], saved["W"], saved["labels"].tolist()
            model = cls(E.shape[1], E.shape[0])
            assert W.shape == (len(labels), model.dim), f"a matrix of shape {W.shape}"
            if label not in (None, *labels):
                raise ValueError(f"its labels are {', '.join(labels)}; none is {label}")
        except OSError:
            raise
        except Exception as e:                       # whatever zip files, headers and shapes can have wrong
            raise ValueError(f"{path}: no classifier saved by `data.py classify` ({e})") from None
        model.E, model.W, model.labels = E, W, labels
        return model


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


# Enough to run and to see the mechanism, far too little to trust: four sentences a task. Train on your own
# with `data.py classify --train`.
SEEDS = {  # task: label: sentences
    "quality": {"high": "The treaty of 1648 ended thirty years of war.|Water expands as it freezes.",
                "low": "Buy now, click here, the best price, cheap deals, sale offer!|Sign up login lol plz"},
    "toxic": {"toxic": "You are an idiot, I hate you and everyone does.|Shut up with this trash, you fool.",
              "non-toxic": "Thank you, this helped me.|I do not agree with you, but I see your point."},
    "nsfw": {"nsfw": "Uncensored adult content, explicit webcam.|Hot nude singles, watch xxx pictures now.",
             "non-nsfw": "The museum opens at nine and is closed on Mondays.|Mix the flour with two eggs."},
}


@functools.cache
def seed_classifier(task):
    pairs = [(text, label) for label, texts in SEEDS[task].items() for text in texts.split("|")]
    return TextClassifier(buckets=1 << 14).fit(*zip(*pairs), epochs=50)


classify_quality, classify_toxic, classify_nsfw = (
    lambda text, task=task: seed_classifier(task).classify(text) for task in SEEDS)


def labelled_texts(paths):
    """Lines of fastText's format, "__label__x text", or .jsonl with "label" and "text" -> texts, labels."""
    texts, labels = [], []
    for path in bpe.as_paths(paths):
        for place, line in parts_of(path, b"\n"):
            if ".jsonl" in path.suffixes:
                row = json_object(line)
                label, text = row.get("label"), row.get("text")
            else:
                found = re.fullmatch(r"__label__(\S+)\s+(.*)", line.strip())
                label, text = found.groups() if found else (None, None)
            if label is None or not isinstance(text, str):
                raise ValueError(f'{place}: neither "__label__NAME text" nor a JSON object with "label" '
                                 f'and "text"')
            texts.append(text)
            labels.append(str(label))
    return texts, labels


# --- 7. an n-gram language model ----------------------------------------------------------------------------
# What is a text like, by a model of good text? Kneser and Ney's idea: the chance of a word in a new context
# is not how often it stands there but in how many contexts: "Francisco" is frequent, and only ever after
# "San".
#   p(w|h) = max(c(hw) - D, 0) / c(h) + backoff(h) p(w|h')        h' is h without its first word
#   c = counts in the highest order; below it the number of different words to the left (or, at <s>, counts)
#   D = D1, D2, D3+ by c (Chen & Goodman 1998), each order its own; backoff(h) gives what D took to p(w|h')
# The estimates equal KenLM's lmplz. It rewards repetition: "the the the" is likelier than most sentences, so
# perplexity goes together with gopher_repetition.

RESERVED = ("<s>", "</s>", "<unk>")


class KneserNey:
    """fit(sentences), logprob(sentence) in log10, perplexity; write and read ARPA files.

    log_p[n] {n-gram: log10 p}, log_backoff[n] {n-gram: log10 backoff}, n from 1; words are strings."""
    def __init__(self, order=3):
        if not 1 <= order <= 8:
            raise ValueError(f"--order {order} is out of range: 1 to 8")
        self.order, self.log_p, self.log_backoff, self.discounts = order, {}, {}, {}

    def fit(self, sentences):
        counts, p = self.count(sentences), {}
        uniform = 1 / (len(counts[1]) + 1)           # over the vocabulary: the words, </s> and <unk>
        for n in range(1, self.order + 1):
            D = self.discounts[n] = discounts(counts[n])
            total, taken = defaultdict(int), defaultdict(float)          # by context h
            for gram, c in counts[n].items():
                total[gram[:-1]] += c
                taken[gram[:-1]] += D[min(c, 3)]
            backoff = {h: taken[h] / total[h] for h in total}
            lower, p = p, {}
            for gram, c in counts[n].items():
                h = gram[:-1]
                p[gram] = (c - D[min(c, 3)]) / total[h] + backoff[h] * (lower[gram[1:]] if h else uniform)
            if n == 1:
                p["<unk>",] = backoff[()] * uniform
            else:
                self.log_backoff[n - 1] = {h: math.log10(b) for h, b in backoff.items()}
            self.log_p[n] = {gram: math.log10(v) for gram, v in p.items()}
        return self

    def count(self, sentences):
        """{n: {n-gram: adjusted count}}: true counts in the highest order and of n-grams that begin with <s>,
        which nothing stands before; else the number of different n+1-grams that end in it."""
        counts = {n: Counter() for n in range(1, self.order + 1)}
        for sentence in sentences:
            tokens = ("<s>", *(word for word in sentence.split() if word not in RESERVED), "</s>")
            counts[self.order].update(zip(*(tokens[i:] for i in range(self.order))))
            for n in range(2, min(self.order, len(tokens) + 1)):
                counts[n][tokens[:n]] += 1
        for n in range(self.order - 1, 0, -1):
            counts[n].update(gram[1:] for gram in counts[n + 1])
        del counts[1]["<s>",]                        # it is given, never predicted
        if len(counts[1]) < 2:
            raise ValueError("the n-gram model has no words to learn from")
        return counts

    def word_logprob(self, context, word):
        """log10 p(word | context), a tuple of words: from the longest context known, times its backoffs."""
        word, total = word if (word,) in self.log_p[1] else "<unk>", 0.0
        for n in range(min(self.order, len(context) + 1), 0, -1):
            h = context[len(context) - n + 1:]
            found = self.log_p[n].get((*h, word))
            if found is not None:
                break
            total += self.log_backoff[n - 1].get(h, 0.0)
        return total + found

    def logprob(self, sentence):
        """log10 p(sentence and its end)."""
        context, total = ("<s>",), 0.0
        for word in (*sentence.split(), "</s>"):
            total += self.word_logprob(context, word)
            context = (*context, word)[-self.order + 1:] if self.order > 1 else ()
        return total

    def perplexity(self, sentences):
        """10^(-log10 p a word), ends of sentences counted as words."""
        sentences = [sentences] if isinstance(sentences, str) else list(sentences)
        words = sum(len(s.split()) + 1 for s in sentences)
        return 10 ** min(300.0, -sum(map(self.logprob, sentences)) / max(1, words))      # 10^309 is no float

    def write_arpa(self, path):
        """The text format of KenLM and SRILM."""
        grams = {n: dict(self.log_p[n]) for n in self.log_p}
        grams[1]["<s>",] = 0.0                       # not predicted, but the context of first words
        lines = ["\\data\\", *(f"ngram {n}={len(grams[n])}" for n in grams), ""]
        for n in grams:
            backoffs = self.log_backoff.get(n, {})
            lines.append(f"\\{n}-grams:")
            for gram, p in grams[n].items():
                backoff = f"\t{backoffs.get(gram, 0.0):.8g}" if n < self.order else ""
                lines.append(f"{p:.8g}\t{' '.join(gram)}{backoff}")
            lines.append("")
        bpe.write_atomic(path, "\n".join([*lines, "\\end\\", ""]).encode())

    @classmethod
    def read_arpa(cls, path):
        model, n = cls(1), 0
        try:
            for line in Path(path).read_text("utf-8").split("\n"):
                if found := re.fullmatch(r"\\(\d)-grams:", line.strip()):
                    n = model.order = int(found[1])
                    model.log_p[n] = {}
                elif n and "\t" in line:
                    p, gram, *backoff = line.split("\t")
                    gram = tuple(gram.split(" "))
                    model.log_p[n][gram] = float(p)
                    if backoff:
                        model.log_backoff.setdefault(n, {})[gram] = float(backoff[0])
        except ValueError as e:
            raise ValueError(f"{path}: no ARPA file ({e})") from None
        whole = [*model.log_p] == [*range(1, n + 1)] and [*model.log_backoff] == [*range(1, n)]
        if not n or not whole or ("<unk>",) not in model.log_p[1]:
            raise ValueError(f"{path}: no ARPA file with an <unk>; make one with  python data.py ngram")
        model.log_p[1].pop(("<s>",), None)
        return model


def discounts(counts):
    """[0, D1, D2, D3+]: what an n-gram seen c times loses, from how many were seen 1, 2, 3 and 4 times."""
    n1, n2, n3, n4 = (sum(c == k for c in counts.values()) for k in (1, 2, 3, 4))
    if n1 and n2 and n3:
        y = n1 / (n1 + 2 * n2)
        found = [k - (k + 1) * y * b / a for k, a, b in ((1, n1, n2), (2, n2, n3), (3, n3, n4))]
        if all(0 < d <= k for k, d in enumerate(found, 1)):
            return [0.0, *found]
    return [0.0, 0.5, 1.0, 1.5]                      # too small a corpus to tell: KenLM's fallback, too


def plain_sentences(text):
    """Lines as the n-gram model reads them: words and signs in lower case, any digit a 0."""
    for line in text.splitlines():
        if words := WORD.findall(re.sub(r"\d", "0", line.lower())):
            yield " ".join(words)


def perplexity_buckets(values):
    """Thirds by perplexity: "head", "middle" and "tail"; keep the head, say (CCNet: Wenzek et al. 2020)."""
    low, high = np.quantile(values, (1 / 3, 2 / 3))
    return [("head", "middle", "tail")[int(v > low) + int(v > high)] for v in values]


# --- 8. importance resampling -------------------------------------------------------------------------------
# DSIR (Xie et al. 2023): choose from raw text q what makes the sample look like target text p. The weight of
# a document is p/q, both bags of hashed words and pairs; drawing k without replacement with these odds is
# taking the k largest of log weight + Gumbel noise. A classifier takes the best; this takes the mix.

FEATURES = 10_000


def dsir_weights(target_texts, raw_texts):
    """The log weight of each raw text, sum over its features of log p - log q: large for long texts."""
    raw = [word_features(text, FEATURES).astype(np.uint16) for text in raw_texts]        # 2 bytes a feature
    target, total = np.zeros((2, FEATURES), np.int64)
    for text in target_texts:
        target += np.bincount(word_features(text, FEATURES), minlength=FEATURES)
    for features in raw:
        total += np.bincount(features, minlength=FEATURES)
    if not target.any() or not total.any():
        raise ValueError("dsir has no raw text to choose from, or no target text to choose by")
    p, q = target / target.sum() + 1e-8, total / total.sum() + 1e-8      # no feature may rule a text out
    ratio = np.log(p) - np.log(q)
    return np.array([ratio[features].sum() for features in raw])


def gumbel_top_k(log_weights, k, seed=0):
    """k distinct indices with odds by weight: the maximum of log w + Gumbel noise is a draw from softmax."""
    noise = np.random.default_rng(seed).gumbel(size=len(log_weights))
    return np.argsort(-(log_weights + noise), kind="stable")[:k]


# --- 9. duplicates ------------------------------------------------------------------------------------------
# The same text twice is memorised, not learnt. Exact copies are found by a hash; copies that differ in a date
# or a name by MinHash: for a random order of all n-grams, two sets have the same minimum with probability J =
# |A and B| / |A or B|, so k orders estimate J from k numbers a document. LSH finds the pairs without
# comparing all: b bands of r numbers, a pair is looked at if any band is equal,  1 - (1 - J^r)^b.

def jaccard(a, b):
    """|A and B| / |A or B| of two arrays of distinct values."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(1, len(a) + len(b) - common)


NO_BLANKS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u4e00-\u9fff"  # South-east Asia; Kana, Han
ACCENTS = f"[{''.join(c for c in MARKS if c < chr(0x780))}\u200c\u200d]"         # up to Syriac; joiners


def normal_words(text):
    """Lower case, no accents (NFD splits them off), no signs; characters where no blanks are written. Accents
    are of Latin, Greek, Cyrillic, Hebrew and Arabic: in Hindi and its like, vowels are marks, too."""
    text = text.lower()
    if text.isascii():
        return re.findall(r"\w+", text)
    text = unicodedata.normalize("NFC", re.sub(ACCENTS, "", unicodedata.normalize("NFD", text)))
    return re.findall(rf"[{NO_BLANKS}]|[^\W{NO_BLANKS}]+(?:[{MARKS}]+[^\W{NO_BLANKS}]*)*", text)


def shingles(text, n=5):
    """The set of word n-grams as sorted 64-bit hashes; a text of fewer words is one n-gram."""
    words = normal_words(text)
    return np.unique(word_ngrams(words, min(n, len(words)) or 1))


def minhash(hashes, k, seed=0):
    """k minima over the set, (k,) uint32. Order i is (a_i x + b_i) mod 2^64 >> 32: multiply-shift,
    nearly 2-independent (a is odd). An empty set gives the largest number throughout."""
    a, b = np.random.default_rng(seed).integers(1, 1 << 63, (2, k, 1), dtype=np.uint64)
    a, least = a | np.uint64(1), np.full(k, 0xFFFFFFFF, np.uint64)
    for part in bpe.slices(hashes, 4096):            # bounded memory: k x 4,096 numbers
        least = np.minimum(least, ((a * (part >> np.uint64(32)) + b) >> np.uint64(32)).min(1))
    return least.astype(np.uint32)


def band_hashes(signature, bands):
    """(bands,) uint64: equal where a whole band is equal. The band's number is hashed too."""
    h = np.arange(1, bands + 1, dtype=np.uint64) * CODE
    for column in signature.reshape(bands, -1).T:
        h = h * MIX ^ (column + np.uint64(1)) * CODE
    return h


def s_curve(j, bands, rows):
    """The probability that a pair of similarity j shares a band: steepest near (1/b)^(1/r)."""
    return 1 - (1 - j**rows) ** bands


def check_bands(num_hashes, num_bands):
    if num_bands < 1 or num_hashes < 1 or num_hashes % num_bands:
        raise ValueError(f"{num_hashes} hashes are no whole number of rows in {num_bands} bands: "
                         f"try --hashes {max(1, round(num_hashes / max(1, num_bands))) * max(1, num_bands)}")


def clusters(pairs):
    """Pairs -> sorted groups. If A is like B and B like C, the three are one, in whatever order it is said
    (union-find): every member points to a smaller one of its group, the smallest to itself."""
    parent = {}

    def find(x):
        while (above := parent.setdefault(x, x)) != x:
            parent[x] = x = parent[above]            # halves the way for the next who asks
        return x
    for pair in pairs:
        a, b = sorted(map(find, pair))
        parent[b] = a
    groups = defaultdict(list)
    for x in sorted(parent):
        groups[find(x)].append(x)
    return list(groups.values())


class Ranks:
    """The processes that torchrun started, or (Ranks()) this one alone. They exchange numpy arrays."""
    def __init__(self, rank=0, size=1):
        self.rank, self.size = rank, size
        if size > 1:
            import torch.distributed as dist         # 2 s to load, so only where it is needed
            # Text lives in main memory, so the CPUs talk. A rank may wait days for one with larger files.
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
            self.dist = dist

    def exchange(self, parts):
        """parts[i] goes to rank i; returns what all sent here, in the order of the ranks: an all-to-all."""
        if self.size == 1:
            return parts[0]
        import torch
        lengths = torch.tensor([len(part) for part in parts])
        incoming = torch.empty_like(lengths)
        self.dist.all_to_all_single(incoming, lengths)
        given = torch.from_numpy(np.concatenate(parts).view(np.int64))
        taken = given.new_empty(int(incoming.sum()))
        self.dist.all_to_all_single(taken, given, incoming.tolist(), lengths.tolist())
        return taken.numpy().view(parts[0].dtype)

    def gather(self, value):
        """The list of every rank's value, on every rank; with it, a barrier."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        self.dist.all_gather_object(values, value)
        return values

    def close(self):
        if self.size > 1:
            self.dist.destroy_process_group()


def meet(keys, values, ranks):
    """Equal keys meet on rank key mod size -> (keys, values, where each run of equal keys begins), sorted.
    The union over the ranks does not depend on how many there are."""
    owner = (keys % np.uint64(ranks.size)).astype(np.int64)
    keys, values = (ranks.exchange([column[owner == i] for i in range(ranks.size)])
                    for column in (keys, values))
    order = np.lexsort((values, keys))
    keys, values = keys[order], values[order]
    return keys, values, np.flatnonzero(np.diff(keys, prepend=~keys[:1]))


def repeated(keys, values, ranks):
    """(keys that occur more than once anywhere, sorted; the smallest value of each), on every rank."""
    keys, values, begins = meet(keys, values, ranks)
    begins = begins[np.diff(begins, append=len(keys)) > 1]
    found = ranks.gather((keys[begins], values[begins]))
    keys, values = (np.concatenate(column) for column in zip(*found))
    order = np.argsort(keys)
    return keys[order], values[order]


def is_extra(keys, values, table, keep_first=True):
    """Which of these are to go: their key is repeated, and (keep_first) they are not its smallest value."""
    again, first = table
    if not len(again):
        return np.zeros(len(keys), bool)
    at = np.minimum(np.searchsorted(again, keys), len(again) - 1)
    return (again[at] == keys) & ((first[at] != values) | (not keep_first))


def candidate_pairs(bands, ids, ranks):
    """bands (documents, b), ids (documents,) -> set of pairs (i < j) that share a band, on every rank.

    In a bucket of m all m(m-1)/2 pairs count; above 64, only each with the next and with the first: a chain
    holds a true cluster together, and a bucket of 10,000 pages of one template would cost 50 million."""
    keys, values, begins = meet(bands.ravel(), np.repeat(ids, bands.shape[1]), ranks)
    pairs, ends = set(), np.append(begins[1:], len(keys))
    more = ends - begins > 1
    for begin, end in zip(begins[more], ends[more]):
        bucket = values[begin:end].tolist()
        pairs.update(itertools.combinations(bucket, 2) if len(bucket) <= 64 else
                     [*zip(bucket, bucket[1:]), *((bucket[0], other) for other in bucket[1:])])
    return set().union(*ranks.gather(pairs))


def near_duplicates(ids, bands, shingles_of, threshold, ranks, seed=0):
    """-> (ids to drop, clusters). shingles_of(ids of this rank) -> {id: shingles}.

    Candidates are compared by their true Jaccard similarity, so a chance collision of hashes drops nothing.
    Of each cluster one stays, the one with the smallest hash of its id: chosen at random, and the same for
    any number of ranks."""
    pairs = sorted(candidate_pairs(bands, ids, ranks))
    wanted = {i for pair in pairs for i in pair}
    sets = {}
    for part in ranks.gather(shingles_of([i for i in ids.tolist() if i in wanted])):
        sets.update(part)
    mine = [(i, j) for i, j in pairs[ranks.rank::ranks.size] if jaccard(sets[i], sets[j]) >= threshold]
    groups = clusters(pair for part in ranks.gather(mine) for pair in part)
    kept = {min(group, key=lambda i: zlib.crc32(f"{seed} {i}".encode())) for group in groups}
    return {i for group in groups for i in group} - kept, groups


def minhash_deduplication(input_files, output_directory, num_hashes=112, num_bands=14, ngrams=5,
                          jaccard_threshold=0.8):
    """One document a file: copies all but near-duplicates to output_directory. Returns the dropped paths."""
    check_bands(num_hashes, num_bands)
    paths = bpe.as_paths(input_files)
    targets, ids = output_paths(paths, output_directory), np.arange(len(paths))
    texts = [path.read_text("utf-8", "replace") for path in paths]
    bands = np.array([band_hashes(minhash(shingles(text, ngrams), num_hashes), num_bands) for text in texts])
    drop, _ = near_duplicates(ids, bands, lambda wanted: {i: shingles(texts[i], ngrams) for i in wanted},
                              jaccard_threshold, Ranks())
    for i, target in enumerate(targets):
        if i not in drop:
            bpe.write_atomic(target, paths[i].read_bytes())
    return [paths[i] for i in sorted(drop)]


def output_paths(paths, output_directory):
    """One path a file in output_directory, which is made. ValueError: no file, two of one name, a packed one,
    or an input would be lost."""
    output, names = Path(output_directory), Counter(path.name for path in paths)
    name, count = (names.most_common(1) or [("", 0)])[0]
    if count != 1:
        raise ValueError(f"{count} files are named {name!r}: rename all but one")
    for path in paths:
        if path.suffix == ".gz":
            raise ValueError(f"{path} is packed: gunzip it first")
        if path.resolve().parent == output.resolve():
            raise ValueError(f"{output} holds the input files: give another --out")
    output.mkdir(parents=True, exist_ok=True)
    return [output / path.name for path in paths]


def line_key(line):
    return int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little")


def exact_line_deduplication(input_files, output_directory, keep_first=False):
    """Writes every file without the lines that occur more than once in all of them together: every copy goes
    (menus, footers), or (keep_first, which is the command's default) all but the first. An emptied file is
    still written. Memory: some 50 bytes a line. Returns the number of lines dropped."""
    paths = bpe.as_paths(input_files)
    targets = output_paths(paths, output_directory)
    keys = np.fromiter((line_key(line) for path in paths for line in binary_lines(path)), np.uint64)
    places = np.arange(len(keys))
    gone = is_extra(keys, places, repeated(keys, places, Ranks()), keep_first)
    dropped = iter(gone.tolist())
    for path, target in zip(paths, targets):
        kept = (line + b"\n" for line in binary_lines(path) if not next(dropped))
        bpe.write_atomic(target, lambda f: f.writelines(kept))
    return int(gone.sum())


def binary_lines(path):
    with open(path, "rb") as f:
        yield from (line.removesuffix(b"\n") for line in f)


class Bloom:
    """A set that answers "surely not" or "probably": m bits, k of them set a key; no key is ever missed.

    p(false yes) = (1 - (1 - 1/m)^(kn))^k, least at k = ln 2 m/n; then m = n ln(1/p) / (ln 2)^2: 10 bits a key
    at 1%, whatever the keys' length."""
    def __init__(self, n, false_positives):
        if n < 1 or not 0 < false_positives < 1:
            raise ValueError(f"a Bloom filter of {n} keys with a false-positive rate of {false_positives}: "
                             f"give 1 or more, and a rate between 0 and 1")
        self.m = math.ceil(-n * math.log(false_positives) / math.log(2) ** 2)
        self.k = max(1, round(math.log(2) * self.m / n))
        self.bits = bytearray(self.m // 8 + 1)

    def places(self, key):
        """k places from two hashes: h1 + i h2 is as good as k hashes (Kirsch & Mitzenmacher 2006)."""
        digest = hashlib.blake2b(key, digest_size=16).digest()
        h1, h2 = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little") | 1
        return [(h1 + i * h2) % self.m for i in range(self.k)]

    def add(self, key):
        """Put it in; True if it (probably) was in already."""
        new = False
        for place in self.places(key):
            byte, bit = place >> 3, 1 << (place & 7)
            new |= not self.bits[byte] & bit
            self.bits[byte] |= bit
        return not new

    def __contains__(self, key):
        return all(self.bits[place >> 3] >> (place & 7) & 1 for place in self.places(key))

    def expected(self, added):
        return (1 - (1 - 1 / self.m) ** (self.k * added)) ** self.k


def paragraph_deduplication(input_files, output_directory, false_positives=1e-6):
    """Writes every file without the paragraphs (between empty lines) that a Bloom filter has seen; returns
    how many. Memory: 29 bits a line, since there are at most as many paragraphs as lines; at this rate one in
    a million new ones is lost by mistake."""
    paths, dropped = bpe.as_paths(input_files), 0
    targets = output_paths(paths, output_directory)
    seen = Bloom(1 + sum(1 for path in paths for _ in binary_lines(path)), false_positives)
    for path, target in zip(paths, targets):
        parts = [part for part in re.split(rb"\n\s*\n", path.read_bytes()) if part.strip()]
        kept = [part for part in parts if not seen.add(b" ".join(part.split()))]
        dropped += len(parts) - len(kept)
        bpe.write_atomic(target, b"\n\n".join(kept))
    return dropped


# --- 10. decontamination and mixing -------------------------------------------------------------------------

class EvaluationIndex:
    """The word n-grams of evaluation texts, to find documents that hold one: 13 words in a row are no
    accident (Brown et al. 2020). An item shorter than that cannot be found; `skipped` counts them."""
    def __init__(self, items, n=13):
        self.n, items = n, list(items)
        hashes = [self.hashes(text) for _, text in items]
        self.names, self.skipped = [name for name, _ in items], sum(not len(h) for h in hashes)
        keys = np.concatenate([np.zeros(0, np.uint64), *hashes])
        order = np.argsort(keys, kind="stable")
        self.keys, self.item = keys[order], np.repeat(np.arange(len(items)), [len(h) for h in hashes])[order]

    def hashes(self, text):
        return word_ngrams(normal_words(text), self.n)

    def find(self, text):
        """The name of an item that shares n words in a row with the text, or None."""
        h = self.hashes(text)
        if len(h) and len(self.keys):
            at = np.minimum(np.searchsorted(self.keys, h), len(self.keys) - 1)
            hit = np.flatnonzero(self.keys[at] == h)
            if len(hit):
                return self.names[self.item[at[hit[0]]]]
        return None


def evaluation_items(paths):
    """(name, text) of every line of .jsonl (all its strings), else of every document."""
    for path in bpe.as_paths(paths):
        for place, text in parts_of(path):
            if ".jsonl" in path.suffixes:
                text = " ".join(v for v in json_object(text).values() if isinstance(v, str))
                if not text:
                    raise ValueError(f"{path}: {place}: no JSON object with a string in it")
            yield place, text


def mix(sources, stages, total_bytes):
    """{name: list of documents}, [(share, {name: weight})] -> (name, document), stage after stage.

    Pre-training takes all there is, mid-training the best and the longest, post-training instructions and
    answers: [(0.9, {"web": 8, "code": 2}), (0.08, {"books": 3, "maths": 2}), (0.02, {"chat": 1})]. The source
    furthest behind its share of the bytes comes next, so none is ever ahead of its share by more than a
    document; one that runs out begins again (up to four epochs are nearly as good as new text: Muennighoff
    et al. 2023). No chance is involved: shuffle the sources first."""
    for name in {name for _, weights in stages for name in weights}:
        if not sources.get(name):
            raise ValueError(f"the mixture names {name!r}, which is empty or not there: "
                             f"the sources are {', '.join(sources) or 'none'}")
    endless = {name: itertools.cycle(documents) for name, documents in sources.items()}
    whole, done, end = sum(share for share, _ in stages), 0, 0.0
    for share, weights in stages:
        end += share / whole * total_bytes
        taken = dict.fromkeys(weights, 0)
        while done < end:
            name = min(weights, key=lambda n: (taken[n] / weights[n], n))
            document = next(endless[name])
            size = len(document.encode()) or 1       # an empty document must not stop the clock
            taken[name] += size
            done += size
            yield name, document


# --- 11. the pipeline ---------------------------------------------------------------------------------------
# First every file alone (read, extract, filter), in as many processes as there are; what a file gave is on
# disk before it counts, so a run that is cut goes on where it was. Then duplicates, which concern all files:
# there the ranks exchange hashes, and texts never travel. Then one tokenizer, and the token files of
# train.py. Ranks on several machines need one folder --out that all of them see.

STAGES_OF_A_RUN = ("read", "language", "rules", "quality", "evaluation", "personal data", "exact copies",
                   "near copies", "repeated lines")
INPUTS = (*(kind + gz for kind in (".warc", ".wet", ".wat", ".jsonl", ".txt") for gz in ("", ".gz")), ".md",
          ".html", ".htm")
MODEL_FLAGS = ("lid176", "quality", "toxic", "nsfw", "arpa")
FILTER_FLAGS = (*MODEL_FLAGS, "languages", "min_language", "rules", "min_quality", "max_harm",
                "max_perplexity", "evaluation")


def input_files(paths):
    """The files of the paths given, sorted; of a folder all crawl and text files below it."""
    files = []
    for path in bpe.as_paths(paths):
        if path.is_dir():
            files += [p for p in path.rglob("*") if p.is_file() and p.name.lower().endswith(INPUTS)]
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such file or folder; give --data files {' '.join(INPUTS)}")
    if not files:
        raise ValueError(f"{', '.join(map(str, paths))}: no files here that end in {' '.join(INPUTS)}")
    return sorted({path.resolve(): path for path in files}.values())     # named twice, it is read once


def parts_of(path, end=None):
    """("file:number", text) of each line of a .jsonl, of each document (EOT between them) of any other text
    file, or of what stands between `end`s. Blank ones are left out, .gz is unpacked, what is longer than
    MAX_RECORD is cut: a line of 500 MB costs 80 MB. ValueError: a damaged .gz, or a bomb."""
    end = end or (b"\n" if ".jsonl" in path.suffixes else bpe.EOT.encode())
    number, held, block, wasted = 0, b"", b"-", 0
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
        while block:
            try:
                block = f.read(1 << 22)
            except (gzip.BadGzipFile, EOFError, zlib.error) as e:
                raise ValueError(f"{path.name} is damaged: {e}") from None
            *whole, held = (held + block).split(end)
            for part in whole if block else [*whole, held]:
                number += 1
                if part.strip():                     # JSON is UTF-8, any other text what it may be
                    part = part[:MAX_RECORD]
                    yield (f"{path.name}:{number}",
                           part.decode("utf-8", "replace") if end == b"\n" else decode(part))
            if len(held) > 2 * MAX_RECORD:           # keep the beginning, and what may begin an `end`
                wasted += len(held) - MAX_RECORD
                held = held[:MAX_RECORD] + held[-len(end):]
            if wasted > MAX_WASTE and path.suffix == ".gz":
                raise ValueError(f"{path.name} is a bomb: {wasted:,} bytes without an end")


def json_object(line):
    """A line of .jsonl -> its object, {} if it holds none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):             # 100,000 brackets in a row are the latter
        return {}
    return row if isinstance(row, dict) else {}


def documents(path):
    """(name, text or None, flaw) of everything in a file that may be a document: the pages of a WARC, the
    texts of a WET, the lines of a .jsonl, the documents of a text file."""
    name = path.name.lower()
    if re.search(r"\.(warc|wet|wat)(\.gz)?$", name):
        for record in read_warc(path):
            if record.type in ("response", "conversion", "damaged"):
                yield record.url or path.name, *page_text(record)
    elif name.endswith((".html", ".htm")):
        with open(path, "rb") as f:                  # the whole path: a mirror has many an index.html
            yield str(path), extract_text(f.read(MAX_PAGE)), ""
    else:
        try:
            for place, text in parts_of(path):
                row = json_object(text) if ".jsonl" in path.suffixes else {"text": text}
                url, text = str(row.get("url") or place), row.get("text")
                if isinstance(text, str):            # half a surrogate pair, which no file takes, becomes "?"
                    yield *(s.encode("utf-8", "replace").decode() for s in (url, text)), ""
                else:
                    yield place, None, 'no JSON object with a "text"'
        except ValueError as e:
            yield path.name, None, str(e)


def page_text(record):
    """A WARC record -> (text or None, flaw)."""
    media, _, charset = record.http.get("content-type", "text/html").lower().partition("charset=")
    charset, text, flaw = charset.strip("\"' ;"), None, record.flaw
    if record.type == "conversion":
        text = decode(record.body)
    elif record.type == "response" and ("html" in media or "text/plain" in media):
        body, packed = payload(record)
        text, flaw = (extract_text if "html" in media else decode)(body, charset), packed or flaw
    else:
        flaw = flaw or "neither HTML nor text"
    return text, flaw


@functools.cache
def make_filters(settings):
    """JSON of FILTER_FLAGS -> [(stage, text -> "" or why it goes)]; models are read once a process.

    Every filter has this one shape: it estimates something, scores the document, compares with a bound."""
    s = argparse.Namespace(**json.loads(settings))
    lid = load_lid(s.lid176) if s.lid176 else None
    best = TextClassifier.load(s.quality, "high") if s.quality else None
    harm = [(name, TextClassifier.load(path, name))
            for name, path in (("toxic", s.toxic), ("nsfw", s.nsfw)) if path]
    lm = KneserNey.read_arpa(s.arpa) if s.arpa else None
    index = EvaluationIndex(evaluation_items(s.evaluation))
    if index.skipped == len(index.names) > 0:
        raise ValueError(f"--evaluation: none of {index.skipped} items has {index.n} words, so none is found")

    def language(text):
        code, score = identify_language(text, lid)
        if code not in s.languages:
            return code
        return "" if score >= s.min_language else f"{code}, unsure"

    def rules(text):
        return gopher_quality(text, s.languages == ["en"]) or gopher_repetition(text) or c4_rules(text)[1]

    def quality(text):
        if best and best.scores(text)["high"] < s.min_quality:
            return f"quality below {s.min_quality}"
        for name, judge in harm:
            if judge.scores(text)[name] > s.max_harm:
                return f"{name} above {s.max_harm}"
        too_odd = lm and lm.perplexity(plain_sentences(text)) > s.max_perplexity
        return f"perplexity above {s.max_perplexity:g}" if too_odd else ""

    def evaluation(text):
        found = index.find(text)
        return f"holds {index.n} words of {found}" if found else ""
    return [(name, f) for name, f, wanted in (
        ("language", language, "any" not in s.languages), ("rules", rules, s.rules),
        ("quality", quality, best or harm or lm), ("evaluation", evaluation, index.names)) if wanted]


def add_up(funnels):
    """Funnels of files and of ranks -> theirs together. Of the samples five kept and five dropped stay: those
    with the smallest hashes, which is at random, and in any run the same."""
    stages, reasons, samples = {}, Counter(), []
    for funnel in funnels:
        for stage, row in funnel["stages"].items():  # documents in, lost, bytes in, lost, seconds
            stages[stage] = [a + b for a, b in zip(row, stages.get(stage, [0] * 5))]
        reasons.update(funnel.get("reasons", ()))
        samples += funnel.get("samples", ())
    kept, dropped = ([sample for sample in sorted(samples) if (sample[1] == "kept") == side][:5]
                     for side in (True, False))
    return {"stages": stages, "reasons": dict(reasons), "samples": kept + dropped}


def filter_file(settings, out, path):
    """One file through the stages that need no other: writes its part, then its .json -> its funnel."""
    filters, kept, dropped = make_filters(settings), [], []
    language_table()                                 # learnt once a process, which is no document's time
    stages, reasons, samples = defaultdict(lambda: [0, 0, 0, 0, 0.0]), Counter(), []
    begin = time.process_time()                      # of this process: others on the machine do not count

    def passed(stage, size, fate):
        nonlocal begin
        now = time.process_time()
        for i, amount in enumerate((1, int(bool(fate)), size, size if fate else 0, now - begin)):
            stages[stage][i] += amount
        begin = now
    for name, whole, flaw in documents(path):
        text = CONTROLS.sub("", whole[:MAX_PAGE]) if whole else ""
        size, stage, fate = len(text.encode()), "read", "" if text else flaw or "no text"
        if whole and len(text) < 0.98 * len(whole[:MAX_PAGE]):
            fate = "binary: over 2% control codes"
        elif whole and len(whole) > MAX_PAGE:
            flaw = f"cut at {MAX_PAGE:,} characters"
        passed(stage, size, fate)
        if flaw and not fate:
            reasons[f"note: {flaw}"] += 1
        for stage, find_fault in () if fate else filters:
            fate = find_fault(text)
            passed(stage, size, fate)
            if fate:
                break
        if fate:
            reasons[f"{stage}: {fate}"] += 1
            dropped.append({"url": name, "stage": stage, "reason": fate})
        else:
            text, masked = mask_pii(text)
            passed("personal data", size, "")
            reasons.update({f"masked: {kind}": n for kind, n in masked.items() if n})
            kept.append({"text": text, "url": name})
        samples.append([zlib.crc32(name.encode()), f"dropped, {stage}: {fate}" if fate else "kept", name,
                        mask_pii(text[:500])[0][:150]])
    if not samples:
        reasons["note: a file without documents"] += 1
    part = part_path(out, path)
    write_jsonl(part, kept)
    write_jsonl(part.with_suffix(".dropped"), dropped)
    funnel = {**add_up([{"stages": stages, "reasons": reasons, "samples": samples}]),
              "made_from": [settings, stamp(path)]}
    bpe.write_atomic(part.with_suffix(".json"), json.dumps(funnel).encode())     # last: the part is whole
    return funnel


def write_jsonl(path, rows):
    bpe.write_atomic(path, lambda f: f.writelines((json.dumps(row) + "\n").encode() for row in rows))


def read_jsonl(path):
    with open(path, encoding="utf-8") as f:
        yield from map(json.loads, f)


def part_path(out, path):
    """out/parts/NAME.HASH.jsonl holds what is kept of a file; .dropped, .json and .clean stand beside it."""
    return Path(out, "parts", f"{path.name}.{line_key(str(path.resolve()).encode()):016x}.jsonl")


def stamp(path):
    return [str(path), os.stat(path).st_size, os.stat(path).st_mtime_ns]


def finished(settings, out, path):
    """What an earlier run with the same settings wrote about this file, or None."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        funnel = json.loads(part_path(out, path).with_suffix(".json").read_bytes())
        return funnel if funnel["made_from"] == [settings, stamp(path)] else None


def line_place(number, document, line=0):
    """Where a line stands, in one integer: 19 bits of file, 24 of document, 20 of line. Smaller is earlier,
    on any rank; >> 20 it is the document's id."""
    if number + 1 >> 19 or document >> 24:
        raise ValueError(f"file {number:,}, document {document:,}: at most {(1 << 19) - 1:,} files of "
                         f"{1 << 24:,} documents fit into one run; make several")
    return (number << 24 | document) << 20 | min(line, (1 << 20) - 1)


def fingerprint(hashes, bands, task):
    """(number of a file, its part) -> ids, sizes, keys of texts, band hashes; keys and places of lines."""
    number, part = task
    rows, lines = [], []
    for i, row in enumerate(read_jsonl(part)):
        text = row["text"].encode()
        banded = band_hashes(minhash(shingles(row["text"]), hashes), bands)
        rows.append((line_place(number, i) >> 20, len(text), line_key(text), banded))
        lines += [(line_key(line.strip()), line_place(number, i, j))
                  for j, line in enumerate(text.split(b"\n")) if line.strip()]
    ids, sizes, whole, banded = zip(*rows) if rows else ([], [], [], [])
    keys, places = zip(*lines) if lines else ([], [])
    return (np.array(ids, np.int64), np.array(sizes, np.int64), np.array(whole, np.uint64),
            np.array(banded, np.uint64).reshape(-1, bands), np.array(keys, np.uint64),
            np.array(places, np.int64))


def shingles_of_parts(parts, wanted):
    """[(number, part)] and ids -> {id: shingles}: only what is compared is read again."""
    wanted, files, found = set(wanted), {i >> 24 for i in wanted}, {}
    for number, part in parts:
        for i, row in enumerate(read_jsonl(part)) if number in files else ():
            if (place := line_place(number, i) >> 20) in wanted:
                found[place] = shingles(row["text"])
    return found


def deduplicate(parts, ranks, a):
    """Exact copies, near copies, repeated lines, in this order -> (ids that stay, places of lines that go,
    both sorted; a funnel). Seconds are of the clock; the hashing for all three counts for the first."""
    begin, stages = time.perf_counter(), {}
    prints = [fingerprint(a.hashes, a.bands, (0, os.devnull)),           # a rank without files: empty arrays
              *bpe.parallel_map(fingerprint, parts, a.processes, a.hashes, a.bands)]
    ids, sizes, whole, bands, keys, places = (np.concatenate(column) for column in zip(*prints))

    def lose(stage, gone):
        nonlocal begin
        now = time.perf_counter()
        stages[stage] = [len(gone), int(gone.sum()), int(sizes.sum()), int(sizes[gone].sum()), now - begin]
        begin = now
        return ~gone
    stay = lose("exact copies", is_extra(whole, ids, repeated(whole, ids, ranks)))
    ids, sizes, bands = ids[stay], sizes[stay], bands[stay]
    read_again = functools.partial(shingles_of_parts, parts)
    drop, _ = near_duplicates(ids, bands, read_again, a.jaccard, ranks, a.seed)
    ids = ids[lose("near copies", np.isin(ids, sorted(drop)))]
    if a.lines == "keep":
        return np.sort(ids), places[:0], {"stages": stages}
    alive = np.isin(places >> 20, ids)
    keys, places = keys[alive], places[alive]
    gone = is_extra(keys, places, repeated(keys, places, ranks), a.lines == "first")
    return np.sort(ids), np.sort(places[gone]), {"stages": stages}


def finish_part(out, stay, gone, task):
    """Write what is left of a part -> its funnel."""
    (number, part), kept, counts, begin = task, [], np.zeros(4, np.int64), time.perf_counter()

    def of_this_file(places, bits):                  # they are sorted: a file costs what it holds
        return set(places[slice(*np.searchsorted(places, (number << bits, number + 1 << bits)))].tolist())
    stay, gone = of_this_file(stay, 24), of_this_file(gone, 44)
    for i, row in enumerate(read_jsonl(part)):
        if line_place(number, i) >> 20 in stay:
            lines = row["text"].split("\n")
            text = "\n".join(line for j, line in enumerate(lines) if line_place(number, i, j) not in gone)
            text = re.sub(r"\n{3,}", "\n\n", text).strip()
            before, after = len(row["text"].encode()), len(text.encode())
            counts += (1, not text, before, before - after)
            kept += [{**row, "text": text}] if text else []
    write_jsonl(part.with_suffix(".clean"), kept)
    return {"stages": {"repeated lines": [*counts.tolist(), time.perf_counter() - begin]}}


def run(a, log=print):
    """The command `run` -> the report on rank 0, None on the others. a: its flags, see parse_args."""
    check_bands(a.hashes, a.bands)
    out, begin = Path(a.out), time.perf_counter()
    own = {out.resolve() / "parts", out.resolve() / "clean.jsonl"}       # of an earlier run: no input
    files = [path for path in input_files(a.data) if not own & {path.resolve(), *path.resolve().parents}]
    # Whatever cannot be read shows before the work; a model that has changed since makes it all new.
    models = [getattr(a, name) for name in MODEL_FLAGS if getattr(a, name)]
    settings = json.dumps({**{name: getattr(a, name) for name in FILTER_FLAGS},
                           "read": [stamp(path) for path in (*models, *a.evaluation)]})
    make_filters(settings)
    for _ in bpe.read_documents(bpe.text_files(a.val or [])):
        pass
    if a.tokenizer:
        bpe.load_tokenizer(a.tokenizer)
    ranks = Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    try:
        total = run_files(a, files, settings, ranks, log)
    except RuntimeError as e:
        if ranks.size == 1:
            raise
        raise ConnectionError(f"rank {ranks.rank} has lost another ({str(e).partition('. ')[0]}): finished "
                              f"files are kept, start the same command again") from None
    finally:
        ranks.close()
    if ranks.rank:
        return None
    clean, seconds = out / "clean.jsonl", time.perf_counter() - begin
    parts = [part_path(out, path).with_suffix(".clean") for path in files]
    bpe.write_atomic(clean, lambda f: f.writelines(part.read_bytes() for part in parts))
    if not clean.stat().st_size:
        report(total, log)
        raise ValueError(f"nothing is left of {len(files)} files: see above what dropped it")
    made = bpe.prepare(out, [clean], a.val, a.vocab_size, a.processes, tokenizer=a.tokenizer, log=log)
    info = bpe.token_info(made["train"])
    result = {**total, "files": len(files), "input_bytes": sum(path.stat().st_size for path in files),
              "seconds": seconds, "tokens": info["tokens"], "bytes_per_token": info["bytes"] / info["tokens"]}
    bpe.write_atomic(out / "report.json", json.dumps(result, indent=1).encode())
    report(result, log)
    return result


def run_files(a, files, settings, ranks, log):
    """All stages up to the tokenizer, on every size-th file -> the funnel of all ranks."""
    mine = [(i, path) for i, path in enumerate(files) if i % ranks.size == ranks.rank]
    before = {path: finished(settings, a.out, path) for _, path in mine}
    funnels = [funnel for funnel in before.values() if funnel]
    todo = [path for path, funnel in before.items() if not funnel]
    if funnels:
        log(f"{len(funnels)} of {len(mine)} files were finished before")
    progress = bpe.Progress("filter", len(todo), sys.stderr.isatty(), "files", 1)
    for done, funnel in enumerate(bpe.parallel_map(filter_file, todo, a.processes, settings, a.out), 1):
        funnels.append(funnel)
        progress(done)
    progress.close()
    parts = [(i, part_path(a.out, path)) for i, path in mine]
    stay, gone, funnel = deduplicate(parts, ranks, a)
    left = bpe.parallel_map(finish_part, parts, a.processes, a.out, stay, gone)
    return add_up(ranks.gather(add_up([*funnels, funnel, *left])))


def report(result, log=print):
    """The funnel, why documents went, ten samples, and what a whole crawl would take."""
    density, columns = result.get("bytes_per_token"), "{:16}{:>10}{:>8}{:>8}{:>9}{:>9}{:>13}{:>8}{:>10}"
    log("\n" + columns.format(*"stage documents lost share MB MB_lost tokens_lost s docs/s".split()))
    for stage in filter(result["stages"].get, STAGES_OF_A_RUN):
        documents, lost, size, lost_bytes, seconds = result["stages"][stage]
        log(columns.format(stage, f"{documents:,}", f"{lost:,}", f"{lost / max(1, documents):.1%}",
                           f"{size / 1e6:.2f}", f"{lost_bytes / 1e6:.2f}",
                           f"{lost_bytes / density:,.0f}" if density else "-", f"{seconds:.1f}",
                           f"{documents / max(seconds, 1e-3):,.0f}"))
    log("\nwhy: " + "; ".join(f"{reason} {n:,}" for reason, n in Counter(result["reasons"]).most_common(16)))
    for _, fate, name, text in result["samples"]:
        log(f"  {fate[:40]:41}{printable(name)[-30:]:31}{printable(text)[:60]}")
    if density:
        days = sum(row[4] for row in result["stages"].values()) / result["input_bytes"] / 86400      # a byte
        crawls = " and ".join(f"{n:,} in {n * 75e6 * days:,.1f}" for n in (5000, 100_000))
        log(f"\n{result['files']} files, {result['input_bytes'] / 1e6:.1f} MB in {result['seconds']:.1f} s; "
            f"{result['tokens']:,} training tokens of {density:.2f} bytes")
        log(f"at this rate WET files of 75 MB (a Common Crawl has 100,000): {crawls} days of one core"
            + (", a guess from so little" if result["input_bytes"] < 1e7 else ""))


def printable(text):
    """What a page may show on a terminal: no control codes, which could write anywhere on it."""
    return "".join(c if c.isprintable() else " " for c in text)


# --- 12. a crawl with planted rubbish, and the proof --------------------------------------------------------

def sources(files):
    """[(name, text)]: the docstrings of each file, and the language reference, which comes with Python as
    pydoc's topics (some distributions leave it out)."""
    found = [("/".join(path.parts[-2:]), text) for path in files for text in bpe.docstrings([path])]
    with contextlib.suppress(ImportError):
        from pydoc_data.topics import topics
        found += sorted(topics.items())
    return found


def prose(texts, least=90):
    """Documents of `least` words or more, joined from the paragraphs of prose in each text, each once."""
    seen = set()
    for text in texts:
        held = []
        for line in (" ".join(paragraph.split()) for paragraph in text.split("\n\n")):
            sentence = line.count(" ") > 10 and line[-1] in ".!?" and line[0].isalpha() and "{" not in line
            if sentence and line not in seen:
                seen.add(line)
                held.append(line)
            if len(" ".join(held).split()) >= least:
                yield "\n\n".join(held)
                held = []


# kind of rubbish: the stage that should drop it
PLANTED = {"language": "language", "menu": "rules", "repeated": "rules", "shuffled": "quality",
           "spun": "quality", "spam": "quality", "test": "evaluation", "copy": "exact copies",
           "near": "near copies"}
SPAM = ("The best {0} you can buy today, and the price will never be this low again.",
        "Our {0} is number one with thousands of happy customers who have bought it in the last month.",
        "Order your {0} now and have it sent to you for free with this special offer that ends tonight.",
        "You will love the {0} that everyone is talking about, so do not wait and click to save big.",
        "With our {0} and {1} deals you get more for less, and that is a promise to all of our customers.",
        "Sign up to be the first to hear of new {0} discounts and {1} coupons in your area.")
MENU = "Home|Login|Register|Contact us|Next page|Share|Terms|Privacy|Help|Search ...|Read more ...".split("|")


def rubbish(kind, text, rng, words):
    """A document of this kind, made of a good one. words: others to put in."""
    def edit(text, share):                           # each word replaced with probability `share`
        return "\n\n".join(
            " ".join(rng.choice(words) if rng.random() < share else word for word in part.split())
            for part in text.split("\n\n"))
    if kind == "copy":
        return text
    if kind == "near":                               # a word that differs is in five n-grams of 5
        return edit(text, rng.choice((0.003, 0.006, 0.01)))
    if kind == "spun":                               # as paraphrasing machines do
        return edit(text, 0.4)
    if kind == "shuffled":
        return " ".join(rng.sample(text.split(), len(text.split()))) + "."
    if kind == "repeated":
        return " ".join(text.split()[:30] * 8)
    if kind == "menu":
        return "\n".join(rng.choices(MENU, k=rng.randrange(20, 60)))
    if kind == "spam":
        return " ".join(pitch.format(*rng.sample(words, 2)) for pitch in rng.sample(SPAM, len(SPAM)))
    # The sentences that section 3 learns from: that all of them are found proves nothing but the plumbing.
    _, sample = rng.choice([found for found in language_samples() if found[0] != "en"])
    return " ".join(rng.choices(re.split(r"(?<=[.!?。])\s*", " ".join(sample.split())), k=12))


def plain_words(texts):
    return sorted({word for text in texts for word in text.split() if word.isalpha()})


def plant(good, benchmark, rng, share=0.25):
    """Good documents, and `share` as many of each kind of rubbish -> [(kind, url, text)], shuffled. The
    number that ends a url is that of the good document behind the page."""
    words = plain_words(good)
    pages = [("good", f"http://example.com/good/{i}", text) for i, text in enumerate(good)]
    for kind in PLANTED:
        for i in rng.sample(range(len(good)), max(1, int(share * len(good)))):
            leak = f"{good[i]}\n\n{rng.choice(benchmark)}"
            text = leak if kind == "test" else rubbish(kind, good[i], rng, words)
            pages.append((kind, f"http://example.com/{kind}/{i}", text))
    rng.shuffle(pages)
    return pages


def page(text, title):
    """A document as HTML, with what real pages have around it."""
    body = "".join(f"<p>{html.escape(part)}</p>\n" for part in text.split("\n\n"))
    return (f"<!DOCTYPE html><html><head><title>{title}</title><style>p {{ margin: 1em }}</style></head>"
            f"<body><nav><ul><li><a href='/'>Home</a></li><li><a href='/news'>News</a></li></ul></nav>\n"
            f"<main>{body}</main><script>if (1 < 2) {{ track('<p>') }}</script>"
            f"<footer>webmaster@example.com</footer></body></html>").encode()


def write_crawl(pages, folder, files):
    """pages -> WARC files; in the first of them also a bomb, a record cut short, and a false length."""
    http, paths = b"HTTP/1.1 200 OK\r\nContent-Type: text/html", []
    for i in range(files):
        records = [warc_record("response", url, page(text, url), http) for _, url, text in pages[i::files]]
        if i == 0:
            bomb = warc_record("response", "http://example.com/bomb/0", b"<p>".ljust(40 << 20), http)
            lie = warc_record("response", "http://example.com/lie/0", b"<p>short</p>", packed=False)
            records[3:3] = [bomb, records[0][:200], gzip.compress(lie.replace(b"Length: 12", b"Length: 999"))]
        paths.append(Path(folder, f"crawl-{i}.warc.gz"))
        bpe.write_atomic(paths[-1], b"".join(records))
    return paths


def train_judges(good, rng, folder):
    """From good documents that are not in the crawl: a classifier that knows them from rubbish, and an n-gram
    model with the perplexity that 3% of good text exceeds -> flags of `run`."""
    def fit(texts):
        return KneserNey(3).fit(sentence for text in texts for sentence in plain_sentences(text))
    # Every text appears once in each guise, and as often unchanged: its words say nothing, only their order.
    words, kinds = plain_words(good), ("shuffled", "spun", "spam")
    bad = [rubbish(kind, text, rng, words) for text in good for kind in kinds]
    labels = ["high"] * len(bad) + ["low"] * len(bad)
    TextClassifier().fit(good * len(kinds) + bad, labels, epochs=15).save(folder / "judge.npz")
    perplexities = []                                # of each fifth by a model of the other four
    for fifth in range(5):
        lm = fit(text for i, text in enumerate(good) if i % 5 != fifth)
        perplexities += [lm.perplexity(plain_sentences(text)) for text in good[fifth::5]]
    fit(good).write_arpa(folder / "good.arpa")
    return ["--quality", str(folder / "judge.npz"), "--arpa", str(folder / "good.arpa"),
            "--max_perplexity", f"{np.quantile(perplexities, 0.97):.0f}"]


def make_planted(out, limit, every, files, seed=0):
    """A crawl of `limit` good documents (0: all) from every n-th file of the standard library, and rubbish ->
    (the pages, the paths of their WARC files, the flags for `run`)."""
    rng, folder = random.Random(seed), Path(out, "crawl")
    found = sources(bpe.corpus_files()[::every])
    # One source in ten is held out; of these a quarter is a benchmark that leaks into the crawl, the rest is
    # the test.
    good, test = (list(prose(text for name, text in found if (zlib.crc32(name.encode()) % 10 == 0) == side))
                  for side in (False, True))
    rng.shuffle(good)
    reference, good = good[:len(good) // 4], good[len(good) // 4:][:limit or None]
    benchmark, held_out = test[::4], [text for i, text in enumerate(test) if i % 4]
    pages = plant(good, benchmark, rng)
    paths = write_crawl(pages, folder, files)
    for name, texts in (("benchmark", benchmark), ("held_out", held_out)):
        write_jsonl(folder / f"{name}.jsonl", ({"text": text} for text in texts))
    return pages, paths, ["--data", *map(str, paths), *train_judges(reference, rng, folder),
                          "--evaluation", str(folder / "benchmark.jsonl"),
                          "--val", str(folder / "held_out.jsonl"), "--out", str(out)]


def score_filters(pages, out, paths, log=print):
    """What became of each kind, and precision and recall, from the files that `run` left."""
    parts, kinds = [part_path(out, path) for path in paths], {url: kind for kind, url, _ in pages}
    fate = {row["url"]: row["stage"] for part in parts for row in read_jsonl(part.with_suffix(".dropped"))}
    filtered = {row["url"] for part in parts for row in read_jsonl(part)}
    clean = {row["url"] for row in read_jsonl(Path(out, "clean.jsonl"))}
    log(f"\n{'planted':10}{'should go at':14}{'pages':>6}{'gone':>8}   where")
    for kind, stage in [("good", "-"), *PLANTED.items()]:
        where = Counter(fate.get(url, "kept" if url in clean else "a copy")
                        for url in kinds if kinds[url] == kind)
        log(f"{kind:10}{stage:14}{where.total():6,}{1 - where['kept'] / where.total():8.1%}   "
            + ", ".join(f"{name} {n}" for name, n in where.most_common(4)))
    groups = defaultdict(list)                       # of a text and its copies one may stay, whichever it is
    for url in filtered:
        if kinds[url] in ("good", "copy", "near"):
            groups[url.rsplit("/", 1)[1]].append(url)
    spare = sum(len(group) - 1 for group in groups.values())
    left = sum(max(0, len(clean.intersection(group)) - 1) for group in groups.values())
    lost = sum(not clean.intersection(group) for group in groups.values())
    right = sum(kinds.get(url) not in ("good", "copy", "near") for url in fate)
    log(f"filters: precision {right / max(1, len(fate)):.3f}; duplicates: recall "
        f"{1 - left / max(1, spare):.3f}, precision {1 - lost / max(1, len(filtered) - len(clean)):.3f} "
        f"({spare} spare copies, {left} left, {lost} texts lost)")


def prove(a, log=print):
    """The command `prove`: the same model at equal tokens on raw, filtered, and deduplicated text."""
    pages, paths, flags = make_planted(a.out, a.documents, 1, 4, a.seed)
    run(parse_args(["run", *flags, "--processes", str(a.processes)]), log)
    score_filters(pages, a.out, paths, log)
    raw = [{"text": html_to_text(page(text, url).decode())} for _, url, text in pages]
    filtered = [row for path in paths for row in read_jsonl(part_path(a.out, path))]
    deduplicated = list(read_jsonl(Path(a.out, "clean.jsonl")))
    results = {}
    for name, rows in (("raw", raw), ("filtered", filtered), ("deduplicated", deduplicated)):
        random.Random(a.seed).shuffle(rows)
        data = Path(a.out, "prove", f"{name}.jsonl")
        write_jsonl(data, rows)
        results[name] = (len(rows), sum(len(row["text"].encode()) for row in rows), train_on(data, a, log))
    log(f"\nBits per byte of held-out text after {a.tokens:,} tokens, {a.seeds} seeds")
    log(f"  {'data':14}{'documents':>10}{'MB':>8}{'mean':>9}{'least':>9}{'most':>9}{'against raw':>13}")
    for name, (count, size, values) in results.items():
        mean, raw = np.mean(values), np.mean(results["raw"][2])
        log(f"  {name:14}{count:10,}{size / 1e6:8.2f}{mean:9.4f}{min(values):9.4f}{max(values):9.4f}"
            f"{mean - raw:+13.4f}")
    return results


def train_on(data, a, log):
    """Runs train.py once a seed -> [bits per byte of the held-out text]."""
    given = {"--data": data, "--val": Path(a.out, "crawl", "held_out.jsonl"),
             "--tokenizer": Path(a.out, "tokenizer.json"), "--tokens": a.tokens,
             "--sweep": "seed=" + ",".join(map(str, range(a.seeds))), "--out": data.with_suffix("")}
    command = [sys.executable, str(Path(__file__).with_name("train.py")),
               *(str(word) for pair in given.items() for word in pair), *shlex.split(a.train_flags)]
    log("\n" + shlex.join(command[1:]))
    found = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            log(line.rstrip())
            found += map(float, re.findall(r"\| seed=\d+ .*?([\d.]+) bits/byte", line))
    if process.returncode or not found:
        raise ValueError(f"train.py failed with exit status {process.returncode}: see its message above")
    return found


# --- 13. demo and command line ------------------------------------------------------------------------------

def similar_sets(j, rng, size=200):
    """Two sets of random 64-bit numbers, `size` in all, whose Jaccard similarity is j."""
    values, common = rng.integers(0, 1 << 63, size, dtype=np.uint64) * CODE, round(j * size)
    cut = common + (size - common) // 2
    return values[:cut], np.concatenate((values[:common], values[cut:]))


def measure_minhash(similarities, bands, rows, trials, rng):
    """For each J: (share of pairs that share a band, RMS error of the estimate). Every trial has its own sets
    and its own hash functions."""
    found = []
    for j in similarities:
        hits, errors = 0, []
        for _ in range(trials):
            seed = int(rng.integers(1 << 30))
            a, b = (minhash(s, bands * rows, seed) for s in similar_sets(j, rng))
            hits += bool((band_hashes(a, bands) == band_hashes(b, bands)).any())
            errors.append((a == b).mean() - j)
        found.append((hits / trials, float(np.sqrt(np.mean(np.square(errors))))))
    return found


def measure_bloom(n, rate):
    """(expected, measured) rate of false positives after n keys, from n others."""
    bloom = Bloom(n, rate)
    for i in range(n):
        bloom.add(b"in %d" % i)
    missed = sum(b"in %d" % i not in bloom for i in range(n))
    assert missed == 0, f"a Bloom filter missed {missed} of its {n} keys"
    return bloom.expected(n), sum(b"out %d" % i in bloom for i in range(n)) / n


def plot_s_curve(path, similarities, measured, bands, rows, pyplot):
    grid = np.linspace(0, 1, 201)
    figure, axes = pyplot.subplots(figsize=(6.5, 4), layout="tight")
    for b, r in ((bands, rows), (5, 10), (20, 5), (50, 10)):
        axes.plot(grid, s_curve(grid, b, r), label=f"{b} bands of {r}", lw=1 + ((b, r) == (bands, rows)))
    axes.plot(similarities, measured, "ko", label=f"measured, {bands} bands of {rows}")
    axes.axvline((1 / bands) ** (1 / rows), color="grey", ls=":", label="(1/b)^(1/r)")
    axes.set(xlabel="Jaccard similarity of a pair", ylabel="probability that the pair is compared")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"\nsaved {path}")


def demo(out=Path("out/data")):
    """The lecture's claims, measured on a small crawl in which everything is labelled."""
    pages, paths, flags = make_planted(out, 400, 8, 2)
    print(f"{len(pages):,} pages in {len(paths)} WARC files: prose of Python's library, and rubbish")
    run(parse_args(["run", *flags]))
    score_filters(pages, out, paths)
    import model as M                                # table and pyplot; its torch takes 2 s to load
    bands, rows, similarities = 14, 8, (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
    measured = measure_minhash(similarities, bands, rows, 300, np.random.default_rng(0))
    table = [[f"pairs of J = {j} that share one of {bands} bands of {rows}", f"{s_curve(j, bands, rows):.3f}",
              f"{hit:.3f}"] for j, (hit, _) in zip(similarities, measured)]
    table += [[f"error of the estimate from {bands * rows} MinHashes, J = {j}",
               f"{math.sqrt(j * (1 - j) / bands / rows):.4f}", f"{error:.4f}"]
              for j, (_, error) in list(zip(similarities, measured))[::3]]
    for rate in (0.01, 0.001):
        expected, found = measure_bloom(20_000, rate)
        table.append([f"false positives of a Bloom filter for {rate:g}", f"{expected:.5f}", f"{found:.5f}"])
    M.table("predicted and measured", ["", "predicted", "measured"], table)
    if pyplot := M.pyplot():
        plot_s_curve(out / "data.png", similarities, [hit for hit, _ in measured], bands, rows, pyplot)


def run_warc(a):
    """Records by type, bytes, flaws; the first --show of them."""
    for path in input_files(a.data):
        kinds, flaws, size, begin = Counter(), Counter(), 0, time.perf_counter()
        for number, record in enumerate(read_warc(path)):
            kinds[record.type or "no type"] += 1
            size += len(record.body)
            flaws.update([record.flaw] if record.flaw else ())
            if number < a.show:
                print(printable(f"{record.type:12}{len(record.body):9,} bytes  {record.url}  {record.flaw}"))
        rate = kinds.total() / (time.perf_counter() - begin)
        listed = ", ".join(f"{n:,} {kind}" for kind, n in kinds.most_common())
        print(printable(f"{path}: {kinds.total():,} records ({listed}), {size / 1e6:.1f} MB, {rate:,.0f} "
                        f"records/s; flaws: {dict(flaws) or 'none'}"))


def each_document(a):
    for path in input_files(a.data):
        for name, text, _ in documents(path):
            if text:
                yield name, text


def run_extract(a):
    for name, text in each_document(a):
        print(f"--- {printable(name)}\n{CONTROLS.sub('', text)}")


def label(a, judge):
    """Print judge(text) = (label, ...) and the name of each document, then how many have each label."""
    counts = Counter()
    for name, text in each_document(a):
        first, *rest = judge(text)
        counts[first] += 1
        print(first, *(f"{v:.3f}" if isinstance(v, float) else v for v in rest), printable(name), sep="  ")
    print("; ".join(f"{kind} {n:,}" for kind, n in counts.most_common()) or "no documents")


def run_language(a):
    model = load_lid(a.lid176) if a.lid176 else None
    label(a, lambda text: identify_language(text, model))


def run_rules(a):
    label(a, lambda text: (gopher_quality(text) or gopher_repetition(text) or c4_rules(text)[1] or "passes",))


def run_pii(a):
    """What was found in each document, and of the first --show that hold any the masked text."""
    shown = itertools.count(1)

    def count(text):
        masked, counts = mask_pii(text)
        found = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
        in_full = found and next(shown) <= a.show
        return found or "none", *([f"\n{CONTROLS.sub('', masked)}\n"] if in_full else [])
    label(a, count)


def run_classify(a):
    """--train: learn, count what is right on a tenth held out, save. --data: label documents."""
    if not a.train and not a.data:
        raise ValueError("classify: give --train FILE to learn, --data FILE to label, or both")
    if a.train:
        learn, test = [], []
        for text, y in zip(*labelled_texts(a.train)):
            (learn if word_values([text])[0] % 10 else test).append((text, y))
        trained = TextClassifier(seed=a.seed).fit([x for x, _ in learn], [y for _, y in learn])
        trained.save(a.model)
        print(f"{a.model}: {len(learn):,} texts, labels {', '.join(trained.labels)}; "
              f"{sum(trained.classify(x)[0] == y for x, y in test):,} of {len(test):,} held-out texts right")
    if a.seed_task:
        print(f"note: the {a.seed_task} classifier has seen four sentences; train your own with --train")
    if a.data:
        label(a, (seed_classifier(a.seed_task) if a.seed_task else TextClassifier.load(a.model)).classify)


def run_ngram(a):
    """--train: learn and write --arpa. --data: the perplexity of each document, and which third it is in."""
    if not a.train and not a.data:
        raise ValueError("ngram: give --train FILE to learn, --data FILE to score, or both")
    if a.train:
        texts = bpe.read_documents(bpe.text_files(a.train), "replace")
        lm = KneserNey(a.order).fit(line for text in texts for line in plain_sentences(text))
        lm.write_arpa(a.arpa)
        print(f"{a.arpa}: " + ", ".join(f"{len(grams):,} {n}-grams" for n, grams in lm.log_p.items()))
    if a.data:
        lm = KneserNey.read_arpa(a.arpa)
        values = {text: lm.perplexity(plain_sentences(text)) for _, text in each_document(a)}
        buckets = dict(zip(values, perplexity_buckets(list(values.values())))) if values else {}
        label(a, lambda text: (buckets[text], values[text]))


def run_dsir(a):
    rows = list(each_document(a))
    target = bpe.read_documents(bpe.text_files(a.target), "replace")
    weights = dsir_weights(target, [text for _, text in rows])
    chosen, path = sorted(gumbel_top_k(weights, a.count, a.seed)), Path(a.out, "dsir.jsonl")
    write_jsonl(path, ({"text": rows[i][1], "url": rows[i][0]} for i in chosen))
    print(f"{path}: {len(chosen):,} of {len(rows):,} documents")


def run_dedup(a):
    paths = input_files(a.data)
    if a.by == "documents":
        dropped = minhash_deduplication(paths, a.out, a.hashes, a.bands, 5, a.jaccard)
        print(f"{len(paths) - len(dropped):,} of {len(paths):,} files kept; dropped:", *dropped)
    elif a.by == "paragraphs":
        print(f"{paragraph_deduplication(paths, a.out):,} paragraphs dropped")
    elif a.lines == "keep":
        raise ValueError("--by lines --lines keep would drop nothing: give --lines first or --lines all")
    else:
        print(f"{exact_line_deduplication(paths, a.out, a.lines == 'first'):,} lines dropped")


def run_decontaminate(a):
    index, counts = EvaluationIndex(evaluation_items(a.evaluation)), Counter()
    path = Path(a.out, "decontaminated.jsonl")

    def kept():
        for name, text in each_document(a):
            item = index.find(text)
            counts[bool(item)] += 1
            if item:
                print(f"{printable(name)} holds {index.n} words of {item}")
            else:
                yield {"text": text, "url": name}
    write_jsonl(path, kept())
    print(f"{path}: {counts[True]:,} documents dropped, {counts[False]:,} kept; {index.skipped} evaluation "
          f"items have under {index.n} words")


def run_mix(a):
    sources, taken, path = defaultdict(list), Counter(), Path(a.out, "mixed.jsonl")
    for given in a.data:
        name, equals, source = given.partition("=")
        if not equals:
            raise ValueError(f"--data {given}: give NAME=FILE, as in --data web=web.jsonl code=code.jsonl")
        sources[name] += [text for file in input_files([source]) for _, text, _ in documents(file) if text]
    stages = [parse_stage(given) for given in a.stages]

    def rows():
        for name, text in mix(sources, stages, a.megabytes * 1e6):
            taken[name] += len(text.encode())
            yield {"text": text, "source": name}
    write_jsonl(path, rows())
    whole = {name: sum(len(text.encode()) for text in sources[name]) for name in taken}
    print(f"{path}: " + ", ".join(
        f"{name} {size / 1e6:.2f} MB, {size / taken.total():.1%}, {size / whole[name]:.2f} epochs"
        for name, size in taken.items()))


def parse_stage(given):
    """"0.9:web=8,code=2" -> (0.9, {"web": 8.0, "code": 2.0})."""
    found = re.fullmatch(r"(\d+\.?\d*):(\w+=\d+\.?\d*(?:,\w+=\d+\.?\d*)*)", given)
    weights = dict(pair.split("=") for pair in found[2].split(",")) if found else {}
    weights = {name: float(weight) for name, weight in weights.items()}
    if not weights or not all(weights.values()) or not float(found[1]):
        raise ValueError(f"--stages {given}: give SHARE:NAME=WEIGHT,..., as in 0.9:web=8,code=2")
    return float(found[1]), weights


class Parser(bpe.Parser):
    def error(self, message):
        self.exit(2, f"data.py: error: {message}; see {self.prog} -h\n")


def number(default, text, low=0, high=math.inf):
    """A flag that takes a number of the default's type from low to high."""
    def parse(given):
        value = type(default)(given)
        if not low <= value <= high or value == math.inf:
            limit = f"{low:g} or more" if high == math.inf else f"a number from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{given}: give {limit}")
        return value
    parse.__name__ = type(default).__name__
    return dict(type=parse, default=default, metavar="N" if isinstance(default, int) else "X",
                help=f"{text} (default {default:g})")


def files(text, **more):
    return dict(nargs="+", metavar="PATH", help=text, **more)


FLAGS = {
    "--data": files("WARC, WET, HTML, .jsonl(.gz) and .txt(.gz) files, or folders of them"),
    "--out": dict(default="out/data", metavar="DIR", help="folder to write (default out/data)"),
    "--processes": number(bpe.default_processes(), "worker processes (of each rank)", 1),
    "--seed": number(0, "of samples and choices"),
    "--show": number(0, "print this many in full"),
    "--languages": dict(nargs="+", default=["en"], metavar="CODE", help="languages to keep, or any (en)"),
    "--min_language": number(0.65, "least score of the language", 0, 1),
    "--lid176": dict(metavar="FILE", help="fastText's lid.176.bin or .ftz; without it 28 languages"),
    "--rules": dict(action=argparse.BooleanOptionalAction, default=True,
                    help="Gopher, repetition, C4 rules (not for languages without blanks)"),
    "--quality": dict(metavar="FILE", help="a classifier of high and low"),
    "--min_quality": number(0.5, "least score of high", 0, 1),
    "--toxic": dict(metavar="FILE", help="a classifier of toxic and others"),
    "--nsfw": dict(metavar="FILE", help="a classifier of nsfw and others"),
    "--max_harm": number(0.5, "greatest score of toxic and of nsfw", 0, 1),
    "--arpa": dict(metavar="FILE", help="an n-gram model"),
    "--max_perplexity": number(1e4, "greatest perplexity a word"),
    "--evaluation": files("evaluation texts that must not be trained on", default=[]),
    "--hashes": number(112, "MinHashes a document", 1),
    "--bands": number(14, "LSH bands", 1),
    "--jaccard": number(0.8, "similarity from which two documents count as one", 0, 1),
    "--lines": dict(choices=("keep", "first", "all"), default="first",
                    help="lines that occur more than once: keep = leave them, first (default) = keep the "
                         "first copy, all = drop every copy"),
    "--by": dict(choices=("documents", "lines", "paragraphs"), default="documents", help="what to compare"),
    "--val": files("validation text (without it 5%% of the documents)"),
    "--vocab_size": number(4096, "ids of the tokenizer to train", 257),
    "--tokenizer": dict(metavar="FILE", help="a tokenizer.json to use instead of training one"),
    "--train": files("texts to learn from"),
    "--model": dict(metavar="FILE", default="out/data/classifier.npz", help="the classifier (%(default)s)"),
    "--seed_task": dict(choices=SEEDS, help="use a classifier of four sentences: to see one work, no more"),
    "--order": number(5, "words of the longest n-gram", 1),
    "--target": files("texts to resemble"),
    "--count": number(1000, "documents to choose", 1),
    "--stages": dict(nargs="+", metavar="S:A=W,B=W", help="each stage: share of the bytes, sources, weights"),
    "--megabytes": number(10.0, "size of the mixture, MB"),
    "--documents": number(0, "good documents (0: all there are)"),
    "--tokens": number(300_000, "training tokens of each run", 1),
    "--seeds": number(3, "runs of each kind", 1),
    "--train_flags": dict(default="", metavar="FLAGS", help="more flags for train.py, in quotes"),
}
COMMANDS = {                                         # name: (function, flags, ! if required, what it does)
    "run": (run, " ".join(["--data! --out --processes --seed --hashes --bands --jaccard --lines --val",
                           *(f"--{name}" for name in FILTER_FLAGS), "--vocab_size --tokenizer"]),
            "the whole pipeline: crawl -> token files, and a funnel"),
    "prove": (prove, "--out --processes --seed --documents --tokens --seeds --train_flags",
              "train on raw, filtered and deduplicated text"),
    "warc": (run_warc, "--data! --show", "what is in WARC, WET and WAT files"),
    "extract": (run_extract, "--data!", "HTML to text"),
    "language": (run_language, "--data! --lid176", "the language of each document"),
    "pii": (run_pii, "--data! --show", "mask emails, phone, card and IP numbers"),
    "rules": (run_rules, "--data!", "the rule that each document breaks"),
    "classify": (run_classify, "--train --model --data --seed --seed_task", "train or use a classifier"),
    "ngram": (run_ngram, "--train --order --arpa! --data", "train or use a Kneser-Ney model"),
    "dsir": (run_dsir, "--data! --target! --count --seed --out", "choose documents that look like others"),
    "dedup": (run_dedup, "--data! --out --by --lines --hashes --bands --jaccard", "drop copies among files"),
    "decontaminate": (run_decontaminate, "--data! --evaluation! --out",
                      "drop documents that hold 13 words of evaluation text"),
    "mix": (run_mix, "--data! --stages! --megabytes --out", "mix NAME=FILE sources in given shares"),
}


def parse_args(argv=None):
    parser = Parser(prog="python data.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage="%(prog)s [command] [--flag value ...]   (without a command: the lecture)")
    commands = parser.add_subparsers(dest="command", metavar="|".join(COMMANDS))
    for name, (function, flags, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=function)
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
    except KeyboardInterrupt:
        kept = "; finished files are kept: the same command goes on" if args.command == "run" else ""
        print(f"\ndata.py: interrupted{kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:                          # the reader of our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (ValueError, OSError) as e:
        print("data.py: error:", " ".join(str(e).split()), file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


# --- 14. the sentences that section 3 learns from -----------------------------------------------------------
# The same few sentences about a town, the weather, the price of bread and the messages of a program, written
# for this file: most of what tells languages apart are small words and endings, and these hold them. A
# language with an alphabet of its own needs fewer.

SENTENCES = """
en: The city lies on the river and has been known for its market since the twelfth century. In the morning
the children go to school while their parents work, and in the evening they all eat together. We do not know
what the weather will be like tomorrow, but it could rain. She said that he had never seen such a beautiful
house before. If you want to learn more about this, read the first two chapters of the book. The government
has announced that the price of bread and milk will rise again this year, because there was not enough water
for the fields. Who would have thought that it works with so little money? Which of these things should be
done first, and how are they used? This function returns the number of different objects in a collection, or
raises an exception if an argument is missing or its type is invalid. The following example shows how to
define a variable and assign the value of an expression to it. The selected file could not be opened: please
enter a user name and address. Public education, international relations and scientific research are all
included in this description.
de: Die Stadt liegt am Fluss und ist seit dem zwölften Jahrhundert für ihren Markt bekannt. Am Morgen gehen
die Kinder zur Schule, während ihre Eltern arbeiten, und am Abend essen alle zusammen. Wir wissen nicht, wie
das Wetter morgen wird, aber es könnte regnen. Sie sagte, dass er noch nie ein so schönes Haus gesehen habe.
Wenn Sie mehr darüber erfahren möchten, lesen Sie die ersten zwei Kapitel des Buches. Die Regierung hat
mitgeteilt, dass die Preise für Brot und Milch auch in diesem Jahr wieder steigen werden, weil es nicht
genug Wasser für die Felder gab. Wer hätte gedacht, dass man mit so wenig Geld auskommt? Diese Funktion gibt
die Anzahl der Objekte zurück oder meldet einen Fehler, wenn ein Argument fehlt oder ungültig ist. Die
gewählte Datei konnte nicht geöffnet werden: Bitte geben Sie Namen und Adresse ein.
fr: La ville se trouve au bord du fleuve et elle est connue pour son marché depuis le douzième siècle. Le
matin, les enfants vont à l'école pendant que leurs parents travaillent, et le soir tout le monde mange
ensemble. Nous ne savons pas quel temps il fera demain, mais il pourrait pleuvoir. Elle a dit qu'il n'avait
jamais vu une aussi belle maison. Si vous voulez en savoir plus, lisez les deux premiers chapitres du livre.
Le gouvernement a annoncé que le prix du pain et du lait va encore augmenter cette année, parce qu'il n'y
avait pas assez d'eau dans les champs. Qui aurait cru que c'était possible avec si peu d'argent ? Cette
fonction renvoie le nombre d'objets ou signale une erreur si un argument manque ou n'est pas valide.
Impossible d'ouvrir le fichier choisi : veuillez saisir un nom et une adresse.
es: La ciudad está junto al río y es conocida por su mercado desde el siglo doce. Por la mañana los niños
van a la escuela mientras sus padres trabajan, y por la noche todos comen juntos. No sabemos qué tiempo hará
mañana, pero podría llover. Ella dijo que él nunca había visto una casa tan hermosa. Si usted quiere saber
más sobre esto, lea los dos primeros capítulos del libro. El gobierno ha anunciado que los precios del pan y
de la leche van a subir otra vez este año, porque no había suficiente agua para los campos. ¿Quién hubiera
pensado que se puede hacer con tan poco dinero? Esta función devuelve el número de objetos o un error si
falta un argumento o no es válido. No se pudo abrir el archivo elegido: escriba un nombre y una dirección.
pt: A cidade fica junto ao rio e é conhecida pelo seu mercado desde o século doze. De manhã as crianças vão
para a escola enquanto os pais trabalham, e à noite todos comem juntos. Não sabemos como estará o tempo
amanhã, mas pode chover. Ela disse que ele nunca tinha visto uma casa tão bonita. Se você quiser saber mais
sobre isso, leia os dois primeiros capítulos do livro. O governo anunciou que os preços do pão e do leite
vão subir outra vez este ano, porque não havia água suficiente para os campos. Quem teria pensado que isso
se faz com tão pouco dinheiro? Também são muito boas as opções que não foram usadas. Esta função devolve o
número de objetos ou um erro se faltar um argumento ou não for válido. Não foi possível abrir o arquivo
escolhido: escreva um nome e um endereço.
it: La città si trova sul fiume ed è conosciuta per il suo mercato fin dal dodicesimo secolo. La mattina i
bambini vanno a scuola mentre i genitori lavorano, e la sera tutti mangiano insieme. Non sappiamo che tempo
farà domani, ma potrebbe piovere. Lei disse che lui non aveva mai visto una casa così bella. Se volete
saperne di più, leggete i primi due capitoli del libro. Il governo ha annunciato che anche quest'anno i
prezzi del pane e del latte aumenteranno, perché non c'era abbastanza acqua per i campi. Chi avrebbe mai
pensato che si potesse fare con così pochi soldi? Questo è quello che gli altri hanno detto della gente.
Questa funzione restituisce il numero di oggetti o un errore se un argomento manca o non è valido.
Impossibile aprire il file scelto: inserire un nome e un indirizzo.
nl: De stad ligt aan de rivier en staat sinds de twaalfde eeuw bekend om haar markt. 's Ochtends gaan de
kinderen naar school terwijl hun ouders werken, en 's avonds eet iedereen samen. We weten niet wat voor weer
het morgen wordt, maar het zou kunnen regenen. Zij zei dat hij nog nooit zo'n mooi huis had gezien. Als u
hier meer over wilt weten, lees dan de eerste twee hoofdstukken van het boek. De regering heeft aangekondigd
dat de prijzen van brood en melk dit jaar weer zullen stijgen, omdat er niet genoeg water voor de velden
was. Wie had gedacht dat het met zo weinig geld kan worden gedaan? Deze functie geeft het aantal objecten
terug of een fout als een argument ontbreekt of ongeldig is. Het gekozen bestand kon niet worden geopend:
voer een naam en een adres in.
sv: Staden ligger vid floden och är sedan tolvhundratalet känd för sin marknad. På morgonen går barnen till
skolan medan deras föräldrar arbetar, och på kvällen äter alla tillsammans. Vi vet inte hur vädret blir i
morgon, men det kan börja regna. Hon sade att han aldrig hade sett ett så vackert hus. Om du vill veta mer
om detta kan du läsa de två första kapitlen i boken. Regeringen har meddelat att priset på bröd och mjölk
ska höjas igen i år, eftersom det inte fanns tillräckligt med vatten på åkrarna. Vem skulle ha trott att det
går att göra något för så lite pengar? Funktionen returnerar antalet objekt eller ett fel om ett argument
saknas eller är ogiltigt. Den valda filen kunde inte öppnas: ange ett namn och en adress.
da: Byen ligger ved floden og har været kendt for sit marked siden det tolvte århundrede. Om morgenen går
børnene i skole, mens deres forældre arbejder, og om aftenen spiser alle sammen. Vi ved ikke, hvordan vejret
bliver i morgen, men det kan godt regne. Hun sagde, at han aldrig havde set så smukt et hus. Hvis du vil
vide mere om dette, kan du læse de to første kapitler af bogen. Regeringen har meddelt, at prisen på brød og
mælk skal stige igen i år, fordi der ikke var nok vand til markerne. Hvem skulle have troet, at det kunne
gøres for så få penge af nogle, der også var med? Funktionen returnerer antallet af objekter eller en fejl,
hvis et argument mangler eller er ugyldigt. Den valgte fil kunne ikke åbnes: angiv venligst et navn og en
adresse.
pl: Miasto leży nad rzeką i od dwunastego wieku jest znane ze swojego targu. Rano dzieci idą do szkoły,
podczas gdy ich rodzice pracują, a wieczorem wszyscy jedzą razem. Nie wiemy, jaka będzie jutro pogoda, ale
może padać deszcz. Powiedziała, że on nigdy wcześniej nie widział tak pięknego domu. Jeśli chcesz dowiedzieć
się więcej na ten temat, przeczytaj dwa pierwsze rozdziały książki. Rząd ogłosił, że ceny chleba i mleka
znowu wzrosną w tym roku, ponieważ na polach było za mało wody. Kto by pomyślał, że można to zrobić za tak
małe pieniądze? Są również takie, które się przez to zmieniły.
cs: Město leží na řece a od dvanáctého století je známé svým trhem. Ráno jdou děti do školy, zatímco jejich
rodiče pracují, a večer všichni jedí společně. Nevíme, jaké bude zítra počasí, ale mohlo by pršet. Řekla, že
nikdy předtím neviděl tak krásný dům. Pokud se o tom chcete dozvědět více, přečtěte si první dvě kapitoly
knihy. Vláda oznámila, že ceny chleba a mléka letos opět vzrostou, protože na polích nebylo dost vody. Kdo
by si pomyslel, že se to dá udělat za tak málo peněz? Byly také ty, které jsou při tom důležité, a jeho
přátelé se ptali, proč už ještě nejsou hotové.
hu: A város a folyó partján fekszik, és a tizenkettedik század óta híres a piacáról. Reggel a gyerekek
iskolába mennek, amíg a szüleik dolgoznak, este pedig mindenki együtt eszik. Nem tudjuk, milyen lesz holnap
az idő, de lehet, hogy esni fog. Azt mondta, hogy ő még soha nem látott ilyen szép házat. Ha többet szeretne
erről megtudni, olvassa el a könyv első két fejezetét. A kormány bejelentette, hogy a kenyér és a tej ára
idén is emelkedni fog, mert nem volt elég víz a földeken. Ki gondolta volna, hogy ilyen kevés pénzből is meg
lehet csinálni?
ro: Orașul se află pe malul râului și este cunoscut pentru piața sa încă din secolul al doisprezecelea.
Dimineața copiii merg la școală în timp ce părinții lor lucrează, iar seara toți mănâncă împreună. Nu știm
cum va fi vremea mâine, dar ar putea să plouă. Ea a spus că el nu mai văzuse niciodată o casă atât de
frumoasă. Dacă doriți să aflați mai multe despre aceasta, citiți primele două capitole ale cărții. Guvernul
a anunțat că prețul pâinii și al laptelui va crește din nou anul acesta, pentru că nu a fost destulă apă pe
câmpuri. Cine ar fi crezut că se poate face cu atât de puțini bani? Funcția returnează numărul de obiecte
sau o eroare dacă un argument lipsește ori nu este valid. Fișierul ales nu a putut fi deschis: introduceți
un nume și o adresă.
fi: Kaupunki sijaitsee joen rannalla ja on ollut tunnettu toristaan jo kaksitoista sataa vuotta. Aamulla
lapset menevät kouluun, kun heidän vanhempansa ovat töissä, ja illalla kaikki syövät yhdessä. Emme tiedä,
millainen sää huomenna on, mutta voi olla, että sataa. Hän sanoi, ettei ollut koskaan ennen nähnyt niin
kaunista taloa. Jos haluat tietää tästä enemmän, lue kirjan kaksi ensimmäistä lukua. Hallitus on
ilmoittanut, että leivän ja maidon hinta nousee tänä vuonna taas, koska pelloilla ei ollut tarpeeksi vettä.
Kuka olisi uskonut, että se voidaan tehdä niin vähällä rahalla? Funktio palauttaa kohteiden määrän tai
virheen, jos argumentti puuttuu tai ei kelpaa. Valittua tiedostoa ei voitu avata: anna nimi ja osoite.
tr: Şehir nehrin kıyısındadır ve on ikinci yüzyıldan beri pazarıyla tanınır. Sabahları anne babaları
çalışırken çocuklar okula gider, akşamları ise herkes birlikte yemek yer. Yarın havanın nasıl olacağını
bilmiyoruz ama yağmur yağabilir. Kadın, onun daha önce hiç bu kadar güzel bir ev görmediğini söyledi. Bu
konuda daha fazla bilgi almak isterseniz kitabın ilk iki bölümünü okuyun. Hükümet, tarlalarda yeterli su
olmadığı için ekmek ve süt fiyatlarının bu yıl yeniden artacağını açıkladı. Bu kadar az parayla
yapılabileceğini kim düşünürdü?
vi: Thành phố nằm bên bờ sông và nổi tiếng với khu chợ từ thế kỷ mười hai. Buổi sáng trẻ em đi học trong khi
cha mẹ chúng làm việc, và buổi tối mọi người cùng ăn cơm với nhau. Chúng tôi không biết ngày mai thời tiết
sẽ như thế nào, nhưng trời có thể mưa. Cô ấy nói rằng anh ta chưa bao giờ thấy một ngôi nhà đẹp như vậy. Nếu
bạn muốn biết thêm về điều này, hãy đọc hai chương đầu của cuốn sách. Chính phủ đã thông báo rằng giá bánh
mì và sữa năm nay sẽ lại tăng vì không có đủ nước cho các cánh đồng.
id: Kota itu terletak di tepi sungai dan dikenal karena pasarnya sejak abad kedua belas. Pada pagi hari
anak-anak pergi ke sekolah sementara orang tua mereka bekerja, dan pada malam hari semua orang makan
bersama. Kami tidak tahu bagaimana cuaca besok, tetapi mungkin akan hujan. Dia mengatakan bahwa ia belum
pernah melihat rumah yang begitu indah. Jika Anda ingin tahu lebih banyak tentang hal ini, bacalah dua bab
pertama dari buku tersebut. Pemerintah telah mengumumkan bahwa harga roti dan susu akan naik lagi tahun ini
karena tidak ada cukup air untuk sawah.
ru: Город стоит на берегу реки и с двенадцатого века известен своим рынком. Утром дети идут в школу, пока их
родители работают, а вечером все едят вместе. Мы не знаем, какая завтра будет погода, но может пойти дождь.
Она сказала, что он никогда раньше не видел такого красивого дома. Если вы хотите узнать об этом больше,
прочитайте первые две главы книги. Правительство объявило, что цены на хлеб и молоко в этом году опять
вырастут, потому что на полях было мало воды. Функция возвращает количество объектов или сообщает об ошибке,
если аргумент отсутствует или имеет неверное значение. Не удалось открыть выбранный файл: введите имя и
адрес.
uk: Місто лежить на березі річки і з дванадцятого століття відоме своїм ринком. Вранці діти йдуть до школи,
поки їхні батьки працюють, а ввечері всі їдять разом. Ми не знаємо, якою буде завтра погода, але може піти
дощ. Вона сказала, що він ніколи раніше не бачив такого гарного будинку. Якщо ви хочете дізнатися про це
більше, прочитайте перші два розділи книги. Уряд оголосив, що ціни на хліб і молоко цього року знову
зростуть, бо на полях було мало води. Функція повертає кількість об'єктів або повідомляє про помилку, якщо
аргумент відсутній чи має неправильне значення. Не вдалося відкрити вибраний файл: введіть ім'я та адресу.
el: Η πόλη βρίσκεται δίπλα στο ποτάμι και είναι γνωστή για την αγορά της. Το πρωί τα παιδιά πηγαίνουν στο
σχολείο και το βράδυ όλοι τρώνε μαζί. Δεν ξέρουμε τι καιρό θα κάνει αύριο, αλλά μπορεί να βρέξει.
he: העיר נמצאת על גדת הנהר וידועה בשוק שלה. בבוקר הילדים הולכים לבית הספר ובערב כולם אוכלים יחד. אנחנו לא
יודעים מה יהיה מזג האוויר מחר, אבל אולי ירד גשם.
ar: تقع المدينة على النهر وهي معروفة بسوقها منذ القرن الثاني عشر. في الصباح يذهب الأطفال إلى المدرسة بينما
يعمل آباؤهم، وفي المساء يأكل الجميع معا. لا نعرف كيف سيكون الطقس غدا، ولكن قد ينزل المطر. قالت إنه لم ير من
قبل بيتا جميلا مثل هذا. أعلنت الحكومة أن أسعار الخبز والحليب سوف ترتفع هذا العام.
fa: این شهر در کنار رودخانه قرار دارد و از قرن دوازدهم به خاطر بازارش شناخته شده است. صبح بچه‌ها به مدرسه
می‌روند و شب همه با هم غذا می‌خورند. نمی‌دانیم فردا هوا چگونه خواهد بود، اما ممکن است باران ببارد. او گفت که
پیش از این هرگز چنین خانه زیبایی ندیده بود. دولت اعلام کرد که قیمت نان و شیر امسال دوباره بالا می‌رود.
hi: शहर नदी के किनारे बसा है और अपने बाज़ार के लिए जाना जाता है। सुबह बच्चे स्कूल जाते हैं और शाम को
सब लोग साथ में खाना खाते हैं। हमें नहीं पता कि कल मौसम कैसा होगा, लेकिन बारिश हो सकती है। उसने कहा
कि उन्होंने ऐसा सुंदर घर पहले कभी नहीं देखा था।
zh: 这座城市位于河边，自十二世纪以来就以它的市场闻名。早上孩子们去上学，他们的父母去工作，晚上大家一起吃饭。
我们不知道明天的天气怎么样，但是可能会下雨。她说他从来没有见过这么漂亮的房子。如果你想了解更多，请阅读这本书
的前两章。政府宣布，因为田里的水不够，今年面包和牛奶的价格还会上涨。這個國家對於學習語言與發展經濟非常關心，
我們會為您說明時間與過程。
ja: この町は川のそばにあり、十二世紀から市場で知られています。朝は子どもたちが学校に行き、夜はみんなで一緒に
ごはんを食べます。明日の天気がどうなるかは分かりませんが、雨が降るかもしれません。彼女は、彼がこんなに美しい
家を見たことがないと言った。もっと知りたい場合は、この本の最初の二つの章を読んでください。
この関数はオブジェクトの数を返し、引数にエラーがあればメッセージを表示します。選択したファイルを開けませ
ん。名前とアドレスを入力してください。
ko: 이 도시는 강가에 있으며 시장으로 잘 알려져 있습니다. 아침에는 아이들이 학교에 가고 저녁에는 모두 함께
밥을 먹습니다. 내일 날씨가 어떨지 모르지만 비가 올 수도 있습니다.
th: เมืองนี้ตั้งอยู่ริมแม่น้ำและมีชื่อเสียงเรื่องตลาด ตอนเช้าเด็กๆ ไปโรงเรียน และตอนเย็นทุกคนกินข้าวด้วยกัน
เราไม่รู้ว่าพรุ่งนี้อากาศจะเป็นอย่างไร แต่ฝนอาจจะตก
"""


if __name__ == "__main__":
    sys.exit(main())
