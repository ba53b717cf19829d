"""What a process of `helpers.run_python` runs. It imports none of ours: the process begins without our packages."""

import gc
import os
import sys


def run(code: str, arguments: list[str], folder: str, stdout: str, stderr: str) -> None:
    """Run Python code as `python -c CODE ARGUMENTS` would, in `folder`, its output in two files."""
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    gc.freeze()  # what the process began with, so that `gc.collect()` need not walk over it
    sys.argv[:] = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
