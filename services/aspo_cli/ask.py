"""Asking a learner over HTTP: its JSON, or one line that says what to do."""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from aspo.config import ConfigError
from aspo.tls import UNTRUSTED


class LearnerUnreachable(ConfigError):
    """No learner answers at the URL."""


def ask(
    url: str,
    path: str,
    token: str | None,
    *,
    expect: set[str],
    method: str = "GET",
    body: object = None,
    timeout_s: float = 60.0,
) -> dict[str, Any]:
    """Call a route and give its answer, a JSON object that holds the keys `expect`.

    Raises `LearnerUnreachable` when none answers, else `ConfigError` with the learner's message and a hint.
    """
    require_url(url)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    target = url.rstrip("/") + urllib.parse.quote(path)
    try:
        request = urllib.request.Request(target, data=data, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        raise ConfigError(_reason(url, error)) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
            raise ConfigError(f"the certificate of {url} is not trusted ({error}); {UNTRUSTED}") from None
        raise LearnerUnreachable(
            f"no learner answers at {url} ({error}); start one or pass --learner URL"
        ) from None
    if not isinstance(answer, dict) or not expect <= answer.keys():
        raise ConfigError(f"{url} is not a learner; pass its URL with --learner")
    return answer


def require_url(url: str) -> None:
    """Raise `ConfigError` for what is no HTTP URL."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is not a URL; write --learner http://HOST:PORT")


def _reason(url: str, error: urllib.error.HTTPError) -> str:
    try:
        detail = json.load(error)["error"]
        if error.code in (401, 403):
            return f"{url} answered {error.code}: {detail['message']}; pass --token or set ASPO_TOKEN"
        return f"{detail['message']}; {detail['hint']}"
    except (ValueError, KeyError, TypeError):
        return f"{url} answered {error.code}; is it a learner? pass its URL with --learner"
