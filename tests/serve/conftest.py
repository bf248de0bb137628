"""One server that the tests of a module share."""

from collections.abc import Iterator

import pytest

from tests.serve.scene import Scene, serving


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with serving() as running:
        yield running
