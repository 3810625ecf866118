import pytest

from tests.exporting.networks import Network, run_networks


@pytest.fixture(scope="session")
def networks() -> dict[str, Network]:
    """Small networks by name, with the answers that JAX gives."""
    return run_networks()
