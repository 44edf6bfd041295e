"""The model card: what a registered model is, how well it draws and where it stops, as Markdown for people to read.

After Mitchell et al. 2019, "Model cards for model reporting". A pure function of what is known about the model: no
figure comes from anywhere else, and the same inputs give the same bytes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from darkroom.evaluation.protocol import Estimate, Protocol, SetScore
from darkroom.params import Params
from darkroom.registry.markdown import bullets, code, escaped, interval, number, percent, table
from darkroom.registry.model_limits import limits
from darkroom.registry.outputs import Outputs

README_FILE, PICTURE_FILE = "README.md", "samples.png"
DESCRIPTION_LENGTH = 5000  # characters that MLflow's databases hold; PostgreSQL refuses more
_CLASSES_SHOWN = 20
_PICTURED = 16  # images of a class in the picture


def write_card(
    outputs: Outputs,
    params: Params,
    tags: Mapping[str, str],
    validation: Mapping[str, Any] | None = None,
    *,
    pictured: bool = False,
) -> str:
    """The card of the model in `outputs`, trained with `params`.

    `tags` are the version's (`lineage.lineage_tags`), `validation` is `reports/validation.json` if it is about the data
    that the model was trained on, `pictured` says that `samples.png` lies beside the card.
    """
    known = _Known(outputs, params, tags, validation or {})
    sections = [
        _title(known, pictured),
        _section("Intended use", _use(known)),
        _section("Limits", bullets(limits(outputs.record, outputs.card.classes, tags))),
        _section("Scores", _scores(known)),
        _section("Use it", _loading(known)),
        _section("Training", _training(known)),
        _section("Data", _data(known)),
        _section("Classes", _classes(known)),
        _section("Protocol", _protocol(outputs.record.protocol)),
        _section("Licence", [_LICENCE]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def describe(card: str, limit: int = DESCRIPTION_LENGTH) -> str:
    """The card's leading sections, as many as `limit` characters hold, without the picture, for MLflow's pages."""
    rest = f"\n\nThe rest is in `{README_FILE}` of the model's artifacts.\n"
    head, *sections = card.rstrip("\n").split("\n\n## ")
    text = "\n\n".join(part for part in head.split("\n\n") if not part.startswith("!["))[: limit - len(rest)]
    for position, section in enumerate(sections):
        longer = f"{text}\n\n## {section}"
        last = position == len(sections) - 1
        if len(longer) + (1 if last else len(rest)) > limit:
            return text + rest
        text = longer
    return text + "\n"


@dataclass(frozen=True)
class _Known:
    """All that the card is made from."""

    outputs: Outputs
    params: Params
    tags: Mapping[str, str]
    validation: Mapping[str, Any]  # empty if there is none

    @property
    def sets(self) -> list[SetScore]:
        """The unguided samples' scores and, where they are others, those of the guided ones."""
        record = self.outputs.record
        return [record.unguided, *([record.guided] if record.guided != record.unguided else [])]


_LICENCE = (
    "The code in this package is under the Apache License 2.0. The weights were learnt from the data named above: its "
    "terms hold for them and for what they draw. Nothing here checked those terms."
)


def _section(heading: str, lines: Sequence[str]) -> str:
    return f"## {heading}\n\n" + "\n".join(lines) if lines else ""


def _title(known: _Known, pictured: bool) -> str:
    card, protocol = known.outputs.card, known.outputs.record.protocol
    size = f"{card.image_size} × {card.image_size}"
    colours = {1: "grey", 3: "colour"}.get(card.channels, f"{card.channels}-channel")
    what = (
        f"class-conditional: it draws any of {len(card.classes):,} classes ({_names(card.classes)}) on demand"
        if card.classes
        else "unconditional: it draws images like those that it was trained on, without classes"
    )
    parameters = f", {known.outputs.run['parameters']:,} parameters" if "parameters" in known.outputs.run else ""
    lines = [
        f"# {escaped(known.params.registry.name)}: a diffusion model of {size} {colours} images",
        f"A denoising diffusion model (DDPM, Ho et al. 2020), {what}. A UNet{parameters}; its weights are the "
        f"exponential moving average (EMA) over its training. Weights `{card.weights_digest[:12]}`, scored under "
        f"protocol `{protocol.digest[:12]}`.",
    ]
    if pictured:
        rows = f"the first {_PICTURED} images of each class, a row each" if card.classes else "the first images"
        how = f"drawn with seed {protocol.seeds[0]} at guidance {protocol.guidance_scale:g}"
        lines.append(f"![Samples, not chosen: {rows}, {how}.]({PICTURE_FILE})")
    return "\n\n".join(lines)


