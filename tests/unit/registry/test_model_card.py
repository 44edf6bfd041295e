"""The model card: every figure is one of its inputs, and what speaks against the model is said."""

import re
from pathlib import Path
from typing import Any

import pytest

from darkroom.diffusion.card import ModelCard
from darkroom.evaluation.protocol import Memorisation, ScoreRecord
from darkroom.params import Params, load_params
from darkroom.registry.markdown import escaped
from darkroom.registry.model_card import DESCRIPTION_LENGTH, describe, write_card
from darkroom.registry.outputs import Outputs
from darkroom.serving.limits import Limits
from tests.integration.registry_project import estimate, score_record

PARAMS = load_params(Path(__file__).parents[3] / "params.yaml")
CLASSES = [str(digit) for digit in range(10)]
RUN = {"steps": 1234, "images": 157952, "parameters": 1696033, "final_loss": 0.123747}
TAGS = {
    "darkroom.validated": "true",
    "darkroom.git_dirty": "false",
    "darkroom.git_commit": "c0ffee" * 6 + "beef",
    "darkroom.data_images": '{"test": 359, "train": 1438}',
}
VALIDATION = {
    "statistics": {
        "images": 1799,
        "undecodable": 2,
        "expectations": {"evaluated": 21, "passed": 19, "warnings": 2},
        "per_class": {name: {"train": 140 + label, "test": 36} for label, name in enumerate(CLASSES)},
    }
}


def model(classes: list[str], **changes: Any) -> ModelCard:
    fields: dict[str, Any] = {
        "image_size": 8,
        "channels": 1,
        "classes": classes,
        "unet": PARAMS.train.model,
        "schedule": PARAMS.train.schedule,
        "label_dropout": 0.1 if classes else 0.0,
        "fingerprint": "f1" * 32,
        "data_digest": "da" * 32,
        "weights_digest": "3e" * 32,
    }
    return ModelCard(**fields | changes)


def changed(record: ScoreRecord, **fields: Any) -> ScoreRecord:
    """`unguided__fid=…` changes a field of a part."""
    for key, value in fields.items():
        part, _, name = key.partition("__")
        record = record.model_copy(
            update={part: getattr(record, part).model_copy(update={name: value}) if name else value}
        )
    return record


def record(**fields: Any) -> ScoreRecord:
    """With figures that are all different, so that none can be taken for another."""
    accuracies = [0.91, 0.921, 0.932, 0.943, 0.954, 0.965, 0.976, 0.987, 0.878, 0.889]
    scored = changed(
        score_record(weights="3e" * 32),
        unguided__fid=estimate(1.1234, 0.0567),
        unguided__fid_deviation=0.0987,
        unguided__fid_infinity=0.8765,
        unguided__kid=estimate(-0.01234, 0.00345),
        unguided__class_accuracies=[accuracy - 0.3 for accuracy in accuracies],
        guided__fid=estimate(4.5678, 0.1357),
        guided__fid_deviation=0.1864,
        guided__fid_infinity=4.3219,
        guided__recall=estimate(0.5432, 0.0123),
        guided__class_accuracies=accuracies,
        floor__fid=2.5309,
        floor__class_accuracies=[accuracy / 2 for accuracy in accuracies],
        raw_fid=9.8765,
    )
    return changed(scored, **fields)


def card(scored: ScoreRecord | None = None, classes: list[str] | None = None, **options: Any) -> str:
    run = RUN | options.pop("run", {})
    outputs = Outputs(model(CLASSES if classes is None else classes), run, scored or record(), True)
    options = {"tags": TAGS, "validation": VALIDATION, "params": PARAMS} | options
    return write_card(outputs, options.pop("params"), options.pop("tags"), options.pop("validation"), **options)


def without_classes() -> ScoreRecord:
    return score_record(accuracy=None, guided_accuracy=None, guidance_scale=1.0)


def unlabelled() -> str:
    return card(without_classes(), classes=[], validation=None)


