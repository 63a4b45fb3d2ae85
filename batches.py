"""Many prompts on a few rows: a row that has ended is refilled from the queue, while the others go on."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engine import Engine, check_finite, shared_prefix
from errors import UserError


@dataclass
class Request:
    index: int  # of its prompt
    room: int  # tokens that it may still get
    to_come: int  # of these, those that no step, as far as is known, is on its way to
    finite: Callable[[], bool]  # whether the logits that its first token was drawn from are
    fresh: bool = True  # whether its first token, drawn by the prefill, has yet to be fetched
    ended: bool = False


def serve(
    llm: Engine,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    is_stop: Callable[[int, int], bool] | None = None,
) -> Iterator[tuple[int, int, bool]]:
    """Generate from any number of prompts on the engine's rows: yields (index of the prompt, token, whether it is the
    prompt's last) as tokens come, in order within a prompt.

    A prompt ends with the token for which is_stop(index, token) is true (by default: any of the engine's stop ids),
    after max_new_tokens, or when the cache is full. What all prompts begin with is read once. Raises UserError, before
    anything, for a prompt that the cache cannot hold.
    """
    llm.model.config.check_tokens(prompts)
    if (longest := max(map(len, prompts))) > llm.state.cache.length:
        raise UserError(f"a prompt has {longest} tokens; the cache holds {llm.state.cache.length} (--max_seq_length)")
    lag = 1 if llm.device.type == "cuda" else 0  # a block runs while the host reads the one before
    is_stop = is_stop or (lambda index, token: token in llm.stop_ids)
    llm.fit(min(longest + max_new_tokens, llm.state.cache.length))  # any of them, so that no row has to be read again
    start = shared_prefix(prompts) if len(prompts) > 1 else 0
    if start:
        llm.share(prompts[0][:start])
    queue = deque(enumerate(prompts))
    rows: list[Request | None] = [None] * llm.batch_size
    pending: deque[tuple[list[Request | None], Callable[[], list[list[int]]]]] = deque()
    llm.park(slice(None), start)
    while queue or pending or any(rows):
        for row, request in enumerate(rows):
            if request and (request.ended or request.to_come <= 0):
                rows[row] = None
                llm.park(row, start)
            if rows[row] is None and queue:
                index, prompt = queue.popleft()
                finite = llm.fill(row, prompt, start)
                room = min(max_new_tokens, llm.state.cache.length - len(prompt) + 1)
                rows[row] = Request(index, room, room - 1, finite)
        if any(rows):
            pending.append((list(rows), llm.advance()))
            for request in filter(None, rows):
                request.to_come -= 1 if llm.speculator else llm.block
        if pending and (len(pending) > lag or not any(rows)):
            owners, result = pending.popleft()
            for request, tokens in zip(owners, result()):
                yield from _take(request, tokens, is_stop)


def _take(
    request: Request | None, tokens: list[int], is_stop: Callable[[int, int], bool]
) -> Iterator[tuple[int, int, bool]]:
    """What a row got: a token that it had before, and those since."""
    if request is None or request.ended:
        return
    if request.fresh:
        check_finite(request.finite)
    for token in tokens if request.fresh else tokens[1:]:
        request.room -= 1
        request.ended = is_stop(request.index, token) or request.room == 0
        yield request.index, token, request.ended
        if request.ended:
            return
    request.fresh = False
