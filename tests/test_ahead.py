"""Kernels compiled ahead: a rehearsal without memory or GPU finds those that a run launches, and no others."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

if __name__ == "__main__":  # before ops: see ops/common.py
    import triton  # noqa: F401
import torch

import ops

CASES = {  # how generate.load_models is called
    "bf16": {},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "three rows": {"batch_size": 3},
    "a cache in int8": {"kv_cache": "int8"},
    "prompt lookup": {"draft": "prompt_lookup", "speculate_k": "auto"},
    "greedy": {"temperature": 0.0},
    "not captured": {"compile": False, "length": 12},
    "a draft": {"draft": "model.pth"},
}


@pytest.fixture(scope="module")
def found() -> dict[str, list[list[str]]]:
    """What `main` prints, without the interpreter: by case, the kernels of a rehearsal and those of a run."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"GPTFAST_CPU": "none"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [env.get("PYTHONPATH")])])
    process = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    (line,) = process.stdout.splitlines()
    return json.loads(line) | {"stderr": process.stderr}


@pytest.mark.parametrize("case", CASES)
def test_a_rehearsal_finds_the_kernels_of_a_run(found, case):
    rehearsed, launched = found[case]
    assert len(rehearsed) == len(set(rehearsed)) > 5
    assert sorted(rehearsed) == sorted(launched)


def test_two_ranks_compile_what_all_launch(found):
    """The first one adds biases, the others do not."""
    first, second, third = map(set, found["ranks"])
    assert first != second == third
    assert all(any(name in kernel for kernel in first & second) for name in ("_all_reduce", "_exchange"))


def test_kernels_are_compiled_by_processes_that_say_nothing(found):
    """Those that a rehearsal reaches, each once, and the C around them; the run meets what hinders it by itself."""
    launchers = ["__triton_launcher"] * found["launchers"]
    assert found["compiled"] == [*launchers, "_embedding_kernel", "_norm_kernel", "cuda_utils"]
    assert found["starts"] == 3  # of four times, once nothing is left to do
    assert "hindered" not in found["stderr"]


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_without_kernels_nothing_is_rehearsed(device, dtype):
    with patch("multiprocessing.get_context") as start, ops.compiled_ahead(print, torch.device(device), dtype, 0):
        pass
    assert not start.called


