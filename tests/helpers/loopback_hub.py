"""A Hub on loopback, in memory: repositories, branches, pull requests, large files by checksum, tokens, and failures.

It speaks as much of the Hub's protocol as huggingface_hub's client asks for when it creates, pushes and downloads.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

USER, TOKEN, READ_TOKEN, OTHER_TOKEN = "tester", "hf_right", "hf_reads_only", "hf_somebody_else"
USERS = {TOKEN: USER, READ_TOKEN: USER, OTHER_TOKEN: "somebody-else"}

Files = dict[str, bytes]


@dataclass
class Commit:
    oid: str
    message: str
    files: Files


@dataclass
class Repo:
    private: bool
    refs: dict[str, list[Commit]]

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch, a pull request, or a hash."""
        if revision in self.refs:
            return self.refs[revision][-1]
        commits = (commit for history in self.refs.values() for commit in history)
        return next((commit for commit in commits if commit.oid == revision), None)


@dataclass
class LoopbackHub:
    """Runs while its `with` block does.

    Attributes:
        repos: By id.
        large: Large files by their sha256.
        requests: "METHOD /path" of each request that was answered or broken off.
        breaks: Says of a request whether the connection is to be lost in the middle of it.
        answers: Says of a request which (status, body) it is to be answered with; None: the ordinary one.
        before_commit: Called when a commit has arrived, before it is looked at.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    large: Files = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    breaks: Callable[[str], bool] = lambda request: False
    answers: Callable[[str], tuple[int, bytes] | None] = lambda request: None
    before_commit: Callable[[], None] = lambda: None

    def __enter__(self) -> "LoopbackHub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def create(self, repo_id: str, files: Files | None = None, *, private: bool = False) -> Repo:
        """A repository with one commit, as the Hub makes it."""
        first = Commit(
            _hash(repo_id), "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})}
        )
        self.repos[repo_id] = Repo(private, {"main": [first]})
        return self.repos[repo_id]

    def files(self, repo_id: str, revision: str = "main") -> Files:
        found = self.repos[repo_id].find(revision)
        assert found is not None
        return found.files

    def write(self, repo_id: str, name: str, content: bytes, revision: str = "main") -> None:
        """What a person does in the web editor."""
        history = self.repos[repo_id].refs[revision]
        history.append(
            Commit(_hash(repo_id, revision, len(history), "web"), "edit", {**history[-1].files, name: content})
        )

    def asked(self, pattern: str) -> list[str]:
        """The requests that a pattern fits."""
        return [request for request in self.requests if re.search(pattern, request)]


def _hash(*parts: object) -> str:
    return hashlib.sha1(repr(parts).encode()).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urlparse(self.path)
        path = unquote(url.path)
        request = f"{self.command} {path}"
        if self.hub.breaks(request):
            self.rfile.read(min(64, int(self.headers.get("Content-Length") or 0)))
            self.hub.requests.append(f"{request} (lost)")
            self.close_connection = True
            return
        body = self._body()
        self.hub.requests.append(request)
        instead = self.hub.answers(request)
        if instead is not None:
            self._send(instead[0], instead[1])
            return
        for pattern, method in _ROUTES:
            if found := re.fullmatch(pattern, request):
                method(self, body, parse_qs(url.query), *found.groups())
                return
        self._error(404, "no such route")

    do_POST = do_PUT = do_HEAD = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, content: bytes | dict[str, Any] | list[Any], **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(content, bytes) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self._send(status, {"error": message}, **headers)

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _may_write(self, repo_id: str, *, or_propose: bool = False) -> bool:
        token = self._token()
        if token not in USERS:
            self._error(401, "Invalid credentials in Authorization header")
        elif not or_propose and (token == READ_TOKEN or repo_id.split("/")[0] != USERS[token]):
            self._error(403, "You don't have the rights to write here")
        else:
            return True
        return False

    def _repo(self, repo_id: str) -> Repo | None:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and USERS.get(self._token()) != repo_id.split("/")[0]):
            self._error(404, "Repository not found", "RepoNotFound")
            return None
        return repo

    def _commit_of(self, repo_id: str, revision: str) -> Commit | None:
        repo = self._repo(repo_id)
        if repo is None:
            return None
        found = repo.find(revision)
        if found is None:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def create(self, body: bytes, query: dict[str, list[str]]) -> None:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or USERS.get(self._token())}/{asked['name']}"
        if not self._may_write(repo_id):
            return
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            self._send(409, {"error": "You already created this model repo", "url": url})
            return
        self.hub.create(repo_id, private=asked.get("visibility") == "private")
        self._send(200, {"url": url, "name": repo_id})

    def info(self, body: bytes, query: dict[str, list[str]], repo_id: str, revision: str | None = None) -> None:
        commit = self._commit_of(repo_id, revision or "main")
        if commit is not None:
            self._send(
                200,
                {
                    "id": repo_id,
                    "sha": commit.oid,
                    "private": self.hub.repos[repo_id].private,
                    "tags": [],
                    "siblings": [{"rfilename": name} for name in commit.files],
                },
            )

    def tree(self, body: bytes, query: dict[str, list[str]], repo_id: str, revision: str) -> None:
        commit = self._commit_of(repo_id, revision)
        if commit is not None:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": _git_oid(content)}
                for name, content in commit.files.items()
            ]
            self._send(200, entries)

    def branch(self, body: bytes, query: dict[str, list[str]], repo_id: str, name: str) -> None:
        repo = self._repo(repo_id)
        if repo is None or not self._may_write(repo_id):
            return
        if name in repo.refs:
            self._error(409, "Reference already exists")
            return
        repo.refs[name] = list(repo.refs["main"])
        self._send(200, {})

    def validate_yaml(self, body: bytes, query: dict[str, list[str]]) -> None:
        content = json.loads(body)["content"]
        wrong = "license: [" in content
        self._send(400 if wrong else 200, {"errors": [{"message": "bad YAML"}] if wrong else [], "warnings": []})

    def preupload(self, body: bytes, query: dict[str, list[str]], repo_id: str, revision: str) -> None:
        commit = self._commit_of(repo_id, revision)
        if commit is None or not self._may_write(repo_id, or_propose="create_pr" in query):
            return

        def known(path: str) -> dict[str, Any]:
            large = _is_large(path)
            content = commit.files.get(path)
            oid = None if content is None else hashlib.sha256(content).hexdigest() if large else _git_oid(content)
            return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

        self._send(200, {"files": [known(file["path"]) for file in json.loads(body)["files"]]})

    def batch(self, body: bytes, query: dict[str, list[str]], repo_id: str) -> None:
        objects = []
        for one in json.loads(body)["objects"]:
            if one["oid"] not in self.hub.large:
                places = {"upload": f"/large/{one['oid']}", "verify": "/verify"}
                one["actions"] = {name: {"href": f"{self.hub.url}{place}"} for name, place in places.items()}
            objects.append(one)
        self._send(200, {"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, query: dict[str, list[str]], oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._error(400, "the checksum does not fit")
            return
        self.hub.large[oid] = body
        self._send(200, b"")

    def verify(self, body: bytes, query: dict[str, list[str]]) -> None:
        asked = json.loads(body)
        there = len(self.hub.large.get(asked["oid"], b"")) == asked["size"]
        self._send(200 if there else 404, {})

    def commit(self, body: bytes, query: dict[str, list[str]], repo_id: str, revision: str) -> None:
        propose = "create_pr" in query
        if not self._may_write(repo_id, or_propose=propose):
            return
        self.hub.before_commit()
        parent = self._commit_of(repo_id, revision)
        if parent is None:
            return
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, parent.oid):
            self._error(412, "A commit has happened since. Please refresh and try again.")
            return
        files = dict(parent.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repo = self.hub.repos[repo_id]
        name = f"refs/pr/{1 + sum(ref.startswith('refs/pr/') for ref in repo.refs)}" if propose else revision
        history = repo.refs.setdefault(name, list(repo.refs[revision]))
        history.append(Commit(_hash(repo_id, name, len(history)), header["summary"], files))
        url = f"{self.hub.url}/{repo_id}"
        answer = {"success": True, "commitOid": history[-1].oid, "commitUrl": f"{url}/commit/{history[-1].oid}"}
        request = {"pullRequestUrl": f"{url}/discussions/{name.rsplit('/', 1)[1]}"} if propose else {}
        self._send(200, answer | request)

    def resolve(self, body: bytes, query: dict[str, list[str]], repo_id: str, rest: str) -> None:
        pull_request = re.match(r"(refs/pr/\d+)/(.+)", rest)
        revision, path = pull_request.groups() if pull_request else rest.split("/", 1)
        commit = self._commit_of(repo_id, revision)
        if commit is None:
            return
        if path not in commit.files:
            self._send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid)
            return
        content = commit.files[path]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._send(200, content, ETag=etag, X_Repo_Commit=commit.oid)


_ID = "([^/]+/[^/]+)"
_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (rf"POST /api/models/{_ID}/branch/(.+)", _Handler.branch),
    (rf"POST /api/models/{_ID}/preupload/(.+)", _Handler.preupload),
    (rf"POST /api/models/{_ID}/commit/(.+)", _Handler.commit),
    (rf"POST /{_ID}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /large/([0-9a-f]{64})", _Handler.upload),
    (r"POST /verify", _Handler.verify),
    (rf"GET /api/models/{_ID}", _Handler.info),
    (rf"GET /api/models/{_ID}/revision/(.+)", _Handler.info),
    (rf"GET /api/models/{_ID}/tree/([^/]+).*", _Handler.tree),
    (rf"(?:GET|HEAD) /{_ID}/resolve/(.+)", _Handler.resolve),
]
