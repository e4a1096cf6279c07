"""Who may use the server: API keys, and the host names that browsers send."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from jaxlm.core.errors import UserError

__all__ = ["API_KEYS_VARIABLE", "ApiKeys", "client_network", "host_name", "is_loopback", "parse_origin"]

API_KEYS_VARIABLE = "JAXLM_API_KEYS"  # the environment variable: keys separated by commas or spaces
_MIN_LENGTH = 8


class ApiKeys:
    """A set of API keys. Only their digests are stored.

    Raises:
        UserError: when a key is too short.
    """

    def __init__(self, keys: Sequence[str] = ()):
        if short := next((key for key in keys if len(key) < _MIN_LENGTH), None):
            raise UserError(f"an API key has {len(short)} characters: give at least {_MIN_LENGTH}")
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def load(cls, file: Path | None) -> ApiKeys:
        """The keys of a file (one per line; ``#`` begins a comment) and of the environment variable JAXLM_API_KEYS.

        Raises:
            UserError: when the file has no keys.
        """
        keys = re.split(r"[,\s]+", os.environ.get(API_KEYS_VARIABLE, "").strip())
        if file is not None:
            lines = file.read_text(encoding="utf-8").splitlines()
            found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
            if not found:
                raise UserError(f"{file} has no API keys: write one per line")
            keys += found
        return cls([key for key in keys if key])

    def __bool__(self) -> bool:
        return bool(self._digests)

    @staticmethod
    def client(authorization: str) -> str:
        """A name for whoever sends this header, which is not the key."""
        return hashlib.sha256(authorization.partition(" ")[2].strip().encode()).hexdigest()[:16]

    def accept(self, authorization: str) -> bool:
        """Whether the header ``Bearer KEY`` has one of the keys. The time does not depend on how similar it is."""
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(found)


def is_loopback(host: str) -> bool:
    """Whether an address or a host name means only this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def client_network(address: str) -> str:
    """What stands for a client without a key: its address, or of an IPv6 address the first 64 bits, which one client
    usually has to itself."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4 or parsed.ipv4_mapped:
        return str(getattr(parsed, "ipv4_mapped", None) or parsed)
    return str(ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))


def parse_origin(text: str) -> str:
    """An origin as browsers send it: scheme, host, and the port unless it is that of the scheme; ``*`` is any.

    Raises:
        UserError: when the text is no origin.
    """
    if text == "*":
        return text
    try:
        parts = urlsplit(text)
        scheme, host, port = parts.scheme, parts.hostname or "", parts.port
    except ValueError:
        scheme = host = ""
    if scheme not in ("http", "https") or not host or text.strip("/").count("/") != 2 or "@" in text:
        raise UserError(f"the origin {text!r} is not one: write scheme, host and port only, as in https://example.org")
    if ":" in host:
        host = f"[{host}]"
    return f"{scheme}://{host}" + ("" if port in (None, {"http": 80, "https": 443}[scheme]) else f":{port}")


def host_name(header: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
