"""The real commands: text, measures, chat, and one clear line with exit status 2 for whatever a user gets wrong."""

import json
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
from conftest import REPO, run_forked
from tiny import write_checkpoint

import quantize
from errors import UserError
from generate import generate, load, main
from ops import read_bandwidth
from sampling import Sampler


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    write_checkpoint(directory)
    return directory


def run_args(directory):
    return ["--checkpoint_path", directory / "model.pth", "--device", "cpu", "--precision", "fp32"]


def test_generate_prints_text_and_measures(cli, tiny):
    args = [*run_args(tiny), "--prompt", "Hello", "--max_new_tokens", "20", "--num_samples", "2", "--json"]
    result = cli("generate.py", *args, "--temperature", "0")
    assert result.status == 0, result.stderr
    *text, line = result.stdout.splitlines()
    assert "\n".join(text).startswith("Hello")
    measures = json.loads(line)
    assert measures["new_tokens"] == measures["steps"] + 1 <= 20
    assert measures["weight_bytes_per_step"] == 4 * sum(
        t.numel() for name, t in torch.load(tiny / "model.pth").items() if name != "tok_embeddings.weight"
    )
    expected = measures["bytes_per_second"] / measures["read_bandwidth"]
    assert measures["bandwidth_fraction"] == pytest.approx(expected)
    for words in ("Average tokens/sec: ", "Memory used: ", "Bandwidth achieved: ", "Time to first token: "):
        assert words in result.stderr
    again = run_forked("generate.py", *args, "--temperature", "0", "--stream")
    assert again.stdout.splitlines()[:-1] == text


