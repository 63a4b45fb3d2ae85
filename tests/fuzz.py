"""Mutates files of every kind that the commands read, and looks for what a user must never see.

Each file goes through the real converter, loader or tokenizer in a process of its own, which may answer, or refuse with
one line of at most 400 characters. Anything else (a traceback, 10 s, 4 GB, a signal) is a fault, whose files are kept.

    python tests/fuzz.py --seconds 600 --keep /tmp/faults
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from fuzz_seeds import write_seeds

from checkpoint import load_model
from formats.convert import convert
from process.command import LONGEST, run_cli
from tokenizer import load_tokenizer

HUGE = [1e18, 1e30, 2**31, 2**63, 10**400]
VALUES = [None, True, False, 0, 1, 2, 3, -1, 0.5, 1e7, float("nan"), float("inf"), *HUGE, "", "x", "1", "a" * 5000]
VALUES += [[], [1], ["x"] * 3, {}, {"a": 1}, [[[[[[1]]]]]], "../../x", "/etc/passwd"]
DTYPES = [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.float64, torch.uint8, torch.int64]


def odd_tensor(like: torch.Tensor, rng: random.Random) -> object:
    """What may lie in a file of torch.save in place of a weight."""
    t = torch.randn(like.shape)
    odd = [t * float("nan"), t * 1e30, torch.empty(0), t[None], t[:1].expand_as(t), t.to_sparse(), torch.tensor(1.0)]
    odd += [torch.empty_like(t, device="meta"), torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)]
    return rng.choice([t.to(rng.choice(DTYPES)), rng.choice(odd), rng.choice(VALUES)])


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(max(1, min(len(out), rng.choice([64, 1024, len(out)]))))
        kind = rng.randrange(5)
        if kind == 0:
            out[at : at + 1] = rng.randbytes(1)
        elif kind == 1:
            out[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
        elif kind == 2:
            del out[at : at + rng.choice([1, 8, 1000])]
        elif kind == 3:
            out[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
        else:
            out = out[: rng.choice([at, len(out)])]
    return bytes(out)


def mutate_json(value: object, rng: random.Random) -> object:
    """Put another value somewhere in it, or leave one out."""
    outer = value
    while outer:
        key = rng.choice(list(outer) if isinstance(outer, dict) else range(len(outer)))
        if isinstance(outer[key], (dict, list)) and outer[key] and rng.random() < 0.7:
            outer = outer[key]
            continue
        outer[key] = rng.choice(VALUES)
        if rng.random() < 0.2:
            del outer[key]
        break
    return value


def mutate(path: Path, rng: random.Random) -> None:
    """By what the file means, or by its bytes."""
    data, deep = path.read_bytes(), rng.random() < 0.7
    if path.suffix == ".json" and deep:
        path.write_text(json.dumps(mutate_json(mutate_json(json.loads(data), rng), rng)))
    elif path.suffix == ".safetensors" and deep:
        size = struct.unpack("<Q", data[:8])[0]
        header = json.dumps(mutate_json(json.loads(data[8 : 8 + size]), rng)).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])
    elif path.suffix in (".pth", ".bin", ".pt") and deep:
        state = torch.load(path, weights_only=True)
        weights = state.get("model", state)
        name = rng.choice(list(weights))
        weights[rng.choice([name, name, name, 7, "x.weight", None])] = odd_tensor(weights[name], rng)
        if "model_args" in state:
            mutate_json(rng.choice([state, state["model_args"]]), rng)
        torch.save(state, path)
    else:
        path.write_bytes(mutate_bytes(data, rng))


@torch.inference_mode()
def use(folder: Path, kind: str) -> None:
    """What the commands do with a file of this kind."""
    if "token" in kind or "generation" in kind:
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(tokenizer.encode("Hello <|im_end|> wörld\n"))
        if tokenizer.chat_template:
            tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
        return
    path = folder / kind if kind.startswith("model") and kind.endswith(".pth") else convert(folder, torch.float32)
    model = load_model(path, dtype=torch.float32)
    model(torch.tensor([[1, 2, 3]]), torch.tensor([0]), model.cache(1, 8))


def child(folder: Path, kind: str) -> None:
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    resource.setrlimit(resource.RLIMIT_DATA, (2**32, 2**32))
    signal.alarm(10)
    status = 0
    try:
        run_cli(lambda: use(folder, kind))
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        status = 3
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def attempt(folder: Path, kind: str) -> str:
    """ok, refused, or what is wrong."""
    if not (pid := os.fork()):
        child(folder, kind)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    lines = (folder / "stderr").read_text(errors="replace").splitlines()
    error = [line for line in lines if "%|" not in line]  # tqdm's
    if status == 0:
        return "ok"
    if status == 2 and len(error) == 1 and error[0].startswith("error: ") and len(error[0]) <= LONGEST:
        return "refused"
    return f"FAULT status {status}, {len(error)} lines, the last {error[-1][:150] if error else ''!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=[], metavar="NAME", help="file names; by default all")
    parser.add_argument("--keep", type=Path, default=Path("faults"), help="directory for what led to faults")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as root:
        files = [file for file in write_seeds(Path(root)) if not args.kinds or file.name in args.kinds]
        end, seed = time.monotonic() + args.seconds, args.seed - len(files)  # before the first, each as it is
        while time.monotonic() < end:
            source, folder = files[seed % len(files)], Path(root, "mutated")
            shutil.copytree(source.parent, folder)
            if seed >= args.seed:
                # PyTorch refuses to save some tensors: the file is tried as that leaves it.
                with contextlib.suppress(RuntimeError, NotImplementedError, ValueError):
                    mutate(folder / source.name, random.Random(seed))
            if (outcome := attempt(folder, source.name)) == "refused" and seed < args.seed:
                outcome = "FAULT refused as it is"
            counts[str(source.relative_to(root)), outcome.split()[0]] += 1
            if outcome.startswith("FAULT"):
                print(f"seed {seed}, {source.relative_to(root)}: {outcome}", flush=True)
                shutil.copytree(folder, args.keep / str(seed), dirs_exist_ok=True)
            shutil.rmtree(folder)
            seed += 1
    for kind in dict.fromkeys(kind for kind, _ in counts):
        print(f"{kind:40}", *(f"{what} {counts[kind, what]}" for what in ("ok", "refused", "FAULT")), sep="  ")
    sys.exit(any(what == "FAULT" for _, what in counts))


if __name__ == "__main__":
    main()
