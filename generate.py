"""The runtime and the main CLI: load, prefill, decode, sample, stream, stop, measure.

As a library, two lines:

    llm = load("checkpoints/SmolLM2-135M-Instruct/model.pth", compile=True)
    for token in generate(llm, llm.tokenizer.encode("Hello"), max_new_tokens=50): ...
"""

if __name__ == "__main__":  # first: what follows takes seconds to import
    from process.command import command

    command("generate")

import argparse
import itertools
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

import ops
from batches import serve
from checkpoint import DTYPES, load_model, read_config, torch_load
from cli import DEFAULT_CHECKPOINT, add_model_arguments, check_flags, pick_device, positive, use
from engine import Engine
from errors import UserError, shown
from measure import Measure, Throughput, print_measures, print_throughput
from model import ModelConfig, Transformer
from process.command import Parser
from process.files import replacing
from process.ranks import session
from sampling import Sampler
from speculate import LOOKUP_K, MODEL_K, PROMPT_LOOKUP
from texts import read_text
from tokenizer import StopStrings, StreamDecoder, Tokenizer, load_tokenizer
from tp import TensorParallel

K_HELP = f"draft tokens of a step, or auto; {MODEL_K}, or {LOOKUP_K} by prompt lookup"
CLASHES = {  # a flag, and others that would do nothing beside it
    "interactive": ("prompt", "prompt_file", "num_samples", "batch_size", "json", "profile"),
    "prompt_file": ("prompt", "num_samples", "stream", "profile"),
    "speculate": ("draft_checkpoint_path",),
}
NEEDS = {"speculate_k": ("draft_checkpoint_path", "speculate")}
SLOTS = 16  # rows at a time for the prompts of a file, unless --batch_size says otherwise
PROBES = ("The quick brown fox, 1984!", " naïve\n\tdéjà vu", "def f(x):\n    return x")  # tell tokenizers apart


# --- library interface ------------------------------------------------------------------------------------------------


