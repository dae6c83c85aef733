"""Tables of docs/benchmarks.md and its figures, from the JSON of bench_peers.py, bench_families.py, bench_codecs.py
and `nanokv bench disagg`.

    python scripts/bench_report.py            rewrites the generated blocks of docs/benchmarks.md, draws cpu-KIND.svg
    python scripts/bench_report.py --check    exit code 1 when the blocks do not match the JSON

A block stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; all other text is written by hand and kept. Each
kind of machine, docs/benchmarks/cpu-KIND.json, has a section; that of a new kind is added before `<!-- next kind -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import codecs_report
import disagg_report
from peers.figure import NAMES, UNITS, draw, is_less_better, markdown, number
from peers.targets import CEILING_LEAST, KINDS, least_ratios

from nanokv.bench.measure import is_noise

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs/benchmarks"
FAMILIES = ROOT / "docs/benchmarks/families.json"
PAGE = ROOT / "docs/benchmarks.md"
NEXT = "<!-- next kind -->"


# ---- numbers ------------------------------------------------------------------------------------------------------


def cell(runs: dict | None) -> str:
    """Median, and the range of the repeats."""
    if runs is None:
        return ""
    if len(runs["values"]) < 2:
        return number(runs["median"])
    return f"{number(runs['median'])} ({number(runs['min'])} to {number(runs['max'])})"


def ratios(result: dict) -> Iterator[tuple[dict, str, str, float, float | None]]:
    """(row, nanokv's name, peer's name, nanokv / peer, target) for each pair that was measured at the same dtype."""
    for row in result["rows"]:
        for own, mine in row["engines"].items():
            engine, dtype = own.split()
            if engine != "nanokv":
                continue
            for other, theirs in row["engines"].items():
                peer, peer_dtype = other.split()
                if peer != "nanokv" and peer_dtype == dtype:
                    least = least_ratios(result["kind"], row, dtype).get(peer)
                    yield row, own, other, mine["median"] / theirs["median"], least


def is_reached(row: dict, ratio: float, least: float) -> bool:
    """Whether a ratio meets its target, to the two digits that the tables show."""
    return ratio <= least if is_less_better(row) else round(ratio, 2) >= least


# ---- blocks -------------------------------------------------------------------------------------------------------


def machine(result: dict) -> str:
    """The machine, the settings and the versions."""
    hardware, settings = result["hardware"], result["settings"]
    memory = hardware["memory_bytes"] / 2**30
    instructions = f", {hardware['instructions']}" if "instructions" in hardware else ""
    lines = [
        f"{result['date']}, {hardware['cpu']}{instructions}, {settings['threads']} threads, {memory:.0f} GiB, "
        f"{hardware['system']}, Python {hardware['python']}. Model {result['model']}; each engine has "
        f"{settings['kv_bytes'] / 2**30:.0f} GiB for KV, {settings['max_model_len']:,} tokens of length, steps of "
        f"{settings['max_step_tokens']:,} tokens. Median of {settings['repeats']} runs (lowest to highest); "
        f"what took more than {settings['once_s']:.0f} s was run once.",
        "",
    ]
    rows = []
    for name, about in result["engines"].items():
        engine, dtype = name.split()
        versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
        rows.append([NAMES[engine], dtype, versions, f"{about['load_s']:.0f} s"])
    return "\n".join(lines) + "\n" + markdown(["engine", "dtype", "versions", "load"], rows)


def speed(result: dict) -> str:
    """Every row of every engine."""
    engines = [name for name in result["engines"]]
    header = ["", ""] + [f"{NAMES[name.split()[0]]} {name.split()[1]}" for name in engines]
    rows = []
    for row in result["rows"]:
        cells = [cell(row["engines"].get(name)) or ("left out" if name in row["left_out"] else "") for name in engines]
        rows.append([row["name"], UNITS[row["measure"]], *cells])
    notes = [
        f"Left out: {row['name']}, {name}: {reason}."
        for row in result["rows"]
        for name, reason in row["left_out"].items()
    ]
    return markdown(header, rows) + ("\n\n" + "\n".join(f"- {note}" for note in notes) if notes else "")


def targets(result: dict) -> str:
    """The targets, row by row."""
    rows = []
    for row, own, other, ratio, least in ratios(result):
        if least is None:
            continue
        word = "at most" if is_less_better(row) else "at least"
        verdict = "yes" if is_reached(row, ratio, least) else "**no**"
        peer = NAMES[other.split()[0]]
        rows.append([row["name"], own.split()[1], f"{word} {least:g} x {peer}", f"{ratio:.2f} x", verdict])
    for row in result["rows"]:
        ceilings = row.get("ceilings", {}) if (row.get("concurrency"), row.get("shared_tokens")) == (16, 922) else {}
        for own in [own for own in ceilings if own in row["engines"]]:
            share = row["engines"][own]["median"] / ceilings[own]["median"]
            verdict = "yes" if round(share, 2) >= CEILING_LEAST else "**no**"
            goal = f"at least {CEILING_LEAST:.0%} of the ceiling"
            rows.append([row["name"], own.split()[1], goal, f"{share:.0%}", verdict])
            computed = {run["computed_tokens"] for run in row["engines"][own]["runs"]}
            exact = computed == {ceilings[own]["computed_tokens"]}
            counts = ", ".join(f"{count:,}" for count in sorted(computed))
            goal = f"computes {ceilings[own]['computed_tokens']:,} prompt tokens"
            rows.append([row["name"], own.split()[1], goal, counts, "yes" if exact else "**no**"])
    if overhead := result.get("overhead"):
        step, trees, match = overhead["step"], overhead["trees"], overhead["match"]
        small = "yes" if step["overhead_share"] < 0.05 else "**no**"
        found = f"{1e3 * step['overhead_s']:.1f} ms, {step['overhead_share']:.1%}"
        rows.append([f"step beside the model, {step['running']} running", "", "under 5 % of the step", found, small])
        times = [tree["overhead_s"] for tree in trees]
        flat = "yes" if max(times) < 1.25 * min(times) else "**no**"
        found = ", ".join(f"{1e3 * t:.2f} ms" for t in times)
        sizes = " to ".join(f"{tree['tree_pages']:,}" for tree in (trees[0], trees[-1]))
        rows.append([f"the same, tree of {sizes} pages", "", "flat (within 25 %)", found, flat])
        name = f"match of {match['prompt_tokens']:,} tokens in {match['tree_pages']:,} pages"
        quick = "yes" if match["match_s"] < 1e-3 else "**no**"
        found = f"{1e3 * match['match_s']:.2f} ms (worst {1e3 * match['match_worst_s']:.2f})"
        rows.append([name, "", "under 1 ms", found, quick])
    return markdown(["measure", "dtype", "to reach", "found", "reached"], rows)


def losses(result: dict) -> str:
    """The rows in which a peer is faster, at any dtype."""
    rows = []
    for row in result["rows"]:
        sign = -1 if is_less_better(row) else 1
        for own, mine in row["engines"].items():
            faster = {
                other: theirs["median"]
                for other, theirs in row["engines"].items()
                if not other.startswith("nanokv") and sign * theirs["median"] > sign * mine["median"]
            }
            if own.startswith("nanokv") and faster:
                ordered = sorted(faster.items(), key=lambda item: -sign * item[1])
                peers = ", ".join(
                    f"{NAMES[other.split()[0]]} {other.split()[1]} {number(value)}" for other, value in ordered
                )
                rows.append([row["name"], UNITS[row["measure"]], own, number(mine["median"]), peers])
    if not rows:
        return "None: nanokv is ahead of every peer, at every dtype, in every row."
    return markdown(["measure", "", "nanokv", "", "faster"], rows)


def prefix(result: dict) -> str:
    """The prefix sweep: hit ratio, requests/s, latency, TTFT, beside the ceiling of nanokv's own speeds."""
    rows = []
    for row in result["rows"]:
        if row["measure"] != "requests_per_s":
            continue
        for name, found in row["engines"].items():
            middle = sorted(found["runs"], key=lambda run: run["wall_s"])[len(found["runs"]) // 2]
            ceiling = row.get("ceilings", {}).get(name)
            share = _of_ceiling(found["median"] / ceiling["median"]) if ceiling else ""
            engine, dtype = name.split()
            rows.append(
                [
                    str(row["concurrency"]),
                    f"{row['shared_tokens']:,}",
                    f"{NAMES[engine]} {dtype}",
                    f"{middle['hit_ratio']:.3f}",
                    f"{middle['computed_tokens']:,}",
                    cell(found),
                    number(ceiling["median"]) if ceiling else "",
                    share,
                    f"{number(middle['mean_latency_s'])} s",
                    f"{number(middle['ttft_p50_s'])} s",
                ]
            )
    header = ["clients", "shared", "engine", "hit ratio", "computed", "requests/s", "ceiling", "reached", "latency"]
    return markdown([*header, "TTFT p50"], rows)


def families(_result: dict) -> str:
    """Two implementations side by side, from families.json, which names its own machine."""
    result = json.loads(FAMILIES.read_text(encoding="utf-8"))
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    lines = [f"{result['hardware']['cpu']}, {result['threads']} threads, {versions}. Medians (lowest to highest).", ""]
    rows = []
    for row in result["rows"]:
        ours, theirs = (_milliseconds(row[f"{side}_s"]) for side in ("ours", "theirs"))
        low, high = min(row["ratios"]), max(row["ratios"])
        verdict = "yes" if round(row["ratio"], 2) >= row["least"] else "**no**"
        ratio = f"{row['ratio']:.2f} x ({low:.2f} to {high:.2f})"
        rows.append(
            [row["name"], row["shape"], f"{row['ours']}: {ours}", f"{row['theirs']}: {theirs}", ratio,
             f"at least {row['least']:g} x", verdict]
        )  # fmt: skip
    header = ["measure", "shape", "", "against", "faster", "to reach", "reached"]
    return "\n".join(lines) + "\n" + markdown(header, rows)


def _of_ceiling(share: float) -> str:
    return f"{share:.0%}" + (" (noise)" if is_noise(share) else "")


def _milliseconds(times: list[float]) -> str:
    return f"{1e3 * statistics.median(times):.3g} ms"


Make = Callable[[dict], str]
OF_A_KIND: dict[str, Make] = {
    "machine": machine, "targets": targets, "losses": losses, "speed": speed, "prefix": prefix,
}  # fmt: skip
OTHERS: dict[str, Make] = {"families": families, **codecs_report.BLOCKS, **disagg_report.BLOCKS}
SECTION = """## {title}

<!-- begin machine_{kind} --><!-- end machine_{kind} -->

![nanokv and its peers](benchmarks/cpu-{kind}.svg)

### {title}: numbers to reach

<!-- begin targets_{kind} --><!-- end targets_{kind} -->

### {title}: where nanokv loses

<!-- begin losses_{kind} --><!-- end losses_{kind} -->

### {title}: all rows

<!-- begin speed_{kind} --><!-- end speed_{kind} -->

### {title}: prefix caching under load

<!-- begin prefix_{kind} --><!-- end prefix_{kind} -->

"""


def fill(page: str, results: dict[str, dict]) -> str:
    """The page with every block replaced.

    results   of bench_peers.py, by kind of machine; one without a section gets one
    Raises    ValueError where the page has other blocks than these results and OTHERS have
    """
    for kind in results:
        if f"<!-- begin machine_{kind} -->" not in page:
            page = page.replace(NEXT, SECTION.format(title=KINDS[kind], kind=kind) + NEXT)
    blocks = {name: (make, {}) for name, make in OTHERS.items()}
    for kind, result in results.items():
        blocks |= {f"{name}_{kind}": (make, {**result, "kind": kind}) for name, make in OF_A_KIND.items()}
    found = re.findall(r"<!-- begin (\w+) -->", page)
    if sorted(found) != sorted(blocks):
        raise ValueError(f"the page has the blocks {', '.join(found)}; expected {', '.join(blocks)}, each once")
    for name, (make, result) in blocks.items():
        block = f"<!-- begin {name} -->\n\n{make(result)}\n\n<!-- end {name} -->"
        page, count = re.subn(rf"<!-- begin {name} -->.*?<!-- end {name} -->", lambda _: block, page, flags=re.DOTALL)  # noqa: B023
        if count != 1:
            raise ValueError(f"block {name} has no end")
    return page


def read(folder: Path) -> dict[str, dict]:
    """The results of bench_peers.py in a folder, by kind of machine."""
    paths = {kind: folder / f"cpu-{kind}.json" for kind in KINDS}
    return {kind: json.loads(path.read_text(encoding="utf-8")) for kind, path in paths.items() if path.exists()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="with cpu-KIND.json (%(default)s)")
    parser.add_argument("--page", type=Path, default=PAGE, help="(%(default)s)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the page is out of date")
    options = parser.parse_args()
    results = read(options.folder)
    old = options.page.read_text(encoding="utf-8")
    new = fill(old, results)
    if options.check:
        sys.exit(0 if new == old else f"{options.page} is out of date: run scripts/bench_report.py")
    options.page.write_text(new, encoding="utf-8")
    for kind, result in results.items():
        draw(result, options.folder / f"cpu-{kind}.svg")
    codecs_report.draw(codecs_report.JSON)


if __name__ == "__main__":
    main()
