"""Put the model tests of the installed transformers where `test_transformers_suite.py` finds them: below `sys.prefix`.

They are in its source distribution, or on GitHub alone. What cannot be reached is said and changes nothing; the tests
that need it are then left out.

    python tests/fetch_transformers_tests.py
"""

import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from importlib.metadata import version
from pathlib import Path

VERSION = version("transformers")
FOLDER = Path(sys.prefix) / "share" / f"transformers-{VERSION}-tests"
FILES = ("test_modeling_common.py", "test_training_mixin.py")
MIXINS = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}
SOURCE = f"https://raw.githubusercontent.com/huggingface/transformers/v{VERSION}/tests"


def main() -> None:
    """Download what is not there yet."""
    if not all((FOLDER / name).is_file() for name in FILES):
        fetch_distribution()
    for name in MIXINS:
        if not (FOLDER / name).is_file():
            fetch_file(name)


def fetch_distribution() -> None:
    """Keep the files that are needed of the source distribution."""
    requirement = f"transformers=={VERSION}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", requirement]
        done = subprocess.run([*command, "--dest", folder], capture_output=True, text=True)
        if done.returncode:
            print(f"The tests of {requirement} could not be downloaded: {done.stderr.strip()[-300:]}", file=sys.stderr)
            return
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            for name in FILES:
                member = archive.extractfile(f"{requirement.replace('==', '-')}/tests/{name}")
                assert member is not None, f"{requirement} has no tests/{name}"
                (FOLDER / name).write_bytes(member.read())


def fetch_file(name: str) -> None:
    """One file from GitHub."""
    try:
        with urllib.request.urlopen(f"{SOURCE}/{name}", timeout=20) as response:
            content = response.read()
    except OSError as error:
        print(f"{SOURCE}/{name} could not be downloaded: {error}", file=sys.stderr)
        return
    (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
    (FOLDER / name).write_bytes(content.replace(b"from tests.", b"from .."))  # where it lies here


if __name__ == "__main__":
    main()
