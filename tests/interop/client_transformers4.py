"""Exports in transformers 4: weights, rotary settings and tokenizer."""

import json

import torch
from checks import PROMPT, WORK, Reference, failed, finish, record
from transformers import AutoModelForCausalLM, AutoTokenizer

tokens = json.loads((WORK / "reference" / "tokens.json").read_text())
for folder in sorted(WORK.glob("*-dense-*")):
    reference = Reference(folder.name)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            logprobs = model(torch.tensor(reference.text)).logits.log_softmax(-1).numpy()
        same = (logprobs.argmax(-1)[:, PROMPT - 1 : -1] == reference.text[:, PROMPT:]).all()
        same &= AutoTokenizer.from_pretrained(folder)(tokens["text"])["input_ids"] == tokens["ids"]
        record(folder.name, "from_pretrained", 1e-5, abs(logprobs - reference.logprobs).max(), bool(same))
    except Exception as error:
        failed(folder.name, "from_pretrained", error)
finish("transformers", "torch")
