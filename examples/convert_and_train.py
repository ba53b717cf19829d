"""From a trained model to an elastic checkpoint in one short script.

    python examples/convert_and_train.py meta-llama/Llama-3.2-1B ./text --output_dir elastic --max_steps 1000 --bf16

TEXT is a folder, a text, jsonl, csv or parquet file, or a dataset id on the Hub. After it come any arguments of
`FlextronTrainingArguments`. The result in `--output_dir` loads at any budget:

    AutoModelForCausalLM.from_pretrained("elastic", trust_remote_code=True, flextron_budget=0.5)
"""

import sys

from transformers import AutoTokenizer, HfArgumentParser

from flextron_trainer import FlextronTrainer, FlextronTrainingArguments, convert
from flextron_trainer.data import load_text, pack

SEQUENCE_LENGTH = 512


def main(parent: str, text: str, arguments: list[str]) -> None:
    (args,) = HfArgumentParser(FlextronTrainingArguments).parse_args_into_dataclasses(arguments)
    tokenizer = AutoTokenizer.from_pretrained(parent)
    rows = pack(load_text(text), tokenizer, SEQUENCE_LENGTH).train_test_split(test_size=0.02, seed=args.seed)

    elastic = convert(parent, rows["train"], budgets=[1, 0.75, 0.5, 0.25], sequence_length=SEQUENCE_LENGTH)
    trainer = FlextronTrainer(
        elastic,
        args,
        teacher=parent,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model()
    trainer.create_model_card()


if __name__ == "__main__":
    if len(sys.argv) < 3 or "--help" in sys.argv:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
