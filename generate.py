"""The runtime and the main CLI: load, prefill, decode, sample, stream, stop, measure.

As a library, two lines:

    llm = load("checkpoints/SmolLM2-135M-Instruct/model.pth", compile=True)
    for token in generate(llm, llm.tokenizer.encode("Hello"), max_new_tokens=50): ...
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import kernels
from checkpoint import DTYPES, load_model, read_config
from engine import Engine
from errors import UserError, run_cli
from model import Transformer
from sampling import Sampler
from speculate import PROMPT_LOOKUP, summary
from tokenizer import StopStrings, StreamDecoder, Tokenizer, load_tokenizer
from tp import TensorParallel, session

PROBES = ("The quick brown fox, 1984!", " naïve\n\tdéjà vu", "def f(x):\n    return x")  # tell tokenizers apart
DEFAULT_CHECKPOINT = Path("checkpoints/SmolLM2-135M-Instruct/model.pth")


# --- library interface ------------------------------------------------------------------------------------------------


def pick_device(name: str | None) -> torch.device:
    """The device asked for, by default a GPU where there is one, and under torchrun the GPU that is this rank's.
    Raises UserError when it is not there.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"device {name!r} is not known; accepted: cpu, cuda, cuda:N, mps") from None
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        count = torch.cuda.device_count()
        raise UserError(f"device '{device}' was asked for, but this machine has {count} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps' was asked for, but this machine has none")
    return device


def load(
    checkpoint_path: str | Path = DEFAULT_CHECKPOINT,
    *,
    device: str | None = None,
    precision: str = "bf16",
    quantize: str | None = None,
    tp: TensorParallel | None = None,
    draft: str | Path | None = None,
    **engine,
) -> Engine:
    """Load a checkpoint, its tokenizer and perhaps a draft's checkpoint (or "prompt_lookup"), and make an Engine;
    `engine` takes its options (compile, sampler, ...).
    """
    path, options = Path(checkpoint_path), {"device": pick_device(device), "dtype": DTYPES[precision], "tp": tp}
    model, tokenizer = load_model(path, quantize=quantize, **options), load_tokenizer(path.parent)
    return Engine(model, tokenizer, draft=load_draft(draft, tokenizer, **options), **engine)


def load_draft(draft, tokenizer: Tokenizer, tp: TensorParallel | None, **options) -> Transformer | str | None:
    """The model of a draft's checkpoint, whose tokenizer must be the target's. Anything but a path stays as it is.

    Where its heads do not divide over the ranks, each of them runs all of it.
    """
    if draft in (None, PROMPT_LOOKUP) or isinstance(draft, Transformer):
        return draft
    if not Path(draft).is_file():
        raise UserError(f"the draft {draft} does not exist; scripts/prepare.sh makes checkpoints")
    config = read_config(Path(draft).parent)
    divides = tp is None or tp.world in tp.worlds(config.n_head, config.n_local_heads)
    model = load_model(Path(draft), tp=tp if divides else None, **options)
    own = load_tokenizer(Path(draft).parent)
    if any(own.encode(text) != tokenizer.encode(text) for text in PROBES):
        raise UserError(f"the tokenizer of the draft {draft} differs from the target's; they must be the same")
    return model


