"""QEMU's command line: what can be protected, what protection adds, and the form for another host.

Anything unknown is refused by name. On the standby's side this is a matter of safety, not only of state: the command
line comes from a peer and is read by the same tables, so it can start nothing but QEMU, and can name no file whose
contents the peer does not know (`part.Machine.files`).

Source: QEMU, qemu-options.hx and softmmu/vl.c (7.2 to 10.0).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from remus_ckpt.errors import VmError
from remus_ckpt.vm.options import chardev_of, escaped, is_on, joined, pairs_of

RAM_ID = "remus-ram"
_PROGRAM = re.compile(r"qemu-system-[a-z0-9_]+")
_DEFAULT_MEMORY = 128 << 20
_IDENT = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_GLOBAL = re.compile(r"([^.=,]{1,63})\.([^=,]{1,63})=(.*)", re.DOTALL)
"""QEMU takes whatever does not look like this for driver=…,property=…,value=…"""
_UNITS = {"": 1 << 20, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_MAX_MEMORY = 1 << 50


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_FLAGS = _set("nodefaults no-user-config no-acpi no-hpet no-fd-bootchk no-reboot no-shutdown usb enable-kvm")
"""Options without a value that travel as they are."""
_OTHER_FLAGS = _set("S s daemonize snapshot nographic curses preconfig mem-prealloc singlestep full-screen")

_PORTABLE = _set(
    "name uuid m smp cpu machine M accel kernel initrd append bios boot rtc smbios fw_cfg global action "
    "watchdog-action device object vga display"
)
"""Options with a value that travel, after the checks below."""
_CONSOLES = _set("serial parallel monitor debugcon")
"""Each is a character device: the other host has its own."""
_LOCAL = _set("pidfile D d trace msg sandbox overcommit runas run-with chroot user gdb qmp qmp-pretty mon k L")
"""For this host only: they do not travel."""

_REFUSED = {
    "snapshot": "what the guest writes to its disks would go to a temporary file: leave it out",
    "daemonize": "QEMU must stay a child of this command: leave it out",
    "incoming": "QEMU would wait for another machine's state: leave it out",
    "loadvm": "load it with QMP after the start: leave it out",
    "mem-path": "RAM gets a file of its own: leave it out",
    "mem-prealloc": "RAM gets a file of its own: leave it out",
    "numa": "RAM has to be one piece: leave it out",
    "readconfig": "the contents of that file are not seen here: write them on the command line",
    "vnc": "a screen is memory of a graphics adapter, which is not saved: leave it out, and use a serial console",
    "spice": "a screen is memory of a graphics adapter, which is not saved: leave it out, and use a serial console",
    "virtfs": "QEMU does not save a mounted shared folder: leave it out",
    "fsdev": "QEMU does not save a mounted shared folder: leave it out",
    "tpmdev": "a TPM keeps its state in another process: leave it out",
    "pflash": "firmware with variables has memory of its own: use the default BIOS",
    "blockdev": "give the disk with -drive file=…,format=…",
    "preconfig": "QEMU would wait for commands: leave it out",
    "curses": "use -nographic",
}
"""Known to be impossible, and what to do instead."""

_DEVICES = re.compile(
    r"virtio-(net|blk|scsi|rng|serial|keyboard|mouse|tablet)(-pci(-(non-)?transitional)?)?|virtserialport|virtconsole"
    r"|e1000e?|e1000-82544gc|e1000-82545em|rtl8139|ne2k_pci|pcnet|i8255[0-9][a-c]?"
    r"|scsi-(cd|hd)|ide-(cd|hd)|(ich9-)?ahci|lsi53c895a|pvscsi"
    r"|isa-serial|pci-serial(-[24]x)?|isa-debug-exit|isa-debugcon|pvpanic(-pci)?|i6300esb|ib700|vmcoreinfo|vmgenid"
    r"|pcie-root-port|pci-bridge|ioh3420|i82801b11-bridge"
    r"|(ich9-|piix[34]-)?usb-[eu]hci[1-6]?|(qemu|nec-usb)-xhci|usb-(tablet|kbd|mouse|hub)"
)
"""Devices whose whole state is in guest memory and in what QEMU saves. `QemuSource` looks for memory of others."""
_DEVICE_REFUSED = (
    (re.compile(r".*vga|.*gpu.*|qxl|ramfb|bochs-display|vmware-svga"), "it has memory of its own, which is not saved"),
    (re.compile(r"virtio-balloon.*|pc-dimm|nvdimm|virtio-(mem|pmem).*"), "the size of RAM must not change"),
    (re.compile(r"vfio-.*|vhost-.*|ivshmem.*|usb-host"), "part of its state is outside QEMU"),
)
_DEVICE_FILES = _set("romfile file sysfsdev host path")
"""Properties that would name something of the host; an empty romfile names nothing."""
_MACHINE_KEYS = _set(
    "type accel suppress-vmdesc usb hpet smm vmport kernel-irqchip kernel_irqchip graphics mem-merge dump-guest-core "
    "acpi pit pic rtc i8042 smbus sata isa-serial pcie max-ram-below-4g"
)
_DRIVE_KEYS = _set(
    "file if index bus unit media format readonly read-only id cache cache.direct cache.no-flush cache.writeback aio "
    "discard serial werror rerror detect-zeroes"
)
_OBJECTS = _set("iothread rng-builtin throttle-group")
_NETWORK = _set("nic netdev net")
_NETDEV_KEYS = _set("type id ifname script downscript")
_NIC_KEYS = _NETDEV_KEYS | {"model", "mac"}
_MODELS = {"virtio": "virtio-net-pci"}
"""Short names of -nic."""


@dataclass(frozen=True, slots=True)
class Nic:
    """A network adapter of the guest. ident: of its -netdev; tap: the host's device that it is connected to"""

    ident: str
    tap: str

    def on_bridge(self, fd: int) -> str:
        """Its -netdev where a bridge has the other end of this socket."""
        return f"dgram,id={self.ident},local.type=fd,local.str={fd}"

    def unplugged(self, number: int) -> str:
        """Its -netdev where nothing is connected to it."""
        return f"hubport,id={self.ident},hubid={number}"


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk that the guest writes to. ident: of its -drive; path: of its file on the guest's own host"""

    ident: str
    path: str


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A QEMU command line that can be protected.

    program: as given; its name travels
    here: the arguments for this host, without what `with_memory` adds
    portable: the arguments for any host: without files for logs, sockets and terminals
    memory_bytes: of RAM
    files: of the host, that QEMU reads: absolute paths
    nics: network adapters, in their order
    disks: that the guest writes to
    host_cpu: whether the guest sees the host's CPU
    kvm: whether it runs on KVM
    changes: what protection has changed, in words
    """

    program: str
    here: tuple[str, ...]
    portable: tuple[str, ...]
    memory_bytes: int
    files: tuple[str, ...] = ()
    nics: tuple[Nic, ...] = ()
    disks: tuple[Disk, ...] = ()
    host_cpu: bool = False
    kvm: bool = False
    changes: tuple[str, ...] = ()

    @property
    def qemu(self) -> str:
        """The name of the program."""
        return os.path.basename(self.program)

    @classmethod
    def parse(cls, words: Sequence[str]) -> CommandLine:
        """Read a command line, program first. Raises VmError with everything that cannot be protected."""
        if not words:
            raise VmError("no QEMU command line: put it after --")
        return _Reader(words[0]).read(words[1:])

    @classmethod
    def from_peer(cls, qemu: str, arguments: Sequence[str]) -> CommandLine:
        """Read the portable form that came from another host. Raises VmError if it is not one."""
        if not _PROGRAM.fullmatch(qemu):
            raise VmError(f"{qemu!r:.60} is not a QEMU: its name must be qemu-system-…")
        found = cls.parse([qemu, *arguments])
        if found.portable != tuple(arguments):
            raise VmError(f"the command line of the guest is not in its portable form: {list(found.portable)!r:.300}")
        return found

    def with_memory(self, ram: str | Path, qmp: str | Path, sockets: Sequence[int] = ()) -> list[str]:
        """The command line that protection needs on this host.

        ram: the file that is RAM; made by QEMU if it does not exist
        qmp: the socket for control
        sockets: for each NIC a descriptor that QEMU inherits, whose other end the bridge has
        """
        return [self.program, *self._plugged(self.here, sockets), *additions(self.memory_bytes, ram, qmp)]

    def _plugged(self, words: Sequence[str], sockets: Sequence[int]) -> list[str]:
        """The arguments with the NICs connected to these sockets; to nothing, without any."""
        plugged, nics = [], enumerate(self.nics)
        for before, word in zip((None, *words), words, strict=False):
            if before == "-netdev":
                number, nic = next(nics)
                word = nic.on_bridge(sockets[number]) if sockets else nic.unplugged(number)
            plugged.append(word)
        return plugged

    def as_standby(
        self,
        ram: str | Path,
        qmp: str | Path,
        console: Callable[[str], str],
        sockets: Sequence[int] = (),
        disks: Mapping[str, Path | str] | None = None,
    ) -> list[str]:
        """The command line of a QEMU that waits to continue this guest. `ram` holds its memory by then.

        console: makes a character device for this host, such as "null", from a name such as "serial0"
        sockets: as for `with_memory`
        disks: the raw image of each disk here, by its ident, or whatever QEMU opens instead
        Raises VmError if a disk has no image here.
        """
        words, counts = [], dict.fromkeys(_CONSOLES, 0)
        rest = iter(self._plugged(self.portable, sockets))
        for word in rest:
            words.append(word)
            name = word.removeprefix("-")
            if name in _CONSOLES:
                next(rest)
                words.append("none" if name == "monitor" else console(f"{name}{counts[name]}"))
                counts[name] += 1
            elif name == "chardev":
                ident = dict(pairs_of(next(rest), "backend"))["id"]
                words.append(f"{chardev_of(console(ident))},id={ident}")
            elif name == "drive":
                words.append(self._drive_here(next(rest), disks or {}))
            elif name == "cdrom":
                words[-1:] = ["-drive", _cdrom_of(next(rest))]
        added = additions(self.memory_bytes, ram, qmp)
        return [self.program, *words, *added, "-S", "-incoming", "defer"]

    def _drive_here(self, value: str, images: Mapping[str, Path | str]) -> str:
        """A -drive of the portable form, with the disk's image here instead of its own file."""
        pairs = dict(pairs_of(value, "file"))
        ident = pairs.get("id", "")
        if ident not in {disk.ident for disk in self.disks}:
            return _as_raw(pairs)
        if (image := images.get(ident)) is None:
            raise VmError(f"the disk {ident} of the guest has no image here")
        return joined(pairs | {"file": str(image)})


