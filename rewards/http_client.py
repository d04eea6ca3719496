"""JSON requests over HTTP that end: limited in time, size and number of tries, with errors that say what to do.

Redirects are not followed, so a key stays with the host it was meant for.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException, HTTPResponse
from typing import Any, TypeVar

from diffalign.errors import DiffalignError

MAX_BYTES = 1 << 20
LONGEST_WAIT = 30.0  # seconds between two tries, whatever the server asks for
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
T = TypeVar("T")


class Transient(DiffalignError):
    """A failure that may be gone at the next try; `wait` are the seconds that the server asked for."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


def with_retries(ask: Callable[[], T], retries: int, backoff: float) -> T:
    """The first answer, trying again after transient failures.

    Raises:
        DiffalignError: the last try failed, or one failed for good.
    """
    for attempt in range(retries):
        try:
            return ask()
        except Transient as failure:
            time.sleep(min(LONGEST_WAIT, max(failure.wait, backoff * 2**attempt)))
    return ask()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect becomes an error status: following it would send the key to another address."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def post_json(url: str, body: Mapping[str, Any], key: str, timeout: float) -> Any:
    """The JSON answer to a JSON request.

    Raises:
        Transient: timeout, no connection, or a status that may pass.
        DiffalignError: another status, an answer that is not JSON, or one of more than a megabyte.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    deadline = time.monotonic() + timeout
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=timeout) as response:
            return parse_json(read_limited(response, deadline))
    except urllib.error.HTTPError as error:
        raise _status_error(error) from error
    except TimeoutError as error:
        raise Transient(f"no answer within {timeout:g} s; raise `timeout` or lower `concurrency`") from error
    except (OSError, HTTPException) as error:
        if isinstance(getattr(error, "reason", None), TimeoutError):
            raise Transient(f"no connection within {timeout:g} s; raise `timeout`") from error
        reason = getattr(error, "reason", error)
        raise Transient(f"cannot reach the endpoint: {reason}. Is the server running?") from error


def read_limited(response: HTTPResponse, deadline: float) -> bytes:
    """The body of an answer.

    Raises:
        TimeoutError: the deadline passed, though bytes kept trickling in.
        DiffalignError: more than a megabyte.
    """
    body = b""
    while chunk := response.read1(1 << 16):
        body += chunk
        if len(body) > MAX_BYTES:
            raise DiffalignError(f"the answer is longer than {MAX_BYTES} bytes; is this a chat endpoint?")
        if time.monotonic() > deadline:
            raise TimeoutError
    return body


def parse_json(body: bytes) -> Any:
    """A JSON document.

    Raises:
        DiffalignError: it is none.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DiffalignError(
            f"the answer is not JSON: {body[:80]!r}; expected an OpenAI-compatible chat endpoint"
        ) from error


def _status_error(error: urllib.error.HTTPError) -> DiffalignError:
    """What an error status means for the user."""
    with error:
        try:
            detail = error.read(300).decode("utf-8", "replace").strip()
        except (OSError, HTTPException):
            detail = ""
    hints = {401: "; set `api_key_env`", 403: "; set `api_key_env`", 404: "; check `url` and `model`"}
    message = f"status {error.code} {error.reason}{hints.get(error.code, '')}: {detail or 'no details'}"
    if error.code not in TRANSIENT:
        return DiffalignError(message)
    asked = error.headers.get("Retry-After", "")
    return Transient(message, wait=float(asked) if asked.isdecimal() else 0.0)
