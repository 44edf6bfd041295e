"""Runs Python commands in forks of one process that has the slow imports: `server.py SOCKET PID`, until PID ends."""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

# No module of the project: each command has its own copy of that on its path.
IMPORTED = (
    "dvc._debug",
    "dvc.cachemgr",
    "dvc.cli.parser",
    "dvc.commands.repro",
    "dvc.data_cloud",
    "dvc.lock",
    "dvc.output",
    "dvc.repo.artifacts",
    "dvc.repo.datasets",
    "dvc.repo.experiments.cache",
    "dvc.repo.index",
    "dvc.repo.metrics.show",
    "dvc.repo.params.show",
    "dvc.repo.plots",
    "dvc.repo.reproduce",
    "dvc.repo.stage",
    "dvc.repo.worktree",
    "dvc.rwlock",
    "dvc.scm",
    "dvc.utils.strictyaml",
    "dvc_data.index.checkout",
    "dvc_data.index.fetch",
    "dvc_data.index.push",
    "dvc_s3",
    "s3fs",
    "scmrepo.git",
    "pygit2",
    "fsspec.implementations.memory",
    "rich.json",
    "torch",
    "torch.optim",
    "sympy",  # the first optimizer asks for it
    "torchmetrics.image.fid",
    "torchmetrics.image.kid",
    "safetensors.torch",
    "sklearn.datasets",
    "pandas",
    "pyarrow.parquet",
    "great_expectations",
    "great_expectations.expectations.core",
    "mlflow",
    "mlflow.pyfunc",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "boto3",
    "PIL.Image",
)


def serve(path: str, owner: int) -> dict[str, Any]:
    """Fork for every request and return, in the fork alone, what it has to run. The server ends when `owner` does."""
    children: dict[int, tuple[socket.socket, int]] = {}
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as events:
        listener.bind(path)
        listener.listen(64)
        for module in IMPORTED:
            importlib.import_module(module)
        gc.collect()
        gc.freeze()  # the forks share what was imported
        events.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in events.select(timeout=1):
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    request, streams = receive(connection)
                    pid = os.fork()
                    if pid == 0:
                        become(request, streams)
                        return request
                    for stream in streams:
                        os.close(stream)
                    connection.sendall(f"{pid}\n".encode())
                    ended = os.pidfd_open(pid)
                    children[pid] = (connection, ended)
                    events.register(ended, selectors.EVENT_READ, pid)
                    events.register(connection, selectors.EVENT_READ, pid)
                elif key.data in children:
                    pid = key.data
                    connection, ended = children[pid]
                    if key.fileobj is connection:  # whoever asked is gone
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    _, status = os.waitpid(pid, 0)
                    with contextlib.suppress(OSError):
                        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                    events.unregister(connection)
                    events.unregister(ended)
                    connection.close()
                    os.close(ended)
                    del children[pid]
            if not Path(f"/proc/{owner}").exists() or not Path(path).exists():
                os._exit(0)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request and the three standard streams that come with it."""
    header, streams, _, _ = socket.recv_fds(connection, 8, 3)
    size, content = int.from_bytes(header), b""
    while len(content) < size:
        content += connection.recv(size - len(content))
    return json.loads(content), streams


def become(request: dict[str, Any], streams: list[int]) -> None:
    """Make this fork the process that was asked for."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run(flags: list[str]) -> int:
    """Run what `python FLAGS` would: a module, a program or a file. Returns the exit code."""
    options = set()
    while flags[0] in ("-I", "-P", "-B"):
        option, *flags = flags
        options.add(option)
    kind, name, *arguments = flags if flags[0] in ("-m", "-c") else ["", *flags]
    first = "" if kind else str(Path(name).absolute().parent)
    added = [] if "-I" in options else [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [*([] if options & {"-I", "-P"} else [first]), *added, *sys.path]
    sys.argv = [kind or name, *arguments]
    if kind == "-m" and "TESTS_KILL" in os.environ:
        import file_trace

        file_trace.install(name, arguments)
    try:
        if kind == "-m":
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        elif kind == "-c":
            exec(name, {"__name__": "__main__"})
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0


if __name__ == "__main__":
    del sys.path[0]  # this folder
    request = serve(sys.argv[1], int(sys.argv[2]))
    code = run(request["arguments"])
    # What an interpreter does at its end, but for taking all that was imported to pieces, which takes a second.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
