"""Children of one process that has imported, and done, everything once: importing torch takes far longer than what they do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

SERVER = r"""
import json, os, signal, sys, time, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what it prints on the way is no answer
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import {module} as t
t.warm()
print("ready", file=answers, flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        end = time.monotonic() + order["seconds"]
        pid = 0
        while not pid and time.monotonic() < end:
            pid, status = os.waitpid(order["wait"], os.WNOHANG)
            time.sleep(0.01)
        if not pid:
            os.killpg(order["wait"], signal.SIGKILL)
            os.waitpid(order["wait"], 0)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else "still running"), file=answers, flush=True)
        continue
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        os.setsid()
        log = os.open(order["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        os.environ.update(order["environment"])
        signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            os.write(writer, b"x")
            exec(order["code"], {{"t": t}})
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    os.read(reader, 1)
    os.close(reader), os.close(writer)
    print(pid, file=answers, flush=True)
"""


class Forks:
    """Runs code in forks of a process that has imported a test module, as ``t``, and called its ``warm()``."""

    def __init__(self, module: str) -> None:
        code = SERVER.format(tests=str(Path(__file__).parent), module=module)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.running: set[int] = set()
        self._line()

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the process to fork from has ended")
        return line

    def _order(self, **order: object) -> object:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def start(self, code: str, log: Path, **environment: object) -> int:
        """The process's number, which is its group's and session's too; it has begun on the code."""
        pid = self._order(code=code, log=str(log), environment={k: str(v) for k, v in environment.items()})
        self.running.add(pid)
        return pid

    def wait(self, pid: int, seconds: float = 120) -> int:
        """How it ended, as ``Popen.returncode``."""
        code = self._order(wait=pid, seconds=seconds)
        self.running.discard(pid)
        assert code != "still running", f"not done after {seconds} s"
        return code

    def run(self, code: str, log: Path, **environment: object) -> int:
        return self.wait(self.start(code, log, **environment))

    def pair(self, code: str, log: Path, seconds: float = 120) -> list[int]:
        """Two processes of one training run, as torchrun would start them; their logs end in the rank."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        started = [self.start(code, log.with_suffix(f".{rank}"), **as_rank(rank, port)) for rank in (0, 1)]
        return [self.wait(pid, seconds) for pid in started]

    def close(self) -> None:
        for pid in self.running:  # of tests that failed
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=60)


def as_rank(rank: int, port: int) -> dict[str, object]:
    """Torchrun's environment of one of two processes."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    return {**own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
