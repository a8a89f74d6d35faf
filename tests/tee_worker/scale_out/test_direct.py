"""TLS straight into the replica: Ray places and supervises it, and none of its proxies is there."""

from __future__ import annotations

import datetime
import ipaddress
import re
import signal
import socket
from pathlib import Path

import pytest
import requests
import torch

from shmbroker.errors import BadInput
from shmbroker.models import Checkpoint
from shmbroker.models.digests import model_digest
from tee_worker.scale_out.options import Options, check_fleet
from tests.cycling_model import expected
from tests.fleet import running_fleet
from tests.processes import wait_until

KEY = "secret"


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """For 127.0.0.1, signed by itself; and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "replica")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate, private = folder / "tls.crt", folder / "tls.key"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return certificate, private


@pytest.mark.ray
def test_clients_reach_a_replica_over_tls_with_a_key_and_nothing_else_answers(
    cycling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, private = make_certificate(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("SHMBROKER_API_KEY", KEY)
    digest = model_digest(Checkpoint.at(cycling).model(torch.float32))
    trusted = ["--split", "fused", "--trust", "verify", "--model-digest", digest]
    options = [*trusted, "--replicas", "1", "--direct", f"127.0.0.1:{port}", "--tls-cert", str(certificate), "--tls-key", str(private)]
    with running_fleet(cycling, *options) as fleet:
        url = f"https://127.0.0.1:{port}/v1/completions"
        assert fleet.url.startswith(f"https://127.0.0.1:{port}/v1")
        body = {"prompt": "Once", "max_tokens": 20, "temperature": 0}
        allowed = {"Authorization": f"Bearer {KEY}"}
        answer = requests.post(url, json=body, headers=allowed, verify=str(certificate), timeout=300)
        assert answer.json()["choices"][0]["text"] == expected("Once", 20)
        wait_until(
            lambda: [bool(re.fullmatch(r"verify: [1-9]\d* rows checked, 0 rejected", one.trust)) for one in fleet.channels()] == [True]
        )
        assert requests.post(url, json=body, verify=str(certificate), timeout=300).status_code == 401
        with pytest.raises(requests.exceptions.SSLError):
            requests.post(url, json=body, headers=allowed, timeout=300)
        with pytest.raises(requests.exceptions.ConnectionError):
            requests.post(url.replace("https", "http"), json=body, headers=allowed, timeout=300)
        assert not [command for command in fleet.processes().values() if "ray::Proxy" in command or "Ingress" in command]
        (folder,) = fleet.folders_of_ray()
        assert folder.is_dir()
        assert fleet.terminate() == 128 + signal.SIGTERM
        wait_until(lambda: not fleet.processes())
        assert not fleet.left()
        assert not folder.exists()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"direct": "8443"}, "HOST:PORT"),
        ({"direct": "0.0.0.0:0"}, "HOST:PORT"),
        ({"direct": "0.0.0.0:8443"}, "--tls-cert"),
        ({"direct": "0.0.0.0:8443", "tls_cert": "c"}, "--tls-key"),
        ({"direct": "0.0.0.0:8443", "tls_cert": "c", "tls_key": "k"}, "API key"),
        ({"tls_cert": "c"}, "are for --direct"),
    ],
)
def test_it_is_refused_without_what_keeps_others_out(fields: dict[str, str], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        check_fleet(Options(model="m", **fields))  # type: ignore[arg-type]
