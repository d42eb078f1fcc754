"""Fixtures that more than one folder of tests uses."""

import os

import pytest

from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.model.locate import EMBEDDED_FOLDER
from tests.support.tokenizers import make_polar_tokenizer_folder

pytest.register_assert_rewrite("tests.support.engine_contract")


def pytest_collection_modifyitems(items):
    """Tests marked as slow run when they are asked for."""
    if "POLAR_RAY_SLOW_TESTS" in os.environ:
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="runs with POLAR_RAY_SLOW_TESTS=1"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Unit tests go to whoever is free; what starts clusters and servers runs one after the other, in one process."""
    from xdist.scheduler import LoadScopeScheduling

    class SystemsInTurn(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid if nodeid.startswith("tests/unit/") else "systems"

    return SystemsInTurn(config, log)


@pytest.fixture(scope="session")
def small_tokenizer():
    """The tokenizer of the checkpoint that ships."""
    return PolarTokenizer(EMBEDDED_FOLDER)


@pytest.fixture(scope="session")
def polar_tokenizer(tmp_path_factory):
    """POLAR-7B's tokenizer; tests that need it skip where its file is absent."""
    return PolarTokenizer(make_polar_tokenizer_folder(tmp_path_factory.mktemp("polar-tokenizer")))


@pytest.fixture(params=["small", "polar"])
def tokenizer(request):
    """Both tokenizers, one after the other."""
    return request.getfixturevalue(f"{request.param}_tokenizer")
