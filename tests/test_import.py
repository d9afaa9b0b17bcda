"""Tests of model.py's Hugging Face checkpoints: (1) the container equals the safetensors package's, (2) the
models equal transformers', both ways, (3) invariants: bytes survive a round trip, shards equal the whole,
published files of any age, (4) memory and sizes, (5) the command line and bad input.

All models are made here, small and random, every shape odd where the architecture allows it.
"""
import json, os, random, re, shlex, shutil, subprocess, sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model as M  # noqa: E402  (the scripts are flat files, not a package)

import torch  # noqa: E402

st = pytest.importorskip("safetensors.torch")
hf = pytest.importorskip("transformers")
hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()
torch.set_num_threads(1)
close = torch.testing.assert_close

V, T = 123, 150
SHAPE = dict(vocab_size=V, hidden_size=48, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=T, bos_token_id=None, eos_token_id=None)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
THEIRS = {  # name -> transformers' config
    "gpt2": lambda: hf.GPT2Config(vocab_size=V, n_positions=T, n_embd=60, n_layer=3, n_head=5,
                                  bos_token_id=None, eos_token_id=None),
    "gpt2 untied, n_inner": lambda: hf.GPT2Config(vocab_size=V, n_positions=T, n_embd=36, n_layer=2, n_head=1,
                                                  n_inner=50, tie_word_embeddings=False, eos_token_id=7),
    "llama2": lambda: hf.LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}, rms_norm_eps=1e-5),
    "llama3": lambda: hf.LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama, all biases, tied": lambda: hf.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, head_dim=6,
                                                      tie_word_embeddings=True),
    "llama, geglu, multi-query": lambda: hf.LlamaConfig(**{**SHAPE, "num_key_value_heads": 1},
                                                        hidden_act="gelu_pytorch_tanh"),
    "qwen2": lambda: hf.Qwen2Config(**SHAPE, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "qwen2 tied": lambda: hf.Qwen2Config(**SHAPE, tie_word_embeddings=True, use_sliding_window=False,
                                         sliding_window=5),
    "qwen3": lambda: hf.Qwen3Config(**SHAPE, head_dim=22),
    "qwen3 tied": lambda: hf.Qwen3Config(**{**SHAPE, "hidden_size": 50}, head_dim=2,
                                         tie_word_embeddings=True),
    "mistral": lambda: hf.MistralConfig(**SHAPE, head_dim=20, sliding_window=9),
    "mixtral": lambda: hf.MixtralConfig(**SHAPE, num_local_experts=5, num_experts_per_tok=3,
                                        sliding_window=None),
}
SOME_IDS = torch.randint(0, V, (3, 77), generator=torch.Generator().manual_seed(1))


def random_model(config, seed=0):
    """Weights large enough that every part of the model shows in the logits (0.02 would hide most of it)."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1 if p.dim() == 1 else 0, 0.2)
    model.tie_weights()
    return model


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """name -> (their model, its folder), made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("theirs")
            model = random_model(THEIRS[name]())
            model.save_pretrained(folder)
            (folder / "tokenizer.json").write_text('{"version": "1.0"}')
            made[name] = model, folder
        return made[name]
    return get


def command(*argv):
    """python model.py ARGV in this process -> exit status."""
    before, sys.argv = sys.argv, ["model.py", *map(str, argv)]
    try:
        M.main()
        return 0
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = before


def bring(folder, out):
    """import, then load -> our model."""
    assert command("import", folder, "--out", out) == 0
    return M.load_model(out / "checkpoint.pt")


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of a saved folder, to be damaged."""
    def get(name="llama2"):
        return Path(shutil.copytree(saved(name)[1], tmp_path / "copy"))
    return get


def edit_json(path, **changes):
    """None as a value removes the key."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def edit_tensors(folder, change):
    weights = st.load_file(folder / "model.safetensors")
    change(weights)
    st.save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors",
                 {"format": "pt"})


