"""Adapters: one LoRA for every size, its way to disk and back, and the trainers."""

import copy

import pytest
import torch
from helpers import all_sizes, difference, elastic_of, run_python
from training import arguments, losses, rows, with_adapter
from training import trainer as flextron_trainer
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from modeling_flextron import FlextronForCausalLM

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
    """A family on disk whose smaller networks skip the second layer."""
    folder = tmp_path_factory.mktemp("family")
    base = elastic_of("gqa-wide-heads")
    base.config.elastic["layer_ranking"] = [1, 2, 3]
    base.save_pretrained(folder)
    return folder


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
    total = mlp.increment(states, 0, 24, 48)
    mlp.increment(states, 24, 72, 48, total)
    torch.testing.assert_close(total, expected)
    assert difference(expected, model.merge_and_unload().model.layers[0].mlp(states, 72, 48)) < 1e-5


@pytest.mark.parametrize("budget", ["0.6", {"mlp": 48, "layers": 2}, {"layers": 3}])
def test_loads_at_a_budget(saved, tmp_path, budget):
    """One adapter of the family on a small model: the same as on the family, and as merged before slicing."""
    model = adapted(family(saved), [*LINEAR, "embed_tokens"], modules_to_save=["lm_head"])
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, budget)
    small = peft.PeftModel.from_pretrained(family(saved, budget), tmp_path / "adapter")
    assert difference(logits(small), expected) < 1e-5
    automatic = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", flextron_budget=budget)
    assert difference(logits(automatic), expected) < 1e-5
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert difference(logits(family(tmp_path / "merged", budget)), expected) < 1e-5
    # An adapter of the small model is loaded as it is.
    randomise(small, 7).save_pretrained(tmp_path / "small")
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
    small.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").exists()


def test_layers_that_cannot_be_told(saved, tmp_path):
    adapted(family(saved), ["up_proj"], layers_to_transform=[0, 1]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be told"):
        peft.PeftModel.from_pretrained(family(saved, {"layers": 2}), tmp_path)


def test_without_our_package(saved, tmp_path):
    model = adapted(family(saved))
    model.save_pretrained(tmp_path)
    torch.save([logits(model, "0.35"), logits(model, "0.15"), IDS], tmp_path / "expected.pt")
    run_python(
        """
import torch
from peft import AutoPeftModelForCausalLM
whole, small, ids = torch.load(sys.argv[1] + "/expected.pt")
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    assert (model(ids, flextron_budget="0.35").logits - whole).abs().max() < 1e-5
    model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, flextron_budget="0.15")
    assert (model(ids).logits - small).abs().max() < 1e-5
assert "modeling_flextron" not in sys.modules
""",
        tmp_path,
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
    assert sum(end[key] for key in rows_of) < sum(start[key] for key in rows_of) - 0.1
    assert all(difference(before[name], p) == 0 for name, p in whole.model.named_parameters() if name in before)
    checkpoint = tmp_path / "a" / "checkpoint-4"
    assert (checkpoint / "adapter_model.safetensors").exists() and not (checkpoint / "model.safetensors").exists()

    resumed = flextron_trainer(tmp_path / "b", model=adapted(family(saved)), **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed)[-1] == pytest.approx(losses(whole)[-1], abs=1e-5)
    resumed.save_model()
    small = peft.PeftModel.from_pretrained(family(saved, "0.35"), tmp_path / "b")
    assert difference(logits(small), logits(whole.model, "0.35")) < 1e-4


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
