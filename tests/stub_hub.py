"""A Hugging Face hub on the loopback interface: as much of it as downloading a model needs, and its failures."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Request(NamedTuple):
    method: str
    path: str
    range: str | None
    token: str | None


class StubHub:
    """One repository, served at `url` for the length of a `with` block.

    `files` maps paths in the repository to contents. `cut` is the set of files of which the connection is closed
    half-way, once each; `stall` that of files which are sent by half and then wait for `released` to be set.
    `token` is the one that is let in (None: anybody), `gated` refuses the files, not the listing, to everybody else.
    `sizes` are claimed in the listing instead of the true ones, in bytes; without `heads`, a HEAD request tells none.
    Without `blobs`, the listing does not name contents. When the file `release_at` is asked for, `released` is set.
    """

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(
        self,
        repo_id: str,
        files: dict[str, bytes],
        *,
        token: str | None = None,
        gated: bool = False,
        cut: set[str] | None = None,
        stall: set[str] | None = None,
        sizes: dict[str, int] | None = None,
        heads: bool = True,
        blobs: bool = True,
    ) -> None:
        self.repo_id, self.files, self.token, self.gated = repo_id, files, token, gated
        self.cut, self.stall, self.sizes = set(cut or ()), set(stall or ()), sizes or {}
        self.heads, self.blobs, self.release_at = heads, blobs, ""
        self.released = threading.Event()
        self.requests: list[Request] = []

    def __enter__(self) -> "StubHub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def fetched(self) -> list[str]:
        """Names of the files that were asked for, in order."""
        return [r.path.split("/resolve/")[1].split("/", 1)[1] for r in self.gets()]

    def gets(self, name: str = "") -> list[Request]:
        """Requests for the contents of files whose path ends so."""
        return [r for r in self.requests if r.method == "GET" and "/resolve/" in r.path and r.path.endswith(name)]


class Handler(BaseHTTPRequestHandler):
    hub: StubHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Requests are kept in `hub.requests`, not printed."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.split("?")[0]
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        hub.requests.append(Request(self.command, path, self.headers.get("Range"), token))
        listing = re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path)
        content = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        repo_id, revision = (listing or content).group(1, 2)
        refused = hub.token is not None and token != hub.token
        if repo_id != hub.repo_id:  # the real hub hides from strangers whether a repository exists
            self.refuse(404 if token else 401, "RepoNotFound")
        elif revision not in (None, "main", hub.commit):
            self.refuse(404, "RevisionNotFound")
        elif refused and not hub.gated:
            self.refuse(401, "RepoNotFound")
        elif listing:
            self.send(json.dumps(self.model_info()).encode(), 0, {"Content-Type": "application/json"})
        elif refused:
            self.refuse(403 if token else 401, "GatedRepo")
        elif content[3] not in hub.files:
            self.refuse(404, "EntryNotFound")
        else:
            self.send_file(content[3])

    def model_info(self) -> dict:
        siblings = [
            {"rfilename": name, "size": self.hub.sizes.get(name, len(data))}
            | ({"blobId": hashlib.sha1(data).hexdigest()} if self.hub.blobs else {})
            for name, data in self.hub.files.items()
        ]
        return {"id": self.hub.repo_id, "modelId": self.hub.repo_id, "sha": self.hub.commit, "siblings": siblings}

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "no")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_file(self, name: str) -> None:
        data = self.hub.files[name]
        if self.command == "GET" and name == self.hub.release_at:
            self.hub.released.set()
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": self.hub.commit,
            "Accept-Ranges": "bytes",
        }
        if self.command == "GET" and name in self.hub.cut:
            self.hub.cut.remove(name)
            self.send(data, 0, headers, half=True)
        elif self.command == "GET" and name in self.hub.stall:
            self.hub.stall.remove(name)
            self.send(data, 0, headers, half=True, wait=True)
        else:
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
            self.send(data, start, headers)

    def send(self, data: bytes, start: int, headers: dict[str, str], half: bool = False, wait: bool = False) -> None:
        """Send data[start:], or only the first half of the file and then close the connection."""
        self.send_response(206 if start else 200)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        for key, value in headers.items():
            self.send_header(key, value)
        if self.command == "GET" or self.hub.heads:
            self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data[: len(data) // 2] if half else data[start:])
        self.wfile.flush()
        if wait:
            self.hub.released.wait(timeout=60)
        if wait and self.hub.release_at:
            self.wfile.write(data[len(data) // 2 :])
        elif half:
            self.close_connection = True
