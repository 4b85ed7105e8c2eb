"""Who asks, and how urgent it is: what the engines' fair share goes by. Keeps no key and no address beyond a request."""

from __future__ import annotations

import hashlib
import secrets

from starlette.datastructures import Headers

from ollamapy.engine.protocol import Caller, ServiceTier
from ollamapy.errors import BadRequest

TIER_HEADER = "X-Service-Tier"
_SECRET = secrets.token_bytes(16)
_TIERS: dict[str, ServiceTier] = {
    "": "default",
    "auto": "default",
    "default": "default",
    "standard_only": "default",
    "scale": "default",
    "priority": "priority",
    "flex": "flex",
    "batch": "flex",
}


def caller_of(headers: Headers, address: str) -> Caller:
    """By the address that the request comes from. Without a port, as a program opens as many connections as it likes; without a
    key, as it makes up as many as it likes, or has the one that everyone has. An unknown tier of the header is the default."""
    key = key_of(headers)
    # The same after a restart, as prefixes on disk are; the engine hashes it with a secret.
    salt = hashlib.blake2b(key.encode(), digest_size=16).hexdigest() if key else ""
    return Caller(address, _TIERS.get(headers.get(TIER_HEADER, "").lower(), "default"), salt)


def with_key(caller: Caller, key: str) -> Caller:
    """By a key that this server knows, from wherever the request comes."""
    client = f"key {hashlib.blake2b(key.encode(), digest_size=8, key=_SECRET).hexdigest()}"
    return Caller(client, caller.tier, caller.salt)


def key_of(headers: Headers) -> str:
    """The key that a request carries, "" where there is none: of `Authorization: Bearer KEY`, or of `x-api-key`."""
    scheme, _, key = headers.get("authorization", "").strip().partition(" ")
    return (key.strip() if scheme.lower() == "bearer" else scheme) or headers.get("x-api-key", "").strip()


def with_tier(caller: Caller, asked: str) -> Caller:
    """The tier of a request's body goes before the header's. Raises BadRequest for one that is unknown."""
    if not asked:
        return caller
    tier = _TIERS.get(asked)
    if tier is None:
        raise BadRequest(f"invalid service_tier: {asked!r} (must be one of {', '.join(filter(None, _TIERS))})")
    return Caller(caller.client, tier, caller.salt)