# --- 1. the container equals the safetensors package's

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def test_container(tmp_path):
    """Written here it reads there, and the other way round."""
    wrote = {f"t{i}": torch.randn(shape).to(dtype) for i, (shape, dtype) in
             enumerate([(s, d) for s in ((1,), (7,), (5, 123), (3, 1, 2)) for d in DTYPES])}
    M.write_tensors(tmp_path / "x", [(name, t, t.shape) for name, t in wrote.items()])
    theirs = st.load_file(tmp_path / "x")
    assert set(theirs) == set(wrote)
    assert int.from_bytes((tmp_path / "x").read_bytes()[:8], "little") % 8 == 0         # aligned
    wrote["mask"] = torch.ones(3, dtype=torch.bool)                      # an unknown dtype may lie there
    st.save_file(wrote, tmp_path / "y", {"any": "thing"})
    found = M.read_header(tmp_path / "y")
    assert set(found) == set(wrote) and found.pop("mask")[-1] == "BOOL"
    for name, where in found.items():
        same, other = torch.empty_like(wrote[name]), torch.empty(wrote[name].shape, dtype=torch.float64)
        M.read_tensor(same, *where)
        M.read_tensor(other, *where)
        assert torch.equal(same, wrote[name]) and torch.equal(other, wrote[name].double())
        assert theirs[name].dtype == same.dtype and torch.equal(theirs[name], same)


# --- 2. the models equal transformers', both ways

