"""Pickles of any origin → objects: nothing that they name is run, and their work is limited."""

import argparse
import io
import os
import pickle
from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
from reference_nets import BasicBlock, CustomEENet, importable, save
from torch import nn
from torch_files import archive, calls, legacy_file

from eefast.checkpoint import pickle_machine
from eefast.checkpoint.loading import CheckpointError, load
from eefast.checkpoint.pickle_machine import Machine
from eefast.checkpoint.pickled import Inert, RefusedError

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


FORMS = {
    "bare": lambda payload: payload,
    "legacy": legacy_file,
    "zip": lambda payload: archive(data_pkl=payload, version=b"3"),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("form", FORMS)
def test_no_payload_of_a_plain_pickle_runs(tmp_path, form, name, protocol):
    payload = pickle.dumps({"a": calls(tmp_path / "marker")[name]}, protocol)
    (tmp_path / "model.pt").write_bytes(FORMS[form](payload))
    with pytest.raises(CheckpointError):
        load(tmp_path / "model.pt", input_shape=(1, 8, 8))
    assert not list(tmp_path.glob("marker*"))


def test_the_error_names_the_code_and_does_not_recommend_to_run_it(tmp_path):
    path = save(calls(tmp_path / "marker")["os.system"], tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"names '(posix|nt).system'.*nothing of it was run") as error:
        load(path)
    assert "weights_only" not in str(error.value)


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


def ran(content: bytes) -> object:
    """What the machine makes of a pickle."""
    return Machine(bytearray(content), 0, len(content)).run()


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, 255, 65_535, -1, 2**31, 2**200, -(2**200), 0.1, "", "é\ud800", "x" * 300, (), (1,), (1, 2, 3),
        (1, 2, 3, 4), [], [1], [1, 2], {}, {"a": 1}, {1: "a", (1, 2): None}, [[[]], {"a": [()]}], b"", b"x" * 300,
    ],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_plain_values_are_those_of_python(value, protocol):
    if isinstance(value, bytes) and protocol == 2:  # a call of _codecs.encode, which is not made
        assert ran(pickle.dumps(value, protocol)).name in ("_codecs.encode", "builtins.bytes")
        return
    assert ran(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", [2, 4])
def test_an_object_that_occurs_twice_stays_one(protocol):
    inner = [1]
    first, second, third = ran(pickle.dumps([inner, {"a": inner}, (inner,)], protocol))
    assert first is second["a"] is third[0]


@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_of_classes_are_inert(protocol):
    thing = ran(pickle.dumps(argparse.Namespace(a=1), protocol))
    assert isinstance(thing, Inert)
    assert thing.state == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "its pickle is cut off", id="empty"),
        pytest.param(b"\x80\x02]", "its pickle is cut off", id="no end"),
        pytest.param(b"X\x05\0\0\0abc.", "its pickle is cut off", id="text cut off"),
        pytest.param(b"J\0\0", "its pickle is cut off", id="number cut off"),
        pytest.param(b"cbuiltins", "a name without end", id="name"),
        pytest.param(b"ios\nsystem\n.", r"the opcode b'i', which torch\.save does not write", id="opcode"),
        pytest.param(b".", "an empty stack", id="nothing"),
        pytest.param(b"K\1(0N.", "an empty stack", id="below a mark"),
        pytest.param(b"t.", "no mark", id="no mark"),
        pytest.param(b"]q\5.", "not numbered in order", id="memo"),
        pytest.param(b"}(K\1u.", "a key without value", id="odd items"),
        pytest.param(b"]K\1K\2s.", "an entry is put into a list", id="entry of a list"),
        pytest.param(b"}K\1a.", "items are put into a dict", id="item of a dict"),
        pytest.param(b"}]K\1s.", "a key is a list", id="list as key"),
        pytest.param(b"]}b.", "a list gets attributes", id="attributes of a list"),
        pytest.param(b"ccollections\nOrderedDict\nK\1R.", "a call without arguments", id="no arguments"),
        pytest.param(b"K\1)R.", "a int is called", id="call of a number"),
        pytest.param(b"K\1K\2\x93.", "a name that is no text", id="name of numbers"),
        pytest.param(b")Q.", "a record that is no storage", id="record"),
    ],
)
def test_pickles_that_no_pickler_writes_are_refused(content, message):
    with pytest.raises(ValueError, match=message) as raised:
        ran(content)
    assert not isinstance(raised.value, RefusedError)


KEYS_OF_ALL_KINDS = {0: 0, "a": 0, None: 0, 2**20 - 1: 0}
ODD_KEYS = {2**20: 0, -1: 0, 0.5: 0, (1, 2): 0}


@pytest.mark.parametrize(("odd", "refused"), [(KEYS_OF_ALL_KINDS, False), (ODD_KEYS, True)], ids=["usual", "odd"])
def test_keys_whose_hashes_a_file_can_choose_are_limited(monkeypatch, odd, refused):
    monkeypatch.setattr(pickle_machine, "MOST_ODD_KEYS", 3)
    if not refused:
        assert ran(pickle.dumps(odd, 2)) == odd
        return
    with pytest.raises(RefusedError, match="over 3 keys that are large numbers or tuples"):
        ran(pickle.dumps(odd, 2))


@pytest.mark.parametrize(
    ("key", "refused"), [((1, "a", None), False), (tuple(range(8)), False), (tuple(range(9)), True), ((1, (2,)), True)]
)
def test_tuples_as_keys_are_short_and_flat(key, refused):
    with pytest.raises(RefusedError, match="a tuple of more than a few numbers") if refused else nullcontext():
        assert ran(pickle.dumps({key: 1}, 2)) == {key: 1}


@pytest.mark.parametrize(
    ("limit", "value", "content"),
    [("MOST_STEPS", 9, b"]" + b"K\1a" * 5 + b"."), ("MOST_PICKLED", 9, b"X\x0b\0\0\0" + b"a" * 11 + b".")],
)
def test_steps_and_bytes_are_limited(monkeypatch, limit, value, content):
    ran(content)
    monkeypatch.setattr(pickle_machine, limit, value)
    with pytest.raises(RefusedError, match=r"its pickle has over \d+ steps or \d+ bytes without the tensors; save the"):
        ran(content)


def test_long_integers_are_not_computed():
    assert ran(b"\x8b\xe8\3\0\0" + bytes(1000) + b".") == 0
    with pytest.raises(RefusedError, match="it holds an integer of 1001 bytes"):
        ran(b"\x8b\xe9\3\0\0" + bytes(1001) + b".")


def test_a_storage_has_one_type_and_size():
    def record(kind: bytes, count: int) -> bytes:
        return b"(X\7\0\0\0storagectorch\n%bStorage\nX\1\0\0\0aX\3\0\0\0cpuK%ctQ" % (kind, count)

    first, again = ran(b"(" + record(b"Float", 3) * 2 + b"t.")
    assert first is again
    assert (first.dtype, first.count) == (torch.float32, 3)
    for other in (record(b"Float", 4), record(b"Double", 3)):
        with pytest.raises(ValueError, match="the storage 'a' has two types or sizes"):
            ran(b"(" + record(b"Float", 3) + other + b"t.")
    with pytest.raises(ValueError, match="a storage of unknown type or size"):
        ran(record(b"Other", 3) + b".")
