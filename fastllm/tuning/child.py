"""Runs a command of this package until it ends or its parent dies.

`python -m fastllm.tuning.child train --file_path book.txt`, in a session of its own and with a pipe
from the parent as stdin. The system closes the pipe when the parent dies, even by SIGKILL.
"""

import os
import runpy
import signal
import sys
import threading


def _kill_group_at_end_of_file() -> None:
    # os.read, as a read of sys.stdin would hold a lock that Python takes at its exit.
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_kill_group_at_end_of_file, daemon=True).start()
    command = sys.argv.pop(1)
    runpy.run_module(f"fastllm.{command}", run_name="__main__", alter_sys=True)
