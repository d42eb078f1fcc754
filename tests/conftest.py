"""Fixtures that more than one folder of tests uses."""

import os
from pathlib import Path

import pytest

from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.model.locate import EMBEDDED_FOLDER
from tests.support.tokenizers import make_polar_tokenizer_folder

UNIT_TESTS = Path(__file__).parent / "unit"

pytest.register_assert_rewrite("tests.support.engine_contract")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Tests marked as slow run when they are asked for; what starts clusters and servers, one after the other."""
    for item in items:
        if item.get_closest_marker("slow") and "POLAR_RAY_SLOW_TESTS" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="runs with POLAR_RAY_SLOW_TESTS=1"))
        if config.pluginmanager.hasplugin("xdist") and not _can_run_beside_others(item):
            item.add_marker(pytest.mark.xdist_group("systems"))


def _can_run_beside_others(item):
    return item.path.is_relative_to(UNIT_TESTS) and not item.get_closest_marker("ray")


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
