"""The errors that a command prints as one line, each with its exit code; any other keeps its traceback."""


class InputError(Exception):
    """Bad input or parameters. The message is one complete line: what is wrong, where, and what would be right.

    Commands print it without a traceback and exit with 2.
    """


class Interrupted(Exception):
    """Work was stopped from outside after its state had been saved; the same command carries on. Exit code 75."""


class StageFailed(Exception):
    """Work that cannot be finished for a reason that is known and explained in one line. Exit code 1, no traceback."""
