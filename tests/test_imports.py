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


def test_what_a_command_imports_is_not_searched_for_garbage(tmp_path):
    main = "print(during, gc.isenabled(), gc.get_freeze_count() > 1000)"
    (tmp_path / "probe.py").write_text(f"import gc\nduring = gc.isenabled()\ndef main():\n    {main}\n")
    paths = [str(REPO), str(tmp_path)]
    code = f"import sys; sys.path[:0] = {paths}; from process.command import command; command('probe')"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout.split()) == (0, ["False", "True", "True"]), run.stderr
