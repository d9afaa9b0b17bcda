"""Tests of data.py, part 2: the whole pipeline over files, processes and ranks; restarts; the command line."""
import gzip, json, os, re, shlex, shutil, socket, subprocess, sys, tracemalloc
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bpe  # noqa: E402
import data as D  # noqa: E402


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A small labelled crawl: (pages, paths, flags of `run`)."""
    return D.make_planted(tmp_path_factory.mktemp("planted"), 40, 24, 3)


def flags(planted, out, *more):
    given = [str(out) if planted[2][i - 1] == "--out" else flag for i, flag in enumerate(planted[2])]
    return ["run", *given, "--vocab_size", "300", *more]


def run(argv):
    lines = []
    return D.run(D.parse_args(argv), log=lines.append), "\n".join(lines)


def rows(path):
    return list(D.read_jsonl(path))


@pytest.fixture(scope="module")
def finished(planted, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    result, shown = run(flags(planted, out, "--processes", "1"))
    return out, result, shown


def outputs(out):
    """All but the .json files, which hold seconds."""
    return {p.name: p.read_bytes() for p in sorted(Path(out).rglob("*")) if p.is_file() and p.suffix != ".json"}


def test_funnel_adds_up(planted, finished):
    out, result, shown = finished
    pages, paths, _ = planted
    stages = result["stages"]
    order = [s for s in D.STAGES_OF_A_RUN if s in stages]
    assert order == list(D.STAGES_OF_A_RUN)
    assert stages["read"][0] == len(pages) + 3                               # and a bomb, a cut member, a lie
    for before, after in zip(order, order[1:]):
        documents, lost, size, lost_bytes, _ = stages[before]
        assert stages[after][0] == documents - lost, (before, after)
        if before != "personal data":                                        # masks change the length
            assert stages[after][2] == size - lost_bytes
    assert len(rows(out / "clean.jsonl")) == stages[order[-1]][0] - stages[order[-1]][1]
    notes = [reason for reason in result["reasons"] if reason.startswith(("note: ", "read: "))]
    assert all(any(flaw in n for n in notes) for flaw in ("cut at", "member damaged", "truncated")), notes
    fates = [fate for _, fate, _, _ in result["samples"]]
    assert fates.count("kept") == 5 and len(fates) == 10
    assert all(stage in shown for stage in order) and "100,000 in" in shown and "why: " in shown


def test_planted_rubbish_goes_where_it_should(planted, finished):
    out, pages, paths = finished[0], *planted[:2]
    shown = []
    D.score_filters(pages, out, paths, shown.append)
    table = {line.split()[0]: line for line in shown}
    for kind in ("language", "menu", "repeated", "spam", "test"):
        assert " 100.0%" in table[kind], table[kind]
    found, kinds = re.search(r"precision ([\d.]+); duplicates: recall ([\d.]+)", shown[-1]), {url: kind for kind, url, _ in pages}
    fates = {row["url"] for path in paths for row in rows(D.part_path(out, path).with_suffix(".dropped"))}
    wrong = sum(kinds.get(url) in ("good", "copy", "near") for url in fates)             # a copy of a good page is good text
    assert abs(float(found[1]) - (1 - wrong / len(fates))) < 6e-4 and any(kinds.get(url) in ("copy", "near") for url in fates)
    assert float(found[1]) > 0.8 and float(found[2]) > 0.9


def test_token_files_hold_the_clean_text(finished):
    out = finished[0]
    tok = bpe.load_tokenizer(out / "tokenizer.json")
    ids = bpe.load_tokens(out / "train.bin", tok)
    texts = [row["text"] for row in rows(out / "clean.jsonl")]
    assert tok.decode(np.asarray(ids)) == "".join(text + bpe.EOT for text in texts)
    assert ids.tolist().count(tok.eot_id) == len(texts)


def test_end_of_text_in_a_page_is_ordinary_text(tmp_path):
    page = b"<p>" + b" ".join(b"The word %d and that is all of it." % i for i in range(40)) + b" &lt;|endoftext|&gt;</p>"
    page = D.warc_record("response", "http://x", page, b"HTTP/1.1 200 OK")
    (tmp_path / "a.warc.gz").write_bytes(page + D.warc_record("conversion", "http://y", b"There is one more text in the file."))
    result, _ = run(["run", "--data", str(tmp_path / "a.warc.gz"), "--no-rules", "--languages", "any", "--vocab_size", "300",
                     "--out", str(tmp_path / "out"), "--lines", "keep"])
    assert result["stages"]["read"][0] == 2
    tok = bpe.load_tokenizer(tmp_path / "out" / "tokenizer.json")
    ends = sum(bpe.load_tokens(tmp_path / "out" / f"{part}.bin", tok).tolist().count(tok.eot_id) for part in ("train", "val"))
    assert ends == 2


def test_processes_and_ranks_change_nothing(planted, finished, tmp_path):
    expected = outputs(finished[0])
    run(flags(planted, tmp_path / "two", "--processes", "2"))
    assert outputs(tmp_path / "two") == expected
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, str(ROOT / "data.py"), *flags(planted, tmp_path / "ranks", "--processes", "1")]
    ranks = [subprocess.Popen(argv, env={**env, "RANK": str(i), "LOCAL_RANK": str(i)}, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True) for i in range(2)]
    shown = [p.communicate(timeout=120) for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], shown
    assert "exact copies" in shown[0][0] and "exact copies" not in shown[1][0]           # rank 0 alone reports
    assert outputs(tmp_path / "ranks") == expected


def test_restart_reads_only_what_is_new(planted, finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    begun, argv = [], flags(planted, tmp_path, "--processes", "1")
    monkeypatch.setattr(D, "documents", lambda path, old=D.documents: begun.append(path.name) or old(path))
    again, shown = run(argv)
    assert not begun and "3 of 3 files were finished before" in shown
    assert again["reasons"] == finished[1]["reasons"] and again["samples"] == finished[1]["samples"]
    run([*argv, "--min_quality", "0.4"])                                     # another setting: every file anew
    assert len(begun) == 3
    os.utime(argv[argv.index("--quality") + 1], ns=(1, 1))                   # a judge trained again since: the same
    run([*argv, "--min_quality", "0.4"])
    assert len(begun) == 6


def test_own_output_is_no_input(tmp_path):
    (tmp_path / "a.txt").write_text(bpe.EOT.join(f"This is page {i} of them." for i in range(30)))
    argv = ["run", "--data", str(tmp_path), "--no-rules", "--languages", "any", "--out", str(tmp_path), "--vocab_size", "258"]
    once, again = (run(argv)[0] for _ in range(2))
    assert once["files"] == again["files"] == 1 and again["tokens"] == once["tokens"]


def test_a_lost_rank_is_one_line(tmp_path, monkeypatch):
    class Lonely(D.Ranks):
        def __init__(self, rank, size):
            self.rank, self.size = 0, 2

        def gather(self, value):
            raise RuntimeError("Connection closed by peer")
        exchange, close = gather, lambda self: None
    (tmp_path / "a.txt").write_text("a page")
    monkeypatch.setattr(D, "Ranks", Lonely)
    with pytest.raises(OSError, match="lost another .*same command"):
        run(["run", "--data", str(tmp_path / "a.txt"), "--out", str(tmp_path), "--processes", "1"])


def killed(path, old=D.documents):
    if path.name == "crawl-2.warc.gz":
        os._exit(9)
    return old(path)


def test_a_killed_worker_loses_no_finished_file(planted, finished, tmp_path, monkeypatch):
    argv = flags(planted, tmp_path, "--processes", "2")
    with monkeypatch.context() as patch:
        patch.setattr(D, "documents", killed)
        with pytest.raises(ChildProcessError, match="killed"):
            run(argv)
    done = sorted(p.name for p in (tmp_path / "parts").glob("*.json"))
    assert done and all("crawl-2" not in name for name in done)
    _, shown = run(argv)
    assert f"{len(done)} of 3 files were finished before" in shown
    assert outputs(tmp_path) == outputs(finished[0])


def test_lines_first_and_all(tmp_path):
    for name, lines in (("a", ["one", "menu", "two"]), ("b", ["menu", "three"]), ("c", ["four"]), ("d", ["menu"])):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    kept = {}
    for how in ("keep", "first", "all"):
        out = tmp_path / how
        run(["run", "--data", *(str(tmp_path / f"{n}.txt") for n in "abcd"), "--no-rules", "--languages", "any",
             "--out", str(out), "--lines", how, "--vocab_size", "258", "--processes", "1"])
        kept[how] = [row["text"] for row in rows(out / "clean.jsonl")]
    assert kept["keep"] == ["one\nmenu\ntwo", "menu\nthree", "four", "menu"]
    assert kept["first"] == ["one\nmenu\ntwo", "three", "four"]
    assert kept["all"] == ["one\ntwo", "three", "four"]


def test_text_inputs(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "url": "u"}\nbroken\n\n{"text": 3}\n' + "[" * 200_000 +
                                      '\n{"text": "two"}\n{"text": "half \\ud800", "url": "\\udc00"}')
    (tmp_path / "b.txt").write_text(f"x{bpe.EOT}y{bpe.EOT}")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("é".encode()))
    assert [d[:2] for d in D.documents(tmp_path / "a.jsonl")] == \
        [("u", "one"), ("a.jsonl:2", None), ("a.jsonl:4", None), ("a.jsonl:5", None), ("a.jsonl:6", "two"), ("?", "half ?")]
    (tmp_path / "a.warc.jsonl").write_text('{"text": "three", "url": null}')             # not a WARC, whatever it is named after
    assert list(D.documents(tmp_path / "a.warc.jsonl")) == [("a.warc.jsonl:1", "three", "")]
    assert [d[1] for d in D.documents(tmp_path / "b.txt")] == ["x", "y"]
    assert [d[1] for d in D.documents(tmp_path / "c.txt.gz")] == ["é"]
    texts = b"".join(b'{"text": "%d%s"}\n' % (i, b"x" * 100) for i in range(100_000))       # three blocks
    for bad in (gzip.compress(texts, 1)[:-20], b"no gzip"):                  # cut off, or something else
        (tmp_path / "d.jsonl.gz").write_bytes(bad)
        *good, last = D.documents(tmp_path / "d.jsonl.gz")
        assert last[1] is None and "damaged" in last[2] and len(good) in (0, *range(50_000, 100_000))


def test_strange_files_are_counted(tmp_path, monkeypatch):
    """Of a folder as users have them: what is empty, foreign, binary or damaged has a reason, the rest is read."""
    folder, rng = tmp_path / "in", np.random.default_rng(0)
    folder.mkdir()
    monkeypatch.setattr(D, "MAX_WASTE", 1 << 25)
    monkeypatch.setattr(D, "MAX_PAGE", 100_000)
    junk, text = rng.bytes(50_000), "Été: a page of text, and write to jo@example.com."
    for name, data in {"empty.warc.gz": b"", "junk.warc.gz": junk, "junk.txt": junk, "junk.txt.gz": b"hello",
                       "nul.txt": b"jo@example.com \0" * 50,
                       "bomb.jsonl.gz": gzip.compress(bytes(100 << 20), 1), "a.txt": text.encode("utf-16"),
                       "a.warc.wat.gz": D.warc_record("metadata", "http://x", b"{}"), "esc.txt": text.encode() + b"\x1b",
                       "b.txt": text.replace("page", "piece").encode("cp1252"), "c.HTM": b"<p>Hyper text.</p>",
                       "long.txt": b"too " * 30_000}.items():
        (folder / name).write_bytes(data)
    (tmp_path / "v.txt").write_text(text)
    result, shown = run(["run", "--data", str(folder), "--no-rules", "--languages", "any", "--out", str(tmp_path / "o"),
                         "--val", str(tmp_path / "v.txt"), "--lines", "keep", "--vocab_size", "258", "--processes", "1"])
    reasons = result["reasons"]
    assert reasons["note: a file without documents"] == 3 and reasons["read: binary: over 2% control codes"] == 2
    assert reasons["read: junk.txt.gz is damaged: Not a gzipped file (b'he')"] == 1
    assert reasons["note: cut at 100,000 characters"] == 1
    assert any("bomb.jsonl.gz is a bomb" in reason for reason in reasons)
    masked = text.replace("jo@example.com", "|||EMAIL_ADDRESS|||")
    assert sorted(row["text"] for row in rows(tmp_path / "o" / "clean.jsonl")) == \
        sorted(["Hyper text.", ("too " * 25_000).strip(), masked, masked.replace("page", "piece")])      # esc.txt is a.txt
    assert "jo@" not in shown and "\x1b" not in shown
    (folder / "half.jsonl.gz").write_bytes(gzip.compress(text.encode() * 9)[:-9])
    assert D.main(["decontaminate", "--data", str(folder / "c.HTM"), "--evaluation", str(folder / "half.jsonl.gz")]) == 2


def test_a_line_without_end_costs_bounded_memory(tmp_path):
    with open(tmp_path / "a.txt", "wb") as f:
        for _ in range(120):
            f.write(b"a" * (1 << 20))
    tracemalloc.start()
    (name, text, _), = D.documents(tmp_path / "a.txt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(text) == D.MAX_RECORD and peak < 100e6


def test_mask_reaches_the_output(tmp_path):
    body = "The address of the man is jo@example.com and that is all that we have to know of it here.\n" + "\n".join(
        f"The number {word} is one of the words that we have in it for the test." for word in D.MASKS)
    (tmp_path / "a.txt").write_text(body)
    result, _ = run(["run", "--data", str(tmp_path / "a.txt"), "--no-rules", "--vocab_size", "300", "--val", str(tmp_path / "a.txt"),
                     "--out", str(tmp_path / "o")])
    assert "|||EMAIL_ADDRESS|||" in (tmp_path / "o" / "clean.jsonl").read_text() and result["reasons"]["masked: emails"] == 1


def test_english_stop_words_are_asked_of_english_alone():
    german = "\n".join(f"Das ist der {i}. Satz, und er hat wie alle anderen mehr als fünf Wörter am Stück." for i in range(9))
    def fault(*languages):
        a = D.parse_args(["run", "--data", "x", "--languages", *languages])
        return dict(D.make_filters(json.dumps({name: getattr(a, name) for name in D.FILTER_FLAGS})))["rules"](german)
    assert "stop words" in fault("en") and "stop words" not in fault("en", "de") and "stop words" not in fault("any")


# --- command line -------------------------------------------------------------------------------------------

def docstring_commands():
    return [line.split("#")[0].strip() for line in D.__doc__.splitlines()
            if re.match(r"\s*(Run\s+)?(python|torchrun .*) ?data\.py", line)]


def test_docstring_commands_parse():
    commands = docstring_commands()
    assert len(commands) >= 5
    for command in commands:
        words = shlex.split(command.removeprefix("Run").strip())
        D.parse_args(words[words.index("data.py") + 1:])


@pytest.mark.parametrize("argv, says", [
    (["run"], "--data"), (["rum"], "invalid choice"), (["run", "--data", "x", "--band", "3"], "unrecognized"),
    (["run", "--data", "x", "--jaccard", "1.5"], "--jaccard: 1.5: give a number from 0 to 1"),
    (["run", "--data", "x", "--processes", "0"], "--processes: 0: give 1 or more"),
    (["run", "--data", "/no/such"], "/no/such: no such file"),
    (["run", "--data", "{tmp}"], "no files here"),
    (["run", "--data", "{tmp}/a.txt", "--hashes", "100", "--bands", "14"], "--hashes 98"),
    (["run", "--data", "{tmp}/a.txt", "--quality", "{tmp}/a.txt"], "no classifier"),
    (["run", "--data", "{tmp}/a.txt", "--out", "{tmp}/o"], "nothing is left"),
    (["run", "--data", "{tmp}/a.txt", "--out", "{tmp}/o", "--val", "/no/such"], "/no/such: no such file"),
    (["run", "--data", "{tmp}/a.txt", "--out", "{tmp}/o", "--val", "{tmp}/nul.txt"], "not a text file"),
    (["run", "--data", "{tmp}/a.txt", "--evaluation", "{tmp}/a.txt"], "none of 1 items has 13 words"),
    (["classify"], "give --train FILE"), (["ngram", "--arpa", "x"], "give --train FILE"),
    (["dedup", "--data", "{tmp}/a.txt", "--out", "{tmp}/o", "--by", "lines", "--lines", "keep"], "--lines first"),
    (["mix", "--data", "web={tmp}/a.txt", "--stages", "0:web=1"], "SHARE:NAME=WEIGHT"),
    (["ngram", "--arpa", "{tmp}/a.txt", "--data", "{tmp}/a.txt"], "no ARPA file"),
    (["ngram", "--arpa", "{tmp}/b", "--train", "{tmp}/a.txt", "--order", "99"], "1 to 8"),
    (["mix", "--data", "web", "--stages", "1:web=1"], "NAME=FILE"),
    (["mix", "--data", "web={tmp}/a.txt", "--stages", "web=1"], "SHARE:NAME=WEIGHT"),
    (["mix", "--data", "web={tmp}/a.txt", "--stages", "1:code=1", "--out", "{tmp}"], "'code', which is empty"),
    (["classify", "--model", "{tmp}/none.npz", "--data", "{tmp}/a.txt"], "none.npz"),
    (["dedup", "--data", "{tmp}/a.txt", "--out", "{tmp}"], "holds the input files"),
])
def test_a_mistake_is_one_line(argv, says, tmp_path, capsys):
    if argv != ["run", "--data", "{tmp}"]:
        (tmp_path / "a.txt").write_text("hello there\n")
        (tmp_path / "nul.txt").write_bytes(b"a\0")
    try:
        status = D.main([word.replace("{tmp}", str(tmp_path)) for word in argv])
    except SystemExit as e:
        status = e.code
    error = capsys.readouterr().err
    assert status == 2 and says in error and error.count("\n") == 1 and error.startswith("data.py: error:")


def test_every_command_works(planted, tmp_path, capsys):
    warc, good = str(planted[1][0]), str(planted[1][0].with_name("held_out.jsonl"))
    (tmp_path / "labels.txt").write_text("".join(f"__label__{'high' if i % 2 else 'low'} {'good text' if i % 2 else 'bad'} {i}\n"
                                                 for i in range(60)))
    (tmp_path / "a.html").write_text("<p>hello</p>")
    (tmp_path / "x.txt").write_text("a line\nmail jo@example.com\n")
    (tmp_path / "y.txt").write_text("a line\nanother\n")
    x, y, out = str(tmp_path / "x.txt"), str(tmp_path / "y.txt"), str(tmp_path / "out")
    for argv, says in [
            (["warc", "--data", warc, "--show", "1"], "records/s; flaws: "), (["extract", "--data", str(tmp_path / "a.html")], "hello"),
            (["extract", "--data", warc], "--- http://"), (["language", "--data", warc], "en "),
            (["pii", "--data", x, "--show", "1"], "|||EMAIL_ADDRESS|||"), (["rules", "--data", warc], "passes"),
            (["classify", "--train", str(tmp_path / "labels.txt"), "--model", f"{out}/m.npz", "--data", x], "held-out texts right"),
            (["classify", "--seed_task", "toxic", "--data", x], "toxic"),
            (["ngram", "--train", good, "--order", "2", "--arpa", f"{out}/a.arpa", "--data", x, y], "2-grams"),
            (["dsir", "--data", warc, "--target", good, "--count", "9", "--out", out], "dsir.jsonl: 9 of"),
            (["dedup", "--data", x, y, "--out", f"{out}/1"], "2 of 2 files kept"),
            (["dedup", "--data", x, y, "--out", f"{out}/2", "--by", "lines", "--lines", "all"], "2 lines dropped"),
            (["dedup", "--data", x, y, "--out", f"{out}/3", "--by", "paragraphs"], "0 paragraphs"),
            (["decontaminate", "--data", good, "--evaluation", good, "--out", out], "0 kept"),
            (["mix", "--data", f"a={x}", f"b={y}", "--stages", "1:a=3,b=1", "--megabytes", "0.001", "--out", out], "epochs")]:
        assert D.main(argv) == 0, argv
        assert says in capsys.readouterr().out, argv


def test_import_is_light():
    """The start must be fast: torch is loaded by ranks and by the demo's table alone."""
    found = subprocess.run([sys.executable, "-c", "import sys, data; print('torch' in sys.modules)"], cwd=ROOT,
                           capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "False", found.stderr


def test_prove_drives_train(tmp_path, monkeypatch):
    """With train.py replaced by a script that prints what it would: the three data sets differ as they should."""
    fake = tmp_path / "train.py"
    fake.write_text("import sys; a = sys.argv; n = open(a[a.index('--data') + 1]).read().count('\\n')\n"
                    "for s in a[a.index('--sweep') + 1][5:].split(','):\n"
                    "    print(f'  run 1/2 | seed={s}   | seed {s} | {n / 100:.4f} bits/byte | 3 s')\n")
    monkeypatch.setattr(D, "__file__", str(tmp_path / "data.py"))
    monkeypatch.setattr(bpe, "corpus_files", lambda files=bpe.corpus_files()[::24]: files)
    shown = []
    a = D.parse_args(["prove", "--documents", "30", "--seeds", "2", "--out", str(tmp_path / "o"), "--processes", "1"])
    results = D.prove(a, shown.append)
    sizes = [row[0] for row in results.values()]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[2] > 5
    assert all(row[2] == [row[0] / 100] * 2 for row in results.values())
    assert "against raw" in shown[-4] and "deduplicated" in shown[-1]
    fake.write_text("raise SystemExit(3)")
    with pytest.raises(ValueError, match="exit status 3"):
        D.train_on(tmp_path / "o" / "prove" / "raw.jsonl", a, shown.append)
