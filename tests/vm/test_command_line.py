"""Which QEMU command lines can be protected, and what becomes of them on another host."""

from __future__ import annotations

import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remus_ckpt.errors import RemusError, VmError
from remus_ckpt.vm.command_line import CommandLine, additions, without_additions

QEMU = "qemu-system-x86_64"


def parse(text: str) -> CommandLine:
    return CommandLine.parse([QEMU, *shlex.split(text)])


@pytest.mark.parametrize(
    ("text", "memory"),
    [("", 128 << 20), ("-m 512", 512 << 20), ("-m 2G", 2 << 30), ("-m size=64M", 64 << 20), ("--m 1024K", 1 << 20)],
)
def test_the_size_of_memory_is_that_of_qemu(text: str, memory: int) -> None:
    line = parse(text)
    assert line.memory_bytes == memory
    assert f"memory-backend-file,id=remus-ram,size={memory}B,mem-path=/x,share=on" in line.with_memory("/x", "/q")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("-vga std", "graphics"),
        ("-device VGA", "-device VGA"),
        ("-device virtio-gpu-pci", "memory of its own"),
        ("-device qxl", "memory of its own"),
        ("-device virtio-balloon-pci", "size of RAM"),
        ("-m 512M,slots=2,maxmem=2G", "slots"),
        ("-device vfio-pci,host=01:00.0", "outside QEMU"),
        ("-device ivshmem-plain", "outside QEMU"),
        ("-object memory-backend-ram,id=x,size=1G", "RAM"),
        ("-machine pc,memory-backend=x", "RAM"),
        ("-mem-path /dev/hugepages", "RAM"),
        ("-drive file=/x.vmdk,if=virtio,format=vmdk", "raw or qcow2"),
        ("-drive file=/x,if=virtio -drive file=/x,if=ide", "twice"),
        ("-drive file=/x,id=d,if=none -drive file=/y,id=d,if=none", "twice"),
        ("-drive file=/x,id=../d", "letters"),
        ("-drive file=/x,if=none,id=d -device virtio-blk-pci,drive=d,share-rw=on", "others write to"),
        ("-hda /x.img", "not known"),
        ("disk.img", "-drive file=disk.img"),
        ("-drive if=pflash,file=/x,readonly=on", "firmware"),
        ("-drive driver=nbd,host=evil,readonly=on", "driver"),
        ("-blockdev driver=file,filename=/x,node-name=n", "-drive"),
        ("-nic user", "-nic none"),
        ("-netdev tap,id=n", "ifname=NAME"),
        ("-netdev tap,id=n,ifname=a/b", "ifname=NAME"),
        ("-netdev tap,id=n,ifname=t,fd=3", "fd: not known"),
        ("-nic bridge,br=br0", "-nic tap"),
        ("-nic tap,ifname=t,model=exotic", "-device exotic"),
        ("-snapshot", "disks"),
        ("-daemonize", "child"),
        ("-incoming tcp:0:1", "another machine"),
        ("-display gtk", "-display none"),
        ("-vnc :1", "serial console"),
        ("-virtfs local,path=/,mount_tag=x,security_model=none", "shared folder"),
        ("-accel hvf", "tcg and kvm"),
        ("-device loader,file=/etc/shadow", "not known"),
        ("-device virtio-net-pci,romfile=/etc/shadow", "romfile"),
        ("-global virtio-net-pci.romfile=/etc/shadow", "-global"),
        ("-fw_cfg name=opt/x,file=/etc/shadow", "-fw_cfg"),
        ("-smbios file=/etc/shadow", "-smbios"),
        ("-boot splash=/etc/shadow", "-boot"),
        ("-object rng-random,filename=/etc/shadow,id=r", "-object"),
        ("-readconfig x", "command line"),
        ("-machine pc,dumpdtb=/etc/passwd", "dumpdtb"),
        ("-m", "missing"),
        ("-xyzzy 1", "not known"),
        ("-m 0", "size"),
        ("-m 99999999999T", "size"),
    ],
)
def test_what_cannot_be_protected_is_refused_with_a_way_out(text: str, words: str) -> None:
    with pytest.raises(VmError) as caught:
        parse(text)
    assert words in str(caught.value)


