"""Content Credentials (C2PA): a signed statement inside a file; it says how the file was made and who signed it, and reveals changes.

`c2pa-python`, from the extra `c2pa`, does the work. Signing uses no network: there are no time stamps of an authority, so a signature is
valid only as long as its certificate, and no revocation checks.
"""

from __future__ import annotations

import base64
import importlib.util
import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec

import movieq
from movieq.errors import SettingsError, Unsigned
from movieq.settings import Settings, variable

SOURCES: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/"
"""URL prefix of IPTC's digital source types."""

_CURVES: Final = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
_OPTIONS: Final = {
    # the signer checks its own signature; whether to trust the certificate is for the receivers of the file to decide
    "verify": {"verify_after_sign": True, "verify_trust": False, "remote_manifest_fetch": False, "ocsp_fetch": False},
    "builder": {"thumbnail": {"enabled": False}},
}
_PIXEL: Final = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
"""A PNG of one pixel, signed on trial."""


class Claim(msgspec.Struct, frozen=True):
    """The statement to sign about a file.

    `source` is the name of its IPTC digital source type, `agent` the program that rendered it, `details` the data of movieq's assertion.
    """

    title: str
    source: str
    agent: str
    agent_version: str | None
    details: dict[str, Any]


class Credentials(msgspec.Struct, frozen=True):
    """A certificate and its private key. Its text never shows the key."""

    name: str
    """Name of the certificate's holder."""
    expires: datetime
    _algorithm: str
    _chain: bytes
    _key: bytes

    def __repr__(self) -> str:
        return f"Credentials({self.name!r})"

    def sign(self, path: Path, content_type: str, claim: Claim) -> None:
        """Write the signed claim into the file. Blocking; uses memory of twice the file's size.

        Raises Unsigned, and leaves the file unchanged, if signing fails.
        """
        signed = path.with_name(f"{path.name}.signed")
        try:
            with path.open("rb") as source, signed.open("w+b") as dest:
                self._sign(content_type, claim, source, dest)
            signed.replace(path)
        finally:
            signed.unlink(missing_ok=True)

    def _sign(self, content_type: str, claim: Claim, source: Any, dest: Any) -> None:
        import c2pa

        try:
            signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(self._algorithm, self._chain, self._key, None))
            with c2pa.Context.from_dict(_OPTIONS, signer=signer) as context, c2pa.Builder(_manifest(claim), context) as builder:
                builder.sign(content_type, source, dest)
        except c2pa.C2paError as error:
            raise Unsigned(f"{claim.title} cannot be signed: {error}") from error


def load(settings: Settings) -> Credentials | None:
    """Return the credentials of the settings, or None where none are set.

    Raises SettingsError if they are incomplete, expired, or fail to sign a small picture.
    """
    certificate, key = settings.c2pa_certificate, settings.c2pa_key
    if not certificate and not key:
        if settings.c2pa_required:
            raise SettingsError(
                f"{variable('c2pa_required')} is set: name a certificate and key: {variable('c2pa_certificate')}, {variable('c2pa_key')}"
            )
        return None
    if not certificate or not key:
        missing = variable("c2pa_key" if certificate else "c2pa_certificate")
        raise SettingsError(f"{missing} is not set: set both the certificate and its key, or neither")
    if importlib.util.find_spec("c2pa") is None:
        raise SettingsError(f"{variable('c2pa_certificate')} is set, but c2pa-python is not installed: pip install 'movieq[c2pa]'")
    found = read(Path(certificate), Path(key))
    if found.expires <= datetime.now(UTC):
        raise SettingsError(f"{variable('c2pa_certificate')}: {certificate} expired on {found.expires:%Y-%m-%d}: renew it")
    try:
        _try(found)
    except Unsigned as error:
        raise SettingsError(f"{variable('c2pa_certificate')}: {certificate} cannot sign: {error.message}") from None
    return found


def read(certificate: Path, key: Path) -> Credentials:
    """Return the credentials in these files, valid or expired. Raises SettingsError."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.x509.oid import NameOID

    try:
        chain = x509.load_pem_x509_certificates(certificate.read_bytes())
    except (OSError, ValueError) as error:
        raise SettingsError(f"{variable('c2pa_certificate')}: {certificate} is not a readable PEM certificate chain: {error}") from None
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:  # TypeError: it has a password
        problem = type(error).__name__  # its text could show a part of the key
        raise SettingsError(f"{variable('c2pa_key')}: {key} is not a readable PEM private key without a password: {problem}") from None
    leaf = chain[0]
    if leaf.public_key() != private.public_key():
        raise SettingsError(f"{variable('c2pa_key')}: {key} is not the key of the first certificate in {certificate}")
    names = leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME) or leaf.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    return Credentials(
        str(names[0].value) if names else leaf.subject.rfc4514_string(),
        leaf.not_valid_after_utc,
        _algorithm(private),
        b"".join(each.public_bytes(serialization.Encoding.PEM) for each in chain),
        private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def _algorithm(key: Any) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    match key:
        case ec.EllipticCurvePrivateKey() if key.curve.name in _CURVES:
            return _CURVES[key.curve.name]
        case rsa.RSAPrivateKey():
            return "ps256"
        case ed25519.Ed25519PrivateKey():
            return "ed25519"
    raise SettingsError(f"{variable('c2pa_key')}: unsupported key type; use {', '.join(_CURVES)}, RSA or Ed25519")


def _try(credentials: Credentials) -> None:
    """Sign a small picture, so that a bad certificate is found at start and not after hours of rendering."""
    claim = Claim("a trial", "algorithmicMedia", "movieq", None, {})
    credentials._sign("image/png", claim, io.BytesIO(_PIXEL), io.BytesIO())


def _manifest(claim: Claim) -> dict[str, Any]:
    """Return the claim as a C2PA manifest: one `c2pa.created` action and movieq's own assertion."""
    agent = {"name": claim.agent} | ({"version": claim.agent_version} if claim.agent_version else {})
    created = {"action": "c2pa.created", "digitalSourceType": f"{SOURCES}{claim.source}", "softwareAgent": agent}
    return {
        "claim_generator_info": [{"name": "movieq", "version": movieq.__version__}],
        "title": claim.title,
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [created]}},
            {"label": "movieq.generation", "data": claim.details},
        ],
    }
