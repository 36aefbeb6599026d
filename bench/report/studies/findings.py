"""What a study says, in sentences: each with its number, its cause and the command to run next. Pure."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from statistics import median

from bench.report import quantities, wording
from bench.report.studies import beside, claims, commands, pairing
from bench.report.studies.held import Held
from bench.report.studies.outcomes import Outcome, comparable, mean, named, outcomes, recipes, spread
from bench.report.values import Finding
from shortllama.evaluation.tasks import TASKS
from shortllama.studies import summary
from shortllama.study import NONE

_PER_RULE = 4


def findings(held: Held) -> tuple[Finding, ...]:
    """Return what the study says, the most decisive first."""
    return tuple(finding for rule in RULES for finding in rule(held)[:_PER_RULE])


# -- which method ------------------------------------------------------------------------------------------------------


def best(held: Held) -> list[Finding]:
    """The method with the lowest perplexity at each ratio, among those retrained alike, and between cuts none."""
    text = _text(held)
    found: list[Finding] = []
    for ratio, rivals in _by_ratio(held, text).items():
        level = median([one.removed for one in rivals])
        alike = [one for one in rivals if abs(one.removed - level) <= claims.ALIKE]
        ranked = sorted(alike, key=lambda one: mean(one.result(text)))
        if len(ranked) > 1:
            found.append(_best(held, text, ratio, ranked, [one for one in rivals if one not in alike]))
    return found


def _best(held: Held, text: str, ratio: float, ranked: Sequence[Outcome], others: Sequence[Outcome]) -> Finding:
    first, second = ranked[:2]
    worst = ranked[-1]
    base = held.dense.perplexity[text].perplexity if held.dense and text in held.dense.perplexity else None
    after = "without retraining" if first.recipe == NONE else f"after {first.recipe}"
    values = f"{_value(first, text)} on {text}, {_value(second, text)} of {named(second, ranked)} next"
    values += f", {_value(worst, text)} of {named(worst, ranked)} last" if len(ranked) > 2 else ""
    values += f"; dense {quantities.significant(base)}" if base else ""
    apart = _apart(first, second, text)
    seeds = len(first.rows) > 1 or len(second.rows) > 1
    verb = "keeps most" if apart else "is ahead by less than seeds differ" if seeds else "is level with the next"
    name = named(first, ranked)
    headline = f"At {quantities.share(ratio)}, {name} {verb} {after}: perplexity {values}."
    cause = f"{name} removed {_removed(first)} of the parameters, {named(second, ranked)} {_removed(second)}; "
    cause += f"{_seeds(ranked)}."
    if others:
        gone = [f"{named(one, others)} ({_removed(one)}, perplexity {_value(one, text)})" for one in others]
        cause += f" Not ranked, since they removed another share: {wording.join(gone)}."
    brief = f"At {quantities.share(ratio)} {name} {'is best' if apart else verb} {after}: perplexity "
    brief += quantities.significant(mean(first.result(text)))
    brief += f" where the dense model has {quantities.significant(base)}." if base else "."
    return Finding(
        "best", headline, cause, commands.prune(first.first) or commands.again(held), "perplexity-retraining", brief
    )


def _value(one: Outcome, text: str) -> str:
    values = one.result(text)
    ends = spread(values)
    said = quantities.significant(mean(values))
    return said if ends is None else f"{said} ({quantities.interval(ends, 'number')} over {len(values)} seeds)"


def _apart(first: Outcome, second: Outcome, text: str) -> bool:
    """Return whether the worst seed of the first is better than the best one of the second."""
    return max(first.result(text)) < min(second.result(text))


def _seeds(ranked: Sequence[Outcome]) -> str:
    counts = {len(one.rows) for one in ranked}
    if counts == {1}:
        return "one seed each, so what seeds change is not known"
    return (
        "ranges are over seeds" if 1 not in counts else "ranges are over seeds, and where none is given there was one"
    )


def _removed(one: Outcome) -> str:
    return quantities.share(one.removed)


# -- what is claimed --------------------------------------------------------------------------------------------------


def claimed(held: Held) -> list[Finding]:
    """How many of the papers' claims hold, and which do not; the table has the others."""
    table = claims.table(held)
    if table is None:
        return []
    said: dict[str, list[str]] = {}
    for claim, _, verdict, *_ in table.rows:
        said.setdefault(str(verdict), []).append(str(claim))
    order = [one for one in (claims.HOLDS, claims.MIXED, claims.FAILS, claims.UNTOLD) if one in said]
    counts = wording.join([_counted(len(said[verdict]), verdict) for verdict in order])
    headline = (
        f"Of {wording.plural(len(table.rows), 'claim')} of the papers, {counts} on {quantities.inert(held.model)}."
    )
    named = order[::-1] if order == [claims.HOLDS] else [one for one in order[::-1] if one != claims.HOLDS]
    parts = [f"{verdict[:1].upper()}{verdict[1:]}: {'; '.join(said[verdict])}." for verdict in named]
    return [Finding("claims", headline, " ".join(parts), commands.again(held), brief=headline)]


