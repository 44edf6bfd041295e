"""What goes into the package."""

import ast
from pathlib import Path

import darkroom
from darkroom.registry.package import CODE

SOURCE = Path(darkroom.__file__).parent


def test_the_packaged_code_imports_nothing_of_ours_that_stays_behind() -> None:
    packaged = [
        path for name in CODE for path in ([SOURCE / name] if name.endswith(".py") else SOURCE.glob(f"{name}/**/*.py"))
    ]
    assert packaged
    for path in packaged:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.removeprefix("darkroom.").partition(".")[0]
                if name.startswith("darkroom."):
                    assert top in CODE or f"{top}.py" in CODE, f"{path.relative_to(SOURCE)} imports {name}"
