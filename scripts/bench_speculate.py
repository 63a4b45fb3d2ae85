"""What speculation costs and what it brings: JSON, one section after the other.

    python scripts/bench_speculate.py OUT.json                     # all of it, on a GPU in less than four minutes
    python scripts/bench_speculate.py OUT.json --sections real --device cpu --precision fp32

rounds  a verify pass of 6 rows against a plain step, and a round's overhead beyond draft and verify (random weights)
real    a real checkpoint (SmolLM2): greedy equality, acceptance and speed-up by prompt lookup and by quantised copies
big     a 70B int4 target with a 7B int4 draft. Random weights agree on nothing, so which guesses hold is drawn from a
        stated profile of acceptance; everything is computed as if it were needed
"""

import argparse
import gc
import itertools
import json
import platform
import statistics
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from bench import random_model

from checkpoint import DTYPES, load_model
from generate import DEFAULT_CHECKPOINT, Engine, Sampler, generate, pick_device
from kernels import read_bandwidth, sample
from model import BUILTIN, ModelConfig
from speculate import PROMPT_LOOKUP
from tokenizer import load_tokenizer

GREEDY, SAMPLED = Sampler(temperature=0.0), Sampler(temperature=0.8, top_k=200)
ASSUMED = 0.75  # acceptance of each guess where none was measured

ARTICLE = (
    "The town council voted on Tuesday to replace the old stone bridge over the river Arlen. The bridge, which was "
    "built in 1874, has been closed to heavy traffic since a crack was found in its central arch last winter. "
    "Engineers told the council that repairing the arch would cost almost as much as a new bridge and would last "
    "for only twenty years. The new bridge will be made of steel and concrete, will have two lanes for cars and a "
    "separate path for bicycles, and is expected to open in the spring of 2027. Some residents asked the council to "
    "keep the old bridge as a footpath, and the mayor promised to look for money to preserve it."
)
CODE = """class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance
        self.history = []

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount
        self.history.append(("deposit", amount))

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("insufficient funds")
        self.balance -= amount
        self.history.append(("withdraw", amount))
"""
EDITING = {
    "edit a text": f"Rewrite this text. Change the year 1874 to 1902 and leave everything else as it is.\n\n{ARTICLE}",
    "summarise": f"Summarise the following text in three sentences, using its own words.\n\n{ARTICLE}",
    "proofread": f"Correct the spelling mistakes in this text.\n\n{ARTICLE.replace('which', 'wich')}",
    "edit code": f"Rewrite this Python code with `amount` renamed to `value`. Answer with the code only.\n\n{CODE}",
}
QUESTIONS = (
    "What is gravity?",
    "Why is the sky blue?",
    "Write a short story about a fox and a lighthouse keeper.",
    "Explain how a bicycle stays upright.",
    "List five uses of salt.",
    "Write a Python function that reverses a linked list.",
    "How do vaccines work?",
    "What caused the French Revolution?",
    "Give me a recipe for lentil soup.",
    "Describe the water cycle.",
    "What is the difference between a virus and a bacterium?",
    "Write a poem about autumn.",
    "How does a computer add two numbers?",
    "Explain supply and demand to a child.",
    "Plan a three-day trip to Rome.",
    "What are the planets of the solar system?",
)


def never(row: int, token: int) -> bool:
    return False


def engine(model, draft, k, args: argparse.Namespace, sampler: Sampler = GREEDY) -> Engine:
    options = {"max_seq_length": args.length, "sampler": sampler, "compile": not args.eager}
    return Engine(model, draft=draft, speculate_k=k, **options)


def timed(llm: Engine, prompt: list[int], tokens: int, stops: frozenset[int] = frozenset()) -> tuple[list[int], float]:
    """The tokens generated, and tokens a second after the first."""
    times, out = [], []
    for token in generate(llm, prompt, tokens, is_stop=lambda row, token: token in stops):
        out.append(token)
        times.append(time.perf_counter())
    return out, (len(out) - 1) / max(times[-1] - times[0], 1e-9)


# --- sections ---------------------------------------------------------------------------------------------------------