def main() -> None:
    from tiny import write_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(
            Path(folder),
            hidden_size=128,
            intermediate_size=256,
            num_attention_heads=4,
            vocab_size=512,
            max_position_embeddings=4096,
            attention_bias=True,
        )
        result = {case: compare(Path(folder), **how) for case, how in CASES.items()}
        result["ranks"] = [of_rank(Path(folder), rank) for rank in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        result |= compiled(folder)
    print(json.dumps(result))


def compiled(folder: str) -> dict:
    """What is in Triton's cache after a rehearsal that ends early, how many kernels' launchers this Triton compiles,
    and how often processes were started."""
    from triton.backends.nvidia import driver

    from ops import common, rms_norm

    os.environ["TRITON_CACHE_DIR"] = os.environ["TRITON_LIBCUDA_PATH"] = folder
    # a driver to link with, no more
    subprocess.run(["cc", "-shared", "-o", f"{folder}/libcuda.so.1", "-x", "c", os.devnull], check=True)
    x, tokens = torch.empty(4, 64, dtype=torch.bfloat16, device="meta"), torch.empty(1, 4, dtype=torch.int64).to("meta")

    def rehearsal(hinder):
        for _ in range(2):
            ops.embed(x, tokens, None, 4)
            rms_norm.normed(x, x[0], 1e-5)
        print("hindered", flush=True)
        if hinder:
            raise RuntimeError("hindered")

    starts, start = [], multiprocessing.get_context("fork").Process.start
    count = patch("multiprocessing.context.ForkProcess.start", lambda self: starts.append(None) or start(self))
    with patch.object(common, "gpu", lambda _: common.Gpu("NVIDIA H200", (9, 0), 132)), count:
        for hinder, key in ((True, 1), (False, 1), (False, 1), (False, 2)):  # the third one has nothing to do
            with ops.compiled_ahead(partial(rehearsal, hinder), torch.device("cuda"), x.dtype, key):
                pass
    files = [path.name.split(".")[0] for path in Path(folder).glob("*/*") if path.suffix in (".cubin", ".so")]
    return {"compiled": sorted(files), "launchers": 2 * hasattr(driver, "make_launcher"), "starts": len(starts)}


def compare(folder, quantize=None, draft=None, temperature=0.8, length=40, **engine) -> tuple[list[str], list[str]]:
    """The kernels of a rehearsal, and those that an engine on CPU tensors launches, where nothing runs."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    import generate
    from engine import Engine
    from ops import ahead, common, graph
    from sampling import Sampler
    from tokenizer import load_tokenizer

    engine = {"batch_size": 1, "max_seq_length": 100, "compile": True} | engine
    engine["sampler"] = Sampler(1.0, temperature, 20)
    prompts = [[i] * length for i in range(engine["batch_size"])]
    gpu, launched, rehearsals, run = common.Gpu("NVIDIA H200", (9, 0), 132), {}, [], JITFunction.run

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = get_current_stream = staticmethod(lambda *_: 0)

    def launch(kernel, *args, grid, warmup, **options):
        def hook(*, key, **_):
            launched[kernel.fn.__name__ + key] = None
            return True

        ahead.triton.knobs.runtime.jit_cache_hook = hook
        run(kernel, *args, grid=grid, warmup=True, **options)

    def remember(rehearsal, *_):
        rehearsals.append(rehearsal)
        return nullcontext()

    ahead.triton.runtime.driver.set_active(Driver())
    linear = sys.modules["ops.linear"]  # ops.linear is a function
    stands_in = [(JITFunction, "run", launch), (common, "gpu", lambda _: gpu), (ops, "compiled_ahead", remember)]
    stands_in += [(ops, "capture", once), (torch.cuda, "graph_pool_handle", lambda: None)]
    stands_in += [(linear, "BACKENDS", (*linear.BACKENDS[:2], linear.BACKENDS[-1]))]
    stands_in += [(module, "has_graphs", lambda _: True) for module in (ops, graph)]
    modules = [module for name, module in sys.modules.items() if name.startswith("ops.")]
    stands_in += [(module, "on_triton", lambda _: True) for module in modules if hasattr(module, "on_triton")]
    with ExitStack() as patches:
        for one in stands_in:
            patches.enter_context(patch.object(*one))
        draft = folder / draft if draft == "model.pth" else draft
        what = (folder / "model.pth", torch.device("cpu"), "bf16", quantize, None, draft, load_tokenizer(folder))
        model, draft = generate.load_models(*what, engine, prompts)
        llm = Engine(model, draft=draft, **engine)
        llm.prefill(prompts)
        if not engine["compile"]:
            llm.advance()
    with patch.object(JITFunction, "run", run), patch.object(common, "gpu"), patch.object(ops, "capture"):
        found = ahead.rehearse(*rehearsals, gpu, lambda launch: None)
    return [function.__name__ + key for function, key in found], list(launched)


def of_rank(folder: Path, rank: int) -> list[str]:
    """The kernels of a rehearsal of one of four ranks, which meets no other."""
    from triton.runtime.jit import JITFunction

    import generate
    from ops import ahead, common, exchange, symmetric
    from tp import TensorParallel

    rehearsals = []
    what = (folder / "model.pth", torch.device("cpu"), "bf16", None, TensorParallel(rank, 4), None, None)
    take = patch.object(ops, "compiled_ahead", lambda rehearsal, *_: rehearsals.append(rehearsal) or nullcontext())
    with take:
        generate.load_models(*what, {"compile": True, "max_seq_length": 100}, [[1, 2, 3]])
    changed = [
        (JITFunction, "run"),
        (common, "gpu"),
        (ops, "capture"),
        (symmetric, "symmetric_buffers"),
        (exchange, "inbox"),
    ]
    with ExitStack() as patches:
        for module, name in changed:
            patches.enter_context(patch.object(module, name, getattr(module, name)))
        patches.enter_context(patch.object(symmetric, "MAX_WORDS", 2**11))  # fewer than 64 tokens have
        patches.enter_context(patch.object(exchange, "MOST_RANKS", 4))
        found = ahead.rehearse(*rehearsals, common.Gpu("NVIDIA H200", (9, 0), 132), lambda launch: None)
    return [function.__name__ + key for function, key in found]


def once(function, *inputs, **_):
    output = function(*inputs)
    return lambda *_: output


if __name__ == "__main__":
    main()
