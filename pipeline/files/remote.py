"""Files behind a URL of any protocol that fsspec knows, asked for with patience."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pipeline.errors import PipelineError, SpecError

Item = TypeVar("Item")
Result = TypeVar("Result")

_TRIES = 4
# Requests in flight; servers drop connections that come in hundreds.
_AT_ONCE = 16
# Seconds before a request is made again; doubled each time.
FIRST_PAUSE = 0.4


def is_url(text: object) -> bool:
    """Whether ``text`` names something behind a protocol and not a local path."""
    return "://" in str(text)


def refuse_credentials(url: str, key: str) -> None:
    """Raise SpecError where a URL holds a password or a signature: stores keep URLs."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise SpecError(
            f"{key} has credentials in its URL, which stores would keep; leave them "
            "to the environment or to fsspec's configuration files."
        )
    if parts.query:
        raise SpecError(
            f"{key} has a query ('?…') in its URL, which stores would keep, signatures "
            "included; leave it away, or fetch the file first."
        )


class RemoteFiles:
    """The file system behind ``url`` and the path of ``url`` on it."""

    def __init__(self, url: str, error: type[PipelineError]) -> None:
        self.url = url.rstrip("/")
        self._error = error
        from fsspec.core import url_to_fs

        try:
            self.system, root = url_to_fs(self.url, **_options(self.url))
        except (ImportError, ValueError) as reason:
            raise error(
                f"{url} cannot be opened ({reason}); `pip install 'kd-train[remote]'` "
                "brings http and s3, fsspec names the packages of other protocols."
            ) from None
        self.root = root.rstrip("/")

    def path(self, name: str) -> str:
        """Where file ``name`` below the URL is; the URL's own without a name."""
        return f"{self.root}/{name}" if name else self.root

    def ask(self, request: Callable[..., Result], *what: Any, **options: Any) -> Result:
        """Result of a request, made again a few times where the network fails."""
        for number in range(1, _TRIES + 1):
            try:
                return request(*what, **options)
            except (FileNotFoundError, PermissionError, NotImplementedError):
                raise
            except Exception as error:
                # Every protocol has errors of its own for a lost connection.
                if number == _TRIES:
                    raise self._error(
                        f"{self.url} does not answer ({type(error).__name__}: {error});"
                        " check the address and the network."
                    ) from error
                time.sleep(FIRST_PAUSE * 2 ** (number - 1))
        raise AssertionError


def split_groups(items: Sequence[Item]) -> Iterator[list[Item]]:
    """``items``, as many at a time as are requested at once."""
    for first in range(0, len(items), _AT_ONCE):
        yield list(items[first : first + _AT_ONCE])


def _options(url: str) -> dict[str, Any]:
    """Settings of the protocol: http has no limits of its own for a silent server."""
    if not url.startswith(("http://", "https://")):
        return {}
    try:
        from aiohttp import ClientTimeout
    except ImportError:
        return {}
    timeout = ClientTimeout(total=None, sock_connect=10, sock_read=60)
    return {"client_kwargs": {"timeout": timeout}}