def generate(
    llm: Engine,
    prompt: list[int] | list[list[int]],
    max_new_tokens: int = 200,
    *,
    is_stop: Callable[[int, int], bool] | None = None,
    start: int = 0,
) -> Iterator[int | list[int | None]]:
    """Generate from token ids, yielding each token id as it comes; for a list of prompts, one list a step with a row's
    token or None once it has ended.

    A row ends after the token for which is_stop(row, token) is true (by default: any of the model's stop ids), which
    is yielded too. Generation ends when every row has, after max_new_tokens, or when the cache is full.
    start: keep what the cache holds before this position, which must be the same tokens.
    """
    single = not prompt or isinstance(prompt[0], int)
    prompts = [prompt] if single else prompt
    if not prompts or not all(prompts):
        raise UserError("the prompt is empty; at least one token is needed")
    if len(prompts) != llm.batch_size:
        raise UserError(f"{len(prompts)} prompts were given to an engine whose batch_size is {llm.batch_size}")
    vocab = llm.model.config.vocab_size
    if bad := [token for row in prompts for token in row if not 0 <= token < vocab]:
        raise UserError(f"token id {bad[0]} is outside the vocabulary of {vocab}")
    if is_stop is None:
        stop_ids = llm.tokenizer.stop_ids if llm.tokenizer else frozenset()
        is_stop = lambda row, token: token in stop_ids  # noqa: E731
    longest = max(map(len, prompts))
    llm.prefill(prompts, start)
    live = [True] * len(prompts)
    for tokens in llm.decode(min(max_new_tokens - 1, llm.cache.length - longest), live):
        step = [token if alive else None for token, alive in zip(tokens, live)]
        live[:] = [alive and not is_stop(row, token) for row, (token, alive) in enumerate(zip(tokens, live))]
        yield step[0] if single else step
        if not any(live):
            return


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Measure:
    """What one generation took. Times in seconds, sizes in bytes, rates per second."""

    prompt_tokens: int = 0  # all rows together, padding not counted
    new_tokens: int = 0  # all rows together
    steps: int = 0  # decode steps after the first token
    time_to_first_token: float = 0.0
    decode_seconds: float = 0.0
    positions: int = 0  # cache positions read by the decode steps, all rows together

    @property
    def seconds(self) -> float:
        return self.time_to_first_token + self.decode_seconds


def weight_bytes(model: Transformer) -> int:
    """Bytes of the weights that a decode step reads: all but the embedding table, unless it is the output as well."""
    tensors = {t.data_ptr(): t for t in itertools.chain(model.parameters(), model.buffers())}
    embedding = model.tok_embeddings.weight
    if model.output.weight is not embedding:
        tensors.pop(embedding.data_ptr())
    return sum(t.nbytes for t in tensors.values())


def report(llm: Engine, measure: Measure, read_bandwidth: float) -> dict:
    """The measures of design: rates, bytes per token, and the share of the device's read bandwidth they make."""
    steps, decode = max(measure.steps, 1), max(measure.decode_seconds, 1e-9)
    weights = weight_bytes(llm.model)
    kv = measure.positions / steps * llm.cache.bytes_per_position
    rate = measure.steps / decode  # per user; each step yields a token for every row
    read = weights + kv  # for a token
    if llm.speculator:
        passes, guesses = llm.speculator.work_per_token()
        read = read * passes + (weight_bytes(llm.speculator.model) * guesses if llm.speculator.model else 0)
    memory = torch.cuda.max_memory_reserved() if llm.device.type == "cuda" else _peak_rss()
    return {
        **asdict(measure),
        "seconds": measure.seconds,
        "tokens_per_second": measure.new_tokens / max(measure.seconds, 1e-9),
        "prefill_tokens_per_second": measure.prompt_tokens / max(measure.time_to_first_token, 1e-9),
        "decode_tokens_per_second": rate,
        "decode_tokens_per_second_total": rate * llm.batch_size,
        "weight_bytes_per_step": weights,
        "kv_bytes_per_step": round(kv),
        "bytes_per_second": read * rate,
        "read_bandwidth": read_bandwidth,
        "bandwidth_fraction": read * rate / read_bandwidth,
        "compile_seconds": llm.compile_seconds,
        "memory_bytes": memory,
    }


def _peak_rss() -> int:
    import resource  # Unix only; a GPU machine of another kind does not need it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- command line -----------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """A row's text as it grows: decoded without half characters, cut at a stop string or stop id."""

    decoder: StreamDecoder
    stops: StopStrings
    stop_ids: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    stopped: bool = False

    def put(self, token: int) -> str:
        """Take a token; returns the text that has become certain."""
        self.tokens.append(token)
        if token in self.stop_ids:
            self.stopped = True
            return ""
        piece, self.stopped = self.stops.put(self.decoder.put(token))
        self.text += piece
        return piece

    def finish(self) -> str:
        """The text held back in case it began a character or a stop string."""
        piece = ""
        if not self.stopped or self.tokens[-1] in self.stop_ids:
            piece, _ = self.stops.put(self.decoder.flush())
            piece += self.stops.flush()
        self.text += piece
        return piece


