"""What speculation costs and what it brings, as JSON: sections, one after the other.

    python scripts/bench_speculate.py OUT.json --sections steps big speed      # on a GPU
    python scripts/bench_speculate.py OUT.json --sections equality --together --device cpu --precision fp32

steps     a verify pass of 6 rows against a plain step, and a step's overhead beyond draft and verify (random weights)
equality  greedy text of a real checkpoint, with and without speculation, token for token up to float ties
speed     speed-up over plain decoding, in turns with it, on the real checkpoint and tasks of benchmarks/prompts.json
big       a 70B int4 target with a 7B int4 draft. Random weights agree on nothing, so draft tokens are accepted with
          the chances of --profile; everything is computed as if it were needed
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # scripts run from any directory

if __name__ == "__main__":  # first: what follows takes seconds to import
    from process.command import command

    command("bench_speculate")

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator

import torch
from bench import KINDS, MODES, provenance, random_model

import ops
from checkpoint import DTYPES, load_model
from cli import DEFAULT_CHECKPOINT, pick_device
from engine import Engine
from generate import generate
from model import ModelConfig, Transformer
from process.command import Parser
from process.files import read_json, write_text
from sampling import Sampler
from speculate import PROMPT_LOOKUP
from tokenizer import load_tokenizer

REPO = Path(__file__).resolve().parent.parent
GREEDY, SAMPLED = Sampler(temperature=0.0), Sampler(temperature=0.8, top_k=200)
DRAFTS = ("lookup", "int4", "int4:128", "int8", "bf16")
TASKS = ("edit text", "edit code", "gravity")  # of benchmarks/prompts.json
TIE = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.3}  # logits closer than this may change places by rounding alone


def engine(args: argparse.Namespace, model, draft=None, k=5, **options) -> Engine:
    options = {"max_seq_length": args.length, "sampler": GREEDY, "compile": not args.eager} | options
    gc.collect()  # the graphs of the engine before this one, which is a cycle
    if args.device.type == "cuda":
        torch.cuda.empty_cache()
    return Engine(model, draft=draft, speculate_k=k, **options)


def timed(llm: Engine, prompt: list[int], tokens: int, stops=frozenset()) -> tuple[list[int], float]:
    """The tokens generated, and tokens a second after the first."""
    times, out = [], []
    for token in generate(llm, prompt, tokens, is_stop=lambda row, token: token in stops):
        out.append(token)
        times.append(time.perf_counter())
    return out, (len(out) - 1) / max(times[-1] - times[0], 1e-9)


def steps(args: argparse.Namespace, result: dict) -> None:
    """Milliseconds of the parts of a speculation step with k = 5, behind 200 tokens, for each kind of weights."""
    args.length = 256
    draft = random_model(args.draft_shape, "int4", args.device, args.dtype)
    for mode in args.modes:
        model = random_model(args.shape, mode, args.device, args.dtype)
        cases = (
            ("lookup greedy", PROMPT_LOOKUP, GREEDY),
            ("model greedy", draft, GREEDY),
            ("model sampled", draft, SAMPLED),
        )
        for name, drafter, sampler in cases:
            llm = engine(args, model, drafter, sampler=sampler)
            _, rate = timed(llm, list(range(200)), 24)
            report = llm.speculator.report(rate)
            result[f"{mode}, {name}"] = report | {"verify_over_plain": report["verify_ms"] / report["plain_ms"]}
            args.save()


def drafts(args: argparse.Namespace) -> Iterator[tuple[str, object, int | str]]:
    """Name, draft and k of each NAME@K, where the name is lookup, a precision, or a way to quantise the target."""
    for name in args.drafts:
        kind, _, k = name.partition("@")
        draft = PROMPT_LOOKUP
        if kind != "lookup":
            how = {"dtype": DTYPES[kind]} if kind in DTYPES else {"quantize": kind}
            draft = load_model(args.checkpoint_path, device=args.device, **how)
        yield name, draft, int(k) if k.isdecimal() else k or 5


def real(args: argparse.Namespace) -> tuple[Transformer, dict[str, list[int]], frozenset[int]]:
    """The real checkpoint, its prompts by name, and its stop ids."""
    tokenizer = load_tokenizer(args.checkpoint_path.parent)
    texts = json.loads((REPO / "benchmarks" / "prompts.json").read_text())
    prompts = {name: tokenizer.encode_chat([{"role": "user", "content": text}]) for name, text in texts.items()}
    args.length = max(map(len, prompts.values())) + args.tokens
    model = load_model(args.checkpoint_path, device=args.device, dtype=args.dtype, quantize=args.quantize)
    return model, prompts, tokenizer.stop_ids


def equality(args: argparse.Namespace, result: dict) -> None:
    model, prompts, _ = real(args)
    prompts = list(prompts.values())[: args.prompts]
    batches = [prompts] if args.together else [[prompt] for prompt in prompts]  # rows accept different lengths
    oracle = engine(args, load_model(args.checkpoint_path, device=args.device, dtype=torch.float32), compile=False)

    def texts(draft=None, k=1) -> list[tuple[int, ...]]:
        llm = engine(args, model, draft, k, batch_size=len(batches[0]))
        steps = (generate(llm, batch, args.tokens) for batch in batches)
        return [row for batch in steps for row in zip(*batch)]

    expected = texts()
    for name, draft, k in drafts(args):
        pairs = zip(prompts, expected, texts(draft, k))
        parted = [divergence(oracle, *triple) for triple in pairs if triple[1] != triple[2]]
        ties = sum(abs(d["margin"]) < TIE[args.precision] for d in parted)
        equal = len(prompts) - len(parted)
        result[name] = {"k": k, "equal": equal, "ties": ties, "faults": len(parted) - ties, "parted": parted}
        args.save()


@torch.inference_mode()
def divergence(oracle: Engine, prompt: list[int], expected: tuple[int, ...], got: tuple[int, ...]) -> dict:
    """Where two texts part, and by how much the fp32 logits there prefer plain decoding's token."""
    at = next(i for i, (a, b) in enumerate(zip(expected, got)) if a != b)
    ids = torch.tensor([[*prompt, *expected[:at]]], device=oracle.device)
    logits = oracle.model(ids, torch.zeros_like(oracle.state.pos), oracle.state.cache)[0, -1]
    return {"position": at, "margin": (logits[expected[at]] - logits[got[at]]).item()}


