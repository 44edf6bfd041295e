"""What a record says against a model, and against itself: sentences for the model card, each from its figures."""

from collections.abc import Mapping

from darkroom.evaluation.protocol import ScoreRecord
from darkroom.registry.markdown import escaped, number, percent

_FEW_IMAGES = 1000  # held-out images below which the floor itself is uncertain


def limits(record: ScoreRecord, classes: list[str], tags: Mapping[str, str]) -> list[str]:
    """A line for each limit that there is; `tags` are the version's (`lineage.lineage_tags`)."""
    protocol, floor, unguided, guided = record.protocol, record.floor, record.unguided, record.guided
    found = [_beside_floor(record)]
    if floor.num_images < _FEW_IMAGES:
        found.append(f"The floor rests on {floor.num_images:,} held-out images: it is uncertain itself.")
    if unguided.fid.spread is None:
        found.append("Measured with one seed: how far the scores scatter is not known.")
    if protocol.extractor == "classifier":
        found.append(
            "FID, KID, precision and recall are in the features of this project's own classifier. They do not compare "
            "with published ones, which use InceptionV3."
        )
    found += [_worst_class(record, classes), _beside_classifier(record), _variety(record), _copies(record)]
    if guided.guidance_scale != 1 and guided.fid.value > unguided.fid.value:
        found.append(
            f"Guidance costs likeness: FID is {number(unguided.fid.value)} without it and {number(guided.fid.value)} "
            f"at {guided.guidance_scale:g}, the default, with as many images of each class."
        )
    if record.raw_fid is not None and record.raw_fid <= unguided.fid.seeds[0]:
        found.append(
            f"EMA did not help: the weights before averaging have FID {number(record.raw_fid)} with seed "
            f"{protocol.seeds[0]}, these {number(unguided.fid.seeds[0])}."
        )
    if not record.finite:
        found.append("**Some weights are not finite numbers.**")
    if tags.get("darkroom.validated") != "true":
        found.append("Nothing says that the data was validated before training.")
    if tags.get("darkroom.git_dirty") == "true":
        found.append("Registered from files with uncommitted changes: the commit alone does not give them back.")
    return [line for line in found if line]


def _beside_floor(record: ScoreRecord) -> str:
    fid, floor = record.unguided.fid.value, record.floor
    beside = f"the floor, {number(floor.fid)}, which {floor.num_images:,} real images that were held out get"
    if fid <= floor.fid:
        return (
            f"FID {number(fid)} is not above {beside}. That does not make samples better than real images: few images "
            f"raise FID by themselves, and a set of samples has {record.protocol.num_images:,}."
        )
    return f"FID {number(fid)} is above {beside}: samples as a whole can be told from real images."


def _worst_class(record: ScoreRecord, classes: list[str]) -> str:
    accuracies, real = record.guided.class_accuracies, record.floor.class_accuracies
    if accuracies is None or real is None:
        return ""
    label = min(range(len(accuracies)), key=accuracies.__getitem__)
    return (
        f'The worst class is "{escaped(classes[label])}" (label {label}): {percent(accuracies[label])} of its samples '
        f"are taken for it; of real images {percent(real[label])}."
    )


def _beside_classifier(record: ScoreRecord) -> str:
    judged, real = record.guided.class_accuracy, record.floor.class_accuracy
    if judged is None or real is None or judged.value <= real:
        return ""
    return (
        f"Samples are recognised more often than real images ({percent(judged.value)} against {percent(real)}): they "
        "are more typical than real ones, and the classifier that judges them errs as well."
    )


def _variety(record: ScoreRecord) -> str:
    recall, real = record.guided.recall.value, record.floor.recall
    if recall >= real:
        return ""
    return f"Less variety than real images: recall is {number(recall)}, of held-out images {number(real)}."


def _copies(record: ScoreRecord) -> str:
    sets = (record.unguided.memorisation, record.guided.memorisation)
    worst = max(sets, key=lambda found: found.near_copies)
    return (
        f"Memorisation: {percent(worst.near_copies)} of samples are nearer to one of {worst.num_neighbours:,} training "
        "images than 99 % of held-out images are; of new images 1 % would be. This is measured in feature space and "
        "finds no copy of a part."
    )