def rounds(args: argparse.Namespace, result: dict) -> None:
    """Milliseconds of the parts of a round with k = 5, behind 200 tokens, for each kind of weights."""
    args.length = 256
    draft = random_model(args.draft_shape, "int4", args.device, args.dtype)
    prompt = torch.randint(0, 1000, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    for mode in args.modes:
        model = random_model(args.shape, mode, args.device, args.dtype)
        for name, drafter, sampler in (
            ("lookup greedy", PROMPT_LOOKUP, GREEDY),
            ("model greedy", draft, GREEDY),
            ("model sampled", draft, SAMPLED),
        ):
            llm = engine(model, drafter, 5, args, sampler)
            _, rate = timed(llm, prompt, 24)
            report = llm.speculator.report(rate)
            result[f"{mode}, {name}"] = report | {
                "verify_over_plain": report["verify_ms"] / report["plain_ms"],
                "verify_and_overhead_over_plain": (report["verify_ms"] + report["overhead_ms"]) / report["plain_ms"],
                "prepare_seconds": llm.compile_seconds,
            }
            args.save()
        spec = llm.speculator
        spec.accept = torch.compile(spec.accept)  # would it be worth its time?
        spec.rounds.clear()
        result[f"{mode}, {name}, accept compiled"] = spec.report(rate)


def real(args: argparse.Namespace, result: dict) -> None:
    """Equality, acceptance and speed on real text."""
    options = {"device": args.device, "dtype": args.dtype}
    model, tokenizer = load_model(args.checkpoint_path, **options), load_tokenizer(args.checkpoint_path.parent)

    def encode(text: str) -> list[int]:
        return tokenizer.encode_chat([{"role": "user", "content": text}])

    editing, questions = {name: encode(text) for name, text in EDITING.items()}, [encode(text) for text in QUESTIONS]
    prompts = [*editing.values(), *questions][: args.prompts]
    args.length = max(map(len, prompts)) + args.tokens
    stops = tokenizer.stop_ids
    plain = engine(model, None, 5, args)
    expected = together(model, None, 5, prompts, args) if args.together else alone(plain, prompts, args)
    for name in args.drafts:
        entry, draft, k = result.setdefault(name, {}), PROMPT_LOOKUP, 10
        if name != "lookup":
            quantize, k = None if name == "copy" else name, 5
            draft = load_model(args.checkpoint_path, quantize=quantize, device=args.device)  # in bf16
        llm = engine(model, draft, k, args)
        entry |= {"k": k, "prepare_seconds": llm.compile_seconds}
        got = together(model, draft, k, prompts, args) if args.together else alone(llm, prompts, args)
        different = [triple for triple in zip(prompts, expected, got) if triple[1] != triple[2]]
        entry["equal"] = f"{len(prompts) - len(different)} of {len(prompts)} prompts, {args.tokens} tokens each"
        entry["different"] = [divergence(plain, *triple) for triple in different]
        args.save()
        if args.runs:
            accepted = []
            for prompt in questions:
                timed(llm, prompt, args.tokens, stops)
                accepted += llm.speculator.counts.elements()
            reached = [sum(n >= i for k, n in accepted if k) for i in range(k + 1)]
            entry["acceptance_given_the_one_before"] = [b / max(a, 1) for a, b in itertools.pairwise(reached)]
            entry["tokens_per_round"] = sum(n + 1 for _, n in accepted) / max(len(accepted), 1)
            tasks = {**editing, "question": questions[0], "story": questions[2]}
            for speculating in (llm, engine(model, draft, "auto", args)):
                for task, prompt in tasks.items():
                    entry[f"{task}, k {speculating.speculator.k}"] = pairs(plain, speculating, prompt, stops, args)
                    args.save()
    measured = result.get("int4:128", {}).get("acceptance_given_the_one_before")
    args.profiles |= {"SmolLM2 by its int4 copy in groups of 128, questions": measured} if measured else {}


def alone(llm: Engine, prompts: list[list[int]], args: argparse.Namespace) -> list[list[int]]:
    return [list(generate(llm, prompt, args.tokens, is_stop=never)) for prompt in prompts]


def together(model, draft, k, prompts: list[list[int]], args: argparse.Namespace) -> list[tuple[int, ...]]:
    """The prompts as one batch, whose rows accept different lengths."""
    options = {"batch_size": len(prompts), "max_seq_length": args.length, "sampler": GREEDY}
    llm = Engine(model, draft=draft, speculate_k=k, **options)
    return list(zip(*generate(llm, prompts, args.tokens, is_stop=never)))


def pairs(plain: Engine, speculating: Engine, prompt: list[int], stops: frozenset[int], args) -> dict:
    """Plain decoding and speculation in turns, so that both see the same machine."""
    ratios = []
    for _ in range(args.runs):
        tokens, base = timed(plain, prompt, args.tokens, stops)
        again, rate = timed(speculating, prompt, args.tokens, stops)
        ratios.append(rate / base)
    return {
        "new_tokens": len(tokens),
        "same": again == tokens,
        "plain_tokens_per_second": base,
        "speedup": statistics.median(ratios),
        "speedups": ratios,
        "report": speculating.speculator.report(rate),
    }


@torch.inference_mode()
def divergence(llm: Engine, prompt: list[int], expected: list[int], got: list[int]) -> dict:
    """Where two answers part, and by how much plain decoding preferred its token: a float tie, or a fault?"""
    at = next(i for i, (a, b) in enumerate(zip(expected, got)) if a != b)
    ids = torch.tensor([[*prompt, *expected[:at]]], device=llm.device)
    logits = llm.model(ids, torch.zeros_like(llm.pos), llm.cache)[0, -1]
    return {"position": at, "margin": (logits[expected[at]] - logits[got[at]]).item(), "top": logits.max().item()}


def big(args: argparse.Namespace, result: dict) -> None:
    """Tokens a second of plain decoding, and of speculation with forced acceptance, after a short prompt."""
    args.length = 256
    target = random_model(args.big_shape, "int4", args.device, args.dtype)
    draft = random_model(args.shape, "int4", args.device, args.dtype)
    prompt = list(range(1, 6))
    plain = engine(target, None, 5, args)
    timed(plain, prompt, 16)
    base = result["plain_tokens_per_second"] = timed(plain, prompt, args.tokens)[1]
    for k in (2, 3, 4, 5, 7):
        for name, profile in args.profiles.items():
            llm = Engine(target, max_seq_length=args.length, sampler=GREEDY, draft=draft, speculate_k=k)
            force(llm, (profile + [profile[-1]] * k)[:k])
            with torch.inference_mode():
                llm._compile(decode=True, prefill=False)
            timed(llm, prompt, 16)
            _, rate = timed(llm, prompt, args.tokens)
            report = llm.speculator.report(rate)
            result[f"k {k}, {name}"] = {"tokens_per_second": rate, "speedup": rate / base, "report": report}
            args.save()


def force(llm: Engine, profile: list[float]) -> None:
    """Let guesses hold with these probabilities, each given the one before, after judging them as usual."""
    chances = torch.tensor(profile, device=llm.device).clamp(1e-6, 1 - 1e-6)
    coins = torch.stack((chances, 1 - chances), 1).log()
    judge = llm.speculator.accept

    def accept(logits, guesses, draft_logits):
        _, following = judge(logits, guesses, draft_logits)
        holds = sample(coins, 1.0, rng=llm.rng) == 0
        return holds.long().cumprod(0).sum(0, keepdim=True), following

    llm.speculator.accept = accept


def main() -> None:
    sections = {"rounds": rounds, "real": real, "big": big}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--sections", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--device")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--checkpoint_path", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument(
        "--modes", nargs="+", default=["bf16", "int8", "int4"], help="weights of the target in `rounds`"
    )
    parser.add_argument("--drafts", nargs="+", default=["lookup", "int4", "int4:128", "int8", "copy"])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3, help="of each speed; 0 checks equality alone")
    parser.add_argument("--together", action="store_true", help="check equality on one batch of the prompts")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script itself")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 1000  # every engine compiles its own
    args.device, args.dtype = pick_device(args.device), DTYPES[args.precision]
    shapes = {name: ModelConfig.from_name(name) for name in ("stories110M", "7B", "70B")}
    args.draft_shape, args.shape, args.big_shape = shapes.values()
    if args.tiny:
        args.draft_shape, args.shape, args.big_shape = (
            replace(ModelConfig.from_hf(BUILTIN["stories15M"]), n_layer=n) for n in (1, 2, 3)
        )
    args.profiles = {f"{ASSUMED} a guess": [ASSUMED]}
    cuda = args.device.type == "cuda"
    result = {
        "device": torch.cuda.get_device_name(args.device) if cuda else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": args.precision,
        "read_bandwidth": read_bandwidth(args.device),
    }
    args.save = lambda: args.out.write_text(json.dumps(result, indent=1))
    for name in args.sections:
        start, section = time.perf_counter(), result.setdefault(name, {})
        try:
            sections[name](args, section)
        except Exception as error:  # one section's failure must not cost the others'
            traceback.print_exc()
            section["error"] = f"{type(error).__name__}: {error}"
        section["seconds"] = time.perf_counter() - start
        args.save()
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        print(name, f"{section['seconds']:.0f} s", section.get("error", "done"), file=sys.stderr)


if __name__ == "__main__":
    main()