class LLM(Engine):
    """An Engine with its model's tokenizer."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, **engine):
        super().__init__(model, stop_ids=tokenizer.stop_ids, **engine)
        self.tokenizer = tokenizer


def load(
    checkpoint_path: str | Path = DEFAULT_CHECKPOINT,
    *,
    device: str | None = None,
    precision: str = "bf16",
    quantize: str | None = None,
    tp: TensorParallel | None = None,
    draft: str | Path | Transformer | None = None,
    **engine,
) -> LLM:
    """Load a checkpoint, its tokenizer and perhaps a draft's checkpoint (or "prompt_lookup"); `engine` takes what
    an Engine can be told (compile, sampler, ...).
    """
    path, device = Path(checkpoint_path), pick_device(device)
    tokenizer = load_tokenizer(path.parent)
    model, draft = load_models(path, device, precision, quantize, tp, draft, tokenizer, engine)
    return LLM(model, tokenizer, draft=draft, **engine)


def load_models(
    path, device, precision, quantize, tp, draft, tokenizer, engine: dict, prompts: Sequence[list[int]] = ()
) -> tuple[Transformer, Transformer | str | None]:
    """What `load`, whose arguments these are, makes an LLM of: the model, and the draft. Given prompts (one a row or,
    of any other number, one after the other), the kernels that they will launch are compiled meanwhile."""

    def models(device: torch.device) -> tuple:
        options = {"device": device, "dtype": DTYPES[precision]}
        model = load_model(path, quantize=quantize, tp=tp, **options)
        if draft in (None, PROMPT_LOOKUP) or isinstance(draft, Transformer):
            return model, draft
        if not Path(draft).is_file():
            raise UserError(f"the draft {draft} does not exist; scripts/prepare.sh makes checkpoints")
        own, config = load_tokenizer(Path(draft).parent), read_config(Path(draft).parent)
        if any(own.encode(text) != tokenizer.encode(text) for text in PROBES):
            raise UserError(f"the tokenizer of the draft {draft} differs from the target's; they must be the same")
        divides = tp is None or tp.world in tp.worlds(config.n_head, config.n_local_heads)
        return model, load_model(Path(draft), tp=tp if divides else None, **options)  # else each rank runs all of it

    def rehearse() -> None:
        model, draft = models(torch.device("meta"))
        for own in (part for part in (model, draft) if isinstance(part, Transformer)):
            own.pack(DTYPES[precision])
        llm = Engine(model, draft=draft, **engine | {"compile_prefill": False})
        (llm if len(prompts) == llm.batch_size else llm.reader).prefill(prompts)
        if not llm.speculator:
            llm.advance()

    if not prompts:
        return models(device)
    key = (str(path.resolve()), path.stat().st_mtime, quantize, tp, str(draft), engine, [len(ids) for ids in prompts])
    with ops.compiled_ahead(rehearse, device, DTYPES[precision], key):
        return models(device)


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

    A row ends after the token for which is_stop(row, token) is true (by default: any of the engine's stop ids), which
    is yielded too. Generation ends when every row has, after max_new_tokens, or when the cache is full.
    start: keep what the cache holds before this position, which must be the same tokens.
    """
    single = not prompt or isinstance(prompt[0], int)
    prompts = [prompt] if single else prompt
    if not prompts or not all(prompts):
        raise UserError("the prompt is empty; at least one token is needed")
    if len(prompts) != llm.batch_size:
        raise UserError(f"{len(prompts)} prompts were given to an engine whose batch_size is {llm.batch_size}")
    llm.model.config.check_tokens(prompts)
    is_stop = is_stop or (lambda row, token: token in llm.stop_ids)
    if max_new_tokens < 1:
        return
    llm.prefill(prompts, start)
    steps = min(max_new_tokens - 1, llm.state.cache.length - max(map(len, prompts)))
    rows, queues = llm.decode(steps), [deque() for _ in prompts]  # of tokens to yield; None where a row has ended
    for _ in range(steps + 1):
        while any(queue is not None and not queue for queue in queues):
            for queue, tokens in zip(queues, next(rows)):
                if queue is not None:
                    queue.extend(tokens)
        step = [queue.popleft() if queue else None for queue in queues]
        ended = [token is None or is_stop(row, token) for row, token in enumerate(step)]
        queues = [None if end else queue for queue, end in zip(queues, ended)]
        yield step[0] if single else step
        if all(ended):
            return


# --- command line -----------------------------------------------------------------------------------------------------


class Answer:
    """A row's text as it grows: decoded without half characters, ended by a stop id or before a stop string.

    prompt: the ids whose text it continues; none for a text of its own, as in a chat. emit is given the text that has
    become certain.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        emit: Callable[[str], None] | None = None,
    ):
        self.decoder, self.stops = StreamDecoder(tokenizer, prompt), StopStrings(stop_strings)
        self.stop_ids, self.emit = tokenizer.stop_ids, emit
        self.tokens: list[int] = []
        self.text, self.stopped = "", False

    def put(self, token: int) -> bool:
        """Take a token. Returns whether it ends the answer."""
        self.tokens.append(token)
        if token in self.stop_ids:
            self.stopped = True
        else:
            piece, self.stopped = self.stops.put(self.decoder.put(token))
            self._add(piece)
        return self.stopped

    def finish(self) -> None:
        """Add the text held back in case it began a character or a stop string."""
        self._add(self.stops.put(self.decoder.flush())[0] + self.stops.flush())

    def _add(self, piece: str) -> None:
        self.text += piece
        if self.emit and piece:
            self.emit(piece)


def answer(
    llm: LLM,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    stop_strings: Sequence[str] = (),
    emit: Callable[[str], None] | None = None,
    continues: bool = True,
) -> tuple[list[Answer], Measure]:
    """Generate one answer a prompt, emitting row 0's text as it comes.

    continues: whether an answer goes on with its prompt's text, or is a text of its own, as in a chat.
    """
    answers = [
        Answer(llm.tokenizer, prompt if continues else (), stop_strings, None if row else emit)
        for row, prompt in enumerate(prompts)
    ]
    times = [time.perf_counter()]
    for _ in generate(llm, prompts, max_new_tokens, is_stop=lambda row, token: answers[row].put(token)):
        times.append(time.perf_counter())
    for row in answers:
        row.finish()
    new = sum(len(row.tokens) for row in answers)
    first, decode = times[1] - times[0], times[-1] - times[1]
    return answers, Measure(sum(map(len, prompts)), new, len(times) - 2, first, decode)


def answer_queue(
    llm: LLM, prompts: list[list[int]], max_new_tokens: int, *, stop_strings: Sequence[str] = (), continues: bool = True
) -> Iterator[tuple[int, Answer]]:
    """As `answer`, of any number of prompts on the engine's rows: yields (index of the prompt, answer) as they end."""
    answers = [Answer(llm.tokenizer, prompt if continues else (), stop_strings) for prompt in prompts]
    for index, _, last in serve(llm, prompts, max_new_tokens, is_stop=lambda i, token: answers[i].put(token)):
        if last:
            answers[index].finish()
            yield index, answers[index]


