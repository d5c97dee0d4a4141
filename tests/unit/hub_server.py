"""A stand-in for Hugging Face's Hub on 127.0.0.1: what its client asks to make, fill, list and read
a repository, with the headers by which the client tells errors apart.

The paths, bodies and headers are those that huggingface_hub 2.4 sends and reads (hf_api.py,
_commit_api.py, lfs.py, file_download.py, utils/_http.py).
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

OWNER, TOKEN = "ada", "hf_StandInTokenOfAda"
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


@dataclass
class Repository:
    """Commits by their hash; a commit is its files: path -> content."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        before = self.commits.get(self.branches.get(branch), {})
        sha = hashlib.sha1(f"{branch} {len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = before | files
        self.branches[branch] = sha
        return sha

    def files(self, revision: str) -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


class Hub:
    """The state of the stand-in, and what it was asked.

    Attributes:
        address: where it answers.
        repositories: by kind and name.
        lfs: large files by their sha256, as they have arrived.
        asked: method and path of each request, in their order.
        received: the bodies of all requests.
        hold: a file's name in an LFS upload, or "commit": such a request is never answered;
            `held` is set when it has come.
    """

    large = ("model.safetensors", "tokenizer.json")

    def __init__(self):
        self.address = ""
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.received: list[bytes] = []
        self.hold: str | None = None
        self.held, self.ended = threading.Event(), threading.Event()
        self.names: dict[int, str] = {}

    def make(self, name: str, kind: str = "model", private: bool = False) -> Repository:
        repository = self.repositories[kind, name] = Repository(private)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return repository

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in self.asked)


@contextmanager
def serving():
    """Yields a Hub that answers."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        hub.ended.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status=200, body=b"", **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status, code=None, message=None):
        headers = {"X_Error_Code": code, "X_Error_Message": message}
        self._answer(status, b"{}", **{key: value for key, value in headers.items() if value})

    def _handle(self):
        hub = self.hub
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        hub.asked.append(f"{self.command} {path}")
        hub.received.append(body)
        if path == "/" or path.startswith("/lfs/"):  # uploads are allowed by their address
            return self._upload(path, body)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token not in (None, TOKEN):
            return self._refuse(401, message="Invalid credentials in Authorization header")
        if self.command == "POST" and token is None:
            return self._refuse(401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._answer(body={"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/?(.*)", path):
            return self._of_repository(KINDS[found[1]], found[2], found[3], body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*found.groups())
        return self._refuse(404)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _create(self, wanted):
        name, kind = f"{wanted['organization']}/{wanted['name']}", wanted.get("type", "model")
        if wanted["organization"] != OWNER:
            return self._refuse(403, message="You don't have the rights to create a model there")
        if (kind, name) in self.hub.repositories:
            return self._refuse(409, message="You already created this model repo")
        self.hub.make(name, kind, wanted.get("visibility") == "private")
        return self._answer(body={"url": f"http://127.0.0.1/{name}"})

    def _of_repository(self, kind, name, rest, body):
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            return self._refuse(404, "RepoNotFound")
        if repository.private and "Authorization" not in self.headers:
            return self._refuse(401, "RepoNotFound")
        action, _, revision = rest.partition("/")
        if action == "auth-check":
            return self._answer() if name.startswith(f"{OWNER}/") else self._refuse(403)
        if action == "refs":
            heads = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": sha}
                for branch, sha in repository.branches.items()
            ]
            return self._answer(body={"branches": heads, "tags": [], "converts": []})
        revision, _, inside = (revision or "main").partition("/")
        if inside:
            return self._refuse(404, "EntryNotFound")
        if repository.branches.get(revision, revision) not in repository.commits:
            return self._refuse(404, "RevisionNotFound")
        files = repository.files(revision)
        if action in ("", "revision"):
            sha = repository.branches.get(revision, revision)
            siblings = [{"rfilename": path} for path in files]
            info = {"id": name, "sha": sha, "private": repository.private, "siblings": siblings}
            return self._answer(body=info)
        if action == "tree":
            return self._answer(body=[self._entry(*each) for each in files.items()])
        if action == "preupload":
            return self._answer(body={"files": self._modes(json.loads(body), files)})
        if self.hub.hold == "commit":
            return self._hold()
        sent = {}
        for line in body.splitlines():
            value = (item := json.loads(line))["value"]
            if item["key"] == "file":
                sent[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                sent[value["path"]] = self.hub.lfs[value["oid"]]
        sha = repository.commit(revision, sent)
        page = f"http://127.0.0.1/{name}/commit/{sha}"
        return self._answer(body={"commitUrl": page, "commitOid": sha})

    def _modes(self, wanted, files):
        modes = []
        for each in wanted["files"]:
            path = each["path"]
            self.hub.names[each["size"]] = path
            mode = "lfs" if path.endswith(self.hub.large) else "regular"
            there = {"oid": self._oid(path, files[path])} if path in files else {}
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | there)
        return modes

    def _batch(self, wanted):
        objects = []
        for each in wanted["objects"]:
            address = f"http://{self.headers['Host']}/lfs/{each['oid']}"
            upload = {"actions": {"upload": {"href": address}}}
            objects.append(each | ({} if each["oid"] in self.hub.lfs else upload))
        return self._answer(body={"transfer": "basic", "objects": objects})

    def _upload(self, path, body):
        if path != "/":
            if self.hub.hold is not None and self.hub.names[len(body)] == self.hub.hold:
                return self._hold()
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
            self.hub.lfs[path.removeprefix("/lfs/")] = body
        return self._answer()

    def _hold(self):
        self.hub.held.set()
        self.hub.ended.wait()

    def _oid(self, path, content):
        if path.endswith(self.hub.large):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def _entry(self, path, content):
        oid = self._oid(path, content)
        entry = {"type": "file", "path": path, "size": len(content), "oid": oid}
        if path.endswith(self.hub.large):
            entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
        return entry

    def _resolve(self, name, revision, path):
        repository = self.hub.repositories.get(("model", name))
        if repository is None:
            return self._refuse(404, "RepoNotFound")
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            return self._refuse(404, "RevisionNotFound")
        if path not in repository.commits[sha]:
            return self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        content = repository.commits[sha][path]
        return self._answer(body=content, X_Repo_Commit=sha, ETag=f'"{self._oid(path, content)}"')
