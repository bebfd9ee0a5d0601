"""Which networks are compiled beforehand, that each is in a process of its own, and what is said of one that fails."""

from types import SimpleNamespace

import precompile
from workloads import EENET20, SMALL, Workload


def test_each_network_and_batch_size_once_where_torch_compile_is_measured():
    works = [Workload(SMALL, 4, compile_seconds=1), Workload(SMALL, 4, (0.5,), compile_seconds=2)]
    works += [Workload(SMALL, 8, compile_seconds=1), Workload(EENET20, 4)]
    assert precompile.compiled_networks(works) == [(SMALL, 4), (SMALL, 8)]


class Process:
    """Compiles at once, here; a batch size of 8 fails."""

    def __init__(self, target, args):
        self.target, self.args, self.exitcode = target, args, None

    def start(self):
        self.target(*self.args)

    def join(self):
        self.exitcode = int(self.args[1] == 8)


def test_all_are_compiled_and_those_that_fail_are_named(monkeypatch, capsys):
    made = []
    monkeypatch.setattr(precompile, "compile_one", lambda *one: made.append(one))
    monkeypatch.setattr(precompile.multiprocessing, "get_context", lambda how: SimpleNamespace(Process=Process))
    monkeypatch.setattr(precompile, "compiled_networks", lambda works: [(SMALL, 4), (SMALL, 8)])
    assert precompile.main() == 1
    assert made == [(SMALL, 4), (SMALL, 8)]
    assert capsys.readouterr().out == "1 of 2 networks compiled; not eenet20, batch 8\n"
