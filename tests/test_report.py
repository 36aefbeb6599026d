"""The report as data: statistics, tables, series and findings; what is written, and what is refused."""

from __future__ import annotations

import csv
import math
import random
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
import report_cases as cases
from hypothesis import given
from hypothesis import strategies as st

from bench import findings, store
from bench.cells import Cell
from bench.measurement import Frontier, Memory, SessionId
from bench.report import assembly, build, delimited, markdown, quantities, summaries, wording, write
from bench.report.values import Chart, Report, Table
from bench.store import Results
from bench.timing import Estimate
from shortllama.errors import InputError
from shortllama.evaluation.results import Evaluation, Quality, write_evaluation

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def quick() -> Report:
    results, quality = cases.quick()
    return build([results], quality)


def chart(report: Report, name: str) -> Chart:
    return next(one for one in report.charts if one.name == name)


def table(report: Report, name: str) -> Table:
    return next(one for one in report.tables if one.name == name)


def column(one: Table, key: str) -> list:
    index = [c.key for c in one.columns].index(key)
    return [row[index] for row in one.rows]


def of_kind(report: Report, kind: str) -> list:
    return [finding for finding in report.findings if finding.kind == kind]


def save(results: Results, folder: Path, quality: dict[str, Quality] | None = None) -> Path:
    folder.mkdir(parents=True)
    with store.Writer(folder / store.FILE_NAME) as writer:
        for line in (*results.environments.values(), *results.measurements, *results.frontiers):
            writer.write(line)
    if quality:
        write_evaluation(folder / "quality.json", Evaluation(quality))
    return folder


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.2345, "s", "1.23 s"), (0.0123, "s", "12.3 ms"), (4.5e-5, "s", "45.0 µs"), (0.9999, "s", "1.00 s"),
        (0.00099999, "s", "1.00 ms"), (123.4, "s", "123 s"), (48 << 20, "bytes", "48.0 MiB"), (1023, "bytes", "1023 B"),
        (6_738_000_000, "parameters", "6.74 B"), (999, "parameters", "999"), (1.309, "ratio", "1.31x"),
        (9138.2, "tokens/s", "9,138"), (0.25, "share", "25 %"), (None, "s", "-"), ("oom", "s", "oom"),
        ((0.0174, 0.0179), "s", "17.4-17.9 ms"), ((0.9, 1.1), "s", "900 ms-1.10 s"),
        ((1.2, 1.3), "ratio", "1.20-1.30x"),
    ],
)  # fmt: skip
def test_numbers_for_people(value, unit, text):
    plain = {quantities.SPACE: " ", quantities.DASH: "-", quantities.TIMES: "x"}
    assert "".join(plain.get(character, character) for character in quantities.text(value, unit)) == text


@given(st.floats(1e-9, 1e9))
def test_seconds_keep_three_digits(value):
    text = quantities.seconds(value).replace(",", "")
    number, unit = text.split("\u00a0")
    assert math.isclose(float(number) * {"s": 1, "ms": 1e-3, "µs": 1e-6}[unit], value, rel_tol=0.0051, abs_tol=6e-12)


@given(st.text(max_size=80), st.integers(3, 40))
def test_shortened_names_keep_their_ends(name, length):
    short = quantities.shorten(name, length)
    assert len(short) <= max(length, 0)
    assert short == name or (short.count("…") >= 1 and name.startswith(short.split("…")[0]))


