"""mlx-lm on a CPU: exports of stock classes, and what `flextron export --format mlx` wrote, whose layers differ."""

import mlx.core as mx
import numpy
from checks import NEW, WORK, Reference, failed, finish, record
from mlx.nn import log_softmax
from mlx_lm import load, stream_generate

OURS = "flextron export --format mlx"
runs = [(WORK / name, "native") for name in ("llama-dense-1", "llama-dense-0.3", "qwen3-dense-1")]
for folder, how in [*runs, *((folder, OURS) for folder in sorted((WORK / "mlx").iterdir()))]:
    try:
        reference = Reference(folder.name)
        model, tokenizer = load(str(folder))
        tokenizer.eos_token_ids = set()  # the reference does not stop at the end of a text
        logprobs = numpy.array(log_softmax(model(mx.array(reference.text)), axis=-1))
        texts = [
            [step.token for step in stream_generate(model, tokenizer, prompt, max_tokens=NEW)]
            for prompt in reference.prompts
        ]
        record(folder.name, how, 1e-4, abs(logprobs - reference.logprobs).max(), texts == reference.greedy)
    except Exception as error:
        failed(folder.name, how, error)
finish("mlx", "mlx-lm", "transformers")