def chat(llm: LLM, args: argparse.Namespace) -> None:
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
        if text.strip() == "/clear":
            messages.clear()
        if text.strip() in ("", "/clear"):
            continue
        messages.append({"role": "user", "content": text})
        prompt = llm.tokenizer.encode_chat(messages)
        room = llm.state.cache.length - len(prompt)
        if room < 1:
            messages.pop()
            print(f"[the context is full: {len(prompt)} of {llm.state.cache.length} tokens; /clear starts anew]")
            continue
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(cached, prompt)))
        start = min(same, len(prompt) - 1)  # at least one token must be fed to get logits
        reply = Answer(llm.tokenizer, stop_strings=args.stop, emit=_emit)
        try:
            for token in generate(llm, prompt, min(args.max_new_tokens, room), start=start):
                if reply.put(token):
                    break
            reply.finish()
            print()
            if len(reply.tokens) == room and not reply.stopped:
                print(f"[the context is full: {llm.state.cache.length} tokens; /clear starts anew]")
        except KeyboardInterrupt:
            print(" [interrupted]")
        messages.append({"role": "assistant", "content": reply.text})
        # The last token was sampled but never fed; an interrupted prefill may have left anything.
        cached = prompt + reply.tokens[:-1] if reply.tokens else cached[:start]


def _ask() -> str | None:
    """A line from the terminal, or None at its end."""
    try:
        return input("> ")
    except EOFError:
        return None


def _emit(text: str) -> None:
    print(text, end="", flush=True)


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Generate text from a transformer checkpoint, fast.")
    add_model_arguments(parser)
    parser.add_argument("--prompt", type=_int_or_str, default="Hello, my name is", help="text, or a number of tokens")
    parser.add_argument("--prompt_file", type=Path, help="a prompt a line, of any number, on --batch_size rows")
    parser.add_argument("--interactive", action="store_true", help="chat on the terminal")
    parser.add_argument("--chat", action="store_true", help="put the prompt in the model's chat template")
    parser.add_argument("--num_samples", type=positive, default=1, help="how often to generate")
    parser.add_argument("--max_new_tokens", type=positive, default=200)
    parser.add_argument("--batch_size", type=positive, help="copies of the prompt, or rows for a file's prompts")
    parser.add_argument("--top_k", type=int, default=200, help="0 turns it off")
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--min_p", type=float)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--stop", action="append", default=[], help="end an answer at this string (may be repeated)")
    parser.add_argument("--max_seq_length", type=positive, help="length of the KV cache in tokens")
    parser.add_argument("--compile", action="store_true", help="compile the decode step")
    parser.add_argument("--compile_prefill", action="store_true", help="compile the prefill, too (for long prompts)")
    parser.add_argument("--draft_checkpoint_path", type=Path, metavar="PATH", help="speculate with this model as draft")
    parser.add_argument("--speculate", choices=[PROMPT_LOOKUP], help="speculate by copying from the text so far")
    parser.add_argument("--speculate_k", type=_int_or_str, help=K_HELP)
    parser.add_argument("--profile", type=Path, help="write a Chrome trace of the last sample to PROFILE.json")
    parser.add_argument("--stream", action="store_true", help="print text as it comes")
    parser.add_argument("--json", action="store_true", help="measures as one JSON line, last, and a file's results so")
    args = parser.parse_args()
    check_flags(parser, args, CLASHES, NEEDS)
    if args.chat and isinstance(args.prompt, int):
        raise UserError(f"--chat needs a text; --prompt {shown(args.prompt)} is a number of tokens")
    if not all(args.stop):
        raise UserError("--stop is empty; a non-empty string is needed")
    return args


