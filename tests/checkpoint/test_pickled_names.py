"""Names in pickles: classes of data, of networks and of other people's code, and none that would run something."""

import pytest

from eefast.checkpoint.pickled_names import is_harmless


@pytest.mark.parametrize(
    "name",
    [
        "collections.OrderedDict", "builtins.set", "datetime.datetime", "pathlib.PosixPath", "torch.FloatStorage",
        "torch.cuda.FloatStorage", "torch.float16", "torch.strided", "torch.per_tensor_affine",
        "torch._utils._rebuild_tensor_v2", "torch.nn.modules.conv.Conv2d", "torch.optim.adam.Adam", "numpy.ndarray",
        "numpy.float64", "numpy.uint8", "numpy.bool_", "numpy._core.multiarray.scalar", "numpy.random._pickle.f",
        "eenet.EENet", "pytorch_lightning.callbacks.ModelCheckpoint", "numpyro.x",
    ],
)  # fmt: skip
def test_what_checkpoints_name_is_harmless(name):
    assert is_harmless(name)


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "posix.system", "builtins.eval", "builtins.getattr", "builtins.__import__", "subprocess.Popen",
        "runpy.run_path", "torch.save", "torch.load", "torch.hub.load", "torch.Storage.x", "torch._utils.other",
        "numpy.save", "numpy.load", "numpy.float64.x", "numpy.f2py.main", "collections.OrderedDict.x", "sys.exit",
    ],
)  # fmt: skip
def test_what_would_run_something_is_not(name):
    assert not is_harmless(name)
