"""Object stores for tests and benchmarks: moto, a folder as a bucket, and a faulty way there.

``moto_url()`` is a whole S3 in memory. A ``Gateway`` stands before it, or before a folder, writes
down every request, and breaks the ones it is told to break.
"""

from __future__ import annotations

import functools
import http.client
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit
from uuid import uuid4
from xml.sax.saxutils import escape

Answer = tuple[int, dict[str, str], bytes]
_PAGE = 1000
_SIGNED = (  # moto wants one, and believes any
    "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=0"
)


@functools.cache
def moto_url() -> str:
    """Start moto once per process and return its URL."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    return f"http://{host}:{port}"


def settings(endpoint: str) -> dict[str, str]:
    """Return the environment in which ``s3://`` means ``endpoint``."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def new_bucket(endpoint: str) -> str:
    """Create a bucket with a fresh name and return that."""
    name = f"b-{uuid4().hex}"
    connection = http.client.HTTPConnection(urlsplit(endpoint).netloc)
    connection.request("PUT", f"/{name}")
    response = connection.getresponse()
    response.read()
    assert response.status == 200, response.status
    connection.close()
    return name


@dataclass(slots=True)
class Request:
    """One request as the server saw it.

    ``bytes`` are those of the body that was sent; ``status`` is what was answered; ``signed`` tells
    whether credentials came with it.
    """

    method: str
    path: str
    query: str
    range: str | None
    status: int = 0
    bytes: int = 0
    signed: bool = False

    @property
    def is_data(self) -> bool:
        """Whether it asked for frames."""
        return self.method == "GET" and "/frames/c/" in self.path


@dataclass
class Gateway:
    """An HTTP server that hands requests on and may break them.

    Attributes
    ----------
    fault : callable, optional
        Given a request, returns what happens to it: None; a status to answer with; ``"cut"`` (half
        of the body, then the end), ``"short"`` (half of the body, as if it were all), ``"reset"``,
        ``"stall"`` (half of the body, then silence), ``"drip"`` (all of the body, in small pieces),
        ``"flip"`` (one byte changed), ``"late"`` (done, then reset: the client cannot know).
    latency_s : float
        Added before every answer.
    """

    backend: Callable[[str, str, dict[str, str], bytes], Answer]
    fault: Callable[[Request], int | str | None] | None = None
    latency_s: float = 0.0
    log: list[Request] = field(default_factory=list)
    url: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ending: threading.Event = field(default_factory=threading.Event)

    def requests(self, method: str | None = None, data: bool | None = None) -> list[Request]:
        """Return what was asked so far, of one method, for frames or not."""
        return [
            request
            for request in list(self.log)
            if method in (None, request.method) and data in (None, request.is_data)
        ]

    def forget(self) -> None:
        """Empty the log."""
        self.log.clear()

    @contextmanager
    def running(self) -> Iterator[Gateway]:
        server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ending.set()
            server.shutdown()
            server.server_close()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request, client_address) -> None:
        """Say nothing of clients that went away."""