@given(st.text(max_size=60))
def test_inert_names_hold_nothing_that_acts(name):
    import unicodedata

    assert all(unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") for c in quantities.inert(name))
    assert not set("\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u2069\u200f") & set(quantities.inert(name))


# -- statistics --------------------------------------------------------------------------------------------------------


def test_quotient_has_the_width_of_both_parts():
    gain = summaries.quotient(Estimate(2.0, 1.9, 2.2, 20), Estimate(1.0, 0.95, 1.02, 20))
    down = math.hypot(math.log(2 / 1.9), math.log(1.02 / 1))
    up = math.hypot(math.log(2.2 / 2), math.log(1 / 0.95))
    assert gain.value == 2
    assert gain.low == pytest.approx(2 * math.exp(-down))
    assert gain.high == pytest.approx(2 * math.exp(up))
    assert summaries.quotient(Estimate(2.0, None, None, 3), Estimate(1.0, 0.9, 1.1, 20)) == Estimate(2.0, None, None, 3)


def test_the_interval_of_a_speedup_covers_the_truth_about_19_times_in_20():
    noise, misses = random.Random(7), 0
    env = cases.machine()
    for _ in range(300):
        rows = []
        for subject, scale in (("m", 1.25), ("m/ppl:0.25", 1.0)):
            cell = Cell(subject, "eager", "float32", "sdpa", 12, 32, "none", 1)
            calls = tuple(scale * noise.lognormvariate(0, 0.03) for _ in range(20))
            rows.append(cases.row(cell, env, "ok", calls))
        gain = summaries.grid(rows, [], {}, {}).rows[1].speedup
        assert gain is not None
        misses += not (gain.low or 0) <= 1.25 <= (gain.high or 0)
    assert 2 <= misses <= 30  # 5 % of 300 is 15; the order-statistic interval is a little conservative


def test_speedups_compare_run_by_run_and_sessions_are_not_pooled():
    env, rows = cases.machine(), []
    for session, slow in (("a", 1.0), ("b", 3.0)):
        for subject, scale in (("m", 2.0), ("m/ppl:0.25", 1.0)):
            cell = Cell(subject, "eager", "float32", "sdpa", 12, 32, "none", 1)
            calls = tuple(slow * scale * (1 + i / 1000) for i in range(10))
            rows.append(cases.row(cell, env, "ok", calls, session=SessionId(session)))
    grid = summaries.grid(rows, [], {}, {})
    gains = [row.speedup.value for row in grid.rows if row.speedup]
    assert gains == pytest.approx([2.0, 2.0])
    (groups,) = grid.groups.values()
    merged = groups["m"].cells[0].call_s
    assert merged is not None
    assert (merged.low, merged.value, merged.high) == pytest.approx((2.009, 4.018, 6.027))


@pytest.mark.parametrize(
    ("subjects", "parameters", "expected"),
    [
        (("llama-7b", "llama-7b/depth-26"), {}, {"llama-7b/depth-26": "llama-7b"}),
        (("org/model", "org/model/ppl:0.25"), {}, {"org/model/ppl:0.25": "org/model"}),
        (("llama-7b/depth-26",), {}, {}),
        (("reference", "./pruned"), {"reference": 9, "./pruned": 7}, {"./pruned": "reference"}),
        (("reference", "./grown"), {"reference": 9, "./grown": 11}, {}),
        (("reference", "./unknown"), {}, {}),
        (("llama-7b", "llama-13b"), {"llama-7b": 7, "llama-13b": 13}, {}),
    ],
)
def test_baselines(subjects, parameters, expected):
    assert summaries.baselines(subjects, parameters) == expected


def test_labels_are_short_where_that_is_unambiguous():
    short = summaries.labels(("m", "m/ppl:0.25"), {"m/ppl:0.25": "m"})
    assert short == {"m": "m", "m/ppl:0.25": "ppl:0.25"}
    two = ("a", "b", "a/ppl:0.25", "b/ppl:0.25")
    assert summaries.labels(two, {"a/ppl:0.25": "a", "b/ppl:0.25": "b"}) == {name: name for name in two}


def test_subjects_have_one_order_whatever_the_order_of_the_run():
    results, _ = cases.llama()
    rows = list(results.measurements)
    first = build([results])
    random.Random(3).shuffle(rows)
    again = build([msgspec.structs.replace(results, measurements=tuple(rows))])
    order = list(dict.fromkeys(column(table(first, "cells"), "label")))
    assert order == ["llama-7b", "depth-21", "depth-26", "flap-20", "llm-pruner-20", "wanda-sp-20"]
    assert list(dict.fromkeys(column(table(again, "cells"), "label"))) == order
    colours = {one.subject: one.colour for one in chart(first, "latency-batch").panels[0].series}
    assert {one.subject: one.colour for one in chart(again, "latency-batch").panels[0].series} == colours


# -- tables and series -------------------------------------------------------------------------------------------------


def test_every_cell_is_in_the_table_with_its_outcome(quick):
    cells = table(quick, "cells")
    results, _ = cases.quick()
    assert sorted(column(cells, "cell_id")) == sorted(row.cell_id for row in results.measurements)
    assert column(cells, "outcome").count("oom") == 6
    for outcome, latency, interval in zip(
        column(cells, "outcome"), column(cells, "latency_s"), column(cells, "latency_interval_s"), strict=True
    ):
        assert (outcome == "ok") == (latency is not None)
        assert latency is None or interval[0] <= latency <= interval[1]
    assert {"dtype", "attention", "prompt", "output", "budget", "device"} <= cells.hidden
    assert "float32 · sdpa attention · budget 48MiB · prompt 12 · output 32" in cells.constant


def test_every_figure_and_table_names_device_versions_and_date(quick):
    for one in (*quick.charts, *quick.tables):
        assert one.source == "AMD EPYC 9254 · 1 thread · torch 2.13.0 · transformers 5.23.0 · python 3.11 · 2026-11-22"


def test_the_figures_hold_what_was_measured(quick):
    names = ["latency-throughput", "perplexity-latency", "latency-batch", "throughput-batch", "oom-frontier"]
    assert [one.name for one in quick.charts] == [*names, "speedup-parameters"]
    results, _ = cases.quick()
    from bench import timing

    latencies = {
        (m.cell.subject, m.cell.runtime, m.cell.batch): timing.latency(m) for m in results.measurements
        if m.outcome == "ok"
    }  # fmt: skip
    drawn = {
        (series.subject, series.runtime, point.batch): point.y
        for panel in chart(quick, "latency-batch").panels for series in panel.series for point in series.points
    }  # fmt: skip
    assert drawn == {key: one.value for key, one in latencies.items() if one}
    for panel in chart(quick, "latency-throughput").panels:
        for series in panel.series:
            for point in series.points:
                assert point.x * point.y == pytest.approx(point.batch * 32)
    spans = {s.subject: (s.fits, s.fails) for s in chart(quick, "oom-frontier").panels[0].spans}
    assert spans["reference"] == (8, 64)
    assert spans["reference/ppl:0.25"] == (64, None)


def test_the_oom_figure_uses_frontier_rows():
    results = cases.only_oom()
    cell = results.measurements[0].cell.group
    env = results.measurements[0].environment
    frontier = Frontier(cell, env, 5, False, fits=(4, 5), fails=(6, 8))
    report = build([msgspec.structs.replace(results, frontiers=(frontier,))])
    span = next(s for s in chart(report, "oom-frontier").panels[0].spans if s.subject == "reference")
    assert (span.fits, span.fails) == (5, 6)
    alone = build([Results(Path("x"), results.environments, (), (frontier,))])
    assert [one.name for one in alone.charts] == ["oom-frontier"]


def test_perplexity_is_drawn_at_the_batch_most_subjects_share(quick):
    (panel,) = chart(quick, "perplexity-latency").panels
    assert panel.title == "on self"
    assert {(s.subject, s.runtime) for s in panel.series} == {(s, r) for s in cases.QUICK for r in ("eager", "static")}
    assert {point.batch for series in panel.series for point in series.points} == {1}
    assert {s.points[0].y for s in panel.series if s.subject == "reference"} == {18.3}


def test_without_quality_there_is_no_perplexity_anywhere():
    results, _ = cases.quick()
    report = build([results])
    assert "perplexity-latency" not in [one.name for one in report.charts]
    assert [one.name for one in report.tables] == ["subjects", "cells"]
    assert not of_kind(report, "quality")


def test_panels_are_limited_and_say_so():
    subjects = {f"m/depth-{i}": (i, 1e6 * i, 1000 * i) for i in range(1, 31)}
    results = cases.sweep(subjects, {"eager": 1.0}, (1, 2), outputs=tuple(range(10, 25)), limit=1e12)
    one = chart(build([results]), "latency-batch")
    assert len(one.panels) == 12
    assert all(len(panel.series) == 12 for panel in one.panels)
    assert (
        one.left_out == "Not drawn: 3 of 15 settings and subjects beyond the first 12 of 30; the tables have them all."
    )


def test_simulated_rows_are_labelled_everywhere():
    report = build(list(cases.two_devices()))
    assert any("simulated" in note for note in report.notes)
    for one in report.charts:
        assert one.simulated
        assert "simulated" in one.source
        flags = {s.simulated: panel.title for panel in one.panels for s in (*panel.series, *panel.spans)}
        assert "simulated" in flags[True]
        assert "simulated" not in flags[False]
    for one in report.tables:
        assert "simulated" not in one.hidden
        assert set(column(one, "simulated")) == {"simulated", "measured"}
    (_, other) = cases.two_devices()
    assert build([other]).title.endswith("(simulated)")


def test_unstable_cells_are_listed_but_never_drawn_or_compared():
    report = build([cases.troubled()])
    assert column(table(report, "cells"), "outcome").count("unstable") == 1
    drawn = [p.batch for c in report.charts for panel in c.panels for s in panel.series for p in s.points]
    assert 8 not in drawn
    (finding,) = of_kind(report, "trouble")
    assert finding.headline == "1 failed, 1 timed-out, 1 unstable and 1 skipped of 7 cells; they are in no figure."
    assert "why it was failed" in finding.cause


# -- findings ----------------------------------------------------------------------------------------------------------


def test_findings_have_number_cause_and_command(quick):
    assert [f.kind for f in quick.findings] == ["fastest", "fastest", "quality", "memory", "runtime"]
    for finding in quick.findings:
        assert any(character.isdigit() for character in finding.headline)
        assert finding.cause
        assert finding.command.startswith("shortllama ")
        assert finding.figure in {one.name for one in quick.charts}
    fastest = quick.findings[0]
    assert fastest.headline.startswith("In eager at batch 1, ")
    assert "over reference" in fastest.headline
    assert "The best width-pruned subject, mag-sp:0.25, reaches" in fastest.cause


def test_the_quality_finding_ranks_by_nats_per_log_speedup(quick):
    (finding,) = of_kind(quick, "quality")
    assert finding.headline.startswith("taylor+:0.25 gives most speed for its loss of quality: perplexity 21.4 on self")
    assert finding.command == "shortllama prune reference --method taylor+ --ratio 0.25 --out taylor+-0.25"


def test_quality_is_ranked_even_where_nothing_is_faster():
    subjects = {"m": (4, 1e6, 10), "m/random:0.25": (4, 1e6, 9), "m/ppl:0.25": (4, 1e6, 9)}
    values = {"m": 10.0, "m/random:0.25": 30.0, "m/ppl:0.25": 12.0}
    quality = {name: Quality({"text": cases.perplexity(value)}) for name, value in values.items()}
    (finding,) = of_kind(build([cases.sweep(subjects, {"eager": 1.0}, (1,))], quality), "quality")
    assert finding.headline == "ppl:0.25 loses least quality: perplexity 12.0 on text against 10.0 of m."
    assert finding.cause.startswith("It adds 0.18 nats a token")


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (Estimate(1.3, 1.28, 1.32, 20), "follows the bytes"),
        (Estimate(1.3, None, None, 3), "follows the bytes"),
        (Estimate(1.1, 1.08, 1.12, 20), "fixed costs per kernel"),
        (Estimate(1.6, 1.55, 1.65, 20), "launching fewer kernels"),
        (Estimate(1.3, 0.8, 1.9, 20), "too wide to see it"),
        (Estimate(1.0, 0.99, 1.01, 20), "allows 1.30"),
    ],
)
def test_the_cause_compares_the_gain_with_the_bytes(gain, words):
    results, _ = cases.quick()
    dense, best = (summaries.summarise(row) for row in (results.measurements[0], results.measurements[3]))
    assert best.cell.subject == "reference/ppl:0.25"
    assert words in findings._why(best, dense, gain)


