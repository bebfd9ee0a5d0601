"""`eefast serve` in a process of its own, on a free port of the loopback interface."""

import re
import subprocess
import sys


class Served:
    """url: of the server, which is ready. process: see `subprocess.Popen`."""

    def __init__(self, folder, *options):
        words = [sys.executable, "-m", "eefast", "serve", folder, "--port", "0", *options]
        self.process = subprocess.Popen(
            list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            first, second = self.process.stdout.readline(), self.process.stdout.readline()
            assert second.startswith("ready after"), first + second + self.process.stderr.read()
        except BaseException:
            self.process.kill()
            raise
        self.url = re.fullmatch(r"listening at (http://127\.0\.0\.1:\d+)\n", first)[1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


def metrics(text):
    """Name with labels → value, of the text format of Prometheus."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
