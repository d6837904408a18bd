"""A Hub on the loopback interface: what huggingface_hub, transformers and PEFT ask of the real one, in memory.

Git is reduced to branches of commits, a commit to a mapping from paths to bytes. Tokens are "write-NAME" (may write to
NAME's repositories) and "read-NAME". Repositories whose name holds one of FAULTS serve large files damaged, those with
"no-storage" in it take none.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


FAULTS = {
    "cut-in-flight": lambda data: data[: len(data) // 2],  # shorter than announced
    "bit-flipped": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
}


@dataclass
class Commit:
    message: str
    files: dict[str, bytes]
    touched: list[str]

    @property
    def sha(self) -> str:
        names = b"".join(p.encode() + hashlib.sha1(d).digest() for p, d in sorted(self.files.items()))
        return hashlib.sha1(self.message.encode() + names).hexdigest()


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit("initial", {}, [])]})

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.sha == revision), None)


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class Hub:
    """Use as a context manager; `url` is what HF_ENDPOINT must be, `repos` and `log` are for assertions."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[str] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    # -- who may do what -----------------------------------------------------------------------------------------------

    def readable(self, repo_id: str, user: str | None) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and user != repo_id.split("/")[0]):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, repo_id: str, user: str | None, role: str) -> Repo:
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        repo = self.readable(repo_id, user)
        if role != "write" or user != repo_id.split("/")[0]:
            raise Refusal(403, "this token has no write role for the repository")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # -- endpoints: (user, role, body, parts of the path) -> JSON ------------------------------------------------------

    def create(self, user, role, body):
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        repo_id = f"{body.get('organization') or user}/{body['name']}"
        answer = {"url": f"{self.url}/{repo_id}"}
        if role != "write" or repo_id.split("/")[0] != user:
            raise Refusal(403, "this token may not create repositories there")
        if repo_id in self.repos:
            raise Refusal(409, json.dumps(answer))
        self.repos[repo_id] = Repo(body.get("visibility") == "private" or bool(body.get("private")))
        return answer

    def validate(self, user, role, body):
        return {"errors": [], "warnings": []}

    def info(self, user, role, body, repo_id, revision="main"):
        commit = self.commit_of(self.readable(repo_id, user), revision)
        return {"id": repo_id, "sha": commit.sha, "siblings": [{"rfilename": p} for p in commit.files], "tags": []}

    def tree(self, user, role, body, repo_id, revision):
        files = self.commit_of(self.readable(repo_id, user), revision).files
        return [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in files.items()
        ]

    def branch(self, user, role, body, repo_id, name):
        repo = self.writable(repo_id, user, role)
        if name in repo.branches:
            raise Refusal(409, "Reference already exists")
        repo.branches[name] = list(repo.branches["main"])
        return {}

    def preupload(self, user, role, body, repo_id, revision):
        self.commit_of(self.readable(repo_id, user), revision)
        large = (".safetensors", ".bin", ".pt", ".pth")
        return {
            "files": [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(large) else "regular",
                    "shouldIgnore": False,
                }
                for f in body["files"]
            ]
        }

    def batch(self, user, role, body, repo_id):
        self.readable(repo_id, user)  # a pull request may come from anybody
        found = []
        for wanted in body["objects"]:
            place = "0" * 64 if "no-storage" in repo_id else wanted["oid"]
            actions = {
                "upload": {"href": f"{self.url}/blobs/{place}"},
                "verify": {"href": f"{self.url}/verify"},
            }
            known = wanted["oid"] in self.blobs
            found.append({"oid": wanted["oid"], "size": wanted["size"], **({} if known else {"actions": actions})})
        return {"transfer": "basic", "objects": found}

    def verify(self, user, role, body):
        if len(self.blobs.get(body["oid"], b"")) != body["size"]:
            raise Refusal(404, "the uploaded object is missing or of another size")
        return {}

    def commit(self, user, role, body, repo_id, revision, query=""):
        pull = "create_pr=1" in query
        if pull:
            if user is None:
                raise Refusal(401, "Invalid username or password.")
            repo = self.readable(repo_id, user)
            name = f"refs/pr/{1 + sum(b.startswith('refs/pr') for b in repo.branches)}"
            repo.branches[name] = list(repo.branches[revision])
        else:
            repo, name = self.writable(repo_id, user, role), revision
        header, changes, files = body[0]["value"], body[1:], dict(self.commit_of(repo, name).files)
        for change in changes:
            value = change["value"]
            if change["key"] == "deletedFile":
                del files[value["path"]]
            elif change["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            else:
                assert change["key"] == "file", change["key"]
                files[value["path"]] = base64.b64decode(value["content"])
        new = Commit(header["summary"], files, sorted(c["value"]["path"] for c in changes))
        repo.branches[name].append(new)
        url = f"{self.url}/{repo_id}/discussions/{name.rsplit('/', 1)[-1]}" if pull else None
        return {"commitUrl": f"{self.url}/{repo_id}/commit/{new.sha}", "commitOid": new.sha, "pullRequestUrl": url}


REPO = "([^/]+/[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("GET", f"/api/models/{REPO}", "info"),
    ("GET", f"/api/models/{REPO}/revision/([^/]+)", "info"),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)", "tree"),
    ("POST", f"/api/models/{REPO}/branch/([^/]+)", "branch"),
    ("POST", f"/api/models/{REPO}/preupload/([^/]+)", "preupload"),
    ("POST", f"/{REPO}.git/info/lfs/objects/batch", "batch"),
    ("POST", "/verify", "verify"),
    ("POST", f"/api/models/{REPO}/commit/([^/]+)", "commit"),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def handle_any(self):
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        with self.hub.lock:
            self.hub.log.append(f"{self.command} {unquote(url.path)}")
            try:
                self.route(url.path, url.query, data)
            except Refusal as refusal:
                text = str(refusal)
                body = text if text.startswith("{") else json.dumps({"error": text})
                self.send(refusal.status, body.encode(), {"X-Error-Code": refusal.code, "X-Error-Message": text})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def who(self) -> tuple[str | None, str]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if not token:
            return None, ""
        role, _, user = token.partition("-")
        if role not in ("read", "write") or not user:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user, role

    def route(self, path: str, query: str, data: bytes):
        if match := re.fullmatch(f"/{REPO}/resolve/([^/]+)/(.+)", path):
            return self.resolve(match[1], unquote(match[2]), unquote(match[3]))
        if match := re.fullmatch("/blobs/([0-9a-f]{64})", path):  # as a signed link: needs no token
            if hashlib.sha256(data).hexdigest() != match[1]:
                raise Refusal(400, "the upload has another hash than announced")
            self.hub.blobs[match[1]] = data
            return self.send(200)
        for method, pattern, name in ROUTES:
            if self.command == method and (match := re.fullmatch(pattern, path)):
                body: Any = [json.loads(line) for line in data.splitlines()]
                body = body if name == "commit" else (body[0] if body else {})
                more = {"query": query} if name == "commit" else {}
                answer = getattr(self.hub, name)(*self.who(), body, *map(unquote, match.groups()), **more)
                return self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        raise Refusal(501, f"this Hub has no {self.command} {path}")

    def resolve(self, repo_id: str, revision: str, path: str):
        user, _ = self.who()
        commit = self.hub.commit_of(self.hub.readable(repo_id, user), revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            return self.send(
                404, b"", headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            )
        data = commit.files[path]
        headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        if self.command == "GET" and path.endswith(".safetensors"):
            for name, damage in FAULTS.items():
                data = damage(data) if name in repo_id else data
        self.send(200, data, headers)

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format, *args):
        pass