def test_the_memory_finding_names_a_budget_that_would_hold_the_cell(quick):
    (finding,) = of_kind(quick, "memory")
    assert finding.headline.startswith("In eager and static within 48MiB, memory ends after batch 8 for reference")
    words = finding.command.split()
    budget = words[words.index("--budget") + 1]
    results, _ = cases.quick()
    need = next(m.memory.analytic for m in results.measurements if m.outcome == "oom")
    assert need
    from bench.cells import budget_bytes

    assert need < (budget_bytes(budget) or 0) < 1.5 * need


def test_equal_subjects_are_not_called_faster():
    subjects = {"m": (4, 1e6, 10), "m/random:0.25": (4, 1e6, 9)}
    report = build([cases.sweep(subjects, {"eager": 1.0}, (1,))])
    (finding,) = of_kind(report, "fastest")
    assert "nothing is measurably faster than m" in finding.headline
    assert report.verdict.startswith("At batch 1, nothing is measurably faster than m in eager.")


def test_a_finding_is_made_at_the_smallest_batch_that_tells():
    env, rows = cases.machine(), []
    for batch, spread in ((1, 0.4), (8, 0.001)):
        for subject, scale in (("m", 2.0), ("m/ppl:0.25", 1.0), ("m/mag-sp:0.25", 1.5)):
            cell = Cell(subject, "eager", "float32", "sdpa", 12, 32, "none", batch)
            calls = tuple(scale * (1 + spread * (i % 5 - 2)) for i in range(10))
            rows.append(cases.row(cell, env, "ok", calls))
    report = build([Results(Path("r"), {env.id: env}, tuple(rows), ())])
    (finding,) = of_kind(report, "fastest")
    assert finding.headline.startswith("In eager at batch 8, ppl:0.25 is fastest: 2.00")
    assert "ppl:0.25 is fastest at batch 8: 2.00" in report.verdict


