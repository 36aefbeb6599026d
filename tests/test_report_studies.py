"""A study in a report: what its figures, tables and findings say, what they leave out, and what is refused."""

from __future__ import annotations

import csv
import itertools
import math
import shutil
from pathlib import Path

import msgspec
import pytest
import report_cases
import study_cases as cases
from hypothesis import given
from hypothesis import strategies as st
from test_report import Elements, chart, column, of_kind, save, table
from test_report_figures import boxes

from bench import cli, paper
from bench.report import delimited, markdown, merging, publish, quantities, write
from bench.report.figures import canvas, draw
from bench.report.figures.placement import Box
from bench.report.studies import beside, claims, held, importance, outcomes, pairing, parts, series
from bench.report.values import Report
from shortllama.errors import InputError
from shortllama.evaluation.results import Quality
from shortllama.plans import Achieved, Base, BlockKeep, Plan, Provenance, Target

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.save(tmp_path_factory.mktemp("studies") / "mine")


@pytest.fixture(scope="module")
def study(folder: Path) -> held.Held:
    return held.read(folder, "mine")


@pytest.fixture(scope="module")
def report(study: held.Held) -> Report:
    return parts.report([study])


def rows_of(report: Report, name: str) -> list[dict[str, object]]:
    one = table(report, name)
    keys = [c.key for c in one.columns]
    return [dict(zip(keys, row, strict=True)) for row in one.rows]


