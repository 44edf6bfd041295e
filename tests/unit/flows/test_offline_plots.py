"""DVC's plots without a network: the page carries Vega, and the checkout's other settings stay."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from flows.offline_plots import use_template, write_template


def test_a_rendered_page_loads_nothing_from_elsewhere_and_defines_what_the_plots_call(
    dvc_project: Callable[..., Path], tmp_path: Path
) -> None:
    root = dvc_project(draw=("", {"outs": ["nothing"]}))
    (root / "loss.csv").write_text("step,loss\n0,1.0\n1,0.5\n2,0.25\n")
    (root / ".dvc" / "config.local").write_text("[core]\n    autostage = true\n")
    use_template(root, write_template(tmp_path / "plots.html"))
    settings = (root / ".dvc" / "config.local").read_text()
    assert "autostage = true" in settings
    subprocess.run([sys.executable, "-P", "-m", "dvc", "plots", "show", "loss.csv"], cwd=root, check=True)
    page = (root / "dvc_plots" / "index.html").read_text()
    assert re.findall(r"<script[^>]+src|<link", page) == []
    assert "window.vegaEmbed" in page
    assert page.index("window.vegaEmbed") < page.index("vegaEmbed('#")
