"""Opening, refusing, digesting and writing checkpoints."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from polar_ray.errors import CheckpointError
from polar_ray.model.architecture import CheckpointConfig, merge_wqkv, split_wqkv, tensor_shapes
from polar_ray.model.checkpoint import Checkpoint, save_checkpoint, weights_digest
from polar_ray.model.polar import load_polar
from tests.support.checkpoints import write_checkpoint, write_shards


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "model")


def change_config(folder, **fields):
    file = folder / "config.json"
    values = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": ["InternLM2ForCausalLM"]}, r"architectures = \['InternLM2ForCausalLM'\]"),
        ({"architectures": "absent"}, "architectures is missing"),
        ({"bias": True}, "bias = True"),
        ({"bias": "absent"}, "bias is missing"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.type = 'yarn'"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "rope_scaling.factor = 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "rope_scaling.beta = 1"),
        ({"rope_theta": "absent"}, "rope_theta is missing"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"hidden_size": "wide"}, "hidden_size = 'wide'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "head_dim = 12"),
        ({"head_dim": 32}, "head_dim = 32"),
        ({"pad_token_id": 512}, "pad_token_id = 512"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_config_that_cannot_be_ours_is_refused_by_field_and_value(folder, fields, named):
    change_config(folder, **fields)
    with pytest.raises(CheckpointError, match=named):
        Checkpoint.open(folder)


def test_fields_that_decide_nothing_do_no_harm(folder):
    change_config(
        folder, attn_implementation="eager", auto_map={"AutoModel": "x.Y"}, torch_dtype="int4", pretraining_tp=2
    )
    assert load_polar(folder).config._attn_implementation == "sdpa"


def test_heads_without_grouping_need_no_number_of_key_value_heads():
    text = json.dumps(
        {
            "architectures": ["InternLM2ForRewardModel"],
            "vocab_size": 8,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": None,
            "max_position_embeddings": 64,
            "rope_theta": 10000,
            "rope_scaling": None,
            "rms_norm_eps": 1e-5,
            "bias": False,
        }
    )
    config = CheckpointConfig.from_json(text)
    assert (config.num_key_value_heads, config.head_dim, config.reward_token_id) == (2, 8, 92527)


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_a_config_that_is_no_json_object_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(folder)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        Checkpoint.open(tmp_path)


def test_a_missing_tensor_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.attention.wo.weight"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.attention\.wo\.weight \[64, 64\] is missing"):
        Checkpoint.open(folder)


def test_an_extra_tensor_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.update({"output.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"output\.weight is not part"):
        Checkpoint.open(folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(folder):
    change_tensors(folder, lambda tensors: tensors.update({"v_head.weight": torch.zeros(2, 64)}))
    with pytest.raises(CheckpointError, match=r"v_head\.weight has shape \[2, 64\]; config\.json asks for \[1, 64\]"):
        Checkpoint.open(folder)


def test_a_tensor_of_integers_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.update({"v_head.weight": torch.zeros(1, 64, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"v_head\.weight has dtype I8"):
        Checkpoint.open(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = write_checkpoint(tmp_path, n_shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: named in"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {"v_head.weight": "../elsewhere.safetensors"}}'])
def test_an_index_that_is_wrong_or_points_elsewhere_is_refused(tmp_path, index):
    folder = write_checkpoint(tmp_path, n_shards=2)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="safetensors"):
        Checkpoint.open(folder)


def test_pickled_weights_are_refused_and_never_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: weights are pickled"):
        Checkpoint.open(folder)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("keep", [4, 100, -10], ids=["no header", "half a header", "half a tensor"])
def test_a_file_that_was_cut_short_is_refused(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (8, 1)])
def test_wqkv_is_split_as_specified_and_merged_back_bit_for_bit(heads, groups):
    config = CheckpointConfig.model_construct(
        num_attention_heads=heads, num_key_value_heads=groups, head_dim=4, hidden_size=heads * 4
    )
    fused = torch.randn((heads + 2 * groups) * 4, config.hidden_size)
    query, key, value = split_wqkv(fused, config)
    for head in range(heads):
        group, place = divmod(head, heads // groups)
        start = (group * (heads // groups + 2) + place) * 4
        assert torch.equal(query[head * 4 : head * 4 + 4], fused[start : start + 4])
    for group in range(groups):
        start = (group * (heads // groups + 2) + heads // groups) * 4
        assert torch.equal(key[group * 4 : group * 4 + 4], fused[start : start + 4])
        assert torch.equal(value[group * 4 : group * 4 + 4], fused[start + 4 : start + 8])
    assert torch.equal(merge_wqkv(query, key, value, config), fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 20_000], ids=["one file", "shards"])
def test_a_loaded_model_is_written_back_bit_for_bit(tmp_path, dtype, max_shard_bytes):
    source = write_checkpoint(tmp_path / "source", dtype=dtype, unknown_field="kept")
    save_checkpoint(load_polar(source), tmp_path / "copy", max_shard_bytes=max_shard_bytes)

    assert (tmp_path / "copy" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "copy")
    assert before.stored.keys() == after.stored.keys()
    for name in before.stored:
        assert before.stored[name].dtype == after.stored[name].dtype
        assert torch.equal(before.read(name, dtype).view(torch.uint8), after.read(name, dtype).view(torch.uint8))
    assert weights_digest(source) == weights_digest(tmp_path / "copy")
    files = list((tmp_path / "copy").glob("*.safetensors"))
    assert len(files) == 1 or all(len(load_file(f)) == 1 or f.stat().st_size < 2 * max_shard_bytes for f in files)


def test_a_model_saved_in_another_dtype_says_so_in_its_config(tmp_path):
    source = write_checkpoint(tmp_path / "source", dtype=torch.float32)
    save_checkpoint(load_polar(source, dtype=torch.bfloat16), tmp_path / "copy")
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "copy"))
    assert after == before | {"torch_dtype": "bfloat16"}
    assert Checkpoint.open(tmp_path / "copy").dtype == torch.bfloat16


def test_weights_are_not_written_over(folder):
    with pytest.raises(CheckpointError, match="holds weights already"):
        save_checkpoint(load_polar(folder), folder)


def test_the_digest_does_not_depend_on_sharding_but_on_every_byte(folder, tmp_path):
    digest = weights_digest(folder)
    tensors = load_file(folder / "model.safetensors")
    for n_shards in (2, 5):
        sharded = tmp_path / f"{n_shards}"
        sharded.mkdir()
        shutil.copy(folder / "config.json", sharded)
        write_shards(sharded, tensors, n_shards)
        assert weights_digest(sharded) == digest
    change_tensors(folder, lambda tensors: tensors["model.norm.weight"][7:8].mul_(1 + 2**-20))
    assert weights_digest(folder) != digest


def test_published_sizes_follow_from_the_config():
    fields = {"architectures": ["InternLM2ForRewardModel"], "bias": False, "vocab_size": 92544, "rms_norm_eps": 1e-5}
    fields |= {"max_position_embeddings": 262144, "rope_theta": 5e7, "hidden_size": 4096, "intermediate_size": 14336}
    fields |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    shapes = tensor_shapes(CheckpointConfig.from_json(json.dumps(fields)))
    assert len(shapes) == 227
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 7_358_652_416