def only(rows: list[dict[str, object]], **wanted: object) -> dict[str, object]:
    (found,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return found


def edited(study: held.Held, **changes: object) -> held.Held:
    return msgspec.structs.replace(study, **changes)


# -- golden files ------------------------------------------------------------------------------------------------------


def test_golden_markdown(report):
    """The whole report as text. After a wanted change: write markdown.render(report) there, and read the difference."""
    assert markdown.render(report) == (GOLDEN / "study-report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["perplexity-retraining", "block-importance", "one-shot-iterative"])
def test_golden_series(report, name):
    assert delimited.chart(chart(report, name)) == (GOLDEN / f"{name}.csv").read_text(encoding="utf-8")


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_seeds_are_one_line_with_their_range(report):
    found = only(rows_of(report, "study-perplexities"), method="ppl", ratio=0.2, calibration="self 10x128")
    loss = cases.LOSS["ppl"]
    assert found["seeds"] == 3
    assert found["pruned"] == pytest.approx(sum(10 * math.exp(loss + 0.01 * seed) for seed in range(3)) / 3)
    assert found["pruned_range"] == pytest.approx((10 * math.exp(loss), 10 * math.exp(loss + 0.02)))
    # Retraining won back half of the nats: of the perplexity that is exp(x/2) + 1 in exp(x/2) + 1 + ... of the gap.
    half = [math.exp((loss + 0.01 * seed) / 2) for seed in range(3)]
    assert found["closed"] == pytest.approx(sum(h * (h - 1) / (h * h - 1) for h in half) / 3)


def test_a_bar_is_the_rise_in_nats_and_its_parts_add_up(report):
    panel = chart(report, "perplexity-retraining").panels[0]
    bars = {bar.label: bar for bar in panel.bars}
    lost, back = bars["mag+"].parts
    assert (lost.label, back.label) == ("lost", "won back by retraining")
    assert (lost.value, back.value) == pytest.approx((0.15, 0.15))
    ends = [sum(part.value for part in bar.parts if part.label == "lost") for bar in panel.bars]
    assert ends == sorted(ends)  # best first


def test_retraining_that_makes_it_worse_is_its_own_part(study):
    worse = tuple(
        msgspec.structs.replace(row, after=cases.quality(0.5)) if row.after else row
        for row in study.rows if row.label == "mag+"
    )  # fmt: skip
    bar = series.lost_and_won(edited(study, rows=worse)).panels[0].bars[0]
    assert [(part.label, round(part.value, 6)) for part in bar.parts] == [("lost", 0.3), ("lost by retraining", 0.2)]


def test_other_tokens_than_the_dense_model_has_are_not_compared(study):
    other = tuple(msgspec.structs.replace(row, before=cases.quality(0.1, digest="f" * 16)) for row in study.rows)
    strange = edited(study, rows=other)
    assert series.lost_and_won(strange) is None
    assert series.cuts(strange) is None
    assert not [one for one in parts.report([strange]).findings if one.kind == "won-back"]


def test_what_a_method_removed_is_ringed(report, study):
    panel = next(p for p in chart(report, "block-importance").panels if p.title.startswith("mag+"))
    (line,) = panel.series
    assert [line.points[place].x for place in line.changes] == [5, 6]  # of 12 blocks at 0.2
    assert {line.points[place].y for place in line.changes} == {0.0}
    assert max(line.points, key=lambda point: point.y).x == 1
    assert chart(report, "block-importance").ring == "removed"
    scores = rows_of(report, "block-scores")
    assert scores[4]["mag+: removed at"] == f"20{quantities.SPACE}%, 35{quantities.SPACE}%"
    assert scores[6]["mag+: removed at"] == f"35{quantities.SPACE}%"
    assert scores[0]["mag+"] == 513.0


def test_perplexities_of_blocks_count_from_the_dense_one(study):
    """The dense model has perplexity 10: a block without which it is 12 is twice as far from it as one with 11."""
    (one,) = [i for i in importance.importances(study) if i.name == "ppl: self 10x128, seed 0"]
    assert one.zero == 10.0
    below = {key: msgspec.structs.replace(s, details={"dense": 99.0}) for key, s in study.scores.items()}
    assert {i.zero for i in importance.importances(edited(study, scores=below))} == {0.0}  # some would be below zero


def test_modules_have_a_line_each(report):
    panel = next(p for p in chart(report, "block-importance").panels if p.title.startswith("ppl (modules)"))
    assert [one.label for one in panel.series][:2] == ["attention, self 10x128", "FFN, self 10x128"]
    attention, ffn = panel.series[:2]
    assert len(attention.changes) == 2  # the plan emptied the attention of two blocks, and no FFN
    assert ffn.changes == ()


def test_scales_are_logarithmic_above_zero():
    assert importance.scaled([1.0, 10.0, 100.0]) == pytest.approx([0.0, 0.5, 1.0])
    assert importance.scaled([-1.0, 0.0, 1.0]) == pytest.approx([0.0, 0.5, 1.0])


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40))
def test_scaled_scores_keep_their_order(values):
    found = importance.scaled(values)
    assert all(0 <= value <= 1 for value in found)
    for (a, x), (b, y) in itertools.combinations(zip(values, found, strict=True), 2):
        assert (a - b) * (x - y) >= 0


def test_one_cut_and_several_begin_at_the_dense_model(report):
    one = chart(report, "one-shot-iterative")
    assert [panel.title for panel in one.panels] == [
        "ppl, scored on self 10x128, on self", "ppl, scored on self 100x128, on self",
    ]  # fmt: skip
    curves = {line.label: line for line in one.panels[0].series}
    assert list(curves) == ["one cut, pruned", "one cut, retrained", "in 2 steps, pruned", "in 2 steps, retrained"]
    assert [line.points[0].y for line in curves.values()] == [pytest.approx(10.0)] * 4
    assert curves["in 2 steps, pruned"].points[1].y == pytest.approx(10 * math.exp(0.15))
    assert len(curves["one cut, retrained"].points) == 2  # only the smaller ratio was retrained
    assert curves["one cut, pruned"].points[1].y_interval is not None  # three seeds


# -- beside the paper --------------------------------------------------------------------------------------------------


