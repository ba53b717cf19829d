"""Adapters: one LoRA for every size, its way to disk and back, and the trainers."""

import copy
import functools
import json
import shutil

import pytest
import torch
from helpers import CHOICES, all_sizes, difference, elastic_of, parent_of, run_python
from training import arguments, losses, rows, with_adapter
from training import trainer as flextron_trainer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from flextron_trainer.adapters import from_parent
from flextron_trainer.conversion.sizes import elastic_config
from flextron_trainer.conversion.weights import take
from modeling_flextron import FlextronForCausalLM
from modeling_flextron.families import axes, family_of, from_stock, layer_of, stock_name
from modeling_flextron.permutation import FILE
from modeling_flextron.token_routing import increment

peft = pytest.importorskip("peft")
IDS = torch.randint(1, 96, (2, 9), generator=torch.Generator().manual_seed(5))
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model.eval()


def adapted(base, targets="all-linear", **settings):
    return randomise(with_adapter(base, targets, **settings))


@torch.no_grad()
def logits(model, budget=None):
    return model(IDS, flextron_budget=budget).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A family on disk whose smaller networks skip the second layer, and its parent."""
    folder = tmp_path_factory.mktemp("family")
    base = elastic_of("gqa-wide-heads")
    base.config.elastic["layer_ranking"] = [1, 2, 3]
    base.save_pretrained(folder)
    parent_of("gqa-wide-heads").save_pretrained(folder / "parent")
    return folder


def stock_adapter(parent, folder, config=None, seed=0):
    """An adapter that was trained on a stock model."""
    model = AutoModelForCausalLM.from_pretrained(parent)
    torch.manual_seed(seed)
    model = peft.get_peft_model(
        model, config or peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    )
    disturb(model).save_pretrained(folder)
    return folder


def disturb(model, seed=0):
    """Give what an adapter trains other values than those it begins with."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    return model.eval()


def family(saved, budget=None):
    return FlextronForCausalLM.from_pretrained(saved, flextron_budget=budget)


def test_is_the_merged_model_at_every_size():
    """(B A)[:o, :i] = B[:o] A[:, :i], for every kind of layer, with several adapters, a bias and another scaling."""
    for variant, settings in (
        ("gqa-wide-heads", {"targets": [*LINEAR, "lm_head", "embed_tokens"], "use_rslora": True}),
        ("gpt2", {"targets": ["q_proj", "o_proj", "up_proj", "down_proj"], "lora_bias": True, "bias": "none"}),
    ):
        base = elastic_of(variant)
        sizes, before = all_sizes(base), logits(base, "0.35")
        model = adapted(base, **settings)
        model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=5, target_modules=["up_proj", "o_proj"]))
        randomise(model, 1)
        model.base_model.set_adapter(["default", "second"])
        with model.disable_adapter():
            assert difference(logits(model, "0.35"), before) == 0
        unmerged = [logits(model, size) for size in sizes]
        model.merge_adapter()
        assert difference(logits(model, sizes[1]), unmerged[1]) < 1e-5
        model.unmerge_adapter()
        merged = model.merge_and_unload(adapter_names=["default", "second"])
        for size, expected in zip(sizes, unmerged, strict=True):
            assert difference(logits(merged, size), expected) < 1e-5, size
        assert difference(logits(merged, "0.35"), before) > 1e-2


def test_gradients_are_those_of_the_slice_and_dropout_is_applied():
    model = adapted(elastic_of("gqa-wide-heads"), lora_dropout=0.5).train()
    with model.at_budget({"mlp": 48}):
        model(IDS, labels=IDS).loss.backward()
        first, second = logits(model), logits(model)
    up = model.base_model.model.model.layers[0].mlp.up_proj
    assert up.lora_B["default"].weight.grad[:48].any() and not up.lora_B["default"].weight.grad[48:].any()
    assert up.base_layer.weight.grad is None
    assert difference(first, second) > 0


def test_routed_tokens_run_with_adapters():
    base = elastic_of("gqa-wide-heads")
    mlp = base.model.layers[0].mlp
    states = torch.randn(5, 48)
    model = adapted(base, ["up_proj", "gate_proj", "down_proj"])
    expected = mlp(states, 72, 48)
    total = increment(mlp, states, slice(0, 24), 48, None)
    increment(mlp, states, slice(24, 72), 48, total)
    torch.testing.assert_close(total, expected)
    assert difference(expected, model.merge_and_unload().model.layers[0].mlp(states, 72, 48)) < 1e-5


