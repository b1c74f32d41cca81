"""Addresses of servers as recipes give them: what is wrong with one, before anything waits for it to answer."""

from __future__ import annotations

from urllib.parse import urlsplit

EXAMPLE = "'http://localhost:8000'"


def address_fault(address: str) -> str | None:
    """What must hold of `http://host:port` and does not; None for an address that a server may have."""
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"must be http://host:port ({error})"
    if parts.scheme not in ("http", "https") or not host or any(c.isspace() or not c.isprintable() for c in address):
        return "must be http://host:port"
    return None


def host_fault(host: str) -> str | None:
    """The same of a host without its port."""
    if "/" in host or (":" in host and not host.startswith("[")):
        return "must be a host alone; vllm_server_base_url takes http://host:port"
    return address_fault(f"http://{host}")


def twice(addresses: list[str]) -> str | None:
    """An address that is there more than once: one server would count as several."""
    found = [one.rstrip("/") for one in addresses]
    return next((one for place, one in enumerate(found) if one in found[:place]), None)
