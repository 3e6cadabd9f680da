"""The settings of how processes are reached, and who may ask them what; sections of `aspo.config`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Self
from urllib.parse import urlencode

from pydantic import Field, SecretStr, model_validator

from aspo.task_config import Section

Port = Annotated[int, Field(ge=0, le=65535)]


class HttpConfig(Section):
    """Where a service answers, and how it is known to be itself."""

    _prefix: ClassVar[str] = ""  # of the settings' names, for messages

    host: str = Field("127.0.0.1", description="Address to serve on.")
    port: Port = Field(0, description="Port to serve on; 0 picks a free one.")
    probe_port: Port | None = Field(None, description="Port for /livez, /readyz and /metrics alone.")
    tls_cert: Path | None = Field(None, description="PEM certificate chain to serve HTTPS with.")
    tls_key: Path | None = Field(None, description="Its key.")

    @model_validator(mode="after")
    def _whole_pair(self) -> Self:
        _require_pair(self._prefix, self.tls_cert, self.tls_key)
        return self


class RedisConfig(Section):
    """The queue between actors and learner."""

    url: str = Field("redis://127.0.0.1:6379/0", description="redis://, rediss:// or unix:// URL.")
    task_lease_s: float = Field(
        120.0, ge=1.0, description="A task not renewed for so long goes to another actor."
    )
    max_entry_mib: int = Field(64, ge=1, le=512, description="Largest rollout group accepted, in MiB.")
    tls_ca: Path | None = Field(None, description="CA of a rediss:// server; unset: the system's.")
    tls_cert: Path | None = Field(None, description="Certificate to show Redis, where it asks for one.")
    tls_key: Path | None = Field(None, description="Its key.")

    @model_validator(mode="after")
    def _tls_needs_rediss(self) -> RedisConfig:
        _require_pair("redis.", self.tls_cert, self.tls_key)
        if (self.tls_ca or self.tls_cert) and not self.url.startswith("rediss://"):
            raise ValueError("redis.tls_ca and redis.tls_cert need a redis.url that begins with rediss://")
        return self

    @property
    def location(self) -> str:
        """The URL with the TLS files, as redis-py takes them."""
        files = {"ssl_ca_certs": self.tls_ca, "ssl_certfile": self.tls_cert, "ssl_keyfile": self.tls_key}
        query = urlencode({name: str(path) for name, path in files.items() if path is not None})
        return f"{self.url}{'&' if '?' in self.url else '?'}{query}" if query else self.url


class AuthConfig(Section):
    """Bearer tokens by scope; with none set, only loopback addresses may be served.

    A token may be kept in a file, as container platforms hand out secrets; it is read once, at the start.
    """

    reader_token: SecretStr | None = Field(None, min_length=1, description="GET /v1/status and friends.")
    actor_token: SecretStr | None = Field(None, min_length=1, description="Weight routes; also reads.")
    operator_token: SecretStr | None = Field(
        None, min_length=1, description="Everything, the changing routes included."
    )
    reader_token_file: Path | None = Field(None, description="File that holds reader_token.")
    actor_token_file: Path | None = Field(None, description="File that holds actor_token.")
    operator_token_file: Path | None = Field(None, description="File that holds operator_token.")

    @model_validator(mode="before")
    @classmethod
    def _read_files(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        read = dict(given)
        for name in ("reader_token", "actor_token", "operator_token"):
            path = read.pop(f"{name}_file", None)
            if path is None:
                continue
            if read.get(name) is not None:
                raise ValueError(f"auth.{name} and auth.{name}_file are both set; keep one")
            read[name] = _read_token(f"auth.{name}_file", path)
        return read

    @property
    def tokens(self) -> dict[str, str]:
        """The tokens that are set, by the name of their scope."""
        found = {"reader": self.reader_token, "actor": self.actor_token, "operator": self.operator_token}
        return {scope: token.get_secret_value() for scope, token in found.items() if token is not None}


def _require_pair(section: str, cert: Path | None, key: Path | None) -> None:
    if (cert is None) != (key is None):
        raise ValueError(f"{section}tls_cert and {section}tls_key go together; set both or neither")


def _read_token(setting: str, path: Any) -> str:
    try:
        token = Path(path).read_text().strip()
    except (OSError, TypeError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text file"
        raise ValueError(f"{setting}: cannot read {path} ({reason}); name a file with a token") from None
    if not token:
        raise ValueError(f"{setting}: {path} is empty; put a token in it")
    return token