@pytest.mark.parametrize("budget", ["0.6", {"mlp": 48, "layers": 2}, {"layers": 3}])
def test_loads_at_a_budget(saved, tmp_path, budget):
    """One adapter of the family on a small model: the same as on the family, and as merged before slicing."""
    model = adapted(family(saved), [*LINEAR, "embed_tokens"], modules_to_save=["lm_head"])
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, budget)
    small = peft.PeftModel.from_pretrained(family(saved, budget), tmp_path / "adapter", adapter_name="my-own")
    assert difference(logits(small), expected) < 1e-5
    automatic = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", flextron_budget=budget)
    assert difference(logits(automatic), expected) < 1e-5
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert difference(logits(family(tmp_path / "merged", budget)), expected) < 1e-5
    # An adapter of the small model is loaded as it is.
    small = randomise(small, 7)
    small.save_pretrained(tmp_path)
    (tmp_path / "my-own").rename(tmp_path / "small")  # PEFT writes all but its default into a folder of that name
    again = peft.PeftModel.from_pretrained(family(saved, budget), tmp_path / "small")
    assert difference(logits(again), logits(small)) < 1e-5
    if budget == {"mlp": 48, "layers": 2}:  # and never on a larger network in silence
        with pytest.raises(ValueError, match="adapter"):
            peft.PeftModel.from_pretrained(family(saved), tmp_path / "small")


def test_loads_through_transformers(saved, tmp_path):
    model = adapted(family(saved))
    model.save_pretrained(tmp_path)
    budget = {"mlp": 48, "layers": 2}
    small = family(saved, budget)
    small.load_adapter(tmp_path)
    assert difference(logits(small), logits(model, budget)) < 1e-5
    other, config = family(saved, budget), peft.PeftConfig.from_pretrained(tmp_path)
    backwards = dict(reversed(peft.load_peft_weights(tmp_path, device="cpu").items()))
    other.load_adapter(peft_config=config, adapter_state_dict=backwards)
    assert difference(logits(other), logits(model, budget)) < 1e-5
    small.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").exists()


def test_a_pickled_adapter_is_refused(saved, tmp_path):
    adapted(family(saved), ["up_proj"]).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="Only safetensors are read"):
        family(saved).load_adapter(tmp_path)


