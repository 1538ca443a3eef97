"""Writes the checkpoints and their results that tests/suite/nn/parity.rs reads: a folder for each in models/, here.

Run it again with

    pip install torch transformers safetensors
    python tests/vectors/generate_models.py

It needs no GPU and takes seconds. The models are those of Hugging Face's transformers, small, with every weight drawn at
random in float32, and saved by transformers itself; so are their `config.json`. What they compute is computed in
float64, by the path of transformers that is plain PyTorch, and stored in float32, whose rounding (6e-8) is far below
what a float32 model is allowed. The same versions write the same bytes.

A folder has the checkpoint as it is published, and `expected.safetensors` with

    ids            (batch, length)            what the model reads
    logits         (batch, length, vocab)     what it answers
    hidden/N       (batch, length, d_model)   the residual stream after layer N
    hidden/final   (batch, length, d_model)   the same after the last norm
    loss           ()                         the mean cross entropy of ids[t + 1] given ids[..= t]
    grad/NAME                                 its gradient by each parameter
    prompt         (batch, length)            and what follows by taking the likeliest token each time:
    generated      (batch, length)

or for the layer of Jamba alone, `jamba`: `x`, `out`, `d_out`, `grad/x`, `grad/NAME`. `jamba_model` is a model with attention
and experts, `llama` a plain Transformer, and `llama_linear` and `llama3` are such of stretched positions; gradients have the names of the checkpoint's tensors.

`state_spaces` holds the weights of `mamba` under the names of the repository state-spaces/mamba, with its config.json;
what is expected of `mamba` is expected of it.
"""

import contextlib
import json
import shutil
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.jamba.modeling_jamba import JambaMambaMixer

FOLDER = Path(__file__).parent / "models"
LENGTH = 75  # beyond the 64 steps after which the scan keeps a checkpoint
PROMPT, GENERATED = 9, 20


@contextlib.contextmanager
def float64():
    """transformers widens what needs care to float32, by name. Here the name means float64, so that nothing is lost."""
    single, widen = torch.float32, torch.Tensor.float
    torch.float32, torch.float, torch.Tensor.float = torch.float64, torch.float64, torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = single, single, widen


def generator(name):
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def randomize(module, random):
    """Draws every parameter: none is left at the ones and zeros of an initialization, which would hide its absence."""

    def uniform(parameter, low, high):
        parameter.copy_(torch.rand(parameter.shape, generator=random) * (high - low) + low)

    def normal(parameter, deviation):
        parameter.copy_(torch.randn(parameter.shape, generator=random) * deviation)

    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if name.endswith("A_log"):
                uniform(parameter, -1.0, 2.5)
            elif name.endswith("dt_proj.bias"):
                uniform(parameter, -4.0, 0.0)
            elif "norm" in name:
                uniform(parameter, 0.5, 1.5)
            elif "embed_tokens" in name:  # as that of the others, below
                normal(parameter, 0.2)
            elif parameter.dim() == 3 and "experts" in name:
                normal(parameter, parameter.shape[2] ** -0.5)
            elif parameter.dim() == 1:
                normal(parameter, 0.2)
            elif "conv1d" in name:
                normal(parameter, 0.6)
            elif "embeddings" in name:  # small beside what the layers add, or a tied model repeats what it reads
                normal(parameter, 0.2)
            else:
                normal(parameter, parameter.shape[1] ** -0.5)


