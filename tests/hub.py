"""A Hugging Face Hub on this machine: the requests that `huggingface_hub` makes of it, and a record of them."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Hub:
    """Repositories by name, each a directory.

    Attributes:
        sent: bytes of each file that were sent.
        gated: names whose licence nobody has accepted.
    """

    folders: dict[str, Path]
    url: str = ""
    sent: dict[str, int] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    commit: str = 40 * "a"


@contextlib.contextmanager
def serving(**folders: Path) -> Iterator[Hub]:
    """A hub with `somebody/NAME` for each name that is given."""
    hub = Hub({f"somebody/{name}": folder for name, folder in folders.items()})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", /, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].strip("/").removeprefix("api/models/")
            name = "/".join(path.split("/")[:2])
            if name not in hub.folders:
                return self.answer(404, X_Error_Code="RepoNotFound")
            if name in hub.gated:
                return self.answer(403, X_Error_Code="GatedRepo")
            rest, folder = path.removeprefix(name).strip("/").split("/"), hub.folders[name]
            if rest[0] in ("", "revision"):
                files = [{"rfilename": str(file.relative_to(folder))} for file in folder.rglob("*") if file.is_file()]
                return self.answer(200, json.dumps({"id": name, "sha": hub.commit, "siblings": files}).encode())
            if rest[0] == "tree":
                listed = [
                    {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": "0"}
                    for file in folder.rglob("*")
                    if file.is_file()
                ]
                return self.answer(200, json.dumps(listed).encode())
            file = folder / "/".join(rest[2:])  # resolve, revision, file
            if not file.is_file():
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=hub.commit)
            content = file.read_bytes()
            about = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": hub.commit}
            whole, status = len(content), 200
            if (asked := self.headers.get("Range")) is not None:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                content, status = content[int(first) : int(last or whole) + 1], 206
                about["Content_Range"] = f"bytes {first}-{int(first) + len(content) - 1}/{whole}"
            if self.command == "GET":
                hub.sent[file.name] = hub.sent.get(file.name, 0) + len(content)
            self.answer(status, content, **about)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
