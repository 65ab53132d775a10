"""Frames that tell a network behind which port a guest is now. Bytes only, no I/O.

Source: RFC 826 and RFC 5227 (ARP), RFC 903 (RARP), RFC 4861 (unsolicited neighbour advertisements).
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass

_BROADCAST = b"\xff" * 6
_ALL_NODES = bytes.fromhex("ff02") + bytes(13) + b"\1"
_ALL_NODES_MAC = bytes.fromhex("333300000001")


@dataclass(frozen=True, slots=True)
class Addresses:
    """The addresses of a guest's NIC.

    macs: of 6 bytes each
    ips: each with the MAC it belongs to, of 4 or 16 bytes
    """

    macs: tuple[bytes, ...] = ()
    ips: tuple[tuple[bytes, bytes], ...] = ()


def announcements(addresses: Addresses) -> list[bytes]:
    """A frame for each address: ARP for IPv4, an advertisement for IPv6. For a MAC without either, RARP, from which
    switches still learn its port.

    Raises ValueError if an address has none of these lengths.
    """
    with_ip = {mac for mac, _ in addresses.ips}
    frames = [_announce(mac, ip) for mac, ip in addresses.ips]
    return frames + [_arp(mac, 0x8035, 3, bytes(4), mac) for mac in _only_macs(addresses.macs, with_ip)]


def _only_macs(macs: Iterable[bytes], but: Collection[bytes]) -> Iterable[bytes]:
    for mac in macs:
        if len(mac) != 6:
            raise ValueError(f"a MAC address has 6 bytes, not {len(mac)}")
        if mac not in but:
            yield mac


def _announce(mac: bytes, ip: bytes) -> bytes:
    if len(mac) != 6 or len(ip) not in {4, 16}:
        raise ValueError(f"a MAC address has 6 bytes and an IP address 4 or 16, not {len(mac)} and {len(ip)}")
    return _arp(mac, 0x0806, 1, ip, bytes(6)) if len(ip) == 4 else _advertisement(mac, ip)


def _arp(mac: bytes, kind: int, operation: int, ip: bytes, target: bytes) -> bytes:
    """ARP or RARP, Ethernet and IPv4; both protocol addresses are the guest's."""
    fixed = struct.pack(">6s6sHHHBBH", _BROADCAST, mac, kind, 1, 0x0800, 6, 4, operation)
    return fixed + mac + ip + target + ip


def _advertisement(mac: bytes, ip: bytes) -> bytes:
    """To all nodes, with the flag to override what they know and the option that names the MAC."""
    override = 1 << 29
    body = struct.pack(">BBHI", 136, 0, 0, override) + ip + b"\2\1" + mac
    pseudo = ip + _ALL_NODES + struct.pack(">II", len(body), 58)
    body = body[:2] + struct.pack(">H", _checksum(pseudo + body)) + body[4:]
    header = struct.pack(">IHBB", 6 << 28, len(body), 58, 255) + ip + _ALL_NODES
    return _ALL_NODES_MAC + mac + b"\x86\xdd" + header + body


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
