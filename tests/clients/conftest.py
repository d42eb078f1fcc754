"""The pinned packages of other projects, loaded file by file, and an endpoint for their clients to ask."""

import importlib.util
import json
import logging
import shutil
import sys
import types
from pathlib import Path

import pytest

from polar_ray.model.locate import EMBEDDED_FOLDER
from tests.support.endpoint import running_endpoint, serve_config

CLIENTS = Path(__file__).parents[2] / ".clients"


def load_file(path: str, name: str, **stand_ins: types.ModuleType):
    """One module of a client's package, as it is on disk, without running the package's own `__init__`.

    `stand_ins` are put in place of imports that are not on the way that is tested, for as long as the module loads.
    """
    file = CLIENTS / path
    if not file.is_file():
        pytest.skip(f"{path}: not installed; run make clients")
    kept = {key: sys.modules.get(key) for key in stand_ins}
    sys.modules.update(stand_ins)
    try:
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        for key, before in kept.items():
            sys.modules.pop(key)
            if before is not None:
                sys.modules[key] = before


def logging_stand_in(name: str) -> types.ModuleType:
    """A module with `init_logger`, for packages whose own pulls in training code."""
    module = types.ModuleType(name)
    module.init_logger = logging.getLogger
    return module


@pytest.fixture(scope="session")
def clients():
    """The folder of other projects' packages, importable, after everything of our own environment."""
    sys.path.append(str(CLIENTS))
    yield CLIENTS
    sys.path.remove(str(CLIENTS))


@pytest.fixture(scope="session")
def endpoint():
    """The real API over the torch engine; responses cut left, as xtuner's client does by default."""
    config = serve_config(engine={"kind": "torch", "device": "cpu", "dtype": "float32"}, limits={"cut_side": "left"})
    with running_endpoint(config) as address:
        yield address


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """The embedded checkpoint's tokenizer as a stock Llama one, which transformers loads without remote code."""
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(EMBEDDED_FOLDER / "tokenizer.model", folder)
    settings = json.loads((EMBEDDED_FOLDER / "tokenizer_config.json").read_text())
    stock = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        **{name: settings[name] for name in ("added_tokens_decoder", "bos_token", "eos_token", "unk_token")},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(stock))
    return folder
