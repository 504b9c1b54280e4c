"""A hub on the loopback interface: serves one folder in the HTTP interfaces of both Hugging Face and ModelScope,
and breaks on demand, so that the real clients can be driven without a network."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"  # a commit hash: 40 hex digits


class Hub:
    """`with Hub({"org/name": folder}) as hub: ...` -> `hub.url`, and `hub.log` of (method, file or path, Range).

    cut      {file: [bytes, bytes, ...]}  close the connection after so many bytes, once per entry
    status   {file or repository: code}   answer with this code instead; 403 as a gated model, 404 as an absent one
    corrupt  {file}                       right length, wrong bytes
    hidden   {file}                       not listed and not served
    """

    def __init__(self, repositories: dict[str, Path]):
        self.repositories = {name: Path(folder) for name, folder in repositories.items()}
        self.cut, self.status, self.corrupt, self.hidden, self.log = {}, {}, set(), set(), []

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def fetched(self, file: str) -> list[str | None]:
        """The Range header of every GET of `file`, in order."""
        return [span for method, name, span in self.log if method == "GET" and name == file]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urlsplit(self.path)
        parts, query = [unquote(part) for part in url.path.strip("/").split("/")], parse_qs(url.query)
        if parts[0] == "datasets":  # Hugging Face: a dataset's files lie where a model's do, one folder down
            parts = parts[1:]
        if parts[:2] in (["api", "models"], ["api", "datasets"]):  # Hugging Face: the model, its tree
            under = "/".join(parts[6:]) if "tree" in parts else ""
            return self.listing(
                "/".join(parts[2:4]),
                "tree" if "tree" in parts else "info",
                under,
                query.get("recursive", [""])[0].lower() == "true",
            )
        if parts[:3] == ["api", "v1", "models"]:  # ModelScope: the listing, one file
            repository = "/".join(parts[3:5])
            if parts[5:] == ["repo", "files"]:
                return self.listing(repository, "modelscope")
            if parts[5:] == ["repo"]:
                return self.file(repository, query["FilePath"][0])
        if len(parts) > 4 and parts[2] == "resolve":  # Hugging Face: one file
            return self.file("/".join(parts[:2]), "/".join(parts[4:]))
        self.hub.log.append((self.command, url.path, None))
        self.answer(404, {"error": "no such page"})

    def answer(self, code: int, value, **headers):
        body = json.dumps(value).encode()
        self.send_response(code)
        for key, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code: int):
        reason = {401: "Invalid credentials in Authorization header", 403: "Access to this model is restricted"}
        codes = {401: "", 403: "GatedRepo", 404: "RepoNotFound"}
        text = reason.get(code, f"status {code}")
        self.answer(
            code,
            {"error": text, "Code": code, "Message": text, "Success": False},
            X_Error_Code=codes.get(code, ""),
            X_Error_Message=text,
        )

    def listing(self, repository: str, form: str, under: str = "", deep: bool = True):
        self.hub.log.append((self.command, f"{repository} {form}", None))
        folder = self.hub.repositories.get(repository)
        code = self.hub.status.get(repository) or (0 if folder else 404)
        if code:
            return self.refuse(code)
        hub, files = [], []
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in self.hub.hidden):
            name, data = path.relative_to(folder).as_posix(), path.read_bytes()
            sha, oid = hashlib.sha256(data).hexdigest(), hashlib.sha1(data).hexdigest()
            hub.append({"type": "file", "path": name, "size": len(data), "oid": oid})
            if path.suffix in (".safetensors", ".bin"):
                hub[-1]["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 130}
            files.append({"Path": name, "Name": path.name, "Size": len(data), "Sha256": sha, "Type": "blob"})
        if form == "info":
            return self.answer(
                200, {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": f["path"]} for f in hub]}
            )
        folders = sorted({str(parent) for f in hub for parent in Path(f["path"]).parents} - {"."})
        tree = hub + [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]
        tree = [entry for entry in tree if not under or entry["path"].startswith(f"{under}/")]
        tree = [entry for entry in tree if deep or "/" not in entry["path"].removeprefix(f"{under}/")]
        self.answer(200, tree if form == "tree" else {"Code": 200, "Success": True, "Data": {"Files": files}})

    def file(self, repository: str, name: str):
        span = self.headers.get("Range")
        self.hub.log.append((self.command, name, span))
        path = self.hub.repositories.get(repository, Path("/nonexistent")) / name
        code = self.hub.status.get(name) or self.hub.status.get(repository)
        if code:
            return self.refuse(code)
        if not path.is_file() or path.name in self.hub.hidden:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        data = path.read_bytes()
        whole, sha = len(data), hashlib.sha256(data).hexdigest()
        if name in self.hub.corrupt:
            data = data[:-8] + bytes(255 - byte for byte in data[-8:])
        start = int(span.removeprefix("bytes=").split("-")[0]) if span else 0
        end = int(span.split("-")[1]) + 1 if span and span.split("-")[1] else whole
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{whole}")
        for key, text in {"Content-Length": end - start, "Accept-Ranges": "bytes", "ETag": f'"{sha}"'}.items():
            self.send_header(key, str(text))
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "HEAD":
            return
        body, cuts = data[start:end], self.hub.cut.get(name)
        if cuts:
            self.wfile.write(body[: cuts.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
        else:
            self.wfile.write(body)
