"""Many small cases in one test: without the time that a test of its own takes for each."""

from collections.abc import Callable, Iterable
from functools import wraps
from inspect import signature
from typing import Any


def each(names: str | tuple[str, ...], cases: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`pytest.mark.parametrize` as a loop in one test; the case that fails is named below its traceback.

    The fixtures are those of one test, so `tmp_path` and `monkeypatch` are shared by all cases.
    """
    names, cases = (names,) if isinstance(names, str) else names, list(cases)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @wraps(test)
        def loop(**fixtures: Any) -> None:
            for case in cases:
                chosen = dict(zip(names, (case,) if len(names) == 1 else case, strict=True))
                try:
                    test(**fixtures, **chosen)
                except BaseException as error:
                    error.add_note(f"with {', '.join(f'{name} = {value}' for name, value in chosen.items())}")
                    raise

        kept = [parameter for name, parameter in signature(test).parameters.items() if name not in names]
        loop.__signature__ = signature(test).replace(parameters=kept)  # type: ignore[attr-defined]
        return loop

    return decorate
