"""What DVC makes of a project's files: run as a file in a clean process, with `declared` or `listed` as its argument.

`declared` prints the outputs and dependencies of dvc.yaml and .dvc files in the working directory, templates resolved,
and the remotes of this user's own configuration; it computes and fetches nothing. `listed` prints the outputs with the
files in them; a directory's listing that the cache lacks is fetched, and nothing else. Both print JSON. It imports
nothing of this project.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def declared(root: str) -> dict[str, Any]:
    """The `entries`, and the `remotes` as their name and configuration."""
    from dvc.dependency import DatasetDependency, DbDependency, RepoDependency
    from dvc.repo import Repo

    def described(entry: Any, stage: str, output: bool) -> dict[str, Any]:
        elsewhere = isinstance(entry, (RepoDependency, DbDependency, DatasetDependency))
        local = not elsewhere and entry.protocol == "local"  # asking an import for it would clone a repository
        return {
            "stage": stage,
            "kind": "output" if output else "import" if elsewhere else "dependency",
            "path": os.path.relpath(entry.fs_path, root) if local else str(entry.def_path),
            "local": local,
            "digest": entry.hash_info.value if entry.hash_info else None,
            "files": [(file["relpath"], file.get("md5")) for file in entry.files or []],
        }

    repo = Repo(root)
    stages = [(stage, stage.addressing) for stage in repo.index.stages]
    entries = [described(out, name, True) for stage, name in stages for out in stage.outs]
    entries += [described(dep, name, False) for stage, name in stages for dep in stage.deps]
    keys = ("url", "endpointurl")
    remotes = {
        name: {key: str(values[key]) for key in keys if key in values} for name, values in repo.config["remote"].items()
    }
    return {"entries": entries, "remotes": remotes}


def listed(root: str) -> list[dict[str, Any]]:
    """An entry for each output: its `files`, None if they are not to be had, and the `error` if there was one."""
    from dvc.repo import Repo
    from dvc_data.hashfile.tree import Tree

    def files_of(out: Any) -> tuple[list[tuple[str, str | None]] | None, str | None]:
        if not (out.use_cache and out.hash_info and out.hash_info.isdir) or out.files:
            return [], None
        error = None
        if not out.cache.exists(out.hash_info.value):
            try:
                repo.cloud.pull([out.hash_info], remote=out.remote)
            except Exception as failed:  # whichever file system DVC reaches the remote with
                error = f"{type(failed).__name__}: {failed}"
        if not out.cache.exists(out.hash_info.value):
            return None, error
        tree = Tree.load(out.cache, out.hash_info)
        return [("/".join(key), digest.value if digest else None) for key, _, digest in tree], None

    repo, entries = Repo(root), []
    for out in repo.index.outs:
        files, error = files_of(out)
        entries.append({"path": os.path.relpath(out.fs_path, root), "files": files, "error": error})
    return entries


if __name__ == "__main__":
    json.dump({"declared": declared, "listed": listed}[sys.argv[1]](str(Path.cwd())), sys.stdout)
