"""Files of watermark keys: JSON with the kind of watermark, and a secret in hexadecimal for each key's name."""

import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from palindrome.model.watermarks import KINDS, Keys, Watermark
from palindrome.pipeline.storage.folder import file_at

FORMAT, VERSION = "palindrome_watermark", 1
BYTES = 32  # of a secret


def new_keys(watermark: Watermark, names: Sequence[str], seed: int | None = None) -> Keys:
    """Keys with secrets from the system's source of randomness or, with a `seed`, from that and the names: who knows
    those knows the secrets."""

    def secret(name: str) -> bytes:
        if seed is None:
            return secrets.token_bytes(BYTES)
        return hashlib.sha256(f"{watermark.METHOD} {seed} {name}".encode()).digest()

    return Keys(watermark, {name: secret(name) for name in names})


def write_keys(keys: Keys, uri: str) -> None:
    """On a disk for nobody else to read."""
    folder, name = file_at(uri)
    folder.put(name, (json.dumps(_content(keys), indent=2) + "\n").encode())
    if folder.is_local:
        Path(folder.path(name)).chmod(0o600)


def read_keys(uri: str) -> Keys:
    """Raises OSError for a file that can't be read, and ValueError for one that has no keys."""
    folder, name = file_at(uri)
    content = folder.read(name)
    try:
        found = json.loads(content)
        if found[FORMAT] != VERSION:
            raise ValueError(f"its version is {found[FORMAT]}, and this Palindrome reads {VERSION}")
        kind = KINDS[found["method"]]
        how = {name: _value(value) for name, value in found.items() if name not in (FORMAT, "method", "keys")}
        named = {str(name): bytes.fromhex(secret) for name, secret in found["keys"].items()}
        if not named or not all(named.values()):
            raise ValueError("it has no key, or an empty one")
        return Keys(kind(**how), named)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{uri} is no file of keys by palindrome watermark: {type(e).__name__}: {e}") from e


def record(keys: Keys) -> dict[str, Any]:
    """What run.json has of keys: all but the secrets, of which it has a digest."""
    content = _content(keys)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {**content, "keys": len(keys.secrets), "digest": digest}


def _content(keys: Keys) -> dict[str, Any]:
    named = {name: secret.hex() for name, secret in keys.secrets.items()}
    return {FORMAT: VERSION, "method": keys.watermark.METHOD, **asdict(keys.watermark), "keys": named}


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
