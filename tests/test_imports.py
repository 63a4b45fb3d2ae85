"""A module loads what it needs and no more: commands start fast, and nothing is pulled in that may be missing."""

import subprocess
import sys

import pytest
from conftest import REPO

TOKENIZER_LIBRARIES = ("tokenizers", "sentencepiece", "tiktoken")
UNNEEDED = [  # a module, and what importing it must not load
    ("formats.config", ("torch", "numpy")),
    ("formats.convert", ("gguf", "safetensors", *TOKENIZER_LIBRARIES)),
    ("tokenizer", ("torch", "jinja2", *TOKENIZER_LIBRARIES)),
    ("engine", ("tokenizer", "jinja2", *TOKENIZER_LIBRARIES)),
    ("speculate", ("tokenizer", "jinja2", *TOKENIZER_LIBRARIES)),
    ("quantize", ("lm_eval", "datasets", "transformers")),
]


@pytest.mark.parametrize(("module", "unneeded"), UNNEEDED, ids=[module for module, _ in UNNEEDED])
def test_imports_are_light(module, unneeded):
    code = f"import sys, {module}; print(*sorted(set({unneeded}) & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr
