"""The table of scores that evaluate prints."""

from darkroom.stages.evaluate import summary
from tests.integration.registry_project import score_record


def test_the_table_has_both_sets_and_their_class_accuracies():
    lines = summary(score_record(fid=0.5, accuracy=0.97, guided_accuracy=0.995)).splitlines()
    assert lines[0].split() == ["FID", "class", "accuracy"]
    assert lines[2].split() == ["samples,", "guidance", "1", "(20)", "0.500", "0.9700"]
    assert lines[3].split() == ["samples,", "guidance", "2", "0.500", "0.9950"]


def test_without_classes_there_is_one_set_and_no_class_accuracy():
    text = summary(score_record(fid=0.5, accuracy=None, guided_accuracy=None, guidance_scale=1.0))
    assert "class" not in text
    assert [line.split()[0] for line in text.splitlines()].count("samples,") == 1
    assert "mean image" in text
