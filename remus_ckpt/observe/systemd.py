"""Messages to systemd: readiness, status and the watchdog."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> bool:
    """Send a message to systemd, if it started us: "READY=1", "STATUS=…", "WATCHDOG=1" or "STOPPING=1".

    Returns whether it was sent. Never raises because systemd is absent.
    Source: sd_notify(3).
    """
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where.startswith(("/", "@")):
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(1.0)
            sock.sendto(state.encode(), f"\0{where[1:]}" if where.startswith("@") else where)
    except OSError:  # nobody listens there, or no descriptor is left
        return False
    return True


def watchdog_interval_s() -> float | None:
    """How often to send "WATCHDOG=1": half the time that systemd allows; None if it does not watch us.

    Source: sd_watchdog_enabled(3).
    """
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", "")
    if not microseconds.isdigit() or int(microseconds) == 0 or pid not in ("", str(os.getpid())):
        return None
    return int(microseconds) / 2e6