def test_rows_stand_beside_the_papers_nearest_ratio(report):
    rows = rows_of(report, "paper-criteria")
    ppl = only(rows, criterion="ppl", paper_ratio=0.2)
    assert (ppl["ratio"], ppl["recipe"], ppl["paper_wikitext2_ppl"], ppl["paper_ptb_ppl"]) == (0.2, "lora", 17.7, 30.7)
    assert ppl["paper_average"] == pytest.approx(0.619)
    missing = only(rows, criterion="taylor", paper_ratio=0.35)
    assert (missing["ratio"], missing["perplexity_self"], missing["paper_wikitext2_ppl"]) == (None, None, 7666.8)
    zero = rows_of(report, "paper-zero-shot")
    assert only(zero, method="wanda-sp", paper_ratio=0.27)["ratio"] is None  # 0.2 and 0.35 are nearer to others
    assert only(zero, method="dense")["hellaswag"] == pytest.approx(0.6)
    assert only(zero, method="dense")["paper_hellaswag"] == pytest.approx(0.762)
    sizes = rows_of(report, "paper-calibration")
    assert only(sizes, method="ppl", samples=100, ratio=0.2)["paper_wikitext2_ppl"] == 17.4
    assert only(sizes, method="llm-pruner", samples=1000)["paper_wikitext2_ppl"] is None
    assert "llm-pruner ran out of memory" in table(report, "paper-calibration").caption
    units = rows_of(report, "paper-granularity")
    assert only(units, unit="module", paper_parameters=5.3e9)["ratio"] == 0.2


def test_every_table_beside_the_paper_says_that_the_models_differ(report):
    beside_paper = [one for one in report.tables if one.name.startswith("paper-")]
    assert [one.name.removeprefix("paper-") for one in beside_paper] == [
        "zero-shot", "criteria", "granularity", "calibration",
    ]  # fmt: skip
    for one in beside_paper:
        assert one.caption.startswith("The models differ")
        assert "LLaMA-7B" in one.caption
    assert any("none of the paper's" in note for note in report.notes)


def test_a_model_of_the_paper_stands_beside_its_own_rows(study):
    own = edited(study, rows=tuple(msgspec.structs.replace(r, model="lmsys/vicuna-7b-v1.3") for r in study.rows))
    found = parts.report([own])
    row = only(rows_of(found, "paper-zero-shot"), method="ppl", paper_ratio=0.2)
    assert row["paper_wikitext2_ppl"] == 18.8
    assert "The models differ" not in table(found, "paper-zero-shot").caption
    assert not any("none of the paper's" in note for note in found.notes)


def test_order_agrees_or_not(report):
    """Ours at 0.2: ppl, mag+, taylor+. The paper's perplexities: 17.7, 19.4, 20.2. At 0.35 it has 36.9 and 33.2."""
    caption = table(report, "paper-criteria").caption
    assert f"3 of 3 pairs are in the paper's order at 20{quantities.SPACE}%, by perplexity on self." in caption
    assert f"2 of 3 pairs are in the paper's order at 35{quantities.SPACE}%, by perplexity on self." in caption
    (finding,) = of_kind(report, "paper-order")
    assert "5 of 6 in Table 5" in finding.headline


NUMBERS = st.floats(-100, 100)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=8))
def test_agreement_counts_each_pair_once(values):
    same, pairs = pairing.agreement(values)
    flipped, again = pairing.agreement([(a, -b) for a, b in values])
    assert (same + flipped, pairs) == (pairs, again)
    assert pairing.agreement([(a, a) for a, _ in values])[0] == pairing.agreement([(a, a) for a, _ in values])[1]


@given(st.lists(st.floats(0, 1), max_size=6), st.lists(st.floats(0, 1), max_size=6))
def test_pairs_hold_everything_once(theirs, ours):
    marks = [object() for _ in ours]
    ratios = dict(zip(map(id, marks), ours, strict=True))
    found = pairing.pair(theirs, marks, lambda row, one: abs(row - ratios[id(one)]))  # pyright: ignore
    assert [row for row, _ in found][: len(theirs)] == theirs
    assert sorted(id(one) for _, one in found if one is not None) == sorted(map(id, marks))
    for row, one in found:
        if row is not None and one is not None:
            assert abs(row - ratios[id(one)]) <= pairing.NEAR + 1e-6


