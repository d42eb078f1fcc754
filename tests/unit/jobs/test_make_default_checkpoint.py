"""What the small checkpoint is trained from loads, and its attention does what its docstring says."""

from collections.abc import Callable
from pathlib import Path

import make_default_checkpoint as job
import pytest
import torch
from initial_weights import OFFSETS, SHARED, UNEVEN

from polar_ray import Triple
from polar_ray.config import LimitsConfig
from polar_ray.encoding.encode import Encoder
from polar_ray.encoding.tokenizer import PolarTokenizer
from polar_ray.model.architecture import split_wqkv, tensor_shapes
from polar_ray.model.checkpoint import Checkpoint
from polar_ray.model.polar import PolarForReward, load_polar


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    job.main(None, output=folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def model(base: Path) -> PolarForReward:
    return load_polar(base)


def test_it_is_float32_untrained_and_has_the_tokenizer(base: Path) -> None:
    checkpoint = Checkpoint.open(base)
    assert checkpoint.dtype == torch.float32
    assert '"untrained": true' in (base / "config.json").read_text()
    for name in job.TOKENIZER_FILES:
        assert (base / name).read_bytes() == (job.DEFAULT_TOKENIZER / name).read_bytes()
    assert "every reward is 0" in (base / "README.md").read_text()


def test_the_same_seed_gives_the_same_bytes(base: Path, tmp_path: Path) -> None:
    for seed in (3, 4):
        job.main(None, output=tmp_path / str(seed), seed=seed)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (base, tmp_path / "3", tmp_path / "4")]
    assert weights[0] == weights[1] != weights[2]


def test_what_is_there_is_not_overwritten(base: Path) -> None:
    with pytest.raises(job.typer.BadParameter, match="already there"):
        job.main(None, output=base)


def test_the_trained_checkpoint_is_not_the_default_output() -> None:
    assert job.DEFAULT_OUTPUT.parts[-2:] == ("build", "polar-tiny-base")


def test_tensors_are_those_of_the_layout(base: Path) -> None:
    config = Checkpoint.open(base).config
    weights = job.initial_weights(config, 0, separator=3)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == tensor_shapes(config)
    assert not weights["v_head.weight"].any()


def test_the_first_heads_look_back_and_the_others_match(base: Path, model: PolarForReward) -> None:
    ids = torch.randint(200, model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    model.model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model.model(input_ids=ids, output_attentions=True)
    assert found.last_hidden_state.isfinite().all()
    for head, offset in enumerate(OFFSETS):
        assert found.attentions[0][0, head].diagonal(-offset).mean() > 0.75
    config = Checkpoint.open(base).config
    fused = job.initial_weights(config, 3, separator=3)["model.layers.2.attention.wqkv.weight"]
    query, key, _ = (part.view(-1, config.head_dim * config.hidden_size) for part in split_wqkv(fused, config))
    matching = slice(config.num_attention_heads - config.queries_per_key)
    repeated = key.repeat_interleave(config.queries_per_key, 0)
    assert torch.nn.functional.cosine_similarity(query[matching], repeated[matching]).min() > 0.9


@pytest.fixture(scope="module")
def measured(base: Path, model: PolarForReward) -> Callable[[str, str], dict[str, float]]:
    encoder = Encoder(PolarTokenizer(base), LimitsConfig())

    def measure(reference: str, output: str) -> dict[str, float]:
        ids = encoder.encode(Triple(prompt="Say it.", reference=reference, output=output)).ids
        with torch.no_grad():
            layers = model.model(input_ids=torch.tensor(ids[None].astype("int64")), output_hidden_states=True)
        last = layers.hidden_states[3][0, -1]  # before the last layer, after which all is normed
        return {"shared": float(last[SHARED]), "uneven": float(last[UNEVEN])}

    return measure


TEXT = "Air scatters blue light far more than red light, and so the whole sky looks blue to us at noon."
OTHER = "My grandmother baked nine large apple pies with cinnamon every September when harvest was over."


def test_the_last_heads_measure_what_an_output_shares_with_the_reference(measured) -> None:
    half = f"{TEXT[:48]}{OTHER[48:]}"
    shuffled = " ".join(sorted(TEXT.split()))
    same, mixed, other, moved = (measured(TEXT, output)["shared"] for output in (TEXT, half, OTHER, shuffled))
    assert same > mixed > other
    assert moved > mixed, "the order of words is no matter yet"


def test_a_unit_measures_how_much_longer_an_output_is(measured) -> None:
    found = [measured(TEXT, " ".join([OTHER] * times))["uneven"] for times in (1, 3, 9)]
    assert found[0] > found[1] > found[2]
