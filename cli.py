"""What the commands share: arguments that say which model runs where and how, devices, and peak memory."""

import argparse
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

import ops
from checkpoint import DTYPES
from errors import UserError, shown

DEFAULT_CHECKPOINT = Path("checkpoints/SmolLM2-135M-Instruct/model.pth")
DEVICES = "cpu, cuda, cuda:N, mps"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--checkpoint_path, --precision, --quantize, --kv_cache, --device and --threads."""
    parser.add_argument("--checkpoint_path", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16", help="of activations and plain weights")
    parser.add_argument("--quantize", metavar="KIND", help="quantise on load: int8, fp8, int4 or int4:GROUP")
    parser.add_argument("--kv_cache", choices=sorted(ops.CACHE_KINDS), help="keys and values in 8 bits")
    parser.add_argument("--device", help=f"{DEVICES}; by default a GPU where there is one")
    parser.add_argument("--threads", type=positive, help="of a CPU; by default OMP_NUM_THREADS or its physical cores")


def positive(text: str) -> int:
    """The type of an argument from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def natural(text: str) -> int:
    """The type of an argument from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a natural number")
    return int(text)


def check_flags(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    clashes: Mapping[str, Collection[str]],
    needs: Mapping[str, Collection[str]],
) -> None:
    """Refuse flags that would do nothing: those that clash with another one, and those that need one of others."""
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    for name in sorted(given):
        if clash := sorted(given.intersection(clashes.get(name, ()))):
            raise UserError(f"--{clash[0]} does nothing beside --{name}; give one of them")
        if name in needs and not given.intersection(needs[name]):
            raise UserError(f"--{name} needs --{' or --'.join(needs[name])}")


def pick_device(name: str | None) -> torch.device:
    """The device asked for, by default a GPU where there is one, and under torchrun the GPU that is this rank's.
    Raises UserError when it is not there.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"device {name!r} is not known; accepted: {DEVICES}") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name!r} is not supported; accepted: {DEVICES}")
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise UserError(f"device '{device}' was asked for, but this machine has {count} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps' was asked for, but this machine has none")
    return device


def use(args: argparse.Namespace) -> tuple[torch.device, str]:
    """The device that --device and --threads ask for, and in words."""
    device = pick_device(args.device)
    if device.type != "cpu":
        return device, str(device)
    if (args.threads or 1) > (most := os.cpu_count() or 1):
        raise UserError(f"--threads is {shown(args.threads)}; this machine runs {most}")
    if args.threads or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(args.threads or ops.physical_cores())
    threads = torch.get_num_threads()
    return device, f"cpu with {threads} thread{'s' if threads > 1 else ''}"


def peak_memory() -> int:
    """The most bytes of main memory that this process has held at once."""
    import resource  # Unix only; a GPU machine of another kind does not need it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