def _use(known: _Known) -> list[str]:
    size = known.outputs.card.image_size
    return bullets(
        [
            f"For new images that look like the training data, {size} × {size} pixels each: examples, tests, studies "
            "of generative models, more images to train with where it was seen to help.",
            "Not as evidence: what it draws never existed. Not for classes, sizes or kinds of images that its data "
            "does not have.",
        ]
    )


def _scores(known: _Known) -> list[str]:
    record, protocol = known.outputs.record, known.outputs.record.protocol
    several = len(protocol.seeds) > 1
    lines = _score_table(known)
    lines.append("")
    spread = "± is the standard deviation over seeds, the brackets hold the 95 % interval of the mean. "
    lines.append((spread if several else "") + "The deviation of one set is what drawing other images would change.")
    lines += ["", "How much an FID is, in the same features:", ""]
    scale = record.scale
    mean = "each image replaced by its class's mean" if record.floor.class_accuracy is not None else "mean image"
    rows = {
        "real images + noise 0.1": scale.noise_0_1,
        "real images + noise 0.2": scale.noise_0_2,
        "real images + noise 0.4": scale.noise_0_4,
        mean: scale.class_means,
        "pure noise": scale.pure_noise,
    }
    lines += table(["", "FID"], [[name, number(fid)] for name, fid in rows.items()])
    if record.raw_fid is not None:
        lines.append("")
        lines.append(
            f"What EMA gives: FID {number(record.raw_fid)} with the weights before averaging, "
            f"{number(record.unguided.fid.seeds[0])} with these (guidance 1, seed {protocol.seeds[0]})."
        )
    return lines


def _seeds(count: int) -> str:
    return f"{count} seeds" if count > 1 else "one seed"


def _score_table(known: _Known) -> list[str]:
    floor, protocol = known.outputs.record.floor, known.outputs.record.protocol
    heads = ["", "real, held out: the floor", *(f"guidance {score.guidance_scale:g}" for score in known.sets)]
    counts = [f"{protocol.num_images:,} × {_seeds(len(score.fid.seeds))}" for score in known.sets]
    rows = [["images", f"{floor.num_images:,}", *counts]]
    for name, key in (
        ("FID ↓", "fid"),
        ("KID ↓", "kid"),
        ("precision ↑", "precision"),
        ("recall ↑", "recall"),
        ("class accuracy ↑", "class_accuracy"),
    ):
        real = getattr(floor, key)
        if real is not None:
            rows.append([name, number(real), *(_estimate(getattr(score, key)) for score in known.sets)])
    rows.append(["deviation of one set's FID", "", *(number(score.fid_deviation) for score in known.sets)])
    rows.append(["FID, infinitely many images", "", *(number(score.fid_infinity) for score in known.sets)])
    rows.append(["near-copies", "1 %", *(percent(score.memorisation.near_copies) for score in known.sets)])
    return table(heads, rows)


def _classes(known: _Known) -> list[str]:
    """Each class; of many, the worst."""
    record, names = known.outputs.record, known.outputs.card.classes
    served, floor = record.guided.class_accuracies, record.floor.class_accuracies
    if served is None or floor is None:
        return []
    worst = sorted(range(len(served)), key=lambda label: (served[label], label))[:_CLASSES_SHOWN]
    shown = worst if len(served) > _CLASSES_SHOWN else sorted(worst)
    counts = known.validation.get("statistics", {}).get("per_class", {})
    columns = [floor, *(score.class_accuracies or [] for score in known.sets)]
    heads = ["class", "label", "training images", "real, held out"]
    heads += [f"guidance {score.guidance_scale:g}" for score in known.sets]
    rows = []
    for label in shown:
        images = counts.get(names[label], {}).get("train")
        row = [escaped(names[label]), str(label), "" if images is None else f"{images:,}"]
        rows.append([*row, *(percent(column[label]) for column in columns)])
    which = f", of the {_CLASSES_SHOWN} worst of {len(served):,} classes" if len(served) > _CLASSES_SHOWN else ""
    return [f"Share of images that the classifier takes for their class{which}:", "", *table(heads, rows)]


def _data(known: _Known) -> list[str]:
    data, card, statistics = known.params.data, known.outputs.card, known.validation.get("statistics")
    held_out = "as the source splits itself" if data.test_fraction is None else f"{data.test_fraction:g} of each class"
    lines = [
        f"Source: {code(data.source)}, packed as {card.image_size} × {card.image_size} × {card.channels}, digest "
        f"`{card.data_digest[:12]}`. Held out: {held_out}."
    ]
    if splits := json.loads(known.tags.get("darkroom.data_images", "{}")):
        lines.append("Images: " + ", ".join(f"{count:,} in {split}" for split, count in sorted(splits.items())) + ".")
    if statistics:
        found = statistics["expectations"]
        lines.append(
            f"Validated: {found['passed']:,} of {found['evaluated']:,} expectations hold for {statistics['images']:,} "
            f"images, with {found['warnings']:,} warnings; {statistics['undecodable']:,} could not be decoded."
        )
    return bullets(lines)


