"""The table of scores that evaluate prints."""

from darkroom.stages.evaluate import summary
from tests.integration.registry_project import score_record


def rows(text):
    return [line.split() for line in text.splitlines()]


def test_the_table_has_both_sets_with_spread_and_their_class_accuracies():
    found = rows(summary(score_record(fid=0.5, accuracy=0.97, guided_accuracy=0.995)))
    assert found[0] == ["FID", "precision", "recall", "near-copies", "class", "accuracy"]
    assert found[2][:6] == ["samples,", "guidance", "1", "(20", "x", "2)"]
    assert found[2][6:] == ["0.500", "±", "0.050", "0.800", "0.700", "0.010", "0.9700"]
    assert found[3][:7] == ["samples,", "guidance", "2,", "as", "many", "of", "each"]
    assert found[3][7:] == ["0.500", "±", "0.050", "0.800", "0.700", "0.010", "0.9950"]


def test_what_ema_gains_is_shown_against_the_same_seed():
    record = score_record(fid=0.5, spread=0.1)  # raw_fid 1.0, the first seed's 0.5 - 0.1 / sqrt(2)
    line = next(line for line in summary(record).splitlines() if "without EMA" in line)
    assert "seed 0 (EMA gains 0.571)" in line
    assert line.endswith(" 1.000")
    assert "EMA" not in summary(record.model_copy(update={"raw_fid": None}))


def test_without_classes_there_is_one_set_and_no_class_accuracy():
    text = summary(score_record(fid=0.5, accuracy=None, guided_accuracy=None, guidance_scale=1.0))
    assert "class" not in text
    assert [row[0] for row in rows(text)].count("samples,") == 1
    assert "mean image" in text


def test_columns_are_aligned_whatever_the_figures():
    lines = summary(score_record(fid=1234.5, spread=99.0)).splitlines()[:4]
    ends = [
        line.index(word) + len(word) for line, word in zip(lines, ("precision", "0.800", "0.800", "0.800"), strict=True)
    ]
    assert len(set(ends)) == 1
