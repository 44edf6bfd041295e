import json

import pytest

from darkroom.errors import InputError
from darkroom.evaluation.protocol import Protocol, ScoreRecord
from darkroom.files import write_json
from tests.integration.registry_project import score_record

FIELDS = {
    "code": "e" * 64,
    "extractor": "classifier",
    "extractor_weights": "a" * 64,
    "classifier": "a" * 64,
    "data": "d" * 64,
    "reference": "b" * 64,
    "reference_images": 1438,
    "published_statistics": None,
    "num_images": 1797,
    "seeds": [0, 1],
    "sampler": "ddim",
    "steps": 20,
    "spacing": "trailing",
    "eta": 0.0,
    "clipping": "static",
    "guidance_scale": 2.0,
    "guidance_interval": None,
    "precision": "fp32",
    "resize": "none",
    "kid_subsets": 50,
    "kid_subset_size": 300,
    "neighbours": 3,
}
CHANGES = {
    "code": "c" * 64,
    "extractor": "inception",
    "extractor_weights": "c" * 64,
    "classifier": "c" * 64,
    "data": "c" * 64,
    "reference": "c" * 64,
    "reference_images": 1000,
    "published_statistics": "c" * 64,
    "num_images": 1000,
    "seeds": [0, 2],
    "sampler": "ddpm",
    "steps": 21,
    "spacing": "log_snr",
    "eta": 0.5,
    "clipping": "dynamic",
    "guidance_scale": 2.5,
    "guidance_interval": [0.3, 3.0],
    "precision": "bf16",
    "resize": "bilinear",
    "kid_subsets": 51,
    "kid_subset_size": 301,
    "neighbours": 5,
}


def record():
    return score_record().to_json_dict()


@pytest.mark.parametrize("field", sorted(CHANGES))
def test_every_field_is_part_of_the_digest_and_is_named_when_it_differs(field):
    one, other = Protocol(**FIELDS), Protocol(**(FIELDS | {field: CHANGES[field]}))
    assert one.digest != other.digest
    assert one.differences(other) == [f"{field}: {FIELDS[field]} here, {CHANGES[field]} there"]


def test_the_changes_above_cover_every_field_that_can_change():
    constant = {"sample_dtype", "split"}
    assert set(CHANGES) == set(Protocol.model_fields) - constant


def test_a_record_round_trips_through_json(tmp_path):
    write_json(tmp_path / "m.json", record())
    read = ScoreRecord.read(tmp_path / "m.json")
    write_json(tmp_path / "again.json", read.to_json_dict())
    assert ScoreRecord.read(tmp_path / "again.json") == read


def test_an_edited_record_is_refused(tmp_path):
    edited = record()
    edited["protocol"]["num_images"] = 50_000
    write_json(tmp_path / "m.json", edited)
    with pytest.raises(InputError, match="the file was edited"):
        ScoreRecord.read(tmp_path / "m.json")


@pytest.mark.parametrize("content", ["", "{", json.dumps({"fid": 1})])
def test_a_garbled_record_is_refused_by_name(tmp_path, content):
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(InputError, match=r"m\.json"):
        ScoreRecord.read(tmp_path / "m.json")


def test_a_record_without_classes_has_no_class_accuracy_and_round_trips(tmp_path):
    bare = score_record(accuracy=None, guided_accuracy=None).to_json_dict()
    for group in ("unguided", "guided", "floor"):
        assert not {"class_accuracy", "class_accuracies"} & set(bare[group])
    write_json(tmp_path / "m.json", bare)
    read = ScoreRecord.read(tmp_path / "m.json")
    assert read.to_json_dict() == bare
    assert ScoreRecord.model_validate(record()).to_json_dict() == record()


@pytest.mark.parametrize("group", ["unguided", "guided", "floor"])
def test_a_class_accuracy_that_is_missing_in_one_place_is_refused(tmp_path, group):
    edited = record()
    del edited[group]["class_accuracy"]
    write_json(tmp_path / "m.json", edited)
    with pytest.raises(InputError, match=r"m\.json: the record: .*class_accuracy is missing in some of"):
        ScoreRecord.read(tmp_path / "m.json")
