"""A Hub on this machine: enough of its HTTP interface to create, push, load, pin, branch and open pull requests.

Datasets are repos too, named `datasets/me/name`, for reading.

    with HubServer() as hub:
        run_python(code, env=hub.environment(home))
        hub.requests  # (method, path, Range) of what was asked for

It keeps everything in memory and can fail on demand: see `cut`, `be_busy` and `refuse_commits`.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_owner"
READ = r"/api/(?:models/|(?=datasets/))((?:datasets/)?[^/]+/[^/]+)"  # what models and datasets share
LFS = (".safetensors", ".bin", ".png", ".pt", ".pth")


@dataclass
class Commit:
    """Files by path, and where the commit came from."""

    files: dict[str, bytes]
    title: str
    parent: str | None


@dataclass
class Repo:
    """Branches and pull requests, by name, and all commits."""

    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def find(self, revision: str) -> str | None:
        """The id of a commit by branch, pull request or id."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def add(self, files: dict[str, bytes], title: str, ref: str, parent: str | None) -> str:
        """Make a commit, and let `ref` point to it."""
        name = f"{len(self.commits)} {title}".encode()
        sha = hashlib.sha1(name + repr(sorted((p, oid_of(p, b)) for p, b in files.items())).encode()).hexdigest()
        self.commits[sha] = Commit(files, title, parent)
        self.refs[ref] = sha
        return sha


def oid_of(path: str, content: bytes) -> str:
    """The id that the Hub gives to a file: SHA-256 of a large one, that of git otherwise."""
    if path.endswith(LFS):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer(ThreadingHTTPServer):
    """The server; a context manager that listens on a free port of 127.0.0.1."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.unknown: list[tuple[str, str]] = []  # what no route answered
        self.cuts: dict[tuple[str, str], int] = {}
        self.busy: dict[tuple[str, str], int] = {}
        self.refused: dict[tuple[str, str], int] = {}

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, address):
        pass  # a client that hung up

    def environment(self, home, **changes: str) -> dict[str, str]:
        """Variables of a process that uses this Hub as its owner, with its cache in `home`."""
        switches = ("XET", "TELEMETRY", "PROGRESS_BARS", "UPDATE_CHECK")
        variables = {f"HF_HUB_DISABLE_{name}": "1" for name in switches} | {"DISABLE_SAFETENSORS_CONVERSION": "1"}
        variables |= {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home)}
        variables |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
        return variables | changes

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision serves."""
        found = self.repos[repo]
        return found.commits[found.refs.get(revision, revision)].files

    def titles(self, repo: str, revision: str = "main") -> list[str]:
        """Titles of the commits of a revision, newest first."""
        found, sha, titles = self.repos[repo], self.repos[repo].find(revision), []
        while sha is not None:
            titles.append(found.commits[sha].title)
            sha = found.commits[sha].parent
        return titles

    def copy(self, source: str, target: str, private: bool = False) -> None:
        """Put the files of a repo into a new one."""
        self.repos[target] = Repo(private=private)
        self.repos[target].add(dict(self.files(source)), "copy", "main", None)

    def gets(self, repo: str) -> list[tuple[str, str | None]]:
        """Files of a repo that were downloaded, and the ranges."""
        prefix = f"/{repo}/resolve/"
        found = [
            (path.removeprefix(prefix), r) for m, path, r in self.requests if m == "GET" and path.startswith(prefix)
        ]
        return [(path.partition("/")[2], r) for path, r in found]

    def cut(self, repo: str, path: str, times: int) -> None:
        """Hang up in the middle of this file, so many times."""
        self.cuts[repo, path] = times

    def be_busy(self, repo: str, path: str, times: int) -> None:
        """Answer downloads of this file with 503, so many times."""
        self.busy[repo, path] = times

    def refuse_commits(self, repo: str, title: str, times: int) -> None:
        """Answer commits of this title with an error, so many times."""
        self.refused[repo, title] = times

    def take(self, faults: dict, key) -> bool:
        """Whether to fail now; counts down."""
        with self.lock:
            faults[key] = faults.get(key, 0) - 1
            return faults[key] >= 0