def answer(
    llm: Engine,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    stop_strings: tuple[str, ...] = (),
    emit: Callable[[str], None] | None = None,
    start: int = 0,
    continues: bool = True,
    answers: list[Answer] | None = None,
) -> tuple[list[Answer], Measure]:
    """Generate one answer a prompt, emitting row 0's text as it comes; `answers` lets the caller keep a partial one.

    continues: whether an answer goes on with its prompt's text, or is a text of its own, as in a chat.
    """
    answers = [] if answers is None else answers
    stop_ids = llm.tokenizer.stop_ids
    for prompt in prompts:
        decoder = StreamDecoder(llm.tokenizer, prompt if continues else ())
        answers.append(Answer(decoder, StopStrings(stop_strings), stop_ids))
    measure = Measure(prompt_tokens=sum(len(prompt) - start for prompt in prompts))

    def is_stop(row: int, token: int) -> bool:
        piece = answers[row].put(token)
        if emit and row == 0 and piece:
            emit(piece)
        return answers[row].stopped

    begin = previous = time.perf_counter()
    for tokens in generate(llm, prompts, max_new_tokens, is_stop=is_stop, start=start):
        previous = time.perf_counter()
        live = [row for row, token in enumerate(tokens) if token is not None]
        measure.new_tokens += len(live)
        if not measure.time_to_first_token:
            measure.time_to_first_token = previous - begin
            continue
        measure.steps += 1
        measure.positions += sum(len(prompts[row]) + measure.steps for row in range(len(prompts)))
    measure.decode_seconds = previous - begin - measure.time_to_first_token
    rest = [row.finish() for row in answers]
    if emit and rest[0]:
        emit(rest[0])
    return answers, measure


def chat(llm: Engine, args: argparse.Namespace) -> None:
    """A conversation on the terminal. The cache keeps earlier turns: only tokens it has not seen are prefilled."""
    messages: list[dict] = []
    cached: list[int] = []  # the tokens whose keys and values the cache holds
    print("Chat with the model: Ctrl-C stops an answer, /clear starts anew, Ctrl-D quits.", file=sys.stderr)
    while True:
        try:
            text = llm.model.tp.share(_ask() if llm.model.tp.rank == 0 else None)
        except KeyboardInterrupt:
            print()
            continue
        if text is None:
            print()
            return
        if not text.strip():
            continue
        if text.strip() == "/clear":
            messages.clear()
            continue
        messages.append({"role": "user", "content": text})
        prompt = llm.tokenizer.encode_chat(messages)
        room = llm.cache.length - len(prompt)
        if room < 1:
            messages.pop()
            print(f"[the context is full: {len(prompt)} of {llm.cache.length} tokens; /clear starts anew]")
            continue
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(cached, prompt)))
        start = min(same, len(prompt) - 1)  # at least one token must be fed to get logits
        answers: list[Answer] = []
        interrupted = False
        try:
            budget = min(args.max_new_tokens, room)
            options = {"stop_strings": tuple(args.stop), "emit": _emit, "start": start, "answers": answers}
            answer(llm, [prompt], budget, continues=False, **options)
        except KeyboardInterrupt:
            interrupted = True
        reply = answers[0] if answers else None
        print(" [interrupted]" if interrupted else "")
        if reply and not reply.stopped and not interrupted and len(reply.tokens) >= room:
            print(f"[the context is full: {llm.cache.length} tokens; /clear starts anew]")
        messages.append({"role": "assistant", "content": reply.text if reply else ""})
        # The last token was sampled but never fed; an interrupted prefill may have left anything.
        cached = prompt + reply.tokens[:-1] if reply and reply.tokens else cached[:start]


def _ask() -> str | None:
    """A line from the terminal, or None at its end."""
    try:
        return input("> ")
    except EOFError:
        return None


