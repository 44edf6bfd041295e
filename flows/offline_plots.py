"""Let `dvc plots show` and `dvc plots diff` draw without a network: set-up runs `python -m flows.offline_plots`.

DVC's page loads Vega from a CDN. Here Vega is written into a page template inside the environment that carries it, and
`.dvc/config.local`, which git ignores, points to it. A clone without set-up keeps DVC's own page.
"""

import sys
from pathlib import Path

from darkroom.files import write_text
from darkroom.workspace import Workspace

_VEGA_LITE = "5.20"  # DVC's plot templates are written for version 5
_PAGE = """<!DOCTYPE html>
<html>
<head>
    {{refresh_tag}}
    <meta charset="utf-8">
    <title>DVC Plot</title>
    <script>
(() => {{
{bundle}
}})();
    </script>
    <style>table {{ border-spacing: 15px; }}</style>
</head>
<body>
    {{plot_divs}}
</body>
</html>
"""


def main() -> None:
    """Write the template and register it with DVC for this checkout."""
    template = write_template(Path(sys.prefix) / "share" / "darkroom" / "plots.html")
    use_template(Workspace.find().root, template)


def write_template(path: Path) -> Path:
    """Write a page for DVC's plots that holds all of Vega (about 1 MB)."""
    import vl_convert

    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", _VEGA_LITE)
    write_text(path, _PAGE.format(bundle=bundle.replace("</script", "<\\/script")))
    return path


def use_template(root: Path, template: Path) -> None:
    """Set `plots.html_template` in the checkout's own, untracked DVC configuration; the rest of it stays."""
    from dvc.config import Config

    with Config(str(root / ".dvc")).edit("local") as config:
        config.setdefault("plots", {})["html_template"] = str(template)


if __name__ == "__main__":
    main()
