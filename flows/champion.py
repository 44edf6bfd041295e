"""The model that serves, for a person: its figures and the lines to copy. `python -m flows.champion`.

`python -m flows.champion tracking-uri` and `… model-uri` print one value, for the Makefile and for scripts.
"""

import json
import sys
from typing import Any

from darkroom.errors import InputError
from darkroom.workspace import Workspace

_PULL = """\
import base64, mlflow, pandas as pd
mlflow.set_tracking_uri("{tracking}")
model = mlflow.pyfunc.load_model("{model}")
images = model.predict(pd.DataFrame({rows}), params={{"seed": 1}})
open("image.png", "wb").write(base64.b64decode(images["png"][0]))"""

_SERVE = """\
MLFLOW_TRACKING_URI="{tracking}" mlflow models serve -m "{model}" --env-manager local --port 5001
curl -s http://127.0.0.1:5001/invocations -H "Content-Type: application/json" \\
  -d '{{"dataframe_split": {body}, "params": {{"seed": 1}}}}'"""


def model_uri(workspace: Workspace) -> str:
    """What to load: the registered model's champion, whichever version that is."""
    return f"models:/{workspace.params().registry.name}@champion"


def find_champion(workspace: Workspace) -> dict[str, Any] | None:
    """Version, weights and figures of `@champion`; None if nothing serves yet."""
    from darkroom.registry.promotion import status

    return status(workspace)["champion"]


def headline(workspace: Workspace, champion: dict[str, Any]) -> str:
    """The champion and its figures, in three lines of Markdown that read well as text too."""
    figures = champion["figures"]

    def figure(name: str, digits: int) -> str:
        return f"{figures[name]:.{digits}f}" if name in figures else "?"

    def accuracy(name: str) -> str:
        """Nothing for a model without classes."""
        return f", class accuracy {figure(name, 4)}" if name in figures else ""

    name = workspace.params().registry.name
    return "\n".join(
        [
            f"Champion: **{name}** version {champion['version']}, weights {str(champion['weights'])[:12]}",
            f"- unguided: FID {figure('unguided.fid', 3)} (floor, held-out real images: {figure('floor.fid', 3)})"
            + accuracy("unguided.class_accuracy"),
            f"- guided: FID {figure('guided.fid', 3)}" + accuracy("guided.class_accuracy"),
        ]
    )


def directions(workspace: Workspace) -> str:
    """Where to look, and the lines to copy for pulling and serving the champion."""
    from darkroom.registry.tracking import shown, tracking_uri

    rows, body = _two_images(workspace.params().data.num_classes)
    values = {"tracking": shown(tracking_uri(workspace)), "model": model_uri(workspace), "rows": rows, "body": body}
    return "\n\n".join(
        [
            f"Look:   {workspace.reports / 'samples.png'}, or `make ui` for runs and curves",
            "Pull:   in Python, from anywhere:\n\n" + _PULL.format(**values),
            "Serve:  `make serve` here, or from anywhere:\n\n" + _SERVE.format(**values),
        ]
    )


def _two_images(num_classes: int) -> tuple[str, str]:
    """What a data frame is made from and what a request contains, to ask for two images."""
    if num_classes == 0:
        return "index=range(2)", '{"columns": [], "data": [[], []]}'
    labels = [min(label, num_classes - 1) for label in (3, 7)]
    split = {"columns": ["class_label"], "data": [[label] for label in labels]}
    return json.dumps({"class_label": labels}), json.dumps(split)


def main(arguments: list[str]) -> int:
    """Print what is asked for; 1 if nothing serves yet, 2 for bad parameters."""
    from darkroom.registry.tracking import RegistryUnavailable, tracking_uri

    try:
        workspace = Workspace.find()
        if arguments == ["tracking-uri"]:
            print(tracking_uri(workspace))
        elif arguments == ["model-uri"]:
            print(model_uri(workspace))
        elif arguments:
            raise InputError(f"{arguments[0]!r}: expected tracking-uri, model-uri or nothing")
        elif champion := find_champion(workspace):
            print(headline(workspace, champion).replace("**", ""), directions(workspace), sep="\n\n")
        else:
            print("Nothing serves yet: make run", file=sys.stderr)
            return 1
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except RegistryUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