def test_runtimes_that_cannot_be_told_apart():
    subjects = {"m": (4, 1e6, 10)}
    report = build([cases.sweep(subjects, {"eager": 1.0, "static": 1.0}, (1,))])
    (finding,) = of_kind(report, "runtime")
    assert "cannot be told apart on m at batch 1" in finding.headline


def test_only_oom_says_what_would_fit():
    report = build([cases.only_oom()])
    assert report.verdict.startswith("Nothing fits: memory ended before any cell could be measured.")
    assert [f.kind for f in report.findings] == ["nothing"]
    assert "--budget" in report.findings[0].command
    assert [one.name for one in report.charts] == ["oom-frontier"]


def test_one_cell_is_a_sentence_and_no_figure():
    report = build([cases.one_cell()])
    assert report.charts == ()
    assert report.verdict.replace("\u00a0", " ").startswith(
        "reference in eager at batch 1: 210 ms for 32 tokens, 152 tokens/s."
    )
    assert column(table(report, "cells"), "remark") == ["3 repeats only"]


def test_noise_is_a_finding():
    results = cases.troubled()
    (finding,) = of_kind(build([results]), "noise")
    assert "wider than ±5" in finding.headline


@pytest.mark.parametrize("need", [1, 1 << 20, 63 << 20, 10**9, (78 << 30) + 1, 10**13])
def test_a_suggested_budget_can_be_read_and_is_enough(need):
    from bench.cells import budget_bytes

    command = wording.more_memory(wording.Commands("s", "r"), need)
    assert (budget_bytes(command.split()[4]) or 0) >= 1.05 * need or need < 1 << 18


