"""The sequence-classification head: at every budget, and from the checkpoint of a language model."""

import torch
from helpers import difference, run_python
from kinds import of_each_kind

from modeling_flextron import FlextronForSequenceClassification


def classifier(elastic, folder, **kwargs):
    elastic.save_pretrained(folder)
    torch.manual_seed(0)
    return FlextronForSequenceClassification.from_pretrained(folder, num_labels=3, **kwargs)


@of_each_kind
def test_a_language_model_becomes_a_classifier_at_any_budget(elastic, ids, tmp_path):
    family = classifier(elastic, tmp_path / "language")
    family.save_pretrained(tmp_path / "classifier")
    for row in elastic.frontier:
        small = FlextronForSequenceClassification.from_pretrained(tmp_path / "classifier", flextron_budget=row["name"])
        assert small(ids).logits.shape == (2, 3)
        assert difference(small(ids).logits, family(ids, flextron_budget=row["name"]).logits) < 1e-5
        with family.at_budget(row["name"]):
            assert difference(small(ids).logits, family(ids).logits) < 1e-5


@of_each_kind
def test_it_learns_and_finds_the_last_token(elastic, ids, tmp_path):
    model = classifier(elastic, tmp_path, flextron_budget=elastic.frontier[1]["name"])
    padded = ids.clone()
    padded[0, 6:] = model.config.pad_token_id
    assert difference(model(padded).logits[0], model(ids[:1, :6]).logits[0]) < 1e-5
    loss = model(ids, labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_without_the_package(tmp_path, ids):
    from helpers import elastic_of

    elastic = elastic_of("gqa-wide-heads")
    classifier(elastic, tmp_path / "language").save_pretrained(tmp_path / "classifier")
    code = """
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True, flextron_budget="0.35")
print("SHAPE", tuple(model(torch.ones(2, 5, dtype=torch.long)).logits.shape))
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
print("CAUSAL", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get("flextron"))  # by which the Trainer shifts labels
"""
    output = run_python(code, tmp_path / "classifier", package=False).stdout
    assert "SHAPE (2, 3)" in output and "CAUSAL FlextronForCausalLM" in output