def test_what_the_paper_has_and_a_study_does_not_is_said(study):
    few = edited(study, rows=tuple(row for row in study.rows if row.label == "mag+"))
    made = parts.report([few])
    assert [one.name for one in made.tables if one.name.startswith("paper-")] == ["paper-zero-shot"]
    (note,) = [note for note in made.notes if "does not" in note]
    assert "criteria (Table 5), blocks against modules (Table 6) and sizes of the calibration set (Table 7)" in note


def test_the_average_needs_all_seven(study):
    seven = {name: cases.accuracy(name, 0.5) for name in beside._SEVEN}
    known = lambda tasks: Quality({}, msgspec.structs.replace(cases.quality().zero_shot, tasks=tasks))  # noqa: E731
    assert outcomes.seven(known(seven)) == pytest.approx(0.5)
    assert outcomes.seven(known(dict(list(seven.items())[:6]))) is None
    assert outcomes.seven(Quality()) is None


def test_every_paper_row_is_in_some_table(report):
    assert sum(row["paper_average"] is not None for row in rows_of(report, "paper-criteria")) == len(
        paper.read().criteria
    )
    assert sum(row["paper_wikitext2_ppl"] is not None for row in rows_of(report, "paper-zero-shot")) == 16


# -- findings ----------------------------------------------------------------------------------------------------------


def test_the_best_is_found_among_those_that_were_retrained_alike(report):
    first, second = of_kind(report, "best")
    assert first.headline.startswith(f"At 20{quantities.SPACE}%, ppl keeps most after lora: perplexity 11.1 (11.1")
    assert "of wanda-sp next" in first.headline
    assert "ppl keeps most without retraining" in second.headline
    assert not any("between" in one.headline for one in (first, second))  # had more retraining than the others
    assert first.command.startswith("shortllama prune reference --method ppl --ratio 0.2 --calibration self")


def test_what_removed_another_share_is_not_ranked(study):
    """LLM-Pruner's ratio is one of the unprotected blocks: less of the model goes, and more quality stays."""
    less = tuple(
        msgspec.structs.replace(
            row, label="thrifty", achieved=Achieved(0.1, 12), before=cases.quality(0.05), after=None
        )
        for row in study.rows
        if (row.label, row.recipe, row.ratio) == ("wanda-sp", "none", 0.35)
    )
    finding = of_kind(parts.report([edited(study, rows=study.rows + less)]), "best")[1]
    assert "ppl keeps most without retraining" in finding.headline
    assert "Not ranked, since they removed another share: thrifty (10" in finding.cause


def test_claims_are_judged_between_models_that_lost_as_much(report, study):
    (finding,) = of_kind(report, "claims")
    assert finding.headline == "Of 8 claims of the papers, 7 hold and 1 cannot be told on reference."
    assert "Cannot be told: Generating falls more than choosing." in finding.cause
    rows = {row["claim"]: row for row in rows_of(report, "study-claims")}
    width = rows["After retraining, removing blocks is no worse than reducing widths"]
    assert (width["verdict"], width["held_in"], width["cases"]) == ("holds", 1, 1)
    assert "ppl 11.0" in str(width["numbers"])
    worse = tuple(
        msgspec.structs.replace(row, before=cases.quality(0.05), after=row.after and cases.quality(0.02))
        if row.label == "wanda-sp" else row
        for row in study.rows
    )  # fmt: skip
    rows = {row["claim"]: row for row in rows_of(parts.report([edited(study, rows=worse)]), "study-claims")}
    assert rows["After retraining, removing blocks is no worse than reducing widths"]["verdict"] == "does not hold"
    assert rows["LoRA wins back at least half of what removing blocks cost"]["verdict"] == "holds"
    far = tuple(
        msgspec.structs.replace(row, achieved=Achieved(row.ratio - 0.06, 12)) if row.label == "wanda-sp" else row
        for row in study.rows
    )
    rows = {row["claim"]: row for row in rows_of(parts.report([edited(study, rows=far)]), "study-claims")}
    assert "After retraining, removing blocks is no worse than reducing widths" not in rows


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ([], None), ([True, True], "holds"), ([False], "does not hold"), ([True, False], "holds in part"),
        ([None, True], "holds"), ([None, None, True], "cannot be told"), ([None], "cannot be told"),
    ],
)  # fmt: skip
def test_a_verdict_needs_half_of_its_cases(held, expected):
    assert claims.verdict([claims.Case("", one) for one in held]) == expected


