"""mamba_ssm's own model, which answers cases line by line as `cargo bench --bench model -- --serve` does for the crate.

    python benches/peers/model_worker.py --built FOLDER

A line is a case and a number of repeats, `train 130m bf16-f32 8 2048 5`: what is done, model, types, batch, length. The
answer is a line of JSON: median and least milliseconds of a call, a training step's phases, the number of parameters and
the peak of memory; or an `error`. The last case stays prepared; `release` frees its memory. FOLDER is what build.py has left.
"""

import argparse
import contextlib
import gc
import json
import math
import statistics
import sys
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F

# Width, layers, vocabulary; as the crate's bench has them.
MODELS = {
    "tiny": (64, 2, 512),
    "130m": (768, 24, 50280),
    "370m": (1024, 48, 50280),
    "1.4b": (2048, 48, 50280),
    "2.8b": (2560, 64, 50280),
}
# Types of arithmetic and of parameters.
MODES = {
    "f32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-f32": (torch.bfloat16, torch.float32),
}
LEARNING_RATE = 1e-4
# Milliseconds that calls which are timed as one take together, as in the crate's bench.
TOGETHER = 200.0
MIB = 1 << 20


def find_modules(built):
    """Makes what build.py has left importable: two compiled modules and the Python around them."""
    built = Path(built).resolve()
    for name in ("selective_scan_cuda", "causal_conv1d_cuda"):
        sys.path.insert(0, str(built / name))
    sys.path.insert(0, str(max(built.glob("causal_conv1d-*/causal_conv1d")).parent))
    # Without its own __init__, which imports Mamba-2 and Mamba-3 with all that they want.
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [str(max(built.glob("mamba_ssm-*/mamba_ssm")))]
    sys.modules["mamba_ssm"] = package


def fast_paths():
    """Fails if mamba_ssm would fall back on slower code, as it does silently where an import fails."""
    from mamba_ssm.modules import mamba_simple

    for name in ("causal_conv1d_fn", "causal_conv1d_update", "selective_state_update", "layer_norm_fn"):
        if getattr(mamba_simple, name) is None:
            raise ImportError(f"mamba_ssm has not found {name}")


class Case:
    def __init__(self, text):
        self.text = text
        self.what, self.model, mode, batch, length = text.split()
        self.arithmetic, self.parameters = MODES[mode]
        self.batch, self.length = int(batch), int(length)


class Work:
    """What a case does again and again."""

    def __init__(self, case, device):
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

        d_model, n_layer, vocab_size = MODELS[case.model]
        config = MambaConfig(
            d_model=d_model,
            n_layer=n_layer,
            vocab_size=vocab_size,
            ssm_cfg={"layer": "Mamba1"},
            rms_norm=True,
            residual_in_fp32=True,
            fused_add_norm=True,
        )
        self.case, self.device, self.vocab_size = case, device, vocab_size
        torch.manual_seed(0)
        self.model = MambaLMHeadModel(config, device=device, dtype=case.parameters)

    def parameters(self):
        return sum(parameter.numel() for parameter in self.model.parameters())

    def autocast(self):
        if self.case.arithmetic == self.case.parameters:
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.device).type, self.case.arithmetic)

    def tokens(self, length):
        return torch.randint(self.vocab_size, (self.case.batch, length), device=self.device)


class Training(Work):
    """Training on the same random tokens in every step."""

    PHASES = ("forward", "backward", "optimizer")

    def __init__(self, case, device):
        super().__init__(case, device)
        tokens = self.tokens(case.length + 1)
        self.ids, self.next = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def step(self, lap):
        with self.autocast():
            logits = self.model(self.ids).logits
            # Logits of f32, as the crate's are.
            loss = F.cross_entropy(logits.float().view(-1, logits.shape[-1]), self.next.view(-1))
        del logits
        lap()
        loss.backward()
        lap()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        lap()

    def run(self):
        self.step(lambda: None)


class Prefill(Work):
    """Prompts that are read from zero states on, as mamba_ssm's `generate` reads them."""

    def __init__(self, case, device):
        super().__init__(case, device)
        self.ids = self.tokens(case.length)

    def run(self):
        from mamba_ssm.utils.generation import InferenceParams

        with torch.inference_mode(), self.autocast():
            states = InferenceParams(max_seqlen=self.case.length + 1, max_batch_size=self.case.batch)
            self.model(self.ids, inference_params=states, num_last_tokens=1)