class Handler(BaseHTTPRequestHandler):
    """Routes of the Hub; every method of a route takes the matched parts of the path."""

    server: HubServer
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("GET", READ, "info"),
        ("GET", READ + r"/revision/([^/]+)", "info"),
        ("GET", READ + r"/tree/([^/]+)(?:/(.+))?", "tree"),
        ("GET", r"/api/models/([^/]+/[^/]+)/refs", "list_refs"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/([0-9a-f]{64})", "upload"),
        ("GET", r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("HEAD", r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def log_message(self, *args):
        pass

    def handle_request(self) -> None:
        parts = urlsplit(self.path)
        self.query, self.body = parse_qs(parts.query), self.read_body()
        path = parts.path
        with self.server.lock:
            self.server.requests.append((self.command, unquote(path), self.headers.get("Range")))
        for method, pattern, name in self.ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                return getattr(self, name)(*(part and unquote(part) for part in match.groups()))
        self.server.unknown.append((self.command, path))
        return self.answer(404, {"error": "no such route"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            size = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(size)
            if len(body) < size:  # whoever sent it was killed
                raise ConnectionError(f"{len(body)} of {size} bytes")
            return body
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, content=None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # ------------------------------------------------------------------------------------------- access

    @property
    def owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def found(self, repo: str) -> Repo | None:
        """A repo that the caller may see; otherwise answers as the Hub does, which does not tell the two apart."""
        found = self.server.repos.get(repo)
        if found is not None and (self.owner or not found.private):
            return found
        headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
        self.answer(404 if self.owner else 401, {"error": "Repository not found"}, headers)
        return None

    def revision(self, repo: str, revision: str) -> tuple[Repo, str] | None:
        """A repo and the id of a commit, both of which exist."""
        if (found := self.found(repo)) is None:
            return None
        if (sha := found.find(revision)) is None:
            self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return found, sha

    def may_write(self) -> bool:
        if not self.owner:
            self.answer(401, {"error": "Invalid username or password."})
        return self.owner

    # ------------------------------------------------------------------------------------------- reading

    def whoami(self) -> None:
        if self.may_write():
            self.answer(200, {"type": "user", "name": "me", "orgs": []})

    def info(self, repo: str, revision: str = "main") -> None:
        if at := self.revision(repo, revision):
            files = at[0].commits[at[1]].files
            content = {"id": repo, "sha": at[1], "private": at[0].private, "tags": []}
            self.answer(200, content | {"siblings": [{"rfilename": path} for path in files]})

    def tree(self, repo: str, revision: str, folder: str | None) -> None:
        if at := self.revision(repo, revision):
            entries, prefix = [], f"{folder}/" if folder else ""
            files = {path: b for path, b in at[0].commits[at[1]].files.items() if path.startswith(prefix)}
            if not files:
                return self.answer(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
            if self.query.get("recursive", ["false"])[0].lower() != "true":
                inner = {path.removeprefix(prefix).partition("/")[0] for path in files if "/" in path[len(prefix) :]}
                entries += [{"type": "directory", "path": prefix + name, "oid": "0" * 40} for name in sorted(inner)]
                files = {path: content for path, content in files.items() if "/" not in path[len(prefix) :]}
            for path, content in files.items():
                oid = oid_of(path, content)
                lfs = {"lfs": {"oid": oid, "size": len(content), "pointerSize": 1}} if path.endswith(LFS) else {}
                entries.append({"type": "file", "path": path, "size": len(content), "oid": oid, **lfs})
            return self.answer(200, entries)
        return None

    def list_refs(self, repo: str) -> None:
        if found := self.found(repo):
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in found.refs.items()]
            self.answer(200, {"branches": refs, "tags": [], "converts": []})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if not (at := self.revision(repo, revision)):
            return
        content = at[0].commits[at[1]].files.get(path)
        if content is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": at[1]})
            return
        etag = f'"{oid_of(path, content)}"'
        headers = {"X-Repo-Commit": at[1], "ETag": etag, "Accept-Ranges": "bytes"}
        if path.endswith(LFS):
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        status, asked = 200, self.headers.get("Range")
        if asked and self.command == "GET":
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
            last = min(int(last or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            status, content = 206, content[int(first) : last + 1]
        if self.command == "GET" and self.server.take(self.server.cuts, (repo, path)):
            self.hang_up(status, content, headers)
        elif self.command == "GET" and self.server.take(self.server.busy, (repo, path)):
            self.answer(503, {"error": "Service Unavailable"})
        else:
            self.answer(status, content, headers)

    def hang_up(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        """Promise all of `content`, send half of it (of a part of a file: nothing), and close the connection."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2 if status == 200 else 0])
        self.close_connection = True

    # ------------------------------------------------------------------------------------------- writing

    def create(self) -> None:
        if not self.may_write():
            return
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        answer = {"url": f"{self.server.url}/{name}", "id": name, "name": name}
        with self.server.lock:
            if name in self.server.repos:
                return self.answer(409, answer | {"error": "You already created this model repo"})
            private = asked.get("private") or asked.get("visibility") == "private"
            repo = self.server.repos[name] = Repo(private=bool(private))
            repo.add({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit", "main", None)
        return self.answer(200, answer)

    def validate(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def branch(self, repo: str, branch: str) -> None:
        if self.may_write() and (
            at := self.revision(repo, json.loads(self.body or b"{}").get("startingPoint", "main"))
        ):
            if branch in at[0].refs:
                return self.answer(409, {"error": "Reference already exists"})
            at[0].refs[branch] = at[1]
            return self.answer(200, {})
        return None

    def preupload(self, repo: str, revision: str) -> None:
        if self.may_write() and (at := self.revision(repo, revision)):
            present, files = at[0].commits[at[1]].files, []
            for path in (file["path"] for file in json.loads(self.body)["files"]):
                mode = "lfs" if path.endswith(LFS) else "regular"
                oid = oid_of(path, present[path]) if path in present else None
                files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.answer(200, {"files": files, "commitOid": at[1]})

    def batch(self, repo: str) -> None:
        if self.may_write() and self.found(repo):
            objects = []
            for entry in json.loads(self.body)["objects"]:
                action = {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}"}}
                new = {} if entry["oid"] in self.server.blobs else {"actions": action}
                objects.append({"oid": entry["oid"], "size": entry["size"], "authenticated": True, **new})
            headers = {"Content-Type": "application/vnd.git-lfs+json"}
            self.answer(200, {"transfer": "basic", "objects": objects}, headers)

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer(400, {"error": "the content is another one"})
        with self.server.lock:
            self.server.blobs[oid] = self.body
        return self.answer(200, {})

    def commit(self, repo: str, revision: str) -> None:
        if not self.may_write() or not (at := self.revision(repo, revision)):
            return None
        found, parent = at
        files, title = dict(found.commits[parent].files), ""
        for line in map(json.loads, self.body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        if self.server.take(self.server.refused, (repo, title)):
            return self.answer(500, {"error": "Internal error, we are working on it"})
        with self.server.lock:
            pulls = sum(ref.startswith("refs/pr/") for ref in found.refs) + 1
            ref = f"refs/pr/{pulls}" if "create_pr" in self.query else revision
            sha = found.add(files, title, ref, parent)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"}
        if "create_pr" in self.query:
            answer["pullRequestUrl"] = f"{self.server.url}/{repo}/discussions/{pulls}"
        return self.answer(200, answer)
