"""From measured seconds to the tables about training in README.md."""

from collections.abc import Iterable
from statistics import median

from benchmarks.machine import DENSE_BF16_PEAK, sentence
from benchmarks.report import OURS, PEERS, Case, Result, networks_table, table

START, END = "<!-- training: start, written by --write -->", "<!-- training: end -->"
COLUMNS = (OURS, *PEERS)  # of the tables of a CPU
FORWARD_AND_BACKWARD = 3  # the backward pass has two multiply-adds for each of the forward pass

# A case is as in `report`, except that "seconds" and "memory" go by contender and precision, "diffusers bf16" say.


def key(contender: str, precision: str) -> str:
    return f"{contender} {precision}"


def images_per_second(case: Case, contender: str) -> float:
    """Of a contender in a precision, the median over the rounds."""
    return float(case["steps"] * case["batch_size"] / median(case["seconds"][contender]))


def ratios(case: Case, contender: str, peer: str) -> list[float]:
    """How many times as fast as `peer` the contender is, in each round; both with their precisions."""
    pairs = zip(case["seconds"][contender], case["seconds"][peer], strict=True)
    return [theirs / own for own, theirs in pairs]


def precisions(case: Case) -> list[str]:
    """Those in which everyone was measured."""
    return [precision for precision in ("fp32", "bf16") if key(OURS, precision) in case["seconds"]]


def best_peer(case: Case, contender: str, precision: str) -> str:
    """The peer, with this precision, that `contender` is ahead of by least, or behind by most."""
    peers = [key(peer, precision) for peer in PEERS]
    return min(peers, key=lambda peer: median(ratios(case, contender, peer)))


def as_users_run_it(case: Case) -> str:
    """Darkroom in the precision of its recipes, bf16, or in fp32 where bf16 is slower."""
    return max((key(OURS, precision) for precision in precisions(case)), key=lambda name: images_per_second(case, name))


def share_of_peak(case: Case, contender: str, macs: int, gpu: str) -> float | None:
    """Model FLOP/s over the device's measured dense bf16 peak (MFU); None if that is not known or for fp32."""
    peak = DENSE_BF16_PEAK.get(gpu)
    if peak is None or not contender.endswith("bf16"):
        return None
    return 2 * FORWARD_AND_BACKWARD * macs * images_per_second(case, contender) / peak


def render(results: Iterable[Result]) -> str:
    """One section for each machine, in Markdown."""
    return "\n\n".join(_section(result) for result in results)


def _section(result: Result) -> str:
    on_cpu = [case for case in result["cases"] if case["device"] == "cpu"]
    on_gpu = [case for case in result["cases"] if case["device"] == "cuda"]
    parts = [f"**{sentence(result['machine'])}**", networks_table(result["models"])]
    if on_cpu:
        parts.append(_cpu_table(on_cpu, result["models"]))
        if all("fp32" in precisions(case) for case in on_cpu):
            parts.append(_users_table(on_cpu))
    if on_gpu:
        parts.append(_gpu_table(on_gpu, result))
    return "\n\n".join(parts)


def _cpu_table(cases: list[Case], models: Result) -> str:
    rows = []
    for case in cases:
        for precision in precisions(case):
            own, names = key(OURS, precision), [key(name, precision) for name in COLUMNS]
            speeds = [_three_digits(images_per_second(case, name)) for name in names]
            best = best_peer(case, own, precision)
            compared = [_range(ratios(case, own, peer), bold=peer == best) for peer in names[1:]]
            macs = models[case["model"]]
            per_mac = median(ratios(case, own, names[-1])) * macs[OURS]["macs"] / macs[PEERS[-1]]["macs"]
            memory = " / ".join(f"{max(case['memory'][name]) / 1e9:.1f}" for name in names)
            measured = [*speeds, *compared, f"{per_mac:.2f}", memory]
            rows.append([case["model"], precision, str(case["batch_size"]), *measured])
    header = ["model", "precision", "batch", *COLUMNS, *(f"{OURS} / {peer}" for peer in PEERS)]
    header += ["the same per multiply-add", "peak memory, GB"]
    return "CPU, images per second, median over the rounds:\n\n" + table(header, rows, 2)


def _users_table(cases: list[Case]) -> str:
    rows = []
    for case in cases:
        own = as_users_run_it(case)
        peer = best_peer(case, own, "fp32")
        rows.append([case["model"], own, peer, _range(ratios(case, own, peer), bold=True)])
    header = ["model", OURS, "best peer", "times as fast"]
    return "CPU, as users run them: the peers' scripts train in fp32 unless told otherwise.\n\n" + table(
        header, rows, 3
    )


def _gpu_table(cases: list[Case], result: Result) -> str:
    rows = []
    for case in cases:
        networks = result["models"][case["model"]]
        for name in case["seconds"]:
            contender, precision = name.rsplit(" ", 1)
            share = share_of_peak(case, name, networks[contender]["macs"], result["machine"]["gpu"])
            peer = key("diffusers compiled", precision)
            figures = [f"{images_per_second(case, name):.0f}", f"{share:.1%}" if share else ""]
            figures += [f"{max(case['memory'][name]) / 1e9:.1f}", _range(ratios(case, name, peer))]
            rows.append([case["model"], precision, contender, str(case["batch_size"]), *figures])
    header = ["model", "precision", "contender", "batch", "images/s", "share of peak", "peak memory, GB"]
    return "GPU, median over the rounds:\n\n" + table([*header, "times as fast as diffusers compiled"], rows, 3)


def _range(values: list[float], bold: bool = False) -> str:
    mark = "**" if bold else ""
    return f"{mark}{median(values):.2f}{mark} ({min(values):.2f}–{max(values):.2f})"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