@pytest.mark.parametrize("name", THEIRS)
def test_logits_and_greedy_text(name, saved, tmp_path):
    theirs, folder = saved(name)
    ours = bring(folder, tmp_path / "out")
    with torch.no_grad():
        want = theirs(SOME_IDS).logits
        assert want.std() > 0.5                                          # otherwise 1e-4 would say little
        close(ours(SOME_IDS), want, atol=1e-4, rtol=0)
        prompt = SOME_IDS[:1, :5]
        text = theirs.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert M.generate(ours, prompt[0].tolist(), 64, temperature=0) == text[0, 5:].tolist()
    assert M.num_params(ours.config) == sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()
    cache = ours.make_cache()                                            # and with a cache
    with torch.no_grad():
        steps = torch.cat([ours(part, cache=cache) for part in SOME_IDS.split([1, 13, 63], 1)], 1)
    close(steps, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", THEIRS)
def test_export_loads_in_transformers(name, saved, tmp_path):
    theirs, folder = saved(name)
    bring(folder, tmp_path / "out")
    assert command("export", tmp_path / "out" / "checkpoint.pt", tmp_path / "back") == 0
    back, report = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(back) is type(theirs) and back.dtype == torch.float32
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert back.config.eos_token_id in (theirs.config.eos_token_id, [theirs.config.eos_token_id])
    with torch.no_grad():
        assert torch.equal(back.eval()(SOME_IDS).logits, theirs(SOME_IDS).logits)
    one, two = (st.load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    one = {k.removeprefix("transformer."): v for k, v in one.items()}
    assert set(one) == set(two) and all(torch.equal(one[k], two[k]) for k in one)       # to the bit
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


OURS = [M.PRESETS["tiny"], dict(M.PRESETS["gpt2-recipe"], d_model=48, tie_embeddings=False), dict(window=5),
        dict(ffn="reglu", d_ff=33), dict(bias="qkv", num_kv_heads=1), dict(bias="all"), dict(d_head=6),
        dict(d_head=6, d_model=50, num_heads=4), dict(d_head=6, bias="qkv"),
        dict(qk_norm=True, d_model=50, num_heads=4, d_head=4, dropout=0.1, init="gpt2", tie_embeddings=True),
        dict(rope_factor=4.0, rope_original_context=16, rope_theta=99.0), dict(norm_eps=0.1),
        dict(num_experts=3, d_expert=20, balance="none", router_noise=1.0), dict(num_experts=4, window=7)]


@pytest.mark.parametrize("kw", OURS, ids=str)
def test_models_of_ours_load_there(kw, tmp_path):
    c = M.ModelConfig(**{"d_model": 32, **kw, "vocab_size": V, "context_length": 90, "num_layers": 2})
    torch.manual_seed(0)
    ours = M.Transformer(c).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(1 if p.dim() == 1 else 0, 0.2)
    M.save_checkpoint(tmp_path / "checkpoint.pt", ours)
    assert command("export", tmp_path / "checkpoint.pt", tmp_path / "theirs") == 0
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    with torch.no_grad():
        close(theirs(SOME_IDS).logits, ours(SOME_IDS), atol=1e-4, rtol=0)
        again = bring(tmp_path / "theirs", tmp_path / "again")           # and home
        assert torch.equal(again(SOME_IDS), ours(SOME_IDS))


def test_the_tokenizer_gives_the_same_ids_there(tmp_path):
    """qwen3's own class would split words by a rule of its own, not by tokenizer.json's."""
    import bpe
    (tmp_path / "a.txt").write_text("Größe 12345, it's\n\n\n  def f(x): return x\n" * 50)
    tok = bpe.prepare(tmp_path / "d", [tmp_path / "a.txt"], None, vocab_size=300, num_processes=1,
                      log=lambda *_: None)["tokenizer"]
    M.save_checkpoint(tmp_path / "d" / "checkpoint.pt", M.Transformer(M.ModelConfig(
        **{**M.PRESETS["tiny"], "vocab_size": tok.vocab_size, "num_layers": 1})))
    assert command("export", tmp_path / "d" / "checkpoint.pt", tmp_path / "hf") == 0
    there = hf.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("Größe 12345 it's\n\n\n  x", "a<|endoftext|>b", "  \n 1234567"):
        assert there.encode(text) == tok.encode(text)


# --- 3. invariants

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_files_is_kept(dtype, saved, tmp_path):
    theirs, _ = saved("llama3")
    random_model(theirs.config).to(dtype).save_pretrained(tmp_path / "half")
    ours = bring(tmp_path / "half", tmp_path / "out")                    # load_model makes fp32 of it
    weights = M.load_checkpoint(tmp_path / "out" / "checkpoint.pt")["model"]
    assert {t.dtype for t in weights.values()} == {dtype} and ours.head.weight.dtype == torch.float32
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32).eval()
    with torch.no_grad():
        close(ours(SOME_IDS), again(SOME_IDS).logits, atol=1e-4, rtol=0)
    assert command("export", tmp_path / "out" / "checkpoint.pt", tmp_path / "back") == 0
    one, two = (st.load_file(tmp_path / f / "model.safetensors") for f in ("half", "back"))
    assert all(torch.equal(one[k], two[k]) and two[k].dtype == dtype for k in one)


@pytest.mark.parametrize("one, others", [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)])
def test_mixed_dtypes_lose_nothing(one, others, copy, tmp_path):
    folder = copy("qwen2")
    name = "model.layers.0.self_attn.k_proj.weight"                      # one of three that become one tensor
    edit_tensors(folder, lambda w: w.update({k: w[k].to(one if k == name else others) for k in w}))
    want = st.load_file(folder / "model.safetensors")[name]
    assert command("import", folder, "--out", tmp_path / "o") == 0
    assert command("export", tmp_path / "o" / "checkpoint.pt", tmp_path / "b") == 0
    assert torch.equal(st.load_file(tmp_path / "b" / "model.safetensors")[name], want.float())


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_shards_equal_the_whole(name, saved, tmp_path, capsys):
    theirs, folder = saved(name)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    one, two = (bring(f, tmp_path / n).state_dict() for f, n in ((folder, "1"), (tmp_path / "shards", "2")))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert f"{tmp_path / 'shards'} has no tokenizer.json" in capsys.readouterr().out


