"""A comparison as JUnit XML, which every CI system shows: a test case a cell. Pure.

A document has a failure or an error exactly where the command's exit code is not 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree as Xml

from bench import comparison_text
from bench.comparison import Change, Comparison
from bench.report.quantities import inert

SUITE = "shortllama compare"


def document(comparison: Comparison, *, strict: bool = False) -> bytes:
    """Return the document. Regressions that gate fail their cell, with `strict` doubt too; other doubt skips it."""
    cases = [_environments(comparison)] if comparison.differing else []
    cells: dict[str, list[Change]] = {}
    for change in comparison.changes:
        cells.setdefault(change.cell_id, []).append(change)
    cases += [_cell(changes, strict) for changes in cells.values()]
    counts = {f"{kind}s": sum(case.find(kind) is not None for case in cases) for kind in ("failure", "error")}
    skipped = sum(case.find("skipped") is not None for case in cases)
    totals = {"tests": len(cases), **counts, "skipped": skipped}
    suite = Xml.Element("testsuite", {"name": SUITE} | {key: str(value) for key, value in totals.items()})
    suite.extend(cases)
    Xml.SubElement(suite, "system-out").text = inert(
        "; ".join((comparison_text.headline(comparison), *comparison.notes))
    )
    root = Xml.Element("testsuites")
    root.append(suite)
    Xml.indent(root)
    return Xml.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def _environments(comparison: Comparison) -> Xml.Element:
    case = Xml.Element("testcase", {"classname": SUITE, "name": "environments"})
    message = "environments differ: " + inert("; ".join(comparison.differing))
    Xml.SubElement(case, "error", {"type": "incomparable", "message": message})
    return case


def _cell(changes: Sequence[Change], strict: bool) -> Xml.Element:
    first = changes[0]
    case = Xml.Element("testcase", {"classname": inert(first.subject), "name": inert(first.cell)})
    failed = [one for one in changes if one.decision.verdict == "regressed" and one.gates]
    doubtful = [one for one in changes if one.decision.verdict in ("inconclusive", "incomparable")]
    if failed:
        _say(case, "failure", "regressed", failed)
    elif doubtful:
        unclear = any(one.decision.verdict == "inconclusive" for one in doubtful)
        _say(case, "failure" if strict and unclear else "skipped", doubtful[0].decision.verdict, doubtful)
    return case


def _say(case: Xml.Element, kind: str, verdict: str, changes: Sequence[Change]) -> None:
    """Add what was found to a case: the worst change as the message, all as the text."""
    worst = sorted(changes, key=lambda change: -change.decision.worse)
    lines = [inert(comparison_text.line(change)) for change in worst]
    element = Xml.SubElement(case, kind, {"type": verdict, "message": lines[0]})
    element.text = "\n".join(lines)