def test_layers_that_cannot_be_told(saved, tmp_path):
    adapted(family(saved), ["up_proj"], layers_to_transform=[0, 1]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be told"):
        peft.PeftModel.from_pretrained(family(saved, {"layers": 2}), tmp_path)


def test_without_our_package(saved, tmp_path):
    """An adapter of the family, and one of the parent, which fits what a small model has saved, too."""
    model, of_parent = adapted(family(saved)), stock_adapter(saved / "parent", tmp_path / "of_parent")
    model.save_pretrained(tmp_path)
    fitted = peft.PeftModel.from_pretrained(family(saved), of_parent)
    torch.save([IDS, *(logits(m, b) for m in (model, fitted) for b in ("0.35", "0.15"))], tmp_path / "expected.pt")
    run_python(
        """
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
adapter, base = sys.argv[1:]
ids, *expected = torch.load(adapter + "/expected.pt")
with torch.no_grad():
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, trust_remote_code=True)
    small = AutoPeftModelForCausalLM.from_pretrained(adapter, trust_remote_code=True, flextron_budget="0.15")
    found = [model(ids, flextron_budget="0.35").logits, small(ids).logits]
    small = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True, flextron_budget="0.35")
    small.save_pretrained(adapter + "/small")
    for budget in "0.35", "0.15":
        small = AutoModelForCausalLM.from_pretrained(adapter + "/small", trust_remote_code=True, flextron_budget=budget)
        found.append(PeftModel.from_pretrained(small, adapter + "/of_parent")(ids).logits)
for a, b in zip(found, expected, strict=True):
    assert (a - b).abs().max() < 1e-5
assert "modeling_flextron" not in sys.modules
""",
        tmp_path,
        saved,
        package=False,
    )


def test_what_is_refused(saved, tmp_path):
    base = family(saved)
    for config, name in (
        (peft.LoraConfig(target_modules=["up_proj"], use_dora=True), "Dora"),
        (peft.IA3Config(target_modules=["up_proj"], feedforward_modules=[]), "IA3|Linear"),
        (peft.LoHaConfig(target_modules=["down_proj"]), "Linear"),
        (peft.LoraConfig(target_modules=["up_proj"], trainable_token_indices=[3]), "Token"),
    ):
        model = peft.get_peft_model(copy.deepcopy(base), config).eval()
        assert torch.isfinite(logits(model)).all()  # at the built size everything runs
        with pytest.raises(ValueError, match=name):
            logits(model, {"mlp": 48, "hidden": 48})
    model = adapted(base)
    with pytest.raises(ValueError, match="adapter_names"):
        copy.deepcopy(model)(IDS, flextron_budget="0.35", adapter_names=["default", "__base__"])
    inner = model.base_model.model
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.extract("0.6")
    with pytest.raises(ValueError, match="merge_and_unload"):
        inner.save_pretrained(tmp_path / "no")
    assert difference(logits(model.share("0.35")), logits(model, "0.35")) == 0
    with pytest.raises(ValueError, match="stage"):
        flextron_trainer(tmp_path, model=model, stage="router")


# ----------------------------------------------------------------------------------- made for the parent


def converted(elastic, parent):
    """Another model of the parent's shape, converted as the parent of `elastic` was."""
    other, family = copy.deepcopy(elastic), family_of(elastic.config.base_model_type)
    theirs = parent.state_dict()
    state = {}
    for name in other.state_dict():
        view = from_stock(family, name, theirs[stock_name(family, name)], parent.config.num_attention_heads)
        state[name] = elastic.permutation.to_ours(view, axes(name), layer_of(name))
    other.load_state_dict(state)
    return other


def close(a, b):
    return difference(a, b) < 1e-5 * max(1.0, b.abs().max().item())


def folders(folder, variant, **changes):
    """A parent on disk, and its family."""
    parent, elastic = folder / "parent", folder / "elastic"
    parent_of(variant).save_pretrained(parent)
    elastic_of(variant, **changes).save_pretrained(elastic)
    return parent, elastic


@pytest.mark.parametrize("variant", ["gqa-wide-heads", "mha-tied-biased"])
def test_an_adapter_of_the_parent_is_right_at_every_size(tmp_path, variant):
    """It loads as one of ours does, and gives the parent with its adapter, converted."""
    parent, elastic = folders(tmp_path, variant)
    targets = [*LINEAR, "embed_tokens"] if variant == "gqa-wide-heads" else LINEAR
    settings = {"use_rslora": True, "bias": "all"} if variant == "mha-tied-biased" else {"modules_to_save": ["lm_head"]}
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, **settings)
    adapter = stock_adapter(parent, tmp_path / "adapter", config)
    merged = peft.AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload()
    expected = converted(family(elastic), merged)
    model = peft.PeftModel.from_pretrained(family(elastic), adapter)
    assert close(logits(model), merged(IDS).logits)
    sizes = all_sizes(expected, 2)
    for size in sizes:
        assert close(logits(model, size), logits(expected, size)), size
    for size in sizes[2:6:3]:
        small = peft.PeftModel.from_pretrained(family(elastic, size.to_dict()), adapter)
        assert close(logits(small), logits(expected, size)), size
    small = family(elastic, "0.35")
    small.load_adapter(adapter)
    assert close(logits(small), logits(expected, "0.35"))
    whole = family(elastic)
    whole.load_adapter(adapter)
    assert close(logits(whole), merged(IDS).logits)
    # What is saved now is an adapter of ours.
    model.save_pretrained(tmp_path / "ours")
    assert close(logits(peft.PeftModel.from_pretrained(family(elastic), tmp_path / "ours")), logits(model))
    automatic = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours", flextron_budget="0.15")
    assert close(logits(automatic), logits(expected, "0.15"))


def test_an_adapter_of_the_parent_fits_stock_models_where_nothing_is_cut(saved, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=[*LINEAR[:4], "embed_tokens", "lm_head"])
    adapter = stock_adapter(saved / "parent", tmp_path / "adapter", config)
    elastic = peft.PeftModel.from_pretrained(family(saved), adapter)
    stock = peft.PeftModel.from_pretrained(family(saved).extract({"mlp": 48}), adapter)
    assert close(stock(IDS).logits, logits(elastic, {"mlp": 48}))


def relabel(adapter, folder, **changes):
    """A copy of an adapter whose config says something else about its base."""
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_mapping": None} | changes))
    return folder