def test_published_files_of_any_age(saved, copy, tmp_path):
    """The keys of Llama 3.1's and GPT-2's published files, not those that transformers writes today."""
    folder = copy("llama3")
    edit_json(folder / "config.json", rope_parameters=None, head_dim=None, rope_theta=5e5,
              rope_scaling={k: v for k, v in LLAMA3.items() if k != "rope_theta"}, eos_token_id=[5, 9])
    edit_tensors(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    ours = bring(folder, tmp_path / "o")
    with torch.no_grad():
        close(ours(SOME_IDS), saved("llama3")[0](SOME_IDS).logits, atol=1e-4, rtol=0)
    assert M.load_checkpoint(tmp_path / "o" / "checkpoint.pt")["stop_ids"] == [5, 9]
    theirs, folder = saved("gpt2")
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text(json.dumps(dict(
        model_type="gpt2", activation_function="gelu_new", attn_pdrop=0.1, layer_norm_epsilon=1e-5, n_ctx=T,
        n_embd=60, n_head=5, n_layer=3, n_positions=T, vocab_size=V)))
    weights = st.load_file(folder / "model.safetensors")
    weights = {k.removeprefix("transformer."): v for k, v in weights.items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, T, T).tril().bool()      # the causal mask, as a buffer
    weights["lm_head.weight"] = weights["wte.weight"].clone()            # tied, stored twice
    st.save_file(weights, old / "model.safetensors")
    with torch.no_grad():
        close(bring(old, tmp_path / "o2")(SOME_IDS), theirs(SOME_IDS).logits, atol=1e-4, rtol=0)


_llama = dict(model_type="llama", hidden_act="silu", rms_norm_eps=1e-5, tie_word_embeddings=False,
              attention_bias=False, pretraining_tp=1, torch_dtype="bfloat16")
PUBLISHED = {  # config.json in the published form (the keys that are read), and the parameters of that model
    "gpt2-xl": (dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, n_ctx=1024,
                     n_embd=1600, n_head=25, n_layer=48, n_positions=1024, vocab_size=50257), 1_557_611_200),
    "Llama-2-13b": (dict(_llama, hidden_size=5120, intermediate_size=13824, num_attention_heads=40,
                         num_hidden_layers=40, num_key_value_heads=40, max_position_embeddings=4096,
                         vocab_size=32000, rope_scaling=None), 13_015_864_320),
    "Llama-3.1-8B": (dict(_llama, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
                          num_hidden_layers=32, num_key_value_heads=8, max_position_embeddings=131072,
                          vocab_size=128256, rope_theta=500000.0, mlp_bias=False, rope_scaling=dict(
                              factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_type="llama3",
                              original_max_position_embeddings=8192)), 8_030_261_248),
    "Mistral-7B-v0.1": (dict(_llama, model_type="mistral", hidden_size=4096, intermediate_size=14336,
                             num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8,
                             max_position_embeddings=32768, vocab_size=32000, rope_theta=10000.0,
                             sliding_window=4096), 7_241_732_096),
    "Mixtral-8x7B": (dict(_llama, model_type="mixtral", hidden_size=4096, intermediate_size=14336,
                          num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8,
                          max_position_embeddings=32768, vocab_size=32000, rope_theta=1e6,
                          sliding_window=None, num_local_experts=8, num_experts_per_tok=2), 46_702_792_704),
    "Qwen2.5-0.5B": (dict(_llama, model_type="qwen2", hidden_size=896, intermediate_size=4864,
                          num_attention_heads=14, num_hidden_layers=24, num_key_value_heads=2,
                          max_position_embeddings=32768, vocab_size=151936, rope_theta=1e6,
                          rms_norm_eps=1e-6, tie_word_embeddings=True, sliding_window=32768,
                          use_sliding_window=False, max_window_layers=24), 494_032_768),
    "Qwen3-0.6B": (dict(_llama, model_type="qwen3", hidden_size=1024, intermediate_size=3072, head_dim=128,
                        num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8,
                        max_position_embeddings=40960, vocab_size=151936, rope_theta=1e6,
                        rms_norm_eps=1e-6, tie_word_embeddings=True, rope_scaling=None,
                        sliding_window=None, use_sliding_window=False), 596_049_920)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name):
    theirs, parameters = PUBLISHED[name]
    kind, c = M.config_from_hf(theirs)
    assert M.num_params(c) == parameters
    back = M.config_to_hf(c)
    both = set(back) & set(theirs) - {"sliding_window"}                  # Qwen's is not used
    assert back["model_type"] == kind == theirs["model_type"] and len(both) >= 8
    plain = {**theirs, "rope_scaling": dict(rope_type="default", factor=8.0)}
    assert M.config_from_hf(plain)[1].rope_factor == 1
    assert not [k for k in both if back[k] != theirs[k]]


