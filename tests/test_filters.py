"""`--cells`: comparisons of fields, and nothing else."""

from __future__ import annotations

import pytest

from bench import filters
from bench.cells import Cell
from shortllama.errors import InputError

CELL = Cell("reference/ppl:0.25", "eager", "float32", "sdpa", 12, 32, "48MiB", 8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batch<=8 and runtime==eager", True),
        ("batch < 8", False),
        ("not batch < 8", True),
        ("1 <= batch <= 8", True),
        ("1 <= batch < 8 or runtime == 'static'", False),
        ("runtime != eager", False),
        ("batch in (1, 8)", True),
        ("runtime not in [static, paper]", True),
        ("'ppl' in subject", True),
        ("subject == 'reference/ppl:0.25'", True),
        ("budget == '48MiB' and (output == 32 or prompt == 1)", True),
    ],
)
def test_a_filter_chooses_cells(text: str, expected: bool) -> None:
    assert filters.parse(text)(CELL) is expected


@pytest.mark.parametrize(
    "text",
    [
        "", "batch", "batch <", "batch = 8", "1 < 2", "eager == static", "batch == eager", "subject <= 3",
        "batch.real == 8", "batch ** 2 == 64", "__import__('os').system('true') == 0", "batch == (lambda: 8)()",
        "[batch for _ in (1,)] == [8]", "batch is 8", "batch in 8", "batch + 1 == 9", "batch == None", "x" * 10_000,
        "(" * 500 + "batch==1" + ")" * 500, "-batch == 1", "batch == 8; batch == 8",
    ],
)  # fmt: skip
def test_anything_else_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError) as caught:
        filters.parse(text)
    assert "\n" not in str(caught.value)
    assert "--cells" in str(caught.value)