def test_a_claim_of_accuracies_counts_what_errors_leave(study):
    """Twice the loss, in tasks of a million items: errors are as good as none."""
    sure = msgspec.structs.replace
    rows = tuple(sure(row, before=certain(row.before), after=row.after and certain(row.after)) for row in study.rows)
    made = parts.report([edited(study, rows=rows)])
    (finding,) = of_kind(made, "choosing")
    assert "in 22 of 22 ways to prune, less in 0" in finding.headline
    found = {row["claim"]: row["verdict"] for row in rows_of(made, "study-claims")}
    assert found["Generating falls more than choosing"] == "holds"


def certain(quality: Quality) -> Quality:
    tasks = {
        name: msgspec.structs.replace(one, standard_error=(one.standard_error or 0.0) / 1000)
        for name, one in quality.zero_shot.tasks.items()
    }
    return msgspec.structs.replace(quality, zero_shot=msgspec.structs.replace(quality.zero_shot, tasks=tasks))


def test_a_lead_within_what_seeds_differ_is_called_so(study):
    near = tuple(
        msgspec.structs.replace(row, before=cases.quality(0.215), after=row.after and cases.quality(0.108))
        if row.label == "wanda-sp" else row
        for row in study.rows
    )  # fmt: skip
    finding = of_kind(parts.report([edited(study, rows=near)]), "best")[0]
    assert "ppl is ahead by less than seeds differ after lora" in finding.headline
    assert "is best" not in finding.brief


def test_the_gap_closed_has_a_number_a_cause_and_a_longer_run(report):
    (finding,) = of_kind(report, "won-back")
    shares = [row["closed"] for row in rows_of(report, "study-perplexities") if row["closed"] is not None]
    assert quantities.share(max(shares)) in finding.headline
    assert finding.cause.replace("\u00a0", " ") == "Retraining read 8.19 k tokens in 60.0 s, mean over the runs."
    assert "--steps 1000 --batch 16 --length 128 --lr 0.002" in finding.command


def test_several_cuts_are_held_against_the_papers_finding(report, study):
    finding = of_kind(report, "cuts")[0]
    assert "perplexity 11.6 against 12.3 in one cut" in finding.headline
    assert "so it is here" in finding.cause
    worse = tuple(
        msgspec.structs.replace(row, before=cases.quality(0.9)) if "between" in row.costs else row for row in study.rows
    )
    assert "it is not so here" in of_kind(parts.report([edited(study, rows=worse)]), "cuts")[0].cause


def test_generating_against_choosing_only_where_the_dense_model_does_not_guess(report, study):
    (finding,) = of_kind(report, "choosing")
    assert "in 4 of 22 ways to prune, less in 0, and as much within two standard errors in 18" in finding.headline
    dense = cases.quality()
    tasks = {**dense.zero_shot.tasks, "hellaswag": cases.accuracy("hellaswag", 0.26)}  # four endings: a guess is 0.25
    guessing = msgspec.structs.replace(dense, zero_shot=msgspec.structs.replace(dense.zero_shot, tasks=tasks))
    (finding,) = of_kind(parts.report([edited(study, dense=guessing)]), "choosing")
    assert "cannot be told: the dense model guesses (hellaswag 26.0" in finding.headline


def test_unfinished_runs_are_told(study):
    made = parts.report([edited(study, rows=study.rows[:-2])])
    (finding,) = of_kind(made, "unfinished")
    assert finding.headline == "43 of 45 runs of the study are finished."
    assert finding.command == "shortllama study mine/study.toml --out mine --resume"
    assert finding.headline in made.verdict