def test_what_tells_on_which_model_an_adapter_was_trained(saved, tmp_path):
    """Its class, or the name of its base: this model's, its parent's, or one whose config says what it is."""
    ours, theirs = tmp_path / "ours", stock_adapter(saved / "parent", tmp_path / "theirs")
    model = adapted(family(saved))
    model.save_pretrained(ours)
    fitted = peft.PeftModel.from_pretrained(family(saved), theirs)
    other = family(saved)
    other.config.parent_name = "you/llama"
    other.save_pretrained(tmp_path / "copy")
    elastic_of("gqa-wide-heads", order="reverse").save_pretrained(tmp_path / "reverse")

    def loaded(adapter, expected, base=tmp_path / "copy", **changes):
        again = relabel(adapter, tmp_path / str(len(list(tmp_path.iterdir()))), **changes)
        return close(logits(peft.PeftModel.from_pretrained(family(base), again)), logits(expected))

    llama = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama"}
    flextron = {"base_model_class": "FlextronForCausalLM", "parent_library": "modeling_flextron.modeling_flextron"}
    nowhere = str(tmp_path / "nowhere")
    for base in (str(saved), str(tmp_path / "copy")):  # a folder of the same conversion
        assert loaded(ours, model, base_model_name_or_path=base)
    assert loaded(ours, model, base_model_name_or_path=nowhere, auto_mapping=flextron)
    for base in (str(saved / "parent"), "you/llama"):
        assert loaded(theirs, fitted, base_model_name_or_path=base)
    assert loaded(theirs, fitted, base_model_name_or_path=nowhere, auto_mapping=llama)
    for base in (nowhere, None, ""):
        with pytest.raises(ValueError, match=r"cannot be told whether.*'you/llama'"):
            loaded(ours, model, base_model_name_or_path=base)
    with pytest.raises(ValueError, match="another conversion"):
        loaded(ours, model, base_model_name_or_path=str(tmp_path / "reverse"))
    with pytest.raises(ValueError, match="another conversion"):
        marked = {**flextron, "permutation": "of another"}
        loaded(ours, model, base_model_name_or_path=str(saved), auto_mapping=marked)


