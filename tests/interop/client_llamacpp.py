"""llama.cpp: files that `flextron export --gguf` wrote, and exports through llama.cpp's own converter.

The converter is in the source archive of llama-cpp-python; without that only our files are run.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import xllamacpp
from checks import NEW, WORK, Reference, failed, finish, record

CONVERTED = ("llama-dense-1", "llama-dense-0.5", "llama-snapped", "gpt2-dense-1", "gpt2-dense-narrow")
CONVERT = """
import runpy, sys
root = sys.argv[1]
sys.path[:0] = [root + "/gguf-py", root]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"  # ours is in no list of known ones
sys.argv = ["convert", sys.argv[2], "--outfile", sys.argv[3], "--outtype", "f32"]
runpy.run_path(root + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def run(path: Path, name: str, how: str) -> None:
    """Greedy tokens, and the log probability of the whole vocabulary at each."""
    reference = Reference(name)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.n_parallel = str(path), 256, False, 1
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    vocabulary, difference, same, compared = reference.logprobs.shape[-1], 0.0, True, 0
    for row, prompt in enumerate(reference.prompts):
        answer = server.handle_completions(
            {"prompt": prompt, "max_tokens": NEW, "temperature": 0.0, "n_probs": vocabulary, "logprobs": vocabulary}
        )
        steps = answer["choices"][0]["logprobs"]["content"]
        tokens = [step["id"] for step in steps]
        same &= tokens == reference.greedy[row][: len(tokens)]  # it stops at the end of a text, the reference does not
        compared += len(tokens)
        for i, step in enumerate(steps):
            theirs = numpy.full(vocabulary, numpy.inf)
            for entry in step["top_logprobs"]:
                theirs[entry["id"]] = entry["logprob"]
            ours = reference.logprobs[row, len(prompt) + i - 1]
            likely = ours > -20  # llama.cpp writes what is less likely as the smallest float
            difference = max(difference, float(abs(theirs - ours)[likely].max()))
    assert compared > NEW, f"only {compared} tokens were written"
    record(name, how, 2e-3, difference, bool(same))


for path in sorted((WORK / "gguf").glob("*.gguf")):
    try:
        run(path, path.stem, "flextron export --gguf")
    except Exception as error:
        failed(path.stem, "flextron export --gguf", error)
converter = os.environ.get("LLAMA_CPP")
for name in CONVERTED if converter else ():
    output = WORK / "gguf" / f"{name}.converted"
    try:
        command = [sys.executable, "-c", CONVERT, converter, str(WORK / name), str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr.splitlines()[-1]
        run(output, name, "convert_hf_to_gguf.py")
    except Exception as error:
        failed(name, "convert_hf_to_gguf.py", error)
finish("xllamacpp", "gguf", "transformers")
