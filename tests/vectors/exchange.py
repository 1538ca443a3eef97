"""Lets other people's programs open what this crate writes, and this crate what they write.

    pip install torch transformers einops
    python tests/vectors/exchange.py

It writes and reads small random models, one for each model type, type of numbers, naming, format, and in one file and in
several, and compares logits. It is `.ci/run`'s step "exchange", needs no GPU, and takes a few minutes. Of others there are

    transformers           the version that this Python has
    transformers 4.40      the last that refuses safetensors without metadata; installed into target/exchange
    mamba_ssm              its loader, model and reference scan, read from the sources on PyPI, which are fetched into
                           target/exchange. Its kernels need a GPU; the sources' own `selective_scan_ref` and
                           `rms_norm_ref` stand in their place.

The crate is driven by `examples/convert.rs`, and texts are written by `examples/generate.rs`. What cannot be had is skipped with a line; the exit status is 1 if anything
that was compared differs.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "target" / "exchange"
OLD = "4.40.2"
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]

# Two float32 models of two layers differ by some 1e-6 of the largest logit: sums of up to 72 terms in another order.
TOLERANCE = 1e-5
# A half model is compared widened to float32 on both sides, with the same bits: no looser.

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
SHARDED = 15_000


class Judge:
    def __init__(self):
        self.passed, self.failed, self.worst, self.section = 0, [], 0.0, ""
        self.by_section = {}

    def begin(self, section):
        self.section = section
        self.by_section.setdefault(section, [0, 0, 0.0])

    def hold(self, what, got, expected, tolerance=None):
        import torch

        got, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (got, expected))
        error = float("inf")
        if got.shape == expected.shape:
            error = ((got - expected).abs().max() / expected.abs().max()).item()
        self.say(error <= (tolerance or TOLERANCE), f"{what}: shapes {tuple(got.shape)}, {tuple(expected.shape)}, error {error:.1e}")
        if error < float("inf"):
            self.by_section[self.section][2] = max(self.by_section[self.section][2], error)

    def say(self, right, what):
        self.by_section[self.section][0 if right else 1] += 1
        if not right:
            self.failed.append(f"{self.section}: {what}")
            print(f"FAILED  {self.section}: {what}")

    @contextlib.contextmanager
    def attempt(self, what):
        try:
            yield
        except Exception as error:  # what others raise is the finding
            self.say(False, f"{what}: {type(error).__name__}: {str(error)[:400]}")

    def report(self):
        for section, (passed, failed, worst) in self.by_section.items():
            print(f"{section}: {passed} right, {failed} wrong, largest error {worst:.1e} (tolerance {TOLERANCE:.0e}, for Jamba and Llama what they are sure of)")
        return 1 if self.failed else 0


def convert(*arguments):
    """Runs the crate."""
    command = [str(CONVERT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip() or f"exit status {done.returncode}")
    return done.stdout


def ours(folder):
    return json.loads(convert(folder, "--logits", ",".join(map(str, IDS))))


def randomize(model, seed):
    """Draws every parameter, none of them where initialization leaves it."""
    import torch

    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=random)
            if name.endswith("A_log"):
                parameter.copy_(noise.clamp(-1, 2))
            elif name.endswith("dt_proj.bias"):
                parameter.copy_(noise * 0.5 - 2)
            elif "norm" in name:
                parameter.copy_(1 + 0.2 * noise.clamp(-2, 2))
            elif parameter.dim() > 1 and "embedding" not in name:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(noise * 0.2)


# ---- transformers, of the version that `import transformers` gives

TYPES = {
    "mamba": ("MambaConfig", "MambaForCausalLM", "MambaModel"),
    "falcon_mamba": ("FalconMambaConfig", "FalconMambaForCausalLM", "FalconMambaModel"),
    "jamba": ("JambaConfig", "JambaForCausalLM", "JambaModel"),
    "llama": ("LlamaConfig", "LlamaForCausalLM", "LlamaModel"),
}
# What is not made of Mamba blocks alone is exchanged in safetensors only: transformers joins the matrices of experts as it reads,
# and what PyTorch alone saves of such a model nobody publishes.
TRANSFORMERS = ("jamba", "llama")
SMALL = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2)
OTHER_VARIANTS = {
    "jamba": [
        dict(num_hidden_layers=4, num_experts=4, attn_layer_period=3, attn_layer_offset=1, mamba_d_state=4, **SMALL),
        dict(
            num_hidden_layers=3,
            num_experts=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_conv=3,
            mamba_expand=3,
            mamba_dt_rank=5,
            mamba_proj_bias=True,
            rms_norm_eps=1e-4,
            tie_word_embeddings=True,
            eos_token_id=5,
            bos_token_id=6,
            pad_token_id=7,
            **SMALL,
        ),
    ],
    "llama": [
        dict(num_hidden_layers=2, **SMALL),
        dict(
            num_hidden_layers=2,
            head_dim=6,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            tie_word_embeddings=True,
            eos_token_id=5,
            bos_token_id=6,
            pad_token_id=7,
            **SMALL,
        ),
    ],
}
VARIANTS = [
    dict(vocab_size=40, hidden_size=32, num_hidden_layers=2),
    dict(
        vocab_size=37,
        hidden_size=24,
        num_hidden_layers=2,
        expand=3,
        state_size=5,
        conv_kernel=3,
        time_step_rank=7,
        layer_norm_epsilon=1e-3,
        use_bias=True,
        use_conv_bias=False,
        tie_word_embeddings=False,
        eos_token_id=5,
        bos_token_id=6,
        pad_token_id=7,
    ),
]


def transformers_model(kind, variant, dtype):
    import torch
    import transformers

    config, model, _ = (getattr(transformers, name) for name in TYPES[kind])
    variants = OTHER_VARIANTS.get(kind, VARIANTS)
    keys = dict(variants[variant], **({"mixer_rms_eps": 1e-4} if kind == "falcon_mamba" else {}))
    model = model(config(**keys)).eval()
    randomize(model, 1 + variant)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model = model.to(getattr(torch, DTYPES[dtype]))
    # Of no file, and computed anew in f32 where one is read: frequencies of rotary positions.
    for name, buffer in buffers.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, buffer)
    return model


def transformers_logits(model):
    import torch

    with torch.no_grad():
        return model.float()(torch.tensor([IDS]), use_cache=False).logits[0]


def sure_logits(model):
    """The same in float64 where other layers than Mamba's make much of a rounding, and how far f32 may then be: twice as far as
    transformers' own, which is 2e-5 for a small Jamba."""
    import torch

    if model.config.model_type not in TRANSFORMERS:
        return transformers_logits(model), TOLERANCE
    # Experts one by one, as in f64 they cannot be multiplied together.
    model.config._experts_implementation = "eager"
    single = transformers_logits(model).double()
    with torch.no_grad():
        double = model.double()(torch.tensor([IDS]), use_cache=False).logits[0]
    own = ((single - double).abs().max() / double.abs().max()).item()
    return double, max(TOLERANCE, 2 * own)


