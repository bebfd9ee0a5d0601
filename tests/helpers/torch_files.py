"""Files of `torch.save` written by hand: archives and the old format around any pickle, and pickles that call."""

import io
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict

import numpy as np
import torch


class Call:
    """Pickles as a call, which any ordinary unpickler makes."""

    def __init__(self, function, *args, state=None):
        self.answer = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.answer


def calls(marker):
    """Payloads that would all create `marker`."""
    touch = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch '{marker}'"),
        "eval": Call(eval, touch),
        "exec": Call(exec, touch),
        "subprocess": Call(subprocess.call, ["touch", str(marker)]),
        "open": Call(open, str(marker), "w"),
        "getattr": Call(getattr, Call(open, str(marker), "w"), "close"),
        "torch.save": Call(torch.save, {}, str(marker)),
        "numpy": Call(np.save, str(marker), 0),
        "state": Call(OrderedDict, state={"x": Call(os.system, f"touch '{marker}'")}),
    }


def legacy_file(body: bytes, keys: list[str] = []) -> bytes:  # noqa: B006
    """The old format around a pickled object and no storages."""
    header = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    return b"".join(pickle.dumps(part, protocol=2) for part in header) + body + pickle.dumps(keys, protocol=2)


def archive(compression=zipfile.ZIP_STORED, **records: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, content in records.items():
            file.writestr(f"archive/{name.replace('__', '/').replace('_', '.')}", content)
    return stream.getvalue()
