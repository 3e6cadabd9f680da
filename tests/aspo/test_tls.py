"""TLS with certificates made on the spot: real handshakes with Redis and HTTP, strangers refused plainly."""

from __future__ import annotations

import datetime
import ipaddress
import json
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from prometheus_client import CollectorRegistry

from aspo.config import AuthConfig, ConfigError
from aspo.http import Server, create_app, listen
from aspo.queue import QueueError, connect, fault_of
from aspo.tls import TlsError, client_context, server_context
from aspo.weights.client import Refused, WeightClient
from aspo.weights.leases import Leases
from aspo.weights.server import blob_routes, weight_routes
from aspo.weights.store import WeightStore
from aspo_cli.ask import LearnerUnreachable, ask
from aspo_cli.processes import free_port
from aspo_cli.pull import pull_version
from models import save_model
from rollouts import write_config
from services import Service, wait_until
from versions import FILES, tensors, version

Key = ec.EllipticCurvePrivateKey


def write_certificate(folder: Path, name: str, issuer: tuple[x509.Name, Key] | None) -> tuple[x509.Name, Key]:
    """Write NAME.pem and NAME.key for 127.0.0.1, or a CA where nobody issues it."""
    key, subject = ec.generate_private_key(ec.SECP256R1()), x509.Name.from_rfc4514_string(f"CN={name}")
    signer, signing_key = issuer or (subject, key)
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if issuer is not None:
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    certificate = builder.sign(signing_key, hashes.SHA256())
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return subject, key


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca.pem, a stranger's other.pem, and service.pem and client.pem that ca.pem signed."""
    folder = tmp_path_factory.mktemp("pki")
    authority = write_certificate(folder, "ca", None)
    write_certificate(folder, "other", None)
    for name in ("service", "client"):
        write_certificate(folder, name, authority)
    return folder


@contextmanager
def tls_proxy(redis_url: str, pki: Path, wanted: ssl.VerifyMode) -> Iterator[str]:
    """The session's Redis behind TLS, as stunnel would put it; gives the rediss:// URL."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=pki / "ca.pem")
    context.load_cert_chain(pki / "service.pem", pki / "service.key")
    context.verify_mode = wanted
    with TlsProxy(context, urlsplit(redis_url).port or 0) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"rediss://127.0.0.1:{proxy.server_address[1]}/0"
        proxy.shutdown()


@pytest.fixture(params=[ssl.CERT_NONE, ssl.CERT_REQUIRED], ids=["server only", "mutual"])
def secure_redis(request: pytest.FixtureRequest, redis_url: str, pki: Path) -> Iterator[str]:
    """Redis behind TLS; mutual: it wants a certificate too."""
    with tls_proxy(redis_url, pki, request.param) as url:
        yield url


class TlsProxy(socketserver.ThreadingTCPServer):
    """Decrypts, and passes on to a port of loopback."""

    daemon_threads = True

    def __init__(self, context: ssl.SSLContext, target: int) -> None:
        super().__init__(("127.0.0.1", 0), Tunnel)
        self.context, self.target = context, target


class Tunnel(socketserver.BaseRequestHandler):
    """One connection: handshake, then bytes both ways."""

    server: TlsProxy

    def handle(self) -> None:
        with suppress(OSError):  # a handshake that fails, and a client that leaves
            inner = socket.create_connection(("127.0.0.1", self.server.target))
            with inner, self.server.context.wrap_socket(self.request, server_side=True) as outer:
                back = threading.Thread(target=pump, args=(inner, outer), daemon=True)
                back.start()
                pump(outer, inner)
                back.join()


def pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_RDWR)


def redis_config(folder: Path, url: str, **files: Path) -> str:
    overrides = [f"redis.{name}={path}" for name, path in files.items()]
    return write_config(folder, model="m", redis_url=url, overrides=overrides).redis.location


def test_redis_is_reached_over_tls_by_whom_it_knows(secure_redis: str, pki: Path, tmp_path: Path) -> None:
    own = {"tls_cert": pki / "client.pem", "tls_key": pki / "client.key"}
    location = redis_config(tmp_path, secure_redis, tls_ca=pki / "ca.pem", **own)
    with connect(location) as client:
        assert client.info()["redis_version"]
    assert fault_of(location) is None


@pytest.mark.parametrize("ca", ["other.pem", None])
def test_a_redis_that_the_ca_does_not_vouch_for_is_refused(
    secure_redis: str, pki: Path, tmp_path: Path, ca: str | None
) -> None:
    location = redis_config(tmp_path, secure_redis, **({"tls_ca": pki / ca} if ca else {}))
    with pytest.raises(QueueError, match=r"is not trusted .* set redis\.tls_ca") as caught:
        connect(location)
    assert "\n" not in str(caught.value)
    assert "ssl_ca_certs" not in str(caught.value)


def test_files_that_are_not_there_are_named(secure_redis: str, pki: Path, tmp_path: Path) -> None:
    with pytest.raises(QueueError, match="No such file"):
        connect(redis_config(tmp_path, secure_redis, tls_ca=tmp_path / "none.pem"))
    with pytest.raises(TlsError, match=r"none\.pem cannot be loaded .* name a PEM file"):
        client_context(tmp_path / "none.pem")
    with pytest.raises(TlsError, match="name PEM files that match"):
        server_context(pki / "service.pem", pki / "client.key")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("redis.tls_ca=ca.pem", "need a redis.url that begins with rediss://"),
        ("learner.tls_cert=a.pem", "learner.tls_cert and learner.tls_key go together"),
        ("actor.tls_key=a.key", "actor.tls_cert and actor.tls_key go together"),
        ("redis.tls_key=a.key", "redis.tls_cert and redis.tls_key go together"),
    ],
)
def test_half_a_setting_is_refused(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        write_config(tmp_path, model="m", overrides=[override])


@pytest.fixture
def service(pki: Path, tmp_path: Path) -> Iterator[str]:
    """A store's weight routes over HTTPS."""
    store = WeightStore(tmp_path / "store")
    store.put(version(0), tensors(0), FILES)
    store.go_live(version(0))
    app = create_app("learner", auth=AuthConfig(), ready=lambda: None, registry=CollectorRegistry())
    app.include_router(weight_routes(store, Leases()))
    app.include_router(blob_routes(store.blobs))
    context = server_context(pki / "service.pem", pki / "service.key")
    with Server(app, listen("127.0.0.1", 0, AuthConfig()), context) as server:
        assert server.url.startswith("https://127.0.0.1:")
        yield server.url