def _training(known: _Known) -> list[str]:
    train, run, card = known.params.train, known.outputs.run, known.outputs.card
    seen = f", {run['images']:,} images" if "images" in run else ""
    loss = f", final loss {number(run['final_loss'])}" if run.get("final_loss") is not None else ""
    width = known.outputs.width
    average = f"EMA with decay {train.ema_decay:g}" if width is None else f"post-hoc EMA of width {width:g}, by its FID"
    attention = f"attention at {', '.join(map(str, train.model.attention_resolutions))}"
    commit = known.tags.get("darkroom.git_commit")
    return bullets(
        [
            f"{run['steps']:,} steps{seen}, batch {train.batch_size:,}, learning rate {train.learning_rate:g}, "
            f"{_precision(train.precision, run.get('precision'))}{loss}.",
            f"{average}; {percent(train.label_dropout)} of labels dropped; predicts "
            f"{train.prediction}, loss weighting {train.loss_weighting}.",
            f"Forward process: {train.schedule.name}, {train.schedule.num_timesteps:,} timesteps. UNet: channels "
            f"{', '.join(map(str, train.model.channels))}"
            + (f", {attention}." if train.model.attention_resolutions else "."),
            f"Fingerprint `{card.fingerprint[:12]}`" + (f", commit `{commit[:12]}`" if commit else "") + ".",
        ]
    )


def _loading(known: _Known) -> list[str]:
    card, uri = known.outputs.card, f"models:/{known.params.registry.name}@champion"
    labels = f'"class_label": [0, {min(1, len(card.classes) - 1)}], ' if card.classes else ""
    range_ = f"labels outside 0 to {len(card.classes) - 1:,}, " if card.classes else ""
    return [
        "```python",
        "import base64, mlflow, pandas as pd  # MLFLOW_TRACKING_URI names the registry",
        "",
        f'model = mlflow.pyfunc.load_model("{uri}")',
        f'images = model.predict(pd.DataFrame({{{labels}"seed": [7, 8]}}))["png"]',
        'open("image.png", "wb").write(base64.b64decode(images[0]))',
        f'mlflow.models.get_model_info("{uri}").metadata  # weights_digest, protocol_digest, classes',
        "```",
        "",
        f"By default: {_drawing(known.outputs.record.protocol)}. `params` changes `guidance_scale`, `sampler`, `steps` "
        "and, without a column `seed`, `seed`.",
        "",
        f"Refused by name: {range_}other columns or parameters, more than {card.schedule.num_timesteps:,} steps, "
        "guidance outside 0 to 100, a seed both as a column and as a parameter, more than 256 images or 64,000 rows "
        "through the network in one request (whoever serves the model can set other bounds).",
    ]


def _precision(asked: str, computed: str | None) -> str:
    if computed in (asked, None):
        return asked
    return f"{computed} ({asked} was asked for, which the device had no fast arithmetic for)"


def _drawing(protocol: Protocol) -> str:
    levels = protocol.guidance_interval
    within = f" at noise levels {levels[0]:g} to {levels[1]:g}" if levels is not None else ""
    guidance = f"guidance {protocol.guidance_scale:g}{within}"
    return f"{protocol.sampler}, {protocol.steps:,} steps, {guidance}, {protocol.precision}"


def _protocol(protocol: Protocol) -> list[str]:
    """All fields: scores are comparable exactly when these agree."""
    fields = protocol.model_dump(mode="json")
    lines = [f"Scores compare with scores of the same protocol alone: `{protocol.digest}`.", ""]
    return lines + table(["field", "value"], [[f"`{name}`", _value(value)] for name, value in fields.items()])


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    text = str(value)
    return f"`{text[:12]}`" if len(text) == 64 else escaped(text)


def _estimate(estimate: Estimate) -> str:
    if estimate.spread is None or estimate.low is None or estimate.high is None:
        return number(estimate.value)
    return f"{number(estimate.value)} ± {number(estimate.spread)} {interval(estimate.low, estimate.high)}"


def _names(classes: Sequence[str]) -> str:
    shown = ", ".join(map(escaped, classes[:_CLASSES_SHOWN]))
    return f"{shown}, …" if len(classes) > _CLASSES_SHOWN else shown
