"""Python reads this at its start, with this folder on PYTHONPATH. A command that `server.py` keeps warm is run there.

Importing DVC, torch, MLflow or Great Expectations takes one to seven seconds of processor time, and the tests run
hundreds of small commands. A command still gets its own arguments, environment, working directory, standard streams and
signals, and its exit code comes back.
"""

import os
import sys


def _run_warm(path: str, module: str, arguments: list[str]) -> None:
    import array
    import json
    import signal
    import socket

    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
        except OSError:
            return  # there is no server: an ordinary start
        request = {
            "module": module,
            "arguments": arguments,
            "directory": os.getcwd(),  # noqa: PTH109 (pathlib would be imported at every start)
            "environment": dict(os.environ),
            "path": [] if sys.flags.safe_path else [""],
        }
        streams = array.array("i", [0, 1, 2])
        content = json.dumps(request).encode()
        connection.sendmsg([len(content).to_bytes(8)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        connection.sendall(content)
        answers = connection.makefile()
        pid = int(answers.readline())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda received, _: os.kill(pid, received))
        code = int(answers.readline() or -signal.SIGKILL)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


_path = os.environ.get("TESTS_WARM")
if _path and "-m" in sys.orig_argv:
    _module, *_arguments = sys.orig_argv[sys.orig_argv.index("-m") + 1 :]
    if _module == "dvc" or _module.split(".")[0] == "darkroom":
        _run_warm(_path, _module, _arguments)
