"""Writes generation.safetensors, which tests/suite/nn/generation.rs and tests/suite/sampling/vectors.rs read: what Hugging Face's
transformers makes of logits before it samples, and the texts that its search with beams finds on the checkpoints in models/.

Run it again with

    pip install torch transformers safetensors
    python tests/vectors/generate_generation.py

It needs no GPU and takes seconds. For each case of sampling, by its name, the file has

    logits          (vocab)    float32
    occurred        (count)    float32, token ids
    probabilities   (vocab)    float64, after all filters

and the settings under `options` in its metadata; for each case of a search, of the model and the sizes there,

    prompt          (tokens)          float32, token ids
    texts           (beams, tokens)   float64, token ids, the best first
    scores          (beams)           float64, sums of log-probabilities
"""

import json
from pathlib import Path

import torch
from generate_models import FOLDER, float64, generator
from safetensors.torch import save_file
from transformers import FalconMambaForCausalLM, MambaForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCAB = 50
SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.6},
    {"top_k": 5},
    {"top_k": 1},
    {"top_p": 0.6},
    {"top_p": 0.95, "temperature": 0.8},
    {"min_p": 0.1},
    {"min_p": 0.3, "temperature": 1.3},
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.8, "top_k": 7},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.2, "top_k": 12, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
]
SEARCHES = [("mamba", MambaForCausalLM, 4, 10), ("mamba", MambaForCausalLM, 2, 16), ("falcon_mamba", FalconMambaForCausalLM, 3, 12)]


def sampling(settings, random):
    logits = torch.randn(VOCAB, generator=random) * 3
    occurred = torch.randperm(VOCAB, generator=random)[:8]
    # The order in which transformers applies them.
    processors = LogitsProcessorList()
    if "repetition_penalty" in settings:
        processors.append(RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    if "temperature" in settings:
        processors.append(TemperatureLogitsWarper(settings["temperature"]))
    if "top_k" in settings:
        processors.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        processors.append(TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        processors.append(MinPLogitsWarper(settings["min_p"]))
    scores = processors(occurred[None], logits.double()[None])[0]
    return {"logits": logits, "occurred": occurred.float(), "probabilities": scores.softmax(-1)}


def search(name, kind, beams, tokens, random):
    model = kind.from_pretrained(FOLDER / name).eval()
    prompt = torch.randint(model.config.vocab_size, (1, 7), generator=random)
    with float64(), torch.no_grad():
        model = model.double()
        model.generation_config.eos_token_id = None
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            use_cache=False,
            length_penalty=0.0,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    texts = found.sequences[:, prompt.shape[1] :]
    return {"prompt": prompt[0].float(), "texts": texts.double(), "scores": found.sequences_scores.double()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    options, tensors = {}, {}

    def add(name, options_of_case, of_case):
        options[name] = options_of_case
        tensors.update({f"{name}/{key}": tensor.contiguous() for key, tensor in of_case.items()})

    for index, settings in enumerate(SETTINGS):
        name = f"sampling-{index}"
        add(name, settings, sampling(settings, generator(name)))
    for index, (model, kind, beams, tokens) in enumerate(SEARCHES):
        name = f"search-{index}"
        sizes = {"model": model, "beams": beams, "tokens": tokens}
        add(name, sizes, search(model, kind, beams, tokens, generator(name)))
    path = Path(__file__).parent / "generation.safetensors"
    save_file(tensors, path, metadata={"options": json.dumps(options)})
    print(f"{path.name}: {path.stat().st_size} bytes")
