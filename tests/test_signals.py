"""Commands as processes: what a signal, a second writer of the same file or a changed source leaves behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import tqdm
from conftest import PROGRESS, REPO
from stub_hub import StubHub
from tiny import write_checkpoint

import eval  # noqa: F401
import quantize  # noqa: F401
from errors import UserError
from process.command import command
from process.files import replacing, write_text

ENDS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "error: ended by SIGTERM",
    signal.SIGHUP: "error: ended by SIGHUP",
}
QUANTIZE = ("quantize", "--checkpoint_path", "{}/model.pth", "--device", "cpu", "--mode")
WRITERS = {  # a command, and the file it writes
    "convert": (("convert_hf_checkpoint", "--checkpoint_dir", "{}"), "model.pth"),
    "int8": ((*QUANTIZE, "int8"), "model_int8.pth"),
    "int4": ((*QUANTIZE, "int4"), "model_int4.g32.pth"),
    "gptq": (
        (*QUANTIZE, "int4-gptq", "--calibration_file", "{}/text.txt", "--calibration_limit", "3"),
        "model_int4-gptq.g32.pth",
    ),
}
EVAL = ("eval", "--checkpoint_path", "{}/model.pth", "--perplexity", "{}/text.txt", "--limit", "99", "--device", "cpu")
GENERATE = ("generate", "--checkpoint_path", "{}/model.pth", "--device", "cpu", "--stream")
GENERATE += ("--max_new_tokens", "20000", "--temperature", "0")  # what it draws otherwise ends after twelve tokens


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals") / "model"
    write_checkpoint(folder, max_position_embeddings=60000)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "model"))


class Forked:
    """A command in a fork of this process, which need not import PyTorch anew. At an item of a progress bar (0 the
    first, -1 after the last) it waits for `go`."""

    def __init__(self, folder, command, pause=None):
        self.errors = folder.parent / f"stderr{time.monotonic_ns()}"
        self.out, self.paused, self.resume = os.pipe(), os.pipe(), os.pipe()
        if (pid := os.fork()) == 0:
            try:
                self._run([part.format(folder) for part in command], pause)
            except SystemExit as end:
                sys.stderr.flush()
                os._exit(end.code or 0)
            finally:  # nothing of pytest's runs in the fork
                os._exit(99)
        self.pid = pid
        for pipe in (self.out, self.paused):
            os.close(pipe[1])  # its end is read as such, and not waited for
        if pause is not None and not os.read(self.paused[0], 1):
            raise AssertionError(f"ended before it was to wait: {self.end()}")

    def _run(self, argv, pause):
        err = os.open(self.errors, os.O_CREAT | os.O_WRONLY)
        os.dup2(err, 2)
        os.dup2(self.out[1], 1)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.argv = argv
        if pause is not None:
            tqdm.tqdm.__iter__ = self._paused_at(pause)
        command(argv[0])

    def _paused_at(self, pause):
        def wait():
            os.write(self.paused[1], b"x")
            os.read(self.resume[0], 1)

        def items(bar):
            for i, item in enumerate(bar.iterable):
                if i == pause:
                    wait()
                yield item
            if pause == -1:
                wait()

        return items

    def go(self):
        os.write(self.resume[1], b"x")
        return self

    def end(self, number=None):
        """Status and stderr's lines."""
        if number is not None:
            os.kill(self.pid, number)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return status, self.errors.read_text().splitlines()


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def same(path, other):
    ours, theirs = torch.load(path), torch.load(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n].float(), theirs[n].float()) for n in ours)


# Every two of a writer, a place and a signal meet.
CASES = [(name, pause, list(ENDS)[(i + j) % 3]) for i, name in enumerate(WRITERS) for j, pause in enumerate((0, 2, -1))]


@pytest.mark.parametrize(("name", "pause", "number"), CASES)
def test_a_signal_leaves_the_old_file_and_nothing_else(folder, name, pause, number):
    command, target = WRITERS[name]
    (folder / target).write_bytes(b"old") if name != "convert" else None
    old, before = (folder / target).read_bytes(), listing(folder)
    writer = Forked(folder, command, pause)
    assert len(listing(folder)) == len(before) + 1
    assert writer.end(number) == (128 + number, [ENDS[number]])
    assert (folder / target).read_bytes() == old and listing(folder) == before


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_in_the_middle_of_an_evaluation(folder, number):
    assert Forked(folder, EVAL, 0).end(number) == (128 + number, [ENDS[number]])