async def test_weights_are_pulled_over_https(service: str, pki: Path, tmp_path: Path) -> None:
    async with WeightClient(service, tmp_path / "cache", tls_ca=pki / "ca.pem") as client:
        plan = await client.latest()
        assert plan is not None
        assert await client.pull(plan)


@pytest.mark.parametrize("ca", ["other.pem", None])
async def test_a_learner_that_the_ca_does_not_vouch_for_is_refused(
    service: str, pki: Path, tmp_path: Path, ca: str | None
) -> None:
    async with WeightClient(service, tmp_path / "cache", tls_ca=pki / ca if ca else None) as client:
        with pytest.raises(Refused, match=r"is not trusted .* set actor\.tls_ca, or SSL_CERT_FILE"):
            await client.latest()
    assert client.stats.retries == 0


def test_the_command_line_believes_the_ca_of_ssl_cert_file(
    service: str, pki: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(pki / "ca.pem"))
    assert ask(service, "/v1/weights", None, expect={"live"})["live"] == str(version(0))
    pull_version(service, None, None, tmp_path / "model")
    assert (tmp_path / "model").is_dir()
    monkeypatch.setenv("SSL_CERT_FILE", str(pki / "other.pem"))
    with pytest.raises(ConfigError, match=r"the certificate of https://.* is not trusted") as caught:
        ask(service, "/v1/weights", None, expect={"live"})
    assert "SSL_CERT_FILE" in str(caught.value)


def test_a_relay_serves_https_to_who_has_its_token(service: str, pki: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    port, probe_port = free_port(), free_port()
    relay = Service(
        tmp_path, "relay", "relay", "--learner", service,
        "--port", str(port), "--probe-port", str(probe_port),
        "--tls-cert", str(pki / "service.pem"), "--tls-key", str(pki / "service.key"),
        "--token-file", str(tmp_path / "token"), environment={"SSL_CERT_FILE": str(pki / "ca.pem")},
        forked=True,
    )  # fmt: skip
    trusted = client_context(pki / "ca.pem")

    def is_ready() -> bool:
        with suppress(OSError), urlopen(f"https://127.0.0.1:{probe_port}/readyz", context=trusted) as answer:
            return bool(answer.status == 200)
        return False

    try:
        wait_until(is_ready, 60, (relay,))
        with pytest.raises(HTTPError, match="401"):
            urlopen(f"https://127.0.0.1:{port}/v1/weights", context=trusted)
        request = Request(f"https://127.0.0.1:{port}/v1/weights", headers={"Authorization": "Bearer secret"})
        with urlopen(request, context=trusted) as answer:
            assert json.load(answer)["live"] == str(version(0))
    finally:
        relay.kill()


@pytest.mark.parametrize("role", ["learner", pytest.param("actor", marks=pytest.mark.faults)])
def test_a_service_speaks_tls_to_redis_and_to_its_clients(
    redis_url: str, pki: Path, tmp_path: Path, run: str, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model", hidden_size=32, layers=1)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    port, found = free_port(), {"model": tmp_path / "model", "data": tmp_path / "prompts.jsonl"}
    settings = {f"{role}.tls_cert": pki / "service.pem", f"{role}.tls_key": pki / "service.key"}
    settings |= {f"{role}.port": port, "redis.tls_ca": pki / "ca.pem"}
    flags = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    with tls_proxy(redis_url, pki, ssl.CERT_NONE) as url:
        write_config(tmp_path, run=run, redis_url=url, **found)
        service = Service(tmp_path, role, "--config", "config.toml", *flags)
        monkeypatch.setenv("SSL_CERT_FILE", str(pki / "ca.pem"))

        def answers() -> bool:
            try:
                return bool(ask(f"https://127.0.0.1:{port}", "/v1/status", None, expect={"run"}))
            except LearnerUnreachable:
                return False

        try:
            wait_until(answers, 120, (service,))
            assert service.stop() == 0, service.text
        finally:
            service.kill()
