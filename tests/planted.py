"""Code that no one should run, in every place of a model's folder where a library would look for some."""

import json
from pathlib import Path

CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
OTHERS = ("AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor")


def plant(folder: Path, marker: Path) -> None:
    """Let every file of a folder that can name code name some that writes `marker`, by an absolute path."""
    code = f"open({str(marker)!r}, 'w').close()\n"
    (folder / "planted.py").write_text(code)
    (folder / "custom_generate").mkdir(exist_ok=True)
    (folder / "custom_generate" / "generate.py").write_text(code)
    (folder / "requirements.txt").write_text("nothing-of-this-name\n")
    name = f"{folder.resolve()}--planted.Class"
    names = {**dict.fromkeys((*CLASSES, *OTHERS), name), "AutoTokenizer": [None, name]}
    own = {
        "config.json": {"custom_generate": str(folder.resolve())},
        "tokenizer_config.json": {},
        "generation_config.json": {"custom_generate": str(folder.resolve()), "trust_remote_code": True},
        "processor_config.json": {"processor_class": "PlantedProcessor"},
        "preprocessor_config.json": {"image_processor_type": "PlantedImageProcessor"},
    }
    for file, more in own.items():
        held = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
        (folder / file).write_text(json.dumps(held | more | {"auto_map": names, "trust_remote_code": True}))
