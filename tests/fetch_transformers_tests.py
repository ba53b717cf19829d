"""Put the model tests of the installed transformers where `test_transformers_suite.py` finds them: below `sys.prefix`.

They are in its source distribution alone. Without a package index this says so and changes nothing; the tests that
need them are then skipped.

    python tests/fetch_transformers_tests.py
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(sys.prefix) / "share" / f"transformers-{version('transformers')}-tests"
FILES = ("test_modeling_common.py", "test_training_mixin.py")


def main() -> None:
    """Download the source distribution and keep the files that are needed."""
    if all((FOLDER / name).is_file() for name in FILES):
        return
    requirement = f"transformers=={version('transformers')}"
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


if __name__ == "__main__":
    main()
