"""Runs Python in processes that know each other, as a launcher starts them."""

import os
import runpy
import socket
import subprocess
import sys


def in_processes(script, *arguments, count=2, **environment):
    """What each process of a script showed, (stdout, stderr) by rank; all of them must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(script), *arguments],
            env={**os.environ, **shared, **environment}
            | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        shown = [process.communicate(timeout=280) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert not any(process.returncode for process in ranks), shown
    return shown


if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of gloo may still drop tensors, and PyTorch aborts an interpreter that ends meanwhile
    # (its issue 190489); it keeps them beyond destroy_process_group where it averaged gradients.
    os._exit(0)