def results(model, random, vocab):
    """What a language model in float64 computes."""
    ids = torch.randint(vocab, (2, LENGTH), generator=random)
    output = model(ids, output_hidden_states=True, use_cache=False)
    *layers, final = output.hidden_states
    assert output.logits.dtype == torch.float64
    loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    prompt = ids[:, :PROMPT].contiguous()
    with torch.no_grad():
        generated = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=GENERATED, do_sample=False
        )
        assert all(len(set(row)) > 5 for row in generated[:, PROMPT:].tolist()), "a dull text: draw others"
    # A float32 model must come to the same choices: none may be close.
        choices = model(generated, use_cache=False).logits[:, PROMPT - 1 : -1]
    assert generated.shape[1] == PROMPT + GENERATED
    assert (choices.argmax(-1) == generated[:, PROMPT:]).all(), "generating by steps differs from reading at once"
    best, second = choices.topk(2).values.unbind(-1)
    assert (best - second).min() > 1e-3, "a choice is close: draw others"
    return {
        "ids": ids,
        "logits": output.logits,
        **{f"hidden/{index}": hidden for index, hidden in enumerate(layers)},
        "hidden/final": final,
        "loss": loss,
        **{f"grad/{name}": parameter.grad for name, parameter in model.named_parameters()},
        "prompt": prompt,
        "generated": generated[:, PROMPT:],
    }


def results_of_transformer(model, random, vocab):
    """The same of a model whose hidden states do not have what the last layer leaves, by the names of its checkpoint."""
    # Otherwise it multiplies by an operator that knows no float64.
    model.config._experts_implementation = "eager"
    if hasattr(model.model, "rotary_emb"):  # made in float32 with the model
        rotary, rope_type = model.model.rotary_emb, model.config.rope_parameters["rope_type"]
        if rope_type == "default":
            steps = torch.arange(0, 2 * len(rotary.inv_freq), 2, dtype=torch.float64)
            rotary.inv_freq = model.config.rope_parameters["rope_theta"] ** (-steps / (2 * len(rotary.inv_freq)))
        else:
            rotary.inv_freq, factor = ROPE_INIT_FUNCTIONS[rope_type](model.config, rotary.inv_freq.device)
            assert factor == 1.0
        assert rotary.inv_freq.dtype == torch.float64
    left = {}

    def keep(index):
        def hook(_, __, out):
            # The first call alone is that whose results are stored. What is returned here would replace the output.
            left.setdefault(index, out[0] if isinstance(out, tuple) else out)

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(keep(index))
    tensors = results(model, random, vocab)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("hidden/") or name == "hidden/final"}
    tensors |= {f"hidden/{index}": hidden for index, hidden in left.items()}
    stored = {}
    for name, tensor in tensors.items():
        # transformers joins the matrices of experts, and divides them where it saves them.
        if name.endswith("experts.gate_up_proj"):
            for index, pair in enumerate(tensor):
                for half, part in zip(("gate_proj", "up_proj"), pair.chunk(2)):
                    stored[name.replace("gate_up_proj", f"{index}.{half}.weight")] = part
        elif name.endswith("experts.down_proj"):
            for index, one in enumerate(tensor):
                stored[name.replace("down_proj", f"{index}.down_proj.weight")] = one
        else:
            stored[name] = tensor
    return stored


def save_results(folder, tensors):
    for name, tensor in tensors.items():
        assert tensor.isfinite().all() and (tensor != 0).any(), name
    stored = {name: t.detach().to(torch.float32 if t.is_floating_point() else torch.int64) for name, t in tensors.items()}
    save_file({name: t.contiguous() for name, t in stored.items()}, folder / "expected.safetensors")


def language_model(name, model_class, config, draw=0, results=results, **saving):
    """`draw` is changed until the text that the model generates is worth comparing."""
    random, folder = generator(f"{name} {draw}"), FOLDER / name
    model = model_class(config).eval()
    randomize(model, random)
    model.save_pretrained(folder, **saving)
    (folder / "generation_config.json").unlink()
    with float64():
        tensors = results(model.double(), random, config.vocab_size)
    save_results(folder, tensors)


COMMON = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)


def mamba():
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, residual_in_fp32=True, **COMMON)
    language_model("mamba", MambaForCausalLM, config)


