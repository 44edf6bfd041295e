"""The sample stage on several processes: the same files as from one, to the last bit."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from darkroom.files import digest_file, read_json
from darkroom.workspace import Workspace
from tests.integration.registry_project import write_extractor
from tests.ranks import finish, start
from tests.unit.diffusion.test_model import write_model
from tests.unit.evaluation.test_samples import with_raw
from tests.unit.test_cli import write_snapshots


@pytest.mark.parametrize("ema", [pytest.param("trained", marks=pytest.mark.soak), "auto"])
def test_two_ranks_write_the_files_of_one(tmp_path, ema):
    params = yaml.safe_load((Path(__file__).parents[3] / "params.yaml").read_text())
    params["sample"] |= {"steps": 4, "num_images": 37, "batch_size": 8, "seeds": [0, 1], "ema": ema}
    params["evaluate"]["kid_subset_size"] = 10
    printed, files = [], []
    for count in (1, 2):
        root = tmp_path / str(count)
        (root / "models").mkdir(parents=True)
        (root / "dvc.yaml").touch()
        (root / "params.yaml").write_text(yaml.safe_dump(params))
        with_raw(write_model(root / "models"))
        write_extractor(Workspace(root))
        write_snapshots(Workspace(root))
        code, out, err = finish(start(root, "-m", "darkroom.stages.sample", DARKROOM_NPROC=str(count)))
        assert (code, err) == (0, "")
        printed.append(out.splitlines()[-1].partition("  ")[0])  # without the speed
        names = (
            "data/samples/unguided.npy",
            "data/samples/guided.npy",
            "data/samples/raw.npy",
            "data/samples/labels.npy",
            "reports/samples.png",
            "models/average/choice.json",
        )
        files.append({name: digest_file(root / name) for name in names})
    assert np.load(root / "data/samples/guided.npy").shape == (37, 1, 8, 8)
    assert files[0] == files[1]
    choice = read_json(root / "models/average/choice.json")
    assert len(choice.get("fid", {})) == (0 if ema == "trained" else 7)
    drawn_from = read_json(root / "data/samples/samples.json")["weights_digest"]
    assert drawn_from == read_json(Workspace(root).served_model / "model.json")["weights_digest"]
    assert printed == ["sampling: 148/148 images"] * 2
