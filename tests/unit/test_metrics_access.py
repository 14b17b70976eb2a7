"""Who may read metrics: real HTTPS and passwords over the loopback, and rules that cannot be kept."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import Gauge

from data_pipeline.metrics_access import PASSWORD_VARIABLE, AccessError, read_access
from data_pipeline.metrics_server import MetricsServer

needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None and not os.environ.get("CI"), reason="openssl is not installed (apt-get install openssl)"
)
PASSWORD = "correct horse: battery"


def make_certificate(folder: Path, name: str = "metrics") -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command += [
        "-subj",
        "/CN=slotstream",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        str(key),
        "-out",
        str(certificate),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def write_rules(folder: Path, *lines: str) -> str:
    """A file of rules with paths from its own folder."""
    (folder / "password").write_text(PASSWORD + "\n")
    path = folder / "access.yaml"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def read(server: MetricsServer, scheme: str, user: str = "", password: str = "", trust: Path | None = None) -> str:
    request = urllib.request.Request(f"{scheme}://{server.target}/metrics")
    if user:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())
    context = ssl.create_default_context(cafile=str(trust)) if trust else None
    with urllib.request.urlopen(request, timeout=10, context=context) as answer:
        return answer.read().decode()


def serve(access: str | None) -> MetricsServer:
    server = MetricsServer("127.0.0.1", access)
    Gauge("slotstream_seen", "A value.", registry=server.registry).set(7)
    return server


@needs_openssl
def test_https_with_a_password_answers_whom_it_knows(tmp_path):
    certificate, _ = make_certificate(tmp_path)
    access = write_rules(tmp_path, "certificate: metrics.crt", "key: metrics.key", "user: prometheus", "password_file: password")
    server = serve(access)
    try:
        assert server.labels == {"__scheme__": "https"}
        assert "slotstream_seen 7.0" in read(server, "https", "prometheus", PASSWORD, certificate)
        read_at = server.registry.read_at
        for user, password in (("", ""), ("prometheus", "wrong"), ("root", PASSWORD), ("prometheus", "")):
            with pytest.raises(urllib.error.HTTPError) as refused:
                read(server, "https", user, password, certificate)
            assert refused.value.code == 401 and b"slotstream_seen" not in refused.value.read()
            assert refused.value.headers["WWW-Authenticate"].startswith("Basic")
            refused.value.close()
        assert server.registry.read_at == read_at, "who was refused has not read"
        with pytest.raises(urllib.error.URLError, match="certificate verify failed"):
            read(server, "https", "prometheus", PASSWORD)
    finally:
        server.close()


@needs_openssl
def test_a_client_that_speaks_no_tls_gets_nothing_and_keeps_nobody_waiting(tmp_path, capfd):
    certificate, _ = make_certificate(tmp_path)
    server = serve(write_rules(tmp_path, "certificate: metrics.crt", "key: metrics.key"))
    try:
        with socket.create_connection(("127.0.0.1", server.port)) as silent:  # never begins its handshake
            assert "slotstream_seen 7.0" in read(server, "https", trust=certificate)
            silent.settimeout(0.1)
            with pytest.raises(TimeoutError):
                silent.recv(1)
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            read(server, "http")
        assert "slotstream_seen 7.0" in read(server, "https", trust=certificate)
    finally:
        server.close()
    assert "Traceback" not in "".join(capfd.readouterr())


@needs_openssl
def test_a_renewed_certificate_is_taken_without_a_restart(tmp_path):
    old, key = make_certificate(tmp_path)
    server = serve(write_rules(tmp_path, "certificate: metrics.crt", "key: metrics.key"))
    trusted = shutil.copy(old, tmp_path / "old.crt")
    try:
        read(server, "https", trust=Path(trusted))
        new, new_key = make_certificate(tmp_path, "new")
        shutil.copy(new, old)  # half of the pair: the old one goes on
        read(server, "https", trust=Path(trusted))
        shutil.copy(new_key, key)
        assert "slotstream_seen" in read(server, "https", trust=new)
    finally:
        server.close()


def test_a_password_from_the_environment_without_tls(tmp_path, monkeypatch):
    monkeypatch.setenv(PASSWORD_VARIABLE, PASSWORD)
    server = serve(write_rules(tmp_path, "user: prometheus"))
    try:
        assert server.labels == {} and "slotstream_seen" in read(server, "http", "prometheus", PASSWORD)
        with pytest.raises(urllib.error.HTTPError) as refused:
            read(server, "http")
        refused.value.close()
    finally:
        server.close()


def test_no_rules_let_everybody_in():
    server = serve(None)
    try:
        assert "slotstream_seen 7.0" in read(server, "http")
    finally:
        server.close()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["certificate: metrics.crt"], "belong together"),
        (["certificate: gone.crt", "key: gone.key"], "gone.crt"),
        (["certificate: password", "key: password"], "no pair of PEM files"),
        (["user: prometheus"], PASSWORD_VARIABLE),
        (["user: prometheus", "password_file: nowhere"], "nowhere"),
        (["user: prometheus", "password_file: empty"], "has no password"),
        (["password_file: password"], "without user"),
        (["user: 12", "password_file: password"], "in quotes"),
        (["pasword_file: password"], "did you mean 'password_file'"),
        (["password: secret-in-the-wrong-place: x"], "key: value lines"),
        ([""], "key: value lines"),
    ],
)
def test_rules_that_cannot_be_kept_serve_nothing(tmp_path, monkeypatch, lines, said):
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    (tmp_path / "empty").touch()
    path = write_rules(tmp_path, *lines)
    with pytest.raises(AccessError) as refused:
        MetricsServer("127.0.0.1", path)
    line = str(refused.value.strerror)
    assert said in line and path in line and "\n" not in line and "secret" not in line


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(AccessError, match="nothing.yaml"):
        read_access(tmp_path / "nothing.yaml")


def test_a_password_is_shown_nowhere(tmp_path):
    access = read_access(write_rules(tmp_path, "user: prometheus", "password_file: password"))
    assert access.password == PASSWORD and PASSWORD not in repr(access)


@needs_openssl
def test_a_key_with_a_passphrase_asks_nobody(tmp_path):
    _, key = make_certificate(tmp_path)
    command = ["openssl", "ec", "-aes256", "-passout", "pass:abcd", "-in", str(key), "-out", str(tmp_path / "locked.key")]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(AccessError, match="without a passphrase"):
        read_access(write_rules(tmp_path, "certificate: metrics.crt", "key: locked.key"))
