"""Accuracy: lm-eval's tasks on this repository's models, and perplexity of any text without lm-eval.

python eval.py --checkpoint_path checkpoints/$MODEL_REPO/model.pth --compile --tasks hellaswag winogrande
python eval.py --checkpoint_path checkpoints/$MODEL_REPO/model_int8.pth --perplexity
"""

if __name__ == "__main__":  # first: what follows takes seconds to import
    from process.command import command

    command("eval")

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import ops
from checkpoint import DTYPES, load_model
from cli import add_model_arguments, check_flags, natural, positive, use
from engine import MAX_DEFAULT_CONTEXT, compile_blocks
from errors import UserError, shown
from generate import LLM, answer_queue
from model import KVCache, Transformer
from process.command import Parser
from process.ranks import session
from sampling import Sampler
from state import feed
from texts import load_tasks, read_text
from tokenizer import Tokenizer, load_tokenizer
from tp import TensorParallel

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models import utils as lm_eval_utils
    from lm_eval.utils import make_table
except ImportError:  # perplexity does without lm-eval; load_tasks says that it is missing
    TemplateLM = None

MAX_BATCH_TOKENS = 32768  # cache positions of a batch, all rows together: long texts make small batches
MAX_LOGITS = 2**26  # fp32 logits held at a time, 256 MiB: long continuations are scored in slices
TEXT_WINDOW = 2048  # the most tokens of context for a text's perplexity


