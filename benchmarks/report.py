"""From measured seconds to the tables of README.md."""

from collections.abc import Iterable
from statistics import median
from typing import Any

from benchmarks.machine import DENSE_BF16_PEAK, sentence

START, END = "<!-- results: start, written by --write -->", "<!-- results: end -->"
OURS = "darkroom"
PEERS = ("diffusers", "denoising-diffusion-pytorch")
COLUMNS = (OURS, "plain UNet", *PEERS)  # of the table of a CPU

# Plain JSON. A case: model, precision, device, batch_size, steps and, of every run, "seconds" by contender, "loop" and
# "network", the seconds of our sampler and of the network in it. A result: machine, models (with each network's size),
# cases.
Case = dict[str, Any]
Result = dict[str, Any]


def per_step_and_image(case: Case, contender: str) -> float:
    """Seconds, the median over the rounds."""
    return float(median(case["seconds"][contender])) / (case["steps"] * case["batch_size"])


def ratios(case: Case, contender: str) -> list[float]:
    """How many times as long as ours `contender` took, in each round: what slowed a whole round down cancels."""
    return [theirs / ours for theirs, ours in zip(case["seconds"][contender], case["seconds"][OURS], strict=True)]


def best_peer(case: Case) -> str:
    """The peer with the smallest median ratio."""
    return min((peer for peer in PEERS if peer in case["seconds"]), key=lambda peer: median(ratios(case, peer)))


def overhead(case: Case) -> float:
    """The share of our sampler's loop that was spent outside the network, the median over the rounds."""
    shares = [1 - network / loop for loop, network in zip(case["loop"], case["network"], strict=True)]
    return float(median(shares))


def share_of_peak(case: Case, contender: str, macs: int, gpu: str) -> float | None:
    """Achieved FLOP/s over the device's dense bf16 peak; None for another precision or a device not in the table."""
    peak = DENSE_BF16_PEAK.get(gpu)
    if peak is None or case["precision"] != "bf16":
        return None
    return 2 * macs / per_step_and_image(case, contender) / peak


def render(results: Iterable[Result]) -> str:
    """One section for each machine, in Markdown."""
    return "\n\n".join(_section(result) for result in results)


def insert(page: str, tables: str, start: str = START, end: str = END) -> str:
    """`page` with `tables` between two markers. Raises ValueError when it does not have each of them once."""
    if page.count(start) != 1 or page.count(end) != 1 or page.index(end) < page.index(start):
        raise ValueError(f"expected {start} and, after it, {end}, once each")
    return page[: page.index(start) + len(start)] + f"\n\n{tables}\n\n" + page[page.index(end) :]


def _section(result: Result) -> str:
    on_cpu = [case for case in result["cases"] if case["device"] == "cpu"]
    on_gpu = [case for case in result["cases"] if case["device"] == "cuda"]
    parts = [f"**{sentence(result['machine'])}**", networks_table(result["models"])]
    if on_cpu:
        parts.append(_cpu_table(on_cpu, result["models"]))
    if on_gpu:
        parts.append(_gpu_table(on_gpu, result))
    return "\n\n".join(parts)


def table(header: list[str], rows: list[list[str]], text_columns: int) -> str:
    """Markdown; all but the first `text_columns` are numbers, on the right."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def networks_table(models: dict[str, dict[str, Any]]) -> str:
    """What the contenders are, and how large."""
    rows = [
        [model, name, network["library"], f"{network['parameters'] / 1e6:.2f} M", f"{network['macs'] / 1e9:.3g} G"]
        for model, networks in models.items()
        for name, network in networks.items()
        if "compiled" not in name
    ]
    header = ["model", "network", "version", "parameters", "multiply-adds per image and step"]
    return table(header, rows, 3)


def _cpu_table(cases: list[Case], models: dict[str, dict[str, Any]]) -> str:
    """Milliseconds per step and image, then the ratios, that of the best peer in bold."""
    rows = []
    for case in cases:
        times = [_milliseconds(case, name) for name in COLUMNS]
        compared = []
        for peer in PEERS:
            each, bold = ratios(case, peer), "**" if peer == best_peer(case) else ""
            compared.append(f"{bold}{median(each):.2f}{bold} ({min(each):.2f}–{max(each):.2f})")
        other = PEERS[-1]  # the one of another architecture
        networks = models[case["model"]]
        per_mac = median(ratios(case, other)) * networks[OURS]["macs"] / networks[other]["macs"]
        measured = [*times, *compared, f"{per_mac:.2f}", f"{overhead(case):.1%}"]
        rows.append([case["model"], case["precision"], str(case["batch_size"]), *measured])
    header = ["model", "precision", "batch", *COLUMNS, *(f"{peer} / {OURS}" for peer in PEERS)]
    header += ["the same per multiply-add", "loop outside the network"]
    return "CPU, milliseconds per step and image, median over the rounds:\n\n" + table(header, rows, 2)


def _gpu_table(cases: list[Case], result: Result) -> str:
    rows = []
    for case in cases:
        networks, gpu = result["models"][case["model"]], result["machine"]["gpu"]
        for name in case["seconds"]:
            share = share_of_peak(case, name, networks[name]["macs"], gpu)
            images_per_second = 1 / (per_step_and_image(case, name) * case["steps"])
            figures = [f"{images_per_second:.1f}", f"{share:.1%}" if share else "", f"{median(ratios(case, name)):.2f}"]
            rows.append([case["model"], case["precision"], name, str(case["batch_size"]), *figures])
    header = ["model", "precision", "contender", "batch", f"images/s at {cases[0]['steps']} steps"]
    return "GPU, median over the rounds:\n\n" + table([*header, "share of peak", f"time / {OURS}"], rows, 3)


def _milliseconds(case: Case, contender: str) -> str:
    milliseconds = 1e3 * per_step_and_image(case, contender)
    return f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:.0f}"
