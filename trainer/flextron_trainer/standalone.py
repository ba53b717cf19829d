"""Loads a Flextron repo at several budgets with transformers alone, generates, and measures the speed.

Run as a program, `python standalone.py --trust-remote-code REPO PROMPT BUDGET ...`, so that nothing of the installed
package is there: importing it is made impossible first. The code that runs instead is REPO's, which is what the flag
says. Prints one JSON line per budget.
"""

import json
import sys
import time


class Refuse:
    """An import hook under which our packages do not exist."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("modeling_flextron", "flextron_trainer"):
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)")


def main(trust: str, repo: str, prompt: str, *budgets: str) -> None:
    if trust != "--trust-remote-code":
        sys.exit("This runs the code that lies in REPO; say --trust-remote-code first.")
    sys.meta_path.insert(0, Refuse)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=False)
    for budget in budgets:
        model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, flextron_budget=budget).to(device)
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
        settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
        settings["pad_token_id"] = tokenizer.pad_token_id
        ids = model.generate(**inputs, **settings)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            model.generate(**inputs, **settings)
            seconds.append(time.perf_counter() - start)
        result = {
            "budget": budget,
            "parameters": model.num_parameters(),
            "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            "tokens_per_second": 64 / min(seconds),
            "text": tokenizer.decode(ids[0], skip_special_tokens=True),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