def test_all_reasons_are_told_at_once() -> None:
    with pytest.raises(VmError) as caught:
        parse("-vga std -snapshot -drive file=x.img,format=vdi")
    assert str(caught.value).count("\n") == 3


def test_what_is_added_is_told() -> None:
    told = [change.partition(":")[0] for change in parse("-m 64M").changes]
    assert told == ["-vga none", "-nic none", "-display none"]
    assert parse("-m 64M -nodefaults -nographic").changes == ()


@pytest.mark.parametrize(
    "text",
    [
        "-m 64M -nographic -kernel vmlinuz -append 'console=ttyS0 a=b,c'",
        "-nodefaults -serial mon:stdio -monitor none -chardev file,id=log,path=/tmp/log -device isa-serial,chardev=log",
        "-drive file=a,,b.iso,media=cdrom -cdrom b.iso -D /tmp/log -pidfile /run/x -qmp unix:/x,server=on",
        '-name web -smp 2,sockets=1 -cpu max -M q35,accel=tcg -rtc base=utc -device \'{"driver": "virtio-rng-pci"}\'',
    ],
)
def test_the_portable_form_is_read_back_as_it_is(text: str) -> None:
    line = parse(text)
    again = CommandLine.from_peer(QEMU, line.portable)
    assert again.portable == line.portable
    assert again.memory_bytes == line.memory_bytes
    for word in ("stdio", "/tmp/log", "/run/x", "unix:/x"):
        assert word not in " ".join(line.portable)
    assert all(Path(path).is_absolute() for path in line.files)


def test_a_network_adapter_gets_a_bridge() -> None:
    text = "-m 64M -nodefaults -nic tap,ifname=tap0,model=virtio,script=/etc/qemu-ifup -netdev tap,id=n,ifname=tap1 "
    line = parse(text + "-device e1000,netdev=n,mac=52:54:00:00:00:01 -nic tap,ifname=tap2 -display none")
    assert [(nic.ident, nic.tap) for nic in line.nics] == [("nic0", "tap0"), ("n", "tap1"), ("nic2", "tap2")]
    words = shlex.join(line.with_memory("/ram", "/qmp", [7, 8, 9]))
    for ident, fd in (("nic0", 7), ("n", 8), ("nic2", 9)):
        assert f"-netdev dgram,id={ident},local.type=fd,local.str={fd}" in words
    assert "-device virtio-net-pci,netdev=nic0" in words and "-device e1000,netdev=nic2" in words
    assert "ifup" not in words and "tap0" not in words
    assert CommandLine.from_peer(QEMU, line.portable).nics == line.nics
    unplugged = shlex.join(line.as_standby("/ram", "/qmp", lambda device: "null"))
    assert "-netdev hubport,id=nic0,hubid=0 -netdev hubport,id=n,hubid=1" in unplugged


def test_the_standby_has_consoles_of_its_own_and_waits() -> None:
    line = parse(
        "-nodefaults -serial mon:stdio -serial null -monitor stdio -chardev pty,id=c -device isa-serial,chardev=c"
    )
    words = line.as_standby("/ram", "/qmp", lambda device: f"unix:/run/{device},server=on,wait=off")
    text = shlex.join(words)
    assert "-serial unix:/run/serial0,server=on,wait=off -serial unix:/run/serial1,server=on,wait=off" in text
    assert "-monitor none -chardev socket,path=/run/c,server=on,wait=off,id=c" in text
    assert text.endswith("-S -incoming defer")


