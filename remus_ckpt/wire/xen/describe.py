"""Events as plain values, as `inspect --chunks` prints them and the conformance suite expects them
(specs/conformance.md §3)."""

from __future__ import annotations

import hashlib
from typing import Any

from remus_ckpt.pages import HAS_DATA
from remus_ckpt.wire.xen import events, v2


def describe(event: events.Event) -> dict[str, Any]:
    """One event as a dictionary of JSON values: `offset`, `event`, and the fields of its chunk."""
    return {"offset": event.offset} | _fields(event)


def _fields(event: events.Event) -> dict[str, Any]:
    match event:
        case events.FileHeader():
            return {"event": "file_header", "kind": event.kind, "bytes": len(event.data)}
        case events.Header():
            fields: dict[str, Any] = {"event": "header", "word": event.word, "guest": event.guest}
            fields["p2m_size"] = event.p2m_size
            if event.extended_info is not None:
                fields["extended_info"] = [block.id.decode("latin-1") for block in event.extended_info]
            if event.p2m_frames is not None:
                fields["p2m_frames"] = len(event.p2m_frames)
            return fields
        case events.Batch():
            return {
                "event": "batch",
                "format": "B" if event.data is None else "A",
                "entries": len(event.pfns),
                "pages": int(HAS_DATA[event.types].sum()),
                "pfns": event.pfns.tolist(),
                "types": event.types.tolist(),
            }
        case events.CompressedData():
            digest = hashlib.sha256(event.data.data).hexdigest()
            return {"event": "compressed_data", "bytes": len(event.data), "sha256": digest}
        case events.VcpuInfo():
            return {"event": "vcpu_info", "highest_id": event.highest_id, "vcpus": event.ids()}
        case events.HvmParam():
            return {"event": "parameter", "id": int(event.id), "name": event.id.name, "value": event.value}
        case events.TscInfo():
            return {
                "event": "tsc_info",
                "mode": event.mode,
                "nsec": event.nsec,
                "khz": event.khz,
                "incarnation": event.incarnation,
            }
        case events.Toolstack():
            return {"event": "toolstack", "bytes": len(event.data)}
        case events.Tmem():
            pages = [len(pool.pages) for pool in event.pools]
            return {"event": "tmem", "pools": len(pages), "pages": sum(pages)}
        case events.TmemExtra():
            return {"event": "tmem_extra", "keys": len(event.keys)}
        case events.EnableVerifyMode():
            return {"event": "enable_verify_mode"}
        case events.EnableCompression():
            return {"event": "enable_compression"}
        case events.LastCheckpoint():
            return {"event": "last_checkpoint"}
        case events.EndOfBody():
            return {"event": "end_of_body"}
        case events.TailHvm():
            record = None if event.record is None else {"epoch": event.record.epoch, "codec": event.record.codec}
            return {
                "event": "tail",
                "end": event.end,
                "magic_pfns": list(event.magic_pfns),
                "context_bytes": len(event.context),
                "signature": event.signature.value.decode(),
                "device_state_bytes": len(event.device_state if event.record is None else event.record.device_state),
                "record": record,
            }
        case events.TailPv():
            return {
                "event": "tail",
                "end": event.end,
                "unmapped_pfns": len(event.unmapped),
                "vcpus": [vcpu.id for vcpu in event.vcpus],
            }
        case events.EndOfStream():
            return {"event": "end", "complete": event.complete, "trailing_bytes": event.trailing_bytes}
    return _v2_fields(event)


def _v2_fields(event: events.Event) -> dict[str, Any]:
    match event:
        case v2.LibxlHeader():
            return {"event": "libxl_header", "converted": bool(event.options & v2.LIBXL_CONVERTED)}
        case v2.ImageHeader():
            xen = None if not event.xen[0] else f"{event.xen[0]}.{event.xen[1]}"
            return {"event": "image_header", "version": event.version, "guest": event.guest, "xen": xen}
        case v2.PvInfo():
            return {"event": "x86_pv_info", "width": event.width, "levels": event.levels}
        case v2.P2mFrames():
            fields = {"first": event.first, "last": event.last, "frames": len(event.pfns)}
            return {"event": "x86_pv_p2m_frames"} | fields
        case v2.VcpuState():
            return {"event": event.kind.name.lower(), "vcpu": event.vcpu, "bytes": len(event.data)}
        case v2.HvmParams():
            return {"event": "hvm_params"} | {v2.parameter_name(number): value for number, value in event.values}
        case v2.Emulator():
            emulator = v2.EMULATORS[event.emulator]
            return {"event": event.kind.name.lower(), "emulator": emulator, "bytes": len(event.data)}
        case v2.Record():
            return {"event": event.kind.name.lower(), "bytes": len(event.data)}
        case v2.SuspendRecord():
            return {"event": "suspend_record", "type": event.type.name, "bytes": event.size}
        case v2.DeviceModel():
            return {"event": "device_model", "bytes": len(event.data)}
        case v2.PassedOver():
            layer = event.layer.value
            return {"event": "passed_over", "layer": layer, "type": event.type, "bytes": event.size}
        case v2.Border():
            return {"event": "checkpoint_complete", "end": event.end, "last": event.is_last}
    raise TypeError(f"no description of {type(event).__name__}")