def _counted(number: int, verdict: str) -> str:
    """A number with a verdict, as a plural where it is one."""
    said = verdict.replace("holds", "hold").replace("does", "do") if number > 1 else verdict
    return f"{number} {said}"


# -- what retraining does ----------------------------------------------------------------------------------------------


def won_back(held: Held) -> list[Finding]:
    """How much of the gap each recipe closed at each ratio: most and least."""
    text = _text(held)
    all_of_them = [one for one in outcomes(held) if not one.taught_between]
    found: list[Finding] = []
    for recipe in recipes(all_of_them):
        for ratio in dict.fromkeys(one.ratio for one in all_of_them if one.recipe == recipe):
            known = [one for one in all_of_them if (one.recipe, one.ratio) == (recipe, ratio)]
            known = [one for one in known if one.closed(text, held.dense)]
            if known:
                found.append(_won_back(held, text, sorted(known, key=lambda one: -mean(one.closed(text, held.dense)))))
    return found


def _won_back(held: Held, text: str, ranked: Sequence[Outcome]) -> Finding:
    most, least = ranked[0], ranked[-1]
    shares = [quantities.share(mean(one.closed(text, held.dense))) for one in (most, least)]
    how = f"{most.recipe} closed {shares[0]} of the gap in perplexity on {text} for {named(most, ranked)}"
    numbers = f"{quantities.significant(mean(most.before(text)))} to {quantities.significant(mean(most.after(text)))}"
    headline = f"At {quantities.share(most.ratio)} removed, {how} ({numbers})"
    headline += f", and {shares[1]} for {named(least, ranked)}." if least is not most else "."
    return Finding(
        "won-back", headline, _spent(ranked), commands.longer(held, most.first) or commands.again(held),
        "perplexity-retraining",
        f"{most.recipe} closed up to {shares[0]} of the gap at {quantities.share(most.ratio)} removed.",
    )  # fmt: skip


def _spent(ranked: Sequence[Outcome]) -> str:
    costs = [row.costs["retraining"] for one in ranked for row in one.rows if "retraining" in row.costs]
    if not costs:
        return ""
    tokens, seconds = mean(cost.tokens for cost in costs), mean(cost.wall_s for cost in costs)
    return f"Retraining read {quantities.count(tokens)} tokens in {quantities.seconds(seconds)}, mean over the runs."


def cuts(held: Held) -> list[Finding]:
    """One cut against several at one ratio, before and after retraining (the paper's Figure 5)."""
    text, all_of_them = _text(held), outcomes(held)
    taught = next((name for name in recipes(all_of_them) if name != NONE), None)
    found: list[Finding] = []
    for several in all_of_them:
        if several.in_steps and several.recipe == (taught or NONE) and several.before(text):
            once = next(
                (one for one in all_of_them if one.is_plain and not one.in_steps and _alike(one, several)), None
            )
            if once is not None and once.before(text):
                found.append(_cuts(held, text, once, several))
    return found


def _alike(one: Outcome, other: Outcome) -> bool:
    def of(which: Outcome) -> tuple[object, ...]:
        row = which.first
        return row.method, row.unit, which.ratio, which.calibration, which.recipe

    return of(one) == of(other)


def _cuts(held: Held, text: str, once: Outcome, several: Outcome) -> Finding:
    pruned = [mean(one.before(text)) for one in (several, once)]
    taught = [one.after(text) for one in (several, once)]
    how = several.label.partition(" ")[2].strip("()")
    headline = f"{several.first.method} at {quantities.share(several.ratio)} in several cuts ({how}): perplexity "
    headline += " against ".join(map(quantities.significant, pruned)) + f" in one cut, on {text}"
    cause = "The paper finds several cuts better before retraining, and no longer after it"
    if all(taught):
        after = [mean(values) for values in taught]
        headline += f"; after {several.recipe} " + " against ".join(map(quantities.significant, after))
        gaps = [abs(math.log(a / b)) for a, b in (pruned, after)]
        same = pruned[0] < pruned[1] and gaps[1] < gaps[0]
        cause += ": so it is here." if same else ": it is not so here."
    else:
        cause += "; these models were not retrained."
    if several.taught_between:
        cost = mean(row.costs["between"].wall_s for row in several.rows if "between" in row.costs)
        cause += f" Retraining between the cuts took {quantities.seconds(cost)} more."
    return Finding("cuts", f"{headline}.", cause, commands.again(held), "one-shot-iterative")


# -- against the paper -------------------------------------------------------------------------------------------------


def paper_order(held: Held) -> list[Finding]:
    """How often the study ranks two rows of a table as the paper does."""
    by: dict[str, dict[str, list[beside.Order]]] = {}
    for order in beside.orders(held):
        by.setdefault(order.what, {}).setdefault(order.table, []).append(order)
    return [_paper_order(held, what, tables) for what, tables in by.items()]


