"""Chains of certificates, generated when needed: for signing, like those of a C2PA authority except for its name, and for TLS."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)
HOLDER = "Lighthouse Pictures"


class Chain(NamedTuple):
    """A chain of certificates: files to name in settings, and the root that a reader must trust."""

    certificate: Path
    key: Path
    root: str

    @property
    def settings(self) -> dict[str, str]:
        """The variables that name the files."""
        return {"MOVIEQ_C2PA_CERTIFICATE": str(self.certificate), "MOVIEQ_C2PA_KEY": str(self.key)}


def new_key(kind: str) -> Any:
    """Return a private key: es256, es384, ps256 or ed25519."""
    match kind:
        case "es256":
            return ec.generate_private_key(ec.SECP256R1())
        case "es384":
            return ec.generate_private_key(ec.SECP384R1())
        case "ps256":
            return rsa.generate_private_key(65537, 2048)
    return ed25519.Ed25519PrivateKey.generate()


def chain(folder: Path, *, kind: str = "es256", days: float = 90, signs: bool = True) -> Chain:
    """Return a certificate of `HOLDER`, valid for this many days from yesterday, under a root; `signs`: whether it allows signing."""
    folder.mkdir(parents=True, exist_ok=True)
    root_key, key = new_key("es256"), new_key(kind)
    root = _certificate("A root of the tests", "A root of the tests", root_key, root_key, 365, "key_cert_sign")
    leaf = _certificate(HOLDER, "A root of the tests", key, root_key, days, "digital_signature" if signs else "key_agreement")
    (folder / "chain.pem").write_bytes(_pem(leaf) + _pem(root))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return Chain(folder / "chain.pem", folder / "key.pem", _pem(root).decode())


def tls(folder: Path, name: str) -> tuple[Path, ssl.SSLContext]:
    """Return the certificate of an authority, and a TLS context of a server with this name, whose certificate it signed."""
    root_key, key = new_key("es256"), new_key("es256")
    root = _certificate("A root of the tests", "A root of the tests", root_key, root_key, 30, "key_cert_sign", name)
    (folder / "ca.pem").write_bytes(_pem(root))
    (folder / "server.pem").write_bytes(
        _pem(_certificate(name, "A root of the tests", key, root_key, 30, "digital_signature", name))
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    return folder / "ca.pem", context


def _certificate(
    subject: str, issuer: str, key: Any, issuer_key: Any, days: float, usage: str, host: str | None = None
) -> x509.Certificate:
    begin = datetime.now(UTC) - timedelta(days=1)
    purpose = ExtendedKeyUsageOID.EMAIL_PROTECTION if host is None else ExtendedKeyUsageOID.SERVER_AUTH
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=key is issuer_key, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**{each: each == usage for each in _USAGES}), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host or "unnamed.example")]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "movieq tests"), x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
