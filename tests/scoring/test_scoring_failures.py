"""What workers report becomes the exception that fits, with the way out."""

from eefast.scoring.failures import ScoreError, death, failure
from eefast.system.files import WriteError


def test_what_is_said() -> None:
    assert isinstance(failure("ImageFileError", "", 3), ScoreError)
    assert isinstance(failure("WriteError", "no space", 3), WriteError)
    assert str(failure("OSError", "gone", 3)).startswith("shard 3: OSError: gone; finished shards stay")
    assert "--on-error record" in str(failure("ImageFileError", "x.png cannot be read", 3))
    assert "at shard 4, twice, by signal SIGKILL (SIGKILL is what" in str(death(4, -9, "SIGKILL"))
    assert "before its first shard, by exit code 1;" in str(death(None, 1, None))
