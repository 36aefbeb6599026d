"""What the two sides of an experiment are: revisions, source trees, or subjects; and how each becomes something to run.

Two revisions of this project run the same subjects by different code, each from a worktree of its own in a temporary
folder. Two subjects (checkpoints, plans, names of a suite's grammar) run by the code at hand. A side of one kind is
never compared with one of the other: what differed could not be told.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bench import environment, subjects
from shortllama import files
from shortllama.errors import InputError

HERE = Path(__file__).resolve().parents[1]  # the code that is running
ENTRY = "bench/__main__.py"  # what makes a folder or revision one of this project
PINS = "constraints.txt"


class Side(msgspec.Struct, frozen=True):
    """One side. `what`: in words. Code: `commit` of `repository` or `tree`, a folder used as it is. Else `subject`.

    `digest`: of a tree's sources, so that an experiment is not continued with others; `changed`: its files that differ
    from the last commit, None where that is not known.
    """

    what: str
    commit: str | None = None
    repository: Path | None = None
    tree: Path | None = None
    subject: str | None = None
    digest: str = ""
    changed: int | None = None


def understand(base: str, head: str, here: Path) -> tuple[Side, Side]:
    """Return both sides; git is asked in `here`.

    A folder with this project's sources, then a revision, then anything that a suite may name as a subject. Raises
    InputError for a text that is none of these, and for sides of different kinds.
    """
    repository = _repository(here)
    found = [_code(text, repository) for text in (base, head)]
    if not any(found):
        return _subject("base", base), _subject("head", head)
    for name, text, side in zip(("base", "head"), (base, head), found, strict=True):
        if side is None:
            other = head if name == "base" else base
            raise InputError(
                f"--{name} {text!r} is no git revision of this repository and no folder with {ENTRY}, and {other!r} "
                "is; compare two revisions (see git branch, git log), or two models"
            )
    before, after = found
    assert before is not None
    assert after is not None
    return before, after


# -- code -------------------------------------------------------------------------------------------------------------


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of git, None where it fails or is not installed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _repository(here: Path) -> Path | None:
    top = _git(here, "rev-parse", "--show-toplevel")
    return Path(top) if top else None


def _code(text: str, repository: Path | None) -> Side | None:
    """The side where `text` names code, else None."""
    path = Path(text).expanduser()
    if (path / ENTRY).is_file():
        return _tree(path.resolve())
    if path.exists() or repository is None:
        return None
    commit = _git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{text}^{{commit}}")
    if not commit:
        return None
    if _git(repository, "cat-file", "-e", f"{commit}:{ENTRY}") is None:
        raise InputError(f"revision {text!r} ({commit[:12]}) holds no {ENTRY}: its sweep cannot be run; choose another")
    return Side(f"{text} ({commit[:12]})", commit=commit, repository=repository)


def _tree(path: Path) -> Side:
    digest = hashlib.sha256()
    for file in sorted(one for package in ("bench", "shortllama") for one in (path / package).rglob("*.py")):
        digest.update(str(file.relative_to(path)).encode() + b"\0" + files.read_bytes(file) + b"\0")
    commit = _git(path, "rev-parse", "--short=12", "HEAD")
    state = _git(path, "status", "--porcelain") if commit else None
    changed = None if state is None else len(state.splitlines())
    what = "a source tree outside git" if commit is None else f"the working tree at {commit}"
    return Side(what, tree=path, digest=digest.hexdigest()[:16], changed=changed)


def notes(base: Side, head: Side) -> tuple[str, ...]:
    """Return what a reader of the verdict must know about the sides.

    Raises InputError where they pin different versions of a library that times depend on: they run in one
    environment, and it cannot hold both.
    """
    if base.subject is not None and head.subject is not None:
        return (f"base is {base.what}, head is {head.what}: cells are paired by all but their subject",)
    found = [f"base is {base.what}, head is {head.what}"]
    found += [
        f"dirty worktree: {name} is measured with {_files(side.changed)} that no commit holds"
        for name, side in (("base", base), ("head", head))
        if side.changed
    ]
    repository = base.repository or head.repository
    state = _git(repository, "status", "--porcelain", "--untracked-files=no") if repository else None
    if state and not (base.tree or head.tree):
        found.append(f"dirty worktree: {_files(len(state.splitlines()))} of the repository in neither side")
    return (*found, *_pins(base, head))


def _files(count: int) -> str:
    return f"{count} changed file{'s' * (count != 1)}"


def _pins(base: Side, head: Side) -> tuple[str, ...]:
    before, after = (pinned(_pin_text(side)) for side in (base, head))
    differing = sorted(name for name in before.keys() & after.keys() if before[name] != after[name])
    shown = ", ".join(f"{name} {before[name]} -> {after[name]}" for name in differing)
    decisive = [name for name in differing if name in environment.PACKAGES]
    if decisive:
        raise InputError(
            f"{PINS} differs: {shown}; one environment cannot hold both, and times under different versions of "
            f"{', '.join(decisive)} are not compared: give both sides the same pins, or sweep each in its own "
            "environment and compare the speed-ups over dense"
        )
    if not differing:
        return ()
    return (f"both sides ran in one environment although {PINS} differs: {shown}",)


def _pin_text(side: Side) -> str:
    if side.tree is not None:
        path = side.tree / PINS
        return path.read_text() if path.is_file() else ""
    assert side.repository is not None
    return _git(side.repository, "show", f"{side.commit}:{PINS}") or ""


def pinned(text: str) -> dict[str, str]:
    """Return the versions that a constraints file pins, by normalised name."""
    matches = re.findall(r"^\s*([A-Za-z0-9._-]+)\s*==\s*([^\s;#]+)", text, flags=re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in matches}


@contextmanager
def checked_out(sides: Iterable[Side]) -> Generator[tuple[Path, ...]]:
    """Yield the folder whose code runs each side; worktrees are in a temporary folder and vanish with it."""
    with tempfile.TemporaryDirectory(prefix="shortllama-ab-") as folder:
        roots: dict[str, Path] = {}
        repositories: set[Path] = set()
        try:
            yield tuple(_root(side, Path(folder), roots, repositories) for side in sides)
        finally:
            for repository in repositories:
                for root in roots.values():
                    _git(repository, "worktree", "remove", "--force", str(root))
                _git(repository, "worktree", "prune")


def _root(side: Side, folder: Path, roots: dict[str, Path], repositories: set[Path]) -> Path:
    if side.commit is None or side.repository is None:
        return side.tree or HERE
    if side.commit not in roots:
        roots[side.commit] = folder / side.commit[:12]
        repositories.add(side.repository)
        # Hooks are for people at work in a tree, not for a copy that is measured.
        quiet = ("-c", f"core.hooksPath={os.devnull}", "worktree", "add", "--detach", "--quiet")
        if _git(side.repository, *quiet, str(roots[side.commit]), side.commit) is None:
            raise InputError(f"git worktree add failed for {side.what}; is there room in {tempfile.gettempdir()}?")
    return roots[side.commit]


# -- subjects ---------------------------------------------------------------------------------------------------------


def _subject(name: str, text: str) -> Side:
    if Path(text).is_file():
        return Side(f"the plan {text}", subject=text)
    try:
        subjects.resolve(text)
    except InputError as error:
        raise InputError(f"--{name} {text!r} is no git revision of this repository, and as a model: {error}") from None
    return Side(text, subject=text)
