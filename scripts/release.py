"""Builds a release into dist/ and proves that it works: `make release`. Publishes nothing.

The sdist holds the files that git holds, and the wheel is built from it. Both pass twine's check. The wheel, installed
in a fresh venv outside this tree, answers a question with one of the models that ship in it. Needs `pip install -e
'.[dev]'`, and an index for the dependencies of the wheel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
MODELS = ("tiny-gqa", "tiny-mla", "tiny-hybrid")
QUESTION = "Please remember this. The key of Omar is 1 8 0. Nora owns red lamp. What is the key of Omar?"
ANSWER = "The key of Omar is 1 8 0."


def run(*command: str | Path, **options: object) -> str:
    """What a command writes to stdout. Exits with the command line where it fails."""
    print("$", *command, flush=True)
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{done.stdout}release: exit code {done.returncode}: {' '.join(map(str, command))}")
    return done.stdout


def build() -> tuple[Path, Path]:
    """The sdist, and the wheel that was built from it; twine has checked their metadata."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, cwd=ROOT)
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    """Exits where the sdist is not what git holds, or the wheel lacks a file of the package, a model or the course."""
    tracked = set(run("git", "ls-files", cwd=ROOT).splitlines())
    with tarfile.open(sdist) as tar:
        packed = {member.name.partition("/")[2] for member in tar if member.isfile()}
    if packed != tracked | {"PKG-INFO"}:
        raise SystemExit(f"release: {sdist.name} and git differ in {sorted(packed ^ (tracked | {'PKG-INFO'}))}")
    wanted = {name for name in tracked if name.startswith("nanokv/")}
    wanted |= {f"nanokv/{name}" for name in tracked if name.startswith(tuple(f"weights/{model}/" for model in MODELS))}
    course = ("lessons/exercises.toml", "lessons/tests_public/", "lessons/interview/")
    wanted |= {name.replace("lessons/", "nanokv/learn/course/", 1) for name in tracked if name.startswith(course)}
    with zipfile.ZipFile(wheel) as archive:
        missing = wanted - set(archive.namelist())
        licensed = any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())
    if missing or not licensed:
        raise SystemExit(f"release: {wheel.name} lacks {sorted(missing) or 'LICENSE'}")


def chat_from(wheel: Path) -> None:
    """Installs the wheel in a venv outside this tree and asks each model that it carries. Exits at a wrong answer."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        scripts = Path(folder) / ("Scripts" if os.name == "nt" else "bin")
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "NANOKV_HOME")}
        run(scripts / "python", "-m", "pip", "install", "--quiet", wheel, cwd=folder, env=environment)
        for model in MODELS:
            command = (scripts / "nanokv", "chat", model, "--temperature", "0", "-p", QUESTION)
            answer = run(*command, cwd=folder, env=environment, stdin=subprocess.DEVNULL).strip()
            print(answer)
            if answer != ANSWER:
                raise SystemExit(f"release: {model} answered {answer!r} for {ANSWER!r}")


def main() -> None:
    """Builds, checks, installs, chats; prints what it has made."""
    sdist, wheel = build()
    check_contents(sdist, wheel)
    chat_from(wheel)
    for path in (sdist, wheel):
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
