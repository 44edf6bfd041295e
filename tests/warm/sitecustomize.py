"""Python reads this at its start, with this folder on PYTHONPATH. A command that `server.py` keeps warm is run there.

Importing DVC, torch, MLflow or Great Expectations takes one to seven seconds of processor time, and the tests run
hundreds of small commands. A command still gets its own arguments, environment, working directory, standard streams and
signals, and its exit code comes back.
"""

import os
import sys

_path = os.environ.get("TESTS_WARM")
if _path and "-m" in sys.orig_argv:
    _module = sys.orig_argv[sys.orig_argv.index("-m") + 1]
    if _module == "dvc" or _module.split(".")[0] == "darkroom":
        import warm_client

        warm_client.run(_path, sys.orig_argv[1:])

if "TESTS_KILL" in os.environ and "-m" in sys.orig_argv:
    import file_trace

    _place = sys.orig_argv.index("-m") + 1
    file_trace.install(sys.orig_argv[_place], sys.orig_argv[_place + 1 :])
