"""A server with the part of the JSON interface of Google Cloud Storage that orbax, tensorstore, gcsfs and tensorboardX
use: objects with generations, conditions on them, ranges, listing, the three ways of uploading, copying and moving."""

import base64
import email.parser
import email.policy
import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c


class Refused(Exception):
    """An answer other than success: its status."""


class Bucket:
    """Objects by name: content and generation."""

    def __init__(self):
        self.lock = threading.RLock()
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}
        self._generations = itertools.count(1)

    def put(self, name: str, content: bytes, query: dict[str, str]) -> dict:
        with self.lock:
            self.check(name, query)
            self.objects[name] = (content, next(self._generations))
            return self.described(name)

    def check(self, name: str, query: dict[str, str]) -> None:
        generation = self.objects[name][1] if name in self.objects else 0
        if query.get("ifGenerationMatch", "None") not in ("None", str(generation)):
            raise Refused(412)
        if query.get("ifGenerationNotMatch") == str(generation):
            raise Refused(304)

    def get(self, name: str, query: dict[str, str]) -> tuple[bytes, int]:
        with self.lock:
            if name not in self.objects:
                raise Refused(404)
            self.check(name, query)
            return self.objects[name]

    def described(self, name: str) -> dict:
        content, generation = self.get(name, {})
        checksum = base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode()
        times = dict.fromkeys(("timeCreated", "updated"), f"2026-01-01T00:00:{generation % 60:02}.{generation:06}Z")
        return {"kind": "storage#object", "bucket": "bucket", "name": name, "size": str(len(content)), **times,
                "generation": str(generation), "metageneration": "1", "crc32c": checksum,
                "contentType": "application/octet-stream"}  # fmt: skip

    def listed(self, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        with self.lock:
            for name in sorted(self.objects):
                within = query.get("startOffset", "") <= name < query.get("endOffset", "~")
                if not (name.startswith(prefix) and within):
                    continue
                head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                if found:
                    prefixes.add(prefix + head + delimiter)
                else:
                    items.append(self.described(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


class Handler(BaseHTTPRequestHandler):
    """One request: ``/storage/v1/b/bucket[/o[/NAME[/moveTo/...]]]``, with ``/upload`` or ``/download`` before it."""

    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self.chunk, b""))
        else:
            body = self.rfile.read(length)
        address = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(address.query).items()}
        parts = [unquote(part) for part in address.path.split("/") if part]
        try:
            self.serve(parts, query, body)
        except Refused as refused:
            self.reply(b"", refused.args[0])

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def serve(self, parts: list[str], query: dict[str, str], body: bytes) -> None:
        kind = parts.pop(0) if parts[0] in ("upload", "download") else ""
        if "forbidden" in parts:
            raise Refused(403)
        if parts[:4] != ["storage", "v1", "b", "bucket"]:
            raise Refused(404)
        name, *more = parts[5:] or [None]
        if kind == "upload":
            self.upload(query, body)
        elif len(parts) == 4:
            self.json({"kind": "storage#bucket", "name": "bucket", "id": "bucket", "location": "HERE"})
        elif name is None:
            self.json(self.bucket.listed(query))
        elif self.command == "DELETE":
            with self.bucket.lock:
                self.bucket.get(name, query)
                del self.bucket.objects[name]
            self.reply(b"", 204)
        elif self.command == "POST":
            self.copy(name, *more)
        elif query.get("alt") == "media" or kind == "download":
            self.media(*self.bucket.get(name, query))
        else:
            self.json(self.bucket.described(name))

    def copy(self, source: str, action: str, *target: str) -> None:
        with self.bucket.lock:
            described = self.bucket.put(target[-1], self.bucket.get(source, {})[0], {})
            if action == "moveTo":
                del self.bucket.objects[source]
        self.json({"done": True, "resource": described} if action == "rewriteTo" else described)

    def upload(self, query: dict[str, str], body: bytes) -> None:
        if "upload_id" in query:
            name, conditions, content = self.bucket.uploads[query["upload_id"]]
            content += body
            total = self.headers["Content-Range"].rpartition("/")[2]
            if total == "*" or len(content) < int(total):
                self.reply(b"", 308, {"Range": f"bytes=0-{len(content) - 1}"} if content else {})
            else:
                self.json(self.bucket.put(name, bytes(content), conditions))
        elif query["uploadType"] == "resumable":
            identity = str(len(self.bucket.uploads))
            name = query.get("name") or json.loads(body)["name"]
            self.bucket.uploads[identity] = (name, query, bytearray())
            place = f"http://{self.headers['Host']}/upload/storage/v1/b/bucket/o?upload_id={identity}"
            self.reply(b"{}", 200, {"Location": place})
        elif query["uploadType"] == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            parser = email.parser.BytesParser(policy=email.policy.HTTP)
            described, content = parser.parsebytes(head + body).iter_parts()
            name = query.get("name") or json.loads(described.get_payload(decode=True))["name"]
            self.json(self.bucket.put(name, content.get_payload(decode=True), query))
        else:
            self.json(self.bucket.put(query["name"], body, query))

    def media(self, content: bytes, generation: int) -> None:
        first, last, status = 0, len(content), 200
        if "Range" in self.headers:
            begin, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
            first = int(begin) if begin else max(0, len(content) - int(end))
            last = min(len(content), int(end) + 1) if begin and end else len(content)
            if first >= len(content):
                raise Refused(416)
            status = 206
        headers = {"x-goog-generation": str(generation), "x-goog-metageneration": "1"}
        headers |= {"Content-Range": f"bytes {first}-{last - 1}/{len(content)}"} if status == 206 else {}
        self.reply(content[first:last], status, headers)

    def json(self, value: dict) -> None:
        self.reply(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def reply(self, content: bytes, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if status != 304:
            self.wfile.write(content)


@contextmanager
def bucket_server() -> Iterator[dict[str, str]]:
    """Serve ``gs://bucket`` on a free port; yields the environment variables that lead there."""
    handler = type("BucketHandler", (Handler,), {"bucket": Bucket()})
    with ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://localhost:{server.server_port}"
        yield {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address, "GOOGLE_CLOUD_PROJECT": "none",
               "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}  # fmt: skip
        server.shutdown()