def _emit(text: str) -> None:
    print(text, end="", flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate text from a transformer checkpoint, fast.")
    parser.add_argument(
        "--prompt", type=_int_or_str, default="Hello, my name is", help="text, or a number of random tokens"
    )
    parser.add_argument("--prompt_file", type=Path, help="a prompt a line, generated as one ragged batch")
    parser.add_argument("--interactive", action="store_true", help="chat on the terminal")
    parser.add_argument("--chat", action="store_true", help="put the prompt in the model's chat template")
    parser.add_argument("--num_samples", type=positive, default=1, help="how often to generate")
    parser.add_argument("--max_new_tokens", type=positive, default=200)
    parser.add_argument("--batch_size", type=positive, default=1, help="copies of the prompt to generate at once")
    parser.add_argument("--top_k", type=int, default=200, help="0 turns it off")
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--min_p", type=float)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--stop", action="append", default=[], help="end an answer at this string (may be repeated)")
    parser.add_argument("--checkpoint_path", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--max_seq_length", type=positive, help="length of the KV cache in tokens")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16", help="of activations and plain weights")
    parser.add_argument("--quantize", metavar="KIND", help="quantise on load: int8, fp8, int4 or int4:GROUP")
    parser.add_argument("--compile", action="store_true", help="compile the decode step")
    parser.add_argument("--compile_prefill", action="store_true", help="compile the prefill, too (for long prompts)")
    parser.add_argument(
        "--draft_checkpoint_path", type=Path, metavar="PATH", help="speculate by this model, which guesses tokens ahead"
    )
    parser.add_argument("--speculate", choices=[PROMPT_LOOKUP], help="speculate by copying from the text so far")
    parser.add_argument("--speculate_k", type=_positive_or_auto, help="guesses a round, or auto; 5, or 7 by lookup")
    parser.add_argument("--profile", type=Path, help="write a Chrome trace of the last sample to PROFILE.json")
    parser.add_argument("--stream", action="store_true", help="print text as it comes")
    parser.add_argument("--json", action="store_true", help="print the measures as one JSON line, last")
    parser.add_argument("--device", help="cpu, cuda, cuda:N, mps; by default a GPU where there is one")
    return parser.parse_args(argv)


