from pathlib import Path

from fastalign.memory import fits

PAGE = Path(__file__).parents[2] / "docs/how-to/what-fits.md"
BEGIN, END = "<!-- tables of fastalign/memory/fits.py -->\n", "\n<!-- end of the tables -->"


def test_the_page_holds_the_tables_of_the_code(generated):
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    generated(PAGE, f"{before}{BEGIN}\n{fits.tables()}\n{END}{after}")


def test_parameters_are_those_that_the_names_say():
    billions = {name: shapes.parameters / 1e9 for name, shapes in fits.MODELS.items()}
    assert 0.1345 < billions["SmolLM2-135M"] < 0.1346
    assert abs(billions["Llama-3.1-8B"] - 8.030) < 0.001
    assert abs(billions["Qwen2.5-0.5B"] - 0.494) < 0.001
    assert abs(billions["Llama-3.1-70B"] - 70.554) < 0.001
    assert abs(billions["Qwen3-14B"] - 14.768) < 0.001