class LanguageModel(TemplateLM or object):
    """A model and its tokenizer as lm-eval sees them, with the semantics of lm-eval's own `hf` backend.

    Log-likelihoods are computed in batches sorted by length. Continuations of one context share its prefill: a batch's
    distinct contexts are read once each, and their rows of the cache copied to the continuations.
    batch_size: rows at most, fewer where they are long. max_length: the most tokens in an input, by default the model's
    context, up to MAX_DEFAULT_CONTEXT. compile: the decode step, and the model's blocks for all else.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        batch_size=16,
        max_length: int | None = None,
        compile=False,
        kv_cache: str | None = None,
    ):
        super().__init__()
        self.model, self.text_tokenizer = model, tokenizer  # lm-eval takes `tokenizer` for one of transformers'
        self.batch_size, self.compile, self.kv_cache = batch_size, compile, kv_cache
        self.max_length = max_length or min(model.config.block_size, MAX_DEFAULT_CONTEXT)
        self._device = model.norm.weight.device
        self.hidden = compile_blocks(model) if compile else model.hidden

    @property
    def eot_token_id(self) -> int:
        """End of text: the configured eos_token, or else the first of the checkpoint's stop ids."""
        known, name = self.text_tokenizer.backend.added, self.text_tokenizer.template_tokens.get("eos_token")
        token = known.get(name, min(self.text_tokenizer.eos_ids, default=None))
        if token is None:
            raise UserError(f"{self.tokenizer_name}: eos_token is {name!r}; the name of an added token is needed")
        return token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text so that its first token can be predicted: BOS, or else end of text."""
        bos = self.text_tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.text_tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self.text_tokenizer.encode(string, bos=add_special_tokens is not False)

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        text = self.text_tokenizer.render_chat(chat_history, add_generation_prompt)
        if not add_generation_prompt:  # the last message is to be continued: drop what would end it
            last = chat_history[-1]["content"].strip()
            text = text[: text.rindex(last) + len(last)]
        return text

    # --- log-likelihoods ---

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        return self.score([(context, continuation) for _, context, continuation in requests], not disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        texts = [self.tok_encode(request.args[0]) for request in requests]
        windows = [rolling_windows(tokens, self.prefix_token_id, self.max_length) for tokens in texts]
        scores = iter(self.score([pair for text in windows for pair in text], not disable_tqdm))
        return [sum(next(scores)[0] for _ in text) for text in windows]

    def score(self, pairs: list[tuple[list[int], list[int]]], progress: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation) of token ids, the context not empty: the continuation's log-likelihood in
        nats, and whether greedy decoding would give it. A pair of over max_length + 1 tokens loses some on the left.

        Raises UserError for a continuation longer than max_length.
        """
        if (longest := max((len(target) for _, target in pairs), default=0)) > self.max_length:
            raise UserError(f"a continuation has {longest} tokens, more than --max_seq_length {self.max_length}")
        rows = [(tuple(context[-(self.max_length + 1 - len(target)) :]), tuple(target)) for context, target in pairs]
        # Equal contexts side by side, longest first: memory peaks at once, and there is little padding.
        order = [i for i, (_, target) in enumerate(rows) if target]
        order.sort(key=lambda i: (-len(rows[i][0]), rows[i][0], -len(rows[i][1])))
        longest = max((len(rows[i][0]) + len(rows[i][1]) for i in order), default=1)
        size = max(1, min(self.batch_size, MAX_BATCH_TOKENS // longest))
        results = [(0.0, True)] * len(rows)  # what an empty continuation gets
        for a in tqdm(
            range(0, len(order), size), desc="log-likelihoods", unit="batch", disable=None if progress else True
        ):
            batch = order[a : a + size]
            for i, result in zip(batch, self._score_batch([rows[i] for i in batch])):
                results[i] = result
        return results

    @torch.inference_mode()
    def _score_batch(self, rows: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[tuple[float, bool]]:
        contexts = {context: row for row, context in enumerate(dict.fromkeys(context for context, _ in rows))}
        length = max(8, *(len(context) + len(target) - 1 for context, target in rows))  # the last is never fed
        cache = self.model.cache(len(contexts), length, self.kv_cache)
        # A context's last token predicts the first that is scored, so it belongs to the continuation.
        for _ in self._feed([context[:-1] for context in contexts], [0] * len(contexts), cache):
            pass
        if len(contexts) < len(rows):
            source = torch.tensor([contexts[context] for context, _ in rows], device=self._device)
            cache = cache.select(source)
        targets, logprobs, greedy = self._padded([target for _, target in rows]), [], []
        inputs, start = [(context[-1], *target[:-1]) for context, target in rows], [len(c) - 1 for c, _ in rows]
        size = max(1, MAX_LOGITS // (len(rows) * self.model.config.vocab_size))
        for a, x in self._feed(inputs, start, cache, size):
            logits, target = self.model.logits(x), targets[:, a : a + x.shape[1], None]  # (B, s, V), (B, s, 1)
            logprobs.append(logits.gather(-1, target)[..., 0] - logits.logsumexp(-1))
            greedy.append(logits.argmax(-1) == target[..., 0])
        logprobs, greedy = torch.cat(logprobs, 1).cpu().double(), torch.cat(greedy, 1).cpu()  # (B, S)
        if not logprobs.isfinite().all():
            raise UserError("the model's logits are NaN or infinite: weights that are, or too large for --precision")
        lengths = [len(target) for _, target in rows]
        return [(logprobs[row, :n].sum().item(), bool(greedy[row, :n].all())) for row, n in enumerate(lengths)]

    def _feed(
        self, rows: list[tuple[int, ...]], start: list[int], cache: KVCache, size: int = 0
    ) -> Iterator[tuple[int, Tensor]]:
        """Feed each row's tokens from its start position on, in slices: yields (offset, hidden states (B, s, C))."""
        tokens, pos = self._padded(rows), torch.tensor(start, device=self._device)
        # A few tokens would go to the kernels for decoding, each choice of which is compiled for itself.
        few = max(ops.row_limits(self._device, self.model.dtype), default=0)
        least = 1 + max(1, few // len(rows)) if self.compile or self._device.type != "cpu" else 1

        def hidden(part: Tensor, begin: Tensor, end: int) -> Tensor:
            x = self.model.tok_embeddings(F.pad(part, (0, max(0, least - part.shape[1]))))
            used = cache if self.compile else cache.first(end)  # a bound would be one more size to compile for
            return self.hidden(x, begin, used)[:, : part.shape[1]]

        return feed(hidden, tokens, pos, max(start) + tokens.shape[1], size)

    def _padded(self, rows: list[tuple[int, ...]]) -> Tensor:
        """Token ids (B, longest), shorter rows padded at their end."""
        self.model.config.check_tokens(rows)
        ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
        return pad_sequence(ids, batch_first=True).to(self._device)

    # --- generation ---

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        pairs = [(self.tok_encode(text) or [self.prefix_token_id], how) for text, how in (r.args for r in requests)]
        groups = lm_eval_utils.Collator(pairs, sort_fn=lambda pair: -len(pair[0]), group_by="gen_kwargs")
        with tqdm(total=len(pairs), desc="generating", disable=disable_tqdm) as bar:
            texts = [text for group in groups.get_batched(n=0) for text in self._generate(*zip(*group), bar)]
        return groups.get_original(texts)

    def _generate(self, prompts: tuple[list[int]], options: tuple[dict], bar: tqdm) -> list[str]:
        """A text for each prompt, of which the longest comes first; options: lm-eval's generation_kwargs, all equal."""
        tokenizer, options = self.text_tokenizer, lm_eval_utils.normalize_gen_kwargs(options[0])
        until = lm_eval_utils.handle_stop_sequences(options.pop("until", None), tokenizer.decode([self.eot_token_id]))
        until = [string for string in until if string]
        budget = options.pop("max_gen_toks")
        options.pop("do_sample")  # the temperature says the same
        known = [field.name for field in fields(Sampler)]
        if unknown := ", ".join(sorted(set(options) - set(known))):
            raise UserError(f"generation_kwargs {unknown} are not supported; supported: {', '.join(known)}")
        if not 0 < budget < self.max_length:
            raise UserError(f"max_gen_toks is {budget}; accepted: 1 to {self.max_length - 1} (--max_seq_length)")
        prompts = [prompt[-(self.max_length - budget) :] for prompt in prompts]
        length = len(prompts[0]) + budget
        size = max(1, min(self.batch_size, len(prompts), MAX_BATCH_TOKENS // length))
        llm = LLM(
            self.model,
            replace(tokenizer, stop_ids=tokenizer.eos_ids or tokenizer.stop_ids),
            batch_size=size,
            max_seq_length=length,
            sampler=Sampler(**{"temperature": 0.0, "top_k": None, **options}),
            compile=self.compile,
            kv_cache=self.kv_cache,
        )
        texts = [""] * len(prompts)
        for index, reply in answer_queue(llm, prompts, budget, stop_strings=until, continues=False):
            text = tokenizer.decode(reply.tokens, skip_special=True)
            texts[index] = lm_eval_utils.postprocess_generated_text(text, until, None)
            bar.update()
        return texts


def rolling_windows(tokens: list[int], prefix: int, length: int) -> list[tuple[list[int], list[int]]]:
    """Cut a text into (context, continuation) pairs that predict each token once, from at most `length` tokens.

    lm-eval's convention (get_rolling_token_windows): the first window begins with the prefix token, the others with one
    token of context, and the last reaches back so that it is as long as the others.
    """
    ends = [(a, min(a + length, len(tokens))) for a in range(0, len(tokens), length)]
    return [(tokens[b - length - 1 : a] if a else [prefix], tokens[a:b]) for a, b in ends]


# --- perplexity -------------------------------------------------------------------------------------------------------


def perplexity(lm: LanguageModel, text: str, *, window: int = TEXT_WINDOW, max_tokens: int | None = None) -> dict:
    """Predict every token of a text, or its first max_tokens, from at most `window` tokens (and lm.max_length).

    Returns tokens, bytes (of UTF-8), window (tokens), nll (nats, all tokens together), perplexity (per token) and
    bits_per_byte, which can be compared between vocabularies.
    """
    tokens = lm.text_tokenizer.encode(text, bos=False, special=False)
    if max_tokens and max_tokens < len(tokens):
        tokens = tokens[:max_tokens]
        text = lm.text_tokenizer.decode(tokens)
    window = min(window, lm.max_length)
    nll = -sum(logprob for logprob, _ in lm.score(rolling_windows(tokens, lm.prefix_token_id, window), progress=True))
    size = len(text.encode())
    result = {"tokens": len(tokens), "bytes": size, "window": window, "nll": nll}
    return result | {"perplexity": math.exp(min(nll / len(tokens), 700)), "bits_per_byte": nll / math.log(2) / size}


# --- tasks ------------------------------------------------------------------------------------------------------------


def evaluate(lm, tasks: dict, *, limit: int | None = None, num_fewshot: int | None = None, chat: bool = False) -> dict:
    """Run a model of lm-eval's on tasks from load_tasks, with its chat template if asked; returns lm-eval's results."""
    import lm_eval.evaluator  # brings transformers

    for name, task in tasks["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"lm-eval's {name} runs the code that a model writes; this program runs none")
        fixed = task.get_config("num_fewshot")
        if fixed is None or (num_fewshot is not None and fixed != 0):  # a task that says 0 means it
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
            if num_fewshot and num_fewshot >= (known := len(task.fewshot_docs())):  # one may be the question itself
                raise UserError(f"--num_fewshot {shown(num_fewshot)} is too many; {name} has {known} examples")
        task.set_fewshot_seed(seed=1234)
    limit = min(limit, sys.maxsize) if limit else None
    return lm_eval.evaluator.evaluate(lm, tasks, limit=limit, apply_chat_template=chat, fewshot_as_multiturn=chat)


# --- command line -----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Measure a checkpoint's accuracy: lm-eval tasks, or perplexity.")
    add_model_arguments(parser)
    parser.add_argument("--tasks", nargs="+", default=[], help="lm-eval tasks, groups, tags or patterns")
    parser.add_argument("--perplexity", nargs="?", const="", metavar="FILE", help="of a text file, or a built-in text")
    parser.add_argument("--limit", type=positive, help="documents of each task, or tokens of the text, to stop after")
    parser.add_argument("--num_fewshot", type=natural, help="examples in each prompt, but for tasks that fix 0")
    parser.add_argument("--chat", action="store_true", help="put prompts in the model's chat template")
    parser.add_argument("--include_path", type=Path, help="a directory of your own tasks' YAML files")
    parser.add_argument("--max_seq_length", type=positive, help="longest input in tokens; text is cut on the left")
    parser.add_argument("--batch_size", type=positive, default=16, help="rows at most; long texts make fewer")
    parser.add_argument("--compile", action="store_true", help="compile the model")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON line, last")
    args = parser.parse_args(argv)
    if args.tasks or args.perplexity is not None:
        check_flags(parser, args, {}, dict.fromkeys(("num_fewshot", "chat", "include_path"), ("tasks",)))
    if not args.tasks and args.perplexity is None:
        args.tasks = ["hellaswag"]  # gpt-fast's default
    return args


def main(argv: list[str] | None = None) -> None:
    with session() as tp:
        run(parse_args(argv), tp)


def run(args: argparse.Namespace, tp: TensorParallel) -> None:
    (device, _), path, length = use(args), args.checkpoint_path, args.max_seq_length
    # Texts and tasks first: what is wrong with them shows before a large model is read.
    text = None if args.perplexity is None else read_text(Path(args.perplexity) if args.perplexity else None)
    tasks = load_tasks(args.tasks, args.include_path) if args.tasks else None
    model = load_model(path, device=device, dtype=DTYPES[args.precision], quantize=args.quantize, tp=tp)
    if length and length > model.config.block_size:
        raise UserError(f"--max_seq_length {length} exceeds the model's context of {model.config.block_size} tokens")
    tokenizer, options = load_tokenizer(path.parent), {"batch_size": args.batch_size, "compile": args.compile}
    options["kv_cache"] = args.kv_cache
    lm = LanguageModel(model, tokenizer, max_length=length, **options)
    report = {"checkpoint": str(path), "device": str(device), "precision": args.precision, "quantize": args.quantize}
    report["kv_cache"] = args.kv_cache
    start = time.perf_counter()
    try:
        if text is not None:
            name = args.perplexity or f"built-in text (pydoc_data.topics of Python {platform.python_version()})"
            found = perplexity(lm, text, window=length or TEXT_WINDOW, max_tokens=args.limit)
            print(name, "{tokens} tokens in windows of {window}, {bytes} bytes".format(**found), sep=": ")
            print(
                "NLL: {nll:.2f} nats, perplexity: {perplexity:.4f}, bits per byte: {bits_per_byte:.4f}".format(**found)
            )
            report["perplexity"] = {"text": name, **found}
        if tasks:
            results = evaluate(lm, tasks, limit=args.limit, num_fewshot=args.num_fewshot, chat=args.chat)
            report |= {key: results[key] for key in ("results", "groups", "n-samples") if results.get(key)}
            print(make_table(results))
            if results.get("groups"):
                print(make_table(results, "groups"))
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory on {device}; lower --batch_size or --max_seq_length") from None
    print(f"Time to run eval: {time.perf_counter() - start:.02f} seconds", file=sys.stderr)
    if args.json:
        print(json.dumps(report, default=float))
