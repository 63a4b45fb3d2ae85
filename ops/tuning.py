"""Configurations of the linear kernels: data in tuned/, one file a GPU, read by its name: "linear", written by
scripts/tune.py, is linear_triton.py's kernel, "gemm" linear_gemm.py's.

default.json serves every GPU, by how often the tiles of a weight fill the multiprocessors. A GPU's own file has what is
better there for single shapes; another GPU's file is never used.
"""

import functools
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ops import common

FOLDER = Path(__file__).parent / "tuned"
# Values along K that 4 lanes of the linear kernel hold.
CHUNK = {"fp": 32, "int8": 64, "fp8": 64, "int4": 128, "mxfp4": 128}
LIKE = {"fp8": "int8", "mxfp4": "int4"}  # kinds that have no configurations of their own, but fp8 for one row
WAVES = 5  # default.json tells tiles that fill the multiprocessors once, twice, ... or so often and more apart


@dataclass(frozen=True)
class Configuration:
    """How the linear kernel is launched for a weight."""

    tile_rows: int  # rows of W of a tile, a multiple of 8
    k_repeat: int  # chunks along K that a warp holds at once
    num_warps: int  # of a program, all along K
    maxnreg: int  # a bound that ptxas would undercut, at the price of delaying loads until their values are needed
    ctas_per_sm: int  # programs a multiprocessor, each of several tiles; 0: as many as there are tiles
    share: bool = False  # each of those programs has as many tiles, which share the rows evenly: tile_rows at most
    # Where it follows attention of one row, that brings no later weights to the L2 cache: the programs which do would
    # keep this layer's waiting.
    no_prefetch: bool = False


@dataclass(frozen=True)
class Tile:
    """How the GEMM is launched for a weight."""

    rows: int  # of x, of a tile
    row_repeat: int  # 16 rows of W for each warp, so often
    k_repeat: int  # chunks along K
    num_warps: int
    num_stages: int  # tiles along K, of which one is in use and the others are on their way
    split: int  # programs that share a tile of the result, along K; 0: as many as the multiprocessors can run at once


Shape = tuple[int, int | None]  # (N, K), or of any K
Table = dict[tuple[str, int], dict[Shape, Configuration | Tile]]  # by kind of weight and rows of x, or columns for them


def columns(M: int) -> int:
    """The columns of a product that M rows of x take."""
    return 1 if M == 1 else 8 if M <= 8 else 16


def key(kind: str, M: int) -> tuple[str, int]:
    """Where M rows of x look for a configuration: several meet fp8 as they meet int8, and mxfp4 is read as int4."""
    return kind if kind == "fp8" and M == 1 else LIKE.get(kind, kind), columns(M)


def device_name(device: torch.device) -> str:
    return common.gpu(device).name


def processors(device: torch.device) -> int:
    return common.gpu(device).processors


def read_file(path: Path, kernel: str = "linear") -> tuple[list[str], Table]:
    """The names of the GPUs that a file is for, and its configurations; those of default.json by (waves, None)."""
    found, table = json.loads(path.read_text()), {}
    for row in found.get(kernel, []):
        own = table.setdefault((row.pop("kind"), row.pop("max_rows")), {})
        shape = (row.pop("waves"), None) if "waves" in row else (row.pop("N"), row.pop("K"))
        own[shape] = Tile(**row) if kernel in ("gemm", "grouped") else Configuration(**row)
    return found.get("devices", []), table


def tables(device: torch.device, kernel: str = "linear") -> tuple[Table, Table]:
    """This GPU's own configurations and the default ones: the same ones for "cuda" and "cuda:0"."""
    return _tables(device_name(device), kernel)


@functools.cache
def _tables(name: str, kernel: str) -> tuple[Table, Table]:
    files = {path.stem: read_file(path, kernel) for path in sorted(FOLDER.glob("*.json"))}
    _, default = files.pop("default")
    return next((table for names, table in files.values() if name in names), {}), default