@pytest.mark.parametrize("cuda", [False, True])
def test_programs_are_run_alike_with_and_without_cuda(cuda, tmp_path, monkeypatch):
    """`run_forked` forks only where CUDA is not in use."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: cuda)
    code = "import os, sys, errors; print(input(), sys.argv[1:], os.getcwd()); sys.stderr.write('said'); sys.exit(3)"
    assert run_forked(code, "a", 7, stdin="Hi", cwd=tmp_path) == (3, f"Hi ['a', '7'] {tmp_path}\n", "said")
    assert run_forked("generate.py", "--help").stdout.startswith("usage:")


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "7"}])
def test_pytorchs_idle_threads_spin_briefly_unless_the_user_says_otherwise(own):
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, REPO / "quantize.py", "--help"]
    environment |= {"OMP_DISPLAY_ENV": "verbose", **own}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    counts = {int(count) for count in re.findall(r"GOMP_SPINCOUNT = '(\d+)'", result.stderr)}
    if not counts:
        pytest.skip("PyTorch is not built with GNU OpenMP")
    assert counts == {0 if "OMP_WAIT_POLICY" in own else int(own.get("GOMP_SPINCOUNT", 2000))}


def test_prompt_file_chat_and_synthetic_prompts(tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("One\n\nTwo and more\nThree, naïve 😀\n", encoding="utf-8")
    args = [*run_args(tiny), "--max_new_tokens", "5", "--temperature", "0"]
    result = run_forked("generate.py", *args, "--prompt_file", tmp_path / "prompts.txt")
    assert result.status == 0, result.stderr
    for start in ("One", "Two and more", "Three, naïve 😀"):
        assert f"\n{start}" in f"\n{result.stdout}"
    assert "Batch Size: 3" in result.stderr
    chat = run_forked("generate.py", *args, "--prompt", "Hi", "--chat")
    assert chat.stdout.startswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    synthetic = run_forked("generate.py", *args, "--prompt", "7", "--batch_size", "2", "--json")
    assert json.loads(synthetic.stdout.splitlines()[-1])["prompt_tokens"] == 14


def test_profile_writes_a_trace(tiny, tmp_path):
    args = [*run_args(tiny), "--max_new_tokens", "3", "--profile", tmp_path / "trace"]
    assert run_forked("generate.py", *args).status == 0
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_a_reader_that_leaves_ends_it_without_a_traceback(tiny):
    command = [sys.executable, REPO / "generate.py", *run_args(tiny), "--stream", "--max_new_tokens", "200"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # before it writes: later, all might be written by then
    assert "Traceback" not in process.stderr.read()
    assert process.wait(60) == 141


def test_what_the_terminal_cannot_show_is_replaced(cli, tiny):
    args = [*run_args(tiny), "--max_new_tokens", "2", "--prompt", "naïve"]
    result = cli("generate.py", *args, env={"PYTHONIOENCODING": "ascii"})
    assert result.status == 0, result.stderr
    assert result.stdout.startswith("na?ve")
    args = ["--checkpoint_path", tiny / "model.pth", "--device", "cpu", "--include_path", REPO / "tests/data/eval"]
    result = cli("eval.py", *args, "--tasks", "hellaswag", "--limit", "2", env={"PYTHONIOENCODING": "ascii"})
    assert result.status == 0, result.stderr
    assert "|hellaswag|" in result.stdout and "|acc_norm|?  |" in result.stdout, result.stdout


def test_bench_keeps_what_else_its_file_holds(tiny, tmp_path, refuses):
    out = tmp_path / "h100.json"
    out.write_text('{"first_token": 5, "rows": []}')
    args = ["--checkpoint_path", tiny / "model.pth", "--device", "cpu", "--runs", "1", "--max_new_tokens", "4"]
    result = run_forked("scripts/bench.py", *args, "--json", out)
    assert result.status == 0, result.stderr
    found = json.loads(out.read_text())
    assert found["first_token"] == 5 and found["rows"][0]["tokens_per_second"] > 0
    refuses("scripts/bench.py", *args, "--json", tmp_path / "absent" / "x.json", words="absent")
    refuses("scripts/bench.py", "--modes", "int5", words="invalid choice: 'int5'")


def test_interactive_chat(tiny):
    args = [*run_args(tiny), "--interactive", "--max_new_tokens", "8", "--max_seq_length", "120", "--temperature", "0"]
    result = run_forked("generate.py", *args, stdin="Hi\n\nAgain, please\n/clear\nHi\n" + "x" * 200 + "\n")
    assert result.status == 0, result.stderr
    replies = result.stdout.split("> ")[1:]
    assert replies[0] == replies[4] or replies[0] == replies[3]  # the conversation began anew, with the same answer
    assert "the context is full: " in result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_ends_an_answer_not_the_chat(tiny, tmp_path):
    directory = shutil.copytree(tiny, tmp_path / "endless")
    edit_json(directory / "config.json", max_position_embeddings=60000)  # so that only the signal ends the answer
    flags = ["--interactive", "--max_new_tokens", "100000", "--max_seq_length", "50000", "--temperature", "0"]
    process = subprocess.Popen(
        [sys.executable, REPO / "generate.py", *run_args(directory), *flags],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    process.stdin.write("Tell me everything\n")
    process.stdin.flush()
    assert process.stdout.read(2) == "> "
    process.stdout.read(3)  # the answer has begun
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate("/clear\n", timeout=60)
    assert process.returncode == 0, err
    assert "[interrupted]" in out and out.rstrip().endswith(">"), out[-200:]


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damaged(tiny, tmp_path, change):
    """A copy of the checkpoint with one thing wrong."""
    directory = tmp_path / "damaged"
    shutil.copytree(tiny, directory)
    change(directory)
    return ["--checkpoint_path", directory / "model.pth", "--device", "cpu"]


def truncate(path, part=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


def edit_state(path, change):
    state = torch.load(path)
    change(state)
    torch.save(state, path)


FLAGS = {
    "no such checkpoint": (["--checkpoint_path", "/absent/model.pth"], r"/absent/model\.pth does not exist"),
    "a directory as checkpoint": (["--checkpoint_path", "/tmp"], r"/tmp is a directory; give /tmp/model\.pth"),
    "a device as checkpoint": (["--checkpoint_path", os.devnull], r"/dev/null is no file"),
    "unknown device": (["--device", "tpu9"], r"tpu9"),
    "absent GPU": (["--device", "cuda:99"], r"cuda:99"),
    "unknown precision": (["--precision", "fp8"], r"invalid choice: 'fp8'"),
    "negative temperature": (["--temperature", "-1"], r"temperature is -1\.0; accepted"),
    "negative top_k": (["--top_k", "-5"], r"top_k is -5; accepted"),
    "top_p over one": (["--top_p", "1.5"], r"top_p is 1\.5; accepted"),
    "min_p over one": (["--min_p", "7"], r"min_p is 7\.0; accepted"),
    "zero repetition penalty": (["--repetition_penalty", "0"], r"repetition_penalty is 0\.0"),
    "no new tokens": (["--max_new_tokens", "0"], r"'0' is not a positive integer"),
    "no samples": (["--num_samples", "-1"], r"num_samples"),
    "empty batch": (["--batch_size", "0"], r"'0' is not a positive integer"),
    "empty prompt": (["--prompt", ""], r"--prompt .. is an empty prompt"),
    "synthetic prompt of nothing": (["--prompt", "0"], r"--prompt 0 is an empty prompt"),
    "empty stop string": (["--stop", ""], r"--stop is empty"),
    "prompt longer than the cache": (["--prompt", "30", "--max_seq_length", "20"], r"has 30 tokens.*20 tokens"),
    "prompt longer than the context": (["--prompt", "99999999999999"], r"99999999999999 exceeds .* context of 256"),
    "unsupported device": (["--device", "meta"], r"'meta' is not supported; accepted: cpu, cuda"),
    "seed of 65 bits": (["--seed", "18446744073709551616"], r"the seed is 18446744073709551616; accepted: 64-bit"),
    "top_k of 32 bits": (["--top_k", "4294967296"], r"top_k is 4294967296; accepted: 1 to 2147483647"),
    "profile into nowhere": (["--profile", "/absent/x"], r"cannot write /absent/x\.json: No such file"),
    "profile of no name": (["--profile", ""], r"--profile '\.' is no name of a file"),
    "abbreviated flag": (["--max_new", "5"], r"unrecognized arguments: --max_new"),
    "long value": (["--device", "x" * 9999], r"^error: .*x\.\.\.x.*; accepted: cpu, cuda, cuda:N, mps$"),
    "lines and escapes in a value": (["--device", "a\n\x1b[31mb"], r"device 'a"),
    "batch larger than memory": (["--batch_size", "999999999", "--prompt", "1"], r"memory"),
    "cache longer than the context": (["--max_seq_length", "300"], r"300 exceeds the model's context of 256"),
    "no such prompt file": (["--prompt_file", "/absent.txt"], r"cannot read --prompt_file /absent\.txt"),
    "unknown quantisation": (["--quantize", "int3"], r"int3"),
    "group that is none": (["--quantize", "int4:33"], r"33"),
    "quantisation of no name": (["--quantize", ""], r"cannot quantise to ''; accepted: int8, fp8, int4, int4:32"),
    "group of no size": (["--quantize", "int4:"], r"cannot quantise to 'int4:'; accepted"),
    "unknown flag": (["--fast"], r"unrecognized arguments: --fast"),
}
STRANGE = {  # what must not reach a kernel
    "int8": lambda t: t.to(torch.int8),
    "bool": lambda t: t.bool(),
    "fp8": lambda t: t.to(torch.float8_e4m3fn),
    "fp64": lambda t: t.double(),
    "complex": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "quantised by PyTorch": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "scalar": lambda t: t.sum(),
    "a list": lambda t: t.tolist(),
}
DAMAGES = {
    "truncated weights": (lambda d: truncate(d / "model.pth"), r"model\.pth is truncated"),
    "weights that are text": (lambda d: (d / "model.pth").write_text("hello"), r"model\.pth is truncated or not"),
    "missing tensor": (lambda d: edit_state(d / "model.pth", lambda s: s.pop("norm.weight")), r"norm\.weight"),
    "unexpected tensor": (
        lambda d: edit_state(d / "model.pth", lambda s: s.update({"extra.weight": torch.ones(1)})),
        r"unexpected tensors: extra\.weight",
    ),
    "wrong shape": (
        lambda d: edit_state(d / "model.pth", lambda s: s.update({"layers.0.attention.wo.weight": torch.ones(3, 64)})),
        r"layers\.0\.attention\.wo",
    ),
    "GGUF as checkpoint": (
        lambda d: (d / "model.pth").rename(d / "model.gguf"),
        r"model\.gguf is not a model\.pth; scripts/convert_hf_checkpoint\.py --checkpoint_dir .* makes one",
    ),
    **{
        f"{name} that is {what}": (
            lambda d, n=name, t=value: edit_state(d / "model.pth", lambda s: s.update({n: t(s[n])})),
            words,
        )
        for name, words in (
            ("tok_embeddings.weight", r"tok_embeddings\.weight"),
            ("norm.weight", r"norm\.weight"),
            ("layers.1.attention.wo.weight", r"layers\.1\.attention\.wo"),
        )
        for what, value in STRANGE.items()
    },
    "numbers for names": (
        lambda d: edit_state(d / "model.pth", lambda s: s.update({7: torch.ones(1)})),
        r": 7 is Tensor; plain",
    ),
    "a number for a tensor": (lambda d: edit_state(d / "model.pth", lambda s: s.update({"x": 7})), r"'x' is int"),
    "infinite norm": (
        lambda d: edit_state(d / "model.pth", lambda s: s["norm.weight"].fill_(torch.inf)),
        r"norm\.weight holds NaN or infinite values",
    ),
    "more layers than tensors": (
        lambda d: edit_json(d / "config.json", num_hidden_layers=10_000, layer_types=None),
        r"lacks layers\.9999\.attention\.wo\.weight; its config has 10000 layers",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), r"model name 'damaged' is not supported; supported: 13B"),
    "malformed config": (lambda d: truncate(d / "config.json"), r"config\.json is not valid JSON"),
    "config that is a list": (lambda d: (d / "config.json").write_text("[]"), r"config\.json holds a list"),
    "unknown model_type": (lambda d: edit_json(d / "config.json", model_type="rwkv"), r"model_type 'rwkv'"),
    "unknown rope_type": (
        lambda d: edit_json(d / "config.json", rope_parameters={"rope_type": "mrope"}),
        r"rope_type 'mrope' is not supported; supported: default",
    ),
    "unknown activation": (lambda d: edit_json(d / "config.json", hidden_act="relu2"), r"hidden_act 'relu2'"),
    "config of a wrong type": (
        lambda d: edit_json(d / "config.json", num_key_value_heads="2"),
        r"num_key_value_heads is '2'; accepted: an integer",
    ),
    "windows of other layers": (
        lambda d: edit_json(d / "config.json", model_type="qwen2", layer_types=["sliding_attention"] * 9),
        r"layer_types are told of 9 layers of",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), r"tokenizer"),
    "malformed tokenizer": (lambda d: truncate(d / "tokenizer.json"), r"tokenizer\.json"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_bad_flags(refuses, tiny, case):
    flags, words = FLAGS[case]
    refuses("generate.py", *run_args(tiny), *flags, words=words)


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_checkpoints(refuses, tiny, tmp_path, case):
    change, words = DAMAGES[case]
    args = damaged(tiny, tmp_path, change)
    if case == "GGUF as checkpoint":
        args[1] = args[1].with_suffix(".gguf")
    refuses("generate.py", *args, words=words)


def test_a_fifo_as_checkpoint(refuses, tmp_path):
    """A FIFO has no end to wait for."""
    os.mkfifo(tmp_path / "model.pth")
    refuses("generate.py", "--checkpoint_path", tmp_path / "model.pth", words=r"model\.pth is no file")


@pytest.mark.parametrize("kind", ["scales", "zeros"])
def test_scales_of_a_strange_type(refuses, tiny, tmp_path, kind, capsys):
    directory = shutil.copytree(tiny, tmp_path / "int4")
    quantize.main(["--checkpoint_path", str(directory / "model.pth"), "--device", "cpu", "--mode", "int4"])
    capsys.readouterr()
    path, name = directory / "model_int4.g32.pth", f"layers.0.attention.wo.{kind}"
    edit_state(path, lambda s: s.update({name: s[name].to(torch.int16)}))
    refuses(
        "generate.py", "--checkpoint_path", path, "--device", "cpu", words=rf"layers\.0\.attention\.wo .*{kind} int16"
    )


def test_layouts_that_are_made_plain(tiny, tmp_path):
    """Transposed and expanded tensors run like the contiguous ones that they equal."""
    directory, found = shutil.copytree(tiny, tmp_path / "strided"), []
    for change in (lambda t: t, lambda t: t.t().contiguous().t() if t.ndim == 2 else t[:, None].expand(-1, 2)[:, 1]):
        edit_state(directory / "model.pth", lambda s, change=change: s.update({n: change(t) for n, t in s.items()}))
        llm = load(directory / "model.pth", device="cpu", precision="fp32", sampler=Sampler(temperature=0))
        assert all(p.is_contiguous() for p in llm.model.parameters())
        found.append(list(generate(llm, [5, 6, 7], 9)))
    assert found[0] == found[1]


@pytest.mark.parametrize("flags", [[], ["--top_p", "0.9"], ["--temperature", "0"], ["--speculate", "prompt_lookup"]])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(refuses, tiny, tmp_path, flags, value):
    spoilt = damaged(tiny, tmp_path, lambda d: edit_state(d / "model.pth", lambda s: s["output.weight"].fill_(value)))
    refuses("generate.py", *spoilt, *flags, words=r"the model's logits are NaN or infinite")


def test_a_trace_that_cannot_be_written_loses_no_answer(tiny, tmp_path, capsys, monkeypatch):
    """As PyTorch has it where the disk is full: no error, and half a file."""
    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", lambda _, path: Path(path).write_text('{"a": ['))
    args = [*run_args(tiny), "--prompt", "Hello", "--max_new_tokens", "3", "--profile", tmp_path / "trace"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, args)])
    with pytest.raises(UserError, match="cannot write the trace"):
        main()
    assert capsys.readouterr().out.startswith("Hello") and not list(tmp_path.iterdir())


def test_measures_do_without_memory(tiny, monkeypatch):
    sizes, empty = [], torch.empty

    def scarce(n, **options):
        sizes.append(4 * n)
        if 4 * n > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return empty(n, **options)

    monkeypatch.setattr(torch, "empty", scarce)
    monkeypatch.setattr(sys.modules["ops.read_bandwidth"], "allocate", lambda size: None)  # no huge pages
    for limit, expected in ((2**29, [2**30, 2**28]), (2**20, [2**30, 2**28, 2**26])):
        sizes.clear()
        found = read_bandwidth("cpu")
        assert sizes == expected and (found is None) == (limit == 2**20)


def test_measures_that_are_none(tiny, monkeypatch, capsys):
    monkeypatch.setattr("ops.read_bandwidth", lambda device: None)
    args = [*run_args(tiny), "--prompt", "Hello", "--max_new_tokens", "3", "--json"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, args)])
    main()
    out, err = capsys.readouterr()
    measures = json.loads(out.splitlines()[-1])
    assert measures["read_bandwidth"] is None and measures["bandwidth_fraction"] is None
    assert "not compared" in err and "Average tokens/sec" in err


def test_text_ends_its_line_before_what_follows_on_stderr(tiny):
    command = [sys.executable, REPO / "generate.py", *run_args(tiny), "--prompt", "Hello", "--max_new_tokens", "3"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    run = subprocess.run([*command, "--stream"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0 and "\nTime for inference 1: " in run.stdout, run.stdout


@pytest.mark.parametrize("closed", ["<&- 2>&-", ">&-", "<&- >&- 2>&-"])
def test_closed_streams(tiny, closed):
    command = [sys.executable, REPO / "generate.py", *run_args(tiny), "--prompt", "Hello", "--max_new_tokens", "3"]
    line = f'exec "$@" {closed}'
    run = subprocess.run(["sh", "-c", line, "sh", *map(str, command)], capture_output=True, text=True)
    assert run.returncode == 0 and "Traceback" not in run.stderr
    assert run.stdout.startswith("Hello") is (">&-" not in closed.replace("2>&-", ""))


def test_a_full_standard_output(tiny):
    command = [sys.executable, REPO / "generate.py", *run_args(tiny), "--prompt", "Hello", "--max_new_tokens", "3"]
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (run.returncode, run.stderr.splitlines()[-1]) == (2, "error: No space left on device")


def test_chat_without_a_template(refuses, tiny, tmp_path):
    def forget_chat(directory):
        edit_json(directory / "tokenizer_config.json", chat_template=None)
        text = (directory / "tokenizer.json").read_text().replace("<|im_start|>", "<|other|>")
        (directory / "tokenizer.json").write_text(text)

    refuses("generate.py", *damaged(tiny, tmp_path, forget_chat), "--chat", words=r"has no chat template")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, r"holds no weights to convert; accepted: \*\.safetensors"),
        ({"model.safetensors": b"junk"}, r"model\.safetensors is truncated"),
        ({"a.gguf": b"GGUF\x03\x00\x00\x00"}, r"a\.gguf is truncated or not a GGUF file"),
        ({"a.gguf": b"", "b.gguf": b""}, r"holds several models: a\.gguf, b\.gguf; keep one"),
        ({"stories1M.pt": b"\x80\x02"}, r"stories1M\.pt is truncated"),
        ({"consolidated.00.pth": b"junk"}, r"cannot read .*params\.json"),
    ],
)
def test_bad_conversions(refuses, tmp_path, files, words):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 97} | sizes))
    refuses("scripts/convert_hf_checkpoint.py", "--checkpoint_dir", tmp_path, words=words)
    assert not list(tmp_path.glob("model.pth*"))


def test_everything_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import generate, eval, quantize, ops.common as c; print(c.triton)"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert run.stdout == "None\n", run.stderr