class Decoding(Work):
    """The likeliest token after the last one, by mamba_ssm's CUDA graph: the loop of its `decode` with `cg=True`."""

    def __init__(self, case, device):
        from mamba_ssm.utils.generation import update_graph_cache

        super().__init__(case, device)
        self.offset, self.ids = 1, self.tokens(1)
        with self.autocast():
            self.cache = update_graph_cache(self.model, None, case.batch, 1, 1 << 20)

    def run(self):
        from mamba_ssm.utils.generation import sample

        with torch.inference_mode():
            size = (self.case.batch, 1)
            position = torch.full(size, self.offset, dtype=torch.long, device=self.device)
            logits = self.cache.run(self.ids, position, self.offset).squeeze(dim=1)
            self.ids = sample(logits, top_k=1).unsqueeze(1)
            self.offset += 1


WORK = {"train": Training, "prefill": Prefill, "decode": Decoding}


class Prepared:
    """A case that is ready, warmed up."""

    def __init__(self, case, device):
        self.case, self.on_gpu, self.calls = case, device != "cpu", 1
        self.work = WORK[case.what](case, device)
        # The first compiles Triton's kernels and tries several of each.
        self.timed()
        self.timed()
        self.calls = min(max(math.ceil(TOGETHER / self.timed()), 2), 512)

    def synchronize(self):
        if self.on_gpu:
            torch.cuda.synchronize()

    def timed(self):
        """Milliseconds of a call, by a clock that starts and stops when the device has nothing to do."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(self.calls):
            self.work.run()
        self.synchronize()
        return (time.perf_counter() - start) * 1e3 / self.calls

    def laps(self):
        """The milliseconds of a step's phases, by events on a GPU."""
        marks = []

        def mark():
            if self.on_gpu:
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()
            else:
                marks.append(time.perf_counter())

        self.synchronize()
        mark()
        self.work.step(mark)
        self.synchronize()
        if self.on_gpu:
            return [start.elapsed_time(end) for start, end in zip(marks, marks[1:])]
        return [(end - start) * 1e3 for start, end in zip(marks, marks[1:])]

    def measure(self, repeats):
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            retries = torch.cuda.memory_stats().get("num_alloc_retries", 0)
        times = [self.timed() for _ in range(repeats)]
        answer = {"ms": statistics.median(times), "min": min(times), "parameters": self.work.parameters()}
        if self.on_gpu:
            answer["peak_mib"] = torch.cuda.max_memory_allocated() / MIB
            answer["reserved_mib"] = torch.cuda.max_memory_reserved() / MIB
            answer["retries"] = torch.cuda.memory_stats().get("num_alloc_retries", 0) - retries
        if isinstance(self.work, Training):
            laps = [self.laps() for _ in range(repeats)]
            for phase, times in zip(Training.PHASES, zip(*laps)):
                answer[f"{phase}_ms"] = statistics.median(times)
        return answer


class Server:
    def __init__(self, built, device):
        self.device, self.prepared = device, None
        torch.backends.cuda.matmul.allow_tf32 = True
        find_modules(built)
        fast_paths()

    def release(self):
        self.prepared = None
        gc.collect()
        if self.device != "cpu":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def answer(self, line):
        if line == "release":
            self.release()
            total = torch.cuda.mem_get_info()[1] / MIB if self.device != "cpu" else 0
            return {"torch": torch.__version__, "total_mib": total}
        text, repeats = line.rsplit(" ", 1)
        if self.prepared is None or self.prepared.case.text != text:
            self.release()
            self.prepared = Prepared(Case(text), self.device)
        return self.prepared.measure(max(int(repeats), 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--built", type=Path, required=True)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    server = None
    for line in sys.stdin:
        if not line.strip():
            continue
        error = None
        try:
            server = server or Server(arguments.built, arguments.device)
            answer = server.answer(line.strip())
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}".splitlines()[0]
        if error:
            # Here, where the failure is gone, and with it the frames that hold tensors.
            if server:
                server.release()
            answer = {"error": error}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
