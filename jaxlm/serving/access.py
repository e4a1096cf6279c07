"""Who may ask: API keys, and the names and origins that browsers give."""

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

KEYS = "JAXLM_API_KEYS"  # the environment variable: keys with commas or spaces between them


class Keys:
    """API keys, of which only digests are kept."""

    def __init__(self, keys: Sequence[str] = ()):
        if short := next((key for key in keys if len(key) < 8), None):
            raise UserError(f"an API key has {len(short)} characters: give at least 8")
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def read(cls, file: Path | None) -> Keys:
        """Of a file with a key a line (``#`` begins a comment), and of the environment. UserError for a file without
        keys."""
        keys = re.split(r"[,\s]+", os.environ.get(KEYS, "").strip())
        if file is not None:
            lines = file.read_text(encoding="utf-8").splitlines()
            found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
            if not found:
                raise UserError(f"{file} has no API keys: write one a line")
            keys += found
        return cls([key for key in keys if key])

    def __bool__(self) -> bool:
        return bool(self._digests)

    def know(self, authorization: str) -> bool:
        """Whether a header ``Bearer KEY`` has one of the keys, in a time that does not tell how near it is."""
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(found)


def is_loopback(host: str) -> bool:
    """Whether an address, or the name of a host, is this machine alone."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def host_of(header: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
