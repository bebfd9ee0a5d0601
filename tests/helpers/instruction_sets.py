"""Folder, and jobs as JSON → pytest runs in forks of one process that has used no kernel, each with other instructions.

A job: the name of an instruction set, test files, and which of their tests to run. Of each, folder/NAME.txt is what
pytest printed after the instruction sets in use, and folder/NAME.pt the answers of a network. Prints the exit codes.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from resident_calls import network, tables

from eefast import ops


def answers() -> tuple[torch.Tensor, ...]:
    net, x = network("eenet20", 1, 257, placement="linear", input_shape=(3, 13, 11))
    return ops.resident_forward.run(x, *tables(net), net.thresholds, net.criterion.name, net.num_classes, False, 1)


def run(name: str, files: list[str], tests: str, folder: Path) -> int:
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    output = os.open(folder / f"{name}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["EEFAST_ISA"] = name
    code = 1
    try:
        print(ops.instruction_set(), ops.int8_instruction_set(), flush=True)
        code = pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", *files, "-k", tests])
        torch.save(answers(), folder / f"{name}.pt")
    except RuntimeError as error:
        print(error)
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    print(json.dumps([run(*job, Path(sys.argv[1])) for job in json.loads(sys.argv[2])]))
