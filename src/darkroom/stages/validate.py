"""validate: run the expectation suite on the manifest; bad data stops here."""

import logging
from typing import TYPE_CHECKING, Any

from darkroom.data.dataset import MANIFEST_FILE, SPLITS, DatasetInfo, load_info, load_split
from darkroom.data.manifest import read_manifest
from darkroom.data.statistics import read_statistics
from darkroom.data.validation.drift import ACCEPTED_FILE, measure, read_accepted
from darkroom.data.validation.findings import CRITICAL, Finding, failure_message
from darkroom.data.validation.page import render
from darkroom.data.validation.suite import check
from darkroom.errors import InputError
from darkroom.files import write_json, write_text
from darkroom.progress import signs_of_life
from darkroom.stages.runner import main
from darkroom.workspace import Workspace

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("darkroom.stages.validate")  # run with -m, the module is called __main__


def run(workspace: Workspace) -> None:
    """Write `reports/validation.json` and `.html`.

    Raises InputError when a critical expectation fails; then there is only the page, and nothing that train could use.
    """
    report, page = workspace.reports / "validation.json", workspace.reports / "validation.html"
    report.unlink(missing_ok=True)
    params = workspace.params().validate_
    info = load_info(workspace.prepared)
    splits = {name: load_split(workspace.prepared, name) for name in SPLITS}
    manifest = read_manifest(workspace.prepared / MANIFEST_FILE)
    _refuse_other_counts(manifest, info, workspace)
    accepted = read_accepted(workspace.expectations.with_name(ACCEPTED_FILE))
    drift = measure(accepted, read_statistics(workspace.prepared)) if accepted else None

    with signs_of_life("checking the expectations"):
        findings = check(manifest, info, params, workspace.expectations, drift)
    # Train depends on this file. What compares with the accepted data set is left out: to accept one, or another, must
    # not train anew what is the same.
    own = [finding for finding in findings if not finding.compares]
    figures = count(manifest, info, own)
    write_text(page, render(info, manifest, findings, figures, splits, drift))
    if message := failure_message(info.name, findings):
        raise InputError(f"{message}\nthe images and all findings are in {page}")
    for finding in findings:
        if not finding.success:
            log.warning("warning: %s: %s", finding.name, finding.sentence(shown=1))
    expectations = [finding.to_json_dict() for finding in own]
    write_json(report, {"success": True, "dataset": info.digest, "statistics": figures, "expectations": expectations})
    log.info("%s of %s expectations hold", sum(finding.success for finding in findings), len(findings))


def count(manifest: "pd.DataFrame", info: DatasetInfo, findings: list[Finding]) -> dict[str, Any]:
    """Counts for the report and the page."""
    counts = manifest.groupby(["class_name", "split"]).size().to_dict()
    failed = [finding.severity for finding in findings if not finding.success]
    return {
        "images": len(manifest),
        "undecodable": int((~manifest["decoded"]).sum()),
        "constant": int(manifest["constant"].sum()),
        "per_class": {
            name: {split: int(counts.get((name, split), 0)) for split in info.splits} for name in info.classes
        },
        "expectations": {
            "evaluated": len(findings),
            "passed": len(findings) - len(failed),
            "critical_failed": failed.count(CRITICAL),
            "warnings": len(failed) - failed.count(CRITICAL),
        },
    }


def _refuse_other_counts(manifest: "pd.DataFrame", info: DatasetInfo, workspace: Workspace) -> None:
    for split, number in info.splits.items():
        listed = int((manifest["split"] == split).sum())
        if listed != number:
            raise InputError(
                f"{workspace.prepared / MANIFEST_FILE}: {listed} {split} images; dataset.json declares {number}; "
                "run the prepare stage again"
            )


if __name__ == "__main__":
    main(run)