def _as_raw(pairs: dict[str, str]) -> str:
    """A -drive that the guest only reads. QEMU would take the format from the contents, and with it names of other
    files, such as that below a qcow2."""
    return joined(pairs | {"format": "raw"} if pairs.get("file") else pairs)


def _cdrom_of(path: str) -> str:
    """The -drive that -cdrom stands for."""
    return _as_raw({"file": path, "index": "2", "media": "cdrom"})


def additions(memory_bytes: int, ram: str | Path, qmp: str | Path) -> list[str]:
    """What protection adds to a command line."""
    backend = f"memory-backend-file,id={RAM_ID},size={memory_bytes}B,mem-path={escaped(str(ram))},share=on"
    return [
        *("-object", backend),
        *("-machine", f"memory-backend={RAM_ID},suppress-vmdesc=on"),
        *("-global", "migration.send-configuration=off"),
        *("-qmp", f"unix:{escaped(str(qmp))},server=on,wait=off"),
    ]


def without_additions(words: Sequence[str], taps: Sequence[str] = ()) -> list[str]:
    """The command line of a running QEMU, without what protection has added to it, as a primary's or as a standby's.

    taps: the devices that its bridge connects it to
    """
    kept: list[str] = []
    devices = iter(taps)
    rest = iter(words)
    for word in rest:
        name = word.lstrip("-") if word.startswith("-") else ""
        if name == "S":
            continue
        if name not in ("object", "machine", "M", "global", "qmp", "incoming", "netdev"):
            kept.append(word)
            continue
        value = next(rest, "")
        if name == "netdev" and value.startswith("dgram,") and (tap := next(devices, None)) is not None:
            kept += [word, f"tap,id={dict(pairs_of(value, 'type'))['id']},ifname={tap}"]
            continue
        if name in ("machine", "M"):
            keys = [one for one in value.split(",") if not one.startswith(("memory-backend=", "suppress-vmdesc="))]
            kept += [word, ",".join(keys)] if keys else []
        elif not (
            name in ("qmp", "incoming")
            or (name == "object" and value.startswith("memory-backend-file"))
            or (name == "global" and value.startswith("migration."))
        ):
            kept += [word, value]
    return kept