def test_nothing_is_asked_where_nothing_moved(saved, tmp_path):
    _, elastic = folders(tmp_path, "gqa-wide-heads", hidden=[1])
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens", "lm_head"])
    adapter = relabel(
        stock_adapter(saved / "parent", tmp_path / "a", config), tmp_path / "b", base_model_name_or_path="x"
    )
    model = peft.PeftModel.from_pretrained(family(elastic), adapter)
    assert close(logits(model), peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")(IDS).logits)


def test_a_checkpoint_that_does_not_know_its_permutation(saved, tmp_path):
    """What was trained on it loads as ever; an adapter of the parent is refused."""
    theirs = stock_adapter(saved / "parent", tmp_path / "theirs")
    model = adapted(family(saved))
    model.save_pretrained(tmp_path / "ours")
    shutil.copytree(saved, tmp_path / "old")
    config = json.loads((saved / "config.json").read_text())
    del config["permutation"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    (tmp_path / "old" / FILE).unlink()
    for number, base in enumerate((str(tmp_path / "old"), str(tmp_path / "nowhere"), None)):
        ours = relabel(tmp_path / "ours", tmp_path / f"ours-{number}", base_model_name_or_path=base)
        for budget in (None, "0.15"):
            again = peft.PeftModel.from_pretrained(family(tmp_path / "old", budget), ours)
            assert close(logits(again), logits(model, budget))
    with pytest.raises(ValueError, match="does not know in which order"):
        peft.PeftModel.from_pretrained(family(tmp_path / "old"), theirs)
    with pytest.raises(ValueError, match="does not know in which order"):
        from_parent(theirs, tmp_path / "old", tmp_path / "new")


def test_an_adapter_of_the_family_on_a_part_that_was_saved(saved, tmp_path):
    """The part has fewer layers, and knows which."""
    model = adapted(family(saved))
    model.save_pretrained(tmp_path / "adapter")
    family(saved, {"layers": 3}).save_pretrained(tmp_path / "part")
    part = peft.PeftModel.from_pretrained(family(tmp_path / "part"), tmp_path / "adapter")
    assert close(logits(part), logits(model, {"layers": 3}))
    smaller = peft.PeftModel.from_pretrained(family(tmp_path / "part", {"layers": 2, "mlp": 48}), tmp_path / "adapter")
    assert close(logits(smaller), logits(model, {"layers": 2, "mlp": 48}))


def test_what_of_the_parent_is_refused(saved, tmp_path):
    def refused(match, config, budget=None, parent=saved / "parent"):
        adapter = stock_adapter(parent, tmp_path / str(len(list(tmp_path.iterdir()))), config)
        with pytest.raises(ValueError, match=match):
            peft.PeftModel.from_pretrained(family(saved, budget), adapter)

    for config in (peft.VeraConfig(target_modules=["up_proj"]), peft.OFTConfig(target_modules=["down_proj"])):
        refused("cannot be put into the order", config)
    dora = peft.LoraConfig(target_modules=["o_proj"], use_dora=True)
    refused("This variant of LoRA is not the same on a part", dora, "0.35")
    by_number = peft.LoraConfig(target_modules=LINEAR, alpha_pattern={"layers.1.self_attn.q_proj": 3})
    refused("cannot be told which", by_number, {"layers": 3})
    refused("cannot be told which", peft.LoraConfig(target_modules=LINEAR, layers_to_transform=[2]), {"layers": 3})
    parent_of("gqa-wide-heads", intermediate_size=128).save_pretrained(tmp_path / "larger")
    refused("It has 128 in `mlp`", peft.LoraConfig(target_modules=["up_proj"]), parent=tmp_path / "larger")


RENAMED = {
    "gpt2": (["c_attn", "c_proj", "c_fc"], "mlp.c_proj", ["ln_1", "ln_f"], "wte"),
    "neox": (["query_key_value", "dense", "dense_h_to_4h"], "dense_4h_to_h", ["input_layernorm"], "embed_in"),
}


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "norms", "tokens", "adalora", "layers"])
@pytest.mark.parametrize("variant", list(RENAMED))
def test_adapters_of_families_with_other_names(variant, kind, tmp_path):
    """Rewritten, they give what the parent gives with them, and load at every size."""
    targets, down, norms, embeddings = RENAMED[variant]
    given = {"task_type": "CAUSAL_LM"}
    lora = given | {"r": 4, "fan_in_fan_out": variant == "gpt2", "target_modules": targets}
    config = {
        "lora": lambda: peft.LoraConfig(
            **lora, lora_bias=True, rank_pattern={down: 8}, alpha_pattern={down: 3, targets[0]: 20},
            trainable_token_indices={embeddings: IDS[0, :3].tolist()},
        ),
        "dora": lambda: peft.LoraConfig(**lora, use_dora=True, modules_to_save=[embeddings]),
        "ia3": lambda: peft.IA3Config(**given, target_modules=[targets[0], down], feedforward_modules=[down]),
        "norms": lambda: peft.LNTuningConfig(**given, target_modules=norms),
        "tokens": lambda: peft.TrainableTokensConfig(
            **given, target_modules=[embeddings], token_indices=IDS[0, :3].tolist()
        ),
        "adalora": lambda: peft.AdaLoraConfig(**lora | {"r": 8}, total_step=10),
        "layers": lambda: peft.LoraConfig(**lora, layers_to_transform=[1, 3], layers_pattern=["h", "layers"]),
    }[kind]()  # fmt: skip
    parent, elastic = folders(tmp_path, variant)
    adapter = stock_adapter(parent, tmp_path / "adapter", config)
    expected = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)(input_ids=IDS).logits
    with pytest.raises(ValueError, match=r"not found in the base model|no modules were targeted|no such module"):
        peft.PeftModel.from_pretrained(family(elastic), adapter)
    ours = from_parent(adapter, elastic, tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(family(elastic), ours)
    assert close(model(input_ids=IDS).logits, expected)
    assert difference(family(elastic)(IDS).logits, expected) > 1e-3
    if kind in ("lora", "layers"):
        for budget in ("0.6", "0.15"):
            small = peft.PeftModel.from_pretrained(family(elastic, budget), ours)
            at_once = from_parent(adapter, family(elastic, budget), tmp_path / budget)
            again = peft.PeftModel.from_pretrained(family(elastic, budget), at_once)
            if kind == "layers":  # trainable tokens run at the built size alone
                assert close(logits(small), logits(model, budget))
            assert close(logits(again), logits(small))


@pytest.mark.parametrize("config", [
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
], ids=lambda config: config.peft_type.value)  # fmt: skip
def test_prompts_of_the_parent(config, tmp_path):
    """Rewritten where channels or KV heads have moved, which PEFT does not let us see; else as they are."""
    parent, elastic = folders(tmp_path, "mha")
    elastic_of("mha", hidden=[1], heads=[1]).save_pretrained(tmp_path / "unmoved")
    adapter = stock_adapter(parent, tmp_path / "adapter", config)
    expected = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)(input_ids=IDS).logits

    def loaded(base, folder):
        return peft.PeftModel.from_pretrained(base, folder)(input_ids=IDS).logits

    assert close(loaded(family(tmp_path / "unmoved"), adapter), expected)
    assert close(loaded(family(elastic), from_parent(adapter, elastic, tmp_path / "ours")), expected)
    small = family(elastic, {"hidden": 48, "heads": 2, "layers": 3})
    loaded(small, from_parent(adapter, small, tmp_path / "small"))


def test_an_adapter_with_other_names_is_never_loaded_in_part(tmp_path):
    """PEFT is content when some of the targets exist."""
    parent, elastic = folders(tmp_path, "gpt2")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn", "lm_head"], fan_in_fan_out=True)
    adapter = stock_adapter(parent, tmp_path / "adapter", config)
    with pytest.raises(ValueError, match=r"c_attn.*no such module.*from_parent"):
        peft.PeftModel.from_pretrained(family(elastic), adapter)
    with pytest.raises(ValueError, match=r"c_attn.*no such module.*from_parent"):
        family(elastic).load_adapter(adapter)


