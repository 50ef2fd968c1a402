"""Requests to a server: JSON there and back, repeated where a failure may pass."""

from __future__ import annotations

import http.client
import json
import threading
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from cropi.errors import CropiError, shown

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
LARGEST = 1 << 30  # bytes of an answer
LONGEST_PAUSE = 30.0


class ServerError(CropiError):
    """The server does not answer, or not as it should. ``status`` is HTTP's, where there was one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """A server at a URL.

    Args:
        url: with its version, as ``http://localhost:8000/v1``; a bare host gets ``/v1``.
        key: sent as a bearer token, to this host alone; None: none.
        timeout: seconds for an answer.
        retries: how often a request is repeated.

    Attributes:
        stop: when it is set, nothing is repeated any more.
    """

    def __init__(self, url: str, key: str | None, timeout: float, retries: int) -> None:
        parts = urllib.parse.urlparse(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise CropiError(
                f"url: {url!r} is not a URL of a server; give one such as http://localhost:8000/v1"
            )
        self.url = url.rstrip("/") if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1"
        self._key, self.timeout, self.retries = key, timeout, retries
        self.stop = threading.Event()

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return self._repeated(path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that answers a JSON body.

        Raises:
            ServerError: it does not answer, after all repetitions; or it refuses the request.
        """
        return self._repeated(path, json.dumps(body).encode())

    def _repeated(self, path: str, data: bytes | None) -> Any:
        for attempt in range(self.retries + 1):
            try:
                return self._once(path, data)
            except urllib.error.HTTPError as error:
                said = _said(error)
                problem, pause = f"answered {error.code}: {said}", error.headers.get("Retry-After")
                if error.code not in PASSING:
                    raise ServerError(f"the server at {self.url}/{path} {problem}", error.code) from error
            except TimeoutError:
                problem, pause = f"did not answer within {self.timeout:g} seconds (--timeout)", None
            except urllib.error.URLError as error:
                late = isinstance(error.reason, TimeoutError)
                problem = f"did not answer within {self.timeout:g} seconds (--timeout)" if late else ""
                problem, pause = problem or f"cannot be reached ({error.reason})", None
            except (OSError, http.client.HTTPException) as error:
                problem, pause = f"broke off ({type(error).__name__}: {error})", None
            except (ValueError, RecursionError) as error:
                problem, pause = f"answered no JSON ({str(error)[:100]})", None
            if attempt < self.retries:
                self.stop.wait(_pause(attempt, pause))
            if self.stop.is_set():
                break
        raise ServerError(
            f"the server at {self.url}/{path} {problem}, {attempt + 1} times; finished prompts are kept: mend or "
            "start it, and run the same command again"
        )

    def _once(self, path: str, data: bytes | None) -> Any:
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            body = answer.read(LARGEST + 1)
        if len(body) > LARGEST:
            raise ServerError(f"the server at {self.url}/{path} answered with more than {LARGEST} bytes")
        return json.loads(body)


def _pause(attempt: int, asked: str | None) -> float:
    try:
        return min(LONGEST_PAUSE, max(0.0, float(asked))) if asked else min(LONGEST_PAUSE, 2.0**attempt)
    except ValueError:  # a date
        return LONGEST_PAUSE


def _said(error: urllib.error.HTTPError) -> str:
    try:
        text = error.read(4096).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        held = json.loads(text)
        inner = held.get("error", held) if isinstance(held, dict) else held
        text = str(inner.get("message", inner)) if isinstance(inner, dict) else str(inner)
    except (ValueError, RecursionError):
        pass
    return shown(" ".join(text.split()), 300)
