"""Every call of MLflow's client counted, so that a test can kill or fail a command at any of them."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

ALL = ("create_", "delete_", "get_", "log_", "search_", "set_")
CHANGING = ("create_", "delete_", "log_", "set_")


class Calls:
    """Calls `before` and `after` with the number of each outermost call, from 0, made by the thread that made this."""

    def __init__(
        self, patch: pytest.MonkeyPatch, prefixes: tuple[str, ...], before: Callable[[int], None], after: Any = None
    ) -> None:
        from mlflow import MlflowClient

        self.names: list[str] = []
        self._before, self._after = before, after or (lambda number: None)
        self._inside, self._thread = False, threading.current_thread()
        for name in dir(MlflowClient):
            if name.startswith(prefixes):
                patch.setattr(MlflowClient, name, self._wrapped(name, getattr(MlflowClient, name)))

    def _wrapped(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if self._inside or threading.current_thread() is not self._thread:
                return method(*arguments, **named)
            number = len(self.names)
            self.names.append(name)
            self._before(number)
            self._inside = True
            try:
                result = method(*arguments, **named)
            finally:
                self._inside = False
            self._after(number)
            return result

        return call
