"""What a generation took, and how near it came to what the device can do: the bytes that a token must read, over the
read bandwidth measured in the same run.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass

import torch

import ops
from cli import peak_memory
from engine import Engine
from linear import Linear
from model import Transformer
from speculate import summary

LONG = 512  # prompt tokens from which the matmul rate is what limits a prefill


@dataclass
class Measure:
    """What one generation took. Times in seconds, rates per second."""

    prompt_tokens: int  # all rows together, padding not counted
    new_tokens: int  # all rows together
    steps: int  # decode steps after the first token
    time_to_first_token: float
    decode_seconds: float

    @property
    def seconds(self) -> float:
        return self.time_to_first_token + self.decode_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds

    @property
    def decode_rate(self) -> float:
        """Tokens a second of each row, after the first."""
        return self.steps / self.decode_seconds if self.steps else 0.0


@dataclass
class Throughput:
    """What a queue of prompts took. Seconds, from the first prompt's start to the last one's end."""

    prompts: int
    prompt_tokens: int
    new_tokens: int
    seconds: float


def weight_bytes(model: Transformer, rows: float = 1) -> int:
    """Bytes of the weights that a decode step of so many tokens reads: all but the embedding table, unless it is the
    output as well, and of experts those that are met, if tokens met any k of E alike: E (1 - (1 - k / E)^rows)."""
    embedding, config = model.tok_embeddings.weight, model.config
    unread = 0 if model.output.weight is embedding else embedding.nbytes
    experts = sum(p.nbytes for m in model.modules() if isinstance(m, Linear) and m.experts for p in m.parameters())
    missed = (1 - config.n_expert_used / config.n_expert) ** rows if experts else 0
    return round(sum(p.nbytes for p in model.parameters()) - unread - experts * missed)


def prefill_flops(model: Transformer, tokens: int, rows: int) -> float:
    """FLOP that reading so many tokens takes, alike in all rows: of products alone, causal ones by half."""
    config, length = model.config, tokens / rows
    linears = [m for name, m in model.named_modules() if isinstance(m, Linear) and name != "output"]
    linear = sum(math.prod(m.shape[-2:]) * (config.n_expert_used if m.experts else 1) for m in linears)
    seen = sum(length * min(length / 2, window or length) for window in config.windows or (0,) * config.n_layer)
    return 2 * linear * tokens + 4 * config.n_head * config.head_dim * seen * rows


def kv_bytes(llm: Engine, positions: float) -> float:
    """Bytes of the keys and values that a step reads, with so many positions of each row in use."""
    windows = llm.model.config.windows or (0,)
    seen = sum(min(positions, window or positions) for window in windows) / len(windows)
    return llm.batch_size * seen * llm.state.cache.bytes_per_position


def report(llm: Engine, measure: Measure) -> dict:
    """Rates, bytes per token, and the share of the device's read bandwidth, measured now, that they make."""
    memory = torch.cuda.max_memory_reserved() if llm.device.type == "cuda" else peak_memory()
    read_bandwidth = ops.read_bandwidth(llm.device)  # after that, as it takes memory
    weights, rate = weight_bytes(llm.model, llm.batch_size), measure.decode_rate
    flops = prefill_flops(llm.model, measure.prompt_tokens, llm.batch_size) / measure.time_to_first_token
    matmul_rate = measure.prompt_tokens >= LONG and ops.matmul_rate(llm.device, llm.model.dtype)
    positions = measure.prompt_tokens / llm.batch_size + (measure.steps + 1) / 2  # of a row, in an average step
    kv = kv_bytes(llm, positions)
    read = weights + kv  # for a token
    if llm.speculator:
        (passes, drafted), draft = llm.speculator.work_per_token(), llm.speculator.draft.model
        rows = llm.batch_size * (1 + drafted / (passes or 1))  # tokens of a pass
        read = (weight_bytes(llm.model, rows) + kv) * passes
        read += weight_bytes(draft, llm.batch_size) * drafted if draft else 0
    return {
        **asdict(measure),
        "seconds": measure.seconds,
        "tokens_per_second": measure.tokens_per_second,
        "prefill_tokens_per_second": measure.prompt_tokens / measure.time_to_first_token,
        "prefill_mfu": flops / matmul_rate if matmul_rate else None,
        "decode_tokens_per_second": rate,
        "decode_tokens_per_second_total": rate * llm.batch_size,
        "weight_bytes_per_step": weights,
        "kv_bytes_per_step": round(kv),
        "bytes_per_second": read * rate,
        "read_bandwidth": read_bandwidth,
        "bandwidth_fraction": read_bandwidth and read * rate / read_bandwidth,
        "compile_seconds": llm.compile_seconds,
        "memory_bytes": memory,
        "threads": torch.get_num_threads() if llm.device.type == "cpu" else None,
    }


def print_measures(llm: Engine, measures: list[Measure], as_json: bool, load_seconds: float) -> None:
    """gpt-fast's closing lines and what they leave out, from the sample of median speed."""
    median = sorted(measures, key=lambda m: m.tokens_per_second)[len(measures) // 2]
    r = report(llm, median) | {"load_seconds": load_seconds}
    r["tokens_per_second_of_samples"] = rates = [m.tokens_per_second for m in measures]
    total = f" ({r['decode_tokens_per_second_total']:.2f} in total)" if llm.batch_size > 1 else ""
    reads, megabytes = r["read_bandwidth"], (r["weight_bytes_per_step"] + r["kv_bytes_per_step"]) / 1e6
    lines = [
        "==========",
        f"Batch Size: {llm.batch_size}",
        f"Time to first token: {r['time_to_first_token']:.3f} seconds",
        f"Prefill: {r['prefill_tokens_per_second']:.2f} tokens/sec"
        + (f", {r['prefill_mfu']:.3f} of the matmul rate" if r["prefill_mfu"] else ""),
        f"Decode: {r['decode_tokens_per_second']:.2f} tokens/sec{total}",
        f"Bandwidth achieved: {r['bytes_per_second'] / 1e9:.02f} GB/s ({megabytes:.1f} MB a step), "
        + (
            f"{r['bandwidth_fraction']:.3f} of the {reads / 1e9:.1f} GB/s this device reads"
            if reads
            else "not compared"
        ),
    ]
    if llm.speculator:
        r["speculation"] = llm.speculator.report(measures[-1].decode_rate)
        lines.append(summary(r["speculation"]))
    lines += [f"Average tokens/sec: {sum(rates) / len(rates):.2f}", f"Memory used: {r['memory_bytes'] / 1e9:.02f} GB"]
    print("\n".join(lines), file=sys.stderr)
    if as_json:
        print(json.dumps(r))


def print_throughput(llm: Engine, measure: Throughput, as_json: bool, load_seconds: float) -> None:
    """gpt-fast's closing lines for a queue of prompts."""
    memory = torch.cuda.max_memory_reserved() if llm.device.type == "cuda" else peak_memory()
    r = asdict(measure) | {"batch_size": llm.batch_size, "tokens_per_second": measure.new_tokens / measure.seconds}
    r |= {"compile_seconds": llm.compile_seconds, "load_seconds": load_seconds, "memory_bytes": memory}
    lines = [
        "==========",
        f"Batch Size: {llm.batch_size}",
        f"{r['prompts']} prompts of {r['prompt_tokens']} tokens: {r['new_tokens']} new ones in {r['seconds']:.2f} sec",
        f"Average tokens/sec: {r['tokens_per_second']:.2f}",
        f"Memory used: {memory / 1e9:.02f} GB",
    ]
    print("\n".join(lines), file=sys.stderr)
    if as_json:
        print(json.dumps(r))
