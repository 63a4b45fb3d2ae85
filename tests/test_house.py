"""What the house promises its readers: short functions, a seam with one door, the field's words."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import REPO

LONGEST = 60  # lines of a function outside ops/
RETIRED = r"(?<!math\.)(?<!torch\.)\b(guess|guesses|guessed|judge|judged|mailbox|floors?|gates|fade)\b"


def python_files(*folders):
    return [path for folder in folders for path in sorted((REPO / folder).glob("*.py"))]


@pytest.mark.parametrize("path", python_files(".", "formats", "process", "scripts"), ids=lambda path: path.name)
def test_functions_are_short(path):
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    assert [n.name for n in nodes if n.end_lineno - n.lineno + 1 > LONGEST] == []


def test_the_top_level_knows_ops_by_its_door_alone():
    for path in python_files(".", "formats", "process"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        modules = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
        modules += [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
        assert not [m for m in modules if m.startswith("ops.")], path.name


def test_signatures_of_the_model_hold_no_kernels_wish():
    tree = ast.parse((REPO / "model.py").read_text())
    names = {a.arg for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) for a in n.args.args + n.args.kwonlyargs}
    assert not names & {"ahead", "prefetch", "entry", "first_layer", "context", "gates", "scale", "new"}


def test_retired_words_are_gone():
    for path in [
        *python_files(".", "formats", "ops", "process", "scripts"),
        REPO / "README.md",
        REPO / "ops" / "cpu.cpp",
    ]:
        assert re.findall(RETIRED, path.read_text()) == [], path.name


def test_no_module_shadows_a_package_that_dependencies_import():
    assert not (REPO / "kernels.py").exists() and not (REPO / "kernels").exists()


def test_transformers_imports_beside_the_kernels_package(tmp_path):
    """From the repository's folder, where a module of ours would come before that package (here a stand-in for it)."""
    info = tmp_path / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    (tmp_path / "kernels.py").write_text(
        "class Stand:\n"
        "    def __init__(self, *args, **kwargs): pass\n"
        "    def __call__(self, wrapped=None, *args, **kwargs): return wrapped\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'): raise AttributeError(name)\n"
        "    return Stand\n"
    )
    code = "from transformers import LlamaForCausalLM; import sys; print(sys.modules['kernels'].__file__)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True, text=True)
    assert run.stdout.strip() == str(tmp_path / "kernels.py"), run.stderr
