import errno
import os
import resource
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
import torch.nn.functional as F
from tiny import write_checkpoint

import quantize
from checkpoint import load_model, new_state_dict, read_config
from errors import UserError
from linear import Linear, quantizer
from model import Transformer
from process.command import run_cli
from quantize import calibration_sequences, main
from scripts.quant_table import perplexity, to_generic_basis
from texts import task_documents

REPO = Path(quantize.__file__).parent
TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs! " * 60
LAYER = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
NAMES = [*(f"layers.{i}.{name}" for i in (0, 1) for name in LAYER), "output"]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_checkpoint(folder)
    (folder / "calibration.txt").write_text(TEXT)
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def run(folder: Path, *args: str) -> None:
    main(["--checkpoint_path", str(folder / "model.pth"), "--device", "cpu", *args])


def fails(folder: Path, capsys, *args: str) -> str:
    """Run the command line; returns its error line, having checked the exit status and that no file was left."""
    before = sorted(folder.iterdir())
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: run(folder, *args))
    assert stop.value.code == 2
    assert sorted(folder.iterdir()) == before
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert error.count("\n") == 1
    return error


def logits(path: Path, tokens: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    model = load_model(path, dtype=dtype)
    cache = model.cache(1, tokens.shape[1])
    with torch.no_grad():
        return model(tokens, torch.zeros(1, dtype=torch.int32), cache, all_logits=True)


GPTQ = ("--mode", "int4-gptq", "--calibration_seq_length", "64", "--calibration_limit", "40", "--calibration_file")


@pytest.mark.parametrize(
    "mode,args,name",
    [
        ("int8", ["--mode", "int8"], "model_int8.pth"),
        ("fp8", ["--mode", "fp8"], "model_fp8.pth"),
        ("int4:32", ["--mode", "int4"], "model_int4.g32.pth"),
        ("int4:256", ["--mode", "int4", "--groupsize", "256"], "model_int4.g256.pth"),
        ("int4:64", ["--mode", "int4", "--groupsize", "64", "--label", ".mine_"], "model.mine_int4.g64.pth"),
    ],
)
def test_file_holds_every_linear_quantised_and_all_else_as_it_was(folder, monkeypatch, mode, args, name):
    monkeypatch.setattr("linear.CHUNK", 1000)  # several chunks a tensor
    run(folder, *args)
    source, found = torch.load(folder / "model.pth"), torch.load(folder / name, weights_only=True)
    expected = {n: t for n, t in source.items() if n.removesuffix(".weight") not in NAMES}
    for linear in NAMES:
        expected |= {f"{linear}.{k}": t for k, t in quantizer(mode)(source[f"{linear}.weight"]).items()}
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype is tensor.dtype and torch.equal(found[key].float(), tensor.float()), key
    assert not list(folder.glob(".*.tmp"))


def test_int8_file_has_gpt_fasts_names_dtypes_and_shapes(folder):
    run(folder, "--mode", "int8")
    found = torch.load(folder / "model_int8.pth", weights_only=True)
    for name in NAMES:
        N, _ = found[f"{name}.weight"].shape
        assert found[f"{name}.weight"].dtype is torch.int8
        assert found[f"{name}.scales"].dtype is torch.bfloat16 and found[f"{name}.scales"].shape == (N,)
    others = {n for n in found if n.rpartition(".")[0] not in NAMES}
    norms = {f"layers.{i}.{n}_norm.weight" for i in (0, 1) for n in ("attention", "ffn")}
    assert others == {"tok_embeddings.weight", "norm.weight"} | norms


@pytest.mark.parametrize("mode,worst", [("int8", 0.03), ("fp8", 0.12), ("int4", 0.35)])
def test_a_quantised_file_runs_like_its_source(folder, mode, worst):
    run(folder, "--mode", mode)
    tokens = torch.arange(40)[None] + 5
    path = next(folder.glob("model_*.pth"))
    exact, found = logits(folder / "model.pth", tokens), logits(path, tokens)
    assert 0 < (found - exact).norm() / exact.norm() < worst


def test_a_tied_output_gets_a_quantised_copy_and_the_embedding_stays(tmp_path):
    folder = tmp_path / "tied"
    write_checkpoint(folder, tie_word_embeddings=True)
    run(folder, "--mode", "int8")
    found = torch.load(folder / "model_int8.pth", weights_only=True)
    embedding = torch.load(folder / "model.pth")["tok_embeddings.weight"]
    assert torch.equal(found["tok_embeddings.weight"], embedding)
    assert torch.equal(found["output.weight"], quantizer("int8")(embedding)["weight"])
    tokens = torch.arange(30)[None] + 5
    exact = logits(folder / "model.pth", tokens)
    assert (logits(folder / "model_int8.pth", tokens) - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("options", ["", "--no-mse --offload --pad_calibration_inputs --percdamp 0.1 --blocksize 7"])
def test_gptq_beats_rounding_on_what_it_was_calibrated_for(folder, options):
    run(folder, *GPTQ, str(folder / "calibration.txt"), "--groupsize", "64", *options.split())
    run(folder, "--mode", "int4", "--groupsize", "64")
    ids = quantize.load_tokenizer(folder).encode(TEXT)[:200]
    exact, rounded, gptq = (
        F.log_softmax(logits(folder / name, torch.tensor([ids])), -1)
        for name in ("model.pth", "model_int4.g64.pth", "model_int4-gptq.g64.pth")
    )
    loss = [F.kl_div(found, exact, log_target=True, reduction="batchmean").item() for found in (rounded, gptq)]
    assert loss[1] < 0.5 * loss[0]
    layouts = [
        {n: (t.dtype, t.shape) for n, t in torch.load(folder / name).items()}
        for name in ("model_int4.g64.pth", "model_int4-gptq.g64.pth")
    ]
    assert layouts[0] == layouts[1]


def test_gptq_in_fp8_beats_rounding(folder):
    run(folder, "--mode", "fp8-gptq", *GPTQ[2:], str(folder / "calibration.txt"))
    run(folder, "--mode", "fp8")
    ids = quantize.load_tokenizer(folder).encode(TEXT)[:200]
    names = ("model.pth", "model_fp8.pth", "model_fp8-gptq.pth")
    exact, rounded, gptq = (F.log_softmax(logits(folder / name, torch.tensor([ids])), -1) for name in names)
    loss = [F.kl_div(found, exact, log_target=True, reduction="batchmean").item() for found in (rounded, gptq)]
    assert loss[1] < 0.5 * loss[0]
    kinds = [{n: (t.dtype, t.shape) for n, t in torch.load(folder / name).items()} for name in names[1:]]
    assert kinds[0] == kinds[1]


def test_layers_that_add_to_the_stream_make_good_what_it_lacks(folder, monkeypatch):
    """Aimed at what the full-precision model makes, GPTQ's model is nearer to it."""
    ids, losses = quantize.load_tokenizer(folder).encode(TEXT)[:200], []
    exact = F.log_softmax(logits(folder / "model.pth", torch.tensor([ids])), -1)
    for share in (0.0, 0.5):
        monkeypatch.setattr("gptq.SHARE", share)
        run(folder, *GPTQ, str(folder / "calibration.txt"), "--groupsize", "128", "--label", f"_{share}_")
        found = F.log_softmax(logits(folder / f"model_{share}_int4-gptq.g128.pth", torch.tensor([ids])), -1)
        losses.append(F.kl_div(found, exact, log_target=True, reduction="batchmean").item())
    assert losses[1] < 0.8 * losses[0], losses


def test_padded_layers_are_reported(folder, capsys):
    run(folder, "--mode", "int4", "--groupsize", "64")  # w2 has 96 inputs
    assert "padded 2 of 11 layers, whose inputs the group does not divide: 96 to 128" in capsys.readouterr().out
    run(folder, "--mode", "int4", "--groupsize", "32")
    assert "whose inputs" not in capsys.readouterr().out


def test_calibration_sequences_join_and_cut_documents():
    documents = ["a" * 50, "b" * 70, "c" * 33]
    encode = lambda text: [ord(c) for c in text]  # noqa: E731
    joined = calibration_sequences(documents, encode, 40, 100)
    assert "".join(map(chr, torch.cat(joined).flatten().tolist())) == ("".join(documents))[:120]
    assert sum(map(len, calibration_sequences(documents, encode, 40, 2))) == 2
    apart = calibration_sequences(documents, encode, 40, 100, pad=True)
    rows = [set(map(chr, row.tolist())) for batch in apart for row in batch]
    assert all(len(row) == 1 for row in rows)
    assert sorted(batch.shape[1] for batch in apart) == [33, 40]  # the ends of 10 and 30 are too short
    with pytest.raises(UserError, match="500 tokens; the text has 153"):
        calibration_sequences(documents, encode, 500, 100)


@pytest.mark.parametrize("pad", [False, True])
def test_every_calibration_sequence_begins_with_bos(pad):
    """As all that the model will read does, however the documents are cut; between them is none."""
    encode = lambda text: [0, *map(ord, text)]  # noqa: E731
    batches = calibration_sequences(["a" * 50, "", "b" * 70, "c" * 33], encode, 40, 100, pad=pad)
    rows = [row.tolist() for batch in batches for row in batch]
    assert all(row[0] == 0 and all(row[1:]) for row in rows)
    expected = ["a" * 39, "b" * 39, "c" * 33, "b" * 31] if pad else ["a" * 39, "a" * 11 + "b" * 28, "b" * 39]
    assert sorted("".join(map(chr, row[1:])) for row in rows) == sorted(expected)
    with pytest.raises(UserError, match="500 tokens; the text has 154"):
        calibration_sequences(["a" * 50, "", "b" * 70, "c" * 33], encode, 500, 100)


def test_calibration_reads_the_whole_sentence_of_a_task_whose_options_are_beginnings(monkeypatch):
    own = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    first = next(iter(task_documents(["winogrande"], Path(__file__).parent / "data" / "eval")))
    assert first.startswith("The cup did not fit into the box because the ") and first.endswith(" was too big.")


def test_calibration_on_a_local_lm_eval_task(folder, tmp_path, capsys, monkeypatch):
    own = partial(lm_eval.tasks.TaskManager, include_defaults=False)  # to index lm-eval's own takes half a minute
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    (tmp_path / "data.jsonl").write_text(
        "".join(f'{{"question": "{TEXT[:200]}", "reply": "yes"}}\n' for _ in range(40))
    )
    (tmp_path / "local.yaml").write_text(
        "task: local_text\ndataset_path: json\noutput_type: generate_until\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path}/data.jsonl\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{reply}}"\n'
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    assert next(iter(task_documents(["local_text"], tmp_path))) == f"{TEXT[:200].strip()} yes"
    run(folder, "--mode", "int4-gptq", "--calibration_tasks", "local_text", "--include_path", str(tmp_path))
    assert (folder / "model_int4-gptq.g32.pth").exists()
    error = fails(folder, capsys, "--mode", "int4-gptq", "--groupsize", "64", "--calibration_tasks", "no_such_task")
    assert "no_such_task" in error and "--calibration_file" in error


@pytest.mark.parametrize(
    "args,said",
    [
        (["--mode", "int4", "--groupsize", "33"], ["33", "32, 64, 128, 256"]),
        ([*GPTQ, "absent.txt"], ["absent.txt"]),
        ([*GPTQ, __file__, "--calibration_seq_length", "8"], ["--calibration_seq_length 8"]),
        ([*GPTQ, __file__, "--calibration_limit", "0"], ["--calibration_limit", "'0'"]),
        ([*GPTQ, __file__, "--percdamp", "-1"], ["--percdamp -1"]),
        ([*GPTQ, __file__, "--calibration_seq_length", "99999"], ["99999 tokens", "has"]),
        (["--device", "cuda:77"], ["cuda:77"]),
        (["--label", "absent/_"], ["cannot write", "absent/_int8.pth"]),
    ],
)
def test_bad_arguments(folder, capsys, args, said):
    error = fails(folder, capsys, *args)
    assert all(part in error for part in said), error


def test_an_unknown_mode_names_the_known_ones(folder, capsys):
    assert "int4-gptq" in fails(folder, capsys, "--mode", "int3")


@pytest.mark.parametrize("args", [["--mode", "int8"], [*GPTQ, __file__]])
def test_nan_weights(folder, capsys, args):
    state = torch.load(folder / "model.pth")
    state["layers.1.feed_forward.w2.weight"][3, 4] = float("nan")
    torch.save(state, folder / "model.pth")
    assert "layers.1.feed_forward.w2 holds NaN" in fails(folder, capsys, *args)


def test_a_quantised_source(folder, capsys):
    run(folder, "--mode", "int8")
    capsys.readouterr()
    (folder / "model_int8.pth").replace(folder / "model.pth")
    assert "quantised already" in fails(folder, capsys, "--mode", "int4")


def test_wrong_missing_and_truncated_sources(folder, capsys):
    state = torch.load(folder / "model.pth")
    path = folder / "model.pth"
    torch.save({**state, "norm.weight": torch.ones(65)}, path)
    assert "norm.weight needs shape [64] in bf16, fp16, fp32; found [65]" in fails(folder, capsys)
    torch.save({n: t for n, t in state.items() if n != "output.weight"}, path)
    assert "output needs a plain, int8, fp8, int4 or mxfp4 weight for [259, 64]; found none" in fails(folder, capsys)
    path.write_bytes(path.read_bytes()[:5000])
    assert "truncated" in fails(folder, capsys)
    path.unlink()
    assert "does not exist" in fails(folder, capsys)


def command(folder: Path, *args: str, **options) -> subprocess.Popen:
    line = [sys.executable, str(REPO / "quantize.py"), "--checkpoint_path", str(folder / "model.pth"), *args]
    return subprocess.Popen([*line, "--device", "cpu"], stderr=subprocess.PIPE, text=True, **options)


def test_a_full_disk_leaves_nothing(folder):
    before = sorted(folder.iterdir())
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # noqa: E731
    process = command(folder, "--mode", "int8", preexec_fn=limit)
    error = process.communicate()[1]
    assert process.returncode == 2 and "cannot write" in error and "Traceback" not in error, error
    assert sorted(folder.iterdir()) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory(folder, capsys):
    folder.chmod(0o500)
    assert "cannot write" in fails(folder, capsys)
    folder.chmod(0o700)


def test_a_read_only_file_system(folder, capsys, monkeypatch):
    """There, removing what is not there is an error as well."""

    def unlink(path, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", unlink)
    assert "cannot write" in fails(folder, capsys, "--label", "absent/_")


def peak_of_quantising(folder: Path) -> int:
    """Bytes that are neither the source's nor the target's pages."""
    process = command(folder, "--mode", "int4", stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.01)
    assert process.returncode == 0, process.stderr.read()
    return peak * 1024


def test_memory_does_not_grow_with_the_file(folder, tmp_path):
    """A small file's peak is what PyTorch takes at rest, in a build with CUDA 120 MB more than in one without."""
    rest = peak_of_quantising(folder)
    folder = tmp_path / "large"
    folder.mkdir()
    config = '{"model_type": "llama", "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,'
    (folder / "config.json").write_text(config + ' "intermediate_size": 1408, "vocab_size": 128256}')
    with torch.device("meta"):
        blank = Transformer(read_config(folder)).bfloat16().state_dict()
    with new_state_dict(folder / "model.pth", blank):
        pass  # zeros
    size = (folder / "model.pth").stat().st_size
    more = peak_of_quantising(folder) - rest
    assert size > 270e6 and more < 100e6, more  # one tensor is 131 MB


def test_the_generic_basis_is_the_same_function(folder, tmp_path):
    state = torch.load(folder / "model.pth")
    for name, tensor in state.items():
        if "norm" in name:
            tensor.uniform_(0.5, 2)
    torch.save(state, folder / "model.pth")
    path = to_generic_basis(folder / "model.pth", tmp_path / "generic", torch.float32)
    tokens = torch.arange(50)[None] + 3
    torch.testing.assert_close(logits(path, tokens), logits(folder / "model.pth", tokens), rtol=1e-3, atol=1e-3)
    rotated = torch.load(path)
    assert (rotated["layers.0.attention_norm.weight"] == 1).all()
    assert not torch.allclose(rotated["layers.0.attention.wo.weight"], state["layers.0.attention.wo.weight"], atol=0.1)


@pytest.mark.parametrize("first", [[], [1]])  # BOS
def test_the_tables_perplexity_is_of_windows_that_begin_as_prompts_do(folder, first):
    tokens = torch.randint(3, 90, (700,), generator=torch.Generator().manual_seed(0))
    size, nll = 512 - len(first), []
    for part in tokens[:size], tokens[size:]:
        window = torch.tensor([*first, *part])
        nll.append(F.cross_entropy(logits(folder / "model.pth", window[None])[0, :-1], window[1:], reduction="none"))
    begin = torch.tensor(first, dtype=torch.int64)
    found = perplexity(folder / "model.pth", begin, tokens, torch.device("cpu"), None)
    assert found == pytest.approx(torch.cat(nll).mean().exp().item(), rel=1e-4)


def test_gptq_knows_every_linear_of_the_model(original):
    model = load_model(original / "model.pth", device="meta")  # as quantize.py has it
    assert [n for n, m in model.named_modules() if isinstance(m, Linear)] == NAMES