def test_the_state_of_a_whole_model_is_ours(saved):
    """It is loaded as it is, also where nothing says what its adapter was trained on."""
    models = [adapted(elastic_of("gqa-wide-heads")), adapted(elastic_of("gqa-wide-heads"))]
    randomise(models[0], 3)
    models[1].load_state_dict(models[0].state_dict())
    assert difference(logits(models[0]), logits(models[1])) == 0


def test_what_is_not_rewritten(saved, tmp_path):
    vera = stock_adapter(saved / "parent", tmp_path / "vera", peft.VeraConfig(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"`adapter`='VERA'.*kinds that are rewritten are LORA"):
        from_parent(vera, saved, tmp_path / "no")
    model = adapted(family(saved))
    model.save_pretrained(tmp_path / "ours")
    marked = relabel(tmp_path / "ours", tmp_path / "marked", auto_mapping={"base_model_class": "FlextronForCausalLM"})
    with pytest.raises(ValueError, match="trained on a Flextron model"):
        from_parent(marked, saved, tmp_path / "no")
    parent_of("gpt2").save_pretrained(tmp_path / "gpt2")
    config = peft.LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True)
    with pytest.raises(ValueError, match="has no such module"):
        from_parent(stock_adapter(tmp_path / "gpt2", tmp_path / "other", config), saved, tmp_path / "no")
    assert not (tmp_path / "no").exists()


# ------------------------------------------------------------------------------------------- every kind of PEFT

PROMPT = {"num_virtual_tokens": 3}
BUILT, EVERY, REFUSED = "at the built size", "at every size", "not at all"
# Kind -> where it runs; elsewhere it is refused by name. Settings, where the defaults do not do.
KINDS = {
    "LORA": (EVERY, {}), "LN_TUNING": (EVERY, {"target_modules": ["input_layernorm", "norm"]}),
    "PROMPT_TUNING": (EVERY, PROMPT), "P_TUNING": (EVERY, PROMPT),
    "MULTITASK_PROMPT_TUNING": (EVERY, {**PROMPT, "num_tasks": 2}),
    "CPT": (EVERY, {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]}),
    "PREFIX_TUNING": (BUILT, PROMPT), "CARTRIDGE": (BUILT, PROMPT),  # for KV heads, which an MHA model drops
    "ADALORA": (BUILT, {"total_step": 10}), "ADAMSS": (BUILT, {}), "BEFT": (BUILT, {}),
    "BOFT": (BUILT, {"boft_block_size": 8}), "C3A": (BUILT, {"block_size": 8}), "DEFT": (BUILT, {}),
    "DELORA": (BUILT, {}), "FOURIERFT": (BUILT, {"n_frequency": 10}), "FROD": (BUILT, {}), "GRALORA": (BUILT, {}),
    "HIRA": (BUILT, {}), "HRA": (BUILT, {}), "IA3": (BUILT, {"feedforward_modules": ["down_proj"]}),
    "LILY": (BUILT, {}), "LOHA": (BUILT, {}), "LOKR": (BUILT, {}), "MISS": (BUILT, {}),
    "OFT": (BUILT, {"oft_block_size": 8, "r": 0}), "OSF": (BUILT, {}), "PEANUT": (BUILT, {}), "POLY": (BUILT, {}),
    "PSOFT": (BUILT, {}), "PVERA": (BUILT, {}), "RANDLORA": (BUILT, {}), "ROAD": (BUILT, {"group_size": 16}),
    "SHIRA": (BUILT, {}), "SUPERTUNING": (BUILT, {}), "TINYLORA": (BUILT, {}),
    "TRAINABLE_TOKENS": (BUILT, {"target_modules": ["embed_tokens"], "token_indices": IDS[0, :2].tolist()}),
    "UNILORA": (BUILT, {}), "VBLORA": (BUILT, {"num_vectors": 8, "vector_length": 8}), "VERA": (BUILT, {}),
    "WAVEFT": (BUILT, {"n_frequency": 10}), "XLORA": (BUILT, {}),
    "ADAPTION_PROMPT": (REFUSED, {"adapter_len": 2, "adapter_layers": 2}), "GLORA": (REFUSED, {}),
    "SHADOW": (BUILT, {}),
}  # fmt: skip


@functools.cache
def twins():
    """A parent, and its family whose units are where the parent has them."""
    parent = parent_of("mha", num_hidden_layers=2, use_cache=False)
    return parent, take(parent, elastic_config(parent.config, **{**CHOICES, "depth": [1]}), release=False)