@dataclass
class _Reader:
    """Reads one command line."""

    program: str
    here: list[str] = field(default_factory=list)
    portable: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    given: set[str] = field(default_factory=set)
    memory_bytes: int = 0
    host_cpu: bool = False
    kvm: bool = False
    is_nographic: bool = False
    is_q35: bool = False
    nics: list[Nic] = field(default_factory=list)
    disks: list[Disk] = field(default_factory=list)
    cards: list[tuple[str, str, str]] = field(default_factory=list)

    def read(self, words: Sequence[str]) -> CommandLine:
        if not _PROGRAM.fullmatch(os.path.basename(self.program)):
            raise VmError(f"{self.program} is not a QEMU: give a command line that begins with qemu-system-…")
        rest = iter(words)
        for word in rest:
            if not word.startswith("-") or word == "-":
                self.faults.append(f"{word}: give this disk as -drive file={word},format=raw (or qcow2)")
                continue
            name = word.removeprefix("-").removeprefix("-")
            if name in _FLAGS | _OTHER_FLAGS:
                self._flag(name)
                continue
            value = next(rest, None)
            if value is None:
                self.faults.append(f"-{name}: its value is missing, or it is an option that is not known here")
                continue
            self.given.add(name)
            try:
                self._option(name, value)
            except VmError as error:
                self.faults.append(str(error))
        try:
            self._defaults()
        except VmError as error:
            self.faults.append(str(error))
        if self.faults:
            raise VmError("this QEMU cannot be protected:\n  " + "\n  ".join(self.faults))
        return CommandLine(
            self.program,
            tuple(self.here),
            tuple(self.portable),
            self.memory_bytes,
            tuple(self.files),
            tuple(self.nics),
            tuple(self.disks),
            self.host_cpu,
            self.kvm,
            tuple(self.changes),
        )

    def _both(self, *words: str) -> None:
        self.here += words
        self.portable += words

    def _flag(self, name: str) -> None:
        self.given.add(name)
        if name in _REFUSED:
            self.faults.append(f"-{name}: {_REFUSED[name]}")
        elif name in _FLAGS:
            self._both(f"-{name}")
            self.kvm = self.kvm or name == "enable-kvm"
        elif name == "nographic":
            self.is_nographic = True
            self.here.append("-nographic")
        elif name == "S":
            self.here.append("-S")
        elif name == "s":
            self.here.append("-s")
        else:
            self.faults.append(f"-{name}: not known here: leave it out")

    def _option(self, name: str, value: str) -> None:
        if name in _REFUSED:
            raise VmError(f"-{name}: {_REFUSED[name]}")
        if name in _NETWORK:
            self._network(name, value)
        elif name in _CONSOLES:
            self.here += (f"-{name}", value)
            self.portable += (f"-{name}", "none" if value == "none" or name == "monitor" else "null")
        elif name == "chardev":
            self._chardev(value)
        elif name == "drive":
            self._drive(value)
        elif name == "cdrom":
            self._cdrom(value)
        elif name in _LOCAL:
            self.here += (f"-{name}", value)
        elif name in _PORTABLE:
            check = getattr(self, "_" + name.replace("-", "_"), None)
            value = value if check is None else check(value)
            self._both(f"-{name}", value)
        else:
            raise VmError(f"-{name}: not known here: leave it out")

    # One method for each option that needs a look; it returns the value to pass on.

    def _m(self, value: str) -> str:
        pairs = dict(pairs_of(value, "size"))
        if set(pairs) - {"size"}:
            raise VmError("-m: RAM that can grow cannot be protected: leave out slots and maxmem")
        match = re.fullmatch(r"(\d{1,12})([BKMGT]?)", pairs.get("size", "").upper())
        if not match or not 0 < (size := int(match[1]) * _UNITS[match[2]]) < _MAX_MEMORY or size % 8192:
            raise VmError(f"-m {value}: not a size, such as 512M")
        self.memory_bytes = size
        return value

    def _machine(self, value: str) -> str:
        pairs = dict(pairs_of(value, "type"))
        if pairs.get("memory-backend"):
            raise VmError("-machine memory-backend: RAM gets a file of its own: leave it and its -object out")
        if unknown := sorted(set(pairs) - _MACHINE_KEYS):
            raise VmError(f"-machine {unknown[0]}: not known to be safe to protect: leave it out")
        self.kvm = self.kvm or pairs.get("accel", "").startswith("kvm")
        self.is_q35 = self.is_q35 or "q35" in pairs.get("type", "")
        return value

    _M = _machine

    def _accel(self, value: str) -> str:
        pairs = dict(pairs_of(value, "accel"))
        if pairs.get("accel") not in ("tcg", "kvm"):
            raise VmError(f"-accel {value}: only tcg and kvm")
        self.kvm = self.kvm or pairs["accel"] == "kvm"
        return value

    def _cpu(self, value: str) -> str:
        self.host_cpu = self.host_cpu or value.partition(",")[0] in ("host", "max")
        return value

    def _vga(self, value: str) -> str:
        if value != "none":
            raise VmError(f"-vga {value}: a graphics adapter has memory of its own, which is not saved: use -vga none")
        return value

    def _display(self, value: str) -> str:
        if value != "none":
            raise VmError(f"-display {value}: there is no graphics adapter to show: use -display none, or -nographic")
        return value

    def _boot(self, value: str) -> str:
        if set(dict(pairs_of(value, "order"))) - {"order", "once", "menu", "strict", "reboot-timeout"}:
            raise VmError(f"-boot {value}: only order, once, menu, strict and reboot-timeout")
        return value

    def _smbios(self, value: str) -> str:
        if {"file", "path"} & set(dict(pairs_of(value, ""))):
            raise VmError("-smbios: files are not read here: give the fields one by one")
        return value

    def _fw_cfg(self, value: str) -> str:
        if set(dict(pairs_of(value, "name"))) - {"name", "string"}:
            raise VmError("-fw_cfg: only name and string")
        return value

    def _global(self, value: str) -> str:
        match = _GLOBAL.fullmatch(value)
        if not match or match[1] == "migration" or (match[2] in _DEVICE_FILES and match[3]):
            raise VmError(f"-global {value}: not known to be safe to protect: leave it out")
        return value

    def _file(self, path: str) -> str:
        path = os.path.abspath(path)
        self.files.append(path)
        return path

    _kernel = _initrd = _file

    def _bios(self, value: str) -> str:
        if "/" not in value:
            raise VmError(f"-bios {value}: give its absolute path")
        return self._file(value)

    def _cdrom(self, value: str) -> None:
        path = self._file(value.removeprefix("file:"))
        self.here += ("-drive", _cdrom_of(path))
        self.portable += ("-cdrom", path)

    def _drive(self, value: str) -> None:
        pairs = dict(pairs_of(value, "file"))
        if unknown := sorted(set(pairs) - _DRIVE_KEYS):
            raise VmError(f"-drive {unknown[0]}: not known to be safe to protect: leave it out")
        path = pairs.get("file", "")
        if pairs.get("if") in ("pflash", "mtd"):
            raise VmError(f"-drive {value}: {_REFUSED['pflash']}")
        if path:
            # QEMU takes what precedes a colon for the name of a protocol.
            pairs["file"] = os.path.abspath(path.removeprefix("file:"))
        if not path or is_on(pairs, "readonly", "read-only") or pairs.get("media") == "cdrom":
            if pairs.get("format", "raw") != "raw":
                raise VmError(f"-drive {value}: a disk that the guest only reads must be raw: others name more files")
            self.files += [pairs["file"]] if path else []
            self.here += ("-drive", _as_raw(pairs))
            self.portable += ("-drive", joined(pairs))
            return
        if pairs.get("format", "raw") not in ("raw", "qcow2"):
            raise VmError(f"-drive {value}: a disk that the guest writes to must be raw or qcow2")
        ident = pairs.setdefault("id", f"remus-disk{len(self.disks)}")
        if not _IDENT.fullmatch(ident):
            raise VmError(f"-drive {value}: its id has letters, digits, '.', '_' and '-', and begins with a letter")
        if ident in (disk.ident for disk in self.disks) or pairs["file"] in (disk.path for disk in self.disks):
            raise VmError(f"-drive {value}: this disk, or its id, is given twice")
        self.disks.append(Disk(ident, pairs["file"]))
        self.changes.append(f"a mirror of {pairs['file']}: what the guest writes there travels with its checkpoints")
        self.here += ("-drive", joined(pairs))
        self.portable += ("-drive", joined(pairs | {"format": "raw"}))  # as the backup's image is

    def _object(self, value: str) -> str:
        pairs = dict(pairs_of(value, "qom-type", may_be_json=True))
        kind = pairs.get("qom-type", "")
        if kind == "rng-random" and pairs.get("filename", "/dev/urandom") in ("/dev/urandom", "/dev/random"):
            return value
        if kind.startswith("memory-backend"):
            raise VmError("-object memory-backend-…: RAM gets a file of its own: leave it out")
        if kind not in _OBJECTS:
            raise VmError(f"-object {kind}: not known to be safe to protect: leave it out")
        return value

    def _device(self, value: str) -> str:
        pairs = dict(pairs_of(value, "driver", may_be_json=True))
        driver = pairs.get("driver", "")
        for pattern, why in _DEVICE_REFUSED:
            if pattern.fullmatch(driver):
                raise VmError(f"-device {driver}: {why}: leave it out")
        if not _DEVICES.fullmatch(driver):
            raise VmError(f"-device {driver}: not known to keep all of its state where QEMU saves it: leave it out")
        if is_on(pairs, "share-rw"):
            raise VmError(
                f"-device {driver},share-rw=on: a disk that others write to cannot be protected: leave it out"
            )
        if named := sorted(key for key in _DEVICE_FILES & set(pairs) if pairs[key]):
            raise VmError(
                f"-device {driver},{named[0]}={pairs[named[0]]}: it would name a file of one host: leave it out"
            )
        return value

    def _chardev(self, value: str) -> None:
        ident = dict(pairs_of(value, "backend")).get("id")
        if not ident or not _IDENT.fullmatch(ident):
            raise VmError(f"-chardev {value}: it needs an id")
        self.here += ("-chardev", value)
        self.portable += ("-chardev", f"null,id={ident}")

    def _network(self, name: str, value: str) -> None:
        pairs = dict(pairs_of(value, "type", may_be_json=name == "netdev"))
        if value == "none":
            self._both(f"-{name}", "none")
            return
        if name == "net" or pairs.get("type") != "tap":
            raise VmError(
                f"-{name} {value}: what the guest sends can only be held at a TAP device: use -nic "
                "tap,ifname=NAME or -netdev tap,id=ID,ifname=NAME, or -nic none"
            )
        if unknown := sorted(set(pairs) - (_NIC_KEYS if name == "nic" else _NETDEV_KEYS)):
            raise VmError(f"-{name} {unknown[0]}: not known here: leave it out")
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,15}", tap := pairs.get("ifname", "")):
            raise VmError(f"-{name} {value}: it needs the name of its TAP device: ifname=NAME")
        ident = pairs.get("id", f"nic{len(self.nics)}")
        if not _IDENT.fullmatch(ident):
            raise VmError(f"-{name} {value}: it needs an id")
        self.nics.append(Nic(ident, tap))
        self.changes.append(
            f"a bridge between {ident} and {tap}: it holds what the guest sends until that is committed"
        )
        self._both("-netdev", f"tap,id={ident},ifname={tap}")
        if name == "nic":
            model = pairs.get("model", "")
            self.cards.append((ident, _MODELS.get(model, model), pairs.get("mac", "")))

    def _add_cards(self) -> None:
        """The adapters that -nic makes; on a machine q35, QEMU's default is another one."""
        for ident, model, mac in self.cards:
            driver = model or ("e1000e" if self.is_q35 else "e1000")
            self._both("-device", self._device(f"{driver},netdev={ident}" + (f",mac={mac}" if mac else "")))

    def _defaults(self) -> None:
        """Switch off what QEMU adds by itself and what cannot be protected."""
        self._add_cards()
        if not self.memory_bytes:
            self.memory_bytes = _DEFAULT_MEMORY
            self._both("-m", "128M")
        if not self.given & {"vga", "nodefaults"}:
            self._both("-vga", "none")
            self.changes.append("-vga none: the memory of a graphics adapter is not saved")
        if not self.given & (_NETWORK | {"nodefaults"}):
            self._both("-nic", "none")
            self.changes.append(
                "-nic none: QEMU's own network could not be held; for a network, use -nic tap,ifname=NAME"
            )
        if self.is_nographic:
            # As -nographic, without the terminal that only this host has.
            self.portable += ("-display", "none")
            if "nodefaults" not in self.given:
                for name in ("serial", "parallel", "monitor"):
                    if name not in self.given:
                        self.portable += (f"-{name}", "none" if name == "monitor" else "null")
        elif "display" not in self.given:
            self._both("-display", "none")
            self.changes.append("-display none: there is no graphics adapter to show")