@given(st.sampled_from(cases.HOSTILE) | st.text(min_size=1, max_size=30))
def test_commands_quote_names(name):
    import shlex

    words = shlex.split(wording.keep_command(name))
    assert words[0] == "shortllama"
    assert any(name == word or name.startswith(word) for word in words[2:])


# -- golden files ------------------------------------------------------------------------------------------------------


def test_golden_markdown(quick):
    """The whole report as text. After a wanted change: write markdown.render(report) there, and read the difference."""
    assert markdown.render(quick) == (GOLDEN / "report.md").read_text(encoding="utf-8")


def test_golden_series(quick):
    expected = (GOLDEN / "latency-throughput.csv").read_text(encoding="utf-8")
    assert delimited.chart(chart(quick, "latency-throughput")) == expected


# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_report_folder_is_complete(tmp_path):
    results, quality = cases.quick()
    run = save(results, tmp_path / "runs" / "mine", quality)
    shutil.copy(Path(assembly.__file__).parents[1] / "suites" / "quick.toml", run / "suite.toml")
    out = tmp_path / "reports" / "mine"
    write([run], out)
    page = (out / "index.html").read_text(encoding="utf-8")
    text = (out / "report.md").read_text(encoding="utf-8")
    names = {"latency-throughput", "perplexity-latency", "latency-batch", "throughput-batch", "oom-frontier"}
    for name in names:
        assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / "figures" / f"{name}.svg").read_text(encoding="utf-8").startswith("<?xml")
        assert (out / "figures" / f"{name}.csv").stat().st_size > 100
        assert f"figures/{name}.png" in text
        assert page.count(f'<figure id="{name}">') == 1
    for name in ("subjects", "cells", "perplexities"):
        with (out / "tables" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows
        assert f"tables/{name}.csv" in text
    assert "shortllama sweep quick --out again" in page  # known by its content, not by where the run lies
    assert str(tmp_path) not in page + text
    assert (out / "suite.toml").read_bytes() == (run / "suite.toml").read_bytes()
    first = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    write([run], out)  # ours, so it may be replaced; and equal input gives equal bytes
    assert {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()} == first


def test_the_csv_of_cells_reads_back(tmp_path):
    results, quality = cases.quick()
    rows = list(csv.DictReader(delimited.table(table(build([results], quality), "cells")).splitlines()))
    assert len(rows) == 30
    for one in rows:
        assert set(one) >= {
            "subject",
            "batch",
            "outcome",
            "latency_s",
            "latency_interval_s_low",
            "peak_bytes",
            "source",
        }
        assert (one["latency_s"] == "") == (one["outcome"] != "ok")


class Elements(HTMLParser):
    """The names of all elements and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes |= {name for name, _ in attrs}


def test_hostile_names_stay_text(tmp_path):
    results, quality = cases.hostile()
    out = tmp_path / "report"
    write([save(results, tmp_path / "run", quality)], out)
    elements = Elements()
    elements.feed((out / "index.html").read_text(encoding="utf-8"))
    assert elements.names.count("script") == 1  # ours
    assert "b" not in elements.names
    assert not {name for name in elements.attributes if name.startswith("on")}
    for svg in (out / "figures").glob("*.svg"):
        import xml.etree.ElementTree as tree

        root = tree.parse(svg).getroot()  # well-formed
        texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
        assert not list(root.iter("{http://www.w3.org/2000/svg}script"))
        if "frontier" in svg.name:
            assert any("$\\frac{1}{2}$" in text for text in texts)
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "<script>" not in text.replace("\\<script\\>", "")
    with (out / "tables" / "cells.csv").open(encoding="utf-8", newline="") as file:
        assert {row["subject"] for row in csv.DictReader(file)} == {quantities.inert(name) for name in cases.HOSTILE}


@pytest.mark.parametrize("start", ["=1+1", "+cmd", "-x", "@sum"])
def test_csv_holds_no_formulas(start):
    env = cases.machine()
    cell = Cell(start, "eager", "float32", "sdpa", 12, 32, "none", 1)
    rows = (cases.row(cell, env, "ok", (0.1,) * 10), cases.row(msgspec.structs.replace(cell, batch=2), env, "oom"))
    report = build([Results(Path("r"), {env.id: env}, rows, ())])
    for text in (delimited.table(table(report, "cells")), delimited.chart(report.charts[0])):
        for line in csv.reader(text.splitlines()):
            assert not any(field.startswith(("=", "+", "-", "@")) for field in line)


def test_markdown_tables_have_equal_columns():
    results, quality = cases.hostile()
    text = markdown.render(build([results], quality))
    import re

    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1


@pytest.mark.parametrize(
    "prepare",
    [
        lambda run: run.mkdir(),
        lambda run: (run.mkdir(), (run / store.FILE_NAME).write_bytes(b"")),
        lambda run: (run.mkdir(), (run / store.FILE_NAME).write_bytes(b'{"kind": "measure')),
        lambda run: None,
        lambda run: (save(cases.one_cell(), run), (run / "quality.json").write_text("{")),
    ],
    ids=["no file", "no rows", "cut off", "no run", "broken quality"],
)
def test_bad_runs_are_refused_and_nothing_is_written(tmp_path, prepare):
    run, out = tmp_path / "run", tmp_path / "out" / "report"
    prepare(run)
    with pytest.raises(InputError) as caught:
        write([run], out)
    assert "\n" not in str(caught.value)
    assert not out.parent.exists()


def test_a_foreign_folder_is_refused_before_any_work(tmp_path):
    run = save(cases.one_cell(), tmp_path / "run")
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not ours"):
        write([run], out)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="no run given"):
        write([], out)


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    run = save(cases.one_cell(), tmp_path / "run")

    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="No space left"):
        write([run], tmp_path / "report")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_runs_on_two_machines_share_a_report(tmp_path):
    runs = [save(one, tmp_path / f"run{i}") for i, one in enumerate(cases.two_devices())]
    write(runs, tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "AMD EPYC 9254" in page
    assert "NVIDIA L4" in page


# -- size --------------------------------------------------------------------------------------------------------------


def test_building_grows_linearly():
    """Ten times the rows may take a little over ten times the calls, not a hundred: quadratic steps would show."""

    def calls(subjects: int) -> int:
        shapes = {f"m/depth-{i}": (i + 1, 1e6, 1000 + i) for i in range(subjects)}
        results = cases.sweep({"m": (9, 1e6, 9000), **shapes}, {"eager": 1.0}, (1, 2, 4, 8, 16), limit=1e12)
        count = 0

        def seen(_: object, event: str, __: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(seen)
        try:
            build([results])
        finally:
            sys.setprofile(None)
        return count

    calls(10)
    assert calls(400) < 13 * calls(40)


def test_a_large_table_is_cut_in_the_page_and_whole_in_the_csv():
    from bench.report import html

    shapes = {f"m/depth-{i}": (i + 1, 1e6, 1000 + i) for i in range(html.LARGEST_TABLE // 4)}
    one = table(build([cases.sweep(shapes, {"eager": 1.0}, (1, 2, 4, 8, 16), limit=1e12)]), "cells")
    report = Report("t", "s", "v", (), (), (), (one,), ())
    page = html.render(report, {})
    assert page.count("<tr>") == html.LARGEST_TABLE + 1
    assert f"The first {html.LARGEST_TABLE} of {len(one.rows)} rows" in page
    assert delimited.table(one).count("\n") == len(one.rows) + 1
    assert "the first 1,000 of" in markdown.render(report).replace("\\", "")


def test_the_tables_know_their_columns(quick):
    for one in quick.tables:
        keys = [c.key for c in one.columns]
        assert len(set(keys)) == len(keys)
        assert one.hidden <= set(keys) | {"regime", "session"}
        assert all(len(row) == len(keys) for row in one.rows)
        assert all(c.unit == "text" or c.unit in quantities.FORMATS for c in one.columns)


def test_missing_memory_and_parameters_are_shown_as_missing():
    results = cases.one_cell()
    bare = msgspec.structs.replace(results.measurements[0], memory=Memory(), parameters=None)
    more = msgspec.structs.replace(bare, cell=msgspec.structs.replace(bare.cell, batch=2), memory=Memory(allocated=5))
    report = build([msgspec.structs.replace(results, measurements=(bare, more))])
    assert column(table(report, "cells"), "peak_bytes") == [None, 5]


def test_rows_with_no_more_than_the_schema_asks_give_a_report(tmp_path):
    """What an older version wrote: no memory, telemetry, physics, parameters or digest, and no facts of the machine."""
    env, keys = cases.machine(), {"cell", "cell_id", "environment", "outcome", "simulated", "session"}
    lines = [{"kind": "environment", "id": env.id, "fingerprint": {"device": "X"}}]
    for subject, scale in (("m", 2.0), ("m/depth-2", 1.0)):
        for batch in (1, 8):
            cell = Cell(subject, "eager", "float32", "sdpa", 12, 32, "none", batch)
            plain = msgspec.to_builtins(cases.row(cell, env))
            kept = {"kind": "measurement", **{key: plain[key] for key in keys}}
            lines.append({**kept, "samples": {"call_s": [scale * (1 + i / 1000) for i in range(10)]}})
    file = tmp_path / "measurements.jsonl"
    file.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    report = write([file], tmp_path / "report")
    assert (tmp_path / "report" / "index.html").is_file()
    assert {one.name for one in report.charts} == {"latency-throughput", "latency-batch", "throughput-batch"}
    assert column(table(report, "cells"), "peak_bytes") == [None] * 4
    assert column(table(report, "cells"), "speedup")[2:] == pytest.approx([2.0, 2.0])
