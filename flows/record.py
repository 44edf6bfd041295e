"""What a run computed, in git: `dvc.lock` and `params.yaml` on a branch of its own, to be looked at, run and merged.

The same files are artifacts of the training's MLflow run, where `darkroom register` puts them.
"""

from pathlib import Path

from darkroom.errors import StageFailed
from flows.git import git
from flows.settings import Settings

FILES = ("dvc.lock", "params.yaml")

_AUTHOR = {"user.name": "Darkroom", "user.email": "darkroom@localhost"}  # where git knows nobody


def branch_of(run_name: str) -> str:
    """`retrain/<run>`, without saying it twice."""
    return f"retrain/{run_name.removeprefix('retrain-')}"


def is_changed(root: Path) -> bool:
    """Whether the run's lock or parameters differ from those of the commit that it started from."""
    return bool(git(root, "status", "--porcelain", "--untracked-files=all", "--", *_there(root)))


def push_record(settings: Settings, root: Path, branch: str, message: str) -> str:
    """Commit the lock and the parameters of the workspace `root` and push them to `branch`; returns the commit.

    Raises StageFailed, with git's words, where the repository takes no push.
    """
    git(root, "add", "--force", "--", *_there(root))
    if git(root, "diff", "--cached", "--name-only"):  # else an earlier attempt has committed
        author = [option for key in _AUTHOR for option in ("-c", f"{key}={_configured(settings, key)}")]
        git(root, *author, "-c", "commit.gpgsign=false", "commit", "--quiet", "--no-verify", "--message", message)
    git(root, "push", "--quiet", "origin", f"HEAD:refs/heads/{branch}", url=settings.repository)
    return git(root, "rev-parse", "HEAD")


def _there(root: Path) -> list[str]:
    return [name for name in FILES if (root / name).is_file()]


def _configured(settings: Settings, key: str) -> str:
    """As the project's own git has it: a clone does not take that over."""
    try:
        return git(settings.project, "config", key) or _AUTHOR[key]
    except StageFailed:
        return _AUTHOR[key]