def _paper_order(held: Held, what: str, tables: dict[str, list[beside.Order]]) -> Finding:
    counts = {
        number: (sum(one.same for one in orders), sum(one.pairs for one in orders)) for number, orders in tables.items()
    }
    told = wording.join([f"{same} of {pairs} in Table {number}" for number, (same, pairs) in counts.items()])
    headline = f"By {what}, pairs of rows stand in the paper's order: {told}."
    cause = "A pair is two rows of one level of the paper that both have."
    if not pairing.is_papers(held):
        name = quantities.inert(held.model)
        cause += f" {name} is not LLaMA-7B: where the order differs, neither is wrong for it."
    return Finding("paper-order", headline, cause, commands.again(held))


# -- tasks -------------------------------------------------------------------------------------------------------------


def choosing(held: Held) -> list[Finding]:
    """Whether generating (LAMBADA) falls before choosing does, as ShortGPT (arXiv 2403.03853) sees it."""
    dense = held.dense.zero_shot.tasks if held.dense and held.dense.zero_shot else {}
    known = {name: one for name, one in dense.items() if name in TASKS}
    told_by = {} if held.dense is None else summary.telling(held.dense)
    writes = {name: one for name, one in known.items() if TASKS[name].choices == (1, 1)}
    picks = {name: one for name, one in known.items() if name not in writes}
    if not writes or not picks:
        return []
    dull = [name for name in known if name not in told_by]
    if set(writes) <= set(dull) or set(picks) <= set(dull):
        told = ", ".join(f"{name} {quantities.accuracy(known[name].value)}" for name in dull)
        headline = f"Whether generating falls before choosing cannot be told: the dense model guesses ({told})."
        cause = f"Within {summary.CERTAIN:g} standard errors of guessing there is nothing that pruning could take away."
        command = shlex.join(["shortllama", "eval", held.model, "--tasks", ",".join(known)])
        return [Finding("choosing", headline, cause, command)]
    useful = [[name for name in names if name not in dull] for names in (picks, writes)]
    lost = claims.falls(held)
    return [_choosing(held, lost, useful, dull)] if lost else []


def _choosing(held: Held, lost: Sequence[claims.Fall], useful: Sequence[Sequence[str]], dull: Sequence[str]) -> Finding:
    counts = {how: sum(one.writing_first is how for one in lost) for how in (True, False, None)}
    one = max(lost, key=lambda item: abs(item.written - item.chosen))
    every = [other.outcome for other in lost]
    where = f"{named(one.outcome, every)} at {quantities.share(one.outcome.ratio)}"
    headline = (
        f"Generating ({wording.join(useful[1])}) fell more than choosing ({wording.join(useful[0])}) in {counts[True]} "
        f"of {wording.plural(len(lost), 'way')} to prune, less in {counts[False]}, and as much within two standard "
        f"errors in {counts[None]}; furthest apart, {where} lost {quantities.share(one.written)} and "
        f"{quantities.share(one.chosen)} of the dense model's lead over guessing."
    )
    cause = "Choices are told apart by what is left of a ranking; a word to write has to be the likeliest of all."
    cause += f" Left out, because the dense model guesses: {wording.join(dull)}." if dull else ""
    return Finding("choosing", headline, cause, commands.again(held))


# -- what is left ------------------------------------------------------------------------------------------------------


def unfinished(held: Held) -> list[Finding]:
    """Runs that were asked for and are not done."""
    if held.wanted is None or held.wanted <= len(held.rows):
        return []
    headline = f"{len(held.rows)} of {wording.plural(held.wanted, 'run')} of the study are finished."
    command = shlex.join(["shortllama", "study", f"{held.name}/study.toml", "--out", held.name, "--resume"])
    return [Finding("unfinished", headline, "What follows is drawn from these alone.", command, brief=headline)]


RULES: tuple[Callable[[Held], list[Finding]], ...] = (
    unfinished, best, claimed, won_back, cuts, paper_order, choosing,
)  # fmt: skip


# -- shared parts ------------------------------------------------------------------------------------------------------


def _text(held: Held) -> str:
    """The text that findings speak of: the first."""
    return next(iter(held.texts), "")


def _by_ratio(held: Held, text: str) -> dict[float, list[Outcome]]:
    """Return what came out at each ratio, retrained alike: by the first recipe that two methods or more have."""
    found: dict[float, list[Outcome]] = {}
    every = [one for one in outcomes(held) if not one.taught_between]
    for ratio in dict.fromkeys(one.ratio for one in every):
        for recipe in recipes(every):
            alike = [one for one in every if (one.ratio, one.recipe) == (ratio, recipe) and one.result(text)]
            alike = list({one.label: one for one in reversed(alike)}.values())[::-1]  # the first calibration of each
            if len(alike) > 1 and comparable(text, [row.result for one in alike for row in one.rows]):
                found[ratio] = alike
                break
    return found
