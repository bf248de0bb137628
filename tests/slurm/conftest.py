"""A real Slurm of two nodes on this machine for the modules that ask for one."""

from collections.abc import Iterator

import pytest

from tests.slurm.jobs import NoSlurm, Slurm, cluster


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    try:
        with cluster() as running:
            yield running
    except NoSlurm as error:
        pytest.skip(str(error))
