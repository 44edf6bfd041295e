"""What a case of the corpus is: something bad, and what becomes of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from darkroom.stages import prepare, validate
from darkroom.stages.runner import BAD_INPUT, DONE, FAILED, outcome
from tests.s3 import Fault, Request

REPOSITORY = Path(__file__).parents[2]
CLASSES = ("ant", "bee")
PER_CLASS = 6


@dataclass(frozen=True)
class Case:
    """`build` puts something bad into a good project; `says` is a pattern that one line about it matches.

    The outcomes: "refused" is prepare's exit code 2, nothing is packed; "listed": the image is a row of the manifest
    and nowhere else, and validate refuses the data set, naming it; "found": every image decodes, validate refuses the
    data set; "warned": the data set passes with a warning; "accepted": it passes, and `says` names what became of it.
    """

    name: str
    outcome: str
    says: str
    build: Callable[["Project"], None]
    fault: Callable[[Request], Fault | None] = lambda request: None  # of the server, for a source on S3


class Project:
    """A project directory with a good folder of 2 x 6 grey images of 8x8 in `data/raw/images`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = root / "data" / "raw" / "images"
        (root / "dvc.yaml").touch()
        (root / "expectations").mkdir()
        (root / "expectations" / "images.json").write_text((REPOSITORY / "expectations" / "images.json").read_text())
        self._params = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
        self.change("data", source="data/raw/images", num_classes=2, test_fraction=0.25)
        self.change("validate", min_images_per_class=4)
        for label, name in enumerate(CLASSES):
            (self.images / name).mkdir(parents=True)
            for i in range(PER_CLASS):
                self.image(label, i).save(self.images / name / f"{i}.png")

    def image(self, label: int, number: int, side: int = 8) -> Image.Image:
        """A grey image that no other one is like."""
        generator = np.random.default_rng([label, number])
        return Image.fromarray(generator.integers(0, 256, (side, side), dtype=np.uint8))

    def change(self, group: str, **values: object) -> None:
        self._params[group].update(values)
        (self.root / "params.yaml").write_text(yaml.safe_dump(self._params))

    def add(self, content: bytes, name: str = "ant/bad.png") -> None:
        """One more file in the folder."""
        (self.images / name).write_bytes(content)


def run(project: Project, caplog_text: Callable[[], str]) -> tuple[str, list[str]]:
    """Run prepare and validate; returns the outcome and all that was said. The working directory is the project."""
    said: list[str] = []
    report = project.root / "reports" / "validation.json"
    code = outcome(prepare.run, "prepare", said.append)
    if code != DONE:
        assert not (project.root / "data" / "prepared").exists()
        return {BAD_INPUT: "refused", FAILED: "failed"}[code], "\n".join(said).splitlines()
    code = outcome(validate.run, "validate", said.append)
    lines = "\n".join(said).splitlines() + caplog_text().splitlines()
    if code == BAD_INPUT:
        assert not report.exists()  # train depends on it
        assert (project.root / "reports" / "validation.html").is_file()
        return ("listed" if "could not be decoded" in caplog_text() else "found"), lines
    assert code == DONE
    assert report.is_file()
    return ("warned" if "warning: " in caplog_text() else "accepted"), lines