def _handler(gateway: Gateway) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = 1 << 16

        def handle_any(self) -> None:
            parts = urlsplit(self.path)
            body = self._body()
            request = Request(self.command, parts.path, parts.query, self.headers.get("Range"))
            request.signed = "Authorization" in self.headers
            with gateway._lock:
                gateway.log.append(request)
                fault = gateway.fault(request) if gateway.fault else None
            if gateway.latency_s:
                time.sleep(gateway.latency_s)
            if fault == "reset":
                self._reset()
                return
            if isinstance(fault, int):
                text = f"<Error><Code>Fault{fault}</Code></Error>".encode()
                self._answer(request, (fault, {"Content-Type": "application/xml"}, text))
                return
            status, headers, content = gateway.backend(
                self.command, self.path, dict(self.headers), body
            )
            if fault == "late":
                self._reset()
            elif fault == "flip" and content:
                at = len(content) // 2
                content = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
                self._answer(request, (status, headers, content))
            elif fault == "short":
                self._answer(request, (status, headers, content[: len(content) // 2]))
            else:
                how = str(fault) if fault in ("cut", "stall", "drip") else None
                self._answer(request, (status, headers, content), how)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815

        def _body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                pieces = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    pieces.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(pieces)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _reset(self) -> None:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True

        def _answer(self, request: Request, answer: Answer, how: str | None = None) -> None:
            status, headers, content = answer
            request.status, request.bytes = status, len(content)
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "HEAD":
                self.wfile.flush()
                return
            if how == "drip":
                step = max(1, len(content) // 64)
                for start in range(0, len(content), step):
                    self.wfile.write(content[start : start + step])
                    self.wfile.flush()
                    gateway._ending.wait(0.001)
                return
            if how in ("cut", "stall"):
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                if how == "stall":
                    gateway._ending.wait(30)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.wfile.write(content)
            self.wfile.flush()

        def log_message(self, *arguments) -> None:
            """Say nothing: the log is the gateway's."""

    return Handler


def forward_to(url: str) -> Callable[[str, str, dict[str, str], bytes], Answer]:
    """Return a backend that asks another server."""
    host = urlsplit(url).netloc
    hop = {"connection", "transfer-encoding", "keep-alive", "content-length"}

    def answer(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        connection = http.client.HTTPConnection(host)
        try:
            kept = {n: v for n, v in headers.items() if n.lower() not in hop}
            connection.request(method, path, body=body or None, headers=kept)
            response = connection.getresponse()
            content = response.read()
            answered = {n: v for n, v in response.getheaders() if n.lower() not in hop}
            if method == "HEAD":
                answered["Content-Length"] = response.getheader("Content-Length") or "0"
            return response.status, answered, content
        finally:
            connection.close()

    return answer


def serve_folder(root: Path) -> Callable[[str, str, dict[str, str], bytes], Answer]:
    """Return a backend that reads files below ``root``, as a bucket or a plain web server.

    The first component of a path is the bucket. Listing is answered, writing is not.
    """

    def answer(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        parts = urlsplit(path)
        query = parse_qs(parts.query, keep_blank_values=True)
        if "list-type" in query:
            return 200, {"Content-Type": "application/xml"}, _listing(root, parts.path, query)
        file = root / unquote(parts.path).strip("/")
        if method not in ("GET", "HEAD") or not file.is_file():
            return (405 if method not in ("GET", "HEAD") else 404), {}, b""
        state = file.stat()
        described = {
            "Last-Modified": formatdate(state.st_mtime, usegmt=True),
            "ETag": f'"{state.st_mtime_ns:x}-{state.st_size:x}"',
            "Accept-Ranges": "bytes",
        }
        if method == "HEAD":
            return 200, {**described, "Content-Length": str(state.st_size)}, b""
        wanted = headers.get("Range") or headers.get("range")
        with file.open("rb", buffering=0) as source:
            if wanted is None:
                return 200, described, source.read()
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, state.st_size - int(last))
            stop = min(int(last) + 1 if first and last else state.st_size, state.st_size)
            if start >= stop:
                return 416, described, b""
            source.seek(start)
            described["Content-Range"] = f"bytes {start}-{stop - 1}/{state.st_size}"
            return 206, described, source.read(stop - start)

    return answer


def _listing(root: Path, bucket: str, query: dict[str, list[str]]) -> bytes:
    folder = root / bucket.strip("/")
    prefix = query.get("prefix", [""])[0]
    after = query.get("continuation-token", query.get("start-after", [""]))[0]
    delimiter = query.get("delimiter", [""])[0]
    objects: list[str] = []
    prefixes: set[str] = set()
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    truncated = False
    for name in names:
        if not name.startswith(prefix) or name <= after:
            continue
        head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
        if found:
            prefixes.add(prefix + head + delimiter)
            continue
        if len(objects) == _PAGE:
            truncated = True
            break
        objects.append(name)
    rows = []
    for name in objects:
        state = (folder / name).stat()
        when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(state.st_mtime))
        rows.append(
            f"<Contents><Key>{escape(name)}</Key><LastModified>{when}</LastModified>"
            f'<ETag>"{state.st_mtime_ns:x}"</ETag><Size>{state.st_size}</Size></Contents>'
        )
    rows += [f"<CommonPrefixes><Prefix>{escape(p)}</Prefix></CommonPrefixes>" for p in prefixes]
    if truncated:
        token = escape(quote(objects[-1], safe="/"))
        rows.append(f"<NextContinuationToken>{token}</NextContinuationToken>")
    flag = "true" if truncated else "false"
    text = f"<ListBucketResult><IsTruncated>{flag}</IsTruncated>{''.join(rows)}</ListBucketResult>"
    return b'<?xml version="1.0" encoding="UTF-8"?>' + text.encode()


class S3:
    """A fresh bucket on moto behind a gateway.

    Attributes
    ----------
    gateway : Gateway
        On the way there.
    bucket : str
        Its name.
    url : str
        ``s3://`` URL of a cache in it.
    """

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.bucket = new_bucket(moto_url())
        self.url = f"s3://{self.bucket}/cache"
        self._host = urlsplit(moto_url()).netloc

    def object(self, name: str, content: bytes | None = None, method: str | None = None) -> bytes:
        """Read, replace or delete an object below the cache, past the gateway."""
        connection = http.client.HTTPConnection(self._host)
        try:
            method = method or ("GET" if content is None else "PUT")
            path = quote(f"/{self.bucket}/cache/{name}")
            connection.request(method, path, body=content, headers={"Authorization": _SIGNED})
            response = connection.getresponse()
            data = response.read()
            assert response.status < 300, (method, name, response.status)
            return data
        finally:
            connection.close()


@contextmanager
def s3() -> Iterator[S3]:
    """Yield a fresh bucket on moto behind a gateway."""
    with Gateway(forward_to(moto_url())).running() as gateway:
        yield S3(gateway)
