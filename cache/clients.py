"""Connections to object stores, one per server and process, and the threads that use them.

obstore runs on threads that a fork leaves behind: in a child, every request of a library that was
used before would wait for ever, with a new client too, for the threads belong to the loaded
library. The child loads a second copy of it (10 ms).
"""

from __future__ import annotations

import configparser
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mer.cache.errors import MissingDependencyError

T = TypeVar("T")

CONNECTIONS = 16


@dataclass(slots=True)
class Client:
    """What a request needs.

    Parameters
    ----------
    api : module
        The library.
    reader, writer : object
        Stores of obstore. The reader retries nothing, for ``Bucket`` counts; the writer retries
        single pieces of an upload.
    may_lack_role : bool
        Whether there are credentials only if the machine has a role.
    """

    api: Any
    reader: Any
    writer: Any
    may_lack_role: bool


_lock = threading.Lock()
_thread = threading.local()
_clients: dict[tuple[Any, ...], Client] = {}
_anonymous: set[tuple[str, str]] = set()
_executor: ThreadPoolExecutor | None = None
_api: Any = None
_forked = False
_left_behind: list[Any] = []  # dropping them would wait for threads that are gone


def _after_fork() -> None:
    global _lock, _clients, _executor, _api, _forked
    _lock = threading.Lock()
    if "obstore._obstore" in sys.modules:  # whoever used it
        _left_behind.extend((_clients, _executor, _api))
        _clients, _api, _forked = {}, None, True
    _executor = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def submit(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Call a function in one of the threads for requests."""
    return _pool().submit(function, *arguments)


def _pool() -> ThreadPoolExecutor:
    global _executor
    with _lock:
        if _executor is None:
            _executor = ThreadPoolExecutor(CONNECTIONS, "mer-objects", _mark_thread)
        return _executor


def _mark_thread() -> None:
    _thread.is_ours = True


def gather(calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call functions at the same time and return their results; the first error is raised."""
    if len(calls) == 1 or getattr(_thread, "is_ours", False):  # a full pool would wait for itself
        return [function(*arguments) for function, *arguments in calls]
    futures = [submit(*call) for call in calls]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


def _library() -> Any:
    global _api
    if _api is None:
        try:
            import obstore  # noqa: F401
            from obstore import _obstore as api
        except ImportError as error:
            raise MissingDependencyError(
                "Reading and writing s3://, gs:// and https:// needs obstore. "
                "Install it with `pip install 'mer[remote]'`."
            ) from error
        _api = _second_copy(api.__file__) if _forked else api
    return _api


def _second_copy(path: str) -> Any:
    import importlib.machinery
    import importlib.util
    import shutil
    import tempfile

    with tempfile.TemporaryDirectory(prefix="mer-") as folder:
        copy = shutil.copy(path, folder)  # the loader knows a library by its file
        loader = importlib.machinery.ExtensionFileLoader("_obstore", copy)
        spec = importlib.util.spec_from_file_location("_obstore", copy, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    return module


def client_for(scheme: str, host: str, first_wait_s: float, read_timeout_s: float) -> Client:
    """Return the connection to a server, as the environment is now.

    Parameters
    ----------
    scheme, host : str
        ``"s3"`` or ``"gs"`` and a bucket, ``"https"`` or ``"http"`` and a host.
    first_wait_s : float
        Before a piece of an upload is tried again for the first time.
    read_timeout_s : float
        How long a server may say nothing; a whole request may take much longer.
    """
    relevant = tuple(
        sorted((k, v) for k, v in os.environ.items() if k.startswith(("AWS_", "GOOGLE_")))
    )
    waits = first_wait_s, read_timeout_s
    key = (scheme, host, relevant, waits, (scheme, host) in _anonymous)
    with _lock:
        client = _clients.get(key)
        if client is None:
            client = _clients[key] = _make_client(scheme, host, *waits)
        return client


def go_anonymous(scheme: str, host: str) -> None:
    """Ask a server without credentials from now on."""
    with _lock:
        _anonymous.add((scheme, host))


def _make_client(scheme: str, host: str, first_wait_s: float, read_timeout_s: float) -> Client:
    from datetime import timedelta

    api = _library()
    options: dict[str, Any] = {
        "timeout": timedelta(minutes=30),
        "read_timeout": timedelta(seconds=read_timeout_s),
        "connect_timeout": timedelta(seconds=min(10.0, read_timeout_s)),
        "user_agent": "mer",
    }
    wait = {
        "init_backoff": timedelta(seconds=first_wait_s),
        "max_backoff": timedelta(seconds=10),
        "base": 2,
    }
    never = {"max_retries": 0, "retry_timeout": timedelta(minutes=3), "backoff": wait}
    some = {"max_retries": 3, "retry_timeout": timedelta(minutes=3), "backoff": wait}
    may_lack_role = False
    if scheme in ("http", "https"):
        options["allow_http"] = scheme == "http"

        def make(retry: dict[str, Any]) -> Any:
            return api._store.HTTPStore(
                f"{scheme}://{host}", client_options=options, retry_config=retry
            )

    else:
        if scheme == "s3":
            settings, may_lack_role = _s3_settings((scheme, host) in _anonymous)
            options["allow_http"] = _is_set("AWS_ALLOW_HTTP") or _any_is_http(
                "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"
            )
            kind = api._store.S3Store
        else:
            options["allow_http"] = _any_is_http("GOOGLE_BASE_URL")
            settings = {"skip_signature": True} if (scheme, host) in _anonymous else {}
            may_lack_role = not (settings or _is_set("GOOGLE_SKIP_SIGNATURE")) and not any(
                os.environ.get(name)
                for name in (
                    "GOOGLE_APPLICATION_CREDENTIALS",
                    "GOOGLE_SERVICE_ACCOUNT",
                    "GOOGLE_SERVICE_ACCOUNT_PATH",
                    "GOOGLE_SERVICE_ACCOUNT_KEY",
                    "GOOGLE_BEARER_TOKEN",
                )
            )
            kind = api._store.GCSStore

        def make(retry: dict[str, Any]) -> Any:
            return kind(host, client_options=options, retry_config=retry, **settings)

    return Client(api, make(never), make(some), may_lack_role)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _any_is_http(*names: str) -> bool:
    return any(os.environ.get(name, "").startswith("http://") for name in names)


def _s3_settings(anonymous: bool) -> tuple[dict[str, Any], bool]:
    """Return what obstore does not find itself, and whether only a machine's role is left."""
    if anonymous:
        return {"skip_signature": True}, False
    if os.environ.get("AWS_SKIP_SIGNATURE") or os.environ.get("AWS_ACCESS_KEY_ID"):
        return {}, False
    profile = _s3_profile()
    if profile:
        return profile, False
    if any(
        os.environ.get(name)
        for name in (
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        )
    ):
        return {}, False
    if _is_set("AWS_EC2_METADATA_DISABLED"):
        return {"skip_signature": True}, False
    return {}, True


def _s3_profile() -> dict[str, str]:
    """Return the credentials of a profile as ``aws configure`` writes them, or nothing."""
    default = Path("~/.aws/credentials")
    path = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or default).expanduser()
    parser = configparser.RawConfigParser()
    try:
        parser.read(path, "utf-8")
        section = parser[os.environ.get("AWS_PROFILE") or "default"]
    except (configparser.Error, KeyError, UnicodeDecodeError, OSError):
        return {}
    names = {
        "aws_access_key_id": "access_key_id",
        "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token",
    }
    found = {ours: section[theirs] for theirs, ours in names.items() if section.get(theirs)}
    return found if "access_key_id" in found else {}