def mamba_untied():
    """All that is optional the other way, sizes that are no powers of two, and the checkpoint in several files."""
    config = MambaConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        expand=3,
        state_size=5,
        conv_kernel=3,
        time_step_rank=7,
        layer_norm_epsilon=1e-3,
        use_bias=True,
        use_conv_bias=False,
        residual_in_fp32=False,
        tie_word_embeddings=False,
        **COMMON,
    )
    language_model("mamba_untied", MambaForCausalLM, config, draw=1, max_shard_size="40KB")


def falcon_mamba():
    config = FalconMambaConfig(
        vocab_size=48,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        mixer_rms_eps=1e-4,
        tie_word_embeddings=False,
        **COMMON,
    )
    language_model("falcon_mamba", FalconMambaForCausalLM, config)


def jamba():
    """The layer alone, under the name that it has in the model's third layer."""
    config = JambaConfig(
        hidden_size=32, mamba_d_state=8, mamba_dt_rank=4, mamba_proj_bias=True, rms_norm_eps=1e-4, **COMMON
    )
    random, folder, prefix = generator("jamba"), FOLDER / "jamba", "model.layers.2.mamba."
    folder.mkdir(parents=True)
    mixer = JambaMambaMixer(config, layer_idx=2).eval()
    randomize(mixer, random)
    config.save_pretrained(folder)
    tensors = {prefix + name: tensor.detach().contiguous() for name, tensor in mixer.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    x, d_out = (torch.randn(2, LENGTH, config.hidden_size, generator=random) for _ in range(2))
    with float64():
        mixer, wide = mixer.double(), x.double().requires_grad_()
        out = mixer(wide)
        assert out.dtype == torch.float64
        (out * d_out).sum().backward()
    gradients = {f"grad/{prefix}{name}": parameter.grad for name, parameter in mixer.named_parameters()}
    save_results(folder, {"x": x, "out": out, "d_out": d_out, "grad/x": wide.grad, **gradients})


def jamba_model():
    """Attention in every third layer and experts in every second."""
    config = JambaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=3,
        attn_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=3,
        **COMMON,
    )
    language_model("jamba_model", JambaForCausalLM, config, results=results_of_transformer)


def llama():
    """All that is optional: biases, a width of heads of their own, another base."""
    llama_of("llama", {"rope_type": "default", "rope_theta": 500.0}, draw=17, attention_bias=True, mlp_bias=True)


def llama_linear():
    """Positions of which four are one."""
    llama_of("llama_linear", {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}, draw=6)


def llama3():
    """Of the four pairs of a head's numbers, which turn 10, 2.2, 0.46 and 0.1 times in 64 steps, the first stays as it is, the
    second is between, and the others are slowed down wholly."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    llama_of("llama3", rope, draw=22, max_position_embeddings=256)


def llama_of(name, rope, draw=0, **options):
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        tie_word_embeddings=True,
        **options,
        **COMMON,
    )
    language_model(name, LlamaForCausalLM, config, draw=draw, results=results_of_transformer)


def state_spaces():
    """The weights of `mamba` as state-spaces/mamba would have them: that repository's models have the vocabulary rounded
    up to a multiple, and name the tied matrix twice."""
    folder = FOLDER / "state_spaces"
    folder.mkdir(parents=True)
    tensors = load_file(FOLDER / "mamba" / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    config = {
        "d_model": 32,
        "n_layer": 3,
        "vocab_size": 61,
        "ssm_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=4) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    shutil.rmtree(FOLDER, ignore_errors=True)
    for case in (mamba, mamba_untied, falcon_mamba, jamba, jamba_model, llama, llama_linear, llama3, state_spaces):
        case()
    files = sorted(path for path in FOLDER.rglob("*") if path.is_file())
    for path in files:
        print(f"{path.relative_to(FOLDER)}: {path.stat().st_size} bytes")
    total = sum(path.stat().st_size for path in files)
    print(f"{total} bytes in all")
    assert total <= 3_000_000
