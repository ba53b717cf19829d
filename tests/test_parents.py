"""What may be given as a parent beside a plain model: adapters, and weights that are quantized or elsewhere."""

import copy
import json

import pytest
import torch
from helpers import CHOICES, difference, flextron, parent_of
from test_teachers import tokenizer_of
from training import with_adapter
from transformers import AutoModelForCausalLM

from flextron_trainer import convert

DATA = torch.randint(0, 96, (8, 16), generator=torch.Generator().manual_seed(2))
IDS = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(1))


def elastic_of(parent, **changes):
    return convert(parent, DATA, mlp=[1, 0.5], heads=[1, 0.5], budgets=[1, 0.6], **changes)


def adapted(variant="gqa-wide-heads", **settings):
    """A parent with a LoRA that changes what it says, and what it says."""
    model = with_adapter(parent_of(variant), **settings).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.1, generator=generator)
        return model, model(IDS).logits


@pytest.fixture
def folders(tmp_path):
    """The folder of an adapter whose base is in another, and what both together say."""
    model, logits = adapted()
    parent_of("gqa-wide-heads").save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", tmp_path / "base", logits


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("gqa-wide-heads", {}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        ("mha-tied-biased", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),  # no longer tied
    ],
)
@torch.no_grad()
def test_the_adapters_of_a_model_are_merged(variant, settings):
    model, logits = adapted(variant, **settings)
    assert difference(logits, parent_of(variant)(IDS).logits) > 0.1
    elastic = elastic_of(model)
    assert difference(elastic(IDS).logits, logits) < 2e-5 * logits.abs().max()
    assert elastic.config.parent_name is None
    assert torch.equal(model(IDS).logits, logits)  # and stay as they are in the model that was given


@torch.no_grad()
def test_the_folder_of_an_adapter_is_its_base_and_the_adapter(folders, tmp_path):
    folder, base, logits = folders
    elastic = elastic_of(folder)
    assert difference(elastic(IDS).logits, logits) < 2e-5 * logits.abs().max()
    assert elastic.config.parent_name == "adapter"
    tokenizer_of().save_pretrained(base)  # and the tokenizer is that of the base
    (tmp_path / "text.txt").write_text("w1 w2 w3 " * 40)
    flextron("convert", folder, tmp_path / "out", "--calibration", tmp_path / "text.txt", "--device", "cpu")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["parent_name"] == "adapter"
    preset = {"config": json.loads((base / "config.json").read_text()), "convert": {"mlp": [1, 0.5]}}
    (tmp_path / "mine.json").write_text(json.dumps(preset))
    preset = ("--preset", tmp_path / "mine.json", "--calibration", "weights", "--device", "cpu")
    assert flextron("convert", folder, tmp_path / "two", *preset)["frontier"]


def test_adapters_that_do_not_fit_or_are_not_merged_are_refused(folders, tmp_path):
    peft = pytest.importorskip("peft")
    folder, base, _ = folders
    parent_of("gqa-wide-heads", num_hidden_layers=2).save_pretrained(base)
    with pytest.raises(ValueError, match=r"`parent`=.*adapter' cannot be used\. Its tensors do not fit its base"):
        elastic_of(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not name its base"):
        elastic_of(folder)
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="kind PROMPT_TUNING are not merged"):
        elastic_of(peft.get_peft_model(parent_of("mha"), prompts))
    inside = parent_of("gqa-wide-heads")
    inside.load_adapter(str(folder))
    with pytest.raises(ValueError, match=r"`parent`='LlamaForCausalLM' cannot be used\. An adapter was put into it"):
        elastic_of(inside)


@pytest.mark.parametrize("parent", [None, 7, torch.nn.Linear(2, 2), torch.nn.ModuleList()])
def test_other_things_are_refused_by_name(parent):
    with pytest.raises(ValueError, match=f"`parent`='{type(parent).__name__}' cannot be used. It is a causal"):
        elastic_of(parent)


def test_quantized_weights_are_refused_by_name(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    parent_of("mha").save_pretrained(tmp_path)
    how = {"quantization_config": TorchAoConfig(torchao.Int8WeightOnlyConfig())}
    by_hand = copy.deepcopy(parent_of("mha"))
    torchao.quantize_(by_hand, torchao.Int8WeightOnlyConfig())
    for parent, options in (
        (AutoModelForCausalLM.from_pretrained(tmp_path, **how), {}),
        (by_hand, {}),
        (tmp_path, how),
    ):
        with pytest.raises(ValueError, match=r"neither quantized nor divided .* is of the kind Int8Tensor.*dequantize"):
            elastic_of(parent, **options)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()  # before weights are read
    with pytest.raises(ValueError, match=r"neither quantized nor divided .*'quant_method': 'gptq'"):
        elastic_of(tmp_path)


@pytest.mark.parametrize("variant", ["gqa-tied-llama3", "gpt2"])
@torch.no_grad()
def test_weights_on_the_disk_are_read_one_by_one(variant, tmp_path):
    """A `device_map` of several places, by the user or by `convert`."""
    whole = parent_of(variant)
    whole.save_pretrained(tmp_path / "parent")
    name = whole.base_model_prefix
    places = {part: "disk" for part, _ in whole.named_children() if part != name}
    for i, (part, _) in enumerate(getattr(whole, name).named_children()):
        places[f"{name}.{part}"] = "cpu" if i == 0 else "disk"
    if whole.config.tie_word_embeddings:
        places["lm_head"] = "cpu"
    how = {"device_map": places, "offload_folder": str(tmp_path / "offload")}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "parent", **how)
    assert any(parameter.is_meta for parameter in loaded.parameters())
    expected = convert(whole, DATA, **CHOICES)
    for elastic in (convert(loaded, DATA, **CHOICES), convert(tmp_path / "parent", DATA, **CHOICES, **how)):
        for (key, a), (_, b) in zip(expected.named_parameters(), elastic.named_parameters(), strict=True):
            assert torch.equal(a, b), key
    with pytest.raises(ValueError, match="parts of its base were offloaded"):
        convert(with_adapter(loaded), DATA)


@pytest.mark.parametrize("variant", ["gqa-tied-llama3", "gqa-wide-heads", "gpt2"])
@torch.no_grad()
def test_weights_in_files_are_those_in_memory(variant, tmp_path):
    """With every choice that asks the whole model: order, depth, rows, search, corrections."""
    whole, folder = parent_of(variant), tmp_path / "offload"
    whole.save_pretrained(tmp_path / "parent")
    same = {**CHOICES, "corrections": 0.05, "search_evaluations": 3, "sequence_length": 16, "batch_size": 4}
    expected = convert(whole, DATA, **same)
    for parent in (whole, tmp_path / "parent"):
        elastic = convert(parent, DATA, **same, offload_folder=folder)
        assert elastic.config.frontier == expected.config.frontier
        assert elastic.config.corrections == expected.config.corrections
        for (key, a), (_, b) in zip(expected.named_parameters(), elastic.named_parameters(), strict=True):
            assert torch.equal(a, b), key
        assert not any(folder.iterdir())
    half = convert(tmp_path / "parent", DATA, **CHOICES, order="importance", dtype="bfloat16")
    placed = convert(tmp_path / "parent", DATA, **CHOICES, order="norms", dtype="bfloat16", offload_folder=folder)
    assert half.dtype == placed.dtype == torch.bfloat16 == placed.config.dtype
    elastic.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(IDS).logits, expected(IDS).logits)
    with pytest.raises(ValueError, match="mapped into the memory of the CPU"):
        convert(whole, DATA, device="cuda", offload_folder=folder)
