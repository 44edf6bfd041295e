"""One stack for the tests here: it takes half a minute to start."""

from collections.abc import Iterator

import pytest

from tests.stack.running import Stack, start_stack


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "stack" in item.path.parts:
            item.add_marker(pytest.mark.stack)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Server, worker, MLflow and S3, well when the session begins; a test leaves it so."""
    with start_stack(tmp_path_factory.mktemp("stack") / "project") as running:
        yield running