@pytest.mark.parametrize("kind", sorted(kind.value for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING))
def test_every_kind_is_right_or_refused_by_name(kind, tmp_path):
    assert kind in KINDS, f"PEFT has learned the kind {kind}: try it at every size, and add it to the table."
    where, settings = KINDS[kind]
    if kind == "ADAMSS":
        pytest.importorskip("sklearn")
    if kind == "XLORA":
        settings = {"hidden_size": 64, "adapters": {"0": str(tmp_path), "1": str(tmp_path)}}
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=LINEAR, init_lora_weights=False)
        peft.get_peft_model(copy.deepcopy(twins()[0]), config).save_pretrained(tmp_path)
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    if "target_modules" in config_class.__dataclass_fields__ and kind not in ("ADAPTION_PROMPT", "SHADOW"):
        settings = {"target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], **settings}

    def adapt(base):
        torch.manual_seed(0)
        model = peft.get_peft_model(copy.deepcopy(base), config_class(task_type="CAUSAL_LM", **settings))
        return disturb(model)

    @torch.no_grad()
    def run(model, **kwargs):
        if kind in ("POLY", "MULTITASK_PROMPT_TUNING"):
            kwargs["task_ids"] = torch.zeros(2, dtype=torch.long)
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **kwargs).logits

    parent, elastic = twins()
    if where == REFUSED:
        with pytest.raises(ValueError, match=r"adaption prompt|GLoRA|elastic"):
            adapt(elastic)
        return
    theirs, ours = adapt(parent), adapt(elastic)
    assert close(run(ours), run(theirs)) and not close(run(ours)[:, -9:], logits(elastic))
    sizes = [{"mlp": 48}, {"heads": 2}, {"hidden": 48}, {"mlp": 48, "heads": 2, "hidden": 32}]
    if where == EVERY:
        found = [run(ours, flextron_budget=size) for size in sizes]
        if ours.active_peft_config.is_prompt_learning:  # the model runs on what the prompt makes of the ids
            calls = []
            ours.get_base_model().register_forward_pre_hook(lambda *call: calls.append(call[2]), with_kwargs=True)
            run(ours)
            embeddings = calls[0]["inputs_embeds"]
            models = [elastic.extract(size, pad=True) for size in sizes]
            expected = [model(inputs_embeds=embeddings[..., : model.config.hidden_size]).logits for model in models]
        else:
            merged = ours.merge_and_unload()
            expected = [logits(merged, size) for size in sizes]
        assert all(map(close, found, expected))
    else:
        refused = {
            "TRAINABLE_TOKENS": sizes[2:],
            "SHADOW": sizes[2:],
            "PREFIX_TUNING": sizes[1:2],
            "CARTRIDGE": sizes[1:2],
        }.get(kind, sizes)
        for size in refused:
            with pytest.raises(ValueError, match=r"`adapter`='\w+\.\w+'|KV heads"):
                run(ours, flextron_budget=size)


@pytest.mark.parametrize("kind", ["Lora", "AdaLora", "IA3", "VBLoRA", "LNTuning"])
def test_the_modules_that_peft_adapts_by_default(kind):
    """Those of a stock LLaMA."""
    config = getattr(peft, f"{kind}Config")
    settings = {"AdaLora": {"total_step": 10}, "VBLoRA": {"num_vectors": 8, "vector_length": 8}}.get(kind, {})
    for variant in ("mha", "gpt2"):
        model = peft.get_peft_model(elastic_of(variant), config(task_type="CAUSAL_LM", **settings))
        expected = peft.get_peft_model(parent_of("mha"), config(task_type="CAUSAL_LM", **settings))
        assert model.targeted_module_names == expected.targeted_module_names


# ------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("teacher", ["parent", "self"])
def test_elastic_training_of_an_adapter(saved, tmp_path, teacher):
    """Every size learns, the weights stay; a checkpoint is the adapter alone and resumes to the same curve."""
    settings = {"save_steps": 4, "save_strategy": "steps", "max_steps": 8, "teacher": teacher}
    whole = flextron_trainer(tmp_path / "a", model=adapted(family(saved)), **settings)
    before = {name: p.clone() for name, p in whole.model.named_parameters() if not p.requires_grad}
    start = whole.evaluate()
    whole.train()
    end = whole.evaluate()
    rows_of = [key for key in end if key.startswith("eval_loss_")]
    assert len(rows_of) == 4 and end["eval_loss"] < start["eval_loss"]
    assert sum(end[key] for key in rows_of) < sum(start[key] for key in rows_of) - 0.05
    assert all(difference(before[name], p) == 0 for name, p in whole.model.named_parameters() if name in before)
    checkpoint = tmp_path / "a" / "checkpoint-4"
    assert (checkpoint / "adapter_model.safetensors").exists() and not (checkpoint / "model.safetensors").exists()

    resumed = flextron_trainer(tmp_path / "b", model=adapted(family(saved)), **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed)[-1] == pytest.approx(losses(whole)[-1], abs=1e-5)
    resumed.save_model()
    small = peft.PeftModel.from_pretrained(family(saved, "0.35"), tmp_path / "b")
    assert difference(logits(small), logits(whole.model, "0.35")) < 1e-4


