"""Files of `torch.save`: no code in them runs, and what is damaged or no such file is one clear error."""

import io
import pickle
import struct
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from damaged_files import damage, loads_or_complains
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_nets import MODULE, STATE, CustomEENet, save, save_as_in_2019
from torch import nn
from torch_files import archive, legacy_file

from eefast.checkpoint.loading import CheckpointError, load


def test_loading_in_threads_allows_no_names_to_others(intact, tmp_path):
    before = set(torch.serialization.get_safe_globals())
    path = tmp_path / "model.pt"
    path.write_bytes(intact[MODULE, True])
    with ThreadPoolExecutor(4) as threads:
        nets = list(threads.map(lambda _: load(path, input_shape=(1, 8, 8)), range(12)))
    assert len({id(net) for net in nets}) == 12
    assert set(torch.serialization.get_safe_globals()) == before


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


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", [MODULE, STATE])
def test_the_undamaged_files_load(intact, tmp_path, kind, legacy):
    (tmp_path / "model.pt").write_bytes(intact[kind, legacy])
    assert load(tmp_path / "model.pt", input_shape=(1, 8, 8)).num_classes == 3
