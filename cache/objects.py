"""Objects below one URL: S3, Google Cloud Storage, or a web server that is only read.

Settings come from the environment that other tools use already:

- S3 and whatever speaks its protocol: ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
  ``AWS_SESSION_TOKEN``, else the profile ``AWS_PROFILE`` (default: ``default``) of
  ``AWS_SHARED_CREDENTIALS_FILE`` (default: ``~/.aws/credentials``), else the role of the machine
  or container, else no credentials at all, as public buckets allow it;
  ``AWS_SKIP_SIGNATURE=true`` asks for that at once. ``AWS_REGION`` or ``AWS_DEFAULT_REGION``;
  ``AWS_ENDPOINT_URL`` for another server, which may be ``http://``;
  ``AWS_VIRTUAL_HOSTED_STYLE_REQUEST`` and the other names that obstore documents for ``S3Store``.
- Google: ``GOOGLE_APPLICATION_CREDENTIALS``, ``GOOGLE_SERVICE_ACCOUNT``,
  ``GOOGLE_SKIP_SIGNATURE=true``, ``GOOGLE_BASE_URL`` for another server, and the other names that
  obstore documents for ``GCSStore``.
- Web servers: nothing. Proxies by ``HTTPS_PROXY`` and ``NO_PROXY`` everywhere.

Every request is tried again, after a wait that doubles, when the server answers 5xx or 429, when
the connection fails, when nothing arrives for half a minute and when a body ends early. What is
refused (403) or not there (404) is not asked for again.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import numpy as np

from mer.cache.clients import Client, client_for, gather, go_anonymous, submit
from mer.cache.errors import DamagedStoreError, StoreError, UsageError

logger = logging.getLogger(__name__)

T = TypeVar("T")

SCHEMES = ("s3", "gs", "http", "https")
TRIES = 10
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 10.0
READ_TIMEOUT_S = 30.0  # without a byte; a whole request may take much longer
GAP_BYTES = 256 << 10  # reading this much for nothing costs less than another request
REQUEST_BYTES = 8 << 20  # larger ranges are shared between connections
_UPLOAD_PIECE_BYTES = 8 << 20
_PAGE = 1000
_LIST_SHARDS = "0123456789abcdef"
_STATUS = re.compile(r"status code: (\d{3}) ?([A-Za-z -]*)")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_NO_ROLE = ("169.254.169.254", "metadata.google.internal", "fd00:ec2")
_PASSING = {408, 409, 425, 429}
_NO_RANGES = "the server cannot serve ranges of a file"


@dataclass(frozen=True, slots=True)
class Listed:
    """One object: its name below the bucket's URL, size, time of writing (Unix), version tag."""

    name: str
    bytes: int
    modified: float
    tag: str = ""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes ``start`` to ``stop`` of the object ``name``."""

    name: str
    start: int
    stop: int


class Bucket:
    """Objects whose URLs begin with ``url``.

    Names are relative to it and use ``/``. A bucket may be used by several threads, survives
    ``fork`` and is pickled as its URL; nothing is opened before it is needed.

    Parameters
    ----------
    url : str
        ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``https://host/path``.

    Raises
    ------
    UsageError
        Another kind of URL, or one without a bucket.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit("s3" + url[3:] if url.startswith("s3a:") else url)
        if parts.scheme not in SCHEMES or not parts.netloc:
            raise UsageError(
                f"{url!r} names no objects, expected s3://BUCKET/…, gs://BUCKET/… or https://…."
            )
        if parts.query or parts.fragment or "@" in parts.netloc:
            raise UsageError(
                f"{url!r} has a user, query or fragment; credentials come from the environment "
                "(AWS_…, GOOGLE_…)."
            )
        self.url = url.rstrip("/")
        self.scheme = parts.scheme
        self.is_web = parts.scheme in ("http", "https")
        self._host = parts.netloc
        self._prefix = (unquote(parts.path) if self.is_web else parts.path).strip("/")

    def __reduce__(self) -> tuple[type[Bucket], tuple[str]]:
        return Bucket, (self.url,)

    def __repr__(self) -> str:
        return f"Bucket({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bucket) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    @property
    def name(self) -> str:
        """Last component of the URL."""
        return self._prefix.rpartition("/")[2] or self._host

    def child(self, name: str) -> Bucket:
        """Return the objects below ``name``."""
        return Bucket(f"{self.url}/{name}")

    def parent(self) -> Bucket:
        """Return the objects one level up."""
        return Bucket(self.url.rpartition("/")[0])

    def sibling(self, suffix: str) -> Bucket:
        """Return the objects below this URL with ``suffix`` at its end."""
        return Bucket(self.url + suffix)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}".strip("/")

    def _at(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    # -- reading -----------------------------------------------------------------------------

    def get(self, name: str, size: int | None = None) -> bytes:
        """Return a whole object.

        Parameters
        ----------
        name : str
        size : int, optional
            The bytes that it must have.

        Raises
        ------
        FileNotFoundError
            There is none of that name.
        DamagedStoreError
            It has another size.
        StoreError
            The server refuses, or keeps failing.
        """

        def request(client: Client) -> bytes:
            result = client.api.get(client.reader, self._key(name))
            data = bytes(result.bytes())
            expected = int(result.meta["size"]) if size is None else size
            if len(data) != expected:
                if size is not None:
                    self._check_length(client, name, size, exactly=True)
                raise _Short(len(data), expected)
            return data

        return self._try("read", name, request)

    def get_all(self, names: Iterable[str]) -> dict[str, bytes | None]:
        """Return whole objects, fetched at the same time; None for one that is not there."""

        def get(name: str) -> bytes | None:
            try:
                return self.get(name)
            except FileNotFoundError:
                return None

        names = list(names)
        return dict(zip(names, gather([(get, name) for name in names]), strict=True))

    def get_range(self, name: str, start: int, stop: int) -> memoryview:
        """Return bytes ``start`` to ``stop`` of an object.

        Raises
        ------
        FileNotFoundError
            There is none of that name.
        DamagedStoreError
            It ends before ``stop``.
        StoreError
            The server refuses, or keeps failing.
        """
        if stop <= start:
            return memoryview(b"")

        def request(client: Client) -> memoryview:
            try:
                data = client.api.get_range(client.reader, self._key(name), start=start, end=stop)
            except Exception as error:
                if _Failure.of(error).status == 416:
                    self._check_length(client, name, stop)
                raise
            if len(data) != stop - start:
                self._check_length(client, name, stop)
                raise _Short(len(data), stop - start)
            return memoryview(data)

        return self._try("read", name, request)

    def _check_length(
        self, client: Client, name: str, expected: int, exactly: bool = False
    ) -> None:
        size = int(client.api.head(client.reader, self._key(name))["size"])
        if size < expected or (exactly and size > expected):
            least = "" if exactly else "at least "
            raise DamagedStoreError(
                f"{self._at(name)} has {size} bytes, {least}{expected} were written."
            )

    def get_spans(
        self, spans: Sequence[Span], into: Sequence[np.ndarray]
    ) -> dict[str, FileNotFoundError | DamagedStoreError]:
        """Fill arrays with ranges of objects, in few and large requests at the same time.

        Neighbours that are closer than ``GAP_BYTES`` share a request; one of more than
        ``REQUEST_BYTES`` is shared between connections.

        Parameters
        ----------
        spans : sequence of Span
            Not overlapping.
        into : sequence of ndarray
            For each span a (stop - start,) uint8.

        Returns
        -------
        dict
            Objects that are not there, or too short, and why; their arrays are not to be used.

        Raises
        ------
        StoreError
            The server refuses, or keeps failing.
        """
        failed: dict[str, FileNotFoundError | DamagedStoreError] = {}

        def fetch(name: str, start: int, stop: int, targets: list[tuple[int, np.ndarray]]) -> None:
            try:
                data = np.frombuffer(self.get_range(name, start, stop), np.uint8)
            except (FileNotFoundError, DamagedStoreError) as error:
                failed[name] = error
                return
            for begin, target in targets:  # absolute offset of target[0]
                low, high = max(begin, start), min(begin + len(target), stop)
                target[low - begin : high - begin] = data[low - start : high - start]

        gather([(fetch, *request) for request in plan_requests(spans, into)])
        return failed

    def stream(self, name: str, size: int, window: int = 4) -> Iterator[memoryview]:
        """Yield the first ``size`` bytes in order, some pieces ahead. Raises like ``get_range``."""
        starts = range(0, size, REQUEST_BYTES)
        ahead: deque[Future[memoryview]] = deque()
        try:
            for number in range(len(starts)):
                while len(ahead) < min(window, len(starts) - number):
                    start = starts[number + len(ahead)]
                    stop = min(start + REQUEST_BYTES, size)
                    ahead.append(submit(self.get_range, name, start, stop))
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def size(self, name: str) -> int | None:
        """Return the size of an object in bytes, None if there is none."""

        def request(client: Client) -> int:
            return int(client.api.head(client.reader, self._key(name))["size"])

        try:
            return self._try("read", name, request)
        except FileNotFoundError:
            return None

    def objects(self, prefix: str = "") -> list[Listed]:
        """Return all objects below ``prefix``, sorted by name.

        A listing of more than a page is made by several requests at the same time, on the
        understanding that the next component of the names begins with a hexadecimal digit mostly.

        Raises
        ------
        UsageError
            A web server, which lists nothing.
        """
        if self.is_web:
            raise UsageError(f"{self._at(prefix)} cannot be listed: a web server lists nothing.")
        key = self._key(prefix)
        root = len(self._prefix) + 1 if self._prefix else 0
        found, complete = self._page(prefix, None, None)
        if not complete:
            last = found[-1]["path"]
            bounds = [f"{key}/{digit}".lstrip("/") for digit in _LIST_SHARDS]
            # Obstore asks for what lies *after* a name: "x/3" itself is no name of ours.
            bounds = [last, *(bound for bound in bounds if bound > last)]
            ends = [*bounds[1:], None]
            for more in gather(
                [(self._pages, prefix, a, b) for a, b in zip(bounds, ends, strict=True)]
            ):
                found += more
        listed = (
            Listed(
                o["path"][root:], int(o["size"]), o["last_modified"].timestamp(), o["e_tag"] or ""
            )
            for o in found
        )
        return sorted(listed, key=lambda one: one.name)

    def _pages(self, prefix: str, after: str, until: str | None) -> list[Any]:
        found: list[Any] = []
        complete = False
        while not complete:
            page, complete = self._page(prefix, after, until)
            found += page
            after = page[-1]["path"] if page else after
        return found

    def _page(self, prefix: str, after: str | None, until: str | None) -> tuple[list[Any], bool]:
        """Return one page and whether it is the last before ``until``."""

        def request(client: Client) -> tuple[list[Any], bool]:
            stream = client.api.list(
                client.reader, self._key(prefix) or None, offset=after, chunk_size=_PAGE
            )
            page = list(next(stream, ()))
            short = len(page) < _PAGE
            inside = [o for o in page if until is None or o["path"] < until]
            return inside, short or len(inside) < len(page)

        return self._try("list", prefix, request)

    def folders(self, prefix: str = "") -> list[str]:
        """Return the names one level below ``prefix`` that have objects below them, sorted."""
        if self.is_web:
            raise UsageError(f"{self._at(prefix)} cannot be listed: a web server lists nothing.")

        def request(client: Client) -> list[str]:
            result = client.api.list_with_delimiter(client.reader, self._key(prefix) or None)
            return sorted(path.rpartition("/")[2] for path in result["common_prefixes"])

        return self._try("list", prefix, request)

    # -- writing -----------------------------------------------------------------------------

    def put(self, name: str, data: bytes | Path, *, create: bool = False) -> bool:
        """Write an object in one step: it is there as a whole or not at all.

        Parameters
        ----------
        name : str
        data : bytes or Path
            The content, or a local file with it; large ones are uploaded in pieces.
        create : bool, default=False
            Write only if there is none of that name.

        Returns
        -------
        bool
            False where ``create`` found one; it is untouched.

        Raises
        ------
        UsageError
            A web server.
        StoreError
            The server refuses, or keeps failing.
        """
        self.check_writable()

        def request(client: Client) -> bool:
            try:
                client.api.put(
                    client.writer,
                    self._key(name),
                    data,
                    mode="create" if create else "overwrite",
                    chunk_size=_UPLOAD_PIECE_BYTES,
                    max_concurrency=4,
                )
            except Exception as error:
                if type(error).__name__ in ("AlreadyExistsError", "PreconditionError"):
                    return False
                raise
            return True

        return self._try("write", name, request)

    def put_all(self, files: Mapping[str, bytes | Path]) -> None:
        """Write objects at the same time, over what is there. Raises like ``put``."""
        gather([(self.put, name, data) for name, data in files.items()])

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; it is no error if one is gone already."""
        self.check_writable()
        keys = [self._key(name) for name in names]

        def request(client: Client, some: list[str]) -> None:
            client.api.delete(client.reader, some)

        def delete(some: list[str]) -> None:
            try:
                self._try("delete", "", lambda client: request(client, some))
            except FileNotFoundError:  # Google stops at the first that is gone
                for key in some if len(some) > 1 else []:
                    delete([key])

        gather([(delete, keys[i : i + _PAGE]) for i in range(0, len(keys), _PAGE)])

    def copy(self, name: str, target: Bucket, target_name: str) -> None:
        """Copy an object within its bucket, on the server. Raises like ``get``."""
        self.check_writable()
        if (target.scheme, target._host) != (self.scheme, self._host):
            raise UsageError(f"{target.url} lies in another bucket than {self.url}.")

        def request(client: Client) -> None:
            client.api.copy(client.writer, self._key(name), target._key(target_name))

        self._try("copy", name, request)

    def check_writable(self) -> None:
        """Raise ``UsageError`` for a web server."""
        if self.is_web:
            raise UsageError(
                f"{self.url} is a web server and can only be read. Write to s3://…, gs://… or a "
                "local folder."
            )

    # -- trying ------------------------------------------------------------------------------

    def _try(self, verb: str, name: str, request: Callable[[Client], T]) -> T:
        wait = FIRST_WAIT_S
        began = time.monotonic()
        for number in range(1, TRIES + 1):
            client = client_for(self.scheme, self._host, FIRST_WAIT_S, READ_TIMEOUT_S)
            try:
                return request(client)
            except FileNotFoundError as error:
                if "NoSuchBucket" not in str(error):
                    raise FileNotFoundError(f"There is no {self._at(name)}.") from error
                raise self._no_bucket(verb, name) from error
            except (UsageError, DamagedStoreError):
                raise
            except Exception as error:
                failure = _Failure.of(error)
                if client.may_lack_role and failure.is_no_role:
                    logger.info("No credentials for %s; asking without.", self.url)
                    go_anonymous(self.scheme, self._host)
                    continue
                if "NoSuchBucket" in str(error):
                    raise self._no_bucket(verb, name) from error
                if not failure.passes or number == TRIES:
                    raise StoreError(
                        f"Cannot {verb} {self._at(name)}: {failure.text}"
                        f"{_times(number, time.monotonic() - began)}. {failure.advice(self)}"
                    ) from error
                logger.debug("%s of %s: %s; trying again.", verb, self._at(name), failure.text)
            time.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, LONGEST_WAIT_S)
        raise AssertionError("unreachable")  # pragma: no cover

    def _no_bucket(self, verb: str, name: str) -> StoreError:
        return StoreError(
            f"Cannot {verb} {self._at(name)}: there is no bucket {self._host!r}. Create it, or "
            "check its name and the endpoint (AWS_ENDPOINT_URL)."
        )


def plan_requests(
    spans: Sequence[Span], into: Sequence[np.ndarray]
) -> list[tuple[str, int, int, list[tuple[int, np.ndarray]]]]:
    """Return requests (name, start, stop, what they fill) that cover ``spans``."""
    order = sorted(range(len(spans)), key=lambda i: (spans[i].name, spans[i].start))
    merged: list[tuple[str, int, int, list[tuple[int, np.ndarray]]]] = []
    for i in order:
        span = spans[i]
        if merged and merged[-1][0] == span.name and span.start - merged[-1][2] <= GAP_BYTES:
            name, start, stop, targets = merged.pop()
            merged.append((name, start, max(stop, span.stop), targets))
        else:
            merged.append((span.name, span.start, span.stop, []))
        merged[-1][3].append((span.start, into[i]))
    requests = []
    for name, start, stop, targets in merged:
        count = max(1, -(-(stop - start) // REQUEST_BYTES))
        edges = [start + (stop - start) * n // count for n in range(count + 1)]
        for a, b in zip(edges, edges[1:], strict=False):
            mine = [(begin, t) for begin, t in targets if begin < b and begin + len(t) > a]
            requests.append((name, a, b, mine))
    return requests


class _Short(Exception):
    def __init__(self, got: int, expected: int) -> None:
        super().__init__(f"the body ended after {got} of {expected} bytes")


@dataclass(frozen=True, slots=True)
class _Failure:
    """What went wrong, for people, and whether it may pass."""

    text: str
    status: int | None
    passes: bool
    is_no_role: bool

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        raw = str(error)
        is_no_role = any(host in raw for host in _NO_ROLE)
        if isinstance(error, _Short):
            return cls(str(error), None, True, False)
        kind = type(error).__name__
        match = _STATUS.search(raw)
        if match is None:
            refused = kind in (
                "InvalidPathError",
                "NotSupportedError",
                "UnknownConfigurationKeyError",
                "PermissionDeniedError",
                "UnauthenticatedError",
            ) or isinstance(error, ValueError)
            return cls(_plain(raw), None, not refused, is_no_role)
        status = int(match[1])
        code = _CODE.search(raw)
        text = f"the server answered {status} {match[2].strip()}".rstrip()
        if code:
            text += f" ({code[1]})"
        passes = status in _PASSING or (status >= 500 and status != 501)
        return cls(text, status, passes, is_no_role)

    def advice(self, bucket: Bucket) -> str:
        prefix = "GOOGLE" if bucket.scheme == "gs" else "AWS"
        if self.text == _NO_RANGES:
            return (
                "Serve the folder with a server that supports range requests: nginx, Apache, a "
                "public bucket (Python's http.server does not)."
            )
        if self.status in (401, 403):
            if bucket.is_web:
                return "It is not public."
            return (
                f"Check the credentials ({prefix}_… in the environment; "
                f"{prefix}_SKIP_SIGNATURE=true for public data) and that they allow this."
            )
        if self.status in (301, 307, 400) and bucket.scheme == "s3":
            return "Check AWS_REGION and AWS_ENDPOINT_URL."
        if self.status == 501:
            return (
                "The server lacks something that mer needs, such as writing an object only if "
                "there is none of its name (If-None-Match)."
            )
        if self.passes:
            where = "" if bucket.scheme != "s3" else ", and AWS_ENDPOINT_URL if you set it"
            return (
                f"Check the connection{where}, and run the same command again: what was finished "
                "is kept."
            )
        return "Check the URL."


def _plain(raw: str) -> str:
    """Return the first line of an obstore message, shortened to what tells causes apart."""
    text = raw.split("\n", 1)[0].strip()
    lower = raw.lower()
    for needle, plain in (
        ("connection refused", "the connection was refused"),
        ("connection reset", "the connection was reset"),
        ("dns error", "the host name is not known"),
        ("timedout", "the server did not answer in time"),
        ("timed out", "the server did not answer in time"),
        ("end of file before message length reached", "the body ended early"),
        ("error decoding response body", "the body ended early"),
        ("request or response body error", "the body ended early"),
        ("range request not supported", _NO_RANGES),
        ("received non-partial response", _NO_RANGES),
    ):
        if needle in lower:
            return plain
    return text[:300]


def _times(number: int, seconds: float) -> str:
    return "" if number == 1 else f", tried {number} times in {seconds:.0f} s"
