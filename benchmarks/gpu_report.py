"""From what the parts of `benchmarks.gpu` measured to one table: part, what, figure, remark."""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.machine import sentence
from benchmarks.report import Result, table
from benchmarks.training_report import FORWARD_AND_BACKWARD

Row = tuple[str, str, str]  # what, figure, remark
HEADER = ("part", "what", "figure", "remark")
REFERENCE = "darkroom fp32"


def page(result: Result, *, markdown: bool) -> str:
    """The heading and the table, for a file or a terminal."""
    found, rows = result["found"], []
    for name, part in result["parts"].items():
        for what, figure, remark in (*ROWS[name](part["result"], result), *_ending(part)):
            rows.append([name, what, figure, remark])
    if markdown:
        return f"**{heading(result)}**\n\n{table(list(HEADER), rows, 2)}\n"
    widths = [max(len(row[column]) for row in [list(HEADER), *rows]) for column in range(3)]
    lines = [
        f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip()
        for row in [list(HEADER), *rows]
    ]
    return "\n".join(
        [
            heading(result),
            *([f"left out: {', '.join(found['peers_missing'])}"] * bool(found["peers_missing"])),
            *lines,
            "",
        ]
    )


def heading(result: Result) -> str:
    """The machine, in a line."""
    found = result["found"]
    words = sentence(found["machine"])
    if found.get("gpu"):
        words += f" (CUDA {found['cuda']}), driver {found['driver']}, {found['memory'] / 2**30:.0f} GiB"
    return f"{'Rehearsal at toy size, no figure counts: ' if result['rehearsal'] else ''}{words}"


def _ending(part: Result) -> Iterator[Row]:
    yield ("time", f"{part['seconds']:.0f} s", part["failure"] or "")


def _tests(found: Result, _: Result) -> Iterator[Row]:
    if cases := found.get("cases"):
        passed = sum(said == "passed" for said in cases.values())
        bad = [f"{name.rpartition('::')[2]}: {said}" for name, said in cases.items() if said != "passed"]
        yield ("pytest -m gpu", f"{passed} of {len(cases)}", "; ".join(bad) or "passed")


def _peak(found: Result, _: Result) -> Iterator[Row]:
    if found:
        side = found["side"]
        yield ("bf16 matrix product", f"{found['matrix_flops'] / 1e12:.4g} TFLOP/s", f"{side} x {side} x {side}")
        yield ("copy in its memory", f"{found['copy_bytes'] / 1e12:.3g} TB/s", "bytes read and written")


def _training(found: Result, result: Result) -> Iterator[Row]:
    contenders = found.get("contenders", {})
    batch = str(found.get("batch_size"))
    exact = contenders.get(REFERENCE, {}).get("batches", {}).get(batch, {}).get("losses")
    for name, one in contenders.items():
        if measured := one.get("batches", {}).get(batch):
            words = [f"{measured['memory'] / 1e9:.1f} GB"]
            share = _share(measured, FORWARD_AND_BACKWARD * one["network"]["macs"], result)
            if share and name != REFERENCE:
                words.insert(0, f"{share:.1%} of peak (MFU)")
            if exact and measured.get("losses") and name != REFERENCE:
                words.append(f"losses within {distance(measured['losses'], exact):.2g} of eager fp32")
            yield (f"{found['model']}, batch {batch}, {name}", _speed(measured), ", ".join(words))
        yield from _failed(name, one)
    yield from _peers_left_out(result)


def distance(losses: list[float], exact: list[float]) -> float:
    """The largest relative difference between losses of the same steps."""
    return max(abs(a / b - 1) for a, b in zip(losses, exact, strict=False))


def _share(measured: Result, macs: float, result: Result) -> float | None:
    """Of the peak that was measured before; None without it."""
    peak = result["parts"].get("peak", {}).get("result", {}).get("matrix_flops")
    return 2 * macs * measured["images_per_second"] / peak if peak else None


def _sampling(found: Result, result: Result) -> Iterator[Row]:
    for name, one in found.get("contenders", {}).items():
        for batch, measured in one.get("batches", {}).items():
            share = _share(measured, found["steps"] * one["network"]["macs"], result)
            remark = f"{found['steps']} steps" + (f", {share:.1%} of peak" if share else "")
            yield (f"{found['model']}, batch {batch}, {name}", _speed(measured), remark)
        yield from _failed(name, one)


def _failed(name: str, one: Result) -> Iterator[Row]:
    if "failure" in one:
        yield (name, "-", f"failed: {one['failure']}")


def _peers_left_out(result: Result) -> Iterator[Row]:
    for name in result["found"]["peers_missing"]:
        yield (name, "-", "left out: not installed")


def _speed(measured: Result) -> str:
    return f"{measured['images_per_second']:.4g} images/s"


def _saving(found: Result, _: Result) -> Iterator[Row]:
    if found:
        share = f"{found['cost'] / found['interval']:.2%} of the time if every {found['interval']:.0f} s"
        yield (f"{found['model']}, a checkpoint of {found['bytes'] / 1e6:.0f} MB", f"{found['cost']:.3g} s", share)
        yield (f"{found['model']}, a step of {found['batch_size']:.0f} images", f"{found['step']:.3g} s", "")


def _recipe(found: Result, _: Result) -> Iterator[Row]:
    if not found:
        return
    if "images_per_second" in found:
        images = f"{found['steps']} steps of {found['batch_size']} {found['images']}"
        losses = f"loss {found['first_loss']:.3f} to {found['loss']:.3f}"
        yield (f"train, {images}", _speed(found), f"{losses}, {found['memory'] / 1e9:.1f} GB")
    if "fid" in found:
        remark = f"unguided; floor {found['floor']:.3f}, accuracy {found['accuracy']:.3f}"
        yield (
            "FID",
            f"{found['fid']:.3f}",
            f"{remark}, guided {found['guided_accuracy']:.3f}; grid in {found['grid']}",
        )
    for stage, seconds in found["seconds"].items():
        yield (f"stage {stage}", f"{seconds:.1f} s", "")


ROWS: dict[str, Callable[[Any, Result], Iterator[Row]]] = {
    "tests": _tests,
    "peak": _peak,
    "training": _training,
    "sampling": _sampling,
    "saving": _saving,
    "digits": _recipe,
    "photos": _recipe,
}
