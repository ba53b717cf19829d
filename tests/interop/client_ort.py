"""ONNX Runtime GenAI: its builder reads an export, its generator runs it."""

import subprocess
import sys

import numpy
import onnxruntime_genai
import torch
from checks import NEW, WORK, Reference, failed, finish, record

for folder in sorted(WORK.glob("llama-dense-*")):
    try:
        output = WORK / "onnx" / folder.name
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(output)]
        done = subprocess.run(
            [*builder, "-p", "fp32", "-e", "cpu", "-c", str(WORK / "onnx" / "cache")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr.strip().splitlines()[-1]
        reference = Reference(folder.name)
        model = onnxruntime_genai.Model(str(output))
        difference, same = 0.0, True
        for row, prompt in enumerate(reference.prompts):
            params = onnxruntime_genai.GeneratorParams(model)
            params.set_search_options(max_length=len(prompt) + NEW, do_sample=False)
            generator = onnxruntime_genai.Generator(model, params)
            generator.append_tokens(numpy.array([prompt], dtype=numpy.int32))
            for i in range(NEW):
                theirs = torch.tensor(generator.get_logits()).flatten().log_softmax(-1).numpy()
                difference = max(difference, abs(theirs - reference.logprobs[row, len(prompt) + i - 1]).max())
                token = reference.greedy[row][i]
                same &= bool(theirs.argmax() == token)
                if i < NEW - 1:
                    generator.append_tokens(numpy.array([[token]], dtype=numpy.int32))
        record(folder.name, "onnxruntime_genai.models.builder", 1e-4, float(difference), same)
    except Exception as error:
        failed(folder.name, "onnxruntime_genai.models.builder", error)
finish("onnxruntime-genai", "onnxruntime", "transformers")
