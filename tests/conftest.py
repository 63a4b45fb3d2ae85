"""Shared fixtures: reproducible single-threaded tests, the real checkpoint, the repository's scripts as commands."""

import functools
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton, which then runs its kernels on the CPU
    os.environ["TRITON_INTERPRET"] = "1"

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork of a process that used it says so on stderr
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a fork would wait for the others, and their pool imports PyTorch
REPO = Path(__file__).resolve().parent.parent
SMOLLM2 = REPO / "checkpoints" / "SmolLM2-135M-Instruct"

# A shell's background jobs ignore Ctrl-C, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup, for one, has all ignore


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def reproducible() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture
def smollm2_dir() -> Path:
    """Directory of the real SmolLM2-135M-Instruct checkpoint, which scripts/test.sh prepares."""
    assert (SMOLLM2 / "model.pth").is_file(), "run scripts/prepare.sh"
    return SMOLLM2


@functools.cache
def smollm2_parts(precision: str) -> tuple:
    """The real model and its tokenizer on the CPU, loaded once a process: Transformer, Tokenizer."""
    from checkpoint import DTYPES, load_model  # no sooner than a test wants it
    from tokenizer import load_tokenizer

    return load_model(SMOLLM2 / "model.pth", dtype=DTYPES[precision]), load_tokenizer(SMOLLM2)


PROGRESS = r"Using device=\w+( with \d+ threads?)?$|Time to load model: \d|log-likelihoods: "


class Result(NamedTuple):
    status: int
    stdout: str
    stderr: str


def run_apart(
    *args: object, stdin: str = "", cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 300
) -> Result:
    """Run Python with these arguments, in a process that imports all anew."""
    process = subprocess.run(
        [sys.executable, *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
    )
    return Result(process.returncode, process.stdout, process.stderr)


@pytest.fixture
def cli() -> Callable[..., Result]:
    """Runs a script of the repository in a process of its own: `cli("generate.py", "--prompt", "Hi", stdin="")`."""
    return lambda script, *args, **options: run_apart(REPO / script, *args, **options)


def run_forked(script: str, *args: object, stdin: str = "", cwd: Path | None = None, timeout: float = 300) -> Result:
    """Run a script of the repository, or Python code, in a fork of this process: a process of its own, which need not
    import PyTorch anew. (What a command is told by its environment is mostly read by imports: `cli` is for that.)"""
    if torch.cuda.is_initialized():  # what a fork of it inherits neither works nor unlocks
        program = [REPO / script] if script.endswith(".py") else ["-c", script]
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        return run_apart(*program, *args, stdin=stdin, cwd=cwd, env=paths, timeout=timeout)
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        streams[0].write_text(stdin, encoding="utf-8")
        if (pid := os.fork()) == 0:
            status = 99
            try:
                for number, path in enumerate(streams):
                    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
                sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
                sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))
                os.chdir(cwd or ".")
                sys.argv = [script, *map(str, args)]
                if script.endswith(".py"):
                    runpy.run_path(str(REPO / script), run_name="__main__")
                else:
                    exec(script, {"__name__": "__main__"})
                status = 0
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                status = 1
                traceback.print_exc()
            finally:  # nothing of pytest's runs in the fork
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        end = time.monotonic() + timeout
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                pytest.fail(f"{script} takes longer than {timeout} s")
            time.sleep(0.01)
        return Result(os.waitstatus_to_exitcode(ended[1]), *(path.read_text(encoding="utf-8") for path in streams[1:]))


def assert_one_line(result: Result, words: str) -> None:
    """A command ended by a user error: status 2, nothing on stdout, and on stderr, but for progress, one line that this
    regular expression finds."""
    assert result.status == 2, result.stderr
    *progress, last = result.stderr.splitlines()
    assert all(re.match(PROGRESS, line) for line in progress), result.stderr
    assert last.startswith("error: ") and len(last) <= 500, last
    assert re.search(words, last), last
    assert result.stdout == ""


@pytest.fixture
def refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., None]:
    """Runs a script as a program but in this process, for speed, and checks that it ends with a user error."""

    def check(script: str, *args: object, words: str) -> None:
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(REPO / script), run_name="__main__")
        assert_one_line(Result(end.value.code, *capsys.readouterr()), words)

    return check