def _int_or_str(text: str) -> int | str:
    return int(text[:4000]) if text.isdecimal() else text  # Python refuses to read a longer number


def read_prompts(args: argparse.Namespace, tokenizer: Tokenizer, config: ModelConfig) -> list[list[int]]:
    """The prompts of the command line as token ids, each once."""
    texts = [args.prompt]
    if args.prompt_file:
        text = read_text(args.prompt_file, "--prompt_file")
        texts = [line for line in text.split("\n") if line.strip()]
        if not texts:
            raise UserError(f"--prompt_file {args.prompt_file} holds no prompts; one a line is needed")
    if isinstance(args.prompt, int):
        if args.prompt > config.block_size:
            raise UserError(f"--prompt {shown(args.prompt)} exceeds the model's context of {config.block_size} tokens")
        # Ids from the low thousand exist in every vocabulary and are ordinary tokens in most.
        generator = torch.Generator().manual_seed(args.seed % 2**63)
        prompts = [torch.randint(0, min(1024, config.vocab_size), (args.prompt,), generator=generator).tolist()]
    elif args.chat:
        prompts = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    else:
        prompts = [tokenizer.encode(text) for text in texts]
    if not all(prompts):
        raise UserError(f"--prompt {args.prompt!r} is an empty prompt; at least one token is needed")
    return prompts


def main() -> None:
    with session() as tp:
        args = parse_args()
        if args.profile and not args.profile.name:
            raise UserError(f"--profile {str(args.profile)!r} is no name of a file")
        traced = args.profile and tp.rank == 0
        with replacing(Path(f"{args.profile}.json")) if traced else nullcontext() as args.profile:
            _run(args, tp)


def _run(args: argparse.Namespace, tp: TensorParallel) -> None:
    path, draft = args.checkpoint_path, args.draft_checkpoint_path or args.speculate
    device, shown_device = use(args)
    print(f"Using device={shown_device}" + (f" and {tp.world} ranks" if tp.world > 1 else ""), file=sys.stderr)
    start = time.perf_counter()
    torch_load(path)  # says first what is wrong with it
    tokenizer, config = load_tokenizer(path.parent), read_config(path.parent)
    prompts = tp.share(read_prompts(args, tokenizer, config) if tp.rank == 0 and not args.interactive else [])
    rows = min(args.batch_size or SLOTS, len(prompts)) if args.prompt_file else args.batch_size or 1
    length = _cache_length(args, config, prompts)
    engine = {"batch_size": rows, "max_seq_length": length, "kv_cache": args.kv_cache, "speculate_k": args.speculate_k}
    engine |= {"compile": args.compile, "compile_prefill": args.compile_prefill}
    engine["sampler"] = Sampler(args.repetition_penalty, args.temperature, args.top_k, args.top_p, args.min_p)
    read = sorted(prompts, key=len)[-1:] if args.prompt_file else prompts * rows
    read = read if args.compile else []
    model, draft = load_models(path, device, args.precision, args.quantize, tp, draft, tokenizer, engine, read)
    load_seconds = time.perf_counter() - start
    print(f"Time to load model: {load_seconds:.02f} seconds", file=sys.stderr)
    _check_memory(model, rows, length or 0, args.kv_cache)
    llm = LLM(model, tokenizer, draft=draft, **engine)
    if llm.compile_seconds:
        print(f"Compilation time: {llm.compile_seconds:.2f} seconds", file=sys.stderr)
    llm.seed(args.seed)
    if args.interactive:
        chat(llm, args)
    elif args.prompt_file:
        print_throughput(llm, _queue(llm, prompts, args), args.json, load_seconds)
    else:
        print_measures(llm, _samples(llm, prompts * rows, args), args.json, load_seconds)