def write(device: torch.device) -> Path:
    """Write this GPU's own configurations, as they are in memory, to its file, a new one if it has none."""
    name = device_name(device)
    heads = {path: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
    new = FOLDER / f"{name.removeprefix('NVIDIA ').split()[0].lower()}.json"
    path = next((path for path, head in heads.items() if name in head.get("devices", [])), new)
    head = heads.get(path, {"devices": [name]})
    rows = [
        {"kind": kind, "max_rows": rows, "N": N, "K": K, **{k: v for k, v in asdict(choice).items() if v is not False}}
        for (kind, rows), own in tables(device)[0].items()
        for (N, K), choice in own.items()
    ]
    lines = [f" {json.dumps(key)}: {_text(value)}" for key, value in (head | {"linear": rows}).items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return path


def _text(value: object) -> str:
    """JSON, a line for each object of a list."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
    return json.dumps(value)


def configuration(kind: str, N: int, K: int, M: int, device: torch.device) -> Configuration:
    """How to launch the kernel for a weight (N, K) of this kind and M rows of x."""
    own, default = (table.get(key(kind, M), {}) for table in tables(device))
    waves = min(math.ceil(math.ceil(N / 16) / processors(device)), WAVES)
    found = own.get((N, K)) or own.get((N, None)) or default[waves, None]
    W, C = found.num_warps, found.k_repeat
    # A step that covers K is best, one that is twice as long is not. One warp alone computes one row wrongly.
    while CHUNK[kind] * W * C >= 2 * K and W * C > 2:
        W, C = (W, C // 2) if C > 1 else (W // 2, C)
    return replace(found, num_warps=W, k_repeat=C)


def experts(kind: str, N: int, K: int, M: int, slots: int, down: bool, device: torch.device) -> Configuration:
    """How to launch the experts' kernel for experts (N, K) of this kind, so many of which are used: as the linear
    kernel for the weight that they make up, unless the GPU has a configuration of its own."""
    own = tables(device, "experts")[0].get(key(kind, M), {}).get((N, K))
    found = own or configuration(kind, N * (1 if down else slots), K * (slots if down else 1), M, device)
    W, C = found.num_warps, found.k_repeat
    while C > 1 and K % (C * CHUNK[kind]):  # a warp's unit lies within an expert
        C //= 2
    while not down and CHUNK[kind] * W * C >= 2 * K and W > 2:
        W //= 2
    return replace(found, tile_rows=max(16, found.tile_rows), num_warps=W, k_repeat=C)


def grouped(kind: str, N: int, rows: int, device: torch.device) -> Tile:
    """How to launch experts' GEMM for experts of this kind with N rows, and so many of x each."""
    own, default = tables(device, "grouped")
    kind = LIKE.get(kind, kind)
    sizes = sorted(most for of, most in default if of == kind)
    key = kind, next((most for most in sizes if most >= rows), sizes[-1])
    return own.get(key, {}).get((N, None)) or default[key][1, None]


@functools.cache
def tile(kind: str, N: int, K: int, M: int, device: torch.device) -> Tile:
    """How to launch the GEMM for a weight (N, K) of this kind and M rows of x."""
    own, default = tables(device, "gemm")
    kind, waves = "int4" if kind == "mxfp4" else kind, min(math.ceil(N / 128 / processors(device)), 2)
    sizes = sorted(rows for of, rows in default if of == kind)
    key = kind, next((rows for rows in sizes if rows >= M), sizes[-1])
    found = own.get(key, {}).get((N, K)) or default[key][waves, None]
    tiles = math.ceil(M / found.rows) * math.ceil(N / (16 * found.row_repeat * found.num_warps))
    programs = 1 if kind == "fp" else 12 // found.num_warps  # of a multiprocessor; plain weights fill its shared memory
    fitting = processors(device) * programs // tiles
    return replace(found, split=found.split or max(1, min(fitting, K // 1024)))