def test_a_tied_matrix_is_stored_once(saved, tmp_path):
    theirs, folder = saved("qwen2 tied")
    ours = bring(folder, tmp_path)
    assert ours.head.weight is ours.embedding.weight
    weights = (folder / "model.safetensors").stat().st_size
    assert (tmp_path / "checkpoint.pt").stat().st_size < weights + 30_000            # 27 kB a second time


# --- 4. memory

PEAK = """
import re, sys
sys.path.insert(0, sys.argv.pop(1))
import model
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
model.main()
print(peak() - before, file=sys.stderr)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak memory from /proc")
def test_memory_is_at_most_a_fifth_above_the_weights(tmp_path):
    """Peak of resident memory above that of the started program, of both commands, for a model whose largest
    matrix is a quarter of it (as in Qwen2.5-0.5B)."""
    c = M.ModelConfig(vocab_size=20_000, d_model=384, num_layers=8, num_heads=6, num_kv_heads=2, d_ff=2048,
                      bias="qkv", tie_embeddings=True, init="gpt2")
    M.save_checkpoint(tmp_path / "checkpoint.pt", M.Transformer(c))
    for argv in (["export", tmp_path / "checkpoint.pt", tmp_path / "hf"],
                 ["import", tmp_path / "hf", "--out", tmp_path / "o"]):
        done = subprocess.run([sys.executable, "-c", PEAK, ROOT, *argv], capture_output=True, text=True,
                              timeout=120)
        assert done.returncode == 0, done.stderr
        ratio = int(done.stderr) / (4 * M.num_params(c))
        assert 0.8 < ratio < 1.2, f"{argv[0]}: {ratio:.2f}"


# --- 5. the command line and bad input

def fails(capsys, *argv):
    """The command ends with status 2 and one line -> that line."""
    capsys.readouterr()
    assert command(*argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.match(r"model\.py: error: ", err), (out, err)
    return err


CONFIG_ERRORS = [
    (dict(model_type="bert"), "model_type 'bert' is not one of gpt2, llama"),
    (dict(model_type=None), "model_type None"), (dict(model_type=[]), "config.json: "),
    (dict(rope_parameters=dict(rope_type="yarn", factor=2.0, rope_theta=1e4)), "rope_type 'yarn' is not"),
    (dict(rope_parameters=None, rope_scaling=dict(rope_type=None, type="linear", factor=2.0)), "'linear'"),
    (dict(rope_scaling=7), "config.json: "), (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(hidden_act="tanh"), "hidden_act 'tanh'"), (dict(hidden_act=["silu"]), "config.json: "),
    (dict(attention_bias=True), "attention_bias"), (dict(hidden_size=None), "hidden_size is missing"),
    (dict(num_attention_heads=None), "num_attention_heads is missing"), (dict(hidden_size="48"), "'48'"),
    (dict(num_hidden_layers=-1), "num_layers=-1"), (dict(intermediate_size=80), "has shape (72, 48)"),
    (dict(num_hidden_layers=4), "9 tensors are missing"), (dict(num_hidden_layers=2), "9 tensors are unk"),
    (dict(vocab_size=124), "embed_tokens.weight has shape")]


@pytest.mark.parametrize("change, words", CONFIG_ERRORS, ids=lambda v: str(v))
def test_config_errors(change, words, copy, tmp_path, capsys):
    folder = copy()
    edit_json(folder / "config.json", **change)
    assert words in fails(capsys, "import", folder, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


TENSOR_ERRORS = [
    (lambda w: w.pop("model.norm.weight"), "1 tensors are missing, such as model.norm.weight"),
    (lambda w: w.update(extra=torch.ones(3)), "1 tensors are unknown, such as extra"),
    (lambda w: w.update({"model.norm.weight": torch.ones(3)}), "has shape (3,)"),
    (lambda w: w.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}), "dtype I8")]


@pytest.mark.parametrize("change, words", TENSOR_ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_tensor_errors(change, words, copy, tmp_path, capsys):
    folder = copy()
    edit_tensors(folder, change)
    assert words in fails(capsys, "import", folder, "--out", tmp_path / "o")


def write_header(path, header, data=b"\0" * 64):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


T1 = dict(dtype="F32", shape=[2, 3], data_offsets=[0, 24])
HEADERS = [b"", b"not json", b"[1, 2]", b"\xff\xfe", b"{" * 9000, b"[" * 100_000, b'{"a": 1}',
           *({"a": entry} for entry in (
             None, {}, dict(T1, shape=[9]), dict(T1, shape=["x"]), dict(T1, dtype=[1]),
             dict(T1, data_offsets=[0, 25]), dict(T1, data_offsets=[-24, 0]), dict(T1, data_offsets=[0]),
             dict(T1, data_offsets="ab"), dict(T1, data_offsets=[10**12, 10**12 + 24])))]


@pytest.mark.parametrize("header", HEADERS, ids=lambda h: str(h)[:40])
def test_bad_headers(header, copy, tmp_path, capsys):
    folder = copy()
    write_header(folder / "model.safetensors", header)
    err = fails(capsys, "import", folder, "--out", tmp_path / "o")
    assert "model.safetensors" in err and ("damaged" in err or "truncated" in err)


def test_cut_and_altered_files(copy, tmp_path, capsys):
    """Whatever happens to the bytes: an import, or one line; never a traceback."""
    folder, rng = copy("gpt2 untied, n_inner"), random.Random(0)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for cut in (0, 7, 8, 9, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert "truncated" in fails(capsys, "import", folder, "--out", tmp_path / "o")
    n = int.from_bytes(whole[:8], "little")
    for _ in range(150):
        data = bytearray(whole)
        for at in rng.sample(range(8 + n), rng.choice((1, 3))):
            data[at] = rng.randrange(256) if rng.random() < 0.5 else ord(rng.choice('0123456789"{}[],:'))
        path.write_bytes(data)
        try:
            M.check_tensors("x", M.find_tensors(folder), {})
        except (ValueError, OSError) as e:
            assert str(e)
    shutil.rmtree(folder)
    assert "no " in fails(capsys, "import", folder)


def test_missing_files(saved, copy, tmp_path, capsys):
    theirs, _ = saved("llama2")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    gone = sorted((tmp_path / "shards").glob("model-*"))[1]
    gone.unlink()
    assert f"{gone.name} is missing" in fails(capsys, "import", tmp_path / "shards", "--out", tmp_path / "o")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    (tmp_path / "outside").write_bytes(b"")                         # an index leads to its own folder only
    for text, words in (("{}", "no weight_map"), ("[]", "no weight_map"), ("{", "damaged"), ("7", "damaged"),
                        ('{"weight_map": {"a": "../outside"}}', "outside is missing")):
        index.write_text(text)
        assert words in fails(capsys, "import", tmp_path / "shards", "--out", tmp_path / "o")
    index.unlink()
    assert "model.safetensors is missing" in fails(capsys, "import", tmp_path / "shards")
    folder = copy()
    (folder / "config.json").write_text("{")
    assert "config.json is truncated or damaged" in fails(capsys, "import", folder)
    (folder / "config.json").unlink()
    assert "config.json: give a folder" in fails(capsys, "import", folder)


def test_nothing_is_overwritten(saved, tmp_path, capsys):
    _, folder = saved("qwen3")
    out = tmp_path / "o"
    bring(folder, out)
    kept = (out / "checkpoint.pt").read_bytes()
    assert "checkpoint.pt is there already" in fails(capsys, "import", folder, "--out", out)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "tokenizer.json").write_text("mine")               # of token files made with it
    assert "tokenizer.json is there already" in fails(capsys, "import", folder, "--out", tmp_path / "p")
    assert "config.json is there already" in fails(capsys, "export", out / "checkpoint.pt", folder)
    assert (out / "checkpoint.pt").read_bytes() == kept
    assert (tmp_path / "p" / "tokenizer.json").read_text() == "mine"


GPT2, MOE = M.PRESETS["gpt2-recipe"], dict(num_experts=4)
INEXPRESSIBLE = [
    (dict(norm_position="post"), "norm_position=post"), (dict(parallel=True), "parallel=True"),
    (dict(attn_softcap=20.0), "attn_softcap=20.0"), (dict(logit_softcap=9.0), "logit_softcap=9.0"),
    (dict(position="none"), "position=none"), (dict(position="sinusoidal"), "position=sinusoidal"),
    (dict(norm="layernorm"), "norm=layernorm"), (dict(ffn="relu2"), "relu2"), (dict(ffn="silu"), "ffn=silu"),
    (dict(qk_norm=True, bias="qkv"), "bias=qkv"), (dict(qk_norm=True, window=4), "qk_norm=True"),
    (dict(mixer="mla"), "mixer=mla"), (dict(mixer="linear"), "mixer=linear"), (dict(mtp=1), "mtp=1"),
    (dict(layers="LG", window=4), "layers=LG"), (dict(MOE, shared_experts=1), "shared_experts=1"),
    (dict(MOE, capacity_factor=1.0), "capacity_factor=1.0"), (dict(MOE, experts_per_token=1), "tok 1"),
    (dict(MOE, router="expert_choice"), "router=expert_choice"), (dict(MOE, balance="bias"), "ffn.bias has"),
    (dict(GPT2, window=4), "window=4"), (dict(GPT2, ffn="swiglu"), "ffn=swiglu"),
    (dict(GPT2, num_kv_heads=1), "num_kv_heads=1"), (dict(GPT2, d_head=8), "d_head=8")]


@pytest.mark.parametrize("kw, words", INEXPRESSIBLE, ids=lambda v: v if isinstance(v, str) else "")
def test_what_they_cannot_say_is_refused(kw, words, tmp_path, capsys):
    c = M.ModelConfig(**{**kw, "d_model": 32, "num_layers": 2, "vocab_size": 99})
    M.save_checkpoint(tmp_path / "checkpoint.pt", M.Transformer(c))
    assert words in fails(capsys, "export", tmp_path / "checkpoint.pt", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_every_knob_is_kept_or_refused_or_of_training_only():
    """Each field of ModelConfig moved off its default: the folder says so, or export refuses."""
    base, silent = M.ModelConfig(d_model=32, num_layers=4, vocab_size=99), set()
    odd = dict(num_heads=4, num_kv_heads=1, d_head=8, d_ff=40, d_model=48, num_layers=3, layers="G",
               dropout=0.1)
    for f in fields(base):
        others = [v for v in f.metadata["choices"] or [not f.default] if v != f.default]
        value = odd.get(f.name) or (f.type(f.default * 2 + 2) if f.type in (int, float) else others[0])
        try:
            changed = replace(base, **{f.name: value})
            back = M.config_from_hf(M.config_to_hf(changed))[1]
        except ValueError:
            continue
        if M.spelled_out(back) == M.spelled_out(base):
            silent.add(f.name)
        else:
            assert getattr(M.spelled_out(back), f.name) == value, f.name
    assert silent == {"dropout", "init", "balance", "balance_loss", "balance_devices", "router_z_loss",
                      "router_noise", "router_jitter", "d_expert"}       # d_expert: there are no experts here


@pytest.mark.parametrize("argv, words", [
    (["import"], "DIR"), (["export", "a"], "DIR"), (["import", "a", "--ot", "b"], "unrecognized"),
    (["fetch", "a"], "fetch"),
    (["import", "a", "--d_model", "64"], "unrecognized"), (["export", "gone.pt", "b"], "no checkpoint at"),
    (["import", "gone"], "config.json")], ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_command_lines(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in fails(capsys, *argv)
    assert os.listdir(tmp_path) == []


def test_documented_commands_parse():
    lines = re.findall(r"^(?:Run)?\s+\$? ?python model\.py(.*?)(?:#.*)?$", M.__doc__, re.M)
    parsed = [M.parse_args(shlex.split(line)) for line in lines]
    assert {a.command for a in parsed} == {None, "import", "export"}
    assert parsed[0].config == M.ModelConfig(**M.PRESETS["tiny"]) and parsed[0].out == "out"
    a, b = M.parse_args(["import", "d", "--out", "a"]), M.parse_args(["export", "c", "d"])
    assert (a.folder, a.out, b.checkpoint, b.folder) == ("d", "a", "c", "d")
