"""The real model finds what a long context says, wherever it says so."""

import os

import pytest
import torch
from conftest import smollm2_parts

from generate import LLM, generate
from sampling import Sampler
from texts import read_text

TOKENS = int(os.environ.get("NEEDLE_TOKENS", 2200))  # more than a chunk of a prefill; up to 8000
FACTS = (  # a place in the text, what is said there, and how the answer to its question begins
    (0.1, "The secret word of the castle is", " marigold"),
    (0.3, "The capital of Zubrowka is the town of", " Lutz"),
    (0.5, "The name of the old fisherman is", " Barnaby"),
    (0.7, "The favourite colour of the dragon is", " purple"),
    (0.9, "The best thing to eat on Monday is", " pancakes"),
)


@pytest.fixture(scope="module")
def asked():
    """An engine that has read a text with all facts in it, that text, and where in it each fact is."""
    llm = LLM(*smollm2_parts("bf16"), sampler=Sampler(temperature=0.0), max_seq_length=TOKENS + 190)
    text, prompt, spans, done = llm.tokenizer.encode(read_text())[:TOKENS], [], [], 0
    for place, question, answer in FACTS:
        fact = llm.tokenizer.encode(f"\n\n{question}{answer}.\n\n")
        prompt += text[done : (done := int(place * TOKENS))]
        spans.append(range(len(prompt), len(prompt) + len(fact)))
        prompt += fact
    prompt += text[done:]
    llm.prefill([prompt])
    return llm, prompt, spans


@pytest.mark.parametrize("which", range(len(FACTS)), ids=[f"at {place}" for place, *_ in FACTS])
def test_a_fact_is_found_where_it_stands(asked, which):
    llm, prompt, spans = asked
    _, question, answer = FACTS[which]
    question = prompt + llm.tokenizer.encode(f"\n\n{question}")

    def says() -> bool:
        """Only the question is fed: the rest is in the cache."""
        tokens = list(generate(llm, question, 4, start=len(prompt)))
        return llm.tokenizer.decode(tokens).startswith(answer)

    assert says()
    parts = [t[:, :, spans[which].start : spans[which].stop] for t in llm.state.cache.tensors]
    kept = [part.clone() for part in parts]
    torch._foreach_zero_(parts)
    assert not says()  # without what is there nothing else tells it
    torch._foreach_copy_(parts, kept)
    assert says()
