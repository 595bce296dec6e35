"""Reads the file of an offline W&B run: a LevelDB log of protobuf records after a seven-byte header."""

import json
import struct
from pathlib import Path

BLOCK, HEADER, FIRST, MIDDLE = 32768, 7, 2, 3


def records(path: Path) -> list:
    """Returns every Record of a run-*.wandb file, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, offset, parts, found = path.read_bytes(), HEADER, [], []
    while offset + HEADER <= len(data):
        room = BLOCK - offset % BLOCK
        if room < HEADER:
            offset += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        parts.append(data[offset + HEADER : offset + HEADER + length])
        offset += HEADER + length
        if kind not in (FIRST, MIDDLE):
            found.append(Record.FromString(b"".join(parts)))
            parts = []
    return found


def history(found: list) -> list[dict[str, object]]:
    """Returns the logged rows as dictionaries."""
    rows = [record.history.item for record in found if record.WhichOneof("record_type") == "history"]
    return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]