def section(text: str, heading: str) -> str:
    (found,) = re.findall(rf"^## {heading}\n\n(.*?)(?=\n\n## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    return str(found)


def row(text: str, name: str) -> list[str]:
    (found,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


# Figures


def leaves(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in leaves(inner)]
    if isinstance(value, list | tuple):
        return [leaf for inner in value for leaf in leaves(inner)]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.parametrize("text", [card(pictured=True), unlabelled()], ids=["labelled", "unlabelled"])
def test_no_figure_is_invented(text: str) -> None:
    """Every number in the text is one of the inputs, as it is or as a percentage, to four digits."""
    scored = record() if "on demand" in text else without_classes()
    inputs = leaves([scored.model_dump(), PARAMS.model_dump(), model(CLASSES).model_dump(), RUN, VALIDATION])
    inputs += [359, 1438, len(CLASSES), len(scored.protocol.seeds)]
    known = {f"{value:.4g}" for value in inputs} | {f"{100 * value:.4g}" for value in inputs}
    known |= {f"{value:g}" for value in inputs} | {str(int(value)) for value in inputs if value == int(value)}
    known |= {str(label) for label in range(len(CLASSES))}
    known |= {str(value) for value in inputs}
    # the text's own: DDPM's year, noise levels, percentiles, the bounds of requests, how many images a picture shows
    known |= {"2020", "0.1", "0.2", "0.4", "95", "99", "1", "0", "100", "256", "64000", "16"}
    prose = re.sub(r"`[^`\n]*`|```.*?```", "", text, flags=re.DOTALL)
    prose = re.sub(r"(?<=\d),(?=\d{3})", "", prose)
    found = re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]\d+)?", prose)
    assert len(found) > 60
    assert not [number for number in found if number not in known]


def test_scores_stand_beside_the_floor_with_spread_and_interval() -> None:
    scores = section(card(), "Scores")
    assert row(scores, "FID ↓")[1:] == ["2.531", "1.123 ± 0.0567 [1.067, 1.18]", "4.568 ± 0.1357 [4.432, 4.704]"]
    assert row(scores, "KID ↓")[2] == "-0.01234 ± 0.00345 [-0.01579, -0.00889]"
    assert row(scores, "recall ↑")[3] == "0.5432 ± 0.0123 [0.5309, 0.5555]"
    assert row(scores, "deviation of one set's FID")[2:] == ["0.0987", "0.1864"]
    assert row(scores, "FID, infinitely many images")[2:] == ["0.8765", "4.322"]
    assert row(scores, "images")[1:] == ["360", "20 × 2 seeds", "20 × 2 seeds"]
    assert row(scores, "real images + noise 0.1")[1] == "1"
    first = record().unguided.fid.seeds[0]
    assert f"FID 9.877 with the weights before averaging, {first:.4g} with these (guidance 1, seed 0)" in scores


def test_the_protocol_is_there_with_every_field_and_its_digest() -> None:
    scored = record()
    protocol = section(card(scored), "Protocol")
    assert f"`{scored.protocol_digest}`" in protocol
    for name in scored.protocol.model_dump():
        assert f"| `{name}` |" in protocol
    assert row(protocol, "`seeds`")[1] == "0, 1"


def test_each_class_has_its_shares_and_images() -> None:
    classes = section(card(), "Classes")
    assert row(classes, "8")[1:] == ["8", "148", "43.9 %", "57.8 %", "87.8 %"]
    assert len([line for line in classes.splitlines() if line.startswith("| ")]) == 2 + len(CLASSES)


def test_of_many_classes_the_worst_are_shown() -> None:
    names = [f"class {label}" for label in range(1000)]
    shares = [0.5 + label / 2000 for label in range(1000)][::-1]
    scored = record(guided__class_accuracies=shares, unguided__class_accuracies=shares, floor__class_accuracies=shares)
    text = card(scored, classes=names)
    classes = section(text, "Classes")
    assert "of the 20 worst of 1,000 classes" in classes
    assert [line.split(" | ")[0] for line in classes.splitlines() if line.startswith("| class ")][1:3] == [
        "| class 999",
        "| class 998",
    ]
    assert len(text) < 12_000


def test_the_arithmetic_is_that_of_the_training() -> None:
    assert "bf16, final loss" in section(card(run={"precision": "bf16"}), "Training")
    training = section(card(run={"precision": "fp32"}), "Training")
    assert "fp32 (bf16 was asked for, which the device had no fast arithmetic for), final loss" in training


def test_training_and_data_are_told() -> None:
    text = card()
    training, data = section(text, "Training"), section(text, "Data")
    for words in ("1,234 steps, 157,952 images, batch 64", "decay 0.99;", "cosine, 1,000 timesteps", "f1f1f1f1f1f1"):
        assert words in training
    assert "commit `c0ffeec0ffee`" in training
    for words in ("`digits`", "`dadadadadada`", "359 in test, 1,438 in train", "19 of 21 expectations", "2 warnings"):
        assert words in data
    bare = card(tags={}, validation=None)
    assert "commit" not in section(bare, "Training")
    assert "Validated" not in bare


def test_the_bounds_that_it_names_are_those_of_the_service() -> None:
    limits = Limits()
    assert f"more than {limits.max_images} images or {limits.max_work:,} rows" in section(card(), "Use it")


