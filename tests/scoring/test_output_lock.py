"""Locks of an output folder: between processes, shares, and after a kill."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from eefast.scoring.output_lock import locked

HOLD = (
    "import sys; from pathlib import Path; from eefast.scoring.output_lock import locked\n"
    "with locked(Path(sys.argv[1]), (int(sys.argv[2]), int(sys.argv[3]))): print('held', flush=True); sys.stdin.read()"
)


@contextmanager
def held(folder: Path, i: int, n: int):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(i), str(n)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_another_process_holds_the_folder_until_it_is_killed(tmp_path: Path) -> None:
    with held(tmp_path, 0, 2) as process:
        for share in ((0, 2), (0, 1), (1, 3)):
            taken = rf"by another run \(process {process.pid} on .*take another folder"
            with pytest.raises(ValueError, match=taken), locked(tmp_path, share):
                pytest.fail("two runs write the same shards")
        with locked(tmp_path, (1, 2)):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["run-0-of-2.lock"]  # stale, as the process was killed
    with locked(tmp_path, (0, 1)):
        pass
    with locked(tmp_path, (0, 2)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == []
