"""Git, as far as flows need it: a checkout of their own at a ref."""

import contextlib
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from darkroom.errors import InputError, StageFailed
from darkroom.registry.tracking import without_password

SHORT = 8  # digits of a commit

_SHOWN_REFS = 8  # in a message
_UNATTENDED = {
    "GIT_TERMINAL_PROMPT": "0",  # nobody is there to answer
    # A connection that is dead without a word ends after a minute or so, instead of never.
    "GIT_SSH_COMMAND": "ssh -oBatchMode=yes -oConnectTimeout=30 -oServerAliveInterval=15 -oServerAliveCountMax=4",
    "GIT_HTTP_LOW_SPEED_LIMIT": "1",
    "GIT_HTTP_LOW_SPEED_TIME": "60",
}
_OF_A_HOOK = {"GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"}  # would lead to another repository


def git(root: Path, *arguments: str, url: str = "") -> str:
    """What a git command in `root` prints. Raises StageFailed with git's own words, without the secrets in `url`."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, env=_environment(), capture_output=True, text=True, errors="replace"
        )
    except FileNotFoundError:
        raise StageFailed("git is not installed, or not on PATH") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("hint:")] or ["no message"]
        said = next((line for line in lines if line.startswith(("fatal:", "error:", " ! "))), lines[-1]).strip()
        verb = next(word for word in arguments if not word.startswith("-") and "=" not in word)
        raise StageFailed(f"git {verb}: {_without_secrets(said, url)}")
    return done.stdout.strip("\n")


def _without_secrets(text: str, url: str) -> str:
    """What of a repository may be shown. The user of a web address is as often a token as its password is."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    return text.replace(f"{user}@", "") if at and parts.scheme in ("http", "https") else without_password(text, url)


def _environment() -> dict[str, str]:
    return _UNATTENDED | {name: value for name, value in os.environ.items() if name not in _OF_A_HOOK}


def clone(repository: str, ref: str, root: Path) -> str:
    """Check `ref` (a branch, tag or commit) of `repository` out into the new directory `root`; returns the commit.

    A repository on this machine shares its objects by hard links; of another one only that commit is fetched. Raises
    InputError for a ref that is not there, and StageFailed when the repository cannot be read.
    """
    refuse_odd(ref)
    if "://" in repository or re.match(r"[^/]+@[^/]+:", repository):
        commit = _fetch(repository, ref, root)
    elif Path(repository).is_dir():
        commit = _clone_local(repository, ref, root)
    else:
        raise InputError(f"DARKROOM_REPOSITORY = {repository!r}: expected a git repository: a directory or URL")
    git(root, "checkout", "--quiet", "--detach", commit)
    return commit


def refuse_odd(ref: str) -> None:
    """Raise InputError for what git would take for an option or for more than one ref."""
    if not re.fullmatch(r"[^\s\-:*?\[\\\x00-\x1f][^\s:*?\[\\\x00-\x1f]*", ref) or ".." in ref:
        raise InputError(f"git ref {ref!r}: expected a branch, a tag or a commit")


def resolve(root: Path, ref: str) -> str | None:
    """The commit that `ref` names: a branch of origin first, then a tag, then whatever git makes of it."""
    for name in (f"refs/remotes/origin/{ref}", f"refs/tags/{ref}", ref):
        try:
            return git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        except StageFailed:
            continue
    return None


def short_commit(repository: str, ref: str) -> str | None:
    """The commit that a clone at `ref` would have, short; None for a repository elsewhere or an unknown ref."""
    if Path(repository).is_dir():
        for name in (f"refs/heads/{ref}", f"refs/tags/{ref}", ref):
            with contextlib.suppress(StageFailed):
                commit = git(Path(repository), "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
                return commit[:SHORT]
    return None


def _clone_local(repository: str, ref: str, root: Path) -> str:
    git(root.parent, "clone", "--quiet", "--local", "--no-checkout", "--", repository, str(root))
    if commit := resolve(root, ref):
        return commit
    listed = git(root, "for-each-ref", "--format=%(refname)", "refs/remotes/origin", "refs/tags").splitlines()
    raise _unknown(repository, ref, [name.replace("refs/remotes/origin/", "refs/heads/") for name in listed])


def _fetch(url: str, ref: str, root: Path) -> str:
    git(root.parent, "init", "--quiet", str(root))
    git(root, "remote", "add", "origin", url)
    lines = git(root, "ls-remote", "--quiet", "origin", url=url).splitlines()
    there = {name: commit for commit, name in (line.split("\t") for line in lines)}
    named = ref if ref == "HEAD" else next((n for n in (f"refs/heads/{ref}", f"refs/tags/{ref}") if n in there), None)
    if named in there:
        git(root, "fetch", "--quiet", "--depth=1", "--no-tags", "origin", named, url=url)
        return git(root, "rev-parse", "FETCH_HEAD^{commit}")
    if re.fullmatch(r"[0-9a-f]{7,64}", ref):  # any commit; servers give single ones only if they are set up to
        git(root, "fetch", "--quiet", "--tags", "origin", "+refs/heads/*:refs/remotes/origin/*", url=url)
        if commit := resolve(root, ref):
            return commit
    raise _unknown(url, ref, there)


def _unknown(repository: str, ref: str, there: Iterable[str]) -> InputError:
    """What is wrong with a ref, with those that there are."""
    branches, tags = (
        sorted(name.removeprefix(prefix) for name in there if name.startswith(prefix) and not name.endswith("^{}"))
        for prefix in ("refs/heads/", "refs/tags/")
    )
    people = [name for name in branches if name != "HEAD" and not name.startswith("retrain/")]
    known = [f"{word} {_some(names)}" for word, names in (("branches", people), ("tags", tags)) if names]
    has = f"it has the {' and the '.join(known)}" if known else "it has no commits yet"
    return InputError(
        f"git ref {ref!r} is no branch, tag or commit of {_without_secrets(repository, repository)}: {has}"
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN_REFS} more" if len(names) > _SHOWN_REFS else ""
    return ", ".join(names[:_SHOWN_REFS]) + more
