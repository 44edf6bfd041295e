"""One stack for the tests here: it takes half a minute to start."""

from collections.abc import Iterator

import pytest

from tests import forks
from tests.stack.running import Stack, start_stack


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "stack" in item.path.parts:
            item.add_marker(pytest.mark.stack)


@pytest.fixture(scope="session")
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Server, worker, MLflow and S3, well when the session begins; a test leaves it so.

    Stages are forks of a warm process, but in a session that kills them.
    """
    kills = any(item.get_closest_marker("soak") for item in request.session.items)
    with start_stack(tmp_path_factory.mktemp("stack") / "project", **({} if kills else forks.environment())) as running:
        yield running
