"""A Hub on loopback that keeps commits in memory: the endpoints that huggingface_hub calls for what eefast does."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Store:
    """repositories: name → branch → commits, each its hash and its files by name. asked: "METHOD path" in order."""

    def __init__(self):
        self.repositories, self.asked = {}, []

    def files(self, repo, revision):
        branches = self.repositories[repo]
        for branch, commits in branches.items():
            for sha, files in commits:
                if revision == sha:
                    return sha, files
            if revision == branch and commits:
                return commits[-1]
        return None

    def commit(self, repo, branch, lines):
        commits = self.repositories[repo].setdefault(branch, [])
        files = dict(commits[-1][1]) if commits else {".gitattributes": b""}
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                files.pop(line["value"]["path"])
        sha = hashlib.sha1(repr((len(commits), sorted(files.items()))).encode()).hexdigest()
        commits.append((sha, files))
        return sha


def handler(store):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def reply(self, status, content=b"", **headers):
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": len(content), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def missing(self, what):
            self.reply(404, {"error": what}, X_Error_Code=what)

        def do_POST(self):
            path, body = self.path.partition("?")[0], self.rfile.read(int(self.headers.get("Content-Length", 0)))
            store.asked.append(f"POST {path}")
            if path == "/api/repos/create":
                wanted = json.loads(body)
                name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
                name = name if "/" in name else f"me/{name}"
                if name not in store.repositories:
                    store.repositories[name] = {}
                    store.commit(name, "main", [])
                self.reply(200, {"url": f"http://{self.headers['Host']}/{name}", "name": name})
            elif path == "/api/validate-yaml":
                self.reply(200, {"errors": [], "warnings": []})
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|branch|commit)/(.+)", path):
                repo, what, revision = match.groups()
                if what == "preupload":
                    files = json.loads(body)["files"]
                    self.reply(200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                                               for f in files]})  # fmt: skip
                elif what == "branch":
                    commits = store.repositories[repo]
                    commits.setdefault(revision, list(commits["main"]))
                    self.reply(200, {})
                else:
                    sha = store.commit(repo, revision, [json.loads(line) for line in body.splitlines()])
                    url = f"http://{self.headers['Host']}/{repo}/commit/{sha}"
                    self.reply(200, {"success": True, "commitOid": sha, "commitUrl": url})
            else:
                self.missing("EntryNotFound")

        def do_GET(self):
            path = self.path.partition("?")[0]
            store.asked.append(f"{self.command} {path}")
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            match = api or file
            if not match or match[1] not in store.repositories:
                return self.missing("RepoNotFound")
            found = store.files(match[1], (match[3] if api else match[2]) or "main")
            if found is None:
                return self.missing("RevisionNotFound")
            sha, files = found
            if api and match[2] == "tree":
                rows = [{"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
                        for name, data in files.items()]  # fmt: skip
                return self.reply(200, rows)
            if api:
                rows = [{"rfilename": name} for name in files]
                return self.reply(200, {"id": match[1], "sha": sha, "private": False, "siblings": rows})
            if match[3] not in files:
                return self.missing("EntryNotFound")
            data = files[match[3]]
            return self.reply(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=sha)

        do_HEAD = do_GET

    return Handler


@contextmanager
def hub():
    """(address, store) of a server that stops at the end."""
    store = Store()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(store))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", store
    finally:
        server.shutdown()
        thread.join()
