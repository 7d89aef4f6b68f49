"""A model hub in memory, on the loopback interface, for the real huggingface_hub client: what a push and a load need of it.

Tokens are `hf_write` and `hf_read` (user `tester`); anything else is refused. Clients need HF_ENDPOINT=hub.url and HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = ".safetensors"  # what goes through LFS


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, str]  # path -> key into the hub's blobs


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, str]) -> Commit:
        seed = repr((message, sorted(files.items()), sum(map(len, self.branches.values()))))
        made = Commit(hashlib.sha1(seed.encode()).hexdigest(), message, files)
        self.branches.setdefault(branch, []).append(made)
        return made

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


class FakeHub:
    """`with FakeHub() as hub:` serves at `hub.url`; `hub.log` holds (method, path, status) of every finished request."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[tuple[str, str, int]] = []
        self.breaks: dict[str, int] = {}  # "blob" or "commit" -> how many of these requests to break off in the middle
        self.on_break: Callable[[], None] = lambda: None
        self.lock = threading.Lock()

    def __enter__(self) -> "FakeHub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo_id: str, folder: Path, **options: bool) -> Repo:
        """A repository with the files of a folder."""
        repo = self.repos[repo_id] = Repo(**options)
        repo.commit("main", "added", {path.name: self.keep(path.read_bytes()) for path in folder.iterdir() if path.is_file()})
        return repo

    def keep(self, data: bytes) -> str:
        key = hashlib.sha256(data).hexdigest()
        self.blobs[key] = data
        return key

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        commit = self.repos[repo_id].at(revision)
        return {path: self.blobs[key] for path, key in commit.files.items() if path != ".gitattributes"}

    def sent(self) -> list[str]:
        """The blobs that arrived through LFS since `log` was emptied, in order."""
        return [path.rpartition("/")[2] for method, path, status in self.log if method == "PUT" and status == 200]

    def breaks_now(self, kind: str) -> bool:
        with self.lock:
            left = self.breaks.get(kind, 0)
            self.breaks[kind] = max(0, left - 1)
        return left > 0


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", "tree"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "branch"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/blobs/(?P<key>[0-9a-f]{64})", "put_blob"),
        ("GET|HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, *args: object) -> None:
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        for methods, pattern, name in self.ROUTES:
            found = re.fullmatch(pattern, url.path)
            if found and self.command in methods.split("|"):
                try:
                    getattr(self, name)(**{key: unquote(value) for key, value in found.groupdict().items()})
                except Refused as error:
                    self.reply({"error": error.message}, error.status, {"X-Error-Code": error.code, "X-Error-Message": error.message})
                except ConnectionAbortedError:
                    self.close_connection = True
                    self.connection.close()
                return
        self.reply({"error": f"unknown: {self.command} {url.path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def body(self, breaks: str = "") -> bytes:
        if breaks and self.hub.breaks_now(breaks):
            self.rfile.read(16)
            self.hub.on_break()
            raise ConnectionAbortedError
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, value: object = None, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.hub.log.append((self.command, urlsplit(self.path).path, status))

    def user(self, writes: bool = False) -> bool:
        """Whether there is a valid token. Refuses an invalid one, and for a write one that may only read, or none."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", "hf_read", "hf_write"):
            raise Refused(401, message="Invalid credentials in Authorization header")
        if writes and token != "hf_write":
            raise Refused(403 if token else 401, message="You don't have the rights to create a model under this namespace" if token else "")
        return bool(token)

    def repo(self, repo: str, writes: bool = False) -> Repo:
        known = self.user(writes)
        found = self.hub.repos.get(repo)
        if found is None or (found.private and not known):
            raise Refused(404 if known else 401, "RepoNotFound", "Repository not found")
        return found

    def at(self, repo: Repo, revision: str) -> Commit:
        found = repo.at(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    # --- routes

    def create(self) -> None:
        asked = json.loads(self.body())
        self.user(writes=True)
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        if not name.startswith("tester/"):
            raise Refused(403, message=f"You don't have the rights to create a model under the namespace {name.split('/')[0]!r}")
        there = name in self.hub.repos
        if not there:
            repo = self.hub.repos[name] = Repo(private=asked.get("private", False) or asked.get("visibility") == "private")
            repo.commit("main", "initial commit", {".gitattributes": self.hub.keep(b"")})
        self.reply({"url": f"{self.hub.url}/{name}", "name": name}, 409 if there else 200)

    def validate(self) -> None:
        asked = json.loads(self.body())
        self.reply({"errors": [], "warnings": []} if asked["content"].startswith("---\n") else {"errors": [{"message": "no metadata"}]})

    def info(self, repo: str, revision: str = "main") -> None:
        found = self.repo(repo)
        commit = self.at(found, revision)
        self.reply({
            "id": repo, "modelId": repo, "sha": commit.oid, "private": found.private, "gated": "manual" if found.gated else False, "tags": [],
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        })  # fmt: skip

    def tree(self, repo: str, revision: str) -> None:
        commit = self.at(self.repo(repo), revision)
        self.reply([self.entry(path, key) for path, key in sorted(commit.files.items())])

    def entry(self, path: str, key: str) -> dict:
        data = self.hub.blobs[key]
        large = {"lfs": {"oid": key, "size": len(data), "pointerSize": 134}} if path.endswith(LARGE) else {}
        return {"type": "file", "path": path, "oid": git_oid(data), "size": len(data)} | large

    def branch(self, repo: str, revision: str) -> None:
        self.body()
        found = self.repo(repo, writes=True)
        there = revision in found.branches
        if not there:
            found.branches[revision] = list(found.branches["main"])
        self.reply({}, 409 if there else 200)

    def preupload(self, repo: str, revision: str) -> None:
        asked = json.loads(self.body())["files"]
        now = self.at(self.repo(repo, writes=True), revision).files
        oids = {path: key if path.endswith(LARGE) else git_oid(self.hub.blobs[key]) for path, key in now.items()}
        self.reply({
            "files": [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular", "shouldIgnore": False, "oid": oids.get(f["path"])} for f in asked]
        })  # fmt: skip

    def lfs_batch(self, repo: str) -> None:
        asked = json.loads(self.body())["objects"]
        self.repo(repo, writes=True)
        self.reply({"transfer": "basic", "objects": [
            {"oid": each["oid"], "size": each["size"]}
            | ({} if each["oid"] in self.hub.blobs else {"actions": {"upload": {"href": f"{self.hub.url}/blobs/{each['oid']}"}}})
            for each in asked
        ]})  # fmt: skip

    def put_blob(self, key: str) -> None:
        data = self.body(breaks="blob")
        if self.hub.keep(data) != key:
            raise Refused(422, message="wrong hash")
        self.reply({})

    def commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body(breaks="commit").splitlines()]
        found = self.repo(repo, writes=True)
        new, message = dict(self.at(found, revision).files), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                new[value["path"]] = self.hub.keep(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refused(400, message=f"{value['path']} has not arrived")
                new[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile":
                del new[value["path"]]
        pull = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in found.branches)}" if "create_pr" in self.query else None
        made = found.commit(pull or revision, message, new)
        more = {"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{pull.rpartition('/')[2]}"} if pull else {}
        self.reply({"success": True, "commitUrl": f"{self.hub.url}/{repo}/commit/{made.oid}", "commitOid": made.oid} | more)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self.repo(repo)
        if found.gated:
            raise Refused(403, "GatedRepo", f"Access to model {repo} is restricted and you are not in the authorized list.")
        commit = self.at(found, revision)
        if path not in commit.files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        key = commit.files[path]
        data = self.hub.blobs[key]
        self.reply(data, 200, {"ETag": f'"{key}"', "X-Repo-Commit": commit.oid, "Content-Length": str(len(data))})
