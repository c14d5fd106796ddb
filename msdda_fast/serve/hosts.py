# SPDX-License-Identifier: Apache-2.0
"""Which names mean this machine, and whose address a connection comes from."""

from __future__ import annotations

from ipaddress import IPv6Address, IPv6Network, ip_address

__all__ = ["address_of", "is_this_machine"]


def is_this_machine(host: str) -> bool:
    """Return whether a host, with or without a port, can mean nothing but loopback."""
    if host.startswith("["):
        name = host[1:].partition("]")[0]
    else:
        name = host.partition(":")[0] if host.count(":") < 2 else host
    name = name.lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def address_of(peer: tuple[str, int] | list[object] | None) -> str:
    """Return the address of a peer; of IPv6 its network of 64 bits, all of which it may use."""
    if not peer:
        return "unknown"
    try:
        address = ip_address(str(peer[0]))
    except ValueError:
        return str(peer[0])
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(IPv6Network((int(address), 64), strict=False))