def real(*command, **options):
    script = f"{command[0]}.py" if (REPO / f"{command[0]}.py").exists() else f"scripts/{command[0]}.py"
    line = [sys.executable, str(REPO / script), *command[1:]]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_in_the_middle_of_an_answer(folder, number):
    writer = Forked(folder, GENERATE)
    assert os.read(writer.out[0], 20)
    status, lines = writer.end(number)
    assert (status, lines[-1]) == (128 + number, ENDS[number])
    assert all(re.match(PROGRESS, line) for line in lines[:-1])


def test_an_ignored_signal_stays_ignored(folder):
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        writer = Forked(folder, WRITERS["int8"][0], 2)
    finally:
        signal.signal(signal.SIGHUP, before)
    os.kill(writer.pid, signal.SIGHUP)
    assert writer.go().end() == (0, [])


STARTS = [*((name, signal.SIGINT) for name in ("generate", "quantize", "eval", "convert_hf_checkpoint", "bench"))]
STARTS += [("generate", signal.SIGTERM), ("quantize", signal.SIGHUP), ("download", signal.SIGINT)]


def is_importing(pid, torch):
    """Whether a command has its own handlers of signals, and perhaps PyTorch's library."""
    handled = int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)
    mapped = not torch or "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()
    return mapped and handled >> signal.SIGTERM - 1 & 1


@pytest.mark.parametrize(("name", "number"), STARTS)
def test_a_signal_during_the_imports(name, number):
    process = real(name)
    deadline = time.monotonic() + 60
    while process.poll() is None and not is_importing(process.pid, torch=name != "download"):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("", f"{ENDS[number]}\n")
    assert process.returncode == 128 + number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_a_download(tmp_path, number):
    with StubHub("org/model", {"config.json": b"{}", "model.safetensors": bytes(2**24)}, stall={"config.json"}) as hub:
        env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        process = real("download", "--repo_id", "org/model", "--checkpoints_dir", str(tmp_path), env=env)
        while not hub.gets("config.json"):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        lines = process.communicate(timeout=60)[1].splitlines()
    assert (process.returncode, lines[-1]) == (128 + number, ENDS[number])
    assert not (tmp_path / "org" / "model" / "config.json").exists()


# --- two commands on one output ---------------------------------------------------------------------------------------


def test_two_writers_at_once_make_one_whole_file(folder):
    command, target = WRITERS["int8"]
    assert Forked(folder, command).end()[0] == 0
    expected = (folder / target).rename(folder.parent / "expected.pth")
    before = listing(folder)
    slow, fast = Forked(folder, command, 3), Forked(folder, command)
    assert fast.end()[0] == 0 and same(folder / target, expected)
    assert slow.go().end()[0] == 0 and same(folder / target, expected)
    both = [Forked(folder, command) for _ in range(3)]
    assert [writer.end()[0] for writer in both] == [0, 0, 0] and same(folder / target, expected)
    assert listing(folder) == sorted([*before, target])


def test_a_left_over_goes_when_nobody_writes_it(folder):
    command, target = WRITERS["int8"]
    before = listing(folder)
    living, killed = Forked(folder, command, 3), Forked(folder, command, 3)
    assert killed.end(signal.SIGKILL)[0] == -signal.SIGKILL
    assert len(listing(folder)) == len(before) + 2
    assert Forked(folder, command).end()[0] == 0
    assert len(listing(folder)) == len(before) + 2  # the result, and what is still being written
    assert living.go().end()[0] == 0
    assert listing(folder) == sorted([*before, target])


@pytest.mark.parametrize("name", ["convert", "int8", "gptq"])
@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 5000), lambda path: os.utime(path, (1, 1))])
def test_a_source_that_changes_meanwhile(folder, name, change):
    command, before = WRITERS[name][0], listing(folder)
    writer, source = Forked(folder, command, 2), folder / ("model.safetensors" if name == "convert" else "model.pth")
    change(source)
    status, lines = writer.go().end()
    assert (status, lines) == (2, [f"error: {source} was changed while it was read; run the same command again"])
    assert listing(folder) == before


def test_files_that_appear_whole(tmp_path):
    path = tmp_path / "x"
    write_text(path, "one")
    with pytest.raises(ZeroDivisionError), replacing(path) as partial:
        partial.write_text("two")
        raise ZeroDivisionError
    assert path.read_text() == "one" and listing(tmp_path) == ["x"]
    os.umask(mask := os.umask(0))
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    for bad, words in (
        (tmp_path, "it is a directory"),
        (tmp_path / "y" / "x", "No such file"),
        (path / "x", "Not a dir"),
    ):
        with pytest.raises(UserError, match=f"cannot write {bad}: {words}"):
            write_text(bad, "three")
    with pytest.raises(UserError, match="File name too long"):
        write_text(tmp_path / ("x" * 255), "three")