def speed(args: argparse.Namespace, result: dict) -> None:
    model, prompts, stops = real(args)
    plain = engine(args, model)
    for name, draft, k in drafts(args):
        llm = engine(args, model, draft, k)
        for task in args.tasks:
            timed(llm, prompts[task], 8)
            pairs = []
            for _ in range(args.runs):  # in turns, so that both see the same machine
                tokens, base = timed(plain, prompts[task], args.tokens, stops)
                again, rate = timed(llm, prompts[task], args.tokens, stops)
                pairs.append((base, rate))
            result[f"{name}, {task}"] = {
                "speedup": statistics.median(rate / base for base, rate in pairs),
                "plain_and_speculative_tokens_per_second": pairs,
                "new_tokens": len(tokens),
                "same": again == tokens,
                "report": llm.speculator.report(rate),
            }
            args.save()


def big(args: argparse.Namespace, result: dict) -> None:
    """Tokens a second of plain decoding, and of speculation with forced acceptance, after a short prompt."""
    args.length = 256
    target, draft = (random_model(shape, "int4", args.device, args.dtype) for shape in (args.big_shape, args.shape))
    _, base = timed(engine(args, target), list(range(1, 6)), args.tokens)
    for k in (2, 3, 4, 5, 7):
        llm = engine(args, target, draft, k, compile=False)
        force(llm, [*args.profile, *args.profile[-1:] * k][:k])
        llm.compile()
        _, rate = timed(llm, list(range(1, 6)), args.tokens)
        report = llm.speculator.report(rate)
        result[f"k {k}"] = {"plain_tokens_per_second": base, "speedup": rate / base, "report": report}
        args.save()


def force(llm: Engine, profile: list[float]) -> None:
    """Let draft tokens be accepted with these chances, each given the one before, after verifying them as usual."""
    chances = torch.tensor(profile, device=llm.device).clamp(1e-6, 1 - 1e-6)
    coins, verify = torch.stack((chances, 1 - chances), 1).log(), llm.speculator.verify

    def forced(logits, draft_tokens, draft_logits):
        _, following = verify(logits, draft_tokens, draft_logits)
        accepted = ops.sample(coins, 1.0, 0, 0.0, llm.state.rng) == 0
        return accepted.long().cumprod(0).sum(0, keepdim=True), following

    llm.speculator.verify = forced


def main() -> None:
    tasks = read_json(REPO / "benchmarks" / "prompts.json")
    sections = {"steps": steps, "equality": equality, "speed": speed, "big": big}
    parser = Parser(description=__doc__)
    parser.add_argument("out", type=Path, help="JSON file to write; what it holds of other sections stays")
    parser.add_argument("--sections", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--shapes", nargs=3, default=["stories110M", "7B", "70B"], help="small, middling and big model")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=KINDS, metavar="MODE", help="weights in `steps`")
    parser.add_argument("--profile", type=float, nargs="+", default=[0.75], help="in `big`, each given the one before")
    parser.add_argument("--checkpoint_path", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--quantize", help="its weights in `speed` on load, as generate.py does")
    parser.add_argument("--drafts", nargs="+", metavar="NAME@K", default=DRAFTS)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=tasks, metavar="TASK", help="in `speed`")
    parser.add_argument("--runs", type=int, default=3, help="of each in `speed`")
    parser.add_argument("--prompts", type=int, default=20, help="in `equality`")
    parser.add_argument("--together", action="store_true", help="in `equality`, the prompts as one batch")
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 1000  # every engine compiles its own
    args.device, args.dtype = pick_device(args.device), DTYPES[args.precision]
    args.draft_shape, args.shape, args.big_shape = map(ModelConfig.from_name, args.shapes)
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    about = {
        "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        **provenance(),
        "precision": args.precision,
        "read_bandwidth": ops.read_bandwidth(args.device),
    }
    args.save = lambda: write_text(args.out, json.dumps(result, indent=1) + "\n")
    for name in args.sections:
        start, result[name] = time.perf_counter(), {"about": about}
        sections[name](args, result[name])
        result[name]["seconds"] = time.perf_counter() - start
        args.save()
        print(f"{name}: {result[name]['seconds']:.0f} s", file=sys.stderr)