def _int_or_str(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _positive_or_auto(text: str) -> int | str:
    return text if text == "auto" else positive(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def read_prompts(args: argparse.Namespace, tokenizer: Tokenizer, vocab_size: int) -> list[list[int]]:
    """The prompts of the command line as token ids."""
    if args.prompt_file:
        try:
            texts = [line for line in args.prompt_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --prompt_file {args.prompt_file}: {error}") from None
        if not texts:
            raise UserError(f"--prompt_file {args.prompt_file} holds no prompts; one a line is needed")
    elif isinstance(args.prompt, int):
        if args.prompt < 1:
            raise UserError("--prompt 0 asks for an empty prompt; at least one token is needed")
        # Ids from the low thousand exist in every vocabulary and are ordinary tokens in most.
        generator = torch.Generator().manual_seed(args.seed)
        synthetic = torch.randint(0, min(1024, vocab_size), (args.prompt,), generator=generator).tolist()
        return [synthetic] * args.batch_size
    else:
        texts = [args.prompt] * args.batch_size
    if args.chat:
        prompts = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    else:
        prompts = [tokenizer.encode(text) for text in texts]
    if not all(prompts):
        raise UserError("--prompt is empty; at least one token is needed")
    return prompts


def main(argv: list[str] | None = None) -> None:
    with session() as tp:
        _run(parse_args(argv), tp)


def _run(args: argparse.Namespace, tp: TensorParallel) -> None:
    sampler = Sampler(args.repetition_penalty, args.temperature, args.top_k or None, args.top_p, args.min_p)
    if not all(args.stop):
        raise UserError("--stop is empty; a non-empty string is needed")
    draft = args.draft_checkpoint_path or args.speculate
    if args.draft_checkpoint_path and args.speculate:
        raise UserError("--draft_checkpoint_path and --speculate are two ways to speculate; give one of them")
    if args.speculate_k and not draft:
        raise UserError("--speculate_k needs --draft_checkpoint_path PATH or --speculate prompt_lookup")
    device = pick_device(args.device)
    print(f"Using device={device}" + (f" and {tp.world} ranks" if tp.world > 1 else ""), file=sys.stderr)
    start = time.perf_counter()
    options = {"device": device, "dtype": DTYPES[args.precision], "tp": tp}
    model = load_model(args.checkpoint_path, quantize=args.quantize, **options)
    tokenizer = load_tokenizer(args.checkpoint_path.parent)
    draft = load_draft(draft, tokenizer, **options)
    load_seconds = time.perf_counter() - start
    print(f"Time to load model: {load_seconds:.02f} seconds", file=sys.stderr)
    reads = tp.rank == 0 and not args.interactive
    prompts = tp.share(read_prompts(args, tokenizer, model.config.vocab_size) if reads else [])
    length = _cache_length(args, model, max(map(len, prompts), default=0))
    llm = Engine(
        model,
        tokenizer,
        batch_size=max(len(prompts), 1),
        max_seq_length=length,
        sampler=sampler,
        compile=args.compile,
        compile_prefill=args.compile_prefill,
        draft=draft,
        speculate_k=args.speculate_k or (7 if args.speculate else 5),
    )
    if llm.compile_seconds:
        print(f"Compilation time: {llm.compile_seconds:.2f} seconds", file=sys.stderr)
    llm.seed(args.seed)
    if args.interactive:
        chat(llm, args)
    else:
        measures = _samples(llm, prompts, args)
        _print_measures(llm, measures, args.json, load_seconds)


def _cache_length(args: argparse.Namespace, model: Transformer, longest: int) -> int | None:
    """The cache's length: as asked for, or what the prompts and answers need, within the model's context."""
    context = model.config.block_size
    if args.max_seq_length and args.max_seq_length > context:
        raise UserError(f"--max_seq_length {args.max_seq_length} exceeds the model's context of {context} tokens")
    if args.interactive:
        return args.max_seq_length
    length = args.max_seq_length or min(context, longest + args.max_new_tokens)
    if longest >= length:
        raise UserError(f"the prompt has {longest} tokens, which leaves no room in a context of {length} tokens")
    return length


def _samples(llm: Engine, prompts: list[list[int]], args: argparse.Namespace) -> list[Measure]:
    measures = []
    for sample in range(args.num_samples):
        last = sample == args.num_samples - 1
        profiling = torch.profiler.profile() if args.profile and last else nullcontext()
        if args.stream:
            print(llm.tokenizer.decode(prompts[0]), end="", flush=True)
        with profiling as profiler:
            emit = _emit if args.stream else None
            options = {"stop_strings": tuple(args.stop), "emit": emit, "continues": not args.chat}
            answers, measure = answer(llm, prompts, args.max_new_tokens, **options)
            llm.synchronize()
        if args.stream:
            print()
        for row, (prompt, reply) in enumerate(zip(prompts, answers)):
            if not args.stream or row > 0:
                print(llm.tokenizer.decode(prompt) + reply.text)
        if profiler:
            profiler.export_chrome_trace(f"{args.profile}.json")
        print(
            f"Time for inference {sample + 1}: {measure.seconds:.02f} sec total, "
            f"{measure.new_tokens / measure.seconds:.02f} tokens/sec",
            file=sys.stderr,
        )
        measures.append(measure)
    return measures


def _print_measures(llm: Engine, measures: list[Measure], as_json: bool, load_seconds: float) -> None:
    """gpt-fast's closing lines and what they leave out, from the sample of median speed."""
    median = sorted(measures, key=lambda m: m.new_tokens / m.seconds)[len(measures) // 2]
    r = report(llm, median, kernels.read_bandwidth(llm.device)) | {"load_seconds": load_seconds}
    r["tokens_per_second_of_samples"] = rates = [m.new_tokens / m.seconds for m in measures]
    total = f" ({r['decode_tokens_per_second_total']:.2f} in total)" if llm.batch_size > 1 else ""
    megabytes = (r["weight_bytes_per_step"] + r["kv_bytes_per_step"]) / 1e6
    lines = [
        "==========",
        f"Batch Size: {llm.batch_size}",
        f"Time to first token: {r['time_to_first_token']:.3f} seconds",
        f"Prefill: {r['prefill_tokens_per_second']:.2f} tokens/sec",
        f"Decode: {r['decode_tokens_per_second']:.2f} tokens/sec{total}",
        f"Bandwidth achieved: {r['bytes_per_second'] / 1e9:.02f} GB/s ({megabytes:.1f} MB a step), "
        f"{r['bandwidth_fraction']:.3f} of the {r['read_bandwidth'] / 1e9:.1f} GB/s this device reads",
    ]
    if llm.speculator:
        r["speculation"] = llm.speculator.report(measures[-1].steps / max(measures[-1].decode_seconds, 1e-9))
        lines.append(summary(r["speculation"]))
    lines += [f"Average tokens/sec: {sum(rates) / len(rates):.2f}", f"Memory used: {r['memory_bytes'] / 1e9:.02f} GB"]
    print("\n".join(lines), file=sys.stderr)
    if as_json:
        print(json.dumps(r))


if __name__ == "__main__":
    run_cli(main)
