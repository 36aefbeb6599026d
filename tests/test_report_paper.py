"""The paper's tables in a report: every row of the paper, our numbers beside, and causes that are worked out."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import report_cases as cases

from bench import calibrated, paper
from bench.measurement import Measurement
from bench.report import build, paper_causes, paper_tables, quantities, summaries
from bench.report.assembly import build as build_all
from bench.report.values import Report, Table
from bench.store import Results
from shortllama import catalogue

GIB = 1 << 30


def report_of(results: Results) -> Report:
    return build_all([results], None, (), calibrated.shapes(results.measurements))


@pytest.fixture(scope="module")
def llama() -> Report:
    return report_of(cases.llama()[0])


def named(report: Report, name: str) -> Table:
    return next(one for one in report.tables if one.name == name)


def place(row: Measurement) -> tuple[str, str, int, int]:
    return row.cell.subject, row.cell.runtime, row.cell.batch, row.cell.output


def rows_of(one: Table) -> list[dict]:
    return [dict(zip([column.key for column in one.columns], row, strict=True)) for row in one.rows]


def renamed(results: Results, model: str, plans: dict[str, str] | None = None) -> Results:
    """The same rows for subjects under other names."""

    def subject(name: str) -> str:
        return (plans or {}).get(name, name.replace("llama-7b", model))

    cells = [msgspec.structs.replace(row.cell, subject=subject(row.cell.subject)) for row in results.measurements]
    rows = tuple(
        msgspec.structs.replace(row, cell=cell, cell_id=cell.id)
        for row, cell in zip(results.measurements, cells, strict=True)
    )
    return Results(results.path, results.environments, rows, ())


def test_the_papers_numbers_are_the_papers() -> None:
    """Spot checks against the printed tables, one cell of each."""
    tables = paper.read()
    latency = {paper_tables.name_of(row): row for row in tables.latency}
    assert (latency["llama-7b"].h100_tok_s, latency["llama-7b/flap-35"].rtx3090_latency_s) == (53.7, 8.1)
    assert latency["llama-13b"].rtx3090_tok_s is None
    assert latency.keys() == {shape.name for shape in tables.shapes}
    memory = {(row.model, row.blocks, row.output, row.batch): row.gib for row in tables.memory}
    assert memory["llama-7b", 32, 512, 64] == 61.8
    assert memory["llama-13b", 40, 512, 64] is None
    assert len(tables.memory) == 48
    assert {row.method for row in tables.zero_shot} >= {"taylor+", "ppl"}
    assert "2402.02834" in tables.source


def test_every_shape_of_the_catalogue_is_table_1s() -> None:
    for row in paper.read().shapes:
        shape = catalogue.lookup(row.name)
        assert len(shape.blocks) == row.blocks
        assert shape.parameters == pytest.approx(row.params_b * 1e9, rel=1e-3)


def test_tables_appear_for_the_papers_shapes_only(llama: Report) -> None:
    names = [one.name for one in llama.tables if one.name.startswith("paper")]
    assert names == ["paper-table-1", "paper-table-2", "paper-table-9", "paper-differences"]
    results, quality = cases.quick()
    assert not [one.name for one in build([results], quality).tables if one.name.startswith("paper")]


def test_table_1_shows_what_is_missing(llama: Report) -> None:
    found = {row["row"]: row for row in rows_of(named(llama, "paper-table-1"))}
    assert len(found) == 13
    depth = found["LLaMA-7B, 26 blocks"]
    assert (depth["subject"], depth["paper_blocks"], depth["blocks"]) == ("llama-7b/depth-26", 26, 26)
    assert depth["paper_parameters"] == pytest.approx(depth["parameters"], rel=1e-3)
    pruned = found["LLaMA-7B, LLM-Pruner 20 %"]
    assert (pruned["paper_ffn"], pruned["ffn"]) == ("8,256", "8,256"), "of the blocks that it prunes"
    flap = found["LLaMA-7B, FLAP 20 %"]
    assert flap["paper_heads"] == "26.9 ± 7.5"
    assert flap["heads"].startswith("26.9 ± ")
    absent = found["LLaMA-7B, Wanda-sp 27 %"]
    assert absent["paper_heads"] == "23"
    assert [absent[key] for key in ("subject", "parameters", "blocks", "heads", "ffn")] == [None] * 5


def test_table_2_has_the_papers_layout_with_each_runtime_beside(llama: Report) -> None:
    one = named(llama, "paper-table-2")
    found = {row["row"]: row for row in rows_of(one)}
    assert list(found)[:5] == ["LLaMA-7B", "20 % Wanda-sp", "20 % FLAP", "20 % LLM-Pruner", "20 % depth"]
    assert [c.title for c in one.columns if c.title.startswith("Here")] == [
        "Here, eager",
        "Here, static",
        "Here, paper",
    ]
    depth = found["20 % depth"]
    assert (depth["h100_latency_s"], depth["h100_tok_s"]) == (1.9, 66.0)
    assert depth["h100_speedup"] == pytest.approx(66.0 / 53.7)
    results, _ = cases.llama()
    (row,) = [row for row in results.measurements if place(row) == ("llama-7b/depth-26", "eager", 1, 128)]
    call = summaries.summarise(row).call_s
    assert call is not None
    assert depth["here_1_latency_s"] == call.value
    assert depth["here_1_tok_s"] == pytest.approx(128 / call.value)
    low, high = depth["here_1_speedup_interval"]
    assert low < depth["here_1_speedup"] < high
    assert found["35 % FLAP"]["here_1_latency_s"] is None


def test_what_ran_out_of_memory_says_so() -> None:
    results = cases.sweep(
        {"vicuna-13b-v1.3": (40, 26e9, 13_016_000_000), "vicuna-13b-v1.3/depth-25": (25, 16e9, 8_258_000_000)},
        {"eager": 1.0}, (1,), env=cases.machine("NVIDIA GeForce RTX 3090"), budget="none", limit=20e9, outputs=(128,),
        dtype="float16", kv=16384,
    )  # fmt: skip
    report = report_of(results)
    found = {row["row"]: row for row in rows_of(named(report, "paper-table-4"))}
    assert found["Vicuna-13B"]["rtx3090_latency_s"] == found["Vicuna-13B"]["here_1_latency_s"] == "oom"
    assert found["37 % depth"]["rtx3090_speedup"] is None, "the paper's dense model did not run there"
    assert found["37 % depth"]["here_1_latency_s"] > 0
    memory = {(row["row"], row["whose"]): row for row in rows_of(named(report, "paper-table-9"))}
    assert memory["Vicuna-13B", "paper, H100 80 GiB"]["L512_M64_bytes"] == "oom"
    assert memory["Vicuna-13B", "here, eager"]["L128_M1_bytes"] == "oom"
    assert named(report, "paper-table-1").rows[0][1] == "vicuna-13b-v1.3"


@pytest.mark.parametrize("other", [{"dtype": "float32"}, {"budget": "24GiB"}, {"prompt": 13}])
def test_cells_of_another_protocol_are_not_set_beside(other: dict[str, Any]) -> None:
    protocol: dict[str, Any] = {"dtype": "float16", "budget": "none", "prompt": 12, "outputs": (128,), "limit": 80e9}
    results = cases.sweep({"llama-7b": (32, 13.5e9, 6_738_000_000)}, {"eager": 1.0}, (1,), **protocol | other)
    names = [one.name for one in report_of(results).tables]
    assert "paper-table-1" in names
    assert not {"paper-table-2", "paper-table-9", "paper-differences"} & set(names)


def test_shapes_are_found_by_their_widths() -> None:
    results = renamed(cases.llama()[0], "llama-7b", {"llama-7b/depth-26": "llama-7b/depth:26"})
    found = {row["row"]: row["subject"] for row in rows_of(named(report_of(results), "paper-table-1"))}
    assert found["LLaMA-7B, 26 blocks"] == "llama-7b/depth:26"
    assert found["LLaMA-7B, Wanda-sp 27 %"] is None


def test_table_9_is_met_by_the_model_with_three_copies(llama: Report) -> None:
    found = {(row["row"], row["whose"]): row for row in rows_of(named(llama, "paper-table-9"))}
    theirs = found["LLaMA-7B", "paper, H100 80 GiB"]["L512_M64_bytes"]
    assert theirs == 61.8 * GIB
    assert found["LLaMA-7B", "model of its stack, 3 KV copies"]["L512_M64_bytes"] == pytest.approx(theirs, rel=0.012)
    assert 29 < found["LLaMA-7B", "model of today's, 1 KV copy"]["L512_M64_bytes"] / GIB < 30
    (measured,) = [row for row in cases.llama()[0].measurements if place(row) == ("llama-7b", "eager", 64, 512)]
    assert found["LLaMA-7B", "here, eager"]["L512_M64_bytes"] == measured.memory.allocated


def test_the_cost_of_a_block_is_fitted_on_both_sides(llama: Report) -> None:
    found = {row["what"]: row for row in rows_of(named(llama, "paper-differences"))}
    assert list(found) == ["Device", "Stack", "Protocol", "Seconds a token of LLaMA-7B", "Copies of the KV cache"]
    blocks = found["Seconds a token of LLaMA-7B"]
    assert "H100: 679 µs + 560 µs a block" in blocks["paper"].replace("\u00a0", " ")
    # The law that these cases are made by: launches, which grow with the batch, weights, and the mean cache.
    cost = 4e-4 * (1 + 1 / 40) + (13.5e9 - 11e9) / 6 / 2.4e12 + 16384 * (12 + 64) / 2.4e12
    measured = float(blocks["here"].partition("eager: ")[2].partition("+ ")[2].partition("\u00a0")[0]) * 1e-6
    assert measured == pytest.approx(cost, rel=0.02)
    assert "22\u00a0% of it on the H100" in blocks["so"], "0.121 of 0.560 ms"
    assert f"1.00{quantities.TIMES} the H100's" in found["Device"]["so"]
    assert "61.8\u00a0GiB there, 29.2\u00a0GiB with one copy" in found["Copies of the KV cache"]["so"]


def test_simulated_rows_are_labelled() -> None:
    results, _ = cases.llama()
    rows = tuple(msgspec.structs.replace(row, simulated=True) for row in results.measurements)
    report = report_of(Results(results.path, results.environments, rows, ()))
    for one in report.tables:
        if one.name in ("paper-table-2", "paper-table-9", "paper-differences"):
            assert "simulated" in one.source
    assert any("simulated" in column.title for column in named(report, "paper-table-2").columns)
    assert all(row["here_1_speedup_interval"] is None for row in rows_of(named(report, "paper-table-2")))
    assert "(simulated)" in rows_of(named(report, "paper-differences"))[0]["here"]


def test_nothing_of_the_paper_gives_no_causes() -> None:
    assert paper_causes.tables(summaries.grid([], [], {}, {})) == ()