# -- what is missing, and what is hostile ------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["dense.json", "study.toml", "pruned", "quality.json"])
def test_a_folder_that_lost_something_still_gives_a_report(folder, tmp_path, gone):
    part = shutil.copytree(folder, tmp_path / "part")
    (shutil.rmtree if gone == "pruned" else Path.unlink)(part / gone)
    made = publish.gather([part])[0]
    kinds = {one.kind for one in made.findings}
    names = {one.name for one in made.charts}
    assert {one.name for one in made.tables} >= {"study-perplexities", "study-tasks", "paper-zero-shot", "study-costs"}
    assert ("won-back" in kinds) == (gone != "dense.json")
    assert ("block-importance" in names) == (gone != "pruned")
    assert ("perplexity-retraining" in names) == (gone != "dense.json")
    commands = [one.command for one in made.findings if one.kind in ("best", "cuts")]
    assert all("study.toml" not in command for command in commands) or gone != "study.toml"
    if gone == "dense.json":
        assert any("no evaluation of the dense model" in note for note in made.notes)


def test_rows_without_tasks_and_a_single_row_give_a_report(tmp_path):
    made = cases.row_of(next(iter(cases.study.grid(cases.given()))))
    bare = msgspec.structs.replace(made, before=cases.quality(0.2, tasks=False), costs={}, calibration=None, seed=None)
    found = publish.gather([cases.save(tmp_path / "one", found=(bare,), dense=cases.quality(tasks=False))])[0]
    assert "study-tasks" not in {one.name for one in found.tables}
    assert "None of the paper's seven tasks" in table(found, "paper-zero-shot").caption
    assert [bar.label for bar in chart(found, "perplexity-retraining").panels[0].bars] == ["ppl"]