def open_with_transformers(folder, **options):
    """As anyone would: any architecture, with what is in its config.json."""
    import torch
    import transformers

    kind = json.loads((Path(folder) / "config.json").read_text())["model_type"]
    model, info = getattr(transformers, TYPES[kind][1]).from_pretrained(folder, output_loading_info=True, **options)
    lost = {key: list(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    # A tied head is nowhere in the file.
    if model.config.tie_word_embeddings and lost.get("missing_keys") == ["lm_head.weight"]:
        del lost["missing_keys"]
    assert not lost, lost
    # Of any type, then as it says.
    automatic = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto")
    return model, automatic.get_output_embeddings().weight.dtype == torch.float32


def save_with_transformers(model, folder, binary, sharded):
    import torch

    size = {"max_shard_size": SHARDED} if sharded else {}
    if not binary:
        return model.save_pretrained(folder, **size)
    try:
        model.save_pretrained(folder, safe_serialization=False, **size)
    except (TypeError, ValueError):
        pass
    folder = Path(folder)
    if list(folder.glob("pytorch_model*.bin")):
        return
    # Newer ones write no such files any more; there are many.
    model.save_pretrained(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    state = model.state_dict()
    if not sharded:
        return torch.save(state, folder / "pytorch_model.bin")
    names, weight_map = sorted(state), {}
    for index, part in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-{index + 1:05}-of-00002.bin"
        torch.save({name: state[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def with_transformers(judge, work):
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kinds = [kind for kind, names in TYPES.items() if hasattr(transformers, names[0])]
    version = transformers.__version__
    combinations = list(itertools.product(kinds, range(len(VARIANTS)), DTYPES, (False, True), (False, True)))
    for kind, variant, dtype, binary, sharded in combinations:
        # Jamba of the old version asks for kernels, and its Llama knows no head_dim; what halves are left is one file in any case.
        if kind in TRANSFORMERS and (binary or version == OLD or sharded and dtype != "f32"):
            continue
        what = f"{kind}, variant {variant}, {dtype}, {'.bin' if binary else 'safetensors'}{', sharded' * sharded}"
        model = transformers_model(kind, variant, dtype)
        theirs, back = work / "theirs", work / "back"
        for folder in (theirs, back):
            shutil.rmtree(folder, ignore_errors=True)

        judge.begin(f"transformers {version} -> selective-scan")
        with judge.attempt(what):
            save_with_transformers(model, theirs, binary, sharded)
            expected, tolerance = sure_logits(model)
            judge.hold(what, ours(theirs), expected, tolerance)
            if sharded:
                assert list(theirs.glob("*index.json")), "not sharded"

            judge.begin(f"selective-scan -> transformers {version}")
            options = ["--format", "pytorch" if binary else "safetensors", "--naming", "hugging-face"]
            convert(theirs, back, *options, *(["--max-shard-size", SHARDED] if sharded else []))
            again, is_single = open_with_transformers(back)
            assert is_single == (dtype == "f32"), "the type that config.json says"
            judge.hold(what, transformers_logits(again), expected, tolerance)
            for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
                judge.say(getattr(again.config, token) == getattr(model.config, token), f"{what}: {token}")

    judge.begin(f"transformers {version} -> selective-scan")
    for kind, prefix in itertools.product(kinds, ("", "module.", "_orig_mod.")):
        if kind in TRANSFORMERS:
            continue
        what = f"{kind}: a bare model, with `{prefix}`"
        with judge.attempt(what):
            model = transformers_model(kind, 0, "f32")
            folder = work / "bare"
            shutil.rmtree(folder, ignore_errors=True)
            model.backbone.save_pretrained(folder)
            for file in folder.glob("*.safetensors"):
                file.unlink()
            state = model.backbone.state_dict()
            torch.save({prefix + name: tensor for name, tensor in state.items()}, folder / "pytorch_model.bin")
            judge.hold(what, ours(folder), transformers_logits(model))
    what = "parameters, slices and transposed matrices in a .bin"
    with judge.attempt(what):
        model, folder = transformers_model("mamba", 0, "f32"), work / "views"
        save_with_transformers(model, folder, True, False)
        state = {name: torch.nn.Parameter(tensor) for name, tensor in model.state_dict().items()}
        for name, tensor in state.items():
            if name.endswith("in_proj.weight"):
                state[name] = tensor.detach().t().contiguous().t()
            elif name.endswith("out_proj.weight"):
                wide = torch.zeros(len(tensor) + 3, tensor.shape[1] + 5)
                wide[2:-1, 4:-1] = tensor.detach()
                state[name] = wide[2:-1, 4:-1]
            elif name.endswith(".D"):
                state[name] = tensor.detach()[:1].expand(len(tensor))
        torch.save(state, folder / "pytorch_model.bin")
        model.load_state_dict({name: tensor.detach() for name, tensor in state.items()})
        judge.hold(what, ours(folder), transformers_logits(model))


# ---- mamba_ssm

def mamba_ssm_sources():
    """Fetches and unpacks its sources; None if that is not possible."""
    found = sorted(CACHE.glob("mamba_ssm-*/mamba_ssm/utils/hf.py"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "mamba-ssm", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", "--quiet", "--disable-pip-version-check", "--dest", str(CACHE)]
        done = subprocess.run(command, env={**os.environ, "MAMBA_SKIP_CUDA_BUILD": "TRUE"}, capture_output=True, text=True)
        if done.returncode != 0:
            print(f"mamba_ssm could not be fetched: skipped ({done.stderr.strip().splitlines()[-1:]})")
            return None
        for archive in CACHE.glob("mamba_ssm-*.tar.gz"):
            with tarfile.open(archive) as tar:
                tar.extractall(CACHE, filter="data")
        found = sorted(CACHE.glob("mamba_ssm-*/mamba_ssm/utils/hf.py"))
    return found[-1].parents[2]


class Absent(types.ModuleType):
    """A module that is not there: its sources ask for names, which nothing here may use."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class AbsentFinder:
    """Finds what is compiled, and what a language model of Mamba-1 does not need."""

    def __init__(self, keep):
        self.keep = keep

    def find_spec(self, name, path=None, target=None):
        import importlib.machinery

        top = name.split(".")[0]
        absent = top == "selective_scan_cuda"
        absent |= name.startswith("mamba_ssm.ops.") and name not in self.keep
        absent |= name in ("mamba_ssm.modules.mamba2", "mamba_ssm.modules.mamba3")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if absent else None

    def create_module(self, spec):
        return Absent(spec.name)

    def exec_module(self, module):
        pass


def import_mamba_ssm(sources):
    """Its language model, with the parts for GPUs replaced by its own references."""
    import torch

    names = ("mamba_ssm.ops.selective_scan_interface", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.layer_norm")
    sys.meta_path.insert(0, AbsentFinder(names))
    sys.path.insert(0, str(sources))
    import mamba_ssm.models.mixer_seq_simple as models
    import mamba_ssm.modules.block as block
    import mamba_ssm.modules.mamba_simple as layer
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
    from mamba_ssm.ops.triton.layer_norm import rms_norm_ref

    class RMSNorm(torch.nn.Module):
        def __init__(self, hidden_size, eps=1e-5, device=None, dtype=None):
            super().__init__()
            self.eps, self.weight = eps, torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
            self.register_parameter("bias", None)

        def forward(self, x):
            return rms_norm_ref(x, self.weight, None, eps=self.eps)

    def norm(x, weight, bias, residual=None, eps=1e-6, prenorm=False, residual_in_fp32=False, is_rms_norm=False, **_):
        assert is_rms_norm
        x = x if residual is None else x + residual
        out = rms_norm_ref(x, weight, bias, eps=eps)
        return (out, x) if prenorm else out

    layer.selective_scan_fn, layer.causal_conv1d_fn = selective_scan_ref, None
    for module in (models, block):
        module.RMSNorm, module.layer_norm_fn = RMSNorm, norm
    return models


MAMBA_SSM = [
    dict(d_model=32, n_layer=2, vocab_size=37),
    dict(d_model=11, n_layer=2, vocab_size=40, ssm_cfg=dict(expand=15 / 11, d_state=5, d_conv=3), tie_embeddings=False),
    dict(d_model=24, n_layer=2, vocab_size=50, ssm_cfg=dict(dt_rank=7, bias=True, conv_bias=False), fused_add_norm=False),
]


def with_mamba_ssm(judge, work, chain):
    import torch

    try:
        import einops, triton  # noqa: E401, F401, which its sources import
    except ImportError as error:
        print(f"mamba_ssm needs a module that this Python does not have: skipped ({error})")
        return
    sources = mamba_ssm_sources()
    if sources is None:
        return
    version = sources.name.removeprefix("mamba_ssm-")
    models = import_mamba_ssm(sources)

    def logits(model):
        with torch.no_grad():
            return model.float().eval()(torch.tensor([IDS])).logits[0]

    for variant, dtype in itertools.product(range(len(MAMBA_SSM)), DTYPES):
        what = f"variant {variant}, {dtype}"
        torch_dtype = getattr(torch, DTYPES[dtype])
        theirs, back, hugging = work / "theirs", work / "back", work / "hugging-face"
        for folder in (theirs, back, hugging):
            shutil.rmtree(folder, ignore_errors=True)
        judge.begin(f"mamba_ssm {version} -> selective-scan")
        with judge.attempt(what):
            model = models.MambaLMHeadModel(models.MambaConfig(**MAMBA_SSM[variant]), dtype=torch_dtype)
            randomize(model, 10 + variant)
            model.save_pretrained(theirs)
            expected = logits(model)
            judge.hold(what, ours(theirs), expected)

            judge.begin(f"selective-scan -> mamba_ssm {version}")
            convert(theirs, back, "--format", "pytorch")
            again = models.MambaLMHeadModel.from_pretrained(str(back), dtype=torch_dtype)
            judge.hold(what, logits(again), expected)
            # `ssm_cfg` may say what is the default; the logits are of the model that it makes.
            keys = [{**vars(config), "ssm_cfg": None} for config in (again.config, model.config)]
            judge.say(keys[0] == keys[1], f"{what}: {keys[0]} for {keys[1]}")
            # Their names, others' files: by way of Hugging Face's naming, in several files.
            convert(theirs, hugging, "--naming", "hugging-face", "--max-shard-size", 5000)
            shutil.rmtree(back)
            convert(hugging, back, "--naming", "state-spaces", "--format", "pytorch")
            again = models.MambaLMHeadModel.from_pretrained(str(back), dtype=torch_dtype)
            judge.hold(f"{what}, by way of Hugging Face's", logits(again), expected)
            # Safetensors by those names come back too.
            shutil.rmtree(back)
            convert(theirs, back, "--max-shard-size", 5000)
            judge.hold(f"{what}, in safetensors", ours(back), expected)
            # transformers has a process of its own: in this one it would take mamba_ssm's kernels.
            if MAMBA_SSM[variant].get("ssm_cfg", {}).get("expand", 2) % 1 == 0:
                (hugging / "expected.json").write_text(json.dumps(expected.tolist()))
                hugging.rename(chain / what)


def with_both(judge, chain):
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for folder in sorted(chain.iterdir()):
        judge.begin(f"mamba_ssm -> selective-scan -> transformers {transformers.__version__}")
        with judge.attempt(folder.name):
            # In mamba_ssm A_log and D are float32 in a model of any type. transformers, left to itself, rounds them.
            model, _ = open_with_transformers(folder, torch_dtype=torch.float32)
            judge.hold(folder.name, transformers_logits(model), json.loads((folder / "expected.json").read_text()))


# ---- texts, by the tokenizer that stands beside a checkpoint

TEXTS = ["the state of a system is all that", "what it reads", "once upon a time there was a scan that ran over every sequence"]


def with_texts(judge, work):
    import torch
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    transformers.logging.set_verbosity_error()
    judge.begin(f"texts of transformers {transformers.__version__} and of examples/generate")
    folder = work / "texts"
    folder.mkdir()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXTS * 20, vocab_size=300, show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = transformers.MambaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2, eos_token_id=None
    )
    model = transformers.MambaForCausalLM(config).eval()
    randomize(model, 5)
    model.save_pretrained(folder)
    for text in TEXTS:
        with judge.attempt(text), torch.no_grad():
            ids = torch.tensor([tokenizer.encode(text).ids])
            expected = model.generate(ids, max_new_tokens=24, do_sample=False, use_cache=False, eos_token_id=None, pad_token_id=0)
            # What is no whole character shows as the same mark on both sides.
            expected = text + tokenizer.decode(expected[0, ids.shape[1] :].tolist())
            command = [str(GENERATE), str(folder), text, "--max-tokens", "24"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            judge.say(done.stdout == expected + "\n", f"{done.stdout!r} and {expected!r}")


# ---- the parts together

def old_transformers():
    """Where an old version is, which is installed if it can be."""
    target = CACHE / f"transformers-{OLD}"
    if not (target / "complete").exists():
        shutil.rmtree(target, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(target)]
        done = subprocess.run([*command, f"transformers=={OLD}"], capture_output=True, text=True)
        if done.returncode != 0:
            print(f"transformers {OLD} could not be installed: skipped ({done.stderr.strip().splitlines()[-1:]})")
            return None
        (target / "complete").touch()
    return target


def main():
    global CONVERT, GENERATE
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=Path, help="folder of the crate's programs [default: they are built]")
    parser.add_argument("--part", choices=["transformers", "mamba_ssm", "both", "texts"], help="one part only")
    parser.add_argument("--chain", type=Path, help="for the parts: a folder in which one leaves files to another")
    arguments = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    programs = arguments.programs
    if programs is None:
        # In the tests' profile, in which the suite has compiled what they need.
        command = ["cargo", "build", "--quiet", "--locked", "--profile", "test", "--features", "nn"]
        subprocess.run([*command, "--example", "convert", "--example", "generate"], cwd=ROOT, check=True)
        programs = ROOT / "target" / "debug" / "examples"
    CONVERT, GENERATE = programs / "convert", programs / "generate"

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    judge = Judge()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        match arguments.part:
            case "transformers":
                with_transformers(judge, work)
            case "mamba_ssm":
                with_mamba_ssm(judge, work, arguments.chain)
            case "both":
                with_both(judge, arguments.chain)
            case "texts":
                with_texts(judge, work)
            case None:
                return all_parts(work)
    return judge.report()


def all_parts(chain):
    """Each in a process of its own: two versions of a library do not go into one."""

    def part(name, **environment):
        command = [sys.executable, "-B", __file__, "--programs", str(CONVERT.parent), "--part", name]
        command += ["--chain", str(chain)]
        return subprocess.run(command, env={**os.environ, **environment}).returncode

    status = part("transformers")
    if (target := old_transformers()) is not None:
        status |= part("transformers", PYTHONPATH=str(target))
    status |= part("mamba_ssm")
    status |= part("both")
    status |= part("texts")
    print("exchange: " + ("something differs" if status else "all as it should be"))
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