def _check_memory(model: Transformer, rows: int, length: int, kv_cache: str | None) -> None:
    """Refuse a cache that main memory cannot hold: the system would give it, and end some process as it fills."""
    needed, free = rows * length * model.cache(1, 1, kv_cache).bytes_per_position, ops.free_memory()
    if model.norm.weight.is_cpu and needed > free:
        sizes = f"{needed / 1e9:.1f} GB of memory for keys and values; {free / 1e9:.1f} GB are free"
        raise UserError(f"{rows} rows of {length} tokens need {sizes} (--batch_size, --max_seq_length)")


def _cache_length(args: argparse.Namespace, config: ModelConfig, prompts: list[list[int]]) -> int | None:
    """The cache's length: as asked for, or what the prompts and answers need, within the model's context."""
    context, longest = config.block_size, max(map(len, prompts), default=0)
    if args.max_seq_length and args.max_seq_length > context:
        raise UserError(f"--max_seq_length {args.max_seq_length} exceeds the model's context of {context} tokens")
    if args.interactive:
        return args.max_seq_length
    length = args.max_seq_length or min(context, longest + args.max_new_tokens)
    if longest >= length:
        raise UserError(f"the prompt has {longest} tokens, which leaves no room in a context of {length} tokens")
    return length


def _queue(llm: LLM, prompts: list[list[int]], args: argparse.Namespace) -> Throughput:
    """Answer the prompts of a file: each answer is printed once those before it have been, or when all ends."""
    answers: dict[int, Answer] = {}  # those that have ended
    printed: list[int] = []

    def show(index: int) -> None:
        prompt, reply = llm.tokenizer.decode(prompts[index]), answers[index]
        result = {"index": index, "prompt": prompt, "text": reply.text, "new_tokens": len(reply.tokens)}
        result["finish_reason"] = "stop" if reply.stopped else "length"
        print(json.dumps(result) if args.json else prompt + reply.text, flush=True)
        printed.append(index)

    llm.reader  # noqa: B018  what it compiles is not the generation's time
    begin = time.perf_counter()
    options = {"stop_strings": args.stop, "continues": not args.chat}
    try:
        with tqdm(total=len(prompts), desc="generating", unit="prompt", disable=None) as bar:
            for index, reply in answer_queue(llm, prompts, args.max_new_tokens, **options):
                answers[index] = reply
                bar.update()
                while len(printed) in answers:
                    show(len(printed))
    finally:
        for index in sorted(answers.keys() - printed):
            show(index)
    seconds = time.perf_counter() - begin
    new = sum(len(reply.tokens) for reply in answers.values())
    return Throughput(len(prompts), sum(map(len, prompts)), new, seconds)


def _samples(llm: LLM, prompts: list[list[int]], args: argparse.Namespace) -> list[Measure]:
    measures = []
    options = {"stop_strings": args.stop, "emit": _emit if args.stream else None, "continues": not args.chat}
    for sample in range(1, args.num_samples + 1):
        if args.stream:
            _emit(llm.tokenizer.decode(prompts[0]))
        profiled = args.profile and sample == args.num_samples
        with torch.profiler.profile() if profiled else nullcontext() as profiler:
            answers, measure = answer(llm, prompts, args.max_new_tokens, **options)
            llm.state.synchronize()
        texts = [llm.tokenizer.decode(prompt) + reply.text for prompt, reply in zip(prompts, answers)]
        if args.stream:
            texts[0] = ""  # it is there already, but for the end of its line
        print("\n".join(texts), flush=True)
        if profiler:
            profiler.export_chrome_trace(str(args.profile))
            if not args.profile.read_bytes().rstrip().endswith(b"}"):  # it does not say so itself
                raise UserError("cannot write the trace of --profile: the disk is full, or files may not be that large")
        print(
            f"Time for inference {sample}: {measure.seconds:.02f} sec total, "
            f"{measure.tokens_per_second:.02f} tokens/sec",
            file=sys.stderr,
        )
        measures.append(measure)
    return measures