PLAIN = ["-m", "64M", "-display", "none", "-vga", "none", "-nic", "none"]


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("rm", ["-rf", "/"]),
        ("/tmp/qemu-system-x86_64", []),
        ("qemu-system-x86_64;reboot", []),
        (QEMU, ["-serial", "file:/etc/passwd"]),
        (QEMU, ["-D", "/etc/passwd"]),
        (QEMU, [*PLAIN, "-pidfile", "/etc/passwd"]),
        (QEMU, ["-chardev", "file,id=a,path=/etc/passwd"]),
        (QEMU, ["-nographic"]),
        (QEMU, [*PLAIN, "-fw_cfg", '{"name":"x,file=/etc/shadow,name=opt/z"}']),
        (QEMU, [*PLAIN, "-machine", '{"type":"x,type=pc,initrd=/etc/shadow,append=y"}']),
        (QEMU, [*PLAIN, "-global", "driver=a.b,driver=virtio-rng-pci,property=romfile,value=/etc/shadow"]),
        (QEMU, [*PLAIN, "-drive", "file=/seed.img,readonly=on,format=qcow2"]),
        (QEMU, [*PLAIN, "-drive", "file=/seed.img,media=cdrom,format=vmdk"]),
    ],
)
def test_a_peer_can_start_nothing_but_a_guest(program: str, arguments: list[str]) -> None:
    with pytest.raises(VmError):
        CommandLine.from_peer(program, arguments)


@given(st.lists(st.text(alphabet='-abcdefgmnst=,.:/{}"', max_size=12), max_size=6))
def test_any_command_line_is_read_or_refused(words: list[str]) -> None:
    try:
        line = CommandLine.from_peer(QEMU, words)
    except RemusError:
        return
    assert line.portable == tuple(words)


def test_a_running_command_line_is_the_one_without_protection() -> None:
    line = parse("-m 64M -nodefaults -machine pc,accel=tcg -nographic")
    words = line.with_memory("/dev/shm/x", "/run/q")
    assert CommandLine.parse(without_additions(words)).portable == line.portable
    standby = CommandLine.from_peer(QEMU, line.portable).as_standby("/ram", "/qmp", lambda device: "null")
    assert CommandLine.parse(without_additions(standby)).portable == line.portable


def test_a_path_may_hold_commas() -> None:
    assert additions(4096, "/dev/shm/a,b", "/run/c,d")[1].endswith("mem-path=/dev/shm/a,,b,share=on")
    assert additions(4096, "/dev/shm/a,b", "/run/c,d")[-1] == "unix:/run/c,,d,server=on,wait=off"


def test_a_disk_travels_as_the_image_that_the_other_host_has() -> None:
    line = parse(
        "-drive file=web.qcow2,if=virtio -drive file=/b,,c,format=qcow2,if=none,id=data "
        "-device virtio-blk-pci,drive=data -drive file=/cd.iso,media=cdrom -drive file=/seed.img,readonly=on,if=virtio"
    )
    here = str(Path("web.qcow2").absolute())
    assert [(disk.ident, disk.path) for disk in line.disks] == [("remus-disk0", here), ("data", "/b,c")]
    assert line.files == ("/cd.iso", "/seed.img"), "a disk that the guest writes to need not be the same there"
    assert f"file={here},if=virtio,id=remus-disk0" in line.here
    assert "file=/b,,c,format=raw,if=none,id=data" in line.portable
    there = CommandLine.from_peer(QEMU, line.portable)
    assert there.disks == line.disks
    words = there.as_standby("/ram", "/qmp", lambda _: "null", disks={"remus-disk0": Path("/i,1"), "data": Path("/i2")})
    assert "file=/i,,1,if=virtio,id=remus-disk0,format=raw" in words
    assert "file=/i2,format=raw,if=none,id=data" in words
    assert not any(here in word or "/b,,c" in word for word in words), "a peer names no file that QEMU writes here"
    with pytest.raises(VmError, match="no image"):
        there.as_standby("/ram", "/qmp", lambda _: "null", disks={"data": Path("/i2")})


def test_a_disk_that_is_only_read_names_no_other_file() -> None:
    line = parse("-cdrom /a,,b.iso -drive file=/seed.img,readonly=on,if=virtio -drive if=ide,media=cdrom")
    there = CommandLine.from_peer(QEMU, line.portable)
    assert there.files == ("/a,,b.iso", "/seed.img")
    for words in (line.here, there.as_standby("/ram", "/qmp", lambda _: "null")):
        given = [value for option, value in pairwise(words) if option in ("-drive", "-cdrom")]
        assert given == [
            "file=/a,,,,b.iso,index=2,media=cdrom,format=raw",
            "file=/seed.img,readonly=on,if=virtio,format=raw",
            "if=ide,media=cdrom",
        ]