def test_our_trainer_says_whose_adapter_it_saves(tmp_path):
    """So that it resumes on a model without a name, which was converted a moment ago."""
    settings = {"save_steps": 1, "save_strategy": "steps", "max_steps": 2}
    flextron_trainer(tmp_path, model=adapted(elastic_of("gqa-wide-heads")), **settings | {"max_steps": 1}).train()
    base = elastic_of("gqa-wide-heads")
    saved = json.loads((tmp_path / "checkpoint-1" / "adapter_config.json").read_text())
    assert saved["auto_mapping"]["permutation"] == base.permutation.conversion and not base.name_or_path
    resumed = flextron_trainer(tmp_path, model=adapted(base), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    again = peft.PeftModel.from_pretrained(elastic_of("gqa-wide-heads"), tmp_path / "checkpoint-2")
    assert close(logits(again), logits(resumed.model))


def test_a_size_that_skips_the_adapted_layers_changes_nothing(saved, tmp_path):
    """Its loss is logged, and the sizes that have them learn."""
    model = adapted(family(saved), ["up_proj"], layers_to_transform=[1])
    before = [p.clone() for p in model.parameters() if p.requires_grad]
    run = flextron_trainer(tmp_path, model=model, max_steps=1, sampler="weighted", sampling_weights=[0, 0, 0, 1])
    run.train()
    assert 1 not in model.base_model.model.resolve_budget("0.15").layers and "loss_0.15" in losses(run)[0]
    assert all(map(torch.equal, before, (p for p in model.parameters() if p.requires_grad)))
    flextron_trainer(tmp_path, model=model, max_steps=1).train()
    assert not all(map(torch.equal, before, (p for p in model.parameters() if p.requires_grad)))


def test_pushing_an_adapter_of_a_sharded_model_is_refused(saved, tmp_path, monkeypatch):
    run = flextron_trainer(tmp_path, model=adapted(family(saved)), hub_model_id="me/adapter")
    monkeypatch.setattr(type(run), "_sharded", True)
    with pytest.raises(ValueError, match=r"divided among processes\. `save_model"):
        run.push_to_hub()


def plain(folder, **changes):
    ours = arguments(folder)
    kept = ("output_dir", "max_steps", "per_device_train_batch_size", "learning_rate", "logging_steps", "report_to")
    kept = {name: getattr(ours, name) for name in kept}
    return {
        **kept,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    } | changes


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_the_plain_trainer(saved, tmp_path, lora, loaded):
    """On the whole family at its current budget as on a model that was loaded there: the same curve."""
    model = family(saved, "0.35" if loaded else None)
    model.set_budget("0.35")
    model = adapted(model) if lora and loaded else model
    data = [{"input_ids": row["input_ids"][:14], "labels": row["input_ids"][:14]} for row in rows()]
    if lora and not loaded:
        model = adapted(model)
    run = Trainer(model, TrainingArguments(**plain(tmp_path)), train_dataset=data)
    run.train()
    curve = [log["loss"] for log in run.state.log_history if "loss" in log]
    assert curve[-1] < curve[0] - 0.2
    if not lora:
        twin = family(saved, None if loaded else "0.35")
        twin.set_budget("0.35")
        other = Trainer(twin, TrainingArguments(**plain(tmp_path)), train_dataset=data)
        other.train()
        assert curve == pytest.approx([log["loss"] for log in other.state.log_history if "loss" in log], abs=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_the_trainer_of_trl(saved, tmp_path, lora):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()])
    for budget in ("0.35", None):
        model = family(saved, budget)
        if budget is None:
            budget = {"mlp": 48, "heads": 4}  # TRL multiplies with all of `lm_head.weight`: the full hidden size
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear") if lora else None
        args = trl.SFTConfig(**plain(tmp_path, bf16=False, max_length=16))
        run = trl.SFTTrainer(model, args, train_dataset=data, peft_config=config, processing_class=tokenizer())
        run.model.set_budget(budget if isinstance(budget, dict) else None)
        run.train()
        curve = [log["loss"] for log in run.state.log_history if "loss" in log]
        assert curve[-1] < curve[0]


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({str(i): i for i in range(96)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1", unk_token="0")


def test_a_classifier_with_a_saved_head(saved, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=3)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear")
    model = randomise(peft.get_peft_model(model, config))
    model.save_pretrained(tmp_path)
    small = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=3, flextron_budget="0.35")
    small = peft.PeftModel.from_pretrained(small, tmp_path)
    assert difference(logits(small), logits(model, "0.35")) < 1e-5
