"""A bucket on 127.0.0.1: as much of Google's JSON API as gcsfs and TensorStore ask for.

Requests that a fault is set for are answered with it; `log` has what was asked.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c


class Thing(NamedTuple):
    """One object of a bucket."""

    data: bytes
    generation: int


class Bucket:
    """Its objects, {name: Thing}, and what to do wrong."""

    def __init__(self) -> None:
        self.objects: dict[str, Thing] = {}
        self.log: list[tuple[str, str]] = []
        self.damage: set[str] = set()  # names whose bytes are changed on the way
        self.refuse = False  # every write fails
        self.lock = threading.Lock()
        self._generation = 1000

    def put(self, name: str, data: bytes) -> Thing:
        self._generation += 1
        self.objects[name] = Thing(data, self._generation)
        return self.objects[name]


@contextlib.contextmanager
def serving(bucket: Bucket) -> Iterator[str]:
    """Serves any bucket name with these objects; yields http://127.0.0.1:PORT."""
    handler = type("Handler", (_Handler,), {"bucket": bucket})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def environment(url: str) -> dict[str, str]:
    """What makes gcsfs and TensorStore ask there, without credentials."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "NO_GCE_CHECK": "true",
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket
    uploads: dict[str, tuple[str, dict[str, list[str]], bytes]] = {}  # noqa: RUF012 - of the server

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        path, query, _ = self._read()
        if re.fullmatch(r"/storage/v1/b/[^/]+", path):
            return self._json({"name": path.rsplit("/", 1)[1], "kind": "storage#bucket"})
        if re.fullmatch(r"/storage/v1/b/[^/]+/o/?", path):
            return self._json(self._list(query))
        name = self._name(path)
        thing = self.bucket.objects.get(name)
        if thing is None:
            return self._json({"error": {"code": 404, "message": "not found"}}, 404)
        if query.get("alt") == ["media"] or path.startswith("/download"):
            return self._media(name, thing)
        return self._json(_about(name, thing))

    do_HEAD = do_GET

    def do_DELETE(self) -> None:
        path, query, _ = self._read()
        self._delete(self._name(path), query)

    def do_PATCH(self) -> None:
        path, _, _ = self._read()
        name = self._name(path)
        self._json(_about(name, self.bucket.objects[name]))

    def do_PUT(self) -> None:
        _, query, body = self._read()
        self._chunk(query["upload_id"][0], body)

    def _chunk(self, key: str, body: bytes) -> None:
        name, first, before = self.uploads[key]
        whole = before + body
        size = self.headers.get("Content-Range", "bytes 0-0/*").rsplit("/", 1)[1]
        if size == "*" or len(whole) < int(size):
            self.uploads[key] = (name, first, whole)
            return self._send(308, b"", {"Range": f"bytes=0-{len(whole) - 1}"})
        return self._store(name, first, whole)

    def do_POST(self) -> None:
        path, query, body = self._read()
        if path.startswith("/batch"):
            return self._batch(body)
        if "upload_id" in query:
            return self._chunk(query["upload_id"][0], body)
        copied = re.fullmatch(
            r"/storage/v1/b/[^/]+/o/(.+)/(?:rewriteTo|copyTo)/b/[^/]+/o/(.+)", path
        )
        if copied:
            source, target = (unquote(part) for part in copied.groups())
            thing = self.bucket.put(target, self.bucket.objects[source].data)
            about = _about(target, thing)
            return self._json(
                about | {"done": True, "resource": about, "kind": "storage#rewriteResponse"}
            )
        kind = query.get("uploadType", ["media"])[0]
        if kind == "media":
            return self._store(query["name"][0], query, body)
        if kind == "multipart":
            about, data = _parts(self.headers["Content-Type"], body)[:2]
            return self._store(query.get("name", [json.loads(about)["name"]])[0], query, data)
        name = query["name"][0] if "name" in query else json.loads(body)["name"]
        key = f"{name}-{len(self.uploads)}"
        self.uploads[key] = (name, query, b"")
        url = f"http://{self.headers['Host']}/upload/storage/v1/b/x/o?upload_id={key}"
        return self._send(200, b"", {"Location": url})

    # --- parts ---

    def _read(self) -> tuple[str, dict[str, list[str]], bytes]:
        url = urlsplit(self.path)
        self.bucket.log.append((self.command, self.path))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return url.path, parse_qs(url.query), body

    def _name(self, path: str) -> str:
        return unquote(path.split("/o/", 1)[1])

    def _list(self, query: dict[str, list[str]]) -> dict[str, Any]:
        prefix, delimiter = (query.get(k, [""])[0] for k in ("prefix", "delimiter"))
        items, prefixes = [], set()
        for name, thing in sorted(self.bucket.objects.items()):
            if not name.startswith(prefix) or name < query.get("startOffset", [""])[0]:
                continue
            if "endOffset" in query and name >= query["endOffset"][0]:
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(_about(name, thing))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _media(self, name: str, thing: Thing) -> None:
        data = thing.data
        if name in self.bucket.damage and data:
            data = bytes([data[0] ^ 1]) + data[1:]
        headers = {
            "x-goog-generation": str(thing.generation),
            "x-goog-stored-content-length": str(len(data)),
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._send(200, data, headers)
        first = int(wanted[1])
        last = min(int(wanted[2] or len(data) - 1), len(data) - 1)
        if first >= len(data):
            return self._send(416, b"", headers)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return self._send(206, data[first : last + 1], headers)

    def _store(self, name: str, query: dict[str, list[str]], data: bytes) -> None:
        with self.bucket.lock:
            if self.bucket.refuse:
                return self._json({"error": {"code": 403, "message": "billing disabled"}}, 403)
            if self._unmet(name, query):
                return self._json({"error": {"code": 412, "message": "conditionNotMet"}}, 412)
            thing = self.bucket.put(name, data)
        return self._json(_about(name, thing))

    def _delete(self, name: str, query: dict[str, list[str]]) -> None:
        with self.bucket.lock:
            if self._unmet(name, query):
                return self._json({"error": {"code": 412, "message": "conditionNotMet"}}, 412)
            gone = self.bucket.objects.pop(name, None)
        return self._send(204 if gone else 404, b"", {})

    def _unmet(self, name: str, query: dict[str, list[str]]) -> bool:
        wanted = query.get("ifGenerationMatch")
        there = self.bucket.objects.get(name, Thing(b"", 0)).generation
        return wanted is not None and int(wanted[0]) != there

    def _batch(self, body: bytes) -> None:
        """Deletions, many in one request."""
        answers = []
        for number, part in enumerate(_parts(self.headers["Content-Type"], body), start=1):
            path = part.split(b" ", 2)[1].decode()
            self.bucket.log.append(("DELETE", path))
            gone = self.bucket.objects.pop(self._name(urlsplit(path).path), None)
            code = "204 No Content" if gone else "404 Not Found"
            answers.append(
                f"--end\r\nContent-Type: application/http\r\n"
                f"Content-ID: <response-{number}>\r\n\r\n"
                f"HTTP/1.1 {code}\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        text = "".join(answers) + "--end--\r\n"
        self._send(200, text.encode(), {"Content-Type": "multipart/mixed; boundary=end"})

    def _json(self, value: Any, code: int = 200) -> None:
        self._send(code, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(BrokenPipeError):  # the client has what it wanted to know
                self.wfile.write(body)


def _about(name: str, thing: Thing) -> dict[str, Any]:
    crc = google_crc32c.value(thing.data).to_bytes(4, "big")
    return {
        "kind": "storage#object",
        "name": name,
        "bucket": "bucket",
        "size": str(len(thing.data)),
        "generation": str(thing.generation),
        "metageneration": "1",
        "md5Hash": base64.b64encode(hashlib.md5(thing.data).digest()).decode(),
        "crc32c": base64.b64encode(crc).decode(),
        "contentType": "application/octet-stream",
        "updated": "2026-01-01T00:00:00.000Z",
        "timeCreated": "2026-01-01T00:00:00.000Z",
    }


def _parts(content_type: str, body: bytes) -> list[bytes]:
    """Bodies of a multipart message, byte for byte."""
    boundary = (
        BytesParser().parsebytes(f"Content-Type: {content_type}\r\n\r\n".encode()).get_boundary()
    )
    pieces = body.split(f"--{boundary}".encode())[1:-1]
    contents = [re.split(rb"\r?\n\r?\n", piece, maxsplit=1)[1] for piece in pieces]
    return [re.sub(rb"\r?\n\Z", b"", content) for content in contents]
