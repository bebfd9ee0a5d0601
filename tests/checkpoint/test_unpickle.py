"""Files of `torch.save`: no code in them runs, and what is damaged or no such file is one clear error."""

import io
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from damaged_files import damage, loads_or_complains
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_nets import MODULE, STATE, BasicBlock, CustomEENet, importable, save, save_as_in_2019
from torch import nn

from eefast.checkpoint.loading import CheckpointError, load


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


CALLS = sorted(calls(""))


@pytest.mark.parametrize("name", CALLS)
def test_the_payloads_are_real(tmp_path, name):
    pickle.loads(pickle.dumps(calls(tmp_path / "marker")[name], protocol=2))
    assert list(tmp_path.glob("marker*"))


def module_with(payload):
    model = CustomEENet((1, 8, 8), 3, 2)
    model.exit0_classifier.__dict__["hidden"] = [{"deep": (payload,)}]
    return model


WRAPPINGS = {
    "bare": lambda payload: payload,
    "state_dict": lambda payload: OrderedDict(CustomEENet((1, 8, 8), 3, 2).state_dict(), weight=payload),
    "key": lambda payload: {"a": torch.zeros(1), "b": [payload]},
    "module": module_with,
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", CALLS)
def test_no_payload_runs(tmp_path, name, legacy, wrapping):
    path = save(WRAPPINGS[wrapping](calls(tmp_path / "marker")[name]), tmp_path / "model.pt", legacy)
    with pytest.raises(CheckpointError):
        load(path, input_shape=(1, 8, 8))
    assert not list(tmp_path.glob("marker*"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", CALLS)
def test_no_payload_of_a_plain_pickle_runs(tmp_path, name, protocol):
    payload = pickle.dumps({"a": calls(tmp_path / "marker")[name]}, protocol)
    for content in (payload, legacy_file(payload), archive(data_pkl=payload, version=b"3")):
        (tmp_path / "model.pt").write_bytes(content)
        with pytest.raises(CheckpointError):
            load(tmp_path / "model.pt", input_shape=(1, 8, 8))
    assert not list(tmp_path.glob("marker*"))


def test_the_error_names_the_code_and_does_not_recommend_to_run_it(tmp_path):
    path = save(calls(tmp_path / "marker")["os.system"], tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"names '(posix|nt).system'.*nothing of it was run") as error:
        load(path)
    assert "weights_only" not in str(error.value)


def test_loading_in_threads_allows_no_names_to_others(intact, tmp_path):
    before = set(torch.serialization.get_safe_globals())
    path = tmp_path / "model.pt"
    path.write_bytes(intact[MODULE, True])
    with ThreadPoolExecutor(4) as threads:
        nets = list(threads.map(lambda _: load(path, input_shape=(1, 8, 8)), range(12)))
    assert len({id(net) for net in nets}) == 12
    assert set(torch.serialization.get_safe_globals()) == before


def legacy_file(body: bytes, keys: list[str] = []) -> bytes:  # noqa: B006
    """The old format around a pickled object and no storages."""
    header = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    return b"".join(pickle.dumps(part, protocol=2) for part in header) + body + pickle.dumps(keys, protocol=2)


class RecordPickler(pickle.Pickler):
    """Writes `Record` objects as persistent ids, as the old format wrote storages and classes."""

    def persistent_id(self, thing):
        return thing.parts if isinstance(thing, Record) else None


class Record:
    def __init__(self, *parts):
        self.parts = parts

    def __repr__(self):
        return f"Record{self.parts}"


def with_records(thing) -> bytes:
    stream = io.BytesIO()
    with importable():
        RecordPickler(stream, protocol=2).dump(thing)
    return legacy_file(stream.getvalue())


@pytest.mark.parametrize(
    "thing",
    [
        Record("module", os.system, "f.py", "source"),
        Record("module", nn.Linear, "f.py", "source"),
        Record("module", Record("module", eval, "f.py", "source"), "f.py", "source"),
        Record("module", "f.py", "source"),
        Record("module", BasicBlock, "f.py", "source", "more"),
        Record("module"),
        Record("class", nn.Linear, "f.py", "source"),
        Record("storage", "FloatStorage", "0", "cpu", 1, None),
        Record("storage", torch.FloatStorage, "0", "cpu", 2**62, None),
        Record("storage", torch.FloatStorage, "0", "cpu", -1, None),
        Record("storage"),
        [Record("storage", torch.FloatStorage, "0", "cuda:7", 1, ("1", 0, 2**40))],
        Record(),
        "module",
    ],
    ids=lambda thing: str(thing)[:50],
)
def test_records_of_the_old_format_run_and_write_nothing(tmp_path, monkeypatch, thing):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nn.Module, "dump_patches", True)
    (tmp_path / "model.pt").write_bytes(with_records(thing))
    with pytest.raises(CheckpointError):
        load(tmp_path / "model.pt", input_shape=(1, 8, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_sources_in_a_module_are_neither_compared_nor_written(tmp_path, monkeypatch, eenet20, recwarn):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nn.Module, "dump_patches", True)
    model, _ = eenet20("head", "pool")
    path = save_as_in_2019(model, tmp_path / "model.pt")
    path.write_bytes(path.read_bytes().replace(b"class ExitBlock(nn.Module)", b"class ExitBlock(os.Module)"))
    recwarn.clear()
    load(path)
    assert not recwarn.list
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def archive(compression=zipfile.ZIP_STORED, **records: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, content in records.items():
            file.writestr(f"archive/{name.replace('__', '/').replace('_', '.')}", content)
    return stream.getvalue()


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name in ("storages", "tensors", "pickle"):
            file.addfile(tarfile.TarInfo(name))
    return stream.getvalue()


TENSOR_OF_NOTHING = (
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00(%s%st(K\x01K\x01t\x89ccollections\nOrderedDict\n)RtR."
)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"hello",
        b"PK",
        b"PK\x03\x04",
        b"\x80\x02.",
        b"\x80\x02}q\x00.",
        b"\x93NUMPY",
        bytes(1000),
        np.random.default_rng(0).bytes(5000),
        archive(),
        archive(data_pkl=b""),
        archive(data_pkl=b"\x80\x02]q\x00.", version=b"3"),
        archive(data_pkl=b"\x80\x02}q\x00X\xff\xff\xff\xff", version=b"3"),
        archive(data_pkl=b"\x80\x02r\xff\xff\xff\xff.", version=b"3"),
        archive(data_pkl=b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".", version=b"3"),
        archive(
            data_pkl=TENSOR_OF_NOTHING % (b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\x7f"), data__0=bytes(16), version=b"3"
        ),
        archive(data_pkl=TENSOR_OF_NOTHING % (b"J\xff\xff\xff\xff", b"K\x01"), data__0=bytes(16), version=b"3"),
        archive(zipfile.ZIP_DEFLATED, data_pkl=b"\x80\x02]q\x00.", data__0=bytes(10**7), version=b"3"),
        legacy_file(b""),
        legacy_file(b"\x80\x02tQ."),
        legacy_file(b"\x80\x02(X\x06\x00\x00\x00moduletQ."),
        legacy_file(pickle.dumps({}, protocol=2), ["no such storage"]),
        legacy_file(pickle.dumps({}, protocol=2)) + bytes(100),
        tar(),
        archive(data_pkl=b"\x80\x02]q\x00.", constants_pkl=b"\x80\x02).", version=b"3"),
        struct.pack("<Q", 2**60) + b"{}",
    ],
    ids=lambda content: repr(content[:4]),
)
def test_other_files_are_one_clear_error(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=str(tmp_path / "model.pt")):
        load(tmp_path / "model.pt", input_shape=(1, 8, 8))


def test_an_archive_that_unpacks_to_more_than_itself_is_refused_unread(tmp_path):
    content = archive(zipfile.ZIP_DEFLATED, data__0=bytes(10**7), data_pkl=b"\x80\x02]q\x00.", version=b"3")
    (tmp_path / "bomb.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="is compressed, 10000000 bytes packed into"):
        load(tmp_path / "bomb.pt")


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    path = tmp_path_factory.mktemp("intact") / "model.pt"
    model = CustomEENet((1, 8, 8), 3, 2)
    return {
        (kind, legacy): save(model if kind == MODULE else model.state_dict(), path, legacy).read_bytes()
        for kind in (MODULE, STATE)
        for legacy in (False, True)
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_load_or_are_one_clear_error(intact, tmp_path, data):
    content = intact[data.draw(st.sampled_from(sorted(intact)))]
    (tmp_path / "model.pt").write_bytes(data.draw(damage(content)))
    loads_or_complains(tmp_path / "model.pt")


def test_the_undamaged_files_load(intact, tmp_path):
    for content in intact.values():
        (tmp_path / "model.pt").write_bytes(content)
        assert load(tmp_path / "model.pt", input_shape=(1, 8, 8)).num_classes == 3