def test_an_empty_study_is_one_line_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    empty = cases.save(tmp_path / "empty", found=())
    out = tmp_path / "out" / "report"
    monkeypatch.setattr("sys.argv", ["shortllama", "report", str(empty), "--out", str(out)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "a study without a finished run; go on with shortllama study" in " ".join(told.err.split())
    assert "Traceback" not in told.err
    assert not out.parent.exists()


@pytest.mark.parametrize("broken", ["study.jsonl", "scores.json", "plan.json", "dense.json"])
def test_a_broken_file_is_named_and_nothing_is_written(folder, tmp_path, broken):
    part = shutil.copytree(folder, tmp_path / "part")
    (next(part.rglob(broken))).write_text('{"id": 1}\n')
    with pytest.raises(InputError, match=broken) as caught:
        write([part], tmp_path / "report")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report").exists()


def test_a_row_cannot_point_out_of_its_folder(tmp_path):
    folder = cases.save(tmp_path / "study" / "mine", found=cases.hostile())
    (folder / "pruned").mkdir()
    for number in range(6):  # what `../../N` would be from pruned/
        outside = folder / "pruned" / ".." / ".." / str(number)
        outside.mkdir()
        (outside / "scores.json").write_text("{")
    assert held.read(folder, "mine").scores == {}


def test_hostile_names_stay_text(tmp_path):
    folder = cases.save(tmp_path / "mine", found=cases.hostile(), dense=cases.strange())
    written = cases.save(tmp_path / "written", found=cases.with_text())
    write([folder, written], tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    elements = Elements()
    elements.feed(page)
    assert elements.names.count("script") == 1  # ours
    assert "b" not in elements.names
    assert not {name for name in elements.attributes if name.startswith("on")}
    assert "‮" not in page
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "<script>" not in text
    with (tmp_path / "report" / "tables" / "generations-2.csv").open(encoding="utf-8", newline="") as file:
        assert quantities.inert(cases.HOSTILE) in {row["text"] for row in csv.DictReader(file)}


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_report_folder_is_complete(folder, tmp_path):
    out = tmp_path / "report"
    made = write([folder], out)
    assert {path.stem for path in (out / "figures").glob("*.csv")} == {one.name for one in made.charts}
    assert {path.stem for path in (out / "tables").glob("*.csv")} == {one.name for one in made.tables}
    assert (out / "study.toml").read_bytes() == (folder / "study.toml").read_bytes()
    page = (out / "index.html").read_text(encoding="utf-8")
    for one in (*made.charts, *made.tables):
        assert page.count(f'id="{one.name}"') == 1
    assert str(tmp_path) not in page
    assert str(folder.parent) not in page
    assert "<dt>Fingerprint" not in page  # no environment was measured
    assert "shortllama study mine/study.toml --out again" in page


def test_tables_know_their_columns(report):
    for one in report.tables:
        keys = [c.key for c in one.columns]
        assert len(set(keys)) == len(keys)
        assert one.hidden <= set(keys)
        assert all(len(row) == len(keys) for row in one.rows)
        assert all(c.unit == "text" or c.unit in quantities.FORMATS for c in one.columns)


def test_a_study_beside_a_run_adds_to_its_report(folder, tmp_path):
    results, quality = report_cases.quick()
    run = save(results, tmp_path / "run", quality)
    alone = publish.gather([run])[0]
    both, measured = publish.gather([run, folder])
    assert measured == [run]
    assert both.title == alone.title
    assert [one.name for one in both.charts[: len(alone.charts)]] == [one.name for one in alone.charts]
    assert chart(both, "block-importance")
    assert set(alone.findings) < set(both.findings)
    assert both.sources[-1].run == "mine"


def test_two_studies_have_names_of_their_own(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    both = publish.gather([folder, other])[0]
    names = [one.name for one in (*both.charts, *both.tables)]
    assert len(set(names)) == len(names)
    assert {one.figure for one in both.findings if one.figure} <= {one.name for one in both.charts}
    assert "block-importance-2" in names
    assert both.title.startswith("What pruning costs reference: 60 pruned models")


@pytest.mark.parametrize("size", [draw.WIDE, draw.NARROW], ids=lambda size: size.name)
def test_no_two_labels_meet_and_none_is_cut_off(report, tmp_path, size):
    hostile = cases.save(tmp_path / "h", found=cases.hostile(), dense=cases.strange())
    for one in (*report.charts, *publish.gather([hostile])[0].charts):
        with canvas.drawing(one.name):
            sheet = draw.draw(one, size)
            placed = boxes(sheet)
        page = Box(0, 0, sheet.width, sheet.height)
        for text, box in placed:
            assert box.inside(page), (one.name, text)
        for (a, p), (b, q) in itertools.combinations(placed, 2):
            assert not p.overlaps(q), (one.name, a, b)


def test_results_held_in_few_bits_are_told_apart_from_retraining(study):
    few = tuple(
        msgspec.structs.replace(row, id=f"{row.id}-8", subject=f"{row.subject}+int8", recipe=f"{row.recipe}+int8",
                                after=cases.quality(0.9))
        for row in study.rows
    )  # fmt: skip
    plain, both = parts.report([study]), parts.report([edited(study, rows=(*few, *study.rows))])
    assert [one for one in both.findings if one.kind not in ("unfinished", "choosing")] == [
        one for one in plain.findings if one.kind != "choosing"
    ]
    assert both.charts == plain.charts
    rows = [row for row in rows_of(both, "study-perplexities") if str(row["recipe"]).endswith("+int8")]
    assert {row["recipe"] for row in rows} == {"none+int8", "lora+int8"}
    assert {row["closed"] for row in rows} == {None}


def test_an_evaluation_goes_beside_a_study_and_not_alone(folder, tmp_path):
    from shortllama.evaluation.results import Evaluation, write_evaluation

    told = msgspec.structs.replace(cases.quality(0.1), generations=cases.wrote("AI can", cases.HOSTILE).generations)
    file = tmp_path / "told.json"
    write_evaluation(file, Evaluation({"mine/model": told}))
    made = publish.gather([folder, file])[0]
    assert [row["text"] for row in rows_of(made, "generations")] == [cases.HOSTILE, f"{cases.HOSTILE}?"]
    values = {row["on"]: row["perplexity"] or row["accuracy"] for row in rows_of(made, "evaluated")}
    assert values == {
        "self": pytest.approx(10 * math.exp(0.1)),
        "hellaswag": pytest.approx(0.57),
        "lambada": pytest.approx(0.36),
    }
    written = publish.gather([cases.save(tmp_path / "w", found=cases.with_text()), file])[0]
    assert [one.name for one in written.tables if one.name.startswith("generations")] == [
        "generations",
        "generations-2",
    ]
    with pytest.raises(InputError, match="an evaluation alone; give a run or a study"):
        publish.gather([file])


# -- qualities of several folders --------------------------------------------------------------------------------------


def test_qualities_on_the_same_tokens_are_merged():
    run = merging.Given("run", {"m": cases.quality(), "m/ppl:0.2": cases.quality(0.2)})
    study = merging.Given("study", {"m": cases.quality(), "m/mag+:0.2": cases.quality(0.3)})
    found, notes = merging.merged([run, study])
    assert set(found) == {"m", "m/ppl:0.2", "m/mag+:0.2"}
    assert notes == ()


def test_other_tokens_are_not_merged_whichever_subject_has_them():
    """The subject is in one folder only; that its dense model met other tokens there shows that it did too."""
    run = merging.Given("run", {"m": cases.quality()})
    study = merging.Given(
        "study", {"m/mag+:0.2": cases.quality(0.3, digest="f" * 16), "other": cases.quality(digest="a")}
    )
    found, notes = merging.merged([run, study])
    assert found["m/mag+:0.2"].perplexity == {}
    assert found["m/mag+:0.2"].zero_shot is not None
    assert found["other"].perplexity  # another model's tokens are its own
    assert notes == ("Perplexity on self of study is on other tokens than before; it is not merged.",)
    assert found["m"] == run.quality["m"]


def test_other_weights_are_not_merged():
    run = merging.Given("run", {"m/ppl:0.2": cases.quality(0.2)}, {"m/ppl:0.2": "a"})
    study = merging.Given("study", {"m/ppl:0.2": cases.quality(0.1, text="new")}, {"m/ppl:0.2": "b"})
    found, notes = merging.merged([run, study])
    assert set(found["m/ppl:0.2"].perplexity) == {"self"}
    assert notes == ("m/ppl:0.2 of study has other weights than before under that name; it is not merged.",)
    found, notes = merging.merged([run, msgspec.structs.replace(study, weights={})])  # nothing to compare
    assert set(found["m/ppl:0.2"].perplexity) == {"self", "new"}
    assert notes == ()


def test_weights_are_what_a_plan_leaves():
    plan = Plan(Base("m", "b" * 16), "ppl", Target("ratio", 0.2), Achieved(0.2, 2), (BlockKeep(0), BlockKeep(2)))
    seeded = msgspec.structs.replace(plan, provenance=Provenance(seed=3), method="taylor")
    assert merging.weights(plan) == merging.weights(seeded)
    assert merging.weights(plan) != merging.weights(msgspec.structs.replace(plan, keep=plan.keep[:1]))
    biased = msgspec.structs.replace(plan, compensation="flap")
    again = msgspec.structs.replace(biased, provenance=Provenance(calibration="c"))
    assert merging.weights(biased) != merging.weights(again)  # biases come from the text


def test_a_run_and_a_study_of_other_weights_are_told_apart_in_the_report(folder, tmp_path):
    results, _ = report_cases.quick()
    run = save(results, tmp_path / "run", {"reference": cases.quality(), "reference/ppl:0.2": cases.quality(0.25)})
    plan = Plan(Base("reference", "b" * 16), "ppl", Target("ratio", 0.2), Achieved(0.2, 10), (BlockKeep(0),))
    (run / "subjects" / "x").mkdir(parents=True)
    from shortllama.plans import write_plan

    write_plan(run / "subjects" / "x" / "plan.json", plan)
    made = publish.gather([run, folder])[0]
    assert any("reference/ppl:0.2 of mine has other weights than before" in note for note in made.notes)
    values = dict(
        zip(column(table(made, "perplexities"), "subject"), column(table(made, "perplexities"), "nll"), strict=True)
    )
    assert values["reference/ppl:0.2"] == pytest.approx(cases.DENSE_NATS + 0.25)
    assert values["reference/mag+:0.2"] == pytest.approx(cases.DENSE_NATS + 0.3)