# Limits


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "FID 1.123 is not above the floor, 2.531, which 360 real images that were held out get"),
        ({"unguided__fid": estimate(3.2, 0.1)}, "FID 3.2 is above the floor, 2.531"),
        ({}, "The floor rests on 360 held-out images"),
        ({}, "They do not compare with published ones"),
        ({}, 'The worst class is "8" (label 8): 87.8 % of its samples are taken for it; of real images 43.9 %'),
        ({}, "Samples are recognised more often than real images (99.5 % against 98 %)"),
        ({}, "recall is 0.5432, of held-out images 0.8"),
        ({}, "Guidance costs likeness: FID is 1.123 without it and 4.568 at 2"),
        ({"raw_fid": 0.9}, "EMA did not help: the weights before averaging have FID 0.9 with seed 0"),
        ({"finite": False}, "Some weights are not finite numbers"),
    ],
)
def test_what_speaks_against_the_model_is_said(fields: dict[str, Any], words: str) -> None:
    assert words in section(card(record(**fields)), "Limits")


def test_what_does_not_hold_is_not_said() -> None:
    good = record(
        floor__num_images=10_000,
        floor__recall=0.1,
        floor__class_accuracy=1.0,
        guided__fid=estimate(1.0, 0.1),
        protocol=record().protocol.model_copy(update={"extractor": "inception"}),
    )
    said = section(card(good), "Limits")
    for words in (
        "The floor rests",
        "do not compare",
        "recognised more often",
        "Less variety",
        "Guidance",
        "EMA did",
    ):
        assert words not in said


def test_the_larger_share_of_near_copies_counts() -> None:
    copied = Memorisation(near_copies=0.0765, threshold=0.5, median_ratio=1.0, num_neighbours=1438)
    said = section(card(record(guided__memorisation=copied)), "Limits")
    assert "7.65 % of samples are nearer to one of 1,438 training images than 99 % of held-out images" in said


def test_what_is_not_known_about_its_origin_is_said() -> None:
    assert "Nothing says that the data was validated" not in card()
    assert "Nothing says that the data was validated" in card(tags={})
    assert "uncommitted changes" in card(tags=TAGS | {"darkroom.git_dirty": "true"})


# Kinds of models


def test_a_model_without_classes_has_no_word_about_classes() -> None:
    text = unlabelled()
    assert "unconditional" in text
    assert "## Classes" not in text
    for words in ("class accuracy", "class_label", "labels outside"):
        assert words not in text
    assert "guidance 2" not in section(text, "Scores")
    assert 'pd.DataFrame({"seed": [7, 8]})' in section(text, "Use it")


def test_one_seed_has_no_spread() -> None:
    single = {"spread": None, "low": None, "high": None, "seeds": [1.5]}
    fid = estimate(1.5, 0.1).model_copy(update=single)
    scored = record(unguided__fid=fid, protocol=record().protocol.model_copy(update={"seeds": [4]}))
    text = card(scored)
    assert row(section(text, "Scores"), "FID ↓")[2] == "1.5"
    assert row(section(text, "Scores"), "images")[2] == "20 × one seed"
    assert "Measured with one seed" in section(text, "Limits")
    assert "±" not in section(text, "Scores").split("\n\n")[1]


def test_weights_before_averaging_that_were_not_measured_are_not_mentioned() -> None:
    assert "EMA gives" not in card(record(raw_fid=None))


def test_names_cannot_break_the_page() -> None:
    nasty = ["a|b", "<script>alert(1)</script>", "*x*\n# y", "`c`", "[d](e)", *CLASSES[5:]]
    text = card(classes=nasty, validation=None)
    assert "<script>" not in text
    assert "\n# y" not in text
    rows = [line for line in section(text, "Classes").splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {7}
    assert escaped("a|b") == "a\\|b"


def test_equal_inputs_give_equal_bytes_and_the_picture_is_named_only_if_it_is_there() -> None:
    assert card(pictured=True) == card(pictured=True)
    assert "](samples.png)" in card(pictured=True)
    assert "samples.png" not in card()


# What MLflow shows


def test_the_description_fits_into_mlflows_databases_and_ends_with_a_whole_section() -> None:
    text = card(pictured=True)
    assert len(text) > DESCRIPTION_LENGTH
    description = describe(text)
    assert len(description) <= DESCRIPTION_LENGTH
    assert "samples.png" not in description
    assert "README.md" in description
    for heading in ("Limits", "Scores", "Use it"):
        assert section(description, heading).startswith(section(text, heading))
    short = "# a\n\nwords\n\n![picture](samples.png)\n\n## B\n\nmore\n"
    assert describe(short) == "# a\n\nwords\n\n## B\n\nmore\n"
    long_names = card(classes=["x" * 400 + str(label) for label in range(10)], validation=None)
    assert len(describe(long_names)) <= DESCRIPTION_LENGTH


def test_params_are_read_as_they_are() -> None:
    train = PARAMS.train.model_copy(update={"ema_decay": 0.98765})
    other: Params = PARAMS.model_copy(update={"train": train})
    assert "decay 0.98765" in card(params=other)
